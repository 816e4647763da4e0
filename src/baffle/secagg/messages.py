"""The messages of secure aggregation. All numbers are little-endian; who is who is said by places.

A place is a client's number in the ascending order of the names of those that are present in the session.
What goes up ends in a tag over the body, the stage and the context that it was made in: for adverts, which
other clients read, a signature; after that a code under a key that client and server agreed on. What comes
down has none: the server is the one that is not trusted, and its lies end in masks that do not cancel.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError, MessageError, SecurityError
from baffle.secagg.primitives import KEY_BYTES, TAG_BYTES, Identity, hash_of, verify
from baffle.secagg.session import Flags, Settings
from baffle.secagg.sharing import SECRET_BYTES
from baffle.wire import Cursor

VERSION = 1
TOKEN_BYTES = 16
SHORT_TAG = 16  # of a share: enough that nobody finds another share to a given tag
BUNDLE_BYTES = SECRET_BYTES + TAG_BYTES
_OFFER = "BQHHBII"


class Reader(Cursor):
    """Takes a message apart from the front. Raises MessageError for what is none."""

    def blocks(self, count: int, size: int) -> list[bytes]:
        data = self.take(count * size)
        return [data[i : i + size] for i in range(0, len(data), size)]

    def flags(self, count: int) -> Flags:
        data = self.take(-(-count // 8))
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        if bits[count:].any():
            raise MessageError("a list of clients with bits behind its end")
        return bits[:count].astype(bool)


def bits(flags: Flags) -> bytes:
    """One bit a client, the first in the lowest bit of the first byte."""
    return np.packbits(flags, bitorder="little").tobytes()


def places(flags: Flags) -> list[int]:
    """The places whose bit is set, ascending."""
    return [int(i) for i in np.flatnonzero(flags)]


def advert(identity: Identity, offer: bytes, key: bytes) -> bytes:
    """A one-time key, signed by the client that it is of, for the offer of this hash."""
    return key + identity.sign(hash_of(b"advert", offer, key))


def advertised(public: bytes, offer: bytes, message: bytes, name: str) -> bytes:
    """The one-time key of an advert. Raises SecurityError where ``name`` did not sign it for this offer."""
    key, signature = message[:KEY_BYTES], message[KEY_BYTES:]
    if not verify(public, signature, hash_of(b"advert", offer, key)):
        raise SecurityError(
            f"client {name} did not sign this key for this session: it was changed, replayed or made by "
            "another, or one of the two was offered something else"
        )
    return key


def tagged(key: bytes, context: bytes, stage: str, body: bytes) -> bytes:
    """``body`` with its authentication code behind it."""
    return body + _code(key, context, stage, body)


def untagged(key: bytes, context: bytes, stage: str, message: bytes, name: str) -> bytes:
    """The body of a message. Raises SecurityError where ``name`` did not make it in this context."""
    body, code = message[:-TAG_BYTES], message[-TAG_BYTES:]
    if not hmac.compare_digest(code, _code(key, context, stage, body)):
        raise SecurityError(
            f"client {name}: its message of stage {stage!r} was not made by it in this context: it was "
            "changed, replayed or made by another, or the client was told something else"
        )
    return body


def _code(key: bytes, context: bytes, stage: str, body: bytes) -> bytes:
    return hmac.digest(key, hash_of(b"message", context, stage.encode(), body), "sha256")[:TAG_BYTES]


@dataclass(frozen=True)
class Offer:
    """advertise, down: the session that the server proposes."""

    job: bytes
    first_round: int
    settings: Settings
    key: bytes  # one-time, of the server: clients agree with it on how their messages are authenticated
    roster: bytes  # its digest
    members: Flags  # of the roster

    def encode(self) -> bytes:
        s = self.settings
        head = struct.pack(
            "<" + _OFFER,
            VERSION,
            self.first_round,
            s.degree,
            s.threshold,
            s.consistency,
            s.least,
            s.rounds,
        )
        return self.job + self.key + self.roster + head + bits(self.members)

    @classmethod
    def decode(cls, data: bytes, roster_size: int) -> Offer:
        r = Reader(data)
        job, key, roster = r.take(KEY_BYTES), r.take(KEY_BYTES), r.take(KEY_BYTES)
        version, first, degree, threshold, consistency, least, rounds = r.unpack(_OFFER)
        if version != VERSION:
            raise MessageError(f"secure aggregation of version {version}, this is version {VERSION}")
        members = r.flags(roster_size)
        r.end()
        if consistency > 1:
            raise MessageError("an offer that is not in canonical form")
        try:
            settings = Settings(degree, threshold, bool(consistency), least, rounds)
        except ConfigError as error:
            raise MessageError(f"an offer that cannot be: {error}") from error
        return cls(job, first, settings, key, roster, members)


@dataclass(frozen=True)
class Deposit:
    """share and answer, up: what opens a client's pairwise masks of one round, should it not answer.

    ``sealed`` are its pairwise roots under ρ; ``bundles`` the shares of ρ, each sealed for its holder;
    ``tags`` their hashes, by which the server knows a true share.
    """

    sealed: bytes
    tags: bytes  # (holders, SHORT_TAG)
    bundles: list[bytes]

    def encode(self) -> bytes:
        return b"".join((self.sealed, self.tags, *self.bundles))

    @staticmethod
    def size(holders: int, partners: int) -> int:
        return KEY_BYTES * partners + TAG_BYTES + holders * (SHORT_TAG + BUNDLE_BYTES)

    @classmethod
    def read(cls, r: Reader, holders: int, partners: int) -> Deposit:
        sealed = r.take(KEY_BYTES * partners + TAG_BYTES)
        return cls(sealed, r.take(holders * SHORT_TAG), r.blocks(holders, BUNDLE_BYTES))


@dataclass(frozen=True)
class Blinded:
    """answer, up: the shares of b, each blinded with a pad that its holder can make in the same round.

    So a holder that was told another plan, or other participants, helps to open nothing. ``commitment`` is
    one to b.
    """

    commitment: bytes
    shares: bytes  # (holders, SECRET_BYTES)
    tags: bytes  # (holders, SHORT_TAG)

    def encode(self) -> bytes:
        return self.commitment + self.shares + self.tags

    @staticmethod
    def size(holders: int) -> int:
        return 32 + holders * (SECRET_BYTES + SHORT_TAG)

    @classmethod
    def read(cls, r: Reader, holders: int) -> Blinded:
        return cls(r.take(32), r.take(holders * SECRET_BYTES), r.take(holders * SHORT_TAG))


def deposit_context(session: bytes, round_: int, owner: int) -> bytes:
    """What all that a deposit holds is bound to."""
    return hash_of(b"deposit", session, round_, owner)


def share_tag(context: bytes, holder: int, kind: int, share: bytes) -> bytes:
    """What a share is recognised by. A share of t ≥ 2 is uniform, so its hash tells nobody anything."""
    return hash_of(context, struct.pack("<HB", holder, kind) + share)[:SHORT_TAG]


def commitment_to(context: bytes, seed: bytes) -> bytes:
    """Of b, the self-mask's seed: what shares give must be that seed and no other."""
    return hash_of(context, b"self-mask", seed)


def xor(a: bytes, b: bytes) -> bytes:
    """Of two rows of bytes of one length."""
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")


def bundle_data(context: bytes, holder: int) -> bytes:
    """The associated data of the bundle for a holder."""
    return context + struct.pack("<H", holder)


def ring_dtype(ring_bits: int) -> np.dtype[Any]:
    return np.dtype(np.uint64 if ring_bits == 64 else np.uint32)


def ring_bytes(vector: NDArray[Any]) -> bytes:
    return vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()


def ring_vector(data: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)
