"""What the enclave's walls cost: memory of the whole worker, and time beside the same client without walls.

    enclave.py            LeNet, WRN-10-2 and MobileNetV2 (224 × 224), kept in results/enclave.json: minutes
    enclave.py --page     writes what is kept into docs/enclave.md
    enclave.py --quick    LeNet, two directions, one turn; nothing is kept

Batch 32, K = 20 directions, `forward`, weights in float32, by `NumpyRuntime` on one core. The worker has a
limit of 90·10⁶ bytes, by a control group, for all of it: the kernel kills it above. `group`: the most bytes
that the group held at any time (memory.max_usage_in_bytes or memory.peak), bubblewrap included; pages of
files that are in the machine's cache already are not counted there. `resident`: the worker's VmHWM, which
counts them. Rounds of the worker and of the unprotected client take turns, and answer with the same bytes.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before NumPy is imported: one thread, and no numba, which a device has not
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "BAFFLE_KERNELS": "0"}

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import report
from bench import commit, machine, rounded
from memory_cell import BATCH, NETWORKS, module_of

import baffle
from baffle.bundle import Bundle
from baffle.enclave.host import EnclaveDriver, EnclaveHost, Setup, provision, provisioning
from baffle.enclave.sandbox import Limits
from baffle.enclave.software import SoftwareRoot, SoftwareVerifier
from baffle.enclave.worker import Rows
from baffle.endpoint import Endpoint
from baffle.exchange import Envelope, Reply
from baffle.export.torch import from_torch
from baffle.federation import Outcome
from baffle.plan import ModelMessage, weights_digest
from baffle.runtimes.numpy import NumpyRuntime
from baffle.secagg.primitives import Identity
from baffle.stream import seed_from

RESULT = Path(__file__).parent / "results" / "enclave.json"
PAGE = Path(__file__).parents[1] / "docs" / "enclave.md"
LIMIT = 90_000_000
DIRECTIONS = 20
NAME = "client"
# How each network is run inside the limit: settings of NumpyRuntime.
SETTINGS: dict[str, dict[str, Any]] = {
    "lenet": {"mode": "layer"},
    "wrn-10-2": {"mode": "layer"},
    "mobilenet-v2": {"mode": "stream", "memory": 8 << 20},
}
Row = dict[str, Any]


class One:
    """A driver for one host in this process."""

    def __init__(self, host: EnclaveHost) -> None:
        self._host = host

    def names(self) -> Sequence[str]:
        return [NAME]

    def ask(
        self, stage: str, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        for name in requests:
            yield name, self._host.handle(requests[name])


def bundle_of(network: str, folder: Path) -> Bundle:
    channels, size, classes = NETWORKS[network]
    bundle = from_torch(
        module_of(network),
        input_shape=(channels, size, size),
        name=network,
        classes=classes,
        scale=np.full(channels, 1 / 127.5, np.float32),
        shift=np.full(channels, -1, np.float32),
        onnx=False,
    )
    return bundle.write(folder)


def measured(network: str, directions: int, turns: int) -> Row:
    """One network's figures."""
    channels, size, classes = NETWORKS[network]
    rng = np.random.Generator(np.random.PCG64(1))
    images = rng.integers(0, 256, (BATCH, channels, size, size), dtype=np.uint8)
    labels = rng.integers(0, classes, BATCH)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bundle, settings = bundle_of(network, folder / "bundle"), SETTINGS[network]
        (folder / "root").mkdir()
        root, server = SoftwareRoot.create(folder / "root"), Identity.generate()
        verifier, started = SoftwareVerifier(root.public), time.perf_counter()
        with EnclaveHost(NAME, Setup(folder / "bundle", settings, Limits(LIMIT)), root) as host:
            found: Row = {"start_seconds": time.perf_counter() - started}
            given = provisioning(NAME, folder / "bundle", images, labels, server.public)
            provision(host.handle, given, verifier, [host.measurement])
            driver = EnclaveDriver(One(host), verifier, [host.measurement], server)
            runtime = NumpyRuntime(bundle, **settings)
            alone = Endpoint(baffle.Client(NAME, runtime, Rows(images, labels), seed=bytes(32)))
            weights = bundle.weights()
            model = ModelMessage(weights).encode()
            digest = weights_digest(weights, runtime.layout, runtime.frozen_digest)
            walled, open_ = list[float](), list[float]()
            for round_ in range(turns):
                estimator = baffle.SteinEstimator(directions)
                plan = baffle.RoundPlan(round_, seed_from(7), estimator, digest, BATCH)
                envelope = Envelope("answer", plan.encode(), b"", model).encode()
                seconds = {}
                for way in ("walled", "open") if round_ % 2 else ("open", "walled"):
                    before = time.perf_counter()
                    if way == "walled":
                        ((_, reply),) = driver.ask("answer", {NAME: envelope}, None)
                    else:
                        expected = alone.handle(envelope)
                    seconds[way] = time.perf_counter() - before
                walled.append(seconds["walled"])
                open_.append(seconds["open"])
                if reply != expected or Reply.decode(expected).status != "answer":
                    raise RuntimeError(f"{network}: {host.last or Reply.decode(expected).text or reply!r}")
            found |= {
                "parameters": runtime.layout.n,
                "settings": settings,
                "limit_mb": LIMIT / 1e6,
                "group_mb": (host.process.peak() or float("nan")) / 1e6,
                "resident_mb": host.process.resident() / 1e6,
                "round_seconds": median(walled),
                "open_seconds": median(open_),
                "ratio": median(w / o for w, o in zip(walled, open_, strict=True)),
                "envelope_mb": len(envelope) / 1e6,
            }
            return dict(rounded(found))


