"""SecureSum and SecureSeal: the bits of IntegerSum, the ledger, and what a seal refuses to answer."""

import contextlib
import signal
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.aggregation import ANSWER, IntegerSum, PlainSum
from baffle.client import Client, Download
from baffle.errors import (
    AggregationError,
    BaffleError,
    ConfigError,
    DataError,
    LossError,
    MessageError,
    SecurityError,
)
from baffle.estimator import SteinEstimator
from baffle.fixedpoint import FixedPoint
from baffle.plan import LocalTraining, RoundPlan
from baffle.privacy import Privacy
from baffle.secagg.primitives import Identity
from baffle.secagg.session import Policy, Roster
from baffle.secure import FileLedger, MemoryLedger, Protection, SecureSeal, SecureSum, binding_of
from baffle.server import Server
from baffle.simulation import random_drops, simulate
from baffle.terms import Terms
from tests.contracts.slope import K, Points, Slope

SIZES = {f"c{i}": 5 + 3 * (i % 4) for i in range(8)}
BUDGETS = {"c0": 2, "c2": 5, "c3": 2, "c5": 5}
IDENTITIES = {name: Identity.generate() for name in SIZES}
ROSTER = Roster({name: identity.public for name, identity in IDENTITIES.items()})
PROTECTION = Protection(corrupt=0.0, dropout=0.3, rounds=3)


def terms(bits=64, **options):
    point = FixedPoint.fitting(8, 16, 64.0, bits)
    return Terms(**{"fixed_point": point, "cohort": 8, "largest_weight": 16, **options})


def seal(name, protection=PROTECTION, **options):
    return SecureSeal(name, IDENTITIES[name], ROSTER, protection.policy, **options)


def clients(secure, budgets=None, runtime=None, protection=PROTECTION, **options):
    runtime = runtime or Slope()
    return [
        Client(
            name,
            runtime,
            Points(count, i),
            seed=1,
            max_directions=(budgets or {}).get(name),
            seal=seal(name, protection, **options) if secure else None,
        )
        for i, (name, count) in enumerate(SIZES.items())
    ]


def run(aggregator, rounds=4, drops=None, budgets=None, protection=PROTECTION, levels=False, **options):
    server = Server(
        Slope(), SteinEstimator(K, 1e-3), aggregator=aggregator, **{"seed": 2, "batch_size": 4, **options}
    )
    secure = isinstance(aggregator, SecureSum)
    members = clients(secure, budgets, protection=protection, levels=levels)
    return server, list(simulate(server, members, rounds=rounds, drops=drops))


# -- parity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 32},
        {"levels": (2, 5, 6)},
        {"bits": 32, "levels": (2, 5, 6)},
        {"local": LocalTraining(1, 0.1)},
        {"consistency": True},
    ],
    ids=str,
)
def test_the_bits_of_an_integer_sum(options):
    options = dict(options)
    local = options.pop("local", None)
    protection = replace(PROTECTION, consistency=options.pop("consistency", False))
    found = terms(**options)
    budgets = BUDGETS if found.levels else None
    drops = random_drops(0.15, seed=5)
    integer, open_ = run(IntegerSum(found), 6, drops, budgets, local=local)
    aggregator = SecureSum(ROSTER, found, protection)
    secure, sealed = run(aggregator, 6, drops, budgets, protection, levels=bool(found.levels), local=local)
    assert [r.dropped for r in sealed] == [r.dropped for r in open_]
    assert any(r.dropped for r in open_)
    for a, b in zip(sealed, open_, strict=True):
        assert a.aborted is None
        assert np.array_equal(a.total.values, b.total.values)
        assert a.loss == b.loss
    assert np.array_equal(secure.weights, integer.weights)
    plain, in_floats = run(PlainSum(), 6, drops, budgets, local=local)
    step = 2.0**-found.fixed_point.fraction_bits
    for a, b in zip(sealed[:1], in_floats, strict=False):
        assert np.allclose(a.total.values, b.total.values, rtol=1e-12, atol=step)
    assert plain.round == 6


