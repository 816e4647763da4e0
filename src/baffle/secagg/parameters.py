"""How many hold shares of a client's secrets, how many open them, and how many honest clients hide it.

n clients are present. Every client has k holders, which are also its masking partners: all others, or k that
it draws itself, so that nobody else has a say in who they are. (A permutation made from what everybody sent
could be steered by whoever sends last, or vanishes next.) A fraction of the members colludes with the server,
c of them among a client's holders; t shares open a secret. Counting bounds what a lying server can do:

both secrets of one client  An honest holder opens one of them, once: 2t ≤ k + c would be needed.
with consistency            Who opens anything has heard from q = k + c − t + 1 holders that it is alive. Who
                            said so never gives its share of ρ, which would open the pairwise roots, and
                            k − q + c < t are left. Pads for b serve in one context alone. So an answer whose
                            self-mask is opened still has t − c honest partners in its own context whose
                            masks on it stay closed, and so has each of these: what is opened is a sum over
                            a set in which every honest member drew t − c others.
without, all with all       Who opens anything was given a list of t survivors or more. So it gives its
                            shares of ρ of at most H − t + c of the H honest clients, and all together open
                            at most H(H − t + c)/(t − c); the others hide each other. (Not fewer where the
                            server tells of p < H honest participants: t − c + 1 of them are in the context of
                            an opened answer, and give p − t + c each. So fewer roots are open, by more than
                            fewer take part.)

The last two give ``hidden``: the fewest honest clients in anything that can be opened. Where holders are
drawn, both c and ``hidden`` hold but for a chance that is chosen (2^-40), over the draws of honest clients.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError
from baffle.secagg.sharing import MOST_HOLDERS

SECURITY = 2.0**-40
FAILURE = 2.0**-20
FULL_UP_TO = 100


@dataclass(frozen=True)
class Parameters:
    """``degree`` k holders a client, ``threshold`` t, and whether clients say who is alive."""

    degree: int
    threshold: int
    consistency: bool


def part(fraction: float, clients: int) -> int:
    """A fraction of so many clients, rounded down (but 0.3 of 10 is 3)."""
    return math.floor(fraction * clients + 1e-9)


@functools.lru_cache(maxsize=1024)
def colluders_among(holders: int, present: int, corrupt: int, security: float = SECURITY) -> int:
    """c: more of a client's holders collude with at most this chance, over all honest clients.

    ``corrupt`` of the ``present`` clients do. Where everybody holds everybody's shares, all that do.
    """
    corrupt = min(corrupt, present - 1)
    if holders >= present - 1:
        return corrupt
    return _exceeded(present - 1, corrupt, holders, security / (present - corrupt))


def quorum(holders: int, colluders: int, threshold: int) -> int:
    """q: of how many of its holders a client must hear that it is alive before it opens anything."""
    return holders + colluders - threshold + 1


@functools.lru_cache(maxsize=1024)
def hidden(
    holders: int,
    present: int,
    corrupt: int,
    threshold: int,
    consistency: bool,
    security: float = SECURITY,
) -> int:
    """The fewest honest clients in anything that can be opened; 0 where nothing is certain."""
    if present - corrupt < 2:
        return 0
    honest, colluders = present - corrupt, colluders_among(holders, present, corrupt, security)
    everybody, left = holders >= present - 1, threshold - colluders
    both = (present if everybody else holders) + colluders
    if left < 1 or 2 * threshold <= both or (not everybody and not consistency):
        return 0
    if everybody and not consistency:
        return max(0, honest - honest * (honest - left) // left)
    if quorum(holders, colluders, threshold) > holders:
        return 0
    if everybody:
        return left + 1
    return _smallest_closed(holders, present, honest, left, security)


def _smallest_closed(holders: int, present: int, honest: int, left: int, security: float) -> int:
    """The fewest honest clients of which each drew ``left`` others of them, but for a chance: a union bound.

    Σ_s C(H, s) P[hypergeometric(n − 1, s − 1, k) ≥ left]^s over the sizes s below the answer.
    """
    sizes = np.arange(left + 1, honest + 1)
    f = _log_factorials(present)
    drawn = np.arange(left, holders + 1)[:, None]
    inside, outside = sizes - 1, present - sizes
    fits = (drawn <= inside) & (holders - drawn <= outside)
    rest = np.clip(holders - drawn, 0, None)
    logs = (
        f[inside]
        - f[drawn]
        - f[np.clip(inside - drawn, 0, None)]
        + f[outside]
        - f[rest]
        - f[np.clip(outside - rest, 0, None)]
    ) - (f[present - 1] - f[holders] - f[present - 1 - holders])
    tail = np.minimum(np.where(fits, np.exp(logs), 0.0).sum(axis=0), 1.0)
    with np.errstate(divide="ignore"):
        terms = f[honest] - f[sizes] - f[honest - sizes] + sizes * np.log(tail)
    chance = np.cumsum(np.exp(np.minimum(terms, 0.0)))
    above = np.flatnonzero(chance > security)
    return int(sizes[above[0]]) if len(above) else honest


@functools.lru_cache(maxsize=16)
def _log_factorials(count: int) -> NDArray[np.float64]:
    return np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, count + 1, dtype=np.float64)))))


def _exceeded(population: int, marked: int, drawn: int, chance: float) -> int:
    """The smallest m such that more than m marked ones are drawn with at most this chance. Exact."""
    total, tail, allowed = math.comb(population, drawn), 0, Fraction(chance)
    for m in range(min(marked, drawn), -1, -1):
        tail += math.comb(marked, m) * math.comb(population - marked, drawn - m)
        if tail * allowed.denominator > allowed.numerator * total:
            return m
    return 0


@functools.lru_cache(maxsize=64)
def find(
    clients: int,
    corrupt: float,
    dropout: float,
    *,
    least: int = 3,
    consistency: bool = False,
    security: float = SECURITY,
    failure: float = FAILURE,
    full_up_to: int = FULL_UP_TO,
) -> Parameters:
    """The fewest holders, and the highest threshold, for these fractions of ``clients``.

    Private where at most ``corrupt`` of them collude with the server: at least ``least`` honest clients, and
    a tenth of all where holders are drawn, in whatever is opened, but for a chance of ``security``. A sum
    comes out where at most ``dropout`` of them vanish: whoever they are up to ``full_up_to`` clients, and
    above, if they vanish independently of the draws, but for a chance of ``failure``. ``consistency`` is
    taken where it is needed, and where it is asked for.

    2·log2(C) holders, as sometimes advised, are too few against a server that lies: with 20 of 1000 clients
    and a tenth colluding, only the thresholds 19 and 20 hide anybody for certain, and three or four clients
    at that; they leave no room for dropouts.

    Raises ConfigError where at most 255 holders do not serve.
    """
    if clients < 3:
        raise ConfigError(f"{clients} clients: a sum of fewer than 3 protects nobody from the other two")
    if not (0 <= corrupt < 1 and 0 <= dropout < 1):
        raise ConfigError(f"fractions of {corrupt} colluding and {dropout} dropping: they lie in [0, 1)")
    colluding, dropping = part(corrupt, clients), part(dropout, clients)
    found = None
    if clients > full_up_to:
        found = _drawn(clients, colluding, dropping, least, security, failure)
    if found is None and clients - 1 <= MOST_HOLDERS:
        found = _all(clients, colluding, dropping, least, consistency, security)
    if found is None:
        raise ConfigError(
            f"{clients} clients of which {colluding} may collude and {dropping} drop out: no threshold among "
            f"at most {MOST_HOLDERS} holders hides enough of them; allow for fewer of either, or change the "
            "number of clients"
        )
    return found


def _all(
    clients: int, colluding: int, dropping: int, least: int, consistency: bool, security: float
) -> Parameters | None:
    threshold = clients - 1 - dropping
    for signed in (False, True)[consistency:]:
        if hidden(clients - 1, clients, colluding, threshold, signed, security) >= least:
            return Parameters(clients - 1, threshold, signed)
    return None


def _drawn(
    clients: int, colluding: int, dropping: int, least: int, security: float, failure: float
) -> Parameters | None:
    present = clients - dropping
    for degree in range(8, min(MOST_HOLDERS, present - 2) + 1, 2):
        threshold = degree - _exceeded(clients - 1, dropping, degree, failure / clients)
        if 2 * threshold <= degree:
            continue
        colluders = colluders_among(degree, present, colluding, security)
        hides = hidden(degree, present, colluding, threshold, True, security)
        if hides >= max(least, clients // 10) and quorum(degree, colluders, threshold) <= threshold:
            return Parameters(degree, threshold, True)
    return None
