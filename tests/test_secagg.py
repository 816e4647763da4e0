"""Secure sums as a whole: exact for every set of dropouts that leaves enough, and no sum for any other."""

import copy
import hashlib
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from baffle.errors import AggregationError, ConfigError, SecurityError
from baffle.secagg.messages import commitment_to, deposit_context
from baffle.secagg.primitives import Identity, KeyPair, derive
from baffle.secagg.server import ServerRound
from baffle.secagg.session import Policy, Roster, Settings
from baffle.secagg.sharing import reconstruct
from tests.attacks.secagg_world import PLAN, STAGES, Liar, World, draw, names_of, total
from tests.vectors import make_secagg_vectors as frozen

POLICY = Policy(least=2, corrupt=0.0)
NAMES = names_of(9)
IDENTITIES = {name: Identity.generate() for name in NAMES}


def protects(settings, count):
    try:
        return POLICY.check(settings, count, count) >= POLICY.least
    except SecurityError:
        return False


# (settings, count): everything that the policy lets through, up to nine clients.
FULL = [
    (Settings(n - 1, t, consistency, 2, 3), n)
    for n, consistency in itertools.product(range(3, 9), (False, True))
    for t in range(2, n)
    if protects(Settings(n - 1, t, consistency, 2, 3), n)
]
DRAWN = [
    (Settings(k, t, True, 2, 3), n)
    for n in (7, 8, 9)
    for k in (3, 4, 5)
    for t in range(2, k + 1)
    if protects(Settings(k, t, True, 2, 3), n)
]


def test_both_kinds_of_graph_and_of_session_are_among_the_worlds():
    assert {s.consistency for s, _ in FULL} == {False, True}
    assert len(FULL) > 15
    assert len(DRAWN) > 15
    assert all(not s.full(n) for s, n in DRAWN)


# -- who can be summed: a second opinion -------------------------------------------------------------


def outcome(world, deposited, drops):
    """Names in the sum, or None where there can be none; by sets of names and nothing else.

    ``deposited``: whose deposits are there before the stage ``share``, which the others may still make.
    """
    server, s = world.server, world.settings
    holders = {server.names[i]: {server.names[j] for j in row} for i, row in enumerate(server.holders)}
    partners = {server.names[i]: {server.names[j] for j in row} for i, row in enumerate(server.partners)}
    gone = [set(drops.get(stage, ())) for stage in STAGES]
    here = {n for n in server.names if holders[n] and (n in deposited or n not in gone[0])}
    while any(len(holders[n] & here) < s.threshold for n in here):
        here = {n for n in here if len(holders[n] & here) >= s.threshold}
    if len(here) < s.least:
        return None
    alive = here - gone[0] - gone[1]
    if len(alive) < s.least:
        return None
    openers = alive - gone[2] - gone[3]
    if s.consistency:
        quorum = server.policy.quorum(s, world.count, len(server.names))
        said = alive - gone[2]
        vouched = {n for n in alive if len(holders[n] & said) >= quorum}
        if len(vouched) < s.least:
            return None
        openers &= vouched
    elif len(alive) < s.threshold:
        return None
    due = alive | {n for n in here - alive if partners[n] & alive}
    return alive if all(len(holders[n] & openers) >= s.threshold for n in due) else None


drop_stage = st.sampled_from([None] * 24 + list(STAGES))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_sum_is_that_of_the_survivors_or_there_is_none(data):
    with frozen.without_chance("holders"):  # so that an example is the same again
        check_sums(data)


