"""Evidence: what a worker shows of itself, and what somebody who trusts it must have seen first.

A *root* (software, a TPM, SGX, SEV-SNP) vouches in its own way for two values: the 32 bytes that measure
what runs (``manifest``), and 64 bytes of *report data*, the hash of the worker's public keys, the verifier's
nonce and a context. A *verifier* of the same kind checks what the root said. So evidence binds

    measurement ‖ SHA-512(agreement key ‖ signing key ‖ nonce ‖ context)

and evidence of other code, for other keys, of another challenge or context is refused. There is no verifier
here that trusts, and no switch that makes one trust.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from baffle.errors import ConfigError, SecurityError
from baffle.wire import Cursor, decoding

MEASUREMENT_BYTES = 32
NONCE_BYTES = 32
KEY_BYTES = 32
REPORT_DATA_BYTES = 64
MOST_CONTEXT = 1 << 16
MOST_BODY = 1 << 18
_MAGIC = b"baffle evidence v1\n"
_REPORT = b"baffle enclave report data v1"


class AttestationError(SecurityError):
    """What was shown is not what is trusted: nothing is sent there, and nothing from there is believed."""


@dataclass(frozen=True)
class Keys:
    """The public keys that a worker made for itself: X25519 to seal to it, Ed25519 to know its replies."""

    agreement: bytes
    signing: bytes

    def __post_init__(self) -> None:
        _check_size(self.agreement, KEY_BYTES, "an agreement key")
        _check_size(self.signing, KEY_BYTES, "a signing key")


def report_data(keys: Keys, nonce: bytes, context: bytes) -> bytes:
    """The 64 bytes that a root vouches for beside the measurement. Every part has a length of its own."""
    fixed = _REPORT + keys.agreement + keys.signing + nonce
    return hashlib.sha512(fixed + struct.pack("<I", len(context)) + context).digest()


@dataclass(frozen=True)
class Evidence:
    """What a worker shows. ``kind`` and ``assurance`` are claims too: the verifier knows what it can give.

    ``kind`` names the root's format, ``assurance`` says in words what stands behind it; ``nonce`` (32 bytes)
    is the verifier's, ``context`` what it asked for (a session, a round), ``body`` what the root signed.
    Raises ConfigError for what cannot be.
    """

    kind: str
    assurance: str
    measurement: bytes
    keys: Keys
    nonce: bytes
    context: bytes
    body: bytes

    def __post_init__(self) -> None:
        for text, what in ((self.kind, "a kind"), (self.assurance, "an assurance")):
            if not (1 <= len(text) < 256 and text.isascii() and text.isprintable()):
                raise ConfigError(f"{what} of evidence is one line of 1 to 255 ASCII characters")
        _check_size(self.measurement, MEASUREMENT_BYTES, "a measurement")
        _check_size(self.nonce, NONCE_BYTES, "a nonce")
        if len(self.context) > MOST_CONTEXT or len(self.body) > MOST_BODY:
            raise ConfigError(f"evidence has at most {MOST_CONTEXT} bytes of context, {MOST_BODY} of body")

    @property
    def report_data(self) -> bytes:
        """What the root must have vouched for, beside the measurement."""
        return report_data(self.keys, self.nonce, self.context)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the encoding: a channel binds its messages to it."""
        return hashlib.sha256(self.encode()).digest()

    def encode(self) -> bytes:
        """The one byte string of this evidence."""
        kind, assurance = self.kind.encode("ascii"), self.assurance.encode("ascii")
        return b"".join(
            (
                _MAGIC,
                bytes([len(kind)]) + kind,
                bytes([len(assurance)]) + assurance,
                self.measurement + self.keys.agreement + self.keys.signing + self.nonce,
                struct.pack("<I", len(self.context)) + self.context,
                struct.pack("<I", len(self.body)) + self.body,
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> Evidence:
        """Raises MessageError for every byte string that ``encode`` does not give."""
        cursor = Cursor(data)
        with decoding("evidence"):
            if cursor.take(len(_MAGIC)) != _MAGIC:
                raise ConfigError("these bytes are none of version 1")
            kind, assurance = (cursor.take(cursor.integer("B")).decode("ascii") for _ in range(2))
            measurement = cursor.take(MEASUREMENT_BYTES)
            keys = Keys(cursor.take(KEY_BYTES), cursor.take(KEY_BYTES))
            nonce = cursor.take(NONCE_BYTES)
            context, body = (cursor.take(cursor.integer("I")) for _ in range(2))
            cursor.end()
            return cls(kind, assurance, measurement, keys, nonce, context, body)


@dataclass(frozen=True)
class Expectation:
    """What evidence must show: one of ``measurements``, and this nonce and context."""

    measurements: tuple[bytes, ...]
    nonce: bytes
    context: bytes

    def __post_init__(self) -> None:
        if not self.measurements:
            raise ConfigError("an expectation without a measurement would be met by nobody")
        for measurement in self.measurements:
            _check_size(measurement, MEASUREMENT_BYTES, "a measurement")
        _check_size(self.nonce, NONCE_BYTES, "a nonce")


class Root(Protocol):
    """The worker's side: what vouches for a measurement, and keeps secrets for it."""

    @property
    def kind(self) -> str: ...

    @property
    def assurance(self) -> str: ...

    def quote(self, measurement: bytes, report_data: bytes) -> bytes:
        """The body of evidence for both (32 and 64 bytes). Raises AttestationError where it cannot."""
        ...

    def sealing_key(self, measurement: bytes) -> bytes:
        """32 bytes, the same ever again for one measurement, and independent for any other."""
        ...

    def counter(self) -> int:
        """A number that only grows."""
        ...

    def advance(self, to: int) -> None:
        """Raises the counter; on disk when it returns. AttestationError unless ``to`` > ``counter()``."""
        ...


class Verifier(Protocol):
    """The other side. Returns for what it trusts, and raises AttestationError for everything else."""

    def check(self, evidence: Evidence, expected: Expectation) -> None: ...


class OneOf:
    """Trusts whom at least one of its verifiers trusts: a fleet has a root on each machine."""

    def __init__(self, verifiers: Sequence[Verifier]) -> None:
        if not verifiers:
            raise ConfigError("nobody to trust: at least one verifier is needed")
        self._verifiers = tuple(verifiers)

    def check(self, evidence: Evidence, expected: Expectation) -> None:
        refusals = []
        for verifier in self._verifiers:
            try:
                return verifier.check(evidence, expected)
            except AttestationError as error:
                refusals.append(str(error))
        raise AttestationError("; ".join(dict.fromkeys(refusals)))


def attest(root: Root, measurement: bytes, keys: Keys, nonce: bytes, context: bytes) -> Evidence:
    """Evidence of ``root`` for a worker. Raises AttestationError, or ConfigError for what cannot be."""
    _check_size(nonce, NONCE_BYTES, "a nonce")
    body = root.quote(measurement, report_data(keys, nonce, context))
    return Evidence(root.kind, root.assurance, measurement, keys, nonce, context, body)


def check_claims(evidence: Evidence, expected: Expectation, kind: str, assurance: str) -> None:
    """What every verifier checks before it looks at the body: that the claims are the ones expected.

    Raises AttestationError. Says nothing of whether they are true: that is what the body is for.
    """
    if evidence.kind != kind:
        raise AttestationError(f"evidence of kind {evidence.kind!r}, where {kind!r} is trusted")
    if evidence.assurance != assurance:
        raise AttestationError(f"evidence claims the assurance {evidence.assurance!r}, not {assurance!r}")
    if not any(same(evidence.measurement, known) for known in expected.measurements):
        raise AttestationError(f"another measurement than those trusted: {evidence.measurement.hex()}")
    if not same(evidence.nonce, expected.nonce):
        raise AttestationError("evidence for another nonce than the one given: it is replayed, or another's")
    if not same(evidence.context, expected.context):
        raise AttestationError("evidence for another context than the one asked for")


def same(first: bytes, second: bytes) -> bool:
    """Equal, in a time that depends on the lengths alone."""
    return hmac.compare_digest(first, second)


class Challenge:
    """The nonces that a verifier gave out: each is good once, for ``seconds``, for the context it was for.

    ``clock`` gives seconds that never go back. Not for several threads at once. Memory: those outstanding.
    """

    def __init__(self, seconds: float = 60.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not seconds > 0:
            raise ConfigError(f"a challenge is good for more than 0 seconds, not {seconds}")
        self._seconds, self._clock = seconds, clock
        self._issued: dict[bytes, tuple[float, bytes]] = {}

    def issue(self, context: bytes) -> bytes:
        """A fresh nonce, 32 bytes of the operating system's generator."""
        now, nonce = self._clock(), os.urandom(NONCE_BYTES)
        self._issued = {key: known for key, known in self._issued.items() if now < known[0]}
        self._issued[nonce] = now + self._seconds, context
        return nonce

    def redeem(self, nonce: bytes, measurements: Collection[bytes]) -> Expectation:
        """What evidence for this nonce must show. The nonce is used up, whatever comes of it.

        AttestationError for one that was never given out, was redeemed already, or is out of time.
        """
        until, context = self._issued.pop(nonce, (None, b""))
        if until is None:
            raise AttestationError("a nonce that was never given out, or was used already: replayed evidence")
        if self._clock() >= until:
            raise AttestationError(f"a nonce older than {self._seconds:g} s: ask for evidence again")
        return Expectation(tuple(measurements), nonce, context)


def accept(
    data: bytes, challenge: Challenge, verifier: Verifier, measurements: Collection[bytes]
) -> Evidence:
    """Evidence that may be trusted: decoded, of an outstanding challenge, and checked by ``verifier``.

    Raises AttestationError for everything else, and MessageError for what is no evidence.
    """
    evidence = Evidence.decode(data)
    verifier.check(evidence, challenge.redeem(evidence.nonce, measurements))
    return evidence


def _check_size(data: bytes, size: int, what: str) -> None:
    if len(data) != size:
        raise ConfigError(f"{what} has {size} bytes, not {len(data)}")
