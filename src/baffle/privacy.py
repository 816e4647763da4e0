"""Differential privacy of the K numbers: clipping, noise inside the ring, and what it adds up to.

One round, in integers of step 2^-f (`FixedPoint`):

    Σ_i  trunc(2^f · clip(v_i, C))   +   Σ_{c ≤ h}  N_Z(0, (z·C·2^f)² / h)^K

v_i is the whole K-vector of one example (or of one client), clipped to L2 norm C; N_Z is the discrete
Gaussian, drawn exactly, from the operating system's generator, in one share for each of h clients. Adding or
removing one example moves the sum by at most C·2^f, whatever K is.

**Why the accountant of continuous noise may be used.** dp_accounting knows N(0, (z·C)²) on the reals. The
grid costs next to nothing; the proof, by Poisson summation (φ_v: density of N(0, v); "·e^±c": within these
two factors):

1.  For v > 0 and any μ, Σ_{j∈Z} φ_v(j − μ) = 1 + 2 Σ_{n≥1} e^(−2π²vn²) cos(2πnμ) lies in 1 ± η(v), with
    η(v) = 2 Σ_{n≥1} e^(−2π²vn²). Let λ(v) = −ln(1 − η(v)), so that 1 ± η(v) lies in e^±λ(v).
2.  φ_a(j) φ_b(k − j) = φ_(a+b)(k) φ_u(j − ka/(a+b)), u = ab/(a+b). So by 1, Σ_j φ_a(j) φ_b(k − j) =
    φ_(a+b)(k)·e^±λ(u).
3.  A share has the mass φ_s²(k)/Σ_j φ_s²(j). By 2, h − 1 times with u ≥ s²/2, and by 1, h times, the sum of h
    shares has the mass φ_hs²(k)·e^±(2h−1)λ(s²/2): a bound on the ratio at every k, not on average.
4.  Give the continuous mechanism the variance hs² − τ², and round each coordinate y of its output to k with
    probability φ_τ²(k − y)/Σ_j φ_τ²(j − y). That is post-processing. At an integer input x the result has
    the mass φ_hs²(k − x)·e^±λ(τ²), by 1 and because ∫ φ_a(y − x) φ_b(k − y) dy = φ_(a+b)(k − x).
5.  With τ² = 5 ≤ s²/2 the two differ by e^±2hλ a coordinate, λ = λ(5) < 3e-43, and by e^±ξ, ξ = 2hλKT, over
    K coordinates and T rounds: also where rounds depend on earlier rounds, and also when examples are
    sampled, since a mixture keeps bounds on a ratio.
6.  For any event, P(E) ≤ e^ξ Q(E) ≤ e^ξ (e^ε Q'(E) + δ) ≤ e^(ε+2ξ) P'(E) + e^ξ δ. So where the continuous
    mechanism with noise multiplier z' = √(z² − 5/(C·2^f)²) is (ε, δ)-private, this one is (ε + 2ξ, e^ξ δ)-
    private. `Accountant` computes just that. Reduction modulo 2^m is post-processing.

Step 3 is due to Kairouz, Liu and Steinke (2021, arXiv:2102.06387), who compare with N_Z(0, hs²); the discrete
Gaussian and its sampler to Canonne, Kamath and Steinke (2020, arXiv:2004.00010). Cited and not proved here:
that the pair N(0, z²), (1 − q) N(0, z²) + q N(1, z²), both ways, dominates the Poisson-sampled Gaussian, also
in adaptive composition (Zhu, Dong and Wang 2022, arXiv:2106.08567); and dp_accounting's discretisation, which
is pessimistic but for the rounding of floats.

**Who must be honest.** The promise is met where at least h clients that do not collude with the reader of
the sum have their shares in it. More shares only add noise. With fewer, say g, the noise multiplier is
z·√(g/h); so h is chosen as the number of clients that remain after dropouts and colluders.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from baffle.errors import ConfigError, MissingExtraError
from baffle.fixedpoint import FixedPoint

Unit = Literal["example", "client"]

_ROUNDING = 5  # τ², in squared steps of the grid
_SLACK = 1e-4  # the most that the grid may take from z; `calibrate` leaves room for it
_MOST_XI = 1e-12
# Beyond these ε exceeds 1e5, protects nobody, and costs long to tell from infinity.
_MOST_SPREAD = 1e3
_LEAST_MULTIPLIER = 0.01


@dataclass(frozen=True)
class Privacy:
    """Whom the noise protects, and how much of it there is.

    ``unit``: what is added or removed between neighbouring data sets. "example": one example of one client,
    each taking part in a round with chance ``sampling_rate`` (q), drawn by its client in secret. "client":
    everything that one client ever answers; q is 1, since the server knows whom it asks.
    ``clip``: C, the L2 norm of that unit's whole vector. ``noise_multiplier``: z; the noise in a round's sum
    has standard deviation z·C in each coordinate. ``shares``: h, the number of clients that make it together.

    Raises ConfigError for anything not positive and finite, q outside (0, 1], h < 1, q < 1 for clients.
    """

    unit: Unit
    clip: float
    noise_multiplier: float
    sampling_rate: float = 1.0
    shares: int = 1

    def __post_init__(self) -> None:
        if self.unit not in ("example", "client"):
            raise ConfigError(f"privacy of {self.unit!r}: the unit is 'example' or 'client'")
        _check_clip(self.clip)
        if not 0 < self.noise_multiplier <= 1e6:
            raise ConfigError(f"noise multiplier {self.noise_multiplier}: above 0 and at most 1e6")
        if not 0 < self.sampling_rate <= 1:
            raise ConfigError(f"sampling rate {self.sampling_rate}: a chance above 0 and at most 1")
        if self.unit == "client" and self.sampling_rate != 1:
            raise ConfigError(
                f"sampling rate {self.sampling_rate} for clients: the server knows whom it asks, so it is 1"
            )
        if self.shares < 1:
            raise ConfigError(f"{self.shares} shares of noise: at least 1 client makes it")


def _check_clip(clip: float) -> None:
    if not 1e-100 <= clip <= 1e100:
        raise ConfigError(f"clip = {clip}: an L2 norm between 1e-100 and 1e100")


def not_covered() -> list[str]:
    """What ε says nothing about: sentences to show beside it, wherever it is shown."""
    return [
        "Logged losses and test accuracy: they are computed without noise.",
        "The search for settings: each run on the same data has an ε of its own, and they add up.",
        "K, sigma, the clip or anything else that was chosen by looking at the data.",
        "Which clients answered, when, and which dropped out.",
        "Numbers of samples, where clients report them or they are otherwise known.",
        "Rounds in which fewer honest clients answered than the noise was shared among.",
    ]


# Clipping


def clip_rows(vectors: ArrayLike, clip: float) -> NDArray[np.float64]:
    """Rows of (B, K), each scaled down to L2 norm ≤ clip: in exact arithmetic, not only as computed.

    Rows are clipped to C·(1 − (K + 16)·2^-52). With u = 2^-53, K rounded squares summed in any order, one
    root, two divisions and two products are off by a factor of at most (1 + u)^(K/2 + 8), which
    that margin, 2(K + 16)u, covers for K < 2^40. Rows are divided by their largest entry first, so that no
    square overflows, and what underflows is below the margin. ConfigError for NaN, infinities, other shapes.
    """
    _check_clip(clip)
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2:
        raise ConfigError(f"vectors of shape {rows.shape}: clipping takes rows, (B, K)")
    if not np.isfinite(rows).all():
        raise ConfigError("vectors to clip hold NaN or an infinity")
    if rows.size == 0:
        return rows.copy()
    bound = clip * (1 - (rows.shape[1] + 16) * 2.0**-52)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    unit = rows / np.where(largest > 0, largest, 1.0)
    norm = np.sqrt(np.square(unit).sum(axis=1, keepdims=True))
    with np.errstate(over="ignore"):
        too_long = largest * norm > bound
    return np.where(too_long, unit * (bound / np.where(norm > 0, norm, 1.0)), rows)


def encode_clipped(vectors: ArrayLike, clip: float, fixed_point: FixedPoint) -> NDArray[np.int64]:
    """Rows of (B, K), clipped and in steps of 2^-f: each row's integer L2 norm is ≤ clip · 2^f, exactly.

    `clip_rows` holds the exact norm to C; scaling by 2^f is exact; rounding toward zero makes no entry
    longer. (Rounding to the nearest could make the row longer by √K/2 steps, and with it the sensitivity.)
    The price is less than one step an entry. ConfigError where the clip exceeds ``fixed_point.limit``.
    """
    if clip > fixed_point.limit:
        raise ConfigError(f"clip = {clip:g} exceeds the fixed point's limit {fixed_point.limit:g}")
    steps = np.ldexp(clip_rows(vectors, clip), fixed_point.fraction_bits)
    return np.asarray(np.trunc(steps), dtype=np.int64)


# Noise


def _words(random: Callable[[int], bytes], block: int = 512) -> Callable[[], int]:
    """A function that gives the next 64 random bits as an integer, read ``block`` words at a time."""

    def endless() -> Iterator[int]:
        unpack = struct.Struct(f"<{block}Q").unpack
        while True:
            yield from unpack(random(8 * block))

    return endless().__next__


def _below_ratio(word: Callable[[], int], drawn: int, numerator: int, denominator: int) -> bool:
    """Whether U < numerator/denominator for a uniform U in [0, 1) whose first 64 bits are ``drawn``.

    Called where those bits do not decide it: as many more as needed are drawn.
    """
    numerator = (numerator << 64) - drawn * denominator
    while 0 < numerator < denominator:
        numerator = (numerator << 64) - word() * denominator
    return numerator > 0


def _bernoulli_exp(word: Callable[[], int], a: int, b: int) -> bool:
    """True with probability exp(−a/b), a, b ≥ 0 integers: Algorithm 1 of Canonne, Kamath and Steinke."""
    while a > b:
        if not _bernoulli_exp(word, 1, 1):
            return False
        a -= b
    # Each trial is Bernoulli(γ/k), γ = a/b; 64 bits of the uniform and of γ decide it nearly always.
    gamma = (a << 64) // b
    k = 1
    while True:
        drawn = word()
        scaled = drawn * k
        if scaled + k <= gamma:
            success = True
        elif scaled > gamma:
            success = False
        else:
            success = _below_ratio(word, drawn, a, b * k)
        if not success:
            return k % 2 == 1
        k += 1


def discrete_gaussian(
    variance: Fraction | int, size: int, random: Callable[[int], bytes] = os.urandom
) -> list[int]:
    """``size`` independent draws of N_Z(0, variance): P(k) ∝ exp(−k²/(2·variance)), exactly.

    Algorithms 1 to 3 of Canonne, Kamath and Steinke (2020, arXiv:2004.00010), in integers alone: no float
    decides anything, and the variance may have hundreds of bits. Candidates come from a discrete Laplace
    law of scale t; any t gives the right law, and a power of two near the standard deviation saves
    rejections. ``random``: number of bytes → bytes, the operating system's generator. ConfigError unless the
    variance is positive. The time that a draw takes depends on what is drawn.
    """
    variance = Fraction(variance)
    if variance <= 0:
        raise ConfigError(f"variance {variance} of discrete noise: it is positive")
    numerator, denominator = variance.numerator, variance.denominator
    bits = max(0, math.isqrt(2 * math.ceil(variance)).bit_length() - 1)  # t = 2^bits
    words, mask = -(-bits // 64), (1 << bits) - 1
    word = _words(random)
    draws: list[int] = []
    while len(draws) < size:
        low = 0
        for _ in range(words):
            low = low << 64 | word()
        low &= mask
        if not _bernoulli_exp(word, low, 1 << bits):
            continue
        high = 0
        while _bernoulli_exp(word, 1, 1):
            high += 1
        magnitude = low | high << bits
        negative = word() & 1
        if negative and magnitude == 0:
            continue
        # exp(−(|y| − v/t)²/(2v)) with v = N/D:  a/b = (|y|·t·D − N)² / (2·N·D·t²)
        a = (magnitude * denominator << bits) - numerator
        if _bernoulli_exp(word, a * a, 2 * numerator * denominator << 2 * bits):
            draws.append(-magnitude if negative else magnitude)
    return draws


def noise_variance(privacy: Privacy, fixed_point: FixedPoint) -> int:
    """Variance of one share in squared steps: ⌈(z·C·2^f)²/h⌉, of the exact values of the floats z and C."""
    deviation = Fraction(privacy.noise_multiplier) * Fraction(privacy.clip) * (1 << fixed_point.fraction_bits)
    return math.ceil(deviation**2 / privacy.shares)


def noise_share(privacy: Privacy, fixed_point: FixedPoint, size: int) -> NDArray[np.int64]:
    """One client's share of the noise, (size,): independent draws of N_Z(0, `noise_variance`).

    Reduced to the centred representative modulo 2^m, which costs no privacy; a sum that is to be read needs
    room for the noise, about 10·z·C, beside the clipped vectors. From `os.urandom`, never from a seed.
    """
    draws = discrete_gaussian(noise_variance(privacy, fixed_point), size)
    half = 1 << (fixed_point.ring_bits - 1)
    return np.array([(draw + half) % (2 * half) - half for draw in draws], dtype=np.int64)


# Accounting


@dataclass(frozen=True)
class Accountant:
    """ε of so many rounds with the same `Privacy`, by privacy loss distributions (dp_accounting).

    Neighbours differ by adding or removing one unit, which may take part in every round. With
    ``fixed_point`` and ``values`` (K) the cost of the discrete noise is counted in, as the module's docstring
    derives it; without, ε is that of continuous noise. Raises ConfigError where the grid would cost more than
    1e-4 of the noise multiplier (noise below about 160 steps), or a share's variance is below 10 squared
    steps; MissingExtraError without dp_accounting.
    """

    privacy: Privacy
    fixed_point: FixedPoint | None = None
    values: int = 1

    def __post_init__(self) -> None:
        _need_dp_accounting()
        if self.values < 1:
            raise ConfigError(f"{self.values} values: a vector has at least 1")
        if self.fixed_point is None:
            return
        z = Fraction(self.privacy.noise_multiplier)
        fine = _grid_multiplier_squared(self.privacy, self.fixed_point) >= (z * (1 - Fraction(_SLACK))) ** 2
        if not fine or noise_variance(self.privacy, self.fixed_point) < 2 * _ROUNDING:
            steps = float(z * Fraction(self.privacy.clip) * (1 << self.fixed_point.fraction_bits))
            raise ConfigError(
                f"noise of {steps:.3g} steps of 2^-{self.fixed_point.fraction_bits}, in "
                f"{self.privacy.shares} shares, is too coarse to count as Gaussian: take more fraction bits"
            )

    @property
    def noise_multiplier(self) -> float:
        """z' that is accounted for: z, less what the grid takes (rounded down)."""
        if self.fixed_point is None:
            return self.privacy.noise_multiplier
        return math.sqrt(_grid_multiplier_squared(self.privacy, self.fixed_point)) * (1 - 2.0**-50)

    def epsilon(self, rounds: int, delta: float) -> float:
        """The smallest ε found for which ``rounds`` rounds together are (ε, δ)-private; 0 for no round.

        An upper bound, about 1e-4 of itself too high; infinite where there is hardly any noise (ε beyond 1e5,
        or z < 0.01 with sampling). Cost: the first call of a process imports dp_accounting, a second or
        two; then one composition a call, tenths of a second, whatever the number of rounds. The same call
        again is a look-up.
        """
        if rounds < 0:
            raise ConfigError(f"{rounds} rounds: there are at least 0")
        if not 0 < delta < 1:
            raise ConfigError(f"delta = {delta}: a chance between 0 and 1")
        if rounds == 0:
            return 0.0
        xi = 0.0 if self.fixed_point is None else _grid_cost(self.privacy.shares, self.values, rounds)
        if xi > _MOST_XI:
            raise ConfigError(
                f"{rounds} rounds of {self.values} values on this grid: more than is accounted for"
            )
        smaller = delta * math.exp(-xi)
        return 2 * xi + _epsilon(self.privacy.sampling_rate, self.noise_multiplier, rounds, smaller)


