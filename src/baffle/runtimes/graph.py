"""A network as plain data: what every runtime without torch runs, and what a bundle holds.

A graph is a row of nodes. Value 0 is the network's input, node i makes value i + 1, the last value is the
output. Shapes leave the batch out; images are (channels, height, width). Spatial settings are (height,
width), padding is (top, left, bottom, right), as in ONNX.

    op                 tensors by role           settings
    conv2d             weight, bias?             stride, pad, dilation, groups
    linear             weight, bias?
    group_norm         weight?, bias?            groups, eps
    batch_norm         mean, var, weight?, bias? eps                  (by running statistics)
    layer_norm         weight?, bias?            dims (trailing ones), eps
    max_pool                                     kernel, stride, pad, dilation
    avg_pool                                     kernel, stride, pad, count_pad (0 or 1)
    adaptive_avg_pool                            size
    global_avg_pool                              keep (0 or 1): (C, 1, 1) or (C,)
    activation                                   kind; slope where it is leaky_relu
    add, mul           of two values             equal shapes, or (C, 1, 1) beside (C, H, W)
    flatten
    pad                                          pad (zeros)
    scale_shift                                  scale, shift: x·scale + shift

Nothing else is run, and nothing else can be read: ``Graph.from_dict`` names the node and its operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from baffle.errors import DataError

Setting = int | float | str | tuple[int, ...]
Shape = tuple[int, ...]

LOSSES = ("cross-entropy", "mse")
ACTIVATIONS = (
    *("relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu"),
    *("gelu", "selu", "elu", "tanh", "leaky_relu", "identity"),
)
MOST_NODES = 1 << 16
_MOST = 1 << 40  # elements of one value


@dataclass(frozen=True)
class Operator:
    """What a node of one kind has: how many inputs, which tensors, which settings."""

    inputs: int = 1
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    settings: Mapping[str, Callable[[object], bool]] | None = None


def _count(value: object) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def _flag(value: object) -> bool:
    return type(value) is int and value in (0, 1)


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _epsilon(value: object) -> bool:
    return _number(value) and value >= 0  # type: ignore[operator]


def _activation(value: object) -> bool:
    return value in ACTIVATIONS


def _integers(count: int, least: int) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) == count
            and all(type(item) is int and least <= item < 1 << 31 for item in value)
        )

    return check


_PAIR, _PADDING = _integers(2, 1), _integers(4, 0)
_AFFINE = ("weight", "bias")
OPERATORS: Mapping[str, Operator] = {
    "conv2d": Operator(
        1,
        ("weight",),
        ("bias",),
        {"stride": _PAIR, "pad": _PADDING, "dilation": _PAIR, "groups": _count},
    ),
    "linear": Operator(1, ("weight",), ("bias",)),
    "group_norm": Operator(1, (), _AFFINE, {"groups": _count, "eps": _epsilon}),
    "batch_norm": Operator(1, ("mean", "var"), _AFFINE, {"eps": _epsilon}),
    "layer_norm": Operator(1, (), _AFFINE, {"dims": _count, "eps": _epsilon}),
    "max_pool": Operator(settings={"kernel": _PAIR, "stride": _PAIR, "pad": _PADDING, "dilation": _PAIR}),
    "avg_pool": Operator(settings={"kernel": _PAIR, "stride": _PAIR, "pad": _PADDING, "count_pad": _flag}),
    "adaptive_avg_pool": Operator(settings={"size": _PAIR}),
    "global_avg_pool": Operator(settings={"keep": _flag}),
    "activation": Operator(settings={"kind": _activation}),
    "add": Operator(2),
    "mul": Operator(2),
    "flatten": Operator(),
    "pad": Operator(settings={"pad": _PADDING}),
    "scale_shift": Operator(settings={"scale": _number, "shift": _number}),
}


@dataclass(frozen=True)
class Node:
    """One operator. ``inputs`` are numbers of values; ``name`` is for messages, e.g. "features.0"."""

    op: str
    name: str
    inputs: tuple[int, ...]
    tensors: tuple[tuple[str, str], ...] = ()  # (role, name of the tensor)
    settings: tuple[tuple[str, Setting], ...] = ()  # sorted by key

    def tensor(self, role: str) -> str | None:
        """The name of the tensor in that role, None where the node has none."""
        return dict(self.tensors).get(role)

    def setting(self, key: str) -> Any:
        return dict(self.settings)[key]

    def __str__(self) -> str:
        return f"node {self.name!r} ({self.op})"


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order, the shape of one input, and the loss of one sample.

    ``loss``: "cross-entropy" (float64 log-softmax of float32 logits (classes,), targets are class numbers)
    or "mse" (mean over a sample's outputs of the squared differences to its targets, in float64).
    Raises DataError, naming the node, for anything that no runtime could run.
    """

    input_shape: Shape
    nodes: tuple[Node, ...]
    loss: str = "cross-entropy"

    def __post_init__(self) -> None:
        if not _shape(self.input_shape):
            raise DataError(f"a graph's input has the shape {self.input_shape!r}")
        if not 1 <= len(self.nodes) <= MOST_NODES:
            raise DataError(f"a graph of {len(self.nodes)} nodes")
        if self.loss not in LOSSES:
            raise DataError(f"unknown loss {self.loss!r}: use {' or '.join(LOSSES)}")
        for number, node in enumerate(self.nodes):
            _check(node, number)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; ``from_dict`` is its inverse."""
        return {
            "input_shape": list(self.input_shape),
            "loss": self.loss,
            "nodes": [
                {
                    "op": node.op,
                    "name": node.name,
                    "inputs": list(node.inputs),
                    "tensors": dict(node.tensors),
                    "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in node.settings},
                }
                for node in self.nodes
            ],
        }

    @classmethod
    def from_dict(cls, data: object) -> Graph:
        """Of parsed JSON, of which nothing is believed. Raises DataError, naming node and operator."""
        fields = _fields(data, ("input_shape", "loss", "nodes"), "a graph")
        nodes, shape = fields["nodes"], fields["input_shape"]
        if not isinstance(nodes, list) or not isinstance(shape, list) or not isinstance(fields["loss"], str):
            raise DataError("a graph has an input_shape, a loss and a list of nodes")
        if len(nodes) > MOST_NODES:
            raise DataError(f"a graph of {len(nodes)} nodes")
        return cls(tuple(shape), tuple(_node(item, i) for i, item in enumerate(nodes)), fields["loss"])

    def shapes(self, tensors: Mapping[str, Shape]) -> tuple[Shape, ...]:
        """The shape of every value without the batch, the input's first.

        Checks the shapes of the tensors, by name, too. Raises DataError, naming the node.
        """
        found = [self.input_shape]
        for node in self.nodes:
            given = {}
            for role, name in node.tensors:
                if name not in tensors:
                    raise DataError(f"{node}: there is no tensor {name!r}")
                given[role] = tuple(tensors[name])
            shape = _SHAPES[node.op](node, [found[i] for i in node.inputs], given)
            if min(shape, default=1) < 1 or math.prod(shape) > _MOST:
                raise DataError(f"{node}: its result has the shape {shape}")
            found.append(shape)
        if self.loss == "cross-entropy" and len(found[-1]) != 1:
            raise DataError(f"{self.nodes[-1]}: logits have the shape (classes,), not {found[-1]}")
        return tuple(found)

    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that the nodes use, each once, in the order of first use."""
        return tuple(dict.fromkeys(name for node in self.nodes for _, name in node.tensors))


