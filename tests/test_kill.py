"""Clients as processes of their own that are killed at every stage of a secure sum.

Each is a Python without torch that speaks length-prefixed frames over its pipes; the server, real as well, is
here, behind a driver with deadlines. ``kill -9`` ends a client; its ledger is a file, so that it remembers.
"""

import contextlib
import os
import re
import selectors
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

import baffle
from baffle.errors import AggregationError, SecurityError
from baffle.secagg.primitives import Identity, hash_of
from baffle.secagg.session import Roster
from baffle.secure import Protection, SecureSum

# What a device measures with, and how frames are made of parts: executed there and here.
DEVICE = """
import struct
import numpy as np
import baffle

def pack(*parts):
    body = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return struct.pack("<I", len(body)) + body

def parts_of(body):
    found, at = [], 0
    while at < len(body):
        (size,) = struct.unpack_from("<I", body, at)
        found.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    return found

class LinearRegression:
    layout = baffle.Layout(("weight", "bias"), ((5,), ()))
    frozen_digest = bytes(32)
    measuring = staticmethod(lambda: None)

    def weights(self):
        return np.full(6, 0.25, np.float32)

    def check_sigma(self, sigma):
        pass

    def loss(self, weights, batch):
        return float(np.mean((batch.inputs @ weights[:5] + weights[5] - batch.targets) ** 2))

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        wide = weights.astype(np.float64)
        rows = [perturbation.values(stream, k, self.layout, 0, 6) for k in directions]
        self.measuring()
        return np.array([self.loss(wide + scale * row, batch) for row in rows])

class Rows:
    def __init__(self, name):
        rng = np.random.default_rng(int.from_bytes(name.encode(), "little"))
        count = int(rng.integers(3, 30))
        self.x, self.y = rng.standard_normal((count, 5)), rng.standard_normal(count)

    def __len__(self):
        return len(self.y)

    def batch(self, indices):
        return baffle.Batch(self.x[indices], self.y[indices])

def client(name, seal=None):
    return baffle.Client(name, LinearRegression(), Rows(name), seed=3, seal=seal)
"""
CHILD = (
    DEVICE
    + """
import sys, time
from pathlib import Path
from baffle.secagg.primitives import Identity
from baffle.secagg.session import Policy, Roster
from baffle.secure import FileLedger, SecureSeal

def give(*parts):
    sys.stdout.buffer.write(pack(*parts))
    sys.stdout.buffer.flush()

def held(ticket):  # until the kill
    give(b"held", ticket, b"")
    time.sleep(1000)

name, least, roster, secret, ledger = sys.argv[1:]
keys = dict(line.split() for line in Path(roster).read_text().splitlines())
seal = SecureSeal(
    name,
    Identity.from_bytes(bytes.fromhex(secret)),
    Roster({who: bytes.fromhex(key) for who, key in keys.items()}),
    Policy(int(least), 0.0),
    ledger=FileLedger(Path(ledger)),
)
me = client(name, seal)
while head := sys.stdin.buffer.read(4):
    ticket, moment, stage, request, plan, model = parts_of(sys.stdin.buffer.read(*struct.unpack("<I", head)))
    if moment == b"before":
        held(ticket)
    me.runtime.measuring = (lambda: held(ticket)) if moment == b"measuring" else (lambda: None)
    try:
        kind, answer = b"answer", me.reply(stage.decode(), request, baffle.Download.decode(plan, model))
    except baffle.BaffleError as error:
        kind, answer = b"error", f"{type(error).__name__}: {error}".encode()
    if moment == b"after":
        held(ticket)
    assert not {"torch", "numba", "dp_accounting"} & sys.modules.keys()
    give(kind, ticket, answer)
"""
)
HERE: dict = {}
exec(DEVICE, HERE)
pack, parts_of, client = HERE["pack"], HERE["parts_of"], HERE["client"]

NAMES = [f"client-{i}" for i in range(6)]
VICTIM = "client-2"
K, LEAST, ROUNDS = 8, 3, 3  # rounds of a session


