"""The journal and the table made from it: what a killed driver leaves, and what the report reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from study_folder import write_run

from tuner.config import LoraSpec, OptimSpec, TrialConfig
from tuner.errors import StudyError
from tuner.records import JOURNAL_FILE, TRIALS_FILE, Journal, flat_config, read_study, write_json
from tuner.report.run import read_run

BASELINE = TrialConfig().model_dump(mode="json")
LORA = TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj", "v_proj")), seed=7).model_dump(mode="json")


def epoch_row(epoch: int, **changes: Any) -> dict[str, Any]:
    counts = {"lora_parameters": 10, "trainable_parameters": 100}
    times = {"train_seconds": 1.5, "validation_seconds": 0.5}
    return {"epoch": epoch, "loss": 2.0 / epoch, "recall@10": 0.1 * epoch, **counts, **times, **changes}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / JOURNAL_FILE).read_text(encoding="utf-8").splitlines()]


Reopen = Callable[[], Journal]


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Reopen]:
    """A journal over the test's folder, as another driver would open it; the files are closed at the end."""
    with ExitStack() as stack:

        def open_() -> Journal:
            return stack.enter_context(closing(Journal(tmp_path)))

        yield open_


@pytest.fixture
def journal(reopen: Reopen) -> Journal:
    """Two trials: one complete, one running after its first epoch."""
    journal = reopen()
    journal.trial("t0000", "projection_only", BASELINE)
    journal.epoch("t0000", epoch_row(1))
    journal.epoch("t0000", epoch_row(2))
    journal.end("t0000", "complete")
    journal.trial("t0001", "recommended", LORA)
    journal.epoch("t0001", epoch_row(1))
    return journal


def test_every_event_is_on_disk_before_the_next_one(journal: Journal) -> None:
    """The driver may be killed at any moment, so nothing waits in a buffer."""
    assert len(lines(journal.run_dir)) == 6


def test_a_table_has_a_row_for_each_trial_and_epoch(journal: Journal) -> None:
    found = [(row["trial"], row["number"], row["epoch"], row["state"]) for row in journal.rows()]
    assert found == [("t0000", 0, 1, "complete"), ("t0000", 0, 2, "complete"), ("t0001", 1, 1, "running")]


def test_a_trial_without_an_epoch_is_in_the_table_too(journal: Journal) -> None:
    journal.trial("t0002", "sampled", LORA)
    journal.end("t0002", "failed", "out of memory")
    last = journal.rows()[-1]
    assert (last["trial"], last["state"], last["reason"]) == ("t0002", "failed", "out of memory")
    assert "epoch" not in last


@pytest.mark.parametrize("torn", [b"{", b'{"event": "epoch", "trial": "t0001", "row": {"epoch": 2, "lo', b"\xc3"])
def test_a_torn_last_line_costs_that_line_alone(journal: Journal, reopen: Reopen, torn: bytes) -> None:
    """The kill may come inside a character; what follows must not be glued to the torn line."""
    before = journal.rows()
    with (journal.run_dir / JOURNAL_FILE).open("ab") as file:
        file.write(torn)
    resumed = reopen()
    assert resumed.rows() == before
    assert resumed.epoch("t0001", epoch_row(2)), "its epoch is reported again"
    assert [row["epoch"] for row in reopen().rows()] == [1, 2, 1, 2]


def test_a_whole_last_line_without_its_end_is_kept(journal: Journal, reopen: Reopen) -> None:
    path = journal.run_dir / JOURNAL_FILE
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    resumed = reopen()
    resumed.epoch("t0001", epoch_row(2))
    assert [row["epoch"] for row in reopen().rows()] == [1, 2, 1, 2]


def test_a_resumed_trial_does_not_write_its_past_again(journal: Journal, reopen: Reopen) -> None:
    resumed = reopen()
    resumed.trial("t0001", "recommended", LORA)
    assert not resumed.epoch("t0001", epoch_row(1))
    assert resumed.epoch("t0001", epoch_row(2))
    written = [(event["trial"], event["row"]["epoch"]) for event in lines(journal.run_dir) if event["event"] == "epoch"]
    assert written == [("t0000", 1), ("t0000", 2), ("t0001", 1), ("t0001", 2)]


