"""The round engine: a server and whatever brings bytes to its clients.

A ``Driver`` carries envelopes and replies, and knows nothing of what they mean; the engine knows nothing of
how they travel. So a round is the same, to the bit, in one process and on many machines.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from baffle import events
from baffle.aggregation import ANSWER, Stage, Tally
from baffle.errors import (
    AggregationError,
    DeliveryError,
    DigestMismatchError,
    MessageError,
    SecurityError,
)
from baffle.exchange import Envelope, Reply
from baffle.plan import Fidelity, RoundPlan, RoundResult, RoundSum

if TYPE_CHECKING:  # torch: a device, which shares this module's words, does without
    from baffle.server import Server

Drops = Callable[[int, str], bool]
Outcome = bytes | DeliveryError


class Driver(Protocol):
    """Brings bytes to clients and back. All that a transport must do."""

    def names(self) -> Sequence[str]:
        """The clients that can be asked now. May wait for some, as long as it was told to."""
        ...

    def ask(
        self, stage: str, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        """Gives each client its envelope and yields its reply, each name once, in ascending order.

        For a client that does not reply within ``deadline`` seconds (None: as long as it takes), or cannot be
        reached, a DeliveryError instead. ``requests`` builds its values when they are asked for: a driver
        asks for each once, and need not hold all of them.
        """
        ...


def in_order(names: Iterable[str], arrivals: Iterable[tuple[str, Outcome]]) -> Iterator[tuple[str, Outcome]]:
    """Arrivals by name, held back until it is their turn; names that never arrive are ``gone``."""
    waiting, here = deque(sorted(names)), dict[str, Outcome]()
    for name, outcome in arrivals:
        here[name] = outcome
        while waiting and waiting[0] in here:
            yield waiting[0], here.pop(waiting.popleft())
    for name in waiting:
        yield name, here.get(name, DeliveryError("gone", "nothing was heard of it"))


@dataclass(frozen=True)
class Dropout:
    """A client that did not answer a stage, and why.

    ``reason``: late, gone, unknown or malformed on the way; digest, refused, failed or malformed by its own
    word; limited, by its owner's; replayed (a reply to something else), wrong (no part of this sum), unasked
    (no part of a secure sum's session), simulated.
    """

    client: str
    stage: str
    reason: str
    text: str


@dataclass(frozen=True)
class StageRecord:
    """What one stage of a round cost. Bytes are those of whole envelopes and replies."""

    name: str
    asked: int
    answered: int
    seconds: float
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class RoundRecord:
    """What one round cost and gave. Bytes are those of envelopes and replies, over the whole cohort.

    ``loss`` is the N_c-weighted mean of what the clients saw: it never leaves a real device, and is NaN then.
    ``forward_passes`` are counted in a simulation, and elsewhere what the plan asked of those that answered
    (0 for epoch-level rounds, whose number of steps is the client's own).
    """

    round: int
    fidelity: Fidelity
    loss: float
    participants: int
    dropped: int
    forward_passes: int
    bytes_down: int
    bytes_up: int
    seconds: float
    plan: RoundPlan = field(repr=False)
    total: RoundSum | None = field(repr=False)  # None where nobody answered, and where the round was aborted
    aborted: str | None = None  # why the aggregator gave no sum; then nobody's answer counts
    stages: tuple[StageRecord, ...] = ()
    dropouts: tuple[Dropout, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without plan and sum: dropouts as counts by stage and reason, where there are any."""
        left_out = {"plan", "total", "stages", "dropouts"} | (set() if self.aborted else {"aborted"})
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        row["stages"] = {
            stage.name: {f.name: getattr(stage, f.name) for f in fields(stage) if f.name != "name"}
            for stage in self.stages
        }
        counts: dict[str, dict[str, int]] = {}
        for dropout in self.dropouts:
            reasons = counts.setdefault(dropout.stage, {})
            reasons[dropout.reason] = reasons.get(dropout.reason, 0) + 1
        return row | ({"dropouts": counts} if counts else {})


def run(
    server: Server,
    driver: Driver,
    *,
    rounds: int,
    names: Collection[str] | None = None,
    cohort: int | None = None,
    deadline: float | None = None,
    drops: Drops | None = None,
    forgiving: bool = True,
) -> Iterator[RoundRecord]:
    """Runs rounds until ``server.round == rounds``, and yields a record after each.

    ``names`` says who may take part (None: whoever the driver brings); ``cohort`` of these are drawn each
    round (all if None, or if there are fewer). ``deadline`` in seconds holds for each exchange, of which the
    stage ``answer`` has a second for those that lack the model. ``drops(round, name)`` throws away what a
    client answers, as if it had not arrived: the same for every driver. An answer that cannot be part of the
    sum is a dropout; with ``forgiving`` False it ends the run, for federations whose clients are honest. A
    round that the aggregator gives up ends without a step. Raises LossError where the weights would not stay
    finite.
    """
    strangers: set[str] = set()
    members = None if names is None else frozenset(names)
    directions = server.estimator.directions
    while server.round < rounds:
        started = time.perf_counter()
        present = driver.names()
        if members is not None:
            for name in sorted(set(present) - members - strangers):
                strangers.add(name)
                text = "it is none of the federation's clients, and is not asked"
                events.emit("unknown-client", text, level="warning", round=server.round, client=name)
            present = [name for name in present if name in members]
        able = server.able(present)
        asked = server.cohort(able, None if cohort is None or cohort >= len(able) else cohort)
        before, directions = directions, server.adapt(asked)
        if directions != before:
            text = f"K = {directions} from here on, where it was {before}: what the round's clients can do"
            events.emit("directions", text, round=server.round, directions=directions)
        yield _Round(server, driver, asked, deadline, drops, forgiving).record(started)


class _Round:
    """One round's exchanges, and what they cost."""

    def __init__(
        self,
        server: Server,
        driver: Driver,
        names: Sequence[str],
        deadline: float | None,
        drops: Drops | None,
        forgiving: bool,
    ) -> None:
        self._server, self._driver, self._names = server, driver, names
        self._deadline, self._drops, self._forgiving = deadline, drops, forgiving
        self._plan = server.plan()
        self._plan_bytes = self._plan.encode()
        self._stands_for = _bytes_of_slopes(self._plan)
        self._stages: list[StageRecord] = []
        self._dropouts: list[Dropout] = []
        self._answered = 0  # in the stage in which clients measure

    def record(self, started: float) -> RoundRecord:
        server, plan = self._server, self._plan
        total, aborted = self._sum()
        if aborted is not None:
            events.emit("round-aborted", aborted, level="warning", round=plan.round)
        if total is None:
            server.skip()
        else:
            server.apply(total)
        known = plan.local is None and plan.fidelity != "backprop"
        return RoundRecord(
            round=plan.round,
            fidelity=plan.fidelity,
            loss=float("nan"),
            participants=len(self._names),
            dropped=len(self._names) - (0 if total is None else self._answered),
            forward_passes=plan.forward_passes * self._answered if known else 0,
            bytes_down=sum(stage.bytes_down for stage in self._stages),
            bytes_up=sum(stage.bytes_up for stage in self._stages),
            seconds=time.perf_counter() - started,
            plan=plan,
            total=total,
            aborted=aborted,
            stages=tuple(self._stages),
            dropouts=tuple(self._dropouts),
        )

    def _sum(self) -> tuple[RoundSum | None, str | None]:
        if not self._names:
            return None, f"round {self._plan.round}: no client is there that could be asked"
        tally = self._server.aggregator.open(self._plan, self._names)
        stages = tally.stages()
        while True:
            try:
                stage = next(stages, None)
                if stage is None:
                    return (tally.close() if self._answered else None), None
            except (AggregationError, SecurityError) as error:
                refused = next((d.text for d in self._dropouts if d.reason == "refused"), None)
                return None, f"{error} ({refused})" if refused else str(error)
            self._exchange(stage, tally)

    def _exchange(self, stage: Stage, tally: Tally) -> None:
        """One stage: what each client is sent, and what of the replies goes into the tally."""
        started = time.perf_counter()
        package = self._server.downlink.package if stage.name == ANSWER else None
        sent = _Envelopes(stage, self._plan_bytes, package)
        answers = _Answers(self, stage, tally)
        if stage.name == ANSWER:
            left = {dropout.client for dropout in self._dropouts}
            for name in sorted(set(self._names) - stage.requests.keys() - left):
                answers.drop(name, "unasked", "it has no keys of this session, or too few to open its masks")
        for name, outcome in self._driver.ask(stage.name, sent, self._deadline):
            answers.take(name, sent.tickets.get(name), outcome)
        if answers.elsewhere:  # they hold other weights: what brings these to the plan's
            packages = {n: self._server.downlink.catch_up(n, held) for n, held in answers.elsewhere.items()}
            again = _Envelopes(
                Stage(stage.name, {n: stage.requests[n] for n, p in packages.items() if p is not None}),
                self._plan_bytes,
                lambda name: packages[name] or b"",
            )
            answers.second = True
            for name in sorted(packages.keys() - again.keys()):
                text = "it holds other weights than the plan's, and the model did not help"
                if not self._forgiving:
                    raise DigestMismatchError(f"client {name}: {text}: what it has frozen differs")
                answers.drop(name, "digest", text)
            if again:
                for name, outcome in self._driver.ask(stage.name, again, self._deadline):
                    answers.take(name, again.tickets.get(name), outcome)
            sent.bytes += again.bytes
        answers.miss()
        answers.add_held_back()
        if stage.name == ANSWER:
            self._answered = answers.count
        seconds = time.perf_counter() - started
        self._stages.append(
            StageRecord(stage.name, len(stage.requests), answers.count, seconds, sent.bytes, answers.bytes)
        )


class _Envelopes(Mapping[str, bytes]):
    """A stage's envelopes, made when they are asked for: a cohort's models need not lie in memory at once."""

    def __init__(self, stage: Stage, plan: bytes, package: Callable[[str], bytes] | None) -> None:
        self._stage, self._plan, self._package = stage, plan, package
        self.tickets: dict[str, bytes] = {}
        self.bytes = 0

    def __getitem__(self, name: str) -> bytes:
        package = b"" if self._package is None else self._package(name)
        envelope = Envelope(self._stage.name, self._plan, self._stage.requests[name], package)
        data = envelope.encode()
        if name not in self.tickets:
            self.bytes += len(data)
        self.tickets[name] = envelope.ticket(name)
        return data

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._stage.requests))

    def __len__(self) -> int:
        return len(self._stage.requests)


