"""Snapshots and the scalar log: what a server, or a late joiner, goes on from. Never pickle.

A checkpoint is one safetensors file whose header carries the rest as JSON and a digest of the whole,
written beside its place and moved there, so that at any moment the file is whole: the last one or the
new one. The scalar log holds each round's plan and sum, a few kilobytes whatever the model's size; a
snapshot plus the log behind it gives the server's weights, optimizer and EMA bit for bit, and each plan's
digest proves the step before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from baffle import durable
from baffle.errors import AggregationError, CheckpointError, ConfigError, LossError, MessageError
from baffle.plan import RoundPlan, RoundSum

if TYPE_CHECKING:
    from baffle.server import Server

_FORMAT = "baffle checkpoint v1"
_ITEMS = "__items__"  # stands for a dict whose keys JSON would turn into text


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Puts ``data`` at ``path`` whole or not at all, also if the process is killed on the way."""
    with _writing(path):
        durable.write(path, [data])


def save_checkpoint(path: Path, server: Server) -> None:
    """Writes the server's whole state. Raises CheckpointError where the disk or the state refuses."""
    arrays, rest = server.state()
    try:
        text = json.dumps(_to_json({"format": _FORMAT, **rest}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the optimizer's or scheduler's state is not plain data: {error}") from error
    write_atomically(path, save(arrays, metadata={"baffle": text, "sha256": _digest(text, arrays)}))


def load_checkpoint(path: Path, server: Server) -> None:
    """Puts the state at ``path`` back into a server made with the same settings.

    Raises CheckpointError for a file that is missing, damaged, or of another job.
    """
    arrays, rest = read_checkpoint(path)
    try:
        server.load_state(arrays, rest)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this job: {error}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays by name (``weights``, ``ema``, ``optimizer.*``) and the JSON rest."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            text, digest = metadata["baffle"], metadata["sha256"]
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if digest != _digest(text, arrays):
            raise CheckpointError(f"{path} is damaged: its digest does not fit what it holds")
        rest = _from_json(json.loads(text))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path}") from error
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
    if not isinstance(rest, dict) or rest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version ({_FORMAT})")
    return arrays, rest


def _digest(text: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    h = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        h.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        h.update(array.tobytes())
    return h.hexdigest()


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _to_json(entry) for key, entry in value.items()}
        return {_ITEMS: [[key, _to_json(entry)] for key, entry in value.items()]}
    return [_to_json(entry) for entry in value] if isinstance(value, list | tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        plain = {key: _from_json(entry) for key, entry in value.items()}
        return dict(plain[_ITEMS]) if _ITEMS in plain else plain
    return [_from_json(entry) for entry in value] if isinstance(value, list) else value


class ScalarLog:
    """A file of frames ``length u32 ‖ crc32(length) ‖ crc32(body) ‖ body``: a plan's, then its sum's.

    The length has a checksum of its own, so that a damaged one is not taken for a cut-short tail.

    Only batch-level, forward-only rounds fit in it: K numbers are all that a step depended on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, plan: RoundPlan, total: RoundSum) -> None:
        """Adds one round whole, flushed to the operating system. CheckpointError if the disk refuses."""
        frames = _frame(plan.encode()) + _frame(total.encode())
        with _writing(self.path):
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("ab") as file:
                    file.write(frames)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
                raise

    def sync(self) -> None:
        """Forces what was added onto the disk: before a checkpoint that relies on it."""
        if self.path.exists():
            with _writing(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def truncate(self, round_: int) -> None:
        """Drops every round from ``round_`` on, and a frame that was cut short."""
        if not self.path.exists():
            return
        kept = b"".join(
            _frame(plan.encode()) + _frame(total.encode()) for plan, total in self if plan.round < round_
        )
        write_atomically(self.path, kept)

    def __iter__(self) -> Iterator[tuple[RoundPlan, RoundSum]]:
        """The whole rounds, in order. A cut-short tail ends the log; damage inside raises."""
        bodies = list(self._bodies())
        try:
            for plan, total in zip(bodies[0::2], bodies[1::2], strict=False):
                yield RoundPlan.decode(plan), RoundSum.decode(total)
            if len(bodies) % 2:
                RoundPlan.decode(bodies[-1])  # what precedes a cut is a plan
        except MessageError as error:
            raise CheckpointError(f"{self.path} is damaged: {error}") from error

    def _bodies(self) -> Iterator[bytes]:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read the scalar log {self.path}: {error.strerror}") from error
        at = 0
        while at + _FRAME.size <= len(data):
            length, crc_of_length, crc = _FRAME.unpack_from(data, at)
            body = data[at + _FRAME.size : at + _FRAME.size + length]
            whole = len(body) == length
            if zlib.crc32(data[at : at + 4]) != crc_of_length or (whole and zlib.crc32(body) != crc):
                raise CheckpointError(f"{self.path} is damaged at byte {at}")
            if not whole:
                return
            yield body
            at += _FRAME.size + length


_FRAME = struct.Struct("<III")


def _frame(body: bytes) -> bytes:
    length = struct.pack("<I", len(body))
    return length + struct.pack("<II", zlib.crc32(length), zlib.crc32(body)) + body


def replay(server: Server, log: ScalarLog, until: int | None = None) -> int:
    """Takes the logged steps from ``server.round`` on, to round ``until`` or the log's end.

    Rounds that nobody answered are not in the log: they are skipped, up to ``until`` if it is given.

    Each plan must equal the one that this server would make itself, digest of the weights included: so
    a replay that went wrong anywhere is found at the next step. Returns the number of steps taken.
    Raises CheckpointError at the first plan that differs. Cost: no forward pass; K·n values a round.
    """
    steps = 0
    for plan, total in log:
        if plan.round < server.round:
            continue
        if until is not None and plan.round >= until:
            break
        while server.round < plan.round:
            server.skip()
        server.follow(plan)
        if plan != server.plan():
            raise CheckpointError(f"the log's round {plan.round} was not made from these weights")
        try:
            server.apply(total)
        except (AggregationError, ConfigError, LossError) as error:
            raise CheckpointError(f"the log's round {plan.round} cannot be taken: {error}") from error
        steps += 1
    while until is not None and server.round < until:
        server.skip()
    return steps
