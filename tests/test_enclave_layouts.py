"""SEV-SNP reports, SGX quotes and Gramine's manifest, against their documented layouts. No hardware was used.

The keys, certificates, reports and quotes are made here. What is checked is that the offsets are the
documented ones, and that everything that is not as it should be is refused.
"""

import dataclasses
import datetime
import functools
import hashlib
import struct
import tomllib
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.enclave import gramine, sev
from baffle.enclave.evidence import AttestationError, Evidence, Expectation, Keys, report_data
from baffle.enclave.gramine import EnclaveReport, Quote, SgxVerifier, gramine_manifest
from baffle.enclave.manifest import Manifest
from baffle.enclave.sev import Report, SevSnpVerifier, Tcb, body_of
from baffle.errors import ConfigError, MessageError

KEYS = Keys(bytes(range(32)), bytes(range(32, 64)))
CODE, OTHER, NONCE, CONTEXT = b"m" * 32, b"o" * 32, b"n" * 32, b"session 1"
EXPECTED = Expectation((CODE, OTHER), NONCE, CONTEXT)
BOUND = report_data(KEYS, NONCE, CONTEXT)
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def certificate(name, key, issuer=None, issuer_key=None, *, ca=False, extensions=(), until=NOW + DAY):
    """DER. RSA issuers sign with PSS, as AMD's do."""
    issuer_key = issuer_key or key
    builder = x509.CertificateBuilder(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer or name)]),
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
        key.public_key(),
        x509.random_serial_number(),
        NOW - 2 * DAY,
        until,
    ).add_extension(x509.BasicConstraints(ca, None), critical=True)
    for oid, value in extensions:
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), False)
    is_rsa = isinstance(issuer_key, rsa.RSAPrivateKey)
    pss = padding.PSS(padding.MGF1(hashes.SHA384()), 48) if is_rsa else None
    made = builder.sign(issuer_key, hashes.SHA384() if is_rsa else hashes.SHA256(), rsa_padding=pss)
    return made.public_bytes(serialization.Encoding.DER)


def pem(der):
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


# SEV-SNP. Offsets: AMD 56860, table "ATTESTATION_REPORT Structure".

CHIP, LAUNCH, TCB = bytes(range(64)), b"L" * 48, Tcb(4, 0, 22, 213)
POLICY = 0x30000  # bit 17, which is always 1, and SMT allowed
AMD = "1.3.6.1.4.1.3704.1."


@functools.cache
def amd():
    """A line of processors: root, issuer, a chip's key."""
    ark, ask = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    vcek = ec.generate_private_key(ec.SECP384R1())
    extensions = [
        (AMD + "3.1", b"\x02\x01\x04"),
        (AMD + "3.2", b"\x02\x01\x00"),
        (AMD + "3.3", b"\x02\x01\x16"),
    ]
    extensions += [(AMD + "3.8", b"\x02\x02\x00\xd5"), (AMD + "4", CHIP)]
    return SimpleNamespace(
        ark=certificate("ARK-Test", ark, ca=True),
        ask=certificate("SEV-Test", ask, "ARK-Test", ark, ca=True),
        vcek=certificate("SEV-VCEK", vcek, "SEV-Test", ask, extensions=extensions),
        keys=(ark, ask, vcek),
        extensions=extensions,
    )


