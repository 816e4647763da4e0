"""Directions in one layer at a time: what lies before the layer is computed once, at W.

A direction of the last layer then costs that layer, not a forward pass. Each layer has a part of its own, the
module behind the cut before it, with its own ways through the directions: those of ``sweeps``, and where the
layer is measured along all of its coordinates that of ``coordinates``, if the layer is such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.func import functional_call

from baffle.errors import ConfigError
from baffle.perturbations import Layers
from baffle.runtimes import LayerCost
from baffle.runtimes.coordinates import Coordinates
from baffle.runtimes.objective import Directions, Objective, Part, Reduce, mean
from baffle.runtimes.prefix import split_before
from baffle.runtimes.sweeps import Sweeps

# A part of the module → its tensors' names → those in the whole.
Names = Callable[[nn.Module], dict[str, str]]
_Found = TypeVar("_Found")
# How far two ways to the same differences may lie apart: a share of the largest, and of the losses.
_NEAR, _ROUNDING = 0.01, 1e-5


@dataclass
class _Layer:
    before: fx.GraphModule | None  # None: there is nothing to keep
    at: dict[str, int]  # trainable tensors inside ``before`` → their places in the layout
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    part: Part
    sweeps: Sweeps
    coordinates: Coordinates | None
    verified: bool = False  # coordinates and sweeps were compared

    def along_coordinates(
        self, at: Objective, weights: Sequence[Tensor], entries: Sequence[int], step: float, reduce: Reduce
    ) -> NDArray[np.float64] | None:
        """``Coordinates.differences``, if the layer is such."""
        return self._tried(at, lambda way: way.differences(at, weights, entries, step, reduce))

    def of_coordinate(self, at: Objective, weights: Sequence[Tensor]) -> float | None:
        """``Coordinates.multiplications``, if the layer is such."""
        return self._tried(at, lambda way: way.multiplications(at, weights))

    def _tried(self, at: Objective, call: Callable[[Coordinates], _Found]) -> _Found | None:
        if self.coordinates is None or not self.coordinates.suits(at):
            return None
        try:
            return call(self.coordinates)
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception:  # a loss that vmap cannot do raises many types; the other way shows what is wrong
            self.coordinates = None
            return None

    def behind(self, objective: Objective, weights: Sequence[Tensor]) -> Objective:
        """The batch as it reaches the layer. Cost: what lies before it."""
        if self.before is None:
            return objective
        tensors = dict(self.frozen)
        tensors.update((name, buffer.clone()) for name, buffer in self.buffers.items())
        tensors.update((name, weights[place]) for name, place in self.at.items())
        inputs = tuple(x.clone() if isinstance(x, Tensor) else x for x in objective.inputs)
        crossing = functional_call(self.before, tensors, inputs, tie_weights=False)
        return Objective(self.part, objective.loss, tuple(crossing), objective.targets)


class Layered:
    """The layers of a part, each behind its own cut."""

    def __init__(
        self, part: Part, names: Names, device: torch.device, memory_budget: int, whole: Sweeps
    ) -> None:
        self._part, self._whole = part, whole
        trainable = names(part.module)  # of this part's own names, those in the whole
        self._layers = [
            self._layer(start, stop, names, trainable, device, memory_budget)
            for _, start, stop in part.layout.layers
        ]

    def _layer(
        self,
        start: int,
        stop: int,
        names: Names,
        whole: dict[str, str],
        device: torch.device,
        memory_budget: int,
    ) -> _Layer:
        part, layout = self._part, self._part.layout
        own = {place for place, offset in enumerate(layout.offsets[:-1]) if start <= offset < stop}
        tensors = dict(part.module.named_parameters(remove_duplicate=False))
        moving = {id(tensors[name]) for name, place in part.trainable.items() if place in own}
        cut = split_before(part.module, moving)
        if cut is None:
            return _Layer(None, {}, {}, {}, part, self._whole, Coordinates.of(part, own, memory_budget))
        trainable = {whole[name]: place for name, place in part.trainable.items()}
        frozen = {whole[name]: tensor for name, tensor in part.frozen.items()}
        buffers = {whole[name]: tensor for name, tensor in part.buffers.items()}

        def inside(module: nn.Module) -> tuple[dict[str, int], dict[str, Tensor], dict[str, Tensor]]:
            found = names(module)
            return (
                {name: trainable[known] for name, known in found.items() if known in trainable},
                {name: frozen[known] for name, known in found.items() if known in frozen},
                {name: buffers[known] for name, known in found.items() if known in buffers},
            )

        behind = Part(cut.after, layout, part.dtypes, part.wide, *inside(cut.after))
        sweeps = Sweeps(behind, device, memory_budget)
        coordinates = Coordinates.of(behind, own, memory_budget)
        return _Layer(cut.before, *inside(cut.before), behind, sweeps, coordinates)

    def losses(
        self,
        objective: Objective,
        origin: Tensor,
        perturbation: Layers,
        directions: Sequence[int],
        scale: float,
        rows: Directions,
        nowhere: Directions,
        reduce: Reduce = mean,
    ) -> NDArray[np.float64]:
        """As ``Sweeps.losses``. Each is the loss at W, as the whole module has it, plus the difference to the
        loss at W that the layer's part has: its rounding, of what was kept, cancels. Cost: what lies behind
        the layers, once a direction; a forward pass, and two passes through what is around each layer.
        """
        base = self._whole.losses(objective, origin, [0], 0.0, nowhere, reduce)
        losses, weights = np.repeat(base, len(directions), axis=0), self._part.cast(origin)
        parts = perturbation.parts(self._part.layout)
        for layer, (own, start, stop, _) in zip(self._layers, parts, strict=True):
            places = [place for place, k in enumerate(directions) if k in own]
            if not places:
                continue
            at = layer.behind(objective, weights)
            chosen = [directions[place] for place in places]

            def by_sweeps(
                some: Sequence[int], layer: _Layer = layer, at: Objective = at
            ) -> NDArray[np.float64]:
                here = layer.sweeps.losses(at, origin, [0], 0.0, nowhere, reduce)
                return layer.sweeps.losses(at, origin, some, scale, rows, reduce) - here

            found = None
            if len(own) == stop - start:
                entries = [k - own.start for k in chosen]
                step = scale * float(np.float32(math.sqrt(perturbation.directions)))
                found = layer.along_coordinates(at, weights, entries, step, reduce)
                if found is not None and not layer.verified:
                    some = sorted({0, len(chosen) // 2, len(chosen) - 1})
                    layer.verified = agree(found[some], by_sweeps([chosen[i] for i in some]), base)
                    if not layer.verified:
                        found = layer.coordinates = None
            losses[places] += by_sweeps(chosen) if found is None else found
        return losses

    def costs(self, objective: Objective, origin: Tensor) -> tuple[LayerCost, ...]:
        """Multiplications behind the cut before each layer, and of one of its coordinates, as a share of all.

        Cost: two forward passes a layer, three where it is measured by coordinates.
        """
        whole = max(self._whole.survey(objective, origin).multiplications, 1)
        weights = self._part.cast(origin)
        found = []
        for layer in self._layers:
            at = layer.behind(objective, weights)
            share = min(max(layer.sweeps.survey(at, origin).multiplications, 1) / whole, 1.0)
            one = layer.of_coordinate(at, weights)
            one = share if one is None else min(share, one / whole)
            found.append(LayerCost(share, one))
        return tuple(found)


def agree(found: NDArray[np.float64], expected: NDArray[np.float64], losses: NDArray[np.float64]) -> bool:
    """Whether differences of losses are the same to the rounding of float32."""
    rounding = _ROUNDING * (1 + np.abs(losses).max())
    return bool(np.abs(found - expected).max() <= _NEAR * np.abs(expected).max() + rounding)
