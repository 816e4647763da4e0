"""A torch module and its loss → a bundle: a graph for runtimes without torch, and an ONNX file.

The graph is read off the module (``runtimes.modules``), and the ONNX file is written from it; where the
module has an operator that graphs lack, ``torch.onnx`` makes the file. Neither is believed: both must give
the module's own losses, at its weights and beside them, before there is a bundle.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.func import functional_call

from baffle.bundle import MODEL, PREFIX, Bundle, frozen_digest
from baffle.errors import ConfigError, MissingExtraError
from baffle.export.agreement import Examining, check_equal
from baffle.export.onnx_writer import OPSET, write_models
from baffle.runtimes import Batch
from baffle.runtimes.graph import Graph
from baffle.runtimes.modules import UncoveredError, graph_of
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.objective import Loss
from baffle.runtimes.onnx import IMAGES, LOGITS, LOSSES, TARGETS, WEIGHT, OnnxRuntime
from baffle.runtimes.prefix import Prefix, split_frozen_prefix
from baffle.runtimes.torch import TorchRuntime, cross_entropy

_SAMPLES = 5
_FEATURES = "features"


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-sample mean (B,) of the squared differences of outputs and targets (B, ...), in float64."""
    return (outputs.double() - targets.double()).square().flatten(1).mean(dim=1)


def from_torch(
    module: nn.Module,
    loss: Loss = cross_entropy,
    *,
    input_shape: Sequence[int],
    name: str = "",
    classes: Sequence[str] | int | None = None,
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    targets: Tensor | None = None,
    onnx: bool = True,
) -> Bundle:
    """A bundle in memory of ``module`` as it is in eval mode; ``Bundle.write`` makes a folder of it.

    ``input_shape`` is that of one sample, ``scale`` and ``shift`` (C,) how pixels become inputs (default:
    they are inputs). ``classes`` are names, or how many; by default as many as there are outputs. ``loss``
    is ``cross_entropy``, ``mse`` or a function of your own, which only ONNX Runtime can run; ``targets``
    (B, ...) then are an example of what it takes. ``onnx=False`` makes no ONNX file, which needs onnx and
    onnxruntime; and without a graph onnxscript, and seconds.

    Where an operator is on no list, ``graph`` is None and ``missing`` names it. Raises ConfigError where
    nothing could run the bundle, and for a module that is not float32 or whose export computes other losses;
    MissingExtraError without the packages. The module is left as it was.
    """
    shape, name = tuple(input_shape), name or type(module).__name__
    quiet = _copied(module)
    _check_types(quiet)
    frozen = {n: p.detach() for n, p in quiet.named_parameters() if not p.requires_grad}
    frozen |= {n: b.detach() for n, b in quiet.named_buffers()}
    held = {n: _fixed(t) for n, t in frozen.items()}
    runtime = TorchRuntime(quiet, loss)
    kind = "cross-entropy" if loss is cross_entropy else "mse" if loss is mse else None
    graph: Graph | None = None
    missing = f"the loss {getattr(loss, '__name__', type(loss).__name__)}"
    if kind is not None:
        try:
            graph, missing = graph_of(_copied(quiet), shape, kind), ""
        except UncoveredError as error:
            missing = str(error)
    if graph is None and not onnx:
        raise ConfigError(f"{name}: {missing} is not covered, and without ONNX nothing could run it")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn((_SAMPLES, *shape), generator=generator)
    with torch.no_grad():
        outputs = _copied(quiet)(inputs)
    if not isinstance(outputs, Tensor) or len(outputs) != _SAMPLES:
        raise ConfigError(f"{name}: its output must be one tensor with a row a sample")
    if targets is None and kind == "mse":
        targets = torch.randn(outputs.shape, generator=generator)
    elif targets is None:
        targets = torch.randint(outputs.shape[-1], (_SAMPLES,), generator=generator)
    elif len(targets) < _SAMPLES:
        raise ConfigError(f"{name}: {_SAMPLES} example targets at least are needed")
    batch = Batch(inputs.numpy(), targets[:_SAMPLES].numpy())
    models: dict[str, bytes] = {}
    if onnx and graph is not None:
        models = write_models(graph, runtime.layout, runtime.weights(), held)
    elif onnx:
        models = _onnx_models(_copied(quiet), runtime, loss, inputs, targets[:_SAMPLES])
    channels = shape[0]
    bundle = Bundle(
        name=name,
        layout=runtime.layout,
        frozen=held,
        frozen_digest=frozen_digest(held),
        input_shape=shape,
        classes=_labels(classes, outputs.shape[-1]),
        scale=np.array(np.ones(channels) if scale is None else scale, np.float32),
        shift=np.array(np.zeros(channels) if shift is None else shift, np.float32),
        graph=graph,
        missing=missing,
        initial=runtime.weights(),
        models=models,
    )
    checked: list[Examining] = [] if graph is None else [NumpyRuntime(bundle)]
    for other in (*checked, *([OnnxRuntime(bundle)] if models else [])):
        check_equal(runtime, other, batch)
    return bundle


