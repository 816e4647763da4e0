"""What does ε cost in accuracy? One network, the same rounds, more and more noise.

    OMP_NUM_THREADS=1 python experiments/privacy_cost/run.py --data DIR

MNIST, MLP of 17,098 parameters, ten iid clients, secure sums, K = 100, privacy of an example at δ = 1e-5.
Every run is a real one: forward passes, clipping of each example, shares of noise, masks. ``--quick`` takes
seconds on the packaged digits and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from baffle.config import TrainConfig
from baffle.environment import environment
from baffle.training import train

RESULTS = Path(__file__).parent / "results"
EPSILONS = (None, 8.0, 2.0, 0.5, 0.1)
CLIP = 30.0


def settings(epsilon: float | None, seed: int, rounds: int, data: Path | None) -> dict[str, Any]:
    table: dict[str, Any] = {
        "data": "digits" if data is None else "mnist",
        "model": "mlp",
        "clients": 10,
        "secure": True,
        "directions": 100,
        "rounds": rounds,
        "learning_rate": 0.01,
        "evaluate_every": rounds,
        "seed": seed,
    }
    if data is not None:
        table["data_folder"] = str(data)
    if epsilon is not None:
        table |= {"privacy": "example", "clip_norm": CLIP, "target_epsilon": epsilon}
    return table


def run(epsilon: float | None, seed: int, rounds: int, data: Path | None) -> dict[str, Any]:
    config = TrainConfig.resolve(settings(epsilon, seed, rounds, data))
    with tempfile.TemporaryDirectory() as folder:
        last = train(config, Path(folder) / "run", lambda _: None).metrics()[-1]
    return {
        "target": epsilon,
        "epsilon": last.get("epsilon"),
        "seed": seed,
        "accuracy": last["test_accuracy"],
        "ema": last["ema_accuracy"],
        "seconds": round(last["elapsed"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of MNIST, as `baffle train --data-folder` takes it")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the packaged digits, 3 rounds, nothing kept")
    options = parser.parse_args()
    if options.quick:
        print([run(epsilon, 0, 3, None) for epsilon in (None, 8.0)])
        return
    if options.data is None:
        parser.error("--data is needed (or --quick)")
    rows = []
    for seed in range(options.seeds):
        for epsilon in EPSILONS:
            rows.append(run(epsilon, seed, options.rounds, options.data))
            print(rows[-1], flush=True)
            result = {
                "rounds": options.rounds,
                "clip": CLIP,
                "delta": 1e-5,
                "rows": rows,
                "printed_on": environment(),
            }
            (RESULTS / "privacy-cost.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
