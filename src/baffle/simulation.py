"""The in-process driver: the real server, clients and messages, one after the other in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from baffle.client import Client, Download
from baffle.errors import ConfigError
from baffle.plan import Fidelity, RoundPlan, RoundResult, RoundSum
from baffle.server import Server
from baffle.stream import Stream, derive_seed, philox4x32, seed_from

Drops = Callable[[int, str], bool]


@dataclass(frozen=True)
class RoundRecord:
    """What one round cost and gave. Bytes are those of the encoded messages, over the whole cohort."""

    round: int
    fidelity: Fidelity
    loss: float  # N_c-weighted mean of what the clients saw; it never leaves a real device
    participants: int
    dropped: int
    forward_passes: int
    bytes_down: int
    bytes_up: int
    seconds: float
    plan: RoundPlan = field(repr=False)
    total: RoundSum | None = field(repr=False)  # None where nobody answered

    def as_dict(self) -> dict[str, Any]:
        """The plain numbers, without plan and sum."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("plan", "total")}


def random_drops(probability: float, seed: int | bytes = 0) -> Drops:
    """Clients that vanish mid-round with ``probability``, the same ones whenever the run is repeated."""
    if not 0.0 <= probability < 1.0:
        raise ConfigError(f"dropout probability {probability}: a number in [0, 1)")
    root = seed_from(seed)

    def drops(round_: int, name: str) -> bool:
        h = Stream(derive_seed(root, "drop", name), round_).key
        word = philox4x32((0, 0, h[2], h[3]), (h[0], h[1]))[0]  # word 0, without an array for it
        return bool(word < probability * 2.0**32)

    return drops


def simulate(
    server: Server,
    clients: Sequence[Client],
    *,
    rounds: int,
    cohort: int | None = None,
    drops: Drops | None = None,
) -> Iterator[RoundRecord]:
    """Runs rounds until ``server.round == rounds``, and yields a record after each.

    ``cohort`` clients are drawn each round (all if None). ``drops(round, name)`` says which of them
    vanish after measuring, before their answer arrives. Memory, whatever the number of clients: a few
    models (the server's state, the message, the sum) and what the clients' runtime keeps, if they share it.
    """
    by_name = {client.name: client for client in clients}
    if not by_name or len(by_name) != len(clients):
        raise ConfigError("a federation needs at least one client, and each its own name")
    if rounds < server.round:
        raise ConfigError(f"{rounds} rounds were asked for, {server.round} are done already")
    while server.round < rounds:
        started = time.perf_counter()
        plan = server.plan()
        names = server.cohort(list(by_name), cohort)
        plan_bytes, model_bytes = plan.encode(), server.model().encode()
        download, tally = Download(plan_bytes, model_bytes), server.aggregator.open(plan)
        stands_for = _bytes_of_slopes(plan)
        losses, weights, passes, up = [], [], 0, 0
        for name in names:
            client = by_name[name]
            answer = client.answer_to(download)
            passes += client.observed.forward_passes
            if drops is not None and drops(plan.round, name):
                continue
            result = RoundResult.decode(answer)
            tally.add(name, result)  # in the order of names, as the cohort is
            up += stands_for or len(answer)
            losses.append(client.observed.loss)
            weights.append(result.samples)
        total = None
        if weights:
            total = tally.close()
            server.apply(total)
        else:
            server.skip()
        yield RoundRecord(
            round=plan.round,
            fidelity=plan.fidelity,
            loss=float(np.average(losses, weights=weights)) if losses else float("nan"),
            participants=len(names),
            dropped=len(names) - len(weights),
            forward_passes=passes,
            bytes_down=len(names) * (len(plan_bytes) + len(model_bytes)),
            bytes_up=up,
            seconds=time.perf_counter() - started,
            plan=plan,
            total=total,
        )


def _bytes_of_slopes(plan: RoundPlan) -> int | None:
    """By the law, a client's gradient stands for an answer of K slopes: the length of that one."""
    if plan.fidelity != "law" or plan.local is not None:
        return None
    slopes = np.zeros(plan.estimator.directions, dtype=np.float32)
    return len(RoundResult(plan.round, plan.digest, 1, slopes).encode())
