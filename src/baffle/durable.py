"""Files that are whole or not there, whatever ends the process that writes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Puts the parts, one behind the other, at ``path``: beside its place, synced, then moved there.

    Raises OSError where the disk refuses; nothing is left of it then. One that is killed on the way leaves a
    file whose name begins with a point and ends in ``.part``.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb", opener=_fresh) as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _fresh(path: str, flags: int) -> int:
    """Never through a link that somebody has put there."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
