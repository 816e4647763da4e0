"""Derivatives along directions by forward-mode propagation: the scheme ``tangent``.

Each operation is run on a pair, its value and the change of that value along z_k (``torch.func.jvp``). The
change has a scale of its own, so it survives in bfloat16, where the difference of two losses is rounding.
The value is the same for all directions: a chunk of them shares it (``torch.func.vmap``), and a layer's
work is one product of the shared weights with all changes and one of the shared input with all z_k. So
convolutions stay plain ones, on a GPU and on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baffle.errors import ConfigError
from baffle.runtimes.batched import in_chunks, quiet
from baffle.runtimes.objective import Directions, Objective


def derivatives(
    objective: Objective, origin: Tensor, directions: Sequence[int], rows: Directions, chunk: int
) -> tuple[float, NDArray[np.float64]]:
    """The mean loss at W and its derivatives (len(directions),) along z_k, float64; ``chunk`` at a time.

    Trainable tensors and z_k are each rounded to the module's own types; loss and mean are float64. Raises
    ConfigError for a module with an operation that has no forward derivative.
    """
    part = objective.part
    objective = objective.contiguous()
    weights = tuple(part.cast(origin))
    loss = float(objective.mean(weights))

    def along(z: Tensor) -> Tensor:
        change: Tensor = torch.func.jvp(lambda *w: objective.mean(w), weights, tuple(part.cast(z)))[1]
        return change

    def one_by_one(z: Tensor) -> Tensor:
        return torch.stack([along(row) for row in z])

    with quiet():
        try:
            return loss, in_chunks(torch.func.vmap(along), directions, rows, chunk)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # control flow that depends on values, for one
            pass
        try:
            return loss, in_chunks(one_by_one, directions, rows, chunk)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the loss alone could be computed
            why = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"the scheme tangent cannot go through this module ({why}): use forward or central"
            ) from error
