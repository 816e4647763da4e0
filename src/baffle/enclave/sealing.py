"""Sealing: a worker's state on a disk that is somebody else's, and the counter that tells new from old.

A blob is ChaCha20-Poly1305 under the root's key for the measurement, a key of its own each time (by 32 random
bytes), with the value v of the root's counter that it belongs to inside what is authenticated:

    magic ‖ u64 v ‖ salt (32) ‖ ciphertext ‖ tag          associated: magic ‖ v ‖ salt ‖ context

``SealedState`` keeps such a blob in a file, whole at every moment: where the counter is c, seal at c + 1,
write, fsync, rename, and only then advance the counter to c + 1. What depends on a state (an answer, a line
of a ledger) leaves after that. So the counter can lag one behind the file, and never runs ahead of it:

- killed before the rename: file and counter are those before, and nothing has left;
- killed between rename and advance: the file is one ahead. It is accepted, or the state would be lost.

That has a price. Whoever cuts the power there keeps a blob at c + 1 of which nothing has left, and puts the
one at c back; if that went on to c + 1 and released something, there would be two blobs of one value. So a
state that is opened is first sealed again at c + 1, and the counter advanced (``resume``): its first release
is at c + 2 or later, where no older blob is. Accepted is v = c or c + 1; below is a roll-back, above it a
counter that was put back. What was released is then in every blob that is ever accepted again, as long as the
counter does not go back. (``tests/test_enclave_sealing.py`` searches for a way around.)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from baffle import durable
from baffle.enclave.evidence import AttestationError, Root
from baffle.errors import DataError, SecurityError
from baffle.secagg.primitives import derive, open_sealed, random_bytes
from baffle.secagg.primitives import seal as encrypt

AHEAD = (
    2  # how far a blob may be ahead of the counter: one for a save, two for the sealing that opens a state
)
_MAGIC = b"baffle sealed v1"
_HEAD = struct.Struct(f"<{len(_MAGIC)}sQ32s")
_LABEL = b"baffle sealed state"


def seal_with(key: bytes, at: int, plaintext: bytes, context: bytes) -> bytes:
    """A blob for the value ``at`` of the counter. ``key``: the root's, for the worker's measurement."""
    salt = random_bytes(32)
    head = _HEAD.pack(_MAGIC, at, salt)
    return head + encrypt(derive(key, _LABEL, salt, at), 0, plaintext, head + context)


def unseal_with(key: bytes, counter: int, blob: bytes, context: bytes) -> bytes:
    """What was sealed. AttestationError: rolled back, put back, or not sealed with this key and context."""
    at = _check_age(blob, counter)
    head = blob[: _HEAD.size]
    _, _, salt = _HEAD.unpack(head)
    try:
        return open_sealed(derive(key, _LABEL, salt, at), 0, blob[_HEAD.size :], head + context)
    except SecurityError as error:
        raise AttestationError("a state that was not sealed by this worker, or was changed since") from error


def seal(root: Root, measurement: bytes, plaintext: bytes, context: bytes) -> bytes:
    """``seal_with`` the root's key, one ahead of its counter; ``SealedState`` says when to advance it."""
    return seal_with(root.sealing_key(measurement), root.counter() + 1, plaintext, context)


def unseal(root: Root, measurement: bytes, blob: bytes, context: bytes) -> bytes:
    """``unseal_with`` the root's key and counter."""
    return unseal_with(root.sealing_key(measurement), root.counter(), blob, context)


def sealed_at(blob: bytes) -> int:
    """The counter value that a blob says it belongs to. AttestationError for what is no blob."""
    if len(blob) < _HEAD.size or not blob.startswith(_MAGIC):
        raise AttestationError("these bytes are no sealed state")
    return int(_HEAD.unpack_from(blob)[1])


def _check_age(blob: bytes, counter: int) -> int:
    at = sealed_at(blob)
    if at < counter:
        raise AttestationError(f"rolled back: a state sealed at {at}, where the counter is {counter}")
    if at > counter + 1:
        raise AttestationError(f"the counter was put back: it is {counter}, and the state was sealed at {at}")
    return at


class SealedState:
    """The file of a sealed state, and the counter it belongs to. It holds no key and sees no plaintext.

    One root's counter is for one state. ``start`` it once or ``resume`` it, then ``save``. All three take a
    function that gives the blob for a counter value; none returns before the blob is on disk and the counter
    is advanced. Where one raises, the state must be resumed before it is saved again. DataError where the
    disk refuses or another process has the file; AttestationError where state and counter do not belong
    together.
    """

    def __init__(self, path: Path, root: Root) -> None:
        self._path, self._root = path, root
        self._counter: int | None = None  # None: neither started nor resumed
        self._lock = held(path.with_name(path.name + ".lock"))

    def start(self, seal: Callable[[int], bytes]) -> None:
        """A new state. Refused where there is one: only its owner may decide that it is to be forgotten."""
        if self._path.exists():
            raise DataError(f"{self._path} is there already: a state is never started over an older one")
        counter = self._root.counter()
        self._write(counter + 1, seal(counter + 1))

    def resume(self, reseal: Callable[[bytes, int], bytes]) -> None:
        """The state on disk. ``reseal``: blob and value → the same state, sealed for that value.

        A file that is gone is refused like one that is old: to forget is the oldest state of all.
        """
        self._counter = None
        try:
            blob = self._path.read_bytes()
        except FileNotFoundError as error:
            raise AttestationError(f"rolled back: {self._path} is gone") from error
        except OSError as error:
            raise DataError(f"cannot read the state {self._path}: {error.strerror}") from error
        counter = self._root.counter()
        _check_age(blob, counter)
        self._write(counter + 1, reseal(blob, counter + 1))

    def save(self, seal: Callable[[int], bytes]) -> None:
        """The state as it is now. What depends on it may leave when this returns, and not before."""
        if self._counter is None:
            raise SecurityError(f"{self._path}: a state is started or resumed before it is saved")
        counter, self._counter = self._counter, None
        if self._root.counter() != counter:
            raise AttestationError(
                "the counter was advanced by somebody else: this state is no longer the newest"
            )
        self._write(counter + 1, seal(counter + 1))

    def _write(self, at: int, blob: bytes) -> None:
        if sealed_at(blob) != at:
            raise AttestationError(f"a state sealed at {sealed_at(blob)}, where {at} is next")
        write_whole(self._path, blob)
        self._root.advance(at)
        self._counter = at

    def close(self) -> None:
        """Lets another process use the file."""
        os.close(self._lock)


def write_whole(path: Path, data: bytes) -> None:
    """``data`` at ``path``, on disk when it returns. Raises DataError where the disk refuses."""
    try:
        durable.write(path, (data,))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def held(path: Path) -> int:
    """A file that this process alone has, until it closes it or ends."""
    import fcntl  # POSIX alone has it

    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise
    except BlockingIOError as error:
        raise DataError(f"{path}: another process has this state open") from error
    except OSError as error:
        raise DataError(f"cannot lock {path}: {error.strerror}") from error
    return file