def test_values_at_the_bound_come_back_exactly():
    """Every client at ±limit with the largest weight, one step from overflow."""
    count, weight, fraction = 8, 15, 8
    limit = (2**31 - 1) // (count * weight) / 2**fraction
    point = FixedPoint(32, fraction, limit)
    assert count * weight * point.largest <= 2**31 - 1 < count * weight * (point.largest + 1)
    found = Terms(point, count, weight)
    plan = RoundPlan(0, bytes(32), SteinEstimator(2, 1e-3), bytes(32))
    values = np.array([limit, -limit], np.float32)
    assert abs(float(values[0])) <= limit
    tally = SecureSum(ROSTER, found, PROTECTION).open(plan, list(SIZES))
    seals = {name: seal(name) for name in SIZES}
    total = drive(tally, seals, plan, lambda name, terms: terms.prepare(plan, values, weight))
    assert np.array_equal(total.values, point.decode(point.encode(values)))
    with pytest.raises(ConfigError, match="overflow"):
        Terms(FixedPoint(32, fraction, limit + 2.0**-fraction), count, weight)


def drive(tally, seals, plan, measure, request=lambda stage, name, data: data, refused=None):
    """A driver in miniature. ``refused``: takes clients' errors, which else end the round."""
    for stage in tally.stages():
        for name, data in stage.requests.items():
            try:
                answer = seals[name].reply(
                    stage.name, request(stage.name, name, data), plan, lambda t, n=name: measure(n, t)
                )
                tally.add(name, answer)
            except BaffleError as error:
                if refused is None:
                    raise
                refused[stage.name, name] = error
    return tally.close()


def test_rounds_after_an_aborted_one_run():
    """Round 1 loses too many to be opened, and says so; the next ones are exact again."""
    found = terms()

    def drops(round_, name):
        return round_ == 1 and name in ("c1", "c2", "c3", "c4", "c5")

    _, sealed = run(SecureSum(ROSTER, found, PROTECTION), 4, drops)
    _, open_ = run(IntegerSum(found), 1, drops)
    assert [r.aborted is None for r in sealed] == [True, False, True, True]
    assert sealed[1].total is None
    assert np.array_equal(sealed[0].total.values, open_[0].total.values)
    assert sealed[3].participants - sealed[3].dropped == 8


@pytest.mark.parametrize("alive", [2, 3, 4, 5, 6])
def test_every_number_of_survivors_ends_in_a_sum_or_in_a_reason(alive):
    """Up to the threshold a round is given up; no client has to refuse, and the run goes on."""
    found = terms()
    settings = PROTECTION.settings(8)
    _, records = run(
        SecureSum(ROSTER, found, PROTECTION), 2, lambda r, name: r == 0 and int(name[1]) >= alive
    )
    assert (records[0].aborted is None) == (alive > settings.threshold)
    assert records[1].aborted is None
    if records[0].aborted:
        assert "round 0: " in records[0].aborted


def test_a_cohort_drawn_each_round_shares_the_keys_of_its_session():
    found = terms()
    server = Server(
        Slope(), SteinEstimator(K, 1e-3), aggregator=SecureSum(ROSTER, found, PROTECTION), batch_size=4
    )
    records = list(simulate(server, clients(True), rounds=4, cohort=6))
    assert all(r.total is not None for r in records)


def test_a_secure_aggregator_names_what_it_cannot_serve():
    plan = RoundPlan(0, bytes(32), SteinEstimator(K, 1e-3), bytes(32))
    with pytest.raises(ConfigError, match="a job's name has 32 bytes"):
        SecureSum(ROSTER, terms(), job=b"job")
    with pytest.raises(ConfigError, match="the terms have room for 7"):
        SecureSum(ROSTER, terms(cohort=7)).open(plan, list(SIZES))
    with pytest.raises(AggregationError, match=r"2 clients are there: .* fewer than 3 protects nobody"):
        next(SecureSum(ROSTER, terms()).open(plan, ["c0", "c1"]).stages())
    with pytest.raises(ConfigError, match="fewer than 3 protects nobody"):
        next(SecureSum(ROSTER, terms(cohort=2)).open(plan, ["c0", "c1"]).stages())
    tally = SecureSum(ROSTER, terms()).open(plan, list(SIZES))
    with pytest.raises(AggregationError, match="did not run to their end"):
        tally.close()
    with pytest.raises(MessageError, match="where nothing was asked"):
        tally.add("c0", b"")


# -- a seal ------------------------------------------------------------------------------------------


PLAN = RoundPlan(0, bytes(32), SteinEstimator(K, 1e-3), bytes(32), batch_size=4)
VALUES = np.linspace(-1, 1, K).astype(np.float32)


