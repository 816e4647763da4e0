"""A layer along its coordinates: against the module itself, kernels against torch, which layers are such."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from baffle import kernels
from baffle.estimator import SteinEstimator
from baffle.models import build
from baffle.perturbations import Gaussian, Layers, Layout
from baffle.runtimes import Batch
from baffle.runtimes.arrays import TorchArrays
from baffle.runtimes.torch import TorchRuntime
from baffle.stream import Stream, seed_from

STREAM = Stream(seed_from(3), 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pictures(count=3, channels=3, size=8, classes=3, seed=1):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(count, channels, size, size)).astype(np.float32)
    return Batch(images, rng.integers(0, classes, count))


def vectors(count=5, features=6, classes=3, seed=2):
    rng = np.random.default_rng(seed)
    return Batch(rng.normal(size=(count, features)).astype(np.float32), rng.integers(0, classes, count))


def made(make, seed=0):
    torch.manual_seed(seed)
    return make()


def conv(*sizes, **options):
    return nn.Conv2d(*sizes, **options)


class Shared(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.again(torch.relu(self.first(x)))))))


class Skips(nn.Module):
    """What the second layer returns is of use to two."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.b(self.act(self.a(x)))
        return self.c(x + self.act(x))


# Module, data, and how many of its layers are measured coordinate by coordinate.
NETWORKS = {
    "lenet": (lambda: build("lenet", 3, 3, 0, channels=(4, 8)), pictures, 3),
    # Of a size that a kernel takes, of which it takes two channels at a time.
    "channels for the kernel": (lambda: build("lenet", 1, 3, 0, channels=(2, 6)), lambda: pictures(32, 1), 3),
    "a channel too many": (lambda: build("lenet", 1, 3, 0, channels=(2, 7)), lambda: pictures(32, 1), 3),
    "lenet with norms": (lambda: build("lenet", 3, 3, 0, channels=(4, 8), norm="group"), pictures, 3),
    "mlp": (lambda: build("mlp", 1, 3, 0, hidden=(5, 4), grid=4), lambda: pictures(4, 1), 3),
    "strides": (
        lambda: nn.Sequential(
            *(conv(3, 4, 3, stride=2, bias=False), nn.GELU(), nn.AvgPool2d(2, 1), nn.Dropout(0.5)),
            *(conv(4, 6, (3, 1), padding=1, dilation=(1, 2)), nn.LeakyReLU(), nn.Flatten(), nn.Linear(48, 3)),
        ),
        pictures,
        3,
    ),
    "in place": (
        lambda: nn.Sequential(
            nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, 5), nn.SiLU(), nn.Linear(5, 3)
        ),
        vectors,
        3,
    ),
    "norms between": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)),
        vectors,
        2,
    ),
    "frozen next": (lambda: frozen_next(), vectors, 2),
    "skips": (lambda: Skips(), vectors, 3),
    "shared": (lambda: Shared(), vectors, 2),
    "groups": (
        lambda: nn.Sequential(
            conv(3, 6, 3), nn.ReLU(), conv(6, 6, 3, groups=3), nn.Flatten(), nn.Linear(96, 3)
        ),
        pictures,
        2,
    ),
    "circular": (
        lambda: nn.Sequential(
            conv(3, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(256, 3)
        ),
        pictures,
        1,
    ),
    "wide images": (lambda: build("lenet", 2, 3, 0, channels=(2, 16)), lambda: pictures(2, 2, 32), 3),
}


def frozen_next():
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    module[2].requires_grad_(False)
    return module


def all_of(layout):
    return Layers(tuple(stop - start for _, start, stop in layout.layers))


def losses_of(module, flat, batch):
    """(B,) at flat float64 weights, by the module itself in float64."""
    twin = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        own = [p for p in twin.parameters() if p.requires_grad]
        nn.utils.vector_to_parameters(torch.from_numpy(flat), own)
        outputs = twin(torch.from_numpy(batch.inputs).double())
        return nn.functional.cross_entropy(outputs, torch.from_numpy(batch.targets), reduction="none").numpy()


