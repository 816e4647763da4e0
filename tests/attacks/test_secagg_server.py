"""A server that lies to its clients. Each attack ends in a named error, and opens nothing it should not."""

import contextlib
import copy
import itertools
import random
import struct
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from baffle.errors import AggregationError, BaffleError, MessageError, SecurityError
from baffle.secagg.messages import (
    BUNDLE_BYTES,
    SHORT_TAG,
    Blinded,
    Offer,
    Reader,
    bits,
    deposit_context,
    share_tag,
    xor,
)
from baffle.secagg.parameters import hidden
from baffle.secagg.primitives import KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES, KeyPair, derive
from baffle.secagg.server import ServerSession
from baffle.secagg.session import Policy, Settings
from baffle.secagg.sharing import SECRET_BYTES
from baffle.secure import Protection
from tests.attacks.secagg_world import JOB, PLAN, TERMS, Liar, World, draw, split_views, total

SIX = Settings(5, 4, False, 2, 3)
SIGNED = Settings(5, 4, True, 2, 3)
DRAWN = Settings(5, 4, True, 2, 3)  # among nine
ADVERT = KEY_BYTES + SIGNATURE_BYTES


def policy(least=2, corrupt=0.0):
    return Policy(least=least, corrupt=corrupt)


def answered(world, colluders=(), participants=None, seed=0):
    """A liar whose clients have all answered, told the same."""
    liar = Liar(world, colluders)
    count = len(liar.s.names)
    vectors = draw(np.random.default_rng(seed), range(count), 3, np.uint64)
    for i in liar.honest:
        liar.answer(i, range(count) if participants is None else participants[i], vectors[i])
    return liar, vectors


def check_opened(liar, vectors, least):
    """What the liar opens are true sums, and none over fewer honest clients than ``least``."""
    opened = liar.opened()
    for group, found in opened:
        assert np.array_equal(found, total(vectors, group))
    assert all(len(group) >= least for group, _ in opened), opened
    return [len(group) for group, _ in opened]


# -- both secrets of one client ----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [SIX, SIGNED])
def test_no_client_opens_a_round_twice(settings):
    liar, _ = answered(World(settings, 6))
    heard = {i: set() for i in range(6)}
    tokens = liar.said(heard) if settings.consistency else dict.fromkeys(range(6))
    for i in range(6):
        liar.unmask(i, set(), tokens[i])
        for dead in ({(i + 1) % 6}, set()):
            with pytest.raises(SecurityError, match="there is no round to open"):
                liar.unmask(i, dead, tokens[i])
    assert all(liar.secret(1, i) is None for i in range(6))
    assert all(len(liar.words[1].get(i, {})) == 0 for i in range(6))


def test_who_vouched_for_a_client_does_not_open_its_pairwise_masks():
    liar, _ = answered(World(SIGNED, 6))
    tokens = liar.said({i: set() for i in range(6)})
    for i in range(6):
        with pytest.raises(SecurityError, match="others are said to be alive than those that it vouched for"):
            liar.unmask(i, {(i + 1) % 6}, tokens[i])
        with pytest.raises(SecurityError, match="asked who is alive twice"):
            liar.confirm(i, {(i + 1) % 6})
    assert liar.opened() == []
    assert not any(liar.words[1].values())


def test_unmask_before_confirm_opens_nothing():
    liar, _ = answered(World(SIGNED, 6))
    for i in range(6):
        with pytest.raises(SecurityError, match="others are said to be alive"):
            liar.unmask(i, set(), {})
    assert not any(liar.words[0].values())


def test_a_session_without_confirm_knows_no_confirm():
    liar, _ = answered(World(SIX, 6))
    with pytest.raises(SecurityError, match="in a session without that stage"):
        liar.confirm(0, set())


def test_nothing_is_opened_for_a_client_that_has_not_answered():
    liar = Liar(World(SIX, 6))
    for stage in ("confirm", "unmask"):
        with pytest.raises(SecurityError, match="there is no round to open"):
            getattr(liar.client(0), stage)(b"\x1f")


# -- split views -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [8, 11, 14, 20, 30])
def test_the_best_split_of_survivors_opens_as_many_as_were_promised(clients):
    """Without consistency, survivors are what a server can lie about: its best lie meets the bound."""
    protection = Protection()
    settings = protection.settings(clients)
    assert not settings.consistency
    colluding = int(protection.corrupt * clients)
    honest = clients - colluding
    world = World(settings, clients, protection.policy)
    liar, vectors = answered(world, tuple(range(honest, clients)))
    views = split_views(honest, settings.threshold - colluding)
    for i, dead in enumerate(views):
        liar.unmask(i, dead)
    gone = len(set().union(*views))
    promised = liar.client(0).hides
    sizes = check_opened(liar, vectors, promised)
    assert sizes == [honest - gone]
    assert sizes[0] <= promised + 1  # so the bound is no idle one