def measured(name, found):
    return found.prepare(PLAN, VALUES, SIZES[name])


def seals(**options):
    return {name: seal(name, **options) for name in SIZES}


@pytest.mark.parametrize("request_", [b"", terms().encode(), bytes(64)], ids=["empty", "terms", "zeros"])
def test_it_does_not_answer_in_the_clear(request_):
    """Without a session, in the middle of one, and after one."""
    asked = []
    one = seals()
    for _ in range(2):
        with pytest.raises((SecurityError, MessageError)):
            one["c0"].reply(ANSWER, request_, PLAN, asked.append)
        tally = SecureSum(ROSTER, terms(), PROTECTION).open(PLAN, list(SIZES))
        with contextlib.suppress(SecurityError):  # the second time the round is answered
            drive(tally, one, PLAN, measured)
    with pytest.raises(SecurityError, match="in the clear"):
        one["c0"].reply(ANSWER, b"", PLAN, asked.append)
    assert asked == []


def test_the_clear_stages_of_other_aggregators_mean_nothing_to_it():
    for stage in ("reveal", "", "Answer", "advertise "):
        with pytest.raises(SecurityError, match="there is no stage"):
            seal("c0").reply(stage, b"", PLAN, measured)
    with pytest.raises(MessageError, match="cut short"):
        seal("c0").reply("advertise", b"\1", PLAN, measured)
    with pytest.raises(MessageError):
        seal("c0").reply("advertise", struct.pack("<I", 2**32 - 1) + terms().encode(), PLAN, measured)


def changed_plan(**options):
    return replace(PLAN, **options)


@pytest.mark.parametrize(
    "other",
    [
        changed_plan(weights_digest=b"w" * 32),
        changed_plan(seed=b"s" * 32),
        changed_plan(estimator=SteinEstimator(K, 2e-3)),
        changed_plan(estimator=SteinEstimator(K, 1e-3, "central")),
        changed_plan(batch_size=8),
        changed_plan(estimator=SteinEstimator(K - 1, 1e-3)),
        changed_plan(round=1),
    ],
    ids=["weights", "seed", "sigma", "scheme", "batch size", "K", "round"],
)
def test_a_client_that_got_another_plan_is_refused_and_the_others_are_summed(other):
    """All others' answers make a sum; the odd one's does not fit, whatever the server told it."""
    one, refused = seals(), {}
    tally = SecureSum(ROSTER, terms(), PROTECTION).open(PLAN, list(SIZES))
    plans = {name: other if name == "c3" else PLAN for name in SIZES}

    class Odd:
        def __init__(self, name):
            self.name = name

        def reply(self, stage, request, plan, measure):
            if stage != ANSWER:
                return one[self.name].reply(stage, request, plan, measure)

            def measure_(found):
                k = plans[self.name].estimator.directions
                return found.prepare(plans[self.name], VALUES[:k], SIZES[self.name])

            return one[self.name].reply(stage, request, plans[self.name], measure_)

    total = drive(tally, {name: Odd(name) for name in SIZES}, PLAN, measured, refused=refused)
    assert list(refused) == [(ANSWER, "c3")]
    assert isinstance(refused[ANSWER, "c3"], SecurityError | MessageError)
    point = terms().fixed_point
    assert np.array_equal(total.values, point.decode(point.encode(VALUES)))


def test_terms_of_one_client_differ_and_its_key_is_refused():
    other = terms(largest_weight=17).encode()
    refused = {}

    def request(stage, name, data):
        if (stage, name) != ("advertise", "c3"):
            return data
        (size,) = struct.unpack_from("<I", data)
        return struct.pack("<I", len(other)) + other + data[4 + size :]

    tally = SecureSum(ROSTER, terms(), PROTECTION).open(PLAN, list(SIZES))
    drive(tally, seals(), PLAN, measured, request, refused)
    assert list(refused) == [("advertise", "c3")]
    assert "client c3 did not sign this key" in str(refused["advertise", "c3"])


