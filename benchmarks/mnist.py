"""MNIST, LeNet, 10 iid clients, FedSGD: `python benchmarks/mnist.py {table,confirm,preset,speed} --data DIR`.

table     the paper's setting by the law, 20 epochs: K = 100, 200, 500, and backprop
confirm   truly forward-only, K = 100, beside runs by the law: one epoch with the preset `paper` beside eight,
          a fifth of an epoch with `annealed` beside three
preset    the preset `annealed` by the law, K = 500, 20 epochs, beside backprop and the preset `paper`
speed     20 epochs by the law, K = 500, and by backprop at the same time, on a core each

DIR holds MNIST/raw/*-ubyte.gz. On two cores `table` and `preset` take about an hour each, `confirm` half
an hour. What is done already is kept under runs/bench and not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cells import cell, write

# Feng et al., Table 1, MNIST, LeNet, epoch-level: for orientation, since the runs here are batch-level.
PAPER = {"K=100": 87.27, "K=200": 89.48, "K=500": 92.18, "backprop": 94.31}


def settings(data: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": "mnist",
        "data_folder": str(data),
        "model": "lenet",
        "preset": "paper",
        "epochs": 20.0,
        "evaluate_every": 188,
        "checkpoint_every": 188,
        **more,
    }


def table(data: Path, runs: Path, threads: int | None, only: str | None) -> None:
    wanted: dict[str, dict[str, Any]] = {
        "backprop": {"fidelity": "backprop"},
        **{f"K={k}": {"fidelity": "law", "directions": k} for k in (500, 100, 200)},
    }
    extra = {} if threads is None else {"threads": threads}
    cells = {
        name: cell(runs, **settings(data, **one, **extra))
        for name, one in wanted.items()
        if only is None or only == name
    }
    if only is not None:
        return
    print(f"{'':10} {'accuracy':>9} {'EMA':>7} {'paper, epoch-level':>19}")
    for name in ("K=100", "K=200", "K=500", "backprop"):
        c = cells[name]
        print(f"{name:10} {c.accuracy:9.2f} {c.ema_accuracy:7.2f} {PAPER[name]:19.2f}")
    write("mnist-table", {"cells": {name: c.row() for name, c in cells.items()}, "paper": PAPER})


CONFIRMED: dict[str, dict[str, Any]] = {
    "paper": {"epochs": 1.0, "evaluate_every": 47, "checkpoint_every": 10},
    "annealed": {"preset": "annealed", "epochs": 0.2, "evaluate_every": 150, "checkpoint_every": 25},
}


def confirm(data: Path, runs: Path, threads: int | None) -> None:
    extra = {"directions": 100} | ({} if threads is None else {"threads": threads})
    presets = {}
    for preset, one in CONFIRMED.items():
        seeds = range(8 if preset == "paper" else 3)
        law = [cell(runs, **settings(data, fidelity="law", seed=s, **one, **extra)) for s in seeds]
        real = cell(runs, **settings(data, fidelity="forward-only", **one, **extra))
        print(f"preset {preset}, {one['epochs']} epochs, K = 100: accuracy, EMA")
        for seed, c in enumerate(law):
            print(f"  law, seed {seed}          {c.accuracy:6.2f} {c.ema_accuracy:6.2f}")
        print(f"  forward-only, seed 0 {real.accuracy:6.2f} {real.ema_accuracy:6.2f}")
        presets[preset] = {
            "epochs": one["epochs"],
            "law": [c.row() for c in law],
            "forward_only": real.row(),
        }
    write("mnist-confirm", {"presets": presets})


def preset(data: Path, runs: Path, threads: int | None) -> None:
    extra = {} if threads is None else {"threads": threads}
    looks = {"evaluate_every": 1500, "checkpoint_every": 1500}
    cells = {
        "backprop, preset `paper`": cell(runs, **settings(data, fidelity="backprop", **extra)),
        "K = 500 by the law, preset `paper`": cell(
            runs, **settings(data, fidelity="law", directions=500, **extra)
        ),
        "K = 500 by the law, preset `annealed`": cell(
            runs, **settings(data, preset="annealed", fidelity="law", directions=500, **looks, **extra)
        ),
    }
    for name, c in cells.items():
        print(f"{name:40} {c.accuracy:6.2f}  EMA {c.ema_accuracy:6.2f}")
    write("mnist-preset", {"cells": {name: c.row() for name, c in cells.items()}})


def speed(data: Path, epochs: float) -> None:
    """Both at once, so that the machine's mood is the same for both. Always run anew."""
    free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    started = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, fidelity) in enumerate((("law, K = 500", "law"), ("backprop", "backprop"))):
            cores = free[i % len(free) :][:1] if free else []
            code = f"""
import os, torch, mnist, cells, json
from pathlib import Path
if {cores}:
    os.sched_setaffinity(0, {cores})
torch.set_num_threads(1)
settings = mnist.settings(Path({str(data)!r}), fidelity={fidelity!r}, threads=1) | {{"epochs": {epochs}}}
settings |= {{"directions": 500}} if {fidelity!r} == "law" else {{}}
row = cells.cell(Path({folder!r}), **settings).row()
Path({folder!r}, {fidelity!r} + ".json").write_text(json.dumps(row))
"""
            command = [sys.executable, "-c", code]
            started[name] = fidelity, subprocess.Popen(command, cwd=Path(__file__).parent)
        rows = {}
        for name, (fidelity, process) in started.items():
            if process.wait() != 0:
                raise SystemExit(f"{name} failed")
            rows[name] = json.loads(Path(folder, f"{fidelity}.json").read_text())
    ratio = rows["law, K = 500"]["seconds"] / rows["backprop"]["seconds"]
    print(f"law / backprop, {epochs:g} epochs: {ratio:.3f}")
    write("mnist-speed", {"epochs": epochs, "cells": rows, "ratio": round(ratio, 3)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("table", "confirm", "preset", "speed"))
    parser.add_argument("--data", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--epochs", type=float, default=20.0, help="speed: of MNIST")
    parser.add_argument("--only", help="table: run this cell and print nothing")
    options = parser.parse_args()
    if options.what == "table":
        table(options.data, options.runs, options.threads, options.only)
    elif options.what == "confirm":
        confirm(options.data, options.runs, options.threads)
    elif options.what == "speed":
        speed(options.data.resolve(), options.epochs)
    else:
        preset(options.data, options.runs, options.threads)


if __name__ == "__main__":
    main()
