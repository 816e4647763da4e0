"""One process of `benchmarks/memory.py`: it does one thing, and says how much memory it took at most.

    memory_cell.main([WHAT, NETWORK, FOLDER, K, SECONDS])

FOLDER holds the network's bundle, and a batch of images (uint8) with their labels. Prints four numbers, or
``nan``: the process's peak resident memory in KiB; then CPU seconds of a forward pass of the batch, of a
round of K directions, and of making the K directions; SECONDS is about how long forward passes are timed.
Imports nothing before it knows what for: what is imported is what is measured.
"""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False  # typing's would be 2 MB of a process that has nothing else
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from numpy.typing import NDArray

    from baffle.runtimes import Batch, Runtime

NAN = float("nan")
NETWORKS = {
    "lenet": (1, 32, 10),
    "wrn-10-2": (3, 32, 10),
    "mobilenet-v2": (3, 224, 1000),
}
CLIENT = ("baffle.endpoint", "baffle.bundle", "baffle.runtimes.numpy")
IMPORTED = {
    "nothing": (),
    "numpy": ("numpy",),
    "client": CLIENT,
    "secure": (*CLIENT, "baffle.secure"),
    "onnxruntime": ("numpy", "onnxruntime"),
    "torch": ("torch",),
}
BATCH = 32
SIGMA = 1e-4


class Images:
    """A client's data: one batch of images, kept as bytes."""

    def __init__(self, folder: str) -> None:
        import numpy as np

        self.images: NDArray[np.uint8] = np.load(f"{folder}/images.npy")
        self.labels: NDArray[np.int64] = np.load(f"{folder}/labels.npy")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: NDArray[Any]) -> Batch:
        from baffle.runtimes import Batch

        return Batch(self.images[indices], self.labels[indices])


class Floats(Images):
    """The same as the numbers that a network sees, for runtimes that take no bytes."""

    def batch(self, indices: NDArray[Any]) -> Batch:
        import numpy as np

        from baffle.runtimes import Batch

        return Batch(normalised(self.images[indices]), np.asarray(self.labels[indices]))


