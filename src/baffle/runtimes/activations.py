"""Activations in place, as NumPy does them quickest, and the rounding of narrower arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.runtimes.graph import Node

Array = NDArray[Any]
InPlace = Callable[[Array, Array], None]  # f(x, t): x in place, by a temporary t of the same shape


def _clip(x: Array, low: float, high: float) -> None:
    # `clip` is several times quicker than `maximum`.
    np.clip(x, x.dtype.type(low), x.dtype.type(high), out=x)


def _relu(x: Array, t: Array) -> None:
    _clip(x, 0, math.inf)


def _relu6(x: Array, t: Array) -> None:
    _clip(x, 0, 6)


def _hardsigmoid(x: Array, t: Array) -> None:
    x += x.dtype.type(3)
    _clip(x, 0, 6)
    x *= x.dtype.type(1 / 6)


def _hardswish(x: Array, t: Array) -> None:
    np.add(x, x.dtype.type(3), out=t)
    _clip(t, 0, 6)
    t *= x.dtype.type(1 / 6)
    x *= t


def _sigmoid(x: Array, t: Array) -> None:
    # exp of a negative number alone: no overflow, and no NaN from 1/inf.
    np.abs(x, out=t)
    np.negative(t, out=t)
    np.exp(t, out=t)
    negative = x < 0
    np.add(t, x.dtype.type(1), out=x)
    np.copyto(t, x.dtype.type(1), where=~negative)
    np.divide(t, x, out=x)


def _silu(x: Array, t: Array) -> None:
    kept = x.copy()
    _sigmoid(x, t)
    x *= kept


def _tanh(x: Array, t: Array) -> None:
    np.tanh(x, out=x)


def _elu(x: Array, t: Array) -> None:
    np.minimum(x, x.dtype.type(0), out=t)
    np.expm1(t, out=t)
    _clip(x, 0, math.inf)
    x += t


_ALPHA, _LAMBDA = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _selu(x: Array, t: Array) -> None:
    np.minimum(x, x.dtype.type(0), out=t)
    np.expm1(t, out=t)
    t *= x.dtype.type(_ALPHA)
    _clip(x, 0, math.inf)
    x += t
    x *= x.dtype.type(_LAMBDA)


_ERF_STEP = 1 / 128
_erf_table: list[NDArray[np.float64]] = []


def erf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error function to 1e-10: cubic pieces between exact values and slopes, 1/128 apart."""
    if not _erf_table:
        knots = np.arange(0, 6 + 2 * _ERF_STEP, _ERF_STEP)
        _erf_table.append(np.array([math.erf(knot) for knot in knots.tolist()]))
        _erf_table.append(2 / math.sqrt(math.pi) * np.exp(-knots * knots) * _ERF_STEP)
    values, slopes = _erf_table
    place = np.minimum(np.abs(x), 6.0) / _ERF_STEP
    with np.errstate(invalid="ignore"):  # NaN: any piece will do, u is NaN
        at = np.where(np.isnan(place), 0, place).astype(np.intp)
    u = place - at
    y0, y1, s0, s1 = values[at], values[at + 1], slopes[at], slopes[at + 1]
    y = y0 + u * (s0 + u * (3 * (y1 - y0) - 2 * s0 - s1 + u * (2 * (y0 - y1) + s0 + s1)))
    return np.copysign(y, x)


def _gelu(x: Array, t: Array) -> None:
    np.multiply(x, 0.5 * (1 + erf(x.astype(np.float64) * math.sqrt(0.5))), out=x, casting="same_kind")


def _leaky(slope: float) -> InPlace:
    def leaky(x: Array, t: Array) -> None:
        np.minimum(x, x.dtype.type(0), out=t)
        t *= x.dtype.type(slope)
        _clip(x, 0, math.inf)
        x += t

    return leaky


_ACTIVATIONS: dict[str, InPlace] = {
    "relu": _relu,
    "relu6": _relu6,
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "gelu": _gelu,
    "selu": _selu,
    "elu": _elu,
    "tanh": _tanh,
}


def activation(node: Node) -> InPlace | None:
    """``f(x, t)`` in place, t being a temporary of the same shape; None for the identity."""
    kind = node.setting("kind")
    if kind == "leaky_relu":
        return _leaky(node.setting("slope"))
    return _ACTIVATIONS.get(kind)


# -- rounding ------------------------------------------------------------------------------------------


def _to_float16(x: Array, t: Array) -> None:
    with np.errstate(over="ignore"):  # too large is infinite there, too, and the loss says so
        half = t.reshape(-1).view(np.float16)[: x.size].reshape(x.shape)
        np.copyto(half, x, casting="same_kind")
    np.copyto(x, half)


def _to_bfloat16(x: Array, t: Array) -> None:
    bits, odd = x.view(np.uint32), t.view(np.uint32)
    np.right_shift(bits, np.uint32(16), out=odd)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    bits += odd
    bits &= np.uint32(0xFFFF0000)


def rounding(arithmetic: str) -> InPlace | None:
    """Rounds float32 values to those of a narrower type, to nearest, ties to even; None: nothing to do."""
    return {"float16": _to_float16, "bfloat16": _to_bfloat16}.get(arithmetic)
