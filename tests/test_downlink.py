"""Downlinks: what clients hold is the plan's model to the bit, whatever was missed, lost or spoiled."""

import dataclasses
import math
import re
import struct
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from baffle.downlink import (
    MODES,
    Downlink,
    HalfModel,
    Holding,
    Snapshot,
    Step,
    Steps,
    Update,
    receive,
)
from baffle.errors import ConfigError, DigestMismatchError, MessageError
from baffle.estimator import SteinEstimator
from baffle.optimizers import Portable
from baffle.perturbations import Layout
from baffle.plan import LocalTraining, ModelMessage, RoundPlan, RoundResult, RoundSum, weights_digest
from baffle.rules import RULES, STATE, Rule, RuleState, clip_inf_norm
from baffle.runtimes import Batch
from baffle.runtimes.torch import TorchRuntime
from baffle.stream import seed_from

LAYOUT = Layout(("w", "b"), ((30, 40), (30,)))
SEED, K = seed_from(1), 12


def digest_of(weights):
    return weights_digest(weights, LAYOUT, bytes(32))


def row(seed, n=LAYOUT.n, scale=1.0):
    return (np.random.default_rng(seed).normal(size=n) * scale).astype(np.float32)


def plan_for(round_, weights, layout=LAYOUT, directions=K):
    digest = weights_digest(weights, layout, bytes(32))
    return RoundPlan(round_, SEED, SteinEstimator(directions), digest)


# -- messages ----------------------------------------------------------------------------------------------

u64 = st.integers(0, 2**64 - 1)
hashes = st.binary(min_size=32, max_size=32)
real = st.floats(0, 1e300)
beta = st.floats(0, 1, exclude_max=True)
rules = st.one_of(
    st.builds(Rule, st.just("sgd"), real, clip=real),
    st.builds(Rule, st.just("momentum"), real, beta, clip=real),
    st.builds(Rule, st.just("adam"), real, beta, beta, st.floats(1e-45, 1e38), real),
)


def reals(dtype, least=1, most=6):
    finite = st.floats(allow_nan=False, allow_infinity=False, width=8 * np.dtype(dtype).itemsize)
    return hnp.arrays(dtype, st.integers(least, most), elements=finite)


@st.composite
def several_steps(draw):
    rounds = sorted(draw(st.sets(u64, min_size=1, max_size=3)))
    totals = [draw(reals(np.float64)) for _ in rounds]
    return Steps(
        tuple(
            Step(
                RoundPlan(r, draw(hashes), SteinEstimator(draw(st.integers(6, 9))), draw(hashes)),
                draw(rules),
                RoundSum(r, total),
            )
            for r, total in zip(rounds, totals, strict=True)
        )
    )


@st.composite
def snapshots(draw):
    n = draw(st.integers(1, 5))
    weights, *rows = (draw(reals(np.float32, n, n)) for _ in range(3))
    name = draw(st.sampled_from([None, *RULES]))
    state = None
    if name is not None:
        state = RuleState(draw(u64), dict(zip(STATE[name], rows, strict=False)))
    return Snapshot(draw(u64), weights, state)


messages = st.one_of(
    st.builds(HalfModel, reals(np.float16)),
    st.builds(Update, u64, hashes, reals(np.float16)),
    several_steps(),
    snapshots(),
)
KINDS = {7: HalfModel, 8: Update, 9: Steps, 10: Snapshot}
ONE = plan_for(3, row(1))
SAMPLES = [
    HalfModel(np.array([1.5, -0.0], np.float16)),
    Update(2, digest_of(row(1)), np.array([2.0**-24, -65504.0], np.float16)),
    Steps(
        (
            Step(ONE, Rule("adam", 0.1, 0.9, 0.99, clip=0.3), RoundSum(3, np.array([0.1, 1e-300]))),
            Step(dataclasses.replace(ONE, round=5), Rule("sgd", 0.1), RoundSum(5, np.ones(K))),
        )
    ),
    Snapshot(4, np.array([1.5, -0.0], np.float32)),
    Snapshot(4, row(2, 2), RuleState(7, {"mean": row(3, 2), "square": row(4, 2)})),
    Snapshot(4, row(2, 2), RuleState(0, {})),
]
EACH = pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)


