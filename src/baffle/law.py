"""The exact law of the estimate: K Gaussian directions at the price of one backward pass.

For Gaussian z and σ → 0, given the true gradient g and u = g/‖g‖,

    ĝ  =  (‖g‖/K) · ( a u + √a (I − u uᵀ) ξ ),     a ~ χ²_K,  ξ ~ N(0, I_n)

has the distribution of the estimate from K forward (or central) differences: with s_k = z_k·g, the part
along u is Σ (z_k·u)² ~ χ²_K, and across u it is a sum of K independent normal vectors weighted with
z_k·u. A shortcut of the simulator, never of a client; whatever it makes says ``fidelity = "law"``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from baffle.errors import ConfigError


def sample_estimate(
    gradient: NDArray[np.float32], directions: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """One draw of ĝ (n,) float32 given the true gradient (n,). Cost: O(n), whatever K is."""
    if directions < 1:
        raise ConfigError(f"K = {directions}: the number of directions is at least 1")
    u = gradient.astype(np.float64)
    norm = float(np.linalg.norm(u))
    if norm == 0.0:
        return np.zeros_like(gradient)
    u /= norm
    a = float(rng.chisquare(directions))
    xi = rng.standard_normal(len(u))
    # The formula from the inside out, in place: of n = 3.5e6, fresh arrays cost as much as the draw.
    xi -= u * float(u @ xi)
    xi *= np.sqrt(a)
    u *= a
    u += xi
    u *= norm / directions
    result: NDArray[np.float32] = u.astype(np.float32)
    return result


def generator(seed: bytes) -> np.random.Generator:
    """The generator that a 32-byte derived seed stands for; no global state."""
    return np.random.Generator(np.random.PCG64(np.frombuffer(seed, dtype=np.uint32).tolist()))
