"""How many of a round's directions each layer gets: from the sums of earlier rounds alone.

With directions in one layer at a time (``perturbations.Layers``) the estimate's variance is Σ_b v_b / K_b
with v_b = |g_b|² n_b, and a direction of layer b costs c_b of a forward pass where what lies before the layer
is kept. For Σ_b c_b K_b = F passes the least variance has K_b ∝ √(v_b / c_b) (Lagrange; Neyman's allocation
of a stratified sample). A layer that gets as many directions as it has parameters, n_b, is measured exactly,
along its coordinates, and these may cost less: only what a coordinate reaches is computed again. Which layers
are worth that is decided greedily, by the variance that is left to the others with the passes that are left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError
from baffle.perturbations import Layers, Layout
from baffle.runtimes import LayerCost

_SMOOTH = 0.9  # decay of what earlier rounds said of a layer
_TRIED = 5  # layers that are looked at closely, at each step of the choice of those that are measured exactly
_MOST = 2.0**200  # of the factor in `_shares`: where all that counts is exact, more are of no use


@dataclass(frozen=True)
class Deal:
    """``passes`` forward passes a round, dealt out to the layers of ``sizes`` (parameters) and ``costs``.

    Raises ConfigError where not each layer can have a direction.
    """

    passes: float
    sizes: tuple[int, ...]
    costs: tuple[LayerCost, ...]

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.costs) or not self.sizes:
            raise ConfigError(f"{len(self.costs)} costs for {len(self.sizes)} layers")
        if not all(math.isfinite(cost) and 0 < cost <= 1 for costs in self.costs for cost in costs):
            raise ConfigError(f"costs {self.costs}: shares of a forward pass lie in (0, 1]")
        if any(cost.coordinate > cost.direction for cost in self.costs):
            raise ConfigError(f"costs {self.costs}: a coordinate is a direction, and costs no more")
        if not self.passes >= sum(cost.direction for cost in self.costs):
            raise ConfigError(f"{self.passes:g} forward passes do not pay for a direction of each layer")

    @classmethod
    def of(cls, passes: float, layout: Layout, costs: tuple[LayerCost, ...] | None = None) -> Deal:
        """For a layout's layers; without ``costs`` each direction is a whole forward pass."""
        sizes = tuple(stop - start for _, start, stop in layout.layers)
        return cls(passes, sizes, costs or (LayerCost(1.0, 1.0),) * len(sizes))

    def counts(self, squares: NDArray[np.float64] | None = None) -> tuple[int, ...]:
        """Directions of each layer, at least 1 and at most its size, for gradients of ``squares`` = |g_b|².

        Without, or where these say nothing, as though all entries of the gradient were alike. They cost
        ``passes`` at most.
        """
        sizes = np.array(self.sizes, np.float64)
        weights = sizes if squares is None or not _says(squares) else squares / squares.max()
        exact = sizes * [cost.coordinate for cost in self.costs]
        if exact.sum() <= self.passes:
            return self.sizes
        direction, _ = np.array(self.costs).T
        # (Σ of these)² / passes is the variance of shares without bounds.
        apart = np.sqrt(weights * sizes * direction)
        chosen = np.zeros(len(sizes), bool)  # the layers measured exactly
        best, counts = self._left(weights, chosen)
        while not chosen.all():
            left = self.passes - exact[chosen].sum() - exact
            about = np.full(len(sizes), np.inf)
            may = ~chosen & (left > 0)
            about[may] = (apart[~chosen].sum() - apart[may]) ** 2 / left[may]
            tries = []
            for b in np.argsort(about)[: min(_TRIED, may.sum())].tolist():
                wider = chosen.copy()
                wider[b] = True
                tries.append((*self._left(weights, wider), wider))
            variance, wanted, wider = min(tries, key=lambda one: one[0], default=(math.inf, counts, chosen))
            if not variance < best:
                break
            best, counts, chosen = variance, wanted, wider
        return self._whole(weights, counts)

    def _whole(self, weights: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[int, ...]:
        """Real counts as whole ones: rounded down, then up where what is left buys the most."""
        sizes, costs = np.array(self.sizes, np.float64), np.array(self.costs)
        found = np.floor(counts + 1e-9)
        spent = float((np.where(found < sizes, costs[:, 0], costs[:, 1]) * found).sum())
        worth = weights * sizes / (found * (found + 1)) / costs[:, 0]
        for b in np.argsort(-worth).tolist():
            if worth[b] > 0 and found[b] + 1 < sizes[b] and spent + costs[b, 0] <= self.passes:
                found[b] += 1
                spent += costs[b, 0]
        return tuple(int(count) for count in found)

    def _left(
        self, weights: NDArray[np.float64], exact: NDArray[np.bool_]
    ) -> tuple[float, NDArray[np.float64]]:
        """The variance where these layers are measured exactly, and real counts; infinite: they cannot be."""
        sizes = np.array(self.sizes, np.float64)
        direction, coordinate = np.array(self.costs).T
        passes = self.passes - float((sizes * coordinate)[exact].sum())
        if passes < direction[~exact].sum():
            return math.inf, sizes
        counts = sizes.copy()
        counts[~exact] = _shares(passes, sizes[~exact], direction[~exact], weights[~exact])
        noisy = counts < sizes
        return float((weights * sizes / counts)[noisy].sum()), counts

    def looked(
        self, before: NDArray[np.float64] | None, squares: NDArray[np.float64]
    ) -> NDArray[np.float64] | None:
        """What is held of |g_b|² after a round that says ``squares``; None where none said anything yet."""
        if not _says(squares):
            return before
        return squares if before is None else _SMOOTH * before + (1 - _SMOOTH) * squares


def _shares(
    passes: float, sizes: NDArray[np.float64], costs: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """K_b = factor · √(v_b / c_b) within [1, n_b] that cost ``passes``, or less where all are n_b."""
    spread = np.sqrt(weights * sizes / costs)

    def spent(factor: float) -> float:
        return float(np.clip(factor * spread, 1.0, sizes) @ costs)

    # By halving: what is spent rises with the factor.
    low, high = 0.0, 1.0
    while spent(high) <= passes and high < _MOST:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= passes else (low, middle)
    return np.clip(low * spread, 1.0, sizes)


def _says(squares: NDArray[np.float64]) -> bool:
    return bool(np.isfinite(squares).all() and (squares >= 0).all() and squares.any())


def squares_of_slopes(
    slopes: NDArray[np.float64], perturbation: Layers, layout: Layout
) -> NDArray[np.float64]:
    """|g_b|² (layers,) by the mean of a layer's squared slopes (K,), each of which is c_b z·g_b."""
    parts = perturbation.parts(layout)
    return np.array([float(np.mean(slopes[own.start : own.stop] ** 2)) / c**2 for own, _, _, c in parts])


def squares_of_gradient(gradient: NDArray[np.float64], layout: Layout) -> NDArray[np.float64]:
    """|g_b|² (layers,) of a gradient (n,)."""
    return np.array([float(np.sum(gradient[start:stop] ** 2)) for _, start, stop in layout.layers])
