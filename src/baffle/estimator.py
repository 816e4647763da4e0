"""Stein's estimator: the client's half (losses → slopes) beside the server's half (slopes → gradient).

    forward   d_k = L(W + σz_k) − L(W)                K + 1 forward passes
    central   d_k = (L(W + σz_k) − L(W − σz_k)) / 2   2K forward passes
    slope     s_k = d_k / σ
    tangent   s_k = z_k·∇L(W), propagated forward     about 2K forward passes, no σ
    gradient  ĝ = (1/K) Σ_k s_k z_k                   (Eq. 6; Stein's identity, Eq. 5)

The paper recommends "twice-FD": ``forward`` with twice the directions, at the forward passes of
``central``. ``from_forward_passes`` makes any of them from the same budget.

``tangent`` is the limit σ → 0 of the other two, computed layer by layer next to the losses instead of as
their difference: the one scheme that half precision does not spoil, and the one that a plain inference
engine cannot do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from baffle import law
from baffle.errors import ConfigError, LossError
from baffle.perturbations import WORTH_A_KERNEL, Gaussian, Layers, Layout, Perturbation, compiled
from baffle.runtimes import Batch, ExampleRuntime, HoldingRuntime, LayerRuntime, Runtime, TangentRuntime
from baffle.stream import NUMPY, Arrays, Stream

SCHEMES = ("forward", "central", "tangent")
_CHUNK = 1 << 16
_TOGETHER = 1 << 20  # values of several directions that a device makes at once


class Measurement(NamedTuple):
    """What a client's half returns. Only ``slopes`` may leave the device."""

    slopes: NDArray[np.float64]  # (K,), or (B, K) of examples
    loss: float  # at W; the mean over W ± σz_k for `central`
    forward_passes: int


