"""Nearest points among circulant matrices: frequency by frequency, where they are numbers or small matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.norms.operators import CirculantOperator


def symbols(weight: Tensor, operator: CirculantOperator) -> Tensor:
    """The circulant's eigenvalues, or of blocks a matrix for each frequency: ``(n, rows, columns)``, complex.

    The discrete Fourier transform divided by the root of its length is unitary, so what is nearest here is nearest in
    the coefficients, and nearest in the Frobenius norm of the matrix.
    """
    taps = weight.double()
    taps = taps.reshape(1, 1, -1) if taps.dim() == 1 else taps
    found: Tensor = torch.fft.fft(taps * _turn(taps, operator)).movedim(-1, 0)
    return found / math.sqrt(operator.filled)


def write_(matrices: Tensor, weight: Tensor, operator: CirculantOperator) -> None:
    """The inverse of :func:`symbols`, in place: those of ``ω`` and ``-ω`` are conjugate, so the result is real."""
    taps = torch.fft.ifft((matrices * math.sqrt(operator.filled)).movedim(0, -1))
    weight.copy_((taps * _turn(taps.real, operator).conj()).real.reshape(weight.shape))


def clip_(weight: Tensor, operator: CirculantOperator, limit: float) -> None:
    """The nearest one of norm at most ``limit``, in place, up to rounding: no singular value stays above it."""
    found = symbols(weight, operator)
    if found[0].numel() == 1:
        sizes = found.abs()
        write_(found * (limit / sizes.clamp(min=limit)), weight, operator)
    else:
        left, sizes, right = torch.linalg.svd(found, full_matrices=False)
        write_((left * sizes.clamp(max=limit).unsqueeze(1)) @ right, weight, operator)


def polar_(weight: Tensor, operator: CirculantOperator, limit: float) -> None:
    """The nearest one whose singular values are all ``limit``, in place, up to rounding; 0 counts as a positive one."""
    found = symbols(weight, operator)
    if found[0].numel() == 1:
        sizes = found.abs()
        units = torch.where(sizes > 0.0, found / sizes, torch.ones_like(found))
        write_(limit * units, weight, operator)
    else:
        left, _, right = torch.linalg.svd(found, full_matrices=False)
        write_(limit * (left @ right), weight, operator)


def _turn(taps: Tensor, operator: CirculantOperator) -> Tensor:
    """``e^{-iπm/n}`` for a skew-circulant, which moves its odd frequencies to the whole ones; else ones."""
    share = math.pi / operator.points if operator.skew else 0.0
    angles = torch.arange(operator.points, dtype=torch.float64, device=taps.device) * -share
    return torch.polar(torch.ones_like(angles), angles)
