"""Results as tables, for `benchmarks/report.py`: heads, rows, and the line beneath."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[Any, ...]], str]

COMMAND = "`python experiments/leakage/run.py {} --data DIR`."


def membership(result: Result) -> Table:
    return _by_addends(result, "auc", "AUC, neither clipped nor noised", None)


def rates(result: Result) -> Table:
    return _by_addends(result, "tpr", "true positives at 1 % false ones", None)


def noise(result: Result) -> Table:
    most = max(cell["K"] for cell in result["cells"])
    heads, rows, note = _by_addends(result, "auc", f"AUC, K = {most}", most)
    return (*heads, "no attack above"), rows, note


def _by_addends(result: Result, figure: str, title: str, count: int | None) -> Table:
    """Rows of K without noise; with ``count``, rows of noise for that K."""
    chosen = [
        c for c in result["cells"] if (c["noise_multiplier"] is None if count is None else c["K"] == count)
    ]
    addends = sorted({cell["addends"] for cell in chosen})
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for cell in chosen:
        z = cell["noise_multiplier"]
        what = f"K = {cell['K']}" if count is None else "as it is" if z is None else f"clipped, z = {z:g}"
        found.setdefault((cell["network"], what), {})[cell["addends"]] = cell
    rows = []
    for (network, what), cells in found.items():
        figures = [plus_minus((cells[a][figure], cells[a][f"{figure}_error"]), 3) for a in addends]
        bound = [] if count is None else [f"{cells[addends[0]]['bound']:.3f}"]
        rows.append((f"{network}, {what}", *figures, *bound))
    note = (
        f"{result['data']}, LeNet; test accuracy of the trained one {result['accuracy']['trained']} %. "
        f"{result['trials']:,} fresh sums with the target and as many without a cell, "
        f"{result['sizes']['targets']} targets; ± is the standard error over targets (bootstrap)."
    )
    return (title, *(f"A = {a}" for a in addends)), rows, f"{note} {COMMAND.format('membership')}"


def controls(result: Result) -> Table:
    rows: list[tuple[Any, ...]] = []
    for found in result["controls"]:
        positive, negative, network = found["positive"], found["negative"], found["network"]
        agreement, named = found["agreement"], found["named"]
        low, high = agreement["quartiles"]
        rows += [
            (
                f"{network}: one example's raw upload",
                positive["uploads"],
                plus_minus((positive["auc"], positive["auc_error"]), 3),
                f"{named['right']} of {positive['uploads']} named among {named['candidates']}",
            ),
            (
                f"{network}: one example's masked upload",
                result["trials"],
                plus_minus((negative["auc"], negative["auc_error"]), 3),
                f"true positives at 1 %: {plus_minus((negative['tpr'], negative['tpr_error']), 3)}",
            ),
            (
                f"{network}: slopes by passes beside derivatives",
                2 * positive["uploads"],
                "–",
                f"relative distance {agreement['whole']:.1e}, quartiles {low:.1e} to {high:.1e}",
            ),
        ]
    most = result["controls"][0]["positive"]["K"]
    return (f"control, K = {most}", "trials", "AUC", ""), rows, COMMAND.format("membership")


def figure5(result: Result) -> Table:
    rows = []
    for row in result["rows"]:
        for key, words in (("real_noise", "real beside noise"), ("real_real", "real beside real")):
            found = row[key]
            rows.append(
                (
                    f"{row['network']}: {words}",
                    plus_minus(found["ratio"], 2),
                    plus_minus(found["distance"], 3),
                    f"{found['rejected']} of {result['pairs']}",
                    plus_minus(found["shape_distance"], 3),
                    f"{found['shape_rejected']} of {result['pairs']}",
                )
            )
    heads = (
        f"ΔL, K = {result['K']}, batches of {result['batch']}",
        "ratio of deviations",
        "KS distance",
        "rejected at 5 %",
        "… each over its deviation",
        "rejected at 5 %",
    )
    lengths = "; ".join(
        f"{row['network']} {plus_minus(row['deviation_over_gradient'], 3)}" for row in result["rows"]
    )
    note = (
        f"{result['data']}, LeNet, {result['pairs']} pairs of batches, ± standard error over pairs. "
        f"Deviation of ΔL over σ‖∇L‖: {lengths}. {COMMAND.format('figure5')}"
    )
    return heads, rows, note


def figure5_seed(result: Result) -> Table:
    rows = [
        (
            f"{row['network']}, {size} example{'s' if size != '1' else ''}",
            f"{found['batches']:,}",
            plus_minus(found["histogram"], 3),
            plus_minus(found["in_order"], 3),
        )
        for row in result["rows"]
        for size, found in row["told_apart"].items()
    ]
    heads = (
        "real or noise? AUC",
        "batches of each",
        "from the histogram's width",
        "from the numbers in order",
    )
    return (
        heads,
        rows,
        f"K = {result['K']}; ± standard error over batches (bootstrap). {COMMAND.format('figure5')}",
    )


def collusion(result: Result) -> Table:
    rows = [
        (
            row["colluders"],
            f"{row['exact']} of {result['rounds']}",
            plus_minus((row["correlation"], row["correlation_error"]), 3),
        )
        for row in result["rows"]
    ]
    heads = (
        f"colluders, of {result['clients']} clients",
        "the target's exact upload",
        "correlation of what is left with it (absolute)",
    )
    note = (
        f"The real protocol, {result['threshold']} of {result['clients'] - 1} shares open a secret, K = "
        f"{result['values']}; ± standard error over {result['rounds']} rounds. Independent numbers have "
        f"{result['chance']:.3f}. {COMMAND.format('collusion').replace(' --data DIR', '')}"
    )
    return heads, rows, note


def inversion(result: Result) -> Table:
    rows = []
    for row in result["rows"]:
        attack = f"{row['attack']} matching" if row["upload"] else row["attack"]
        rows.append(
            (
                f"{row['network']}, {row['examples']}",
                row["upload"] or "none",
                attack,
                f"{row['mse'][0]:.1e} ± {row['mse'][1]:.0e}",
                plus_minus(row["psnr"], 1),
                plus_minus(row["ssim"], 3),
                plus_minus(row["closer"], 2),
            )
        )
    heads = (
        "network, examples",
        "upload",
        "attack",
        "MSE",
        "PSNR, dB",
        "SSIM",
        "closer than any other client's image",
    )
    clients = ", ".join(f"{count} ({network}, {examples})" for network, examples, count in result["cases"])
    note = (
        f"{result['data']}, {result['pixels']} pixels, first weights, labels known. Clients attacked: "
        f"{clients}; ± standard error over clients. {COMMAND.format('inversion')}"
    )
    return heads, rows, note


def inversion_psnr(result: Result) -> Table:
    """The same in short: PSNR alone, a column for each network and number of examples."""
    cases = [f"{network}, {examples}" for network, examples, _ in result["cases"]]
    found: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        what = f"{row['upload']}, {row['attack']} matching" if row["upload"] else f"none: {row['attack']}"
        found.setdefault(what, {})[f"{row['network']}, {row['examples']}"] = plus_minus(row["psnr"], 1)
    rows = [(what, *(figures[case] for case in cases)) for what, figures in found.items()]
    note = "PSNR of the reconstruction, dB, ± standard error over clients; columns: network, examples."
    return ("upload, attack", *cases), rows, f"{note} {COMMAND.format('inversion')}"


def plus_minus(figure: tuple[float, float], digits: int) -> str:
    return f"{figure[0]:.{digits}f} ± {figure[1]:.{digits}f}"


TABLES: dict[str, Callable[[Result], Table]] = {
    "leakage-figure5": figure5,
    "leakage-figure5:seed": figure5_seed,
    "leakage-membership": membership,
    "leakage-membership:rates": rates,
    "leakage-membership:noise": noise,
    "leakage-membership:controls": controls,
    "leakage-collusion": collusion,
    "leakage-inversion": inversion,
    "leakage-inversion:psnr": inversion_psnr,
}