def bits(value):
    """Anything of these messages as something that compares by bits."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tobytes()
    if dataclasses.is_dataclass(value):
        return [bits(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare]
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    return [bits(entry) for entry in value] if isinstance(value, tuple) else value


@given(messages)
def test_round_trip(message):
    data = message.encode()
    back = type(message).decode(data)
    assert bits(back) == bits(message)
    assert back.encode() == data
    assert KINDS[data[5]] is type(message)
    for kind in {*KINDS.values(), ModelMessage} - {type(message)}:
        with pytest.raises(MessageError):
            kind.decode(data)


def test_sizes_are_as_documented():
    n = 10
    assert len(HalfModel(np.zeros(n, np.float16)).encode()) == 14 + 2 * n
    assert len(Update(0, bytes(32), np.zeros(n, np.float16)).encode()) == 54 + 2 * n
    for name in (None, *RULES):
        state = None if name is None else Rule(name, 0.1).fresh(n)
        assert len(Snapshot(0, np.zeros(n, np.float32), state).encode()) == Snapshot.size(n, name)
    step = Step(ONE, Rule("adam", 0.1), RoundSum(3, np.zeros(K)))
    assert len(Steps((step,)).encode()) == 10 + 12 + 108 + 41 + 18 + 8 * K


def test_bytes_are_those_of_the_specification():
    """Section 12.1, byte by byte."""
    half, single = struct.pack("<2e", 1.5, -0.0), struct.pack("<2f", 1.5, -0.0)
    one, other = ONE.encode(), dataclasses.replace(ONE, round=5).encode()
    adam = struct.pack("<B5d", 2, 0.1, 0.9, 0.99, 1e-8, 0.3)
    momentum = struct.pack("<B3d", 1, 0.2, 0.9, 0.0)
    sums = [RoundSum(r, np.array([0.5])).encode() for r in (3, 5)]
    parts = (one, adam, sums[0], other, momentum, sums[1])
    rows = {"mean": np.array([3, 4], np.float32), "square": np.array([5, 6], np.float32)}
    weights = np.array([1.5, -0.0], np.float32)
    expected = [
        (HalfModel(weights.astype(np.float16)), [b"\x07", struct.pack("<Q", 2), half]),
        (
            Update(9, bytes(range(32)), weights.astype(np.float16)),
            [b"\x08", struct.pack("<Q", 9), bytes(range(32)), struct.pack("<Q", 2), half],
        ),
        (
            Steps(
                (
                    Step(ONE, Rule("adam", 0.1, 0.9, 0.99, clip=0.3), RoundSum(3, np.array([0.5]))),
                    Step(RoundPlan.decode(other), Rule("momentum", 0.2, 0.9), RoundSum(5, np.array([0.5]))),
                )
            ),
            [b"\x09", struct.pack("<I", 2), *(struct.pack("<I", len(part)) + part for part in parts)],
        ),
        (Snapshot(9, weights), [b"\x0a", struct.pack("<QQB", 9, 2, 0), single]),
        (
            Snapshot(9, weights, RuleState(7, rows)),
            [b"\x0a", struct.pack("<QQBQ", 9, 2, 3, 7), single, struct.pack("<4f", 3, 4, 5, 6)],
        ),
    ]
    for message, body in expected:
        assert message.encode() == b"BFFL\x01" + b"".join(body)


@EACH
def test_every_truncation_and_extension_is_refused(message):
    data = message.encode()
    for size in range(len(data)):
        with pytest.raises(MessageError):
            type(message).decode(data[:size])
    for byte in range(256):
        with pytest.raises(MessageError):
            type(message).decode(data + bytes([byte]))


@EACH
def test_every_single_byte_change_is_refused_or_is_another_message(message):
    data, decoded = message.encode(), 0
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flip
            try:
                back = type(message).decode(bytes(changed))
            except MessageError:
                continue
            assert at >= 6
            decoded += 1
            assert back.encode() == changed
            assert bits(back) != bits(message)
    assert decoded > 0


@settings(max_examples=400)
@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=200))
def test_arbitrary_bodies_raise_nothing_else(kind, body):
    decodes_or_refuses(KINDS[kind], body)
    decodes_or_refuses(KINDS[kind], b"BFFL" + bytes([1, kind]) + body)


@settings(max_examples=150)
@given(messages, st.data())
def test_mutated_messages_raise_nothing_else(message, data):
    raw = bytearray(message.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(6, len(raw)))
        what = data.draw(st.sampled_from(["set", "insert", "delete"]))
        if what == "set" and at < len(raw):
            raw[at] = data.draw(st.integers(0, 255))
        elif what == "insert":
            raw[at:at] = data.draw(st.binary(max_size=4))
        else:
            del raw[at : at + data.draw(st.integers(1, 4))]
    for kind in KINDS.values():
        decodes_or_refuses(kind, bytes(raw))


def decodes_or_refuses(kind, raw):
    try:
        message = kind.decode(raw)
    except MessageError as error:
        text = str(error)
    else:
        assert message.encode() == raw
        return
    assert "\n" not in text
    assert len(text) < 300


def test_absurd_lengths_allocate_nothing():
    head, hostile = b"BFFL\x01", []
    for count in (3, 2**31, 2**40, 2**62, 2**64 - 1):
        number = struct.pack("<Q", count)
        hostile += [
            (HalfModel, head + b"\x07" + number + bytes(4)),
            (Update, head + b"\x08" + bytes(40) + number + bytes(4)),
            (Snapshot, head + b"\x0a" + bytes(8) + number + b"\0" + bytes(8)),
            (Snapshot, head + b"\x0a" + bytes(8) + number + b"\3" + bytes(16)),
        ]
    one = Steps(SAMPLES[2].steps[:1]).encode()
    for count in (2, 2**20, 2**32 - 1):
        number = struct.pack("<I", count)
        hostile += [(Steps, one[:6] + number + one[10:]), (Steps, one[:10] + number + one[14:])]
    tracemalloc.start()
    try:
        for kind, data in hostile:
            with pytest.raises(MessageError):
                kind.decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_messages_that_cannot_be():
    for bad in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite"):
            HalfModel(np.array([bad], np.float16))
        with pytest.raises(ConfigError, match="finite"):
            Update(0, bytes(32), np.array([bad], np.float16))
        with pytest.raises(ConfigError, match="finite"):
            Snapshot(0, np.ones(1, np.float32), RuleState(1, {"buffer": np.array([bad], np.float32)}))
    with pytest.raises(ConfigError):
        Update(0, bytes(31), np.ones(1, np.float16))
    with pytest.raises(ConfigError, match="one length"):
        Snapshot(0, np.ones(2, np.float32), RuleState(1, {"buffer": np.ones(3, np.float32)}))
    with pytest.raises(ConfigError, match="no rule"):
        Snapshot(0, np.ones(2, np.float32), RuleState(1, {"mean": np.ones(2, np.float32)}))
    with pytest.raises(MessageError, match="rule number"):
        Snapshot.decode(b"BFFL\x01\x0a" + bytes(8) + struct.pack("<QBQf", 1, 4, 0, 1.0))
    rule, total = Rule("sgd", 0.1), RoundSum(3, np.ones(K))
    backprop = dataclasses.replace(ONE, fidelity="backprop")
    for steps in (
        [],
        [(ONE, rule, RoundSum(4, np.ones(K)))],
        [(ONE, rule, RoundSum(3, np.ones(K + 1)))],
        [(backprop, rule, total)],
        [(dataclasses.replace(ONE, local=LocalTraining()), rule, total)],
        [(ONE, rule, total), (ONE, rule, total)],
        [(ONE, rule, total), (dataclasses.replace(ONE, round=2), rule, RoundSum(2, np.ones(K)))],
    ):
        with pytest.raises(ConfigError):
            Steps(tuple(Step(*step) for step in steps))
        encoded = [Step(*step).encode() for step in steps]
        with pytest.raises(MessageError):
            Steps.decode(b"BFFL\x01\x09" + struct.pack("<I", len(encoded)) + b"".join(encoded))


# -- what a client does with a package ---------------------------------------------------------------------


def test_models_need_nothing_held():
    w = row(5)
    half = w.astype(np.float16)
    for package, model in (
        (ModelMessage(w).encode(), w),
        (HalfModel(half).encode(), half.astype(np.float32)),
        (Snapshot(6, w).encode(), w),
    ):
        for holding in (None, Holding.first(row(6))):
            got = receive(holding, plan_for(6, model), package, LAYOUT, digest_of)
            assert (got.round, got.weights.tobytes(), got.state) == (6, model.tobytes(), None)
            assert not got.weights.flags.writeable


def test_no_package_is_for_those_who_hold_the_weights():
    w = row(5)
    first = Holding.first(w)
    got = receive(first, plan_for(4, w), b"", LAYOUT, digest_of)
    assert (got.round, got.weights.tobytes()) == (4, w.tobytes())
    assert got.state.steps == 0
    with pytest.raises(DigestMismatchError) as caught:
        receive(first, plan_for(4, row(6)), b"", LAYOUT, digest_of)
    assert caught.value.held == struct.pack("<Q", 0) + digest_of(w)
    with pytest.raises(DigestMismatchError) as caught:
        receive(None, plan_for(4, w), b"", LAYOUT, digest_of)
    assert caught.value.held == b""


def after(w, state, plan, rule, total):
    """The server's step, without anything of ``downlink``."""
    gradient = plan.estimator.gradient(total.values, plan.stream, LAYOUT)
    return rule.step(w, state, clip_inf_norm(gradient, rule.clip))


