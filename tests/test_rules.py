"""Rules: the bits that IEEE arithmetic gives, torch's optimizers to rounding, one form on the wire."""

import contextlib
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from baffle.errors import ConfigError, MessageError
from baffle.estimator import SteinEstimator
from baffle.local import Adam, Sgd
from baffle.optimizers import Portable
from baffle.perturbations import Layout
from baffle.plan import RoundSum
from baffle.rules import RULES, STATE, Rule, RuleState, clip_inf_norm, power
from baffle.runtimes.torch import TorchRuntime
from baffle.server import Server

U = 2.0**-24  # half a unit in float32's last place
TINY = 2.0**-149

SOME = [
    Rule("sgd", 0.05),
    Rule("momentum", 0.05, 0.9),
    Rule("adam", 0.02, 0.9, 0.99),
    Rule("adam", 0.003, 0.8, 0.999, 1e-6),
    Rule("adam", 0.02),
]
EACH = pytest.mark.parametrize("rule", SOME, ids=lambda rule: f"{rule.name}-{rule.beta1}-{rule.beta2}")


def walk(rule, w, gradients):
    """Weights and states after each step."""
    state = rule.fresh(len(w))
    for g in gradients:
        w, state = rule.step(w, state, g)
        yield w, state


# -- bits: a second implementation, in Python's floats -----------------------------------------------------


