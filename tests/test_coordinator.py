"""The queue between trials and lanes, driven with plain calls: no Ray, no training."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace

import pytest

from tuner.config import Precision, TrialConfig
from tuner.lanes import coordinator as module
from tuner.lanes.coordinator import Coordinator
from tuner.lanes.deaths import DEATHS_PER_TRIAL, STARTS_PER_LANE
from tuner.lanes.messages import Confirmation, Muster, Orders, Row, Update
from tuner.lanes.trial_queue import LEASE_SECONDS
from tuner.study.points import Point, Scores
from tuner.train.results import Candidate, Measured

CONFIG = TrialConfig()
FRONT = [Candidate(trial, "space", CONFIG) for trial in ("t0", "t1", "t2")]
SOON = 5.0  # seconds in which something that is to happen at once must have happened
LONG = 600.0


def rows(*epochs: int) -> list[Row]:
    return [{"epoch": epoch, "loss": 1.0 / epoch} for epoch in epochs]


def measured(trial: str) -> Measured:
    point = Point(
        trial=f"{trial[0]}{trial[1:]:0>4}",
        origin="sampled",
        config=TrialConfig(),
        lora_parameters=0,
        trainable_parameters=1,
        validation=Scores(),
        on_front=False,
    )
    return Measured(point, {"recall@10": 0.5}, {})


def drive(scenario: Callable[[Coordinator], Awaitable[None]], precision: Precision | None = None) -> None:
    async def run() -> None:
        await asyncio.wait_for(scenario(Coordinator(precision)), 30)

    asyncio.run(run())


async def new_of(coordinator: Coordinator, lane: str, held: list[str], capacity: int = 1) -> list[str]:
    """Trials that a lane is given when it asks without waiting."""
    return [trial for trial, _ in (await coordinator.poll(lane, held, capacity, 0)).new]


def test_an_epoch_travels_from_lane_to_trial() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        assert await coordinator.poll("lane", [], 1, 0) == Orders(new=(("t0", CONFIG),))
        await coordinator.report("lane", "t0", rows(1))
        assert await coordinator.next("t0", lease, 0, 0) == Update("epoch", row=rows(1)[0])
        assert await coordinator.next("t0", lease, 1, 0) == Update("wait")

    drive(scenario)


def test_a_second_lease_ends_the_first_and_keeps_the_work() -> None:
    """A trial's actor that comes back must not share its epochs with the one it replaces, nor cancel for it."""

    async def scenario(coordinator: Coordinator) -> None:
        first = await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        await coordinator.poll("lane", [], 1, 0)
        await coordinator.report("lane", "t0", rows(1))
        second = await coordinator.submit("t0", CONFIG)
        assert await coordinator.next("t0", first, 0, 0) == Update("unknown")
        await coordinator.cancel("t0", first)
        assert (await coordinator.next("t0", second, 0, 0)).row == rows(1)[0]
        assert await coordinator.poll("lane", ["t0"], 1, 0) == Orders()

    drive(scenario)


def test_another_configuration_under_the_same_name_starts_anew() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        await coordinator.poll("lane", [], 1, 0)
        await coordinator.report("lane", "t0", rows(1))
        changed = TrialConfig(seed=1)
        lease = await coordinator.submit("t0", changed)
        assert await coordinator.next("t0", lease, 0, 0) == Update("wait")
        assert await coordinator.poll("lane", ["t0"], 1, 0) == Orders(new=(("t0", changed),), drop=("t0",))

    drive(scenario)


def test_cancelled_and_unknown_adapters_are_dropped_and_their_place_is_given_away() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        await coordinator.poll("lane", [], 2, 0)
        await coordinator.submit("t1", CONFIG)
        await coordinator.submit("t2", CONFIG)
        await coordinator.cancel("t0", lease)
        orders = await coordinator.poll("lane", ["t0", "never heard of"], 2, 0)
        assert orders == Orders(new=(("t1", CONFIG), ("t2", CONFIG)), drop=("t0", "never heard of"))
        assert await coordinator.next("t0", lease, 0, 0) == Update("unknown")

    drive(scenario)


