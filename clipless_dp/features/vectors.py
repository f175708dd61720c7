"""Scattering coefficients made ready for a linear layer: standardised without data, as vectors of unit norm."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.errors import ConfigurationError
from clipless_dp.features.scattering import NaturalStandardisation, Scattering2d
from clipless_dp.layers.standardisation import SampleGroupNorm


class GroupedScattering(nn.Sequential):
    """Coefficients of images on a dark ground, as of digits, standardised in groups of neighbouring angles.

    Args:
        image_size: height and width; two scales and eight angles make 81 coefficients of each channel.
        groups: of each sample's coefficients, see :class:`clipless_dp.layers.SampleGroupNorm`.

    Shape:
        ``(B, C, H, W)`` to ``(B, 81·C·⌈H/4⌉·⌈W/4⌉)``, of unit norm.
    """

    def __init__(self, image_size: tuple[int, int], groups: int = 27) -> None:
        super().__init__(Scattering2d(image_size), SampleGroupNorm(groups, floor=0.01))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        return functional.normalize(features.flatten(1))


class MirroredScattering(nn.Sequential):
    """Coefficients of photographs, averaged with those of the mirror image: for labels that no mirror changes.

    Half of the columns tell the averages. Their norm shrinks by what told an image from its mirror image, so that more
    of a unit vector, and of a gradient that is as long as it, tells the classes apart.

    Args:
        image_size: height and width, the latter a multiple of 4; two scales and eight angles make 81 coefficients of
            each channel.

    Shape:
        ``(B, C, H, W)`` to ``(B, 81·C·⌈H/4⌉·⌈W/8⌉)``, of unit norm.

    Raises:
        ConfigurationError: 4 does not divide the width, so that mirror images fall between the places that are kept.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        if image_size[1] % 4:
            raise ConfigurationError(f"the width must be a multiple of 4, got {image_size[1]}: crop or pad the images")
        transform = Scattering2d(image_size, padding="reflect")
        super().__init__(transform, NaturalStandardisation(transform))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        transform = self[0]
        assert isinstance(transform, Scattering2d)
        both = features + transform.mirrored(features)
        return functional.normalize(both[..., : (both.shape[-1] + 1) // 2].flatten(1))