@pytest.mark.parametrize(
    ("protection", "policy", "what"),
    [
        (Protection(0.0, 0.3, least=3), Policy(least=7, corrupt=0.0), "policy asks for 7"),
        (Protection(0.0, 0.3), Policy(least=3, corrupt=0.4), "policy asks for 3"),
        (Protection(0.0, 0.0), Policy(least=9, corrupt=0.0), "policy asks for 9"),
    ],
)
def test_an_offer_below_a_clients_own_policy(protection, policy, what):
    one = SecureSeal("c0", IDENTITIES["c0"], ROSTER, policy)
    stage = next(SecureSum(ROSTER, terms(), protection).open(PLAN, list(SIZES)).stages())
    with pytest.raises(SecurityError, match=what):
        one.reply("advertise", stage.requests["c0"], PLAN, measured)


def test_noise_that_counts_on_more_than_are_sure_to_be_there():
    """Shares of the noise: never more than the clients that hide each other."""
    for shares, fits in ((3, True), (8, False)):
        privacy = Privacy("client", 1.0, 1.0, shares=shares)
        stage = next(SecureSum(ROSTER, terms(privacy=privacy), PROTECTION).open(PLAN, list(SIZES)).stages())
        one = seal("c0")
        if fits:
            one.reply("advertise", stage.requests["c0"], PLAN, measured)
            continue
        with pytest.raises(SecurityError, match="the noise counts on 8 honest clients"):
            one.reply("advertise", stage.requests["c0"], PLAN, measured)


@pytest.mark.parametrize("multiplier", [None, 0.5])
def test_less_noise_than_a_client_asks_for(multiplier):
    privacy = None if multiplier is None else Privacy("client", 1.0, multiplier)
    stage = next(SecureSum(ROSTER, terms(privacy=privacy), PROTECTION).open(PLAN, list(SIZES)).stages())
    with pytest.raises(SecurityError, match=f"noise multiplier {multiplier or 0.0} was proposed"):
        seal("c0", least_noise=1.0).reply("advertise", stage.requests["c0"], PLAN, measured)


def test_terms_that_can_overflow_are_refused_before_a_key_is_made():
    good = terms(32)
    data = bytearray(good.encode())
    at = data.index(struct.pack("<IQ", good.cohort, good.largest_weight))
    struct.pack_into("<I", data, at, 1 << 20)
    offer = next(SecureSum(ROSTER, good, PROTECTION).open(PLAN, list(SIZES)).stages()).requests["c0"]
    (size,) = struct.unpack_from("<I", offer)
    one = seal("c0")
    with pytest.raises(MessageError, match="overflow a ring of 32 bits"):
        one.reply("advertise", struct.pack("<I", size) + bytes(data) + offer[4 + size :], PLAN, measured)
    assert one._session._opening is None


def test_what_does_not_measure_is_not_answered():
    """NaN, too many samples: the measurement's own error, and a sum of the others."""
    one, refused = seals(), {}
    tally = SecureSum(ROSTER, terms(), PROTECTION).open(PLAN, list(SIZES))

    def measure(name, found):
        if name == "c1":
            return found.prepare(PLAN, np.full(K, np.nan, np.float32), 5)
        if name == "c2":
            return found.prepare(PLAN, VALUES, 17)
        return measured(name, found)

    total = drive(tally, one, PLAN, measure, refused=refused)
    assert "NaN" in str(refused[ANSWER, "c1"])
    assert "17 samples exceed the largest weight" in str(refused[ANSWER, "c2"])
    assert len(total.values) == K
    sick = clients(True, runtime=type("Sick", (Slope,), {"factor": np.nan})())
    server = Server(Slope(), SteinEstimator(K, 1e-3), aggregator=SecureSum(ROSTER, terms(), PROTECTION))
    with pytest.raises(LossError):
        list(simulate(server, sick, rounds=1))


def test_a_vector_outside_the_terms_is_refused_as_a_sum():
    """Nobody sees one answer, so a client can send what it likes; what no honest clients give is no sum."""
    for lie in (
        np.full(K + 1, 1 << 63, np.uint64),
        np.append(np.full(K, 1 << 60, np.uint64), np.uint64(1)),
        np.append(np.zeros(K, np.uint64), np.uint64(1 << 20)),
    ):
        tally = SecureSum(ROSTER, terms(), PROTECTION).open(PLAN, list(SIZES))
        with pytest.raises(AggregationError, match="outside what honest answers can give"):
            drive(tally, seals(), PLAN, lambda name, t, lie=lie: lie if name == "c4" else measured(name, t))