def chain(rule, count, start=0):
    """A server's weights, states and steps over some rounds."""
    rng = np.random.default_rng(start)
    weights, states, steps = [row(9)], [rule.fresh(LAYOUT.n)], []
    for r in range(start, start + count):
        plan, total = plan_for(r, weights[-1]), RoundSum(r, rng.normal(size=K))
        steps.append(Step(plan, rule, total))
        w, state = after(weights[-1], states[-1], plan, rule, total)
        weights.append(w)
        states.append(state)
    return weights, states, steps


@pytest.mark.parametrize(
    "rule", [Rule("sgd", 0.1), Rule("momentum", 0.1, 0.9), Rule("adam", 0.01, 0.9, 0.99, clip=0.2)]
)
def test_steps_are_repeated_and_those_taken_already_passed_over(rule):
    weights, states, steps = chain(rule, 5)
    first = Holding.first(weights[0])
    middle = receive(first, plan_for(2, weights[2]), Steps(tuple(steps[:2])).encode(), LAYOUT, digest_of)
    end = plan_for(5, weights[5])
    for holding, package in (
        (first, steps),
        (middle, steps[2:]),
        (middle, steps),  # the server thought it further behind
        (middle, steps[1:]),
    ):
        got = receive(holding, end, Steps(tuple(package)).encode(), LAYOUT, digest_of)
        assert (got.round, got.weights.tobytes()) == (5, weights[5].tobytes())
        assert got.state.steps == 5
        assert {k: v.tobytes() for k, v in got.state.arrays.items()} == {
            k: v.tobytes() for k, v in states[5].arrays.items()
        }
        again = receive(got, end, Steps(tuple(package)).encode(), LAYOUT, digest_of)
        assert again.weights.tobytes() == got.weights.tobytes()
        assert again.state.steps == 5