def _grid_multiplier_squared(privacy: Privacy, fixed_point: FixedPoint) -> Fraction:
    step = Fraction(1, 1 << fixed_point.fraction_bits)
    return Fraction(privacy.noise_multiplier) ** 2 - _ROUNDING * (step / Fraction(privacy.clip)) ** 2


def _grid_cost(shares: int, values: int, rounds: int) -> float:
    """ξ = 2hλKT; λ = −ln(1 − η(5)) is 2e^(−10π²) but for squares of it, so twice that is a bound."""
    return 2 * shares * (4 * math.exp(-2 * math.pi**2 * _ROUNDING)) * values * rounds


def _need_dp_accounting() -> None:
    if importlib.util.find_spec("dp_accounting") is None:
        raise MissingExtraError("dp-accounting", "privacy", "counting up ε")


@functools.lru_cache(maxsize=8)
def _one_round(sampling_rate: float, noise_multiplier: float, step: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=step, sampling_prob=sampling_rate
    )


@functools.lru_cache(maxsize=65536)
def _epsilon(sampling_rate: float, noise_multiplier: float, rounds: int, delta: float) -> float:
    """ε of the continuous mechanism; infinite where it would be far beyond 1e5."""
    if sampling_rate == 1:  # T Gaussians are one, of √T times the sensitivity
        noise_multiplier, rounds = noise_multiplier / math.sqrt(rounds), 1
    elif noise_multiplier < _LEAST_MULTIPLIER:
        return math.inf
    spread = sampling_rate / noise_multiplier
    if spread * math.sqrt(rounds) > _MOST_SPREAD:
        return math.inf
    # Losses become multiples of a step, pessimistically: ε is a bound with any. This one is small beside the
    # spread of a round's loss, where a round then has no more than 1e6 multiples; 2e4 serve most.
    reach = 0.5 / noise_multiplier**2 + 12 / noise_multiplier
    if reach < 700:
        reach = math.log1p(sampling_rate * math.expm1(reach))
    step = min(spread / 10, max(reach / 2e4, spread * math.sqrt(rounds) / 1e4))
    step = 2.0 ** math.floor(math.log2(max(step, reach / 1e6)))  # one of few, so that `_one_round` is reused
    one = _one_round(sampling_rate, noise_multiplier, step)
    composed = one if rounds == 1 else one.self_compose(rounds)
    return max(0.0, float(composed.get_epsilon_for_delta(delta)))


