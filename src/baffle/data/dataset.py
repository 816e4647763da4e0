"""A labelled image set in memory: raw pixels, and the affine map that a model sees them through.

Pixels stay in their stored type (uint8 for every set that is read from files), and are normalised a
batch at a time: a quarter of the memory, and what is on disk can still be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from baffle.errors import ConfigError, DataError
from baffle.runtimes import Batch

_CHUNK = 4096  # images resized at once: bounds the float32 copy


@dataclass(frozen=True, eq=False)
class Dataset:
    """N labelled images (C, H, W), of which a model sees ``inputs * scale[c] + shift[c]``.

    ``inputs`` (N, C, H, W) uint8 or float32, ``targets`` (N,) int64 indices into ``classes``,
    ``scale`` and ``shift`` (C,) float32 (see `normalisation`). ``domains`` (N,) int64 indices into
    ``domain_names``, or None where the set has no domains.

    Raises DataError where the lengths differ, a label has no class, a number is not finite, or there
    are no samples.
    """

    inputs: NDArray[np.generic] = field(repr=False)
    targets: NDArray[np.int64] = field(repr=False)
    classes: tuple[str, ...]
    name: str
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    domains: NDArray[np.int64] | None = field(default=None, repr=False)
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.inputs.ndim != 4 or self.inputs.dtype not in (np.uint8, np.float32):
            raise DataError(
                f"{self.name}: images must be (N, C, H, W) uint8 or float32, not "
                f"{self.inputs.shape} {self.inputs.dtype}"
            )
        if self.inputs.size == 0:
            raise DataError(f"{self.name}: holds no samples (images {self.inputs.shape})")
        self._check_labels("label", self.targets, self.classes)
        if self.domains is not None:
            self._check_labels("domain", self.domains, self.domain_names)
        for what, values in (("scale", self.scale), ("shift", self.shift)):
            if values.shape != self.inputs.shape[1:2] or values.dtype != np.float32:
                raise DataError(
                    f"{self.name}: {what} must be float32, one value for each of the "
                    f"{self.inputs.shape[1]} channels, not {values.shape} {values.dtype}"
                )
            if not np.isfinite(values).all():
                raise DataError(f"{self.name}: {what} is not finite")
        if self.inputs.dtype == np.float32 and not np.isfinite(self.inputs).all():
            raise DataError(f"{self.name}: the images hold NaN or infinite values")

    def _check_labels(self, what: str, labels: NDArray[np.int64], names: tuple[str, ...]) -> None:
        if labels.dtype != np.int64 or labels.shape != self.inputs.shape[:1]:
            raise DataError(
                f"{self.name}: {len(self.inputs)} images need as many int64 {what}s, not "
                f"{labels.shape} {labels.dtype}"
            )
        if labels.min() < 0 or labels.max() >= len(names):
            raise DataError(
                f"{self.name}: {what}s run from {labels.min()} to {labels.max()}, but there are "
                f"names for 0 to {len(names) - 1}"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, channels, height, width = self.inputs.shape
        return channels, height, width

    def batch(self, indices: ArrayLike | slice) -> Batch:
        """Normalised float32 images (B, C, H, W) and int64 labels (B,) of the chosen samples."""
        chosen = indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.int64)
        inputs = self.inputs[chosen].astype(np.float32)
        inputs *= self.scale[:, None, None]
        inputs += self.shift[:, None, None]
        return Batch(inputs, self.targets[chosen])

    def subset(self, indices: ArrayLike | slice) -> Dataset:
        """The chosen samples, in the order given. A slice gives views, indices give copies."""
        chosen = indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            inputs=self.inputs[chosen],
            targets=self.targets[chosen],
            domains=None if self.domains is None else self.domains[chosen],
        )

    def padded(self, size: int) -> Dataset:
        """Images centred on a ``size`` × ``size`` black ground, 28×28 to 32×32 for example.

        Raises ConfigError where ``size`` is smaller than the images.
        """
        _, height, width = self.shape
        if size < max(height, width):
            raise ConfigError(
                f"{self.name}: images of {height}x{width} cannot be padded to {size}x{size}; "
                f"choose size >= {max(height, width)}, or resize"
            )
        top, left = (size - height) // 2, (size - width) // 2
        rows, columns = (top, size - height - top), (left, size - width - left)
        return replace(self, inputs=np.pad(self.inputs, ((0, 0), (0, 0), rows, columns)))

    def resized(self, size: int) -> Dataset:
        """Images stretched or shrunk to ``size`` × ``size``: bilinear, antialiased when shrinking.

        Raises ConfigError where ``size`` is not positive.
        """
        if size < 1:
            raise ConfigError(f"{self.name}: size must be at least 1, not {size}")
        _, height, width = self.shape
        rows, columns = _triangle(height, size), _triangle(width, size)
        inputs = np.empty((*self.inputs.shape[:2], size, size), self.inputs.dtype)
        for start in range(0, len(self), _CHUNK):
            part = rows @ self.inputs[start : start + _CHUNK].astype(np.float32) @ columns.T
            if inputs.dtype == np.uint8:
                part = np.rint(part)  # weights are ≥ 0 and sum to 1: no value leaves 0..255
            inputs[start : start + _CHUNK] = part
        return replace(self, inputs=inputs)


def normalisation(
    mean: Sequence[float], std: Sequence[float], peak: float = 255.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The scale and shift (C,) that turn a grey level x of 0..peak into (x/peak - mean) / std."""
    centre, spread = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return (1 / (peak * spread)).astype(np.float32), (-centre / spread).astype(np.float32)


def _triangle(old: int, new: int) -> NDArray[np.float32]:
    """Weights (new, old) of linear interpolation, over a window as wide as the shrinking asks."""
    ratio = old / new
    centres = (np.arange(new) + 0.5) * ratio
    distance = np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(ratio, 1.0)
    weights: NDArray[np.float64] = np.clip(1 - distance, 0, None)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)
