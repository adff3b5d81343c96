"""Retrieval in both directions, with ties counted against the query.

Shapes: N clips, M distinct captions, Q queries, G gallery entries, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.train.results import QueryResults, Retrieval


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
