"""The journal and the table made from it: what a killed driver leaves, and what every reader finds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.atomic import write_json
from tuner.config import LoraSpec, OptimSpec, TrialConfig
from tuner.errors import StudyError
from tuner.study.config import StudyRecord
from tuner.study.events import EpochDone, TrialStarted
from tuner.study.folder import StudyFolder, check_study_name
from tuner.study.history import Cell, flat_config
from tuner.study.journal import Journal, read_history, table_rows

BASELINE = TrialConfig()
LORA = TrialConfig(lora=LoraSpec(rank=4, targets=("q_proj", "v_proj")), seed=7)
KNOWN = {"trainable_parameters": 100.0, "lora_parameters": 10.0}
ORIGINS = {"t0000": "projection_only", "t0001": "recommended"}


def start(trial: str) -> TrialStarted:
    config = BASELINE if trial == "t0000" else LORA
    return TrialStarted(trial=trial, origin=ORIGINS.get(trial, "sampled"), config=config, known=KNOWN)


def epoch(trial: str, number: int, loss: float | None = None) -> EpochDone:
    return EpochDone(
        trial=trial,
        epoch=number,
        loss=2.0 / number if loss is None else loss,
        metrics={"recall@10": 0.1 * number},
        train_seconds=1.5,
        validation_seconds=0.5,
    )


def lines(folder: StudyFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in folder.journal.read_text(encoding="utf-8").splitlines()]


def rows(journal: Journal) -> list[dict[str, Cell]]:
    return table_rows(journal.history.trials)


Reopen = Callable[[], Journal]


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Reopen]:
    """A journal over the test's folder, as another driver would open it; the files are closed at the end."""
    with ExitStack() as stack:

        def open_() -> Journal:
            return stack.enter_context(closing(Journal(StudyFolder(tmp_path))))

        yield open_


@pytest.fixture
def journal(reopen: Reopen) -> Journal:
    """Two trials: one complete, one running after its first epoch."""
    journal = reopen()
    journal.start(start("t0000"))
    journal.epoch(epoch("t0000", 1))
    journal.epoch(epoch("t0000", 2))
    journal.end("t0000", "complete")
    journal.start(start("t0001"))
    journal.epoch(epoch("t0001", 1))
    return journal


def test_every_event_is_on_disk_before_the_next_one(journal: Journal) -> None:
    """The driver may be killed at any moment, so nothing waits in a buffer."""
    assert len(lines(journal.folder)) == 6


def test_a_table_has_a_row_for_each_trial_and_epoch(journal: Journal) -> None:
    found = [(row["trial"], row["number"], row["epoch"], row["state"]) for row in rows(journal)]
    assert found == [("t0000", 0, 1, "complete"), ("t0000", 0, 2, "complete"), ("t0001", 1, 1, "running")]


def test_a_trial_without_an_epoch_is_in_the_table_too(journal: Journal) -> None:
    journal.start(start("t0002"))
    journal.end("t0002", "failed", "out of memory")
    last = rows(journal)[-1]
    assert (last["trial"], last["state"], last["reason"]) == ("t0002", "failed", "out of memory")
    assert "epoch" not in last


@pytest.mark.parametrize("torn", [b"{", b'{"event": "epoch_done", "trial": "t0001", "epoch": 2, "lo', b"\xc3"])
def test_a_torn_last_line_costs_that_line_alone(journal: Journal, reopen: Reopen, torn: bytes) -> None:
    """The kill may come inside a character; what follows must not be glued to the torn line."""
    before = rows(journal)
    with journal.folder.journal.open("ab") as file:
        file.write(torn)
    resumed = reopen()
    assert rows(resumed) == before
    assert resumed.fault is not None and "skipped 1 line (1 damaged)" in resumed.fault
    assert resumed.epoch(epoch("t0001", 2)), "its epoch is reported again"
    assert [row["epoch"] for row in rows(reopen())] == [1, 2, 1, 2]


def test_a_whole_last_line_without_its_end_is_kept(journal: Journal, reopen: Reopen) -> None:
    path = journal.folder.journal
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    resumed = reopen()
    resumed.epoch(epoch("t0001", 2))
    assert [row["epoch"] for row in rows(reopen())] == [1, 2, 1, 2]


def test_a_resumed_trial_does_not_write_its_past_again(journal: Journal, reopen: Reopen) -> None:
    resumed = reopen()
    resumed.start(start("t0001"))
    assert not resumed.epoch(epoch("t0001", 1))
    assert resumed.epoch(epoch("t0001", 2))
    written = [(e["trial"], e["epoch"]) for e in lines(journal.folder) if e["event"] == "epoch_done"]
    assert written == [("t0000", 1), ("t0000", 2), ("t0001", 1), ("t0001", 2)]


