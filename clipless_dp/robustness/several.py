"""Certificates from draws under several Gaussian noises: what is known of a classifier besides one mean.

Let ``q_i = N(0, σ_i²I)``, and ``l_i ≤ ∫hq_i ≤ u_i`` for a function ``h`` with values in [0, 1]. For all real ``k_i``,

    h̃_0(x + δ) ≥ Σ (k_i⁺l_i - k_i⁻u_i) - ∫ (Σ k_iq_i - q_0(· - δ))₊,

since ``h·f ≤ f₊``: weak duality. docs/robustness.md has the proof, of the radius too. Two noises are Li et al. 2022,
*Double sampling randomized smoothing*; the integral is bounded from above here, and not estimated, so that the result
holds for whatever multipliers an optimizer returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import chdtr, ndtr, ndtri
from scipy.stats import chi2
from torch import Tensor

from clipless_dp.arguments import members, not_negative, positive, share, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.robustness import confidence, ramps
from clipless_dp.robustness.confidence import Array
from clipless_dp.robustness.draws import Draws, SmoothedCertificate
from clipless_dp.robustness.frozen import Frozen
from clipless_dp.robustness.networks import read
from clipless_dp.robustness.smoothing import Smoothed, draw_from
from clipless_dp.training import Data

_FAR = 7.5
"""Deviations that the cells reach to; what lies outside counts at its mass."""

_CELLS = 240
"""Along the move, and across it for each noise; what is given away falls with the square of their number."""

_LARGEST = 1e6
"""A multiplier; products of it with ratios of densities up to 1e300 are finite."""

_GIVEN_AWAY = 1e-4
"""What the bound of the integral exceeds it by is about this in terms of multipliers, which a search for them minds."""

_ROUNDING = 2.0**-44
"""Covers what a normal or chi-square probability errs by in float64, absolutely, and an exponential, relatively."""

_STEP = 1e-3
"""Of ``σ_0``: a search ends where it gains less."""

_MOST_STEPS = 40


class _Cells:
    """Space in cells ``{t_j ≤ ⟨z, δ⟩/‖δ‖ ≤ t_{j+1}, w_k ≤ ‖z⊥‖² ≤ w_{k+1}}``, with their masses rounded both ways.

    Attributes:
        lower, upper: ``(m, J, K)`` bounds of ``q_i(C)``.
        moved_lower, moved_upper: ``(J, K)`` bounds of the mass of ``q_0(· - δ)``.
        least, most: ``(m, J, K)`` bounds of ``q_i/q_0 = exp(d·ln(σ_0/σ_i) + ½(σ_0⁻² - σ_i⁻²)‖z‖²)`` within a cell.
        front_least, front_most: ``(J, 1)`` of ``q_0/q_0(· - δ) = exp(r(r/2 - t)/σ_0²)``.
        outside: ``(m,)`` upper bounds of the mass of ``q_i`` outside all cells.
    """

    def __init__(self, sigmas: Sequence[float], dimension: int, radius: float) -> None:
        first, widest = sigmas[0], max(sigmas)
        along = np.linspace(-_FAR * widest, max(_FAR * widest, radius + _FAR * first), _CELLS + 1)
        across = np.zeros(2)
        if dimension > 1:
            tails = ndtr(np.linspace(-_FAR, 0.0, _CELLS // 2 + 1))
            nodes = np.concatenate([chi2.ppf(tails, dimension - 1), chi2.isf(tails, dimension - 1)])
            across = np.unique(np.concatenate([sigma**2 * nodes for sigma in sigmas]))
        found = [_masses(along / sigma, across / sigma**2, dimension) for sigma in sigmas]
        self.lower, self.upper = np.stack([one[0] for one in found]), np.stack([one[1] for one in found])
        self.outside = np.array([one[2] for one in found])
        self.moved_lower, self.moved_upper, _ = _masses((along - radius) / first, across / first**2, dimension)
        squares = along**2
        nearest = np.where(along[:-1] * along[1:] < 0.0, 0.0, np.minimum(squares[:-1], squares[1:]))
        near = nearest[:, None] + across[:-1]
        far = np.maximum(squares[:-1], squares[1:])[:, None] + across[1:]
        ratios = []
        for sigma in sigmas:
            curved, constant = 0.5 * (1.0 / first**2 - 1.0 / sigma**2), dimension * math.log(first / sigma)
            ends = np.sort(np.stack([constant + curved * near, constant + curved * far]), 0)
            ratios.append(_exponentials(ends[0], ends[1], 1.0 + abs(constant) + abs(curved) * float(far.max())))
        self.least, self.most = np.stack([one[0] for one in ratios]), np.stack([one[1] for one in ratios])
        falling = (0.5 * radius - along) * (radius / first**2)
        size = 1.0 + float(np.abs(falling).max()) + (radius / first) ** 2
        self.front_least, self.front_most = (one[:, None] for one in _exponentials(falling[1:], falling[:-1], size))

    def integral(self, multipliers: Array) -> float:
        """An upper bound of ``∫ (Σ k_iq_i - q_0(· - δ))₊``.

        With ``p = q_0(· - δ)`` and ``ρ = Σ k_iq_i/p`` between ``m`` and ``M`` on a cell, the integrand is ``p(ρ -
        1)₊``, which lies below its chord, ``p(ρ - m)(M - 1)/(M - m)`` where ``m ≤ 1 ≤ M``. It is also at most ``Σ
        k_i⁺q_i``, which is what counts outside all cells.
        """
        least, most = np.zeros_like(self.moved_lower), np.zeros_like(self.moved_lower)
        mass, positive = np.zeros_like(least), np.zeros_like(least)
        beyond = 0.0
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            for i, k in enumerate(multipliers.tolist()):
                if k > 0.0:
                    least, most = least + k * self.least[i], most + k * self.most[i]
                    mass, positive = mass + k * self.upper[i], positive + k * self.upper[i]
                    beyond += k * float(self.outside[i])
                elif k < 0.0:
                    least, most = least + k * self.most[i], most + k * self.least[i]
                    mass = mass + k * self.lower[i]
            least = least * np.where(least > 0.0, self.front_least, self.front_most)
            most = most * np.where(most > 0.0, self.front_most, self.front_least)
            # Cells of one sign take their whole mass, or none.
            least = np.minimum(least, 1.0)
            share_above = np.where(most == np.inf, 1.0, (most - 1.0) / (most - least))
            moved = np.where(least > 0.0, self.moved_lower, self.moved_upper)
            chord = share_above * (mass - least * moved)
        chord = np.where(most <= 1.0, 0.0, np.where(np.isnan(chord), np.inf, chord))
        total = float(np.minimum(chord, positive).clip(min=0.0).sum()) + beyond
        return total * (1.0 + 2.0**-40) + _ROUNDING * (1.0 + float(np.abs(multipliers).sum()))


def _masses(along: Array, across: Array, dimension: int) -> tuple[Array, Array, float]:
    """Bounds of the masses of cells under a standard normal distribution, and of what is outside all of them."""
    first = np.diff(ndtr(along))
    second = np.diff(chdtr(dimension - 1, across)) if dimension > 1 else np.ones(1)
    # A chi-square probability moves by some √d times what its argument is off by, relatively.
    error = _ROUNDING + 2.0**-50 * math.sqrt(dimension)
    lower = np.outer((first - _ROUNDING).clip(min=0.0), (second - error).clip(min=0.0)) * (1.0 - 2.0**-46)
    upper = np.outer(first + _ROUNDING, second + error) * (1.0 + 2.0**-46)
    inside = (float(first.sum()) - _ROUNDING) * (float(second.sum()) - error)
    return lower, upper, max(0.0, 1.0 - inside) + _ROUNDING


def _exponentials(low: Array, high: Array, size: float) -> tuple[Array, Array]:
    """Bounds of ``exp`` of what lies between two bounds, which err by some ulp of a size."""
    error = _ROUNDING + 2.0**-48 * size
    with np.errstate(over="ignore"):
        return np.exp(low - error).clip(max=1e300), np.exp(high + error)


def _dual(multipliers: Array, lower: Array, upper: Array, cells: _Cells) -> float:
    """The bound that these multipliers give, rounded down."""
    known = float(np.where(multipliers > 0.0, multipliers * lower, multipliers * upper).sum())
    return known - cells.integral(multipliers)


def _multipliers(lower: Array, upper: Array, cells: _Cells, start: Array) -> Array:
    """Near the best ones: of the same problem with functions that are constant on each cell, which is concave."""
    count = len(lower)
    masses = (0.5 * (cells.lower + cells.upper)).reshape(count, -1)
    moved = (0.5 * (cells.moved_lower + cells.moved_upper)).ravel()
    gains = np.concatenate([lower, -upper]) - _GIVEN_AWAY

    def loss(parts: Array) -> tuple[float, Array]:
        excess = (parts[:count] - parts[count:]) @ masses - moved
        above = excess > 0.0
        taken = masses @ above
        return float(excess @ above - gains @ parts), np.concatenate([taken, -taken]) - gains

    begin = np.concatenate([start, -start]).clip(0.0, _LARGEST)
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=[(0.0, _LARGEST)] * (2 * count))
    parts: Array = found.x[:count] - found.x[count:]
    return parts


def lower_bound(
    lower: Sequence[float],
    upper: Sequence[float],
    radius: float,
    *,
    sigmas: Sequence[float],
    dimension: int,
    multipliers: Sequence[float] | None = None,
) -> float:
    """The least that the smoothed mean under the first noise can be at a distance, rounded down.

    Args:
        lower: ``l_i``, bounds of the means under each noise at the centre, of a function within [0, 1].
        upper: ``u_i``, likewise.
        radius: ``r``, the distance, at least 0.
        sigmas: ``σ_i``.
        dimension: ``d``, of the inputs that noise is added to.
        multipliers: ``k_i``, of either sign; ``None``: the best that a search finds.

    Raises:
        ConfigurationError: an argument is out of range, or there are not as many of the one as of the other.
    """
    sigmas = [positive("sigmas", sigma) for sigma in sigmas]
    below = np.array([share("lower", one, "[0, 1]") for one in lower])
    above = np.array([share("upper", one, "[0, 1]") for one in upper])
    given = None if multipliers is None else np.array(multipliers, dtype=np.float64)
    if not len(sigmas) == len(below) == len(above) == (len(sigmas) if given is None else len(given)) or not sigmas:
        raise ConfigurationError("give a lower and an upper bound, and a multiplier, for each of sigmas")
    if bool((below > above).any()) or not (given is None or bool((np.abs(given) <= _LARGEST).all())):
        raise ConfigurationError(f"lower must be at most upper, and multipliers at most {_LARGEST:g} in size")
    found = _Search(below, above, sigmas, whole("dimension", dimension)).bound(not_negative("radius", radius), given)
    return min(max(found, 0.0), 1.0)


class _Search:
    """Bounds of one function at several distances."""

    def __init__(self, lower: Array, upper: Array, sigmas: Sequence[float], dimension: int) -> None:
        self.lower, self.upper, self.sigmas, self.dimension = lower, upper, sigmas, dimension
        self.start: Array | None = None

    def bound(self, radius: float, given: Array | None = None) -> float:
        cells = _Cells(self.sigmas, self.dimension, radius)
        if given is not None:
            return _dual(given, self.lower, self.upper, cells)
        alone = np.zeros(len(self.sigmas))
        # What is best for the first noise alone: the likelihood ratio at its quantile.
        ratio = radius / self.sigmas[0]
        alone[0] = math.exp(min(ratio * float(ndtri(min(self.lower[0], 1.0 - 1e-12))) - 0.5 * ratio**2, 13.0))
        start = alone if self.start is None else self.start
        found = _multipliers(self.lower, self.upper, cells, start)
        self.start = found
        return max(_dual(one, self.lower, self.upper, cells) for one in (found, alone))

    def radius(self) -> float:
        """From Cohen's radius on: at a distance ``r`` where the mean is at least ``V``, ``r + σ_0Φ⁻¹(V)`` holds."""
        first = self.sigmas[0]
        radius = float(ramps.radii(self.lower[:1], None, first)[0])
        for _ in range(_MOST_STEPS if radius > 0.0 else 0):
            step = first * float(ndtri(min(self.bound(radius), 1.0 - 1e-12) - _ROUNDING)) * (1.0 - 2.0**-40)
            # Not a number where the bound is below 0.
            if not step > _STEP * first:
                break
            radius = (radius + step) * (1.0 - 2.0**-50)
        return radius


