"""The NumPy runtime: a bundle's losses on a device that has NumPy and little memory.

One forward pass holds one segment's perturbed weights and one micro-batch's activations (see ``schedule``).
W + scale·z_k is made tensor by tensor, part by part, from W as it lies in memory or on disk and from z_k,
which is made again where it is needed. It is the reference of what a device computes, and runs on one
thread, but for the products, where the BLAS that NumPy was built with decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError, DataError
from baffle.perturbations import Gaussian, Layout, Perturbation
from baffle.runtimes import Batch, check_sigma
from baffle.runtimes.activations import rounding
from baffle.runtimes.graph import Graph, Node
from baffle.runtimes.network import Network
from baffle.runtimes.sources import STORAGES, PackedWeights, Source, packed_bytes
from baffle.runtimes.strips import Read, to_inner, to_outer
from baffle.stream import Stream

if TYPE_CHECKING:
    from baffle.bundle import Bundle

Array = NDArray[Any]
MODES = ("full", "layer", "stream", "kernel")
ARITHMETICS = ("float64", "float32", "float16", "bfloat16")

_PART = 1 << 14  # weights that are perturbed together
_MAKING = 20  # bytes of arrays that one of them takes meanwhile
_NOWHERE = Stream(bytes(32), 0)


class NumpyRuntime:
    """Losses of ``bundle``'s network by NumPy alone.

    ``mode`` says what is in memory besides activations: ``full``: W and all of one W + σz_k; ``layer``: W,
    and W + σz_k of one segment of the network; ``stream``: of one segment, while W is read in slices from
    whatever source it is (a file: ``StoredWeights``); ``kernel``: as ``stream``, and of a large layer only
    a block of output channels. ``memory`` (bytes) bounds activations and what else a pass works in, W and
    W + σz_k apart; ``micro_batch`` fixes how many samples go together, None leaves it to ``memory``.
    Results are equal to float32's rounding whatever mode and micro-batch.

    ``storage``: W is held in float32, float16, bfloat16 or int8 (see ``PackedWeights``), and perturbed after
    it is float32 again. ``arithmetic``: float32, float64 (for tests), or float16 and bfloat16, where weights,
    perturbed weights and every operator's result are rounded, as on hardware that has nothing else; products
    are summed in float32. Inputs of type uint8 become ``x * scale + shift`` by channel, with the bundle's
    numbers or those of ``normalise``.

    Raises ConfigError for a bundle without a graph, naming the operators, and for an unknown setting.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        mode: str = "layer",
        micro_batch: int | None = None,
        memory: int = 8 << 20,
        storage: str = "float32",
        arithmetic: str = "float32",
        normalise: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> None:
        if bundle.graph is None:
            raise ConfigError(f"the bundle {bundle.name} needs another runtime: {bundle.missing}")
        for value, known, what in (
            (mode, MODES, "mode"),
            (storage, STORAGES, "storage"),
            (arithmetic, ARITHMETICS, "arithmetic"),
        ):
            if value not in known:
                raise ConfigError(f"unknown {what} {value!r}: use {', '.join(known)}")
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro_batch = {micro_batch}: at least 1 is needed")
        self.bundle, self.mode, self.storage, self.arithmetic = bundle, mode, storage, arithmetic
        self.memory = memory
        self._scale, self._shift = normalise or (bundle.scale, bundle.shift)
        shapes = dict(zip(bundle.layout.names, bundle.layout.shapes, strict=True))
        shapes.update({name: values.shape for name, values in bundle.frozen.items()})
        before, after = split(bundle.graph, bundle.layout.names, shapes)

        def network(graph: Graph) -> Network:
            return Network(graph, shapes, arithmetic, mode=mode, micro_batch=micro_batch, memory=memory)

        self._prefix = None if before is None else network(before)
        self._network = network(after)
        self._held: tuple[Batch, Batch] | None = None

    @property
    def layout(self) -> Layout:
        return self.bundle.layout

    @property
    def frozen_digest(self) -> bytes:
        return self.bundle.frozen_digest

    def weights(self) -> NDArray[np.float32]:
        return self.bundle.weights()

    def check_sigma(self, sigma: float) -> None:
        check_sigma(sigma, self.arithmetic)

    def peak(self, batch_size: int) -> int:
        """Bytes of arrays that a measurement of ``batch_size`` samples holds at most, all together.

        That is W where the mode or the storage holds it, perturbed weights, activations, and what
        directions are made with; not the batch, the frozen tensors, and numbers by sample and direction.
        Raises ConfigError where ``memory`` does not suffice.
        """
        logits = self._network.shapes[-1]
        loss = 3 * 8 * batch_size * math.prod(logits)
        made = _MAKING * min(_PART, max(self.layout.sizes)) + (1 << 15)
        after = self._network.block(batch_size) + loss + made
        before = 0
        if self._prefix is not None:
            features = 4 * batch_size * math.prod(self._prefix.shapes[-1])
            before = self._prefix.block(batch_size) + features + 8 * _PART + (1 << 15)
            after += features
        held = 0
        if self.storage != "float32":
            held = packed_bytes(self.layout, self.storage)
        elif self.mode in ("full", "layer"):
            held = 4 * self.layout.n
        return max(before, after) + held

    # -- losses -------------------------------------------------------------------------------------

    def loss(self, weights: Source, batch: Batch) -> float:
        """Mean loss at W, a source of n weights; accumulated in float64. Cost: one forward pass."""
        return float(self.losses(weights, batch, _NOWHERE, Gaussian(), range(1), 0.0)[0])

    def losses(
        self,
        weights: Source,
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        found = self.example_losses(weights, batch, stream, perturbation, directions, scale)
        means: NDArray[np.float64] = found.mean(axis=1)
        return means

    def example_losses(
        self,
        weights: Source,
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        """Losses (len(directions), B) of each sample alone at W + scale·z_k."""
        source = self._source(weights)
        batch = self._behind_prefix(batch)
        targets = self._targets(batch)
        losses = np.empty((len(directions), len(targets)))
        room = self._network.room(len(targets))
        for row, k in zip(losses, directions, strict=True):
            read = self._reader(source, stream, perturbation, k, scale)
            self._pass(batch, read, room, lambda a, b, out, row=row: self._loss(out, targets[a:b], row[a:b]))
        return losses

    def outputs(self, weights: Source, batch: Batch) -> NDArray[np.float32]:
        """The network's outputs (B, ...), e.g. logits. Cost: one forward pass."""
        batch = self._behind_prefix(batch)
        count = len(batch.inputs)
        made = np.empty((count, *self._network.shapes[-1]), np.float32)

        def give(a: int, b: int, out: Array) -> None:
            made[a:b] = to_outer(out)

        read = self._reader(self._source(weights), _NOWHERE, Gaussian(), 0, 0.0)
        self._pass(batch, read, self._network.room(count), give)
        return made

    @contextmanager
    def holding(self, batch: Batch) -> Iterator[None]:
        before, self._held = self._held, (batch, self._behind_prefix(batch))
        try:
            yield
        finally:
            self._held = before

    # -- the frozen prefix --------------------------------------------------------------------------

    @property
    def has_frozen_prefix(self) -> bool:
        """True where part of the network does not depend on a trainable parameter."""
        return self._prefix is not None

    def prefixed(self, batch: Batch) -> Batch:
        """The batch after the frozen prefix, to be cached once for data without augmentation.

        Raises ConfigError where there is none. Cost: one pass of the prefix.
        """
        if self._prefix is None:
            raise ConfigError("this network has no frozen prefix whose result could be cached")
        if batch.prefixed:
            return batch
        network, inputs = self._prefix, self._inputs(batch, self._prefix)
        made = np.empty((len(inputs), *network.shapes[-1]), np.float32)

        def load(a: int, b: int, into: Array) -> None:
            self._convert(inputs[a:b], into)

        def give(a: int, b: int, out: Array) -> None:
            made[a:b] = to_outer(out)

        read = self._reader(np.empty(0, np.float32), _NOWHERE, Gaussian(), 0, 0.0)
        network.run(len(inputs), load, give, read, network.room(len(inputs)))
        return Batch(made, batch.targets, prefixed=True)

    # -- inside -------------------------------------------------------------------------------------

    def _source(self, weights: Source) -> Source:
        if weights.shape != (self.layout.n,):
            raise ConfigError(f"weights have the shape {weights.shape}, this model has n = {self.layout.n}")
        if self.storage != "float32":
            if isinstance(weights, PackedWeights):
                if weights.storage != self.storage:
                    raise ConfigError(f"weights packed as {weights.storage} are not those of {self.storage}")
                return weights
            return PackedWeights.pack(weights, self.layout, self.storage)
        if self.mode in ("full", "layer") and not isinstance(weights, np.ndarray):
            return weights[0 : self.layout.n]
        return weights

    def _behind_prefix(self, batch: Batch) -> Batch:
        if self._held is not None and self._held[0] is batch:
            return self._held[1]
        if self._prefix is None or batch.prefixed:
            return batch
        return self.prefixed(batch)

    def _pass(self, batch: Batch, read: Read, room: Array, give: Any) -> None:
        inputs = self._inputs(batch, self._network)

        def load(a: int, b: int, into: Array) -> None:
            if batch.prefixed:
                into[...] = to_inner(inputs[a:b])
            else:
                self._convert(inputs[a:b], into)

        self._network.run(len(inputs), load, give, read, room)

    def _inputs(self, batch: Batch, network: Network) -> Array:
        if batch.prefixed and self._prefix is None:
            raise ConfigError("a batch behind a frozen prefix was given to a network that has none")
        wanted = network.graph.input_shape
        if batch.inputs.shape[1:] != wanted or len(batch.inputs) < 1:
            raise ConfigError(
                f"inputs have the shape {batch.inputs.shape}, this network takes (B, *{wanted})"
            )
        return batch.inputs

    def _convert(self, samples: Array, into: Array) -> None:
        """Samples in the inner order, as the network's numbers; bytes by scale and shift of their channel."""
        into[...] = to_inner(samples)
        if samples.dtype == np.uint8:
            shape = (-1,) if into.ndim in (2, 4) else (-1, *[1] * (into.ndim - 2))
            into *= self._scale.reshape(shape)
            into += self._shift.reshape(shape)

    def _targets(self, batch: Batch) -> Array:
        targets = batch.targets
        if len(targets) != len(batch.inputs):
            raise ConfigError(f"{len(batch.inputs)} inputs and {len(targets)} targets")
        outputs = self._network.shapes[-1]
        if self.bundle.graph is not None and self.bundle.graph.loss == "mse":
            if targets.size != len(targets) * math.prod(outputs):
                raise ConfigError(f"targets have the shape {targets.shape}, outputs (B, *{outputs})")
            return targets.reshape(len(targets), *outputs)
        if targets.ndim != 1 or targets.dtype.kind not in "iu":
            raise ConfigError("targets of cross-entropy are class numbers (B,)")
        if targets.min() < 0 or targets.max() >= outputs[0]:
            raise DataError(f"a target lies outside the {outputs[0]} classes")
        return targets

    def _loss(self, outputs: Array, targets: Array, losses: NDArray[np.float64]) -> None:
        """Per-sample losses in float64 of outputs (b, ...) in the inner order."""
        wide = to_outer(outputs).astype(np.float64).reshape(len(outputs), -1)
        if self.bundle.graph is not None and self.bundle.graph.loss == "mse":
            wide -= targets.reshape(wide.shape)
            np.square(wide, out=wide)
            wide.mean(axis=1, out=losses)
            return
        wide -= wide.max(axis=1, keepdims=True)
        losses[:] = -wide[np.arange(len(wide)), targets]
        np.exp(wide, out=wide)
        losses += np.log(wide.sum(axis=1))

    def _reader(
        self, source: Source, stream: Stream, perturbation: Perturbation, k: int, scale: float
    ) -> Read:
        layout, frozen = self.layout, self.bundle.frozen
        places = dict(zip(layout.names, layout.offsets, strict=False))
        dtype = self._network.dtype
        round_ = rounding(self.arithmetic)

        def read(tensor: str, start: int, stop: int) -> Iterator[tuple[int, Array]]:
            for a in range(start, stop, _PART):
                b = min(a + _PART, stop)
                if tensor in frozen:
                    part = frozen[tensor].reshape(-1)[a:b].astype(dtype)
                elif not scale:
                    part = source[places[tensor] + a : places[tensor] + b].astype(dtype)
                else:
                    at = places[tensor]
                    z = perturbation.values(stream, k, layout, at + a, at + b)
                    part = np.multiply(z, dtype.type(scale))
                    del z
                    part += source[at + a : at + b]
                if round_ is not None:
                    round_(part, np.empty_like(part))
                yield a, part

        return read


def split(
    graph: Graph, trainable: Sequence[str], tensors: dict[str, tuple[int, ...]]
) -> tuple[Graph | None, Graph]:
    """The frozen prefix, or None, and the rest: cut where one value crosses that no weight has reached."""
    moving, reached = set(trainable), set[int]()
    for number, node in enumerate(graph.nodes):
        if any(name in moving for _, name in node.tensors) or any(i in reached for i in node.inputs):
            reached.add(number + 1)
    crossing = {
        i
        for number, node in enumerate(graph.nodes)
        if number + 1 in reached
        for i in node.inputs
        if i not in reached
    }
    if len(crossing) != 1 or crossing == {0} or not reached:
        return None, graph
    (cut,) = crossing
    shape = graph.shapes(tensors)[cut]
    fixed = [i for i in range(1, cut + 1) if i not in reached]
    # Its result is no loss's input; "mse" takes any shape.
    before = _part(graph, fixed, graph.input_shape, {0: 0}, "mse")
    after = _part(graph, sorted(reached), shape, {cut: 0}, graph.loss)
    return before, after


def _part(
    graph: Graph, values: Sequence[int], shape: tuple[int, ...], numbers: dict[int, int], loss: str
) -> Graph:
    """The nodes that make ``values``, renumbered; ``numbers`` has the new number of the input."""
    numbers, nodes = dict(numbers), list[Node]()
    for value in values:
        node = graph.nodes[value - 1]
        if all(i in numbers for i in node.inputs):
            nodes.append(replace(node, inputs=tuple(numbers[i] for i in node.inputs)))
            numbers[value] = len(nodes)
    return Graph(shape, tuple(nodes), loss)