def test_a_vector_of_another_length_is_that_clients_loss():
    refused = {}
    tally = SecureSum(ROSTER, terms(), PROTECTION).open(PLAN, list(SIZES))
    drive(
        tally,
        seals(),
        PLAN,
        lambda name, t: np.zeros(K + 2, np.uint64) if name == "c0" else measured(name, t),
        refused=refused,
    )
    assert list(refused) == [(ANSWER, "c0")]
    assert "a masked vector of" in str(refused[ANSWER, "c0"])


def test_the_masked_sum_is_bound_to_everything_that_plan_and_terms_say():
    base, found = PLAN, terms()
    digests = {binding_of(base, found)}
    for other in (
        changed_plan(seed=b"s" * 32),
        changed_plan(weights_digest=b"w" * 32),
        changed_plan(round=3),
        changed_plan(estimator=SteinEstimator(K + 1, 1e-3)),
        changed_plan(estimator=SteinEstimator(K, 1.1e-3)),
        changed_plan(estimator=SteinEstimator(K, 1e-3, "central")),
        changed_plan(batch_size=5),
    ):
        digests.add(binding_of(other, found))
    for other_terms in (
        terms(32),
        terms(cohort=7),
        terms(largest_weight=15),
        terms(levels=(2, 6)),
        terms(privacy=Privacy("client", 1.0, 1.0)),
        terms(privacy=Privacy("client", 1.0, 1.5)),
        terms(privacy=Privacy("client", 0.5, 1.0)),
        terms(privacy=Privacy("client", 1.0, 1.0, shares=2)),
        terms(fixed_point=FixedPoint(64, 20, 64.0)),
        terms(fixed_point=FixedPoint(64, 20, 32.0)),
    ):
        digests.add(binding_of(base, other_terms))
    assert len(digests) == 18


# -- replay ------------------------------------------------------------------------------------------


def ledger_of(tmp_path):
    return FileLedger(tmp_path / "ledger")


def one_round(seals_, plan=PLAN, job=bytes(32), names=None):
    tally = SecureSum(ROSTER, terms(), PROTECTION, job=job).open(plan, names or list(SIZES))
    return drive(tally, seals_, plan, lambda name, t: t.prepare(plan, VALUES, SIZES[name]))


def test_a_round_is_answered_once_in_one_process_and_in_the_next(tmp_path):
    ledger = ledger_of(tmp_path)
    members = {**seals(), "c0": seal("c0", ledger=ledger)}
    one_round(members, changed_plan(round=4))
    later = {"round": 5, "weights_digest": b"w" * 32}
    for _ in range(2):  # the second time, all but the ledger are fresh
        for old in (4, 3, 0):
            with pytest.raises(SecurityError, match=f"round {old} was asked for again: round 4"):
                one_round(members, changed_plan(round=old))
        ledger.close()
        ledger = ledger_of(tmp_path)
        members = {**seals(), "c0": seal("c0", ledger=ledger)}
    one_round(members, changed_plan(**later))
    ledger.close()


def test_the_same_question_in_another_job_is_refused():
    members = seals()
    one_round(members, job=b"a" * 32)
    with pytest.raises(SecurityError, match="round 0: this seed was answered before, in another job: take"):
        one_round(members, job=b"b" * 32)
    one_round(members, changed_plan(seed=b"s" * 32), job=b"b" * 32)  # one seed for each job
    one_round(members, changed_plan(round=1), job=b"a" * 32)  # which gives each round its directions


@pytest.mark.parametrize(
    "change",
    [{"estimator": SteinEstimator(K, 1.5e-3)}, {"batch_size": 5}, {"weights_digest": b"w" * 32}],
    ids=["sigma", "batch size", "weights"],
)
def test_the_same_directions_at_another_sigma_batch_or_weights_are_the_same_question(change):
    members = seals()
    one_round(members, job=b"a" * 32)
    with pytest.raises(SecurityError, match="this seed was answered before, in another job"):
        one_round(members, changed_plan(**change), job=b"b" * 32)


