"""Clipping that is exact, noise with the right law, and an ε that other ways of counting confirm."""

import itertools
import json
import math
import os
import random
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import integrate, optimize, stats

from baffle import privacy
from baffle.errors import ConfigError, MissingExtraError
from baffle.fixedpoint import FixedPoint
from baffle.privacy import (
    Accountant,
    Privacy,
    calibrate,
    clip_rows,
    discrete_gaussian,
    encode_clipped,
    noise_share,
    noise_variance,
)

FALSE_ALARM = 1e-6


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache in memory and on disk; its file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calibrate.cache_clear()
    yield tmp_path / "cache" / "baffle" / "noise.json"
    calibrate.cache_clear()


# Settings


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"unit": "row"}, "unit is 'example' or 'client'"),
        ({"clip": 0.0}, "clip = 0.0"),
        ({"clip": math.nan}, "clip = nan"),
        ({"clip": math.inf}, "clip = inf"),
        ({"noise_multiplier": 0.0}, "noise multiplier 0.0"),
        ({"noise_multiplier": math.nan}, "noise multiplier nan"),
        ({"noise_multiplier": math.inf}, "noise multiplier inf"),
        ({"sampling_rate": 0.0}, "sampling rate 0.0"),
        ({"sampling_rate": 1.01}, "sampling rate 1.01"),
        ({"sampling_rate": math.nan}, "sampling rate nan"),
        ({"unit": "client", "sampling_rate": 0.5}, "knows whom it asks"),
        ({"shares": 0}, "0 shares"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(fields, words):
    with pytest.raises(ConfigError, match=words):
        Privacy(**{"unit": "example", "clip": 1.0, "noise_multiplier": 1.0, **fields})


# Clipping


def exact_square(row):
    return sum(Fraction(value) ** 2 for value in row)


@settings(deadline=None)
@given(
    arrays.arrays(
        np.float64, st.tuples(st.integers(0, 4), st.integers(0, 9)), elements=st.floats(-1e300, 1e300)
    ),
    st.floats(1e-100, 1e100),
)
def test_rows_are_no_longer_than_the_clip(rows, clip):
    clipped = clip_rows(rows, clip)
    assert clipped.shape == rows.shape
    for before, after in zip(rows.tolist(), clipped.tolist(), strict=True):
        length = exact_square(after)
        assert length <= Fraction(clip) ** 2
        if exact_square(before) <= (Fraction(clip) * (1 - Fraction(1, 10**12))) ** 2:
            assert after == before
        else:
            # As long as allowed, and in the old direction: not shortened more than rounding asks for.
            assert length >= (Fraction(clip) * (1 - Fraction(1, 10**12))) ** 2
            old, new = np.array(before), np.array(after)
            np.testing.assert_allclose(
                new / np.abs(new).max(), old / np.abs(old).max(), rtol=1e-12, atol=1e-12
            )


@settings(deadline=None)
@given(
    arrays.arrays(np.float64, st.tuples(st.integers(0, 4), st.integers(1, 9)), elements=st.floats(-100, 100)),
    st.floats(2.0**-6, 50.0),
    st.integers(0, 50),
)
def test_integer_rows_are_no_longer_than_the_clip(rows, clip, fraction_bits):
    fixed = FixedPoint(64, fraction_bits, 50.0)
    codes = encode_clipped(rows, clip, fixed)
    assert codes.dtype == np.int64
    for before, code in zip(clip_rows(rows, clip).tolist(), codes.tolist(), strict=True):
        assert sum(value**2 for value in code) <= (Fraction(clip) * 2**fraction_bits) ** 2
        for value, integer in zip(before, code, strict=True):
            assert integer == math.trunc(Fraction(value) * 2**fraction_bits)


def test_long_rows_at_the_clip_stay_within_it():
    # 500 numbers with the finest grid of 64 bits: rounding to the nearest, or in float64 alone, fails here.
    rows = np.random.default_rng(0).standard_normal((200, 500))
    fixed = FixedPoint(64, 60, 1.0)
    bound = (Fraction(1) * 2**60) ** 2
    assert all(sum(value**2 for value in code) <= bound for code in encode_clipped(rows, 1.0, fixed).tolist())
    naive = np.rint(rows / np.linalg.norm(rows, axis=1, keepdims=True) * 2.0**60).astype(np.int64)
    assert any(sum(value**2 for value in code) > bound for code in naive.tolist())


def test_rounding_to_the_nearest_would_be_more_sensitive():
    # 100 entries of 0.6 steps have norm 6, their roundings norm 10.
    assert not encode_clipped(np.full((1, 100), 0.6), 6.0, FixedPoint(64, 0, 6.0)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_cannot_be_clipped(bad):
    with pytest.raises(ConfigError, match="NaN or an infinity"):
        clip_rows([[1.0, bad]], 1.0)
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        clip_rows([1.0, 2.0, 3.0], 1.0)
    with pytest.raises(ConfigError, match="clip = -1"):
        clip_rows([[1.0]], -1.0)
    with pytest.raises(ConfigError, match=r"clip = 2 exceeds the fixed point's limit 1"):
        encode_clipped([[1.0]], 2.0, FixedPoint(64, 8, 1.0))


# The discrete Gaussian


def pmf(variance, reach):
    """Masses at −reach … reach, and what lies beyond is below 1e-15."""
    k = np.arange(-reach, reach + 1)
    mass = np.exp(-(k**2) / (2 * float(variance)))
    return k, mass / mass.sum()


def chi_square(counts, expected):
    """p-value; cells with an expectation below 10 are put together."""
    small = expected < 10
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    keep = expected > 1e-9
    assert counts[~keep].sum() == 0
    statistic = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    return stats.chi2.sf(statistic, keep.sum() - 1)


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(1, 3), 1, Fraction(22, 7), 10, 100])
def test_small_noise_has_the_exact_law(variance):
    size = 60_000
    draws = Counter(discrete_gaussian(variance, size, random.Random(3).randbytes))
    k, mass = pmf(variance, 12 + math.ceil(9 * math.sqrt(variance)))
    counts = np.array([draws[value] for value in k.tolist()])
    assert counts.sum() == size
    assert chi_square(counts, size * mass) > FALSE_ALARM
    # The test can tell: a rounded continuous Gaussian has 1/12 more variance.
    if variance <= 1:
        sd = math.sqrt(variance)
        rounded = stats.norm.cdf((k + 0.5) / sd) - stats.norm.cdf((k - 0.5) / sd)
        assert chi_square(counts, size * rounded) < FALSE_ALARM


