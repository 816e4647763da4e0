"""What travels: plans, models and answers, each with one canonical byte form (``docs/spec.md``).

A message is ``"BFFL" ‖ version u8 ‖ kind u8 ‖ body``, little-endian, with no padding and nothing behind
the body. Decoding is total: bytes that are no message of this version raise MessageError, and
``decode(m).encode() == m`` for every message that decodes.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from baffle.digests import sha256
from baffle.errors import ConfigError, MessageError
from baffle.estimator import SCHEMES, SteinEstimator
from baffle.perturbations import Layers, Layout, perturbation_from_spec
from baffle.runtimes.sources import Source, chunks
from baffle.stream import SEED_BYTES, Stream
from baffle.wire import DIGEST_BYTES, Reader, check_row, check_u64, choice, decoding, header

Fidelity = Literal["forward-only", "law", "backprop"]
FIDELITIES: tuple[Fidelity, ...] = get_args(Fidelity)
LocalOptimizer = Literal["sgd", "adam"]
LOCAL_OPTIMIZERS: tuple[LocalOptimizer, ...] = get_args(LocalOptimizer)


def weights_digest(weights: Source, layout: Layout, frozen_digest: bytes) -> bytes:
    """SHA-256 (32 bytes) of a whole model: names and shapes, what is frozen, and the weights' bytes.

    ``weights`` is an array (n,) or any other source, which is read in slices.
    """
    h = sha256(b"baffle weights v1" + frozen_digest)
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        data = name.encode()
        h.update(struct.pack("<I", len(data)) + data + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
    for part in chunks(weights):
        h.update(np.ascontiguousarray(part, dtype="<f4").data)
    return h.digest()


@dataclass(frozen=True)
class LocalTraining:
    """Epoch-level communication (FedAvg): what a client does between two uploads.

    ``epochs`` passes over its own data with its own estimates and a fresh optimizer; every estimate is
    scaled down to inf-norm ``clip`` if that is positive; then ``weight_decay`` times the weights is added.
    """

    epochs: int = 1
    learning_rate: float = 0.01
    optimizer: LocalOptimizer = "adam"
    clip: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.epochs < 1 << 16:
            raise ConfigError(f"{self.epochs} local epochs: at least 1 is needed")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"local learning rate {self.learning_rate}: a positive number is needed")
        if self.optimizer not in LOCAL_OPTIMIZERS:
            raise ConfigError(f"unknown local optimizer {self.optimizer!r}: use sgd or adam")
        if not (math.isfinite(self.clip) and self.clip >= 0):
            raise ConfigError(f"clip {self.clip}: a positive number, or 0 for none")
        if not 0 <= self.weight_decay < 1:
            raise ConfigError(f"weight decay {self.weight_decay}: it lies in [0, 1)")
        for name in ("clip", "weight_decay"):  # −0 is 0, and has no byte form of its own
            object.__setattr__(self, name, getattr(self, name) + 0.0)


@dataclass(frozen=True)
class LocalSteps:
    """Batch-level communication, ``count`` steps of SGD at a time, along directions that all clients share.

    The round's K directions are as many groups of K / count, one behind the other. A client measures group
    t at W_t, on its next batch, and goes on at W_(t+1) = W_t − η ĝ_t, where ĝ_t is the mean of the group's
    s_k z_k and η the ``learning_rate``. It answers with the K slopes. The clients' mean slopes s̄_k say what
    the mean of their steps is, since the directions are shared:

        mean W_S = W_0 − S η ĝ,    ĝ = (1/K) Σ_k s̄_k z_k,    S = count

    So a server of SGD with learning rate S·η is federated averaging (McMahan et al. 2017) of the clients' S
    steps, at K numbers a client instead of n. Other rules take ĝ as they take any gradient.

    Cost at a client: count · (K / count + 1) forward passes with ``forward``, 2K else; memory 8n bytes for
    W_t and ĝ_t. Raises ConfigError for count < 2 or η ≤ 0.
    """

    count: int
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if not 2 <= self.count < 1 << 16:
            raise ConfigError(f"{self.count} local steps: at least 2 are needed, and fewer than 2^16")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"local learning rate {self.learning_rate}: a positive number is needed")

    def each(self, estimator: SteinEstimator) -> SteinEstimator:
        """What one step measures: K / count directions. Raises ConfigError where K is no multiple of it."""
        directions, rest = divmod(estimator.directions, self.count)
        if rest:
            raise ConfigError(
                f"K = {estimator.directions} directions for {self.count} local steps: take a multiple of "
                f"{self.count}"
            )
        return replace(estimator, directions=directions)


@dataclass(frozen=True)
class RoundPlan:
    """All that a client must know of a round, besides the model whose digest it names.

    ``batch_size`` 0 asks for all the client's samples at once. ``local`` None is batch-level (FedSGD), then
    ``steps`` None is one measurement a round. Raises ConfigError for what cannot be asked for together.
    """

    round: int
    seed: bytes
    estimator: SteinEstimator
    weights_digest: bytes
    batch_size: int = 32
    fidelity: Fidelity = "forward-only"
    local: LocalTraining | None = None
    steps: LocalSteps | None = None

    KIND: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.round < 1 << 64:
            raise ConfigError(f"round {self.round} lies outside [0, 2^64)")
        if self.fidelity not in FIDELITIES:
            raise ConfigError(f"unknown fidelity {self.fidelity!r}: use {', '.join(FIDELITIES)}")
        if not 0 <= self.batch_size < 1 << 32:
            raise ConfigError(f"batch size {self.batch_size}: a positive number, or 0 for all samples")
        if len(self.weights_digest) != DIGEST_BYTES or len(self.seed) != SEED_BYTES:
            raise ConfigError("seed and digest are 32 bytes each")
        if self.steps is not None:
            if self.local is not None:
                raise ConfigError("local steps and local epochs exclude each other")
            if self.fidelity != "forward-only":
                raise ConfigError(f"local steps need the fidelity 'forward-only', not {self.fidelity!r}")
            self.steps.each(self.estimator)

    @property
    def asks_slopes(self) -> bool:
        """Whether answers are slopes (K_c ≤ K,); n numbers otherwise."""
        return self.fidelity == "forward-only" and self.local is None

    @property
    def needs_all(self) -> bool:
        """Whether answers have all K slopes: a client's later steps and directions in layers need each."""
        return self.asks_slopes and (
            self.steps is not None or isinstance(self.estimator.perturbation, Layers)
        )

    @property
    def forward_passes(self) -> int:
        """Forward passes that a batch-level answer costs; with ``law``, those that it stands for."""
        if self.steps is None:
            return self.estimator.forward_passes
        return self.steps.count * self.steps.each(self.estimator).forward_passes

    @cached_property
    def stream(self) -> Stream:
        """The words of this round's shared directions."""
        return Stream(self.seed, self.round)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the encoded plan: answers name it."""
        return sha256(self.encode()).digest()

    def encode(self) -> bytes:
        e, local, steps = self.estimator, self.local, self.steps
        spec = e.perturbation.spec.encode()
        return b"".join(
            (
                header(self.KIND),
                struct.pack("<Q", self.round),
                self.seed,
                struct.pack("<IdB", e.directions, e.sigma, SCHEMES.index(e.scheme)),
                struct.pack("<H", len(spec)) + spec,
                struct.pack("<BI", FIDELITIES.index(self.fidelity), self.batch_size),
                self.weights_digest,
                struct.pack("<H", 0)
                if local is None
                else struct.pack(
                    "<HdBd",
                    local.epochs,
                    local.learning_rate,
                    LOCAL_OPTIMIZERS.index(local.optimizer),
                    local.clip,
                ),
                # Behind everything else and not always there: a plan without them keeps its bytes.
                struct.pack("<d", local.weight_decay) if local is not None and local.weight_decay else b"",
                b"" if steps is None else struct.pack("<Hd", steps.count, steps.learning_rate),
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> RoundPlan:
        r = Reader(data, cls.KIND)
        with decoding("a plan"):
            round_ = r.integer("Q")
            seed = r.take(SEED_BYTES)
            directions, sigma, scheme = r.integer("I"), r.real(), r.integer("B")
            spec = r.take(r.integer("H")).decode("ascii")
            estimator = SteinEstimator(
                directions, sigma, choice(SCHEMES, scheme, "scheme"), perturbation_from_spec(spec)
            )
            fidelity, batch_size = r.integer("B"), r.integer("I")
            digest = r.take(DIGEST_BYTES)
            local, steps, epochs = None, None, r.integer("H")
            if epochs:
                rate, optimizer, clip = r.real(), r.integer("B"), r.real()
                decay = r.real() if r.at < len(data) else 0.0
                local = LocalTraining(
                    epochs, rate, choice(LOCAL_OPTIMIZERS, optimizer, "local optimizer"), clip, decay
                )
            elif r.at < len(data):
                steps = LocalSteps(r.integer("H"), r.real())
            r.end()
            plan = cls(
                round_,
                seed,
                estimator,
                digest,
                batch_size,
                choice(FIDELITIES, fidelity, "fidelity"),
                local,
                steps,
            )
        if plan.encode() != data:
            raise MessageError("a plan that is not in canonical form")
        return plan


@dataclass(frozen=True)
class ModelMessage:
    """The weights of a round, down: n float32 values. 14 + 4n bytes."""

    weights: NDArray[np.float32]
    KIND: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_row(self.weights, "a model")

    def encode(self) -> bytes:
        body = np.ascontiguousarray(self.weights, dtype="<f4")
        return b"".join((header(self.KIND), struct.pack("<Q", len(body)), body.data))

    @classmethod
    def decode(cls, data: bytes) -> ModelMessage:
        r = Reader(data, cls.KIND)
        with decoding("a model"):
            values = r.array("<f4", r.integer("Q"))
            r.end()
            return cls(values)


@dataclass(frozen=True)
class RoundResult:
    """A client's answer: ``values`` are its slopes (K_c ≤ K,), or n numbers (a gradient, an update).

    ``samples`` is N_c, its weight in the sum. 58 + 4·len(values) bytes.
    """

    round: int
    plan_digest: bytes
    samples: int
    values: NDArray[np.float32]
    KIND: ClassVar[int] = 3

    def __post_init__(self) -> None:
        check_u64(self.round, 0, "round")
        check_u64(self.samples, 1, "samples")
        check_row(self.values, "an answer")
        if len(self.plan_digest) != DIGEST_BYTES:
            raise ConfigError(f"a plan's digest is {DIGEST_BYTES} bytes, not {len(self.plan_digest)}")

    def encode(self) -> bytes:
        body = np.ascontiguousarray(self.values, dtype="<f4")
        head = struct.pack("<Q", self.round) + self.plan_digest + struct.pack("<QI", self.samples, len(body))
        return b"".join((header(self.KIND), head, body.data))

    @classmethod
    def decode(cls, data: bytes) -> RoundResult:
        r = Reader(data, cls.KIND)
        with decoding("an answer"):
            round_, digest, samples, count = r.unpack(f"Q{DIGEST_BYTES}sQI")
            values = r.array("<f4", count)
            r.end()
            return cls(round_, digest, samples, values)


@dataclass(frozen=True)
class RoundSum:
    """What the server keeps of a round: Σ_c N_c v_c / Σ_c N_c, entry by entry, float64.

    For slopes, entry k is averaged over the clients that measured direction k.
    """

    round: int
    values: NDArray[np.float64]
    KIND: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_u64(self.round, 0, "round")
        check_row(self.values, "a sum")

    def encode(self) -> bytes:
        body = np.ascontiguousarray(self.values, dtype="<f8")
        return header(self.KIND) + struct.pack("<QI", self.round, len(body)) + body.tobytes()

    @classmethod
    def decode(cls, data: bytes) -> RoundSum:
        r = Reader(data, cls.KIND)
        with decoding("a sum"):
            round_ = r.integer("Q")
            values = r.array("<f8", r.integer("I"))
            r.end()
            return cls(round_, values)
