"""Dense networks, for tables and small images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from clipless_dp.architectures.parts import isometric_, require_even, require_positive
from clipless_dp.arguments import members, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.layers import ConvexPotential, Diagonal, DistanceLinear, GroupSort, SortLinear, StructuredLinear


def _entries(input_shape: tuple[int, ...]) -> int:
    if not input_shape or min(input_shape) < 1:
        raise ConfigurationError(f"input_shape must be (columns,) or (channels, height, width), got {input_shape}")
    return math.prod(input_shape)


def mlp(input_shape: tuple[int, ...], classes: int, *, widths: Sequence[int] = (128, 64)) -> nn.Sequential:
    """Dense layers with GroupSort between them (Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation",
    ICML 2019).

    Each layer's Δ is at most ``G·√(X² + 1)``: nothing is shared among positions.

    Args:
        input_shape: of one sample: a row of a table, or an image, which is flattened.
        classes: number of outputs.
        widths: of the hidden layers, even.

    Raises:
        ConfigurationError: a size is out of range.
    """
    require_positive(classes=classes)
    require_even("widths", tuple(widths))
    parts: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    size = _entries(input_shape)
    for width in widths:
        parts += [nn.Linear(size, width), GroupSort(2)]
        size = width
    return isometric_(nn.Sequential(*parts, nn.Linear(size, classes)))


def residual_mlp(input_shape: tuple[int, ...], classes: int, *, width: int = 64, depth: int = 3) -> nn.Sequential:
    """A dense layer, convex-potential residual layers, a dense layer (Meunier et al., "A dynamical system perspective
    for Lipschitz neural networks", ICML 2022).

    A residual layer reads its weight twice: its Δ is about four times that of a dense layer.

    Args:
        input_shape: of one sample: a row of a table, or an image, which is flattened.
        classes: number of outputs.
        width: of every hidden layer.
        depth: number of residual layers.

    Raises:
        ConfigurationError: a size is out of range.
    """
    require_positive(classes=classes, width=width, depth=depth)
    parts: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    parts.append(nn.Linear(_entries(input_shape), width))
    parts += [ConvexPotential(width) for _ in range(depth)]
    return isometric_(nn.Sequential(*parts, nn.Linear(width, classes)))


def sort_mlp(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    widths: Sequence[int] = (128, 128),
    quantile: float | None = 0.3,
    terms: int = 10,
    p: float = math.inf,
) -> nn.Sequential:
    """Layers of weighted order statistics of differences (Zhang, Jiang, He and Wang, "Rethinking Lipschitz neural
    networks and certified robustness: a Boolean function perspective", NeurIPS 2022), or of distances.

    1-Lipschitz in the maximum norm whatever the weights are, without constraints and gates. A layer's Δ is at most
    ``G₁·√2`` at any depth, and does not grow with the wrapper's ``input_norm``: take it large, ``10·√n`` say of entries
    in [0, 1], since certificates end where the input gate begins.

    Args:
        input_shape: of one sample: a row of a table, or an image, which is flattened.
        classes: number of outputs.
        widths: of the hidden layers.
        quantile: of each :class:`~clipless_dp.layers.SortLinear`; ``None``:
            :class:`~clipless_dp.layers.DistanceLinear`, of means where ``p`` is finite.
        terms: of each ``SortLinear``.
        p: of each ``DistanceLinear``; :func:`clipless_dp.training.relaxation` lets it grow.

    Raises:
        ConfigurationError: a size is out of range, or ``p`` is given with a quantile.
    """
    require_positive(classes=classes)
    if quantile is not None and p != math.inf:
        raise ConfigurationError("p is the exponent of distances: give quantile=None with it")
    hidden = [whole("each of widths", width) for width in members("widths", widths, "sizes of hidden layers")]
    sizes = [_entries(input_shape), *hidden, classes]
    parts: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    for entries, width in pairwise(sizes):
        if quantile is None:
            parts.append(DistanceLinear(entries, width, p=p, mean=True))
        else:
            parts.append(SortLinear(entries, width, quantile, terms=terms))
    return nn.Sequential(*parts)


def circulant_mlp(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    depth: int = 1,
    structure: Literal["circulant", "skew"] = "circulant",
) -> nn.Sequential:
    """Circulant and diagonal layers in turn, sorted in pairs, and a dense layer (Araujo, Negrevergne, Chevaleyre and
    Atif, "Understanding and training deep diagonal circulant neural networks", ECAI 2020).

    A layer has ``2n`` parameters for ``n`` entries in place of ``n²``, with the Δ of a dense one: the noise on it is
    less by as much. Nothing has a bias.

    Args:
        input_shape: of one sample: a row of a table, or an image, which is flattened. Its number of entries is even.
        classes: number of outputs.
        depth: pairs of a circulant and a diagonal layer.
        structure: ``"circulant"`` or ``"skew"``.

    Raises:
        ConfigurationError: a size is out of range.
    """
    require_positive(classes=classes, depth=depth)
    size = _entries(input_shape)
    require_even("the number of entries", (size,))
    if structure not in ("circulant", "skew"):
        raise ConfigurationError(f"structure must be 'circulant' or 'skew', got {structure!r}")
    parts: list[nn.Module] = [nn.Flatten()] if len(input_shape) > 1 else []
    for _ in range(depth):
        parts += [StructuredLinear(size, size, structure, bias=False), Diagonal(size), GroupSort(2)]
    return isometric_(nn.Sequential(*parts, nn.Linear(size, classes, bias=False)))