@pytest.mark.parametrize("clients", [8, 11, 14, 20, 30])
def test_participants_told_apart_open_nothing_more(clients):
    """All that partner a target are said to be dead to everyone else, and the others are no participants.

    So each mask on its answer would be opened; but what opens its self-mask serves in its own context alone.
    """
    protection = Protection()
    settings = protection.settings(clients)
    colluding = int(protection.corrupt * clients)
    honest, left = clients - colluding, settings.threshold - colluding
    colluders = tuple(range(honest, clients))
    for size in (1, 2):
        target, partners = list(range(size)), list(range(size, left + 1))
        lists = [
            {*target, *partners, *colluders} if i in target else set(range(clients)) for i in range(honest)
        ]
        world = World(settings, clients, protection.policy)
        liar, vectors = answered(world, colluders, lists)
        room = {i: 1 if i in target else honest - left for i in range(honest)}
        dead = {i: set() for i in range(honest)}
        for i, j in itertools.product(range(honest - 1, -1, -1), partners):
            if i != j and len(dead[i]) < room[i] and sum(j in d for d in dead.values()) < left:
                dead[i].add(j)
        for i in range(honest):
            liar.unmask(i, dead[i])
        check_opened(liar, vectors, liar.client(0).hides)
        assert all(liar.secret(0, i) is None for i in target)  # others' pads do not fit, and they are too few


@pytest.mark.parametrize(
    ("settings", "count", "colluding"),
    [(SIX, 6, 0), (SIGNED, 6, 0), (Settings(6, 5, False, 2, 1), 7, 1), (Settings(7, 5, True, 2, 1), 8, 1)],
)
def test_no_split_of_views_that_clients_accept_opens_one_of_them(settings, count, colluding):
    """Random lists of participants, survivors and vouchers, each client its own."""
    rng, opened_at_all = random.Random(count + settings.consistency), 0
    identities = None
    for trial in range(40):
        world = World(settings, count, policy(2, colluding / count + 1e-6), identities=identities)
        identities = world.identities
        liar = Liar(world, tuple(range(count - colluding, count)))
        promised = liar.client(0).hides
        assert promised >= 2
        everybody, vectors = set(range(count)), draw(np.random.default_rng(trial), range(count), 2, np.uint64)
        most = rng.choice([everybody, everybody, everybody - {rng.randrange(count)}])
        strays = rng.sample(range(count), rng.choice([0, 0, 1, 2]))  # who is told of other participants
        for i in liar.honest:
            with contextlib.suppress(SecurityError):
                told = (everybody - {rng.randrange(count)} if i in strays else most) | {i}
                liar.answer(i, told, vectors[i])
        gone = set(rng.sample(range(count), rng.choice([0, 1, 1, 2, 3])))
        heard = {i: {j for j in gone - {i} if rng.random() < 0.8} for i in liar.masked}
        tokens = liar.said(heard) if settings.consistency else dict.fromkeys(liar.masked)
        for i in rng.sample(sorted(liar.masked), len(liar.masked)):
            with contextlib.suppress(SecurityError):
                liar.unmask(i, heard[i], tokens.get(i, {}))
        opened_at_all += bool(check_opened(liar, vectors, promised))
        for i in liar.honest:
            assert liar.secret(0, i) is None or liar.secret(1, i) is None
    assert opened_at_all > 5  # the attempts are not all hopeless


@pytest.mark.parametrize("tell", ["all partners dead", "own list each", "contradictions"])
def test_lists_that_aim_at_one_client_open_nothing_less_than_was_promised(tell):
    """Ten of default protection, one colluding; the target is client 0."""
    protection = Protection(corrupt=0.1, dropout=0.2)
    settings = protection.settings(10)
    world = World(settings, 10, protection.policy)
    liar, vectors = answered(world, (9,))
    refused = []
    for i in range(9):
        others = set(range(1, 9)) - {i}
        dead = {
            "all partners dead": others,
            "own list each": others - {(i + 1) % 9} if i else others,
            "contradictions": {j for j in others if (i + j) % 2} | ({0} if i % 2 else set()),
        }[tell]
        with contextlib.suppress(SecurityError):
            liar.unmask(i, dead)
            continue
        refused.append(i)
    assert len(refused) >= 4
    assert check_opened(liar, vectors, liar.client(0).hides) == []


def test_with_consistency_nobody_opens_who_is_not_vouched_for_in_its_own_context():
    """Two halves are told of different participants: pads and tokens of one serve nobody in the other."""
    settings = Settings(7, 6, True, 2, 1)
    lists = [set(range(7)) if i < 4 else set(range(8)) for i in range(8)]
    liar, vectors = answered(World(settings, 8), (), lists)
    tokens = liar.said({i: set() for i in range(8)})
    for i in range(8):
        liar.unmask(i, set(), tokens[i])
    assert check_opened(liar, vectors, liar.client(0).hides) == []
    assert all(liar.secret(0, i) is None for i in range(8))


def test_a_token_of_another_round_client_or_holder_is_none():
    world = World(SIGNED, 6)
    liar, _ = answered(world)
    tokens = liar.said({i: set() for i in range(6)})
    needed = 5 - 4 + 1
    for false in (
        {h: tokens[1][h] for h in tokens[0] if h in tokens[1]},  # another client's
        dict(zip(tokens[0], reversed(tokens[0].values()), strict=True)),  # other holders'
        {h: bytes(16) for h in tokens[0]},
        dict(itertools.islice(tokens[0].items(), needed - 1)),  # too few
        {},
    ):
        with pytest.raises(
            SecurityError, match=rf"\d of its holders said that it is alive: {needed} are needed"
        ):
            liar.unmask(0, set(), false)
    assert not any(liar.words[0].values())
    liar.unmask(0, set(), dict(itertools.islice(tokens[0].items(), needed)))  # the round is not lost by that


