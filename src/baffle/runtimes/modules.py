"""A torch module read as a graph: its layers and calls, one by one, as the operators of ``runtimes.graph``.

The module is traced with ``torch.fx`` and run once on zeros, so that whatever it computes from sizes (a
padding that depends on the image's) is a number. Layers are known by their exact type: a subclass may do
anything. What has no operator is named, all of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from baffle.errors import DataError
from baffle.runtimes.graph import Graph, Node, Setting
from baffle.runtimes.prefix import _changes_what_others_read, traced
from baffle.runtimes.simplify import simplified

_BATCH = 3  # of the zeros


class UncoveredError(Exception):
    """Operators that a graph has none for, by name, in one line."""


def graph_of(module: nn.Module, input_shape: tuple[int, ...], loss: str) -> Graph:
    """The graph of a module in eval mode, for one sample of ``input_shape``. Cost: one forward pass of three.

    Raises UncoveredError, naming what is not covered: layers, functions, or that it cannot be traced.
    """
    found = traced(module)
    if found is None:
        raise UncoveredError(f"{type(module).__name__} cannot be traced: its forward depends on values")
    stand_in, trace = found
    first = next(module.parameters())
    zeros = torch.zeros((_BATCH, *input_shape), dtype=torch.float32, device=first.device)
    names = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
    reading = _Reading(fx.GraphModule(stand_in, trace), names)
    try:
        with torch.no_grad():
            reading.run(zeros)
    except Exception as error:  # the user's forward: not for this shape, or not on zeros
        reason = " ".join(str(error).split())[:200]
        raise UncoveredError(f"{type(module).__name__} does not take {input_shape}: {reason}") from error
    shared = [node.name for node in trace.nodes if _changes_what_others_read(stand_in, node)]
    reading.missing.extend(f"{name}, which changes in place what others read" for name in shared)
    if reading.missing:
        raise UncoveredError(", ".join(dict.fromkeys(reading.missing)))
    try:
        graph = Graph(input_shape, simplified(reading.nodes, reading.end), loss)
        tensors = (*module.named_parameters(), *module.named_buffers())
        graph.shapes({name: tuple(t.shape) for name, t in tensors})
    except DataError as error:
        raise UncoveredError(str(error)) from error
    return graph


class _Value:
    """A tensor of the run, and its number in the graph; None where that is not known."""

    def __init__(self, tensor: Tensor, number: int | None) -> None:
        self.tensor, self.number = tensor, number


Settings = Mapping[str, Setting]
Read = tuple[str, Mapping[str, Any], Settings]  # operator, tensors by role, settings


class _RefusedError(Exception):
    """Why a call has no operator."""


class _Reading(fx.Interpreter):
    """Runs a trace and writes a node for each call. Sizes and other plain values are computed as they are."""

    def __init__(self, module: fx.GraphModule, names: dict[int, str]) -> None:
        super().__init__(module)
        self.names, self.nodes, self.missing = names, list[Node](), list[str]()
        self.end = 0
        self._current = ""

    def run_node(self, node: fx.Node) -> Any:
        self._current = str(node.target) if node.op == "call_module" else node.name
        return super().run_node(node)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _Value(super().placeholder(target, args, kwargs), 0)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = args[0]
        if not isinstance(result, _Value):
            self.missing.append("an output that is not one tensor")
        elif result.number is not None:
            self.end = result.number
            if result.number == 0:
                self.missing.append("a network that returns its input")
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        result = layer(*_plain(args), **_plain(kwargs))
        read = _LAYERS.get(type(layer))
        if read is None or kwargs or len(args) != 1 or not isinstance(args[0], _Value):
            return self._lost(result, f"{type(layer).__name__} ({target})")
        return self._node(lambda: read(layer, args[0].tensor, result), args, result, type(layer).__name__)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._call(getattr(target, "__name__", str(target)), target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        def method(value: Any, *rest: Any, **named: Any) -> Any:
            return getattr(value, target)(*rest, **named)

        method.__module__ = "torch"

        return self._call(target, method, args, kwargs)

    def _call(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = function(*_plain(args), **_plain(kwargs))
        if not isinstance(result, Tensor) or not any(
            isinstance(a, _Value) for a in (*args, *kwargs.values())
        ):
            return result if not _has_tensors(result) else self._lost(result, f"{name} ({self._current})")
        plain = name[1:] if name in ("iadd", "isub", "imul", "itruediv") else name.rstrip("_")
        read = _CALLS.get(plain) if _is_torchs(function) else None
        values = [a for a in args if isinstance(a, _Value)]
        if read is None or any(isinstance(a, _Value) for a in kwargs.values()):
            return self._lost(result, f"{name} ({self._current})")
        return self._node(lambda: read(result, *_plain(args), **_plain(kwargs)), values, result, name)

    def _node(self, read: Callable[[], Read | None], args: Any, result: Tensor, kind: str) -> Any:
        numbers = [value.number for value in args]
        if None in numbers:  # behind what is missing already
            return _Value(result, None)
        try:
            made = read()
            if made is None:  # the value itself
                return _Value(result, numbers[0])
            op, tensors, settings = made
            roles = {role: self._name(t) for role, t in tensors.items() if t is not None}
        except (_RefusedError, TypeError) as refused:  # TypeError: an argument that is not looked at
            why = str(refused) if isinstance(refused, _RefusedError) else "with such arguments"
            return self._lost(result, f"{kind} {why} ({self._current})")
        inputs = tuple(number for number in numbers if number is not None)
        weight = roles.get("weight", "").rpartition(".")[0]
        self.nodes.append(
            Node(
                op,
                (weight or self._current)[:300],
                inputs,
                tuple(sorted(roles.items())),
                tuple(sorted(settings.items())),
            )
        )
        return _Value(result, len(self.nodes))

    def _name(self, tensor: Tensor) -> str:
        if id(tensor) not in self.names:
            raise _RefusedError("with a tensor that is computed")
        return self.names[id(tensor)]

    def _lost(self, result: Any, what: str) -> Any:
        self.missing.append(what)
        return _Value(result, None) if isinstance(result, Tensor) else result


def _plain(value: Any) -> Any:
    if isinstance(value, _Value):
        return value.tensor
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _is_torchs(function: Any) -> bool:
    """Not one of the user's own, which may have any name."""
    module = getattr(function, "__module__", None)
    return module is None or module == "_operator" or module.split(".")[0] == "torch"


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_has_tensors, value)))


