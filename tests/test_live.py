"""The terminal views: what each prints, and the front and time left that all of them share."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.report.live import JsonView, PlainView, View, make_view
from tuner.report.progress import EpochRow, Progress, StudyHeader, describe_time
from tuner.report.terminal import RichView

HEADER = StudyHeader(
    study="demo",
    space="attention_only",
    metric="recall@10",
    trials=4,
    epochs=8,
    dashboard_url=None,
    run_dir="runs/demo",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(trial: str, epoch: int, recall: float, parameters: int, seconds: float = 12.0, loss: float = 1.234) -> EpochRow:
    return EpochRow(trial, epoch, HEADER.epochs, loss, recall, HEADER.metric, seconds, parameters)


def play(view: View) -> None:
    """Two trials, one of which fails."""
    view.start(HEADER)
    view.trial_started("t0000", "projection_only", "no LoRA", 147_840)
    view.epoch(row("t0000", 4, 0.412, 147_840, seconds=2.0))
    view.message("lane 0 restarted")
    view.trial_started("t0001", "recommended", "rank 16, attention", 344_448)
    view.epoch(row("t0001", 1, 0.45, 344_448, loss=float("nan")))
    view.trial_finished("t0001", "failed", "the loss became NaN\nlower optim.lora_lr [/bold]")
    view.trial_finished("t0000", "complete", None)
    view.close()


def test_plain_lines() -> None:
    out = io.StringIO()
    play(PlainView(out))
    assert out.getvalue().splitlines() == [
        "study demo, space attention_only: 4 trials of 8 epochs, results in runs/demo",
        "t0000 started, projection only: no LoRA, 147,840 trainable parameters",
        # Without LoRA an epoch is short, which says nothing of the others.
        "t0000 epoch 4/8 loss 1.234 recall@10 0.412 [2.0 s] front 1 point, time left unknown",
        "lane 0 restarted",
        "t0001 started, recommended: rank 16, attention, 344,448 trainable parameters",
        # 27 epochs of 12 s for the two that run.
        "t0001 epoch 1/8 loss nan recall@10 0.450 [12.0 s] front 2 points, about 3 min left",
        "t0001 failed: the loss became NaN lower optim.lora_lr [/bold]",
        "t0000 complete",
    ]


def test_json_lines_hold_every_event_and_no_nan() -> None:
    out = io.StringIO()
    play(JsonView(out))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    events = [json.loads(line, parse_constant=refuse) for line in out.getvalue().splitlines()]
    kinds = ["start", "trial_started", "epoch", "message", "trial_started", "epoch", "trial_finished", "trial_finished"]
    assert [event["event"] for event in events] == kinds
    assert events[0] | {"trials": 4, "metric": "recall@10", "run_dir": "runs/demo"} == events[0]
    assert events[2] | {"trial": "t0000", "epoch": 4, "recall": 0.412, "parameters": 147_840} == events[2]
    assert events[5]["loss"] is None
    assert events[6]["reason"] == "the loss became NaN\nlower optim.lora_lr [/bold]"


def test_rich_view_shows_trials_front_and_reason() -> None:
    out = Terminal()
    play(RichView(out))
    text = out.getvalue()
    # Markup in a reason is shown as it is, and the cursor that Live hides comes back.
    for expected in (
        "lower optim.lora_lr [/bold]",
        "rank 16, attention",
        "344,448",
        "front so far",
        "2 of 4 trials ended",
    ):
        assert expected in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_rich_view_keeps_running_trials_in_a_low_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    view = RichView(out)
    view.start(HEADER)
    view.trial_started("t0000", "sampled", "the one that runs", 10)
    for number in range(1, 30):
        view.trial_started(f"t{number:04d}", "sampled", "ended", 10)
        view.trial_finished(f"t{number:04d}", "complete", None)
    view.close()
    last = out.getvalue().rsplit("configuration", 2)[1]
    assert "the one that runs" in last and "t0029" in last and "t0002" not in last


def test_closing_twice_is_harmless() -> None:
    view = RichView(Terminal())
    view.start(HEADER)
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


def progress() -> Progress:
    state = Progress(HEADER)
    state.started("t0000", "projection_only", "no LoRA", 100)
    state.started("t0001", "recommended", "rank 16", 300)
    state.started("t0002", "sampled", "rank 4", 200)
    return state


def test_front_so_far_uses_the_latest_epochs_and_no_failed_trial() -> None:
    state = progress()
    state.epoch(row("t0000", 1, 0.40, 100))
    state.epoch(row("t0001", 1, 0.39, 300))
    state.epoch(row("t0002", 1, 0.45, 200))
    assert [trial.trial for trial in state.front()] == ["t0000", "t0002"]
    state.epoch(row("t0001", 2, 0.50, 300))
    assert [trial.trial for trial in state.front()] == ["t0000", "t0002", "t0001"]
    state.finished("t0002", "failed", "out of memory")
    assert [trial.trial for trial in state.front()] == ["t0000", "t0001"]


def test_time_left_counts_what_will_not_run_and_what_runs_side_by_side() -> None:
    state = progress()
    assert state.seconds_left() is None
    for trial in state.trials:
        state.epoch(row(trial, 2, 0.4, 1, seconds=10.0))
    # 32 epochs planned, 6 done, three at a time.
    assert state.seconds_left() == pytest.approx(10.0 * 26 / 3)
    state.finished("t0000", "stopped", None)
    assert state.seconds_left() == pytest.approx(10.0 * 20 / 2)
    state.epoch(row("t0001", 3, 0.4, 1, seconds=500.0))
    assert state.seconds_left() == pytest.approx(10.0 * 19 / 2), "one slow epoch does not move the median"
    for trial in ("t0001", "t0002", "t0003"):
        state.finished(trial, "complete", None)
    assert state.seconds_left() == 0.0


def test_time_left_is_not_reckoned_from_trials_without_lora() -> None:
    """Its epochs take a tenth of the others': counted in, a search of an hour would have seconds left at its start."""
    state = progress()
    for epoch in range(1, HEADER.epochs + 1):
        state.epoch(row("t0000", epoch, 0.4, 100, seconds=0.5))
    state.finished("t0000", "complete", None)
    assert state.seconds_left() is None
    state.epoch(row("t0001", 1, 0.4, 300, seconds=20.0))
    assert state.seconds_left() == pytest.approx(20.0 * 23 / 2)


def test_a_trial_that_starts_again_keeps_its_epoch() -> None:
    state = progress()
    state.epoch(row("t0000", 5, 0.4, 100))
    state.started("t0000", "projection_only", "no LoRA", 100)
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
