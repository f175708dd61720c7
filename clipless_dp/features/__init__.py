"""What comes before a private model and costs no privacy: features of each sample by itself, that no data entered."""

from clipless_dp.features.columns import TableEncoding
from clipless_dp.features.cosines import RandomCosines
from clipless_dp.features.frozen import FrozenFeatures
from clipless_dp.features.scattering import NaturalStandardisation, Scattering2d
from clipless_dp.features.vectors import GroupedScattering, MirroredScattering, OpponentColours

__all__ = [
    "FrozenFeatures",
    "GroupedScattering",
    "MirroredScattering",
    "NaturalStandardisation",
    "OpponentColours",
    "RandomCosines",
    "Scattering2d",
    "TableEncoding",
]