def measured_so(runtime):
    return sum(layer.coordinates is not None for layer in runtime._layered._layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_are_the_modules_own(name):
    """In float64, to its rounding: in any order, of means and of samples, forth and back."""
    make, feed, count = NETWORKS[name]
    module, batch = made(make).double(), feed()
    runtime = TorchRuntime(module)
    layout = runtime.layout
    layers, weights = all_of(layout), runtime.weights()
    K = layers.directions
    order = np.random.default_rng(6).permutation(K)
    step = 0.02 * float(np.float32(math.sqrt(K)))
    some = order[:150].tolist()
    points = [weights + step * (np.arange(layout.n) == k) for k in some]  # direction k is entry k
    expected = np.array([losses_of(module, point, batch) for point in points])
    apart = runtime.example_losses(weights, batch, STREAM, layers, order.tolist(), 0.02)
    assert apart.shape == (K, len(batch.targets))
    assert np.abs(apart[: len(some)] - expected).max() < 1e-11
    losses = runtime.losses(weights, batch, STREAM, layers, range(K), 0.02)
    assert np.abs(losses[order] - apart.mean(axis=1)).max() < 1e-12
    few = runtime.losses(weights, batch, STREAM, layers, some[:5], 0.02)
    assert np.abs(few - expected[:5].mean(axis=1)).max() < 1e-11
    assert np.ptp(expected.mean(axis=1)) > 1e-3
    assert measured_so(runtime) == count


@pytest.mark.parametrize("name", NETWORKS)
def test_central_slopes_are_the_gradient(name):
    """In float32, at σ√K = 2e-3, against autograd: what is off is rounding, about 2⁻²⁴ of a loss over 2·2e-3,
    and where a kink is passed a percent."""
    make, feed, _ = NETWORKS[name]
    runtime, batch = TorchRuntime(made(make)), feed()
    layers, weights = all_of(runtime.layout), runtime.weights()
    estimator = SteinEstimator(
        layers.directions, 2e-3 / math.sqrt(layers.directions), "central", perturbation=layers
    )
    found = estimator.slopes(runtime, weights, batch, STREAM)
    gradient = estimator.gradient(found.slopes, STREAM, runtime.layout)
    exact, loss = runtime.gradient(weights, batch)
    assert abs(found.loss - loss) < 1e-3
    size = np.sqrt(np.mean(exact**2))
    assert np.sqrt(np.mean((gradient - exact) ** 2)) < 10 * 2.0**-24 * max(1, loss) / 4e-3 + 0.01 * size
    assert size > 20 * 10 * 2.0**-24 / 4e-3
    assert np.corrcoef(gradient, exact)[0, 1] > 0.999


def test_forward_differences_of_the_papers_lenet_at_its_sigma():
    """σ = 1e-4 is a step of 0.016 along 26,730 coordinates: the loss curves a little on the way."""
    runtime, batch = TorchRuntime(build("lenet", 1, 10, 0)), pictures(8, 1, 32, 10)
    layers, weights = all_of(runtime.layout), runtime.weights()
    estimator = SteinEstimator(layers.directions, 1e-4, perturbation=layers)
    found = estimator.slopes(runtime, weights, batch, STREAM)
    exact, _ = runtime.gradient(weights, batch)
    error = estimator.gradient(found.slopes, STREAM, runtime.layout) - exact
    assert np.linalg.norm(error) < 0.03 * np.linalg.norm(exact)
    assert measured_so(runtime) == 3
    assert found.forward_passes < 500


def test_kernels_and_torch_say_the_same(monkeypatch):
    """One network through kernels, and again without them."""
    if not kernels.available():
        pytest.skip("BAFFLE_KERNELS=0")
    for activation in (nn.Hardswish, nn.ReLU):
        module, batch = build("lenet", 1, 3, 0, channels=(2, 16), activation=activation), pictures(3, 1, 32)
        made_of = []
        for there in (True, False):
            monkeypatch.setattr("baffle.runtimes.coordinates.available", lambda there=there: there)
            runtime = TorchRuntime(module)
            layers = all_of(runtime.layout)
            made_of.append(
                runtime.losses(runtime.weights(), batch, STREAM, layers, range(layers.directions), 1e-3)
            )
            assert measured_so(runtime) == 3
        assert np.abs(made_of[0] - made_of[1]).max() < 2e-6
        assert np.ptp(made_of[0]) > 1e-3


@pytest.mark.parametrize("activation", [0, 1, 2])
def test_the_kernels_are_their_definition(activation):
    if not kernels.available():
        pytest.skip("BAFFLE_KERNELS=0")
    from baffle.kernels import coordinates

    act = (lambda x: x, torch.relu, nn.functional.hardswish)[activation]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    sums, seen = normal(3, 4, 32), normal(5, 4, 32)
    out = np.full((3, 5, 4), np.nan, np.float32)
    flat = [x.reshape(-1).numpy() for x in (sums, act(sums), seen)]
    for begin, end in ((0, 1), (1, 4)):
        coordinates.of_sums(*flat, (3, 5, 4, 32), 0.3, activation, begin, end, out.reshape(-1))
    expected = (act(sums[:, None] + 0.3 * seen[None]) - act(sums)[:, None]).mean(-1)
    assert np.abs(out - expected.numpy()).max() < 1e-6

    for taps, high, wide in ((5, 8, 16), (3, 16, 32), (1, 8, 16)):
        change, kernel, base = normal(3, 2, high, wide), normal(6, taps, taps), normal(2, 6, high, wide)
        out = np.full((3, 2, 6), np.nan, np.float32)
        flat = [x.reshape(-1).numpy() for x in (change, kernel, base, act(base))]
        for begin, end in ((0, 2), (2, 3)):
            coordinates.of_products(*flat, (2, 6, high, wide), taps, activation, begin, end, out.reshape(-1))
        images = change.reshape(6, 1, high, wide)
        products = nn.functional.conv2d(images, kernel[:, None], padding=taps // 2).view(3, 2, 6, high, wide)
        expected = (act(base + products) - act(base)).mean((3, 4))
        assert np.abs(out - expected.numpy()).max() < 1e-5


def test_threads_change_nothing():
    batch = pictures(3, 1, 32)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        runtime = TorchRuntime(build("lenet", 1, 3, 0, channels=(2, 16)))
        layers = all_of(runtime.layout)
        found.append(runtime.losses(runtime.weights(), batch, STREAM, layers, range(layers.directions), 1e-3))
    torch.set_num_threads(1)
    assert np.array_equal(found[0], found[1])


def test_a_loss_that_several_cannot_share_is_measured_all_the_same():
    """It calls ``item``, which vmap refuses."""

    def loss(outputs, targets):
        scale = 1.0 + 0.0 * float(outputs.detach().sum().item())
        return scale * nn.functional.cross_entropy(outputs.double(), targets, reduction="none")

    module, batch = made(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))), vectors()
    odd, plain = TorchRuntime(module, loss), TorchRuntime(module)
    layers = all_of(plain.layout)
    found, expected = (r.losses(r.weights(), batch, STREAM, layers, range(43), 1e-2) for r in (odd, plain))
    assert np.abs(found - expected).max() < 1e-6
    assert measured_so(odd) == 0
    assert measured_so(plain) == 2
    assert all(cost.coordinate == cost.direction for cost in odd.layer_costs(batch))


