"""Derivatives along directions by forward-mode propagation: the scheme ``tangent``.

Each operation is run on a pair, its value and the change of that value along z_k (``torch.func.jvp``). The
change has a scale of its own, so it survives in bfloat16, where the difference of two losses is rounding.
The value is the same for all directions: a chunk of them shares it (``torch.func.vmap``), and a layer's
work is one product of the shared weights with all changes and one of the shared input with all z_k. So
convolutions stay plain ones, on a GPU and on a CPU.

Nearly all of the work are the products of changes, and they alone may be in half precision: values, which
are few, stay in float32. Were they rounded too, the slopes would be those of the rounded network, and the
further it is trained, the more its gradient departs from the network's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from baffle.errors import ConfigError
from baffle.runtimes.batched import in_chunks, quiet
from baffle.runtimes.objective import Directions, Objective

_HALF = (torch.bfloat16, torch.float16)
_BILINEAR = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def derivatives(
    objective: Objective,
    origin: Tensor,
    directions: Sequence[int],
    rows: Directions,
    chunk: int,
    products: torch.dtype | None = None,
) -> tuple[float, NDArray[np.float64]]:
    """The mean loss at W and its derivatives (len(directions),) along z_k, float64; ``chunk`` at a time.

    ``products`` is the type of the changes' products in linear and convolution layers; None stands for the
    module's own. A module in half precision is propagated through with its values in float32, unless it
    asks for types by name. Raises ConfigError for a module with an operation that has no forward derivative.
    """
    objective = objective.contiguous()
    loss = float(objective.mean(objective.part.cast(origin)))
    found: Exception | None = None
    # Of the kinds of attention, one has a forward derivative.
    with quiet(), sdpa_kernel(SDPBackend.MATH):
        for candidate, low in _candidates(objective, products):
            along = _along(candidate, origin, low)

            def one_by_one(z: Tensor, along: Callable[[Tensor], Tensor] = along) -> Tensor:
                return torch.stack([along(row) for row in z])

            # Under vmap a module's control flow may not depend on values, for one.
            for measure in (torch.func.vmap(along), one_by_one):
                try:
                    return loss, in_chunks(measure, directions, rows, chunk)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # the loss alone could be computed
                    found = error
    why = str(found).strip().split("\n")[0]
    raise ConfigError(
        f"the scheme tangent cannot go through this module ({why}): use forward or central"
    ) from found


def _candidates(
    objective: Objective, products: torch.dtype | None
) -> Iterator[tuple[Objective, torch.dtype | None]]:
    """Objectives, and the type of their changes' products where that is another than the module's."""
    part = objective.part
    half = next((dtype for dtype in part.dtypes if dtype in _HALF), None)
    if half is not None:
        wide = replace(
            part,
            dtypes=tuple(_widened(dtype) for dtype in part.dtypes),
            frozen={name: t.to(_widened(t.dtype)) for name, t in part.frozen.items()},
            buffers={name: t.to(_widened(t.dtype)) for name, t in part.buffers.items()},
        )
        inputs = tuple(
            x.to(_widened(x.dtype)) if isinstance(x, Tensor) else x
            for x in objective.unrounded or objective.inputs
        )
        yield replace(objective, part=wide, inputs=inputs), products or half
    yield objective, products


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _along(objective: Objective, origin: Tensor, low: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """z_k (n,) → the derivative () of the mean loss at W along it."""
    part = objective.part
    weights = tuple(part.cast(origin))

    def along(z: Tensor) -> Tensor:
        with nullcontext() if low is None else _Rounding(low):
            change: Tensor = torch.func.jvp(lambda *w: objective.mean(w), weights, tuple(part.cast(z)))[1]
        return change

    return along


class _Rounding(TorchFunctionMode):
    """Layers that are a bilinear function of input and weights have their changes' products in ``low``."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self.low = low

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _BILINEAR or len(args) < 2 or not args[0].is_floating_point():
            return func(*args, **kwargs)
        x, w, *more = args
        bias = more.pop(0) if more else kwargs.pop("bias", None)

        def layer(x: Tensor, w: Tensor) -> Any:
            return func(x, w, None, *more, **kwargs)

        result = _Bilinear.apply(layer, self.low, x, w)  # type: ignore[no-untyped-call]
        return result if bias is None else result + bias.reshape(-1, *[1] * (w.dim() - 2))


class _Bilinear(torch.autograd.Function):
    """layer(x, w), whose change is layer(dx, w) + layer(x, dw), computed in the type ``low``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(layer: Any, low: torch.dtype, x: Tensor, w: Tensor) -> Any:
        return layer(x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer, ctx.low, x, w = inputs
        ctx.wide = output.dtype
        ctx.save_for_forward(x, w)
        ctx.set_materialize_grads(False)  # what does not change is None, not zeros to multiply with

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, dx: Tensor | None, dw: Tensor | None) -> Any:
        x, w = (t.to(ctx.low) for t in ctx.saved_tensors)
        terms = [] if dx is None else [ctx.layer(dx.to(ctx.low), w)]
        terms += [] if dw is None else [ctx.layer(x, dw.to(ctx.low))]
        return sum(terms[1:], terms[0]).to(ctx.wide)
