"""What an error of pyarrow's file systems means: a cloud's answer comes in the text of an OSError alone."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_TOLD_FULL = re.compile(r"status 507|quota ?exceeded|storage ?full", re.IGNORECASE)
_TOLD_DENIED = re.compile(
    r"access_?denied|status 40[13]\b|invalid_?access_?key|signature_?does_?not_?match|permission_denied|unauthenticated"
    r"|expired_?token|invalid_?client_?token|unrecognized_?client",
    re.IGNORECASE,
)
_TOLD_NO_BUCKET = re.compile(r"no_?such_?bucket|bucket does not exist|bucket '.*' not found", re.IGNORECASE)


@dataclass(frozen=True)
class Fault:
    """Why a storage does not do what it is asked, as the end of a sentence that begins with its URI."""

    sentence: str
    passes: bool  # whether trying again may help


def read_fault(error: OSError, patience: float) -> Fault | None:
    """What is wrong with the storage; None: the file is simply not there."""
    text = " ".join(str(error).split())
    if _TOLD_NO_BUCKET.search(text):
        return Fault("there is no such bucket; create it, or correct the URI", passes=False)
    if isinstance(error, FileNotFoundError):
        return None
    if error.errno in _FORBIDDEN or _TOLD_DENIED.search(text):
        return Fault("access is denied; give this machine the right to read and write there", passes=False)
    if error.errno in _FULL or _TOLD_FULL.search(text):
        return Fault(f"full, and still so after {patience:g} s; make room there and run it again", passes=True)
    # What Arrow was about to do comes first; the cloud's own words are what says more.
    reason = os.strerror(error.errno) if error.errno else text[max(0, text.find("AWS Error")) :].split(";")[0][:200]
    return Fault(
        f"cannot be reached, and still not after {patience:g} s ({reason}); run it again when it is back", passes=True
    )
