"""Reconstructing images from an upload: by the gradient's direction, and by the slopes themselves.

Two attackers, both told the weights, the seed, the labels and how many examples there are:

- *gradient matching* (Geiping et al., "Inverting gradients", 2020): the images whose gradient has the
  largest cosine with ĝ, under a total variation prior.
- *slope matching*: ĝ is K numbers blown up to n, and all of its error is known: s_k = z_k·∇L(x) are K
  equations for the pixels. They are solved by damped Gauss-Newton steps, under a normal prior fitted on the
  attacker's own images of each class. Here K is held against the number of *pixels*, not of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from baffle.data import Dataset
from baffle.runtimes.torch import TorchRuntime

_TEMPERATURES = 8  # steps in which slope matching comes to trust the slopes
_MORE_STEPS = 4
_USED = 2000  # of the slopes in slope matching: the others would cost time
_TOGETHER = 128  # tangents at a time: bounds memory


@dataclass(frozen=True)
class Upload:
    """What the attacker has of one client: slopes (K,) along rows (K, n), and the gradient made from them.

    ``rows`` None: the exact gradient was uploaded, and the slopes are its n entries. ``error`` is the
    slopes' own error, a standard deviation, as far as the attacker can know it.
    """

    gradient: Tensor
    slopes: Tensor
    rows: Tensor | None
    error: float

    def along(self, gradients: Tensor) -> Tensor:
        """Gradients (..., n) as slopes (..., K)."""
        return gradients if self.rows is None else gradients @ self.rows.T


@dataclass(frozen=True)
class Victim:
    """A network as a function of its inputs; images are flat, (B, pixels), as the network sees them."""

    runtime: TorchRuntime
    shape: tuple[int, int, int]
    low: float
    high: float

    @classmethod
    def of(cls, runtime: TorchRuntime, dataset: Dataset) -> Victim:
        """For data sets of one channel, stored from 0 up."""
        scale, shift = float(dataset.scale[0]), float(dataset.shift[0])
        return cls(runtime, dataset.shape, shift, shift + float(dataset.inputs.max()) * scale)

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """∇L (n,) of the mean loss over images (B, pixels)."""
        parameters = {name: p.detach() for name, p in self.runtime.module.named_parameters()}

        def loss(weights: dict[str, Tensor]) -> Tensor:
            inputs = images.reshape(-1, *self.shape)
            return nn.functional.cross_entropy(
                functional_call(self.runtime.module, weights, (inputs,)), labels
            )

        pieces = grad(loss)(parameters)
        return torch.cat([pieces[name].reshape(-1) for name in self.runtime.layout.names])

    def unit(self, images: Tensor) -> Tensor:
        """Pixels as grey levels in [0, 1], what lies outside cut off."""
        return ((images - self.low) / (self.high - self.low)).clamp(0, 1)


@dataclass(frozen=True)
class Prior:
    """A normal distribution of each class's images: means (classes, pixels), factors (classes, pixels, r)."""

    means: Tensor
    factors: Tensor

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, classes: int, rank: int) -> Prior:
        """From images (N, pixels): the ``rank`` largest principal axes of each class."""
        means, factors = [], []
        for label in range(classes):
            mine = images[labels == label]
            values, axes = torch.linalg.eigh(torch.cov(mine.T) + 1e-3 * torch.eye(images.shape[1]))
            means.append(mine.mean(0))
            factors.append(axes[:, -rank:] * values[-rank:].clamp_min(0).sqrt())
        return cls(torch.stack(means), torch.stack(factors))


