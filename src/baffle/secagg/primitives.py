"""The cryptography that secure aggregation is made of: each function is a few lines on a published primitive.

Keys, seeds and secrets are 32 bytes. A list of parts is hashed unambiguously: each part with its length
(u32, little-endian) before it, integers as 8 bytes, little-endian. So an integer in [0, 2⁶⁴) and its 8
bytes are one part, and no other two lists are one.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import struct
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from baffle.errors import ConfigError, MissingExtraError, SecurityError

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
except ImportError as error:
    raise MissingExtraError("cryptography", "secure", "secure aggregation") from error

KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16
_HASH_BYTES = 32
_DOMAIN = b"baffle secagg v1"
_RING_TYPES = np.dtype(np.uint32), np.dtype(np.uint64)


def random_bytes(n: int) -> bytes:
    """``n`` bytes of the operating system's generator: where every secret comes from."""
    return os.urandom(n)


def hkdf(secret: bytes, info: bytes, length: int = 32, salt: bytes = b"") -> bytes:
    """HKDF-SHA256 (RFC 5869): ``length`` bytes, at most 255 · 32, of a secret that need not be uniform."""
    if not 0 <= length <= 255 * _HASH_BYTES:
        raise ConfigError(f"HKDF-SHA256 gives at most {255 * _HASH_BYTES} bytes, not {length}")
    key = hmac.digest(salt or bytes(_HASH_BYTES), secret, "sha256")
    result = block = b""
    for i in range(-(-length // _HASH_BYTES)):
        block = hmac.digest(key, block + info + bytes((i + 1,)), "sha256")
        result += block
    return result[:length]


def derive(key: bytes, *labels: bytes | int) -> bytes:
    """A 32-byte key for another purpose, from a uniformly random one: one block of HKDF-Expand (RFC 5869)."""
    return hmac.digest(key, _info(labels), "sha256")


@functools.lru_cache(maxsize=1024)
def _info(labels: tuple[bytes | int, ...]) -> bytes:
    """Of one call to the next the labels are mostly the same: another key, the same purpose."""
    return _parts(labels) + b"\x01"


def hash_of(*parts: bytes | int) -> bytes:
    """SHA-256 over the parts, each with its length, after this protocol's own label."""
    return hashlib.sha256(_DOMAIN + _parts(parts)).digest()


def _parts(parts: tuple[bytes | int, ...]) -> bytes:
    encoded: list[bytes] = []
    for part in parts:
        data = part.to_bytes(8, "little") if isinstance(part, int) else part
        encoded += (struct.pack("<I", len(data)), data)
    return b"".join(encoded)


class KeyPair:
    """X25519 (RFC 7748), for one purpose and one set of partners."""

    __slots__ = ("_private", "public")

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self.public: bytes = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> KeyPair:
        return cls.from_bytes(random_bytes(KEY_BYTES))

    @classmethod
    def from_bytes(cls, secret: bytes) -> KeyPair:
        """The pair of a secret of 32 uniformly random bytes. SecurityError for another length."""
        return cls(X25519PrivateKey.from_private_bytes(_key(secret)))

    def to_bytes(self) -> bytes:
        """The secret of ``from_bytes``."""
        return self._private.private_bytes_raw()

    def agree(self, other_public: bytes) -> bytes:
        """The 32-byte key that the two pairs share, uniform and bound to both public keys.

        HKDF of the X25519 output, with both public keys in ascending order as its info. SecurityError for
        bytes that are no key, for one's own key, and for the keys that give zero whatever the secret is
        (RFC 7748, 6.1).
        """
        if other_public == self.public:
            raise SecurityError("a client was given its own public key as another's")
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(_key(other_public)))
        except ValueError as error:
            raise SecurityError("a public key of small order: what is agreed with it is no secret") from error
        return hkdf(shared, _parts((_DOMAIN + b" agree", *sorted((self.public, other_public)))))


class Identity:
    """A long-term Ed25519 signing key (RFC 8032)."""

    __slots__ = ("_private", "public")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public: bytes = private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Identity:
        return cls.from_bytes(random_bytes(KEY_BYTES))

    @classmethod
    def from_bytes(cls, secret: bytes) -> Identity:
        """The identity of a 32-byte secret. SecurityError for another length."""
        return cls(Ed25519PrivateKey.from_private_bytes(_key(secret)))

    def to_bytes(self) -> bytes:
        """The secret of ``from_bytes``."""
        return self._private.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """64 bytes, a function of the key and the message alone."""
        return self._private.sign(message)


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the identity ``public`` signed ``message``; False for bytes that are no key or signature."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _key(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise SecurityError(f"a key is {KEY_BYTES} bytes, not {len(key)}")
    return key


def seal(key: bytes, nonce: int, plaintext: bytes, associated: bytes) -> bytes:
    """ChaCha20-Poly1305 (RFC 8439, 2.8): ciphertext ‖ tag, TAG_BYTES longer than the plaintext.

    ``nonce`` in [0, 2⁹⁶), 12 bytes little-endian: never twice with one key.
    """
    return ChaCha20Poly1305(_key(key)).encrypt(nonce.to_bytes(12, "little"), plaintext, associated)


def open_sealed(key: bytes, nonce: int, sealed: bytes, associated: bytes) -> bytes:
    """What was sealed; SecurityError where key, nonce, bytes or associated data are not those of ``seal``."""
    try:
        return ChaCha20Poly1305(_key(key)).decrypt(nonce.to_bytes(12, "little"), sealed, associated)
    except (InvalidTag, ValueError) as error:
        raise SecurityError("a sealed message that its sender did not seal for this place") from error


def mask(key: bytes, count: int, dtype: DTypeLike) -> NDArray[Any]:
    """``count`` uniform integers, uint32 or uint64, read-only: the ChaCha20 key stream (RFC 8439, 2.4).

    Counter 0, nonce 0, integers little-endian: a key is for one mask, and for nothing else. ConfigError for
    another dtype. Cost: 64 bytes a block, near a nanosecond for 4 bytes.
    """
    kind = np.dtype(dtype)
    if kind not in _RING_TYPES:
        raise ConfigError(f"a mask is made of uint32 or uint64, not {kind}")
    zeros = _zeros(count * kind.itemsize)
    stream = Cipher(algorithms.ChaCha20(_key(key), bytes(16)), None).encryptor().update(zeros)
    return np.frombuffer(stream, kind.newbyteorder("<")).astype(kind, copy=False)


@functools.lru_cache(maxsize=4)
def _zeros(size: int) -> bytes:
    """All masks of a round have one size: its zeros are made once."""
    return bytes(size)
