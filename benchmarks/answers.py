"""What pairs of rows answer: differences between runs of the same seeds, and what chance could do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from baffle.reproduce.experiment import Experiment
from baffle.reproduce.verdicts import Entry, entry, planned, value_of

# Two-sided 95 % quantiles of Student's t for n − 1 degrees of freedom, by n.
STUDENT = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclass(frozen=True)
class Question:
    """Is the first row's metric above the second's?"""

    text: str
    better: str
    worse: str


_ABLATIONS = (
    Question("Do more directions help (largest K beside smallest)?", "k3", "k1"),
    Question("Does the moving average of the weights help?", "k1", "no-ema"),
    Question("Is Hardswish better than ReLU?", "k1", "relu"),
    Question("Is Hardswish better than SELU?", "k1", "selu"),
    Question("Forward differences rather than central ones, at equal forward passes?", "k1", "central"),
    Question("Does backpropagation stay ahead of the largest K?", "backprop", "k3"),
)
QUESTIONS: dict[str, tuple[Question, ...]] = {
    "table1": (
        *_ABLATIONS,
        Question(
            "Is the smallest K better with the authors' stretched MNIST and weight decay?", "k1", "k1-plain"
        ),
        Question("Is backpropagation better without them?", "backprop-plain", "backprop"),
    ),
    "table2": _ABLATIONS,
    "figure2": (
        Question("Do more directions help (5000 beside 100)?", "k5000", "k100"),
        Question("Does the moving average of the weights help (K = 5000)?", "k5000", "no-ema"),
        Question("Does backpropagation stay ahead of K = 5000?", "backprop", "k5000"),
    ),
    "table3": (
        Question("Do more directions help (500 beside 20)?", "k500", "k20"),
        Question("Does backpropagation stay ahead of K = 500?", "backprop", "k500"),
    ),
    "preset": (
        Question("Is the preset `layered` better than the published settings?", "layered", "published"),
        Question("Is it better than the preset `annealed`?", "layered", "annealed"),
        Question("Does backpropagation stay ahead of `layered`?", "backprop", "layered"),
    ),
}
YES, NO, UNDECIDED, NOT_RUN = "yes", "no", "undecided", "not run"


@dataclass(frozen=True)
class Answer:
    """Of a question in one column: the difference of means, and how far it could be by chance."""

    column: str
    said: str
    difference: float = 0.0
    error: float = 0.0
    seeds: int = 0
    scale: str = ""

    def __str__(self) -> str:
        if self.said == NOT_RUN:
            return f"{self.column}: {NOT_RUN}"
        seeds = f"{self.seeds} seed{'s' * (self.seeds != 1)}"
        return (
            f"{self.column}: **{self.said}**, {self.difference:+.2f} ± {self.error:.2f} "
            f"({seeds}, {self.scale})"
        )


def answers(experiment: Experiment, question: Question) -> list[Answer]:
    """One for each column in which both rows are shown, at the largest scale at which both were run.

    ± is the half-width of a 95 % interval from the differences of the same seeds, from three on; with fewer,
    2·√2·(expected deviation between seeds)/√n.
    """
    shown = [c for c in experiment.shown(question.better) if c in experiment.shown(question.worse)]
    return [answer(experiment, question, column) for column in shown]


def answer(experiment: Experiment, question: Question, column: str) -> Answer:
    title = experiment.columns[column].title
    for scale in reversed(planned(experiment, question.better, column)):
        if scale == "smoke":  # seconds: it shows that a cell runs, nothing else
            continue
        first, second = (
            by_seed(entry(experiment, row, column, scale)) for row in (question.better, question.worse)
        )
        differences = [first[seed] - second[seed] for seed in first if seed in second]
        if not differences:
            continue
        n, mean = len(differences), fmean(differences)
        error = half_width(differences, experiment.spread)
        said = UNDECIDED if error is None or abs(mean) <= error else YES if mean > 0 else NO
        return Answer(title, said, mean, error or 0.0, n, scale)
    return Answer(title, NOT_RUN)


def half_width(differences: Sequence[float], expected: float | None) -> float | None:
    n = len(differences)
    if n >= 3:
        return STUDENT.get(n, 2.23) * stdev(differences) / math.sqrt(n)
    return None if expected is None else 2 * math.sqrt(2 / n) * expected


def by_seed(found: Entry) -> dict[int, float]:
    """The metric of each run that has it: one that diverged does not."""
    values = ((row["seed"], value_of(row, found.metric)) for row in found.rows)
    return {seed: value for seed, value in values if value is not None}
