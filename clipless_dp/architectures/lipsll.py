"""A deep network of convex potentials."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, NamedTuple

from torch import nn

from clipless_dp.architectures.parts import image_size, require_positive
from clipless_dp.arguments import choice, whole
from clipless_dp.layers import ConvexPotential, ConvexPotentialConv2d, PadChannels, ScaledAvgPool2d

_WINDOW = 4
"""Side of the windows that are averaged before the dense layers."""


class _Sizes(NamedTuple):
    depth: int
    dense: int
    width: int
    inner: int = 2048


_NAMED = {"S": _Sizes(20, 7, 45), "M": _Sizes(30, 10, 60), "L": _Sizes(50, 10, 90), "XL": _Sizes(70, 15, 120)}


def lipsll(
    input_shape: tuple[int, ...],
    classes: int,
    depth: int | None = None,
    dense: int | None = None,
    width: int | None = None,
    inner: int | None = None,
    *,
    size: Literal["S", "M", "L", "XL"] = "S",
    kernel_size: int = 3,
    stride: int = 1,
) -> nn.Sequential:
    """Channels of zeros, convex-potential convolutions, averages of 4×4 pixels, convex-potential dense layers, and a
    dense layer (Araujo, Havens, Delattre, Allauzen and Hu, "A unified algebraic perspective on Lipschitz neural
    networks", ICLR 2023, §5).

    The body is 1-Lipschitz where all weights have norm 1. ``T`` and ``q`` of the paper's ``x - 2VT⁻¹σ(Vᵀx + b)`` are a
    projection of the weight here, :class:`~clipless_dp.constraints.AlmostOrthogonal` with ``side="outputs"`` and
    scales; the last layer's rows get norm 1 by :class:`~clipless_dp.constraints.UnitRows`::

        {"head": constraints.UnitRows(), "*": constraints.AlmostOrthogonal(scales="norm", side="outputs")}

    At norm 1 a dense layer's Δ is ``4GX``, a convolution's ``4√N·GX`` with coverage N, at every depth: ``√depth`` of
    it in all. Depth pays behind gradient gates only, whose cap is the Δ. No convolution has a bias, whose Δ would grow
    with the map.

    Args:
        input_shape: ``(channels, height, width)``.
        classes: number of outputs.
        depth: convolutions.
        dense: convex-potential dense layers.
        width: channels of the convolutions, at least those of the input.
        inner: rows of each dense layer's weight.
        size: of the paper's networks, where a number is not given: depth, dense and width are 20, 7, 45 (``"S"``), 30,
            10, 60 (``"M"``), 50, 10, 90 (``"L"``), 70, 15, 120 (``"XL"``), and inner is 2048. They have 42 to 245
            million weights for images of 32×32.
        kernel_size: of the convolutions.
        stride: of the convolutions, which keep the map's size: with ``stride = kernel_size`` windows do not overlap,
            and ``N = 1``.

    Raises:
        ConfigurationError: a number is out of range, or there is no such size.
    """
    channels, *sides = image_size(input_shape)
    named = _NAMED[choice("size", size, *_NAMED)]
    depth = whole("depth", named.depth if depth is None else depth)
    dense = whole("dense", named.dense if dense is None else dense, 0)
    width = whole("width", named.width if width is None else width, channels)
    inner = whole("inner", named.inner if inner is None else inner)
    require_positive(classes=classes, kernel_size=kernel_size, stride=stride)
    # Windows of the map's size where it is smaller; zeros around it where they do not divide it.
    window = tuple(min(_WINDOW, side) for side in sides)
    padding = tuple((-side % taps + 1) // 2 for side, taps in zip(sides, window, strict=True))
    features = width
    for side, taps, more in zip(sides, window, padding, strict=True):
        features *= (side + 2 * more) // taps
    convolutions = [ConvexPotentialConv2d(width, kernel_size, bias=False, stride=stride) for _ in range(depth)]
    body = nn.Sequential(
        PadChannels(width),
        *convolutions,
        ScaledAvgPool2d(window, padding=padding),  # type: ignore[arg-type]
        nn.Flatten(),
        *(ConvexPotential(features, inner) for _ in range(dense)),
    )
    head = nn.Linear(features, classes)
    nn.init.orthogonal_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(OrderedDict(body=body, head=head))
