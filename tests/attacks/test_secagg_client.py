"""Clients that lie or send garbage, and garbage from anyone: a named error, and no wrong sum."""

import contextlib
import random
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baffle.errors import AggregationError, MessageError, SecurityError
from baffle.secagg.client import _pad as pad
from baffle.secagg.messages import (
    BUNDLE_BYTES,
    SHORT_TAG,
    Blinded,
    Deposit,
    Reader,
    deposit_context,
    share_tag,
    tagged,
)
from baffle.secagg.primitives import KEY_BYTES, TAG_BYTES, Identity, KeyPair, derive, hash_of, random_bytes
from baffle.secagg.session import Settings
from baffle.secagg.sharing import SECRET_BYTES, share
from tests.attacks.secagg_world import World, draw, total

SIX = Settings(5, 4, False, 2, 4)
SIGNED = Settings(5, 4, True, 2, 4)
DRAWN = Settings(5, 4, True, 2, 4)  # among nine
LIAR = "c003"
WORLDS = [(SIX, 6), (SIGNED, 6), (DRAWN, 9)]
IDENTITIES = {f"c{i:03d}": Identity.generate() for i in range(9)}


def world_of(settings_, count):
    return World(settings_, count, identities={name: IDENTITIES[name] for name in sorted(IDENTITIES)[:count]})


def resigned(world, stage, number, body):
    """``body`` as client LIAR would send it: with a code that is its own."""
    client = world.clients[LIAR]._session
    if stage == "share":
        context = hash_of(client.id, number, client.introduction)
    else:
        context = world.clients[LIAR]._answered.context if world.clients[LIAR]._answered else world.context
    return tagged(client.to_server, context, stage, body)


def lying(world, number, change, stages=("share", "answer", "confirm", "unmask")):
    """Client LIAR's messages go through ``change(stage, body)``, and are coded again as its own."""
    true = world.call

    def call(stage, name, data, number_=0, vector=None):
        pending = world.clients[name]._answered if name == LIAR else None
        message = true(stage, name, data, number_, vector)
        if name != LIAR or stage not in stages:
            return message
        answered = world.clients[name]._answered or pending
        world.context = answered.context if answered else b""
        heard = world.clients[name]._session
        context = hash_of(heard.id, number_, heard.introduction) if stage == "share" else world.context
        return tagged(
            world.clients[name]._session.to_server, context, stage, change(stage, message[:-TAG_BYTES])
        )

    world.call = call


def honest_again(world):
    world.__dict__.pop("call", None)


def vectors_of(world, seed=0):
    return draw(np.random.default_rng(seed), world.names, 4, np.uint64)


def check_sum(world, number, vectors, without=()):
    found, survivors = world.round(number, vectors)
    assert survivors == [name for name in world.names if name not in without]
    assert np.array_equal(found, total(vectors, survivors))


# -- deposits ----------------------------------------------------------------------------------------


def parts(world, body, more=True):
    """A first deposit taken apart."""
    s = world.server
    place = s.place(LIAR)
    return Deposit.read(Reader(body), len(s.holders[place]), len(s.partners[place]))


def bad_bundles(world, which):
    def change(stage, body):
        if stage != "share":
            return body
        d = parts(world, body)
        bundles = [random_bytes(BUNDLE_BYTES) if which(i) else b for i, b in enumerate(d.bundles)]
        return Deposit(d.sealed, d.tags, bundles).encode()

    return change


@pytest.mark.parametrize(("settings_", "count"), WORLDS)
def test_bundles_that_nobody_can_open_cost_nothing_while_their_owner_answers(settings_, count):
    """They are shares of what opens its pairwise masks: nobody needs those of one that is there."""
    world = world_of(settings_, count)
    world.agree()
    lying(world, 0, bad_bundles(world, lambda i: True))
    vectors = vectors_of(world)
    check_sum(world, 0, vectors)
    assert not world.refused
    honest_again(world)
    check_sum(world, 1, vectors)


@pytest.mark.parametrize(("settings_", "count"), WORLDS)
@pytest.mark.parametrize("broken", range(6))
def test_bundles_that_do_not_open_are_shares_less_once_their_owner_is_gone(settings_, count, broken):
    """Of five holders four open, so one may be broken. With more: no sum, and the owner is left out."""
    world = world_of(settings_, count)
    world.agree()
    lying(world, 0, bad_bundles(world, lambda i: i < broken))
    world.drop({"answer": [LIAR]})
    vectors = vectors_of(world)
    if broken < 2:
        check_sum(world, 0, vectors, [LIAR])
    else:
        good = 5 - broken
        why = f"client {LIAR} cannot be taken off: of {good} shares {good} are its own, and 4 are needed"
        with pytest.raises(AggregationError, match=f"round 0: the masks of {why}; no sum is given"):
            world.round(0, vectors)
    assert not world.refused
    honest_again(world)
    world.drop({})
    check_sum(world, 1, vectors, [LIAR] if broken >= 2 else [])


