"""What comes before a private model and costs no privacy: features of each sample by itself, that no data entered."""

from clipless_dp.features.frozen import FrozenFeatures
from clipless_dp.features.scattering import Scattering2d

__all__ = ["FrozenFeatures", "Scattering2d"]
