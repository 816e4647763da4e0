"""Directions and their weighted sums, compiled: the bits of ``baffle.perturbations`` and of its NumPy stream.

Philox4x32-10 has no state, so each vector lane takes its own block (eight to a 512-bit register; LLVM finds
them in the loop of ``_philox``). The look-up is one scalar load a value from a table of 64 KB of int16, which
the second-level cache holds, and the sign comes from the half-word's top bit; a table with both signs or of
floats is larger and slower, and so are hardware gathers.

A weighted sum Σ_k s_k z_k goes through the parameters in tiles and for each tile through all k, ascending:
its float64 sums stay in the first-level cache and no direction is written to memory. Multiplication and
addition are rounded one by one (numba does not fuse them), each parameter for itself, so tiles and threads
change no bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from baffle.kernels import compiled

_SPAN = 512  # values that are made at a time
_TILE = 1024  # sums that are kept at a time
_GROUP = 8  # Philox blocks of one vector
_SIGNS = 2048  # signs that are made, or summed, at a time
_LINE = 64  # bytes of a cache line
_ROWS, _COLUMNS = 32, 128  # a tile of a matrix
MOST_RANK = 64  # of LowRank's factors; beyond it, products by BLAS are the faster way
_TASK = 1 << 18  # values that a thread makes at the least

_GRID = 2.0**-12
_GRID32 = np.float32(_GRID)
_U64 = np.uint64
_LOW, _HALF = _U64(0xFFFFFFFF), _U64(32)
_M0, _M1 = _U64(0xD2511F53), _U64(0xCD9E8D57)
_W0, _W1 = _U64(0x9E3779B9), _U64(0xBB67AE85)


# Part of its callers' code, so that what does not change from tile to tile is computed once.
_inlined = njit(nogil=True, error_model="numpy", forceinline=True)


@compiled
def _scratch(size: Any) -> Any:
    """``size`` bytes that start with a cache line: a vector that lies across two takes twice as long."""
    memory = np.empty(size + _LINE, np.uint8)
    skip = -memory.ctypes.data % _LINE
    return memory[skip : skip + size]


@compiled
def _whole(blocks: Any) -> Any:
    """As many blocks in whole vectors: the rest of a vector would cost more, one block after the other."""
    return (blocks + _GROUP - 1) // _GROUP * _GROUP


@_inlined
def _philox(first: Any, count: Any, k: Any, h: Any, words: Any) -> None:
    """Blocks [first, first + count) of direction k, as u64 (2·count,): two words each, the first one low."""
    h0, h1, h2, h3 = h[0], h[1], h[2], h[3]
    for i in range(count):
        c0, c1, c2, c3 = _U64(first + i) & _LOW, k, h2, h3
        k0, k1 = h0, h1
        for _ in range(10):
            p0, p1 = c0 * _M0, c2 * _M1
            c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        words[2 * i] = c0 | (c1 << _HALF)
        words[2 * i + 1] = c2 | (c3 << _HALF)


@_inlined
def _integers(start: Any, stop: Any, k: Any, h: Any, table: Any, words: Any, out: Any) -> None:
    """Gaussian integers g of half-words [start, stop) of direction k: int16 (stop − start,)."""
    first = start // 8
    _philox(first, _whole(-(-stop // 8) - first), k, h, words)
    u = words.view(np.int16)[start - 8 * first :]
    for i in range(stop - start):
        out[i] = table[np.uint16(u[i]) & np.uint16(0x7FFF)]
    for i in range(stop - start):
        sign = np.int16(u[i] >> 15)
        out[i] = np.int16((out[i] ^ sign) - sign)


@compiled
def _add(total: Any, z: Any, slope: Any) -> None:
    for i in range(len(z)):
        total[i] += np.float64(z[i]) * slope


@compiled
def _divide(out: Any, total: Any, count: Any) -> None:
    for i in range(len(out)):
        out[i] = np.float32(total[i] / count)


@_inlined
def _gaussian_row(z: Any, start: Any, key: Any, h: Any, table: Any, words: Any, q: Any) -> None:
    stop = start + len(z)
    a = start
    while a < stop:
        b = min((a // _SPAN + 1) * _SPAN, stop)
        _integers(a, b, key, h, table, words, q)
        part = z[a - start : b - start]
        for i in range(len(part)):
            part[i] = np.float32(q[i]) * _GRID32
        a = b


@compiled
def _gaussian(out: Any, start: Any, k: Any, step: Any, h: Any, table: Any) -> None:
    words, q = _scratch(2 * _SPAN + 16 * _GROUP).view(np.uint64), _scratch(2 * _SPAN).view(np.int16)
    for row in range(len(out)):
        _gaussian_row(out[row], start, _U64(k + row * step), h, table, words, q)


@compiled
def _gaussian_mean(out: Any, start: Any, slopes: Any, first: Any, h: Any, table: Any) -> None:
    words, q = _scratch(2 * _TILE + 16 * _GROUP).view(np.uint64), _scratch(2 * _TILE).view(np.int16)
    total = _scratch(8 * _TILE).view(np.float64)
    stop = start + len(out)
    a = start
    while a < stop:
        b = min((a // _TILE + 1) * _TILE, stop)
        total[:] = 0.0
        for k in range(len(slopes)):
            _integers(a, b, _U64(first + k), h, table, words, q)
            slope = slopes[k]
            for i in range(b - a):
                total[i] += np.float64(q[i]) * _GRID * slope
        _divide(out[a - start : b - start], total, len(slopes))
        a = b


@compiled
def _octets(z: Any, octets: Any, table: Any) -> None:
    """Eight signs for each byte of ``octets``."""
    for j in range(len(octets)):
        s, part = table[octets[j]], z[8 * j : 8 * j + 8]
        # All loads before all stores: one of each in a vector, for arrays that might overlap.
        s0, s1, s2, s3, s4, s5, s6, s7 = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]
        part[0], part[1], part[2], part[3], part[4], part[5], part[6], part[7] = (
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
        )


@compiled
def _sign_row(z: Any, start: Any, key: Any, h: Any, table: Any, words: Any, spare: Any) -> None:
    stop = start + len(z)
    a = start
    while a < stop:
        b = min((a // _SIGNS + 1) * _SIGNS, stop)
        first = a // 128
        _philox(first, _whole(-(-b // 128) - first), key, h, words)
        octets = words.view(np.uint8)[a // 8 - 16 * first : -(-b // 8) - 16 * first]
        part = z[a - start : b - start]
        if a % 8 == 0 and b % 8 == 0:
            _octets(part, octets, table)
        else:
            _octets(spare, octets, table)
            inner = spare[a % 8 : a % 8 + b - a]
            for i in range(len(part)):  # a slice assignment would take seconds to compile
                part[i] = inner[i]
        a = b


@compiled
def _rademacher(out: Any, start: Any, k: Any, step: Any, h: Any, table: Any) -> None:
    words, spare = _scratch(_SIGNS // 8 + 16 * _GROUP).view(np.uint64), _scratch(4 * _SIGNS).view(np.float32)
    for row in range(len(out)):
        _sign_row(out[row], start, _U64(k + row * step), h, table, words, spare)


@compiled
def _rademacher_mean(out: Any, start: Any, slopes: Any, first: Any, h: Any, table: Any) -> None:
    words, spare = _scratch(_SIGNS // 8 + 16 * _GROUP).view(np.uint64), _scratch(4 * _SIGNS).view(np.float32)
    total, z = _scratch(8 * _SIGNS).view(np.float64), _scratch(4 * _SIGNS).view(np.float32)
    stop = start + len(out)
    a = start
    while a < stop:
        b = min((a // _SIGNS + 1) * _SIGNS, stop)
        total[:] = 0.0
        for k in range(len(slopes)):
            _sign_row(z[: b - a], a, _U64(first + k), h, table, words, spare)
            _add(total, z[: b - a], slopes[k])
        _divide(out[a - start : b - start], total, len(slopes))
        a = b


@compiled
def _factors(
    tile: Any,
    rows: Any,
    position: Any,
    rank: Any,
    key: Any,
    h: Any,
    table: Any,
    words: Any,
    q: Any,
    A: Any,
    B: Any,
) -> None:
    """Of rows [i0, i1) and columns [j0, j1) of a matrix: A, row after row, and Bᵀ, as float64 integers."""
    i0, i1, j0, j1 = tile
    _integers(position + i0 * rank, position + i1 * rank, key, h, table, words, q)
    for i in range((i1 - i0) * rank):
        A[i] = q[i]
    right = position + rows * rank
    _integers(right + j0 * rank, right + j1 * rank, key, h, table, words, q)
    for s in range(rank):
        for j in range(j1 - j0):
            B[s, j] = q[j * rank + s]


@compiled
def _entries(z: Any, a: Any, B: Any, first: Any, scale: Any, sums: Any) -> None:
    """Entries of one row, from column ``first`` of Bᵀ. Sums of integers below 2⁵³ are exact in any order."""
    rank, length = len(a), len(z)
    sums[:length] = 0.0
    s = 0
    while s + 4 <= rank:
        a0, a1, a2, a3 = a[s], a[s + 1], a[s + 2], a[s + 3]
        b0, b1, b2, b3 = B[s][first:], B[s + 1][first:], B[s + 2][first:], B[s + 3][first:]
        for j in range(length):
            sums[j] += a0 * b0[j] + a1 * b1[j] + a2 * b2[j] + a3 * b3[j]
        s += 4
    while s < rank:
        a0, b0 = a[s], B[s][first:]
        for j in range(length):
            sums[j] += a0 * b0[j]
        s += 1
    for j in range(length):
        z[j] = np.float32(sums[j] * scale)


@compiled
def _low_rank(
    out: Any, start: Any, k: Any, step: Any, h: Any, table: Any, tensors: Any, rank: Any, scale: Any
) -> None:
    most = max(_SPAN, _COLUMNS * rank)
    words, q = _scratch(2 * most + 16 * _GROUP).view(np.uint64), _scratch(2 * most).view(np.int16)
    A, sums = _scratch(8 * _ROWS * rank).view(np.float64), _scratch(8 * _COLUMNS).view(np.float64)
    B = _scratch(8 * _COLUMNS * rank).view(np.float64).reshape(rank, _COLUMNS)
    stop = start + out.shape[1]
    for t in range(len(tensors)):
        offset, rows, columns, position = tensors[t]
        a, b = max(start, offset), min(stop, offset + max(rows, 1) * columns)
        if a >= b:
            continue
        if rows == 0:
            for row in range(len(out)):
                z = out[row][a - start : b - start]
                _gaussian_row(z, position + a - offset, _U64(k + row * step), h, table, words, q)
            continue
        bottom = -(-(b - offset) // columns)
        for i0 in range((a - offset) // columns, bottom, _ROWS):
            i1 = min(i0 + _ROWS, bottom)
            for j0 in range(0, columns, _COLUMNS):
                j1 = min(j0 + _COLUMNS, columns)
                if offset + i0 * columns + j0 >= b or offset + (i1 - 1) * columns + j1 <= a:
                    continue
                tile = (i0, i1, j0, j1)
                for row in range(len(out)):
                    key = _U64(k + row * step)
                    _factors(tile, rows, position, rank, key, h, table, words, q, A, B)
                    for i in range(i1 - i0):
                        at = offset + (i0 + i) * columns + j0
                        c, d = max(a, at), min(b, at + j1 - j0)
                        if c < d:
                            z = out[row][c - start : d - start]
                            _entries(z, A[i * rank : i * rank + rank], B, c - at, scale, sums)


@compiled
def _low_rank_mean(
    out: Any,
    start: Any,
    slopes: Any,
    first: Any,
    h: Any,
    table: Any,
    tensors: Any,
    rank: Any,
    scale: Any,
) -> None:
    most = _COLUMNS * rank
    words, q = _scratch(2 * most + 16 * _GROUP).view(np.uint64), _scratch(2 * most).view(np.int16)
    A, sums = _scratch(8 * _ROWS * rank).view(np.float64), _scratch(8 * _COLUMNS).view(np.float64)
    B = _scratch(8 * _COLUMNS * rank).view(np.float64).reshape(rank, _COLUMNS)
    total, z = _scratch(8 * _ROWS * _COLUMNS).view(np.float64), _scratch(4 * _COLUMNS).view(np.float32)
    stop = start + len(out)
    for t in range(len(tensors)):
        offset, rows, columns, position = tensors[t]
        a, b = max(start, offset), min(stop, offset + max(rows, 1) * columns)
        if a >= b:
            continue
        if rows == 0:
            _gaussian_mean(out[a - start : b - start], position + a - offset, slopes, first, h, table)
            continue
        bottom = -(-(b - offset) // columns)
        for i0 in range((a - offset) // columns, bottom, _ROWS):
            i1 = min(i0 + _ROWS, bottom)
            for j0 in range(0, columns, _COLUMNS):
                j1 = min(j0 + _COLUMNS, columns)
                if offset + i0 * columns + j0 >= b or offset + (i1 - 1) * columns + j1 <= a:
                    continue
                tile = (i0, i1, j0, j1)
                total[:] = 0.0
                for k in range(len(slopes)):
                    _factors(tile, rows, position, rank, _U64(first + k), h, table, words, q, A, B)
                    for i in range(i1 - i0):
                        entries = z[: j1 - j0]
                        _entries(entries, A[i * rank : i * rank + rank], B, 0, scale, sums)
                        _add(total[i * _COLUMNS :], entries, slopes[k])
                for i in range(i1 - i0):
                    at = offset + (i0 + i) * columns + j0
                    c, d = max(a, at), min(b, at + j1 - j0)
                    if c < d:
                        _divide(out[c - start : d - start], total[i * _COLUMNS + c - at :], len(slopes))


class Kernel(NamedTuple):
    """One kind of direction of one layout: what makes its values, and their weighted means."""

    rows: Callable[..., None]
    mean: Callable[..., None]
    constants: tuple[Any, ...] = ()

    def values(self, key: tuple[int, ...], directions: range, start: int, stop: int) -> NDArray[np.float32]:
        """z_k[start:stop] for each k of ``directions``: float32 (len(directions), stop − start)."""
        out = _aligned(len(directions), stop - start)
        self.rows(out, start, directions.start, directions.step, np.array(key, np.uint64), *self.constants)
        return out

    def gradient(
        self,
        key: tuple[int, ...],
        slopes: NDArray[np.float64],
        n: int,
        threads: int | None = None,
        first: int = 0,
    ) -> NDArray[np.float32]:
        """(1/K) Σ_k s_k z_(first + k): float32 (n,), the same bits for any number of threads (None: all
        cores).

        Memory: the result, and less than a megabyte a thread.
        """
        out: NDArray[np.float32] = _aligned(1, n)[0]
        h = np.array(key, np.uint64)

        def part(start: int, stop: int) -> None:
            self.mean(out[start:stop], start, slopes, first, h, *self.constants)

        workers = min(threads or usable_cores(), n * len(slopes) // _TASK)
        if workers <= 1:
            part(0, n)
            return out
        # Several parts a thread, for cores are not equally fast; whole tiles, for cut ones are made twice.
        bounds = [*range(0, n, max(-(-n // (4 * workers)) // _SIGNS, 1) * _SIGNS), n]
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(part, bounds[:-1], bounds[1:]):
                pass
        return out


def _aligned(rows: int, columns: int) -> NDArray[np.float32]:
    memory = np.empty(4 * rows * columns + _LINE, np.uint8)
    skip = -memory.ctypes.data % _LINE
    values: NDArray[np.float32] = memory[skip : skip + 4 * rows * columns].view(np.float32)
    return values.reshape(rows, columns)


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gaussian(table: NDArray[np.int64]) -> Kernel:
    """``table``: the 65536 integers of ``perturbations.gaussian_table``."""
    return Kernel(_gaussian, _gaussian_mean, (_half(table),))


def rademacher() -> Kernel:
    signs = 1 - 2 * (np.arange(256)[:, None] >> np.arange(8) & 1)
    return Kernel(_rademacher, _rademacher_mean, (signs.astype(np.float32),))


def low_rank(table: NDArray[np.int64], tensors: NDArray[np.int64], rank: int) -> Kernel:
    """``tensors``: those of ``LowRank.tensors``, int64 (tensors, 4)."""
    scale = _GRID * _GRID * (1.0 / math.sqrt(rank))
    return Kernel(_low_rank, _low_rank_mean, (_half(table), tensors, rank, scale))


def _half(table: NDArray[np.int64]) -> NDArray[np.int16]:
    return table[: 1 << 15].astype(np.int16)
