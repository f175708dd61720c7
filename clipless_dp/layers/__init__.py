"""Modules that torch lacks, usable in any network: norm-preserving activations, pooling, residual blocks."""

from clipless_dp.gates import BallProjection, CotangentGate, SphereScaling
from clipless_dp.layers.absolute import AbsoluteValue
from clipless_dp.layers.causal import CausalMixing
from clipless_dp.layers.centering import BiasedCentering, ChannelBias, LayerCentering
from clipless_dp.layers.convex_potential import (
    ConvexPotential,
    ConvexPotentialConv2d,
    GradientGatedConvexPotential,
    GradientGatedConvexPotentialConv2d,
)
from clipless_dp.layers.distance import DistanceLinear, SortLinear, set_exponent_
from clipless_dp.layers.forward_only import Foton, Pepita
from clipless_dp.layers.highway import Highway, StopGradient
from clipless_dp.layers.householder import Householder
from clipless_dp.layers.mixing import MixerBlock, TokenMixing, Tokens
from clipless_dp.layers.monotone import BoxProjection, MonotoneResidual
from clipless_dp.layers.noise import NoiseInjection
from clipless_dp.layers.orthogonal import adaptive_orthogonal_conv2d, from_orthogonium, orthogonal_
from clipless_dp.layers.padding import PadChannels, SymmetricPad1d, SymmetricPad2d
from clipless_dp.layers.pooling import (
    AdaptiveL2NormPool1d,
    AdaptiveL2NormPool2d,
    L2NormPool1d,
    L2NormPool2d,
    ScaledAvgPool2d,
)
from clipless_dp.layers.residual import ConcatResidual, ConvexResidual, GatedResidual, Residual, SigmoidMix
from clipless_dp.layers.sorting import ConcatReLU, FullSort, GroupSort, MaxMin
from clipless_dp.layers.spline import EffectiveRegions, LinearSpline, SplineRegions, effective_regions
from clipless_dp.layers.standardisation import SampleGroupNorm
from clipless_dp.layers.structured import (
    Diagonal,
    GradientGatedDiagonal,
    GradientGatedStructuredLinear,
    StructuredLinear,
)

__all__ = [
    "AbsoluteValue",
    "AdaptiveL2NormPool1d",
    "AdaptiveL2NormPool2d",
    "BallProjection",
    "BiasedCentering",
    "BoxProjection",
    "CausalMixing",
    "ChannelBias",
    "ConcatReLU",
    "ConcatResidual",
    "ConvexPotential",
    "ConvexPotentialConv2d",
    "ConvexResidual",
    "CotangentGate",
    "Diagonal",
    "DistanceLinear",
    "EffectiveRegions",
    "Foton",
    "FullSort",
    "GatedResidual",
    "GradientGatedConvexPotential",
    "GradientGatedConvexPotentialConv2d",
    "GradientGatedDiagonal",
    "GradientGatedStructuredLinear",
    "GroupSort",
    "Highway",
    "Householder",
    "L2NormPool1d",
    "L2NormPool2d",
    "LayerCentering",
    "LinearSpline",
    "MaxMin",
    "MixerBlock",
    "MonotoneResidual",
    "NoiseInjection",
    "PadChannels",
    "Pepita",
    "Residual",
    "SampleGroupNorm",
    "ScaledAvgPool2d",
    "SigmoidMix",
    "SortLinear",
    "SphereScaling",
    "SplineRegions",
    "StopGradient",
    "StructuredLinear",
    "SymmetricPad1d",
    "SymmetricPad2d",
    "TokenMixing",
    "Tokens",
    "adaptive_orthogonal_conv2d",
    "effective_regions",
    "from_orthogonium",
    "orthogonal_",
    "set_exponent_",
]
