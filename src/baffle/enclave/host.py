"""Who runs a worker, and who talks to it.

The *host* launches it, asks a root for evidence of it and passes boxes on; it holds no key of theirs. The
*owner* of the data and the *server* believe the evidence, and seal what they send to the key in it:

    host = EnclaveHost("hospital", Setup(bundle), root)                    # where the worker runs
    provision(host.handle, provisioning, verifier, [measurement])          # the owner, once
    driver = EnclaveDriver(device.Sockets(folder), verifier, [measurement], identity)    # the server

What passes between them is made of the envelopes and replies of every driver (``docs/spec.md``, section 13),
with stages of its own: attest, provision, sealed. So a socket, a folder or Flower carries it.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from baffle.bundle import FROZEN, HEAD, WEIGHTS
from baffle.enclave import sandbox, seccomp
from baffle.enclave.channel import Place, Request, answered
from baffle.enclave.evidence import (
    NONCE_BYTES,
    Challenge,
    Evidence,
    Keys,
    Root,
    Verifier,
    accept,
    attest,
)
from baffle.enclave.manifest import Manifest, hashes_of
from baffle.enclave.sealing import SealedState, write_whole
from baffle.enclave.worker import (
    BLOB,
    BOOT,
    DONE,
    HANDLE,
    KEYS,
    NUMBER,
    PROVISION,
    READY,
    REFUSED,
    RESUME,
    SAVE,
    SAVED,
    SEAL,
    Pipe,
    Provision,
)
from baffle.errors import BaffleError, ConfigError, DeliveryError, MessageError, SecurityError
from baffle.exchange import HELLO, TICKET_BYTES, Envelope, Reply
from baffle.federation import Driver, Outcome, in_order
from baffle.secagg.primitives import Identity, KeyPair

ATTEST, PROVISIONING, SEALED = "attest", "provision", "sealed"
PROGRAM = "import baffle.enclave.worker as w; w.main()"
_CONTEXT = b"baffle enclave session v1"
_SECONDS_TO_END = 60.0


# -- what runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """All that a worker is measured with, beside the code: its bundle, how it runs it, its limits.

    ``runtime`` are settings of ``NumpyRuntime``: mode, micro_batch, memory, storage, arithmetic.
    """

    bundle: Path
    runtime: Mapping[str, Any] = field(default_factory=dict)
    limits: sandbox.Limits = field(default_factory=sandbox.Limits)

    def files(self) -> dict[str, Path]:
        """What the sandbox will hold. Cost: a second, in a process of its own."""
        return sandbox.python_files(("baffle.enclave.worker",))

    def manifest(self, files: Mapping[str, Path]) -> Manifest:
        """What a worker of these files is. Raises DataError, ConfigError. Cost: all are read once."""
        version = next(name.split("/")[3] for name in files if name.startswith(f"{sandbox.HOME}/lib/python"))
        return Manifest.of_this(
            files,
            site=f"{sandbox.HOME}/lib/{version}/site-packages",
            bundle=self.bundle,
            config={"runtime": dict(self.runtime), "program": PROGRAM},
            limits=asdict(self.limits),
            seccomp=b"".join(map(_program, (seccomp.STARTING, seccomp.STEADY))),
        )


def _program(rules: Sequence[seccomp.Rule]) -> bytes:
    with os.fdopen(seccomp.program(rules), "rb") as file:
        return file.read()


# -- the host ---------------------------------------------------------------------------------------------


class EnclaveHost:
    """A worker, and what stands around it. For ``device.serve`` and ``drop.serve_drop`` it is an endpoint.

    ``state``: a folder in which what the worker needs to go on after a restart is kept, sealed; the ledger of
    secure sums is in it before an answer leaves. Without one, a worker that ends has to be provisioned again.
    The worker ends with the thread that made it. To be closed (``with``). Raises SecurityError where this
    machine makes no sandbox, or the root refuses.
    """

    def __init__(self, name: str, setup: Setup, root: Root, *, state: Path | None = None) -> None:
        self.name = name
        self.setup = setup
        self._root, self._state_folder = root, state
        self._files = setup.files()
        self.manifest = setup.manifest(self._files)
        self.measurement = self.manifest.measurement
        self.last: sandbox.Report | None = None  # how the worker before this one ended
        self._state: SealedState | None = None
        self._process: sandbox.Process | None = None
        if state is not None:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._state = SealedState(state / "state", root)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EnclaveHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker."""
        if self._process is not None:
            self._process.close()
            self._process = None
        if self._state is not None:
            self._state.close()
            self._state = None

    @property
    def process(self) -> sandbox.Process:
        """The running worker. SecurityError where it has ended."""
        if self._process is None:
            raise SecurityError(f"the worker has ended: {self.last}")
        return self._process

    def _start(self) -> None:
        process = sandbox.launch(sandbox.program(PROGRAM), self._files, self.setup.limits)
        try:
            self._pipe = Pipe(process.stdout, process.stdin)  # type: ignore[arg-type]
            self._process = process
            key = self._root.sealing_key(self.measurement).hex() if self._state is not None else None
            told = {"manifest": json.loads(self.manifest.encode()), "sealing_key": key}
            keys = bytes(self._exchange(BOOT, json.dumps(told).encode(), expect=READY))
            self.keys = Keys(keys[:32], keys[32:])
            if self._state is not None and (self._folder / "state").exists():
                self._state.resume(self._resumed)
        except BaseException:
            process.close()
            self._process = None
            raise

    @property
    def _folder(self) -> Path:
        assert self._state_folder is not None
        return self._state_folder

    def _exchange(self, kind: int, *parts: bytes | memoryview, expect: int = DONE) -> memoryview:
        """One frame to the worker, and its answer; in between, what it wants to be kept is kept."""
        try:
            self._pipe.send(kind, *parts)
            while True:
                got, frame = self._pipe.receive()
                if got != SAVE:
                    break
                if self._state is not None:
                    self._state.save(self._sealed)
                self._pipe.send(SAVED)
        except (EOFError, OSError) as error:
            self._bury()
            raise SecurityError(f"the worker has ended: {self.last}") from error
        if got == REFUSED:
            raise SecurityError(bytes(frame).decode("utf-8", "replace"))
        if got != expect:
            raise SecurityError(f"the worker answered with a frame of kind {got}, where {expect} was due")
        return frame

    def _bury(self) -> None:
        process, self._process = self.process, None
        with process:
            self.last = process.wait(_SECONDS_TO_END)

    def _sealed(self, at: int) -> bytes:
        self._pipe.send(SEAL, NUMBER.pack(at))
        kind, frame = self._pipe.receive()
        if kind != BLOB:
            raise SecurityError(bytes(frame).decode("utf-8", "replace"))
        return bytes(frame)

    def _resumed(self, blob: bytes, at: int) -> bytes:
        head = struct.pack("<QQI", self._root.counter(), at, len(blob))
        try:
            stored = (self._folder / "provision").read_bytes()
        except OSError as error:
            raise SecurityError(
                f"the provision that the state belongs to is gone: {error.strerror}"
            ) from error
        return bytes(self._exchange(RESUME, head, blob, stored, expect=BLOB))

    # -- what it is asked

    def evidence(self, nonce: bytes, context: bytes) -> Evidence:
        """The root's word for the running worker and its keys."""
        return attest(self._root, self.measurement, self.keys, nonce, context)

    def handle(self, data: bytes) -> bytes:
        """The encoded reply to an encoded envelope, as ``Endpoint.handle``: never raises."""
        try:
            envelope = Envelope.decode(memoryview(data))
        except BaffleError as error:
            return Reply.explaining(bytes(TICKET_BYTES), "malformed", error).encode()
        return self.reply(envelope)

    def reply(self, envelope: Envelope) -> bytes:
        """``handle``, of an envelope that is decoded already."""
        ticket = envelope.ticket(self.name)
        try:
            return Reply(ticket, "answer", self._answer(envelope)).encode()
        except SecurityError as error:
            return Reply.explaining(ticket, "refused", error).encode()
        except BaffleError as error:
            return Reply.explaining(ticket, "failed", error).encode()

    def _answer(self, envelope: Envelope) -> bytes:
        if envelope.stage == HELLO:
            return self.name.encode()
        if envelope.stage not in (ATTEST, PROVISIONING, SEALED):
            raise SecurityError(f"{self.name} is an enclave: it takes what is sealed to it alone")
        if self._process is None:
            self._start()
        if envelope.stage == ATTEST:
            try:
                self._exchange(KEYS, expect=READY)
            except SecurityError:  # it was killed since
                self._start()
            nonce, context = envelope.request[:NONCE_BYTES], envelope.request[NONCE_BYTES:]
            return self.evidence(nonce, context).encode()
        box = envelope.package[:]
        if envelope.stage == SEALED:
            return bytes(self._exchange(HANDLE, envelope.request, box))
        return self._provision(envelope.request, box)

    def _provision(self, session: bytes, box: bytes | memoryview) -> bytes:
        done = self._exchange(PROVISION, session, box)
        (size,) = struct.unpack("<I", done[:4])
        said, stored = bytes(done[4 : 4 + size]), done[4 + size :]
        if stored and self._state is not None:
            write_whole(self._folder / "provision", bytes(stored))
            self._state.start(self._sealed)
        return said


