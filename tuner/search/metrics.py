"""A search as metrics of Ray: trials, epochs, recall and front. What a lane knows is in `tuner.lanes.gauges`.

`MeteredView` stands before the view of a terminal, so it is told the same events, those of a resumed study's past
included. Labels are bounded: running trials share as many slots as train at once, however many trials a study has.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from ray.util.metrics import Gauge

from tuner.pareto import Direction, hypervolume, pareto_front
from tuner.report.live import View
from tuner.report.progress import EpochRow, StudyHeader

STATES = ("running", "complete", "failed", "stopped")
# The corner that the front's hypervolume is measured from: no recall, at a thousand million trainable parameters.
REFERENCE_RECALL = 0.0
REFERENCE_PARAMETERS = 1e9
STUDY_TAGS = ("study", "space")


class MeteredView:
    """Passes the events of a search on to `view` and keeps Ray's gauges of it; Ray must be up before `start`.

    Args:
        minimise_parameters: whether the front weighs recall against trainable parameters, or is the best recall alone.
    """

    def __init__(self, view: View, minimise_parameters: bool) -> None:
        self.view = view
        self._directions: list[Direction] = ["maximize", "minimize"] if minimise_parameters else ["maximize"]
        self._states: dict[str, str] = {}
        self._slots: dict[str, int] = {}
        self._last: dict[str, EpochRow] = {}
        self._epochs = 0
        self._best = math.nan
        self._front = np.empty((0, len(self._directions)))

    def start(self, header: StudyHeader) -> None:
        """Begin with what is planned, and nothing done."""
        self.view.start(header)
        self._tags = {"study": header.study, "space": header.space}
        self._trials = self._gauge("tuner_trials", "trials by state", "state")
        self._planned = (
            (self._gauge("tuner_trials_planned", "trials that the study is to have"), header.trials),
            (self._gauge("tuner_epochs_planned", "epochs if no trial ends early"), header.trials * header.epochs),
        )
        self._epochs_done = self._gauge("tuner_epochs", "epochs trained, over all trials of the study")
        self._best_recall = self._gauge("tuner_best_recall", "best validation metric of any epoch so far", "metric")
        self._trial_recall = self._gauge("tuner_trial_recall", "validation metric of a running trial", "slot", "metric")
        self._trial_loss = self._gauge("tuner_trial_loss", "training loss of a running trial", "slot")
        self._trial_number = self._gauge("tuner_trial_number", "number of the trial that runs in this slot", "slot")
        self._front_points = self._gauge("tuner_front_points", "complete trials that no other one beats")
        self._hypervolume = self._gauge(
            "tuner_front_hypervolume", "recall times decades of parameters below 1e9, dominated by the front"
        )
        self._metric = header.metric
        self._show_states()
        self._show_front()
        self._epochs_done.set(0)

    def trial_started(self, trial: str, origin: str, summary: str, parameters: int) -> None:
        """Give the trial the lowest slot that is free."""
        self.view.trial_started(trial, origin, summary, parameters)
        self._states[trial] = "running"
        if trial not in self._slots:
            taken = set(self._slots.values())
            slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
            self._slots[trial] = slot
            self._trial_number.set(int(trial[1:]), {"slot": str(slot)})
        self._show_states()

    def epoch(self, row: EpochRow) -> None:
        """Show what the trial reached."""
        self.view.epoch(row)
        known = self._last.get(row.trial)
        self._epochs += row.epoch - (known.epoch if known else 0)
        self._last[row.trial] = row
        self._epochs_done.set(self._epochs)
        # `fmax` ignores NaN: a trial that diverged does not hide the best one.
        self._best = float(np.fmax(self._best, row.recall))
        self._best_recall.set(self._best, {"metric": self._metric})
        if row.trial in self._slots:
            self._show_slot(self._slots[row.trial], row.recall, row.loss)

    def trial_finished(self, trial: str, state: str, reason: str | None) -> None:
        """Free the trial's slot; a complete one may change the front."""
        self.view.trial_finished(trial, state, reason)
        self._states[trial] = state
        slot = self._slots.pop(trial, None)
        if slot is not None:
            # Ray cannot take a gauge back, and a NaN leaves a gap in the curve.
            self._show_slot(slot, math.nan, math.nan)
            self._trial_number.set(math.nan, {"slot": str(slot)})
        self._show_states()
        last = self._last.get(trial)
        if state == "complete" and last is not None:
            self._join_front(last)

    def message(self, text: str) -> None:
        """Pass a message on."""
        self.view.message(text)

    def close(self) -> None:
        """Close the view; the gauges end with this process."""
        self.view.close()

    def _join_front(self, row: EpochRow) -> None:
        point = [row.recall, math.log10(max(1, row.parameters))][: len(self._directions)]
        values = np.vstack([self._front, point])
        self._front = values[pareto_front(values, self._directions)]
        self._show_front()

    def _show_front(self) -> None:
        corner = [REFERENCE_RECALL, math.log10(REFERENCE_PARAMETERS)][: len(self._directions)]
        self._front_points.set(len(self._front))
        self._hypervolume.set(hypervolume(self._front, corner, self._directions))

    def _show_states(self) -> None:
        # Again and again: what is set before Ray has found its agent is lost.
        for gauge, planned in self._planned:
            gauge.set(planned)
        counts = Counter(self._states.values())
        for state in STATES:
            self._trials.set(counts[state], {"state": state})

    def _show_slot(self, slot: int, recall: float, loss: float) -> None:
        self._trial_recall.set(recall, {"slot": str(slot), "metric": self._metric})
        self._trial_loss.set(loss, {"slot": str(slot)})

    def _gauge(self, name: str, description: str, *tags: str) -> Gauge:
        gauge = Gauge(name, description, (*STUDY_TAGS, *tags))
        gauge.set_default_tags(self._tags)
        return gauge
