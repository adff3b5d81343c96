"""All paths of a study: in its local folder, and by the same names in a storage."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import StudyError

RECORD_FILE = "study.json"
JOURNAL_FILE = "journal.jsonl"
TRIALS_FILE = "trials.parquet"
FRONT_FILE = "front.json"
DATABASE_FILE = "study.db"
REPORT_FILE = "report.html"
CHECKPOINTS = "checkpoints"
ADAPTERS = "adapters"
TUNE = "tune"
LANES = "lanes"

MAX_NAME_BYTES = 200
_STUDY_NAME = re.compile(r"[^\W_][\w .+=@-]*")


@dataclass(frozen=True)
class StudyFolder:
    """The folder of one study; its name is the study's."""

    path: Path

    @property
    def name(self) -> str:
        """The study's name."""
        return self.path.name

    @property
    def record(self) -> Path:
        """The study's request and facts: `StudyRecord`."""
        return self.path / RECORD_FILE

    @property
    def journal(self) -> Path:
        """Events, one per line."""
        return self.path / JOURNAL_FILE

    @property
    def trials(self) -> Path:
        """The journal as a table."""
        return self.path / TRIALS_FILE

    @property
    def front(self) -> Path:
        """The confirmed front."""
        return self.path / FRONT_FILE

    @property
    def database(self) -> Path:
        """Optuna's storage."""
        return self.path / DATABASE_FILE

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / REPORT_FILE

    @property
    def tune(self) -> str:
        """Name of Ray Tune's folder inside this one."""
        return TUNE

    @property
    def lanes(self) -> Path:
        """Ray Train's folder for the lanes."""
        return self.path / LANES

    def checkpoint(self, trial: str) -> Path:
        """Weights and optimiser of a trial after its last epoch."""
        return self.path / checkpoint_name(trial)

    def adapter(self, trial: str) -> Path:
        """The exported adapter of a trial."""
        return self.path / adapter_name(trial)


def checkpoint_name(trial: str) -> str:
    """Path of a trial's checkpoint below its study."""
    return f"{CHECKPOINTS}/{trial}.pt"


def checkpoint_config_name(trial: str) -> str:
    """Path, in a storage, of the configuration that belongs to a checkpoint."""
    return f"{CHECKPOINTS}/{trial}.json"


def adapter_name(trial: str) -> str:
    """Path of a trial's exported adapter below its study."""
    return f"{ADAPTERS}/{trial}"


def check_study_name(name: str) -> str:
    """The name, if it is valid as the name of a folder, a job and an actor, and cannot lead out of its folder.

    Raises:
        StudyError: it is too long, does not begin with a letter or a digit, or has a character that is not allowed.
    """
    if not _STUDY_NAME.fullmatch(name):
        shown = name if len(name) <= MAX_NAME_BYTES else f"{name[:MAX_NAME_BYTES]}..."
        raise StudyError(
            f"study {shown!r}: is not a valid name; begin with a letter or a digit, and use only letters, digits, "
            "spaces and . _ + = @ -"
        )
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise StudyError(f"study {name[:20]}...: the name is longer than {MAX_NAME_BYTES} bytes; give a shorter one")
    return name
