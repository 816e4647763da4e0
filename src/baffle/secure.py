"""Secure sums: an aggregator whose server learns the sum of a round and nothing else, and the client's half.

    server = Server(..., aggregator=SecureSum(roster, terms, protection))
    seal = SecureSeal(name, identity, roster, ledger=FileLedger(path))
    client = Client(name, runtime, samples, seal=seal)

``secagg`` has the protocol; here it meets plans, terms and the disk. ``docs/privacy.md`` says against whom
this protects, and against whom not.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from baffle.aggregation import ANSWER, Measure, Stage, Tally
from baffle.errors import AggregationError, ConfigError, DataError, MessageError, SecurityError
from baffle.plan import RoundPlan, RoundSum
from baffle.secagg.client import ClientSession
from baffle.secagg.parameters import find
from baffle.secagg.primitives import KEY_BYTES, Identity, hash_of
from baffle.secagg.server import ServerRound, ServerSession
from baffle.secagg.session import Policy, Roster, Settings
from baffle.terms import Terms

_ADVERTISE = "advertise"
_PATIENCE = 2  # rounds in a row without a sum, before keys are agreed on anew


@dataclass(frozen=True)
class Protection:
    """How secure sums are made; Settings are found for the number of clients at hand.

    Private while at most a fraction ``corrupt`` of the clients, or ``helpers`` of them where that is more,
    collude with the server: at least ``least`` honest ones hide each other, whatever it does. A sum comes out
    while at most ``dropout`` of them vanish, at any stage. ``rounds`` are served by one key agreement.
    ``consistency`` asks for the stage in which clients say who is alive before they open anything, also where
    the counts do not need it.
    """

    corrupt: float = 0.1
    dropout: float = 0.3
    least: int = 3
    rounds: int = 100
    consistency: bool = False
    helpers: int = 0

    def settings(self, members: int) -> Settings:
        """Raises ConfigError where no threshold serves both fractions."""
        corrupt = max(self.corrupt, min(self.helpers / members, 1 - 1 / members))
        found = find(members, corrupt, self.dropout, least=self.least, consistency=self.consistency)
        return Settings(found.degree, found.threshold, found.consistency, self.least, self.rounds)

    @property
    def policy(self) -> Policy:
        """What clients insist on that were told to be protected so."""
        return Policy(self.least, self.corrupt, helpers=self.helpers)


# -- the server's half ------------------------------------------------------------------------------


class SecureSum:
    """An ``Aggregator``: answers are masked, and add up to the bits of ``IntegerSum`` in the same terms.

    ``job`` (32 bytes) names the job towards the clients' ledgers. Stages of a round: answer, unmask; before
    them, where keys are due, advertise, (choose,) share; a client whose last answer was lost shares again.
    Raises ConfigError for fewer members than the terms or the protection can serve.
    """

    def __init__(
        self, roster: Roster, terms: Terms, protection: Protection | None = None, *, job: bytes = bytes(32)
    ) -> None:
        if len(job) != KEY_BYTES:
            raise ConfigError(f"a job's name has {KEY_BYTES} bytes, not {len(job)}")
        self.roster, self.terms, self.job = roster, terms, job
        self.protection = protection or Protection()
        self._session: ServerSession | None = None
        self.lost = 0  # rounds in a row that gave no sum

    def open(self, plan: RoundPlan, names: Sequence[str]) -> Tally:
        self.terms.check_round(plan, len(names))
        return _SecureTally(self, plan, names)

    def session(self, plan: RoundPlan, names: Sequence[str]) -> tuple[ServerSession, bool]:
        """The session that serves a round, and whether its keys are still to be agreed on.

        Clients that started again have lost theirs. One lost round may be a liar's, who is left out then.
        """
        if self._session is not None and self.lost < _PATIENCE and self._session.serves(plan.round, names):
            return self._session, False
        self.lost = 0
        try:
            settings = self.protection.settings(len(names))
        except ConfigError as error:
            if len(names) >= self.terms.cohort:
                raise
            raise AggregationError(f"round {plan.round}: {len(names)} clients are there: {error}") from error
        self._session = ServerSession(
            self.roster,
            names,
            settings,
            self.protection.policy,
            job=self.job,
            first_round=plan.round,
            binding=self.terms.digest,
        )
        return self._session, True


class _SecureTally:
    def __init__(self, owner: SecureSum, plan: RoundPlan, names: Sequence[str]) -> None:
        self._owner, self._plan, self._names = owner, plan, names
        self._at: ServerSession | ServerRound | None = None

    def stages(self) -> Iterator[Stage]:
        plan, terms = self._plan, self._owner.terms
        session, new = self._owner.session(plan, self._names)
        self._owner.lost += 1
        if new:
            self._at = session
            announced = terms.encode()
            head = struct.pack("<I", len(announced)) + announced
            for stage, requests in session.stages():
                if stage == _ADVERTISE:
                    requests = {name: head + request for name, request in requests.items()}
                yield Stage(stage, requests)
        binding = binding_of(plan, terms)
        length = terms.length(plan.estimator.directions) if plan.asks_slopes else None
        self._at = ServerRound(session, plan.round, self._names, binding, terms.fixed_point.ring_bits, length)
        yield from (Stage(*stage) for stage in self._at.stages())

    def add(self, name: str, answer: bytes) -> None:
        if self._at is None:
            raise MessageError(f"client {name} answered where nothing was asked")
        self._at.add(name, answer)

    def close(self) -> RoundSum:
        if not isinstance(self._at, ServerRound):
            raise AggregationError(f"round {self._plan.round}: the stages did not run to their end")
        residues, survivors = self._at.close()
        total = self._owner.terms.total(self._plan, residues, len(survivors))
        self._owner.lost = 0
        return total


def binding_of(plan: RoundPlan, terms: Terms) -> bytes:
    """What every mask of a round hangs on, beside its participants.

    Round, seed, K, σ, scheme, perturbation, batch size and the weights' digest (the plan); fixed point, ring,
    weights and privacy (the terms).
    """
    return hash_of(b"plan and terms", plan.digest, terms.digest)


# -- the client's half ------------------------------------------------------------------------------


class Ledger(Protocol):
    """What a client has answered, ever."""

    def record(self, job: bytes, round_: int, asked: bytes) -> None:
        """Writes down, before an answer leaves, that it does.

        Raises SecurityError for a round that is not above the job's last, and for ``asked`` (a hash of seed
        and round, which make the directions) that was answered before, in whatever job and at whatever
        weights: two sums along the same directions, with and without a client, differ by its answer.
        """
        ...


class MemoryLedger:
    """A ledger that ends with its process: for simulations, where the clients do too."""

    def __init__(self) -> None:
        self._last: dict[bytes, int] = {}
        self._asked: set[bytes] = set()

    def record(self, job: bytes, round_: int, asked: bytes) -> None:
        self.check(job, round_, asked)
        self._last[job] = round_
        self._asked.add(asked)

    def check(self, job: bytes, round_: int, asked: bytes) -> None:
        last = self._last.get(job, -1)
        if round_ <= last:
            raise SecurityError(f"round {round_} was asked for again: round {last} of this job is answered")
        if asked in self._asked:
            raise SecurityError(
                f"round {round_}: this seed was answered before, in another job: take another for each job"
            )


class FileLedger:
    """A ledger on disk: one line an answer, synced before the answer leaves. One process at a time; POSIX.

    Raises DataError where the file cannot be read or written, is damaged, or is another process's.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, MemoryLedger()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise DataError(f"cannot use the ledger {path}: {error.strerror}") from error
        try:
            self._load()
        except DataError:
            self.close()
            raise

    def _load(self) -> None:
        import fcntl  # POSIX alone has it: elsewhere no ledger is better than one that two processes share

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = self._path.read_bytes()
        except BlockingIOError as error:
            raise DataError(f"{self._path}: another process uses this ledger") from error
        except OSError as error:
            raise DataError(f"cannot use the ledger {self._path}: {error.strerror}") from error
        *lines, cut_short = data.split(b"\n")
        for number, line in enumerate(lines):
            self._read(number, line)
        if cut_short:  # its answer had not left yet: a line is synced before
            os.ftruncate(self._file, len(data) - len(cut_short))

    def _read(self, number: int, line: bytes) -> None:
        try:
            job, round_, asked = line.decode("ascii").split(" ")
            if len(job) != 2 * KEY_BYTES or len(asked) != 2 * KEY_BYTES:
                raise ValueError
            self._known.record(bytes.fromhex(job), int(round_), bytes.fromhex(asked))
        except (ValueError, SecurityError) as error:
            raise DataError(f"the ledger {self._path} is damaged at line {number + 1}") from error

    def record(self, job: bytes, round_: int, asked: bytes) -> None:
        self._known.check(job, round_, asked)
        line = f"{job.hex()} {round_} {asked.hex()}\n".encode()
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # what was written of the line would be taken for the next one
                os.ftruncate(self._file, size)
            raise DataError(f"cannot write the ledger {self._path}: {error.strerror}") from error
        self._known.record(job, round_, asked)

    def close(self) -> None:
        os.close(self._file)


