"""Local steps: K slopes of several points say what federated averaging sends n numbers for."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from baffle.aggregation import ANSWER, IntegerSum, PlainSum
from baffle.checkpoint import ScalarLog, replay
from baffle.cli import main as command
from baffle.client import Client, Download
from baffle.config import TrainConfig
from baffle.downlink import MODES
from baffle.endpoint import Endpoint
from baffle.errors import AggregationError, ConfigError, LossError
from baffle.estimator import SteinEstimator
from baffle.federation import run as run_rounds
from baffle.fixedpoint import FixedPoint
from baffle.job import build
from baffle.optimizers import Portable
from baffle.perturbations import Gaussian, Layout, LowRank, Rademacher, compiled, gaussian_table
from baffle.plan import LocalSteps, RoundPlan, RoundResult
from baffle.privacy import Privacy
from baffle.runtimes import Batch
from baffle.runtimes.torch import TorchArrays, TorchRuntime
from baffle.secagg.primitives import Identity
from baffle.secagg.session import Roster
from baffle.secure import Protection, SecureSeal, SecureSum
from baffle.server import Server
from baffle.simulation import random_drops, simulate
from baffle.stream import Stream, derive_seed, seed_from
from baffle.terms import Terms
from tests.contracts import slope

EPS = 2.0**-24  # one rounding to float32
SIGMA = 1e-3
SIZES = {"anna": 11, "bo": 5, "cleo": 24}
N = 43


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Points:
    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(count, 4)).astype(np.float32)
        self.y = (self.x[:, 0] > 0).astype(np.int64) + (self.x[:, 1] > 0.5)

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        return Batch(self.x[indices], self.y[indices])


def runtime():
    """In float64, so that weights and messages alone are rounded to float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TorchRuntime(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())


def federation(**options):
    shared = runtime()
    return [
        Client(name, shared, Points(n, seed), seed=1, **options)
        for seed, (name, n) in enumerate(SIZES.items())
    ]


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def server(directions, steps, *, scheme="forward", **options):
    estimator = SteinEstimator(directions, SIGMA, scheme)
    return Server(runtime(), estimator, **{"seed": 2, "batch_size": 4, "ema": 0.0, "steps": steps, **options})


# -- federated averaging, the slow way ---------------------------------------------------------------


def loss_at(flat, batch):
    """The network above in NumPy, float64."""
    A, a, B, b = flat[:20].reshape(5, 4), flat[20:25], flat[25:40].reshape(3, 5), flat[40:]
    scores = np.tanh(batch.inputs.astype(np.float64) @ A.T + a) @ B.T + b
    scores -= scores.max(axis=1, keepdims=True)
    logs = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), batch.targets]
    return float(logs.mean())


