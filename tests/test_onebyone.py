"""Directions on several threads: the same bits for any number of them, and modules that cannot share."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from baffle.estimator import SteinEstimator
from baffle.models import build
from baffle.perturbations import Gaussian
from baffle.runtimes.onebyone import share
from baffle.runtimes.torch import TorchRuntime, cross_entropy
from baffle.stream import Stream, seed_from
from tests.test_torch_runtime import (
    Counted,
    Tied,
    Tower,
    batch_norm_net,
    by_hand,
    made,
    pictures,
    state_of,
    vectors,
)

STREAM = Stream(seed_from(5), 2)
GAUSS = Gaussian()


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_lenet() -> nn.Module:
    return build("lenet", 3, 3, seed=0, channels=(4, 8), norm="group")


def partly_frozen() -> nn.Module:
    module = small_lenet()
    module.features[0].requires_grad_(False)
    return module


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize(
    ("module", "batch"),
    [
        (small_lenet, lambda: pictures(8, 12)),
        (partly_frozen, pictures),
        (batch_norm_net, pictures),
        (Tied, vectors),
        (Tower, vectors),
        (lambda: build("mlp", 3, 3, seed=0), lambda: pictures(16, 16)),
    ],
    ids=["lenet", "partly frozen", "batch norm", "tied", "tower", "mlp"],
)
def test_the_same_bits_for_any_number_of_threads(module, batch, batches, monkeypatch):
    """Sixty directions, three times over: a race would not spare all of them."""
    if not batches:
        monkeypatch.setattr("baffle.runtimes.sweeps.pays", lambda seen, device: False)
    module, batch = made(module).train(), batch()
    before = state_of(module)
    results = []
    for workers in (1, 2, 4):
        torch.set_num_threads(workers)
        runtime = TorchRuntime(module)
        w = runtime.weights()
        for _ in range(3):
            losses = runtime.losses(w, batch, STREAM, GAUSS, range(60), 0.1)
            results.append([runtime.loss(w, batch), *losses.tolist()])
        assert torch.get_num_threads() == workers
    assert all(row == results[0] for row in results)
    assert len(set(results[0])) == 61
    z = GAUSS.values(STREAM, 59, runtime.layout, 0, runtime.layout.n)
    assert results[0][-1] == pytest.approx(by_hand(module, w + 0.1 * z, batch), rel=1e-5)
    assert state_of(module) == before


def test_as_many_threads_work_as_torch_may_use_each_on_one_core():
    seen: dict[int, int] = {}
    together = threading.Barrier(3, timeout=20)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen[threading.get_ident()] = torch.get_num_threads()
        if not first:
            together.wait()
        return cross_entropy(outputs, targets)

    first = True
    torch.set_num_threads(3)
    runtime = TorchRuntime(small_lenet(), loss)
    w, batch = runtime.weights(), pictures()
    runtime.loss(w, batch)  # a survey and a comparison come before the first sweep
    first = False
    seen.clear()
    runtime.losses(w, batch, STREAM, GAUSS, range(3), 0.1)
    assert sorted(seen.values()) == [1, 1, 1]
    assert threading.get_ident() not in seen


def test_torchs_number_of_threads_is_put_back_for_this_thread_and_for_new_ones():
    def elsewhere() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    torch.set_num_threads(3)
    runtime = TorchRuntime(small_lenet())
    runtime.losses(runtime.weights(), pictures(), STREAM, GAUSS, range(4), 0.1)
    assert (torch.get_num_threads(), elsewhere()) == (3, 3)

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ZeroDivisionError

    runtime = TorchRuntime(small_lenet(), fails)
    with pytest.raises(ZeroDivisionError):
        runtime.losses(runtime.weights(), pictures(), STREAM, GAUSS, range(4), 0.1)
    assert (torch.get_num_threads(), elsewhere()) == (3, 3)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_first_failure_is_raised_and_stops_the_rest(workers):
    done: list[int] = []

    def work(task: int) -> None:
        if task >= 5:
            raise ValueError(str(task))
        done.append(task)

    torch.set_num_threads(workers)
    with pytest.raises(ValueError, match=r"^5$"):
        share(range(1000), [work] * workers)
    assert sorted(done) == [0, 1, 2, 3, 4]


def test_each_task_is_done_once():
    torch.set_num_threads(4)
    done: list[int] = []
    share(range(500), [done.append] * 4)
    assert sorted(done) == list(range(500))


# --- modules that are not what a copy of them would be -------------------------------------------


class Around(nn.Module):
    """Reads a weight past its structure: a copy would read the module's own one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.shift = lambda: self.head.bias.sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.shift()


