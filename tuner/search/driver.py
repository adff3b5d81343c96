"""One search from request to front: Ray, lanes, Tune, confirmation, report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import TrialState
from ray import tune

from tuner.config import TrialConfig
from tuner.data.remote import open_store
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder
from tuner.encoders.spec import EncoderSpec
from tuner.errors import StudyError, TunerError
from tuner.lanes.capacity import read_capacity
from tuner.lanes.fleet import Fleet, FleetSize, connected, fleet, size_fleet
from tuner.lanes.lifeline import Lifeline
from tuner.lanes.trial import TrialClient
from tuner.loopback import asks_for_token
from tuner.lora.placement import trainable_parameters
from tuner.patience import Patience
from tuner.records import FRONT_FILE, STUDY_FILE, Journal, sessions, write_json
from tuner.report.html import write_report
from tuner.report.live import View
from tuner.report.progress import StudyHeader
from tuner.search.callback import Recorder
from tuner.search.confirm import confirm, select
from tuner.search.durable.adopt import adopt
from tuner.search.durable.driver_lock import only_driver
from tuner.search.durable.head_lease import HeadLease
from tuner.search.durable.mirror import checkpointed, mirrored
from tuner.search.lane_watch import LaneWatch
from tuner.search.loggers import make_loggers
from tuner.search.metrics import MeteredView
from tuner.search.searcher import StudySearcher, trial_id
from tuner.search.study import (
    SearchRequest,
    check_fit,
    discard_record,
    fixed_configurations,
    open_record,
    open_storage,
    path_note,
)

# Not the token itself: what a terminal shows is often kept in a file.
ASKS_FOR_TOKEN = "Ray's dashboard asks for your token: `ray get-auth-token` prints it"
ENDS = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


def run_search(
    request: SearchRequest,
    view: View,
    resume: bool = False,
    lost: Callable[[], None] | None = None,
    lease: HeadLease | None = None,
) -> dict[str, Any]:
    """Run (or go on with) a study and write its front and report.

    Args:
        lost: called on a thread when the cluster has gone, to end a process that waits for it in vain; None: Ray ends
            it after a minute.
        lease: on the study in its storage, held for as long as this runs; None: no other head is looked for.

    Returns:
        The content of front.json.

    Raises:
        StudyError: the study exists (without `resume`), no trial could be trained, or another head has taken it over.
        StorageError: the storage is away, full or refuses access; what is on this machine is whole.
        PlacementError, DataError, EncoderError: the request does not fit encoder or data; nothing was started.
        KeyboardInterrupt: interrupted; the study is whole and can be resumed.
    """
    store = open_store(request.settings.store)
    spec = inspect_encoder(request.settings.encoder)
    check_fit(request, spec, store)
    with only_driver(request.run_dir):
        record = open_record(request, spec, store, resume)
        if lease is not None:
            lease.sessions = sessions(record)
        undone = partial(_undone_unless, resume, request, lease)
        try:
            with ExitStack() as copies:
                with undone():
                    copies.enter_context(mirrored(request.run_dir, request.study_storage, lease))
                front = _search(request, record, view, spec, store, undone, Lifeline(lost))
        finally:
            view.close()
    return front


def _search(
    request: SearchRequest,
    record: dict[str, Any],
    view: View,
    spec: EncoderSpec,
    store: Store,
    undone: Callable[[], AbstractContextManager[None]],
    lifeline: Lifeline,
) -> dict[str, Any]:
    # The report is drawn while lanes and Ray end: leaving `background` waits for it.
    with ThreadPoolExecutor(1) as background, ExitStack() as cluster:
        with undone():
            dashboard_url = cluster.enter_context(connected(request.address, request.dashboard))
            cluster.enter_context(lifeline.watching())
            size = size_fleet(request.fleet, request.trials, read_capacity())
            loggers = make_loggers(request.loggers, request.run_dir)
        # Before Ray is up there is nothing to measure with.
        view = MeteredView(view, request.minimise_parameters)
        view.start(_header(request, dashboard_url))
        if dashboard_url and request.address is None and asks_for_token():
            view.message(ASKS_FOR_TOKEN)
        if note := path_note(spec):
            view.message(note)
        patience = Patience(view.message)
        with closing(Journal(request.run_dir, patience)) as journal:
            search = _Search(request, record, journal, view, spec, store, size, loggers, patience)
            front, report = search.run(background)
    report.result()
    return front


@contextmanager
def _undone_unless(resume: bool, request: SearchRequest, lease: HeadLease | None) -> Iterator[None]:
    """A new study that cannot start leaves no record: the same command must work with options that fit."""
    try:
        yield
    except TunerError:
        if not resume:
            discard_record(request, lease)
        raise


def _header(request: SearchRequest, dashboard_url: str | None) -> StudyHeader:
    return StudyHeader(
        study=request.study,
        space=request.space.name,
        metric=request.metric,
        trials=request.trials,
        epochs=request.settings.epochs,
        dashboard_url=dashboard_url,
        # A driver on a cluster's head may be asked from elsewhere where it is.
        run_dir=str(request.run_dir.resolve() if request.storage else request.run_dir),
    )


class _Search:
    """The part of a search that runs while Ray is up."""

    def __init__(
        self,
        request: SearchRequest,
        record: dict[str, Any],
        journal: Journal,
        view: View,
        spec: EncoderSpec,
        store: Store,
        size: FleetSize,
        loggers: Sequence[tune.Callback],
        patience: Patience,
    ) -> None:
        self.request, self.record, self.journal, self.view = request, record, journal, view
        self.spec, self.text_dim, self.size, self.loggers = spec, store.text_dim, size, loggers
        self.patience = patience

    def run(self, background: Executor) -> tuple[dict[str, Any], Future[Path]]:
        """Lanes load while the study's database is opened; then trials, then the front, then the report behind it."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        request = self.request
        with fleet(
            request.study,
            request.space.name,
            request.settings,
            request.run_dir,
            self.record["precision"],
            request.fleet,
            self.size,
            request.study_storage,
            embedded=request.address is None,
        ) as lanes:
            study = self._open_study()
            watch = LaneWatch(lanes, self.size, request.fleet.workers, self.view)
            self._tune(study, lanes, watch)
            front = self._confirm(study, lanes, watch)
            self.journal.write_parquet()
            return front, background.submit(write_report, request.run_dir)

    def _open_study(self) -> optuna.Study:
        study = optuna.create_study(
            storage=open_storage(self.request.run_dir, self.patience),
            study_name=self.request.study,
            directions=[objective.direction for objective in self.request.objectives],
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            # Names for optuna-dashboard; the call has been "experimental" since Optuna 3.2.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.metric for objective in self.request.objectives])
        if self.request.study_storage is not None:
            known = {trial.number for trial in study.get_trials(deepcopy=False) if "config" in trial.user_attrs}
            begun = checkpointed(self.request.study_storage, known)
            adopt(study, self.request.space, fixed_configurations(), begun)
        return study

    def _tune(self, study: optuna.Study, lanes: Fleet, watch: LaneWatch) -> None:
        request = self.request
        searcher = StudySearcher(
            study=study,
            space=request.space,
            objectives=request.objectives,
            fixed=fixed_configurations(),
            trials=request.trials,
            extra={"coordinator": lanes.name, "epochs": request.settings.epochs},
            seed=request.seed,
        )
        for trial in study.get_trials(deepcopy=False, states=tuple(ENDS)):
            self.journal.settle(trial_id(trial.number), ENDS[trial.state])
        if searcher.remaining == 0:
            return
        watch.remaining = lambda: searcher.remaining
        watch.front = lambda: len(select(study, request.objectives).trials)
        recorder = Recorder(
            self.journal,
            self.view,
            request.metric,
            self._parameters,
            lambda: self._note_precision(lanes),
        )
        recorder.replay(request.settings.epochs)
        # Our own journal and view take the place of Tune's loggers and tables; the database that of its snapshots.
        os.environ.update(
            TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0", TUNE_GLOBAL_CHECKPOINT_S="86400"
        )
        tuner = tune.Tuner(
            TrialClient,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=searcher.remaining,
                max_concurrent_trials=lanes.slots,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: f"{trial.config['trial']}-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(request.run_dir.resolve()),
                callbacks=[recorder, watch, *self.loggers],
                verbose=0,
                stop=lambda trial, result: recorder.fatal is not None,
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        try:
            tuner.fit()
        except tune.TuneError:
            # Tune puts the traceback of whatever its callbacks raise into one of these.
            recorder.fatal = recorder.fatal or self.patience.exhausted
            if recorder.fatal is None:
                raise
        if recorder.fatal:
            raise StudyError(f"study {request.study}: {recorder.fatal}")
        if searcher.remaining > 0:
            raise KeyboardInterrupt

    def _parameters(self, config: dict[str, Any]) -> int:
        return trainable_parameters(self.spec, TrialConfig.model_validate(config), self.text_dim)

    def _note_precision(self, lanes: Fleet) -> bool:
        """A resumed study must go on in the number format it began with, on whatever machine. False: not yet known, by
        a coordinator that was started again."""
        if self.record["precision"] is None:
            self.record["precision"] = ray.get(lanes.coordinator.precision.remote())
            self._write_json(STUDY_FILE, self.record)
        return self.record["precision"] is not None

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        path = self.request.run_dir / name
        self.patience.outlast(path, lambda: write_json(path, values))

    def _confirm(self, study: optuna.Study, lanes: Fleet, watch: LaneWatch) -> dict[str, Any]:
        selection = select(study, self.request.objectives)
        if not selection.trials:
            failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
            reasons = {row["reason"] for row in self.journal.rows()}
            why = f"{self.request.run_dir}/trials.parquet says why"
            if len(reasons) == 1:
                why = f"each because {reasons.pop()}"
            raise StudyError(f"study {self.request.study}: all {len(failed)} trials failed, {why}")
        self.view.message(f"confirming {len(selection.trials)} trials on the test gallery")
        points = confirm(selection, lanes.coordinator, watch.look, self.view.message)
        if self.request.study_storage is not None:
            for point in points:
                self.request.study_storage.download_folder(point["adapter"], self.request.run_dir / point["adapter"])
        front = {
            "study": self.request.study,
            "objectives": self.record["objectives"],
            "baseline": selection.baseline,
            # Those that it was chosen from: a study may be extended, and has an older front until it has the new one.
            "trials": self.request.trials,
            "points": points,
        }
        self._write_json(FRONT_FILE, front)
        return front
