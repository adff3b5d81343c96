"""What a search was asked for, whether it fits encoder and data, and the study's record on disk."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna

from tuner.config import LoraSpec, RunSettings, TrialConfig
from tuner.data.store import Store
from tuner.encoders.spec import EncoderSpec
from tuner.errors import StorageError, StudyError
from tuner.lanes.fleet import FleetOptions
from tuner.lora.placement import trainable_parameters
from tuner.patience import Patience
from tuner.records import STUDY_FILE, read_study, sessions, write_json
from tuner.search.confirm import BASELINE, RECOMMENDED
from tuner.search.durable.database import PatientStorage
from tuner.search.durable.head_lease import HeadLease
from tuner.search.durable.mirror import SHORT_PATIENCE, fetch_study
from tuner.search.searcher import Objective
from tuner.space import SearchSpace
from tuner.storage import Storage

PARAMETERS = "trainable_parameters"
# The strategy document's recommendation: rank 16, alpha 32, dropout 0.1 on the attention projections of every block.
RECOMMENDATION = LoraSpec(
    rank=16, alpha_ratio=2.0, dropout=0.1, targets=("q_proj", "k_proj", "v_proj", "o_proj"), first_layer=0
)


@dataclass(frozen=True)
class SearchRequest:
    """What `tuner search` was asked for.

    Attributes:
        run_dir: the study's folder; with a storage it is this machine's own, else all nodes see it.
        storage: where studies are kept, each in a folder of its name.
    """

    run_dir: Path
    space: SearchSpace
    settings: RunSettings
    metric: str = "recall@10"
    minimise_parameters: bool = True
    trials: int = 16
    seed: int = 0
    address: str | None = None
    dashboard: bool = False
    fleet: FleetOptions = field(default_factory=FleetOptions)
    loggers: tuple[str, ...] = ()
    storage: Storage | None = None

    @property
    def study(self) -> str:
        """The study's name: its folder's."""
        return self.run_dir.name

    @property
    def study_storage(self) -> Storage | None:
        """This study's folder in the storage."""
        return self.storage.at(self.study) if self.storage else None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Recall first, then the number of trainable parameters unless it does not matter."""
        cost = (Objective(PARAMETERS, "minimize"),) if self.minimise_parameters else ()
        return (Objective(self.metric, "maximize"), *cost)


def check_fit(request: SearchRequest, spec: EncoderSpec, store: Store) -> None:
    """Refuse what cannot work before anything starts.

    Raises:
        StudyError: the store was prepared for another encoder.
        PlacementError: the space names a target or layer this encoder does not have.
        DataError: a split is missing.
    """
    if store.encoder_fingerprint != spec.features_fingerprint:
        raise StudyError(
            f"{request.settings.store}: prepared for another encoder than {spec.source}; "
            f"run `tuner prepare` with --encoder {spec.source}"
        )
    for split in ("train", "validation", "test"):
        store.split(split)
    request.space.validate_for(lambda config: _count(spec, config, store.text_dim))


def _count(spec: EncoderSpec, config: TrialConfig, text_dim: int) -> None:
    trainable_parameters(spec, config, text_dim)


def path_note(spec: EncoderSpec) -> str | None:
    """What to tell the user of the encoding path before anything trains; None where it is as it was asked for."""
    if spec.tower_path is not None:
        return None
    return f"{spec.source}: no tower inside a larger model, the whole of it is the encoder (path {spec.path})"


def fixed_configurations() -> dict[str, TrialConfig]:
    """What every study measures first: the projection alone, and the strategy document's recommendation."""
    return {BASELINE: TrialConfig(), RECOMMENDED: TrialConfig(lora=RECOMMENDATION)}


def open_storage(run_dir: Path, patience: Patience | None = None) -> optuna.storages.RDBStorage:
    """The study's SQLite database; opens in optuna-dashboard.

    Args:
        patience: with a disk that is full or away; by default it waits without a word.

    Raises:
        StudyError: the disk stays full or away.
    """
    return PatientStorage(run_dir / "study.db", patience or Patience(lambda text: None))


def check_new(run_dir: Path, storage: Storage | None = None) -> None:
    """Refuse a study that exists, before anything is prepared for it.

    Raises:
        StudyError: it exists; says how to go on with it.
        StorageError: the storage is away, or access is denied.
    """
    again = "choose another --study"
    if (run_dir / STUDY_FILE).exists():
        raise StudyError(f"study {run_dir.name} exists in {run_dir}; go on with `--resume {run_dir.name}` or {again}")
    if storage is not None and storage.at(run_dir.name).exists(STUDY_FILE):
        resume = f"--resume {run_dir.name} --storage {storage.uri}"
        raise StudyError(f"study {run_dir.name} exists in {storage}; go on with `{resume}` or {again}")


