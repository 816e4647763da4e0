"""The server's half of secure aggregation: it relays, adds up, and takes off the masks of the sum.

It is the party that is not trusted: nothing here protects anybody, all of that is in ``client``. What this
half owes its user is to end in the right sum or in a named error: it checks who made a message, every opened
secret against what its owner committed to, and where that fails every share against its tag.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.errors import AggregationError, MessageError, SecurityError
from baffle.secagg.messages import (
    SHORT_TAG,
    TOKEN_BYTES,
    Blinded,
    Deposit,
    Offer,
    Reader,
    advertised,
    bits,
    commitment_to,
    deposit_context,
    places,
    ring_dtype,
    ring_vector,
    share_tag,
    untagged,
    xor,
)
from baffle.secagg.primitives import (
    KEY_BYTES,
    TAG_BYTES,
    KeyPair,
    derive,
    hash_of,
    mask,
    open_sealed,
)
from baffle.secagg.session import Flags, Policy, Roster, Settings, round_context, session_id
from baffle.secagg.sharing import SECRET_BYTES, reconstruct_many

Requests = tuple[str, dict[str, bytes]]  # a stage's name, and client → its own bytes


class ServerSession:
    """One key agreement, and what its rounds leave for the next ones.

    ``members`` are the clients that the session is offered to; ``binding`` the hash of the sums' terms.
    Raises ConfigError or SecurityError, before anything is sent, for settings below ``policy``.
    """

    def __init__(
        self,
        roster: Roster,
        members: Sequence[str],
        settings: Settings,
        policy: Policy,
        *,
        job: bytes,
        first_round: int,
        binding: bytes,
    ) -> None:
        flags = np.zeros(len(roster), bool)
        for name in members:
            flags[roster.place(name)] = True
        policy.check(settings, len(members), len(members))
        self.roster, self.settings, self.policy = roster, settings, policy
        self.first_round, self.members = first_round, len(members)
        self._offered = frozenset(members)
        self._member_places = places(flags)
        self._pair = KeyPair.generate()
        self._offer = Offer(job, first_round, settings, self._pair.public, roster.digest, flags).encode()
        self._offer_hash = hash_of(b"offer", self._offer, binding)
        self._stage = ""
        self._adverts: dict[int, bytes] = {}  # by place in the roster ...
        self._agreed: dict[int, bytes] = {}  # ... and what was agreed on with their keys
        self._choices: dict[int, list[int]] = {}  # by place in the session
        self.names: tuple[str, ...] = ()  # of those present; places count them
        self._place: dict[str, int] = {}
        self._full = True
        self.id = b""
        self.holders: list[list[int]] = []
        self.owners: list[list[int]] = []
        self.partners: list[list[int]] = []
        self.deposits: dict[int, Deposit] = {}  # for the round to come, by place
        self._introduced: set[int] = set()
        self._introductions: dict[
            int, bytes
        ] = {}  # by place, the hash of what a client was told of the others

    @property
    def last_round(self) -> int:
        return self.first_round + self.settings.rounds - 1

    def serves(self, round_: int, names: Sequence[str]) -> bool:
        """Whether a round of these clients needs no new key agreement.

        Who was invited and did not come waits for the next session.
        """
        return bool(self.holders) and round_ <= self.last_round and self._offered.issuperset(names)

    # -- key agreement ------------------------------------------------------------------------------

    def stages(self) -> Iterator[Requests]:
        """advertise, and choose where not everybody holds everybody's shares."""
        self._stage = "advertise"
        yield "advertise", {self.roster.names[i]: self._offer for i in self._member_places}
        here = sorted(self._adverts)
        self._check_present(len(here))
        present = np.isin(np.array(self._member_places), here)
        self.present = bits(present)
        self.names = tuple(self.roster.names[i] for i in here)
        self._place = {name: place for place, name in enumerate(self.names)}
        count = len(here)
        self._full = self.settings.full(count)
        self._advert = [self._adverts[i] for i in here]
        one_time = b"".join(advert[:KEY_BYTES] for advert in self._advert) if self._full else b""
        self.id = session_id(self._offer_hash, self.present, one_time)
        self.keys = [derive(self._agreed[i], b"server", self.id) for i in here]
        if self._full:
            everyone = list(range(count))
            self.holders = [everyone[:i] + everyone[i + 1 :] for i in everyone]
            self.owners, self.partners = self.holders, self.holders
        else:
            self._stage = "choose"
            yield "choose", dict.fromkeys(self.names, self.present)
            self._settle(count)
        self._stage = ""

    def _check_present(self, count: int) -> None:
        try:
            self.policy.check(self.settings, self.members, count)
        except SecurityError as error:
            raise AggregationError(
                f"{count} of {self.members} clients advertised keys, too few: {error}"
            ) from error

    def _settle(self, count: int) -> None:
        """Holders, owners and masking partners from the clients' choices. Who chose nobody takes no part."""
        self._check_present(len(self._choices))
        self.holders = [sorted(self._choices.get(i, [])) for i in range(count)]
        self.owners = [[] for _ in range(count)]
        for owner, choice in self._choices.items():
            for holder in choice:
                self.owners[holder].append(owner)
        for owners in self.owners:
            owners.sort()
        self.partners = [sorted({*a, *b}) for a, b in zip(self.holders, self.owners, strict=True)]

    def add(self, name: str, message: bytes) -> None:
        """Takes an answer of the key agreement."""
        if self._stage == "advertise":
            place = self.roster.place(name)
            if name not in self._offered:
                raise SecurityError(f"client {name} is no member of this session")
            if place in self._adverts:
                raise SecurityError(f"client {name} advertised twice")
            key = advertised(self.roster.keys[place], self._offer_hash, message, name)
            self._agreed[place] = self._pair.agree(key)  # raises where nothing can be agreed on with it
            self._adverts[place] = message
        elif self._stage == "choose":
            place = self.place(name)
            body = untagged(self.keys[place], self.id, "choose", message, name)
            choice = np.frombuffer(body, "<u2").tolist() if len(body) % 2 == 0 else []
            fits = len(set(choice)) == len(choice) == self.settings.degree
            if not fits or place in choice or max(choice) >= len(self.names) or place in self._choices:
                raise SecurityError(f"client {name}: a choice of holders that cannot be")
            self._choices[place] = choice
        else:
            raise MessageError(f"client {name} answered where nothing was asked")

    # -- deposits -----------------------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        """Whether a client is present."""
        return name in self._place

    def place(self, name: str) -> int:
        if name not in self._place:
            raise SecurityError(f"client {name} is not present in this session")
        return self._place[name]

    def share_request(self, place: int, round_: int) -> bytes:
        """What a client needs for its deposit: the round, and the first time the others' keys."""
        head = struct.pack("<Q", round_)
        if place in self._introduced:
            return head
        introduction = self._introduction(place)
        self._introductions[place] = hash_of(introduction)
        return head + introduction

    def _introduction(self, place: int) -> bytes:
        """Who is present, and the keys of all or of a client's neighbours."""
        if self._full:
            return b"".join((self.present, *self._advert))
        chosen = [self._advert[i] for i in self._choices[place]]
        owners = [struct.pack("<H", i) + self._advert[i][:KEY_BYTES] for i in self.owners[place]]
        return b"".join((self.present, *chosen, struct.pack("<H", len(owners)), *owners))

    def lacking(self, names: Sequence[str]) -> list[int]:
        """Places of those of ``names`` that can take part and have made no deposit yet."""
        here = [self._place[name] for name in names if name in self._place]
        return sorted(i for i in here if i not in self.deposits and self.holders[i])

    def add_deposit(self, name: str, round_: int, message: bytes) -> None:
        place = self.place(name)
        # Those that chose a client are told to it unsigned: its code is over what it heard.
        context = hash_of(self.id, round_, self._introductions.get(place, b""))
        body = untagged(self.keys[place], context, "share", message, name)
        r = Reader(body)
        self.deposits[place] = self.read_deposit(place, r)
        r.end()
        self._introduced.add(place)

    def read_deposit(self, place: int, r: Reader) -> Deposit:
        return Deposit.read(r, len(self.holders[place]), len(self.partners[place]))

    def exclude(self, place: int) -> None:
        """A client whose secrets cannot be opened: its holders and shares count, its answers no longer."""
        self.holders[place] = []
        self.deposits.pop(place, None)


