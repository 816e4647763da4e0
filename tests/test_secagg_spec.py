"""Section 11 of docs/spec.md, read once more: clients made from its text alone send the frozen bytes.

They share no code with the library's, and stand in their place beside its server. They refuse nothing.
"""

import hashlib
import hmac
import json
import struct
from types import SimpleNamespace
from unittest import mock

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from baffle import secure
from baffle.secagg import client as library
from tests.attacks.secagg_world import World
from tests.vectors import make_secagg_vectors as frozen

# -- 11.1 ---------------------------------------------------------------------------------------------


def P(*parts):
    rows = [struct.pack("<Q", part) if isinstance(part, int) else part for part in parts]
    return b"".join(struct.pack("<I", len(row)) + row for row in rows)


def H(*parts):
    return hashlib.sha256(b"baffle secagg v1" + P(*parts)).digest()


def D(key, *parts):
    return hmac.digest(key, P(*parts) + b"\x01", "sha256")


def public(secret):
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def A(secret, other):
    agreed = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(other))
    info = P(b"baffle secagg v1 agree", *sorted((public(secret), other)))
    return hmac.digest(hmac.digest(bytes(32), agreed, "sha256"), info + b"\x01", "sha256")


def T(key, context, stage, body):
    return hmac.digest(key, H(b"message", context, stage, body), "sha256")[:16]


def seal(key, text, data):
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, data)


def mask(key, count, width):
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(count * width))
    return [int.from_bytes(row, "little") for row in rows_of(stream, width)]


def rows_of(data, width):
    assert len(data) % width == 0
    return [data[i : i + width] for i in range(0, len(data), width)]