class _Answers:
    """What came back in one stage."""

    def __init__(self, owner: _Round, stage: Stage, tally: Tally) -> None:
        self._owner, self._stage, self._tally = owner, stage, tally
        self._asked, self._heard = frozenset(stage.requests), set[str]()
        self._held_back: list[tuple[str, bytes]] = []  # behind a client that is asked again: names ascend
        self.elsewhere: dict[str, bytes] = {}  # who holds other weights than the plan's, and which
        self.second = False  # these are asked again
        self.count = self.bytes = 0

    def take(self, name: str, ticket: bytes | None, outcome: Outcome) -> None:
        if name not in self._asked or name in self._heard:
            return self._note(name, "unknown", "it was not asked, or has replied already")
        self._heard.add(name)
        if isinstance(outcome, DeliveryError):
            return self.drop(name, outcome.reason, str(outcome))
        try:
            reply = Reply.decode(outcome)
        except MessageError as error:
            self.bytes += len(outcome)
            return self.drop(name, "malformed", str(error))
        answering, round_ = self._stage.name == ANSWER, self._owner._plan.round
        if reply.status == "answer" and answering and self._owner._drops and self._owner._drops(round_, name):
            return self.drop(name, "simulated", "what it answered was thrown away")
        stands_for = self._owner._stands_for if answering and reply.status == "answer" else None
        self.bytes += len(outcome) if stands_for is None else stands_for + Reply.OVERHEAD
        if reply.status == "malformed":
            return self.drop(name, "malformed", reply.text)
        if reply.ticket != ticket:
            return self.drop(name, "replayed", "a reply to another envelope, or of another client")
        if reply.status == "digest" and answering and not self.second:
            events.emit(
                "catch-up",
                "it holds other weights than the plan's, and is sent what it lacks",
                round=round_,
                client=name,
            )
            self._heard.discard(name)
            self.elsewhere[name] = reply.body
            return None
        if reply.status == "limited":
            return self._limited(name, reply)
        if reply.status != "answer":
            text = "it holds other weights than the plan's" if reply.status == "digest" else reply.text
            return self.drop(name, reply.status, text)
        if answering:
            self._owner._server.downlink.holds(name, round_)
        if self.elsewhere:
            self._held_back.append((name, reply.body))
        else:
            self._add(name, reply.body)
        return None

    def _limited(self, name: str, reply: Reply) -> None:
        """Who can do fewer directions is asked for fewer, or not again; a moment's condition passes."""
        limit, server, asked = reply.limit, self._owner._server, self._owner._plan.estimator.directions
        if limit.limit == "directions":
            if limit.most is None or limit.most >= asked:
                text = f"it says that it can do {limit.most} directions, and was asked for {asked}"
                return self.drop(name, "malformed", text)
            server.limited(name, limit.most)
        elif limit.limit in ("memory", "seconds", "days"):  # as much as the next round would take
            server.limited(name, 0)
        return self.drop(name, "limited", reply.text)

    def miss(self) -> None:
        """Who was asked and is not spoken of any more has dropped out too."""
        for name in sorted(self._asked - self._heard):
            self.drop(name, "gone", "nothing was heard of it")

    def add_held_back(self) -> None:
        for name, answer in sorted(self._held_back):
            self._add(name, answer)

    def _add(self, name: str, answer: bytes) -> None:
        try:
            self._tally.add(name, answer)
        except (AggregationError, MessageError, SecurityError) as error:
            if not self._owner._forgiving:
                raise
            self.drop(name, "wrong", str(error))
        else:
            self.count += 1

    def drop(self, name: str, reason: str, text: str) -> None:
        self._heard.add(name)
        self._owner._dropouts.append(Dropout(name, self._stage.name, reason, text))
        if reason != "simulated":  # these are many, and no news
            self._note(name, reason, text)

    def _note(self, name: str, reason: str, text: str) -> None:
        round_, stage = self._owner._plan.round, self._stage.name
        events.emit("dropout", text, level="warning", round=round_, stage=stage, client=name, reason=reason)


def _bytes_of_slopes(plan: RoundPlan) -> int | None:
    """By the law, a client's gradient stands for an answer of K slopes: the length of that one."""
    if plan.fidelity != "law" or plan.local is not None:
        return None
    slopes = np.zeros(plan.estimator.directions, dtype=np.float32)
    return len(RoundResult(plan.round, plan.digest, 1, slopes).encode())