def test_capacity_is_never_exceeded() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for trial in ("t0", "t1", "t2"):
            await coordinator.submit(trial, CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        assert await new_of(coordinator, "lane", [], capacity=2) == ["t0", "t1"]
        assert await new_of(coordinator, "lane", ["t0", "t1"], capacity=2) == []
        assert await new_of(coordinator, "lane", ["t0", "t1"], capacity=3) == ["t2"]

    drive(scenario)


def test_lanes_share_the_queue_oldest_first() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for trial in ("t2", "t0", "t1"):
            await coordinator.submit(trial, CONFIG)
        for lane in ("a", "b"):
            await coordinator.register(lane, f"attempt of {lane}", "fp32")
        assert await new_of(coordinator, "b", []) == ["t2"]
        assert await new_of(coordinator, "a", []) == ["t0"]
        assert await new_of(coordinator, "b", ["t2"], capacity=2) == ["t1"]
        assert (await coordinator.poll("a", ["t2"], 1, 0)).drop == ("t2",), "another lane's adapter"

    drive(scenario)


def test_reports_of_a_lane_that_lost_the_trial_do_not_count() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.register("a", "first", "fp32")
        await coordinator.poll("a", [], 1, 0)
        await coordinator.register("a", "second", "fp32")
        await coordinator.register("b", "attempt", "fp32")
        assert await new_of(coordinator, "b", []) == ["t0"]
        await coordinator.report("a", "t0", rows(1, 2))
        await coordinator.fail("a", "t0", "late news")
        assert await coordinator.next("t0", lease, 0, 0) == Update("wait")

    drive(scenario)


def test_a_restarted_lane_gets_its_trials_back_and_epochs_are_not_told_twice() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "first", "fp32")
        await coordinator.poll("lane", [], 1, 0)
        await coordinator.report("lane", "t0", rows(1))
        await coordinator.register("lane", "second", "fp32")
        assert await new_of(coordinator, "lane", []) == ["t0"]
        await coordinator.report("lane", "t0", rows(1))
        assert (await coordinator.next("t0", lease, 0, 0)).row == rows(1)[0]
        assert await coordinator.next("t0", lease, 1, 0) == Update("wait")
        await coordinator.report("lane", "t0", rows(1, 2))
        await coordinator.report("lane", "t0", rows(1))  # an older checkpoint takes nothing back
        assert (await coordinator.next("t0", lease, 1, 0)).row == rows(2)[0]

    drive(scenario)


def test_a_resumed_history_is_told_from_its_first_epoch() -> None:
    """A resumed study's lane finds a checkpoint of two epochs: the trial, which knows none, hears both."""

    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        await coordinator.poll("lane", [], 1, 0)
        await coordinator.report("lane", "t0", rows(1, 2))
        told = [(await coordinator.next("t0", lease, cursor, 0)).row for cursor in (0, 1)]
        assert told == rows(1, 2)

    drive(scenario)


def test_a_lost_adapter_is_sent_again() -> None:
    """The lane took it, but the answer never arrived: the next poll says that it does not hold it."""

    async def scenario(coordinator: Coordinator) -> None:
        await coordinator.submit("t0", CONFIG)
        await coordinator.submit("t1", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        assert await new_of(coordinator, "lane", []) == ["t0"]
        assert await new_of(coordinator, "lane", []) == ["t0"]

    drive(scenario)


def test_a_trial_that_kills_its_lane_again_and_again_fails_with_a_reason() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("killer", CONFIG)
        await coordinator.submit("innocent", CONFIG)
        await coordinator.register("lane", "attempt 0", "fp32")
        for death in range(1, DEATHS_PER_TRIAL + 1):
            assert await new_of(coordinator, "lane", []) == ["killer"]
            await coordinator.register("lane", f"attempt {death}", "fp32")
        update = await coordinator.next("killer", lease, 0, 0)
        assert update.kind == "failed"
        assert f"died {DEATHS_PER_TRIAL} times" in str(update.reason)
        assert await new_of(coordinator, "lane", []) == ["innocent"]

    drive(scenario)


def test_an_epoch_in_between_forgives_earlier_deaths() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "attempt 0", "fp32")
        for death in range(1, 2 * DEATHS_PER_TRIAL):
            assert await new_of(coordinator, "lane", []) == ["t0"]
            await coordinator.report("lane", "t0", rows(*range(1, death + 1)))
            await coordinator.register("lane", f"attempt {death}", "fp32")
        assert (await coordinator.next("t0", lease, 0, 0)).kind == "epoch"
        assert (await coordinator.next("t0", lease, 99, 0)).kind == "wait"

    drive(scenario)


