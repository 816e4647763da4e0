"""A graph written as an ONNX network, its tensors initializers: in milliseconds, and without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.export.onnx_file import OnnxNetwork, package
from baffle.perturbations import Layout
from baffle.runtimes.graph import Graph, Node

OPSET = 20  # the first with Gelu; ONNX Runtime reads it from 1.17 on
_INPUT = "x"


def write_models(
    graph: Graph, layout: Layout, weights: NDArray[np.float32], frozen: Mapping[str, NDArray[Any]]
) -> dict[str, bytes]:
    """The ONNX files of a bundle of this graph. Raises MissingExtraError without onnx and onnxruntime."""
    onnx = package()
    tensors = dict(zip(layout.names, layout.split(weights), strict=True))
    tensors.update({name: frozen[name] for name in graph.tensors() if name in frozen})
    network = OnnxNetwork(onnx, Path("graph"), _Writing(onnx, graph, tensors).model(), graph.loss)
    network.outputs(graph.input_shape)
    return network.models(layout, {})


class _Writing:
    def __init__(self, onnx: Any, graph: Graph, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.onnx, self.graph, self.tensors = onnx, graph, dict(tensors)
        self.shapes = graph.shapes({name: values.shape for name, values in tensors.items()})
        self.nodes = list[Any]()
        self._count = 0

    def model(self) -> Any:
        helper, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        for i, node in enumerate(self.graph.nodes, start=1):
            _WRITERS[node.op](self, node, [_value(source) for source in node.inputs], i)
        ends = [
            helper.make_tensor_value_info(_value(i), kind, ["batch", *self.shapes[i]])
            for i in (0, len(self.graph.nodes))
        ]
        initializers = [
            self.onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
            for name, values in self.tensors.items()
        ]
        graph = helper.make_graph(self.nodes, "network", ends[:1], ends[1:], initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)

    def constant(self, values: Any) -> str:
        self._count += 1
        name = f"constant/{self._count}"
        self.tensors[name] = np.asarray(values)
        return name

    def single(self, op: str, inputs: Sequence[str], result: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [result], **attributes))
        return result

    def step(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A value between two of the graph's own."""
        self._count += 1
        return self.single(op, inputs, f"between/{self._count}", **attributes)

    def named(self, node: Node, role: str, size: int, otherwise: float) -> str:
        """A node's tensor, or as many equal numbers where it has none."""
        return node.tensor(role) or self.constant(np.full(size, otherwise, np.float32))


def _value(i: int) -> str:
    return f"value/{i}" if i else _INPUT


