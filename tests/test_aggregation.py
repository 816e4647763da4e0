"""The seam: stages, tallies and seals; the in-process driver over aggregators of one stage and of several."""

import itertools
import struct
from fractions import Fraction

import numpy as np
import pytest

from baffle.aggregation import ANSWER, IntegerSum, OpenSeal, PlainSum, Stage
from baffle.client import Client, Download
from baffle.errors import AggregationError, BaffleError, ConfigError, LossError, MessageError, SecurityError
from baffle.estimator import SteinEstimator
from baffle.fixedpoint import FixedPoint
from baffle.plan import LocalTraining, RoundResult
from baffle.privacy import Privacy
from baffle.server import Server
from baffle.simulation import simulate
from baffle.terms import RingResult, Terms
from tests.contracts.slope import K, N, Points, Slope

SIZES = {"anna": 11, "bo": 5, "cleo": 24, "dora": 8}
BUDGETS = {"anna": 2, "bo": None, "cleo": 5, "dora": 4}
POINT = FixedPoint.fitting(4, 24, 64.0)


def terms(**options):
    return Terms(**{"fixed_point": POINT, "cohort": 4, "largest_weight": 24, **options})


def federation(budgets=None, runtime=None, **options):
    runtime = runtime or Slope()
    return [
        Client(name, runtime, Points(n, i), seed=1, max_directions=(budgets or {}).get(name), **options)
        for i, (name, n) in enumerate(SIZES.items())
    ]


def server(aggregator=None, **options):
    estimator = SteinEstimator(K, 1e-3)
    return Server(Slope(), estimator, **{"seed": 2, "batch_size": 4, "aggregator": aggregator, **options})


def run(s, clients, rounds=1, **options):
    return list(simulate(s, clients, rounds=rounds, **options))


def download(s):
    return Download.decode(s.plan().encode(), s.model().encode())


# -- IntegerSum and PlainSum -----------------------------------------------------------------------------