def test_rounds_without_a_sum_leave_no_step():
    rule = Rule("momentum", 0.1, 0.9)
    first, state = row(9), rule.fresh(LAYOUT.n)
    steps = []
    w = first
    for r in (1, 4):  # rounds 0, 2, 3, 5 and 6 gave no sum
        plan, total = plan_for(r, w), RoundSum(r, np.random.default_rng(r).normal(size=K))
        steps.append(Step(plan, rule, total))
        w, state = after(w, state, plan, rule, total)
        held = receive(
            Holding.first(first), plan_for(r + 1, w), Steps(tuple(steps)).encode(), LAYOUT, digest_of
        )
        assert held.weights.tobytes() == w.tobytes()
    idle = receive(held, plan_for(7, w), b"", LAYOUT, digest_of)
    assert idle.round == 7
    assert idle.state.steps == 2


def spoiled(values):
    changed = values.copy()
    changed.view(np.uint32)[17] ^= 1 << 22  # half of it, so that a state's error reaches a weight
    return changed


def test_whatever_does_not_fit_is_said_and_what_is_held_named():
    rule = Rule("momentum", 0.1, 0.9)
    weights, states, steps = chain(rule, 3)
    end = plan_for(3, weights[3])
    fine = Holding(1, weights[1], states[1])
    whole = Steps(tuple(steps)).encode()
    assert receive(fine, end, whole, LAYOUT, digest_of).round == 3
    lied = [steps[0], steps[1]._replace(total=RoundSum(1, steps[1].total.values * 1.001)), steps[2]]
    rushed = [steps[0], steps[1]._replace(rule=Rule("momentum", 0.11, 0.9)), steps[2]]
    foreign = [steps[0], steps[1]._replace(rule=Rule("adam", 0.1)), steps[2]]
    for holding, package in (
        (Holding(1, spoiled(weights[1]), states[1]), whole),
        (Holding(1, weights[1], RuleState(1, {"buffer": spoiled(states[1].arrays["buffer"])})), whole),
        (Holding(1, weights[1], states[0]), whole),
        (Holding(1, weights[1]), whole),  # nobody said what the rule remembers
        (Holding(0, weights[1], states[1]), whole),
        (Holding(2, weights[1], states[1]), whole),
        (Holding(5, weights[1], states[1]), whole),
        (Holding(0, weights[0], states[0]), Steps(tuple(steps[1:])).encode()),  # one is missing
        (Holding(0, weights[0], states[0]), Steps((steps[0], steps[2])).encode()),
        (fine, Steps(tuple(steps[:2])).encode()),  # the last is missing
        (fine, Steps(tuple(lied)).encode()),
        (fine, Steps(tuple(rushed)).encode()),
        (fine, Steps(tuple(foreign)).encode()),
        (fine, Snapshot(2, weights[3]).encode()),  # of another round
        (fine, Snapshot(3, spoiled(weights[3])).encode()),
        (fine, ModelMessage(weights[3][:-1]).encode()),
        (fine, ModelMessage(weights[2]).encode()),
        (fine, HalfModel(weights[3].astype(np.float16)).encode()),
        (fine, Update(2, digest_of(weights[2]), np.zeros(LAYOUT.n, np.float16)).encode()),
        (fine, Update(1, digest_of(weights[1]), np.zeros(LAYOUT.n - 1, np.float16)).encode()),
        (fine, Update(1, digest_of(weights[1]), np.zeros(LAYOUT.n, np.float16)).encode()),
    ):
        before = bits(holding)
        with pytest.raises(DigestMismatchError) as caught:
            receive(holding, end, package, LAYOUT, digest_of)
        assert caught.value.held == struct.pack("<Q", holding.round) + digest_of(holding.weights)
        assert bits(holding) == before
    for package in (Snapshot(2, weights[3]), ModelMessage(weights[2]), SAMPLES[1], SAMPLES[2]):
        with pytest.raises(DigestMismatchError) as caught:
            receive(None, end, package.encode(), LAYOUT, digest_of)
        assert caught.value.held == b""


def test_an_update_is_added_once():
    w, added = row(1), row(2, scale=0.01).astype(np.float16)
    v = w + added.astype(np.float32)
    package, plan = Update(0, digest_of(w), added).encode(), plan_for(1, v)
    got = receive(Holding.first(w), plan, package, LAYOUT, digest_of)
    assert (got.round, got.weights.tobytes(), got.state) == (1, v.tobytes(), None)
    again = receive(got, plan, package, LAYOUT, digest_of)
    assert again.weights.tobytes() == v.tobytes()


def test_numbers_that_are_none_are_not_held_whatever_their_digest():
    w = np.full(LAYOUT.n, 3e38, np.float32)
    plan, rule, total = plan_for(0, w), Rule("sgd", 1e38), RoundSum(0, np.full(K, 1e3))
    with np.errstate(all="ignore"):
        ruined, _ = after(w, RuleState(), plan, rule, total)
    assert not np.isfinite(ruined).all()
    package = Steps((Step(plan, rule, total),)).encode()
    with pytest.raises(DigestMismatchError):
        receive(Holding.first(w), plan_for(1, ruined), package, LAYOUT, digest_of)


