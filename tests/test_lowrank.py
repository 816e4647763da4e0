"""The sweep of low-rank directions: its factors, its losses against loops and autograd, what it refuses."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from baffle.models import MobileNetV2, WideResNet, build
from baffle.perturbations import Layout, LowRank
from baffle.runtimes.lowrank import factor_numbers, factors, shared_weight_losses
from baffle.runtimes.torch import TorchArrays, cross_entropy
from baffle.stream import NUMPY, Stream, seed_from

STREAM = Stream(seed_from(5), 3)
EPS = 2.0**-24  # float32's unit roundoff

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's, once


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(module: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module().eval()


def images(count: int = 5, channels: int = 3, size: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, channels, size, size)).astype(np.float32)
    x = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    return x, torch.from_numpy(rng.integers(0, 4, count))


def rows(count: int = 5, width: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, width)).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(rng.integers(0, 4, count))


class Measured:
    """A module and a batch: losses by the sweep, and by a loop over directions made whole in float64."""

    def __init__(self, module: nn.Module, batch: tuple[Tensor, Tensor], loss=cross_entropy) -> None:
        self.module, (self.x, self.targets), self.loss = module, batch, loss
        named = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        self.names, self.origin = list(named), list(named.values())
        self.layout = Layout(tuple(named), tuple(tuple(p.shape) for p in named.values()))

    def sweep(self, rank: int, directions, scale: float, **options) -> NDArray[np.float64] | None:
        def per_sample(tensors: list[Tensor]) -> Tensor:
            own = dict(zip(self.names, tensors, strict=True))
            return self.loss(functional_call(self.module, own, (self.x.clone(),)), self.targets)

        with torch.inference_mode():
            return shared_weight_losses(
                per_sample, self.origin, STREAM, LowRank(rank), self.layout, directions, scale, **options
            )

    def z(self, rank: int, k: int) -> NDArray[np.float64]:
        return LowRank(rank).values(STREAM, k, self.layout, 0, self.layout.n).astype(np.float64)

    def loop(self, rank: int, directions, scale: float, dtype=torch.float64) -> NDArray[np.float64]:
        twin = copy.deepcopy(self.module).to(dtype)
        flat = np.concatenate([w.reshape(-1).double().numpy() for w in self.origin])
        losses = []
        for k in directions:
            values = self.layout.split(torch.from_numpy(flat + scale * self.z(rank, k)).to(dtype))
            with torch.inference_mode():
                own = dict(zip(self.names, values, strict=True))
                outputs = functional_call(twin, own, (self.x.to(dtype),))
                losses.append(float(self.loss(outputs, self.targets).double().mean()))
        return np.array(losses)

    def gradient(self) -> NDArray[np.float64]:
        twin = copy.deepcopy(self.module).double()
        loss = self.loss(twin(self.x.double()), self.targets).mean()
        parameters = dict(twin.named_parameters())
        parts = torch.autograd.grad(loss, [parameters[name] for name in self.names])
        return torch.cat([g.reshape(-1) for g in parts]).numpy()


# --- factors -------------------------------------------------------------------------------------

MIXED = Layout(("m", "v", "c", "s", "e"), ((5, 7), (6,), (3, 2, 3, 3), (), (4, 0)))


@pytest.mark.parametrize("rank", [1, 2, 3, 7])
@pytest.mark.parametrize("arrays", [NUMPY, TorchArrays()], ids=["numpy", "torch"])
@pytest.mark.parametrize("directions", [[7, 0], range(3, 9, 2)], ids=str)
def test_factors_give_the_normative_values_bit_for_bit(rank, arrays, directions):
    numbers = factor_numbers(LowRank(rank), MIXED, STREAM, directions, arrays)
    for row, k in enumerate(directions):
        want = MIXED.split(LowRank(rank).plain(STREAM, k, MIXED, 0, MIXED.n))
        for z, (a, b) in zip(want, factors(LowRank(rank), MIXED, numbers), strict=True):
            left = a[row].double().numpy()
            # A·B is exact, a multiple of 2⁻²⁴ below 2⁵³ of them; so one rounding, in the product with 1/√r.
            got = left if b is None else left @ b[row].double().numpy().T * (1.0 / np.sqrt(rank)) + 0.0
            assert got.astype(np.float32).tobytes() == z.tobytes()


def test_a_direction_takes_few_numbers():
    layout = Layout(("w", "b"), ((256, 784), (256,)))
    assert factor_numbers(LowRank(4), layout, STREAM, [0]).shape == (1, 4 * (256 + 784) + 256)


# --- losses --------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Every kind of convolution that has a factored form, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Hardswish(),
            nn.Conv2d(4, 5, 5, stride=2, padding=2, bias=False),
            nn.Tanh(),
            nn.Conv2d(5, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
            nn.Tanh(),
            nn.Conv2d(4, 6, (2, 3), padding="same"),
            nn.Tanh(),
            nn.Conv2d(6, 4, 2, stride=3, padding=3),  # its corners see nothing but padding
            nn.Tanh(),
            nn.Conv2d(4, 4, 1, stride=2),
            nn.Tanh(),
            nn.Conv2d(4, 5, (2, 1), padding="valid"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


def frozen_stem() -> nn.Module:
    module = build("lenet", 3, 4, 0, channels=(4, 6))
    module.features[0].requires_grad_(False)
    return module


def batch_norms() -> nn.Module:
    norm = nn.BatchNorm2d(6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norm, nn.ReLU(inplace=True), nn.GroupNorm(2, 6), nn.AvgPool2d(2),
        nn.Flatten(), nn.LayerNorm(54), nn.Dropout(0.5), nn.Linear(54, 4),
    )  # fmt: skip


class Mixing(nn.Module):
    """The samples of a batch see each other, and so does a parameter without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6) * 1.5)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x * self.scale / self.one.weight.shape[0])
        x = (x - x.mean(0)) / x.std(0) + x.flip(0)
        return self.head(self.two(x.reshape(len(x), -1)))


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(2, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.one(x.view(-1, 3, 2)))).sum(1)