@pytest.mark.parametrize(
    "variance", [2**40, Fraction(3**70, 7), 2**101 + 1, 2**140], ids=lambda v: f"{float(v):.1e}"
)
def test_large_noise_is_gaussian_to_its_lowest_bits(variance):
    size = 20_000
    draws = discrete_gaussian(variance, size, random.Random(5).randbytes)
    scaled = np.array([float(draw / math.isqrt(math.ceil(variance))) for draw in draws])
    assert stats.kstest(scaled, "norm").pvalue > FALSE_ALARM
    assert abs(scaled.mean()) < 5 / math.sqrt(size)
    assert abs((scaled**2).mean() - 1) < 5 * math.sqrt(2 / size)
    assert abs((scaled**4).mean() - 3) < 5 * math.sqrt(96 / size)
    # Far finer than a float64 resolves, every residue is as likely as any other.
    low = np.bincount([draw % 64 for draw in draws], minlength=64)
    assert chi_square(low, np.full(64, size / 64)) > FALSE_ALARM


@given(st.integers(0, 40), st.integers(1, 40), st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=3))
def test_a_uniform_is_compared_exactly(numerator, denominator, drawn):
    """64 bits of the ratio itself, so that they never decide: more are drawn until they do."""
    first = (numerator << 64) // denominator
    words = itertools.chain(drawn, itertools.repeat(0))
    uniform = Fraction(first, 2**64) + sum(
        Fraction(word, 2 ** (128 + 64 * i)) for i, word in enumerate(drawn)
    )
    below = privacy._below_ratio(words.__next__, first, numerator, denominator)
    assert below == (uniform < Fraction(numerator, denominator))


