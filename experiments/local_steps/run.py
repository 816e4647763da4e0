"""Do local steps save rounds? The same forward passes, in many rounds or in few, one step each or several.

    OMP_NUM_THREADS=1 python experiments/local_steps/run.py

Digits, MLP of 17,098 parameters, four iid clients, batches of 32. Every row spends the same forward passes,
100 for each local step (a single step of a round takes all of that round's), and is given three rates.
``--show`` prints the table of the kept result, ``--quick`` takes seconds and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from baffle.config import TrainConfig
from baffle.environment import environment
from baffle.training import train

RESULTS = Path(__file__).parent / "results" / "local-steps.json"
PASSES = 100  # of a local step
TOTAL = 60  # local steps of a run
SHAPES = ((1, 1), (2, 1), (2, 2), (5, 1), (5, 5))  # PASSES a round; steps that they pay for
# Federated averaging: the server goes S·η along the mean. A single step goes as far, along one gradient.
RATES = {"sgd": (0.05, 0.1, 0.2), "adam": (0.02, 0.05, 0.1)}
WALK = 0.1  # η of the clients' steps under adam


def settings(server: str, share: int, steps: int, rate: float, seed: int, total: int) -> dict[str, Any]:
    return {
        "model": "mlp",
        "clients": 4,
        "rounds": total // share,
        "forward_passes": PASSES * share,
        "local_steps": steps,
        "local_learning_rate": rate if server == "sgd" else WALK,
        "optimizer": server,
        "learning_rate": share * rate if server == "sgd" else rate,
        "evaluate_every": total // share,
        "threads": 1,
        "seed": seed,
    }


def run(server: str, share: int, steps: int, rate: float, seed: int, total: int = TOTAL) -> dict[str, Any]:
    config = TrainConfig.resolve(settings(server, share, steps, rate, seed, total))
    with tempfile.TemporaryDirectory() as folder:
        rows = train(config, Path(folder) / "run", lambda _: None).metrics()
    return {
        "server": server,
        "rounds": len(rows),
        "steps": steps,
        "rate": rate,
        "seed": seed,
        "accuracy": rows[-1]["test_accuracy"],
        "forward_passes": sum(row["forward_passes"] for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
    }


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Of each kind of run, the rate with the best mean over seeds, on the test set."""
    runs: dict[tuple[str, int, int], dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        key = row["server"], row["rounds"], row["steps"]
        runs.setdefault(key, {}).setdefault(row["rate"], []).append(row)
    lines = [
        "| server | rounds | local steps | forward passes | kB up | rate | test accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for (server, rounds, steps), rates in runs.items():
        rate = max(rates, key=lambda rate: statistics.mean(row["accuracy"] for row in rates[rate]))
        found = [100 * row["accuracy"] for row in rates[rate]]
        spread = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        row = rates[rate][0]
        lines.append(
            f"| {server} | {rounds} | {steps} | {row['forward_passes']:,} | {row['bytes_up'] / 1000:.0f} "
            f"| {rate:g} | {statistics.mean(found):.1f} ± {spread:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a twelfth of the rounds, nothing kept")
    parser.add_argument("--show", action="store_true", help="the table of the kept result")
    options = parser.parse_args()
    if options.quick:
        print(table([run("sgd", 5, steps, 0.1, 0, 5) for steps in (1, 5)]))
        return
    if options.show:
        print(table(json.loads(RESULTS.read_text())["rows"]))
        return
    rows = []
    for server, rates in RATES.items():
        for share, steps in SHAPES:
            for rate in rates:
                for seed in range(options.seeds):
                    rows.append(run(server, share, steps, rate, seed))
                    print(rows[-1], flush=True)
    RESULTS.write_text(json.dumps({"rows": rows, "printed_on": environment()}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
