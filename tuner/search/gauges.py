"""A search as Ray metrics: trials, epochs, recall and front. Lanes have gauges of their own.

`MeteredView` wraps the terminal's view, so it gets the same events, including the past of a resumed study. The number
of labels is bounded: running trials use as many slots as train at once, for any number of trials.
"""

from __future__ import annotations

import math

import numpy as np
from ray.util.metrics import Gauge

from tuner.study.events import STATES, EpochDone, Event, StudyStarted, TrialEnded, TrialStarted, View, trial_number
from tuner.study.pareto import hypervolume
from tuner.study.progress import Progress

STUDY_TAGS = ("study", "space")


class MeteredView:
    """Passes the events of a search to `view` and updates Ray's gauges; Ray must run before the first event."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._progress = Progress()
        self._slots: dict[str, int] = {}
        self._epochs = 0
        self._best = math.nan

    def show(self, event: Event) -> None:
        """Pass the event to the view and set the gauges that it changes."""
        self.view.show(event)
        before = self._epochs_of(event)
        self._progress.apply(event)
        match event:
            case StudyStarted():
                self._start(event)
            case TrialStarted():
                self._trial_started(event)
            case EpochDone():
                self._epoch(event, before)
            case TrialEnded():
                self._trial_ended(event)

    def close(self) -> None:
        """Close the view; the gauges end with this process."""
        self.view.close()

    def _start(self, plan: StudyStarted) -> None:
        """Create the gauges, with the plan and nothing done."""
        self._tags = {"study": plan.study, "space": plan.space}
        self._trials = self._gauge("tuner_trials", "trials by state", "state")
        self._planned = (
            (self._gauge("tuner_trials_planned", "trials that the study is to have"), plan.trials),
            (self._gauge("tuner_epochs_planned", "epochs if no trial ends early"), plan.trials * plan.epochs),
        )
        self._epochs_done = self._gauge("tuner_epochs", "epochs trained, over all trials of the study")
        self._best_recall = self._gauge("tuner_best_recall", "best validation metric of any epoch so far", "metric")
        self._trial_recall = self._gauge("tuner_trial_recall", "validation metric of a running trial", "slot", "metric")
        self._trial_loss = self._gauge("tuner_trial_loss", "training loss of a running trial", "slot")
        self._trial_number = self._gauge("tuner_trial_number", "number of the trial that runs in this slot", "slot")
        self._front_points = self._gauge("tuner_front_points", "complete trials that no other one beats")
        self._hypervolume = self._gauge(
            "tuner_front_hypervolume", "what the front dominates: metrics times decades of costs below their corner"
        )
        self._metric = self._progress.metric
        self._show_states()
        self._show_front()
        self._epochs_done.set(0)

    def _trial_started(self, event: TrialStarted) -> None:
        """Give the trial the lowest slot that is free."""
        if event.trial not in self._slots:
            taken = set(self._slots.values())
            slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
            self._slots[event.trial] = slot
            self._trial_number.set(trial_number(event.trial), {"slot": str(slot)})
        self._show_states()

    def _epoch(self, event: EpochDone, before: int) -> None:
        """Show the trial's metric and loss."""
        self._epochs += max(0, event.epoch - before)
        self._epochs_done.set(self._epochs)
        value = event.metric(self._metric)
        # `fmax` ignores NaN: a trial that diverged does not hide the best one.
        self._best = float(np.fmax(self._best, value))
        self._best_recall.set(self._best, {"metric": self._metric})
        if event.trial in self._slots:
            loss = math.nan if event.loss is None else event.loss
            self._show_slot(self._slots[event.trial], value, loss)

    def _trial_ended(self, event: TrialEnded) -> None:
        """Free the trial's slot; a complete one may change the front."""
        slot = self._slots.pop(event.trial, None)
        if slot is not None:
            # Ray cannot remove a gauge's value, but a NaN leaves a gap in the curve.
            self._show_slot(slot, math.nan, math.nan)
            self._trial_number.set(math.nan, {"slot": str(slot)})
        self._show_states()
        if event.state == "complete":
            self._show_front()

    def _epochs_of(self, event: Event) -> int:
        """Epochs that the event's trial had before it."""
        trial = self._progress.history.get(event.trial) if isinstance(event, EpochDone) else None
        return max(trial.epochs, default=0) if trial else 0

    def _show_front(self) -> None:
        front, objectives = self._progress.front(), self._progress.objectives
        self._front_points.set(len(front))
        self._hypervolume.set(hypervolume([trial.values(objectives) for trial in front], objectives))

    def _show_states(self) -> None:
        # Set at every change: values that are set before Ray has found its agent are lost.
        for gauge, planned in self._planned:
            gauge.set(planned)
        counts = self._progress.states
        for state in STATES:
            self._trials.set(counts[state], {"state": state})

    def _show_slot(self, slot: int, recall: float, loss: float) -> None:
        self._trial_recall.set(recall, {"slot": str(slot), "metric": self._metric})
        self._trial_loss.set(loss, {"slot": str(slot)})

    def _gauge(self, name: str, description: str, *tags: str) -> Gauge:
        gauge = Gauge(name, description, (*STUDY_TAGS, *tags))
        gauge.set_default_tags(self._tags)
        return gauge
