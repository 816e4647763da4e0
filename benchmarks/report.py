"""Prints the committed results into the documents: `python benchmarks/report.py` (`--check` only compares).

A block between `<!-- NAME -->` and `<!-- /NAME -->` in README.md, docs/results.md or docs/performance.md is
made again from benchmarks/results/NAME.json (of `a:b`, from a.json), so that no figure is typed by hand.
Blocks `leakage-...` come from experiments/leakage/results and its tables.py, `privacy-cost` from its folder.
docs/paper.md and the table in each experiments/*/README.md come from the rows that are kept there (paper.py).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import bench
import deployment as over
import memory as processes
import paper
import secagg as costs
import traffic as bytes_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = tuple(
    ROOT / name
    for name in (
        "README.md",
        "docs/results.md",
        "docs/performance.md",
        "docs/privacy.md",
        "docs/deployment.md",
        "docs/device.md",
        "docs/paper.md",
    )
)
LEAKAGE = ROOT / "experiments" / "leakage"
PRIVACY_COST = ROOT / "experiments" / "privacy_cost"

sys.path.append(str(LEAKAGE))
import tables  # noqa: E402

Row = dict[str, Any]


def demo(result: Row) -> list[str]:
    real, twin = result["forward_only"], result["backprop"]
    gap = best(twin) - best(real)
    return [
        *table(
            ("digits, LeNet, 10 iid clients", "test accuracy, %", "EMA, %", "forward passes", "seconds"),
            [
                ("forward-only, K = 100", *accuracies(real), f"{real['forward_passes']:,}", real["seconds"]),
                ("backprop twin", *accuracies(twin), "–", twin["seconds"]),
            ],
        ),
        "",
        f"Gap: {gap:.2f} points (the better of the weights and their moving average). The whole demo took "
        f"{result['seconds']:.0f} s. Printed by `make demo`. {machine(real)}",
    ]


def mnist_table(result: Row) -> list[str]:
    cells = result["cells"]
    rows = [
        (
            "backprop" if name == "backprop" else f"{name.replace('=', ' = ')}, by the law",
            *accuracies(cells[name]),
            f"{result['paper'][name]:.2f}",
            f"{cells[name]['forward_passes']:,}" if name != "backprop" else "–",
            f"{cells[name]['bytes_up'] / 1e6:,.0f}",
        )
        for name in ("K=100", "K=200", "K=500", "backprop")
    ]
    heads = (
        "20 epochs, FedSGD",
        "accuracy, %",
        "EMA, %",
        "paper (epoch-level), %",
        "forward passes",
        "up, MB",
    )
    return [*table(heads, rows), "", f"`python benchmarks/mnist.py table`. {machine(cells['K=100'])}"]


def mnist_confirm(result: Row) -> list[str]:
    rows, verdicts = [], []
    for preset, group in result["presets"].items():
        law, real = group["law"], group["forward_only"]
        for kind, row in [*(("by the law", row) for row in law), ("forward-only", real)]:
            name = f"`{preset}`, epochs: {group['epochs']:g}, {kind}, seed {row['seed']}"
            rows.append((name, *accuracies(row), f"{row['late_loss']:.3f}", f"{row['seconds']:.0f}"))
        verdicts.append(
            f"`{preset}`: accuracy {spread(law, real, 'accuracy')}; EMA {spread(law, real, 'ema_accuracy')}; "
            f"loss {spread(law, real, 'late_loss')}."
        )
    heads = ("preset, K = 100, σ = 1e-4", "accuracy, %", "EMA, %", "late training loss", "seconds")
    return [
        *table(heads, rows),
        "",
        "Forward-only beside the spread of the simulated runs. " + " ".join(verdicts),
        "",
        f"`python benchmarks/mnist.py confirm`. {machine(real)}",
    ]


def spread(law: list[Row], real: Row, key: str) -> str:
    """Where a forward-only figure lies beside the simulated ones: their range, and standard deviations."""
    values = [row[key] for row in law]
    place = "inside" if min(values) <= real[key] <= max(values) else "outside"
    width = stdev(values)
    distance = f" ({(real[key] - fmean(values)) / width:+.1f} standard deviations)" if width else ""
    return f"{real[key]:g} is {place} {min(values):g} to {max(values):g}{distance}"


def mnist_preset(result: Row) -> list[str]:
    rows = [
        (
            name,
            *accuracies(row),
            f"{row['rounds']:,}",
            f"{row['sample_forwards'] / 1e9:.1f}" if row["forward_passes"] else "–",
            f"{row['bytes_up'] / 1e6:,.0f}",
        )
        for name, row in result["cells"].items()
    ]
    heads = ("20 epochs", "accuracy, %", "EMA, %", "rounds", "forward passes × samples, 10⁹", "up, MB")
    first = next(iter(result["cells"].values()))
    return [*table(heads, rows), "", f"`python benchmarks/mnist.py preset`. {machine(first)}"]


def search(result: Row) -> list[str]:
    rows = [
        (
            ", ".join(f"{key} {value}" for key, value in row["settings"].items()),
            *accuracies(row),
        )
        for row in result["runs"]
    ]
    note = f"K = 500 by the law, {result['epochs']} epochs. `python benchmarks/search.py`."
    return [
        *table(("server settings", "accuracy, %", "EMA, %"), rows),
        "",
        f"{note} {machine(result['runs'][0])}",
    ]


def performance(result: Row) -> list[str]:
    rows = [line[1:] for line in bench.table(result["cells"])]
    heads = ("ratio within one run", "measured", "quartiles", "aim", "")
    return [*table(heads, rows), "", f"`make bench`. {measured_on(result['cells'])}"]


LIMITS = {
    "sgemm_gflops": "square float32 product, GFLOP/s",
    "conv_gflops": "3×3 convolution, 64 channels, 32×32, batch 32, GFLOP/s",
    "copy_gb_s": "copy, GB/s read and written",
    "torch_randn_m_s": "torch.randn, 10⁶ values/s",
    "numpy_normal_m_s": "NumPy's normal values, 10⁶/s",
    "numpy_words_m_s": "NumPy's words, 10⁶/s",
    "philox_words_m_s": "the stream's words, 10⁶/s",
    "gaussian_m_s": "`Gaussian` values, 10⁶/s",
}


def performance_limits(result: Row) -> list[str]:
    cells = {name: cell for name, cell in result["cells"].items() if name.startswith("limits")}
    if not cells:
        return ["Not measured yet."]
    rows = [
        (
            words,
            *(
                bench.shown(cell["figures"][key]) if key in cell["figures"] else "–"
                for cell in cells.values()
            ),
        )
        for key, words in LIMITS.items()
    ]
    heads = ("the machine's limits", *(name.removeprefix("limits, ") for name in cells))
    return [*table(heads, rows), "", f"`python benchmarks/bench.py --only 0`. {measured_on(cells)}"]


SECONDS = {
    "engine": "engine",
    "reference_alone": "reference loop",
    "reference": "… blocks freed",
    "eager": "eager",
    "eager_nhwc": "eager, NHWC",
    "onnx": "ONNX Runtime",
    "backprop": "backprop",
}


def performance_seconds(result: Row) -> list[str]:
    """Milliseconds a forward pass or direction, of what the ratios of item 1 are made from."""
    rows = []
    for name, cell in result["cells"].items():
        if "reference" in cell.get("seconds", {}):
            seconds = cell["seconds"]
            passes = {"engine": cell["K"] + 1, "backprop": 1}
            found = [
                f"{1e3 * seconds[kind]['median'] / passes.get(kind, cell['short'] + 1):.2f}"
                if kind in seconds
                else "–"
                for kind in SECONDS
            ]
            rows.append((name, *found))
    heads = ("ms a pass", *SECONDS.values())
    return [*table(heads, rows), "", "Medians; the engine's and the reference loop's with their gradient."]


def performance_operations(result: Row) -> list[str]:
    share = "engine / square product, GFLOP/s"
    rows = [
        (
            name,
            f"{cell['figures']['GFLOP a pass']:.2f}",
            bench.shown(cell["figures"]["engine, GFLOP/s"]),
            bench.shown(cell["figures"][share]["median"]),
        )
        for name, cell in result["cells"].items()
        if share in cell.get("figures", {})
    ]
    return table(("batch 32", "10⁹ operations a pass", "engine, 10⁹/s", "beside a square product"), rows)


def scale(result: Row) -> list[str]:
    rows = [
        (
            axis,
            f"{point[axis]:,}",
            f"{point['seconds']:.3g}",
            f"{point['extra_mb']:.3g}",
            f"{point['before_mb']:.0f}",
        )
        for axis, curve in result["curves"].items()
        for point in curve["points"]
    ]
    heads = ("axis", "at", "seconds", "peak memory beyond the start, MB", "at the start, MB")
    return [*table(heads, rows), "", f"`make scale`. {measured_on(result['curves'])}"]


def low_rank(result: Row) -> list[str]:
    speed = [
        (
            f"{row['network']}, r = {row['rank']}",
            row["threads"],
            f"{row['share_of_plain']['median']:.0%}",
            f"{row['share_of_plain']['low']:.0%} to {row['share_of_plain']['high']:.0%}",
            f"{row['over_one_by_one']['median']:.2f}",
            f"{row['correction']:.1%}",
        )
        for row in result["speed"]
    ]
    accuracy = [
        (
            f"{row['model']}, {row['perturbation']}",
            f"{row['forward_passes']:,}",
            row["seeds"],
            f"{row['accuracy']:.2f} ± {row['accuracy_error']:.2f}",
            f"{row['late_loss']:.3f} ± {row['late_loss_error']:.3f}",
        )
        for row in result["accuracy"]
    ]
    heads = ("batch 32", "cores", "share of plain inference", "quartiles", "times one by one", "correction")
    trained = ("digits, 10 clients", "forward passes", "seeds", "accuracy, %", "late training loss")
    return [
        *table(heads, speed),
        "",
        *table(trained, accuracy),
        "",
        f"`python benchmarks/low_rank.py`. {machine({'machine': result['printed_on']})}",
    ]


def coordinates(result: Row) -> list[str]:
    rows = [
        (
            f"{row['images']}, batch {row['batch']}",
            f"{row['directions']:,}",
            f"{row['by_the_clock']['median']:.0f}",
            f"{row['by_the_clock']['low']:.0f} to {row['by_the_clock']['high']:.0f}",
            row["counted"],
            f"{row['error']:.1%}",
        )
        for row in result["rows"]
    ]
    heads = ("LeNet, one core", "coordinates", "forward passes by the clock", "quartiles", "counted", "error")
    return [
        *table(heads, rows),
        "",
        f"`python benchmarks/coordinates.py`. {machine({'machine': result['printed_on']})}",
    ]


def profile_steps(result: Row) -> list[str]:
    """Milliseconds of one direction by kind of step, and their share."""
    rows = []
    for network, kinds in result["steps"].items():
        whole = sum(kinds.values())
        rows += [(network, what, f"{ms:.3f}", f"{ms / whole:.0%}") for what, ms in kinds.items()]
    lines = table(("batch 32, one core", "step", "ms a direction", "share"), rows)
    on = machine({"machine": result["printed_on"]})
    return [*lines, "", f"`python benchmarks/profile_steps.py`. {on} Commit: {result['commit']}."]


def profile_alternatives(result: Row) -> list[str]:
    networks = result["alternatives"]
    ways = next(iter(networks.values()))
    rows = [(way, *(f"{networks[network][way]:.2f}" for network in networks)) for way in ways]
    return table(("times the engine's time, one core", *networks), rows)


def mnist_speed(result: Row) -> list[str]:
    rows = [
        (name, f"{row['seconds']:.0f}", f"{row['accuracy']:.2f}") for name, row in result["cells"].items()
    ]
    heads = (
        f"MNIST, LeNet, {result['epochs']:g} epochs, a core each, at the same time",
        "seconds",
        "accuracy, %",
    )
    return [
        *table(heads, rows),
        "",
        f"Ratio: {result['ratio']}. `python benchmarks/mnist.py speed --data DIR`. "
        + machine(next(iter(result["cells"].values()))),
    ]


def measured_on(cells: Row) -> str:
    """Machine, versions, dates and commits of cells that may have been measured on different days."""
    if not cells:
        return "Nothing is measured yet."
    lines = {machine(cell) + packages(cell) for cell in cells.values()}
    commits = ", ".join(sorted({cell["commit"] for cell in cells.values()}))
    loads = [cell["load"] for cell in cells.values() if "load" in cell]
    busy = f" Load average before a cell: {min(loads)} to {max(loads)}." if loads else ""
    return " ".join(sorted(lines)) + f" Commits: {commits}.{busy}"


def packages(cell: Row) -> str:
    versions = cell["machine"]["versions"]
    return "".join(f" {name} {versions[name]}." for name in ("numba", "onnxruntime") if name in versions)


def secagg(result: Row) -> list[str]:
    cells = result["cells"]
    versions = {cell["machine"]["versions"]["cryptography"] for cell in cells.values()}
    marked = "* extrapolated." if any("measured_with" in cell for cell in cells.values()) else ""
    note = f"{marked} `make secagg`. cryptography {', '.join(sorted(versions))}.".strip()
    return [*table(costs.HEADS, costs.table(cells)), "", f"{note} {measured_on(cells)}"]


def secagg_stages(result: Row) -> list[str]:
    return table(costs.STAGE_HEADS, costs.stage_table(result["cells"], costs.SHOWN))


def secagg_parameters(_: Row) -> list[str]:
    note = "`python benchmarks/secagg.py --parameters`. –: no k up to 255 serves."
    return [*table(costs.PARAMETER_HEADS, costs.parameter_table()), "", note]


def secagg_aims(result: Row) -> list[str]:
    return table(costs.AIM_HEADS, costs.aim_table(result["cells"]))


def traffic(result: Row) -> list[str]:
    return [
        *table(bytes_of.HEADS, bytes_of.rows(result)),
        "",
        f"Bytes of whole messages per round and client, K = {result['K']}, {result['clients']} clients, all "
        f"of which answer. `make traffic`. {machine({'machine': result['printed_on']})}",
    ]


def deployment(result: Row) -> list[str]:
    measured = list(result["cells"].values())
    commits = ", ".join(sorted({row["commit"] for row in measured}))
    loads = [row["load"] for row in measured]
    return [
        *table(over.HEADS, over.rows(result)),
        "",
        "digits, MLP, K = 500, one sample a measurement. kB: per round and client. Lost: answers, in all. "
        f"`make deployment`. Commits: {commits}. Load average after a cell: {min(loads)} to {max(loads)}. "
        f"{machine({'machine': result['printed_on']})}",
    ]


def flower_simulation(result: Row) -> list[str]:
    rows = [
        (
            row["clients"],
            f"{row['ours']:.3g}",
            f"{row['flower']:.3g}",
            f"{row['ratio']:.2f}",
            f"{row['flower_whole_run']:.0f}",
            "yes" if row["same_weights"] else "no",
        )
        for row in result["rows"]
    ]
    heads = (
        "clients",
        "simulate, s a round",
        "Flower and Ray, s a round",
        "ratio",
        "whole Flower run, s",
        "same bits",
    )
    note = "digits, MLP, K = 100. `python benchmarks/flower_simulation.py`."
    return [*table(heads, rows), "", f"{note} {machine({'machine': result['printed_on']})}"]


def flare_rounds(result: Row) -> list[str]:
    rows = [
        ("the same bytes by the bare Collab API", f"{result['bare']:.3g}", "1"),
        (
            "as envelopes and replies through FlareDriver",
            f"{result['exchange']:.3g}",
            f"{result['exchange'] / result['bare']:.2f}",
        ),
        (
            "with the engine: plan, sum, gradient, step",
            f"{result['round']:.3g}",
            f"{result['round'] / result['bare']:.2f}",
        ),
        ("the job itself, sites that measure", f"{result['training']:.3g}", ""),
        ("the same job in one process", f"{result['simulate']:.3g}", ""),
    ]
    note = (
        f"Four sites, LeNet on digits, K = 500: {result['bytes_down']:,} bytes down, "
        f"{result['bytes_up']:,} up; medians. `python benchmarks/flare_rounds.py`."
    )
    heads = ("a round", "seconds", "of the bare one")
    return [*table(heads, rows), "", f"{note} {machine({'machine': result['printed_on']})}"]


def leakage(make: Callable[[Row], tables.Table]) -> Callable[[Row], list[str]]:
    def block(result: Row) -> list[str]:
        heads, rows, note = make(result)
        return [*table(heads, rows), "", f"{note} {machine({'machine': result['printed_on']})}"]

    return block


def privacy_cost(result: Row) -> list[str]:
    rows = []
    for target in sorted({row["target"] or math.inf for row in result["rows"]}, reverse=True):
        found = [row for row in result["rows"] if (row["target"] or math.inf) == target]
        spent = "none" if target == math.inf else f"{max(row['epsilon'] for row in found):.3g}"
        best_of = [100 * max(row["accuracy"], row["ema"]) for row in found]
        error = f" ± {stdev(best_of) / len(best_of) ** 0.5:.2f}" if len(best_of) > 1 else ""
        rows.append((spent, f"{fmean(best_of):.2f}{error}", len(found)))
    heads = ("ε", "test accuracy, % (± standard error)", "runs")
    note = (
        f"MNIST, MLP, 10 clients, {result['rounds']} rounds, K = 100, secure sums, each example clipped to "
        f"{result['clip']:g}, δ = {result['delta']:g}; the better of the weights and their moving average. "
        "`python experiments/privacy_cost/run.py --data DIR`."
    )
    return [*table(heads, rows), "", f"{note} {machine({'machine': result['printed_on']})}"]


def memory(result: Row) -> list[str]:
    cells = result["cells"]
    stamped = {name: row | {"machine": result["printed_on"]} for name, row in cells.items()}
    return [
        *table(*processes.summary(cells)),
        "",
        "Batch 32, K = 20. Peak resident memory of whole processes, one thread. `make bench-memory`. "
        + measured_on(stamped),
    ]


BLOCKS: dict[str, Callable[[Row], list[str]]] = {
    "demo": demo,
    "mnist-table": mnist_table,
    "mnist-confirm": mnist_confirm,
    "mnist-preset": mnist_preset,
    "search": search,
    "performance": performance,
    "performance:limits": performance_limits,
    "performance:seconds": performance_seconds,
    "performance:operations": performance_operations,
    "profile:steps": profile_steps,
    "profile:alternatives": profile_alternatives,
    "low-rank": low_rank,
    "coordinates": coordinates,
    "memory": memory,
    "mnist-speed": mnist_speed,
    "scale": scale,
    "secagg": secagg,
    "secagg:stages": secagg_stages,
    "secagg:aims": secagg_aims,
    "traffic": traffic,
    "deployment": deployment,
    "flower_simulation": flower_simulation,
    "flare_rounds": flare_rounds,
    "secagg:parameters": secagg_parameters,
    "privacy-cost": privacy_cost,
    **{name: leakage(make) for name, make in tables.TABLES.items()},
}


def best(row: Row) -> float:
    return max(float(row["accuracy"]), float(row["ema_accuracy"]))


def accuracies(row: Row) -> tuple[str, str]:
    return f"{row['accuracy']:.2f}", f"{row['ema_accuracy']:.2f}"


def machine(row: Row) -> str:
    m = row["machine"]
    versions = m["versions"]
    return (
        f"{m['processor']}, {m['cores']} cores, {m['system']}, torch {versions['torch']}, "
        f"NumPy {versions['numpy']}, {m['date']}."
    )


def table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def rendered(text: str) -> str:
    """``text`` with every block made again; a block without a result says so."""
    text = paper.rendered(text)

    def block(match: re.Match[str]) -> str:
        name = match[1]
        folder = LEAKAGE / "results" if name in tables.TABLES else RESULTS
        folder = PRIVACY_COST / "results" if name == "privacy-cost" else folder
        file = folder / f"{name.split(':')[0]}.json"
        lines = BLOCKS[name](json.loads(file.read_text())) if file.exists() else ["Not measured yet."]
        return "\n".join([f"<!-- {name} -->", *lines, f"<!-- /{name} -->"])

    return re.sub(rf"<!-- ({'|'.join(BLOCKS)}) -->.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a block is stale")
    check = parser.parse_args().check
    stale = 0
    made = {document: rendered for document in DOCUMENTS if document.exists()}
    made |= {page: partial(paper.readme, page) for page in paper.readmes()}
    for document, make in made.items():
        text = document.read_text()
        if text != (new := make(text)):
            stale += 1
            print(f"{'stale' if check else 'written'}: {document.relative_to(ROOT)}")
            if not check:
                document.write_text(new)
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