@pytest.mark.parametrize("colluding", [0, 1])
def test_drawn_holders_and_split_views_open_nothing_below_what_was_promised(colluding):
    rng, identities, opened_at_all = random.Random(3), None, 0
    for trial in range(30):
        world = World(DRAWN, 9, policy(2, colluding / 9 + 1e-6), identities=identities)
        identities = world.identities
        liar = Liar(world, tuple(range(9 - colluding, 9)))
        vectors = draw(np.random.default_rng(trial), range(9), 2, np.uint64)
        strays = rng.sample(range(9), rng.choice([0, 0, 1, 3]))
        for i in liar.honest:
            with contextlib.suppress(SecurityError):
                liar.answer(
                    i, set(range(9)) - ({rng.randrange(9)} - {i} if i in strays else set()), vectors[i]
                )
        dead = set(rng.sample(range(9), rng.choice([0, 1, 2, 3])))
        heard = {i: {j for j in dead - {i} if rng.random() < 0.9} for i in liar.masked}
        tokens = liar.said(heard)
        for i in liar.masked:
            with contextlib.suppress(SecurityError):
                liar.unmask(i, heard[i], tokens.get(i, {}))
        opened_at_all += bool(check_opened(liar, vectors, liar.client(0).hides))
    assert opened_at_all > 3


# -- keys --------------------------------------------------------------------------------------------


class Introduction:
    """What the stage ``share`` brings the first time, taken apart so that it can be changed."""

    def __init__(self, world, place):
        s = world.server
        self.s, self.place, self.data = s, place, s.share_request(place, 0)
        self.head = 8 + len(s.present)

    def with_adverts(self, change):
        count = len(self.s.names) if self.s._full else self.s.settings.degree
        end = self.head + ADVERT * count
        adverts = [self.data[i : i + ADVERT] for i in range(self.head, end, ADVERT)]
        return self.data[: self.head] + b"".join(change(adverts)) + self.data[end:]


def swapped(adverts):
    return [adverts[1], adverts[0], *adverts[2:]]


def reflected(adverts, own):
    return [own, *adverts[1:]]


def agreed(settings=SIX, count=6):
    world = World(settings, count)
    world.agree()
    return world


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (swapped, "client c00[01] did not sign this key for this session"),
        (
            lambda a: [KeyPair.generate().public + a[0][KEY_BYTES:], *a[1:]],
            "client c000 did not sign this key",
        ),
        (lambda a: [a[0][:-1] + bytes([a[0][-1] ^ 1]), *a[1:]], "client c000 did not sign this key"),
        (lambda a: [a[1], *a[1:]], "client c000 did not sign this key"),
        (lambda a: [a[2], *a[1:]], "client c000 did not sign this key"),
        (lambda a: [bytes(ADVERT), *a[1:]], "client c000 did not sign this key"),
        (lambda a: a[1:], "message cut short"),
        (
            lambda a: [*a[:2], KeyPair.generate().public + a[2][KEY_BYTES:], *a[3:]],
            "another key for this client",
        ),
        (lambda a: [*a, a[0]], "bytes too many"),
    ],
    ids=[
        "swapped",
        "forged",
        "changed",
        "duplicated",
        "reflected",
        "zeros",
        "missing",
        "own key",
        "one more",
    ],
)
def test_keys_that_others_did_not_sign(change, what):
    world = agreed()
    client = world.clients["c002"]
    request = Introduction(world, 2).with_adverts(change)
    with pytest.raises((SecurityError, MessageError), match=what):
        client.share(request)
    assert client._session is None
    client.share(world.server.share_request(2, 0))  # and the true ones are taken after that


def test_a_key_of_an_earlier_session_is_no_key_of_this_one():
    world = agreed()
    old = list(world.server._advert)
    world.server = world.session(first_round=1)
    world.agree()
    request = Introduction(world, 2).with_adverts(lambda a: [old[0], *a[1:]])
    with pytest.raises(SecurityError, match="client c000 did not sign this key for this session"):
        world.clients["c002"].share(request)


def test_an_advert_of_the_same_offer_given_twice_leads_nowhere():
    """The same offer, made twice: some get one key of client 0, some the other. Nothing of it opens."""
    world = agreed()
    first = world.server._advert[0]
    second = world.clients["c000"].advertise(world.server._offer, TERMS)
    assert first != second
    s = world.server
    deposits = {}
    for place in range(1, 6):
        request = Introduction(world, place).with_adverts(
            lambda a, p=place: [first if p < 3 else second, *a[1:]]
        )
        deposits[place] = world.clients[s.names[place]].share(request)
    clients = {i: world.clients[s.names[i]] for i in range(1, 6)}
    assert len({client._session.id for client in clients.values()}) == 2
    halves = {i: {1, 2} if i < 3 else {3, 4, 5} for i in clients}
    about = {i: deposit_context(client._session.id, 0, i) for i, client in clients.items()}
    flags, vectors = np.arange(6) > 0, draw(np.random.default_rng(0), range(6), 2, np.uint64)
    blinded, opened = {}, {i: [] for i in clients}
    for i, client in clients.items():
        owners = [o for o in range(6) if o not in (0, i)]
        bundles = [deposit_bundle(deposits[o], i if i < o else i - 1) for o in owners]
        request = struct.pack("<Q", 0) + bits(flags) + b"".join(bundles)
        message = client.answer(request, 0, PLAN, lambda i=i: vectors[i])
        blinded[i] = Blinded.read(Reader(message, 16), 5)
        given = {o for o, share in client._answered.shares.items() if share is not None}
        assert given == halves[i] - {i}  # bundles of the other half do not open
    for i, client in clients.items():
        owners = [o for o in range(6) if o not in (0, i)]
        r = Reader(client.unmask(b"\x0f")[:-TAG_BYTES])
        assert r.flags(4).all()
        for o, word in zip(owners, r.blocks(4, SECRET_BYTES), strict=True):
            at = i if i < o else i - 1
            share = xor(word, blinded[o].shares[at * SECRET_BYTES : (at + 1) * SECRET_BYTES])
            tag = blinded[o].tags[at * SHORT_TAG : (at + 1) * SHORT_TAG]
            if share_tag(about[o], i, 0, share) == tag:
                opened[o].append(i)
    # Nor do the pads of one half serve the other: of four shares of a self-mask there are one or two.
    assert opened == {i: sorted(halves[i] - {i}) for i in clients}


