"""What operators in NumPy have in common: a step of a network, done in strips that stay in a core's cache.

Images lie in the order (sample, H, W, C). With channels last a 1×1 convolution is one product as it stands,
and what goes channel by channel (depthwise kernels, norms, biases) runs along contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from baffle.runtimes.activations import InPlace
from baffle.runtimes.graph import Node, Shape

Array = NDArray[Any]

_RUN = 512  # elements of an inner loop; in shorter ones its start shows


class Read(Protocol):
    """Weights as they are measured at, in parts."""

    def __call__(self, tensor: str, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        """Elements [start, stop) of a tensor, flat, in parts that may be written to, each with its place."""
        ...


class Step:
    """One operator, with what is done in passing: an activation, and rounding after each of the two.

    ``strip``: how many elements are worked on together. ``held`` names what it keeps of its tensors while a
    segment runs, with sizes; ``load`` fills these. ``scratch`` is the size of the array that ``run`` may use
    up, ``again`` how many weights it makes while it runs.
    """

    in_place = False
    again = 0

    def __init__(self, node: Node, strip: int) -> None:
        self.node, self.strip = node, strip
        self.scratch = strip
        self.held: dict[str, int] = {}
        self.act: InPlace | None = None
        self.round: InPlace | None = None

    def load(self, read: Read, held: Mapping[str, Array]) -> None:
        """Fills ``held`` from the node's tensors."""

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        """The result for inputs (m, ...) into ``out`` (m, ...), which may be the first of them."""
        raise NotImplementedError

    def finish(self, part: Array, scratch: Array) -> None:
        """What is done in passing, on a strip; ``scratch`` has its size."""
        if self.round is not None:
            self.round(part, carve(scratch, 0, part.shape))
        if self.act is not None:
            self.act(part, carve(scratch, 0, part.shape))
            if self.round is not None:
                self.round(part, carve(scratch, 0, part.shape))

    def finish_all(self, x: Array, scratch: Array) -> None:
        if self.act is None and self.round is None:
            return
        flat = x.reshape(-1)
        for at in range(0, flat.size, self.strip):
            self.finish(flat[at : at + self.strip], scratch)


def inner(shape: Shape) -> Shape:
    """(C, H, W) → (H, W, C); vectors stay."""
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape


def to_inner(samples: Array) -> Array:
    """A view of samples (m, C, H, W) in the inner order; of others, themselves."""
    return samples.transpose(0, 2, 3, 1) if samples.ndim == 4 else samples


def to_outer(samples: Array) -> Array:
    """``to_inner``'s inverse."""
    return samples.transpose(0, 3, 1, 2) if samples.ndim == 4 else samples


def carve(scratch: Array, at: int, shape: Sequence[int]) -> Array:
    return scratch[at : at + math.prod(shape)].reshape(shape)


def repeated(pixels: int, channels: int) -> int:
    """How many pixels go into one inner loop: a divisor of ``pixels``."""
    most = min(max(1, _RUN // channels), pixels)
    return next(t for t in range(most, 0, -1) if pixels % t == 0)


def strided(buffer: Array, place: int, shape: Sequence[int], strides: Sequence[int]) -> Array:
    """``as_strided`` in elements, from one of a contiguous buffer on; that takes ten times as long."""
    size = buffer.itemsize
    return np.ndarray(shape, buffer.dtype, buffer, place * size, [size * s for s in strides])


def read_into(read: Read, tensor: str, into: Array) -> None:
    for at, part in read(tensor, 0, into.size):
        into[at : at + len(part)] = part


def affine_of(node: Node, read: Read, channels: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """(scale, shift) of a batch norm: γ/√(var + ε) and β − mean·scale."""

    def tensor(role: str, otherwise: float) -> Array:
        made = np.full(channels, otherwise, dtype)
        name = node.tensor(role)
        if name is not None:
            read_into(read, name, made)
        return made

    scale = tensor("weight", 1) / np.sqrt(tensor("var", 1) + dtype.type(node.setting("eps")))
    return scale, tensor("bias", 0) - tensor("mean", 0) * scale
