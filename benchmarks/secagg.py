"""What secure sums cost: `python benchmarks/secagg.py`, or `make secagg`.

    secagg.py                    measures every cell, prints the tables, keeps them in results/secagg.json
    secagg.py --only "100 "      measures the cells whose names hold these letters and keeps the others
    secagg.py --read             measures nothing: prints what is kept
    secagg.py --parameters       measures nothing: prints what k and t are found for whom
    secagg.py --quick            ten clients alone, in seconds; keeps nothing

Real clients (``SecureSeal``) and a real server (``SecureSum``) in one process, on one thread and one core:
everything but forward passes, the plan and the model, and the network between them. In each stage all clients
answer, then the server takes the answers; a client that drops out has worked, and its answer is lost. Every
sum is compared, bit for bit, with one made in the clear. About a quarter of an hour on a core that has
nothing else to do.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import metadata
from statistics import median
from typing import Any

import numpy as np
from bench import FILE, apart, commit, machine, rounded
from numpy.typing import NDArray

from baffle import SteinEstimator
from baffle.errors import ConfigError
from baffle.fixedpoint import FixedPoint
from baffle.plan import LocalTraining, RoundPlan, RoundResult
from baffle.secagg import parameters
from baffle.secagg.primitives import Identity
from baffle.secagg.session import Roster, Settings
from baffle.secure import Protection, SecureSeal, SecureSum
from baffle.terms import Terms

RESULT = FILE.with_name("secagg.json")
MOST_SAMPLES = 100
FIGURES = ("client_cpu", "client_wall", "server_cpu", "server_wall", "up", "down")
ROUNDS = ("first", "steady")
Cost = dict[str, dict[str, float]]  # stage → figure → seconds or bytes; of clients, the mean of the cohort


@dataclass(frozen=True)
class Cell:
    """A cohort, the fractions that it is protected against, and how often it is measured.

    ``dropout`` is also the fraction whose answers are lost, in every round. ``given``: k and t, where they
    are not to be found. ``stands_for``: measured with the k and t of so many clients, and extrapolated.
    """

    clients: int
    dropout: float
    corrupt: float = 0.05
    values: int = 500
    ring_bits: int = 64
    given: tuple[int, int] | None = None
    stands_for: int = 0
    worlds: int = 3
    steady: int = 3  # rounds after the first, in each world
    directions: bool = True  # the values are slopes; else what n parameters changed by


def of(clients: int, worlds: int, **more: Any) -> dict[str, Cell]:
    return {
        f"{clients} clients, {dropout:.0%}": Cell(clients, dropout, worlds=worlds, **more)
        for dropout in (0.0, 0.1, 0.3)
    }


MANY: dict[str, Any] = {"worlds": 1, "steady": 2}  # what is a client's is the mean of a thousand

CELLS: dict[str, Cell] = {
    **of(10, 15),
    **of(100, 3),
    "100 clients, 10%, ring of 32 bits": Cell(100, 0.1, ring_bits=32),
    "1000 clients, 0%": Cell(1000, 0.0, **MANY),
    "1000 clients, 10%": Cell(1000, 0.1, **MANY),
    "1000 clients, 30%": Cell(1000, 0.3, corrupt=0.02, **MANY),  # nothing serves where 5 % collude
    "1000 clients, k = 48, 0%": Cell(1000, 0.0, corrupt=0.03, given=(48, 33), worlds=2, steady=2),
    "1000 clients, k = 48, 5%": Cell(1000, 0.05, corrupt=0.03, given=(48, 33), worlds=2, steady=2),
    "10000 clients, 0%": Cell(1000, 0.0, stands_for=10_000, **MANY),
    "10000 clients, 10%": Cell(1000, 0.1, stands_for=10_000, **MANY),
    "10 clients, n = 45000": Cell(10, 0.1, values=45_000, worlds=5, directions=False),
    "100 clients, n = 45000": Cell(100, 0.1, values=45_000, directions=False),
}
QUICK = Cell(10, 0.1, worlds=1, steady=2)

SHOWN = tuple(f"{count} clients, 10%" for count in (10, 100, 1000))  # stage by stage, in the document

# What was to be beaten, for a round with its keys: ms a client, s on the server.
AIMS: dict[str, tuple[float, float]] = {
    **dict.fromkeys((f"100 clients, {part}%" for part in (0, 10, 30)), (50.0, 0.4)),
    **dict.fromkeys((f"1000 clients, k = 48, {part}%" for part in (0, 5)), (21.0, 1.0)),
}


@dataclass(frozen=True)
class Given(Protection):
    """A protection with a k and t that are not found for it."""

    k: int = 0
    t: int = 0

    def settings(self, members: int) -> Settings:
        return Settings(self.k, self.t, members - 1 > self.k, self.least, self.rounds)


def protection(cell: Cell) -> Protection:
    rounds = cell.steady + 2  # of which the last is not measured: it leaves no deposit
    if cell.stands_for:
        found = parameters.find(cell.stands_for, cell.corrupt, cell.dropout)
        return Given(cell.corrupt, cell.dropout, rounds=rounds, k=found.degree, t=found.threshold)
    if cell.given:
        k, t = cell.given
        return Given(cell.corrupt, cell.dropout, rounds=rounds, k=k, t=t)
    return Protection(cell.corrupt, cell.dropout, rounds=rounds)


class Meter:
    """CPU and wall seconds and bytes of one round, by stage."""

    def __init__(self) -> None:
        self.stages: Cost = {}

    def add(self, stage: str, figure: str, amount: float) -> None:
        row = self.stages.setdefault(stage, dict.fromkeys(FIGURES, 0.0))
        row[figure] += amount

    def start(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self, side: str, stage: str) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.add(stage, f"{side}_wall", wall)
        self.add(stage, f"{side}_cpu", cpu)


class Federation:
    """One server and its clients, round after round."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.round = cell, 0
        self.rng = np.random.default_rng(0)
        self.names = [f"client-{i:05d}" for i in range(cell.clients)]
        identities = {name: Identity.generate() for name in self.names}
        roster = Roster({name: identity.public for name, identity in identities.items()})
        limit = 1024.0 if cell.ring_bits == 64 else 64.0
        point = FixedPoint.fitting(cell.clients, MOST_SAMPLES, limit, cell.ring_bits)
        self.terms = Terms(point, cell.clients, MOST_SAMPLES)
        self.protection = protection(cell)
        self.server = SecureSum(roster, self.terms, self.protection)
        policy = self.protection.policy
        self.seals = {name: SecureSeal(name, identities[name], roster, policy) for name in self.names}

    def plan(self) -> RoundPlan:
        local = None if self.cell.directions else LocalTraining(1, 0.01)
        directions = self.cell.values if self.cell.directions else 100
        return RoundPlan(
            self.round, bytes(32), SteinEstimator(directions), self.rng.bytes(32), 32, local=local
        )

    def go(self) -> Cost:
        """One round, and what it cost. Raises where its sum is not the plain one."""
        cell, names, plan = self.cell, self.names, self.plan()
        values = {name: self.rng.standard_normal(cell.values).astype(np.float32) for name in names}
        samples = dict(zip(names, self.rng.integers(1, MOST_SAMPLES + 1, len(names)).tolist(), strict=True))
        lost = set(self.rng.choice(names, parameters.part(cell.dropout, len(names)), replace=False))
        meter = Meter()
        gc.collect()
        meter.start()
        tally = self.server.open(plan, names)
        stages = tally.stages()
        meter.stop("server", "open")
        while True:
            meter.start()
            asked = next(stages, None)
            stage = asked.name if asked else "close"
            meter.stop("server", stage)
            if asked is None:
                break
            answers: dict[str, bytes] = {}
            meter.start()
            for name, request in asked.requests.items():
                measure = self.measure(plan, values[name], samples[name])
                answers[name] = self.seals[name].reply(stage, request, plan, measure)
            meter.stop("client", stage)
            meter.add(stage, "down", sum(map(len, asked.requests.values())))
            meter.add(stage, "up", sum(map(len, answers.values())))
            meter.start()
            for name, answer in answers.items():
                if stage != "answer" or name not in lost:
                    tally.add(name, answer)
            meter.stop("server", stage)
        meter.start()
        found = tally.close()
        meter.stop("server", "close")
        self.compare(found.values, values, samples, [name for name in names if name not in lost])
        self.round += 1
        # Of what is a client's, the mean of the cohort.
        return {
            stage: {
                figure: amount if figure.startswith("server") else amount / len(names)
                for figure, amount in row.items()
            }
            for stage, row in meter.stages.items()
        }

    def measure(self, plan: RoundPlan, values: NDArray[np.float32], samples: int) -> Any:
        def made(terms: Terms | None) -> Any:
            if terms is None:
                return RoundResult(plan.round, plan.digest, samples, values)
            return terms.prepare(plan, values, samples)

        return made

    def compare(
        self,
        found: NDArray[np.float64],
        values: dict[str, NDArray[np.float32]],
        samples: dict[str, int],
        alive: list[str],
    ) -> None:
        """With the sum of the integers in Python's and NumPy's own arithmetic."""
        scale = 2.0**self.terms.fixed_point.fraction_bits
        encoded = {name: np.rint(values[name].astype(np.float64) * scale).astype(np.int64) for name in alive}
        total = sum(samples[name] * encoded[name] for name in alive)
        plain = total / scale / sum(samples[name] for name in alive)
        if not np.array_equal(found, plain):
            raise ArithmeticError(f"round {self.round}: the secure sum is not the plain one")