# -- the owner --------------------------------------------------------------------------------------------


def provisioning(
    name: str,
    bundle: Path,
    inputs: NDArray[Any],
    targets: NDArray[Any],
    server: bytes,
    *,
    seed: bytes = bytes(32),
    seal: Mapping[str, Any] | None = None,
    weights: bool = False,
    max_directions: int | None = None,
) -> Provision:
    """What the owner sends of a bundle's folder and its data: inputs (N, ...), targets (N,).

    ``server``: the public key that must sign every envelope. ``seal``: ``worker.seal_settings``. ``weights``:
    the bundle's own weights, too, which only a client needs that is sent less than models.
    """
    hashes = {inside[1:]: digest for inside, digest in hashes_of({"": bundle}).items()}
    sent = (HEAD, FROZEN, WEIGHTS) if weights else (HEAD, FROZEN)
    files = {each: (bundle / each).read_bytes() for each in sent}
    return Provision(name, seed, server, files, hashes, inputs, targets, seal, max_directions)


def asked_for_evidence(
    exchange: Callable[[bytes], bytes],
    name: str,
    verifier: Verifier,
    measurements: Collection[bytes],
    *,
    context: bytes = b"",
) -> Evidence:
    """Evidence of the worker behind ``exchange``, with a fresh nonce, believed. Raises as ``provision``."""
    challenge = Challenge()
    envelope = Envelope(ATTEST, request=challenge.issue(context) + context)
    return accept(_body(exchange, name, envelope), challenge, verifier, measurements)


