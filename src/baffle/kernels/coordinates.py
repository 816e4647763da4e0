"""What one changed channel does to a mean over the image behind it: float32, one thread a call.

of_sums       the channel itself, through an activation: its mean
of_products   the channel through a convolution and an activation: the means of all that it reaches

Both add up changes of activations, not activations: what is small is rounded as what is small.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from baffle.kernels import compiled
from baffle.kernels.simd import LANES, add, fma, load, splat, store
from baffle.kernels.winograd import activated


@compiled
def _change(lanes: Any, activation: int, active: Any, at: int) -> Any:
    return fma(load(active, at), splat(np.float32(-1.0)), activated(lanes, activation))


@compiled
def _total(lanes: Any, room: Any) -> Any:
    store(room, 0, lanes)
    total = np.float32(0.0)
    for i in range(LANES):
        total += room[i]
    return total


@compiled
def of_sums(
    sums: Any,
    active: Any,
    seen: Any,
    shape: Any,
    step: float,
    activation: int,
    begin: int,
    end: int,
    out: Any,
) -> None:
    """out[o, r, b] = mean over p of act(sums[o, b, p] + step·seen[r, b, p]) − active[o, b, p], for b in
    [begin, end).

    All flat; ``shape`` is (o, r, b, p), p a multiple of 16; ``active`` is act(sums).
    """
    channels, R, B, P = shape
    size, room = splat(np.float32(step)), np.empty(LANES, np.float32)
    for b in range(begin, end):
        for o in range(channels):  # all that a sample's inputs are of use for, while they lie in the cache
            at = (o * B + b) * P
            for r in range(R):
                row = (r * B + b) * P
                total = splat(np.float32(0.0))
                for p in range(0, P, LANES):
                    moved = fma(load(seen, row + p), size, load(sums, at + p))
                    total = add(total, _change(moved, activation, active, at + p))
                out[(o * R + r) * B + b] = _total(total, room) / np.float32(P)


@compiled
def of_products(
    change: Any,
    kernel: Any,
    sums: Any,
    active: Any,
    shape: Any,
    taps: int,
    activation: int,
    begin: int,
    end: int,
    out: Any,
) -> None:
    """out[r, b, c] = mean over pixels of act(sums[b, c] + kernel[c] ∗ change[r, b]) − active[b, c], r in
    [begin, end).

    All flat: change (r, b, H, W), kernel (c, taps·taps), taps odd, zeros around the image, sums and
    active = act(sums) (b, c, H, W). ``shape`` is (b, c, H, W), c even, H a multiple of 8 and W of 16.
    """
    B, C, H, W = shape
    pad, pixels, wide = taps // 2, H * W, W + taps - 1
    padded = np.zeros((H + taps - 1) * wide, np.float32)
    room = np.empty(LANES, np.float32)
    for r in range(begin, end):
        for b in range(B):
            for i in range(H):
                for j in range(0, W, LANES):
                    store(padded, (i + pad) * wide + pad + j, load(change, ((r * B + b) * H + i) * W + j))
            for c in range(0, C, 2):
                first, second = splat(np.float32(0.0)), splat(np.float32(0.0))
                for i in range(0, H, 8):
                    for j in range(0, W, LANES):
                        at = ((b * C + c) * H + i) * W + j
                        to = at + pixels  # the next channel's
                        # Eight lines of two channels that stay in registers, over all taps.
                        s0, s1 = load(sums, at), load(sums, at + W)
                        s2, s3 = load(sums, at + 2 * W), load(sums, at + 3 * W)
                        s4, s5 = load(sums, at + 4 * W), load(sums, at + 5 * W)
                        s6, s7 = load(sums, at + 6 * W), load(sums, at + 7 * W)
                        t0, t1 = load(sums, to), load(sums, to + W)
                        t2, t3 = load(sums, to + 2 * W), load(sums, to + 3 * W)
                        t4, t5 = load(sums, to + 4 * W), load(sums, to + 5 * W)
                        t6, t7 = load(sums, to + 6 * W), load(sums, to + 7 * W)
                        for u in range(taps):
                            for v in range(taps):
                                one = splat(kernel[(c * taps + u) * taps + v])
                                two = splat(kernel[((c + 1) * taps + u) * taps + v])
                                place = (i + u) * wide + j + v
                                x = load(padded, place)
                                s0, t0 = fma(x, one, s0), fma(x, two, t0)
                                x = load(padded, place + wide)
                                s1, t1 = fma(x, one, s1), fma(x, two, t1)
                                x = load(padded, place + 2 * wide)
                                s2, t2 = fma(x, one, s2), fma(x, two, t2)
                                x = load(padded, place + 3 * wide)
                                s3, t3 = fma(x, one, s3), fma(x, two, t3)
                                x = load(padded, place + 4 * wide)
                                s4, t4 = fma(x, one, s4), fma(x, two, t4)
                                x = load(padded, place + 5 * wide)
                                s5, t5 = fma(x, one, s5), fma(x, two, t5)
                                x = load(padded, place + 6 * wide)
                                s6, t6 = fma(x, one, s6), fma(x, two, t6)
                                x = load(padded, place + 7 * wide)
                                s7, t7 = fma(x, one, s7), fma(x, two, t7)
                        first = add(first, _change(s0, activation, active, at))
                        first = add(first, _change(s1, activation, active, at + W))
                        first = add(first, _change(s2, activation, active, at + 2 * W))
                        first = add(first, _change(s3, activation, active, at + 3 * W))
                        first = add(first, _change(s4, activation, active, at + 4 * W))
                        first = add(first, _change(s5, activation, active, at + 5 * W))
                        first = add(first, _change(s6, activation, active, at + 6 * W))
                        first = add(first, _change(s7, activation, active, at + 7 * W))
                        second = add(second, _change(t0, activation, active, to))
                        second = add(second, _change(t1, activation, active, to + W))
                        second = add(second, _change(t2, activation, active, to + 2 * W))
                        second = add(second, _change(t3, activation, active, to + 3 * W))
                        second = add(second, _change(t4, activation, active, to + 4 * W))
                        second = add(second, _change(t5, activation, active, to + 5 * W))
                        second = add(second, _change(t6, activation, active, to + 6 * W))
                        second = add(second, _change(t7, activation, active, to + 7 * W))
                out[(r * B + b) * C + c] = _total(first, room) / np.float32(pixels)
                out[(r * B + b) * C + c + 1] = _total(second, room) / np.float32(pixels)
