"""What an owner allows: each limit at its edge, in a real exchange, and over restarts of the device."""

import mmap
import sys
import time
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest

from baffle.aggregation import ANSWER
from baffle.client import Client
from baffle.endpoint import Endpoint
from baffle.errors import ConfigError, DataError, LimitError
from baffle.estimator import SteinEstimator
from baffle.exchange import Envelope, Reply
from baffle.limits import Guard, Limits, resident
from baffle.perturbations import Rademacher
from baffle.plan import LocalSteps, LocalTraining
from baffle.secagg.primitives import Identity
from baffle.secagg.session import Policy, Roster
from baffle.secure import SecureSeal
from baffle.server import Server
from tests.contracts.slope import Points, Slope

K = 6
SAMPLES = 11
TODAY = date(2024, 2, 28)


class Clock:
    """Seconds that a forward pass is made to take."""

    def __init__(self, each=0.5):
        self.now, self.each, self.passes = 0.0, each, 0

    def __call__(self):
        return self.now


class Timed(Slope):
    """Each direction takes ``clock.each`` seconds; one that was not asked for before, ten times as long."""

    def __init__(self, clock):
        self.clock, self.seen = clock, set()

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        for _ in directions:
            first = len(batch.inputs) not in self.seen
            self.seen.add(len(batch.inputs))
            self.clock.now += self.clock.each * (10 if first else 1)
            self.clock.passes += 1
        return super().losses(weights, batch, stream, perturbation, directions, scale)

    def peak(self, batch_size):
        return 1000 * batch_size


def plan(K=K, scheme="forward", batch_size=4, **more):
    made = Server(Slope(), SteinEstimator(K, 1e-3, scheme), seed=2, batch_size=batch_size)
    return replace(made.plan(), **more)


def guard(limits, clock=None, **options):
    client = Client("anna", Timed(clock or Clock()), Points(SAMPLES, 0), seed=1)
    return Guard(limits, client, clock=clock or Clock(), **{"base": 0, "today": lambda: TODAY, **options})


def refusal(made, plan):
    with pytest.raises(LimitError) as refused:
        made.check(plan)
    return refused.value.limit, refused.value.most


# -- each of them ------------------------------------------------------------------------------------------


def test_no_limit_allows_anything():
    guard(Limits()).check(plan(10**6, batch_size=0))


def test_directions():
    made = guard(Limits(directions=6))
    made.check(plan(6))
    assert refusal(made, plan(7)) == ("directions", 6)


@pytest.mark.parametrize(("batch_size", "taken"), [(4, 4), (0, SAMPLES), (99, SAMPLES)])
def test_memory_is_what_there_is_and_what_a_measurement_takes(batch_size, taken):
    asked = plan(batch_size=batch_size)
    needed = 500 + 1000 * taken
    guard(Limits(memory=needed), base=500).check(asked)
    assert refusal(guard(Limits(memory=needed - 1), base=500), asked) == ("memory", needed - 1)


def test_memory_of_this_process_is_what_the_system_says():
    assert 1e7 < resident() < 1e11
    made = guard(Limits(memory=10**11), base=None)
    with mmap.mmap(-1, 64 << 20) as ballast:
        for at in range(0, len(ballast), 4096):
            ballast[at] = 1
        assert abs(resident() - made._base - len(ballast)) < 4 << 20


@pytest.mark.parametrize(
    ("asked", "passes", "affordable"),
    [
        # each pass takes half a second; the owner allows 4.9: nine passes
        (plan(8), 9, None),
        (plan(9), 10, 8),
        (plan(5, "central"), 10, 4),
        (plan(4, "central"), 8, None),
        (plan(9, steps=LocalSteps(3)), 12, 6),
        (plan(2, local=LocalTraining(1)), 9, None),  # three batches of 4 of 11 samples
        (plan(3, local=LocalTraining(1)), 12, 2),
        (plan(30, local=LocalTraining(2)), 186, "seconds"),
        (plan(3, batch_size=0, local=LocalTraining(2)), 8, None),
    ],
)
def test_seconds_are_predicted_from_a_forward_pass(asked, passes, affordable):
    clock = Clock()
    made = guard(Limits(seconds=4.9), clock)
    assert passes <= 9 or affordable is not None, "the table is consistent"
    if affordable is None:
        made.check(asked)
    elif affordable == "seconds":
        assert refusal(made, asked) == ("seconds", 5)
    else:
        assert refusal(made, asked) == ("directions", affordable)
        smaller = replace(asked.estimator, directions=affordable)
        made.check(replace(asked, estimator=smaller))  # what it offers, it takes
    assert clock.passes == 3, "timed once, behind a first pass that warms up"
    made._seconds_of_a_pass(replace(asked, batch_size=7))
    made._seconds_of_a_pass(replace(asked, estimator=replace(asked.estimator, perturbation=Rademacher())))
    assert clock.passes == 9, "for each batch size and kind of directions"


def test_a_round_that_no_direction_fits_into():
    assert refusal(guard(Limits(seconds=0.9), Clock()), plan(1)) == ("seconds", 1)


def test_days_of_use_are_counted_once_each_and_survive_the_process(tmp_path):
    today = TODAY
    days = tmp_path / "days"

    def started():
        return guard(Limits(days=2, directions=6), state=days, today=lambda: today)

    made = started()
    assert refusal(made, plan(7)) == ("directions", 6)
    assert days.read_text() == ""  # a round that was refused uses nothing up
    made.check(plan())
    made.check(plan())
    assert days.read_text() == "2024-02-28\n"
    today += timedelta(1)
    started().check(plan())
    today += timedelta(1)
    made = started()
    assert refusal(made, plan()) == ("days", 2)
    assert days.read_text() == "2024-02-28\n2024-02-29\n"
    today = TODAY
    made.check(plan())  # a day of use lasts to its end, whatever came between
    assert [path.name for path in tmp_path.iterdir()] == ["days"]


