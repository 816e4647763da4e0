"""``baffle doctor``: what is installed here, what is missing, and which σ each precision resolves."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np

from baffle.environment import environment

EXTRAS = {
    "torch": ("torch", "training, the simulator, the server"),
    "numba": ("fast", "compiled directions and convolutions: the same results, sooner"),
    "matplotlib": ("plots", "curves and pictures of partitions"),
    "PIL": ("images", "image folders"),
    "cryptography": ("secure", "--secure: sums that show the server no client's answer"),
    "dp_accounting": ("privacy", "--privacy: counting up ε"),
    "onnxruntime": ("onnx", "clients and simulations by ONNX Runtime"),
    "onnxscript": ("export", "bundles of networks with operators of their own"),
    "tensorboard": ("tensorboard", "--tensorboard"),
    "prometheus_client": ("prometheus", "baffle top --serve"),
    "flwr": ("flower", "rounds over Flower"),
    "nvflare": ("flare", "rounds over NVIDIA FLARE"),
}
SIGMAS = (1e-5, 1e-4, 1e-3, 1e-2)


def report() -> Iterator[str]:
    """Lines to print, each as soon as it is known. Measures for a few seconds where torch is there."""
    here = environment()
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    yield f"python {here['python']} on {here['system']}, {here['cores']} cores, {here['processor']}"
    yield versions
    for module, (extra, purpose) in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        state = "installed" if found else f"missing: pip install 'baffle-fl[{extra}]'"
        yield f"  {module:<17} {purpose}: {state}"
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    yield f"  cuda              {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none seen'}"
    yield "correlation of slopes with the exact directional derivative (LeNet, 32 samples of 8×8, K = 48):"
    yield f"  {'arithmetic':<10} {'scheme':<8} " + " ".join(f"σ={sigma:<7g}" for sigma in SIGMAS) + "  usable"
    from baffle.runtimes import USABLE_SIGMA

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for scheme in ("central", "forward"):
            cells = " ".join(f"{slope_correlation(dtype, scheme, sigma):<9.4f}" for sigma in SIGMAS)
            name = str(dtype).removeprefix("torch.")
            usable = f"σ ≥ {USABLE_SIGMA[name]:g}" if scheme == "central" else ""
            yield f"  {name:<10} {scheme:<8} {cells}  {usable}".rstrip()


def slope_correlation(dtype: object, scheme: str, sigma: float, directions: int = 48) -> float:
    """Pearson correlation of measured with exact slopes when ``dtype`` computes the loss."""
    import torch

    from baffle import models
    from baffle.estimator import SteinEstimator
    from baffle.perturbations import Gaussian
    from baffle.runtimes import Batch
    from baffle.runtimes.torch import TorchRuntime
    from baffle.stream import Stream, seed_from

    assert isinstance(dtype, torch.dtype)
    rng = np.random.Generator(np.random.PCG64(0))
    batch = Batch(rng.standard_normal((32, 1, 8, 8), dtype=np.float32), np.arange(32) % 10)
    exact_runtime = TorchRuntime(models.build("lenet", 1, 10, 0).double())
    runtime = TorchRuntime(models.build("lenet", 1, 10, 0).to(dtype))
    # What is asked is whether this σ works, so the check that would refuse it stays out of the way.
    runtime.check_sigma = lambda sigma: None  # type: ignore[method-assign]
    # Both start from the weights as the coarse type holds them.
    weights = runtime.weights()
    gradient, _ = exact_runtime.gradient(weights, batch)
    stream, z = Stream(seed_from(0), 0), Gaussian()
    layout = runtime.layout
    exact = [
        float(z.values(stream, k, layout, 0, layout.n).astype(np.float64) @ gradient)
        for k in range(directions)
    ]
    measured = SteinEstimator(directions, sigma, scheme).slopes(runtime, weights, batch, stream)
    return float(np.corrcoef(exact, measured.slopes)[0, 1])