def direction(stream, k):
    """z_k, value by value from the words of the stream: the definition in docs/spec.md."""
    words, table = stream.words(k, 0, (N + 1) // 2), gaussian_table()
    halves = [int(words[i // 2]) >> 16 * (i % 2) & 0xFFFF for i in range(N)]
    return np.array([table[u] for u in halves]) / 4096


def batch_of(client, number):
    """Batch ``number`` of a client's endless row of permutations, 4 samples at a time."""
    count = len(client.samples)
    per_epoch = -(-count // 4)
    seed = derive_seed(seed_from(1), "order", client.name)
    order = Stream(seed, number // per_epoch).permutation(0, count)
    at = number % per_epoch * 4
    return client.samples.batch(order[at : at + 4])


def finite_difference(w, batch, z, scheme):
    if scheme == "tangent":  # so near to it that only float64's rounding is felt
        return (loss_at(w + 1e-6 * z, batch) - loss_at(w - 1e-6 * z, batch)) / 2e-6
    behind = w - SIGMA * z if scheme == "central" else w
    step = 2 * SIGMA if scheme == "central" else SIGMA
    return (loss_at(w + SIGMA * z, batch) - loss_at(behind, batch)) / step


def averaged(clients, w, round_, directions, count, rate, scheme):
    """One round of FedAvg: every client takes its steps alone and hands in all n weights."""
    total, stream = np.zeros(N), Stream(derive_seed(seed_from(2), "directions"), round_)
    for client in clients:
        own = w.copy()
        for t in range(count):
            batch, gradient = batch_of(client, round_ * count + t), np.zeros(N)
            for k in range(t * directions // count, (t + 1) * directions // count):
                z = direction(stream, k)
                gradient += finite_difference(own, batch, z, scheme) * z
            own -= rate * gradient / (directions // count)
        total += len(client.samples) * own
    return total / sum(SIZES.values())


@pytest.mark.parametrize(
    ("directions", "count", "scheme"),
    [(12, 2, "forward"), (12, 4, "central"), (12, 12, "forward"), (60, 5, "forward"), (12, 3, "tangent")],
)
def test_k_numbers_a_client_make_federated_averaging(directions, count, scheme):
    """With SGD of the rate S·η, the server's weights are the mean of the clients', which nobody sent."""
    rate, rounds = 0.05, 6
    steps = LocalSteps(count, rate)
    s, clients = server(directions, steps, scheme=scheme, optimizer=sgd(count * rate)), federation()
    records = list(simulate(s, clients, rounds=rounds))

    w = runtime().weights().astype(np.float64)
    for r in range(rounds):
        w = averaged(clients, w, r, directions, count, rate, scheme)
    # Slopes and weights are rounded to float32, at the clients too: some roundings a round, which SGD does
    # not amplify.
    atol = rounds * EPS * (1 + np.abs(w).max())
    np.testing.assert_allclose(s.weights, w, rtol=0, atol=atol + (1e-9 if scheme == "tangent" else 0))
    assert np.abs(w - runtime().weights()).max() > 0.05

    assert all(len(record.total.values) == directions for record in records)
    passes = directions + count if scheme == "forward" else 2 * directions
    assert {record.forward_passes for record in records} == {3 * passes}
    assert records[0].plan.forward_passes == passes

    # It matters where slopes are measured: all K at W end elsewhere.
    one = server(directions, None, scheme=scheme, optimizer=sgd(count * rate))
    list(simulate(one, federation(), rounds=rounds))
    assert np.abs(one.weights - w).max() > 1e4 * atol


def test_the_first_group_is_measured_as_ever_and_the_loss_is_the_mean_of_all():
    plain, steps = server(6, None), server(18, LocalSteps(3, 0.1))
    a, b = federation()[0], federation()[0]
    one = RoundResult.decode(a.answer(plain.plan().encode(), plain.model().encode())).values
    three = RoundResult.decode(b.answer(steps.plan().encode(), steps.model().encode())).values
    assert one.tobytes() == three[:6].tobytes()
    w, losses = runtime().weights().astype(np.float64), []
    stream = steps.plan().stream
    for t in range(3):
        losses.append(loss_at(w, batch_of(b, t)))
        for k in range(6 * t, 6 * t + 6):
            w = w - 0.1 * three[k] * direction(stream, k) / 6
    assert b.observed.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert b.observed.forward_passes == 3 * 7


def test_a_small_rate_measures_all_k_at_the_weights_themselves():
    """η → 0: S groups of other batches, and nothing else."""
    steps = server(12, LocalSteps(4, 1e-30), batch_size=0)
    plain = server(12, None, batch_size=0)
    for a, b in zip(federation(), federation(), strict=True):
        still = RoundResult.decode(a.answer(steps.plan().encode(), steps.model().encode())).values
        usual = RoundResult.decode(b.answer(plain.plan().encode(), plain.model().encode())).values
        # The same samples in the order of another permutation: sums of float64 in another order.
        np.testing.assert_allclose(still, usual, rtol=EPS, atol=24 * 2.0**-53 * 4 / SIGMA)


# -- gradients of a range of directions ---------------------------------------------------------------


@pytest.mark.parametrize("kind", [Gaussian(), Rademacher(), LowRank(3)], ids=lambda kind: kind.spec)
@pytest.mark.parametrize("first", [1, 7, (1 << 32) - 5])
@pytest.mark.parametrize("way", ["numpy", "kernel", "torch"])
def test_gradients_of_later_directions(kind, first, way, monkeypatch):
    """Against the normative sum over ``plain`` directions, bit for bit."""
    layout = Layout(("w", "b", "v"), ((70, 90), (), (400,)))
    stream, slopes = Stream(seed_from(3), 5), np.random.default_rng(1).normal(size=5)
    total = np.zeros(layout.n)
    for s, k in zip(slopes, range(first, first + 5), strict=True):
        total = kind.plain(stream, k, layout, 0, layout.n).astype(np.float64) * s + total
    expected = (total / 5).astype(np.float32)
    if way == "numpy":
        monkeypatch.setattr("baffle.estimator.compiled", lambda *_: None)
    elif way == "kernel":
        pytest.importorskip("numba")
        assert compiled(kind, layout) is not None
        monkeypatch.setattr("baffle.estimator.WORTH_A_KERNEL", 1)
    arrays = {"arrays": TorchArrays(torch.device("cpu"))} if way == "torch" else {}
    for options in ({}, {"chunk": 1000}) if way != "kernel" else ({"threads": 1}, {"threads": 2}):
        made = SteinEstimator(5, perturbation=kind).gradient(
            slopes, stream, layout, first=first, **options, **arrays
        )
        assert np.asarray(made).tobytes() == expected.tobytes()
    with pytest.raises(ConfigError, match="outside the stream"):
        SteinEstimator(5, perturbation=kind).gradient(slopes, stream, layout, first=(1 << 32) - 4, **arrays)


@pytest.mark.parametrize("scheme", ["forward", "central", "tangent"])
@pytest.mark.parametrize("kind", [Gaussian(), Rademacher(), LowRank(2)], ids=lambda kind: kind.spec)
@pytest.mark.parametrize("shape", ["narrow", "wide"])
def test_slopes_of_later_directions_are_those_of_the_whole_row(scheme, kind, shape):
    """By every way through the directions that a runtime has for these."""
    width = 6 if shape == "narrow" else 300
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        r = TorchRuntime(nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3)).double())
    rng = np.random.default_rng(0)
    batch, stream = Batch(rng.normal(size=(16, 8)), rng.integers(0, 3, 16)), Stream(seed_from(4), 2)
    whole = SteinEstimator(20, 1e-3, scheme, kind).slopes(r, r.weights(), batch, stream).slopes
    for first, stop in ((0, 7), (7, 8), (8, 20)):
        some = SteinEstimator(stop - first, 1e-3, scheme, kind)
        part = some.slopes(r, r.weights(), batch, stream, first=first).slopes
        np.testing.assert_allclose(part, whole[first:stop], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("scheme", "where"), [("forward", "loss at direction 5 of"), ("tangent", "along direction 5 of")]
)
def test_what_is_not_finite_is_named_by_its_place_in_the_round(scheme, where):
    class Spoiled(TorchRuntime):
        def losses(self, weights, batch, stream, perturbation, directions, scale):
            found = super().losses(weights, batch, stream, perturbation, directions, scale)
            return np.where(np.array(directions) == 5, np.nan, found)

        def derivatives(self, weights, batch, stream, perturbation, directions):
            loss, found = super().derivatives(weights, batch, stream, perturbation, directions)
            return loss, np.where(np.array(directions) == 5, np.nan, found)

    s = server(8, LocalSteps(4, 0.1), scheme=scheme)
    client = Client("anna", Spoiled(runtime().module), Points(5, 0))
    with pytest.raises(LossError, match=where):
        client.answer(s.plan().encode(), s.model().encode())


# -- sums -------------------------------------------------------------------------------------------

MEMBERS = {f"c{i}": 5 + 3 * (i % 4) for i in range(8)}
STEPS = LocalSteps(3, 0.5)  # K = 6


def terms(**options):
    point = FixedPoint.fitting(8, 16, 64.0)
    return Terms(**{"fixed_point": point, "cohort": 8, "largest_weight": 16, **options})


def sums(aggregator, rounds=4, drops=None, seals=None, **options):
    s = Server(
        slope.Slope(),
        SteinEstimator(slope.K, 1e-3),
        **{"seed": 2, "batch_size": 4, "aggregator": aggregator, "steps": STEPS, **options},
    )
    r = slope.Slope()
    clients = [
        Client(name, r, slope.Points(n, i), seed=1, seal=seals[name] if seals else None)
        for i, (name, n) in enumerate(MEMBERS.items())
    ]
    return s, list(simulate(s, clients, rounds=rounds, drops=drops))


def test_secure_sums_are_integer_sums_are_plain_sums():
    identities = {name: Identity.generate() for name in MEMBERS}
    roster = Roster({name: identity.public for name, identity in identities.items()})
    protection = Protection(corrupt=0.0, dropout=0.3, rounds=3)
    seals = {name: SecureSeal(name, identities[name], roster, protection.policy) for name in MEMBERS}
    drops = random_drops(0.15, seed=5)
    plain, in_floats = sums(PlainSum(), drops=drops)
    integer, in_the_ring = sums(IntegerSum(terms()), drops=drops)
    secure, sealed = sums(SecureSum(roster, terms(), protection), drops=drops, seals=seals)
    assert secure.weights.tobytes() == integer.weights.tobytes()
    assert any(record.dropped for record in sealed)
    assert {record.forward_passes for record in sealed} == {8 * 9}
    step = 2.0 ** -FixedPoint.fitting(8, 16, 64.0).fraction_bits
    np.testing.assert_allclose(in_the_ring[0].total.values, in_floats[0].total.values, rtol=1e-12, atol=step)
    np.testing.assert_allclose(plain.weights, integer.weights, rtol=0, atol=1e-5)
    assert np.abs(plain.weights - slope.Slope().weights()).max() > 0.01


def test_the_privacy_of_a_client_clips_the_whole_row():
    """With noise too small to be seen: the mean of the clients' rows, each within C."""
    clip, noise = 0.05, 1e-6
    privacy = Privacy("client", clip, noise, 1.0, 8)
    private = terms(largest_weight=1, privacy=privacy)
    _, (record,) = sums(IntegerSum(private), rounds=1)
    s = Server(slope.Slope(), SteinEstimator(slope.K, 1e-3), seed=2, batch_size=4, steps=STEPS)
    rows, s_plan, s_model = [], s.plan().encode(), s.model().encode()
    for i, (name, n) in enumerate(MEMBERS.items()):
        client = Client(name, slope.Slope(), slope.Points(n, i), seed=1)
        row = RoundResult.decode(client.answer(s_plan, s_model)).values.astype(np.float64)
        rows.append(row * min(1, clip / np.linalg.norm(row)))
    assert max(np.linalg.norm(row) for row in rows) == pytest.approx(clip)
    # Eight deviations of the noise, and the grid.
    bound = 8 * noise * clip / 8 + 2.0**-private.fixed_point.fraction_bits
    np.testing.assert_allclose(record.total.values, np.mean(rows, axis=0), rtol=0, atol=bound)


# -- refusals ----------------------------------------------------------------------------------------


def test_who_measures_fewer_directions_is_left_out():
    s = server(12, LocalSteps(3, 0.1))
    plan, model = s.plan().encode(), s.model().encode()
    with pytest.raises(ConfigError, match=r"client anna measures 11 directions at most: .* all K = 12"):
        federation(max_directions=11)[0].answer(plan, model)
    assert len(RoundResult.decode(federation(max_directions=12)[0].answer(plan, model)).values) == 12
    ring = IntegerSum(terms(cohort=3, largest_weight=24)).open(s.plan(), ["anna"])
    (request,) = next(ring.stages()).requests.values()
    with pytest.raises(ConfigError, match="budget of 11"):
        federation(max_directions=11)[0].reply(ANSWER, request, Download.decode(plan, model))


def test_a_short_row_is_no_part_of_a_sum():
    s = server(12, LocalSteps(3, 0.1))
    tally = s.aggregator.open(s.plan(), ["anna"])
    for count in (1, 4, 11):
        short = RoundResult(0, s.plan().digest, 11, np.ones(count, np.float32))
        with pytest.raises(AggregationError, match=f"sent {count} slopes of 12: local steps need all"):
            tally.add("anna", short.encode())
    tally.add("anna", RoundResult(0, s.plan().digest, 11, np.ones(12, np.float32)).encode())
    assert len(tally.close().values) == 12


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"levels": (6,)}, "levels are for clients that stop early"),
        ({"levels": (2, 6)}, "levels are for clients that stop early"),
        ({"privacy": Privacy("example", 1.0, 1.0, 0.5, 4)}, "privacy of an example needs one measurement"),
    ],
)
def test_terms_that_do_not_fit(options, why):
    found = terms(**options)
    with pytest.raises(ConfigError, match=why):
        sums(IntegerSum(found), rounds=1)
    plan = RoundPlan(0, bytes(32), SteinEstimator(6), bytes(32), steps=STEPS)
    with pytest.raises(ConfigError, match=why):
        found.check_plan(plan)
    found.check_plan(dataclasses.replace(plan, steps=None))


def test_steps_that_lead_nowhere_are_a_loss_error():
    s = server(12, LocalSteps(3, 1e300))
    with pytest.raises(LossError, match="client anna, round 0: local step 0 leads to weights that are not"):
        federation()[0].answer(s.plan().encode(), s.model().encode())


# -- what the server and its log do with K slopes is what they ever did ------------------------------------


def portable(parameters):
    return Portable(parameters, "adam", 0.05)


@pytest.mark.parametrize("mode", MODES)
def test_every_downlink_brings_clients_to_the_weights(mode):
    """A client that holds other weights than the plan's does not answer: its digest says so."""
    s = server(12, LocalSteps(3, 0.1), optimizer=portable, downlink=mode)
    records = list(simulate(s, federation(), rounds=5))
    assert [record.dropped for record in records] == [0] * 5
    model = server(12, LocalSteps(3, 0.1), optimizer=portable)
    list(simulate(model, federation(), rounds=5))
    if mode in ("model", "scalars"):  # and replaying clients take the same step
        assert s.weights.tobytes() == model.weights.tobytes()
    else:
        np.testing.assert_allclose(s.weights, model.weights, rtol=0, atol=0.02)
        assert s.weights.tobytes() != model.weights.tobytes()


def test_the_log_of_scalars_replays_to_the_bit(tmp_path):
    s, log = server(12, LocalSteps(3, 0.1)), ScalarLog(tmp_path / "log")
    for record in simulate(s, federation(), rounds=5):
        log.append(record.plan, record.total)
    late = server(12, LocalSteps(3, 0.1))
    assert replay(late, log) == 5
    assert late.weights.tobytes() == s.weights.tobytes()
    with pytest.raises(Exception, match="round 0"):  # a server without steps plans other rounds
        replay(server(12, None), log)


class Far:
    """A driver that knows of clients what a network does: their bytes."""

    def __init__(self, clients):
        self.endpoints = {client.name: Endpoint(client) for client in clients}

    def names(self):
        return sorted(self.endpoints)

    def ask(self, stage, requests, deadline):
        for name in sorted(requests):
            yield name, self.endpoints[name].handle(requests[name])


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("steps", [None, LocalSteps(3, 0.1)])
def test_forward_passes_are_known_without_a_look_into_clients(scheme, steps):
    near = list(simulate(server(12, steps, scheme=scheme), federation(), rounds=2))
    s = server(12, steps, scheme=scheme)
    far = list(run_rounds(s, Far(federation()), rounds=2))
    assert [r.forward_passes for r in far] == [r.forward_passes for r in near]
    assert [r.total.values.tobytes() for r in far] == [r.total.values.tobytes() for r in near]


# -- baffle train --------------------------------------------------------------------------------------

TINY = {"data": "digits", "model": "mlp", "clients": 3, "threads": 1, "rounds": 2, "batch_size": 20}


def test_the_command_takes_local_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("baffle.training.plots.available", lambda: False)
    settings = {**TINY, "directions": 12, "local_steps": 3, "local_learning_rate": 0.1}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    assert command(["train", "--run", "run", *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["forward_passes"] for row in rows] == [3 * 15] * 2
    job = build(TrainConfig(**settings))
    assert job.server.plan().steps == LocalSteps(3, 0.1)
    records = list(simulate(job.server, job.clients, rounds=2))
    assert [row["loss"] for row in rows] == [record.loss for record in records]


def test_one_local_step_is_none():
    assert build(TrainConfig(**TINY)).server.plan().steps is None
    assert build(TrainConfig(**TINY, local_steps=1)).server.plan() == build(TrainConfig(**TINY)).server.plan()


@pytest.mark.parametrize(
    ("budget", "scheme", "directions"), [(30, "forward", 25), (34, "forward", 25), (31, "central", 15)]
)
def test_forward_passes_pay_for_all_steps(budget, scheme, directions):
    job = build(TrainConfig(**TINY, local_steps=5, forward_passes=budget, scheme=scheme))
    assert job.server.estimator.directions == directions
    assert budget - 5 < job.server.plan().forward_passes <= budget


def test_epochs_are_gone_through_in_fewer_rounds_and_average_is_federated():
    one, five = {**TINY, "rounds": None, "epochs": 3.0}, {"local_steps": 5, "local_learning_rate": 0.03}
    rounds = build(TrainConfig(**one)).rounds
    job = build(TrainConfig(**one, **five, optimizer="average"))
    assert job.rounds == -(-rounds // 5)
    (group,) = job.server.optimizer.param_groups
    assert isinstance(job.server.optimizer, torch.optim.SGD)
    assert group["initial_lr"] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"local_steps": 0}, "local-steps = 0: it must be positive"),
        ({"local_steps": 3, "directions": 100}, "K = 100 directions for 3 local steps: take a multiple of 3"),
        ({"local_steps": 2, "local_epochs": 1}, "local-steps and local-epochs exclude each other"),
        ({"local_steps": 2, "fidelity": "law"}, "local steps need the fidelity 'forward-only', not 'law'"),
        ({"local_steps": 2, "fidelity": "backprop"}, "fidelity 'forward-only', not 'backprop'"),
        ({"local_steps": 70000, "directions": 70000}, "fewer than 2\\^16"),
        ({"local_steps": 5, "forward_passes": 9}, "1 forward passes pay for no direction"),
        (
            {"local_steps": 2, "privacy": "example", "clip_norm": 1.0, "noise_multiplier": 1.0},
            "privacy of an example needs one measurement a round",
        ),
    ],
)
def test_settings_that_cannot_be(settings, why):
    with pytest.raises(ConfigError, match=why):
        build(TrainConfig(**{**TINY, **settings}))
