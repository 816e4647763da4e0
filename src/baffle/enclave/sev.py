"""AMD SEV-SNP: the attestation report of a guest, read and checked. UNTESTED ON HARDWARE.

The layout is ATTESTATION_REPORT of AMD's "SEV Secure Nested Paging Firmware ABI Specification" (56860):
0x4A0 bytes, little-endian, signed by the chip's VCEK with ECDSA on P-384 and SHA-384 over the first 0x2A0.
Read are version 2, and later ones on processors of family 19h (Milan, Genoa), whose TCB_VERSION this is. The
VCEK's certificate ("Versioned Chip Endorsement Key Certificate", 57230) names the chip and the versions.

No machine that has it was at hand: the tests sign synthetic reports with keys of their own. So ``check``
refuses, and says why, unless the verifier was made with ``accept_untested=True``.

How the manifest gets in: whoever launches the guest gives its measurement as HOST_DATA, which the firmware
reports and nobody can change later; the guest's image, whose launch digest is MEASUREMENT, must refuse to
start a worker whose manifest has another. Both are checked. Such an image is not part of this library.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from baffle.enclave.certificates import checked, key_of
from baffle.enclave.evidence import AttestationError, Evidence, Expectation, check_claims, same
from baffle.errors import ConfigError, MessageError
from baffle.wire import Cursor

UNTESTED_ON_HARDWARE = True
KIND = "sev-snp"
ASSURANCE = "AMD SEV-SNP report, by a verifier that is UNTESTED ON HARDWARE; revocation is not checked"
REPORT_BYTES, SIGNED_BYTES, LAUNCH_BYTES = 0x4A0, 0x2A0, 48
_NUMBER_BYTES = 72  # of r and of s, little-endian
_ECDSA_P384_SHA384 = 1
_RESERVED_ONE, _MIGRATION, _DEBUG = 1 << 17, 1 << 18, 1 << 19  # POLICY
_MASKED, _SIGNING_KEY = 1 << 1, 0b111 << 2  # the flags at 0x48; signing key 0 is the VCEK
_FAMILY_19H = 0x19
_AMD = "1.3.6.1.4.1.3704.1."
_VERSIONS = _AMD + "3.1", _AMD + "3.2", _AMD + "3.3", _AMD + "3.8"
_CHIP = _AMD + "4"


class Tcb(NamedTuple):
    """Security versions of what a chip runs below its guests."""

    boot_loader: int
    tee: int
    snp: int
    microcode: int


@dataclass(frozen=True)
class Report:
    """The fields of an ATTESTATION_REPORT that are looked at."""

    version: int
    policy: int
    vmpl: int
    algorithm: int
    flags: int
    report_data: bytes
    launch: bytes
    host_data: bytes
    tcb: Tcb
    family: int
    chip: bytes
    signature: tuple[int, int]

    @classmethod
    def decode(cls, data: bytes) -> Report:
        """Raises MessageError for what has another size, or a signature that is none."""
        if len(data) != REPORT_BYTES:
            raise MessageError(f"an SEV-SNP report has {REPORT_BYTES} bytes, not {len(data)}")
        version, policy = struct.unpack_from("<I4xQ", data, 0x00)
        vmpl, algorithm = struct.unpack_from("<II", data, 0x30)
        boot_loader, tee, snp, microcode = struct.unpack_from("<BB4xBB", data, 0x180)
        r, s, rest = (data[a:b] for a, b in ((0x2A0, 0x2E8), (0x2E8, 0x330), (0x330, REPORT_BYTES)))
        if any(rest):
            raise MessageError("an SEV-SNP report with bytes behind its signature")
        return cls(
            version=version,
            policy=policy,
            vmpl=vmpl,
            algorithm=algorithm,
            flags=struct.unpack_from("<I", data, 0x48)[0],
            report_data=data[0x50:0x90],
            launch=data[0x90:0xC0],
            host_data=data[0xC0:0xE0],
            tcb=Tcb(boot_loader, tee, snp, microcode),
            family=data[0x188],
            chip=data[0x1A0:0x1E0],
            signature=(int.from_bytes(r, "little"), int.from_bytes(s, "little")),
        )


def body_of(report: bytes, vcek: bytes, ask: bytes) -> bytes:
    """The body of evidence: the report, and the certificates (DER) of its key and of that key's issuer."""
    return report + struct.pack("<I", len(vcek)) + vcek + struct.pack("<I", len(ask)) + ask


