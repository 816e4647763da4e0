"""Whether two runtimes compute the same network: asked before a bundle is given out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError
from baffle.perturbations import Gaussian, Layout, Perturbation
from baffle.runtimes import Batch
from baffle.stream import Stream, seed_from

RTOL = 2e-4  # of a sample's loss: float32 sums in another order, through the deepest network here


class Examining(Protocol):
    """A runtime that tells samples apart."""

    @property
    def layout(self) -> Layout: ...

    @property
    def frozen_digest(self) -> bytes: ...

    def weights(self) -> NDArray[np.float32]: ...

    def example_losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]: ...


def check_equal(wanted: Examining, got: Examining, batch: Batch) -> None:
    """Raises ConfigError where two runtimes differ in layout, digest or a sample's loss, at W or beside it.

    Cost: three forward passes of each.
    """
    name = type(got).__name__
    if wanted.layout != got.layout or wanted.frozen_digest != got.frozen_digest:
        raise ConfigError(f"{name} has another layout, or other frozen tensors: plans would not fit it")
    w, stream = wanted.weights(), Stream(seed_from(0), 0)
    for directions, scale in ((range(1), 0.0), (range(2), 0.01)):
        a = wanted.example_losses(w, batch, stream, Gaussian(), directions, scale)
        b = got.example_losses(w, batch, stream, Gaussian(), directions, scale)
        if not np.allclose(a, b, rtol=RTOL, atol=RTOL * float(np.abs(a).mean())):
            worst = float(np.abs(a - b).max())
            raise ConfigError(
                f"{name} computes other losses than {type(wanted).__name__}: they differ by up to {worst:.2g}"
            )
