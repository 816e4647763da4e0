"""What every runtime must do: a test class that each runtime's own tests inherit."""

from __future__ import annotations

import abc
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from baffle.errors import ConfigError, PrecisionError
from baffle.perturbations import Gaussian, LowRank, Perturbation, Rademacher
from baffle.runtimes import Batch, ExampleRuntime, Runtime, TangentRuntime
from baffle.stream import Stream, seed_from

STREAM = Stream(seed_from(11), 5)


class RuntimeContract(abc.ABC):
    """Inherit, make ``runtime()``, ``batch()`` and ``oracle()``, and keep to float32 models."""

    #: Relative rounding of one float32 loss at these sizes: a few dozen roundings of 2⁻²⁴.
    rtol = 64 * 2.0**-24

    @abc.abstractmethod
    def runtime(self) -> Runtime:
        """A fresh runtime; always the same weights."""

    @abc.abstractmethod
    def batch(self) -> Batch:
        """At least 4 samples."""

    @abc.abstractmethod
    def oracle(self, weights: NDArray[np.float64], batch: Batch) -> float:
        """The mean loss at flat weights (n,), by another way, in float64."""

    @pytest.fixture
    def parts(self) -> tuple[Runtime, NDArray[np.float32], Batch]:
        runtime = self.runtime()
        return runtime, runtime.weights(), self.batch()

    @pytest.mark.parametrize("kind", [Gaussian(), Rademacher(), LowRank(2)], ids=lambda kind: kind.spec)
    @pytest.mark.parametrize("scale", [0.1, -0.1])
    def test_losses_equal_a_loop_with_perturbations_added_by_hand(
        self, parts, kind: Perturbation, scale: float
    ):
        runtime, w, batch = parts
        n = runtime.layout.n
        got = runtime.losses(w, batch, STREAM, kind, range(6), scale)
        z = [kind.values(STREAM, k, runtime.layout, 0, n).astype(np.float64) for k in range(6)]
        want = [self.oracle(w.astype(np.float64) + scale * row, batch) for row in z]
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=self.rtol)
        assert len(set(got.tolist())) == 6

    def test_loss_equals_the_oracle(self, parts):
        runtime, w, batch = parts
        assert runtime.loss(w, batch) == pytest.approx(
            self.oracle(w.astype(np.float64), batch), rel=self.rtol
        )

    def test_at_scale_zero_every_direction_gives_the_loss(self, parts):
        runtime, w, batch = parts
        got = runtime.losses(w, batch, STREAM, Gaussian(), range(3), 0.0)
        assert got.tolist() == [runtime.loss(w, batch)] * 3

    def test_the_mean_is_taken_in_float64(self, parts):
        """A mean of B float32 numbers lies on a coarse grid; a float64 one of a batch said twice does not."""
        runtime, w, batch = parts
        values = runtime.losses(w, batch, STREAM, Gaussian(), range(8), 0.1)
        assert any(value != float(np.float32(value)) for value in values)

    def test_the_order_of_directions_and_what_was_measured_before_change_nothing(self, parts):
        runtime, w, batch = parts
        order = [5, 0, 3, 3, 1]
        asked = [
            (w, STREAM, Gaussian()),
            (w, Stream(STREAM.seed, STREAM.round + 1), Gaussian()),
            (w, STREAM, Rademacher()),
            (w + np.float32(1), STREAM, Gaussian()),
            (w, STREAM, Gaussian()),
        ]
        for at, stream, kind in asked:
            mixed = runtime.losses(at, batch, stream, kind, order, 0.1)
            straight = self.runtime().losses(at, batch, stream, kind, range(6), 0.1)
            assert mixed.tolist() == straight[order].tolist()

    def test_weights_and_batch_are_left_as_they_were(self, parts):
        runtime, w, batch = parts
        kept = w.copy(), batch.inputs.copy(), batch.targets.copy()
        digest = runtime.frozen_digest
        runtime.losses(w, batch, STREAM, Gaussian(), range(3), 0.1)
        runtime.loss(w, batch)
        for now, then in zip((w, batch.inputs, batch.targets), kept, strict=True):
            np.testing.assert_array_equal(now, then)
        np.testing.assert_array_equal(runtime.weights(), w)
        assert runtime.frozen_digest == digest

    def test_weights_are_a_copy(self, parts):
        runtime, w, _ = parts
        kept = w.copy()
        w += 1
        np.testing.assert_array_equal(runtime.weights(), kept)
        assert kept.dtype == np.float32
        assert kept.shape == (runtime.layout.n,)

    def test_no_direction_is_no_loss(self, parts):
        runtime, w, batch = parts
        assert runtime.losses(w, batch, STREAM, Gaussian(), [], 0.1).shape == (0,)

    @pytest.mark.parametrize("wrong", [lambda w: w[:-1], lambda w: np.append(w, w[:1]), lambda w: w[None]])
    def test_weights_of_another_shape_are_refused(self, parts, wrong: Callable[[NDArray], NDArray]):
        runtime, w, batch = parts
        with pytest.raises(ConfigError):
            runtime.loss(wrong(w), batch)
        with pytest.raises(ConfigError):
            runtime.losses(wrong(w), batch, STREAM, Gaussian(), range(2), 0.1)

    def test_sigma_below_the_arithmetic_is_refused(self, parts):
        runtime = parts[0]
        runtime.check_sigma(1e-4)
        with pytest.raises(PrecisionError, match="float32"):
            runtime.check_sigma(1e-9)

    def test_two_runtimes_of_one_model_agree_on_layout_and_digest(self):
        a, b = self.runtime(), self.runtime()
        assert a.layout == b.layout
        assert a.frozen_digest == b.frozen_digest
        assert len(a.frozen_digest) == 32