class SecureSeal:
    """A client's half of SecureSum: it answers masked, or not at all.

    What it insists on is its own: ``policy``; ``least_noise``, the smallest noise multiplier z (0: none);
    ``job``, the one that it works for (None: any); ``ledger``. Terms with ``levels`` are refused unless it
    allows them: where one client alone reaches a level, the sum beyond it is that client's, and nobody can
    tell it so. Raises SecurityError for whatever protects less.
    """

    def __init__(
        self,
        name: str,
        identity: Identity,
        roster: Roster,
        policy: Policy | None = None,
        *,
        ledger: Ledger | None = None,
        least_noise: float = 0.0,
        job: bytes | None = None,
        levels: bool = False,
    ) -> None:
        self.name, self.policy, self.least_noise = name, policy or Policy(), least_noise
        self.job, self.levels = job, levels
        self._ledger = ledger or MemoryLedger()
        self._session = ClientSession(name, identity, roster, self.policy)
        self._terms: Terms | None = None

    def reply(self, stage: str, request: bytes, plan: RoundPlan, measure: Measure) -> bytes:
        """The answer to a stage's request.

        Raises SecurityError and MessageError, and what ``measure`` raises.
        """
        if stage == _ADVERTISE:
            return self._advertise(request, plan)
        if stage == ANSWER:
            return self._answer(request, plan, measure)
        steps = {
            "choose": self._session.choose,
            "share": self._session.share,
            "confirm": self._session.confirm,
            "unmask": self._session.unmask,
        }
        if stage not in steps:
            raise SecurityError(f"client {self.name}: there is no stage {stage!r} in a secure sum")
        return steps[stage](request)

    def _advertise(self, request: bytes, plan: RoundPlan) -> bytes:
        if len(request) < 4:
            raise MessageError("an offer of a session cut short")
        (size,) = struct.unpack_from("<I", request)
        self._terms = None
        terms = Terms.decode(request[4 : 4 + size])  # which refuses what can overflow
        terms.check_plan(plan)
        message = self._session.advertise(request[4 + size :], terms.digest)
        try:
            self._check(terms)
        except SecurityError:
            self._session.leave()
            raise
        self._terms = terms
        return message

    def _answer(self, request: bytes, plan: RoundPlan, measure: Measure) -> bytes:
        if self._terms is None or not request:
            raise SecurityError(f"client {self.name}: it was asked to answer in the clear")
        terms = self._terms
        self._check(terms)

        def measured() -> NDArray[Any]:
            vector = measure(terms)
            asked = hash_of(b"asked", plan.seed, plan.round)
            self._ledger.record(self._session.job, plan.round, asked)
            return vector

        return self._session.answer(request, plan.round, binding_of(plan, terms), measured)

    def _check(self, terms: Terms) -> None:
        """Job, levels, noise. Noise must be in whatever can be opened: each honest client adds a share."""
        if self.job is not None and self._session.job != self.job:
            raise SecurityError(f"client {self.name}: another job than the one that it works for")
        if len(terms.levels) > 1 and not self.levels:
            raise SecurityError(
                f"client {self.name}: the terms have levels, and a sum beyond one may be a single client's"
            )
        noise, hides = terms.privacy.noise_multiplier if terms.privacy else 0.0, self._session.hides
        if noise < self.least_noise:
            raise SecurityError(
                f"client {self.name}: noise multiplier {noise} was proposed, at least {self.least_noise} is "
                "asked for here"
            )
        if terms.privacy and terms.privacy.shares > hides:
            raise SecurityError(
                f"client {self.name}: the noise counts on {terms.privacy.shares} honest clients, and only "
                f"{hides} are sure to be in a sum"
            )
