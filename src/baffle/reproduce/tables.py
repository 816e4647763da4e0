"""Tables of an experiment: on the screen, as Markdown beside its TOML and in its README, and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from baffle.checkpoint import write_atomically
from baffle.errors import DataError
from baffle.events import size
from baffle.reproduce.cell import Row
from baffle.reproduce.experiment import SCALES, Experiment
from baffle.reproduce.verdicts import (
    NO_FIGURE,
    NOT_RUN,
    Entry,
    command,
    entries,
    unfinished,
    value_of,
)

COLUMNS = (
    *("experiment", "row", "column", "scale", "seed", "key", "fidelity", "rounds", "forward_passes"),
    *("seconds", "bytes_up", "bytes_down", "peak_mb", "accuracy", "ema_accuracy", "top5", "ema_top5"),
    *("late_loss", "failed", "metric", "value", "paper"),
    *("device", "processor", "cores", "threads", "system", "python", "baffle", "torch", "date"),
)


def ours(entry: Entry) -> str:
    """``92.10 ± 0.30 (3 seeds; paper, law)``; how many seeds are missing or diverged, where any are."""
    if entry.scale is None:
        return NOT_RUN
    number = "–" if entry.mean is None else f"{entry.mean:.2f}"
    if entry.deviation is not None:
        number += f" ± {entry.deviation:.2f}"
    seeds = f"{entry.seeds} seed{'s' * (entry.seeds != 1)}"
    if entry.missing:
        seeds = f"{entry.seeds} of {len(entry.rows) + entry.missing} seeds"
    if entry.diverged:
        seeds += f", {entry.diverged} diverged"
    return f"{number} ({seeds}; {entry.scale}, {entry.fidelity})"


def text(experiment: Experiment, scale: str | None = None) -> list[str]:
    """For the screen: a line, aligned, for each place where there is a run or a value of the paper."""
    heads: tuple[str, ...] = ("row", "column", "ours", "paper", "verdict")
    found = entries(experiment, scale)
    heads = heads if experiment.source else heads[:3]
    shown = [entry for entry in found if entry.scale is not None or entry.paper is not None]
    lines = [heads, *(_line(experiment, entry)[: len(heads)] for entry in shown)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    rest, largest = len(found) - len(shown), _largest(experiment)
    if rest:
        table.append(f"and {rest} more that were not run")
    if largest is not None and unfinished(experiment, largest):
        table += ["", f"What is missing: {command(experiment, largest)}"]
    return table


def _line(experiment: Experiment, entry: Entry) -> tuple[str, ...]:
    paper = "–" if entry.paper is None else f"{entry.paper:.2f}"
    row, column = experiment.rows[entry.row].title, experiment.columns[entry.column].title
    return row, column, ours(entry), paper, entry.verdict


def markdown(experiment: Experiment, scale: str | None = None) -> list[str]:
    """One row for each of the TOML's, one column for each of its; ours, the paper's, the verdict.

    At ``scale``, or each place at the largest scale that was run.
    """
    found = {(entry.row, entry.column): entry for entry in entries(experiment, scale)}
    columns = [c for c in experiment.columns if any(column == c for _, column in found)]
    lines = [
        f"| | {' | '.join(experiment.columns[c].title for c in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row, line in experiment.rows.items():
        places = [_place(experiment, found.get((row, column))) for column in columns]
        if any(places):
            lines.append(f"| {line.title} | {' | '.join(places)} |")
    return [*lines, *_below(experiment, list(found.values()))]


def _place(experiment: Experiment, entry: Entry | None) -> str:
    if entry is None:
        return ""
    if not experiment.source:  # nothing to compare with: it is no experiment of the paper's
        return ours(entry)
    paper = NO_FIGURE if entry.paper is None else f"paper {entry.paper:.2f}"
    if entry.scale is None:
        return NOT_RUN if entry.paper is None else f"{NOT_RUN}; {paper}"
    said = "" if entry.verdict == NO_FIGURE else f": **{entry.verdict}**"
    return f"{ours(entry)}; {paper}{said}"


def _largest(experiment: Experiment) -> str | None:
    return next((scale for scale in reversed(SCALES) if scale in experiment.scales), None)


def _below(experiment: Experiment, found: Sequence[Entry]) -> list[str]:
    shown = ", ".join(f"`{name}`" for name in dict.fromkeys(entry.metric for entry in found))
    lines = ["", f"{shown}, in percent: mean ± sample standard deviation over seeds."]
    if experiment.source:
        lines[-1] += f" The paper: {experiment.source}."
    largest = _largest(experiment)
    left: dict[str, list[str]] = {}
    for name in unfinished(experiment, largest) if largest is not None else ():
        row, _, column = name.partition("/")
        left.setdefault(row, []).append(column)
    if left and largest is not None:
        some = "; ".join(f"{row} ({', '.join(columns)})" for row, columns in left.items())
        lines += ["", f"Not run in full at scale `{largest}`: {some}. What is missing is run by"]
        lines += ["", f"    {command(experiment, largest)}"]
    return lines


def details(experiment: Experiment, scale: str) -> list[str]:
    """Markdown: what each place of a scale cost, means over its seeds, and where it was run."""
    heads = ["", "seeds", "fidelity", "rounds", "forward passes"]
    heads += ["seconds", "up", "down", "peak MB", "machine"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    seen: list[object] = []
    for entry in entries(experiment, scale):
        rows = [row for row in entry.rows if not row.get("failed")]
        runs = [row["settings"] for row in rows]
        if not rows or runs in seen:  # another metric of the same runs
            continue
        seen.append(runs)
        costs = (
            f"{entry.row}/{entry.column}",
            str(len(rows)),
            entry.fidelity,
            f"{_mean(rows, 'rounds'):,.0f}",
            f"{_mean(rows, 'forward_passes'):,.0f}",
            f"{_mean(rows, 'seconds'):,.0f}",
            size(round(_mean(rows, "bytes_up"))),
            size(round(_mean(rows, "bytes_down"))),
            f"{_mean(rows, 'peak_mb'):,.0f}",
            "; ".join(dict.fromkeys(map(machine, rows))),
        )
        lines.append(f"| {' | '.join(costs)} |")
    return lines


def _mean(rows: Sequence[Row], name: str) -> float:
    return fmean(row.get(name) or 0 for row in rows)


def machine(row: Row) -> str:
    """Where a row was run, in a few words."""
    on = row.get("printed_on", {})
    threads = on.get("threads") or on.get("cores")
    device = on.get("device", "cpu")
    where = f"{on.get('processor')}, {threads} core{'s' * (threads != 1)}" if device == "cpu" else device
    return f"{where}, torch {on.get('versions', {}).get('torch')}"


def as_csv(experiment: Experiment, scale: str) -> str:
    """A line for each run of a scale that is kept."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for cell in experiment.cells(scale):
        row = cell.read()
        if row is None:
            continue
        metric = experiment.metric_of(cell.row, cell.column)
        on = row.get("printed_on", {})
        versions = on.get("versions", {})
        known = {**row, **on, "torch": versions.get("torch"), "baffle": versions.get("baffle-fl")}
        known |= {name: getattr(cell, name) for name in COLUMNS[:6]}
        known |= {"metric": metric, "value": value_of(row, metric)}
        known |= {"paper": experiment.values.get((cell.row, cell.column))}
        writer.writerow({name: known.get(name) for name in COLUMNS})
    return file.getvalue()