class TangentContract(abc.ABC):
    """For runtimes with ``derivatives``: inherit beside RuntimeContract, whose methods it uses."""

    @abc.abstractmethod
    def runtime(self) -> Runtime: ...

    @abc.abstractmethod
    def batch(self) -> Batch: ...

    @abc.abstractmethod
    def oracle(self, weights: NDArray[np.float64], batch: Batch) -> float: ...

    @pytest.mark.parametrize("kind", [Gaussian(), Rademacher(), LowRank(2)], ids=lambda kind: kind.spec)
    def test_derivatives_are_the_limit_of_differences(self, kind: Perturbation):
        runtime, batch = self.runtime(), self.batch()
        assert isinstance(runtime, TangentRuntime)
        w, n = runtime.weights(), runtime.layout.n
        loss, got = runtime.derivatives(w, batch, STREAM, kind, range(6))
        h, exact = 1e-6, w.astype(np.float64)
        want = []
        for k in range(6):
            z = kind.values(STREAM, k, runtime.layout, 0, n).astype(np.float64)
            want.append((self.oracle(exact + h * z, batch) - self.oracle(exact - h * z, batch)) / (2 * h))
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.linalg.norm(want))
        assert loss == pytest.approx(self.oracle(exact, batch), rel=64 * 2.0**-24)

    def test_derivatives_depend_on_their_direction_alone(self):
        runtime, batch = self.runtime(), self.batch()
        w, order = runtime.weights(), [5, 0, 3, 3, 1]
        straight = runtime.derivatives(w, batch, STREAM, Gaussian(), range(6))[1]
        mixed = runtime.derivatives(w, batch, STREAM, Gaussian(), order)[1]
        np.testing.assert_allclose(mixed, straight[order], rtol=0, atol=1e-5 * np.linalg.norm(straight))

    def test_derivatives_leave_weights_and_batch_as_they_were(self):
        runtime, batch = self.runtime(), self.batch()
        w, digest = runtime.weights(), runtime.frozen_digest
        kept = w.copy(), batch.inputs.copy(), batch.targets.copy()
        runtime.derivatives(w, batch, STREAM, Gaussian(), range(3))
        for now, then in zip((w, batch.inputs, batch.targets), kept, strict=True):
            np.testing.assert_array_equal(now, then)
        np.testing.assert_array_equal(runtime.weights(), w)
        assert runtime.frozen_digest == digest

    def test_no_direction_is_no_derivative(self):
        runtime = self.runtime()
        assert runtime.derivatives(runtime.weights(), self.batch(), STREAM, Gaussian(), [])[1].shape == (0,)

    def test_derivatives_at_weights_of_another_shape_are_refused(self):
        runtime = self.runtime()
        with pytest.raises(ConfigError):
            runtime.derivatives(runtime.weights()[:-1], self.batch(), STREAM, Gaussian(), range(2))


