"""Manifest, measurement, evidence: what changed is named, and what is not what is trusted is refused."""

import dataclasses
import hashlib
import json
import os
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import baffle
from baffle.enclave.evidence import (
    AttestationError,
    Challenge,
    Evidence,
    Expectation,
    Keys,
    OneOf,
    accept,
    attest,
    report_data,
)
from baffle.enclave.manifest import Manifest, differences, hashes_of
from baffle.enclave.software import SoftwareRoot, SoftwareVerifier
from baffle.errors import ConfigError, DataError, MessageError, SecurityError

SITE = "/runtime/site"
KEYS = Keys(bytes(range(32)), bytes(range(32, 64)))
NONCE, CONTEXT = b"n" * 32, b"session 1"


@pytest.fixture
def world(tmp_path):
    """Files of a worker, small, and ``measure``: the manifest of them."""
    code = tmp_path / "code"
    (code / "inner").mkdir(parents=True)
    (code / "stream.py").write_bytes(b"words = 1\n")
    (code / "inner" / "wire.py").write_bytes(b"bytes = 2\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights.bin").write_bytes(bytes(range(200)))
    (model / "bundle.json").write_bytes(b"{}")
    (tmp_path / "python3").write_bytes(b"an interpreter")
    site = Path(sysconfig.get_path("purelib"))
    files = {f"{SITE}/baffle": code, "/runtime/bin/python3": tmp_path / "python3"}
    files[f"{SITE}/cffi"] = site / "cffi"
    given_ = {"config": {"K": 20, "sigma": 1e-4}, "limits": {"memory": 90_000_000}, "seccomp": b"program"}

    def measure(**changed):
        return Manifest.of_this(files, site=SITE, bundle=model, **(given_ | changed))

    measure.folder, measure.files = tmp_path, files
    return measure


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return SoftwareRoot.create(folder)