def test_a_failed_trial_tells_its_epochs_first_and_may_be_submitted_again() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        await coordinator.poll("lane", [], 1, 0)
        await coordinator.report("lane", "t0", rows(1))
        await coordinator.fail("lane", "t0", "loss became nan")
        assert (await coordinator.next("t0", lease, 0, 0)).kind == "epoch"
        assert await coordinator.next("t0", lease, 1, 0) == Update("failed", reason="loss became nan")
        assert await new_of(coordinator, "lane", []) == []
        await coordinator.submit("t0", CONFIG)
        assert await new_of(coordinator, "lane", []) == ["t0"]

    drive(scenario)


def test_a_lane_that_never_works_ends_the_search() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        for attempt in range(STARTS_PER_LANE):
            await coordinator.register("lane", f"attempt {attempt}", "fp32")
            await coordinator.register("lane", f"attempt {attempt}", "fp32")  # a retried call is not another start
            assert (await coordinator.next("t0", lease, 0, 0)).kind == "wait"
        await coordinator.register("lane", "one too many", "fp32")
        update = await coordinator.next("t0", lease, 0, 0)
        assert update.kind == "fatal" and f"died {STARTS_PER_LANE} times" in str(update.reason)
        assert (await coordinator.poll("lane", [], 1, LONG)).stop

    drive(scenario)


def test_a_fatal_reason_reaches_every_trial_and_the_first_one_counts() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        leases = {trial: await coordinator.submit(trial, CONFIG) for trial in ("t0", "t1")}
        await coordinator.fatal("no weights")
        await coordinator.fatal("something that followed from it")
        for trial, lease in leases.items():
            assert await coordinator.next(trial, lease, 0, LONG) == Update("fatal", reason="no weights")

    drive(scenario)


async def candidate_of(coordinator: Coordinator, lane: str) -> str | None:
    """The trial of the front that a lane is told to measure when it asks without waiting."""
    candidate = (await coordinator.poll(lane, [], 1, 0)).confirm
    return candidate.trial if candidate else None


def test_all_lanes_share_the_front() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for lane in ("a", "b"):
            await coordinator.register(lane, lane, "fp32")
        asked = asyncio.create_task(coordinator.confirm(FRONT, LONG))
        assert await coordinator.poll("a", [], 1, SOON) == Orders(confirm=FRONT[0])
        assert await candidate_of(coordinator, "b") == "t1"
        await coordinator.confirmed("b", "t1", measured("t1"), None)
        assert await candidate_of(coordinator, "b") == "t2"
        await coordinator.confirmed("a", "t0", measured("t0"), None)
        assert await coordinator.poll("a", [], 1, 0) == Orders(), "every trial has its lane"
        assert await coordinator.confirm(FRONT, 0) == Confirmation(left=1)
        assert not asked.done()
        await coordinator.confirmed("b", "t2", measured("t2"), None)
        points = [measured(candidate.trial) for candidate in FRONT]
        assert await asked == Confirmation(points=points), "in the order that was asked for"
        # The driver's call may be retried; the work is not.
        assert await coordinator.confirm(FRONT, 0) == Confirmation(points=points)
        assert await coordinator.poll("a", [], 1, 0) == Orders()

    drive(scenario)


def test_what_a_dead_lane_was_measuring_is_measured_by_whoever_asks_next() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for lane in ("a", "b"):
            await coordinator.register(lane, "first", "fp32")
        assert await coordinator.confirm(FRONT, 0) == Confirmation(left=3)
        assert await candidate_of(coordinator, "a") == "t0"
        assert await candidate_of(coordinator, "b") == "t1"
        await coordinator.confirmed("b", "t1", measured("t1"), None)
        assert await candidate_of(coordinator, "a") == "t0", "an answer that got lost is given again"
        await coordinator.register("a", "second", "fp32")
        assert await candidate_of(coordinator, "b") == "t0"
        assert await candidate_of(coordinator, "a") == "t2"
        await coordinator.leave("a")
        await coordinator.confirmed("b", "t0", measured("t0"), None)
        assert await candidate_of(coordinator, "b") == "t2", "nor is it lost with a machine that says when it goes"

    drive(scenario)


def test_a_trial_that_cannot_be_measured_ends_the_confirmation() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for lane in ("a", "b"):
            await coordinator.register(lane, lane, "fp32")
        assert await coordinator.confirm(FRONT, 0) == Confirmation(left=3)
        assert await candidate_of(coordinator, "a") == "t0"
        assert await candidate_of(coordinator, "b") == "t1"
        await coordinator.confirmed("a", "t0", None, "no space left")
        await coordinator.confirmed("b", "t1", None, "what followed from it")
        assert await coordinator.confirm(FRONT, 0) == Confirmation(reason="no space left")
        assert await candidate_of(coordinator, "a") is None

    drive(scenario)


