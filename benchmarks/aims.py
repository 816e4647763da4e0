"""How near the preset `layered` comes to backpropagation, and how soon to the paper's own accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from answers import NO, NOT_RUN, UNDECIDED, YES, Question, answer

from baffle.reproduce.experiment import Experiment
from baffle.reproduce.verdicts import entry

WITHIN = 1.0  # points of backpropagation
SHARE = 0.5  # of the paper's forward passes
# Of each column the row of Table 1 with as many forward passes, its K and its epochs.
THE_PAPERS = {"mnist-lenet": ("k3", 500, 20), "cifar10-lenet": ("k2", 500, 40)}


def reached(experiments: Path) -> list[str]:
    """Two lines a data set: the distance to backpropagation, and the passes to the paper's accuracy."""
    preset, table1 = (Experiment.read(experiments / name) for name in ("preset", "table1"))
    lines = ["| aim | where | measured | reached |", "|---|---|---|---|"]
    for column in THE_PAPERS:
        if column not in preset.columns:
            continue
        title = preset.columns[column].title
        found = answer(preset, Question("", "backprop", "layered"), column)
        if found.said == NOT_RUN or found.scale != "paper":
            cells = (f"within {WITHIN:g} point of backpropagation", title, NOT_RUN, NOT_RUN)
        else:
            seeds = f"{found.seeds} seed{'s' * (found.seeds != 1)}"
            far = f"{found.difference:+.2f} ± {found.error:.2f} points behind ({seeds})"
            cells = (
                f"within {WITHIN:g} point of backpropagation",
                title,
                far,
                near(found.difference, found.error),
            )
        lines.append(f"| {' | '.join(cells)} |")
        lines.append(f"| {' | '.join(_passes(preset, table1, column))} |")
    return lines


def near(difference: float, error: float) -> str:
    """Whether a difference is below ``WITHIN`` points, as far as chance lets one say."""
    if difference + error <= WITHIN:
        return f"**{YES}**"
    return f"**{NO}**" if difference - error > WITHIN else UNDECIDED


def _passes(preset: Experiment, table1: Experiment, column: str) -> tuple[str, str, str, str]:
    row, directions, epochs = THE_PAPERS[column]
    figure = table1.values.get((row, column))
    layered, published = (entry(preset, name, column, "paper") for name in ("layered", "published"))
    target = published.mean if figure is None else figure
    said = (
        "the accuracy of the published settings, as run here"
        if figure is None
        else "the paper's own accuracy"
    )
    what = f"half of the paper's forward passes to {said}"
    if not layered.rows or target is None:
        return what, preset.columns[column].title, NOT_RUN, NOT_RUN
    spent = [passes_to(kept, target) for kept in layered.rows if not kept.get("failed")]
    there = [passes for passes in spent if passes is not None]
    whole = (directions + 1) * epochs
    if len(there) < len(spent) or not there:
        return what, preset.columns[column].title, f"not all runs reach {target:.2f}", f"**{NO}**"
    most = max(there)
    text = f"{target:.2f} after at most {most:,.0f} passes on an image of {whole:,}: {most / whole:.1%}"
    return what, preset.columns[column].title, text, f"**{YES if most <= SHARE * whole else NO}**"


def passes_to(row: dict[str, Any], target: float) -> float | None:
    """Forward passes on each image until a look at the averaged weights shows ``target`` percent."""
    epochs, rounds = row["settings"]["epochs"], row["rounds"]
    for _, passes, _, _, average in row["curve"]:
        if average is not None and average >= target:
            # A round goes through a batch, an epoch through each image.
            each: float = epochs * passes / rounds
            return each
    return None
