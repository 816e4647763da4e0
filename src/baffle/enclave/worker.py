"""The worker: a client inside the sandbox. Frames of bytes on two pipes, and nothing else of the world.

It starts, lets go of what it needed to start (``seccomp.lock``), and only then reads its first byte. It
makes its keys itself, and shows the public ones; what they open is for it alone. Whoever runs it passes boxes
on and sees their sizes, and the times.

    ← BOOT       manifest and, where a state is kept, the key to seal it    READY    public keys
    ← KEYS       whether it is still there                                  READY    public keys
    ← PROVISION  a box of the owner's: bundle, data, name, keys             DONE     a signed, sealed word
    ← HANDLE     a box of the server's: an envelope                         DONE     the reply, signed, sealed
    ← RESUME     a sealed state instead of a provision                      BLOB     it, sealed anew
    before a reply leaves, where the ledger has a new line:                 SAVE
    ← SEAL       the counter's next value                                   BLOB     the state, sealed
    ← SAVED
    what it does not do:                                                    REFUSED  why, in one line

A reason goes to the host in the clear only where nothing of a box has been opened.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from io import FileIO
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.aggregation import ANSWER, Seal
from baffle.bundle import Bundle
from baffle.client import Client, Download
from baffle.digests import sha256
from baffle.enclave import seccomp
from baffle.enclave.channel import (
    SESSION_BYTES,
    Place,
    Request,
    answer,
    decrypted,
    encrypted,
    encrypted_size,
)
from baffle.enclave.sealing import seal_with, unseal_with
from baffle.endpoint import Endpoint
from baffle.errors import BaffleError, DataError, MessageError, SecurityError
from baffle.estimator import SteinEstimator
from baffle.exchange import TICKET_BYTES, Envelope, Reply
from baffle.fixedpoint import FixedPoint
from baffle.perturbations import Layout, LowRank, Rademacher
from baffle.plan import LocalSteps, LocalTraining, ModelMessage, RoundPlan, weights_digest
from baffle.privacy import Privacy
from baffle.runtimes import Batch
from baffle.runtimes.graph import Graph, Node
from baffle.runtimes.numpy import NumpyRuntime
from baffle.secagg.primitives import Identity, KeyPair, random_bytes
from baffle.secagg.session import Policy, Roster
from baffle.secure import MemoryLedger, Protection, SecureSeal, SecureSum
from baffle.terms import Terms

BOOT, PROVISION, HANDLE, RESUME, SEAL, SAVED, KEYS = range(1, 8)
READY, DONE, BLOB, SAVE, REFUSED = range(65, 70)
MOST_BYTES = 1 << 32
NUMBER = struct.Struct("<Q")
_FRAME = struct.Struct("<BQ")
_CONTEXT = b"baffle enclave worker v1"
_MODEL_HEAD = 14  # bytes before the numbers of a model's message (docs/spec.md, section 6)
_ALIGN = 8

Bytes = bytes | bytearray | memoryview


class Reads(Protocol):
    def readinto(self, buffer: Any, /) -> int | None: ...


class Writes(Protocol):
    def write(self, data: Any, /) -> int | None: ...


class Pipe:
    """Frames: kind (u8), length (u64), bytes. The same at both ends."""

    def __init__(self, source: Reads, sink: Writes) -> None:
        self._source, self._sink = source, sink

    def send(self, kind: int, *parts: Bytes) -> None:
        """Raises OSError where nobody reads any more."""
        self.send_of(kind, sum(map(len, parts)), parts)

    def send_of(self, kind: int, size: int, parts: Iterable[Bytes]) -> None:
        """A frame of ``size`` bytes, made while it is sent."""
        self._write(_FRAME.pack(kind, size))
        for part in parts:
            self._write(part)

    def _write(self, data: Bytes) -> None:
        view, at = memoryview(data).cast("B"), 0
        while at < len(view):
            at += self._sink.write(view[at : at + (1 << 20)]) or 0

    def receive(self) -> tuple[int, memoryview]:
        """The next frame, in memory of its own. EOFError where there is none."""
        kind, size = _FRAME.unpack(self._exactly(_FRAME.size))
        if size > MOST_BYTES:
            raise EOFError("a frame that says to be larger than any")
        return kind, self._exactly(size)

    def _exactly(self, size: int) -> memoryview:
        found, at = np.empty(size, np.uint8).data, 0
        while at < size:
            got = self._source.readinto(found[at : at + (1 << 20)])
            if not got:
                raise EOFError("the other end of the pipe is gone")
            at += got
        return found


# -- what a worker is given by the owner of the data --------------------------------------------------------


class Rows:
    """A client's samples: inputs (N, ...) as they are stored, uint8 or float32, and targets (N,)."""

    def __init__(self, inputs: NDArray[Any], targets: NDArray[Any]) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        return Batch(self.inputs[indices], self.targets[indices])


