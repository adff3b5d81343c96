"""What users see when their input is wrong: one picklable tree, one sentence each.

Every error a user can cause derives from `TunerError`; the command line prints its message and exits with
`exit_code`, without a traceback. Anything else is a bug of ours. The classes carry nothing but the parts of their
message, so they survive pickling between Ray processes.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass

from tuner.redact import redact

_DISK_REASONS = {
    errno.ENOSPC: "the disk is full; free space or give another place",
    errno.EDQUOT: "the disk quota is used up; free space or give another place",
    errno.EROFS: "the disk is read-only; give another place",
    errno.EACCES: "permission denied; give another place or change its permissions",
    errno.EPERM: "permission denied; give another place or change its permissions",
    errno.ENOTDIR: "a parent of it is a file, not a folder; give another place",
    errno.ENOENT: "does not exist; give an existing one",
    errno.EISDIR: "is a folder; give a file",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.ELOOP: "its symbolic links form a loop; give another place",
}


@dataclass(frozen=True)
class Field:
    """A field of a configuration, as a part of a message. The command line shows its option instead of its name."""

    name: str

    def __str__(self) -> str:
        return self.name


class TunerError(Exception):
    """Base of all errors a user can cause and fix. The message names the file, field or row and what to do.

    A message may come in parts, some of them fields: `ConfigError(Field("max_gpus"), " 9: there are no GPUs")`. It
    holds no password, key or token, whatever the option or the library's exception held that it quotes.
    """

    exit_code = 2

    def __init__(self, *parts: str | Field) -> None:
        super().__init__(*(part if isinstance(part, Field) else redact(part) for part in parts))

    def __str__(self) -> str:
        return "".join(str(part) for part in self.args)

    def name_fields(self, names: Mapping[str, str]) -> None:
        """Show fields under other names from now on: `--max-gpus` for `max_gpus`. Others keep theirs."""
        self.args = tuple(names.get(part.name, part) if isinstance(part, Field) else part for part in self.args)


class ConfigError(TunerError):
    """A configuration value is missing, unknown or out of range."""


class SpaceError(ConfigError):
    """A search space file is unknown, mistyped or empty."""


class PlacementError(ConfigError):
    """A LoRA target does not exist on the encoding path of this encoder, or matches outside it."""


class DataError(TunerError):
    """A manifest, recording or prepared store cannot be used."""


class EncoderError(TunerError):
    """An encoder folder or checkpoint cannot be used."""


class AdapterError(TunerError):
    """An exported adapter does not fit the encoder or misses tensors."""


class StudyError(TunerError):
    """A study exists already, is unknown, or was started with other settings."""


class ClusterError(TunerError):
    """Ray cannot be started here, or the cluster that was named cannot be joined."""


class StorageError(TunerError):
    """The place of runs and checkpoints cannot be reached, is full, or refuses access."""


class TrialFailed(TunerError):
    """One trial ended without a result (NaN loss, out of memory); the search goes on."""


def disk_reason(error: OSError) -> str | None:
    """What is wrong with a place and what to do; None where that is no fault of the place, as for a damaged disk."""
    return _DISK_REASONS.get(error.errno) if error.errno is not None else None


def first_line(error: BaseException) -> str:
    """Type and first line of an error: a reason that fits into a table. CUDA's out-of-memory says there what it is."""
    return redact(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
