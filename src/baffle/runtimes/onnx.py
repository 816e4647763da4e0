"""ONNX Runtime: losses of a bundle's ONNX file, whose weights are inputs and whose loss is inside.

Any network that ONNX has, at the speed of an inference engine, without torch. Each direction writes
W + scale·z_k into the one array that the session reads; samples go through in micro-batches. The file is
scanned before ONNX Runtime sees it: it may not name another file for its tensors to be read from.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baffle.bundle import MODEL, PREFIX, Bundle
from baffle.errors import ConfigError, DataError, MissingExtraError
from baffle.perturbations import Layout, Perturbation
from baffle.runtimes import Batch, check_sigma
from baffle.runtimes.sources import CHUNK, Source
from baffle.stream import Stream

#: Names in the file: inputs, outputs, and what stands before a trainable tensor's name.
IMAGES, TARGETS, LOSSES, LOGITS, WEIGHT = "images", "targets", "losses", "logits", "W:"
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(double)": np.float64}
_LIVE = 1 << 17  # floats of a micro-batch's largest value: half a megabyte stays in a core's own cache


class OnnxRuntime:
    """Losses of a bundle by ONNX Runtime: a ``Runtime``, with the losses of each example.

    ``micro_batch`` samples go through at once (default: as many as suit a core's cache, by the bundle's
    graph); no choice changes a loss by more than rounding, and a network that mixes samples runs whole.
    ``threads`` compute one forward pass. uint8 inputs are normalised a micro-batch at a time, by
    ``normalise`` (scale, shift) or as the bundle says.

    Raises MissingExtraError without onnxruntime, ConfigError where the bundle has no ONNX file, DataError
    for a file that is not one of this bundle. Memory: the frozen tensors, 4n bytes for W + scale·z_k, and
    the activations of a micro-batch.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        micro_batch: int | None = None,
        threads: int = 1,
        normalise: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro-batch = {micro_batch}: at least 1 is needed")
        if threads < 1:
            raise ConfigError(f"threads = {threads}: at least 1 is needed")
        self.bundle, self.micro_batch = bundle, micro_batch or _micro_batch(bundle)
        self._scale, self._shift = normalise or (bundle.scale, bundle.shift)
        where = bundle.name if bundle.folder is None else str(bundle.folder)
        model = bundle.onnx_bytes(MODEL)
        if model is None:
            raise ConfigError(f"{where}: has no {MODEL}: export it with one, or use the numpy runtime")
        prefix = bundle.onnx_bytes(PREFIX)
        self._session = session(f"{where}/{MODEL}", model, threads)
        self._prefix = None if prefix is None else session(f"{where}/{PREFIX}", prefix, threads)
        del model, prefix
        self._targets = self._checked(f"{where}/{MODEL}")
        # What the session reads W + scale·z_k from; its values share this array's memory.
        self._point = np.empty(bundle.layout.n, np.float32)
        import onnxruntime

        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._weights = {
            WEIGHT + name: self._value(values)
            for name, values in zip(bundle.layout.names, bundle.layout.split(self._point), strict=True)
        }
        self._apart: bool | None = True if bundle.graph is not None else None  # whether samples do not mix
        self._held: tuple[Batch, NDArray[np.generic]] | None = None

    @property
    def layout(self) -> Layout:
        return self.bundle.layout

    @property
    def frozen_digest(self) -> bytes:
        return self.bundle.frozen_digest

    @property
    def arithmetic(self) -> str:
        return "float32"

    def weights(self) -> NDArray[np.float32]:
        return self.bundle.weights()

    def check_sigma(self, sigma: float) -> None:
        check_sigma(sigma, self.arithmetic)

    # -- losses -------------------------------------------------------------------------------------

    def loss(self, weights: Source, batch: Batch) -> float:
        self._look(weights, batch)
        self._perturb(weights, None, None, 0, 0.0)
        return float(self._run(batch).mean())

    def losses(
        self,
        weights: Source,
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        out = np.empty(len(directions))
        for i, row in enumerate(self._rows(weights, batch, stream, perturbation, directions, scale)):
            out[i] = row.mean()
        return out

    def example_losses(
        self,
        weights: Source,
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        self._look(weights, batch)
        if self._apart is False and len(directions):
            raise ConfigError(
                f"{self.bundle.name} mixes the samples of a batch, so that none has a loss of its own, as "
                "the privacy of an example needs it"
            )
        out = np.empty((len(directions), len(batch.targets)))
        for i, row in enumerate(self._rows(weights, batch, stream, perturbation, directions, scale)):
            out[i] = row
        return out

    def outputs(self, weights: Source, batch: Batch) -> NDArray[np.float32]:
        """The network's outputs (B, classes). Cost: one forward pass."""
        self._look(weights, batch)
        self._perturb(weights, None, None, 0, 0.0)
        logits: NDArray[np.float32] = self._run(batch, LOGITS)
        return logits

    @property
    def has_frozen_prefix(self) -> bool:
        """True where what no parameter reaches is a file of its own."""
        return self._prefix is not None

    def prefixed(self, batch: Batch) -> Batch:
        """The batch after the frozen prefix, to be cached once for data without augmentation.

        Raises ConfigError where there is none. Cost: one pass of the prefix.
        """
        if self._prefix is None:
            raise ConfigError("this bundle has no frozen prefix whose result could be cached")
        if batch.prefixed:
            return batch
        parts = [
            _call(self._prefix, {IMAGES: self._value(part)}, [_only_output(self._prefix)])[0]
            for part in self._parts(batch.inputs)
        ]
        return Batch(np.concatenate(parts), batch.targets, prefixed=True)

    @contextlib.contextmanager
    def holding(self, batch: Batch) -> Iterator[None]:
        """Inside, the frozen prefix of ``batch`` is computed once."""
        before = self._held
        self._held = batch, self._features(batch)
        try:
            yield
        finally:
            self._held = before

    # -- inside -------------------------------------------------------------------------------------

    def _rows(
        self,
        weights: Source,
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> Iterator[NDArray[np.float64]]:
        """Losses (B,) of each direction."""
        self._look(weights, batch)
        held = self._held is not None and self._held[0] is batch
        with contextlib.nullcontext() if held else self.holding(batch):
            for k in directions:
                self._perturb(weights, stream, perturbation, k, scale)
                yield self._run(batch)

    def _check_weights(self, weights: Source) -> None:
        if weights.shape != self._point.shape:
            raise ConfigError(f"weights have the shape {weights.shape}, this model has n = {self.layout.n}")

    def _perturb(
        self, weights: Source, stream: Stream | None, perturbation: Perturbation | None, k: int, scale: float
    ) -> None:
        """Writes W + scale·z_k, or W, to where the session reads it."""
        self._check_weights(weights)
        n = self.layout.n
        for at in range(0, n, CHUNK):
            end = min(at + CHUNK, n)
            place = self._point[at:end]
            if stream is None or perturbation is None or scale == 0:
                place[:] = weights[at:end]
            else:
                z = perturbation.values(stream, k, self.layout, at, end)
                np.multiply(z, np.float32(scale), out=place)
                place += weights[at:end]

    def _features(self, batch: Batch) -> NDArray[np.generic]:
        if self._held is not None and self._held[0] is batch:
            return self._held[1]
        if batch.prefixed and self._prefix is None:
            raise ConfigError("a batch behind a frozen prefix was given to a bundle that has none")
        return batch.inputs if self._prefix is None else self.prefixed(batch).inputs

    def _parts(self, inputs: NDArray[np.generic], most: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Micro-batches as the network takes them."""
        size = most or self.micro_batch
        for at in range(0, len(inputs), size):
            part = inputs[at : at + size]
            floats = np.ascontiguousarray(part, np.float32)
            if part.dtype == np.uint8:
                channels = (-1, *[1] * (part.ndim - 2))
                floats *= self._scale.reshape(channels)
                floats += self._shift.reshape(channels)
            yield floats

    def _run(self, batch: Batch, wanted: str = LOSSES, most: int | None = None) -> NDArray[Any]:
        """One output for all samples at the weights as they are now."""
        targets, at, found = batch.targets, 0, []
        if not len(targets):
            raise ConfigError("a batch without samples has no loss")
        if self._targets is np.int64 and targets.min() < 0:  # which ONNX would count from the end
            raise ConfigError(f"a label is {targets.min()}: there is no such class")
        if self._apart is False:
            most = len(targets)
        for part in self._parts(self._features(batch), most):
            own = np.ascontiguousarray(targets[at : at + len(part)], self._targets)
            feeds = {IMAGES: self._value(part), TARGETS: self._value(own), **self._weights}
            found.append(_call(self._session, feeds, [wanted])[0])
            at += len(part)
        return np.concatenate(found)

    def _look(self, weights: Source, batch: Batch) -> None:
        """Finds out, once, whether the network mixes samples, which then must not be parted.

        A graph's operators do not. Any other file is measured: a batch together, and one by one.
        """
        self._check_weights(weights)
        if self._apart is None and len(batch.targets) > 1:
            self._perturb(weights, None, None, 0, 0.0)
            together, alone = (self._run(batch, most=most) for most in (len(batch.targets), 1))
            self._apart = bool(np.allclose(together, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).mean()))

    def _checked(self, where: str) -> Any:
        """The type of targets. Raises DataError where the file's inputs and outputs are not this bundle's."""
        layout = self.bundle.layout
        weights = {
            WEIGHT + name: list(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)
        }
        given = {i.name: i for i in self._session.get_inputs()}
        wanted = {IMAGES, TARGETS, *weights}
        if given.keys() != wanted:
            odd = sorted(given.keys() ^ wanted)[0][:80]
            raise DataError(f"{where}: its inputs are not {IMAGES}, {TARGETS} and the parameters: {odd!r}")
        for name, shape in weights.items():
            if given[name].shape != shape or given[name].type != "tensor(float)":
                raise DataError(
                    f"{where}: {name[:80]} is {given[name].type} {given[name].shape}, not {shape}"
                )
        outputs = {o.name: o.type for o in self._session.get_outputs()}
        if outputs.get(LOSSES) != "tensor(double)" or outputs.get(LOGITS) != "tensor(float)":
            raise DataError(f"{where}: its outputs must be {LOSSES} in float64 and {LOGITS} in float32")
        kind = _TYPES.get(given[TARGETS].type)
        if kind is None or given[IMAGES].type != "tensor(float)":
            raise DataError(f"{where}: {IMAGES} must be float32, {TARGETS} int64 or float")
        return kind


def _micro_batch(bundle: Bundle) -> int:
    """Samples whose largest value suits a core's cache; without a graph, by the size of a sample."""
    if bundle.graph is None:
        largest = 16 * math.prod(bundle.input_shape)
    else:
        tensors = dict(zip(bundle.layout.names, bundle.layout.shapes, strict=True))
        tensors |= {name: values.shape for name, values in bundle.frozen.items()}
        largest = max(math.prod(shape) for shape in bundle.graph.shapes(tensors))
    return max(1, _LIVE // largest)


def session(where: str, model: bytes, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "the onnx runtime") from error
    check_file(where, model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Measured on LeNet, WRN-10-2, MobileNetV2: the arena is quicker, and smaller since it tears no holes into
    # the heap; planning ahead for each size of batch is not.
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # what goes wrong is raised
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types, which have no common one
        raise DataError(f"{where}: ONNX Runtime refuses it: {_why(error)}") from error


def _call(session: Any, feeds: dict[str, Any], wanted: list[str]) -> list[NDArray[Any]]:
    try:
        return [value.numpy() for value in session.run_with_ort_values(wanted, feeds)]
    except Exception as error:  # shapes that do not fit, labels out of range
        raise ConfigError(f"ONNX Runtime cannot run this batch: {_why(error)}") from error


def _only_output(session: Any) -> str:
    name: str = session.get_outputs()[0].name
    return name


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# -- what a file may name ------------------------------------------------------------------------------

# Of each message in onnx.proto: its fields that hold messages, and which these are.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL = {13, 14}  # of a tensor: where its data lie, and that they lie elsewhere
_DEPTH = 64


def check_file(where: str, model: bytes) -> None:
    """Raises DataError for bytes that are no ONNX file, or one that reads tensors from other files.

    Without the package onnx, which a device need not have. Nothing is copied: values are stepped over.
    """
    _walk(where, memoryview(model), "model", 0)


def _walk(where: str, data: memoryview, kind: str, depth: int) -> None:
    if depth > _DEPTH:
        raise DataError(f"{where}: no ONNX file: its parts are nested too deeply")
    inside, at = _INSIDE[kind], 0
    while at < len(data):
        key, at = _varint(where, data, at)
        field, wire = key >> 3, key & 7
        if kind == "tensor" and field in _EXTERNAL:
            value, _ = _varint(where, data, at)
            if field == 13 or value != 0:
                raise DataError(f"{where}: reads tensors from another file: refused")
        if wire == 2:
            size, at = _varint(where, data, at)
            if size > len(data) - at:
                raise DataError(f"{where}: no ONNX file: it ends early")
            if field in inside:
                _walk(where, data[at : at + size], inside[field], depth + 1)
            at += size
        elif wire == 0:
            _, at = _varint(where, data, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise DataError(f"{where}: no ONNX file")
    if at != len(data):
        raise DataError(f"{where}: no ONNX file: it ends early")


def _varint(where: str, data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise DataError(f"{where}: no ONNX file: it ends early")