class Provision(NamedTuple):
    """What the owner sends: who the client is, whom it answers, the network, the data, the seal.

    ``server``: the public key that must have signed every envelope. ``files``: the bundle's, by name;
    ``hashes``: of these, and of those that are not sent. ``seal``: None for answers that the server may read.
    """

    name: str
    seed: bytes
    server: bytes
    files: Mapping[str, Bytes]
    hashes: Mapping[str, str]
    inputs: NDArray[Any]
    targets: NDArray[Any]
    seal: Mapping[str, Any] | None = None
    max_directions: int | None = None

    def encode(self) -> bytes:
        """``u32 length ‖ JSON, padded ‖ the files ‖ inputs ‖ targets``, each from a multiple of 8."""
        arrays = {"inputs": np.ascontiguousarray(self.inputs), "targets": np.ascontiguousarray(self.targets)}
        head = {
            "name": self.name,
            "seed": self.seed.hex(),
            "server": self.server.hex(),
            "files": {name: len(data) for name, data in self.files.items()},
            "hashes": dict(self.hashes),
            "arrays": {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()},
            "seal": None if self.seal is None else dict(self.seal),
            "max_directions": self.max_directions,
        }
        text = json.dumps(head, sort_keys=True).encode()
        parts: list[Bytes] = [struct.pack("<I", len(text)) + text, *self.files.values()]
        parts += [array.reshape(-1).view(np.uint8).data for array in arrays.values()]
        return b"".join(bytes(part) + bytes(-len(part) % _ALIGN) for part in parts)

    @classmethod
    def decode(cls, data: memoryview) -> Provision:
        """Arrays and files are views of ``data``. Raises MessageError for what is none."""
        try:
            (size,) = struct.unpack("<I", data[:4])
            head = json.loads(bytes(data[4 : 4 + size]))
            at = 4 + size + -(4 + size) % _ALIGN
            files: dict[str, Bytes] = {}
            for name, length in head["files"].items():
                files[name], at = data[at : at + length], at + length + -length % _ALIGN
            arrays = {}
            for name in ("inputs", "targets"):
                form, shape = head["arrays"][name]
                dtype = np.dtype(form)
                if dtype.kind not in "uif":
                    raise ValueError(f"{name} are numbers, not {dtype}")
                length = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
                arrays[name] = np.frombuffer(data[at : at + length], dtype).reshape(shape)
                at += length + -length % _ALIGN
            if at != len(data):
                raise ValueError(f"{at} bytes, of {len(data)}")
            return cls(
                head["name"],
                bytes.fromhex(head["seed"]),
                bytes.fromhex(head["server"]),
                files,
                head["hashes"],
                arrays["inputs"],
                arrays["targets"],
                head["seal"],
                head["max_directions"],
            )
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MessageError(f"no provision: {error}") from error


def seal_settings(
    identity: Identity,
    roster: Mapping[str, bytes],
    policy: Policy,
    *,
    least_noise: float = 0.0,
    job: bytes | None = None,
    levels: bool = False,
) -> dict[str, Any]:
    """``Provision.seal``: all of a ``SecureSeal`` but its ledger, which the worker keeps."""
    return {
        "identity": identity.to_bytes().hex(),
        "roster": {name: key.hex() for name, key in roster.items()},
        "policy": asdict(policy),
        "least_noise": least_noise,
        "job": None if job is None else job.hex(),
        "levels": levels,
    }


def model_hash(hashes: Mapping[str, str]) -> str:
    """``Manifest.model`` of a bundle's folder: file name → SHA-256 in hexadecimal."""
    text = json.dumps(
        {f"/{name}": digest for name, digest in hashes.items()}, sort_keys=True, separators=(",", ":")
    )
    return sha256(text.encode("ascii")).hexdigest()


