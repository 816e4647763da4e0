"""TPM 2.0 as a root: quotes of a register that holds the measurement; a key and a counter that stay there.

``TpmRoot`` runs the commands of tpm2-tools (4 or later). It resets register (PCR) 23, extends it with the
measurement, and lets a key that signs nothing but what the TPM itself states (restricted, fixed to this TPM,
made again from its endorsement seed each time) sign the register and the first 32 bytes of the report data.
``TpmVerifier`` reads what was signed (TPMS_ATTEST: TPM 2.0 Library, Part 2, 10.12) in Python.

What it proves: a program on the machine of *this* TPM said this measurement after the nonce was known, while
the registers named in ``boot`` had the values pinned. What it does not prove: that the program measured is
the one that runs. Whoever may use the TPM can put any measurement into register 23, and unseal what is sealed
to it. To close that takes a system started from a measured image (its registers pinned by ``boot``) that lets
only the launcher use the TPM. Nor is it checked here that the pinned key lies in a real TPM: whoever enrols a
machine has to see to that.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from baffle.enclave.evidence import AttestationError, Evidence, Expectation, check_claims, same
from baffle.enclave.sealing import write_whole
from baffle.errors import ConfigError, DataError, MessageError
from baffle.secagg.primitives import derive, random_bytes
from baffle.wire import Cursor

KIND = "tpm2"
ASSURANCE = "TPM 2.0 quote by a pinned key; that its TPM is a real one, and who may use it, is not checked"
PCR = 23  # the register that applications may reset
COUNTER = 0x01500023  # in the range that TCG leaves to owners
QUALIFYING_BYTES = 32
_SHA256, _ECDSA, _ECC, _P256, _NULL, _KEYEDHASH = 0x000B, 0x0018, 0x0023, 0x0003, 0x0010, 0x0008
_MAGIC, _QUOTE = 0xFF544347, 0x8018
_POLICY_PCR = bytes.fromhex("0000017f")
# fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign; of the sealed key the first two
_SIGNS, _SEALED = 0x00050072, 0x00000012
_SIGNING = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
_LEAVING = "createprimary", "create", "load", "quote", "unseal", "readpublic"  # objects in the TPM
_SECONDS = 60.0
_LABEL = b"baffle tpm root sealing v1"


class TpmRoot:
    """A ``Root`` in a TPM. ``tcti``: how to reach it, e.g. "device:/dev/tpmrm0" or "swtpm:path=SOCKET".

    ``folder`` holds the sealed key of each measurement, which opens in this TPM alone, and only while its
    registers are as they were. ``boot``: the registers beside 23 that are quoted, and sealed to. ``counter``:
    the index of the TPM's own counter, one for each state that is sealed; it is made where it is missing, and
    starts above every counter that this TPM ever had. Raises AttestationError where a command fails.
    """

    kind = KIND
    assurance = ASSURANCE

    def __init__(self, tcti: str, folder: Path, *, boot: Sequence[int] = (), counter: int = COUNTER) -> None:
        if not all(0 <= index < PCR for index in boot):
            raise ConfigError(f"registers of the start lie in [0, {PCR}): {list(boot)}")
        self._tcti, self._folder, self._registers = tcti, folder, sorted({*boot, PCR})
        self._index = hex(counter)
        self._selection = "sha256:" + ",".join(map(str, self._registers))

    @property
    def public(self) -> bytes:
        """The attestation key as a TPMT_PUBLIC: what a ``TpmVerifier`` pins. The TPM keeps it for good."""
        with _Commands(self._tcti, self._folder) as run:
            return self._signing(run)

    def quote(self, measurement: bytes, report_data: bytes) -> bytes:
        with _Commands(self._tcti, self._folder) as run:
            self._signing(run)
            self._measure(run, measurement)
            qualifying = report_data[:QUALIFYING_BYTES].hex()
            run(f"quote -c ak -l {self._selection} -q {qualifying} -g sha256 -m m -s s")
            signed, signature = run.read("m"), run.read("s")
        return struct.pack("<HH", len(signed), len(signature)) + signed + signature

    def sealing_key(self, measurement: bytes) -> bytes:
        """Random, made once for a measurement, sealed to it, and unsealed by the TPM each time."""
        path = self._folder / f"{measurement.hex()}.sealed"
        with _Commands(self._tcti, self._folder) as run:
            self._measure(run, measurement)
            values = self._values(run)
            run("createprimary -C o -G ecc256 -c parent")
            if not path.exists():
                run.write("policy", policy(values))
                sealed = "create -C parent -i - -u public -r private -L policy -a fixedtpm|fixedparent"
                run(sealed, given=random_bytes(32))
                write_whole(path, run.read("public") + run.read("private"))
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"cannot read the sealed key {path}: {error.strerror}") from error
            public, private = _split(data, path)
            if not public[2:].startswith(_sealed_under(policy(values))):
                raise AttestationError(f"{path} is not sealed to this measurement on this system")
            run.write("public", public)
            run.write("private", private)
            run("load -C parent -u public -r private -c sealed")
            key = run(f"unseal -c sealed -p pcr:{self._selection}")
        return derive(key, _LABEL, measurement)

    def counter(self) -> int:
        with _Commands(self._tcti, self._folder) as run:
            return self._counter(run)

    def advance(self, to: int) -> None:
        """One increment a step: ``to`` is meant to be near."""
        with _Commands(self._tcti, self._folder) as run:
            now = self._counter(run)
            if to <= now:
                raise AttestationError(f"the TPM's counter is {now}: it does not go back to {to}")
            for _ in range(to - now):
                run(f"nvincrement -C o {self._index}")

    def _signing(self, run: _Commands) -> bytes:
        run(f"createprimary -C e -G ecc256:ecdsa-sha256:null -a {_SIGNING} -c ak")
        run("readpublic -c ak -f tss -o public")
        return run.read("public")[2:]

    def _measure(self, run: _Commands, measurement: bytes) -> None:
        run(f"pcrreset {PCR}")
        run(f"pcrextend {PCR}:sha256={measurement.hex()}")

    def _values(self, run: _Commands) -> dict[int, bytes]:
        run(f"pcrread {self._selection} -o values")
        values = run.read("values")
        return {index: values[32 * i : 32 * i + 32] for i, index in enumerate(self._registers)}

    def _counter(self, run: _Commands) -> int:
        if self._index not in run("getcap handles-nv-index").decode().split():
            run(f"nvdefine -C o -s 8 -a ownerread|ownerwrite|nt=counter {self._index}")
            run(f"nvincrement -C o {self._index}")  # it has no value before
        if "|nt=0x1|" not in run(f"nvreadpublic {self._index}").decode():
            raise AttestationError(
                f"the TPM's index {self._index} is no counter: it belongs to something else"
            )
        return int.from_bytes(run(f"nvread -C o -s 8 {self._index}"), "big")


class TpmVerifier:
    """Trusts the TPM whose attestation key is ``public`` (``TpmRoot.public``), and nobody else.

    ``boot``: register → the value (32 bytes) that it must have: all of those beside 23 that are quoted.
    ConfigError for a key that could sign other things than a TPM's own statements.
    """

    def __init__(self, public: bytes, *, boot: Mapping[int, bytes] | None = None) -> None:
        self._boot = dict(boot or {})
        if not all(0 <= index < PCR and len(value) == 32 for index, value in self._boot.items()):
            raise ConfigError(f"registers of the start lie in [0, {PCR}), and have 32 bytes")
        self._key = _public_key(public)

    def check(self, evidence: Evidence, expected: Expectation) -> None:
        check_claims(evidence, expected, KIND, ASSURANCE)
        try:
            cursor = Cursor(evidence.body)
            sizes = cursor.integer("H"), cursor.integer("H")
            signed, signature = map(cursor.take, sizes)
            cursor.end()
            self._check_signature(signed, signature)
            qualifying, selection, digest = _quoted(signed)
        except MessageError as error:
            raise AttestationError(f"a TPM's quote that cannot be read: {error}") from error
        values = self._boot | {PCR: extended(evidence.measurement)}
        if not same(qualifying, evidence.report_data[:QUALIFYING_BYTES]):
            raise AttestationError("a quote for other keys, another nonce or another context")
        if not same(selection, _selected(values)):
            raise AttestationError(f"a quote of other registers than {sorted(values)}")
        if not same(digest, _digest_of(values)):
            raise AttestationError("the TPM's registers do not hold this measurement on the system trusted")

    def _check_signature(self, signed: bytes, signature: bytes) -> None:
        """TPMT_SIGNATURE: ECDSA with SHA-256."""
        cursor = Cursor(signature)
        if cursor.take(4) != struct.pack(">HH", _ECDSA, _SHA256):
            raise MessageError("a signature by other algorithms than ECDSA with SHA-256")
        r, s = (int.from_bytes(_sized(cursor), "big") for _ in range(2))
        cursor.end()
        der = utils.encode_dss_signature(r, s)
        try:
            self._key.verify(der, signed, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise AttestationError("the TPM that is trusted did not sign this quote") from error


def extended(measurement: bytes) -> bytes:
    """What a register holds that was reset to zeros and extended once."""
    return hashlib.sha256(bytes(32) + measurement).digest()


def policy(values: Mapping[int, bytes]) -> bytes:
    """The digest of the policy "these registers hold these values" (Part 3: Commands, TPM2_PolicyPCR)."""
    return hashlib.sha256(bytes(32) + _POLICY_PCR + _selected(values) + _digest_of(values)).digest()


def _digest_of(values: Mapping[int, bytes]) -> bytes:
    return hashlib.sha256(b"".join(values[index] for index in sorted(values))).digest()


def _selected(values: Mapping[int, bytes]) -> bytes:
    """TPML_PCR_SELECTION of one bank: SHA-256, three bytes of bits, the lowest register first."""
    bits = sum(1 << index for index in values)
    return struct.pack(">IHB", 1, _SHA256, 3) + bits.to_bytes(3, "little")


def _sealed_under(digest: bytes) -> bytes:
    """How the TPMT_PUBLIC of an object begins that this TPM alone opens, by that policy alone."""
    return struct.pack(">HHIH", _KEYEDHASH, _SHA256, _SEALED, len(digest)) + digest


def _public_key(public: bytes) -> ec.EllipticCurvePublicKey:
    """TPMT_PUBLIC of a restricted P-256 signing key."""
    head = struct.pack(">HHIHHHHHH", _ECC, _SHA256, _SIGNS, 0, _NULL, _ECDSA, _SHA256, _P256, _NULL)
    sizes = len(head), len(head) + 34
    if len(public) != len(head) + 68 or not public.startswith(head):
        raise ConfigError("no public area of a restricted P-256 key that signs with ECDSA and SHA-256")
    if any(public[at : at + 2] != b"\x00\x20" for at in sizes):
        raise ConfigError("a P-256 key has two coordinates of 32 bytes")
    x, y = (int.from_bytes(public[at + 2 : at + 34], "big") for at in sizes)
    try:
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError as error:
        raise ConfigError("a public key that is no point of P-256") from error


def _quoted(signed: bytes) -> tuple[bytes, bytes, bytes]:
    """TPMS_ATTEST of a quote → qualifying data, selection (as it lies there), digest of the registers.

    Skipped are the signer's name, which follows from the key that was verified, the clock (17 bytes) and the
    firmware's version (8).
    """
    cursor = Cursor(signed)
    if cursor.take(6) != struct.pack(">IH", _MAGIC, _QUOTE):
        raise MessageError("not made by a TPM, or no quote")
    _, qualifying = _sized(cursor), _sized(cursor)
    cursor.take(17 + 8)
    start = cursor.at
    for _ in range(int.from_bytes(cursor.take(4), "big")):  # a bank takes three bytes at least
        cursor.take(cursor.take(3)[2])
    selection, digest = signed[start : cursor.at], _sized(cursor)
    cursor.end()
    return qualifying, selection, digest


def _sized(cursor: Cursor) -> bytes:
    """What TPM 2.0 calls a TPM2B: u16 length, big-endian as all its numbers, and as many bytes."""
    return cursor.take(int.from_bytes(cursor.take(2), "big"))


def _split(data: bytes, path: Path) -> tuple[bytes, bytes]:
    """TPM2B_PUBLIC and TPM2B_PRIVATE, which lie one behind the other."""
    cursor = Cursor(data)
    try:
        size = len(_sized(cursor)) + 2
        _sized(cursor)
        cursor.end()
    except MessageError as error:
        raise AttestationError(f"{path} is no sealed key: {error}") from error
    return data[:size], data[size:]


class _Commands:
    """tpm2-tools in a temporary folder, one root of ``folder`` at a time. No secret is ever an argument."""

    def __init__(self, tcti: str, folder: Path) -> None:
        self._tcti, self._lock = tcti, folder / "tpm.lock"
        # Between commands nobody swaps a simulator's keys out, as a resource manager does for a device.
        self._flushes = tcti.startswith(("swtpm", "mssim"))

    def __enter__(self) -> _Commands:
        try:
            self._file = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataError(f"cannot use {self._lock}: {error.strerror}") from error
        fcntl.flock(self._file, fcntl.LOCK_EX)  # reset, extend and quote belong together
        self._folder = tempfile.TemporaryDirectory(prefix="baffle-tpm-")
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()
        os.close(self._file)

    def read(self, name: str) -> bytes:
        return Path(self._folder.name, name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        Path(self._folder.name, name).write_bytes(data)

    def __call__(self, line: str, *, given: bytes = b"") -> bytes:
        out = self._run(line.split(), given)
        if self._flushes and line.split()[0] in _LEAVING:
            self._run(["flushcontext", "-t"])
        return out

    def _run(self, words: list[str], given: bytes = b"") -> bytes:
        command, *arguments = words
        try:
            done = subprocess.run(
                [f"tpm2_{command}", *arguments],
                input=given,
                capture_output=True,
                cwd=self._folder.name,
                env={"PATH": os.environ.get("PATH", os.defpath), "TPM2TOOLS_TCTI": self._tcti},
                timeout=_SECONDS,
            )
        except FileNotFoundError as error:
            raise AttestationError(
                "the commands of tpm2-tools are not there (apt install tpm2-tools)"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise AttestationError(f"tpm2_{command} did not end within {_SECONDS:g} s") from error
        if done.returncode:
            said = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "ERROR" in line]
            raise AttestationError(f"tpm2_{command} failed: {said[0] if said else done.returncode}")
        return done.stdout
