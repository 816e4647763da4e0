"""What a round costs beside its forward passes: the engine's share, the law's ratio, memory a client.

`python benchmarks/overhead.py` prints all three. Ratios are medians over interleaved rounds of one run, so
that a busy machine disturbs both sides alike.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from baffle import data, models
from baffle.client import Client
from baffle.estimator import SteinEstimator
from baffle.job import Subset
from baffle.perturbations import Layout, Perturbation
from baffle.plan import Fidelity
from baffle.runtimes import Batch
from baffle.runtimes.torch import TorchRuntime
from baffle.server import Server
from baffle.simulation import simulate
from baffle.stream import Stream

FIDELITIES: tuple[Fidelity, ...] = ("forward-only", "law", "backprop")


class Stopwatch:
    seconds = 0.0

    def __call__(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - started


class TimedRuntime:
    """A runtime, and the time that its forward passes, backward passes and perturbations take."""

    def __init__(self, runtime: TorchRuntime, watch: Stopwatch) -> None:
        self._runtime, self._watch = runtime, watch
        self.weights, self.check_sigma = runtime.weights, runtime.check_sigma

    @contextmanager
    def holding(self, batch: Batch) -> Iterator[None]:
        with ExitStack() as held:
            self._watch(held.enter_context, self._runtime.holding(batch))
            yield

    @property
    def layout(self) -> Layout:
        return self._runtime.layout

    @property
    def frozen_digest(self) -> bytes:
        return self._runtime.frozen_digest

    def loss(self, weights: NDArray[np.float32], batch: Batch) -> float:
        return float(self._watch(self._runtime.loss, weights, batch))

    def losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        losses: NDArray[np.float64] = self._watch(
            self._runtime.losses, weights, batch, stream, perturbation, directions, scale
        )
        return losses

    def gradient(self, weights: NDArray[np.float32], batch: Batch) -> tuple[NDArray[np.float32], float]:
        gradient, loss = self._watch(self._runtime.gradient, weights, batch)
        return gradient, loss


class TimedEstimator(SteinEstimator):
    """Counts the server's reconstruction as perturbations too."""

    watch: Stopwatch

    def gradient(self, *arguments: Any, **options: Any) -> Any:
        return self.watch(super().gradient, *arguments, **options)


def overhead(
    clients: int,
    directions: int,
    fidelity: Fidelity = "forward-only",
    *,
    model: str = "lenet",
    batch: int = 16,
    batches: int = 4,
) -> dict[str, float]:
    """The share of a round that is neither forward pass (backward, for ``backprop``) nor perturbation.

    Over one epoch of ``batches`` rounds: each client draws a permutation of its samples once. 8×8 digits,
    used again where the clients are many. Reading the batches and the law's draw count as overhead.
    """
    train, _ = data.digits()
    watch = Stopwatch()
    runtime = TimedRuntime(TorchRuntime(models.build(model, 1, 10, 0)), watch)
    estimator = TimedEstimator(directions)
    object.__setattr__(estimator, "watch", watch)
    server = Server(runtime, estimator, batch_size=batch, fidelity=fidelity)
    run = simulate(server, deal(train, clients, batches * batch, runtime), rounds=batches + 1)
    next(run)  # what is made once
    before, started = watch.seconds, time.perf_counter()
    for _ in range(batches):
        next(run)
    whole, inside = time.perf_counter() - started, watch.seconds - before
    return {
        "clients": clients,
        "directions": directions,
        "share": 1 - inside / whole,
        "round_seconds": whole / batches,
        "overhead_microseconds_per_client": 1e6 * (whole - inside) / batches / clients,
    }


def deal(train: data.Dataset, clients: int, each: int, runtime: Any) -> list[Client]:
    """Clients with ``each`` samples of the set, from its start again where it ends."""
    return [
        Client(f"client-{i:05d}", runtime, Subset(train, np.arange(i * each, (i + 1) * each) % len(train)))
        for i in range(clients)
    ]


def images(samples: int) -> data.Dataset:
    """Noise of MNIST's padded shape: what a round costs does not depend on what the images show."""
    rng = np.random.default_rng(0)
    scale, shift = data.normalisation([0.1307], [0.3081])
    return data.Dataset(
        rng.integers(0, 256, (samples, 1, 32, 32), dtype=np.uint8),
        rng.integers(0, 10, samples),
        tuple("0123456789"),
        "noise",
        scale,
        shift,
    )


