"""Epoch-level communication: the steps a client takes alone between two uploads, in plain NumPy.

A device has no training framework, so the two optimizers that the paper's experiments need are here;
each equals its torch twin to float32 rounding (a test holds them to that).
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.plan import LocalTraining

Vector = NDArray[np.float32]


class Step(Protocol):
    def __call__(self, weights: Vector, gradient: Vector) -> None:
        """Changes ``weights`` (n,) in place."""


class Sgd:
    """w ← w − lr·g."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def __call__(self, weights: Vector, gradient: Vector) -> None:
        weights -= np.float32(self.learning_rate) * gradient


class Adam:
    """Kingma & Ba 2015 with the paper's β = (0.9, 0.99) and ε = 1e-8. Memory: 2n numbers."""

    def __init__(self, learning_rate: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.learning_rate, self.betas, self.steps = learning_rate, betas, 0
        self.mean: Vector | float = 0.0
        self.square: Vector | float = 0.0

    def __call__(self, weights: Vector, gradient: Vector) -> None:
        b1, b2 = self.betas
        self.steps += 1
        self.mean = (b1 * self.mean + (1 - b1) * gradient).astype(np.float32)
        self.square = (b2 * self.square + (1 - b2) * gradient * gradient).astype(np.float32)
        rate = self.learning_rate / (1 - b1**self.steps)
        root = np.sqrt(self.square) / np.float32(np.sqrt(1 - b2**self.steps)) + np.float32(1e-8)
        weights -= np.float32(rate) * self.mean / root


def optimizer_for(local: LocalTraining) -> Step:
    """A fresh local optimizer: nothing is kept from round to round."""
    return Adam(local.learning_rate) if local.optimizer == "adam" else Sgd(local.learning_rate)


def clip_inf_norm(gradient: Vector, bound: float) -> Vector:
    """``gradient`` scaled down so that its largest entry is at most ``bound``; 0 means no bound.

    It scales the whole vector, as the authors' code does (torch's ``clip_grad_norm_`` with the inf-norm).
    A gradient that is not finite comes back as it is.
    """
    if bound <= 0:
        return gradient
    largest = float(np.abs(gradient).max(initial=0.0))
    if largest <= bound or not math.isfinite(largest):
        return gradient
    return gradient * np.float32(bound / largest)
