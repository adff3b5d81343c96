"""What goes wrong inside a pack: interrupted epochs, poisoned clips, memory that runs out. Also a lane's guard."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Tiny
from test_pack import CONFIGS, make_pack, train, weights

from tuner import patience as patience_module
from tuner.data.store import Store
from tuner.errors import StudyError, TrialFailed
from tuner.lanes import guard as guard_module
from tuner.lanes.files import LaneFiles
from tuner.lanes.guard import CHECKPOINT_SECONDS, Guard
from tuner.patience import DEFAULT_SECONDS, Patience
from tuner.train.member import read_checkpoint
from tuner.train.pack import Pack

TRIALS = list(CONFIGS)
BROKEN_CLIP = 7


class Interrupt(Exception):
    """A node that goes away in the middle of an epoch."""


def stop_after(steps: int) -> Callable[[int, int], None]:
    def progress(step: int, _: int) -> None:
        if step == steps:
            raise Interrupt

    return progress


def test_an_epoch_that_was_interrupted_goes_on_from_its_last_step(tiny: Tiny, tmp_path: Path) -> None:
    """Bit for bit what an undisturbed training gives, its loss included, beside a member that was not begun."""
    whole, first = make_pack(tiny), make_pack(tiny)
    for trial, config in CONFIGS.items():
        whole.attach(trial, config)
    expected = train(whole, TRIALS)
    begun = TRIALS[:2]
    for trial in begun:
        first.attach(trial, CONFIGS[trial])
    with pytest.raises(Interrupt):
        first.train_epoch(begun, stop_after(2))
    for trial in begun:
        first.members[trial].save(tmp_path / f"{trial}.pt")
    second, steps = make_pack(tiny), list[int]()
    for trial, config in CONFIGS.items():
        second.attach(trial, config, tmp_path / f"{trial}.pt")
    rest = second.train_epoch(begun, lambda step, _: steps.append(step))
    assert steps == [3]
    alone = second.train_epoch(TRIALS[2:])
    for trial in TRIALS:
        row = {**rest, **alone}[trial]
        assert not isinstance(row, TrialFailed)
        assert row["loss"] == expected[trial][0]
    assert [row["loss"] for row in second.train_epoch(TRIALS).values() if isinstance(row, dict)] == [
        expected[trial][1] for trial in TRIALS
    ]
    for trial in TRIALS:
        assert all(map(torch.equal, weights(second, trial), weights(whole, trial)))


def test_the_time_of_an_interrupted_epoch_is_that_of_both_parts(tiny: Tiny, tmp_path: Path) -> None:
    pack = make_pack(tiny)
    member = pack.attach("t0001", CONFIGS["t0001"])
    with pytest.raises(Interrupt):
        pack.train_epoch(["t0001"], stop_after(2))
    member.seconds += 1000
    member.save(tmp_path / "t.pt")
    pack.detach("t0001")
    pack.attach("t0001", CONFIGS["t0001"], tmp_path / "t.pt")
    row = pack.train_epoch(["t0001"])["t0001"]
    assert isinstance(row, dict)
    assert row["train_seconds"] > 1000


def test_a_checkpoint_of_an_older_version_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    """It was made at the end of an epoch, and knows nothing of places within one."""
    pack = make_pack(tiny)
    member = pack.attach("t0001", CONFIGS["t0001"])
    train(pack, ["t0001"], epochs=1)
    state = member.state()
    del state["within_epoch"]
    torch.save(state, tmp_path / "old.pt")
    pack.detach("t0001")
    assert pack.attach("t0001", CONFIGS["t0001"], tmp_path / "old.pt").epoch == 1
    train(pack, ["t0001"], epochs=1)


@pytest.mark.parametrize(("number", "expected"), [(errno.EIO, OSError), (errno.EINVAL, StudyError)])
def test_a_failing_disk_is_no_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    """A file that ends too early is an invalid seek, and is named; any other error of the disk is waited for."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, "from the disk")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(expected):
        read_checkpoint(tmp_path / "t0001.pt")


# A clip whose features are not numbers


def poisoned_store(tiny: Tiny, folder: Path, clip: int) -> Store:
    """A copy of the store in which a disk has spoilt one clip."""
    shutil.copytree(tiny.store_folder, folder)
    features = Store.open(folder).features(clip)
    spoilt = features.copy()
    spoilt[0, 0] = np.nan
    (shard,) = (path for path in folder.iterdir() if features.tobytes() in path.read_bytes())
    shard.write_bytes(shard.read_bytes().replace(features.tobytes(), spoilt.tobytes()))
    return Store.open(folder)


@pytest.mark.parametrize("cached", [False, True])
def test_a_poisoned_clip_is_named_and_ends_trials_not_the_process(tiny: Tiny, tmp_path: Path, cached: bool) -> None:
    pack = make_pack(tiny, tmp_path / "cache" if cached else None)
    pack = Pack(replace(pack.context, store=poisoned_store(tiny, tmp_path / "s", BROKEN_CLIP)))
    for trial, config in CONFIGS.items():
        pack.attach(trial, config)
    rows = pack.train_epoch(TRIALS)
    reasons = {str(row) for row in rows.values() if isinstance(row, TrialFailed)}
    assert len(rows) == len(CONFIGS)
    (reason,) = reasons
    assert f"clip clip-{BROKEN_CLIP} ({BROKEN_CLIP}.wav, row {BROKEN_CLIP} of " in reason


