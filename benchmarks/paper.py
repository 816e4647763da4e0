"""What docs/paper.md says of the experiments, made of their kept rows: every figure, every verdict.

`python benchmarks/report.py` writes these blocks. Whatever the rows say, the sentences are made to fit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import aims
from answers import (
    NO,
    NOT_RUN,
    QUESTIONS,
    STUDENT,
    UNDECIDED,
    YES,
    Question,
    answer,
    answers,
)

from baffle.reproduce import measured, verdicts
from baffle.reproduce.experiment import Experiment
from baffle.reproduce.tables import inserted, markdown, ours
from baffle.reproduce.verdicts import Entry, entries, entry, value_of

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

# What the paper says there, in words; its figures are data in each experiment.toml.
CLAIMS = {
    "table1": "Forward passes alone train LeNet and WRN-10-2 over ten iid clients",
    "table2": "… and over a hundred clients whose labels differ",
    "table3": "… and a head on a frozen, pretrained MobileNetV2 over clients whose images differ",
    "table3-officehome": "… on the paper's own images",
    "table4": "… with a small part of backpropagation's memory",
    "figure2": "More directions come closer to backpropagation, batch by batch",
    "figure3": "Each part of the recipe is worth something, round by round",
    "figure5": "Loss differences tell little of the images: theirs look like those of noise",
    "theory": "The estimate's error is √(n/K), its bias falls with σ",
    "preset": "No claim of the paper: server settings at its forward passes, beside backprop",
    "techniques": "No claim of the paper: other estimators at equal forward passes",
    "why": "No claim of the paper: from our settings to the authors' code, one change at a time",
}

# The same short run by the law and forward-only.
CONFIRMED = {"table1": ("k1-short", "k1-forward"), "table2": ("k1-short", "k1-forward")} | {
    "figure2": ("k100-short", "k100-forward"),
    "preset": ("layered-short", "layered-forward"),
}


def all_experiments() -> list[Experiment]:
    """Those of CLAIMS that there are, in its order."""
    return [
        Experiment.read(EXPERIMENTS / n) for n in CLAIMS if (EXPERIMENTS / n / "experiment.toml").is_file()
    ]


# -- blocks ---------------------------------------------------------------------------------------------


def gaps() -> list[str]:
    """What does not hold, what could not be checked: bullets."""
    wrong, unchecked = [], []
    for experiment in all_experiments():
        name = short(experiment)
        if not experiment.columns:
            wrong += [f"{name}: {text}" for text in not_held(experiment)]
            continue
        found = real(entries(experiment))
        for e in found:
            place = f"{experiment.rows[e.row].title}, {experiment.columns[e.column].title}"
            if e.verdict in (verdicts.ABOVE, verdicts.BELOW) and e.mean is not None and e.paper is not None:
                wrong.append(
                    f"{name}, {place}: {ours(e)}, the paper has {e.paper:.2f}: **{e.verdict}** "
                    f"by {abs(e.mean - e.paper):.2f} points"
                )
            elif e.verdict == verdicts.DIVERGED:
                wrong.append(f"{name}, {place}: **diverged** ({e.diverged} of {len(e.rows)} runs)")
        for question in QUESTIONS.get(experiment.name, ()):
            said_no = [str(a) for a in answers(experiment, question) if a.said == NO]
            if said_no:
                wrong.append(f"{name}. {question.text} {'; '.join(said_no)}")
        unchecked += _unchecked(experiment, found)
    lines = ["What was compared and does not hold:", ""]
    lines += [f"- {text}." for text in wrong] or ["- Nothing of what has been compared so far."]
    lines += ["", "What could not be checked:", ""]
    return lines + ([f"- {text}." for text in unchecked] or ["- Nothing."])


def _unchecked(experiment: Experiment, found: Sequence[Entry]) -> list[str]:
    """A sentence or three in one bullet; none where all was run, and compared with the paper."""
    said = []
    with_figure = [e for e in found if e.paper is not None]
    if experiment.source and len(with_figure) < len(found):
        some = f"for {len(with_figure)} of its {len(found)} places" if with_figure else "for no place"
        said.append(f"a figure of the paper was to hand {some}")
    far = [e for e in with_figure if e.verdict in (verdicts.NOT_RUN, verdicts.NOT_COMPARABLE)]
    if far:
        places = ", ".join(f"{e.row}/{e.column}" for e in far)
        said.append(f"where there is one, no run at its scale for {places}")
    missing = [e for e in found if e.scale is None]
    if missing:
        said.append(f"{len(missing)} of {len(found)} places were not run")
    few = [e for e in found if e.scale is not None and e.seeds + e.diverged < 3]
    if few:
        said.append(f"{len(few)} were run with fewer than three seeds")
    if not said:
        return []
    call = f"; `{verdicts.command(experiment, 'paper')}` runs what is missing" if missing or far else ""
    return [f"{short(experiment)}: {'; '.join(said)}{call}"]


def overview() -> list[str]:
    """A line an experiment."""
    lines = [
        "| experiment | the paper's claim | ours | verdict | scale | command |",
        "|---|---|---|---|---|---|",
    ]
    for experiment in all_experiments():
        said, verdict, scale = _summary(experiment)
        title = f"[{experiment.title}](../experiments/{experiment.name}/README.md)"
        if not (experiment.folder / "README.md").is_file():
            title = experiment.title
        call = f"`baffle reproduce {experiment.name}`"
        cells = (title, CLAIMS[experiment.name], said, verdict, scale, call)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _summary(experiment: Experiment) -> tuple[str, str, str]:
    """What ours is, the verdict, the scales."""
    if experiment.name == "table4" and (kept := experiment.folder / "results" / "table4.json").is_file():
        return *_of_memory(json.loads(kept.read_text())), "–"
    if not experiment.columns:
        last = [words[-1] for words in verdict_rows(page_of(experiment.folder))]
        if not last:
            return "its page", "–", "–"
        bad = sum(_is_bad(text) for text in last)
        return f"{len(last)} statements", f"{len(last) - bad} hold, {bad} not" if bad else "all hold", "–"
    found = real(entries(experiment))
    run = [e for e in found if e.scale is not None]
    if not run:
        return NOT_RUN, NOT_RUN, "–"
    said = f"{len(run)} of {len(found)} places run ({_kinds(run)})"
    counts = [(v, sum(e.verdict == v for e in found if e.paper is not None)) for v in _VERDICTS]
    verdict = ", ".join(f"{n} {v}" for v, n in counts if n) or (
        verdicts.NO_FIGURE if experiment.source else "–"
    )
    held = [a.said for q in QUESTIONS.get(experiment.name, ()) for a in answers(experiment, q)]
    asked = [(word, held.count(word)) for word in (YES, NO, UNDECIDED) if held.count(word)]
    if asked:
        verdict += "; ablations: " + ", ".join(f"{n} {word}" for word, n in asked)
    return said, verdict, ", ".join(dict.fromkeys(str(e.scale) for e in run))


def _kinds(run: Sequence[Entry]) -> str:
    """``22 law, 3 backprop``."""
    kinds = [e.fidelity for e in run]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _of_memory(kept: dict[str, Any]) -> tuple[str, str]:
    """Shares of backpropagation's memory beside the paper's, of which the networks are not known here."""
    ours_there = next(row["whole"] for row in kept["ratios"] if row["way"] == "numpy layer float32")
    shares = ", ".join(f"{share:.1f} % ({network})" for network, share in ours_there.items())
    paper = " and ".join(" / ".join(map(str, row)) for row in kept["paper"])
    return (
        f"{shares} of backpropagation's, whole processes",
        f"{verdicts.NOT_COMPARABLE}: the paper has {paper} %",
    )


_VERDICTS = (
    verdicts.WITHIN,
    verdicts.ABOVE,
    verdicts.BELOW,
    verdicts.DIVERGED,
    verdicts.TOO_FEW,
    verdicts.NOT_COMPARABLE,
    verdicts.NOT_RUN,
)


def real(found: Sequence[Entry]) -> list[Entry]:
    """Entries of which those at scale smoke count as not run: seconds say nothing of the paper."""
    return [
        e
        if e.scale != "smoke"
        else Entry(e.row, e.column, e.metric, None, (), 0, None, None, e.paper, verdicts.NOT_RUN)
        for e in found
    ]


def questions() -> list[str]:
    """What the ablations answer, whatever the paper's figures are."""
    lines = ["| question | where | answer |", "|---|---|---|"]
    for experiment in all_experiments():
        for question in QUESTIONS.get(experiment.name, ()):
            found = [a for a in answers(experiment, question) if a.said != NOT_RUN]
            said = "; ".join(map(str, found)) or NOT_RUN
            lines.append(f"| {question.text} | {short(experiment)} | {said} |")
    return [
        *lines,
        "",
        "Differences in points, the first minus the second of the same seeds. ±: half of a 95 % interval, by "
        "the spread of these differences where there are three seeds, by the expected one before.",
    ]


