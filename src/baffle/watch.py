"""What a run folder says at one moment, read while the run writes it: for whoever watches.

The files are read and never written, so this may happen in another process than the run's, by another user.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baffle.config import TrainConfig
from baffle.errors import DataError
from baffle.events import Tail, as_object, clean
from baffle.federation import StageRecord
from baffle.runs import RunFolder

_EVENTS = 100
_DEFAULT_ROUNDS = 200  # as in a job whose config names neither rounds nor epochs
RECENT = 20  # rounds


@dataclass(frozen=True)
class Round:
    """One line of the metrics."""

    loss: float  # NaN where nobody said
    asked: int
    answered: int
    seconds: float
    elapsed: float  # since the run's start, without the time between a stop and a resume
    bytes_down: int
    bytes_up: int
    stages: tuple[StageRecord, ...]  # none in runs of older versions
    dropouts: Mapping[tuple[str, str], int]  # (stage, reason) → clients
    aborted: str | None


@dataclass(frozen=True)
class Look:
    """What a round found on the test set."""

    round: int
    loss: float
    accuracy: float
    ema_accuracy: float


@dataclass(frozen=True)
class View:
    """A run at one moment. Sums are over all rounds done; ``recent`` are the last twenty, in order."""

    name: str
    config: TrainConfig
    now: float  # seconds since 1970
    ended: bool
    rounds: int | None  # asked for; None where only the run knows
    done: int
    written: float | None  # when the last round was, in seconds since 1970
    heard: float | None  # when the last round or event was
    recent: tuple[Round, ...]
    losses: Sequence[float]  # one a round
    looks: Sequence[Look]
    epsilon: float | None
    bytes_down: int
    bytes_up: int
    aborted: int
    stage_seconds: Mapping[str, tuple[int, float]]  # stage → exchanges, seconds
    dropouts: Mapping[tuple[str, str], int]
    events: tuple[Mapping[str, Any], ...]
    damaged: int  # lines that are neither

    @property
    def last(self) -> Round | None:
        return self.recent[-1] if self.recent else None

    @property
    def pace(self) -> float:
        """Seconds that a round takes, over the recent ones; NaN before the first."""
        if not self.recent:
            return math.nan
        first, last = self.recent[0], self.recent[-1]
        if len(self.recent) == self.done:
            return last.elapsed / self.done
        return (last.elapsed - first.elapsed) / (len(self.recent) - 1)

    @property
    def quiet(self) -> bool:
        """True where a run that has not ended says less than it did: it may have been killed."""
        slowest = max((r.seconds for r in self.recent), default=20.0)
        return not self.ended and self.heard is not None and self.now - self.heard > 10 + 3 * slowest


class Watch:
    """Reads a run folder again and again; each time, no more than what was added.

    Raises DataError where there is no run. The files may be written meanwhile, and a resume may rewind them.
    Threads may share it.
    """

    def __init__(self, path: Path) -> None:
        self._folder = RunFolder.open(path)
        self._config = self._folder.config()
        self._metrics = Tail(path / "metrics.jsonl")
        self._said = Tail(self._folder.events)
        self._lock = threading.Lock()
        self._events: deque[Mapping[str, Any]] = deque(maxlen=_EVENTS)
        self._rounds = self._config.rounds or (None if self._config.epochs else _DEFAULT_ROUNDS)
        self._damaged = {self._metrics: 0, self._said: 0}
        self._forget()

    def _forget(self) -> None:
        self._done = self._aborted = self._down = self._up = 0
        self._recent: deque[Round] = deque(maxlen=RECENT)
        self._losses = array("d")
        self._looks: list[Look] = []
        self._epsilon: float | None = None
        self._stages: dict[str, tuple[int, float]] = {}
        self._dropouts: Counter[tuple[str, str]] = Counter()

    def look(self) -> View:
        """The run now. Raises DataError where a file cannot be read."""
        with self._lock:
            try:
                ended = self._folder.ended  # before the rows: a run that has ended writes no more
                self._read_metrics()
                self._read_events()
                written, said = (_changed(self._folder.path / f"{n}.jsonl") for n in ("metrics", "events"))
            except OSError as error:
                raise DataError(f"cannot read {self._folder.path}: {error.strerror}") from error
            return View(
                name=clean(self._folder.path.resolve().name, 60),
                config=self._config,
                now=time.time(),
                ended=ended,
                rounds=self._done if ended else self._rounds,
                done=self._done,
                written=written if self._done else None,
                heard=max((t for t in (written, said) if t is not None), default=None),
                recent=tuple(self._recent),
                losses=self._losses[:],
                looks=tuple(self._looks),
                epsilon=self._epsilon,
                bytes_down=self._down,
                bytes_up=self._up,
                aborted=self._aborted,
                stage_seconds=dict(self._stages),
                dropouts=dict(self._dropouts),
                events=tuple(self._events),
                damaged=sum(self._damaged.values()),
            )

    def _read_metrics(self) -> None:
        lines, anew = self._metrics.more()
        if anew:
            self._forget()
            self._damaged[self._metrics] = 0
        for line in lines:
            row = as_object(line)
            if row.get("round") == self._done:
                self._add(row)
            else:
                self._damaged[self._metrics] += 1

    def _add(self, row: Mapping[str, Any]) -> None:
        round_ = _round(row)
        self._done += 1
        self._aborted += round_.aborted is not None
        self._down += round_.bytes_down
        self._up += round_.bytes_up
        self._recent.append(round_)
        self._losses.append(round_.loss)
        self._dropouts.update(round_.dropouts)
        for stage in round_.stages:
            count, seconds = self._stages.get(stage.name, (0, 0.0))
            self._stages[stage.name] = (count + 1, seconds + stage.seconds)
        if "test_accuracy" in row:
            names = ("test_loss", "test_accuracy", "ema_accuracy")
            self._looks.append(Look(self._done - 1, *(_real(row.get(name)) for name in names)))
        if "epsilon" in row:  # null is infinite
            self._epsilon = math.inf if row["epsilon"] is None else _real(row["epsilon"])

    def _read_events(self) -> None:
        lines, anew = self._said.more()
        if anew:
            self._events.clear()
            self._damaged[self._said] = 0
        for line in lines:
            event = as_object(line)
            if not isinstance(event.get("event"), str):
                self._damaged[self._said] += 1
                continue
            self._events.append(event)
            if event["event"] == "run" and type(event.get("rounds")) is int:
                self._rounds = event["rounds"]


def read(path: Path) -> View:
    """A run at this moment. Raises DataError where there is none."""
    return Watch(path).look()


def _round(row: Mapping[str, Any]) -> Round:
    asked = _count(row.get("participants"))
    dropped = _count(row.get("dropped"))
    aborted = None if row.get("aborted") is None else clean(row["aborted"])
    stages = row.get("stages")
    if isinstance(stages, Mapping):
        counts = row.get("dropouts")
        dropouts = {
            (_name(stage), _name(reason)): _count(count)
            for stage, reasons in (counts.items() if isinstance(counts, Mapping) else ())
            for reason, count in (reasons.items() if isinstance(reasons, Mapping) else ())
        }
    else:  # of an older version, which said how many
        stages = {}
        dropouts = {("round", "aborted" if aborted else "not said"): dropped} if dropped else {}
    return Round(
        loss=_real(row.get("loss")),
        asked=asked,
        answered=max(asked - dropped, 0),
        seconds=_seconds(row.get("seconds")),
        elapsed=_seconds(row.get("elapsed")),
        bytes_down=_count(row.get("bytes_down")),
        bytes_up=_count(row.get("bytes_up")),
        stages=tuple(_stage(name, entry) for name, entry in stages.items() if isinstance(entry, Mapping)),
        dropouts=dropouts,
        aborted=aborted,
    )


@functools.lru_cache(1000)  # the same few in each of many rows
def _name(text: str) -> str:
    return clean(text, 20)


def _stage(name: str, entry: Mapping[str, Any]) -> StageRecord:
    return StageRecord(
        _name(name),
        _count(entry.get("asked")),
        _count(entry.get("answered")),
        _seconds(entry.get("seconds")),
        _count(entry.get("bytes_down")),
        _count(entry.get("bytes_up")),
    )


def _real(value: object) -> float:
    try:
        return float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        return math.nan


def _seconds(value: object) -> float:
    real = _real(value)
    return real if 0 <= real < math.inf else 0.0


def _count(value: object) -> int:
    return int(_seconds(value))


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