class ServerRound:
    """One round of a session: a masked sum, and the way to its opening.

    ``binding`` hashes plan and terms; ``ring_bits`` is 32 or 64; ``length`` that of the vectors, by default
    the first one's. Use: for each of ``stages()``, ask, ``add`` what comes; then ``close``. Raises
    AggregationError where the round cannot end in the right sum; the session goes on. Memory: one vector, and
    some kilobytes a client.
    """

    def __init__(
        self,
        session: ServerSession,
        round_: int,
        names: Sequence[str],
        binding: bytes,
        ring_bits: int,
        length: int | None = None,
    ) -> None:
        self.session, self.round, self._names = session, round_, names
        self._binding, self._dtype = binding, ring_dtype(ring_bits)
        self._length = length
        self._stage = ""
        self._deposits: dict[int, Deposit] = {}
        self._blinded: dict[int, Blinded] = {}  # of the survivors
        self._participants: Flags = np.zeros(0, bool)
        self._context = b""
        self._total: NDArray[Any] | None = None
        self._survivors: Flags = np.zeros(0, bool)
        self._tokens: dict[int, dict[int, bytes]] = {}  # owner → holder → its word that the owner is alive
        self._quorum = 0
        self._confirmed: set[int] = set()
        self._opened: set[int] = set()
        self._given: dict[int, list[tuple[int, bytes]]] = {}  # owner → (holder, its share or pad)

    # -- asking -------------------------------------------------------------------------------------

    def stages(self) -> Iterator[Requests]:
        """share where a deposit is lacking, answer, confirm if agreed so, unmask."""
        s = self.session
        lacking = s.lacking(self._names)
        if lacking:
            self._stage = "share"
            yield "share", {s.names[i]: s.share_request(i, self.round) for i in lacking}
        self._take_part()
        self._quorum = s.policy.quorum(s.settings, s.members, len(s.names))
        self._stage = "answer"
        yield "answer", self._answer_requests()
        self._check_survivors()
        alive = places(self._survivors)
        statuses = {i: bits(self._survivors[self._owners_of(i)]) for i in alive}
        if s.settings.consistency:
            self._stage = "confirm"
            yield "confirm", {s.names[i]: statuses[i] for i in alive}
            # Whom too few vouch for would refuse to open anything: it is left alone, and counts as alive.
            words = self._words()
            statuses = {i: statuses[i] + words[i] for i in alive if i in words}
        self._stage = "unmask"
        yield "unmask", {s.names[i]: request for i, request in statuses.items()}
        self._stage = ""

    def _take_part(self) -> None:
        """Those that made a deposit and whose secrets enough others can open. Their deposits are used up."""
        s = self.session
        wanted = {s.place(name) for name in self._names if s.knows(name)}
        deposits, s.deposits = s.deposits, {}  # for this round and no other, whatever becomes of it
        here = {i for i in wanted if i in deposits}
        while True:  # who has too few holders left leaves, which may leave others with too few
            short = {i for i in here if sum(j in here for j in s.holders[i]) < s.settings.threshold}
            if not short:
                break
            here -= short
        if len(here) < s.settings.least:
            raise AggregationError(
                f"round {self.round}: {len(here)} clients can take part, {s.settings.least} are needed"
            )
        self._deposits = {i: deposits[i] for i in here}
        self._contexts = {i: deposit_context(s.id, self.round, i) for i in here}
        self._participants = np.zeros(len(s.names), bool)
        self._participants[list(here)] = True

    def _answer_requests(self) -> dict[str, bytes]:
        s = self.session
        head = struct.pack("<Q", self.round) + bits(self._participants)
        inbox: dict[int, list[bytes]] = {i: [head] for i in self._deposits}
        for owner in sorted(self._deposits):
            for holder, bundle in zip(s.holders[owner], self._deposits[owner].bundles, strict=True):
                if holder in inbox:
                    inbox[holder].append(bundle)
        for deposit in self._deposits.values():
            deposit.bundles.clear()
        return {s.names[i]: b"".join(parts) for i, parts in inbox.items()}

    def _check_survivors(self) -> None:
        s, count = self.session, int(self._survivors.sum()) if self._total is not None else 0
        needed = max(s.settings.least, s.settings.threshold + 1)  # nobody holds shares of its own
        if count < needed:
            raise AggregationError(
                f"round {self.round}: {count} of {int(self._participants.sum())} clients answered, "
                f"{needed} are needed: nothing was opened"
            )

    def _owners_of(self, holder: int) -> list[int]:
        return [i for i in self.session.owners[holder] if self._participants[i]]

    def _words(self) -> dict[int, bytes]:
        """What a client asks for before it opens anything: tokens of its holders, that it is alive."""
        s, found = self.session, {}
        for owner, tokens in self._tokens.items():
            holders = s.holders[owner]
            if len(tokens) >= self._quorum:
                told = np.array([holder in tokens for holder in holders], bool)
                found[owner] = bits(told) + b"".join(tokens[i] for i in holders if i in tokens)
        if len(found) < s.settings.least:
            raise AggregationError(
                f"round {self.round}: {len(found)} clients have {self._quorum} holders that say they are "
                f"alive, {s.settings.least} are needed: nothing was opened"
            )
        return found

    # -- taking -------------------------------------------------------------------------------------

    def add(self, name: str, message: bytes) -> None:
        """Takes one client's answer to the stage that was asked last.

        Raises SecurityError or MessageError, and is as before, where it does not fit: that client then counts
        as one that dropped out.
        """
        s = self.session
        if self._stage == "share":
            s.add_deposit(name, self.round, message)
            return
        place = s.place(name)
        if self._stage == "answer":
            self._add_answer(name, place, message)
        elif self._stage == "confirm":
            self._add_tokens(name, place, message)
        elif self._stage == "unmask":
            self._add_shares(name, place, message)
        else:
            raise MessageError(f"client {name} answered where nothing was asked")

    def _add_answer(self, name: str, place: int, message: bytes) -> None:
        s = self.session
        if not self._participants[place] or (self._total is not None and self._survivors[place]):
            raise SecurityError(f"client {name} takes no part in round {self.round}, or answered twice")
        more = self.round < s.last_round
        holders, partners = len(s.holders[place]), len(s.partners[place])
        behind = Blinded.size(holders) + (Deposit.size(holders, partners) if more else 0)
        size = len(message) - TAG_BYTES - behind
        length, odd = divmod(size, self._dtype.itemsize)
        if size <= 0 or odd or length != (self._length or length):
            raise MessageError(f"client {name}: a masked vector of {size} bytes")
        context = round_context(
            s.id, self.round, bits(self._participants), self._binding, 8 * self._dtype.itemsize, length
        )
        body = untagged(s.keys[place], context, "answer", message, name)
        r = Reader(body)
        vector = ring_vector(r.take(size), self._dtype)
        blinded = Blinded.read(r, holders)
        if more:
            s.deposits[place] = s.read_deposit(place, r)
        r.end()
        if self._total is None:
            self._total, self._context, self._length = vector.copy(), context, length
            self._survivors = np.zeros(len(s.names), bool)
        else:
            self._total += vector
        self._survivors[place] = True
        self._blinded[place] = blinded

    def _add_tokens(self, name: str, place: int, message: bytes) -> None:
        s, owners = self.session, [i for i in self._owners_of(place) if self._survivors[i]]
        if not self._survivors[place] or place in self._confirmed:
            raise SecurityError(f"client {name} is not asked who is alive, or has said it already")
        r = Reader(untagged(s.keys[place], self._context, "confirm", message, name))
        tokens = r.blocks(len(owners), TOKEN_BYTES)
        r.end()
        self._confirmed.add(place)
        for owner, token in zip(owners, tokens, strict=True):
            self._tokens.setdefault(owner, {})[place] = token

    def _add_shares(self, name: str, place: int, message: bytes) -> None:
        s = self.session
        if not self._survivors[place] or place in self._opened:
            raise SecurityError(f"client {name} is not asked for shares, or sent them already")
        r = Reader(untagged(s.keys[place], self._context, "unmask", message, name))
        owners = self._owners_of(place)
        there = r.flags(len(owners))
        given = [owner for owner, flag in zip(owners, there, strict=True) if flag]
        shares = r.blocks(len(given), SECRET_BYTES)
        r.end()
        self._opened.add(place)
        for owner, value in zip(given, shares, strict=True):
            self._given.setdefault(owner, []).append((place, value))

    def _share(self, owner: int, holder: int, value: bytes) -> tuple[int, bytes]:
        """The place of a holder among its owner's, and the share that its share or its pad stands for."""
        position = bisect.bisect_left(self.session.holders[owner], holder)
        if self._survivors[owner]:
            at = SECRET_BYTES * position
            value = xor(value, self._blinded[owner].shares[at : at + SECRET_BYTES])
        return position, value

    def _true(self, owner: int) -> list[tuple[int, bytes]]:
        """What was given for an owner's secret by those whose share is the owner's."""
        survived = bool(self._survivors[owner])
        tags = (self._blinded if survived else self._deposits)[owner].tags
        found = []
        for holder, value in self._given.get(owner, ()):
            position, share = self._share(owner, holder, value)
            tag = tags[SHORT_TAG * position : SHORT_TAG * (position + 1)]
            if share_tag(self._contexts[owner], holder, not survived, share) == tag:
                found.append((holder, value))
        return found

    # -- the sum ------------------------------------------------------------------------------------

    def close(self) -> tuple[NDArray[Any], list[str]]:
        """The sum of the survivors' vectors in the ring, and their names."""
        s, total = self.session, self._total
        if total is None or self._stage:
            raise AggregationError(f"round {self.round}: the stages did not run to their end")
        alive = places(self._survivors)
        gone = [
            i
            for i in places(self._participants & ~self._survivors)
            if any(self._survivors[j] for j in s.partners[i])
        ]
        threshold = s.settings.threshold
        rows = {i: self._given.get(i, [])[:threshold] for i in (*alive, *gone)}
        secrets = self._joined({i: row for i, row in rows.items() if len(row) == threshold})
        for i in alive:
            (seed,) = self._opened_with(i, secrets.get(i)) or self._opened_truly(i)
            total -= mask(derive(seed, self._context), len(total), self._dtype)
        for i in gone:
            roots = self._opened_with(i, secrets.get(i)) or self._opened_truly(i)
            for partner, root in zip(s.partners[i], roots, strict=True):
                if self._survivors[partner]:
                    noise = mask(derive(root, self._context), len(total), self._dtype)
                    # The partner, who survived, added it if its place is the lower one.
                    if partner < i:
                        total -= noise
                    else:
                        total += noise
        return total, [s.names[i] for i in alive]

    def _joined(self, rows: dict[int, list[tuple[int, bytes]]]) -> dict[int, bytes]:
        """Owner → the secret that t shares give, right or wrong."""
        if not rows:
            return {}
        pairs = [[self._share(i, *given) for given in row] for i, row in rows.items()]
        points = np.array([[position + 1 for position, _ in row] for row in pairs], np.uint8)
        shares = np.frombuffer(b"".join(share for row in pairs for _, share in row), np.uint8)
        found = reconstruct_many(points, shares.reshape(*points.shape, SECRET_BYTES))
        return {i: secret.tobytes() for i, secret in zip(rows, found, strict=True)}

    def _opened_with(self, owner: int, secret: bytes | None) -> list[bytes] | None:
        """A survivor's seed, another's pairwise roots; None where this is not the secret."""
        context = self._contexts[owner]
        if secret is None:
            return None
        if self._survivors[owner]:
            return [secret] if commitment_to(context, secret) == self._blinded[owner].commitment else None
        try:
            roots = open_sealed(derive(secret, b"roots"), 0, self._deposits[owner].sealed, context)
        except SecurityError:
            return None
        return Reader(roots).blocks(len(self.session.partners[owner]), KEY_BYTES)

    def _opened_truly(self, owner: int) -> list[bytes]:
        """The same from those shares that are true: looked at one by one only where some were not."""
        threshold, came = self.session.settings.threshold, len(self._given.get(owner, ()))
        true = self._true(owner)
        why = f"of {came} shares {len(true)} are its own, and {threshold} are needed"
        if len(true) >= threshold:
            found = self._opened_with(owner, self._joined({owner: true[:threshold]})[owner])
            if found is not None:
                return found
            why = "its shares do not open what it deposited"
            if self._survivors[owner]:
                why = "its shares give another secret than the one that it committed to"
        asked = sum(holder in self._opened for holder in self.session.holders[owner])
        if asked >= threshold:  # not for want of answers: it lied, or many of its holders
            self.session.exclude(owner)
        raise self._unopened(owner, why)

    def _unopened(self, place: int, why: str) -> AggregationError:
        return AggregationError(
            f"round {self.round}: the masks of client {self.session.names[place]} cannot be taken off: "
            f"{why}; no sum is given"
        )
