"""Terms: how answers are clipped, noised, weighted and encoded, so that they can be summed in a ring.

A server announces them, a client checks them before it does anything; both halves are here, so that they
cannot drift apart. What a client sends, in Z_2^m (``FixedPoint``), entry by entry:

    N_c · encode(v_c)  ‖  N_c for each level that it reached       Σ of these → Σ_c N_c v_c / Σ_c N_c
    Σ_i encode(clip(v_i))  +  share of the noise                   unit "example": i runs over its sample
    encode(clip(v_c))  +  share of the noise                       unit "client"

A level is a number of directions that a client may stop at. Entries up to it have a weight of their own, the
sum of N_c over the clients that came so far; so nobody needs to be told who stopped where.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from baffle.digests import sha256
from baffle.errors import AggregationError, ConfigError, MessageError
from baffle.fixedpoint import FixedPoint
from baffle.plan import RoundPlan, RoundSum
from baffle.privacy import Privacy, Unit, encode_clipped, noise_share, noise_variance
from baffle.wire import DIGEST_BYTES, Reader, check_u64, choice, decoding, header

UNITS: tuple[Unit, ...] = ("example", "client")
# Room for the noise in a sum, in standard deviations: it needs more with a chance below 1e-32 an entry.
_DEVIATIONS = 12


@dataclass(frozen=True)
class Terms:
    """How answers are made ready to be summed in a ring.

    ``cohort``: the most clients that answer a round. ``largest_weight``: the largest N_c that fits.
    ``levels``: ascending numbers of directions that a client may measure, the last of them K; () stands for
    all K. ``privacy``: clipping and noise; then every client counts alike.

    Raises ConfigError for settings that cannot be, and where a sum could leave the ring: so a client that
    decodes terms has checked that.
    """

    fixed_point: FixedPoint
    cohort: int
    largest_weight: int
    levels: tuple[int, ...] = ()
    privacy: Privacy | None = None

    KIND: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if not 1 <= self.cohort < 1 << 32:
            raise ConfigError(f"a cohort of {self.cohort}: it has at least 1 client and fewer than 2^32")
        check_u64(self.largest_weight, 1, "largest weight")
        rising = all(a < b for a, b in zip((0, *self.levels), self.levels, strict=False))
        if not rising or len(self.levels) >= 1 << 16 or max(self.levels, default=1) >= 1 << 32:
            raise ConfigError(f"levels {self.levels}: ascending numbers of directions, fewer than 2^16")
        weight = 1 if self.privacy is not None and self.privacy.unit == "client" else self.largest_weight
        self.fixed_point.check(self.cohort, weight)
        if self.privacy is not None:
            self._check_privacy(self.privacy, weight)

    def _check_privacy(self, privacy: Privacy, weight: int) -> None:
        if self.levels:
            raise ConfigError("levels and privacy exclude each other: noise is for vectors of one length")
        if privacy.shares >= 1 << 32:
            raise ConfigError(f"{privacy.shares} shares of noise: fewer than 2^32")
        if privacy.clip > self.fixed_point.limit:
            raise ConfigError(
                f"clip {privacy.clip:g} exceeds the fixed point's limit {self.fixed_point.limit:g}"
            )
        point = self.fixed_point
        noise = _DEVIATIONS * (math.isqrt(self.cohort * noise_variance(privacy, point)) + 1)
        if self.cohort * weight * point.largest + noise >= 1 << (point.ring_bits - 1):
            raise ConfigError(
                f"the noise of {self.cohort} clients does not fit a ring of {point.ring_bits} bits beside "
                f"their answers with {point.fraction_bits} fraction bits: take fewer"
            )

    # -- what fits ----------------------------------------------------------------------------------

    def check_plan(self, plan: RoundPlan) -> None:
        """Raises ConfigError where the plan and these terms do not fit."""
        K, privacy = plan.estimator.directions, self.privacy
        if self.levels and not plan.asks_slopes:
            raise ConfigError("levels are for slopes: this plan asks for n numbers")
        if self.levels and self.levels[-1] != K:
            raise ConfigError(f"the last level is {self.levels[-1]}, the plan has K = {K}")
        if self.levels and plan.steps is not None:
            raise ConfigError("levels are for clients that stop early: local steps need all K directions")
        if privacy is None:
            return
        if plan.fidelity != "forward-only":
            raise ConfigError(f"privacy is for the fidelity 'forward-only', not {plan.fidelity!r}")
        if privacy.unit == "client":
            return
        if plan.local is not None:
            raise ConfigError("privacy of an example needs batch-level slopes: take the unit 'client'")
        if plan.steps is not None:
            raise ConfigError(
                "privacy of an example needs one measurement a round: behind a local step, its slopes depend "
                "on the other examples; take the unit 'client'"
            )
        if plan.estimator.scheme == "tangent":
            raise ConfigError("privacy of an example needs the scheme forward or central, not tangent")
        if plan.batch_size == 0:
            raise ConfigError("privacy of an example needs a batch size: the number of examples expected")

    def check_round(self, plan: RoundPlan, clients: int) -> None:
        """``check_plan``, and ConfigError for more clients than a sum has room for."""
        self.check_plan(plan)
        if clients > self.cohort:
            raise ConfigError(f"{clients} clients in a cohort: the terms have room for {self.cohort}")

    def check_samples(self, samples: int) -> None:
        """Raises ConfigError for a client with more samples than fit."""
        client_unit = self.privacy is not None and self.privacy.unit == "client"
        if samples > self.largest_weight and not client_unit:
            raise ConfigError(f"{samples} samples exceed the largest weight that fits, {self.largest_weight}")

    def directions(self, plan: RoundPlan, budget: int | None) -> int:
        """K_c: the largest level within a client's budget. Raises ConfigError where there is none."""
        levels = self.levels or (plan.estimator.directions,)
        fitting = [level for level in levels if budget is None or level <= budget]
        if not fitting:
            raise ConfigError(f"a budget of {budget} directions lies below the least asked for, {levels[0]}")
        return fitting[-1]

    def length(self, values: int) -> int:
        """Entries of the ring vector for that many values."""
        return values + (0 if self.privacy is not None else self._weights)

    @property
    def _weights(self) -> int:
        """How many weights stand behind the values."""
        return max(1, len(self.levels))

    # -- a client's half ----------------------------------------------------------------------------

    def prepare(self, plan: RoundPlan, values: NDArray[np.floating], samples: int) -> NDArray[Any]:
        """Residues (length,) of a client's slopes (K_c,) or n numbers, and N_c = ``samples``.

        Values beyond the fixed point's limit saturate. Raises ConfigError for values that are not finite, of
        a length that is no level, or for more samples than fit.
        """
        if self.privacy is not None and self.privacy.unit == "example":
            raise ConfigError("privacy of an example: slopes of examples are needed, not their mean")
        self.check_samples(samples)
        levels = self.levels or ((plan.estimator.directions,) if plan.asks_slopes else (len(values),))
        if values.ndim != 1 or len(values) not in levels:
            raise ConfigError(f"values of the shape {values.shape} where {levels[-1]} were asked for")
        fixed_point = self.fixed_point
        if self.privacy is not None:
            clipped = encode_clipped(values[None], self.privacy.clip, fixed_point)[0]
            return fixed_point.residues(clipped + noise_share(self.privacy, fixed_point, len(values)))
        row = np.zeros(self.length(levels[-1]), dtype=np.int64)
        row[: len(values)] = samples * fixed_point.encode(values)
        row[levels[-1] :] = [samples * (level <= len(values)) for level in levels]
        return fixed_point.residues(row)

    def prepare_examples(
        self, plan: RoundPlan, slopes: NDArray[np.float64] | Iterable[NDArray[np.float64]]
    ) -> NDArray[Any]:
        """Residues (K,) of the slopes of examples, each row alone, (B, K) or blocks of such rows.

        Of blocks, one is held at a time. No row at all gives noise. Raises ConfigError for slopes that are
        not finite, or more rows than fit.
        """
        if self.privacy is None or self.privacy.unit != "example":
            raise ConfigError("slopes of examples are for the privacy of an example")
        K, count = plan.estimator.directions, 0
        total = np.zeros(K, dtype=np.int64)
        for block in [slopes] if isinstance(slopes, np.ndarray) else slopes:
            if block.ndim != 2 or block.shape[1] != K:
                raise ConfigError(f"slopes of the shape {block.shape}: (B, {K}) were asked for")
            count += len(block)
            self.check_samples(count)
            total += encode_clipped(block, self.privacy.clip, self.fixed_point).sum(axis=0)
        return self.fixed_point.residues(total + noise_share(self.privacy, self.fixed_point, K))

    # -- the server's half --------------------------------------------------------------------------

    def total(self, plan: RoundPlan, residues: NDArray[Any], answered: int) -> RoundSum:
        """The mean of each entry, from the sum (length,) of the residues of ``answered`` clients.

        Without privacy: Σ N_c v_c / Σ N_c over the clients that reached the entry; what nobody reached is
        cut off. The integers are exact, so the result differs from the mean of what was encoded by float64's
        rounding alone, and from the mean of v_c by 2^-(f+1) at most. With privacy: the sum divided by the
        number of examples that ``answered`` clients are expected to sample, or by ``answered``.

        Raises AggregationError for a sum that honest answers cannot give, and where fewer answered than make
        the noise that was promised.
        """
        values = len(residues) - self.length(0)
        if values < 1 or (plan.asks_slopes and values != plan.estimator.directions):
            raise AggregationError(
                f"round {plan.round}: a sum of {len(residues)} entries fits no plan of its kind"
            )
        if not 1 <= answered <= self.cohort:
            raise AggregationError(f"round {plan.round}: {answered} answers from a cohort of {self.cohort}")
        sums = self.fixed_point.integers(residues[:values])
        if self.privacy is not None:
            self._check_noised(plan, self.privacy, sums, answered)
            each = plan.batch_size if self.privacy.unit == "example" else 1
            return RoundSum(plan.round, self.fixed_point.decode(sums) / (answered * each))
        weights = [int(weight) for weight in residues[values:]]
        levels = self.levels or (values,)
        reached = [level for level, weight in zip(levels, weights, strict=True) if weight]
        falling = all(a >= b for a, b in itertools.pairwise(weights))
        lengths = np.diff((0, *levels))
        sound = answered <= weights[0] <= answered * self.largest_weight and falling
        if sound:
            bound = np.repeat([self.fixed_point.largest * weight for weight in weights], lengths)
            sound = bool(((sums <= bound) & (sums >= -bound)).all())
        if not sound:
            raise _impossible(plan)
        kept = reached[-1]
        divisors = np.repeat(np.array(weights, dtype=np.float64), lengths)[:kept]
        return RoundSum(plan.round, self.fixed_point.decode(sums[:kept]) / divisors)

    def _check_noised(
        self, plan: RoundPlan, privacy: Privacy, sums: NDArray[np.int64], answered: int
    ) -> None:
        if answered < privacy.shares:
            raise AggregationError(
                f"round {plan.round}: {answered} clients answered, and {privacy.shares} make the noise that "
                "was promised: no sum is given"
            )
        weight = 1 if privacy.unit == "client" else self.largest_weight
        noise = math.isqrt(answered * noise_variance(privacy, self.fixed_point)) + 1
        bound = answered * weight * self.fixed_point.largest + _DEVIATIONS * noise
        if ((sums > bound) | (sums < -bound)).any():
            raise _impossible(plan)

    # -- bytes --------------------------------------------------------------------------------------

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the encoded terms: ring answers name it."""
        return sha256(self.encode()).digest()

    def encode(self) -> bytes:
        point, privacy = self.fixed_point, self.privacy
        parts = [
            header(self.KIND),
            struct.pack("<BBd", point.ring_bits, point.fraction_bits, point.limit),
            struct.pack(
                f"<IQH{len(self.levels)}I", self.cohort, self.largest_weight, len(self.levels), *self.levels
            ),
        ]
        if privacy is None:
            parts.append(b"\0")
        else:
            numbers = privacy.clip, privacy.noise_multiplier, privacy.sampling_rate, privacy.shares
            parts.append(struct.pack("<BdddI", 1 + UNITS.index(privacy.unit), *numbers))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> Terms:
        """Raises MessageError for bytes that are no terms, or terms that cannot be."""
        r = Reader(data, cls.KIND)
        with decoding("terms"):
            fixed_point = FixedPoint(*r.unpack("BBd"))
            cohort, largest_weight, count = r.unpack("IQH")
            levels = r.unpack(f"{count}I")
            privacy, unit = None, r.integer("B")
            if unit:
                privacy = Privacy(choice(UNITS, unit - 1, "privacy unit"), *r.unpack("dddI"))
            r.end()
            return cls(fixed_point, cohort, largest_weight, levels, privacy)


def _impossible(plan: RoundPlan) -> AggregationError:
    return AggregationError(
        f"round {plan.round}: the sum lies outside what honest answers can give: "
        "a client was told something else, or lies"
    )


@dataclass(frozen=True)
class RingResult:
    """A client's answer in the clear, in a ring: ``residues`` (length,), uint32 or uint64.

    83 bytes and 4 or 8 for each residue.
    """

    round: int
    plan_digest: bytes
    terms_digest: bytes
    residues: NDArray[Any]

    KIND: ClassVar[int] = 6

    def __post_init__(self) -> None:
        check_u64(self.round, 0, "round")
        if len(self.plan_digest) != DIGEST_BYTES or len(self.terms_digest) != DIGEST_BYTES:
            raise ConfigError(f"digests are {DIGEST_BYTES} bytes each")
        if self.residues.dtype not in (np.uint32, np.uint64):
            raise ConfigError(f"residues are uint32 or uint64, not {self.residues.dtype}")
        if self.residues.ndim != 1 or not 1 <= len(self.residues) < 1 << 32:
            raise ConfigError(f"residues are a row of at least 1 number, not {self.residues.shape}")

    def encode(self) -> bytes:
        size = self.residues.dtype.itemsize
        body = np.ascontiguousarray(self.residues, dtype=f"<u{size}")
        head = struct.pack("<Q", self.round) + self.plan_digest + self.terms_digest
        return b"".join((header(self.KIND), head, struct.pack("<BI", 8 * size, len(body)), body.data))

    @classmethod
    def decode(cls, data: bytes) -> RingResult:
        r = Reader(data, cls.KIND)
        with decoding("an answer"):
            round_, plan, terms, bits, count = r.unpack(f"Q{DIGEST_BYTES}s{DIGEST_BYTES}sBI")
            if bits not in (32, 64):
                raise MessageError(f"residues of {bits} bits: there are those of 32 and of 64")
            residues = r.array(f"<u{bits // 8}", count)
            r.end()
            return cls(round_, plan, terms, residues)
