"""The terminal views: what each prints, and the front and time left that all of them share."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.config import LoraSpec, TrialConfig
from tuner.report.live import JsonView, PlainView, make_view
from tuner.report.terminal import RichView
from tuner.study.events import (
    BASELINE,
    RECOMMENDED,
    SAMPLED,
    EndState,
    EpochDone,
    Event,
    FrontChanged,
    Message,
    StudyStarted,
    TrialEnded,
    TrialStarted,
    View,
    read_event,
)
from tuner.study.progress import Progress
from tuner.study.wording import describe_time

STARTED = StudyStarted(
    study="demo",
    space="attention_only",
    objectives=("recall@10", "trainable_parameters"),
    trials=4,
    epochs=8,
    run_dir="runs/demo",
)
LORA = TrialConfig(lora=LoraSpec(rank=16, targets=("q_proj", "v_proj")))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def begun(trial: str, origin: str, parameters: float) -> TrialStarted:
    config = TrialConfig() if origin == BASELINE else LORA
    return TrialStarted(trial=trial, origin=origin, config=config, known={"trainable_parameters": parameters})


def epoch(trial: str, number: int, recall: float, seconds: float = 12.0, loss: float = 1.234) -> EpochDone:
    return EpochDone(trial=trial, epoch=number, loss=loss, metrics={"recall@10": recall}, train_seconds=seconds)


def ended(trial: str, state: EndState, reason: str | None = None) -> TrialEnded:
    return TrialEnded(trial=trial, state=state, reason=reason)


EVENTS = (
    STARTED,
    begun("t0000", BASELINE, 147_840),
    epoch("t0000", 4, 0.412, seconds=2.0),
    Message(text="lane 0 restarted"),
    begun("t0001", RECOMMENDED, 344_448),
    epoch("t0001", 1, 0.45, loss=math.nan),
    ended("t0001", "failed", "the loss became NaN\nlower optim.lora_lr [/bold]"),
    ended("t0000", "complete"),
    FrontChanged(trials=("t0000",)),
)


def play(view: View) -> None:
    """Two trials, one of which fails."""
    for event in EVENTS:
        view.show(event)
    view.close()


def test_plain_lines() -> None:
    out = io.StringIO()
    play(PlainView(out))
    assert out.getvalue().splitlines() == [
        "study demo, space attention_only: 4 trials of 8 epochs, results in runs/demo",
        "t0000 started, projection only, 147,840 trainable parameters",
        # Without LoRA an epoch is short, which predicts nothing of the others; no trial is complete yet.
        "t0000 epoch 4/8 loss 1.234 recall@10 0.412 [2.0 s] front 0 points, time left unknown",
        "lane 0 restarted",
        "t0001 started, recommended: r=16 alpha=32 dropout=0 q_proj,v_proj from block 0 lr=2.0e-03, "
        "344,448 trainable parameters",
        # 27 epochs of 12 s for the two that run.
        "t0001 epoch 1/8 loss nan recall@10 0.450 [12.0 s] front 0 points, about 3 min left",
        "t0001 failed: the loss became NaN lower optim.lora_lr [/bold]",
        "t0000 complete",
    ]


def test_json_lines_hold_every_event_and_no_nan() -> None:
    out = io.StringIO()
    play(JsonView(out))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in out.getvalue().splitlines()]
    assert tuple(map(read_event, lines)) == EVENTS, "read back, they are the same"
    assert lines[0]["event"] == "study_started" and lines[0]["objectives"] == ["recall@10", "trainable_parameters"]
    assert lines[2]["metrics"] == {"recall@10": 0.412}
    assert lines[5]["loss"] is None
    assert lines[6]["reason"] == "the loss became NaN\nlower optim.lora_lr [/bold]"
    assert lines[8] == {"event": "front_changed", "trials": ["t0000"]}


def test_rich_view_shows_trials_front_and_reason() -> None:
    out = Terminal()
    play(RichView(out))
    text = out.getvalue()
    # Markup in a reason is shown as it is, and the cursor that Live hides comes back.
    for expected in (
        "lower optim.lora_lr [/bold]",
        "r=16 alpha=32",
        "344,448",
        "front so far",
        "2 of 4 trials ended, front 1 point",
    ):
        assert expected in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_rich_view_keeps_running_trials_in_a_low_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    view = RichView(out)
    view.show(STARTED)
    view.show(begun("t0000", BASELINE, 10))
    for number in range(1, 30):
        view.show(begun(f"t{number:04d}", SAMPLED, 10))
        view.show(ended(f"t{number:04d}", "stopped"))
    view.close()
    last = out.getvalue().rsplit("configuration", 2)[1]
    assert "projection only" in last and "t0029" in last and "t0002" not in last


def test_closing_twice_is_harmless() -> None:
    view = RichView(Terminal())
    view.show(STARTED)
    view.close()
    view.close()


def test_automatic_choice_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_view("auto", Terminal()), RichView)
    assert isinstance(make_view("auto", io.StringIO()), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view("auto", Terminal()), PlainView)
    assert isinstance(make_view("json", Terminal()), JsonView)
    assert isinstance(make_view("plain", Terminal()), PlainView)
    assert isinstance(make_view("rich", io.StringIO()), RichView)


def test_an_event_of_a_search_elsewhere_needs_no_plan() -> None:
    """Another process may have written into the line that said it; what can be said without it is."""
    out = io.StringIO()
    for view in (PlainView(out), RichView(Terminal())):
        for event in EVENTS[1:]:
            view.show(event)
        view.close()
    assert "t0001 epoch 1 loss nan [12.0 s]" in out.getvalue().splitlines()


def test_objectives_that_are_unknown_here_are_no_plan() -> None:
    """They may come from another version; no view can compare by them."""
    values = STARTED.model_dump()
    assert read_event(values) == STARTED
    for objectives in (["recall@1000"], ["trainable_parameters"], []):
        assert read_event(values | {"objectives": objectives}) is None


def progress(*objectives: str) -> Progress:
    state = Progress()
    state.apply(STARTED.model_copy(update={"objectives": objectives}) if objectives else STARTED)
    state.apply(begun("t0000", BASELINE, 100))
    state.apply(begun("t0001", RECOMMENDED, 300))
    state.apply(begun("t0002", SAMPLED, 200))
    return state


def front(state: Progress) -> list[str]:
    return [trial.trial for trial in state.front()]


def test_front_so_far_uses_the_latest_epochs_of_complete_trials() -> None:
    state = progress()
    state.apply(epoch("t0000", 1, 0.40))
    state.apply(epoch("t0001", 1, 0.39))
    state.apply(epoch("t0002", 1, 0.45))
    assert front(state) == [], "what runs may still change"
    state.apply(ended("t0000", "complete"))
    state.apply(ended("t0002", "complete"))
    assert front(state) == ["t0000", "t0002"]
    state.apply(epoch("t0001", 2, 0.50))
    assert front(state) == ["t0000", "t0002"]
    state.apply(ended("t0001", "complete"))
    assert front(state) == ["t0000", "t0002", "t0001"], "by rising number of parameters"
    state.apply(ended("t0002", "failed", "out of memory"))
    assert front(state) == ["t0000", "t0001"]
    state.apply(ended("t0000", "stopped"))
    assert front(state) == ["t0001"]


@pytest.mark.parametrize(
    ("objectives", "chosen"),
    [(("recall@10",), ["t0001"]), (("recall@10", "trainable_parameters"), ["t0000", "t0001"])],
)
def test_a_view_compares_by_the_objectives_of_the_study(objectives: tuple[str, ...], chosen: list[str]) -> None:
    """Of one with recall alone, a worse and smaller trial is dominated, and is not shown on the front."""
    events: list[Event] = [
        STARTED.model_copy(update={"objectives": objectives}),
        begun("t0000", BASELINE, 100),
        epoch("t0000", 8, 0.40),
        ended("t0000", "complete"),
        begun("t0001", RECOMMENDED, 300),
        epoch("t0001", 8, 0.50),
        ended("t0001", "complete"),
        begun("t0002", SAMPLED, 200),
        epoch("t0002", 1, 0.10),
    ]
    state, out, terminal = Progress(), io.StringIO(), Terminal()
    views = PlainView(out), RichView(terminal)
    for event in events:
        state.apply(event)
        for view in views:
            view.show(event)
    for view in views:
        view.close()
    assert front(state) == chosen
    points = f"front {len(chosen)} point{'s' * (len(chosen) > 1)}"
    assert points in out.getvalue().splitlines()[-1]
    table = terminal.getvalue().rsplit("front so far", 1)[1]
    assert points in table
    assert [trial for trial in ("t0000", "t0001", "t0002") if trial in table] == chosen
    assert points in state.describe()


def test_time_left_counts_what_will_not_run_and_what_runs_side_by_side() -> None:
    state = progress()
    assert state.seconds_left() is None
    for trial in ("t0000", "t0001", "t0002"):
        state.apply(epoch(trial, 2, 0.4, seconds=10.0))
    # 32 epochs planned, 6 done, three at a time.
    assert state.seconds_left() == pytest.approx(10.0 * 26 / 3)
    state.apply(ended("t0000", "stopped"))
    assert state.seconds_left() == pytest.approx(10.0 * 20 / 2)
    state.apply(epoch("t0001", 3, 0.4, seconds=500.0))
    assert state.seconds_left() == pytest.approx(10.0 * 19 / 2), "one slow epoch does not move the median"
    state.apply(begun("t0003", SAMPLED, 200))
    for trial in ("t0001", "t0002", "t0003"):
        state.apply(ended(trial, "complete"))
    assert state.seconds_left() == 0.0
    assert state.describe().endswith("the front is being confirmed on the test gallery")


def test_time_left_is_not_estimated_from_trials_without_lora() -> None:
    """Its epochs take a tenth of the others': counted in, a search of an hour would have seconds left at its start."""
    state = progress()
    for number in range(1, STARTED.epochs + 1):
        state.apply(epoch("t0000", number, 0.4, seconds=0.5))
    state.apply(ended("t0000", "complete"))
    assert state.seconds_left() is None
    state.apply(epoch("t0001", 1, 0.4, seconds=20.0))
    assert state.seconds_left() == pytest.approx(20.0 * 23 / 2)


def test_a_trial_that_starts_again_keeps_its_epoch() -> None:
    state = progress()
    state.apply(epoch("t0000", 5, 0.4))
    state.apply(begun("t0000", BASELINE, 100))
    assert state.epochs_settled == 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "time left unknown"),
        (0.0, "about 0 s left"),
        (44.0, "about 40 s left"),
        (240.0, "about 4 min left"),
        (9000.0, "about 2.5 h left"),
    ],
)
def test_time_in_words(seconds: float | None, text: str) -> None:
    assert describe_time(seconds) == text


def test_plain_view_needs_neither_rich_nor_torch() -> None:
    code = (
        "import sys; from tuner.report.live import make_view; make_view('plain');"
        "sys.exit(bool({'rich', 'torch', 'altair', 'ray'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
