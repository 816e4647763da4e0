"""Published test vectors: ``baffle vectors`` prints them, ``tests/vectors/v1.json`` keeps them.

An implementation in another language is right where it makes the same bits. Bytes are in hexadecimal;
rows of words, of residues and of float bit patterns are hexadecimal numbers with a blank between them (a
float32 has 8 digits, a float64 has 16, a residue a quarter of its ring's bits); other integers are decimal.
A layout is ``name=shape,...``, as in ``conv=3x2x2x2,bias=3,scalar=``. Rows in ``clipped`` are clipped to
L2 norm C and rounded toward zero. ``tests/vectors/reference.c`` is a second implementation of directions
and messages 1 to 4 that is held against them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.estimator import SteinEstimator
from baffle.fixedpoint import FixedPoint
from baffle.perturbations import Layers, Layout, gaussian_table, perturbation_from_spec
from baffle.plan import (
    LocalSteps,
    LocalTraining,
    ModelMessage,
    RoundPlan,
    RoundResult,
    RoundSum,
    weights_digest,
)
from baffle.privacy import Privacy, encode_clipped
from baffle.stream import Stream, derive_seed, philox4x32, seed_from
from baffle.terms import RingResult, Terms

_ZERO = bytes(32)
_SEED = seed_from(2023)
_TENSORS = Layout(("conv", "bias", "scale", "head"), ((3, 2, 2, 2), (3,), (), (4, 5)))
_SPECS = ("gaussian", "rademacher", "lowrank:1", "lowrank:4")
# A layer of two tensors, one without parameters, a tensor of no layer, two dots, a name that comes again.
_NETWORK = Layout(
    ("conv.weight", "conv.bias", "none.weight", "scale", "block.fc.weight", "block.bias", "conv.gain"),
    ((2, 2), (3,), (0, 4), (), (2, 3), (2,), (2,)),
)
_LAYERED = (Layers((4, 1, 6, 1, 2)), Layers((7, 1, 5, 2, 1)))  # some along coordinates
_SLOPES = (0.1, -2.5, 1 / 3, 0.0, -1e-3, 12345.678, 1e-40)
_CANCELLING = (1e16, -1e16, 1.0)  # where directions agree, another order of the sum shows
_TIE = (49 * (2 - 5 * 2.0**-24), *(48 * (0.0,)))  # divided by 49, not multiplied by 1/49: halves to even
_FLOATS = (0.0, -0.0, 1.0, -2.5, 0.1, 1e-45, 3.4028235e38)
_POINTS = (FixedPoint(), FixedPoint(64, 20, 100.0), FixedPoint(32, 8, 300.1), FixedPoint(32, 0, 2.5))


def hex_row(values: NDArray[Any]) -> str:
    """Words or float bit patterns as hexadecimal numbers of fixed width, a blank between them."""
    width = values.dtype.itemsize
    return " ".join(f"{bits:0{2 * width}x}" for bits in values.view(f"u{width}").tolist())


def _layout(layout: Layout) -> str:
    pairs = zip(layout.names, layout.shapes, strict=True)
    return ",".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in pairs)


def _philox() -> list[dict[str, str]]:
    cases = (
        ((0, 0, 0, 0), (0, 0)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
    )
    return [
        {
            "counter": hex_row(np.array(counter, np.uint32)),
            "key": hex_row(np.array(key, np.uint32)),
            "words": hex_row(np.array(philox4x32(counter, key), np.uint32)),
        }
        for counter, key in cases
    ]


def _seeds() -> dict[str, Any]:
    labels: tuple[tuple[str | int, ...], ...] = ((), ("client", 7), ("ab", "c"), ("a", "bc"), ("σ",))
    return {
        "from_integer": [
            {"value": str(value), "seed": seed_from(value).hex()} for value in (0, 1, 2023, (1 << 128) - 1)
        ],
        "derived": [
            {"seed": _SEED.hex(), "labels": [str(x) for x in row], "derived": derive_seed(_SEED, *row).hex()}
            for row in labels
        ],
    }


def _stream() -> list[dict[str, Any]]:
    end = 1 << 34
    cases = (
        (_ZERO, 0, 0, 0, 12),
        (_SEED, 0, 0, 0, 8),
        (_SEED, 0, 1, 3, 11),
        (_SEED, 1, 0, 1, 2),
        (_SEED, (1 << 64) - 1, 5, 1000, 1006),
        (_SEED, 7, (1 << 32) - 1, (1 << 33) - 3, (1 << 33) + 3),
        (_SEED, 7, 1 << 31, end - 9, end),
    )
    return [
        {
            "seed": seed.hex(),
            "round": round_,
            "k": k,
            "start": start,
            "words": hex_row(Stream(seed, round_).words(k, start, stop)),
        }
        for seed, round_, k, start, stop in cases
    ]


def _permutations() -> list[dict[str, Any]]:
    return [
        {
            "seed": _SEED.hex(),
            "round": 3,
            "k": k,
            "order": " ".join(map(str, Stream(_SEED, 3).permutation(k, n))),
        }
        for k, n in ((0, 1), (1, 10), (2, 33))
    ]


def _gaussian() -> dict[str, Any]:
    half = gaussian_table()[:32768]
    return {
        "sha256": hashlib.sha256(half.astype("<u2").tobytes()).hexdigest(),
        "entries": {str(j): int(half[j]) for j in (0, 1, 2, 16383, 16384, 32766, 32767)},
    }


def _directions() -> list[dict[str, Any]]:
    far = Layout.flat(1 << 35)
    wide = Layout(("a", "v", "b"), ((1 << 20, 3), (1 << 20,), (5, 1 << 20)))
    n = _TENSORS.n
    cases = [(spec, _TENSORS, 4, k, a, b) for spec in _SPECS for k, a, b in ((0, 0, n), (6, 10, n - 3))]
    cases += [(spec, far, 1 << 63, (1 << 32) - 1, far.n - 11, far.n) for spec in _SPECS]
    cases += [
        (spec, wide, 9, 2, start, start + 9)
        for spec in _SPECS[2:]
        for start in ((3 << 20) - 4, (4 << 20) - 4, (9 << 20) - 9)
    ]
    cases += [("gaussian", Layout.flat(200), 0, 0, 0, 200), ("rademacher", Layout.flat(200), 0, 1, 37, 180)]
    # Row 164 of this A is an integer zero: its products are +0, whatever the sign of the other factor.
    cases += [("lowrank:1", Layout(("w",), ((4000, 2),)), 0, 0, 324, 330)]
    cases += [(layers.spec, _NETWORK, 4, k, 0, 18) for layers in _LAYERED for k in (0, 3, 4, 6, 11, 12, 13)]
    halves, many = Layout(("a.w", "b.w"), ((1 << 34,), (1 << 34,))), Layers((3, 4 * 10**9))
    cases += [(many.spec, halves, 5, k, far.n - 9, far.n) for k in (2, 3, many.directions - 1)]
    return [
        {
            "perturbation": spec,
            "layout": _layout(layout),
            "seed": _SEED.hex(),
            "round": round_,
            "k": k,
            "start": start,
            "values": hex_row(
                perturbation_from_spec(spec).values(Stream(_SEED, round_), k, layout, start, stop)
            ),
        }
        for spec, layout, round_, k, start, stop in cases
    ]


def _gradients() -> list[dict[str, Any]]:
    slopes = np.array(_SLOPES)
    cases = [
        (SteinEstimator(len(row), perturbation=perturbation_from_spec(spec)), _TENSORS, row)
        for spec in _SPECS
        for row in (slopes, slopes[-1:], np.array(_CANCELLING), np.array(_TIE))
    ]
    cases += [
        (
            SteinEstimator(layers.directions, perturbation=layers),
            _NETWORK,
            np.resize(slopes, layers.directions),
        )
        for layers in _LAYERED
    ]
    return [
        {
            "perturbation": estimator.perturbation.spec,
            "layout": _layout(layout),
            "seed": _SEED.hex(),
            "round": 12,
            "slopes": hex_row(row),
            "gradient": hex_row(estimator.gradient(row, Stream(_SEED, 12), layout)),
        }
        for estimator, layout, row in cases
    ]


def _integers(values: NDArray[Any]) -> str:
    return " ".join(map(str, values.tolist()))


def _point(point: FixedPoint) -> dict[str, Any]:
    return {
        "ring_bits": point.ring_bits,
        "fraction_bits": point.fraction_bits,
        "limit": hex_row(np.array([point.limit])),
    }


def _fixed_point() -> list[dict[str, Any]]:
    found = []
    for point in _POINTS:
        step = 2.0**-point.fraction_bits
        ties = [n * step / 2 for n in (1, -1, 3, -3, 5)]  # halves go to the even integer
        near = [np.nextafter(step / 2, 1.0), np.nextafter(-step / 2, 0.0), 1e-300]
        far = [point.limit, -point.limit, 1.001 * point.limit, -1e300]
        values = np.array([*ties, *near, *far, -0.0, 0.1, -1 / 3])
        encoded = point.encode(values)
        found.append(
            {
                **_point(point),
                "largest": point.largest,
                "values": hex_row(values),
                "integers": _integers(encoded),
                "residues": hex_row(point.residues(encoded)),
                "decoded": hex_row(point.decode(encoded)),
            }
        )
    return found


def _clipped() -> list[dict[str, Any]]:
    point = _POINTS[1]
    rows = (
        (2.5, (0.1, -1 / 3, 2.0, 0.0)),  # not longer than C: rounded toward zero, that is all
        (2.5, (10.1, -20.2, 30.3, -0.4)),
        (1.0, (-1e300, 1e299, 3e299, 1e-300)),
        (1.0, (0.0, 0.0)),
        (100.0, tuple(7.0 * k - 30.0 for k in range(12))),
    )
    return [
        {
            **_point(point),
            "clip": hex_row(np.array([clip])),
            "row": hex_row(np.array(row)),
            "integers": _integers(encode_clipped(np.array([row]), clip, point)[0]),
        }
        for clip, row in rows
    ]


def _digests() -> list[dict[str, Any]]:
    weights = np.arange(_TENSORS.n, dtype=np.float32) / np.float32(7)
    return [
        {
            "layout": _layout(layout),
            "frozen": frozen.hex(),
            "weights": hex_row(values),
            "digest": weights_digest(values, layout, frozen).hex(),
        }
        for layout, frozen, values in (
            (Layout.flat(2), _ZERO, np.array([-0.0, 1.5], np.float32)),
            (_TENSORS, _SEED, weights),
        )
    ]


def _plans() -> list[RoundPlan]:
    digest = hashlib.sha256(b"a model").digest()
    return [
        RoundPlan(0, _ZERO, SteinEstimator(1), digest),
        RoundPlan(
            (1 << 64) - 1,
            _SEED,
            SteinEstimator((1 << 32) - 1, 0.1, "central", perturbation_from_spec("lowrank:65535")),
            digest,
            (1 << 32) - 1,
            "backprop",
            LocalTraining((1 << 16) - 1, 1 / 3, "sgd", 0.3),
        ),
        RoundPlan(
            41,
            _SEED,
            SteinEstimator(500, 1e-3, "central", perturbation_from_spec("rademacher")),
            digest,
            0,
            "forward-only",
            LocalTraining(),
        ),
        RoundPlan(42, _SEED, SteinEstimator(5000), digest, fidelity="law"),
        RoundPlan(43, _SEED, SteinEstimator(500), digest, steps=LocalSteps(5, 0.1)),
        RoundPlan(44, _SEED, SteinEstimator(14, perturbation=_LAYERED[0]), digest, fidelity="law"),
        RoundPlan(45, _SEED, SteinEstimator(100), digest, 32, local=LocalTraining(weight_decay=5e-4)),
    ]


def _terms() -> list[Terms]:
    point = _POINTS[1]
    return [
        Terms(FixedPoint.fitting(10, 1000, 1024.0), 10, 1000),
        Terms(_POINTS[2], 27952, 1),  # the most
        Terms(point, 1000, 1 << 20, (1, 100, 500)),
        Terms(point, 7, 300, (), Privacy("example", 2.5, 1.1, 0.25, 5)),
        Terms(point, 7, 1, (), Privacy("client", 1 / 3, 0.5, 1.0, 1)),
    ]


def _ring_messages(plan: RoundPlan) -> dict[str, Any]:
    every = _terms()
    rows: list[NDArray[Any]] = [np.array([0, 1, (1 << 64) - 1, 1 << 63], np.uint64)]
    rows.append(np.array([0, (1 << 32) - 1], np.uint32))
    return {
        "terms": [
            {
                **_point(terms.fixed_point),
                "cohort": terms.cohort,
                "largest_weight": terms.largest_weight,
                "levels": list(terms.levels),
                "privacy": terms.privacy
                and {
                    "unit": terms.privacy.unit,
                    "clip": hex_row(np.array([terms.privacy.clip])),
                    "noise_multiplier": hex_row(np.array([terms.privacy.noise_multiplier])),
                    "sampling_rate": hex_row(np.array([terms.privacy.sampling_rate])),
                    "shares": terms.privacy.shares,
                },
                "digest": terms.digest.hex(),
                "bytes": terms.encode().hex(),
            }
            for terms in every
        ],
        "ring_results": [
            {
                "round": plan.round,
                "plan_digest": plan.digest.hex(),
                "terms_digest": terms.digest.hex(),
                "residues": hex_row(row),
                "bytes": RingResult(plan.round, plan.digest, terms.digest, row).encode().hex(),
            }
            for terms, row in zip(every, rows, strict=False)
        ],
    }


def _steps(plan: RoundPlan) -> dict[str, Any]:
    """Where a plan has local steps alone: the vectors that were there first have no such field."""
    if plan.steps is None:
        return {}
    rate = hex_row(np.array([plan.steps.learning_rate]))
    return {"steps": {"count": plan.steps.count, "learning_rate": rate}}


def _decay(local: LocalTraining) -> dict[str, Any]:
    """Where a plan has a weight decay alone, for the same reason."""
    return {"weight_decay": hex_row(np.array([local.weight_decay]))} if local.weight_decay else {}


def _messages() -> dict[str, Any]:
    plans = _plans()
    single, double = np.array(_FLOATS, np.float32), np.array(_SLOPES)
    return {
        "plans": [
            {
                "round": plan.round,
                "seed": plan.seed.hex(),
                "directions": plan.estimator.directions,
                "sigma": hex_row(np.array([plan.estimator.sigma])),
                "scheme": plan.estimator.scheme,
                "perturbation": plan.estimator.perturbation.spec,
                "fidelity": plan.fidelity,
                "batch_size": plan.batch_size,
                "weights_digest": plan.weights_digest.hex(),
                "local": plan.local
                and {
                    "epochs": plan.local.epochs,
                    "learning_rate": hex_row(np.array([plan.local.learning_rate])),
                    "optimizer": plan.local.optimizer,
                    "clip": hex_row(np.array([plan.local.clip])),
                    **_decay(plan.local),
                },
                **_steps(plan),
                "digest": plan.digest.hex(),
                "bytes": plan.encode().hex(),
            }
            for plan in plans
        ],
        "models": [{"weights": hex_row(single), "bytes": ModelMessage(single).encode().hex()}],
        "results": [
            {
                "round": plan.round,
                "plan_digest": plan.digest.hex(),
                "samples": samples,
                "values": hex_row(single),
                "bytes": RoundResult(plan.round, plan.digest, samples, single).encode().hex(),
            }
            for plan, samples in zip(plans[1:3], (1, (1 << 64) - 1), strict=True)
        ],
        "sums": [{"round": 41, "values": hex_row(double), "bytes": RoundSum(41, double).encode().hex()}],
        **_ring_messages(plans[2]),
    }


def test_vectors() -> dict[str, Any]:
    """All vectors of version 1, made anew by NumPy. Takes well under a second."""
    return {
        "format": "baffle test vectors",
        "version": 1,
        "philox4x32_10": _philox(),
        "seeds": _seeds(),
        "stream": _stream(),
        "permutations": _permutations(),
        "gaussian_table": _gaussian(),
        "directions": _directions(),
        "gradients": _gradients(),
        "weights_digests": _digests(),
        "messages": _messages(),
        "fixed_point": _fixed_point(),
        "clipped": _clipped(),
    }


test_vectors.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test to pytest


def dump() -> str:
    """The vectors as deterministic JSON text with a final newline."""
    return json.dumps(test_vectors(), indent=1) + "\n"