def test_a_poisoned_validation_clip_is_named_too(tiny: Tiny, tmp_path: Path) -> None:
    """Training never sees it; its NaN would be ranked among the recalls."""
    pack = make_pack(tiny)
    clip = int(tiny.store().split("validation")[3])
    pack = Pack(replace(pack.context, store=poisoned_store(tiny, tmp_path / "s", clip)))
    pack.attach("t0001", CONFIGS["t0001"])
    train(pack, ["t0001"], epochs=1)
    with pytest.raises(TrialFailed, match=f"clip clip-{clip} "):
        pack.validate("t0001")


# Memory that runs out


def run_out(pack: Pack, trial: str, error: type[RuntimeError], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second step of a member fail as torch would."""
    step = pack._step

    def failing(member: Any, batch: Any, same_BB: torch.Tensor) -> torch.Tensor:
        if member.trial == trial and member.steps == 1:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines of advice.")
        return step(member, batch, same_BB)

    monkeypatch.setattr(pack, "_step", failing)


def test_out_of_memory_ends_one_member_and_the_others_train_as_if_alone(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, alone = make_pack(tiny), make_pack(tiny)
    for trial, config in CONFIGS.items():
        pack.attach(trial, config)
    alone.attach("t0002", CONFIGS["t0002"])
    run_out(pack, "t0001", torch.OutOfMemoryError, monkeypatch)
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    rows = pack.train_epoch(TRIALS)
    assert str(rows["t0001"]) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert emptied
    pack.detach("t0001")
    row = rows["t0002"]
    assert isinstance(row, dict) and row["loss"] == train(alone, ["t0002"], 1)["t0002"][0]


def test_a_device_in_no_defined_state_ends_the_process(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every later call fails: going on would end trial after trial for nothing."""
    pack = make_pack(tiny)
    pack.attach("t0001", CONFIGS["t0001"])
    run_out(pack, "t0001", torch.AcceleratorError, monkeypatch)
    with pytest.raises(torch.AcceleratorError):
        pack.train_epoch(["t0001"])


# What keeps a lane's work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    hand = SimpleNamespace(now=1000.0, slept=[])

    def sleep(seconds: float) -> None:
        hand.slept.append(seconds)
        hand.now += seconds

    for module in (patience_module, guard_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: hand.now, sleep=sleep))
    return hand


class Told(list[tuple[Any, ...]]):
    """What the coordinator was told."""

    def __call__(self, *call: Any) -> None:
        self.append(call)


def make_guard(folder: Path, told: Told, rank: int = 0) -> Guard:
    return Guard(rank, LaneFiles(folder, None, "lane"), told, lambda value: value)


def full_disk(member: Any, failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full for the first attempts: torch's writer leaves half a file and raises."""
    save, left = torch.save, [failures]

    def write(state: object, path: Path) -> None:
        if left[0]:
            left[0] -= 1
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", write)


def test_a_disk_that_is_full_for_a_moment_costs_a_moment(
    tiny: Tiny, tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, told = make_pack(tiny).attach("t0001", CONFIGS["t0001"]), Told()
    full_disk(member, 3, monkeypatch)
    assert make_guard(tmp_path, told).save(member)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["t0001.pt"]
    assert [method for method, _ in told] == ["note", "note"]
    assert "No space left" in told[0][1]
    assert "is back" in told[1][1]
    assert clock.slept == [0.25, 0.5, 1.0]


def test_a_disk_that_stays_full_ends_the_search_with_a_sentence(
    tiny: Tiny, tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, told = make_pack(tiny).attach("t0001", CONFIGS["t0001"]), Told()
    full_disk(member, 1000, monkeypatch)
    assert not make_guard(tmp_path, told).save(member)
    assert list((tmp_path / "checkpoints").iterdir()) == [], "nothing half written, which would take space"
    assert told[-1][0] == "fatal"
    assert "t0001.pt: the storage has failed for 120 s" in told[-1][1]
    assert sum(clock.slept) == DEFAULT_SECONDS


def test_a_long_epoch_is_kept_within(tiny: Tiny, tmp_path: Path, clock: SimpleNamespace) -> None:
    """Every two minutes, and not at each step."""
    member, told = make_pack(tiny).attach("t0001", CONFIGS["t0001"]), Told()
    guard, path = make_guard(tmp_path, told), tmp_path / "checkpoints/t0001.pt"
    guard.between_steps([member])
    clock.now += CHECKPOINT_SECONDS - 1
    guard._asked = clock.now
    guard.between_steps([member])
    assert not path.exists()
    clock.now += 2
    guard.between_steps([member])
    assert path.exists()
    path.unlink()
    guard.between_steps([member])
    assert not path.exists()


def test_only_the_first_rank_writes(tiny: Tiny, tmp_path: Path) -> None:
    member = make_pack(tiny).attach("t0001", CONFIGS["t0001"])
    assert make_guard(tmp_path, Told(), rank=1).save(member)
    assert not (tmp_path / "checkpoints").exists()


def test_patience_does_not_hide_mistakes(clock: SimpleNamespace) -> None:
    patience = Patience(lambda text: None)

    def mistake() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        patience.outlast(Path("x"), mistake)
    assert clock.slept == []
    assert patience.exhausted is None


def test_patience_that_is_exhausted_remembers_why(clock: SimpleNamespace) -> None:
    """Tune's loop makes an exception of its own of whatever happens in it."""
    patience = Patience(lambda text: None)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StudyError, match="study: the storage has failed"):
        patience.outlast(Path("study"), full)
    assert patience.exhausted is not None
    assert "No space left" in patience.exhausted
