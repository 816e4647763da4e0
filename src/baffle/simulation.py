"""The in-process driver: the real server, clients and messages, one after the other in one process.

The reference for all others: what a job gives here it gives on every driver, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from baffle.aggregation import ANSWER
from baffle.client import Client, Download
from baffle.downlink import Holding
from baffle.endpoint import Endpoint, received
from baffle.errors import ConfigError, DigestMismatchError, SecurityError
from baffle.exchange import Envelope, Package, Reply
from baffle.federation import Drops, Outcome, RoundRecord, run
from baffle.plan import RoundPlan
from baffle.runtimes import Runtime
from baffle.server import Server
from baffle.stream import Stream, derive_seed, philox4x32, seed_from


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
    vanish after measuring, before their answer arrives. A round that the aggregator gives up, because too
    few are left or what came cannot be, ends without a step. What a client raises ends the run, unless its
    seal refused: clients here are honest. Memory, whatever the number of clients: a few models (the server's
    state, the message, the sum) and what the clients' runtime keeps, if they share it.
    """
    driver = InProcess(clients)
    if cohort is not None and not 1 <= cohort <= len(clients):
        raise ConfigError(f"a cohort of {cohort} cannot be drawn from {len(clients)} clients")
    if rounds < server.round:
        raise ConfigError(f"{rounds} rounds were asked for, {server.round} are done already")
    for record in run(server, driver, rounds=rounds, cohort=cohort, drops=drops, forgiving=False):
        lost = {dropout.client for dropout in record.dropouts if dropout.stage == ANSWER}
        yield replace(record, loss=driver.loss(lost), forward_passes=driver.passes)
        driver.forget()


class InProcess:
    """A driver for clients of this process. What they saw can be looked at: ``loss``, ``passes``."""

    def __init__(self, clients: Sequence[Client]) -> None:
        shared = _Shared()
        self._endpoints = {client.name: Endpoint(client, receiver=shared) for client in clients}
        if not clients or len(self._endpoints) != len(clients):
            raise ConfigError("a federation needs at least one client, and each its own name")
        self.forget()

    def names(self) -> Sequence[str]:
        return sorted(self._endpoints)

    def ask(
        self, stage: str, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        """``deadline`` is for clients that can be late."""
        for name in sorted(requests):
            endpoint = self._endpoints[name]
            envelope = Envelope.decode(requests[name])
            ticket = envelope.ticket(name)
            try:
                reply = Reply(ticket, "answer", endpoint.answer(envelope))
            except DigestMismatchError as error:
                reply = Reply(ticket, "digest", error.held)
            except SecurityError as error:  # as everywhere, a client that refuses is one that does not answer
                reply = Reply.explaining(ticket, "refused", error)
            if stage == ANSWER and reply.status == "answer":
                client = endpoint.client
                self.passes += client.observed.forward_passes
                self._seen[name] = client.observed.loss, len(client.samples)
            yield name, reply.encode()

    def forget(self) -> None:
        """Before the next round."""
        self.passes = 0
        self._seen: dict[str, tuple[float, int]] = {}

    def loss(self, lost: set[str]) -> float:
        """The N_c-weighted mean of what all but the ``lost`` saw; NaN where nothing was."""
        seen = [(x, weight) for name, (x, weight) in self._seen.items() if name not in lost and x == x]
        if not seen:
            return float("nan")
        losses, weights = zip(*seen, strict=True)
        return float(np.average(losses, weights=weights))


class _Shared:
    """What clients of one process need not do each for itself: decode, replay and check the same weights.

    Clients with one runtime that hold the same thing, and are sent the same, share what comes of it.
    """

    def __init__(self) -> None:
        self._plan: tuple[bytes, RoundPlan] | None = None
        self._round = -1
        self._found: list[tuple[Runtime, Holding | None, Package, tuple[Holding, Download]]] = []

    def plan(self, data: bytes) -> RoundPlan:
        if self._plan is None or self._plan[0] != data:
            self._plan = data, RoundPlan.decode(data)
        return self._plan[1]

    def receive(
        self, runtime: Runtime, holding: Holding | None, plan: RoundPlan, package: Package
    ) -> tuple[Holding, Download]:
        if plan.round != self._round:
            self._round, self._found = plan.round, []
        for its_runtime, held, sent, result in self._found:
            if its_runtime is runtime and held is holding and sent == package and result[1].plan == plan:
                return result
        found = received(runtime, holding, plan, package)
        self._found.append((runtime, holding, package, found))
        return found
