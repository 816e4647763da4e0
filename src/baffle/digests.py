"""SHA-256 without OpenSSL: `hashlib` loads all of that, 3.5 MB of a device's memory, for one function.

The interpreter has a small module of its own, which `random` of the standard library takes for that reason.
OpenSSL's is five times as fast, so where `hashlib` is in memory anyway, as it is beside torch, it is taken.
"""

from __future__ import annotations

import sys
from typing import Protocol

try:
    from _sha2 import sha256 as _small  # type: ignore[import-not-found]  # Python 3.12 and later
except ImportError:
    try:
        from _sha256 import sha256 as _small  # type: ignore[import-not-found]
    except ImportError:  # a Python that was built without
        from hashlib import sha256 as _small

Bytes = bytes | bytearray | memoryview


class Hash(Protocol):
    """What is hashed so far."""

    def update(self, data: Bytes, /) -> None: ...

    def digest(self) -> bytes: ...

    def hexdigest(self) -> str: ...


def sha256(data: Bytes = b"") -> Hash:
    """A SHA-256 that has taken ``data``."""
    if "hashlib" in sys.modules:
        import hashlib

        return hashlib.sha256(data)
    small: Hash = _small(data)
    return small