def test_a_coordinator_that_was_started_again_has_the_front_measured_again() -> None:
    """A lane that still measures for the one before does no harm."""

    async def scenario(coordinator: Coordinator) -> None:
        await coordinator.register("a", "first", "fp32")
        await coordinator.confirmed("a", "t0", measured("t0"), None)
        assert await coordinator.confirm(FRONT, 0) == Confirmation(left=3)
        await coordinator.confirmed("a", "t9", measured("t9"), None)
        assert await coordinator.confirm(FRONT, 0) == Confirmation(left=3)
        assert await candidate_of(coordinator, "a") == "t0"

    drive(scenario)


def test_a_front_without_lanes_is_not_waited_for() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await coordinator.fatal("no weights")
        assert await coordinator.confirm(FRONT, LONG) == Confirmation(reason="no weights")

    drive(scenario)


def test_stop_ends_lanes_at_their_next_poll() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await coordinator.submit("t0", CONFIG)
        await coordinator.stop()
        assert await coordinator.poll("lane", [], 1, LONG) == Orders(stop=True)

    drive(scenario)


def test_whoever_waits_is_woken_at_once() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await coordinator.register("lane", "attempt", "fp32")
        poll = asyncio.ensure_future(coordinator.poll("lane", [], 1, LONG))
        await asyncio.sleep(0.01)
        assert not poll.done()
        lease = await coordinator.submit("t0", CONFIG)
        assert (await asyncio.wait_for(poll, SOON)).new == (("t0", CONFIG),)

        epoch = asyncio.ensure_future(coordinator.next("t0", lease, 0, LONG))
        idle = asyncio.ensure_future(coordinator.poll("lane", ["t0"], 1, LONG))
        await asyncio.sleep(0.01)
        await coordinator.report("lane", "t0", rows(1))
        assert (await asyncio.wait_for(epoch, SOON)).row == rows(1)[0]
        assert not idle.done()

        await coordinator.cancel("t0", lease)
        assert (await asyncio.wait_for(idle, SOON)).drop == ("t0",)
        last = asyncio.ensure_future(coordinator.poll("lane", [], 1, LONG))
        await asyncio.sleep(0.01)
        await coordinator.stop()
        assert (await asyncio.wait_for(last, SOON)).stop

    drive(scenario)


def test_waiting_ends_with_its_timeout() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        await coordinator.poll("lane", [], 1, 0)
        told, ordered = coordinator.next("t0", lease, 0, 0.05), coordinator.poll("lane", ["t0"], 1, 0.05)
        waited = tuple(await asyncio.gather(told, ordered))
        assert waited == (Update("wait"), Orders())

    drive(scenario)


def test_the_first_lane_chooses_the_number_format() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        assert await coordinator.precision() is None
        assert await coordinator.register("a", "attempt", "bf16") == "bf16"
        assert await coordinator.register("b", "attempt", "fp32") == "bf16"
        assert await coordinator.precision() == "bf16"

    drive(scenario)


def test_a_resumed_study_keeps_its_number_format() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        assert await coordinator.register("a", "attempt", "bf16") == "fp32"

    drive(scenario, precision="fp32")