def check_sums(data):
    settings_, count = data.draw(st.sampled_from(FULL) | st.sampled_from(DRAWN))
    dtype = data.draw(st.sampled_from([np.uint32, np.uint64]))
    world = World(settings_, count, POLICY, dtype=dtype, identities={n: IDENTITIES[n] for n in NAMES[:count]})
    absent = data.draw(st.sets(st.sampled_from(world.names), max_size=1))
    late = data.draw(st.sets(st.sampled_from(world.names), max_size=1))
    world.drop({"advertise": absent, "choose": late})
    shuffle = random.Random(data.draw(st.integers(0, 99)))
    world.order = lambda answers: shuffle.sample(answers, len(answers))
    here = count - len(absent)
    chosen = here if settings_.full(here) else count - len(absent | late)
    if not protects(settings_, here) or not protects(settings_, chosen):
        with pytest.raises(AggregationError, match="advertised keys, too few"):
            world.agree()
        return
    world.agree()
    rng, deposited = np.random.default_rng(0), set()
    for number in range(data.draw(st.integers(1, 3))):
        drops = {stage: set() for stage in STAGES}
        for name in world.names:
            stage = data.draw(drop_stage)
            if stage:
                drops[stage].add(name)
        vectors = draw(rng, world.names, 3, dtype)
        expected = outcome(world, deposited, drops)
        world.drop(drops)
        world.refused = {}
        if expected is None:
            event("no sum")
            with pytest.raises(AggregationError, match=f"round {number}: "):
                world.round(number, vectors)
        else:
            event("a sum")
            found, survivors = world.round(number, vectors)
            assert set(survivors) == expected
            assert found.dtype == dtype
            assert np.array_equal(found, total(vectors, survivors))
        assert not {stage for stage, _ in world.refused} - {"unmask"}
        last = number == settings_.rounds - 1
        deposited = set() if last else {world.server.names[i] for i in world.server.deposits}


@pytest.mark.parametrize(("settings_", "count"), [FULL[0], FULL[-1], DRAWN[0], DRAWN[-1]])
def test_nobody_drops_and_every_round_of_a_session_sums(settings_, count):
    world = World(settings_, count, POLICY)
    world.agree()
    rng = np.random.default_rng(1)
    for number in range(settings_.rounds):
        vectors = draw(rng, world.names, 5, np.uint64)
        found, survivors = world.round(number, vectors)
        assert survivors == world.names
        assert np.array_equal(found, total(vectors, world.names))
    assert {stage for number, stage, *_ in world.log if number > 0} <= {"answer", "confirm", "unmask"}
    assert not world.server.serves(settings_.rounds, world.names)
    with pytest.raises(AggregationError, match="round 3: 0 clients can take part"):
        world.round(settings_.rounds, vectors)
    assert "round 3 lies outside this session" in str(world.refused["share", "c000"])


def test_a_client_that_was_away_comes_back_with_a_deposit_of_its_own():
    world = World(Settings(4, 3, True, 2, 3), 5)
    world.agree()
    rng = np.random.default_rng(2)
    world.drop({"answer": ["c003"]})
    vectors = draw(rng, world.names, 4, np.uint32)
    vectors = {name: v.astype(np.uint64) for name, v in vectors.items()}
    assert world.round(0, vectors)[1] == ["c000", "c001", "c002", "c004"]
    world.drop({})
    found, survivors = world.round(1, vectors)
    assert survivors == world.names
    assert np.array_equal(found, total(vectors, world.names))
    asked = [name for number, stage, way, name, _ in world.log if (number, stage, way) == (1, "share", "up")]
    assert asked == ["c003"]


def test_the_order_of_arrival_changes_no_byte():
    world = World(Settings(5, 4, True, 2, 2), 6)
    world.agree()
    vectors = draw(np.random.default_rng(3), world.names, 4, np.uint64)
    twin = copy.deepcopy(world.server)
    world.drop({"answer": ["c002"]})
    found, _ = world.round(0, vectors)
    answers = {(stage, name): data for _, stage, way, name, data in world.log if way == "up"}
    requests = {(stage, name): data for _, stage, way, name, data in world.log if way == "down"}
    round_ = ServerRound(twin, 0, world.names[::-1], PLAN, 64)
    for stage, asked in round_.stages():
        for name in sorted(asked, reverse=True):
            assert asked[name] == requests[stage, name]
            if (stage, name) != ("answer", "c002"):
                round_.add(name, answers[stage, name])
    assert np.array_equal(round_.close()[0], found)


# -- the boundary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("colluding", range(6))
def test_below_the_threshold_colluders_learn_nothing_and_at_it_everything(colluding):
    """``threshold`` of the holders and the server together open a client; one fewer open nothing."""
    threshold = 4
    world = World(Settings(5, threshold, False, 2, 1), 6)
    liar = Liar(world, tuple(range(1, 1 + colluding)))
    vectors = draw(np.random.default_rng(4), range(6), 4, np.uint64)
    for i in liar.honest:
        liar.answer(i, range(6), vectors[i])
    if colluding >= threshold:
        places = [group for group, _ in liar.opened()]
        assert [0] in places
        for group, found in liar.opened():
            assert np.array_equal(found, total(vectors, group))
    else:
        assert liar.opened() == []
        assert liar.secret(0, 0) is liar.secret(1, 0) is None
        assert len(liar.shares(0, 0)) == len(liar.shares(1, 0)) == colluding