def listed(data, count):
    """The numbers whose bits are set in a list of ``count`` clients at the front, and what is behind it."""
    size = -(-count // 8)
    value = int.from_bytes(data[:size], "little")
    assert len(data) >= size
    assert value >> count == 0
    return [i for i in range(count) if value >> i & 1], data[size:]


def times(a, b):
    """Of two elements of GF(2⁸)."""
    product = 0
    while b:
        product ^= a * (b & 1)
        a, b = a << 1 ^ (0x11B if a & 0x80 else 0), b >> 1
    return product


def xor(a, b):
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def shares(secret, coefficients, holders):
    """At x = 1 … holders. ``coefficients``: of the highest power first, as the vectors draw them."""
    found = []
    for x in range(1, holders + 1):
        value = bytes(32)
        for row in rows_of(coefficients, 32):
            value = bytes(times(x, v) for v in xor(value, row))
        found.append(xor(value, secret))
    return found


# -- 11.3 and 11.4 ------------------------------------------------------------------------------------


def directed(label, owner, holder):
    return label + (b" up" if owner < holder else b" down")


class Client:
    """``roster``: names → Ed25519 public keys. ``random`` gives so many bytes, and has ``sample``."""

    def __init__(self, name, identity, roster, random):
        self.name, self.identity, self.random = name, identity, random
        self.names = sorted(roster)
        self.roster = H(b"roster", *(part for n in self.names for part in (n.encode(), roster[n])))
        self.chains, self.prepared = {}, None

    def advertise(self, offer, terms_digest):
        fields = struct.unpack_from("<BQHHBII", offer, 96)
        version, self.turned, self.k, self.t, self.consistency, _, rounds = fields
        assert version == 1
        assert offer[64:96] == self.roster
        self.end, self.server = self.turned + rounds, offer[32:64]
        self.members, rest = listed(offer[118:], len(self.names))
        assert rest == b""
        self.O, self.secret = H(b"offer", offer, terms_digest), self.random(32)
        key = public(self.secret)
        signature = Ed25519PrivateKey.from_private_bytes(self.identity).sign(H(b"advert", self.O, key))
        return key + signature

    def admit(self, data):
        """Takes the list of those present; returns it, and what is behind it."""
        present, rest = listed(data, len(self.members))
        self.n = len(present)
        self.place = [self.names[self.members[i]] for i in present].index(self.name)
        return data[: len(data) - len(rest)], rest

    def settle(self, present, keys):
        self.S = H(b"session", self.O, present, keys)
        self.to_server = D(A(self.secret, self.server), b"server", self.S)

    def tagged(self, context, stage, body):
        return body + T(self.to_server, context, stage, body)

    def choose(self, request):
        present, rest = self.admit(request)
        assert rest == b""
        self.settle(present, b"")
        others = [i for i in range(self.n) if i != self.place]
        self.choice = self.random.sample(others, self.k)
        return self.tagged(self.S, b"choose", struct.pack(f"<{self.k}H", *self.choice))

    def share(self, request):
        (round_,) = struct.unpack("<Q", request[:8])
        if not self.chains:
            self.heard = H(request[8:])
            self.introduce(request[8:])
        if self.prepared is None or self.prepared[0] != round_:
            self.deposit(round_)
        return self.tagged(H(self.S, round_, self.heard), b"share", self.prepared[2])

    def introduce(self, data):
        present, data = self.admit(data)
        if self.k >= self.n - 1:
            keys = [advert[:32] for advert in rows_of(data, 96)]
            self.settle(present, b"".join(keys))
            known = {i: keys[i] for i in range(self.n) if i != self.place}
            self.holders = self.owners = sorted(known)
        else:
            adverts, (count,) = rows_of(data[: 96 * self.k], 96), struct.unpack_from("<H", data, 96 * self.k)
            known = {i: advert[:32] for i, advert in zip(self.choice, adverts, strict=True)}
            entries = rows_of(data[96 * self.k + 2 :], 34)
            assert len(entries) == count
            owners = {int.from_bytes(entry[:2], "little"): entry[2:] for entry in entries}
            self.holders, self.owners = sorted(self.choice), sorted(owners)
            known |= owners
        self.chains = {i: D(A(self.secret, known[i]), b"chain", self.S) for i in sorted(known)}

    def deposit(self, round_):
        while self.turned <= round_:
            keys = {i: D(chain, b"round") for i, chain in self.chains.items()}
            self.chains = {i: D(chain, b"next") for i, chain in self.chains.items()}
            self.turned += 1
        E, rho = H(b"deposit", self.S, round_, self.place), self.random(32)
        rows = shares(rho, self.random(32 * (self.t - 1)), len(self.holders))
        body = seal(D(rho, b"roots"), b"".join(D(key, b"root") for key in keys.values()), E)
        for holder, row in zip(self.holders, rows, strict=True):
            body += H(E, struct.pack("<HB", holder, 1) + row)[:16]
        for holder, row in zip(self.holders, rows, strict=True):
            channel = D(keys[holder], directed(b"channel", self.place, holder))
            body += seal(channel, row, E + struct.pack("<H", holder))
        self.prepared = round_, keys, body

    def answer(self, request, number, Q, measure):
        round_, keys, _ = self.prepared
        assert struct.unpack("<Q", request[:8]) == (number,) == (round_,)
        participants, rest = listed(request[8:], self.n)
        self.active = [i for i in self.owners if i in participants]
        self.sealed = dict(zip(self.active, rows_of(rest, 48), strict=True))
        x = measure()
        width, count = x.dtype.itemsize, len(x)
        self.R = R = H(b"round", self.S, round_, request[8 : len(request) - len(rest)], Q, 8 * width, count)
        self.round, self.keys, b = round_, keys, self.random(32)
        y = [v + e for v, e in zip(x.tolist(), mask(D(b, R), count, width), strict=True)]
        for j in set(participants) & set(keys):
            sign = 1 if j > self.place else -1
            noise = mask(D(D(keys[j], b"root"), R), count, width)
            y = [v + sign * e for v, e in zip(y, noise, strict=True)]
        body = b"".join((v % (1 << 8 * width)).to_bytes(width, "little") for v in y)
        E = H(b"deposit", self.S, round_, self.place)
        rows = shares(b, self.random(32 * (self.t - 1)), len(self.holders))
        body += H(E, b"self-mask", b)
        for j, row in zip(self.holders, rows, strict=True):
            body += xor(row, self.pad(self.place, j, j))
        for j, row in zip(self.holders, rows, strict=True):
            body += H(E, struct.pack("<HB", j, 0) + row)[:16]
        self.prepared = None
        if round_ + 1 < self.end:
            self.deposit(round_ + 1)
            body += self.prepared[2]
        return self.tagged(R, b"answer", body)

    def pad(self, owner, holder, other):
        return D(self.keys[other], directed(b"pad", owner, holder), self.R)

    def token(self, owner, holder, other):
        return D(self.keys[other], directed(b"alive", owner, holder), self.R)[:16]

    def confirm(self, request):
        alive, rest = listed(request, len(self.active))
        assert rest == b""
        owners = [self.active[i] for i in alive]
        return self.tagged(self.R, b"confirm", b"".join(self.token(i, self.place, i) for i in owners))

    def unmask(self, request):
        alive, rest = listed(request, len(self.active))
        if self.consistency:
            told, rest = listed(rest, len(self.holders))
            holders = [self.holders[i] for i in told]
            assert rest == b"".join(self.token(self.place, j, j) for j in holders)
        else:
            assert rest == b""
        body = ((1 << len(self.active)) - 1).to_bytes(-(-len(self.active) // 8), "little")
        for at, owner in enumerate(self.active):
            if at in alive:
                body += self.pad(owner, self.place, owner)
            else:
                channel = D(self.keys[owner], directed(b"channel", owner, self.place))
                data = H(b"deposit", self.S, self.round, owner) + struct.pack("<H", self.place)
                body += ChaCha20Poly1305(channel).decrypt(bytes(12), self.sealed[owner], data)
        return self.tagged(self.R, b"unmask", body)


# -- against the vectors ------------------------------------------------------------------------------


def client(world, name):
    """In place of ``World.client``, with the tape of the vectors in place of chance."""
    roster = {n: identity.public for n, identity in world.identities.items()}
    return Client(name, world.identities[name].to_bytes(), roster, library.random_bytes)


@pytest.mark.parametrize("label", frozen.TRANSCRIPTS)
def test_clients_made_from_the_text_alone_send_the_frozen_bytes(label):
    with mock.patch.object(World, "client", client):
        world, sums = frozen.transcript(label)
    wanted = json.loads(frozen.FILE.read_text())[label]
    assert not world.refused
    for (number, stage, way, name, data), line in zip(world.log, wanted["messages"], strict=True):
        assert f"{number} {stage} {way} {name} {len(data)} {hashlib.sha256(data).hexdigest()[:32]}" == line
    assert sums == wanted["rounds"]


def test_what_is_measured_is_bound_as_the_text_says():
    plan, terms = SimpleNamespace(digest=b"p" * 32), SimpleNamespace(digest=b"t" * 32)
    assert secure.binding_of(plan, terms) == H(b"plan and terms", plan.digest, terms.digest)
