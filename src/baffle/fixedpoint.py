"""Reals as integers modulo 2^m: what sums must be made of where nobody may see the addends.

    v  →  round(v · 2^f)  in  Z_2^m,        |v| ≤ limit

A sum in the ring is the exact sum of the integers as long as it stays inside ±(2^(m−1) − 1). The budget,
in bits, of a weighted sum:

    log2(addends) + log2(largest weight) + log2(limit) + f + 1  <  m

`FixedPoint.check` holds a round to it, exactly and in integers, before anything is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from baffle.errors import ConfigError

_MOST_FRACTION_BITS = 32
_FEWEST_FRACTION_BITS = 8


@dataclass(frozen=True)
class FixedPoint:
    """How a real number stands in the ring Z_2^m, m = ``ring_bits``, with f = ``fraction_bits``.

    For |v| ≤ limit, |v − encode(v)/2^f| ≤ 2^-(f+1); larger values saturate. A weighted mean of such
    values is therefore off by at most 2^-(f+1), whatever the weights and however many the addends.
    The noise that float32 losses leave on a slope is far above a step of 2^-32; a test holds that.

    Raises ConfigError for a ring other than 32 or 64 bits, f < 0, a limit that is not positive and
    finite, or one whose integer is 0 or does not fit the ring alone.
    """

    ring_bits: int = 64
    fraction_bits: int = 32
    limit: float = 1024.0

    def __post_init__(self) -> None:
        if self.ring_bits not in (32, 64):
            raise ConfigError(f"a ring of {self.ring_bits} bits: there are rings of 32 and of 64")
        if not 0 <= self.fraction_bits < self.ring_bits:
            raise ConfigError(
                f"{self.fraction_bits} fraction bits: a ring of {self.ring_bits} bits takes "
                f"0 to {self.ring_bits - 1}"
            )
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise ConfigError(f"limit = {self.limit}: the largest value that fits is positive and finite")
        if self.largest < 1:
            raise ConfigError(
                f"limit = {self.limit} rounds to 0 with {self.fraction_bits} fraction bits: take more of them"
            )
        if self.largest >= 2 ** (self.ring_bits - 1):
            raise ConfigError(
                f"limit = {self.limit} with {self.fraction_bits} fraction bits does not fit "
                f"{self.ring_bits} bits: take a smaller limit or fewer fraction bits"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint32 or uint64: what a residue is stored as."""
        return np.dtype(np.uint32 if self.ring_bits == 32 else np.uint64)

    @property
    def largest(self) -> int:
        """The largest integer that `encode` gives: limit · 2^f, rounded half to even."""
        return round(Fraction(self.limit) * (1 << self.fraction_bits))

    def check(self, addends: int, largest_weight: int) -> None:
        """That no sum Σ_c N_c · encode(v_c) of so many addends, N_c ≤ largest_weight, leaves the ring.

        Then no product N_c · encode(v_c) leaves an int64 either, and Σ_c N_c fits too. ConfigError where
        one could: it says how many bits are missing.
        """
        if addends < 1 or largest_weight < 1:
            raise ConfigError(
                f"{addends} addends with weights up to {largest_weight}: at least 1 of each is needed"
            )
        most = addends * largest_weight * self.largest
        if most >= 2 ** (self.ring_bits - 1):
            missing = most.bit_length() - (self.ring_bits - 1)
            raise ConfigError(
                f"{addends} addends × weight {largest_weight} × limit {self.limit:g} with "
                f"{self.fraction_bits} fraction bits overflow a ring of {self.ring_bits} bits by "
                f"{missing} bit{'s' if missing > 1 else ''}: take fewer fraction bits, a smaller limit, "
                f"smaller weights{' or a ring of 64 bits' if self.ring_bits == 32 else ''}"
            )

    @classmethod
    def fitting(cls, addends: int, largest_weight: int, limit: float, ring_bits: int = 64) -> FixedPoint:
        """The one with the most fraction bits, at most 32, whose `check` passes.

        ConfigError where fewer than 8 would be left: a step of 2^-8 is no longer small beside a slope.
        """
        most = min(_MOST_FRACTION_BITS, ring_bits - 1)
        for fraction_bits in range(most, -1, -1):
            try:
                found = cls(ring_bits, fraction_bits, limit)
                found.check(addends, largest_weight)
            except ConfigError as error:
                refused = error
                continue
            if fraction_bits >= _FEWEST_FRACTION_BITS:
                return found
            raise ConfigError(
                f"{addends} addends × weight {largest_weight} × limit {limit:g} leave {fraction_bits} "
                f"fraction bits in a ring of {ring_bits} bits, and {_FEWEST_FRACTION_BITS} are needed: take "
                f"a smaller limit, smaller weights{' or a ring of 64 bits' if ring_bits == 32 else ''}"
            )
        raise refused

    def encode(self, values: ArrayLike) -> NDArray[np.int64]:
        """round(v · 2^f), half to even, saturating at ±`largest`; of any shape.

        ConfigError for NaN and ±inf.
        """
        wide = np.asarray(values, dtype=np.float64)
        if not np.isfinite(wide).all():
            raise ConfigError("values to encode hold NaN or an infinity")
        # Clipping first keeps ldexp finite, and every rounded value below 2^63.
        steps = np.rint(np.ldexp(np.clip(wide, -self.limit, self.limit), self.fraction_bits))
        return np.asarray(steps, dtype=np.int64)

    def residues(self, integers: ArrayLike) -> NDArray[Any]:
        """Integers modulo 2^m, as `dtype`; of any shape. ConfigError for what is not of an integer type."""
        array = np.asarray(integers)
        if array.dtype.kind not in "iu":
            raise ConfigError(f"{array.dtype} are no integers of at most 64 bits")
        return array.astype(self.dtype)

    def integers(self, residues: NDArray[Any]) -> NDArray[np.int64]:
        """The representatives in [−2^(m−1), 2^(m−1)). ConfigError for residues of another ring's dtype."""
        array = np.asarray(residues)
        if array.dtype != self.dtype:
            raise ConfigError(f"residues of type {array.dtype}: this ring's are {self.dtype}")
        return array.astype(f"int{self.ring_bits}").astype(np.int64)

    def decode(self, integers: ArrayLike) -> NDArray[np.float64]:
        """integers / 2^f; of any shape. Exact up to 2^53, rounded to float64 beyond."""
        return np.asarray(np.ldexp(np.asarray(integers).astype(np.float64), -self.fraction_bits))
