"""``baffle top``: a run, live, on a terminal, or once as text.

``lines`` makes a page of a ``View`` and knows nothing of terminals. Plain escape sequences paint it: a
package for that would be one more on every server.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import shutil
import signal
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from baffle.config import TrainConfig
from baffle.events import clean, size
from baffle.watch import RECENT, Round, View, Watch

Span = tuple[str, str]  # text, style
Line = list[Span]

_STYLES = {"head": "1", "dim": "2", "good": "32", "warning": "33", "error": "31", "bar": "36"}
_LABEL = 12
_STAGES = 64  # columns of the table of stages without its bars
_DROPOUTS = 54
_GAP = 4  # between the two, where there is room for both


def lines(view: View, width: int, height: int, *, color: bool = False) -> list[str]:
    """The page: at most ``height`` lines of at most ``width`` columns. ``color``: with escape sequences."""
    page = [_render(line, width, color) for line in _page(view, max(width, 20), height)]
    return page[: max(height, 0)]


def _page(view: View, width: int, height: int) -> list[Line]:
    head = [_title(view, width), [(" " + _description(view.config), "dim")]]
    if view.damaged:
        head.append([(f" {view.damaged:,} damaged lines are left out", "warning")])
    if view.last is None:
        blocks = [head, [[(" waits for its first round", "")]]]
        return _joined(blocks, view, height)
    bar = min(width - _STAGES - _GAP - _DROPOUTS, 20)
    for most in (99, 6, 3, 1):
        drops = _dropouts(view, view.last, most)
        if bar >= 6:
            middle = [_beside(_stages(view, view.last, bar), drops, _STAGES + bar + _GAP)]
        else:
            middle = [_stages(view, view.last, max(min(width - _STAGES - 1, 20), 4)), drops]
        blocks = [head, _progress(view, view.last, width) + _learning(view, width), *middle]
        if sum(map(len, blocks)) + _least_events(view) <= height:
            break
    return _joined(blocks, view, height)


def _least_events(view: View) -> int:
    return min(len(view.events), 3) + 1 if view.events else 0


def _joined(blocks: list[list[Line]], view: View, height: int) -> list[Line]:
    """The blocks, with an empty line before as many of them as there is room for; below them the events."""
    spare = height - sum(map(len, blocks)) - _least_events(view)
    last = len(blocks)
    apart = [n for n in (2, last, 3, 1) if n < last or (n == last and view.events)][: max(spare, 0)]
    page: list[Line] = []
    for number, block in enumerate(blocks):
        page += [*([[]] if number in apart else []), *block]
    gap: list[Line] = [[]] if last in apart else []
    return page + gap + _events(view, height - len(page) - len(gap))


def _title(view: View, width: int) -> Line:
    ago = "" if view.heard is None else f" {_age(view.now - view.heard)} ago"
    said = view.events[-1]["event"] if view.events else ""
    if view.ended:
        state, style = f"ended{ago}", "good"
    elif said in ("failed", "stopped"):
        state, style = said + ago, "warning"
    elif view.quiet:
        state, style = f"quiet, last word{ago}", "warning"
    elif view.last is None:
        state, style = "starting", "good"
    else:
        state, style = f"running, last word{ago}", "good"
    gap = width - _columns(view.name) - _columns(state) - 4
    return [(f" {view.name}", "head"), (" " * max(gap, 2), ""), ("● " + state, style)]


def _description(config: TrainConfig) -> str:
    cohort = f", {config.cohort} a round" if config.cohort else ""
    k = f"{config.forward_passes} passes" if config.forward_passes else f"K = {config.directions or 100}"
    parts = [
        config.data,
        config.model,
        f"{config.clients} clients{cohort}",
        config.fidelity if config.fidelity == "backprop" else f"{config.fidelity}, {k}",
        f"{config.local_epochs} local epochs" if config.local_epochs else "",
        f"{config.local_steps} steps a round" if config.local_steps > 1 else "",
        "secure sums" if config.secure else "",
        f"private: each {config.privacy}" if config.privacy else "",
        f"{config.downlink} down" if config.downlink != "model" else "",
    ]
    return " · ".join(clean(part) for part in parts if part)


def _progress(view: View, last: Round, width: int) -> list[Line]:
    pace, left = view.pace, ""
    if view.rounds is None:
        rounds: Line = [(_label("rounds"), "head"), (f"{view.done:,} done", "")]
    else:
        share = min(view.done / max(view.rounds, 1), 1.0)
        count = f"{view.done:,} of {view.rounds:,}  "
        bar = max(width - _LABEL - len(count) - 8, 5)
        full = round(share * bar)
        rounds = [
            (_label("rounds"), "head"),
            (count, ""),
            ("━" * full, "bar"),
            ("─" * (bar - full), "dim"),
            (f" {math.floor(100 * share):4d} %", ""),
        ]
        if not view.ended:
            left = f", {_duration(max(pace * (view.rounds - view.done), 0))} left"
    times: Line = [(_label("time"), "head"), (f"{_duration(pace)} a round{left}", "")]
    times.append((f", {_duration(last.elapsed)} so far", "dim"))
    if last.aborted is None:
        cohort: Line = [(_label("cohort"), "head"), (f"{last.asked} asked, {last.answered} answered", "")]
    else:
        cohort = [(_label("cohort"), "head"), (f"{last.asked} asked, no sum: {last.aborted}", "warning")]
    if view.aborted:
        without = "1 round" if view.aborted == 1 else f"{view.aborted:,} rounds"
        cohort.append((f", {without} without a sum", "warning"))
    return [rounds, times, cohort]


def _learning(view: View, width: int) -> list[Line]:
    at = [look.round for look in view.looks]
    rows = [
        ("loss", range(len(view.losses)), view.losses, np.min),
        ("accuracy", at, [look.accuracy for look in view.looks], np.max),
        ("EMA", at, [look.ema_accuracy for look in view.looks], np.max),
    ]
    if not np.isfinite(view.losses).any():  # what devices see does not leave them
        rows[0] = ("test loss", at, [look.loss for look in view.looks], np.min)
    room = max(min(width - _LABEL - 25, 160), 5)
    found: list[Line] = []
    for name, where, values, best in rows:
        seen = np.asarray(values, dtype=np.float64)
        now = seen[-1] if len(seen) else math.nan
        seen = seen[np.isfinite(seen)]
        found.append(
            [
                (_label(name), "head"),
                (f"{now:.4f}  " if math.isfinite(now) else "–       ", ""),
                (_sparkline(where, values, view.done, room), "bar"),
                (f"  best {best(seen):.4f}" if len(seen) else "", "dim"),
            ]
        )
    if view.config.privacy is not None:
        value = "–" if view.epsilon is None else f"{view.epsilon:.4g}"
        target = f" of {view.config.target_epsilon:g}" if view.config.target_epsilon else ""
        found.append([(_label("ε"), "head"), (value + target, ""), (f" at δ = {view.config.delta:g}", "dim")])
    return found


def _stages(view: View, last: Round, bar: int) -> list[Line]:
    """The last round's exchanges: who was asked, how long it took, what it carried; and sums."""
    table = [_stage_row(("stage", "asked", "answered", "seconds", "down", "up"), " " * bar, "head")]
    for stage in last.stages[:12]:
        cells = (
            *(stage.name, f"{stage.asked:,}", f"{stage.answered:,}", f"{stage.seconds:.3f}"),
            *(size(stage.bytes_down), size(stage.bytes_up)),
        )
        style = "warning" if stage.answered < stage.asked else ""
        table.append(_stage_row(cells, _bar(stage.seconds / max(last.seconds, 1e-9), bar), style))
    answered = "–" if last.aborted else f"{last.answered:,}"
    each = max(last.asked, 1)
    sums: list[tuple[Any, ...]] = [
        ("round", f"{last.asked:,}", answered, f"{last.seconds:.3f}", last.bytes_down, last.bytes_up),
        ("a client", "", "", "", last.bytes_down / each, last.bytes_up / each),
        ("all rounds", "", "", f"{last.elapsed:,.1f}", view.bytes_down, view.bytes_up),
    ]
    table += [_stage_row((*texts, size(down), size(up)), " " * bar, "") for *texts, down, up in sums]
    return table


