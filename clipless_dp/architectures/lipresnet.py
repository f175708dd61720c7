"""A residual convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from clipless_dp.architectures.parts import (
    image_size,
    isometric_,
    patch_of,
    patches,
    require_even,
    require_positive,
)
from clipless_dp.layers import ConvexResidual, GroupSort, Highway


def lipresnet(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    widths: Sequence[int] = (32, 64),
    blocks: int = 2,
    patch_size: int | None = None,
    alpha: float = 0.5,
    paths: int | None = None,
) -> nn.Sequential:
    """Patches, stages of convex residual 3×3 convolutions with maps halved between them, and a dense layer (He, Zhang,
    Ren and Sun, "Deep residual learning for image recognition", CVPR 2016, with convex combinations in place of sums).

    A block ``(1-α)x + α·sort(conv(x))`` sees the cotangent times α: its Δ is ``3α·GX``. What changes a map's size has
    windows that do not overlap: ``GX``. No convolution has a bias, whose Δ would grow with the map.

    Args:
        input_shape: ``(channels, height, width)``.
        classes: number of outputs.
        widths: channels of each stage, even.
        blocks: residual blocks of each stage.
        patch_size: side of the patches that the first layer reads; by default such that there are at most 8 in a row.
        alpha: weight of a block's convolution.
        paths: through how many of a stage's blocks gradients go at most (:class:`~clipless_dp.layers.Highway`), which
            makes Δ smaller and biases gradients; ``None``: through all.

    Raises:
        ConfigurationError: a size, ``alpha`` or ``paths`` is out of range.
    """
    channels, *sides = image_size(input_shape)
    size = (sides[0], sides[1])
    patch = patch_of(*size) if patch_size is None else patch_size
    require_positive(classes=classes, blocks=blocks, patch_size=patch)
    require_even("widths", tuple(widths))
    parts: list[nn.Module] = []
    for stage, width in enumerate(widths):
        entry, size = patches(channels, width, size, 2 if stage else patch)
        parts.append(entry)
        convolutions = [_convolution(width) for _ in range(blocks)]
        if paths is None:
            parts += [ConvexResidual(convolution, alpha) for convolution in convolutions]
        else:
            parts.append(Highway(convolutions, paths, alpha))
        channels = width
    return isometric_(nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes)))


def _convolution(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), GroupSort(2))
