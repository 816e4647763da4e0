"""ONNX files of other makings: trained without their authors' code; read as graphs; hostile ones refused."""

from __future__ import annotations

import os
import re
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from baffle import data, models
from baffle.bundle import MODEL, PREFIX, Bundle
from baffle.client import Client
from baffle.errors import BaffleError, ConfigError, DataError
from baffle.estimator import SteinEstimator
from baffle.export.onnx import from_onnx
from baffle.runtimes import Batch
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.onnx import OnnxRuntime
from baffle.runtimes.torch import TorchRuntime
from baffle.server import Server
from baffle.simulation import simulate

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
make = onnx.helper.make_node
RNG = np.random.default_rng(5)


def values(*shape: int, scale: float = 0.5) -> NDArray[np.float32]:
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def model_of(
    nodes: list[Any],
    tensors: dict[str, NDArray[Any]],
    shape: tuple[Any, ...] = ("n", 2, 6, 6),
    classes: tuple[Any, ...] = ("n", 3),
    opset: int = 17,
) -> Any:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", FLOAT, shape)],
        [info("y", FLOAT, classes)],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def saved(path: Path, model: Any) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


K, CONV, ACT, POOL = {"k": values(2, 2, 3, 3)}, ["conv2d"], ["activation"], ["max_pool"]
HEAD = [
    make("GlobalAveragePool", ["f"], ["p"]),
    make("Flatten", ["p"], ["q"]),
    make("Gemm", ["q", "w", "b"], ["y"]),
]


def headed(nodes: list[Any], tensors: dict[str, NDArray[Any]], channels: int = 2, **options: Any) -> Any:
    """Nodes from x to f, images of ``channels``, and a head of three classes behind them."""
    return model_of([*nodes, *HEAD], {**tensors, "w": values(channels, 3), "b": values(3)}, **options)