def deposit_bundle(message, position, holders=5):
    """The bundle for the holder at ``position`` in a deposit of a full session."""
    end = len(message) - 16
    start = end - BUNDLE_BYTES * (holders - position)
    return message[start : start + BUNDLE_BYTES]


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)])
def test_a_key_of_small_order_from_the_server(key):
    """As the server's own one-time key, on which the codes of messages hang: the session does not come."""
    world, flags = World(SIX, 6), np.ones(6, bool)
    offer = Offer(JOB, 0, SIX, key, world.roster.digest, flags).encode()
    adverts = b"".join(world.clients[name].advertise(offer, TERMS) for name in world.names)
    with pytest.raises(SecurityError, match="small order"):
        world.clients["c000"].share(struct.pack("<Q", 0) + bits(flags) + adverts)


def drawn_world():
    world = agreed(DRAWN, 9)
    return world, world.clients["c000"]


def test_drawn_neighbours_that_are_not_in_order_twice_or_the_client_itself():
    world, client = drawn_world()
    request = world.server.share_request(0, 0)
    start = 8 + len(world.server.present) + 5 * ADVERT
    true, key = request[:start], KeyPair.generate().public

    def neighbours(*places):
        return struct.pack("<H", len(places)) + b"".join(struct.pack("<H", p) + key for p in places)

    chosen = client._opening.choice
    free = [p for p in range(1, 9) if p not in chosen]
    for places, what in [
        ((0,), "not in order"),
        ((free[1], free[0]), "not in order"),
        ((free[0], free[0]), "not in order"),
        ((9,), "not in order"),
        ((65535,), "not in order"),
        ((chosen[0],), f"two keys for client {chosen[0]} of one session"),
    ]:
        with pytest.raises(SecurityError, match=what):
            client.share(true + neighbours(*places))
    own = struct.pack("<HH", 1, free[0]) + client._opening.key.public
    with pytest.raises(SecurityError, match="its own key came back as another client's"):
        client.share(true + own)
    with pytest.raises(MessageError, match="cut short"):
        client.share(true + struct.pack("<H", 3))
    client.share(request)


def test_a_made_up_neighbour_takes_nothing_off_an_answer():
    """Who chose a client is the server's word. It may add clients that it plays itself: nothing comes off."""
    world, client = drawn_world()
    start = 8 + len(world.server.present) + 5 * ADVERT
    free = [p for p in range(1, 9) if p not in client._opening.choice]
    pairs = {p: KeyPair.generate() for p in free}
    made_up = struct.pack("<H", len(free)) + b"".join(struct.pack("<H", p) + pairs[p].public for p in free)
    client.share(world.server.share_request(0, 0)[:start] + made_up)
    session = client._session
    assert session.owners == free
    assert set(session.holders) <= set(session.chains)
    # Its own holders' keys are signed: with each of them it masks, and only they have its shares.
    assert not set(session.holders) & set(free)


def test_asked_to_choose_twice_or_where_all_hold_all():
    world, client = drawn_world()
    with pytest.raises(SecurityError, match="asked to choose twice"):
        client.choose(world.server.present)
    full = World(SIX, 6)
    for one in full.clients.values():
        one.advertise(full.server._offer, TERMS)
    with pytest.raises(SecurityError, match="nothing to choose where everybody holds"):
        full.clients["c000"].choose(b"\x3f")


def test_shares_before_holders_were_chosen():
    world = World(DRAWN, 9)
    client = world.clients["c000"]
    client.advertise(world.server._offer, TERMS)
    with pytest.raises(SecurityError, match="not asked to choose its holders"):
        client.share(struct.pack("<Q", 0) + bits(np.ones(9, bool)) + bytes(5 * ADVERT) + b"\0\0")


def test_another_list_of_those_present_after_holders_were_chosen():
    world, client = drawn_world()
    flags = np.ones(9, bool)
    flags[8] = False
    request = world.server.share_request(0, 0)
    with pytest.raises(SecurityError, match="the list of those present has changed"):
        client.share(request[:8] + bits(flags) + request[8 + len(bits(flags)) :])


