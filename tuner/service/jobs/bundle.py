"""Files of a study as lines of text and back: what a job on the head prints, and a laptop reads from the job's log.

Lines are events like those of a search: `file` announces a file with its size and SHA-256, `data` brings the next piece
of it (zlib, then base64), `bundle_end` says how many files there were. The reader trusts the writer with nothing: only
names that a study has are taken, of ordinary files, in sizes with a limit, and only whole.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tuner.errors import Field, StudyError
from tuner.redact import printable
from tuner.report.handover import ADAPTER_FILES
from tuner.study.events import parse_line
from tuner.study.folder import ADAPTERS, FRONT_FILE, JOURNAL_FILE, RECORD_FILE

RECORDS = (RECORD_FILE, JOURNAL_FILE, FRONT_FILE)
# A line has up to 64 kB, a message of Ray's log tail about one line.
PIECE_BYTES = 48 * 1024
MAX_BYTES = 2 * 1024**3
_NAMES = re.compile(
    rf"({'|'.join(map(re.escape, RECORDS))}|{ADAPTERS}/t\d{{4,9}}/({'|'.join(map(re.escape, ADAPTER_FILES))}))",
    re.ASCII,
)


def bundle_lines(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """The lines of some files of a study, which may be written to meanwhile.

    Args:
        names: paths below `folder`; one that is missing is omitted.

    Raises:
        StudyError: they are larger than a bundle may be; nothing was printed then.
    """
    present = [name for name in names if (folder / name).is_file()]
    size = sum((folder / name).stat().st_size for name in present)
    if size > MAX_BYTES:
        raise StudyError(
            f"{folder}: {size / 1e9:.1f} GB are too much to send as text (limit {MAX_BYTES / 1e9:.1f} GB); "
            "take single points with ",
            Field("trial"),
            ", or copy the folder by ssh",
        )
    for name in present:
        with (folder / name).open("rb") as file:
            yield from _file_lines(name, file)
    yield _event("bundle_end", files=len(present))


def _file_lines(name: str, file: BinaryIO) -> Iterator[str]:
    """One file as long as it is now: a journal that grows meanwhile is sent up to here."""
    size, digest = 0, hashlib.sha256()
    while piece := file.read(PIECE_BYTES):
        digest.update(piece)
        size += len(piece)
    yield _event("file", name=name, bytes=size, sha256=digest.hexdigest())
    file.seek(0)
    while size:
        piece = file.read(min(PIECE_BYTES, size))
        if not piece:
            raise StudyError(f"{name}: became shorter while it was read; try again")
        size -= len(piece)
        yield _event("data", piece=base64.b64encode(zlib.compress(piece, 1)).decode("ascii"))


def _event(event: str, **fields: object) -> str:
    return json.dumps({"event": event, **fields})


class BundleReader:
    """Takes the lines of a bundle one after another and writes its files below a folder.

    Args:
        folder: exists and is empty; the caller throws it away if the bundle does not come whole.
        on_bytes: called with how many bytes have come in all, and how many are announced so far.
    """

    def __init__(self, folder: Path, on_bytes: Callable[[int, int], None] | None = None) -> None:
        self.folder, self.on_bytes = folder, on_bytes
        self.names: list[str] = []
        self.whole = False
        self._received = self._announced = 0
        self._file: BinaryIO | None = None
        self._left, self._sha256, self._digest = 0, "", hashlib.sha256()

    def line(self, line: str) -> None:
        """One line of the job's log; what is no part of a bundle is passed over.

        Raises:
            StudyError: the bundle is not what a study's can be, or did not come through whole.
        """
        event = parse_line(line) if line.startswith('{"event": ') else None
        if event is None or self.whole:
            return
        try:
            if event["event"] == "file":
                self._begin(str(event["name"]), int(str(event["bytes"])), str(event["sha256"]))
            elif event["event"] == "data":
                self._append(str(event["piece"]))
            elif event["event"] == "bundle_end":
                self._end(int(str(event["files"])))
        except (KeyError, ValueError, TypeError, binascii.Error, zlib.error) as error:
            raise _refusal(f"a line of it is damaged ({type(error).__name__})") from None

    def close(self) -> None:
        """Close a file that is incomplete."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self, name: str, size: int, sha256: str) -> None:
        if self._file is not None:
            raise _refusal(f"{self.names[-1]} is not whole")
        if _NAMES.fullmatch(name) is None or name in self.names:
            raise _refusal(f"{printable(name)} is no file of a study")
        self._announced += size
        if size < 0 or self._announced > MAX_BYTES:
            raise _refusal(f"it is larger than {MAX_BYTES / 1e9:.1f} GB")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.names.append(name)
        self._file, self._left, self._sha256, self._digest = path.open("xb"), size, sha256, hashlib.sha256()
        self._close_if_whole()

    def _append(self, piece: str) -> None:
        if self._file is None:
            raise _refusal("it has data outside its files")
        unpacker = zlib.decompressobj()
        # Never more than is left of the file, even if a small piece unpacks to much more.
        data = unpacker.decompress(base64.b64decode(piece, validate=True), self._left + 1)
        if len(data) > self._left or not unpacker.eof:
            raise _refusal(f"{self.names[-1]} is longer than announced")
        self._file.write(data)
        self._digest.update(data)
        self._left -= len(data)
        self._received += len(data)
        if self.on_bytes is not None:
            self.on_bytes(self._received, self._announced)
        self._close_if_whole()

    def _close_if_whole(self) -> None:
        if self._file is not None and self._left == 0:
            self.close()
            if self._digest.hexdigest() != self._sha256:
                raise _refusal(f"{self.names[-1]} has another SHA-256 than announced")

    def _end(self, files: int) -> None:
        if self._file is not None or files != len(self.names):
            raise _refusal("files are missing")
        self.whole = True


def _refusal(reason: str) -> StudyError:
    return StudyError(f"what the cluster sent cannot be used: {reason}; nothing of it was kept, try again")