def outputs(model: Any, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return result


# --- training --------------------------------------------------------------------------------------


def test_a_network_that_torch_never_saw_is_trained(tmp_path: Path):
    """Made by hand, trained forward-only by two clients with ONNX Runtime: digits from 10 % to above 80 %."""
    rng = np.random.default_rng(0)

    def start(*shape: int) -> NDArray[np.float32]:
        spread = 1 / np.sqrt(np.prod(shape[1:]) if len(shape) == 4 else shape[0])
        return (spread * rng.standard_normal(shape)).astype(np.float32)

    nodes = [
        make("Conv", ["image", "k1", "c1"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        make("HardSwish", ["a"], ["b"]),
        make("Flatten", ["b"], ["c"]),
        make("MatMul", ["c", "m"], ["d"]),
        make("Add", ["d", "o"], ["y"]),
    ]
    tensors = {
        "k1": start(8, 1, 3, 3),
        "c1": np.zeros(8, np.float32),
        "m": start(128, 10),
        "o": np.zeros(10, np.float32),
    }
    model = model_of(nodes, tensors, ("n", 1, 8, 8), ("n", 10))
    model.graph.input[0].name = "image"
    train, test = data.load("digits", None)
    bundle = from_onnx(saved(tmp_path / "net.onnx", model), scale=train.scale, shift=train.shift)
    assert bundle.layout.names == ("k1", "c1", "m", "o")
    bundle = bundle.write(tmp_path / "bundle")
    parts = data.iid(len(train), 2, 0)
    clients = [Client(f"c{i}", OnnxRuntime(bundle), train.subset(part)) for i, part in enumerate(parts)]
    runtime = OnnxRuntime(bundle)
    server = Server(
        runtime,
        SteinEstimator(60, 1e-3),
        seed=1,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        ema=0.0,
        batch_size=64,
    )

    def accuracy() -> float:
        found = runtime.outputs(server.weights, test.batch(slice(None))).argmax(axis=1)
        return float((found == test.targets).mean())

    before = accuracy()
    for _ in simulate(server, clients, rounds=60):
        pass
    assert before < 0.3
    assert accuracy() > 0.8


# --- the same network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported_lenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("torch") / "lenet.onnx"
    module = models.LeNet(1, 10, norm="group").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        torch.onnx.export(
            module,
            (torch.randn(2, 1, 12, 12),),
            path,
            dynamo=True,
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    return module, path


def test_what_torch_exported_measures_what_torch_does(exported_lenet: tuple[nn.Module, Path]):
    module, path = exported_lenet
    bundle, by_torch = from_onnx(path), TorchRuntime(module)
    # A norm without scale and shift has none here either.
    assert sorted(bundle.layout.shapes) == sorted(by_torch.layout.shapes)
    order = [bundle.layout.names.index(name) for name in by_torch.layout.names]
    parts = by_torch.layout.split(by_torch.weights())
    moved = np.concatenate([parts[order.index(i)].reshape(-1) for i in range(len(order))])
    np.testing.assert_array_equal(bundle.weights(), moved)
    batch = Batch(RNG.standard_normal((6, 1, 12, 12)).astype(np.float32), RNG.integers(0, 10, 6))
    for runtime in (OnnxRuntime(bundle), NumpyRuntime(bundle)):
        for w, v in ((by_torch.weights(), moved), (1.25 * by_torch.weights(), 1.25 * moved)):
            assert runtime.loss(v, batch) == pytest.approx(by_torch.loss(w, batch), rel=1e-5)


def test_some_initializers_may_stay_as_they_are(exported_lenet: tuple[nn.Module, Path], tmp_path: Path):
    _, path = exported_lenet
    bundle = from_onnx(path, trainable=r"^classifier\.").write(tmp_path / "x")
    assert bundle.layout.names == ("classifier.weight", "classifier.bias")
    assert "features.0.weight" in bundle.frozen
    assert (bundle.folder / PREFIX).exists()
    batch = Batch(RNG.standard_normal((6, 1, 12, 12)).astype(np.float32), RNG.integers(0, 10, 6))
    whole = from_onnx(path)
    want = OnnxRuntime(whole).loss(whole.weights(), batch)
    for runtime in (OnnxRuntime(bundle), NumpyRuntime(bundle)):
        assert runtime.loss(bundle.weights(), batch) == pytest.approx(want, rel=1e-6)
        behind = runtime.prefixed(batch)
        assert runtime.loss(bundle.weights(), behind) == pytest.approx(want, rel=1e-6)
    again = from_onnx(path, trainable=r"^classifier\.")
    assert again.frozen_digest == bundle.frozen_digest == OnnxRuntime(bundle).frozen_digest
    assert from_onnx(path).frozen_digest != bundle.frozen_digest
    with pytest.raises(ConfigError, match=r"no float32 initializer.*features\.0\.weight"):
        from_onnx(path, trainable="nothing")
    with pytest.raises(ConfigError, match="regular expression"):
        from_onnx(path, trainable="(")


def test_what_depends_on_tensors_alone_may_be_anywhere(tmp_path: Path):
    """A node that reads neither the input nor a parameter: before the cut, behind it, on both sides."""
    nodes = [
        make("Neg", ["minus"], ["k"]),
        make("Conv", ["x", "k"], ["c"]),
        make("ReduceMax", ["k"], ["top"], axes=[0, 1, 2, 3], keepdims=0),
        make("Mul", ["c", "top"], ["f"]),
        *HEAD[:2],
        make("Mul", ["q", "top"], ["q2"]),
        make("Gemm", ["q2", "w", "b"], ["z"]),
        make("Mul", ["z", "top"], ["y"]),
    ]
    model = model_of(nodes, {"minus": -K["k"], "w": values(2, 3), "b": values(3)})
    bundle = from_onnx(saved(tmp_path / "x.onnx", model), trainable="^[wb]$")
    assert set(bundle.models) == {MODEL, PREFIX}
    inputs = RNG.standard_normal((4, 2, 6, 6)).astype(np.float32)
    runtime, batch = OnnxRuntime(bundle), Batch(inputs, np.zeros(4, np.int64))
    for given in (batch, runtime.prefixed(batch)):
        np.testing.assert_allclose(
            runtime.outputs(bundle.weights(), given), outputs(model, inputs), rtol=1e-5
        )


def norm(groups: int, epsilon: float = 1e-3) -> list[Any]:
    """What exporters write for a group norm of x, 2 × 6 × 6."""
    return [
        make("Reshape", ["x", "s3"], ["r"]),
        make("InstanceNormalization", ["r", "one", "zero"], ["i"], epsilon=epsilon),
        make("Shape", ["x"], ["s"]),
        make("Reshape", ["i", "s"], ["n"]),
    ]


def sizes(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


NORM = {"s3": sizes(0, 1, -1), "one": np.ones(1, np.float32), "zero": np.zeros(1, np.float32)}
SIX = {"lo": np.float32(0), "hi": np.float32(6)}
#: What a file may hold → operators of its graph, before the head.
COVERED: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any], list[str]]] = {
    "conv": (
        [make("Conv", ["x", "k"], ["f"], pads=[0, 1, 2, 1], dilations=[2, 1], strides=[1, 2])],
        K,
        {},
        ["conv2d"],
    ),
    "same up": ([make("Conv", ["x", "k"], ["f"], auto_pad="SAME_UPPER", strides=[2, 3])], K, {}, CONV),
    "same low": ([make("Conv", ["x", "k"], ["f"], auto_pad="SAME_LOWER", strides=[2, 2])], K, {}, CONV),
    "valid": ([make("Conv", ["x", "k"], ["f"], auto_pad="VALID")], K, {}, ["conv2d"]),
    "depthwise": ([make("Conv", ["x", "k"], ["f"], group=2)], {"k": values(2, 1, 3, 3)}, {}, ["conv2d"]),
    "pad merged": (
        [make("Pad", ["x", "p8"], ["p0"]), make("Conv", ["p0", "k"], ["f"], pads=[1, 0, 0, 1])],
        {**K, "p8": sizes(0, 0, 1, 0, 0, 0, 2, 1)},
        {},
        ["conv2d"],
    ),
    "pad of axes": (
        [make("Pad", ["x", "p2", "", "a"], ["f"])],
        {"p2": sizes(1, 2), "a": sizes(-1)},
        {"opset": 18},
        ["pad"],
    ),
    "bias behind": (
        [make("Conv", ["x", "k"], ["c"]), make("Add", ["c", "v"], ["f"])],
        {**K, "v": values(1, 2, 1, 1)},
        {},
        ["conv2d"],
    ),
    "batch norm": (
        [make("BatchNormalization", ["x", "g", "h", "m", "v"], ["f"], epsilon=0.01)],
        {"g": values(2), "h": values(2), "m": values(2), "v": np.array([0.5, 2], np.float32)},
        {},
        ["batch_norm"],
    ),
    "instance norm": (
        [make("InstanceNormalization", ["x", "g", "h"], ["n"]), make("Mul", ["n", "x"], ["f"])],
        {"g": values(2), "h": values(2)},
        {},
        ["group_norm", "mul"],
    ),
    "group norm": (
        [*norm(1), make("Mul", ["n", "g"], ["o"]), make("Add", ["o", "h"], ["f"])],
        {**NORM, "g": values(2, 1, 1), "h": values(2, 1, 1)},
        {},
        ["group_norm", "group_norm", "group_norm"],
    ),
    "group norm without affine": (
        [*norm(1), make("Mul", ["n", "g"], ["o"]), make("Add", ["o", "h"], ["f"])],
        {**NORM, "g": np.ones((2, 1, 1), np.float32), "h": np.zeros((2, 1, 1), np.float32)},
        {},
        ["group_norm"],
    ),
    "layer norm": (
        [make("LayerNormalization", ["x", "g", "h"], ["n"], axis=-2), make("Mul", ["n", "x"], ["f"])],
        {"g": values(6, 6), "h": values(6, 6)},
        {},
        ["layer_norm", "mul"],
    ),
    "max pool": ([make("MaxPool", ["x"], ["f"], kernel_shape=[2, 3], pads=[1, 0, 0, 1])], {}, {}, POOL),
    "average pool": (
        [make("AveragePool", ["x"], ["f"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])],
        {},
        {},
        ["avg_pool"],
    ),
    "average pool with padding": (
        [make("AveragePool", ["x"], ["f"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)],
        {},
        {},
        ["avg_pool"],
    ),
    "relu6": ([make("Clip", ["x", "lo", "hi"], ["f"])], SIX, {}, ACT),
    "relu by clip": ([make("Clip", ["x", "lo"], ["f"])], {"lo": np.float32(0)}, {}, ACT),
    "silu": (
        [make("Sigmoid", ["x"], ["g"]), make("Mul", ["x", "g"], ["f"])],
        {},
        {},
        ["activation", "mul"],
    ),
    "hard sigmoid": ([make("HardSigmoid", ["x"], ["f"], alpha=1 / 6)], {}, {}, ACT),
    "selu": ([make("Selu", ["x"], ["f"])], {}, {}, ACT),
    "elu": ([make("Elu", ["x"], ["f"])], {}, {}, ACT),
    "leaky": ([make("LeakyRelu", ["x"], ["f"], alpha=0.25)], {}, {}, ACT),
    "gelu": ([make("Gelu", ["x"], ["f"])], {}, {"opset": 20}, ["activation"]),
    "hard swish": ([make("HardSwish", ["x"], ["f"])], {}, {}, ACT),
    "numbers": (
        [
            make("Mul", ["x", "two"], ["a"]),
            make("Sub", ["one", "a"], ["c"]),
            make("Div", ["c", "two"], ["d"]),
            make("Constant", [], ["three"], value=onnx.numpy_helper.from_array(np.float32(3))),
            make("Add", ["three", "d"], ["f"]),
        ],
        {"two": np.float32(2), "one": np.array([1], np.float32)},
        {},
        ["scale_shift"] * 4,
    ),
    "residual": (
        [
            make("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
            make("Identity", ["c"], ["d"]),
            make("Dropout", ["d"], ["e"]),
            make("Add", ["e", "x"], ["f"]),
        ],
        K,
        {},
        ["conv2d", "add"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COVERED)
def test_operators_that_are_covered(name: str, tmp_path: Path):
    """`from_onnx` holds numpy to ONNX Runtime, and that to the file itself; here: what became of the file."""
    nodes, tensors, options, ops = COVERED[name]
    model = headed(nodes, tensors, **options)
    bundle = from_onnx(saved(tmp_path / "x.onnx", model))
    assert bundle.missing == ""
    assert bundle.graph is not None
    assert len(bundle.graph.nodes) <= len(ops) + 3
    assert {node.op for node in bundle.graph.nodes} == {*ops, "global_avg_pool", "flatten", "linear"}
    inputs = RNG.standard_normal((4, 2, 6, 6)).astype(np.float32)
    batch = Batch(inputs, np.array([0, 1, 2, 1]))
    for runtime in (OnnxRuntime(bundle, micro_batch=3), NumpyRuntime(bundle)):
        got = runtime.outputs(bundle.weights(), batch)
        np.testing.assert_allclose(got, outputs(model, inputs), rtol=1e-4, atol=1e-5)


def test_ways_to_flatten_and_to_end(tmp_path: Path):
    """Whatever leads from images to vectors, and from there to classes."""
    matrix, bias = values(72, 3), values(3)
    # What older exporters of torch write for x.view(x.size(0), -1).
    view = [
        make("Shape", ["x"], ["s"]),
        make("Gather", ["s", "first"], ["n1"], axis=0),
        make("Unsqueeze", ["n1", "axis0"], ["n2"]),
        make("Concat", ["n2", "rest"], ["to"], axis=0),
        make("Reshape", ["x", "to"], ["q"]),
    ]
    flattening: list[tuple[list[Any], dict[str, Any]]] = [
        ([make("Flatten", ["x"], ["q"])], {}),
        ([make("Reshape", ["x", "to"], ["q"])], {"to": sizes(0, -1)}),
        ([make("Reshape", ["x", "to"], ["q"])], {"to": sizes(-1, 72)}),
        (view, {"first": np.int64(0), "axis0": sizes(0), "rest": sizes(-1)}),
    ]
    ends: list[tuple[list[Any], dict[str, Any]]] = [
        ([make("Gemm", ["q", "w", "b"], ["y"])], {"w": matrix, "b": bias}),
        ([make("Gemm", ["q", "w"], ["y"], transB=1)], {"w": matrix.T.copy()}),
        ([make("MatMul", ["q", "w"], ["m"]), make("Add", ["b", "m"], ["y"])], {"w": matrix, "b": bias}),
        (
            [make("Gemm", ["q", "w", "b"], ["z"]), make("Softmax", ["z"], ["y"], axis=-1)],
            {"w": matrix, "b": bias},
        ),
    ]
    inputs = RNG.standard_normal((4, 2, 6, 6)).astype(np.float32)
    batch = Batch(inputs, np.array([0, 1, 2, 1]))
    for i, (nodes, tensors) in enumerate([*[(a, b) for a, b in flattening], *[flattening[0]] * 3]):
        end, held = ends[max(0, i - 3)]
        model = model_of([*nodes, *end], {**tensors, **held})
        bundle = from_onnx(saved(tmp_path / "x.onnx", model))
        assert bundle.missing == ""
        # Products take (outputs, inputs) everywhere, so that a plan's directions mean the same.
        assert bundle.layout.shapes[0] == (3, 72)
        got, want = OnnxRuntime(bundle).outputs(bundle.weights(), batch), outputs(model, inputs)
        if end[-1].op_type == "Softmax":
            got = np.exp(got) / np.exp(got).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "tensors", "named"),
    [
        ([make("Sin", ["x"], ["f"])], {}, "Sin"),
        ([make("Clip", ["x", "lo", "hi"], ["f"])], {"lo": np.float32(-1), "hi": np.float32(1)}, "Clip"),
        ([make("MaxPool", ["x"], ["f"], kernel_shape=[4, 4], strides=[3, 3], ceil_mode=1)], {}, "MaxPool"),
        ([make("Mul", ["x", "g"], ["f"])], {"g": values(2, 1, 1)}, "Mul"),
([make("Erf", ["x"], ["f"])], {}, "Erf"),
        ([make("Transpose", ["x"], ["f"], perm=[0, 1, 3, 2])], {}, "Transpose"),
        ([make("Elu", ["x"], ["f"], alpha=0.5)], {}, "Elu"),
        ([make("Pad", ["x", "p8"], ["f"], mode="reflect")], {"p8": sizes(0, 0, 1, 1, 0, 0, 1, 1)}, "Pad"),
    ],
)  # fmt: skip
def test_operators_that_are_not_covered_run_on_onnx_alone(
    nodes: list[Any], tensors: dict[str, Any], named: str, tmp_path: Path
):
    model = headed(nodes, tensors)
    bundle = from_onnx(saved(tmp_path / "x.onnx", model)).write(tmp_path / "b")
    assert bundle.graph is None
    assert named in bundle.missing
    with pytest.raises(ConfigError, match=named):
        NumpyRuntime(bundle)
    inputs = RNG.standard_normal((4, 2, 6, 6)).astype(np.float32)
    got = OnnxRuntime(bundle).outputs(bundle.weights(), Batch(inputs, np.zeros(4, np.int64)))
    np.testing.assert_allclose(got, outputs(model, inputs), rtol=1e-4, atol=1e-5)


def test_mean_squared_error(tmp_path: Path):
    model = model_of([make("Gemm", ["x", "w"], ["y"])], {"w": values(4, 3)}, ("n", 4))
    bundle = from_onnx(saved(tmp_path / "x.onnx", model), loss="mse")
    inputs, targets = values(5, 4), values(5, 3)
    want = ((outputs(model, inputs) - targets).astype(np.float64) ** 2).mean()
    for runtime in (OnnxRuntime(bundle), NumpyRuntime(bundle)):
        assert runtime.loss(bundle.weights(), Batch(inputs, targets)) == pytest.approx(want, rel=1e-6)


def test_names_that_are_ours_too(tmp_path: Path):
    """A file may call its values what a bundle's file calls its own."""
    nodes = [
        make("Mul", ["targets", "losses"], ["images"]),
        make("Gemm", ["images", "W:w"], ["logits"]),
    ]
    model = model_of(nodes, {"losses": values(1, 4), "W:w": values(4, 3)}, ("n", 4))
    model.graph.input[0].name, model.graph.output[0].name = "targets", "logits"
    bundle = from_onnx(saved(tmp_path / "x.onnx", model))
    inputs = values(5, 4)
    got = OnnxRuntime(bundle).outputs(bundle.weights(), Batch(inputs, np.zeros(5, np.int64)))
    np.testing.assert_allclose(got, outputs(model, inputs), rtol=1e-5)


# --- tensors in other files ------------------------------------------------------------------------


def external(tmp_path: Path, location: str, **more: str) -> Path:
    model = model_of([make("Gemm", ["x", "w"], ["y"])], {"w": values(4, 3)}, ("n", 4))
    tensor = model.graph.initializer[0]
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "sub").mkdir()
    for place in (tmp_path / "outside", inner / "beside", inner / "sub" / "deep"):
        place.write_bytes(b"\0" * 8 + raw)
    (inner / "link").symlink_to(tmp_path / "outside")
    (inner / "linked").symlink_to(tmp_path)
    os.mkfifo(inner / "pipe")
    return saved(inner / "x.onnx", model)


@pytest.mark.parametrize("location", ["beside", "sub/deep"])
def test_tensors_may_lie_beside_the_file(location: str, tmp_path: Path):
    path = external(tmp_path, location, offset="8", length="48")
    bundle = from_onnx(path)
    raw = (path.parent / location).read_bytes()[8:]
    np.testing.assert_array_equal(bundle.weights().reshape(3, 4).T.ravel(), np.frombuffer(raw, np.float32))
    assert b"beside" not in bundle.models[MODEL]  # the bundle holds them itself


@pytest.mark.parametrize(
    ("location", "more"),
    [
        ("../outside", {}),
        ("sub/../../outside", {}),
        ("sub\\..\\..\\outside", {}),
        ("{top}/outside", {}),
        ("link", {}),
        ("linked/outside", {}),
        ("pipe", {}),
        ("sub", {}),
        ("nowhere", {}),
        ("", {}),
        ("a\0b", {}),
        ("beside", {"offset": "16"}),
        ("beside", {"offset": "-8"}),
        ("beside", {"offset": "x"}),
        ("beside", {"length": "47"}),
        ("beside", {"length": str(1 << 60)}),
        ("/dev/zero", {}),
        ("c:/x", {}),
    ],
)
def test_but_nowhere_else(location: str, more: dict[str, str], tmp_path: Path):
    path = external(tmp_path, location.replace("{top}", str(tmp_path)), **more)
    with pytest.raises(DataError, match="'w'") as caught:
        from_onnx(path)
    assert "\n" not in str(caught.value)


# --- hostile files ---------------------------------------------------------------------------------


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        from_onnx(path, **options)
    text = str(caught.value)
    assert text.splitlines() == [text]
    return text


def plain() -> Any:
    return model_of([make("Gemm", ["x", "w"], ["y"])], {"w": values(4, 3)}, ("n", 4))


def changed(change: Any) -> Any:
    model = plain()
    change(model)
    return model


def shape_of(model: Any, *dims: int) -> None:
    model.graph.initializer[0].dims[:] = dims


def as_type(model: Any, kind: int) -> None:
    model.graph.initializer[0].data_type = kind


def values_of(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data[:] = [1.0] * 11


def not_a_number(model: Any) -> None:
    model.graph.initializer[0].raw_data = np.full(12, np.nan, np.float32).tobytes()


HOSTILE = {
    "a shape that is not there": (lambda m: shape_of(m, 1 << 40, 3), "holds 48 bytes"),
    "a shape of 2^120": (lambda m: shape_of(m, 1 << 60, 1 << 60), ""),
    "a negative shape": (lambda m: shape_of(m, -4, -3), "shape"),
    "a hundred sides": (lambda m: shape_of(m, *[1] * 100), "shape"),
    "another type": (lambda m: as_type(m, onnx.TensorProto.DOUBLE), ""),
    "a type of text": (lambda m: as_type(m, onnx.TensorProto.STRING), ""),
    "a type of four bits": (lambda m: as_type(m, onnx.TensorProto.INT4), ""),
    "no type": (lambda m: as_type(m, 999), ""),
    "too few values": (values_of, "holds 11 values"),
    "NaN": (not_a_number, "NaN"),
    "two of a name": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), ""),
    "two inputs": (lambda m: m.graph.input.add(name="z"), "one input"),
    "no output": (lambda m: m.graph.output.pop(), "one output"),
    "an output from nowhere": (lambda m: setattr(m.graph.output[0], "name", "q"), ""),
    "numbers for input": (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", INT64), ""),
    "an open shape": (lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].Clear(), "say the shape"),
    "a huge input": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 1 << 40),
        "",
    ),
    "an old opset": (lambda m: setattr(m.opset_import[0], "version", 8), "opset 8"),
    "no opset": (lambda m: m.opset_import.pop(), "opset"),
    "an unknown operator": (lambda m: setattr(m.graph.node[0], "op_type", "Gem"), ""),
    "a stranger's operator": (lambda m: setattr(m.graph.node[0], "domain", "evil"), ""),
    "a loop": (lambda m: m.graph.node[0].input.__setitem__(0, "y"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_say_something_else(name: str, tmp_path: Path):
    change, text = HOSTILE[name]
    tracemalloc.start()
    try:
        assert text in refused(saved(tmp_path / "x.onnx", changed(change)))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "nodes",
    [
        [make("ConstantOfShape", ["s"], ["c"]), make("Add", ["x", "c"], ["d"])],
        [make("Expand", ["x", "s"], ["d"])],
        [make("Tile", ["x", "s"], ["d"])],
        [make("Pad", ["x", "s4"], ["d"])],
        [make("Reshape", ["x", "s3"], ["e"]), make("Resize", ["e", "", "scales"], ["d"])],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_what_would_take_gigabytes_is_not_begun(nodes: list[Any], tmp_path: Path):
    tensors = {"s": sizes(1, 1 << 40), "s3": sizes(-1, 1, 1), "s4": sizes(0, 1 << 40, 0, 1 << 40)}
    end = [make("ReduceMax", ["d"], ["m"], axes=[1]), make("Gemm", ["m", "w"], ["y"])]
    scales = np.array([1, 1, 2**31], np.float32)
    model = model_of([*nodes, *end], {**tensors, "scales": scales, "w": values(1, 3)}, ("n", 1))
    assert re.search("refused|do not fit", refused(saved(tmp_path / "x.onnx", model)))


def test_files_that_are_none(tmp_path: Path):
    good = plain().SerializeToString()
    path = tmp_path / "x.onnx"
    for raw in (b"", b"\0", b"PK\x03\x04", b"\xff" * 99, *(good[: len(good) * i // 30] for i in range(30))):
        path.write_bytes(raw)
        assert refused(path)
    assert "cannot be read" in refused(tmp_path / "nowhere")
    assert "cannot be read" in refused(tmp_path)
    path.unlink()


def test_flipped_bytes_are_read_or_refused(tmp_path: Path):
    good, path = plain().SerializeToString(), tmp_path / "x.onnx"
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        lines = []
        try:
            bundle: Bundle | None = from_onnx(path)
        except BaffleError as error:
            bundle, lines = None, str(error).splitlines()
        assert bundle is not None or len(lines) == 1


def test_a_network_of_one_sample_only(tmp_path: Path):
    model = model_of([make("Reshape", ["x", "s"], ["y"])], {"s": sizes(1, 4)}, (1, 4), (1, 4))
    with pytest.raises(BaffleError):
        from_onnx(saved(tmp_path / "x.onnx", model))
    with pytest.raises(ConfigError, match="unknown loss"):
        from_onnx(tmp_path / "x.onnx", loss="hinge")
