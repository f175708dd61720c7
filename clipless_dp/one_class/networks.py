"""Networks of one output whose gradient has norm 1 nearly everywhere, as that of a distance has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from clipless_dp.architectures.parts import image_size, isometric_, require_positive
from clipless_dp.errors import ConfigurationError
from clipless_dp.layers import FullSort


def dense_distance(input_shape: tuple[int, ...], *, widths: Sequence[int] = (128, 128, 128)) -> nn.Sequential:
    """Dense layers, each followed by a sorting of all its outputs, and a last row of norm 1.

    With orthogonal weights each layer keeps norms of gradients (Anil, Lucas and Grosse 2019), which is what a signed
    distance asks for. Béthune et al. 2023 take four layers of 512.

    Args:
        input_shape: of one sample; images are flattened.
        widths: of the hidden layers.

    Raises:
        ConfigurationError: a size is out of range.
    """
    if not input_shape or not widths:
        raise ConfigurationError(f"input_shape and widths must hold sizes, got {input_shape} and {tuple(widths)}")
    require_positive(smallest_size=min(*input_shape, *widths))
    parts: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    size = math.prod(input_shape)
    for width in widths:
        parts += [nn.Linear(size, width), FullSort()]
        size = width
    return isometric_(nn.Sequential(*parts, nn.Linear(size, 1)))


def linear_distance(input_shape: tuple[int, ...]) -> nn.Sequential:
    """One row of norm 1 and an offset: the distance from a half-space, for features that a plane can tell apart.

    Args:
        input_shape: of one sample.

    Raises:
        ConfigurationError: a size is out of range.
    """
    if not input_shape:
        raise ConfigurationError("input_shape must hold sizes, got none")
    require_positive(smallest_size=min(input_shape))
    parts: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    return isometric_(nn.Sequential(*parts, nn.Linear(math.prod(input_shape), 1)))


def convolutional_distance(
    input_shape: tuple[int, ...], *, channels: Sequence[int] = (16, 32), width: int = 128
) -> nn.Sequential:
    """Convolutions on windows of two by two that do not overlap, whose kernels are orthogonal matrices, then dense.

    Args:
        input_shape: ``(channels, height, width)``, sides divisible by 2 to the number of convolutions.
        channels: outputs of each convolution.
        width: of the dense layer behind them.

    Raises:
        ConfigurationError: a size is out of range.
    """
    inputs, height, across = image_size(input_shape)
    require_positive(width=width, channels=min(channels, default=0))
    side = 2 ** len(channels)
    if height % side or across % side:
        raise ConfigurationError(f"sides of {height} by {across} must be divisible by {side}, or take dense_distance")
    parts: list[nn.Module] = []
    for outputs in channels:
        parts += [nn.Conv2d(inputs, outputs, 2, stride=2, bias=False), FullSort()]
        inputs = outputs
    features = nn.Sequential(*parts, nn.Flatten())
    with torch.no_grad():
        size = features(torch.zeros(1, *input_shape)).numel()
    return isometric_(nn.Sequential(*features, nn.Linear(size, width), FullSort(), nn.Linear(width, 1)))