def flip(path, at=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# The manifest


def test_a_manifest_names_every_file_by_its_hash(world):
    found = world()
    assert found.code == {
        "baffle/inner/wire.py": hashlib.sha256(b"bytes = 2\n").hexdigest(),
        "baffle/stream.py": hashlib.sha256(b"words = 1\n").hexdigest(),
    }
    assert found.interpreter == {"/runtime/bin/python3": hashlib.sha256(b"an interpreter").hexdigest()}
    assert list(found.packages) == ["cffi"]  # of the packages that a worker has, the one that is bound here
    assert found.seccomp == hashlib.sha256(b"program").hexdigest()
    assert found.measurement == hashlib.sha256(found.encode()).digest()
    assert found == world() == Manifest.decode(found.encode())
    assert differences(found, world()) == []


def test_what_is_measured_does_not_depend_on_where_it_lies_or_on_its_times(world, tmp_path):
    before = world().measurement
    os.rename(tmp_path / "code", tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "stream.py", (1, 1))
    world.files[f"{SITE}/baffle"] = tmp_path / "elsewhere"
    assert world().measurement == before


CHANGES = {
    "code": (lambda folder: flip(folder / "code" / "stream.py", 3), ["code baffle/stream.py: changed"]),
    "new code": (
        lambda folder: (folder / "code" / "inner" / "more.py").write_bytes(b""),
        ["code baffle/inner/more.py: new"],
    ),
    "byte code": (
        lambda folder: (folder / "code" / "stream.pyc").write_bytes(b""),
        ["code baffle/stream.pyc: new"],
    ),
    "no code": (lambda folder: os.unlink(folder / "code" / "stream.py"), ["code baffle/stream.py: gone"]),
    "interpreter": (lambda folder: flip(folder / "python3"), ["interpreter /runtime/bin/python3: changed"]),
    "model": (lambda folder: flip(folder / "model" / "weights.bin", 199), ["model: changed"]),
    "name in the model": (
        lambda folder: os.rename(folder / "model" / "weights.bin", folder / "model" / "weights.bim"),
        ["model: changed"],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_one_changed_byte_is_another_measurement_and_is_named(world, root, what):
    change, lines = CHANGES[what]
    trusted = world()
    change(world.folder)
    found = world()
    assert differences(trusted, found) == lines
    assert_refused(root, found.measurement, trusted.measurement)


SETTINGS = {
    "config K: 21 instead of 20": {"config": {"K": 21, "sigma": 1e-4}},
    "config sigma: nothing instead of 0.0001": {"config": {"K": 20}},
    'config when: "charging" instead of nothing': {"config": {"K": 20, "sigma": 1e-4, "when": "charging"}},
    "limit memory: 90000001 instead of 90000000": {"limits": {"memory": 90_000_001}},
    "seccomp: another list of system calls": {"seccomp": b"program."},
}


@pytest.mark.parametrize("line", SETTINGS)
def test_one_changed_setting_is_another_measurement_and_is_named(world, root, line):
    trusted, found = world(), world(**SETTINGS[line])
    assert differences(trusted, found) == [line]
    assert_refused(root, found.measurement, trusted.measurement)


def assert_refused(root, measurement, trusted):
    evidence = attest(root, measurement, KEYS, NONCE, CONTEXT)
    with pytest.raises(AttestationError, match="another measurement than those trusted"):
        SoftwareVerifier(root.public).check(evidence, Expectation((trusted,), NONCE, CONTEXT))
    SoftwareVerifier(root.public).check(evidence, Expectation((trusted, measurement), NONCE, CONTEXT))


def test_a_file_planted_in_a_package_and_another_version_are_named(world, tmp_path, monkeypatch):
    copy = tmp_path / "cffi"
    copy.mkdir()
    for file in world.files[f"{SITE}/cffi"].glob("*.py"):
        (copy / file.name).write_bytes(file.read_bytes())
    world.files[f"{SITE}/cffi"] = copy
    trusted = world()
    (copy / "planted.py").write_bytes(b"")
    assert differences(trusted, world()) == ["package cffi: files changed"]
    (copy / "planted.py").unlink()
    older = dataclasses.replace(trusted, packages={"cffi": ("0.1", trusted.packages["cffi"][1])})
    assert differences(older, trusted) == [
        f"package cffi: version {trusted.packages['cffi'][0]} instead of 0.1"
    ]
    del world.files[f"{SITE}/cffi"]
    assert differences(trusted, world()) == ["package cffi: gone"]
    assert differences(world(), trusted) == ["package cffi: new"]


def test_what_cannot_be_measured_is_no_manifest(world, tmp_path):
    with pytest.raises(ConfigError, match="no-such-package is not installed"):
        world(packages=("no-such-package",))
    with pytest.raises(ConfigError, match="cannot hold such a setting"):
        world(config={"sigma": float("nan")}).encode()
    with pytest.raises(ConfigError, match="no file of baffle is in the sandbox"):
        Manifest.of_this({}, site=SITE, bundle=tmp_path / "model", config={}, limits={}, seccomp=b"")
    os.mkfifo(tmp_path / "code" / "pipe")
    with pytest.raises(DataError, match="pipe is neither a file nor a folder"):
        world()
    world.files[f"{SITE}/baffle"] = tmp_path / "gone"
    with pytest.raises(DataError, match="cannot measure"):
        world()


def test_a_link_in_a_folder_is_measured_by_where_it_leads(tmp_path):
    (tmp_path / "link").symlink_to("one")
    first = hashes_of({"": tmp_path})
    os.unlink(tmp_path / "link")
    (tmp_path / "link").symlink_to("other")
    assert hashes_of({"": tmp_path}) != first


def test_a_file_name_cannot_write_a_line_of_its_own(world):
    trusted = world()
    (world.folder / "code" / "x\nlimit memory: 1 instead of 2").write_bytes(b"")
    (line,) = differences(trusted, world())
    assert "\n" not in line
    assert "x\\nlimit" in line


def test_baffle_itself_numpy_and_cryptography_are_measured_in_seconds(tmp_path):
    (tmp_path / "bundle.json").write_bytes(b"{}")
    site = Path(sysconfig.get_path("purelib"))
    files = {f"{SITE}/{name}": site / name for name in ("numpy", "cryptography")}
    files[f"{SITE}/baffle"] = Path(baffle.__file__).parent
    files["/runtime/bin/python3"] = Path(sys.executable)
    start = time.perf_counter()
    found = Manifest.of_this(files, site=SITE, bundle=tmp_path, config={}, limits={}, seccomp=b"")
    print(
        f"measured {len(found.code)} files of baffle and two packages in {time.perf_counter() - start:.2f} s"
    )
    assert set(found.packages) == {"numpy", "cryptography"}
    own = hashlib.sha256(Path(baffle.__file__).read_bytes()).hexdigest()
    assert found.code["baffle/__init__.py"] == own


HASH = "ab" * 32
SOME = Manifest({"baffle/a.py": HASH}, {}, {"numpy": ("2.0", HASH)}, HASH, {"K": 1}, {}, HASH)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_decoding_a_manifest_is_total(data):
    bytes_ = SOME.encode()
    assert Manifest.decode(bytes_) == SOME
    other = data.draw(damaged(bytes_))
    try:
        found = Manifest.decode(other)
    except MessageError:
        return
    assert found.encode() == other  # a manifest of something else, and so of another measurement
    assert found.measurement != SOME.measurement
    assert differences(SOME, found)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"9" * 5000,
        b'{"format":"baffle enclave manifest v1"}',
        SOME.encode() + b"\n",
        SOME.encode().replace(b'"K":1', b'"K":NaN'),
        SOME.encode().replace(b'"K":1', b'"K":1,"K":1'),
        SOME.encode().replace(b"ab", b"AB"),
        SOME.encode().replace(b'["2.0",', b"[2.0,"),
        SOME.encode().replace(b'"limits":{}', b'"limits":[]'),
        json.dumps(json.loads(SOME.encode())).encode(),
    ],
)
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(MessageError):
        Manifest.decode(data)


# Evidence


def damaged(data):
    """Byte strings that are not ``data``: cut short, extended, a bit flipped, a piece replaced, anything."""
    cut = st.integers(0, len(data) - 1).map(lambda n: data[:n])
    more = st.binary(min_size=1, max_size=8).map(lambda tail: data + tail)
    bits = st.integers(0, 8 * len(data) - 1).map(
        lambda i: data[: i // 8] + bytes((data[i // 8] ^ (1 << i % 8),)) + data[i // 8 + 1 :]
    )
    middle = st.tuples(st.integers(0, len(data)), st.binary(max_size=8)).map(
        lambda found: data[: found[0]] + found[1] + data[found[0] + len(found[1]) :]
    )
    return st.one_of(cut, more, bits, middle, st.binary(max_size=400)).filter(lambda other: other != data)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_evidence_is_refused_and_raises_nothing_else(data):
    evidence, verifier, expected = _signed()
    other = data.draw(damaged(evidence.encode()))
    with pytest.raises((AttestationError, MessageError)):
        verifier.check(Evidence.decode(other), expected)


def _signed(_cache=[]):  # noqa: B006
    if not _cache:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            made = SoftwareRoot.create(Path(folder))
        evidence = attest(made, b"m" * 32, KEYS, NONCE, CONTEXT)
        _cache.append((evidence, SoftwareVerifier(made.public), Expectation((b"m" * 32,), NONCE, CONTEXT)))
    return _cache[0]


texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255)


@given(texts, texts, *[st.binary(min_size=32, max_size=32)] * 4, st.binary(), st.binary())
@settings(deadline=None)
def test_evidence_has_one_byte_string(kind, assurance, measurement, agreement, signing, nonce, context, body):
    evidence = Evidence(kind, assurance, measurement, Keys(agreement, signing), nonce, context, body)
    assert Evidence.decode(evidence.encode()) == evidence
    assert evidence.digest == hashlib.sha256(evidence.encode()).digest()


def test_evidence_that_cannot_be_is_not_made():
    fields = ("software", "software", bytes(32), KEYS, NONCE, CONTEXT, b"")
    Evidence(*fields)
    for at, wrong in (
        (0, ""),
        (1, "two\nlines"),
        (1, "§"),
        (2, b"short"),
        (4, bytes(33)),
        (5, bytes(70_000)),
    ):
        with pytest.raises(ConfigError):
            Evidence(*fields[:at], wrong, *fields[at + 1 :])
    with pytest.raises(ConfigError):
        Keys(bytes(31), bytes(32))
    with pytest.raises(ConfigError, match="met by nobody"):
        Expectation((), NONCE, CONTEXT)
    with pytest.raises(ConfigError):
        Challenge(0)


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 40))
@example(b"ab", b"c", 1)
@settings(deadline=None)
def test_report_data_depends_on_every_part(first, second, cut):
    assert len(report_data(KEYS, NONCE, first)) == 64
    assert (report_data(KEYS, NONCE, first) == report_data(KEYS, NONCE, second)) == (first == second)
    assert report_data(Keys(KEYS.signing, KEYS.agreement), NONCE, first) != report_data(KEYS, NONCE, first)
    assert report_data(KEYS, bytes(32), first) != report_data(KEYS, NONCE, first)


