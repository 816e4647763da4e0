"""A data set behind a model's frozen prefix: what no trained weight reaches, computed once for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.runtimes import Batch


class PrefixRuntime(Protocol):
    """A runtime that can tell the frozen prefix of its model from the rest."""

    @property
    def has_frozen_prefix(self) -> bool:
        """True where part of the model does not depend on a trainable parameter."""
        ...

    def prefixed(self, batch: Batch) -> Batch:
        """The batch after the frozen prefix. Raises ConfigError where there is none to be cached."""
        ...


@dataclass(frozen=True)
class _CachedPrefix:
    features: NDArray[np.generic]
    targets: NDArray[np.generic]

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        return Batch(self.features[indices], self.targets[indices], prefixed=True)


def cache_prefix(runtime: PrefixRuntime, samples: Any, chunk: int = 128) -> _CachedPrefix:
    """A data set (``len`` and ``batch(indices)``) after the frozen prefix, computed once.

    For data without augmentation. Cost: one pass of the prefix over the data; memory: its features.
    Raises ConfigError where the prefix cannot be cached (see the runtime's ``prefixed``).
    """
    parts = [
        runtime.prefixed(samples.batch(np.arange(at, min(at + chunk, len(samples)))))
        for at in range(0, len(samples), chunk)
    ]
    return _CachedPrefix(
        np.concatenate([part.inputs for part in parts]), np.concatenate([part.targets for part in parts])
    )
