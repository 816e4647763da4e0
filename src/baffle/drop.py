"""A client behind a folder: envelopes are laid in, replies are laid out. For whoever has no network.

    DIR/NAME/in/ROUND-STAGE-TICKET.envelope     by the server, which takes it away once it is answered or late
    DIR/NAME/out/ROUND-STAGE-TICKET.reply       by the client NAME

The folder may be a disk that both see, or be carried from one to the other: files that come late, twice, or
in another order do no harm, since a reply is looked for under the ticket of its envelope. Each is written
beside its place, synced and moved there; what was copied in half is waited for. Who may write to the folder
speaks for the server, or for the client: that is for file modes to say.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from baffle import durable
from baffle.endpoint import Answering
from baffle.errors import BaffleError, ConfigError, DataError, DeliveryError, MessageError
from baffle.exchange import TICKET_BYTES, Envelope, FilePackage, Reply
from baffle.federation import Outcome, in_order
from baffle.plan import RoundPlan

_NAME = re.compile(r"(?P<round>0|[1-9][0-9]{0,19})-(?P<stage>[A-Za-z]{1,64})-(?P<ticket>[0-9a-f]{32})")
_ENVELOPE, _REPLY = ".envelope", ".reply"
_MOST_BYTES = 1 << 32  # of a message
_MOST_UNSETTLED = 1000
_SECONDS_TO_SETTLE = 2.0  # for a file that is being copied to its place
_SHORTEST, _LONGEST = 0.005, 0.1  # seconds between two looks
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}  # on a carried disk


# -- the client's side ------------------------------------------------------------------------------


def serve_drop(
    endpoint: Answering,
    folder: str | Path,
    ready: Callable[[], None] = lambda: None,
    *,
    complain: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Answers what is laid into ``folder``/NAME/in until ``stop`` says so; calls ``ready`` once it looks.

    The newest round first, each envelope once: where its reply lies there already, nothing is done. What
    cannot be written is kept and tried again, and said once to ``complain``. Raises ConfigError for a name
    that cannot be a folder's, DataError where the folders cannot be made or written to, or another process
    answers there. Memory: a model, or what ``endpoint``'s receiver makes of a ``FilePackage``.
    """
    home = Path(folder) / folder_name(endpoint.name)
    try:
        for place in (home / "in", home / "out"):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _locked(home / "out" / ".lock", f"another client {endpoint.name} answers in {home}")
        try:
            for left in (home / "out").glob(".*.part"):  # by one that was killed
                left.unlink()
        except OSError:
            os.close(lock)
            raise
    except OSError as error:
        raise DataError(f"cannot use {home}: {error.strerror or error}") from error
    try:
        ready()
        work, pause = _Answers(endpoint, home, complain), _SHORTEST
        while not stop():
            pause = _SHORTEST if work.look() else min(2 * pause, _LONGEST)
            time.sleep(pause)
    finally:
        os.close(lock)


def folder_name(name: str) -> str:
    """A client's name as that of a folder. Raises ConfigError where it can be none."""
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(os.fsencode(name)) > 200:
        raise ConfigError(f"client {name[:80]!r}: a folder has this name: one without / or leading .")
    return name


class _Stuck(Exception):  # noqa: N818 (no error of a caller's)
    """A reply that cannot be written now."""


