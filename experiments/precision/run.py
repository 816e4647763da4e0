"""Do few bits cost accuracy? Fleets of NumPy clients that hold or compute in less than float32.

    OMP_NUM_THREADS=1 python experiments/precision/run.py --data DIR

MNIST at 14×14, LeNet of 26,730 parameters, twelve iid clients, each a ``NumpyRuntime``; the same seeds for
every fleet. What is done is kept at once, and a run that was stopped goes on where it was. ``--processes``
runs several at a time, ``--show`` writes the tables of the kept results into README.md again, ``--quick``
takes seconds on the packaged digits and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from baffle import data, models
from baffle.bundle import Bundle
from baffle.client import Client
from baffle.environment import environment
from baffle.estimator import SteinEstimator
from baffle.export.torch import from_torch
from baffle.job import Subset
from baffle.perturbations import Gaussian
from baffle.plan import ModelMessage
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.pruned import Pruned, by_magnitude
from baffle.runtimes.torch import TorchRuntime
from baffle.server import Server
from baffle.simulation import simulate
from baffle.stream import Stream, derive_seed, seed_from

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "precision.json"
sys.path.append(str(FOLDER.parents[1] / "benchmarks"))

from report import machine, table  # noqa: E402

Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How a client holds weights and computes."""

    storage: str = "float32"
    arithmetic: str = "float32"


@dataclass(frozen=True)
class Fleet:
    """``kinds`` go around the clients; ``sparsity`` is the share of each layer's weights that is dropped.

    ``refused``: clients would refuse this σ, and the check is switched off for once.
    """

    title: str
    kinds: tuple[Kind, ...] = (Kind(),)
    sigma: float = 1e-4
    scheme: str = "forward"
    sparsity: float = 0.0
    refused: bool = False


KINDS = {
    "float32": Kind(),
    "weights stored in float16": Kind("float16"),
    "weights stored in bfloat16": Kind("bfloat16"),
    "weights stored in int8": Kind("int8"),
    "all arithmetic in float16": Kind(arithmetic="float16"),
    "all arithmetic in bfloat16": Kind(arithmetic="bfloat16"),
}
FLEETS = {
    "float32": Fleet("all float32"),
    "mixed": Fleet(
        "a third each: float32, stored in float16, stored in int8", (Kind(), Kind("float16"), Kind("int8"))
    ),
    "int8": Fleet("all stored in int8", (Kind("int8"),)),
    "float16": Fleet(
        "all arithmetic in float16, σ = 1e-2, central", (Kind(arithmetic="float16"),), 1e-2, "central"
    ),
    "pruned": Fleet("half of the weights pruned, float32", sparsity=0.5),
    "noise": Fleet(
        "all arithmetic in bfloat16, σ = 1e-4: refused but for this row",
        (Kind(arithmetic="bfloat16"),),
        refused=True,
    ),
}
MEASURED = ((1e-2, "central"), (1e-3, "central"), (1e-4, "central"), (1e-4, "forward"))  # σ, scheme


@dataclass(frozen=True)
class Scale:
    """How much is done. ``warm`` steps of backpropagation on ``held`` images of the server's come first."""

    size: int = 14
    held: int = 2000
    warm: int = 45
    clients: int = 12
    directions: int = 50
    rounds: int = 30
    batch_size: int = 8
    learning_rate: float = 0.012
    ema: float = 0.9
    slopes: int = 64  # directions of a correlation
    examples: int = 32  # images of its batch
    seeds: int = 5


# Student's 97.5 % quantiles, from one degree of freedom on.
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)

FULL = Scale()
QUICK = Scale(8, 200, 20, 3, 6, 2, 4, slopes=12, examples=8, seeds=1)


@lru_cache(maxsize=1)
def images(folder: Path | None, size: int) -> tuple[data.Dataset, data.Dataset]:
    if folder is None:
        return data.load("digits")
    train, test = data.load("mnist", folder, size=28)
    return train.resized(size), test.resized(size)