REPLAYS = {
    "another nonce": {"nonce": b"o" * 32},
    "another context": {"context": b"session 2"},
    "another measurement": {"measurement": b"x" * 32},
    "other keys": {"keys": Keys(KEYS.signing, KEYS.agreement)},
    "another body": {"body": bytes(64)},
    "no body": {"body": b""},
    "another kind": {"kind": "tpm2"},
    "a finer assurance": {"assurance": "hardware"},
}


@pytest.mark.parametrize("what", REPLAYS)
def test_evidence_is_for_what_it_was_made_for(root, what):
    """Somebody shows true evidence for something else: whichever field is rewritten, it is refused."""
    verifier = SoftwareVerifier(root.public)
    evidence = attest(root, b"m" * 32, KEYS, NONCE, CONTEXT)
    verifier.check(evidence, Expectation((b"m" * 32,), NONCE, CONTEXT))
    forged = dataclasses.replace(evidence, **REPLAYS[what])
    expected = Expectation((forged.measurement,), forged.nonce, forged.context)  # what would suit the forger
    with pytest.raises(AttestationError):
        verifier.check(forged, expected)


def test_true_evidence_of_another_session_is_refused(root):
    verifier = SoftwareVerifier(root.public)
    evidence = attest(root, b"m" * 32, KEYS, NONCE, CONTEXT)
    for expected, why in (
        (Expectation((b"x" * 32,), NONCE, CONTEXT), "another measurement"),
        (Expectation((b"m" * 32,), b"o" * 32, CONTEXT), "another nonce"),
        (Expectation((b"m" * 32,), NONCE, b"session 2"), "another context"),
    ):
        with pytest.raises(AttestationError, match=why):
            verifier.check(evidence, expected)