@pytest.mark.parametrize("kind", [MemoryLedger, ledger_of])
def test_what_a_ledger_refuses(kind, tmp_path):
    ledger = kind(tmp_path) if kind is ledger_of else kind()
    jobs = b"a" * 32, b"b" * 32
    ledger.record(jobs[0], 7, b"x" * 32)
    for round_, asked, what in [
        (7, b"y" * 32, "round 7 was asked for again: round 7"),
        (0, b"y" * 32, "round 0 was asked for again: round 7"),
        (8, b"x" * 32, "answered before"),
    ]:
        with pytest.raises(SecurityError, match=what):
            ledger.record(jobs[0], round_, asked)
    with pytest.raises(SecurityError, match="answered before"):
        ledger.record(jobs[1], 0, b"x" * 32)
    ledger.record(jobs[1], 0, b"y" * 32)
    ledger.record(jobs[0], 8, b"z" * 32)


CHILD = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from baffle.secure import FileLedger
    ledger = FileLedger(Path(sys.argv[1]))
    ledger.record(b"j" * 32, 5, b"x" * 32)
    print("recorded", flush=True)
    sys.stdin.read()  # the answer never leaves
    """
)


def test_a_process_killed_between_record_and_answer_does_not_answer_again(tmp_path):
    path = tmp_path / "ledger"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"recorded\n"
        with pytest.raises(DataError, match="another process uses this ledger"):
            FileLedger(path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    ledger = FileLedger(path)
    with pytest.raises(SecurityError, match="round 5 was asked for again"):
        ledger.record(b"j" * 32, 5, b"y" * 32)
    with pytest.raises(SecurityError, match="answered before"):
        ledger.record(b"j" * 32, 6, b"x" * 32)
    ledger.record(b"j" * 32, 6, b"y" * 32)
    ledger.close()


def test_a_line_cut_short_was_never_answered(tmp_path):
    ledger = ledger_of(tmp_path)
    ledger.record(b"j" * 32, 1, b"x" * 32)
    ledger.close()
    path = tmp_path / "ledger"
    whole = path.read_bytes()
    for cut in (1, 40, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        ledger = FileLedger(path)
        with pytest.raises(SecurityError, match="round 1"):
            ledger.record(b"j" * 32, 1, b"y" * 32)
        ledger.close()
        assert path.read_bytes() == whole
    ledger = FileLedger(path)
    ledger.record(b"j" * 32, 2, b"y" * 32)
    ledger.close()
    FileLedger(path).close()


@pytest.mark.parametrize(
    "line",
    [b"", b"nonsense", b"00 1 zz", b"00 -1 00", b"00 x 00", b"\xff\xfe", b"00 1 00 00", b"00 1 00\n00 1 01"],
)
def test_a_damaged_ledger_is_named(line, tmp_path):
    path = tmp_path / "ledger"
    path.write_bytes(line + b"\n")
    with pytest.raises(DataError, match=r"ledger .*ledger is damaged at line [12]"):
        FileLedger(path)
    path.write_bytes(b"")
    FileLedger(path).close()  # and is let go of, so that it can be mended


def test_a_folder_or_no_folder_for_a_ledger(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "ledger"):
        with pytest.raises(DataError, match="cannot use the ledger"):
            FileLedger(path)


FULL = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    from baffle.errors import DataError
    from baffle.secure import FileLedger
    ledger = FileLedger(Path(sys.argv[1]))
    ledger.record(b"j" * 32, 1, b"x" * 32)
    size = Path(sys.argv[1]).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        ledger.record(b"j" * 32, 2, b"y" * 32)
    except DataError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ledger.record(b"j" * 32, 3, b"z" * 32)  # there is room again
    """
)


@pytest.mark.parametrize("room", [0, 1, 64, 65, 100])
def test_a_full_disk_is_named_and_the_ledger_is_whole_afterwards(room, tmp_path):
    path = tmp_path / "ledger"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(room)], capture_output=True, text=True, check=True
    )
    assert f"cannot write the ledger {path}" in done.stdout
    ledger = FileLedger(path)  # what was written in part does not damage what follows
    with pytest.raises(SecurityError, match="round 3 of this job"):
        ledger.record(b"j" * 32, 3, b"w" * 32)
    ledger.close()


def test_a_ledger_that_cannot_be_written_answers_nothing():
    class Full(MemoryLedger):
        def record(self, job, round_, asked):
            raise DataError("cannot write the ledger: No space left on device")

    members, refused = {**seals(), "c0": seal("c0", ledger=Full())}, {}
    tally = SecureSum(ROSTER, terms(), PROTECTION).open(PLAN, list(SIZES))
    drive(tally, members, PLAN, measured, refused=refused)
    assert list(refused) == [(ANSWER, "c0")]
    assert "No space left" in str(refused[ANSWER, "c0"])
    assert members["c0"]._session._answered is None


