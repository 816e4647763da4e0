"""Pictures of runs. Whatever the law made says so in its legend."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baffle.errors import DataError, MissingExtraError
from baffle.runs import RunFolder

_AXES = (("rounds", "round"), ("forward passes", "forward_passes"), ("bytes, up and down", "bytes"))
_SPENT = ("ε spent so far", "epsilon")


def available() -> bool:
    """True where matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def label_of(folder: RunFolder) -> str:
    """A run's name in a legend: its folder, what it measured, and whether it was simulated."""
    config = folder.config()
    if config.fidelity == "backprop":
        return f"{folder.path.name}: backprop"
    k = config.directions or (f"{config.forward_passes} passes" if config.forward_passes else 100)
    law = ", simulated by the law" if config.fidelity == "law" else ""
    private = f", δ = {config.delta:g} for each {config.privacy}" if config.privacy else ""
    return f"{folder.path.name}: K = {k}{law}{private}"


def curves(folders: Sequence[RunFolder], target: Path) -> None:
    """PNG: accuracy and loss on the test set against rounds, forward passes, bytes and, where spent, ε.

    Dashed lines are the moving average of the weights. Raises DataError for a run without a look at the
    test set, MissingExtraError without matplotlib.
    """
    if not available():
        raise MissingExtraError("matplotlib", "plots", "drawing curves")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes = (*_AXES, _SPENT) if any(folder.config().privacy for folder in folders) else _AXES
    figure = Figure(figsize=(13 / 3 * len(axes), 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, len(axes), sharey="row")
    for number, folder in enumerate(folders):
        series, color = _series(folder), f"C{number}"
        for column, (title, key) in enumerate(axes):
            for row, (plain, averaged) in enumerate(
                (("test_accuracy", "ema_accuracy"), ("test_loss", "ema_loss"))
            ):
                panel = panels[row][column]
                if max(series[key]) == 0:  # backprop has no forward passes to count, most runs no ε
                    continue
                panel.plot(series[key], series[plain], color=color, label=label_of(folder))
                panel.plot(series[key], series[averaged], color=color, linestyle="--", linewidth=1)
                panel.set_xlabel(title)
                panel.xaxis.set_major_locator(MaxNLocator(6))
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))
                panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("test accuracy")
    panels[1][0].set_ylabel("test loss")
    panels[0][0].legend(fontsize="small", loc="lower right")
    panels[0][1].set_title("solid: weights, dashed: their moving average", fontsize="small")
    try:
        figure.savefig(target, dpi=110, format="png")
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}") from error


def _series(folder: RunFolder) -> dict[str, list[float]]:
    rows = folder.metrics()
    passes = itertools.accumulate(row["forward_passes"] for row in rows)
    traffic = itertools.accumulate(row["bytes_up"] + row["bytes_down"] for row in rows)
    series: dict[str, list[float]] = {"round": [], "forward_passes": [], "bytes": [], "epsilon": []}
    names = ("test_accuracy", "ema_accuracy", "test_loss", "ema_loss")
    series |= {name: [] for name in names}
    for row, p, b in zip(rows, passes, traffic, strict=True):
        if row.get("test_accuracy") is not None:
            series["round"].append(row["round"] + 1)
            series["forward_passes"].append(p)
            series["bytes"].append(b)
            series["epsilon"].append(row.get("epsilon") or 0.0)
            for name in names:
                series[name].append(row[name] if row[name] is not None else float("nan"))
    if not series["round"]:
        raise DataError(f"{folder.path} has no look at the test set yet: there is nothing to draw")
    return series