def provision(
    exchange: Callable[[bytes], bytes],
    given: Provision,
    verifier: Verifier,
    measurements: Collection[bytes],
    *,
    context: bytes = b"",
) -> Evidence:
    """Sends an owner's data to a worker whose evidence the verifier believes; returns that evidence.

    ``exchange``: envelope → reply, such as ``EnclaveHost.handle``, or ``device.relay``. Raises
    AttestationError before anything has left, SecurityError where the worker refuses, MessageError for what
    is no reply.
    """
    evidence = asked_for_evidence(exchange, given.name, verifier, measurements, context=context)
    identity, pair = Identity.generate(), KeyPair.generate()
    place = Place("provision", evidence.digest, 0)
    box = Request.box(identity, evidence.keys.agreement, pair.public, given.encode(), place)
    said = answered(
        evidence.keys.signing,
        pair,
        _body(exchange, given.name, Envelope(PROVISIONING, request=place.session, package=box)),
        place._replace(direction="reply"),
    )
    if said != b"ok":
        raise SecurityError(f"the worker did not take the data: {said.decode('utf-8', 'replace')}")
    return evidence


def _body(exchange: Callable[[bytes], bytes], name: str, envelope: Envelope) -> bytes:
    reply = Reply.decode(exchange(envelope.encode()))
    if reply.status != "answer":
        raise SecurityError(f"{name}: {reply.text}")
    if reply.ticket != envelope.ticket(name):
        raise MessageError(f"{name}: a reply to another envelope")
    return reply.body


# -- the server -------------------------------------------------------------------------------------------


@dataclass
class _Session:
    """What a server knows of one worker: its evidence, and how many requests it was sent."""

    evidence: Evidence
    pair: KeyPair = field(default_factory=KeyPair.generate)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def next(self) -> Place:
        return Place("request", self.evidence.digest, next(self.numbers))


class _Asked(NamedTuple):
    place: Place
    ticket: bytes  # of the envelope inside


