"""An ONNX network read as a graph: the operators that ``runtimes.graph`` has, and how exporters write them.

Works on what a file says, without running it. Sizes that a network computes (the batch's, for a reshape) are
followed as far as exporters do that. What has no operator is named, all of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from baffle.errors import DataError
from baffle.runtimes.graph import _SHAPES, Graph, Node, Shape
from baffle.runtimes.simplify import simplified

BATCH = "batch"  # the one size that is not known
Floats = NDArray[np.float32]

#: How a tensor of the graph is made of the file's: as it is, a matrix transposed, or without sides of 1.
FORMS = ("same", "transposed", "vector")


@dataclass(frozen=True)
class Converted:
    """A graph, or what it lacks; ``forms`` of the tensors that it uses, by name."""

    graph: Graph | None
    missing: str
    forms: Mapping[str, str] = field(default_factory=dict)


class _Value(NamedTuple):
    number: int


class _Tensor(NamedTuple):
    name: str


class _Sizes(NamedTuple):
    """Numbers that are computed from shapes: whole numbers, and BATCH."""

    sizes: tuple[Any, ...]


class _Grouped(NamedTuple):
    """An image as (B, groups, rest), before and after each row is normalised."""

    number: int
    groups: int
    epsilon: float | None = None


class _MissingError(Exception):
    """Why a node has no operator."""


def convert(
    nodes: Sequence[Any],
    tensors: Mapping[str, NDArray[Any]],
    source: str,
    output: str,
    input_shape: Shape,
    loss: str,
) -> Converted:
    """Reads ``nodes`` (NodeProto) from value ``source`` to ``output``; ``tensors`` are the file's own."""
    reading = _Reading(tensors, source, input_shape)
    missing = []
    for node in nodes:
        try:
            reading.read(node)
        except _MissingError as error:
            missing.append(f"{node.op_type} {error}".strip())
        except (KeyError, IndexError, TypeError, ValueError, DataError) as error:
            missing.append(f"{node.op_type} ({' '.join(str(error).split())[:100]})")
    result = reading.values.get(output)
    if not missing and not (isinstance(result, _Value) and result.number):
        missing.append("an output that is no value of the network")
    if missing:
        return Converted(None, ", ".join(dict.fromkeys(missing))[:2000])
    assert isinstance(result, _Value)
    try:
        graph = Graph(input_shape, simplified(reading.nodes, result.number), loss)
    except DataError as error:
        return Converted(None, str(error)[:2000])
    used = set(graph.tensors())
    return Converted(graph, "", {name: form for name, form in reading.forms.items() if name in used})


class _Reading:
    def __init__(self, tensors: Mapping[str, NDArray[Any]], source: str, input_shape: Shape) -> None:
        self.tensors = tensors
        self.values: dict[str, Any] = {name: _Tensor(name) for name in tensors}
        self.values[source] = _Value(0)
        self.nodes, self.shapes, self.forms = list[Node](), [input_shape], dict[str, str]()

    def read(self, node: Any) -> None:
        if any(name and name not in self.values for name in node.input):
            return  # behind what is missing already
        method: Callable[[_Call], Any] | None = _OPERATORS.get(node.op_type)
        if method is None or node.domain not in ("", "ai.onnx"):
            raise _MissingError("")
        inputs = [self.values[name] if name else None for name in node.input]
        result = method(_Call(self, node, inputs))
        if any(node.output[1:]):
            raise _MissingError("with a second output")
        self.values[node.output[0]] = result


