"""Sealed state: nothing is lost when power is, and what was released is never rolled back."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baffle.enclave import sealing
from baffle.enclave.evidence import AttestationError
from baffle.enclave.sealing import SealedState, seal, seal_with, sealed_at, unseal, unseal_with
from baffle.enclave.software import SoftwareRoot
from baffle.errors import DataError, SecurityError

KEY, CONTEXT = b"k" * 32, b"ledger of session 1"
CODE, OTHER = b"m" * 32, b"o" * 32


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return SoftwareRoot.create(folder)


# Blobs


@given(st.binary(max_size=300), st.integers(0, 2**63), st.binary(max_size=40))
@settings(deadline=None)
def test_what_is_sealed_can_be_read_by_its_key_in_its_context(plaintext, at, context):
    blob = seal_with(KEY, at, plaintext, context)
    assert sealed_at(blob) == at
    assert unseal_with(KEY, at, blob, context) == plaintext
    assert len(plaintext) < 8 or plaintext not in blob[56:]
    for key, other in ((b"x" * 32, context), (KEY, context + b".")):
        with pytest.raises(AttestationError, match="not sealed by this worker"):
            unseal_with(key, at, blob, other)


def test_sealing_twice_gives_two_blobs():
    first, second = (seal_with(KEY, 1, b"the same", CONTEXT) for _ in range(2))
    assert first != second
    assert first[-24:] != second[-24:]  # another key: not only another salt


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_blobs_are_refused(data):
    blob = seal_with(KEY, 5, b"what the worker knows", CONTEXT)
    i = data.draw(st.integers(0, 8 * len(blob) - 1))
    flipped = blob[: i // 8] + bytes((blob[i // 8] ^ (1 << i % 8),)) + blob[i // 8 + 1 :]
    cut, more = blob[: i // 8], blob + data.draw(st.binary(min_size=1, max_size=9))
    for other in (flipped, cut, more, data.draw(st.binary(max_size=200))):
        with pytest.raises(AttestationError):
            unseal_with(KEY, 5, other, CONTEXT)


def test_only_the_newest_and_what_a_crash_leaves_are_accepted():
    for counter in (0, 7):
        for at in range(12):
            blob = seal_with(KEY, at, b"state", CONTEXT)
            if counter <= at <= counter + 1:
                assert unseal_with(KEY, counter, blob, CONTEXT) == b"state"
            else:
                with pytest.raises(AttestationError, match="rolled back" if at < counter else "was put back"):
                    unseal_with(KEY, counter, blob, CONTEXT)


def test_a_blob_cannot_be_made_younger():
    """The value is authenticated: written over, the blob does not open."""
    blob = bytearray(seal_with(KEY, 3, b"state", CONTEXT))
    blob[16] = 9
    assert sealed_at(bytes(blob)) == 9
    with pytest.raises(AttestationError, match="changed since"):
        unseal_with(KEY, 9, bytes(blob), CONTEXT)


def test_another_measurement_cannot_unseal(root):
    blob = seal(root, CODE, b"state", CONTEXT)
    assert sealed_at(blob) == root.counter() + 1
    assert unseal(root, CODE, blob, CONTEXT) == b"state"
    with pytest.raises(AttestationError):
        unseal(root, OTHER, blob, CONTEXT)


# The file and the counter


def sealer(root, plaintext):
    return lambda at: seal_with(root.sealing_key(CODE), at, plaintext, CONTEXT)


def opened(path, root):
    """Resumes → (the state, what it holds)."""
    state, held = SealedState(path, root), []

    def reseal(blob, at):
        held.append(unseal(root, CODE, blob, CONTEXT))
        return sealer(root, held[0])(at)

    try:
        state.resume(reseal)
    except BaseException:
        state.close()
        raise
    return state, held[0]


def test_a_state_is_started_saved_and_resumed(root, tmp_path):
    path = tmp_path / "state"
    state = SealedState(path, root)
    with pytest.raises(SecurityError, match="started or resumed before"):
        state.save(sealer(root, b"too early"))
    state.start(sealer(root, b"zero"))
    for text in (b"one", b"two"):
        state.save(sealer(root, text))
        assert sealed_at(path.read_bytes()) == root.counter()
    state.close()
    state, held = opened(path, root)
    assert held == b"two"
    with pytest.raises(DataError, match="there already"):
        state.start(sealer(root, b"again"))


def test_older_files_are_refused(root, tmp_path):
    path, old = tmp_path / "state", []
    state = SealedState(path, root)
    state.start(sealer(root, b"0"))
    for text in (b"1", b"2", b"3"):
        old.append(path.read_bytes())
        state.save(sealer(root, text))
    state.close()
    newest = path.read_bytes()
    for blob in old:
        path.write_bytes(blob)
        with pytest.raises(AttestationError, match="rolled back"):
            opened(path, root)
    path.unlink()
    with pytest.raises(AttestationError, match=r"rolled back: .*state is gone"):
        opened(path, root)
    path.write_bytes(newest)
    state, held = opened(path, root)
    assert held == b"3"
    state.close()


def test_a_counter_that_is_put_back_alone_is_found(root, tmp_path):
    path, counter = tmp_path / "state", tmp_path / "root" / "counter"
    state = SealedState(path, root)
    state.start(sealer(root, b"0"))
    before = counter.read_bytes()
    for text in (b"1", b"2", b"3"):
        state.save(sealer(root, text))
    state.close()
    counter.write_bytes(before)
    with pytest.raises(AttestationError, match="the counter was put back"):
        opened(path, root)


def test_the_software_root_cannot_see_that_its_whole_disk_was_put_back(root, tmp_path):
    """The limit that docs/enclave.md states. The same attack on a TPM fails: test_enclave_tpm.py."""
    path, copy = tmp_path / "state", tmp_path / "copy"
    state = SealedState(path, root)
    state.start(sealer(root, b"before"))
    shutil.copytree(tmp_path / "root", copy / "root")
    shutil.copy(path, copy / "state")
    for text in (b"after", b"long after"):
        state.save(sealer(root, text))
    state.close()
    shutil.copytree(copy / "root", tmp_path / "root", dirs_exist_ok=True)
    shutil.copy(copy / "state", path)
    state, held = opened(path, SoftwareRoot(tmp_path / "root"))
    assert held == b"before"
    state.close()


def test_one_process_has_a_state(root, tmp_path):
    state = SealedState(tmp_path / "state", root)
    with pytest.raises(DataError, match="another process has this state open"):
        SealedState(tmp_path / "state", root)
    state.close()
    SealedState(tmp_path / "state", root).close()


def test_a_counter_that_somebody_else_advanced_ends_a_state(root, tmp_path):
    state = SealedState(tmp_path / "state", root)
    state.start(sealer(root, b"0"))
    root.advance(root.counter() + 1)
    with pytest.raises(AttestationError, match="advanced by somebody else"):
        state.save(sealer(root, b"1"))
    with pytest.raises(SecurityError, match="resumed before"):
        state.save(sealer(root, b"1"))
    state.close()


def test_a_blob_for_another_value_is_not_written(root, tmp_path):
    state = SealedState(tmp_path / "state", root)
    with pytest.raises(AttestationError, match="sealed at 9, where 1 is next"):
        state.start(lambda at: sealer(root, b"0")(9))
    assert not (tmp_path / "state").exists()
    assert root.counter() == 0
    state.close()


def test_a_full_disk_leaves_the_state_as_it_was(root, tmp_path, monkeypatch):
    path = tmp_path / "state"
    state = SealedState(path, root)
    state.start(sealer(root, b"0"))
    before, counter = path.read_bytes(), root.counter()

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="No space left"):
            state.save(sealer(root, b"1"))
    assert (path.read_bytes(), root.counter()) == (before, counter)
    assert {file.name for file in tmp_path.iterdir()} == {"root", "state", "state.lock"}
    state.close()
    state, held = opened(path, root)
    assert held == b"0"
    state.close()


# Whoever may cut the power at any moment, keep every blob, and put any of them back


class Counter:
    """The part of a root that the disk is checked against."""

    value = 0

    def counter(self):
        return self.value

    def advance(self, to):
        assert to > self.value
        self.value = to


class Cut(BaseException):
    """The power is gone."""


class Disk(RuleBasedStateMachine):
    """A worker that saves and releases; an attacker with the disk and the plug, who has not the counter.

    A state is the set of what happened so far. What was released must be in every state that is ever opened
    again; and an honest disk is always opened.
    """

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.root, self.path = Counter(), self.folder / "state"
        self.blobs, self.known, self.released = [], frozenset(), frozenset()
        self.number, self.state = 0, None

    def teardown(self):
        if self.state is not None:
            self.state.close()
        shutil.rmtree(self.folder)

    def sealed(self, known):
        def make(at):
            blob = seal_with(KEY, at, json.dumps(sorted(known)).encode(), CONTEXT)
            self.blobs.append(blob)  # the host sees it before it is written
            return blob

        return make

    def cutting(self, moment, act):
        """Runs ``act``, and cuts the power before the write, between write and advance, or after it."""
        write, advance = sealing.write_whole, Counter.advance

        def cut_write(path, data):
            if moment == "before":
                raise Cut
            write(path, data)
            if moment == "between":
                raise Cut

        def cut_advance(counter, to):
            advance(counter, to)
            if moment == "after":
                raise Cut

        sealing.write_whole, Counter.advance = cut_write, cut_advance
        try:
            act()
        except Cut:
            self.state.close()
            self.state = None
        finally:
            sealing.write_whole, Counter.advance = write, advance

    @initialize()
    def start(self):
        self.state = SealedState(self.path, self.root)
        self.state.start(self.sealed(self.known))

    moments = st.sampled_from(["never", "never", "before", "between", "after"])

    @precondition(lambda self: self.state is not None)
    @rule(moment=moments)
    def work(self, moment):
        self.number += 1
        self.known |= {self.number}

        def act():
            self.state.save(self.sealed(self.known))
            self.released |= self.known

        self.cutting(moment, act)

    @precondition(lambda self: self.state is not None)
    @rule()
    def pull_the_plug(self):
        self.state.close()
        self.state = None

    @precondition(lambda self: self.state is None)
    @rule(moment=moments)
    def resume_what_is_there(self, moment):
        self.resume(moment)
        assert self.state is not None or moment != "never"

    @precondition(lambda self: self.state is None)
    @rule(data=st.data(), moment=moments)
    def resume_what_was_put_back(self, data, moment):
        honest = self.path.read_bytes()
        self.path.write_bytes(data.draw(st.sampled_from(self.blobs)))
        try:
            self.resume(moment)
        except AttestationError:
            self.path.write_bytes(honest)

    def resume(self, moment):
        def reseal(blob, at):
            text = unseal_with(KEY, self.root.counter(), blob, CONTEXT).decode()
            self.known = frozenset(json.loads(text))
            assert self.released <= self.known, "rolled back"
            return self.sealed(self.known)(at)

        self.state = SealedState(self.path, self.root)
        try:
            self.cutting(moment, lambda: self.state.resume(reseal))
        except AttestationError:
            self.state.close()
            self.state = None
            raise

    @invariant()
    def the_counter_never_runs_ahead_of_the_disk(self):
        if self.path.exists():
            assert self.root.counter() <= sealed_at(self.path.read_bytes()) <= self.root.counter() + 1


Disk.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestDisk = Disk.TestCase


def test_a_blob_that_was_withheld_cannot_replace_what_was_released(root, tmp_path):
    """Cut the power before the counter advances, keep the blob, let another of that value be released."""
    path = tmp_path / "state"
    state = SealedState(path, root)
    state.start(sealer(root, b"zero"))
    before = path.read_bytes()
    withheld = sealer(root, b"withheld")(root.counter() + 1)
    state.close()
    path.write_bytes(before)
    state, held = opened(path, root)
    assert held == b"zero"
    state.save(sealer(root, b"released"))
    state.close()
    path.write_bytes(withheld)
    with pytest.raises(AttestationError, match="rolled back"):
        opened(path, root)


# kill -9

CHILD = """
import os, signal, sys
from pathlib import Path
from baffle.enclave.sealing import SealedState, seal_with, unseal
from baffle.enclave.software import SoftwareRoot

