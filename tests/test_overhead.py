"""What a round does besides measuring: counted calls, memory against clients, answers that are not kept.

Nothing here is timed: ``benchmarks/overhead.py`` is, and its functions are run here on very little.
"""

from __future__ import annotations

import copy
import math
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from baffle import client as client_module
from baffle import endpoint as endpoint_module
from baffle import law
from baffle.aggregation import PlainSum
from baffle.client import Client, Download
from baffle.errors import AggregationError, DigestMismatchError, LossError, MessageError
from baffle.estimator import SteinEstimator
from baffle.local import clip_inf_norm
from baffle.perturbations import Layout
from baffle.plan import LocalTraining, ModelMessage, RoundPlan, RoundResult, RoundSum
from baffle.runtimes import Batch
from baffle.server import Server
from baffle.simulation import random_drops, simulate
from baffle.stream import seed_from

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import overhead

N = 26_730  # LeNet's: 107 kB a model
FIDELITIES = ("forward-only", "law", "backprop")


class Bowl:
    """L(w) = |w|²/2 over n parameters, in NumPy: a round of it is nearly all overhead."""

    def __init__(self, n=N, frozen=bytes(32)):
        self.layout, self.hashed, self._frozen = Layout.flat(n), 0, frozen

    @property
    def frozen_digest(self):
        self.hashed += 1
        return self._frozen

    def weights(self):
        return np.linspace(-1, 1, self.layout.n, dtype=np.float32)

    def check_sigma(self, sigma):
        pass

    def loss(self, weights, batch):
        return float(np.dot(weights, weights)) / 2

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        return np.array([self.loss(weights, batch) + scale * math.sin(k + 1) for k in directions])

    def gradient(self, weights, batch):
        return weights.copy(), self.loss(weights, batch)


class Three:
    """Three samples; all clients may share them."""

    def __len__(self):
        return 3

    def batch(self, indices):
        return Batch(np.zeros((len(indices), 1), np.float32), np.zeros(len(indices), np.int64))


def federation(count, runtime):
    samples = Three()
    return [Client(f"c{i:05d}", runtime, samples) for i in range(count)]


def server(runtime, fidelity="forward-only", directions=2, **options):
    return Server(runtime, SteinEstimator(directions), batch_size=2, fidelity=fidelity, **options)


# --- what is done once ---------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """How often messages are decoded and weights hashed on the clients' side."""
    seen = Counter()

    def counted(name, call):
        def wrapper(*arguments):
            seen[name] += 1
            return call(*arguments)

        return wrapper

    for kind in (RoundPlan, ModelMessage, RoundResult):
        monkeypatch.setattr(kind, "decode", counted(kind.__name__, kind.decode))
    for module in (client_module, endpoint_module):
        monkeypatch.setattr(module, "weights_digest", counted("digest", module.weights_digest))
    return seen


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("count", [1, 7])
def test_a_round_comes_down_once_and_goes_up_by_client(calls, fidelity, count):
    runtime = Bowl(50)
    s = server(runtime, fidelity)
    records = list(simulate(s, federation(count, runtime), rounds=3))
    assert calls == {"RoundPlan": 3, "ModelMessage": 3, "digest": 3, "RoundResult": 3 * count}
    assert all(r.bytes_down == count * (29 + 108 + 14 + 4 * 50) for r in records)  # and still counts for each


def test_each_runtime_checks_for_itself(calls):
    runtimes = [Bowl(50) for _ in range(3)]
    clients = [Client(f"c{i}", runtimes[i % 3], Three()) for i in range(9)]
    list(simulate(server(runtimes[0]), clients, rounds=2))
    assert calls["digest"] == 2 * 3


@pytest.mark.parametrize("fidelity", ["law", "backprop"])
def test_what_is_frozen_is_hashed_once_a_round(fidelity):
    runtime = Bowl(50)
    s, clients = server(runtime, fidelity), federation(5, runtime)
    before = runtime.hashed
    list(simulate(s, clients, rounds=4))
    assert runtime.hashed - before == 4


