"""What the architectures share: sizes, patches, and an initialisation that keeps norms."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.layers import orthogonal_

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def require_positive(**sizes: int) -> None:
    """Raises :class:`ConfigurationError` for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigurationError(f"{name} must be positive, got {size}")


def require_even(name: str, widths: tuple[int, ...]) -> None:
    """Raises :class:`ConfigurationError` for widths whose entries GroupSort cannot pair."""
    if not widths or any(width < 2 or width % 2 for width in widths):
        raise ConfigurationError(f"{name} must be even and positive, since GroupSort sorts pairs, got {widths}")


def image_size(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, height and width.

    Raises:
        ConfigurationError: the shape is not that of an image.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ConfigurationError(f"input_shape must be (channels, height, width), got {input_shape}")
    channels, height, width = input_shape
    return channels, height, width


def patch_of(height: int, width: int) -> int:
    """Side of a patch with which the shorter side has at most 8 patches."""
    return -(-min(height, width) // 8)


def patches(channels: int, features: int, size: tuple[int, int], patch: int) -> tuple[nn.Conv2d, tuple[int, int]]:
    """A convolution without bias that reads each pixel in exactly one patch, and the number of patches on each axis.

    Where the patch does not divide a side, zeros are added around it. Windows do not overlap: coverage 1.
    """
    grid = (-(-size[0] // patch), -(-size[1] // patch))
    padding = (grid[0] * patch - size[0] + 1) // 2, (grid[1] * patch - size[1] + 1) // 2
    return nn.Conv2d(channels, features, patch, stride=patch, padding=padding, bias=False), grid


def isometric_(net: ModuleT) -> ModuleT:
    """Gives each dense and convolution weight norm 1, and each bias the value 0; draws random numbers, sees no data.

    Dense weights become semi-orthogonal matrices (Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear
    dynamics of learning in deep linear neural networks", ICLR 2014), convolutions orthogonal ones
    (:func:`~clipless_dp.layers.orthogonal_`): isometries, or projections where they have fewer outputs than inputs.

    Args:
        net: initialised in place; a network of one's own, too.

    Returns:
        The network.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            orthogonal_(module)
        elif isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return net
