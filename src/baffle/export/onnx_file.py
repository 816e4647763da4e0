"""ONNX files while they become a bundle's: read without belief, weights made inputs, the loss appended.

Of a file nothing is believed: sizes are compared before anything is allocated, and tensors that lie in other
files are read from its own folder only.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.bundle import MODEL, PREFIX
from baffle.errors import ConfigError, DataError, MissingExtraError
from baffle.export.onnx_graph import Converted, convert
from baffle.perturbations import Layout
from baffle.runtimes.onnx import IMAGES, LOGITS, LOSSES, TARGETS, WEIGHT, session

_LEAST_OPSET = 11  # the first with GatherElements, which the loss is made of
_MOST_BYTES = 1 << 31  # what protobuf itself allows
_MOST_VALUES = 1 << 28  # of one value of the network, for one sample
_INNER = "n/"  # before each name of the file's own: so that ours are free
_FEATURES = "features"

# Inputs of nodes that are settings of an operator, not parameters of the network.
_SETTINGS: Mapping[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4),
    "Clip": (1, 2),
    "Dropout": (1, 2),
    "Pad": (1, 2, 3),
    "Pow": (1,),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
}


def package() -> Any:
    """The package onnx. Raises MissingExtraError without it."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "onnx", "an ONNX file") from error
    return onnx


# -- reading -------------------------------------------------------------------------------------------


def load(onnx: Any, path: Path) -> Any:
    """The model in a file, its tensors not looked at yet. Raises DataError for anything else."""
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path}: no plain file")
            if os.fstat(file.fileno()).st_size > _MOST_BYTES:
                raise DataError(f"{path}: more than {_MOST_BYTES} bytes, which no ONNX file has")
            data = file.read()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {_why(error)}") from error
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own types
        raise DataError(f"{path}: no ONNX file: {_why(error)}") from error
    if not model.graph.node:
        raise DataError(f"{path}: no ONNX file, or one without a network")
    return model


def _array(onnx: Any, path: Path, tensor: Any) -> NDArray[Any]:
    """An initializer's values; nothing is allocated that its bytes are not there for."""
    label = f"{path}: {tensor.name[:80]!r}"
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{label} has an unknown type {tensor.data_type}") from error
    dims = [int(size) for size in tensor.dims]
    if any(size < 0 for size in dims) or len(dims) > 16:
        raise DataError(f"{label} has the shape {dims}")
    if dtype.kind not in "fiub" or dtype.itemsize * 8 not in (8, 16, 32, 64):
        raise DataError(f"{label} is {dtype.name}: of such tensors there is no bundle")
    size = math.prod(dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raw = _external(path, tensor, size * dtype.itemsize)
    elif tensor.HasField("raw_data"):
        raw = tensor.raw_data
    else:
        try:
            stored = sum(
                len(getattr(tensor, key)) for key in ("float_data", "int32_data", "int64_data", "double_data")
            ) + len(tensor.uint64_data)
            if stored != size:
                raise DataError(f"{label} says {dims}, and holds {stored} values")
            return np.array(onnx.numpy_helper.to_array(tensor))
        except (TypeError, ValueError) as error:
            raise DataError(f"{label}: {_why(error)}") from error
    if len(raw) != size * dtype.itemsize:
        raise DataError(f"{label} says {dims} of {dtype.name}, and holds {len(raw)} bytes")
    return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype).reshape(dims)