def f32(x):
    """A float64 rounded to float32: to nearest, ties to even."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


class Slow:
    """One entry of a rule. float64 has sums, products, quotients and roots of float32 so much more precisely
    that rounding them to float32 is rounding the exact ones (53 ≥ 2·24 + 2 digits)."""

    def __init__(self, rule, w):
        self.rule, self.w, self.t = rule, w, 0
        self.a = self.b = 0.0

    def step(self, g):
        rule, self.t = self.rule, self.t + 1
        rate = f32(rule.learning_rate)
        if rule.name == "sgd":
            self.w = f32(self.w - f32(rate * g))
        elif rule.name == "momentum":
            self.a = f32(f32(self.a * f32(rule.beta1)) + g)
            self.w = f32(self.w - f32(rate * self.a))
        else:
            rate = f32(rule.learning_rate / (1.0 - self.power(rule.beta1)))
            root = f32(math.sqrt(1.0 - self.power(rule.beta2)))
            self.a = f32(f32(self.a * f32(rule.beta1)) + f32(f32(1.0 - rule.beta1) * g))
            square = f32(f32(f32(1.0 - rule.beta2) * g) * g)
            self.b = f32(f32(self.b * f32(rule.beta2)) + square)
            below = f32(f32(f32(math.sqrt(self.b)) / root) + f32(rule.eps))
            self.w = f32(self.w - f32(f32(rate * self.a) / below))

    def power(self, base):
        return (
            base if self.t == 1 else {2: base * base, 3: base * (base * base), 4: (base * base) ** 2}[self.t]
        )


def numbers(rng, count):
    """float32 of every size: normal, tiny, subnormal, zeros of both signs."""
    values = rng.normal(size=count) * 10.0 ** rng.uniform(-46, 8, count)
    some = [0.0, -0.0, TINY, -TINY, 2.0**-126, 2.0**-127, 1.0, -1.0, 3e-23, -4e-23]
    return np.concatenate([some, values]).astype(np.float32)


@EACH
def test_bits_are_those_of_float32_arithmetic(rule):
    rng = np.random.default_rng(5)
    w = numbers(rng, 3000)
    gradients = [numbers(rng, 3000) for _ in range(4)]
    assert sum(((g != 0) & (np.abs(g) < 2.0**-126)).sum() for g in gradients) > 300  # subnormal
    slow = [Slow(rule, float(each)) for each in w]
    for g, (now, state) in zip(gradients, walk(rule, w, gradients), strict=True):
        for entry, value in zip(slow, g, strict=True):
            entry.step(float(value))
        assert now.tobytes() == np.array([e.w for e in slow], np.float32).tobytes()
        for name, rows in zip(STATE[rule.name], ("a", "b"), strict=False):
            expected = np.array([getattr(e, rows) for e in slow], np.float32)
            assert state.arrays[name].tobytes() == expected.tobytes()


@EACH
def test_entries_do_not_mix_whatever_their_number(rule):
    rng = np.random.default_rng(6)
    n = 40_003  # several blocks, the last one short
    w, gradients = rng.normal(size=n).astype(np.float32), rng.normal(size=(3, n)).astype(np.float32)
    *_, (whole, state) = walk(rule, w, gradients)
    for part in (slice(0, 1), slice(16383, 16385), slice(5, 40_003, 7), slice(n - 1, n)):
        *_, (alone, own) = walk(rule, w[part], gradients[:, part])
        assert alone.tobytes() == whole[part].tobytes()
        for name, row in own.arrays.items():
            assert row.tobytes() == state.arrays[name][part].tobytes()


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.99, 0.999, 1 - 2.0**-53])
def test_powers(base):
    for exponent in [*range(70), 1000, 12_345, 10**7]:
        exact = Fraction(base) ** exponent if exponent < 70 else None
        got = power(base, exponent)
        if exact is not None:
            assert abs(Fraction(got) - exact) <= exact * 2 * exponent * Fraction(1, 2**53)
        else:
            assert got == pytest.approx(math.exp(exponent * math.log(base)) if base else 0.0, rel=1e-9, abs=0)
    assert (power(base, 1), power(base, 0)) == (base, 1.0)
    product = base * base
    assert power(base, 7) == (base * product) * (product * product)


# -- torch's optimizers ------------------------------------------------------------------------------------


def twin(rule, parameters):
    if rule.name == "adam":
        return torch.optim.Adam(parameters, rule.learning_rate, (rule.beta1, rule.beta2), rule.eps)
    return torch.optim.SGD(parameters, rule.learning_rate, momentum=rule.beta1)


class Exact:
    """A rule in float64, with a bound on what float32 may differ: each operation rounds once (running error
    analysis). ``off`` bounds the weights' error; ``m_off`` and ``v_off`` those of the state."""

    def __init__(self, rule, w):
        self.rule, self.w, self.t = rule, w.astype(np.float64), 0
        self.m, self.v, self.off, self.m_off, self.v_off = (np.zeros(len(w)) for _ in range(5))

    def step(self, g):
        rule, g, self.t = self.rule, g.astype(np.float64), self.t + 1
        b1, b2 = rule.beta1, rule.beta2
        own = 1 - b1 if rule.name == "adam" else 1.0
        # A product and its rounded factor, another, their sum: torch interpolates, in as many roundings.
        self.m_off = b1 * self.m_off + 5 * U * (b1 * np.abs(self.m) + own * np.abs(g)) + 5 * TINY
        self.m = b1 * self.m + own * g
        if rule.name == "adam":
            self.v_off = b2 * self.v_off + 5 * U * (b2 * self.v + (1 - b2) * g * g) + 5 * TINY
            self.v = b2 * self.v + (1 - b2) * g * g
            below = np.sqrt(self.v) / math.sqrt(1 - b2**self.t) + rule.eps
            step = rule.learning_rate / (1 - b1**self.t) * self.m / below
            rate = rule.learning_rate / (1 - b1**self.t) / below
            step_off = rate * self.m_off + np.abs(step) * (0.5 * self.v_off / self.v + 8 * U)
        else:
            step = rule.learning_rate * self.m
            step_off = rule.learning_rate * self.m_off + 3 * U * np.abs(step)
        self.w -= step
        self.off += 1.01 * step_off + U * (np.abs(self.w) + self.off)


