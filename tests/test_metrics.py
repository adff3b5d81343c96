"""Retrieval metrics against a naive oracle; ties, several captions, bootstrap."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tuner.config import TrialConfig
from tuner.data.store import Store
from tuner.study.objectives import WAYS
from tuner.study.points import Point, Scores
from tuner.train.pack import retrieve_split
from tuner.train.results import BOOTSTRAP_RESAMPLES, Measured, QueryResults, Retrieval, bootstrap, resample
from tuner.train.retrieval import average_precision, retrieve

POINT = Point(
    trial="t0000",
    origin="sampled",
    config=TrialConfig(),
    lora_parameters=0,
    trainable_parameters=1,
    validation=Scores(),
    on_front=False,
)


def naive(score: np.ndarray, positive: np.ndarray) -> tuple[list[int], list[float]]:
    """Rank of the best positive and AP@10, one query at a time: a negative of equal score goes first."""
    ranks, precisions = [], []
    for row, wanted in zip(score, positive, strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], wanted[item]))
        hits = [bool(wanted[item]) for item in order]
        ranks.append(hits.index(True) + 1)
        found, total = 0, 0.0
        for place, hit in enumerate(hits[:10], start=1):
            if hit:
                found += 1
                total += found / place
        precisions.append(total / min(10, sum(hits)))
    return ranks, precisions


def problem(seed: int, clips: int = 40, captions: int = 25) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    text = F.normalize(torch.randn(captions, 6), dim=-1)
    owned = [random.choice(captions, size=random.integers(1, 4), replace=False) for _ in range(clips)]
    # Every caption needs an owner, as in a gallery made of a split's own captions.
    owned += [np.array([caption]) for caption in range(captions)]
    audio = torch.stack([F.normalize(text[item[0]] + 0.8 * torch.randn(6), dim=-1) for item in owned])
    return audio, text, owned


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [7, 1000])
def test_both_directions_equal_the_naive_oracle(seed: int, chunk: int) -> None:
    audio, text, owned = problem(seed)
    if seed == 3:
        audio = audio.sign()  # many exact ties
        text = text.sign()
    positive = np.zeros((len(audio), len(text)), dtype=bool)
    for clip, captions in enumerate(owned):
        positive[clip, captions] = True
    result = retrieve(audio, text, owned, chunk=chunk)
    score = (audio @ text.T).numpy()
    for results, scores, wanted in (
        (result.audio_to_text, score, positive),
        (result.text_to_audio, score.T, positive.T),
    ):
        ranks, precisions = naive(scores, wanted)
        assert results.rank_Q.tolist() == ranks
        np.testing.assert_allclose(results.ap10_Q, precisions, rtol=1e-14)


def test_metrics_of_known_ranks() -> None:
    audio = torch.eye(4)
    text = torch.eye(4)[[0, 1, 3, 2]]
    metrics = retrieve(audio, text, [np.array([item]) for item in range(4)]).metrics()
    assert metrics["audio_to_text_R@1"] == 0.5
    assert metrics["recall@1"] == 0.5
    assert metrics["recall@5"] == 1.0
    # Clip 2 scores 0 with its own caption, as with two others that do not match: all of those go first.
    assert metrics["audio_to_text_median_rank"] == 2.5
    assert metrics["audio_to_text_N"] == 4


def test_average_precision_is_normalised_by_what_fits_and_computed_in_fp64() -> None:
    """Of 12 positives 10 can be among the first 10, so the best order has 1.0. In fp32 thirds differ in digit 8."""
    best, other = [True] * 12 + [False] * 3, [False, True, True] + [False] * 12
    assert average_precision(torch.tensor([best, other]), depth=10).tolist() == [1.0, (1 / 2 + 2 / 3) / 2]


def test_the_median_rank_is_no_mean() -> None:
    results = QueryResults(np.array([1, 2, 30]), np.zeros(3))
    assert Retrieval(results, results).metrics()["audio_to_text_median_rank"] == 2


def test_the_gallery_of_a_split_is_its_own_captions() -> None:
    """Clip 0 is nearest to a caption that only clip 2 has, which belongs to another split."""
    captions = [[0], [1], [2]]
    store = SimpleNamespace(clip_captions=lambda clip: np.array(captions[clip]), text_embeddings=np.eye(3, dtype="f4"))
    audio = torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]])
    result = retrieve_split(cast(Store, store), np.array([0, 1]), audio)
    assert result.audio_to_text.rank_Q.tolist() == [1, 1]
    assert result.metrics()["text_to_audio_N"] == 2


def test_a_collapsed_encoder_gets_nothing() -> None:
    """Equal embeddings tie with everything, and a tie counts against the query."""
    metrics = retrieve(torch.ones(30, 3), torch.ones(30, 3), [np.array([item]) for item in range(30)]).metrics()
    assert metrics["recall@10"] == 0.0
    assert metrics["audio_to_text_median_rank"] == 30


def test_interval_holds_the_mean_and_shrinks_with_more_queries() -> None:
    small, large = (retrieve(*problem(1, clips=clips)) for clips in (20, 2000))
    for result in (small, large):
        low, high = bootstrap(result)["recall@1"]
        assert low <= result.metrics()["recall@1"] <= high
    width = [np.diff(bootstrap(result)["audio_to_text_R@1"])[0] for result in (small, large)]
    assert width[1] < 0.5 * width[0]


def test_the_interval_is_the_normal_one_for_many_queries() -> None:
    result = retrieve(*problem(2, clips=2000))
    mean, queries = result.metrics()["audio_to_text_R@1"], len(result.audio_to_text.rank_Q)
    spread = 1.96 * np.sqrt(mean * (1 - mean) / queries)
    low, high = bootstrap(result)["audio_to_text_R@1"]
    assert low == pytest.approx(mean - spread, abs=0.15 * spread)
    assert high == pytest.approx(mean + spread, abs=0.15 * spread)


def test_a_paired_difference_with_itself_is_zero() -> None:
    result = retrieve(*problem(1))
    assert bootstrap(result, result)["recall@10"] == (0.0, 0.0)


def pair() -> tuple[Retrieval, Retrieval]:
    """Two encoders over the same clips and captions."""
    audio, text, owned = problem(1)
    worse = F.normalize(audio + 0.5 * torch.randn_like(audio), dim=-1)
    return retrieve(audio, text, owned), retrieve(worse, text, owned)


def test_the_paired_interval_is_that_of_resampled_differences() -> None:
    """Lanes resample apart what the driver subtracts; the slow way takes differences of each query first (1e-12)."""
    better, worse = pair()
    result = bootstrap(better, worse)
    generator = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {}
    for name in WAYS:
        ours, theirs = (each.direction(name).per_query() for each in (better, worse))
        difference_Q = {key: ours[key] - theirs[key] for key in ours}
        queries = len(next(iter(difference_Q.values())))
        for picks in generator.integers(0, queries, size=(BOOTSTRAP_RESAMPLES, queries)):
            for key, values in difference_Q.items():
                drawn.setdefault(f"{name}_{key}", []).append(values[picks].mean())
    for key, draws in drawn.items():
        assert result[key] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-12)
    both = np.add(drawn["audio_to_text_R@10"], drawn["text_to_audio_R@10"]) / 2
    assert result["recall@10"] == pytest.approx(np.quantile(both, [0.025, 0.975]), abs=1e-12)
    assert result["recall@10"][0] > 0


def test_a_point_is_compared_by_what_two_lanes_have_sent() -> None:
    better, worse = (Measured(POINT, each.metrics(), resample(each)) for each in pair())
    difference = better.minus(worse)
    assert {key: entry.interval for key, entry in difference.items()} == bootstrap(*pair())
    assert difference["recall@10"].difference == better.metrics["recall@10"] - worse.metrics["recall@10"]
    assert "audio_to_text_median_rank" not in difference


def test_other_queries_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="audio_to_text: 65 queries cannot be paired with 45"):
        bootstrap(retrieve(*problem(1)), retrieve(*problem(1, clips=20)))