def test_a_trial_that_is_started_again_is_running_again(journal: Journal) -> None:
    journal.end("t0001", "failed", "its actor died")
    journal.start(start("t0001"))
    assert (rows(journal)[-1]["state"], rows(journal)[-1]["reason"]) == ("running", None)


def test_what_only_the_database_knows_is_written_once(journal: Journal) -> None:
    """The driver was killed after it told the study and before it wrote the journal."""
    for _ in range(2):
        journal.settle(start("t0000"), "complete")
        journal.settle(start("t0001"), "complete")
        journal.settle(start("t0002"), None)
        journal.settle(start("t0003"), "failed")
    found = [(row["trial"], row["state"]) for row in rows(journal) if row.get("epoch") in (None, 1)]
    assert found == [("t0000", "complete"), ("t0001", "complete"), ("t0002", "running"), ("t0003", "failed")]
    assert len(lines(journal.folder)) == 6 + 1 + 1 + 2


def test_the_database_decides_how_a_trial_ended(journal: Journal) -> None:
    journal.settle(start("t0000"), "failed")
    assert journal.history.trials[0].state == "failed"


def test_a_reason_may_hold_any_character(journal: Journal, reopen: Reopen) -> None:
    reason = 'ÿ"\u2028\n\x85 end'
    journal.end("t0001", "failed", reason)
    assert rows(reopen())[-1]["reason"] == reason


def test_events_lead_a_view_to_the_same_history(journal: Journal, reopen: Reopen) -> None:
    told = [(event.event, event.trial) for event in reopen().history.events()]
    assert told == [
        ("trial_started", "t0000"),
        ("epoch_done", "t0000"),
        ("epoch_done", "t0000"),
        ("trial_ended", "t0000"),
        ("trial_started", "t0001"),
        ("epoch_done", "t0001"),
    ]


def test_the_projection_alone_has_no_lora_columns() -> None:
    flat = flat_config(BASELINE)
    lora = {key: value for key, value in flat.items() if key.startswith("lora")}
    assert lora == {f"lora.{field}": None for field in LoraSpec.model_fields}
    assert flat["optim.head_lr"] == OptimSpec().head_lr
    assert flat_config(LORA).keys() == flat.keys()


def test_a_configuration_is_flat() -> None:
    flat = flat_config(LORA)
    assert (flat["lora.rank"], flat["lora.targets"], flat["seed"]) == (4, "q_proj,v_proj", 7)
    assert all(value is None or isinstance(value, str | int | float | bool) for value in flat.values())


def test_the_table_has_the_types_that_readers_expect(journal: Journal) -> None:
    journal.end("t0001", "failed", "loss became nan")
    journal.close()
    schema = pq.read_schema(journal.folder.trials)
    kinds = {
        pa.string(): ("trial", "origin", "state", "reason", "lora.targets", "head.kind", "loss.kind", "pooling"),
        pa.int64(): ("number", "epoch", "lora.rank", "lora.first_layer", "trainable_parameters", "seed"),
        pa.float64(): ("loss", "recall@10", "train_seconds", "lora.alpha_ratio", "lora.dropout", "optim.lora_lr"),
        pa.bool_(): ("lora.rslora", "loss.learn_temperature"),
    }
    for kind, columns in kinds.items():
        for column in columns:
            assert schema.field(column).type == kind, column


def test_a_table_of_nothing_is_not_written(tmp_path: Path) -> None:
    Journal(StudyFolder(tmp_path)).close()
    assert not StudyFolder(tmp_path).trials.exists()


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
        StudyRecord.read(StudyFolder(tmp_path))


# Journals that were killed, edited or written by two drivers


def whole_journal() -> list[str]:
    """A journal of three trials, one failed, one started twice."""
    events: list[str] = []
    for trial in ("t0000", "t0001", "t0002"):
        events.append(start(trial).to_json())
        events += [epoch(trial, number).to_json() for number in (1, 2)]
    events.insert(4, start("t0001").to_json())
    events.append('{"event": "trial_ended", "trial": "t0000", "state": "complete", "reason": null}')
    events.append('{"event": "end", "trial": "t0002", "state": "failed", "reason": "of the old form"}')
    return events


WHOLE = whole_journal()


