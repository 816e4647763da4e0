"""Terms of sums in a ring: bytes, both halves against Python's integers, and sums that cannot be."""

import dataclasses
import math
import random
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle import terms as module
from baffle.errors import AggregationError, ConfigError, MessageError
from baffle.estimator import SteinEstimator
from baffle.fixedpoint import FixedPoint
from baffle.plan import LocalTraining, RoundPlan, RoundResult
from baffle.privacy import Privacy
from baffle.stream import seed_from
from baffle.terms import RingResult, Terms

K = 6


def plan(directions=K, scheme="forward", batch_size=4, **options):
    return RoundPlan(
        3, seed_from(1), SteinEstimator(directions, 0.1, scheme), bytes(32), batch_size, **options
    )


def wide(**options):
    settings = {"fixed_point": FixedPoint(64, 20, 100.0), "cohort": 10, "largest_weight": 1000}
    return Terms(**{**settings, **options})


def integer(value, point):
    """round(v·2^f), half to even, saturating: Python's own."""
    limit = Fraction(point.limit)
    return round(min(max(Fraction(float(value)), -limit), limit) * 2**point.fraction_bits)


def summed(rows, point):
    """Residues added with Python's integers."""
    modulus = 1 << point.ring_bits
    total = [sum(column) % modulus for column in zip(*(row.tolist() for row in rows), strict=True)]
    return np.array(total, dtype=point.dtype)


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(module, "noise_share", lambda privacy, point, size: np.zeros(size, np.int64))


# -- bytes -----------------------------------------------------------------------------------------------


@st.composite
def all_terms(draw):
    bits = draw(st.sampled_from([32, 64]))
    f, limit = draw(st.integers(0, bits - 1)), draw(st.floats(1e-3, 1e6))
    levels = tuple(sorted(draw(st.sets(st.integers(1, 2**32 - 1), max_size=4))))
    privacy = None
    if not levels and draw(st.booleans()):
        unit = draw(st.sampled_from(["example", "client"]))
        rate = draw(st.floats(1e-6, 1)) if unit == "example" else 1.0
        shares = draw(st.integers(1, 2**32 - 1))
        clip = draw(st.floats(1e-3, 1e6))
        privacy = Privacy(unit, clip, draw(st.floats(0.01, 50)), rate, shares)
    try:
        cohort, weight = draw(st.integers(1, 2**20)), draw(st.integers(1, 2**20))
        return Terms(FixedPoint(bits, f, limit), cohort, weight, levels, privacy)
    except ConfigError:
        return wide(levels=levels)


words = st.sampled_from([np.uint32, np.uint64]).flatmap(
    lambda kind: st.lists(st.integers(0, int(np.iinfo(kind).max)), min_size=1, max_size=9).map(
        lambda values: np.array(values, kind)
    )
)
hashes = st.binary(min_size=32, max_size=32)
ring_results = st.builds(RingResult, st.integers(0, 2**64 - 1), hashes, hashes, words)


@given(all_terms())
def test_terms_round_trip(terms):
    back = Terms.decode(terms.encode())
    assert back == terms
    assert back.encode() == terms.encode()
    assert back.digest == terms.digest


@given(ring_results)
def test_ring_results_round_trip(result):
    back = RingResult.decode(result.encode())
    assert back.encode() == result.encode()
    assert back.residues.tolist() == result.residues.tolist()
    assert back.residues.dtype == result.residues.dtype
    assert len(result.encode()) == 83 + result.residues.nbytes
    for kind in (RoundResult, Terms):
        with pytest.raises(MessageError):
            kind.decode(result.encode())


SAMPLES = [
    wide(),
    wide(levels=(2, 4, 6)),
    wide(privacy=Privacy("example", 1.0, 1.1, 0.25, 7)),
    wide(privacy=Privacy("client", 2.0, 0.5)),
    RingResult(7, bytes(32), b"\1" * 32, np.array([1, 2**64 - 1], np.uint64)),
    RingResult(7, bytes(32), b"\1" * 32, np.array([1, 2**32 - 1], np.uint32)),
]
BY_KIND = pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)


