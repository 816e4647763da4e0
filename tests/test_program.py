"""A network as a list of compiled steps: the module's own losses, on any number of threads."""

import copy
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("numba")

from baffle.estimator import SteinEstimator
from baffle.kernels import available
from baffle.models import build
from baffle.perturbations import Gaussian
from baffle.runtimes import Batch
from baffle.runtimes.program import Program
from baffle.runtimes.steps import Memory
from baffle.runtimes.torch import TorchRuntime
from baffle.stream import Stream, seed_from
from tests.contracts.runtime import RuntimeContract

STREAM = Stream(seed_from(8), 2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(channels=1, size=12, count=6, seed=0):
    rng = np.random.default_rng(seed)
    pictures = rng.standard_normal((count, channels, size, size)).astype(np.float32)
    return Batch(pictures, rng.integers(0, 10, count))


def program_of(runtime, samples):
    runtime.loss(runtime.weights(), samples)
    return runtime._sweeps._program


def exact(module, weights, samples):
    """The mean loss at flat weights, in float64, by torch alone."""
    twin = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        moving = [p for p in twin.parameters() if p.requires_grad]
        torch.nn.utils.vector_to_parameters(torch.as_tensor(weights), moving)
        outputs = twin(torch.from_numpy(samples.inputs).double())
        return float(F.cross_entropy(outputs, torch.from_numpy(samples.targets)))


class Contract(RuntimeContract):
    rtol = 1024 * 2.0**-24  # minimal filtering rounds more than a plain sum: test_kernels_convolution.py
    module: nn.Module
    samples: Batch

    def runtime(self):
        return TorchRuntime(copy.deepcopy(self.module))

    def batch(self):
        return self.samples

    def oracle(self, weights, samples):
        return exact(self.module, weights, samples)

    def test_it_is_the_program_that_measures(self):
        assert program_of(self.runtime(), self.samples) is not None


class TestContractOfLeNet(Contract):
    module = build("lenet", 1, 10, seed=0)
    samples = batch()


class TestContractOfWideResNet(Contract):
    module = build("wrn-10-2", 3, 10, seed=0)
    samples = batch(3)


class Branches(nn.Module):
    """Two readers of one convolution, a convolution used twice, one behind another without a norm, a frozen
    one, an identity shortcut, layers that stay torch's, affine norms."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.frozen = nn.Conv2d(32, 32, 5, padding=2).requires_grad_(False)
        self.norm = nn.GroupNorm(4, 32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.act(self.first(x))
        x = x + self.twice(F.hardswish(self.twice(x)))
        both = self.down(x)
        x = F.gelu(both) + F.relu(both)
        x = self.norm(self.grouped(self.frozen(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class TestContractOfBranches(Contract):
    torch.manual_seed(3)
    module = Branches()
    samples = batch(3, 11)


@pytest.mark.parametrize("name", ["lenet", "wrn-10-2"])
def test_slopes_follow_the_exact_derivative(name):
    """Correlation at σ = 1e-4, forward; an error of correlation r has the standard error (1 − r²)/√K."""
    channels = 1 if name == "lenet" else 3
    module, samples = build(name, channels, 10, seed=1), batch(channels, 16, 16)
    runtime = TorchRuntime(copy.deepcopy(module))
    weights = runtime.weights()
    got = SteinEstimator(40).slopes(runtime, weights, samples, STREAM).slopes
    flat = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    named = dict(zip([n for n, _ in module.named_parameters()], runtime.layout.split(flat), strict=True))
    outputs = torch.func.functional_call(module.double(), named, (torch.from_numpy(samples.inputs).double(),))
    (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, torch.from_numpy(samples.targets)), flat)
    z = Gaussian().values(STREAM, range(40), runtime.layout, 0, runtime.layout.n)
    assert np.corrcoef(got, z.astype(np.float64) @ gradient.numpy())[0, 1] > 0.9999
    assert program_of(runtime, samples) is not None


def test_bits_do_not_depend_on_the_number_of_threads_or_on_what_ran_before():
    runtime, samples = TorchRuntime(build("wrn-10-2", 3, 10, seed=0)), batch(3)
    weights = runtime.weights()
    losses = {}
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        losses[threads] = runtime.losses(weights, samples, STREAM, Gaussian(), range(9), 1e-3)
        assert torch.get_num_threads() == threads
    runtime.loss(weights, batch(3, 16, 2))  # another shape, in the same memory
    backwards = runtime.losses(weights, samples, STREAM, Gaussian(), range(8, -1, -1), 1e-3)[::-1]
    for other in (losses[2], losses[4], backwards):
        np.testing.assert_array_equal(other, losses[1])
    assert len(set(losses[1].tolist())) == 9


@pytest.mark.parametrize("images", [1, 2, 4])
def test_groups_of_images_change_no_bit(images):
    runtime, samples = TorchRuntime(build("wrn-10-2", 3, 10, seed=0)), batch(3)
    weights, program = runtime.weights(), program_of(runtime, samples)
    ((size, group),) = program._group.items()
    assert images < len(samples.targets)  # or else there is one group
    found = []
    for few in (images, 64):
        program._group[size] = few, group[1]
        found.append(runtime.losses(weights, samples, STREAM, Gaussian(), range(4), 1e-3))
    np.testing.assert_array_equal(*found)


def test_groups_stay_in_the_cache_and_the_columns_go_with_their_batch():
    runtime, samples = TorchRuntime(build("wrn-10-2", 3, 10, seed=0)), batch(3, 32, 9)
    program = program_of(runtime, samples)
    ((few, _),) = program._group.values()
    assert few == 8  # of 34·34·32 floats, in 2 MB
    assert program._entered is None


def test_directions_run_on_several_threads():
    seen = set()

    def loss(outputs, targets):
        seen.add(threading.get_ident())
        gate.wait(timeout=20)
        return F.cross_entropy(outputs.double(), targets, reduction="none")

    gate = threading.Barrier(1)
    runtime, samples = TorchRuntime(build("lenet", 1, 10, seed=0), loss), batch(1, 16, 12)
    runtime.loss(runtime.weights(), samples)
    seen.clear()
    gate = threading.Barrier(2)  # two directions must be under way at once, or this breaks
    torch.set_num_threads(2)
    runtime.losses(runtime.weights(), samples, STREAM, Gaussian(), range(4), 1e-3)
    assert len(seen) == 2


def test_the_module_is_left_as_it_was():
    module = build("lenet", 1, 10, seed=0).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    runtime, samples = TorchRuntime(module), batch()
    inputs = samples.inputs.copy()
    assert program_of(runtime, samples) is not None
    runtime.losses(runtime.weights(), samples, STREAM, Gaussian(), range(3), 0.5)
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    np.testing.assert_array_equal(samples.inputs, inputs)


class Gated(nn.Module):
    """An image plus one pixel of its own, whichever of the two convolutions is made first."""

    def __init__(self, image_first):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.point, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 10)
        self.image_first = image_first

    def forward(self, x):
        x = self.first(x)
        if self.image_first:
            image = self.second(x)
            pixel = self.point(F.adaptive_avg_pool2d(x, 1))
        else:
            pixel = self.point(F.adaptive_avg_pool2d(x, 1))
            image = self.second(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(image + pixel, 1), 1))


class TestContractOfAnAdditionThatBroadcasts(Contract):
    torch.manual_seed(4)
    module = Gated(image_first=True)
    samples = batch()


def test_a_sum_larger_than_its_convolution_has_no_program():
    module, samples = Gated(image_first=False), batch()
    runtime = TorchRuntime(module)
    assert program_of(runtime, samples) is None
    want = exact(module, runtime.weights().astype(np.float64), samples)
    assert runtime.loss(runtime.weights(), samples) == pytest.approx(want, rel=1e-5)


def test_inputs_that_do_not_fit_are_refused_by_torch_and_never_reach_a_kernel():
    runtime = TorchRuntime(build("lenet", 1, 10, seed=0))
    assert program_of(runtime, batch()) is not None
    with pytest.raises(RuntimeError, match="channels"):
        runtime.loss(runtime.weights(), batch(3))


def test_memory_serves_batches_of_all_sizes():
    memory, largest = Memory(), 32 * 1000
    for size in range(1, 33):
        some = [memory.take(size, 1000) for _ in range(2)]
        for array in some:
            array[:] = 0
            memory.give(array)
    held = sum(block.size for blocks in memory._free.values() for block in blocks)
    assert held <= 2 * 4 * largest  # two at a time, in blocks of powers of two


def test_a_numba_that_cannot_be_imported_is_none(monkeypatch):
    assert available.__wrapped__()
    monkeypatch.setitem(sys.modules, "numba", None)
    assert not available.__wrapped__()


class Inverted(nn.Conv2d):
    """Looks like a convolution and is another."""

    def forward(self, x):
        return -super().forward(x)


class InPlace(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x.add_(1).flatten(1)


def plain(*behind):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), *behind, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


WITHOUT = {
    "nothing to gain": plain(nn.Conv2d(16, 32, 7)),
    "another class": plain(Inverted(16, 32, 3)),
    "in place": plain(nn.Conv2d(16, 32, 3), nn.Identity(), nn.ReLU(inplace=True)),
    "in place by a method": InPlace(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 10, 3), nn.AdaptiveAvgPool2d(1)),
    "batch norm": plain(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)),
    "float64": plain(nn.Conv2d(16, 32, 3)).double(),
    "reflected": plain(nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect")),
}


@pytest.mark.parametrize("why", WITHOUT)
def test_what_has_no_program_runs_as_it_always_did(why):
    module, samples = WITHOUT[why], batch()
    runtime = TorchRuntime(module.eval())
    assert program_of(runtime, samples) is None
    outputs = module(torch.from_numpy(samples.inputs).to(next(module.parameters()).dtype))
    want = F.cross_entropy(outputs.detach().double(), torch.from_numpy(samples.targets))
    assert runtime.loss(runtime.weights(), samples) == pytest.approx(float(want), rel=1e-6)


def test_hooks_and_their_absence_without_kernels(monkeypatch):
    runtime, samples = TorchRuntime(build("lenet", 1, 10, seed=0)), batch()
    by_program = runtime.loss(runtime.weights(), samples)
    calls = []
    handle = runtime.module.classifier.register_forward_hook(lambda *_: calls.append(1))
    hooked = runtime.loss(runtime.weights(), samples)
    handle.remove()
    assert calls
    monkeypatch.setattr("baffle.runtimes.sweeps.available", lambda: False)
    other = TorchRuntime(build("lenet", 1, 10, seed=0))
    assert program_of(other, samples) is None
    assert hooked == other.loss(other.weights(), samples) == pytest.approx(by_program, rel=1e-5)


def test_a_program_that_is_not_the_module_is_found_out(monkeypatch):
    runtime, samples = TorchRuntime(build("lenet", 1, 10, seed=0)), batch()
    right = Program.outputs
    monkeypatch.setattr(Program, "outputs", lambda *a: right(*a) * 1.01)
    assert program_of(runtime, samples) is None