def test_a_holder_says_of_no_bundle_that_did_not_open_more_than_that():
    """Its answer has a 0 for the owner and no bytes; the others' shares are there as ever."""
    world = world_of(SIX, 6)
    world.agree()
    s, place, said = world.server, world.server.place(LIAR), {}
    lying(world, 0, bad_bundles(world, lambda i: i == 0))

    def reply(stage, name, data):
        if stage == "unmask":
            said[name] = data
        return None if (stage, name) == ("answer", LIAR) else data

    world.reply = reply
    check_sum(world, 0, vectors_of(world), [LIAR])
    assert set(said) == set(world.names) - {LIAR}
    for name, data in said.items():
        holder = s.place(name)
        position = s.owners[holder].index(place)
        flags = np.unpackbits(np.frombuffer(data[:1], np.uint8), bitorder="little")[:5]
        opened = [i for i in range(5) if i != position or holder != s.holders[place][0]]
        assert np.flatnonzero(flags).tolist() == opened
        assert len(data) == 1 + SECRET_BYTES * len(opened) + TAG_BYTES


def test_a_dropout_whose_shares_open_nothing_is_left_out_from_then_on():
    """Its ρ was shared rightly and its roots were sealed under another: no sum, and it takes no more part."""
    world = world_of(SIX, 6)
    world.agree()

    def change(stage, body):
        d = parts(world, body)
        return Deposit(bytes(len(d.sealed)), d.tags, d.bundles).encode() if stage == "share" else body

    lying(world, 0, change, ("share",))
    world.drop({"answer": [LIAR]})
    vectors = vectors_of(world)
    with pytest.raises(AggregationError, match=f"masks of client {LIAR} cannot be taken off"):
        world.round(0, vectors)
    honest_again(world)
    world.drop({})
    check_sum(world, 1, vectors, [LIAR])


def test_a_dropout_that_deposited_other_roots_makes_noise_of_a_sum_and_nothing_smaller():
    """All is in order but the roots themselves: only what the terms say of a sum can tell.

    ``Terms.total`` does; here the sum is wrong in every entry, so that it can.
    """
    world = world_of(SIX, 6)
    world.agree()
    client = world.clients[LIAR]
    true = client._deposit

    def other_roots(key, *labels):
        return random_bytes(KEY_BYTES) if labels == (b"root",) else derive(key, *labels)

    def deposit(round_):
        with mock.patch("baffle.secagg.client.derive", other_roots):
            return true(round_)

    client._deposit = deposit
    world.drop({"answer": [LIAR]})
    vectors = {name: np.zeros(64, np.uint64) for name in world.names}
    found, _ = world.round(0, vectors)
    assert np.count_nonzero(found) == 64
    assert np.count_nonzero(found >> np.uint64(40)) > 60


@pytest.mark.parametrize("kind", ["seed", "commitment"])
def test_a_self_mask_other_than_the_one_committed_to(kind):
    world = world_of(SIX, 6)
    world.agree()
    s, place = world.server, world.server.place(LIAR)

    def change(stage, body):
        if stage != "answer":
            return body
        r = Reader(body, 32)
        blinded = Blinded.read(r, 5)
        if kind == "commitment":
            return body[:32] + Blinded(bytes(32), blinded.shares, blinded.tags).encode() + body[r.at :]
        rows = [row.tobytes() for row in share(random_bytes(32), 4, 5)]
        about = deposit_context(s.id, 0, place)
        pads = [
            bytes(a ^ b for a, b in zip(old, new, strict=True))
            for old, new in zip(pads_of(), rows, strict=True)
        ]
        tags = b"".join(share_tag(about, h, 0, row) for h, row in zip(s.holders[place], rows, strict=True))
        return body[:32] + Blinded(blinded.commitment, b"".join(pads), tags).encode() + body[r.at :]

    def pads_of():
        keys = world.clients[LIAR]._answered.keys
        return [pad(keys[holder], place, holder, world.context) for holder in s.holders[place]]

    lying(world, 0, change, ("answer",))
    vectors = vectors_of(world)
    with pytest.raises(AggregationError, match=f"masks of client {LIAR} cannot be taken off"):
        world.round(0, vectors)
    honest_again(world)
    check_sum(world, 1, vectors, [LIAR])


