"""Estimated cost of a search before it runs: operations, hours, memory, disk. No torch here.

The configurations are the fixed ones, then the ones that the sampler draws without any results. In a search it draws
later ones depending on results, so the sum is an estimate; the cost of each trial follows the formula of
`tuner.lora.cost` exactly.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import optuna

from tuner.config import TrialConfig
from tuner.data.remote import open_store
from tuner.encoders.registry import inspect_encoder
from tuner.encoders.spec import EncoderSpec
from tuner.errors import SpaceError
from tuner.lora.cost import Lengths, first_adapted, frozen_flops, training_bytes, training_flops, validation_flops
from tuner.lora.placement import encoding_spec
from tuner.search.request import SearchRequest, check_fit, fixed_configurations
from tuner.search.searcher import StudySearcher

# `auto` is resolved only on a lane's machine: it counts as the larger format, so that memory and disk are upper bounds.
ELEMENT_BYTES = {"bf16": 2, "fp32": 4, "auto": 4}
# A matrix product whose operands are larger than the caches, as in training.
PROBE_SIZE = 2048
PROBE_SECONDS = 1.0
# Drawing takes a time that grows with the square of the number. Without results all draws are random, so the mean of
# these stands for the others.
MAX_DRAWN = 1_000


@dataclass(frozen=True)
class Estimate:
    """Costs of a whole search. Operations are floating-point operations; a multiply-add counts as two."""

    trials: int
    drawn: int  # of these, the trials whose configurations were drawn; the others cost their mean
    epochs: int
    training_clips: int
    training_flops: int
    validation_flops: int
    shared_flops: int  # stem and frozen blocks, once for each first adapted block
    confirmation_flops: int  # if every trial were on the front
    cheapest_trial_flops: int
    median_trial_flops: int
    dearest_trial_flops: int
    worker_bytes: int  # weights, adapters, activations of one worker, at most
    cache_bytes: int  # prefix states on disk, at most
    flops_per_second: float  # of one worker
    declared: bool  # whether the user gave it; else a matrix product was timed here
    lanes: int
    workers: int

    @property
    def total_flops(self) -> int:
        """Everything."""
        return self.training_flops + self.validation_flops + self.shared_flops + self.confirmation_flops

    @property
    def worker_hours(self) -> float:
        """Hours of one worker, which has one GPU if there are GPUs."""
        return self.total_flops / self.flops_per_second / 3600

    @property
    def hours(self) -> float:
        """Wall-clock hours if lanes and workers are never idle."""
        return self.worker_hours / (min(self.lanes, self.trials) * self.workers)


def estimate_search(request: SearchRequest, flops_per_second: float | None = None) -> Estimate:
    """Add up the trials of a search.

    Args:
        flops_per_second: speed of one worker in training; None: time a matrix product on this machine.

    Raises:
        StudyError, PlacementError, DataError, EncoderError: the request does not match the encoder or the data.
    """
    store = open_store(request.config.settings.store)
    spec = inspect_encoder(request.config.settings.encoder)
    check_fit(request, spec, store)
    configs = planned_configurations(request)
    trials, weights = _weights(request, configs)
    lengths = {name: Lengths.of(store.frames[store.split(name)].tolist()) for name in ("train", "validation", "test")}
    every, epochs, text_dim = Lengths.of(store.frames.tolist()), request.config.settings.epochs, store.text_dim
    training = [epochs * training_flops(spec, config, lengths["train"], text_dim) for config in configs]
    validation = [epochs * validation_flops(spec, config, lengths["validation"], text_dim) for config in configs]
    each = [sum(costs) for costs in zip(training, validation, strict=True)]
    measured = (lengths["validation"], lengths["test"])
    confirmation = [
        sum(validation_flops(spec, config, part, text_dim) + frozen_flops(spec, config.lora, part) for part in measured)
        for config in configs
    ]
    prefixes = _prefixes(spec, configs)
    element, settings, fleet = ELEMENT_BYTES[request.config.settings.precision], request.config.settings, request.fleet
    return Estimate(
        trials=trials,
        drawn=len(configs),
        epochs=epochs,
        training_clips=lengths["train"].clips,
        training_flops=_total(training, weights),
        validation_flops=_total(validation, weights),
        shared_flops=sum(frozen_flops(spec, config.lora, every) for config in prefixes.values()),
        confirmation_flops=_total(confirmation, weights),
        cheapest_trial_flops=min(each),
        median_trial_flops=int(statistics.median(each)),
        dearest_trial_flops=max(each),
        worker_bytes=max(
            training_bytes(spec, config, settings.tokens_per_forward, element, fleet.pack) for config in configs
        ),
        cache_bytes=_cached_bytes(spec, configs, every, element),
        flops_per_second=flops_per_second or measured_rate(),
        declared=flops_per_second is not None,
        lanes=fleet.lanes_on(fleet.max_gpus or fleet.workers, trials),
        workers=fleet.workers,
    )


def planned_configurations(request: SearchRequest) -> list[TrialConfig]:
    """The configurations that a new study would draw without any results, `MAX_DRAWN` at most."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config, fixed = request.config, fixed_configurations(request.config.space)
    study = optuna.create_study(directions=[objective.direction for objective in config.objectives])
    # The searcher adds costs to each suggestion; here nothing reads them.
    searcher = StudySearcher(
        study, config.space, config.objectives, lambda trial: {}, fixed, config.trials, {}, config.seed, "random"
    )
    suggested = (searcher.suggest(str(number)) for number in range(min(config.trials, MAX_DRAWN)))
    return [
        TrialConfig.model_validate(suggestion["config"]) for suggestion in suggested if isinstance(suggestion, dict)
    ]