def test_the_keys_of_a_session_that_stands_do_not_change():
    world = agreed()
    client, request = world.clients["c000"], world.server.share_request(0, 0)
    deposit = client.share(request)
    assert client.share(request) == deposit  # should it be lost, the same bytes again
    with pytest.raises(SecurityError, match="have changed in a session that stands"):
        client.share(Introduction(world, 0).with_adverts(swapped))
    with pytest.raises(SecurityError, match="have changed"):
        client.share(request + b"\0")


# -- offers below the policy --------------------------------------------------------------------------


def offered(settings=SIX, count=6, policy_=None, members=None, roster=None, job=JOB):
    """What client 0 says to an offer that no truthful server makes."""
    world = World(SIX, 6, policy_ or policy())
    flags = np.ones(6, bool) if members is None else np.isin(np.arange(6), members)
    offer = Offer(job, 0, settings, KeyPair.generate().public, roster or world.roster.digest, flags)
    return world.clients["c000"].advertise(offer.encode(), TERMS)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"members": [0]}, "1 clients: a sum needs at least 3"),
        ({"members": [0, 1], "settings": Settings(2, 2, False, 2)}, "2 clients: a sum needs at least 3"),
        ({"members": [1, 2, 3, 4, 5]}, "no member of the session"),
        ({"members": [0, 1, 2, 3], "settings": Settings(3, 3, True, 5)}, "4 clients: a sum needs at least 5"),
        ({"settings": Settings(5, 2)}, "0 honest clients are sure"),
        ({"settings": Settings(5, 3)}, "0 honest clients are sure"),
        ({"policy_": policy(5)}, "policy asks for 5"),
        ({"policy_": policy(3, 0.5), "settings": SIX}, "policy asks for 3"),
        ({"settings": Settings(3, 3, False, 2)}, "threshold 3 of 3 holders without consistency"),
        ({"settings": Settings(3, 2, False, 2)}, "without consistency"),
        ({"settings": Settings(9, 7, True)}, "too few for 7 shares"),
        ({"roster": bytes(32)}, "the server has another roster"),
    ],
)
def test_an_offer_that_protects_less_than_the_policy(options, what):
    with pytest.raises(SecurityError, match=what):
        offered(**options)


def test_too_many_holders_and_a_threshold_of_one_are_no_offer():
    offer = bytearray(World(SIX, 6).server._offer)
    client = World(SIX, 6).clients["c000"]
    at = 3 * KEY_BYTES
    for form, offset, value, error, what in [
        ("<B", 0, 9, MessageError, "version 9"),
        ("<H", 11, 1, MessageError, "threshold 1"),
        ("<B", 13, 2, MessageError, "canonical"),
        ("<I", 14, 1, MessageError, "hides nobody"),
        ("<I", 18, 0, MessageError, "0 rounds"),
    ]:
        changed = bytearray(offer)
        struct.pack_into(form, changed, at + offset, value)
        with pytest.raises(error, match=what):
            client.advertise(bytes(changed), TERMS)


def test_absent_clients_do_not_push_a_session_below_the_policy():
    world = World(Settings(5, 5, True, 2), 6, policy(6))
    s = world.server
    adverts = [world.clients[n].advertise(s._offer, TERMS) for n in world.names]
    flags = np.ones(6, bool)
    flags[5] = False
    with pytest.raises(SecurityError, match="too few for 5 shares"):
        world.clients["c000"].share(struct.pack("<Q", 0) + bits(flags) + b"".join(adverts[:5]))
    flags = np.arange(6) > 0
    with pytest.raises(SecurityError, match="absent from a session that it takes part in"):
        world.clients["c000"].share(struct.pack("<Q", 0) + bits(flags) + b"".join(adverts[1:]))


def test_a_server_refuses_to_make_an_offer_below_its_own_policy():
    world = World(SIX, 6)
    with pytest.raises(SecurityError, match="policy asks for 6"):
        ServerSession(
            world.roster,
            world.names,
            Settings(5, 4),
            policy(6, 0.2),
            job=JOB,
            first_round=0,
            binding=TERMS,
        )


@pytest.mark.parametrize("different", ["terms", "offer"])
def test_one_client_that_was_told_other_terms_of_a_session(different):
    """Its key is signed for another offer, so nobody takes it: not the server, and not the others."""
    world = World(SIX, 6)
    s = world.server
    stages = s.stages()
    _, requests = next(stages)
    other = Offer.decode(s._offer, 6)
    changed = Offer(JOB, 1, other.settings, other.key, other.roster, other.members).encode()
    for name in world.names:
        told = (requests[name], TERMS)
        if name == "c001":
            told = (requests[name], b"u" * 32) if different == "terms" else (changed, TERMS)
        advert = world.clients[name].advertise(*told)
        if name == "c001":
            with pytest.raises(SecurityError, match="client c001 did not sign this key"):
                s.add(name, advert)
        else:
            s.add(name, advert)
    assert next(stages, None) is None
    assert s.names == tuple(n for n in world.names if n != "c001")


# -- rounds ------------------------------------------------------------------------------------------


