"""Learning curves for `benchmarks.search_quality`: recorded ones, or made ones whose truth is known.

Made curves stand for the demo's task: recall@10 over 520 recordings and 359 captions saturates in the number of
parameters, falls off a best learning rate, and rises over six epochs. Each query has a difficulty that all trials
share; what a trial adds to it, and what each epoch adds, are chance. So two trials of equal worth differ by about 0.01,
as two seeds of one configuration do in the demo.

Shapes: Q queries of one direction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tuner.config import TrialConfig
from tuner.search.request import fixed_configurations
from tuner.space import load_space
from tuner.space.draws import draw
from tuner.study.events import SAMPLED, EpochDone, read_event
from tuner.study.ranks import QueryRanks

METRIC = "recall@10"
SPACE = load_space("attention_only")
# Of made curves: queries of both directions, epochs, and the spread of luck beside a spread of difficulty of one.
QUERIES, EPOCHS, TRIAL_LUCK, EPOCH_LUCK = (520, 359), 6, 0.45, 0.25
Recorded = tuple[TrialConfig, str, float, list[EpochDone]]


@dataclass(frozen=True)
class Curve:
    """A recorded configuration: what the search sees of it, and what it is worth on the other half of the queries."""

    config: TrialConfig
    origin: str
    cost: float
    epochs: tuple[EpochDone, ...]
    worth: float


def load(path: Path) -> list[Recorded]:
    """Configurations of a table with their origins, costs and epochs."""
    found: dict[tuple[str, str], tuple[TrialConfig, str, float, list[EpochDone]]] = {}
    for row in pq.read_table(path).to_pylist():
        key = (row["study"], row["trial"])
        config = TrialConfig.model_validate_json(row["config"])
        found.setdefault(key, (config, row["origin"], float(row["trainable_parameters"]), []))
        event = read_event(json.loads(row["event"]))
        assert isinstance(event, EpochDone)
        found[key][3].append(event)
    return list(found.values())


def halve(recorded: Sequence[Recorded], seed: int) -> list[Curve]:
    """The same configurations with the queries of this seed's two halves."""
    random, halves = np.random.default_rng(seed), dict[tuple[int, int], tuple[NDArray[np.int64], ...]]()
    curves = []
    for config, origin, cost, epochs in recorded:
        seen = []
        for epoch in epochs:
            ranks = QueryRanks.from_text(epoch.ranks or "")
            assert ranks is not None, "the table has no ranks"
            size = (len(ranks.audio_to_text), len(ranks.text_to_audio))
            if size not in halves:
                halves[size] = tuple(random.permutation(count) for count in size)
            ours, theirs = (_part(ranks, halves[size], side) for side in (0, 1))
            seen.append(epoch.model_copy(update={"metrics": {METRIC: _recall(ours)}, "ranks": ours.to_text()}))
        curves.append(Curve(config, origin, cost, tuple(seen), _recall(theirs)))
    return curves


def _part(ranks: QueryRanks, orders: tuple[NDArray[np.int64], ...], side: int) -> QueryRanks:
    a, b = (order[side::2] for order in orders)
    return QueryRanks(ranks.audio_to_text[a], ranks.text_to_audio[b])


def _recall(ranks: QueryRanks) -> float:
    return float(np.mean([values.mean() for values in ranks.per_query(METRIC)]))


def make_curves(count: int, seed: int) -> list[Curve]:
    """The two fixed configurations and `count` random ones."""
    random = np.random.default_rng(seed)
    configs = [*fixed_configurations().items(), *((SAMPLED, SPACE.build(draw(SPACE, random))) for _ in range(count))]
    difficulty = [random.normal(0, 1, queries) for queries in QUERIES]
    return [_made(origin, config, difficulty, random) for origin, config in configs]


def _made(
    origin: str, config: TrialConfig, difficulty: Sequence[NDArray[np.float64]], random: np.random.Generator
) -> Curve:
    worth, spread = _worth(config), math.sqrt(1 + TRIAL_LUCK**2 + EPOCH_LUCK**2)
    rise = (0.11 if config.lora else 0.08) + random.normal(0, 0.008)
    own = [each + random.normal(0, TRIAL_LUCK, len(each)) for each in difficulty]
    epochs = []
    for epoch in range(1, EPOCHS + 1):
        recall = worth if epoch == EPOCHS else worth - rise * math.exp(-(epoch - 1) / 1.5)
        limit = NormalDist().inv_cdf(recall) * spread
        found = [np.where(each + random.normal(0, EPOCH_LUCK, len(each)) < limit, 1, 99) for each in own]
        ranks = QueryRanks.of(*found)
        metrics: dict[str, float | None] = {METRIC: float(np.mean([(each == 1).mean() for each in found]))}
        epochs.append(EpochDone(trial="t0000", epoch=epoch, metrics=metrics, train_seconds=1.0, ranks=ranks.to_text()))
    return Curve(config, origin, _cost(config), tuple(epochs), worth)


def _worth(config: TrialConfig) -> float:
    lora = config.lora
    worth = 0.43 - 0.01 * math.log(config.optim.head_lr / 8e-3) ** 2
    if lora is None:
        return worth
    step = lora.alpha_ratio / 2 * config.optim.lora_lr / 2e-3
    capacity = 0.045 * (1 - math.exp(-lora.rank * len(lora.targets) / 50))
    return worth + capacity - 0.015 * math.log(step) ** 2 - (0.02 if step > 3 else 0.0)


def _cost(config: TrialConfig) -> float:
    lora = config.lora
    return 147_841.0 + (3072 * lora.rank * len(lora.targets) if lora else 0)