def test_another_root_is_not_the_one_that_is_trusted(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    evidence = attest(SoftwareRoot.create(other), b"m" * 32, KEYS, NONCE, CONTEXT)
    expected = Expectation((b"m" * 32,), NONCE, CONTEXT)
    with pytest.raises(AttestationError, match="did not sign"):
        SoftwareVerifier(root.public).check(evidence, expected)
    for no_key in (b"", bytes(32), b"\xff" * 32):
        with pytest.raises(AttestationError):
            SoftwareVerifier(no_key).check(evidence, expected)


# Challenges


def test_a_nonce_is_good_once_in_its_time_and_for_its_context(root):
    now = [0.0]
    challenge, verifier = Challenge(10, clock=lambda: now[0]), SoftwareVerifier(root.public)

    def shown(nonce, context=b"round 1"):
        return attest(root, b"m" * 32, KEYS, nonce, context).encode()

    def accepted(data):
        return accept(data, challenge, verifier, [b"m" * 32])

    first, second = challenge.issue(b"round 1"), challenge.issue(b"round 1")
    assert first != second
    assert accepted(shown(first)).keys == KEYS
    for _ in range(2):
        with pytest.raises(AttestationError, match="never given out, or was used"):
            accepted(shown(first))
    assert accepted(shown(second)).nonce == second

    with pytest.raises(AttestationError, match="never given out"):
        accepted(shown(NONCE))  # a nonce of somebody else's
    third = challenge.issue(b"round 2")
    with pytest.raises(AttestationError, match="another context"):
        accepted(shown(third))
    with pytest.raises(AttestationError, match="used already"):
        accepted(shown(third, b"round 2"))  # a failed try uses it up
    late = challenge.issue(b"round 1")
    now[0] = 10.0
    with pytest.raises(AttestationError, match="older than 10 s"):
        accepted(shown(late))
    with pytest.raises(MessageError):
        accepted(b"no evidence")


def test_expired_nonces_are_not_kept():
    now = [0.0]
    challenge = Challenge(10, clock=lambda: now[0])
    for _ in range(1000):
        challenge.issue(b"")
        now[0] += 1
    assert len(challenge._issued) <= 10


# The software root


def test_its_evidence_says_software(root):
    assert attest(root, b"m" * 32, KEYS, NONCE, CONTEXT).assurance == "software"


def test_its_key_is_read_by_its_owner_alone(tmp_path):
    root = SoftwareRoot.create(tmp_path)
    assert SoftwareRoot(tmp_path).public == root.public
    assert (tmp_path / "root.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(DataError, match="there already"):
        SoftwareRoot.create(tmp_path)
    os.chmod(tmp_path / "root.key", 0o644)
    with pytest.raises(SecurityError, match="read by others"):
        SoftwareRoot(tmp_path)


def test_sealing_keys_are_the_measurements_own(root, tmp_path):
    key = root.sealing_key(b"m" * 32)
    assert len(key) == 32
    assert SoftwareRoot(tmp_path / "root").sealing_key(b"m" * 32) == key
    assert root.sealing_key(b"o" * 32) != key


def test_its_counter_only_grows_and_outlives_it(root, tmp_path):
    assert root.counter() == 0
    for to in (1, 2, 7):
        root.advance(to)
        assert SoftwareRoot(tmp_path / "root").counter() == to
    for back in (7, 6, 0, -1):
        with pytest.raises(AttestationError, match=r"does not go back|counter is 7"):
            root.advance(back)
    assert root.counter() == 7


@pytest.mark.parametrize(
    "content", [None, b"", b"7", b"-1\n", b"07\n", b"1e3\n", b"7\n8\n", b"9" * 30 + b"\n"]
)
def test_a_damaged_counter_is_no_counter(root, tmp_path, content):
    path = tmp_path / "root" / "counter"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError):
        root.counter()
    with pytest.raises(DataError):
        SoftwareRoot(tmp_path / "root")


def test_a_fleet_of_roots_trusts_each_of_them_and_no_other(tmp_path):
    roots = []
    for name in "abc":
        (tmp_path / name).mkdir()
        roots.append(SoftwareRoot.create(tmp_path / name))
    fleet = OneOf([SoftwareVerifier(root.public) for root in roots[:2]])
    expected = Expectation((b"m" * 32,), NONCE, CONTEXT)
    quotes = [attest(root, b"m" * 32, KEYS, NONCE, CONTEXT) for root in roots]
    for evidence in quotes[:2]:
        fleet.check(evidence, expected)
    with pytest.raises(AttestationError, match="did not sign"):
        fleet.check(quotes[2], expected)
    with pytest.raises(AttestationError):  # another measurement, by one that is trusted
        fleet.check(attest(roots[0], b"n" * 32, KEYS, NONCE, CONTEXT), expected)
    with pytest.raises(ConfigError):
        OneOf([])