def _stage_row(cells: Sequence[str], bar: str, style: str) -> Line:
    name, asked, answered, seconds, down, up = cells
    plain = "dim" if style == "head" else ""
    return [
        (_label(name), style if style == "head" else ""),
        (f"{asked:>6}", plain),
        (f"{answered:>10}", plain or style),
        (f"{seconds:>10}  ", plain),
        (bar, "bar"),
        (f"{down:>12}{up:>12}", plain),
    ]


def _dropouts(view: View, last: Round, most: int) -> list[Line]:
    """Who dropped out where and why: in the last round, in the recent ones, ever; the most first."""
    if not view.dropouts:
        return [[(_label("dropouts"), "head"), ("none", "dim")]]
    recent: Counter[tuple[str, str]] = Counter()
    for round_ in view.recent:
        recent.update(round_.dropouts)
    order = sorted(view.dropouts, key=lambda key: (-recent[key], -view.dropouts[key], key))
    table: list[Line] = [
        [(_label("dropouts"), "head"), (f"{'':12}{'last round':>12}{f'last {RECENT}':>9}{'ever':>9}", "dim")]
    ]
    for key in order[:most]:
        now = last.dropouts.get(key, 0)
        table.append(
            [
                (_label(key[0]) + _padded(key[1], 12), "warning" if now else ""),
                (f"{now or '–':>12}{recent[key] or '–':>9}{view.dropouts[key]:>9,}", ""),
            ]
        )
    if len(order) > most:
        rest = sum(view.dropouts[key] for key in order[most:])
        table.append([(_label(""), ""), (f"and {len(order) - most} other reasons, {rest:,} ever", "dim")])
    return table


