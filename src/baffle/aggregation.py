"""Aggregators: many clients' answers → one sum. The server sees nothing of a round but that sum."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.errors import AggregationError
from baffle.plan import RoundPlan, RoundResult, RoundSum


class Tally(Protocol):
    """One round's sum in the making: answers go in one by one, and need not be kept."""

    def add(self, name: str, result: RoundResult) -> None:
        """Takes a client's answer. Raises AggregationError, and is as before, where it does not fit."""
        ...

    def close(self) -> RoundSum:
        """The weighted mean of each entry. Raises AggregationError where there is none to give.

        The clients of the cohort that were not added by now are the ones that dropped out.
        """
        ...


class Aggregator(Protocol):
    """Sums the answers of a round, weighted with N_c."""

    def open(self, plan: RoundPlan) -> Tally:
        """An empty tally for the answers to ``plan``."""
        ...


class PlainSum:
    """In the clear: the server sees each client's slopes. For simulation and for trusted servers.

    Sums in float64 in ascending order of the clients' names, and takes them in no other order, so that
    the order of arrival changes no bit: a driver whose answers arrive as they like holds back those whose
    turn has not come (``Server.step`` sorts). Memory: two answers in float64, whatever the number of clients.
    """

    def open(self, plan: RoundPlan) -> Tally:
        return _PlainTally(plan)


class _PlainTally:
    def __init__(self, plan: RoundPlan) -> None:
        self._plan = plan
        self._last: str | None = None
        self._total: NDArray[np.float64] = np.zeros(0)
        self._weight: NDArray[np.float64] = np.zeros(0)
        self._product: NDArray[np.float64] = np.zeros(0)  # room for N_c·v, made once

    def add(self, name: str, result: RoundResult) -> None:
        self._check(name, result)
        count = len(result.values)
        if count > len(self._total):
            more = np.zeros(count - len(self._total))
            self._total, self._product = np.concatenate((self._total, more)), np.empty(count)
            # A client answers a whole row: where all rows have one length, one weight serves them all.
            self._weight = np.concatenate((self._weight, more)) if self._plan.asks_slopes else np.zeros(1)
        product = self._product[:count]
        np.multiply(result.values, float(result.samples), out=product, dtype=np.float64)
        self._total[:count] += product
        self._weight[:count] += result.samples
        self._last = name

    def close(self) -> RoundSum:
        if self._last is None:
            raise AggregationError(f"round {self._plan.round}: no client answered")
        return RoundSum(self._plan.round, self._total / self._weight)

    def _check(self, name: str, result: RoundResult) -> None:
        plan, count = self._plan, len(result.values)
        if self._last is not None and name <= self._last:
            raise AggregationError(f"client {name} was added behind {self._last}: names must ascend")
        if result.round != plan.round or result.plan_digest != plan.digest:
            raise AggregationError(f"client {name} answered another plan than round {plan.round}'s")
        if plan.asks_slopes and count > plan.estimator.directions:
            raise AggregationError(
                f"client {name} sent {count} slopes, {plan.estimator.directions} were asked for"
            )
        if not plan.asks_slopes and self._last is not None and count != len(self._total):
            raise AggregationError(f"client {name} sent {count} numbers where others sent {len(self._total)}")