def test_a_plan_that_the_layout_cannot_serve_is_no_step():
    tall = dataclasses.replace(SAMPLES[2].steps[0].plan, round=0, weights_digest=digest_of(row(1)))
    package = Steps((Step(tall, Rule("sgd", 0.1), RoundSum(0, np.ones(2))),)).encode()
    short = Layout.flat(LAYOUT.n - 1)
    with pytest.raises(DigestMismatchError):
        receive(Holding.first(row(1)), plan_for(1, row(2)), package, short, digest_of)


@pytest.mark.parametrize(
    "package", [b"B", b"BFFL", b"BFFL\x01", b"BFFL\x01\x01" + bytes(50), b"JUNK\x01\x07"]
)
def test_other_bytes_are_no_package(package):
    with pytest.raises(MessageError):
        receive(Holding.first(row(1)), plan_for(1, row(1)), package, LAYOUT, digest_of)


@settings(max_examples=200)
@given(st.binary(max_size=120), st.sampled_from([2, *KINDS]))
def test_hostile_packages_are_refused(body, kind):
    holding, plan = Holding.first(row(1)), plan_for(1, row(2))
    for package in (body, b"BFFL" + bytes([1, kind]) + body):
        with pytest.raises((MessageError, DigestMismatchError)):
            receive(holding, plan, package, LAYOUT, digest_of)
    assert holding.weights.tobytes() == row(1).tobytes()


def test_threads_change_no_bit():
    rule = Rule("adam", 0.01, 0.9, 0.99)
    weights, _, steps = chain(rule, 3)
    package, end = Steps(tuple(steps)).encode(), plan_for(3, weights[3])
    for threads in (1, 2, None):
        got = receive(Holding.first(weights[0]), end, package, LAYOUT, digest_of, threads=threads)
        assert got.weights.tobytes() == weights[3].tobytes()


# -- a federation ------------------------------------------------------------------------------------------


class Federation:
    """A server's loop around ``Downlink``, with torch, real slopes and clients that keep what they hold."""

    def __init__(self, mode, *, rule="adam", hidden=30, seed=0, clip=0.2):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(20, hidden), nn.ReLU(), nn.Linear(hidden, 5))
        self.runtime = TorchRuntime(module)
        self.layout, self.rule, self.clip = self.runtime.layout, rule, clip
        self.frozen = self.runtime.frozen_digest
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.normal(size=(64, 20)).astype(np.float32))
        self.batch = Batch(x, torch.from_numpy(rng.integers(0, 5, 64)))
        self.log, self.packages, self.mismatches = [], Counter(), Counter()
        self.start(mode)

    def start(self, mode):
        self.mode, self.round = mode, 0
        self.flat = torch.from_numpy(self.runtime.weights())
        self.gradient = torch.zeros_like(self.flat)
        parameters = [nn.Parameter(view) for view in self.layout.split(self.flat)]
        for parameter, view in zip(parameters, self.layout.split(self.gradient), strict=True):
            parameter.grad = view
        self.optimizer = Portable(parameters, self.rule, 0.02)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: 0.97**t)
        self.downlink = Downlink(mode)

    @property
    def w(self):
        return self.flat.numpy().copy()

    def digest(self, weights):
        return weights_digest(weights, self.layout, self.frozen)

    def first(self):
        return Holding.first(self.runtime.weights())

    def open(self):
        self.v = self.downlink.sent(self.round, self.w)
        digest = self.digest(self.v)
        self.plan = RoundPlan(self.round, SEED, SteinEstimator(8, 1e-3, "central"), digest)
        self.downlink.check(self.plan, self.optimizer.rule(self.clip))
        self.downlink.begin(self.plan, self.v, self.optimizer.rule_state)

    def give(self, name, holding, package):
        self.packages[package[5] if package else 0] += 1
        return receive(holding, self.plan, package, self.layout, self.digest)

    def ask(self, name, holding, catch_ups=1):
        """What a client holds after this round; None where it was left out."""
        package = self.downlink.package(name)
        for _ in range(catch_ups + 1):
            try:
                holding = self.give(name, holding, package)
            except DigestMismatchError as error:
                self.mismatches[name] += 1
                package = self.downlink.catch_up(name, error.held)
                if package is None:
                    return None
                continue
            self.downlink.holds(name, self.round)
            assert holding.weights.tobytes() == self.v.tobytes()
            return holding
        return None

    def close(self, holding=None):
        """The round's end: a step on the slopes that a client measures at what it holds."""
        if holding is not None:
            measured = self.plan.estimator.slopes(self.runtime, holding.weights, self.batch, self.plan.stream)
            self.apply(RoundSum(self.round, measured.slopes))
        self.round += 1

    def apply(self, total):
        estimator, stream = self.plan.estimator, self.plan.stream
        gradient = clip_inf_norm(estimator.gradient(total.values, stream, self.layout), self.clip)
        self.gradient.copy_(torch.from_numpy(gradient))
        rule = self.optimizer.rule(self.clip)
        self.optimizer.step()
        self.downlink.stepped(self.plan, rule, total)
        self.log.append((self.plan, total))
        self.scheduler.step()

    def state(self):
        return self.w, self.optimizer.state_dict(), self.scheduler.state_dict(), self.downlink.state()

    def restart(self, state, round_, *, refill=True):
        """Another server process that goes on from a checkpoint and, if asked, the scalar log."""
        weights, optimizer, scheduler, (arrays, rest) = state
        self.start(self.mode)
        self.flat.copy_(torch.from_numpy(weights))
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(scheduler)
        self.downlink.load_state(arrays, rest)
        self.round = round_
        self.log = [entry for entry in self.log if entry[0].round < round_]
        if refill:
            self.downlink.refill(iter(self.log))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_clients_hold_what_the_plan_is_made_for(mode, rule):
    """30 rounds of clients that are away, join late, lose what they held, or hold spoiled weights."""
    rng = np.random.default_rng(MODES.index(mode))
    f = Federation(mode, rule=rule)
    holdings = {f"c{i}": None for i in range(6)}
    for r in range(30):
        f.open()
        answered = []
        for name in holdings:
            if rng.random() < 0.35 or (name == "c5" and r < 12):
                continue
            held = holdings[name]
            event = rng.random()
            if held is not None and event < 0.08:  # a restarted device
                held = None
            elif held is not None and event < 0.16:
                held = Holding(held.round, spoiled(held.weights), held.state)
            got = f.ask(name, f.first() if held is None else held)
            assert got is not None
            assert got.round == r
            if mode == "scalars":
                mine, theirs = got.state, f.optimizer.rule_state()
                assert mine.steps == theirs.steps
                if mine.steps:
                    assert bits(mine.arrays) == bits(theirs.arrays)
            holdings[name] = got
            answered.append(got)
            if rng.random() < 0.1:  # its answer is lost: the server does not know what it holds
                f.downlink._held.pop(name, None)
        f.close(answered[0] if answered and rng.random() < 0.9 else None)
    kinds = {"model": {2}, "float16": {7}, "update": {0, 8, 10}, "scalars": {0, 9, 10}}
    assert set(f.packages) == kinds[mode]
    assert len(f.log) > 20
    if mode in ("model", "float16"):
        assert not f.mismatches
    else:
        assert sum(f.mismatches.values()) > 3


