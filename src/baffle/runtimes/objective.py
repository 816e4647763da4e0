"""The loss of one batch as a function of flat weights: what every way through directions measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from baffle.errors import ConfigError
from baffle.perturbations import Layout

Loss = Callable[[Any, Tensor], Tensor]
Reduce = Callable[[Tensor], Tensor]  # per-sample losses (B,) → what is kept of them, float64
Directions = Callable[[Sequence[int]], list[Tensor]]  # numbers k → rows z_k (n,) in the wide type


def mean(losses: Tensor) -> Tensor:
    """The mean loss ()."""
    return losses.double().mean()


def each(losses: Tensor) -> Tensor:
    """Every sample's loss, (B,)."""
    return losses.double()


@dataclass(frozen=True)
class Part:
    """The part of a module that depends on W: all of it, or what lies behind its frozen prefix.

    The mappings go from a tensor's name inside the part to the trainable tensor's place in ``layout``, to
    a frozen parameter, or to a buffer. A tied tensor appears under each of its names, so that nobody need
    look for ties anew at every forward pass.
    """

    module: nn.Module
    layout: Layout
    dtypes: tuple[torch.dtype, ...]
    wide: torch.dtype  # in which W + scale·z_k is added up
    trainable: dict[str, int]
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def cast(self, flat: Tensor) -> list[Tensor]:
        """Flat values (n,) as the trainable tensors, each in its own type. Views where that is possible."""
        return [values.to(dtype) for values, dtype in zip(self.layout.split(flat), self.dtypes, strict=True)]


@dataclass(frozen=True)
class Objective:
    """One batch, ready for ``part``: its inputs and targets lie on the device.

    ``unrounded`` are the inputs before they were rounded to the module's type, where they were.
    """

    part: Part
    loss: Loss
    inputs: tuple[Any, ...]
    targets: Tensor
    unrounded: tuple[Tensor] | None = None

    def contiguous(self) -> Objective:
        """The same with inputs in the common order of memory: some transforms of torch know no other."""
        inputs = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in self.inputs)
        return replace(self, inputs=inputs)

    def outputs(self, weights: Sequence[Tensor], module: nn.Module | None = None) -> Any:
        """The part's outputs by a functional call, with ``weights`` in place of the trainable tensors.

        ``module`` is the part's own, or a copy of it. Buffers and inputs are copies: a module may change
        them in place, and the next direction and the caller need them as they were.
        """
        part = self.part
        tensors = dict(part.frozen)
        tensors.update((name, buffer.clone()) for name, buffer in part.buffers.items())
        tensors.update((name, weights[i]) for name, i in part.trainable.items())
        inputs = tuple(x.clone() if isinstance(x, Tensor) else x for x in self.inputs)
        return functional_call(module or part.module, tensors, inputs, tie_weights=False)

    def per_sample(self, weights: Sequence[Tensor], module: nn.Module | None = None) -> Tensor:
        """The losses (B,). Raises ConfigError where the loss function returns another shape."""
        return self.checked(self.outputs(weights, module))

    def mean(self, weights: Sequence[Tensor], module: nn.Module | None = None) -> Tensor:
        """The mean loss (), float64."""
        return mean(self.per_sample(weights, module))

    def room(self, directions: int, reduce: Reduce) -> NDArray[np.float64]:
        """For what is kept of so many directions: (directions,) means, or (directions, B)."""
        return np.empty(directions if reduce is mean else (directions, len(self.targets)))

    def checked(self, outputs: Any) -> Tensor:
        """The loss function's (B,) of a module's outputs."""
        losses = self.loss(outputs, self.targets)
        if losses.dim() != 1 or len(losses) != len(self.targets):
            raise ConfigError(
                f"the loss returned the shape {tuple(losses.shape)}: it must return one loss a sample "
                f"({len(self.targets)},); use reduction='none'"
            )
        return losses