def law_ratio(directions: int, batch: int, *, clients: int = 10, rounds: int = 15) -> dict[str, float]:
    """A round of the law beside a round of backprop and beside plain torch training on the same samples.

    LeNet 1×32×32. ``plain`` is forward, backward and Adam step on the union of the clients' batches,
    ``plain_split`` the same with one forward and backward a client's batch.
    """
    train = images(600 * clients)

    def engine(fidelity: Fidelity) -> Callable[[], object]:
        runtime = TorchRuntime(models.build("lenet", 1, 10, 0))
        server = Server(runtime, SteinEstimator(directions), batch_size=batch, fidelity=fidelity)
        run = simulate(server, deal(train, clients, 600, runtime), rounds=1 << 40)
        return lambda: next(run)

    sides = {
        "law": engine("law"),
        "backprop": engine("backprop"),
        "plain": plain_training(train, clients * batch, 1),
        "plain_split": plain_training(train, clients * batch, clients),
    }
    seconds = interleaved(sides, rounds)
    return {
        "directions": directions,
        "batch": batch,
        "law_to_backprop": ratio(seconds, "law", "backprop"),
        "law_to_plain": ratio(seconds, "law", "plain"),
        "law_to_plain_split": ratio(seconds, "law", "plain_split"),
        "law_seconds": median(seconds["law"]),
    }


def plain_training(train: data.Dataset, samples: int, parts: int) -> Callable[[], None]:
    """One step of a plain torch loop over ``samples`` samples, in ``parts`` forward and backward passes."""
    module = models.build("lenet", 1, 10, 0)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01, betas=(0.9, 0.99))
    numbers, rng = count(), np.random.default_rng(0)
    order = rng.permutation(len(train))

    def step() -> None:
        start = next(numbers) * samples
        optimizer.zero_grad()
        for chunk in np.split(np.arange(start, start + samples) % len(train), parts):
            batch = train.batch(order[chunk])
            outputs = module(torch.from_numpy(batch.inputs))
            loss = functional.cross_entropy(outputs, torch.from_numpy(batch.targets)) / parts
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def interleaved(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, one call of each after the other, ``rounds`` times after two to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, call in sides.items():
            started = time.perf_counter()
            call()
            if turn > 1:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], this: str, to: str) -> float:
    return median(a / b for a, b in zip(seconds[this], seconds[to], strict=True))


def memory_per_client(few: int = 100, many: int = 1000) -> dict[str, float]:
    """Bytes of peak memory that each further client adds to a round, by fidelity; and a client's own.

    LeNet on 8×8 digits, 16 samples a client, K = 20, all clients on one runtime and one data set.
    ``tracemalloc`` counts what Python and NumPy allocate: messages, answers, sums; not torch's tensors.
    """
    result: dict[str, float] = {"model": float(runtime_bytes())}
    for fidelity in FIDELITIES:
        peaks = {clients: peak(clients, fidelity) for clients in (few, many)}
        result[fidelity] = (peaks[many] - peaks[few]) / (many - few)
    train, _ = data.digits()
    runtime = TorchRuntime(models.build("lenet", 1, 10, 0))
    tracemalloc.start()
    federation = deal(train, many, 16, runtime)
    result["idle_client"] = tracemalloc.get_traced_memory()[0] / len(federation)
    tracemalloc.stop()
    return result


def runtime_bytes() -> int:
    return 4 * TorchRuntime(models.build("lenet", 1, 10, 0)).layout.n


def peak(clients: int, fidelity: Fidelity, directions: int = 20) -> int:
    """Peak bytes of one round, clients included, as ``tracemalloc`` sees them."""
    train, _ = data.digits()
    runtime = TorchRuntime(models.build("lenet", 1, 10, 0))
    server = Server(runtime, SteinEstimator(directions), batch_size=4, fidelity=fidelity)
    next(simulate(server, deal(train, 2, 16, runtime), rounds=1))  # what is made once
    tracemalloc.start()
    try:
        next(simulate(server, deal(train, clients, 16, runtime), rounds=2))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def table() -> Iterator[str]:
    yield "engine overhead: share of a round that is neither forward pass nor perturbation"
    for fidelity in FIDELITIES:
        for clients, directions in ((100, 20), (100, 100), (1000, 20)):
            if fidelity == "forward-only" or directions == 20:
                row = overhead(clients, directions, fidelity)
                yield (
                    f"  {fidelity:12} {clients:5} clients  K = {directions:3}  {row['share']:6.1%}  "
                    f"{row['overhead_microseconds_per_client']:6.0f} µs a client"
                )
    yield "law: a round beside backprop's, and beside plain torch training (whole batch; client by client)"
    for batch in (32, 4):
        for directions in (100, 500, 5000):
            row = law_ratio(directions, batch)
            yield (
                f"  K = {directions:4}  batch {batch:2}  {row['law_to_backprop']:5.2f}  "
                f"{row['law_to_plain']:5.2f}  {row['law_to_plain_split']:5.2f}"
            )
    yield "memory: bytes that each further client adds to the peak of a round"
    for name, size in memory_per_client().items():
        yield f"  {name:12} {size:10,.0f}"


def main() -> int:
    for line in table():
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
