"""The scheme ``tangent``: slopes against autograd in float64, what it leaves alone, and what it refuses."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from baffle.client import Client
from baffle.data import load
from baffle.errors import ConfigError, LossError
from baffle.estimator import SteinEstimator
from baffle.models import build
from baffle.perturbations import Gaussian, LowRank, Perturbation, Rademacher
from baffle.runtimes import Batch, TangentRuntime
from baffle.runtimes.torch import TorchRuntime, cross_entropy, evaluate
from baffle.server import Server
from baffle.simulation import simulate
from baffle.stream import Stream, seed_from
from tests.test_torch_runtime import (
    Branched,
    Counted,
    Looping,
    Tied,
    batch_norm_net,
    made,
    pictures,
    state_of,
    twin_of,
    vectors,
)

STREAM = Stream(seed_from(5), 2)
K = 12


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def exact(
    module: nn.Module, batch: Batch, count: int = K, kind: Perturbation | None = None, shift: float = 0.0
) -> NDArray[np.float64]:
    """z_k·∇L at the module's weights plus ``shift``, by backpropagation through a float64 copy of it."""
    twin = twin_of(module)
    trainable = [p for p in twin.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trainable:
            p.add_(shift)
    x = torch.from_numpy(batch.inputs.copy()).double()
    cross_entropy(twin(x), torch.from_numpy(batch.targets)).mean().backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in trainable]).numpy()
    layout = TorchRuntime(module).layout
    kind = kind or Gaussian()
    return np.array(
        [kind.values(STREAM, k, layout, 0, layout.n).astype(float) @ gradient for k in range(count)]
    )


def measured(module: nn.Module, batch: Batch, count: int = K, kind: Perturbation | None = None, **options):
    runtime = TorchRuntime(module, **options)
    estimator = SteinEstimator(count, scheme="tangent", perturbation=kind or Gaussian())
    return estimator.slopes(runtime, runtime.weights(), batch, STREAM)


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Hardswish(), nn.Linear(16, 3))


def statistics() -> nn.Module:
    """Batch norm with running statistics that are not the initial ones."""
    module = made(batch_norm_net)
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(0.5, 2)
    return module.train()


def some_frozen() -> nn.Module:
    module = statistics()
    module[0].requires_grad_(False)
    module[1].requires_grad_(False)
    return module


NETWORKS = {
    "mlp": (lambda: made(small_mlp), vectors),
    "tied": (lambda: made(Tied), vectors),
    "two tensors cross the cut": (lambda: made(Branched), vectors),
    "control flow": (lambda: made(Looping), vectors),
    "batch norm": (statistics, pictures),
    "frozen prefix": (some_frozen, pictures),
    "lenet": (lambda: build("lenet", 3, 3, seed=1, norm="group"), pictures),
    "wrn": (lambda: build("wrn-10-2", 3, 3, seed=1), pictures),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_slopes_are_the_directional_derivatives(name):
    module, batch = (make() for make in NETWORKS[name])
    before = state_of(module)
    got = measured(module, batch)
    want = exact(module, batch)
    # Float32 rounding of sums over n terms of mixed sign, beside the size of a typical slope.
    np.testing.assert_allclose(got.slopes, want, rtol=0, atol=1e-5 * np.linalg.norm(want))
    runtime = TorchRuntime(module)
    assert got.loss == pytest.approx(runtime.loss(runtime.weights(), batch), rel=1e-5)
    assert state_of(module) == before


@pytest.mark.parametrize("name", ["mlp", "batch norm"])
def test_in_float64_they_are_exact(name):
    module, batch = (make() for make in NETWORKS[name])
    module = module.double()
    np.testing.assert_allclose(measured(module, batch).slopes, exact(module, batch), rtol=1e-9)


@pytest.mark.parametrize("kind", [Rademacher(), LowRank(2)], ids=lambda kind: kind.spec)
def test_along_other_directions(kind):
    module, batch = (make() for make in NETWORKS["lenet"])
    want = exact(module, batch, kind=kind)
    got = measured(module, batch, kind=kind).slopes
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.linalg.norm(want))


class Scaled:
    """A perturbation times a number, or the sum of two neighbours: still directions."""

    spec = "scaled"

    def __init__(self, factor: float, also_next: bool = False) -> None:
        self.factor, self.also_next = np.float32(factor), also_next

    def values(self, stream, k, layout, start, stop, arrays):
        z = Gaussian().values(stream, k, layout, start, stop) * self.factor
        if self.also_next:
            ahead = range(k.start + 1, k.stop + 1) if isinstance(k, range) else k + 1
            z = z + Gaussian().values(stream, ahead, layout, start, stop)
        return z


@pytest.mark.parametrize("factor", [2.0**-60, 1.0, 2.0**20])
def test_slopes_are_linear_in_the_direction_at_any_scale(factor):
    """A finite difference along 2⁻⁶⁰ z is zero. A power of two changes no rounding."""
    module, batch = (make() for make in NETWORKS["mlp"])
    plain = measured(module, batch).slopes
    assert (measured(module, batch, kind=Scaled(factor)).slopes / factor).tolist() == plain.tolist()


