"""Retrieval metrics in both directions, with ties counted against the query, and bootstrap intervals.

Shapes: N clips, M distinct captions, Q queries, G gallery entries, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEPTHS = (1, 5, 10)
DIRECTIONS = ("audio_to_text", "text_to_audio")
BOOTSTRAP_RESAMPLES = 2000

Metrics = dict[str, float]


@dataclass(frozen=True)
class QueryResults:
    """What each query of one direction found: rank of its best positive (1 = first) and average precision at 10."""

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

    def metrics(self) -> Metrics:
        """Flat metrics: `recall@k` (mean of both directions), `<direction>_R@k`, `_mAP@10`, `_median_rank`, `_N`."""
        flat: Metrics = {}
        for name in DIRECTIONS:
            results = self.direction(name)
            flat |= {f"{name}_{key}": float(values.mean()) for key, values in results.per_query().items()}
            flat[f"{name}_median_rank"] = float(np.median(results.rank_Q))
            flat[f"{name}_N"] = len(results.rank_Q)
        recall = {f"recall@{k}": (flat[f"audio_to_text_R@{k}"] + flat[f"text_to_audio_R@{k}"]) / 2 for k in DEPTHS}
        return recall | flat


def retrieve(
    audio_ND: Tensor, text_MD: Tensor, captions_of: Sequence[NDArray[np.int64]], chunk: int = 1024
) -> Retrieval:
    """Rank every caption for every clip and every clip for every caption by fp32 cosine similarity.

    Args:
        audio_ND: L2-normalised clip embeddings.
        text_MD: L2-normalised embeddings of the distinct captions; a caption shared by several clips is one entry.
        captions_of: for each clip, the indices of its captions in `text_MD`; the best of them counts.
        chunk: queries ranked at a time; bounds memory at chunk x gallery.
    """
    positive_NM = torch.zeros(len(audio_ND), len(text_MD), dtype=torch.bool)
    for clip, captions in enumerate(captions_of):
        positive_NM[clip, torch.from_numpy(captions)] = True
    audio_ND, text_MD = audio_ND.float(), text_MD.float()
    return Retrieval(
        audio_to_text=_rank(audio_ND, text_MD, positive_NM, chunk),
        text_to_audio=_rank(text_MD, audio_ND, positive_NM.T, chunk),
    )


def _rank(query_QD: Tensor, gallery_GD: Tensor, positive_QG: Tensor, chunk: int) -> QueryResults:
    ranks, precisions = [], []
    for start in range(0, len(query_QD), chunk):
        positive_qG = positive_QG[start : start + chunk].to(query_QD.device)
        hits_qG = sort_hits(query_QD[start : start + chunk] @ gallery_GD.T, positive_qG)
        ranks.append(hits_qG.int().argmax(dim=1) + 1)
        precisions.append(average_precision(hits_qG, depth=10))
    return QueryResults(torch.cat(ranks).cpu().numpy(), torch.cat(precisions).double().cpu().numpy())


def sort_hits(score_QG: Tensor, positive_QG: Tensor) -> Tensor:
    """Positives in the order of falling score, a negative before a positive of equal score: ties never flatter."""
    order_QG = positive_QG.int().argsort(dim=1, stable=True)
    by_score_QG = score_QG.gather(1, order_QG).argsort(dim=1, descending=True, stable=True)
    return positive_QG.gather(1, order_QG.gather(1, by_score_QG))


def average_precision(hits_QG: Tensor, depth: int) -> Tensor:
    """Average precision at `depth`, normalised by min(depth, number of positives)."""
    total_Q = hits_QG.sum(dim=1).clamp(max=depth)
    top_QK = hits_QG[:, :depth].double()
    precision_QK = top_QK.cumsum(dim=1) / torch.arange(1, top_QK.shape[1] + 1, device=top_QK.device)
    return (precision_QK * top_QK).sum(dim=1) / total_Q


def bootstrap(
    retrieval: Retrieval, baseline: Retrieval | None = None, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every mean metric, by resampling queries (Efron 1979).

    With a `baseline` over the same queries, intervals of the paired difference retrieval - baseline. The queries of
    the two directions are resampled apart; `recall@k` averages the two resampled means.
    """
    generator = np.random.default_rng(seed)
    draws: dict[str, NDArray[np.float64]] = {}
    for name in DIRECTIONS:
        values = retrieval.direction(name).per_query()
        if baseline is not None:
            other = baseline.direction(name).per_query()
            values = {key: value - other[key] for key, value in values.items()}
        draws |= {f"{name}_{key}": draw for key, draw in _resampled_means(values, generator).items()}
    for depth in DEPTHS:
        draws[f"recall@{depth}"] = np.mean([draws[f"{name}_R@{depth}"] for name in DIRECTIONS], axis=0)
    tail = (1 - level) / 2
    quantiles = {key: np.quantile(draw, [tail, 1 - tail]) for key, draw in draws.items()}
    return {key: (float(low), float(high)) for key, (low, high) in quantiles.items()}


def _resampled_means(
    values: Mapping[str, NDArray[np.float64]], generator: np.random.Generator, rows: int = 100
) -> dict[str, NDArray[np.float64]]:
    stacked_QK = np.stack(list(values.values()), axis=1)
    queries = len(stacked_QK)
    means = []
    for _ in range(0, BOOTSTRAP_RESAMPLES, rows):
        picks_RQ = generator.integers(0, queries, size=(rows, queries))
        means.append(stacked_QK[picks_RQ].mean(axis=1))
    return dict(zip(values, np.concatenate(means).T, strict=True))