def measure(cell: Cell) -> dict[str, Any]:
    """Parameters, and the medians of both kinds of round; of totals the least as well."""
    costs: dict[str, list[Cost]] = {kind: [] for kind in ROUNDS}
    for _ in range(cell.worlds):
        federation = Federation(cell)
        costs["first"].append(federation.go())
        costs["steady"] += [federation.go() for _ in range(cell.steady)]
    shield, clients = federation.protection, cell.clients
    settings = shield.settings(clients)
    hides, seconds = checked(shield, settings, clients)
    found = {
        "clients": clients,
        "values": cell.values,
        "ring_bits": cell.ring_bits,
        "dropout": cell.dropout,
        "corrupt": cell.corrupt,
        "k": settings.holders(clients),
        "t": settings.threshold,
        "c": shield.policy.colluders(settings, clients, clients),
        "hides": hides,
        "consistency": settings.consistency,
        "check_seconds": seconds,
        **{kind: summary(rows) for kind, rows in costs.items()},
    }
    return extrapolated(found, cell.stands_for) if cell.stands_for else found


def checked(shield: Protection, settings: Settings, clients: int) -> tuple[int, float]:
    """How many honest clients hide each other, and the seconds that a client takes to find out."""
    parameters.colluders_among.cache_clear()
    parameters.hidden.cache_clear()
    started = time.process_time()
    hides = shield.policy.check(settings, clients, clients)
    return hides, time.process_time() - started


