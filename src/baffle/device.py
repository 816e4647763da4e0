"""A device: one client in a process of its own, behind a socket of this machine's; and the driver of such.

The process that carries messages may be another's: Flower runs code that the server sent, in a new process
for each message. Data, keys and what must live from one stage to the next stay here, and only the bytes of
envelopes and replies pass. The sockets are Unix domain sockets: they lead to no network, and who may open one
is for its folder's owner to say.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from baffle.endpoint import Answering
from baffle.errors import ConfigError, DataError, DeliveryError, MessageError
from baffle.exchange import TICKET_BYTES, Envelope, Reply
from baffle.federation import Outcome, in_order

_LONGEST_PATH = 100  # of a socket: 108 bytes are all that the kernel has for it
_MOST_BYTES = 1 << 32  # of a message
_SECONDS_TO_SPEAK = 30.0  # for whoever has connected
_SUFFIX = ".sock"


def serve(
    endpoint: Answering, path: Path, ready: Callable[[], None] = lambda: None, *, spool: Path | None = None
) -> None:
    """Answers at ``path`` until the process ends, one exchange at a time; calls ``ready`` once it listens.

    A socket that a killed device left behind is replaced. With ``spool``, envelopes go to a file in that
    folder as they come, and packages are read from there: a model is never in memory as bytes. Raises
    ConfigError for a path that is too long, DataError where the socket cannot be made, or another device
    listens there.
    """
    with _listening(path) as listener:
        ready()
        while True:
            connection, _ = listener.accept()
            # Who leaves before the reply, or says nothing, is not waited for.
            with connection, contextlib.suppress(OSError, EOFError, DeliveryError):
                until = time.monotonic() + _SECONDS_TO_SPEAK
                ask = _in_memory(connection, until) if spool is None else _in_file(connection, until, spool)
                with ask as answered:
                    # A device that was held up finds rounds that ended without it: not worth a measurement.
                    if not _has_left(connection):
                        reply = answered(endpoint)
                        _send(connection, reply, time.monotonic() + _SECONDS_TO_SPEAK)


@contextlib.contextmanager
def _in_memory(connection: socket.socket, until: float) -> Iterator[Callable[[Answering], bytes]]:
    envelope = _receive(connection, until)
    yield lambda endpoint: endpoint.handle(envelope)


@contextlib.contextmanager
def _in_file(connection: socket.socket, until: float, folder: Path) -> Iterator[Callable[[Answering], bytes]]:
    path, file, wrong = folder / f".envelope-{os.getpid()}.part", -1, None
    try:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            path.unlink()  # it ends with its descriptor, whatever ends the process
        except OSError as error:
            wrong = error
        for part in _parts(connection, _size(connection, until), until):
            left = memoryview(part)
            try:
                while wrong is None and left:
                    left = left[os.write(file, left) :]
            except OSError as error:  # the rest is heard all the same: only then does the sender listen
                wrong = error

        def answered(endpoint: Answering) -> bytes:
            if wrong is not None:
                text = f"no room for a message: {wrong.strerror}"
                return Reply.explaining(bytes(TICKET_BYTES), "failed", text).encode()
            try:
                return endpoint.reply(Envelope.read(file))
            except MessageError as error:
                return Reply.explaining(bytes(TICKET_BYTES), "malformed", error).encode()

        yield answered
    finally:
        if file >= 0:
            os.close(file)


def relay(path: str | Path, envelope: bytes, timeout: float | None = None) -> bytes:
    """What the device at ``path`` replies to an envelope: the other end of ``serve``.

    Raises DeliveryError: "gone" where nobody listens or the device ends, "late" after ``timeout`` seconds,
    "malformed" for a length that cannot be.
    """
    until = None if timeout is None else time.monotonic() + timeout
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            _send(connection, envelope, until)
            return _receive(connection, until)
    except TimeoutError as error:
        raise DeliveryError("late", f"no reply within {timeout:g} s") from error
    except (OSError, EOFError) as error:
        raise DeliveryError("gone", f"no device replies at {path}: {error or 'it has ended'}") from error


class Sockets:
    """A driver for the devices of this machine: ``NAME.sock`` in a folder is the client NAME.

    ``names`` waits up to ``patience`` seconds: for ``least`` of them before the first round, for one later.
    """

    def __init__(self, folder: str | Path, *, least: int = 1, patience: float = 60.0) -> None:
        self.folder, self.patience = Path(folder), patience
        self._least = least

    def names(self) -> Sequence[str]:
        until = time.monotonic() + self.patience
        while True:
            found = sorted(path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"*{_SUFFIX}"))
            if len(found) >= self._least or time.monotonic() >= until:
                self._least = 1  # who leaves later is not waited for, round after round
                return found
            time.sleep(0.1)

    def ask(
        self, stage: str, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        """All at once, a thread each."""
        making = threading.Lock()  # envelopes are made when they are asked for, by who keeps count of them

        def one(name: str) -> tuple[str, Outcome]:
            with making:
                envelope = requests[name]
            try:
                return name, relay(self.folder / f"{name}{_SUFFIX}", envelope, deadline)
            except DeliveryError as error:
                return name, error

        with ThreadPoolExecutor(max(len(requests), 1)) as threads:
            waiting = [threads.submit(one, name) for name in requests]
            yield from in_order(requests, (done.result() for done in as_completed(waiting)))


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(f"{path}: a socket's path has at most {_LONGEST_PATH} bytes: choose a shorter one")
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            _remove_left_behind(path)
        before = os.umask(0o177)  # whoever can write to a socket can open it
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(16)
        mine = path.stat().st_ino
    except OSError as error:
        listener.close()
        raise DataError(f"cannot listen at {path}: {error.strerror or error}") from error
    with listener:
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == mine:  # and not another's by now
                    path.unlink()


def _remove_left_behind(path: Path) -> None:
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise DataError(f"{path} is there already, and no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # who listens and is held up takes no more connections, and is there
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise DataError(f"{path}: another device listens there")
    path.unlink()


# A message is its length, u64, and its bytes.


def _send(connection: socket.socket, data: bytes, until: float | None) -> None:
    """Raises TimeoutError at the time ``until``."""
    for part in (struct.pack("<Q", len(data)), data):
        _until(connection, until)
        connection.sendall(part)


def _receive(connection: socket.socket, until: float | None) -> bytes:
    """Raises TimeoutError at the time ``until``, EOFError where the other side ends."""
    return b"".join(_parts(connection, _size(connection, until), until))


def _size(connection: socket.socket, until: float | None) -> int:
    (size,) = struct.unpack("<Q", b"".join(_parts(connection, 8, until)))
    if size > _MOST_BYTES:
        raise DeliveryError("malformed", f"a message that says to be {size} bytes long")
    return int(size)


def _parts(connection: socket.socket, size: int, until: float | None) -> Iterator[bytes]:
    left = size
    while left:
        _until(connection, until)  # again before each part: they may drip
        part = connection.recv(min(left, 1 << 20))
        if not part:
            raise EOFError("the connection has ended")
        yield part
        left -= len(part)


def _until(connection: socket.socket, until: float | None) -> None:
    """The next call on a connection ends at the time ``until``. Raises TimeoutError where that is over."""
    left = None if until is None else until - time.monotonic()
    if left is not None and left <= 0:
        raise TimeoutError
    connection.settimeout(left)


def _has_left(connection: socket.socket) -> bool:
    """Whether the other side, which speaks once and then waits, has ended the connection."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
