"""Certified supremum of the symbol of a convolution: a small matrix for each frequency."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clipless_dp.norms.budget import Effort
from clipless_dp.norms.dense import matrix_norm_bound
from clipless_dp.norms.deviations import single_deviations_serve, single_extremes, single_rounding
from clipless_dp.norms.eigenvalue import largest_eigenvalue_bound
from clipless_dp.norms.rounding import certified_arithmetic, enlarge, gamma, product_error

_CHUNK_ENTRIES = 1 << 17
"""Complex entries of Gram matrices held at once: 2 MiB, about a core's cache."""

_SINGLE_ENTRIES = 1 << 19
"""The same of float32 ones, which are formed once and factorised twice."""

_CACHED_ENTRIES = 1 << 16
"""Entries of phases, half a MiB for each of sine and cosine, that are kept for the next step."""

_COARSE_FROM = 24
"""Rows from which a coarse grid is worth looking for: fewer are certified at all frequencies as fast."""

_SINGLE_FROM = 160
"""Rows from which float32 factorisations at all frequencies take less time than float64 ones, half of it at 256."""

_DENSITIES = (4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0)
"""Points of a coarse grid for each tap but one."""

_WORTH = 0.7
"""Share of the frequencies that a coarse grid may have, each of which is certified twice."""

_SPREAD = 5.0
"""Root mean squares that the eigenvalues of a random Hermitian matrix span, and a little more."""

_PAIRED_TAPS, _PAIRED_ROWS = 25, 512
"""Taps, and rows times taps, up to which all products of two taps cost less than a product for each difference."""


def symbol_norm_bound(kernel: Tensor, torus: tuple[int | None, int | None], effort: Effort) -> float:
    """Upper bound of the operator norm of stride-1 circular convolutions, or of all image sizes at once.

    Args:
        kernel: Float64, shape (groups, out, in, taps, taps), entries at most 1 in size.
        torus: Pixels per axis of the circle; None for the supremum over all frequencies, hence all sizes.
        effort: What the bound may cost.

    Returns:
        A bound of `sup_ω ‖K̂(ω)‖` with `K̂(ω) = Σ_t K_t e^{iω·t}` over the torus's frequencies (or over all
        of them), the largest over the groups; 0.0 for a zero or empty kernel.

    Formula: the Fourier transform turns a circular convolution into one matrix per frequency `2πj/q`, so
    its norm is the largest of theirs. The Gram matrices are evaluated as trigonometric polynomials of their
    own, `K̂K̂ᴴ(ω) = C_0 + Σ_δ (C_δ + C_δᵀ)cos(ω·δ) + i(C_δ - C_δᵀ)sin(ω·δ)` over half of the differences
    `δ`, with `C_δ = Σ_t K_{t+δ}K_tᵀ` (or `K_{t+δ}ᵀK_t`, on the smaller side); `K̂(-ω)` is the conjugate of
    `K̂(ω)`, so half of the frequencies suffice. Where the axis has more frequencies than a grid of M would
    cost, the grid's maximum is divided by `cos(π(T-1)/(2M))` per axis, T being the number of taps.

    Source: H. Sedghi, V. Gupta and P. Long, "The singular values of convolutional layers", ICLR 2019,
    Theorem 6, for the symbol; M. Riesz, "Eine trigonometrische Interpolationsformel und einige
    Ungleichungen für Polynome", Jahresbericht der DMV 23 (1914), for the grid.

    Guarantee: *Grid.* Let `S = sup‖K̂‖`, attained at `ω*` with unit vectors u, v; fix all axes but one.
    Times a unit phase and centred, `u*K̂v` is a trigonometric sum of frequencies within ±m, `m = (T-1)/2`,
    on that axis, and its real part f is bounded by S and equals S at `ω*`. The Bernstein–Szegő inequality
    `f'² + m²f² ≤ m²S²` says that `arccos(f/S)` changes by at most m per unit, so `f(ω*+h) ≥ S·cos(mh)`
    while `m|h| ≤ π/2`, and some grid point has `|h| ≤ π/M`. The same argument on the next axis starts from
    that value. *Rounding.* The phases are found from exact integers modulo the grid and are good to 24u, if
    the library's cosine is within 4 units in the last place. With n products in each entry of `C_δ` and D
    differences, each entry of the computed Gram matrix errs by at most `8(n+D+16)u·Σ_{t,s}|K_t||K_s|ᵀ`,
    whose operator norm is at most `8(n+D+16)u·(Σ_t‖K_t‖_F)² ≤ 8(n+D+16)u·T·‖K‖_F²`, T counting all taps.
    """
    if kernel.numel() == 0 or not bool(kernel.any()):
        return 0.0
    taps = (kernel.shape[-2], kernel.shape[-1])
    if taps == (1, 1):
        return matrix_norm_bound(kernel[..., 0, 0], effort)
    grid_high, factor_high = _grid(taps[0], torus[0], effort)
    grid_wide, factor_wide = _grid(taps[1], torus[1], effort)
    with certified_arithmetic(kernel):
        if kernel.shape[1] > kernel.shape[2]:
            kernel = kernel.transpose(1, 2)
        rows, columns = kernel.shape[1:3]
        correlations = _correlations(kernel)
        count = taps[0] * taps[1]
        squares = float(kernel.square().flatten(1).sum(-1).max()) * (1.0 + gamma(kernel[0].numel()))
        error = gamma(columns * count + correlations.shape[1] + 16) * count * squares
        even = (correlations + correlations.mT).flatten(2)
        even[:, 0] *= 0.5
        odd = (correlations - correlations.mT).flatten(2)
        searched = rows >= _COARSE_FROM and effort.between > 0.0
        coarse = _coarse_grid(correlations, taps, grid_high * grid_wide, effort) if searched else None
        if coarse is not None:
            found = _between_frequencies(even, odd, coarse, taps, effort, error)
            if found is not None:
                return enlarge(math.sqrt(found), 8)
        bound = 0.0
        grid = (grid_high, grid_wide)
        if _single_at_all(rows, effort) and single_deviations_serve(rows, kernel.device):
            batches, centre, lost = _deviations(even, odd, grid, taps, error)
            (above,) = single_extremes(batches, 2.0 * effort.tolerance * centre, (1.0,))
            bound = centre + above + lost
        else:
            for grams in _grams(even, odd, grid, taps):
                bound = largest_eigenvalue_bound(grams, effort, bound)
    return enlarge(math.sqrt(enlarge(bound + error)) * factor_high * factor_wide, 8)