def test_a_tie_of_64_bits_is_decided_by_the_next():
    third = 2**64 // 3
    for second, expected in [(0, False), (2**64 - 1, True)]:
        # U < 1/3, so on to k = 2, where the largest U fails: an even k means no. U ≥ 1/3: k = 1, yes.
        words = iter([third, second, 2**64 - 1])
        assert privacy._bernoulli_exp(words.__next__, 1, 3) is expected
    words = iter([third, third, third, 2**64 - 1])
    assert privacy._bernoulli_exp(words.__next__, 1, 3) is True
    assert list(words) == []


@pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 10**30), (1, 7), (1, 1), (5, 2)])
def test_chances_of_exp(a, b):
    word = privacy._words(random.Random(11).randbytes)
    size = 40_000
    expected = math.exp(-a / b)
    hits = sum(privacy._bernoulli_exp(word, a, b) for _ in range(size))
    assert abs(hits - size * expected) <= 5 * math.sqrt(size * expected * (1 - expected))


def test_variance_must_be_positive():
    with pytest.raises(ConfigError, match="positive"):
        discrete_gaussian(0, 1)


def test_noise_comes_from_the_operating_system(monkeypatch):
    settings = Privacy("example", 1.0, 1.0)
    drawn = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - exactly what must have no influence
        drawn.append(noise_share(settings, FixedPoint(), 8).tolist())
    assert drawn[0] != drawn[1]
    assert discrete_gaussian.__defaults__ == (os.urandom,)
    asked = []
    monkeypatch.setattr(
        discrete_gaussian, "__defaults__", (lambda n: asked.append(n) or random.Random(2).randbytes(n),)
    )
    noise_share(settings, FixedPoint(), 500)
    assert 1 <= len(asked) <= 500  # blocks, not a call a bit


def test_shares_never_hold_less_noise_than_promised():
    for z, clip, shares, bits in [(1.1, 0.3, 7, 32), (0.1, 3.0, 100, 20), (1.0, 1.0, 3, 4)]:
        settings = Privacy("example", clip, z, 0.1, shares)
        total = shares * noise_variance(settings, FixedPoint(64, bits, 1024.0))
        promised = (Fraction(z) * Fraction(clip) * 2**bits) ** 2
        assert promised <= total < promised + shares
    settings = Privacy("client", 2.0, 1.5, shares=4)
    fixed = FixedPoint(64, 20, 64.0)
    noise = sum(noise_share(settings, fixed, 4000) for _ in range(4)) / 2**20
    assert noise.shape == (4000,)
    assert abs(noise.std() - 3.0) < 5 * 3.0 / math.sqrt(2 * 4000)


def test_noise_wraps_into_the_ring():
    settings = Privacy("example", 1.0, 1e4)
    noise = noise_share(settings, FixedPoint(32, 30, 1.0), 2000)
    assert noise.dtype == np.int64
    assert -(2**31) <= noise.min() < -(2**30)
    assert 2**30 < noise.max() < 2**31


# What the grid costs


def eta(variance):
    return 2 * sum(math.exp(-2 * math.pi**2 * variance * n**2) for n in range(1, 9))


@pytest.mark.parametrize(("share", "shares"), [(0.6, 2), (0.6, 5), (1.0, 3), (0.45, 2)])
def test_a_sum_of_shares_is_near_a_discrete_gaussian(share, shares):
    """Step 3 of the proof, where its bound is large enough to see; ``share``: s²."""
    _, one = pmf(share, 60)
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    k = np.arange(len(total)) - len(total) // 2
    seen = total > 1e-9
    density = np.exp(-(k[seen] ** 2) / (2 * share * shares)) / math.sqrt(2 * math.pi * share * shares)
    ratio = np.abs(np.log(total[seen] / density)).max()
    bound = (2 * shares - 1) * -math.log1p(-eta(share / 2))
    assert ratio <= bound
    assert ratio > bound / 100