def half_frozen() -> nn.Module:
    """A trainable bias on a frozen weight, a frozen bias on a trainable one, and one moved by position."""
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    return module


CASES = {
    "convolutions": (Convolutions, lambda: images(size=9)),
    "lenet": (lambda: build("lenet", 3, 4, 0, channels=(4, 8), norm="group"), images),
    "frozen stem": (frozen_stem, images),
    "wide resnet": (lambda: WideResNet(width=1, classes=4), images),
    "batch norms": (batch_norms, images),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), rows),
    "mixing": (Mixing, rows),
    "sequences": (Sequences, rows),
    "half frozen": (half_frozen, rows),
    "mobilenet's head": (lambda: MobileNetV2(4, 0.35).freeze_features(), lambda: images(size=32)),
}


@pytest.fixture(params=CASES)
def measured(request) -> Measured:
    module, batch = CASES[request.param]
    return Measured(made(module), batch())


@pytest.mark.parametrize("rank", [1, 3])
def test_losses_equal_a_loop_over_whole_directions(measured, rank):
    """At a scale where a tap, a bias or a sample in the wrong place shows, against float64."""
    directions = [4, 0, 9, 1, 1, 7]
    got = measured.sweep(rank, directions, 0.25)
    want = measured.loop(rank, directions, 0.25)
    # A few hundred float32 roundings one behind the other, of numbers that the loss may be smaller than.
    np.testing.assert_allclose(got, want, rtol=512 * EPS, atol=512 * EPS)
    assert np.ptp(want) > 1e3 * 512 * EPS


