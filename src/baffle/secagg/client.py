"""The client's half of secure aggregation: bytes in, bytes out, and no way to open both secrets of anybody.

    session   advertise → (choose) → share      keys, once for many rounds
    round     answer → (confirm) → unmask       a masked vector; one kind of share of each participant

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017). The
vector of client i in round r is

    y_i = x_i + PRG(b_i) + Σ_{j > i} PRG(p_ij) − Σ_{j < i} PRG(p_ij)      in Z_2^m

over its masking partners j that take part. p_ij comes from a root that both sides take from a chain of
hashes, which starts at their key agreement. The roots of one round are sealed under a fresh ρ_i, and ρ_i is
shared among i's holders before the round. b_i is fresh, and shared with the answer, each share blinded with a
pad that its holder alone can make, in the same round. If i answers, holders give these pads; if it does not,
their shares of ρ_i, and with it the roots of that round alone. So keys survive, and are not agreed on every
round (docs/privacy.md has the argument). All keys between two clients come from their chain, which is turned
after each round and forgets where it was.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.errors import SecurityError
from baffle.secagg.messages import (
    BUNDLE_BYTES,
    TOKEN_BYTES,
    Blinded,
    Deposit,
    Offer,
    Reader,
    advert,
    advertised,
    bits,
    bundle_data,
    commitment_to,
    deposit_context,
    places,
    ring_bytes,
    share_tag,
    tagged,
    xor,
)
from baffle.secagg.parameters import quorum
from baffle.secagg.primitives import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    KeyPair,
    derive,
    hash_of,
    mask,
    open_sealed,
    random_bytes,
    seal,
)
from baffle.secagg.session import Flags, Policy, Roster, Settings, round_context, session_id
from baffle.secagg.sharing import SECRET_BYTES, share

_MOST_TURNS = 1 << 12  # rounds that may pass a client by in one session: each costs a hash a neighbour


@dataclass
class _Opening:
    """A session that is being agreed on."""

    offer: Offer
    hash: bytes
    key: KeyPair
    present: Flags | None = None
    choice: list[int] = field(default_factory=list)  # places of the holders


@dataclass
class _Session:
    """A session that stands. Places count those present."""

    id: bytes
    job: bytes
    settings: Settings
    first_round: int
    colluders: int  # at most so many among the holders
    count: int  # of those present
    place: int
    to_server: bytes  # key of the messages to it
    holders: list[int]  # of this client's shares, ascending
    owners: list[int]  # whose shares this client holds, ascending
    chains: dict[int, bytes]  # by partner, which is who is a holder or an owner; at round ``turned``
    turned: int
    introduction: bytes  # hash of the others' keys, as they came


@dataclass
class _Secrets:
    """What masks one round of this client: made with the round's deposit, gone with its answer."""

    round: int
    keys: dict[int, bytes]  # by partner, of this round
    deposit: bytes  # as it was sent: should it be lost, the same bytes again


@dataclass
class _Answered:
    """A round that this client has answered and not yet helped to open."""

    round: int
    context: bytes
    participants: Flags
    keys: dict[int, bytes]
    shares: dict[int, bytes | None]  # of ρ, by owner; None where a bundle did not open
    alive: Flags | None = None  # which of the owners that take part it said are alive


