"""The in-process driver: the real server, clients and messages, one after the other in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from baffle.aggregation import ANSWER, Stage
from baffle.client import Client, Download
from baffle.errors import AggregationError, ConfigError, SecurityError
from baffle.plan import Fidelity, ModelMessage, RoundPlan, RoundResult, RoundSum
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
    total: RoundSum | None = field(repr=False)  # None where nobody answered, and where the round was aborted
    aborted: str | None = None  # why the aggregator gave no sum; then nobody's answer counts

    def as_dict(self) -> dict[str, Any]:
        """The plain values, without plan and sum; ``aborted`` where there is a reason."""
        left_out = {"plan", "total"} if self.aborted else {"plan", "total", "aborted"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}


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
    few are left or what came cannot be, ends without a step. Memory, whatever the number of clients: a few
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
        sent = _InProcess(by_name, plan, server.model(), drops)
        tally = server.aggregator.open(plan, names)
        stages, total, aborted = tally.stages(), None, None
        while True:
            try:  # what a client's reply or a refused answer raises ends the run: clients here are honest
                stage = next(stages, None)
                if stage is None and sent.weights:
                    total = tally.close()
            except (AggregationError, SecurityError) as error:
                stage, aborted = None, f"{error} ({sent.refusal})" if sent.refusal else str(error)
            if stage is None:
                break
            for name, answer in sent.ask(stage):
                tally.add(name, answer)
        if total is None:
            server.skip()
        else:
            server.apply(total)
        yield RoundRecord(
            round=plan.round,
            fidelity=plan.fidelity,
            loss=sent.loss(),
            participants=len(names),
            dropped=len(names) - (0 if total is None else len(sent.weights)),
            forward_passes=sent.passes,
            bytes_down=sent.down,
            bytes_up=sent.up,
            seconds=time.perf_counter() - started,
            plan=plan,
            total=total,
            aborted=aborted,
        )


class _InProcess:
    """A round's exchanges with clients of this process, and what they cost. Other drivers ``ask`` as this."""

    def __init__(
        self, clients: Mapping[str, Client], plan: RoundPlan, model: ModelMessage, drops: Drops | None
    ) -> None:
        self._clients, self._drops, self._round = clients, drops, plan.round
        plan_bytes, model_bytes = plan.encode(), model.encode()
        self._download = Download(plan_bytes, model_bytes)
        self._plan_size, self._model_size = len(plan_bytes), len(model_bytes)
        self._stands_for = _bytes_of_slopes(plan)
        self._told: set[str] = set()  # who has the plan
        self.down = self.up = self.passes = 0
        self.refusal: str | None = None  # why the first client refused, if one did
        self.losses: list[float] = []  # of those whose answer arrived ...
        self.weights: list[int] = []  # ... and their N_c

    def ask(self, stage: Stage) -> Iterator[tuple[str, bytes]]:
        """Gives each client its request, and brings the answers one by one, in the order of names."""
        requests, answering = stage.requests, stage.name == ANSWER
        self.down += sum(map(len, requests.values())) + self._plan_size * len(requests.keys() - self._told)
        self.down += self._model_size * len(requests) if answering else 0
        self._told.update(requests)
        for name in sorted(requests):
            client = self._clients[name]
            try:
                answer = client.reply(stage.name, requests[name], self._download)
            except SecurityError as error:  # as everywhere, a client that refuses is one that does not answer
                self.refusal = self.refusal or str(error)
                continue
            size = len(answer)
            if answering:
                self.passes += client.observed.forward_passes
                if self._drops is not None and self._drops(self._round, name):
                    continue
                size = self._stands_for or size
                self.losses.append(client.observed.loss)
                self.weights.append(len(client.samples))
            yield name, answer
            self.up += size

    def loss(self) -> float:
        """The N_c-weighted mean of what was seen; NaN where nothing was."""
        seen = [
            (loss, weight) for loss, weight in zip(self.losses, self.weights, strict=True) if loss == loss
        ]
        if not seen:
            return float("nan")
        losses, weights = zip(*seen, strict=True)
        return float(np.average(losses, weights=weights))


def _bytes_of_slopes(plan: RoundPlan) -> int | None:
    """By the law, a client's gradient stands for an answer of K slopes: the length of that one."""
    if plan.fidelity != "law" or plan.local is not None:
        return None
    slopes = np.zeros(plan.estimator.directions, dtype=np.float32)
    return len(RoundResult(plan.round, plan.digest, 1, slopes).encode())
