"""How much of 8, 64 and 256 GPUs a search of 1,000 trials uses, and what the rest waits for; in virtual time.

The search's own code runs (`simulation.py`), learning curves and overheads are recorded (`recorded.py`). How long an
epoch takes on a large GPU is not known here, so it is given: each GPU count is simulated with short, usual and long
epochs. `--real N` runs N trials that train nothing through real Ray instead, and prints what the simulation takes from
such a run.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import run
from benchmarks.overheads import coordinator_rate, run_without_training
from benchmarks.peak import PeakSampler, show_peak
from benchmarks.recorded import RecordedSearch
from benchmarks.simulation import Outcome, Plan, simulate
from benchmarks.table import show
from tuner.lanes.fleet import connected
from tuner.study.objectives import TRAINABLE_PARAMETERS, objective_named
from tuner.study.pareto import hypervolume

QUALITY_AT = (100, 250, 500, 1000)  # trials finished


def shares(plan: Plan, outcome: Outcome) -> dict[str, float]:
    """Where the time of all GPUs went, from the start of the search to its front, as shares that add up to one.

    `nodes` is before a GPU was there, `lanes` loading the encoder on it, `tail` after its last epoch while others still
    trained, `front` while it is confirmed; `calls` is the wait for messages between processes at a change of trial,
    and `driver` all other waiting for a trial.
    """
    whole = plan.gpus * outcome.end
    worked = sum(lane.worked for lane in outcome.lanes)
    nodes = sum(lane.arrived for lane in outcome.lanes)
    loading = sum(lane.ready - lane.arrived for lane in outcome.lanes)
    tail = sum(outcome.trials_end - max(lane.last, lane.ready) for lane in outcome.lanes)
    front = plan.gpus * (outcome.end - outcome.trials_end)
    between = whole - worked - nodes - loading - tail - front
    calls = min(between, sum(lane.calls for lane in outcome.lanes))
    parts = {
        "work": worked,
        "nodes": nodes,
        "lanes": loading,
        "driver": between - calls,
        "calls": calls,
        "tail": tail,
        "front": front,
    }
    return {name: seconds / whole for name, seconds in parts.items()}


def front_volume(values: list[tuple[float, float]], record: RecordedSearch) -> float:
    """Hypervolume of a front over the projection alone, in points of recall (0.01) times decades of parameters."""
    baseline = next(trial.rows[-1]["recall@10"] for trial in record.trials if trial.config.lora is None)
    _, largest = record.space.parameter_range(record.parameters)
    # Not from the fixed corners, below which all fronts look alike.
    recall = objective_named("recall@10").model_copy(update={"corner": baseline})
    parameters = objective_named(TRAINABLE_PARAMETERS).model_copy(update={"corner": float(largest)})
    return 100 * hypervolume(values, (recall, parameters))


def show_shares(results: list[tuple[Plan, Outcome]]) -> None:
    """Print the table of times and shares."""
    rows = []
    for plan, outcome in results:
        parts = shares(plan, outcome)
        work = sum(lane.worked for lane in outcome.lanes)
        cells = [f"{100 * parts[name]:.1f}" for name in ("nodes", "lanes", "driver", "calls", "tail", "front")]
        lost = f"{100 * (1 - parts['work']):.1f}"
        times = (_time(outcome.end), _time(work / plan.gpus))
        rows.append((f"{plan.gpus} x {plan.epoch_seconds:g} s", *times, lost, *cells))
    columns = ("GPUs x epoch", "wall", "ideal", "lost %", "nodes", "lanes", "driver", "calls", "tail", "front")
    plan = results[0][0]
    nodes = f"nodes come after {plan.first_node:g} to {plan.last_node:g} s"
    show(f"{plan.trials:,} trials; {nodes}; share of GPU time lost, and to what, in %", columns, rows)


def show_driver(results: list[tuple[Plan, Outcome]]) -> None:
    """Print what the driver's one thread did."""
    rows = []
    for plan, outcome in results:
        parts = [outcome.driver.get(name, 0.0) for name in ("ask", "tell", "record", "tune")]
        cells = [f"{1000 * seconds / plan.trials:.0f}" for seconds in parts]
        busy = f"{100 * sum(parts) / outcome.trials_end:.1f}"
        slowest = f"{1000 * outcome.slowest_ask:.0f}"
        rows.append((f"{plan.gpus} x {plan.epoch_seconds:g} s", *cells, slowest, busy))
    columns = ("GPUs x epoch", "ask", "tell", "record", "Tune", "slowest ask", "busy %")
    show("the driver's thread: milliseconds a trial, and how busy it was until the last trial ended", columns, rows)