def test_in_float64_the_factored_product_is_the_whole_one(measured):
    """Nothing is left but z's own rounding: entries are float32(S·c), wrong by at most EPS of themselves."""
    double = Measured(measured.module.double(), (measured.x.double(), measured.targets))
    got, want = double.sweep(2, range(5), 1e-4), double.loop(2, range(5), 1e-4)
    slopes = (want - double.loop(2, [0], 0.0)) / 1e-4
    # ‖S·c − z‖ ≤ EPS‖z‖, along a gradient of ‖g‖: the slope moves by EPS‖g‖√n; then float64's own rounding.
    room = 4 * EPS * np.linalg.norm(double.gradient()) * np.sqrt(double.layout.n) * 1e-4 + 1e-13
    np.testing.assert_allclose(got, want, rtol=0, atol=room)
    assert np.abs(slopes).max() * 1e-4 > 100 * room


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", ["lenet", "wrn-10-2"])
def test_slopes_at_a_small_sigma_follow_autograd_and_the_loop(name, rank):
    """σ = 1e-4 in float32, as rounds measure: beside g·z_k, and beside W + σz_k made in float32."""
    case = Measured(build(name, 3, 4, seed=1).eval(), images(8, size=16))
    sigma, count = 1e-4, 12
    exact = np.array([case.gradient() @ case.z(rank, k) for k in range(count)])
    plus, minus = (case.sweep(rank, range(count), s) for s in (sigma, -sigma))
    loop = case.loop(rank, range(count), sigma, torch.float32)
    base = case.loop(rank, [0], 0.0, torch.float32)
    slopes = (plus - minus) / (2 * sigma)
    # Roundings of the outputs are independent of each other: a loss is wrong by about EPS·|outputs|, a few
    # units of it (the loop's own spread around float64 says how many), and a slope by that over σ.
    unit = np.abs(loop - case.loop(rank, range(count), sigma)).max()
    assert unit < 16 * EPS
    np.testing.assert_allclose(plus, loop, rtol=0, atol=6 * max(unit, EPS))
    assert np.corrcoef(plus - base, loop - base)[0, 1] >= 0.99999
    # The difference quotient itself departs from g·z by σ²; with rank 1 on this net by 0.5 % of a slope.
    assert np.corrcoef(slopes, exact)[0, 1] >= 0.9999


@pytest.mark.parametrize("budget", [1, 1 << 14, 1 << 17, 1 << 30])
def test_the_size_of_a_chunk_changes_rounding_only(budget):
    case = Measured(made(lambda: build("lenet", 3, 4, 0, channels=(4, 8))), images())
    got = case.sweep(2, range(11), 0.1, budget=budget)
    np.testing.assert_allclose(got, case.sweep(2, range(11), 0.1), rtol=64 * EPS)
    assert case.sweep(2, [], 0.1, budget=budget).shape == (0,)


def test_a_small_budget_makes_small_chunks(monkeypatch):
    case = Measured(made(lambda: nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 4))), rows(16))
    widths, vmap = [], torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda f: lambda t: (widths.append(len(t)), vmap(f)(t))[1])
    a_direction = 4 * 16 * (64 + 4)  # at least: input and output of the widest layer
    case.sweep(1, range(40), 0.1, budget=8 * a_direction)
    assert widths[0] == 2
    assert 1 <= max(widths[1:]) <= 8
    assert sum(widths) == 40


def test_what_does_not_depend_on_k_runs_once():
    """The stem's product with W, and a frozen layer before it, see B samples and not m·B."""
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.frozen(x)
            seen.append(torch._C._functorch.is_batchedtensor(x))
            return self.head(x)

    case = Measured(made(Spy), rows())
    np.testing.assert_allclose(case.sweep(1, range(4), 0.1), case.loop(1, range(4), 0.1), rtol=64 * EPS)
    assert seen[:2] == [False, False]


def test_module_and_weights_are_left_as_they_were():
    module = made(batch_norms)
    case = Measured(module, images())
    before = copy.deepcopy(module.state_dict())
    x = case.x.clone()
    case.sweep(2, range(5), 0.5)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert torch.equal(case.x, x)


