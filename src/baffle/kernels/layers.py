"""The small layers around a convolution, one pass over memory each: float32, NHWC, one thread a call.

project       a matrix product with bias, activation, 2×2 max-pooling and residual: 1×1 convolutions,
              and the first convolution of a network, whose columns are the same for all directions
group_norm    normalisation of groups of channels, with activation
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from baffle.kernels.simd import LANES, add, fma, largest, load, mul, multiply_block, splat, store
from baffle.kernels.winograd import activated


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def project(
    x: Any,
    shape: Any,
    stride: int,
    w: Any,
    bias: Any,
    activation: int,
    pool: int,
    residual: Any,
    y: Any,
    out: int,
) -> None:
    """y = maxpool(activation(x[:, ::stride, ::stride] · wᵀ + bias)) + residual, all flat.

    x (B, H, W, C), w (out, C); ``pool`` is 1, or 2 for 2×2 (a last odd row or column is left out).
    ``out`` is a multiple of 16; ``bias`` and ``residual`` may be empty.
    """
    B, H, W, C = shape
    OH, OW = (H - 1) // stride + 1, (W - 1) // stride + 1
    right = np.empty(C * out, np.float32)
    for c in range(C):
        for o in range(out):
            right[c * out + o] = w[o * C + c]
    line = -(-OW // 8) * 8 * out
    lines = np.empty(pool * line, np.float32)
    high, wide = OH // pool, OW // pool
    for image in range(B):
        for row in range(high):
            for p in range(pool):
                left = (image * H + (row * pool + p) * stride) * W * C
                _line(x, left, stride * C, right, lines, p * line, OW, C, out)
                for at in range(p * line, p * line + OW * out, out):
                    for n in range(0, out, LANES):
                        lanes = load(lines, at + n)
                        if bias.size:
                            lanes = add(lanes, load(bias, n))
                        store(lines, at + n, activated(lanes, activation))
            for column in range(wide):
                where = ((image * high + row) * wide + column) * out
                at = column * pool * out
                for n in range(0, out, LANES):
                    lanes = load(lines, at + n)
                    if pool == 2:
                        above = largest(lanes, load(lines, at + out + n))
                        below = largest(load(lines, line + at + n), load(lines, line + at + out + n))
                        lanes = largest(above, below)
                    if residual.size:
                        lanes = add(lanes, load(residual, where + n))
                    store(y, where + n, lanes)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _line(x: Any, left: int, step: int, right: Any, lines: Any, at: int, OW: int, C: int, out: int) -> None:
    """One row of pixels times the matrix. Blocks that would leave the row are done pixel by pixel."""
    whole = OW // 8 * 8
    if out % (2 * LANES) == 0:
        for n in range(0, out, 2 * LANES):
            for t in range(0, whole, 4):
                multiply_block(4, 2, x, left + t * step, step, right, n, out, lines, at + t * out + n, out, C)
    else:
        for n in range(0, out, LANES):
            for t in range(0, whole, 8):
                multiply_block(8, 1, x, left + t * step, step, right, n, out, lines, at + t * out + n, out, C)
    for n in range(0, out, LANES):
        for t in range(whole, OW):
            multiply_block(1, 1, x, left + t * step, step, right, n, out, lines, at + t * out + n, out, C)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def group_norm(
    x: Any, shape: Any, groups: int, eps: float, weight: Any, bias: Any, activation: int, y: Any
) -> None:
    """y = activation(GroupNorm(x)), flat. x (B, H, W, C), C a multiple of 16; the affine part may be empty."""
    B, H, W, C = shape
    size, pixels = C // groups, H * W
    scale, shift = np.empty(C, np.float32), np.empty(C, np.float32)
    for image in range(B):
        start, end = image * pixels * C, (image + 1) * pixels * C
        for c in range(0, C, LANES):
            even, odd = splat(np.float32(0.0)), splat(np.float32(0.0))
            for at in range(start + c, end, 2 * C):
                even = add(even, load(x, at))
                if at + C < end:
                    odd = add(odd, load(x, at + C))
            store(shift, c, add(even, odd))
        for g in range(groups):
            total = 0.0
            for c in range(g * size, (g + 1) * size):
                total += shift[c]
            shift[g * size : (g + 1) * size] = np.float32(-total / (pixels * size))
        for c in range(0, C, LANES):
            back = load(shift, c)
            even, odd = splat(np.float32(0.0)), splat(np.float32(0.0))
            for at in range(start + c, end, 2 * C):
                d = add(load(x, at), back)
                even = fma(d, d, even)
                if at + C < end:
                    d = add(load(x, at + C), back)
                    odd = fma(d, d, odd)
            store(scale, c, add(even, odd))
        for g in range(groups):
            total = 0.0
            for c in range(g * size, (g + 1) * size):
                total += scale[c]
            inverse = 1.0 / np.sqrt(total / (pixels * size) + eps)
            for c in range(g * size, (g + 1) * size):
                own = inverse * weight[c] if weight.size else inverse
                scale[c] = own
                shift[c] = shift[c] * own + (bias[c] if bias.size else 0.0)
        for at in range(start, end, C):
            for c in range(0, C, LANES):
                store(y, at + c, activated(fma(load(x, at + c), load(scale, c), load(shift, c)), activation))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def activate(x: Any, activation: int, y: Any) -> None:
    """y = activation(x), flat, of a length that is a multiple of 16."""
    for at in range(0, x.size, LANES):
        store(y, at, activated(load(x, at), activation))
