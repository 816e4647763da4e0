"""Whom a command trusts about an enclave, as it is typed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from baffle.errors import ConfigError, DataError

if TYPE_CHECKING:
    from baffle.enclave.evidence import Verifier


def kind_of(text: str, flag: str) -> tuple[str, str]:
    kind, colon, rest = text.partition(":")
    if kind not in ("software", "tpm") or not colon or not rest:
        raise ConfigError(f"{flag} {text}: software:… or tpm:… is expected")
    return kind, rest


def key_of(text: str, flag: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"{flag}: a public key is 64 hexadecimal digits")
    return key


def verifier_of(trust: str) -> Verifier:
    """The verifier that ``--trust`` names. Raises ConfigError or DataError for what is none."""
    kind, rest = kind_of(trust, "--trust")
    if kind == "software":
        from baffle.enclave.software import SoftwareVerifier

        return SoftwareVerifier(key_of(rest, "--trust"))
    from baffle.enclave.tpm import TpmVerifier

    try:
        return TpmVerifier(Path(rest).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {rest}: {error.strerror}") from error


def measurement_of(path: Path) -> bytes:
    """The measurement of the manifest that is trusted."""
    from baffle.enclave.manifest import Manifest

    try:
        return Manifest.decode(path.read_bytes()).measurement
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
