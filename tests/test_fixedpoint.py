"""Reals in a ring: the rounding is bounded, the budget is exact, and no sum within it wraps."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.errors import ConfigError
from baffle.fixedpoint import FixedPoint

RINGS = (FixedPoint(), FixedPoint(32, 12, 16.0), FixedPoint(64, 0, 3.5), FixedPoint(32, 31, 0.75))


# One value


@pytest.mark.parametrize("fixed", RINGS, ids=str)
@given(data=st.data())
def test_a_value_is_off_by_half_a_step(fixed, data):
    value = data.draw(st.floats(-fixed.limit, fixed.limit))
    (code,) = fixed.encode([value]).tolist()
    assert abs(Fraction(value) - Fraction(code, 2**fixed.fraction_bits)) <= Fraction(
        1, 2 ** (fixed.fraction_bits + 1)
    )
    assert abs(code) <= fixed.largest


def test_encoding_by_hand():
    fixed = FixedPoint(64, 2, 10.0)
    # Steps of 1/4; ties (1/8, 3/8) go to the even multiple.
    codes = fixed.encode([[0.0, -0.0, 0.25, 1.1], [0.125, 0.375, -0.375, 10.0]])
    assert codes.dtype == np.int64
    assert codes.tolist() == [[0, 0, 1, 4], [0, 2, -2, 40]]
    assert fixed.decode(codes).tolist() == [[0, 0, 0.25, 1.0], [0, 0.5, -0.5, 10.0]]
    assert fixed.encode(np.float32(0.75)).tolist() == 3
    assert fixed.encode([]).shape == (0,)


@pytest.mark.parametrize("fixed", RINGS, ids=str)
def test_what_is_too_large_saturates(fixed):
    beyond = [fixed.limit, np.nextafter(fixed.limit, np.inf), 1e300, np.finfo(np.float64).max]
    assert fixed.encode(beyond).tolist() == [fixed.largest] * 4
    assert fixed.encode(np.negative(beyond)).tolist() == [-fixed.largest] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(bad):
    with pytest.raises(ConfigError, match="NaN or an infinity"):
        FixedPoint().encode([1.0, bad])


# Residues


@pytest.mark.parametrize("bits", [32, 64])
def test_residues_by_hand(bits):
    fixed = FixedPoint(bits, 0, 100.0)
    residues = fixed.residues([0, 1, -1, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1])
    assert residues.dtype == fixed.dtype == np.dtype(f"uint{bits}")
    assert residues.tolist() == [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1]
    assert fixed.integers(residues).tolist() == [0, 1, -1, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1]
    assert fixed.integers(residues).dtype == np.int64


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.sampled_from([32, 64]))
def test_residues_are_the_integers_modulo_the_ring(integers, bits):
    residues = FixedPoint(bits, 0, 1.0).residues(np.array(integers, dtype=np.int64))
    assert residues.tolist() == [value % 2**bits for value in integers]


def test_other_types_are_refused():
    with pytest.raises(ConfigError, match="float64 are no integers"):
        FixedPoint().residues([1.5])
    with pytest.raises(ConfigError, match="object are no integers"):
        FixedPoint().residues([2**70])
    with pytest.raises(ConfigError, match="type uint64: this ring's are uint32"):
        FixedPoint(32, 8, 1.0).integers(np.zeros(3, np.uint64))


# Sums


@st.composite
def rounds(draw):
    """A fixed point, weights and values (clients × numbers) that `check` passes, often just."""
    clients = draw(st.integers(1, 12))
    largest_weight = draw(st.integers(1, 5000))
    limit = draw(st.floats(0.01, 50.0))
    fixed = FixedPoint.fitting(clients, largest_weight, limit, draw(st.sampled_from([32, 64])))
    if fixed.ring_bits == 64:
        # Towards the boundary: as large a limit as passes.
        limit *= (2**63 - 1) // (clients * largest_weight * fixed.largest + clients * largest_weight)
        fixed = FixedPoint(64, fixed.fraction_bits, limit)
    fixed.check(clients, largest_weight)
    weights = draw(st.lists(st.integers(1, largest_weight), min_size=clients, max_size=clients))
    row = st.lists(st.floats(-limit, limit) | st.sampled_from([-limit, limit]), min_size=3, max_size=3)
    values = draw(st.lists(row, min_size=clients, max_size=clients))
    return fixed, weights, values


@settings(deadline=None)
@given(rounds())
def test_a_sum_in_the_ring_is_the_sum_of_the_integers(case):
    fixed, weights, values = case
    codes = fixed.encode(values)
    products = np.array(weights, np.int64)[:, None] * codes  # int64, as a client computes them
    vectors = fixed.residues(products)
    total = np.zeros(3, fixed.dtype)
    for vector in vectors:
        total += vector
    exact = [
        sum(weight * code for weight, code in zip(weights, column, strict=True))
        for column in codes.T.tolist()
    ]
    assert fixed.integers(total).tolist() == exact
    for column, found in zip(np.transpose(values).tolist(), exact, strict=True):
        mean = sum(w * Fraction(v) for w, v in zip(weights, column, strict=True)) / sum(weights)
        error = abs(mean - Fraction(found, 2**fixed.fraction_bits) / sum(weights))
        assert error <= Fraction(1, 2 ** (fixed.fraction_bits + 1))


@pytest.mark.parametrize(
    ("fixed", "addends", "weight"),
    [
        # 2^63 − 1 = 7²·73·127·337·92737·649657 and 2^31 − 1 is prime: both are met exactly.
        (FixedPoint(64, 0, 649657.0), 7 * 7 * 73 * 127, 337 * 92737),
        (FixedPoint(32, 0, 1.0), 1, 2**31 - 1),
        (FixedPoint(32, 0, 1.0), 2**31 - 1, 1),
    ],
    ids=["64", "32", "32, addends"],
)
def test_the_budget_ends_where_the_ring_does(fixed, addends, weight):
    assert addends * weight * fixed.largest == 2 ** (fixed.ring_bits - 1) - 1
    fixed.check(addends, weight)
    for more in ((addends + 1, weight), (addends, weight + 1)):
        with pytest.raises(ConfigError, match=r"overflow a ring of .* by 1 bit: take fewer fraction bits"):
            fixed.check(*more)
    # At the boundary the largest possible sum still reads right; one more would turn negative.
    most = weight * fixed.largest
    assert most <= 2**63 - 1
    total = np.array([most * addends % 2**fixed.ring_bits], fixed.dtype)
    assert fixed.integers(total).tolist() == [2 ** (fixed.ring_bits - 1) - 1]
    assert fixed.integers(total + fixed.dtype.type(1)).tolist() == [-(2 ** (fixed.ring_bits - 1))]


def test_the_budget_in_bits():
    # 1000 clients of 60,000 samples, slopes up to 1024: 10 + 16 + 10 + f + 1 < 64, to the last unit.
    FixedPoint(64, 27, 1024.0).check(1024, 65535)
    with pytest.raises(ConfigError, match=r"by 1 bit: take fewer"):
        FixedPoint(64, 27, 1024.0).check(1024, 65536)
    with pytest.raises(ConfigError, match=r"by 6 bits: .* or a ring of 64 bits"):
        FixedPoint(32, 16, 1024.0).check(64, 16)


@given(st.integers(1, 10**4), st.integers(1, 10**6), st.floats(0.01, 1e4), st.sampled_from([32, 64]))
def test_fitting_takes_the_most_bits(addends, weight, limit, bits):
    def passes(fraction_bits):
        return addends * weight * round(Fraction(limit) * 2**fraction_bits) < 2 ** (bits - 1)

    expected = max((f for f in range(min(32, bits - 1) + 1) if passes(f)), default=-1)
    if expected < 8:
        with pytest.raises(ConfigError):
            FixedPoint.fitting(addends, weight, limit, bits)
    else:
        assert FixedPoint.fitting(addends, weight, limit, bits) == FixedPoint(bits, expected, limit)


def test_fitting_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"leave 1 fraction bits in a ring of 32 bits, and 8 are needed"):
        FixedPoint.fitting(100, 600, 10000.0, 32)
    with pytest.raises(ConfigError, match="overflow a ring of 32 bits"):
        FixedPoint.fitting(10**6, 10**6, 10.0, 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((16, 8, 1.0), "16 bits"),
        ((64, -1, 1.0), "-1 fraction bits"),
        ((32, 32, 1e-9), "32 fraction bits"),
        ((64, 8, 0.0), "positive and finite"),
        ((64, 8, np.nan), "positive and finite"),
        ((64, 8, np.inf), "positive and finite"),
        ((64, 8, 2.0**-9), "rounds to 0"),
        ((64, 62, 2.0), "does not fit 64 bits"),
        ((32, 24, 128.0), "does not fit 32 bits"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        FixedPoint(*settings)
    assert FixedPoint(32, 24, 127.999).largest < 2**31


@pytest.mark.parametrize("counts", [(0, 1), (1, 0), (-1, 5)])
def test_counts_that_cannot_be(counts):
    with pytest.raises(ConfigError, match="at least 1 of each"):
        FixedPoint().check(*counts)


def test_a_step_is_far_below_what_float32_does_to_a_slope():
    """The job of the paper, ten clients with 6,000 samples: the noise of float32 losses beside a step."""
    import torch

    from baffle import data, models
    from baffle.estimator import SteinEstimator
    from baffle.runtimes.torch import TorchRuntime
    from baffle.stream import Stream, seed_from

    point = FixedPoint.fitting(10, 6000, 1024.0)
    batch = data.digits()[0].batch(slice(0, 32))
    estimator, stream = SteinEstimator(40), Stream(seed_from(0), 0)
    single, double = (
        TorchRuntime(models.build("lenet", 1, 10, 0).to(kind)) for kind in (torch.float32, torch.float64)
    )
    weights = single.weights()
    rounded, exact = (estimator.slopes(one, weights, batch, stream).slopes for one in (single, double))
    noise = float(np.sqrt(np.mean((rounded - exact) ** 2)))
    assert noise < 0.1 * np.abs(exact).mean()  # it is noise on a slope that is there
    assert np.abs(point.decode(point.encode(rounded)) - rounded).max() <= 2.0 ** -(point.fraction_bits + 1)
    assert 2.0**-point.fraction_bits < 1e-4 * noise
