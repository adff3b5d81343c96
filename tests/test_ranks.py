"""Ranks of validation queries on their way through an event, and the paired error that they give."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tuner.study.events import EpochDone, parse_line, read_event
from tuner.study.ranks import MAX_QUERIES, QueryRanks, paired_error
from tuner.train.results import QueryResults, Retrieval


def retrieval(seed: int, queries: int = 300, texts: int = 200) -> Retrieval:
    random = np.random.default_rng(seed)
    sides = [
        QueryResults(ranks, np.where(ranks <= 10, 1.0 / ranks, 0.0))
        for ranks in (random.integers(1, 400, count) for count in (queries, texts))
    ]
    return Retrieval(*sides)


def test_an_event_carries_what_the_metrics_come_from() -> None:
    measured = retrieval(0)
    event = EpochDone.from_row("t0000", {"epoch": 1, "ranks": measured.ranks().to_text(), **measured.metrics()})
    read = read_event(parse_line(event.to_json()) or {})
    assert isinstance(read, EpochDone) and read.ranks
    ranks = QueryRanks.from_text(read.ranks)
    assert ranks is not None
    for metric in ("recall@1", "recall@10", "audio_to_text_R@5", "text_to_audio_R@10", "text_to_audio_mAP@10"):
        means = [values.mean() for values in ranks.per_query(metric)]
        assert np.mean(means) == pytest.approx(read.metric(metric), abs=1e-12), metric
    assert len(read.ranks) < 500, "less than a byte for each query"


def test_the_error_of_a_difference_is_that_of_the_pairs() -> None:
    """Against the standard error by hand, of one direction; a trial has no error against itself."""
    ours, theirs = (retrieval(seed).ranks() for seed in (1, 2))
    differences = (ours.audio_to_text <= 10).astype(float) - (theirs.audio_to_text <= 10)
    by_hand = math.sqrt(sum((d - differences.mean()) ** 2 for d in differences) / 299 / 300)
    assert paired_error(ours, theirs, "audio_to_text_R@10") == pytest.approx(by_hand)
    sides = [paired_error(ours, theirs, f"{way}_R@10") for way in ("audio_to_text", "text_to_audio")]
    assert paired_error(ours, theirs, "recall@10") == pytest.approx(math.hypot(*(side or 0 for side in sides)) / 2)
    assert paired_error(ours, ours, "recall@10") == 0.0
    assert paired_error(ours, retrieval(1, queries=299).ranks(), "recall@10") is None


def test_a_large_gallery_is_thinned_out_evenly() -> None:
    ranks = QueryRanks.of(np.arange(1, 100_001) % 20 + 1, np.ones(10, np.int64))
    assert len(ranks.audio_to_text) == MAX_QUERIES
    assert (ranks.audio_to_text <= 10).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("text", ["", "a.b", "eJwD.eJwD", "no", "....", "eJxjBAAAAgAC", "é.é"])
def test_damaged_ranks_are_no_ranks(text: str) -> None:
    assert QueryRanks.from_text(text) is None


def test_a_metric_that_does_not_follow_from_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="loss"):
        retrieval(0).ranks().per_query("loss")