# Calibration


@functools.lru_cache(maxsize=1024)
def calibrate(target_epsilon: float, delta: float, rounds: int, sampling_rate: float = 1.0) -> float:
    """The noise multiplier z for which so many rounds are (target ε, δ)-private: the least, to about 1e-3.

    Room is left for the grid: an `Accountant` with any fixed point that it takes stays below the target too.
    Cost: about 15 evaluations of ε, seconds. Results are kept in ``$XDG_CACHE_HOME/baffle/noise.json``
    (``~/.cache`` where that is not set) and checked by two evaluations when they are read; a cache that is
    damaged or cannot be written is ignored. ConfigError for a target that no z in [0.05, 1e6] just meets;
    MissingExtraError without dp_accounting.
    """
    _need_dp_accounting()
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigError(f"target epsilon {target_epsilon}: it is positive and finite")
    if rounds < 1:
        raise ConfigError(f"{rounds} rounds: noise is calibrated for at least 1")
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta}: a chance between 0 and 1")
    if not 0 < sampling_rate <= 1:
        raise ConfigError(f"sampling rate {sampling_rate}: a chance above 0 and at most 1")

    def meets(z: float) -> bool:
        return _epsilon(sampling_rate, z * (1 - _SLACK), rounds, delta) <= target_epsilon * (1 - _SLACK)

    key = f"{target_epsilon!r} {delta!r} {rounds} {sampling_rate!r}"
    kept = _read_cache().get(key)
    if isinstance(kept, float) and 0.05 <= kept <= 1e6 and meets(kept) and not meets(kept / 1.001):
        return kept
    high = 1.0
    while not meets(high):
        if high >= 5e5:
            raise ConfigError(f"target epsilon {target_epsilon:g} over {rounds} rounds: no noise is enough")
        high *= 2
    low = high / 2
    while meets(low):
        if low < 0.1:
            raise ConfigError(f"target epsilon {target_epsilon:g} over {rounds} rounds asks for no noise")
        low, high = low / 2, low
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if meets(middle) else (middle, high)
    _write_cache({**_read_cache(), key: high})
    return high


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baffle" / "noise.json"


def _read_cache() -> dict[str, Any]:
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(content: dict[str, Any]) -> None:
    import tempfile  # 1 MB with what it imports; a device that makes noise calibrates none

    with suppress(OSError, RuntimeError):
        file = _cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as written:
                json.dump(content, written)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
