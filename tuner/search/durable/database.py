"""The study's database, which waits for its disk instead of ending the search."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from tuner.config import TrialConfig
from tuner.errors import StudyError, TunerError, first_line
from tuner.patience import Patience
from tuner.study.journal import Journal
from tuner.study.objectives import Direction

P = ParamSpec("P")
T = TypeVar("T")


def open_database(path: Path, patience: Patience, study: str, directions: Sequence[Direction]) -> optuna.Study:
    """The study in a database, which is made if it is not there; all that is in it can be read.

    Raises:
        StudyError: the database is damaged, or the disk stays full or unreachable.
    """
    try:
        found = optuna.create_study(
            storage=PatientStorage(path, patience), study_name=study, directions=directions, load_if_exists=True
        )
        known = [direction.name.lower() for direction in found.directions]
        if known != list(directions):
            raise ValueError(f"its directions are {known}")
        for trial in found.get_trials(deepcopy=False):
            if "config" in trial.user_attrs:
                TrialConfig.model_validate_json(trial.user_attrs["config"])
                str(trial.user_attrs["origin"])
    except TunerError:
        raise
    # Optuna and SQLAlchemy raise whatever a wrong value leads to.
    except Exception as error:
        raise _damaged(path, error) from None
    return found


def check_database(study: optuna.Study, journal: Journal) -> None:
    """Refuse a study whose database was lost or emptied: its trials would be trained again, under the same names.

    Raises:
        StudyError: the journal has trials and the database has none.
    """
    known, folder = len(journal.history.trials), journal.folder
    if known and not study.get_trials(deepcopy=False):
        raise StudyError(
            f"{folder.database}: has no trials, but {folder.journal.name} has {known}; restore the database, or start "
            "a new study"
        )


def _damaged(path: Path, error: Exception) -> StudyError:
    return StudyError(f"{path}: is damaged ({first_line(error)[:200]}); restore the file or start a new study")


class PatientStorage(RDBStorage):
    """Optuna's SQLite storage that waits while the disk is full, the file locked or a file server unreachable.

    Each of its calls is one transaction, rolled back when it fails, so it can be repeated.

    Raises:
        StudyError: the disk stays full or unreachable (from every call).
    """

    def __init__(self, path: Path, patience: Patience) -> None:
        self._path, self._patience = path.resolve(), patience
        # A folder's name may have characters that are special in a URL.
        url = URL.create("sqlite", database=str(self._path)).render_as_string()

        def attempt() -> None:
            try:
                RDBStorage.__init__(self, url)
            except OperationalError as error:
                raise _trouble(self._path, error) from None

        patience.outlast(self._path, attempt, (OperationalError,))


def _trouble(path: Path, error: BaseException) -> BaseException:
    """The error itself, or that of a damaged database if it does not pass: a table or a column is missing."""
    original = getattr(error, "orig", None)
    if isinstance(error, OperationalError) and getattr(original, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
        return _damaged(path, error)
    return error


def _patient(call: Callable[Concatenate[PatientStorage, P], T]) -> Callable[Concatenate[PatientStorage, P], T]:
    @wraps(call)
    def waiting(storage: PatientStorage, /, *arguments: P.args, **options: P.kwargs) -> T:
        def attempt() -> T:
            try:
                return call(storage, *arguments, **options)
            except StorageInternalError as error:
                # Optuna raises the same error for a full disk and for a value that is too long.
                raise _trouble(storage._path, error.__cause__ or error) from None

        return storage._patience.outlast(storage._path, attempt, (OperationalError,))

    return waiting


# The methods that a search calls, through Optuna's cache of finished trials.
for _name in (
    "create_new_study",
    "get_study_id_from_name",
    "get_study_directions",
    "get_study_system_attrs",
    "set_study_system_attr",
    "get_all_studies",
    "_create_new_trial",
    "_set_trial_param",
    "set_trial_state_values",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial",
    "_get_trials",
):
    setattr(PatientStorage, _name, _patient(getattr(RDBStorage, _name)))
