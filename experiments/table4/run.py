"""The paper's Table 4, memory of forward passes beside backpropagation's: `python experiments/table4/run.py`.

run.py            from benchmarks/results/memory.json (`make bench-memory`): prints it, writes it into
                  README.md and results/table4.json
run.py --quick    measures LeNet with two directions, prints, keeps nothing
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parents[1] / "benchmarks"))

import memory  # noqa: E402
from report import table  # noqa: E402

# Of the paper's Table 4: memory of BAFFLE / of backpropagation, percent, in the order in which it has them.
PAPER = ((10.35, 10.43, 10.63), (7.95, 7.32, 5.48))

NETWORKS = {
    "lenet": "LeNet, 32×32",
    "wrn-10-2": "WRN-10-2, 32×32",
    "mobilenet-v2": "MobileNetV2 1.0, 224×224",
}
# What was aimed at: MB of the whole process, of backpropagation's percent, with the NumPy runtime.
MOST_MB = {"lenet": 40, "wrn-10-2": 45, "mobilenet-v2": 70}
MOST_PERCENT = {"lenet": 12, "wrn-10-2": 12, "mobilenet-v2": 3}
# CPU time of a forward pass beside eager torch's, one core.
MOST_TIME = {"numpy": 2.5, "onnx": 1.0}

BACKPROP, EAGER = "torch backprop", memory.EAGER
FLOORS = {"torch": "import torch", "onnx": "import onnxruntime", "numpy": "import numpy"}

Cells = dict[str, dict[str, Any]]
Row = dict[str, Any]


def ways(cells: Cells) -> list[str]:
    """Those that were measured and infer only."""
    return [
        what
        for what in memory.WAYS
        if what not in (BACKPROP, EAGER) and any(f"{network}, {what}" in cells for network in NETWORKS)
    ]


def ratios(cells: Cells) -> list[Row]:
    """Percent of backpropagation's memory, of whole processes and beyond what imports take, a way a row."""
    rows = []
    for what in ways(cells):
        row: Row = {"way": what, "whole": {}, "beyond": {}}
        for network in NETWORKS:
            ours, theirs = peak(cells, f"{network}, {what}"), peak(cells, f"{network}, {BACKPROP}")
            floor, their_floor = peak(cells, FLOORS[what.split()[0]]), peak(cells, FLOORS["torch"])
            if ours is not None and theirs is not None:
                row["whole"][network] = round(100 * ours / theirs, 2)
                if floor is not None and their_floor is not None:
                    row["beyond"][network] = round(100 * (ours - floor) / (theirs - their_floor), 2)
        rows.append(row)
    return rows


def peak(cells: Cells, name: str) -> float | None:
    found: float | None = cells.get(name, {}).get("peak_mb")
    return found


def verdicts(cells: Cells) -> list[Row]:
    """Each aim beside what was measured, of the NumPy runtime's modes with float32 and of ONNX Runtime."""
    rows = []
    for what in ways(cells):
        kind = what.split()[0]
        for network in NETWORKS if kind in MOST_TIME else ():
            cell, theirs = cells.get(f"{network}, {what}", {}), peak(cells, f"{network}, {BACKPROP}")
            aims: list[tuple[str, float | None, float]] = []
            if kind == "numpy":
                mb = cell.get("peak_mb")
                share = 100 * mb / theirs if mb is not None and theirs is not None else None
                aims = [("MB", mb, MOST_MB[network]), ("% of backprop", share, MOST_PERCENT[network])]
            aims.append(("× eager torch's forward pass", cell.get("forward_over_eager"), MOST_TIME[kind]))
            rows += [
                {
                    "network": network,
                    "way": what,
                    "unit": unit,
                    "most": most,
                    "measured": round(measured, 2),
                    "met": measured <= most,
                }
                for unit, measured, most in aims
                if measured is not None
            ]
    return rows


def page(content: Row) -> list[str]:
    """The two tables, with what they were printed on."""
    heads = ("memory, % of backpropagation's", *NETWORKS.values())

    def percent(row: Row, of: str) -> tuple[str, ...]:
        return tuple(f"{row[of][network]:.2f}" if network in row[of] else "–" for network in NETWORKS)

    shares = [(memory.WAYS[row["way"]], *percent(row, "whole")) for row in content["ratios"]] + [
        (f"{memory.WAYS[row['way']]}, beyond imports", *percent(row, "beyond")) for row in content["ratios"]
    ]
    aims = [
        (
            NETWORKS[row["network"]],
            memory.WAYS[row["way"]],
            f"{row['measured']:g}",
            f"≤ {row['most']:g} {row['unit']}",
            "met" if row["met"] else "**missed**",
        )
        for row in content["verdicts"]
    ]
    paper = " and ".join(" / ".join(f"{figure:.2f}" for figure in figures) for figures in content["paper"])
    return [
        f"The paper's Table 4 has {paper} %.",
        "",
        *table(heads, shares),
        "",
        *table(("network", "way", "measured", "aim", ""), aims),
        "",
        f"`make bench-memory`, `python experiments/table4/run.py`. {content['measured_on']}",
    ]


def made(kept: Row) -> Row:
    """The table's content from what `benchmarks/memory.py` keeps."""
    from report import measured_on

    cells = kept["cells"]
    stamped = {name: row | {"machine": kept["printed_on"]} for name, row in cells.items()}
    return {
        "printed_on": kept["printed_on"],
        "measured_on": measured_on(stamped),
        "paper": PAPER,
        "ratios": ratios(cells),
        "verdicts": verdicts(cells),
    }


def inserted(text: str, lines: list[str]) -> str:
    """``text`` with ``lines`` between its two marks."""
    block = "\n".join(["<!-- table4 -->", *lines, "<!-- /table4 -->"])
    return re.sub("<!-- table4 -->.*?<!-- /table4 -->", lambda _: block, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    if parser.parse_args().quick:
        cells = memory.quickly()
        print(json.dumps({"ratios": ratios(cells), "verdicts": verdicts(cells)}, indent=1))
        return
    content = made(json.loads(memory.RESULT.read_text()))
    (FOLDER / "results").mkdir(exist_ok=True)
    (FOLDER / "results" / "table4.json").write_text(json.dumps(content, indent=1) + "\n")
    readme = FOLDER / "README.md"
    readme.write_text(inserted(readme.read_text(), page(content)))
    print("\n".join(page(content)))


if __name__ == "__main__":
    main()
