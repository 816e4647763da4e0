"""Secure sums as a whole: exact for every set of dropouts that leaves enough, and no sum for any other."""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import random
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from baffle.errors import AggregationError, ConfigError, SecurityError
from baffle.secagg import client as secagg_client
from baffle.secagg.client import _pad as pad
from baffle.secagg.client import _token as token
from baffle.secagg.messages import TOKEN_BYTES, commitment_to, deposit_context
from baffle.secagg.primitives import Identity, KeyPair, derive, seal
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
    liar.words[0][0][4] = pad(liar.client(4)._secrets.keys[0], 0, 4, liar.contexts[0])
    true = np.frombuffer(liar.shares(0, 0)[4], np.uint8)
    seed = reconstruct(points, np.stack([*held.values(), true]))
    assert commitment_to(deposit_context(liar.s.id, 0, 0), seed) == liar.blinded[0].commitment


# -- no key twice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings_", "count"), [FULL[-1], DRAWN[-1]])
def test_no_two_bundles_pads_or_tokens_have_one_key(settings_, count):
    """A pair has one key a round and every nonce is 0: so all depends on way and use."""
    sealed, made = {}, {"_pad": {}, "_token": {}}

    def counted_seal(key, nonce, plaintext, associated):
        assert (key, nonce) not in sealed or sealed[key, nonce] == (plaintext, associated)
        sealed[key, nonce] = plaintext, associated
        return seal(key, nonce, plaintext, associated)

    def counted(kind, true):
        def make(key, owner, holder, context):
            word = true(key, owner, holder, context)
            made[kind].setdefault((owner, holder, context), set()).add(word)
            return word

        return make

    with (
        mock.patch.object(secagg_client, "seal", counted_seal),
        mock.patch.object(secagg_client, "_pad", counted("_pad", pad)),
        mock.patch.object(secagg_client, "_token", counted("_token", token)),
    ):
        world = World(settings_, count, POLICY)
        world.agree()
        for number in range(settings_.rounds):
            vectors = draw(np.random.default_rng(number), world.names, 4, np.uint64)
            assert np.array_equal(world.round(number, vectors)[0], total(vectors, world.names))
    pairs = settings_.rounds * sum(map(len, world.server.holders))
    assert len(sealed) == pairs + settings_.rounds * count  # each bundle, and each client's roots
    assert {kind: len(found) for kind, found in made.items()} == {
        "_pad": pairs,
        "_token": pairs * settings_.consistency,
    }
    words = [word for found in made.values() for both in found.values() for word in both]
    assert len(words) == len(set(words)) == pairs * (1 + settings_.consistency)  # both sides make the same


# -- what a stolen device tells of the past ------------------------------------------------------------

WAYS = b" up", b" down"


def kept(thing, seen=None):
    """All bytes that an object holds, however deep, and whatever secret key it holds besides."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, bytes | bytearray):
        yield bytes(thing)
    elif isinstance(thing, np.ndarray):
        yield thing.tobytes()
    elif isinstance(thing, KeyPair | Identity):
        yield thing.to_bytes()
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from kept(key, seen)
            yield from kept(value, seen)
    elif isinstance(thing, list | tuple | set | frozenset):
        for value in thing:
            yield from kept(value, seen)
    else:
        yield from kept(getattr(thing, "__dict__", {}), seen)
        yield from kept([getattr(thing, name, None) for name in getattr(thing, "__slots__", ())], seen)


def keys_from(state, adverts, session):
    """What may be the key of a round: by key agreement, and by two turns of a chain."""
    known = {data[at : at + 32] for data in state for at in range(0, len(data) - 31, 32)}
    for secret in {data for data in state if len(data) == 32}:
        for public in adverts:
            with contextlib.suppress(SecurityError):
                known.add(derive(KeyPair.from_bytes(secret).agree(public), b"chain", session))
    chains = known | {derive(key, b"next") for key in known}
    chains |= {derive(key, b"next") for key in chains}
    return chains | {derive(key, b"round") for key in chains}


def uses(context):
    """What a round's key of a pair is for."""
    yield (b"root",)
    for way in WAYS:
        yield (b"channel" + way,)
        yield (b"pad" + way, context)
        yield (b"alive" + way, context)


