"""Constraints: projections of a parameter after the noisy step, which are free post-processing."""

from clipless_dp.constraints.ball import Ball
from clipless_dp.constraints.base import Constraint, ConstraintSpec, assign
from clipless_dp.constraints.orthogonal import Orthogonal
from clipless_dp.constraints.spectral import Spectral

__all__ = ["Ball", "Constraint", "ConstraintSpec", "Orthogonal", "Spectral", "assign"]