@EACH
def test_200_steps_as_torchs_and_as_the_formula(rule):
    rng = np.random.default_rng(7)
    w = rng.normal(size=400).astype(np.float32)
    sizes = 10.0 ** rng.integers(-3, 3, 400)
    gradients = (rng.normal(size=(200, 400)) * sizes).astype(np.float32)
    p = nn.Parameter(torch.from_numpy(w.copy()))
    torchs, exact = twin(rule, [p]), Exact(rule, w)
    for g, (mine, _) in zip(gradients, walk(rule, w, gradients), strict=True):
        p.grad = torch.from_numpy(g.copy())
        torchs.step()
        exact.step(g)
        assert (np.abs(mine - exact.w) <= exact.off).all()
        assert (np.abs(p.detach().numpy() - exact.w) <= exact.off).all()
    moved = np.abs(exact.w - w)
    assert np.median(exact.off / moved) < 1e-3  # the bound would find one wrong step in a thousand


def test_the_first_step_of_momentum_is_the_gradients():
    g = np.array([1.0, -2.0, 1e-40], np.float32)
    rule = Rule("momentum", 1.0, 0.9)
    _, state = rule.step(np.zeros(3, np.float32), rule.fresh(3), g)
    assert state.arrays["buffer"].tobytes() == g.tobytes()


@pytest.mark.parametrize(
    ("local", "rule"),
    [(Sgd(0.05), Rule("sgd", 0.05)), (Adam(0.02), Rule("adam", 0.02, 0.9, 0.99))],
    ids=["sgd", "adam"],
)
def test_local_steps_are_the_rules(local, rule):
    rng = np.random.default_rng(8)
    w, gradients = rng.normal(size=50).astype(np.float32), rng.normal(size=(5, 50)).astype(np.float32)
    *_, (expected, _) = walk(rule, w, gradients)
    for g in gradients:
        local(w, g)
    assert w.tobytes() == expected.tobytes()


# -- a rule as an optimizer ----------------------------------------------------------------------------------


SHAPES = ((3, 4), (5,), (), (2, 1, 3))
LAYOUT = Layout(tuple("abcd"), SHAPES)
PORTABLE = pytest.mark.parametrize("name", RULES)


def parameters(flat, gradient):
    found = [nn.Parameter(view) for view in LAYOUT.split(torch.from_numpy(flat))]
    for parameter, view in zip(found, LAYOUT.split(torch.from_numpy(gradient)), strict=True):
        parameter.grad = view
    return found


@PORTABLE
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=20),  # β₁ too
    ],
    ids=["lambda", "one-cycle"],
)
def test_portable_steps_are_the_rules_on_one_row(name, schedule):
    rng = np.random.default_rng(9)
    flat, gradient = rng.normal(size=LAYOUT.n).astype(np.float32), np.zeros(LAYOUT.n, np.float32)
    optimizer = Portable(parameters(flat, gradient), name, 0.1)
    scheduler = schedule(optimizer)
    row, state, rules = flat.copy(), RuleState(), set()
    for _ in range(20):
        gradient[:] = rng.normal(size=LAYOUT.n)
        rule = optimizer.rule(0.25)
        assert (rule.name, rule.clip) == (name, 0.25)
        rules.add(rule)
        row, state = rule.step(row, state, gradient)
        optimizer.step()
        scheduler.step()
        assert flat.tobytes() == row.tobytes()
        held = optimizer.rule_state()
        assert held.steps == state.steps
        assert held.arrays.keys() == state.arrays.keys() == set(STATE[name])
        for each, values in state.arrays.items():
            assert held.arrays[each].tobytes() == values.tobytes()
    assert len(rules) == 20


