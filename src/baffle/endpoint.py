"""A device's half of every exchange: bytes in, bytes out. The far end of any driver is ``handle``."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.aggregation import ANSWER
from baffle.client import Client, Download
from baffle.downlink import HalfModel, Holding, receive
from baffle.errors import (
    BaffleError,
    ConfigError,
    DataError,
    DigestMismatchError,
    LimitError,
    MessageError,
    SecurityError,
)
from baffle.exchange import HELLO, TICKET_BYTES, Envelope, FilePackage, Package, Reply, Status
from baffle.plan import ModelMessage, RoundPlan, weights_digest
from baffle.runtimes import Runtime
from baffle.runtimes.sources import StoredWeights

_log = logging.getLogger("baffle")
_WHOLE_HEAD = 14  # bytes of a model before its numbers: header and n
_PIECE = 1 << 16  # weights received at once


class Receiver(Protocol):
    """How a plan and a package are read: ``Alone``, or one that clients of one process share."""

    def plan(self, data: bytes) -> RoundPlan:
        """The decoded plan. Raises MessageError."""
        ...

    def receive(
        self, runtime: Runtime, holding: Holding | None, plan: RoundPlan, package: Package
    ) -> tuple[Holding | None, Download]:
        """``received``; what is held may be None after a whole model, which is kept for nothing."""
        ...


class Guard(Protocol):
    """What a device's owner allows: ``limits.Guard``."""

    def check(self, plan: RoundPlan) -> None:
        """Before the client measures for a plan. Raises LimitError."""
        ...


class Alone:
    """The receiver of a device."""

    def plan(self, data: bytes) -> RoundPlan:
        return RoundPlan.decode(data)

    def receive(
        self, runtime: Runtime, holding: Holding | None, plan: RoundPlan, package: Package
    ) -> tuple[Holding | None, Download]:
        return received(runtime, holding, plan, package)


class Stored:
    """The receiver of a device that has no room for a model: what came goes to a file, piece by piece.

    The weights of the ``Download`` are ``StoredWeights`` at ``path``, which each round writes anew, once they
    are proven by the plan's digest. That is so for whole models; others are received as by ``Alone``. Memory:
    some hundred kilobytes. Raises DataError where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def plan(self, data: bytes) -> RoundPlan:
        return RoundPlan.decode(data)

    def receive(
        self, runtime: Runtime, holding: Holding | None, plan: RoundPlan, package: Package
    ) -> tuple[Holding | None, Download]:
        if not _is_whole(package):
            return received(runtime, holding, plan, package)
        layout = runtime.layout
        form = np.dtype("<f4" if package[5:6] == bytes([ModelMessage.KIND]) else "<f2")
        head, size = bytes(package[:_WHOLE_HEAD]), _WHOLE_HEAD + form.itemsize * layout.n
        if head != _whole_head(head, layout.n) or len(package) != size:
            raise _elsewhere(plan)

        def pieces() -> Iterator[NDArray[np.float32]]:
            step = form.itemsize * _PIECE
            for at in range(_WHOLE_HEAD, size, step):
                values = np.frombuffer(package[at : min(at + step, size)], form).astype(np.float32)
                if not np.isfinite(values).all():
                    raise MessageError("a model that holds a number that is not finite")
                yield values

        try:
            weights = StoredWeights.write(self._path, pieces())
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror or error}") from error
        if weights_digest(weights, layout, runtime.frozen_digest) != plan.weights_digest:
            weights.close()
            raise _elsewhere(plan)
        return None, Download(plan, weights, fitting=runtime)


def _whole_head(head: bytes, n: int) -> bytes:
    return head[:6] + struct.pack("<Q", n)


def _elsewhere(plan: RoundPlan) -> DigestMismatchError:
    return DigestMismatchError(f"the model that came is not that of round {plan.round}'s plan")


def received(
    runtime: Runtime, holding: Holding | None, plan: RoundPlan, package: Package
) -> tuple[Holding, Download]:
    """What a client holds after a package, and the download it measures at.

    ``holding`` None: what it was built with. Raises DigestMismatchError where that is not the plan's model,
    MessageError for a malformed package.
    """
    layout, frozen = runtime.layout, runtime.frozen_digest

    def digest(weights: NDArray[np.float32]) -> bytes:
        return weights_digest(weights, layout, frozen)

    if holding is None and not _is_whole(package):
        holding = Holding.first(runtime.weights())
    if isinstance(package, FilePackage):
        package = package.load()
    if not _is_whole(package):
        package = bytes(package)  # which others read that take no view
    found = receive(holding, plan, package, layout, digest)  # type: ignore[arg-type]
    return found, Download(plan, found.weights, fitting=runtime)


class Answering(Protocol):
    """The far end of a driver: an ``Endpoint``, or what passes envelopes on to one that it cannot open."""

    @property
    def name(self) -> str:
        """The client's."""
        ...

    def handle(self, data: bytes) -> bytes:
        """The encoded reply to an encoded envelope. Never raises: what goes wrong is what it replies."""
        ...

    def reply(self, envelope: Envelope) -> bytes:
        """``handle``, of an envelope that is decoded already."""
        ...