def test_a_device_checks_at_every_answer(calls):
    runtime = Bowl(50)
    s, (client,) = server(runtime), federation(1, runtime)
    plan, model = s.plan().encode(), s.model().encode()
    assert client.answer(plan, model) == client.answer(plan, model)
    assert calls == {"RoundPlan": 2, "ModelMessage": 2, "digest": 2}


def test_a_shared_download_lets_no_wrong_model_through():
    right, other = Bowl(50), Bowl(50, frozen=b"\1" * 32)
    s = server(right)
    plan, model = s.plan().encode(), s.model().encode()
    good, bad, short = (Client("c", runtime, Three()) for runtime in (right, other, Bowl(49)))
    download = Download.decode(plan, model)
    for _ in range(2):  # neither a refusal nor a success is passed on to another runtime
        for wrong in (bad, short):
            with pytest.raises(DigestMismatchError):
                wrong.answer_to(download)
        assert good.answer_to(download) == good.answer(plan, model)
    for place in (14, len(model) - 3):
        flipped = bytearray(model)
        flipped[place] ^= 1
        tampered = Download.decode(plan, bytes(flipped))
        for _ in range(2):
            with pytest.raises(DigestMismatchError):
                good.answer_to(tampered)
    with pytest.raises(MessageError):
        Download.decode(plan, model[:-1])
    with pytest.raises(ValueError, match="read-only"):
        download.weights[0] = 1.0


def test_runtimes_that_come_and_go_are_told_apart():
    """An id is used again once its object is gone: the download must not take the new one for the old."""
    s = server(Bowl(50))
    download = Download.decode(s.plan().encode(), s.model().encode())
    for _ in range(50):
        assert download.fits(Bowl(50))
        assert not download.fits(Bowl(50, frozen=b"\1" * 32))


# --- memory --------------------------------------------------------------------------------------


def peak(count, fidelity, **options):
    runtime = Bowl()
    s = server(runtime, fidelity, **options)
    next(simulate(s, federation(2, runtime), rounds=1))
    tracemalloc.start()
    try:
        next(simulate(s, federation(count, runtime), rounds=2))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_memory_grows_by_bytes_a_client(fidelity):
    growth = (peak(1000, fidelity) - peak(100, fidelity)) / 900
    assert growth < 4096, f"{growth:.0f} bytes a client; a model has {4 * N}"


def test_memory_grows_by_bytes_a_client_between_uploads_too():
    local = LocalTraining(1, 0.01)
    growth = (peak(200, "backprop", local=local) - peak(50, "backprop", local=local)) / 150
    assert growth < 4096


def test_the_measure_of_memory_can_fail():
    class Keeping(PlainSum):
        def open(self, plan, names):
            self.kept, tally = [], super().open(plan, names)
            add = tally.add
            tally.add = lambda name, answer: (self.kept.append(answer), add(name, answer))
            return tally

    growth = (peak(60, "backprop", aggregator=Keeping()) - peak(10, "backprop", aggregator=Keeping())) / 50
    assert growth > 4 * N


# --- the tally -----------------------------------------------------------------------------------


def plan_of(fidelity="forward-only", directions=5):
    return server(Bowl(4), fidelity, directions).plan()


def answer(plan, values, samples=1):
    return RoundResult(plan.round, plan.digest, samples, np.asarray(values, np.float32))


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_tally_is_the_loop_of_the_specification(fidelity):
    """Section 8 of docs/spec.md with Python's floats: the same bits, N_c beyond 2⁵³ included."""
    rng, plan = np.random.default_rng(0), plan_of(fidelity)
    lengths = [5, 2, 4, 5, 1, 3] if fidelity == "forward-only" else [7] * 6
    sent = {
        f"c{i}": answer(plan, rng.standard_normal(k) * 10.0 ** rng.integers(-30, 30), int(samples))
        for i, (k, samples) in enumerate(
            zip(lengths, [1, 3, 2**53 + 1, 2**63 + 5, 17, 2**64 - 1], strict=True)
        )
    }
    tally = PlainSum().open(plan, sorted(sent))
    total, weight = [0.0] * max(lengths), [0.0] * max(lengths)
    for name in sorted(sent):
        tally.add(name, sent[name].encode())
        for k, value in enumerate(sent[name].values.tolist()):
            total[k] += float(sent[name].samples) * value
            weight[k] += float(sent[name].samples)
    assert tally.close().values.tolist() == [t / w for t, w in zip(total, weight, strict=True)]


