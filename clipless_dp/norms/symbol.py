"""Certified supremum of the symbol of a convolution: a small matrix for each frequency."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from clipless_dp.norms.budget import Effort
from clipless_dp.norms.dense import matrix_norm_bound
from clipless_dp.norms.eigenvalue import largest_eigenvalue_bound
from clipless_dp.norms.rounding import certified_arithmetic, enlarge, gamma

_CHUNK_ENTRIES = 1 << 17
"""Complex entries of Gram matrices held at once: 2 MiB, about a core's cache."""

_CACHED_ENTRIES = 1 << 16
"""Entries of phases, half a MiB for each of sine and cosine, that are kept for the next step."""

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
        groups, rows, columns = kernel.shape[:3]
        correlations = _correlations(kernel)
        count = taps[0] * taps[1]
        squares = float(kernel.square().flatten(1).sum(-1).max()) * (1.0 + gamma(kernel[0].numel()))
        error = gamma(columns * count + correlations.shape[1] + 16) * count * squares
        even = (correlations + correlations.mT).flatten(2)
        even[:, 0] *= 0.5
        odd = (correlations - correlations.mT).flatten(2)
        chunk = max(1, _CHUNK_ENTRIES // (groups * rows * rows))
        bound = 0.0
        for cosine, sine in _phases(grid_high, grid_wide, taps, chunk, kernel.device):
            real, imaginary = cosine @ even, sine @ odd
            grams = torch.complex(real, imaginary) if rows > 1 else real
            bound = largest_eigenvalue_bound(grams.reshape(-1, rows, rows), effort, bound)
    return enlarge(math.sqrt(enlarge(bound + error)) * factor_high * factor_wide, 8)


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
