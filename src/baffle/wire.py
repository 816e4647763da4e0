"""Bytes of messages: what all of their kinds have in common (``docs/spec.md``, section 6)."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError, MessageError

MAGIC = b"BFFL"
VERSION = 1
DIGEST_BYTES = 32


class Cursor:
    """Takes bytes apart from the front. Raises MessageError where they end too soon, or do not end."""

    def __init__(self, data: bytes | memoryview, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, size: int) -> bytes:
        return bytes(self.view(size))

    def view(self, size: int) -> bytes | memoryview:
        """As ``take``, without a copy where the data are a memoryview."""
        if self.at + size > len(self.data):
            raise MessageError(f"message cut short at byte {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def integer(self, form: str) -> int:
        return int(self.unpack(form)[0])

    def real(self) -> float:
        return float(self.unpack("d")[0])

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        """Numbers in this machine's byte order: a copy, since in a message they lie where they fall.

        Of a read-only memoryview in which they happen to lie well, the numbers themselves.
        """
        form, start = np.dtype(dtype), self.at
        if start + form.itemsize * count > len(self.data):
            raise MessageError(f"message cut short at byte {len(self.data)}")
        self.at += form.itemsize * count
        found = np.frombuffer(self.data, form, count, start)
        shared = isinstance(self.data, memoryview) and self.data.readonly and found.flags.aligned
        return found.astype(form.newbyteorder("="), copy=not shared)

    def end(self) -> None:
        if self.at != len(self.data):
            raise MessageError(f"{len(self.data) - self.at} bytes too many behind the message")


class Reader(Cursor):
    """Takes a message of one kind apart. Raises MessageError for what is none."""

    def __init__(self, data: bytes | memoryview, kind: int) -> None:
        start = header(kind)
        if data[:4] != MAGIC:
            raise MessageError("these bytes are no BAFFLE message")
        if data[:6] != start[: len(data[:6])] or len(data) < 6:
            raise MessageError(f"expected a message of version {VERSION}, kind {kind}, not {list(data[4:6])}")
        super().__init__(data, 6)


def header(kind: int) -> bytes:
    """The first 6 bytes of a message."""
    return MAGIC + bytes([VERSION, kind])


T = TypeVar("T")


def choice(options: tuple[T, ...], index: int, what: str) -> T:
    """The option with that number. Raises MessageError where there is none."""
    if index >= len(options):
        raise MessageError(f"unknown {what} number {index}")
    return options[index]


def check_row(values: NDArray[Any], what: str) -> None:
    """Raises ConfigError unless ``values`` is a row of finite numbers."""
    if values.ndim != 1 or not 1 <= len(values) < 1 << 32:
        raise ConfigError(f"{what} is a row of at least 1 and fewer than 2^32 numbers, not {values.shape}")
    if not np.isfinite(values).all():
        raise ConfigError(f"{what} holds a number that is not finite")


def check_u64(value: int, least: int, what: str) -> None:
    """Raises ConfigError for an integer outside [least, 2⁶⁴)."""
    if not least <= value < 1 << 64:
        raise ConfigError(f"{what} {value}: it lies in [{least}, 2^64)")


@contextlib.contextmanager
def decoding(what: str) -> Iterator[None]:
    """A message whose constructor refuses what was decoded is no message."""
    try:
        yield
    except (ConfigError, UnicodeDecodeError) as error:
        raise MessageError(f"{what} that cannot be: {error}") from error