def _events(view: View, height: int) -> list[Line]:
    """The last events, the newest below."""
    if not view.events or height < 2:
        return []
    shown: list[Line] = [[(_label("events"), "head")]]
    for event in view.events[-(height - 1) :]:
        level = clean(event.get("level", ""), 10)
        where = [f"round {event['round']}" if type(event.get("round")) is int else ""]
        where += [clean(event[name], 40) for name in ("client", "stage", "reason") if name in event]
        place, text = ", ".join(filter(None, where)), clean(event.get("text", ""))
        place = "" if text.startswith(place) else place + ": "
        shown.append(
            [
                (f" {_moment(event.get('time'), view.now)}  ", "dim"),
                (_padded(clean(event["event"], 18), 15) + " ", level if level in _STYLES else ""),
                (place, "dim"),
                (text, ""),
            ]
        )
    return shown


def _moment(text: object, now: float) -> str:
    """Local time of an event; of one that is a day old, its date."""
    try:
        moment = datetime.fromisoformat(str(text)).astimezone()
        today = abs(now - moment.timestamp()) < 86400
    except (ValueError, OverflowError, OSError):
        return "--:--:--"
    return moment.strftime("%H:%M:%S" if today else "%Y-%m-%d")


def _beside(left: list[Line], right: list[Line], at: int) -> list[Line]:
    """Two blocks in one: the right one begins in column ``at``."""
    rows: list[Line] = []
    for number in range(max(len(left), len(right))):
        line = left[number] if number < len(left) else []
        if number < len(right):
            gap = at - sum(_columns(text) for text, _ in line)
            line = [*line, (" " * max(gap, 1), ""), *right[number]]
        rows.append(line)
    return rows


def _label(text: str) -> str:
    return " " + _padded(text, _LABEL - 1)


def _padded(text: str, width: int) -> str:
    cut = _cut(text, width - 1)
    return cut + " " * (width - _columns(cut))


def _columns(text: str) -> int:
    """How wide a terminal shows it."""
    return sum(map(_width, text))


