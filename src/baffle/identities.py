"""Identities on disk: a client's signing key, and the roster of public keys that everybody pins.

A key file holds 64 hexadecimal digits, readable by its owner alone. A roster has a line for each client: its
name, a space, its public key in hexadecimal; empty lines and lines that begin with # say nothing.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from baffle.errors import DataError, SecurityError
from baffle.secagg.primitives import KEY_BYTES, Identity
from baffle.secagg.session import Roster


def make_identity(path: Path) -> Identity:
    """A new key at ``path``, mode 0600. DataError where a file is there already, or the disk refuses."""
    identity = Identity.generate()
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(file, "w") as stream:
                stream.write(identity.to_bytes().hex() + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            path.unlink(missing_ok=True)  # half a key is none
            raise
    except FileExistsError as error:
        raise DataError(f"{path} is there already: a key is never written over") from error
    except OSError as error:
        raise DataError(f"cannot write the key {path}: {error.strerror}") from error
    return identity


def read_identity(path: Path) -> Identity:
    """The key at ``path``. DataError for a file that is none, SecurityError for one that others can read."""
    try:
        with path.open() as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            text = stream.read(1000).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the key {path}: {error}") from error
    if mode & 0o077:
        raise SecurityError(f"{path} can be read by others: chmod 600 {path}, and take another key if it was")
    secret = _key(text)
    if secret is None:
        raise DataError(f"{path} is no key: {2 * KEY_BYTES} hexadecimal digits are")
    return Identity.from_bytes(secret)


def read_roster(path: Path) -> Roster:
    """The roster at ``path``. Raises DataError, naming the line, for what is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the roster {path}: {error}") from error
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = _key(words[1]) if len(words) == 2 else None
        if key is None or words[0] in keys:
            raise DataError(f"{path}, line {number}: expected a name of its own, a space, a public key")
        keys[words[0]] = key
    return Roster(keys)


def _key(text: str) -> bytes | None:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES else None