def test_the_last_line_of_an_epoch_counts(journal: Journal, reopen: Reopen) -> None:
    with (journal.run_dir / JOURNAL_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "epoch", "trial": "t0001", "row": epoch_row(1, loss=0.25)}) + "\n")
    assert [row["loss"] for row in reopen().rows()] == [2.0, 1.0, 0.25]


def test_a_trial_that_is_started_again_is_running_again(journal: Journal) -> None:
    journal.end("t0001", "failed", "its actor died")
    journal.trial("t0001", "recommended", LORA)
    assert (journal.rows()[-1]["state"], journal.rows()[-1]["reason"]) == ("running", None)


def test_an_end_that_only_the_study_knows_is_noted_once(journal: Journal) -> None:
    """The driver was killed after it told the study and before it wrote the journal."""
    for _ in range(2):
        journal.settle("t0000", "failed")
        journal.settle("t0001", "complete")
        journal.settle("t0002", "complete")
    assert [row["state"] for row in journal.rows()] == ["complete"] * 3
    assert len(lines(journal.run_dir)) == 7


def test_a_reason_may_hold_any_character(journal: Journal, reopen: Reopen) -> None:
    reason = 'ÿ"\u2028\n\x85 end'
    journal.end("t0001", "failed", reason)
    assert reopen().rows()[-1]["reason"] == reason


def test_events_tell_a_view_everything_in_order(journal: Journal, reopen: Reopen) -> None:
    told = [(event["event"], event["trial"]) for event in reopen().events()]
    assert told == [
        ("trial", "t0000"),
        ("epoch", "t0000"),
        ("epoch", "t0000"),
        ("end", "t0000"),
        ("trial", "t0001"),
        ("epoch", "t0001"),
    ]


def test_the_projection_alone_has_no_lora_columns() -> None:
    flat = flat_config(TrialConfig())
    lora = {key: value for key, value in flat.items() if key.startswith("lora")}
    assert lora == {f"lora.{field}": None for field in LoraSpec.model_fields}
    assert flat["optim.head_lr"] == OptimSpec().head_lr
    assert flat_config(TrialConfig.model_validate(LORA)).keys() == flat.keys()


def test_a_configuration_is_flat() -> None:
    flat = flat_config(TrialConfig.model_validate(LORA))
    assert (flat["lora.rank"], flat["lora.targets"], flat["seed"]) == (4, "q_proj,v_proj", 7)
    assert all(value is None or isinstance(value, str | int | float | bool) for value in flat.values())


def test_the_table_has_the_types_that_readers_expect(journal: Journal) -> None:
    journal.end("t0001", "failed", "loss became nan")
    journal.close()
    schema = pq.read_schema(journal.run_dir / TRIALS_FILE)
    kinds = {
        pa.string(): ("trial", "origin", "state", "reason", "lora.targets", "head.kind", "loss.kind", "pooling"),
        pa.int64(): ("number", "epoch", "lora.rank", "lora.first_layer", "trainable_parameters", "seed"),
        pa.float64(): ("loss", "recall@10", "train_seconds", "lora.alpha_ratio", "lora.dropout", "optim.lora_lr"),
        pa.bool_(): ("lora.rslora", "loss.learn_temperature"),
    }
    for kind, columns in kinds.items():
        for column in columns:
            assert schema.field(column).type == kind, column


def test_the_report_reads_the_table(journal: Journal) -> None:
    write_run(journal.run_dir, trials=0, front=False)
    journal.close()
    first, second = read_run(journal.run_dir).trials
    assert (first.trial, first.origin, first.state, first.epochs, first.seconds) == (
        "t0000",
        "projection_only",
        "complete",
        2,
        4.0,
    )
    assert first.objectives == (0.2, 100.0)
    assert first.config["lora.rank"] is None
    assert (second.state, second.epochs, second.config["lora.rank"]) == ("running", 1, 4)


def test_a_table_of_nothing_is_not_written(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    assert not (tmp_path / TRIALS_FILE).exists()


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood there before survives a disk that fills up while the new content is written."""
    write_json(tmp_path / "front.json", {"points": [1]})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "front.json", {"points": [1, 2]})
    assert json.loads((tmp_path / "front.json").read_text(encoding="utf-8")) == {"points": [1]}


def test_a_folder_without_a_study_says_so(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no study here.*tuner search"):
        read_study(tmp_path)