# -- doubts: what the design does not stop ------------------------------------------------------------


def total_of(seals_, plan, names, job):
    """The decoded sum of weights and values: Σ N_c v_c, as a server has it before it divides."""
    aggregator = SecureSum(ROSTER, terms(), Protection(0.0, 0.2), job=job)
    tally = aggregator.open(plan, names)
    found = drive(
        tally, seals_, plan, lambda name, t: t.prepare(plan, VALUES * (1 + int(name[1])), SIZES[name])
    )
    return found.values * sum(SIZES[name] for name in names)


def test_two_cohorts_asked_the_same_in_two_jobs_do_not_differ_by_one_client():
    """A weight that matters to no loss is changed, and a client left out: the difference is its answer.

    It is not given: a (seed, round) is answered once, whatever the job and the weights.
    """
    members = seals()
    total_of(members, PLAN, list(SIZES), b"a" * 32)
    other, without = changed_plan(weights_digest=b"w" * 32), list(SIZES)[1:]
    with pytest.raises(SecurityError, match="this seed was answered before, in another job"):
        total_of(members, other, without, b"b" * 32)
    with pytest.raises(SecurityError, match="round 0 was asked for again"):
        total_of(members, other, without, b"a" * 32)
    # Clients that forget would give it away: so the difference is what the ledger protects.
    everybody = total_of(seals(), PLAN, list(SIZES), b"a" * 32)
    others = total_of(seals(), other, without, b"b" * 32)
    assert np.allclose(everybody - others, SIZES["c0"] * VALUES, atol=1e-3)


def offer(found, job=bytes(32), plan=PLAN):
    """The server's half, and what it says to client 0 first."""
    stages = SecureSum(ROSTER, found, PROTECTION, job=job).open(plan, list(SIZES)).stages()
    return next(stages).requests["c0"]


def test_levels_are_refused_by_a_client_that_does_not_allow_them():
    found = terms(levels=(2, K))
    one = seal("c0")
    with pytest.raises(SecurityError, match=r"client c0: the terms have levels, .* may be a single client's"):
        one.reply("advertise", offer(found), PLAN, measured)
    one.reply("advertise", offer(terms(levels=(K,))), PLAN, measured)  # one level: all answer all of it
    seal("c0", levels=True).reply("advertise", offer(found), PLAN, measured)
    _, (record,) = run(SecureSum(ROSTER, found, PROTECTION), 1, budgets=BUDGETS)
    assert record.total is None
    assert "0 of 8 clients advertised keys" in record.aborted


def test_a_level_that_one_client_reaches_alone_is_shown_to_who_allows_levels():
    """The known hole of ``levels=True``: the sum beyond a level that one client reaches is its answer."""
    found = terms(levels=(2, K))
    budgets = {name: 2 for name in SIZES if name != "c0"}
    _, records = run(SecureSum(ROSTER, found, PROTECTION), 1, budgets=budgets, levels=True, batch_size=0)
    alone = Client("c0", Slope(), Points(SIZES["c0"], 0), seed=1)
    plan = records[0].plan
    model = Server(Slope(), SteinEstimator(K, 1e-3), seed=2, batch_size=0).model()
    answer = alone._result(Download.decode(plan.encode(), model.encode()))
    step = 2.0**-found.fixed_point.fraction_bits
    assert np.allclose(records[0].total.values[2:], answer.values[2:], rtol=1e-6, atol=step)
    assert not np.allclose(records[0].total.values[:2], answer.values[:2], rtol=1e-3)


def test_a_client_works_for_the_job_that_was_pinned_and_for_no_other():
    members = seals(job=b"a" * 32)
    refused = {}
    with contextlib.suppress(AggregationError):
        tally = SecureSum(ROSTER, terms(), PROTECTION, job=b"b" * 32).open(PLAN, list(SIZES))
        drive(tally, members, PLAN, measured, refused=refused)
    assert set(refused) == {("advertise", name) for name in SIZES}
    for name in SIZES:
        what = f"client {name}: another job than the one that it works for"
        assert what in str(refused["advertise", name])
    one_round(members, job=b"a" * 32)


