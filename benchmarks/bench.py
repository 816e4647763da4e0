"""The table of ratios: `python benchmarks/bench.py`, or `make bench` and `make bench-check`.

    bench.py                     measures every cell, prints the table, keeps it in results/performance.json
    bench.py --only 1,4          measures the cells of these items of the table and keeps the others
    bench.py --read --check      measures nothing: judges what is kept; exit 1 where a row falls short
    bench.py --quick             every cell on next to nothing: shows that all runs; keeps nothing

Each cell is a function of ``measurements.py`` in a process of its own, bound to the cores that it names.
About ten minutes on two cores that have nothing else to do; on busy ones the ratios of two cores say little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from baffle.environment import environment

FILE = Path(__file__).parent / "results" / "performance.json"

Cells = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A function of ``measurements.py``, its arguments after the size, and the cores to run it on."""

    item: int  # of the table
    function: str
    cores: int = 1
    arguments: tuple[Any, ...] = ()
    cuda: bool = False


CELLS: dict[str, Cell] = {
    "limits, 1 core": Cell(0, "limits"),
    "limits, 2 cores": Cell(0, "limits", 2),
    "LeNet, 1 core": Cell(1, "forwards", 1, ("lenet",)),
    "LeNet, 2 cores": Cell(1, "forwards", 2, ("lenet",)),
    "WRN-10-2, 1 core": Cell(1, "forwards", 1, ("wrn-10-2",)),
    "WRN-10-2, 2 cores": Cell(1, "forwards", 2, ("wrn-10-2",)),
    "frozen prefix, 1 core": Cell(2, "prefix"),
    "frozen prefix, 2 cores": Cell(2, "prefix", 2),
    "perturbations, 1 core": Cell(3, "perturbations"),
    "reconstruction, 1 core": Cell(4, "reconstruction"),
    "reconstruction, 2 cores": Cell(4, "reconstruction", 2),
    "memory of a tenth of K": Cell(4, "reconstruction_memory", 2, (10,)),
    "memory of K": Cell(4, "reconstruction_memory", 2, (1,)),
    "tangent, 1 core": Cell(5, "tangent"),
    "low rank, 1 core": Cell(5, "low_rank"),
    "law, 1 core": Cell(6, "law"),
    "engine, 1 core": Cell(7, "engine_overhead"),
    "limits, GPU": Cell(0, "limits", 2, ("cuda",), cuda=True),
    "tangent, GPU": Cell(5, "tangent", 2, ("cuda",), cuda=True),
    "LeNet, GPU": Cell(9, "forwards", 2, ("lenet", "cuda"), cuda=True),
    "WRN-10-2, GPU": Cell(9, "forwards", 2, ("wrn-10-2", "cuda"), cuda=True),
}


@dataclass(frozen=True)
class Row:
    """A figure of a cell and what it should reach; without a bound it is there to be read."""

    item: int
    words: str
    cell: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def verdict(self, cells: Mapping[str, Any]) -> str:
        """``reached``, ``short``, ``not measured``, or nothing where there is no bound."""
        found = value(cells, self)
        if found is None:
            return "not measured"
        if self.at_least is None and self.at_most is None:
            return ""
        low, high = self.at_least or float("-inf"), self.at_most or float("inf")
        return "reached" if low <= found <= high else "short"

    @property
    def optional(self) -> bool:
        """True where a machine may lack what the row needs."""
        return CELLS[self.cell].cuda if self.cell in CELLS else False


def _forwards() -> Iterator[Row]:
    """Item 1: twice the cores should be twice the ratio to the same loop on one thread."""
    for name in ("LeNet", "WRN-10-2"):
        one, two = f"{name}, 1 core", f"{name}, 2 cores"
        figure = "reference alone / engine"
        yield Row(1, f"{name}: reference loop / engine, one core", one, figure, at_least=2.5)
        words = f"{name}: reference loop, large blocks freed before / engine, one core"
        yield Row(1, words, one, "reference / engine", at_least=2.5)
        figure = "reference alone on one thread / engine"
        yield Row(1, f"{name}: reference loop on one core / engine on two", two, figure, at_least=5)
        words = f"{name}: … on one core, large blocks freed before / engine on two"
        yield Row(1, words, two, "reference on one thread / engine", at_least=5)
        figure = "reference alone / engine"
        yield Row(1, f"{name}: reference loop on two threads / engine on two", two, figure)
        for cell, cores in ((one, "one core"), (two, "two")):
            figure = "engine / ONNX Runtime"
            yield Row(
                1, f"{name}: engine / ONNX Runtime with constant weights, {cores}", cell, figure, at_most=1.25
            )
        yield Row(1, f"{name}: engine / plain eager inference, one core", one, "engine / eager")
        yield Row(1, f"{name}: K = 100 / one backward pass, one core", one, "engine / backprop")
        figure = "engine / square product, GFLOP/s"
        yield Row(1, f"{name}: operations/s / those of a square product, one core", one, figure)