@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize("mode", ["update", "scalars"])
def test_a_server_restarted_from_its_checkpoint_goes_on_alike(mode, refill):
    def run(restart):
        f = Federation(mode)
        held, shown = f.first(), []
        for r in range(16):
            if r == 9 and restart:
                f.open()  # the plan of a round may be made before its checkpoint
                state = f.state()
                f.restart(state, 9, refill=refill)
            f.open()
            held = f.ask("c", held)
            shown.append(f.v.tobytes())
            f.close(held if r != 5 else None)
        return f, shown

    straight, expected = run(False)
    again, shown = run(True)
    assert shown == expected
    assert again.w.tobytes() == straight.w.tobytes()
    assert straight.packages[10] == 0
    if mode == "scalars":
        # With its history it knows the way from any round; without, a client that is ahead needs the whole.
        assert again.packages[10] == (0 if refill else 1)
        assert again.mismatches.total() == 0
    else:
        assert again.packages[10] == 1


def test_a_server_set_back_is_followed():
    """It goes on from an older checkpoint; its clients know rounds that never were."""
    f = Federation("scalars")
    holdings = {name: f.first() for name in "ab"}
    for r in range(12):
        if r == 6:
            saved = f.state()
        f.open()
        holdings = {name: f.ask(name, held) for name, held in holdings.items()}
        f.close(holdings["a"])
    f.restart(saved, 6)
    for r in range(6, 15):
        f.open()
        for name in "ab" if r > 6 else "a":
            holdings[name] = f.ask(name, holdings[name])
            assert holdings[name] is not None
        f.apply(RoundSum(r, np.random.default_rng(r).normal(size=8)))
        f.round += 1
    assert f.packages[10] == 2  # each client once


def test_a_spoiled_memory_is_found_and_healed_by_a_snapshot():
    f = Federation("scalars")
    held = f.first()
    for r in range(6):
        f.open()
        if r == 3:
            mean = spoiled(held.state.arrays["mean"])
            held = Holding(
                held.round, held.weights, RuleState(held.state.steps, {**held.state.arrays, "mean": mean})
            )
        held = f.ask("c", held)
        f.close(held)
    assert (f.mismatches["c"], f.packages[10], f.packages[9]) == (1, 1, 5)


def test_one_catch_up_a_round_is_enough_in_the_end():
    """Where steps from a round on record do not help, the next catch-up is everything."""
    f = Federation("scalars")
    held = f.first()
    for r in range(9):
        f.open()
        if r < 4:
            held = f.ask("c", held)
        if r == 2:
            old = held
        f.close(held)
    # A device set back to an older state, of which it holds half; the server counts on round 3.
    rows = {**old.state.arrays, "square": old.state.arrays["square"] * np.float32(4)}
    held = Holding(old.round, old.weights, RuleState(old.state.steps, rows))
    f.open()
    assert f.ask("c", held) is None
    f.close()
    f.open()
    assert f.ask("c", held).round == f.round
    assert f.packages[10] == 1


