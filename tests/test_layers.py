"""Directions in one layer at a time: values, what a runtime keeps, how counts are dealt out, whole jobs."""

from __future__ import annotations

import copy
import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import fx, nn

import baffle
from baffle import kernels
from baffle.aggregation import IntegerSum, OpenSeal
from baffle.checkpoint import ScalarLog, load_checkpoint, replay, save_checkpoint
from baffle.client import Client
from baffle.config import TrainConfig
from baffle.dealing import Deal, _shares, squares_of_gradient, squares_of_slopes
from baffle.errors import AggregationError, ConfigError
from baffle.estimator import SteinEstimator
from baffle.export.torch import from_torch
from baffle.job import build as job_of
from baffle.models import MobileNetV2, build
from baffle.perturbations import Gaussian, Layers, Layout, gaussian_table, perturbation_from_spec
from baffle.plan import LocalSteps, LocalTraining, RoundPlan, RoundResult, RoundSum
from baffle.runtimes import Batch, LayerCost, LayerRuntime
from baffle.runtimes.arrays import TorchArrays
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.pruned import Pruned
from baffle.runtimes.torch import TorchRuntime
from baffle.server import Server
from baffle.simulation import random_drops, simulate
from baffle.stream import Stream, seed_from

STREAM = Stream(seed_from(7), 3)
# Layers of 10, 1, 12 and 4 parameters.
LAYOUT = Layout(("a.w", "a.b", "scale", "b.c.w", "b.d"), ((2, 3), (4,), (), (3, 4), (4,)))
SOME = Layers((3, 1, 5, 4))  # the second and the last along coordinates
M4 = float(np.mean((gaussian_table() / 4096.0) ** 4))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(values):
    return np.ascontiguousarray(values).view(np.uint32)


def naive(layers, layout, k, stream=STREAM):
    """z_k by the definition, from Gaussian values of the whole vector and Python's floats."""
    z = np.zeros(layout.n, np.float32)
    gauss = Gaussian().values(stream, k, Layout.flat(layout.n), 0, layout.n).tolist()
    K, before = sum(layers.counts), 0
    for count, (_, start, stop) in zip(layers.counts, layout.layers, strict=True):
        if before <= k < before + count:
            if count == stop - start:
                z[start + k - before] = math.sqrt(K)
            else:
                z[start:stop] = [g * math.sqrt(K / count) for g in gauss[start:stop]]
        before += count
    return z


# -- values ----------------------------------------------------------------------------------------------


def test_directions_are_their_definition():
    for layers in (SOME, Layers((10, 1, 12, 4)), Layers((1, 1, 1, 1))):
        for k in range(layers.directions):
            made = layers.values(STREAM, k, LAYOUT, 0, LAYOUT.n)
            assert made.dtype == np.float32
            assert np.array_equal(bits(made), bits(naive(layers, LAYOUT, k)))


@pytest.mark.parametrize("arrays", [None, TorchArrays("cpu")], ids=["numpy", "torch"])
def test_any_slice_of_any_range_is_a_part_of_the_whole(arrays):
    options = {} if arrays is None else {"arrays": arrays}
    whole = np.array([naive(SOME, LAYOUT, k) for k in range(SOME.directions)])
    for some in (range(13), range(2, 5), range(12, -1, -1), range(0, 13, 3), range(7, 8)):
        for start, stop in ((0, 27), (9, 12), (10, 11), (11, 23), (5, 5), (26, 27), (3, 25)):
            made = np.asarray(SOME.values(STREAM, some, LAYOUT, start, stop, **options))
            assert np.array_equal(bits(made), bits(whole[list(some), start:stop]))
    for k, start in itertools.product(range(13), range(27)):
        made = np.asarray(SOME.values(STREAM, k, LAYOUT, start, 27, **options))
        assert np.array_equal(bits(made), bits(whole[k, start:]))


def test_large_layers_have_the_same_bits_by_kernels_and_by_torch():
    layout, layers = Layout(("a.w", "b.w"), ((90, 100), (6000,))), Layers((2, 3))
    for k in range(5):
        expected = bits(naive(layers, layout, k))
        assert np.array_equal(bits(layers.values(STREAM, k, layout, 0, layout.n)), expected)
        made = layers.values(STREAM, k, layout, 0, layout.n, TorchArrays("cpu"))
        assert np.array_equal(bits(made.numpy()), expected)


def test_what_lies_outside_is_refused():
    for k in (-1, 13, 1 << 32, range(0), range(-1, 3), range(12, 14)):
        with pytest.raises(ConfigError):
            SOME.values(STREAM, k, LAYOUT, 0, 5)
    for start, stop in ((-1, 2), (3, 2), (0, 28)):
        with pytest.raises(ConfigError):
            SOME.values(STREAM, 0, LAYOUT, start, stop)


@pytest.mark.parametrize(
    "counts", [(1, 2, 1), (1, 2, 1, 1, 1), (11, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 1 << 31)]
)
def test_counts_of_another_layout_are_refused_before_anything_is_made(counts):
    layers = Layers(counts)
    with pytest.raises(ConfigError) as caught:
        layers.values(STREAM, 0, LAYOUT, 0, LAYOUT.n)
    assert "\n" not in str(caught.value)
    runtime = TorchRuntime(nn.Linear(2, 2))
    estimator = SteinEstimator(layers.directions, 1e-3, perturbation=layers)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="layers"):
            estimator.slopes(runtime, runtime.weights(), points(2, 2, 2), STREAM)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "counts", [(), (0,), (3, 0), (-1,), (1.5,), (1 << 32,), (1 << 31, 1 << 31), (1,) * 600]
)
def test_counts_that_cannot_be(counts):
    with pytest.raises(ConfigError) as caught:
        Layers(counts)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "layers",
            "layers:",
            "layers:0",
            "layers:3.0",
            "layers:03",
            "layers:3.04",
            "layers:3.",
            "layers:.3",
        ),
        *("layers:3..4", "layers:+3", "layers: 3", "layers:3 ", "layers:3,4", "layers:²", "layers:١"),
        *("layers:3\n", "layers:4294967296", "layers:4294967295.1"),
        *("layers:" + "9" * 5000, "layers:" + "1." * 600 + "1"),
    ],
)
def test_names_that_cannot_be(spec):
    with pytest.raises(ConfigError) as caught:
        perturbation_from_spec(spec)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("counts", [(1,), (3, 1, 5), ((1 << 32) - 1,), (9,) * 497, (1234567,) * 120])
