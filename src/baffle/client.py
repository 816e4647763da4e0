"""The client: a plan and a model in, K numbers out. NumPy, a runtime, and nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from baffle.aggregation import ANSWER, OpenSeal, Seal
from baffle.errors import ConfigError, DataError, DigestMismatchError, LossError
from baffle.estimator import Measurement, SteinEstimator
from baffle.local import Sgd, clip_inf_norm, optimizer_for
from baffle.plan import LocalSteps, LocalTraining, ModelMessage, RoundPlan, RoundResult, weights_digest
from baffle.runtimes import Batch, Runtime
from baffle.runtimes.sources import Source
from baffle.stream import Stream, derive_seed, seed_from
from baffle.terms import Terms

Backprop = Callable[[NDArray[np.float32], Batch], tuple[NDArray[np.float32], float]]


class Samples(Protocol):
    """A client's own data."""

    def __len__(self) -> int: ...

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The samples at ``indices``, in that order."""
        ...


@dataclass
class Observation:
    """What a client saw in its last round. It stays on the device; a simulator may look at it."""

    loss: float = float("nan")
    forward_passes: int = 0


class Download:
    """A round's plan and weights at a client, or at several that share a process.

    The clients check the weights against the plan's digest, once for each runtime; ``fitting`` is one for
    which that is done. ``weights`` (n,) float32 cannot be written to; stages before ``answer`` need none.
    They may be any source that the runtimes take: a file, say, which is then read in slices.
    """

    def __init__(
        self, plan: RoundPlan, weights: Source | None = None, *, fitting: Runtime | None = None
    ) -> None:
        self.plan = plan
        self.weights: Source = np.empty(0, np.float32) if weights is None else weights
        if isinstance(self.weights, np.ndarray):
            self.weights.setflags(write=False)
        self._fitting: dict[int, Runtime] = {}  # by id; held, so that no other runtime can take the id
        if fitting is not None:
            self._fitting[id(fitting)] = fitting

    @classmethod
    def decode(cls, plan: bytes, model: bytes | None = None) -> Download:
        """Of an encoded plan and model. Raises MessageError for malformed bytes."""
        weights = None if model is None else ModelMessage.decode(model).weights
        return cls(RoundPlan.decode(plan), weights)

    def fits(self, runtime: Runtime) -> bool:
        """Whether the weights are the plan's, beside this runtime's layout and what it has frozen."""
        if id(runtime) not in self._fitting:
            layout = runtime.layout
            if self.weights.shape != (layout.n,) or self.plan.weights_digest != weights_digest(
                self.weights, layout, runtime.frozen_digest
            ):
                return False
            self._fitting[id(runtime)] = runtime
        return True


class Client:
    """One member of the federation.

    ``seed`` and ``name`` fix the order in which it goes through its samples: round r takes batch r of an
    endless row of permutations, so every answer is a function of (plan, model, client) alone.
    ``max_directions`` is K_c: it measures the first min(K, K_c) directions of a plan.
    ``seal`` is the client's half of the server's aggregator; by default it answers in the clear.

    Raises DataError for a client without samples.
    """

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        samples: Samples,
        *,
        seed: int | bytes = 0,
        max_directions: int | None = None,
        seal: Seal | None = None,
    ) -> None:
        if len(samples) < 1:
            raise DataError(f"client {name} has no samples: give it some, or leave it out")
        if max_directions is not None and max_directions < 1:
            raise ConfigError(f"client {name}: max_directions = {max_directions}, at least 1 is needed")
        self.name = name
        self.runtime = runtime
        self.samples = samples
        self.max_directions = max_directions
        self.seal: Seal = seal or OpenSeal()
        self.observed = Observation()
        self._order_seed = derive_seed(seed_from(seed), "order", name)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def answer(self, plan: bytes, model: bytes) -> bytes:
        """The encoded answer to an encoded plan and model: ``reply`` where a round has one stage.

        Raises MessageError for malformed bytes, DigestMismatchError where the model is not the plan's,
        PrecisionError and LossError from the measurement, ConfigError for a plan that this client cannot
        do. Cost: the plan's forward passes; if it is epoch-level, its estimator's times the local steps.
        """
        return self.answer_to(Download.decode(plan, model))

    def answer_to(self, download: Download) -> bytes:
        """``answer`` where plan and model are decoded already, for another client of this process."""
        return self.reply(ANSWER, b"", download)

    def reply(self, stage: str, request: bytes, download: Download) -> bytes:
        """The answer to one stage of a round, which is what a driver calls: the seal's.

        The stage ``answer`` costs and raises what ``answer`` does; besides, SecurityError where the seal
        refuses a request.
        """
        return self.seal.reply(stage, request, download.plan, _Measure(self, download))

    def _result(self, download: Download) -> RoundResult:
        """The measurement in the clear."""
        plan = download.plan
        values = self._values(download, self._budgeted(plan.estimator))
        try:
            return RoundResult(plan.round, plan.digest, len(self.samples), values)
        except ConfigError as error:  # a number is not finite: all else was checked before
            raise self._not_finite(plan, error) from error

    def _residues(self, download: Download, terms: Terms) -> NDArray[Any]:
        """The measurement by ``terms``, to be summed in a ring."""
        plan, samples, estimator = download.plan, len(self.samples), self._budgeted(download.plan.estimator)
        try:
            terms.check_plan(plan)
            terms.check_samples(samples)
            if plan.asks_slopes:
                directions = terms.directions(plan, self.max_directions)
                estimator = replace(plan.estimator, directions=directions)
        except ConfigError as error:
            raise ConfigError(f"client {self.name}, round {plan.round}: {error}") from error
        if terms.privacy is not None and terms.privacy.unit == "example":
            return terms.prepare_examples(plan, self._examples(download, terms.privacy.sampling_rate))
        values = self._values(download, estimator)
        if not np.isfinite(values).all():
            raise self._not_finite(plan, "an answer holds a number that is not finite")
        return terms.prepare(plan, values, samples)

    def _not_finite(self, plan: RoundPlan, what: object) -> LossError:
        return LossError(
            f"client {self.name}, round {plan.round}: {what}: lower the learning rate, or check the data"
        )

    def _values(self, download: Download, estimator: SteinEstimator) -> NDArray[np.float32]:
        """Slopes (K_c,) or n numbers."""
        plan, weights = download.plan, self._checked(download)
        self.observed = Observation()
        if plan.local is not None:
            values: NDArray[np.floating] = self._train(plan, plan.local, weights)
        elif plan.steps is not None:
            values = self._walk(plan, plan.steps, estimator, weights)
        else:
            indices = self._indices(plan.round, plan.batch_size)
            values = self._measure(plan, estimator, weights, indices)
        with np.errstate(over="ignore"):
            return values.astype(np.float32, copy=False)

    def _checked(self, download: Download) -> Any:
        """The weights: an array, or whatever source this client's runtime was given them as."""
        if not download.fits(self.runtime):
            raise DigestMismatchError(
                f"client {self.name}: the weights at hand are not those of round {download.plan.round}'s "
                "plan: ask the server for the model"
            )
        return download.weights

    # -- examples alone -----------------------------------------------------------------------------

    def _examples(self, download: Download, rate: float) -> Iterator[NDArray[np.float64]]:
        """Slopes (b, K) of the examples that chance takes into this round, a batch size at a time.

        Each takes part with the probability ``rate``, and nobody else may know which did: so the draw is the
        operating system's, not one of a seed.
        """
        plan, weights = download.plan, self._checked(download)
        self.observed = seen = Observation()
        chosen, total = np.flatnonzero(_tosses(len(self.samples), rate)), 0.0
        for at in range(0, len(chosen), plan.batch_size):
            indices = chosen[at : at + plan.batch_size]
            batch = self.samples.batch(indices)
            measured = plan.estimator.example_slopes(self.runtime, weights, batch, plan.stream)
            total += measured.loss * len(indices)
            seen.loss, seen.forward_passes = (
                total / (at + len(indices)),
                seen.forward_passes + measured.forward_passes,
            )
            yield measured.slopes

    # -- batch-level --------------------------------------------------------------------------------

    def _measure(
        self,
        plan: RoundPlan,
        estimator: SteinEstimator,
        weights: NDArray[np.float32],
        indices: NDArray[np.int64],
    ) -> NDArray[np.floating]:
        batch = self.samples.batch(indices)
        if plan.fidelity == "forward-only":
            measured = estimator.slopes(self.runtime, weights, batch, plan.stream)
            self.observed = Observation(measured.loss, measured.forward_passes)
            return measured.slopes
        gradient, loss = self._backprop()(weights, batch)
        passes = estimator.simulated_passes(self.runtime, batch) if plan.fidelity == "law" else 0
        self.observed = Observation(loss, passes)
        return gradient

    def _walk(
        self, plan: RoundPlan, steps: LocalSteps, estimator: SteinEstimator, start: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Slopes (K,): a group of them at each of the points that the client's own steps lead to."""
        if estimator.directions < plan.estimator.directions:
            raise ConfigError(
                f"client {self.name} measures {estimator.directions} directions at most: local steps need "
                f"all K = {plan.estimator.directions}"
            )
        each, step = steps.each(estimator), Sgd(steps.learning_rate)
        weights, found = start[:].copy(), list[Measurement]()
        for t in range(steps.count):
            first = t * each.directions
            batch = self.samples.batch(self._indices(plan.round * steps.count + t, plan.batch_size))
            found.append(each.slopes(self.runtime, weights, batch, plan.stream, first=first))
            if t + 1 < steps.count:  # where the last step leads, nobody looks
                slopes, layout = found[-1].slopes, self.runtime.layout
                step(weights, each.gradient(slopes, plan.stream, layout, first=first))
                if not np.isfinite(weights).all():
                    raise self._not_finite(plan, f"local step {t} leads to weights that are not finite")
        loss = float(np.mean([measured.loss for measured in found]))
        self.observed = Observation(loss, sum(measured.forward_passes for measured in found))
        return np.concatenate([measured.slopes for measured in found])

    def _indices(self, number: int, batch_size: int) -> NDArray[np.int64]:
        """Batch ``number`` of the endless row."""
        size = min(batch_size or len(self.samples), len(self.samples))
        epoch, b = divmod(number, -(-len(self.samples) // size))
        return self._permutation(epoch)[b * size : (b + 1) * size]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Stream(self._order_seed, epoch).permutation(0, len(self.samples))
        return self._order[1]

    # -- epoch-level --------------------------------------------------------------------------------

    def _train(
        self, plan: RoundPlan, local: LocalTraining, start: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The update W_c − W after ``local.epochs`` passes over the client's own samples."""
        start = start[:]  # all of it, whatever source it is
        weights, step = start.copy(), optimizer_for(local)
        seed = derive_seed(plan.seed, "local", self.name, plan.round)
        losses, passes = [], 0
        for number, indices in enumerate(self._local_batches(plan.round, local.epochs, plan.batch_size)):
            batch = self.samples.batch(indices)
            stream = Stream(seed, number)
            if plan.fidelity == "forward-only":
                estimator = self._budgeted(plan.estimator)
                measured = estimator.slopes(self.runtime, weights, batch, stream)
                gradient = estimator.gradient(measured.slopes, stream, self.runtime.layout)
                loss, passes = measured.loss, passes + measured.forward_passes
            else:
                gradient, loss = self._backprop()(weights, batch)
                if plan.fidelity == "law":
                    drawn, layout = derive_seed(seed, "law", number), self.runtime.layout
                    gradient = plan.estimator.simulated(gradient, stream, layout, drawn)
                    passes += plan.estimator.simulated_passes(self.runtime, batch)
            gradient = clip_inf_norm(gradient, local.clip)
            if local.weight_decay:
                gradient = gradient + np.float32(local.weight_decay) * weights
            step(weights, gradient)
            losses.append(loss)
        self.observed = Observation(float(np.mean(losses)), passes)
        return weights - start

    def _local_batches(self, round_: int, epochs: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
        size = min(batch_size or len(self.samples), len(self.samples))
        for epoch in range(round_ * epochs, (round_ + 1) * epochs):
            order = self._permutation(epoch)
            for at in range(0, len(order), size):
                yield order[at : at + size]

    # -- inside -------------------------------------------------------------------------------------

    def _budgeted(self, estimator: SteinEstimator) -> SteinEstimator:
        if self.max_directions is None or self.max_directions >= estimator.directions:
            return estimator
        return replace(estimator, directions=self.max_directions)

    def _backprop(self) -> Backprop:
        # Not isinstance: that of a protocol evaluates every property, and one of them hashes a model.
        gradient: Backprop | None = getattr(self.runtime, "gradient", None)
        if gradient is None:
            raise ConfigError(f"client {self.name} can only infer: fidelity must be 'forward-only'")
        if self.max_directions is not None:
            raise ConfigError(
                f"client {self.name} has its own K: only fidelity 'forward-only' honours max_directions"
            )
        return gradient


class _Measure:
    """``Measure`` of one client and download."""

    def __init__(self, client: Client, download: Download) -> None:
        self._client, self._download = client, download

    @overload
    def __call__(self, terms: None) -> RoundResult: ...
    @overload
    def __call__(self, terms: Terms) -> NDArray[Any]: ...

    def __call__(self, terms: Terms | None) -> RoundResult | NDArray[Any]:
        if terms is None:
            return self._client._result(self._download)
        return self._client._residues(self._download, terms)


def _tosses(count: int, rate: float) -> NDArray[np.bool_]:
    """Independent coins that are True with the probability ⌊rate·2⁶⁴⌋/2⁶⁴, from the operating system."""
    threshold = math.floor(math.ldexp(rate, 64))
    if threshold >= 1 << 64:
        return np.ones(count, dtype=np.bool_)
    drawn: NDArray[np.bool_] = np.frombuffer(os.urandom(8 * count), np.uint64) < np.uint64(threshold)
    return drawn