def inserted(page: str, name: str, lines: Sequence[str]) -> str:
    """``page`` with the lines from ``<!-- name -->`` to ``<!-- /name -->``; as it is without these."""
    block = f"<!-- {name} -->\n" + "".join(f"{line}\n" for line in lines) + f"<!-- /{name} -->"
    return re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _: block, page, flags=re.DOTALL)


def write(experiment: Experiment, scale: str) -> list[Path]:
    """``results/NAME-SCALE.md`` and ``.csv``, and the block ``table`` of the README, where there is one."""
    stem = experiment.folder / "results" / f"{experiment.name}-{scale}"
    head = [f"# {experiment.title}, scale `{scale}`", "", experiment.about, ""]
    page = [*head, *markdown(experiment, scale), "", "What a run cost:", "", *details(experiment, scale)]
    _put(stem.with_name(f"{stem.name}.md"), "".join(f"{line}\n" for line in page))
    _put(stem.with_name(f"{stem.name}.csv"), as_csv(experiment, scale))
    block = _fill(experiment.folder / "README.md", "table", markdown(experiment))
    return [stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.csv"), *block]


def write_page(experiment: Experiment, lines: Sequence[str]) -> list[Path]:
    """The block ``page`` of the README, where there is one."""
    return _fill(experiment.folder / "README.md", "page", lines)


def _fill(path: Path, name: str, lines: Sequence[str]) -> list[Path]:
    if not path.is_file():
        return []
    page = path.read_text(encoding="utf-8")
    if f"<!-- {name} -->" not in page:
        return []
    _put(path, inserted(page, name, ["", *lines, ""]))
    return [path]


def _put(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            write_atomically(path, content.encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
