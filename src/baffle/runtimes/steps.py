"""From the graph of a traced module to steps: what is computed together, by which kernel, or by torch.

A convolution with the activation, pooling or addition behind it, and a group norm with its activation, become
calls of ``baffle.kernels``; the layers around them stay torch's, as functions of their tensors. Imports the
kernels: to be imported where ``baffle.kernels.available()``.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from baffle.kernels import layers, winograd
from baffle.kernels.simd import LANES
from baffle.runtimes.objective import Part

Floats = NDArray[np.float32]
Step = Callable[["Pass"], Any]
Row = tuple[fx.Node, Step, list[fx.Node]]
_EMPTY: Floats = np.empty(0, dtype=np.float32)
_MOST_COLUMNS = 128  # of a first convolution; more would be larger than what they save

# Torch's own, called as they are: layers without parameters that are functions of one input, and operations.
_LAYERS = (
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.ReLU,
    nn.Hardswish,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
)
_FUNCTIONS = (
    operator.add,
    operator.mul,
    torch.add,
    torch.flatten,
    torch.relu,
    F.relu,
    F.hardswish,
    F.gelu,
    F.silu,
    F.avg_pool2d,
    F.max_pool2d,
    F.adaptive_avg_pool2d,
)
_METHODS = ("flatten",)


class NoProgramError(Exception):
    """Something in the graph that no step stands for."""


class Image(NamedTuple):
    """A batch of images as kernels pass them on: H × W pixels from (pad, pad) on in ``data``."""

    data: Floats  # (B, PH, PW, C), zeros around the pixels
    H: int
    W: int
    pad: int

    @property
    def pixels(self) -> Floats:
        """(B, H, W, C); contiguous where there is no margin."""
        H, W, pad = self.H, self.W, self.pad
        return self.data if self.data.shape[1:3] == (H, W) else self.data[:, pad : pad + H, pad : pad + W]

    @property
    def pitch(self) -> tuple[int, int]:
        """Floats from one image, and from one line, to the next."""
        _, PH, PW, C = self.data.shape
        return PH * PW * C, PW * C


class Memory:
    """What one worker works in: scratch that grows, and activations that serve again once they are dead."""

    def __init__(self) -> None:
        self._scratch: dict[str, Floats] = {}
        self._free: dict[int, list[Floats]] = {}

    def scratch(self, name: str, size: int) -> Floats:
        """At least ``size`` floats with no values to rely on."""
        held = self._scratch.get(name)
        if held is None or held.size < size:
            held = self._scratch[name] = np.empty(size, dtype=np.float32)
        return held

    def take(self, *shape: int) -> Floats:
        """An array of that shape with no values to rely on.

        It lies in a block of a power of two, so that batches of all sizes serve each other's memory again.
        """
        size = math.prod(shape)
        room = 1 << max(size - 1, 0).bit_length()
        free = self._free.get(room)
        return (free.pop() if free else np.empty(room, dtype=np.float32))[:size].reshape(shape)

    def give(self, array: Floats) -> None:
        """Puts back what ``take`` gave."""
        block = array.base
        assert isinstance(block, np.ndarray)
        self._free.setdefault(block.size, []).append(block)


class Pass:
    """One forward pass: the values of the nodes so far, the weights, and a worker's memory."""

    def __init__(self, weights: Sequence[Tensor], inputs: dict[Any, Any], memory: Memory) -> None:
        self.weights, self.memory = weights, memory
        self.values: dict[Any, Any] = dict(inputs)
        self.flats: dict[tuple[fx.Node, str], Floats] = {}  # parameters as flat arrays
        self.fresh = True  # whether these weights were not used before
        self.largest = 1  # floats of the largest image so far
        self.into: tuple[fx.Node, Floats] | None = None  # a node whose images have their place already

    def take(self, node: fx.Node, B: int, H: int, W: int, C: int) -> Floats:
        """Memory for the images of a node."""
        self.largest = max(self.largest, H * W * C)
        if self.into is not None and self.into[0] is node:
            return self.into[1]
        return self.memory.take(B, H, W, C)

    def image(self, node: Any) -> Image:
        """A value as kernels take it."""
        value = self.values[node]
        if isinstance(value, Tensor):
            data = value.permute(0, 2, 3, 1).contiguous().numpy()
            value = Image(data, data.shape[1], data.shape[2], 0)
        image: Image = value
        return image

    def flat(self, node: Any, shape: tuple[int, ...] | None = None) -> Floats:
        """The pixels of an image, one behind the other, broadcast to ``shape`` (B, H, W, C) if given."""
        pixels = self.image(node).pixels
        return np.ascontiguousarray(pixels if shape is None else np.broadcast_to(pixels, shape)).reshape(-1)

    def tensor(self, node: Any) -> Any:
        """A value as torch takes it: images are NCHW, with channels last in memory."""
        value = self.values[node] if isinstance(node, fx.Node) else node
        return torch.from_numpy(value.pixels).permute(0, 3, 1, 2) if isinstance(value, Image) else value