folder, die_at = Path(sys.argv[1]), int(sys.argv[2])
root, calls = SoftwareRoot(folder / "root"), 0

def dying(call):
    def wrapped(*arguments):
        global calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return wrapped

os.fsync, os.replace = dying(os.fsync), dying(os.replace)
state, held = SealedState(folder / "state", root), []

def sealed(text, at):
    return seal_with(root.sealing_key(bytes(32)), at, text, b"")

def reseal(blob, at):
    held.append(int(unseal(root, bytes(32), blob, b"")))
    return sealed(b"%d" % held[0], at)

state.resume(reseal)
for number in (held[0] + 1, held[0] + 2):
    state.save(lambda at: sealed(b"%d" % number, at))
    print("released", number, flush=True)
print("done", calls, flush=True)
"""


def test_a_process_killed_at_every_step_loses_nothing(tmp_path):
    (tmp_path / "root").mkdir()
    root, path = SoftwareRoot.create(tmp_path / "root"), tmp_path / "state"

    def sealed(text, at):
        return seal_with(root.sealing_key(bytes(32)), at, text, b"")

    state = SealedState(path, root)
    state.start(lambda at: sealed(b"0", at))
    state.close()
    released, kept = 0, []
    for die_at in range(1, 100):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path), str(die_at)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = done.stdout.split()
        released = max([released, *map(int, re.findall(r"released (\d+)", done.stdout))])
        kept.append(path.read_bytes())
        assert int(unseal(root, bytes(32), path.read_bytes(), b"")) >= released
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert said[-2] == "done"
    assert die_at == int(said[-1]) + 1 > 15  # resumed and saved twice: killed before every call of these
    for blob in kept[:-1]:
        if sealed_at(blob) < root.counter():
            with pytest.raises(AttestationError, match="rolled back"):
                unseal(root, bytes(32), blob, b"")