@settings(max_examples=60, deadline=None)
@given(
    cut=st.integers(0, len(WHOLE)),
    picks=st.lists(st.integers(0, len(WHOLE) - 1), max_size=6),
    seed=st.integers(0, 2**16),
    mix=st.sampled_from(["prefix", "drop", "repeat", "shuffle", "two sessions", "garbage"]),
)
def test_whatever_is_in_a_journal_it_opens(
    tmp_path_factory: pytest.TempPathFactory, cut: int, picks: list[int], seed: int, mix: str
) -> None:
    """Any prefix, any dropped or repeated line, any order, two drivers' lines in one another, bytes that are no JSON:
    it opens, its trials are among the real ones, and the database's trials settle to the same history."""
    events = list(WHOLE)
    if mix == "prefix":
        events = events[:cut]
    elif mix == "drop":
        events = [line for place, line in enumerate(events) if place not in picks]
    elif mix == "repeat":
        events += [events[place] for place in picks]
    elif mix == "shuffle":
        random.Random(seed).shuffle(events)
    elif mix == "two sessions":
        other = WHOLE[: max(1, cut)]
        events = [line for pair in zip(events, [*other, *other * 20], strict=False) for line in pair]
    else:
        for place in picks:
            events.insert(
                place, random.Random(seed).choice(["{", "[]", "nul", '{"event": 3}', '{"trial": "../x"}', "\x00"])
            )
    folder = StudyFolder(tmp_path_factory.mktemp("journal"))
    folder.journal.write_text("\n".join(events) + "\n", encoding="utf-8")
    with closing(Journal(folder)) as journal:
        assert {trial.trial for trial in journal.history.trials} <= {"t0000", "t0001", "t0002"}
        for trial, state in (("t0000", "complete"), ("t0001", None), ("t0002", "failed")):
            journal.settle(start(trial), state)  # type: ignore[arg-type]
        states = {trial.trial: trial.state for trial in journal.history.trials}
        assert states["t0000"] == "complete" and states["t0002"] == "failed" and len(states) == 3
    history, _ = read_history(folder)
    assert {trial.trial: trial.state for trial in history.trials} == states, "the same on the next opening"
    assert pq.read_table(folder.trials).num_rows >= 3


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"event": ' + "[" * 100_000,
        '{"event": "message", "text": ' + "9" * 6000 + "}",
        '{"a": "\\ud800"}',
    ],
)
def test_lines_beyond_what_python_reads_are_damage(tmp_path: Path, line: str) -> None:
    folder = StudyFolder(tmp_path)
    folder.journal.write_text(start("t0000").to_json() + "\n" + line + "\n", encoding="utf-8")
    history, fault = read_history(folder)
    assert [trial.trial for trial in history.trials] == ["t0000"]
    assert fault is not None and "1 damaged" in fault


def test_an_end_without_its_trial_is_counted(tmp_path: Path) -> None:
    """Tune once reported the end of a trial that it never started."""
    folder = StudyFolder(tmp_path)
    folder.journal.write_text('{"event": "trial_ended", "trial": "t0001", "state": "failed", "reason": "x"}\n')
    history, fault = read_history(folder)
    assert history.trials == []
    assert fault is not None and "1 of trials without a start" in fault


def test_a_journal_of_version_0_1_reads_the_same(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    row = {"epoch": 1, "loss": 0.5, "recall@10": 0.25, "lora_parameters": 10, "trainable_parameters": 100}
    old = [
        {"event": "trial", "trial": "t0000", "origin": "projection_only", "config": BASELINE.model_dump(mode="json")},
        {"event": "epoch", "trial": "t0000", "row": row | {"train_seconds": 1.0, "clips_per_second": 8.0}},
        {"event": "end", "trial": "t0000", "state": "complete", "reason": None},
    ]
    folder.journal.write_text("".join(json.dumps(line) + "\n" for line in old), encoding="utf-8")
    history, fault = read_history(folder)
    (trial,) = history.trials
    assert fault is None
    assert (trial.state, trial.parameters, trial.lora_parameters, trial.value("recall@10")) == (
        "complete",
        100,
        10,
        0.25,
    )


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a\nb", "a" * 201, "é" * 101])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(StudyError, match="name"):
        check_study_name(name)


def test_a_journal_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(StudyError, match=r"journal\.jsonl: cannot be read \(Is a directory\); restore the file"):
        read_history(StudyFolder(tmp_path))


def test_a_lanes_row_keeps_the_metrics_of_both_directions_and_nothing_else() -> None:
    metrics = {"recall@10": 0.5, "audio_to_text_R@1": 0.25, "text_to_audio_mAP@10": 0.75}
    done = EpochDone.from_row("t0001", {"epoch": 2, "loss": 1.0, **metrics, "final": True, "trial_id": "x"})
    assert (done.epoch, done.loss, done.metrics) == (2, 1.0, metrics)
