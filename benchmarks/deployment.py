"""What rounds over real processes cost, in seconds and bytes by stage: `make deployment`.

    deployment.py                         every cell, in turn; tables; results/deployment.json (half an hour)
    deployment.py --only "flower, 4 "     the cells whose names hold these letters; keeps the others
    deployment.py --read                  measures nothing: prints what is kept

One job (digits, MLP, K = 500, one sample a measurement) with as many clients, over each driver:

    process   simulate: no transport, everything in turn
    sockets   devices behind sockets of this machine
    flare     FLARE: a server, a site for each client (two processes), mTLS
    flower    Flower: SuperLink, a SuperNode and an executor for each client, TLS, a process a message

The devices of the last three live in one process here, each behind its own socket, so that fifty fit into
this machine's memory; they measure one after the other. A stage's seconds are the median over steady rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import FILE, commit, machine

from baffle import training
from baffle.config import TrainConfig, read_toml
from baffle.device import Sockets, serve
from baffle.endpoint import Endpoint
from baffle.identities import read_identity
from baffle.job import build_client
from baffle.runs import RunFolder
from baffle.secure import FileLedger

sys.path.append(str(Path(__file__).parents[1]))  # examples

RESULT = FILE.with_name("deployment.json")
DRIVERS = ("process", "sockets", "flare", "flower")
CLIENTS = (4, 10, 25, 50)
JOB: dict[str, Any] = {
    "model": "mlp",
    "directions": 500,
    "batch_size": 1,
    "threads": 1,
    "evaluate_every": 1000,
    "checkpoint_every": 1000,
}
SECURE: dict[str, Any] = {"secure": True, "max_colluding": 0.0, "max_dropout": 0.0}
Cell = tuple[str, int, bool]
Row = dict[str, Any]


def rounds_of(driver: str, clients: int) -> int:
    """The first two are not steady: a process that has just started is slow."""
    return 12 if driver != "flower" else 5 if clients <= 10 else 3


def name_of(cell: Cell) -> str:
    driver, clients, secure = cell
    return f"{driver}, {clients} clients, {'secure' if secure else 'plain'}"


def cells() -> list[Cell]:
    return [
        (driver, clients, secure) for driver in DRIVERS for clients in CLIENTS for secure in (False, True)
    ]


# -- devices ----------------------------------------------------------------------------------------


def host(config: Path, sockets: Path, keys: str) -> int:
    """All clients of a config in this process, a thread and a socket each; they measure in turn."""
    settings, turn, waiting = TrainConfig.resolve(read_toml(config)), threading.Lock(), []

    class InTurn(Endpoint):
        def handle(self, data: bytes) -> bytes:
            with turn:
                return super().handle(data)

    for number in range(settings.clients):
        name = f"client-{number:03d}"
        own: dict[str, Any] = {}
        if settings.secure:
            own["identity"] = read_identity(Path(keys.replace("NAME", name)))
            own["ledger"] = FileLedger(sockets / f"{name}.ledger")
        endpoint, listens = InTurn(build_client(settings, name, **own)), threading.Event()
        thread = threading.Thread(
            target=serve, args=(endpoint, sockets / f"{name}.sock", listens.set), daemon=True
        )
        thread.start()
        listens.wait()
        waiting.append(thread)
    print("ready", flush=True)
    sys.stdin.read()  # until whoever started it ends
    return 0


class Host:
    """That process. A context."""

    def __init__(self, config: Path, sockets: Path, keys: str) -> None:
        command = [sys.executable, __file__, "--host", str(config), str(sockets), keys]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the devices did not start")

    def end(self) -> None:
        self._process.communicate()


# -- drivers ----------------------------------------------------------------------------------------


def run(cell: Cell, folder: Path) -> RunFolder:
    """The run folder of a cell's job."""
    driver, clients, secure = cell
    config = TrainConfig.resolve(
        JOB, {"clients": clients, "rounds": rounds_of(driver, clients), **(SECURE if secure else {})}
    )
    if driver == "process":
        return training.train(config, folder / "run", lambda _: None)
    return {"sockets": over_sockets, "flare": over_flare, "flower": over_flower}[driver](config, folder)


