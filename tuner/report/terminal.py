"""The live view of a search in a terminal, drawn with rich; imported only if there is a terminal."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuner.study.events import Event, Message, StudyStarted, TrialEnded
from tuner.study.history import Trial
from tuner.study.progress import Progress
from tuner.study.wording import counted, decimals, describe_config, describe_points

STATE_STYLES = {"running": "cyan", "complete": "green", "stopped": "yellow", "failed": "red"}
# Lines of the terminal that are not rows of the two tables.
FURNITURE = 10
FRONT_ROWS = 6
MIN_ROWS = 3


class RichView:
    """Recent trials, the front so far, a progress bar and the time left, drawn again at every event."""

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out)
        self._live: Live | None = None
        self._progress = Progress()

    def show(self, event: Event) -> None:
        """Draw what has changed; messages and reasons of failures stay above the tables."""
        self._progress.apply(event)
        match event:
            case StudyStarted():
                # Drawn only at events: a refresh thread would take time from training on small machines.
                self._live = Live(self._draw(), console=self._console, auto_refresh=False, vertical_overflow="crop")
                self._live.start()
            case Message():
                # As text: rich would read brackets in messages as markup.
                self._console.print(Text(event.text))
            case TrialEnded(reason=str()):
                self._console.print(Text(f"{event.trial} {event.state}: {event.reason}"))
        if self._live is not None:
            self._live.update(self._draw(), refresh=True)

    def close(self) -> None:
        """Leave the last drawing in place and restore the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> RenderableType:
        progress, plan = self._progress, self._progress.started
        front = progress.front()
        title = Text.assemble((plan.study, "bold"), f"  space {plan.space}  ", (plan.run_dir, "dim"))
        if plan.dashboard_url:
            title.append(f"  {plan.dashboard_url}", "dim")
        counts = f"{progress.ended} of {counted(plan.trials, 'trial')} ended, {describe_points(len(front))}"
        status = Text(f"{counts}, {progress.outlook()}", "bold")
        footer = Table.grid(padding=(0, 2, 0, 0), expand=True)
        # A progress bar does not end its line, so it shares one with the counts.
        footer.add_column(no_wrap=True)
        footer.add_column(ratio=1)
        footer.add_row(status, ProgressBar(total=max(1, progress.epochs_total), completed=progress.epochs_settled))
        return Group(title, self._trials_table(), self._front_table(front[-FRONT_ROWS:]), footer)

    def _trials_table(self) -> Table:
        """Running trials and, if the terminal has room, the latest ended trials."""
        metric, trials = self._progress.metric, self._progress.trials
        table = Table("trial", "configuration", expand=True, box=None, header_style="dim")
        for column in ("parameters", "epoch", "loss", metric, "state"):
            table.add_column(Text(column), justify="right", no_wrap=True)
        room = max(MIN_ROWS, self._console.height - FURNITURE - FRONT_ROWS)
        running = [trial for trial in trials if trial.state == "running"][-room:]
        ended = [trial for trial in trials if trial.state != "running"]
        shown = {trial.trial for trial in (*running, *ended[max(0, len(ended) - (room - len(running))) :])}
        for trial in trials:
            if trial.trial in shown:
                table.add_row(*self._cells(trial))
        return table

    def _cells(self, trial: Trial) -> list[Text]:
        last = trial.last
        cells = [
            trial.trial,
            describe_config(trial.config),
            _whole(trial.parameters),
            f"{last.epoch}/{self._progress.started.epochs}" if last else "-",
            decimals(last.loss) if last else "-",
            decimals(last.metric(self._progress.metric)) if last else "-",
        ]
        return [*(Text(cell) for cell in cells), Text(trial.state, STATE_STYLES.get(trial.state, ""))]

    def _front_table(self, front: list[Trial]) -> Table:
        metric = self._progress.metric
        table = Table("front so far", "configuration", expand=True, box=None, header_style="dim")
        for column in ("parameters", metric):
            table.add_column(Text(column), justify="right", no_wrap=True)
        for trial in front:
            value = Text(decimals(trial.value(metric)), "green")
            table.add_row(Text(trial.trial), Text(describe_config(trial.config)), _whole(trial.parameters), value)
        return table


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