# -- the process ------------------------------------------------------------------------------------------


class _Ledger(MemoryLedger):
    """A ledger whose lines are on the host's disk, sealed, before an answer leaves."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker, self.lines = worker, list[tuple[str, int, str]]()

    def record(self, job: bytes, round_: int, asked: bytes) -> None:
        super().record(job, round_, asked)
        self.lines.append((job.hex(), round_, asked.hex()))
        self._worker.save()

    def load(self, lines: list[list[Any]]) -> None:
        for job, round_, asked in lines:
            super().record(bytes.fromhex(job), round_, bytes.fromhex(asked))
            self.lines.append((job, round_, asked))


class Worker:
    """What the process does with its frames."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._pair, self._identity = KeyPair.generate(), Identity.generate()
        self._sealing_key: bytes | None = None
        self._manifest: dict[str, Any] = {}
        self._ledger = _Ledger(self)
        self._endpoint: Endpoint | None = None
        self._server = b""
        self._last: dict[bytes, int] = {}  # session → number of its last request
        self._stored: tuple[bytes, str] | None = None  # key and hash of the provision on the host's disk

    def run(self) -> None:
        """Until the host closes the pipe."""
        while True:
            try:
                kind, frame = self._pipe.receive()
            except EOFError:
                return
            try:
                self._step(kind, frame)
            except (
                SecurityError,
                MessageError,
            ) as error:  # nothing was opened: it holds no secret
                self._pipe.send(REFUSED, str(error).encode())

    def _step(self, kind: int, frame: memoryview) -> None:
        if kind == BOOT:
            if self._manifest:
                raise SecurityError("this worker knows already what it was measured with")
            told = json.loads(bytes(frame))
            self._manifest = told["manifest"]
            key = told["sealing_key"]
            self._sealing_key = None if key is None else bytes.fromhex(key)
        if kind in (BOOT, KEYS):
            self._pipe.send(READY, self._pair.public, self._identity.public)
        elif kind == PROVISION:
            self._provision(frame)
        elif kind == HANDLE:
            self._pipe.send(DONE, self._handle(frame))
        elif kind == RESUME:
            self._resume(frame)
        elif kind == SEAL:
            self._pipe.send(BLOB, self._sealed(frame))
        else:
            raise MessageError(f"a frame of the unknown kind {kind}")

    def _handle(self, frame: memoryview) -> bytes:
        if len(frame) < SESSION_BYTES + NUMBER.size:
            raise MessageError("a request cut short")
        session, (number,) = bytes(frame[:SESSION_BYTES]), NUMBER.unpack_from(frame, SESSION_BYTES)
        if self._endpoint is None:
            raise SecurityError("this worker has no data yet: its owner has not provisioned it")
        if number <= self._last.get(session, -1):
            raise SecurityError("a request that came before: replayed, or out of order")
        place = Place("request", session, number)
        request = Request.open(self._pair, frame[SESSION_BYTES + NUMBER.size :], place)
        request.check(self._server)
        self._last[session] = number
        reply_to = request.reply_to  # before the envelope is moved over it
        try:
            reply = self._endpoint.reply(Envelope.decode(_laid_out(request.body)))
        except MessageError as error:
            reply = Reply.explaining(bytes(TICKET_BYTES), "malformed", error).encode()
        return answer(self._identity, reply_to, reply, place._replace(direction="reply"))

    # -- the owner's word

    def _provision(self, frame: memoryview) -> None:
        if self._endpoint is not None:
            raise SecurityError("this worker has its data: it takes no other")
        place = Place("provision", bytes(frame[:SESSION_BYTES]), 0)
        request = Request.open(self._pair, frame[SESSION_BYTES:], place)
        reply_to, said, body = request.reply_to, b"ok", _moved(request.body, request.body, 0)
        try:
            self._begin(body)
        except BaffleError as error:  # it may name what is secret: for the owner alone
            said = f"refused: {error}".encode()
        said = answer(self._identity, reply_to, said, place._replace(direction="reply"))
        head = struct.pack("<I", len(said)) + said
        if self._endpoint is None or self._sealing_key is None:
            self._pipe.send(DONE, head)
            return
        key, hashed = random_bytes(32), sha256()

        def chunks() -> Iterable[bytes]:
            yield head
            for chunk in encrypted(key, body):
                hashed.update(chunk)
                yield chunk

        self._pipe.send_of(DONE, len(head) + encrypted_size(len(body)), chunks())
        self._stored = key, hashed.hexdigest()

    def _begin(self, body: memoryview) -> None:
        """Makes the client. Raises BaffleError where it cannot be, or is not the one that was measured."""
        given = Provision.decode(body)
        hashes = dict(given.hashes)
        for name, data in given.files.items():
            if hashes.get(name) != sha256(data).hexdigest():
                raise DataError(f"the bundle's file {name} is not the one that its hash names")
        if model_hash(hashes) != self._manifest["model"]:
            raise SecurityError("another bundle than the one that this worker was measured with")
        settings = self._manifest["config"]["runtime"]
        runtime = NumpyRuntime(Bundle.of_files(given.files), **settings)
        seal: Seal | None = None
        if given.seal is not None:
            keys = {name: bytes.fromhex(key) for name, key in given.seal["roster"].items()}
            job = given.seal["job"]
            seal = SecureSeal(
                given.name,
                Identity.from_bytes(bytes.fromhex(given.seal["identity"])),
                Roster(keys),
                Policy(**given.seal["policy"]),
                ledger=self._ledger,
                least_noise=given.seal["least_noise"],
                job=None if job is None else bytes.fromhex(job),
                levels=given.seal["levels"],
            )
        rows = Rows(given.inputs, given.targets)
        if len(given.inputs) != len(given.targets):
            raise DataError(f"{len(given.inputs)} inputs, {len(given.targets)} targets")
        client = Client(
            given.name, runtime, rows, seed=given.seed, max_directions=given.max_directions, seal=seal
        )
        self._server, self._endpoint = given.server, Endpoint(client)

    # -- its state, on the host's disk

    def save(self) -> None:
        """Returns when what is in the ledger is sealed and kept; EOFError where the host is gone."""
        self._pipe.send(SAVE)
        while True:
            kind, frame = self._pipe.receive()
            if kind == SAVED:
                return
            if kind != SEAL:
                raise SecurityError("the host was asked to keep the state, and did something else")
            self._pipe.send(BLOB, self._sealed(frame))

    def _sealed(self, frame: memoryview) -> bytes:
        if self._sealing_key is None or self._stored is None:
            raise SecurityError("no state is kept for this worker")
        if len(frame) != NUMBER.size:
            raise MessageError("a value of a counter has 8 bytes")
        (at,) = NUMBER.unpack(frame)
        key, digest = self._stored
        state = {"key": key.hex(), "provision": digest, "ledger": self._ledger.lines}
        return seal_with(self._sealing_key, at, json.dumps(state).encode(), _CONTEXT)

    def _resume(self, frame: memoryview) -> None:
        if self._endpoint is not None or self._sealing_key is None:
            raise SecurityError("this worker has its data already, or no key to open a state with")
        if len(frame) < 20:
            raise MessageError("a state cut short")
        counter, at, size = struct.unpack_from("<QQI", frame)
        blob, stored = frame[20 : 20 + size], frame[20 + size :]
        state = json.loads(unseal_with(self._sealing_key, counter, bytes(blob), _CONTEXT))
        if sha256(stored).hexdigest() != state["provision"]:
            raise SecurityError("the provision on disk is not the one that the state belongs to")
        key = bytes.fromhex(state["key"])
        body = decrypted(key, stored)
        try:
            self._begin(_moved(body, body, 0))
        except BaffleError as error:
            raise SecurityError(f"a state that cannot be used: {type(error).__name__}") from error
        self._ledger.load(state["ledger"])
        self._stored = key, state["provision"]
        self._pipe.send(BLOB, self._sealed(memoryview(NUMBER.pack(at))))


