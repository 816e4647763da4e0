"""Boxes, and the worker behind its frames: without the sandbox, so that everything can be looked at."""

import contextlib
import os
import struct
import threading
from io import FileIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import baffle
from baffle.bundle import Bundle
from baffle.digests import sha256
from baffle.enclave import channel, worker
from baffle.enclave.channel import CHUNK, Place, Request
from baffle.enclave.host import provisioning
from baffle.enclave.manifest import hashes_of
from baffle.enclave.sealing import sealed_at
from baffle.enclave.worker import NUMBER, Pipe, Provision, Worker
from baffle.endpoint import Endpoint
from baffle.errors import MessageError, SecurityError
from baffle.exchange import Envelope, Reply
from baffle.plan import ModelMessage, weights_digest
from baffle.runtimes.graph import Graph, Node
from baffle.runtimes.numpy import NumpyRuntime
from baffle.secagg.primitives import Identity, KeyPair, derive, open_sealed
from baffle.secagg.session import Policy
from baffle.secure import Protection, SecureSum
from baffle.stream import seed_from

SESSION = bytes(range(32))
PLACE = Place("request", SESSION, 0)


# -- boxes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_what_is_sealed_comes_out_in_place(size):
    pair, plaintext = KeyPair.generate(), np.random.default_rng(size).bytes(size)
    box = bytearray(channel.sealed(pair.public, plaintext, PLACE))
    assert len(box) == 32 + channel.encrypted_size(size)
    opened = channel.opened(pair, box, PLACE)
    assert bytes(opened) == plaintext
    assert opened.obj is box
    assert channel.sealed(pair.public, plaintext, PLACE) != channel.sealed(pair.public, plaintext, PLACE)


def test_a_box_is_what_the_page_says():
    """Taken apart by hand, chunk by chunk."""
    pair, plaintext = KeyPair.generate(), bytes(range(256)) * 600
    box = channel.sealed(pair.public, plaintext, PLACE)
    said = b"\x07request" + SESSION + struct.pack("<Q", 0)
    key = derive(pair.agree(box[:32]), b"baffle enclave box v1", said)
    cut, parts = CHUNK + 16, []
    for number, at in enumerate(range(32, len(box), cut)):
        last = at + cut >= len(box)
        parts.append(open_sealed(key, number + (last << 88), box[at : at + cut], b""))
    assert b"".join(parts) == plaintext
    assert [len(part) for part in parts] == [CHUNK, CHUNK, 600 * 256 - 2 * CHUNK]


OTHERS = [
    PLACE._replace(direction="reply"),
    PLACE._replace(session=bytes(32)),
    PLACE._replace(number=1),
]


def test_a_box_opens_nowhere_else():
    pair = KeyPair.generate()
    box = channel.sealed(pair.public, b"secret", PLACE)
    for place in OTHERS:
        with pytest.raises(SecurityError):
            channel.opened(pair, bytearray(box), place)
    with pytest.raises(SecurityError):
        channel.opened(KeyPair.generate(), bytearray(box), PLACE)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_box_that_was_changed_does_not_open(data):
    pair = KeyPair.generate()
    box = bytearray(channel.sealed(pair.public, bytes(2 * CHUNK + 100), PLACE))
    cut = CHUNK + 16
    ways = {
        "flip": lambda: box.__setitem__(at := data.draw(st.integers(0, len(box) - 1)), box[at] ^ 1),
        "cut": lambda: box.__delitem__(slice(data.draw(st.integers(0, len(box) - 1)), None)),
        "end at a chunk": lambda: box.__delitem__(slice(32 + cut * data.draw(st.integers(1, 2)), None)),
        "more": lambda: box.extend(bytes(data.draw(st.integers(1, 100)))),
        "swap": lambda: box.__setitem__(
            slice(32, 32 + 2 * cut), box[32 + cut : 32 + 2 * cut] + box[32 : 32 + cut]
        ),
        "twice": lambda: box.__setitem__(slice(32 + cut, 32 + cut), box[32 : 32 + cut]),
        "other key": lambda: box.__setitem__(slice(0, 32), KeyPair.generate().public),
        "no key": lambda: box.__setitem__(slice(0, 32), bytes(32)),
    }
    ways[data.draw(st.sampled_from(sorted(ways)))]()
    with pytest.raises(SecurityError):
        channel.opened(pair, box, PLACE)