def test_a_longer_row_may_come_later():
    plan = plan_of()
    tally = PlainSum().open(plan, ["a", "b", "c", "z"])
    tally.add("a", answer(plan, [1.0]).encode())
    tally.add("b", answer(plan, [3.0, 5.0, 7.0]).encode())
    assert tally.close().values.tolist() == [2.0, 5.0, 7.0]


@pytest.mark.parametrize("fidelity", ["forward-only", "backprop"])
def test_a_refused_answer_leaves_the_tally_as_it_was(fidelity):
    plan, other = plan_of(fidelity), plan_of(fidelity, directions=6)
    tally = PlainSum().open(plan, ["a", "b", "c", "z"])
    with pytest.raises(AggregationError, match="no client"):
        tally.close()
    with pytest.raises(AggregationError, match="another plan"):
        tally.add("z", answer(other, [1.0] * 4).encode())
    tally.add("b", answer(plan, [1.0, 2.0, 3.0, 4.0]).encode())
    refused = [
        ("c", answer(other, [9.0] * 4), "another plan"),
        ("c", RoundResult(1, plan.digest, 1, np.ones(4, np.float32)), "another plan"),
        ("c", answer(plan, [9.0] * 6), "6 "),
        ("b", answer(plan, [9.0] * 4), "ascend"),  # said twice
        ("a", answer(plan, [9.0] * 4), "ascend"),
        ("d", answer(plan, [9.0] * 4), "cohort"),
    ]
    if fidelity == "backprop":
        refused.append(("c", answer(plan, [9.0] * 3), "3 numbers where others sent 4"))
    for name, result, why in refused:
        with pytest.raises(AggregationError, match=why):
            tally.add(name, result.encode())
    tally.add("c", answer(plan, [3.0, 2.0, 1.0, 0.0]).encode())
    assert tally.close().values.tolist() == [2.0, 2.0, 2.0, 2.0]


def test_the_server_steps_alike_on_answers_at_hand_and_on_a_tally():
    runtime = Bowl(50)
    clients = federation(4, runtime)
    streamed, held = (server(runtime, "backprop", ema=0.9) for _ in range(2))
    for _ in range(3):
        download = Download.decode(held.plan().encode(), held.model().encode())
        sent = {c.name: RoundResult.decode(c.answer_to(download)) for c in reversed(clients)}
        total = held.step(sent)
        record = next(simulate(streamed, clients, rounds=held.round))
        assert record.total.values.tobytes() == total.values.tobytes()
    assert streamed.weights.tobytes() == held.weights.tobytes()
    assert streamed.plan() == held.plan()


def test_a_round_of_many_clients_and_drops_is_the_mean_of_who_answered():
    runtime, drops = Bowl(6), random_drops(0.3, 4)
    s = server(runtime, "backprop")
    here = s.weights
    (record,) = simulate(s, federation(50, runtime), rounds=1, cohort=20, drops=drops)
    assert 0 < record.dropped < 20
    np.testing.assert_array_equal(record.total.values, here.astype(np.float64))
    assert record.bytes_up == (20 - record.dropped) * (27 + 58 + 4 * 6)


# --- a refused step ------------------------------------------------------------------------------


