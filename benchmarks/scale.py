"""Time and peak memory against K, n, clients and batch: `python benchmarks/scale.py`, or `make scale`.

    scale.py                 measures every curve, keeps them in results/scale.json, draws docs/scale.png
    scale.py --only K,n      measures these curves and keeps the others
    scale.py --draw          measures nothing: draws what is kept

Each point is a process of its own. It warms up on the smallest problem of its kind, which loads and compiles
whatever is needed, then measures the most that a run holds beyond what was held before it, and then times
runs. All on one core, so that
other work on the machine bends no curve; about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import FILE, apart, commit, machine, rounded

RESULT = FILE.with_name("scale.json")
PICTURE = FILE.parents[2] / "docs" / "scale.png"


@dataclass(frozen=True)
class Curve:
    """One axis: the setting in words, the axis' name, and where it is measured."""

    what: str
    unit: str
    points: tuple[int, ...]


CURVES: dict[str, Curve] = {
    "K": Curve("LeNet 1×32×32, batch 32: slopes and gradient", "K", (100, 300, 1000, 3000, 5000)),
    "n": Curve(
        "MLPs of two hidden layers, K = 20, batch 32: slopes and gradient",
        "trainable parameters n",
        (10_000, 100_000, 1_000_000, 10_000_000),
    ),
    "clients": Curve(
        "MLP of 1,210 parameters, K = 5, batch 4: clients made, one round of all",
        "clients",
        (10, 100, 1000, 10_000),
    ),
    "batch": Curve("LeNet 1×32×32, K = 20: slopes and gradient", "batch", (1, 4, 16, 64, 256)),
}


def problem(axis: str, point: int) -> tuple[float, Callable[[], object]]:
    """Where on the axis the point came to lie, and what to run there."""
    import measurements
    from overhead import deal, images

    from baffle import Server, SteinEstimator, TorchRuntime, models, simulate

    stream_of = measurements.fresh_streams()
    if axis == "clients":
        train = images(64)
        runtime = TorchRuntime(models.MLP(hidden=(10,), grid=10).eval())
        server = Server(runtime, SteinEstimator(5), batch_size=4)
        return point, lambda: next(simulate(server, deal(train, point, 4, runtime), rounds=server.round + 1))
    directions, batch, module = 20, 32, measurements.build("lenet")
    if axis == "K":
        directions = point
    elif axis == "batch":
        batch = point
    elif axis == "n":  # 256 inputs, twice `width`, 10 outputs
        width = max(1, round((-267 + (267**2 + 4 * (point - 10)) ** 0.5) / 2))
        module = models.MLP(hidden=(width, width)).eval()
    runtime, samples = TorchRuntime(module), measurements.images(batch, 1, 32)
    estimator, weights = SteinEstimator(directions), runtime.weights()

    def run() -> None:
        stream = stream_of()
        slopes = estimator.slopes(runtime, weights, samples, stream).slopes
        estimator.gradient(slopes, stream, runtime.layout)

    return runtime.layout.n if axis == "n" else point, run


def measure(axis: str, point: int, patience: float = 5.0) -> dict[str, float]:
    """Seconds (median of up to five runs, one at least, within ``patience``) and bytes, in this process."""
    import measurements

    _, warm_up = problem(axis, 1 if axis in ("K", "batch") else 10 if axis == "clients" else 1000)
    warm_up()
    at, run = problem(axis, point)
    seconds: list[float] = []

    def once() -> None:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)

    before, extra = measurements.extra_memory(once)
    while sum(seconds) < patience and len(seconds) < 5:
        once()
    return {
        axis: at,
        "seconds": median(seconds),
        "runs": len(seconds),
        "before_mb": before / 1e6,
        "extra_mb": extra / 1e6,
    }


def draw(curves: dict[str, Any], target: Path) -> None:
    """PNG: seconds above, megabytes below, log-log, with a line that grows in proportion."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, len(CURVES), sharex="col", sharey="row", squeeze=False)
    for column, (axis, curve) in enumerate(CURVES.items()):
        rows = curves.get(axis, {}).get("points", [])
        at = [row[axis] for row in rows]
        for panel, key in ((panels[0][column], "seconds"), (panels[1][column], "extra_mb")):
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
            if rows:
                found = [max(row[key], 0.1 if key == "extra_mb" else 1e-6) for row in rows]
                panel.plot(at, found, "o-", color="C0")
                line = [found[-1] * a / at[-1] for a in at]
                panel.plot(at, line, color="0.5", linestyle="--", linewidth=1)
        panels[0][column].set_title(
            curve.what.replace(": ", ":\n").replace(", K", ",\nK", 1), fontsize="small"
        )
        panels[1][column].set_xlabel(curve.unit)
    panels[0][0].set_ylabel("seconds")
    panels[1][0].set_ylabel("peak memory beyond the start, MB")
    panels[1][0].set_title("dashed: in proportion", fontsize="small", loc="left")
    for row in panels:  # a proportional line runs far below a flat curve
        shown = [y for panel in row for line in panel.lines[::2] for y in line.get_ydata()]
        if shown:
            row[0].set_ylim(min(shown) / 2, max(shown) * 2)
    figure.savefig(target, dpi=110, format="png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="curves to measure, e.g. K,n")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw what is kept")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(rounded(measure(options.point[0], int(options.point[1])))))
        return 0
    curves: dict[str, Any] = json.loads(RESULT.read_text())["curves"] if RESULT.exists() else {}
    wanted = options.only.split(",") if options.only else list(CURVES)
    for axis in [] if options.draw else wanted:
        rows = []
        for point in CURVES[axis].points:
            rows.append(apart(__file__, "--point", axis, str(point), cores=1) or {})
            print(", ".join(f"{name} {number:,.4g}" for name, number in rows[-1].items()), flush=True)
        curves[axis] = {"points": rows, "commit": commit(), "machine": machine()}
        RESULT.write_text(json.dumps({"printed_on": machine(), "curves": curves}, indent=1) + "\n")
    draw(curves, PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
