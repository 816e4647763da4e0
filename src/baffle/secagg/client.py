"""The client's half of secure aggregation: bytes in, bytes out, and no way to open both secrets of anybody.

    session   advertise → (choose) → share      keys, once for many rounds
    round     answer → (confirm) → unmask       a masked vector; one kind of share of each participant

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017). The
vector of client i in round r is

    y_i = x_i + PRG(b_i) + Σ_{j > i} PRG(p_ij) − Σ_{j < i} PRG(p_ij)      in Z_2^m

over its masking partners j that take part. b_i is fresh, and shared among its holders. p_ij comes from a root
that both sides take from a chain of hashes which starts at their key agreement; the roots of one round are
sealed under a fresh ρ_i, and ρ_i is shared. If i answers, holders open b_i; if it does not, ρ_i, and with it
the roots of that round alone: keys survive, so they need not be agreed on every round (docs/privacy.md has the
argument). A chain is turned after each round and forgets where it was.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.errors import SecurityError
from baffle.secagg.messages import (
    BUNDLE_BYTES,
    Deposit,
    Offer,
    Reader,
    bits,
    bundle_context,
    commitment_to,
    opened,
    places,
    ring_bytes,
    roots_context,
    share_tag,
    signed,
)
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
    verify,
)
from baffle.secagg.session import Flags, Policy, Roster, Settings, round_context, session_id
from baffle.secagg.sharing import SECRET_BYTES, share


@dataclass
class _Opening:
    """A session that is being agreed on."""

    offer: Offer
    hash: bytes
    key: KeyPair
    present: Flags | None = None
    choice: list[int] = field(default_factory=list)  # places of the holders; the first ones are partners too


@dataclass
class _Session:
    """A session that stands. Places count those present."""

    id: bytes
    settings: Settings
    first_round: int
    members: int
    present: Flags
    place: int
    keys: tuple[bytes, ...]  # identities, by place
    holders: list[int]  # of this client's shares, ascending
    owners: list[int]  # whose shares this client holds, ascending
    to_holder: list[bytes]  # channel keys
    from_owner: list[bytes]
    partners: list[int]  # with whom it masks, ascending
    chains: list[bytes]  # one a partner, at round ``turned``
    turned: int


@dataclass
class _Secrets:
    """What masks one round of this client: made with the round's deposit, gone with its answer."""

    round: int
    seed: bytes
    roots: dict[int, bytes]
    deposit: bytes  # as it was sent: should it be lost, the same bytes again


@dataclass
class _Answered:
    """A round that this client has answered and not yet helped to open."""

    round: int
    context: bytes
    participants: Flags
    shares: list[bytes | None]  # by owner: b's and ρ's share, None where a bundle did not open
    survivors: Flags | None = None  # the list that it signed