def test_a_client_is_not_sent_for_ever():
    """What claims to hold anything at all gets two packages more in a round, then none."""
    for mode in MODES:
        f = Federation(mode)
        held = f.first()
        for _ in range(5):
            f.open()
            held = f.ask("good", held)
            f.close(held)
        f.open()
        digests = {r: plan.weights_digest for r, (plan, _) in enumerate(f.log)} | {5: f.plan.weights_digest}
        for claim in (b"", b"x", bytes(40), *(struct.pack("<Q", r) + d for r, d in digests.items())):
            f.downlink.package("liar")
            given = 0
            while f.downlink.catch_up("liar", claim) is not None:
                given += 1
                assert given <= 2
        assert f.ask("good", held).round == 5


def test_what_clients_need_alike_is_one_object():
    for mode in MODES:
        f = Federation(mode)
        holdings = {name: f.first() for name in "abcd"}
        for r in range(4):
            f.open()
            here = "abcd" if r < 2 else "ab"
            for name in here:
                holdings[name] = f.ask(name, holdings[name])
            f.close(holdings["a"])
        f.open()
        packages = {name: f.downlink.package(name) for name in "abcd"}
        assert packages["a"] is packages["b"]
        assert packages["c"] is packages["d"]
        assert (packages["a"] is packages["c"]) == (mode in ("model", "float16"))


def test_scalars_cost_the_same_whatever_the_model():
    sizes = []
    for hidden in (20, 200):
        f = Federation("scalars", hidden=hidden)
        held, lengths = f.first(), []
        for _ in range(4):
            f.open()
            lengths.append(len(f.downlink.package("c")))
            held = f.ask("c", held)
            f.close(held)
        sizes.append((f.layout.n, lengths))
    (small, lengths), (large, again) = sizes
    assert large > 9 * small
    assert lengths == again == [0] + [10 + 12 + 108 + 41 + 18 + 8 * 8] * 3


def test_the_history_is_never_more_than_a_snapshot():
    f = Federation("scalars", rule="sgd")
    held = f.first()
    size = Snapshot.size(f.layout.n, "sgd")
    one = 12 + 108 + 17 + 18 + 8 * 8
    most = (size - 11) // one  # steps that are fewer bytes
    assert 5 < most < 20
    for r in range(most + 3):
        f.open()
        stranger = f.downlink.package("stranger")
        assert len(stranger) == (10 + r * one if 0 < r <= most else size if r else 0)
        assert f.downlink.state()[0]["rules"].nbytes == min(r, most) * (9 + 17)
        assert f.give("stranger", f.first(), stranger).weights.tobytes() == f.v.tobytes()
        held = f.ask("c", held)
        f.close(held)
    assert f.mismatches.total() == 0


def test_a_log_with_a_gap_refills_nothing():
    f = Federation("scalars")
    held = f.first()
    for _ in range(6):
        f.open()
        held = f.ask("c", held)
        f.close(held)
    state = f.downlink.state()
    full = f.log[:]
    for log, kept in ((full[:3] + full[4:], 0), (full[:-1], 0), ([], 0), (full, 6)):
        fresh = Downlink("scalars")
        fresh.load_state(*state)
        fresh.refill(log)
        assert len(fresh._steps) == kept
        assert bits(fresh.state()[0]) == bits(state[0])  # what was not refilled yet is not forgotten
        fresh.sent(6, f.w)
        fresh.begin(plan_like(f, 6), f.w, f.optimizer.rule_state)
        kind = fresh.package("stranger")[5]
        assert kind == (Steps.KIND if kept else Snapshot.KIND)


def plan_like(f, round_):
    return RoundPlan(round_, SEED, SteinEstimator(8, 1e-3, "central"), f.digest(f.w))


def test_states_of_others_are_refused():
    states = {}
    for mode in MODES:
        downlink = Downlink(mode)
        downlink.sent(0, row(1))
        states[mode] = downlink.state()
    for mode in MODES:
        for other in MODES:
            fresh = Downlink(mode)
            if other != mode:
                with pytest.raises(ConfigError, match="downlink"):
                    fresh.load_state(*states[other])
        fresh = Downlink(mode)
        fresh.sent(0, row(1, 7))
        with pytest.raises(ConfigError, match="7"):
            fresh.load_state(*states[mode])
    arrays, rest = states["update"]
    with pytest.raises(ConfigError):
        Downlink("update").load_state({"sent": arrays["sent"][:-1]}, rest)
    arrays, rest = states["scalars"]
    with pytest.raises(MessageError):
        Downlink("scalars").load_state({"rules": np.arange(9, dtype=np.uint8)}, rest)