def lists(parameters):
    """An optimizer whose state is more than tensors: lists, tuples, None; and whose group moves."""

    class Odd(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                group["seen"] = [*group.get("seen", []), len(group["params"])]
                for p in group["params"]:
                    state = self.state[p]
                    state.setdefault("history", []).append(p.grad.clone())
                    state["steps"], state["none"] = len(state["history"]), None
                    state["pair"] = (torch.ones(1), 2)
            super().step()

    return Odd(parameters, lr=1.0, momentum=0.9)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lists,
    ],
)
def test_a_refused_step_in_the_middle_changes_nothing(optimizer):
    class Steep(Bowl):
        def weights(self):
            return 100 * super().weights()

    s, twin = (server(Steep(6), "backprop", optimizer=optimizer, ema=0.9) for _ in range(2))
    good = np.linspace(-1, 1, 6)
    for each in (s, twin):
        each.apply(RoundSum(0, good))
    before = copy.deepcopy(s.optimizer.state_dict())
    for group in s.optimizer.param_groups:
        group["weight_decay"] = 3e38  # times 100 is infinite: no optimizer's step stays finite
    with pytest.raises(LossError, match="diverged"):
        s.apply(RoundSum(1, good))
    for group in s.optimizer.param_groups:
        assert group["weight_decay"] == 3e38
        group["weight_decay"] = 0
    assert same(s.optimizer.state_dict(), before)
    assert s.weights.tobytes() == twin.weights.tobytes()
    assert s.round == 1
    for round_ in (1, 2):
        for each in (s, twin):
            each.apply(RoundSum(round_, good))
    assert s.weights.tobytes() == twin.weights.tobytes()
    assert s.ema_weights.tobytes() == twin.ema_weights.tobytes()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- the law's draw, and the clip ----------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 26_730])
@pytest.mark.parametrize("directions", [1, 100])
def test_the_laws_draw_is_its_formula_bit_for_bit(n, directions):
    g = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    seed = seed_from(8)
    before = g.copy()
    drawn = law.sample_estimate(g, directions, law.generator(seed))
    rng = law.generator(seed)
    norm = float(np.linalg.norm(g.astype(np.float64)))
    u, a, xi = g / np.float64(norm), float(rng.chisquare(directions)), rng.standard_normal(n)
    plain = (norm / directions) * (a * u + np.sqrt(a) * (xi - u * float(u @ xi)))
    assert drawn.tobytes() == plain.astype(np.float32).tobytes()
    assert g.tobytes() == before.tobytes()


def test_no_bound_looks_at_nothing():
    values = np.array([3.0, np.nan], np.float32)
    assert clip_inf_norm(values, 0.0) is values


# --- the benchmark -------------------------------------------------------------------------------


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_the_share_of_overhead_is_a_share(fidelity):
    row = overhead.overhead(2, 2, fidelity, model="mlp", batch=2, batches=2)
    assert 0 < row["share"] < 1
    assert row["overhead_microseconds_per_client"] == pytest.approx(
        1e6 * row["share"] * row["round_seconds"] / 2
    )


def test_the_stopwatch_sees_what_is_not_overhead(monkeypatch):
    """Forward passes, backward passes and the server's reconstruction go through it."""
    seen = []
    original = overhead.Stopwatch.__call__

    def watched(self, call, *arguments, **options):
        seen.append(call.__name__)
        return original(self, call, *arguments, **options)

    monkeypatch.setattr(overhead.Stopwatch, "__call__", watched)
    overhead.overhead(2, 2, "forward-only", model="mlp", batch=2, batches=1)
    assert {"loss", "losses"} <= set(seen)
    assert seen.count("losses") == 4  # two rounds of two clients
    assert sum("gradient" in name for name in seen) == 2


def test_ratios_of_the_law_and_memory_have_figures():
    row = overhead.law_ratio(7, 2, clients=2, rounds=1)
    assert all(math.isfinite(value) and value > 0 for value in row.values())
    sizes = overhead.memory_per_client(2, 4)
    assert sizes["model"] == 4 * N
    assert sizes["idle_client"] > 0


def test_interleaved_sides_take_turns():
    turns = []
    sides = {name: lambda name=name: turns.append(name) for name in "ab"}
    seconds = overhead.interleaved(sides, 3)
    assert turns == ["a", "b"] * 5
    assert [len(row) for row in seconds.values()] == [3, 3]