class Locked(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.lock = nn.Linear(4, 3), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.head(x)


class Unseen(nn.Module):
    """Changes its input and a buffer behind torch's back."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2.0)
        self.shift.data.add_(1.0)
        return self.head(x + self.shift)


class Hooked(nn.Module):
    """Passes a value from one layer to another through a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        kept: dict[str, Tensor] = {}
        self.body.register_forward_hook(lambda m, args, out: kept.update(h=out))
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(self.kept["h"])


class InPlaceInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mul_(2.0) + self.shift.add_(1.0))


@pytest.mark.parametrize("module", [Around, Locked, Unseen, Hooked, InPlaceInputs])
@pytest.mark.parametrize("workers", [1, 4])
def test_unusual_modules_are_measured_right(module, workers, monkeypatch):
    monkeypatch.setattr("baffle.runtimes.sweeps.pays", lambda seen, device: False)
    module = made(module)
    before, batch = state_of(module), vectors()
    torch.set_num_threads(workers)
    runtime = TorchRuntime(module)
    w, n = runtime.weights(), runtime.layout.n
    got = runtime.losses(w, batch, STREAM, GAUSS, range(20), 0.3)
    assert state_of(module) == before
    z = [GAUSS.values(STREAM, k, runtime.layout, 0, n) for k in range(20)]
    want = []
    for row in z:
        np.testing.assert_array_equal(batch.inputs, vectors().inputs)
        want.append(plain(module, w + np.float32(0.3) * row, batch))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def plain(module: nn.Module, flat: np.ndarray, batch) -> float:
    """The loss with ``flat`` written into the module itself and its state put back, as a user would do it."""
    kept = {name: t.clone() for name, t in module.state_dict().items()}
    try:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(torch.from_numpy(flat), module.parameters())
            outputs = module(torch.from_numpy(batch.inputs.copy()))
            return float(cross_entropy(outputs, torch.from_numpy(batch.targets)).mean())
    finally:
        module.load_state_dict(kept)


def test_frozen_tensors_and_buffers_are_the_modules_own_of_now():
    """What is frozen may be written to between two measurements, as ``load_state_dict`` does."""
    module, batch = made(Tower), vectors()
    module.frozen.requires_grad_(False)
    runtime = TorchRuntime(module)
    w = runtime.weights()
    runtime.losses(w, batch, STREAM, GAUSS, range(3), 0.1)
    with torch.no_grad():
        module.frozen.weight.mul_(3.0)
        module.inner[1][0].running_mean.add_(1.0)
    fresh = TorchRuntime(module).losses(w, batch, STREAM, GAUSS, range(3), 0.1)
    assert runtime.losses(w, batch, STREAM, GAUSS, range(3), 0.1).tolist() == fresh.tolist()


@pytest.mark.parametrize("workers", [1, 4])
def test_autocast_reaches_every_direction(workers):
    torch.set_num_threads(workers)
    runtime, batch = TorchRuntime(small_lenet()), pictures()
    w = runtime.weights()
    exact = runtime.losses(w, batch, STREAM, GAUSS, range(6), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = runtime.losses(w, batch, STREAM, GAUSS, range(6), 0.1)
    assert (np.abs(coarse / exact - 1) > 1e-6).all()
    np.testing.assert_allclose(coarse, exact, rtol=0.05)


def test_a_frozen_prefix_runs_once_a_measurement():
    body = Counted(nn.Linear(4, 4).requires_grad_(False))
    runtime = TorchRuntime(made(lambda: nn.Sequential(body, nn.Tanh(), nn.Linear(4, 3))))
    w, batch = runtime.weights(), vectors()
    for number, scheme in enumerate(("forward", "central"), start=1):
        SteinEstimator(7, 0.1, scheme).slopes(runtime, w, batch, STREAM)
        assert body.calls == number
    with runtime.holding(batch):
        held = runtime.loss(w, batch)
        other = runtime.loss(w, vectors(seed=9))
    assert (runtime.loss(w, batch), runtime.loss(w, vectors(seed=9))) == (held, other)
