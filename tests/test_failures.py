"""What goes wrong between a server and real devices: no wrong sum, a named reason, and on it goes.

Devices are processes (``tests/fleet.py``). Every sum that came out is compared, to the bit, with what the
clients in it answer when they are asked alone, in this process. Secure sums at every stage: ``test_kill.py``.
"""

import contextlib
import itertools
import random
import socket
import struct

import numpy as np
import pytest

import baffle
from baffle import device
from baffle.downlink import Snapshot, Steps, Update
from baffle.endpoint import Endpoint
from baffle.exchange import Envelope, Reply
from baffle.optimizers import Portable
from baffle.plan import RoundResult
from baffle.secagg.primitives import Identity, hash_of
from baffle.secagg.session import Policy, Roster
from baffle.secure import Protection, SecureSeal, SecureSum
from tests.fleet import (
    Device,
    Fleet,
    Liar,
    LinearRegression,
    a_round,
    assert_sum_of,
    client,
    framed,
    lying,
)

NAMES = [f"client-{i}" for i in range(6)]
VICTIM = "client-2"
OTHERS = [name for name in NAMES if name != VICTIM]
K, LEAST = 8, 3
SHORT = 2.0  # seconds: a deadline that somebody misses


@pytest.fixture(scope="module")
def open_fleet():
    with Fleet(NAMES) as devices:
        yield devices


@pytest.fixture(scope="module")
def sealed_fleet():
    with Fleet(NAMES, least=LEAST) as devices:
        yield devices


def terms():
    return baffle.Terms(baffle.FixedPoint(64, 24, 1024.0), len(NAMES), 30)


def server_of(aggregator=None, settings=None, seed=1, **options):
    estimator = baffle.SteinEstimator(K, 1e-4, "central")
    runtime = LinearRegression(**(settings or {}))
    return baffle.Server(runtime, estimator, seed=seed, batch_size=4, aggregator=aggregator, **options)


class World:
    """A server, its fleet, and the terms of its sums."""

    def __init__(self, kind, fleet, job):
        self.kind, self.fleet = kind, fleet.ready()
        self.terms = None if kind == "plain" else terms()
        aggregator = None
        if kind == "ring":
            aggregator = baffle.IntegerSum(self.terms)
        if kind == "secure":
            protection = Protection(0.0, 0.17, LEAST, rounds=2)
            aggregator = SecureSum(fleet.roster, self.terms, protection, job=job)
        self.server = server_of(aggregator, seed=job)

    def round(self, **options):
        return a_round(self.server, self.fleet, **options)

    def assert_sum_of(self, out, names):
        assert_sum_of(out, names, self.terms)
        reasons = [d for d in out.record.dropouts if d.client not in out.answered]
        assert len(reasons) == len({d.client for d in reasons}) == out.record.dropped

    def assert_goes_on(self, names=NAMES):
        """Those that are there are in a sum, at the latest when keys are agreed on anew."""
        for _ in range(3):
            out = self.round()
            if out.answered == names:
                return self.assert_sum_of(out, names)
            assert self.kind == "secure"
        raise AssertionError(out.record.dropouts)


@pytest.fixture(params=["plain", "ring", "secure"])
def world(request, open_fleet, sealed_fleet):
    fleet = sealed_fleet if request.param == "secure" else open_fleet
    return World(request.param, fleet, hash_of(request.node.name.encode()))


@pytest.fixture(params=["plain", "ring"])
def in_the_clear(request, open_fleet):
    return World(request.param, open_fleet, hash_of(request.node.name.encode()))


@pytest.fixture
def plain(request, open_fleet):
    return World("plain", open_fleet, hash_of(request.node.name.encode()))


@pytest.fixture
def secure(request, sealed_fleet):
    return World("secure", sealed_fleet, hash_of(request.node.name.encode()))


# -- a client dies -----------------------------------------------------------------------------------------


DYING = [("plain", "before"), ("ring", "measuring"), ("plain", "after")]


