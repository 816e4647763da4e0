"""Where a direction's time goes, and what other ways through the directions take: results/profile.json.

    python benchmarks/profile_steps.py

One core, LeNet 1×32×32 and WRN-10-2 3×32×32 at batch 32. A step's time is the least of many passes (the
machine is shared); the alternatives run in turns, and each figure is the median of its quotient with the
engine's time within a turn. About three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench
import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from baffle import Batch, Gaussian, SteinEstimator, Stream, TorchRuntime, models
from baffle.runtimes.program import Program
from baffle.runtimes.steps import Memory

FILE = Path(__file__).parent / "results" / "profile.json"
NETWORKS = {"LeNet": ("lenet", 1), "WRN-10-2": ("wrn-10-2", 3)}


def batch_for(channels: int, count: int = 32, size: int = 32) -> Batch:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((count, channels, size, size)).astype(np.float32)
    return Batch(inputs, rng.integers(0, 10, count))


def steps(name: str, channels: int, passes: int, batch: Batch) -> dict[str, float]:
    """Milliseconds of each kind of step of one direction."""
    runtime = TorchRuntime(models.build(name, channels, 10, seed=0))
    weights, stream, layout = runtime.weights(), Stream(bytes(32), 0), runtime.layout
    program = Program.of(runtime._part)
    if program is None:
        raise SystemExit("the compiled kernels are not there: install numba")
    objective, origin = runtime._objective(batch), torch.from_numpy(weights.copy())
    inputs, memory = program.enter(objective), Memory()
    spent: dict[str, float] = {}  # in one pass: a step may run several times, on some of the images
    least: dict[str, float] = {}

    def timed(kind: str, run: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = run(*arguments)
        spent[kind] = spent.get(kind, 0.0) + time.perf_counter() - started
        return result

    def end_of_pass() -> None:
        for kind, seconds in spent.items():
            least[kind] = min(least.get(kind, seconds), seconds)
        spent.clear()

    program.steps.rows = [
        (node, partial(timed, f"{program.steps.describe(node)} ({node})", step), dead)
        for node, step, dead in program.steps.rows
    ]
    estimator = SteinEstimator(passes)
    with torch.inference_mode():
        for k in range(passes):
            z = timed("direction", Gaussian().values, stream, k, layout, 0, layout.n)
            flat = timed("direction added", partial(torch.add, alpha=1e-4), origin, torch.from_numpy(z))
            outputs = program.outputs(objective.part.cast(flat), inputs, memory)
            timed("loss", lambda o: float(objective.checked(o).double().mean()), outputs)
            end_of_pass()
        for _ in range(3):
            timed("gradient, a direction", estimator.gradient, np.ones(passes), stream, layout)
            end_of_pass()
    least["gradient, a direction"] /= passes
    total: dict[str, float] = {}
    for kind, seconds in least.items():
        what = kind.split(" (")[0]
        total[what] = total.get(what, 0.0) + 1e3 * seconds
    return total


def alternatives(name: str, channels: int, directions: int, turns: int, batch: Batch) -> dict[str, Any]:
    """Other ways to the same K losses, as multiples of the engine's time."""
    module = models.build(name, channels, 10, seed=0).eval()
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    engine, plain = TorchRuntime(module), TorchRuntime(module)
    plain._sweeps._programmable = False
    weights, named = engine.weights(), dict(module.named_parameters())
    z = torch.from_numpy(
        Gaussian().values(Stream(bytes(32), 0), range(directions), engine.layout, 0, len(weights))
    )
    points = torch.from_numpy(weights) + 1e-4 * z

    def loss(flat: Tensor, x: Tensor) -> Tensor:
        tensors = dict(zip(named, engine.layout.split(flat), strict=True))
        return cross_entropy(functional_call(module, tensors, (x,)), targets)

    def by(runtime: TorchRuntime) -> Callable[[], object]:
        return lambda: runtime.losses(
            weights, batch, Stream(bytes(32), 0), Gaussian(), range(directions), 1e-4
        )

    nhwc = inputs.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], object]] = {
        "engine": by(engine),
        "engine without the compiled kernels": by(plain),
        "functional call, image layout of torch": lambda: [float(loss(p, inputs)) for p in points],
        "functional call, inputs alone NHWC": lambda: [float(loss(p, nhwc)) for p in points],
        "vmap over the directions (grouped convolutions)": lambda: vmap(loss, (0, None))(points, inputs),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for run in ways.values():
            run()
        for _ in range(turns):
            for way, run in ways.items():
                started = time.perf_counter()
                run()
                found[way].append(time.perf_counter() - started)
    return {
        way: median(a / b for a, b in zip(spent, found["engine"], strict=True))
        for way, spent in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="next to nothing; keeps nothing")
    quick = parser.parse_args(arguments).quick
    if not quick and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"steps": {}, "alternatives": {}}
    for words, (name, channels) in NETWORKS.items():
        batch = batch_for(channels, *((2, 8) if quick else ()))
        result["steps"][words] = steps(name, channels, 2 if quick else 60, batch)
        result["alternatives"][words] = alternatives(
            name, channels, 2 if quick else 10, 1 if quick else 7, batch
        )
    torch.set_num_threads(before)
    for part, networks in result.items():
        for words, figures in networks.items():
            for what, figure in figures.items():
                print(f"{part:13} {words:9} {what:50} {figure:8.3f}")
    if not quick:
        result = {"printed_on": bench.machine(), "commit": bench.commit(), **bench.rounded(result)}
        FILE.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
