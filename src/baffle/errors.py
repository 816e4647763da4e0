"""Every exception that baffle raises on purpose.

BaffleError                 one clear line: what, where, what to do; the command exits with 2
├── ConfigError             a setting that cannot be (K = 0, σ ≤ 0, an unknown name); a ValueError
├── DataError               a file or folder that is missing, truncated, malformed or malicious
├── PartitionError          a split of the data that cannot be made; a ConfigError
├── MissingExtraError       an optional package that the call needs is not installed
├── PrecisionError          σ lies below what the arithmetic resolves
├── LossError               a loss came out NaN or infinite; names the direction
├── MessageError            bytes that are no message of this version
├── DigestMismatchError     a client holds other weights than the plan was made for
├── LimitError              more than a device's owner allows; a round that its client stays out of
├── DeliveryError           a message that did not reach a client, or no reply by the deadline
├── AggregationError        answers that cannot be summed (none, of two rounds, of two lengths)
├── SecurityError           a step refused, because someone may be lying or too little is protected;
│                           AttestationError is one, of the enclave
└── CheckpointError         a checkpoint or log that is damaged, or of another job
"""

from __future__ import annotations


class BaffleError(Exception):
    """Root of the tree. ``str(error)`` is one line fit for a user."""


class ConfigError(BaffleError, ValueError):
    """A setting that cannot be."""


class PartitionError(ConfigError):
    """A split of the data that cannot be made."""


class DataError(BaffleError):
    """A data file or folder that is missing, truncated, malformed or malicious."""


class MissingExtraError(BaffleError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f"pip install 'baffle-fl[{extra}]'"
        )


class PrecisionError(BaffleError, ValueError):
    """σ lies below what the arithmetic resolves."""


class LossError(BaffleError, ArithmeticError):
    """A loss came out NaN or infinite."""


class MessageError(BaffleError, ValueError):
    """Bytes that are no message of this version."""


class DigestMismatchError(BaffleError):
    """A client holds other weights than the plan was made for.

    ``held`` says which, where the client keeps weights from round to round: the round (u64) and their digest
    (32 bytes); no bytes where it holds none.
    """

    def __init__(self, text: str, held: bytes = b"") -> None:
        super().__init__(text)
        self.held = held


class LimitError(BaffleError):
    """More than a device's owner allows.

    ``limit`` names what was exceeded, one of ``exchange.LIMITS``; ``most`` is how much is allowed, a whole
    number of at least 1 (for ``cohort``, how many are needed), None where there is none to say.
    """

    def __init__(self, limit: str, most: int | None, text: str) -> None:
        super().__init__(text)
        self.limit, self.most = limit, most


class DeliveryError(BaffleError):
    """A message that did not reach a client, or whose reply did not come. A driver yields it, as it is.

    ``reason``: "late" (no reply by the deadline), "gone" (its process or connection ended), "unknown" (an
    identity that is not expected), "malformed" (bytes that the transport could not take).
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class AggregationError(BaffleError):
    """Answers that cannot be summed."""


class SecurityError(BaffleError):
    """A step refused, because someone may be lying or too little is protected."""


class CheckpointError(BaffleError):
    """A checkpoint or log that is damaged, or of another job."""
