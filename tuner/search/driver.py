"""One search from request to front: Ray, lanes, Tune, confirmation, report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import TrialState

from tuner.config import TrialConfig
from tuner.data.remote import open_store
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder
from tuner.encoders.spec import EncoderSpec
from tuner.errors import StudyError
from tuner.lanes.capacity import read_capacity
from tuner.lanes.fleet import Fleet, FleetSize, connected, fleet, size_fleet
from tuner.lanes.lifeline import Lifeline
from tuner.loopback import asks_for_token
from tuner.lora.cost import Lengths
from tuner.lora.known import known_costs
from tuner.patience import Patience
from tuner.report.html import write_report
from tuner.search.budget import Budget, ends_at
from tuner.search.durable.adopt import adopt
from tuner.search.durable.database import check_database, open_database
from tuner.search.durable.driver_lock import only_driver
from tuner.search.durable.head_lease import HeadLease
from tuner.search.durable.mirror import checkpointed, mirrored
from tuner.search.front import Selection, confirm_front, select
from tuner.search.gauges import MeteredView
from tuner.search.judgement import judge
from tuner.search.lane_watch import LaneWatch
from tuner.search.lessons import Lessons
from tuner.search.loggers import ReadableTrials, make_loggers
from tuner.search.recorder import Recorder
from tuner.search.request import (
    SearchRequest,
    check_fit,
    discard_record,
    fixed_configurations,
    open_record,
    path_note,
)
from tuner.search.scheduler import RungScheduler
from tuner.search.searcher import StudySearcher
from tuner.search.stopping import StoppingRule, rule_of
from tuner.search.tune_run import run_trials
from tuner.study.config import StudyRecord
from tuner.study.events import EndState, Message, TrialStarted, View
from tuner.study.folder import adapter_name
from tuner.study.journal import Journal
from tuner.study.points import ConfirmedFront, Point

# Not the token itself: terminal output is often kept in a file.
ASKS_FOR_TOKEN = "Ray's dashboard asks for a token; `ray get-auth-token` prints it"
ENDS: dict[TrialState, EndState] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}
Undone = Callable[[], AbstractContextManager[None]]


def run_search(
    request: SearchRequest,
    view: View,
    resume: bool = False,
    lost: Callable[[str], None] | None = None,
    lease: HeadLease | None = None,
    stopping: StoppingRule | None = None,
) -> ConfirmedFront:
    """Run or resume a study, and write its front and report.

    Args:
        lost: called with the reason, on a thread, when Ray is gone, to end a process that would wait for it; None: Ray
            ends the process after a minute.
        lease: on the study in its storage, held while this runs; None: other heads are not checked for.
        stopping: which trials stop or pause before their last epoch; None: the study's own rule.

    Raises:
        StudyError: the study exists (without `resume`), no trial could be trained, or another head has taken it over.
        StorageError: the storage is unreachable, full or refuses access; the study on this machine is complete.
        PlacementError, DataError, EncoderError: the request does not match the encoder or the data; nothing has
            started.
        KeyboardInterrupt: interrupted; the study is consistent and can be resumed.
    """
    store = open_store(request.config.settings.store)
    spec = inspect_encoder(request.config.settings.encoder)
    check_fit(request, spec, store)
    with only_driver(request.folder.path):
        record = open_record(request, spec, store, resume)
        if lease is not None:
            lease.sessions = record.sessions
        undone = partial(_undone_unless, resume, request, lease)
        try:
            with ExitStack() as copies:
                with undone():
                    copies.enter_context(mirrored(request.folder.path, request.study_storage, lease))
                rule = stopping or rule_of(record)
                front = _search(request, record, view, spec, store, undone, Lifeline(lost), rule)
        finally:
            view.close()
    return front


def _search(
    request: SearchRequest,
    record: StudyRecord,
    view: View,
    spec: EncoderSpec,
    store: Store,
    undone: Undone,
    lifeline: Lifeline,
    stopping: StoppingRule,
) -> ConfirmedFront:
    budget = Budget(request.hours) if request.hours else None
    # The report is written while lanes and Ray end: leaving `background` waits for it.
    with ThreadPoolExecutor(1) as background, ExitStack() as cluster:
        with undone():
            dashboard_url = cluster.enter_context(connected(request.address, request.dashboard))
            cluster.enter_context(lifeline.watching())
            size = size_fleet(request.fleet, record.trials, read_capacity())
            loggers = make_loggers(request.loggers, request.folder.path)
        # Ray's gauges need a running Ray.
        view = MeteredView(view)
        # An absolute path if the driver may run on a cluster's head: its messages are read on other machines.
        run_dir = request.folder.path.resolve() if request.storage else request.folder.path
        until = ends_at(request.hours, datetime.now(UTC)) if request.hours else None
        view.show(record.plan(run_dir, dashboard_url, until))
        if dashboard_url and request.address is None and asks_for_token():
            view.show(Message(text=ASKS_FOR_TOKEN))
        if note := path_note(spec):
            view.show(Message(text=note))
        patience = Patience(lambda text: view.show(Message(text=text)))
        costs = partial(_known_costs, spec, store.text_dim, _training_lengths(store))
        with closing(Journal(request.folder, patience)) as journal:
            search = _Search(request, record, journal, view, costs, size, loggers, patience, stopping, budget)
            front, report = search.run(background)
    report.result()
    return front


def _known_costs(spec: EncoderSpec, text_dim: int, training: Lengths, config: TrialConfig) -> dict[str, float]:
    return known_costs(spec, config, text_dim, training)


def _training_lengths(store: Store) -> Lengths:
    return Lengths.of(store.frames[store.split("train")].tolist())


@contextmanager
def _undone_unless(resume: bool, request: SearchRequest, lease: HeadLease | None) -> Iterator[None]:
    """Remove the record of a new study that cannot start: the same command must work with corrected options."""
    try:
        yield
    except BaseException:
        if not resume:
            discard_record(request, lease)
        raise


@dataclass
class _Search:
    """The part of a search that runs while Ray is up."""

    request: SearchRequest
    record: StudyRecord
    journal: Journal
    view: View
    costs: Callable[[TrialConfig], dict[str, float]]
    size: FleetSize
    loggers: Sequence[ReadableTrials]
    patience: Patience
    stopping: StoppingRule
    budget: Budget | None = None

    def run(self, background: Executor) -> tuple[ConfirmedFront, Future[Path]]:
        """Train the trials, confirm the front, and write the report in the background.

        Lanes load while the study's database is opened.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        request, record = self.request, self.record
        with fleet(
            record.study,
            record.space.name,
            record.settings,
            request.folder.path,
            record.precision,
            request.fleet,
            self.size,
            request.study_storage,
            embedded=request.address is None,
            rungs=self.stopping.rungs,
        ) as lanes:
            study = self._open_study()
            watch = LaneWatch(lanes, self.size, request.fleet.workers, self.view)
            searcher = self._searcher(study, lanes)
            self._settle(study, searcher)
            if searcher.remaining > 0:
                self._tune(study, searcher, lanes, watch)
            front = self._confirm(study, lanes, watch)
            self.journal.write_parquet()
            return front, background.submit(write_report, request.folder.path)

    def _open_study(self) -> optuna.Study:
        objectives = self.record.objectives
        directions = [objective.direction for objective in objectives]
        study = open_database(self.request.folder.database, self.patience, self.record.study, directions)
        with warnings.catch_warnings():
            # Names for optuna-dashboard; the call has been "experimental" since Optuna 3.2.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.name for objective in objectives])
        if self.request.study_storage is not None:
            known = {trial.number for trial in study.get_trials(deepcopy=False) if "config" in trial.user_attrs}
            begun = checkpointed(self.request.study_storage, known)
            adopt(study, self.record.space, fixed_configurations(self.record.space), begun)
        check_database(study, self.journal)
        return study

    def _searcher(self, study: optuna.Study, lanes: Fleet) -> StudySearcher:
        return StudySearcher(
            study=study,
            space=self.record.space,
            objectives=self.record.objectives,
            known=self.costs,
            fixed=fixed_configurations(self.record.space),
            trials=self.record.trials,
            extra={"coordinator": lanes.name, "epochs": self.record.settings.epochs},
            seed=self.record.seed,
            sampler=self.record.sampler,
            max_parameters=self.record.max_parameters,
            history=self.journal.history,
        )

    def _settle(self, study: optuna.Study, searcher: StudySearcher) -> None:
        """Add to the journal of a resumed study what only its database knows."""
        for trial in study.get_trials(deepcopy=False):
            if "config" in trial.user_attrs:
                started = TrialStarted.model_validate(
                    {k: v for k, v in searcher.suggestion(trial).items() if k in TrialStarted.model_fields}
                )
                self.journal.settle(started, ENDS.get(trial.state))

    def _tune(self, study: optuna.Study, searcher: StudySearcher, lanes: Fleet, watch: LaneWatch) -> None:
        watch.remaining = lambda: searcher.remaining
        watch.front = lambda: len(select(study, self.record.objectives).trials)
        events = self.journal.history.events()
        scheduler = RungScheduler(self.stopping, lanes.slots, self.record.settings.epochs, events)
        recorder = Recorder(
            self.journal,
            self.view,
            self.record.objectives,
            lambda: self._note_precision(lanes),
            searcher.is_lost,
            scheduler.why,
        )
        recorder.replay()
        if self.budget is not None:
            searcher.out_of_time = partial(self._out_of_time, self.budget, watch, lanes.slots)
        run_trials(self.request.folder, searcher, scheduler, recorder, [watch, *self.loggers], self.patience)
        if searcher.exhausted:
            self.view.show(Message(text=searcher.exhausted))

    def _out_of_time(self, budget: Budget, watch: LaneWatch, places: int) -> str | None:
        epochs = self.record.settings.epochs
        return None if budget.allows(self.journal.history, epochs, watch.front(), places) else budget.sentence

    def _note_precision(self, lanes: Fleet) -> bool:
        """Record the number format, which a resumed study must keep on any machine.

        Returns:
            Whether it is known; a coordinator that was started again may not know it yet.
        """
        if self.record.precision is None:
            self.record = self.record.changed(precision=lanes.precision())
            self.patience.outlast(self.request.folder.record, lambda: self.record.write(self.request.folder))
        return self.record.precision is not None

    def _confirm(self, study: optuna.Study, lanes: Fleet, watch: LaneWatch) -> ConfirmedFront:
        lessons = Lessons(self.record.objectives, self.costs, self.journal.history)
        trials = lessons.trials([each for each in study.get_trials(deepcopy=False) if "config" in each.user_attrs])
        selection = select(study, self.record.objectives, judge(trials, self.record.space, self.record.objectives))
        if not selection.trials:
            raise StudyError(f"study {self.record.study}: {self._why_none(study)}")
        self.view.show(Message(text=f"confirming {len(selection.trials)} trials on the test gallery"))
        points = confirm_front(selection, lanes, watch.look, lambda text: self.view.show(Message(text=text)))
        return self._write_front(selection, points)

    def _write_front(self, selection: Selection, points: list[Point]) -> ConfirmedFront:
        folder, storage = self.request.folder, self.request.study_storage
        if storage is not None:
            for point in points:
                storage.download_folder(adapter_name(point.trial), folder.adapter(point.trial))
        front = ConfirmedFront(
            study=self.record.study,
            objectives=self.record.objectives,
            baseline=selection.baseline,
            # The trials that it was chosen from: an extended study has its older front until the new one is confirmed.
            trials=self.record.trials,
            points=tuple(points),
        )
        self.patience.outlast(folder.front, lambda: front.write(folder))
        return front

    def _why_none(self, study: optuna.Study) -> str:
        failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        reasons = {trial.reason for trial in self.journal.history.trials}
        why = f"each because {reasons.pop()}" if len(reasons) == 1 else f"see reason in {self.request.folder.trials}"
        return f"all {len(failed)} trials failed, {why}"
