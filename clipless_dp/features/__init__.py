"""What comes before a private model and costs no privacy: features of each sample by itself, that no data entered."""

from clipless_dp.features.columns import TableEncoding
from clipless_dp.features.cosines import RandomCosines
from clipless_dp.features.frozen import FrozenFeatures
from clipless_dp.features.leaves import dead_leaves
from clipless_dp.features.patches import PatchDictionary
from clipless_dp.features.scattering import NaturalStandardisation, Scattering2d
from clipless_dp.features.strokes import strokes
from clipless_dp.features.vectors import GroupedScattering, MirroredScattering, OpponentColours
from clipless_dp.features.whitening import JoinedFeatures, SyntheticWhitening

__all__ = [
    "FrozenFeatures",
    "GroupedScattering",
    "JoinedFeatures",
    "MirroredScattering",
    "NaturalStandardisation",
    "OpponentColours",
    "PatchDictionary",
    "RandomCosines",
    "Scattering2d",
    "SyntheticWhitening",
    "TableEncoding",
    "dead_leaves",
    "strokes",
]
