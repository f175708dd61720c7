"""δ(ε) by inverse Laplace transform: independent of every grid of losses, for checks.

With M(z) = E_P[e^{zL}] the moment generating function of the composed privacy loss and any t > 0,

    δ(ε) = E_P[(1 − e^{ε − L})₊] = (1/2πi) ∫_{t−i∞}^{t+i∞} M(z) e^{−zε} / (z(z + 1)) dz,

because the bilateral Laplace transform of (1 − e^{−x})₊ is 1/(z(z + 1)). The integral is evaluated by
the trapezoidal rule along the saddle line, which converges exponentially. The value is *not*
certified; its error is estimated by what the last point still contributes. It shares no step with
`accounting.privacy_loss`, so that the two check one another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .events import REPLACE_ONE
from .terms import Terms

__all__ = ["Inversion", "invert"]

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]

_BLOCK = 1 << 21


@dataclass(frozen=True, eq=False)
class Inversion:
    """Samples of M along a line Re z = t, from which δ at any ε follows.

    Attributes:
        t: The line.
        points: Where the samples are.
        log_moment: The logarithm of each.
        step: From one point to the next.
        relative_error: Of the samples.
    """

    t: float
    points: Complex
    log_moment: Complex
    step: float
    relative_error: float = 1e-12

    @property
    def truncation(self) -> float:
        """Size of the last sample relative to the first: how far the integrand has decayed."""
        return math.exp(min(float((self.log_moment[-1] - self.log_moment[0]).real), 0.0))

    def delta(self, epsilon: float) -> float:
        """Returns δ(ε), accurate where `truncation` is small and ε is near the saddle point."""
        z = self.points
        exponent = self.log_moment - z * epsilon
        peak = float(exponent[0].real)
        values = np.exp(exponent - peak) / (z * (z + 1.0))
        # Half the real line by symmetry; the point on the axis counts half.
        total = float(values.real.sum()) - 0.5 * float(values[0].real)
        return math.exp(peak) * total * self.step / math.pi

    def noise(self, epsilon: float) -> float:
        """Returns an estimate of the rounding error of `delta`, relative to the absolute integrand."""
        z = self.points
        exponent = (self.log_moment - z * epsilon).real
        values = np.exp(exponent) / np.abs(z * (z + 1.0))
        return self.relative_error * float(values.sum()) * self.step / math.pi


def invert(terms: Terms, t: float, *, max_points: int = 16384, seconds: float = 2.0) -> list[Inversion]:
    """Returns one inversion for each direction of the relation.

    Args:
        terms: Gaussian and Poisson-subsampled terms; others are not covered.
        t: The Rényi order minus one that is optimal; the line is a quarter of it.
        max_points: Samples at most.
        seconds: After that, no further points are added; `truncation` tells what is missing.
    """
    directions: Sequence[str] = ("replace",) if terms.relation == REPLACE_ONE else ("remove", "add")
    result = []
    for direction in directions:
        # The rule adds aliases of f(ε) = e^{tε} δ(ε), shifted by multiples of 2π/step: those to the
        # left come with e^{−12π}; those to the right need a line well below the saddle point, so that
        # f falls although the tail of the loss is heavy.
        line = 0.25 * t
        step = line / 6.0
        count = 256
        start = time.perf_counter()
        while True:
            z: Complex = (line + 1j * step * np.arange(count)).astype(np.complex128)
            log_moment: Complex = (0.5 * terms.mu**2 * z * (z + 1.0)).astype(np.complex128)
            for (sigma, q), n in terms.poisson.items():
                log_moment += n * _log_moment(z, sigma, q, direction, terms.group_size)
            # Each step contributes the rounding of its log M, a few ulp.
            relative_error = 1e-12 + 2e-15 * sum(terms.poisson.values())
            inversion = Inversion(line, z, log_moment, step, relative_error)
            # The cost grows with the square of the highest frequency.
            if inversion.truncation < 1e-14 or count >= max_points or time.perf_counter() - start > seconds:
                break
            count *= 2
        result.append(inversion)
    return result


def _log_moment(z: Complex, sigma: float, q: float, direction: str, k: int) -> Complex:
    """log E_P[e^{zL}] of one step (any branch: it is multiplied by whole numbers of steps only)."""
    largest = float(np.abs(z.imag).max())
    t = float(z[0].real)
    # The integrand oscillates with frequency up to kθ/σ² (twice that for replace-one) within e^{−x²/2σ²}.
    h = 0.9 * math.pi / (2.0 * k * largest / sigma**2 + 9.0 / sigma)
    h = min(h, 0.2 * sigma**2 + 0.02 * sigma)
    low, high = -k - 11.0 * sigma, 2.0 * (t + 1.0) * k + 11.0 * sigma
    x = np.arange(low, high, h)
    variance = 2.0 * sigma**2

    def mixture(x: Array) -> Array:
        """log of Σ_j P(J = j) e^{(2jx − j²)/2σ²}, J ~ Binomial(k, q)."""
        total: Array = np.full(len(x), -math.inf)
        for j in range(k + 1):
            weight = math.log(math.comb(k, j)) + j * math.log(q) + (k - j) * math.log1p(-q)
            total = np.logaddexp(total, weight + (2.0 * j * x - j * j) / variance)
        return total

    up = mixture(x)
    base = -x * x / variance + math.log(h / (sigma * math.sqrt(2.0 * math.pi)))
    if direction == "remove":
        loss, base = up, base + up
    elif direction == "add":
        loss = -up
    else:
        down = mixture(-x)
        loss, base = up - down, base + up
    result = np.empty(len(z), dtype=np.complex128)
    rows = max(1, _BLOCK // len(x))
    real = t * loss + base
    peak = float(real.max())
    weight = np.exp(real - peak)
    for start in range(0, len(z), rows):
        block = z.imag[start : start + rows]
        result[start : start + rows] = np.exp(1j * np.multiply.outer(block, loss)) @ weight
    return (np.log(result) + peak).astype(np.complex128)