def normalised(images: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    floats = images.astype(np.float32)
    floats *= np.float32(1 / 127.5)
    floats -= np.float32(1)
    return floats


def module_of(network: str) -> Any:
    """The network as torch has it: all of its parameters are trained."""
    from baffle import models

    channels, _, classes = NETWORKS[network]
    return models.build(network, channels, classes, seed=0)


def peak(process: int | str = "self") -> int:
    """The most resident memory that a process has had, in KiB."""
    with open(f"/proc/{process}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))


def timed(call: Callable[[], object], seconds: float) -> float:
    """CPU seconds of one call: the least of three or more."""
    spent: list[float] = []
    while sum(spent) < seconds or len(spent) < 3:
        before = time.process_time()
        call()
        spent.append(time.process_time() - before)
    return min(spent)


# What a process does


def imports(what: str) -> tuple[float, ...]:
    for name in IMPORTED[what]:
        __import__(name)
    return peak(), NAN, NAN, NAN


def torch_inference(network: str, folder: str, seconds: float) -> tuple[float, ...]:
    """Forward passes of the plain module."""
    import torch

    torch.set_num_threads(1)
    module, inputs = module_of(network).eval(), torch.from_numpy(normalised(Images(folder).images))
    with torch.inference_mode():
        module(inputs)
        most = peak()
        return most, timed(lambda: module(inputs), seconds), NAN, NAN


def torch_backprop(network: str, folder: str) -> tuple[float, ...]:
    """Three steps of training as everyone does it: forward, backward, SGD."""
    import torch

    torch.set_num_threads(1)
    module, data = module_of(network).train(), Images(folder)
    inputs, targets = torch.from_numpy(normalised(data.images)), torch.from_numpy(data.labels)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    spent = timed(step, 0)
    return peak(), NAN, spent, NAN


def torch_forward(network: str, folder: str, directions: int) -> tuple[float, ...]:
    import torch

    from baffle.runtimes.torch import TorchRuntime

    torch.set_num_threads(1)
    runtime = TorchRuntime(module_of(network).eval())
    return answered(runtime, runtime.weights(), Floats(folder), directions, None, 0)


def numpy_runtime(
    network: str, folder: str, directions: int, seconds: float, mode: str, storage: str
) -> tuple[float, ...]:
    from baffle.allocator import return_large_blocks
    from baffle.bundle import Bundle
    from baffle.runtimes.numpy import NumpyRuntime

    return_large_blocks()  # as the program does
    bundle = Bundle.read(f"{folder}/bundle")
    runtime = NumpyRuntime(bundle, mode=mode, storage=storage)
    # What is not in memory as float32 is read where it lies.
    weights = bundle.weights() if storage == "float32" and mode in ("full", "layer") else bundle.stored()
    return answered(runtime, weights, Images(folder), directions, runtime.outputs, seconds)


def onnx_runtime(
    network: str, folder: str, directions: int, seconds: float, micro_batch: int
) -> tuple[float, ...]:
    from baffle.bundle import Bundle
    from baffle.runtimes.onnx import OnnxRuntime

    bundle = Bundle.read(f"{folder}/bundle")
    runtime = OnnxRuntime(bundle, micro_batch=micro_batch)
    return answered(runtime, bundle.weights(), Images(folder), directions, runtime.outputs, seconds)


def answered(
    runtime: Runtime,
    weights: Any,
    samples: Images,
    directions: int,
    outputs: Callable[[Any, Batch], object] | None,
    seconds: float,
) -> tuple[float, ...]:
    """What a client does in a round: it checks the weights, measures, and encodes its answer."""
    from dataclasses import replace

    import numpy as np

    from baffle.client import Client, Download
    from baffle.endpoint import Endpoint
    from baffle.estimator import SteinEstimator
    from baffle.plan import RoundPlan, weights_digest
    from baffle.stream import seed_from

    digest = weights_digest(weights, runtime.layout, runtime.frozen_digest)
    client = Endpoint(Client("device", runtime, samples)).client
    first = RoundPlan(0, seed_from(0), SteinEstimator(1, SIGMA), digest, BATCH)
    client.answer_to(Download(first, weights))  # what is done once
    plan = replace(first, round=1, estimator=SteinEstimator(directions, SIGMA))
    before = time.process_time()
    client.answer_to(Download(plan, weights))
    spent, most = time.process_time() - before, peak()

    layout, perturbation = runtime.layout, plan.estimator.perturbation
    before = time.process_time()
    for k in range(directions):
        for start, stop in zip(layout.offsets[:-1], layout.offsets[1:], strict=True):
            perturbation.values(plan.stream, k, layout, start, stop)
    making = time.process_time() - before
    forward = NAN
    if outputs is not None:
        batch = samples.batch(np.arange(BATCH))
        forward = timed(lambda: outputs(weights, batch), seconds)
    return most, forward, spent, making


def program(folder: str, directions: int, mode: str) -> tuple[float, ...]:
    """`baffle client` behind a folder, with an .npz of its own, asked as `baffle train --drop` asks it."""
    import subprocess
    import tempfile

    from baffle.bundle import Bundle
    from baffle.drop import Drop
    from baffle.estimator import SteinEstimator
    from baffle.exchange import Envelope, Reply
    from baffle.plan import ModelMessage, RoundPlan, weights_digest
    from baffle.stream import seed_from

    bundle = Bundle.read(f"{folder}/bundle")
    weights = bundle.weights()
    digest, package = (
        weights_digest(weights, bundle.layout, bundle.frozen_digest),
        ModelMessage(weights).encode(),
    )
    spent = []
    with tempfile.TemporaryDirectory() as place:
        where = {"bundle": f"{folder}/bundle", "data": f"{folder}/images.npz", "drop": place}
        options = [word for name, path in where.items() for word in (f"--{name}", path)]
        command = [sys.executable, "-m", "baffle", "client", "--name", "device", "--mode", mode, *options]
        client = subprocess.Popen([*command, "--state", f"{place}/state"], stdout=subprocess.DEVNULL)
        try:
            drop = Drop(place)
            assert list(drop.names()) == ["device"], "the client did not start"
            for round_, k in enumerate((1, directions)):
                plan = RoundPlan(round_, seed_from(0), SteinEstimator(k, SIGMA), digest, BATCH)
                envelope = Envelope("answer", plan.encode(), b"", package).encode()
                before = cpu_seconds(client.pid)
                ((_, reply),) = drop.ask("answer", {"device": envelope}, 600)
                status = Reply.decode(reply).status if isinstance(reply, bytes) else reply
                assert status == "answer", status
                spent.append(cpu_seconds(client.pid) - before)
            most = peak(client.pid)
        finally:
            client.terminate()
            client.wait()
    return most, NAN, spent[-1], NAN


def cpu_seconds(process: int) -> float:
    import os

    with open(f"/proc/{process}/stat", encoding="ascii") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


# Made beforehand, by a process of its own


def prepare(network: str, folder: str) -> None:
    """Writes the bundle and a batch of random images; their content does not matter for memory."""
    import numpy as np

    from baffle.export.torch import from_torch

    channels, side, classes = NETWORKS[network]
    rng = np.random.Generator(np.random.PCG64(0))
    images = rng.integers(0, 256, (BATCH, channels, side, side), np.uint8)
    labels = rng.integers(0, classes, BATCH)
    np.save(f"{folder}/images.npy", images)
    np.save(f"{folder}/labels.npy", labels)
    np.savez(f"{folder}/images.npz", x=images, y=labels)
    bundle = from_torch(
        module_of(network).eval(),
        input_shape=(channels, side, side),
        name=network,
        classes=tuple(map(str, range(classes))),
        scale=np.full(channels, 1 / 127.5, np.float32),
        shift=np.full(channels, -1, np.float32),
    )
    bundle.write(f"{folder}/bundle")


def main(arguments: list[str]) -> None:
    what, network, folder, k, time_forward = arguments
    directions, seconds = int(k), float(time_forward)
    kind, *rest = what.split()
    if kind == "prepare":
        prepare(network, folder)
        return
    if kind == "import":
        figures = imports(rest[0])
    elif what == "torch inference":
        figures = torch_inference(network, folder, seconds)
    elif what == "torch backprop":
        figures = torch_backprop(network, folder)
    elif what == "torch forward-only":
        figures = torch_forward(network, folder, directions)
    elif kind == "client":
        figures = program(folder, directions, *rest)
    elif kind == "numpy":
        figures = numpy_runtime(network, folder, directions, seconds, *rest)
    else:
        figures = onnx_runtime(network, folder, directions, seconds, int(rest[0]))
    sys.stdout.write(" ".join(f"{figure:.9g}" for figure in figures) + "\n")
