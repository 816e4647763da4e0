"""Who takes part in a session, on what terms, and the hash that binds every key to both.

A session is one key agreement that serves many rounds. Its identity is a hash that every client computes from
what it was told: the job, the terms of the sums, the settings below, the pinned roster, who is present and
(where everyone masks with everyone) all of their keys. A round's context adds the round's number, its
participants, and what the caller binds: the plan and with it the weights' digest, the seed, K and σ. Whoever
was told something else derives other masks, which cancel with nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError, SecurityError
from baffle.secagg.parameters import SECURITY, colluders_among, hidden, part, quorum
from baffle.secagg.primitives import KEY_BYTES, hash_of
from baffle.secagg.sharing import MOST_HOLDERS

Flags = NDArray[np.bool_]
MOST_CLIENTS = 1 << 16


class Roster:
    """The identities of a job, pinned by everyone before it starts: names → Ed25519 public keys (32 bytes).

    A client is its place in the ascending order of names. Raises ConfigError for a roster that cannot be.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        if not 2 <= len(keys) <= MOST_CLIENTS:
            raise ConfigError(f"a roster of {len(keys)} clients: 2 to {MOST_CLIENTS} are possible")
        for name, key in keys.items():
            if len(key) != KEY_BYTES:
                raise ConfigError(f"client {name}: a public key has {KEY_BYTES} bytes, not {len(key)}")
        if len(set(keys.values())) != len(keys):
            raise ConfigError("two clients of the roster have one public key")
        self.names = tuple(sorted(keys))
        self.keys = tuple(keys[name] for name in self.names)
        self.digest = hash_of(b"roster", *(field for n in self.names for field in (n.encode(), keys[n])))
        self._place = {name: place for place, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def place(self, name: str) -> int:
        """Raises SecurityError for a name that is not on the roster."""
        if name not in self._place:
            raise SecurityError(f"client {name} is not on the roster")
        return self._place[name]


@dataclass(frozen=True)
class Settings:
    """How a session protects. The server proposes them; each client holds them against its own Policy.

    degree       k, the holders of shares of one client's secrets; members − 1 or more: everybody
    threshold    t, the shares that open a secret
    consistency  clients say who is alive before they open anything
    least        the fewest clients in a sum
    rounds       how many rounds one key agreement serves
    """

    degree: int
    threshold: int
    consistency: bool = False
    least: int = 3
    rounds: int = 1

    def __post_init__(self) -> None:
        if not 2 <= self.threshold <= self.degree < MOST_CLIENTS:
            raise ConfigError(f"threshold {self.threshold} of {self.degree} holders: 2 ≤ t ≤ k is needed")
        if not 2 <= self.least < 1 << 32:
            raise ConfigError(f"a sum over {self.least} clients hides nobody: at least 2")
        if not 1 <= self.rounds < 1 << 32:
            raise ConfigError(f"a session of {self.rounds} rounds: at least 1")

    def full(self, present: int) -> bool:
        """Whether everybody holds shares of everybody."""
        return self.degree >= present - 1

    def holders(self, present: int) -> int:
        """Holders of each client's shares."""
        return min(self.degree, present - 1)


@dataclass(frozen=True)
class Policy:
    """What a client insists on, whatever the server proposes.

    At least ``least`` honest clients in anything that can be opened, against a server that lies and a
    fraction ``corrupt`` of the members that help it; where holders are drawn, but for ``security``, a chance.
    The server says who is a member, and may invite all of its helpers: ``helpers`` is how many are counted
    with at least, however few are invited.
    """

    least: int = 3
    corrupt: float = 0.1
    security: float = SECURITY
    helpers: int = 0

    def __post_init__(self) -> None:
        sound = 0.0 <= self.corrupt < 1.0 and 0.0 < self.security < 1.0 and self.helpers >= 0
        if self.least < 2 or not sound:
            raise ConfigError(
                f"a policy of least {self.least} (≥ 2), corrupt {self.corrupt} (in [0, 1)), "
                f"security {self.security} (in (0, 1)), helpers {self.helpers} (≥ 0)"
            )

    def colluders(self, settings: Settings, members: int, present: int) -> int:
        """c: how many of a client's holders may collude with the server."""
        corrupt = self._corrupt(members)
        return colluders_among(settings.holders(present), present, corrupt, self.security)

    def _corrupt(self, members: int) -> int:
        return max(part(self.corrupt, members), self.helpers)

    def quorum(self, settings: Settings, members: int, present: int) -> int:
        """q: of how many of its holders a client must hear before it opens anything."""
        colluders = self.colluders(settings, members, present)
        return quorum(settings.holders(present), colluders, settings.threshold)

    def check(self, settings: Settings, members: int, present: int) -> int:
        """The fewest honest clients in anything that can be opened.

        Raises SecurityError where they are fewer than this policy's ``least``.
        """
        if present < max(settings.least, 3):
            raise SecurityError(f"{present} clients: a sum needs at least {max(settings.least, 3)}")
        holders = settings.holders(present)
        if holders > MOST_HOLDERS:
            raise SecurityError(f"{holders} holders of one secret: at most {MOST_HOLDERS} are possible")
        if settings.threshold > holders:
            raise SecurityError(f"{present} clients: too few for {settings.threshold} shares")
        corrupt = self._corrupt(members)
        found = hidden(holders, present, corrupt, settings.threshold, settings.consistency, self.security)
        if found < self.least:
            stage = "with" if settings.consistency else "without"
            raise SecurityError(
                f"threshold {settings.threshold} of {holders} holders {stage} consistency, {corrupt} of "
                f"{present} clients colluding: {found} honest clients are sure to hide each other, this "
                f"client's policy asks for {self.least}"
            )
        return found


def session_id(offer: bytes, present: bytes, keys: bytes) -> bytes:
    """32 bytes that all keys of a session hang on; ``keys``: all of them, where all mask with all.

    Elsewhere a pair's secret is bound to both of its keys by the key agreement itself.
    """
    return hash_of(b"session", offer, present, keys)


def round_context(
    session: bytes, round_: int, participants: bytes, binding: bytes, ring_bits: int, length: int
) -> bytes:
    """32 bytes that all masks of a round hang on."""
    return hash_of(b"round", session, round_, participants, binding, ring_bits, length)