def summary(rows: list[Cost]) -> dict[str, Any]:
    names = list(dict.fromkeys(stage for row in rows for stage in row))
    totals = {figure: [sum(stage[figure] for stage in row.values()) for row in rows] for figure in FIGURES}
    return {
        "rounds": len(rows),
        "total": {figure: {"median": median(found), "min": min(found)} for figure, found in totals.items()},
        "stages": {
            name: {figure: median(row.get(name, {}).get(figure, 0.0) for row in rows) for figure in FIGURES}
            for name in names
        },
    }


def extrapolated(found: dict[str, Any], clients: int) -> dict[str, Any]:
    """From 1000 clients that have the k and t of more: what is each client's grows with its neighbours.

    Among few clients more of those that one chose have chosen it too. From the stage share on, a client's
    work and bytes but the vector's are scaled by its number of neighbours, which is too much for what is due
    to its k holders alone, and lists with a bit for each client are lengthened; the server's work is scaled
    by the clients too.
    """
    k, few = int(found["k"]), int(found["clients"])
    each = (2 - k / (clients - 1)) / (2 - k / (few - 1))  # neighbours of one: 2k − k²/(n − 1)
    vector = (found["values"] + 1) * found["ring_bits"] / 8

    def more(kind: str, stage: str, figure: str, value: float) -> float:
        paired = 1.0 if stage in ("open", "advertise", "choose") else each
        if figure.startswith("server"):
            return value * paired * clients / few
        if figure == "down":
            listed = stage in (("advertise", "choose", "share", "answer") if kind == "first" else ("answer",))
            return value * paired + listed * (clients - few) / 8
        kept = vector if (stage, figure) == ("answer", "up") else 0.0
        return (value - kept) * paired + kept

    for kind in ROUNDS:
        stages = found[kind]["stages"]
        before = {figure: sum(row[figure] for row in stages.values()) for figure in FIGURES}
        for name, row in stages.items():
            row.update({figure: more(kind, name, figure, row[figure]) for figure in FIGURES})
        for figure, total in found[kind]["total"].items():
            factor = sum(row[figure] for row in stages.values()) / before[figure]
            total.update({which: factor * value for which, value in total.items()})
    policy = Protection(found["corrupt"], found["dropout"]).policy
    settings = Settings(k, found["t"], True)
    return found | {
        "measured_with": few,
        "clients": clients,
        "c": policy.colluders(settings, clients, clients),
        "hides": policy.check(settings, clients, clients),
    }


# Showing


