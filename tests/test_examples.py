"""Slopes of examples: by every way through the directions, against batches of one; and a client's sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from baffle import client as client_module
from baffle import models
from baffle import terms as terms_module
from baffle.aggregation import ANSWER, IntegerSum
from baffle.client import Client, Download
from baffle.errors import ConfigError, DigestMismatchError, LossError, PrecisionError
from baffle.estimator import SteinEstimator
from baffle.fixedpoint import FixedPoint
from baffle.perturbations import Gaussian, LowRank
from baffle.privacy import Privacy, encode_clipped
from baffle.runtimes import Batch
from baffle.runtimes.cache import cache_prefix
from baffle.runtimes.torch import TorchRuntime
from baffle.server import Server
from baffle.simulation import simulate
from baffle.stream import Stream, seed_from
from baffle.terms import RingResult, Terms
from tests.contracts.runtime import ExampleContract

STREAM = Stream(seed_from(3), 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def small(dtype=torch.float32):
    return made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).to(dtype)


def rows(count=6, width=4, classes=3):
    rng = np.random.default_rng(1)
    return Batch(rng.normal(size=(count, width)).astype(np.float32), rng.integers(0, classes, count))


def images(count=5, size=16):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(count, 1, size, size)).astype(np.float32)
    return Batch(x, rng.integers(0, 10, count))


# -- every way -------------------------------------------------------------------------------------------


class TestBatched(ExampleContract):
    def runtime(self):
        return TorchRuntime(small())

    def batch(self):
        return rows()


class TestOneByOne(ExampleContract):
    """Too large to batch on a CPU; on replicas, and where a hook forbids them by functional calls."""

    hooks = False

    def runtime(self):
        module = made(lambda: nn.Sequential(nn.Linear(40, 600), nn.ReLU(), nn.Linear(600, 3)))
        if self.hooks:
            module[1].register_forward_hook(lambda *_: None)
        return TorchRuntime(module)

    def batch(self):
        return rows(50, 40)


class TestOneByOneWithHooks(TestOneByOne):
    hooks = True


class TestProgram(ExampleContract):
    def runtime(self):
        return TorchRuntime(models.build("lenet", 1, 10, 0))

    def batch(self):
        return images()


class TestBehindAFrozenPrefix(ExampleContract):
    def runtime(self):
        module = small()
        module[0].requires_grad_(False)
        return TorchRuntime(module)

    def batch(self):
        return rows()


def test_the_ways_are_those_that_were_meant(monkeypatch):
    taken = []
    for name in ("batched", "one_by_one", "shared_weight_losses"):
        call = getattr(__import__("baffle.runtimes.sweeps", fromlist=[name]), name)
        spy = lambda *a, name=name, call=call, **k: (taken.append(name), call(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(f"baffle.runtimes.sweeps.{name}", spy)
    for contract, kind, want in [
        (TestBatched, Gaussian(), "batched"),
        (TestOneByOne, Gaussian(), "one_by_one"),
        (TestOneByOneWithHooks, Gaussian(), "one_by_one"),
        (TestBatched, LowRank(2), "shared_weight_losses"),
    ]:
        case = contract()
        runtime = case.runtime()
        runtime.example_losses(runtime.weights(), case.batch(), STREAM, kind, range(3), 0.1)
        assert taken == [want]
        taken.clear()


# -- slopes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("kind", [Gaussian(), LowRank(1)], ids=lambda kind: kind.spec)
def test_slopes_of_examples_are_those_of_batches_of_one(scheme, kind):
    """In float64, where nothing but the last bits may differ: rounding of a loss, divided by σ."""
    runtime, batch, estimator = (
        TorchRuntime(small(torch.float64)),
        rows(),
        SteinEstimator(7, 1e-2, scheme, kind),
    )
    got = estimator.example_slopes(runtime, runtime.weights(), batch, STREAM)
    alone = [
        estimator.slopes(
            runtime, runtime.weights(), Batch(batch.inputs[i : i + 1], batch.targets[i : i + 1]), STREAM
        )
        for i in range(6)
    ]
    assert got.slopes.shape == (6, 7)
    np.testing.assert_allclose(got.slopes, [m.slopes for m in alone], rtol=0, atol=64 * 2.0**-53 / 1e-2)
    together = estimator.slopes(runtime, runtime.weights(), batch, STREAM)
    np.testing.assert_allclose(got.slopes.mean(axis=0), together.slopes, rtol=0, atol=64 * 2.0**-53 / 1e-2)
    assert got.loss == pytest.approx(np.mean([m.loss for m in alone]), rel=1e-12)
    assert got.forward_passes == estimator.forward_passes == together.forward_passes


def test_what_slopes_of_examples_refuse():
    runtime, batch = TorchRuntime(small()), rows()
    w = runtime.weights()
    with pytest.raises(ConfigError, match="forward or central"):
        SteinEstimator(3, 1e-3, "tangent").example_slopes(runtime, w, batch, STREAM)
    with pytest.raises(PrecisionError):
        SteinEstimator(3, 1e-9).example_slopes(runtime, w, batch, STREAM)
    bare = type("Bare", (), {"check_sigma": lambda self, sigma: None})()
    with pytest.raises(ConfigError, match="Bare cannot tell the samples"):
        SteinEstimator(3, 1e-3).example_slopes(bare, w, batch, STREAM)
    for scheme in ("forward", "central"):
        bad = Batch(batch.inputs.copy(), batch.targets)
        bad.inputs[4, 0] = np.nan
        with pytest.raises(LossError, match="of a sample"):
            SteinEstimator(3, 1e-3, scheme).example_slopes(TorchRuntime(small()), w, bad, STREAM)
        runtime.example_losses(w, batch, STREAM, Gaussian(), range(1), 0.0)  # has shown that it does not mix
        with pytest.raises(LossError):
            SteinEstimator(3, 1e-3, scheme).example_slopes(runtime, w, bad, STREAM)


# -- modules that mix ------------------------------------------------------------------------------------


class Centred(nn.Module):
    """Subtracts a little of the batch's mean."""

    def __init__(self, share):
        super().__init__()
        self.inner, self.share = small(), share

    def forward(self, x):
        h = self.inner(x)
        return h - self.share * h.mean(dim=0, keepdim=True)


