"""Certified operator norms of circulant, skew-circulant, Toeplitz and Hankel matrices: the largest size of a sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from clipless_dp.norms.rounding import certified_arithmetic, enlarge, exact_float64, gamma, normalised, scale_up

_CHUNK_ENTRIES = 1 << 18
"""Cosines held at once: 2 MiB."""

_CACHED_ENTRIES = 1 << 20
"""Cosines that are kept for the next step: 8 MiB, and as many of sines."""


def circle_norm(taps: Tensor, points: int, *, odd: bool = False) -> float:
    """Guaranteed upper bound of ``max_ω |Σ_m t_m e^{iωm}|`` over the frequencies of a circle.

    Args:
        taps: Shape (n,), any floating-point type.
        points: ``L``, points of the circle: frequencies are ``2πk/L``.
        odd: Whether they are ``π(2k+1)/L`` instead.

    Returns:
        A float; 0.0 where all taps are zero, or there are none. It exceeds the maximum by rounding alone.

    Raises:
        NormError: if the taps are not real floating-point numbers, or not finite.

    Formula: a circulant matrix ``C_ij = c_{(i-j) mod L}`` has the eigenvalues ``Σ_m c_m e^{-2πikm/L}`` and is normal,
    so its norm is the largest of their sizes; with the signs of the wrapped diagonals changed (skew-circulant) they
    are ``Σ_m c_m e^{-iπ(2k+1)m/L}``. Those of ``-ω`` are conjugate, so half of the frequencies suffice.

    Source: P. Davis, *Circulant Matrices*, 1979, §3.2 and §3.2.1 (skew-circulants: {k}-circulants with k = -1).

    Guarantee: *Rounding.* Angles come from exact integers modulo the circle and cosines are good to 24u, if the
    library's are within 4 units in the last place. Real and imaginary part are sums of n products: each errs by at most
    ``8(n+4)u + 24u ≤ 8(n+7)u`` of ``Σ|t_m|``, their length by ``√2`` times as much, which is added. Taps are first
    scaled by a power of two, which is exact.
    """
    exact = exact_float64(taps, "taps")
    if exact.numel() == 0 or not bool(exact.any()):
        return 0.0
    scaled, exponent = normalised(exact.flatten())
    with certified_arithmetic(scaled):
        largest = 0.0
        for cosine, sine in _waves(len(scaled), points, odd, scaled.device):
            largest = max(largest, float(((cosine @ scaled).square() + (sine @ scaled).square()).max()))
        error = 2.0 * gamma(len(scaled) + 3) * float(scaled.abs().sum())
    return scale_up(enlarge(math.sqrt(largest) + error), exponent)


def toeplitz_norm(diagonals: Tensor) -> float:
    """Guaranteed upper bound of the norm of a Toeplitz matrix, and of the Hankel matrix with its columns reversed.

    Args:
        diagonals: Shape (out + in - 1,): entry ``m`` lies where ``i - j = m - (in - 1)``.

    Returns:
        The smaller one of two bounds; 0.0 for zeros.

    Formula: with ``L = out + in - 1`` the entries fill a circulant ``L × L`` matrix of which the Toeplitz matrix is a
    part, since ``i - j`` takes each value modulo ``L`` once; and a skew-circulant one, once the signs of the taps that
    wrap are changed. The norm of a part is at most that of the whole. The taps' own order is a cyclic shift of the
    circulant's, which leaves sizes alone, and ``|Σ t_m e^{iωm}|`` at odd frequencies does not see where it starts.

    Raises:
        NormError: see :func:`circle_norm`.
    """
    points = len(diagonals)
    return min(circle_norm(diagonals, points), circle_norm(diagonals, points, odd=True))


def _waves(taps: int, points: int, odd: bool, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """cos(ωm) and sin(ωm), shape (frequencies, taps), of so many frequencies at a time."""
    count = (points + 1) // 2 if odd else points // 2 + 1
    if count * taps <= _CACHED_ENTRIES:
        yield _all_waves(taps, points, odd, device)
        return
    for part in torch.arange(count, device=device).split(max(1, _CHUNK_ENTRIES // taps)):
        yield _waves_at(part, taps, points, odd)


@functools.lru_cache(maxsize=8)
def _all_waves(taps: int, points: int, odd: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    count = (points + 1) // 2 if odd else points // 2 + 1
    return _waves_at(torch.arange(count, device=device), taps, points, odd)


def _waves_at(frequencies: Tensor, taps: int, points: int, odd: bool) -> tuple[Tensor, Tensor]:
    steps = 2 * frequencies + 1 if odd else 2 * frequencies
    turns = (steps[:, None] * torch.arange(taps, device=frequencies.device)) % (2 * points)
    angles = turns.double() * (math.pi / points)
    return angles.cos(), angles.sin()