def table(cells: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line for each cell and kind of round."""
    lines = []
    for name, cell in cells.items():
        fits = f"{cell['k']}, {cell['t']}, {cell['c']}, {cell['hides']}"
        for kind in ROUNDS:
            total = {figure: cell[kind]["total"][figure]["median"] for figure in FIGURES}
            lines.append(
                (
                    name + (" *" if "measured_with" in cell else ""),
                    fits,
                    f"{cell['corrupt']:.0%}",
                    kind,
                    *(f"{1e3 * total[figure]:,.2f}" for figure in ("client_cpu", "client_wall")),
                    *(f"{total[figure]:,.3f}" for figure in ("server_cpu", "server_wall")),
                    *(f"{total[figure]:,.0f}" for figure in ("up", "down")),
                )
            )
    return lines


HEADS = (
    "clients, dropouts",
    "k, t, c, hidden",
    "colluding",
    "round",
    "client, ms CPU",
    "ms wall",
    "server, s CPU",
    "s wall",
    "bytes up",
    "bytes down",
)
STAGE_HEADS = ("clients, dropouts", "round", "stage", "client, ms CPU", "server, ms CPU", "up", "down")
AIM_HEADS = (
    "clients, dropouts",
    "round",
    "client: aim, ms",
    "CPU",
    "wall",
    "aim / CPU, / wall",
    "server: aim, s",
    "CPU",
    "wall",
    "aim / CPU, / wall",
)


def stage_table(cells: dict[str, Any], names: Collection[str] = ()) -> list[tuple[str, ...]]:
    """A line for each stage of both kinds of round; of the cells ``names``, or all."""
    return [
        (
            name,
            kind,
            stage,
            f"{1e3 * row['client_cpu']:,.3f}",
            f"{1e3 * row['server_cpu']:,.2f}",
            f"{row['up']:,.0f}",
            f"{row['down']:,.0f}",
        )
        for name, cell in cells.items()
        if not names or name in names
        for kind in ROUNDS
        for stage, row in cell[kind]["stages"].items()
    ]


def aim_table(cells: dict[str, Any]) -> list[tuple[str, ...]]:
    """Beside what was to be beaten: how many times less it is."""
    lines = []
    for name, aims in AIMS.items():
        for kind in ROUNDS if name in cells else ():
            line = [name, kind]
            for side, scale, aim in zip(("client", "server"), (1e3, 1.0), aims, strict=True):
                total = cells[name][kind]["total"]
                found = [scale * total[f"{side}_{clock}"]["median"] for clock in ("cpu", "wall")]
                line += [f"{aim:g}", *(f"{one:,.3g}" for one in found)]
                line.append(", ".join(f"{aim / one:.2f}" for one in found))
            lines.append(tuple(line))
    return lines


def parameter_table(clients: Sequence[int] = (5, 10, 30, 100, 300, 1000, 10_000)) -> list[tuple[str, ...]]:
    """What ``find`` gives: a line for each number of clients and fraction that colludes."""

    def entry(count: int, corrupt: float, dropout: float) -> str:
        try:
            found = Protection(corrupt, dropout).settings(count)
        except ConfigError:
            return "–"
        policy = Protection(corrupt, dropout).policy
        figures = (
            found.holders(count),
            found.threshold,
            policy.colluders(found, count, count),
            policy.check(found, count, count),
        )
        return ", ".join(map(str, figures)) + (", confirm" if found.consistency else "")

    return [
        (f"{count:,}", f"{corrupt:.0%}", *(entry(count, corrupt, dropout) for dropout in (0.0, 0.1, 0.3)))
        for count in clients
        for corrupt in (0.02, 0.05, 0.1, 0.2)
    ]


PARAMETER_HEADS = ("clients", "colluding", "dropouts 0%: k, t, c, hidden", "10%", "30%")


# Measuring


def read() -> dict[str, Any]:
    found = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else {}
    return {name: found[name] for name in CELLS if name in found}


def keep(cells: dict[str, Any]) -> None:
    ordered = {name: cells[name] for name in CELLS if name in cells}
    RESULT.write_text(json.dumps({"printed_on": this_machine(), "cells": ordered}, indent=1) + "\n")


def this_machine() -> dict[str, Any]:
    found = machine()
    found["versions"]["cryptography"] = metadata.version("cryptography")
    return found


def show(heads: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    for line in (heads, *lines) if lines else ():
        print(f"{line[0]:34}" + "".join(f"  {entry:>20}" for entry in line[1:]))
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="letters that the names of the cells to measure hold")
    parser.add_argument("--read", action="store_true", help="measure nothing: take what is kept")
    parser.add_argument("--parameters", action="store_true", help="print k and t for numbers of clients")
    parser.add_argument("--quick", action="store_true", help="ten clients alone; keeps nothing")
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(rounded(measure(CELLS[options.cell]))))
        return 0
    if options.parameters:
        show(PARAMETER_HEADS, parameter_table())
        return 0
    cells = {"10 clients, 10%": measure(QUICK)} if options.quick else read()
    for name in [] if options.quick or options.read else [name for name in CELLS if options.only in name]:
        started, load = time.perf_counter(), os.getloadavg()[0]
        found = apart(__file__, "--cell", name, cores=1) or {}
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        cells[name] = {**found, "load": round(load, 1), "commit": commit(), "machine": this_machine()}
        keep(cells)
    show(HEADS, table(cells))
    show(STAGE_HEADS, stage_table(cells))
    show(AIM_HEADS, aim_table(cells))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