def test_a_coordinator_that_was_started_again_recovers_from_trials_and_lanes() -> None:
    """It knows nothing: the trial submits again, the lane registers, drops what it holds and is given the trial."""

    async def scenario(coordinator: Coordinator) -> None:
        assert await coordinator.next("t0", 17, 0, LONG) == Update("unknown")
        await coordinator.report("lane", "t0", rows(1))
        await coordinator.fail("lane", "t0", "unheard")
        await coordinator.cancel("t0", 17)
        lease = await coordinator.submit("t0", CONFIG)
        assert await coordinator.poll("lane", ["t0"], 1, LONG) == Orders(register=True)
        await coordinator.register("lane", "attempt", "fp32")
        assert await coordinator.poll("lane", ["t0"], 1, 0) == Orders(new=(("t0", CONFIG),), drop=("t0",))
        await coordinator.report("lane", "t0", rows(1))
        assert (await coordinator.next("t0", lease, 0, 0)).row == rows(1)[0]

    drive(scenario)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A clock for the coordinator alone; asyncio keeps its own."""
    hand = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: hand.now))
    yield hand


def test_a_lease_expires_when_nobody_asks_for_its_epochs(clock: SimpleNamespace) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        asked = await coordinator.submit("asked", CONFIG)
        forgotten = await coordinator.submit("forgotten", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        assert await new_of(coordinator, "lane", [], capacity=2) == ["asked", "forgotten"]
        clock.now += LEASE_SECONDS - 1
        assert await coordinator.next("asked", asked, 0, 0) == Update("wait")
        assert await coordinator.poll("lane", ["asked", "forgotten"], 2, 0) == Orders()
        clock.now += 2
        assert await coordinator.poll("lane", ["asked", "forgotten"], 2, 0) == Orders(drop=("forgotten",))
        assert await coordinator.next("forgotten", forgotten, 0, 0) == Update("unknown")

    drive(scenario)


def test_idle_lanes_end_when_the_study_needs_fewer() -> None:
    """One after the other, until as many are left as are needed; not one that has work, or that could have some."""

    async def scenario(coordinator: Coordinator) -> None:
        for lane in ("a", "b", "c"):
            await coordinator.register(lane, lane, "fp32")
        await coordinator.submit("t0", CONFIG)
        assert await new_of(coordinator, "a", []) == ["t0"]
        await coordinator.need(2)
        await coordinator.submit("t1", CONFIG)
        assert await new_of(coordinator, "b", []) == ["t1"], "a trial that waits is trained"
        assert (await coordinator.poll("c", [], 1, 0)).stop
        assert (await coordinator.poll("c", [], 1, 0)).stop, "a call that is retried gets the same answer"
        await coordinator.need(0)
        assert not (await coordinator.poll("a", ["t0"], 1, 0)).stop
        assert (await coordinator.muster()).up == ("a", "b", "c")

    drive(scenario)


def test_one_lane_stays_for_the_front() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for lane in ("a", "b"):
            await coordinator.register(lane, lane, "fp32")
        waiting = asyncio.create_task(coordinator.poll("a", [], 1, LONG))
        await asyncio.sleep(0)
        await coordinator.need(0)
        assert (await asyncio.wait_for(waiting, SOON)).stop
        assert not (await coordinator.poll("b", [], 1, 0)).stop
        assert await coordinator.confirm(FRONT, 0) == Confirmation(left=3)
        assert await candidate_of(coordinator, "b") == "t0"

    drive(scenario)


def test_lanes_go_when_no_trial_of_the_front_is_left_for_them() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for lane in ("a", "b", "c"):
            await coordinator.register(lane, lane, "fp32")
        await coordinator.need(3)
        assert await coordinator.confirm(FRONT, 0) == Confirmation(left=3)
        assert [await candidate_of(coordinator, lane) for lane in ("a", "b", "c")] == ["t0", "t1", "t2"]
        await coordinator.confirmed("a", "t0", measured("t0"), None)
        assert (await coordinator.poll("a", [], 1, 0)).stop
        await coordinator.confirmed("b", "t1", measured("t1"), None)
        assert (await coordinator.poll("b", [], 1, 0)).stop
        await coordinator.confirmed("c", "t2", measured("t2"), None)
        assert not (await coordinator.poll("c", [], 1, 0)).stop, "the last one is told by the driver"

    drive(scenario)


def test_a_lane_that_trains_a_requeued_trial_is_not_sent_away() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        for lane in ("a", "b"):
            await coordinator.register(lane, lane, "fp32")
        await coordinator.submit("t0", CONFIG)
        assert await new_of(coordinator, "a", []) == ["t0"]
        await coordinator.need(1)
        await coordinator.register("a", "second", "fp32")
        assert await new_of(coordinator, "b", []) == ["t0"]
        assert (await coordinator.poll("a", [], 1, 0)).stop

    drive(scenario)


def test_what_lanes_notice_is_kept_for_the_user() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await coordinator.register("a", "first", "fp32")
        await coordinator.note("a", "no driver")
        assert await coordinator.muster() == Muster(("a",), ("a: no driver",))

    drive(scenario)


# A lane that waits at a rung


async def at_a_rung(coordinator: Coordinator) -> int:
    """A trial that its lane has trained to a rung after its first epoch. Returns its lease."""
    lease = await coordinator.submit("t0", CONFIG)
    await coordinator.register("lane", "attempt", "fp32")
    await coordinator.poll("lane", [], 1, 0)
    await coordinator.report("lane", "t0", rows(1))
    return lease


async def wait(coordinator: Coordinator, timeout: float = LONG) -> Orders:
    return await coordinator.poll("lane", ["t0"], 1, timeout, ["t0"])


def test_the_next_call_of_a_trial_is_its_decision_to_go_on() -> None:
    """Reading the epoch is not yet the decision; asking for the next one is, and the lane hears it at once."""

    async def scenario(coordinator: Coordinator) -> None:
        lease = await at_a_rung(coordinator)
        assert (await coordinator.next("t0", lease, 0, 0)).row == rows(1)[0]
        waiting = asyncio.create_task(wait(coordinator))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        asked = asyncio.create_task(coordinator.next("t0", lease, 1, LONG))
        assert await asyncio.wait_for(waiting, SOON) == Orders(go_on=("t0",))
        assert await wait(coordinator, 0) == Orders(go_on=("t0",)), "the answer may be lost: the next one says it again"
        await coordinator.report("lane", "t0", rows(1, 2))
        assert await asyncio.wait_for(asked, SOON) == Update("epoch", row=rows(2)[0])

    drive(scenario)


def test_a_trial_that_is_stopped_or_paused_at_a_rung_leaves_its_place_at_once() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await at_a_rung(coordinator)
        await coordinator.next("t0", lease, 0, 0)
        await coordinator.submit("t1", CONFIG)
        waiting = asyncio.create_task(wait(coordinator))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await coordinator.cancel("t0", lease)
        assert await asyncio.wait_for(waiting, SOON) == Orders(new=(("t1", CONFIG),), drop=("t0",))

    drive(scenario)


def test_a_trial_that_reads_its_past_again_has_not_decided_yet() -> None:
    """A resumed study's trial reads three epochs, of which the last is at a rung."""

    async def scenario(coordinator: Coordinator) -> None:
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.register("lane", "attempt", "fp32")
        await coordinator.poll("lane", [], 1, 0)
        await coordinator.report("lane", "t0", rows(1, 2, 3))
        for cursor, later in ((0, 2), (1, 1), (2, 0)):
            assert (await coordinator.next("t0", lease, cursor, 0)).later == later
            assert await wait(coordinator, 0) == Orders()
        await coordinator.next("t0", lease, 3, 0)
        assert await wait(coordinator, 0) == Orders(go_on=("t0",))

    drive(scenario)