# -- reading -------------------------------------------------------------------------------------------


def _shape(value: object) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= 8 and all(map(_count, value))


def _fields(data: object, names: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != set(names):
        raise DataError(f"{what} has the fields {', '.join(names)}, and no other")
    return data


def _node(data: object, number: int) -> Node:
    fields = _fields(data, ("op", "name", "inputs", "tensors", "settings"), f"node {number}")
    op, name, inputs = fields["op"], fields["name"], fields["inputs"]
    tensors, settings = fields["tensors"], fields["settings"]
    if not (isinstance(op, str) and isinstance(name, str) and isinstance(inputs, list)):
        raise DataError(f"node {number}: op and name are texts, inputs a list of numbers")
    if not (isinstance(tensors, dict) and isinstance(settings, dict)):
        raise DataError(f"node {number} ({op[:40]}): tensors and settings are tables")
    return Node(
        op,
        name,
        tuple(inputs),
        tuple(sorted(tensors.items())),
        tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in settings.items())),
    )


def _check(node: Node, number: int) -> None:
    """Raises DataError unless the node is one of a known operator, whole and in its place."""
    if not (isinstance(node.name, str) and len(node.name) <= 300):
        raise DataError(f"node {number}: its name is a text of at most 300 letters")
    known = OPERATORS.get(node.op)
    if known is None:
        raise DataError(
            f"node {node.name!r}: the operator {node.op[:60]!r} is not covered: {', '.join(OPERATORS)}"
        )
    if len(node.inputs) != known.inputs:
        raise DataError(f"{node}: has {len(node.inputs)} inputs, {known.inputs} are needed")
    if not all(type(i) is int and 0 <= i <= number for i in node.inputs):
        raise DataError(f"{node}: its inputs {node.inputs} are not values made before it")
    roles = [role for role, _ in node.tensors]
    if not all(isinstance(name, str) for _, name in node.tensors) or len(set(roles)) != len(roles):
        raise DataError(f"{node}: a tensor's name is a text, and each role has one")
    if not set(known.required) <= set(roles) <= set(known.required + known.optional):
        raise DataError(f"{node}: has the tensors {', '.join(roles) or 'none'}, which is not what it takes")
    wanted = dict(known.settings or {})
    if node.op == "activation" and ("kind", "leaky_relu") in node.settings:
        wanted["slope"] = _number
    settings = dict(node.settings)
    if list(node.settings) != sorted(node.settings) or settings.keys() != wanted.keys():
        raise DataError(f"{node}: its settings are {', '.join(sorted(wanted)) or 'none'}, in that order")
    for key, check in wanted.items():
        if not check(settings[key]):
            raise DataError(f"{node}: {key} = {settings[key]!r} cannot be")