@pytest.mark.parametrize("false", [False, True])
def test_tags_that_do_not_tell_true_shares_from_false_ones(false):
    """They are needed where a holder lies besides: then it is the owner of the tags that is left out."""
    world = world_of(SIX, 6)
    world.agree()

    def change(stage, body):
        r = Reader(body, 32)
        b = Blinded.read(r, 5)
        return body[:32] + Blinded(b.commitment, b.shares, bytes(5 * SHORT_TAG)).encode() + body[r.at :]

    lying(world, 0, change, ("answer",))
    liar = world.call

    def call(stage, name, data, number=0, vector=None):
        answered = world.clients[name]._answered
        message = liar(stage, name, data, number, vector)
        if not false or (stage, name) != ("unmask", "c000"):
            return message
        key = world.clients[name]._session.to_server
        return tagged(key, answered.context, stage, message[:1] + random_bytes(len(message) - 1 - TAG_BYTES))

    world.call = call
    vectors = vectors_of(world)
    if not false:
        check_sum(world, 0, vectors)
        return
    with pytest.raises(AggregationError, match=f"masks of client {LIAR} cannot be taken off: .*4 are needed"):
        world.round(0, vectors)
    honest_again(world)
    check_sum(world, 1, vectors, [LIAR])


# -- shares and tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings_", "count"), WORLDS[:2])
@pytest.mark.parametrize("kind", ["random", "zeros", "none", "one short"])
def test_false_shares_of_one_holder_cost_nothing(settings_, count, kind):
    """They are known by their tags; five of the six still open everything."""
    world = world_of(settings_, count)
    world.agree()

    def change(stage, body):
        flags, shares = body[:1], body[1:]
        return {
            "random": flags + random_bytes(len(shares)),
            "zeros": flags + bytes(len(shares)),
            "none": b"\0",
            "one short": body[:-1],
        }[kind]

    lying(world, 0, change, ("unmask",))
    check_sum(world, 0, vectors_of(world))
    assert (("unmask", LIAR) in world.refused) == (kind == "one short")


def test_too_many_false_shares_give_no_sum():
    world = world_of(SIX, 6)
    world.agree()

    def reply(stage, name, data):
        if stage != "unmask" or name < "c003":
            return data
        session = world.clients[name]._session
        return tagged(
            session.to_server, world.context, stage, data[:1] + random_bytes(len(data) - 1 - TAG_BYTES)
        )

    def call(stage, name, data, number=0, vector=None):
        if stage == "unmask":
            world.context = world.clients[name]._answered.context
        return World.call(world, stage, name, data, number, vector)

    world.call, world.reply = call, reply
    with pytest.raises(AggregationError, match=r"cannot be taken off: .*4 are needed.*; no sum is given"):
        world.round(0, vectors_of(world))


@pytest.mark.parametrize(
    "body", [lambda b: bytes(len(b)), lambda b: b[:-1], lambda b: b + b"\0", lambda b: b""]
)
def test_forged_tokens_do_not_keep_others_from_opening(body):
    world = world_of(SIGNED, 6)
    world.agree()
    lying(world, 0, lambda stage, b: body(b), ("confirm",))
    check_sum(world, 0, vectors_of(world))
    assert not [key for key in world.refused if key[0] == "unmask"]


# -- answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda b: b[:-8], lambda b: b + bytes(8), lambda b: b"", lambda b: b[:1]])
@pytest.mark.parametrize(("settings_", "count"), WORLDS[:2])
def test_an_answer_of_another_length_is_left_out(settings_, count, change):
    world = world_of(settings_, count)
    world.agree()
    lying(world, 0, lambda stage, b: change(b), ("answer",))
    vectors = vectors_of(world)
    check_sum(world, 0, vectors, [LIAR])
    assert isinstance(world.refused["answer", LIAR], SecurityError | MessageError)
    honest_again(world)
    check_sum(world, 1, vectors)


def test_answers_twice_or_of_who_takes_no_part():
    world = world_of(SIX, 6)
    world.agree()
    seen = []

    def order(answers):
        seen.extend(answers)
        return [*answers, answers[0]]

    world.order = order
    check_sum(world, 0, vectors_of(world))
    assert "twice" in str(world.refused["answer", "c000"]) or "already" in str(
        world.refused["unmask", "c000"]
    )


def test_messages_of_another_identity_or_stage():
    """Client 0's bytes under client 1's name, and any stage's in another: known by their codes."""
    world = world_of(SIGNED, 6)
    world.agree()
    last = {}

    def reply(stage, name, data):
        last[stage, name] = data
        return (
            last.get((stage, "c000")) if name == "c001" and stage in ("answer", "confirm", "unmask") else data
        )

    world.reply = reply
    check_sum(world, 0, vectors_of(world), ["c001"])
    assert "client c001" in str(world.refused["answer", "c001"])
    assert "not made by it in this context" in str(world.refused["answer", "c001"])


