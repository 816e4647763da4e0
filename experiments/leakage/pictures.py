"""The figures."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from common import RESULTS, Floats

INK, MUTED = "#222222", "#888888"
COLOURS = ("#b8d0e8", "#5b93c7", "#1f4e86", "#0b2747")
REAL, NOISE = "#1f4e86", "#e08a2c"


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)


def membership_picture(result: dict[str, Any]) -> None:
    """AUC against the number of examples in the sum: by K without noise, by noise at the largest K."""
    networks = list(result["accuracy"])
    counts = sorted({cell["K"] for cell in result["cells"]})
    noises = sorted({cell["noise_multiplier"] for cell in result["cells"]} - {None})
    figure, grid = plt.subplots(len(networks), 2, figsize=(9, 6), sharex=True, sharey=True)
    for row, network in zip(grid, networks, strict=True):
        for count, colour in zip(counts, COLOURS, strict=False):
            _curve(row[0], result, colour, f"K = {count}", network=network, K=count, noise_multiplier=None)
        last = counts[-1]
        _curve(row[1], result, MUTED, "not clipped, no noise", network=network, K=last, noise_multiplier=None)
        for noise, colour in zip(noises, COLOURS, strict=False):
            label = f"clipped, z = {noise:g}"
            _curve(row[1], result, colour, label, network=network, K=last, noise_multiplier=noise)
        row[0].set_title(f"{network}: no noise", fontsize=10, loc="left")
        row[1].set_title(f"{network}: K = {last}", fontsize=10, loc="left")
        row[0].set_ylabel("AUC of membership inference", fontsize=9)
        for axes in row:
            axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_ylim(0.48, 1.01)
            _clean(axes)
    addends = sorted({cell["addends"] for cell in result["cells"]})
    for axes in grid[-1]:
        axes.set_xticks(addends, [str(a) for a in addends])
        axes.set_xlabel("examples in the visible sum", fontsize=9)
        axes.legend(fontsize=8, frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(RESULTS / "membership.png", dpi=150)
    plt.close(figure)


def _curve(axes: Any, result: dict[str, Any], colour: str, label: str, **where: Any) -> None:
    cells = [c for c in result["cells"] if all(c[key] == value for key, value in where.items())]
    x, y, e = ([cell[key] for cell in cells] for key in ("addends", "auc", "auc_error"))
    axes.errorbar(x, y, yerr=2 * np.array(e), color=colour, label=label, marker="o", markersize=3, capsize=2)


def figure5_picture(drawn: dict[str, dict[str, Floats]]) -> None:
    """Histograms of one real and one noise batch; over their deviations; the scores of who has the seed."""
    figure, grid = plt.subplots(len(drawn), 3, figsize=(11, 5.5))
    for row, (network, found) in zip(grid, drawn.items(), strict=True):
        real, noise = found["real"], found["noise"]
        pairs = (
            (1e3 * real, 1e3 * noise, f"{network}: ΔL · 1000"),
            (real / real.std(), noise / noise.std(), "ΔL over its standard deviation"),
            (
                np.arcsinh(found["score_real"]),
                np.arcsinh(found["score_noise"]),
                "asinh of the log likelihood ratio",
            ),
        )
        for axes, (one, other, title) in zip(row, pairs, strict=True):
            bins = np.histogram_bin_edges(np.concatenate([one, other]), 40).tolist()
            axes.hist(one, bins, color=REAL, alpha=0.6, label="real images")
            axes.hist(other, bins, color=NOISE, alpha=0.6, label="noise")
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_yticks([])
            axes.locator_params(axis="x", nbins=6)
            _clean(axes)
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "figure5.png", dpi=150)
    plt.close(figure)


def collusion_picture(result: dict[str, Any]) -> None:
    """What colluders get of one client's upload, by their number."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    x = [row["colluders"] for row in result["rows"]]
    exact = [row["exact"] / result["rounds"] for row in result["rows"]]
    y, e = ([row[key] for row in result["rows"]] for key in ("correlation", "correlation_error"))
    axes.errorbar(x, y, yerr=2 * np.array(e), color=REAL, label="correlation with the upload", capsize=2)
    axes.plot(x, exact, "o", color=NOISE, markersize=5, label="share of rounds with the exact upload")
    axes.axvline(result["threshold"] - 0.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_title(f"threshold {result['threshold']}", fontsize=10, loc="left")
    axes.set_xlabel(f"clients of {result['clients']} that help the server", fontsize=9)
    axes.set_xticks(x)
    axes.legend(fontsize=8, frameon=False, loc="center left")
    _clean(axes)
    figure.tight_layout()
    figure.savefig(RESULTS / "collusion.png", dpi=150)
    plt.close(figure)


def inversion_picture(shown: dict[str, dict[str, Any]], side: int) -> None:
    """Rows: originals, each upload and attack, the baselines. Columns: eight images of each case."""
    names = list(next(iter(shown.values())))
    figure, grid = plt.subplots(
        1, len(shown), figsize=(4.2 * len(shown), 0.5 * len(names) + 0.4), squeeze=False
    )
    for axes, (case, found) in zip(grid[0], shown.items(), strict=True):
        rows = [np.asarray(found[name]).reshape(-1, side, side)[:8] for name in names]
        picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
        axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
        network, examples = case.split(", ")
        axes.set_title(
            f"{network}, {examples} example{'s' if examples != '1' else ' each'}", fontsize=10, loc="left"
        )
        axes.set_yticks(
            (np.arange(len(names)) + 0.5) * side, names if axes is grid[0][0] else [""] * len(names)
        )
        axes.set_xticks([])
        axes.tick_params(labelsize=8, length=0)
        axes.spines[:].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "inversion.png", dpi=150)
    plt.close(figure)