def _conv(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    names = [name for role in ("weight", "bias") if (name := node.tensor(role))]
    attributes = {
        "strides": node.setting("stride"),
        "pads": node.setting("pad"),
        "dilations": node.setting("dilation"),
        "group": node.setting("groups"),
        "kernel_shape": w.tensors[names[0]].shape[2:],
    }
    w.single("Conv", [*inputs, *names], _value(i), **attributes)


def _linear(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    names = [name for role in ("weight", "bias") if (name := node.tensor(role))]
    w.single("Gemm", [*inputs, *names], _value(i), transB=1)


def _group_norm(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    """By the norm of an instance, whose channels are the groups."""
    shape, groups = w.shapes[node.inputs[0]], node.setting("groups")
    grouped = w.step("Reshape", [*inputs, w.constant(np.array([0, groups, -1]))])
    ones, zeros = w.constant(np.ones(groups, np.float32)), w.constant(np.zeros(groups, np.float32))
    normed = w.step("InstanceNormalization", [grouped, ones, zeros], epsilon=node.setting("eps"))
    affine = [(op, name) for op, role in (("Mul", "weight"), ("Add", "bias")) if (name := node.tensor(role))]
    back = [normed, w.constant(np.array([0, *shape]))]
    if not affine:
        w.single("Reshape", back, _value(i))
        return
    at = w.step("Reshape", back)
    sides = w.constant(np.array([shape[0], *[1] * (len(shape) - 1)]))
    for op, name in affine[:-1]:
        at = w.step(op, [at, w.step("Reshape", [name, sides])])
    op, name = affine[-1]
    w.single(op, [at, w.step("Reshape", [name, sides])], _value(i))


def _batch_norm(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    channels = w.shapes[i][0]
    affine = [w.named(node, "weight", channels, 1), w.named(node, "bias", channels, 0)]
    statistics = [w.named(node, "mean", channels, 0), w.named(node, "var", channels, 1)]
    w.single("BatchNormalization", [*inputs, *affine, *statistics], _value(i), epsilon=node.setting("eps"))


def _layer_norm(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    dims = node.setting("dims")
    scale = node.tensor("weight") or w.constant(np.ones(w.shapes[i][-dims:], np.float32))
    bias = [name] if (name := node.tensor("bias")) else []
    settings = {"axis": -dims, "epsilon": node.setting("eps")}
    w.single("LayerNormalization", [*inputs, scale, *bias], _value(i), **settings)


def _max_pool(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    w.single("MaxPool", inputs, _value(i), dilations=node.setting("dilation"), **_window(node))


def _avg_pool(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    w.single("AveragePool", inputs, _value(i), count_include_pad=node.setting("count_pad"), **_window(node))


def _window(node: Node) -> dict[str, Any]:
    return {name: node.setting(key) for name, key in _WINDOW.items()}


_WINDOW = {"kernel_shape": "kernel", "strides": "stride", "pads": "pad"}


def _adaptive(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    """A mean over bins that may overlap: one product by rows, one by columns."""
    before, after = w.shapes[node.inputs[0]][1:], w.shapes[i][1:]
    rows, columns = (_bins(a, b) for a, b in zip(before, after, strict=True))
    at = w.step("MatMul", [w.constant(rows), *inputs])
    w.single("MatMul", [at, w.constant(np.ascontiguousarray(columns.T))], _value(i))


def _bins(before: int, after: int) -> NDArray[np.float32]:
    """Weights (after, before): bin i takes [⌊i·before/after⌋, ⌈(i + 1)·before/after⌉), each alike."""
    rows = np.zeros((after, before))
    for i in range(after):
        start, stop = i * before // after, -(-(i + 1) * before // after)
        rows[i, start:stop] = 1 / (stop - start)
    return rows.astype(np.float32)


def _global_pool(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    if node.setting("keep"):
        w.single("GlobalAveragePool", inputs, _value(i))
    else:
        w.single("Flatten", [w.step("GlobalAveragePool", inputs)], _value(i), axis=1)


def _activation(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    kind = node.setting("kind")
    if kind == "relu6":
        ends = [w.constant(np.float32(0)), w.constant(np.float32(6))]
        w.single("Clip", [*inputs, *ends], _value(i))
    elif kind == "silu":
        w.single("Mul", [*inputs, w.step("Sigmoid", inputs)], _value(i))
    elif kind == "hardsigmoid":
        w.single("HardSigmoid", inputs, _value(i), alpha=1 / 6, beta=0.5)
    elif kind == "leaky_relu":
        w.single("LeakyRelu", inputs, _value(i), alpha=node.setting("slope"))
    else:
        w.single(_PLAIN[kind], inputs, _value(i))


_PLAIN = {
    "relu": "Relu",
    "hardswish": "HardSwish",
    "sigmoid": "Sigmoid",
    "gelu": "Gelu",
    "selu": "Selu",
    "elu": "Elu",
    "tanh": "Tanh",
    "identity": "Identity",
}


def _scale_shift(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    scaled = w.step("Mul", [*inputs, w.constant(np.float32(node.setting("scale")))])
    w.single("Add", [scaled, w.constant(np.float32(node.setting("shift")))], _value(i))


def _pad(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
    top, left, bottom, right = node.setting("pad")
    w.single("Pad", [*inputs, w.constant(np.array([0, 0, top, left, 0, 0, bottom, right]))], _value(i))


def _plain(op: str, **attributes: Any) -> Callable[[_Writing, Node, list[str], int], None]:
    def write(w: _Writing, node: Node, inputs: list[str], i: int) -> None:
        w.single(op, inputs, _value(i), **attributes)

    return write


_WRITERS: Mapping[str, Callable[[_Writing, Node, list[str], int], None]] = {
    "conv2d": _conv,
    "linear": _linear,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive,
    "global_avg_pool": _global_pool,
    "activation": _activation,
    "add": _plain("Add"),
    "mul": _plain("Mul"),
    "flatten": _plain("Flatten", axis=1),
    "pad": _pad,
    "scale_shift": _scale_shift,
}
