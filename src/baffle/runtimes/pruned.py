"""Pruned models: a mask over the parameters, known to both sides, and only what it keeps is trained.

What it drops is 0, is not perturbed and does not travel: n counts the rest. So a pruned model is a model
with a smaller flat vector, and the server, the messages and the digests know nothing of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.digests import sha256
from baffle.errors import ConfigError
from baffle.perturbations import Layout, Perturbation
from baffle.runtimes import (
    Batch,
    DifferentiableRuntime,
    ExampleRuntime,
    HoldingRuntime,
    Runtime,
    TangentRuntime,
)
from baffle.runtimes.sources import Source, bounds
from baffle.stream import NUMPY, Arrays, Stream


class Pruned:
    """``runtime`` with the parameters where ``mask`` (n,) bool is False fixed at 0, for server and client.

    The layout has the inner names, each with a vector of what is kept of it, in order. As there are no
    matrices left, ``LowRank`` is Gaussian here, by its own definition. ``gradient``, ``derivatives``,
    ``holding``, ``example_losses`` and ``peak`` are there where the inner runtime has them.

    The digest of what is frozen is SHA-256("baffle pruned v1" ‖ the inner one ‖ the mask), eight entries to
    a byte, the first in its highest bit, zeros behind the last. So who has another mask finds out as who
    has other weights does.

    Cost: a forward pass of the inner runtime, n writes, and for a direction as many values as are kept;
    memory: 8 bytes a kept parameter, and W with its zeros, of which a runtime that has a ``peak`` of memory
    reads a slice at a time.
    Raises ConfigError for a mask of another length or type, and for one that keeps nothing.
    """

    def __init__(self, runtime: Runtime, mask: NDArray[np.bool_]) -> None:
        inner = runtime.layout
        if mask.shape != (inner.n,) or mask.dtype != np.bool_:
            raise ConfigError(
                f"the mask is {mask.dtype} {mask.shape}: this model needs one bool a parameter, n = {inner.n}"
            )
        kept = np.flatnonzero(mask)
        if not len(kept):
            raise ConfigError("the mask keeps no parameter: there is nothing to train")
        self.runtime = runtime
        self._inner_n = inner.n
        self._kept = kept
        self._packed = np.packbits(mask).tobytes()
        self._name = f"kept {sha256(self._packed).hexdigest()}"
        counts = np.diff(np.searchsorted(kept, inner.offsets))
        self._layout = Layout(inner.names, tuple((int(count),) for count in counts))
        # What a runtime can do besides is told by the members that it has.
        if isinstance(runtime, DifferentiableRuntime):
            self.gradient = self._gradient
        if isinstance(runtime, TangentRuntime):
            self.derivatives = self._derivatives
        if isinstance(runtime, HoldingRuntime):
            self.holding = runtime.holding
        if isinstance(runtime, ExampleRuntime):
            self.example_losses = self._example_losses
        self._sliced = hasattr(runtime, "peak")
        if self._sliced:
            self.peak = self._peak

    @property
    def layout(self) -> Layout:
        """The inner names; of each the number of parameters that are kept, as a vector's shape."""
        return self._layout

    @property
    def frozen_digest(self) -> bytes:
        return sha256(b"baffle pruned v1" + self.runtime.frozen_digest + self._packed).digest()

    def weights(self) -> NDArray[np.float32]:
        return self.runtime.weights()[self._kept]

    def whole(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """The inner runtime's flat weights: ``weights`` in their places, 0 where the mask drops one.

        Raises ConfigError for weights of another shape.
        """
        return self._spread(weights)[0 : self._inner_n]

    def _spread(self, weights: Source) -> SpreadWeights:
        if weights.shape != (self._layout.n,):
            raise ConfigError(
                f"weights have the shape {weights.shape}, of this pruned model n = {self._layout.n} are kept"
            )
        return SpreadWeights(weights, self._kept, self._inner_n)

    def _inner(self, weights: NDArray[np.float32]) -> Any:
        """W with its zeros: whole, or for a runtime that takes any source, made a slice at a time."""
        return self._spread(weights) if self._sliced else self.whole(weights)

    def _peak(self, batch_size: int) -> int:
        """As the inner runtime's, with the values and the places of what is kept."""
        inner: int = self.runtime.peak(batch_size)  # type: ignore[attr-defined]
        return inner + 12 * self._layout.n

    def check_sigma(self, sigma: float) -> None:
        self.runtime.check_sigma(sigma)

    def loss(self, weights: NDArray[np.float32], batch: Batch) -> float:
        return self.runtime.loss(self._inner(weights), batch)

    def losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        inner = self.spread(perturbation)
        return self.runtime.losses(self._inner(weights), batch, stream, inner, directions, scale)

    def spread(self, perturbation: Perturbation) -> Spread:
        """The same directions as the inner runtime needs them: with zeros in between."""
        return Spread(perturbation, self._layout, self._kept, self._inner_n, self._name)

    def _example_losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        assert isinstance(self.runtime, ExampleRuntime)
        inner = self.spread(perturbation)
        return self.runtime.example_losses(self._inner(weights), batch, stream, inner, directions, scale)

    def _derivatives(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
    ) -> tuple[float, NDArray[np.float64]]:
        assert isinstance(self.runtime, TangentRuntime)
        inner = self.spread(perturbation)
        return self.runtime.derivatives(self._inner(weights), batch, stream, inner, directions)

    def _gradient(self, weights: NDArray[np.float32], batch: Batch) -> tuple[NDArray[np.float32], float]:
        assert isinstance(self.runtime, DifferentiableRuntime)
        gradient, loss = self.runtime.gradient(self._inner(weights), batch)
        return gradient[self._kept], loss


@dataclass(frozen=True, eq=False)
class Spread:
    """Directions of what is kept, spread over the whole vector: value ``kept[i]`` of z_k is value i of
    ``perturbation`` over ``layout``, and 0 where nothing is kept.

    ``kept``: ascending indices into the ``n`` parameters of the whole, one a parameter of ``layout``; an
    array library keeps them under ``name``.
    """

    perturbation: Perturbation
    layout: Layout
    kept: NDArray[np.int64]
    n: int
    name: str

    @property
    def spec(self) -> str:
        return self.perturbation.spec

    def values(
        self, stream: Stream, k: int | range, layout: Layout, start: int, stop: int, arrays: Arrays = NUMPY
    ) -> Any:
        """Any slice of the whole alone, ``layout`` being the whole's. Makes no value that is not kept."""
        if not 0 <= start <= stop <= self.n:
            raise ConfigError(f"the slice [{start}, {stop}) leaves the layout's {self.n} parameters")
        a, b = (int(at) for at in np.searchsorted(self.kept, (start, stop)))
        values = self.perturbation.values(stream, k, self.layout, a, b, arrays)
        out = arrays.empty((*values.shape[:-1], stop - start))
        out[...] = 0.0
        places = arrays.constant(self.name, self.kept)[a:b]
        out[..., places - start if start else places] = values
        return out


@dataclass(frozen=True, eq=False)
class SpreadWeights:
    """A source of ``n`` weights: those of ``source`` in the places ``kept``, 0 elsewhere."""

    source: Source
    kept: NDArray[np.int64]
    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n,)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, wanted: slice) -> NDArray[np.float32]:
        start, stop = bounds(wanted, self.n)
        a, b = (int(at) for at in np.searchsorted(self.kept, (start, stop)))
        out, places = np.zeros(stop - start, np.float32), self.kept[a:b]
        out[places - start if start else places] = self.source[a:b]
        return out


def by_magnitude(weights: NDArray[np.float32], layout: Layout, sparsity: float) -> NDArray[np.bool_]:
    """The mask (n,) that drops the smallest of each tensor with two or more dimensions: ⌊sparsity · size⌋.

    Of weights of one magnitude, those first in the vector go first. Biases and scales are kept. The same
    mask on every machine, from the same weights. Raises ConfigError for a sparsity outside [0, 1) and for
    weights of another shape. (Magnitude pruning: Han et al., arXiv:1506.02626, layer by layer.)
    """
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"sparsity {sparsity}: the share of weights to drop lies in [0, 1)")
    if weights.shape != (layout.n,):
        raise ConfigError(f"weights have the shape {weights.shape}, this layout has n = {layout.n}")
    mask = np.ones(layout.n, np.bool_)
    for part, values in zip(layout.split(mask), layout.split(np.abs(weights)), strict=True):
        if part.ndim >= 2:
            order = np.argsort(values, axis=None, kind="stable")
            part.reshape(-1)[order[: int(sparsity * part.size)]] = False
    return mask