class _Answers:
    """What one client makes of its folder."""

    def __init__(self, endpoint: Answering, home: Path, complain: Callable[[str], None]) -> None:
        self._endpoint, self._in, self._out = endpoint, home / "in", home / "out"
        self._complain, self._said = complain, ""
        self._settling = _Settling()
        self._made: tuple[str, bytes] | None = None  # the last answer, which may have to be written again
        self._torn: dict[str, tuple[int, int]] = {}  # answered as malformed: what they were then

    def look(self) -> bool:
        """Answers one envelope, if there is one to be answered."""
        for name in self._waiting():
            try:
                if self._answer(name):
                    self._said = ""
                    return True
            except _Stuck:  # before anything else is answered: what was made is kept for this one alone
                return False
            except FileNotFoundError:
                continue  # taken away meanwhile: nobody waits for it any more
            except OSError as error:
                self._say(f"{self._in / name}{_ENVELOPE}: {error.strerror or error}; it is passed over")
        return False

    def _waiting(self) -> list[str]:
        """Envelopes without a reply, those of the highest round first."""
        try:
            found = [entry for entry in os.listdir(self._in) if entry.endswith(_ENVELOPE)]
            replied = set(os.listdir(self._out))
        except OSError as error:
            self._say(f"{self._in.parent}: {error.strerror or error}; it is looked for again")
            return []
        names = [name for name in (entry.removesuffix(_ENVELOPE) for entry in found) if _NAME.fullmatch(name)]
        names.sort(key=lambda name: (-int(name.split("-")[0]), name))
        return [name for name in names if name in self._torn or name + _REPLY not in replied]

    def _answer(self, name: str) -> bool:
        path = self._in / (name + _ENVELOPE)
        if self._made is not None and self._made[0] == name and path.exists():
            return self._write(name, self._made[1])  # the disk was full, or the server asks again
        file = _opened(path)
        try:
            envelope = self._envelope(file, name)
            if envelope is not None:
                self._torn.pop(name, None)
                reply = self._endpoint.reply(envelope)
                if Reply.decode(reply).status == "answer":
                    self._made = name, reply
                return not path.exists() or self._write(name, reply)
            what = _what(os.fstat(file))
            if self._torn.get(name) == what or not self._settling.is_settled(str(path), what):
                return False
            self._torn = {name: what}
            text = "no envelope, or another client's than its file's name says"
            return self._write(name, Reply.explaining(bytes(TICKET_BYTES), "malformed", text).encode())
        finally:
            os.close(file)

    def _envelope(self, file: int, name: str) -> Envelope | None:
        """None for what is none, or has another ticket than its name says: it may still be on its way."""
        with contextlib.suppress(MessageError):
            envelope = Envelope.read(file)
            if name.endswith(f"-{envelope.ticket(self._endpoint.name).hex()}"):
                return envelope
        return None

    def _write(self, name: str, reply: bytes) -> bool:
        path = self._out / (name + _REPLY)
        try:
            durable.write(path, [reply])
        except OSError as error:
            self._say(f"cannot write {path}: {error.strerror or error}; it is tried again")
            raise _Stuck from error
        return True

    def _say(self, line: str) -> None:
        if line != self._said:
            self._complain(line)
            self._said = line


# -- the server's side ------------------------------------------------------------------------------


class _Asked(NamedTuple):
    envelope: Path
    reply: Path
    ticket: bytes