@BY_KIND
def test_bytes_that_are_none_raise_message_error_and_nothing_else(message):
    data, rng = message.encode(), random.Random(0)
    for cut in range(len(data)):
        with pytest.raises(MessageError):
            type(message).decode(data[:cut])
    with pytest.raises(MessageError):
        type(message).decode(data + b"\0")
    decoded = 0
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        try:
            back = type(message).decode(bytes(changed))
        except MessageError:
            continue
        decoded += 1
        assert back.encode() == bytes(changed)
    assert decoded  # digests, for one, may be anything


@settings(max_examples=300)
@given(st.sampled_from([5, 6]), st.binary(max_size=120))
def test_any_bytes_behind_a_header(kind, body):
    for cls in (Terms, RingResult):
        try:
            back = cls.decode(b"BFFL\1" + bytes([kind]) + body)
        except MessageError:
            continue
        assert back.encode() == b"BFFL\1" + bytes([kind]) + body


def test_the_bytes_are_those_of_the_specification():
    point = struct.pack("<BBd", 64, 20, 100.0)
    assert wide().encode() == b"BFFL\1\5" + point + struct.pack("<IQHB", 10, 1000, 0, 0)
    assert wide(levels=(2, 6)).encode() == b"BFFL\1\5" + point + struct.pack("<IQHIIB", 10, 1000, 2, 2, 6, 0)
    private = wide(privacy=Privacy("client", 2.0, 0.5, 1.0, 3)).encode()
    assert private == b"BFFL\1\5" + point + struct.pack("<IQHBdddI", 10, 1000, 0, 2, 2.0, 0.5, 1.0, 3)
    assert SAMPLES[5].encode() == (
        b"BFFL\1\6"
        + struct.pack("<Q", 7)
        + bytes(32)
        + b"\1" * 32
        + struct.pack("<BIII", 32, 2, 1, 2**32 - 1)
    )


def test_a_client_that_decodes_has_checked():
    """A sum that could leave the ring, announced: refused before anything else is done."""
    over = b"BFFL\1\5" + struct.pack("<BBdIQHB", 64, 32, 1024.0, 1000, 2**20, 0, 0)
    Terms.decode(over.replace(struct.pack("<IQ", 1000, 2**20), struct.pack("<IQ", 1000, 2**10)))
    with pytest.raises(MessageError, match="overflow"):
        Terms.decode(over)


@pytest.mark.parametrize(
    "options",
    [
        {"cohort": 0},
        {"cohort": 2**32},
        {"largest_weight": 0},
        {"largest_weight": 2**64},
        {"levels": (0, 6)},
        {"levels": (3, 3)},
        {"levels": (4, 2)},
        {"levels": (2**32,)},
        {"levels": (2, 6), "privacy": Privacy("client", 1.0, 1.0)},
        {"privacy": Privacy("client", 100.5, 1.0)},  # above the limit
        {"privacy": Privacy("client", 1.0, 1.0, 1.0, 2**32)},
        {"privacy": Privacy("client", 1.0, 1e6), "fixed_point": FixedPoint(64, 40, 1.0)},
    ],
)
def test_terms_that_cannot_be(options):
    with pytest.raises(ConfigError):
        wide(**options)


def test_there_is_room_for_the_noise():
    """Twelve standard deviations of the whole noise beside the worst sum: an entry fits or is refused."""
    point = FixedPoint(32, 10, 1.0)
    worst = 1000 * 1024
    for z in (1e2, 1e3, 1e4, 1e5, 1e6):
        deviation = z * 1024 * (1000 / 10) ** 0.5
        make = lambda z=z: Terms(point, 1000, 7, (), Privacy("client", 1.0, z, 1.0, 10))  # noqa: E731
        if worst + 12.1 * deviation < 2**31:
            make()
        elif worst + 11.9 * deviation >= 2**31:
            with pytest.raises(ConfigError, match="noise"):
                make()


