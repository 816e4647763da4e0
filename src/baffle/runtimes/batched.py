"""Many directions in one pass, by ``torch.func.vmap``: where one alone is small beside what starts it.

A chunk of directions is one call of the module, with W + scale·z_k stacked along a new axis: a linear
layer becomes a batched product, a convolution a grouped one. On a GPU that is what fills it; launches are
counted by chunk, not by direction, so nothing is left for a CUDA graph to save. On a CPU grouped
convolutions are slow and large products gain nothing: see ``pays``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baffle.runtimes.objective import Directions, Objective, Reduce, mean
from baffle.runtimes.onebyone import share

# Below this many multiplications a forward pass, the CPU's time goes into starting operations. Measured on
# one core, batch 32, as the ratio one by one / batched: 0.2 million (64-32-10) 3.5, 0.5 million (256-64-10)
# 2 to 5, 1.6 million (twelve layers of 64) 1.3, (784-64-10) 0.8; convolutions of LeNet on 8×8 0.9.
_SMALL = 1 << 20
# Directions at a time on a CPU: more only leave its caches, fewer are not worth a thread.
MOST_ON_CPU, FEWEST = 64, 8
# Live activations of one pass, in units of its largest tensor: an operation's input, output, a residual
# and a workspace.
_LIVE = 4


@dataclass(frozen=True)
class Survey:
    """What one forward pass of an objective does, by its shapes alone."""

    multiplications: int  # of products and convolutions, and one for each element of any other result
    convolutions: int
    largest: int  # bytes of the largest result


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiplications = self.convolutions = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inner = 1
        if func.name().startswith("aten::convolution"):
            self.convolutions += 1
            inner = args[1][0].numel()
        elif func.name() in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            inner = args[-1].shape[-2]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.multiplications += inner * leaf.numel()
                self.largest = max(self.largest, leaf.numel() * leaf.element_size())
        return result


def survey(objective: Objective, origin: Tensor) -> Survey:
    """Cost: one forward pass."""
    return counted(lambda: objective.mean(objective.part.cast(origin)))


def counted(call: Callable[[], object]) -> Survey:
    """What a call does."""
    with torch.inference_mode(False), torch.no_grad(), _Counting() as found:
        call()
    return Survey(found.multiplications, found.convolutions, found.largest)


def pays(seen: Survey, device: torch.device) -> bool:
    """Whether to batch directions: on a GPU always; on a CPU where no convolution depends on W and a
    forward pass is below a million multiplications. A rule of shapes, so that it is the same every time.
    """
    return device.type != "cpu" or (seen.convolutions == 0 and seen.multiplications < _SMALL)


def chunk_for(
    seen: Survey, n: int, itemsize: int, budget: int, device: torch.device, most_on_cpu: int
) -> int:
    """Directions a chunk within ``budget`` bytes: their values, W + scale·z_k, and activations.

    At least two on a CPU, where chunks of one would have other bits.
    """
    most = max(1, budget // (3 * n * itemsize + _LIVE * seen.largest))
    return min(max(2, most), most_on_cpu) if device.type == "cpu" else most


def batched(
    objective: Objective,
    modules: Sequence[nn.Module],
    origin: Tensor,
    directions: Sequence[int],
    scale: float,
    rows: Directions,
    chunk: int,
    reduce: Reduce = mean,
) -> NDArray[np.float64]:
    """Mean losses (len(directions),) at W + scale·z_k, ``chunk`` directions at a time; (len(directions), B)
    where ``reduce`` is ``each``.

    ``modules`` are copies of the part, one a thread, or the part's own alone. Results equal those of one by
    one up to the rounding of the arithmetic. On a CPU a direction's loss has the same bits in every chunk
    (as far as tests hold networks of this package to it); a GPU's library may choose another kernel for
    another size of chunk. A chunk that does not fit into the device's memory is halved.

    Raises whatever the module raises under vmap: control flow that depends on values, for one.
    """

    def worker(module: nn.Module) -> Callable[[range], None]:
        losses = torch.func.vmap(lambda flat: reduce(objective.per_sample(objective.part.cast(flat), module)))

        def measure(places: range) -> None:
            chosen = [directions[i] for i in places]
            points = partial(torch.add, origin, alpha=scale)
            made = in_chunks(lambda z: losses(points(z)), chosen, rows, chunk, out.shape[1:])
            out[places.start : places.stop] = made

        return measure

    objective = objective.contiguous()
    out = objective.room(len(directions), reduce)
    places = range(len(directions))
    if origin.device.type == "cpu":
        a_share = min(chunk, max(FEWEST, -(-len(directions) // len(modules))))
        tasks = [places[at : at + a_share] for at in range(0, len(directions), a_share)]
        with quiet():
            share(tasks, [worker(module) for module in modules])
    else:
        with quiet():
            worker(modules[0])(places)
    return out


@contextmanager
def quiet() -> Iterator[None]:
    """Without two warnings of torch's: that an operation runs one by one under vmap, which is right, and
    that torch's own rules for forward derivatives use what torch deprecates, when they are first loaded.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning, r"torch\.jit")
        yield


def in_chunks(
    measure: Callable[[Tensor], Tensor],
    directions: Sequence[int],
    rows: Directions,
    chunk: int,
    shape: tuple[int, ...] = (),
) -> NDArray[np.float64]:
    """``measure`` of the stacked z_k (m, n), which returns (m, *shape), for all directions."""
    out, at = np.empty((len(directions), *shape)), 0
    while at < len(directions):
        chosen = directions[at : at + chunk]
        z = rows(chosen)
        try:
            # A chunk of one has other kernels than one of several: it is measured twice at once.
            together = torch.stack(z * 2 if len(z) == 1 < chunk else z)
            out[at : at + len(chosen)] = measure(together)[: len(chosen)].cpu().numpy()
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise
            chunk = max(1, min(chunk, len(chosen)) // 2)
            continue
        at += len(chosen)
    return out
