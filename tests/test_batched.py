"""Many directions in one pass: the same losses as one by one, when it is done, and what falls back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from baffle.errors import ConfigError
from baffle.estimator import SteinEstimator
from baffle.models import build
from baffle.perturbations import Gaussian
from baffle.runtimes import Batch, sweeps
from baffle.runtimes.batched import Survey, batched, chunk_for, in_chunks, pays
from baffle.runtimes.torch import TorchRuntime, cross_entropy
from baffle.stream import Stream, seed_from
from tests.contracts.runtime import RuntimeContract
from tests.test_torch_runtime import (
    Branched,
    InPlace,
    Looping,
    Tied,
    Tower,
    _adds_trainable,
    _buffer,
    _statement,
    batch_norm_net,
    by_hand,
    made,
    pictures,
    squared,
    state_of,
    vectors,
)

STREAM = Stream(seed_from(5), 2)
GAUSS = Gaussian()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by(runtime: TorchRuntime, way: str, batch: Batch, directions, scale: float = 0.1, chunk: int = 4):
    """Losses by one way or the other, whatever the runtime would choose."""
    w, n = runtime.weights(), runtime.layout.n
    with torch.inference_mode(), runtime._measuring():
        objective, origin = runtime._objective(batch), torch.from_numpy(w).to(runtime._wide)
        rows = runtime._rows(STREAM, GAUSS)
        assert n == len(origin)
        if way == "batched":
            modules = [runtime._part.module]
            return batched(objective, modules, origin, list(directions), scale, rows, chunk)
        return runtime._sweeps.one_by_one(objective, origin, list(directions), scale, rows)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "tower": (lambda: made(Tower), vectors),
    "tied": (lambda: made(Tied), vectors),
    "two tensors cross the cut": (lambda: made(Branched), vectors),
    "batch norm": (lambda: made(batch_norm_net), pictures),
    "mlp": (lambda: build("mlp", 3, 3, seed=0), pictures),
    "lenet": (lambda: build("lenet", 3, 3, seed=0, norm="group"), pictures),
    "wrn": (lambda: build("wrn-10-2", 3, 3, seed=0), pictures),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_batched_and_one_by_one_agree_to_rounding(name):
    module, batch = (make() for make in NETWORKS[name])
    module.train()
    before = state_of(module)
    runtime = TorchRuntime(module)
    alone, together = (by(runtime, way, batch, range(9)) for way in ("one by one", "batched"))
    np.testing.assert_allclose(together, alone, rtol=64 * 2**-24)
    assert len(set(together.tolist())) == 9
    assert state_of(module) == before


@pytest.mark.parametrize("name", ["tower", "tied", "mlp", "lenet"])
def test_a_loss_does_not_depend_on_its_chunk(name):
    """Not one bit, for these networks on a CPU: not on the chunk's size, nor on who else is in it."""
    module, batch = (make() for make in NETWORKS[name])
    runtime = TorchRuntime(module)
    order = [7, 2, 0, 11, 5, 5, 1, 3]
    want = by(runtime, "batched", batch, range(13), chunk=13)
    for chunk in (2, 3, 5, 8):
        assert by(runtime, "batched", batch, range(13), chunk=chunk).tolist() == want.tolist()
        assert by(runtime, "batched", batch, order, chunk=chunk).tolist() == want[order].tolist()


class TestContractOfBatches(RuntimeContract):
    """The same promises where a CPU batches of its own accord."""

    def runtime(self) -> TorchRuntime:
        return TorchRuntime(made(Tower).train(), memory_budget=1000)

    def batch(self) -> Batch:
        return vectors()

    def oracle(self, weights, batch):
        return by_hand(self.runtime().module, weights, batch)

    def test_it_is_batches_that_this_class_is_about(self, parts, monkeypatch):
        runtime, w, batch = parts
        monkeypatch.setattr(runtime._sweeps, "one_by_one", None)
        runtime.losses(w, batch, STREAM, GAUSS, range(3), 0.1)


class TestContractOfForcedBatches(RuntimeContract):
    """As on a GPU: convolutions too, in chunks."""

    @pytest.fixture(autouse=True)
    def always(self, monkeypatch):
        monkeypatch.setattr(sweeps, "pays", lambda seen, device: True)
        monkeypatch.setattr(sweeps, "MOST_ON_CPU", 3)
        monkeypatch.setattr(sweeps.Sweeps, "one_by_one", None)

    def runtime(self) -> TorchRuntime:
        return TorchRuntime(build("lenet", 3, 3, seed=0, channels=(4, 8), norm="group"))

    def batch(self) -> Batch:
        return pictures()

    def oracle(self, weights, batch):
        return by_hand(self.runtime().module, weights, batch)


# --- when it is done -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batches"), [("mlp", True), ("tower", True), ("lenet", False), ("wrn", False)]
)
def test_a_cpu_batches_small_networks_without_convolutions(name, batches, monkeypatch):
    module, batch = (make() for make in NETWORKS[name])
    runtime = TorchRuntime(module)
    monkeypatch.setattr(runtime._sweeps, "one_by_one" if batches else "chunk", None)
    runtime.losses(runtime.weights(), batch, STREAM, GAUSS, range(3), 0.1)


def test_a_survey_counts_multiplications():
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 7))
    runtime, batch = TorchRuntime(module), pictures()
    with torch.inference_mode():
        seen = runtime._sweeps.survey(runtime._objective(batch), torch.from_numpy(runtime.weights()))
    products = 4 * 36 * 5 * 27 + 4 * 7 * 180
    assert seen.convolutions == 1
    assert products <= seen.multiplications <= 1.5 * products  # and the elements of everything else
    assert seen.largest == 7 * 180 * 4


