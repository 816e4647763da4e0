"""The stream: (seed, round, direction k) → 32-bit words, any slice of them alone, the same bits anywhere.

Normative definition, version 1 (all integers little-endian):

1. ``h = SHA-256("baffle stream v1" ‖ seed (32 bytes) ‖ round (u64))``, cut into eight u32 words h0…h7.
2. Word i of direction k is lane ``i mod 4`` of Philox4x32-10 (Salmon et al., "Parallel random numbers:
   as easy as 1, 2, 3", SC'11) with counter ``(i div 4, k, h2, h3)`` and key ``(h0, h1)``.

So k < 2³² directions of 2³⁴ words each, 128 bits of the hash in use, and no state: word i costs the
same alone as in a row. Philox was chosen because it is published with known-answer vectors, needs only
32-bit multiplication (the same code runs on NumPy and torch, on CPUs and GPUs, and in 20 lines of C),
and is the generator that GPU toolchains already have as an instruction sequence. Without state it also runs
as wide as a processor is: each vector lane, core or GPU thread takes its own blocks, where a generator with
state makes one word after the other. A cheaper one would gain little, for the table look-up of a Gaussian
value takes longer than its half-word; one that uses AES instructions is slow where there are none.

The words are public coins. They are not secret, and nothing that must be secret may be made from them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.digests import sha256
from baffle.errors import ConfigError

SEED_BYTES = 32
_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

Lanes = tuple[Any, Any, Any, Any]


class Arrays(Protocol):
    """The few array operations that directions are made with; one object for each array library."""

    def arange(self, start: int, stop: int) -> Any:
        """int64 (stop − start,)."""

    def halves(self, lanes: Lanes) -> Any:
        """Lanes (..., m) → the half-words of m blocks in order, as indices (..., 8m); −j means 2¹⁶ − j."""

    def bits(self, lanes: Lanes) -> Any:
        """Lanes (..., m) → the bits of m blocks in order (..., 128m), the lowest of a word first."""

    def constant(self, name: str, values: NDArray[Any]) -> Any:
        """``values`` as this library's array; kept under ``name``: a table, always the same one."""

    def scalar(self, value: float) -> Any:
        """``value`` as a float64 array (1,)."""

    def doubles(self, values: NDArray[np.float64]) -> Any:
        """``values`` as this library's float64 array."""

    def float32(self, array: Any) -> Any:
        """The array rounded to float32."""

    def float64(self, array: Any) -> Any:
        """The array in float64."""

    def empty(self, shape: tuple[int, ...]) -> Any:
        """An uninitialised float32 array."""


