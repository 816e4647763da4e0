"""What low-rank directions cost and give: `python benchmarks/low_rank.py` prints and keeps both tables.

Speed: K losses by the sweep of `baffle.runtimes.lowrank`, as a share of plain batched inference of as many
samples by the unperturbed model (eager torch, channels-last, at the best of several batch sizes), and beside
one direction after the other, each made whole. Accuracy: runs on the digits that differ in nothing but the
kind of direction.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from cells import cell, write
from torch import Tensor, nn
from torch.func import functional_call
from turns import Turns

from baffle import Layout, Stream, models
from baffle.perturbations import LowRank
from baffle.runtimes.lowrank import factor_numbers, shared_weight_losses
from baffle.runtimes.torch import cross_entropy

BATCH = 32
RANKS = (1, 4)
SIGMA = 1e-4
COPIES = (1, 4, 16)  # batches that plain inference takes at a time
KINDS = ("gaussian", "rademacher", "lowrank:1", "lowrank:4")


def mlp() -> nn.Module:
    layers = [nn.Linear(784, 256), nn.Hardswish(), nn.Linear(256, 256), nn.Hardswish(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


#: Name → (the module, the shape of a sample, directions of a measurement).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LeNet, 1×32×32": (lambda: models.build("lenet", 1, 10, seed=0), (1, 32, 32), 16),
    "WRN-10-2, 3×32×32": (lambda: models.build("wrn-10-2", 3, 10, seed=0), (3, 32, 32), 8),
    "MLP 784-256-256-10": (mlp, (784,), 64),
    "MobileNetV2's head, 1280-1000": (lambda: nn.Linear(1280, 1000), (1280,), 32),
}


def speed(name: str, rank: int, threads: int, turns: int, directions: int | None = None) -> dict[str, Any]:
    """One cell. ``directions`` in place of the network's own number."""
    build, shape, count = NETWORKS[name]
    count = directions or count
    torch.manual_seed(0)
    module = build().eval()
    inputs, targets = torch.randn(BATCH, *shape), torch.randint(0, 10, (BATCH,))
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    origin = {name: p.detach() for name, p in module.named_parameters()}
    layout = Layout(tuple(origin), tuple(tuple(p.shape) for p in origin.values()))
    flat = torch.cat([p.reshape(-1) for p in origin.values()])
    kind, stream = LowRank(rank), Stream(bytes(32), 0)

    def per_sample(weights: Sequence[Tensor]) -> Tensor:
        own = dict(zip(origin, weights, strict=True))
        return cross_entropy(functional_call(module, own, (inputs,), tie_weights=False), targets)

    def sweep() -> None:
        losses = shared_weight_losses(
            per_sample, list(origin.values()), stream, kind, layout, range(count), SIGMA
        )
        assert losses is not None, "this network has no sweep"

    def one_by_one() -> None:
        for k in range(count):
            z = torch.from_numpy(kind.values(stream, k, layout, 0, layout.n))
            per_sample(layout.split(torch.add(flat, z, alpha=SIGMA))).double().mean().item()

    def plain(copies: int) -> Callable[[], None]:
        many = torch.cat([inputs] * copies)  # keeps channels last
        labels = targets.repeat(copies)

        def run() -> None:
            for _ in range(count // copies):
                cross_entropy(module(many), labels).double().mean().item()

        return run

    # Other work on the machine costs the sweep more than plain inference: it moves more memory.
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            candidates: dict[str, Callable[[], object]] = {
                "sweep": sweep,
                "one by one": one_by_one,
                "factors": lambda: factor_numbers(kind, layout, stream, range(count)),
                **{f"plain {copies}": plain(copies) for copies in COPIES if count % copies == 0},
            }
            timed = Turns(candidates, turns)
    finally:
        torch.set_num_threads(before)
    best = timed.quickest(*(name for name in candidates if name.startswith("plain")))
    return {
        "network": name,
        "rank": rank,
        "threads": threads,
        "load_before": load,  # processes that wanted a core in the minute before
        "batch": BATCH,
        "directions": count,
        "share_of_plain": timed.ratio(best, "sweep"),
        "plain": best,
        "over_one_by_one": timed.ratio("one by one", "sweep"),
        "milliseconds_a_direction": {
            name: 1e3 * min(seconds) / count for name, seconds in timed.seconds.items()
        },
        "correction": correction(layout, rank),
    }


def correction(layout: Layout, rank: int) -> float:
    """Multiplications of the rank-r term over those of W x in one layer, the largest: r(o + m)/(o·m)."""
    matrices = [(shape[0], math.prod(shape[1:])) for shape in layout.shapes if len(shape) >= 2]
    o, m = max(matrices, key=math.prod)
    return rank * (o + m) / (o * m)


def accuracy(runs: Path, models_seeds: dict[str, int], **settings: Any) -> list[dict[str, Any]]:
    """Rows of mean ± standard error over seeds, one for each network and kind of direction."""
    rows = []
    for model, seeds in models_seeds.items():
        for kind in KINDS:
            found = [
                cell(
                    runs, data="digits", model=model, perturbation=kind, seed=seed, threads=1, **settings
                ).row()
                for seed in range(seeds)
            ]
            row: dict[str, Any] = {"model": model, "perturbation": kind, "seeds": seeds}
            row |= {"rounds": found[0]["rounds"], "forward_passes": found[0]["forward_passes"]}
            for figure in ("accuracy", "late_loss"):
                values = [r[figure] for r in found]
                row[figure] = fmean(values)
                row[f"{figure}_error"] = stdev(values) / math.sqrt(seeds) if seeds > 1 else 0.0
            rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the training runs are kept")
    parser.add_argument("--quick", action="store_true", help="a glance: nothing is kept")
    options = parser.parse_args()
    turns, directions = (1, 4) if options.quick else (5, None)
    cells = []
    print("network, rank, cores: share of plain inference [quartiles]; times faster than one by one")
    for threads in (1, 2):
        for name in NETWORKS:
            for rank in RANKS:
                row = speed(name, rank, threads, turns, directions)
                share, gain = row["share_of_plain"], row["over_one_by_one"]
                print(
                    f"{name}, {rank}, {threads}: {share['median']:.0%} [{share['low']:.0%}, "
                    f"{share['high']:.0%}]; {gain['median']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]; "
                    f"load {row['load_before']}",
                    flush=True,
                )
                cells.append(row)
    if options.quick:
        trained = accuracy(options.runs, {"mlp": 1}, directions=4, rounds=2, evaluate_every=2)
    else:
        trained = accuracy(options.runs, {"lenet": 3, "mlp": 5}, directions=50, rounds=60, evaluate_every=60)
    for row in trained:
        print(
            f"{row['model']}, {row['perturbation']}: accuracy {row['accuracy']:.2f} ± "
            f"{row['accuracy_error']:.2f} %, late loss {row['late_loss']:.3f} ± {row['late_loss_error']:.3f}"
        )
    if not options.quick:
        write("low-rank", {"sigma": SIGMA, "speed": cells, "accuracy": trained})
    return 0


if __name__ == "__main__":
    sys.exit(main())