class Diary:
    """What no client may know once a round is over: client → round → secrets of it, as they were in use."""

    def __init__(self, world):
        self.world, self.secrets, self.contexts = world, {}, {}
        self.true = world.call
        world.call = self.call

    def call(self, stage, name, data, number=0, vector=None):
        client, drawn = self.world.clients[name], []

        def random_bytes(size):
            drawn.append(os.urandom(size))
            return drawn[-1]

        before = dict(client._session.chains) if client._session else {}
        with mock.patch("baffle.secagg.client.random_bytes", random_bytes):
            message = self.true(stage, name, data, number, vector)
        if stage == "share":
            self.note(name, client._secrets, before, drawn)
        elif stage == "answer":  # its own b, and ρ for the round to come
            self.secrets[name][number] |= {"b": [drawn[0]]}
            self.contexts[name, number] = client._answered.context
            if client._secrets is not None:
                self.note(name, client._secrets, before, drawn[1:])
        return message

    def note(self, name, secrets, chains, rho):
        found = {"keys": list(secrets.keys.values()), "chains": list(chains.values()), "rho": rho}
        self.secrets.setdefault(name, {})[secrets.round] = found

    def told(self, name, number):
        """How many secrets of a round the client's state gives, of each kind."""
        state, server = list(kept(self.world.clients[name])), self.world.server
        context = self.contexts.get((name, number), bytes(32))
        keys = keys_from(state, [advert[:32] for advert in server._adverts.values()], server.id)
        known = keys | {derive(key, *labels) for key in keys for labels in uses(context)}
        secrets, whole = dict(self.secrets[name][number]), b"".join(state)
        for labels in uses(context):
            label = labels[0].split()[0].decode()
            secrets[label] = secrets.get(label, []) + [derive(key, *labels) for key in secrets["keys"]]
        return {
            kind: sum(
                value in known or (value[:TOKEN_BYTES] if kind == "alive" else value) in whole
                for value in values
            )
            for kind, values in secrets.items()
        }


@pytest.mark.parametrize(
    ("settings_", "count", "lost"),
    [
        (Settings(5, 4, False, 2, 3), 6, None),
        (Settings(5, 4, False, 2, 3), 6, "answer"),
        (Settings(5, 4, True, 2, 3), 6, "request"),
        (Settings(5, 4, True, 2, 3), 9, "answer"),
    ],
    ids=["all with all", "answer lost", "consistency, request lost", "drawn, answer lost"],
)
def test_a_client_keeps_nothing_of_a_round_that_was_opened(settings_, count, lost):
    """Whoever steals it afterwards makes no key, root, pad, word or channel of that round from what it holds.

    Client 1 of ``lost`` took no part in round 0: the same holds for it after round 1.
    """
    world = World(settings_, count)
    world.agree()
    diary, rng = Diary(world), np.random.default_rng(0)
    for number in range(2):
        if number == 0 and lost == "answer":
            world.drop({"answer": ["c001"]})
        elif number == 0 and lost == "request":
            world.request = lambda stage, name, data: None if (stage, name) == ("answer", "c001") else data
        vectors = draw(rng, world.names, 4, np.uint64)
        found, survivors = world.round(number, vectors)
        assert np.array_equal(found, total(vectors, survivors))
        assert ("c001" in survivors) == (lost is None or number == 1)
        world.request = world.reply = lambda stage, name, data: data
        for name in world.names:
            for past in range(number + 1):
                told = diary.told(name, past)
                assert told.keys() >= {"keys", "chains", "rho", "root", "channel", "pad", "alive"}
                if past == number and name not in survivors:
                    assert told["keys"]  # it still waits for that round
                else:
                    assert not any(told.values()), (name, past, told)
            if name in survivors:  # what it holds is of the next round alone
                assert diary.told(name, number + 1)["keys"] == len(world.clients[name]._session.chains)


def test_what_a_client_holds_in_a_round_tells_all_of_it():
    """A control of the last test: between answer and opening, and from chains that were not turned."""
    world = World(Settings(5, 4, True, 2, 4), 6)
    world.agree()
    diary = Diary(world)
    world.drop({"confirm": world.names})
    with pytest.raises(AggregationError, match="nothing was opened"):
        world.round(0, draw(np.random.default_rng(0), world.names, 4, np.uint64))
    client = world.clients["c000"]
    told = diary.told("c000", 0)
    assert told.pop("keys") == told.pop("root") == 5
    assert told.pop("channel") == told.pop("pad") == told.pop("alive") == 10
    assert not any(told.values())  # neither chains nor the secrets that it shared
    client._answered = None
    assert not any(diary.told("c000", 0).values())
    client._session.chains = dict(enumerate(diary.secrets["c000"][1]["chains"]))
    assert diary.told("c000", 1)["root"] == 5
    agreed = client._session.chains[0]
    client._session.chains = {0: derive(agreed, b"next")}
    assert diary.told("c000", 1)["chains"] == 0


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
        (lambda: Policy(helpers=-1), "helpers -1"),
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