@PORTABLE
def test_a_server_goes_on_from_its_state(name):
    def server():
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        return Server(
            TorchRuntime(module),
            SteinEstimator(5),
            optimizer=lambda p: Portable(p, name, 0.05),
            scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
        )

    rng = np.random.default_rng(10)
    sums = [RoundSum(t, rng.normal(size=5)) for t in range(6)]
    straight, first, second = server(), server(), server()
    for total in sums:
        straight.apply(total)
    for total in sums[:3]:
        first.apply(total)
    second.load_state(*first.state())
    assert second.optimizer.rule() == first.optimizer.rule()
    for total in sums[3:]:
        second.apply(total)
    assert second.weights.tobytes() == straight.weights.tobytes()
    mine, theirs = second.optimizer.rule_state(), straight.optimizer.rule_state()
    assert mine.steps == theirs.steps == 6
    assert all(mine.arrays[each].tobytes() == theirs.arrays[each].tobytes() for each in STATE[name])


def test_before_its_first_step_an_optimizer_remembers_zeros():
    state = Portable(parameters(*np.ones((2, LAYOUT.n), np.float32))).rule_state()
    assert state.steps == 0
    assert {each: row.any() for each, row in state.arrays.items()} == {"mean": False, "square": False}
    assert all(row.shape == (LAYOUT.n,) for row in state.arrays.values())


def test_what_portable_refuses():
    ones = np.ones(LAYOUT.n, np.float32)
    fine = parameters(ones, ones.copy())
    with pytest.raises(ConfigError, match="one group"):
        Portable([{"params": fine[:1]}, {"params": fine[1:]}])
    for odd in (torch.zeros(3, dtype=torch.float64), torch.zeros(3, 4).t(), torch.zeros(3, device="meta")):
        with pytest.raises(ConfigError, match="contiguous float32"):
            Portable([nn.Parameter(odd)])
    for wrong in ({"lr": -1.0}, {"rule": "lion"}, {"betas": (1.0, 0.9)}, {"eps": 0.0}):
        with pytest.raises(ConfigError):
            Portable(fine, **wrong)
    with pytest.raises(ConfigError, match="not of momentum"):
        Portable(fine, "momentum").load_state_dict(Portable(fine, "adam").state_dict())
    fine[1].grad = None
    with pytest.raises(ConfigError, match="gradient"):
        Portable(fine).step()


# -- steps change nothing else -----------------------------------------------------------------------------


@EACH
def test_a_step_leaves_its_inputs(rule):
    rng = np.random.default_rng(11)
    w, g = rng.normal(size=(2, 20)).astype(np.float32)
    _, state = rule.step(w, rule.fresh(20), g)
    before = [row.copy() for row in (w, g, *state.arrays.values())]
    after, later = rule.step(w, state, g)
    assert [row.tobytes() for row in (w, g, *state.arrays.values())] == [row.tobytes() for row in before]
    for new in (after, *later.arrays.values()):
        assert not any(np.shares_memory(new, old) for old in (w, g, *state.arrays.values()))
    again, _ = rule.step(w, state, g)
    assert again.tobytes() == after.tobytes()


@EACH
def test_an_empty_state_is_that_of_the_first_step(rule):
    w, g = np.random.default_rng(12).normal(size=(2, 20)).astype(np.float32)
    first, _ = rule.step(w, RuleState(), g)
    assert first.tobytes() == rule.step(w, rule.fresh(20), g)[0].tobytes()


def test_states_of_others_are_refused():
    w = np.ones(4, np.float32)
    adam, momentum, sgd = Rule("adam", 0.1), Rule("momentum", 0.1, 0.9), Rule("sgd", 0.1)
    for rule, state in (
        (adam, momentum.fresh(4)),
        (adam, RuleState(3)),
        (momentum, adam.fresh(4)),
        (sgd, momentum.fresh(4)),
        (adam, adam.fresh(5)),
        (momentum, RuleState(1, {"buffer": np.zeros(4)})),
    ):
        with pytest.raises(ConfigError):
            rule.step(w, state, w)
    for gradient in (np.ones(5, np.float32), np.ones(4), np.ones((4, 1), np.float32)):
        with pytest.raises(ConfigError):
            sgd.step(w, RuleState(), gradient)