@dataclass(frozen=True)
class SteinEstimator:
    """K directions at scale σ, which ``tangent`` has no use for.

    Raises ConfigError for K < 1, σ ≤ 0 or an unknown scheme.
    """

    directions: int
    sigma: float = 1e-4
    scheme: str = "forward"
    perturbation: Perturbation = field(default_factory=Gaussian)

    def __post_init__(self) -> None:
        if not isinstance(self.directions, int) or not 1 <= self.directions < 1 << 32:
            raise ConfigError(
                f"K = {self.directions}: the number of directions is a whole number, at least 1"
            )
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ConfigError(f"σ = {self.sigma}: the perturbation scale is a positive number, e.g. 1e-4")
        if self.scheme not in SCHEMES:
            raise ConfigError(f"unknown scheme {self.scheme!r}: use {', '.join(SCHEMES)}")
        if isinstance(self.perturbation, Layers) and self.perturbation.directions != self.directions:
            raise ConfigError(
                f"K = {self.directions}: {self.perturbation.spec[:40]} has {self.perturbation.directions}, "
                "and all of them are needed"
            )

    @classmethod
    def from_forward_passes(
        cls,
        budget: int,
        sigma: float = 1e-4,
        scheme: str = "forward",
        perturbation: Perturbation | None = None,
    ) -> SteinEstimator:
        """As many directions as ``budget`` passes pay for: budget − 1 if forward, else budget // 2."""
        directions = budget - 1 if scheme == "forward" else budget // 2
        if directions < 1:
            raise ConfigError(f"{budget} forward passes pay for no direction: at least 2 are needed")
        return cls(directions, sigma, scheme, perturbation or Gaussian())

    def passes(self, costs: Sequence[float] | None = None) -> int:
        """``forward_passes``, of directions in ``Layers`` that cost these shares of one.

        What is kept counts too: a pass for the loss at W, and one for each layer, what lies before it and the
        loss at W from there on. ``tangent`` goes through the whole model in any case.
        """
        if costs is None or not isinstance(self.perturbation, Layers) or self.scheme == "tangent":
            return self.forward_passes
        spent = sum(cost * count for cost, count in zip(costs, self.perturbation.counts, strict=True))
        once = 1 + len(self.perturbation.counts) + math.ceil(spent)
        return 1 + once if self.scheme == "forward" else 2 * once

    @property
    def forward_passes(self) -> int:
        """Forward passes of one measurement; for ``tangent`` their equivalent."""
        return self.directions + 1 if self.scheme == "forward" else 2 * self.directions

    def slopes(
        self,
        runtime: Runtime,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        *,
        first: int = 0,
    ) -> Measurement:
        """The client's half: slopes (K,) of the batch's mean loss along z_k, k from ``first`` on.

        Raises PrecisionError where σ lies below the runtime's arithmetic, ConfigError where the runtime
        cannot do ``tangent``, LossError (naming the direction) where a loss or a slope is NaN or infinite.
        Cost: ``forward_passes`` forward passes.
        """
        if self.scheme == "tangent":
            return self._tangent(runtime, weights, batch, stream, first)
        runtime.check_sigma(self.sigma)
        with runtime.holding(batch) if isinstance(runtime, HoldingRuntime) else nullcontext():
            passes = self.passes(self._costs(runtime, batch))
            if self.scheme == "central":
                plus = self._losses(runtime.losses, weights, batch, stream, self.sigma, first)
                minus = self._losses(runtime.losses, weights, batch, stream, -self.sigma, first)
                loss = float((plus + minus).mean() / 2)
                return Measurement((plus - minus) / (2 * self.sigma), loss, passes)
            base = _finite(runtime.loss(weights, batch))
            plus = self._losses(runtime.losses, weights, batch, stream, self.sigma, first)
        return Measurement((plus - base) / self.sigma, base, passes)

    def example_slopes(
        self, runtime: Runtime, weights: NDArray[np.float32], batch: Batch, stream: Stream
    ) -> Measurement:
        """Slopes (B, K) of each sample's own loss: row i is what a batch of sample i alone would give.

        Their mean over i is ``slopes``, to rounding. None of it may leave the device but what is clipped,
        summed and noised. Raises what ``slopes`` raises, and ConfigError for a runtime that cannot tell
        samples apart and for ``tangent``. Cost: ``forward_passes`` forward passes; memory: 3·K·B floats.
        """
        if self.scheme == "tangent":
            raise ConfigError("slopes of examples are differences: use the scheme forward or central")
        if not isinstance(runtime, ExampleRuntime):
            raise ConfigError(
                f"{type(runtime).__name__} cannot tell the samples of a batch apart, as the privacy of an "
                "example needs it"
            )
        runtime.check_sigma(self.sigma)
        measure = runtime.example_losses
        with runtime.holding(batch) if isinstance(runtime, HoldingRuntime) else nullcontext():
            if self.scheme == "central":
                plus = self._losses(measure, weights, batch, stream, self.sigma)
                minus = self._losses(measure, weights, batch, stream, -self.sigma)
                loss = float((plus + minus).mean() / 2)
                return Measurement((plus - minus).T / (2 * self.sigma), loss, self.forward_passes)
            base = measure(weights, batch, stream, self.perturbation, range(1), 0.0)[0]
            loss = _finite(float(base.mean()))
            plus = self._losses(measure, weights, batch, stream, self.sigma)
        return Measurement((plus - base).T / self.sigma, loss, self.forward_passes)

    def simulated_passes(self, runtime: Runtime, batch: Batch) -> int:
        """The forward passes that ``slopes`` would take."""
        return self.passes(self._costs(runtime, batch))

    def _costs(self, runtime: Runtime, batch: Batch) -> Sequence[float] | None:
        """Raises ConfigError where directions in layers are not for the runtime's."""
        if not isinstance(self.perturbation, Layers):
            return None
        parts = self.perturbation.parts(runtime.layout)
        if not isinstance(runtime, LayerRuntime):
            return None
        costs = zip(runtime.layer_costs(batch), parts, strict=True)
        return [
            c.coordinate if len(own) == stop - start else c.direction for c, (own, start, stop, _) in costs
        ]

    def _tangent(
        self, runtime: Runtime, weights: NDArray[np.float32], batch: Batch, stream: Stream, first: int
    ) -> Measurement:
        if not isinstance(runtime, TangentRuntime):
            raise ConfigError(
                f"{type(runtime).__name__} cannot propagate derivatives: use the scheme forward or central"
            )
        directions = range(first, first + self.directions)
        loss, slopes = runtime.derivatives(weights, batch, stream, self.perturbation, directions)
        _finite(loss)
        bad = np.flatnonzero(~np.isfinite(slopes))
        if len(bad):
            k = int(bad[0])
            raise LossError(
                f"the slope along direction {first + k} of round {stream.round} is {slopes[k]}: "
                "lower the learning rate, or check the data"
            )
        return Measurement(slopes, loss, self.forward_passes)

    def _losses(
        self,
        measure: Callable[..., NDArray[np.float64]],
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        scale: float,
        first: int = 0,
    ) -> NDArray[np.float64]:
        """Losses (K,), or (K, B) of examples."""
        directions = range(first, first + self.directions)
        losses = measure(weights, batch, stream, self.perturbation, directions, scale)
        bad = np.argwhere(~np.isfinite(losses))
        if len(bad):
            k = int(bad[0, 0])
            raise LossError(
                f"the loss at direction {first + k} of round {stream.round} (scale {scale:+g}) is "
                f"{losses[tuple(bad[0])]}: "
                "lower the learning rate or σ, or check the data"
            )
        return losses

    def gradient(
        self,
        slopes: NDArray[np.floating[Any]],
        stream: Stream,
        layout: Layout,
        *,
        first: int = 0,
        chunk: int = _CHUNK,
        arrays: Arrays = NUMPY,
        threads: int | None = None,
    ) -> Any:
        """The server's half: ĝ = (1/K) Σ_k s_k z_k, float32 (n,), from slopes (K,), K = len(slopes).

        The slopes are those along z_first, z_(first+1), …

        Normative arithmetic: float64, k ascending, multiply then add, then one division by K and one
        rounding to float32. So neither ``chunk`` (parameters held at a time), nor the array library, nor
        ``threads`` (default: all cores) change a bit. A value above float32's range comes out infinite.
        Cost: no forward pass; K·n values made again; memory n·4 bytes and O(1) for each thread. Without
        numba, and on devices, one thread and O(chunk) bytes.
        """
        if slopes.ndim != 1 or len(slopes) < 1:
            raise ConfigError(f"slopes have the shape (K,), not {slopes.shape}")
        if isinstance(self.perturbation, Layers) and (first or len(slopes) != self.directions):
            raise ConfigError(
                f"{len(slopes)} slopes from {first} on: {self.perturbation.spec[:40]} has {self.directions}, "
                "and all of them are needed"
            )
        worth = arrays is NUMPY and layout.n * len(slopes) >= WORTH_A_KERNEL
        kernel = compiled(self.perturbation, layout) if worth else None
        if kernel is not None:
            stream.check(range(first, first + len(slopes)), 0, 0)
            return kernel.gradient(stream.key, slopes.astype(np.float64), layout.n, threads, first)
        out = arrays.empty((layout.n,))
        # As an array: some libraries multiply by 1/K where a device array is divided by a Python number.
        count = arrays.scalar(len(slopes))
        for ks, begin, end, along_coordinates in self._regions(slopes, first, layout):
            if along_coordinates:  # the sum has one term an entry; adding 0.0 makes its −0 a sum's +0
                z = float(np.float32(math.sqrt(self.directions)))
                terms = slopes[ks.start : ks.stop].astype(np.float64) * z + 0.0
                with np.errstate(over="ignore"):
                    out[begin:end] = arrays.float32(arrays.doubles(terms) / count)
                continue
            own = slopes[ks.start - first : ks.stop - first].tolist()
            for start in range(begin, end, chunk):
                stop = min(start + chunk, end)
                total: Any = 0.0
                directions = self._directions(ks, stream, layout, start, stop, arrays)
                for slope, z in zip(own, directions, strict=True):
                    total = arrays.float64(z) * slope + total
                with np.errstate(over="ignore"):
                    out[start:stop] = arrays.float32(total / count)
        return out

    def _regions(
        self, slopes: NDArray[np.floating[Any]], first: int, layout: Layout
    ) -> Iterator[tuple[range, int, int, bool]]:
        """Which of the slopes' directions matter to which part of the vector, and whether each to one entry.

        Outside of its layer a direction adds zeros, which change no bit of a finite sum.
        """
        measured = range(first, first + len(slopes))
        if not isinstance(self.perturbation, Layers) or not np.isfinite(slopes).all():
            yield measured, 0, layout.n, False
            return
        for own, start, stop, _ in self.perturbation.parts(layout):
            yield own, start, stop, len(own) == stop - start

    def exact_slopes(
        self, gradient: NDArray[np.float32], stream: Stream, layout: Layout
    ) -> NDArray[np.float64]:
        """What ``slopes`` comes to as σ → 0: z_k·∇L (K,) float64, given the gradient (n,). For simulators.

        Cost: no forward pass; K·n values made. Memory: a megabyte or so.
        """
        slopes = np.zeros(self.directions)
        rows = max(1, min(self.directions, _TOGETHER // _CHUNK))
        for first in range(0, self.directions, rows):
            ks = range(first, min(first + rows, self.directions))
            for start in range(0, layout.n, _CHUNK):
                stop = min(start + _CHUNK, layout.n)
                z = self.perturbation.values(stream, ks, layout, start, stop)
                slopes[ks.start : ks.stop] += z @ gradient[start:stop]
        return slopes

    def simulated(
        self, gradient: NDArray[np.float32], stream: Stream, layout: Layout, seed: bytes
    ) -> NDArray[np.float32]:
        """An estimate (n,) as σ → 0 from the true gradient (n,): a draw, with ``seed``, of its exact law for
        Gaussian directions, also in layers, and the estimate along the ``stream``'s own for all others.
        """
        rng = law.generator(seed)
        if isinstance(self.perturbation, Layers):
            drawn = [
                gradient[a:b] if len(own) == b - a else law.sample_estimate(gradient[a:b], len(own), rng)
                for own, a, b, _ in self.perturbation.parts(layout)
            ]
            return np.concatenate(drawn)
        if type(self.perturbation) is Gaussian:
            return law.sample_estimate(gradient, self.directions, rng)
        slopes = self.exact_slopes(gradient, stream, layout)
        result: NDArray[np.float32] = self.gradient(slopes, stream, layout)
        return result

    def _directions(
        self, ks: range, stream: Stream, layout: Layout, start: int, stop: int, arrays: Arrays
    ) -> Iterator[Any]:
        """z_k[start:stop] for each k; a device makes several in one set of launches."""
        if arrays is NUMPY:
            for k in ks:
                yield self.perturbation.values(stream, k, layout, start, stop, arrays)
            return
        together = max(1, _TOGETHER // (stop - start))
        for at in range(0, len(ks), together):
            some = ks[at : at + together]
            yield from self.perturbation.values(stream, some, layout, start, stop, arrays)


def _finite(loss: float) -> float:
    """The loss of the unperturbed weights, if it is a number."""
    if not math.isfinite(loss):
        raise LossError(f"the loss of the unperturbed weights is {loss}: check the data and the model")
    return loss