def report(key=None, **changed):
    """A report with fields at the documented offsets, signed. ``changed``: offset in hexadecimal → bytes."""
    data = bytearray(0x4A0)
    fields = {
        0x000: struct.pack("<II", 2, 1),  # VERSION, GUEST_SVN
        0x008: struct.pack("<Q", POLICY),
        0x010: b"f" * 16 + b"i" * 16,  # FAMILY_ID, IMAGE_ID
        0x030: struct.pack("<II", 0, 1),  # VMPL, SIGNATURE_ALGO
        0x038: bytes([9, 9, 0, 0, 0, 0, 9, 9]),  # CURRENT_TCB, which the key is not for
        0x040: struct.pack("<QI", 3, 0),  # PLATFORM_INFO, flags
        0x050: BOUND,  # REPORT_DATA
        0x090: LAUNCH,  # MEASUREMENT
        0x0C0: CODE,  # HOST_DATA
        0x0E0: b"d" * 48 + b"a" * 48 + b"r" * 32 + b"\xff" * 32,  # digests of keys, REPORT_ID, REPORT_ID_MA
        0x180: bytes([TCB.boot_loader, TCB.tee, 0, 0, 0, 0, TCB.snp, TCB.microcode]),  # REPORTED_TCB
        0x1A0: CHIP,
        0x1E0: b"\x07" * 8,  # COMMITTED_TCB
    }
    for offset, value in (fields | {int(name[1:], 16): value for name, value in changed.items()}).items():
        data[offset : offset + len(value)] = value
    der = (key or amd().keys[2]).sign(bytes(data[:0x2A0]), ec.ECDSA(hashes.SHA384()))
    r, s = utils.decode_dss_signature(der)
    data[0x2A0:0x330] = r.to_bytes(72, "little") + s.to_bytes(72, "little")
    return bytes(data)


def sev_evidence(data=None, vcek=None, ask=None):
    body = body_of(data or report(), vcek or amd().vcek, ask or amd().ask)
    return Evidence(sev.KIND, sev.ASSURANCE, CODE, KEYS, NONCE, CONTEXT, body)


def sev_verifier(**changed):
    given_ = {"ark": amd().ark, "launches": [LAUNCH], "least": TCB, "accept_untested": True}
    return SevSnpVerifier(**(given_ | changed))


def test_a_report_is_read_at_the_documented_offsets():
    found = Report.decode(report())
    assert (found.version, found.policy, found.vmpl, found.algorithm, found.flags) == (2, POLICY, 0, 1, 0)
    assert (found.report_data, found.launch, found.host_data) == (BOUND, LAUNCH, CODE)
    assert (found.tcb, found.chip) == (TCB, CHIP)


def test_a_true_report_is_accepted_and_says_that_it_is_untested():
    sev_verifier().check(sev_evidence(), EXPECTED)
    sev_verifier().check(sev_evidence(report(x0=struct.pack("<I", 3), x188=b"\x19\x01\x01")), EXPECTED)
    assert sev.UNTESTED_ON_HARDWARE
    assert "UNTESTED ON HARDWARE" in sev_evidence().assurance
    with pytest.raises(AttestationError, match="UNTESTED ON HARDWARE, and nobody accepted that"):
        SevSnpVerifier(amd().ark, [LAUNCH], TCB).check(sev_evidence(), EXPECTED)


WRONG_REPORTS = {
    "another image": ({"x90": b"l" * 48}, "launched from another image"),
    "another measurement": ({"xc0": OTHER}, "launched for another measurement"),
    "other report data": ({"x50": bytes(64)}, "for other keys"),
    "debug": ({"x8": struct.pack("<Q", POLICY | 1 << 19)}, "debugged or migrated"),
    "migration": ({"x8": struct.pack("<Q", POLICY | 1 << 18)}, "debugged or migrated"),
    "no policy": ({"x8": bytes(8)}, "debugged or migrated"),
    "privilege level": ({"x30": struct.pack("<II", 1, 1)}, "privilege level 1"),
    "algorithm": ({"x34": bytes(4)}, "not signed by a chip's own key"),
    "VLEK": ({"x48": struct.pack("<I", 1 << 2)}, "not signed by a chip's own key"),
    "nobody's key": ({"x48": struct.pack("<I", 7 << 2)}, "not signed by a chip's own key"),
    "masked chip": ({"x48": struct.pack("<I", 1 << 1)}, "not signed by a chip's own key"),
    "another chip": ({"x1a0": bytes(64)}, "a certificate of another chip"),
    "another version below": ({"x180": bytes([3, 0, 0, 0, 0, 0, 22, 213])}, "a certificate of another chip"),
    "version 1": ({"x0": struct.pack("<I", 1)}, "version 1"),
    "a later processor": (
        {"x0": struct.pack("<I", 3), "x188": b"\x1a"},
        "family 0x1a: its TCB cannot be read",
    ),
}


