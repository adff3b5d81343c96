"""The light Tune trial against a real coordinator, both in this process: Ray's calls become plain ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuner.config import TrialConfig
from tuner.lanes import trial_client as module
from tuner.lanes.coordinator import Coordinator
from tuner.lanes.messages import Orders, Row
from tuner.lanes.trial_client import TrialClient

EPOCHS = 2


class LocalActor:
    """An actor handle whose remote calls run here, on one event loop, and return their value."""

    def __init__(self, target: Coordinator, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, method: str) -> SimpleNamespace:
        def remote(*arguments: Any) -> Any:
            return self._loop.run_until_complete(getattr(self._target, method)(*arguments))

        return SimpleNamespace(remote=remote)


class Bench:
    """A coordinator, a lane played by the test, and trial clients."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.actor = LocalActor(Coordinator(), loop)
        self.actor.register.remote("lane", "attempt", "fp32")

    def client(self, trial: str) -> TrialClient:
        return TrialClient(config=self.config(trial))

    def config(self, trial: str) -> dict[str, Any]:
        return {"trial": trial, "config": {"seed": 0}, "coordinator": "name", "epochs": EPOCHS}

    def poll(self, held: list[str]) -> Orders:
        orders: Orders = self.actor.poll.remote("lane", held, 1, 0)
        return orders

    def report(self, trial: str, epochs: int) -> None:
        history: list[Row] = [{"epoch": epoch} for epoch in range(1, epochs + 1)]
        self.actor.report.remote("lane", trial, history)

    def when_asked(self, monkeypatch: pytest.MonkeyPatch, answer: Callable[[], None]) -> None:
        """Call `answer` (the lane's side) once, as soon as the trial waits for its next epoch."""
        pending = [answer]

        def get(value: Any) -> Any:
            if getattr(value, "kind", None) == "wait" and pending:
                pending.pop()()
            return value

        monkeypatch.setattr(module, "ray", SimpleNamespace(get_actor=lambda name: self.actor, get=get))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    loop = asyncio.new_event_loop()
    bench = Bench(loop)
    # Tune gives every trial a folder for its logs.
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path))
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(module, "ray", SimpleNamespace(get_actor=lambda name: bench.actor, get=lambda value: value))
    yield bench
    loop.close()


def test_nothing_is_leased_before_the_first_step(bench: Bench) -> None:
    """Tune calls `setup` on actors that it then gives to another trial."""
    bench.client("t0")
    assert bench.poll([]) == Orders()


def test_each_step_is_an_epoch_and_the_last_one_is_final(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def lane() -> None:
        assert [trial for trial, _ in bench.poll([]).new] == ["t0"]
        bench.report("t0", EPOCHS)

    bench.when_asked(monkeypatch, lane)
    client = bench.client("t0")
    first, last = client.step(), client.step()
    assert (first["epoch"], first["final"], first["done"]) == (1, False, False)
    assert (last["epoch"], last["final"], last["done"]) == (2, True, True)


def test_a_failure_is_a_result_with_its_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def lane() -> None:
        bench.poll([])
        bench.actor.fail.remote("lane", "t0", "loss became nan")

    bench.when_asked(monkeypatch, lane)
    assert bench.client("t0").step() == {"trial": "t0", "failed": "loss became nan", "final": False, "done": True}


def test_an_actor_that_becomes_another_trial_frees_the_first_ones_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Tune's own `reset`, which replaces `config` before it calls `reset_config`. With the place kept, the
    next trial waits until the lease expires."""

    def first() -> None:
        bench.poll([])
        bench.report("t0", EPOCHS)

    bench.when_asked(monkeypatch, first)
    client = bench.client("t0")
    client.step()

    def second() -> None:
        assert bench.poll(["t0"]) == Orders(new=(("t1", TrialConfig()),), drop=("t0",))
        bench.report("t1", 1)

    bench.when_asked(monkeypatch, second)
    assert client.reset(bench.config("t1"))  # type: ignore[no-untyped-call]
    row = client.step()
    assert (row["trial"], row["epoch"]) == ("t1", 1), "its own first epoch, not the other trial's second"


def test_cleanup_frees_the_place(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def lane() -> None:
        bench.poll([])
        bench.report("t0", 1)

    bench.when_asked(monkeypatch, lane)
    client = bench.client("t0")
    client.step()
    assert bench.poll(["t0"]) == Orders()
    client.cleanup()
    assert bench.poll(["t0"]) == Orders(drop=("t0",))


def test_a_trial_whose_lease_is_unknown_asks_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator was started again and lost everything; the trial's epochs go on where it had read to."""

    def before() -> None:
        bench.poll([])
        bench.report("t0", 1)

    bench.when_asked(monkeypatch, before)
    client = bench.client("t0")
    client.step()
    bench.actor = LocalActor(Coordinator(), bench.loop)
    client._coordinator = bench.actor  # type: ignore[assignment]

    def after() -> None:
        assert bench.poll([]) == Orders(register=True)
        bench.actor.register.remote("lane", "attempt", "fp32")
        assert [trial for trial, _ in bench.poll([]).new] == ["t0"]
        bench.report("t0", 2)

    bench.when_asked(monkeypatch, after)
    assert client.step()["epoch"] == 2


def test_a_paused_trial_reads_on_from_where_it_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lane() -> None:
        bench.poll([])
        bench.report("t0", 2)

    bench.when_asked(monkeypatch, lane)
    client = bench.client("t0")
    client.step()
    client.save_checkpoint(str(tmp_path))
    other = bench.client("t0")
    other.load_checkpoint(str(tmp_path))

    def again() -> None:
        assert bench.poll([]) == Orders(new=(("t0", TrialConfig()),))
        bench.report("t0", 2)

    bench.when_asked(monkeypatch, again)
    assert other.step()["epoch"] == 2


def test_a_paused_trial_gives_its_place_back(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tune keeps the actor of a paused trial for another one, which may be long in coming."""

    def lane() -> None:
        bench.poll([])
        bench.report("t0", 1)

    bench.when_asked(monkeypatch, lane)
    client = bench.client("t0")
    client.step()
    assert bench.poll(["t0"]) == Orders()
    client.save_checkpoint(str(tmp_path))
    assert bench.poll(["t0"]) == Orders(drop=("t0",))


@pytest.mark.parametrize("end", ["last epoch", "failure"])
def test_a_trial_that_has_ended_gives_its_place_back(bench: Bench, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    def lane() -> None:
        bench.poll([])
        bench.report("t0", EPOCHS)
        if end == "failure":
            bench.actor.fail.remote("lane", "t0", "loss became nan")

    bench.when_asked(monkeypatch, lane)
    config = bench.config("t0") | {"epochs": EPOCHS + (end == "failure")}
    client = TrialClient(config=config)
    while not client.step()["done"]:
        pass
    # A trial that failed has left its lane already.
    assert bench.actor.next.remote("t0", client._lease or 0, 0, 0).kind == "unknown"
    assert bench.poll(["t0"]) == Orders(drop=("t0",))


def test_an_epoch_with_later_ones_behind_it_is_decided(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed trial reads its past again, of which nothing is to be decided twice."""

    def lane() -> None:
        bench.poll([])
        bench.report("t0", 2)

    bench.when_asked(monkeypatch, lane)
    client = TrialClient(config=bench.config("t0") | {"epochs": 3})
    assert [client.step()["decided"] for _ in range(2)] == [True, False]
