"""The torch runtime: any ``nn.Module``, any per-sample loss, CPU or CUDA.

The user's module is never subclassed, wrapped or written to: a forward pass is a functional call, or a call
of a copy of its structure, with W + scale·z_k in place of the trainable parameters and copies of the
buffers. ``TorchRuntime._sweep`` chooses the way through the directions: ``batched`` or ``onebyone``.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from baffle.errors import ConfigError, PrecisionError
from baffle.kernels import available
from baffle.perturbations import Layout, LowRank, Perturbation
from baffle.runtimes import Batch
from baffle.runtimes.batched import FEWEST, MOST_ON_CPU, Survey, batched, chunk_for, pays, survey
from baffle.runtimes.lowrank import shared_weight_losses
from baffle.runtimes.objective import Directions, Loss, Objective, Part
from baffle.runtimes.onebyone import Replica, has_hooks, on_own_threads, one_by_one, verified
from baffle.runtimes.prefix import split_frozen_prefix
from baffle.runtimes.tangent import derivatives
from baffle.stream import NUMPY, Arrays, Lanes, Stream

# The smallest σ whose slopes still follow the exact directional derivative (correlation ≥ 0.99; LeNet,
# central), by the coarsest type in the forward pass. `baffle doctor` measures them on this machine.
USABLE_SIGMA = {
    torch.float64: 1e-8,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per-sample cross-entropy (B,) of logits (B, classes), in float64: the differences are small."""
    return nn.functional.cross_entropy(outputs.double(), targets, reduction="none")


