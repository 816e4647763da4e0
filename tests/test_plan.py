"""Messages: one byte form each, total decoding, nothing but MessageError for bytes that are none."""

import dataclasses
import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from baffle.errors import BaffleError, ConfigError, MessageError
from baffle.estimator import SteinEstimator
from baffle.perturbations import Gaussian, Layers, Layout, LowRank, Rademacher
from baffle.plan import (
    FIDELITIES,
    LocalSteps,
    LocalTraining,
    ModelMessage,
    RoundPlan,
    RoundResult,
    RoundSum,
    weights_digest,
)
from baffle.stream import Stream, seed_from

KINDS = (RoundPlan, ModelMessage, RoundResult, RoundSum)

# -- strategies ------------------------------------------------------------------------------------------

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
hashes = st.binary(min_size=32, max_size=32)
positive = st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False)
perturbations = st.one_of(st.just(Gaussian()), st.just(Rademacher()), st.integers(1, 65535).map(LowRank))
schemes = st.sampled_from(["forward", "central", "tangent"])
estimators = st.one_of(
    st.builds(SteinEstimator, st.integers(1, 2**32 - 1), positive, schemes, perturbations),
    st.builds(
        lambda counts, sigma, scheme: SteinEstimator(sum(counts), sigma, scheme, Layers(tuple(counts))),
        st.lists(st.integers(1, 2**25), min_size=1, max_size=100),
        positive,
        schemes,
    ),
)
local = st.builds(
    LocalTraining,
    st.integers(1, 2**16 - 1),
    positive,
    st.sampled_from(["sgd", "adam"]),
    st.floats(0, allow_nan=False, allow_infinity=False),
    st.just(0.0) | st.floats(0, 1, exclude_max=True),
)


@st.composite
def plans(draw):
    estimator = draw(estimators)
    fidelity = draw(st.sampled_from(FIDELITIES))
    trained, steps, layered = draw(st.none() | local), None, isinstance(estimator.perturbation, Layers)
    if fidelity == "forward-only" and trained is None and not layered and draw(st.booleans()):
        steps = LocalSteps(draw(st.integers(2, 2**16 - 1)), draw(positive))
        groups = draw(st.integers(1, (2**32 - 1) // steps.count))
        estimator = dataclasses.replace(estimator, directions=groups * steps.count)
    return RoundPlan(draw(u64), draw(hashes), estimator, draw(hashes), draw(u32), fidelity, trained, steps)


def reals(dtype, least):
    width = 8 * np.dtype(dtype).itemsize
    finite = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return hnp.arrays(dtype, st.integers(least, 12), elements=finite)


messages = st.one_of(
    plans(),
    st.builds(ModelMessage, reals(np.float32, 1)),
    st.builds(RoundResult, u64, hashes, st.integers(1, 2**64 - 1), reals(np.float32, 1)),
    st.builds(RoundSum, u64, reals(np.float64, 1)),
)


def same(first, second):
    """Field by field; arrays by their bits, so that −0 is not +0."""
    if type(first) is not type(second):
        return False
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, np.ndarray):
            if a.dtype != b.dtype or a.tobytes() != b.tobytes():
                return False
        elif a != b:
            return False
    return True


SAMPLES = [
    RoundPlan(3, seed_from(1), SteinEstimator(20), bytes(32)),
    RoundPlan(
        4,
        seed_from(2),
        SteinEstimator(9, 0.1, "central", LowRank(4)),
        bytes(32),
        0,
        "backprop",
        LocalTraining(),
    ),
    RoundPlan(5, seed_from(3), SteinEstimator(12), bytes(32), steps=LocalSteps(4, 0.5)),
    ModelMessage(np.array([1.5, -0.0], np.float32)),
    RoundResult(3, bytes(32), 60, np.array([1.0, 2.0, -3.0], np.float32)),
    RoundSum(3, np.array([0.1, 1e-300])),
]
BY_KIND = pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)


# -- round trips -----------------------------------------------------------------------------------------


@given(messages)
def test_round_trip(message):
    data = message.encode()
    back = type(message).decode(data)
    assert same(back, message)
    assert back.encode() == data
    for kind in KINDS:
        if kind is not type(message):
            with pytest.raises(MessageError):
                kind.decode(data)


