"""Ray Tune as this search uses it: trials are light actors, and our own journal and database replace Tune's files."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ray import tune

from tuner.errors import StudyError
from tuner.lanes.trial_client import TrialClient
from tuner.patience import Patience
from tuner.search.recorder import Recorder
from tuner.search.scheduler import RungScheduler
from tuner.search.searcher import StudySearcher
from tuner.study.folder import TUNE, StudyFolder


def run_trials(
    folder: StudyFolder,
    searcher: StudySearcher,
    scheduler: RungScheduler,
    recorder: Recorder,
    callbacks: Sequence[tune.Callback],
    patience: Patience,
) -> None:
    """Let Tune run what the searcher suggests until there is no more.

    Args:
        callbacks: of Tune, besides the recorder.
        patience: of the journal and the database, which Tune's callbacks write.

    Raises:
        StudyError: no trial of this study can be trained.
        KeyboardInterrupt: interrupted, which Tune keeps to itself.
    """
    # Our own journal and view take the place of Tune's loggers and tables; the database that of its snapshots.
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_PRINT_ALL_TRIAL_ERRORS="0",
        RAY_AIR_NEW_OUTPUT="0",
        TUNE_GLOBAL_CHECKPOINT_S="86400",
    )
    searcher.has_place = scheduler.has_place
    tune_config = tune.TuneConfig(
        search_alg=searcher,
        scheduler=scheduler,
        # The searcher knows when it has no more: a trial whose actor died is suggested again.
        num_samples=-1,
        max_concurrent_trials=scheduler.places,
        reuse_actors=True,
        trial_dirname_creator=lambda trial: f"{trial.config['trial']}-{trial.trial_id}",
    )
    run_config = tune.RunConfig(
        name=TUNE,
        storage_path=str(folder.path.resolve()),
        callbacks=[recorder, *callbacks],
        verbose=0,
        stop=lambda trial, result: recorder.fatal is not None,
        failure_config=tune.FailureConfig(max_failures=2),
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
    )
    _fit(folder, tune_config, run_config, recorder, patience)
    # Trials whose actor died after Tune had asked for the last one: Tune asks no more, a second run does.
    while 0 < searcher.remaining == searcher.lost:
        _fit(folder, tune_config, run_config, recorder, patience)
    if searcher.remaining > 0:
        raise KeyboardInterrupt


def _fit(
    folder: StudyFolder,
    tune_config: tune.TuneConfig,
    run_config: tune.RunConfig,
    recorder: Recorder,
    patience: Patience,
) -> None:
    try:
        tune.Tuner(TrialClient, tune_config=tune_config, run_config=run_config).fit()
    except tune.TuneError:
        # Tune puts the traceback of whatever its callbacks raise into one of these.
        recorder.fatal = recorder.fatal or patience.exhausted
        if recorder.fatal is None:
            raise
    if recorder.fatal:
        raise StudyError(f"study {folder.name}: {recorder.fatal}")
