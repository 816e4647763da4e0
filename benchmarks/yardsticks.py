"""What the engine is measured against, as plainly as can be: other ways to the same result, and the limits.

    reference_loop    K perturbed losses and their gradient, as the authors' published code goes about it
    plain_inference   as many forward passes of the unperturbed model, by eager torch
    onnx_inference    the same by ONNX Runtime, whose weights are constants
    backprop          one forward and one backward pass
    limits            multiplications, copied bytes and random words a second on this machine

Written from the descriptions in the paper (arXiv:2301.12195) and in each library's own documents.
"""

from __future__ import annotations

import importlib.util
import io
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from baffle import Gaussian, Layout, Stream


def reference_loop(
    module: nn.Module, inputs: Tensor, targets: Tensor, directions: int, sigma: float = 1e-4
) -> dict[str, Tensor]:
    """Stein's estimate (Eq. 6, forward differences) as {name: gradient}; K + 1 forward passes.

    The published way: noise for each entry of the state dict from the framework's generator, a loaded
    state dict, an eager forward pass, the noise subtracted, and the gradient summed at once. Adding and
    subtracting leaves the weights changed in their last bits.
    """
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    gradient = {name: torch.zeros_like(p) for name, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        base = cross_entropy(module(inputs), targets).item()
        for _ in range(directions):
            state = module.state_dict()
            noise = {name: torch.randn(state[name].shape, device=inputs.device) for name in trainable}
            for name in trainable:
                state[name] = state[name] + sigma * noise[name]
            module.load_state_dict(state)
            difference = cross_entropy(module(inputs), targets).item() - base
            for name in trainable:
                state[name] = state[name] - sigma * noise[name]
                gradient[name] += difference / (sigma * directions) * noise[name]
            module.load_state_dict(state)
    return gradient


def plain_inference(module: nn.Module, inputs: Tensor, passes: int) -> Tensor:
    """The outputs of the last of ``passes`` forward passes of the unperturbed model."""
    with torch.inference_mode():
        for _ in range(passes):
            outputs: Tensor = module(inputs)
        if outputs.is_cuda:
            torch.cuda.synchronize()
    return outputs


def backprop(module: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """The true gradient, one tensor a trainable parameter: one forward and one backward pass."""
    loss = cross_entropy(module(inputs), targets)
    return list(torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad]))


def onnx_available() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


def onnx_inference(module: nn.Module, inputs: Tensor, threads: int) -> Callable[[int], Any]:
    """A function of a number of passes: that many forward passes by ONNX Runtime on ``threads`` threads.

    The weights are constants of the graph, so ONNX Runtime may lay them out once, as no perturbed pass can.
    """
    import onnxruntime

    graph: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated; the other needs onnxscript
        torch.onnx.export(module, (inputs,), graph, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(graph.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs.numpy()}

    def run(passes: int) -> Any:
        for _ in range(passes):
            (outputs,) = session.run(None, feed)
        return outputs

    return run


# The machine


def rate(amount: float, run: Callable[[], object], repetitions: int) -> float:
    """``amount`` a second, by the quickest of ``repetitions`` runs after one to warm up."""
    run()
    best = float("inf")
    for _ in range(repetitions):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return amount / best


def operations(module: nn.Module, inputs: Tensor) -> int:
    """Operations of the products in one forward pass, a multiplication and an addition as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(inputs)
    return int(counter.get_total_flops())


def finished(run: Callable[[], object], device: str) -> Callable[[], object]:
    """``run``, and the wait for its end on a device that goes on by itself."""

    def wait() -> None:
        run()
        torch.cuda.synchronize()

    return wait if device != "cpu" else run


def limits(size: int, values: int, repetitions: int, device: str = "cpu") -> dict[str, float]:
    """Square product of ``size``, a 3×3 convolution, a copy of 64·``values`` bytes, ``values`` random words.

    A copied byte is read and written: two bytes. Random values are made on one thread everywhere.
    """
    images = torch.randn(32, 64, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    source = torch.randn(16 * values, device=device)
    target = torch.empty_like(source)
    stream, layout, rng = Stream(bytes(32), 0), Layout.flat(values), np.random.default_rng(0)
    gaussian = Gaussian()
    a, b = torch.randn(2, size, size, device=device)
    work: dict[str, tuple[float, Callable[[], object]]] = {
        "sgemm_gflops": (2e-9 * size**3, lambda: torch.mm(a, b)),
        "conv_gflops": (2e-9 * images.numel() * 64 * 9, lambda: conv2d(images, kernel, padding=1)),
        "copy_gb_s": (8e-9 * source.numel(), lambda: target.copy_(source)),
        "torch_randn_m_s": (1e-6 * values, lambda: torch.randn(values, device=device)),
    }
    if device == "cpu":
        work |= {
            "numpy_normal_m_s": (1e-6 * values, lambda: rng.standard_normal(values, dtype=np.float32)),
            "numpy_words_m_s": (1e-6 * values, lambda: rng.bytes(4 * values)),
            "philox_words_m_s": (1e-6 * values, lambda: stream.words(0, 0, values)),
            "gaussian_m_s": (1e-6 * values, lambda: gaussian.values(stream, 0, layout, 0, values)),
        }
    with torch.inference_mode():
        found = {
            name: rate(amount, finished(run, device), repetitions) for name, (amount, run) in work.items()
        }
    return {name: round(value, 1) for name, value in found.items()}
