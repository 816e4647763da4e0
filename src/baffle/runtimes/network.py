"""A graph made ready to run in NumPy: steps, their order for a budget of memory, one block that holds all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.runtimes.activations import activation, rounding
from baffle.runtimes.convolutions import Product
from baffle.runtimes.graph import Graph, Node, Shape
from baffle.runtimes.operators import step_for
from baffle.runtimes.schedule import Planner, Schedule, Segment, Work
from baffle.runtimes.strips import Read, Step, inner

Array = NDArray[Any]
Load = Callable[[int, int, Array], None]  # samples [a, b) of the batch into an array (b − a, C, H, W)
Give = Callable[[int, int, Array], None]  # the network's outputs for samples [a, b)

BLOCK = 1 << 16  # perturbed weights of a layer that are there at once where they are made in blocks
_STRIPS = 1 << 10, 1 << 17  # elements that are worked on together, at least and at most
_LINE = 16  # elements: what begins a cache line is read quicker


def _aligned(size: int) -> int:
    return -(-size // _LINE) * _LINE


class Network:
    """Steps of ``graph`` for weights of the shapes ``tensors``, in ``arithmetic`` (see ``NumpyRuntime``).

    A convolution or linear layer takes a batch norm behind it into its weights, where nothing is rounded,
    and any step an activation into its strips, where nobody else reads the value between.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, Shape],
        arithmetic: str,
        *,
        mode: str,
        micro_batch: int | None,
        memory: int,
    ) -> None:
        self.graph = graph
        self.memory = memory
        self.dtype = np.dtype(np.float64 if arithmetic == "float64" else np.float32)
        self.shapes = graph.shapes(tensors)
        self.round = rounding(arithmetic)
        self._strip = max(_STRIPS[0], min(_STRIPS[1], memory // self.dtype.itemsize // 16))
        self.steps: list[Step] = []
        self._values: list[tuple[tuple[int, ...], int]] = []  # of each step: inputs and output
        self._fuse(tensors)
        if mode == "kernel":
            for step in self.steps:
                if isinstance(step, Product):
                    step.in_blocks(BLOCK)
        works = [
            Work(
                inputs,
                output,
                _aligned(math.prod(self.shapes[output])),
                step.in_place,
                sum(map(_aligned, step.held.values())),
                step.again,
            )
            for step, (inputs, output) in zip(self.steps, self._values, strict=True)
        ]
        self.scratch = _aligned(max(step.scratch for step in self.steps))
        self.planner = Planner(
            works,
            _aligned(math.prod(graph.input_shape)),
            self.dtype.itemsize,
            whole=mode == "full",
            micro_batch=micro_batch,
        )
        self._schedules: dict[int, Schedule] = {}

    def _fuse(self, tensors: Mapping[str, Shape]) -> None:
        nodes = self.graph.nodes
        readers: dict[int, list[int]] = {}
        for number, node in enumerate(nodes):
            for value in node.inputs:
                readers.setdefault(value, []).append(number)

        def follower(value: int, op: str) -> Node | None:
            """The node that alone reads a value, if it is of that kind."""
            alone = readers.get(value, [])
            if len(alone) != 1 or value == len(nodes) or nodes[alone[0]].op != op:
                return None
            return nodes[alone[0]]

        taken: set[int] = set()
        for number, node in enumerate(nodes):
            if number in taken:
                continue
            value, norm = number + 1, None
            if node.op in ("conv2d", "linear") and self.round is None:
                norm = follower(value, "batch_norm")
            if norm is not None:
                value = readers[value][0] + 1
                taken.add(value - 1)
            weight = tensors[str(node.tensor("weight"))] if node.tensor("weight") else ()
            before = [self.shapes[i] for i in node.inputs]
            step = step_for(node, before, self.shapes[number + 1], weight, norm, self._strip)
            step.round = self.round
            act = follower(value, "activation")
            if act is not None:
                step.act = activation(act)
                value = readers[value][0] + 1
                taken.add(value - 1)
            self.steps.append(step)
            self._values.append((node.inputs, value))

    def schedule(self, batch: int) -> Schedule:
        """Raises ConfigError where the budget does not hold one sample's activations."""
        if batch not in self._schedules:
            aside = self.scratch * self.dtype.itemsize
            self._schedules = {batch: self.planner.schedule(batch, self.memory, aside)}
        return self._schedules[batch]

    def block(self, batch: int) -> int:
        """Bytes of the array that a run over ``batch`` samples works in."""
        return (self.schedule(batch).size + self.scratch + _LINE) * self.dtype.itemsize

    def room(self, batch: int) -> Array:
        """That array, not initialised."""
        made = np.empty(self.block(batch) // self.dtype.itemsize, self.dtype)
        skip = -made.ctypes.data % 64 // made.itemsize
        return made[skip : len(made) - _LINE + skip]

    def run(self, batch: int, load: Load, give: Give, read: Read, room: Array) -> None:
        """One forward pass over ``batch`` samples, in ``room``, which nobody else uses meanwhile.

        What overflows is infinite, and NaN in the end: the losses say so, no warning does.
        """
        with np.errstate(all="ignore"):
            self._run(batch, load, give, read, room)

    def _run(self, batch: int, load: Load, give: Give, read: Read, room: Array) -> None:
        plan = self.schedule(batch)
        scratch, room = room[: self.scratch], room[self.scratch :]
        for number, segment in enumerate(plan.segments):
            steps = self.steps[segment.first : segment.stop]
            place = _Places(self, plan, number, room)
            held = self._held(steps, place.weights)
            for step, arrays in zip(steps, held, strict=True):
                step.load(read, arrays)
            for a in range(0, batch, segment.micro):
                b = min(a + segment.micro, batch)
                if number == 0:
                    first = place(0, a, b)
                    load(a, b, first)
                    if self.round is not None:
                        flat = first.reshape(-1)
                        for at in range(0, flat.size, len(scratch)):
                            part = flat[at : at + len(scratch)]
                            self.round(part, scratch[: part.size])
                ends = self._values[segment.first : segment.stop]
                for step, arrays, (inputs, output) in zip(steps, held, ends, strict=True):
                    step.run([place(i, a, b) for i in inputs], place(output, a, b), arrays, scratch, read)
                if segment.stop == len(self.steps):
                    give(a, b, place(self._values[-1][1], a, b))

    def _held(self, steps: Sequence[Step], weights: Array) -> list[dict[str, Array]]:
        found, at = [], 0
        for step in steps:
            own = {}
            for key, size in step.held.items():
                own[key] = weights[at : at + size]
                at += _aligned(size)
            found.append(own)
        return found


class _Places:
    """Where the values of one segment lie: what it is given and gives at the block's two ends, by turns."""

    def __init__(self, network: Network, plan: Schedule, number: int, room: Array) -> None:
        self.room, self.segment = room, plan.segments[number]
        self.shapes = {i: inner(shape) for i, shape in enumerate(network.shapes)}
        self.sizes = {i: math.prod(shape) for i, shape in self.shapes.items()}
        self.ends: dict[int, int] = {}
        segment: Segment = self.segment
        kept = []
        if number:
            kept.append((segment.taken, number % 2 == 0))
        if number + 1 < len(plan.segments):
            kept.append((segment.given, number % 2 == 1))
        self.arena = 0
        for value, low in kept:
            size = _aligned(self.sizes[value]) * plan.batch
            self.ends[value] = 0 if low else plan.size - size
            if low:
                self.arena = size
        at = self.arena + segment.arena * segment.micro
        self.weights = room[at : at + segment.weights]

    def __call__(self, value: int, a: int, b: int) -> Array:
        """Samples [a, b) of a value: (b − a, ...) in the inner order."""
        size = self.sizes[value]
        if value in self.ends:
            at = self.ends[value] + a * size
        else:
            at = self.arena + self.segment.offsets[value] * self.segment.micro
        return self.room[at : at + (b - a) * size].reshape(b - a, *self.shapes[value])
