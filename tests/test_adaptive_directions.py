"""K that follows what owners allow: the bits of a run with that K, its floor, lies, restarts, replays."""

import logging
import struct

import numpy as np
import pytest

from baffle.aggregation import IntegerSum
from baffle.checkpoint import ScalarLog, load_checkpoint, replay, save_checkpoint
from baffle.client import Client
from baffle.endpoint import Endpoint
from baffle.errors import CheckpointError, ConfigError, LimitError, MessageError
from baffle.estimator import SteinEstimator
from baffle.exchange import LIMITS, Envelope, Reply
from baffle.federation import run
from baffle.fixedpoint import FixedPoint
from baffle.optimizers import Portable
from baffle.plan import LocalSteps
from baffle.secagg.primitives import Identity
from baffle.secagg.session import Roster
from baffle.secure import Protection, SecureSeal, SecureSum
from baffle.server import Server
from baffle.simulation import simulate
from baffle.terms import Terms
from tests.contracts.slope import Points, Slope

K = 12
SIZES = {"anna": 11, "bo": 5, "cleo": 24, "dora": 9}


class AtMost:
    """A guard that allows ``most`` directions, or says what it is told to."""

    def __init__(self, most=None, limit="directions", number=None):
        self.most, self.limit, self.number, self.asked = most, limit, number, []

    def check(self, plan):
        self.asked.append(plan.round)
        if self.most is None or plan.estimator.directions > self.most:
            number = self.most if self.number is None else self.number
            raise LimitError(self.limit, number, "its owner says so")


class Endpoints:
    """A driver that carries bytes to endpoints. ``forge`` writes a reply anew; ``away`` are not there."""

    def __init__(self, clients, guards=None, forge=None):
        guards = guards or {}
        self.endpoints = {c.name: Endpoint(c, guard=guards.get(c.name)) for c in clients}
        self.forge, self.away, self.asked = forge, set(), []

    def names(self):
        return sorted(self.endpoints.keys() - self.away)

    def ask(self, stage, requests, deadline):
        self.asked.append(sorted(requests))
        for name in sorted(requests):
            data = requests[name]
            reply = self.endpoints[name].handle(data)
            if self.forge:
                reply = self.forge(name, Envelope.decode(data).ticket(name), reply)
            yield name, reply


def clients(sizes=SIZES, seals=None):
    shared = Slope()
    return [
        Client(name, shared, Points(count, seed), seed=1, seal=(seals or {}).get(name))
        for seed, (name, count) in enumerate(sizes.items())
    ]


def server(directions=K, **options):
    return Server(
        Slope(), SteinEstimator(directions, 1e-3), **{"seed": 2, "batch_size": 4, "ema": 0.5, **options}
    )


def reasons(record):
    return [(d.client, d.stage, d.reason) for d in record.dropouts]


def Ks(records):
    return [record.plan.estimator.directions for record in records]


# -- what is said ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_is_said_and_read_in_one_line(limit):
    number = None if limit == "when" else 10**18 - 1
    reply = Reply.limited(bytes(16), LimitError(limit, number, "the owner's line\nbreaks: aé"))
    sign = {"cohort": f">={number}", "when": ""}.get(limit, f"<={number}")
    assert reply.body == f"{limit}{sign}: the owner's line breaks: aé".encode()
    assert reply.encode()[22:23] == b"\x05"
    found = Reply.decode(reply.encode())
    assert (found.limit.limit, found.limit.most, str(found.limit)) == (
        limit,
        number,
        "the owner's line breaks: aé",
    )


NONSENSE = [
    b"",
    b"directions<=0: no",
    b"directions<=07: no",
    b"directions<=-3: no",
    b"directions<=1000000000000000000: no",
    b"directions<=1e3: no",
    b"directions<= 3: no",
    b"directions>=3: no",
    b"directions: no",
    b"cohort<=3: no",
    b"when<=3: no",
    b"when",
    b"watts<=3: no",
    b"directions<=3",
    b"\xff\xfe",
    "directions<=٣: no".encode(),
]


