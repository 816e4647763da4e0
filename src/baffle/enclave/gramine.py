"""Intel SGX by Gramine: a manifest for the enclave, and its quotes read and checked. UNTESTED ON HARDWARE.

``gramine_manifest`` writes the template that ``gramine-manifest`` and ``gramine-sgx-sign`` take (Gramine 1.4
and later, "Manifest syntax"): every file by hash, no host environment, DCAP quotes. It holds the measurement,
and MRENCLAVE covers it; ``gramine-sgx-sign`` prints that of each.

A quote is version 3 of "Intel SGX ECDSA QuoteLib Reference" (DCAP), little-endian: a header of 48 bytes, the
enclave's report of 384, u32 length, and the signature of both by an attestation key, which the quoting
enclave's report vouches for, which Intel's certificate for the platform (PCK) vouches for.

No machine that has it was at hand: the tests sign synthetic quotes with keys of their own, and Gramine was
not run. So ``check`` refuses, and says why, unless the verifier was made with ``accept_untested=True``. It
reads neither revocation lists nor Intel's statements on which microcode is still to be trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from baffle.enclave.certificates import checked, key_of
from baffle.enclave.evidence import AttestationError, Evidence, Expectation, check_claims, same
from baffle.enclave.manifest import Manifest, hashes_of
from baffle.errors import ConfigError, MessageError
from baffle.wire import Cursor

UNTESTED_ON_HARDWARE = True
KIND = "sgx-dcap"
ASSURANCE = "Intel SGX quote, by a verifier that is UNTESTED ON HARDWARE; TCB and revocation are not checked"
HEADER_BYTES, REPORT_BYTES = 48, 384
LEAST_THREADS = 4  # one for the program, three that Gramine may start itself
_VERSION, _ECDSA_P256 = 3, 2
_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")  # the vendor of the quoting enclave ...
_QUOTING = bytes.fromhex("8c4f5775d796503e96137f77c68a829a0056ac8ded70140b081b094490c57bff")  # ... its signer
_INITIALISED, _DEBUG = 1 << 0, 1 << 1
_PCK_CHAIN = 5  # certification data: certificates in PEM, the platform's first


def gramine_manifest(
    manifest: Manifest,
    files: Mapping[str, Path],
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    enclave_size: str = "512M",
    threads: int = LEAST_THREADS,
) -> str:
    """The text of ``baffle.manifest.template``.

    ``files``: as for ``Manifest.of_this``; ``argv``: absolute path inside of the interpreter, and its
    arguments; ``enclave_size``: a power of two, in K, M or G. Raises ConfigError for what Gramine would not
    take. The two expressions in braces are filled in by ``gramine-manifest``.
    """
    size = re.fullmatch(r"([1-9][0-9]*)[KMG]", enclave_size)
    if size is None or int(size[1]) & (int(size[1]) - 1):
        raise ConfigError(f"an enclave's size is a power of two in K, M or G, not {enclave_size!r}")
    if threads < LEAST_THREADS:
        raise ConfigError(f"an enclave has at least {LEAST_THREADS} threads, not {threads}")
    lines = [
        'loader.entrypoint = "file:{{ gramine.libos }}"',
        f"libos.entrypoint = {_quoted(argv[0])}",
        f"loader.argv = [{', '.join(map(_quoted, argv))}]",
        'loader.log_level = "error"',
    ]
    seen = {**environment, "BAFFLE_MEASUREMENT": manifest.measurement.hex()}
    lines += [f"loader.env.{_name(name)} = {_quoted(value)}" for name, value in sorted(seen.items())]
    lines += ["sys.disallow_subprocesses = true", 'fs.root.type = "tmpfs"', "fs.mounts = ["]
    lines.append('  { path = "/lib", uri = "file:{{ gramine.runtimedir() }}" },')
    lines += [
        f"  {{ path = {_quoted(inside)}, uri = {_quoted(f'file:{outside.resolve()}')} }},"
        for inside, outside in sorted(files.items())
    ]
    lines += ["]", "sgx.debug = false", f"sgx.enclave_size = {_quoted(enclave_size)}"]
    lines += [f"sgx.max_threads = {threads}", 'sgx.remote_attestation = "dcap"', "sgx.trusted_files = ["]
    lines += ['  "file:{{ gramine.libos }}",', '  "file:{{ gramine.runtimedir() }}/",']
    lines += [
        f"  {{ uri = {_quoted(f'file:{path}')}, sha256 = {_quoted(digest)} }},"
        for path, digest in _trusted(files)
    ]
    return "\n".join([*lines, "]"]) + "\n"


def _trusted(files: Mapping[str, Path]) -> list[tuple[str, str]]:
    found = {}
    for inside, outside in files.items():
        for name, digest in hashes_of({inside: outside}).items():
            path = f"{outside.resolve()}{name.removeprefix(inside)}"
            if Path(path).is_symlink():
                raise ConfigError(f"{path} is a link: Gramine is given files")
            found[path] = digest
    return sorted(found.items())


def _quoted(text: str) -> str:
    """A TOML string, outside of Jinja's reach."""
    if not text.isprintable() or "{{" in text or "{%" in text or "{#" in text:
        raise ConfigError(f"a Gramine manifest cannot hold {text!r}")
    return json.dumps(text, ensure_ascii=False)


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]+", text):
        raise ConfigError(f"no name of a variable: {text!r}")
    return text