class NumpyArrays:
    """The normative one."""

    def arange(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(start, stop, dtype=np.int64)

    def words(self, lanes: Lanes) -> NDArray[np.uint32]:
        """Lanes (..., m) of m blocks → their words in order, little-endian (..., 4m)."""
        words = np.empty((*lanes[0].shape, 4), dtype="<u4")
        for j, lane in enumerate(lanes):
            words[..., j] = lane
        return words.reshape(*lanes[0].shape[:-1], -1)

    def halves(self, lanes: Lanes) -> NDArray[np.uint16]:
        return self.words(lanes).view("<u2")

    def bits(self, lanes: Lanes) -> NDArray[np.uint8]:
        return np.unpackbits(self.words(lanes).view(np.uint8), axis=-1, bitorder="little")

    def constant(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        return values

    def scalar(self, value: float) -> NDArray[np.float64]:
        return np.array([value])

    def doubles(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values

    def float32(self, array: Any) -> Any:
        return array.astype(np.float32, copy=False)

    def float64(self, array: Any) -> Any:
        return array.astype(np.float64, copy=False)

    def empty(self, shape: tuple[int, ...]) -> Any:
        return np.empty(shape, dtype=np.float32)


NUMPY = NumpyArrays()


def philox4x32(counter: Lanes, key: tuple[int, int]) -> Lanes:
    """Philox4x32-10 on integers or on int64 arrays that hold 32-bit values; arrays of any library.

    A product of two 32-bit values may wrap around in int64; its low and its high 32 bits are right all
    the same, because the shift result is masked.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def derive_seed(seed: bytes, *labels: str | int) -> bytes:
    """A 32-byte seed for another purpose: SHA-256 over the seed and the labels, each with its length.

    Seeds are hashed, never added or multiplied: no two label lists share a derived seed. A label is hashed
    as its text in UTF-8, an integer as its decimal text (so 1 and "1" are one label).
    """
    check_seed(seed)
    h = sha256(b"baffle derive v1" + seed)
    for label in labels:
        data = str(label).encode()
        h.update(struct.pack("<I", len(data)) + data)
    return h.digest()


def seed_from(value: int | bytes) -> bytes:
    """A 32-byte seed: bytes are checked and passed on, an integer 0 ≤ value < 2¹²⁸ is hashed."""
    if isinstance(value, bytes):
        return check_seed(value)
    if not 0 <= value < 1 << 128:
        raise ConfigError(f"seed {value}: an integer seed lies in [0, 2^128)")
    return sha256(b"baffle seed v1" + value.to_bytes(16, "little")).digest()


def check_seed(seed: bytes) -> bytes:
    if len(seed) != SEED_BYTES:
        raise ConfigError(f"a seed is {SEED_BYTES} bytes, not {len(seed)}")
    return seed


@dataclass(frozen=True)
class Stream:
    """All words of one round. ``seed`` (32 bytes) may be public; ``round`` in [0, 2⁶⁴)."""

    seed: bytes
    round: int
    _hash: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 0 <= self.round < 1 << 64:
            raise ConfigError(f"round {self.round} lies outside [0, 2^64)")
        digest = sha256(b"baffle stream v1" + self.seed + struct.pack("<Q", self.round)).digest()
        object.__setattr__(self, "_hash", struct.unpack("<8I", digest))

    @property
    def key(self) -> tuple[int, ...]:
        """(h0, h1, h2, h3): all that the words of a direction depend on."""
        return self._hash[:4]

    def blocks(self, k: int | range, start: int, stop: int, arrays: Arrays = NUMPY) -> Lanes:
        """Blocks [start, stop) of direction k: four int64 arrays (stop − start,), lane j = word 4b + j.

        Of several directions at once: (len(k), stop − start). ConfigError outside the stream.
        """
        self.check(k, start, stop)
        h = self._hash
        c1 = arrays.arange(0, len(k))[:, None] * k.step + k.start if isinstance(k, range) else k
        return philox4x32((arrays.arange(start, stop), c1, h[2], h[3]), (h[0], h[1]))

    def check(self, k: int | range, start: int, stop: int) -> None:
        """ConfigError unless direction k (or each of several) has the blocks [start, stop)."""
        ends = [*k[:1], *k[-1:]] if isinstance(k, range) else [k]
        if not (ends and all(0 <= end < 1 << 32 for end in ends) and 0 <= start <= stop <= 1 << 32):
            raise ConfigError(f"direction {k}, blocks [{start}, {stop}) lie outside the stream")

    def words(self, k: int, start: int, stop: int) -> NDArray[np.uint32]:
        """Words [start, stop) of direction k: uint32 (stop − start,). ConfigError outside the stream."""
        if not 0 <= start <= stop:
            raise ConfigError(f"words [{start}, {stop}) lie outside the stream")
        first = start // 4
        lanes = self.blocks(k, first, -(-stop // 4))
        words = NUMPY.words(lanes)[start - 4 * first : stop - 4 * first]
        return words.astype(np.uint32, copy=False)

    def uniform64(self, k: int, count: int) -> NDArray[np.uint64]:
        """The first ``count`` 64-bit integers of direction k (words 2i and 2i+1, low half first)."""
        words = self.words(k, 0, 2 * count).astype(np.uint64)
        result: NDArray[np.uint64] = words[0::2] | (words[1::2] << np.uint64(32))
        return result

    def permutation(self, k: int, count: int) -> NDArray[np.int64]:
        """A uniform permutation of range(count): the stable order of ``uniform64(k, count)``."""
        order: NDArray[np.int64] = np.argsort(self.uniform64(k, count), kind="stable")
        return order
