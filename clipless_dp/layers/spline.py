"""Learnable activations: continuous piecewise linear functions given by their slopes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clipless_dp.arguments import not_negative, shown
from clipless_dp.display import Table, Tabular
from clipless_dp.errors import ConfigurationError
from clipless_dp.modules import Unscripted

SplineInit = Literal["identity", "abs", "maxmin", "relu"]


class LinearSpline(Unscripted, nn.Module):
    """A continuous piecewise linear function of each channel, zero at zero, with learnable slopes.

    ``f(x) = Σ_i s_i·φ_i(x)`` where ``φ_i(x)`` is the signed length of ``[0, x]`` within segment ``i``; the first and
    last segments extend to infinity. It is Lipschitz with the largest ``|s_i|``, so a limit of 1 on the slopes
    makes it 1-Lipschitz: any function of that kind on this grid (Bohra, Campos, Gupta, Aziznejad and Unser,
    "Learning activation functions in deep (spline) neural networks", IEEE OJSP 2020; slopes are projected here,
    not re-parametrised).

    The bound of the slopes' gradient, ``G·X``, is the same for any number of segments and any reach: segments share the
    length ``|x|``. Noise of size ``σ`` on each slope moves ``f(x)`` by ``σ(Σφ_i²)^½ ≤ σ|x|``, less where segments
    are more. :class:`clipless_dp.constraints.SplineVariation` takes needless knots away after the noise.

    Args:
        channels: size of the channel axis; 1 shares one function among all entries.
        segments: number of slopes, even, so that 0 is a knot.
        reach: each segment is ``2·reach/segments`` wide, so that knots lie in ``(-reach, reach)``. It is public, as the
            architecture is: choose it for each layer by the size that entries have there for public or made-up rows,
            never by activations of private ones.
        dim: the channel axis.
        init: the fresh function. ``"relu"``; ``"identity"``; ``"abs"``, the absolute value, which preserves norms
            and, away from 0, those of gradients; ``"maxmin"``, absolute values and identities in turn, beginning with
            an absolute value, as ``max(a, b) = (a+b)/2 + |a-b|/2`` and ``min(a, b) = (a+b)/2 - |a-b|/2``: MaxMin up to
            rotations of each pair, which preserves norms too (Ducotterd, Goujon, Bohra, Perdios, Neumayer and Unser,
            "Improving Lipschitz-constrained neural networks by learning activation functions", JMLR 2024, in their
            code).

    Shape:
        ``(B, ...)`` to the same shape; ``slopes`` is ``(channels, segments)``.

    Raises:
        ConfigurationError: ``segments`` is odd or below 2, a size is not positive, ``init`` is another, or is
            ``"maxmin"`` with an odd number of channels, or the channel axis has another size or is the batch axis.
    """

    def __init__(
        self, channels: int = 1, segments: int = 8, reach: float = 1.0, dim: int = 1, *, init: SplineInit = "relu"
    ) -> None:
        super().__init__()
        if channels < 1 or segments < 2 or segments % 2:
            raise ConfigurationError(
                f"channels must be positive and segments even, got channels={channels}, segments={segments}"
            )
        if not 0.0 < reach < math.inf:
            raise ConfigurationError(f"reach must be finite and positive, got {reach}")
        if dim == 0:
            raise ConfigurationError("dim=0 is the batch axis: each channel has a function, not each sample")
        if init not in get_args(SplineInit):
            raise ConfigurationError(f"init must be one of {', '.join(get_args(SplineInit))}, got {shown(init)}")
        if init == "maxmin" and channels % 2:
            raise ConfigurationError(
                f"init='maxmin' needs pairs of channels, one absolute value and one identity, got channels={channels}: "
                "give the number of channels, which must be even, or init='abs'"
            )
        self.channels = channels
        self.segments = segments
        self.reach = float(reach)
        self.dim = dim
        slopes = torch.ones(channels, segments)
        left = slopes[:, : segments // 2]
        if init == "relu":
            left.zero_()
        elif init == "abs":
            left.neg_()
        elif init == "maxmin":
            left[::2].neg_()
        self.slopes = nn.Parameter(slopes)

    def forward(self, values: Tensor) -> Tensor:
        """Applies each channel's function."""
        dim = self.dim % values.dim()
        if dim == 0 or (self.channels > 1 and values.shape[dim] != self.channels):
            raise ConfigurationError(
                f"expected {self.channels} channels on a non-batch axis, got axis {dim} of shape {tuple(values.shape)}"
            )
        step = 2.0 * self.reach / self.segments
        half = self.segments // 2
        position = values.detach() / step
        # NaN stays NaN in the product below, wherever the index puts it.
        segment = torch.nan_to_num(position).clamp(-half, half - 1).floor().long()
        # The end of the segment that is nearer to zero, and the function's value there.
        start = torch.where(segment >= 0, segment, segment + 1)
        right = torch.cumsum(self.slopes[:, half:], 1) * step
        left = torch.cumsum(self.slopes[:, :half].flip(1), 1) * -step
        knots = torch.cat((left.flip(1), torch.zeros_like(left[:, :1]), right), 1)
        if self.channels == 1:
            # No tensor as an index of the one channel, whose value a compiler would ask for.
            slope, value = self.slopes[0][segment + half], knots[0][start + half]
        else:
            channel = torch.arange(self.channels, device=values.device)
            channel = channel.reshape(-1, *([1] * (values.dim() - dim - 1)))
            slope, value = self.slopes[channel, segment + half], knots[channel, start + half]
        return value + slope * (values - step * start.to(values.dtype))

    def extra_repr(self) -> str:
        """Grid and axis."""
        return f"channels={self.channels}, segments={self.segments}, reach={self.reach:g}, dim={self.dim}"


