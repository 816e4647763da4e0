"""Calibrated likelihood ratios: is the target's slope vector in this sum of A slope vectors?

The attacker knows the weights, the seed (so every z_k), the target's own slopes d* (K,), and examples of
the same kind as the others'. From these come the mean μ and covariance Σ of one example's slopes; a sum U
of A examples is taken for N(Aμ, AΣ) without the target and for N(d* + (A−1)μ, (A−1)Σ) with it, each plus
the noise that the mechanism adds. Per target, the statistic's distribution with and without it is fitted on
shadow sums (Carlini et al., "Membership inference attacks from first principles", 2022: LiRA).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from common import Floats
from scores import auc


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of one example's slopes, in the covariance's own axes."""

    mean: Floats  # (K,), in the axes
    axes: Floats  # (K, K): columns are eigenvectors
    spectrum: Floats  # (K,): eigenvalues after shrinkage

    @classmethod
    def of(cls, vectors: Floats) -> Moments:
        """From examples (N, K), shrunk towards a multiple of the identity (Ledoit and Wolf 2004)."""
        count, size = vectors.shape
        mean = vectors.mean(0)
        centred = vectors - mean
        covariance = centred.T @ centred / count
        scale = np.trace(covariance) / size
        spread = (covariance**2).sum() - size * scale**2
        fourth = ((centred**2).sum(1) ** 2).sum() / count
        error = min((fourth - (covariance**2).sum()) / count, spread)
        weight = error / spread if spread > 0 else 1.0
        values, axes = np.linalg.eigh(covariance)
        spectrum = (1 - weight) * values + weight * scale
        return cls(mean @ axes, axes, np.maximum(spectrum, 1e-12 * scale))


@dataclass(frozen=True)
class Game:
    """Sums of ``addends`` examples under noise of variance ``noise`` a coordinate; all in Moments' axes."""

    moments: Moments
    addends: int
    noise: float = 0.0

    def _squares(self, residual: Floats, addends: int) -> tuple[Floats, float]:
        """Mahalanobis squares (...,) of residuals (..., K) of ``addends`` unknown examples; log det."""
        # With no other example and no noise the sum is d* itself: a small floor stands for rounding.
        floor = 1e-9 * self.moments.spectrum.mean()
        variance = addends * self.moments.spectrum + self.noise + floor
        return (residual**2 / variance).sum(-1), float(np.log(variance).sum())

    def gaussian(self, sums: Floats, target: Floats) -> Floats:
        """Log likelihood ratio of sums (..., K) with the moments taken at their word."""
        apart, others = self.addends, self.addends - 1
        out, out_det = self._squares(sums - apart * self.moments.mean, apart)
        within, in_det = self._squares(sums - target - others * self.moments.mean, others)
        return 0.5 * (out + out_det - within - in_det)

    def scale_free(self, sums: Floats, target: Floats) -> Floats:
        """The ratio where each sum has a scale of its own, unknown: slopes of examples are heavy-tailed."""
        apart, others = self.addends, self.addends - 1
        out, _ = self._squares(sums - apart * self.moments.mean, apart)
        within, _ = self._squares(sums - target - others * self.moments.mean, others)
        tiny = np.finfo(np.float64).tiny  # the target alone, without noise, leaves nothing
        return np.log(np.maximum(out, tiny)) - np.log(np.maximum(within, tiny))


Statistic = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True)
class Calibration:
    """One target's two normal distributions of a statistic, fitted on shadow sums."""

    inside: tuple[float, float]
    outside: tuple[float, float]

    @classmethod
    def of(cls, inside: Floats, outside: Floats) -> Calibration:
        return cls(_normal(inside), _normal(outside))

    def score(self, values: Floats) -> Floats:
        """Log likelihood ratio of statistics (...,)."""
        return _log_density(values, *self.inside) - _log_density(values, *self.outside)


def _normal(values: Floats) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) + 1e-12 * (1 + abs(float(values.mean())))


def _log_density(values: Floats, mean: float, deviation: float) -> Floats:
    density: Floats = -0.5 * ((values - mean) / deviation) ** 2 - np.log(deviation)
    return density


@dataclass(frozen=True)
class Sums:
    """Sums of slopes in Moments' axes. ``others`` hold A−1 examples, ``full`` hold A, both (..., K)."""

    others: Floats
    full: Floats


def attack(game: Game, targets: Floats, shadow: Sums, fresh: Sums) -> tuple[str, Floats, Floats]:
    """Scores of ``fresh`` sums: the attack's name, then (targets, repetitions) with and without the target.

    ``targets`` (T, K); ``shadow`` sums (S, K) are common to all targets, ``fresh`` ones (T, R, K) are each
    target's own and come from examples that neither moments nor shadows have seen. Which statistic, and
    whether it is calibrated for each target, the attacker decides by the AUC on the second half of the
    shadows, the calibration being fitted on the first.
    """
    ways: dict[str, Statistic] = {"Gaussian": game.gaussian, "scale-free": game.scale_free}
    half = len(shadow.full) // 2
    tried: dict[str, float] = {}
    results: dict[str, tuple[Floats, Floats]] = {}
    for name, statistic in ways.items():
        trial: dict[str, list[tuple[Floats, Floats]]] = {"": [], ", calibrated": []}
        final: dict[str, list[tuple[Floats, Floats]]] = {"": [], ", calibrated": []}
        for i, target in enumerate(targets):
            inside = statistic(shadow.others + target, target)
            outside = statistic(shadow.full, target)
            new_in, new_out = statistic(fresh.others[i] + target, target), statistic(fresh.full[i], target)
            first = Calibration.of(inside[:half], outside[:half])
            whole = Calibration.of(inside, outside)
            trial[""].append((inside[half:], outside[half:]))
            trial[", calibrated"].append((first.score(inside[half:]), first.score(outside[half:])))
            final[""].append((new_in, new_out))
            final[", calibrated"].append((whole.score(new_in), whole.score(new_out)))
        for kind, pairs in trial.items():
            tried[name + kind] = auc(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
            inside, outside = (np.stack(side) for side in zip(*final[kind], strict=True))
            results[name + kind] = inside, outside
    best = max(tried, key=lambda name: tried[name])
    return best, *results[best]
