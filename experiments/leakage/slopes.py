"""The slopes of each example alone: what a client sums before it uploads."""

from __future__ import annotations

import numpy as np
import torch
from common import SIGMA, Floats, tensors
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from baffle.data import Dataset
from baffle.estimator import SteinEstimator
from baffle.runtimes import Batch
from baffle.runtimes.torch import TorchRuntime
from baffle.stream import Stream

_CHUNK = 128


def directions(runtime: TorchRuntime, stream: Stream, count: int) -> NDArray[np.float32]:
    """Z: z_0 … z_{K−1} as rows (K, n) float32, the ones that clients and server make from the seed."""
    perturbation = SteinEstimator(count).perturbation
    rows: NDArray[np.float32] = perturbation.values(stream, range(count), runtime.layout, 0, runtime.layout.n)
    return rows


def measured(runtime: TorchRuntime, batch: Batch, stream: Stream, count: int) -> Floats:
    """Slopes (K,) of a batch's mean loss as a client uploads them: K + 1 forward passes."""
    return SteinEstimator(count, SIGMA).slopes(runtime, runtime.weights(), batch, stream).slopes


def by_gradients(runtime: TorchRuntime, batch: Batch, rows: NDArray[np.float32]) -> Floats:
    """Slopes (B, K) of every example alone, in the limit σ → 0: z_k·∇L_i, by one backward pass each.

    Differences agree with them up to their own rounding; every command that uses this says how well.
    Memory: a gradient (n,) for each of 128 examples at a time.
    """
    parameters = {name: p.detach() for name, p in runtime.module.named_parameters()}
    z = torch.from_numpy(rows).T

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(runtime.module, weights, (x[None],))
        return nn.functional.cross_entropy(outputs, y[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    inputs, targets = tensors(batch)
    found = []
    for start in range(0, len(inputs), _CHUNK):
        x, y = inputs[start : start + _CHUNK], targets[start : start + _CHUNK]
        pieces = gradients(parameters, x, y)
        flat = torch.cat([pieces[name].reshape(len(x), -1) for name in runtime.layout.names], 1)
        found.append((flat @ z).double())
    return torch.cat(found).numpy()


def population(
    runtime: TorchRuntime, dataset: Dataset, chosen: NDArray[np.int64], rows: NDArray[np.float32]
) -> Floats:
    """`by_gradients` of the chosen images, a few thousand at a time."""
    parts = np.array_split(chosen, max(len(chosen) // 4096, 1))
    return np.concatenate([by_gradients(runtime, dataset.batch(part), rows) for part in parts])


def agreement(one: Floats, other: Floats) -> float:
    """Relative distance ‖a − b‖ / ‖b‖."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
