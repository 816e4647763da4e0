"""Where weights lie while a measurement reads them: in an array, in a file, or packed in few bits.

A source has ``shape == (n,)`` and a length, and ``source[a:b]`` is float32 (b − a,): a fresh array, or a
view that nobody writes to. A NumPy array is one. What is read in slices is never in memory as a whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from baffle import durable
from baffle.errors import ConfigError, DataError
from baffle.perturbations import Layout

STORAGES = ("float32", "float16", "bfloat16", "int8")
_INFINITE = 0x7F80  # the exponent of bfloat16's infinities
CHUNK = 1 << 16  # parameters of a source that are read at once


class Source(Protocol):
    """A source of n weights."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n,)"""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice, /) -> NDArray[np.float32]:
        """float32 (b − a,) for ``source[a:b]``, not to be written to."""
        ...


def chunks(source: Source, size: int = CHUNK) -> Iterator[NDArray[np.float32]]:
    """The source in order, at most ``size`` parameters at a time."""
    for at in range(0, len(source), size):
        yield source[at : min(at + size, len(source))]


def bounds(places: slice, n: int) -> tuple[int, int]:
    """The ends of ``source[a:b]``; ConfigError for steps other than 1."""
    start, stop, step = places.indices(n)
    if step != 1:
        raise ConfigError("weights are read in slices without a step")
    return start, max(start, stop)


class StoredWeights:
    """n float32 values (little-endian) in a file, from byte ``offset`` on; read by ``os.pread``, not mapped.

    A mapped file's pages count as the process's memory, and show an error of the disk as a signal. Raises
    DataError where the file is missing, is shorter, or ends while it is read. Close it, or use it in a
    ``with`` block.
    """

    def __init__(self, path: str | PathLike[str], n: int, offset: int = 0) -> None:
        self.path = Path(path)
        self.shape = (n,)
        self._offset = offset
        if n < 0 or offset < 0:
            raise ConfigError(f"{n} weights from byte {offset}: neither may be negative")
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        size = os.fstat(self._file).st_size
        if size < offset + 4 * n:
            self.close()
            raise DataError(f"{self.path}: {size} bytes, {offset + 4 * n} are needed for {n} weights")

    @classmethod
    def write(cls, path: str | PathLike[str], chunks: Iterable[NDArray[np.float32]]) -> Self:
        """Writes the file whole or not at all (``durable.write``)."""
        n = 0

        def parts() -> Iterator[memoryview]:
            nonlocal n
            for chunk in chunks:
                n += len(chunk)
                yield np.ascontiguousarray(chunk, dtype="<f4").data

        durable.write(Path(path), parts())
        return cls(path, n)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: slice, /) -> NDArray[np.float32]:
        start, stop = bounds(places, len(self))
        values = np.empty(stop - start, "<f4")
        room, at = values.view(np.uint8).data, 0
        while at < len(room):
            got = os.preadv(self._file, [room[at:]], self._offset + 4 * start + at)
            if got == 0:
                raise DataError(f"{self.path}: ends before weight {stop}")
            at += got
        return values.astype(np.float32, copy=False)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()