# -- settings ------------------------------------------------------------------------------------------


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _need(holds: Any, text: str) -> None:
    if not holds:
        raise _RefusedError(text)


def _conv(
    result: Tensor, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Read:  # fmt: skip
    _need(x.dim() == weight.dim() == 4, "over other than images")
    dilated = _pair(dilation)
    pad: tuple[int, ...]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilated, weight.shape[2:], strict=True)]
        pad = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        pad = _pair(0 if padding == "valid" else padding) * 2
    settings: Settings = {"stride": _pair(stride), "pad": pad, "dilation": dilated, "groups": groups}
    return "conv2d", {"weight": weight, "bias": bias}, settings


def _conv_layer(layer: Any, x: Tensor, result: Tensor) -> Read:
    _need(layer.padding_mode == "zeros", f"padded by {layer.padding_mode!r}")
    return _conv(
        result, x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def _linear(result: Tensor, x: Tensor, weight: Tensor, bias: Any = None) -> Read:
    _need(x.dim() == 2, "over more than one vector a sample")
    return "linear", {"weight": weight, "bias": bias}, {}


def _group_norm(
    result: Tensor, x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Read:
    return "group_norm", {"weight": weight, "bias": bias}, {"groups": num_groups, "eps": float(eps)}


def _batch_norm(
    result: Tensor, x: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: Any = 0.1, eps: float = 1e-5,
) -> Read:  # fmt: skip
    _need(not training and running_mean is not None and running_var is not None, "by the batch's statistics")
    tensors = {"mean": running_mean, "var": running_var, "weight": weight, "bias": bias}
    return "batch_norm", tensors, {"eps": float(eps)}


def _layer_norm(
    result: Tensor, x: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Read:
    return "layer_norm", {"weight": weight, "bias": bias}, {"dims": len(normalized_shape), "eps": float(eps)}


def _max_pool(
    result: Tensor, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Read:  # fmt: skip
    _need(not ceil_mode and not return_indices, "with ceil_mode or indices")
    kernel = _pair(kernel_size)
    return "max_pool", {}, {
        "kernel": kernel, "stride": _pair(stride) if stride else kernel, "pad": _pair(padding) * 2,
        "dilation": _pair(dilation),
    }  # fmt: skip


def _avg_pool(
    result: Tensor, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Read:  # fmt: skip
    _need(not ceil_mode and divisor_override is None, "with ceil_mode or a divisor")
    kernel = _pair(kernel_size)
    return "avg_pool", {}, {
        "kernel": kernel, "stride": _pair(stride) if stride else kernel, "pad": _pair(padding) * 2,
        "count_pad": int(count_include_pad),
    }  # fmt: skip


def _adaptive(result: Tensor, x: Tensor, output_size: Any) -> Read:
    size = tuple(result.shape[2:])
    return (
        ("global_avg_pool", {}, {"keep": 1}) if size == (1, 1) else ("adaptive_avg_pool", {}, {"size": size})
    )


def _flatten(result: Tensor, x: Tensor, *rest: Any, **named: Any) -> Read | None:
    _need(result.shape == (len(x), math.prod(x.shape[1:])), f"to {tuple(result.shape)[1:]}")
    return None if x.dim() == 2 else ("flatten", {}, {})


def _same(result: Tensor, x: Tensor, *rest: Any, **named: Any) -> None:
    """For what changes nothing in eval mode."""


def _dropout(result: Tensor, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
    _need(not training or p == 0, "that is never off")


def _mean(result: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False) -> Read:
    dims = sorted(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or ()))
    _need(x.dim() == 4 and dims == [2, 3], "over other than an image's height and width")
    return "global_avg_pool", {}, {"keep": int(keepdim)}


def _pad(result: Tensor, x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Read | None:
    _need(mode == "constant" and not value, "with other than zeros")
    left, right, top, bottom = (*pad, 0, 0)[:4]
    _need(x.dim() == 4 and not any(pad[4:]) and min(left, right, top, bottom) >= 0, "of other than images")
    return ("pad", {}, {"pad": (top, left, bottom, right)}) if any(pad) else None


def _scaled(scale: float, shift: float) -> Read:
    return "scale_shift", {}, {"scale": float(scale), "shift": float(shift)}


def _two(op: str) -> Callable[..., Read]:
    def read(result: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Read:
        _need(alpha == 1, "with a factor")
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            _need(op in ("add", "mul"), "of two tensors")
            return op, {}, {}
        value, first = (b, True) if isinstance(a, Tensor) else (a, False)
        _need(isinstance(value, int | float), "with a tensor that is computed")
        if op == "truediv":
            _need(first, "of a number by a tensor")
            return _scaled(1 / value, 0.0)
        if op == "mul":
            return _scaled(value, 0.0)
        if op == "sub":
            return _scaled(1.0, -value) if first else _scaled(-1.0, value)
        return _scaled(1.0, value)

    return read


def _activation(kind: str) -> Callable[..., Read]:
    def read(result: Tensor, x: Tensor, inplace: bool = False) -> Read:
        return "activation", {}, {"kind": kind}

    return read


def _gelu(result: Tensor, x: Tensor, approximate: str = "none") -> Read:
    _need(approximate == "none", "by tanh")
    return "activation", {}, {"kind": "gelu"}


def _elu(result: Tensor, x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Read:
    _need(alpha == 1, f"with alpha {alpha:g}")
    return "activation", {}, {"kind": "elu"}


def _leaky(result: Tensor, x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Read:
    return "activation", {}, {"kind": "leaky_relu", "slope": float(negative_slope)}


def _clamp(result: Tensor, x: Tensor, min_val: Any, max_val: Any, inplace: bool = False) -> Read:
    _need((min_val, max_val) == (0, 6), "other than to [0, 6]")
    return "activation", {}, {"kind": "relu6"}


_PLAIN = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.SELU: "selu",
    nn.Tanh: "tanh",
}

#: A call's name → what reads its result and arguments. Names in torch, torch.nn.functional, of methods and of
#: operators mean the same.
_CALLS: Mapping[str, Callable[..., Any]] = {
    "conv2d": _conv,
    "linear": _linear,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive,
    "flatten": _flatten,
    "view": _flatten,
    "reshape": _flatten,
    "squeeze": _flatten,
    "contiguous": _same,
    "dropout": _dropout,
    "mean": _mean,
    "pad": _pad,
    "add": _two("add"),
    "mul": _two("mul"),
    "sub": _two("sub"),
    "truediv": _two("truediv"),
    "div": _two("truediv"),
    "gelu": _gelu,
    "elu": _elu,
    "leaky_relu": _leaky,
    "hardtanh": _clamp,
    **{kind: _activation(kind) for kind in _PLAIN.values()},
}

Layer = Callable[[Any, Tensor, Tensor], Read | None]


def _plain_layer(kind: str) -> Layer:
    return lambda layer, x, result: ("activation", {}, {"kind": kind})


_LAYERS: Mapping[type, Layer] = {
    nn.Conv2d: _conv_layer,
    nn.Linear: lambda m, x, y: _linear(y, x, m.weight, m.bias),
    nn.GroupNorm: lambda m, x, y: _group_norm(y, x, m.num_groups, m.weight, m.bias, m.eps),
    **{
        kind: lambda m, x, y: _batch_norm(y, x, m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps)
        for kind in (nn.BatchNorm1d, nn.BatchNorm2d)
    },
    nn.LayerNorm: lambda m, x, y: _layer_norm(y, x, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.MaxPool2d: lambda m, x, y: _max_pool(
        y, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AvgPool2d: lambda m, x, y: _avg_pool(
        y, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda m, x, y: _adaptive(y, x, m.output_size),
    nn.Flatten: lambda m, x, y: _flatten(y, x),
    nn.ZeroPad2d: lambda m, x, y: _pad(y, x, m.padding),
    nn.GELU: lambda m, x, y: _gelu(y, x, m.approximate),
    nn.ELU: lambda m, x, y: _elu(y, x, m.alpha),
    nn.LeakyReLU: lambda m, x, y: _leaky(y, x, m.negative_slope),
    nn.Hardtanh: lambda m, x, y: _clamp(y, x, m.min_val, m.max_val),
    **{kind: lambda m, x, y: None for kind in (nn.Identity, nn.Dropout, nn.Dropout2d)},
    **{kind: _plain_layer(name) for kind, name in _PLAIN.items()},
}
