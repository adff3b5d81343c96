"""One search from request to front: Ray, lanes, Tune, confirmation, report."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.trial import TrialState
from ray import tune

from tuner.config import TrialConfig
from tuner.data.cache import cache_root
from tuner.data.store import Store
from tuner.encoders.registry import inspect_encoder
from tuner.encoders.spec import EncoderSpec
from tuner.errors import StudyError
from tuner.lanes.fleet import HEAD_NODE, Fleet, FleetSize, connected, fleet, size_fleet
from tuner.lanes.trial import TrialClient
from tuner.lora.placement import trainable_parameters
from tuner.records import FRONT_FILE, STUDY_FILE, Journal, write_json
from tuner.report.html import write_report
from tuner.report.live import StudyHeader, View
from tuner.search.callback import Recorder
from tuner.search.confirm import confirm, select
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

ENDS = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


def run_search(request: SearchRequest, view: View, resume: bool = False) -> dict[str, Any]:
    """Run (or go on with) a study and write its front and report.

    Returns:
        The content of front.json.

    Raises:
        StudyError: the study exists (without `resume`), or no trial could be trained.
        PlacementError, DataError, EncoderError: the request does not fit encoder or data; nothing was started.
        KeyboardInterrupt: interrupted; the study is whole and can be resumed.
    """
    store = Store.open(request.store_path)
    spec = inspect_encoder(request.settings.encoder)
    check_fit(request, spec, store)
    record = open_record(request, spec, store, resume)
    try:
        # The report is drawn while lanes and Ray end: leaving `background` waits for it.
        with ThreadPoolExecutor(1) as background, connected(request.address, request.dashboard) as dashboard_url:
            size = _size(request, resume)
            view.start(_header(request, dashboard_url))
            if note := path_note(spec):
                view.message(note)
            with closing(Journal(request.run_dir)) as journal:
                search = _Search(request, record, journal, view, spec, store, size)
                front, report = search.run(background)
        report.result()
    finally:
        view.close()
    return front


def _size(request: SearchRequest, resume: bool) -> FleetSize:
    try:
        return size_fleet(request.fleet)
    except StudyError:
        if not resume:
            # The same command must work with numbers that fit.
            discard_record(request.run_dir)
        raise


def _header(request: SearchRequest, dashboard_url: str | None) -> StudyHeader:
    return StudyHeader(
        study=request.study,
        space=request.space.name,
        metric=request.metric,
        trials=request.trials,
        epochs=request.settings.epochs,
        dashboard_url=dashboard_url,
        run_dir=str(request.run_dir),
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
    ) -> None:
        self.request, self.record, self.journal, self.view = request, record, journal, view
        self.spec, self.text_dim, self.size = spec, store.text_dim, size

    def run(self, background: Executor) -> tuple[dict[str, Any], Future[Path]]:
        """Lanes load while the study's database is opened; then trials, then the front, then the report behind it."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        request = self.request
        with fleet(
            request.study,
            request.settings,
            request.run_dir,
            cache_root() / "prefix",
            self.record["precision"],
            request.fleet,
            self.size,
        ) as lanes:
            study = self._open_study()
            self._tune(study, lanes)
            front = self._confirm(study, lanes)
            self.journal.write_parquet()
            return front, background.submit(write_report, request.run_dir)

    def _open_study(self) -> optuna.Study:
        study = optuna.create_study(
            storage=open_storage(self.request.run_dir),
            study_name=self.request.study,
            directions=[objective.direction for objective in self.request.objectives],
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            # Names for optuna-dashboard; the call has been "experimental" since Optuna 3.2.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.metric for objective in self.request.objectives])
        return study

    def _tune(self, study: optuna.Study, lanes: Fleet) -> None:
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
            tune.with_resources(TrialClient, {"cpu": 0, **HEAD_NODE}),
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
                callbacks=[recorder],
                verbose=0,
                stop=lambda trial, result: recorder.fatal is not None,
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        tuner.fit()
        if recorder.fatal:
            raise StudyError(f"study {request.study}: {recorder.fatal}")
        if searcher.remaining > 0:
            raise KeyboardInterrupt

    def _parameters(self, config: dict[str, Any]) -> int:
        return trainable_parameters(self.spec, TrialConfig.model_validate(config), self.text_dim)

    def _note_precision(self, lanes: Fleet) -> None:
        """A resumed study must go on in the number format it began with, on whatever machine."""
        if self.record["precision"] is None:
            self.record["precision"] = ray.get(lanes.coordinator.precision.remote())
            write_json(self.request.run_dir / STUDY_FILE, self.record)

    def _confirm(self, study: optuna.Study, lanes: Fleet) -> dict[str, Any]:
        selection = select(study, self.request.objectives)
        if not selection.trials:
            failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
            raise StudyError(
                f"study {self.request.study}: all {len(failed)} trials failed; "
                f"{self.request.run_dir}/trials.parquet says why"
            )
        self.view.message(f"confirming {len(selection.trials)} trials on the test gallery")
        points = confirm(selection, lanes.coordinator)
        front = {
            "study": self.request.study,
            "objectives": self.record["objectives"],
            "baseline": selection.baseline,
            # Those that it was chosen from: a study may be extended, and has an older front until it has the new one.
            "trials": self.request.trials,
            "points": points,
        }
        write_json(self.request.run_dir / FRONT_FILE, front)
        return front
