"""One direction after the other, each on one core: the sweep for a CPU, and for what cannot be batched.

Several directions run at the same time, on as many threads as torch may use (``torch.get_num_threads()``),
each forward pass on one of them. That scales better than splitting one layer over cores, and makes a loss
the same bits for any number of threads.

A functional call swaps tensors on the module, so threads cannot share one. Each worker has a replica: a
structural copy of the part whose frozen tensors are the module's own and whose trainable ones lie in one
flat vector, filled anew for each direction. Nothing is built between two directions.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from baffle.runtimes.objective import Directions, Objective, Part, Reduce, mean

T = TypeVar("T")


class Replica:
    """One worker's copy of a part: its structure, its buffers and its trainable tensors, filled from flat W.

    Raises whatever ``copy.deepcopy`` raises for a module that cannot be copied.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        with torch.inference_mode(False), torch.no_grad():  # inference tensors count no versions
            self.flat = torch.zeros(part.layout.n, dtype=part.wide)
            self.weights = part.cast(self.flat)
            self.buffers = [buffer.clone() for buffer in part.buffers.values()]
        # Those of another type than the flat vector are copies of its slices.
        views = part.layout.split(self.flat)
        self._narrow = [(t, v) for t, v in zip(self.weights, views, strict=True) if t.dtype != v.dtype]
        mine = {name: self.weights[i] for name, i in part.trainable.items()}
        mine |= part.frozen | dict(zip(part.buffers, self.buffers, strict=True))
        named = (
            *part.module.named_parameters(remove_duplicate=False),
            *part.module.named_buffers(remove_duplicate=False),
        )
        memo: dict[int, Any] = {id(tensor): mine[name] for name, tensor in named if name in mine}
        self.module: nn.Module = copy.deepcopy(part.module, memo)
        self._inputs: list[Any] = []
        self._changeable: list[tuple[Tensor, Tensor, int]] = []

    def enter(self, objective: Objective) -> None:
        """Takes a batch: with copies of what a module might change in place."""
        self.objective = objective
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [x.clone() if isinstance(x, Tensor) else x for x in objective.inputs]
            for own, buffer in zip(self.buffers, self.part.buffers.values(), strict=True):
                own.copy_(buffer)
        pairs = [(own, x) for own, x in zip(self._inputs, objective.inputs, strict=True) if own is not x]
        pairs += zip(self.buffers, self.part.buffers.values(), strict=True)
        self._changeable = [(own, kept, own._version) for own, kept in pairs]

    def leave(self) -> None:
        """Lets go of the batch."""
        del self.objective
        self._inputs, self._changeable = [], []

    def per_sample(self, origin: Tensor, z: Tensor, scale: float) -> Tensor:
        """The losses (B,) at W + scale·z_k."""
        for i, (own, kept, version) in enumerate(self._changeable):
            if own._version != version:
                own.copy_(kept)
                self._changeable[i] = own, kept, own._version
        torch.add(origin, z, alpha=scale, out=self.flat)
        for narrow, wide in self._narrow:
            narrow.copy_(wide)
        return self.objective.checked(self.module(*self._inputs))

    def agrees(self, origin: Tensor) -> bool:
        """Whether the copy gives the bits of a functional call on the module itself, and changes its inputs
        only in ways that it would notice. Cost: two forward passes.

        False for a module that reads its own weights by a way around its structure, or that is not a
        function of its inputs.
        """
        somewhere = torch.arange(len(origin)).to(origin.dtype).cos()
        here = self.per_sample(origin, somewhere, 0.01)
        unseen = any(
            own._version == version and _bytes(own) != _bytes(kept) for own, kept, version in self._changeable
        )
        return not unseen and _bytes(here) == _bytes(self.objective.per_sample(self.weights))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def has_hooks(module: nn.Module) -> bool:
    """A module with hooks runs as itself, once a direction: a hook may write where several would meet."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def verified(objective: Objective, replica: Replica, origin: Tensor) -> bool:
    """``Replica.agrees`` for a batch, computed as directions are."""
    found: list[bool] = []
    replica.enter(objective)
    try:
        share([origin], [lambda at: found.append(replica.agrees(at))])
    finally:
        replica.leave()
    return found == [True]


def one_by_one(
    objective: Objective,
    replicas: Sequence[Replica],
    origin: Tensor,
    directions: Sequence[int],
    scale: float,
    rows: Directions,
    reduce: Reduce = mean,
) -> NDArray[np.float64]:
    """Mean losses (len(directions),) at W + scale·z_k, by functional calls where there are no replicas.

    (len(directions), B) where ``reduce`` is ``each``.
    """
    out = objective.room(len(directions), reduce)

    def by_replica(replica: Replica) -> Callable[[int], None]:
        def measure(i: int) -> None:
            (z,) = rows(directions[i : i + 1])
            out[i] = reduce(replica.per_sample(origin, z, scale)).numpy()

        return measure

    def by_call(i: int) -> None:
        (z,) = rows(directions[i : i + 1])
        weights = objective.part.cast(torch.add(origin, z, alpha=scale))
        out[i] = reduce(objective.per_sample(weights)).cpu().numpy()

    for replica in replicas:
        replica.enter(objective)
    try:
        share(range(len(directions)), [by_replica(r) for r in replicas] or [by_call])
    finally:
        for replica in replicas:
            replica.leave()
    return out


def share(tasks: Sequence[T], workers: Sequence[Callable[[T], None]]) -> None:
    """Each task by one of the workers, under inference mode, each worker on one thread of one core.

    A failing worker stops all; the error of the first task that failed is raised. The number of threads
    that torch may use is afterwards what it was.
    """
    before = torch.get_num_threads()
    if len(workers) == 1 and (before == 1 or not on_own_threads()):
        with torch.inference_mode():
            for task in tasks:
                workers[0](task)
        return
    numbers, stop = itertools.count(), threading.Event()
    errors: dict[int, BaseException] = {}

    def run(worker: Callable[[T], None]) -> None:
        torch.set_num_threads(1)  # this thread's own, and what threads to come begin with
        with torch.inference_mode():
            while not stop.is_set() and (i := next(numbers)) < len(tasks):
                try:
                    worker(tasks[i])
                except BaseException as error:
                    errors[i] = error
                    stop.set()

    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            try:
                list(pool.map(run, workers))
            finally:
                stop.set()  # also where this thread is interrupted
    finally:
        torch.set_num_threads(before)
    if errors:
        raise errors[min(errors)]


def on_own_threads() -> bool:
    """False under autocast, which is a thread's own: other threads would compute in another type."""
    return not torch.is_autocast_enabled("cpu")