def started(train: data.Dataset, seed: int, scale: Scale) -> TorchRuntime:
    """LeNet after the server's own steps, on the first images of the training set."""
    runtime = TorchRuntime(models.build("lenet", train.shape[0], len(train.classes), seed))
    server = Server(runtime, SteinEstimator(1), seed=seed, fidelity="backprop", batch_size=64, ema=0.0)
    own = Client("server", runtime, Subset(train, np.arange(scale.held)), seed=seed)
    for _ in simulate(server, [own], rounds=scale.warm):
        pass
    runtime.load(server.weights)
    return runtime


def bundle(runtime: TorchRuntime, train: data.Dataset) -> Bundle:
    return from_torch(runtime.module, input_shape=train.shape, classes=train.classes, onnx=False)


def accuracy(runtime: NumpyRuntime, weights: NDArray[np.float32], test: data.Dataset) -> float:
    """Percent of the test set, in float32."""
    right = 0
    for at in range(0, len(test), 500):
        batch = test.batch(slice(at, at + 500))
        right += int((runtime.outputs(weights, batch).argmax(axis=1) == batch.targets).sum())
    return 100 * right / len(test)


def train_fleet(name: str, seed: int, scale: Scale, folder: Path | None) -> Row:
    """One run of a fleet, from the server's own steps to the last round."""
    began, fleet = time.process_time(), FLEETS[name]
    train, test = images(folder, scale.size)
    server_runtime = started(train, seed, scale)
    network = bundle(server_runtime, train)
    mask = by_magnitude(server_runtime.weights(), network.layout, fleet.sparsity)

    def pruned(runtime: Any) -> Any:
        return Pruned(runtime, mask) if fleet.sparsity else runtime

    def device(kind: Kind) -> NumpyRuntime:
        made = NumpyRuntime(network, mode="full", storage=kind.storage, arithmetic=kind.arithmetic)
        if fleet.refused:
            made.check_sigma = lambda sigma: None  # type: ignore[method-assign]
        return made

    measuring = [pruned(device(kind)) for kind in fleet.kinds]
    parts = data.iid(len(train) - scale.held, scale.clients, seed)
    clients = [
        Client(f"client-{i:03d}", measuring[i % len(measuring)], Subset(train, scale.held + part), seed=seed)
        for i, part in enumerate(parts)
    ]
    estimator = SteinEstimator(scale.directions, fleet.sigma, fleet.scheme)
    server = Server(
        pruned(server_runtime),
        estimator,
        seed=seed,
        optimizer=partial(torch.optim.Adam, lr=scale.learning_rate, betas=(0.9, 0.99)),
        ema=scale.ema,
        batch_size=scale.batch_size,
    )
    judge = NumpyRuntime(network, mode="full")

    def judged(weights: NDArray[np.float32]) -> float:
        return accuracy(judge, pruned(judge).whole(weights) if fleet.sparsity else weights, test)

    row: Row = {"fleet": name, "seed": seed, "start": judged(server.weights)}
    records = list(simulate(server, clients, rounds=scale.rounds))
    return row | {
        "accuracy": judged(server.weights),
        "ema": judged(server.ema_weights),
        "n": server.layout.n,
        "model_bytes": len(ModelMessage(server.weights).encode()),
        "forward_passes": estimator.forward_passes * scale.clients * scale.rounds,
        "dropped": sum(record.dropped for record in records),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def correlate(name: str, seed: int, scale: Scale, folder: Path | None) -> Row:
    """Correlation over directions of a client's slopes with z_k·∇L, by float64 backpropagation at the
    server's own weights; a column each for ``MEASURED``, on the first images that clients have."""
    began, kind = time.process_time(), KINDS[name]
    train, _ = images(folder, scale.size)
    trained = started(train, seed, scale)
    network = bundle(trained, train)
    weights, layout = network.weights(), network.layout
    batch = train.batch(slice(scale.held, scale.held + scale.examples))
    gradient, _ = TorchRuntime(trained.module.double()).gradient(weights, batch)
    stream, count = Stream(derive_seed(seed_from(seed), "precision"), 0), range(scale.slopes)
    z = Gaussian().values(stream, count, layout, 0, layout.n).astype(np.float64)
    exact = z @ gradient.astype(np.float64)
    # Not through the estimator: a client would refuse the σ that its arithmetic does not resolve.
    runtime = NumpyRuntime(network, mode="full", storage=kind.storage, arithmetic=kind.arithmetic)
    found = {}
    for sigma, scheme in MEASURED:
        plus = runtime.losses(weights, batch, stream, Gaussian(), count, sigma)
        if scheme == "central":
            minus = runtime.losses(weights, batch, stream, Gaussian(), count, -sigma)
            slopes = (plus - minus) / (2 * sigma)
        else:
            slopes = (plus - runtime.loss(weights, batch)) / sigma
        still = np.ptp(slopes) == 0  # every difference was rounded away
        found[f"{sigma:g} {scheme}"] = 0.0 if still else float(np.corrcoef(slopes, exact)[0, 1])
    return {
        "kind": name,
        "seed": seed,
        "correlation": found,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


# -- what is kept, and how it is shown ---------------------------------------------------------------------


def tasks(scale: Scale) -> Iterator[tuple[str, str, int]]:
    """(table, name, seed), all of a seed before the next."""
    for seed in range(scale.seeds):
        yield from (("fleets", name, seed) for name in FLEETS)
        yield from (("correlations", name, seed) for name in KINDS)


def done(task: tuple[str, str, int], scale: Scale, folder: Path | None) -> Row:
    torch.set_num_threads(1)
    what, name, seed = task
    return (train_fleet if what == "fleets" else correlate)(name, seed, scale, folder)


def measure(scale: Scale, folder: Path | None, processes: int, file: Path | None) -> Row:
    """All that ``file`` does not have yet, written there as it comes."""
    kept: Row = {"scale": asdict(replace(scale, seeds=0)), "fleets": [], "correlations": []}
    if file is not None and file.exists():
        before = json.loads(file.read_text())
        if before["scale"] != kept["scale"]:
            raise SystemExit(f"{file.name} has results of other settings: move it away to begin anew")
        kept = before
    have = {("fleets", row["fleet"], row["seed"]) for row in kept["fleets"]}
    have |= {("correlations", row["kind"], row["seed"]) for row in kept["correlations"]}
    left = [task for task in tasks(scale) if task not in have]
    with ExitStack() as stack:
        if processes > 1:
            pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            futures = {pool.submit(done, task, scale, folder): task for task in left}
            results = ((futures[future][0], future.result()) for future in as_completed(futures))
        else:
            results = ((task[0], done(task, scale, folder)) for task in left)
        for what, row in results:
            print(row, flush=True)
            kept[what].append(row)
            kept["printed_on"] = environment()
            if file is not None:
                beside = file.with_suffix(".part")
                beside.write_text(json.dumps(kept, indent=1) + "\n")
                beside.replace(file)
    for what, name in (("fleets", "fleet"), ("correlations", "kind")):
        kept[what].sort(key=lambda row: (row["seed"], list(FLEETS | KINDS).index(row[name])))
    return kept


def spread(values: list[float]) -> float:
    """Standard error of the mean; NaN of one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def differences(rows: list[Row], name: str) -> list[float]:
    """Percentage points to the float32 fleet of the same seed."""
    ema = {(row["fleet"], row["seed"]): row["ema"] for row in rows}
    return [value - ema["float32", seed] for (fleet, seed), value in ema.items() if fleet == name]


def verdict(found: list[float]) -> str:
    """Mean difference in standard errors, and whether a t test at 5 % takes it for more than noise."""
    mean, error = fmean(found), spread(found)
    if not error > 0:
        return "–"
    ratio, most = mean / error, QUANTILES[min(len(found) - 1, len(QUANTILES)) - 1]
    return f"{ratio:+.1f}, " + (
        "within noise" if abs(ratio) <= most else "**worse**" if mean < 0 else "better"
    )


def page(kept: Row) -> list[str]:
    """Both tables, with what they were printed on."""
    scale, rows = Scale(**kept["scale"]), kept["fleets"]
    lines = []
    for name, fleet in FLEETS.items():
        mine = [row for row in rows if row["fleet"] == name]
        starts, ends = [row["start"] for row in mine], [row["ema"] for row in mine]
        found = differences(rows, name)
        lines.append(
            (
                fleet.title,
                f"{fmean(starts):.1f}",
                f"{fmean(ends):.1f} ± {spread(ends):.1f}",
                "–" if name == "float32" else f"{fmean(found):+.2f} ± {spread(found):.2f}",
                "–" if name == "float32" else verdict(found),
                f"{mine[0]['n']:,}",
                f"{mine[0]['model_bytes'] / 1000:.0f}",
                f"{mine[0]['forward_passes']:,}",
            )
        )
    heads = (
        *("fleet", "accuracy at the start, %", "accuracy after training, %", "difference, points"),
        *("in standard errors", "n", "model, kB", "forward passes"),
    )
    seeds = len({row["seed"] for row in rows})
    first = table(heads, lines)
    cells: dict[str, dict[str, list[float]]] = {}
    for row in kept["correlations"]:
        for column, value in row["correlation"].items():
            cells.setdefault(row["kind"], {}).setdefault(column, []).append(value)
    second = table(
        ("what computes the loss", *(f"σ = {sigma:g}, {scheme}" for sigma, scheme in MEASURED)),
        [(kind, *(f"{fmean(values):.3f}" for values in columns.values())) for kind, columns in cells.items()],
    )
    minutes = sum(row["cpu_seconds"] for row in rows + kept["correlations"]) / 60
    nets = len({row["seed"] for row in kept["correlations"]})
    return [
        *first,
        "",
        f"{seeds} seeds, {scale.rounds} rounds, K = {scale.directions}; accuracy is that of the weights'",
        "moving average on the whole test set, in float32. ± is the standard error over seeds; differences",
        "are those of one seed to the float32 fleet of the same seed. Within noise is what a t test over",
        "these does not tell from 0 at 5 %.",
        "",
        *second,
        "",
        f"Correlation of {scale.slopes} slopes with z·∇L, by float64 backpropagation at the weights that the",
        f"server sent, those at the start; mean over {nets} networks, batches of {scale.examples}.",
        "",
        f"`python experiments/precision/run.py --data DIR`: {minutes:.0f} minutes of one core. "
        + machine({"machine": kept["printed_on"]}),
    ]


def inserted(text: str, lines: list[str]) -> str:
    """``text`` with ``lines`` between its two marks."""
    block = "\n".join(["<!-- precision -->", *lines, "<!-- /precision -->"])
    return re.sub("<!-- precision -->.*?<!-- /precision -->", lambda _: block, text, flags=re.DOTALL)


def show(kept: Row) -> None:
    readme = FOLDER / "README.md"
    readme.write_text(inserted(readme.read_text(), page(kept)))
    print("\n".join(page(kept)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder with MNIST's four files")
    parser.add_argument("--seeds", type=int, default=FULL.seeds)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        print("\n".join(page(measure(QUICK, None, 1, None))))
    elif options.show:
        show(json.loads(RESULTS.read_text()))
    elif options.data is None:
        parser.error("--data DIR is needed: the folder with MNIST's four files")
    else:
        RESULTS.parent.mkdir(exist_ok=True)
        show(measure(replace(FULL, seeds=options.seeds), options.data, options.processes, RESULTS))


if __name__ == "__main__":
    main()
