"""Shamir's secret sharing over GF(2⁸), byte by byte: t of n holders know the secret, t − 1 know nothing.

Shamir, "How to share a secret", CACM 22 (1979). Byte b of the secret is the constant term of a polynomial
of degree t − 1, whose other coefficients are uniform (the leading one too: it may be 0); holder x has the
polynomials' values at x = 1 … n. The field is that of AES (FIPS 197, 4.2): polynomials over GF(2) modulo
x⁸ + x⁴ + x³ + x + 1; sums are XOR, products are looked up. t − 1 values and any secret lie on one polynomial
each, so what t − 1 holders see is uniform whatever the secret is.

A share says nothing about whether it is right: with one wrong share another secret comes out. Who needs to
know compares what was reconstructed with something that binds it (a public key, a hash). The look-ups are at
secret places, so their time through the caches is not constant.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError, SecurityError

MOST_HOLDERS = 255
SECRET_BYTES = 32
_CHUNK = 1 << 18  # bytes of products at once: they stay in the nearer caches


def _tables() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8]]:
    """exp (255,) and log (256,) to the generator 3, with log 0 = 0, and all products (256 · 256,)."""
    exp, log = np.empty(255, np.uint8), np.zeros(256, np.int64)
    value = 1
    for i in range(255):
        exp[i], log[value] = value, i
        value ^= (value << 1) ^ (0x11B if value & 0x80 else 0)
    products = exp[(log[:, None] + log) % 255]
    products[0], products[:, 0] = 0, 0
    return exp, log, products.reshape(-1)


_EXP, _LOG, _PRODUCTS = _tables()


def _product(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Products in GF(2⁸), with broadcasting."""
    result: NDArray[np.uint8] = _PRODUCTS.take((a.astype(np.uint16) << 8) | b)
    return result


def share(
    secret: bytes, threshold: int, holders: int, random: Callable[[int], bytes] = os.urandom
) -> NDArray[np.uint8]:
    """Shares (holders, 32) of a 32-byte secret; row i is the one at x = i + 1.

    ConfigError unless 2 ≤ threshold ≤ holders ≤ 255, or for a secret of another length. Cost:
    threshold · holders · 32 products and (threshold − 1) · 32 random bytes.
    """
    secrets = np.frombuffer(secret, np.uint8)[None]
    shares: NDArray[np.uint8] = share_many(secrets, threshold, holders, random)[0]
    return shares


def share_many(
    secrets: NDArray[np.uint8], threshold: int, holders: int, random: Callable[[int], bytes] = os.urandom
) -> NDArray[np.uint8]:
    """Shares (S, holders, 32) of several secrets (S, 32), each with polynomials of its own; see ``share``."""
    if secrets.ndim != 2 or secrets.shape[1] != SECRET_BYTES or secrets.dtype != np.uint8:
        raise ConfigError(f"secrets are rows of {SECRET_BYTES} bytes, not {secrets.dtype} {secrets.shape}")
    if not 2 <= threshold <= holders <= MOST_HOLDERS:
        raise ConfigError(
            f"threshold {threshold} of {holders} holders: 2 ≤ threshold ≤ holders ≤ {MOST_HOLDERS} is needed"
        )
    count = len(secrets)
    drawn = np.frombuffer(random((threshold - 1) * count * SECRET_BYTES), np.uint8)
    coefficients = drawn.reshape(threshold - 1, count, 1, SECRET_BYTES)
    x = np.arange(1, holders + 1, dtype=np.uint8)[:, None]
    shares = np.zeros((count, holders, SECRET_BYTES), np.uint8)
    for coefficient in coefficients:  # Horner's rule, the highest power first
        shares = _product(x, shares ^ coefficient)
    return shares ^ secrets[:, None]


def reconstruct(points: Sequence[int], shares: NDArray[np.uint8]) -> bytes:
    """The secret of t shares (t, 32) at the points x (t,); see ``reconstruct_many``."""
    if not all(0 < x <= MOST_HOLDERS for x in points):
        raise SecurityError(f"shares at the points {list(points)}: holders are 1 to {MOST_HOLDERS}")
    secret: bytes = reconstruct_many(np.array(points, np.uint8)[None], shares[None])[0].tobytes()
    return secret


def reconstruct_many(points: NDArray[np.uint8], shares: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Secrets (S, 32), each from t shares of its own: ``points`` (S, t) uint8, ``shares`` (S, t, 32) uint8.

    The value at 0 of the polynomials of degree t − 1 through the shares (Lagrange): the secret, where all are
    right and t is the threshold or more. SecurityError where a point is 0 or twice in a row, or shapes do not
    fit. Cost: S · t · (t + 32) look-ups; the t² part once where all rows of ``points`` are the same.
    """
    if points.ndim != 2 or points.shape[1] < 1 or shares.shape != (*points.shape, SECRET_BYTES):
        raise SecurityError(f"shares {shares.shape} at points {points.shape} do not fit")
    if points.dtype != np.uint8 or shares.dtype != np.uint8:
        raise SecurityError(f"shares and points are bytes, not {shares.dtype} and {points.dtype}")
    secrets = np.empty((len(points), SECRET_BYTES), np.uint8)
    if len(points) and (points == points[0]).all():
        points = points[:1]
    step = max(1, _CHUNK // (points.shape[1] * max(points.shape[1], SECRET_BYTES)))
    for start in range(0, len(shares), step):
        rows = slice(start, start + step)
        if start == 0 or len(points) > 1:
            weights = _weights(points[rows])[..., None]
        np.bitwise_xor.reduce(_product(weights, shares[rows]), axis=1, out=secrets[rows])
    return secrets


def _weights(points: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lagrange's weights at 0 for points (S, t): Π over m ≠ j of x_m / (x_m − x_j)."""
    ordered = np.sort(points, axis=1)
    if (ordered[:, 0] == 0).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise SecurityError("a secret's shares are at distinct points other than 0")
    logs = _LOG[points]
    # The term m = j is log 0, which the table has as 0.
    below = _LOG.take(points[:, :, None] ^ points[:, None, :]).sum(axis=2)
    weights: NDArray[np.uint8] = _EXP[(logs.sum(axis=1, keepdims=True) - logs - below) % 255]
    return weights