def over_sockets(config: TrainConfig, folder: Path) -> RunFolder:
    keys = folder / "keys"
    keys.mkdir()
    settings = folder / "settings.toml"
    text = config.to_toml()
    if config.secure:
        lines = [
            subprocess.run(
                [sys.executable, "-m", "baffle", "identity", str(keys / f"{name}.key"), "--name", name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for name in (f"client-{number:03d}" for number in range(config.clients))
        ]
        (keys / "roster").write_text("".join(lines))
        text += f"roster = {json.dumps(str(keys / 'roster'))}\n"
    settings.write_text(text)
    devices = Host(settings, folder, str(keys / "NAME.key"))
    try:
        full = TrainConfig.resolve(read_toml(settings))
        return training.train(
            full, folder / "run", lambda _: None, driver=Sockets(folder, least=config.clients)
        )
    finally:
        devices.end()


def over_flare(config: TrainConfig, folder: Path) -> RunFolder:
    from examples.flare.federation import Federation

    hosts: list[Host] = []

    class Hosted(Federation):
        def start_device(self, name: str) -> None:
            if not hosts:
                self._sockets.mkdir(mode=0o700, exist_ok=True)
                hosts.append(Host(self.settings, self._sockets, str(self.folder / "NAME.key")))

    settings = folder / "settings.toml"
    settings.write_text(config.to_toml())
    try:
        with Hosted(folder / "fleet", settings) as federation:
            status = federation.finish(federation.submit("run", 600.0), 1200.0)
            if not status.endswith("COMPLETED"):
                raise RuntimeError(f"FLARE: {status}")
            shutil.copytree(federation.runs / "run", folder / "run")
    finally:
        for devices in hosts:
            devices.end()
    return RunFolder.open(folder / "run")


def over_flower(config: TrainConfig, folder: Path) -> RunFolder:
    from examples.flower.local_fleet import Fleet

    names = [f"client-{number:03d}" for number in range(config.clients)]
    hosts: list[Host] = []
    try:
        with Fleet(folder / "fleet", names) as fleet:
            fleet.superlink()
            fleet.superlink_executor()
            fleet.connect()
            if config.secure:
                for name in names:
                    fleet.identity(name)
            path = fleet.folder / "federation.toml"
            path.write_text(fleet._with_roster(config).to_toml())
            hosts.append(Host(path, fleet.folder / "sockets", str(fleet.folder / "keys" / "NAME.identity")))
            for at in range(0, len(names), 10):
                fleet.register(names[at : at + 10])
            for name in names:
                fleet.node(name)
            settle()
            status, details = fleet.wait(fleet.submit(fleet.settings(config)), 1500)
            if status != "finished:completed":
                raise RuntimeError(f"Flower: {status} {details}")
            shutil.copytree(fleet.folder / "run", folder / "run")
    finally:
        for devices in hosts:
            devices.end()
    return RunFolder.open(folder / "run")


def settle(most: float = 40.0) -> None:
    """Waits until processes that have just started rest: a busy machine misses Flower's heartbeats."""
    until = time.monotonic() + most
    while time.monotonic() < until:
        before = os.times().elapsed, _busy()
        time.sleep(5)
        if (_busy() - before[1]) / (os.times().elapsed - before[0]) < 0.5:
            return


def _busy() -> float:
    """Seconds of work of all cores since the machine started (Linux)."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


# -- figures ----------------------------------------------------------------------------------------


def figures(folder: RunFolder) -> Row:
    """Seconds and bytes per client of each stage of steady rounds (the median), and of the first round."""
    rows = folder.metrics()
    steady, clients = rows[2:], rows[0]["participants"]
    lost = sum(row["dropped"] for row in rows)
    stages = {
        stage: {
            "seconds": median(row["stages"][stage]["seconds"] for row in steady),
            "down": median(row["stages"][stage]["bytes_down"] for row in steady) / clients,
            "up": median(row["stages"][stage]["bytes_up"] for row in steady) / clients,
        }
        for stage in steady[-1]["stages"]
    }
    return {
        "stages": stages,
        "round": median(row["seconds"] for row in steady),
        "first": rows[0]["seconds"],
        "first_stages": list(rows[0]["stages"]),
        "rounds": len(rows),
        "dropped": lost,
    }


def measure(cell: Cell) -> Row:
    with tempfile.TemporaryDirectory(prefix="b-") as folder:  # short: sockets lie in it
        try:
            found = figures(run(cell, Path(folder)))
        except Exception as error:  # of a deployment that does not fit here: that, too, is a result
            found = {"failed": f"{type(error).__name__}: {error}".replace(folder, "")[:200]}
    return {**found, "commit": commit(), "load": round(os.getloadavg()[0], 1)}


HEADS = (
    "driver",
    "clients",
    "sums",
    "seconds a round",
    "by stage",
    "first round",
    "kB down",
    "kB up",
    "lost",
)
LABELS = {
    "process": "one process",
    "sockets": "devices behind sockets",
    "flare": "FLARE",
    "flower": "Flower",
}


def rows(result: Row) -> list[tuple[str, ...]]:
    """The table of the documents."""
    found: list[tuple[str, ...]] = []
    for cell in cells():
        row = result["cells"].get(name_of(cell))
        if row is None:
            continue
        driver, clients, secure = cell
        sums = "secure" if secure else "plain"
        if "failed" in row:
            found.append((LABELS[driver], str(clients), sums, "failed", row["failed"], *["–"] * 4))
            continue
        stages = row["stages"]
        found.append(
            (
                LABELS[driver],
                str(clients),
                sums,
                f"{row['round']:.3g}",
                ", ".join(f"{stage} {figure['seconds']:.3g}" for stage, figure in stages.items()),
                f"{row['first']:.3g}",
                f"{sum(figure['down'] for figure in stages.values()) / 1000:.1f}",
                f"{sum(figure['up'] for figure in stages.values()) / 1000:.1f}",
                str(row["dropped"]),
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose names hold these letters")
    parser.add_argument("--read", action="store_true", help="print what is kept")
    parser.add_argument("--host", nargs=3, metavar=("CONFIG", "SOCKETS", "KEYS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.host:
        return host(Path(options.host[0]), Path(options.host[1]), options.host[2])
    result: Row = json.loads(RESULT.read_text()) if RESULT.exists() else {"cells": {}}
    for cell in cells():
        if options.read or options.only not in name_of(cell):
            continue
        print(name_of(cell), flush=True)
        result["cells"][name_of(cell)] = measure(cell)
        result["printed_on"] = machine()
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row in (HEADS, *rows(result)):
        print(
            "  ".join(
                text.ljust(width) for text, width in zip(row, (24, 8, 8, 16, 44, 12, 8, 8, 4), strict=True)
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