HEADS = ("network", "n", "group, MB", "resident, MB", "start, s", "round, s", "without walls, s", "ratio")


def table(rows: Mapping[str, Row]) -> list[tuple[str, ...]]:
    """A row for a network."""
    return [
        (
            name,
            f"{row['parameters']}",
            f"{row['group_mb']:.1f}",
            f"{row['resident_mb']:.1f}",
            f"{row['start_seconds']:.2f}",
            f"{row['round_seconds']:.2f}",
            f"{row['open_seconds']:.2f}",
            f"{row['ratio']:.2f}",
        )
        for name, row in rows.items()
    ]


def page(text: str) -> str:
    """docs/enclave.md with the table of what is kept."""
    kept = json.loads(RESULT.read_text())
    rows = [HEADS, ("---", *("---:" for _ in HEADS[1:])), *table(kept["rows"])]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    limits = {row["limit_mb"] for row in kept["rows"].values()}
    what = f"limit {'/'.join(f'{limit:g}' for limit in sorted(limits))} MB"
    about = f"Batch {kept['batch']}, K = {kept['directions']}, {what}, `python benchmarks/enclave.py`. "
    block = "\n".join(
        ["<!-- enclave -->", "", *lines, "", about + machine_line(kept), "", "<!-- /enclave -->"]
    )
    return re.sub(r"<!-- enclave -->.*?<!-- /enclave -->", lambda _: block, text, flags=re.DOTALL)


def machine_line(kept: Mapping[str, Any]) -> str:
    return str(report.machine({"machine": kept["printed_on"]}))


def quickly() -> dict[str, Row]:
    """A slice: LeNet, two directions, one turn."""
    return {"lenet": measured("lenet", 2, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--only", choices=sorted(NETWORKS), help="this network; the others are kept")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if options.quick:
        rows = quickly()
    else:
        kept = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
        for network in [options.only] if options.only else list(NETWORKS):
            print(f"  {network}", file=sys.stderr, flush=True)
            turns = options.turns if network != "mobilenet-v2" else min(options.turns, 2)
            kept[network] = measured(network, DIRECTIONS, turns) | {"turns": turns, "commit": commit()}
        rows = {network: kept[network] for network in NETWORKS if network in kept}
        content = {"printed_on": machine(), "directions": DIRECTIONS, "batch": BATCH, "rows": rows}
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    for line in (HEADS, *table(rows)):
        print(" | ".join(line))


if __name__ == "__main__":
    main()