def test_one_share_short_every_secret_is_as_likely_and_so_is_every_vector():
    """t − 1 shares and any 32 bytes as the last one give a seed: each leads to another vector, all alike."""
    world = World(Settings(4, 3, True, 2, 1), 5)
    liar = Liar(world, (1, 2))
    vector = np.zeros(4, np.uint64)
    liar.answer(0, range(5), vector)
    held = {h: np.frombuffer(share, np.uint8) for h, share in liar.shares(0, 0).items()}
    points = [liar.s.holders[0].index(h) + 1 for h in held] + [4]
    rng, seeds, first = np.random.default_rng(5), set(), []
    for _ in range(2000):
        guess = rng.integers(0, 256, 32, dtype=np.uint8)
        seed = reconstruct(points, np.stack([*held.values(), guess]))
        seeds.add(seed)
        first.append(seed[0])
        assert commitment_to(deposit_context(liar.s.id, 0, 0), seed) != liar.blinded[0].commitment
    assert len(seeds) == 2000
    counts = np.bincount(first, minlength=256)
    assert ((counts - 2000 / 256) ** 2).sum() / (
        2000 / 256
    ) < 400  # χ² with 255 degrees: above 1e-7 of chance
    liar.words[0][0][4] = derive(liar.key(4, "unblinding", 0), liar.contexts[0])
    true = np.frombuffer(liar.shares(0, 0)[4], np.uint8)
    seed = reconstruct(points, np.stack([*held.values(), true]))
    assert commitment_to(deposit_context(liar.s.id, 0, 0), seed) == liar.blinded[0].commitment


# -- what is refused before anything is made ---------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: Settings(4, 1), "threshold 1 of 4"),
        (lambda: Settings(4, 5), "threshold 5 of 4"),
        (lambda: Settings(4, 3, least=1), "hides nobody"),
        (lambda: Settings(4, 3, rounds=0), "0 rounds"),
        (lambda: Policy(least=1), "policy of least 1"),
        (lambda: Policy(corrupt=1.0), "corrupt 1.0"),
        (lambda: Roster({"a": bytes(32)}), "roster of 1"),
        (lambda: Roster({"a": bytes(32), "b": bytes(32)}), "one public key"),
        (lambda: Roster({"a": bytes(31), "b": bytes(32)}), "not 31"),
    ],
)
def test_settings_that_cannot_be(build, what):
    with pytest.raises(ConfigError, match=what):
        build()


def test_names_and_keys_are_those_of_the_roster():
    world = World(Settings(3, 3), 4)
    next(world.server.stages())
    with pytest.raises(SecurityError, match="client mallory is not on the roster"):
        world.server.add("mallory", b"")
    world.identities["c001"] = Identity.generate()
    with pytest.raises(SecurityError, match="client c001: the roster pins another key"):
        world.client("c001")


# -- frozen -----------------------------------------------------------------------------------------


def test_the_frozen_vectors():
    stored = json.loads(frozen.FILE.read_text())
    found = frozen.vectors()
    for key, value in stored.items():
        assert found[key] == value, key
    assert found.keys() == stored.keys()


def test_the_frozen_sums_are_right():
    stored = json.loads(frozen.FILE.read_text())
    for label, (_, _, dtype, rounds, _) in frozen.TRANSCRIPTS.items():
        size = np.dtype(dtype).itemsize
        for number in range(rounds):
            entry = stored[label]["rounds"][number]
            rows = [
                np.frombuffer(hashlib.shake_256(f"{name} {number}".encode()).digest(7 * size), dtype).tolist()
                for name in entry["names"]
            ]
            assert [int(v) for v in entry["sum"]] == [
                sum(column) % 2 ** (8 * size) for column in zip(*rows, strict=True)
            ]


def test_the_generator_uses_no_other_chance():
    """Two transcripts from one tape are the same bytes: keys, choices and shares all draw from it."""
    label = "drawn, two rounds, two dropouts"
    first, second = (frozen.transcript(label)[0].log for _ in range(2))
    assert first == second
    with frozen.without_chance("x") as tape:
        assert KeyPair.generate().to_bytes() == frozen.Tape("x")(32)
        assert tape.calls == 1
