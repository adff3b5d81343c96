"""The Gaussian process against its formulas written out, and the improvement against sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tuner.search.sampling.improvement import expected_improvement, expected_improvement_by_quantiles
from tuner.search.sampling.surrogate import (
    CONSTANT,
    JITTER,
    Hyperparameters,
    Surrogate,
    fit,
    negative_log_posterior,
)
from tuner.study.objectives import TRAINABLE_PARAMETERS, choose_objectives
from tuner.study.pareto import hypervolume

BOTH = choose_objectives(["recall@10", TRAINABLE_PARAMETERS])
Array = NDArray[np.float64]


def data(count: int = 14, seed: int = 0) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    features = random.random((count, 3))
    values = 0.4 + 0.05 * np.sin(5 * features[:, 0]) + 0.01 * random.standard_normal(count)
    return features, values, random.random(count) * 1e-4


def slow_kernel(one: Array, other: Array, parameters: Hyperparameters) -> float:
    distance = math.sqrt(
        sum(((a - b) / math.exp(length)) ** 2 for a, b, length in zip(one, other, parameters.lengths, strict=True))
    )
    matern = (1 + math.sqrt(5) * distance + 5 / 3 * distance**2) * math.exp(-math.sqrt(5) * distance)
    return math.exp(2 * parameters.signal) * matern + CONSTANT


def test_the_posterior_is_the_textbook_formula() -> None:
    """Rasmussen & Williams 2006, equations 2.25 and 2.26, with inverses written out."""
    features, values, extra = data()
    parameters = Hyperparameters(np.array([-0.5, 0.3, 1.0]), 0.2, -1.0)
    model, queries = Surrogate(features, values, extra, parameters), np.random.default_rng(5).random((4, 3))
    scale, center = values.std(), values.mean()
    noise = np.diag(extra / scale**2 + math.exp(-2.0) + JITTER)
    known = np.array([[slow_kernel(a, b, parameters) for b in features] for a in features]) + noise
    cross = np.array([[slow_kernel(a, b, parameters) for b in features] for a in queries])
    prior = np.array([[slow_kernel(a, b, parameters) for b in queries] for a in queries])
    mean = center + scale * cross @ np.linalg.inv(known) @ ((values - center) / scale)
    covariance = scale**2 * (prior - cross @ np.linalg.inv(known) @ cross.T)
    got, deviation = model.predict(queries)
    np.testing.assert_allclose(got, mean, rtol=1e-9)
    np.testing.assert_allclose(model.mean(queries), mean, rtol=1e-9)
    np.testing.assert_allclose(deviation, np.sqrt(np.diag(covariance)), rtol=1e-6)
    np.testing.assert_allclose(model.covariance(queries), covariance, atol=1e-12)
    assert model.noise == pytest.approx(scale * math.exp(-1.0))


def test_the_gradient_is_that_of_finite_differences() -> None:
    features, values, extra = data()
    squares = (features[:, None] - features[None]) ** 2
    scaled, noise = (values - values.mean()) / values.std(), extra / values.std() ** 2
    point = np.array([-0.4, 0.2, 0.9, 0.1, -1.2])
    _, gradient = negative_log_posterior(point, squares, scaled, noise)
    steps = 1e-5 * np.eye(5)
    sides = [
        [negative_log_posterior(point + sign * step, squares, scaled, noise)[0] for sign in (1, -1)] for step in steps
    ]
    np.testing.assert_allclose(gradient, [(up - down) / 2e-5 for up, down in sides], atol=1e-6)


def test_fitting_finds_the_feature_that_matters_and_the_noise() -> None:
    features, values, _ = data(120)
    scaled = (values - values.mean()) / values.std()
    found = fit(features, scaled, np.zeros(120))
    assert found.lengths[0] < found.lengths[1] - 1 and found.lengths[0] < found.lengths[2] - 1
    assert math.exp(found.noise) * values.std() == pytest.approx(0.01, rel=0.3)


def test_an_observation_with_more_variance_counts_less() -> None:
    features, values, _ = data()
    parameters = Hyperparameters.prior(3)
    sure, unsure = (Surrogate(features, values, np.array([v, *[0.0] * 13]), parameters) for v in (0.0, 1.0))
    off = [abs(model.mean(features[:1])[0] - values[0]) for model in (sure, unsure)]
    assert off[0] < off[1]


fronts = st.lists(st.tuples(st.floats(0.05, 0.95), st.integers(10, 10_000)), max_size=6)


@settings(deadline=None, max_examples=40)
@given(fronts, st.floats(0.05, 0.95), st.floats(0.001, 0.2), st.integers(5, 20_000))
def test_the_closed_form_is_the_mean_over_samples(
    points: list[tuple[float, int]], mean: float, deviation: float, cost: int
) -> None:
    """Of the hypervolume by moocore, over evenly spaced quantiles of the metric."""
    from statistics import NormalDist

    corner = (0.0, 9.0)  # that of the objectives, in decades
    values = [NormalDist(mean, deviation).inv_cdf((i + 0.5) / 400) for i in range(400)]
    rows = [[value, float(count)] for value, count in points]
    before = hypervolume(rows, BOTH)
    sampled = np.mean([hypervolume([*rows, [value, float(cost)]], BOTH) - before for value in values])
    front = np.array([[value, math.log10(count)] for value, count in points]).reshape(-1, 2)
    found = expected_improvement(
        np.array([mean]), np.array([deviation]), np.array([math.log10(cost)]), _front(front), corner
    )
    assert found[0] == pytest.approx(sampled, abs=0.01 * deviation * 9 + 1e-6)


def _front(points: Array) -> Array:
    """Without points that are dominated."""
    kept = [p for p in points if not any((q[0] >= p[0] and q[1] <= p[1]) and tuple(q) != tuple(p) for q in points)]
    return np.unique(np.array(kept).reshape(-1, 2), axis=0)


def test_quantiles_agree_with_the_closed_form() -> None:
    random = np.random.default_rng(3)
    mean, deviation = random.uniform(0.3, 0.5, 20), random.uniform(0.01, 0.05, 20)
    costs = 10 ** random.uniform(3, 6, 20)
    points = np.array([[0.35, 1e4], [0.42, 1e5]])
    logs = np.column_stack([points[:, 0], np.log10(points[:, 1])])
    closed = expected_improvement(mean, deviation, np.log10(costs), logs, (0.0, 9.0))
    rows = np.column_stack([np.zeros(20), costs])
    sampled = expected_improvement_by_quantiles(mean[:, None], deviation[:, None], rows, BOTH, points)
    np.testing.assert_allclose(sampled, closed, rtol=0.1, atol=4e-3)
    assert np.argmax(sampled) == np.argmax(closed)