class ClientSession:
    """One client's state machine. Every method takes the server's request and returns the answer.

    Raises SecurityError for a request that a truthful server would not make, or that protects less than
    ``policy``, and MessageError for bytes that are none. Whatever was refused has revealed nothing; what has
    been answered once is not answered again. Memory: a few keys and shares a neighbour.
    """

    def __init__(self, name: str, identity: Identity, roster: Roster, policy: Policy) -> None:
        self.name, self.identity, self.roster, self.policy = name, identity, roster, policy
        if roster.keys[roster.place(name)] != identity.public:
            raise SecurityError(f"client {name}: the roster pins another key for this name")
        self.hides = 0  # the fewest honest clients in anything that this session can open
        self._opening: _Opening | None = None
        self._session: _Session | None = None
        self._secrets: _Secrets | None = None
        self._answered: _Answered | None = None

    def leave(self) -> None:
        """Forgets the session, and whatever was not yet answered in it."""
        self._opening, self._session, self._secrets, self._answered = None, None, None, None

    # -- a session ----------------------------------------------------------------------------------

    def advertise(self, request: bytes, binding: bytes) -> bytes:
        """A one-time key, if the offer stands up to the policy. ``binding``: the hash of the sums' terms."""
        offer = Offer.decode(request, len(self.roster))
        if offer.roster != self.roster.digest:
            raise self._refusal("the server has another roster")
        if not offer.members[self.roster.place(self.name)]:
            raise self._refusal("it is no member of the session that it was offered")
        members = int(offer.members.sum())
        self.hides = self.policy.check(offer.settings, members, members)
        self.leave()
        self._opening = _Opening(offer, hash_of(b"offer", request, binding), KeyPair.generate())
        return advert(self.identity, self._opening.hash, self._opening.key.public)

    @property
    def job(self) -> bytes:
        """The job of the session that is being agreed on or stands. Raises SecurityError without one."""
        return self._standing().job if self._opening is None else self._opening.offer.job

    def choose(self, request: bytes) -> bytes:
        """Where not everybody holds everybody's shares: this client's holders, drawn by itself."""
        opening = self._begun()
        if opening.present is not None:
            raise self._refusal("it was asked to choose twice")
        r = Reader(request)
        present = r.flags(int(opening.offer.members.sum()))
        r.end()
        place, count = self._admit(opening, present)
        if opening.offer.settings.full(count):
            raise self._refusal("there is nothing to choose where everybody holds everybody's shares")
        others = [i for i in range(count) if i != place]
        opening.choice = secrets.SystemRandom().sample(others, opening.offer.settings.degree)
        body = np.array(opening.choice, "<u2").tobytes()
        id_ = _session_id(opening, b"")
        return tagged(_server_key(opening, id_), id_, "choose", body)

    def share(self, request: bytes) -> bytes:
        """A deposit for the round that the request names, which brings the others' keys the first time."""
        r = Reader(request)
        (round_,) = r.unpack("Q")
        if self._session is None:
            self._session = self._establish(r)
            self._opening = None
        # The others' keys come again where the first deposit was lost.
        elif r.at < len(request) and hash_of(request[r.at :]) != self._session.introduction:
            raise self._refusal("the others' keys have changed in a session that stands")
        session, own = self._session, self._secrets
        deposit = own.deposit if own is not None and own.round == round_ else self._deposit(round_)
        context = hash_of(session.id, round_, session.introduction)
        return tagged(session.to_server, context, "share", deposit)

    def _admit(self, opening: _Opening, present: Flags) -> tuple[int, int]:
        """Takes the list of those present; returns this client's place in it, and its length."""
        members = places(opening.offer.members)
        mine = members.index(self.roster.place(self.name))
        if not present[mine]:
            raise self._refusal("it is said to be absent from a session that it takes part in")
        count = int(present.sum())
        self.hides = self.policy.check(opening.offer.settings, len(members), count)
        opening.present = present
        return int(present[:mine].sum()), count

    def _establish(self, r: Reader) -> _Session:
        opening, introduction = self._begun(), hash_of(bytes(r.data[r.at :]))
        offer, settings = opening.offer, opening.offer.settings
        members = places(offer.members)
        present = r.flags(len(members))
        if opening.present is None:
            self._admit(opening, present)
        elif not np.array_equal(present, opening.present):
            raise self._refusal("the list of those present has changed")
        here = [members[i] for i in places(present)]
        place, count = here.index(self.roster.place(self.name)), len(here)
        if settings.full(count):
            adverts = r.blocks(count, KEY_BYTES + SIGNATURE_BYTES)
            id_ = _session_id(opening, b"".join(advert[:KEY_BYTES] for advert in adverts))
            holders = [i for i in range(count) if i != place]
            known = {i: self._checked(opening, here[i], adverts[i]) for i in holders}
            if adverts[place][:KEY_BYTES] != opening.key.public:
                raise self._refusal("the server lists another key for this client than its own")
            owners = holders
        else:
            if not opening.choice:
                raise self._refusal("it was not asked to choose its holders")
            id_ = _session_id(opening, b"")
            adverts = r.blocks(len(opening.choice), KEY_BYTES + SIGNATURE_BYTES)
            known = {
                i: self._checked(opening, here[i], advert)
                for i, advert in zip(opening.choice, adverts, strict=True)
            }
            # Who chose this client needs no signature: a made-up neighbour gets shares of nobody else's.
            owners = self._in_neighbours(r, place, count, known)
            holders = sorted(opening.choice)
        r.end()
        if opening.key.public in known.values():
            raise self._refusal("its own key came back as another client's")
        agreed = {i: opening.key.agree(key) for i, key in known.items()}
        return _Session(
            id_,
            offer.job,
            settings,
            offer.first_round,
            self.policy.colluders(settings, len(members), count),
            count,
            place,
            _server_key(opening, id_),
            holders,
            owners,
            {i: derive(agreed[i], b"chain", id_) for i in sorted(agreed)},
            offer.first_round,
            introduction,
        )

    def _checked(self, opening: _Opening, member: int, message: bytes) -> bytes:
        return advertised(self.roster.keys[member], opening.hash, message, self.roster.names[member])

    def _in_neighbours(self, r: Reader, place: int, count: int, known: dict[int, bytes]) -> list[int]:
        """Those that chose this client, ascending. Adds their keys."""
        (length,) = r.unpack("H")
        owners: list[int] = []
        for _ in range(length):
            (other,) = r.unpack("H")
            key = r.take(KEY_BYTES)
            if other >= count or other == place or (owners and other <= owners[-1]):
                raise self._refusal("a list of neighbours that is not in order")
            if known.setdefault(other, key) != key:
                raise self._refusal(f"two keys for client {other} of one session")
            owners.append(other)
        return owners

    # -- a round ------------------------------------------------------------------------------------

    def answer(
        self, request: bytes, number: int, binding: bytes, measure: Callable[[], NDArray[Any]]
    ) -> bytes:
        """The masked vector, and the deposit for the next round of the session.

        ``measure`` gives the vector (residues, uint32 or uint64), and is called when nothing is left to
        refuse. ``number`` and ``binding``: the plan's round, and the hash of plan and terms that this client
        computed itself.
        """
        session, r = self._standing(), Reader(request)
        (round_,) = r.unpack("Q")
        if round_ != number:
            raise self._refusal(f"a request of round {round_} came with the plan of round {number}")
        participants = r.flags(session.count)
        own = self._check_round(session, round_, participants)
        owners = [i for i in session.owners if participants[i]]
        bundles = dict(zip(owners, r.blocks(len(owners), BUNDLE_BYTES), strict=True))
        r.end()
        vector = measure()
        ring_bits = 8 * vector.dtype.itemsize
        context = round_context(session.id, round_, bits(participants), binding, ring_bits, len(vector))
        self._secrets = None
        # A bundle that does not open, by its owner's fault or the server's, is a share less for the server.
        shares = {i: self._opened_bundle(session, own, i, bundle) for i, bundle in bundles.items()}
        seed = random_bytes(SECRET_BYTES)
        vector = vector + mask(derive(seed, context), len(vector), vector.dtype)  # a copy
        for partner, key in own.keys.items():
            if participants[partner]:
                noise = mask(derive(derive(key, b"root"), context), len(vector), vector.dtype)
                if session.place < partner:
                    vector += noise
                else:
                    vector -= noise
        self._answered = _Answered(round_, context, participants, own.keys, shares)
        more = round_ + 1 < session.first_round + session.settings.rounds
        behind = self._blinded(session, own, context, seed) + (self._deposit(round_ + 1) if more else b"")
        return tagged(session.to_server, context, "answer", ring_bytes(vector) + behind)

    def confirm(self, request: bytes) -> bytes:
        """A token for each of its owners that is said to be alive: once a round."""
        session, answered, r = self._standing(), self._pending(), Reader(request)
        owners, alive = self._statuses(session, answered, r)
        r.end()
        if not session.settings.consistency or answered.alive is not None:
            raise self._refusal("it was asked who is alive twice, or in a session without that stage")
        answered.alive = alive
        body = b"".join(
            _token(answered.keys[owner], owner, session.place, answered.context)
            for owner, there in zip(owners, alive, strict=True)
            if there
        )
        return tagged(session.to_server, answered.context, "confirm", body)

    def unmask(self, request: bytes) -> bytes:
        """For every participant whose shares it holds, b's pad where it is alive, else ρ's share."""
        session, answered, r = self._standing(), self._pending(), Reader(request)
        owners, alive = self._statuses(session, answered, r)
        if session.settings.consistency:
            if answered.alive is None or not np.array_equal(alive, answered.alive):
                raise self._refusal("others are said to be alive than those that it vouched for")
            self._check_vouched(session, answered, r)
        elif int(alive.sum()) + 1 < session.settings.threshold:
            raise self._refusal(
                f"a sum over {int(alive.sum()) + 1} clients: at least {session.settings.threshold}"
            )
        r.end()
        self._answered = None  # from here on there is nothing more to open in this round
        kinds = [
            _pad(answered.keys[owner], owner, session.place, answered.context)
            if there
            else answered.shares[owner]
            for owner, there in zip(owners, alive, strict=True)
        ]
        opened_ = np.array([kind is not None for kind in kinds], bool)
        body = bits(opened_) + b"".join(kind for kind in kinds if kind is not None)
        return tagged(session.to_server, answered.context, "unmask", body)

    # -- inside -------------------------------------------------------------------------------------

    def _blinded(self, s: _Session, own: _Secrets, context: bytes, seed: bytes) -> bytes:
        """The shares of b for its holders, by way of the server."""
        deposit = deposit_context(s.id, own.round, s.place)
        shares = [row.tobytes() for row in share(seed, s.settings.threshold, len(s.holders))]
        pads = b"".join(_pad(own.keys[holder], s.place, holder, context) for holder in s.holders)
        tags = (share_tag(deposit, i, 0, row) for i, row in zip(s.holders, shares, strict=True))
        return Blinded(commitment_to(deposit, seed), xor(b"".join(shares), pads), b"".join(tags)).encode()

    def _deposit(self, round_: int) -> bytes:
        """A fresh ρ for a round, its shares sealed for the holders. Turns the chains past the round."""
        s = self._standing()
        if not max(s.turned, s.first_round) <= round_ < s.first_round + s.settings.rounds:
            raise self._refusal(f"round {round_} lies outside this session, or had its deposit already")
        if round_ - s.turned > _MOST_TURNS:
            raise self._refusal(f"round {round_} lies {round_ - s.turned} rounds ahead: agree on keys anew")
        for _ in range(s.turned, round_):
            s.chains = {i: derive(chain, b"next") for i, chain in s.chains.items()}
        keys = {i: derive(chain, b"round") for i, chain in s.chains.items()}
        s.chains = {i: derive(chain, b"next") for i, chain in s.chains.items()}
        s.turned = round_ + 1
        roots = b"".join(derive(key, b"root") for key in keys.values())
        rho = random_bytes(SECRET_BYTES)
        shares = [row.tobytes() for row in share(rho, s.settings.threshold, len(s.holders))]
        tags, bundles, context = [], [], deposit_context(s.id, round_, s.place)
        for holder, row in zip(s.holders, shares, strict=True):
            tags.append(share_tag(context, holder, 1, row))
            key = _channel(keys[holder], s.place, holder)
            bundles.append(seal(key, 0, row, bundle_data(context, holder)))
        sealed = seal(derive(rho, b"roots"), 0, roots, context)
        deposit = Deposit(sealed, b"".join(tags), bundles).encode()
        self._secrets = _Secrets(round_, keys, deposit)
        return deposit

    def _opened_bundle(self, s: _Session, own: _Secrets, owner: int, bundle: bytes) -> bytes | None:
        key = _channel(own.keys[owner], owner, s.place)
        data = bundle_data(deposit_context(s.id, own.round, owner), s.place)
        try:
            return open_sealed(key, 0, bundle, data)
        except SecurityError:
            return None

    def _check_round(self, s: _Session, round_: int, participants: Flags) -> _Secrets:
        """What masks this round, if its participants are enough."""
        own = self._secrets
        if own is None or own.round != round_:
            raise self._refusal(
                f"it has no masks for round {round_}: it was answered, or never deposited for"
            )
        if not participants[s.place]:
            raise self._refusal("it is not among the participants of the round that it was asked for")
        count = int(participants.sum())
        if count < max(self.policy.least, s.settings.least):
            raise self._refusal(
                f"a round of {count} clients: at least {max(self.policy.least, s.settings.least)}"
            )
        able = sum(bool(participants[i]) for i in s.holders)
        if able < s.settings.threshold:
            raise self._refusal(f"{able} holders of its shares take part: {s.settings.threshold} are needed")
        return own

    def _statuses(self, s: _Session, answered: _Answered, r: Reader) -> tuple[list[int], Flags]:
        """Its owners that take part, and which of them are said to be alive."""
        owners = [i for i in s.owners if answered.participants[i]]
        return owners, r.flags(len(owners))

    def _check_vouched(self, s: _Session, answered: _Answered, r: Reader) -> None:
        """That enough of its holders said that it is alive: those never open its pairwise roots."""
        told = places(r.flags(len(s.holders)))
        tokens = r.blocks(len(told), TOKEN_BYTES)
        good = sum(
            hmac.compare_digest(
                _token(answered.keys[s.holders[i]], s.place, s.holders[i], answered.context), token
            )
            for i, token in zip(told, tokens, strict=True)
        )
        needed = quorum(len(s.holders), s.colluders, s.settings.threshold)
        if good < needed:
            raise self._refusal(f"{good} of its holders said that it is alive: {needed} are needed")

    def _begun(self) -> _Opening:
        if self._opening is None:
            raise self._refusal("no session has begun, or it stands already")
        return self._opening

    def _standing(self) -> _Session:
        if self._session is None:
            raise self._refusal("it takes part in no session")
        return self._session

    def _pending(self) -> _Answered:
        if self._answered is None:
            raise self._refusal("there is no round to open: it has answered none, or has opened it already")
        return self._answered

    def _refusal(self, why: str) -> SecurityError:
        return SecurityError(f"client {self.name}: {why}")


def _way(owner: int, holder: int) -> bytes:
    """Two clients have one key a round: what goes one way must not be what goes the other."""
    return b" up" if owner < holder else b" down"


def _channel(key: bytes, owner: int, holder: int) -> bytes:
    return derive(key, b"channel" + _way(owner, holder))


def _token(key: bytes, owner: int, holder: int, context: bytes) -> bytes:
    """What a holder says when it says that an owner is alive in this context."""
    return derive(key, b"alive" + _way(owner, holder), context)[:TOKEN_BYTES]


def _pad(key: bytes, owner: int, holder: int, context: bytes) -> bytes:
    return derive(key, b"pad" + _way(owner, holder), context)


def _server_key(opening: _Opening, id_: bytes) -> bytes:
    return derive(opening.key.agree(opening.offer.key), b"server", id_)


def _session_id(opening: _Opening, keys: bytes) -> bytes:
    assert opening.present is not None
    return session_id(opening.hash, bits(opening.present), keys)
