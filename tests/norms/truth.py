"""The truth that certified norms are held against: operators written out as matrices, and their float64 SVD."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

TRUTH_ROUNDING = 1e-13
"""Relative error allowed to the truth itself: LAPACK's singular values err by a small multiple of n·u·‖A‖,
which is below 1e-13 for the sizes used here (n <= 1000)."""


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
    """The matrix of torch's own convolution, from its action on every unit vector; empty if nothing comes out."""
    axes = len(size)
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    count = channels * math.prod(size)
    units = torch.eye(count, dtype=torch.float64).reshape(count, channels, *size)
    kernel = weight.to(torch.float64)
    if transposed:
        run = functional.conv_transpose2d if axes == 2 else functional.conv_transpose1d
        images = run(
            units, kernel, stride=stride, dilation=dilation, groups=groups, output_padding=output_padding
        )
        for axis, (low, high) in enumerate(sides):
            room = images.shape[2 + axis] - low - high
            if room < 1:
                return images.new_zeros(0, count)
            images = images.narrow(2 + axis, low, room)
    else:
        flat = [side for pair in reversed(sides) for side in pair]
        padded = functional.pad(units, flat, mode="circular" if padding_mode == "circular" else "constant")
        run = functional.conv2d if axes == 2 else functional.conv1d
        images = run(padded, kernel, stride=stride, dilation=dilation, groups=groups)
    return images.reshape(count, -1).T


def spectral(matrix: Tensor) -> float:
    """Largest singular value by float64 SVD; 0.0 for an empty matrix."""
    if matrix.numel() == 0:
        return 0.0
    return float(torch.linalg.svdvals(matrix.to(torch.float64))[0])
