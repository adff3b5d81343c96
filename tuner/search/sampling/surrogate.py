"""Gaussian process over configurations: the posterior of a metric, with noise of its own for each observation.

Matern 5/2 kernel with a length scale for each feature, plus a constant. Hyperparameters are the maximum of the
posterior under the priors of Hvarfner et al. 2024 (arXiv:2402.02229), whose length scales grow with the number of
features: with ten trials the likelihood alone decides nothing. numpy only: a driver loads neither torch nor scipy.

Shapes: N observations, M queries, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Prior of the logarithm of each length scale: mean for one feature, and standard deviation.
LENGTH_MEAN, LENGTH_SD = math.sqrt(2.0), math.sqrt(3.0)
# Priors of the logarithms of signal and noise, in standard deviations of the observed values.
SIGNAL_PRIOR, NOISE_PRIOR = (0.0, 1.0), (math.log(0.2), 0.5)
CONSTANT = 1.0  # variance of the mean
STEPS = 60
JITTER = 1e-8
# Hyperparameters are fitted to at most so many observations; the posterior uses all of them.
FITTED = 150
# They are fitted again when there are this many times as many: each fit takes as long as many predictions. So they
# follow from the observations alone, whoever asks and when.
GROWTH = 1.15
SQRT5 = math.sqrt(5.0)


@dataclass(frozen=True)
class Hyperparameters:
    """Logarithms of the length scales [D], of the signal's and of the noise's standard deviation."""

    lengths: Array
    signal: float
    noise: float

    @classmethod
    def prior(cls, features: int) -> Hyperparameters:
        """The mode of the priors, with lengths one prior deviation below, where features matter."""
        mean = LENGTH_MEAN + 0.5 * math.log(features) - LENGTH_SD
        return cls(np.full(features, mean), SIGNAL_PRIOR[0], NOISE_PRIOR[0])

    def vector(self) -> Array:
        return np.array([*self.lengths, self.signal, self.noise])

    @classmethod
    def of(cls, vector: Array) -> Hyperparameters:
        return cls(vector[:-2].copy(), float(vector[-2]), float(vector[-1]))


class Surrogate:
    """The posterior after N observations.

    Args:
        features: [N, D], about 0 to 1.
        values: [N].
        extra: variance [N] of each observation besides the common noise, which is estimated; in units of `values`.
        hyperparameters: instead of fitted ones.
    """

    def __init__(
        self, features: Array, values: Array, extra: Array, hyperparameters: Hyperparameters | None = None
    ) -> None:
        self._features = features
        self._center, self._scale = float(np.mean(values)), float(np.std(values)) or 1.0
        scaled, noise = (values - self._center) / self._scale, extra / self._scale**2
        self.hyperparameters = hyperparameters = hyperparameters or _fitted(features, values, extra)
        kernel = _kernel(features, features, hyperparameters)
        kernel[np.diag_indices_from(kernel)] += noise + math.exp(2 * hyperparameters.noise) + JITTER
        self._lower = np.linalg.cholesky(kernel)
        self._weights = np.linalg.solve(self._lower.T, np.linalg.solve(self._lower, scaled))

    @property
    def noise(self) -> float:
        """Estimated standard deviation of one observation without extra variance."""
        return self._scale * math.exp(self.hyperparameters.noise)

    def mean(self, features: Array) -> Array:
        """Posterior mean [M] of the metric without noise."""
        cross = _kernel(features, self._features, self.hyperparameters)
        return np.asarray(self._center + self._scale * cross @ self._weights)

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Posterior mean [M] and standard deviation [M] of the metric without noise."""
        cross = _kernel(features, self._features, self.hyperparameters)
        solved = np.linalg.solve(self._lower, cross.T)
        variance = math.exp(2 * self.hyperparameters.signal) + CONSTANT - np.sum(solved**2, axis=0)
        mean = self._center + self._scale * cross @ self._weights
        return np.asarray(mean), np.asarray(self._scale * np.sqrt(np.maximum(variance, 1e-12)))

    def covariance(self, features: Array) -> Array:
        """Posterior covariance [M, M]."""
        cross = _kernel(features, self._features, self.hyperparameters)
        solved = np.linalg.solve(self._lower, cross.T)
        prior = _kernel(features, features, self.hyperparameters)
        return np.asarray(self._scale**2 * (prior - solved.T @ solved))