# -- shapes --------------------------------------------------------------------------------------------


def window_count(size: int, before: int, after: int, kernel: int, stride: int, dilation: int = 1) -> int:
    """How many windows fit along one side of ``size``; 0 or less where none does."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _need(node: Node, holds: bool, text: str) -> None:
    if not holds:
        raise DataError(f"{node}: {text}")


def _image(node: Node, shape: Shape) -> tuple[int, int, int]:
    _need(node, len(shape) == 3, f"takes images (channels, height, width), not {shape}")
    return shape[0], shape[1], shape[2]


def _vectors(node: Node, tensors: Mapping[str, Shape], wanted: Shape, *roles: str) -> None:
    for role in roles:
        given = tensors.get(role, wanted)
        _need(node, given == wanted, f"its {role} has the shape {given}, {wanted} is needed")


def _windows(node: Node, shape: Shape, kernel: tuple[int, int], dilation: tuple[int, int]) -> Shape:
    _, height, width = _image(node, shape)
    top, left, bottom, right = node.setting("pad")
    (sh, sw), (dh, dw) = node.setting("stride"), dilation
    return (
        window_count(height, top, bottom, kernel[0], sh, dh),
        window_count(width, left, right, kernel[1], sw, dw),
    )


def _conv2d(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    channels = _image(node, inputs[0])[0]
    weight, groups = tensors["weight"], node.setting("groups")
    _need(node, len(weight) == 4 and min(weight) >= 1, f"its weight has the shape {weight}")
    _need(
        node,
        channels == weight[1] * groups and weight[0] % groups == 0,
        f"{groups} groups and a weight {weight} do not fit {channels} channels",
    )
    _vectors(node, tensors, weight[:1], "bias")
    return weight[0], *_windows(node, inputs[0], (weight[2], weight[3]), node.setting("dilation"))


def _linear(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    weight = tensors["weight"]
    _need(
        node,
        len(weight) == 2 and inputs[0] == weight[1:] and weight[0] >= 1,
        f"a weight {weight} does not fit values of the shape {inputs[0]}",
    )
    _vectors(node, tensors, weight[:1], "bias")
    return weight[:1]


def _group_norm(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    channels, groups = inputs[0][0], node.setting("groups")
    _need(node, len(inputs[0]) in (1, 3), f"takes images or vectors, not {inputs[0]}")
    _need(node, channels % groups == 0, f"{groups} groups do not divide {channels} channels")
    _vectors(node, tensors, (channels,), *_AFFINE)
    return inputs[0]


def _batch_norm(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    _need(node, len(inputs[0]) in (1, 3), f"takes images or vectors, not {inputs[0]}")
    _vectors(node, tensors, inputs[0][:1], "mean", "var", *_AFFINE)
    return inputs[0]


def _layer_norm(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    dims = node.setting("dims")
    _need(node, dims <= len(inputs[0]), f"{dims} trailing dimensions of {inputs[0]}")
    _vectors(node, tensors, inputs[0][-dims:], *_AFFINE)
    return inputs[0]


def _pool(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    kernel, pad = node.setting("kernel"), node.setting("pad")
    dilation = node.setting("dilation") if node.op == "max_pool" else (1, 1)
    # A window of padding alone would have no largest value, and no mean.
    fits = all(p < k for p, k in zip(pad, kernel * 2, strict=True))
    _need(node, fits, f"pad {pad} is not smaller than the kernel {kernel}")
    return inputs[0][0], *_windows(node, inputs[0], kernel, dilation)


def _adaptive(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    return _image(node, inputs[0])[0], *node.setting("size")


def _global(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    channels = _image(node, inputs[0])[0]
    return (channels, 1, 1) if node.setting("keep") else (channels,)


def _same(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    return inputs[0]


def _two(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    a, b = inputs
    if len(a) == len(b) == 3 and a[0] == b[0] and (1, 1) in (a[1:], b[1:]):
        return max(a, b)
    _need(node, a == b, f"values of the shapes {a} and {b} do not go together")
    return a


def _flatten(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    return (math.prod(inputs[0]),)


def _pad(node: Node, inputs: list[Shape], tensors: Mapping[str, Shape]) -> Shape:
    channels, height, width = _image(node, inputs[0])
    top, left, bottom, right = node.setting("pad")
    return channels, height + top + bottom, width + left + right


_SHAPES: Mapping[str, Callable[[Node, list[Shape], Mapping[str, Shape]], Shape]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "max_pool": _pool,
    "avg_pool": _pool,
    "adaptive_avg_pool": _adaptive,
    "global_avg_pool": _global,
    "activation": _same,
    "add": _two,
    "mul": _two,
    "flatten": _flatten,
    "pad": _pad,
    "scale_shift": _same,
}


def last_uses(graph: Graph) -> tuple[int, ...]:
    """Of each value, the number of the last node that reads it; the output is read at the end."""
    last = [-1] * (len(graph.nodes) + 1)
    for number, node in enumerate(graph.nodes):
        for i in node.inputs:
            last[i] = number
    last[-1] = len(graph.nodes)
    return tuple(last)
