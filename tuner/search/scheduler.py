"""A stopping rule's decisions on their way to Tune, and the places that paused trials leave and take.

Tune resets or caches the actor of a trial that it stops or pauses; what that means for the trial's place in its lane is
`tuner.lanes.trial_client`'s part. Tune's own limit of concurrent trials counts paused ones, so the searcher asks
`has_place` instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tuner.search.recorder import started
from tuner.search.stopping import StoppingRule, Verdict
from tuner.study.events import EndState, EpochDone, TrialEnded, TrialEvent
from tuner.study.history import History
from tuner.study.rungs import Decision, is_due

TUNES = {
    Decision.GO_ON: TrialScheduler.CONTINUE,
    Decision.PAUSE: TrialScheduler.PAUSE,
    Decision.STOP: TrialScheduler.STOP,
}


class Stopper(Protocol):
    """What is used here of Tune's controller."""

    def stop_trial(self, trial: TuneTrial) -> None: ...


class RungScheduler(FIFOScheduler):
    """Trials in order of their suggestion, decided about at rungs.

    Args:
        rule: what decides.
        places: how many trials train at once.
        epochs: of a whole training.
        events: what earlier sessions of the study have seen.
    """

    def __init__(self, rule: StoppingRule, places: int, epochs: int, events: Iterable[TrialEvent] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rule, self.places, self.epochs = rule, places, epochs
        # Not the journal's: a decision comes before its epoch is written down.
        self._history = History()
        for event in events:
            self._history.apply(event)
        self._trials: dict[str, TuneTrial] = {}  # of this session and not ended, in order of their suggestion
        self._reasons: dict[str, str] = {}
        self._promoted: set[str] = set()  # paused, and to go on before any new trial
        self._news = False

    def __getstate__(self) -> dict[str, object]:
        """Tune pickles its scheduler for `Tuner.restore`, which nobody calls: the study's files are the state."""
        return {}

    def has_place(self) -> bool:
        """Whether a new trial may begin: a place is free, and no paused trial is to have it.

        Tune asks for new trials before it looks at paused ones, so what is new is weighed here first.
        """
        if self._news:
            paused = {_name(trial) for trial in self._paused()}
            self._promoted |= {name for name in paused if self._decide(name).decision is Decision.GO_ON}
        return self._free() > len(self._promoted)

    def on_trial_add(self, tune_controller: Stopper, trial: TuneTrial) -> None:
        """A trial was suggested, or its actor died and it starts again."""
        self._trials[_name(trial)] = trial
        self._history.apply(started(trial))

    def on_trial_error(self, tune_controller: Stopper, trial: TuneTrial) -> None:
        """Its actor died; if Tune or the searcher starts it again, it is added again."""
        self._apply_end(trial, "failed")
        self._trials.pop(_name(trial), None)

    def on_trial_result(self, tune_controller: Stopper, trial: TuneTrial, result: Mapping[str, object]) -> str:
        """Decide, if a rung is due that was not decided in an earlier session."""
        epoch = EpochDone.from_row(_name(trial), result)
        self._history.apply(epoch)
        self._news = True
        if result.get("decided") or not is_due(epoch.epoch, self.rule.rungs, self.epochs):
            return str(TrialScheduler.CONTINUE)
        return str(TUNES[self._decide(epoch.trial).decision])

    def on_trial_complete(self, tune_controller: Stopper, trial: TuneTrial, result: Mapping[str, object]) -> None:
        """A running trial has ended; Tune does not ask about the last epoch of one."""
        if "epoch" in result:
            self._history.apply(EpochDone.from_row(_name(trial), result))
        failed = result.get("failed") or result.get("fatal")
        self._end(trial, "failed" if failed else "complete" if result.get("final") else "stopped")

    def on_trial_remove(self, tune_controller: Stopper, trial: TuneTrial) -> None:
        """A paused trial was stopped."""
        self._end(trial, "stopped")

    def choose_trial_to_run(self, tune_controller: Stopper) -> TuneTrial | None:
        """The next trial for a free place: a promoted one, else one that was paused; a new one has its place already.

        The searcher was asked just before: a place that is still free has no new trial.
        """
        if self._news:
            self._news = False
            self._look_again(tune_controller)
        paused = self._paused() if self._free() > 0 else []
        promoted = [trial for trial in paused if _name(trial) in self._promoted]
        for trial in (*promoted, *paused):
            self._promoted.discard(_name(trial))
            return trial
        return next((trial for trial in self._trials.values() if trial.status == TuneTrial.PENDING), None)

    def _look_again(self, tune_controller: Stopper) -> None:
        """Ask about paused trials again, with what is known now."""
        for trial in self._paused():
            decision = self._decide(_name(trial)).decision
            self._promoted.discard(_name(trial))
            if decision is Decision.STOP:
                tune_controller.stop_trial(trial)
            elif decision is Decision.GO_ON:
                self._promoted.add(_name(trial))

    def why(self, name: str) -> str | None:
        """The reason of the latest decision about a trial that did not let it go on."""
        return self._reasons.get(name)

    def _decide(self, name: str) -> Verdict:
        trial = self._history.get(name)
        assert trial is not None
        verdict = self.rule.decide(trial, [other for other in self._history.trials if other is not trial])
        self._reasons.pop(name, None)
        if verdict.reason is not None:
            self._reasons[name] = verdict.reason
        return verdict

    def _paused(self) -> list[TuneTrial]:
        return [trial for trial in self._trials.values() if trial.status == TuneTrial.PAUSED]

    def _free(self) -> int:
        # A trial whose actor died stands as an error until Tune has started it again, and keeps its place meanwhile.
        idle = (TuneTrial.PAUSED, TuneTrial.TERMINATED)
        return self.places - sum(trial.status not in idle for trial in self._trials.values())

    def _end(self, trial: TuneTrial, state: EndState) -> None:
        self._apply_end(trial, state)
        self._trials.pop(_name(trial), None)
        self._promoted.discard(_name(trial))
        self._news = True

    def _apply_end(self, trial: TuneTrial, state: EndState) -> None:
        self._history.apply(TrialEnded(trial=_name(trial), state=state))


def _name(trial: TuneTrial) -> str:
    return str(trial.config["trial"])
