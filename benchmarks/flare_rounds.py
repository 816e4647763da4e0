"""What a round costs on FLARE: `python benchmarks/flare_rounds.py`. About three minutes.

Four provisioned sites on this machine, LeNet on digits (27k floats down), K = 500 numbers up. Two pairs, by
turns, medians:

    bare      a group call of the Collab API that echoes as many bytes
    exchange  the same bytes as envelopes and replies through FlareDriver, from sites that measure nothing
    round     that, with all that the server does: the plan, the sum, the gradient of K directions, the step

    training  a round of `baffle train`'s job, whose sites' devices measure
    simulate  the same round in one process

Prints them, and keeps them in results/flare_rounds.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from baffle import federation
from baffle.config import TrainConfig
from baffle.environment import environment
from baffle.exchange import Envelope, Reply
from baffle.job import build
from baffle.plan import RoundPlan, RoundResult
from baffle.simulation import simulate

RESULT = Path(__file__).parent / "results" / "flare_rounds.json"
SETTINGS: dict[str, Any] = {
    "data": "digits",
    "model": "lenet",
    "clients": 4,
    "directions": 500,
    "rounds": 15,
    "evaluate_every": 100,
    "checkpoint_every": 100,
}
PAIRS = 60
WARM = 3  # rounds that are not counted

try:
    from nvflare.collab import collab

    from baffle.flare import Device, FlareDriver, Site
except ImportError:  # without FLARE, only the results can be read
    sys.exit("pip install 'baffle-fl[flare,torch]'")


class Mute(Site):  # type: ignore[misc, unused-ignore]
    """A site whose device knows the answer already; and which echoes."""

    def _build(self, name: str, local: Path) -> None:
        self._device = _Canned(name)

    @collab.publish  # type: ignore[untyped-decorator, unused-ignore]
    def echo(self, data: bytes, size: int) -> bytes:
        return data[:size]


class _Canned(Device):
    def __init__(self, name: str) -> None:
        self._name = name

    def handle(self, envelope: bytes, seconds: float) -> bytes:
        given = Envelope.decode(envelope)
        plan = RoundPlan.decode(given.plan)
        slopes = np.full(plan.estimator.directions, 1e-3, np.float32)
        answer = RoundResult(plan.round, plan.digest, 1, slopes)
        return Reply(given.ticket(self._name), "answer", answer.encode()).encode()


class Pairs:
    """The server's part: bare calls and rounds, by turns."""

    def __init__(self, out: str) -> None:
        self._out = out

    @collab.main  # type: ignore[untyped-decorator, unused-ignore]
    def main(self) -> None:
        sites = {proxy.name: proxy for proxy in collab.clients}
        server = build(TrainConfig(**SETTINGS), devices=True).server
        driver = FlareDriver(sites, least=len(sites))
        records = federation.run(server, driver, rounds=PAIRS + WARM, deadline=60.0)
        took: dict[str, list[float]] = {"bare": [], "exchange": [], "round": []}
        for _ in range(PAIRS + WARM):
            record = next(records)
            (stage,) = record.stages
            assert stage.answered == len(sites)
            down, up = (n // len(sites) for n in (stage.bytes_down, stage.bytes_up))
            data = os.urandom(down)
            started = time.perf_counter()
            answers = list(collab.clients(timeout=60.0).echo(data, up))
            took["bare"].append(time.perf_counter() - started)
            assert [len(answer) for _, answer in answers] == [up] * len(sites)
            took["exchange"].append(stage.seconds)
            took["round"].append(record.seconds)
        result = {name: median(seconds[WARM:]) for name, seconds in took.items()}
        Path(self._out).write_text(json.dumps(result | {"bytes_down": down, "bytes_up": up}))


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "flare"))
    from federation import Federation  # type: ignore[import-not-found, unused-ignore]

    config = TrainConfig(**SETTINGS)
    job = build(config)
    simulated = [r.seconds for r in simulate(job.server, job.clients, rounds=config.rounds or 0)]
    figures = {"simulate": median(simulated[WARM:])}
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "given.toml"
        settings.write_text(config.to_toml())
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        with Federation(Path(folder) / "flare", settings) as sites:
            done(sites, sites.submit("training"))
            rows = (sites.runs / "training" / "metrics.jsonl").read_text().splitlines()
            figures["training"] = median(json.loads(row)["seconds"] for row in rows[WARM:])
            out = Path(folder) / "pairs.json"
            done(sites, pairs(sites, out))
            figures |= json.loads(out.read_text())
    show(figures)
    kept = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "printed_on": environment(), **figures}
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


def pairs(sites: Any, out: Path) -> str:
    """Submits the job of ``Pairs`` and ``Mute``, which each kit is told to allow."""
    for name in ("server", *sites.names):
        resources = sites.kit(name) / "local" / "resources.json"
        given = json.loads(resources.read_text())
        given["class_allow_list"].append("flare_rounds.")
        resources.write_text(json.dumps(given))
    from baffle.flare import write_job

    job = write_job(out.parent / "job", sites.settings, "pairs")
    for end, old, new in (
        ("server", "baffle.flare.Training", "Pairs"),
        ("client", "baffle.flare.Site", "Mute"),
    ):
        path = job / "app" / "config" / f"config_fed_{end}.json"
        given = json.loads(path.read_text())
        (part,) = given["components"]
        assert part["path"] == old
        part |= {"path": f"flare_rounds.{new}", "args": {"out": str(out)} if end == "server" else {}}
        path.write_text(json.dumps(given))
    return str(sites.session().submit_job(str(job)))


def done(sites: Any, job: str) -> None:
    status = sites.finish(job, 300)
    if status != "FINISHED:COMPLETED":
        raise SystemExit(f"{status}\n{sites.log('server').read_text()[-3000:]}")


def show(figures: Mapping[str, float]) -> None:
    for names in (("bare", "exchange", "round"), ("simulate", "training")):
        for name in names:
            ratio = figures[name] / figures[names[0]]
            print(f"{name:10} {1e3 * figures[name]:8.1f} ms  {ratio:5.2f} × {names[0]}")
    print(f"{figures['bytes_down']} bytes down and {figures['bytes_up']} up for each of the sites")


if __name__ == "__main__":
    sys.exit(main())
