"""Many virtual clients: Flower's simulation (Ray) beside this library's own, with the same job.

    python benchmarks/flower_simulation.py          needs the extra flower, and ray (flwr[simulation])

Both run digits with the MLP of the package, every client in every round. Printed are the seconds of a round,
the median over rounds after the first (in which Ray's processes build their clients), and whether both ended
with the same weights. Ours is run before and after, and the quicker run counts: the machine may be shared.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of every process: Ray's workers are as many as the cores

import numpy as np

from baffle import training
from baffle.config import TrainConfig
from baffle.environment import environment
from baffle.runs import RunFolder
from examples.flower.local_fleet import Fleet

RESULT = Path(__file__).parent / "results" / "flower_simulation.json"
COUNTS = (20, 100)
BASE = TrainConfig.resolve(
    {"model": "mlp", "directions": 100, "rounds": 7, "batch_size": 8, "evaluate_every": 7, "seed": 3}
)
SECONDS = 150.0  # for one of Flower's


def ours(config: TrainConfig, folder: Path) -> RunFolder:
    return training.train(replace(config, threads=os.cpu_count()), folder, lambda _: None)


def flower(config: TrainConfig, folder: Path) -> tuple[RunFolder, float]:
    """The run, and the seconds from ``flwr run`` to its end."""
    with Fleet(folder, []) as fleet:
        fleet.superlink("--simulation")
        fleet.connect()
        fleet.superlink_executor()
        started = time.perf_counter()
        nodes = f"num-supernodes={config.clients} client-resources-num-cpus=1"
        settings = fleet.settings(config)
        settings.write_text(settings.read_text() + "poll = 0.02\n")
        status, details = fleet.wait(fleet.submit(settings, "--federation-config", nodes), SECONDS)
        if status != "finished:completed":
            raise SystemExit(f"Flower's run is {status}: {details}")
        return RunFolder.open(fleet.folder / "run"), time.perf_counter() - started


def seconds_a_round(run: RunFolder) -> float:
    return float(statistics.median(row["seconds"] for row in run.metrics()[1:]))


def main() -> None:
    if importlib.util.find_spec("ray") is None:
        raise SystemExit("Flower's simulation needs ray: pip install 'flwr[simulation]'")
    rows = []
    for count in COUNTS:
        config = replace(BASE, clients=count)
        with tempfile.TemporaryDirectory(prefix="flower-simulation-") as name:
            folder = Path(name)
            before = ours(config, folder / "before")
            run, whole = flower(config, folder / "fleet")
            after = ours(config, folder / "after")
            same = np.array_equal(run.load_weights("final"), before.load_weights("final"))
            own, theirs = min(map(seconds_a_round, (before, after))), seconds_a_round(run)
        rows.append(
            {
                "clients": count,
                "ours": own,
                "flower": theirs,
                "ratio": theirs / own,
                "flower_whole_run": whole,
                "rounds": config.rounds,
                "same_weights": same,
            }
        )
        print(
            f"{count:4d} clients: {own:.3f} s a round here, {theirs:.3f} s in Flower's simulation "
            f"({theirs / own:.1f} times), {whole:.0f} s for its run; "
            f"{'the same weights' if same else 'OTHER WEIGHTS'}",
            flush=True,
        )
    where = environment()
    where["versions"] |= {name: metadata.version(name) for name in ("flwr", "ray")}
    RESULT.write_text(json.dumps({"printed_on": where, "config": BASE.to_toml(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
