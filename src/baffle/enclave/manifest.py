"""What a worker is, written down and hashed: its *measurement*.

A manifest names every file that the worker's sandbox holds, by SHA-256: baffle's own code, the interpreter
with its libraries, the packages, the model's bundle; and the config, the limits and the system calls that it
runs under. The measurement is SHA-256 of its canonical JSON. The files are those that are bound into the
sandbox, and whatever lies in a bound folder counts, byte code included: what the worker can read is what was
measured. The kernel, bubblewrap and the firmware are not in it (``docs/enclave.md``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baffle.errors import ConfigError, DataError, MessageError

FORMAT = "baffle enclave manifest v1"
PACKAGES = "numpy", "cryptography", "cffi"  # what a worker imports, beside baffle
MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class Manifest:
    """Hashes are 64 hexadecimal digits. ``code`` and ``interpreter``: name of a file → its hash.

    ``packages``: name → (version, hash over the names and hashes of its files). ``model``: the same hash over
    the bundle's folder. ``config`` and ``limits``: whatever JSON can say. ``seccomp``: hash of the program
    that lists the system calls.
    """

    code: Mapping[str, str]
    interpreter: Mapping[str, str]
    packages: Mapping[str, tuple[str, str]]
    model: str
    config: Mapping[str, Any]
    limits: Mapping[str, Any]
    seccomp: str

    def encode(self) -> bytes:
        """The one byte string of this manifest. ConfigError for settings that JSON cannot say."""
        try:
            return _canonical({"format": FORMAT, **asdict(self)})
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"a manifest cannot hold such a setting: {error}") from error

    @property
    def measurement(self) -> bytes:
        """32 bytes: SHA-256 of ``encode``."""
        return hashlib.sha256(self.encode()).digest()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Raises MessageError for every byte string that ``encode`` does not give."""
        try:
            if len(data) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES} bytes")
            fields = json.loads(data.decode("ascii"))
            if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
                raise ValueError(f"not in the format {FORMAT!r}")
            for name in ("code", "interpreter", "packages", "config", "limits"):
                if not isinstance(fields.get(name), dict):
                    raise ValueError(f"{name} is no table")
            hashes = [fields.get("model"), fields.get("seccomp")]
            for table in (fields["code"], fields["interpreter"]):
                hashes += table.values()
            for name, (version, digest) in fields["packages"].items():
                fields["packages"][name] = (str(version), digest)
                hashes.append(digest)
            if not all(map(_is_hash, hashes)):
                raise ValueError("64 hexadecimal digits are a hash")
            found = cls(**fields)
            if found.encode() != data:
                raise ValueError("not in its canonical form")
        except (TypeError, ValueError, RecursionError) as error:
            raise MessageError(f"no manifest: {error}") from error
        return found

    @classmethod
    def of_this(
        cls,
        files: Mapping[str, Path],
        *,
        site: str,
        bundle: Path,
        config: Mapping[str, Any],
        limits: Mapping[str, Any],
        seccomp: bytes,
        packages: Iterable[str] = PACKAGES,
    ) -> Manifest:
        """The manifest of what is about to run.

        ``files``: what the sandbox is made of, as ``sandbox.launch`` takes it (path inside → file or folder
        outside). ``site``: the folder inside that holds baffle and the packages; a file there belongs to the
        package whose RECORD names its first part, every other file to the interpreter. ``bundle``: a folder.
        ``seccomp``: the program's bytes. Raises DataError for what cannot be read or is no file, ConfigError
        for a package that is not installed, and where there is no baffle in it. Cost: each is read once.
        """
        owners, versions = _owners(packages)
        code: dict[str, str] = {}
        interpreter: dict[str, str] = {}
        owned: dict[str, dict[str, str]] = {name: {} for name in versions}
        below = site.rstrip("/") + "/"
        for inside, digest in hashes_of(files).items():
            name = inside.removeprefix(below)
            first = name.split("/", 1)[0] if inside.startswith(below) else ""
            if first == "baffle":
                code[name] = digest
            elif first in owners:
                owned[owners[first]][name] = digest
            else:
                interpreter[inside] = digest
        if not code:
            raise ConfigError(f"no file of baffle is in the sandbox, below {site}")
        return cls(
            code,
            interpreter,
            {name: (version, _hash(owned[name])) for name, version in versions.items() if owned[name]},
            _hash(hashes_of({"": bundle})),
            dict(config),
            dict(limits),
            hashlib.sha256(seccomp).hexdigest(),
        )