@pytest.mark.parametrize("content", [b"yesterday\n", b"2024-13-01\n", b"\xff\n", b"2024-02-28\n20240"])
def test_damaged_days_are_not_taken_for_none(tmp_path, content):
    (tmp_path / "days").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the days of use in .*days: it is damaged"):
        guard(Limits(days=2), state=tmp_path / "days")


def test_days_that_cannot_be_written_are_found_at_once_or_cost_the_round(tmp_path):
    with pytest.raises(DataError, match="cannot write the days"):
        guard(Limits(days=2), state=tmp_path / "nowhere" / "days")
    folder = tmp_path / "there"
    folder.mkdir()
    made = guard(Limits(days=2), state=folder / "days")
    (folder / "days").unlink()
    folder.rmdir()
    for _ in range(2):
        with pytest.raises(DataError, match="cannot write the days"):
            made.check(plan())


def test_a_condition_is_asked_each_time(tmp_path):
    charging = tmp_path / "charging"
    made = guard(Limits(when=f"test -e '{charging}'"))
    assert refusal(made, plan()) == ("when", None)
    charging.touch()
    made.check(plan())
    charging.unlink()
    assert refusal(made, plan()) == ("when", None)


def test_a_condition_does_not_hang_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr("baffle.limits._SECONDS_TO_DECIDE", 0.3)
    pid = tmp_path / "pid"
    made = guard(Limits(when=f"sleep 60 & echo $! > '{pid}'; wait"))
    assert refusal(made, plan()) == ("when", None)
    if not sys.platform.startswith("linux"):
        return
    stat, until = Path(f"/proc/{int(pid.read_text())}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":  # a killed process ends when it is scheduled
        assert time.monotonic() < until, "what the command had started is ended with it"
        time.sleep(0.01)


def test_a_cohort_needs_sums_that_nobody_looks_into():
    with pytest.raises(ConfigError, match="a least cohort needs secure sums"):
        guard(Limits(cohort=5))
    identities = {name: Identity.generate() for name in ("anna", "bo", "cleo")}
    roster = Roster({name: identity.public for name, identity in identities.items()})
    seal = SecureSeal("anna", identities["anna"], roster, Policy(least=5))
    Guard(Limits(cohort=5), Client("anna", Slope(), Points(3, 0), seal=seal)).check(plan())


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: value} for name in ("directions", "memory", "days", "cohort") for value in (0, -1, 10**18)),
        {"seconds": 0.0},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"when": "  "},
    ],
)
def test_limits_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="limit"):
        Limits(**wrong)


def test_limits_that_lack_what_they_need():
    with pytest.raises(ConfigError, match="a limit of days needs a file"):
        guard(Limits(days=2))
    with pytest.raises(ConfigError, match="Slope cannot tell what memory it needs"):
        Guard(Limits(memory=10), Client("anna", Slope(), Points(3, 0)))


# -- in an exchange ----------------------------------------------------------------------------------------


def exchange(made):
    s = Server(Slope(), SteinEstimator(K, 1e-3), seed=2, batch_size=4)
    endpoint = Endpoint(made._client, guard=made)
    envelope = Envelope(ANSWER, s.plan().encode(), b"", s.model().encode())
    reply = Reply.decode(endpoint.handle(envelope.encode()))
    assert reply.ticket == envelope.ticket("anna")
    return reply


@pytest.mark.parametrize(
    ("limits", "options", "line"),
    [
        (Limits(directions=3), {}, "directions<=3: its owner allows 3 directions, not 6"),
        (Limits(memory=10), {}, "memory<=10: a batch of 4 takes 4000 bytes, its owner allows 10"),
        (Limits(seconds=3), {}, "directions<=5: it would take about 3.5 s, its owner allows 3 s"),
        (Limits(seconds=0.2), {}, "seconds<=1: it would take about 3.5 s, its owner allows 0.2 s"),
        (Limits(when="exit 1 # no one's business"), {}, "when: its owner's condition does not hold now"),
    ],
)
def test_the_reply_says_which_and_nothing_was_measured(limits, options, line):
    clock = Clock()
    made = guard(limits, clock, **options)
    reply = exchange(made)
    assert (reply.status, reply.text) == ("limited", line)
    assert clock.passes == (3 if limits.seconds else 0)


def test_days_in_an_exchange(tmp_path):
    today = TODAY
    made = guard(Limits(days=1), state=tmp_path / "days", today=lambda: today)
    assert exchange(made).status == "answer"
    today += timedelta(1)
    reply = exchange(made)
    assert reply.status == "limited"
    assert reply.text == "days<=1: its owner allows 1 days of use, and they are over"


def test_a_disk_that_refuses_the_days_costs_the_answer(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    made = guard(Limits(days=1), state=folder / "days")
    (folder / "days").unlink()
    folder.rmdir()
    assert exchange(made).status == "failed"


def test_other_stages_and_greetings_are_not_limited():
    made = guard(Limits(directions=1))
    endpoint = Endpoint(made._client, guard=made)
    assert Reply.decode(endpoint.handle(Envelope("hello").encode())).status == "answer"
    reply = Reply.decode(endpoint.handle(Envelope("unmask", plan().encode()).encode()))
    assert (reply.status, "cannot do the stage" in reply.text) == ("failed", True)