def _bounds(counts: Array, draws: int, alpha: float) -> tuple[Array, Array]:
    """Bounds of all means that hold together at ``1 - α``; of the first noise none from above, which gains nothing.

    Args:
        counts: ``(N, m)``.
        draws: ``n``, under each noise.
        alpha: of all ``2m - 1`` together.
    """
    each = confidence.split(alpha, 2 * counts.shape[1] - 1)
    lower = confidence.clopper_pearson_lower(counts, draws, each)
    upper = confidence.clopper_pearson_upper(counts, draws, each)
    upper[:, 0] = 1.0
    return lower, upper


def certify(
    several: Sequence[Smoothed],
    data: Data | Tensor,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 1e-3,
    *,
    rng_seed: int = 0,
    batch_size: int = 4096,
    progress: bool = False,
) -> SmoothedCertificate:
    """Radii of the first of several smoothed classifiers, from draws under the noises of all of them.

    Never below :meth:`Smoothed.certify`'s at ``α/(2m - 1)``, of ``m`` noises. It is longer where the region of a class
    is bounded in many directions, as a ball is, and slightly shorter than at the whole ``α`` where it is nearly a
    half-space. Deviations should be within some ``σ_0/√d`` of the first: further off, spheres of noise hardly meet.
    Each sample takes about half a second beside its ``m(n0 + n)`` passes.

    Args:
        several: two or more of one model, front and units, which differ in ``σ``, with ``map="argmax"``. The
            classifier that is certified is the first; the noises are to be fixed before an input is looked at.
        data, n0, n, rng_seed, batch_size, progress: see :meth:`Smoothed.certify`; the draws are under each noise.
        alpha: with which probability each radius may be wrong.

    Raises:
        ConfigurationError: an argument is out of range, or the classifiers do not fit each other.
        InputError: the data does not fit.
    """
    confidence.confidence_of(alpha)
    several = members("several", several, "smoothed classifiers")
    _refuse_other(several)
    inputs, labels = read(data)
    given: Data | Tensor = inputs if labels is None else (inputs, labels)
    arguments = {"rng_seed": rng_seed, "batch_size": batch_size, "progress": progress}
    # One network under all noises. The same seed and numbers: what selects a class is independent of what bounds its
    # means, under whichever noise.
    frozen = Frozen(several[0].model, several[0].front)
    drawn = [draw_from(one, frozen, given, n0, n, **arguments) for one in several]
    return _certified(drawn, [one.sigma for one in several], inputs[0].numel(), alpha)


