"""Shamir's sharing: the field of AES, a naive twin, published shares, t shares tell all and t − 1 nothing."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from baffle.errors import ConfigError, SecurityError
from baffle.secagg.sharing import (
    MOST_HOLDERS,
    SECRET_BYTES,
    _product,
    reconstruct,
    reconstruct_many,
    share,
    share_many,
)

secrets = st.binary(min_size=32, max_size=32)


def source(label):
    """A random source that gives the same bytes in every run, and others with every call."""
    calls = iter(range(1 << 30))
    return lambda n: hashlib.shake_256(b"%s %d" % (label.encode(), next(calls))).digest(n)


# The field, on Python integers: carry-less products, reduced bit by bit; inverses by a^254


def times(a, b):
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11B << bit - 8
    return product


def inverse(a):
    power = 1
    for _ in range(254):
        power = times(power, a)
    return power


INVERSES = [inverse(a) for a in range(256)]


def lagrange(points, values, at):
    """The value at ``at`` of the polynomial of least degree through the points, on integers."""
    result = 0
    for j, (x, y) in enumerate(zip(points, values, strict=True)):
        term = y
        for m, other in enumerate(points):
            if m != j:
                term = times(term, times(at ^ other, INVERSES[x ^ other]))
        result ^= term
    return result


# FIPS 197, 4.2 and 4.2.1; its inverse of {53} is {ca}.
@pytest.mark.parametrize(
    ("a", "b", "product"),
    [
        (0x57, 0x83, 0xC1),
        (0x57, 0x02, 0xAE),
        (0x57, 0x04, 0x47),
        (0x57, 0x08, 0x8E),
        (0x57, 0x10, 0x07),
        (0x57, 0x13, 0xFE),
        (0x53, 0xCA, 0x01),
    ],
)
def test_products_of_FIPS_197(a, b, product):
    assert times(a, b) == product
    assert _product(np.array([a], np.uint8), np.array([b], np.uint8)) == [product]


def test_every_product_of_the_field():
    every = np.arange(256, dtype=np.uint8)
    expected = np.array([[times(a, b) for b in range(256)] for a in range(256)])
    np.testing.assert_array_equal(_product(every[:, None], every), expected)


# Sharing


def naive_shares(secret, threshold, holders, random):
    """The docstring of the module, a byte and a power at a time; the highest coefficient is drawn first."""
    drawn = random((threshold - 1) * SECRET_BYTES)
    rows = []
    for x in range(1, holders + 1):
        row = []
        for byte in range(SECRET_BYTES):
            value, power = secret[byte], 1
            for j in range(1, threshold):
                power = times(power, x)
                value ^= times(power, drawn[(threshold - 1 - j) * SECRET_BYTES + byte])
            row.append(value)
        rows.append(row)
    return rows


@settings(max_examples=25, deadline=None)
@given(secrets, st.integers(2, 6), st.integers(0, 6))
def test_shares_are_those_of_the_naive_twin(secret, threshold, more):
    holders = threshold + more
    shares = share(secret, threshold, holders, source("twin"))
    assert shares.dtype == np.uint8
    assert shares.tolist() == naive_shares(secret, threshold, holders, source("twin"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_t_shares_give_the_secret(data):
    secret = data.draw(secrets)
    holders = data.draw(st.integers(2, MOST_HOLDERS))
    threshold = data.draw(st.integers(2, min(holders, 40)))
    shares = share(secret, threshold, holders)
    chosen = data.draw(st.permutations(range(1, holders + 1)))[:threshold]
    assert reconstruct(chosen, shares[[x - 1 for x in chosen]]) == secret


def test_the_largest_sharing():
    secret = bytes(range(32))
    shares = share(secret, 255, 255)
    assert reconstruct(range(1, 256), shares) == secret
    assert reconstruct(range(255, 0, -1), shares[::-1]) == secret
    assert reconstruct(range(1, 255), shares[:254]) != secret


def test_more_than_t_shares_give_the_secret_too():
    shares = share(bytes(range(32)), 3, 9)
    for count in range(3, 10):
        assert reconstruct(range(1, count + 1), shares[:count]) == bytes(range(32))


def test_one_wrong_share_gives_another_secret():
    secret = bytes(range(32))
    shares = share(secret, 4, 7)
    for row in range(4):
        wrong = shares[:4].copy()
        wrong[row, 5] ^= 1
        opened = reconstruct([1, 2, 3, 4], wrong)
        assert opened[5] != secret[5]
        assert opened[:5] + opened[6:] == secret[:5] + secret[6:]


def test_published_shares_open():
    """The test case of draft-mcgrew-tss-03, section 9: two of two, over the same field."""
    shares = np.zeros((2, SECRET_BYTES), np.uint8)
    for row, text in enumerate(("B9FA07E185", "F5409B4511")):
        shares[row, :5] = list(bytes.fromhex(text))
    assert reconstruct([1, 2], shares) == b"test\0" + bytes(27)


def test_shares_are_frozen():
    shares = share(bytes(range(32)), 3, 5, source("frozen"))
    digest = hashlib.sha256(shares.tobytes()).hexdigest()
    assert shares[0].tobytes().hex() == "cef7bbeee10054ec5248e451f5406511011188380bafc3c992474c97943d369d"
    assert digest == "11c62a7f2546b5ef3512cf46014668397a7b34073790892dd27905dbb4e6696e"


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 9))
def test_many_secrets_are_shared_each_alone(count, threshold, more):
    rows = np.frombuffer(source("many")(count * 32), np.uint8).reshape(count, 32)
    shares = share_many(rows, threshold, threshold + more)
    assert shares.shape == (count, threshold + more, 32)
    points = np.array(
        [np.random.Generator(np.random.PCG64(i)).permutation(threshold + more) + 1 for i in range(count)]
    )
    points = points[:, :threshold].astype(np.uint8)
    chosen = np.take_along_axis(shares, points[..., None].astype(int) - 1, axis=1)
    np.testing.assert_array_equal(reconstruct_many(points, chosen), rows)


def test_no_two_secrets_share_a_polynomial():
    same = np.zeros((2, 32), np.uint8)
    shares = share_many(same, 2, 3)
    assert not np.array_equal(shares[0], shares[1])
    assert not np.array_equal(share(bytes(32), 2, 3), share(bytes(32), 2, 3))


# t − 1 shares


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_t_less_1_shares_fit_every_secret(data):
    """Whatever t − 1 holders hold and whatever secret one guesses, one polynomial has it all.

    With the guess as the value at 0 there are t points, and a polynomial of degree t − 1 passes through
    them: other holders' shares complete it, and the whole sharing opens to the guess.
    """
    secret, guess = data.draw(secrets), data.draw(secrets)
    threshold = data.draw(st.integers(2, 6))
    held = data.draw(st.permutations(range(1, 12)))[: threshold - 1]
    shares = share(secret, threshold, 11)
    points = [0, *held]
    known = [guess, *(shares[x - 1].tobytes() for x in held)]
    completed = np.array(
        [
            [lagrange(points, [row[byte] for row in known], x) for byte in range(SECRET_BYTES)]
            for x in range(1, 12)
        ],
        np.uint8,
    )
    np.testing.assert_array_equal(completed[[x - 1 for x in held]], shares[[x - 1 for x in held]])
    last = data.draw(st.permutations(range(1, 12)))[:threshold]
    assert reconstruct(last, completed[[x - 1 for x in last]]) == guess


def test_t_less_1_shares_are_uniform_exactly():
    """Over all coefficients, two of three holders see each pair of bytes as often, whatever the secret is."""
    for secret in (0x00, 0x2A):
        coefficients = np.arange(1 << 16)
        high, low = (coefficients >> 8).astype(np.uint8), (coefficients & 255).astype(np.uint8)

        def value(x, high=high, low=low, secret=secret):
            at = np.full(1, x, np.uint8)
            return _product(at, _product(at, high) ^ low) ^ np.uint8(secret)

        pairs = value(3).astype(int) << 8 | value(200)
        assert len(np.unique(pairs)) == 1 << 16


def test_a_share_looks_uniform():
    """Shares of one and the same secret: χ² over byte values, 255 degrees of freedom, at 1e-6 both ways."""
    shares = share_many(np.full((2000, 32), 7, np.uint8), 3, 4, source("uniform"))
    for holder in range(4):
        counts = np.bincount(shares[:, holder].ravel(), minlength=256)
        statistic = ((counts - 250) ** 2 / 250).sum()
        assert stats.chi2(255).ppf(1e-6) < statistic < stats.chi2(255).isf(1e-6)


# Many at once


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**32), st.booleans())
def test_many_are_opened_each_by_its_own_points(count, t, seed, same):
    """Any bytes at any points: the value at 0 that Lagrange has on integers."""
    rng = np.random.Generator(np.random.PCG64(seed))
    points = np.array([rng.permutation(255)[:t] + 1 for _ in range(count)], np.uint8)
    if same:
        points[:] = points[0]
    shares = rng.integers(0, 256, (count, t, 32), np.uint8)
    expected = [
        [lagrange(points[s].tolist(), shares[s, :, byte].tolist(), 0) for byte in range(32)]
        for s in range(count)
    ]
    assert reconstruct_many(points, shares).tolist() == expected


@pytest.mark.parametrize(("count", "t"), [(700, 32), (300, 67), (3, 255), (0, 5)])
def test_chunks_do_not_show(count, t):
    rng = np.random.Generator(np.random.PCG64(1))
    points = np.array([rng.permutation(255)[:t] + 1 for _ in range(count)], np.uint8).reshape(count, t)
    shares = rng.integers(0, 256, (count, t, 32), np.uint8)
    opened = reconstruct_many(points, shares)
    assert [row.tobytes() for row in opened] == [
        reconstruct(p.tolist(), s) for p, s in zip(points, shares, strict=True)
    ]
    fixed = np.repeat(points[:1], count, axis=0)
    assert [row.tobytes() for row in reconstruct_many(fixed, shares)] == [
        reconstruct(p.tolist(), s) for p, s in zip(fixed, shares, strict=True)
    ]


# What is refused


@pytest.mark.parametrize(("threshold", "holders"), [(1, 5), (0, 5), (6, 5), (2, 256), (-1, 3), (2, 1)])
def test_thresholds_that_cannot_be(threshold, holders):
    with pytest.raises(ConfigError, match="2 ≤ threshold ≤ holders ≤ 255"):
        share(bytes(32), threshold, holders)


def test_secrets_of_another_length_are_refused():
    for length in (0, 16, 31, 33):
        with pytest.raises(ConfigError, match="rows of 32 bytes"):
            share(bytes(length), 2, 3)
    with pytest.raises(ConfigError, match="rows of 32 bytes"):
        share_many(np.zeros((2, 32), np.int64), 2, 3)


@pytest.mark.parametrize("points", [[0, 1], [1, 0], [4, 4], [256, 1], [-1, 1]], ids=str)
def test_points_that_cannot_be(points):
    with pytest.raises(SecurityError, match=r"distinct points other than 0|holders are 1 to 255"):
        reconstruct(points, np.zeros((2, 32), np.uint8))


def test_one_bad_row_among_many_is_seen():
    points = np.tile(np.arange(1, 34, dtype=np.uint8), (900, 1))
    shares = np.zeros((900, 33, 32), np.uint8)
    for row, column, value in ((0, 5, 1), (899, 32, 7), (450, 0, 0)):
        bad = points.copy()
        bad[row, column] = value
        with pytest.raises(SecurityError, match="distinct points other than 0"):
            reconstruct_many(bad, shares)
    bad = points.copy()
    bad[:, 3] = 9  # in all rows: the weights are made once
    with pytest.raises(SecurityError, match="distinct points other than 0"):
        reconstruct_many(bad, shares)


@pytest.mark.parametrize(
    ("points", "shape"),
    [([1, 2], (3, 32)), ([1, 2], (2, 31)), ([1, 2], (2, 33)), ([], (0, 32)), ([1, 2], (2,))],
)
def test_shares_of_other_shapes_are_refused(points, shape):
    with pytest.raises(SecurityError, match="do not fit"):
        reconstruct(points, np.zeros(shape, np.uint8))


def test_shares_are_bytes():
    with pytest.raises(SecurityError, match="bytes, not int64"):
        reconstruct([1, 2], np.zeros((2, 32), np.int64))