def differences(trusted: Manifest, found: Manifest) -> list[str]:
    """What changed, a line each; no line for manifests that are the same."""
    lines = [*_changes("code", trusted.code, found.code)]
    lines += _changes("interpreter", trusted.interpreter, found.interpreter)
    for name in sorted(trusted.packages.keys() & found.packages.keys()):
        (version, digest), (version_found, digest_found) = trusted.packages[name], found.packages[name]
        if version != version_found:
            lines.append(f"package {name}: version {version_found} instead of {version}")
        elif digest != digest_found:
            lines.append(f"package {name}: files changed")
    lines += [f"package {name}: gone" for name in sorted(trusted.packages.keys() - found.packages.keys())]
    lines += [f"package {name}: new" for name in sorted(found.packages.keys() - trusted.packages.keys())]
    if trusted.model != found.model:
        lines.append("model: changed")
    for what, one, other in (
        ("config", trusted.config, found.config),
        ("limit", trusted.limits, found.limits),
    ):
        for name in sorted(one.keys() | other.keys()):
            was, now = (_shown(table, name) for table in (one, other))
            if was != now:
                lines.append(f"{what} {name}: {now} instead of {was}")
    if trusted.seccomp != found.seccomp:
        lines.append("seccomp: another list of system calls")
    return [line if line.isprintable() else ascii(line) for line in lines]  # file names are anybody's


def hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    """Path inside → SHA-256, for files and for all that folders hold; for a link there, of its target's name.

    Raises DataError for what cannot be read, and for what is neither file, folder nor link.
    """
    found: dict[str, str] = {}
    for inside, outside in sorted(files.items()):
        try:
            found.update(_walk(inside, outside.resolve(strict=True)))
        except OSError as error:
            raise DataError(f"cannot measure {error.filename or outside}: {error.strerror}") from error
    return found


def _walk(inside: str, path: Path | os.DirEntry[str]) -> Iterator[tuple[str, str]]:
    mode = path.stat(follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):  # where it leads inside the sandbox is measured there, or is not there
        yield inside, hashlib.sha256(b"link " + os.fsencode(os.readlink(path))).hexdigest()
    elif stat.S_ISREG(mode):
        with open(path, "rb", buffering=0) as file:
            yield inside, hashlib.file_digest(file, "sha256").hexdigest()
    elif stat.S_ISDIR(mode):
        with os.scandir(path) as entries:
            for entry in entries:
                yield from _walk(f"{inside}/{entry.name}", entry)
    else:
        raise DataError(f"{os.fspath(path)} is neither a file nor a folder: it cannot be measured")


def _owners(packages: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """First part of a path in the site's folder → package; package → version."""
    owners, versions = {}, {}
    for name in packages:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError(f"package {name} is not installed here: it cannot be measured") from error
        versions[name] = package.version
        owners.update({file.parts[0]: name for file in package.files or () if file.parts[0] != ".."})
    return owners, versions


def _changes(what: str, trusted: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(trusted.keys() | found.keys()):
        if name not in found:
            yield f"{what} {name}: gone"
        elif name not in trusted:
            yield f"{what} {name}: new"
        elif trusted[name] != found[name]:
            yield f"{what} {name}: changed"


def _shown(table: Mapping[str, Any], name: str) -> str:
    return _canonical(table[name]).decode() if name in table else "nothing"


def _hash(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(_canonical(hashes)).hexdigest()


def _is_hash(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def _canonical(data: object) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
