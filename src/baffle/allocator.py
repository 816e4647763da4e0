"""The C library's allocator, told to give back what is freed: large arrays are most of a device's memory.

glibc raises the size from which a block is mapped by itself, up to 32 MB, whenever such a block is freed.
From then on arrays of that size lie on the heap, where one small block above them keeps them in the process
after they are freed: a few megabytes in a round, as many as a model in some.
"""

from __future__ import annotations

import contextlib

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def return_large_blocks(least: int = 4 << 20) -> None:
    """From ``least`` bytes on, a block is mapped by itself, and unmapped as soon as it is freed.

    For programs, at their start: it is the whole process's. Elsewhere than on glibc nothing happens.
    """
    import ctypes  # NumPy has it in memory anyway

    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, least)