@pytest.mark.parametrize("body", NONSENSE, ids=repr)
def test_a_limit_that_is_none_is_malformed(body):
    data = bytes(6) + bytes(16) + b"\x05" + struct.pack("<I", len(body)) + body
    with pytest.raises(MessageError):
        Reply.decode(b"BFFL\x01\x0c" + data[6:])


@pytest.mark.parametrize("error", [LimitError("directions", 0, ""), LimitError("watts", 3, "")])
def test_a_limit_that_cannot_be_cannot_be_said(error):
    with pytest.raises(ConfigError, match="a limit that cannot be"):
        Reply.limited(bytes(16), error)


def test_a_guard_that_says_nonsense_does_not_end_the_device():
    endpoint = Endpoint(clients()[0], guard=AtMost(3, number=0))
    found = server()
    envelope = Envelope("answer", found.plan().encode(), b"", found.model().encode())
    reply = Reply.decode(endpoint.handle(envelope.encode()))
    assert (reply.status, reply.ticket) == ("failed", envelope.ticket("anna"))


# -- K of a round ------------------------------------------------------------------------------------------


def test_a_client_that_can_do_less_lowers_K_of_the_rounds_after():
    """By hand: a round of K without it, then a job of the smaller K with it."""
    driver = Endpoints(clients(), {"bo": AtMost(5)})
    found = server(least_directions=4)
    records = list(run(found, driver, rounds=4))
    assert reasons(records[0]) == [("bo", "answer", "limited")]
    assert records[0].dropouts[0].text == "directions<=5: its owner says so"
    assert Ks(records) == [K, 5, 5, 5]
    assert [r.dropped for r in records] == [1, 0, 0, 0]

    first = server()
    list(simulate(first, [c for c in clients() if c.name != "bo"], rounds=1))
    twin = server(5)
    twin.load_state(*first.state())
    members = clients()
    list(simulate(twin, members, rounds=4))
    assert np.array_equal(found.weights, twin.weights)
    assert np.array_equal(found.ema_weights, twin.ema_weights)


def test_K_is_what_the_asked_can_do_and_rises_again_without_them():
    driver = Endpoints(clients(), {"bo": AtMost(5), "cleo": AtMost(9)})
    found = server(least_directions=2)
    it = run(found, driver, rounds=5)
    assert Ks([next(it), next(it)]) == [K, 5]
    driver.away = {"bo"}
    assert Ks([next(it)]) == [9]
    driver.away = {"bo", "cleo"}
    assert Ks([next(it)]) == [K]
    driver.away = set()
    assert Ks([next(it)]) == [5]


def test_without_a_least_K_stays_and_who_cannot_is_not_asked_again():
    guard = AtMost(5)
    driver = Endpoints(clients(), {"bo": guard})
    records = list(run(server(), driver, rounds=3))
    assert Ks(records) == [K] * 3
    assert guard.asked == [0]
    assert driver.asked == [sorted(SIZES), *[sorted(SIZES.keys() - {"bo"})] * 2]
    assert [r.participants for r in records] == [4, 3, 3]


def test_a_client_cannot_make_others_fall_below_the_least():
    driver = Endpoints(clients(), {"bo": AtMost(1), "cleo": AtMost(7)})
    records = list(run(server(least_directions=6), driver, rounds=4))
    assert Ks(records) == [K, 7, 7, 7]
    assert driver.asked[1:] == [["anna", "cleo", "dora"]] * 3


def test_a_server_falls_to_the_least_and_no_further():
    found = server(least_directions=6)
    found.limited("bo", 1)
    assert found.adapt(["anna", "bo"]) == 6
    assert found.able(["anna", "bo"]) == ["anna"]
    found.limited("bo", 8)  # the last word counts
    assert found.able(["anna", "bo"]) == ["anna", "bo"]
    assert found.adapt(["anna", "bo"]) == 8


