"""What users see when their input is wrong: one picklable tree, one sentence each.

Every error a user can cause derives from `TunerError`; the command line prints its message and exits with
`exit_code`, without a traceback. Anything else is a bug of ours and keeps its traceback. The classes carry nothing
but their message, so they survive pickling between Ray processes.
"""

from tuner.redact import redact


class TunerError(Exception):
    """Base of all errors a user can cause and mend. The message names the file, field or row and what to do.

    It holds no password, key or token, whatever the option or the library's exception held that it quotes.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


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


class StorageError(TunerError):
    """The place of runs and checkpoints cannot be reached, is full, or refuses access."""


class TrialFailed(TunerError):
    """One trial ended without a result (NaN loss, out of memory); the search goes on."""


def first_line(error: BaseException) -> str:
    """Type and first line of an error: a reason that fits into a table. CUDA's out-of-memory says there what it is."""
    return redact(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
