"""Clients as processes of their own that are killed at every stage of a secure sum.

Devices are those of ``tests/fleet.py``; ``kill -9`` ends one. Its ledger is a file, so that it remembers.
"""

import re

import numpy as np
import pytest

import baffle
from baffle import device
from baffle.exchange import Envelope, Reply
from baffle.secagg.messages import Reader
from baffle.secagg.primitives import hash_of
from baffle.secure import Protection, SecureSum
from tests import fleet as harness
from tests.fleet import Device, Fleet, LinearRegression, a_round

NAMES = [f"client-{i}" for i in range(6)]
VICTIM = "client-2"
K, LEAST, ROUNDS = 8, 3, 3  # rounds of a session
TERMS = baffle.Terms(baffle.FixedPoint(64, 24, 1024.0), len(NAMES), 30)


@pytest.fixture(scope="module")
def fleet():
    with Fleet(NAMES, least=LEAST) as devices:
        yield devices


@pytest.fixture
def federation(fleet, request):
    """A server of a job of this test's own, by (consistency). One client may vanish."""
    fleet.ready()
    job = hash_of(request.node.name.encode())

    def make(consistency, rounds=ROUNDS):
        protection = Protection(0.0, 0.17, LEAST, rounds, consistency)
        aggregator = SecureSum(fleet.roster, TERMS, protection, job=job)
        estimator = baffle.SteinEstimator(K, 1e-4, "central")
        return baffle.Server(LinearRegression(), estimator, seed=job, batch_size=4, aggregator=aggregator)

    return make


def run(server, fleet, kills=None, **options):
    """A round. ``kills``: name → (stage, moment at which it is killed)."""
    for name, when in (kills or {}).items():
        fleet[name].at(*when, Device.kill)
    out = a_round(server, fleet, **options)
    for name in kills or {}:
        assert not fleet[name].alive
    assert_one_kind_of_share(server, out)
    return out


def assert_one_kind_of_share(server, out):
    """Of a client in the sum its own mask is opened, of any other what it shares with those in the sum.

    Never both: that would be its answer. Read from what the holders of its shares were asked for.
    """
    session, kinds = server.aggregator._session, {}
    asked = [each for each in out.seen if each.stage == "unmask"]
    assert len({each.name for each in asked}) == len(asked), "somebody was asked twice"
    present = [each.name for each in out.seen if each.stage == "answer"]
    for each in asked:
        place = session.names.index(each.name)
        owners = [session.names[i] for i in session.owners[place] if session.names[i] in present]
        for owner, alive in zip(owners, Reader(each.envelope.request).flags(len(owners)), strict=True):
            kinds.setdefault(owner, set()).add(bool(alive))
    if asked:
        assert kinds == {name: {name in out.answered} for name in present}


def stages(out):
    return [stage.name for stage in out.record.stages]


def refused(out):
    """Name → why, in its own words."""
    return {each.client: each.text for each in out.record.dropouts if each.reason == "refused"}


def assert_sum_of(out, names):
    harness.assert_sum_of(out, names, TERMS)
    for name in {*NAMES} - {*names}:
        assert out.dropout(name).stage in ("advertise", "share", "answer")


class Again:
    """A server that asks for a round that was, in a job of its choice."""

    def __init__(self, server, out, job):
        self.aggregator = SecureSum(server.aggregator.roster, TERMS, server.aggregator.protection, job=job)
        self.round, self.downlink, self._out = 0, self, out
        self.estimator = out.record.plan.estimator

    def plan(self):
        return self._out.record.plan

    def model(self):
        return baffle.ModelMessage.decode(self._out.model)

    def package(self, name):
        return self._out.model

    def holds(self, name, round_):
        pass

    def able(self, names):
        return names

    def adapt(self, names):
        return self.estimator.directions

    def cohort(self, names, size):
        return sorted(names)

    def skip(self):
        self.round += 1


# -- one client, within the limit ------------------------------------------------------------------------

# Where it dies, whether its answer is in the sum, whether its ledger remembers the round.
MOMENTS = [
    ("advertise", "before", False, False),
    ("advertise", "later", False, False),
    ("share", "after", False, False),
    ("share", "later", False, False),
    ("answer", "before", False, False),
    ("answer", "measuring", False, False),
    ("answer", "after", False, True),
    ("answer", "later", True, True),
    ("confirm", "before", True, True),
    ("confirm", "later", True, True),
    ("unmask", "before", True, True),
    ("unmask", "after", True, True),
]
# Of the stages before the one that is added, some again with it.
TWINS = [MOMENTS[1], MOMENTS[2], MOMENTS[4], MOMENTS[11]]
CASES = [
    pytest.param(consistency, *case, id=f"{case[0]}-{case[1]}{'-consistent' * consistency}")
    for consistency in (False, True)
    for case in MOMENTS
    if (case not in TWINS if consistency else case[0] != "confirm")
]


