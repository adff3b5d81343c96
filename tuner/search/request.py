"""The request of a driver, its check against encoder and data, and the study's record on disk."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tuner.config import LoraSpec, TrialConfig
from tuner.data.store import Store
from tuner.encoders.spec import EncoderSpec
from tuner.errors import Field, StorageError, StudyError
from tuner.lanes.fleet import FleetOptions
from tuner.lora.placement import trainable_parameters
from tuner.places import exists, is_file
from tuner.search.durable.head_lease import HeadLease
from tuner.search.durable.mirror import SHORT_PATIENCE, fetch_study
from tuner.space import SearchSpace
from tuner.storage import Storage
from tuner.study.config import DataFacts, EncoderFacts, StudyConfig, StudyRecord
from tuner.study.events import BASELINE, RECOMMENDED, STARTED
from tuner.study.folder import RECORD_FILE, StudyFolder

# The strategy document's recommendation: rank 16, alpha 32, dropout 0.1 on the attention projections of every block.
RECOMMENDATION = LoraSpec(
    rank=16, alpha_ratio=2.0, dropout=0.1, targets=("q_proj", "k_proj", "v_proj", "o_proj"), first_layer=0
)


@dataclass(frozen=True)
class SearchRequest:
    """A study, and the options of one driver.

    Attributes:
        folder: with a storage it belongs to this machine, else all nodes share it.
        address: of a Ray cluster; None starts Ray inside this process.
        storage: holds studies, each in a folder of its name.
        hours: in which this session of the search ends; None: with its last trial.
    """

    config: StudyConfig
    folder: StudyFolder
    address: str | None = None
    dashboard: bool = False
    fleet: FleetOptions = field(default_factory=FleetOptions)
    loggers: tuple[str, ...] = ()
    storage: Storage | None = None
    hours: float | None = None

    @property
    def study_storage(self) -> Storage | None:
        """This study's folder in the storage."""
        return self.storage.at(self.folder.name) if self.storage else None


def check_fit(request: SearchRequest, spec: EncoderSpec, store: Store) -> None:
    """Refuse a request that cannot work, before anything starts.

    Raises:
        StudyError: the store was prepared for another encoder.
        PlacementError: the space has a target or layer that this encoder does not have.
        DataError: a split is missing.
    """
    if store.encoder_fingerprint != spec.features_fingerprint:
        raise StudyError(
            f"{request.config.settings.store}: was prepared for another encoder than {spec.source}; "
            f"run `tuner prepare` with --encoder {spec.source}"
        )
    for split in ("train", "validation", "test"):
        store.split(split)
    request.config.space.validate_for(lambda config: _count(spec, config, store.text_dim))


def _count(spec: EncoderSpec, config: TrialConfig, text_dim: int) -> None:
    trainable_parameters(spec, config, text_dim)


def path_note(spec: EncoderSpec) -> str | None:
    """A sentence about the encoding path, before training; None if there is nothing to report."""
    if spec.tower_path is not None:
        return None
    return f"{spec.source}: the whole model is the encoder, since it has no separate tower (path {spec.path})"


def fixed_configurations(space: SearchSpace | None = None) -> dict[str, TrialConfig]:
    """The trials that a study runs first: the projection alone, the strategy document's recommendation, and the
    configurations of the space's `start`."""
    found = {BASELINE: TrialConfig(), RECOMMENDED: TrialConfig(lora=RECOMMENDATION)}
    for number, config in enumerate(space.starts() if space is not None else [], start=1):
        if config not in found.values():
            found[f"{STARTED}_{number}"] = config
    return found


def check_new(folder: StudyFolder, storage: Storage | None = None) -> None:
    """Refuse a study that exists, before anything is prepared for it.

    Raises:
        StudyError: it exists; names the command that resumes it.
        StorageError: the storage is unreachable, or access is denied.
    """
    name = folder.name
    if exists(folder.record):
        raise _exists(name, str(folder.path), f"--resume {name}")
    if storage is not None and storage.at(name).exists(RECORD_FILE):
        raise _exists(name, str(storage), f"--resume {name} --storage {storage.uri}")


