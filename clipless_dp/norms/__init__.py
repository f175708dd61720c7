"""Certified upper bounds of operator norms: never an estimate, rounding included."""

from clipless_dp.norms.budget import Budget
from clipless_dp.norms.conv import conv1d_norm, conv2d_norm
from clipless_dp.norms.dense import dense_norm
from clipless_dp.norms.geometry import coverage, output_size, padded_copies
from clipless_dp.norms.volumes import conv3d_norm

__all__ = [
    "Budget",
    "conv1d_norm",
    "conv2d_norm",
    "conv3d_norm",
    "coverage",
    "dense_norm",
    "output_size",
    "padded_copies",
]
