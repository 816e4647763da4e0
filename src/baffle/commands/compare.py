"""``baffle compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from baffle.commands.runs import epsilon, last_look
from baffle.events import size

if TYPE_CHECKING:
    from baffle.runs import RunFolder

HELP = "compare runs: a table, and their curves in one picture"


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    command.add_argument("--plot", type=Path, metavar="PNG", help="write the picture here")


def run(options: argparse.Namespace) -> int:
    from baffle import plots
    from baffle.runs import RunFolder

    runs = [RunFolder.open(path) for path in options.runs]
    rows = [_comparison(run) for run in runs]
    heads: tuple[str, ...] = (
        "run",
        "fidelity",
        "rounds",
        "accuracy",
        "EMA",
        "forward passes",
        "down",
        "up",
        "seconds",
        "ε",
    )
    if all(row[-1] == "–" for row in rows):  # nobody spent any ε
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    widths = [max(len(heads[i]), *(len(row[i]) for row in rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(runs) > 1:
        best = [max(last_look(run)["test_accuracy"], last_look(run)["ema_accuracy"]) for run in runs]
        for run, accuracy in zip(runs[1:], best[1:], strict=True):
            gap = 100 * (accuracy - best[0])
            print(
                f"{run.path.name} is {gap:+.2f} points from {runs[0].path.name} (the better of its weights)"
            )
    if options.plot:
        plots.curves(runs, options.plot)
        print(f"curves: {options.plot}")
    return 0


def _comparison(run: RunFolder) -> tuple[str, ...]:
    rows, last = run.metrics(), last_look(run)
    return (
        run.path.name,
        run.config().fidelity,
        str(len(rows)),
        f"{last['test_accuracy']:.4f}",
        f"{last['ema_accuracy']:.4f}",
        f"{sum(row['forward_passes'] for row in rows):,}",
        size(sum(row["bytes_down"] for row in rows)),
        size(sum(row["bytes_up"] for row in rows)),
        f"{rows[-1]['elapsed']:.0f}",
        f"{epsilon(last):.3g}" if run.config().privacy else "–",
    )