def _external(path: Path, tensor: Any, size: int) -> bytes:
    """Bytes of a tensor in a file beside the model: one of its own folder, or of one inside that."""
    label = f"{path}: {tensor.name[:80]!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(size)))
    except ValueError as error:
        raise DataError(f"{label}: where its values lie is no number") from error
    folder = path.parent.resolve()
    odd = not location or "\0" in location or location.startswith(("/", "\\")) or ":" in location
    if odd or ".." in re.split(r"[/\\]", location):
        raise DataError(f"{label}: its values lie at {location[:80]!r}, which is not in the file's folder")
    file = folder / location
    if not file.resolve().is_relative_to(folder):
        raise DataError(f"{label}: its values lie at {location[:80]!r}, a link out of the file's folder")
    if length != size or offset < 0:
        raise DataError(f"{label}: {length} bytes from {offset} on are not {size} bytes of values")
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as data:
            held = os.fstat(data.fileno())
            if not stat.S_ISREG(held.st_mode) or held.st_size < offset + size:
                raise DataError(f"{label}: {location[:80]!r} has no {size} bytes from {offset} on")
            data.seek(offset)
            return data.read(size)
    except OSError as error:
        raise DataError(f"{label}: {location[:80]!r} cannot be read: {_why(error)}") from error


def _why(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(f"{text or type(error).__name__}".split())[:200]


# -- the network ---------------------------------------------------------------------------------------


class OnnxNetwork:
    """An ONNX model while it becomes a bundle's."""

    def __init__(self, onnx: Any, where: Path, model: Any, loss: str) -> None:
        self.onnx, self.where, self.model, self.graph = onnx, where, model, model.graph
        self.loss = loss
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
        if self.opset < _LEAST_OPSET:
            raise DataError(f"{where}: opset {self.opset}: {_LEAST_OPSET} at least is needed (convert it)")
        if self.graph.sparse_initializer or model.training_info:
            raise DataError(f"{where}: has sparse tensors or training information, which is not read")
        self._check_sizes()
        self._lift_constants()
        self.tensors = self._read_tensors()
        inputs = [value for value in self.graph.input if value.name not in self.tensors]
        if len(inputs) != 1 or len(self.graph.output) != 1:
            raise DataError(
                f"{where}: one input and one output are needed, it has {len(inputs)} and "
                f"{len(self.graph.output)}"
            )
        self.source, self.output = inputs[0], self.graph.output[0].name
        if self.source.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            raise DataError(f"{where}: its input {self.source.name[:80]!r} must be float32")
        makers = {name: node for node in self.graph.node for name in node.output}
        last = makers.get(self.output)
        if last is None:
            raise DataError(f"{where}: no node makes its output {self.output[:80]!r}")
        if loss == "cross-entropy" and last.op_type in ("Softmax", "LogSoftmax"):
            self.output = last.input[0]
        self._leave_out()

    def _check_sizes(self) -> None:
        """Refuses what takes gigabytes for one sample, before anything is run or folded into a constant."""
        try:
            inferred = self.onnx.shape_inference.infer_shapes(self.model, data_prop=True)
        except Exception as error:  # its own types, and protobuf's
            raise DataError(f"{self.where}: its shapes do not fit together: {_why(error)}") from error
        for value in inferred.graph.value_info:
            sizes = [max(1, int(dim.dim_value)) for dim in value.type.tensor_type.shape.dim]
            if math.prod(sizes) > _MOST_VALUES:
                raise DataError(f"{self.where}: {value.name[:80]!r} has the shape {sizes}: refused")

    def _lift_constants(self) -> None:
        """Constant nodes that hold a tensor are initializers by another name."""
        kept = []
        for node in self.graph.node:
            value = next((a for a in node.attribute if a.name == "value"), None)
            if node.op_type == "Constant" and value is not None:
                self.graph.initializer.append(value.t)
                self.graph.initializer[-1].name = node.output[0]
            else:
                kept.append(self.onnx.NodeProto.FromString(node.SerializeToString()))
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def _leave_out(self) -> None:
        """Nodes and tensors that the output does not depend on."""
        needed, kept = {self.output}, list[Any]()
        for node in reversed(list(self.graph.node)):
            if needed & set(node.output):
                needed |= _read_by(node)
                kept.append(self.onnx.NodeProto.FromString(node.SerializeToString()))
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        self.tensors = {name: array for name, array in self.tensors.items() if name in needed}

    def _read_tensors(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        for tensor in self.graph.initializer:
            if not tensor.name or tensor.name in found:
                raise DataError(
                    f"{self.where}: an initializer without a name of its own: {tensor.name[:80]!r}"
                )
            found[tensor.name] = _array(self.onnx, self.where, tensor)
            values = found[tensor.name]  # a single number may be the infinite limit of a clip
            if values.size > 1 and values.dtype.kind == "f" and not np.isfinite(values).all():
                raise DataError(f"{self.where}: {tensor.name[:80]!r} holds a NaN or an infinity")
        return found

    def input_shape(self, given: Sequence[int] | None) -> tuple[int, ...]:
        """Of one sample."""
        dims = self.source.type.tensor_type.shape.dim
        told = tuple(int(dim.dim_value) for dim in dims)[1:]
        shape = told if given is None else tuple(given)
        agree = len(shape) == len(told) and all(t in (0, s) for s, t in zip(shape, told, strict=True))
        if not 1 <= len(shape) <= 8 or not agree or min(shape) < 1 or math.prod(shape) > _MOST_VALUES:
            raise DataError(
                f"{self.where}: its input is (batch, {', '.join(str(t or '?') for t in told)}): say the "
                "shape of one sample where that leaves it open"
            )
        return shape

    def trainable(self, pattern: str) -> list[str]:
        """Names of the initializers that are trained, in the file's order."""
        floats = [name for name, array in self.tensors.items() if array.dtype == np.float32 and array.size]
        if pattern == "all":
            fixed = {
                name
                for node in self.graph.node
                for place, name in enumerate(node.input)
                if place in _SETTINGS.get(node.op_type, ())
            }
            reshaped = {node.output[0] for node in self.graph.node if node.op_type == "Reshape"}
            for node in self.graph.node:
                if node.op_type == "InstanceNormalization" and node.input[0] in reshaped:
                    fixed.update(node.input[1:])  # inside what exporters write for a group norm
            chosen = [name for name in floats if self.tensors[name].ndim and name not in fixed]
        else:
            try:
                wanted = re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"trainable = {pattern[:80]!r} is no regular expression: {error}"
                ) from error
            chosen = [name for name in floats if wanted.search(name)]
        if not chosen:
            raise ConfigError(
                f"{self.where}: no float32 initializer is trainable ({pattern[:80]!r}); it has "
                f"{', '.join(floats[:8]) or 'none'}"
            )
        self.chosen = chosen
        return chosen

    def open_batch(self) -> None:
        """Lets the batch have any size, in what the file says of its input."""
        dim = self.source.type.tensor_type.shape.dim[0]
        dim.Clear()
        dim.dim_param = "batch"

    def convert(self, shape: tuple[int, ...]) -> Converted:
        converted = convert(
            list(self.graph.node), self.tensors, self.source.name, self.output, shape, self.loss
        )
        graph = converted.graph
        if graph is not None and (unused := sorted(set(self.chosen) - set(graph.tensors()))):
            # Merged into the layer before as nothing: it would be trained in one runtime alone.
            self.chosen[:] = [name for name in self.chosen if name not in unused]
            if not self.chosen:
                raise ConfigError(f"{self.where}: the network does not depend on {unused[0]!r}")
        return converted

    def output_shape(self) -> tuple[int, ...]:
        """Of one sample, as ONNX Runtime gave it."""
        return tuple(self._outputs.shape[1:])

    def outputs(self, shape: tuple[int, ...]) -> int:
        """How many there are. Runs the file once, as it is, on one sample of zeros."""
        self._outputs = self.original(np.zeros((1, *shape), np.float32))
        if self._outputs.dtype != np.float32 or self._outputs.ndim < 2 or len(self._outputs) != 1:
            raise DataError(f"{self.where}: its output must be float32 (batch, ...)")
        if self.loss == "cross-entropy" and self._outputs.ndim != 2:
            raise DataError(f"{self.where}: its output is {self._outputs.shape}, not (batch, classes)")
        return int(self._outputs.shape[-1])

    def original(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """The file's own outputs, or what its last softmax takes."""
        model = self._copy(self.graph.node, [self.source], [self.output], self.tensors)
        whole = session(str(self.where), model.SerializeToString(), 1)
        try:
            (found,) = whole.run([self.output], {self.source.name: inputs})
        except Exception as error:
            raise DataError(f"{self.where}: ONNX Runtime cannot run it: {_why(error)}") from error
        return np.asarray(found)

    # -- the bundle's files -------------------------------------------------------------------------

    def models(self, layout: Layout, forms: Mapping[str, str]) -> dict[str, bytes]:
        """model.onnx, and prefix.onnx where what no parameter reaches ends in one value."""
        models, nodes, start = {}, list(self.graph.node), self.source
        moving = set(layout.names)
        reached = {self.source.name}
        for node in nodes:
            names = _read_by(node)
            if names & moving:
                moving.update(node.output)
            if names & reached:
                reached.update(node.output)
        before = [node for node in nodes if not moving & set(node.output)]
        after = [node for node in nodes if moving & set(node.output)]
        crossing = {name for node in after for name in _read_by(node)} & (reached - moving)
        if len(crossing) == 1 and crossing != {self.source.name}:
            (cut,) = crossing
            helper = self.onnx.helper
            end = helper.make_node("Identity", [cut], [_FEATURES])
            models[PREFIX] = self._file([*before, end], [self.source], [_FEATURES], {})
            start = helper.make_tensor_value_info(cut, self.onnx.TensorProto.FLOAT, None)
            # What depends on tensors alone belongs to both.
            nodes = [node for node in nodes if moving & set(node.output) or not reached & set(node.output)]
        models[MODEL] = self._file(nodes, [start], [], forms, layout)
        return models

    def _file(
        self,
        nodes: Sequence[Any],
        inputs: Sequence[Any],
        outputs: Sequence[str],
        forms: Mapping[str, str],
        layout: Layout | None = None,
    ) -> bytes:
        """An ONNX file; with a ``layout``, its tensors are inputs, and the loss is inside."""
        helper, proto = self.onnx.helper, self.onnx.TensorProto
        held = {n: a for n, a in self.tensors.items() if layout is None or n not in layout.names}
        model = self._copy(nodes, inputs, outputs, held)
        graph = model.graph
        _rename(graph, lambda name: _INNER + name)
        ours = [helper.make_node("Identity", [IMAGES], [graph.input[0].name])]
        graph.input[0].name = IMAGES
        if layout is None:
            ours_out = [helper.make_node("Identity", [_INNER + name], [name]) for name in outputs]
            for value, name in zip(graph.output, outputs, strict=True):
                value.name = name
        else:
            kind = proto.INT64 if self.loss == "cross-entropy" else proto.FLOAT
            shape = ["batch"] if self.loss == "cross-entropy" else ["batch", *self.output_shape()]
            graph.input.append(helper.make_tensor_value_info(TARGETS, kind, shape))
            for name, size in zip(layout.names, layout.shapes, strict=True):
                graph.input.append(helper.make_tensor_value_info(WEIGHT + name, proto.FLOAT, list(size)))
                ours += self._restored(graph, name, forms.get(name, "same"))
            ours_out = self._loss(graph, _INNER + self.output)
        own = [*ours, *graph.node, *ours_out]
        del graph.node[:]
        graph.node.extend(own)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def _restored(self, graph: Any, name: str, form: str) -> list[Any]:
        """A parameter as the file's nodes take it."""
        make, given, wanted = self.onnx.helper.make_node, WEIGHT + name, _INNER + name
        if form == "transposed":
            return [make("Transpose", [given], [wanted], perm=[1, 0])]
        if form == "vector":
            shape = np.array(self.tensors[name].shape, np.int64)
            graph.initializer.append(self.onnx.numpy_helper.from_array(shape, f"shape/{name}"))
            return [make("Reshape", [given, f"shape/{name}"], [wanted])]
        return [make("Identity", [given], [wanted])]

    def _loss(self, graph: Any, logits: str) -> list[Any]:
        """Per-sample losses in float64, of operators that mean the same in every opset from 11 on."""
        helper, proto, tensors = self.onnx.helper, self.onnx.TensorProto, self.onnx.numpy_helper
        make, double = helper.make_node, proto.DOUBLE
        graph.output.append(helper.make_tensor_value_info(LOSSES, double, ["batch"]))
        shape = ["batch", *self.output_shape()]
        graph.output.append(helper.make_tensor_value_info(LOGITS, proto.FLOAT, shape))
        for name, sizes in (("loss/column", [-1, 1]), ("loss/row", [-1])):
            graph.initializer.append(tensors.from_array(np.array(sizes, np.int64), name))
        nodes = [make("Identity", [logits], [LOGITS]), make("Cast", [logits], ["loss/wide"], to=double)]
        if self.loss == "cross-entropy":
            return [
                *nodes,
                make("LogSoftmax", ["loss/wide"], ["loss/logs"], axis=1),
                make("Reshape", [TARGETS, "loss/column"], ["loss/places"]),
                make("GatherElements", ["loss/logs", "loss/places"], ["loss/found"], axis=1),
                make("Reshape", ["loss/found", "loss/row"], ["loss/flat"]),
                make("Neg", ["loss/flat"], [LOSSES]),
            ]
        count = math.prod(self.output_shape())
        mean = tensors.from_array(np.full((count, 1), 1 / count), "loss/mean")
        graph.initializer.append(mean)
        return [
            *nodes,
            make("Cast", [TARGETS], ["loss/wanted"], to=double),
            make("Sub", ["loss/wide", "loss/wanted"], ["loss/difference"]),
            make("Mul", ["loss/difference", "loss/difference"], ["loss/squares"]),
            make("Flatten", ["loss/squares"], ["loss/rows"], axis=1),
            make("MatMul", ["loss/rows", "loss/mean"], ["loss/means"]),
            make("Reshape", ["loss/means", "loss/row"], [LOSSES]),
        ]

    def _copy(
        self, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Iterable[str], held: Mapping[str, Any]
    ) -> Any:
        """A model of these nodes, with those of the tensors that they read, and nothing else of the file."""
        helper, tensors = self.onnx.helper, self.onnx.numpy_helper
        used = {name for node in nodes for name in _read_by(node)}
        used.update(outputs)
        graph = helper.make_graph(
            nodes,
            "network",
            list(inputs),
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [tensors.from_array(array, name) for name, array in held.items() if name in used],
        )
        model = helper.make_model(graph, opset_imports=list(self.model.opset_import), producer_name="")
        model.functions.extend(self.model.functions)
        model.ir_version = max(4, min(self.model.ir_version, 10))
        for node in model.graph.node:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
        return model


def _inner_graphs(node: Any) -> list[Any]:
    return [g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]


def _read_by(node: Any) -> set[str]:
    """Names that a node reads, in its inner graphs too."""
    names = {name for name in node.input if name}
    for graph in _inner_graphs(node):
        names.update(name for inner in graph.node for name in _read_by(inner))
        names.update(value.name for value in graph.output)
    return names


def _rename(graph: Any, new: Callable[[str], str]) -> None:
    """Gives every value of a graph, and of those inside it, another name."""
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = new(value.name)
    for node in graph.node:
        node.input[:] = [new(name) if name else "" for name in node.input]
        node.output[:] = [new(name) if name else "" for name in node.output]
        for inner in _inner_graphs(node):
            _rename(inner, new)
