"""A convolutional network as a list of compiled steps: the sweep for CPUs that have the kernels.

The part is traced once with ``torch.fx``. A convolution with the activation, pooling or addition behind it,
and a group norm with its activation, become calls of ``baffle.kernels``; the layers around them stay
torch's, as functions of their tensors. The columns of a first convolution are laid out once for all
directions. Nothing is swapped in and out of a module, so that directions run on several threads at once.

A part with any layer or operation that is not listed here has no program and is measured as any module is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from baffle.kernels import available
from baffle.runtimes.objective import Directions, Objective, Part
from baffle.runtimes.onebyone import has_hooks, share
from baffle.runtimes.prefix import traced

Floats = NDArray[np.float32]
Step = Callable[["_Pass"], Any]
_EMPTY: Floats = np.empty(0, dtype=np.float32)
_LANES = 16
_MOST_COLUMNS = 128  # of a first convolution: beyond that the columns are larger than what they save

# Layers without parameters that are functions of one input, and operations: torch's own, called as they are.
_PLAIN_LAYERS = (
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
_PLAIN_FUNCTIONS = (
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
_PLAIN_METHODS = ("flatten",)
_VIEWS = (nn.Flatten, nn.Identity, nn.Dropout, torch.flatten)


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

    def take(self, shape: tuple[int, ...]) -> Floats:
        """An array of that shape with no values to rely on."""
        free = self._free.get(math.prod(shape))
        return (free.pop() if free else np.empty(math.prod(shape), dtype=np.float32)).reshape(shape)

    def give(self, array: Floats) -> None:
        """Puts back what ``take`` gave."""
        self._free.setdefault(array.size, []).append(array.reshape(-1))


class _Pass:
    """One forward pass: the values of the nodes so far, the weights, and a worker's memory."""

    def __init__(self, weights: list[Tensor], inputs: dict[fx.Node, Any], memory: Memory) -> None:
        self.weights = weights
        self.values: dict[fx.Node, Any] = dict(inputs)
        self.memory = memory

    def image(self, node: fx.Node) -> Floats:
        """A value as a C-contiguous NHWC array."""
        value = self.values[node]
        if isinstance(value, Tensor):
            value = value.permute(0, 2, 3, 1).contiguous().numpy()
        result: Floats = value
        return result

    def tensor(self, node: Any) -> Any:
        """A value as torch has it: images are NCHW, with channels last in memory."""
        value = self.values.get(node, node) if isinstance(node, fx.Node) else node
        return torch.from_numpy(value).permute(0, 3, 1, 2) if isinstance(value, np.ndarray) else value


