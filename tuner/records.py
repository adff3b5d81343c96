"""What a study leaves on disk while it runs: `study.json`, a journal of epochs, and `trials.parquet` made from it.

The journal is appended and flushed line by line, so a killed driver loses at most the line it was writing; a resumed
trial reports its past epochs again and the last line of each (trial, epoch) counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuner.config import LoraSpec, TrialConfig
from tuner.errors import StudyError
from tuner.patience import Patience

STUDY_FILE = "study.json"
JOURNAL_FILE = "journal.jsonl"
TRIALS_FILE = "trials.parquet"
FRONT_FILE = "front.json"

Row = dict[str, Any]

_STUDY_NAME = re.compile(r"[^\W_][\w .+=@-]{0,199}")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name and rename it."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it: it is whole, or as it was before."""
    staged = path.with_name(path.name + ".tmp")
    try:
        staged.write_text(text, encoding="utf-8")
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def read_study(run_dir: Path) -> dict[str, Any]:
    """The study's record.

    Raises:
        StudyError: there is no study in this folder, or its record is damaged.
    """
    path = run_dir / STUDY_FILE
    if not path.is_file():
        raise StudyError(f"{run_dir}: no study here (no {STUDY_FILE}); `tuner search` makes one")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{path}: damaged ({' '.join(str(error).split())}); start a new study") from None
    if not isinstance(values, dict):
        raise StudyError(f"{path}: damaged (not a JSON object); start a new study")
    record: dict[str, Any] = values
    return record


def sessions(record: Mapping[str, Any] | None) -> int:
    """How many drivers have worked on the study of this record; 0 where there is none."""
    return 0 if record is None else int(record.get("sessions", 1))


class History:
    """Trials, epochs and ends as the journal has them so far; reading changes nothing, also while a search writes."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._trials: dict[str, Row] = {}
        self._configs: dict[str, Row] = {}
        self._epochs: dict[str, dict[int, Row]] = {}
        path = run_dir / JOURNAL_FILE
        # A torn line may end inside a character; and a reason may hold what `splitlines` takes for an end of line.
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in filter(None, text.split("\n")):
            try:
                self._apply(json.loads(line))
            except json.JSONDecodeError:
                # The line that was being written when the driver was killed; its epoch is reported again.
                continue

    def rows(self) -> list[Row]:
        """A row per trial and epoch, in order; a trial without an epoch has one row without metrics."""
        rows: list[Row] = []
        for trial, facts in sorted(self._trials.items()):
            head = {"trial": trial, "number": int(trial[1:]), **facts}
            epochs = sorted(self._epochs.get(trial, {}).items())
            rows.extend(head | row for _, row in epochs)
            if not epochs:
                rows.append(head)
        return rows

    def events(self) -> list[Row]:
        """Everything known, trial by trial, as the events that would write it: what a resumed view is told first."""
        events: list[Row] = []
        for trial, config in self._configs.items():
            facts = self._trials[trial]
            events.append({"event": "trial", "trial": trial, "origin": facts["origin"], "config": config})
            epochs = sorted(self._epochs.get(trial, {}).items())
            events.extend({"event": "epoch", "trial": trial, "row": row} for _, row in epochs)
            if facts["state"] != "running":
                events.append({"event": "end", "trial": trial, "state": facts["state"], "reason": facts["reason"]})
        return events

    def _apply(self, event: Row) -> None:
        trial = event["trial"]
        if event["event"] == "trial":
            self._configs[trial] = event["config"]
            facts = {"origin": event["origin"], "state": "running", "reason": None}
            self._trials[trial] = facts | flat_config(TrialConfig.model_validate(event["config"]))
        elif event["event"] == "epoch":
            self._epochs.setdefault(trial, {})[int(event["row"]["epoch"])] = event["row"]
        else:
            self._trials[trial] |= {"state": event["state"], "reason": event["reason"]}


def check_study_name(name: str) -> str:
    """The name, if it can be that of a folder, a job and an actor, and cannot lead anywhere else.

    Raises:
        StudyError: it begins with something else than a letter or a digit, or holds a slash or another sign.
    """
    if not _STUDY_NAME.fullmatch(name):
        raise StudyError(
            f"study {name!r}: not a name; take letters, digits and . _ + = @ - beginning with a letter or a digit"
        )
    return name


class Journal(History):
    """Append-only record of trials, epochs and ends.

    Args:
        patience: with a disk that is full or away; by default it waits without a word.

    Raises:
        StudyError: the disk stays full or away (from every method that writes).
    """

    def __init__(self, run_dir: Path, patience: Patience | None = None) -> None:
        super().__init__(run_dir)
        self._patience = patience or Patience(lambda text: None)
        self._path = run_dir / JOURNAL_FILE
        # Unbuffered: a buffer that failed to be written cannot say how much of it was.
        self._file = self._path.open("ab", buffering=0)
        if self._path.stat().st_size and not self._path.read_bytes().endswith(b"\n"):
            self._append(b"\n")

    def trial(self, trial: str, origin: str, config: Row) -> None:
        """A trial has been given its configuration."""
        self._write({"event": "trial", "trial": trial, "origin": origin, "config": config})

    def epoch(self, trial: str, row: Row) -> bool:
        """An epoch has been reported. False when it was known already."""
        known = int(row["epoch"]) in self._epochs.get(trial, {})
        if not known:
            self._write({"event": "epoch", "trial": trial, "row": row})
        return not known

    def end(self, trial: str, state: str, reason: str | None = None) -> None:
        """A trial has ended as `complete`, `stopped` or `failed`."""
        self._write({"event": "end", "trial": trial, "state": state, "reason": reason})

    def settle(self, trial: str, state: str) -> None:
        """The study knows how a trial ended; note it if the driver was killed before it could."""
        if self._trials.get(trial, {}).get("state") == "running":
            self.end(trial, state)

    def write_parquet(self) -> None:
        """Write `trials.parquet` from everything seen so far."""
        rows = self.rows()
        if not rows:
            return
        columns = dict.fromkeys(column for row in rows for column in row)
        table = pa.table({column: _column([row.get(column) for row in rows]) for column in columns})
        path = self.run_dir / TRIALS_FILE
        self._patience.outlast(path, lambda: _write_table(table, path))

    def close(self) -> None:
        """Write the table a last time and let go of the file."""
        try:
            self.write_parquet()
        finally:
            self._file.close()

    def _write(self, event: Row) -> None:
        self._append((json.dumps(event, ensure_ascii=False) + "\n").encode())
        self._apply(event)

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)

        def push() -> None:
            # A disk that becomes full takes the beginning of a line; what is left of it follows when there is room.
            nonlocal rest
            while rest:
                rest = rest[self._file.write(rest) :]

        self._patience.outlast(self._path, push)


def _write_table(table: pa.Table, path: Path) -> None:
    staged = path.with_name(path.name + ".tmp")
    try:
        pq.write_table(table, staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def flat_config(config: TrialConfig) -> Row:
    """A configuration as columns with dotted names; `lora.*` is null for the projection alone."""
    flat: Row = {f"lora.{field}": None for field in LoraSpec.model_fields}
    for group, values in config.model_dump(mode="json").items():
        if isinstance(values, dict):
            flat |= {f"{group}.{field}": value for field, value in values.items()}
        elif group != "lora":
            flat[group] = values
    if config.lora:
        flat["lora.targets"] = ",".join(config.lora.targets)
    return flat


def _column(values: list[Any]) -> Any:
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        whole = all(isinstance(value, int) for value in present)
        return pa.array(values, pa.int64() if whole else pa.float64())
    return pa.array(values, None if present else pa.string())
