"""Compiled kernels: the same numbers, sooner. Optional (extra ``fast``), never needed.

Every module here imports numba, so nothing imports them before ``available()`` said yes. What a kernel
computes is defined elsewhere, in NumPy or torch, and tests hold it to that definition.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether the compiled kernels can be used: numba is installed and BAFFLE_KERNELS is not ``0``."""
    return os.environ.get("BAFFLE_KERNELS", "1") != "0" and importlib.util.find_spec("numba") is not None
