"""Convolutions and linear layers in NumPy.

A spatial convolution copies windows into a reused buffer and multiplies, a strip of the image at a time:
windows, product, bias, activation of a few rows, then the next ones. A 1×1 convolution multiplies as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from baffle.runtimes.graph import Node, Shape
from baffle.runtimes.strips import Array, Read, Step, affine_of, carve, read_into, repeated, strided

_ROWS = 1 << 14  # elements of a weight that are turned round together
_SHORT = 24  # elements of a window's row; shorter ones are copied the other way round


class Windows:
    """Strips of an operator on images: some rows of one sample's output, or all rows of some samples."""

    def __init__(self, node: Node, before: Shape, after: Shape, kernel: tuple[int, int], most: int) -> None:
        """``before``, ``after``: (C, H, W). A strip has ``most`` pixels of the output, but a row at least."""
        self.channels, self.before = before[0], before[1:]
        self.height, self.width = after[1:]
        self.kernel = kernel
        self.stride: tuple[int, int] = node.setting("stride")
        self.pad: tuple[int, int, int, int] = node.setting("pad")
        self.dilation: tuple[int, int] = node.setting("dilation")
        strips = -(-self.height // min(self.height, max(1, most // self.width)))
        self.rows = -(-self.height // strips)  # strips of one height: a low one multiplies slowly
        self.samples = max(1, most // (self.width * self.height)) if strips == 1 else 1
        self.pixels = self.samples * self.rows * self.width  # of a strip, at most
        wide = (self.width - 1) * self.stride[1] + (kernel[1] - 1) * self.dilation[1] + 1
        self.padded = any(self.pad)
        self.wide = wide if self.padded else self.before[1]
        self.room = self.samples * self._high(self.rows) * wide * self.channels if self.padded else 0

    def _high(self, rows: int) -> int:
        return (rows - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1

    def strips(self, x: Array, scratch: Array) -> Iterator[tuple[int, int, int, Array, int, int]]:
        """Of each strip: its first pixel, samples, rows; a buffer, the place in it of the first window's
        first element, and the elements from one sample to the next. A padded copy begins ``scratch``.
        """
        step = self.before[0] * self.wide * self.channels
        for b in range(0, len(x), self.samples):
            count = min(self.samples, len(x) - b)
            for h in range(0, self.height, self.rows):
                rows, first = min(self.rows, self.height - h), (b * self.height + h) * self.width
                if self.padded:
                    made = self._padded(x[b : b + count], h, rows, scratch)
                    yield first, count, rows, made, 0, made[0].size
                else:
                    place = b * step + h * self.stride[0] * self.wide * self.channels
                    yield first, count, rows, x, place, step

    def _padded(self, x: Array, h: int, rows: int, scratch: Array) -> Array:
        """The rows of x under ``rows`` output rows from h on, with zeros around them."""
        top, left = self.pad[:2]
        high = self._high(rows)
        made = carve(scratch, 0, (len(x), high, self.wide, self.channels))
        first = h * self.stride[0] - top
        a, b = max(first, 0), min(first + high, self.before[0])
        right = min(self.wide, left + self.before[1])
        if b <= a:
            made[...] = 0
            return made
        made[:, : a - first] = 0
        made[:, b - first :] = 0
        inside = made[:, a - first : b - first]
        inside[:, :, :left] = 0
        inside[:, :, right:] = 0
        inside[:, :, left:right] = x[:, a:b, : right - left]
        return made

    def shaped(
        self, count: int, rows: int, step: int, repeat: int = 1
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides (samples, rows, width / repeat, kh, kw, repeat · C) of a strip's windows."""
        c, line = self.channels, self.wide * self.channels
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        return (
            (count, rows, self.width // repeat, kh, kw, repeat * c),
            (step, sh * line, repeat * sw * c, dh * line, dw * c, 1),
        )


class Product(Step):
    """A convolution that is not depthwise, or a linear layer: windows times weights, strip by strip.

    Held weights are (rows, kh·kw·C), C of one group, times ``norm``'s scale if a batch norm follows. With
    ``block`` rows at a time they are made while it runs, not before.
    """

    def __init__(
        self, node: Node, before: Shape, after: Shape, weight: Shape, norm: Node | None, strip: int
    ) -> None:
        super().__init__(node, strip)
        self.norm = norm
        self.outputs, self.channels = weight[:2]
        self.depth = math.prod(weight[1:])
        self.groups, self.kernel = 1, (1, 1)
        self.windows: Windows | None = None
        if node.op == "conv2d":
            self.groups, self.kernel = node.setting("groups"), (weight[2], weight[3])
            plain = (1, 1) == self.kernel == node.setting("stride") and not any(node.setting("pad"))
            if not plain or self.groups > 1:
                each = max(self.depth + math.prod(node.setting("stride")) * before[0], self.outputs)
                self.windows = Windows(node, before, after, self.kernel, strip // each)
        width = after[-1] if node.op == "conv2d" else 1
        self.repeat = repeated(width, self.outputs)
        self.block = self.outputs
        self.held = {"weight": self.outputs * self.depth}
        if norm is not None:
            self.held["scale"] = self.outputs
        if norm is not None or node.tensor("bias"):
            self.held["bias"] = self.outputs * self.repeat
        if self.windows is None:
            self.pixels = -(-max(1, strip // self.outputs) // self.repeat) * self.repeat
            self.scratch = self.pixels * self.outputs
        else:
            # Rows of a window that are short are slow to copy one by one: rows of pixels go together then.
            self.by_pixel = self.kernel[1] * self.channels < _SHORT
            pixels = self.windows.pixels
            self.scratch = max(self.windows.room + pixels * self.depth, pixels * self.outputs)

    def in_blocks(self, elements: int) -> None:
        """Keep at most ``elements`` of the weight, but one row at least, and make them while it runs."""
        if self.groups == 1 and self.held["weight"] > elements:
            self.again = self.held["weight"]
            self.block = max(1, elements // self.depth)
            self.held["weight"] = self.block * self.depth

    def load(self, read: Read, held: Mapping[str, Array]) -> None:
        if "bias" in held:
            bias = held["bias"][: self.outputs]
            bias[...] = 0
            name = self.node.tensor("bias")
            if name is not None:
                read_into(read, name, bias)
            if self.norm is not None:
                scale, shift = affine_of(self.norm, read, self.outputs, bias.dtype)
                held["scale"][...] = scale
                bias *= scale
                bias += shift
            held["bias"].reshape(self.repeat, -1)[1:] = bias
        if not self.again:
            self._load_rows(read, held, 0, self.outputs)

    def _load_rows(self, read: Read, held: Mapping[str, Array], first: int, last: int) -> None:
        name, taps = str(self.node.tensor("weight")), self.kernel[0] * self.kernel[1]
        rows = carve(held["weight"], 0, (last - first, self.depth))
        start = first * self.depth
        if taps == 1:
            flat = rows.reshape(-1)
            for at, part in read(name, start, last * self.depth):
                flat[at - start : at - start + len(part)] = part
        else:  # whole rows, so that the channel can go last
            made = rows.reshape(-1, taps, self.channels)
            step = max(1, _ROWS // self.depth)
            for row in range(first, last, step):
                end = min(row + step, last)
                for at, part in read(name, row * self.depth, end * self.depth):
                    self._place(made, at - start, part)
        if "scale" in held:
            rows *= held["scale"][first:last, None]

    def _place(self, made: Array, at: int, part: Array) -> None:
        """Part of flat (rows, C, taps), from element ``at`` on, into ``made`` (rows, taps, C)."""
        taps = made.shape[1]
        if at % self.depth == 0 and len(part) % self.depth == 0:
            row = at // self.depth
            rows = len(part) // self.depth
            made[row : row + rows] = part.reshape(rows, self.channels, taps).transpose(0, 2, 1)
            return
        place = np.arange(at, at + len(part))
        rest = place % self.depth
        made[place // self.depth, rest % taps, rest // taps] = part

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        pixels = out.reshape(-1, self.outputs)
        if not self.again:
            self._rows(inputs[0], pixels, held["weight"].reshape(-1, self.depth), held.get("bias"), scratch)
            return
        for first in range(0, self.outputs, self.block):
            last = min(first + self.block, self.outputs)
            self._load_rows(read, held, first, last)
            weight = carve(held["weight"], 0, (last - first, self.depth))
            bias = held["bias"][first:last] if "bias" in held else None
            self._rows(inputs[0], pixels[:, first:last], weight, bias, scratch)

    def _rows(self, x: Array, pixels: Array, weight: Array, bias: Array | None, scratch: Array) -> None:
        """Some output channels (pixels, rows), with the rows of weight and bias that belong to them."""
        if self.windows is None:
            flat = x.reshape(-1, self.depth)
            for at in range(0, len(flat), self.pixels):
                part = pixels[at : at + self.pixels]
                np.matmul(flat[at : at + self.pixels], weight.T, out=part)
                self._finish(part, bias, scratch)
            return
        windows, room = self.windows, self.windows.room
        for first, count, rows, buffer, place, step in windows.strips(x, scratch):
            part = pixels[first : first + count * rows * windows.width]
            shape, strides = windows.shaped(count, rows, step)
            shape = (*shape[:5], self.channels)
            for group in range(self.groups):
                view = strided(buffer, place + group * self.channels, shape, strides)
                if self.by_pixel:
                    columns = carve(scratch, room, (*shape[3:], *shape[:3]))
                    columns[...] = view.transpose(3, 4, 5, 0, 1, 2)
                    matrix = columns.reshape(self.depth, -1).T
                else:
                    columns = carve(scratch, room, shape)
                    columns[...] = view
                    matrix = columns.reshape(-1, self.depth)
                own = len(weight) // self.groups
                some = slice(group * own, (group + 1) * own)
                np.matmul(matrix, weight[some].T, out=part[:, some])
            self._finish(part, bias, scratch)

    def _finish(self, part: Array, bias: Array | None, scratch: Array) -> None:
        if part.shape[1] == self.outputs:
            part = part.reshape(len(part) // self.repeat, -1)
        if bias is not None:
            part += bias
        self.finish(part, scratch)


class Depthwise(Step):
    """A convolution of each channel alone: sums of products along rows of pixels, by ``einsum``."""

    def __init__(
        self, node: Node, before: Shape, after: Shape, weight: Shape, norm: Node | None, strip: int
    ) -> None:
        super().__init__(node, strip)
        self.norm = norm
        self.channels, self.kernel = weight[0], (weight[2], weight[3])
        self.taps = weight[2] * weight[3]
        each = (1 + math.prod(node.setting("stride"))) * self.channels
        self.windows = Windows(node, before, after, self.kernel, strip // each)
        self.repeat = repeated(after[2], self.channels)
        # Pixels side by side are side by side in the windows, too, where the stride is 1.
        self.together = self.repeat if node.setting("stride")[1] == 1 else 1
        self.held = {"weight": self.taps * self.together * self.channels}
        if norm is not None or node.tensor("bias"):
            self.held["bias"] = self.channels * self.repeat
        pixels = self.windows.pixels
        self.scratch = max(self.windows.room, pixels * self.channels)

    def load(self, read: Read, held: Mapping[str, Array]) -> None:
        weight = held["weight"].reshape(self.taps, self.together, self.channels)
        flat = np.empty(self.channels * self.taps, weight.dtype)
        read_into(read, str(self.node.tensor("weight")), flat)
        kernel = flat.reshape(self.channels, self.taps).T
        if "bias" in held:
            bias = held["bias"][: self.channels]
            bias[...] = 0
            name = self.node.tensor("bias")
            if name is not None:
                read_into(read, name, bias)
            if self.norm is not None:
                scale, shift = affine_of(self.norm, read, self.channels, bias.dtype)
                kernel = kernel * scale
                bias *= scale
                bias += shift
            held["bias"].reshape(self.repeat, -1)[1:] = bias
        weight[...] = kernel[:, None]

    def run(
        self, inputs: Sequence[Array], out: Array, held: Mapping[str, Array], scratch: Array, read: Read
    ) -> None:
        windows, weight = self.windows, held["weight"].reshape(*self.kernel, -1)
        bias, pixels = held.get("bias"), out.reshape(-1, self.channels)
        for first, count, rows, buffer, place, step in windows.strips(inputs[0], scratch):
            part = pixels[first : first + count * rows * windows.width]
            shape, strides = windows.shaped(count, rows, step, self.together)
            view = strided(buffer, place, shape, strides)
            np.einsum("grwijc,ijc->grwc", view, weight, out=part.reshape(*shape[:3], -1))
            part = part.reshape(-1, self.repeat * self.channels)
            if bias is not None:
                part += bias
            self.finish(part, scratch)
