"""The study's database, which waits for its disk instead of ending the search."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

from tuner.patience import Patience

P = ParamSpec("P")
T = TypeVar("T")


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
        patience.outlast(self._path, lambda: RDBStorage.__init__(self, url), (OperationalError,))


def _patient(call: Callable[Concatenate[PatientStorage, P], T]) -> Callable[Concatenate[PatientStorage, P], T]:
    @wraps(call)
    def waiting(storage: PatientStorage, /, *arguments: P.args, **options: P.kwargs) -> T:
        def attempt() -> T:
            try:
                return call(storage, *arguments, **options)
            except StorageInternalError as error:
                # Optuna raises the same error for a full disk and for a value that is too long.
                raise (error.__cause__ or error) from None

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
