"""What the commands share: images in disjoint groups, a network untrained or trained, results on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from baffle import data, models
from baffle.data import Dataset
from baffle.environment import environment
from baffle.runtimes import Batch
from baffle.runtimes.torch import TorchRuntime

RESULTS = Path(__file__).parent / "results"
SIGMA = 1e-4  # the paper's

Floats = NDArray[np.float64]


def images(folder: Path | None) -> Dataset:
    """MNIST's training images, padded to 32×32 as in the paper; without a folder the packaged digits."""
    return data.load("digits")[0] if folder is None else data.load("mnist", folder)[0].padded(32)


def disjoint(total: int, *sizes: int, seed: int) -> list[NDArray[np.int64]]:
    """Disjoint random groups of ``range(total)``, of these sizes; the rest is not used."""
    if sum(sizes) > total:
        raise ValueError(f"{sum(sizes)} of {total} images were asked for")
    order = np.random.default_rng(seed).permutation(total)
    return np.split(order, np.cumsum(sizes))[:-1]


def lenet(dataset: Dataset, seed: int = 0) -> nn.Module:
    return models.build("lenet", dataset.shape[0], len(dataset.classes), seed=seed).eval()


@dataclass(frozen=True)
class Trained:
    module: nn.Module
    accuracy: float  # on images that nothing was trained on, in percent


def trained(module: nn.Module, dataset: Dataset, on: NDArray[np.int64], test: Batch, epochs: int) -> Trained:
    """``module`` after ``epochs`` by backpropagation (Adam, batch 64): only the weights matter here."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in np.array_split(rng.permutation(on), max(len(on) // 64, 1)):
            inputs, targets = tensors(dataset.batch(chosen))
            loss = nn.functional.cross_entropy(module(inputs), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    inputs, targets = tensors(test)
    with torch.no_grad():
        hits = (module(inputs).argmax(1) == targets).double().mean()
    return Trained(module, 100 * float(hits))


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.asarray(batch.inputs)), torch.from_numpy(np.asarray(batch.targets))


def networks(
    dataset: Dataset, on: NDArray[np.int64], test: Batch, epochs: int
) -> dict[str, tuple[TorchRuntime, float]]:
    """A LeNet with its first weights and one trained on the images ``on``: runtime, test accuracy in %."""
    fresh = trained(lenet(dataset), dataset, on, test, epochs=0)
    after = trained(lenet(dataset), dataset, on, test, epochs)
    return {
        "untrained": (TorchRuntime(fresh.module), fresh.accuracy),
        "trained": (TorchRuntime(after.module), after.accuracy),
    }


def write(name: str, content: dict[str, Any]) -> None:
    """Keeps a result with the machine that made it."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps({"printed_on": environment(), **content}, indent=1) + "\n")
    print(f"written: {target.name}")


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    found = np.asarray(values, dtype=np.float64)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(len(found)))