@pytest.mark.parametrize("rounding", [0.25, 0.5])
def test_rounding_at_random_makes_a_discrete_gaussian(rounding):
    """Step 4 of the proof: ∫ φ_a(y) φ_τ²(k − y)/Σ_j φ_τ²(j − y) dy, by the trapezoidal rule."""
    a = 3.0
    y = np.linspace(-25, 25, 200_001)
    density = np.exp(-(y**2) / (2 * a)) / math.sqrt(2 * math.pi * a)
    j = np.arange(-32, 33)
    weight = sum(np.exp(-((i - y) ** 2) / (2 * rounding)) for i in j)
    total = a + rounding
    for k in range(6):
        mass = (density * np.exp(-((k - y) ** 2) / (2 * rounding)) / weight).sum() * (y[1] - y[0])
        expected = math.exp(-(k**2) / (2 * total)) / math.sqrt(2 * math.pi * total)
        assert abs(math.log(mass / expected)) <= -math.log1p(-eta(rounding))


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_the_discrete_mechanism_is_as_private_as_counted(rate):
    """Its hockey-stick divergence, summed over the integers, at the coarsest grid that is taken."""
    settings = Privacy("example", 1.0, 0.8, rate, shares=3)
    fixed = FixedPoint(64, 8, 2.0)
    delta = 1e-5
    epsilon = Accountant(settings, fixed, values=1).epsilon(1, delta)
    _, one = pmf(noise_variance(settings, fixed), 1500)
    without = np.convolve(np.convolve(one, one), one)
    step = 256
    without = np.pad(without, step)
    present = (1 - rate) * without + rate * np.roll(without, step)
    added = np.maximum(present - math.exp(epsilon) * without, 0).sum()
    removed = np.maximum(without - math.exp(epsilon) * present, 0).sum()
    assert max(added, removed) <= delta
    assert max(added, removed) > 0.99 * delta


def test_a_grid_that_is_too_coarse_is_refused():
    settings = Privacy("example", 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"noise of 128 steps of 2\^-7, in 1 shares, is too coarse"):
        Accountant(settings, FixedPoint(64, 7, 2.0))
    fine = Accountant(settings, FixedPoint(64, 8, 2.0))
    assert (1 - 1e-4) < fine.noise_multiplier < 1
    assert fine.noise_multiplier**2 == pytest.approx(1 - 5 * 2.0**-16, rel=1e-12)
    # 256 steps in 7300 shares: each has a variance below 10.
    with pytest.raises(ConfigError, match="7300 shares, is too coarse"):
        Accountant(Privacy("example", 1.0, 1.0, shares=7300), FixedPoint(64, 8, 2.0))
    assert privacy._grid_cost(shares=1000, values=10**6, rounds=10**6) < 1e-20
    assert privacy._grid_cost(1, 1, 1) >= 2 * -math.log1p(-eta(5.0)) > 0


# ε


def test_the_anchor():
    """q = 0.01, T = 1000, δ = 1e-5, z = 1: ε ≈ 1.83."""
    epsilon = Accountant(Privacy("example", 0.3, 1.0, 0.01)).epsilon(1000, 1e-5)
    assert epsilon == pytest.approx(1.8282, abs=5e-4)
    shared = Privacy("example", 0.3, 1.0, 0.01, shares=80)
    on_grid = Accountant(shared, FixedPoint(64, 24, 64.0), values=500)
    assert epsilon * (1 - 1e-9) <= on_grid.epsilon(1000, 1e-5) <= epsilon * (1 + 1e-4)


def gaussian_delta(epsilon, z):
    """Theorem 8 of Balle and Wang 2018, with μ = 1/z."""
    tail = stats.norm.sf(z * epsilon + 0.5 / z)
    return stats.norm.sf(z * epsilon - 0.5 / z) - math.exp(epsilon) * tail


