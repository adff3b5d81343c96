"""Who is to blame when a lane's worker dies, and what the coordinator makes of it. No Ray, no processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tuner.config import TrialConfig
from tuner.lanes.coordinator import Coordinator
from tuner.lanes.deaths import DEATHS_PER_TRIAL, STARTS_PER_LANE, TRIALS_PER_LANE, Deaths
from tuner.lanes.lane_registry import LaneRegistry
from tuner.lanes.messages import Orders, Row, Update

CONFIG = TrialConfig()
LONG = 600.0


def rows(epochs: int) -> list[Row]:
    return [{"epoch": epoch} for epoch in range(1, epochs + 1)]


def drive(scenario: Callable[[Lane], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(scenario(Lane(Coordinator())), 30)

    asyncio.run(run())


class Lane:
    """A lane played by the test: it starts, asks for orders, and dies when it starts again without having left."""

    def __init__(self, coordinator: Coordinator, name: str = "lane", node: str = "here") -> None:
        self.coordinator, self.name, self.node = coordinator, name, node
        self.attempt = 0

    async def start(self, *alive: str, node: str | None = None) -> None:
        """Start (again) on a node, with these nodes in the cluster besides."""
        self.attempt += 1
        self.node = node or self.node
        await self.coordinator.register(self.name, str(self.attempt), "fp32", [self.node], [self.node, *alive])

    async def ask(self, *held: str, capacity: int = 1) -> Orders:
        return await self.coordinator.poll(self.name, list(held), capacity, 0)

    async def state(self, trial: str, lease: int) -> Update:
        return await self.coordinator.next(trial, lease, 99, 0)


def test_a_trial_that_kills_its_worker_again_and_again_ends_with_a_reason() -> None:
    async def scenario(lane: Lane) -> None:
        lease = await lane.coordinator.submit("t0", CONFIG)
        await lane.start()
        for _ in range(DEATHS_PER_TRIAL):
            assert (await lane.state("t0", lease)).kind == "wait"
            assert [trial for trial, _ in (await lane.ask()).new] == ["t0"]
            await lane.start()
        assert f"died {DEATHS_PER_TRIAL} times" in str((await lane.state("t0", lease)).reason)
        assert await lane.ask() == Orders()

    drive(scenario)


def test_the_reason_is_what_the_worker_said_last() -> None:
    async def scenario(lane: Lane) -> None:
        lease = await lane.coordinator.submit("t0", CONFIG)
        await lane.start()
        for _ in range(DEATHS_PER_TRIAL):
            await lane.ask()
            await lane.coordinator.last_words("lane", "AcceleratorError: device-side assert")
            await lane.start()
        assert "(AcceleratorError: device-side assert)" in str((await lane.state("t0", lease)).reason)

    drive(scenario)


def test_a_node_that_goes_away_is_nobodys_fault() -> None:
    """Ten spot machines in a row end neither trial nor search."""

    async def scenario(lane: Lane) -> None:
        lease = await lane.coordinator.submit("t0", CONFIG)
        await lane.start(node="node 0")
        for number in range(1, 11):
            orders = await lane.ask()
            assert ([trial for trial, _ in orders.new], orders.alone) == (["t0"], None)
            await lane.start(node=f"node {number}")
        assert (await lane.state("t0", lease)).kind == "wait"

    drive(scenario)


def test_an_idle_lane_survives_the_loss_of_nodes_too() -> None:
    async def scenario(lane: Lane) -> None:
        for number in range(2 * STARTS_PER_LANE):
            await lane.start(node=f"node {number}")
        assert await lane.ask() == Orders()

    drive(scenario)


def test_a_nodes_end_may_be_noticed_late() -> None:
    """The lane was back before the cluster had noticed: the death counts until then, and no longer."""

    async def scenario(lane: Lane) -> None:
        await lane.coordinator.submit("t0", CONFIG)
        await lane.start(node="dying")
        await lane.ask()
        await lane.start("dying", node="other")
        assert (await lane.ask()).alone == "t0"
        await lane.coordinator.leave("lane")
        await lane.start(node="other")
        assert (await lane.ask()).alone is None

    drive(scenario)


def test_a_lane_that_leaves_in_order_hands_its_trials_back_at_once() -> None:
    async def scenario(lane: Lane) -> None:
        await lane.coordinator.submit("t0", CONFIG)
        other = Lane(lane.coordinator, "other", "there")
        await lane.start("there")
        await other.start("here")
        for _ in range(2 * DEATHS_PER_TRIAL):
            for leaving, taking in ((lane, other), (other, lane)):
                assert (await leaving.ask()).new == (("t0", CONFIG),)
                await leaving.coordinator.leave(leaving.name)
                await leaving.start("here", "there")
                orders = await taking.ask()
                assert (orders.new, orders.alone) == ((("t0", CONFIG),), None)
                await taking.coordinator.leave(taking.name)
                await taking.start("here", "there")

    drive(scenario)


def test_one_adapter_that_kills_does_not_end_the_others_of_its_pack() -> None:
    """After a death each is trained alone: an innocent one clears itself with an epoch, the guilty one dies alone."""

    async def scenario(lane: Lane) -> None:
        trials = ("good", "bad", "fair")
        leases = {trial: await lane.coordinator.submit(trial, CONFIG) for trial in trials}
        await lane.start()
        held: list[str] = []
        for _ in range(20):
            orders = await lane.ask(*held, capacity=3)
            held = [trial for trial in (*held, *(trial for trial, _ in orders.new)) if trial not in orders.drop]
            together = [orders.alone] if orders.alone else held
            if "bad" in together:
                held = []
                await lane.start()
                continue
            for trial in together:
                await lane.coordinator.report("lane", trial, rows(1 + len(await seen(lane, trial, leases[trial]))))
        ends = {trial: (await lane.state(trial, lease)).kind for trial, lease in leases.items()}
        assert ends == {"good": "wait", "bad": "failed", "fair": "wait"}
        assert len(await seen(lane, "fair", leases["fair"])) > 5

    drive(scenario)


async def seen(lane: Lane, trial: str, lease: int) -> list[Row]:
    """Epochs that a trial has been told."""
    told: list[Row] = []
    while (update := await lane.coordinator.next(trial, lease, len(told), 0)).row is not None:
        told.append(update.row)
    return told


def test_out_of_memory_trials_one_after_another_do_not_end_a_search_that_goes_on_elsewhere() -> None:
    async def scenario(lane: Lane) -> None:
        other = Lane(lane.coordinator, "other")
        await lane.start()
        await other.start()
        for number in range(TRIALS_PER_LANE):
            lease = await lane.coordinator.submit(f"t{number}", CONFIG)
            for _ in range(DEATHS_PER_TRIAL):
                await lane.ask()
                await lane.start()
            assert (await lane.state(f"t{number}", lease)).kind == "failed"
        assert (await lane.ask()).stop, "this lane is given up"
        lease = await lane.coordinator.submit("next", CONFIG)
        assert (await other.ask()).new == (("next", CONFIG),)
        assert "3 trials in a row killed their worker" in " ".join((await lane.coordinator.muster()).notes)

    drive(scenario)


def test_the_last_lane_that_is_given_up_ends_the_search() -> None:
    async def scenario(lane: Lane) -> None:
        lease = await lane.coordinator.submit("t0", CONFIG)
        await lane.start()
        for _ in range(STARTS_PER_LANE):
            assert (await lane.state("t0", lease)).kind == "wait"
            await lane.start()
        update = await lane.state("t0", lease)
        assert update.kind == "fatal"
        assert f"lane lane died {STARTS_PER_LANE} times in a row" in str(update.reason)

    drive(scenario)


def test_an_epoch_between_them_makes_deaths_harmless() -> None:
    async def scenario(lane: Lane) -> None:
        lease = await lane.coordinator.submit("t0", CONFIG)
        await lane.start()
        for epoch in range(1, 2 * DEATHS_PER_TRIAL):
            await lane.ask()
            await lane.coordinator.report("lane", "t0", rows(epoch))
            await lane.start()
        assert (await lane.state("t0", lease)).kind == "wait"

    drive(scenario)


def test_a_coordinator_that_was_started_again_learns_of_its_lanes_before_it_gives_orders() -> None:
    """And with them the number format: a lane that starts again must not bring another one into the study."""

    async def scenario(lane: Lane) -> None:
        lease = await lane.coordinator.submit("t0", CONFIG)
        assert await lane.ask("t0") == Orders(register=True)
        assert await lane.coordinator.register("lane", "attempt", "bf16") == "bf16"
        assert await lane.coordinator.register("new", "attempt", "fp32") == "bf16"
        assert await lane.ask("t0") == Orders(new=(("t0", CONFIG),), drop=("t0",))
        again = Coordinator()
        assert (await again.next("t0", lease, 0, LONG)).kind == "unknown"
        assert await again.submit("t0", CONFIG) != lease, "the first lease of each is not the same"

    drive(scenario)


# The rules by themselves


def test_only_another_attempt_means_that_workers_have_died() -> None:
    """A coordinator that was started again, or a lane that registers again, counts no death twice."""
    registry = LaneRegistry()
    assert registry.register("lane", "2", ["here"], ["here"], ["t0"]) is None, "it was there before the coordinator"
    assert registry.register("lane", "2", ["here"], ["here"], ["t0"]) is None
    assert registry.deaths.suspect(["t0"]) is None
    assert registry.register("lane", "3", ["here"], ["here"], ["t0"]) is not None
    assert registry.deaths.suspect(["t0"]) == "t0"
    registry.leave("lane")
    assert registry.register("lane", "4", ["here"], ["here"], ["t0"]) is None


def test_a_death_is_blamed_only_if_all_its_nodes_are_still_there() -> None:
    """A lane over two nodes dies with either of them."""
    deaths = Deaths()
    deaths.see_nodes(["a"])
    for _ in range(DEATHS_PER_TRIAL):
        assert deaths.died("lane", frozenset("ab"), ["t0"], None, None).trials == {}
    assert deaths.suspect(["t0"]) is None
    deaths.see_nodes(["a", "b"])
    assert deaths.suspect(["t0"]) == "t0"


def test_a_lane_that_finishes_something_is_cleared_of_its_own_deaths() -> None:
    deaths = Deaths()
    for _ in range(2 * STARTS_PER_LANE):
        assert deaths.died("lane", frozenset("a"), [], None, None).lane is None
        deaths.forget_lane("lane")


def test_a_lane_that_finishes_something_is_cleared_of_the_trials_that_died_on_it() -> None:
    deaths = Deaths()
    for number in range(2 * TRIALS_PER_LANE):
        for _ in range(DEATHS_PER_TRIAL):
            verdict = deaths.died("lane", frozenset("a"), [f"t{number}"], None, None)
        assert list(verdict.trials) == [f"t{number}"]
        assert verdict.lane is None
        deaths.forget_lane("lane")


def test_a_trial_that_finishes_an_epoch_is_suspected_no_longer() -> None:
    deaths = Deaths()
    for _ in range(2 * DEATHS_PER_TRIAL):
        assert deaths.died("lane", frozenset("a"), ["t0"], None, None).trials == {}
        assert deaths.suspect(["t1", "t0"]) == "t0"
        deaths.forget_trial("t0")
        assert deaths.suspect(["t0"]) is None
