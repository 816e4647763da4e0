"""Comparing in turns: A B C, A B C, ..., so that the machine's mood is the same for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles


class Turns:
    """Seconds of each candidate, turn by turn."""

    def __init__(self, candidates: Mapping[str, Callable[[], object]], turns: int) -> None:
        for run in candidates.values():
            run()
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(turns):
            for name, run in candidates.items():
                started = time.perf_counter()
                run()
                self.seconds[name].append(time.perf_counter() - started)

    def ratio(self, over: str, under: str, scale: float = 1.0) -> dict[str, float]:
        """``over`` / ``under``, times ``scale``."""
        pairs = [scale * a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True)]
        low, _, high = quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
        minima = scale * min(self.seconds[over]) / min(self.seconds[under])
        return {"median": median(pairs), "low": low, "high": high, "of_minima": minima}

    def quickest(self, *names: str) -> str:
        """The candidate with the lowest median."""
        return min(names, key=lambda name: median(self.seconds[name]))

    def summary(self) -> dict[str, dict[str, float]]:
        return {
            name: {"median": median(seconds), "min": min(seconds)} for name, seconds in self.seconds.items()
        }