@pytest.mark.parametrize(
    ("z", "rounds", "delta"), [(1.0, 1, 1e-5), (10.0, 100, 1e-6), (30.0, 1000, 1e-5), (2.0, 5, 1e-3)]
)
def test_without_sampling_it_is_the_analytic_gaussian(z, rounds, delta):
    found = Accountant(Privacy("client", 1.0, z)).epsilon(rounds, delta)
    exact = optimize.brentq(lambda e: gaussian_delta(e, z / math.sqrt(rounds)) - delta, 0, 200)
    assert exact * (1 - 1e-9) <= found <= exact * 1.001


@pytest.mark.parametrize(("rate", "z"), [(0.01, 1.0), (0.2, 0.7), (0.001, 0.5)])
def test_one_round_by_quadrature(rate, z):
    def excess(epsilon):
        def added(x):
            none, shifted = stats.norm.pdf(x, 0, z), stats.norm.pdf(x, 1, z)
            return max((1 - rate) * none + rate * shifted - math.exp(epsilon) * none, 0)

        edge = 0.5 + z**2 * math.log((math.expm1(epsilon) + rate) / rate)
        return integrate.quad(added, edge, edge + 12 * z, limit=200)[0] - 1e-5

    found = Accountant(Privacy("example", 1.0, z, rate)).epsilon(1, 1e-5)
    assert found == pytest.approx(optimize.brentq(excess, 1e-9, 30), rel=1e-3)


@pytest.mark.parametrize(("rate", "z", "rounds"), [(0.01, 1.0, 1000), (0.1, 2.0, 300), (0.5, 5.0, 100)])
def test_renyi_accounting_bounds_it(rate, z, rounds):
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z))
    renyi = accountant.compose(event, rounds).get_epsilon(1e-5)
    found = Accountant(Privacy("example", 1.0, z, rate)).epsilon(rounds, 1e-5)
    assert 0.8 * renyi < found < renyi


def test_epsilon_grows_with_rounds_and_shrinks_with_noise():
    some = [
        Accountant(Privacy("example", 1.0, 1.0, 0.02)).epsilon(rounds, 1e-5) for rounds in (0, 1, 2, 50, 200)
    ]
    assert some[0] == 0
    assert some == sorted(some)
    noisier = [
        Accountant(Privacy("example", 1.0, z, 0.02)).epsilon(50, 1e-5) for z in (0.005, 0.5, 1.0, 2.0, 1e5)
    ]
    assert noisier == sorted(noisier, reverse=True)
    assert noisier[0] == math.inf
    assert Accountant(Privacy("client", 1.0, 0.01)).epsilon(10**6, 1e-5) == math.inf


def test_rounds_and_deltas_that_cannot_be():
    accountant = Accountant(Privacy("example", 1.0, 1.0))
    with pytest.raises(ConfigError, match="-1 rounds"):
        accountant.epsilon(-1, 1e-5)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="delta = "):
            accountant.epsilon(1, delta)
    with pytest.raises(ConfigError, match="0 values"):
        Accountant(Privacy("example", 1.0, 1.0), values=0)
    with pytest.raises(ConfigError, match="more than is accounted for"):
        Accountant(Privacy("example", 1.0, 1.0), FixedPoint(), 2**50).epsilon(2**60, 1e-5)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    settings = Privacy("example", 1.0, 1.0)
    noise_share(settings, FixedPoint(), 3)
    for call in (lambda: Accountant(settings), lambda: calibrate(1.0, 1e-5, 10)):
        with pytest.raises(MissingExtraError, match=r"pip install 'baffle-fl\[privacy\]'"):
            call()


def test_what_is_not_covered_is_said():
    sentences = privacy.not_covered()
    assert all(sentence.endswith(".") for sentence in sentences)
    text = " ".join(sentences).lower()
    for word in (
        "logged losses",
        "accuracy",
        "search for settings",
        "k,",
        "which clients answered",
        "numbers of samples",
    ):
        assert word in text


# Calibration


