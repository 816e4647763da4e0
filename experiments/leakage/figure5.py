"""The paper's Figure 5: loss differences of real data and of noise, and what the histogram leaves out.

For Gaussian directions and given data, ΔL_k = σ z_k·∇L is normal with mean 0 and deviation σ‖∇L‖. So a
histogram of them can tell one number, the gradient's length, whatever the data are; but who knows the seed
knows z_k, and the same numbers *in their order* are K equations for the gradient.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from attacker import Moments
from common import SIGMA, Floats, disjoint, images, mean_error, networks, write
from pictures import figure5_picture
from scipy.stats import ks_2samp
from scores import auc, with_error
from slopes import by_gradients, directions, measured

from baffle.data import Dataset
from baffle.runtimes import Batch
from baffle.runtimes.torch import TorchRuntime
from baffle.stream import Stream, seed_from

SEED = seed_from(5)


@dataclass(frozen=True)
class Scale:
    train: int
    epochs: int
    pairs: int  # real batches, each beside a noise batch and beside another real one
    batch: int
    count: int  # K
    known: int  # examples of each kind that the attacker learns from
    fresh: int  # examples of each kind that are scored


FULL = Scale(train=30_000, epochs=2, pairs=12, batch=32, count=500, known=6_000, fresh=6_400)
QUICK = Scale(train=300, epochs=1, pairs=3, batch=8, count=20, known=200, fresh=160)


def noise(dataset: Dataset, number: int, rng: np.random.Generator) -> Batch:
    """``number`` images of standard normal values, as a network sees them, with labels drawn uniformly."""
    inputs = rng.standard_normal((number, *dataset.shape)).astype(np.float32)
    return Batch(inputs, rng.integers(len(dataset.classes), size=number))


def run(folder: Path | None, quick: bool) -> dict[str, Any]:
    started, scale, dataset = time.perf_counter(), QUICK if quick else FULL, images(folder)
    batches = 2 * scale.pairs * scale.batch
    on, known, fresh, shown = disjoint(len(dataset), scale.train, scale.known, scale.fresh, batches, seed=5)
    rows, drawn = [], {}
    for name, (runtime, accuracy) in networks(dataset, on, dataset.batch(fresh), scale.epochs).items():
        rng = np.random.default_rng(5)
        real = [dataset.batch(chosen) for chosen in np.array_split(shown, 2 * scale.pairs)]
        fake = [noise(dataset, scale.batch, rng) for _ in range(scale.pairs)]
        # Every batch has directions of its own, so that the samples of two batches are independent.
        differences = [
            SIGMA * measured(runtime, batch, Stream(SEED, number), scale.count)
            for number, batch in enumerate([*real, *fake])
        ]
        first, second = differences[: scale.pairs], differences[scale.pairs : 2 * scale.pairs]
        others = differences[2 * scale.pairs :]
        shown_lengths = [
            float(d.std()) / (SIGMA * length(runtime, b))
            for d, b in zip(differences, [*real, *fake], strict=True)
        ]
        row = {
            "network": name,
            "accuracy": round(accuracy, 2),
            "deviation_over_gradient": mean_error(shown_lengths),
            "real_noise": compared(first, others),
            "real_real": compared(first, second),
        }
        told, scores = with_seed(runtime, dataset, known, fresh, scale, rng)
        row["told_apart"] = told
        drawn[name] = {"real": first[0], "noise": others[0], **scores}
        print(row, flush=True)
        rows.append(row)
    result = {
        "data": dataset.name,
        "K": scale.count,
        "batch": scale.batch,
        "pairs": scale.pairs,
        "sigma": SIGMA,
        "rows": rows,
        "seconds": round(time.perf_counter() - started),
    }
    if not quick:
        write("leakage-figure5", result)
        figure5_picture(drawn)
    return result


def length(runtime: TorchRuntime, batch: Batch) -> float:
    """‖∇L‖ of the batch's mean loss."""
    gradient, _ = runtime.gradient(runtime.weights(), batch)
    return float(np.linalg.norm(gradient.astype(np.float64)))


def compared(ones: list[Floats], others: list[Floats]) -> dict[str, Any]:
    """Kolmogorov and Smirnov's two-sample test, pair by pair: as uploaded, and each over its deviation."""
    raw = [ks_2samp(a, b) for a, b in zip(ones, others, strict=True)]
    shape = [ks_2samp(a / a.std(), b / b.std()) for a, b in zip(ones, others, strict=True)]
    return {
        "distance": mean_error([test.statistic for test in raw]),
        "rejected": sum(bool(test.pvalue < 0.05) for test in raw),
        "shape_distance": mean_error([test.statistic for test in shape]),
        "shape_rejected": sum(bool(test.pvalue < 0.05) for test in shape),
        "ratio": mean_error([float(b.std() / a.std()) for a, b in zip(ones, others, strict=True)]),
    }


def with_seed(
    runtime: TorchRuntime,
    dataset: Dataset,
    known: np.ndarray[Any, np.dtype[np.int64]],
    fresh: np.ndarray[Any, np.dtype[np.int64]],
    scale: Scale,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """AUC of telling a real batch from a noise batch, along the same directions for all.

    By the histogram alone (its deviation), and by the numbers in their order: a likelihood ratio of two
    normal distributions fitted on the attacker's own examples of both kinds.
    """
    rows = directions(runtime, Stream(SEED, 1 << 20), scale.count)

    def slopes(batch: Batch) -> Floats:
        return by_gradients(runtime, batch, rows)

    kinds = {
        "real": (slopes(dataset.batch(known)), slopes(dataset.batch(fresh))),
        "noise": (slopes(noise(dataset, scale.known, rng)), slopes(noise(dataset, scale.fresh, rng))),
    }
    moments = {kind: Moments.of(ours) for kind, (ours, _) in kinds.items()}
    told: dict[str, Any] = {}
    scores: dict[str, Floats] = {}
    for size in (1, scale.batch):
        sums = {kind: theirs.reshape(-1, size, scale.count).sum(1) for kind, (_, theirs) in kinds.items()}
        ratio = {
            kind: log_density(moments["real"], s, size) - log_density(moments["noise"], s, size)
            for kind, s in sums.items()
        }
        spread = {kind: -s.std(1) for kind, s in sums.items()}
        found = with_error(auc, spread["real"][:, None], spread["noise"][:, None])
        told[str(size)] = {
            "batches": len(ratio["real"]),
            "in_order": with_error(auc, ratio["real"][:, None], ratio["noise"][:, None]),
            # Either sign: noise may have the longer gradient or the shorter one.
            "histogram": (max(found[0], 1 - found[0]), found[1]),
        }
        scores = {"score_real": ratio["real"], "score_noise": ratio["noise"]}
    return told, scores


def log_density(moments: Moments, sums: Floats, addends: int) -> Floats:
    """Of sums (N, K) of so many examples, up to a constant."""
    residual = sums @ moments.axes - addends * moments.mean
    variance = addends * moments.spectrum
    density: Floats = -0.5 * ((residual**2 / variance).sum(1) + np.log(variance).sum())
    return density
