"""The cells of ``make bench``: each measures one thing and returns seconds and figures, never a verdict.

Whatever is compared is measured in one process, in turns (A B C, A B C, ...). A ratio is the median over the
turns of the quotient within a turn, beside the quartiles of those quotients and the quotient of the minima.
``bench.py`` starts each cell in a process of its own, on the cores that it names, and judges the figures.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import overhead
import torch
import yardsticks
from alone import ReferenceLoop
from numpy.typing import NDArray
from torch import nn
from turns import Turns

from baffle import Batch, Gaussian, Layout, Rademacher, SteinEstimator, Stream, TorchRuntime, models

Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much a cell does: ``FULL`` for figures, ``QUICK`` to see that everything runs."""

    turns: int
    directions: int  # K of the engine
    short: int  # K of what is slow and measured over fewer passes; scaled up by (K + 1)/(short + 1)
    batch: int
    image: int  # of MobileNetV2
    values: int  # of one perturbation
    parameters: int  # n of the reconstruction
    rebuilt: int  # its K
    product: int  # rows of the square product


FULL = Size(9, 100, 20, 32, 96, 1_000_000, 3_500_000, 500, 2048)
QUICK = Size(1, 2, 1, 2, 32, 1_000, 1_000, 3, 16)


def peak_memory() -> int:
    """The most bytes that this process held in memory so far."""
    try:
        # Not getrusage where it can be avoided: after fork and exec it begins at the parent's peak.
        (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def extra_memory(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes held before ``run``, and what its peak adds to them. In a fresh process, after a warm-up."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is held now
    before = peak_memory()
    run()
    return before, peak_memory() - before


def build(name: str) -> nn.Module:
    return models.build(name, 1 if name == "lenet" else 3, 10, seed=0).eval()


def images(batch: int, channels: int, size: int) -> Batch:
    rng = np.random.default_rng(0)
    shape = (batch, channels, size, size)
    return Batch(rng.standard_normal(shape, dtype=np.float32), rng.integers(0, 10, batch))


def fresh_streams() -> Callable[[], Stream]:
    """A new round at every call: no perturbation can have been kept from the one before."""
    rounds = itertools.count()
    return lambda: Stream(bytes(32), next(rounds))


def with_threads(threads: int, run: Callable[[], object]) -> Callable[[], None]:
    def limited() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            run()
        finally:
            torch.set_num_threads(before)

    return limited


# Item 1 (item 9 on a GPU)


def forwards(size: Size, name: str, device: str = "cpu") -> Figures:
    """K perturbed losses and their gradient, by the engine and by every yardstick."""
    batch = images(size.batch, 1 if name == "lenet" else 3, 32)
    runtime, module = TorchRuntime(build(name), device=device), build(name).to(device)
    inputs = torch.as_tensor(batch.inputs, device=device)
    targets = torch.as_tensor(batch.targets, device=device)
    nhwc = build(name).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    nhwc_inputs = inputs.contiguous(memory_format=torch.channels_last)
    estimator, weights, stream_of = SteinEstimator(size.directions), runtime.weights(), fresh_streams()

    def engine() -> None:
        stream = stream_of()
        slopes = estimator.slopes(runtime, weights, batch, stream).slopes
        estimator.gradient(slopes, stream, runtime.layout)

    threads, passes = torch.get_num_threads(), size.short + 1

    def reference() -> None:
        yardsticks.reference_loop(module, inputs, targets, size.short)

    candidates: dict[str, Callable[[], object]] = {
        "engine": engine,
        "reference": reference,
        "eager": lambda: yardsticks.plain_inference(module, inputs, passes),
        "eager_nhwc": lambda: yardsticks.plain_inference(nhwc, nhwc_inputs, passes),
        "backprop": lambda: yardsticks.backprop(module, inputs, targets),
    }
    here = contextlib.ExitStack()
    if device == "cpu":
        for kind, count in {"reference_alone": threads, "reference_alone_one_thread": 1}.items():
            other = here.enter_context(ReferenceLoop(name, size.short, size.batch, count))
            candidates[kind] = other.run
    a, b = torch.randn(2, size.product, size.product, device=device)
    candidates["square product"] = yardsticks.finished(lambda: torch.mm(a, b), device)
    if threads > 1:
        candidates["reference_one_thread"] = with_threads(1, reference)
    if yardsticks.onnx_available() and device == "cpu":
        session = yardsticks.onnx_inference(build(name), inputs, threads)
        candidates["onnx"] = lambda: session(passes)
    with here:
        turns = Turns(candidates, size.turns)
    scale = (size.directions + 1) / passes
    figures: Figures = {
        "reference / engine": turns.ratio("reference", "engine", scale),
        "engine / eager": turns.ratio("engine", turns.quickest("eager", "eager_nhwc"), 1 / scale),
        "engine / backprop": turns.ratio("engine", "backprop"),
    }
    if "reference_alone" in candidates:
        figures["reference alone / engine"] = turns.ratio("reference_alone", "engine", scale)
        one_thread = turns.ratio("reference_alone_one_thread", "engine", scale)
        figures["reference alone on one thread / engine"] = one_thread
    if "reference_one_thread" in candidates:
        figures["reference on one thread / engine"] = turns.ratio("reference_one_thread", "engine", scale)
    if "onnx" in candidates:
        figures["engine / ONNX Runtime"] = turns.ratio("engine", "onnx", 1 / scale)
    work = yardsticks.operations(module, inputs) * (size.directions + 1)
    figures["engine / square product, GFLOP/s"] = turns.ratio(
        "square product", "engine", work / (2 * size.product**3)
    )
    figures["GFLOP a pass"] = work / (size.directions + 1) / 1e9
    a_pass = median(turns.seconds["engine"]) / (size.directions + 1)
    figures["engine, GFLOP/s"] = work / median(turns.seconds["engine"]) / 1e9
    if name == "lenet":  # 60,000 samples in batches of the size measured, K = 500
        figures["20 epochs of MNIST, hours"] = 20 * 60_000 / size.batch * 501 * a_pass / 3600
    return {"seconds": turns.summary(), "figures": figures, "K": size.directions, "short": size.short}


# Item 2


def prefix(size: Size) -> Figures:
    """A frozen MobileNetV2 with a trainable head, its features computed each round, or cached."""
    module = models.MobileNetV2(classes=10).freeze_features().eval()
    runtime = TorchRuntime(module)
    batch = images(size.batch, 3, size.image)
    cached = runtime.prefixed(batch)
    inputs = torch.as_tensor(batch.inputs)
    nhwc = models.MobileNetV2(classes=10).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    nhwc_inputs = inputs.contiguous(memory_format=torch.channels_last)
    estimator, weights, stream_of = SteinEstimator(size.directions), runtime.weights(), fresh_streams()
    turns = Turns(
        {
            "slopes": lambda: estimator.slopes(runtime, weights, batch, stream_of()),
            "slopes_cached": lambda: estimator.slopes(runtime, weights, cached, stream_of()),
            "eager": lambda: yardsticks.plain_inference(module, inputs, 1),
            "eager_nhwc": lambda: yardsticks.plain_inference(nhwc, nhwc_inputs, 1),
        },
        size.turns,
    )
    plain = turns.quickest("eager", "eager_nhwc")
    return {
        "seconds": turns.summary(),
        "figures": {
            "slopes / one pass": turns.ratio("slopes", plain),
            "cached slopes / one pass": turns.ratio("slopes_cached", plain),
        },
    }


# Item 3


def perturbations(size: Size) -> Figures:
    """Directions into fresh arrays through the public interface, beside torch.randn."""
    layout, directions, stream = Layout.flat(size.values), itertools.count(), Stream(bytes(32), 0)

    def values(kind: Gaussian | Rademacher) -> Callable[[], object]:
        return lambda: kind.values(stream, next(directions), layout, 0, size.values)

    turns = Turns(
        {
            "torch.randn": lambda: torch.randn(size.values),
            "gaussian": values(Gaussian()),
            "rademacher": values(Rademacher()),
        },
        10 * size.turns,
    )
    return {
        "seconds": turns.summary(),
        "figures": {
            "torch.randn / Gaussian": turns.ratio("torch.randn", "gaussian"),
            "torch.randn / Rademacher": turns.ratio("torch.randn", "rademacher"),
        },
    }


# Item 4

_SLICE = 1 << 16


def _slopes(count: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal(count)


def reconstruction(size: Size) -> Figures:
    """Slopes to gradient, beside making the same perturbations on as many threads and dropping them."""
    layout, stream, kind = Layout.flat(size.parameters), Stream(bytes(32), 0), Gaussian()
    estimator, slopes, threads = SteinEstimator(size.rebuilt), _slopes(size.rebuilt), torch.get_num_threads()

    def generate() -> None:
        def part(start: int) -> None:
            stop = min(start + _SLICE, layout.n)
            for k in range(size.rebuilt):
                kind.values(stream, k, layout, start, stop)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(0, layout.n, _SLICE)))

    turns = Turns(
        {"gradient": lambda: estimator.gradient(slopes, stream, layout), "generate": generate},
        max(1, size.turns // 2),
    )
    gradient = estimator.gradient(slopes, stream, layout)
    return {
        "seconds": turns.summary(),
        "figures": {"gradient / generate": turns.ratio("gradient", "generate")},
        "digest": hashlib.sha256(gradient.tobytes()).hexdigest(),
    }


def reconstruction_memory(size: Size, share: int) -> Figures:
    """Peak memory of one reconstruction with K / ``share`` directions, beyond what was held before it."""
    layout, stream = Layout.flat(size.parameters), Stream(bytes(32), 0)
    directions = max(1, size.rebuilt // share)
    estimator, slopes = SteinEstimator(directions), _slopes(directions)
    estimator.gradient(_slopes(2), stream, Layout.flat(1 << 14))  # loads what is compiled
    before, extra = extra_memory(lambda: estimator.gradient(slopes, stream, layout))
    return {
        "figures": {
            "directions": directions,
            "before, MB": before / 1e6,
            "extra, MB": extra / 1e6,
            "extra / gradient": extra / (4 * layout.n),
        }
    }


def limits(size: Size, device: str = "cpu") -> Figures:
    return {"figures": yardsticks.limits(size.product, size.values, 2 * size.turns, device)}


# Item 5


def tangent(size: Size, device: str = "cpu") -> Figures:
    """Slopes of LeNet by forward-mode propagation: how true, and how long beside finite differences.

    The truth is z_k·∇L by backprop in float64. Weights and images are bfloat16 numbers, so that every
    precision measures the same function; the directions are float32, which bfloat16 has to round.
    """
    module = build("lenet").bfloat16()
    batch = images(size.batch, 1, 32)
    batch = Batch(torch.as_tensor(batch.inputs).bfloat16().float().numpy(), batch.targets)
    stream, stream_of, directions = Stream(bytes(32), 0), fresh_streams(), range(size.directions)
    runtimes = {
        "float32": TorchRuntime(copy.deepcopy(module).float(), device=device),
        "bfloat16": TorchRuntime(module, device=device),
    }
    layout, weights = runtimes["float32"].layout, runtimes["float32"].weights()
    gradient, _ = TorchRuntime(copy.deepcopy(module).double()).gradient(weights, batch)
    exact = [Gaussian().values(stream, k, layout, 0, layout.n) @ gradient.astype(float) for k in directions]
    propagated = SteinEstimator(size.directions, scheme="tangent")
    differences = SteinEstimator(size.directions)

    def slopes(estimator: SteinEstimator, precision: str) -> Callable[[], object]:
        return lambda: estimator.slopes(runtimes[precision], weights, batch, stream_of())

    turns = Turns(
        {
            "forward, float32": slopes(differences, "float32"),
            "tangent, float32": slopes(propagated, "float32"),
            "tangent, bfloat16": slopes(propagated, "bfloat16"),
        },
        max(1, size.turns // 3),
    )
    return {
        "seconds": turns.summary(),
        "figures": {
            **{
                f"1 − correlation, {precision}": 1.0
                - float(np.corrcoef(exact, propagated.slopes(runtime, weights, batch, stream).slopes)[0, 1])
                for precision, runtime in runtimes.items()
            },
            "forward / tangent": turns.ratio("forward, float32", "tangent, float32"),
            "forward / tangent in bfloat16": turns.ratio("forward, float32", "tangent, bfloat16"),
        },
    }


def low_rank(size: Size) -> Figures:
    """The share of plain inference's throughput that rank-1 directions reach, network by network."""
    from low_rank import NETWORKS, speed  # which takes its turns from here

    networks = list(NETWORKS) if size is FULL else list(NETWORKS)[2:]
    return {
        "figures": {
            f"share of plain, {name.split()[0].strip(',')}": speed(
                name, 1, torch.get_num_threads(), size.turns // 2 + 1, None if size is FULL else 16
            )["share_of_plain"]
            for name in networks
        }
    }


# Items 6 and 7


def law(size: Size) -> Figures:
    """A simulated round beside a round of backprop in the same engine, and beside plain torch training."""
    figures: Figures = {}
    for directions in (100, 500, 1000, 5000):
        found = overhead.law_ratio(directions, size.batch, rounds=size.turns // 2 + 1)
        figures[f"law / backprop, K = {directions}"] = found["law_to_backprop"]
        figures[f"law / plain torch, K = {directions}"] = found["law_to_plain_split"]
    return {"figures": figures}


def engine_overhead(size: Size) -> Figures:
    """The share of a round that is neither forward pass nor perturbation; bytes that a client adds."""
    k = max(2, size.directions // 5)
    few, many = (100, 1000) if size is FULL else (2, 3)
    memory = overhead.memory_per_client(few // 2, many // 4 + 2)
    return {
        "figures": {
            **{
                f"share, {name} clients": overhead.overhead(clients, k, batches=2)["share"]
                for name, clients in ((100, few), (1000, many))
            },
            "directions": k,
            "bytes a client": memory["forward-only"],
            "bytes a client / model": memory["forward-only"] / memory["model"],
        }
    }