def test_adverts_under_a_name_that_is_not_theirs():
    world = world_of(SIX, 6)
    stages = world.server.stages()
    _, requests = next(stages)
    adverts = {n: world.clients[n].advertise(requests[n], b"t" * 32) for n in world.names}
    with pytest.raises(SecurityError, match="client c001 did not sign this key"):
        world.server.add("c001", adverts["c000"])
    with pytest.raises(SecurityError, match="client eve is not on the roster"):
        world.server.add("eve", adverts["c000"])
    outsider = KeyPair.generate().public
    with pytest.raises(SecurityError, match="did not sign"):
        world.server.add("c002", outsider + Identity.generate().sign(outsider))
    world.server.add("c000", adverts["c000"])
    with pytest.raises(SecurityError, match="advertised twice"):
        world.server.add("c000", adverts["c000"])
    for small in (bytes(32), b"\x01" + bytes(31)):
        signed = small + world.identities["c003"].sign(hash_of(b"advert", world.server._offer_hash, small))
        with pytest.raises(SecurityError, match="small order"):
            world.server.add("c003", signed)


@pytest.mark.parametrize(
    "choice",
    [[], [1], [1, 1, 2, 4, 5], [3, 1, 2, 4, 5], [9, 1, 2, 4, 5], [1, 2, 4, 5, 65535], [1, 2, 4, 5, 6, 7]],
)
def test_a_choice_of_holders_that_cannot_be(choice):
    world = world_of(DRAWN, 9)

    def reply(stage, name, data):
        if (stage, name) != ("choose", LIAR):
            return data
        opening, s = world.clients[LIAR]._opening, world.server
        return tagged(s.keys[3], s.id, "choose", np.array(choice, "<u2").tobytes()) if opening else data

    world.reply = reply
    world.agree()
    assert "a choice of holders that cannot be" in str(world.refused["choose", LIAR])
    world.reply = lambda stage, name, data: data
    vectors = vectors_of(world)
    found, survivors = world.round(0, vectors)
    assert LIAR not in survivors
    assert np.array_equal(found, total(vectors, survivors))


@pytest.mark.parametrize("at", ["place", "key"])
def test_an_introduction_that_was_changed_on_the_wire_is_noticed(at):
    """Neighbours that chose a client are told to it unsigned: what it heard is in the code of its deposit."""
    world = world_of(DRAWN, 9)

    def request(stage, name, data):
        if (stage, name) != ("share", LIAR):
            return data
        where = len(data) - (KEY_BYTES + 2 if at == "place" else 1)  # of the last neighbour
        return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]

    world.request = request
    world.agree()
    vectors = vectors_of(world)
    found, survivors = world.round(0, vectors)
    assert survivors == [name for name in world.names if name != LIAR]
    assert np.array_equal(found, total(vectors, survivors))
    assert ("share", LIAR) in world.refused


# -- garbage -----------------------------------------------------------------------------------------

mutations = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "zero", "repeat", "replace"]), st.integers(0, 2**31)),
    min_size=1,
    max_size=3,
)


def mutated(data, recipe):
    for kind, where in recipe:
        at = where % (len(data) + 1)
        rng = random.Random(where)
        if kind == "flip" and data:
            at = where % len(data)
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]
        elif kind == "zero":
            data = data[:at] + bytes(len(data[at : at + 16])) + data[at + 16 :]
        elif kind == "repeat":
            data = data + data[at:]
        elif kind == "replace":
            data = rng.randbytes(at)
    return data


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(WORLDS),
    st.sampled_from(["request", "reply", "coded"]),
    st.sampled_from(["advertise", "choose", "share", "answer", "confirm", "unmask"]),
    mutations,
)
def test_garbage_ends_in_an_error_of_ours_and_never_in_a_wrong_sum(which, way, where, recipe):
    """Any message of any stage, changed on the wire or, with a right code, by the client itself.

    Round 1 may suffer from what was deposited for it in round 0; round 2 has all but the liar.
    """
    world = world_of(*which)

    def change(stage, name, data):
        return mutated(data, recipe) if (stage, name) == (where, LIAR) else data

    coded = way == "coded" and where in ("share", "answer", "confirm", "unmask")
    if not coded:
        setattr(world, "reply" if way == "coded" else way, change)
    if where in ("advertise", "choose") and which[1] == 9:
        with contextlib.suppress(AggregationError):  # one too few for holders to be drawn
            world.agree()
        if not world.server.holders:
            return
    else:
        world.agree()
    if coded:
        lying(world, 0, lambda stage, body: mutated(body, recipe), (where,))
    vectors = vectors_of(world)
    for number in range(3):
        with contextlib.suppress(*[AggregationError] * (number < 2)):
            found, survivors = world.round(number, vectors)
            forged = coded and where == "answer" and number == 0 and LIAR in survivors
            if not forged:  # a client may add what it likes to a sum: only the terms can tell
                assert np.array_equal(found, total(vectors, survivors))
        honest_again(world)
        world.request = world.reply = lambda stage, name, data: data
        if number < 2:
            world.refused = {}
    assert set(world.names) - set(survivors) <= {LIAR}, world.refused
