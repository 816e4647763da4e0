"""Gradient inversion from K slopes, for one and for eight examples, against what needs no upload."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SIGMA, disjoint, mean_error, tensors, write
from pictures import inversion_picture
from reconstruct import Prior, Upload, Victim, by_gradient, by_slopes, error, psnr, ssim
from slopes import by_gradients, directions, measured
from torch import Tensor

from baffle import data, models
from baffle.data import Dataset
from baffle.estimator import SteinEstimator
from baffle.privacy import clip_rows
from baffle.runtimes.torch import TorchRuntime
from baffle.stream import Stream, seed_from

STREAM = Stream(seed_from(6), 0)
EXACT = "exact gradient"
SMOOTH = (1e-1, 1e-2, 1e-3)  # weights of the total variation, chosen among on images of the attacker


@dataclass(frozen=True)
class Scale:
    size: int  # pixels a side
    known: int  # the attacker's own images
    cases: tuple[tuple[str, int, int], ...]  # network, examples of a client, clients attacked
    tuned: int  # clients that the attacker makes up to choose the prior's weight
    steps: int  # of gradient matching
    counts: tuple[int, ...]  # K
    noisy: int  # K of the row with differential privacy
    ranks: dict[int, int]  # examples of a client → principal axes a class


FULL_CASES = (("mlp", 1, 8), ("mlp", 8, 4), ("lenet", 1, 8))
FULL = Scale(16, 20_000, FULL_CASES, 4, 600, (100, 1000, 5000), 1000, {1: 256, 8: 100})
QUICK = Scale(8, 400, (("mlp", 1, 2), ("mlp", 2, 2)), 1, 3, (80,), 80, {1: 64, 2: 4})


def run(folder: Path | None, quick: bool) -> dict[str, Any]:
    started, scale = time.perf_counter(), QUICK if quick else FULL
    dataset = data.load("digits")[0] if folder is None else data.load("mnist", folder)[0].resized(scale.size)
    known, rest = disjoint(len(dataset), scale.known, len(dataset) - scale.known, seed=6)
    rows: list[dict[str, Any]] = []
    shown: dict[str, dict[str, Tensor]] = {}
    for network, examples, clients in scale.cases:
        options = {"grid": scale.size} if network == "mlp" else {}
        module = models.build(network, 1, len(dataset.classes), seed=0, **options).eval()
        case = Case(network, TorchRuntime(module), dataset, known, rest, examples, clients, scale)
        found, pictures = attacked(case)
        rows += found
        shown[f"{network}, {examples}"] = pictures
        print(f"{network}, {examples}: {time.perf_counter() - started:.0f} s", flush=True)
    result = {
        "data": dataset.name,
        "pixels": scale.size**2,
        "sigma": SIGMA,
        "cases": scale.cases,
        "rows": rows,
        "seconds": round(time.perf_counter() - started),
    }
    if not quick:
        write("leakage-inversion", result)
        inversion_picture(shown, scale.size)
    return result


@dataclass(frozen=True)
class Case:
    """One network, and clients of so many examples each, all labels of a client distinct."""

    network: str
    runtime: TorchRuntime
    dataset: Dataset
    known: np.ndarray[Any, np.dtype[np.int64]]
    rest: np.ndarray[Any, np.dtype[np.int64]]
    examples: int
    clients: int
    scale: Scale

    def chosen(self, pool: np.ndarray[Any, np.dtype[np.int64]], clients: int) -> list[list[int]]:
        """Images of each client: labels go round the classes, no image twice."""
        queues = {label: list(pool[self.dataset.targets[pool] == label]) for label in range(10)}
        labels = (np.arange(clients * self.examples) % 10).reshape(clients, self.examples)
        return [[int(queues[label].pop()) for label in row] for row in labels]


def attacked(case: Case) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    victim = Victim.of(case.runtime, case.dataset)
    own, own_labels = tensors(case.dataset.batch(case.known))
    own = own.reshape(len(own), -1)
    prior = Prior.of(own, own_labels, len(case.dataset.classes), case.scale.ranks[case.examples])
    groups, trial_groups = case.chosen(case.rest, case.clients), case.chosen(case.known, case.scale.tuned)
    x, y = images_of(case, groups)
    trial_x, trial_y = images_of(case, trial_groups)
    originals = victim.unit(x)
    nearest = nearest_others(x, y, own, own_labels)
    guess = {
        "class mean": prior.means[y],
        "another image of the class": random_others(y, own, own_labels),
        "nearest image of other clients": nearest,
    }
    rows = []
    head = {"network": case.network, "examples": case.examples}
    for name, pictures in guess.items():
        rows.append({**head, "upload": None, "attack": name, **judged(victim, originals, pictures, nearest)})
        print(rows[-1], flush=True)
    shown = {"original": originals}
    kinds: list[tuple[str, int | None, float]] = [(EXACT, None, 0.0)]
    kinds += [(f"K = {count}", count, 0.0) for count in case.scale.counts]
    kinds.append((f"K = {case.scale.noisy}, z = 1", case.scale.noisy, 1.0))
    for name, count, noise in kinds:
        along = None if count is None else torch.from_numpy(directions(case.runtime, STREAM, count))
        uploads = [upload(case, group, along, noise, i) for i, group in enumerate(groups)]
        trials = [upload(case, group, along, noise, 1000 + i) for i, group in enumerate(trial_groups)]

        def matched(smooth: float, uploads: list[Upload], labels: Tensor) -> Tensor:
            return by_gradient(victim, uploads, labels, prior.means[labels], smooth, case.scale.steps)

        tried = {weight: victim.unit(matched(weight, trials, trial_y)) for weight in SMOOTH}
        smooth = min(SMOOTH, key=lambda w: float(error(tried[w], victim.unit(trial_x)).mean()))
        pairs = zip(uploads, y, strict=True)
        ways = {
            "gradient": matched(smooth, uploads, y),
            "slopes": torch.stack([by_slopes(victim, one, labels, prior) for one, labels in pairs]),
        }
        for attack, found in ways.items():
            figures = judged(victim, originals, found, nearest)
            rows.append({**head, "upload": name, "attack": attack, **figures})
            print(rows[-1], flush=True)
            shown[f"{name}, {attack} matching"] = victim.unit(found)
    last = ("class mean", "nearest image of other clients")
    return rows, shown | {name: victim.unit(guess[name]) for name in last}


def images_of(case: Case, groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Images (m, B, pixels) and labels (m, B)."""
    inputs, labels = tensors(case.dataset.batch(np.ravel(groups)))
    return inputs.reshape(len(groups), case.examples, -1), labels.reshape(len(groups), -1)