# -- a weighted mean -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64]), st.booleans())
def test_sums_are_those_of_pythons_integers(seed, bits, with_levels):
    rng = np.random.default_rng(seed)
    levels = (2, 5, 6) if with_levels else ()
    point = FixedPoint.fitting(10, 1000, 5.0, bits)
    terms, count = Terms(point, 10, 1000, levels), int(rng.integers(1, 11))
    clients = []
    for _ in range(count):
        length = int(rng.choice(levels)) if levels else K
        values = (rng.normal(size=length) * 3).astype(np.float32)
        clients.append((values, int(rng.integers(1, 1001))))
    rows = [terms.prepare(plan(), values, samples) for values, samples in clients]
    assert all(row.dtype == point.dtype and len(row) == terms.length(K) for row in rows)
    got = terms.total(plan(), summed(rows, point), count)

    reached = max(len(values) for values, _ in clients)
    assert (got.round, len(got.values)) == (3, reached)
    for k in range(reached):
        able = [(values[k], samples) for values, samples in clients if len(values) > k]
        weight = sum(samples for _, samples in able)
        exact = Fraction(sum(samples * integer(v, point) for v, samples in able), 2**point.fraction_bits)
        assert got.values[k] == pytest.approx(float(exact / weight), rel=2**-51, abs=0)
        real = sum(Fraction(float(v)) * samples for v, samples in able) / weight
        inside = all(abs(v) <= 5 for v, _ in able)
        if inside:
            assert abs(exact / weight - real) <= Fraction(1, 2 ** (point.fraction_bits + 1))


def test_the_worst_sum_that_is_let_through_is_exact():
    """Every client at the limit with the largest weight, at the edge of the ring; one more is refused."""
    point = FixedPoint(32, 8, 4.0)  # 2^10 the largest
    cohort, weight = 2**10, 2**11 - 1
    terms = Terms(point, cohort, weight)
    for sign in (1, -1):
        row = terms.prepare(plan(), np.full(K, sign * 9.0), weight)
        total = summed([row] * cohort, point)
        assert terms.total(plan(), total, cohort).values.tolist() == [sign * 4.0] * K
    with pytest.raises(ConfigError, match="overflow"):
        Terms(point, cohort, weight + 1)


def test_n_numbers_have_one_weight():
    terms = wide()
    for which in ({"local": LocalTraining()}, {"fidelity": "backprop"}, {"fidelity": "law"}):
        asked = plan(**which)
        rows = [terms.prepare(asked, np.arange(9.0) * n, n) for n in (1, 3)]
        total = terms.total(asked, summed(rows, terms.fixed_point), 2)
        assert total.values.tolist() == (np.arange(9.0) * 10 / 4).tolist()
        with pytest.raises(ConfigError, match="levels"):
            wide(levels=(2, 6)).check_plan(asked)


def test_what_a_client_refuses():
    terms, levelled = wide(), wide(levels=(2, 4, 6))
    with pytest.raises(ConfigError, match="1001 samples exceed"):
        terms.prepare(plan(), np.zeros(K), 1001)
    with pytest.raises(ConfigError, match="1001 samples exceed"):
        terms.check_samples(1001)
    terms.check_samples(1000)
    for wrong in (np.zeros(5), np.zeros(7), np.zeros((1, K))):
        with pytest.raises(ConfigError, match="shape"):
            terms.prepare(plan(), wrong, 1)
    with pytest.raises(ConfigError, match="shape"):
        levelled.prepare(plan(), np.zeros(3), 1)
    with pytest.raises(ConfigError, match="NaN"):
        terms.prepare(plan(), np.full(K, np.nan), 1)
    with pytest.raises(ConfigError, match="last level"):
        levelled.check_plan(plan(7))
    for budget, want in ((None, 6), (99, 6), (6, 6), (5, 4), (2, 2)):
        assert levelled.directions(plan(), budget) == want
    with pytest.raises(ConfigError, match="budget of 1"):
        levelled.directions(plan(), 1)
    assert terms.directions(plan(), 6) == 6
    with pytest.raises(ConfigError, match="budget of 5"):
        terms.directions(plan(), 5)


