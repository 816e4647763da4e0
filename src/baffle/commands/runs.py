"""What commands say of runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from baffle.errors import DataError

if TYPE_CHECKING:
    from baffle.runs import RunFolder


def last_look(run: RunFolder) -> dict[str, Any]:
    looks = [row for row in run.metrics() if row.get("test_accuracy") is not None]
    if not looks:
        raise DataError(f"{run.path} has no look at the test set yet")
    return looks[-1]


def epsilon(last: dict[str, Any]) -> float:
    """ε at the last look. A record has null where it is infinite."""
    return math.inf if last.get("epsilon") is None else float(last["epsilon"])
