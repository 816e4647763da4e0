"""How many holders and shares: exact counts against fractions, bounds against chance, and limits."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.errors import ConfigError
from baffle.secagg import parameters
from baffle.secagg.parameters import (
    FAILURE,
    SECURITY,
    Parameters,
    colluders_among,
    find,
    hidden,
    part,
    quorum,
)


def hypergeometric(population, marked, drawn):
    """P[m marked ones are drawn], m = 0 … drawn, as fractions."""
    total = math.comb(population, drawn)
    return [
        Fraction(math.comb(marked, m) * math.comb(population - marked, drawn - m), total) if drawn >= m else 0
        for m in range(drawn + 1)
    ]


# -- counting ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_how_many_of_those_drawn_are_marked(data):
    population = data.draw(st.integers(2, 40))
    drawn, marked = data.draw(st.integers(1, population)), data.draw(st.integers(0, population))
    chance = data.draw(st.floats(1e-12, 0.9))
    m = parameters._exceeded(population, marked, drawn, chance)
    law = hypergeometric(population, marked, drawn)
    assert sum(law) == 1
    assert sum(law[m + 1 :]) <= Fraction(chance)
    assert m == 0 or sum(law[m:]) > Fraction(chance)


@pytest.mark.parametrize(
    ("fraction", "clients", "count"),
    [(0.3, 10, 3), (0.1, 1000, 100), (0.1, 19, 1), (0.0, 5, 0), (0.7, 10, 7)],
)
def test_a_part_of_the_clients(fraction, clients, count):
    assert part(fraction, clients) == count


def test_all_colluders_hold_shares_where_everybody_does():
    assert colluders_among(9, 10, 3) == 3
    assert colluders_among(50, 10, 3) == 3
    for corrupt in (9, 10, 11, 50):  # one is honest: the client that counts
        assert colluders_among(9, 10, corrupt) == 9
    assert colluders_among(9, 10, 8) == 8
    assert colluders_among(48, 1000, 100) < 48
    assert colluders_among(48, 1000, 100) >= 5


def test_colluders_among_drawn_holders_against_chance():
    """At a weak security, so that chance can be seen: no more than that part of drawings exceeds c."""
    rng, present, corrupt, holders, security = np.random.default_rng(0), 60, 12, 20, 0.2
    c = colluders_among(holders, present, corrupt, security)
    honest, trials = present - corrupt, 4000
    drawn = rng.hypergeometric(corrupt, present - 1 - corrupt, holders, size=(trials, honest))
    rate = (drawn.max(axis=1) > c).mean()
    assert rate <= security + 4 * math.sqrt(security / trials)
    assert (drawn.max(axis=1) > c - 2).mean() > security  # and c is not idly large


# -- how many hide each other --------------------------------------------------------------------------


def smallest_closed(holders, present, honest, left, security):
    """The union bound in fractions."""
    chance = Fraction(0)
    for size in range(left + 1, honest + 1):
        tail = sum(hypergeometric(present - 1, size - 1, holders)[left:])
        chance += min(Fraction(1), math.comb(honest, size) * tail**size)
        if chance > Fraction(security):
            return size
    return honest


@pytest.mark.parametrize(
    ("present", "corrupt", "holders"), [(12, 0, 6), (20, 2, 10), (30, 0, 12), (40, 3, 16), (60, 6, 30)]
)
@pytest.mark.parametrize("security", [2.0**-40, 2.0**-10, 0.3])
def test_the_bound_of_closed_sets_in_fractions(present, corrupt, holders, security):
    c = colluders_among(holders, present, corrupt, security)
    for threshold in range(2, holders + 1):
        found = hidden(holders, present, corrupt, threshold, True, security)
        left = threshold - c
        if left < 1 or 2 * threshold <= holders + c or quorum(holders, c, threshold) > holders:
            assert found == 0
        else:
            assert found == smallest_closed(holders, present, present - corrupt, left, security)


def test_closed_sets_against_chance():
    """Graphs drawn at random, every set looked at: a closed one below the bound is as rare as was said."""
    present, holders, left, security = 14, 5, 3, 0.25
    bound = smallest_closed(holders, present, present, left, security)
    assert bound == parameters._smallest_closed(holders, present, present, left, security)
    assert left + 1 < bound < present
    rng, trials, below = np.random.default_rng(1), 400, 0
    subsets = np.array(
        [
            sum(1 << i for i in members)
            for size in range(left + 1, bound)
            for members in itertools.combinations(range(present), size)
        ],
        np.int64,
    )
    inside = (subsets[:, None] >> np.arange(present)) & 1
    for _ in range(trials):
        drawn = np.zeros((present, present), np.int64)
        for i in range(present):
            others = np.delete(np.arange(present), i)
            drawn[i, rng.choice(others, holders, replace=False)] = 1
        closed = ((inside @ drawn.T >= left) | (inside == 0)).all(axis=1)
        below += bool(closed.any())
    assert below / trials <= security + 4 * math.sqrt(security / trials)
    assert below > 0  # the bound is about something that happens


def opened_at_most(honest, left):
    """The most honest clients whose roots open, where each hears of at most H − left dead: by words."""
    return (honest * (honest - left)) // left


@pytest.mark.parametrize("present", [5, 8, 11, 20, 33])
def test_everybody_with_everybody(present):
    for corrupt, threshold in itertools.product(range(present // 2), range(2, present)):
        honest, left = present - corrupt, threshold - corrupt
        signed = hidden(present - 1, present, corrupt, threshold, True)
        unsigned = hidden(present - 1, present, corrupt, threshold, False)
        if left < 1 or 2 * threshold <= present + corrupt:
            assert signed == unsigned == 0
            continue
        assert unsigned == max(0, honest - opened_at_most(honest, left))
        if quorum(present - 1, corrupt, threshold) <= present - 1:
            assert signed == left + 1
        else:
            assert signed == 0


@pytest.mark.parametrize("honest", range(3, 26))
def test_participants_told_apart_do_not_lower_the_count(honest):
    """All lists that a server may tell, by their sizes: p participants, m of them in one context, g opened.

    The m give the roots of p − left at most, the others of H − left; p − g of them need ``left`` words each.
    What opens a self-mask serves in its own context: so m is left + 1 or more.
    """
    for left in range(honest // 2 + 1, honest + 1):
        fewest = min(
            g
            for p in range(min(left + 1, honest), honest + 1)
            for m in range(min(left + 1, p), p + 1)
            for g in range(p + 1)
            if (p - g) * left <= m * (p - left) + (honest - m) * (honest - left)
        )
        assert fewest >= honest - opened_at_most(honest, left)


@pytest.mark.parametrize("holders", [3, 5, 8, 11])
def test_one_honest_client_hides_behind_nobody(holders):
    """Where fewer than two are honest nothing is certain, whatever the threshold."""
    present = 12
    for threshold, signed, corrupt in itertools.product(
        range(2, holders + 1), (False, True), (present - 1, present, present + 1, 10 * present)
    ):
        assert hidden(holders, present, corrupt, threshold, signed) == 0
    assert hidden(11, present, present - 2, 11, True) == 0  # nor with two: 2t ≤ k + c + 1 for every t ≤ k
    assert hidden(11, present, present - 3, 11, True) == 3


def test_drawn_holders_without_consistency_hide_nobody():
    assert hidden(48, 1000, 0, 40, False) == 0
    assert hidden(48, 1000, 0, 40, True) > 3


# -- the finder ----------------------------------------------------------------------------------------


def check(found, clients, corrupt, dropout, least=3):
    """What ``find`` promises, counted anew."""
    colluding, dropping = part(corrupt, clients), part(dropout, clients)
    k, t = found.degree, found.threshold
    for present in {clients, clients - dropping}:
        holders = min(k, present - 1)
        if t > holders:
            continue  # everybody's holders are those present: then too few are
        everybody = holders == present - 1
        if everybody:
            c = min(colluding, present - 1)
        else:
            law = hypergeometric(present - 1, colluding, holders)
            c = next(
                m
                for m in range(holders, -1, -1)
                if m == 0 or sum(law[m:]) * (present - colluding) > Fraction(SECURITY)
            )
        honest, left = present - colluding, t - c
        assert 2 * t > holders + c  # not both secrets of anybody
        if found.consistency:
            q = holders + c - t + 1
            assert q <= holders
            assert holders - q + c < t  # whoever vouched does not open
            hides = left + 1 if everybody else smallest_closed(holders, present, honest, left, SECURITY)
        else:
            assert everybody
            hides = honest - opened_at_most(honest, left)
        assert hides >= least, (present, hides)
    if k < clients - 1:
        law = hypergeometric(clients - 1, dropping, k)
        assert sum(law[k - t + 1 :]) * clients <= Fraction(FAILURE)
        assert found.consistency
    else:
        assert t <= clients - 1 - dropping  # whoever they are


@pytest.mark.parametrize(
    ("corrupt", "dropout"), [(0.1, 0.3), (0.0, 0.4), (0.2, 0.1), (0.3, 0.05), (0.05, 0.0)]
)
@pytest.mark.parametrize("clients", [5, 6, 10, 11, 20, 37, 100])
def test_what_is_found_for_few_clients(clients, corrupt, dropout):
    colluding, dropping = part(corrupt, clients), part(dropout, clients)
    both = [
        hidden(clients - 1, clients, colluding, clients - 1 - dropping, signed) for signed in (False, True)
    ]
    if max(both) < 3:
        with pytest.raises(ConfigError, match="no threshold among at most 255 holders"):
            find(clients, corrupt, dropout)
        return
    found = find(clients, corrupt, dropout)
    assert found == Parameters(clients - 1, clients - 1 - dropping, both[0] < 3)
    check(found, clients, corrupt, dropout)


@pytest.mark.parametrize(
    ("clients", "corrupt", "dropout"), [(120, 0.05, 0.1), (150, 0.1, 0.1), (300, 0.05, 0.05)]
)
def test_what_is_found_for_many_clients(clients, corrupt, dropout):
    found = find(clients, corrupt, dropout)
    assert found.degree < clients - 1
    check(found, clients, corrupt, dropout, least=clients // 10)
    smaller = find(clients, corrupt, dropout / 2)
    assert smaller.degree <= found.degree


def test_two_log_c_neighbours_are_too_few():
    """Of 1000 clients, a tenth colluding: what hides anybody is no sum where one in a hundred vanish."""
    degree, found = 2 * math.ceil(math.log2(1000)), {}
    assert degree == 20
    law = hypergeometric(999, 10, degree)
    for threshold, signed in itertools.product(range(2, degree + 1), (False, True)):
        hides = hidden(degree, 1000, 100, threshold, signed)
        assert hides < 5
        if hides:
            found[threshold, signed] = hides
            assert sum(law[degree - threshold + 1 :]) * 1000 > 1  # a client whose shares do not suffice
    assert found == {(19, True): 3, (20, True): 4}


def test_consistency_is_taken_where_it_is_asked_for():
    assert not find(20, 0.0, 0.1).consistency
    assert find(20, 0.0, 0.1, consistency=True) == Parameters(19, 17, True)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((2, 0.0, 0.0), "fewer than 3 protects nobody"),
        ((10, 1.0, 0.0), "they lie in"),
        ((10, 0.0, -0.1), "they lie in"),
        ((10, 0.4, 0.4), "no threshold"),
        ((300, 0.4, 0.4), "no threshold"),
        ((1000, 0.1, 0.3), "100 may collude and 300 drop out"),
    ],
)
def test_what_cannot_be_found(arguments, what):
    with pytest.raises(ConfigError, match=what):
        find(*arguments)


def test_least_is_kept_to():
    with pytest.raises(ConfigError):
        find(10, 0.1, 0.3, least=9)
    found = find(10, 0.1, 0.1, least=7)
    check(found, 10, 0.1, 0.1, least=7)