class Device:
    """A client's process; the same identity and ledger whenever it is started."""

    def __init__(self, name, folder, identity, roster):
        self.name, self.process, self.buffer = name, None, b""
        ledger = folder / f"{name}.ledger"
        self.command = [sys.executable, "-W", "error", "-c", CHILD, name, str(LEAST), str(roster)]
        self.command += [identity.to_bytes().hex(), str(ledger)]

    def start(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(self.command, env=environment, **pipes)
        self.buffer = b""

    def signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        if self.process is None:
            return
        self.signal(signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process = None

    def send(self, *parts):
        self.process.stdin.write(pack(*parts))
        self.process.stdin.flush()


class Fleet(dict):
    """Name → Device. ``listen`` brings what those asked say, until a deadline."""

    tickets = 0

    def ready(self):
        for device in self.values():
            if device.process is None:
                device.start()

    def alive(self, name):
        return self[name].process is not None

    def ask(self, stage, requests, plan, model, kills):
        """Ticket of this exchange: an answer that comes late carries an older one."""
        self.tickets += 1
        ticket = struct.pack("<I", self.tickets)
        for name in filter(self.alive, sorted(requests)):
            moment = kills[name][1] if name in kills and kills[name][0] == stage else ""
            self[name].send(ticket, moment.encode(), stage.encode(), requests[name], plan, model)
        return ticket

    def listen(self, names, ticket, seconds=60):
        end, waiting = time.monotonic() + seconds, set(filter(self.alive, names))
        with selectors.DefaultSelector() as selector:
            for name in waiting:
                selector.register(self[name].process.stdout, selectors.EVENT_READ, self[name])
            while waiting and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    device = key.data
                    data = os.read(key.fd, 1 << 16)
                    assert data, f"{device.name} ended by itself"
                    device.buffer += data
                    while message := self._whole(device):
                        kind, its, body = message
                        if its == ticket:
                            waiting.discard(device.name)
                            selector.unregister(key.fileobj)
                            yield device.name, kind.decode(), body
                            break

    @staticmethod
    def _whole(device):
        if len(device.buffer) < 4:
            return None
        (size,) = struct.unpack_from("<I", device.buffer)
        if len(device.buffer) < 4 + size:
            return None
        body, device.buffer = device.buffer[4 : 4 + size], device.buffer[4 + size :]
        return parts_of(body)


@dataclass
class Outcome:
    """What became of a round."""

    plan: baffle.RoundPlan
    model: bytes
    total: baffle.RoundSum | None = None
    aborted: str | None = None
    stages: list = field(default_factory=list)
    answered: dict = field(default_factory=dict)  # stage → names whose answers were taken
    refused: dict = field(default_factory=dict)  # name → its error
    requests: list = field(default_factory=list)  # (stage, name, bytes)


def exchange(tally, plan, model, fleet, kills=None, late=frozenset()):
    """One round with those that are alive. ``kills``: name → (stage, moment at which it is killed).

    Nobody waits for those that are ``late``: a deadline, without a clock in it.
    """
    out, kills = Outcome(plan, model), kills or {}
    try:
        for stage in tally.stages():
            out.stages.append(stage.name)
            taken = out.answered.setdefault(stage.name, [])
            out.requests += [(stage.name, name, request) for name, request in stage.requests.items()]
            ticket = fleet.ask(stage.name, stage.requests, plan.encode(), model, kills)
            for name, kind, body in fleet.listen(stage.requests.keys() - late, ticket):
                if kind == "held":
                    fleet[name].kill()
                elif kind == "error":
                    out.refused[name] = body.decode()
                else:
                    tally.add(name, body)
                    taken.append(name)
                    if kills.get(name) == (stage.name, "later"):
                        fleet[name].kill()
        out.total = tally.close()
    except (AggregationError, SecurityError) as error:
        out.aborted = str(error)
    return out


def run(server, fleet, kills=None, names=NAMES, late=frozenset()):
    plan = server.plan()
    out = exchange(server.aggregator.open(plan, names), plan, server.model().encode(), fleet, kills, late)
    if out.total is None:
        server.skip()
    else:
        server.apply(out.total)
    return out


def plain(terms, out, names):
    """What a server that sees everything gets from these clients: the same clients, in this process."""
    tally = baffle.IntegerSum(terms).open(out.plan, names)
    (stage,) = tally.stages()
    for name in names:
        download = baffle.Download.decode(out.plan.encode(), out.model)
        tally.add(name, client(name).reply(stage.name, stage.requests[name], download))
    return tally.close()


def assert_sum_of(terms, out, names):
    assert out.aborted is None, out.aborted
    assert sorted(out.answered["answer"]) == sorted(names)
    assert out.total.encode() == plain(terms, out, names).encode()
    assert len(set(out.total.values)) == K


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    identities = {name: Identity.generate() for name in NAMES}
    roster = folder / "roster"
    roster.write_text("".join(f"{name} {who.public.hex()}\n" for name, who in identities.items()))
    devices = Fleet({name: Device(name, folder, identities[name], roster) for name in NAMES})
    devices.roster = Roster({name: who.public for name, who in identities.items()})
    yield devices
    for device in devices.values():
        device.kill()


@pytest.fixture
def federation(fleet, request):
    """A server of a job of this test's own: (consistency) → (server, terms). One client may vanish."""
    fleet.ready()
    job = hash_of(request.node.name.encode())

    def make(consistency, rounds=ROUNDS, job=job):
        terms = baffle.Terms(baffle.FixedPoint(64, 24, 1024.0), len(NAMES), 30)
        protection = Protection(0.0, 0.17, LEAST, rounds, consistency)
        aggregator = SecureSum(fleet.roster, terms, protection, job=job)
        estimator = baffle.SteinEstimator(K, 1e-4, "central")
        server = baffle.Server(
            HERE["LinearRegression"](),
            estimator,
            seed=job,
            batch_size=4,
            aggregator=aggregator,
        )
        return server, terms

    return make


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
    server, terms = federation(consistency)
    others = [name for name in NAMES if name != VICTIM]
    first = run(server, fleet, {VICTIM: (stage, moment)})
    assert not fleet.alive(VICTIM)
    assert ("confirm" in first.stages) == consistency
    assert_sum_of(terms, first, NAMES if counted else others)

    second = run(server, fleet)  # without it, with the same keys
    assert_sum_of(terms, second, others)
    assert not {"advertise"} & set(second.stages)

    fleet.ready()  # it is back, with no keys ...
    for at, name, request in first.requests:
        if name == VICTIM and at != "advertise":
            assert_refused(fleet, first, at, request)
    third = run(server, fleet)
    present = VICTIM in first.answered["advertise"]
    assert ("SecurityError" in third.refused.get(VICTIM, "")) == present
    assert_sum_of(terms, third, others)

    # ... and does not answer the old round again, whatever session it is asked in.
    def asked_again(job):
        lying = SecureSum(fleet.roster, terms, server.aggregator.protection, job=job)
        return exchange(lying.open(first.plan, NAMES), first.plan, first.model, fleet)

    lied = asked_again(hash_of(b"another", server.aggregator.job))
    assert lied.total is None
    for name in [*first.answered["answer"], *([VICTIM] if remembers else [])]:
        assert "this seed was answered before, in another job" in lied.refused[name]
    lied = asked_again(server.aggregator.job)
    assert lied.total is None
    for name in others:
        assert "round 0 was asked for again: round 2 of this job is answered" in lied.refused[name]
    if remembers:
        assert "round 0 was asked for again: round 0 of this job is answered" in lied.refused[VICTIM]

    fourth = run(server, fleet)  # the next session has it
    assert fourth.stages[0] == "advertise"
    assert_sum_of(terms, fourth, NAMES)


def assert_refused(fleet, out, stage, request):
    ticket = fleet.ask(stage, {VICTIM: request}, out.plan.encode(), out.model, {})
    ((_, kind, body),) = fleet.listen([VICTIM], ticket)
    assert kind == "error"
    assert body.startswith(b"SecurityError")


def test_a_client_that_hangs_is_left_behind_at_the_deadline(fleet, federation):
    server, terms = federation(True)
    run(server, fleet)
    fleet[VICTIM].signal(signal.SIGSTOP)
    second = run(server, fleet, late={VICTIM})
    fleet[VICTIM].signal(signal.SIGCONT)
    others = [name for name in NAMES if name != VICTIM]
    assert_sum_of(terms, second, others)
    # What it says late belongs to no exchange any more. It has used up its masks of that round, and gives
    # others for the next one.
    third = run(server, fleet)
    assert third.stages[0] == "share"
    assert_sum_of(terms, third, NAMES)


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
    server, terms = federation(False, rounds=1000)
    before = server.weights
    first = run(server, fleet, dict.fromkeys(NAMES[-count:], (stage, moment)))
    assert first.total is None
    assert why in first.aborted
    assert np.array_equal(server.weights, before)
    assert re.search(r"\b[3-5] are needed|too few", first.aborted)
    assert ("unmask" in first.stages) == (why == "cannot be taken off")
    assert_goes_on(server, terms, fleet)


def test_too_few_that_vouch_for_each_other_abort_the_round(fleet, federation):
    server, terms = federation(True, rounds=1000)
    dying = dict.fromkeys(NAMES[1:], ("confirm", "before"))
    first = run(server, fleet, dying)
    assert "have 2 holders that say they are alive, 3 are needed: nothing was opened" in first.aborted
    assert "unmask" not in first.stages
    assert_goes_on(server, terms, fleet)


def assert_goes_on(server, terms, fleet):
    """Those that came back have lost their keys: where the others are too few, all make new ones."""
    fleet.ready()
    for _ in range(3):
        out = run(server, fleet)
        if out.total is not None:
            break
        assert "are needed" in out.aborted
    assert out.stages[0] == "advertise"
    assert_sum_of(terms, out, NAMES)
