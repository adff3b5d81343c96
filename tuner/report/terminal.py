"""The live view of a search in a terminal, drawn with rich; imported only when one is there."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuner.report.progress import EpochRow, Progress, StudyHeader, TrialProgress, describe_points, describe_time

STATE_STYLES = {"running": "cyan", "complete": "green", "stopped": "yellow", "failed": "red"}
# Lines of the terminal taken by everything but the rows of the two tables.
FURNITURE = 10
FRONT_ROWS = 6
MIN_ROWS = 3


class RichView:
    """Recent trials, the front so far, a progress bar and the time left, drawn again at every event."""

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out)
        self._live: Live | None = None
        self._progress: Progress | None = None

    def start(self, header: StudyHeader) -> None:
        """Begin to draw."""
        self._progress = Progress(header)
        # Redrawn by events alone: a refresh thread would take a core's time from training on small machines.
        self._live = Live(self._draw(), console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def trial_started(self, trial: str, origin: str, summary: str, parameters: int) -> None:
        """Add a trial to the table."""
        self._state.started(trial, origin, summary, parameters)
        self._refresh()

    def epoch(self, row: EpochRow) -> None:
        """Move a trial on."""
        self._state.epoch(row)
        self._refresh()

    def trial_finished(self, trial: str, state: str, reason: str | None) -> None:
        """Show how a trial ended; the reason of a failure stays above the table."""
        self._state.finished(trial, state, reason)
        if reason:
            self.message(f"{trial} {state}: {reason}")
        self._refresh()

    def message(self, text: str) -> None:
        """Print above the table. As text: messages hold brackets that rich would take for markup."""
        self._console.print(Text(text))

    def close(self) -> None:
        """Leave the last drawing in place and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def _state(self) -> Progress:
        assert self._progress is not None, "start comes first"
        return self._progress

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._draw(), refresh=True)

    def _draw(self) -> RenderableType:
        state = self._state
        header = state.header
        front = state.front()
        title = Text.assemble((header.study, "bold"), f"  space {header.space}  ", (header.run_dir, "dim"))
        if header.dashboard_url:
            title.append(f"  {header.dashboard_url}", "dim")
        ended = sum(trial.state != "running" for trial in state.trials.values())
        counts = f"{ended} of {header.trials} trials ended, {describe_points(len(front))}"
        status = Text(f"{counts}, {describe_time(state.seconds_left())}", "bold")
        footer = Table.grid(padding=(0, 2, 0, 0), expand=True)
        # A progress bar ends no line of its own, so it shares one with the counts.
        footer.add_column(no_wrap=True)
        footer.add_column(ratio=1)
        footer.add_row(status, ProgressBar(total=max(1, state.epochs_total), completed=state.epochs_settled))
        return Group(title, self._trials_table(), _front_table(header, front[-FRONT_ROWS:]), footer)

    def _trials_table(self) -> Table:
        """Running trials and, as far as the terminal is high, the latest of the ended ones."""
        metric = self._state.header.metric
        table = Table("trial", "configuration", expand=True, box=None, header_style="dim")
        for column in ("parameters", "epoch", "loss", metric, "state"):
            table.add_column(Text(column), justify="right", no_wrap=True)
        room = max(MIN_ROWS, self._console.height - FURNITURE - FRONT_ROWS)
        trials = list(self._state.trials.values())
        running = [trial for trial in trials if trial.state == "running"][-room:]
        ended = [trial for trial in trials if trial.state != "running"]
        shown = {trial.trial for trial in (*running, *ended[max(0, len(ended) - (room - len(running))) :])}
        for trial in trials:
            if trial.trial in shown:
                table.add_row(*_cells(trial))
        return table


def _cells(trial: TrialProgress) -> list[Text]:
    last = trial.last
    cells = [
        trial.trial,
        trial.summary,
        f"{trial.parameters:,}",
        f"{last.epoch}/{last.epochs}" if last else "-",
        f"{last.loss:.3f}" if last else "-",
        f"{last.recall:.3f}" if last else "-",
    ]
    return [*(Text(cell) for cell in cells), Text(trial.state, STATE_STYLES.get(trial.state, ""))]


def _front_table(header: StudyHeader, front: list[TrialProgress]) -> Table:
    table = Table("front so far", "configuration", expand=True, box=None, header_style="dim")
    for column in ("parameters", header.metric):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for trial in front:
        recall = f"{trial.last.recall:.3f}" if trial.last else "-"
        table.add_row(Text(trial.trial), Text(trial.summary), f"{trial.parameters:,}", Text(recall, "green"))
    return table