class Neighbours(nn.Module):
    """Each sample sees the one before it."""

    def __init__(self):
        super().__init__()
        self.inner = small()

    def forward(self, x):
        return self.inner(x + 0.1 * x.roll(1, 0))


def losses(module, batch, **options):
    runtime = TorchRuntime(module, **options)
    return runtime.example_losses(runtime.weights(), batch, STREAM, Gaussian(), range(2), 0.1)


def norm(**options):
    return made(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options), nn.Linear(5, 3)))


@pytest.mark.parametrize(
    "module", [Centred(1.0), Centred(1e-3), Neighbours()], ids=["mean", "a little", "roll"]
)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_modules_that_mix_samples_are_caught(module, count):
    with pytest.raises(ConfigError, match=f"{type(module).__name__} mixes the samples"):
        losses(module, rows(count))
    assert losses(module, rows(1)).shape == (2, 1)  # alone, a sample has a loss of its own


def test_batch_statistics_are_refused_by_the_layers_name():
    for frozen in (False, True):
        module = norm(track_running_stats=False)
        if frozen:
            module[0].requires_grad_(False)
            module[1].requires_grad_(False)
        with pytest.raises(ConfigError, match="layer '1' takes its statistics from the batch"):
            losses(module, rows())
    losses(norm().train(), rows())  # measured in eval mode, on its running statistics


def test_a_loss_that_mixes_is_caught():
    def contrast(outputs, targets):
        each = nn.functional.cross_entropy(outputs.double(), targets, reduction="none")
        return each - 0.5 * each.mean()

    with pytest.raises(ConfigError, match="mixes"):
        losses(small(), rows(), loss=contrast)


def test_samples_that_are_all_the_same_show_nothing():
    runtime, batch = TorchRuntime(Centred(1.0)), rows()
    same = Batch(batch.inputs[[0] * 4], batch.targets[[0] * 4])
    w = runtime.weights()
    runtime.example_losses(w, same, STREAM, Gaussian(), range(2), 0.1)
    with pytest.raises(ConfigError, match="mixes"):
        runtime.example_losses(w, batch, STREAM, Gaussian(), range(2), 0.1)