def _grams(even: Tensor, odd: Tensor, grid: tuple[int, int], taps: tuple[int, int]) -> Iterator[Tensor]:
    """The Gram matrices at one of each pair ±ω of frequencies of a grid, some at a time: ``(count, rows, rows)``."""
    groups, _, entries = even.shape
    rows = math.isqrt(entries)
    chunk = max(1, (_CHUNK_ENTRIES if even.dtype == torch.float64 else _SINGLE_ENTRIES) // (groups * entries))
    for cosine, sine in _phases(*grid, taps, chunk, even.device):
        real, imaginary = cosine.to(even.dtype) @ even, sine.to(even.dtype) @ odd
        grams = torch.complex(real, imaginary) if rows > 1 else real
        yield grams.reshape(-1, rows, rows)


def _coarse_grid(
    correlations: Tensor, taps: tuple[int, int], frequencies: int, effort: Effort
) -> tuple[int, int] | None:
    """The coarsest grid on which :func:`_between_frequencies` should be as tight as it must; ``None`` for none.

    Eigenvalues of nearly orthogonal kernels lie around their mean as those of random matrices do, within about two root
    mean squares: a guess, by Parseval's identity, that certifies nothing.
    """
    groups, _, rows, _ = correlations.shape
    mean = float(correlations[:, 0].diagonal(dim1=1, dim2=2).mean())
    squares = 2.0 * correlations.square().sum() - correlations[:, 0].square().sum()
    variance = float(squares) / (groups * rows) - mean**2
    spread = _SPREAD * math.sqrt(max(variance, 0.0))
    for density in _DENSITIES:
        grid = tuple(max(1, math.ceil(density * (count - 1))) for count in taps)
        if 2.0 * math.prod(grid) > _WORTH * frequencies:
            return None
        share = _share_between(taps, grid)
        if share * spread <= effort.between * mean:
            return grid[0], grid[1]
    return None


def _share_between(taps: tuple[int, int], grid: Sequence[int]) -> float:
    """By which share of what eigenvalues on a grid span those between its points may pass the largest of them."""
    product = 1.0
    for count, points in zip(taps, grid, strict=True):
        product *= 0.5 * (1.0 + math.cos(math.pi * (count - 1) / points))
    return enlarge((1.0 - product) / (2.0 * product - 1.0), 32)


def _between_frequencies(
    even: Tensor, odd: Tensor, grid: tuple[int, int], taps: tuple[int, int], effort: Effort, error: float
) -> float | None:
    """Upper bound of the eigenvalues of all Gram matrices, from the largest and the smallest ones on a coarse grid.

    Args:
        even: symmetric parts of the coefficients, ``(groups, differences, rows·rows)``.
        odd: skew-symmetric ones.
        grid: its points on each axis, more than twice the taps but one.
        taps: of the kernel.
        effort: what it may cost.
        error: of each computed Gram matrix.

    Returns:
        ``P + (P - l)·(1 - C)/(2C - 1)``, ``C = Π(1 + cos(mπ/M))/2`` over axes, with upper and lower bounds ``P`` and
        ``l`` of the eigenvalues on the grid of ``M`` points an axis, ``m`` the taps but one; ``None`` where that is
        looser than it may be.

    Guarantee: let ``[l*, P*]`` hold all eigenvalues at all real frequencies, ``R = P* - l*``, and ``u`` be an
    eigenvector of ``P*`` at ``(ω₁*, ω₂*)``. ``f = u*Gu`` is a real trigonometric polynomial of degree ``m₁`` in ``ω₁``
    and ``m₂`` in ``ω₂``, between ``l*`` and ``P*``. By the Bernstein–Szegő inequality (:func:`symbol_norm_bound`), of a
    polynomial less the middle of what it lies between, one that has a maximum ``s`` and nothing below ``l*`` on a line
    is at least ``l* + (s - l*)(1 + cos(mπ/M))/2`` at a point of the grid next to it. Along ``ω₁`` first, then along
    ``ω₂`` from what is reached: ``P ≥ l* + CR``. For the smallest eigenvalue likewise ``l ≤ P* - CR``. The difference
    gives ``R ≤ (P - l)/(2C - 1)`` for ``C > ½``, and the first one ``P* ≤ P + (1 - C)R``. Computed Gram matrices are
    off by at most ``error``, which is added to ``P`` and taken off ``l``.
    """
    if single_deviations_serve(math.isqrt(even.shape[-1]), even.device):
        return _between_in_single(even, odd, grid, taps, effort, error)
    largest = 0.0
    for grams in _grams(even, odd, grid, taps):
        largest = largest_eigenvalue_bound(grams, effort, largest)
    below = 0.0
    for grams in _grams(even, odd, grid, taps):
        # What lies below the largest one is a Gram matrix's largest eigenvalue again.
        below = largest_eigenvalue_bound(_mirrored(grams, largest), effort, below)
    # The diagonals' subtraction rounds each entry once.
    rounding = error + gamma(2) * largest
    span = enlarge(below + 2.0 * rounding)
    beyond = _share_between(taps, grid) * span
    found = enlarge(largest + rounding + beyond, 8)
    return found if beyond <= effort.between * largest else None


def _single_at_all(rows: int, effort: Effort) -> bool:
    """Whether float32 factorisations at all frequencies pay, and lose no more than they may."""
    return rows >= _SINGLE_FROM and rows * single_rounding(rows) <= effort.single


def _between_in_single(
    even: Tensor, odd: Tensor, grid: tuple[int, int], taps: tuple[int, int], effort: Effort, error: float
) -> float | None:
    """:func:`_between_frequencies` from float32 factorisations."""
    batches, centre, lost = _deviations(even, odd, grid, taps, error)
    share = _share_between(taps, grid)
    # At most half of what may be lost between the grid's points goes to guesses that are not close.
    slack = centre * min(2.0 * effort.tolerance, effort.between / (4.0 * share))
    above, below = (enlarge(one + lost) for one in single_extremes(batches, slack))
    beyond = share * (above + below)
    found = enlarge(centre + above + beyond, 8)
    return found if beyond <= effort.between * (centre + above) else None


def _deviations(
    even: Tensor, odd: Tensor, grid: tuple[int, int], taps: tuple[int, int], error: float
) -> tuple[Iterator[Tensor], float, float]:
    """What the Gram matrices on a grid differ from ``aI`` by, in float32, some at a time; ``a``; and their error.

    Guarantee: ``a`` is any number, here the mean eigenvalue. Coefficients without it are small, so that little is lost
    where they are rounded to float32, as are the cosines: each entry of the sum of ``D`` of them errs by at most
    ``γ_{D+8}`` times the sum of their sizes, the matrix by at most that times ``Σ‖·‖_F``, and ``a``'s subtraction by
    float64's unit roundoff.
    """
    rows = math.isqrt(even.shape[-1])
    even = even.clone()
    diagonal = even[:, 0, :: rows + 1]
    centre = float(diagonal.mean())
    top = float(diagonal.abs().max()) + abs(centre)
    diagonal -= centre
    sizes = torch.linalg.vector_norm(even, dim=2) + torch.linalg.vector_norm(odd, dim=2)
    lost = 2.0 * product_error(even.shape[1] + 8) * float(sizes.sum(1).max()) + even.numel() * 2.0**-120
    lost += error + gamma(2) * top
    return _grams(even.float(), odd.float(), grid, taps), centre, lost


def _mirrored(grams: Tensor, level: float) -> Tensor:
    """``level·I - G``, in place."""
    grams = grams.neg_()
    grams.diagonal(dim1=-2, dim2=-1).add_(level)
    return grams


def _grid(taps: int, torus: int | None, effort: Effort) -> tuple[int, float]:
    """Number of frequencies of one axis to evaluate, and the factor that makes up for those left out."""
    if taps == 1:
        return 1, 1.0
    points = math.ceil(math.pi * (taps - 1) / (2.0 * math.acos(1.0 / (1.0 + effort.riesz_slack))))
    if torus is not None and torus <= 1.5 * points:
        return torus, 1.0
    # The angle is below π/2 with a wide margin, so that the cosine's relative rounding is a few u.
    return points, enlarge(1.0 / math.cos(math.pi * (taps - 1) / (2.0 * points)), 16)


def _correlations(kernel: Tensor) -> Tensor:
    """`C_δ = Σ_t K_{t+δ}K_tᵀ` for the δ of :func:`_steps`; shape (groups, differences, rows, rows)."""
    groups, rows = kernel.shape[:2]
    high, wide = kernel.shape[-2:]
    if high * wide <= _PAIRED_TAPS and rows * high * wide <= _PAIRED_ROWS:
        # All products of two taps at once, then those of each difference added up: zeros elsewhere round nothing.
        taps = kernel.permute(0, 3, 4, 1, 2).flatten(1, 3)
        pairs = (taps @ taps.mT).reshape(groups, high * wide, rows, high * wide, rows).transpose(2, 3)
        summed = _pairs(high, wide).to(kernel.device) @ pairs.reshape(groups, (high * wide) ** 2, rows * rows)
        return summed.reshape(groups, -1, rows, rows)
    products = []
    for a, b in _steps(high, wide):
        ahead = kernel[..., a:, max(b, 0) : wide + min(b, 0)]
        behind = kernel[..., : high - a, max(-b, 0) : wide + min(-b, 0)]
        products.append(ahead.flatten(2) @ behind.flatten(2).mT)
    return torch.stack(products, 1)


def _steps(high: int, wide: int) -> list[tuple[int, int]]:
    """Differences of two of high×wide taps: zero, and one of each pair ±δ."""
    return [(0, b) for b in range(wide)] + [(a, b) for a in range(1, high) for b in range(1 - wide, wide)]


@functools.lru_cache(maxsize=32)
def _pairs(high: int, wide: int) -> Tensor:
    """Ones where a pair of taps (t + δ, t) has a difference δ of :func:`_steps`; shape (differences, pairs)."""
    places = {step: place for place, step in enumerate(_steps(high, wide))}
    chosen = torch.zeros(len(places), (high * wide) ** 2, dtype=torch.float64, device="cpu")
    for ahead, behind in itertools.product(range(high * wide), repeat=2):
        step = (ahead // wide - behind // wide, ahead % wide - behind % wide)
        if step in places:
            chosen[places[step], ahead * high * wide + behind] = 1.0
    return chosen


def _half_plane(high: int, wide: int, device: torch.device) -> Tensor:
    """One of each pair ±ω of frequencies of a (high, wide) grid, as integers of shape (count, 2)."""
    rows = torch.arange(high, device=device)
    columns = torch.arange(wide // 2 + 1, device=device)
    grid = torch.cartesian_prod(rows, columns)
    own_mirror = (grid[:, 1] == 0) | (2 * grid[:, 1] == wide)
    return grid[~own_mirror | (2 * grid[:, 0] <= high)]


def _phases(
    high: int, wide: int, taps: tuple[int, int], chunk: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """cos(ω·δ) and sin(ω·δ), shape (frequencies, differences), of so many frequencies at a time."""
    frequencies = high * (wide // 2 + 1)
    if frequencies <= min(chunk, _CACHED_ENTRIES // len(_steps(*taps))):
        yield _all_phases(high, wide, taps, device)
        return
    differences = torch.tensor(_steps(*taps), dtype=torch.int64, device=device)
    for part in torch.split(_half_plane(high, wide, device), chunk):
        yield _phases_at(part, differences, high, wide)


@functools.lru_cache(maxsize=32)
def _all_phases(high: int, wide: int, taps: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    differences = torch.tensor(_steps(*taps), dtype=torch.int64, device=device)
    return _phases_at(_half_plane(high, wide, device), differences, high, wide)


def _phases_at(frequencies: Tensor, differences: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """cos(ω·δ) and sin(ω·δ), shape (frequencies, differences), from the exact residue of the angle."""
    turns = (
        frequencies[:, None, 0] * differences[None, :, 0] * wide
        + frequencies[:, None, 1] * differences[None, :, 1] * high
    ) % (high * wide)
    angle = turns.to(torch.float64) * (2.0 * math.pi / (high * wide))
    return torch.cos(angle), torch.sin(angle)