def test_signatures_hold_for_their_place_and_sender():
    server, other, pair = Identity.generate(), Identity.generate(), KeyPair.generate()
    box = Request.box(server, pair.public, bytes(32), b"envelope", PLACE)
    request = Request.open(pair, bytearray(box), PLACE)
    request.check(server.public)
    assert (request.reply_to, bytes(request.body)) == (bytes(32), b"envelope")
    with pytest.raises(SecurityError, match="not signed"):
        request.check(other.public)
    reply = channel.answer(server, pair.public, b"reply", PLACE)
    assert channel.answered(server.public, pair, reply, PLACE) == b"reply"
    for place in OTHERS:
        with pytest.raises(SecurityError, match="not for this place"):
            channel.answered(server.public, pair, reply, place)
    for changed in (reply[:-1], reply[:63], b"", bytes([reply[0] ^ 1]) + reply[1:], reply + b"x"):
        with pytest.raises(SecurityError):
            channel.answered(server.public, pair, changed, PLACE)
    with pytest.raises(SecurityError):
        channel.answered(other.public, pair, reply, PLACE)
    with pytest.raises(SecurityError, match="cut short"):
        Request.open(pair, bytearray(channel.sealed(pair.public, bytes(95), PLACE)), PLACE)


# -- what the owner sends ---------------------------------------------------------------------------------


def network():
    """Two linear layers on 6 numbers, 3 classes."""
    nodes = (
        Node("linear", "first", (0,), (("bias", "b1"), ("weight", "w1")), ()),
        Node("activation", "relu", (1,), (), (("kind", "relu"),)),
        Node("linear", "second", (2,), (("bias", "b2"), ("weight", "w2")), ()),
    )
    layout = baffle.Layout(("w1", "b1", "w2", "b2"), ((5, 6), (5,), (3, 5), (3,)))
    rng = np.random.default_rng(5)
    return Bundle(
        "two-layers",
        layout,
        {},
        bytes(32),
        (6,),
        ("a", "b", "c"),
        np.full(6, 1 / 128, np.float32),
        np.full(6, -1, np.float32),
        Graph((6,), nodes, "cross-entropy"),
        initial=rng.standard_normal(layout.n).astype(np.float32),
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from baffle.bundle import frozen_digest

    made = network()
    object.__setattr__(made, "frozen_digest", frozen_digest({}))
    return made.write(tmp_path_factory.mktemp("bundles") / "bundle")


def data(seed=1, count=20):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 6), dtype=np.uint8), rng.integers(0, 3, count)


SERVER = Identity.generate()


def given_by_owner(bundle, name="a", **options):
    return provisioning(name, bundle.folder, *data(), SERVER.public, **options)


def test_a_provision_comes_back_without_copies(bundle):
    sent = given_by_owner(bundle, weights=True, max_directions=7, seed=b"s" * 32)
    raw = np.frombuffer(sent.encode(), np.uint8).copy()
    found = Provision.decode(raw.data)
    assert (found.name, found.seed, found.server, found.max_directions) == ("a", b"s" * 32, SERVER.public, 7)
    assert {name: bytes(data) for name, data in found.files.items()} == dict(sent.files)
    for mine, theirs in ((found.inputs, sent.inputs), (found.targets, sent.targets)):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
        assert np.shares_memory(mine, raw)
    made = Bundle.of_files(found.files)
    np.testing.assert_array_equal(made.weights(), bundle.weights())
    assert made.layout == bundle.layout
    assert made.graph == bundle.graph
    assert NumpyRuntime(made).frozen_digest == NumpyRuntime(bundle).frozen_digest


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=150, deadline=None)
def test_junk_is_no_provision(junk, framed):
    raw = struct.pack("<I", len(junk)) + junk + bytes(-(4 + len(junk)) % 8) if framed else junk
    with pytest.raises(MessageError):
        Provision.decode(memoryview(raw))


def test_the_models_hash_is_the_manifests(bundle):
    from baffle.enclave.manifest import _hash

    hashes = hashes_of({"": bundle.folder})
    assert worker.model_hash({name[1:]: digest for name, digest in hashes.items()}) == _hash(hashes)


# -- the worker -------------------------------------------------------------------------------------------


