"""Membership inference on the uploaded K numbers, against the number of examples in the visible sum."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from attacker import Game, Moments, Sums, attack
from common import SIGMA, Floats, disjoint, images, networks, write
from masking import as_reals, masked_upload
from pictures import membership_picture
from scores import auc, gaussian_bound, true_positives, with_error
from slopes import agreement, directions, measured, population

from baffle.data import Dataset
from baffle.privacy import clip_rows
from baffle.runtimes.torch import TorchRuntime
from baffle.stream import Stream, seed_from

STREAM = Stream(seed_from(4), 0)


@dataclass(frozen=True)
class Scale:
    train: int  # images that the trained network was trained on
    known: int  # the attacker's own examples: moments and shadows
    victims: int  # the other examples of the fresh sums
    targets: int
    repetitions: int  # fresh sums with, and as many without, for each target
    shadows: int
    epochs: int
    addends: tuple[int, ...] = (1, 8, 32, 128, 512)
    counts: tuple[int, ...] = (10, 100, 500)
    noises: tuple[float, ...] = (0.5, 1.0, 2.0)
    measured: int = 40  # uploads by forward passes for the positive control


FULL = Scale(train=30_000, known=12_000, victims=12_000, targets=400, repetitions=8, shadows=400, epochs=2)
QUICK = Scale(
    train=300, known=400, victims=400, targets=20, repetitions=4, shadows=40, epochs=1,
    addends=(1, 8), counts=(10, 30), noises=(1.0,), measured=4,
)  # fmt: skip


def run(folder: Path | None, quick: bool) -> dict[str, Any]:
    started, scale, dataset = time.perf_counter(), QUICK if quick else FULL, images(folder)
    sizes = (scale.train, scale.known, scale.victims, scale.targets)
    on, known, victims, targets = disjoint(len(dataset), *sizes, seed=4)
    cells, controls, accuracies = [], [], {}
    for name, (runtime, accuracy) in networks(dataset, on, dataset.batch(victims), scale.epochs).items():
        accuracies[name] = round(accuracy, 2)
        print(f"{name}: test accuracy {accuracy:.2f} %", flush=True)
        rows = directions(runtime, STREAM, max(scale.counts))
        groups = [population(runtime, dataset, chosen, rows) for chosen in (known, victims, targets)]
        print(
            f"  slopes of {sum(map(len, groups)):,} examples: {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        for count in scale.counts:
            known_slopes, victims_slopes, targets_slopes = (group[:, :count] for group in groups)
            for cell in table(known_slopes, victims_slopes, targets_slopes, scale):
                cells.append({"network": name, "K": count, **cell})
                print(f"  {line(cells[-1])}", flush=True)
        controls.append(
            {"network": name, **positive(runtime, dataset, targets, victims, groups[2], groups[1], scale)}
        )
        controls[-1] |= negative(groups[0], groups[1], groups[2], scale)
        print(f"  {controls[-1]}", flush=True)
    result = {
        "data": dataset.name,
        "sizes": dict(zip(("train", "known", "victims", "targets"), sizes, strict=True)),
        "trials": scale.targets * scale.repetitions,
        "sigma": SIGMA,
        "accuracy": accuracies,
        "cells": cells,
        "controls": controls,
        "seconds": round(time.perf_counter() - started),
    }
    if not quick:
        write("leakage-membership", result)
        membership_picture(result)
    return result


def line(cell: dict[str, Any]) -> str:
    noise = "no clip" if cell["noise_multiplier"] is None else f"z = {cell['noise_multiplier']:g}"
    return (
        f"{cell['network']}, K = {cell['K']}, {noise}, A = {cell['addends']}: AUC {cell['auc']:.4f} ± "
        f"{cell['auc_error']:.4f}, TPR at 1 % {cell['tpr']:.3f} ± {cell['tpr_error']:.3f} ({cell['attack']})"
    )


def table(known: Floats, victims: Floats, targets: Floats, scale: Scale) -> Iterator[dict[str, Any]]:
    """A cell for each number of addends and noise; None stands for uploads neither clipped nor noised."""
    clip = float(np.median(np.linalg.norm(known, axis=1)))
    for clipped in (False, True):
        groups = [clip_rows(group, clip) if clipped else group for group in (known, victims, targets)]
        # Moments from one half of the attacker's examples, shadow sums from the other.
        half = len(known) // 2
        moments = Moments.of(groups[0][:half])
        ours, others, wanted = groups[0][half:] @ moments.axes, *(g @ moments.axes for g in groups[1:])
        for addends in scale.addends:
            rng = np.random.default_rng(addends)
            plain_shadow = Sums(*(sums(ours, a, scale.shadows, rng) for a in (addends - 1, addends)))
            shape = (len(wanted), scale.repetitions, wanted.shape[1])
            trials = len(wanted) * scale.repetitions
            plain = Sums(*(sums(others, a, trials, rng).reshape(shape) for a in (addends - 1, addends)))
            for noise in scale.noises if clipped else (None,):
                deviation = (noise or 0.0) * clip
                shadow, fresh = (noised(x, deviation, rng) for x in (plain_shadow, plain))
                found = attack(Game(moments, addends, deviation**2), wanted, shadow, fresh)
                yield {
                    "addends": addends,
                    "noise_multiplier": noise,
                    "bound": gaussian_bound(noise) if noise else 1.0,
                    **judged(*found),
                }


def judged(name: str, inside: Floats, outside: Floats) -> dict[str, Any]:
    area, area_error = with_error(auc, inside, outside)
    rate, rate_error = with_error(true_positives, inside, outside)
    return {"attack": name, "auc": area, "auc_error": area_error, "tpr": rate, "tpr_error": rate_error}


def sums(vectors: Floats, addends: int, count: int, rng: np.random.Generator) -> Floats:
    """``count`` sums (count, K) of ``addends`` distinct rows each: runs of random permutations."""
    if addends == 0:
        return np.zeros((count, vectors.shape[1]))
    fit = len(vectors) // addends
    parts = []
    for start in range(0, count, fit):
        some = min(fit, count - start)
        chosen = rng.permutation(len(vectors))[: some * addends]
        parts.append(vectors[chosen].reshape(some, addends, -1).sum(1))
    return np.concatenate(parts)


def noised(plain: Sums, deviation: float, rng: np.random.Generator) -> Sums:
    if not deviation:
        return plain
    return Sums(*(x + deviation * rng.standard_normal(x.shape) for x in (plain.others, plain.full)))


def positive(
    runtime: TorchRuntime,
    dataset: Dataset,
    targets: np.ndarray[Any, np.dtype[np.int64]],
    victims: np.ndarray[Any, np.dtype[np.int64]],
    of_targets: Floats,
    of_victims: Floats,
    scale: Scale,
) -> dict[str, Any]:
    """Raw uploads of one example, by forward passes: the target's, or another's. Score: −distance to d*."""
    count, number = max(scale.counts), scale.measured
    mine = np.stack([measured(runtime, dataset.batch([i]), STREAM, count) for i in targets[:number]])
    others = np.stack([measured(runtime, dataset.batch([i]), STREAM, count) for i in victims[:number]])
    wanted = of_targets[:number]
    inside = -np.linalg.norm(mine - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    outside = -np.linalg.norm(others - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    area, error = with_error(auc, inside[:, None], outside[:, None])
    # Which of the candidates was it? The nearest, among all targets.
    distances = np.linalg.norm(mine[:, None] - of_targets, axis=2)
    return {
        "positive": {"K": count, "uploads": number, "auc": area, "auc_error": error},
        "named": {
            "right": int(np.sum(distances.argmin(1) == np.arange(number))),
            "candidates": len(of_targets),
        },
        # Forward differences beside the derivatives that all cells are made of.
        "agreement": {
            "whole": agreement(np.concatenate([mine, others]), np.concatenate([wanted, of_victims[:number]])),
            "quartiles": np.quantile(
                [agreement(a, b) for a, b in zip(mine, wanted, strict=True)], (0.25, 0.75)
            ).tolist(),
        },
    }


def negative(known: Floats, victims: Floats, targets: Floats, scale: Scale) -> dict[str, Any]:
    """The attack with A = 1 and the largest K on masked uploads."""
    half = len(known) // 2
    moments = Moments.of(known[:half])
    rng = np.random.default_rng(0)

    def masked(vectors: Floats) -> Floats:
        return np.stack([as_reals(masked_upload(v)) for v in vectors]) @ moments.axes

    axes = moments.axes
    shadow_full = masked(sums(known[half:], 1, scale.shadows, rng))
    # Masks are added after the target: so "others" hold masked uploads of it, less what the attack adds.
    shadow_in = masked(targets[rng.integers(len(targets), size=scale.shadows)])
    fresh_full = masked(sums(victims, 1, len(targets) * scale.repetitions, rng))
    fresh_in = masked(np.repeat(targets, scale.repetitions, 0))
    shape = (len(targets), scale.repetitions, targets.shape[1])
    wanted = targets @ axes
    fresh = Sums(fresh_in.reshape(shape) - wanted[:, None], fresh_full.reshape(shape))
    game = Game(moments, 1, noise=2.0**64 / 12)
    found = attack(game, wanted, Sums(shadow_in, shadow_full), fresh)
    return {"negative": {"K": targets.shape[1], **judged(*found)}}