def test_slopes_add_up():
    module, batch = (make() for make in NETWORKS["mlp"])
    plain = measured(module, batch, 9).slopes
    sums = measured(module, batch, 8, kind=Scaled(1.0, also_next=True)).slopes
    np.testing.assert_allclose(sums, plain[:-1] + plain[1:], rtol=0, atol=1e-5)


# --- half precision ------------------------------------------------------------------------------


def lenet_after(steps: int, batch: Batch) -> nn.Module:
    module = build("lenet", 1, 10, seed=1)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(
            module(torch.from_numpy(batch.inputs)), torch.from_numpy(batch.targets)
        ).mean().backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("steps", [0, 80])
@pytest.mark.parametrize("way", ["products in bfloat16", "a bfloat16 module", "a float16 module"])
def test_half_precision_keeps_the_slopes(steps, way):
    """What differences lose: at σ = 1e-4 losses in bfloat16 differ by rounding, if at all. Values rounded to
    bfloat16 would lose it too: the longer a network is trained, the further its gradient turns with them.
    """
    batch = pictures(16, 8, 1, 10)
    module = lenet_after(steps, batch)
    want, weights = exact(module, batch, 60), TorchRuntime(module).weights()
    if way == "products in bfloat16":
        runtime = TorchRuntime(module, tangent_products=torch.bfloat16)
    else:
        runtime = TorchRuntime(module.to(torch.bfloat16 if "bfloat16" in way else torch.float16))
    got = SteinEstimator(60, scheme="tangent").slopes(runtime, weights, batch, STREAM).slopes
    assert got.tolist() != exact(module.float(), batch, 60).tolist()
    assert np.corrcoef(got, want)[0, 1] >= 0.9999


