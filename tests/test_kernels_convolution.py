"""Compiled convolutions, projections and norms against exact arithmetic and float64 torch."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("numba")

from baffle.kernels import layers, winograd
from baffle.runtimes.steps import Memory

EMPTY = np.empty(0, dtype=np.float32)
# Roundings of 2⁻²⁴ relative to the largest output. A transform's rows sum up to 10 in absolute value, in
# each of two dimensions before and two behind a product: some hundreds of roundings at most, some tens seen.
ROUNDING = 400 * 2.0**-24


def floats(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def nchw(x):
    return torch.from_numpy(x).double().permute(0, 3, 1, 2)


def close(got, want):
    want = want.permute(0, 2, 3, 1).numpy()
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=ROUNDING * np.abs(want).max())


ACTIVATIONS = {
    winograd.NONE: lambda x: x,
    winograd.RELU: F.relu,
    winograd.HARDSWISH: F.hardswish,
}


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_the_transforms_are_a_convolution_exactly(taps):
    output, kernel, data = winograd.minimal_filter(4, taps)
    rng = np.random.default_rng(taps)
    g = [Fraction(int(x)) for x in rng.integers(-9, 10, taps)]
    d = [Fraction(int(x)) for x in rng.integers(-9, 10, 4 + taps - 1)]

    def times(matrix, vector):
        return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]

    products = [a * b for a, b in zip(times(kernel, g), times(data, d), strict=True)]
    assert times(output, products) == [sum(g[j] * d[i + j] for j in range(taps)) for i in range(4)]


def test_the_transforms_of_3_taps_are_the_published_ones():
    """Bᵀ of F(4, 3), Lavin & Gray, arXiv:1509.09308, section 4.3."""
    _, _, data = winograd.minimal_filter(4, 3)
    assert data == [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (5, 1), (3, 2)])
@pytest.mark.parametrize(
    ("B", "H", "W", "C", "out", "pad"),
    [(3, 16, 16, 16, 64, 1), (2, 9, 7, 32, 16, 2), (1, 5, 13, 48, 48, 0), (5, 6, 6, 16, 32, 1)],
)
def test_convolutions(size, stride, B, H, W, C, out, pad):
    rng = np.random.default_rng(size * 100 + H)
    x, w, bias = floats(rng, B, H, W, C), floats(rng, out, C, size, size), floats(rng, out)
    high, wide = winograd.padding(H, W, size, stride, pad)
    padded = np.zeros((B, high, wide, C), np.float32)
    padded[:, pad : pad + H, pad : pad + W] = x
    memory = Memory()
    for activation, act in ACTIVATIONS.items():
        want = act(
            F.conv2d(nchw(x), torch.from_numpy(w).double(), torch.from_numpy(bias).double(), stride, pad)
        )
        guarded = np.full(want.numel() + 32, np.nan, np.float32)  # nothing is written beside the result
        y = guarded[16:-16].reshape(B, *want.shape[2:], out)
        residual = floats(rng, *y.shape)
        winograd.convolve(
            padded, w.reshape(-1), size, stride, bias, activation, residual.reshape(-1), y, memory.scratch
        )
        close(y, want + nchw(residual))
        assert np.isnan(guarded[:16]).all()
        assert np.isnan(guarded[-16:]).all()
    winograd.convolve(padded, w.reshape(-1), size, stride, EMPTY, 0, EMPTY, y, memory.scratch)
    close(y, F.conv2d(nchw(x), torch.from_numpy(w).double(), None, stride, pad))


def test_a_tile_does_not_depend_on_the_tiles_beside_it():
    """One image alone has the bits that it has in a batch."""
    rng = np.random.default_rng(5)
    x, w = floats(rng, 40, 10, 10, 16), floats(rng, 32, 16, 3, 3)
    whole, alone = np.empty((40, 8, 8, 32), np.float32), np.empty((1, 8, 8, 32), np.float32)
    rest = w.reshape(-1), 3, 1, EMPTY, winograd.NONE, EMPTY
    winograd.convolve(x, *rest, whole, Memory().scratch)
    winograd.convolve(x[17:18], *rest, alone, Memory().scratch)
    np.testing.assert_array_equal(alone[0], whole[17])


@pytest.mark.parametrize(("stride", "pool"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("out", [16, 32, 48])
def test_projections(stride, pool, out):
    rng = np.random.default_rng(out)
    B, H, W, C, margin = 2, 9, 15, 7, 3
    x, w, bias = floats(rng, B, H, W, C), floats(rng, out, C), floats(rng, out)
    want = F.hardswish(
        F.conv2d(
            nchw(x), torch.from_numpy(w).double()[:, :, None, None], torch.from_numpy(bias).double(), stride
        )
    )
    want = F.max_pool2d(want, 2) if pool == 2 else want
    shape = (B, *want.shape[2:], out)
    residual = floats(rng, *shape)
    y = np.full((B, shape[1] + 2 * margin, shape[2] + 2 * margin + 1, out), np.nan, np.float32)
    layers.project(
        x.reshape(-1), 0, (H * W * C, W * C), stride, w.reshape(-1), C, bias, winograd.HARDSWISH, pool,
        residual.reshape(-1), y.reshape(-1), shape, margin, y.shape[1:3],
    )  # fmt: skip
    inner = y[:, margin : margin + shape[1], margin : margin + shape[2]]
    close(inner, want + nchw(residual))
    inner[:] = 0
    assert not y.any()  # zeros around, everywhere


@pytest.mark.parametrize("C", [16, 48])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("mean", [0.0, 2.0, 100.0])
def test_group_norms(C, affine, mean):
    """A large mean would cancel what sums of squares about zero hold of the variance."""
    rng = np.random.default_rng(C)
    x = floats(rng, 3, 7, 5, C) * 3 + np.float32(mean)
    weight, bias = (floats(rng, C), floats(rng, C)) if affine else (EMPTY, EMPTY)
    y = np.full((3, 9, 10, C), np.nan, np.float32)
    layers.group_norm(x.reshape(-1), x.shape, 4, 1e-5, weight, bias, winograd.RELU, y.reshape(-1), 1, (9, 10))
    own = (torch.from_numpy(weight).double(), torch.from_numpy(bias).double()) if affine else (None, None)
    close(y[:, 1:8, 1:6], F.relu(F.group_norm(nchw(x), 4, *own, eps=1e-5)))
    y[:, 1:8, 1:6] = 0
    assert not y.any()


def test_averages_and_margins():
    rng = np.random.default_rng(0)
    x = floats(rng, 3, 5, 4, 32)
    y = np.empty((3, 32), np.float32)
    layers.average(x.reshape(-1), x.shape, y.reshape(-1))
    np.testing.assert_allclose(y, x.astype(np.float64).mean((1, 2)), rtol=0, atol=ROUNDING)
    padded = np.full((3, 9, 7, 32), np.nan, np.float32)
    layers.pad_images(x.reshape(-1), x.shape, 2, (9, 7), padded.reshape(-1))
    np.testing.assert_array_equal(padded, np.pad(x, ((0, 0), (2, 2), (2, 1), (0, 0))))
