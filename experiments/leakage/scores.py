"""How well scores tell two groups apart: AUC, true positives at a small false positive rate, errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from common import Floats
from scipy.stats import norm, rankdata


def auc(inside: Floats, outside: Floats) -> float:
    """Chance that a score from ``inside`` exceeds one from ``outside``; ties count half."""
    ranks = rankdata(np.concatenate([inside, outside]))
    n, m = len(inside), len(outside)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def true_positives(inside: Floats, outside: Floats, at: float = 0.01) -> float:
    """Share of ``inside`` above the threshold that a share ``at`` of ``outside`` exceeds at most."""
    allowed = int(at * len(outside))
    threshold = np.sort(outside)[::-1][allowed]
    return float(np.mean(inside > threshold))


def with_error(
    figure: Callable[[Floats, Floats], float],
    inside: Floats,
    outside: Floats,
    seed: int = 0,
    draws: int = 200,
) -> tuple[float, float]:
    """``figure`` of the pooled scores, and its standard error by the bootstrap over targets.

    ``inside`` and ``outside`` are (targets, repetitions): trials of one target depend on each other, so
    whole targets are drawn with replacement.
    """
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(inside), size=(draws, len(inside)))
    values = [figure(inside[pick].ravel(), outside[pick].ravel()) for pick in picks]
    return figure(inside.ravel(), outside.ravel()), float(np.std(values, ddof=1))


def gaussian_bound(noise_multiplier: float, distance: float = 2.0) -> float:
    """The largest AUC of any test of N(0, z²) against N(distance, z²): no attack on the mechanism has more.

    Replacing one clipped example by another moves the sum by at most 2 C, hence 2 by default.
    """
    return float(norm.cdf(distance / (noise_multiplier * math.sqrt(2))))
