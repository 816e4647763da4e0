"""Flower: the round engine as a ServerApp, its clients behind the SuperNodes of a Flower federation.

``flwr run`` ships an app that names ``baffle.flower:server_app`` and ``baffle.flower:client_app``, both of
the package that is installed there (``examples/flower``). The server's half runs ``baffle.training`` over a
``FlowerDriver``. The client's half only relays bytes to the node's ``baffle device``, whose socket the node's
config names: Flower runs it in a new process for each message, and whoever may start runs decides its code,
so data, keys and state are not in that process. In Flower's simulation, where nodes have no device, the
client itself is built from the run config; secure sums are refused there.

Tested with flwr 1.41; the only module that imports it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baffle import events
from baffle.config import TrainConfig
from baffle.device import relay
from baffle.endpoint import Endpoint
from baffle.errors import BaffleError, ConfigError, DeliveryError, MessageError, MissingExtraError
from baffle.exchange import HELLO, Envelope, Reply
from baffle.federation import Outcome, in_order

if TYPE_CHECKING:
    from baffle.training import Progress

try:
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise MissingExtraError("flwr", "flower", "baffle.flower") from error

_RECORD = "baffle"  # the one record of a message: "envelope" and "seconds" down, one of the next three up
_REPLY, _GONE, _REFUSED = "reply", "gone", "refused"
_QUERY = "query"
_HELLO = Envelope(HELLO)
_HELLO_SECONDS = 60.0
_EXPIRED = (3, 4)  # of flwr's error codes: the message, or its reply, outlived its time


class FlowerDriver:
    """Brings envelopes to a Flower federation's nodes, and knows by which name each goes.

    Nodes are asked for their device's name when they come. ``names`` waits before the first round until all
    ``expected`` devices are there, and before later ones until ``least`` are: ``patience`` seconds, after
    which fewer than ``least`` are a DeliveryError. ``poll``: seconds between two looks at what has come.
    While the SuperLink is away, calls wait for it as Flower does.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        expected: Collection[str],
        least: int = 1,
        patience: float = 120.0,
        poll: float = 0.2,
    ) -> None:
        if not 1 <= least <= len(expected):
            raise ConfigError(f"least = {least}: from 1 to the {len(expected)} clients that there are")
        if patience < 0 or poll <= 0:
            raise ConfigError("patience is not negative, and poll positive")
        self._grid, self._expected = grid, frozenset(expected)
        self._least, self._patience, self._poll = least, patience, poll
        self._nodes: dict[str, int] = {}
        self._asked: dict[str, int] = {}  # hellos that are under way: message → node
        self._strangers: dict[int, str] = {}  # nodes that are not asked again, and the name each claims
        self._waits_for = len(self._expected)

    def names(self) -> Sequence[str]:
        until = time.monotonic() + self._patience
        while True:
            self._look()
            if len(self._nodes) >= self._waits_for:
                break
            if time.monotonic() >= until:
                if len(self._nodes) < self._least:
                    there = f"{len(self._nodes)} of at least {self._least} devices are there"
                    raise DeliveryError("gone", f"{there} after {self._patience:g} s")
                break
            time.sleep(self._poll)
        self._waits_for = self._least
        return sorted(self._nodes)

    def ask(
        self, stage: str, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        """All in one push; then looks every ``poll`` seconds, until all have replied or the deadline is over.

        Memory: the envelopes of the stage, equal ones once.
        """
        return in_order(requests, self._exchange(stage, requests, deadline))

    def _exchange(
        self, stage: str, requests: Mapping[str, bytes], deadline: float | None
    ) -> Iterator[tuple[str, Outcome]]:
        until = None if deadline is None else time.monotonic() + deadline
        nodes = {name: self._nodes[name] for name in requests if name in self._nodes}
        for name in requests:
            if name not in nodes:
                yield name, DeliveryError("gone", "its node has left the federation")
        records: dict[bytes, Any] = {}  # to all clients the same model: one object for Flower to store
        messages = []
        for name, node in nodes.items():
            envelope = requests[name]
            if envelope not in records:
                records[envelope] = _record(envelope=envelope, seconds=deadline or 0.0)
            messages.append(_message(records[envelope], node, stage, deadline))
        open_: dict[str, str] = {}
        for name, number in zip(nodes, self._push(messages), strict=True):
            if number:
                open_[number] = name
            else:
                yield name, DeliveryError("gone", "the SuperLink takes no message for its node")
        messages.clear()
        records.clear()
        while open_:
            for reply in self._grid.pull_messages(list(open_)):
                to = open_.pop(reply.metadata.reply_to_message_id, None)
                if to is not None:
                    yield to, _outcome(reply)
            if not open_:
                return
            if until is not None and time.monotonic() >= until:
                break
            time.sleep(self._poll)
        for name in open_.values():
            yield name, DeliveryError("late", f"no reply within {deadline:g} s")

    def _push(self, messages: list[Message]) -> Sequence[str | None]:
        return list(self._grid.push_messages(messages)) if messages else []

    # -- who is there -----------------------------------------------------------------------------

    def _look(self) -> None:
        """Forgets nodes that have left, asks new ones for their name, and takes in what has come of that."""
        present = set(self._grid.get_node_ids())
        for name, node in list(self._nodes.items()):
            if node not in present:
                del self._nodes[name]
                events.emit("client-gone", "its node has left the federation", level="warning", client=name)
                # Whoever claims the same name may have it now.
                self._strangers = {n: claimed for n, claimed in self._strangers.items() if claimed != name}
        self._strangers = {n: claimed for n, claimed in self._strangers.items() if n in present}
        known = {*self._nodes.values(), *self._asked.values(), *self._strangers}
        new = sorted(present - known)
        hello = _record(envelope=_HELLO.encode(), seconds=_HELLO_SECONDS)
        numbers = self._push([_message(hello, node, HELLO, _HELLO_SECONDS) for node in new])
        self._asked.update({number: node for number, node in zip(numbers, new, strict=True) if number})
        if not self._asked:
            return
        for reply in self._grid.pull_messages(list(self._asked)):
            found = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if found is not None:
                self._meet(found, _outcome(reply))

    def _meet(self, node: int, outcome: Outcome) -> None:
        """A node's answer to hello. One that gave none is asked again at the next look."""
        if isinstance(outcome, DeliveryError):
            if outcome.reason == _REFUSED:
                raise ConfigError(str(outcome))
            return events.emit("hello", str(outcome), level="debug", node=node)
        try:
            reply = Reply.decode(outcome)
        except MessageError as error:
            self._strangers[node] = ""
            return _turned_away(node, f"it does not say who it is: {error}")
        name = reply.text
        if reply.status != "answer" or reply.ticket != _HELLO.ticket(name) or name not in self._expected:
            self._strangers[node] = ""
            return _turned_away(node, f"it calls itself {name!r}, and no client of the job is called so")
        if name in self._nodes:
            self._strangers[node] = name
            return _turned_away(node, f"another node is {name} already")
        self._nodes[name] = node
        return events.emit("client-came", "its node has come", client=name, node=node)


def _turned_away(node: int, text: str) -> None:
    events.emit("unknown-client", text, level="warning", node=node, reason="unknown")


def _record(**values: Any) -> Any:
    return ConfigRecord(values)


def _message(record: Any, node: int, stage: str, seconds: float | None) -> Message:
    return Message(
        RecordDict({_RECORD: record}), dst_node_id=node, message_type=_QUERY, ttl=seconds, group_id=stage
    )


def _outcome(reply: Message) -> Outcome:
    """What a node's reply comes to: the device's bytes, or why there are none."""
    if reply.has_error():
        reason = "late" if reply.error.code in _EXPIRED else "gone"
        return DeliveryError(reason, f"Flower: {events.clean(reply.error.reason or reply.error.code)}")
    record = reply.content.get(_RECORD)
    values = dict(record) if isinstance(record, ConfigRecord) else {}
    if isinstance(body := values.get(_REPLY), bytes):
        return body
    for reason in (_GONE, "late", _REFUSED):
        if isinstance(text := values.get(reason), str):
            return DeliveryError(reason, events.clean(text))
    return DeliveryError("malformed", "its node's reply is none of this app's")


# -- the node's side --------------------------------------------------------------------------------


def _serve(message: Message, context: Context) -> Message:
    """One message on a node: its envelope to the device, the device's reply back."""
    return Message(RecordDict({_RECORD: _answer(message, context)}), reply_to=message)


def _answer(message: Message, context: Context) -> Any:
    record: Any = message.content[_RECORD]
    envelope, seconds = bytes(record["envelope"]), float(record["seconds"])
    try:
        if "device" in context.node_config:
            reply = relay(str(context.node_config["device"]), envelope, seconds or None)
        else:
            reply = _virtual(context).handle(envelope)
    except DeliveryError as error:
        return _record(**{error.reason: str(error)})
    except BaffleError as error:
        return _record(**{_REFUSED: str(error)})
    return _record(**{_REPLY: reply})


def _virtual(context: Context) -> Endpoint:
    """A node of Flower's simulation: its client, built in this process and kept for the next message."""
    if "partition-id" not in context.node_config:
        raise ConfigError("this node has no device: --node-config 'device=\"PATH\"' (see baffle device)")
    config = Settings.read(context.run_config).config
    if config.secure:
        raise ConfigError(
            "Flower's simulation moves clients from process to process, and secure sums have keys that must "
            "not move: use baffle train, or nodes with devices"
        )
    clients = _virtual_clients(config)
    number = int(context.node_config["partition-id"])
    if number >= len(clients):
        raise ConfigError(f"node {number} is one more than the {len(clients)} clients of the settings")
    return clients[number]


@lru_cache(maxsize=1)
def _virtual_clients(config: TrainConfig) -> list[Endpoint]:
    from baffle.job import build

    return [Endpoint(client) for client in build(config).clients]


# -- the server's side ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """A run config: those of ``TrainConfig``, by their names, and these of the app. "" is not set."""

    config: TrainConfig
    run: str = ""  # the run folder, on the ServerApp's machine
    resume: bool = False  # go on with it, by its own settings
    least: int = 1  # fewest devices that a round starts with
    patience: float = 120.0  # seconds to wait for these, and for all before the first round
    poll: float = 0.2  # seconds between two looks for replies

    @classmethod
    def read(cls, run_config: Mapping[str, Any]) -> Settings:
        """Raises ConfigError for an unknown setting, and for a value that cannot be."""
        given = {key: value for key, value in run_config.items() if value != ""}
        own: dict[str, Any] = {}
        for field in fields(cls):
            if field.name == "config" or field.name not in given:
                continue
            value, wanted = given.pop(field.name), type(field.default)
            if wanted is float and type(value) is int:
                value = float(value)
            if type(value) is not wanted:
                raise ConfigError(f"{field.name} = {value!r}: expected {wanted.__name__}")
            own[field.name] = value
        return cls(TrainConfig.resolve(given), **own)


def _main(grid: Grid, context: Context) -> None:
    """The whole run. A BaffleError is said in one line, and fails the run."""
    try:
        _train(grid, Settings.read(context.run_config))
    except BaffleError as error:
        _say(f"baffle: {error}")
        raise error.with_traceback(None) from None  # Flower shows it once more


def _train(grid: Grid, settings: Settings) -> None:
    from baffle import training
    from baffle.job import device_names
    from baffle.runs import RunFolder

    if not settings.run:
        raise ConfigError("run: name the run folder, --run-config 'run=\"PATH\"'")
    path = Path(settings.run).expanduser()
    config = RunFolder.open(path).config() if settings.resume else settings.config
    driver = FlowerDriver(
        grid,
        expected=device_names(config),
        least=settings.least,
        patience=settings.patience,
        poll=settings.poll,
    )
    if settings.resume:
        folder = training.resume(path, _report, driver=driver)
    else:
        folder = training.train(config, path, _report, driver=driver)
    _say(f"{folder.path}: the run has ended")


def _report(p: Progress) -> None:
    accuracy = "" if p.accuracy is None or not p.evaluated else f", accuracy {p.accuracy:.4f}"
    spent = "" if p.epsilon is None else f", ε {p.epsilon:.3g}"
    aborted = f", no step: {p.aborted}" if p.aborted else ""
    _say(f"round {p.round}/{p.rounds}{accuracy}{spent}, {p.seconds:.0f} s{aborted}")


def _say(line: str) -> None:
    print(line, flush=True)


client_app = ClientApp()
client_app.query()(_serve)
server_app = ServerApp()
server_app.main()(_main)