class _Call:
    """One node of the file: its inputs as they are known, its attributes."""

    def __init__(self, reading: _Reading, node: Any, inputs: list[Any]) -> None:
        self.reading, self.node, self.inputs = reading, node, inputs
        self.attributes = {a.name: a for a in node.attribute}

    def integer(self, name: str, default: int) -> int:
        return int(self.attributes[name].i) if name in self.attributes else default

    def real(self, name: str, default: float) -> float:
        return float(self.attributes[name].f) if name in self.attributes else default

    def text(self, name: str, default: str) -> str:
        return self.attributes[name].s.decode("ascii", "replace") if name in self.attributes else default

    def integers(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        return (
            tuple(int(i) for i in self.attributes[name].ints) if name in self.attributes else tuple(default)
        )

    def need(self, holds: object, text: str) -> None:
        if not holds:
            raise _MissingError(text)

    def has(self, place: int) -> bool:
        return len(self.inputs) > place and self.inputs[place] is not None

    def value(self, place: int = 0) -> int:
        self.need(self.has(place) and isinstance(self.inputs[place], _Value), "of what is no value")
        return int(self.inputs[place].number)

    def shape(self, place: int = 0) -> Shape:
        return self.reading.shapes[self.value(place)]

    def constant(self, place: int) -> NDArray[Any]:
        found = self.inputs[place]
        self.need(isinstance(found, _Tensor), "by what is computed")
        return self.reading.tensors[found.name]

    def sizes(self, place: int) -> tuple[Any, ...]:
        found = self.inputs[place]
        if isinstance(found, _Sizes):
            return found.sizes
        array = self.constant(place)
        self.need(array.dtype.kind in "iu" and array.size <= 16, "by sizes that are not known")
        return tuple(int(i) for i in array.reshape(-1))

    def axes(self, place: int) -> tuple[int, ...]:
        """Of an attribute in old files, of an input in new ones."""
        if "axes" in self.attributes or not self.has(place):
            return self.integers("axes", ())
        return self.sizes(place)

    def tensor(self, place: int, form: str = "same") -> str:
        """The name of a tensor that the graph takes in this form."""
        array = self.constant(place)
        self.need(array.dtype == np.float32, f"of {array.dtype}")
        name: str = self.inputs[place].name
        self.need(self.reading.forms.setdefault(name, form) == form, f"that takes {name} in two ways")
        return name

    def vector(self, place: int) -> str:
        return self.tensor(place, "same" if self.constant(place).ndim == 1 else "vector")

    def add(
        self,
        op: str,
        inputs: Sequence[int],
        tensors: Mapping[str, str] = MappingProxyType({}),
        **settings: Any,
    ) -> _Value:
        reading = self.reading
        name = (self.node.name or self.node.output[0])[:300]
        made = Node(op, name, tuple(inputs), tuple(sorted(tensors.items())), tuple(sorted(settings.items())))
        shapes = {}
        for role, tensor in made.tensors:
            array = reading.tensors[tensor]
            form = reading.forms[tensor]
            shapes[role] = {"transposed": array.shape[::-1], "vector": (array.size,)}.get(form, array.shape)
        reading.shapes.append(_SHAPES[op](made, [reading.shapes[i] for i in inputs], shapes))
        reading.nodes.append(made)
        return _Value(len(reading.nodes))


# -- operators -----------------------------------------------------------------------------------------


def _conv(call: _Call) -> _Value:
    call.need(len(call.shape()) == 3, "over other than images")
    weight = call.constant(1).shape
    stride, dilation = call.integers("strides", (1, 1)), call.integers("dilations", (1, 1))
    pad = _padding(call, weight[2:], stride, dilation)
    tensors = {"weight": call.tensor(1)}
    if call.has(2):
        tensors["bias"] = call.tensor(2)
    groups = call.integer("group", 1)
    return call.add(
        "conv2d", [call.value()], tensors, stride=stride, pad=pad, dilation=dilation, groups=groups
    )


def _padding(call: _Call, kernel: Shape, stride: Shape, dilation: Shape) -> tuple[int, ...]:
    auto = call.text("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        return call.integers("pads", (0, 0, 0, 0)) if auto == "NOTSET" else (0, 0, 0, 0)
    call.need(auto in ("SAME_UPPER", "SAME_LOWER"), f"padded by {auto[:20]!r}")
    before, after = [], []
    for size, k, s, d in zip(call.shape()[1:], kernel, stride, dilation, strict=True):
        total = max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
        less, more = total // 2, total - total // 2
        before.append(less if auto == "SAME_UPPER" else more)
        after.append(more if auto == "SAME_UPPER" else less)
    return (*before, *after)


def _gemm(call: _Call) -> _Value:
    plain = call.real("alpha", 1) == 1 and call.real("beta", 1) == 1 and not call.integer("transA", 0)
    call.need(plain and call.constant(1).ndim == 2, "with factors, or transposed")
    tensors = {"weight": call.tensor(1, "same" if call.integer("transB", 0) else "transposed")}
    if call.has(2):
        call.need(call.constant(2).size == max(call.constant(2).shape, default=0), "with a bias by sample")
        tensors["bias"] = call.vector(2)
    return call.add("linear", [call.value()], tensors)


def _matmul(call: _Call) -> _Value:
    call.need(len(call.shape()) == 1 and call.constant(1).ndim == 2, "of other than vectors and a matrix")
    return call.add("linear", [call.value()], {"weight": call.tensor(1, "transposed")})


def _batch_norm(call: _Call) -> _Value:
    call.need(not call.integer("training_mode", 0), "by the batch's statistics")
    roles = {"weight": 1, "bias": 2, "mean": 3, "var": 4}
    tensors = {role: call.tensor(place) for role, place in roles.items()}
    return call.add("batch_norm", [call.value()], tensors, eps=call.real("epsilon", 1e-5))


def _instance_norm(call: _Call) -> Any:
    source, epsilon = call.inputs[0], call.real("epsilon", 1e-5)
    if isinstance(source, _Grouped):
        plain = (call.constant(1) == 1).all() and (call.constant(2) == 0).all()
        call.need(plain, "with a scale by group")
        return source._replace(epsilon=epsilon)
    tensors = {"weight": call.tensor(1), "bias": call.tensor(2)}
    return call.add("group_norm", [call.value()], tensors, groups=call.shape()[0], eps=epsilon)


def _group_norm(call: _Call) -> _Value:
    call.need(call.constant(1).shape == call.shape()[:1], "with a scale by group")
    tensors = {"weight": call.tensor(1), "bias": call.tensor(2)}
    settings: dict[str, Any] = {
        "groups": call.integer("num_groups", 0),
        "eps": call.real("epsilon", 1e-5),
    }
    return call.add("group_norm", [call.value()], tensors, **settings)


def _layer_norm(call: _Call) -> _Value:
    axis, rank = call.integer("axis", -1), len(call.shape()) + 1
    dims = -axis if axis < 0 else rank - axis
    tensors = {"weight": call.tensor(1)}
    if call.has(2):
        tensors["bias"] = call.tensor(2)
    return call.add("layer_norm", [call.value()], tensors, dims=dims, eps=call.real("epsilon", 1e-5))


def _max_pool(call: _Call) -> _Value:
    settings = _window(call)
    return call.add("max_pool", [call.value()], dilation=call.integers("dilations", (1, 1)), **settings)


def _average_pool(call: _Call) -> _Value:
    call.need(call.integers("dilations", (1, 1)) == (1, 1), "dilated")
    return call.add(
        "avg_pool", [call.value()], count_pad=call.integer("count_include_pad", 0), **_window(call)
    )


def _window(call: _Call) -> dict[str, Any]:
    call.need(not call.integer("ceil_mode", 0), "with ceil_mode")
    kernel, stride = call.integers("kernel_shape", ()), call.integers("strides", (1, 1))
    pad = _padding(call, kernel, stride, call.integers("dilations", (1, 1)))
    return {"kernel": kernel, "stride": stride, "pad": pad}


def _global_pool(call: _Call) -> _Value:
    return call.add("global_avg_pool", [call.value()], keep=1)


def _reduce_mean(call: _Call) -> _Value:
    rank = len(call.shape()) + 1
    axes = sorted(axis % rank for axis in call.axes(1))
    call.need(rank == 4 and axes == [2, 3], "over other than an image's height and width")
    return call.add("global_avg_pool", [call.value()], keep=call.integer("keepdims", 1))


def _flatten(call: _Call) -> Any:
    call.need(call.integer("axis", 1) == 1, "from another axis on")
    return _flat(call)


def _flat(call: _Call) -> _Value:
    return _Value(call.value()) if len(call.shape()) == 1 else call.add("flatten", [call.value()])


def _squeeze(call: _Call) -> Any:
    if isinstance(call.inputs[0], _Sizes):
        return call.inputs[0]
    rank, axes = len(call.shape()) + 1, call.axes(1)
    left = [size for i, size in enumerate(call.shape(), start=1) if i not in {axis % rank for axis in axes}]
    call.need(axes and 0 not in axes and left == [math.prod(call.shape())], "to other than vectors")
    return _flat(call)


def _reshape(call: _Call) -> Any:
    source, wanted = call.inputs[0], call.sizes(1)
    number = source.number if isinstance(source, _Grouped) else call.value()
    shape = call.reading.shapes[number]
    if wanted and wanted[0] == 0 and not call.integer("allowzero", 0):
        wanted = (BATCH, *wanted[1:])
    if isinstance(source, _Grouped):
        back = wanted in ((BATCH, *shape), (-1, *shape))
        call.need(back and source.epsilon is not None, "of parts of an image")
        return call.add("group_norm", [number], groups=source.groups, eps=float(source.epsilon or 0.0))
    total = math.prod(shape)
    if wanted in ((BATCH, -1), (BATCH, total), (-1, total)):
        return _flat(call)
    if len(wanted) == 3 and wanted[0] in (BATCH, -1) and isinstance(wanted[1], int) and wanted[1] > 0:
        groups, rest = wanted[1], wanted[2]
        fits = len(shape) in (1, 3) and shape[0] % groups == 0
        if fits and (rest == total // groups or (rest == -1 and wanted[0] == BATCH)):
            return _Grouped(number, groups)
    if wanted in ((BATCH, *shape), (-1, *shape)):
        return _Value(number)
    raise _MissingError(f"to {wanted}")


def _shape_of(call: _Call) -> _Sizes:
    source = call.inputs[0]
    sizes = (BATCH, *call.reading.shapes[source.number if isinstance(source, _Grouped) else call.value()])
    start, end = call.integer("start", 0), call.integer("end", len(sizes))
    return _Sizes(sizes[start:end])


def _gather(call: _Call) -> _Sizes:
    places = call.sizes(1)
    call.need(isinstance(call.inputs[0], _Sizes) and all(isinstance(i, int) for i in places), "")
    return _Sizes(tuple(call.inputs[0].sizes[i] for i in places))


def _concat(call: _Call) -> _Sizes:
    call.need(any(isinstance(found, _Sizes) for found in call.inputs), "")
    return _Sizes(tuple(size for place in range(len(call.inputs)) for size in call.sizes(place)))


def _slice(call: _Call) -> _Sizes:
    call.need(isinstance(call.inputs[0], _Sizes) and not call.has(4), "")
    (start,), (end,) = call.sizes(1), call.sizes(2)
    return _Sizes(call.inputs[0].sizes[start:end])


def _same(call: _Call) -> Any:
    return call.inputs[0]


def _same_sizes(call: _Call) -> Any:
    call.need(isinstance(call.inputs[0], _Sizes), "")
    return call.inputs[0]


def _cast(call: _Call) -> Any:
    call.need(isinstance(call.inputs[0], _Sizes) or call.integer("to", 0) == 1, "to another type")
    return call.inputs[0]


def _pad(call: _Call) -> Any:
    call.need(call.text("mode", "constant") == "constant", "by other than zeros")
    call.need(not call.has(2) or not call.constant(2).any(), "by other than zeros")
    call.need(not call.real("value", 0), "by other than zeros")
    rank = len(call.shape()) + 1
    pads = call.sizes(1) if call.has(1) else call.integers("pads", ())
    axes = call.sizes(3) if call.has(3) else tuple(range(rank))
    around = {axis % rank: (pads[i], pads[len(axes) + i]) for i, axis in enumerate(axes)}
    call.need(
        rank == 4 and not any(around.pop(axis, (0, 0)) != (0, 0) for axis in (0, 1)), "of other than images"
    )
    (top, bottom), (left, right) = around.get(2, (0, 0)), around.get(3, (0, 0))
    call.need(min(top, left, bottom, right) >= 0, "by less than nothing")
    if not any((top, left, bottom, right)):
        return call.inputs[0]
    return call.add("pad", [call.value()], pad=(top, left, bottom, right))


def _activation(kind: str, **fixed: float) -> Callable[[_Call], _Value]:
    """``fixed``: attributes, with the only values that the graph has."""

    def read(call: _Call) -> _Value:
        for name, value in fixed.items():
            near = math.isclose(call.real(name, _DEFAULTS.get((kind, name), value)), value, rel_tol=1e-6)
            call.need(near, f"with another {name}")
        return call.add("activation", [call.value()], kind=kind)

    return read


_DEFAULTS = {("hardsigmoid", "alpha"): 0.2}


def _leaky(call: _Call) -> _Value:
    return call.add("activation", [call.value()], kind="leaky_relu", slope=call.real("alpha", 0.01))


def _gelu(call: _Call) -> _Value:
    call.need(call.text("approximate", "none") == "none", "by tanh")
    return call.add("activation", [call.value()], kind="gelu")


def _clip(call: _Call) -> _Value:
    least = float(call.constant(1)) if call.has(1) else call.real("min", -math.inf)
    most = float(call.constant(2)) if call.has(2) else call.real("max", math.inf)
    kind = {(0.0, 6.0): "relu6", (0.0, math.inf): "relu"}.get((least, most))
    call.need(kind, f"to [{least:g}, {most:g}]")
    return call.add("activation", [call.value()], kind=str(kind))


def _two(op: str) -> Callable[[_Call], Any]:
    """Of two values, of a value and a number, or of a layer's result and what belongs to the layer."""

    def read(call: _Call) -> Any:
        first, second = call.inputs
        if isinstance(first, _Value) and isinstance(second, _Value):
            call.need(op in ("add", "mul"), "of two values")
            return call.add(op, [first.number, second.number])
        place = 1 if isinstance(first, _Value) else 0
        array, number = call.constant(place), call.value(1 - place)
        if array.size == 1:
            return _scaled(call, op, float(array.reshape(-1)[0]), place == 1, number)
        call.need(op in ("add", "mul"), "by a tensor")
        return _affine(call, op, place, number)

    return read


def _scaled(call: _Call, op: str, value: float, behind: bool, number: int) -> _Value:
    scale, shift = {
        "add": (1.0, value),
        "mul": (value, 0.0),
        "sub": (1.0, -value) if behind else (-1.0, value),
        "div": (1 / value if behind and value else math.nan, 0.0),
    }[op]
    call.need(math.isfinite(scale), "of a number by a value")
    return call.add("scale_shift", [number], scale=scale, shift=shift)


def _affine(call: _Call, op: str, place: int, number: int) -> _Value:
    """A bias or scale by channel, which the node before takes where it has none yet."""
    array, nodes = call.constant(place), call.reading.nodes
    shape, role = call.reading.shapes[number], "bias" if op == "add" else "weight"
    by_channel = array.size == shape[0] and array.shape[array.ndim - len(shape)] == shape[0]
    call.need(by_channel and array.ndim >= len(shape), "by a tensor that is not one number a channel")
    if (array == (0 if op == "add" else 1)).all() and _norm(nodes, number):
        return _Value(number)  # what exporters write for a norm without a scale and shift
    before = nodes[number - 1] if number else None
    takes = before is not None and before.tensor(role) is None
    if before is not None and before.op == "group_norm":
        takes = takes and (role == "bias" or before.tensor("bias") is None)
    else:
        takes = takes and role == "bias" and before is not None and before.op in ("conv2d", "linear")
    call.need(takes, "by a tensor, behind no layer that has one")
    assert before is not None
    tensors = dict((*before.tensors, (role, call.vector(place))))
    # A node of its own: whoever reads the other result still does.
    return call.add(before.op, before.inputs, tensors, **dict(before.settings))


def _norm(nodes: Sequence[Node], number: int) -> bool:
    return number > 0 and nodes[number - 1].op == "group_norm"


_OPERATORS: Mapping[str, Callable[[_Call], Any]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "ReduceMean": _reduce_mean,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Shape": _shape_of,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Unsqueeze": _same_sizes,
    "Cast": _cast,
    "Identity": _same,
    "Dropout": _same,
    "Pad": _pad,
    "Add": _two("add"),
    "Mul": _two("mul"),
    "Sub": _two("sub"),
    "Div": _two("div"),
    "Clip": _clip,
    "Gelu": _gelu,
    "LeakyRelu": _leaky,
    "Relu": _activation("relu"),
    "Sigmoid": _activation("sigmoid"),
    "Tanh": _activation("tanh"),
    "HardSwish": _activation("hardswish"),
    "HardSigmoid": _activation("hardsigmoid", alpha=1 / 6, beta=0.5),
    "Selu": _activation("selu", alpha=1.6732632423543772, gamma=1.0507009873554805),
    "Elu": _activation("elu", alpha=1.0),
}
