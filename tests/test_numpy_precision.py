"""What narrow weights and narrow arithmetic do to slopes: the design's table, measured again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from baffle.errors import ConfigError, LossError, PrecisionError
from baffle.estimator import SteinEstimator
from baffle.export.torch import from_torch
from baffle.models import LeNet
from baffle.perturbations import Gaussian
from baffle.runtimes import USABLE_SIGMA, Batch, activations
from baffle.runtimes.numpy import NumpyRuntime
from baffle.runtimes.sources import PackedWeights
from baffle.runtimes.torch import TorchRuntime
from baffle.stream import Stream, seed_from

STREAM = Stream(seed_from(1), 0)
K = 48


@pytest.fixture(scope="module")
def world():
    """LeNet, its bundle, 32 samples, and the exact slopes along K directions by backpropagation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LeNet()
    rng = np.random.default_rng(0)
    batch = Batch(rng.normal(size=(32, 1, 8, 8)).astype(np.float32), rng.integers(0, 10, 32))
    bundle = from_torch(module, input_shape=(1, 8, 8), onnx=False)
    gradient, _ = TorchRuntime(copy.deepcopy(module).double()).gradient(bundle.weights(), batch)
    n = bundle.layout.n
    z = np.array([Gaussian().values(STREAM, k, bundle.layout, 0, n) for k in range(K)])
    yield module, bundle, batch, z.astype(np.float64) @ gradient.astype(np.float64)
    torch.set_num_threads(before)


def correlation(world, sigma, scheme, weights=None, **options):
    _, bundle, batch, exact = world
    runtime = NumpyRuntime(bundle, **options)
    runtime.check_sigma = lambda sigma: None  # what is refused is measured all the same
    w = bundle.weights() if weights is None else weights
    got = SteinEstimator(K, sigma, scheme).slopes(runtime, w, batch, STREAM).slopes
    return float(np.corrcoef(got, exact)[0, 1])


@pytest.mark.parametrize("sigma", [1e-3, 1e-4])
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_weights_stored_in_float16_measure_as_those_in_float32(world, sigma, storage):
    assert correlation(world, sigma, "central", storage=storage) > 0.9995


def test_weights_stored_in_bfloat16_are_off_by_their_own_rounding(world):
    assert correlation(world, 1e-4, "central", storage="bfloat16") > 0.999


def test_weights_stored_in_int8_are_off_by_their_own_rounding_whatever_sigma(world):
    """The slopes are exact ones, of the weights that int8 has: so they do not get worse with a small σ."""
    module, bundle, batch, _ = world
    for sigma in (1e-3, 1e-4):
        assert correlation(world, sigma, "central", storage="int8") > 0.98
    packed = PackedWeights.pack(bundle.weights(), bundle.layout, "int8")
    kept = packed[0 : len(packed)]
    own, _ = TorchRuntime(copy.deepcopy(module).double()).gradient(kept, batch)
    n = bundle.layout.n
    z = np.array([Gaussian().values(STREAM, k, bundle.layout, 0, n) for k in range(K)])
    at_packed = (module, bundle, batch, z.astype(np.float64) @ own.astype(np.float64))
    assert correlation(at_packed, 1e-4, "central", storage="int8") > 0.9995
    # Given packed, or packed when given: the same.
    estimator = SteinEstimator(4, 1e-4, "central")
    runtime = NumpyRuntime(bundle, storage="int8")
    whole = estimator.slopes(runtime, bundle.weights(), batch, STREAM).slopes
    assert estimator.slopes(runtime, packed, batch, STREAM).slopes.tolist() == whole.tolist()
    other = NumpyRuntime(bundle, storage="float16")
    with pytest.raises(ConfigError, match="packed as int8"):
        estimator.slopes(other, packed, batch, STREAM)


