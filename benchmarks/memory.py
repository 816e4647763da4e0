"""Peak memory of whole processes that measure slopes, and of one that backpropagates: `make bench-memory`.

    memory.py                   every cell, kept in results/memory.json: most of an hour
    memory.py --only TEXT       the cells whose name has this in it; the others are kept as they are
    memory.py --quick           LeNet, few cells, two directions; nothing is kept

A cell is a fresh process that does one thing (`memory_cell.py`) with one thread: batch 32, K = 20 directions,
its images included. What counts is the most resident memory that the kernel has seen (VmHWM): interpreter,
libraries, model, data and all. Turns are interleaved: each takes every cell once. MB are 10⁶ bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench import commit, machine, rounded
from memory_cell import NETWORKS

RESULT = Path(__file__).parent / "results" / "memory.json"

FLOORS = {
    "import nothing": "Python",
    "import numpy": "… with NumPy",
    "import client": "… with NumPy and a client",
    "import secure": "… with NumPy, a client and its half of secure sums",
    "import onnxruntime": "… with ONNX Runtime",
    "import torch": "… with torch",
}
WAYS = {
    "torch backprop": "torch, forward, backward and step",
    "torch inference": "torch, plain forward passes",
    "torch forward-only": "`TorchRuntime`",
    "onnx 32": "`OnnxRuntime`, micro-batch 32",
    "onnx 8": "`OnnxRuntime`, micro-batch 8",
    "onnx 1": "`OnnxRuntime`, micro-batch 1",
    "numpy full float32": "`NumpyRuntime`, `full`",
    "numpy layer float32": "`NumpyRuntime`, `layer`",
    "numpy stream float32": "`NumpyRuntime`, `stream`",
    "numpy kernel float32": "`NumpyRuntime`, `kernel`",
    "numpy layer float16": "`NumpyRuntime`, `layer`, float16 stored",
    "numpy layer bfloat16": "`NumpyRuntime`, `layer`, bfloat16 stored",
    "numpy layer int8": "`NumpyRuntime`, `layer`, int8 stored",
    "client layer": "`baffle client` behind a folder, `layer`",
    "client stream": "`baffle client` behind a folder, `stream`",
}
QUICK = (
    "import nothing",
    "import numpy",
    "torch backprop",
    "torch inference",
    "numpy layer float32",
    "client stream",
)
DIRECTIONS = 20
EAGER = "torch inference"  # what forward passes are timed beside

Row = dict[str, Any]
Cells = dict[str, Row]


def cells(quick: bool) -> Iterator[str]:
    """Names of cells, in the order of a turn: "WHAT" for floors, "NETWORK, WHAT" for the rest."""
    yield from (what for what in FLOORS if not quick or what in QUICK)
    for network in NETWORKS:
        if not quick or network == "lenet":
            yield from (f"{network}, {what}" for what in WAYS if not quick or what in QUICK)


def chosen(text: str) -> Iterator[str]:
    """Cells with ``text`` in their name, and what the times of those stand beside."""
    networks = {name.rpartition(", ")[0] for name in cells(quick=False) if text in name} - {""}
    beside = {f"{network}, {EAGER}" for network in networks}
    yield from (name for name in cells(quick=False) if text in name or name in beside)


def process(name: str, folder: Path, directions: int, seconds: float) -> list[float]:
    """The four figures of one cell, from a process of its own."""
    network, _, what = name.rpartition(", ")
    arguments = [what, network, str(folder / network), str(directions), str(seconds)]
    threads = {f"{kind}_NUM_THREADS": "1" for kind in ("OMP", "MKL", "OPENBLAS")}
    here, bytecode = str(Path(__file__).parent), folder / "bytecode"
    environment = {
        **os.environ,
        **threads,
        "BAFFLE_KERNELS": "0",  # a device has no numba
        "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))),
    }
    if bytecode.exists():
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    code = f"import memory_cell; memory_cell.main({arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return [float(word) for word in done.stdout.split()[-4:]] if what != "prepare" else []


def quickly() -> Cells:
    """A slice: LeNet alone, two directions, one turn."""
    return measure(list(cells(quick=True)), 2, 1, seconds=0.1, warm=False)


def measure(
    names: list[str], directions: int, turns: int, *, seconds: float = 1.0, warm: bool = True
) -> Cells:
    """Peak memory and times of cells by name; a cell that cannot be run says why.

    ``warm``: a first turn, which counts for nothing, writes the bytecode of what is imported, as an
    installation has it: a process that compiles what it imports needs more memory.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for network in sorted({name.rpartition(", ")[0] for name in names} - {""}):
            (folder / network).mkdir()
            process(f"{network}, prepare", folder, 0, 0)
        if warm:
            (folder / "bytecode").mkdir()
        for name in (name for name in names if warm and not name.startswith("mobilenet")):
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                process(name, folder, 1, 0)
        for turn in range(turns):
            for name in (name for name in names if name not in failed):
                print(f"  turn {turn + 1} of {turns}: {name}", file=sys.stderr, flush=True)
                try:
                    found[name].append(process(name, folder, directions, seconds))
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    failed[name] = str(error)
    return {
        name: {"failed": failed[name]} if name in failed else _summary(name, found, directions)
        for name in names
    }


