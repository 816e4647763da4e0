"""Convolutions with few multiplications: Winograd's minimal filtering, float32, NHWC, one thread a call.

An r×r convolution of stride 1 is made m×m outputs at a time (m = 4) from a tile of a×a inputs,
a = m + r − 1:  Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A  (Lavin & Gray, arXiv:1509.09308). Over all channels the ⊙ is
a² matrix products, with 4 times fewer multiplications than the plain sum for r = 3, 6.25 times for r = 5.
A 3×3 convolution of stride 2 is one of 2×2 and stride 1 over the four phases of its input.

Rounding: the result differs from a plain float32 convolution by a few 10⁻⁶ of its largest value. It is a
smooth function of the weights as far as float32 is: slopes at σ = 1e-4 follow the exact derivative as
those of the plain convolution do (tests/test_convolution.py).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from numba import literally, njit
from numpy.typing import NDArray

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
_M = 4
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


@njit(nogil=True, cache=True)
def _points(taps: int) -> int:
    """Points of a tile in one dimension."""
    return _M + taps - 1


@njit(nogil=True, cache=True)
def _kernels(taps: int) -> int:
    """Of these, how many have a matrix of their own."""
    return _M + taps - 1 if taps > 1 else 1


@njit(nogil=True, cache=True)
def _transform_weights(
    rows: int,
    columns: int,
    first: Any,
    stride: int,
    w: Any,
    r: int,
    C: int,
    out: int,
    taps: Any,
    U: Any,
    at: int,
) -> int:
    """Kernels w (out, C, r, r) → U (points, C, out) of one phase, from ``at`` on. Returns its end.

    The phase has ``rows``·``columns`` of the taps: those at ``first`` + ``stride``·(i, j).
    """
    rows, columns = literally(rows), literally(columns)
    size = C * out
    for o in range(0, out, LANES):
        for c in range(C):
            for i in range(rows):
                for j in range(columns):
                    source = (o * C + c) * r * r + (first[0] + stride * i) * r + first[1] + stride * j
                    target = ((i * columns + j) * C + c) * out + o
                    for lane in range(LANES):
                        taps[target + lane] = w[source + lane * C * r * r]
    point = size + LANES
    for n in range(0, size, LANES):
        transform_tile(
            "kernel",
            rows,
            columns,
            taps,
            n,
            columns * size,
            size,
            U,
            at + n,
            _kernels(columns) * point,
            point,
        )
    end: int = at + _kernels(rows) * _kernels(columns) * point
    return end


@njit(nogil=True, cache=True)
def _transform_data(
    rows: int, columns: int, x: Any, corner: int, line: int, pixel: int, C: int, V: Any, t: int, point: int
) -> None:
    """One tile of all channels; ``line`` and ``pixel`` are the distances between its inputs."""
    rows, columns = literally(rows), literally(columns)
    for c in range(0, C, LANES):
        transform_tile(
            "data", rows, columns, x, corner + c, line, pixel, V, t * C + c, _points(columns) * point, point
        )


@njit(nogil=True, cache=True)
def _transform_output(rows: int, columns: int, M: Any, at: int, point: int, tile: Any, tile_at: int) -> None:
    rows, columns = literally(rows), literally(columns)
    transform_tile(
        "output", rows, columns, M, at, _points(columns) * point, point, tile, tile_at, _M * LANES, LANES
    )


@njit(nogil=True, cache=True)
def _multiply(
    rows: int, columns: int, V: Any, U: Any, u_at: int, M: Any, m_at: int, T: int, C: int, out: int
) -> None:
    """M = V · U at every point of one phase. T is a multiple of 8."""
    for i in range(_points(rows)):
        for j in range(_points(columns)):
            p = i * _points(columns) + j
            own = (i if rows > 1 else 0) * _kernels(columns) + (j if columns > 1 else 0)
            v, u, m = p * (T * C + LANES), u_at + own * (C * out + LANES), m_at + p * (T * out + LANES)
            if out % (2 * LANES) == 0:
                for n in range(0, out, 2 * LANES):
                    for t in range(0, T, 4):
                        multiply_block(4, 2, V, v + t * C, C, U, u + n, out, M, m + t * out + n, out, C)
            else:
                for n in range(0, out, LANES):
                    for t in range(0, T, 8):
                        multiply_block(8, 1, V, v + t * C, C, U, u + n, out, M, m + t * out + n, out, C)


@njit(nogil=True, cache=True)
def activated(lanes: Any, activation: int) -> Any:
    if activation == RELU:
        return largest(lanes, splat(np.float32(0.0)))
    if activation == HARDSWISH:
        gate = largest(add(lanes, splat(np.float32(3.0))), splat(np.float32(0.0)))
        return mul(mul(lanes, least(gate, splat(np.float32(6.0)))), splat(np.float32(1.0 / 6.0)))
    return lanes


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def _convolve(r, x, padded, C, w, bias, activation, residual, y, shape, block, taps, U, V, M):
    """Stride 1. x lies in images of ``padded`` = (PH, PW) pixels, y is of ``shape`` (B, OH, OW, out)."""
    r = literally(r)
    PH, PW = padded
    B, OH, OW, out = shape
    down, across = -(-OH // _M), -(-OW // _M)
    _transform_weights(r, r, (0, 0), 1, w, r, C, out, taps, U, 0)
    tile = np.empty(_M * _M * LANES, np.float32)
    for at in range(0, B * down * across, block):
        T = min(block, B * down * across - at)
        room = -(-T // 8) * 8
        v, m = room * C + LANES, room * out + LANES
        for t in range(T):
            image, row, column = (at + t) // (down * across), (at + t) // across % down, (at + t) % across
            corner = ((image * PH + row * _M) * PW + column * _M) * C
            _transform_data(r, r, x, corner, PW * C, C, C, V, t, v)
        _multiply(r, r, V, U, 0, M, 0, room, C, out)
        for t in range(T):
            place = (at + t) // (down * across), (at + t) // across % down, (at + t) % across
            for n in range(0, out, LANES):
                _transform_output(r, r, M, t * out + n, m, tile, 0)
                _finish(tile, 1, bias, activation, residual, y, (OH, OW, out), place, n)


@njit(nogil=True, cache=True)
def _convolve_strided(x, padded, C, w, bias, activation, residual, y, shape, block, taps, U, V, M):
    """3×3, stride 2: taps 0 and 2 of each dimension meet the even pixels of x, tap 1 the odd ones."""
    PH, PW = padded
    B, OH, OW, out = shape
    down, across = -(-OH // _M), -(-OW // _M)
    u1 = _transform_weights(2, 2, (0, 0), 2, w, 3, C, out, taps, U, 0)
    u2 = _transform_weights(2, 1, (0, 1), 2, w, 3, C, out, taps, U, u1)
    u3 = _transform_weights(1, 2, (1, 0), 2, w, 3, C, out, taps, U, u2)
    _transform_weights(1, 1, (1, 1), 2, w, 3, C, out, taps, U, u3)
    size = _M * _M * LANES
    tile = np.empty(4 * size, np.float32)
    for at in range(0, B * down * across, block):
        T = min(block, B * down * across - at)
        room = -(-T // 8) * 8
        v, m = room * C + LANES, room * out + LANES
        for t in range(T):
            image, row, column = (at + t) // (down * across), (at + t) // across % down, (at + t) % across
            corner = ((image * PH + row * 2 * _M) * PW + column * 2 * _M) * C
            line, pixel = 2 * PW * C, 2 * C
            _transform_data(2, 2, x, corner, line, pixel, C, V, t, v)
            _transform_data(2, 1, x, corner + C, line, pixel, C, V[25 * v :], t, v)
            _transform_data(1, 2, x, corner + PW * C, line, pixel, C, V[45 * v :], t, v)
            _transform_data(1, 1, x, corner + PW * C + C, line, pixel, C, V[65 * v :], t, v)
        _multiply(2, 2, V, U, 0, M, 0, room, C, out)
        _multiply(2, 1, V[25 * v :], U, u1, M, 25 * m, room, C, out)
        _multiply(1, 2, V[45 * v :], U, u2, M, 45 * m, room, C, out)
        _multiply(1, 1, V[65 * v :], U, u3, M, 65 * m, room, C, out)
        for t in range(T):
            place = (at + t) // (down * across), (at + t) // across % down, (at + t) % across
            for n in range(0, out, LANES):
                _transform_output(2, 2, M, t * out + n, m, tile, 0)
                _transform_output(2, 1, M, t * out + n + 25 * m, m, tile, size)
                _transform_output(1, 2, M, t * out + n + 45 * m, m, tile, 2 * size)
                _transform_output(1, 1, M, t * out + n + 65 * m, m, tile, 3 * size)
                _finish(tile, 4, bias, activation, residual, y, (OH, OW, out), place, n)


# Entry points of their own: asking for a literal from Python would compile anew at every call.
@njit(nogil=True, cache=True)
def _convolve3(x, padded, C, w, bias, activation, residual, y, shape, block, taps, U, V, M):
    _convolve(3, x, padded, C, w, bias, activation, residual, y, shape, block, taps, U, V, M)


@njit(nogil=True, cache=True)
def _convolve5(x, padded, C, w, bias, activation, residual, y, shape, block, taps, U, V, M):
    _convolve(5, x, padded, C, w, bias, activation, residual, y, shape, block, taps, U, V, M)


def padding(H: int, W: int, size: int, stride: int, pad: int) -> tuple[int, int]:
    """(PH, PW) of the images that ``convolve`` reads: H × W pixels from (pad, pad) on, zeros around."""
    high, wide = (H + 2 * pad - size) // stride + 1, (W + 2 * pad - size) // stride + 1
    last = (-(-high // _M) * _M - 1) * stride + size, (-(-wide // _M) * _M - 1) * stride + size
    return max(last[0], H + pad), max(last[1], W + pad)


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
) -> None:
    """y = activation(conv(x, w) + bias) + residual: 3×3 or 5×5 of stride 1, or 3×3 of stride 2.

    x (B, PH, PW, C) as ``padding`` says, w (out·C·size²,) in torch's order, y (B, OH, OW, out), C and out
    multiples of 16; ``bias`` (out,) and ``residual`` (like y, flat) may be empty. ``scratch(name, floats)``
    gives memory: up to 6 floats a weight, and 81·32·(C + out).
    """
    _, PH, PW, C = x.shape
    out = y.shape[3]
    block = 32
    points = 81 if stride == 2 else (_M + size - 1) ** 2
    kernels = 36 if stride == 2 else points
    work = (
        scratch("taps", size * size * C * out),
        scratch("U", kernels * (C * out + LANES)),
        scratch("V", points * (block * C + LANES)),
        scratch("M", points * (block * out + LANES)),
    )
    run = _convolve_strided if stride == 2 else _convolve5 if size == 5 else _convolve3
    run(x.reshape(-1), (PH, PW), C, w, bias, activation, residual, y.reshape(-1), y.shape, block, *work)