def confirm() -> list[str]:
    """Short runs by the law beside truly forward-only ones of the same settings."""
    lines = ["| short runs, MNIST, LeNet | | by the law | forward-only | verdict |", "|---|---|---|---|---|"]
    for experiment in all_experiments():
        if experiment.name not in CONFIRMED:
            continue
        law, real_one = (entry(experiment, row, "mnist-lenet", "small") for row in CONFIRMED[experiment.name])
        for what, metric in (
            ("accuracy, %", "accuracy"),
            ("EMA, %", "ema_accuracy"),
            ("late loss", "late_loss"),
        ):
            first, second = (
                [v for row in e.rows if (v := value_of(row, metric)) is not None] for e in (law, real_one)
            )
            cells = (short(experiment), what, spread_of(first), spread_of(second), same(first, second))
            lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Mean ± standard deviation over seeds. Within spread: the means of n and m runs differ by at most "
        "t·s·√(1/n + 1/m), s the pooled deviation, t Student's 95 % quantile.",
    ]


def spread_of(values: Sequence[float]) -> str:
    if not values:
        return NOT_RUN
    seeds = f"{len(values)} seed{'s' * (len(values) != 1)}"
    digits = 3 if max(values) < 10 else 2
    error = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{error} ({seeds})"


def same(law: Sequence[float], forward_only: Sequence[float]) -> str:
    """Whether truly forward-only runs lie where those by the law do."""
    n, m = len(law), len(forward_only)
    if not n or not m:
        return NOT_RUN
    if n + m < 4:
        return verdicts.TOO_FEW
    squares = sum((v - fmean(values)) ** 2 for values in (law, forward_only) for v in values)
    spread = math.sqrt(squares / (n + m - 2))
    away = fmean(forward_only) - fmean(law)
    if abs(away) <= STUDENT.get(n + m - 1, 2.23) * spread * math.sqrt(1 / n + 1 / m):
        return verdicts.WITHIN
    return verdicts.ABOVE if away > 0 else verdicts.BELOW


