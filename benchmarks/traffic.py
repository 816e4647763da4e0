"""Bytes of a round, both ways, by model and downlink: `python benchmarks/traffic.py`, or `make traffic`.

    traffic.py            counts every cell, prints the table, keeps it in results/traffic.json
    traffic.py --read     counts nothing: prints what is kept
    traffic.py --quick    the smallest model alone; keeps nothing

Real servers, clients, envelopes and replies. A quadratic's losses stand in for forward passes, since bytes do
not depend on them; its parameters are laid out as the model's. A steady round is the last of three. In a late
joiner's, a client takes part that has been away since the start.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from bench import FILE, machine
from numpy.typing import NDArray

from baffle import Batch, Client, LocalTraining, Portable, Server, SteinEstimator, Stream, models
from baffle.downlink import MODES
from baffle.fixedpoint import FixedPoint
from baffle.perturbations import Perturbation
from baffle.runtimes.torch import TorchRuntime
from baffle.secagg.primitives import Identity
from baffle.secagg.session import Roster
from baffle.secure import Protection, SecureSeal, SecureSum
from baffle.simulation import simulate
from baffle.terms import Terms

RESULT = FILE.with_name("traffic.json")
K = 500
CLIENTS = 10
ROUNDS = 3  # the first two with what a federation does once
MODELS = {"LeNet": "lenet", "WRN-10-2": "wrn-10-2", "MobileNetV2": "mobilenet-v2"}


class Quadratic:
    """L(w) = |w|²/2 over a model's parameters, and slopes that cost nothing."""

    def __init__(self, model: str) -> None:
        module = TorchRuntime(models.build(model, 3, 10, 0))
        self.layout, self.frozen_digest, self._weights = module.layout, bytes(32), module.weights()

    def weights(self) -> NDArray[np.float32]:
        return self._weights.copy()

    def check_sigma(self, sigma: float) -> None:
        pass

    def loss(self, weights: NDArray[np.float32], batch: Batch) -> float:
        return float(np.dot(weights, weights)) / 2

    def losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        return np.array([self.loss(weights, batch) + scale * math.sin(k + 1) for k in directions])

    def gradient(self, weights: NDArray[np.float32], batch: Batch) -> tuple[NDArray[np.float32], float]:
        return weights.copy(), self.loss(weights, batch)


class One:
    """One sample."""

    def __len__(self) -> int:
        return 1

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        return Batch(np.zeros((len(indices), 1), np.float32), np.zeros(len(indices), np.int64))


def count(model: str, downlink: str, *, ring: int = 0, fedavg: bool = False) -> dict[str, float]:
    """Bytes per client: of a steady round down and up, and down in a late joiner's first.

    ``ring``: bits of the numbers of secure sums, 0 for sums in the clear.
    """
    runtime, names = Quadratic(model), [f"client-{i:03d}" for i in range(CLIENTS)]
    aggregator, seals = None, {}
    if ring:
        identities = {name: Identity.generate() for name in names}
        roster = Roster({name: identity.public for name, identity in identities.items()})
        protection = Protection(0.1, 0.3)
        terms = Terms(FixedPoint.fitting(CLIENTS, 1, 1024.0, ring), CLIENTS, 1)
        aggregator = SecureSum(roster, terms, protection)
        seals = {
            name: SecureSeal(name, identity, roster, protection.policy)
            for name, identity in identities.items()
        }
    clients = [Client(name, runtime, One(), seal=seals.get(name)) for name in names]
    server = Server(
        runtime,
        SteinEstimator(K, 1e-4),
        optimizer=(lambda p: Portable(p, "adam", lr=1e-3)) if downlink == "scalars" else None,
        ema=0.0,
        aggregator=aggregator,
        fidelity="backprop" if fedavg else "forward-only",
        local=LocalTraining(1, 0.1, "sgd") if fedavg else None,
        downlink=downlink,  # type: ignore[arg-type]
    )
    early = clients if ring else clients[:-1]
    for record in simulate(server, early, rounds=ROUNDS):
        steady = record
    found = {"down": steady.bytes_down / len(early), "up": steady.bytes_up / len(early)}
    if not ring:  # the last client comes
        (record,) = simulate(server, clients[-1:], rounds=ROUNDS + 1)
        found["late"] = float(record.bytes_down)
    return {"n": float(runtime.layout.n), **found}


def cells(names: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        rows = {"FedAvg": count(MODELS[name], "model", fedavg=True)}
        rows |= {mode: count(MODELS[name], mode) for mode in MODES}
        rows |= {f"secure {ring}": count(MODELS[name], "scalars", ring=ring) for ring in (64, 32)}
        found[name] = rows
    return found


LABELS = {
    "FedAvg": "FedAvg: model down, update up",
    "model": "`model`: float32 down, K slopes up",
    "float16": "`float16`",
    "update": "`update`",
    "scalars": "`scalars`",
    "secure 64": "`scalars`, secure sums, 64-bit ring",
    "secure 32": "`scalars`, secure sums, 32-bit ring",
}


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of the documents: a line for each model and downlink."""
    found: list[tuple[str, ...]] = []
    for name, modes in result["cells"].items():
        for mode, row in modes.items():
            both = row["down"] + row["up"]
            fedavg = modes["FedAvg"]["down"] + modes["FedAvg"]["up"]
            late = f"{row['late']:,.0f}" if "late" in row else "–"
            found.append(
                (
                    f"{name}, n = {row['n']:,.0f}" if mode == "FedAvg" else "",
                    LABELS[mode],
                    f"{row['down']:,.0f}",
                    f"{row['up']:,.0f}",
                    f"{both / 1000:,.1f}",
                    "1" if mode == "FedAvg" else f"1/{fedavg / both:,.0f}",
                    late,
                )
            )
    return found


HEADS = ("model", "downlink", "down", "up", "kB, both ways", "of FedAvg's", "down, late joiner")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--read", action="store_true", help="print what is kept")
    parser.add_argument("--quick", action="store_true", help="LeNet alone; keep nothing")
    options = parser.parse_args()
    if options.read:
        result = json.loads(RESULT.read_text())
    else:
        result = {"K": K, "clients": CLIENTS, "cells": cells(["LeNet"] if options.quick else MODELS)}
        result["printed_on"] = machine()
        if not options.quick:
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row in (HEADS, *rows(result)):
        print(
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, (24, 36, 12, 12, 14, 12, 16), strict=True)
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
