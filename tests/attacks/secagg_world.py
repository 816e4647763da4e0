"""A federation in memory, for tests: real clients and a real server, stage by stage, with hands on the wire.

``World`` runs honest parties, and lets a test change or drop any message. ``Liar`` is a server that lies: it
uses the real clients' answers as it likes, and counts what they add up to.
"""

from __future__ import annotations

import copy
import struct
from dataclasses import dataclass, field

import numpy as np

from baffle.errors import BaffleError
from baffle.secagg.client import ClientSession
from baffle.secagg.client import _pad as pad
from baffle.secagg.client import _token as token
from baffle.secagg.messages import (
    SHORT_TAG,
    TOKEN_BYTES,
    Blinded,
    Deposit,
    Reader,
    bits,
    deposit_context,
    ring_vector,
    share_tag,
    xor,
)
from baffle.secagg.primitives import KEY_BYTES, TAG_BYTES, Identity, derive, mask, open_sealed
from baffle.secagg.server import ServerRound, ServerSession
from baffle.secagg.session import Policy, Roster, Settings, round_context
from baffle.secagg.sharing import SECRET_BYTES, reconstruct

JOB, TERMS, PLAN = b"j" * 32, b"t" * 32, b"p" * 32
SETUP = ("advertise", "choose")
STAGES = ("share", "answer", "confirm", "unmask")


def names_of(count):
    return [f"c{i:03d}" for i in range(count)]


@dataclass
class World:
    """``request`` and ``reply`` take (stage, name, bytes) and give the bytes to go on with, None for none."""

    settings: Settings
    count: int
    policy: Policy = field(default_factory=lambda: Policy(least=2, corrupt=0.0))
    first_round: int = 0
    dtype: type = np.uint64
    identities: dict | None = None

    def __post_init__(self):
        self.names = names_of(self.count)
        self.identities = self.identities or {name: Identity.generate() for name in self.names}
        self.roster = Roster({name: self.identities[name].public for name in self.names})
        self.clients = {name: self.client(name) for name in self.names}
        self.server = self.session()
        self.log = []  # (round, stage, up or down, name, bytes)
        self.refused = {}  # (stage, name): the client's or the server's error
        self.request = self.reply = lambda stage, name, data: data
        self.order = sorted  # in which the answers of a stage arrive

    def client(self, name):
        return ClientSession(name, self.identities[name], self.roster, self.policy)

    def session(self, **options):
        given = {"job": JOB, "first_round": self.first_round, "binding": TERMS, **options}
        return ServerSession(self.roster, self.names, self.settings, self.policy, **given)

    def agree(self):
        self._run(-1, self.server.stages(), self.server.add, None)

    def round(self, number, vectors, names=None):
        """(sum, names of those in it). Raises what the server raises."""
        round_ = ServerRound(
            self.server, number, names or self.names, PLAN, 8 * np.dtype(self.dtype).itemsize
        )
        self._run(number, round_.stages(), round_.add, vectors)
        return round_.close()

    def call(self, stage, name, data, number=0, vector=None):
        client = self.clients[name]
        if stage == "advertise":
            return client.advertise(data, TERMS)
        if stage == "answer":
            return client.answer(data, number, PLAN, lambda: vector)
        return getattr(client, stage)(data)

    def _run(self, number, stages, add, vectors):
        for stage, requests in stages:
            answers = []
            for name, request in requests.items():
                request = self.request(stage, name, request)
                if request is None:
                    continue
                self.log.append((number, stage, "down", name, request))
                try:
                    answer = self.call(stage, name, request, number, vectors[name] if vectors else None)
                except BaffleError as error:
                    self.refused[stage, name] = error
                    continue
                self.log.append((number, stage, "up", name, answer))
                answer = self.reply(stage, name, answer)
                if answer is not None:
                    answers.append((name, answer))
            for name, answer in self.order(answers):
                try:
                    add(name, answer)
                except BaffleError as error:
                    self.refused[stage, name] = error

    def drop(self, plan):
        """``plan``: stage → names whose answer to it does not arrive, nor any later one of the round."""

        def reply(stage, name, data):
            gone = any(name in plan.get(s, ()) for s in _until(stage))
            return None if gone else data

        self.reply = reply


def _until(stage):
    row = SETUP + STAGES
    return row[: row.index(stage) + 1]


def draw(rng, names, length, dtype):
    high = int(np.iinfo(dtype).max)
    return {name: rng.integers(0, high, length, dtype=dtype, endpoint=True) for name in names}


