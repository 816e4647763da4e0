"""A TPM 2.0 as the root of trust, against the simulator: quotes, sealing, a counter that cannot go back."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.enclave import tpm
from baffle.enclave.evidence import AttestationError, Challenge, Expectation, Keys, accept, attest
from baffle.enclave.sealing import SealedState, seal, unseal
from baffle.enclave.tpm import TpmRoot, TpmVerifier
from baffle.errors import ConfigError, DataError

NEEDED = "swtpm", "tpm2_quote", "tpm2_checkquote"
missing = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"not installed: {', '.join(missing)} (apt install swtpm tpm2-tools)"
)

KEYS = Keys(bytes(range(32)), bytes(range(32, 64)))
CODE, OTHER, NONCE, CONTEXT = b"m" * 32, b"o" * 32, b"n" * 32, b"session 1"
EXPECTED = Expectation((CODE,), NONCE, CONTEXT)


@contextlib.contextmanager
def simulator():
    """A TPM of its own in a temporary folder, ended whatever happens → its TCTI."""
    folder = Path(tempfile.mkdtemp(prefix="swtpm-"))  # short: a socket's path has at most 107 bytes
    socket, control = folder / "s", folder / "s.ctrl"  # tpm2-tss looks for the second where the first is
    arguments = ["--tpmstate", f"dir={folder}", "--flags", "not-need-init,startup-clear"]
    arguments += ["--server", f"type=unixio,path={socket}", "--ctrl", f"type=unixio,path={control}"]
    process = subprocess.Popen(
        ["swtpm", "socket", "--tpm2", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 20
        while not (socket.exists() and control.exists()):
            assert process.poll() is None, "swtpm ended"
            assert time.monotonic() < until, "swtpm did not start"
            time.sleep(0.01)
        yield f"swtpm:path={socket}"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tcti():
    with simulator() as found:
        yield found


@pytest.fixture
def root(tcti, tmp_path):
    return TpmRoot(tcti, tmp_path)


def tool(tcti, *arguments, folder=None):
    """A command of tpm2-tools as anybody on the machine may run it."""
    return subprocess.run(
        [f"tpm2_{arguments[0]}", *arguments[1:]],
        env={"PATH": os.environ["PATH"], "TPM2TOOLS_TCTI": tcti},
        cwd=folder,
        capture_output=True,
        timeout=60,
    )


# Quotes


def test_a_quote_is_accepted_by_who_pinned_its_key(root):
    challenge, verifier = Challenge(), TpmVerifier(root.public)
    nonce = challenge.issue(CONTEXT)
    data = attest(root, CODE, KEYS, nonce, CONTEXT).encode()
    evidence = accept(data, challenge, verifier, [CODE])
    assert evidence.keys == KEYS
    assert (evidence.kind, evidence.assurance) == ("tpm2", tpm.ASSURANCE)
    assert "not checked" in evidence.assurance  # it says what it does not prove
    with pytest.raises(AttestationError, match="was used already"):
        accept(data, challenge, verifier, [CODE])


FORGERIES = {
    "other keys": (
        {"keys": Keys(KEYS.signing, KEYS.agreement)},
        "other keys, another nonce or another context",
    ),
    "another nonce": ({"nonce": b"o" * 32}, "other keys, another nonce or another context"),
    "another context": ({"context": b"session 2"}, "other keys, another nonce or another context"),
    "another measurement": ({"measurement": OTHER}, "do not hold this measurement"),
    "another kind": ({"kind": "software"}, "kind 'software'"),
    "a finer assurance": ({"assurance": "hardware"}, "claims the assurance"),
    "no body": ({"body": b""}, "cannot be read"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_quote_is_for_what_it_was_made_for(root, what):
    changed, why = FORGERIES[what]
    verifier, evidence = TpmVerifier(root.public), attest(root, CODE, KEYS, NONCE, CONTEXT)
    verifier.check(evidence, EXPECTED)
    forged = dataclasses.replace(evidence, **changed)
    expected = Expectation((forged.measurement,), forged.nonce, forged.context)  # what would suit the forger
    with pytest.raises(AttestationError, match=why):
        verifier.check(forged, expected)


def test_a_quote_of_another_tpm_is_refused(root, tmp_path):
    verifier = TpmVerifier(root.public)
    with simulator() as other:
        stranger = TpmRoot(other, tmp_path)
        assert stranger.public != root.public
        evidence = attest(stranger, CODE, KEYS, NONCE, CONTEXT)
        TpmVerifier(stranger.public).check(evidence, EXPECTED)
    with pytest.raises(AttestationError, match="did not sign"):
        verifier.check(evidence, EXPECTED)


def test_a_quote_is_what_tpm2_checkquote_says_it_is(root, tcti, tmp_path):
    """The oracle: tpm2-tools' own verification, of the same bytes."""
    evidence = attest(root, CODE, KEYS, NONCE, CONTEXT)
    (size,) = struct.unpack_from("<H", evidence.body)
    (tmp_path / "message").write_bytes(evidence.body[4 : 4 + size])
    (tmp_path / "signature").write_bytes(evidence.body[4 + size :])
    (tmp_path / "key").write_bytes(struct.pack(">H", len(root.public)) + root.public)
    check = ("checkquote", "-u", "key", "-m", "message", "-s", "signature", "-g", "sha256")
    qualifying = evidence.report_data[:32].hex()
    assert tool(tcti, *check, "-q", qualifying, folder=tmp_path).returncode == 0
    assert tool(tcti, *check, "-q", bytes(32).hex(), folder=tmp_path).returncode != 0
    TpmVerifier(root.public).check(evidence, EXPECTED)
    register = tool(tcti, "pcrread", "sha256:23").stdout.decode()
    assert tpm.extended(CODE).hex().upper() in register.upper()