def _summary(name: str, found: dict[str, list[list[float]]], directions: int) -> Row:
    """Medians; times beside eager torch's are of pairs from one turn."""
    peaks, forwards, rounds, makings = map(list, zip(*found[name], strict=True))
    row: Row = {"peak_mb": median(peaks) * 1.024e-3, "peaks_mb": [peak * 1.024e-3 for peak in peaks]}
    network = name.rpartition(", ")[0]
    eager = [figures[1] for figures in found.get(f"{network}, {EAGER}", [])]
    if not math.isnan(forwards[0]):
        row["forward_seconds"] = median(forwards)
        if eager:
            row["forward_over_eager"] = median(map(_ratio, forwards, eager))
    if not math.isnan(rounds[0]):
        row["round_seconds"] = median(rounds)
    if not math.isnan(makings[0]):
        row["directions_seconds"] = median(makings)
        row["directions_share"] = median(map(_ratio, makings, rounds))
        passes = [seconds / (directions + 1) for seconds in rounds]
        if eager:
            row["pass_over_eager"] = median(map(_ratio, passes, eager))
    return dict(rounded(row))


def _ratio(over: float, under: float) -> float:
    return over / under


# What is shown


HEADS = (
    "batch 32, K = 20",
    "peak, MB",
    "of backprop's",
    "forward pass, ms",
    "× eager torch",
    "a pass in the round, × eager torch",
    "of which making directions",
)


def table(found: Cells) -> list[tuple[str, ...]]:
    """Rows for a network at a time, floors first."""
    rows: list[tuple[str, ...]] = [
        (f"{words}, imported", mb(found[what]), "", "", "", "", "")
        for what, words in FLOORS.items()
        if what in found
    ]
    for network in NETWORKS:
        backprop = found.get(f"{network}, torch backprop", {})
        for what, words in WAYS.items():
            row = found.get(f"{network}, {what}")
            if row is not None:
                rows.append((f"{network}: {words}", mb(row), *_figures(row, backprop)))
    return rows


def summary(found: Cells) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of a shorter table: peaks, and shares of backpropagation's, a network a column."""

    def shown(network: str, what: str) -> str:
        row, backprop = found.get(f"{network}, {what}", {}), found.get(f"{network}, torch backprop", {})
        of = "" if what == "torch backprop" else f" ({_figures(row, backprop)[0]})"
        return mb(row) + of if "peak_mb" in row else "–"

    ways = [what for what in WAYS if what.split()[-1] not in ("float16", "bfloat16", "int8", "inference")]
    rows = [(WAYS[what], *(shown(network, what) for network in NETWORKS)) for what in ways]
    sizes = {name: f"{name}, {shape[0]}×{shape[1]}×{shape[1]}" for name, shape in NETWORKS.items()}
    return ("peak, MB (of backprop's)", *sizes.values()), rows


def mb(row: Row) -> str:
    return f"{row['peak_mb']:.1f}" if "peak_mb" in row else "–"


def _figures(row: Row, backprop: Row) -> tuple[str, ...]:
    def shown(key: str, pattern: str, scale: float = 1) -> str:
        return pattern.format(scale * row[key]) if key in row else "–"

    both = "peak_mb" in row and "peak_mb" in backprop
    return (
        f"{row['peak_mb'] / backprop['peak_mb']:.1%}" if both else "–",
        shown("forward_seconds", "{:.3g}", 1e3),
        shown("forward_over_eager", "{:.2f}"),
        shown("pass_over_eager", "{:.2f}"),
        shown("directions_share", "{:.0%}"),
    )


def read() -> Cells:
    """What is kept, in the order of a turn."""
    kept: Cells = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else {}
    return {name: kept[name] for name in cells(quick=False) if name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        found = quickly()
    else:
        names = list(chosen(options.only))
        about = {"turns": options.turns, "load": round(os.getloadavg()[0], 1), "commit": commit()}
        fresh = measure(names, DIRECTIONS, options.turns)
        found = read() | {name: row | about for name, row in fresh.items()}
        found = {name: found[name] for name in cells(quick=False) if name in found}
        content = {"printed_on": machine(), "directions": DIRECTIONS, "cells": found}
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    for line in (HEADS, *table(found)):
        print(" | ".join(line))
    for name, row in found.items():
        if "failed" in row:
            print(f"{name}: {row['failed']}")


if __name__ == "__main__":
    main()
