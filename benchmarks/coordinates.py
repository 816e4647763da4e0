"""What a gradient along all coordinates takes: `python benchmarks/coordinates.py` prints and keeps the table.

LeNet, each coordinate moved and the loss measured (`baffle.runtimes.coordinates`), in turns with 40 Gaussian
directions, of which one is a forward pass: the ratio of times beside what the runtime counts, and how far the
estimate lies from the gradient by autograd.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from cells import write
from turns import Turns

from baffle import Batch, Layers, SteinEstimator, Stream, TorchRuntime, models

PASSES = 40
# Channels and side of the images, samples of a batch.
CASES = ((1, 32, 32), (1, 32, 4), (3, 32, 32), (1, 16, 32))


def measured(channels: int, side: int, batch: int, turns: int, sigma: float = 1e-4) -> dict[str, Any]:
    """One case, at random weights and on noise."""
    runtime = TorchRuntime(models.build("lenet", channels, 10, seed=0))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, channels, side, side)).astype(np.float32)
    data, weights = Batch(images, rng.integers(0, 10, batch)), runtime.weights()
    layout = runtime.layout
    layers = Layers(tuple(stop - start for _, start, stop in layout.layers))
    whole = SteinEstimator(layout.n, sigma, perturbation=layers)
    passes, stream = SteinEstimator(PASSES, sigma), Stream(bytes(32), 0)
    candidates = {
        "coordinates": lambda: whole.slopes(runtime, weights, data, stream),
        "passes": lambda: passes.slopes(runtime, weights, data, stream),
    }
    clock = Turns(candidates, turns)
    found = whole.slopes(runtime, weights, data, stream)
    exact, _ = runtime.gradient(weights, data)
    error = whole.gradient(found.slopes, stream, layout) - exact
    return {
        "images": f"{channels}×{side}×{side}",
        "batch": batch,
        "directions": layout.n,
        "seconds": round(min(clock.seconds["coordinates"]), 3),
        "by_the_clock": clock.ratio("coordinates", "passes", PASSES + 1),
        "counted": found.forward_passes,
        "error": float(np.linalg.norm(error) / np.linalg.norm(exact)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the table's rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(*case, options.turns) for case in CASES[: options.cases]]
    for row in rows:
        print(row)
    if options.cases == len(CASES):
        write("coordinates", {"rows": rows})


if __name__ == "__main__":
    main()
