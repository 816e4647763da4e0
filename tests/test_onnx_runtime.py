"""The ONNX runtime: parity with torch and NumPy, its contract, frozen parts, and files that are hostile."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from baffle import models
from baffle.bundle import MODEL, PREFIX, Bundle, frozen_digest
from baffle.errors import ConfigError, DataError
from baffle.export.onnx import from_onnx
from baffle.export.onnx_file import OnnxNetwork
from baffle.export.torch import from_torch, mse
from baffle.perturbations import Gaussian, Layout, Rademacher
from baffle.runtimes import Batch, ExampleRuntime, HoldingRuntime
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.onnx import OnnxRuntime, check_file
from baffle.runtimes.torch import TorchRuntime, cross_entropy
from baffle.stream import Stream, seed_from
from tests.contracts.runtime import ExampleContract, RuntimeContract

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

STREAM = Stream(seed_from(3), 1)
NETWORKS = {
    "mlp": (lambda: models.MLP(1, 5, hidden=(9,), grid=4), (1, 8, 8)),
    "lenet": (lambda: models.LeNet(1, 5, channels=(4, 6), norm="group"), (1, 8, 9)),
    "lenet, first layer frozen": (
        lambda: frozen(models.LeNet(2, 5, channels=(4, 6)), "features.0"),
        (2, 8, 8),
    ),
    "wrn-10-2": (lambda: models.WideResNet(classes=5), (3, 9, 8)),
    "mobilenet-v2": (lambda: models.MobileNetV2(5, 0.35, norm="group"), (3, 33, 32)),
}


def frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_submodule(name).requires_grad_(False)
    return module


@functools.cache
def exported(name: str) -> tuple[nn.Module, Bundle]:
    make, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = make()
    return module, from_torch(module, input_shape=shape)


def samples(shape: tuple[int, ...], count: int = 7, classes: int = 5) -> Batch:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((count, *shape)).astype(np.float32)
    return Batch(inputs, rng.integers(0, classes, count))


def slopes(
    runtime: ExampleRuntime, w: NDArray[np.float32], batch: Batch, sigma: float
) -> NDArray[np.float64]:
    moved = runtime.example_losses(w, batch, STREAM, Gaussian(), range(8), sigma)
    still = runtime.example_losses(w, batch, STREAM, Gaussian(), range(1), 0.0)
    return (moved - still) / sigma


class TestOnnxRuntime(RuntimeContract, ExampleContract):
    def runtime(self) -> OnnxRuntime:
        return OnnxRuntime(exported("lenet")[1], micro_batch=3)

    def batch(self) -> Batch:
        return samples((1, 8, 9))

    def oracle(self, weights: NDArray[np.float64], batch: Batch) -> float:
        module, bundle = exported("lenet")
        parts = bundle.layout.split(torch.from_numpy(weights))
        values = dict(zip(bundle.layout.names, parts, strict=True))
        outputs = functional_call(module, values, (torch.from_numpy(batch.inputs).double(),))
        return float(cross_entropy(outputs, torch.from_numpy(batch.targets)).mean())


def check_parity(module: nn.Module, bundle: Bundle, batch: Batch, rtol: float) -> None:
    """Losses, losses of samples, slopes and digests of torch, numpy and onnx."""
    by_torch = TorchRuntime(module)
    w = by_torch.weights()
    others = [NumpyRuntime(bundle), OnnxRuntime(bundle), OnnxRuntime(bundle, micro_batch=1)]
    wanted = by_torch.example_losses(w, batch, STREAM, Rademacher(), range(3), 0.01)
    means = by_torch.losses(w, batch, STREAM, Rademacher(), range(3), 0.01)
    # A slope's error is that of two losses, by σ.
    sigma = 1e-2
    s, room = slopes(by_torch, w, batch, sigma), 2 * rtol * wanted.max() / sigma
    assert room < 0.1 * np.abs(s).mean()
    for other in others:
        assert other.layout == by_torch.layout
        assert other.frozen_digest == by_torch.frozen_digest
        np.testing.assert_array_equal(other.weights(), w)
        got = other.example_losses(w, batch, STREAM, Rademacher(), range(3), 0.01)
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * wanted.max())
        np.testing.assert_allclose(
            other.losses(w, batch, STREAM, Rademacher(), range(3), 0.01), means, rtol=rtol
        )
        np.testing.assert_allclose(slopes(other, w, batch, sigma), s, rtol=0, atol=room)
        wide, far = (slopes(runtime, w, batch, 0.1).mean(axis=1) for runtime in (by_torch, other))
        assert np.linalg.norm(far - wide) < 1e-5 * np.linalg.norm(wide)


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_numpy_and_onnx_measure_the_same(name: str):
    module, bundle = exported(name)
    assert bundle.missing == ""
    deep = 4 if name == "mobilenet-v2" else 1  # 52 norms, each of which divides by what is small
    check_parity(module, bundle, samples(bundle.input_shape), rtol=deep * 64 * 2.0**-24)


@pytest.mark.parametrize("name", ["lenet", "wrn-10-2"])
def test_micro_batches_and_bytes_on_disk_change_rounding_at_most(name: str, tmp_path: Path):
    bundle = exported(name)[1]
    written = bundle.write(tmp_path / "x")
    batch, w = samples(bundle.input_shape), bundle.weights()
    with written.stored() as source:
        rows = [
            OnnxRuntime(some, micro_batch=size).example_losses(at, batch, STREAM, Gaussian(), [4, 1], 0.1)
            for some, size, at in (
                (bundle, None, w),
                (bundle, 1, w),
                (bundle, 4, w),
                (written, 4, source),
            )
        ]
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], rtol=64 * 2.0**-24)
    np.testing.assert_array_equal(rows[2], rows[3])


def test_bytes_are_normalised_by_the_bundle_or_as_told():
    module = models.MLP(2, 5, hidden=(), grid=2)
    bundle = from_torch(module, input_shape=(2, 4, 4), scale=[1 / 255, 2 / 255], shift=[-0.5, 0.25])
    rng = np.random.default_rng(1)
    raw, targets = rng.integers(0, 256, (6, 2, 4, 4), dtype=np.uint8), rng.integers(0, 5, 6)
    for normalise in (None, (np.array([0.5, 2], np.float32), np.array([1, -1], np.float32))):
        scale, shift = normalise or (bundle.scale, bundle.shift)
        seen = raw * scale[:, None, None] + shift[:, None, None]
        runtime = OnnxRuntime(bundle, normalise=normalise, micro_batch=4)
        w = bundle.weights()
        want = TorchRuntime(module).loss(w, Batch(seen.astype(np.float32), targets))
        assert runtime.loss(w, Batch(raw, targets)) == pytest.approx(want, rel=1e-6)


# --- frozen parts ----------------------------------------------------------------------------------


def test_a_frozen_prefix_runs_once():
    module, bundle = exported("lenet, first layer frozen")
    assert set(bundle.models) == {MODEL, PREFIX}
    runtime, by_torch, batch = OnnxRuntime(bundle), TorchRuntime(module), samples((2, 8, 8))
    assert runtime.has_frozen_prefix
    assert isinstance(runtime, HoldingRuntime)
    w = runtime.weights()
    behind = runtime.prefixed(batch)
    assert behind.prefixed
    assert runtime.prefixed(behind) is behind
    np.testing.assert_allclose(behind.inputs, by_torch.prefixed(batch).inputs, rtol=1e-5, atol=1e-6)
    want = runtime.losses(w, batch, STREAM, Gaussian(), range(3), 0.1)
    np.testing.assert_array_equal(runtime.losses(w, behind, STREAM, Gaussian(), range(3), 0.1), want)
    calls = []
    prefix, runtime._prefix = runtime._prefix, Counting(runtime._prefix, calls)
    with runtime.holding(batch):
        for _ in range(3):
            runtime.losses(w, batch, STREAM, Gaussian(), range(3), 0.1)
    assert len(calls) == 1
    with runtime.holding(samples((2, 8, 8), 3)):  # another one: this one's prefix still runs once
        runtime.losses(w, batch, STREAM, Gaussian(), range(3), 0.1)
    assert len(calls) == 3
    runtime._prefix = prefix
    with pytest.raises(ConfigError, match="no frozen prefix"):
        OnnxRuntime(exported("lenet")[1]).prefixed(samples((1, 8, 9)))
    with pytest.raises(ConfigError, match="behind a frozen prefix"):
        OnnxRuntime(exported("lenet")[1]).loss(exported("lenet")[1].weights(), behind)


class Counting:
    """A session that counts its calls."""

    def __init__(self, session: object, calls: list[int]) -> None:
        self.session, self.calls = session, calls

    def __getattr__(self, name: str) -> object:
        if name == "run_with_ort_values":
            self.calls.append(1)
        return getattr(self.session, name)


@pytest.mark.parametrize("name", ["0.35_imagenet_features_fp32", "1.0_imagenet_int8"])
def test_pretrained_features_are_a_file_of_their_own(name: str, shared_data: Path, tmp_path: Path):
    module = models.MobileNetV2.from_npz(shared_data / f"mobilenet/mobilenet_v2_{name}.npz", 5)
    bundle = from_torch(module, input_shape=(3, 33, 32)).write(tmp_path / "x")
    assert (bundle.folder / PREFIX).stat().st_size > 10 * (bundle.folder / MODEL).stat().st_size
    check_parity(module, Bundle.read(tmp_path / "x"), samples((3, 33, 32), 3), rtol=2e-5)


# --- networks that a graph has no operators for ----------------------------------------------------


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.sin(self.layer(x)).cumsum(dim=1))
        return result


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result - result.mean(dim=0, keepdim=True)


def test_a_network_of_other_operators_runs_on_onnx_alone(tmp_path: Path):
    module = Strange()
    bundle = from_torch(module, input_shape=(6,)).write(tmp_path / "x")
    assert bundle.graph is None
    assert "sin" in bundle.missing
    assert "cumsum" in bundle.missing
    with pytest.raises(ConfigError, match=r"sin.*cumsum"):
        NumpyRuntime(bundle)
    runtime, batch = OnnxRuntime(bundle, micro_batch=2), samples((6,))
    w, by_torch = runtime.weights(), TorchRuntime(module)
    for scale in (0.0, 0.1):
        want = by_torch.example_losses(w, batch, STREAM, Gaussian(), range(4), scale)
        got = runtime.example_losses(w, batch, STREAM, Gaussian(), range(4), scale)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_module_that_mixes_samples_is_not_exported():
    with pytest.raises(ConfigError, match="mixes the samples"):
        from_torch(Mixing(), input_shape=(6,))


def test_a_file_that_mixes_samples_is_found_out(tmp_path: Path):
    """By hand: an export refuses it, and so does an import."""
    path = tmp_path / "mixing.onnx"
    helper, proto = onnx.helper, onnx.TensorProto
    w = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("ReduceMean", ["h"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["h", "m"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", proto.FLOAT, ["b", 6])],
        [helper.make_tensor_value_info("y", proto.FLOAT, ["b", 5])],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="mixes the samples"):
        from_onnx(path)
    network = OnnxNetwork(onnx, path, model, "cross-entropy")
    network.trainable("all")
    network.outputs((6,))
    layout = Layout(("w",), ((6, 5),))
    bundle = Bundle(
        name="mixing",
        layout=layout,
        frozen={},
        frozen_digest=frozen_digest({}),
        input_shape=(6,),
        classes=tuple("abcde"),
        scale=np.ones(6, np.float32),
        shift=np.zeros(6, np.float32),
        graph=None,
        missing="Sub",
        initial=w.reshape(-1),
        models=network.models(layout, {}),
    )
    batch = samples((6,))
    h = batch.inputs.astype(np.float64) @ w
    logits = h - h.mean(axis=0)
    want = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(7), batch.targets]
    runtime = OnnxRuntime(bundle, micro_batch=2)
    assert runtime.loss(bundle.weights(), batch) == pytest.approx(want.mean(), rel=1e-5)
    with pytest.raises(ConfigError, match="mixes the samples"):
        runtime.example_losses(bundle.weights(), batch, STREAM, Gaussian(), range(1), 0.1)


def test_mean_squared_error_and_a_loss_of_ones_own():
    module = nn.Linear(6, 3)
    rng = np.random.default_rng(2)
    batch = Batch(
        rng.standard_normal((4, 6)).astype(np.float32), rng.standard_normal((4, 3)).astype(np.float32)
    )
    plain = from_torch(module, mse, input_shape=(6,))
    check = TorchRuntime(module, mse)
    w = check.weights()
    for runtime in (NumpyRuntime(plain), OnnxRuntime(plain)):
        assert runtime.loss(w, batch) == pytest.approx(check.loss(w, batch), rel=1e-6)

    def huber(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.huber_loss(outputs.double(), targets.double(), reduction="none").mean(dim=1)

    own = from_torch(module, huber, input_shape=(6,), targets=torch.randn(5, 3))
    assert own.graph is None
    assert "huber" in own.missing
    want = TorchRuntime(module, huber).loss(w, batch)
    assert OnnxRuntime(own).loss(w, batch) == pytest.approx(want, rel=1e-6)


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_a_label_that_is_no_class(label: int):
    bundle = exported("mlp")[1]
    batch = samples((1, 8, 8))
    targets = batch.targets.copy()
    targets[3] = label
    with pytest.raises(ConfigError):
        OnnxRuntime(bundle).loss(bundle.weights(), Batch(batch.inputs, targets))


def test_inputs_and_settings_that_cannot_be():
    bundle = exported("mlp")[1]
    w = bundle.weights()
    for settings in ({"micro_batch": 0}, {"threads": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            OnnxRuntime(bundle, **settings)
    with pytest.raises(ConfigError, match="without samples"):
        OnnxRuntime(bundle).loss(w, samples((1, 8, 8), 0))
    with pytest.raises(ConfigError, match="cannot run this batch"):
        OnnxRuntime(bundle).loss(w, samples((3, 8, 8)))
    plain = from_torch(models.MLP(1, 5), input_shape=(1, 8, 8), onnx=False)
    with pytest.raises(ConfigError, match=r"no model\.onnx"):
        OnnxRuntime(plain)


def with_model(data: bytes, name: str = "mlp") -> Bundle:
    import dataclasses

    return dataclasses.replace(exported(name)[1], models={MODEL: data})


def test_a_file_of_another_network_is_refused():
    other = exported("lenet")[1].models[MODEL]
    with pytest.raises(DataError, match="its inputs are not"):
        OnnxRuntime(with_model(other))
    model = onnx.load_model_from_string(exported("mlp")[1].models[MODEL])
    model.graph.input[2].type.tensor_type.shape.dim[0].dim_value += 1
    with pytest.raises(DataError):
        OnnxRuntime(with_model(model.SerializeToString()))


@pytest.mark.parametrize(
    "field", ["location alone", "data_location alone", "both", "in a node", "in a subgraph"]
)
def test_a_file_may_not_name_another(field: str, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(np.ones(4, np.float32).tobytes())
    model = onnx.load_model_from_string(exported("mlp")[1].models[MODEL])
    tensor = onnx.TensorProto(name="stolen", data_type=onnx.TensorProto.FLOAT, dims=[4])
    if field != "data_location alone":
        tensor.external_data.add(key="location", value=str(secret))
    if field != "location alone":
        tensor.data_location = onnx.TensorProto.EXTERNAL
    if field.startswith("in a"):
        node = onnx.helper.make_node("Constant", [], ["stolen"], value=tensor)
        if field == "in a subgraph":
            inner = onnx.helper.make_graph([node], "inner", [], [])
            node = onnx.NodeProto(op_type="If", input=["c"], output=["o"])
            node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH, g=inner)
        model.graph.node.append(node)
    else:
        model.graph.initializer.append(tensor)
    with pytest.raises(DataError, match="another file") as caught:
        OnnxRuntime(with_model(model.SerializeToString()))
    assert "\n" not in str(caught.value)


def test_files_that_are_none():
    good = exported("mlp")[1].models[MODEL]
    check_file("x", good)
    ends = [len(good) * i // 40 for i in range(40)]
    for data in (b"", b"\x00", b"\xff" * 50, b"PK\x03\x04", *(good[:end] for end in ends), good + b"\x01"):
        with pytest.raises(DataError) as caught:
            OnnxRuntime(with_model(data))
        assert "\n" not in str(caught.value)
    deep = b""
    for _ in range(300):  # a graph in an attribute of a node of a graph …
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            deep = tag + onnx_length(len(deep)) + deep
    with pytest.raises(DataError, match="deeply"):
        check_file("x", b"\x3a" + onnx_length(len(deep)) + deep)


def onnx_length(size: int) -> bytes:
    out = bytearray()
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes([*out, size])


def test_flipped_bytes_of_a_file_raise_nothing_else():
    good = exported("mlp")[1].models[MODEL]
    batch = samples((1, 8, 8), 2)
    for at in range(0, len(good), 11):
        data = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
        try:
            runtime = OnnxRuntime(with_model(data))
            runtime.loss(runtime.weights(), batch)
        except (DataError, ConfigError):
            continue