def _fitted(features: Array, values: Array, extra: Array) -> Hyperparameters:
    """Hyperparameters from the first observations; see `GROWTH`."""
    size = 2
    while (larger := max(size + 1, int(size * GROWTH))) <= len(values):
        size = larger
    rows = np.unique(np.linspace(0, size - 1, min(size, FITTED)).round().astype(int))
    center, scale = float(np.mean(values[rows])), float(np.std(values[rows])) or 1.0
    parts = (features[rows], (values[rows] - center) / scale, extra[rows] / scale**2)
    return _fit_cached(*(np.ascontiguousarray(part).tobytes() for part in parts), features.shape[1])


@lru_cache(maxsize=64)
def _fit_cached(features: bytes, values: bytes, noise: bytes, width: int) -> Hyperparameters:
    """`fit`, once for the same observations: samplers, rules and reports all ask for them."""
    return fit(np.frombuffer(features).reshape(-1, width), np.frombuffer(values), np.frombuffer(noise))


def fit(features: Array, values: Array, noise: Array) -> Hyperparameters:
    """Hyperparameters of the highest posterior density: Rprop (Riedmiller & Braun 1993) from the prior's mode.

    Args:
        values: [N], standardised.
        noise: variance [N] of each observation besides the common one.
    """
    start = Hyperparameters.prior(features.shape[1]).vector()
    best, lowest = start, math.inf
    point, step, before = start.copy(), np.full(len(start), 0.2), np.zeros(len(start))
    squares = (features[:, None, :] - features[None, :, :]) ** 2
    for _ in range(STEPS):
        loss, gradient = negative_log_posterior(point, squares, values, noise)
        if loss < lowest:
            best, lowest = point.copy(), loss
        turned = gradient * before
        step = np.clip(np.where(turned > 0, step * 1.2, np.where(turned < 0, step * 0.5, step)), 1e-3, 1.0)
        before = np.where(turned < 0, 0.0, gradient)
        point = np.clip(point - np.sign(before) * step, -7.0, 7.0)
    return Hyperparameters.of(best)


def negative_log_posterior(point: Array, squares: Array, values: Array, noise: Array) -> tuple[float, Array]:
    """The density's negative logarithm, without constants, and its gradient [D + 2].

    Args:
        point: as `Hyperparameters.vector`.
        squares: [N, N, D], squared differences of features.
    """
    parameters = Hyperparameters.of(point)
    scaled = squares / np.exp(2 * parameters.lengths)
    distance = np.sqrt(np.sum(scaled, axis=2))
    decay = math.exp(2 * parameters.signal) * np.exp(-SQRT5 * distance)
    signal = decay * (1 + SQRT5 * distance + 5 / 3 * distance**2)
    common = math.exp(2 * parameters.noise)
    lower = np.linalg.cholesky(signal + CONSTANT + np.diag(noise + common + JITTER))
    inverse = np.linalg.solve(lower.T, np.linalg.solve(lower, np.eye(len(values))))
    weights = inverse @ values
    loss = 0.5 * float(values @ weights) + float(np.sum(np.log(np.diag(lower))))
    slope = 0.5 * (inverse - np.outer(weights, weights))
    by_length = np.einsum("ij,ijd->d", slope * (5 / 3) * decay * (1 + SQRT5 * distance), scaled)
    by_signal, by_noise = 2 * float(np.sum(slope * signal)), 2 * common * float(np.trace(slope))
    mean = LENGTH_MEAN + 0.5 * math.log(squares.shape[2])
    centers = np.array([*np.full(len(parameters.lengths), mean), SIGNAL_PRIOR[0], NOISE_PRIOR[0]])
    spreads = np.array([*np.full(len(parameters.lengths), LENGTH_SD), SIGNAL_PRIOR[1], NOISE_PRIOR[1]])
    off = (point - centers) / spreads
    return loss + 0.5 * float(off @ off), np.array([*by_length, by_signal, by_noise]) + off / spreads


def _kernel(left: Array, right: Array, parameters: Hyperparameters) -> Array:
    scale = np.exp(-parameters.lengths)
    one, other = left * scale, right * scale
    squares = np.sum(one**2, axis=1)[:, None] + np.sum(other**2, axis=1)[None, :] - 2 * one @ other.T
    distance = np.sqrt(np.maximum(squares, 0.0))
    decay = math.exp(2 * parameters.signal) * np.exp(-SQRT5 * distance)
    return np.asarray(decay * (1 + SQRT5 * distance + 5 / 3 * distance**2) + CONSTANT)
