"""One exchange between server and device: an ``Envelope`` down, a ``Reply`` up (``docs/spec.md``, 13).

Every driver carries these two and nothing else, so that what happens to a round does not depend on how its
bytes travel. A reply names its envelope by a hash: one that is repeated, late or meant for another is found.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np

from baffle.digests import sha256
from baffle.errors import ConfigError, LimitError, MessageError
from baffle.events import clean
from baffle.wire import Reader, choice, decoding, header

HELLO = "hello"  # the stage in which a device says its name: no plan, no request
TICKET_BYTES = 16
_LONGEST_NAME = 64  # of a stage
_LONGEST_TEXT = 500  # of a reason, in bytes
_MODEL_HEAD = 14  # bytes before the numbers of a model, of either precision

Status = Literal["answer", "digest", "refused", "failed", "malformed", "limited"]
STATUSES: tuple[Status, ...] = get_args(Status)
# What owners limit, in the order of docs/spec.md: directions, memory in bytes, seconds a round, days of use;
# the fewest clients in a sum; a condition of the moment.
LIMITS = ("directions", "memory", "seconds", "days", "cohort", "when")
_LIMIT = re.compile(
    r"(?:(?P<limit>directions|memory|seconds|days)<=(?P<most>[1-9][0-9]{0,17})"
    r"|(?P<least>cohort)>=(?P<needed>[1-9][0-9]{0,17})|when): (?P<text>.*)"
)


class FilePackage:
    """A package that lies in an open file, and is read where it is asked for: ``package[a:b]``.

    The file is for its opener to close. Raises MessageError where it has become shorter.
    """

    def __init__(self, file: int, offset: int, size: int) -> None:
        self._file, self._offset, self._size = file, offset, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, places: slice) -> bytes:
        start, stop, _ = places.indices(self._size)
        return bytes(self._read(start, stop, 0))

    def load(self) -> memoryview:
        """All of it, read-only, so laid out that the numbers of a model lie well. Memory: its size."""
        return self._read(0, self._size, -_MODEL_HEAD % 8).toreadonly()

    def _read(self, start: int, stop: int, room: int) -> memoryview:
        wanted = np.empty(room + max(stop - start, 0), np.uint8).data[room:]
        at = 0
        while at < len(wanted):
            got = os.preadv(self._file, [wanted[at:]], self._offset + start + at)
            if got == 0:
                raise MessageError("an envelope that has become shorter while it was read")
            at += got
        return wanted


Package = bytes | memoryview | FilePackage


@dataclass(frozen=True)
class Envelope:
    """What a device is given: a stage's request, the round's plan, and what makes it hold the weights.

    ``package`` is for the stage ``answer`` (``downlink``), empty in others. ``plan`` is empty for ``hello``.
    """

    stage: str
    plan: bytes = b""
    request: bytes = b""
    package: Package = b""

    KIND: ClassVar[int] = 11

    def __post_init__(self) -> None:
        if not (self.stage.isascii() and self.stage.isalpha() and len(self.stage) <= _LONGEST_NAME):
            raise ConfigError(f"a stage's name is 1 to {_LONGEST_NAME} letters, not {self.stage[:80]!r}")

    @cached_property
    def _head(self) -> bytes:
        stage = self.stage.encode()
        return b"".join(
            (
                header(self.KIND),
                struct.pack("<B", len(stage)) + stage,
                struct.pack("<I", len(self.plan)) + self.plan,
                struct.pack("<I", len(self.request)) + self.request,
                struct.pack("<Q", len(self.package)),
            )
        )

    def ticket(self, name: str) -> bytes:
        """For the client of that name: 16 bytes of SHA-256 over all but the package, and the name.

        The package's weights are proven by the plan's digest. The name is not sent: who replies in another
        client's place, because sockets were mixed up or copied, makes another ticket.
        """
        return sha256(self._head + name.encode()).digest()[:TICKET_BYTES]

    def encode(self) -> bytes:
        return self._head + self.package[:]

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Envelope:
        """Of a memoryview, the package is a part of it, without a copy."""
        r = Reader(data, cls.KIND)
        with decoding("an envelope"):
            head = _head_of(r)
            package = r.view(r.integer("Q"))
            r.end()
            return cls(*head, package)

    @classmethod
    def read(cls, file: int) -> Envelope:
        """Of an open file, in which the package stays: a ``FilePackage``.

        Raises MessageError for what is none, OSError where it cannot be read. Memory: twice the head's size.
        """
        size, some = os.fstat(file).st_size, 1 << 16
        while True:
            r = Reader(os.pread(file, min(some, size), 0), cls.KIND)
            try:
                with decoding("an envelope"):
                    head = _head_of(r)
                    length = r.integer("Q")
            except MessageError:
                if some >= size:
                    raise
                some *= 4
                continue
            if r.at + length != size:
                raise MessageError(f"an envelope of {r.at + length} bytes in a file of {size}")
            with decoding("an envelope"):
                return cls(*head, FilePackage(file, r.at, length))


def _head_of(r: Reader) -> tuple[str, bytes, bytes]:
    """Stage, plan and request."""
    return r.take(r.integer("B")).decode("ascii"), r.take(r.integer("I")), r.take(r.integer("I"))


@dataclass(frozen=True)
class Reply:
    """What a device gives back.

    status     body
    answer     the stage's answer
    digest     what it holds instead of the plan's weights: round u64 ‖ digest, or nothing
    refused    why its seal refused: a step that protects too little, or a lie
    failed     why it could not measure
    malformed  why it could not read the envelope, whose ticket may then be zeros
    limited    which of its owner's limits the plan exceeds: "directions<=100: …", "when: …"
    """

    ticket: bytes
    status: Status
    body: bytes

    KIND: ClassVar[int] = 12
    OVERHEAD: ClassVar[int] = 6 + TICKET_BYTES + 1 + 4  # bytes beside the body

    def __post_init__(self) -> None:
        if len(self.ticket) != TICKET_BYTES:
            raise ConfigError(f"a ticket has {TICKET_BYTES} bytes, not {len(self.ticket)}")

    @classmethod
    def explaining(cls, ticket: bytes, status: Status, text: object) -> Reply:
        """A reply whose body is one line of text, cut where it is too long."""
        line = clean(text).encode("utf-8", "replace")
        return cls(ticket, status, line[:_LONGEST_TEXT].decode("utf-8", "ignore").encode())

    @classmethod
    def limited(cls, ticket: bytes, error: LimitError) -> Reply:
        """What a limit says, and why. Raises ConfigError for one that cannot be said."""
        sign = {"cohort": ">=", "when": ""}.get(error.limit, "<=")
        reply = cls.explaining(ticket, "limited", f"{error.limit}{sign}{error.most if sign else ''}: {error}")
        if _LIMIT.fullmatch(reply.text) is None:
            raise ConfigError(f"a limit that cannot be: {reply.text[:80]}")
        return reply

    @property
    def limit(self) -> LimitError:
        """What a ``limited`` reply says. ConfigError where its body is no limit."""
        found = _LIMIT.fullmatch(self.text)
        if found is None:
            raise ConfigError("a reason that names no limit")
        name = found["limit"] or found["least"] or "when"
        number = found["most"] or found["needed"]
        return LimitError(name, None if number is None else int(number), found["text"])

    @property
    def text(self) -> str:
        """The body as one printable line: it comes from a stranger."""
        return clean(self.body[:_LONGEST_TEXT].decode("utf-8", "replace"))

    def encode(self) -> bytes:
        head = self.ticket + struct.pack("<BI", STATUSES.index(self.status), len(self.body))
        return b"".join((header(self.KIND), head, self.body))

    @classmethod
    def decode(cls, data: bytes) -> Reply:
        r = Reader(data, cls.KIND)
        with decoding("a reply"):
            ticket = r.take(TICKET_BYTES)
            status = choice(STATUSES, r.integer("B"), "status")
            body = r.take(r.integer("I"))
            r.end()
            if status not in ("answer", "digest") and len(body) > _LONGEST_TEXT:
                raise MessageError("a reason that is longer than a line")
            reply = cls(ticket, status, body)
            if status == "limited":
                _ = reply.limit
            return reply