def test_names_and_plans_come_back(counts):
    layers = Layers(counts)
    assert perturbation_from_spec(layers.spec) == layers
    estimator = SteinEstimator(layers.directions, perturbation=layers)
    plan = RoundPlan(5, bytes(32), estimator, bytes(32), fidelity="law")
    assert RoundPlan.decode(plan.encode()) == plan
    for K in (layers.directions - 1, layers.directions + 1):
        with pytest.raises(ConfigError):
            SteinEstimator(K, perturbation=layers)


def test_all_slopes_or_none_make_a_gradient():
    estimator = SteinEstimator(13, perturbation=SOME)
    slopes = np.random.default_rng(0).normal(size=13)
    with pytest.raises(ConfigError, match="needed"):
        estimator.gradient(slopes[:12], STREAM, LAYOUT)
    with pytest.raises(ConfigError, match="needed"):
        estimator.gradient(slopes, STREAM, LAYOUT, first=1)


def test_gradients_are_their_naive_sum():
    """Float64, k ascending, multiply then add, one division: the bits of a loop, by any chunk and library."""
    rng = np.random.default_rng(1)
    large = Layout(("a.w", "b.w", "c.w"), ((70, 90), (3,), (5000,)))
    for layout, layers in ((LAYOUT, SOME), (large, Layers((20, 3, 5)))):
        slopes = rng.normal(size=layers.directions) * 10.0 ** rng.integers(-9, 9, layers.directions)
        total = np.zeros(layout.n)
        for k, slope in enumerate(slopes):
            total = naive(layers, layout, k).astype(np.float64) * slope + total
        expected = bits((total / layers.directions).astype(np.float32))
        estimator = SteinEstimator(layers.directions, perturbation=layers)
        for options in ({}, {"chunk": 11 * 7 * 5 * 3}, {"threads": 1}, {"arrays": TorchArrays("cpu")}):
            made = np.asarray(estimator.gradient(slopes, STREAM, layout, **options))
            assert np.array_equal(bits(made), expected)


def test_the_mean_of_all_products_is_the_identity():
    """Σ_k z_k z_kᵀ / K: exactly I along coordinates and 0 between layers, I in the mean elsewhere."""
    rounds, n = 1500, LAYOUT.n
    products = np.empty((rounds, n, n))
    for r in range(rounds):
        z = SOME.values(Stream(seed_from(2), r), range(13), LAYOUT, 0, n).astype(np.float64)
        products[r] = z.T @ z / 13
    layer = np.repeat(np.arange(4), [10, 1, 12, 4])
    exact = (layer[:, None] != layer) | (layer == 1) | (layer == 3)
    assert np.abs(products[:, exact] - np.eye(n)[exact]).max() < 1e-6  # √13 in float32
    error = products.std(axis=0) / math.sqrt(rounds)
    assert np.all(np.abs(products.mean(axis=0) - np.eye(n))[~exact] < 5 * error[~exact])
    assert error.max() < 0.1


@pytest.mark.parametrize("way", ["directions", "law"])
def test_mean_and_variance_of_the_estimate(way):
    """E ĝ = g; E |ĝ − g|² = Σ_b |g_b|² (n_b + M₄ − 2) / K_b over layers that are not measured exactly."""
    rounds, rng = 2000, np.random.default_rng(3)
    g = (rng.normal(size=LAYOUT.n) * np.repeat([3, 1, 0.3, 1], [10, 1, 12, 4])).astype(np.float32)
    estimator, made = SteinEstimator(13, perturbation=SOME), np.empty((rounds, LAYOUT.n))
    for r in range(rounds):
        stream = Stream(seed_from(4), r)
        if way == "law":
            made[r] = estimator.simulated(
                g, stream, LAYOUT, Stream(seed_from(5), r).seed[:-4] + r.to_bytes(4)
            )
        else:
            z = SOME.values(stream, range(13), LAYOUT, 0, LAYOUT.n).astype(np.float64)
            made[r] = (z @ g) @ z / 13
    off = made - g
    assert np.abs(off[:, [10, *range(23, 27)]]).max() < 1e-5
    assert np.all(np.abs(off.mean(axis=0)) <= 5 * off.std(axis=0) / math.sqrt(rounds) + 1e-6)
    for start, stop, K in ((0, 10, 3), (11, 23, 5)):
        part, squared = g[start:stop].astype(np.float64), (off[:, start:stop] ** 2).sum(axis=1)
        fourth = (M4 if way == "directions" else 3.0) - 2
        exact = (part @ part * (stop - start) + fourth * part @ part) / K
        error = squared.std() / math.sqrt(rounds)
        assert abs(squared.mean() - exact) < 5 * error < 0.3 * exact


# -- layers of a layout ----------------------------------------------------------------------------------


