"""Events on disk: `journal.jsonl`, which only grows, and `trials.parquet`, which is made from it.

Each line is flushed, so a killed driver loses at most the line that it was writing. A resumed trial reports its past
epochs again; each (trial, epoch) is written once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tuner.errors import StudyError
from tuner.patience import Patience
from tuner.places import exists
from tuner.study.events import (
    EndState,
    EpochDone,
    TrialEnded,
    TrialEvent,
    TrialStarted,
    known_in_row,
    parse_line,
    read_event,
    trial_number,
)
from tuner.study.folder import StudyFolder
from tuner.study.history import Cell, History, Trial
from tuner.study.wording import counted

Row = dict[str, Cell]


def read_history(folder: StudyFolder) -> tuple[History, str | None]:
    """Trials from the journal so far, and a sentence about its unusable lines, if any; the file is not changed.

    A kill may have cut a journal's last line, or someone may have edited it: lines that cannot be read are skipped and
    counted.

    Raises:
        StudyError: the journal exists but cannot be read.
    """
    history, faults = History(), Counter[str]()
    for line in filter(None, _text(folder.journal).split("\n")):
        values = parse_line(line)
        event = read_event(values) if values is not None else None
        if event is None:
            faults["damaged"] += 1
            continue
        history.apply(event)
        if isinstance(event, EpochDone) and values is not None and (trial := history.get(event.trial)):
            trial.known |= known_in_row(values)
    if history.unstarted:
        faults["of trials without a start"] += history.unstarted
    return history, _sentence(folder.journal, faults)


def _text(path: Path) -> str:
    if not exists(path):
        return ""
    try:
        # An incomplete line may end inside a character; a reason may have characters that `splitlines` splits at.
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); restore the file or start a new study") from None


def _sentence(path: Path, faults: Counter[str]) -> str | None:
    if not faults:
        return None
    kinds = ", ".join(f"{count} {kind}" for kind, count in faults.items())
    return f"{path}: skipped {counted(faults.total(), 'line')} ({kinds}); the study's database is not affected"


class Journal:
    """Append-only record of trials, epochs and ends.

    Args:
        patience: with a disk that is full or unreachable; by default it waits without a message.

    Attributes:
        history: everything in the journal.
        fault: a sentence about unusable lines, if there are any.

    Raises:
        StudyError: the disk stays full or unreachable (from every method that writes).
    """

    def __init__(self, folder: StudyFolder, patience: Patience | None = None) -> None:
        self.folder = folder
        self.history, self.fault = read_history(folder)
        self._patience = patience or Patience(lambda text: None)
        # Unbuffered: after a failed write, a buffer does not show how much of it was written.
        self._file = folder.journal.open("ab", buffering=0)
        if folder.journal.stat().st_size and not _ends_with_newline(folder.journal):
            self._append(b"\n")

    def start(self, event: TrialStarted) -> None:
        """A trial was given its configuration."""
        self._write(event)

    def epoch(self, event: EpochDone) -> bool:
        """An epoch was reported. False if it is already known."""
        trial = self.history.get(event.trial)
        known = trial is not None and event.epoch in trial.epochs
        if not known:
            self._write(event)
        return not known

    def end(self, trial: str, state: EndState, reason: str | None = None) -> None:
        """A trial has ended."""
        self._write(TrialEnded(trial=trial, state=state, reason=reason))

    def settle(self, started: TrialStarted, state: EndState | None) -> None:
        """Write what the study's database knows about a trial and the journal does not.

        Args:
            state: how the trial ended; None while it runs.
        """
        known = self.history.get(started.trial)
        if known is None or known.config != started.config:
            self.start(started)
        elif not known.known:
            # A journal of version 0.1 that ended before the trial's first epoch.
            known.known |= started.known
        now = self.history.get(started.trial)
        if state is not None and now is not None and now.state != state:
            self.end(started.trial, state)

    def write_parquet(self) -> None:
        """Write `trials.parquet` from everything seen so far."""
        rows = table_rows(self.history.trials)
        if not rows:
            return
        names = dict.fromkeys(name for row in rows for name in row)
        schema = pa.schema([(name, _column_type([row.get(name) for row in rows])) for name in names])
        table = pa.Table.from_pylist(rows, schema)
        self._patience.outlast(self.folder.trials, lambda: _write_table(table, self.folder.trials))

    def close(self) -> None:
        """Write the table for the last time and close the file."""
        try:
            self.write_parquet()
        finally:
            self._file.close()

    def _write(self, event: TrialEvent) -> None:
        self._append((event.to_json() + "\n").encode("utf-8", errors="replace"))
        self.history.apply(event)

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)

        def push() -> None:
            # A disk that becomes full takes only the beginning of a line; the rest follows once there is room.
            nonlocal rest
            while rest:
                rest = rest[self._file.write(rest) :]

        self._patience.outlast(self.folder.journal, push)


def table_rows(trials: Sequence[Trial]) -> list[Row]:
    """A row per trial and epoch, in order; a trial without an epoch has one row without metrics."""
    rows: list[Row] = []
    for trial in trials:
        head: Row = {"trial": trial.trial, "number": trial_number(trial.trial), "origin": trial.origin}
        head |= {"state": trial.state, "reason": trial.reason, **trial.settings()}
        known: Row = {name: _whole(value) for name, value in trial.known.items()}
        rows.extend(head | epoch_row(trial.epochs[number]) | known for number in sorted(trial.epochs))
        if not trial.epochs:
            rows.append(head | known)
    return rows


def epoch_row(event: EpochDone) -> Row:
    """An epoch as flat columns."""
    row = event.model_dump(exclude={"event", "trial", "metrics", "warning", "ranks"})
    return row | event.metrics


def _whole(value: float) -> Cell:
    # The number of operations of a large encoder does not fit into the table's 64-bit integers.
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _write_table(table: pa.Table, path: Path) -> None:
    staged = path.with_name(path.name + ".tmp")
    try:
        pq.write_table(table, staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _column_type(values: list[Cell]) -> pa.DataType:
    present = [value for value in values if value is not None]
    if not present or any(isinstance(value, str) for value in present):
        return pa.string()
    if all(isinstance(value, bool) for value in present):
        return pa.bool_()
    return pa.int64() if all(isinstance(value, int) for value in present) else pa.float64()
