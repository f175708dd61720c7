"""Scattering coefficients made ready for a linear layer: standardised without data, as vectors of unit norm."""

from __future__ import annotations

import math
from typing import cast

import torch
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


class OpponentColours(nn.Module):
    """Lightness and two colour differences, in which photographs are less alike than in red, green and blue.

    Of ``(r, g, b)`` they are ``(r+g+b)/3``, ``½ + c·(r-b)/√2`` and ``½ + c·(r-2g+b)/√6``: along orthogonal directions,
    in the first of which natural images vary most (Ruderman, Cronin and Chiao 1998).

    Args:
        contrast: ``c`` of the differences.

    Shape:
        ``(B, 3, H, W)`` to the same shape; images of other numbers of channels stay as they are.
    """

    def __init__(self, contrast: float = 3.0) -> None:
        super().__init__()
        self.contrast = contrast
        directions = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
        scales = torch.tensor([1 / 3, contrast / math.sqrt(2), contrast / math.sqrt(6)])
        self.register_buffer("directions", directions * scales[:, None], persistent=False)
        self.register_buffer("offsets", torch.tensor([0.0, 0.5, 0.5])[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        if images.dim() != 4 or images.shape[1] != 3:
            return images
        directions, offsets = (cast(Tensor, part).to(images.dtype) for part in (self.directions, self.offsets))
        return torch.einsum("oc,bchw->bohw", directions, images) + offsets

    def extra_repr(self) -> str:
        """The contrast."""
        return f"contrast={self.contrast}"


class MirroredScattering(nn.Sequential):
    """Coefficients of photographs, averaged with those of the mirror image: for labels that no mirror changes.

    Colours become lightness and differences (:class:`OpponentColours`), moduli their logarithms, and all are
    standardised without data (:class:`NaturalStandardisation`); of the differences, averages count double and moduli
    half. Half of the columns tell the averages with the mirror image. Their norm shrinks by what told an image from its
    mirror image, so that more of a unit vector, and of a gradient that is as long as it, tells the classes apart.

    Args:
        image_size: height and width, the latter a multiple of ``2^J``.
        scales: ``J``; with eight angles, 2 make 81 coefficients of each channel, and 3 make 217 at fewer places.

    Shape:
        ``(B, C, H, W)``, pixels in [0, 1], to ``(B, K·C·⌈H/2^J⌉·⌈W/2^(J+1)⌉)``, of unit norm.

    Raises:
        ConfigurationError: ``2^J`` does not divide the width, so that mirror images fall between the places that are
            kept; or the image is too small for so many scales.
        InputError: the images have another size, or are not of float32 or float64.

    Chosen by:
        Contrast 3, offset 0.01 and these weights are from CIFAR-10's training images, at ε = 3.
    """

    def __init__(self, image_size: tuple[int, int], scales: int = 2) -> None:
        transform = Scattering2d(image_size, scales, padding="reflect")
        if image_size[1] % 2**scales:
            raise ConfigurationError(
                f"the width must be a multiple of {2**scales}, got {image_size[1]}: crop or pad the images"
            )
        super().__init__(OpponentColours(), transform, NaturalStandardisation(transform, offset=0.01))
        weights = torch.ones(3, transform.coefficients)
        weights[1:] = 0.5
        weights[1:, 0] = 2.0
        self.register_buffer("weights", weights.flatten()[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        if images.shape[1] == 3:
            features = features * cast(Tensor, self.weights).to(features.dtype)
        transform = self[1]
        assert isinstance(transform, Scattering2d)
        both = features + transform.mirrored(features)
        return functional.normalize(both[..., : (both.shape[-1] + 1) // 2].flatten(1))