class ClientSession:
    """One client's state machine. Every method takes the server's request and returns the signed answer.

    Raises SecurityError for a request that a truthful server would not make, or that protects less than
    ``policy``, and MessageError for bytes that are none. Whatever was refused has revealed nothing; what has
    been answered once is not answered again. Memory: some 200 bytes a neighbour.
    """

    def __init__(self, name: str, identity: Identity, roster: Roster, policy: Policy) -> None:
        self.name, self.identity, self.roster, self.policy = name, identity, roster, policy
        if roster.keys[roster.place(name)] != identity.public:
            raise SecurityError(f"client {name}: the roster pins another key for this name")
        self._last_number = -1
        self._opening: _Opening | None = None
        self._session: _Session | None = None
        self._secrets: _Secrets | None = None
        self._answered: _Answered | None = None

    # -- a session ----------------------------------------------------------------------------------

    def advertise(self, request: bytes, binding: bytes) -> bytes:
        """A one-time key, after the offer was held against the policy. ``binding``: hash of the sums' terms."""
        offer = Offer.decode(request, len(self.roster))
        if offer.roster != self.roster.digest:
            raise self._refusal("the server has another roster")
        if not offer.members[self.roster.place(self.name)]:
            raise self._refusal("it is no member of the session that it was offered")
        if offer.number <= self._last_number:
            raise self._refusal(f"session {offer.number} was offered after session {self._last_number}")
        members = int(offer.members.sum())
        self.policy.check(offer.settings, members, members)
        self._last_number = offer.number
        self._session, self._secrets, self._answered = None, None, None
        self._opening = _Opening(offer, hash_of(b"offer", request, binding), KeyPair.generate())
        return signed(self.identity, self._opening.hash, "advertise", self._opening.key.public)

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
        return signed(self.identity, _session_id(opening, b""), "choose", body)

    def share(self, request: bytes) -> bytes:
        """A deposit for the round that the request names; with the others' keys if the session is to begin."""
        r = Reader(request)
        (round_,) = r.unpack("<Q")
        if self._session is None:
            self._session = self._establish(r)
            self._opening = None
        else:
            r.end()
        session, own = self._session, self._secrets
        deposit = own.deposit if own is not None and own.round == round_ else self._deposit(round_)
        return signed(self.identity, hash_of(b"deposit", session.id, round_), "share", deposit)

    def _admit(self, opening: _Opening, present: Flags) -> tuple[int, int]:
        """Takes the list of those present; returns this client's place in it, and its length."""
        members = places(opening.offer.members)
        mine = members.index(self.roster.place(self.name))
        if not present[mine]:
            raise self._refusal("it is said to be absent from a session that it takes part in")
        count = int(present.sum())
        self.policy.check(opening.offer.settings, len(members), count)
        opening.present = present
        return int(present[:mine].sum()), count

    def _establish(self, r: Reader) -> _Session:
        opening = self._begun()
        offer, settings = opening.offer, opening.offer.settings
        members = places(offer.members)
        present = r.flags(len(members))
        if opening.present is None:
            self._admit(opening, present)
        elif not np.array_equal(present, opening.present):
            raise self._refusal("the list of those present has changed")
        here = [members[i] for i in places(present)]
        place, count = here.index(self.roster.place(self.name)), len(here)
        keys = tuple(self.roster.keys[i] for i in here)
        if settings.full(count):
            adverts = r.blocks(count, KEY_BYTES + SIGNATURE_BYTES)
            id_ = _session_id(opening, b"".join(advert[:KEY_BYTES] for advert in adverts))
            holders = [i for i in range(count) if i != place]
            known = {i: self._checked(opening, here[i], adverts[i]) for i in holders}
            if adverts[place][:KEY_BYTES] != opening.key.public:
                raise self._refusal("the server lists another key for this client than its own")
            owners, partners = holders, holders
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
            owners, masking = self._in_neighbours(r, place, count, known)
            holders = sorted(opening.choice)
            partners = sorted({*opening.choice[: settings.partners], *masking})
        r.end()
        if sum(known[i] == opening.key.public for i in known):
            raise self._refusal("its own key came back as another client's")
        agreed = {i: opening.key.agree(key) for i, key in known.items()}
        return _Session(
            id_,
            settings,
            offer.first_round,
            len(members),
            present,
            place,
            keys,
            holders,
            owners,
            [derive(agreed[i], b"channel", id_, place, i) for i in holders],
            [derive(agreed[i], b"channel", id_, i, place) for i in owners],
            partners,
            [derive(agreed[i], b"chain", id_, min(i, place), max(i, place)) for i in partners],
            offer.first_round,
        )

    def _checked(self, opening: _Opening, member: int, advert: bytes) -> bytes:
        name = self.roster.names[member]
        return opened(self.roster.keys[member], opening.hash, "advertise", advert, name)

    def _in_neighbours(
        self, r: Reader, place: int, count: int, known: dict[int, bytes]
    ) -> tuple[list[int], list[int]]:
        """Those that chose this client: all of them, and those that mask with it. Adds their keys."""
        (length,) = r.unpack("<H")
        owners, masking = [], []
        for _ in range(length):
            other, masks = r.unpack("<HB")
            key = r.take(KEY_BYTES)
            if other >= count or other == place or (owners and other <= owners[-1]) or masks > 1:
                raise self._refusal("a list of neighbours that is not in order")
            if known.setdefault(other, key) != key:
                raise self._refusal(f"two keys for client {other} of one session")
            owners.append(other)
            if masks:
                masking.append(other)
        return owners, masking

    # -- a round ------------------------------------------------------------------------------------

    def answer(self, request: bytes, binding: bytes, measure: Callable[[], NDArray[Any]]) -> bytes:
        """The masked vector, and the deposit for the next round of the session.

        ``measure`` gives the vector (residues, uint32 or uint64), and is called when nothing is left to
        refuse. ``binding``: the hash of plan and terms that this client computed itself.
        """
        session, r = self._standing(), Reader(request)
        (round_,) = r.unpack("<Q")
        participants = r.flags(len(session.keys))
        self._check_round(session, round_, participants)
        owners = [i for i in session.owners if participants[i]]
        bundles = dict(zip(owners, r.blocks(len(owners), BUNDLE_BYTES), strict=True))
        r.end()
        held = [
            self._opened_bundle(session, round_, owner, key, bundles.get(owner))
            for owner, key in zip(session.owners, session.from_owner, strict=True)
        ]
        broken = sum(held[n] is None for n, owner in enumerate(session.owners) if participants[owner])
        if broken > self.policy.colluders(session.members):
            raise self._refusal(
                f"{broken} bundles of shares do not open: they were exchanged, replayed or made for another"
            )
        vector = measure()
        ring_bits = 8 * vector.dtype.itemsize
        context = round_context(session.id, round_, bits(participants), binding, ring_bits, len(vector))
        own = self._secrets
        if own is None or own.round != round_:
            raise self._refusal(f"it has no masks for round {round_}, or has used them")
        self._secrets = None
        vector = vector + mask(derive(own.seed, context), len(vector), vector.dtype)
        for partner, root in own.roots.items():
            if participants[partner]:
                noise = mask(derive(root, context), len(vector), vector.dtype)
                vector = vector + noise if session.place < partner else vector - noise
        self._answered = _Answered(round_, context, participants, held)
        more = round_ + 1 < session.first_round + session.settings.rounds
        next_ = self._deposit(round_ + 1) if more else b""
        return signed(self.identity, context, "answer", ring_bytes(vector) + next_)

    def confirm(self, request: bytes) -> bytes:
        """This client's signature under the list of survivors: one list a round."""
        session, answered = self._standing(), self._pending()
        r = Reader(request)
        survivors = r.flags(len(session.keys))
        r.end()
        self._check_survivors(session, answered, survivors)
        if not session.settings.consistency or answered.survivors is not None:
            raise self._refusal("it was asked to sign a list of survivors twice, or in a session without")
        answered.survivors = survivors
        return signed(self.identity, answered.context, "confirm", bits(survivors))[-SIGNATURE_BYTES:]

    def unmask(self, request: bytes) -> bytes:
        """One kind of share of every participant whose shares it holds: b's where it answered, else ρ's."""
        session, answered = self._standing(), self._pending()
        r = Reader(request)
        survivors = r.flags(len(session.keys))
        self._check_survivors(session, answered, survivors)
        if session.settings.consistency:
            self._check_signatures(session, answered, survivors, r)
        r.end()
        self._answered = None  # from here on there is nothing more to open in this round
        kinds = [
            None if held is None else held[:SECRET_BYTES] if survivors[owner] else held[SECRET_BYTES:]
            for owner, held in zip(session.owners, answered.shares, strict=True)
            if answered.participants[owner]
        ]
        there = np.array([kind is not None for kind in kinds], bool)
        body = bits(there) + b"".join(kind for kind in kinds if kind is not None)
        return signed(self.identity, answered.context, "unmask", body)

    # -- inside -------------------------------------------------------------------------------------

    def _deposit(self, round_: int) -> bytes:
        """Fresh secrets for a round, their shares sealed for the holders. Turns the chains past the round."""
        s = self._standing()
        if not max(s.turned, s.first_round) <= round_ < s.first_round + s.settings.rounds:
            raise self._refusal(f"round {round_} lies outside this session, or had its deposit already")
        for _ in range(s.turned, round_):
            s.chains = [derive(chain, b"next") for chain in s.chains]
        roots = [derive(chain, b"root") for chain in s.chains]
        s.chains = [derive(chain, b"next") for chain in s.chains]
        s.turned = round_ + 1
        seed, rho = random_bytes(SECRET_BYTES), random_bytes(SECRET_BYTES)
        shares = [share(secret, s.settings.threshold, len(s.holders)) for secret in (seed, rho)]
        pairs = [(b.tobytes(), p.tobytes()) for b, p in zip(*shares, strict=True)]
        tags, bundles = [], []
        for holder, channel, pair in zip(s.holders, s.to_holder, pairs, strict=True):
            tags += [share_tag(s.id, round_, s.place, holder, kind, pair[kind]) for kind in (0, 1)]
            associated = bundle_context(s.id, round_, s.place, holder)
            bundles.append(seal(channel, round_, pair[0] + pair[1], associated))
        deposit = Deposit(
            commitment_to(s.id, round_, s.place, seed),
            seal(derive(rho, b"roots"), 0, b"".join(roots), roots_context(s.id, round_, s.place)),
            b"".join(tags),
            bundles,
        ).encode()
        self._secrets = _Secrets(round_, seed, dict(zip(s.partners, roots, strict=True)), deposit)
        return deposit

    def _opened_bundle(
        self, s: _Session, round_: int, owner: int, key: bytes, bundle: bytes | None
    ) -> bytes | None:
        if bundle is None:
            return None
        try:
            return open_sealed(key, round_, bundle, bundle_context(s.id, round_, owner, s.place))
        except SecurityError:
            return None

    def _check_round(self, s: _Session, round_: int, participants: Flags) -> None:
        if self._secrets is None or self._secrets.round != round_:
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

    def _check_survivors(self, s: _Session, answered: _Answered, survivors: Flags) -> None:
        if (survivors & ~answered.participants).any():
            raise self._refusal("a client that did not take part is said to have survived")
        if not survivors[s.place]:
            raise self._refusal("it is said to have dropped out, and has answered")
        least = max(self.policy.least, s.settings.least)
        if int(survivors.sum()) < least:
            raise self._refusal(f"a sum over {int(survivors.sum())} clients: at least {least}")
        if answered.survivors is not None and not np.array_equal(survivors, answered.survivors):
            raise self._refusal("another list of survivors than the one that it signed")

    def _check_signatures(self, s: _Session, answered: _Answered, survivors: Flags, r: Reader) -> None:
        if answered.survivors is None:
            raise self._refusal("it was asked to unmask before the survivors were confirmed")
        signers = places(r.flags(len(s.keys)))
        signatures = r.blocks(len(signers), SIGNATURE_BYTES)
        quorum = self.policy.quorum(s.members, len(s.keys))
        message = hash_of(b"message", answered.context, b"confirm", bits(survivors))
        good = 0
        for place, signature in zip(signers, signatures, strict=True):
            good += place == s.place or verify(s.keys[place], signature, message)
            if good >= quorum:
                return
        raise self._refusal(f"{good} clients signed this list of survivors: {quorum} are needed")

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


def _session_id(opening: _Opening, keys: bytes) -> bytes:
    assert opening.present is not None
    return session_id(opening.hash, bits(opening.present), keys)