class Drop:
    """A driver for clients behind folders: every NAME in ``folder`` that has an ``in`` and an ``out``.

    ``names`` waits up to ``patience`` seconds: for ``least`` of them before the first round, for one later.
    """

    def __init__(self, folder: str | Path, *, least: int = 1, patience: float = 60.0) -> None:
        self.folder, self.patience = Path(folder), patience
        self._least = least

    def names(self) -> Sequence[str]:
        until = time.monotonic() + self.patience
        while True:
            with contextlib.suppress(OSError):
                found = sorted(
                    entry.name
                    for entry in self.folder.iterdir()
                    if not entry.name.startswith(".") and all((entry / way).is_dir() for way in ("in", "out"))
                )
                if len(found) >= self._least or time.monotonic() >= until:
                    self._least = 1  # who leaves later is not waited for, round after round
                    return found
            if time.monotonic() >= until:
                return []
            time.sleep(0.1)

    def ask(
        self, stage: str, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        """Lays an envelope into each folder, and takes away what of earlier ones is left there.

        Raises DataError where another server uses the folder.
        """
        try:
            lock = _locked(self.folder / ".lock", f"another server uses {self.folder}")
        except OSError as error:
            raise DataError(f"cannot use {self.folder}: {error.strerror or error}") from error
        try:
            yield from in_order(requests, self._arrivals(requests, deadline))
        finally:
            os.close(lock)

    def _arrivals(
        self, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        until = None if deadline is None else time.monotonic() + deadline
        asked = dict[str, _Asked]()
        try:
            for name in sorted(requests):
                try:
                    asked[name] = self._lay(name, requests[name])
                except OSError as error:
                    yield name, DeliveryError("gone", f"cannot ask {name}: {error.strerror or error}")
            settling, pause = _Settling(), _SHORTEST
            while asked:
                arrived = False
                for name in list(asked):
                    outcome = _outcome(asked[name], settling)
                    if outcome is not None:
                        _take_away(asked.pop(name))
                        arrived = True
                        yield name, outcome
                if until is not None and time.monotonic() >= until:
                    break
                pause = _SHORTEST if arrived else min(2 * pause, _LONGEST)
                left = pause if until is None else min(pause, max(until - time.monotonic(), 0))
                if asked:
                    time.sleep(left)
            for name in list(asked):
                _take_away(asked.pop(name))
                yield name, DeliveryError("late", f"no reply within {deadline:g} s")
        finally:
            for each in asked.values():  # the round has ended without them
                _take_away(each)

    def _lay(self, name: str, data: bytes) -> _Asked:
        envelope = Envelope.decode(memoryview(data))
        ticket = envelope.ticket(name)
        try:
            round_ = RoundPlan.decode(envelope.plan).round
        except BaffleError:
            round_ = 0  # of a stage without a plan
        stem, home = f"{round_}-{envelope.stage}-{ticket.hex()}", self.folder / name
        asked = _Asked(home / "in" / (stem + _ENVELOPE), home / "out" / (stem + _REPLY), ticket)
        for left in (*(home / "in").iterdir(), *(home / "out").iterdir()):
            ours = left.suffix in (_ENVELOPE, _REPLY) and _NAME.fullmatch(left.stem)
            if ours or (left.parent.name == "in" and re.fullmatch(r"\..*\.part", left.name)):
                try:
                    left.unlink(missing_ok=True)
                except OSError:
                    if left == asked.reply:  # it would be taken for the reply to this one
                        raise
        durable.write(asked.envelope, [data])
        return asked


def _outcome(asked: _Asked, settling: _Settling) -> Outcome | None:
    """What the client says; None where it has not, or not to the end."""
    try:
        file = _opened(asked.reply)
    except FileNotFoundError:
        return None
    except OSError as error:
        return DeliveryError("malformed", f"a reply that cannot be read: {error.strerror or error}")
    try:
        data = _all_of(file)
        with contextlib.suppress(MessageError):
            if Reply.decode(data).ticket == asked.ticket:
                return data
        return data if settling.is_settled(str(asked.reply), _what(os.fstat(file))) else None
    except OSError as error:
        return DeliveryError("malformed", f"a reply that cannot be read: {error.strerror or error}")
    finally:
        os.close(file)


def _take_away(asked: _Asked) -> None:
    """The envelope first: a client that saw it without its reply would answer it again."""
    for path in (asked.envelope, asked.reply):
        with contextlib.suppress(OSError):
            path.unlink()


# -- both -------------------------------------------------------------------------------------------


class _Settling:
    """Files that are not what they should be, and may still be on their way."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}

    def is_settled(self, path: str, what: tuple[int, int]) -> bool:
        """Whether it has stayed as it is for a while."""
        before, since = self._seen.get(path, (None, 0.0))
        if before != what:
            if len(self._seen) > _MOST_UNSETTLED:
                self._seen.clear()
            self._seen[path] = what, time.monotonic()
            return False
        return time.monotonic() - since >= _SECONDS_TO_SETTLE


def _what(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_size, seen.st_mtime_ns


def _opened(path: Path) -> int:
    """A regular file of a size that can be. Raises OSError for anything else: links and pipes, too."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    seen = os.fstat(file)
    if stat.S_ISREG(seen.st_mode) and seen.st_size <= _MOST_BYTES:
        return file
    os.close(file)
    raise OSError(errno.EINVAL, "no file of a message")


def _all_of(file: int) -> bytes:
    return bytes(FilePackage(file, 0, os.fstat(file).st_size)[:])


def _locked(path: Path, refusal: str) -> int:
    """An open file that keeps others out until it is closed. Raises DataError where another holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        import fcntl  # POSIX alone has it

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError as error:
        os.close(file)
        raise DataError(refusal) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            raise
    return file