@pytest.mark.parametrize("what", WRONG_REPORTS)
def test_reports_that_are_signed_and_wrong_are_refused(what):
    changed, why = WRONG_REPORTS[what]
    with pytest.raises(AttestationError, match=why):
        sev_verifier().check(sev_evidence(report(**changed)), EXPECTED)


def test_old_firmware_is_refused():
    for at in range(4):
        newer = Tcb(*(number + (i == at) for i, number in enumerate(TCB)))
        with pytest.raises(AttestationError, match="older than what is trusted"):
            sev_verifier(least=newer).check(sev_evidence(), EXPECTED)


def test_certificates_that_do_not_lead_to_the_pinned_root_are_refused():
    ark, ask, vcek = amd().keys
    stranger = ec.generate_private_key(ec.SECP384R1())

    def leaf(**changed):
        given_ = {
            "name": "SEV-VCEK",
            "key": vcek,
            "issuer": "SEV-Test",
            "issuer_key": ask,
            "extensions": amd().extensions,
        }
        return certificate(**(given_ | changed))

    with pytest.raises(AttestationError, match="its chip did not sign"):
        sev_verifier().check(sev_evidence(report(key=stranger)), EXPECTED)
    for wrong in (
        {"vcek": leaf(issuer_key=stranger)},
        {"vcek": leaf(issuer="Another")},
        {"vcek": leaf(until=NOW - DAY)},
        {"vcek": leaf(extensions=amd().extensions[1:])},
        {"vcek": leaf(extensions=[*amd().extensions[:-1], (AMD + "4", bytes(64))])},
        {"vcek": leaf(key=rsa.generate_private_key(65537, 2048))},
        {"vcek": leaf(key=ec.generate_private_key(ec.SECP256R1()))},
        {"vcek": b"no certificate"},
        {"ask": certificate("SEV-Test", ask, "ARK-Test", rsa.generate_private_key(65537, 2048), ca=True)},
        {"ask": certificate("SEV-Test", ask, "ARK-Test", ark, ca=False)},
        {"ask": amd().vcek},
    ):
        with pytest.raises(AttestationError, match="certificate"):
            sev_verifier().check(sev_evidence(**wrong), EXPECTED)
    other = rsa.generate_private_key(65537, 2048)
    with pytest.raises(AttestationError, match="certificate"):
        sev_verifier(ark=certificate("ARK-Test", other, ca=True)).check(sev_evidence(), EXPECTED)
    with pytest.raises(AttestationError, match="certificate"):
        sev_verifier(ark=b"").check(sev_evidence(), EXPECTED)


def test_a_verifier_without_an_image_is_none():
    for launches in ([], [b"short"]):
        with pytest.raises(ConfigError):
            sev_verifier(launches=launches)


