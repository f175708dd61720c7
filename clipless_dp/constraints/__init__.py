"""Constraints: projections of a parameter after the noisy step, which are free post-processing."""

from clipless_dp.constraints.almost_orthogonal import AlmostOrthogonal
from clipless_dp.constraints.assignment import assign
from clipless_dp.constraints.ball import Ball
from clipless_dp.constraints.base import Constraint, ConstraintSpec
from clipless_dp.constraints.coordinates import EntryBound, RowSum
from clipless_dp.constraints.frobenius import Frobenius
from clipless_dp.constraints.orthogonal import Orthogonal
from clipless_dp.constraints.orthogonal_convolution import OrthogonalConvolution
from clipless_dp.constraints.penalty import LipschitzPenalty
from clipless_dp.constraints.row_norm import RowNorm, UnitRows
from clipless_dp.constraints.spectral import Spectral
from clipless_dp.constraints.spline_variation import SplineVariation

__all__ = [
    "AlmostOrthogonal",
    "Ball",
    "Constraint",
    "ConstraintSpec",
    "EntryBound",
    "Frobenius",
    "LipschitzPenalty",
    "Orthogonal",
    "OrthogonalConvolution",
    "RowNorm",
    "RowSum",
    "Spectral",
    "SplineVariation",
    "UnitRows",
    "assign",
]
