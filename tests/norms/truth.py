"""What certified norms are held against: operators written out, their float64 SVD, exact rationals."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

TRUTH_ROUNDING = 1e-13
"""Relative error allowed to the truth itself: LAPACK's largest singular value errs by a modest multiple of
√n·u·‖A‖, observed below 1e-14; 1e-13 covers the sizes used here (n <= 1000)."""


def conv_matrix(
    weight: Tensor,
    size: tuple[int, ...],
    sides: tuple[tuple[int, int], ...],
    *,
    stride: tuple[int, ...] | int = 1,
    dilation: tuple[int, ...] | int = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: tuple[int, ...] | int = 0,
    padding_mode: str = "zeros",
) -> Tensor:
    """The matrix of torch's own convolution, from its action on unit vectors; empty if nothing comes out."""
    axes = len(size)
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    count = channels * math.prod(size)
    units = torch.eye(count, dtype=torch.float64).reshape(count, channels, *size)
    kernel = weight.to(torch.float64)
    if transposed:
        run = functional.conv_transpose2d if axes == 2 else functional.conv_transpose1d
        images = run(units, kernel, stride=stride, dilation=dilation, groups=groups, output_padding=output_padding)
        for axis, (low, high) in enumerate(sides):
            room = images.shape[2 + axis] - low - high
            if room < 1:
                return images.new_zeros(0, count)
            images = images.narrow(2 + axis, low, room)
    else:
        flat = [side for pair in reversed(sides) for side in pair]
        padded = functional.pad(units, flat, mode="circular" if padding_mode == "circular" else "constant")
        for axis, k in enumerate(weight.shape[2:]):
            reach = (dilation if isinstance(dilation, int) else dilation[axis]) * (k - 1)
            if padded.shape[2 + axis] <= reach:
                return padded.new_zeros(0, count)
        convolve = functional.conv2d if axes == 2 else functional.conv1d
        images = convolve(padded, kernel, stride=stride, dilation=dilation, groups=groups)
    return images.reshape(count, -1).T


def spectral(matrix: Tensor) -> float:
    """Largest singular value by float64 SVD, after an exact scaling; 0.0 for an empty or zero matrix."""
    matrix = matrix.to(torch.float64)
    if matrix.numel() == 0 or not bool(matrix.any()):
        return 0.0
    exponent = math.frexp(float(matrix.abs().max()))[1]
    half = exponent // 2
    scaled = matrix * 2.0**-half * 2.0 ** (half - exponent)
    return math.ldexp(float(torch.linalg.svdvals(scaled)[0]), exponent)


def exactly_bounds(bound: float, matrix: Tensor) -> bool:
    """Whether `bound >= ‖matrix‖` holds in exact rational arithmetic: no rounding anywhere, no tolerance.

    `bound²·I - A·Aᵀ` is positive semidefinite iff Gaussian elimination meets no negative pivot, and no
    zero pivot with a non-zero column below it.
    """
    rows = [[Fraction(float(entry)) for entry in row] for row in matrix.to(torch.float64)]
    size = len(rows)
    gap = [[-sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
    for i in range(size):
        gap[i][i] += Fraction(bound) ** 2
    for i in range(size):
        pivot = gap[i][i]
        if pivot < 0 or (pivot == 0 and any(gap[j][i] != 0 for j in range(i + 1, size))):
            return False
        if pivot == 0:
            continue
        for j in range(i + 1, size):
            factor = gap[j][i] / pivot
            if factor:
                gap[j] = [x - factor * y for x, y in zip(gap[j], gap[i], strict=True)]
    return True


def lanczos_conv_norm(weight: Tensor, size: tuple[int, int], padding: int, steps: int) -> float:
    """A lower estimate of a zero-padded stride-1 convolution's norm, for sizes too large to write out."""
    kernel = weight.to(torch.float64)
    vector = torch.randn(1, kernel.shape[1], *size, dtype=torch.float64)
    vector /= vector.norm()
    previous, beta = torch.zeros_like(vector), 0.0
    alphas, betas = [], []
    for _ in range(steps):
        there = functional.conv2d(vector, kernel, padding=padding)
        image = functional.conv_transpose2d(there, kernel, padding=padding) - beta * previous
        alphas.append(float((image * vector).sum()))
        image -= alphas[-1] * vector
        beta = float(image.norm())
        betas.append(beta)
        previous, vector = vector, image / beta
    off = torch.tensor(betas[:-1], dtype=torch.float64)
    ritz = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    return float(torch.linalg.eigvalsh(ritz)[-1]) ** 0.5