ROWS: tuple[Row, ...] = (
    *_forwards(),
    Row(
        2,
        "Frozen prefix: K = 100 slopes / one forward pass",
        "frozen prefix, 1 core",
        "slopes / one pass",
        at_most=1.5,
    ),
    Row(
        2, "Frozen prefix, cached features", "frozen prefix, 1 core", "cached slopes / one pass", at_most=0.2
    ),
    Row(2, "Frozen prefix, two cores", "frozen prefix, 2 cores", "slopes / one pass", at_most=1.5),
    Row(
        2,
        "Frozen prefix, cached features, two cores",
        "frozen prefix, 2 cores",
        "cached slopes / one pass",
        at_most=0.2,
    ),
    Row(3, "torch.randn / Gaussian, one core", "perturbations, 1 core", "torch.randn / Gaussian", at_least=3),
    Row(
        3,
        "torch.randn / Rademacher, one core",
        "perturbations, 1 core",
        "torch.randn / Rademacher",
        at_least=10,
    ),
    Row(
        4,
        "Reconstruction / generation alone, one core",
        "reconstruction, 1 core",
        "gradient / generate",
        at_most=2,
    ),
    Row(
        4,
        "Reconstruction / generation alone, two cores",
        "reconstruction, 2 cores",
        "gradient / generate",
        at_most=2,
    ),
    Row(4, "Same bits on one core and on two (1: yes)", "derived", "same bits", at_least=1),
    Row(4, "Extra memory at K = 500 / at K = 50", "derived", "memory of K / of K/10", at_most=1.25),
    Row(4, "Extra memory at K = 500 / the gradient's", "memory of K", "extra / gradient"),
    Row(
        5,
        "Tangent, float32: 1 − correlation with the exact derivative",
        "tangent, 1 core",
        "1 − correlation, float32",
        at_most=1e-4,
    ),
    Row(
        5,
        "Tangent, bfloat16: 1 − correlation with the exact derivative",
        "tangent, 1 core",
        "1 − correlation, bfloat16",
        at_most=1e-4,
    ),
    Row(5, "Forward / tangent, time of K directions, one core", "tangent, 1 core", "forward / tangent"),
    Row(5, "Forward / tangent in bfloat16, one core", "tangent, 1 core", "forward / tangent in bfloat16"),
    Row(
        5,
        "Tangent, bfloat16 on the GPU: 1 − correlation",
        "tangent, GPU",
        "1 − correlation, bfloat16",
        at_most=1e-4,
    ),
    Row(
        5,
        "Forward / tangent in bfloat16 on the GPU",
        "tangent, GPU",
        "forward / tangent in bfloat16",
        at_least=4,
    ),
    *(
        Row(
            5,
            f"Rank-1 directions / plain inference of {name}, one core",
            "low rank, 1 core",
            f"share of plain, {name}",
        )
        for name in ("LeNet", "WRN-10-2", "MLP", "MobileNetV2's")
    ),
    *(
        Row(6, f"Law / backprop round, K = {k}", "law, 1 core", f"law / backprop, K = {k}", at_most=1.2)
        for k in (100, 500, 1000, 5000)
    ),
    Row(6, "Law / plain torch training, K = 500", "law, 1 core", "law / plain torch, K = 500"),
    Row(
        6,
        "20 epochs of MNIST, LeNet, K = 500 forward-only: hours (extrapolated)",
        "LeNet, 2 cores",
        "20 epochs of MNIST, hours",
    ),
    Row(7, "Engine's share of a round, 100 clients", "engine, 1 core", "share, 100 clients", at_most=0.1),
    Row(7, "Engine's share of a round, 1000 clients", "engine, 1 core", "share, 1000 clients", at_most=0.1),
    Row(7, "Bytes a further client adds", "engine, 1 core", "bytes a client"),
    Row(7, "… / bytes of the model", "engine, 1 core", "bytes a client / model", at_most=0.1),
    Row(9, "LeNet on the GPU: reference loop / engine", "LeNet, GPU", "reference / engine", at_least=50),
    Row(
        9, "WRN-10-2 on the GPU: reference loop / engine", "WRN-10-2, GPU", "reference / engine", at_least=20
    ),
    Row(
        9,
        "LeNet on the GPU: operations/s / those of a square float32 product",
        "LeNet, GPU",
        "engine / square product, GFLOP/s",
    ),
    Row(
        9,
        "WRN-10-2 on the GPU: operations/s / those of a square float32 product",
        "WRN-10-2, GPU",
        "engine / square product, GFLOP/s",
    ),
    Row(
        9,
        "20 epochs of MNIST, LeNet, K = 500 on the GPU: hours (extrapolated)",
        "LeNet, GPU",
        "20 epochs of MNIST, hours",
    ),
)