def _width(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _cut(text: str, room: int) -> str:
    if _columns(text) <= room:
        return text
    used, shown = 0, ""
    for letter in text:
        used += _width(letter)
        if used >= room:
            break
        shown += letter
    return shown + "…" if room > 0 else ""


def _render(line: Line, width: int, color: bool) -> str:
    text, room = "", width
    for piece, style in line:
        shown = _cut(piece, room)
        room -= _columns(shown)
        code = _STYLES.get(style) if color and shown.strip() else None
        text += f"\x1b[{code}m{shown}\x1b[0m" if code else shown
        if shown != piece:
            break
    return text.rstrip()


def _bar(share: float, width: int) -> str:
    """A bar of ``width`` columns, to an eighth of one."""
    eighths = round(8 * width * min(max(share, 0.0), 1.0))
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip().ljust(width)[:width]


def _sparkline(at: Sequence[int], values: Sequence[float], rounds: int, width: int) -> str:
    """Values against rounds 0 … ``rounds`` − 1, in at most ``width`` columns, from the least to the most.

    A column is the mean of the values in it; where there are none, the value before.
    """
    columns = min(rounds, width)
    known = np.isfinite(values)
    if not known.any():
        return " " * columns
    column = (np.asarray(at) * columns // rounds)[known]
    counts = np.bincount(column, minlength=columns)
    heights = np.bincount(column, np.asarray(values)[known], columns) / np.maximum(counts, 1)
    least, most = heights[counts > 0].min(), heights[counts > 0].max()
    levels = np.rint(7 * (heights - least) / (most - least)) if most > least else np.full(columns, 3)
    curve = ""
    for level, count in zip(levels, counts, strict=True):
        curve += "▁▂▃▄▅▆▇█"[int(level)] if count else (curve[-1:] or " ")
    return curve


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    return _age(seconds)


def _age(seconds: float) -> str:
    """Without parts of a second, which nobody can read while they change."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# -- a terminal ---------------------------------------------------------------------------------------

_ENTER = b"\x1b[?1049h\x1b[?25l\x1b[?7l"  # another screen, no cursor, no wrapping ...
_LEAVE = b"\x1b[?7h\x1b[?25h\x1b[?1049l"  # ... and back
_BLINK = 0.2  # seconds between two looks at keys and at the terminal's size


def once(watch: Watch) -> None:
    """Prints one page: as high as it needs to be, coloured on a terminal."""
    color, size = _colored(), shutil.get_terminal_size((80, 24))
    for line in lines(watch.look(), size.columns, 40, color=color):
        print(line)


def live(watch: Watch, every: float, note: str = "") -> None:
    """Shows the page and renews it ``every`` so many seconds, until q or Ctrl-C. Needs a terminal."""
    foot = f" q ends · every {every:g} s" + (f" · {note}" if note else "")
    color, due, size = _colored(), 0.0, os.terminal_size((0, 0))
    with _screen() as (out, keys):
        view = watch.look()
        while True:
            before, size = size, _size_of(out)
            if time.monotonic() >= due:
                view, due = watch.look(), time.monotonic() + every
                before = os.terminal_size((0, 0))
            if size != before:
                page = lines(view, size.columns, size.lines - 1, color=color)
                page += [""] * (size.lines - 1 - len(page))
                _write(out, _frame([*page, _render([(foot, "dim")], size.columns, color)]))
            if _ends(keys, min(_BLINK, every)):
                return


def on_terminal() -> bool:
    """True where a live page can be shown."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _colored() -> bool:
    return on_terminal() and not os.environ.get("NO_COLOR")


def _frame(page: Sequence[str]) -> bytes:
    """What draws a page over the one before, without a moment of emptiness between."""
    # Each line is emptied before it is written: after a full one, that would take its last letter.
    return ("\x1b[H\x1b[2K" + "\r\n\x1b[2K".join(page)).encode("utf-8", "replace")


def _size_of(out: int) -> os.terminal_size:
    try:
        size = os.get_terminal_size(out)
    except OSError:
        size = os.terminal_size((0, 0))
    return size if size.columns and size.lines else os.terminal_size((80, 24))


def _write(out: int, data: bytes) -> None:
    # Not print: a signal that comes in the middle of one may want to write too.
    while data:
        data = data[os.write(out, data) :]


def _ends(keys: int | None, seconds: float) -> bool:
    """Waits, and says whether somebody asked to end meanwhile."""
    if keys is None:
        time.sleep(seconds)
        return False
    if not select.select([keys], [], [], seconds)[0]:
        return False
    pressed = os.read(keys, 64)
    return not pressed or b"q" in pressed.lower()


@contextlib.contextmanager
def _screen() -> Iterator[tuple[int, int | None]]:
    """The terminal as the page needs it, and as it was afterwards: whatever ends or stops the page."""
    import termios  # POSIX, as run folders are
    import tty

    out = sys.stdout.fileno()
    keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
    before = None if keys is None else termios.tcgetattr(keys)

    def enter() -> None:
        if keys is not None:
            tty.setcbreak(keys)
        _write(out, _ENTER)

    def leave() -> None:
        _write(out, _LEAVE)
        if keys is not None and before is not None:
            termios.tcsetattr(keys, termios.TCSADRAIN, before)

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    def pause(_number: int, _frame: Any) -> None:  # Ctrl-Z: the shell gets its own screen meanwhile
        leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, pause)
        enter()

    handlers: dict[int, Callable[[int, Any], None]]
    handlers = {signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGTSTP: pause}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        enter()
        yield out, keys
    except KeyboardInterrupt:
        pass  # the usual way to end it
    finally:
        with contextlib.suppress(OSError):  # a terminal that is gone
            leave()
        for number, handler in old.items():
            signal.signal(number, handler)