def test_a_round_told_differently_is_noise_and_its_code_does_not_fit():
    """Another plan or terms (``binding``), length or ring for one client: the server refuses its answer."""
    for change in ("binding", "length", "ring"):
        world = World(SIX, 6)
        world.agree()
        honest = world.call

        def call(stage, name, data, number=0, vector=None, world=world, honest=honest, change=change):
            if (stage, name) != ("answer", "c003"):
                return honest(stage, name, data, number, vector)
            other = {"length": vector[:-1], "ring": vector.astype(np.uint32)}.get(change, vector)
            return world.clients[name].answer(
                data, number, b"q" * 32 if change == "binding" else PLAN, lambda: other
            )

        world.call = call
        vectors = draw(np.random.default_rng(1), world.names, 4, np.uint64)
        found, survivors = world.round(0, vectors)
        assert "c003" not in survivors
        assert np.array_equal(found, total(vectors, survivors))
        error = world.refused["answer", "c003"]
        assert isinstance(error, SecurityError | MessageError)
        if change == "binding":
            assert "was told something else" in str(error)
        world.call = honest
        assert world.round(1, vectors)[1] == world.names  # and it is back in the next round


def test_masks_of_a_client_that_was_told_something_else_do_not_cancel():
    """Even a server that takes the answer all the same learns noise."""
    world = World(SIX, 6)
    liar = Liar(world)
    vectors = {i: np.zeros(512, np.uint64) for i in range(6)}
    request = liar.answer_request(0, range(6))
    message = liar.client(0).answer(request, 0, b"q" * 32, lambda: vectors[0])
    for i in range(1, 6):
        liar.answer(i, range(6), vectors[i])
    for i in range(1, 6):
        liar.unmask(i, set())
    assert liar.opened() == []
    values = np.frombuffer(message[: vectors[0].nbytes], np.uint8)
    counts = np.bincount(values, minlength=256)
    assert ((counts - 16) ** 2).sum() / 16 < 400


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_round_is_answered_once(number):
    world = agreed(SIX, 6)
    vectors = draw(np.random.default_rng(1), world.names, 4, np.uint64)
    for r in range(number + 1):
        world.round(r, vectors)
    request = next(
        d for n, s, w, name, d in world.log if (n, s, w, name) == (number, "answer", "down", "c000")
    )
    client = world.clients["c000"]
    asked = []
    for r in range(number + 1):
        with pytest.raises(SecurityError, match=f"request of round {number} came with|no masks for round"):
            client.answer(request, r, PLAN, lambda: asked.append(1))
    with pytest.raises(SecurityError, match="lies outside this session, or had its deposit already"):
        client.share(struct.pack("<Q", number))
    assert asked == []


def test_a_request_of_one_round_with_the_plan_of_another():
    liar = Liar(World(SIX, 6))
    with pytest.raises(SecurityError, match="request of round 0 came with the plan of round 1"):
        liar.client(0).answer(liar.answer_request(0, range(6)), 1, PLAN, lambda: 1 / 0)


@pytest.mark.parametrize(
    ("participants", "what"),
    [
        ([0], "a round of 1 clients"),
        ([0, 1], "holders of its shares take part"),
        ([0, 1, 2, 3], "3 holders of its shares take part: 4 are needed"),
        ([1, 2, 3, 4, 5], "not among the participants"),
    ],
)
def test_a_cohort_too_small_to_hide_in(participants, what):
    liar = Liar(World(SIX, 6))
    with pytest.raises(SecurityError, match=what):
        liar.client(0).answer(liar.answer_request(0, participants), 0, PLAN, lambda: 1 / 0)


def bundles_of(request, count):
    start = len(request) - count * BUNDLE_BYTES
    return request[:start], [request[i : i + BUNDLE_BYTES] for i in range(start, len(request), BUNDLE_BYTES)]


