"""Torch modules as graphs and bundles: layers and calls one by one, what is refused, and the command."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle import models
from baffle.bundle import Bundle
from baffle.commands import export as command
from baffle.config import TrainConfig
from baffle.errors import ConfigError, DataError, MissingExtraError
from baffle.export.agreement import check_equal
from baffle.export.onnx_writer import _bins
from baffle.export.torch import from_torch
from baffle.runs import RunFolder
from baffle.runtimes import Batch
from baffle.runtimes.graph import Node
from baffle.runtimes.modules import UncoveredError, graph_of
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.simplify import simplified
from baffle.runtimes.torch import TorchRuntime

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SHAPE = (4, 7, 6)


class Calls(nn.Module):
    """``body`` of an image of four channels, between a convolution and a head."""

    def __init__(self, body: Callable[[Calls, Tensor], Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.first, self.parts, self.body = nn.Conv2d(4, 4, 1), nn.ModuleList(parts), body
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(self, self.first(x)).flatten(1))
        return result


def built(module: nn.Module, shape: tuple[int, ...] = SHAPE) -> nn.Module:
    with torch.no_grad():
        module.eval()(torch.zeros(2, *shape))
        for tensor in module.parameters():
            tensor.normal_(0, 0.4)
        for name, tensor in module.named_buffers():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
            assert "num_batches" in name or tensor.is_floating_point()
    return module


def ops(bundle: Bundle) -> list[str]:
    """Without the convolution before and the head behind."""
    assert bundle.graph is not None, bundle.missing
    found = [node.op for node in bundle.graph.nodes]
    assert found[0] == "conv2d"
    assert found[-1] == "linear"
    return [op for op in found[1:-1] if op != "flatten"]


LAYERS: dict[str, tuple[nn.Module, str]] = {
    "conv": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), "conv2d"),
    "conv same": (nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2), bias=False), "conv2d"),
    "conv valid": (nn.Conv2d(4, 4, 3, padding="valid", groups=4), "conv2d"),
    "group norm": (nn.GroupNorm(2, 4, eps=1e-3), "group_norm"),
    "group norm plain": (nn.GroupNorm(2, 4, affine=False), "group_norm"),
    "batch norm": (nn.BatchNorm2d(4, eps=1e-2), "batch_norm"),
    "batch norm plain": (nn.BatchNorm2d(4, affine=False), "batch_norm"),
    "layer norm": (nn.LayerNorm([7, 6]), "layer_norm"),
    "layer norm plain": (nn.LayerNorm([4, 7, 6], elementwise_affine=False), "layer_norm"),
    "max pool": (nn.MaxPool2d((3, 2), stride=2, padding=1, dilation=(1, 2)), "max_pool"),
    "avg pool": (nn.AvgPool2d(3, stride=(1, 2), padding=1), "avg_pool"),
    "avg pool valid": (nn.AvgPool2d(3, padding=1, count_include_pad=False), "avg_pool"),
    "adaptive": (nn.AdaptiveAvgPool2d((3, 4)), "adaptive_avg_pool"),
    "adaptive up": (nn.AdaptiveAvgPool2d((9, None)), "adaptive_avg_pool"),
    "global": (nn.AdaptiveAvgPool2d(1), "global_avg_pool"),
    "zero pad": (nn.ZeroPad2d((1, 0, 2, 3)), "pad"),
    **{
        type(layer).__name__: (layer, "activation")
        for layer in (
            *(nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.SiLU()),
            *(nn.GELU(), nn.SELU(), nn.ELU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.Hardtanh(0, 6)),
        )
    },
    "in place": (nn.ReLU(inplace=True), "activation"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_each_kind(name: str):
    """`from_torch` holds numpy and ONNX Runtime to the module; here: that both are there, and as what."""
    layer, op = LAYERS[name]
    bundle = from_torch(built(Calls(lambda self, x: self.parts[0](x), layer)), input_shape=SHAPE)
    assert ops(bundle) == [op]
    assert bundle.models


CALLS: dict[str, tuple[Callable[[Calls, Tensor], Tensor], list[str]]] = {
    "functions": (
        lambda self, x: F.relu(F.max_pool2d(F.avg_pool2d(x, 2), 2)),
        ["avg_pool", "max_pool", "activation"],
    ),
    "methods": (lambda self, x: x.relu().sigmoid().tanh_(), ["activation"] * 3),
    "mean": (lambda self, x: x.mean(dim=(2, 3)), ["global_avg_pool"]),
    "mean kept": (lambda self, x: x * x.mean((-1, -2), keepdim=True), ["global_avg_pool", "mul"]),
    "numbers": (lambda self, x: (2 * x - 1) / 4 + 3 + (5 - x) * 0.5, ["scale_shift"] * 6 + ["add"]),
    "added in place": (lambda self, x: F.hardswish(x).add_(1).mul_(2), ["activation", *["scale_shift"] * 2]),
    "reshape by size": (lambda self, x: torch.relu(x.reshape(x.size(0), -1)), ["activation"]),
    "flatten": (lambda self, x: torch.flatten(F.leaky_relu(x, 0.3), 1), ["activation"]),
    "pad by size": (lambda self, x: F.pad(x, (x.shape[3] % 4, 0, 0, x.shape[2] % 4)), ["pad"]),
    "pad then conv": (lambda self, x: self.parts[0](F.pad(x, (1, 0, 2, 1))), ["conv2d"]),
    "dropout off": (lambda self, x: F.dropout(F.gelu(x), 0.5, self.training), ["activation"]),
    "own weights": (lambda self, x: F.conv2d(x, self.parts[0].weight, None, 1, 1), ["conv2d"]),
    "not used": (lambda self, x: (x.sigmoid(), x.tanh())[1], ["activation"]),
    "twice": (lambda self, x: self.parts[0](self.parts[0](x)), ["conv2d", "conv2d"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_each_kind(name: str):
    body, wanted = CALLS[name]
    bundle = from_torch(built(Calls(body, nn.Conv2d(4, 4, 3, padding=1))), input_shape=SHAPE)
    assert sorted(ops(bundle)) == sorted(wanted)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result if x.sum() > 0 else -result


MISSING: dict[str, tuple[Callable[[Calls, Tensor], Tensor], str]] = {
    "two of them": (lambda self, x: torch.sin(x).cumsum(1), r"sin.*cumsum"),
    "gelu by tanh": (lambda self, x: F.gelu(x, approximate="tanh"), "gelu by tanh"),
    "elu of another alpha": (lambda self, x: F.elu(x, 0.5), "alpha 0.5"),
    "ceil mode": (lambda self, x: F.max_pool2d(x, 2, ceil_mode=True), "ceil_mode"),
    "dropout that stays": (lambda self, x: F.dropout(x, 0.5, True), "never off"),
    "changed in place": (lambda self, x: (lambda y: y.relu_() + y)(x + 1), "changes in place"),
    "a computed weight": (lambda self, x: F.conv2d(x, self.parts[0].weight * 2), "mul"),
    "another mean": (lambda self, x: x.mean(1), "mean over other"),
    "reflection": (lambda self, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "with other than zeros"),
    "a layer of others": (lambda self, x: self.parts[1](x), "Softplus"),
    "a subclass": (lambda self, x: self.parts[2](x), "sin"),
    "a difference": (lambda self, x: x - torch.relu(x), "sub of two tensors"),
    "the batch's statistics": (lambda self, x: self.parts[3](x), "batch's statistics"),
}


class Twisted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.sin(x))


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_covered_is_named(name: str):
    body, text = MISSING[name]
    parts = [
        nn.Conv2d(4, 4, 3),
        nn.Softplus(),
        Twisted(4, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
    ]
    module = built(Calls(body, *parts))
    with pytest.raises(UncoveredError, match=text) as caught:
        graph_of(module, SHAPE, "cross-entropy")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="not covered, and without ONNX"):
        from_torch(module, input_shape=SHAPE, onnx=False)


def test_what_cannot_be_traced():
    with pytest.raises(UncoveredError, match="cannot be traced"):
        graph_of(Branch(), (4,), "cross-entropy")
    with pytest.raises(UncoveredError, match="does not take"):
        graph_of(nn.Linear(4, 3), (5,), "cross-entropy")
    pytest.importorskip("onnxscript")
    with pytest.raises(ConfigError, match=r"torch\.onnx cannot export"):
        from_torch(Branch(), input_shape=(4,))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Linear(4, 3).double(), "float64"),
        (nn.Linear(4, 3).half(), "float16"),
        (nn.Linear(4, 3, device="meta"), "lies on meta"),
        (nn.Linear(4, 3).requires_grad_(False), "no trainable parameter"),
    ],
)
def test_modules_that_no_bundle_is_of(module: nn.Module, text: str):
    with pytest.raises(ConfigError, match=text):
        from_torch(module, input_shape=(4,))


def test_a_module_is_left_as_it_was():
    module = built(Calls(lambda self, x: self.parts[0](x), nn.BatchNorm2d(4))).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.random.get_rng_state()
    bundle = from_torch(module, input_shape=SHAPE)
    assert module.training
    assert module.parts[0].training
    assert torch.equal(state, torch.random.get_rng_state())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    kept = bundle.weights(), {name: values.copy() for name, values in bundle.frozen.items()}
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(1)
    np.testing.assert_array_equal(bundle.weights(), kept[0])
    for name, values in bundle.frozen.items():
        np.testing.assert_array_equal(values, kept[1][name])


@pytest.mark.parametrize("norm", ["batch", "group", None])
def test_mobilenet(norm: str | None):
    """Its padding depends on the image's size; `from_torch` compares all three runtimes."""
    module = models.MobileNetV2(5, 0.35, norm=norm)
    bundle = from_torch(module, input_shape=(3, 33, 36), scale=[2 / 255] * 3, shift=[-1] * 3)
    assert bundle.graph is not None
    assert "pad" not in {node.op for node in bundle.graph.nodes}  # the convolutions do it
    assert bundle.frozen_digest == TorchRuntime(module).frozen_digest
    assert bundle.layout == TorchRuntime(module).layout


