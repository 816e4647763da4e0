"""Directions on a torch device: the array operations that they are made with."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from baffle.stream import Lanes


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

    def doubles(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def float32(self, array: Tensor) -> Tensor:
        return array.to(torch.float32)

    def float64(self, array: Tensor) -> Tensor:
        return array.to(torch.float64)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)
