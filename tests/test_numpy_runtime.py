"""The NumPy runtime: the contracts in every mode, each operator against torch, slopes, and memory."""

from __future__ import annotations

import copy
import tracemalloc
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from baffle.bundle import Bundle, frozen_digest
from baffle.errors import ConfigError, DataError, PrecisionError
from baffle.estimator import SteinEstimator
from baffle.export.torch import from_torch
from baffle.models import MLP, LeNet, MobileNetV2, WideResNet
from baffle.perturbations import Gaussian, Layout, LowRank
from baffle.runtimes import (
    Batch,
    ExampleRuntime,
    HoldingRuntime,
    activations,
    network,
    strips,
)
from baffle.runtimes import numpy as numpy_runtime
from baffle.runtimes.graph import Graph, Node
from baffle.runtimes.numpy import MODES, NumpyRuntime
from baffle.runtimes.sources import StoredWeights
from baffle.runtimes.torch import TorchRuntime
from baffle.stream import Stream, seed_from
from tests.contracts.runtime import ExampleContract, RuntimeContract

STREAM = Stream(seed_from(3), 1)
ROUNDING = 2.0**-24


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
    return module.eval()


NETWORKS = {
    "lenet": (lambda: LeNet(classes=3, norm="group"), (1, 12, 12)),
    "wrn": (lambda: WideResNet(width=1, classes=3), (3, 8, 8)),
    "mobilenet": (lambda: MobileNetV2(classes=3, width=0.1), (3, 33, 33)),
    "mlp": (lambda: MLP(classes=3, hidden=(20, 7), grid=4), (1, 8, 8)),
}
_made: dict[str, tuple[nn.Module, Bundle]] = {}


def network_of(name):
    """A torch module and its bundle."""
    if name not in _made:
        make, shape = NETWORKS[name]
        module = seeded(make)
        _made[name] = module, from_torch(module, input_shape=shape, onnx=False)
    return _made[name]