@dataclass(frozen=True)
class Convolution:
    """A convolution that a kernel does."""

    kernel: str  # "columns": laid out once for all directions; "point": 1×1; "winograd"
    size: int
    stride: int
    pad: int
    channels: int
    out: int


class Steps:
    """The steps of one part, in order: ``rows`` of a node, what computes it, and the images dead after it.

    ``convolutions`` are those that a kernel does, ``images`` the nodes whose values lie in a worker's memory.
    Raises NoProgramError where the graph has anything that no step stands for.
    """

    def __init__(self, part: Part, module: nn.Module, graph: fx.Graph) -> None:
        self._part, self._module = part, module
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        (end,) = (node for node in graph.nodes if node.op == "output")
        if not isinstance(end.args[0], fx.Node):
            raise NoProgramError
        self.output = end.args[0]
        nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        self.convolutions = {node: found for node in nodes if (found := self._convolution_at(node))}
        self._behind: dict[fx.Node, fx.Node] = {}  # a node → the one behind it that its step computes too
        for node in nodes:
            self._fuse(node)
        self.images: set[fx.Node] = set()
        self.rows: list[Row] = []
        for node in nodes:
            if node not in self._behind:
                self.rows.append((node, self._step(node), []))
        self._bury()

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """What one step computes, first to last; ``node`` is the last."""
        chain = [node]
        while before := next((n for n, behind in self._behind.items() if behind is chain[0]), None):
            chain.insert(0, before)
        return chain

    def describe(self, node: fx.Node) -> str:
        """What the step that ends with ``node`` does, for a profile."""
        first = self.chain(node)[0]
        if c := self.convolutions.get(first):
            kinds = {"columns": "first convolution", "point": "1×1 convolutions"}
            return kinds.get(c.kernel, f"{c.size}×{c.size} convolutions, stride {c.stride}")
        layer = self._layer(first)
        return "group norms" if type(layer) is nn.GroupNorm else "pooling and the linear layer"

    # -- what becomes one step ----------------------------------------------------------------------

    def _layer(self, node: Any) -> nn.Module | None:
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return self._module.get_submodule(str(node.target)) if called else None

    def _convolution_at(self, node: fx.Node) -> Convolution | None:
        """What a kernel must know of a convolution; None for anything that stays torch's."""
        c = self._layer(node)
        if type(c) is not nn.Conv2d or c.groups != 1 or c.padding_mode != "zeros" or c.out_channels % LANES:
            return None
        size, stride, pad, dilation = map(_both, (c.kernel_size, c.stride, c.padding, c.dilation))
        if size is None or stride is None or pad is None or dilation != 1:
            return None
        if node.args[0] in self.inputs and c.in_channels * size * size <= _MOST_COLUMNS:
            return Convolution("columns", size, stride, pad, c.in_channels, c.out_channels)
        if size == 1 and pad == 0:
            return Convolution("point", 1, stride, 0, c.in_channels, c.out_channels)
        if (size, stride) in ((3, 1), (5, 1), (3, 2)) and c.in_channels % LANES == 0:
            return Convolution("winograd", size, stride, pad, c.in_channels, c.out_channels)
        return None

    def _activation(self, node: fx.Node) -> int | None:
        layer = self._layer(node)
        if type(layer) is nn.ReLU or node.target in (F.relu, torch.relu):
            return winograd.RELU
        if type(layer) is nn.Hardswish or node.target is F.hardswish:
            return winograd.HARDSWISH
        return None

    def _halves(self, node: fx.Node) -> bool | None:
        """2×2 max-pooling."""
        pool = self._layer(node)
        if type(pool) is not nn.MaxPool2d or pool.ceil_mode or pool.return_indices:
            return None
        sizes = [_both(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
        return True if sizes == [2, 2, 0, 1] else None

    def _adds(self, node: fx.Node) -> bool | None:
        two = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
        return True if node.target in (operator.add, torch.add) and two and not node.kwargs else None

    def _fuse(self, node: fx.Node) -> None:
        """Finds what is computed along with a convolution or a norm: what alone reads its result."""

        def extend(last: fx.Node, wanted: Callable[[fx.Node], Any]) -> fx.Node:
            users = list(last.users)
            if len(users) != 1 or last is self.output or wanted(users[0]) is None:
                return last
            if users[0] in self._behind.values():  # an addition that another convolution does already
                return last
            self._behind[last] = users[0]
            return users[0]

        norm = self._layer(node)
        if node in self.convolutions:
            last = extend(node, self._activation)
            if self.convolutions[node].kernel != "columns" or extend(last, self._halves) is last:
                extend(last, self._adds)
        elif type(norm) is nn.GroupNorm and norm.num_channels % LANES == 0:
            extend(node, self._activation)

    def _margin(self, node: fx.Node) -> tuple[int, list[Convolution]]:
        """The padding that a result is best laid out with, and the convolutions that will read it so."""
        readers = [c for user in node.users if (c := self.convolutions.get(user)) and c.kernel == "winograd"]
        pads = {c.pad for c in readers}
        return (pads.pop(), readers) if len(pads) == 1 else (0, [])

    # -- steps --------------------------------------------------------------------------------------

    def _step(self, node: fx.Node) -> Step:
        chain = self.chain(node)
        if chain[0] in self.convolutions:
            self.images.add(node)
            return self._convolution(chain, self.convolutions[chain[0]])
        if type(norm := self._layer(chain[0])) is nn.GroupNorm and norm.num_channels % LANES == 0:
            self.images.add(node)
            return self._group_norm(chain, norm)
        return self._torch(node)

    def _parameter(self, node: fx.Node, name: str) -> Callable[[Pass], Any]:
        """A layer's own tensor, None where it has none."""
        part, full = self._part, f"{node.target}.{name}"
        if getattr(self._layer(node), name) is None:
            return lambda here: None
        if full in part.trainable:
            index = part.trainable[full]
            return lambda here: here.weights[index]
        fixed = part.frozen[full]
        return lambda here: fixed

    def _flat(self, node: fx.Node, name: str) -> Callable[[Pass], Floats]:
        """A layer's parameter as a flat array, empty where it has none."""
        parameter, key = self._parameter(node, name), (node, name)

        def flat(here: Pass) -> Floats:
            found = here.flats.get(key)
            if found is None:
                values = parameter(here)
                found = here.flats[key] = _EMPTY if values is None else values.reshape(-1).numpy()
            return found

        return flat

    def _convolution(self, chain: list[fx.Node], c: Convolution) -> Step:
        node, last, source = chain[0], chain[-1], chain[0].args[0]
        weight, bias = self._flat(node, "weight"), self._flat(node, "bias")
        activation, pool, summand = winograd.NONE, 1, None
        for before, behind in itertools.pairwise(chain):
            if (found := self._activation(behind)) is not None:
                activation = found
            elif self._halves(behind):
                pool = 2
            else:
                summand = behind.args[1] if behind.args[0] is before else behind.args[0]
        margin = self._margin(chain[-1])
        origin = ("columns", node) if c.kernel == "columns" else source
        stride = 1 if c.kernel == "columns" else c.stride

        def project(here: Pass) -> Image:
            x = here.image(origin)
            B, _, PW, C = x.data.shape
            H, W = (((edge - 1) // stride + 1) // pool for edge in (x.H, x.W))
            y = _room(here, last, B, H, W, c.out, margin)
            residual = _EMPTY if summand is None else here.flat(summand, (B, H, W, c.out))
            layers.project(
                x.data.reshape(-1), (x.pad * PW + x.pad) * C, x.pitch, stride, weight(here), C, bias(here),
                activation, pool, residual,
                y.data.reshape(-1), (B, y.H, y.W, c.out), y.pad, y.data.shape[1:3],
            )  # fmt: skip
            return y

        def filter_(here: Pass) -> Image:
            x = here.image(source)
            B, C = x.data.shape[0], x.data.shape[3]
            high, wide = winograd.padding(x.H, x.W, c.size, c.stride, c.pad)
            if x.pad != c.pad or x.data.shape[1] < high or x.data.shape[2] < wide:
                padded = here.memory.scratch("padded", B * high * wide * C)[: B * high * wide * C]
                layers.pad_images(here.flat(source), (B, x.H, x.W, C), c.pad, (high, wide), padded)
                x = Image(padded.reshape(B, high, wide, C), x.H, x.W, c.pad)
            H, W = ((edge + 2 * c.pad - c.size) // c.stride + 1 for edge in (x.H, x.W))
            y = here.take(last, B, H, W, c.out)
            residual = _EMPTY if summand is None else here.flat(summand, y.shape)
            winograd.convolve(
                x.data,
                weight(here),
                c.size,
                c.stride,
                bias(here),
                activation,
                residual,
                y,
                here.memory.scratch,
            )
            return Image(y, H, W, 0)

        return filter_ if c.kernel == "winograd" else project

    def _group_norm(self, chain: list[fx.Node], layer: nn.GroupNorm) -> Step:
        node, last, source, margin = chain[0], chain[-1], chain[0].args[0], self._margin(chain[-1])
        weight, bias = self._flat(node, "weight"), self._flat(node, "bias")
        activation = self._activation(chain[1]) if len(chain) > 1 else winograd.NONE
        groups, eps = layer.num_groups, layer.eps

        def norm(here: Pass) -> Image:
            x = here.image(source)
            B, C = x.data.shape[0], x.data.shape[3]
            y = _room(here, last, B, x.H, x.W, C, margin)
            layers.group_norm(
                here.flat(source), (B, x.H, x.W, C), groups, eps, weight(here), bias(here), activation,
                y.data.reshape(-1), y.pad, y.data.shape[1:3],
            )  # fmt: skip
            return y

        return norm

    def _torch(self, node: fx.Node) -> Step:
        layer, args, kwargs = self._layer(node), node.args, node.kwargs
        nested = [x for value in (*args, *kwargs.values()) if isinstance(value, list | tuple) for x in value]
        if any(isinstance(x, fx.Node) for x in (*nested, *kwargs.values())):
            raise NoProgramError
        if getattr(layer, "inplace", False) or any(x is True for x in (*args, kwargs.get("inplace"))):
            raise NoProgramError

        def first(here: Pass) -> Any:
            return here.tensor(args[0])

        def values(here: Pass) -> list[Any]:
            return [here.tensor(arg) for arg in args]

        if type(layer) in (nn.Conv2d, nn.Linear, nn.GroupNorm):
            weight, bias = self._parameter(node, "weight"), self._parameter(node, "bias")
            if type(layer) is nn.Linear:
                return lambda here: F.linear(first(here), weight(here), bias(here))
            if type(layer) is nn.GroupNorm:
                groups, eps = layer.num_groups, layer.eps
                return lambda here: F.group_norm(first(here), groups, weight(here), bias(here), eps)
            if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
                rest: Any = layer.stride, layer.padding, layer.dilation, layer.groups

                def convolve(here: Pass) -> Tensor:
                    w = weight(here).contiguous(memory_format=torch.channels_last)
                    return F.conv2d(first(here), w, bias(here), *rest)

                return convolve
        elif type(layer) is nn.AdaptiveAvgPool2d and _both(layer.output_size) == 1:
            return lambda here: _average(here, args[0])
        elif type(layer) in _LAYERS:
            plain: Any = layer
            return lambda here: plain(*values(here))
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            function: Any = node.target
            return lambda here: function(*values(here), **kwargs)
        elif node.op == "call_method" and node.target in _METHODS:
            return lambda here: getattr(first(here), str(node.target))(*args[1:], **kwargs)
        raise NoProgramError

    def _bury(self) -> None:
        """After which step an image is read no more: then its memory serves the next.

        What torch reads is left alone: its result may be a view.
        """
        last: dict[fx.Node, int] = {}
        kept = {self.output}
        for i, (node, _, _) in enumerate(self.rows):
            for source in {source for member in self.chain(node) for source in member.all_input_nodes}:
                last[source] = i
                if node not in self.images:
                    kept.add(source)
        for node, i in last.items():
            if node in self.images - kept:
                self.rows[i][2].append(node)


def _room(
    here: Pass, node: fx.Node, B: int, H: int, W: int, C: int, margin: tuple[int, list[Convolution]]
) -> Image:
    """Memory for a node's images, with the margin that its readers want."""
    pad, readers = margin
    sizes = [winograd.padding(H, W, c.size, c.stride, c.pad) for c in readers] or [(H, W)]
    high, wide = max(h for h, _ in sizes), max(w for _, w in sizes)
    return Image(here.take(node, B, high, wide, C), H, W, pad)


def _average(here: Pass, node: Any) -> Tensor:
    """Global average pooling: (B, C, 1, 1)."""
    x = here.image(node)
    B, C = x.data.shape[0], x.data.shape[3]
    if C % LANES:
        return F.adaptive_avg_pool2d(here.tensor(node), 1)
    y = np.empty(B * C, dtype=np.float32)
    layers.average(here.flat(node), (B, x.H, x.W, C), y)
    return torch.from_numpy(y).reshape(B, C, 1, 1)


def _both(size: Any) -> int | None:
    """The one number behind a size that is the same in both dimensions."""
    if isinstance(size, tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def columns_of(x: Tensor, size: int, stride: int, pad: int) -> Floats:
    """x (B, C, H, W) → (B, OH, OW, C·size²): for every output pixel, what the kernel sees there."""
    B, C, H, W = x.shape
    high, wide = (H + 2 * pad - size) // stride + 1, (W + 2 * pad - size) // stride + 1
    rows = F.unfold(x.contiguous(), size, padding=pad, stride=stride).transpose(1, 2).contiguous()
    columns: Floats = rows.numpy().reshape(B, high, wide, C * size * size)
    return columns