def _exists(name: str, place: str, resume: str) -> StudyError:
    again = f"study {name} exists in {place}; resume it with `tuner search {resume}` or choose another name with "
    return StudyError(again, Field("study"))


def resumed_request(folder: StudyFolder, trials: int | None, storage: Storage | None = None) -> SearchRequest:
    """The request of an existing study; more `trials` than before extend it.

    Args:
        storage: the study is downloaded from here unless this machine's folder is as new; None: the record's storage.

    Raises:
        StudyError: there is no such study, its record is damaged, or it already has more trials than `trials`.
        StorageError: the storage is unreachable, or access is denied.
    """
    storage = kept_in(folder, storage)
    if storage is not None:
        fetch_study(folder.path, storage.at(folder.name))
    record = StudyRecord.read(folder)
    if record.study != folder.name:
        raise StudyError(
            f"{folder.record}: is the record of study {record.study}, but the folder's name is {folder.name}; "
            f"rename the folder to {record.study}"
        )
    if trials is not None and trials < record.trials:
        raise StudyError(
            f"trials {trials}: study {folder.name} already has {record.trials}; give a larger number, or drop it"
        )
    if trials is not None and trials > record.trials:
        record = record.changed(trials=trials)
        record.write(folder)
    return SearchRequest(record, folder, storage=storage)


def kept_in(folder: StudyFolder, storage: Storage | None) -> Storage | None:
    """The storage of an existing study, if it has one.

    Args:
        storage: where to look for it; None: the record's storage.

    Raises:
        StudyError: there is no such study, or its record is damaged.
        StorageError: the storage is unreachable, or access is denied.
    """
    here = storage is None or is_file(folder.record)
    own = (StudyRecord.read(folder).storage or None) if here else None
    if storage is None:
        return Storage.parse(own) if own is not None else None
    if storage.uri != own and not storage.at(folder.name).exists(RECORD_FILE):
        raise StudyError(
            f"study {folder.name}: is not in {storage}; give the ",
            Field("storage"),
            " that it was started with, or drop it",
        )
    return storage


def open_record(request: SearchRequest, spec: EncoderSpec, store: Store, resume: bool) -> StudyRecord:
    """Create the study's record, or read it to resume the study.

    Raises:
        StudyError: it exists without `resume`, or does not exist with `resume`.
    """
    if resume:
        return _reopened(request)
    # Checked before, but preparing the data or waiting for another head may have taken minutes since.
    check_new(request.folder, request.storage)
    counts = {name: len(store.split(name)) for name in ("train", "validation", "test")}
    record = StudyRecord(
        **dict(request.config),
        encoder=EncoderFacts(
            family=spec.family,
            source=spec.source,
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            shape=spec.shape,
            path=spec.path,
        ),
        data=DataFacts(**counts, captions=len(store.captions)),
        created=datetime.now(UTC).replace(microsecond=0),
        storage=request.storage.uri if request.storage else None,
    )
    folder = request.folder
    created = not folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    try:
        record.write(folder)
    except OSError:
        # The same command must work once there is space again.
        if created:
            folder.path.rmdir()
        raise
    return record


def _reopened(request: SearchRequest) -> StudyRecord:
    record = StudyRecord.read(request.folder)
    if request.storage is not None:
        record = record.changed(storage=request.storage.uri, sessions=record.sessions + 1)
        record.write(request.folder)
    return record


def discard_record(request: SearchRequest, lease: HeadLease | None = None) -> None:
    """Undo `open_record` of a study that could not start; the folder is removed, too, if it is empty.

    Args:
        lease: if another head has taken the study over, the record in the storage is its own and is kept.
    """
    folder = request.folder
    if request.study_storage is not None:
        with suppress(StorageError, StudyError):
            if lease is not None:
                lease.check(SHORT_PATIENCE)
            request.study_storage.patient(SHORT_PATIENCE).remove(RECORD_FILE)
    folder.record.unlink(missing_ok=True)
    if not any(folder.path.iterdir()):
        folder.path.rmdir()
