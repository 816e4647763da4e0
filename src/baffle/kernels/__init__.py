"""Compiled kernels: the same numbers, sooner. Optional (extra ``fast``), never needed.

Every module here imports numba, so nothing imports them before ``available()`` said yes. What a kernel
computes is defined elsewhere, in NumPy or torch, and tests hold it to that definition.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether the compiled kernels can be used: numba can be imported and BAFFLE_KERNELS is not ``0``."""
    if os.environ.get("BAFFLE_KERNELS", "1") == "0":
        return False
    try:
        import numba  # noqa: F401
    except Exception:  # not installed, or not made for this NumPy: numba raises many types
        return False
    return True


def compiled(function: Callable[..., Any]) -> Any:
    """Compiled at the first call, to run without the interpreter's lock, and kept on disk if possible."""
    from numba import njit

    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba found no place for its cache
        return njit(nogil=True, error_model="numpy")(function)