def by_gradient(
    victim: Victim, uploads: list[Upload], labels: Tensor, start: Tensor, smooth: float, steps: int
) -> Tensor:
    """Gradient matching for several clients at once: images (m, B, pixels) from labels (m, B).

    1 − cos(∇L(x), ĝ) + smooth · TV(x), by Adam on the gradient's signs as in the paper, from ``start``.
    """
    wanted = nn.functional.normalize(torch.stack([upload.gradient for upload in uploads]), dim=1)
    x = start.clone().requires_grad_()
    width = victim.high - victim.low
    optimizer = torch.optim.Adam([x], lr=0.02 * width)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        found = nn.functional.normalize(vmap(victim.gradient)(x, labels), dim=1)
        pictures = x.reshape(*x.shape[:2], *victim.shape) / width
        rough = pictures.diff(dim=-1).abs().mean((1, 2, 3, 4)) + pictures.diff(dim=-2).abs().mean(
            (1, 2, 3, 4)
        )
        objective = (1 - (found * wanted).sum(1) + smooth * rough).sum()
        (x.grad,) = torch.autograd.grad(objective, x)
        x.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(victim.low, victim.high)
    return x.detach()


def by_slopes(victim: Victim, upload: Upload, labels: Tensor, prior: Prior) -> Tensor:
    """Slope matching for one client: images (B, pixels), x = μ + F c with c standard normal a priori.

    From the first 2,000 slopes. Minimises ‖s(x) − s‖²/τ² + ‖c‖² while τ falls from half of the slopes'
    size to their error. Cost of a step: a gradient for each of the B·r unknowns, and their products with z_k.
    """
    count, rank = len(labels), prior.factors.shape[2]
    means, factors = prior.means[labels], prior.factors[labels]
    if upload.rows is not None:
        upload = replace(upload, slopes=upload.slopes[:_USED], rows=upload.rows[:_USED])
    target = upload.slopes.double()

    def images(c: Tensor) -> Tensor:
        return means + torch.einsum("bpr,br->bp", factors, c.reshape(count, rank))

    def slopes(c: Tensor) -> Tensor:
        return upload.along(victim.gradient(images(c), labels)).double()

    def jacobian(c: Tensor) -> Tensor:
        """(B·r, K): example by example, for each moves only its own part of the gradient."""
        parts = []
        for x, f, label in zip(images(c), factors, labels, strict=True):
            one = label[None]
            moved = vmap(
                lambda v, x=x, one=one: jvp(lambda u: victim.gradient(u[None], one), (x,), (v,))[1],
                chunk_size=_TOGETHER,
            )
            parts.append(upload.along(moved(f.T.contiguous())) / count)
        return torch.cat(parts)

    size = float(target.square().mean().sqrt())
    first = max(0.5 * size, upload.error)
    falling = np.geomspace(first, upload.error, _TEMPERATURES).tolist()
    c = torch.zeros(count * rank)
    found = slopes(c)
    for tau in [*falling, *(_MORE_STEPS * [upload.error])]:
        j = jacobian(c)
        hessian = (j @ j.T).double() / tau**2 + torch.eye(len(c), dtype=torch.float64)
        pull = j.double() @ (target - found) / tau**2 - c.double()
        step = torch.linalg.solve(hessian, pull).float()
        before = float(((found - target) ** 2).sum() / tau**2 + (c**2).sum())
        length = 1.0
        while length > 1e-3:
            other = c + length * step
            there = slopes(other)
            if float(((there - target) ** 2).sum() / tau**2 + (other**2).sum()) < before:
                c, found = other, there
                break
            length /= 2
    return images(c)


def error(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared error of pictures (..., pixels) with grey levels in [0, 1]."""
    return (one - other).square().mean(-1)


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal to noise in dB, 80 at most: beyond, errors are rounding."""
    return (-10 * error(one, other).clamp_min(1e-8).log10()).clamp_max(80.0)


def ssim(one: Tensor, other: Tensor, side: int) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pictures (..., side²), over 7 × 7 windows."""

    def local(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, min(7, side), 1)

    a, b = (x.reshape(-1, 1, side, side) for x in (one, other))
    ma, mb = local(a), local(b)
    va, vb, ab = local(a * a) - ma * ma, local(b * b) - mb * mb, local(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * ma * mb + c1) * (2 * ab + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return value.mean((1, 2, 3)).reshape(one.shape[:-1])
