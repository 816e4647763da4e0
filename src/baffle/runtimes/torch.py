"""The torch runtime: any ``nn.Module``, any per-sample loss, CPU or CUDA.

The user's module is never subclassed, wrapped or written to: a forward pass is a functional call, or a call
of a copy of its structure, with W + scale·z_k in place of the trainable parameters and copies of the
buffers. ``sweeps`` chooses the way through the directions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from baffle.bundle import frozen_digest
from baffle.errors import ConfigError, LossError
from baffle.perturbations import Layers, Layout, LowRank, Perturbation
from baffle.runtimes import Batch, LayerCost, check_sigma
from baffle.runtimes.arrays import TorchArrays
from baffle.runtimes.batched import FEWEST
from baffle.runtimes.layered import Layered
from baffle.runtimes.objective import Directions, Loss, Objective, Part, Reduce, each, mean
from baffle.runtimes.prefix import knows_strides, split_frozen_prefix
from baffle.runtimes.sweeps import Sweeps
from baffle.runtimes.tangent import derivatives
from baffle.stream import NUMPY, Arrays, Stream


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-sample cross-entropy (B,) of logits (B, classes), in float64: the differences are small."""
    return nn.functional.cross_entropy(outputs.double(), targets, reduction="none")


class TorchRuntime:
    """Losses of ``module`` by forward passes alone.

    Only parameters with ``requires_grad`` are perturbed. Everything is measured in ``eval`` mode (dropout
    off, batch norm on its running statistics) and the module's modes are put back. ``loss(outputs,
    targets)`` returns per-sample losses (B,); they are averaged in float64. ``memory_budget`` (bytes)
    bounds the memory of directions that are measured together. ``tangent_products`` is the type in which
    ``derivatives`` multiplies changes in linear and convolution layers, e.g. ``torch.bfloat16`` for matrix
    units; None stands for the module's own. Values stay in float32.

    On a CPU, ``module`` and ``loss`` may be called in several threads, as many as torch may use, each
    thread with its own copy of the module's structure as it was at the first measurement. Every loss is
    computed on one thread, so that its bits do not depend on how many there are.

    Raises ConfigError for a module without trainable parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss = cross_entropy,
        *,
        device: torch.device | str = "cpu",
        memory_budget: int = 256 << 20,
        tangent_products: torch.dtype | None = None,
        gradient_autocast: torch.dtype | None = None,
    ) -> None:
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ConfigError("the module has no trainable parameter (requires_grad is False everywhere)")
        self.module = module
        self.loss_function = loss
        self.device = torch.device(device)
        self.tangent_products = tangent_products
        self.gradient_autocast = gradient_autocast
        self._layout = Layout(tuple(trainable), tuple(tuple(p.shape) for p in trainable.values()))
        dtypes = tuple(p.dtype for p in trainable.values())
        self._wide = torch.float64 if torch.float64 in dtypes else torch.float32
        # Frozen parameters and buffers stay the module's own tensors where they already lie on the device.
        self._frozen = {
            name: p.detach().to(self.device) for name, p in module.named_parameters() if not p.requires_grad
        }
        self._buffers = {name: b.detach().to(self.device) for name, b in module.named_buffers()}
        self._arrays: Arrays = NUMPY if self.device.type == "cpu" else TorchArrays(self.device)
        with self._measuring():
            self._prefix = split_frozen_prefix(module)
            self._nhwc = self.device.type == "cpu" and knows_strides(module)
        part = module if self._prefix is None else self._prefix.after
        names, places = self._names_in(part), {name: i for i, name in enumerate(trainable)}
        self._part = Part(
            part,
            self._layout,
            dtypes,
            self._wide,
            {own: places[name] for own, name in names.items() if name in places},
            {own: self._frozen[name] for own, name in names.items() if name in self._frozen},
            {own: self._buffers[name] for own, name in names.items() if name in self._buffers},
        )
        self._prefix_names = {} if self._prefix is None else self._names_in(self._prefix.before)
        self._memory_budget = memory_budget
        self._costs: dict[tuple[object, ...], tuple[LayerCost, ...]] = {}
        self._sweeps = Sweeps(self._part, self.device, memory_budget)
        self._held: tuple[Batch, Objective] | None = None
        self._apart = False  # not known before the first losses of examples

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def frozen_digest(self) -> bytes:
        tensors = {**self._frozen, **self._buffers}
        types = {name: str(tensor.dtype) for name, tensor in tensors.items()}
        return frozen_digest({name: _as_array(tensor) for name, tensor in tensors.items()}, types)

    def weights(self) -> NDArray[np.float32]:
        parameters = dict(self.module.named_parameters())
        flat = [parameters[name].detach().reshape(-1).to("cpu", torch.float32) for name in self._layout.names]
        result: NDArray[np.float32] = torch.cat(flat).numpy().copy()
        return result

    def load(self, weights: NDArray[np.float32]) -> None:
        """Writes flat weights (n,) into the module's own parameters: when training is over."""
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, values in zip(self._layout.names, self._layout.split(weights), strict=True):
                parameters[name].copy_(torch.from_numpy(values.copy()))

    @cached_property  # asked for at each measurement, and a frozen part can be large
    def arithmetic(self) -> torch.dtype:
        """The coarsest floating-point type among the module's tensors."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return max(
            (t.dtype for t in tensors if t.is_floating_point()), key=lambda dtype: torch.finfo(dtype).eps
        )

    def check_sigma(self, sigma: float) -> None:
        check_sigma(sigma, str(self.arithmetic).removeprefix("torch."))

    # -- losses -------------------------------------------------------------------------------------

    def loss(self, weights: NDArray[np.float32], batch: Batch) -> float:
        with torch.inference_mode(), self._measuring():
            origin = self._wide_tensor(weights)
            return float(self._sweeps.losses(self._objective(batch), origin, [0], 0.0, _nowhere(origin))[0])

    def losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        return self._losses(weights, batch, stream, perturbation, directions, scale, mean)

    def example_losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        """Losses (len(directions), B) of each sample alone: as quick as ``losses``, by the same ways.

        Raises ConfigError for a module that mixes the samples of a batch: one with batch norm that has no
        running statistics, or one that is caught at it; LossError for losses that show nothing. The first
        batch of two or more costs three forward passes for that.
        """
        self._check_apart(weights, batch)
        return self._losses(weights, batch, stream, perturbation, directions, scale, each)

    def _losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
        reduce: Reduce,
    ) -> NDArray[np.float64]:
        with torch.inference_mode(), self._measuring():
            origin, objective = self._wide_tensor(weights), self._objective(batch)
            if isinstance(perturbation, LowRank) and scale:
                losses = self._sweeps.low_rank_losses(
                    objective, origin, stream, perturbation, directions, scale, self._arrays, reduce
                )
                if losses is not None:
                    return losses
            rows = self._rows(stream, perturbation) if scale else _nowhere(origin)
            if isinstance(perturbation, Layers) and scale:
                return self._layered.losses(
                    objective, origin, perturbation, list(directions), scale, rows, _nowhere(origin), reduce
                )
            return self._sweeps.losses(objective, origin, list(directions), scale, rows, reduce)

    def layer_costs(self, batch: Batch) -> tuple[LayerCost, ...]:
        """What a direction in each layer costs, counted in multiplications."""
        key = (batch.inputs.shape, batch.prefixed)
        if key not in self._costs:
            with torch.inference_mode(), self._measuring():
                origin = self._wide_tensor(self.weights())
                self._costs[key] = self._layered.costs(self._objective(batch), origin)
        return self._costs[key]

    @cached_property
    def _layered(self) -> Layered:
        return Layered(self._part, self._names_in, self.device, self._memory_budget, self._sweeps)

    def _check_apart(self, weights: NDArray[np.float32], batch: Batch) -> None:
        """Raises ConfigError where a sample's loss depends on the others of its batch.

        Other samples are put in the place of one half, then of the other: the shapes stay, so do the kernels,
        and the losses of the half that stayed must be the same but for what a library may do at random. A
        kind of layer that is known to mix is refused by its name, since a frozen prefix may be cached.
        """
        if self._apart or len(batch.targets) < 2:
            return
        mixing = [
            name
            for name, module in self.module.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is None
        ]
        if mixing:
            raise ConfigError(
                f"layer {mixing[0]!r} takes its statistics from the batch, so that no sample has a loss of "
                "its own: use group norm, or batch norm with running statistics"
            )
        half = len(batch.targets) // 2
        places = np.arange(len(batch.targets))
        somewhere = (weights + 0.01 * np.cos(np.arange(len(weights)))).astype(np.float32)
        whole = self._example_losses_at(somewhere, batch, places)
        if not np.isfinite(whole).all():
            raise LossError("the loss of a sample is not finite: check the data and the model")
        for kept, put in ((slice(0, half), half - 1), (slice(half, None), half)):
            other = np.full_like(places, put)
            other[kept] = places[kept]
            again = self._example_losses_at(somewhere, batch, other)
            if not np.allclose(again[kept], whole[kept], rtol=1e-6, atol=1e-6 * np.abs(whole).max()):
                raise ConfigError(
                    f"{type(self.module).__name__} mixes the samples of a batch, so that none has a loss of "
                    "its own, as the privacy of an example needs it"
                )
        self._apart = bool((batch.inputs[half:] != batch.inputs[half - 1]).any())  # else nothing was put

    def _example_losses_at(
        self, weights: NDArray[np.float32], batch: Batch, places: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Losses (len(places),) of a batch made of those samples, by the module itself."""
        chosen = Batch(batch.inputs[places], batch.targets[places], batch.prefixed)
        with torch.inference_mode(), self._measuring():
            values = self._part.cast(self._wide_tensor(weights))
            return each(self._objective(chosen).per_sample(values)).cpu().numpy()

    def derivatives(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
    ) -> tuple[float, NDArray[np.float64]]:
        with torch.no_grad(), self._measuring():
            origin, rows = self._wide_tensor(weights), self._rows(stream, perturbation)
            objective = self._objective(batch)
            chunk = self._sweeps.chunk(self._sweeps.survey(objective, origin), FEWEST)
            return derivatives(objective, origin, list(directions), rows, chunk, self.tangent_products)

    @contextlib.contextmanager
    def holding(self, batch: Batch) -> Iterator[None]:
        with torch.inference_mode(), self._measuring():
            objective = self._objective(batch)
        before, self._held = self._held, (batch, objective)
        try:
            yield
        finally:
            self._held = before

    def gradient(self, weights: NDArray[np.float32], batch: Batch) -> tuple[NDArray[np.float32], float]:
        """The backprop gradient (n,) and the loss: for baselines and the law simulator only."""
        with self._measuring():
            with torch.no_grad():
                objective = self._objective(batch)
                values = self._part.cast(self._wide_tensor(weights))
            # A leaf for each tensor: the gradient of a slice of one flat leaf is as long as the whole.
            leaves = [value.detach().clone().requires_grad_() for value in values]
            kind, reduced = self.device.type, self.gradient_autocast
            with torch.autocast(kind, reduced, enabled=reduced is not None, cache_enabled=False):
                value = objective.mean(leaves)
            gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1).to("cpu", torch.float32) for g in gradients])
        return flat.numpy(), float(value.detach())

    def outputs(self, weights: NDArray[np.float32], batch: Batch) -> Tensor:
        """The module's outputs for a batch, on the CPU. Cost: one forward pass."""
        with torch.inference_mode(), self._measuring():
            values = self._part.cast(self._wide_tensor(weights))
            result: Tensor = self._objective(batch).outputs(values).cpu()
            return result

    # -- the frozen prefix --------------------------------------------------------------------------

    @property
    def has_frozen_prefix(self) -> bool:
        """True where part of the module does not depend on a trainable parameter."""
        return self._prefix is not None

    def prefixed(self, batch: Batch) -> Batch:
        """The batch after the frozen prefix, to be cached once for data without augmentation.

        Raises ConfigError where the module has no frozen prefix, or one whose result is not a single
        tensor with one row a sample.
        """
        if self._prefix is None or not self._prefix.cacheable:
            raise ConfigError("this module has no frozen prefix whose result could be cached")
        if batch.prefixed:
            return batch
        with torch.inference_mode(), self._measuring():
            (features,) = self._objective(batch).inputs
        if len(features) != len(batch.targets):
            raise ConfigError("the frozen prefix does not keep one row a sample: it cannot be cached")
        if features.dtype == torch.bfloat16:
            raise ConfigError("the frozen prefix ends in bfloat16, which NumPy lacks: it cannot be cached")
        return Batch(features.cpu().numpy(), batch.targets, prefixed=True)

    # -- inside -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Eval mode and, on CUDA, float32 that is float32: TF32's 10-bit mantissa cannot resolve σ = 1e-4."""
        training = [m for m in self.module.modules() if m.training]
        tf32: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
        allowed = [backend.allow_tf32 for backend in tf32] if self.device.type == "cuda" else []
        try:
            for backend, _ in zip(tf32, allowed, strict=False):
                backend.allow_tf32 = False
            for m in training:
                m.training = False
            yield
        finally:
            for m in training:
                m.training = True
            for backend, before in zip(tf32, allowed, strict=False):
                backend.allow_tf32 = before

    def _wide_tensor(self, weights: NDArray[np.float32]) -> Tensor:
        if weights.shape != (self._layout.n,):
            raise ConfigError(f"weights have the shape {weights.shape}, this model has n = {self._layout.n}")
        return torch.tensor(weights, dtype=self._wide, device=self.device)

    def _rows(self, stream: Stream, perturbation: Perturbation) -> Directions:
        """Numbers k → tensors z_k, made anew each time: that takes a small part of a forward pass, and to
        keep them for the next client would take K·n floats.
        """
        n = self._layout.n

        def rows(directions: Sequence[int]) -> list[Tensor]:
            first, last = directions[0], directions[-1]
            if list(directions) == list(range(first, last + 1)):
                runs: list[Any] = [range(first, last + 1)]
            else:
                runs = [range(k, k + 1) for k in directions]
            made = [perturbation.values(stream, run, self._layout, 0, n, self._arrays) for run in runs]
            with torch.inference_mode(False):  # for forward derivatives too
                return [row for block in made for row in torch.as_tensor(block).to(self._wide)]

        return rows

    def _objective(self, batch: Batch) -> Objective:
        """The batch on the device, behind the frozen prefix."""
        if self._held is not None and self._held[0] is batch:
            return self._held[1]
        if batch.prefixed and (self._prefix is None or not self._prefix.cacheable):
            raise ConfigError("a batch behind a frozen prefix was given to a module that has none to cache")
        x = torch.as_tensor(batch.inputs, device=self.device)
        targets = torch.as_tensor(batch.targets, device=self.device)
        given = x
        if x.is_floating_point() and not batch.prefixed:
            x = x.to(self._input_dtype())
        if x.dim() == 4 and self._nhwc:
            # NHWC is quicker for the CPU's convolutions. Written out: for one channel `contiguous` keeps
            # strides that are read as NCHW.
            n, c, h, w = x.shape
            x = x.new_empty((n, h, w, c)).permute(0, 3, 1, 2).copy_(x)
        if batch.prefixed or self._prefix is None:
            unrounded = None if given.dtype == x.dtype else (given,)
            return Objective(self._part, self.loss_function, (x,), targets, unrounded)
        tensors = {**self._frozen, **self._buffers}
        fixed = {own: tensors[name] for own, name in self._prefix_names.items()}
        for own, name in self._prefix_names.items():
            if name in self._buffers:
                fixed[own] = fixed[own].clone()
        with torch.no_grad():
            inputs = functional_call(self._prefix.before, fixed, (x.clone(),), tie_weights=False)
        return Objective(self._part, self.loss_function, tuple(inputs), targets)

    def _names_in(self, part: nn.Module) -> dict[str, str]:
        """The names of the module's tensors inside ``part`` of it → their names in the whole.

        A tied tensor has one name in the whole and appears under each of its names here, so that
        ``functional_call`` need not look for ties anew at every forward pass.
        """
        whole = {id(t): name for name, t in (*self.module.named_parameters(), *self.module.named_buffers())}
        inside = (
            *part.named_parameters(remove_duplicate=False),
            *part.named_buffers(remove_duplicate=False),
        )
        return {name: whole[id(t)] for name, t in inside if id(t) in whole}

    def _input_dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)