class Endpoint:
    """One client behind bytes. Keeps, from round to round, what its downlink needs to be told less.

    Not for several threads at once: a device is asked one thing at a time. ``guard`` is asked before each
    measurement, and before the package is looked at.
    """

    def __init__(
        self, client: Client, *, receiver: Receiver | None = None, guard: Guard | None = None
    ) -> None:
        self.client = client
        self._guard = guard
        self._receiver = receiver or Alone()
        self._holding: Holding | None = None  # None: what the client was built with

    @property
    def name(self) -> str:
        return self.client.name

    def handle(self, data: bytes) -> bytes:
        """The encoded reply to an encoded envelope. Never raises: what goes wrong is what it replies.

        Cost: that of ``Client.reply``, and of replaying steps where they are what came.
        """
        try:
            envelope = Envelope.decode(memoryview(data))
        except BaffleError as error:
            return Reply.explaining(bytes(TICKET_BYTES), "malformed", error).encode()
        return self.reply(envelope)

    def reply(self, envelope: Envelope) -> bytes:
        """``handle``, of an envelope that is decoded already."""
        ticket = envelope.ticket(self.client.name)
        try:
            return Reply(ticket, "answer", self.answer(envelope)).encode()
        except DigestMismatchError as error:
            return Reply(ticket, "digest", error.held).encode()
        except LimitError as error:
            try:
                return Reply.limited(ticket, error).encode()
            except ConfigError as wrong:
                return Reply.explaining(ticket, "failed", wrong).encode()
        except BaffleError as error:
            return Reply.explaining(ticket, _status(error), error).encode()
        except Exception as error:  # a device that is asked the next time is worth more than a traceback
            _log.exception("client %s could not answer", self.client.name)
            return Reply.explaining(ticket, "failed", f"{type(error).__name__} in the client").encode()

    def answer(self, envelope: Envelope) -> bytes:
        """The body of the reply, or what goes wrong, raised."""
        if envelope.stage == HELLO:
            return self.client.name.encode()
        plan = self._receiver.plan(envelope.plan)
        if envelope.stage != ANSWER:
            return self.client.reply(envelope.stage, envelope.request, Download(plan))
        if self._guard is not None:
            self._guard.check(plan)
        runtime = self.client.runtime
        # Before the seal hears of it: a client that has to ask for the model first has answered nothing.
        holding, download = self._receiver.receive(runtime, self._holding, plan, envelope.package)
        if not _is_whole(envelope.package):
            self._holding = holding
        return self.client.reply(ANSWER, envelope.request, download)


def _is_whole(package: Package) -> bool:
    """Whether it is a model for this round alone: it needs nothing before, and is kept for nothing after."""
    return package[5:6] in (bytes([ModelMessage.KIND]), bytes([HalfModel.KIND]))


def _status(error: BaffleError) -> Status:
    if isinstance(error, SecurityError):
        return "refused"
    return "malformed" if isinstance(error, MessageError) else "failed"