def test_any_per_sample_loss():
    def margin(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - F.one_hot(targets, 4)).square().sum(1)

    case = Measured(made(lambda: nn.Linear(6, 4)), rows(), margin)
    np.testing.assert_allclose(case.sweep(2, range(5), 0.2), case.loop(2, range(5), 0.2), rtol=64 * EPS)


# --- refusals ------------------------------------------------------------------------------------


class Uses(nn.Module):
    """A weight that is used as ``how`` says."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (4, 6)) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.ones(shape)), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.weight)


def no_mode(x: Tensor, weight: Tensor) -> Tensor:
    """A use that no TorchFunctionMode sees."""
    with torch._C.DisableTorchFunction():
        return F.linear(x, weight)


def compiled(x: Tensor, weight: Tensor) -> Tensor:
    """Another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and used
        return torch.jit.trace(lambda x, w: x @ w.T, (torch.ones(5, 6), torch.ones(4, 6)))(x, weight)


REFUSED = {
    "a plain product": lambda x, w: x @ w.T,
    "a weight that is changed first": lambda x, w: F.linear(x, w * 1.0),
    "a sum beside the product": lambda x, w: F.linear(x, w) + w.sum(),
    "a slice": lambda x, w: F.linear(x, w[:4]),
    "its data": lambda x, w: F.linear(x, w.data),
    "inside a list": lambda x, w: F.linear(x, torch.cat([w, w])[:4]),
    "as a bias": lambda x, w: F.linear(x, torch.ones(4, 6), w[:, 0]),
    "unseen": no_mode,
    "in TorchScript": compiled,
    "in half precision": lambda x, w: F.linear(x.half(), w),
    "by its values": lambda x, w: F.linear(x, w) if w.max() > 0 else x[:, :4],
    "by the activations' values": lambda x, w: F.linear(x, w) * (1 if F.linear(x, w).max() > 0 else 2),
    "an einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "under a vmap": lambda x, w: torch.vmap(lambda row: F.linear(row, w))(x),
}


@pytest.mark.parametrize("how", REFUSED.values(), ids=REFUSED)
def test_other_uses_of_a_weight_are_refused(how):
    case = Measured(Uses(how), rows())
    assert case.sweep(2, range(3), 0.1) is None


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.Linear(108, 4)),
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 8)), nn.Flatten()
        ),
    ],
    ids=["depthwise", "transposed", "weight norm"],
)  # fmt: skip
def test_layers_without_a_factored_form_are_refused(module):
    assert Measured(made(module), images()).sweep(1, range(3), 0.1) is None


def test_autocast_is_refused():
    case = Measured(made(lambda: nn.Linear(6, 4)), rows())
    assert case.sweep(1, range(2), 0.1) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert case.sweep(1, range(2), 0.1) is None


def test_whatever_the_loss_raises_is_left_to_the_loop():
    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ZeroDivisionError

    assert Measured(made(lambda: nn.Linear(6, 4)), rows(), fails).sweep(1, range(2), 0.1) is None


# --- the benchmark ---------------------------------------------------------------------------------


def test_the_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    low_rank = importlib.import_module("low_rank")
    row = low_rank.speed("MLP 784-256-256-10", 4, threads=1, turns=1, directions=4)
    assert row["share_of_plain"]["median"] > 0
    assert row["correction"] == 4 * (256 + 784) / (256 * 784)
    monkeypatch.setattr(low_rank, "KINDS", ("lowrank:1",))
    rows = low_rank.accuracy(tmp_path, {"mlp": 2}, directions=2, rounds=2, evaluate_every=2)
    assert [row["perturbation"] for row in rows] == list(low_rank.KINDS)
    assert all(0 <= row["accuracy"] <= 100 and row["forward_passes"] == 10 * 2 * 3 for row in rows)