def test_the_check_is_made_once(monkeypatch):
    runtime, calls = TorchRuntime(small()), []
    at = runtime._example_losses_at
    monkeypatch.setattr(runtime, "_example_losses_at", lambda *a: (calls.append(1), at(*a))[1])
    for _ in range(3):
        runtime.example_losses(runtime.weights(), rows(), STREAM, Gaussian(), range(2), 0.1)
    assert len(calls) == 3


def test_features_of_a_cached_prefix():
    module = small()
    module[0].requires_grad_(False)
    runtime, batch = TorchRuntime(module), rows()

    class Samples:
        def __len__(self):
            return 6

        def batch(self, indices):
            return Batch(batch.inputs[indices], batch.targets[indices])

    cached = cache_prefix(runtime, Samples()).batch(np.arange(6))
    measure = lambda b: runtime.example_losses(runtime.weights(), b, STREAM, Gaussian(), range(3), 0.1)  # noqa: E731
    np.testing.assert_allclose(measure(cached), measure(batch), rtol=1e-6)


# -- a client's sample -----------------------------------------------------------------------------------


class Recorded:
    def __init__(self, count=40):
        self.data, self.asked = rows(count), []

    def __len__(self):
        return len(self.data.targets)

    def batch(self, indices):
        self.asked.append(indices.tolist())
        return Batch(self.data.inputs[indices], self.data.targets[indices])


K = 5


def private(rate=0.5, clip=2.0, z=1.0, **options):
    point = FixedPoint.fitting(3, 40, clip)
    return Terms(point, 3, 40, (), Privacy("example", clip, z, rate, **options))


def serving(terms, **options):
    estimator = SteinEstimator(K, 1e-3)
    return Server(
        TorchRuntime(small()), estimator, **{"batch_size": 8, "aggregator": IntegerSum(terms), **options}
    )


def download(s):
    return Download.decode(s.plan().encode(), s.model().encode())


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(terms_module, "noise_share", lambda privacy, point, size: np.zeros(size, np.int64))


def test_tosses_come_at_their_rate():
    for rate in (1e-3, 0.3, 0.999):
        hits = client_module._tosses(100_000, rate)
        assert hits.dtype == bool
        assert abs(hits.mean() - rate) < 5 * (rate * (1 - rate) / 100_000) ** 0.5
    assert client_module._tosses(1000, 1.0).all()
    assert not client_module._tosses(1000, 2.0**-70).any()
    assert client_module._tosses(50, 0.5).tolist() != client_module._tosses(50, 0.5).tolist()


def test_tosses_are_the_operating_systems(monkeypatch):
    words = np.array([0, 2**62 - 1, 2**62, 2**64 - 1], np.uint64)
    monkeypatch.setattr(client_module.os, "urandom", lambda count: words.tobytes()[:count])
    assert client_module._tosses(4, 0.25).tolist() == [True, True, False, False]


def test_an_answer_is_the_sum_of_clipped_slopes_of_the_chosen(silent, monkeypatch):
    terms, samples = private(), Recorded()
    s = serving(terms)
    client = Client("c", TorchRuntime(small()), samples)
    chosen = np.zeros(40, bool)
    chosen[[1, 4, 5, 6, 9, 11, 17, 20, 21, 33, 38]] = True
    monkeypatch.setattr(client_module, "_tosses", lambda count, rate: chosen if rate == 0.5 else None)
    answer = RingResult.decode(client.reply(ANSWER, terms.encode(), download(s)))
    assert samples.asked == [[1, 4, 5, 6, 9, 11, 17, 20], [21, 33, 38]]  # 8 at a time, each once
    assert client.observed.forward_passes == 2 * (K + 1)

    runtime, plan = TorchRuntime(small()), s.plan()
    one = [samples.batch(np.array([i])) for i in np.flatnonzero(chosen)]
    measured = [plan.estimator.slopes(runtime, runtime.weights(), batch, plan.stream) for batch in one]
    slopes = np.array([m.slopes for m in measured])
    assert np.linalg.norm(slopes, axis=1).max() > 2
    assert np.linalg.norm(slopes, axis=1).min() < 2
    want = encode_clipped(slopes, 2.0, terms.fixed_point).sum(axis=0) / 2.0**terms.fixed_point.fraction_bits
    got = terms.fixed_point.decode(terms.fixed_point.integers(answer.residues))
    # Eleven differences of float32 losses around 1, divided by σ.
    np.testing.assert_allclose(got, want, rtol=0, atol=11 * 16 * 2.0**-24 / 1e-3)
    assert client.observed.loss == pytest.approx(np.mean([m.loss for m in measured]), rel=1e-6)
    total = terms.total(plan, answer.residues, 1)
    np.testing.assert_allclose(total.values, got / 8)  # the batch size: the number of examples expected