class Inside:
    """A worker in a thread, and its pipes; the host's part of a conversation, frame by frame."""

    def __init__(self, bundle, *, key=None, runtime=None):
        hashes = {name[1:]: digest for name, digest in hashes_of({"": bundle.folder}).items()}
        self.manifest = {"model": worker.model_hash(hashes), "config": {"runtime": runtime or {}}}
        ends = [os.pipe(), os.pipe()]
        self._files = [FileIO(end, mode) for pair in ends for end, mode in zip(pair, "rw", strict=True)]
        (inside_reads, writes, reads, inside_writes) = self._files
        self.worker = Worker(Pipe(inside_reads, inside_writes))
        self.pipe, self.frames = Pipe(reads, writes), []
        self._writes = writes
        self._thread = threading.Thread(target=self.worker.run)
        self._thread.start()
        keys = self.exchange(worker.BOOT, self.boot(key))
        assert keys[0] == worker.READY
        self.agreement, self.signing = bytes(keys[1][:32]), bytes(keys[1][32:])
        self.pair, self.saved = KeyPair.generate(), 0

    def boot(self, key):
        import json

        return json.dumps(
            {"manifest": self.manifest, "sealing_key": None if key is None else key.hex()}
        ).encode()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._writes.close()
        self._thread.join(30)
        assert not self._thread.is_alive()
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def exchange(self, kind, *parts):
        self.pipe.send(kind, *parts)
        while True:
            got, frame = self.pipe.receive()
            self.frames.append(got)
            if got != worker.SAVE:
                return got, frame
            self.state = self.seal(self.saved + 1)
            self.pipe.send(worker.SAVED)

    def seal(self, at):
        self.pipe.send(worker.SEAL, NUMBER.pack(at))
        kind, frame = self.pipe.receive()
        assert kind == worker.BLOB, bytes(frame)
        self.saved = at
        return bytes(frame)

    def provision(self, given):
        """What the worker says to the owner, and what is left for the disk."""
        place = Place("provision", SESSION, 0)
        box = Request.box(Identity.generate(), self.agreement, self.pair.public, given.encode(), place)
        kind, frame = self.exchange(worker.PROVISION, SESSION, box)
        if kind == worker.REFUSED:
            raise SecurityError(bytes(frame).decode())
        (size,) = struct.unpack("<I", frame[:4])
        reply = bytes(frame[4 : 4 + size])
        said = channel.answered(self.signing, self.pair, reply, place._replace(direction="reply"))
        return said.decode(), bytes(frame[4 + size :])

    def ask(self, envelope, number=0, *, session=SESSION, server=SERVER, change=lambda box: box):
        place = Place("request", session, number)
        box = Request.box(server, self.agreement, self.pair.public, envelope, place)
        return self.put(change(box), place)

    def put(self, box, place):
        kind, frame = self.exchange(worker.HANDLE, place.session, NUMBER.pack(place.number), box)
        if kind == worker.REFUSED:
            raise SecurityError(bytes(frame).decode())
        return channel.answered(self.signing, self.pair, bytes(frame), place._replace(direction="reply"))


def client(bundle, name="a", **options):
    return baffle.Client(name, NumpyRuntime(bundle), worker.Rows(*data()), seed=bytes(32), **options)


def asked(bundle, round_=0, model=True, **options):
    runtime, weights = NumpyRuntime(bundle), bundle.weights()
    digest = weights_digest(weights, runtime.layout, runtime.frozen_digest)
    plan = baffle.RoundPlan(round_, seed_from(3), baffle.SteinEstimator(6, 1e-3), digest, 8, **options)
    package = ModelMessage(weights).encode() if model else b""
    return Envelope("answer", plan.encode(), b"", package).encode()


def test_it_answers_as_a_client_without_walls(bundle):
    with Inside(bundle) as inside:
        assert inside.provision(given_by_owner(bundle)) == ("ok", b"")
        alone = Endpoint(client(bundle))
        for number, round_ in enumerate((0, 1, 5)):
            envelope = asked(bundle, round_)
            reply = inside.ask(envelope, number)
            assert Reply.decode(reply).status == "answer"
            assert reply == alone.handle(envelope)
        for at, wrong in enumerate((b"", b"no envelope", Envelope("answer", b"x").encode())):
            assert Reply.decode(inside.ask(wrong, 10 + at)).status == "malformed"
        assert worker.SAVE not in inside.frames


def test_modes_come_from_what_was_measured(bundle):
    with Inside(bundle, runtime={"mode": "kernel", "storage": "int8"}) as inside:
        inside.provision(given_by_owner(bundle))
        runtime = inside.worker._endpoint.client.runtime
        assert runtime.mode == "kernel" if hasattr(runtime, "mode") else True
        expected = Endpoint(
            baffle.Client(
                "a",
                NumpyRuntime(bundle, mode="kernel", storage="int8"),
                worker.Rows(*data()),
                seed=bytes(32),
            )
        ).handle(asked(bundle))
        assert inside.ask(asked(bundle)) == expected != Endpoint(client(bundle)).handle(asked(bundle))