class ByName(nn.Module):
    """Asks for its types by name, so that float32 weights do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.to(torch.bfloat16)).float())


def test_a_module_that_asks_for_types_by_name_runs_in_them():
    module, batch = made(ByName), vectors(32)
    runtime = TorchRuntime(module)
    w = runtime.weights()
    got = SteinEstimator(40, scheme="tangent").slopes(runtime, w, batch, STREAM).slopes
    twin = made(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    twin.load_state_dict({name.replace("body", "0").replace("head", "1"): t
                          for name, t in module.state_dict().items()})  # fmt: skip
    assert np.corrcoef(got, exact(twin, batch, 40))[0, 1] > 0.999


def attention() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, 0.0, batch_first=True),
                         nn.Flatten(), nn.Linear(4, 3))  # fmt: skip


def strided() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=(1, 0), bias=False),
                         nn.Conv2d(4, 4, 2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
                         nn.Conv2d(4, 2, 3, padding="same"), nn.Flatten(), nn.LazyLinear(3))  # fmt: skip


@pytest.mark.parametrize("products", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "batch"),
    [
        (batch_norm_net, pictures),
        (attention, vectors),
        (strided, pictures),
    ],
    ids=["batch norm", "attention", "strides, groups, padding"],
)
def test_products_of_every_kind_of_layer(module, batch, products):
    module, batch = made(module), batch()
    module.eval()(torch.from_numpy(batch.inputs))
    want = exact(module, batch)
    got = measured(module, batch, tangent_products=products).slopes
    close = 1e-2 if products is torch.bfloat16 else 1e-5
    np.testing.assert_allclose(got, want, rtol=0, atol=close * np.linalg.norm(want))


def test_sigma_has_no_part_in_it():
    module, batch = build("lenet", 1, 10, seed=1).to(torch.bfloat16), pictures(4, 8, 1, 10)
    runtime = TorchRuntime(module)
    w = runtime.weights()
    a, b = (SteinEstimator(3, s, "tangent").slopes(runtime, w, batch, STREAM).slopes for s in (1e-12, 1.0))
    assert a.tolist() == b.tolist()


# --- cost and refusals ---------------------------------------------------------------------------


def test_it_is_counted_as_two_passes_a_direction():
    assert SteinEstimator(10, scheme="tangent").forward_passes == 20
    assert SteinEstimator.from_forward_passes(21, scheme="tangent").directions == 10
    with pytest.raises(ConfigError, match="no direction"):
        SteinEstimator.from_forward_passes(1, scheme="tangent")


@pytest.mark.parametrize("budget", [1, 10_000, 1 << 28])
def test_the_memory_budget_changes_no_more_than_roundings(budget):
    module, batch = (make() for make in NETWORKS["lenet"])
    want = exact(module, batch, 20)
    got = measured(module, batch, 20, memory_budget=budget).slopes
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.linalg.norm(want))


def test_the_prefix_runs_once():
    body, head = Counted(nn.Linear(4, 4).requires_grad_(False)), nn.Linear(4, 3)
    measured(nn.Sequential(body, nn.Tanh(), head), vectors())
    assert body.calls == 1


def test_a_cached_prefix_gives_the_same_slopes():
    module, batch = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), vectors()
    module[0].requires_grad_(False)
    cached = TorchRuntime(module).prefixed(batch)
    assert measured(module, cached).slopes.tolist() == measured(module, batch).slopes.tolist()


def test_schemes_may_alternate_on_one_runtime():
    module, batch = (make() for make in NETWORKS["mlp"])
    runtime = TorchRuntime(module)
    w = runtime.weights()
    SteinEstimator(K).slopes(runtime, w, batch, STREAM)
    got = SteinEstimator(K, scheme="tangent").slopes(runtime, w, batch, STREAM).slopes
    assert got.tolist() == measured(module, batch).slopes.tolist()
    SteinEstimator(K).slopes(runtime, w, batch, STREAM)


class Inference:
    """A runtime as an inference engine gives it."""

    def __init__(self, runtime: TorchRuntime) -> None:
        self.layout, self.frozen_digest, self.weights = runtime.layout, runtime.frozen_digest, runtime.weights
        self.check_sigma, self.loss, self.losses = runtime.check_sigma, runtime.loss, runtime.losses


def test_a_runtime_without_derivatives_is_refused():
    runtime = TorchRuntime(made(small_mlp))
    assert isinstance(runtime, TangentRuntime)
    engine = Inference(runtime)
    assert not isinstance(engine, TangentRuntime)
    w = runtime.weights()
    assert np.isfinite(SteinEstimator(2).slopes(engine, w, vectors(), STREAM).slopes).all()
    with pytest.raises(ConfigError, match=r"Inference cannot .* forward or central"):
        SteinEstimator(2, scheme="tangent").slopes(engine, w, vectors(), STREAM)


class NoRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, change):
        return change


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points)


class Opaque(Distances):
    def forward(self, x: Tensor) -> Tensor:
        return x @ NoRule.apply(self.points).T


@pytest.mark.parametrize("module", [Distances, Opaque])
def test_an_operation_without_a_forward_derivative_is_refused_by_name_of_the_scheme(module):
    with pytest.raises(ConfigError, match=r"scheme tangent .*use forward or central"):
        measured(made(module), vectors())


def test_what_the_loss_function_raises_comes_through():
    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ZeroDivisionError

    module = made(small_mlp).train()
    before = state_of(module)
    with pytest.raises(ZeroDivisionError):
        measured(module, vectors(), loss=fails)
    with pytest.raises(ConfigError, match="one loss a sample"):
        measured(module, vectors(), loss=lambda outputs, targets: outputs)
    assert state_of(module) == before


def test_what_is_not_finite_is_refused():
    runtime = TorchRuntime(made(small_mlp))
    w, estimator = runtime.weights(), SteinEstimator(3, scheme="tangent")
    w[0] = np.inf
    with pytest.raises(LossError, match="unperturbed"):
        estimator.slopes(runtime, w, vectors(), STREAM)

    def root(outputs: Tensor, targets: Tensor) -> Tensor:  # finite at 0, where its derivative is not
        return (outputs - outputs.detach()).sum(dim=1).relu().sqrt() + targets

    runtime = TorchRuntime(made(small_mlp), root)
    with pytest.raises(LossError, match="direction 0 of round 2"):
        estimator.slopes(runtime, runtime.weights(), vectors(), STREAM)


def test_nobody_sees_torchs_own_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(build("lenet", 1, 10, seed=1), pictures(4, 8, 1, 10), 3)


# --- a federation --------------------------------------------------------------------------------


def test_training_reaches_what_forward_reaches():
    """Both estimate along the same directions: they differ by σ's bias and by rounding, in each round."""
    train, test = load("digits")
    held = [test.batch(slice(0, 300))]
    weights, losses = [], []
    for scheme in ("forward", "tangent"):
        runtime = TorchRuntime(build("mlp", 1, 10, seed=0, grid=8, hidden=(16,)))
        clients = [Client(f"c{i}", runtime, train, seed=i) for i in range(2)]
        estimator = SteinEstimator(40, 1e-4, scheme)
        server = Server(
            runtime, estimator, seed=1, batch_size=32, optimizer=lambda p: torch.optim.Adam(p, lr=0.02)
        )
        weights += [server.weights.copy()]
        losses += [evaluate(runtime, server.weights, held)[1]]
        for _ in simulate(server, clients, rounds=40):
            pass
        weights += [server.weights.copy()]
        losses += [evaluate(runtime, server.weights, held)[1]]
    start, forward, _, tangent = losses
    assert tangent < 0.5 * start
    assert tangent == pytest.approx(forward, rel=0.01)
    moved = np.linalg.norm(weights[1] - weights[0])
    assert np.linalg.norm(weights[3] - weights[1]) < 0.02 * moved