def sum_of(terms, clients):
    rows = [terms.prepare(plan(), np.asarray(values, float), samples) for values, samples in clients]
    return summed(rows, terms.fixed_point)


def test_a_sum_that_honest_answers_cannot_give():
    terms, answered = wide(levels=(2, 4, 6)), 3
    honest = sum_of(terms, [(np.ones(6), 5), (np.ones(4), 7), (np.ones(2), 11)])
    assert honest[-3:].tolist() == [23, 12, 5]
    assert terms.total(plan(), honest, answered).values.tolist() == [1.0] * 6
    largest = terms.fixed_point.largest

    def refused(place, value, answered=answered):
        bad = honest.copy()
        bad[place] = np.uint64(value % 2**64)
        with pytest.raises(AggregationError, match="told something else, or lies"):
            terms.total(plan(), bad, answered)

    refused(0, 23 * largest + 1)
    refused(1, -23 * largest - 1)
    refused(2, 12 * largest + 1)  # the entries of a level are held to its own weight
    refused(5, 5 * largest + 1)
    refused(3, 2**63)  # the one integer whose absolute value does not exist
    refused(6, 2)  # below one sample each
    refused(6, 3001)  # above 1000 each
    refused(7, 24)  # more of a level than of the one before
    refused(8, 13)
    refused(8, 0)  # nobody reached these entries, and still they hold something
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2**64, (200, 9), dtype=np.uint64)  # masks that do not cancel
    for bad in noise:
        with pytest.raises(AggregationError):
            terms.total(plan(), bad, answered)
    edge = honest.copy()
    edge[0] = 23 * largest
    assert terms.total(plan(), edge, answered).values[0] == 100.0
    for count in (0, 11):
        with pytest.raises(AggregationError):
            terms.total(plan(), honest, count)
    for wrong in (honest[:-1], np.append(honest, honest[-1:]), honest[:0]):
        with pytest.raises(AggregationError):
            terms.total(plan(), wrong, answered)


def test_entries_that_nobody_reached_are_cut_off():
    terms = wide(levels=(2, 4, 6))
    total = terms.total(plan(), sum_of(terms, [([1, 2, 3, 4], 2), ([5, 6], 6)]), 2)
    assert total.values.tolist() == [4.0, 5.0, 3.0, 4.0]


# -- privacy ---------------------------------------------------------------------------------------------

EXAMPLE = Privacy("example", 3.0, 1.0, 0.5)
CLIENT = Privacy("client", 3.0, 1.0)


def truncated(row, clip, point):
    """Clipped to the norm, and toward zero: with Python's floats, half a step of the grid at a time."""
    norm = sum(float(v) ** 2 for v in row) ** 0.5
    scale = min(1.0, clip / norm) if norm else 1.0
    return [int(float(v) * scale * 2**point.fraction_bits) for v in row]


def test_examples_are_clipped_one_by_one_and_summed(silent):
    terms = wide(privacy=EXAMPLE)
    slopes = np.random.default_rng(0).normal(size=(7, K)) * [[0.1], [1], [2], [5], [30], [1], [0]]
    residues = terms.prepare_examples(plan(), slopes)
    assert len(residues) == K == terms.length(K)
    want = np.sum([truncated(row, 3.0, terms.fixed_point) for row in slopes], axis=0)
    assert np.abs(terms.fixed_point.integers(residues) - want).max() <= 7  # one step a row, of 2^-20
    blocks = iter([slopes[:3], slopes[3:4], slopes[4:]])
    assert terms.prepare_examples(plan(), blocks).tolist() == residues.tolist()
    got = terms.total(plan(), summed([residues] * 2, terms.fixed_point), 2)
    np.testing.assert_allclose(got.values, want / 2**20 / 4, atol=7 * 2.0**-20)  # batch size 4
    assert terms.prepare_examples(plan(), np.zeros((0, K))).tolist() == [0] * K
    assert terms.prepare_examples(plan(), []).tolist() == [0] * K