@given(messages, messages)
def test_two_messages_never_share_their_bytes(first, second):
    assert (first.encode() == second.encode()) == same(first, second)


def test_sizes_are_as_documented():
    assert len(ModelMessage(np.zeros(10, np.float32)).encode()) == 14 + 4 * 10
    assert len(RoundResult(0, bytes(32), 1, np.zeros(10, np.float32)).encode()) == 58 + 4 * 10
    assert [len(plan.encode()) for plan in SAMPLES[:3]] == [108, 117 + len("lowrank:4"), 118]


def test_decoded_arrays_do_not_keep_the_message_and_can_be_written():
    for message in SAMPLES[3:]:
        data = bytearray(message.encode())
        back = type(message).decode(bytes(data))
        array = back.weights if isinstance(back, ModelMessage) else back.values
        assert array.dtype.isnative
        array[0] = 7


@pytest.mark.parametrize("order", ["<f4", ">f4"])
def test_bytes_do_not_depend_on_the_arrays_memory(order):
    plain = np.array([1.0, 2.5, -3.0, 4.0], np.float32)
    strided = np.repeat(plain, 2).astype(order)[::2]
    assert ModelMessage(strided).encode() == ModelMessage(plain).encode()
    layout = Layout.flat(4)
    assert weights_digest(strided, layout, bytes(32)) == weights_digest(plain, layout, bytes(32))


# -- bytes that are no message ---------------------------------------------------------------------------


@BY_KIND
def test_every_truncation_is_refused(message):
    data = message.encode()
    for size in range(len(data)):
        if getattr(message, "steps", None) and size == len(data) - 10:  # a whole plan, and another one
            assert RoundPlan.decode(data[:size]) == dataclasses.replace(message, steps=None)
            continue
        with pytest.raises(MessageError):
            type(message).decode(data[:size])


@BY_KIND
def test_every_extension_by_a_byte_is_refused(message):
    data = message.encode()
    for at in (0, 5, 6, len(data)):
        for byte in range(256):
            longer = data[:at] + bytes([byte]) + data[at:]
            if at == len(data) or longer[:6] != data[:6]:
                with pytest.raises(MessageError):
                    type(message).decode(longer)


@BY_KIND
def test_every_single_byte_change_is_refused_or_is_another_message(message):
    data, decoded = message.encode(), 0
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flip
            try:
                back = type(message).decode(bytes(changed))
            except MessageError:
                continue
            decoded += 1
            assert back.encode() == changed
            assert not same(back, message)
    assert decoded > 0