def samples(shape, count=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return Batch(rng.normal(size=(count, *shape)).astype(np.float32), rng.integers(0, classes, count))


def exact_loss(module, flat, batch):
    """The mean loss at flat weights in float64, as torch runs modules."""
    twin = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        at = 0
        for p in twin.parameters():
            if p.requires_grad:
                p.copy_(torch.from_numpy(np.array(flat[at : at + p.numel()])).reshape(p.shape))
                at += p.numel()
        assert at == len(flat)
        outputs = twin(torch.from_numpy(batch.inputs.copy()).double())
        return float(F.cross_entropy(outputs, torch.from_numpy(batch.targets.copy())))


# The contracts


class Contract(RuntimeContract, ExampleContract):
    name = "lenet"
    options: ClassVar[dict[str, object]] = {}

    def runtime(self):
        return NumpyRuntime(network_of(self.name)[1], **self.options)

    def batch(self):
        return samples(NETWORKS[self.name][1])

    def oracle(self, weights, batch):
        return exact_loss(network_of(self.name)[0], weights, batch)

    def test_it_is_what_the_estimator_looks_for(self):
        assert isinstance(self.runtime(), ExampleRuntime)
        assert isinstance(self.runtime(), HoldingRuntime)


class TestFull(Contract):
    name, options = "mlp", {"mode": "full"}


class TestLayer(Contract):
    name, options = "lenet", {"mode": "layer"}


class TestStream(Contract):
    name, options = "wrn", {"mode": "stream", "memory": 60_000}


class TestKernel(Contract):
    name, options = "lenet", {"mode": "kernel", "micro_batch": 4}

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        monkeypatch.setattr(network, "BLOCK", 1 << 12)


# Operators, against torch in float64


def run(nodes, x, tensors, loss="mse", **options):
    """The last value (B, ...) of a graph in float64."""
    graph = Graph(x.shape[1:], nodes, loss)
    layout = Layout(tuple(tensors), tuple(t.shape for t in tensors.values()))
    channels = x.shape[1]
    bundle = Bundle(
        name="hand-made",
        layout=layout,
        frozen={},
        frozen_digest=frozen_digest({}),
        input_shape=x.shape[1:],
        classes=("a", "b"),
        scale=np.ones(channels, np.float32),
        shift=np.zeros(channels, np.float32),
        graph=graph,
        initial=np.concatenate([np.empty(0), *(t.ravel() for t in tensors.values())]).astype(np.float32),
    )
    runtime = NumpyRuntime(bundle, arithmetic="float64", **options)
    batch = Batch(x, np.zeros(len(x)))
    out = np.empty((len(x), *graph.shapes({n: t.shape for n, t in tensors.items()})[-1]))

    def give(a, b, values):
        out[a:b] = strips.to_outer(values)

    source = runtime._source(bundle.weights())
    read = runtime._reader(source, STREAM, Gaussian(), 0, 0.0)
    runtime._pass(batch, read, runtime._network.room(len(x)), give)
    return out


def float32s(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wide(array):
    return torch.from_numpy(array.astype(np.float64))


@pytest.fixture(params=[1 << 17, 50], ids=["", "short strips"])
def strip(request, monkeypatch):
    monkeypatch.setattr(network, "_STRIPS", (request.param, request.param))


def node(op, *tensors, inputs=(0,), **values):
    return Node(op, op, inputs, tuple((role, role) for role in tensors), tuple(sorted(values.items())))


@pytest.mark.parametrize(
    ("channels", "size", "outputs", "kernel", "stride", "pad", "dilation", "groups"),
    [
        (3, (9, 7), 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
        (1, (8, 8), 4, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), 1),
        (16, (6, 8), 5, (3, 2), (2, 1), (0, 1, 1, 0), (1, 2), 1),
        (4, (7, 6), 6, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
        (4, (7, 6), 6, (1, 1), (2, 3), (0, 0, 0, 0), (1, 1), 1),
        (4, (7, 6), 6, (1, 1), (1, 1), (1, 0, 2, 1), (1, 1), 1),
        (6, (7, 6), 4, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),
        (6, (7, 6), 12, (3, 3), (2, 2), (0, 0, 1, 1), (1, 1), 6),
        (6, (8, 8), 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 6),
        (6, (7, 8), 6, (3, 3), (2, 2), (1, 1, 0, 1), (1, 1), 6),
        (40, (5, 6), 40, (2, 3), (1, 2), (2, 3, 1, 0), (2, 1), 40),
        (2, (3, 3), 3, (2, 2), (3, 3), (4, 4, 4, 4), (1, 1), 1),
        (2, (5, 4), 3, (5, 4), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("strip")
def test_convolutions(channels, size, outputs, kernel, stride, pad, dilation, groups, bias):
    x, w, b = (
        float32s(5, channels, *size),
        float32s(outputs, channels // groups, *kernel, seed=1),
        float32s(outputs),
    )
    tensors = {"weight": w} | ({"bias": b} if bias else {})
    conv = node("conv2d", *sorted(tensors), stride=stride, pad=pad, dilation=dilation, groups=groups)
    top, left, bottom, right = pad
    want = F.conv2d(
        F.pad(wide(x), (left, right, top, bottom)),
        wide(w),
        wide(b) if bias else None,
        stride,
        0,
        dilation,
        groups,
    )
    for options in ({}, {"micro_batch": 2}, {"mode": "kernel"}):
        np.testing.assert_allclose(run((conv,), x, tensors, **options), want, rtol=1e-12, atol=1e-12)


ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "selu": F.selu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.usefixtures("strip")
def test_activations(kind):
    x = float32s(3, 4, 5, 5) * 4
    x[0, 0, 0] = [0, -0.0, 3, -3, 6]
    x[0, 1, 0] = [100, -100, 1e30, -1e30, 1e-30]
    want = ACTIVATIONS[kind](wide(x))
    alone = node("activation", kind=kind)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if kind != "gelu" else {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(run((alone,), x, {}), want, **tolerance)
    shifted = (node("scale_shift", scale=1, shift=0.0), node("activation", inputs=(1,), kind=kind))
    np.testing.assert_allclose(run(shifted, x, {}), want, **tolerance)
    twice = (alone, node("add", inputs=(0, 1)))
    np.testing.assert_allclose(run(twice, x, {}), want + wide(x), **tolerance)


def test_leaky_relu():
    x = float32s(3, 4)
    want = F.leaky_relu(wide(x), 0.3)
    np.testing.assert_allclose(
        run((node("activation", kind="leaky_relu", slope=0.3),), x, {}), want, rtol=1e-12
    )


def test_the_error_function_is_exact_to_ten_places():
    x = np.concatenate([np.linspace(-7, 7, 20001), [0, -0.0, 1e300, -1e300, np.inf, -np.inf]])
    np.testing.assert_allclose(activations.erf(x), torch.erf(torch.from_numpy(x)), rtol=0, atol=1e-10)
    assert np.isnan(activations.erf(np.array([np.nan]))).all()


@pytest.mark.parametrize("affine", [(), ("bias",), ("bias", "weight")])
@pytest.mark.usefixtures("strip")
def test_norms(affine):
    x = float32s(4, 6, 5, 7) * 3 + 10
    w, b = float32s(6, seed=1), float32s(6, seed=2)
    tensors = {role: {"weight": w, "bias": b}[role] for role in affine}
    weight, bias = (wide(tensors[role]) if role in tensors else None for role in ("weight", "bias"))
    close = {"rtol": 1e-10, "atol": 1e-10}
    for groups in (1, 2, 3, 6):
        got = run((node("group_norm", *affine, groups=groups, eps=1e-5),), x, tensors)
        np.testing.assert_allclose(got, F.group_norm(wide(x), groups, weight, bias, 1e-5), **close)
    vectors = run((node("group_norm", *affine, groups=2, eps=1e-3),), x[:, :, 0, 0].copy(), tensors)
    np.testing.assert_allclose(vectors, F.group_norm(wide(x[:, :, 0, 0]), 2, weight, bias, 1e-3), **close)

    stats = {"mean": float32s(6, seed=3), "var": float32s(6, seed=4) ** 2}
    bn = node("batch_norm", *sorted((*affine, *stats)), eps=1e-3)
    want = F.batch_norm(wide(x), *map(wide, stats.values()), weight, bias, eps=1e-3)
    np.testing.assert_allclose(run((bn,), x, tensors | stats), want, **close)

    for dims in (1, 2, 3):
        shape = x.shape[-dims:]
        own = {role: float32s(*shape, seed=5) for role in affine}
        weight, bias = (wide(own[role]) if role in own else None for role in ("weight", "bias"))
        got = run((node("layer_norm", *affine, dims=dims, eps=1e-5),), x, own)
        np.testing.assert_allclose(got, F.layer_norm(wide(x), shape, weight, bias, 1e-5), **close)


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_behind_a_convolution_is_taken_into_it(groups, bias):
    x, w = float32s(3, 6, 5, 5), float32s(6, 6 // groups, 3, 3, seed=1)
    tensors = {"w": w, "b": float32s(6), "mean": float32s(6, seed=3), "var": float32s(6, seed=4) ** 2}
    tensors |= {"weight": float32s(6, seed=5), "shift": float32s(6, seed=6)}
    roles = (("bias", "b"), ("weight", "w")) if bias else (("weight", "w"),)
    plain = (("dilation", (1, 1)), ("groups", groups), ("pad", (1, 1, 1, 1)), ("stride", (1, 1)))
    norm = (("bias", "shift"), ("mean", "mean"), ("var", "var"), ("weight", "weight"))
    nodes = (
        Node("conv2d", "conv", (0,), roles, plain),
        Node("batch_norm", "norm", (1,), norm, (("eps", 1e-3),)),
        Node("activation", "act", (2,), (), (("kind", "relu6"),)),
    )
    y = F.conv2d(wide(x), wide(w), wide(tensors["b"]) if bias else None, 1, 1, 1, groups)
    y = F.batch_norm(y, *(wide(tensors[n]) for n in ("mean", "var", "weight", "shift")), eps=1e-3)
    for mode in MODES:
        got = run(nodes, x, tensors, mode=mode)
        np.testing.assert_allclose(got, F.relu6(y), rtol=1e-11, atol=1e-11)
    # Where somebody else reads the value between, it is there to be read.
    both = (*nodes, Node("add", "sum", (1, 3)))
    plain_y = F.conv2d(wide(x), wide(w), wide(tensors["b"]) if bias else None, 1, 1, 1, groups)
    np.testing.assert_allclose(run(both, x, tensors), F.relu6(y) + plain_y, rtol=1e-11, atol=1e-11)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_pools(data):
    def pair(low, high):
        return (data.draw(st.integers(low, high)), data.draw(st.integers(low, high)))

    kernel, stride, dilation = pair(1, 4), pair(1, 3), pair(1, 2)
    size = tuple(dilation[d] * (kernel[d] - 1) + 1 + data.draw(st.integers(0, 4)) for d in (0, 1))
    pad = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    x = float32s(2, 3, *size, seed=data.draw(st.integers(0, 9)))
    around = {"kernel": kernel, "stride": stride, "pad": pad * 2}
    got = run((node("max_pool", dilation=dilation, **around),), x, {})
    np.testing.assert_array_equal(got, F.max_pool2d(wide(x), kernel, stride, pad, dilation))
    for count in (0, 1):
        got = run((node("avg_pool", count_pad=count, **around),), x, {})
        want = F.avg_pool2d(wide(x), kernel, stride, pad, count_include_pad=bool(count))
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (4, 6), (3, 5)])
def test_adaptive_pools_and_means(size):
    x = float32s(3, 5, 4, 6)
    got = run((node("adaptive_avg_pool", size=size),), x, {})
    np.testing.assert_allclose(got, F.adaptive_avg_pool2d(wide(x), size), rtol=1e-12, atol=1e-12)
    for keep in (0, 1):
        got = run((node("global_avg_pool", keep=keep),), x, {})
        np.testing.assert_allclose(got, wide(x).mean((2, 3), keepdim=bool(keep)), rtol=1e-12, atol=1e-12)


def test_the_rest():
    x = float32s(3, 4, 5, 2)
    scale = node("global_avg_pool", keep=1)
    for op, combine in (("add", torch.add), ("mul", torch.mul)):
        for inputs in ((0, 1), (1, 0), (0, 0), (1, 1)):
            got = run((scale, node(op, inputs=inputs)), x, {})
            values = [wide(x), wide(x).mean((2, 3), keepdim=True)]
            np.testing.assert_allclose(got, combine(*(values[i] for i in inputs)), rtol=1e-12)
    np.testing.assert_array_equal(run((node("flatten"),), x, {}), x.reshape(3, -1))
    after = (node("scale_shift", scale=2, shift=0.5), node("flatten", inputs=(1,)))
    np.testing.assert_allclose(run(after, x, {}), 2 * x.astype(float).reshape(3, -1) + 0.5)
    got = run((node("pad", pad=(1, 2, 3, 0)),), x, {})
    np.testing.assert_array_equal(got, np.pad(x, ((0, 0), (0, 0), (1, 3), (2, 0))))
    v, w, b = float32s(3, 7), float32s(4, 7, seed=1), float32s(4, seed=2)
    got = run((node("linear", "bias", "weight"),), v, {"bias": b, "weight": w})
    np.testing.assert_allclose(got, F.linear(wide(v), wide(w), wide(b)), rtol=1e-12, atol=1e-12)


def test_the_mean_squared_error():
    graph = Graph((3,), (node("linear", "weight"),), "mse")
    w, x, y = float32s(2, 3), float32s(5, 3), float32s(5, 2, seed=1)
    bundle = Bundle(
        "regression", Layout(("weight",), ((2, 3),)), {}, bytes(32), (3,), (), np.ones(3, np.float32),
        np.zeros(3, np.float32), graph, initial=w.ravel(),
    )  # fmt: skip
    runtime = NumpyRuntime(bundle)
    got = runtime.loss(w.ravel(), Batch(x, y))
    assert got == pytest.approx(float(F.mse_loss(wide(x) @ wide(w).T, wide(y))), rel=64 * ROUNDING)
    with pytest.raises(ConfigError, match="targets have the shape"):
        runtime.loss(w.ravel(), Batch(x, y[:, :1]))


# Slopes


def slopes(runtime, w, batch, scheme, sigma=1e-4, k=6):
    return SteinEstimator(k, sigma, scheme).slopes(runtime, w, batch, STREAM).slopes


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_slopes_in_float64_are_torchs(name, scheme):
    module, bundle = network_of(name)
    batch = samples(NETWORKS[name][1])
    exact = TorchRuntime(copy.deepcopy(module).double())
    w = bundle.weights()
    want = slopes(exact, w, batch, scheme)
    got = slopes(NumpyRuntime(bundle, arithmetic="float64"), w, batch, scheme)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.sqrt(np.mean(want**2)))


@pytest.mark.parametrize("name", NETWORKS)
def test_slopes_in_float32_differ_by_the_rounding_of_losses_alone(name):
    """A loss has a rounding error e; a central difference has (e₊ − e₋)/2σ, so √2·rms(e)/2σ if they are
    independent. rms(e) is measured elsewhere, at W + 0.01·z, against torch in float64; five times that is
    passed by chance in less than one of 10⁵ slopes.
    """
    module, bundle = network_of(name)
    batch, w, sigma = samples(NETWORKS[name][1], 8), bundle.weights(), 1e-4
    runtime = NumpyRuntime(bundle)
    z = [Gaussian().values(STREAM, k, bundle.layout, 0, bundle.layout.n) for k in range(12)]
    points = [(w + np.float32(0.01) * row).astype(np.float32) for row in z]
    errors = [runtime.loss(p, batch) - exact_loss(module, p.astype(np.float64), batch) for p in points]
    error = float(np.sqrt(np.mean(np.square(errors))))
    assert error < 8 * ROUNDING
    want = slopes(TorchRuntime(copy.deepcopy(module).double()), w, batch, "central", sigma, 12)
    got = slopes(runtime, w, batch, "central", sigma, 12)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=5 * np.sqrt(2) * error / (2 * sigma))
    assert np.corrcoef(got, want)[0, 1] > 0.999


@pytest.mark.parametrize("name", NETWORKS)
def test_modes_micro_batches_and_budgets_change_nothing_but_rounding(name, tmp_path, monkeypatch):
    _, bundle = network_of(name)
    batch, w = samples(NETWORKS[name][1], 5), bundle.weights()
    want = NumpyRuntime(bundle).example_losses(w, batch, STREAM, Gaussian(), [1], 0.01)
    monkeypatch.setattr(network, "BLOCK", 1 << 11)
    with StoredWeights.write(tmp_path / "w", [w]) as stored:
        for mode in MODES:
            for micro, memory, source in (
                (None, 8 << 20, stored),
                (1, 8 << 20, w),
                (3, 2 << 20, stored),
                (None, 3 << 17, w),
            ):
                runtime = NumpyRuntime(bundle, mode=mode, micro_batch=micro, memory=memory)
                got = runtime.example_losses(source, batch, STREAM, Gaussian(), [1], 0.01)
                np.testing.assert_allclose(got, want, rtol=64 * ROUNDING, atol=64 * ROUNDING)


def test_directions_of_low_rank_are_made_in_parts_alike():
    module, bundle = network_of("lenet")
    batch, w = samples(NETWORKS["lenet"][1]), bundle.weights()
    want = TorchRuntime(module).losses(w, batch, STREAM, LowRank(2), range(4), 0.05)
    for mode in MODES:
        got = NumpyRuntime(bundle, mode=mode).losses(w, batch, STREAM, LowRank(2), range(4), 0.05)
        np.testing.assert_allclose(got, want, rtol=64 * ROUNDING)


@pytest.mark.parametrize("part", [100, 1000])
def test_parts_of_directions_change_no_bit(part, monkeypatch):
    _, bundle = network_of("wrn")
    batch, w = samples(NETWORKS["wrn"][1]), bundle.weights()
    want = NumpyRuntime(bundle).losses(w, batch, STREAM, Gaussian(), range(2), 0.05)
    monkeypatch.setattr(numpy_runtime, "_PART", part)
    assert NumpyRuntime(bundle).losses(w, batch, STREAM, Gaussian(), range(2), 0.05).tolist() == want.tolist()


# Memory


@pytest.mark.parametrize("name", ["lenet", "wrn", "mobilenet"])
@pytest.mark.parametrize("mode", MODES)
def test_the_predicted_peak_is_what_is_allocated(name, mode, tmp_path):
    _, bundle = network_of(name)
    batch, w = samples(NETWORKS[name][1], 16), bundle.weights()
    runtime = NumpyRuntime(bundle, mode=mode)
    runtime.losses(w, batch, STREAM, Gaussian(), range(1), 0.01)  # the table of quantiles, views of modules
    with StoredWeights.write(tmp_path / "w", [w]) as stored:
        tracemalloc.start()
        try:
            runtime.losses(stored, batch, STREAM, Gaussian(), range(3), 0.01)
            seen = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert 0.8 * runtime.peak(16) < seen <= runtime.peak(16)


def test_a_smaller_budget_takes_less_down_to_one_sample():
    _, bundle = network_of("mobilenet")
    peaks = []
    for memory in (8 << 20, 1 << 20, 1 << 19, 3 << 17):
        runtime = NumpyRuntime(bundle, mode="stream", memory=memory)
        peaks.append(runtime.peak(32))
        assert runtime.peak(32) <= memory + 4 * bundle.layout.n + (1 << 20)
    assert peaks == sorted(peaks, reverse=True)
    with pytest.raises(ConfigError, match="bytes of memory do not hold the activations of 1 sample at"):
        NumpyRuntime(bundle, memory=1 << 16).peak(32)
    with pytest.raises(ConfigError, match="of 32 samples at a time of a batch of 32"):
        NumpyRuntime(bundle, memory=2 << 20, micro_batch=32).peak(32)


def test_what_modes_hold_is_ordered():
    _, bundle = network_of("wrn")
    full, layer, stream, kernel = (NumpyRuntime(bundle, mode=mode).peak(4) for mode in MODES)
    assert full >= layer > stream >= kernel
    assert layer - stream == 4 * bundle.layout.n


# What surrounds the network


def test_bytes_become_inputs_by_the_bundles_scale_and_shift():
    make, shape = NETWORKS["wrn"]
    module = seeded(make)
    scale, shift = np.array([0.01, 0.02, 0.03], np.float32), np.array([-1, 0.5, 0], np.float32)
    bundle = from_torch(module, input_shape=shape, onnx=False, scale=scale, shift=shift)
    raw = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    targets = np.arange(5) % 3
    inputs = (raw * scale[:, None, None] + shift[:, None, None]).astype(np.float32)
    runtime, w = NumpyRuntime(bundle), bundle.weights()
    want = runtime.outputs(w, Batch(inputs, targets))
    np.testing.assert_allclose(runtime.outputs(w, Batch(raw, targets)), want, rtol=1e-5, atol=1e-5)
    other = NumpyRuntime(bundle, normalise=(np.ones(3, np.float32), np.zeros(3, np.float32)))
    raw_floats = runtime.outputs(w, Batch(raw.astype(np.float32), targets))
    np.testing.assert_allclose(other.outputs(w, Batch(raw, targets)), raw_floats, rtol=1e-5, atol=1e-5)


def test_outputs_are_torchs():
    for name, (_, shape) in NETWORKS.items():
        module, bundle = network_of(name)
        batch = samples(shape)
        with torch.no_grad():
            want = module(torch.from_numpy(batch.inputs)).numpy()
        runtime, twin = NumpyRuntime(bundle), TorchRuntime(module)
        assert runtime.layout == twin.layout
        assert runtime.frozen_digest == twin.frozen_digest
        got = runtime.outputs(bundle.weights(), batch)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def frozen():
    module = seeded(lambda: MobileNetV2(classes=3, width=0.35)).freeze_features().eval()
    return module, from_torch(module, input_shape=(3, 32, 32), onnx=False)


def test_the_frozen_prefix_is_run_once_a_batch(frozen, monkeypatch):
    module, bundle = frozen
    batch, w = samples((3, 32, 32)), bundle.weights()
    runtime = NumpyRuntime(bundle)
    assert runtime.has_frozen_prefix
    before = runtime.prefixed(batch)
    assert before.prefixed
    assert runtime.prefixed(before) is before
    with torch.no_grad():
        want = module.embed(torch.from_numpy(batch.inputs)).numpy()
    np.testing.assert_allclose(before.inputs.reshape(6, -1), want, rtol=1e-5, atol=1e-5)
    runs = []
    run = runtime._prefix.run
    monkeypatch.setattr(runtime._prefix, "run", lambda *a: (runs.append(1), run(*a)))
    exact = TorchRuntime(module).losses(w, batch, STREAM, Gaussian(), range(3), 0.1)
    for given_ in (batch, before):
        np.testing.assert_allclose(
            runtime.losses(w, given_, STREAM, Gaussian(), range(3), 0.1), exact, rtol=64 * ROUNDING
        )
    assert len(runs) == 1
    slopes(runtime, w, batch, "central")  # with `holding`
    assert len(runs) == 2


def test_networks_without_a_frozen_prefix_say_so():
    _, bundle = network_of("lenet")
    runtime, batch = NumpyRuntime(bundle), samples((1, 12, 12))
    assert not runtime.has_frozen_prefix
    with pytest.raises(ConfigError, match="no frozen prefix"):
        runtime.prefixed(batch)
    with pytest.raises(ConfigError, match="behind a frozen prefix"):
        runtime.loss(bundle.weights(), batch._replace(prefixed=True))


def test_frozen_tensors_amid_trained_ones(frozen):
    module = seeded(NETWORKS["lenet"][0])
    module.features[4].weight.requires_grad_(False)
    bundle = from_torch(module, input_shape=(1, 12, 12), onnx=False)
    batch, w = samples((1, 12, 12)), bundle.weights()
    want = TorchRuntime(module).losses(w, batch, STREAM, Gaussian(), range(3), 0.05)
    for mode in MODES:
        got = NumpyRuntime(bundle, mode=mode).losses(w, batch, STREAM, Gaussian(), range(3), 0.05)
        np.testing.assert_allclose(got, want, rtol=64 * ROUNDING)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "fast"}, "unknown mode 'fast': use full, layer, stream, kernel"),
        ({"storage": "int4"}, "unknown storage 'int4'"),
        ({"arithmetic": "int8"}, "unknown arithmetic 'int8'"),
        ({"micro_batch": 0}, "micro_batch = 0"),
    ],
)
def test_unknown_settings_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        NumpyRuntime(network_of("mlp")[1], **options)


def test_a_bundle_without_a_graph_names_what_is_missing():
    bundle = network_of("mlp")[1]
    other = Bundle(
        bundle.name, bundle.layout, bundle.frozen, bundle.frozen_digest, bundle.input_shape, bundle.classes,
        bundle.scale, bundle.shift, None, "attention",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="needs another runtime: attention"):
        NumpyRuntime(other)


def test_data_that_does_not_fit_is_refused():
    bundle = network_of("mlp")[1]
    runtime, w, batch = NumpyRuntime(bundle), bundle.weights(), samples((1, 8, 8))
    for inputs in (batch.inputs[:, :, :4], batch.inputs[:0]):
        with pytest.raises(ConfigError, match="inputs have the shape"):
            runtime.loss(w, Batch(inputs, batch.targets[: len(inputs)]))
    with pytest.raises(ConfigError, match="6 inputs and 5 targets"):
        runtime.loss(w, Batch(batch.inputs, batch.targets[:5]))
    for target in (-1, 3):
        with pytest.raises(DataError, match="outside the 3 classes"):
            runtime.loss(w, Batch(batch.inputs, np.full(6, target)))
    with pytest.raises(ConfigError, match="class numbers"):
        runtime.loss(w, Batch(batch.inputs, batch.targets.astype(float)))


def test_sigma_is_checked_against_the_arithmetic():
    bundle = network_of("mlp")[1]
    for arithmetic, usable in (("float64", 1e-8), ("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 1e-2)):
        runtime = NumpyRuntime(bundle, arithmetic=arithmetic)
        assert runtime.arithmetic == arithmetic
        runtime.check_sigma(usable)
        with pytest.raises(PrecisionError, match=f"{arithmetic} arithmetic resolves"):
            runtime.check_sigma(usable / 2)
    NumpyRuntime(bundle, storage="int8").check_sigma(1e-4)
