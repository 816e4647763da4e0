"""A layer along its coordinates: only what a coordinate reaches is computed again.

A weight of a linear or convolution layer changes one channel of what the layer returns, by the step times
one input that is there already: no product with W is computed again. The change goes through what works on
each channel alone (activations, pooling) to the next linear or convolution layer, of which one input
channel is multiplied again, and from there on through everything. So a gradient of LeNet's 26,730 entries
takes the time of a few hundred forward passes instead of 26,730: docs/performance.md.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.func import functional_call

from baffle.kernels import available
from baffle.runtimes.batched import counted, quiet
from baffle.runtimes.objective import Objective, Part, Reduce, mean
from baffle.runtimes.onebyone import has_hooks, on_own_threads, share
from baffle.runtimes.prefix import traced

# Work on each channel alone, by exact type: a subclass may do anything.
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Identity, nn.Dropout),
)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
# What is counted is set by the clock, so that LeNet's coordinates are said to cost what they take, to within
# a factor of two, where there are kernels (benchmarks/coordinates.py). An element is changed in the time
# of so many multiplications, since these steps multiply little and move much memory; a multiplication takes
# twice as long as one of a forward pass, whose convolutions are Winograd's.
_ELEMENT, _MULTIPLICATION = 16, 2
# Elements at once, of the changed channel and of all that the next layer returns: more leave the caches.
_CHANNEL, _WHOLE = 1 << 17, 1 << 19


@dataclass(frozen=True)
class _Base:
    """What lies along a chain at W, for one batch."""

    inputs: Tensor  # of the layer: (fan-in + 1, B, P), the last row ones, for the bias
    sums: Tensor  # what the layer returns, (C, B, P)
    shape: tuple[int, ...]  # of one channel of it, () or (H, W)
    channels: Tensor  # behind the chain, (B, C, …)
    mixed: Tensor  # behind the next layer, (B, …)
    end: Tensor  # behind the tail: what the rest gets, (B, …)


@dataclass(frozen=True)
class Coordinates:
    """Layer, chain, next layer, tail and rest of the part behind a cut.

    The tail is an activation and the mean over the image behind a convolution, or nothing: these two, also as
    a chain, have kernels.
    """

    part: Part
    layer: str
    chain: tuple[nn.Module, ...]
    mixer: str | None
    tail: tuple[nn.Module, ...]
    rest: fx.GraphModule
    places: tuple[int, ...]  # the layer's tensors in the layout: its weight and, where it has one, its bias
    budget: int  # bytes that the layer's input may take, each element as often as weights meet it

    @classmethod
    def of(cls, part: Part, own: set[int], budget: int) -> Coordinates | None:
        """For the layer of the tensors ``own``, the first of ``part``; None where it has no such shape."""
        if has_hooks(part.module) or any(dtype != part.wide for dtype in part.dtypes):
            return None
        found = traced(part.module)
        if found is None:
            return None
        module, graph = found
        first = [node for node in graph.nodes if node.op == "placeholder"]
        at = _only_user(first[0]) if len(first) == 1 else None
        if at is None or not _is_product(module, at):
            return None
        layer = str(at.target)
        names = [f"{layer}.weight", f"{layer}.bias"]
        places = tuple(part.trainable[name] for name in names if name in part.trainable)
        used = [place for place in part.trainable.values() if place in own]
        alone = sum(node.target == layer for node in graph.nodes) == 1
        if names[0] not in part.trainable or set(places) != own or len(used) != len(own) or not alone:
            return None  # a tensor of it is frozen, or it is of use elsewhere too
        chain, mixer, at = _chain(module, at)
        tail, at = _tail(module, at) if mixer is not None else ((), at)
        return cls(part, layer, chain, mixer, tail, _from(module, graph, at), places, budget)

    @property
    def count(self) -> int:
        offsets = self.part.layout.offsets
        return sum(offsets[place + 1] - offsets[place] for place in self.places)

    def suits(self, objective: Objective) -> bool:
        """Whether the layer gets images, or a vector a sample, as its kind does, and not too many."""
        (inputs,) = objective.inputs
        product = self.part.module.get_submodule(self.layer)
        if not isinstance(inputs, Tensor) or inputs.dim() != (4 if isinstance(product, nn.Conv2d) else 2):
            return False
        again = 1.0
        if isinstance(product, nn.Conv2d):
            again = math.prod(product.kernel_size) / math.prod(product.stride)
        return inputs.numel() * inputs.element_size() * again <= self.budget

    def differences(
        self,
        objective: Objective,
        weights: Sequence[Tensor],
        entries: Sequence[int],
        step: float,
        reduce: Reduce,
    ) -> NDArray[np.float64]:
        """Losses (len(entries),) at W + step·e_i less that at W; (len(entries), B) if ``reduce`` is ``each``.

        Entries count from the layer's first, its weight before its bias. Memory: the layer's input, each
        element as often as weights meet it, and ``_WHOLE`` elements or a few samples' worth.
        """
        product = self._product(self.layer, weights)
        base = self._base(objective, product, weights)
        fan_in, outputs = len(base.inputs) - 1, len(base.sums)
        out = objective.room(len(entries), reduce)
        numbers = np.asarray(entries, np.int64)
        bias = numbers >= outputs * fan_in
        channel = np.where(bias, numbers - outputs * fan_in, numbers // fan_in)
        row = np.where(bias, fan_in, numbers % fan_in)
        order = np.lexsort((row, channel))
        most = max(16, _WHOLE // base.mixed.numel())
        known = self._all_changes(base, step) if 4 * len(numbers) >= self.count else None

        def worker(rest: nn.Module) -> Callable[[int], None]:
            tell = self._telling(rest, objective, weights, reduce)

            def measure(o: int) -> None:
                places = order[channel[order] == o]
                for begin in range(0, len(places), most):
                    some = places[begin : begin + most]
                    if known is None:
                        change = self._change(base, o, row[some], step)
                    else:
                        change = torch.from_numpy(known[o, np.append(row[some], fan_in + 1)])
                        change = change.view(*change.shape, 1, 1, 1)
                    losses = tell(self._mixed(base, o, change, weights)).cpu().numpy()
                    out[some] = losses[:-1] - losses[-1]

            return measure

        tasks = np.unique(channel).tolist()
        with quiet():
            share(tasks, [worker(rest) for rest in self._rests(objective, len(tasks))])
        return out

    def multiplications(self, objective: Objective, weights: Sequence[Tensor]) -> float:
        """Those of a forward pass that take the time of one coordinate, on the mean. Cost: one pass."""
        base = self._base(objective, self._product(self.layer, weights), weights)
        batch, before, behind = len(base.end), base.sums[0].numel(), base.channels[:, :1].numel()
        products = 0
        if self.mixer is not None:
            weight, _ = self._product(self.mixer, weights)
            images = weight.dim() == 4
            columns = weight[:, :1].numel() if images else weight.shape[0] * behind // batch
            products = columns * (base.mixed[:, :1].numel() if images else batch)
        # Added to the channel's sums, through each step of the chain, and the change taken; likewise behind.
        elements = before * (2 + len(self.chain)) + behind + base.mixed.numel() * (1 + len(self.tail))
        tell = self._telling(self.rest, objective, weights, mean)
        rest = counted(lambda: tell(base.end[None])).multiplications
        return _MULTIPLICATION * (products + rest) + _ELEMENT * elements

    # -- inside -------------------------------------------------------------------------------------

    def _product(self, name: str, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer, at W or frozen."""

        def tensor(own: str) -> Tensor | None:
            if own in self.part.trainable:
                return weights[self.part.trainable[own]]
            return self.part.frozen.get(own)

        weight = tensor(f"{name}.weight")
        assert weight is not None
        return weight, tensor(f"{name}.bias")

    def _base(
        self, objective: Objective, product: tuple[Tensor, Tensor | None], weights: Sequence[Tensor]
    ) -> _Base:
        (inputs,), (weight, bias) = objective.inputs, product
        module = self.part.module.get_submodule(self.layer)
        sums = _applied(module, inputs, weight, bias)
        if isinstance(module, nn.Conv2d):
            settings = {"dilation": module.dilation, "padding": module.padding, "stride": module.stride}
            seen = nn.functional.unfold(inputs, module.kernel_size, **settings)  # type: ignore[arg-type]
        else:
            seen = inputs[:, :, None]
        rows = torch.cat([seen.transpose(0, 1), seen.new_ones((1, len(inputs), seen.shape[2]))])
        channels = _through(self.chain, sums.clone())
        if self.mixer is None:
            mixed = channels
        else:
            mixer = self.part.module.get_submodule(self.mixer)
            flat = channels.flatten(1) if isinstance(mixer, nn.Linear) else channels
            mixed = _applied(mixer, flat, *self._product(self.mixer, weights))
        apart = sums.view(*sums.shape[:2], -1).transpose(0, 1).contiguous()
        end, mixed = _through(self.tail, mixed.clone()).contiguous(), mixed.contiguous()
        return _Base(rows, apart, tuple(sums.shape[2:]), channels, mixed, end)

    def _change(self, base: _Base, o: int, rows: NDArray[np.int64], step: float) -> Tensor:
        """Of channel ``o`` behind the chain, by each of k coordinates, and 0 at last: (k + 1, B, 1, …)."""
        batch, most = base.inputs.shape[1], max(4, _CHANNEL // base.sums[0].numel())
        at_W = base.channels[:, o : o + 1]
        change = at_W.new_zeros((len(rows) + 1, *at_W.shape))
        for begin in range(0, len(rows), most):
            some = rows[begin : begin + most]
            k, follow = len(some), int(some[-1] - some[0]) == len(some) - 1
            seen = base.inputs[some[0] : some[-1] + 1] if follow else base.inputs[torch.from_numpy(some)]
            moved = torch.add(base.sums[o], seen, alpha=step).view(k * batch, 1, *base.shape)
            torch.sub(_through(self.chain, moved).view(k, *at_W.shape), at_W, out=change[begin : begin + k])
        return change

    def _all_changes(self, base: _Base, step: float) -> NDArray[np.float32] | None:
        """``_change`` of each channel and row at once (C, rows + 1, B), where a kernel does it."""
        activation = _code(self.chain)
        if activation is None or not _fits(base.inputs) or base.inputs.shape[2] % 16:
            return None
        from baffle.kernels.coordinates import of_sums

        channels, batch, pixels = base.sums.shape
        rows = len(base.inputs)
        change = np.zeros((channels, rows + 1, batch), np.float32)
        found = np.empty((channels, rows, batch), np.float32)
        active = _flat(self.chain[0](base.sums.clone()))
        sums, seen, shape = _flat(base.sums), _flat(base.inputs), (channels, rows, batch, pixels)
        _shared(
            batch, lambda a, b: of_sums(sums, active, seen, shape, step, activation, a, b, found.reshape(-1))
        )
        change[:, :rows] = found
        return change

    def _mixed(self, base: _Base, o: int, change: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What the rest gets (k, B, …): with channel ``o`` changed so, in k ways."""
        k = len(change)
        if self.mixer is None:
            whole = base.end.repeat(k, *[1] * base.end.dim()).view(k, *base.end.shape)
            whole[:, :, o : o + 1] += change
            return whole
        weight, _ = self._product(self.mixer, weights)
        if weight.dim() == 2:
            wide = weight.shape[1] // base.channels.shape[1]  # of a channel's elements, one column each
            further = change.flatten(2) @ weight[:, o * wide : (o + 1) * wide].T
            return further.view(k, *base.end.shape) + base.end
        means = self._means(base, change, weight[:, o])
        if means is not None:
            return means.view(k, *base.end.shape) + base.end
        module = self.part.module.get_submodule(self.mixer)
        further = _applied(module, change.flatten(0, 1), weight[:, o : o + 1], None).view(
            k, *base.mixed.shape
        )
        return _through(self.tail, (further + base.mixed).flatten(0, 1)).view(k, *base.end.shape)

    def _means(self, base: _Base, change: Tensor, kernel: Tensor) -> Tensor | None:
        """Changes (k, B, C) behind the tail, where a kernel does it."""
        module, activation = self.part.module.get_submodule(str(self.mixer)), _code(self.tail)
        taps = kernel.shape[-1]
        same = kernel.shape[-2] == taps and taps % 2 == 1 and module.padding == (taps // 2, taps // 2)
        plain = module.stride == (1, 1) and module.dilation == (1, 1)
        batch, channels, high, wide = base.mixed.shape
        if (
            activation is None
            or not (same and plain and _fits(change))
            or channels % 2
            or high % 8
            or wide % 16
        ):
            return None
        from baffle.kernels.coordinates import of_products

        out = np.empty((len(change), batch, channels), np.float32)
        active = _flat(self.tail[0](base.mixed.clone()))
        moved, taken, sums, shape = _flat(change), _flat(kernel), _flat(base.mixed), tuple(base.mixed.shape)
        _shared(
            len(change),
            lambda a, b: of_products(
                moved, taken, sums, active, shape, taps, activation, a, b, out.reshape(-1)
            ),
        )
        return torch.from_numpy(out)

    def _rests(self, objective: Objective, tasks: int) -> list[nn.Module]:
        """The rest, and a copy for each further thread: a functional call swaps a module's tensors."""
        tensors = {id(t): t for t in (*self.rest.parameters(), *self.rest.buffers())}
        alone = objective.inputs[0].device.type != "cpu" or not on_own_threads()
        threads = 1 if alone else min(torch.get_num_threads(), tasks)
        return [self.rest, *(copy.deepcopy(self.rest, dict(tensors)) for _ in range(threads - 1))]

    def _telling(
        self, rest: nn.Module, objective: Objective, weights: Sequence[Tensor], reduce: Reduce
    ) -> Callable[[Tensor], Tensor]:
        trainable, frozen, buffers = _named(self.part, rest)
        tensors = frozen | buffers | {name: weights[place] for name, place in trainable.items()}

        def losses(x: Tensor) -> Tensor:
            outputs = functional_call(rest, tensors, (x,), tie_weights=False)
            return reduce(objective.checked(outputs))

        each = torch.func.vmap(losses)
        return lambda x: each(x.contiguous())  # some transforms of torch know no other order of memory


def _through(steps: Sequence[nn.Module], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _code(steps: Sequence[nn.Module]) -> int | None:
    """The kernels' activation, where the steps are one that they have and the mean over the image."""
    if len(steps) != 2 or not _is_mean(steps[1]) or not available():
        return None
    from baffle.kernels import winograd

    return {nn.ReLU: winograd.RELU, nn.Hardswish: winograd.HARDSWISH}.get(type(steps[0]))


def _fits(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _flat(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.contiguous().view(-1).numpy()


def _shared(count: int, work: Callable[[int, int], None]) -> None:
    """``work(begin, end)`` for parts of range(count), as many at once as torch may use threads."""
    threads = min(torch.get_num_threads(), count)
    ends = [count * i // threads for i in range(threads + 1)]
    if threads < 2:
        work(0, count)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, a, b) for a, b in itertools.pairwise(ends)]:
            done.result()


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and len(users[0].all_input_nodes) == 1 else None


def _called(module: nn.Module, node: fx.Node) -> nn.Module | None:
    plain = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return module.get_submodule(str(node.target)) if plain else None


def _is_product(module: nn.Module, node: fx.Node) -> bool:
    """Whether each of a layer's weights meets one input channel and one output channel."""
    called = _called(module, node)
    if type(called) is nn.Conv2d:
        return called.groups == 1 and called.padding_mode == "zeros" and not isinstance(called.padding, str)
    return type(called) is nn.Linear


def _chain(module: nn.Module, layer: fx.Node) -> tuple[tuple[nn.Module, ...], str | None, fx.Node]:
    """The steps behind a layer that work on each channel alone, the next layer where it follows them, and the
    node behind which all is computed again.
    """
    images = isinstance(_called(module, layer), nn.Conv2d)
    steps: list[nn.Module] = []
    at = layer
    while (after := _only_user(at)) is not None and (called := _called(module, after)) is not None:
        if type(called) in _ACTIVATIONS or (images and type(called) in _POOLS and not _gives_places(called)):
            steps.append(called)
            at = after
            continue
        kind: type[nn.Module] = nn.Conv2d if images else nn.Linear
        if images and type(called) is nn.Flatten and (called.start_dim, called.end_dim) == (1, -1):
            flattened = _only_user(after)
            if flattened is None:
                break
            after, kind = flattened, nn.Linear
        if _is_product(module, after) and type(_called(module, after)) is kind:
            return tuple(steps), str(after.target), after
        break
    return tuple(steps), None, at


def _tail(module: nn.Module, at: fx.Node) -> tuple[tuple[nn.Module, ...], fx.Node]:
    """An activation and the mean over the image behind a convolution, and the last of these nodes."""
    if isinstance(_called(module, at), nn.Conv2d) and (first := _only_user(at)) is not None:
        second, activation = _only_user(first), _called(module, first)
        pool = None if second is None else _called(module, second)
        if second is not None and activation is not None and pool is not None:
            tail = (activation, pool)
            if type(activation) in _ACTIVATIONS and _is_mean(pool):
                return tail, second
    return (), at


def _is_mean(called: nn.Module) -> bool:
    return type(called) is nn.AdaptiveAvgPool2d and called.output_size in (1, (1, 1))


def _gives_places(called: Any) -> bool:
    return bool(getattr(called, "return_indices", False))


def _from(module: nn.Module, graph: fx.Graph, at: fx.Node) -> fx.GraphModule:
    """What comes after a node, of its value."""
    rest, copied = fx.Graph(), {}
    copied[at] = rest.placeholder("crossing")
    reached = {at}
    for node in graph.nodes:
        if node.op == "get_attr":
            copied[node] = rest.node_copy(node)
        elif any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            copied[node] = rest.node_copy(node, lambda n: copied[n])
    return fx.GraphModule(module, rest)


def _applied(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return nn.functional.conv2d(x, weight, bias, module.stride, module.padding, module.dilation)
    return nn.functional.linear(x, weight, bias)


def _named(part: Part, module: nn.Module) -> tuple[dict[str, int], dict[str, Tensor], dict[str, Tensor]]:
    """Those of the part's tensors that a module of a part of its graph has: the names are the same."""
    own = {
        name
        for name, _ in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
    }
    return (
        {name: place for name, place in part.trainable.items() if name in own},
        {name: tensor for name, tensor in part.frozen.items() if name in own},
        {name: tensor for name, tensor in part.buffers.items() if name in own},
    )
