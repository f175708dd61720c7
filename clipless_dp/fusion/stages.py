"""The stages of a chain: one layer with the gates and the ReLU around it, and what it keeps for the way back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp.gates import BallProjection, CotangentGate, GradientGatedConv2d, GradientGatedLinear, SphereScaling

_BLOCK_ENTRIES = 1 << 17
"""Entries of an activation at once on each thread: in float32 half a megabyte, so that two fit a core's cache."""


class Entry(NamedTuple):
    """The input gate that the network's inputs have yet to pass.

    Attributes:
        norms: of the inputs, ``(B,)``.
        radius: of the gate.
        whole: whether none of them is lost in the gate.
    """

    norms: Tensor
    radius: float
    whole: bool


class Stage(NamedTuple):
    """One layer with what is around it.

    Attributes:
        layer: a linear layer, which may have gradient gates, or a convolution.
        before: the gate on its input.
        behind: the gate on its output's cotangent.
        rectified: whether a ReLU follows.
        interleaved: whether maps are to lie in memory channels last.
        pool: the max pooling that follows, of maps in tiles. It is first: what else is done is done to what it leaves.
    """

    layer: nn.Linear | nn.Conv1d | nn.Conv2d
    before: BallProjection | SphereScaling | None
    behind: CotangentGate | None
    rectified: bool
    interleaved: bool
    pool: nn.MaxPool2d | None = None

    @property
    def gradient_gate(self) -> GradientGatedLinear | None:
        """The layer, where it caps the gradients of its own parameters."""
        return self.layer if isinstance(self.layer, GradientGatedLinear) else None

    @property
    def measures(self) -> bool:
        """Whether it needs the norms of its input."""
        return self.before is not None or self.gradient_gate is not None

    @property
    def floor(self) -> float:
        """The norm below which the gate before the layer stretches by a constant."""
        return self.before.floor if isinstance(self.before, SphereScaling) else cast(BallProjection, self.before).radius

    def geometry(self) -> tuple[Any, ...]:
        """Arguments of a convolution."""
        layer = cast(nn.Conv2d, self.layer)
        return layer.stride, layer.padding, layer.dilation, False, (0,) * len(layer.kernel_size), layer.groups

    def apply(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer alone."""
        if isinstance(self.layer, nn.Linear):
            return functional.linear(values, weight, bias)
        output: Tensor = torch.ops.aten.convolution(values, weight, bias, *self.geometry())
        return output

    def broadcast(self, bias: Tensor) -> Tensor:
        """A bias in a shape that fits the output."""
        return bias if isinstance(self.layer, nn.Linear) else bias.reshape(-1, *[1] * len(self.layer.kernel_size))

    def totals(self, maps: Tensor) -> Tensor:
        """Sums over positions: what is of the output's shape, to ``(B, O)``."""
        positions = range(1, maps.dim() - 1) if isinstance(self.layer, nn.Linear) else range(2, maps.dim())
        return maps.sum(tuple(positions)) if positions else maps

    def reference(self, values: Tensor) -> Tensor:
        """The same by the modules themselves."""
        values = values if self.before is None else self.before(values)
        values = self.layer(values)
        values = values if self.behind is None else self.behind(values)
        values = torch.relu(values) if self.rectified else values
        return values if self.pool is None else cast(Tensor, self.pool(values))

    def pooled(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The largest entry of each tile, and its index."""
        found: tuple[Tensor, Tensor] = torch.ops.aten.max_pool2d_with_indices(maps, *_tiling(cast(Any, self.pool)))
        return found

    def spread(self, cotangents: Tensor, indices: Tensor, size: torch.Size) -> Tensor:
        """Cotangents of the largest entries as those of maps of some size."""
        # Of the maps their size and order are read, and nothing else.
        shape = len(cotangents), *size
        maps = torch.empty(shape, dtype=cotangents.dtype, device=cotangents.device, memory_format=torch.channels_last)
        found: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            cotangents, maps, *_tiling(cast(Any, self.pool)), indices
        )
        return found


def _pair(number: int | tuple[int, ...]) -> tuple[int, ...]:
    return (number, number) if isinstance(number, int) else tuple(number)


def _tiling(pool: nn.MaxPool2d) -> tuple[Any, ...]:
    sizes = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    return *(list(_pair(size)) for size in sizes), pool.ceil_mode


def pools_tiles(pool: nn.Module | None) -> bool:
    """Whether it is a max pooling that reads each entry once at most: cotangents that it spreads keep their norm."""
    return (
        type(pool) is nn.MaxPool2d
        and _pair(pool.kernel_size) == _pair(pool.stride)
        and _tiling(pool)[2:] == ([0, 0], [1, 1], False)
        and not pool.return_indices
    )


class Interleaved(nn.Module):
    """A convolution whose maps lie in memory channels last, because a max pooling follows.

    Torch pools such maps several times faster on a CPU, and what a convolution returns lies as its weight does.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        """As the layer itself."""
        layer, weight = self.layer, channels_last(self.layer.weight)
        if isinstance(layer, GradientGatedConv2d):
            return layer.with_weight(values, weight)
        output: Tensor = layer._conv_forward(values, weight, layer.bias)
        return output


def channels_last(weight: Tensor) -> Tensor:
    """A weight that lies in memory channels last, as then does what a convolution by it returns."""
    return weight.to(memory_format=torch.channels_last)


def blocks(values: Tensor, limit: int = 0) -> list[slice]:
    """Rows of a batch in parts of about one size, with so many entries."""
    batch = values.shape[0]
    count = min(batch, round(values.numel() / ((limit or _BLOCK_ENTRIES) * torch.get_num_threads())))
    if count <= 1:
        return [slice(0, batch)]
    step = math.ceil(batch / count)
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def rows_of(values: Tensor, rows: slice) -> Tensor:
    """Some rows of a batch; the batch itself where these are all, as of :func:`blocks` of a small one."""
    return values if rows == slice(0, values.shape[0]) else values[rows]


def joined(parts: list[Tensor]) -> Tensor:
    """What was computed of parts of a batch, in one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Kept(NamedTuple):
    """What a stage keeps for the way back.

    Attributes:
        values: its input; the rows that count come first, ``rows`` of them, and the rest is left out of gradients.
        scales: what the gates multiply each sample by, ``(B,)``.
        norms: of its input, ``(B,)``.
        lost: indices of the samples that the gates made zero, or would shrink by more than 1e27.
        rows: as above.
        largest: where a pooling follows, the indices of its tiles' largest entries.
        size: of the maps that it pools, without the axis of samples.
    """

    values: Tensor
    scales: Tensor | None
    norms: Tensor | None
    lost: Tensor | None
    rows: int
    largest: Tensor | None = None
    size: torch.Size = torch.Size()