@dataclass(frozen=True)
class EnclaveReport:
    """The fields of an SGX report (``sgx_report_body_t``) that are looked at."""

    flags: int
    mrenclave: bytes
    mrsigner: bytes
    product: int
    security_version: int
    report_data: bytes

    @classmethod
    def decode(cls, data: bytes) -> EnclaveReport:
        """Raises MessageError for what has another size."""
        if len(data) != REPORT_BYTES:
            raise MessageError(f"an SGX report has {REPORT_BYTES} bytes, not {len(data)}")
        (flags,) = struct.unpack_from("<Q", data, 48)
        product, version = struct.unpack_from("<HH", data, 256)
        return cls(flags, data[64:96], data[128:160], product, version, data[320:384])


@dataclass(frozen=True)
class Quote:
    """A quote, version 3, with ECDSA on P-256: what is signed, and what vouches for it."""

    signed: bytes  # header and report
    report: EnclaveReport
    signature: bytes  # r ‖ s
    key: bytes  # x ‖ y of the attestation key
    quoting_signed: bytes
    quoting: EnclaveReport
    quoting_signature: bytes
    authentication: bytes
    certificates: bytes

    @classmethod
    def decode(cls, data: bytes) -> Quote:
        """Raises MessageError for what is no such quote."""
        cursor = Cursor(data)
        signed = cursor.take(HEADER_BYTES + REPORT_BYTES)
        version, kind, tee, _, _, vendor = struct.unpack_from("<HHIHH16s", signed)
        if (version, kind, tee, vendor) != (_VERSION, _ECDSA_P256, 0, _INTEL):
            raise MessageError("no SGX quote of version 3, by Intel's quoting enclave, with ECDSA on P-256")
        rest = Cursor(cursor.take(cursor.integer("I")))
        cursor.end()
        signature, key, quoting, quoting_signature = (rest.take(n) for n in (64, 64, REPORT_BYTES, 64))
        authentication = rest.take(rest.integer("H"))
        certified_by = rest.integer("H")
        certificates = rest.take(rest.integer("I"))
        rest.end()
        if certified_by != _PCK_CHAIN:
            raise MessageError(f"a quote whose key is certified by data of type {certified_by}, not a chain")
        return cls(
            signed,
            EnclaveReport.decode(signed[HEADER_BYTES:]),
            signature,
            key,
            quoting,
            EnclaveReport.decode(quoting),
            quoting_signature,
            authentication,
            certificates,
        )


class SgxVerifier:
    """Trusts enclaves of genuine platforms: ``enclaves``, from a measurement to its MRENCLAVE (32 bytes).

    ``root``: Intel's root certificate, DER, pinned. UNTESTED ON HARDWARE, and refusing therefore, unless
    ``accept_untested``.
    """

    def __init__(
        self, root: bytes, enclaves: Mapping[bytes, bytes], *, accept_untested: bool = False
    ) -> None:
        if not enclaves or any(len(enclave) != 32 for enclave in enclaves.values()):
            raise ConfigError("at least one enclave, and 32 bytes for its MRENCLAVE")
        self._root, self._enclaves, self._accept_untested = root, dict(enclaves), accept_untested

    def check(self, evidence: Evidence, expected: Expectation) -> None:
        if not self._accept_untested:
            raise AttestationError("SGX: this verifier is UNTESTED ON HARDWARE, and nobody accepted that")
        check_claims(evidence, expected, KIND, ASSURANCE)
        try:
            quote = Quote.decode(evidence.body)
        except MessageError as error:
            raise AttestationError(f"an SGX quote that cannot be read: {error}") from error
        platform = key_of(checked(self._root, *_issuer_and_leaf(quote.certificates)), ec.SECP256R1)
        _verify(platform, quote.quoting_signature, quote.quoting_signed, "the quoting enclave's report")
        if not same(quote.quoting.mrsigner, _QUOTING) or _debuggable(quote.quoting):
            raise AttestationError("a quoting enclave that is not Intel's")
        bound = hashlib.sha256(quote.key + quote.authentication).digest() + bytes(32)
        if not same(quote.quoting.report_data, bound):
            raise AttestationError("an attestation key that the quoting enclave does not vouch for")
        _verify(_point(quote.key), quote.signature, quote.signed, "the quote")
        if _debuggable(quote.report):
            raise AttestationError("an enclave that may be debugged")
        enclave = self._enclaves.get(evidence.measurement)
        if enclave is None or not same(quote.report.mrenclave, enclave):
            raise AttestationError(f"another enclave than this measurement's: {quote.report.mrenclave.hex()}")
        if not same(quote.report.report_data, evidence.report_data):
            raise AttestationError("a quote for other keys, another nonce or another context")


def _debuggable(report: EnclaveReport) -> bool:
    return report.flags & (_INITIALISED | _DEBUG) != _INITIALISED


def _issuer_and_leaf(pem: bytes) -> tuple[bytes, bytes]:
    try:
        chain = x509.load_pem_x509_certificates(pem.rstrip(b"\x00"))
        leaf, issuer = (found.public_bytes(serialization.Encoding.DER) for found in chain[:2])
    except Exception as error:  # a parser of others' certificates
        raise AttestationError(f"a quote without a chain of certificates: {error}") from error
    return issuer, leaf


def _point(key: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + key)
    except ValueError as error:
        raise AttestationError("an attestation key that is no point of P-256") from error


def _verify(key: ec.EllipticCurvePublicKey, signature: bytes, signed: bytes, what: str) -> None:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise AttestationError(f"{what} was not signed by the key that it names") from error