class ExampleContract(abc.ABC):
    """For runtimes with ``example_losses``: inherit beside RuntimeContract, whose methods it uses."""

    rtol = RuntimeContract.rtol

    @abc.abstractmethod
    def runtime(self) -> Runtime: ...

    @abc.abstractmethod
    def batch(self) -> Batch: ...

    def alone(self, i: int) -> Batch:
        batch = self.batch()
        return Batch(batch.inputs[i : i + 1], batch.targets[i : i + 1], batch.prefixed)

    @pytest.mark.parametrize("kind", [Gaussian(), Rademacher(), LowRank(2)], ids=lambda kind: kind.spec)
    @pytest.mark.parametrize("scale", [0.1, -0.1])
    def test_losses_of_examples_are_those_of_batches_of_one(self, kind: Perturbation, scale: float):
        runtime, batch = self.runtime(), self.batch()
        assert isinstance(runtime, ExampleRuntime)
        w = runtime.weights()
        got = runtime.example_losses(w, batch, STREAM, kind, range(5), scale)
        want = [
            runtime.losses(w, self.alone(i), STREAM, kind, range(5), scale) for i in range(len(batch.targets))
        ]
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, np.transpose(want), rtol=self.rtol, atol=self.rtol * np.max(want))
        assert len(set(got.ravel().tolist())) == got.size

    @pytest.mark.parametrize("kind", [Gaussian(), LowRank(2)], ids=lambda kind: kind.spec)
    def test_their_mean_is_the_loss_of_the_batch(self, kind: Perturbation):
        runtime, batch = self.runtime(), self.batch()
        assert isinstance(runtime, ExampleRuntime)
        w = runtime.weights()
        got = runtime.example_losses(w, batch, STREAM, kind, range(5), 0.1)
        want = runtime.losses(w, batch, STREAM, kind, range(5), 0.1)
        np.testing.assert_allclose(got.mean(axis=1), want, rtol=self.rtol)
        base = runtime.example_losses(w, batch, STREAM, kind, range(1), 0.0)
        assert base.mean() == pytest.approx(runtime.loss(w, batch), rel=self.rtol)

    def test_losses_of_examples_leave_all_as_it_was(self):
        runtime, batch = self.runtime(), self.batch()
        assert isinstance(runtime, ExampleRuntime)
        w, digest = runtime.weights(), runtime.frozen_digest
        kept = w.copy(), batch.inputs.copy(), batch.targets.copy()
        before = runtime.losses(w, batch, STREAM, Gaussian(), range(3), 0.1)
        first = runtime.example_losses(w, batch, STREAM, Gaussian(), [2, 0], 0.1)
        again = runtime.example_losses(w, batch, STREAM, Gaussian(), range(3), 0.1)
        assert first.tolist() == again[[2, 0]].tolist()
        assert runtime.losses(w, batch, STREAM, Gaussian(), range(3), 0.1).tolist() == before.tolist()
        for now, then in zip((w, batch.inputs, batch.targets), kept, strict=True):
            np.testing.assert_array_equal(now, then)
        assert runtime.frozen_digest == digest

    def test_no_direction_is_no_loss_of_an_example(self):
        runtime, batch = self.runtime(), self.batch()
        assert isinstance(runtime, ExampleRuntime)
        for kind in (Gaussian(), LowRank(2)):
            got = runtime.example_losses(runtime.weights(), batch, STREAM, kind, [], 0.1)
            assert got.shape == (0, len(batch.targets))

    def test_losses_of_examples_at_weights_of_another_shape_are_refused(self):
        runtime = self.runtime()
        assert isinstance(runtime, ExampleRuntime)
        with pytest.raises(ConfigError):
            runtime.example_losses(runtime.weights()[:-1], self.batch(), STREAM, Gaussian(), range(2), 0.1)
