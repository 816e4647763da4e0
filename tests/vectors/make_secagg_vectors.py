"""Writes secagg-v1.json: frozen vectors of key derivation, masks, shares and whole transcripts.

    python tests/vectors/make_secagg_vectors.py

Every random byte comes from SHAKE-256 of a label, so the same bytes come out anywhere. Whoever changes them
changes the protocol, and with it VERSION in ``secagg.messages``.
"""

import contextlib
import functools
import hashlib
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from baffle.secagg import client
from baffle.secagg.messages import bundle_data, commitment_to, deposit_context, share_tag, tagged
from baffle.secagg.primitives import Identity, KeyPair, derive, hash_of, hkdf, mask, seal
from baffle.secagg.session import Policy, Settings, round_context, session_id
from baffle.secagg.sharing import share
from tests.attacks.secagg_world import World

FILE = Path(__file__).with_name("secagg-v1.json")


class Tape:
    """Bytes of SHAKE-256 in place of the operating system's, one after the other."""

    def __init__(self, label):
        self.label, self.calls = label, 0

    def __call__(self, size):
        self.calls += 1
        return hashlib.shake_256(f"{self.label} {self.calls}".encode()).digest(size)

    def sample(self, places, count):
        """In place of ``SystemRandom().sample``: the first ``count`` by a hash."""
        key = self(16)
        return sorted(places, key=lambda i: hashlib.sha256(key + bytes([i])).digest())[:count]


@contextlib.contextmanager
def without_chance(label):
    tape = Tape(label)
    with (
        mock.patch("baffle.secagg.primitives.random_bytes", tape),
        mock.patch.object(client, "random_bytes", tape),
        mock.patch.object(client, "share", functools.partial(share, random=tape)),
        mock.patch.object(client.secrets, "SystemRandom", return_value=tape),
    ):
        yield tape


TRANSCRIPTS = {
    "full, consistency, one dropout": (Settings(4, 3, True, 3, 1), 5, np.uint64, 1, {"answer": ["c002"]}),
    "full, three rounds": (Settings(3, 3, False, 3, 3), 4, np.uint32, 3, {}),
    "drawn, two rounds, two dropouts": (
        Settings(6, 4, True, 3, 2),
        9,
        np.uint64,
        2,
        {"answer": ["c001"], "confirm": ["c005"]},
    ),
}


def transcript(label):
    """World after its rounds, and their sums."""
    settings, count, dtype, rounds, drops = TRANSCRIPTS[label]
    with without_chance(label):
        world = World(settings, count, Policy(least=2, corrupt=0.0), dtype=dtype)
        world.agree()
        world.drop(drops)
        size, sums = np.dtype(dtype).itemsize, []
        for number in range(rounds):
            vectors = {
                name: np.frombuffer(hashlib.shake_256(f"{name} {number}".encode()).digest(7 * size), dtype)
                for name in world.names
            }
            total, survivors = world.round(number, vectors)
            sums.append({"sum": [str(v) for v in total.tolist()], "names": survivors})
    return world, sums


def vectors():
    keys = [hashlib.sha256(bytes([i])).digest() for i in range(4)]
    pairs = [KeyPair.from_bytes(key) for key in keys[:2]]
    shares = share(keys[3], 3, 5, Tape("shares"))
    found = {
        "derive": derive(keys[0], b"label", 7, b"").hex(),
        "hkdf": hkdf(keys[0], b"info", 45, b"salt").hex(),
        "hash_of": hash_of(b"part", b"", 2**63).hex(),
        "identity": Identity.from_bytes(keys[2]).public.hex(),
        "signature": Identity.from_bytes(keys[2]).sign(b"message").hex(),
        "agree": pairs[0].agree(pairs[1].public).hex(),
        "seal": seal(keys[0], 5, b"plaintext", b"associated").hex(),
        "mask32": [str(v) for v in mask(keys[1], 5, np.uint32).tolist()],
        "mask64": [str(v) for v in mask(keys[1], 20, np.uint64).tolist()[-5:]],
        "shares": [row.tobytes().hex() for row in shares],
        "session_id": session_id(keys[0], b"\x0f", keys[1]).hex(),
        "round_context": round_context(keys[0], 3, b"\x0f", keys[1], 64, 500).hex(),
        "deposit_context": deposit_context(keys[0], 3, 1).hex(),
        "bundle_data": bundle_data(keys[0], 2).hex(),
        "commitment": commitment_to(keys[0], keys[1]).hex(),
        "share_tag": share_tag(keys[0], 2, 0, keys[1]).hex(),
        "tagged": tagged(keys[0], keys[1], "answer", b"body").hex(),
    }
    for label in TRANSCRIPTS:
        world, sums = transcript(label)
        messages = [
            f"{number} {stage} {way} {name} {len(data)} {hashlib.sha256(data).hexdigest()[:32]}"
            for number, stage, way, name, data in world.log
        ]
        assert not world.refused
        found[label] = {"messages": messages, "rounds": sums}
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=1) + "\n")
