"""Sealed boxes: bytes for one worker alone, through hands that are not trusted, and its signed answers.

A box is for an X25519 key. Its sender makes a key pair for it alone:

    box = ephemeral public key (32) ‖ chunk 0 ‖ chunk 1 ‖ ... ‖ last chunk
    key = HKDF-SHA256(X25519, both public keys; label ‖ associated)
    chunk = ChaCha20-Poly1305 of 64 KiB (the last one of fewer, perhaps none); nonce = number, or number + 2⁸⁸

so that a cut, a swap or a repetition of chunks is found, and a box of any size is opened in place, in the
memory of its ciphertext. ``associated`` names what the box is for, and opens it nowhere else: the direction,
the hash of the evidence in which the worker showed its key, and a number that only grows.

Boxes do not say who sent them. What the server sends is signed inside, and so is what the worker replies:
``signed`` and ``verified``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple

from baffle.digests import sha256
from baffle.enclave.evidence import KEY_BYTES
from baffle.errors import MessageError, SecurityError
from baffle.secagg.primitives import SIGNATURE_BYTES, TAG_BYTES, Identity, KeyPair, derive, open_sealed, seal
from baffle.secagg.primitives import verify as verify_signature

CHUNK = 1 << 16
SESSION_BYTES = 32
_LAST = 1 << 88
_LABEL = b"baffle enclave box v1"
_SIGNED = b"baffle enclave signature v1"

Direction = Literal["provision", "request", "reply"]


class Place(NamedTuple):
    """What a box is for: its direction, the evidence's hash (32 bytes), a number from 0 that only grows."""

    direction: Direction
    session: bytes
    number: int

    def encode(self) -> bytes:
        if len(self.session) != SESSION_BYTES or not 0 <= self.number < 1 << 64:
            raise MessageError("a box's session is 32 bytes, and its number below 2^64")
        return struct.pack("<B", len(self.direction)) + (
            self.direction.encode() + self.session + struct.pack("<Q", self.number)
        )


def sealed(to: bytes, plaintext: bytes | bytearray | memoryview, place: Place) -> bytes:
    """A box for the public key ``to``. Memory: the plaintext and the box. SecurityError for a bad key."""
    pair = KeyPair.generate()
    key = derive(pair.agree(to), _LABEL, place.encode())
    return b"".join((pair.public, *encrypted(key, plaintext)))


def opened(pair: KeyPair, box: bytearray | memoryview, place: Place) -> memoryview:
    """What is in a box, in the memory of the box, which it overwrites. SecurityError: not for this place."""
    view = memoryview(box)
    if len(view) < KEY_BYTES + TAG_BYTES:
        raise SecurityError("a sealed box cut short")
    key = derive(pair.agree(bytes(view[:KEY_BYTES])), _LABEL, place.encode())
    return decrypted(key, view[KEY_BYTES:])


def encrypted(key: bytes, plaintext: bytes | bytearray | memoryview) -> Iterator[bytes]:
    """Chunks under a key that is used once. Memory: one chunk."""
    view, number = memoryview(plaintext).cast("B"), 0
    while True:
        part = view[number * CHUNK : (number + 1) * CHUNK]
        last = (number + 1) * CHUNK >= len(view)
        yield seal(key, number + (_LAST if last else 0), bytes(part), b"")
        if last:
            return
        number += 1


def encrypted_size(size: int) -> int:
    """How many bytes ``encrypted`` makes of ``size``."""
    return size + TAG_BYTES * max(1, -(-size // CHUNK))


def decrypted(key: bytes, view: memoryview) -> memoryview:
    """The plaintext of ``encrypted``, written over its ciphertext. SecurityError: not of this key."""
    size, at, number = CHUNK + TAG_BYTES, 0, 0
    while True:
        start = number * size
        last = start + size >= len(view)
        plain = open_sealed(key, number + (_LAST if last else 0), bytes(view[start : start + size]), b"")
        view[at : at + len(plain)] = plain
        at += len(plain)
        if last:
            return view[:at]
        number += 1


def signed(identity: Identity, place: Place, message: bytes | memoryview) -> bytes:
    """64 bytes of the identity over a message in its place."""
    return identity.sign(_said(place, message))


def check_signature(public: bytes, signature: bytes, place: Place, message: bytes | memoryview) -> None:
    """Raises SecurityError where the identity ``public`` did not sign this message for this place."""
    if len(signature) != SIGNATURE_BYTES or not verify_signature(public, signature, _said(place, message)):
        raise SecurityError("a message that was not signed by whom it should be from, or not for this place")


def _said(place: Place, message: bytes | memoryview) -> bytes:
    return _SIGNED + place.encode() + sha256(message).digest()


# -- what passes through drivers -----------------------------------------------------------------------


class Request(NamedTuple):
    """The inside of a box to a worker: signed, with the key that the reply is sealed to.

    ``signature (64) ‖ reply_to (32) ‖ body``; the signature is over all that follows it.
    Whose signature it must be is for ``check`` to be told: the server's that the data's owner named.
    """

    signature: bytes
    said: memoryview  # reply_to ‖ body
    place: Place

    @property
    def reply_to(self) -> bytes:
        return bytes(self.said[:KEY_BYTES])

    @property
    def body(self) -> memoryview:
        return self.said[KEY_BYTES:]

    @classmethod
    def box(cls, identity: Identity, to: bytes, reply_to: bytes, body: bytes, place: Place) -> bytes:
        """What is sent to a worker with the agreement key ``to``. Memory: the body, three times."""
        said = reply_to + body
        return sealed(to, signed(identity, place, said) + said, place)

    @classmethod
    def open(cls, pair: KeyPair, box: bytearray | memoryview, place: Place) -> Request:
        """At the worker. Raises SecurityError for what is not for it, or not for this place."""
        inside = opened(pair, box, place)
        if len(inside) < SIGNATURE_BYTES + KEY_BYTES:
            raise SecurityError("a request cut short")
        return cls(bytes(inside[:SIGNATURE_BYTES]), inside[SIGNATURE_BYTES:], place)

    def check(self, sender: bytes) -> None:
        """Raises SecurityError where the identity ``sender`` (a public key) did not sign it."""
        check_signature(sender, self.signature, self.place, self.said)


def answer(identity: Identity, reply_to: bytes, reply: bytes, place: Place) -> bytes:
    """A worker's reply: ``signature (64) ‖ box``; what is signed is the box."""
    box = sealed(reply_to, reply, place)
    return signed(identity, place, box) + box


def answered(signing: bytes, pair: KeyPair, data: bytes, place: Place) -> bytes:
    """The reply, at the server. SecurityError unless the worker with the key ``signing`` gave it here."""
    box = data[SIGNATURE_BYTES:]
    check_signature(signing, data[:SIGNATURE_BYTES], place, box)
    return bytes(opened(pair, bytearray(box), place))