class TorchArrays:
    """``Arrays`` on a torch device: the bits of the normative NumPy stream."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._constants: dict[str, Tensor] = {}

    def arange(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, dtype=torch.int64, device=self.device)

    def _pairs(self, lanes: Lanes) -> Tensor:
        """The words of blocks in order, two to an int64: (..., m, 2)."""
        c0, c1, c2, c3 = lanes
        return torch.stack((c0 | c1 << 32, c2 | c3 << 32), dim=-1)

    def halves(self, lanes: Lanes) -> Tensor:
        return self._pairs(lanes).view(torch.int16).flatten(-2).long()

    def bits(self, lanes: Lanes) -> Tensor:
        words = self._pairs(lanes).view(torch.int32).unsqueeze(-1)
        return (words >> torch.arange(32, dtype=torch.int32, device=self.device) & 1).flatten(-3)

    def constant(self, name: str, values: NDArray[Any]) -> Tensor:
        if name not in self._constants:
            self._constants[name] = torch.from_numpy(values.copy()).to(self.device)
        return self._constants[name]

    def scalar(self, value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64, device=self.device)

    def float32(self, array: Tensor) -> Tensor:
        return array.to(torch.float32)

    def float64(self, array: Tensor) -> Tensor:
        return array.to(torch.float64)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)


class TorchRuntime:
    """Losses of ``module`` by forward passes alone.

    Only parameters with ``requires_grad`` are perturbed. Everything is measured in ``eval`` mode (dropout
    off, batch norm on its running statistics) and the module's modes are put back. ``loss(outputs,
    targets)`` returns per-sample losses (B,); they are averaged in float64. ``memory_budget`` (bytes)
    bounds the directions of a round that are kept for the next client of the same process, and the memory
    of directions that are measured together. ``tangent_products`` is the type in which ``derivatives``
    multiplies changes in linear and convolution layers, e.g. ``torch.bfloat16`` for matrix units; None
    stands for the module's own. Values stay in float32.

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
    ) -> None:
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable:
            raise ConfigError("the module has no trainable parameter (requires_grad is False everywhere)")
        self.module = module
        self.loss_function = loss
        self.device = torch.device(device)
        self.memory_budget = memory_budget
        self.tangent_products = tangent_products
        self._layout = Layout(tuple(trainable), tuple(tuple(p.shape) for p in trainable.values()))
        dtypes = tuple(p.dtype for p in trainable.values())
        self._wide = torch.float64 if torch.float64 in dtypes else torch.float32
        # Frozen parameters and buffers stay the module's own tensors where they already lie on the device.
        self._frozen = {
            name: p.detach().to(self.device) for name, p in module.named_parameters() if not p.requires_grad
        }
        self._buffers = {name: b.detach().to(self.device) for name, b in module.named_buffers()}
        self._arrays: Arrays = NUMPY if self.device.type == "cpu" else TorchArrays(self.device)
        self.chunk = max(1, memory_budget // (self._wide.itemsize * self._layout.n))
        self._kept: dict[int, Tensor] = {}
        self._kept_for: tuple[Stream, str] | None = None
        self._keeping = threading.Lock()
        with self._measuring():
            self._prefix = split_frozen_prefix(module)
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
        self._surveys: dict[tuple[object, ...], Survey] = {}
        self._replicas: list[Replica] = []
        self._program: Any = None  # not known before the first measurement; False where there is none
        self._memories: list[Any] = []
        self._replicable: bool | None = None  # not known before the first measurement
        self._batchable = True
        self._held: tuple[Batch, Objective] | None = None

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def frozen_digest(self) -> bytes:
        h = hashlib.sha256(b"baffle frozen v1")
        for name, tensor in sorted({**self._frozen, **self._buffers}.items()):
            values = tensor.detach().cpu().contiguous()
            h.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            h.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        return h.digest()

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

    @property
    def arithmetic(self) -> torch.dtype:
        """The coarsest floating-point type among the module's tensors."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return max(
            (t.dtype for t in tensors if t.is_floating_point()), key=lambda dtype: torch.finfo(dtype).eps
        )

    def check_sigma(self, sigma: float) -> None:
        usable = USABLE_SIGMA.get(self.arithmetic)
        if usable is None:
            raise PrecisionError(f"{self.arithmetic} arithmetic cannot measure slopes: use float32")
        if sigma < usable:
            name = str(self.arithmetic).removeprefix("torch.")
            raise PrecisionError(
                f"σ = {sigma:g} lies below what {name} arithmetic resolves: use σ ≥ {usable:g} with the "
                "central scheme, or keep the weights' noise and the forward pass in float32"
            )

    # -- losses -------------------------------------------------------------------------------------

    def loss(self, weights: NDArray[np.float32], batch: Batch) -> float:
        with torch.inference_mode(), self._measuring():
            origin = self._wide_tensor(weights)
            return float(self._sweep(self._objective(batch), origin, [0], 0.0, _nowhere(origin))[0])

    def losses(
        self,
        weights: NDArray[np.float32],
        batch: Batch,
        stream: Stream,
        perturbation: Perturbation,
        directions: Sequence[int],
        scale: float,
    ) -> NDArray[np.float64]:
        with torch.inference_mode(), self._measuring():
            origin, objective = self._wide_tensor(weights), self._objective(batch)
            if isinstance(perturbation, LowRank) and self._shares(objective, origin):
                losses = shared_weight_losses(
                    objective.per_sample,
                    self._part.cast(origin),
                    stream,
                    perturbation,
                    self._layout,
                    directions,
                    scale,
                    arrays=self._arrays,
                )
                if losses is not None:
                    return losses
            rows = self._rows(stream, perturbation)
            return self._sweep(objective, origin, list(directions), scale, rows)

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
            chunk = self._chunk(self._survey(objective, origin), FEWEST)
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

    # -- ways through the directions ----------------------------------------------------------------

    def _sweep(
        self, objective: Objective, origin: Tensor, directions: Sequence[int], scale: float, rows: Directions
    ) -> NDArray[np.float64]:
        """Mean losses (len(directions),) at W + scale·z_k, by the way that suits the part and the device."""
        if self._programmable(objective, origin):
            from baffle.runtimes.program import Memory, by_program

            workers = min(torch.get_num_threads(), max(1, len(directions)))
            self._memories += [Memory() for _ in range(workers - len(self._memories))]
            memories = self._memories[:workers]
            return by_program(self._program, memories, objective, origin, directions, scale, rows)
        if not directions:
            return np.empty(0)
        if self._batchable and not has_hooks(self._part.module):
            seen = self._survey(objective, origin)
            if pays(seen, self.device):
                try:
                    copies = self._workers(objective, origin, -(-len(directions) // FEWEST))
                    modules = [replica.module for replica in copies] or [self._part.module]
                    chunk = self._chunk(seen, MOST_ON_CPU)
                    return batched(objective, modules, origin, directions, scale, rows, chunk)
                except (ConfigError, torch.OutOfMemoryError):
                    raise
                except Exception:  # vmap raises many types; whatever is truly wrong shows one by one too
                    losses = self._one_by_one(objective, origin, directions, scale, rows)
                    self._batchable = False
                    return losses
        return self._one_by_one(objective, origin, directions, scale, rows)

    def _shares(self, objective: Objective, origin: Tensor) -> bool:
        """Whether low-rank directions pay as one product with W and a correction: on a GPU always, on a CPU
        where no convolution depends on W (docs/performance.md).
        """
        if has_hooks(self._part.module):
            return False
        return self.device.type != "cpu" or self._survey(objective, origin).convolutions == 0

    def _programmable(self, objective: Objective, origin: Tensor) -> bool:
        """Whether the part has a program, that this batch suits. The first time costs two forward passes."""
        if self._program is False or has_hooks(self._part.module) or not on_own_threads():
            return False
        (x,) = objective.inputs if len(objective.inputs) == 1 else (None,)
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.dim() != 4:
            return False
        if self._program is None:
            self._program = False
            if self.device.type == "cpu" and available():
                from baffle.runtimes.program import Program

                program = Program.of(self._part)
                self._program = program if program and program.agrees(objective, origin) else False
        return self._program is not False

    def _one_by_one(
        self, objective: Objective, origin: Tensor, directions: Sequence[int], scale: float, rows: Directions
    ) -> NDArray[np.float64]:
        replicas = self._workers(objective, origin, len(directions))
        return one_by_one(objective, replicas, origin, directions, scale, rows)

    def _survey(self, objective: Objective, origin: Tensor) -> Survey:
        key = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else None for x in objective.inputs)
        if key not in self._surveys:
            self._surveys[key] = survey(objective, origin)
        return self._surveys[key]

    def _chunk(self, seen: Survey, most_on_cpu: int) -> int:
        n, itemsize = self._layout.n, self._wide.itemsize
        return chunk_for(seen, n, itemsize, self.memory_budget, self.device, most_on_cpu)

    def _workers(self, objective: Objective, origin: Tensor, tasks: int) -> list[Replica]:
        """Replicas for as many tasks at once as torch may use threads; none where only the module itself
        can be trusted to be the module. The first time costs two forward passes.
        """
        if self._replicable is False or self.device.type != "cpu" or has_hooks(self._part.module):
            return []
        threads = torch.get_num_threads() if on_own_threads() else 1
        count = max(1, min(threads, tasks))
        try:
            while len(self._replicas) < count:
                self._replicas.append(Replica(self._part))
        except Exception:  # a module may hold anything, of which some cannot be copied
            self._replicable = False
            return []
        if self._replicable is None:
            self._replicable = verified(objective, self._replicas[0], origin)
        return self._replicas[:count] if self._replicable else []

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
        """Numbers k → tensors z_k. The first ``chunk`` directions of a round are kept for its next client."""
        if self._kept_for != (stream, perturbation.spec):
            self._kept, self._kept_for = {}, (stream, perturbation.spec)
        kept, n = self._kept, self._layout.n

        def rows(directions: Sequence[int]) -> list[Tensor]:
            with contextlib.suppress(KeyError):
                return [kept[k] for k in directions]
            found = {k: kept[k] for k in directions if k in kept}
            for run in _runs({k for k in directions if k not in found}):
                values = perturbation.values(stream, run, self._layout, 0, n, self._arrays)
                with torch.inference_mode(False):  # kept ones serve derivatives too
                    block = torch.as_tensor(values).to(self._wide)
                    found.update(zip(run, block, strict=True))
                with self._keeping:
                    room = max(0, self.chunk - len(kept))
                    # A row keeps its whole block alive, unless it is a copy.
                    kept.update((k, found[k] if len(run) <= room else found[k].clone()) for k in run[:room])
            return [found[k] for k in directions]

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
        if x.dim() == 4 and self.device.type == "cpu":
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


def _runs(numbers: set[int]) -> list[range]:
    """The numbers as ascending ranges without gaps."""
    runs: list[range] = []
    for k in sorted(numbers):
        if runs and runs[-1].stop == k:
            runs[-1] = range(runs[-1].start, k + 1)
        else:
            runs.append(range(k, k + 1))
    return runs


def _nowhere(origin: Tensor) -> Directions:
    """z = 0 for every k: the unperturbed weights, measured by the same way as the perturbed ones."""
    return lambda directions: [torch.zeros_like(origin)] * len(directions)


@dataclass(frozen=True)
class _CachedPrefix:
    features: NDArray[np.generic]
    targets: NDArray[np.generic]

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        return Batch(self.features[indices], self.targets[indices], prefixed=True)


def cache_prefix(runtime: TorchRuntime, samples: Any, chunk: int = 128) -> _CachedPrefix:
    """A data set (``len`` and ``batch(indices)``) after the frozen prefix, computed once.

    For data without augmentation. Cost: one pass of the prefix over the data; memory: its features.
    Raises ConfigError where the prefix cannot be cached (see ``TorchRuntime.prefixed``).
    """
    parts = [
        runtime.prefixed(samples.batch(np.arange(at, min(at + chunk, len(samples)))))
        for at in range(0, len(samples), chunk)
    ]
    return _CachedPrefix(
        np.concatenate([part.inputs for part in parts]), np.concatenate([part.targets for part in parts])
    )


def evaluate(
    runtime: TorchRuntime, weights: NDArray[np.float32], batches: Sequence[Batch]
) -> tuple[float, float]:
    """Top-1 accuracy in [0, 1] and mean loss of a classifier over ``batches``. One forward pass each."""
    right, total, loss = 0, 0, 0.0
    for batch in batches:
        targets = torch.as_tensor(batch.targets)
        outputs = runtime.outputs(weights, batch)
        right += int((outputs.argmax(dim=1) == targets).sum())
        loss += float(runtime.loss_function(outputs, targets).double().sum())
        total += len(targets)
    if total == 0:
        raise ConfigError("there is no sample to evaluate on")
    return right / total, loss / total if math.isfinite(loss) else math.nan