WAYS = [
    {},
    {"local": LocalTraining(1, 0.01)},
    {"fidelity": "law"},
    {"fidelity": "backprop"},
    {"fidelity": "backprop", "local": LocalTraining(1, 0.01)},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_integer_sums_are_plain_sums_on_a_grid(options):
    coarse = terms(fixed_point=FixedPoint(64, 12, 64.0))  # float32 slopes lie on finer ones already
    there = run(server(**options), federation())[0]
    here = run(server(IntegerSum(coarse), **options), federation())[0]
    # Half a step of the grid, and the roundings of a float64 sum.
    bound = 2.0**-13 + 8 * 2.0**-53 * np.abs(there.total.values).max()
    assert 2.0**-16 < np.abs(here.total.values - there.total.values).max() <= bound
    assert (here.loss, here.forward_passes) == (there.loss, there.forward_passes)
    assert (here.participants, here.dropped, here.aborted) == (4, 0, None)


@pytest.mark.parametrize("levels", [(), (2, 4, 5, 6)])
def test_integers_agree_exactly(levels):
    """From the slopes that PlainSum is sent, in Python's integers."""
    s = server(IntegerSum(terms(levels=levels)))
    clients = federation(BUDGETS if levels else None)
    sent = {c.name: RoundResult.decode(c.answer_to(download(s))) for c in clients}
    total = run(s, clients)[0].total.values
    for k in range(K):
        able = [r for r in sent.values() if len(r.values) > k]
        integers = [r.samples * round(Fraction(float(r.values[k])) * 2**POINT.fraction_bits) for r in able]
        exact = Fraction(sum(integers), 2**POINT.fraction_bits * sum(r.samples for r in able))
        assert total[k] == pytest.approx(float(exact), rel=2**-51, abs=0)
    if levels:
        assert sorted(len(r.values) for r in sent.values()) == [2, 4, 5, 6]


@pytest.mark.parametrize("options", [{}, {"local": LocalTraining(1, 0.01)}], ids=str)
def test_any_order_of_adds_gives_the_same_bits(options):
    s = server(IntegerSum(terms()), **options)
    request = terms().encode()
    sent = {c.name: c.reply(ANSWER, request, download(s)) for c in federation()}
    sums = set()
    for order in itertools.permutations(sent):
        tally = s.aggregator.open(s.plan(), list(SIZES))
        (stage,) = tally.stages()
        assert stage == Stage(ANSWER, dict.fromkeys(SIZES, request))
        for name in order:
            tally.add(name, sent[name])
        sums.add(tally.close().values.tobytes())
    assert len(sums) == 1
    results = {name: RingResult.decode(answer) for name, answer in sent.items()}
    assert s.step(results).values.tobytes() in sums
    assert s.round == 1


def test_levels_cut_what_nobody_reached_and_refuse_a_budget_below():
    s = server(IntegerSum(terms(levels=(2, 4, 6))))
    budgets = {**BUDGETS, "bo": 5}
    (record,) = run(s, federation(budgets))
    assert len(record.total.values) == 4
    assert record.forward_passes == 2 + 4 + 4 + 4 + 4  # K_c + 1 each
    for levels, least in (((4, 6), 4), ((), 6)):
        s = server(IntegerSum(terms(levels=levels)))
        with pytest.raises(ConfigError, match=f"client anna, round 0: a budget of 2 .* {least}"):
            run(s, federation(budgets))


def test_a_client_with_more_samples_than_fit_refuses_before_it_measures():
    s = server(IntegerSum(terms(largest_weight=23)))
    clients = federation()
    with pytest.raises(ConfigError, match=r"client cleo, round 0: 24 samples exceed .* 23"):
        run(s, clients)
    assert clients[1].observed.forward_passes == 7
    assert clients[2].observed.forward_passes == 0


def test_a_number_that_is_not_finite_is_a_loss_error():
    huge = Slope()
    huge.factor = 1e42  # a float64 that float32 cannot hold
    s = server(IntegerSum(terms()))
    with pytest.raises(LossError, match="client anna, round 0: an answer holds a number that is not finite"):
        federation(runtime=huge)[0].reply(ANSWER, terms().encode(), download(s))


def test_a_ring_tally_refuses_and_stays_as_it_was():
    s, other = server(IntegerSum(terms())), server(seed=9)
    plan = s.plan()
    tally = s.aggregator.open(plan, list(SIZES))
    with pytest.raises(AggregationError, match="no client"):
        tally.close()
    request = terms().encode()
    sent = {c.name: c.reply(ANSWER, request, download(s)) for c in federation()}
    tally.add("cleo", sent["cleo"])
    good = RingResult.decode(sent["anna"])

    def changed(**options):
        fields = {name: getattr(good, name) for name in ("round", "plan_digest", "terms_digest", "residues")}
        return RingResult(**{**fields, **options}).encode()

    for name, answer, error, why in [
        ("anna", federation()[0].answer_to(download(s)), MessageError, "kind 6"),
        ("anna", sent["anna"][:-1], MessageError, "short"),
        ("anna", changed(round=1), AggregationError, "another plan"),
        ("anna", changed(plan_digest=other.plan().digest), AggregationError, "another plan"),
        ("anna", changed(terms_digest=bytes(32)), AggregationError, "other terms"),
        ("anna", changed(residues=good.residues.astype(np.uint32)), AggregationError, "other terms"),
        ("anna", changed(residues=good.residues[:-1]), AggregationError, "6 residues where 7"),
        ("anna", changed(residues=np.append(good.residues, good.residues)), AggregationError, "14 residues"),
        ("cleo", sent["cleo"], AggregationError, "twice"),
        ("eve", sent["anna"], AggregationError, "cohort"),
    ]:
        with pytest.raises(error, match=why):
            tally.add(name, answer)
    tally.add("anna", sent["anna"])
    got = tally.close().values
    again = server(IntegerSum(terms()))
    (record,) = run(again, federation(), drops=lambda _, name: name in ("bo", "dora"))
    assert got.tobytes() == record.total.values.tobytes()
    with pytest.raises(ConfigError, match="5 clients"):
        s.aggregator.open(plan, [*SIZES, "eve"])
    with pytest.raises(ConfigError, match="last level"):
        IntegerSum(terms(levels=(2, 7))).open(plan, list(SIZES))
    lone = s.aggregator.open(server(local=LocalTraining()).plan(), ["anna"])
    empty = RingResult(0, server(local=LocalTraining()).plan().digest, good.terms_digest, good.residues[:1])
    with pytest.raises(AggregationError, match="1 residues"):
        lone.add("anna", empty.encode())


def test_ring_answers_that_cannot_be_are_an_aborted_round():
    """A client lies with a residue out of range: no sum, a reason, and the next round runs."""

    class Liar(OpenSeal):
        def reply(self, stage, request, plan, measure):
            result = RingResult.decode(super().reply(stage, request, plan, measure))
            if plan.round == 0:
                result.residues[0] = 2**62
            return result.encode()

    s = server(IntegerSum(terms()))
    clients = federation()
    clients[1].seal = Liar()
    before = s.weights
    first, second = run(s, clients, 2)
    assert first.total is None
    assert "told something else, or lies" in first.aborted
    assert first.as_dict()["aborted"] == first.aborted
    assert (first.participants, first.dropped) == (4, 4)
    assert second.total is not None
    assert "aborted" not in second.as_dict()
    assert not np.array_equal(s.weights, before)


# -- bytes, drops ----------------------------------------------------------------------------------------


def test_requests_are_counted_down_and_ring_answers_up():
    s = server(IntegerSum(terms()))
    plan, model = len(s.plan().encode()), 14 + 4 * N
    asked = []
    (record,) = run(s, federation(), drops=lambda r, name: bool(asked.append(name)) or name == "cleo")
    assert asked == sorted(SIZES)
    assert record.bytes_down == 4 * (29 + plan + model + len(terms().encode()))
    assert record.bytes_up == 3 * (27 + 83 + 8 * (K + 1))
    assert (record.participants, record.dropped, record.forward_passes) == (4, 1, 4 * (K + 1))
    law = server(IntegerSum(terms()), fidelity="law")
    assert run(law, federation())[0].bytes_up == 4 * (27 + 58 + 4 * K)  # a gradient stands for those


def test_a_round_that_nobody_answers():
    s = server(IntegerSum(terms()))
    first, second = run(s, federation(), 2, drops=lambda round_, _: round_ == 0)
    assert (first.total, first.aborted, first.dropped, first.bytes_up) == (None, None, 4, 0)
    assert np.isnan(first.loss)
    assert second.total is not None
    with pytest.raises(AggregationError, match="no client"):
        s.step({})


# -- several stages --------------------------------------------------------------------------------------


class Echoes:
    """An aggregator of three stages around PlainSum: greet, answer, confirm; counts as it goes."""

    def __init__(self, least=0):
        self.inner, self.least, self.log = PlainSum(), least, []

    def open(self, plan, names):
        return _EchoTally(self, self.inner.open(plan, names), names)


class _EchoTally:
    def __init__(self, parent, inner, names):
        self.parent, self.inner, self.names, self.came = parent, inner, names, []

    def stages(self):
        yield self._stage("greet", self.names, b"hello ")
        yield self._stage(ANSWER, self.came, b"measure ")
        if len(self.came) < self.parent.least:
            raise SecurityError(f"{len(self.came)} clients are left, {self.parent.least} are needed")
        yield self._stage("confirm", self.came, b"thanks ")

    def _stage(self, name, names, words):
        self.name, names, self.came = name, list(names), []
        self.parent.log.append((name, names))
        return Stage(name, {each: words + each.encode() for each in names})

    def add(self, name, answer):
        if self.name == ANSWER:
            self.inner.add(name, answer)
        elif answer != f"{self.name}:{name}".encode():
            raise SecurityError("another echo")
        self.came.append(name)

    def close(self):
        return self.inner.close()


class EchoSeal:
    def __init__(self, name):
        self.name, self.measured = name, 0

    def reply(self, stage, request, plan, measure):
        assert request.split(b" ")[1].decode() == self.name
        if stage != ANSWER:
            return f"{stage}:{self.name}".encode()
        self.measured += 1
        return measure(None).encode()


def echoing():
    clients = federation()
    for client in clients:
        client.seal = EchoSeal(client.name)
    return clients


def test_the_driver_goes_through_all_stages_and_counts_them():
    s, clients = server(Echoes()), echoing()
    (record,) = run(s, clients, drops=lambda _, name: name == "bo")
    names, left = sorted(SIZES), ["anna", "cleo", "dora"]
    assert s.aggregator.log == [("greet", names), (ANSWER, names), ("confirm", left)]
    assert [c.seal.measured for c in clients] == [1] * 4
    plain = run(server(), federation(), drops=lambda _, name: name == "bo")[0]
    assert record.total.values.tobytes() == plain.total.values.tobytes()
    assert (record.loss, record.dropped, record.forward_passes) == (plain.loss, 1, 4 * (K + 1))
    letters, plan = sum(map(len, names)), len(record.plan.encode())
    # Two stages more than a plain round: in their envelopes 23 bytes, the name of the stage and the plan.
    requests = 4 * 6 + letters + 4 * 8 + letters + 3 * 7 + letters - 2
    envelopes = 4 * (23 + plan + len("greet")) + 3 * (23 + plan + len("confirm"))
    assert record.bytes_down - plain.bytes_down == requests + envelopes
    assert record.bytes_up - plain.bytes_up == 4 * 6 + letters + 3 * 8 + letters - 2 + (4 + 3) * 27
    assert [(s.name, s.asked, s.answered) for s in record.stages] == [
        ("greet", 4, 4),
        (ANSWER, 4, 3),
        ("confirm", 3, 3),
    ]
    assert record.as_dict()["dropouts"] == {ANSWER: {"simulated": 1}}


def test_a_stage_that_refuses_to_go_on_aborts_the_round_with_its_reason():
    s, clients = server(Echoes(least=3)), echoing()
    drops = lambda round_, name: round_ == 0 and name != "anna"  # noqa: E731
    first, second = run(s, clients, 2, drops=drops)
    assert (first.total, first.dropped) == (None, 4)
    assert first.aborted == "1 clients are left, 3 are needed"
    assert second.total is not None
    assert s.round == 2


def test_step_says_who_must_drive_several_stages():
    s = server(Echoes())
    sent = {c.name: RoundResult.decode(c.answer_to(download(s))) for c in federation()}
    for aggregator in (s.aggregator, _AnswerFirst()):
        s.aggregator = aggregator
        with pytest.raises(ConfigError, match=r"several times a round: run it with simulate"):
            s.step(sent)
        assert s.round == 0


class _AnswerFirst(Echoes):
    def open(self, plan, names):
        inner = PlainSum().open(plan, names)
        ask = inner.stages
        inner.stages = lambda: itertools.chain(ask(), [Stage("confirm", {})])
        return inner


# -- a client's half -------------------------------------------------------------------------------------


def test_an_open_seal_knows_one_stage():
    s, client = server(), federation()[0]
    down = download(s)
    assert client.reply(ANSWER, b"", down) == client.answer_to(down)
    for stage in ("advertise", "unmask", ""):
        with pytest.raises(ConfigError, match="in the clear"):
            client.reply(stage, b"", down)
    for request in (b"x", terms().encode()[:-1], s.plan().encode()):
        with pytest.raises(MessageError):
            client.reply(ANSWER, request, down)
    assert client.observed.forward_passes == 7  # of the first reply


def test_stages_before_the_answer_need_no_model():
    s = server()
    early, client = Download.decode(s.plan().encode()), echoing()[0]
    assert client.reply("greet", b"hello anna", early) == b"greet:anna"
    with pytest.raises(BaffleError, match="ask the server for the model"):
        client.reply(ANSWER, b"hello anna", early)


def test_terms_that_do_not_fit_the_plan_are_refused_by_name():
    s, client = server(), federation()[0]
    with pytest.raises(ConfigError, match="client anna, round 0: the last level"):
        client.reply(ANSWER, terms(levels=(2, 7)).encode(), download(s))
    unbounded = b"BFFL\1\5" + struct.pack("<BBdIQHB", 64, 32, 1024.0, 1000, 2**20, 0, 0)
    with pytest.raises(MessageError, match="overflow"):
        client.reply(ANSWER, unbounded, download(s))


def test_a_client_unit_is_clipped_and_noised():
    private = terms(privacy=Privacy("client", 0.5, 1.0, 1.0, 4))
    s = server(IntegerSum(private))
    (record,) = run(s, federation())
    again = server(IntegerSum(private))
    assert record.total.values.tolist() != run(again, federation())[0].total.values.tolist()
    # Four clipped vectors of norm 0.5 and noise of deviation 0.5 an entry, divided by 4.
    assert np.linalg.norm(record.total.values) < 0.5 + 8 * 0.125 * K**0.5
    quiet = terms(privacy=Privacy("client", 0.5, 0.001))
    update = server(IntegerSum(quiet), local=LocalTraining(1, 0.01))
    assert np.linalg.norm(run(update, federation())[0].total.values) < 0.51
