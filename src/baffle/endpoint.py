"""A device's half of every exchange: bytes in, bytes out. The far end of any driver is ``handle``."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.aggregation import ANSWER
from baffle.client import Client, Download
from baffle.downlink import HalfModel, Holding, receive
from baffle.errors import BaffleError, DigestMismatchError, LimitError, MessageError, SecurityError
from baffle.exchange import HELLO, TICKET_BYTES, Envelope, Reply, Status
from baffle.plan import ModelMessage, RoundPlan, weights_digest
from baffle.runtimes import Runtime

_log = logging.getLogger("baffle")


class Receiver(Protocol):
    """How a plan and a package are read: ``Alone``, or one that clients of one process share."""

    def plan(self, data: bytes) -> RoundPlan:
        """The decoded plan. Raises MessageError."""
        ...

    def receive(
        self, runtime: Runtime, holding: Holding | None, plan: RoundPlan, package: bytes
    ) -> tuple[Holding, Download]:
        """``received``."""
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
        self, runtime: Runtime, holding: Holding | None, plan: RoundPlan, package: bytes
    ) -> tuple[Holding, Download]:
        return received(runtime, holding, plan, package)


def received(
    runtime: Runtime, holding: Holding | None, plan: RoundPlan, package: bytes
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
    found = receive(holding, plan, package, layout, digest)
    return found, Download(plan, found.weights, fitting=runtime)


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

    def handle(self, data: bytes) -> bytes:
        """The encoded reply to an encoded envelope. Never raises: what goes wrong is what it replies.

        Cost: that of ``Client.reply``, and of replaying steps where they are what came.
        """
        try:
            envelope = Envelope.decode(data)
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
            return Reply.limited(ticket, error).encode()
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


def _is_whole(package: bytes) -> bool:
    """Whether it is a model for this round alone: it needs nothing before, and is kept for nothing after."""
    return package[5:6] in (bytes([ModelMessage.KIND]), bytes([HalfModel.KIND]))


def _status(error: BaffleError) -> Status:
    if isinstance(error, SecurityError):
        return "refused"
    return "malformed" if isinstance(error, MessageError) else "failed"
