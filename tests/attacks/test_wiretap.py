"""Whoever reads everything on the wire: masked vectors are uniform, and nothing else depends on the data.

The same random bytes in every run, so that a test of chance cannot fail by chance. What fair coins would give
less than once in a million times, over all tests together, is a failure.
"""

import numpy as np
import pytest
from scipy import stats

from baffle.secagg.messages import Blinded, Deposit
from baffle.secagg.primitives import TAG_BYTES
from baffle.secagg.session import Settings
from tests.attacks.secagg_world import World
from tests.vectors.make_secagg_vectors import without_chance

ROUNDS, LENGTH = 12, 2048
SESSIONS = {
    "all with all": (Settings(5, 4, False, 2, ROUNDS), 6),
    "consistency": (Settings(5, 4, True, 2, ROUNDS), 6),
    "drawn": (Settings(5, 4, True, 2, ROUNDS), 9),
}
ALLOWED = 1e-6 / (len(SESSIONS) * (2 + 3) * 6)  # tests of chance: two rings, three differences, six looks


def constant(value):
    return lambda name, number, dtype: np.full(LENGTH, value, dtype)


def slopes(name, number, dtype):
    """As real ones: small, of both signs, much alike from client to client."""
    rng = np.random.default_rng([number, int(name[1:])])
    return (rng.normal(size=LENGTH) * 1e4).astype(np.int64).astype(dtype)


def tapped(kind, data, dtype=np.uint64, label="wire"):
    """The world after its rounds: its log is what the wire carried."""
    settings, count = SESSIONS[kind]
    with without_chance(label):
        world = World(settings, count, dtype=dtype)
        world.agree()
        for number in range(ROUNDS):
            world.drop({"answer": [world.names[number % count]]})
            world.round(number, {name: data(name, number, dtype) for name in world.names})
    assert not world.refused
    return world


def masked(world):
    """(rounds, clients, LENGTH): the masked vectors, in the ring's type."""
    size = np.dtype(world.dtype).itemsize * LENGTH
    rows = {}
    for number, stage, way, name, data in world.log:
        if (stage, way) == ("answer", "up"):
            rows[number, name] = np.frombuffer(data[:size], world.dtype)
    return np.array([[rows[r, name] for name in world.names] for r in range(ROUNDS)])


def chance(counts):
    """The χ² test of equal counts: how often chance would be further off, on either side."""
    expected = counts.sum() / counts.size
    assert expected >= 4
    value = ((counts - expected) ** 2).sum() / expected
    above = stats.chi2.sf(value, counts.size - 1)
    return 2 * min(above, 1 - above)


def looks(values):
    """Chances of several looks at one heap of integers."""
    data = np.ascontiguousarray(values).tobytes()
    octets = np.frombuffer(data, np.uint8)
    bits = np.unpackbits(octets.reshape(-1, values.dtype.itemsize), axis=1).sum(axis=0)
    ones = 2 * stats.binom.sf(bits.sum(), octets.size * 8, 0.5)
    return {
        "bytes": chance(np.bincount(octets, minlength=256)),
        "nibbles": chance(np.bincount(np.concatenate((octets & 15, octets >> 4)), minlength=16)),
        "words of 16 bits": chance(np.bincount(np.frombuffer(data, "<u2"), minlength=65536)),
        "ones": min(ones, 2 - ones),
        "each bit": min(stats.binomtest(int(b), len(octets) // values.dtype.itemsize).pvalue for b in bits)
        * len(bits),
        "top bytes": chance(
            np.bincount((values.ravel() >> (8 * values.dtype.itemsize - 8)).astype(int), minlength=256)
        ),
    }


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("kind", SESSIONS)
def test_masked_vectors_are_uniform(kind, dtype):
    """Of the least uniform data: nothing but zeros."""
    values = masked(tapped(kind, constant(0), dtype))
    assert values.size == ROUNDS * SESSIONS[kind][1] * LENGTH
    for what, found in looks(values).items():
        assert found > ALLOWED, what


@pytest.mark.parametrize("kind", SESSIONS)
def test_two_rounds_of_the_same_data_differ_by_uniform_numbers(kind):
    """So do two clients of one round: no mask serves twice."""
    values = masked(tapped(kind, constant(7)))
    for what, found in looks(values[1:] - values[:-1]).items():
        assert found > ALLOWED, f"rounds: {what}"
    for what, found in looks(values[:, 1:] - values[:, :-1]).items():
        assert found > ALLOWED, f"clients: {what}"
    for what, found in looks(values[..., 1:] - values[..., :-1]).items():
        assert found > ALLOWED, f"entries: {what}"
    assert len(np.unique(values)) == values.size  # 2^64 is large


def test_the_looks_see_what_is_not_uniform():
    """A control: the data themselves, and masks with one bit that is always 0."""
    plain = np.stack([slopes("c001", number, np.uint64) for number in range(100)])
    assert min(looks(plain).values()) < 1e-30
    values = masked(tapped("consistency", constant(0)))
    assert min(looks(values & ~np.uint64(1 << 13)).values()) < 1e-30
    biased = values.copy()
    biased[..., ::50] = 0
    assert min(looks(biased).values()) < 1e-30


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("kind", SESSIONS)
def test_nothing_but_the_masked_vectors_depends_on_the_data(kind, dtype):
    """The same chance, other data: the same bytes, but for masked vectors and the codes over them."""
    worlds = [tapped(kind, data, dtype) for data in (constant(0), slopes)]
    size, differ = np.dtype(dtype).itemsize * LENGTH, 0
    logs = [world.log for world in worlds]
    assert len(logs[0]) == len(logs[1])
    for (number, stage, way, name, one), (*same, other) in zip(*logs, strict=True):
        assert [number, stage, way, name] == same
        assert len(one) == len(other)
        if (stage, way) == ("answer", "up"):
            assert one[:size] != other[:size]
            assert one[size:-TAG_BYTES] == other[size:-TAG_BYTES]
            differ += 1
        else:
            assert one == other, (number, stage, way, name)
    assert differ == ROUNDS * SESSIONS[kind][1]


def test_the_difference_of_two_runs_with_the_same_chance_is_that_of_the_data():
    """A control of the last test: masks are where they are said to be, and nowhere else."""
    one, other = (masked(tapped("drawn", data)) for data in (constant(0), slopes))
    for number in range(ROUNDS):
        for i in range(9):
            assert np.array_equal(other[number, i] - one[number, i], slopes(f"c{i:03d}", number, np.uint64))


@pytest.mark.parametrize("kind", SESSIONS)
def test_lengths_are_those_that_the_format_says(kind):
    """By the settings alone: K, holders and partners, and who takes part."""
    world = tapped(kind, slopes)
    s = world.server
    for number, stage, way, name, data in world.log:
        if (stage, way) == ("answer", "up"):
            place = s.place(name)
            holders, partners = len(s.holders[place]), len(s.partners[place])
            more = Deposit.size(holders, partners) if number < ROUNDS - 1 else 0
            assert len(data) == 8 * LENGTH + Blinded.size(holders) + more + TAG_BYTES