def upload(case: Case, group: list[int], rows: Tensor | None, noise: float, seed: int) -> Upload:
    """A client's answer by forward passes; with ``noise`` its examples are clipped, and noise is added.

    ``rows`` (K, n) are the directions; None for the exact gradient.

    The clip is the median length of the slopes of a few hundred of the attacker's images.
    """
    batch, runtime = case.dataset.batch(group), case.runtime
    if rows is None:
        gradient = torch.from_numpy(runtime.gradient(runtime.weights(), batch)[0])
        return Upload(gradient, gradient, None, 1e-3 * float(gradient.square().mean().sqrt()))
    count = len(rows)
    if noise:
        known = by_gradients(runtime, case.dataset.batch(case.known[:256]), rows.numpy())
        lengths = np.linalg.norm(known, axis=1)
        clip = float(np.median(lengths))
        alone = np.stack([measured(runtime, case.dataset.batch([i]), STREAM, count) for i in group])
        rng = np.random.default_rng(seed)
        deviation = noise * clip / len(group)
        slopes = clip_rows(alone, clip).mean(0) + deviation * rng.standard_normal(count)
    else:
        slopes = measured(runtime, batch, STREAM, count)
        # Float32 losses leave about 1e-3 of a slope; the prior's missing axes more, where some are missing.
        whole = case.scale.ranks[case.examples] == case.scale.size**2
        deviation = (2e-3 if whole else 1e-2) * float(np.sqrt(np.mean(slopes**2)))
    gradient = torch.from_numpy(SteinEstimator(count).gradient(slopes, STREAM, runtime.layout))
    return Upload(gradient, torch.from_numpy(slopes), rows, deviation)


def nearest_others(x: Tensor, y: Tensor, own: Tensor, own_labels: Tensor) -> Tensor:
    """For each image the closest of the same class among ``own``: no guess can choose better from them."""
    found = torch.empty_like(x)
    for i, j in np.ndindex(*y.shape):
        mine = own[own_labels == y[i, j]]
        found[i, j] = mine[(mine - x[i, j]).square().sum(1).argmin()]
    return found


def random_others(y: Tensor, own: Tensor, own_labels: Tensor) -> Tensor:
    """An image of the right class from ``own`` for each label (m, B)."""
    rng = np.random.default_rng(0)
    flat = [own[rng.choice(np.flatnonzero((own_labels == label).numpy()))] for label in y.ravel()]
    return torch.stack(flat).reshape(*y.shape, -1)


def judged(victim: Victim, originals: Tensor, found: Tensor, nearest: Tensor) -> dict[str, Any]:
    """Means over clients (m), their standard errors; a client's figure is the mean over its examples."""
    pictures = victim.unit(found)
    closer = error(pictures, originals) < error(victim.unit(nearest), originals)
    figures = {
        "mse": error(pictures, originals),
        "psnr": psnr(pictures, originals),
        "ssim": ssim(pictures, originals, victim.shape[1]),
        "closer": closer.float(),
    }
    return {name: mean_error(values.mean(1).tolist()) for name, values in figures.items()}