def _certified(drawn: Sequence[Draws], sigmas: Sequence[float], dimension: int, alpha: float) -> SmoothedCertificate:
    first = drawn[0]
    chosen = first.selection.argmax(1, keepdim=True)
    lower, upper = _bounds(torch.cat([one.sums.gather(1, chosen) for one in drawn], 1).numpy(), first.n, alpha)
    dropped = torch.stack([one.dropped for one in drawn]).any(0)
    lower[dropped.numpy()], upper[dropped.numpy()] = 0.0, 1.0
    known: dict[tuple[bytes, bytes], float] = {}
    for low, high in zip(lower, upper, strict=True):
        if (key := (low.tobytes(), high.tobytes())) not in known:
            known[key] = _Search(low, high, sigmas, dimension).radius()
    found = [known[low.tobytes(), high.tobytes()] for low, high in zip(lower, upper, strict=True)]
    radii = torch.tensor(found, dtype=torch.float64) * (first.scale * (1.0 - 2.0**-52))
    return replace(
        first.certify(alpha, "cohen"),
        radii=radii,
        predictions=chosen[:, 0].masked_fill(radii == 0.0, -1),
        kind=f"several noises, with draws under deviations {', '.join(f'{sigma:g}' for sigma in sigmas)}",
        lower=torch.from_numpy(lower[:, 0].copy()),
        upper=torch.from_numpy(1.0 - lower[:, 0]),
        dropped=int(dropped.sum()),
    )


def _refuse_other(several: Sequence[Smoothed]) -> None:
    if len(several) < 2 or not all(isinstance(one, Smoothed) for one in several):
        raise ConfigurationError("give two smoothed classifiers or more, which differ in sigma")
    first = several[0]
    for one in several:
        alike = (type(one) is Smoothed, one.model is first.model, one.front is first.front, one.units is first.units)
        if not all(alike) or one.map != "argmax":
            raise ConfigurationError(
                "several noises are of one model, front and units, and count predictions: make each "
                "Smoothed(model, sigma) of the same objects, with map='argmax'"
            )
    if len({one.sigma for one in several}) < len(several):
        raise ConfigurationError("two of the noises have the same sigma: draw more of the one instead, by n")