def show_quality(results: list[tuple[Plan, Outcome]], record: RecordedSearch) -> None:
    """Print how good the front was after so many trials: more side by side means fewer results to learn from."""
    rows = []
    for plan, outcome in results:
        marks = [mark for mark in QUALITY_AT if mark <= plan.trials]
        cells = [f"{front_volume(outcome.values[:mark], record):.3f}" for mark in marks]
        cells += [""] * (len(QUALITY_AT) - len(cells))
        rows.append((f"{plan.gpus} x {plan.epoch_seconds:g} s", *cells, str(outcome.confirmed)))
    columns = ("GPUs x epoch", *(f"{mark} trials" for mark in QUALITY_AT), "confirmed")
    show("hypervolume over the projection alone: points of recall@10 times decades of parameters", columns, rows)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_real(record: RecordedSearch, trials: int) -> None:
    """Run trials that train nothing through real Ray, and print what each costs."""
    temporary = tempfile.TemporaryDirectory(prefix="tuner-bench-")
    with temporary as folder, PeakSampler(os.getpid()) as sampler, connected(None, False):
        done = run_without_training(record, Path(folder) / "real", trials, record.epochs)
        rates = {side: coordinator_rate(record, side, 2 * side, record.epochs) for side in (8, 64, 256)}
    parts = [
        ("on the clock, each trial", done.wall / trials),
        ("the driver's thread, each trial", done.thread / trials),
        *((f"of it {name}", seconds / trials) for name, seconds in sorted(done.own.items())),
        ("of it Tune", done.tune / trials),
    ]
    title = f"{trials} trials of {done.epochs} epochs without training, one lane, start of Tune shared out"
    show(title, ("part", "milliseconds"), [(name, f"{1000 * seconds:.1f}") for name, seconds in parts])
    rows = [(f"{side} lanes and {side} trials", f"{rate:.0f}") for side, rate in rates.items()]
    show("what passes through the coordinator's actor", ("side by side", "epochs/s"), rows)
    show_peak("memory", sampler.peak)


def main(
    trials: int = 1000,
    gpus: str = "8,64,256",
    epoch_seconds: str = "10,60,600",
    first_node: float = 180.0,
    last_node: float = 360.0,
    seed: int = 0,
    cpu_clock: Annotated[
        bool, typer.Option("--cpu-clock", help="time the driver on its processor: for a machine that is shared")
    ] = False,
    real: Annotated[int | None, typer.Option(help="instead, run so many empty trials through real Ray")] = None,
) -> None:
    """Simulate searches on so many GPUs with epochs of so many seconds."""
    record = RecordedSearch.load()
    if real is not None:
        show_real(record, real)
        return
    clock = time.process_time if cpu_clock else time.perf_counter
    results = []
    for count in map(int, gpus.split(",")):
        for seconds in map(float, epoch_seconds.split(",")):
            plan = Plan(count, trials, seconds, first_node, last_node, seed=seed)
            typer.echo(f"simulating {count} GPUs with epochs of {seconds:g} s", err=True)
            with tempfile.TemporaryDirectory(prefix="tuner-bench-") as folder:
                results.append((plan, simulate(plan, record, Path(folder), clock)))
    typer.echo(f"recorded: `{record.made['command']}` of {record.made['created'][:10]}, {record.made['machine']}")
    show_shares(results)
    show_driver(results)
    show_quality(results, record)


if __name__ == "__main__":
    run(main)
