"""Networks of supported layers, ready to be wrapped: plain modules, initialised without data."""

from clipless_dp.architectures.lipresnet import lipresnet
from clipless_dp.architectures.lipsll import lipsll
from clipless_dp.architectures.lipvgg import lipvgg
from clipless_dp.architectures.mixer import mixer
from clipless_dp.architectures.mlp import circulant_mlp, mlp, residual_mlp, sort_mlp
from clipless_dp.architectures.parts import isometric_
from clipless_dp.architectures.summary import summary

__all__ = [
    "circulant_mlp",
    "isometric_",
    "lipresnet",
    "lipsll",
    "lipvgg",
    "mixer",
    "mlp",
    "residual_mlp",
    "sort_mlp",
    "summary",
]
