"""``baffle reproduce``."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from baffle.errors import ConfigError
from baffle.interrupts import stopping

if TYPE_CHECKING:
    from baffle.reproduce.experiment import Experiment

HELP = "run an experiment of the checkout again, cell by cell, beside the paper's figures"
SCALES = ("smoke", "small", "paper")


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="?", metavar="NAME", help="an experiment (default: list them)")
    command.add_argument(
        "--scale", choices=SCALES, default="smoke", help="seconds, about an hour, or as in the paper"
    )
    command.add_argument("--data", type=Path, metavar="DIR", help="folder that holds the data sets' files")
    command.add_argument(
        "--experiments",
        type=Path,
        default=Path("experiments"),
        metavar="DIR",
        help="where these are",
    )
    command.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="where their run folders go"
    )
    command.add_argument(
        "--only",
        action="append",
        metavar="GLOB",
        help="only cells ROW/COLUMN or ROW/COLUMN/SEED like this; may be given several times",
    )
    command.add_argument("--budget", type=float, metavar="MINUTES", help="stop after so many minutes")
    command.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; each of several has one core"
    )
    command.add_argument("--device", default="cpu", help="where forward passes run: cpu, cuda, cuda:1")
    command.add_argument("--again", action="store_true", help="run cells again that diverged")
    command.add_argument("--list", action="store_true", help="list the experiments, or an experiment's cells")
    command.add_argument("--show", action="store_true", help="run nothing: print the table of what is kept")


def run(options: argparse.Namespace) -> int:
    if options.workers < 1:
        raise ConfigError(f"workers = {options.workers}: at least one is needed")
    if options.budget is not None and not (options.budget >= 0 and math.isfinite(options.budget)):
        raise ConfigError(f"budget = {options.budget:g}: minutes, not below 0")
    if options.name is None:
        return _list(options.experiments)
    from baffle.reproduce import measured

    experiment = _experiment(options.experiments, options.name)
    if options.list:
        return _list_cells(experiment, options.scale)
    stopped = False
    if not options.show:
        if experiment.rows:
            stopped = _run(experiment, options)
        if experiment.measured and not stopped:
            measured.measure(experiment.folder, options.scale, options.data)
        _write(experiment, options.scale)
    for line in _shown(experiment):
        print(line)
    return 130 if stopped else 0


def _run(experiment: Experiment, options: argparse.Namespace) -> bool:
    """The cells that are not kept. True where Ctrl-C stopped it."""
    from baffle.reproduce.workers import Work, share, work

    given = Work(
        str(experiment.folder),
        options.scale,
        str(options.runs),
        None if options.data is None else str(options.data),
        tuple(options.only or ()),
        None if options.budget is None else 60 * options.budget,
        1 if options.workers > 1 else None,
        options.device,
    )
    cells = given.cells()
    kept = [cell.read() for cell in cells]
    failed = [cell for cell, row in zip(cells, kept, strict=True) if row and row.get("failed")]
    left = sum(row is None for row in kept)
    if options.again and failed:
        from baffle.reproduce.running import Runner

        left += len(failed)
        for cell in failed:
            Runner(options.runs).forget(cell)
    if not left:
        print(f"all {len(cells)} cells are kept: nothing is left to run")
        return False
    print(f"{left} of {len(cells)} cells are to be run", flush=True)
    with stopping() as stop:
        if options.workers > 1:
            done = share(given, min(options.workers, left), stop=stop)
        else:
            done = work(cells, options.runs, stop=stop, budget=given.budget, say=_say)
        if not done:
            left = sum(cell.find() is None for cell in cells)
            print(f"stopped: {left} of {len(cells)} cells are left; the same command goes on")
        return stop()


def _write(experiment: Experiment, scale: str) -> None:
    """Tables and figure beside the TOML, and the blocks of its README."""
    from baffle import plots
    from baffle.reproduce import figures, measured, tables

    written = []
    if scale in experiment.scales:
        written = tables.write(experiment, scale)
        if experiment.figure is not None:
            target = experiment.folder / "results" / f"{experiment.name}-{scale}.png"
            if not plots.available():
                print(f"matplotlib is not installed: {target.name} will be left out", file=sys.stderr)
            elif figures.draw(experiment, target, scale):
                written.append(target)
    if experiment.measured:
        written += tables.write_page(experiment, measured.page(experiment.folder))
    print(
        f"written: {', '.join(str(path) for path in written)}" if written else "nothing to write", end="\n\n"
    )


def _shown(experiment: Experiment) -> list[str]:
    from baffle.reproduce import measured, tables

    lines = [experiment.title, "", *tables.text(experiment)] if experiment.rows else []
    if experiment.measured:
        lines += [*([""] if lines else []), *measured.page(experiment.folder)]
    return lines


def _say(line: str) -> None:
    print(line, flush=True)


def _experiment(parent: Path, name: str) -> Experiment:
    from baffle.reproduce.experiment import Experiment

    names = _names(parent)
    if name not in names:
        raise ConfigError(f"there is no experiment {name!r} in {parent}: choose one of {', '.join(names)}")
    return Experiment.read(parent / name)


def _names(parent: Path) -> list[str]:
    names = sorted(path.parent.name for path in parent.glob("*/experiment.toml"))
    if not names:
        raise ConfigError(
            f"{parent} holds no experiments: run this in a checkout of the repository (or --experiments DIR)"
        )
    return names


def _list(parent: Path) -> int:
    from baffle.reproduce.experiment import Experiment

    for name in _names(parent):
        experiment = Experiment.read(parent / name)
        counts = []
        for scale in experiment.scales:
            cells = experiment.cells(scale)
            counts.append(f"{scale} {sum(cell.find() is not None for cell in cells)}/{len(cells)}")
        kinds = [*counts, *(["run.py"] if experiment.measured else [])]
        print(f"{name:12}  {experiment.title} ({', '.join(kinds)})")
    return 0


def _list_cells(experiment: Experiment, scale: str) -> int:
    for cell in experiment.cells(scale):
        print(f"{cell.key}  {'kept' if cell.find() else '    '}  {cell.name} seed {cell.seed}")
    return 0
