"""What the wire carries under secure aggregation: one client's vector under a mask."""

from __future__ import annotations

import numpy as np
from common import Floats
from numpy.typing import NDArray

from baffle.fixedpoint import FixedPoint
from baffle.secagg.primitives import KEY_BYTES, mask, random_bytes

FIXED_POINT = FixedPoint()


def masked_upload(vector: Floats) -> NDArray[np.uint64]:
    """``vector`` (K,) in the protocol's fixed point and under its mask stream, from a fresh secret key.

    Between honest clients at least one such mask stays unknown to everybody else.
    """
    plain = FIXED_POINT.residues(FIXED_POINT.encode(vector))
    masked: NDArray[np.uint64] = plain + mask(random_bytes(KEY_BYTES), len(vector), FIXED_POINT.dtype)
    return masked


def as_reals(masked: NDArray[np.uint64]) -> Floats:
    """What the ring's elements would mean if there were no mask."""
    return FIXED_POINT.decode(FIXED_POINT.integers(masked))
