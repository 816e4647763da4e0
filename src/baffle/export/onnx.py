"""An ONNX file of any making → a bundle: its float initializers are what is trained.

The file needs no code of its authors and no torch. Initializers become inputs, the loss is appended, and
where all operators are covered the network is read as a graph too. The bundle must give the file's own
outputs, and the graph those of ONNX Runtime.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from baffle.bundle import Bundle, frozen_digest
from baffle.errors import ConfigError
from baffle.export.agreement import check_equal
from baffle.export.onnx_file import OnnxNetwork, load, package
from baffle.perturbations import Gaussian, Layout
from baffle.runtimes import Batch
from baffle.runtimes.graph import LOSSES
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.onnx import OnnxRuntime
from baffle.stream import Stream, seed_from

_SAMPLES = 3


def from_onnx(
    path: str | os.PathLike[str],
    *,
    loss: str = "cross-entropy",
    trainable: str = "all",
    name: str = "",
    classes: Sequence[str] | None = None,
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    input_shape: Sequence[int] | None = None,
) -> Bundle:
    """A bundle in memory of an ONNX file with one float32 input (B, ...) and one output (B, classes).

    ``loss``: "cross-entropy" of logits (a softmax at the end is left out) or "mse". ``trainable``: a regular
    expression that an initializer's name must match somewhere, or "all": every float32 initializer that is
    no operator's setting (limits of a clip, running statistics of a batch norm), nor a single number. The
    rest is frozen. ``input_shape`` is that of one sample, where the file leaves it open.

    Raises DataError for a file that is missing, malformed, hostile, or of another kind; ConfigError where
    no initializer is trainable, and where the graph computes other losses than ONNX Runtime.
    """
    onnx = package()
    if loss not in LOSSES:
        raise ConfigError(f"unknown loss {loss!r}: use {' or '.join(LOSSES)}")
    where = Path(path)
    model = load(onnx, where)
    network = OnnxNetwork(onnx, where, model, loss)
    shape = network.input_shape(input_shape)
    chosen = network.trainable(trainable)
    network.open_batch()
    converted = network.convert(shape)
    tensors, forms = network.tensors, converted.forms
    values = {tensor: _formed(array, forms.get(tensor, "same")) for tensor, array in tensors.items()}
    layout = Layout(tuple(chosen), tuple(values[tensor].shape for tensor in chosen))
    frozen = {tensor: array for tensor, array in values.items() if tensor not in chosen}
    for array in frozen.values():
        array.flags.writeable = False
    outputs = network.outputs(shape)
    channels = shape[0]
    bundle = Bundle(
        name=name or where.stem,
        layout=layout,
        frozen=frozen,
        frozen_digest=frozen_digest(frozen),
        input_shape=shape,
        classes=tuple(map(str, range(outputs))) if classes is None else tuple(classes),
        scale=np.array(np.ones(channels) if scale is None else scale, np.float32),
        shift=np.array(np.zeros(channels) if shift is None else shift, np.float32),
        graph=converted.graph,
        missing=converted.missing,
        initial=np.concatenate([values[tensor].reshape(-1) for tensor in chosen]),
        models=network.models(layout, forms),
    )
    _check(bundle, network, outputs, loss)
    return bundle


def _formed(array: NDArray[Any], form: str) -> NDArray[Any]:
    made = array.T if form == "transposed" else array.reshape(-1) if form == "vector" else array
    return np.array(made, order="C")


def _check(bundle: Bundle, network: OnnxNetwork, outputs: int, loss: str) -> None:
    """The bundle against the file as it was, and against the graph."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((_SAMPLES, *bundle.input_shape)).astype(np.float32)
    runtime = OnnxRuntime(bundle)
    targets: NDArray[Any] = rng.integers(0, outputs, _SAMPLES)
    if loss == "mse":
        targets = rng.standard_normal((_SAMPLES, *network.output_shape())).astype(np.float32)
    batch = Batch(inputs, targets)
    wanted = network.original(inputs[:1])
    got = runtime.outputs(bundle.weights(), Batch(inputs[:1], targets[:1]))
    if not np.allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(np.abs(wanted).max(initial=1))):
        raise ConfigError(f"{network.where}: its weights as inputs give other outputs than the file itself")
    # A network that takes one sample only, or mixes them, fails here.
    runtime.example_losses(bundle.weights(), batch, Stream(seed_from(0), 0), Gaussian(), range(1), 0.0)
    if bundle.graph is not None:
        check_equal(runtime, NumpyRuntime(bundle), batch)