class Counted(nn.Module):
    """Writes to a buffer whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        result: Tensor = self.layer(x)
        return result


def test_what_a_forward_writes_is_not_written_to_the_module():
    pytest.importorskip("onnxscript")
    module = Counted()
    bundle = from_torch(module, input_shape=(4,))
    assert module.calls.item() == 0
    assert bundle.frozen["calls"] == 0
    assert bundle.frozen_digest == TorchRuntime(module).frozen_digest


def test_tied_weights_are_one_tensor():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(torch.relu(self.a(x)))
            return result

    bundle = from_torch(Tied(), input_shape=(4,))
    assert bundle.layout.names == ("a.weight", "a.bias", "b.bias")
    assert bundle.layout.n == 24


def test_what_torch_exports_and_what_is_written_measure_the_same():
    """Two ways to an ONNX file of one network."""
    pytest.importorskip("onnxscript")
    import dataclasses

    from baffle.export import torch as export
    from baffle.runtimes.onnx import OnnxRuntime

    module = models.LeNet(1, 5, channels=(4, 6), norm="group").eval()
    bundle = from_torch(module, input_shape=(1, 9, 8))
    runtime = TorchRuntime(module)
    inputs, targets = torch.randn(5, 1, 9, 8), torch.arange(5)
    made = export._onnx_models(module, runtime, runtime.loss_function, inputs, targets)
    other = dataclasses.replace(bundle, models=made)
    assert made.keys() == bundle.models.keys()
    check_equal(OnnxRuntime(bundle), OnnxRuntime(other), Batch(inputs.numpy(), targets.numpy()))
    for data in (*made.values(), *bundle.models.values()):
        assert str(Path(__file__).parents[1]).encode() not in data
        assert b".py" not in data


def test_a_disagreement_is_found():
    """That nothing would pass whatever it computes."""
    module = built(Calls(lambda self, x: F.relu(x)))
    bundle = from_torch(module, input_shape=SHAPE, onnx=False)
    batch = Batch(np.random.default_rng(0).standard_normal((4, *SHAPE)).astype(np.float32), np.arange(4) % 3)
    runtime = TorchRuntime(module)
    check_equal(runtime, NumpyRuntime(bundle), batch)
    assert bundle.graph is not None
    import dataclasses

    nodes = [
        dataclasses.replace(node, settings=(("kind", "relu6"),)) if node.op == "activation" else node
        for node in bundle.graph.nodes
    ]
    near = dataclasses.replace(bundle, graph=dataclasses.replace(bundle.graph, nodes=tuple(nodes)))
    large = Batch(30 * batch.inputs, batch.targets)
    check_equal(runtime, NumpyRuntime(bundle), large)
    with pytest.raises(ConfigError, match="other losses"):
        check_equal(runtime, NumpyRuntime(near), large)
    with pytest.raises(ConfigError, match="other frozen tensors"):
        check_equal(runtime, NumpyRuntime(dataclasses.replace(bundle, frozen_digest=bytes(32))), batch)


def test_simplified():
    def node(op: str, *inputs: int, **settings: Any) -> Node:
        return Node(op, op, inputs, (), tuple(sorted(settings.items())))

    pad, conv = {"pad": (1, 2, 3, 4)}, {"pad": (10, 10, 10, 10), "groups": 1}
    nodes = [node("pad", 0, **pad), node("conv2d", 1, **conv), node("flatten", 0), node("flatten", 2)]
    (first, second) = simplified(nodes, 4)
    assert first == node("conv2d", 0, pad=(11, 12, 13, 14), groups=1)
    assert second == node("flatten", 1)
    read_twice = [*nodes[:2], node("pad", 1, **pad), node("add", 2, 3)]
    assert simplified(read_twice, 4) == tuple(read_twice)
    assert simplified(nodes, 3) == (node("flatten", 0),)


@pytest.mark.parametrize(("before", "after"), [(8, 4), (7, 3), (5, 8), (1, 6), (6, 6)])
def test_bins_are_those_of_torch(before: int, after: int):
    x = torch.randn(1, 1, before, 1)
    want = F.adaptive_avg_pool2d(x, (after, 1)).reshape(-1)
    np.testing.assert_allclose(_bins(before, after) @ x.reshape(-1).numpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("package", "extra"), [("onnx", "onnx"), ("onnxruntime", "onnx"), ("onnxscript", "export")]
)
def test_packages_that_are_not_installed(package: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    body = (lambda self, x: torch.sin(x)) if package == "onnxscript" else (lambda self, x: x)
    module = built(Calls(body))
    with pytest.raises(MissingExtraError, match=rf"{package}.*baffle-fl\[{extra}\]"):
        from_torch(module, input_shape=SHAPE)
    if package != "onnxscript":
        assert from_torch(module, input_shape=SHAPE, onnx=False).models == {}


# --- the command -----------------------------------------------------------------------------------


def export(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    return command.run(parser.parse_args(words))


def test_a_network_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "bundle"
    assert export("--model", "lenet", "--data", "digits", "--seed", "5", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    bundle = Bundle.read(out)
    assert "26,730 parameters" in printed
    assert "runtime numpy: yes" in printed
    assert "runtime onnx: yes" in printed
    assert bundle.digest.hex() in printed
    assert (bundle.input_shape, len(bundle.classes)) == ((1, 8, 8), 10)
    np.testing.assert_array_equal(bundle.weights(), TorchRuntime(models.build("lenet", 1, 10, 5)).weights())
    assert math.isclose(bundle.scale[0] * 16 + bundle.shift[0], 1) or bundle.scale[0] != 1
    with pytest.raises(ConfigError, match="is there already"):
        export("--out", str(out))
    assert export("--model", "mlp", "--no-onnx", "--out", str(tmp_path / "second")) == 0
    assert "runtime onnx: no" in capsys.readouterr().out


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = TrainConfig.resolve({"model": "mlp", "data": "digits", "seed": 3})
    folder = RunFolder.create(tmp_path / "run", config)
    n = 64 * 256 + 64 + 650
    folder.save_weights(np.full(n, 2, np.float32), np.full(n, 3, np.float32))
    for weights, value in ((), 3), (("--weights", "final"), 2):
        out = tmp_path / f"bundle-{value}"
        assert export("--run", str(tmp_path / "run"), *weights, "--out", str(out)) == 0
        assert set(Bundle.read(out).weights()) == {value}
    for words in (("--run", str(tmp_path / "run"), "--seed", "1"), ("x.onnx", "--model", "mlp")):
        with pytest.raises(ConfigError, match="leave"):
            export(*words, "--out", str(tmp_path / "other"))


def test_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import onnx

    w = np.random.default_rng(0).standard_normal((3, 48)).astype(np.float32)
    info, float_ = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes = [
        onnx.helper.make_node("Flatten", ["x"], ["f"]),
        onnx.helper.make_node("Gemm", ["f", "w"], ["y"], transB=1),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", float_, ["n", 3, None, None])],
        [info("y", float_, ["n", 3])],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    path = tmp_path / "net.onnx"
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]).SerializeToString()
    )
    out = tmp_path / "out"
    words = (str(path), "--input-shape", "3x4x4", "--mean", "0.5,0.25,0", "--std", "0.5", "--out", str(out))
    assert export(*words) == 0
    assert "144 parameters in 1 tensors" in capsys.readouterr().out
    bundle = Bundle.read(out)
    np.testing.assert_array_equal(bundle.weights(), w.ravel())
    np.testing.assert_allclose(255 * bundle.scale + bundle.shift, [1, 1.5, 2], rtol=1e-6)
    np.testing.assert_allclose(bundle.shift, [-1, -0.5, 0], atol=1e-6)
    for wrong, text in (
        (("--mean", "a"), "numbers are needed"),
        (("--mean", "1,2"), "one for each of 3"),
        (("--std", "0"), "positive"),
        (("--input-shape", "3x4"), "say the shape"),
        (("--input-shape", "3xfour"), "whole numbers"),
        (("--trainable", "none"), "no float32 initializer"),
    ):
        with pytest.raises((ConfigError, DataError), match=text):
            export(str(path), "--input-shape", "3x4x4", *wrong, "--out", str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