@settings(max_examples=500)
@given(messages, st.data())
def test_mutated_messages_raise_nothing_else(message, data):
    raw = bytearray(message.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "splice"]))
        at = data.draw(st.integers(0, len(raw)))
        if kind == "set" and at < len(raw):
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(max_size=4))
        elif kind == "delete":
            del raw[at : at + data.draw(st.integers(1, 4))]
        else:
            raw[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    for kind in KINDS:
        decodes_or_refuses(kind, bytes(raw))


@settings(max_examples=500)
@given(st.sampled_from(KINDS), st.binary(max_size=200))
def test_arbitrary_bodies_raise_nothing_else(kind, body):
    decodes_or_refuses(kind, body)
    decodes_or_refuses(kind, b"BFFL" + bytes([1, kind.KIND]) + body)


def decodes_or_refuses(kind, raw):
    try:
        message = kind.decode(raw)
    except MessageError as error:
        text = str(error)
    else:
        assert message.encode() == raw
        return
    assert "\n" not in text
    assert len(text) < 300


def with_field(plan, at, form, value):
    raw = bytearray(plan.encode())
    struct.pack_into("<" + form, raw, at, value)
    return bytes(raw)


# Offsets in a plan for "gaussian" (8 letters) with local training.
PLAN = RoundPlan(3, seed_from(1), SteinEstimator(20), bytes(32), local=LocalTraining())
K_AT, SIGMA_AT, SCHEME_AT, SPEC_AT, FIDELITY_AT, EPOCHS_AT = 46, 50, 58, 59, 69, 106
BAD_FIELDS = [
    (K_AT, "I", 0),
    *((SIGMA_AT, "d", bad) for bad in (0.0, -1.0, math.nan, math.inf, -math.inf)),
    (SCHEME_AT, "B", 3),
    *((SPEC_AT, "H", bad) for bad in (0, 7, 9, 65535)),
    (SPEC_AT + 2, "B", ord("G")),
    (SPEC_AT + 2, "B", 0xFF),
    (FIDELITY_AT, "B", 3),
    (EPOCHS_AT, "H", 0),
    *((EPOCHS_AT + 2, "d", bad) for bad in (0.0, -0.1, math.nan, math.inf)),
    (EPOCHS_AT + 10, "B", 2),
    *((EPOCHS_AT + 11, "d", bad) for bad in (-0.0, -0.5, math.nan, math.inf)),
    (4, "B", 0),
    (4, "B", 2),
    (0, "B", ord("b")),
]


def test_the_offsets_are_right():
    assert RoundPlan.decode(with_field(PLAN, SPEC_AT, "H", 8)) == PLAN
    assert RoundPlan.decode(with_field(PLAN, K_AT, "I", 21)).estimator.directions == 21
    assert RoundPlan.decode(with_field(PLAN, SIGMA_AT, "d", 0.5)).estimator.sigma == 0.5
    for number, scheme in enumerate(("forward", "central", "tangent")):
        assert RoundPlan.decode(with_field(PLAN, SCHEME_AT, "B", number)).estimator.scheme == scheme
    assert RoundPlan.decode(with_field(PLAN, FIDELITY_AT, "B", 1)).fidelity == "law"
    assert RoundPlan.decode(with_field(PLAN, EPOCHS_AT, "H", 5)).local.epochs == 5
    assert RoundPlan.decode(with_field(PLAN, EPOCHS_AT + 2, "d", 0.5)).local.learning_rate == 0.5
    assert RoundPlan.decode(with_field(PLAN, EPOCHS_AT + 10, "B", 0)).local.optimizer == "sgd"
    assert RoundPlan.decode(with_field(PLAN, EPOCHS_AT + 11, "d", 0.5)).local.clip == 0.5


def test_a_weight_decay_lies_behind_the_others_or_is_not_there():
    local = dataclasses.replace(PLAN.local, weight_decay=0.25)
    raw = dataclasses.replace(PLAN, local=local).encode()
    assert raw == PLAN.encode() + struct.pack("<d", 0.25)
    assert RoundPlan.decode(raw).local == local
    for bad in (0.0, -0.0, -0.25, 1.0, math.nan, math.inf):  # none is 8 bytes less
        with pytest.raises(MessageError):
            RoundPlan.decode(PLAN.encode() + struct.pack("<d", bad))
    for length in (1, 7, 9, 16):
        with pytest.raises(MessageError):
            RoundPlan.decode(PLAN.encode() + (struct.pack("<d", 0.25) * 2)[:length])


@pytest.mark.parametrize(("at", "form", "value"), BAD_FIELDS)
def test_plans_with_a_field_that_cannot_be(at, form, value):
    with pytest.raises(MessageError):
        RoundPlan.decode(with_field(PLAN, at, form, value))


@pytest.mark.parametrize(
    "spec",
    [
        b"lowrank:04",
        b"lowrank:+4",
        b"lowrank: 4",
        b"lowrank:0",
        b"lowrank:4\0",
        b"lowrank:" + b"9" * 9000,
        b"layers:021",
        b"layers:7.",
        b"layers:" + b"1." * 9000 + b"3",
    ],
)
def test_plans_with_another_spelling_of_a_perturbation(spec):
    raw = PLAN.encode()
    assert raw[SPEC_AT : SPEC_AT + 10] == b"\x08\0gaussian"
    with pytest.raises(MessageError) as caught:
        RoundPlan.decode(raw[:SPEC_AT] + struct.pack("<H", len(spec)) + spec + raw[SPEC_AT + 10 :])
    assert len(str(caught.value)) < 300


def test_the_law_has_any_perturbation():
    plan = RoundPlan(3, seed_from(1), SteinEstimator(20, perturbation=Rademacher()), bytes(32))
    raw = bytearray(plan.encode())
    raw[FIDELITY_AT + len("rademacher") - len("gaussian")] = 1
    assert RoundPlan.decode(bytes(raw)) == dataclasses.replace(plan, fidelity="law")


def test_directions_in_layers_are_as_many_as_their_name_says():
    estimator = SteinEstimator(20, perturbation=Layers((5, 15)))
    raw = RoundPlan(3, seed_from(1), estimator, bytes(32)).encode()
    assert RoundPlan.decode(raw).estimator == estimator
    for K in (1, 19, 21, 2**32 - 1):
        with pytest.raises(MessageError, match="all of them are needed"):
            RoundPlan.decode(raw[:K_AT] + struct.pack("<I", K) + raw[K_AT + 4 :])


ONES32, ONES64 = np.ones(3, np.float32), np.ones(3)
WITH_PAYLOAD = [ModelMessage(ONES32), RoundResult(0, bytes(32), 1, ONES32), RoundSum(0, ONES64)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("message", WITH_PAYLOAD, ids=lambda m: type(m).__name__)
def test_payloads_that_are_not_finite_are_refused(bad, place, message):
    name = "weights" if isinstance(message, ModelMessage) else "values"
    values = getattr(message, name).copy()
    values[place] = bad
    with pytest.raises(ConfigError, match="finite"):
        dataclasses.replace(message, **{name: values})
    data = message.encode()
    forged = data[: len(data) - values.nbytes] + values.tobytes()
    with pytest.raises(MessageError, match="finite"):
        type(message).decode(forged)


@pytest.mark.parametrize("message", WITH_PAYLOAD, ids=lambda m: type(m).__name__)
def test_payloads_of_nothing_are_refused(message):
    name, size = ("weights", 8) if isinstance(message, ModelMessage) else ("values", 4)
    values = getattr(message, name)
    for shape in ((0,), (1, 3), ()):
        with pytest.raises(ConfigError):
            dataclasses.replace(message, **{name: np.ones(shape, values.dtype)})
    data = message.encode()
    with pytest.raises(MessageError):
        type(message).decode(data[: len(data) - values.nbytes - size] + bytes(size))


def test_answers_without_samples_are_refused():
    data = bytearray(RoundResult(0, bytes(32), 1, ONES32).encode())
    data[6 + 8 + 32] = 0
    with pytest.raises(MessageError, match="samples"):
        RoundResult.decode(bytes(data))
    for change in ({"samples": 0}, {"samples": 2**64}, {"round": -1}, {"plan_digest": b"x"}):
        with pytest.raises(ConfigError):
            dataclasses.replace(RoundResult(0, bytes(32), 1, ONES32), **change)


def test_absurd_lengths_allocate_nothing():
    hostile = [
        (ModelMessage, struct.pack("<Q", count) + bytes(8))
        for count in (3, 2**31, 2**40, 2**62, 2**63, 2**64 - 1)
    ]
    hostile += [
        (RoundResult, bytes(8 + 32) + struct.pack("<QI", 1, count) + bytes(8))
        for count in (3, 2**30, 2**32 - 1)
    ]
    hostile += [(RoundSum, bytes(8) + struct.pack("<I", count) + bytes(8)) for count in (2, 2**29, 2**32 - 1)]
    hostile += [(RoundPlan, bytes(8 + 32) + struct.pack("<IdBH", 1, 1.0, 0, 65535) + bytes(80))]
    tracemalloc.start()
    try:
        for kind, body in hostile:
            with pytest.raises(MessageError, match="cut short"):
                kind.decode(b"BFFL" + bytes([1, kind.KIND]) + body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


# -- settings that cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"round": 2**64},
        {"seed": bytes(31)},
        {"weights_digest": bytes(33)},
        {"batch_size": -1},
        {"batch_size": 2**32},
        {"fidelity": "exact"},
        {"steps": LocalSteps(2)},  # beside local epochs
        {"steps": LocalSteps(3), "local": None},  # of 20 directions
        {"steps": LocalSteps(40), "local": None},
        {"steps": LocalSteps(2), "local": None, "fidelity": "law"},
        {"steps": LocalSteps(2), "local": None, "fidelity": "backprop"},
        {"steps": LocalSteps(2), "local": None, "estimator": SteinEstimator(4, perturbation=Layers((2, 2)))},
    ],
)
def test_plans_that_cannot_be(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(PLAN, **change)


@pytest.mark.parametrize(
    "change",
    [
        *({"epochs": bad} for bad in (0, -1, 2**16)),
        *({"learning_rate": bad} for bad in (0.0, -1.0, math.nan, math.inf)),
        {"optimizer": "lbfgs"},
        *({"clip": bad} for bad in (-1.0, math.nan, math.inf)),
        *({"weight_decay": bad} for bad in (-1.0, 1.0, math.nan, math.inf)),
    ],
)
def test_local_training_that_cannot_be(change):
    with pytest.raises(ConfigError):
        LocalTraining(**change)


@pytest.mark.parametrize(
    "change",
    [
        *({"count": bad} for bad in (-2, 0, 1, 2**16)),
        *({"learning_rate": bad} for bad in (0.0, -0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_local_steps_that_cannot_be(change):
    with pytest.raises(ConfigError):
        LocalSteps(**{"count": 2} | change)


def test_a_message_error_is_an_error_of_baffle():
    assert issubclass(MessageError, BaffleError)


# -- digests ---------------------------------------------------------------------------------------------


def test_plan_digest_names_every_field():
    changes = [
        {},
        {"round": 4},
        {"seed": seed_from(2)},
        {"estimator": SteinEstimator(21)},
        {"estimator": SteinEstimator(20, 2e-4)},
        {"estimator": SteinEstimator(20, scheme="central")},
        {"estimator": SteinEstimator(20, perturbation=Rademacher())},
        {"weights_digest": bytes(31) + b"\1"},
        {"batch_size": 33},
        {"fidelity": "law"},
        {"local": None},
        *({"local": None, "steps": steps} for steps in (LocalSteps(2), LocalSteps(10), LocalSteps(2, 0.1))),
        {"local": LocalTraining(2)},
        {"local": LocalTraining(learning_rate=0.1)},
        {"local": LocalTraining(optimizer="sgd")},
        {"local": LocalTraining(clip=1.0)},
        {"local": LocalTraining(weight_decay=0.5)},
    ]
    digests = [dataclasses.replace(PLAN, **change).digest for change in changes]
    assert len(set(digests)) == len(changes)
    assert dataclasses.replace(PLAN).digest == PLAN.digest


def test_plan_names_its_stream():
    assert PLAN.stream == Stream(PLAN.seed, PLAN.round)


def test_weights_digest_names_everything():
    weights = np.arange(6, dtype=np.float32)
    one_bit = weights.copy()
    one_bit.view(np.uint32)[5] ^= 1
    minus_zero = weights.copy()
    minus_zero[0] = -0.0
    base = Layout(("a", "b"), ((2, 2), (2,)))
    cases = [
        (weights, base, bytes(32)),
        (one_bit, base, bytes(32)),
        (minus_zero, base, bytes(32)),
        (weights[::-1], base, bytes(32)),
        (weights, base, bytes(31) + b"\1"),
        (weights, Layout(("a", "c"), base.shapes), bytes(32)),
        (weights, Layout(("b", "a"), base.shapes), bytes(32)),
        (weights, Layout(base.names, ((4,), (2,))), bytes(32)),
        (weights, Layout(base.names, ((2, 2), (2, 1))), bytes(32)),
        (weights, Layout(base.names, ((2,), (2, 2))), bytes(32)),
        (weights, Layout.flat(6), bytes(32)),
        (weights, Layout(("ab", ""), base.shapes), bytes(32)),
    ]
    digests = {weights_digest(*case) for case in cases}
    assert len(digests) == len(cases)
    assert all(len(digest) == 32 for digest in digests)
    # Without its length, a name could hold another tensor's record.
    two = Layout(("a", "b"), ((0,), (6,)))
    one = Layout(("a" + "\1\0\0\0" + "\0" * 8 + "b",), ((6,),))
    assert weights_digest(weights, two, bytes(32)) != weights_digest(weights, one, bytes(32))
    assert weights_digest(weights.copy(), Layout(base.names, base.shapes), bytes(32)) in digests
