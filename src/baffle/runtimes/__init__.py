"""What can evaluate a loss: the one interface between BAFFLE and an inference engine.

A runtime knows a model, its per-sample loss and nothing of federation. It never draws its own
noise: directions come from (stream, perturbation), so that every runtime measures the same z_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from baffle.errors import PrecisionError
from baffle.perturbations import Layout, Perturbation
from baffle.stream import Stream

# The smallest σ whose slopes still follow the exact directional derivative (correlation ≥ 0.99; LeNet,
# central), by the coarsest type in the forward pass. `baffle doctor` measures them on this machine.
USABLE_SIGMA = {"float64": 1e-8, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


def check_sigma(sigma: float, arithmetic: str) -> None:
    """Raises PrecisionError where a type, by its name, cannot resolve ``sigma``."""
    usable = USABLE_SIGMA.get(arithmetic)
    if usable is None:
        raise PrecisionError(f"{arithmetic} arithmetic cannot measure slopes: use float32")
    if sigma < usable:
        raise PrecisionError(
            f"σ = {sigma:g} lies below what {arithmetic} arithmetic resolves: use σ ≥ {usable:g} with the "
            "central scheme, or keep the weights' noise and the forward pass in float32"
        )


class Batch(NamedTuple):
    """Samples of one loss evaluation: ``inputs`` (B, ...) and ``targets`` (B, ...).

    ``prefixed`` says that the inputs already went through the model's frozen prefix.
    """

    inputs: NDArray[np.generic]
    targets: NDArray[np.generic]
    prefixed: bool = False


class Runtime(Protocol):
    """Evaluates the mean loss of a batch at W and at W + scale·z_k. Weights are flat float32 (n,)."""

    @property
    def layout(self) -> Layout:
        """Names and shapes of the trainable parameters, in the order of the flat vector."""
        ...

    @property
    def frozen_digest(self) -> bytes:
        """SHA-256 (32 bytes) over everything that is not trained: frozen parameters, buffers."""
        ...

    def weights(self) -> NDArray[np.float32]:
        """A copy of the model's own trainable parameters, flat float32 (n,)."""
        ...

    def check_sigma(self, sigma: float) -> None:
        """Raises PrecisionError where this runtime's arithmetic cannot resolve ``sigma``."""
        ...

    def loss(self, weights: NDArray[np.float32], batch: Batch) -> float:
        """Mean per-sample loss at W, accumulated in float64. Cost: one forward pass."""
        ...

    def losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        """Mean losses (len(directions),) at W + scale·z_k. Cost: one forward pass a direction."""
        ...


# What a runtime may do besides. These protocols hold methods alone: to look for a property, `isinstance`
# would compute it, and `frozen_digest` reads a whole model.


@runtime_checkable
class DifferentiableRuntime(Protocol):
    """A runtime that can backpropagate too: for baselines and the law simulator, never on a device."""

    def gradient(self, weights: NDArray[np.float32], batch: Batch) -> tuple[NDArray[np.float32], float]:
        """The gradient (n,) of the batch's mean loss at W, and that loss. Cost: one backward pass."""
        ...


@runtime_checkable
class TangentRuntime(Protocol):
    """A runtime that can propagate derivatives forward: for the scheme ``tangent``."""

    def derivatives(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
    ) -> tuple[float, NDArray[np.float64]]:
        """The batch's mean loss at W, and its derivatives (len(directions),) along z_k, both float64.

        z_k is carried in its own scale, so nothing is subtracted and no σ is needed. Raises ConfigError
        for a model that it cannot go through. Cost: about two forward passes a direction.
        """
        ...


@runtime_checkable
class HoldingRuntime(Protocol):
    """A runtime that can keep what every measurement of one batch begins with."""

    def holding(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside, what does not depend on W is computed once for ``batch``, which nobody changes."""
        ...


@runtime_checkable
class ExampleRuntime(Protocol):
    """A runtime that can tell the samples of a batch apart: for the privacy of an example."""

    def example_losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        """Losses (len(directions), B) of each sample alone at W + scale·z_k.

        Their means are ``losses``, to rounding. Raises ConfigError where a sample's loss depends on which
        others are in the batch. Cost: one forward pass a direction.
        """
        ...


class LayerCost(NamedTuple):
    """Shares of a forward pass, in (0, 1], by multiplications: what measurements in one layer cost."""

    direction: float  # along a direction of the whole layer
    coordinate: float  # along a coordinate of it, where all of them are measured


@runtime_checkable
class LayerRuntime(Protocol):
    """A runtime that, for directions in one layer (``Layers``), keeps what lies before that layer."""

    def layer_costs(self, batch: Batch) -> tuple[LayerCost, ...]:
        """What a direction in each layer costs."""
        ...
