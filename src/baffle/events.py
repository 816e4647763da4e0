"""What happens in a run, as structured events of the standard ``logging``: logger "baffle".

An event is a short name, one line of text and fields with names: ``dropout``, "client-004 did not answer in
time", client = "client-004", reason = "late". Handlers of a user's own see it as ``record.event``,
``record.fields`` and the message, at the levels that the user's logging lets through. A run's folder keeps
them, one JSON object a line (``to``). Nothing is printed unasked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import numbers
import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("baffle")
_LOG.addHandler(logging.NullHandler())
_FILES: list[JsonLines] = []  # beside the logger: they keep what its level leaves out

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_MOST_TEXT = 500
_MOST_ITEMS = 100
_MOST_DEPTH = 4
_MOST_MARKS = 2


def emit(event: str, text: str, *, level: str = "info", **fields: Any) -> None:
    """Says that ``event`` happened: ``text`` is one line for people, ``fields`` are for programs.

    Text and fields may hold what a client sent: they are made harmless first (``clean``, ``plain``). Never
    raises for what they hold, nor for a disk that is full. ``level``: debug, info, warning or error.
    """
    number, name = _LEVELS[level], clean(event)
    files, enabled = [file for file in _FILES if number >= file.level], _LOG.isEnabledFor(number)
    if not (files or enabled):
        return
    path, line, function, _ = _LOG.findCaller(stacklevel=2)
    extra = {"event": name, "fields": {clean(key): plain(value) for key, value in fields.items()}}
    record = _LOG.makeRecord(_LOG.name, number, path, line, clean(text), (), None, function, extra)
    for file in files:
        file.handle(record)
    if enabled:
        _LOG.handle(record)


def size(count: float) -> str:
    """Bytes, with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def clean(text: object, most: int = _MOST_TEXT) -> str:
    """``text`` on one line of at most ``most`` characters, all of which can be printed.

    Line breaks become spaces; what else could move a cursor, colour a terminal or turn the direction of
    writing (control and format characters, lone surrogates) its escape, as in ``\\x1b``. Of marks that pile
    up on one letter two are left.
    """
    try:
        given = str(text)
    except Exception:  # a __str__ that is not ours
        given = f"<{type(text).__name__}>"
    shown: list[str] = []
    marks = 0
    for letter in " ".join(given[: 2 * most].split()):
        marks = marks + 1 if unicodedata.category(letter).startswith("M") else 0
        if marks <= _MOST_MARKS:
            shown.append(letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii"))
    line = "".join(shown)
    return line if len(line) <= most and len(given) <= 2 * most else line[: most - 1] + "…"


def plain(value: object, depth: int = 0) -> Any:
    """``value`` as JSON has it: numbers that are not finite are None, what JSON has no word for is its text.

    Texts are cleaned; of long or deep collections the beginning is kept.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value) if abs(int(value)) < 2**63 else clean(hex(int(value)))
    if isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            return float(value) if math.isfinite(value) else None
    if depth < _MOST_DEPTH and isinstance(value, Mapping):
        pairs = list(value.items())[:_MOST_ITEMS]
        return {clean(key): plain(entry, depth + 1) for key, entry in pairs}
    if depth < _MOST_DEPTH and isinstance(value, list | tuple | set | frozenset):
        return [plain(entry, depth + 1) for entry in list(value)[:_MOST_ITEMS]]
    return clean(value)


class JsonLines(logging.Handler):
    """Adds each record to a file: one JSON object a line, in one write.

    A disk that refuses never breaks a run: it is said once on stderr, and what does not fit is lost. A line
    that was cut short, by a full disk or a kill, is ended before the next, so that it takes no other with it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._path = Path(path)
        self._complained = False

    def emit(self, record: logging.LogRecord) -> None:
        """One line. Records that `events.emit` did not make have the event "log"."""
        try:
            self._append(json.dumps(_as_dict(record), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except Exception as error:
            if not self._complained:
                self._complained = True
                why = error.strerror if isinstance(error, OSError) else error
                with contextlib.suppress(Exception):
                    print(f"cannot write {clean(self._path)}: {clean(why)}; events are lost", file=sys.stderr)

    def _append(self, line: bytes) -> None:
        with self._path.open("a+b", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _as_dict(record: logging.LogRecord) -> dict[str, Any]:
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    line = {
        "time": time.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": clean(getattr(record, "event", "log")),
    }
    fields = plain(getattr(record, "fields", {}))
    line |= {key: value for key, value in fields.items() if key not in line}
    return line | {"text": clean(record.getMessage())}


@contextlib.contextmanager
def to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps in the file at ``path`` what ``emit`` says meanwhile, but for debug.

    The level of the user's logging is neither asked nor changed.
    """
    file = JsonLines(path)
    file.setLevel(logging.INFO)
    _FILES.append(file)
    try:
        yield
    finally:
        _FILES.remove(file)
        file.close()


class Tail:
    """The complete lines of a file that another process adds to; each is read once.

    A file that was cut or written anew, as a resumed run's metrics are, is read from its start again.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._at = 0
        self._last = b""  # the line before self._at: where it has changed, so may have all

    def more(self) -> tuple[list[bytes], bool]:
        """The lines since the last call, and True where they begin the file anew.

        No file yet: no lines. Raises OSError for one that cannot be read.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            anew, self._at, self._last = self._at > 0, 0, b""
            return [], anew
        with file:
            file.seek(self._at - len(self._last))
            anew = file.read(len(self._last)) != self._last
            if anew:
                self._at, self._last = 0, b""
                file.seek(0)
            *lines, _cut_short = file.read().split(b"\n")
        if lines:
            self._at += sum(map(len, lines)) + len(lines)
            self._last = lines[-1] + b"\n"
        return lines, anew


def reading(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The events in a file; what is no event, and a last line that was cut short, is left out.

    Raises OSError for a file that cannot be read; none is no events.
    """
    for line in Tail(path).more()[0]:
        event = as_object(line)
        if isinstance(event.get("event"), str):
            yield event


def as_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; {} where it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