def total(vectors, names):
    """The oracle: Python's integers."""
    names = list(names)
    dtype = vectors[names[0]].dtype
    rows = zip(*(vectors[name].tolist() for name in names), strict=True)
    return np.array([sum(row) % (1 << (8 * dtype.itemsize)) for row in rows], dtype)


# -- a server that lies -----------------------------------------------------------------------------


@dataclass
class Liar:
    """A server that agreed on keys as it should, and shows every client its own picture of a round.

    ``colluders``, by place, tell it all they know: their shares of both kinds, and their roots.
    """

    world: World
    colluders: tuple = ()
    number: int = 0

    def __post_init__(self):
        w = self.world
        w.agree()
        self.s = s = w.server
        for i in range(len(s.names)):
            s.add_deposit(s.names[i], self.number, self.client(i).share(s.share_request(i, self.number)))
        self.deposits = {i: Deposit(d.sealed, d.tags, list(d.bundles)) for i, d in s.deposits.items()}
        self.keys = {c: dict(self.client(c)._secrets.keys) for c in self.colluders}
        self.roots = {c: {i: derive(k, b"root") for i, k in keys.items()} for c, keys in self.keys.items()}
        self.contexts, self.masked, self.lists, self.blinded = {}, {}, {}, {}
        self.words = [{}, {}]  # pads for b, and shares of ρ: owner → {holder: 32 bytes}
        for c in self.colluders:
            client = self.client(c)
            for owner in client._session.owners:
                bundle = self.bundle(owner, c)
                share = client._opened_bundle(client._session, client._secrets, owner, bundle)
                self.words[1].setdefault(owner, {})[c] = share
        self.honest = [i for i in range(len(s.names)) if i not in self.colluders]

    def client(self, place):
        return self.world.clients[self.s.names[place]]

    def bundle(self, owner, holder):
        return self.deposits[owner].bundles[self.s.holders[owner].index(holder)]

    def answer_request(self, place, participants):
        flags = np.isin(np.arange(len(self.s.names)), list(participants))
        head = struct.pack("<Q", self.number) + bits(flags)
        owners = [o for o in self.s.owners[place] if flags[o]]
        return head + b"".join(self.bundle(o, place) for o in owners)

    def answer(self, place, participants, vector):
        """Raises what the client raises."""
        message = self.client(place).answer(
            self.answer_request(place, participants), self.number, PLAN, lambda: vector
        )
        flags = np.isin(np.arange(len(self.s.names)), list(participants))
        self.lists[place] = set(participants)
        self.contexts[place] = round_context(
            self.s.id, self.number, bits(flags), PLAN, 8 * vector.dtype.itemsize, len(vector)
        )
        self.masked[place] = ring_vector(message[: vector.nbytes], vector.dtype)
        self.blinded[place] = Blinded.read(Reader(message, vector.nbytes), len(self.s.holders[place]))
        for c in set(self.colluders) & set(self.s.holders[place]):
            word = pad(self.keys[c][place], place, c, self.contexts[place])
            self.words[0].setdefault(place, {})[c] = word

    def statuses(self, place, dead):
        owners = [o for o in self.s.owners[place] if o in self.lists[place]]
        return owners, bits(np.array([o not in dead for o in owners], bool))

    def confirm(self, place, dead):
        """Tokens for the owners that are not ``dead``: {owner: token}."""
        owners, flags = self.statuses(place, dead)
        body = self.client(place).confirm(flags)[:-TAG_BYTES]
        there = [o for o in owners if o not in dead]
        return dict(zip(there, Reader(body).blocks(len(there), TOKEN_BYTES), strict=True))

    def unmask(self, place, dead, tokens=None):
        """Takes the shares that the client opens. ``tokens``: holder → what it said of this client."""
        owners, request = self.statuses(place, dead)
        if tokens is not None:
            holders = self.s.holders[place]
            told = np.array([h in tokens for h in holders], bool)
            request += bits(told) + b"".join(tokens[h] for h in holders if h in tokens)
        r = Reader(self.client(place).unmask(request)[:-TAG_BYTES])
        given = [o for o, flag in zip(owners, r.flags(len(owners)), strict=True) if flag]
        for owner, share in zip(given, r.blocks(len(given), SECRET_BYTES), strict=True):
            self.words[int(owner in dead)].setdefault(owner, {})[place] = share

    def said(self, heard):
        """owner → {holder: token}, as far as they are of the owner's context. ``heard``: place → ``dead``.

        Colluders say whatever the server likes.
        """
        found = {}
        for place, dead in heard.items():
            for owner, word in self.confirm(place, dead).items():
                if self.contexts.get(owner) == self.contexts[place]:
                    found.setdefault(owner, {})[place] = word
        for c in self.colluders:
            for owner in set(self.s.owners[c]) & set(self.contexts):
                word = token(self.keys[c][owner], owner, c, self.contexts[owner])
                found.setdefault(owner, {})[c] = word
        return found

    # -- what it learns -----------------------------------------------------------------------------

    def shares(self, kind, owner):
        """holder → share: those that the owner's tags know."""
        held, s = {}, self.s
        for holder, word in self.words[kind].get(owner, {}).items():
            at = s.holders[owner].index(holder)
            if kind == 0:
                if owner not in self.blinded:
                    continue
                blind = self.blinded[owner].shares[at * SECRET_BYTES : (at + 1) * SECRET_BYTES]
                word, tags = xor(word, blind), self.blinded[owner].tags
            else:
                tags = self.deposits[owner].tags
            tag = share_tag(deposit_context(s.id, self.number, owner), holder, kind, word)
            if tag == tags[at * SHORT_TAG : (at + 1) * SHORT_TAG]:
                held[holder] = word
        return held

    def secret(self, kind, owner):
        held, t = self.shares(kind, owner), self.s.settings.threshold
        if len(held) < t:
            return None
        chosen = sorted(held)[:t]
        points = [self.s.holders[owner].index(h) + 1 for h in chosen]
        return reconstruct(points, np.stack([np.frombuffer(held[h], np.uint8) for h in chosen]))

    def opened(self):
        """Every set of honest clients whose vectors' sum it can tell, smallest first: [(places, sum)].

        Two answers hang together where a mask between them stays closed and is the same on both sides. What
        hangs together opens as one, if every self-mask in it opens and no closed mask leads out of it.
        """
        s, seeds, roots = self.s, {}, copy.deepcopy(self.roots)
        for i in self.honest:
            seed, rho = self.secret(0, i), self.secret(1, i)
            if seed is not None:
                seeds[i] = seed
            if rho is not None:
                sealed, about = self.deposits[i].sealed, deposit_context(s.id, self.number, i)
                body = open_sealed(derive(rho, b"roots"), 0, sealed, about)
                roots[i] = dict(
                    zip(s.partners[i], Reader(body).blocks(len(s.partners[i]), KEY_BYTES), strict=True)
                )
        bare, closed = {}, {}
        for i, masked in self.masked.items():
            if i not in seeds:
                continue
            context, vector = self.contexts[i], masked.copy()
            vector -= mask(derive(seeds[i], context), len(vector), vector.dtype)
            closed[i] = set()
            for j in s.partners[i]:
                if j not in self.lists[i]:
                    continue
                root = roots[i][j] if i in roots else roots[j][i] if j in roots else None
                if root is None:
                    closed[i].add(j)
                else:
                    noise = mask(derive(root, context), len(vector), vector.dtype)
                    vector = vector - noise if i < j else vector + noise
            bare[i] = vector
        found, left = [], set(bare)
        while left:
            group, border = set(), {left.pop()}
            sound = True
            while border:
                i = border.pop()
                group.add(i)
                for j in closed[i] - group:
                    if j in bare and self.contexts[j] == self.contexts[i]:
                        border.add(j)
                    else:
                        sound = False
            left -= group
            if sound:
                found.append((sorted(group), sum((bare[i] for i in group), np.zeros_like(vector))))
        return sorted(found, key=lambda pair: len(pair[0]))


def split_views(honest, left):
    """The most clients that are called dead with effect, where survivors may be split: [dead of each].

    Each of the honest clients, places 0 … honest − 1, hears of at most honest − ``left`` dead, and whoever
    ``left`` others hear to be dead has its pairwise roots opened.
    """
    for gone in range(honest, -1, -1):
        target = range(honest - gone, honest)
        dead = [set() for _ in range(honest)]
        for _ in range(left):  # the members of the target in turn, each from whoever has most room left
            for j in sorted(target, key=lambda j: sum(j in d for d in dead)):
                free = [
                    i for i in range(honest) if i != j and j not in dead[i] and len(dead[i]) < honest - left
                ]
                if free:
                    dead[min(free, key=lambda i: (len(dead[i]), i in target))].add(j)
        if all(sum(j in d for d in dead) >= left for j in target):
            return dead
    raise AssertionError
