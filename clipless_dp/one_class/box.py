"""The public box that rows lie in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipless_dp.arguments import shown, unmasked
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.sampling.cells import readable
from clipless_dp.tensor_types import plain

_WANTED = (
    "the domain is part of what is released, so it must be public: a range that is known without the data, as of "
    "pixels or by what a column means. Minima and maxima of private rows are rows' own values. Where no range is "
    "known, release a scale first (clipless_dp.statistics.private_standardisation: its columns lie in [-4, 4])"
)


class BoxProjection(nn.Module):
    """``clamp(x, lo, hi) - (lo + hi)/2``: the nearest point of a box, seen from the box's centre; 1-Lipschitz.

    A projection onto a convex set moves no two points apart, so that a radius that is certified behind it holds for
    rows as they are, those outside of the box too.

    Args:
        low: lower end: a plain number, or one for each entry of the first axis of a sample (columns, channels).
        high: upper end, likewise.
        input_shape: of one sample.

    Shape:
        ``(B, *input_shape)`` to the same shape. NaN stays NaN.

    Raises:
        ConfigurationError: an end is no plain number, as what is computed from data is not; or the box is empty.

    Attributes:
        lipschitz: 1.
        radius: half of the diagonal, rounded up: no projected sample has a larger norm.
    """

    low: Tensor
    high: Tensor
    lipschitz = 1.0

    def __init__(self, low: Any, high: Any, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        lows, highs = _ends("lower", low, input_shape), _ends("upper", high, input_shape)
        wide = max(len(lows), len(highs))
        lows, highs = lows * (wide // len(lows)), highs * (wide // len(highs))
        if not all(math.isfinite(b - a) and a < b for a, b in zip(lows, highs, strict=True)):
            raise ConfigurationError(f"the domain must have lo < hi, both finite, got {shown((low, high))}")
        self.input_shape = input_shape
        # A number for all columns stands for each of them.
        each = math.prod(input_shape) / len(lows)
        shape = (len(lows), *[1] * (len(input_shape) - 1))
        self.register_buffer("low", torch.tensor(lows).reshape(shape))
        self.register_buffer("high", torch.tensor(highs).reshape(shape))
        halves = self.reach.double()
        self.radius = math.sqrt(each * float((halves * halves).sum())) * (1.0 + 1e-5)
        if not (bool((self.low < self.high).all()) and bool((halves > 0.0).all()) and math.isfinite(self.radius)):
            raise ConfigurationError(
                f"the domain {shown((low, high))} is empty or infinite in float32, which rows are read in: ends must "
                "differ there, and be below 3.4e38"
            )

    @property
    def centre(self) -> Tensor:
        """``(lo + hi)/2``."""
        return 0.5 * self.low + 0.5 * self.high

    @property
    def reach(self) -> Tensor:
        """``(hi - lo)/2``: the box reaches so far from its centre along each axis."""
        return 0.5 * self.high - 0.5 * self.low

    def forward(self, rows: Tensor) -> Tensor:
        """The nearest points, from the centre."""
        return rows.clamp(self.low, self.high) - self.centre

    def uniform(self, count: int, generator: torch.Generator) -> Tensor:
        """So many points that are uniform in the box, from its centre."""
        unit = torch.rand(count, *self.input_shape, generator=generator).to(self.low)
        return (2.0 * unit - 1.0) * self.reach

    def inside(self, points: Tensor) -> Tensor:
        """The nearest points of the box to such, both from its centre."""
        return points.clamp(-self.reach, self.reach)

    def extra_repr(self) -> str:
        """The ends."""
        return f"low={self.low.flatten().tolist()!r:.60}, high={self.high.flatten().tolist()!r:.60}"


def public_box(domain: Any, input_shape: tuple[int, ...]) -> BoxProjection:
    """The box of a domain ``(lo, hi)``.

    Raises:
        ConfigurationError: there is none, or it may have been computed from data.
    """
    if domain is None:
        raise ConfigurationError(f"domain=(lo, hi) is missing: {_WANTED}")
    if not isinstance(domain, (tuple, list)) or len(domain) != 2:
        raise ConfigurationError(f"domain must be a pair (lo, hi), got {shown(domain)}: {_WANTED}")
    low, high = domain
    return BoxProjection(low, high, input_shape)


def _ends(name: str, given: Any, input_shape: tuple[int, ...]) -> list[float]:
    listed = given if isinstance(given, (tuple, list)) else [given]
    # Exact types: what comes out of an array or a tensor, numbers of numpy too, was computed from something.
    if not all(type(end) in (int, float) and math.isfinite(_float(end)) for end in listed):
        raise ConfigurationError(
            f"the {name} end of the domain must be plain finite numbers, written down and not computed, got "
            f"{shown(given)}: {_WANTED}"
        )
    if len(listed) not in (1, input_shape[0]):
        raise ConfigurationError(
            f"the {name} end of the domain has {len(listed)} numbers for {input_shape[0]} columns or channels"
        )
    return [float(end) for end in listed]


def _float(end: float) -> float:
    try:
        return float(end)
    except OverflowError:
        return math.inf


def require_rows(rows: object, input_shape: tuple[int, ...] | None = None) -> Tensor:
    """Rows ``(N, ...)`` as a float32 tensor: an array, a data frame of numbers, a tensor, or lists of numbers.

    Finite numbers beyond float32 become its largest, outside of every box as they are, and never infinite: what passes
    here once passes again.

    Raises:
        InputError: they are no floating-point numbers of the shape, there are none, or some are not finite or masked.
    """
    table = _as_tensor(unmasked("rows", rows))
    if table.dim() < 2 or not table.is_floating_point() or not table.numel():
        told = "" if table.is_floating_point() else ": take whole numbers as rows.astype(float), where that is meant"
        raise InputError(f"expected floating-point rows (N, ...), got {table.dtype} {tuple(table.shape)}{told}")
    if input_shape is not None and tuple(table.shape[1:]) != input_shape:
        raise InputError(f"expected rows (N, {', '.join(map(str, input_shape))}), got {tuple(table.shape)}")
    if not bool(table.isfinite().all()):
        raise InputError(
            "some rows hold NaN or infinite numbers, which lie nowhere in the domain: fill them by a public number, or "
            "leave these rows out. Nothing was charged for this call"
        )
    most = torch.finfo(torch.float32).max
    return (table.clamp(-most, most) if table.dtype == torch.float64 else table).float()


def _as_tensor(rows: object) -> Tensor:
    if isinstance(rows, Tensor):
        if rows.layout is not torch.strided:
            raise InputError(f"expected dense rows (N, ...), got a tensor of layout {rows.layout}: rows.to_dense()")
        return plain(rows, "the data").detach()
    try:
        values = np.asarray(readable("rows", rows))
        return torch.as_tensor(values.astype(values.dtype.newbyteorder("="), copy=not values.flags.writeable))
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"expected floating-point rows (N, ...), got a {type(rows).__name__} that is no array of numbers "
            f"({reason:.120})"
        ) from error