@pytest.mark.parametrize(("consistency", "stage", "moment", "counted", "remembers"), CASES)
def test_a_client_killed_at_any_stage(fleet, federation, consistency, stage, moment, counted, remembers):
    server = federation(consistency)
    others = [name for name in NAMES if name != VICTIM]
    first = run(server, fleet, {VICTIM: (stage, moment)})
    assert ("confirm" in stages(first)) == consistency
    assert_sum_of(first, NAMES if counted else others)
    if moment != "later":
        gone = first.dropout(VICTIM)
        assert (gone.stage, gone.reason) == (stage, "gone")

    second = run(server, fleet)  # without it, with the same keys
    assert_sum_of(second, others)
    assert "advertise" not in stages(second)

    fleet.ready()  # it is back, with no keys ...
    for each in first.seen:
        if each.name == VICTIM and each.stage != "advertise":
            assert_refused(fleet, each.envelope)
    third = run(server, fleet)
    present = (stage, moment) != ("advertise", "before")
    assert third.dropout(VICTIM).reason == ("refused" if present else "unasked")
    assert_sum_of(third, others)

    # ... and does not answer the old round again, whatever session it is asked in.
    lied = run(Again(server, first, hash_of(b"another", server.aggregator.job)), fleet)
    assert lied.record.total is None
    for name in [*first.answered, *([VICTIM] if remembers else [])]:
        assert "this seed was answered before, in another job" in refused(lied)[name]
    lied = run(Again(server, first, server.aggregator.job), fleet)
    assert lied.record.total is None
    for name in others:
        assert "round 0 was asked for again: round 2 of this job is answered" in refused(lied)[name]
    if remembers:
        assert "round 0 was asked for again: round 0 of this job is answered" in refused(lied)[VICTIM]

    fourth = run(server, fleet)  # the next session has it
    assert stages(fourth)[0] == "advertise"
    assert_sum_of(fourth, NAMES)


def assert_refused(fleet, envelope):
    reply = Reply.decode(device.relay(fleet[VICTIM].listen, envelope.encode(), 60))
    assert reply.status == "refused", reply.text
    assert reply.ticket == Envelope.decode(envelope.encode()).ticket(VICTIM)


def test_a_client_that_hangs_is_left_behind_at_the_deadline(fleet, federation):
    server = federation(True)
    run(server, fleet)
    fleet[VICTIM].at("answer", "measuring", Device.stop)
    second = run(server, fleet, deadline=2.0)
    fleet[VICTIM].go()
    assert_sum_of(second, [name for name in NAMES if name != VICTIM])
    assert second.dropout(VICTIM).reason == "late"
    # What it says late belongs to no exchange any more. It has used up its masks of that round, and gives
    # others for the next one.
    third = run(server, fleet)
    assert stages(third)[0] == "share"
    assert_sum_of(third, NAMES)


# -- more than the limit ---------------------------------------------------------------------------------

TOO_MANY = [
    ("advertise", "before", 4, "2 of 6 clients advertised keys, too few"),
    ("share", "before", 2, "0 clients can take part, 3 are needed"),
    ("answer", "measuring", 2, "4 of 6 clients answered, 5 are needed: nothing was opened"),
    ("answer", "after", 3, "3 of 6 clients answered, 5 are needed: nothing was opened"),
    ("answer", "before", 4, "2 of 6 clients answered, 5 are needed: nothing was opened"),
    ("answer", "later", 2, "cannot be taken off"),
    ("unmask", "before", 3, "cannot be taken off"),
]


@pytest.mark.parametrize("case", TOO_MANY, ids=lambda c: f"{c[2]}-{c[0]}-{c[1]}")
def test_more_kills_than_the_limit_abort_the_round(fleet, federation, case):
    stage, moment, count, why = case
    server = federation(False, rounds=1000)
    before = server.weights
    first = run(server, fleet, dict.fromkeys(NAMES[-count:], (stage, moment)))
    assert first.record.total is None
    assert why in first.record.aborted
    assert np.array_equal(server.weights, before)
    assert re.search(r"\b[3-5] are needed|too few", first.record.aborted)
    assert ("unmask" in stages(first)) == (why == "cannot be taken off")
    assert_goes_on(server, fleet)


def test_too_few_that_vouch_for_each_other_abort_the_round(fleet, federation):
    server = federation(True, rounds=1000)
    dying = dict.fromkeys(NAMES[1:], ("confirm", "before"))
    first = run(server, fleet, dying)
    assert "have 2 holders that say they are alive, 3 are needed: nothing was opened" in first.record.aborted
    assert "unmask" not in stages(first)
    assert_goes_on(server, fleet)


def assert_goes_on(server, fleet):
    """Those that came back have lost their keys: where the others are too few, all make new ones."""
    fleet.ready()
    for _ in range(3):
        out = run(server, fleet)
        if out.record.total is not None:
            break
        assert "are needed" in out.record.aborted
    assert stages(out)[0] == "advertise"
    assert_sum_of(out, NAMES)