REFUSED = {  # what a client insists on; terms and job that it refuses, and those that it takes
    "job": ({"job": b"a" * 32}, ({}, b"b" * 32), ({}, b"a" * 32)),
    "levels": ({}, ({"levels": (2, K)}, b"a" * 32), ({"levels": (K,)}, b"a" * 32)),
    "least noise": (
        {"least_noise": 1.0},
        ({"privacy": Privacy("client", 1.0, 0.5)}, b"a" * 32),
        ({"privacy": Privacy("client", 1.0, 1.0)}, b"a" * 32),
    ),
    "shares of noise": ({}, ({"privacy": Privacy("client", 1.0, 1.0, shares=8)}, b"a" * 32), ({}, b"a" * 32)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_offer_that_was_refused_is_forgotten(case):
    """Nothing that is said to it later leads on from there; and it takes the next good offer."""
    insists, (bad, job), (good, its_job) = REFUSED[case]
    one, asked = seal("c0", **insists), []
    with pytest.raises(SecurityError):
        one.reply("advertise", offer(terms(**bad), job), PLAN, asked.append)
    session = one._session
    assert session._opening is session._session is session._secrets is session._answered is None
    for stage, what in [
        ("choose", "no session has begun"),
        ("share", "no session has begun"),
        ("confirm", "takes part in no session"),
        ("unmask", "takes part in no session"),
        (ANSWER, "in the clear"),
    ]:
        with pytest.raises(SecurityError, match=what):
            one.reply(stage, bytes(64), PLAN, asked.append)
    assert asked == []
    one.reply("advertise", offer(terms(**good), its_job), PLAN, asked.append)
    assert session._opening is not None


def test_a_session_that_stands_ends_with_an_offer_that_was_refused():
    """Between its answer and the opening: then nothing of that round opens either."""
    members, asked = seals(), []
    tally = SecureSum(ROSTER, terms(), PROTECTION).open(PLAN, list(SIZES))

    def request(stage, name, data):
        if (stage, name) == ("unmask", "c0"):
            with pytest.raises(SecurityError, match="the terms have levels"):
                members["c0"].reply("advertise", offer(terms(levels=(2, K))), PLAN, asked.append)
        return data

    refused = {}
    drive(tally, members, PLAN, measured, request, refused)
    assert list(refused) == [("unmask", "c0")]
    assert "takes part in no session" in str(refused["unmask", "c0"])
    assert asked == []


def test_clients_that_start_again_do_not_stop_a_job_for_the_rest_of_a_session():
    """Half of them lose their keys after round 0: a round or two may be lost, and the next has new keys."""
    members, aggregator = seals(), SecureSum(ROSTER, terms(), replace(PROTECTION, rounds=100))
    sums = []
    for number in range(4):
        plan = changed_plan(round=number)
        with contextlib.suppress(AggregationError):
            drive(aggregator.open(plan, list(SIZES)), members, plan, measured_by(plan), refused={})
            sums.append(number)
        if number == 0:
            members.update({name: seal(name) for name in list(SIZES)[:4]})
    assert sums[0] == 0
    assert 3 in sums


def measured_by(plan):
    return lambda name, found: found.prepare(plan, VALUES, SIZES[name])


garbage = st.binary(max_size=200)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_garbage_to_a_seal_ends_in_an_error_of_ours(data):
    """Before a session, in one, and with requests that were true before they were changed."""
    one, tally = seals(), SecureSum(ROSTER, terms(), PROTECTION).open(PLAN, list(SIZES))
    seen = data.draw(st.sampled_from(["advertise", "share", "answer", "unmask"]))
    where, what = data.draw(st.integers(0, 10**6)), data.draw(garbage)
    for stage in tally.stages():
        for name, request in stage.requests.items():
            if stage.name == seen and name == "c2":
                at = where % (len(request) + 1)
                for changed in (what, request[:at], request[:at] + what, request[:at] + what + request[at:]):
                    if changed == request:
                        continue
                    with contextlib.suppress(BaffleError):
                        one[name].reply(stage.name, changed, PLAN, lambda t: measured("c2", t))
            with contextlib.suppress(BaffleError):
                answer = one[name].reply(stage.name, request, PLAN, lambda t, n=name: measured(n, t))
                tally.add(name, answer)
    with contextlib.suppress(AggregationError):
        tally.close()
