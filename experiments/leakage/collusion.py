"""How many colluders open one client's upload? The real protocol, a server that keeps everything.

A round of C clients runs as it should. Then the server and c clients put together what they have: all
messages, the sum, and each colluder's whole state (its pairwise roots, its pads, the shares that it holds).
They take off the target's self-mask, which any round opens, and whatever they know of its pairwise masks:
those with colluders, and all of them once they hold t shares of the target's ρ. What remains is held against
the upload.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import mean_error, write
from numpy.typing import NDArray
from pictures import collusion_picture

from baffle.fixedpoint import FixedPoint
from baffle.secagg.client import ClientSession, _pad
from baffle.secagg.messages import Blinded, Deposit, Reader, deposit_context
from baffle.secagg.primitives import Identity, derive, hash_of, mask, open_sealed
from baffle.secagg.server import Requests, ServerRound, ServerSession
from baffle.secagg.session import Policy, Roster, Settings
from baffle.secagg.sharing import reconstruct

Ring = NDArray[Any]
POINT = FixedPoint()
BINDING = hash_of(b"collusion")


@dataclass(frozen=True)
class Scale:
    clients: int
    threshold: int
    values: int
    rounds: int


FULL = Scale(clients=10, threshold=7, values=500, rounds=40)
QUICK = Scale(clients=5, threshold=4, values=50, rounds=3)


class World:
    """C clients and a server that writes everything down, through one round."""

    def __init__(self, clients: int, threshold: int, vectors: NDArray[np.float64]) -> None:
        identities = {f"{i:03d}": Identity.generate() for i in range(clients)}
        roster = Roster({name: identity.public for name, identity in identities.items()})
        policy = Policy(least=2, corrupt=0.0)  # what the settings bear is what is measured
        settings = Settings(clients - 1, threshold, True, least=2)
        self.vectors = {
            name: POINT.residues(POINT.encode(v)) for name, v in zip(identities, vectors, strict=True)
        }
        self.clients = {name: ClientSession(name, key, roster, policy) for name, key in identities.items()}
        self.session = ServerSession(
            roster, list(identities), settings, policy, job=bytes(32), first_round=0, binding=BINDING
        )
        self.answers: dict[str, bytes] = {}
        self.deposits: dict[str, Deposit] = {}
        self.keys: dict[str, dict[int, bytes]] = {}  # each client's of the round, by partner
        self.held: dict[tuple[str, int], bytes] = {}  # colluder, place of an owner → its share of ρ
        for requests in self.session.stages():
            self._ask(requests, self.session)
        self.round = ServerRound(self.session, 0, list(identities), BINDING, POINT.ring_bits)
        for requests in self.round.stages():
            self._ask(requests, self.round)
        self.total, _ = self.round.close()

    def _ask(self, asked: Requests, taker: ServerSession | ServerRound) -> None:
        stage, requests = asked
        for name, request in requests.items():
            client = self.clients[name]
            if stage == "advertise":
                answer = client.advertise(request, BINDING)
            elif stage == "answer":
                answer = client.answer(request, 0, BINDING, lambda name=name: self.vectors[name])  # type: ignore[misc]
                self.answers[name] = answer
                state = client._answered
                assert state is not None
                self.keys[name] = state.keys
                for owner, share in state.shares.items():
                    assert share is not None
                    self.held[name, owner] = share
                self.context = state.context
            else:
                answer = getattr(client, stage)(request)
                if stage == "share":
                    count = len(self.clients) - 1
                    self.deposits[name] = Deposit.read(Reader(answer), count, count)
            taker.add(name, answer)

    def attack(self, target: str, colluders: list[str]) -> Ring:
        """What is left of the target's answer when everything known is taken off."""
        names, threshold = self.session.names, self.session.settings.threshold
        place = names.index(target)
        length = len(self.vectors[target])
        left: Ring = np.frombuffer(self.answers[target], "<u8", length).astype(np.uint64)
        left = left - mask(derive(self._seed(target, length), self.context), length, np.uint64)
        holders = [i for i in range(len(names)) if i != place]
        shares = [(holders.index(names.index(c)) + 1, self.held[c, place]) for c in colluders]
        if len(shares) >= threshold:
            rows = shares[:threshold]
            rho = reconstruct(
                [x for x, _ in rows], np.stack([np.frombuffer(share, np.uint8) for _, share in rows])
            )
            context = deposit_context(self.session.id, 0, place)
            sealed = open_sealed(derive(rho, b"roots"), 0, self.deposits[target].sealed, context)
            roots = {i: sealed[32 * n : 32 * (n + 1)] for n, i in enumerate(holders)}
        else:
            roots = {names.index(c): derive(self.keys[c][place], b"root") for c in colluders}
        for other, root in roots.items():
            noise = mask(derive(root, self.context), length, np.uint64)
            left = left - noise if place < other else left + noise
        return left

    def _seed(self, target: str, length: int) -> bytes:
        """The target's b, as the server opened it: from blinded shares and the holders' pads."""
        place, count = self.session.names.index(target), len(self.clients) - 1
        behind = Reader(self.answers[target])
        behind.take(8 * length)
        blinded = Blinded.read(behind, count)
        points, shares = [], []
        for holder in self.session.holders[place][: self.session.settings.threshold]:
            key = self.keys[self.session.names[holder]][place]
            pad = _pad(key, place, holder, self.context)
            at = self.session.holders[place].index(holder)
            points.append(at + 1)
            row = np.frombuffer(blinded.shares[32 * at : 32 * (at + 1)], np.uint8)
            shares.append(row ^ np.frombuffer(pad, np.uint8))
        return reconstruct(points, np.stack(shares))


def run(_: Path | None, quick: bool) -> None:
    """Uploads are normal numbers in place of slopes, so that the attack has no other hold on them."""
    scale = QUICK if quick else FULL
    rng = np.random.default_rng(0)
    found: dict[int, list[tuple[bool, float]]] = {c: [] for c in range(scale.clients)}
    for _round in range(scale.rounds):
        world = World(scale.clients, scale.threshold, rng.standard_normal((scale.clients, scale.values)))
        target, *others = rng.permutation(list(world.clients)).tolist()
        upload = world.vectors[target]
        for c in found:
            left = world.attack(target, others[:c])
            found[c].append((bool((left == upload).all()), abs(_correlation(left, upload))))
    rows = []
    for c, results in found.items():
        correlation, error = mean_error([r for _, r in results])
        rows.append(
            {
                "colluders": c,
                "exact": sum(exact for exact, _ in results),
                "correlation": correlation,
                "correlation_error": error,
            }
        )
        print(rows[-1])
    if quick:
        return
    chance = float(np.sqrt(2 / (np.pi * scale.values)))  # the mean of |correlation| of independent numbers
    content = {**dataclasses.asdict(scale), "chance": chance, "rows": rows}
    collusion_picture(content)
    write("leakage-collusion", content)


def _correlation(left: Ring, upload: Ring) -> float:
    """Between what is left and the upload, both read as reals."""
    return float(np.corrcoef(POINT.integers(left) * 2.0**-32, POINT.integers(upload) * 2.0**-32)[0, 1])
