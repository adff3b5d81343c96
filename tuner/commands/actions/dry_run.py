"""What `tuner search --dry-run` prints."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict

import typer

from tuner.search.estimate import Estimate, estimate_search
from tuner.search.request import SearchRequest
from tuner.study.wording import counted


def dry_run(request: SearchRequest, tflops: float | None, json: bool) -> None:
    """Print what this search would cost; nothing is trained and nothing is written."""
    estimate = estimate_search(request, tflops * 1e12 if tflops else None)
    if json:
        totals = {"total_flops": estimate.total_flops, "hours": estimate.hours, "worker_hours": estimate.worker_hours}
        typer.echo(jsonlib.dumps(asdict(estimate) | totals, indent=2))
        return
    for label, value in _lines(request, estimate):
        typer.echo(f"{label:<13} {value}")


def _lines(request: SearchRequest, estimate: Estimate) -> list[tuple[str, str]]:
    parts = (
        f"training {_si(estimate.training_flops)} + validation {_si(estimate.validation_flops)} "
        f"+ frozen blocks {_si(estimate.shared_flops)} + confirmation {_si(estimate.confirmation_flops)}"
    )
    each = (estimate.cheapest_trial_flops, estimate.median_trial_flops, estimate.dearest_trial_flops)
    source = "declared with --tflops" if estimate.declared else "an fp32 matrix product, timed here; or give --tflops"
    fleet = f"{counted(estimate.lanes, 'lane')} of {counted(estimate.workers, 'worker')}"
    rate = f"{_si(estimate.flops_per_second)}FLOP/s a worker ({source})"
    return [
        (
            "search",
            f"{estimate.trials} trials{_drawn(estimate)} of {estimate.epochs} epochs, "
            f"{estimate.training_clips:,} training clips, space {request.config.space.name}",
        ),
        ("operations", f"{_si(estimate.total_flops)}FLOP at most: {parts}"),
        ("one trial", "{} to {}FLOP, median {}".format(*(_si(value) for value in (each[0], each[2], each[1])))),
        ("time", f"{_hours(estimate.hours)} on {fleet}, {_hours(estimate.worker_hours)} of workers or GPUs in all"),
        ("at", rate),
        ("memory", f"{_si(estimate.worker_bytes)}B a worker at most, besides the program itself"),
        ("disk", f"{_si(estimate.cache_bytes)}B of frozen states at most, on each machine with a lane"),
        ("left out", "starting Ray and lanes, waiting for machines, the report"),
    ]


def _drawn(estimate: Estimate) -> str:
    return "" if estimate.drawn == estimate.trials else f" (costs of {estimate.drawn} drawn ones)"


def _si(value: float) -> str:
    """`4.53 T`: three figures and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5 or prefix == "E":
            return f"{value:.3g} {prefix}"
        value /= 1000
    raise AssertionError("the last prefix takes everything")


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"
