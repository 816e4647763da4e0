"""Many low-rank directions in one batched forward pass: one product with W for all, rank r for each.

    (W + σ A_k B_kᵀ/√r) x  =  W x  +  (σ/√r) A_k (B_kᵀ x)

W x is an ordinary product over the samples of m directions at once, as in batched inference; the second
term costs r/o + r/i of it. What does not depend on k yet (the first layer's W x) is computed once, not m
times. Where it runs is `torch.vmap` over the directions, so that whatever else the module does with its
activations, mixing the samples of a batch too, is done direction by direction. Trainable tensors are
stand-ins without storage: a ``TorchFunctionMode`` knows them wherever they are used, answers ``linear`` and
``conv2d`` with the factored product and gives a vector its perturbed values. Any use that it does not see
arrives at the stand-in's own dispatch, which refuses.

The entries of z_k are float32(S·c) by definition; the factored product rounds its own way. The two differ
by float32's rounding of the perturbation, a relative 2⁻²⁴, where W + σz_k stored as float32 is itself wrong
by 2⁻²⁵|W|/(σ|z|).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from baffle.perturbations import Gaussian, Layout, LowRank
from baffle.runtimes.objective import Reduce, mean
from baffle.stream import NUMPY, Arrays, Stream

# Bytes that a chunk of directions may take. On a CPU near the size of its cache, elsewhere enough to fill it.
_BUDGET_CPU, _BUDGET = 16 << 20, 1 << 30
_FIRST = 2  # directions in the first chunk, which shows how much memory one takes


def factors(perturbation: LowRank, layout: Layout, numbers: Any) -> list[tuple[Any, Any]]:
    """The factors of a direction, tensor by tensor, from its ``numbers`` (..., count), NumPy's or torch's.

    For a tensor of shape (o, ...) that counts as (o, m): A (..., o, r) and B (..., m, r), z = A Bᵀ/√r. For a
    vector: z itself in its shape, and None. All are float32 on the grid 2⁻¹².
    """
    made: list[tuple[Any, Any]] = []
    lead, r = numbers.shape[:-1], perturbation.rank
    for shape, (_, rows, columns, at) in zip(layout.shapes, perturbation.tensors(layout), strict=False):
        if len(shape) < 2:
            made.append((numbers[..., at : at + columns].reshape(*lead, *shape), None))
        else:
            cut, end = at + rows * r, at + (rows + columns) * r
            left = numbers[..., at:cut].reshape(*lead, rows, r)
            made.append((left, numbers[..., cut:end].reshape(*lead, columns, r)))
    return made


def factor_numbers(
    perturbation: LowRank, layout: Layout, stream: Stream, directions: Sequence[int], arrays: Arrays = NUMPY
) -> Tensor:
    """What the factors of some directions are cut from: float32 (len(directions), count).

    ``LowRank`` takes its numbers from the stream as ``Gaussian`` does, one behind the other.
    """
    count = perturbation.tensors(layout)[-1][-1]
    flat = Layout.flat(count)
    if isinstance(directions, range):
        return torch.as_tensor(Gaussian().values(stream, directions, flat, 0, count, arrays))
    rows = [torch.as_tensor(Gaussian().values(stream, k, flat, 0, count, arrays)) for k in directions]
    return torch.stack(rows)


def shared_weight_losses(
    per_sample: Callable[[list[Tensor]], Tensor],
    origin: Sequence[Tensor],
    stream: Stream,
    perturbation: LowRank,
    layout: Layout,
    directions: Sequence[int],
    scale: float,
    *,
    arrays: Arrays = NUMPY,
    budget: int | None = None,
    reduce: Reduce = mean,
) -> NDArray[np.float64] | None:
    """Mean losses (len(directions),) at W + scale·z_k, or (len(directions), B) where ``reduce`` is ``each``;
    None where it cannot be done.

    ``per_sample(tensors)`` runs the model with ``tensors`` (in the layout's order) for its trainable ones
    and returns the losses (B,) of the batch; it must not keep what it is given. ``origin`` is W, tensor by
    tensor. ``budget`` (bytes) bounds what one layer of a chunk of directions takes; how many directions
    fit changes the last bits of a loss and nothing else.

    None means: measure one direction after the other. It is returned where a trainable tensor of two or more
    dimensions is used in any way but ``linear`` and ``conv2d`` with one group, in other types than float32
    and float64, under autocast, where an operation has no batched form, and where ``per_sample`` raises:
    what it raises then, it raises again.

    Cost: len(directions) forward passes, less what does not depend on k; and for each direction r·(o + m)
    numbers of the stream a tensor. Memory: a few times ``budget``, at least two directions' activations.
    """
    alpha = scale / math.sqrt(perturbation.rank)
    widest = _Widest()
    if budget is None:
        budget = _BUDGET_CPU if origin[0].device.type == "cpu" else _BUDGET

    def loss(numbers: Tensor) -> Tensor:
        stand_ins = [_stand_in(w) for w in origin]
        parts = factors(perturbation, layout, numbers)
        moved = {
            id(t): _Moved(w, a, b, scale if b is None else alpha)
            for t, w, (a, b) in zip(stand_ins, origin, parts, strict=True)
        }
        with _Substitution(moved, widest):
            return reduce(per_sample(stand_ins))

    out: list[NDArray[np.float64]] = []
    at = 0
    while at < len(directions):
        width = max(1, budget // widest.bytes) if at else _FIRST
        chunk = directions[at : at + width]
        numbers = factor_numbers(perturbation, layout, stream, chunk, arrays)
        widest.saw(len(chunk), numbers)
        try:
            losses = torch.vmap(loss)(numbers)
        except Exception:  # a refusal, or whatever user code raises on tensors of many directions
            return None
        out.append(losses.cpu().numpy())
        at += width
    return np.concatenate(out) if out else np.empty(0)


class _Widest:
    """``bytes`` that one direction takes in the layer that takes most, as far as was seen."""

    bytes = 0

    def saw(self, directions: int, *tensors: Tensor) -> None:
        total = sum(t.numel() * t.element_size() for t in tensors)
        self.bytes = max(self.bytes, -(-total // directions))


class _RefusalError(Exception):
    """A trainable tensor is used in a way that has no factored form."""


class _Moved:
    """W + scale·z_k of one tensor, factored: ``left`` (o, r), ``right`` (m, r), or a vector's z and None."""

    def __init__(self, origin: Tensor, left: Tensor, right: Tensor | None, scale: float) -> None:
        self.origin, self.left, self.right, self.scale = origin, left, right, scale

    def vector(self) -> Tensor:
        if self.right is not None:
            raise _RefusalError
        return torch.add(self.origin, self.left.to(self.origin.dtype), alpha=self.scale)


class _StandIn(Tensor):
    """Shape, type and device of a tensor; no values. (A ``meta`` tensor would not do: torch's matrix products
    on the CPU read from it.)"""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _RefusalError


def _stand_in(t: Tensor) -> Tensor:
    made: Tensor = Tensor._make_wrapper_subclass(_StandIn, t.shape, dtype=t.dtype, device=t.device)
    return made


# What a stand-in answers by itself.
_QUESTIONS = {Tensor.size, Tensor.dim, Tensor.numel}
_QUESTIONS |= {
    getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")
}


class _Substitution(TorchFunctionMode):
    """Answers calls that a stand-in is an argument of. ``moved``: id of a stand-in → what it stands for."""

    def __init__(self, moved: dict[int, _Moved], widest: _Widest) -> None:
        super().__init__()
        self.moved, self.widest = moved, widest

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            return func(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.conv2d:
            return self._conv2d(*args, **kwargs)
        args, kwargs = pytree.tree_map(self._plain, (args, kwargs))
        if func is F.group_norm:
            return _group_norm(*args, **kwargs)
        if func is F.adaptive_avg_pool2d:
            return _adaptive_avg_pool2d(*args, **kwargs)
        return func(*args, **kwargs)

    def _plain(self, value: Any) -> Any:
        return self.moved[id(value)].vector() if id(value) in self.moved else value

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        input, moved = self._plain(input), self.moved.get(id(weight))
        if moved is None or moved.right is None:
            return F.linear(input, self._plain(weight), self._plain(bias))
        left, right, shared, own = self._parts(moved, bias, input)
        return _apply(_Linear, input, moved.origin, shared, left, right, own, self.widest)

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        input, moved = self._plain(input), self.moved.get(id(weight))
        if moved is None:
            return F.conv2d(input, weight, self._plain(bias), stride, padding, dilation, groups)
        if groups != 1 or input.dim() != 4:
            raise _RefusalError
        left, right, shared, own = self._parts(moved, bias, input)
        right = right.reshape(*moved.origin.shape[1:], -1)
        return _apply(
            _Conv2d, input, moved.origin, shared, left, right, own, self.widest, stride, padding, dilation
        )

    def _parts(
        self, moved: _Moved, bias: Tensor | None, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """scale·A, B, and of the bias: what all directions share, and what is each direction's own."""
        dtype, of_bias = moved.origin.dtype, self.moved.get(id(bias))
        if dtype not in (torch.float32, torch.float64) or x.dtype != dtype or moved.right is None:
            raise _RefusalError
        if torch.is_autocast_enabled(x.device.type) or (of_bias is not None and of_bias.right is not None):
            raise _RefusalError
        left, right = moved.left.to(dtype) * moved.scale, moved.right.to(dtype)
        if of_bias is None:
            return left, right, bias, None
        return left, right, of_bias.origin, of_bias.left.to(dtype) * of_bias.scale


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    y = _apply(_Samplewise, F.group_norm, input, num_groups, None, None, eps)
    each = (-1, *[1] * (input.dim() - 2))
    if weight is not None:
        y = y * weight.reshape(each)
    return y if bias is None else y + bias.reshape(each)


def _adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    return _apply(_Samplewise, F.adaptive_avg_pool2d, input, output_size)


class _Batched(torch.autograd.Function):
    """A function of one direction that is only ever evaluated for all of a chunk, by ``vmap``.

    This is torch's way to give ``vmap`` a rule for an operation; nothing here has a backward pass.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...


class _Samplewise(_Batched):
    """``function(x, ...)`` of samples that do not mix, where ``vmap`` has no rule for channels-last."""

    @staticmethod
    def forward(function: Any, x: Tensor, *rest: Any) -> Tensor:
        result: Tensor = function(x, *rest)
        return result

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        x = _stacked(x, in_dims[1])
        return function(x.flatten(0, 1), *rest).unflatten(0, x.shape[:2]), 0


def _apply(function: type[_Batched], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Linear(_Batched):
    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        own: Tensor | None,
        widest: _Widest,
    ) -> tuple[Tensor, int]:
        m, (o, i) = info.batch_size, weight.shape
        left, right = _with_bias(_stacked(left, in_dims[3]), _stacked(right, in_dims[4]), own)
        r = right.shape[-1]
        if in_dims[0] is None:
            rows = x.reshape(-1, i)
            narrow = (rows @ right.transpose(0, 1).reshape(i, m * r)).view(-1, m, r).transpose(0, 1)
            wide = F.linear(rows, weight, bias).expand(m, -1, -1)
            lead = x.shape[:-1]
        else:
            x = _stacked(x, in_dims[0])
            rows = x.reshape(m, -1, i)
            narrow = rows @ right
            wide = F.linear(rows, weight, bias)
            lead = x.shape[1:-1]
        if own is not None:
            narrow[..., -1] = 1
        y = torch.baddbmm(wide, narrow, left.mT)
        widest.saw(m, rows, narrow, y)
        return y.view(m, *lead, o), 0


class _Conv2d(_Batched):
    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        left: Tensor,
        right: Tensor,
        own: Tensor | None,
        widest: _Widest,
        stride: Any,
        padding: Any,
        dilation: Any,
    ) -> tuple[Tensor, int]:
        m, o = info.batch_size, weight.shape[0]
        left, right = _stacked(left, in_dims[3]), _stacked(right, in_dims[4])
        stacked = in_dims[0] is not None
        if stacked:
            x = _stacked(x, in_dims[0]).flatten(0, 1)
        x = x.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, weight, bias, stride, padding, dilation).permute(0, 2, 3, 1)
        b, height, width, _ = y.shape
        if stacked:
            b //= m
            taps = _Taps(weight.shape[2:], stride, padding, dilation)
            narrow = taps.narrow(x.permute(0, 2, 3, 1), right, (b, height, width), own is not None, widest)
            left, _ = _with_bias(left, None, own)
            y = y.reshape(m, -1, o).baddbmm_(narrow.mT, left.mT)
            widest.saw(m, x, y, narrow)
        else:
            left, right = _with_bias(left, right, own)
            r = right.shape[-1]
            # With the input still common to all, the narrow convolutions are one with m·r channels.
            kernels = right.movedim(-1, 1).flatten(0, 1)
            narrow = F.conv2d(x, kernels, None, stride, padding, dilation)
            narrow = narrow.permute(0, 2, 3, 1).reshape(-1, m, r).transpose(0, 1)
            if own is not None:
                narrow[..., -1] = 1
            y = torch.baddbmm(y.reshape(-1, o).expand(m, -1, -1), narrow, left.mT)
            widest.saw(m, y, narrow)
        return y.view(m, b, height, width, o).movedim(-1, 2), 0


def _stacked(t: Tensor, dim: int | None) -> Tensor:
    """All directions' values with the directions in front."""
    if dim is None:  # under a `vmap` of the user's own, where stacks would be stacks of something else
        raise _RefusalError
    return t.movedim(dim, 0)


def _with_bias(left: Tensor, right: Any, own: Tensor | None) -> tuple[Tensor, Any]:
    """A bias is one more rank: its left factor is the bias, and what it multiplies is 1."""
    if own is None:
        return left, right
    left = torch.cat([left, own.unsqueeze(-1)], dim=-1)
    return left, None if right is None else F.pad(right, (0, 1))


class _Taps:
    """The narrow convolutions of m directions, each with its own kernel (C, kh, kw, r), on a CPU's terms.

    A convolution with r output channels leaves most of a vector unit idle. So every tap of every kernel is
    one row of a matrix product with the pixels, (kh·kw·r, C)·(C, pixels), and the planes that it makes are
    added up with the tap's shift. A stride s splits the pixels into s² phases, each tap reading from one.
    """

    def __init__(self, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> None:
        self.kernel = tuple(kernel)
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        if isinstance(padding, str):
            same = padding == "same"
            self.padding = tuple(
                d * (k - 1) // 2 if same else 0 for k, d in zip(self.kernel, self.dilation, strict=True)
            )
        else:
            self.padding = _pair(padding)

    def narrow(
        self, x: Tensor, right: Tensor, out: tuple[int, int, int], bias: bool, widest: _Widest
    ) -> Tensor:
        """x (m·B, H, W, C) and right (m, C, kh, kw, r) → planes (m, r [+ 1, all ones], B·Ho·Wo)."""
        m, c, r = right.shape[0], right.shape[1], right.shape[-1]
        planes = x.new_zeros(m, r + bias, *out)
        if bias:
            planes[:, r] = 1
        (sy, sx), (_, height, width) = self.stride, out
        for py in range(sy):
            for px in range(sx):
                taps = [
                    (a, b)
                    for a in range(self.kernel[0])
                    for b in range(self.kernel[1])
                    if self._reads(a, 0)[1] == py and self._reads(b, 1)[1] == px
                ]
                part = x[:, py::sy, px::sx]
                if not taps or part.numel() == 0:
                    continue
                rows = torch.stack([right[:, :, a, b] for a, b in taps], 1).transpose(2, 3)
                pixels = part.reshape(m, -1, c)
                made = rows.reshape(m, -1, c) @ pixels.mT
                widest.saw(m, x, made, planes)
                made = made.view(m, len(taps), r, out[0], *part.shape[1:3])
                for t, (a, b) in enumerate(taps):
                    dy, dx = self._reads(a, 0)[0], self._reads(b, 1)[0]
                    y0, y1 = max(0, -dy), min(height, part.shape[1] - dy)
                    x0, x1 = max(0, -dx), min(width, part.shape[2] - dx)
                    if y0 < y1 and x0 < x1:
                        planes[:, :r, :, y0:y1, x0:x1] += made[
                            :, t, :, :, y0 + dy : y1 + dy, x0 + dx : x1 + dx
                        ]
        return planes.flatten(2)

    def _reads(self, tap: int, axis: int) -> tuple[int, int]:
        """Output y reads at y·s + this tap's offset: (shift within a phase, phase)."""
        return divmod(tap * self.dilation[axis] - self.padding[axis], self.stride[axis])


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    one, *rest = value
    return int(one), int(rest[0] if rest else one)
