"""Optimizer steps with the same bits on every machine: what a server does, a client can repeat.

    sgd        w ← w − lr·g
    momentum   b ← β₁b + g                        w ← w − lr·b           as torch.optim.SGD(momentum=β₁)
    adam       m ← β₁m + (1−β₁)g
               v ← β₂v + (1−β₂)g²                 w ← w − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)

``adam`` is Kingma & Ba 2015, with ε where ``torch.optim.Adam`` has it. What is rounded when is normative
(``docs/spec.md``, section 12) and is made of two things alone:

- numbers of the whole step (1−β, βᵗ, the rate) in float64, each then rounded to float32 once. Powers are
  products, since no two mathematical libraries agree on the last bit of ``pow``;
- +, −, ×, ÷ and √ of float32, entry by entry, each rounded by IEEE 754 alone. Every NumPy call below is a
  loop of its own, so no compiler can fuse a product with a sum; and nothing is summed over entries, so no
  order of a sum is left to chance. The one reduction, the clip's maximum of magnitudes, rounds nothing.

It takes a processor that is not told to flush subnormal numbers to zero (``torch.set_flush_denormal``).
Where it is, the digest of the next plan finds out.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError, MessageError

Row = NDArray[np.float32]
RuleName = Literal["sgd", "momentum", "adam"]
RULES: tuple[RuleName, ...] = get_args(RuleName)
STATE: dict[RuleName, tuple[str, ...]] = {"sgd": (), "momentum": ("buffer",), "adam": ("mean", "square")}
_PARAMETERS: dict[RuleName, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("beta1",),
    "adam": ("beta1", "beta2", "eps"),
}
_DEFAULTS = {"beta1": 0.0, "beta2": 0.0, "eps": 1e-8}
_CHUNK = 1 << 14  # entries at a time: temporaries stay in a near cache, and small beside the model


@dataclass(frozen=True, eq=False)
class RuleState:
    """What a rule remembers: float32 rows (n,) by name, after ``steps`` steps.

    Without rows and steps it is that of any rule before its first step.
    """

    steps: int = 0
    arrays: Mapping[str, Row] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """What one step of a server's optimizer does. A scheduler makes each round's another.

    ``clip`` bounds the gradient's inf-norm before the step, 0 for no bound: ``clipped`` does it, ``step``
    does not. ``beta1`` is the momentum of ``momentum``; parameters that a rule does not have keep their
    defaults.

    Raises ConfigError for parameters that cannot be.
    """

    name: RuleName
    learning_rate: float
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 1e-8
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ConfigError(f"unknown rule {self.name!r}: use {', '.join(RULES)}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} {value}: a finite number, at least 0, is needed")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: it lies in [0, 1)")
        if not (1e-45 <= self.eps <= 1e38):  # float32 has it, and it is not 0
            raise ConfigError(f"eps {self.eps}: a positive number that float32 has is needed")
        for name, default in _DEFAULTS.items():
            if name not in _PARAMETERS[self.name] and getattr(self, name) != default:
                raise ConfigError(f"{name} = {getattr(self, name)}: the rule {self.name} has none")
        for name in ("learning_rate", *_DEFAULTS, "clip"):  # −0 is 0, and has no byte form of its own
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)

    # -- bytes --------------------------------------------------------------------------------------

    def encode(self) -> bytes:
        """17 bytes for sgd, 25 for momentum, 41 for adam."""
        own = [getattr(self, name) for name in _PARAMETERS[self.name]]
        values = (self.learning_rate, *own, self.clip)
        return struct.pack(f"<B{len(values)}d", RULES.index(self.name), *values)

    @classmethod
    def decode(cls, data: bytes) -> Rule:
        """Raises MessageError for bytes that are no rule."""
        if not data or data[0] >= len(RULES):
            raise MessageError(f"unknown rule number {data[0]}" if data else "a rule of no bytes")
        name = RULES[data[0]]
        own = _PARAMETERS[name]
        form = struct.Struct(f"<B{len(own) + 2}d")
        if len(data) != form.size:
            raise MessageError(f"a rule {name} is {form.size} bytes, not {len(data)}")
        _, rate, *values, clip = form.unpack(data)
        try:
            rule = cls(name, rate, **dict(zip(own, values, strict=True)), clip=clip)
        except ConfigError as error:
            raise MessageError(f"a rule that cannot be: {error}") from error
        if rule.encode() != data:
            raise MessageError("a rule that is not in canonical form")
        return rule

    # -- steps --------------------------------------------------------------------------------------

    def fresh(self, n: int) -> RuleState:
        """The state before the first step: rows of n zeros."""
        return RuleState(0, {name: np.zeros(n, np.float32) for name in STATE[self.name]})

    def clipped(self, gradient: Row) -> Row:
        """``gradient`` (n,) within the rule's bound."""
        return clip_inf_norm(gradient, self.clip)

    def step(self, weights: Row, state: RuleState, gradient: Row) -> tuple[Row, RuleState]:
        """New weights (n,) and state, from a gradient (n,) that is clipped already. The inputs stay.

        Raises ConfigError for a state of another rule or length. Entries that leave float32's range come
        out infinite or NaN: whoever takes the result looks. Memory: the result and O(1).
        """
        names = STATE[self.name]
        if state.steps == 0 and not state.arrays:
            state = self.fresh(len(weights))
        if state.arrays.keys() != set(names):
            raise ConfigError(
                f"a state with {sorted(state.arrays) or 'no rows'} is none of the rule {self.name}"
            )
        for row in (gradient, *state.arrays.values()):
            if row.shape != weights.shape or row.dtype != np.float32 or weights.ndim != 1:
                raise ConfigError(f"rows of {row.shape} {row.dtype} beside weights {weights.shape}")
        after = weights.astype(np.float32)
        arrays = {name: state.arrays[name].copy() for name in names}
        self.advance(after, arrays, gradient, state.steps + 1)
        return after, RuleState(state.steps + 1, arrays)

    def advance(self, weights: Row, arrays: MutableMapping[str, Row], gradient: Row, number: int) -> None:
        """Step ``number`` (the first is 1) on float32 rows (n,), in place: ``weights`` and ``arrays``."""
        with np.errstate(all="ignore"):
            rate = np.float32(self.learning_rate)
            if self.name == "adam":
                rate = np.float32(self.learning_rate / (1.0 - power(self.beta1, number)))
                root = np.float32(math.sqrt(1.0 - power(self.beta2, number)))  # rounded by IEEE, unlike pow
            beta1, rest1 = np.float32(self.beta1), np.float32(1.0 - self.beta1)
            beta2, rest2 = np.float32(self.beta2), np.float32(1.0 - self.beta2)
            eps = np.float32(self.eps)
            for start in range(0, len(weights), _CHUNK):
                part = slice(start, start + _CHUNK)
                w, g = weights[part], gradient[part]
                if self.name == "sgd":
                    w -= rate * g
                    continue
                if self.name == "momentum":
                    b = arrays["buffer"][part]
                    b *= beta1
                    b += g
                    w -= rate * b
                    continue
                m, v = arrays["mean"][part], arrays["square"][part]
                m *= beta1
                m += rest1 * g
                v *= beta2
                v += (rest2 * g) * g
                below = np.sqrt(v)
                below /= root
                below += eps
                w -= (rate * m) / below


def power(base: float, exponent: int) -> float:
    """``base`` to an integer ≥ 0 in float64, by squaring, whose order of products is normative.

    From 1, for each bit of the exponent from the lowest: times the base where the bit is 1, then the base is
    squared.
    """
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def clip_inf_norm(gradient: Row, bound: float) -> Row:
    """``gradient`` scaled down so that its largest entry is at most ``bound``; 0 means no bound.

    It scales the whole vector, as the authors' code does (torch's ``clip_grad_norm_`` with the inf-norm).
    A gradient that is not finite comes back as it is.
    """
    if bound <= 0:
        return gradient
    largest = float(np.abs(gradient).max(initial=0.0))
    if largest <= bound or not math.isfinite(largest):
        return gradient
    return gradient * np.float32(bound / largest)