def test_layers_of_layouts():
    assert LAYOUT.layers == (("a", 0, 10), ("", 10, 11), ("b.c", 11, 23), ("b", 23, 27))
    assert Layout.flat(9).layers == (("", 0, 9),)
    undotted = Layout(("w", "b", "v"), ((2,), (3,), (4,)))
    assert undotted.layers == (("", 0, 9),)
    apart = Layout(("a.w", "b.w", "a.b"), ((2,), (3,), (4,)))
    assert apart.layers == (("a", 0, 2), ("b", 2, 5), ("a", 5, 9))
    empty = Layout(("a.w", "b.w", "c.w", "c.b"), ((2,), (0,), (0, 3), (4,)))
    assert empty.layers == (("a", 0, 2), ("c", 2, 6))
    assert Layers((1, 4)).values(STREAM, 4, empty, 0, 6).tolist() == [0, 0, 0, 0, 0, np.float32(math.sqrt(5))]


def network(name):
    if name == "mobilenet's head":
        return MobileNetV2(4, 0.35).freeze_features()
    return build(name, 3, 10, seed=0)


@pytest.mark.parametrize("name", ["lenet", "wrn-10-2", "mlp", "mobilenet-v2", "mobilenet's head"])
def test_layers_of_networks_are_their_modules(name):
    module = network(name)
    layout = TorchRuntime(module).layout
    expected, at = [], 0
    for path, part in module.named_modules():
        own = sum(p.numel() for p in part.parameters(recurse=False) if p.requires_grad)
        if own:
            expected.append((path, at, at + own))
            at += own
    assert list(layout.layers) == expected
    assert at == layout.n
    assert len(expected) == {"lenet": 3, "mlp": 2, "mobilenet's head": 1}.get(name, len(expected))
    assert len(Layers((99999,) * len(expected)).spec) < 1000 or len(expected) > 160


# -- the torch runtime -----------------------------------------------------------------------------------


def points(count=5, width=6, classes=3):
    rng = np.random.default_rng(1)
    return Batch(rng.normal(size=(count, width)).astype(np.float32), rng.integers(0, classes, count))


def pictures(count=3, channels=3, size=8, classes=3):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(count, channels, size, size)).astype(np.float32)
    return Batch(x, rng.integers(0, classes, count))


def made(module, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module()


class Tied(nn.Module):
    """The first layer's weight is the last layer's too, and a scale of its own lies in between."""

    def __init__(self):
        super().__init__()
        self.enter, self.middle, self.leave = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.leave.weight = nn.Parameter(self.enter.weight.detach().T.clone())
        self.again = nn.Linear(6, 4)
        self.again.weight = self.enter.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.again(self.leave(torch.tanh(self.middle(torch.tanh(self.enter(x) * self.scale)))))


class Branching(nn.Module):
    """Control flow that depends on values: not to be traced."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.second(h if h.sum() > 0 else h * 2 + 1)


class Two(nn.Module):
    """Two tensors cross the cut before the second layer, and one of them a shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.third((torch.tanh(self.second(h)) + h).view(x.size(0), -1))


def frozen_start():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(),
        nn.Flatten(), nn.Linear(144, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    module[0].requires_grad_(False)
    module[3].running_mean.normal_()
    module[3].running_var.uniform_(0.5, 2.0)
    return module


NETWORKS = {
    "lenet": (lambda: build("lenet", 3, 3, 0, channels=(4, 8)), pictures),
    "lenet with norms": (lambda: build("lenet", 3, 3, 0, channels=(4, 8), norm="group"), pictures),
    "wrn-10-2": (lambda: build("wrn-10-2", 3, 3, 0), lambda: pictures(2)),
    "mlp": (lambda: build("mlp", 1, 3, 0, hidden=(5, 4), grid=4), lambda: pictures(4, 1)),
    "tied": (lambda: made(Tied), lambda: points(classes=4)),
    "branching": (lambda: made(Branching), points),
    "two": (lambda: made(Two), points),
    "frozen start": (lambda: made(frozen_start), pictures),
}
BY_NAME = pytest.mark.parametrize("name", NETWORKS)


def a_few(layout, most=3):
    """Some directions of each layer, small layers along coordinates."""
    sizes = [stop - start for _, start, stop in layout.layers]
    return Layers(tuple(size if size <= 4 else min(most, size) for size in sizes))


def sample_losses(module, flat, batch):
    """(B,) at flat float64 weights of the trainable parameters, by the module itself in float64."""
    twin = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        own = [p for p in twin.parameters() if p.requires_grad]
        nn.utils.vector_to_parameters(torch.from_numpy(flat), own)
        outputs = twin(torch.from_numpy(batch.inputs).double())
        return nn.functional.cross_entropy(outputs, torch.from_numpy(batch.targets), reduction="none").numpy()


@BY_NAME
def test_losses_are_the_modules_own_at_W_plus_sigma_z(name):
    make, feed = NETWORKS[name]
    module, batch = make().double(), feed()
    runtime = TorchRuntime(module)
    layers, layout = a_few(runtime.layout), runtime.layout
    rng = np.random.default_rng(6)
    weights = (runtime.weights() + rng.normal(0, 0.05, layout.n)).astype(np.float32)
    order = rng.permutation(layers.directions)[:40].tolist()
    expected = np.array(
        [
            sample_losses(module, weights + 0.02 * naive(layers, layout, k).astype(np.float64), batch)
            for k in order
        ]
    )
    losses = runtime.losses(weights, batch, STREAM, layers, order, 0.02)
    assert np.abs(losses - expected.mean(axis=1)).max() < 1e-12
    apart = runtime.example_losses(weights, batch, STREAM, layers, order, 0.02)
    assert np.abs(apart - expected).max() < 1e-12
    assert np.ptp(expected.mean(axis=1)) > 1e-4  # so that one direction is told from another
    with runtime.holding(batch):
        again = runtime.losses(weights, batch, STREAM, layers, sorted(order), 0.02)
    assert np.abs(again - losses[np.argsort(order)]).max() < 1e-13
    at_W = runtime.losses(weights, batch, STREAM, layers, [0, 1], 0.0)
    assert np.array_equal(at_W, np.repeat(runtime.loss(weights, batch), 2))
    assert runtime.losses(weights, batch, STREAM, layers, [], 0.02).shape == (0,)


@BY_NAME
def test_what_lies_before_a_layer_is_computed_once(name):
    """Calls of each module, by hooks: two of what runs before the layer's own (the loss at W, and what
    is kept), one a direction of the layer's own."""
    make, feed = NETWORKS[name]
    module, batch, calls = make().double(), feed(), {}
    leaves = {path: part for path, part in module.named_modules() if not list(part.children())}
    for path, part in leaves.items():
        part.register_forward_hook(lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1}))
    with torch.no_grad():
        module.eval()(torch.from_numpy(batch.inputs).double())
    order = list(calls)  # as they run
    runtime = TorchRuntime(module)
    layers = Layers(tuple(min(stop - start, 7) for _, start, stop in runtime.layout.layers))
    runtime.losses(runtime.weights(), batch, STREAM, layers, [0], 0.02)  # cuts the module, once and for all
    looked = 0
    parts = zip(runtime.layout.layers, layers.parts(runtime.layout), strict=True)
    for (path, *_), (own, *_) in parts:
        if path not in leaves:
            continue
        calls.clear()
        runtime.losses(runtime.weights(), batch, STREAM, layers, own, 0.02)
        assert len(own) < calls[path] <= len(own) + 2
        before = order[: order.index(path)]
        if name == "branching":
            assert all(calls[other] > len(own) for other in before)
        else:
            assert all(calls[other] <= 2 for other in before)
        looked += 1
    assert looked > 1