def test_adding_one_example_moves_the_sum_by_the_clip_at_most(silent):
    terms = wide(privacy=EXAMPLE)
    slopes = np.random.default_rng(1).normal(size=(50, K)) * 100
    point = terms.fixed_point
    before = point.integers(terms.prepare_examples(plan(), slopes[:-1]))
    for row in slopes:
        after = point.integers(terms.prepare_examples(plan(), [slopes[:-1], row[None]]))
        moved = sum(int(d) ** 2 for d in after - before)
        assert moved <= (3 * 2**20) ** 2
        assert moved > 0.99 * (3 * 2**20) ** 2


def test_a_clients_vector_is_clipped_whole(silent):
    terms = wide(privacy=CLIENT)
    for asked, values in ((plan(), np.arange(6.0)), (plan(local=LocalTraining()), np.arange(9.0))):
        row = terms.prepare(asked, values, 10**9)  # N_c has no part in it
        assert len(row) == len(values) == terms.length(len(values))
        want = truncated(values, 3.0, terms.fixed_point)
        assert np.abs(terms.fixed_point.integers(row) - want).max() <= 1
        got = terms.total(asked, summed([row] * 4, terms.fixed_point), 4)
        np.testing.assert_allclose(got.values, np.array(want) / 2**20, atol=2.0**-20)


@pytest.mark.parametrize("privacy", [EXAMPLE, CLIENT], ids=lambda p: p.unit)
def test_the_noise_is_there_and_has_its_size(privacy):
    private = dataclasses.replace(privacy, shares=4)
    terms, asked = wide(privacy=private), plan(2000)
    point = terms.fixed_point
    if private.unit == "example":
        rows = [terms.prepare_examples(asked, np.zeros((0, 2000))) for _ in range(4)]
    else:
        rows = [terms.prepare(asked, np.zeros(2000), 1) for _ in range(4)]
    noise = point.integers(summed(rows, point)) / 2**20
    # z·C = 3; the deviation of a sample deviation is σ/√(2·2000).
    assert abs(noise.std() - 3) < 5 * 3 / 4000**0.5
    assert abs(noise.mean()) < 5 * 3 / 2000**0.5
    assert len({row.tobytes() for row in rows}) == 4


def test_what_privacy_does_not_go_with():
    example, client = wide(privacy=EXAMPLE), wide(privacy=CLIENT)
    example.check_plan(plan())
    example.check_plan(plan(scheme="central"))
    client.check_plan(plan(scheme="tangent", batch_size=0))
    client.check_plan(plan(local=LocalTraining()))
    for terms, asked, why in [
        (example, plan(fidelity="law"), "forward-only"),
        (client, plan(fidelity="backprop"), "forward-only"),
        (example, plan(local=LocalTraining()), "batch-level"),
        (example, plan(scheme="tangent"), "tangent"),
        (example, plan(batch_size=0), "batch size"),
    ]:
        with pytest.raises(ConfigError, match=why):
            terms.check_plan(asked)
    with pytest.raises(ConfigError):
        example.prepare(plan(), np.zeros(K), 1)
    for terms in (client, wide()):
        with pytest.raises(ConfigError):
            terms.prepare_examples(plan(), np.zeros((2, K)))
    for wrong in (np.zeros((2, K + 1)), np.zeros(K), [np.zeros((1, K)), np.zeros((1, K - 1))]):
        with pytest.raises(ConfigError, match="shape"):
            example.prepare_examples(plan(), wrong)
    with pytest.raises(ConfigError, match="exceed"):
        example.prepare_examples(plan(), [np.zeros((600, K))] * 2)
    with pytest.raises(ConfigError, match="NaN"):
        example.prepare_examples(plan(), np.full((1, K), np.nan))
    example.check_samples(1000)
    with pytest.raises(ConfigError):
        example.check_samples(1001)
    client.check_samples(1001)


