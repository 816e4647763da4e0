"""What the wire carries under secure aggregation: answers of real rounds of the real protocol."""

from __future__ import annotations

import functools

import numpy as np
from common import Floats
from numpy.typing import NDArray

from baffle.fixedpoint import FixedPoint
from baffle.secagg.client import ClientSession
from baffle.secagg.messages import ring_vector
from baffle.secagg.primitives import Identity, hash_of
from baffle.secagg.server import ServerRound, ServerSession
from baffle.secagg.session import Policy, Roster, Settings

FIXED_POINT = FixedPoint()
NAMES = ("other", "target", "third")
BINDING = hash_of(b"masking")


class Wire:
    """A session of three clients, read by somebody between them and their server. No round is opened."""

    def __init__(self) -> None:
        identities = {name: Identity.generate() for name in NAMES}
        roster = Roster({name: identity.public for name, identity in identities.items()})
        policy = Policy(corrupt=0.0)
        settings = Settings(degree=2, threshold=2, consistency=True, rounds=1 << 20)
        self.clients = {name: ClientSession(name, key, roster, policy) for name, key in identities.items()}
        self.session = ServerSession(
            roster, NAMES, settings, policy, job=bytes(32), first_round=0, binding=BINDING
        )
        self.number = 0
        for _, requests in self.session.stages():
            for name, request in requests.items():
                self.session.add(name, self.clients[name].advertise(request, BINDING))

    def answer(self, vector: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The target's masked ``vector`` (K,), as its answer carries it; the others answer zeros."""
        asked = ServerRound(self.session, self.number, NAMES, BINDING, FIXED_POINT.ring_bits)
        stages = asked.stages()
        stage, requests = next(stages)
        if stage == "share":
            for name, request in requests.items():
                asked.add(name, self.clients[name].share(request))
            _, requests = next(stages)
        message = self._answers(asked, requests, vector)
        self.number += 1
        return ring_vector(message[: vector.nbytes], vector.dtype)

    def _answers(self, asked: ServerRound, requests: dict[str, bytes], vector: NDArray[np.uint64]) -> bytes:
        messages = {}
        for name, request in requests.items():
            own = vector if name == "target" else np.zeros_like(vector)
            answer = functools.partial(self.clients[name].answer, request, self.number, BINDING)
            messages[name] = answer(functools.partial(np.copy, own))
            asked.add(name, messages[name])  # with it, the deposit for the next round
        return messages["target"]


@functools.lru_cache(maxsize=1)
def wire() -> Wire:
    return Wire()


def masked_upload(vector: Floats) -> NDArray[np.uint64]:
    """``vector`` (K,) in the protocol's fixed point and under its masks, in a round of its own."""
    return wire().answer(FIXED_POINT.residues(FIXED_POINT.encode(vector)))


def as_reals(masked: NDArray[np.uint64]) -> Floats:
    """What the ring's elements would mean if there were no mask."""
    return FIXED_POINT.decode(FIXED_POINT.integers(masked))