class PackedWeights:
    """Weights in float16, bfloat16 or int8; a slice is float32 again.

    float16, bfloat16: every value, rounded to nearest, ties to even. int8: tensors of two or more
    dimensions by output channel (axis 0), w ≈ scale·q with scale = max|w|/127 and q = w/scale rounded to
    nearest, ties to even; vectors stay float32.
    """

    def __init__(
        self,
        layout: Layout,
        storage: str,
        parts: list[NDArray[Any]],
        scales: list[NDArray[np.float32]],
    ) -> None:
        self.layout, self.storage = layout, storage
        self.shape = (layout.n,)
        self._parts, self._scales = parts, scales

    @classmethod
    def pack(cls, source: Source, layout: Layout, storage: str) -> PackedWeights:
        """Reads the source once, a channel or ``CHUNK`` parameters at a time.

        Raises ConfigError for an unknown storage or a source of another length, DataError where a weight
        is not finite or does not fit into float16.
        """
        if storage not in STORAGES[1:]:
            raise ConfigError(f"unknown storage {storage!r}: use {', '.join(STORAGES)}")
        if source.shape != (layout.n,):
            raise ConfigError(f"weights have the shape {source.shape}, the layout has n = {layout.n}")
        parts: list[NDArray[Any]] = []
        scales: list[NDArray[np.float32]] = []
        for name, shape, offset, size in zip(
            layout.names, layout.shapes, layout.offsets, layout.sizes, strict=False
        ):
            int8 = storage == "int8" and len(shape) >= 2
            kind = np.dtype("int8" if int8 else {"float16": "f2", "bfloat16": "u2"}.get(storage, "f4"))
            part = np.empty(size, kind)
            rows = shape[0] if int8 else 0
            scale = np.ones(rows, np.float32)
            width = size // rows if rows else 1
            step = max(1, CHUNK // max(1, width)) * width if int8 else CHUNK
            for at in range(0, size, max(1, step)):
                values = source[offset + at : offset + min(at + step, size)]
                if not np.isfinite(values).all():
                    raise DataError(f"{name} holds a NaN or an infinity")
                packed = part[at : at + len(values)]
                if int8:
                    channels = values.reshape(-1, width)
                    own = np.abs(channels).max(axis=1) / np.float32(127)
                    # Where max|w|/127 underflows, so does every q·scale: zeros.
                    with np.errstate(divide="ignore", invalid="ignore"):
                        q = np.where(own[:, None] > 0, np.rint(channels / own[:, None]), 0)
                    packed[:] = np.clip(q, -127, 127).astype(np.int8).reshape(-1)
                    scale[at // width : at // width + len(own)] = own
                elif storage == "bfloat16":
                    packed[:] = to_bfloat16(values)
                    if ((packed & _INFINITE) == _INFINITE).any():
                        raise DataError(f"{name} holds a weight above bfloat16's range: use int8")
                else:
                    with np.errstate(over="ignore"):
                        packed[:] = values
                    if storage == "float16" and not np.isfinite(packed).all():
                        raise DataError(f"{name} holds a weight above float16's range: use bfloat16 or int8")
            parts.append(part)
            scales.append(scale)
        return cls(layout, storage, parts, scales)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed values and their scales."""
        return sum(part.nbytes for part in self._parts) + sum(
            scale.nbytes for part, scale in zip(self._parts, self._scales, strict=True) if part.dtype == "i1"
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: slice, /) -> NDArray[np.float32]:
        start, stop = bounds(places, len(self))
        out = np.empty(stop - start, np.float32)
        for offset, part, scale in zip(self.layout.offsets, self._parts, self._scales, strict=False):
            a, b = max(start, offset), min(stop, offset + len(part))
            if a >= b:
                continue
            chosen, into = part[a - offset : b - offset], out[a - start : b - start]
            if part.dtype == "u2":
                into[:] = from_bfloat16(chosen)
            else:
                into[:] = chosen
            if part.dtype == "i1":
                self._rescale(into, scale, a - offset, len(part) // len(scale))
        return out

    @staticmethod
    def _rescale(values: NDArray[np.float32], scale: NDArray[np.float32], start: int, width: int) -> None:
        """Multiplies values from ``start`` of a tensor on with their channels' scales, in place."""
        stop, first = start + len(values), -(-start // width)
        whole = stop // width
        if first > whole:  # inside one channel
            values *= scale[whole]
            return
        values[: first * width - start] *= scale[first - 1] if first else np.float32(1)
        values[first * width - start : whole * width - start].reshape(-1, width)[:] *= scale[
            first:whole, None
        ]
        if stop > whole * width:
            values[whole * width - start :] *= scale[whole]


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to nearest, ties to even. For numbers, not for NaN."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    halves: NDArray[np.uint16] = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    return halves


def from_bfloat16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def packed_bytes(layout: Layout, storage: str) -> int:
    """What ``PackedWeights.pack`` of this layout takes."""
    if storage != "int8":
        return layout.n * {"float32": 4}.get(storage, 2)
    return sum(
        math.prod(shape) + 4 * shape[0] if len(shape) >= 2 else 4 * math.prod(shape)
        for shape in layout.shapes
    )