def _as_array(tensor: Tensor) -> NDArray[Any]:
    """Its values, or its bits as integers where NumPy has no such type."""
    values = tensor.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    elif values.dtype.itemsize == 1:  # float8 and its like
        values = values.view(torch.uint8)
    array: NDArray[Any] = values.numpy()
    return array


def _nowhere(origin: Tensor) -> Directions:
    """z = 0 for every k: the unperturbed weights, measured by the same way as the perturbed ones."""
    return lambda directions: [torch.zeros_like(origin)] * len(directions)


class Classifier(Protocol):
    """A runtime whose model can be looked at."""

    def outputs(self, weights: NDArray[np.float32], batch: Batch) -> Any:
        """Logits (B, classes) of a batch, an array or a tensor. Cost: one forward pass."""
        ...


class Evaluation(NamedTuple):
    """What a test set says of weights."""

    accuracy: float  # top-1, in [0, 1]
    loss: float  # mean; NaN where it is not finite
    top5: float  # in [0, 1]: the label is among the five largest outputs


def evaluate(runtime: Classifier, weights: NDArray[np.float32], batches: Sequence[Batch]) -> Evaluation:
    """Accuracies and mean loss of a classifier over ``batches``. One forward pass each.

    The loss is the runtime's own where that is of torch, cross-entropy elsewhere.
    """
    loss_function = runtime.loss_function if isinstance(runtime, TorchRuntime) else cross_entropy
    right, among, total, loss = 0, 0, 0, 0.0
    for batch in batches:
        targets = torch.as_tensor(batch.targets)
        outputs = torch.as_tensor(runtime.outputs(weights, batch))
        right += int((outputs.argmax(dim=1) == targets).sum())
        five = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
        among += int((five == targets[:, None]).any(dim=1).sum())
        loss += float(loss_function(outputs, targets).double().sum())
        total += len(targets)
    if total == 0:
        raise ConfigError("there is no sample to evaluate on")
    return Evaluation(right / total, loss / total if math.isfinite(loss) else math.nan, among / total)
