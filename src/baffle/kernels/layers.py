"""The small layers around a convolution, one pass over memory each: float32, NHWC, one thread a call.

project       a matrix product with bias, activation, 2×2 max-pooling and residual: 1×1 convolutions,
              and the first convolution of a network, whose columns are the same for all directions
group_norm    normalisation of groups of channels, with activation
"""

from __future__ import annotations

from typing import Any

import numpy as np

from baffle.kernels import compiled
from baffle.kernels.simd import LANES, add, fma, largest, load, mul, multiply_block, splat, store
from baffle.kernels.winograd import NONE, activated


@compiled
def clear_margins(y: Any, B: int, H: int, W: int, C: int, pad: int, padded: Any) -> None:
    """Zeros around the images of y (B, PH, PW, C), flat, whose H × W pixels begin at (pad, pad)."""
    PH, PW = padded
    zero = splat(np.float32(0.0))
    for image in range(B):
        for i in range(PH):
            inside = pad <= i < pad + H
            j = 0
            while j < PW:
                if inside and j == pad:
                    j += W
                    continue
                for at in range(((image * PH + i) * PW + j) * C, ((image * PH + i) * PW + j + 1) * C, LANES):
                    store(y, at, zero)
                j += 1


@compiled
def pad_images(x: Any, shape: Any, pad: int, padded: Any, y: Any) -> None:
    """x (B, H, W, C) into the middle of y (B, PH, PW, C), zeros around; flat, C a multiple of 16."""
    B, H, W, C = shape
    PH, PW = padded
    clear_margins(y, B, H, W, C, pad, padded)
    for row in range(B * H):
        image, i = row // H, row % H
        source, target = row * W * C, ((image * PH + i + pad) * PW + pad) * C
        for at in range(0, W * C, LANES):
            store(y, target + at, load(x, source + at))


@compiled
def project(
    x: Any,
    first: int,
    pitch: Any,
    stride: int,
    w: Any,
    C: int,
    bias: Any,
    activation: int,
    pool: int,
    residual: Any,
    y: Any,
    shape: Any,
    pad: int,
    padded: Any,
) -> None:
    """y = maxpool(activation(x[:, ::stride, ::stride] · wᵀ + bias)) + residual, all flat.

    x holds pixels of C floats, the first at ``first``, its images and lines ``pitch`` floats apart; w is
    (out, C). y has ``shape`` (B, OH, OW, out) and lies from (pad, pad) on in images of ``padded`` pixels,
    zeros around. ``pool`` is 1, or 2 for 2×2. ``out`` is a multiple of 16; ``bias`` and ``residual`` (of
    the shape of y) may be empty.
    """
    B, high, wide, out = shape
    PH, PW = padded
    clear_margins(y, B, high, wide, out, pad, padded)
    right = np.empty(C * out, np.float32)
    for c in range(C):
        for o in range(out):
            right[c * out + o] = w[o * C + c]
    columns = wide * pool
    line = columns * out
    lines = np.empty(pool * line, np.float32)
    plain = pool == 1 and activation == NONE and bias.size == 0 and residual.size == 0
    for image in range(B):
        for row in range(high):
            if plain:  # the product goes straight into its place
                left = first + image * pitch[0] + row * stride * pitch[1]
                at = ((image * PH + row + pad) * PW + pad) * out
                _line(x, left, stride * C, right, y, at, columns, C, out)
                continue
            for p in range(pool):
                left = first + image * pitch[0] + (row * pool + p) * stride * pitch[1]
                _line(x, left, stride * C, right, lines, p * line, columns, C, out)
                for at in range(p * line, p * line + line, out):
                    for n in range(0, out, LANES):
                        lanes = load(lines, at + n)
                        if bias.size:
                            lanes = add(lanes, load(bias, n))
                        store(lines, at + n, activated(lanes, activation))
            for column in range(wide):
                where = ((image * PH + row + pad) * PW + column + pad) * out
                at = column * pool * out
                for n in range(0, out, LANES):
                    lanes = load(lines, at + n)
                    if pool == 2:
                        above = largest(lanes, load(lines, at + out + n))
                        below = largest(load(lines, line + at + n), load(lines, line + at + out + n))
                        lanes = largest(above, below)
                    if residual.size:
                        lanes = add(lanes, load(residual, ((image * high + row) * wide + column) * out + n))
                    store(y, where + n, lanes)


@compiled
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


@compiled
def average(x: Any, shape: Any, y: Any) -> None:
    """y (B, C) = the mean of x (B, H, W, C) over its pixels, flat. C a multiple of 16."""
    B, H, W, C = shape
    for image in range(B):
        start, end = image * H * W * C, (image + 1) * H * W * C
        for c in range(0, C, LANES):
            total = splat(np.float32(0.0))
            for at in range(start + c, end, C):
                total = add(total, load(x, at))
            store(y, image * C + c, mul(total, splat(np.float32(1.0 / (H * W)))))


@compiled
def group_norm(
    x: Any,
    shape: Any,
    groups: int,
    eps: float,
    weight: Any,
    bias: Any,
    activation: int,
    y: Any,
    pad: int,
    padded: Any,
) -> None:
    """y = activation(GroupNorm(x)), flat. x (B, H, W, C), C a multiple of 16; the affine part may be empty.

    y lies from (pad, pad) on in images of ``padded`` pixels, zeros around.
    """
    B, H, W, C = shape
    PH, PW = padded
    clear_margins(y, B, H, W, C, pad, padded)
    size, pixels = C // groups, H * W
    scale, shift = np.empty(C, np.float32), np.empty(C, np.float32)
    zero, minus = splat(np.float32(0.0)), splat(np.float32(-1.0))
    for image in range(B):
        start, end = image * pixels * C, (image + 1) * pixels * C
        # Sums and squares in one pass, less each channel's first pixel so that large means cancel nothing.
        for c in range(0, C, LANES):
            back = mul(load(x, start + c), minus)
            even, odd, even_squares, odd_squares = zero, zero, zero, zero
            for at in range(start + c, end, 2 * C):
                d = add(load(x, at), back)
                even, even_squares = add(even, d), fma(d, d, even_squares)
                if at + C < end:
                    d = add(load(x, at + C), back)
                    odd, odd_squares = add(odd, d), fma(d, d, odd_squares)
            store(shift, c, add(even, odd))
            store(scale, c, add(even_squares, odd_squares))
        for g in range(groups):
            total, squares = 0.0, 0.0
            for c in range(g * size, (g + 1) * size):
                first, own = np.float64(x[start + c]), np.float64(shift[c])
                total += own + pixels * first
                squares += scale[c] + 2.0 * first * own + pixels * first * first
            mean = total / (pixels * size)
            inverse = 1.0 / np.sqrt(max(squares / (pixels * size) - mean * mean, 0.0) + eps)
            for c in range(g * size, (g + 1) * size):
                own = inverse * weight[c] if weight.size else inverse
                scale[c] = own
                shift[c] = -mean * own + (bias[c] if bias.size else 0.0)
        for i in range(H):
            source, target = start + i * W * C, ((image * PH + i + pad) * PW + pad) * C
            for at in range(0, W * C, C):
                for c in range(0, C, LANES):
                    lanes = fma(load(x, source + at + c), load(scale, c), load(shift, c))
                    store(y, target + at + c, activated(lanes, activation))