def test_a_way_that_is_wrong_is_not_taken(monkeypatch):
    """Compared once with the way of all directions, which is then taken instead."""
    from baffle.runtimes import coordinates

    def wrong(self, objective, weights, entries, step, reduce):
        return 1.1 * right(self, objective, weights, entries, step, reduce)

    right = coordinates.Coordinates.differences
    module, batch = build("lenet", 3, 3, 0, channels=(4, 8)), pictures()
    layers = all_of(TorchRuntime(module).layout)
    expected = TorchRuntime(module).losses(
        TorchRuntime(module).weights(), batch, STREAM, layers, range(layers.directions), 1e-2
    )
    monkeypatch.setattr(coordinates.Coordinates, "differences", wrong)
    runtime = TorchRuntime(module)
    found = runtime.losses(runtime.weights(), batch, STREAM, layers, range(layers.directions), 1e-2)
    assert measured_so(runtime) == 0
    assert np.abs(found - expected).max() < 1e-5


def test_an_input_that_is_too_large_goes_the_other_way():
    """A 5×5 convolution meets each element 25 times."""
    batch = pictures(4, 3, 32)
    module = build("lenet", 3, 3, 0, channels=(8, 16))
    size = 4 * 3 * 32 * 32 * 4 * 25  # of the first layer; the second has two thirds of it
    for budget, cheap in ((size, True), (size - 1, False)):
        costs = TorchRuntime(module, memory_budget=budget).layer_costs(batch)
        assert (costs[0].coordinate < costs[0].direction) is cheap
        assert costs[1].coordinate < costs[1].direction


def test_hooks_and_half_precision_go_the_other_way():
    hooked = made(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    hooked[2].register_forward_hook(lambda *_: None)
    half = made(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))).to(torch.bfloat16)
    for module in (hooked, half):
        assert measured_so(TorchRuntime(module)) == 0


def test_a_gradient_of_coordinates_has_the_bits_of_the_sum():
    """The server's half against the sum over all K by its definition, zeros of both signs included."""
    layout = Layout(("a.w", "b.w", "c.w"), ((7,), (30,), (4,)))
    rng = np.random.default_rng(4)
    for counts in ((7, 5, 4), (7, 30, 4), (3, 30, 1)):
        layers = Layers(counts)
        estimator = SteinEstimator(layers.directions, perturbation=layers)
        slopes = rng.normal(size=layers.directions)
        slopes[::3] = -0.0
        total = np.zeros(layout.n)
        for k, slope in enumerate(slopes):
            z = layers.values(STREAM, k, layout, 0, layout.n).astype(np.float64)
            total = z * slope + total
        expected = (total / layers.directions).astype(np.float32)
        for arrays in (None, TorchArrays("cpu")):
            options = {} if arrays is None else {"arrays": arrays}
            found = np.asarray(estimator.gradient(slopes, STREAM, layout, **options))
            assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_what_it_saves():
    """Whole passes for as many Gaussian directions, and a fraction for the coordinates."""
    runtime, batch = TorchRuntime(build("lenet", 1, 10, 0)), pictures(4, 1, 32, 10)
    n = runtime.layout.n
    layers = all_of(runtime.layout)
    coordinates = SteinEstimator(n, perturbation=layers).simulated_passes(runtime, batch)
    assert coordinates < n / 100
    assert SteinEstimator(n, perturbation=Gaussian()).simulated_passes(runtime, batch) == n + 1