@pytest.fixture(scope="module")
def trained(world):
    """The same after forty steps of training: slopes are small beside losses then."""
    module, _, batch, _ = world
    module = copy.deepcopy(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        optimizer.step()
    bundle = from_torch(module, input_shape=(1, 8, 8), onnx=False)
    gradient, _ = TorchRuntime(copy.deepcopy(module).double()).gradient(bundle.weights(), batch)
    n = bundle.layout.n
    z = np.array([Gaussian().values(STREAM, k, bundle.layout, 0, n) for k in range(K)])
    return module, bundle, batch, z.astype(np.float64) @ gradient.astype(np.float64)


@pytest.mark.parametrize(
    ("arithmetic", "good", "too_small"), [("float16", 1e-3, 1e-4), ("bfloat16", 1e-2, 1e-3)]
)
def test_narrow_arithmetic_resolves_a_large_sigma_and_no_small_one(trained, arithmetic, good, too_small):
    """``USABLE_SIGMA`` stands for a correlation of 0.99; a tenth of it does not reach that any more."""
    assert correlation(trained, good, "central", arithmetic=arithmetic) > 0.99
    assert correlation(trained, too_small, "central", arithmetic=arithmetic) < 0.98
    assert correlation(trained, too_small, "central") > 0.9995  # in float32
    runtime, batch = NumpyRuntime(trained[1], arithmetic=arithmetic), trained[2]
    with pytest.raises(PrecisionError, match=f"lies below what {arithmetic} arithmetic resolves"):
        SteinEstimator(K, too_small, "central").slopes(runtime, trained[1].weights(), batch, STREAM)


def test_bfloat16_shows_next_to_nothing_of_the_papers_sigma(trained):
    assert correlation(trained, 1e-4, "central", arithmetic="bfloat16") < 0.7
    assert correlation(trained, 1e-4, "central", storage="bfloat16") > 0.999


@pytest.mark.parametrize("arithmetic", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_called_usable_is(world, arithmetic):
    assert correlation(world, USABLE_SIGMA[arithmetic], "central", arithmetic=arithmetic) > 0.98


@pytest.mark.parametrize(("arithmetic", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_every_operators_result_is_rounded(world, arithmetic, dtype):
    """As torch, each result rounded by torch; sums in another order move one by a rounding, now and then."""
    module, bundle, batch, _ = world

    def narrow(x):
        return x.to(dtype).float()

    with torch.no_grad():
        x = narrow(torch.from_numpy(batch.inputs))
        for layer in [*module.features, module.classifier]:
            twin = copy.deepcopy(layer)
            for p in twin.parameters():
                p.copy_(narrow(p))
            x = narrow(twin(x))
    got = NumpyRuntime(bundle, arithmetic=arithmetic).outputs(bundle.weights(), batch)
    assert (narrow(torch.from_numpy(got)) == torch.from_numpy(got)).all()
    step = torch.finfo(dtype).eps * float(x.abs().max())
    np.testing.assert_allclose(got, x, rtol=0, atol=2 * step)
    assert np.mean(got == x.numpy()) > 0.5


@pytest.mark.parametrize(("arithmetic", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_rounding_is_to_nearest_and_ties_to_even(arithmetic, dtype):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    halfway = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519, 65520, 1e-8, 6e-8, 3e38], np.float32)
    x = np.concatenate([bits.view(np.float32), halfway.view(np.float32), special])
    x = x[~np.isnan(x) | (np.arange(len(x)) > 1 << 17)].copy()
    want = torch.from_numpy(x.copy()).to(dtype).float().numpy()
    activations.rounding(arithmetic)(x, np.empty_like(x))
    np.testing.assert_array_equal(x, want)


def test_overflow_in_float16_ends_as_a_loss_that_is_refused(world):
    _, bundle, batch, _ = world
    huge = Batch(batch.inputs * np.float32(1e5), batch.targets)
    runtime = NumpyRuntime(bundle, arithmetic="float16")
    with pytest.raises(LossError, match="loss of the unperturbed weights"):
        SteinEstimator(2, 1e-2).slopes(runtime, bundle.weights(), huge, STREAM)


def test_losses_are_taken_in_float64(world):
    """Two logits of float32, and their cross-entropy as float64 has it."""
    _, bundle, batch, _ = world
    runtime = NumpyRuntime(bundle)
    logits = torch.from_numpy(runtime.outputs(bundle.weights(), batch)).double()
    want = F.cross_entropy(logits, torch.from_numpy(batch.targets), reduction="none").numpy()
    got = runtime.example_losses(bundle.weights(), batch, STREAM, Gaussian(), [0], 0.0)[0]
    np.testing.assert_allclose(got, want, rtol=1e-14)