CLAIMS = {
    "nonce": {"nonce": b"o" * 32},
    "context": {"context": b"session 2"},
    "keys": {"keys": Keys(KEYS.signing, KEYS.agreement)},
    "measurement": {"measurement": OTHER},
    "kind": {"kind": "software"},
    "assurance": {"assurance": "AMD SEV-SNP report"},
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("kind", ["sev", "sgx"])
def test_hardware_evidence_is_for_what_it_was_made_for(kind, claim):
    verifier, evidence = (
        (sev_verifier(), sev_evidence()) if kind == "sev" else (sgx_verifier(), sgx_evidence())
    )
    verifier.check(evidence, EXPECTED)
    forged = dataclasses.replace(evidence, **CLAIMS[claim])
    with pytest.raises(AttestationError):
        verifier.check(forged, Expectation((CODE, OTHER), forged.nonce, forged.context))


@pytest.mark.parametrize("kind", ["sev", "sgx"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_hardware_evidence_is_refused_and_raises_nothing_else(kind, data):
    verifier, evidence = (sev_verifier(), _cached_sev()) if kind == "sev" else (sgx_verifier(), _cached_sgx())
    body = evidence.body
    i = data.draw(st.integers(0, 8 * len(body) - 1))
    flipped = body[: i // 8] + bytes((body[i // 8] ^ (1 << i % 8),)) + body[i // 8 + 1 :]
    for other in (flipped, body[: i // 8], body + data.draw(st.binary(min_size=1, max_size=4))):
        if kind == "sgx" and other is flipped and _same_certificates(flipped, body):
            continue
        with pytest.raises(AttestationError):
            verifier.check(dataclasses.replace(evidence, body=other), EXPECTED)


def _same_certificates(one, other):
    """PEM has many spellings; and the chain's last, the root, is not read: the pinned one is."""
    try:
        first, second = Quote.decode(one), Quote.decode(other)
        if dataclasses.replace(first, certificates=b"") != dataclasses.replace(second, certificates=b""):
            return False
        return gramine._issuer_and_leaf(first.certificates) == gramine._issuer_and_leaf(second.certificates)
    except (MessageError, AttestationError):
        return False


_cached_sev = functools.cache(lambda: sev_evidence())
_cached_sgx = functools.cache(lambda: sgx_evidence())


# SGX. Offsets: Intel SGX ECDSA QuoteLib Reference, A.4; report: SDM volume 3D, "REPORT".

ENCLAVE = b"E" * 32
INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
QUOTING = bytes.fromhex("8c4f5775d796503e96137f77c68a829a0056ac8ded70140b081b094490c57bff")


@functools.cache
def intel():
    root, platform, pck, attestation = (ec.generate_private_key(ec.SECP256R1()) for _ in range(4))
    return SimpleNamespace(
        root=certificate("SGX Root CA", root, ca=True),
        platform=certificate("SGX Platform CA", platform, "SGX Root CA", root, ca=True),
        pck=certificate("SGX PCK", pck, "SGX Platform CA", platform),
        keys=(root, platform, pck, attestation),
    )


def enclave_report(mrenclave, mrsigner, data, flags=0b101):
    """384 bytes: CPUSVN, MISCSELECT, ..., ATTRIBUTES at 48, MRENCLAVE at 64, MRSIGNER at 128, data at 320."""
    made = bytearray(384)
    made[0:16] = b"c" * 16
    made[48:64] = struct.pack("<QQ", flags, 3)
    made[64:96], made[128:160] = mrenclave, mrsigner
    made[256:260] = struct.pack("<HH", 1, 2)
    made[320:384] = data
    return bytes(made)


def sign(key, data):
    r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def sgx_quote(
    *,
    version=3,
    kind=2,
    tee=0,
    vendor=INTEL,
    enclave=ENCLAVE,
    data=BOUND,
    flags=0b101,
    quoting=QUOTING,
    quoting_flags=0b101,
    bound=None,
    attestation=None,
    pck=None,
    certified_by=5,
    certificates=None,
):
    _, _, platform_key, own = intel().keys
    own = attestation or own
    header = struct.pack("<HHIHH16s20s", version, kind, tee, 7, 8, vendor, b"u" * 20)
    signed = header + enclave_report(enclave, b"S" * 32, data, flags)
    point = own.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    key, authentication = point[1:], bytes(range(32))
    bound = hashlib.sha256(key + authentication).digest() + bytes(32) if bound is None else bound
    inner = enclave_report(b"Q" * 32, quoting, bound, quoting_flags)
    chain = (
        b"".join(map(pem, (intel().pck, intel().platform, intel().root)))
        if certificates is None
        else certificates
    )
    rest = sign(own, signed) + key + inner + sign(pck or platform_key, inner)
    rest += struct.pack("<H", len(authentication)) + authentication
    rest += struct.pack("<HI", certified_by, len(chain)) + chain
    return signed + struct.pack("<I", len(rest)) + rest


def sgx_evidence(**changed):
    return Evidence(gramine.KIND, gramine.ASSURANCE, CODE, KEYS, NONCE, CONTEXT, sgx_quote(**changed))


def sgx_verifier(**changed):
    return SgxVerifier(
        **({"root": intel().root, "enclaves": {CODE: ENCLAVE}, "accept_untested": True} | changed)
    )


def test_a_quote_is_read_at_the_documented_offsets():
    found = Quote.decode(sgx_quote())
    assert found.report == EnclaveReport(0b101, ENCLAVE, b"S" * 32, 1, 2, BOUND)
    assert len(found.signed) == 48 + 384
    assert (found.quoting.mrsigner, found.authentication) == (QUOTING, bytes(range(32)))
    assert found.certificates.count(b"BEGIN CERTIFICATE") == 3


def test_a_true_quote_is_accepted_and_says_that_it_is_untested():
    sgx_verifier().check(sgx_evidence(), EXPECTED)
    assert gramine.UNTESTED_ON_HARDWARE
    assert "UNTESTED ON HARDWARE" in sgx_evidence().assurance
    with pytest.raises(AttestationError, match="UNTESTED ON HARDWARE, and nobody accepted that"):
        SgxVerifier(intel().root, {CODE: ENCLAVE}).check(sgx_evidence(), EXPECTED)


def wrong_quotes():
    stranger = ec.generate_private_key(ec.SECP256R1())
    _, platform, _, _ = intel().keys
    other = certificate("SGX PCK", stranger, "SGX Platform CA", stranger)
    late = certificate("SGX PCK", intel().keys[2], "SGX Platform CA", platform, until=NOW - DAY)
    return {
        "version 4": ({"version": 4}, "no SGX quote of version 3"),
        "another kind of key": ({"kind": 3}, "no SGX quote of version 3"),
        "TDX": ({"tee": 0x81}, "no SGX quote of version 3"),
        "another vendor": ({"vendor": bytes(16)}, "no SGX quote of version 3"),
        "another enclave": ({"enclave": b"e" * 32}, "another enclave"),
        "other report data": ({"data": bytes(64)}, "for other keys"),
        "a debug enclave": ({"flags": 0b111}, "may be debugged"),
        "not initialised": ({"flags": 0b100}, "may be debugged"),
        "another quoting enclave": ({"quoting": b"q" * 32}, "not Intel's"),
        "a debug quoting enclave": ({"quoting_flags": 0b111}, "not Intel's"),
        "another attestation key": ({"bound": bytes(64)}, "does not vouch for"),
        "more in the vouching": ({"bound": b"\x01" * 64}, "does not vouch for"),
        "a key that is not the platform's": ({"pck": stranger}, "quoting enclave's report was not signed"),
        "no chain": ({"certified_by": 1}, "certified by data of type 1"),
        "no certificates": ({"certificates": b""}, "without a chain"),
        "one certificate": ({"certificates": pem(intel().pck)}, "without a chain"),
        "a stranger's certificate": ({"certificates": pem(other) + pem(intel().platform)}, "certificate"),
        "an old certificate": ({"certificates": pem(late) + pem(intel().platform)}, "out of date"),
    }


@pytest.mark.parametrize("what", wrong_quotes())
def test_quotes_that_are_signed_and_wrong_are_refused(what):
    changed, why = wrong_quotes()[what]
    with pytest.raises(AttestationError, match=why):
        sgx_verifier().check(sgx_evidence(**changed), EXPECTED)


def test_a_quote_whose_signature_is_anothers_is_refused():
    body = bytearray(sgx_quote())
    at = 48 + 384 + 4
    body[at : at + 64] = sign(ec.generate_private_key(ec.SECP256R1()), bytes(body[: 48 + 384]))
    with pytest.raises(AttestationError, match="the quote was not signed"):
        sgx_verifier().check(dataclasses.replace(sgx_evidence(), body=bytes(body)), EXPECTED)


def test_an_enclave_of_another_measurement_is_refused():
    swapped = sgx_verifier(enclaves={OTHER: ENCLAVE})
    with pytest.raises(AttestationError, match="another enclave than this measurement's"):
        swapped.check(sgx_evidence(), EXPECTED)
    for enclaves in ({}, {CODE: b"short"}):
        with pytest.raises(ConfigError):
            sgx_verifier(enclaves=enclaves)


@given(st.binary(max_size=1500))
@settings(max_examples=200, deadline=None)
def test_reading_layouts_is_total(data):
    for read in (Report.decode, Quote.decode, EnclaveReport.decode):
        with pytest.raises(MessageError):
            read(data)


# Gramine

HASH = "ab" * 32


@pytest.fixture
def files(tmp_path):
    (tmp_path / "site" / "baffle").mkdir(parents=True)
    (tmp_path / "site" / "baffle" / "stream.py").write_bytes(b"words = 1\n")
    (tmp_path / "python3").write_bytes(b"an interpreter")
    return {"/runtime/site": tmp_path / "site", "/runtime/bin/python3": tmp_path / "python3"}


MANIFEST = Manifest({"baffle/a.py": HASH}, {}, {}, HASH, {}, {}, HASH)
ARGV = ["/runtime/bin/python3", "-I", "-c", 'print("worker")']


def rendered(text):
    """What ``gramine-manifest`` fills in."""
    return tomllib.loads(
        text.replace("{{ gramine.libos }}", "/g/libos.so").replace("{{ gramine.runtimedir() }}", "/g/lib")
    )


def test_a_gramine_manifest_trusts_every_file_by_hash_and_nothing_else(files, tmp_path):
    found = rendered(gramine_manifest(MANIFEST, files, ARGV, {"LC_ALL": "C.UTF-8"}, enclave_size="256M"))
    hashed = {
        entry["uri"]: entry["sha256"] for entry in found["sgx"]["trusted_files"] if isinstance(entry, dict)
    }
    assert hashed == {
        f"file:{tmp_path}/python3": hashlib.sha256(b"an interpreter").hexdigest(),
        f"file:{tmp_path}/site/baffle/stream.py": hashlib.sha256(b"words = 1\n").hexdigest(),
    }
    plain = [entry for entry in found["sgx"]["trusted_files"] if isinstance(entry, str)]
    assert plain == ["file:/g/libos.so", "file:/g/lib/"]  # Gramine's own: gramine-sgx-sign hashes them
    assert found["sgx"] | {"trusted_files": None} == {
        "debug": False,
        "enclave_size": "256M",
        "max_threads": 4,
        "remote_attestation": "dcap",
        "trusted_files": None,
    }
    assert found["loader"] == {
        "entrypoint": "file:/g/libos.so",
        "argv": ARGV,
        "log_level": "error",
        "env": {"LC_ALL": "C.UTF-8", "BAFFLE_MEASUREMENT": MANIFEST.measurement.hex()},
    }
    assert found["libos"]["entrypoint"] == ARGV[0]
    assert found["fs"]["root"] == {"type": "tmpfs"}
    assert found["fs"]["mounts"] == [
        {"path": "/lib", "uri": "file:/g/lib"},
        {"path": "/runtime/bin/python3", "uri": f"file:{tmp_path}/python3"},
        {"path": "/runtime/site", "uri": f"file:{tmp_path}/site"},
    ]
    assert found["sys"]["disallow_subprocesses"] is True


def test_a_gramine_manifest_has_no_setting_that_gramine_calls_insecure(files):
    text = gramine_manifest(MANIFEST, files, ARGV, {})
    assert not any(
        word in text for word in ("insecure__", "allowed_files", "passthrough", "file_check_policy")
    )


def test_what_gramine_would_not_take_is_refused(files, tmp_path):
    def make(**changed):
        given_ = {"manifest": MANIFEST, "files": files, "argv": ARGV, "environment": {}}
        return gramine_manifest(**(given_ | changed))

    for size in ("300M", "0M", "512", "512MB", "-512M", "M", "512M\n"):
        with pytest.raises(ConfigError, match="power of two"):
            make(enclave_size=size)
    with pytest.raises(ConfigError, match="at least 4 threads"):
        make(threads=3)
    for text in ("two\nlines", "{{ env.get('SECRET') }}", "{% set x = 1 %}", "{# gone"):
        with pytest.raises(ConfigError, match="cannot hold"):
            make(argv=[*ARGV, text])
    with pytest.raises(ConfigError, match="no name of a variable"):
        make(environment={'X" = 1': "y"})
    (tmp_path / "site" / "link").symlink_to("baffle")
    with pytest.raises(ConfigError, match="is a link"):
        make()
