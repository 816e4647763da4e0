"""Epoch-level communication: the steps a client takes alone between two uploads, in plain NumPy.

A device has no training framework: the two optimizers that the paper's experiments need are rules
(``baffle.rules``), with a state that lasts as long as the round.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.plan import LocalTraining
from baffle.rules import Rule, clip_inf_norm

__all__ = ["Adam", "Sgd", "Step", "clip_inf_norm", "optimizer_for"]

Vector = NDArray[np.float32]


class Step(Protocol):
    def __call__(self, weights: Vector, gradient: Vector) -> None:
        """Changes ``weights`` (n,) in place."""


class _Steps:
    def __init__(self, rule: Rule) -> None:
        self.rule, self.steps = rule, 0
        self._arrays: dict[str, Vector] = {}

    def __call__(self, weights: Vector, gradient: Vector) -> None:
        if self.steps == 0:
            self._arrays = dict(self.rule.fresh(len(weights)).arrays)
        self.steps += 1
        self.rule.advance(weights, self._arrays, gradient, self.steps)


class Sgd(_Steps):
    """w ← w − lr·g."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__(Rule("sgd", learning_rate))


class Adam(_Steps):
    """Kingma & Ba 2015 with the paper's β = (0.9, 0.99) and ε = 1e-8. Memory: 2n numbers."""

    def __init__(self, learning_rate: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(Rule("adam", learning_rate, *betas))


def optimizer_for(local: LocalTraining) -> Step:
    """A fresh local optimizer: nothing is kept from round to round."""
    return Adam(local.learning_rate) if local.optimizer == "adam" else Sgd(local.learning_rate)