def test_ring_results_that_cannot_be():
    row = np.ones(3, np.uint64)
    for change in (
        {"round": -1},
        {"round": 2**64},
        {"plan_digest": bytes(31)},
        {"terms_digest": bytes(33)},
        {"residues": row.astype(np.int64)},
        {"residues": row.astype(np.float64)},
        {"residues": row[:0]},
        {"residues": row[None]},
    ):
        fields = {"round": 0, "plan_digest": bytes(32), "terms_digest": bytes(32), "residues": row, **change}
        with pytest.raises(ConfigError):
            RingResult(**fields)


# -- a noised sum that cannot be ---------------------------------------------------------------------------

NOISED = [
    Privacy("example", 3.0, 0.5, 0.5, shares=4),
    Privacy("client", 3.0, 0.5, shares=4),
]


@pytest.mark.parametrize("privacy", NOISED, ids=lambda p: p.unit)
def test_fewer_answers_than_shares_of_the_noise_give_no_sum(privacy):
    terms = wide(fixed_point=FixedPoint(64, 20, 3.0), privacy=privacy)
    residues = np.zeros(K, np.uint64)
    for answered in (1, 2, 3):
        with pytest.raises(AggregationError, match=f"{answered} clients answered, and 4 make the noise"):
            terms.total(plan(), residues, answered)
    for answered in (4, 10):
        assert terms.total(plan(), residues, answered).values.tolist() == [0.0] * K
    for answered in (0, 11):
        with pytest.raises(AggregationError, match="from a cohort of 10"):
            terms.total(plan(), residues, answered)


@pytest.mark.parametrize("privacy", NOISED, ids=lambda p: p.unit)
def test_a_noised_sum_that_honest_answers_cannot_give(privacy):
    """What everybody's largest vector and twelve deviations of their noise stay below, to the integer."""
    terms, answered = wide(fixed_point=FixedPoint(64, 20, 3.0), privacy=privacy), 5
    weight = 1 if privacy.unit == "client" else 1000
    share = Fraction(0.5 * 3 * 2**20) ** 2 / 4  # an integer
    bound = answered * weight * 3 * 2**20 + 12 * (math.isqrt(int(answered * share)) + 1)
    each = answered * (4 if privacy.unit == "example" else 1)
    for sign in (1, -1):
        row = np.zeros(K, np.int64)
        row[4] = sign * bound
        got = terms.total(plan(), row.astype(np.uint64), answered)
        assert got.values[4] == pytest.approx(sign * bound / 2**20 / each, rel=1e-15)
        row[4] = sign * (bound + 1)
        with pytest.raises(AggregationError, match="told something else, or lies"):
            terms.total(plan(), row.astype(np.uint64), answered)
    edge = np.zeros(K, np.uint64)
    edge[0] = 2**63  # the one integer whose absolute value does not exist
    with pytest.raises(AggregationError):
        terms.total(plan(), edge, answered)
    rng = np.random.default_rng(2)
    for garbage in rng.integers(0, 2**64, (200, K), dtype=np.uint64):  # masks that do not cancel
        with pytest.raises(AggregationError):
            terms.total(plan(), garbage, answered)


@pytest.mark.parametrize("privacy", NOISED, ids=lambda p: p.unit)
def test_honest_noised_sums_are_let_through(privacy):
    """Everybody at the clip, with real noise: hundreds of entries, and none near the bound."""
    asked = plan(300)
    terms = wide(fixed_point=FixedPoint(64, 20, 3.0), largest_weight=50, privacy=privacy)
    long = np.full((50, 300), 100.0)
    rows = [
        terms.prepare_examples(asked, long) if privacy.unit == "example" else terms.prepare(asked, long[0], 1)
        for _ in range(5)
    ]
    got = terms.total(asked, summed(rows, terms.fixed_point), 5)
    count = 50 / 4 if privacy.unit == "example" else 1
    deviation = 1.5 * (5 / 4) ** 0.5 / 5 / (4 if privacy.unit == "example" else 1)
    assert np.abs(got.values - count * 3 / 300**0.5).max() < 6 * deviation
    assert got.values.std() > deviation / 2