def test_numbers_beyond_float32_come_out_infinite_without_a_warning():
    w = np.array([3e38, 1.0], np.float32)
    for rule in (Rule("sgd", 1e300), Rule("momentum", 3.0, 0.9), Rule("adam", 1e300)):
        after, _ = rule.step(w, RuleState(), np.array([-3e38, 1.0], np.float32))
        assert not np.isfinite(after).all()


# -- bytes and settings ------------------------------------------------------------------------------------

real = st.floats(0, 1e300, allow_subnormal=True)
beta = st.floats(0, 1, exclude_max=True)
eps = st.floats(1e-45, 1e38)
rules = st.one_of(
    st.builds(Rule, st.just("sgd"), real, clip=real),
    st.builds(Rule, st.just("momentum"), real, beta, clip=real),
    st.builds(Rule, st.just("adam"), real, beta, beta, eps, real),
)


@given(rules)
def test_round_trip(rule):
    data = rule.encode()
    assert len(data) == {"sgd": 17, "momentum": 25, "adam": 41}[rule.name]
    assert Rule.decode(data) == rule
    for size in range(len(data)):
        with pytest.raises(MessageError):
            Rule.decode(data[:size])
    with pytest.raises(MessageError):
        Rule.decode(data + b"\0")


@given(rules, rules)
def test_two_rules_never_share_their_bytes(first, second):
    assert (first.encode() == second.encode()) == (first == second)


@given(st.integers(0, 4), st.sampled_from([16, 24, 40]), st.data())
def test_arbitrary_bytes_are_a_rule_or_refused(number, size, data):
    raw = bytes([number]) + data.draw(st.binary(min_size=size, max_size=size))
    with contextlib.suppress(MessageError):
        assert Rule.decode(raw).encode() == raw


def test_minus_zero_has_no_bytes_of_its_own():
    assert Rule("sgd", -0.0, clip=-0.0).encode() == Rule("sgd", 0.0).encode()
    with pytest.raises(MessageError, match="canonical"):
        Rule.decode(struct.pack("<Bdd", 0, 0.1, -0.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "lion"},
        *({"learning_rate": bad} for bad in (-1.0, math.nan, math.inf)),
        *({"clip": bad} for bad in (-1.0, math.nan, math.inf)),
        *({"beta1": bad} for bad in (-0.1, 1.0, math.nan)),
        *({"beta2": bad} for bad in (-0.1, 1.0, math.nan)),
        *({"eps": bad} for bad in (0.0, -1.0, 1e-46, 1e39, math.nan)),
        {"name": "sgd", "beta1": 0.9, "beta2": 0.0},
        {"name": "momentum", "beta2": 0.99},
        {"name": "momentum", "beta2": 0.0, "eps": 1e-7},
    ],
)
def test_rules_that_cannot_be(wrong):
    with pytest.raises(ConfigError):
        Rule(**{"name": "adam", "learning_rate": 0.1, "beta1": 0.9, "beta2": 0.99} | wrong)


def test_the_clip_is_its_own():
    g = np.array([3.0, -4.0, 1e-45], np.float32)
    for clip in (0.0, 4.0, 5.0):
        assert Rule("sgd", 0.1, clip=clip).clipped(g) is g
    bounded = Rule("sgd", 0.1, clip=0.3).clipped(g)
    assert bounded.tobytes() == clip_inf_norm(g, 0.3).tobytes()
    expected = [f32(float(entry) * f32(0.3 / 4.0)) for entry in g]
    assert bounded.tobytes() == np.array(expected, np.float32).tobytes()
    free, bound = Rule("sgd", 0.1), Rule("sgd", 0.1, clip=0.3)
    w = np.zeros(3, np.float32)
    assert bound.step(w, RuleState(), g)[0].tobytes() == free.step(w, RuleState(), g)[0].tobytes()
