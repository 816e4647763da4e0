"""A federation small enough to check by hand: a runtime in NumPy alone, and its clients' samples."""

import numpy as np

from baffle.perturbations import Layout
from baffle.runtimes import Batch

K, N = 6, 20


class Slope:
    """L(w) of a client's own: (w − t)²/2 averaged over n parameters and its samples t."""

    layout, frozen_digest = Layout.flat(N), bytes(32)
    factor = 1.0

    def weights(self):
        return np.linspace(-1, 1, N, dtype=np.float32)

    def check_sigma(self, sigma):
        pass

    def loss(self, weights, batch):
        return self.factor * float(np.mean((weights.astype(np.float64) - batch.inputs[:, None]) ** 2)) / 2

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        wide = weights.astype(np.float64)
        z = (perturbation.values(stream, k, self.layout, 0, N) for k in directions)
        return np.array([self.loss(wide + scale * row, batch) for row in z])

    def gradient(self, weights, batch):
        return (weights - batch.inputs.mean()) / np.float32(N), self.loss(weights, batch)


class Points:
    """``count`` samples t, drawn from ``seed``."""

    def __init__(self, count, seed):
        self.points = np.random.default_rng(seed).normal(size=count)

    def __len__(self):
        return len(self.points)

    def batch(self, indices):
        return Batch(self.points[indices], self.points[indices])