def test_what_a_program_signs_itself_is_no_quote(root, tcti, tmp_path):
    """The key is restricted: the TPM refuses to sign bytes that begin like its own statements."""
    evidence = attest(root, CODE, KEYS, NONCE, CONTEXT)
    (size,) = struct.unpack_from("<H", evidence.body)
    forged = evidence.body[4 : 4 + size].replace(evidence.report_data[:32], bytes(32))
    (tmp_path / "message").write_bytes(forged)
    key = ("-C", "e", "-G", "ecc256:ecdsa-sha256:null", "-a", tpm._SIGNING, "-c", "ak")
    made = tool(tcti, "createprimary", "-Q", *key, folder=tmp_path)
    assert made.returncode == 0
    signed = tool(tcti, "sign", "-c", "ak", "-g", "sha256", "-o", "signature", "message", folder=tmp_path)
    tool(tcti, "flushcontext", "-t")
    assert signed.returncode != 0
    assert not (tmp_path / "signature").exists()


def test_another_statement_of_the_same_tpm_is_no_quote(root, tcti, tmp_path):
    """The key signs whatever the TPM states: the time, say, with qualifying data that anybody chooses."""
    evidence = attest(root, CODE, KEYS, NONCE, CONTEXT)
    key = ("-C", "e", "-G", "ecc256:ecdsa-sha256:null", "-a", tpm._SIGNING, "-c", "ak")
    ask = ("-c", "ak", "-q", evidence.report_data[:32].hex(), "-o", "signature", "--attestation", "message")
    for command in (
        ("createprimary", "-Q", *key),
        ("flushcontext", "-t"),
        ("gettime", "-Q", "-g", "sha256", *ask),
    ):
        done = tool(tcti, *command, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    tool(tcti, "flushcontext", "-t")
    message, signature = ((tmp_path / name).read_bytes() for name in ("message", "signature"))
    body = struct.pack("<HH", len(message), len(signature)) + message + signature
    with pytest.raises(AttestationError, match="not made by a TPM, or no quote"):
        TpmVerifier(root.public).check(dataclasses.replace(evidence, body=body), EXPECTED)


def test_keys_that_could_sign_anything_are_not_pinned(root):
    public = root.public
    TpmVerifier(public)
    unrestricted = struct.pack(">I", struct.unpack_from(">I", public, 4)[0] & ~0x00010000)
    movable = struct.pack(">I", struct.unpack_from(">I", public, 4)[0] & ~0x00000002)
    for wrong in (
        b"",
        public[:-1],
        public + b"\x00",
        public[:4] + unrestricted + public[8:],
        public[:4] + movable + public[8:],
        public[:-32] + bytes(32),  # no point of the curve
        public[:20] + b"\x00\x21" + public[22:],
    ):
        with pytest.raises(ConfigError):
            TpmVerifier(wrong)


def test_the_registers_of_the_start_are_pinned(tcti, tmp_path):
    """A quote that covers register 7 is refused once the system is another, or where it is not covered."""
    root = TpmRoot(tcti, tmp_path, boot=(0, 7))
    start = {0: bytes(32), 7: bytes(32)}
    evidence = attest(root, CODE, KEYS, NONCE, CONTEXT)
    TpmVerifier(root.public, boot=start).check(evidence, EXPECTED)
    with pytest.raises(AttestationError, match="do not hold this measurement on the system"):
        TpmVerifier(root.public, boot=start | {7: b"s" * 32}).check(evidence, EXPECTED)
    for other in ({}, {0: bytes(32)}, {0: bytes(32), 8: bytes(32)}):
        with pytest.raises(AttestationError, match="a quote of other registers"):
            TpmVerifier(root.public, boot=other).check(evidence, EXPECTED)
    with pytest.raises(ConfigError):
        TpmVerifier(root.public, boot={7: b"short"})
    for wrong in ((23,), (24,), (-1,)):
        with pytest.raises(ConfigError):
            TpmRoot(tcti, tmp_path, boot=wrong)
    with simulator() as other:
        root = TpmRoot(other, tmp_path, boot=(7,))
        verifier = TpmVerifier(root.public, boot={7: bytes(32)})
        verifier.check(attest(root, CODE, KEYS, NONCE, CONTEXT), EXPECTED)
        key = root.sealing_key(CODE)
        assert root.sealing_key(CODE) == key
        tool(other, "pcrextend", f"7:sha256={'ab' * 32}")  # another system was started
        with pytest.raises(AttestationError, match="on the system trusted"):
            verifier.check(attest(root, CODE, KEYS, NONCE, CONTEXT), EXPECTED)
        with pytest.raises(AttestationError, match="not sealed to this measurement on this system"):
            root.sealing_key(CODE)


def test_whoever_may_use_the_tpm_can_claim_a_measurement(tcti, tmp_path, root):
    """The limit that docs/enclave.md states: register 23 is anybody's who may use the TPM."""
    (tmp_path / "elsewhere").mkdir()
    liar = TpmRoot(tcti, tmp_path / "elsewhere")
    TpmVerifier(root.public).check(attest(liar, CODE, KEYS, NONCE, CONTEXT), EXPECTED)


@pytest.fixture(scope="module")
def signed(tcti, tmp_path_factory):
    root = TpmRoot(tcti, tmp_path_factory.mktemp("signed"))
    return attest(root, CODE, KEYS, NONCE, CONTEXT), TpmVerifier(root.public)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_quotes_are_refused_and_raise_nothing_else(signed, data):
    evidence, verifier = signed
    body = evidence.body
    i = data.draw(st.integers(0, 8 * len(body) - 1))
    flipped = body[: i // 8] + bytes((body[i // 8] ^ (1 << i % 8),)) + body[i // 8 + 1 :]
    piece = data.draw(st.binary(min_size=1, max_size=8))
    for other in (flipped, body[: i // 8], body + piece, body[: i // 8] + piece + body[i // 8 :], piece):
        with pytest.raises(AttestationError):
            verifier.check(dataclasses.replace(evidence, body=other), EXPECTED)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_reading_a_statement_is_total(signed, data):
    """Whatever the bytes are that a signature would be over: read, or refused."""
    (size,) = struct.unpack_from("<H", signed[0].body)
    statement = bytearray(signed[0].body[4 : 4 + size])
    for _ in range(data.draw(st.integers(1, 3))):
        statement[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, size))
    for other in (bytes(statement), bytes(statement[:cut]), bytes(statement) + b"x"):
        with contextlib.suppress(tpm.MessageError):
            tpm._quoted(other)
    qualifying, selection, digest = tpm._quoted(signed[0].body[4 : 4 + size])
    assert qualifying == signed[0].report_data[:32]
    assert selection == bytes.fromhex("00000001000b03000080")
    assert digest == hashlib.sha256(tpm.extended(CODE)).digest()


# Sealing


def test_the_policy_is_the_one_that_the_tpm_computes(root, tcti, tmp_path):
    """The oracle: a trial session of the simulator."""
    root.quote(CODE, bytes(64))  # register 23 holds the measurement
    for command in (
        ("startauthsession", "-S", "session"),
        ("policypcr", "-S", "session", "-l", "sha256:23", "-L", "digest"),
        ("flushcontext", "session"),
    ):
        assert tool(tcti, *command, folder=tmp_path).returncode == 0
    assert (tmp_path / "digest").read_bytes() == tpm.policy({23: tpm.extended(CODE)})


def test_a_sealed_key_is_the_measurements_and_this_tpms(root, tcti, tmp_path):
    key = root.sealing_key(CODE)
    assert len(key) == 32
    assert TpmRoot(tcti, tmp_path).sealing_key(CODE) == key
    assert root.sealing_key(OTHER) != key
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {f"{CODE.hex()}.sealed", f"{OTHER.hex()}.sealed", "tpm.lock"}
    os.replace(tmp_path / f"{CODE.hex()}.sealed", tmp_path / f"{OTHER.hex()}.sealed")
    with pytest.raises(AttestationError, match="not sealed to this measurement"):
        root.sealing_key(OTHER)
    with simulator() as stranger:  # the folder was stolen: another TPM cannot load it
        os.replace(tmp_path / f"{OTHER.hex()}.sealed", tmp_path / f"{CODE.hex()}.sealed")
        with pytest.raises(AttestationError, match="tpm2_load failed"):
            TpmRoot(stranger, tmp_path).sealing_key(CODE)
    assert root.sealing_key(CODE) == key


def test_damaged_sealed_keys_are_refused(root, tmp_path):
    root.sealing_key(CODE)
    path = tmp_path / f"{CODE.hex()}.sealed"
    data = path.read_bytes()
    for other in (b"", data[:1], data[:-1], data + b"x", bytes(len(data)), data[:-9] + bytes(9)):
        path.write_bytes(other)
        with pytest.raises(AttestationError):
            root.sealing_key(CODE)


def test_the_tpm_gives_the_key_to_no_other_register(root, tcti, tmp_path):
    """What this library refuses by reading, the TPM refuses itself: another value of register 23."""
    root.sealing_key(CODE)
    public, private = tpm._split((tmp_path / f"{CODE.hex()}.sealed").read_bytes(), tmp_path)
    (tmp_path / "public").write_bytes(public)
    (tmp_path / "private").write_bytes(private)

    def unsealed(measurement):
        root.quote(measurement, bytes(64))
        for command in (
            ("createprimary", "-Q", "-C", "o", "-G", "ecc256", "-c", "parent"),
            ("flushcontext", "-t"),
            ("load", "-Q", "-C", "parent", "-u", "public", "-r", "private", "-c", "sealed"),
            ("flushcontext", "-t"),
        ):
            assert tool(tcti, *command, folder=tmp_path).returncode == 0
        done = tool(tcti, "unseal", "-c", "sealed", "-p", "pcr:sha256:23", folder=tmp_path)
        for kind in ("-t", "-l"):
            tool(tcti, "flushcontext", kind)
        return done

    assert len(unsealed(CODE).stdout) == 32
    refused = unsealed(OTHER)
    assert (refused.returncode != 0, refused.stdout) == (True, b"")


# The counter


def test_the_counter_only_grows_even_when_it_is_deleted(tcti, tmp_path):
    index = 0x01500042
    root = TpmRoot(tcti, tmp_path, counter=index)
    first = root.counter()
    root.advance(first + 3)
    assert TpmRoot(tcti, tmp_path, counter=index).counter() == first + 3
    for back in (first + 3, first, 0):
        with pytest.raises(AttestationError, match="does not go back"):
            root.advance(back)
    written = subprocess.run(
        ["tpm2_nvwrite", "-C", "o", "-i", "-", hex(index)],
        input=bytes(8),
        env={"PATH": os.environ["PATH"], "TPM2TOOLS_TCTI": tcti},
        capture_output=True,
        timeout=60,
    )
    assert written.returncode != 0  # a counter cannot be written
    assert tool(tcti, "nvundefine", "-C", "o", hex(index)).returncode == 0
    assert root.counter() > first + 3  # one that is made anew starts above all that ever were


def test_an_index_that_is_something_elses_is_no_counter(tcti, tmp_path):
    assert (
        tool(tcti, "nvdefine", "-C", "o", "-s", "8", "-a", "ownerread|ownerwrite", "0x1500044").returncode
        == 0
    )
    with pytest.raises(AttestationError, match="0x1500044 is no counter"):
        TpmRoot(tcti, tmp_path, counter=0x01500044).counter()


def test_a_whole_disk_put_back_is_found(tcti, tmp_path):
    """The attack that a software root cannot see (test_enclave_sealing.py): every file is the older one."""
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    folder.mkdir()
    root = TpmRoot(tcti, folder, counter=0x01500043)

    def sealer(text):
        return lambda at: seal(root, CODE, text, CONTEXT)

    state = SealedState(folder / "state", root)
    state.start(sealer(b"before"))
    shutil.copytree(folder, copy)
    for text in (b"after", b"long after"):
        state.save(sealer(text))
    state.close()
    newest = (folder / "state").read_bytes()
    assert unseal(root, CODE, newest, CONTEXT) == b"long after"
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    with pytest.raises(AttestationError, match="rolled back"):
        unseal(root, CODE, (folder / "state").read_bytes(), CONTEXT)
    state = SealedState(folder / "state", TpmRoot(tcti, folder, counter=0x01500043))
    with pytest.raises(AttestationError, match="rolled back"):
        state.resume(lambda blob, at: pytest.fail("opened"))
    state.close()


# What is missing


def test_a_tpm_that_does_not_answer_is_no_root(tmp_path):
    root = TpmRoot(f"swtpm:path={tmp_path}/nobody", tmp_path)
    for ask in (
        lambda: root.quote(CODE, bytes(64)),
        lambda: root.public,
        root.counter,
        lambda: root.advance(1),
    ):
        with pytest.raises(AttestationError, match=r"tpm2_[a-z]+ failed"):
            ask()
    with pytest.raises(AttestationError):
        root.sealing_key(CODE)
    with pytest.raises(DataError):
        TpmRoot("swtpm:", tmp_path / "no such folder").counter()


def test_without_its_tools_there_is_no_root(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AttestationError, match="tpm2-tools are not there"):
        TpmRoot("swtpm:", tmp_path).counter()