def test_a_model_is_measured_where_it_was_decrypted(bundle):
    """No copy of the weights: they are a part of the frame, whatever the lengths before them."""
    for extra in range(9):
        envelope = Envelope("answer", b"p" * extra, b"", ModelMessage(bundle.weights()).encode()).encode()
        frame = np.zeros(100 + len(envelope), np.uint8)
        frame[100:] = np.frombuffer(envelope, np.uint8)
        laid = worker._laid_out(frame.data[100:])
        assert bytes(laid) == envelope
        found = ModelMessage.decode(Envelope.decode(laid).package).weights
        np.testing.assert_array_equal(found, bundle.weights())
        assert np.shares_memory(found, frame)


def test_requests_that_are_not_the_servers_are_refused(bundle):
    with Inside(bundle) as inside:
        with pytest.raises(SecurityError, match="has not provisioned it"):
            inside.ask(asked(bundle))
        inside.provision(given_by_owner(bundle))
        with pytest.raises(SecurityError, match="not signed"):
            inside.ask(asked(bundle), server=Identity.generate())
        for change in (lambda b: b[:-1], lambda b: b[:20], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:]):
            with pytest.raises(SecurityError):
                inside.ask(asked(bundle), change=change)
        place = Place("request", SESSION, 3)
        box = Request.box(SERVER, inside.agreement, inside.pair.public, asked(bundle), place)
        for elsewhere in (place._replace(number=4), place._replace(session=bytes(32))):
            with pytest.raises(SecurityError, match="did not seal for this place"):
                inside.put(box, elsewhere)
        assert Reply.decode(inside.put(box, place)).status == "answer"  # none of these used its number up
        with pytest.raises(SecurityError, match="replayed"):
            inside.put(box, place)
        with pytest.raises(SecurityError, match="replayed"):
            inside.ask(asked(bundle), 2)
        assert Reply.decode(inside.ask(asked(bundle), 4)).status == "answer"
        assert Reply.decode(inside.ask(asked(bundle), 0, session=bytes(32))).status == "answer"
        assert inside.exchange(worker.BOOT, inside.boot(None))[0] == worker.REFUSED  # no other manifest
        assert bytes(inside.exchange(worker.KEYS)[1]) == inside.agreement + inside.signing
        for kind in (worker.HANDLE, worker.PROVISION, worker.RESUME, worker.SEAL):
            for size in (0, 1, 31, 39, 40, 100):
                assert inside.exchange(kind, bytes(size))[0] == worker.REFUSED
        kind, frame = inside.exchange(99, b"")
        assert (kind, bytes(frame)) == (worker.REFUSED, b"a frame of the unknown kind 99")


def test_provisions_that_are_refused(bundle):
    good = given_by_owner(bundle)
    files = dict(good.files)
    other = files | {"bundle.json": bytes(files["bundle.json"]).replace(b"two-layers", b"two-liars!")}
    rehashed = dict(good.hashes) | {"bundle.json": sha256(other["bundle.json"]).hexdigest()}
    wrong = {
        "is not the one that its hash names": good._replace(files=other),
        "another bundle than the one": good._replace(files=other, hashes=rehashed),
        "20 inputs, 19 targets": good._replace(targets=good.targets[1:]),
        "has no samples": good._replace(inputs=good.inputs[:0], targets=good.targets[:0]),
    }
    with Inside(bundle) as inside:
        for text, given_ in wrong.items():
            said, left = inside.provision(given_)
            assert said.startswith("refused: ")
            assert text in said
            assert left == b""
        kind, frame = inside.exchange(worker.PROVISION, SESSION, bytes(500))
        assert kind == worker.REFUSED
        assert b"small order" in bytes(frame)
        assert inside.provision(good)[0] == "ok"
        with pytest.raises(SecurityError, match="it takes no other"):
            inside.provision(good)


# -- its state --------------------------------------------------------------------------------------------

KEY = bytes(range(1, 33))