def test_a_lane_that_was_started_again_waits_for_the_same_decision() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        lease = await at_a_rung(coordinator)
        await coordinator.next("t0", lease, 0, 0)
        await coordinator.register("lane", "second", "fp32")
        assert await new_of(coordinator, "lane", []) == ["t0"]
        await coordinator.report("lane", "t0", rows(1))
        assert await wait(coordinator, 0) == Orders(alone="t0")
        await coordinator.next("t0", lease, 1, 0)
        assert (await wait(coordinator, 0)).go_on == ("t0",)

    drive(scenario)


def test_a_coordinator_that_was_started_again_hears_the_decision_from_the_trial() -> None:
    """Whether the trial goes on, or is stopped before the new coordinator has heard of it."""

    async def scenario(coordinator: Coordinator) -> None:
        await coordinator.register("lane", "attempt", "fp32")
        assert await wait(coordinator) == Orders(drop=("t0",)), "nobody knows the trial: its place is free"
        await coordinator.cancel("t0", 17)
        assert (await coordinator.next("t0", 17, 1, 0)).kind == "unknown"
        lease = await coordinator.submit("t0", CONFIG)
        await coordinator.next("t0", lease, 1, 0)
        assert await new_of(coordinator, "lane", []) == ["t0"]
        await coordinator.report("lane", "t0", rows(1))
        assert await wait(coordinator) == Orders(go_on=("t0",)), "the trial had asked for its second epoch before"

    drive(scenario)


def test_a_decision_that_never_comes_does_not_hold_the_place_for_ever(clock: SimpleNamespace) -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await at_a_rung(coordinator)
        clock.now += LEASE_SECONDS + 1
        assert await wait(coordinator, 0) == Orders(drop=("t0",))

    drive(scenario)


def test_members_of_a_pack_do_not_wait_for_each_other() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        leases = {trial: await coordinator.submit(trial, CONFIG) for trial in ("t0", "t1")}
        await coordinator.register("lane", "attempt", "fp32")
        await coordinator.poll("lane", [], 2, 0)
        for trial in leases:
            await coordinator.report("lane", trial, rows(1))
        await coordinator.next("t1", leases["t1"], 1, 0)
        orders = await coordinator.poll("lane", ["t0", "t1"], 2, LONG, ["t0", "t1"])
        assert orders == Orders(go_on=("t1",))

    drive(scenario)
