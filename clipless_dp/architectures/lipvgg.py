"""A plain convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from clipless_dp.architectures.parts import image_size, isometric_, require_even, require_positive
from clipless_dp.errors import ConfigurationError
from clipless_dp.layers import GroupSort, L2NormPool2d, ScaledAvgPool2d

Pooling = Literal["norm", "average", "unshuffle"]


def lipvgg(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    widths: Sequence[int] | None = None,
    kernel_size: int = 3,
    hidden: int = 64,
    pooling: Pooling = "norm",
) -> nn.Sequential:
    """Stages of convolution, GroupSort and pooling by two, then two dense layers (Simonyan and Zisserman, "Very deep
    convolutional networks for large-scale image recognition", ICLR 2015, with 1-Lipschitz parts).

    A convolution's Δ is ``k·GX``: each pixel lies in ``k²`` windows. None has a bias, whose Δ would grow with the map.

    Args:
        input_shape: ``(channels, height, width)``.
        classes: number of outputs.
        widths: channels of each stage, even; by default 16, doubled for each stage until the map is at most 8×8.
        kernel_size: of the convolutions, odd.
        hidden: width of the dense layer, even.
        pooling: ``"norm"``: the norm of each 2×2 window; ``"average"``: its scaled average; ``"unshuffle"``: its
            entries as four channels, which loses nothing and quadruples the weights that read them.

    Raises:
        ConfigurationError: a size is out of range, the pooling is unknown, or an odd map is to be unshuffled.
    """
    channels, height, width = image_size(input_shape)
    if widths is None:
        stages = max(1, ((max(height, width) - 1) // 8).bit_length())
        widths = tuple(16 * 2**stage for stage in range(stages))
    require_positive(classes=classes)
    require_even("widths", tuple(widths))
    require_even("hidden", (hidden,))
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigurationError(f"kernel_size must be odd, got {kernel_size}")
    parts: list[nn.Module] = []
    for features in widths:
        convolution = nn.Conv2d(channels, features, kernel_size, padding=kernel_size // 2, bias=False)
        parts += [convolution, GroupSort(2), _pool(pooling, height, width)]
        channels = 4 * features if pooling == "unshuffle" else features
        height, width = -(-height // 2), -(-width // 2)
    dense = nn.Linear(channels * height * width, hidden)
    return isometric_(nn.Sequential(*parts, nn.Flatten(), dense, GroupSort(2), nn.Linear(hidden, classes)))


def _pool(pooling: str, height: int, width: int) -> nn.Module:
    padding = height % 2, width % 2
    if pooling == "norm":
        return L2NormPool2d(2, padding=padding)
    if pooling == "average":
        return ScaledAvgPool2d(2, padding=padding)
    if pooling != "unshuffle":
        raise ConfigurationError(f"pooling must be 'norm', 'average' or 'unshuffle', got {pooling!r}")
    if any(padding):
        raise ConfigurationError(
            f"a map of {height}×{width} cannot be unshuffled by two: use fewer widths or pooling='norm'"
        )
    return nn.PixelUnshuffle(2)