def resumed_request(run_dir: Path, trials: int | None, storage: Storage | None = None) -> SearchRequest:
    """The request of an existing study; `trials` larger than before extends it.

    Args:
        storage: where it is fetched from unless this machine's folder is as new; None: as the study says itself.

    Raises:
        StudyError: there is no such study, or its record is damaged.
        StorageError: the storage is away, or access is denied.
    """
    storage = kept_in(run_dir, storage)
    if storage is not None:
        fetch_study(run_dir, storage.at(run_dir.name))
    record = read_study(run_dir)
    try:
        request = _recorded_request(run_dir, record)
    except (KeyError, TypeError) as error:
        raise StudyError(f"{run_dir / STUDY_FILE}: damaged ({error!r}); start a new study") from None
    if trials is not None and trials > request.trials:
        write_json(run_dir / STUDY_FILE, {**record, "trials": trials})
    return replace(request, trials=trials or request.trials, storage=storage)


def kept_in(run_dir: Path, storage: Storage | None) -> Storage | None:
    """The storage that an existing study is kept in, if any.

    Args:
        storage: where it is looked for; None: as the study says itself.

    Raises:
        StudyError: there is no such study, or its record is damaged.
        StorageError: the storage is away, or access is denied.
    """
    here = storage is None or (run_dir / STUDY_FILE).is_file()
    own = (read_study(run_dir).get("storage") or None) if here else None
    if storage is None:
        return Storage.parse(own) if own is not None else None
    if storage.uri != own and not storage.at(run_dir.name).exists(STUDY_FILE):
        raise StudyError(f"study {run_dir.name}: not in {storage}; name the --storage that it was started with, if any")
    return storage


def _recorded_request(run_dir: Path, record: dict[str, Any]) -> SearchRequest:
    origin = str(run_dir / STUDY_FILE)
    metrics = [objective["metric"] for objective in record["objectives"]]
    return SearchRequest(
        run_dir=run_dir,
        space=SearchSpace.from_dict(record["space"], origin),
        settings=RunSettings.parse(record["settings"], origin),
        metric=metrics[0],
        minimise_parameters=PARAMETERS in metrics,
        trials=record["trials"],
        seed=record["seed"],
    )


def open_record(request: SearchRequest, spec: EncoderSpec, store: Store, resume: bool) -> dict[str, Any]:
    """Create the study's record, or read it to go on.

    Raises:
        StudyError: it exists and `resume` was not asked for, or the other way round.
    """
    if resume:
        return _reopened(request)
    # Asked before, but minutes may have gone by since: preparing the data, or waiting for another head that began it.
    check_new(request.run_dir, request.storage)
    counts = {name: len(store.split(name)) for name in ("train", "validation", "test")}
    record = {
        "study": request.study,
        "space": request.space.to_dict(),
        "settings": request.settings.model_dump(mode="json"),
        "objectives": [{"metric": o.metric, "direction": o.direction} for o in request.objectives],
        "encoder": {
            "family": spec.family,
            "source": spec.source,
            "num_layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "shape": spec.shape,
            "path": spec.path,
        },
        "data": {**counts, "captions": len(store.captions)},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": request.seed,
        "trials": request.trials,
        # The number format that the first lane chose; a resumed study keeps it.
        "precision": None,
        "storage": request.storage.uri if request.storage else None,
        # How many drivers have worked on it: of two copies, the one with more of them is the newer.
        "sessions": 1,
    }
    created = not request.run_dir.exists()
    request.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        write_json(request.run_dir / STUDY_FILE, record)
    except OSError:
        # The same command must work once there is room again.
        if created:
            request.run_dir.rmdir()
        raise
    return record


def _reopened(request: SearchRequest) -> dict[str, Any]:
    record = read_study(request.run_dir)
    if request.storage is not None:
        record |= {"storage": request.storage.uri, "sessions": sessions(record) + 1}
        write_json(request.run_dir / STUDY_FILE, record)
    return record


def discard_record(request: SearchRequest, lease: HeadLease | None = None) -> None:
    """Take back `open_record` of a study that could not start; the folder goes too if nothing else is in it.

    Args:
        lease: what is in the storage is another head's record if that has taken the study.
    """
    run_dir = request.run_dir
    if request.study_storage is not None:
        with suppress(StorageError, StudyError):
            if lease is not None:
                lease.check(SHORT_PATIENCE)
            request.study_storage.patient(SHORT_PATIENCE).remove(STUDY_FILE)
    (run_dir / STUDY_FILE).unlink()
    if not any(run_dir.iterdir()):
        run_dir.rmdir()
