"""Figures of an experiment, of what is kept: curves with bands of seeds, or the metric against K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle import plots
from baffle.errors import DataError, MissingExtraError
from baffle.reproduce.cell import Row
from baffle.reproduce.experiment import SCALES, Experiment
from baffle.reproduce.verdicts import Entry, entries, planned

Floats = NDArray[np.float64]


def draw(experiment: Experiment, target: Path, scale: str | None = None) -> bool:
    """PNG: a panel a column. False, and no file, where nothing is kept to be drawn.

    ``curves``: a line a row against rounds, shaded from the least seed to the greatest. ``by-k``: a line for
    each fidelity against K, with bars of one standard deviation; rows without K as horizontal lines; the
    paper's values as crosses. Raises MissingExtraError without matplotlib, DataError where the disk refuses.
    """
    if not plots.available():
        raise MissingExtraError("matplotlib", "plots", "drawing figures")
    found = [
        entry
        for entry in entries(experiment, scale)
        if entry.mean is not None and _belongs(experiment, entry)
    ]
    columns = [c for c in experiment.columns if any(entry.column == c for entry in found)]
    if not columns:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(len(columns), 3)
    down = -(-len(columns) // across)
    figure = Figure(figsize=(1.5 + 4.2 * across, 0.6 + 3.4 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(down, across, squeeze=False)
    colors = {row: f"C{number % 10}" for number, row in enumerate(experiment.rows)}
    for panel in panels.flat[len(columns) :]:
        panel.set_axis_off()
    for panel, column in zip(panels.flat, columns, strict=False):
        here = [entry for entry in found if entry.column == column]
        if experiment.figure == "by-k":
            _by_k(panel, experiment, here, colors)
        else:
            for entry in here:
                _curve(panel, experiment, entry, colors[entry.row])
            panel.set_xlabel("rounds")
            panel.xaxis.get_major_locator().set_params(integer=True)
        scales = ", ".join(dict.fromkeys(str(entry.scale) for entry in here))
        panel.set_title(f"{experiment.columns[column].title} ({scales})", fontsize="medium")
        metrics = dict.fromkeys(_drawn(experiment, entry.metric) for entry in here)
        panel.set_ylabel(f"{', '.join(metrics)}, %")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="x-small")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=110, format="png", metadata={"Software": None})
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}") from error
    return True


def _belongs(experiment: Experiment, entry: Entry) -> bool:
    """What is run at a small scale alone confirms something, and is no part of the paper's figure."""
    if experiment.figure == "by-k" and experiment.rows[entry.row].of is not None:
        return False
    largest = [scale for scale in SCALES if scale in experiment.scales][-1]
    return largest in planned(experiment, entry.row, entry.column)


def curve_of(rows: Sequence[Row], metric: str) -> tuple[Floats, Floats]:
    """Rounds (P,) at which every run was looked at, and what each had there (runs, P), percent.

    Of metrics beyond ``accuracy`` and ``ema_accuracy`` no curve is kept: one of these stands in.
    """
    place = 4 if _kept_as_curve(metric) == "ema_accuracy" else 3
    of = [{point[0]: point[place] for point in row["curve"] if point[place] is not None} for row in rows]
    rounds = sorted(set.intersection(*map(set, of)))
    return np.array(rounds, np.float64), np.array([[each[r] for r in rounds] for each in of], np.float64)


def _kept_as_curve(metric: str) -> str:
    return "ema_accuracy" if metric.split(".")[-1].startswith("ema_") else "accuracy"


def _drawn(experiment: Experiment, metric: str) -> str:
    return metric if experiment.figure == "by-k" else _kept_as_curve(metric)


def _curve(panel: Any, experiment: Experiment, entry: Entry, color: str) -> None:
    rounds, values = curve_of([row for row in entry.rows if not row.get("failed")], entry.metric)
    line = experiment.rows[entry.row]
    # Dots for backpropagation: what lies on it is seen between them.
    style = ":" if entry.fidelity == "backprop" else "--" if line.of is not None else "-"
    panel.plot(rounds, values.mean(axis=0), style, color=color, label=_label(line.title, entry))
    if len(values) > 1:
        panel.fill_between(rounds, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, lw=0)


def _label(title: str, entry: Entry) -> str:
    return f"{title}, law" if entry.fidelity == "law" else title


def _by_k(panel: Any, experiment: Experiment, found: Sequence[Entry], colors: dict[str, str]) -> None:
    kinds: dict[str, list[Entry]] = {}
    all_k: set[int] = set()
    for entry in found:
        if entry.rows[0]["settings"].get("directions") is None or entry.fidelity == "backprop":
            label = f"{experiment.rows[entry.row].title}: {entry.mean:.1f}"
            panel.axhline(entry.mean, color=colors[entry.row], linestyle=":", label=label)
        else:
            kinds.setdefault(entry.fidelity, []).append(entry)
    for fidelity, group in kinds.items():
        group.sort(key=lambda entry: float(entry.rows[0]["settings"]["directions"]))
        k = [entry.rows[0]["settings"]["directions"] for entry in group]
        all_k |= set(k)
        bars = [entry.deviation or 0.0 for entry in group]
        panel.errorbar(
            k, [entry.mean for entry in group], bars, marker="o", markersize=4, capsize=3, label=fidelity
        )
        papers = [(at, entry.paper) for at, entry in zip(k, group, strict=True) if entry.paper is not None]
        if papers:
            panel.plot(*zip(*papers, strict=True), "kx", label="the paper")
    panel.set_xscale("log")
    # A tick where there is a point: those of a logarithm's tenths run into each other.
    panel.set_xticks(sorted(all_k), [f"{k:,}" for k in sorted(all_k)])
    panel.set_xticks([], minor=True)
    panel.set_xlabel("K")
