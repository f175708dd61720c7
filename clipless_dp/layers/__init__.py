"""Modules that torch lacks, usable in any network: norm-preserving activations, pooling, residual blocks."""

from clipless_dp.gates import BallProjection, CotangentGate, SphereScaling
from clipless_dp.layers.centering import LayerCentering
from clipless_dp.layers.householder import Householder
from clipless_dp.layers.pooling import L2NormPool2d
from clipless_dp.layers.residual import ConvexResidual, Residual
from clipless_dp.layers.sorting import GroupSort, MaxMin

__all__ = [
    "BallProjection",
    "ConvexResidual",
    "CotangentGate",
    "GroupSort",
    "Householder",
    "L2NormPool2d",
    "LayerCentering",
    "MaxMin",
    "Residual",
    "SphereScaling",
]