def _laid_out(envelope: memoryview) -> memoryview:
    """An envelope, moved by a few bytes in its memory so that the numbers of its model need no copy."""
    package = len(Envelope.decode(envelope).package)
    return _moved(envelope, envelope[len(envelope) - package :], _MODEL_HEAD).toreadonly()


def _moved(whole: memoryview, part: memoryview, offset: int) -> memoryview:
    """``whole``, moved down so that byte ``offset`` of its ``part`` lies at a multiple of 8.

    At most 7 bytes that lay before it are overwritten: they were a box's head.
    """
    if len(part) <= offset:
        return whole
    shift = (_address(part) + offset) % _ALIGN
    room = memoryview(whole.obj).cast("B")
    at = _address(whole) - _address(room) - shift
    room[at : at + len(whole)] = whole  # memmove
    return room[at : at + len(whole)]


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


# -- start ------------------------------------------------------------------------------------------------


def rehearse() -> None:
    """Everything once, before the doors close: what Python imports and reads only when it is used.

    Boxes, rounds of three clients summed in secret and with noise, a round of each other kind. Cost: some
    hundred small products.
    """
    seccomp.rehearse()
    pair, identity = KeyPair.generate(), Identity.generate()
    place = Place("request", bytes(SESSION_BYTES), 0)
    request = Request.open(
        pair, bytearray(Request.box(identity, pair.public, pair.public, b" ", place)), place
    )
    request.check(identity.public)
    answer(identity, request.reply_to, b" ", place)
    with contextlib.suppress(SecurityError):
        request.check(pair.public)
    unseal_with(bytes(32), 0, seal_with(bytes(32), 1, b" ", _CONTEXT), _CONTEXT)

    linear = Node("linear", "linear", (0,), (("bias", "b"), ("weight", "w")), ())
    one = np.ones(1, np.float32)
    bundle = Bundle(
        "rehearsal",
        Layout(("w", "b"), ((2, 1), (2,))),
        {},
        bytes(32),
        (1,),
        ("0", "1"),
        one,
        one,
        Graph((1,), (linear,), "cross-entropy"),
        initial=np.ones(4, np.float32),
    )
    runtime, weights = NumpyRuntime(bundle), np.ones(4, np.float32)
    digest, model = weights_digest(weights, runtime.layout, bytes(32)), ModelMessage(weights).encode()
    rows = Rows(np.ones((2, 1), np.uint8), np.ones(2, np.int64))
    keys = {name: Identity.generate() for name in "abc"}
    roster = Roster({name: key.public for name, key in keys.items()})
    clients = {
        name: Client(name, runtime, rows, seal=SecureSeal(name, key, roster, Policy(2, 0.0)))
        for name, key in keys.items()
    }
    for round_, noise in enumerate((None, Privacy("client", 1.0, 1.0, shares=1))):
        plan = RoundPlan(round_, bytes(32), SteinEstimator(2, 1e-2, "central"), digest, 2)
        terms = Terms(FixedPoint(), 3, 4, privacy=noise)
        tally = SecureSum(roster, terms, Protection(0.0, 0.3, 2)).open(plan, sorted(clients))
        download = Download.decode(plan.encode(), model)
        for stage in tally.stages():
            for name in sorted(stage.requests):
                tally.add(name, clients[name].reply(stage.name, stage.requests[name], download))
        tally.close()
    client = Client("d", runtime, rows)
    for made in (Rademacher(), LowRank(1)):
        estimator = SteinEstimator(2, 1e-2, perturbation=made)
        plan = RoundPlan(0, bytes(32), estimator, digest, 2)
        for each in (plan, replace(plan, steps=LocalSteps(2)), replace(plan, local=LocalTraining())):
            Endpoint(client).handle(Envelope(ANSWER, each.encode(), b"", model).encode())
    Endpoint(client).handle(b"")


def main() -> None:
    """The worker's process, from its start to its end."""
    logging.disable(logging.CRITICAL)  # a traceback reads source files, and may say what is secret
    warnings.simplefilter("ignore")
    try:
        worker = Worker(Pipe(FileIO(0, closefd=False), FileIO(1, "w", closefd=False)))
        rehearse()
        seccomp.lock()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    try:
        worker.run()
    except BaseException as error:  # its text may be secret
        os.write(2, f"{type(error).__name__} in the worker\n".encode())
        os._exit(2)
    os._exit(0)


if __name__ == "__main__":
    sys.exit("this runs inside the sandbox: baffle.enclave.host starts it")