@pytest.mark.parametrize(
    ("target", "rounds", "rate"), [(1.8282, 1000, 0.01), (8.0, 100, 0.1), (1.0, 50, 1.0)]
)
def test_calibrated_noise_just_meets_the_target(target, rounds, rate):
    z = calibrate(target, 1e-5, rounds, rate)
    assert Accountant(Privacy("example", 1.0, z, rate)).epsilon(rounds, 1e-5) <= target
    assert Accountant(Privacy("example", 1.0, z / 1.003, rate)).epsilon(rounds, 1e-5) > target
    if target == 1.8282:  # the anchor, backwards
        assert z == pytest.approx(1.0, rel=2e-3)
    # Also on the coarsest grid that is taken.
    coarse = Accountant(Privacy("example", 160 / z, z, rate), FixedPoint(64, 0, 1000.0))
    assert coarse.noise_multiplier < z * (1 - 9e-5)
    assert coarse.epsilon(rounds, 1e-5) <= target


def test_calibration_leaves_room_for_the_grid_and_little_more(monkeypatch):
    monkeypatch.setattr(privacy, "_epsilon", lambda rate, z, rounds, delta: 3 / z**2)
    for target in np.geomspace(0.01, 100, 60).tolist():
        z = calibrate(target, 1e-5, 10)
        assert 3 / (z * (1 - 1e-4)) ** 2 <= target < 3 / (z / 1.0013) ** 2


@pytest.fixture
def evaluations(monkeypatch):
    """Counts the evaluations of ε."""
    count = []
    actual = privacy._epsilon
    monkeypatch.setattr(privacy, "_epsilon", lambda *args: count.append(args) or actual(*args))
    return count


def test_calibration_is_kept(cache, evaluations):
    z = calibrate(3.0, 1e-5, 20, 1.0)
    cold = len(evaluations)
    assert 10 < cold < 25
    assert calibrate(3.0, 1e-5, 20, 1.0) == z
    assert len(evaluations) == cold
    calibrate.cache_clear()  # as in another process
    assert calibrate(3.0, 1e-5, 20, 1.0) == z
    assert len(evaluations) == cold + 2
    other = calibrate(3.0, 1e-5, 21, 1.0)
    assert sorted(json.loads(cache.read_text()).values()) == [z, other]
    assert [file.name for file in cache.parent.iterdir()] == ["noise.json"]


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1, 2]", b"{", b'{"a": 1}', b"null"], ids=str)
def test_a_damaged_cache_is_ignored(cache, content):
    z = calibrate(3.0, 1e-5, 20, 1.0)
    cache.write_bytes(content)
    calibrate.cache_clear()
    assert calibrate(3.0, 1e-5, 20, 1.0) == z
    assert z in json.loads(cache.read_text()).values()


@pytest.mark.parametrize(
    "wrong", [0.3, 1000.0, -1.0, 0.0, math.nan, math.inf, "2.0", None, True, [1.0]], ids=str
)
def test_a_wrong_entry_is_not_believed(cache, wrong):
    z = calibrate(3.0, 1e-5, 20, 1.0)
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: wrong}))
    calibrate.cache_clear()
    assert calibrate(3.0, 1e-5, 20, 1.0) == z


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert calibrate(3.0, 1e-5, 20, 1.0) > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.0, 1e-5, 10), "target epsilon 0.0"),
        ((math.nan, 1e-5, 10), "target epsilon nan"),
        ((math.inf, 1e-5, 10), "target epsilon inf"),
        ((1.0, 0.0, 10), "delta = 0.0"),
        ((1.0, 1e-5, 0), "0 rounds"),
        ((1.0, 1e-5, 10, 0.0), "sampling rate 0.0"),
        ((1e-12, 1e-12, 1), "no noise is enough"),
        ((1e6, 1e-5, 1), "asks for no noise"),
    ],
    ids=str,
)
def test_targets_that_cannot_be(arguments, words):
    with pytest.raises(ConfigError, match=words):
        calibrate(*arguments)
