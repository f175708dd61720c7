"""The step ``x - 2Wᵀσ(Wx + b)`` of a convex potential, and what comes back to its weight, which it reads twice."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_variadic

from clipless_dp.gates.arithmetic import UNDERFLOW, per_sample, sample_norms, sample_products, zeroed_rows
from clipless_dp.gates.convolutions import Kernel
from clipless_dp.gates.gradient import CANCELLED, Tokens
from clipless_dp.gates.parts import Part, Rows, _Simple

Windows = tuple[int, int]
"""Padding and stride of the convolution that ``W`` is."""

Pair = tuple[Tensor, Tensor]
"""What a weight meets, and what arrives at its products."""


def convex_step(values: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows | None = None) -> Tensor:
    """``x - 2Wᵀ relu(Wx + b)``.

    Args:
        values: ``(B, ..., features)``; with ``windows`` maps ``(B, channels, H, W)``.
        weight: ``(hidden, features)``, or ``(hidden, channels, k, k)``.
        bias: ``(hidden,)``.
        windows: padding and stride of the convolution that ``W`` is; ``None``: a matrix.
    """
    # As functions of torch, so that what gates gradients sample by sample sees one function in place of its parts.
    if has_torch_function_variadic(values, weight, bias):
        given = (values, weight, bias)
        found: Tensor = handle_torch_function(convex_step, given, values, weight, bias, windows)
        return found
    return taken(values, weight, bias, windows)[0]


def taken(values: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows | None) -> tuple[Tensor, Tensor]:
    """The step, and ``relu(Wx + b)``."""
    hidden = functional.relu(_raised(values, weight, bias, windows))
    return values - 2.0 * _lowered(hidden, weight, list(values.shape), windows), hidden


def _raised(values: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows | None) -> Tensor:
    """``Wx + b``."""
    if windows is None:
        return functional.linear(values, weight, bias)
    padding, stride = windows
    return functional.conv2d(values, weight, bias, stride, padding)


def _lowered(hidden: Tensor, weight: Tensor, shape: list[int], windows: Windows | None) -> Tensor:
    """``Wᵀs``, in the shape of the values."""
    if windows is None:
        return functional.linear(hidden, weight.t())
    padding, stride = windows
    # Rows and columns behind the last window, which no window reads.
    rest = [(shape[axis] + 2 * padding - weight.shape[axis]) % stride for axis in (-2, -1)]
    return functional.conv_transpose2d(hidden, weight, None, stride, padding, rest)


class OuterPair(_Simple):
    """Gradients ``a bᵀ + c dᵀ`` of a weight that meets two vectors of each sample.

    ``‖a bᵀ + c dᵀ‖² = ‖a‖²‖b‖² + ‖c‖²‖d‖² + 2⟨a, c⟩⟨b, d⟩``.

    Args:
        first: ``b`` and ``a``, ``(B, K)`` and ``(B, O)``.
        second: ``d`` and ``c``.
    """

    def __init__(self, first: Pair, second: Pair) -> None:
        (self._b, b), (self._a, a) = map(zeroed_rows, first)
        (self._d, d), (self._c, c) = map(zeroed_rows, second)
        self._lengths = a, b, c, d
        self.present = torch.maximum(a * b, c * d)

    def norms(self) -> Tensor:
        """As :class:`Part`."""
        a, b, c, d = (one.double() + UNDERFLOW for one in self._lengths)
        first, second = a * b, c * d
        unit = torch.finfo(self._a.dtype).eps / 2
        rounding = 1.01 * (self._a.shape[1] + self._b.shape[1] + 16) * unit
        along, across = sample_products(self._a, self._c).double(), sample_products(self._b, self._d).double()
        squares = first.square() + second.square() + 2.0 * along * across
        # Products of norms, and of inner products, are off by their sums' rounding, and by what underflows in these:
        # the root is then at least the true norm.
        lost = 2.0 * rounding * (first.square() + second.square()) + 4.0 * UNDERFLOW**2 * (a * c + b * d)
        norms = (squares.clamp(min=0.0) + lost).sqrt()
        return torch.maximum(norms, CANCELLED * (first + second)).to(self._lengths[0].dtype)

    def total(self, factors: Tensor) -> Tensor:
        """As :class:`Part`."""
        column = factors.to(self._a.dtype).unsqueeze(1)
        return (self._a * column).t() @ self._b + (self._c * column).t() @ self._d


def balanced(first: Pair, second: Pair) -> tuple[Pair, Pair]:
    """Pairs of the same products, in which what the weight meets has norm 1 in both.

    Norms are then those of both products together: the shares below which a sum counts as cancelled are of these.
    """

    def scaled(values: Tensor, cotangents: Tensor) -> Pair:
        values, sizes = zeroed_rows(values)
        sizes = sizes.clamp(min=UNDERFLOW).to(values.dtype)
        return values / per_sample(sizes, values), cotangents * per_sample(sizes, cotangents)

    return scaled(*first), scaled(*second)


def returned(
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    cotangents: Tensor,
    windows: Windows | None,
    chunk: int,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Part | None, Part | None]:
    """What goes back to the input, and each sample's gradients of weight and bias.

    With ``s = relu(Wx + b)`` and ``u = D W g``, ``D`` the ReLU's slopes: ``g - 2Wᵀu``, ``-2(s gᵀ + u xᵀ)`` and ``-2u``,
    summed over positions.

    Args:
        values: ``x``.
        weight: ``W``.
        bias: ``b``.
        hidden: ``s``.
        cotangents: ``g``.
        windows: as of :func:`convex_step`.
        chunk: samples at once, of several positions; 0: as many as fit a small memory.
        wants: which of the three are asked for.
    """
    if torch.is_grad_enabled():
        # What the way back returns has a graph of its own, in which s follows from the values.
        hidden = functional.relu(_raised(values, weight, bias, windows))
    back = -2.0 * torch.where(hidden > 0.0, _raised(cotangents, weight, None, windows), 0.0)
    passed = cotangents + _lowered(back, weight, list(values.shape), windows) if wants[0] else None
    of_weight: Part | None = None
    of_bias: Part | None = None
    if wants[1]:
        of_weight = _weight_part((cotangents, -2.0 * hidden), (values, back), weight, windows, chunk)
        # Nothing came back where no cotangent did, whatever the values are.
        of_weight.present = zeroed_rows(cotangents)[1]
    if wants[2]:
        rows = back.flatten(2).mT if windows is not None else _positions(back)
        several = rows.shape[1] > 1
        of_bias = Rows(rows.sum(1), (rows.shape[2],), sample_norms(rows) if several else None)
    return passed, of_weight, of_bias


def _positions(values: Tensor) -> Tensor:
    """``(B, ..., K)`` to ``(B, T, K)``."""
    return values.unsqueeze(1) if values.dim() == 2 else values.flatten(1, -2)


def _weight_part(first: Pair, second: Pair, weight: Tensor, windows: Windows | None, chunk: int) -> Part:
    if windows is None and math.prod(first[0].shape[1:-1]) == 1:
        return OuterPair(*((met.flatten(1), arrived.flatten(1)) for met, arrived in (first, second)))
    first, second = balanced(first, second)
    if windows is None:
        met, arrived = (torch.cat([*map(_positions, sides)], 1) for sides in zip(first, second, strict=True))
        return Tokens(met, arrived, chunk)
    met, arrived = one_below_the_other(first, second, windows)
    return Kernel(met, arrived, weight.shape[2:], windows[1:] * 2, (0, 0), (1, 1), 1, chunk)


def one_below_the_other(first: Pair, second: Pair, windows: Windows) -> Pair:
    """Two maps with their padding in one, and what arrives at its windows: nothing at those that lie in both maps."""
    padding, stride = windows
    rows = first[0].shape[2] + 2 * padding
    # The second map begins where a window does.
    sides = (padding, padding, padding, padding + -rows % stride)
    met = torch.cat([functional.pad(first[0], sides), functional.pad(second[0], (padding,) * 4)], 2)
    between = -(-rows // stride) - first[1].shape[2]
    nothing = first[1].new_zeros(*first[1].shape[:2], between, first[1].shape[3])
    return met, torch.cat([first[1], nothing, second[1]], 2)