def test_everybody_may_be_limited_at_first():
    found = server(least_directions=1)
    records = list(run(found, Endpoints(clients(), dict.fromkeys(SIZES, AtMost(3))), rounds=2))
    assert Ks(records) == [K, 3]
    assert [r.total is None for r in records] == [True, False]


def test_nobody_who_can_is_left():
    records = list(run(server(), Endpoints(clients(), dict.fromkeys(SIZES, AtMost(3))), rounds=3))
    assert [r.participants for r in records] == [4, 0, 0]
    assert "no client is there that could be asked" in records[1].aborted


@pytest.mark.parametrize(("limit", "number"), [("memory", 5), ("seconds", 20), ("days", 1)])
def test_who_has_no_more_to_give_is_not_asked_again(limit, number):
    guard = AtMost(None, limit, number)
    records = list(run(server(least_directions=2), Endpoints(clients(), {"bo": guard}), rounds=3))
    assert guard.asked == [0]
    assert Ks(records) == [K] * 3
    assert reasons(records[0]) == [("bo", "answer", "limited")]


@pytest.mark.parametrize(("limit", "number"), [("when", None), ("cohort", 9)])
def test_what_passes_is_asked_again(limit, number):
    guard = AtMost(None, limit, number)
    records = list(run(server(least_directions=2), Endpoints(clients(), {"bo": guard}), rounds=3))
    assert guard.asked == [0, 1, 2]
    assert all(reasons(r) == [("bo", "answer", "limited")] for r in records)


def test_the_reason_is_in_the_log_and_a_change_of_K_once(caplog):
    with caplog.at_level(logging.INFO, logger="baffle"):
        list(run(server(least_directions=4), Endpoints(clients(), {"bo": AtMost(5)}), rounds=3))
    said = [(r.event, r.getMessage(), r.fields) for r in caplog.records]
    assert [event for event, _, _ in said] == ["dropout", "directions"]
    assert said[0][1] == "directions<=5: its owner says so"
    assert (said[0][2]["reason"], said[0][2]["client"]) == ("limited", "bo")
    assert said[1][2] == {"round": 1, "directions": 5}


# -- lies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [*NONSENSE[:6], b"directions<=12: no", b"directions<=13: no"], ids=repr)
def test_a_lie_is_malformed_and_changes_nothing(body):
    def forge(name, ticket, reply):
        return Reply(ticket, "limited", body).encode() if name == "bo" else reply

    driver = Endpoints(clients(), forge=forge)
    records = list(run(server(least_directions=1), driver, rounds=2))
    assert Ks(records) == [K, K]
    assert all(reasons(r) == [("bo", "answer", "malformed")] for r in records)


def test_a_limit_of_another_client_or_an_older_envelope_counts_for_nothing():
    def forge(name, ticket, reply):
        return Reply(bytes(16), "limited", b"directions<=2: no").encode() if name == "bo" else reply

    records = list(run(server(least_directions=1), Endpoints(clients(), forge=forge), rounds=2))
    assert Ks(records) == [K, K]
    assert all(reasons(r) == [("bo", "answer", "replayed")] for r in records)


# -- restarts and replays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [None, 4])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, least, stop):
    def guards():
        return {"bo": AtMost(5), "cleo": AtMost(9)}

    whole = server(least_directions=least)
    uninterrupted = list(run(whole, Endpoints(clients(), guards()), rounds=5))
    first = server(least_directions=least)
    list(run(first, Endpoints(clients(), guards()), rounds=stop))
    save_checkpoint(tmp_path / "c", first)
    second = server(least_directions=least)
    load_checkpoint(tmp_path / "c", second)
    rest = list(run(second, Endpoints(clients(), guards()), rounds=5))
    assert Ks(rest) == Ks(uninterrupted)[stop:]
    assert [reasons(r) for r in rest] == [reasons(r) for r in uninterrupted[stop:]]
    assert np.array_equal(second.weights, whole.weights)