class SevSnpVerifier:
    """Trusts guests of genuine chips that were launched from one of the images ``launches`` (48 bytes each).

    ``ark``: AMD's root certificate of that line of processors, DER, pinned. ``least``: the oldest versions
    that are still trusted, each on its own. UNTESTED ON HARDWARE, and refusing therefore, unless
    ``accept_untested``.
    """

    def __init__(
        self, ark: bytes, launches: Collection[bytes], least: Tcb, *, accept_untested: bool = False
    ) -> None:
        if not launches or any(len(launch) != LAUNCH_BYTES for launch in launches):
            raise ConfigError(f"at least one launch digest, of {LAUNCH_BYTES} bytes each")
        self._ark, self._launches, self._least = ark, tuple(launches), least
        self._accept_untested = accept_untested

    def check(self, evidence: Evidence, expected: Expectation) -> None:
        if not self._accept_untested:
            raise AttestationError("SEV-SNP: this verifier is UNTESTED ON HARDWARE, and nobody accepted that")
        check_claims(evidence, expected, KIND, ASSURANCE)
        try:
            cursor = Cursor(evidence.body)
            data = cursor.take(REPORT_BYTES)
            vcek, ask = (cursor.take(cursor.integer("I")) for _ in range(2))
            cursor.end()
            report = Report.decode(data)
        except MessageError as error:
            raise AttestationError(f"an SEV-SNP report that cannot be read: {error}") from error
        leaf = checked(self._ark, ask, vcek)
        _check_form(report)
        _check_certificate(leaf, report)
        try:
            key_of(leaf, ec.SECP384R1).verify(
                utils.encode_dss_signature(*report.signature), data[:SIGNED_BYTES], ec.ECDSA(hashes.SHA384())
            )
        except InvalidSignature as error:
            raise AttestationError("an SEV-SNP report that its chip did not sign") from error
        if any(have < least for have, least in zip(report.tcb, self._least, strict=True)):
            raise AttestationError(f"{report.tcb} is older than what is trusted: {self._least}")
        if not any(same(report.launch, launch) for launch in self._launches):
            raise AttestationError(f"a guest launched from another image: {report.launch.hex()}")
        if not same(report.host_data, evidence.measurement):
            raise AttestationError("a guest launched for another measurement")
        if not same(report.report_data, evidence.report_data):
            raise AttestationError("a report for other keys, another nonce or another context")


def _check_form(report: Report) -> None:
    if report.version < 2 or (report.version > 2 and report.family != _FAMILY_19H):
        raise AttestationError(
            f"a report of version {report.version}, family {report.family:#x}: its TCB cannot be read here"
        )
    if report.algorithm != _ECDSA_P384_SHA384 or report.flags & (_MASKED | _SIGNING_KEY):
        raise AttestationError("a report that is not signed by a chip's own key (VCEK)")
    if not report.policy & _RESERVED_ONE or report.policy & (_MIGRATION | _DEBUG):
        raise AttestationError(f"a guest that may be debugged or migrated: policy {report.policy:#x}")
    if report.vmpl != 0:
        raise AttestationError(f"a report asked for at privilege level {report.vmpl}, not 0")


def _check_certificate(leaf: x509.Certificate, report: Report) -> None:
    """The VCEK must be of the chip and the versions that the report says."""
    try:
        found = {
            extension.oid.dotted_string: extension.value.value
            for extension in leaf.extensions
            if isinstance(extension.value, x509.UnrecognizedExtension)
        }
    except Exception as error:  # a parser of others' certificates
        raise AttestationError(f"a certificate that cannot be read: {error}") from error
    wanted = {oid: _der(number) for oid, number in zip(_VERSIONS, report.tcb, strict=True)}
    if any(found.get(oid) != value for oid, value in (wanted | {_CHIP: report.chip}).items()):
        raise AttestationError("a certificate of another chip, or for other versions, than the report")


def _der(number: int) -> bytes:
    """DER of an INTEGER in [0, 255]."""
    return bytes((2, 1, number)) if number < 0x80 else bytes((2, 2, 0, number))