class EnclaveDriver:
    """A driver whose clients are workers: any other carries the boxes.

    A client is asked for evidence before the first envelope, and again when it has started anew; one whose
    evidence ``verifier`` does not believe, or is of none of the ``measurements``, is sent nothing, and drops
    out as "refused". ``identity`` signs what is sent: owners name its public key. ``context`` is bound into
    the evidence, with that key and the client's name.
    """

    def __init__(
        self,
        driver: Driver,
        verifier: Verifier,
        measurements: Collection[bytes],
        identity: Identity,
        *,
        context: bytes = b"",
        seconds: float = 60.0,
    ) -> None:
        if not measurements:
            raise ConfigError("a driver of enclaves needs a measurement to trust")
        self._driver, self._verifier, self._identity = driver, verifier, identity
        self._measurements, self._context = tuple(measurements), context
        self._challenge = Challenge(seconds)
        self._sessions: dict[str, _Session] = {}

    def names(self) -> Sequence[str]:
        return self._driver.names()

    def evidence(self, name: str) -> Evidence | None:
        """What a client was believed for; None where it was not, or not yet."""
        session = self._sessions.get(name)
        return None if session is None else session.evidence

    def ask(
        self, stage: str, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        """As every driver's. ``deadline`` holds for each exchange: asking for evidence is one."""
        known = self._sessions.keys() & requests.keys()
        return in_order(requests, self._arrivals(requests, known, deadline))

    def _arrivals(
        self, requests: Mapping[str, bytes], known: set[str], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        again = []
        for name, outcome, opened in self._round(requests, sorted(requests), deadline):
            if opened or name not in known or isinstance(outcome, DeliveryError):
                yield name, outcome
            else:  # it may have started anew since the last round: then it has other keys
                again.append(name)
        for name, outcome, _ in self._round(requests, again, deadline):
            yield name, outcome

    def _round(
        self, requests: Mapping[str, bytes], names: list[str], deadline: float | None
    ) -> Iterator[tuple[str, Outcome, bool]]:
        """Outcomes, and whether they are a worker's own word."""
        lacking = [name for name in names if name not in self._sessions]
        for name, outcome in self._attest(lacking, requests, deadline):
            yield name, outcome, False
        boxes = _Boxes(self._identity, requests, {n: self._sessions[n] for n in names if n in self._sessions})
        if not boxes:
            return
        for name, outcome in self._driver.ask(SEALED, boxes, deadline):
            if isinstance(outcome, DeliveryError) or name not in boxes.asked:
                yield name, outcome, False
                continue
            opened = False
            try:
                outcome, opened = self._opened(name, boxes.asked[name], outcome), True
            except (SecurityError, MessageError) as error:
                del self._sessions[name]
                status = "refused" if isinstance(error, SecurityError) else "malformed"
                outcome = Reply.explaining(boxes.asked[name].ticket, status, error).encode()  # type: ignore[arg-type]
            yield name, outcome, opened

    def _opened(self, name: str, asked: _Asked, data: bytes) -> bytes:
        reply = Reply.decode(data)
        if reply.status != "answer":
            raise SecurityError(f"{reply.text} (the host's word, not the worker's)")
        session = self._sessions[name]
        place = asked.place._replace(direction="reply")
        return answered(session.evidence.keys.signing, session.pair, reply.body, place)

    def _attest(
        self, names: list[str], requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        """Opens sessions; yields those of whom there is nothing to believe."""
        asked = {}
        for name in names:
            context = _context(self._identity.public, name, self._context)
            asked[name] = Envelope(ATTEST, request=self._challenge.issue(context) + context)
        if not asked:
            return
        for name, outcome in self._driver.ask(
            ATTEST, {name: envelope.encode() for name, envelope in asked.items()}, deadline
        ):
            if isinstance(outcome, DeliveryError) or name not in asked:
                yield name, outcome
                continue
            try:
                body = _body(lambda _, said=outcome: said, name, asked[name])  # type: ignore[misc]
                nonce = asked[name].request[:NONCE_BYTES]
                evidence = Evidence.decode(body)
                if evidence.nonce != nonce:  # another client's, with a nonce that is good elsewhere
                    raise SecurityError("evidence for another nonce than the one it was given")
                self._sessions[name] = _Session(
                    accept(body, self._challenge, self._verifier, self._measurements)
                )
            except (SecurityError, MessageError, ConfigError) as error:
                ticket = Envelope.decode(memoryview(requests[name])).ticket(name)
                yield name, Reply.explaining(ticket, "refused", error).encode()


def _context(server: bytes, name: str, context: bytes) -> bytes:
    return b"\0".join((_CONTEXT, server.hex().encode(), name.encode(), context))


class _Boxes(Mapping[str, bytes]):
    """Envelopes in boxes, made when they are asked for."""

    def __init__(
        self, identity: Identity, requests: Mapping[str, bytes], sessions: Mapping[str, _Session]
    ) -> None:
        self._identity, self._requests, self._sessions = identity, requests, sessions
        self.asked: dict[str, _Asked] = {}

    def __getitem__(self, name: str) -> bytes:
        envelope, session = self._requests[name], self._sessions[name]
        place = session.next()
        box = Request.box(
            self._identity, session.evidence.keys.agreement, session.pair.public, envelope, place
        )
        self.asked[name] = _Asked(place, Envelope.decode(memoryview(envelope)).ticket(name))
        return Envelope(SEALED, request=place.session + NUMBER.pack(place.number), package=box).encode()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._sessions))

    def __len__(self) -> int:
        return len(self._sessions)