CHANGES = {  # of the bundles that a holder gets; which of them still open
    "swapped": (lambda b: [b[1], b[0], *b[2:]], lambda count: range(2, count)),
    "moved on": (lambda b: b[1:] + b[:1], lambda count: ()),
    "zeros": (lambda b: [bytes(BUNDLE_BYTES)] * len(b), lambda count: ()),
    "all one": (lambda b: [b[0]] * len(b), lambda count: (0,)),
    "one bit": (lambda b: [bytes([b[0][0] ^ 1]) + b[0][1:], *b[1:]], lambda count: range(1, count)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_bundles_exchanged_between_owners_open_nothing(change):
    """Each holder opens what its owner sealed for it, and nothing else; of the others it has no share."""
    liar, bundles_changed, left = Liar(World(SIX, 6)), *CHANGES[change]
    for i in range(6):
        head, bundles = bundles_of(liar.answer_request(i, range(6)), 5)
        with mock_requests(liar, i, head + b"".join(bundles_changed(bundles))):
            liar.answer(i, range(6), np.zeros(2, np.uint64))
        client = liar.client(i)
        owners = [o for position, o in enumerate(liar.s.owners[i]) if position in left(5)]
        shares = client._answered.shares
        assert [o for o in shares if shares[o] is not None] == owners
        dead = set(liar.s.owners[i][:2])
        liar.unmask(i, dead)
        assert [o for o in dead if i in liar.words[1].get(o, {})] == [o for o in dead if o in owners]
        assert all(liar.shares(1, o) == liar.words[1][o] for o in liar.words[1])  # and no wrong one


@contextlib.contextmanager
def mock_requests(liar, place, request):
    """``liar`` asks this client with these bytes."""
    liar.answer_request = lambda asked, participants: request if asked == place else None
    yield
    del liar.answer_request


@pytest.mark.parametrize("settings", [SIX, SIGNED])
@pytest.mark.parametrize("gone", [None, "c001", "c005"])
@pytest.mark.parametrize("told", [1, 2, 6])
@pytest.mark.parametrize("change", CHANGES)
def test_exchanged_bundles_end_in_the_right_sum_or_in_a_named_abort(settings, change, told, gone):
    """``told`` clients get others' bundles: nobody needs those of who answers; of who does not, four."""
    world = World(settings, 6)
    world.agree()
    s, (exchange, opened) = world.server, CHANGES[change]

    def request(stage, name, data):
        if stage != "answer" or s.place(name) >= told:
            return data
        head, bundles = bundles_of(data, 5)
        return head + b"".join(exchange(bundles))

    world.request = request
    world.drop({"answer": [gone]})
    vectors = draw(np.random.default_rng(2), world.names, 4, np.uint64)
    holders = [i for i in range(6) if s.names[i] != gone]
    have = (
        0
        if gone is None
        else sum(i >= told or s.owners[i].index(s.place(gone)) in opened(5) for i in holders)
    )
    left = world.names
    if gone is None or have >= 4:
        found, survivors = world.round(0, vectors)
        assert survivors == [name for name in world.names if name != gone]
        assert np.array_equal(found, total(vectors, survivors))
    else:
        why = f"of {have} shares {have} are its own, and 4 are needed; no sum is given"
        with pytest.raises(AggregationError, match=f"the masks of client {gone} cannot be taken off: {why}"):
            world.round(0, vectors)
        # Four holders said that they hold nothing of it: in this session it takes no part any more.
        left = [name for name in world.names if name != gone]
    assert not world.refused
    world.request = lambda stage, name, data: data
    world.drop({})
    found, survivors = world.round(1, vectors)
    assert survivors == left
    assert np.array_equal(found, total(vectors, survivors))


def test_bundles_for_another_holder_another_way_or_of_another_round():
    """All that is sealed is for one holder of one owner in one round."""
    world = World(SIX, 6)
    liar = Liar(world)
    s = liar.s

    def nothing_opens(number, bundles, client):
        head = struct.pack("<Q", number) + bits(np.ones(6, bool))
        client.answer(head + b"".join(bundles), number, PLAN, lambda: np.zeros(2, np.uint64))
        assert client._answered.shares == dict.fromkeys(range(1, 6))

    _, others = bundles_of(liar.answer_request(1, range(6)), 5)
    own = list(liar.deposits[0].bundles)  # what client 0 sealed for each of them, given back as theirs
    _, first = bundles_of(liar.answer_request(0, range(6)), 5)
    nothing_opens(0, others, copy.deepcopy(liar.client(0)))
    nothing_opens(0, own, copy.deepcopy(liar.client(0)))
    true = copy.deepcopy(liar.client(0))  # and as a control
    true.answer(liar.answer_request(0, range(6)), 0, PLAN, lambda: np.zeros(2, np.uint64))
    assert None not in true._answered.shares.values()
    world.round(0, draw(np.random.default_rng(1), world.names, 4, np.uint64))
    nothing_opens(1, first, world.clients[s.names[0]])


@pytest.mark.parametrize("broken", range(9))
def test_a_client_answers_however_many_bundles_are_broken(broken):
    """It cannot know who lies; and what it does not open it does not give."""
    world = World(Settings(8, 6, True, 2, 1), 9, policy(2, 0.12))
    liar = Liar(world)
    head, bundles = bundles_of(liar.answer_request(0, range(9)), 8)
    request, client = head + b"".join([bytes(BUNDLE_BYTES)] * broken + bundles[broken:]), liar.client(0)
    client.answer(request, 0, PLAN, lambda: np.zeros(1, "u8"))
    assert [o for o, share in client._answered.shares.items() if share is None] == list(range(1, 1 + broken))


def test_nothing_of_the_last_session_opens_after_a_new_one_was_begun():
    """A server that begins anew between answer and unmask gets no shares of what it has in hand."""
    liar, _ = answered(World(SIX, 6))
    for i in range(6):
        liar.client(i).advertise(liar.world.session(first_round=1)._offer, TERMS)
        with pytest.raises(SecurityError, match="takes part in no session"):
            liar.unmask(i, set())
    assert liar.opened() == []


def test_a_round_that_was_passed_over_is_not_answered():
    liar, _ = answered(World(SIX, 6))
    client = liar.client(0)
    with pytest.raises(SecurityError, match="had its deposit already"):
        client.share(struct.pack("<Q", 0))
    client.share(struct.pack("<Q", 2))
    with pytest.raises(SecurityError, match="had its deposit already"):
        client.share(struct.pack("<Q", 1))
    request = struct.pack("<Q", 1) + b"\x3f" + bytes(5 * BUNDLE_BYTES)
    with pytest.raises(SecurityError, match="no masks for round 1"):
        client.answer(request, 1, PLAN, lambda: 1 / 0)
    assert liar.opened() == []


@pytest.mark.parametrize("number", [3, 4, 2**63])
def test_rounds_outside_the_session(number):
    liar = Liar(World(SIX, 6))
    with pytest.raises(SecurityError, match="lies outside this session"):
        liar.client(0).share(struct.pack("<Q", number))


def test_too_few_survivors_open_nothing():
    """Fewer than the threshold: each client refuses on its own account."""
    liar, _ = answered(World(SIX, 6))
    for i in range(6):
        with pytest.raises(SecurityError, match="a sum over 3 clients: at least 4"):
            liar.unmask(i, set([j for j in range(6) if j != i][:3]))
    assert not any(liar.words[0].values())
    assert not any(liar.words[1].values())


def test_the_bound_is_the_one_that_clients_compute():
    """``hides`` is what ``hidden`` gives for those present, not for those invited."""
    world = World(Settings(7, 5, False, 2, 1), 8, policy())
    world.drop({"advertise": ["c007"]})
    world.agree()
    world.clients["c000"].share(world.server.share_request(0, 0))
    assert world.clients["c000"].hides == hidden(6, 7, 0, 5, False)


def test_every_stage_out_of_its_turn():
    """Any stage at any time: a named error, and the client still ends its round."""
    world = World(SIGNED, 6)
    client = world.clients["c000"]
    for stage in ("choose", "share", "confirm", "unmask"):
        with pytest.raises(BaffleError):
            getattr(client, stage)(bytes(64))
    with pytest.raises(SecurityError, match="no session"):
        client.answer(bytes(64), 0, PLAN, lambda: 1 / 0)
    with pytest.raises(SecurityError, match="no session"):
        _ = client.job
    world.agree()
    for stage in ("confirm", "unmask"):
        with pytest.raises(SecurityError):
            getattr(client, stage)(bytes(1))
    vectors = draw(np.random.default_rng(1), world.names, 4, np.uint64)
    found, survivors = world.round(0, vectors)
    assert survivors == world.names
    assert np.array_equal(found, total(vectors, survivors))


def test_too_few_answers_end_in_a_reason():
    world = agreed()
    vectors = draw(np.random.default_rng(1), world.names, 4, np.uint64)
    world.drop({"answer": world.names[1:]})
    with pytest.raises(AggregationError, match="round 0: 1 of 6 clients answered"):
        world.round(0, vectors)
    world.drop({})
    assert world.round(1, vectors)[1] == world.names


# -- what is not stopped -------------------------------------------------------------------------------


def test_rounds_too_far_ahead_are_refused_and_cost_nothing():
    """Each round that passes a client by is a turn of all its chains: no server makes it turn for ever."""
    far = Settings(5, 4, False, 2, 2**32 - 1)
    world = agreed(far)
    client, request = world.clients["c000"], world.server.share_request(0, 0)
    turns = []

    def counted(key, *labels):
        turns.append(labels)
        return derive(key, *labels)

    with mock.patch("baffle.secagg.client.derive", counted):
        for number in (4097, 2**31, 2**32 - 2):
            with pytest.raises(
                SecurityError, match=f"round {number} lies {number} rounds ahead: agree on keys"
            ):
                client.share(struct.pack("<Q", number) + request[8:])
    assert (b"next",) not in turns
    assert client._session.turned == 0
    assert client._secrets is None
    client.share(struct.pack("<Q", 4096) + request[8:])  # the farthest that is not refused
    assert client._session.turned == 4097
    with pytest.raises(SecurityError, match="round 8194 lies 4097 rounds ahead"):
        client.share(struct.pack("<Q", 8194))
    client.share(struct.pack("<Q", 8193))


# -- whom the server invites ---------------------------------------------------------------------------


def invited(policy_):
    """Of twenty clients two collude, a tenth as the policy says; the server invites them and client 0 alone.

    The sum less what the two know, and what client 0 has; None for the first where there is no sum.
    """
    world = World(Protection().settings(20), 20, policy_)
    names = ["c000", "c018", "c019"]
    world.server = ServerSession(
        world.roster,
        names,
        Protection().settings(3),
        Protection().policy,  # of its own, which is no help
        job=JOB,
        first_round=0,
        binding=TERMS,
    )
    vectors = draw(np.random.default_rng(0), world.names, 4, np.uint64)
    try:
        world.agree()
        found, _ = world.round(0, vectors, names)
    except AggregationError:
        return None, vectors["c000"], world
    return found - vectors["c018"] - vectors["c019"], vectors["c000"], world


def test_a_server_that_invites_its_friends_learns_nothing():
    """``helpers`` counts them however few are invited."""
    policy_ = replace(Protection().policy, helpers=2)
    found, _, world = invited(policy_)
    assert found is None
    assert "2 of 3 clients colluding: 0 honest clients" in str(world.refused["advertise", "c000"])
    assert {stage for _, stage, *_ in world.log} == {"advertise"}


def test_a_fraction_of_the_members_alone_does_not_keep_a_server_from_inviting_its_friends():
    """A tenth of three is nobody: the known hole of a policy that says nothing of ``helpers``."""
    found, own, _ = invited(Protection().policy)
    assert np.array_equal(found, own)


@pytest.mark.parametrize("members", range(3, 21))
def test_helpers_are_counted_however_few_are_invited(members):
    """As many as are said, or the fraction where that is more; and enough honest ones, or no session."""
    settings = Settings(members - 1, members - 1, True, 2)
    for helpers, corrupt in itertools.product(range(8), (0.0, 0.1, 0.3)):
        policy_ = Policy(least=2, corrupt=corrupt, helpers=helpers)
        c = max(helpers, int(corrupt * members + 1e-9))
        least = hidden(members - 1, members, c, members - 1, True) if c < members else 0
        assert policy_.colluders(settings, members, members) == min(c, members - 1)
        if least < 2:
            with pytest.raises(SecurityError, match="policy asks for 2"):
                policy_.check(settings, members, members)
        else:
            assert policy_.check(settings, members, members) == least == members - c