@pytest.mark.parametrize(("kind", "moment"), DYING)
def test_a_client_that_dies_is_left_out_and_taken_back(open_fleet, request, kind, moment):
    world = World(kind, open_fleet, hash_of(request.node.name.encode()))
    world.fleet[VICTIM].at("answer", moment, Device.kill)
    first = world.round()
    assert not world.fleet[VICTIM].alive
    world.assert_sum_of(first, OTHERS)
    gone = first.dropout(VICTIM)
    assert (gone.stage, gone.reason) == ("answer", "gone")

    second = world.round()  # nobody listens where its socket was left
    world.assert_sum_of(second, OTHERS)
    assert second.dropout(VICTIM).reason == "gone"

    world.fleet[VICTIM].start()
    third = world.round()
    world.assert_sum_of(third, NAMES)
    assert not third.record.dropouts


def test_a_client_that_dies_after_its_answer_has_arrived_counts(in_the_clear):
    in_the_clear.fleet[VICTIM].at("answer", "later", Device.kill)
    in_the_clear.assert_sum_of(in_the_clear.round(), NAMES)
    in_the_clear.assert_sum_of(in_the_clear.round(), OTHERS)


def test_a_client_that_starts_again_within_the_round_is_left_out_of_it_alone(in_the_clear):
    def restart(victim):
        victim.kill()
        victim.start()

    in_the_clear.fleet[VICTIM].at("answer", "measuring", restart)
    first = in_the_clear.round()
    in_the_clear.assert_sum_of(first, OTHERS)
    assert first.dropout(VICTIM).reason == "gone"
    in_the_clear.fleet[VICTIM].there()
    in_the_clear.assert_sum_of(in_the_clear.round(), NAMES)


@pytest.mark.parametrize("world", ["plain", "secure"], indirect=True)
def test_all_clients_die_and_come_back(world):
    world.round()
    before = world.server.weights
    for name in NAMES:
        world.fleet[name].at("answer", "measuring", Device.kill)
    lost = world.round()
    assert lost.record.total is None
    assert {(d.client, d.reason) for d in lost.record.dropouts} == {(name, "gone") for name in NAMES}
    assert np.array_equal(world.server.weights, before)
    assert world.server.round == 2
    world.fleet.ready()
    world.assert_goes_on()


def test_nobody_is_there(plain):
    paths = [each.listen for each in plain.fleet.values()]
    for path in paths:
        path.rename(path.with_suffix(".away"))
    plain.fleet.driver = device.Sockets(plain.fleet.folder, patience=0.0)
    before = plain.server.weights
    out = plain.round()
    assert "no client is there" in out.record.aborted
    assert [e["event"] for e in out.events] == ["round-aborted"]
    assert np.array_equal(plain.server.weights, before)
    plain.fleet.driver = device.Sockets(plain.fleet.folder)
    for path in paths:
        path.with_suffix(".away").rename(path)
    plain.assert_goes_on()


def test_too_few_are_there_for_a_secure_sum(secure):
    """Not those that are gone, whose sockets are left behind: those that ended as one should."""
    ended = NAMES[2:]
    paths = [secure.fleet[name].listen for name in ended]
    for path in paths:
        path.rename(path.with_suffix(".away"))
    out = secure.round()
    assert "2 clients are there" in out.record.aborted
    for path in paths:
        path.with_suffix(".away").rename(path)
    secure.assert_goes_on()


# -- a client is slow --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "moment"), DYING)
def test_what_comes_after_the_deadline_counts_nowhere(open_fleet, request, kind, moment):
    world = World(kind, open_fleet, hash_of(request.node.name.encode()))
    world.fleet[VICTIM].at("answer", moment, Device.stop)
    first = world.round(deadline=SHORT)
    world.assert_sum_of(first, OTHERS)
    late = first.dropout(VICTIM)
    assert (late.stage, late.reason) == ("answer", "late")
    assert f"within {SHORT:g} s" in late.text
    world.fleet[VICTIM].go()  # what it says now, nobody hears
    world.assert_sum_of(world.round(), NAMES)


