"""Convolutions with few multiplications: Winograd's minimal filtering, float32, NHWC, one thread a call.

An r×r convolution of stride 1 is made m×m outputs at a time (m = 4) from a tile of a×a inputs,
a = m + r − 1:  Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A  (Lavin & Gray, arXiv:1509.09308). Over all channels the ⊙ is
a² matrix products, with 4 times fewer multiplications than the plain sum for r = 3, 6.25 times for r = 5.
A 3×3 convolution of stride 2 is a sum of four of stride 1, with 2×2, 2×1, 1×2 and 1×1 of its taps, each on
its phase of the input: 16/9 times fewer.

Rounding: the result differs from a plain float32 convolution by a few 10⁻⁶ of its largest value. Slopes at
σ = 1e-4 follow the exact derivative as those of the plain convolution do (tests/test_program.py).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.kernels import compiled
from baffle.kernels.simd import (
    LANES,
    MATRICES,
    add,
    largest,
    least,
    load,
    mul,
    multiply_block,
    splat,
    store,
    transform_tile,
)

Floats = NDArray[np.float32]
NONE, RELU, HARDSWISH = 0, 1, 2
_M = 4  # outputs of a tile in one dimension
_BLOCK, _STRIDED_BLOCK = 32, 8  # tiles at a time: their V, U and M share a core's cache
_POINTS = [Fraction(p) for p in (0, 1, -1, 2, -2)] + [Fraction(1, 2), Fraction(-1, 2)]


def minimal_filter(m: int, r: int) -> tuple[list[list[Fraction]], ...]:
    """Aᵀ (m, a), G (a, r) and Bᵀ (a, a) of F(m, r), exactly, for the points 0, ±1, ±2, ±½ and ∞."""
    a = m + r - 1
    points = _POINTS[: a - 1]

    def product(roots: list[Fraction]) -> list[Fraction]:
        """Coefficients of Π (x − root), constant first."""
        out = [Fraction(1)]
        for root in roots:
            out = [x - root * y for x, y in zip([Fraction(0), *out], [*out, Fraction(0)], strict=True)]
        return out

    output = [[p**i for p in points] + [Fraction(int(i == m - 1))] for i in range(m)]
    kernel, data = [], []
    for j, p in enumerate(points):
        others = points[:j] + points[j + 1 :]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        kernel.append([p**i / scale for i in range(r)])
        data.append([*product(others), Fraction(0)])
    kernel.append([Fraction(int(i == r - 1)) for i in range(r)])
    data.append(product(points))
    return output, kernel, data


for _r in (2, 3, 5):
    for _name, _matrix in zip(("output", "kernel", "data"), minimal_filter(_M, _r), strict=True):
        MATRICES[_name, _r] = [[float(x) for x in row] for row in _matrix]
# One tap alone needs no transform; its four points share one product.
MATRICES["output", 1] = MATRICES["data", 1] = np.eye(_M).tolist()
MATRICES["kernel", 1] = [[1.0]]


# Taps in one dimension are handed on as a tuple of that length: compiled code knows the lengths of tuples.
_ONE, _TWO, _THREE, _FIVE = (0,), (0, 0), (0, 0, 0), (0, 0, 0, 0, 0)


@compiled
def _points(taps: Any) -> int:
    """Points of a tile in one dimension."""
    return _M + len(taps) - 1


@compiled
def _kernels(taps: Any) -> int:
    """Of these, how many have a matrix of their own."""
    return _M + len(taps) - 1 if len(taps) > 1 else 1


@compiled
def _transform_weights(
    rows: Any, columns: Any, at: Any, w: Any, r: int, C: int, out: int, taps: Any, U: Any, first: int
) -> None:
    """Kernels w (out, C, r, r) → U (points, C, out), from U[first] on.

    Of all taps it takes those at (at[0] + i·at[2], at[1] + j·at[2]).
    """
    size = C * out
    for o in range(0, out, LANES):
        for c in range(C):
            for i in range(len(rows)):
                for j in range(len(columns)):
                    source = (o * C + c) * r * r + (at[0] + i * at[2]) * r + at[1] + j * at[2]
                    target = ((i * len(columns) + j) * C + c) * out + o
                    for lane in range(LANES):
                        taps[target + lane] = w[source + lane * C * r * r]
    point = size + LANES
    line, row = len(columns) * size, _kernels(columns) * point
    for n in range(0, size, LANES):
        transform_tile("kernel", rows, columns, taps, n, line, size, U, first + n, row, point)


@compiled
def _transform_data(
    rows: Any, columns: Any, x: Any, corner: int, step: Any, C: int, V: Any, first: int, point: int
) -> None:
    """One tile of all channels; ``step`` is how far apart its inputs lie down and across."""
    row = _points(columns) * point
    for c in range(0, C, LANES):
        transform_tile("data", rows, columns, x, corner + c, step[0], step[1], V, first + c, row, point)


@compiled
def _transform_output(rows: Any, columns: Any, M: Any, first: int, point: int, y: Any, into: Any) -> None:
    """A tile of sixteen channels; ``into`` is where it begins in y, and how far apart its pixels lie."""
    row = _points(columns) * point
    transform_tile("output", rows, columns, M, first, row, point, y, into[0], into[1], into[2])


@compiled
def _multiply(
    points: Any, kernels: Any, V: Any, v: int, U: Any, u: int, M: Any, m: int, T: int, C: int, out: int
) -> None:
    """M = V · U at every point of a tile, from V[v], U[u] and M[m] on. T is a multiple of 8."""
    for p in range(points[0] * points[1]):
        i, j = p // points[1], p % points[1]
        own = (i if kernels[0] > 1 else 0) * kernels[1] + (j if kernels[1] > 1 else 0)
        a, b, c = v + p * (T * C + LANES), u + own * (C * out + LANES), m + p * (T * out + LANES)
        if out % (2 * LANES) == 0:
            for n in range(0, out, 2 * LANES):
                for t in range(0, T, 4):
                    multiply_block(4, 2, V, a + t * C, C, U, b + n, out, M, c + t * out + n, out, C)
        else:
            for n in range(0, out, LANES):
                for t in range(0, T, 8):
                    multiply_block(8, 1, V, a + t * C, C, U, b + n, out, M, c + t * out + n, out, C)


@compiled
def activated(lanes: Any, activation: int) -> Any:
    if activation == RELU:
        return largest(lanes, splat(np.float32(0.0)))
    if activation == HARDSWISH:
        gate = largest(add(lanes, splat(np.float32(3.0))), splat(np.float32(0.0)))
        return mul(mul(lanes, least(gate, splat(np.float32(6.0)))), splat(np.float32(1.0 / 6.0)))
    return lanes


@compiled
def _finish(
    tile: Any, phases: int, bias: Any, activation: int, residual: Any, y: Any, shape: Any, place: Any, n: int
) -> None:
    """One tile of sixteen channels into y: the sum of its phases, + bias, activation, + residual."""
    OH, OW, out = shape
    image, row, column = place
    for i in range(row * _M, min(row * _M + _M, OH)):
        for j in range(column * _M, min(column * _M + _M, OW)):
            at = ((i - row * _M) * _M + j - column * _M) * LANES
            lanes = load(tile, at)
            for phase in range(1, phases):
                lanes = add(lanes, load(tile, at + phase * _M * _M * LANES))
            if bias.size:
                lanes = add(lanes, load(bias, n))
            lanes = activated(lanes, activation)
            where = ((image * OH + i) * OW + j) * out + n
            if residual.size:
                lanes = add(lanes, load(residual, where))
            store(y, where, lanes)


@compiled
def _convolve(taps, x, padded, C, w, bias, activation, residual, y, shape, fresh, work, U, V, M):
    """Stride 1. x lies in images of ``padded`` = (PH, PW) pixels, y is of ``shape`` (B, OH, OW, out)."""
    PH, PW = padded
    B, OH, OW, out = shape
    down, across = -(-OH // _M), -(-OW // _M)
    points, kernels = (_points(taps), _points(taps)), (_kernels(taps), _kernels(taps))
    if fresh:
        _transform_weights(taps, taps, (0, 0, 1), w, len(taps), C, out, work, U, 0)
    tile = np.empty(_M * _M * LANES, np.float32)
    plain = bias.size == 0 and activation == NONE and residual.size == 0
    for first in range(0, B * down * across, _BLOCK):
        T = min(_BLOCK, B * down * across - first)
        room = -(-T // 8) * 8
        v, m = room * C + LANES, room * out + LANES
        for t in range(T):
            at = first + t
            image, row, column = at // (down * across), at // across % down, at % across
            corner = ((image * PH + row * _M) * PW + column * _M) * C
            _transform_data(taps, taps, x, corner, (PW * C, C), C, V, t * C, v)
        _multiply(points, kernels, V, 0, U, 0, M, 0, room, C, out)
        for t in range(T):
            at = first + t
            place = at // (down * across), at // across % down, at % across
            whole = (place[1] + 1) * _M <= OH and (place[2] + 1) * _M <= OW
            first_pixel = ((place[0] * OH + place[1] * _M) * OW + place[2] * _M) * out
            for n in range(0, out, LANES):
                if plain and whole:
                    into = first_pixel + n, OW * out, out
                    _transform_output(taps, taps, M, t * out + n, m, y, into)
                else:
                    _transform_output(taps, taps, M, t * out + n, m, tile, (0, _M * LANES, LANES))
                    _finish(tile, 1, bias, activation, residual, y, (OH, OW, out), place, n)


@compiled
def _convolve_strided(taps, x, padded, C, w, bias, activation, residual, y, shape, fresh, work, U, V, M):
    """3×3, stride 2: taps 0 and 2 of each dimension meet the even pixels of x, tap 1 the odd ones.

    So there are four phases, of 5·5, 5·4, 4·5 and 4·4 points, each in its part of U, V and M.
    """
    PH, PW = padded
    B, OH, OW, out = shape
    down, across = -(-OH // _M), -(-OW // _M)
    point = C * out + LANES
    if fresh:
        _transform_weights(_TWO, _TWO, (0, 0, 2), w, 3, C, out, work, U, 0)
        _transform_weights(_TWO, _ONE, (0, 1, 2), w, 3, C, out, work, U, 25 * point)
        _transform_weights(_ONE, _TWO, (1, 0, 2), w, 3, C, out, work, U, 30 * point)
        _transform_weights(_ONE, _ONE, (1, 1, 2), w, 3, C, out, work, U, 35 * point)
    size = _M * _M * LANES
    tile = np.empty(4 * size, np.float32)
    for first in range(0, B * down * across, _STRIDED_BLOCK):
        T = min(_STRIDED_BLOCK, B * down * across - first)
        room = -(-T // 8) * 8
        v, m = room * C + LANES, room * out + LANES
        for t in range(T):
            at = first + t
            image, row, column = at // (down * across), at // across % down, at % across
            corner = ((image * PH + row * 2 * _M) * PW + column * 2 * _M) * C
            step = 2 * PW * C, 2 * C
            _transform_data(_TWO, _TWO, x, corner, step, C, V, t * C, v)
            _transform_data(_TWO, _ONE, x, corner + C, step, C, V, t * C + 25 * v, v)
            _transform_data(_ONE, _TWO, x, corner + PW * C, step, C, V, t * C + 45 * v, v)
            _transform_data(_ONE, _ONE, x, corner + PW * C + C, step, C, V, t * C + 65 * v, v)
        for phase in range(4):  # a loop, because compilers take four calls for four reasons to copy the code
            points = 5 - phase // 2, 5 - phase % 2
            kernels = 5 - phase // 2 * 4, 5 - phase % 2 * 4
            tiles, own = (0, 25, 45, 65)[phase], (0, 25, 30, 35)[phase]
            _multiply(points, kernels, V, tiles * v, U, own * point, M, tiles * m, room, C, out)
        for t in range(T):
            at = first + t
            place = at // (down * across), at // across % down, at % across
            for n in range(0, out, LANES):
                _transform_output(_TWO, _TWO, M, t * out + n, m, tile, (0, _M * LANES, LANES))
                _transform_output(_TWO, _ONE, M, t * out + n + 25 * m, m, tile, (size, _M * LANES, LANES))
                _transform_output(_ONE, _TWO, M, t * out + n + 45 * m, m, tile, (2 * size, _M * LANES, LANES))
                _transform_output(_ONE, _ONE, M, t * out + n + 65 * m, m, tile, (3 * size, _M * LANES, LANES))
                _finish(tile, 4, bias, activation, residual, y, (OH, OW, out), place, n)


def padding(H: int, W: int, size: int, stride: int, pad: int) -> tuple[int, int]:
    """(PH, PW) of the images that ``convolve`` reads: H × W pixels from (pad, pad) on, zeros around."""
    high, wide = (H + 2 * pad - size) // stride + 1, (W + 2 * pad - size) // stride + 1
    last = (-(-high // _M) * _M - 1) * stride + size, (-(-wide // _M) * _M - 1) * stride + size
    return max(last[0], H + pad), max(last[1], W + pad)


def transformed(C: int, out: int, size: int, stride: int) -> int:
    """Floats of the transformed weights."""
    return (36 if stride == 2 else (_M + size - 1) ** 2) * (C * out + LANES)


def convolve(
    x: Floats,
    w: Floats,
    size: int,
    stride: int,
    bias: Floats,
    activation: int,
    residual: Floats,
    y: Floats,
    scratch: Callable[[str, int], Floats],
    name: str = "",
    fresh: bool = True,
) -> None:
    """y = activation(conv(x, w) + bias) + residual: 3×3 or 5×5 of stride 1, or 3×3 of stride 2.

    x (B, PH, PW, C) as ``padding`` says, w (out·C·size²,) in torch's order, y (B, OH, OW, out), C and out
    multiples of 16; ``bias`` (out,) and ``residual`` (like y, flat) may be empty. ``scratch(name, floats)``
    gives memory: up to 4 floats a weight (of 3×3) under ``name``; a float a weight and 64·32·(C + out)
    that all share. Unless ``fresh``, the weights are those of the last call with that name.
    """
    _, PH, PW, C = x.shape
    out = y.shape[3]
    points = 81 if stride == 2 else (_M + size - 1) ** 2
    block = _STRIDED_BLOCK if stride == 2 else _BLOCK
    work = (
        scratch("taps", size * size * C * out),
        scratch(f"U {name}", transformed(C, out, size, stride)),
        scratch("V", points * (block * C + LANES)),
        scratch("M", points * (block * out + LANES)),
    )
    run, taps = (_convolve_strided, _TWO) if stride == 2 else (_convolve, _FIVE if size == 5 else _THREE)
    into = residual, y.reshape(-1), y.shape, fresh
    run(taps, x.reshape(-1), (PH, PW), C, w, bias, activation, *into, *work)