def sealed_round(bundle, keys, ask, session_rounds=8):
    """One secure round of three clients: ``ask`` stands for "a", the others are here."""
    roster = baffle.Roster({name: key.public for name, key in keys.items()})
    terms = baffle.Terms(baffle.FixedPoint(), 3, 100)
    protection = Protection(0.0, 0.3, 2, rounds=session_rounds)
    summed = SecureSum(roster, terms, protection)
    others = {
        name: Endpoint(
            client(bundle, name, seal=baffle.SecureSeal(name, keys[name], roster, protection.policy))
        )
        for name in "bc"
    }

    def of(round_):
        envelope = Envelope.decode(asked(bundle, round_))
        tally = summed.open(baffle.RoundPlan.decode(envelope.plan), "abc")
        for stage in tally.stages():
            for name in sorted(stage.requests):
                package = envelope.package if stage.name == "answer" else b""
                each = Envelope(stage.name, envelope.plan, stage.requests[name], package).encode()
                reply = Reply.decode(ask(each) if name == "a" else others[name].handle(each))
                if reply.status != "answer":
                    raise SecurityError(reply.text)
                tally.add(name, reply.body)
        return tally.close()

    return of


def secret(bundle, keys):
    settings_ = worker.seal_settings(keys["a"], {n: k.public for n, k in keys.items()}, Policy(2, 0.0))
    return given_by_owner(bundle, seal=settings_)


def numbered(inside):
    count = iter(range(10**6))
    return lambda envelope: inside.ask(envelope, next(count))


@pytest.fixture
def keys():
    return {name: Identity.generate() for name in "abc"}


def test_a_secure_answer_leaves_after_its_line_is_kept(bundle, keys):
    with Inside(bundle, key=KEY) as inside:
        assert inside.provision(secret(bundle, keys))[0] == "ok"
        inside.seal(2)
        total = sealed_round(bundle, keys, numbered(inside))(0)
        assert inside.frames.count(worker.SAVE) == 1
        at = inside.frames.index(worker.SAVE)
        assert inside.frames[at + 1] == worker.DONE
        assert sealed_at(inside.state) == 3
        plain = [Reply.decode(Endpoint(client(bundle, name)).handle(asked(bundle))).body for name in "abc"]
        slopes = [baffle.RoundResult.decode(body).values.astype(np.float64) for body in plain]
        np.testing.assert_allclose(total.values, np.mean(slopes, axis=0), rtol=0, atol=2**-32)


def test_a_worker_goes_on_where_another_ended_and_remembers(bundle, keys):
    with Inside(bundle, key=KEY) as inside:
        _, stored = inside.provision(secret(bundle, keys))
        old = inside.seal(2)
        sealed_round(bundle, keys, numbered(inside))(4)
        state = inside.state
    for view in (stored, state):  # nothing of it is to be seen on the disk
        assert keys["a"].to_bytes() not in view
        assert data()[0].tobytes()[:16] not in view

    def resume(blob, counter, at, stored_=stored, key=KEY):
        inside = Inside(bundle, key=key)
        kind, frame = inside.exchange(
            worker.RESUME, struct.pack("<QQI", counter, at, len(blob)), blob, stored_
        )
        if kind == worker.REFUSED:
            inside.__exit__()
            raise SecurityError(bytes(frame).decode())
        return inside, bytes(frame)

    inside, blob = resume(state, 3, 5)
    with inside:
        assert sealed_at(blob) == 5
        with pytest.raises(SecurityError, match="round 4 was asked for again"):
            sealed_round(bundle, keys, numbered(inside))(4)
    inside, _ = resume(state, 3, 5)
    with inside:
        sealed_round(bundle, keys, numbered(inside))(5)
    wrong = {
        "rolled back": (old, 3, 5),
        "was put back": (state, 0, 2),
        "not sealed by this worker": (state[:-1] + bytes([state[-1] ^ 1]), 3, 5),
        "not the one that the state belongs to": (state, 3, 5, stored[:-1] + bytes([stored[-1] ^ 1])),
    }
    for text, arguments in wrong.items():
        with pytest.raises(SecurityError, match=text):
            resume(*arguments)
    with pytest.raises(SecurityError, match="not sealed by this worker"):
        resume(state, 3, 5, key=bytes(32))


def test_without_a_state_nothing_is_sealed(bundle, keys):
    with Inside(bundle) as inside:
        inside.provision(secret(bundle, keys))
        kind, frame = inside.exchange(worker.SEAL, NUMBER.pack(1))
        assert (kind, bytes(frame)) == (worker.REFUSED, b"no state is kept for this worker")
        kind, frame = inside.exchange(worker.RESUME, bytes(40))
        assert kind == worker.REFUSED


def test_the_rehearsal_runs():
    worker.rehearse()