def test_what_scalars_need():
    plan, rule = plan_for(0, row(1)), Rule("sgd", 0.1)
    for mode in MODES:
        Downlink(mode).check(plan, rule)
    scalars = Downlink("scalars")
    with pytest.raises(ConfigError, match="Portable"):
        scalars.check(plan, None)
    for change in ({"fidelity": "law"}, {"fidelity": "backprop"}, {"local": LocalTraining()}):
        with pytest.raises(ConfigError, match="slopes"):
            scalars.check(dataclasses.replace(plan, **change), rule)
        Downlink("update").check(dataclasses.replace(plan, **change), None)
    with pytest.raises(ConfigError, match="unknown downlink"):
        Downlink("pigeon")
    with pytest.raises(ConfigError, match="begin"):
        scalars.package("c")


# -- rounding ----------------------------------------------------------------------------------------------

HALF = 2.0**-11  # relative, of float16's normal numbers; half of its smallest step is 2⁻²⁵
U = 2.0**-24


def test_float16_is_within_its_rounding():
    w = np.concatenate([row(1), row(2, scale=1e-6), row(3, scale=1e4)]).clip(-65504, 65504)
    v = Downlink("float16").sent(0, w)
    assert (np.abs(v - w) <= HALF * np.abs(w) + 2.0**-25).all()
    assert v.astype(np.float16).astype(np.float32).tobytes() == v.tobytes()
    exact = np.array([1 + HALF, 1 + 3 * HALF, -0.0, 2.0**-24], np.float32)  # ties go to even
    expected = np.array([1.0, 1 + 4 * HALF, -0.0, 2.0**-24], np.float32)
    assert Downlink("float16").sent(0, exact).tobytes() == expected.tobytes()


@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_float16_refuses_what_it_cannot_hold(value):
    w = row(1)
    w[5] = value
    with pytest.raises(ConfigError, match=rf"{re.escape(f'{value:g}')}: .* 65504"):
        Downlink("float16").sent(0, w)
    w[5] = 65519.0
    assert Downlink("float16").sent(0, w)[5] == 65504.0


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_updates_stay_within_one_rounding(scale):
    """No error of a round is left for the next: |V − W| is that of rounding the last update alone."""
    rng = np.random.default_rng(4)
    downlink, w = Downlink("update"), row(1)
    v = downlink.sent(0, w)
    assert v.tobytes() == w.tobytes()
    for r in range(1, 60):
        before = v
        w = w + (rng.normal(size=len(w)) * scale).astype(np.float32)
        v = downlink.sent(r, w)
        missing = np.abs(w.astype(np.float64) - before)
        # The difference, its half, the sum: three roundings.
        bound = HALF * (1 + U) * missing + 2.0**-25 + U * (missing + np.abs(w) + np.abs(v - w))
        assert (np.abs(v.astype(np.float64) - w) <= bound).all()
        assert downlink.sent(r, w) is v  # once a round
    for r in range(60, 64):  # while nothing moves, what is missing goes away
        v = downlink.sent(r, w)
    assert (np.abs(v - w) <= 2 * U * np.abs(w) + 2.0**-25).all()


def test_an_update_beyond_float16_arrives_in_several():
    downlink, w = Downlink("update"), row(1)
    downlink.sent(0, w)
    w = w.copy()
    w[3], w[4] = 2e5, -1e5
    for r in range(1, 6):
        v = downlink.sent(r, w)
        assert np.isfinite(v).all()
    assert np.abs(v - w).max() <= 1e-6 * 2e5


def test_rounds_left_out_are_gone_through():
    rng = np.random.default_rng(5)
    straight, leaping, w = Downlink("update"), Downlink("update"), row(1)
    for r in range(12):
        v = straight.sent(r, w)
        if r in (0, 1, 5, 6, 11):  # a replay asks only for rounds with a step; W was the same between
            assert leaping.sent(r, w).tobytes() == v.tobytes()
        if r in (0, 1, 5, 6):
            w = w + (rng.normal(size=len(w)) * 0.01).astype(np.float32)


def test_half_precision_loses_little_of_the_training():
    """The same job by each downlink: the model's own loss falls, and V's with it."""
    ends = {}
    for mode in MODES:
        f = Federation(mode)
        held = f.first()
        for _ in range(25):
            f.open()
            held = f.ask("c", held)
            f.close(held)
        ends[mode] = f.w
    first = loss_of(f, f.runtime.weights())
    losses = {mode: loss_of(f, w) for mode, w in ends.items()}
    assert losses["model"] < 0.9 * first
    assert ends["scalars"].tobytes() == ends["model"].tobytes()
    for mode in ("float16", "update"):
        assert ends[mode].tobytes() != ends["model"].tobytes()
        assert abs(losses[mode] - losses["model"]) < 0.05 * (first - losses["model"])


def loss_of(f, weights):
    measured = SteinEstimator(1).slopes(f.runtime, weights, f.batch, f.plan.stream)
    return measured.loss


def test_a_round_of_500_slopes_is_far_below_10_kb():
    plan = plan_for(1, row(1), directions=500)
    step = Step(plan, Rule("adam", 0.1), RoundSum(1, np.ones(500)))
    down = len(plan.encode()) + len(Steps((step,)).encode())
    up = len(RoundResult(1, plan.digest, 1, np.ones(500, np.float32)).encode())
    assert (down, up) == (108 + 4189, 2058)