def test_a_checkpoint_without_limits_is_read():
    found = server(least_directions=4)
    list(run(found, Endpoints(clients()), rounds=1))
    arrays, rest = found.state()
    assert rest.pop("limits") == {}
    again = server(least_directions=4)
    again.load_state(arrays, rest)
    assert np.array_equal(again.weights, found.weights)


def logged(path, found, guards, rounds=5):
    log = ScalarLog(path)
    for record in run(found, Endpoints(clients(), guards), rounds=rounds):
        if record.total is not None:
            log.append(record.plan, record.total)
    return log


def test_the_log_replays_whatever_K_its_rounds_had(tmp_path):
    found = server(least_directions=4)
    log = logged(tmp_path / "log", found, {"bo": AtMost(5)})
    late = server(least_directions=4)
    assert replay(late, log) == 5
    assert np.array_equal(late.weights, found.weights)
    with pytest.raises(CheckpointError, match="round 1 was not made from these weights"):
        replay(server(least_directions=6), log)
    with pytest.raises(CheckpointError, match="round 1 was not made from these weights"):
        replay(server(), log)


# -- with everything else ----------------------------------------------------------------------------------


def test_clients_that_repeat_the_steps_follow_K():
    def made(**more):
        return server(optimizer=lambda p: Portable(p, "adam", lr=0.01), downlink="scalars", clip=0.3, **more)

    found = made(least_directions=4)
    records = list(run(found, Endpoints(clients(), {"bo": AtMost(5)}), rounds=5))
    assert Ks(records) == [K, 5, 5, 5, 5]
    assert [reasons(r) for r in records] == [[("bo", "answer", "limited")], [], [], [], []]


def test_local_steps_keep_their_groups_whole():
    found = server(least_directions=3, steps=LocalSteps(3, 0.01))
    records = list(run(found, Endpoints(clients(), {"bo": AtMost(8)}), rounds=2))
    assert Ks(records) == [K, 6]
    with pytest.raises(ConfigError, match="take a multiple of 3"):
        server(least_directions=4, steps=LocalSteps(3, 0.01))


@pytest.mark.parametrize("least", [0, -1, 13])
def test_a_least_that_cannot_be(least):
    with pytest.raises(ConfigError, match="least-directions"):
        server(least_directions=least)


def terms(**options):
    return Terms(FixedPoint.fitting(8, 24, 64.0), 8, 24, **options)


def test_levels_are_another_way_to_do_less():
    with pytest.raises(ConfigError, match="exclude each other"):
        server(aggregator=IntegerSum(terms(levels=(4, K))), least_directions=4)


@pytest.mark.parametrize(("least", "seen"), [(4, [K, 5, 5, 5]), (None, [K] * 4)])
def test_secure_sums_go_on_with_the_bits_of_integer_sums(least, seen):
    """With fewer directions in the same session, or without the client, in a session of those that can."""
    sizes = SIZES | {f"e{i}": 6 + i for i in range(4)}
    identities = {name: Identity.generate() for name in sizes}
    roster = Roster({name: identity.public for name, identity in identities.items()})
    protection = Protection(corrupt=0.0, dropout=0.3, rounds=8)
    seals = {name: SecureSeal(name, identities[name], roster, protection.policy) for name in sizes}

    def go(aggregator, seals):
        found = server(aggregator=aggregator, least_directions=least)
        return found, list(run(found, Endpoints(clients(sizes, seals), {"bo": AtMost(5)}), rounds=4))

    secure, sealed = go(SecureSum(roster, terms(), protection), seals)
    integer, open_ = go(IntegerSum(terms()), None)
    assert Ks(sealed) == Ks(open_) == seen
    assert [reasons(r) for r in sealed] == [reasons(r) for r in open_]
    assert [r.dropped for r in sealed] == [1, 0, 0, 0]
    assert all(r.aborted is None for r in sealed)
    assert np.array_equal(secure.weights, integer.weights)
    agreed = ["advertise" in [stage.name for stage in r.stages] for r in sealed]
    assert agreed == [True, False, False, False]  # the keys of round 0 still serve
