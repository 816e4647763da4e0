"""The software root: an Ed25519 key and a counter in a folder. Whoever can read the folder is the root.

Its evidence says so: ``assurance`` is "software". It proves that the holder of the key vouches for a
measurement, not that any hardware saw it. Two files, readable by their owner alone: ``root.key``, and
``counter``, a decimal number. They cannot tell that the whole folder was put back to an older state.
"""

from __future__ import annotations

import re
from pathlib import Path

from baffle.enclave.evidence import AttestationError, Evidence, Expectation, check_claims
from baffle.enclave.sealing import write_whole
from baffle.errors import DataError
from baffle.identities import make_identity, read_identity
from baffle.secagg.primitives import derive, verify

KIND = "software"
ASSURANCE = "software"
_SIGNED = b"baffle software root v1"
_SEALING = b"baffle software root sealing v1"


class SoftwareRoot:
    """A ``Root`` without hardware. ``create`` makes its folder's files, once; one process at a time.

    Raises DataError for files that are missing, damaged or closed to it, SecurityError for a key that others
    can read.
    """

    kind = KIND
    assurance = ASSURANCE

    def __init__(self, folder: Path) -> None:
        self._identity = read_identity(folder / "root.key")
        self._counter = folder / "counter"
        self.public = self._identity.public  # 32 bytes: what a ``SoftwareVerifier`` pins
        self.counter()  # which refuses a folder that has none

    @classmethod
    def create(cls, folder: Path) -> SoftwareRoot:
        """A new root in an existing folder. DataError where one is there."""
        make_identity(folder / "root.key")
        write_whole(folder / "counter", b"0\n")
        return cls(folder)

    def quote(self, measurement: bytes, report_data: bytes) -> bytes:
        return self._identity.sign(_SIGNED + measurement + report_data)

    def sealing_key(self, measurement: bytes) -> bytes:
        return derive(self._identity.to_bytes(), _SEALING, measurement)

    def counter(self) -> int:
        try:
            text = self._counter.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the counter {self._counter}: {error.strerror}") from error
        if not re.fullmatch(rb"(0|[1-9][0-9]{0,18})\n", text):
            raise DataError(f"the counter {self._counter} is damaged")
        return int(text)

    def advance(self, to: int) -> None:
        now = self.counter()
        if to <= now:
            raise AttestationError(f"the counter is {now}: it does not go back to {to}")
        write_whole(self._counter, b"%d\n" % to)


class SoftwareVerifier:
    """Trusts the software root with the Ed25519 key ``public``, and nobody else."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def check(self, evidence: Evidence, expected: Expectation) -> None:
        check_claims(evidence, expected, KIND, ASSURANCE)
        if not verify(self._public, evidence.body, _SIGNED + evidence.measurement + evidence.report_data):
            raise AttestationError("the software root that is trusted did not sign this evidence")