def _copied(module: nn.Module) -> nn.Module:
    """In eval mode, with the module's own parameters, and buffers that a forward may write to."""
    return copy.deepcopy(module, {id(t): t for t in module.parameters()}).eval()


def _check_types(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type != "cpu":
            raise ConfigError(f"{name} lies on {tensor.device}: move the module to the CPU")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ConfigError(f"{name} is {tensor.dtype}: bundles are of float32 modules (module.float())")


def _fixed(tensor: Tensor) -> NDArray[Any]:
    values: NDArray[Any] = tensor.contiguous().numpy().copy()
    values.flags.writeable = False
    return values


def _labels(classes: Sequence[str] | int | None, outputs: int) -> tuple[str, ...]:
    if classes is None or isinstance(classes, int):
        return tuple(map(str, range(outputs if classes is None else classes)))
    return tuple(classes)


# -- ONNX ----------------------------------------------------------------------------------------------


class _Loss(nn.Module):
    """A part of the module, and its loss, as a function of inputs, targets and the trainable tensors."""

    def __init__(self, part: nn.Module, loss: Loss, places: Mapping[str, int]) -> None:
        super().__init__()
        self.part, self.loss, self.places = part, loss, places

    def forward(self, x: Tensor, targets: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        values = {name: weights[place] for name, place in self.places.items()}
        outputs = functional_call(self.part, values, (x,), tie_weights=False)
        return self.loss(outputs, targets).double(), outputs


class _Before(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.part(x)[0]
        return features


def _onnx_models(
    module: nn.Module, runtime: TorchRuntime, loss: Loss, inputs: Tensor, targets: Tensor
) -> dict[str, bytes]:
    """model.onnx, and prefix.onnx where a frozen prefix ends in one tensor."""
    prefix: Prefix | None = split_frozen_prefix(module)
    models, part = {}, module
    if prefix is not None and prefix.cacheable:
        with torch.no_grad():
            (features,) = prefix.before(inputs)
        if len(features) == len(inputs) and features.dtype == torch.float32:
            models[PREFIX] = _exported(_Before(prefix.before), (inputs,), [IMAGES], [_FEATURES])
            part, inputs = prefix.after, features
    layout = runtime.layout
    trainable = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    inside = part.named_parameters(remove_duplicate=False)
    places = {own: layout.names.index(trainable[id(p)]) for own, p in inside if id(p) in trainable}
    weights = layout.split(torch.from_numpy(runtime.weights()))
    models[MODEL] = _exported(
        _Loss(part, loss, places),
        (inputs, targets, *weights),
        [IMAGES, TARGETS, *(WEIGHT + name for name in layout.names)],
        [LOSSES, LOGITS],
    )
    return models


def _exported(
    module: nn.Module, arguments: tuple[Tensor, ...], inputs: list[str], outputs: list[str]
) -> bytes:
    """An ONNX file with a batch of any size, and nothing in it of the machine that it was made on."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxscript", "export", "the export to ONNX") from error
    batch = torch.export.Dim("batch", min=1)
    many: list[Any] = [{0: batch} if name in (IMAGES, TARGETS) else {} for name in inputs]
    # A module that takes *weights sees them as one argument, a tuple.
    shapes = (*many[:2], tuple(many[2:])) if len(many) > 1 else tuple(many)
    try:
        with _silent():
            program = torch.onnx.export(
                module.eval(),
                tuple(a.detach() for a in arguments),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
            if program is None:
                raise ConfigError("torch.onnx made nothing")
            model = program.model_proto
    except Exception as error:  # torch.export raises many types, over many lines
        first = str(error).strip().split("\n")[0][:200]
        raise ConfigError(f"torch.onnx cannot export this module: {type(error).__name__}: {first}") from error
    return stripped(model)


def stripped(model: Any) -> bytes:
    """An ONNX model without what tools wrote into it: files, lines and stacks of whoever made it."""
    for part in _parts(model):
        for words in ("metadata_props", "doc_string"):
            part.ClearField(words)
    model.ClearField("producer_name")
    model.ClearField("producer_version")
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _parts(model: Any) -> Iterator[Any]:
    graph = model.graph
    yield from (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output)
    for function in model.functions:
        yield from (function, *function.node, *function.value_info)
    yield from graph.value_info


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's warnings, of its own code, and its lines about optional packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