def derived(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Figures that lie between two cells."""
    figures: dict[str, float] = {}
    one, two = (cells.get(f"reconstruction, {n}", {}).get("digest") for n in ("1 core", "2 cores"))
    if one and two:
        figures["same bits"] = float(one == two)
    less, more = (
        cells.get(f"memory of {what}", {}).get("figures", {}).get("extra, MB")
        for what in ("a tenth of K", "K")
    )
    if less and more:
        figures["memory of K / of K/10"] = more / less
    return {"figures": figures}


def figure(cells: Mapping[str, Any], row: Row) -> Any:
    source = derived(cells) if row.cell == "derived" else cells.get(row.cell, {})
    return source.get("figures", {}).get(row.figure)


def value(cells: Mapping[str, Any], row: Row) -> float | None:
    """The row's figure; of a ratio, the median."""
    found = figure(cells, row)
    number: float | None = found["median"] if isinstance(found, dict) else found
    return number


def shown(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def table(cells: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Item, words, measured, quartiles of the turns, aim, verdict."""
    lines = []
    for row in ROWS:
        found, number = figure(cells, row), value(cells, row)
        spread = f"{shown(found['low'])} to {shown(found['high'])}" if isinstance(found, dict) else ""
        aim = f"≥ {row.at_least:g}" if row.at_least is not None else ""
        aim = f"≤ {row.at_most:g}" if row.at_most is not None else aim
        measured = "–" if number is None else shown(number)
        lines.append((str(row.item), row.words, measured, spread, aim, row.verdict(cells)))
    return lines


def shortfalls(cells: Mapping[str, Any]) -> list[str]:
    """A line for each row that misses its aim, or was not measured though every machine can."""
    lines = []
    for row in ROWS:
        verdict = row.verdict(cells)
        if verdict == "short":
            aim = f"at least {row.at_least:g}" if row.at_least is not None else f"at most {row.at_most:g}"
            lines.append(f"short: {row.words}: {shown(value(cells, row) or 0.0)}, {aim} was the aim")
        elif verdict == "not measured" and not row.optional:
            lines.append(f"not measured: {row.words}")
    return lines


# Measuring


def measure(name: str, quick: bool) -> dict[str, Any]:
    """One cell in this process, on the cores that the process has."""
    import measurements
    import torch

    cell = CELLS[name]
    if cell.cuda and not torch.cuda.is_available():
        if not quick:
            return {}
        cell = replace(cell, arguments=(*cell.arguments[:-1], "cpu"))
    if not quick:
        torch.set_num_threads(cell.cores)
    size = measurements.QUICK if quick else measurements.FULL
    run: Callable[..., dict[str, Any]] = getattr(measurements, cell.function)
    return run(size, *cell.arguments)


def apart(script: str, *arguments: str, cores: int) -> dict[str, Any] | None:
    """What ``script`` prints last, from a process on exactly ``cores`` cores; None where there are fewer."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if affinity and len(affinity) < cores:
        return None

    def bind() -> None:
        if affinity:
            os.sched_setaffinity(0, affinity[-cores:])

    threads = {f"{kind}_NUM_THREADS": str(cores) for kind in ("OMP", "MKL", "NUMBA")}
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | threads,
        preexec_fn=bind,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    """The environment, with the packages that only the speed depends on."""
    found = environment()
    for name in ("numba", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["versions"][name] = metadata.version(name)
    return found


def commit() -> str:
    """The short hash of what was measured, with a + where the working tree differs from it."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def read() -> Cells:
    """What is kept, in the order of ``CELLS``."""
    found = json.loads(FILE.read_text())["cells"] if FILE.exists() else {}
    return {name: found[name] for name in CELLS if name in found}


def keep(cells: Cells) -> None:
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(
        json.dumps(
            {"printed_on": machine(), "cells": {name: cells[name] for name in CELLS if name in cells}},
            indent=1,
        )
        + "\n"
    )


def rounded(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: rounded(inner) for name, inner in found.items()}
    return float(f"{found:.4g}") if isinstance(found, float) else found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="items of the table to measure, e.g. 1,3; 0 is the machine's limits")
    parser.add_argument("--check", action="store_true", help="exit 1 where a row falls short")
    parser.add_argument("--read", action="store_true", help="measure nothing: take what is kept")
    parser.add_argument("--quick", action="store_true", help="every cell on next to nothing; keeps nothing")
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(rounded(measure(options.cell, quick=False))))
        return 0
    items = (
        {int(item) for item in options.only.split(",")} if options.only else {c.item for c in CELLS.values()}
    )
    cells = {} if options.quick else read()
    for name, cell in CELLS.items():
        if options.read or cell.item not in items:
            continue
        started, load = time.perf_counter(), os.getloadavg()[0]
        if options.quick:
            found = measure(name, quick=True)
        else:
            found = apart(__file__, "--cell", name, cores=cell.cores) or {}
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        cells.pop(name, None)
        if found:
            cells[name] = {**found, "load": round(load, 1), "commit": commit(), "machine": machine()}
            if not options.quick:
                keep(cells)
    for line in table(cells):
        print("{:>2}  {:70} {:>8}  {:18} {:>8}  {}".format(*line))
    if options.quick:  # figures of nothing
        return 0
    missed = shortfalls(cells)
    print("\n".join(missed))
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
