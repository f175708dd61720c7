"""Layers that keep the order of coordinates: a box, and a slope that outweighs a network's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.arguments import number
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.gates.plain import plain_form
from clipless_dp.layers.coordinates import INCREASING, chain_slopes, parts_of, refuse_parts
from clipless_dp.modules import Unscripted

SLACK = 2.0**-20
"""By how much, relatively, the slopes of a residual are above what they outweigh: its rounding is far below."""

Side = float | Sequence[float]


class BoxProjection(Unscripted, nn.Module):
    """Cuts each coordinate to an interval: the projection on a box, increasing in each coordinate.

    It is 1-Lipschitz in every ℓp norm, and unlike the projection on a ball (:class:`clipless_dp.layers.BallProjection`)
    it moves no coordinate for the sake of another. In front of a network it bounds the norm of what follows, so that
    ``DPLipModel(..., input_norm=None)`` needs no other input gate.

    Args:
        lo: lower end, for all coordinates or one for each of a sample ``(columns,)``. *Public*: from a code book or the
            units, never the least value of the data.
        hi: upper end, at least ``lo``.

    Shape:
        ``(B, ...)`` to the same shape; with an end for each coordinate ``(B, columns)``. NaN becomes the point of the
        interval that is next to zero.

    Raises:
        ConfigurationError: an end is no finite number, or they are in the wrong order; or they are tensors or arrays,
            which are mostly computed from data.
        InputError: rows have another number of columns.

    Guarantee:
        The norm of an output is at most :meth:`norm`, whatever comes in.
    """

    def __init__(self, lo: Side, hi: Side) -> None:
        super().__init__()
        self.lo, self.hi = _ends("lo", lo), _ends("hi", hi)
        columns = {len(end) for end in (self.lo, self.hi) if isinstance(end, tuple)}
        if len(columns) > 1:
            raise ConfigurationError(f"lo and hi must have an end for each of the same columns, got {sorted(columns)}")
        self.columns = next(iter(columns), None)
        if any(low > high for low, high in self._pairs(self.columns or 1)):
            raise ConfigurationError("lo must be at most hi in each column")

    def _pairs(self, columns: int) -> list[tuple[float, float]]:
        low, high = (end if isinstance(end, tuple) else (end,) * columns for end in (self.lo, self.hi))
        return list(zip(low, high, strict=True))

    def limits(self, columns: int) -> list[float]:
        """The largest size of each coordinate of an output, rounding to float32 included."""
        return [max(abs(low), abs(high)) * (1.0 + 1e-6) for low, high in self._pairs(columns)]

    def norm(self, columns: int) -> float:
        """The largest Euclidean norm of an output of so many coordinates."""
        if self.columns is None:
            return math.sqrt(columns) * self.limits(1)[0] * (1.0 + 1e-12)
        return math.hypot(*self.limits(columns)) * (1.0 + 1e-12)

    @property
    def holds_zero(self) -> bool:
        """Whether zero is in the box: then no norm grows."""
        return all(low <= 0.0 <= high for low, high in self._pairs(self.columns or 1))

    def forward(self, values: Tensor) -> Tensor:
        """Cuts each coordinate."""
        if self.columns is not None and values.shape[1:] != (self.columns,):
            raise InputError(f"expected rows of {self.columns} columns, got {tuple(values.shape)}")
        values = torch.where(torch.isnan(values), torch.zeros_like(values), values)
        low, high = (
            values.new_tensor(end) if isinstance(end, tuple) else torch.full_like(values[:1], end)
            for end in (self.lo, self.hi)
        )
        return torch.minimum(torch.maximum(values, low), high)

    def extra_repr(self) -> str:
        """The ends."""
        return f"lo={self.lo}, hi={self.hi}"


INCREASING[BoxProjection] = (0.0, 1.0)


def _ends(name: str, end: Any) -> float | tuple[float, ...]:
    if isinstance(end, Tensor) or hasattr(end, "__array__"):
        raise ConfigurationError(
            f"{name} must be a number, or a list of numbers: the ends of a box are public, written down without a look "
            "at the data, of which tensors and arrays are mostly made"
        )
    if isinstance(end, Sequence) and not isinstance(end, str) and len(end):
        return tuple(_end(name, one) for one in end)
    return _end(name, end)


def _end(name: str, end: Any) -> float:
    found = number(name, end)
    if not abs(found) <= 1e18:
        raise ConfigurationError(f"{name} must lie within 1e18 of zero, got {end!r}")
    return found


class MonotoneLift(Unscripted, nn.Module):
    """``λ_1·s_1·x_1 + … + λ_n·s_n·x_n`` for each of the outputs of a network, of which no parameter is learnt.

    Args:
        signs: ``s``.
        outputs: how many.
        slope: ``λ``, numbers; ``None`` where ``bounds`` tells them anew at each pass.
        bounds: of the network beside it, a method.

    Shape:
        ``(B, n)`` to ``(B, outputs)``, summed in float64.
    """

    def __init__(self, signs: tuple[int, ...], outputs: int, slope: tuple[float, ...] | None, bounds: Any) -> None:
        super().__init__()
        self.signs, self.outputs, self.slope = signs, outputs, slope
        # A method, which is one and the same however the weights of its network change.
        self.bounds: Any = None if slope is not None else bounds

    @property
    def reads_weights(self) -> bool:
        """Whether it changes with the weights of the network beside it."""
        return self.slope is None

    def slopes(self) -> Tensor:
        """``λ_i·s_i``, ``(n,)`` in float64, slack included."""
        signs = torch.tensor(self.signs, dtype=torch.float64)
        found = self.bounds() if self.slope is None else torch.tensor(self.slope, dtype=torch.float64)
        return signs * found * (1.0 + SLACK)

    def matrix(self) -> Tensor:
        """What it multiplies by, ``(outputs, n)`` in float64."""
        return self.slopes().expand(self.outputs, -1)

    def forward(self, values: Tensor) -> Tensor:
        """Sums up."""
        if values.dim() != 2 or values.shape[1] != len(self.signs):
            raise InputError(f"expected rows of {len(self.signs)} columns, got {tuple(values.shape)}")
        wide = values.dtype if values.device.type == "mps" else torch.float64
        slopes = self.slopes().to(values.device, wide)
        lifted = (values.to(wide) * slopes).sum(1, keepdim=True).to(values.dtype)
        return lifted.expand(-1, self.outputs)

    def extra_repr(self) -> str:
        """Signs and slopes."""
        return f"signs={self.signs}, slope={self.slope}"


@plain_form(MonotoneLift)
def _fixed(lift: MonotoneLift) -> nn.Module:
    """With the slopes of now as numbers: exporters cannot follow how they are read off the weights."""
    if not lift.reads_weights:
        return lift
    return MonotoneLift(lift.signs, lift.outputs, tuple(lift.bounds().tolist()), None)


class MonotoneResidual(nn.Module):
    """``g(x) = f(x) + λ·Σ_i s_i·x_i``: increasing where ``s_i = 1``, decreasing where ``s_i = -1`` (Kitouni 2023, §3).

    ``λ_i`` outweighs what ``f`` can lose: for any ``x`` and ``y``, ``f(y) - f(x) = J(y - x)`` with entries of ``J``
    above ``-λ_i`` times the sign, so that more of coordinate ``i`` never moves any output against its sign. The
    residual has no parameters, costs no privacy, and changes no gradient of a parameter.

    Args:
        net: ``f``, a chain (``nn.Sequential``) of ``nn.Linear``, ``nn.ReLU``, ``nn.LeakyReLU``, ``nn.Tanh``,
            :class:`GroupSort`, :class:`MaxMin`, :class:`FullSort` and :class:`BoxProjection`.
        signs: for each column 1, -1, or 0 where ``g`` may do as it likes.
        slope: ``λ``, one for all, or one for each column; fixed then: constraints must keep the slopes of ``f`` below
            it (:class:`clipless_dp.constraints.EntryBound`, :class:`clipless_dp.constraints.RowSum`), and
            :func:`clipless_dp.monotone.certificate` says whether they are. ``None``: what the weights ask for, computed
            at each pass, in which gradients take it for a constant. ``torch.export`` cannot follow that: export what
            ``export_net()`` of a model or a table returns, in which the slopes are numbers.

    Shape:
        ``(B, columns)`` to ``(B, outputs)``.

    Raises:
        UnsupportedModuleError: ``f`` has a layer whose slopes by coordinate are not known, or which is in the way: a
            signal gate, a normalisation, a Householder activation. Each is named with the reason.
        ConfigurationError: signs or slopes are none, or not one for each column.
    """

    def __init__(self, net: nn.Module, signs: Sequence[int], slope: float | Sequence[float] | None = None) -> None:
        super().__init__()
        refuse_parts(parts_of(net))
        outputs, columns = chain_slopes(net).low.shape
        self.net = net
        self.lift = MonotoneLift(_signs(signs, columns), outputs, _slopes(slope, columns), self.slope_bounds)

    @torch.no_grad()
    def slope_bounds(self) -> Tensor:
        """How far ``f`` can fall, at most, per unit of each column in the direction of its sign: ``(columns,)``."""
        if any(hasattr(one, "placements") for one in self.net.parameters()):
            raise ConfigurationError(
                "slopes that follow the weights need them whole, of which each rank holds a part: give slope="
            )
        found = chain_slopes(self.net)
        falling = torch.where(torch.tensor(self.lift.signs) >= 0, -found.low, found.high)
        return falling.amax(0).clamp(min=0.0)

    def forward(self, values: Tensor) -> Tensor:
        """Adds the lift to the network's output."""
        output: Tensor = self.net(values) + self.lift(values)
        return output


def _signs(signs: Any, columns: int) -> tuple[int, ...]:
    if not isinstance(signs, Sequence) or isinstance(signs, str) or any(sign not in (-1, 0, 1) for sign in signs):
        raise ConfigurationError(f"signs must be 1, -1 or 0, one for each column, got {signs!r}")
    if len(signs) != columns:
        raise ConfigurationError(f"signs must be one for each of {columns} columns, got {len(signs)}")
    if not any(signs):
        raise ConfigurationError("signs are all 0: nothing is to be monotone, and the network can be used by itself")
    return tuple(int(sign) for sign in signs)


def _slopes(slope: Any, columns: int) -> tuple[float, ...] | None:
    if slope is None:
        return None
    given = list(slope) if isinstance(slope, (Sequence, Tensor)) and not isinstance(slope, str) else [slope] * columns
    found = tuple(number("slope", float(one) if isinstance(one, Tensor) else one) for one in given)
    if len(found) != columns or not all(0.0 <= one <= 1e18 for one in found):
        raise ConfigurationError(f"slope must be a number of at least 0, or {columns} of them, got {slope!r}")
    return found