def test_the_sample_is_not_a_function_of_any_seed(silent):
    terms = private()
    s = serving(terms)
    samples = Recorded()
    client = Client("c", TorchRuntime(small()), samples, seed=1)
    drawn = set()
    for _ in range(5):
        samples.asked.clear()
        client.reply(ANSWER, terms.encode(), download(s))
        drawn.add(tuple(i for part in samples.asked for i in part))
        assert all(sorted(set(each)) == list(each) for each in drawn)
    assert len(drawn) == 5


def test_an_empty_sample_is_pure_noise():
    terms = private(rate=2.0**-70, z=2.0)
    s, samples = serving(terms), Recorded()
    clients = [Client(name, TorchRuntime(small()), samples) for name in ("a", "b")]
    (record,) = simulate(s, clients, rounds=1)
    assert samples.asked == []
    assert record.forward_passes == 0
    assert np.isnan(record.loss)
    assert (record.participants, record.dropped, record.aborted) == (2, 0, None)
    noise = terms.fixed_point.integers(
        RingResult.decode(clients[0].reply(ANSWER, terms.encode(), download(s))).residues
    )
    assert (noise != 0).all()
    assert np.abs(noise).max() < 8 * 4 * 2.0**terms.fixed_point.fraction_bits  # z·C = 4


def test_the_loss_of_a_round_is_over_those_that_saw_something(monkeypatch):
    draws = iter([np.zeros(40, bool), np.ones(40, bool)])
    monkeypatch.setattr(client_module, "_tosses", lambda count, rate: next(draws))
    clients = [Client(name, TorchRuntime(small()), Recorded()) for name in ("a", "b")]
    (record,) = simulate(serving(private()), clients, rounds=1)
    assert record.loss == clients[1].observed.loss
    assert np.isnan(clients[0].observed.loss)


def test_everyone_and_little_noise_is_the_mean_of_clipped_slopes():
    terms = private(rate=1.0, clip=50.0, z=0.001)  # a clip that nothing meets
    clients = [Client(name, TorchRuntime(small()), Recorded()) for name in ("a", "b")]
    (record,) = simulate(serving(terms, batch_size=40), clients, rounds=1)
    plain = Server(TorchRuntime(small()), SteinEstimator(K, 1e-3), batch_size=40)
    (there,) = simulate(plain, [Client(n, TorchRuntime(small()), Recorded()) for n in ("a", "b")], rounds=1)
    # Noise of deviation 0.05 a client, over 80 examples; float32 losses divided by σ.
    atol = 6 * 0.05 * 2**0.5 / 80 + 64 * 2.0**-24 / 1e-3
    np.testing.assert_allclose(record.total.values, there.total.values, rtol=0, atol=atol)
    assert record.loss == pytest.approx(there.loss, rel=1e-6)


def test_what_a_client_refuses_of_examples():
    s = serving(private())
    small_budget = Client("c", TorchRuntime(small()), Recorded(), max_directions=K - 1)
    with pytest.raises(ConfigError, match="client c, round 0: a budget of 4"):
        small_budget.reply(ANSWER, private().encode(), download(s))
    many = Client("c", TorchRuntime(small()), Recorded(41))
    with pytest.raises(ConfigError, match="client c, round 0: 41 samples exceed"):
        many.reply(ANSWER, private().encode(), download(s))
    moved = s.model().weights + np.float32(1)
    wrong = Download.decode(s.plan().encode(), type(s.model())(moved).encode())
    nobody = private(rate=2.0**-70)  # also where no example was drawn
    with pytest.raises(DigestMismatchError, match="client c"):
        Client("c", TorchRuntime(small()), Recorded()).reply(ANSWER, nobody.encode(), wrong)
    with pytest.raises(ConfigError, match="batch size"):
        IntegerSum(private()).open(serving(private(), batch_size=0).plan(), ["c"])
