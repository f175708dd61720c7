"""The Householder activation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipless_dp.arguments import shown
from clipless_dp.errors import ConfigurationError
from clipless_dp.layers.pairing import Paired, Pairing


class Householder(Paired):
    """Reflects each pair of channels across learnable lines, where it lies on their far side.

    *Order 1.* For a pair ``z = (z₁, z₂)`` and its angle ``θ``, with ``v = (sin θ/2, -cos θ/2)``: ``z`` itself where
    ``z·v > 0``, else ``(I - 2vvᵀ)z = (z₁cos θ + z₂sin θ, z₁sin θ - z₂cos θ)`` (Singla, Singla and Feizi, "Improved
    deterministic l2 robustness on CIFAR-10 and CIFAR-100", ICLR 2022, §5). ``θ = π/2`` is MaxMin.

    *Order 2.* Four sectors meet in 0, beginning at the angle ``α/2``, of widths ``ω/2``, ``γ/2``, ``π - ω/2`` and
    ``π - γ/2`` (of the same authors, whose code has ``(θ₀, θ₁, θ₂) = (α, ω, γ)``). In turn: ``z`` itself; its
    reflection across the line at ``β/2``, ``β = α + ω``; that reflected again across the line at ``(β-γ)/2``, both a
    rotation by ``-γ``; and ``z``'s reflection across the line at ``α/2``. Neighbours agree on the ray between them.
    ``theta`` holds ``(α, β, γ)``, so that each sector's map depends on one angle at most; ``ω`` and ``γ`` count modulo
    ``2π`` in the widths. Fresh ones make four quarters, absolute values in coordinates turned by 45 degrees; with
    ``γ = 2π - ω`` the result is a composition of two of order 1, with ``γ = 0`` it is of order 1.

    Continuous, piecewise orthogonal, hence norm-preserving and 1-Lipschitz. In float32 the borders between the sectors
    of order 2 round with the angles, and outputs jump there: by about ``1e-7·|z|`` for angles of size 1, by
    ``7e-5·|z|`` for 1000. Gradients' bounds do not rest on it.

    Args:
        channels: size of the channel axis, even; each pair has angles of its own.
        dim: the channel axis, as in :class:`GroupSort`.
        order: 1, or 2 for up to two reflections.
        pairing: as in :class:`GroupSort`.

    Shape:
        ``(B, ...)`` to the same shape; ``theta`` is ``(channels/2,)``, or ``(3, channels/2)`` for order 2, in radians.

    Raises:
        ConfigurationError: ``channels`` is odd, the order or pairing is another, or the input's channel axis has
            another size or is the batch axis.
    """

    # Of the class too, so that modules that a former version saved have it.
    order: int = 1

    def __init__(self, channels: int, dim: int = 1, *, order: int = 1, pairing: Pairing = "adjacent") -> None:
        super().__init__(pairing)
        if channels < 2 or channels % 2:
            raise ConfigurationError(f"channels must be even, got {channels}")
        if dim == 0:
            raise ConfigurationError("dim=0 is the batch axis: pairing along it would mix samples")
        if order not in (1, 2):
            raise ConfigurationError(f"order must be 1 or 2, got {shown(order)}")
        self.channels = channels
        self.dim = dim
        self.order = order
        theta = torch.full((channels // 2,), math.pi / 2)
        if order == 2:
            theta = torch.stack((theta, 3.0 * theta, 2.0 * theta))
        self.theta = torch.nn.Parameter(theta)

    def forward(self, values: Tensor) -> Tensor:
        """Reflects pair by pair."""
        dim = self.dim % values.dim()
        if dim == 0 or values.shape[dim] != self.channels:
            raise ConfigurationError(
                f"expected {self.channels} channels on a non-batch axis, got axis {dim} of shape {tuple(values.shape)}"
            )
        first, second = self._pairs(values, dim)
        theta = self.theta.reshape(*self.theta.shape, *([1] * (first.dim() - dim - 1)))
        fold = _folded_once if self.order == 1 else _folded_twice
        return self._joined(*fold(first, second, theta), dim)

    def extra_repr(self) -> str:
        """Channels and axis, and what is not the default."""
        order = "" if self.order == 1 else f", order={self.order}"
        pairing = "" if self.pairing == "adjacent" else f", pairing={self.pairing!r}"
        return f"channels={self.channels}, dim={self.dim}{order}{pairing}"


def _folded_once(first: Tensor, second: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    near = first * torch.sin(theta / 2) > second * torch.cos(theta / 2)
    cos, sin = torch.cos(theta), torch.sin(theta)
    reflected = first * cos + second * sin, first * sin - second * cos
    return torch.where(near, first, reflected[0]), torch.where(near, second, reflected[1])


def _folded_twice(first: Tensor, second: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    turn = 2.0 * math.pi
    start, mirror, rotation = theta.unbind(0)
    with torch.no_grad():
        width, next_width = torch.remainder(mirror - start, turn) / 2, torch.remainder(rotation, turn) / 2
        angle = torch.remainder(torch.atan2(second, first) - start / 2, turn)
        kept = angle < width
        mirrored = ~kept & (angle < width + next_width)
        rotated = ~kept & ~mirrored & (angle < next_width + math.pi)
    # A sector's map is (c·z₁ + s·z₂, ±(s·z₁ - c·z₂)), with + for reflections.
    at = torch.where(mirrored, mirror, torch.where(rotated, rotation, start))
    cos, sin = torch.cos(at), torch.sin(at)
    moved = first * cos + second * sin, first * sin - second * cos
    reflected = torch.where(rotated, -moved[1], moved[1])
    return torch.where(kept, first, moved[0]), torch.where(kept, second, reflected)
