"""Who holds whose shares and masks with whom: the graph of a cohort, and how large its degree has to be.

Everybody with everybody up to about a hundred clients; above, a k-regular graph after Bell, Bonawitz, Gascón,
Lepoint, Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (CCS 2020, eprint
2020/704): Harary's, on a ring in which clients are seated at random. Who colludes with the server was
settled before the seating, so that the colluders among a client's holders are a random draw. All chances
below are tails of the hypergeometric law, exact: sums of integers, no approximation and no rounding.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError

MOST_HOLDERS = 255


def seating(entropy: bytes, count: int) -> NDArray[np.int64]:
    """A permutation of range(count), seat → client: a pure function of 32 bytes, the same on every machine.

    Client i draws the 128-bit integer i (little-endian) of SHAKE-256("baffle secagg seating v1" ‖ entropy);
    clients sit in ascending order of their draws.
    """
    if len(entropy) != 32:
        raise ConfigError(f"a seating is made from 32 bytes, not {len(entropy)}")
    stream = hashlib.shake_256(b"baffle secagg seating v1" + entropy).digest(16 * count)
    draws = np.frombuffer(stream, "<u8").reshape(count, 2)
    result: NDArray[np.int64] = np.lexsort((draws[:, 0], draws[:, 1]))
    return result


def neighbours(order: Sequence[int] | NDArray[np.integer], degree: int) -> NDArray[np.int64]:
    """The clients (C, degree) that each client masks with, ascending; ``order``: seat → client (C,).

    Clients sit in a ring; who sits at seat s has the neighbours at s ± 1 … s ± degree/2 (Harary's graph:
    regular, and no graph with as few edges is better connected). Everybody has everybody, (C, C − 1), where
    degree ≥ C − 1. ConfigError unless ``order`` is a permutation of range(C) and the degree even, at least 2,
    or that of the full graph.
    """
    seats = np.asarray(order)
    count = len(seats)
    if count < 2 or not np.array_equal(np.sort(seats), np.arange(count)):
        raise ConfigError("an order of clients is a permutation of 0, 1, 2, …, of two or more")
    if degree >= count - 1:
        others = np.arange(count - 1)
        return others + (others >= np.arange(count)[:, None])
    if degree < 2 or degree % 2:
        raise ConfigError(f"degree {degree}: neighbours sit on both sides, an even number, at least 2")
    reach = degree // 2
    ring = np.concatenate((seats[-reach:], seats, seats[:reach]))
    windows = np.lib.stride_tricks.sliding_window_view(ring, degree + 1)
    result = np.empty((count, degree), np.int64)
    result[seats] = np.delete(windows, reach, axis=1)
    result.sort(axis=1)
    return result


@dataclass(frozen=True)
class Parameters:
    """``degree`` neighbours a client, which hold its shares; ``threshold`` of them open a secret."""

    degree: int
    threshold: int


def find(
    clients: int,
    corrupt: float,
    dropout: float,
    *,
    security: float = 2**-40,
    failure: float = 2**-20,
    consistency: bool = False,
    full_up_to: int = 100,
) -> Parameters:
    """The smallest degree that holds for these fractions of the clients, and its smallest threshold t.

    Up to ``full_up_to`` clients the graph is full and nothing is left to chance: with c colluders, of each
    client's k = clients − 1 holders at most c collude, so t > c with ``consistency`` and 2t > k + c without.
    ConfigError where dropouts leave fewer than t holders. Above, an even degree k ≤ 254, such that

    1. with probability 1 − ``security`` over the seating, the same rule holds for the colluders among the k
       holders of every honest client (a union bound over them);
    2. with probability 1 − ``security``, the honest clients that are left are connected, if dropouts are
       independent of the seating. Two that follow each other on the ring are neighbours unless k/2 seats in
       a row between them are bad, that is, collude or dropped; one such gap leaves a path, so it takes two.
       There are fewer than C²/2 pairs of gaps, and each is k given seats: C²/2 · binom(b, k) / binom(C, k)
       for b bad clients;
    3. with probability 1 − ``failure``, every client keeps t holders (a union bound over all).

    What the rules are for: with 2t > k + c, holders that are told different things cannot open both secrets
    of a client, because honest ones open one each; with ``consistency``, where honest holders act on one and
    the same list of survivors alone, colluders must not do it by themselves. Neither says how many honest
    clients a sum is of when it is the *server* that says who dropped. On the ring, with one list, it may then
    cut out an arc of at least t + 1 − c honest clients, and no arc at all where t > k/2 + the colluders on
    one side; ``isolation`` is for partners that each client draws itself.

    2·log₂ C neighbours, which keep a random graph connected, are too few: 20 for a thousand clients, a tenth
    of them corrupt, would have t ≥ 16 without consistency for a chance of 2⁻⁴⁰, and be stuck as soon as five
    of somebody's holders drop out.

    ConfigError where no degree does. Cost: a tenth of a second at most.
    """
    if clients < 3:
        raise ConfigError(f"{clients} clients: a sum over fewer than 3 hides nobody from the others")
    if not (0 <= corrupt < 1 and 0 <= dropout < 1 and 0 < security < 1 and 0 < failure < 1):
        raise ConfigError(
            f"corrupt {corrupt}, dropout {dropout}, security {security}, failure {failure}: fractions lie in "
            "[0, 1), chances in (0, 1)"
        )
    colluders, dropped = count_of(corrupt, clients), count_of(dropout, clients)
    if clients > full_up_to:
        for degree in range(2, min(MOST_HOLDERS, clients - 2) + 1, 2):
            t = _threshold(clients, colluders, degree, security, consistency)
            if t <= degree and _stays(clients, colluders, dropped, degree, t, security, failure):
                return Parameters(degree, t)
    holders = clients - 1
    t = _least(holders, colluders, consistency)
    if holders <= MOST_HOLDERS and t <= holders - dropped:
        return Parameters(holders, t)
    shown = f"{clients} clients, {colluders} of them corrupt and {dropped} dropping out"
    if holders <= MOST_HOLDERS:
        shown += f", need {t} of {holders} holders and keep {holders - dropped}"
    else:
        shown += f": no degree up to {MOST_HOLDERS} keeps secrets and opens sums"
    remedy = "" if consistency else "the consistency stage, "
    raise ConfigError(f"{shown}; ask for {remedy}fewer corrupt clients or fewer dropouts")


@functools.lru_cache(maxsize=256)
def exposure(
    population: int, colluders: int, holders: int, threshold: int, *, consistency: bool = False
) -> float:
    """The chance that ``holders`` drawn from ``population`` clients, of which so many collude, break rule 1.

    That is, that c of them collude with c ≥ t under ``consistency``, and c ≥ 2t − k without.
    """
    c = threshold if consistency else 2 * threshold - holders
    return float(_chance(population, min(colluders, population), holders, c))


@functools.lru_cache(maxsize=256)
def isolation(clients: int, colluders: int, partners: int, kept: int, group: int) -> float:
    """A bound on the chance that a sum can be made to be of fewer than ``group`` honest clients.

    Each client draws ``partners`` others to mask with, and refuses a list of survivors with fewer than
    ``kept`` of them; all honest ones act on the same list, and the server chooses it, with every draw before
    its eyes. A group T of s honest clients is cut out only if each of them drew ``kept`` from T and the
    colluders. Draws are independent, so a given T has that chance for one client to the power s; the sum over
    all T of all s < group is the bound. Cost: group · partners products of large integers.
    """
    honest, chance, sets = clients - colluders, 0.0, 1
    for s in range(1, min(group - 1, honest) + 1):
        sets = sets * (honest - s + 1) // s
        one = _chance(clients - 1, min(colluders + s - 1, clients - 1), partners, kept)
        if one:
            exponent = math.log2(sets) + s * (math.log2(one.numerator) - math.log2(one.denominator))
            chance += 2.0 ** min(exponent, 0.0)
    return min(chance, 1.0)


def count_of(fraction: float, clients: int) -> int:
    """How many clients a fraction of them is, rounded down: 29 of 100 for 0.29, whatever floats say."""
    return math.floor(fraction * clients + 1e-9)


def _least(holders: int, colluders: int, consistency: bool) -> int:
    """The smallest threshold, given the colluders among the holders."""
    return max(2, colluders + 1 if consistency else (holders + colluders) // 2 + 1)


def _threshold(clients: int, colluders: int, degree: int, security: float, consistency: bool) -> int:
    """The smallest threshold by rule 1."""
    tails = _tails(clients - 1, colluders, degree)
    allowed = Fraction(security) / max(1, clients - colluders) * math.comb(clients - 1, degree)
    most = next(c for c in range(degree + 1) if c == degree or tails[c + 1] <= allowed)
    return _least(degree, most, consistency)


def _stays(
    clients: int, colluders: int, dropped: int, degree: int, threshold: int, security: float, failure: float
) -> bool:
    """Rules 2 and 3."""
    bad = min(clients, colluders + dropped)
    gaps = Fraction(clients**2 * math.comb(bad, degree), 2 * math.comb(clients, degree))
    stuck = clients * _chance(clients - 1, min(dropped, clients - 1), degree, degree - threshold + 1)
    return gaps <= Fraction(security) and stuck <= Fraction(failure)


def _chance(population: int, marked: int, drawn: int, least: int) -> Fraction:
    """That at least ``least`` of ``drawn`` are marked."""
    if least > drawn:
        return Fraction(0)
    return Fraction(_tails(population, marked, drawn)[max(0, least)], math.comb(population, drawn))


def _tails(population: int, marked: int, drawn: int) -> list[int]:
    """Entry c: in how many of the binom(population, drawn) draws at least c are marked (drawn + 1,)."""
    first, rest = max(0, drawn + marked - population), population - marked
    ways = math.comb(marked, first) * math.comb(rest, drawn - first)
    counts = [0] * (drawn + 1)
    for j in range(first, min(marked, drawn) + 1):
        counts[j] = ways
        ways = ways * (marked - j) * (drawn - j) // ((j + 1) * (rest - drawn + j + 1))
    return list(itertools.accumulate(reversed(counts)))[::-1]