@dataclass(frozen=True)
class SplineRegions:
    """The linear pieces of one layer of splines.

    Attributes:
        path: of the layer; empty for the network itself.
        reach: knots lie in ``(-reach, reach)``.
        segments: pieces that each function may have.
        pieces: that each has, in the order of channels.
    """

    path: str
    reach: float
    segments: int
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class EffectiveRegions(Tabular):
    """The linear pieces of all splines of a network; it prints as a table.

    Attributes:
        layers: one entry for each layer of splines.
        tolerance: adjacent slopes that differ by no more count as one piece.
    """

    layers: tuple[SplineRegions, ...]
    tolerance: float

    @property
    def total(self) -> int:
        """Pieces of all functions together."""
        return sum(sum(layer.pieces) for layer in self.layers)

    @property
    def mean(self) -> float:
        """Pieces of a function on average; NaN where there is no spline."""
        functions = sum(len(layer.pieces) for layer in self.layers)
        return self.total / functions if functions else math.nan

    def _table(self) -> Table:
        rows = [
            (
                layer.path or "(the network)",
                len(layer.pieces),
                f"{layer.reach:g}",
                layer.segments,
                f"{sum(layer.pieces) / len(layer.pieces):.2f}",
                max(layer.pieces),
            )
            for layer in self.layers
        ]
        return Table(
            ("layer", "functions", "reach", "segments", "mean pieces", "most"),
            rows,
            ("left", *5 * ("right",)),
            (f"Adjacent slopes that differ by at most {self.tolerance:g} are one piece.",),
        )


def effective_regions(net: nn.Module, *, tolerance: float = 0.0) -> EffectiveRegions:
    """How many linear pieces each learnt function has: runs of equal slopes among its segments.

    It reads nothing but slopes, so that of a privately trained network it is post-processing. Noise makes all slopes
    differ; behind :class:`clipless_dp.constraints.SplineVariation` those that it made equal are equal to the bit.

    Args:
        net: any module, a wrapped model too.
        tolerance: adjacent slopes that differ by no more are one piece.

    Raises:
        ConfigurationError: the tolerance is negative or not finite.
    """
    tolerance = not_negative("tolerance", tolerance)
    found = []
    for path, module in net.named_modules():
        if isinstance(module, LinearSpline):
            jumps = (module.slopes.detach().double().diff(dim=1).abs() > tolerance).sum(1)
            pieces = tuple(1 + int(count) for count in jumps)
            found.append(SplineRegions(path, module.reach, module.segments, pieces))
    return EffectiveRegions(tuple(found), tolerance)