def test_a_device_that_was_held_up_answers_no_round_that_has_ended(secure):
    """Seen in its ledger: what it was asked meanwhile, it would have had to write down."""
    secure.assert_goes_on()
    victim = secure.fleet[VICTIM]
    ledger = secure.fleet.folder / f"{VICTIM}.ledger"
    written = ledger.read_text().count("\n")
    victim.stop()
    out = secure.round(deadline=SHORT)
    secure.assert_sum_of(out, OTHERS)
    assert out.dropout(VICTIM).reason == "late"
    victim.go()
    secure.assert_goes_on()
    assert ledger.read_text().count("\n") == written + 1


WIDE = {"shapes": ((5,), (), (100_000,)), "names": ("weight", "bias", "more")}


def test_a_device_that_does_not_even_listen_ends_with_the_deadline():
    """The model is more than a socket takes without a reader."""
    with Fleet(NAMES[:2], model=WIDE) as fleet:
        server = server_of(settings=WIDE)
        fleet["client-1"].stop()
        out = a_round(server, fleet, deadline=SHORT)
        assert out.dropout("client-1").reason == "late"
        assert_sum_of(out, ["client-0"], settings=WIDE)
        fleet["client-1"].go()
        assert_sum_of(a_round(server, fleet), NAMES[:2], settings=WIDE)


def test_who_drips_bytes_does_not_hold_the_round_up(plain):
    """One byte each time somebody would wait for it: as many as there are, if it is let."""
    said, dripped = [], 0

    def drip():
        nonlocal dripped
        said.append(struct.pack("<Q", 1 << 30))
        yield said[0]
        while dripped < 1_000_000:
            dripped += 1
            yield b"x"

    with lying(plain.fleet, VICTIM, lambda envelope, forward: drip()):
        out = plain.round(deadline=SHORT)
    plain.assert_sum_of(out, OTHERS)
    assert out.dropout(VICTIM).reason == "late"
    assert 0 < dripped < 1_000_000


def test_a_deadline_holds_whatever_drips(monkeypatch):
    """The same without a clock: a byte is always there, and a second passes with each."""
    now = itertools.count()
    monkeypatch.setattr(device.time, "monotonic", lambda: float(next(now)))
    read = []

    class Dripping:
        def settimeout(self, seconds):
            pass

        def recv(self, most):
            assert len(read) < 100
            read.append(most)
            return b"\x01"

    with pytest.raises(TimeoutError):
        list(device._parts(Dripping(), 1000, 20.0))
    assert 1 <= len(read) <= 20


# -- other weights -----------------------------------------------------------------------------------------

LONG = {"shapes": ((5,), (), (2000,)), "names": ("weight", "bias", "more")}
FEW = NAMES[:4]


@pytest.fixture(scope="module")
def long_fleet():
    with Fleet(FEW, model=LONG) as devices:
        yield devices


class Weights:
    """A job whose clients keep what they hold, by a downlink."""

    def __init__(self, fleet, downlink):
        self.fleet, self.downlink = fleet, downlink
        fleet.ready()
        for each in fleet.values():
            each.at("answer", "forgotten", lambda device: None)
        portable = {"optimizer": lambda p: Portable(p, "adam", lr=0.01)} if downlink == "scalars" else {}
        self.server = server_of(settings=LONG, downlink=downlink, **portable)

    def round(self, names=FEW, **options):
        """The next round, in whose sum these are."""
        out = a_round(self.server, self.fleet, **options)
        assert_sum_of(out, names, settings=LONG)
        return out

    def packages(self, out, name=VICTIM):
        """The kinds of what a client was sent in a round."""
        return [each.envelope.package[5] if each.envelope.package else None for each in out.seen_of(name)]


def caught_up(out):
    return [event["client"] for event in out.events if event["event"] == "catch-up"]


@pytest.fixture(params=["update", "scalars"])
def weights(request, long_fleet):
    return Weights(long_fleet, request.param)