def test_the_costs_of_lenet_by_hand():
    """Multiplications of products and convolutions, and one for each element of any other result."""
    for size, count, (a, b) in ((28, 8, (8, 32)), (20, 8, (4, 16))):
        runtime = TorchRuntime(build("lenet", 3, 3, 0, channels=(a, b)))
        batch = pictures(count, size=size)
        first, second = a * size**2 * 3 * 25, b * (size // 2) ** 2 * a * 25
        last = b * 3
        between = a * size**2 + a * (size // 2) ** 2  # activation, pooling
        behind = b * (size // 2) ** 2 + b  # activation, mean
        whole = first + between + second + behind + last
        by_hand = (1.0, (second + behind + last) / whole, last / whole)
        costs = runtime.layer_costs(batch)
        directions, coordinates = np.array(costs).T
        assert directions[0] == 1.0
        # The count has all results, of a loss and of cutting W into tensors too, which is little.
        assert np.abs(directions - by_hand).max() < 0.006
        # Of a coordinate of the first layer: one input channel of the second, and what each step changes; of
        # one of the second: one channel of its sums, through two steps, and one input of the last.
        products = (second / a + last, b * 3 / b, 0)
        elements = (
            a * size**2 / a * 4 + (size // 2) ** 2 + b * (size // 2) ** 2 * 3,
            (size // 2) ** 2 * 4 + 1,
            3,
        )
        of_coordinates = [(2 * p + 16 * e) / whole for p, e in zip(products, elements, strict=True)]
        assert np.allclose(coordinates, of_coordinates, rtol=0.05, atol=5e-4)
        assert isinstance(runtime, LayerRuntime)


def test_forward_passes_are_what_directions_cost():
    module, batch = build("lenet", 3, 3, 0, channels=(4, 8)), pictures()
    runtime, layers = TorchRuntime(module), Layers((5, 20, 10))
    first, second, last = (cost.direction for cost in runtime.layer_costs(batch))
    spent = math.ceil(5 * first + 20 * second + 10 * last)
    assert 13 < spent < 30
    once = 1 + 3 + spent  # the loss at W, and what is kept for each of three layers
    for scheme, passes in (("forward", 1 + once), ("central", 2 * once), ("tangent", 70)):
        estimator = SteinEstimator(35, 1e-3, scheme, layers)
        assert estimator.slopes(runtime, runtime.weights(), batch, STREAM).forward_passes == passes
        assert estimator.simulated_passes(runtime, batch) == passes
    exact = Layers((304, 20, 27))
    first, last = runtime.layer_costs(batch)[0].coordinate, runtime.layer_costs(batch)[2].coordinate
    spent = math.ceil(304 * first + 20 * second + 27 * last)
    passes = SteinEstimator(351, 1e-3, perturbation=exact).simulated_passes(runtime, batch)
    assert passes == 2 + 3 + spent < 304
    pruned = Pruned(runtime, np.arange(runtime.layout.n) % 2 == 0)  # no runtime with costs: whole passes
    assert not isinstance(pruned, LayerRuntime)
    measured = SteinEstimator(35, 1e-3, perturbation=layers).slopes(pruned, pruned.weights(), batch, STREAM)
    assert measured.forward_passes == 36


def correlated(made, exact):
    return np.corrcoef(made, exact)[0, 1]


@pytest.mark.parametrize("name", ["program", "lenet", "wrn-10-2", "mlp", "two"])
def test_float32_slopes_are_as_good_as_those_of_gaussian_directions(name):
    """At σ = 1e-4, against autograd: root mean squares of what is off, as a share of that of the slopes."""
    if name == "program":  # of whose channels the compiled kernels are
        module, batch = build("lenet", 3, 10, 0, channels=(16, 32)), pictures(4, classes=10)
    else:
        make, feed = NETWORKS[name]
        module, batch = make(), feed()
    runtime = TorchRuntime(module)
    layout, weights = runtime.layout, runtime.weights()
    layers = a_few(layout, 12 if name == "wrn-10-2" else 40)
    g, _ = runtime.gradient(weights, batch)
    off = {}
    for kind in (Gaussian(), layers):
        estimator = SteinEstimator(layers.directions, perturbation=kind)
        slopes = estimator.slopes(runtime, weights, batch, STREAM).slopes
        exact = estimator.exact_slopes(g, STREAM, layout)
        off[kind] = np.sqrt(np.mean((slopes - exact) ** 2) / np.mean(exact**2))
        assert correlated(slopes, exact) > 0.99
    # Where a layer has few directions they are long, and the loss curves more along them.
    assert off[layers] < 4 * off[Gaussian()] < 0.2


def test_a_part_that_two_images_enter_is_a_program_too():
    """Behind a cut inside a residual block: the branch and the shortcut."""
    if not kernels.available():
        pytest.skip("BAFFLE_KERNELS=0")
    module, batch = build("wrn-10-2", 3, 3, 0), pictures(2, size=16)
    runtime = TorchRuntime(module)
    layers, weights = a_few(runtime.layout, 2), runtime.weights()
    losses = runtime.losses(weights, batch, STREAM, layers, range(layers.directions), 0.01)
    expected = [
        sample_losses(
            module, weights + 0.01 * naive(layers, runtime.layout, k).astype(np.float64), batch
        ).mean()
        for k in range(layers.directions)
    ]
    assert np.abs(losses - expected).max() < 1e-5 * np.ptp(expected) / 0.01
    parts = [layer.part.module for layer in runtime._layered._layers]
    programs = [layer.sweeps._program for layer in runtime._layered._layers]
    entered = [
        sum(node.op == "placeholder" for node in getattr(part, "graph", fx.Graph()).nodes) for part in parts
    ]
    assert (
        sum(count > 1 and program is not None for count, program in zip(entered, programs, strict=True)) > 1
    )


def test_numpy_gives_the_same_slopes_by_whole_passes():
    module, batch = build("lenet", 3, 3, 0, channels=(4, 8)), pictures()
    torch_runtime = TorchRuntime(module)
    numpy_runtime = NumpyRuntime(
        from_torch(
            module,
            input_shape=(3, 8, 8),
            name="lenet",
            classes=("a", "b", "c"),
            scale=(1.0,) * 3,
            shift=(0.0,) * 3,
        )
    )
    layers = Layers((4, 6, 27))
    estimator, weights = SteinEstimator(37, 1e-3, perturbation=layers), torch_runtime.weights()
    kept = estimator.slopes(torch_runtime, weights, batch, STREAM)
    whole = estimator.slopes(numpy_runtime, weights, batch, STREAM)
    assert whole.forward_passes == 38 > kept.forward_passes
    assert not isinstance(numpy_runtime, LayerRuntime)
    # Losses of about 1 with float32's rounding, over σ.
    assert np.abs(whole.slopes - kept.slopes).max() < 20 * 2.0**-23 / 1e-3
    assert np.abs(kept.slopes).max() > 0.5


# -- dealing out -----------------------------------------------------------------------------------------


def variance(squares, sizes, counts):
    """Σ |g_b|² n_b / K_b."""
    return float(np.sum(np.array(squares) * sizes / counts))


def relaxed(squares, sizes, costs, passes):
    """The least Σ |g_b|² n_b / K_b with 1 ≤ K_b ≤ n_b and Σ c_b K_b ≤ passes, K_b real: by scipy."""
    sizes, costs, squares = (np.array(x, float) for x in (sizes, costs, squares))
    v = squares * sizes / (squares * sizes).max()
    start = 1 + (sizes - 1) * min(1.0, (passes - costs.sum()) / (costs @ (sizes - 1) + 1e-9))
    found = minimize(
        lambda u: np.sum(v * np.exp(-u)),
        np.log(start),
        jac=lambda u: -v * np.exp(-u),
        bounds=[(0.0, math.log(n)) for n in sizes],
        constraints={
            "type": "ineq",
            "fun": lambda u: (passes - costs @ np.exp(u)) / passes,
            "jac": lambda u: -costs * np.exp(u) / passes,
        },
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    assert found.success
    return np.exp(found.x)


def left(squares, sizes, counts):
    """The variance that is left: layers with as many directions as parameters are exact."""
    sizes, counts = np.array(sizes), np.array(counts)
    return variance(np.where(counts < sizes, squares, 0.0), sizes, counts)


def alike(*costs):
    return tuple(LayerCost(cost, cost) for cost in costs)


def test_shares_are_the_best_real_ones():
    rng = np.random.default_rng(8)
    capped = least = 0
    for _ in range(60):
        layers = int(rng.integers(1, 7))
        sizes = rng.integers(1, 10 ** rng.integers(1, 5), layers).astype(float)
        costs = np.sort(rng.uniform(0.02, 1, layers))[::-1]
        squares = 10.0 ** rng.uniform(-3, 3, layers)
        passes = float(costs.sum() + rng.exponential(500))
        counts = _shares(passes, sizes, costs, squares)
        best = variance(squares, sizes, relaxed(squares, sizes, costs, passes))
        assert best * (1 - 1e-4) <= variance(squares, sizes, counts) <= best * (1 + 1e-4)
        assert min(passes, costs @ sizes) * (1 - 1e-9) <= costs @ counts <= passes * (1 + 1e-9)
        capped += np.any((counts == sizes) & (sizes > 1))
        least += np.any((counts == 1) & (sizes > 1))
    assert capped > 5
    assert least > 2


def test_the_layers_that_are_measured_exactly_are_worth_it():
    """Against every choice of such layers, the others having real shares of what is left."""
    rng = np.random.default_rng(10)
    worse, exact = [], 0
    for _ in range(80):
        layers = int(rng.integers(1, 5))
        sizes = rng.integers(2, 10 ** rng.integers(1, 4), layers)
        directions = np.sort(rng.uniform(0.05, 1, layers))[::-1]
        coordinates = directions * 10.0 ** rng.uniform(-2, 0, layers)
        costs = tuple(map(LayerCost, directions.tolist(), coordinates.tolist()))
        squares = 10.0 ** rng.uniform(-2, 2, layers)
        passes = float(directions.sum() + rng.exponential(200))
        counts = np.array(Deal(passes, tuple(sizes.tolist()), costs).counts(squares))
        here = counts == sizes
        assert np.where(here, coordinates, directions) @ counts <= passes * (1 + 1e-9)
        found = []
        for chosen in itertools.product((False, True), repeat=layers):
            some = np.array(chosen)
            rest = passes - (sizes * coordinates)[some].sum()
            if rest >= directions[~some].sum():
                shares = sizes.astype(float)
                if not some.all():
                    shares[~some] = _shares(
                        rest, sizes[~some].astype(float), directions[~some], squares[~some]
                    )
                found.append(left(squares, sizes, shares))
        whole = left(
            squares, sizes, np.where(here, counts, np.minimum(counts + 1, sizes - 1))
        )  # not rounded down
        worse.append((whole + 1e-9) / (min(found) + 1e-9))
        exact += here.any() and not here.all()
    assert exact > 5
    assert (
        np.mean(np.array(worse) > 1.0001) < 0.1
    )  # one layer after the other is nearly always the best choice


def test_counts_against_all_that_there_are():
    """Whole counts, every one tried: rounding down costs little."""
    rng = np.random.default_rng(9)
    for _ in range(15):
        sizes, costs = np.array([50, 60, 40]), (1.0, *np.sort(rng.uniform(0.1, 1, 2))[::-1])
        squares, passes = 10.0 ** rng.uniform(-1, 1, 3), 60.0
        counts = Deal(passes, tuple(sizes.tolist()), alike(*costs)).counts(squares)
        grid = np.stack(np.meshgrid(*(np.arange(1, n + 1) for n in sizes), indexing="ij")).reshape(3, -1)
        paid = grid[:, np.array(costs) @ grid <= passes]
        noisy = np.where(paid < sizes[:, None], squares[:, None] * sizes[:, None] / paid, 0.0).sum(axis=0)
        assert noisy.min() * (1 - 1e-12) <= left(squares, sizes, counts) < 1.08 * noisy.min()
        even = np.maximum(1, np.floor(passes / sum(costs)))  # to each as many
        assert left(squares, sizes, counts) < 1.02 * left(squares, sizes, np.minimum(even, sizes))


def test_what_can_be_had_exactly_is():
    costs = (LayerCost(1.0, 0.1), LayerCost(0.9, 0.002), LayerCost(0.001, 0.0005))
    assert Deal(90.0, (400, 25000, 600), costs).counts() != (400, 25000, 600)
    for squares in (None, np.array([1e-9, 1.0, 1e9])):
        assert Deal(91.0, (400, 25000, 600), costs).counts(squares) == (400, 25000, 600)


def test_degenerate_looks():
    deal = Deal(100.0, (1000, 2000, 10), alike(1.0, 0.5, 0.1))
    as_ever = deal.counts()
    assert deal.counts(np.array([1000.0, 2000.0, 10.0])) == as_ever
    for bad in ([0, 0, 0], [math.nan, 1, 1], [1, math.inf, 1], [1, -1, 1]):
        assert deal.counts(np.array(bad, float)) == as_ever
        before = np.array([1.0, 2.0, 3.0])
        assert deal.looked(before, np.array(bad, float)) is before
        assert deal.looked(None, np.array(bad, float)) is None
    assert deal.counts(np.array([0.0, 1.0, 0.0])) == (1, 197, 1)
    assert deal.counts(np.array([0.0, 0.0, 1.0])) == (
        1,
        1,
        10,
    )  # exactly, and there is nothing else to measure
    assert deal.counts(np.array([1e-300, 1e300, 1e-300])) == (1, 197, 1)
    assert deal.counts(np.array([5e-324] * 3))[2] == 10
    after = deal.looked(np.array([1.0, 2.0, 3.0]), np.array([11.0, 2.0, 3.0]))
    assert np.allclose(after, [2.0, 2.0, 3.0])
    assert Deal(1e9, (1000, 2000, 10), alike(1.0, 0.5, 0.1)).counts() == (1000, 2000, 10)


def test_deals_that_cannot_be():
    Deal(1.6, (5, 6, 7), alike(1.0, 0.5, 0.1)).counts()
    for passes, sizes, costs in (
        (1.5, (5, 6, 7), (1.0, 0.5, 0.1)),
        (9.0, (5, 6, 7), (1.0, 0.5)),
        (9.0, (), ()),
        (9.0, (5, 6), (1.0, 0.0)),
        (9.0, (5, 6), (1.0, 1.5)),
        (9.0, (5, 6), (1.0, math.nan)),
        (math.nan, (5, 6), (1.0, 1.0)),
    ):
        with pytest.raises(ConfigError):
            Deal(passes, sizes, alike(*costs))
    for cost in (LayerCost(0.5, 0.6), LayerCost(0.5, 0.0), LayerCost(0.5, math.nan)):
        with pytest.raises(ConfigError):
            Deal(9.0, (5,), (cost,))
    assert Deal.of(30, LAYOUT) == Deal(30, (10, 1, 12, 4), alike(*(1.0,) * 4))


def test_squares_say_what_the_gradient_is():
    g = np.random.default_rng(5).normal(size=LAYOUT.n).astype(np.float32)
    exact = np.array(
        [float(np.sum(g[a:b].astype(np.float64) ** 2)) for a, b in ((0, 10), (10, 11), (11, 23), (23, 27))]
    )
    assert np.allclose(squares_of_gradient(g, LAYOUT), exact, rtol=1e-6)
    estimator = SteinEstimator(13, perturbation=SOME)
    looks = np.array(
        [
            squares_of_slopes(estimator.exact_slopes(g, Stream(seed_from(6), r), LAYOUT), SOME, LAYOUT)
            for r in range(1500)
        ]
    )
    assert np.allclose(looks[:, [1, 3]], exact[[1, 3]], rtol=1e-6)  # along coordinates
    error = looks.std(axis=0) / math.sqrt(len(looks))
    assert np.all(np.abs(looks.mean(axis=0) - exact)[[0, 2]] < 5 * error[[0, 2]])
    assert np.all(error < 0.05 * exact)


# -- servers and whole jobs ------------------------------------------------------------------------------


class Bowl:
    """L(w) = Σ_b h_b |w_b − t|² / 2, the layers' slopes of very different lengths. In NumPy alone."""

    layout, frozen_digest = Layout(("a.w", "b.w", "c.w"), ((40,), (30,), (5,))), bytes(32)
    curvature = np.repeat([8.0, 0.5, 1.0], [40, 30, 5])

    def weights(self):
        return np.linspace(-1, 1, 75, dtype=np.float32)

    def check_sigma(self, sigma):
        pass

    def loss(self, weights, batch):
        off = np.asarray(weights, np.float64) - batch.inputs[:, None]
        return float(np.mean(off**2 @ self.curvature)) / 2

    def losses(self, weights, batch, stream, perturbation, directions, scale):
        wide = weights.astype(np.float64)
        return np.array(
            [
                self.loss(wide + scale * perturbation.values(stream, k, self.layout, 0, 75), batch)
                for k in directions
            ]
        )

    def gradient(self, weights, batch):
        g = self.curvature * (weights.astype(np.float64) - batch.inputs.mean())
        return g.astype(np.float32), self.loss(weights, batch)


class Targets:
    def __init__(self, count, seed):
        self.points = np.random.default_rng(seed).normal(2.0, 0.1, size=count)

    def __len__(self):
        return len(self.points)

    def batch(self, indices):
        return Batch(self.points[indices], self.points[indices])


DEAL = Deal.of(40, Bowl.layout)


def bowl_server(**options):
    estimator = SteinEstimator(40, 1e-3, options.pop("scheme", "central"))
    return Server(Bowl(), estimator, **{"seed": 3, "batch_size": 4, "ema": 0.9, "deal": DEAL, **options})


def bowl_clients(**options):
    return [Client(f"c{i}", Bowl(), Targets(5 + i, i), seed=1, **options) for i in range(3)]


def state_of(server):
    arrays, rest = server.state()
    return {name: array.tobytes() for name, array in arrays.items()}, rest


@pytest.mark.parametrize("fidelity", ["forward-only", "law"])
def test_counts_follow_slopes(fidelity):
    server = bowl_server(fidelity=fidelity, optimizer=lambda p: torch.optim.SGD(p, lr=1e-4))
    seen = []
    for record in simulate(server, bowl_clients(), rounds=25):
        estimator = record.plan.estimator
        seen.append(estimator.perturbation.counts)
        assert estimator.directions == sum(seen[-1]) <= 40
        assert record.forward_passes == 3 * 2 * sum(seen[-1])
    assert seen[0] == DEAL.counts() == (20, 15, 5)  # as though all entries were alike
    g = Bowl.curvature * (server.weights - 2.0)
    true = DEAL.counts(squares_of_gradient(g.astype(np.float32), Bowl.layout))
    assert true[0] > 2 * seen[0][0] * 0.8
    assert np.abs(np.subtract(seen[-1], true)).max() <= 4
    assert len(set(seen)) > 1


def test_the_first_round_has_directions_in_layers():
    server = bowl_server()
    assert server.plan().estimator.perturbation == Layers(DEAL.counts())
    assert server.adapt(["c0"]) == server.plan().estimator.directions == sum(DEAL.counts())


@pytest.mark.parametrize("fidelity", ["forward-only", "law"])
def test_a_resumed_run_is_the_uninterrupted_one(fidelity, tmp_path):
    whole = bowl_server(fidelity=fidelity)
    list(simulate(whole, bowl_clients(), rounds=12))
    first = bowl_server(fidelity=fidelity)
    list(simulate(first, bowl_clients(), rounds=7))
    save_checkpoint(tmp_path / "c", first)
    again = bowl_server(fidelity=fidelity)
    load_checkpoint(tmp_path / "c", again)
    assert again.plan() == first.plan()
    assert again.plan().estimator.perturbation.counts != DEAL.counts()
    list(simulate(again, bowl_clients(), rounds=12))
    (arrays, rest), (expected, other) = state_of(again), state_of(whole)
    assert arrays == expected
    assert rest["layers"] == other["layers"]
    assert again.plan() == whole.plan()


def test_the_scalar_log_makes_the_server_again(tmp_path):
    server, log = bowl_server(), ScalarLog(tmp_path / "log")
    for record in simulate(server, bowl_clients(), rounds=9, drops=lambda r, name: r == 4):
        if record.total is not None:
            log.append(record.plan, record.total)
    late = bowl_server()
    assert replay(late, log, until=9) == 8
    assert state_of(late) == state_of(server)
    assert len({plan.estimator.perturbation.counts for plan, _ in log}) > 1


def test_clients_of_fewer_directions_are_refused_in_one_line():
    with pytest.raises(ConfigError, match="all of them are needed") as caught:
        list(simulate(bowl_server(), bowl_clients(max_directions=7), rounds=1))
    assert "\n" not in str(caught.value)
    list(simulate(bowl_server(), bowl_clients(max_directions=40), rounds=1))
    server = bowl_server()
    plan = server.plan()
    short = np.ones(plan.estimator.directions - 1, np.float32)
    with pytest.raises(AggregationError, match="directions in layers need all"):
        server.step({"c0": RoundResult(plan.round, plan.digest, 5, short)})
    with pytest.raises(AggregationError, match="were asked for"):
        server.apply(RoundSum(0, short.astype(np.float64)))


@pytest.mark.parametrize(
    "options",
    [{"least_directions": 5}, {"local": LocalTraining()}, {"steps": LocalSteps(2)}],
    ids=lambda options: next(iter(options)),
)
def test_what_needs_one_K_is_refused(options):
    with pytest.raises(ConfigError, match="one K"):
        bowl_server(**options)


def test_a_deal_of_another_model_is_refused():
    with pytest.raises(ConfigError, match="layers"):
        bowl_server(deal=Deal(40, (40, 35), alike(1.0, 1.0)))


DIGITS = {"data": "digits", "model": "mlp", "clients": 4, "directions": 30, "threads": 1, "rounds": 4}
DIGITS |= {"perturbation": "layers", "batch_size": 20, "seed": 1}


def job(**settings):
    return job_of(TrainConfig(**{**DIGITS, **settings}))


def run(made_job):
    return list(simulate(made_job.server, made_job.clients, rounds=made_job.rounds, drops=made_job.drops))


def test_a_job_deals_out_what_its_directions_pay_for():
    one = job()
    records = run(one)
    costs = one.runtime.layer_costs(Batch(np.zeros((20, 1, 8, 8), np.float32), np.zeros(20, np.int64)))
    assert 1.0 >= costs[0].direction > costs[1].direction
    sizes = [stop - start for _, start, stop in one.runtime.layout.layers]
    for record in records:
        counts = record.plan.estimator.perturbation.counts
        each = [c.coordinate if n == K else c.direction for c, K, n in zip(costs, counts, sizes, strict=True)]
        spent = sum(c * K for c, K in zip(each, counts, strict=True))
        assert 23 < spent <= 30 - 1 - len(costs)
        assert record.forward_passes == 4 * (2 + len(costs) + math.ceil(spent)) <= 4 * 31
        assert sum(counts) > spent  # those of the last layer cost little
    assert len({record.plan.estimator.directions for record in records}) > 1
    assert (
        one.server.weights.tobytes() == (lambda again: (run(again), again.server.weights)[1])(job()).tobytes()
    )


def test_secure_sums_are_plain_sums_to_rounding():
    pytest.importorskip("cryptography")
    settings = {"max_colluding": 0.0, "max_dropout": 0.25, "clients": 5}
    secure, unmasked, plain = (job(**settings, secure=x) for x in (True, True, False))
    unmasked.server.aggregator = IntegerSum(unmasked.server.aggregator.terms)
    for client in unmasked.clients:
        client.seal = OpenSeal()
    counts = [
        [record.plan.estimator.perturbation.counts for record in run(one)]
        for one in (secure, unmasked, plain)
    ]
    assert counts[0] == counts[1]
    assert len(set(counts[0])) > 1  # K changes from round to round
    assert secure.server.weights.tobytes() == unmasked.server.weights.tobytes()
    moved = np.abs(plain.server.weights - plain.runtime.weights()).max()
    assert np.abs(secure.server.weights - plain.server.weights).max() < 1e-3 * moved


def test_clients_may_drop_out():
    some = job()
    records = list(simulate(some.server, some.clients, rounds=6, drops=random_drops(0.5, 2)))
    assert 0 < sum(record.dropped for record in records) < 24
    assert np.isfinite(some.server.weights).all()
    assert all(
        record.plan.estimator.directions == len(record.total.values) for record in records if record.total
    )


def test_clients_take_the_servers_steps_themselves():
    scalars, whole = job(downlink="scalars", rounds=6), job(downlink="model", rounds=6)
    records = run(scalars)
    assert all(record.participants == 4 and not record.aborted for record in records)  # digests held
    run(whole)
    assert np.abs(scalars.server.weights - whole.server.weights).max() < 1e-4
    assert sum(record.bytes_down for record in records[1:]) < 4 * 5 * 4 * scalars.runtime.layout.n / 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"local_steps": 2}, "all of its K"),
        ({"least_directions": 3}, "all of its K"),
        ({"local_epochs": 1}, "one K"),
        ({"privacy": "client", "clip_norm": 1.0, "noise_multiplier": 1.0}, "one K"),
        ({"perturbation": "layers:3"}, "for 1 layers, the model has 2"),
        ({"perturbation": "layers:3.4"}, "all of them are needed"),
        ({"perturbation": "layers:3.", "directions": None}, "unknown perturbation"),
        ({"perturbation": "layers:3.651", "directions": None}, "650 parameters"),
        ({"directions": 1}, "for what is kept"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_jobs_that_cannot_be(settings, text):
    with pytest.raises(ConfigError, match=text) as caught:
        job(**settings)
    assert "\n" not in str(caught.value)


def test_a_job_with_counts_of_its_own():
    one = job(perturbation="layers:20.100", directions=None, rounds=2)
    assert [record.plan.estimator.directions for record in run(one)] == [120, 120]
    private = {
        "privacy": "client",
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "max_dropout": 0.25,
        "max_colluding": 0.0,
    }
    assert len(run(job(perturbation="layers:20.100", directions=None, rounds=1, **private))) == 1


def test_the_public_names():
    assert baffle.Layers is Layers
    assert baffle.Deal is Deal


def test_where_all_is_exact_a_simulated_run_is_backpropagation():
    """The law of an exact measurement is the gradient: the same bits, and fewer passes than were allowed."""
    shared = {"batch_size": 8, "learning_rate": 0.01, "optimizer": "adam"}
    exact = job(**shared, directions=500, fidelity="law")
    plain = job(**shared, perturbation="gaussian", fidelity="backprop")
    records = run(exact)
    run(plain)
    sizes = tuple(stop - start for _, start, stop in exact.runtime.layout.layers)
    assert all(record.plan.estimator.perturbation.counts == sizes for record in records)
    assert all(record.forward_passes < 500 * len(exact.clients) for record in records)
    assert exact.server.weights.tobytes() == plain.server.weights.tobytes()
    assert np.abs(exact.server.weights - exact.runtime.weights()).max() > 0.01
