"""Results of a gallery's queries: metrics in both directions and bootstrap intervals. Numpy only, because a search's
driver compares trials with it and does not load torch.

Shapes: Q queries, R resamples, K metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.config import TrialConfig
from tuner.study.objectives import WAYS
from tuner.study.points import Difference, Point
from tuner.study.ranks import QueryRanks

DEPTHS = (1, 5, 10)
BOOTSTRAP_RESAMPLES = 2000
LEVEL = 0.95

Metrics = dict[str, float]
Draws = dict[str, NDArray[np.float64]]  # of each mean metric, its value in every resample [R]


@dataclass(frozen=True)
class QueryResults:
    """Result of each query of one direction: rank of its best positive (1 = first) and average precision at 10."""

    rank_Q: NDArray[np.int64]
    ap10_Q: NDArray[np.float64]

    def per_query(self) -> dict[str, NDArray[np.float64]]:
        """The quantities whose mean is a metric."""
        hits = {f"R@{depth}": (self.rank_Q <= depth).astype(np.float64) for depth in DEPTHS}
        return {**hits, "mAP@10": self.ap10_Q}


@dataclass(frozen=True)
class Retrieval:
    """Both directions over one gallery."""

    audio_to_text: QueryResults
    text_to_audio: QueryResults

    def direction(self, name: str) -> QueryResults:
        """The results of `audio_to_text` or `text_to_audio`."""
        return self.audio_to_text if name == "audio_to_text" else self.text_to_audio

    def ranks(self) -> QueryRanks:
        """What an event keeps of each query."""
        return QueryRanks.of(self.audio_to_text.rank_Q, self.text_to_audio.rank_Q)

    def metrics(self) -> Metrics:
        """Flat metrics: `recall@k` (mean of both directions), `<direction>_R@k`, `_mAP@10`, `_median_rank`, `_N`."""
        flat: Metrics = {}
        for name in WAYS:
            results = self.direction(name)
            flat |= {f"{name}_{key}": float(values.mean()) for key, values in results.per_query().items()}
            flat[f"{name}_median_rank"] = float(np.median(results.rank_Q))
            flat[f"{name}_N"] = len(results.rank_Q)
        recall = {f"recall@{k}": (flat[f"audio_to_text_R@{k}"] + flat[f"text_to_audio_R@{k}"]) / 2 for k in DEPTHS}
        return recall | flat


@dataclass(frozen=True)
class Candidate:
    """A trial that may be on the front, as it travels from the driver to the lane that measures it."""

    trial: str
    origin: str
    config: TrialConfig


@dataclass(frozen=True)
class Measured:
    """A trial on the test gallery, as the lane that measured it sends it to the driver.

    Attributes:
        point: its entry of front.json, without the comparison with another trial.
        metrics: of the test gallery.
        draws: of the same metrics, by `resample`.
    """

    point: Point
    metrics: Metrics
    draws: Draws

    def minus(self, baseline: Measured) -> dict[str, Difference]:
        """Paired differences over the same queries, with intervals; both were resampled in the same way."""
        return {
            key: Difference(difference=self.metrics[key] - baseline.metrics[key], interval=interval)
            for key, interval in intervals(subtract(self.draws, baseline.draws)).items()
        }


def bootstrap(retrieval: Retrieval, baseline: Retrieval | None = None) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every mean metric; with a `baseline` over the same queries, of the paired difference.

    Raises:
        ValueError: the baseline has other queries.
    """
    draws = resample(retrieval)
    return intervals(draws if baseline is None else subtract(draws, _same_queries(retrieval, baseline)))


def _same_queries(retrieval: Retrieval, baseline: Retrieval) -> Draws:
    for name in WAYS:
        ours, theirs = (len(each.direction(name).rank_Q) for each in (retrieval, baseline))
        if ours != theirs:
            raise ValueError(f"{name}: {ours} queries cannot be paired with {theirs}")
    return resample(baseline)


def resample(retrieval: Retrieval, seed: int = 0) -> Draws:
    """Every mean metric over resampled queries (Efron 1979), which are the same for equal Q and seed.

    The queries of the two directions are resampled separately; `recall@k` averages the two resampled means.
    """
    generator = np.random.default_rng(seed)
    draws: Draws = {}
    for name in WAYS:
        values = retrieval.direction(name).per_query()
        draws |= {f"{name}_{key}": draw for key, draw in _resampled_means(values, generator).items()}
    for depth in DEPTHS:
        draws[f"recall@{depth}"] = np.mean([draws[f"{name}_R@{depth}"] for name in WAYS], axis=0)
    return draws


def subtract(draws: Draws, baseline: Draws) -> Draws:
    """Draws of the difference between two trials that resampled the same queries (means are linear)."""
    return {key: draw - baseline[key] for key, draw in draws.items()}


def intervals(draws: Draws, level: float = LEVEL) -> dict[str, tuple[float, float]]:
    """Percentile intervals of draws."""
    tail = (1 - level) / 2
    quantiles = {key: np.quantile(draw, [tail, 1 - tail]) for key, draw in draws.items()}
    return {key: (float(low), float(high)) for key, (low, high) in quantiles.items()}


def _resampled_means(
    values: Mapping[str, NDArray[np.float64]], generator: np.random.Generator, rows: int = 100
) -> Draws:
    stacked_QK = np.stack(list(values.values()), axis=1)
    queries = len(stacked_QK)
    means = []
    for _ in range(0, BOOTSTRAP_RESAMPLES, rows):
        picks_RQ = generator.integers(0, queries, size=(rows, queries))
        means.append(stacked_QK[picks_RQ].mean(axis=1))
    return dict(zip(values, np.concatenate(means).T, strict=True))
