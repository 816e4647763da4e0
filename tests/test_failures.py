"""What goes wrong between a server and real devices: in each case no wrong sum, a named reason, and on it goes.

Devices are processes (``tests/fleet.py``). Every sum that came out is compared, to the bit, with what the
clients in it answer when they are asked alone, in this process. Secure sums at every stage: ``test_kill.py``.
"""

import contextlib
import os
import struct

import numpy as np
import pytest

import baffle
from baffle import device
from baffle.downlink import Snapshot, Steps, Update
from baffle.errors import DataError, DeliveryError
from baffle.exchange import Envelope, Reply
from baffle.plan import RoundPlan, RoundResult
from baffle.secagg.primitives import Identity, hash_of
from baffle.secagg.session import Policy, Roster
from baffle.secure import Protection, SecureSeal, SecureSum
from tests.fleet import (
    Device,
    Fleet,
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


@pytest.mark.parametrize("moment", ["before", "measuring", "after"])
def test_a_client_that_dies_is_left_out_and_taken_back(in_the_clear, moment):
    world = in_the_clear
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
    for each in plain.fleet.values():
        each.kill()
        each.listen.unlink()
    plain.fleet.driver = device.Sockets(plain.fleet.folder, patience=0.0)
    before = plain.server.weights
    out = plain.round()
    assert "no client is there" in out.record.aborted
    assert [e["event"] for e in out.events] == ["round-aborted"]
    assert np.array_equal(plain.server.weights, before)
    plain.fleet.driver = device.Sockets(plain.fleet.folder)
    plain.fleet.ready()
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


@pytest.mark.parametrize("moment", ["before", "measuring", "after"])
def test_what_comes_after_the_deadline_counts_nowhere(in_the_clear, moment):
    world = in_the_clear
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
    for _ in range(2):
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