class Program:
    """The steps of one part. ``Program.of`` makes it, or says that there is none."""

    def __init__(self, part: Part, module: nn.Module, graph: fx.Graph) -> None:
        self._part, self._module = part, module
        self._steps: list[tuple[fx.Node, Step, list[fx.Node]]] = []
        self._columns: dict[fx.Node, tuple[fx.Node, dict[str, Any]]] = {}
        self._kernel_made: set[fx.Node] = set()
        self.convolutions = 0  # that a kernel with fewer multiplications does
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._output: fx.Node | None = None
        self._merged: dict[fx.Node, fx.Node] = {}  # a node → the one behind it that its step computes
        nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        for node in nodes:
            self._fuse(node)
        for node in nodes:
            if node not in self._merged and (node.users or node.op != "get_attr"):
                self._steps.append((node, self._step(node), []))
        (output,) = (node for node in graph.nodes if node.op == "output")
        if not isinstance(output.args[0], fx.Node):
            raise _NoProgramError
        self._output = output.args[0]
        self._bury()

    @classmethod
    def of(cls, part: Part) -> Program | None:
        """The part's program, or None where there is none or it would gain nothing.

        All of it must be float32 on the CPU, and at least one convolution a kernel's.
        """
        tensors = [*part.frozen.values(), *(b for b in part.buffers.values() if b.is_floating_point())]
        if not available() or part.wide != torch.float32 or has_hooks(part.module):
            return None
        if {*part.dtypes, *(t.dtype for t in tensors)} != {torch.float32}:
            return None
        if any(t.device.type != "cpu" for t in tensors):
            return None
        found = traced(part.module)
        if found is None:
            return None
        try:
            program = cls(part, *found)
        except _NoProgramError:
            return None
        return program if program.convolutions else None

    def outputs(self, weights: list[Tensor], inputs: dict[fx.Node, Any], memory: Memory) -> Any:
        """The part's outputs for ``weights``, the trainable tensors in the order of the layout."""
        here = _Pass(weights, inputs, memory)
        for node, step, dead in self._steps:
            here.values[node] = step(here)
            for gone in dead:
                memory.give(here.values.pop(gone))
        return here.tensor(self._output)

    def enter(self, objective: Objective) -> dict[fx.Node, Any]:
        """The inputs by node, and the columns of the first convolutions. Memory: taps times the inputs."""
        inputs: dict[fx.Node, Any] = dict(zip(self._inputs, objective.inputs, strict=True))
        for node, (source, window) in self._columns.items():
            inputs[_key(node)] = _columns(inputs[source], **window)
        return inputs

    # -- from nodes to steps ------------------------------------------------------------------------

    def _layer(self, node: Any) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self._module.get_submodule(str(node.target))
        return None

    def _activation(self, node: fx.Node) -> int | None:
        from baffle.kernels import winograd

        if type(self._layer(node)) is nn.ReLU or node.target in (F.relu, torch.relu):
            return winograd.RELU
        if type(self._layer(node)) is nn.Hardswish or node.target is F.hardswish:
            return winograd.HARDSWISH
        return None

    def _fuse(self, node: fx.Node) -> None:
        """Finds what is computed with a convolution or a norm: what alone reads its result."""
        layer = self._layer(node)
        if type(layer) is nn.GroupNorm and self._only_reader(node, self._activation) is not None:
            self._merged[node] = self._only_reader(node, self._activation)
        if type(layer) is not nn.Conv2d or self._kind(node) is None:
            return
        last = node
        if (behind := self._only_reader(last, self._activation)) is not None:
            self._merged[last], last = behind, behind
        if self._kind(node) == "columns" and (behind := self._only_reader(last, self._halves)) is not None:
            self._merged[last] = behind
        elif (behind := self._only_reader(last, self._adds)) is not None:
            other = behind.args[1] if behind.args[0] is last else behind.args[0]
            # The other summand of one addition must not itself wait for it.
            if isinstance(other, fx.Node) and other is not last and other not in self._merged:
                self._merged[last] = behind

    def _only_reader(self, node: fx.Node, wanted: Callable[[fx.Node], Any]) -> fx.Node | None:
        users = list(node.users)
        if len(users) != 1 or node.op == "output" or users[0].op == "output" or wanted(users[0]) is None:
            return None
        return users[0]

    def _halves(self, node: fx.Node) -> bool | None:
        """2×2 max-pooling."""
        layer = self._layer(node)
        if type(layer) is not nn.MaxPool2d:
            return None
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        plain = [_both(size) for size in sizes] == [2, 2, 0, 1]
        return True if plain and not layer.ceil_mode and not layer.return_indices else None

    def _adds(self, node: fx.Node) -> bool | None:
        both = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
        return True if node.target in (operator.add, torch.add) and both and not node.kwargs else None

    def _kind(self, node: fx.Node) -> str | None:
        """Which kernel does a convolution: "columns", "point", "3", "5", "strided", or None for torch."""
        c = self._layer(node)
        assert isinstance(c, nn.Conv2d)
        size, stride, pad, dilation = (_both(x) for x in (c.kernel_size, c.stride, c.padding, c.dilation))
        if None in (size, stride, pad, dilation) or c.groups != 1 or c.padding_mode != "zeros":
            return None
        if c.out_channels % _LANES or dilation != 1:
            return None
        if size is None or stride is None or pad is None:
            return None
        if node.args[0] in self._inputs and c.in_channels * size * size <= _MOST_COLUMNS:
            return "columns"
        if size == 1 and pad == 0:
            return "point"
        if c.in_channels % _LANES == 0 and pad < size:
            return {(3, 1): "3", (5, 1): "5", (3, 2): "strided"}.get((size, stride))
        return None

    def _parameter(self, name: str) -> Callable[[_Pass], Tensor]:
        part = self._part
        if name in part.trainable:
            index = part.trainable[name]
            return lambda here: here.weights[index]
        fixed = part.frozen.get(name, part.buffers.get(name))
        if fixed is None:
            raise _NoProgramError
        return lambda here: fixed

    def _flat(self, owner: nn.Module, target: str, name: str) -> Callable[[_Pass], Floats]:
        """A layer's parameter as a flat array, empty where it has none."""
        if getattr(owner, name) is None:
            return lambda here: _EMPTY
        own = self._parameter(f"{target}.{name}")
        return lambda here: own(here).detach().reshape(-1).numpy()

    def _step(self, node: fx.Node) -> Step:
        chain = [node]  # what this step computes, first to last
        while before := [n for n, behind in self._merged.items() if behind is chain[0]]:
            chain.insert(0, before[0])
        layer = self._layer(chain[0])
        if type(layer) is nn.Conv2d and self._kind(chain[0]) is not None:
            return self._convolution(chain)
        if type(layer) is nn.GroupNorm and layer.num_channels % _LANES == 0:
            return self._group_norm(chain)
        if len(chain) > 1:
            del self._merged[chain[0]]
            raise _NoProgramError
        return self._torch_step(node)

    def _convolution(self, chain: list[fx.Node]) -> Step:
        from baffle.kernels import layers, winograd

        node = chain[0]
        layer = self._layer(node)
        assert isinstance(layer, nn.Conv2d)
        kind, target = self._kind(node), str(node.target)
        weight, bias = self._flat(layer, target, "weight"), self._flat(layer, target, "bias")
        activation, pool, summand = winograd.NONE, 1, None
        for before, behind in zip(chain, chain[1:], strict=False):
            if (found := self._activation(behind)) is not None:
                activation = found
            elif self._halves(behind):
                pool = 2
            else:
                summand = behind.args[1] if behind.args[0] is before else behind.args[0]
        self._kernel_made.add(chain[-1])
        size, stride, pad = layer.kernel_size[0], layer.stride[0], _both(layer.padding)
        out, source = layer.out_channels, node.args[0]
        assert isinstance(source, fx.Node) and isinstance(pad, int)
        if kind == "columns":
            self._columns[node] = source, {"size": size, "stride": stride, "pad": pad}

        def residual(here: _Pass) -> Floats:
            return here.image(summand).reshape(-1) if isinstance(summand, fx.Node) else _EMPTY

        def project(here: _Pass) -> Floats:
            x = here.values[_key(node)] if kind == "columns" else here.image(source)
            step = 1 if kind == "columns" else stride
            B, H, W, _ = x.shape
            y = here.memory.take((B, -(-H // step) // pool, -(-W // step) // pool, out))
            layers.project(
                x.reshape(-1), x.shape, step, weight(here), bias(here), activation, pool,
                residual(here), y.reshape(-1), out,
            )  # fmt: skip
            return y

        def minimal(here: _Pass) -> Floats:
            x = here.image(source)
            B, H, W, _ = x.shape
            shape = B, (H + 2 * pad - size) // stride + 1, (W + 2 * pad - size) // stride + 1, out
            y = here.memory.take(shape)
            winograd.convolve(
                x, weight(here), size, stride, pad, bias(here), activation, residual(here), y,
                here.memory.scratch,
            )  # fmt: skip
            return y

        if kind in ("columns", "point"):
            return project
        self.convolutions += 1
        return minimal

    def _group_norm(self, chain: list[fx.Node]) -> Step:
        from baffle.kernels import layers, winograd

        layer, target, source = self._layer(chain[0]), str(chain[0].target), chain[0].args[0]
        assert isinstance(layer, nn.GroupNorm) and isinstance(source, fx.Node)
        weight, bias = self._flat(layer, target, "weight"), self._flat(layer, target, "bias")
        activation = self._activation(chain[1]) if len(chain) > 1 else winograd.NONE
        groups, eps = layer.num_groups, layer.eps
        self._kernel_made.add(chain[-1])

        def norm(here: _Pass) -> Floats:
            x = here.image(source)
            y = here.memory.take(x.shape)
            layers.group_norm(
                x.reshape(-1), x.shape, groups, eps, weight(here), bias(here), activation, y.reshape(-1)
            )
            return y

        return norm

    def _torch_step(self, node: fx.Node) -> Step:
        layer, args, kwargs = self._layer(node), node.args, node.kwargs
        if any(isinstance(value, list | tuple | dict | slice) for value in (*args, *kwargs.values())):
            sizes_only = not fx.node.map_arg((args, kwargs), lambda n: n) or all(
                not isinstance(x, fx.Node) for value in (*args, *kwargs.values())
                if isinstance(value, list | tuple) for x in value
            )  # fmt: skip
            if not sizes_only:
                raise _NoProgramError
        if getattr(layer, "inplace", False) or kwargs.get("inplace") or True in args:
            raise _NoProgramError

        def values(here: _Pass) -> list[Any]:
            return [here.tensor(arg) for arg in args]

        if layer is not None:
            target = str(node.target)
            if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
                weight, bias = self._parameter(f"{target}.weight"), self._optional(layer, target, "bias")
                rest = layer.stride, layer.padding, layer.dilation, layer.groups
                return lambda here: F.conv2d(
                    *values(here),
                    weight(here).contiguous(memory_format=torch.channels_last),
                    bias(here),
                    *rest,
                )
            if type(layer) is nn.Linear:
                weight, bias = self._parameter(f"{target}.weight"), self._optional(layer, target, "bias")
                return lambda here: F.linear(*values(here), weight(here), bias(here))
            if type(layer) is nn.GroupNorm:
                weight, bias = self._optional(layer, target, "weight"), self._optional(layer, target, "bias")
                groups, eps = layer.num_groups, layer.eps
                return lambda here: F.group_norm(*values(here), groups, weight(here), bias(here), eps)
            if type(layer) in _PLAIN_LAYERS:
                plain = layer
                return lambda here: plain(*values(here))
        elif node.op == "call_function" and node.target in _PLAIN_FUNCTIONS:
            function: Any = node.target
            return lambda here: function(*values(here), **kwargs)
        elif node.op == "call_method" and node.target in _PLAIN_METHODS:
            method = str(node.target)
            return lambda here: getattr(here.tensor(args[0]), method)(*args[1:], **kwargs)
        raise _NoProgramError

    def _optional(self, layer: nn.Module, target: str, name: str) -> Callable[[_Pass], Tensor | None]:
        if getattr(layer, name) is None:
            return lambda here: None
        return self._parameter(f"{target}.{name}")

    def _bury(self) -> None:
        """After which step each kernel's result is read no more: then its memory serves the next."""
        keeps: set[fx.Node] = {self._output} if self._output is not None else set()
        last: dict[fx.Node, int] = {}
        for i, (node, _, _) in enumerate(self._steps):
            chain = [node, *(n for n in self._merged if self._behind(n) is node)]
            for member in chain:
                for source in member.all_input_nodes:
                    last[source] = i
                    target = self._layer(node) if node.op == "call_module" else node.target
                    if type(target) in _VIEWS or target in _VIEWS or node.op == "call_method":
                        keeps.add(source)
        for node, i in last.items():
            if node in self._kernel_made and node not in keeps:
                self._steps[i][2].append(node)

    def _behind(self, node: fx.Node) -> fx.Node:
        while node in self._merged:
            node = self._merged[node]
        return node


class _NoProgramError(Exception):
    """Something in the graph that no step stands for."""


def _key(node: fx.Node) -> Any:
    return ("columns", node)


def _both(size: Any) -> int | None:
    """The one number behind a size that is the same in both dimensions."""
    if isinstance(size, tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _columns(x: Tensor, size: int, stride: int, pad: int) -> Floats:
    """x (B, C, H, W) → (B, OH, OW, C·size²): under every output pixel what the kernel sees there."""
    B, C, H, W = x.shape
    high, wide = (H + 2 * pad - size) // stride + 1, (W + 2 * pad - size) // stride + 1
    rows = F.unfold(x.contiguous(), size, padding=pad, stride=stride).transpose(1, 2).contiguous()
    result: Floats = rows.numpy().reshape(B, high, wide, C * size * size)
    return result


def by_program(
    program: Program,
    memories: Sequence[Memory],
    objective: Objective,
    origin: Tensor,
    directions: Sequence[int],
    scale: float,
    rows: Directions,
) -> NDArray[np.float64]:
    """Mean losses (len(directions),) at W + scale·z_k, a worker for each memory."""
    out = np.empty(len(directions))
    inputs = program.enter(objective)

    def worker(memory: Memory) -> Callable[[int], None]:
        def measure(i: int) -> None:
            (z,) = rows(directions[i : i + 1])
            flat = torch.from_numpy(memory.scratch("weights", len(origin))[: len(origin)])
            torch.add(origin, z, alpha=scale, out=flat)
            outputs = program.outputs(objective.part.cast(flat), inputs, memory)
            out[i] = float(objective.checked(outputs).double().mean())

        return measure

    share(range(len(directions)), [worker(memory) for memory in memories])
    return out