@pytest.mark.parametrize("downlink", ["model", "float16", "update", "scalars"])
def test_a_client_of_another_seed_asks_for_the_model(long_fleet, downlink):
    w = Weights(long_fleet, downlink)
    long_fleet[VICTIM].kill()
    long_fleet[VICTIM].disarm()
    long_fleet[VICTIM].start(model=LONG | {"initial": 0.75})
    first = w.round()
    whole = downlink in ("model", "float16")
    assert caught_up(first) == ([] if whole else [VICTIM])
    assert w.packages(first)[1:] == ([] if whole else [Snapshot.KIND])
    second = w.round()
    assert caught_up(second) == []
    assert w.packages(second) == w.packages(second, "client-0")  # it is one of them now


def test_a_bit_that_turns_over_in_the_memory_of_a_client_is_found(weights):
    for _ in range(2):
        weights.round()
    weights.fleet[VICTIM].at("answer", "flipped", lambda victim: None)
    out = weights.round()
    assert caught_up(out) == [VICTIM]
    assert weights.packages(out)[1:] == [Snapshot.KIND]
    assert caught_up(weights.round()) == []


def test_a_bit_that_turns_over_in_what_the_rule_remembers_is_found(long_fleet):
    w = Weights(long_fleet, "scalars")
    for _ in range(2):
        w.round()
    long_fleet[VICTIM].at("answer", "remembered", lambda victim: None)
    out = w.round()
    assert caught_up(out) == [VICTIM]
    assert w.packages(out) == [Steps.KIND, Snapshot.KIND]  # its weights were right, what it repeats is not
    for _ in range(2):
        assert caught_up(w.round()) == []


def test_a_client_that_starts_again_has_lost_what_it_held(weights):
    for _ in range(3):
        weights.round()
    weights.fleet[VICTIM].at("answer", "measuring", Device.kill)
    lost = weights.round([name for name in FEW if name != VICTIM])
    assert lost.dropout(VICTIM).reason == "gone"
    weights.fleet[VICTIM].start()
    back = weights.round()
    assert caught_up(back) == [VICTIM] * (weights.downlink == "scalars")  # else it is known to lack the last
    assert weights.packages(back)[-1] == (Steps.KIND if weights.downlink == "scalars" else Snapshot.KIND)
    assert caught_up(weights.round()) == []


def test_a_client_that_dies_while_it_catches_up(weights):
    weights.round()
    victim = weights.fleet[VICTIM]
    victim.at("answer", "flipped", lambda victim: None)
    victim.at("answer", "later", lambda victim: victim.at("answer", "measuring", Device.kill))
    out = weights.round([name for name in FEW if name != VICTIM])
    assert caught_up(out) == [VICTIM]
    assert out.dropout(VICTIM).reason == "gone"
    victim.start()
    weights.round()


def test_a_client_whose_answer_was_late_holds_more_than_the_server_knows(weights):
    weights.round()
    weights.fleet[VICTIM].at("answer", "after", Device.stop)
    out = weights.round([name for name in FEW if name != VICTIM], deadline=SHORT)
    assert out.dropout(VICTIM).reason == "late"
    weights.fleet[VICTIM].go()
    assert caught_up(weights.round()) == []


def test_a_late_joiner_catches_up_and_proves_it(weights):
    weights.fleet[VICTIM].kill()
    weights.fleet[VICTIM].disarm()
    weights.fleet[VICTIM].listen.unlink()
    for _ in range(4):
        weights.round([name for name in FEW if name != VICTIM])
    weights.fleet[VICTIM].start()
    out = weights.round()
    assert caught_up(out) == []
    (first,) = out.seen_of(VICTIM)
    if weights.downlink == "scalars":
        steps = Steps.decode(first.envelope.package)
        assert [step.plan.round for step in steps.steps] == [0, 1, 2, 3]
        assert len(first.envelope.package) < 4 * len(weights.server.weights) / 4
    else:
        assert Snapshot.decode(first.envelope.package).round == 4
    # Its answer counts because its digest is the plan's; from here on it is sent what the others are.
    out = weights.round()
    assert weights.packages(out) == weights.packages(out, "client-0")
    assert weights.packages(out) == [Steps.KIND if weights.downlink == "scalars" else Update.KIND]