def _weights(request: SearchRequest, configs: list[TrialConfig]) -> tuple[int, list[Fraction]]:
    """Number of trials, and how many of them each of these configurations stands for."""
    fixed, drawn = len(fixed_configurations(request.config.space)), len(configs)
    if drawn < MAX_DRAWN or drawn <= fixed:
        return drawn, [Fraction(1)] * drawn
    trials = request.config.trials
    with suppress(SpaceError):
        size = request.config.space.size()
        trials = trials if size is None else max(drawn, min(trials, fixed + size))
    return trials, [Fraction(1)] * fixed + [Fraction(trials - fixed, drawn - fixed)] * (drawn - fixed)


def _total(costs: list[int], weights: list[Fraction]) -> int:
    return int(sum(cost * weight for cost, weight in zip(costs, weights, strict=True)))


def measured_rate() -> float:
    """Operations per second of an fp32 matrix product in numpy on all cores, the fastest within a second."""
    random = np.random.default_rng(0)
    left, right = (random.standard_normal((PROBE_SIZE, PROBE_SIZE), dtype=np.float32) for _ in range(2))
    out = np.empty_like(left)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < PROBE_SECONDS:
        started = time.perf_counter()
        np.matmul(left, right, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * PROBE_SIZE**3 / best


def _prefixes(spec: EncoderSpec, configs: Iterable[TrialConfig]) -> dict[int, TrialConfig]:
    """One configuration for each set of frozen states, by the depth at which they enter the trained part.

    The tower's states are shared by trials that end at the tower and trials that also run the language model.
    """
    found: dict[int, TrialConfig] = {}
    for config in configs:
        whole = encoding_spec(spec, config.lora).num_layers
        found.setdefault(first_adapted(spec, config.lora) if config.lora else whole, config)
    return found


def _cached_bytes(spec: EncoderSpec, configs: Iterable[TrialConfig], every: Lengths, element: int) -> int:
    """Bytes of the cached states that enter the first adapted block; trials without LoRA share those of block 0."""
    depths = {first_adapted(spec, config.lora) if config.lora else 0 for config in configs}
    return sum(every.tokens(spec, depth)[0] * spec.width(depth) * element for depth in depths)