def reasons() -> list[str]:
    """Experiment why: each change beside the settings before it."""
    experiment = Experiment.read(EXPERIMENTS / "why")
    columns = list(experiment.columns)
    titles = [experiment.columns[c].title for c in columns]
    lines = [f"| one change at a time | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    moved: dict[str, list[tuple[float, str]]] = {column: [] for column in columns}
    for row, line in experiment.rows.items():
        cells = []
        for column in columns:
            if column not in experiment.shown(row):
                cells.append("")
                continue
            here = real([entry(experiment, row, column)])[0]
            found = answer(experiment, Question("", row, "before"), column)
            text = NOT_RUN if here.scale is None else ours(here)
            if row != "before" and found.said != NOT_RUN:
                text += f": {found.difference:+.2f} ± {found.error:.2f}"
                if found.said != UNDECIDED:
                    moved[column].append((found.difference, line.title.lstrip("… ")))
            cells.append(text)
        lines.append(f"| {line.title} | {' | '.join(cells)} |")
    said = [_moved(experiment.columns[column].title, changes) for column, changes in moved.items()]
    return [*lines, "", "± is half of a 95 % interval of the difference. " + " ".join(said)]


def _moved(title: str, changes: Sequence[tuple[float, str]]) -> str:
    """What moves a column beyond chance, up and down, the most first."""
    if not changes:
        return f"No change moves {title} beyond chance, of those that were run."
    ways = []
    for way, some in (
        ("up", sorted((c for c in changes if c[0] > 0), reverse=True)),
        ("down", sorted(c for c in changes if c[0] < 0)),
    ):
        if some:
            ways.append(f"{way} by " + ", ".join(f"“{what}” ({by:+.2f})" for by, what in some))
    return f"Beyond chance {title} is moved {', and '.join(ways)}."


def table_of(name: str) -> list[str]:
    """What of an experiment was run, and its picture; of one without cells, how many statements hold."""
    experiment = Experiment.read(EXPERIMENTS / name)
    if not experiment.columns:
        said, verdict, _ = _summary(experiment)
        return [f"{said}; {verdict}. All of it: [its page](../experiments/{name}/README.md)."]
    found = {(e.row, e.column): e for e in real(entries(experiment))}
    columns = [
        c
        for c in experiment.columns
        if any(e.column == c and (e.scale is not None or e.paper is not None) for e in found.values())
    ]
    usual = {c: _usual_scale([e for e in found.values() if e.column == c]) for c in columns}
    heads = [experiment.columns[c].title + (f" (`{usual[c]}`)" if usual[c] else "") for c in columns]
    lines = ["", f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"] if columns else [""]
    for row, line in experiment.rows.items():
        cells = [_shortly(found[row, c], usual[c]) if (row, c) in found else "" for c in columns]
        if any(cells):
            lines.append(f"| {line.title} | {' | '.join(cell or '–' for cell in cells)} |")
    left = [line.title for c, line in experiment.columns.items() if c not in columns]
    if left:
        lines += ["", f"Not run: {'; '.join(left)}."]
    run = [e for e in found.values() if e.scale is not None]
    places = f"Places: {_kinds(run)}. " if run else ""
    rest = f"All of it, with what it takes to run the rest: [its page](../experiments/{name}/README.md)."
    lines += ["", places + rest, ""]
    drawn = picture(experiment)
    if drawn is not None:
        lines += [f"![{experiment.title}](../experiments/{name}/results/{drawn.name})", ""]
    return lines


def picture(experiment: Experiment) -> Path | None:
    """That of the largest scale, where there is one."""
    if experiment.figure is None:
        return None
    files = (experiment.folder / "results" / f"{experiment.name}-{scale}.png" for scale in ("paper", "small"))
    return next((file for file in files if file.is_file()), None)


def _usual_scale(found: Sequence[Entry]) -> str:
    """The scale of most places that were run; "" where there is none."""
    scales = [e.scale for e in found if e.scale is not None]
    return max(dict.fromkeys(scales), key=scales.count, default="")


def _shortly(e: Entry, usual: str) -> str:
    """``85.36 ± 0.62 (2 seeds); the paper 87.27: **within spread**``; the scale where it is not the usual."""
    if e.scale is None:
        return "" if e.paper is None else f"not run; the paper {e.paper:.2f}"
    number = "diverged" if e.mean is None else f"{e.mean:.2f}"
    number += "" if e.deviation is None else f" ± {e.deviation:.2f}"
    notes = [] if e.seeds >= 3 else [f"{e.seeds} seed{'s' * (e.seeds != 1)}"]
    notes += [] if e.scale == usual else [f"`{e.scale}`"]
    number += f" ({', '.join(notes)})" if notes else ""
    return number if e.paper is None else f"{number}; the paper {e.paper:.2f}: **{e.verdict}**"


# -- pages of experiments without cells ------------------------------------------------------------------


@cache
def page_of(folder: Path) -> tuple[str, ...]:
    """What ``run.py`` there says of its results: asked once, since some draw pictures with it."""
    return tuple(measured.page(folder))


def verdict_rows(lines: Sequence[str]) -> list[list[str]]:
    """The rows of every Markdown table whose last heading is "verdict"."""
    rows: list[list[str]] = []
    inside = False
    for before, line in zip(["", *lines], lines, strict=False):
        if not line.startswith("|"):
            inside = False
        elif re.fullmatch(r"[|\s:-]+", line):
            inside = _cells(before)[-1] == "verdict"
        elif inside:
            rows.append(_cells(line))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def _is_bad(verdict: str) -> bool:
    return any(word in verdict for word in ("does not hold", "missed", verdicts.ABOVE, verdicts.BELOW))


def not_held(experiment: Experiment) -> list[str]:
    """The statements of an experiment's page that do not hold."""
    rows = verdict_rows(page_of(experiment.folder))
    return [": ".join(words) for words in rows if _is_bad(words[-1])]


def short(experiment: Experiment) -> str:
    """ "Table 1" of "Table 1: iid, ...": what a line names it by."""
    name = experiment.title.split(":")[0]
    return f"[{name}](../experiments/{experiment.name}/README.md)" if _has_page(experiment) else name


def _has_page(experiment: Experiment) -> bool:
    return (experiment.folder / "README.md").is_file()


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "paper:gaps": gaps,
    "paper:overview": overview,
    "paper:questions": questions,
    "paper:confirm": confirm,
    "paper:reasons": reasons,
    "paper:aims": lambda: aims.reached(EXPERIMENTS),
}


def rendered(text: str) -> str:
    """A page with the blocks above, and ``paper:table NAME`` for an experiment's table, made again."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        lines = table_of(name.split()[1]) if name not in BLOCKS else BLOCKS[name]()
        return "\n".join([f"<!-- {name} -->", *lines, f"<!-- /{name} -->"])

    names = "|".join([*map(re.escape, BLOCKS), r"paper:table [\w-]+"])
    return re.sub(rf"<!-- ({names}) -->.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def readme(page: Path, text: str) -> str:
    """An experiment's README with its table, as ``baffle reproduce`` writes it, and its picture."""
    if not (page.parent / "experiment.toml").is_file():
        return text
    experiment = Experiment.read(page.parent)
    if not experiment.columns:
        return text
    drawn = picture(experiment)
    shown = [] if drawn is None else ["", f"![{experiment.title}](results/{drawn.name})", ""]
    return inserted(inserted(text, "table", ["", *markdown(experiment), ""]), "figure", shown)


def readmes() -> list[Path]:
    return sorted(EXPERIMENTS.glob("*/README.md"))