def test_a_client_of_another_model_is_left_out_and_the_rest_go_on(weights):
    victim, others = weights.fleet[VICTIM], [name for name in FEW if name != VICTIM]
    victim.kill()
    victim.disarm()
    victim.start(model=LONG | {"frozen": "11" * 32})
    for _ in range(2):
        out = weights.round(others)
        assert out.dropout(VICTIM).reason == "digest"
    victim.kill()
    victim.start()
    weights.round()


CLAIMS = {
    "the-plan's-own": lambda plan: (plan.round, plan.weights_digest),
    "of-the-last-round": lambda plan: (plan.round - 1, plan.weights_digest),
    "of-the-future": lambda plan: (1 << 63, bytes(32)),
    "of-the-past": lambda plan: (0, bytes(32)),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_who_says_forever_that_it_holds_other_weights(weights, claim):
    others = [name for name in FEW if name != VICTIM]

    def lie(envelope, forward):
        e = Envelope.decode(envelope)
        held = struct.pack("<Q32s", *CLAIMS[claim](baffle.RoundPlan.decode(e.plan)))
        return framed(Reply(e.ticket(VICTIM), "digest", held).encode())

    weights.round()
    with lying(weights.fleet, VICTIM, lie):
        for _ in range(2):
            out = weights.round(others)
            assert out.dropout(VICTIM).reason == "digest"
            assert len(out.seen_of(VICTIM)) <= 2  # it is not helped without end
    assert caught_up(weights.round()) in ([], [VICTIM])


# -- messages that are not as they were sent ---------------------------------------------------------------


def with_reply(change):
    """A liar that changes the true reply: its bytes to bytes."""
    return lambda envelope, forward: framed(change(forward(envelope)))


def with_body(change):
    """A liar that changes what the true reply holds, under its true ticket."""

    def changed(data):
        reply = Reply.decode(data)
        return Reply(reply.ticket, "answer", change(reply.body)).encode()

    return with_reply(changed)


def says(status, body=b""):
    return lambda envelope, forward: framed(
        Reply(Envelope.decode(envelope).ticket(VICTIM), status, body).encode()
    )


def put(data, at, byte):
    return data[:at] + bytes([byte]) + data[at + 1 :]


LIES = {
    "closed": (lambda envelope, forward: b"", "gone"),
    "a-length-alone": (lambda envelope, forward: struct.pack("<Q", 100), "gone"),
    "a-frame-cut-short": (lambda envelope, forward: framed(forward(envelope))[:-3], "gone"),
    "a-length-that-cannot-be": (lambda envelope, forward: struct.pack("<Q", 1 << 60), "malformed"),
    "no-bytes": (lambda envelope, forward: framed(b""), "malformed"),
    "zeros": (lambda envelope, forward: framed(bytes(500)), "malformed"),
    "its-own-envelope": (lambda envelope, forward: framed(envelope), "malformed"),
    "cut-short": (with_reply(lambda data: data[:-1]), "malformed"),
    "cut-in-the-ticket": (with_reply(lambda data: data[:15]), "malformed"),
    "too-long": (with_reply(lambda data: data + b"x"), "malformed"),
    "another-version": (with_reply(lambda data: put(data, 4, 2)), "malformed"),
    "another-kind": (with_reply(lambda data: put(data, 5, 3)), "malformed"),
    "a-status-that-is-none": (with_reply(lambda data: put(data, 22, 9)), "malformed"),
    "another-ticket": (with_reply(lambda data: put(data, 6, data[6] ^ 1)), "replayed"),
    "answer-cut-short": (with_body(lambda body: body[:-1]), "wrong"),
    "answer-too-long": (with_body(lambda body: body + b"x"), "wrong"),
    "answer-of-another-version": (with_body(lambda body: put(body, 4, 2)), "wrong"),
    "answer-to-another-plan": (with_body(lambda body: put(body, 20, body[20] ^ 1)), "wrong"),
    "no-answer": (says("answer"), "wrong"),
    "holds-other-weights": (says("digest"), "digest"),
    "holds-weights-that-are-none": (says("digest", b"seven77"), "digest"),
    "refuses": (says("refused", b"not today"), "refused"),
    "fails": (says("failed", b"out of battery"), "failed"),
    "says-it-is-malformed": (says("malformed", b"what?"), "malformed"),
    "a-reason-like-a-novel": (says("failed", b"x" * 5000), "malformed"),
    "a-reason-that-paints": (says("failed", b"\x1b[2J\nround 7: all is well \xff"), "failed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_is_none_is_left_out_by_name(in_the_clear, lie):
    tell, reason = LIES[lie]
    with lying(in_the_clear.fleet, VICTIM, tell):
        out = in_the_clear.round()
    in_the_clear.assert_sum_of(out, OTHERS)
    found = out.dropout(VICTIM)
    assert (found.stage, found.reason) == ("answer", reason)
    told = [event["text"] for event in out.events] + [found.text]
    assert all(text.isprintable() for text in told)
    assert len(out.events) == (2 if "holds" in lie else 1)
    in_the_clear.assert_sum_of(in_the_clear.round(), NAMES)


def test_more_slopes_than_were_asked_for(plain):
    def longer(body):
        result = RoundResult.decode(body)
        more = np.append(result.values, np.float32(1e30))
        return RoundResult(result.round, result.plan_digest, result.samples, more).encode()

    with lying(plain.fleet, VICTIM, with_body(longer)):
        out = plain.round()
    plain.assert_sum_of(out, OTHERS)
    assert out.dropout(VICTIM).reason == "wrong"


def test_a_reply_twice_counts_once(in_the_clear):
    with lying(in_the_clear.fleet, VICTIM, lambda envelope, forward: 2 * framed(forward(envelope))):
        in_the_clear.assert_sum_of(in_the_clear.round(), NAMES)


def test_an_envelope_twice_counts_once(in_the_clear):
    def twice(envelope, forward):
        forward(envelope)
        return framed(forward(envelope))

    with lying(in_the_clear.fleet, VICTIM, twice):
        in_the_clear.assert_sum_of(in_the_clear.round(), NAMES)


def test_an_envelope_twice_in_a_secure_sum(secure):
    """A second offer makes other keys than the first reply announced. All else is answered once."""
    refused = []

    def twice(envelope, forward):
        first, second = forward(envelope), Reply.decode(forward(envelope))
        stage = Envelope.decode(envelope).stage
        if stage not in ("advertise", "share"):
            refused.append((stage, second.status))
        return framed(first)

    secure.assert_goes_on()
    with lying(secure.fleet, VICTIM, twice):
        secure.assert_sum_of(secure.round(), NAMES)
        assert refused == [("answer", "refused"), ("unmask", "refused")]
        third = secure.round()
        assert (third.record.stages[0].name, third.dropout(VICTIM).reason) == ("advertise", "refused")
        secure.assert_sum_of(third, OTHERS)
    secure.assert_goes_on()


def test_an_older_reply_is_found(world):
    """In each stage of the next rounds, what was said in the first."""
    replies = {}

    def replay(envelope, forward):
        stage = Envelope.decode(envelope).stage
        if stage not in replies:
            replies[stage] = forward(envelope)
            return framed(replies[stage])
        return framed(replies[stage])

    with lying(world.fleet, VICTIM, replay):
        world.assert_sum_of(world.round(), NAMES)
        for _ in range(2):
            out = world.round()
            world.assert_sum_of(out, OTHERS)
            assert out.dropout(VICTIM).reason == "replayed"
    world.assert_goes_on()


def test_the_reply_of_another_client_is_found(world):
    """The request is the same where sums are in the clear, and so is the other's answer."""
    world.assert_goes_on()
    other = world.fleet["client-1"].listen
    with lying(world.fleet, VICTIM, lambda envelope, forward: framed(device.relay(other, envelope, 30))):
        out = world.round()
        # By secure sums, the other uses its masks up for whichever envelope it sees first.
        if world.kind == "secure" and "client-1" not in out.answered:
            assert "4 of 6 clients answered, 5 are needed" in out.record.aborted
        else:
            world.assert_sum_of(out, OTHERS)
        assert out.dropout(VICTIM).reason == "replayed"
    world.assert_goes_on()


@pytest.mark.parametrize("part", ["head", "all"])
def test_a_bit_that_turns_over_on_the_way_up(world, part):
    """Anywhere in a secure answer; in the clear, where a slope may be any number, in what is around it."""
    rng = random.Random(f"{world.kind} {part}")
    head = 6 + 16 + 1 + 4

    def flip(data):
        end = len(data) if part == "all" and world.kind == "secure" else head
        at = rng.randrange(4 if part == "all" else 0, end)
        return put(data, at, data[at] ^ 1 << rng.randrange(8))

    def only_answers(envelope, forward):
        reply = forward(envelope)
        return framed(flip(reply) if Envelope.decode(envelope).stage == "answer" else reply)

    reasons = set()
    with lying(world.fleet, VICTIM, only_answers):
        for _ in range(12):
            out = world.round()
            world.assert_sum_of(out, OTHERS)
            reasons.add(out.dropout(VICTIM).reason)
    assert reasons & {"malformed", "replayed", "wrong"}
    world.assert_goes_on()


def with_envelope(change):
    return lambda envelope, forward: framed(forward(change(envelope)))


def package_flipped(envelope):
    e = Envelope.decode(envelope)
    return Envelope(e.stage, e.plan, e.request, e.package[:-1] + bytes([e.package[-1] ^ 1])).encode()


LIES_DOWN = {
    "no-bytes": (lambda data: b"", "malformed"),
    "zeros": (lambda data: bytes(100), "malformed"),
    "cut-short": (lambda data: data[:-1], "malformed"),
    "cut-in-the-plan": (lambda data: data[:60], "malformed"),
    "too-long": (lambda data: data + b"x", "malformed"),
    "another-version": (lambda data: put(data, 4, 2), "malformed"),
    "a-plan-of-another-version": (lambda data: put(data, data.index(b"BFFL", 6) + 4, 2), "malformed"),
    "another-stage": (lambda data: data.replace(b"\x06answer", b"\x06unmask", 1), "replayed"),
    "another-round": (lambda data: put(data, data.index(b"BFFL", 6) + 6, 99), "replayed"),
    "weights-with-a-bit-turned-over": (package_flipped, "digest"),
    "weights-cut-short": (
        lambda data: Envelope((e := Envelope.decode(data)).stage, e.plan, e.request, e.package[:-1]).encode(),
        "malformed",
    ),
}


@pytest.mark.parametrize("lie", LIES_DOWN)
def test_an_envelope_that_is_none_is_not_answered(in_the_clear, lie):
    change, reason = LIES_DOWN[lie]
    victim = in_the_clear.fleet[VICTIM]
    with lying(in_the_clear.fleet, VICTIM, with_envelope(change)):
        out = in_the_clear.round()
    in_the_clear.assert_sum_of(out, OTHERS)
    assert out.dropout(VICTIM).reason == reason
    assert victim.alive
    in_the_clear.assert_sum_of(in_the_clear.round(), NAMES)
    assert "Traceback" not in victim.log()


def test_an_older_envelope_is_not_answered_again(world):
    """A device in the clear answers what it is asked, and the ticket says to what; a seal refuses."""
    envelopes, answers = {}, []

    def replay(envelope, forward):
        stage = Envelope.decode(envelope).stage
        reply = forward(envelopes.setdefault(stage, envelope))
        if stage == "answer":
            answers.append(Reply.decode(reply))
        return framed(reply)

    with lying(world.fleet, VICTIM, replay):
        world.assert_sum_of(world.round(), NAMES)
        out = world.round()
        world.assert_sum_of(out, OTHERS)
        assert out.dropout(VICTIM).reason == "replayed"
    if world.kind == "secure":
        assert answers[1].status == "refused"
    world.assert_goes_on()


# -- who is asked, and who answers -------------------------------------------------------------------------


def test_a_stranger_is_not_asked_and_said_once(world):
    asked = []

    def lie(envelope, forward):
        asked.append(envelope)
        return b""

    with Liar(world.fleet.folder / "stranger.sock", lie):
        first, second = (world.round(names=NAMES) for _ in range(2))
        world.assert_sum_of(first, NAMES)
        world.assert_sum_of(second, NAMES)
    assert asked == []
    (event,) = [e for e in first.events if e["event"] == "unknown-client"]
    assert event["client"] == "stranger"


def test_a_device_under_another_clients_name_counts_for_nobody(in_the_clear):
    """Its data are in the sum once, under its own name."""
    victim = in_the_clear.fleet[VICTIM]
    victim.kill()
    victim.start(plays="client-1")
    out = in_the_clear.round()
    in_the_clear.assert_sum_of(out, OTHERS)
    assert out.dropout(VICTIM).reason == "replayed"
    victim.kill()
    in_the_clear.fleet.ready()
    in_the_clear.assert_goes_on()


def test_a_wrong_key_under_a_right_name(secure):
    """The device lies about it: it has the true roster, and signs with another key."""
    identity = Identity.generate()
    keys = dict(zip(secure.fleet.roster.names, secure.fleet.roster.keys, strict=True))
    seal = SecureSeal(VICTIM, identity, Roster(keys | {VICTIM: identity.public}), Policy(LEAST, 0.0))
    seal._session.roster = secure.fleet.roster
    endpoint = Endpoint(client(VICTIM, seal=seal))
    with lying(secure.fleet, VICTIM, lambda envelope, forward: framed(endpoint.handle(envelope))):
        first = secure.round()
        secure.assert_sum_of(first, OTHERS)
        found = first.dropout(VICTIM)
        assert (found.stage, found.reason) == ("advertise", "wrong")
        second = secure.round()  # of the same session, in which it has no part
        secure.assert_sum_of(second, OTHERS)
        assert second.dropout(VICTIM).reason == "unasked"
    secure.assert_goes_on()


def test_a_device_with_a_wrong_key_does_not_start(secure):
    victim = secure.fleet[VICTIM]
    victim.kill()
    victim.start(wait=False, identity=Identity.generate().to_bytes().hex())
    assert victim.process.wait(60) != 0
    assert "the roster pins another key for this name" in victim.log()
    victim.kill()
    secure.fleet.ready()
    secure.assert_goes_on()


def test_two_devices_of_one_name(secure):
    """The second does not start: neither at the first one's socket, nor elsewhere with its ledger."""
    victim, twin = secure.fleet[VICTIM], Device(VICTIM, secure.fleet.folder, {})
    twin._settings = victim._settings
    held = contextlib.ExitStack()
    for stopped in (False, True):
        if stopped:  # and no more connections go to it
            victim.stop()
            waiting = [held.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(100)]
            for each in waiting:
                each.setblocking(False)
                each.connect_ex(str(victim.listen))
        twin.start(wait=False, ledger=str(secure.fleet.folder / "another.ledger"))
        assert twin.process.wait(60) != 0
        assert "another device listens there" in twin.log()
        twin._log.unlink()
        twin.kill()
    twin.start(wait=False, listen=str(secure.fleet.folder / "elsewhere"))
    assert twin.process.wait(60) != 0
    assert "another process uses this ledger" in twin.log()
    twin.kill()
    held.close()
    victim.go()
    secure.assert_goes_on()