def test_the_rule_is_one_of_shapes_and_device():
    assert pays(Survey(10**5, 0, 10), CPU)
    assert not pays(Survey(10**7, 0, 10), CPU)
    assert not pays(Survey(10**5, 1, 10), CPU)
    assert pays(Survey(10**12, 50, 10), CUDA)


def test_chunks_fit_the_budget():
    small, large = Survey(1, 0, 100), Survey(1, 0, 10**9)
    assert chunk_for(small, 50, 4, 100_000, CUDA, 8) == 100_000 // (3 * 50 * 4 + 4 * 100)
    assert chunk_for(large, 50, 4, 100_000, CUDA, 8) == 1
    assert chunk_for(small, 50, 4, 100_000, CPU, 8) == 8
    assert chunk_for(large, 50, 4, 100_000, CPU, 8) == 2


def test_modules_with_hooks_run_once_a_direction():
    module, calls = made(lambda: nn.Linear(4, 3)), []
    module.register_forward_hook(lambda *_: calls.append(1))
    runtime = TorchRuntime(module)
    runtime.losses(runtime.weights(), vectors(), STREAM, GAUSS, range(5), 0.1)
    assert len(calls) == 5


# --- what vmap cannot do -------------------------------------------------------------------------


class Reading(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if float(self.weight.sum()) > 0 else 1)


def _running_mean(m: InPlace, x: Tensor) -> Tensor:
    h = m.h(x)
    m.shift.add_(h.mean(dim=0))
    return h + m.shift


def numpy_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    scores = outputs.detach().double().numpy()
    return torch.from_numpy(np.abs(scores).sum(axis=1)) + targets


@pytest.mark.parametrize(
    ("module", "loss"),
    [
        (Looping, cross_entropy),
        (lambda: Reading(4, 3), cross_entropy),
        (lambda: InPlace(_adds_trainable), cross_entropy),
        (lambda: InPlace(_statement), cross_entropy),
        (lambda: InPlace(_buffer), cross_entropy),
        (lambda: InPlace(_running_mean), cross_entropy),
        (lambda: nn.Linear(4, 3), numpy_loss),
    ],
    ids=["loop", "item", "in place", "statement", "buffer", "running mean", "loss"],
)
def test_what_vmap_refuses_runs_one_by_one(module, loss):
    module, batch = made(module), vectors()
    before = state_of(module)
    runtime = TorchRuntime(module, loss)
    w, n = runtime.weights(), runtime.layout.n
    for _ in range(2):
        got = runtime.losses(w, batch, STREAM, GAUSS, range(5), 0.3)
        z = [GAUSS.values(STREAM, k, runtime.layout, 0, n) for k in range(5)]
        np.testing.assert_allclose(got, [by_hand(module, w + 0.3 * row, batch, loss) for row in z], rtol=1e-5)
    assert runtime.loss(w, batch) == pytest.approx(by_hand(module, w, batch, loss), rel=1e-5)
    assert state_of(module) == before


def test_a_users_loss_is_batched_too():
    batch = vectors()._replace(targets=np.random.default_rng(5).normal(size=(6, 3)).astype(np.float32))
    runtime = TorchRuntime(made(lambda: nn.Linear(4, 3)), squared)
    alone, together = (by(runtime, way, batch, range(6)) for way in ("one by one", "batched"))
    np.testing.assert_allclose(together, alone, rtol=64 * 2**-24)


def test_a_wrong_loss_is_refused_at_once():
    runtime = TorchRuntime(nn.Linear(4, 3), lambda o, t: F.cross_entropy(o, t))
    with pytest.raises(ConfigError, match="one loss a sample"):
        runtime.losses(runtime.weights(), vectors(), STREAM, GAUSS, range(3), 0.1)


# --- memory --------------------------------------------------------------------------------------


def test_a_chunk_that_does_not_fit_is_halved():
    sizes: list[int] = []

    def measure(z: Tensor) -> Tensor:
        sizes.append(len(z))
        if len(z) > 5:
            raise torch.OutOfMemoryError
        return z[:, 0].double()

    def rows(directions):
        return [torch.full((2,), float(k)) for k in directions]

    got = in_chunks(measure, range(20), rows, 20)
    assert got.tolist() == list(range(20))
    assert sizes == [20, 10, 5, 5, 5, 5]
    with pytest.raises(torch.OutOfMemoryError):
        in_chunks(lambda z: measure(z.repeat(6, 1)), range(3), rows, 2)


def test_directions_made_together_are_the_ones_made_alone():
    runtime = TorchRuntime(made(Tower), memory_budget=400)
    n = runtime.layout.n
    want: dict[int, NDArray] = {k: GAUSS.values(STREAM, k, runtime.layout, 0, n) for k in range(12)}
    for asked in ([0], [3, 1, 2, 9], [9, 9, 0], list(range(12)), [11]):
        for k, row in zip(asked, runtime._rows(STREAM, GAUSS)(asked), strict=True):
            np.testing.assert_array_equal(row.numpy(), want[k])


def test_an_estimate_is_the_same_to_rounding_whichever_way_it_was_measured(monkeypatch):
    module, batch = build("mlp", 3, 3, seed=0), pictures(16)
    w = TorchRuntime(module).weights()
    together = SteinEstimator(30, 1e-2, "central").slopes(TorchRuntime(module), w, batch, STREAM)
    monkeypatch.setattr(sweeps, "pays", lambda seen, device: False)
    alone = SteinEstimator(30, 1e-2, "central").slopes(TorchRuntime(module), w, batch, STREAM)
    # A loss of about 1 is off by a few 2⁻²⁴, twice, over 2σ.
    np.testing.assert_allclose(together.slopes, alone.slopes, atol=16 * 2**-24 / 1e-2, rtol=0)
