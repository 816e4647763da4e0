"""Norms, pools and whatever else is no convolution, in NumPy; and the step that each node becomes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from baffle.runtimes.activations import activation
from baffle.runtimes.convolutions import Depthwise, Product
from baffle.runtimes.graph import Node, Shape
from baffle.runtimes.strips import (
    Array,
    Read,
    Step,
    affine_of,
    carve,
    inner,
    read_into,
    repeated,
    to_outer,
)

# -- norms ---------------------------------------------------------------------------------------------


class BatchNorm(Step):
    """By running statistics: an affine map of each channel."""

    in_place = True

    def __init__(self, node: Node, shape: Shape, strip: int) -> None:
        super().__init__(node, strip)
        self.channels = shape[0]
        self.repeat = repeated(math.prod(shape[1:]), self.channels)
        self.held = {"scale": self.channels * self.repeat, "shift": self.channels * self.repeat}
        self.rows = max(1, strip // (self.channels * self.repeat))
        self.scratch = self.rows * self.channels * self.repeat

    def load(self, read: Read, held: Mapping[str, Array]) -> None:
        made = affine_of(self.node, read, self.channels, held["scale"].dtype)
        for into, values in zip((held["scale"], held["shift"]), made, strict=True):
            into.reshape(self.repeat, -1)[...] = values

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        x, y = (array.reshape(-1, self.channels * self.repeat) for array in (inputs[0], out))
        for at in range(0, len(x), self.rows):
            part = y[at : at + self.rows]
            np.multiply(x[at : at + self.rows], held["scale"], out=part)
            part += held["shift"]
            self.finish(part, scratch)


class Norm(Step):
    """Group norm and layer norm: mean and variance of parts of each sample, in two passes over it."""

    in_place = True

    def __init__(self, node: Node, shape: Shape, strip: int) -> None:
        super().__init__(node, strip)
        self.shape = inner(shape)
        channels, pixels = shape[0], math.prod(shape[1:])
        if node.op == "group_norm":
            self.affine: Shape = (channels,)
        else:
            self.affine = shape[-node.setting("dims") :]
        self.plain = node.op == "group_norm" or node.setting("dims") == len(shape)
        self.groups = node.setting("groups") if node.op == "group_norm" else 1
        self.channels, self.pixels = channels, pixels
        self.repeat = repeated(pixels, channels)
        along = self.repeat if node.op == "group_norm" else 1
        self.held = {role: math.prod(self.affine) * along for role, _ in node.tensors}
        # Of each element of a run of pixels, the group that it belongs to.
        self.group = np.tile(np.arange(channels) // (channels // self.groups), self.repeat)
        if not self.plain:
            self.scratch = max(strip, pixels * channels)

    def load(self, read: Read, held: Mapping[str, Array]) -> None:
        size = math.prod(self.affine)
        for role, name in self.node.tensors:
            read_into(read, name, held[role][:size])
            held[role].reshape(-1, size)[1:] = held[role][:size]

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        for x, y in zip(inputs[0], out, strict=True):
            if self.plain:
                self._by_channel(x, y, held)
            else:
                self._by_axes(x, y, scratch)
            if self.node.op == "layer_norm":
                for role, combine in (("weight", np.multiply), ("bias", np.add)):
                    if role in held:
                        combine(y, self._broadcast(held[role]), out=y)
            self.finish_all(y, scratch)

    def _by_channel(self, x: Array, y: Array, held: Mapping[str, Array]) -> None:
        """Sums over the pixels first, of each channel, then over the channels of a group."""
        dtype = y.dtype
        x, y = x.reshape(self.pixels, -1), y.reshape(self.pixels, -1)
        runs = y.reshape(-1, self.repeat * self.channels)
        count = dtype.type(self.pixels * self.channels // self.groups)

        def of_groups(sums: Array) -> Array:
            means: Array = sums.reshape(self.groups, -1).sum(axis=1) / count
            return means

        mean = of_groups(np.matmul(np.ones(self.pixels, dtype), x))
        np.subtract(x.reshape(runs.shape), mean[self.group], out=runs)
        variance = of_groups(np.einsum("pc,pc->c", y, y))
        scale = (1 / np.sqrt(variance + dtype.type(self.node.setting("eps"))))[self.group]
        if self.node.op == "group_norm" and "weight" in held:
            scale *= held["weight"]
        runs *= scale
        if self.node.op == "group_norm" and "bias" in held:
            runs += held["bias"]

    def _by_axes(self, x: Array, y: Array, scratch: Array) -> None:
        """A layer norm over some of the axes."""
        dims = self.node.setting("dims")
        # Trailing axes of (C, H, W) in (H, W, C); vectors are normed whole.
        axes = (1,) if dims == 1 else (0, 1)
        square = carve(scratch, 0, x.shape)
        np.subtract(x, x.mean(axis=axes, keepdims=True, dtype=y.dtype), out=y)
        np.multiply(y, y, out=square)
        variance = square.mean(axis=axes, keepdims=True, dtype=y.dtype)
        y /= np.sqrt(variance + y.dtype.type(self.node.setting("eps")))

    def _broadcast(self, values: Array) -> Array:
        """An affine tensor over trailing axes of (C, H, W), beside (H, W, C)."""
        if len(self.shape) != 3:
            return values.reshape(self.affine)
        shaped = values.reshape((1,) * (3 - len(self.affine)) + self.affine)
        return shaped.transpose(1, 2, 0)


# -- pools ---------------------------------------------------------------------------------------------


def _span(size: int, count: int, stride: int, at: int) -> tuple[int, int, int]:
    """Outputs [low, high) whose input at ``at`` + i·stride lies inside, and the first of those inputs."""
    low = max(0, -(at // stride))
    high = min(count, (size - 1 - at) // stride + 1)
    return low, max(low, high), at + low * stride


class Pool(Step):
    """Largest or mean value of windows: one pass for each place in the window."""

    def __init__(self, node: Node, before: Shape, after: Shape, strip: int) -> None:
        super().__init__(node, strip)
        self.largest = node.op == "max_pool"
        self.kernel = node.setting("kernel")
        self.stride, self.pad = node.setting("stride"), node.setting("pad")
        self.dilation = node.setting("dilation") if self.largest else (1, 1)
        height, width = after[1:]
        self.counts: Array | None = None
        if not self.largest and not node.setting("count_pad") and any(self.pad):
            counts = np.zeros((height, width, 1), np.float32)
            for rows, columns, _, _ in self._places(before[1:], (height, width)):
                counts[rows, columns] += 1
            self.counts = counts
        self.before, self.after = before[1:], (height, width)

    def _places(self, before: Shape, after: Shape) -> Iterator[tuple[slice, slice, slice, slice]]:
        """For each place in the window: where in the output, and where in the input."""
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                spans = [
                    _span(before[d], after[d], self.stride[d], at * self.dilation[d] - self.pad[d])
                    for d, at in ((0, i), (1, j))
                ]
                if all(low < high for low, high, _ in spans):
                    into = [slice(low, high) for low, high, _ in spans]
                    froms = [
                        slice(first, first + (high - low - 1) * stride + 1, stride)
                        for (low, high, first), stride in zip(spans, self.stride, strict=True)
                    ]
                    yield into[0], into[1], froms[0], froms[1]

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        for x, y in zip(inputs[0], out, strict=True):
            y[...] = -math.inf if self.largest else 0
            for rows, columns, below, beside in self._places(self.before, self.after):
                part = y[rows, columns]
                (np.maximum if self.largest else np.add)(part, x[below, beside], out=part)
            if self.counts is not None:
                y /= self.counts
            elif not self.largest:
                y *= y.dtype.type(1 / math.prod(self.kernel))
        self.finish_all(out, scratch)


class AdaptivePool(Step):
    """Means of cells that together are the image, evenly cut; of one cell: of the image, by a product."""

    def __init__(self, node: Node, before: Shape, after: Shape, strip: int) -> None:
        super().__init__(node, strip)
        self.before = before[1:]
        self.size = node.setting("size") if node.op == "adaptive_avg_pool" else (1, 1)

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        x, (height, width) = inputs[0], self.before
        y = out.reshape(len(x), *self.size, x.shape[3])
        one = out.dtype.type(1)
        if self.size == (1, 1):
            pixels = height * width
            means = np.full((1, pixels), one / pixels, out.dtype)
            np.matmul(means, x.reshape(len(x), pixels, -1), out=y.reshape(len(x), 1, -1))
        elif height % self.size[0] == 0 and width % self.size[1] == 0:
            kh, kw = height // self.size[0], width // self.size[1]
            y[...] = 0
            for i in range(kh):
                for j in range(kw):
                    y += x[:, i::kh, j::kw]
            y *= one / out.dtype.type(kh * kw)
        else:
            rows = [
                (i * height // self.size[0], -(-(i + 1) * height // self.size[0]))
                for i in range(self.size[0])
            ]
            columns = [
                (j * width // self.size[1], -(-(j + 1) * width // self.size[1])) for j in range(self.size[1])
            ]
            for i, (a, b) in enumerate(rows):
                for j, (c, d) in enumerate(columns):
                    np.mean(x[:, a:b, c:d], axis=(1, 2), dtype=out.dtype, out=y[:, i, j])
        self.finish_all(out, scratch)


# -- the rest ------------------------------------------------------------------------------------------


class Pointwise(Step):
    """An activation alone, and x·scale + shift."""

    in_place = True

    def __init__(self, node: Node, strip: int) -> None:
        super().__init__(node, strip)
        self.own = activation(node) if node.op == "activation" else None

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        x, y = inputs[0].reshape(-1), out.reshape(-1)
        for at in range(0, x.size, self.strip):
            part = y[at : at + self.strip]
            if x is not y:
                part[...] = x[at : at + self.strip]
            if self.own is not None:
                self.own(part, carve(scratch, 0, part.shape))
            elif self.node.op == "scale_shift":
                part *= part.dtype.type(self.node.setting("scale"))
                part += part.dtype.type(self.node.setting("shift"))
            self.finish(part, scratch)


class Both(Step):
    """The sum or product of two values, (C, 1, 1) beside (C, H, W) too."""

    def __init__(self, node: Node, first: Shape, second: Shape, strip: int) -> None:
        super().__init__(node, strip)
        self.in_place = math.prod(first) >= math.prod(second)
        self.combine = np.add if node.op == "add" else np.multiply

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        self.combine(inputs[0], inputs[1], out=out)
        self.finish_all(out, scratch)


class Flatten(Step):
    """(C, H, W) → (C·H·W,), in that order."""

    def __init__(self, node: Node, before: Shape, strip: int) -> None:
        super().__init__(node, strip)
        self.in_place = len(before) < 3 or before[1:] == (1, 1) or before[0] == 1

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        x = to_outer(inputs[0])
        if not (self.in_place and np.shares_memory(x, out)):
            out.reshape(x.shape)[...] = x
        self.finish_all(out, scratch)


class Pad(Step):
    """Zeros around an image."""

    def __init__(self, node: Node, strip: int) -> None:
        super().__init__(node, strip)

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        x, (top, left, _, _) = inputs[0], self.node.setting("pad")
        out[...] = 0
        out[:, top : top + x.shape[1], left : left + x.shape[2]] = x
        self.finish_all(out, scratch)


def step_for(
    node: Node, before: Sequence[Shape], after: Shape, weight: Shape, norm: Node | None, strip: int
) -> Step:
    """The step of a node, from the shapes of its inputs, result and weight (() without one).

    ``norm`` is a batch norm behind a convolution or linear layer that is to be done with it.
    """
    first = before[0]
    if node.op == "conv2d" and node.setting("groups") == first[0] == weight[0] > 1:
        return Depthwise(node, first, after, weight, norm, strip)
    if node.op in ("conv2d", "linear"):
        return Product(node, first, after, weight, norm, strip)
    if node.op == "batch_norm":
        return BatchNorm(node, first, strip)
    if node.op in ("group_norm", "layer_norm"):
        return Norm(node, first, strip)
    if node.op in ("max_pool", "avg_pool"):
        return Pool(node, first, after, strip)
    if node.op in ("adaptive_avg_pool", "global_avg_pool"):
        return AdaptivePool(node, first, after, strip)
    if node.op in ("add", "mul"):
        return Both(node, before[0], before[1], strip)
    if node.op == "flatten":
        return Flatten(node, first, strip)
    return Pad(node, strip) if node.op == "pad" else Pointwise(node, strip)
