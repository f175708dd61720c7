"""What comes back to one parameter, sample by sample: norms and scaled sums of gradients, without the gradients.

A gate of one parameter needs the norms and the sum at once. A cap for several parameters needs all of their norms
before any sum, and a count needs the norms besides the sum. Each kind of gradient has a class that gives all: those of
weights that meet several vectors a sample are in ``gradient``, the others here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from clipless_dp.gates.adaptive import count
from clipless_dp.gates.arithmetic import UNDERFLOW, sample_norms, scale_factors, zeroed_rows
from clipless_dp.gates.gradient import CANCELLED, Tokens, table_norms, table_sum


class Part(Protocol):
    """The samples' gradients of one parameter, in one use of it.

    Attributes:
        present: ``(B,)``, positive where anything came back to the sample: for counts alone, no norm is made of it.
    """

    present: Tensor

    def norms(self) -> Tensor:
        """At least the norm of each sample's gradient, ``(B,)``, up to the rounding that rules include."""
        ...

    def total(self, factors: Tensor) -> Tensor:
        """``Σ_b factor_b·G_b``, in the parameter's shape."""
        ...

    def gated(self, limit: float, least: float) -> tuple[Tensor, Tensor]:
        """The gated sum of this part alone, and the norms."""
        ...


class _Simple:
    """Norms first, then the sum."""

    def gated(self: Part, limit: float, least: float) -> tuple[Tensor, Tensor]:
        """The gated sum of this part alone, and the norms."""
        norms = self.norms()
        return self.total(scale_factors(norms, cap=limit, floor=least)), norms


class Rows(_Simple):
    """Gradients that are there, ``(B, n)``.

    Args:
        rows: the gradients.
        shape: of the parameter.
        sizes: ``(B,)``, of what was summed up to these: a sum that is a small part of it is mostly rounding.
    """

    def __init__(self, rows: Tensor, shape: Sequence[int], sizes: Tensor | None = None) -> None:
        self._rows, norms = zeroed_rows(rows)
        self.present = norms
        if sizes is not None:
            norms = torch.maximum(norms, CANCELLED * torch.where(sizes.isfinite(), sizes, 0.0))
        self._norms, self._shape = norms, shape

    def norms(self) -> Tensor:
        """As :class:`Part`."""
        return self._norms

    def total(self, factors: Tensor) -> Tensor:
        """As :class:`Part`."""
        return (factors.to(self._rows.dtype) @ self._rows).reshape(self._shape)


class Outer(_Simple):
    """Of a weight that meets one vector a sample: ``x`` ``(B, K)``, ``g`` ``(B, O)``, the gradient ``g xᵀ``."""

    def __init__(self, values: Tensor, cotangents: Tensor) -> None:
        self._values, self._lengths = zeroed_rows(values)
        self._cotangents, self._arrived = zeroed_rows(cotangents)
        self.present = self._arrived

    def norms(self) -> Tensor:
        """As :class:`Part`."""
        return (self._lengths + UNDERFLOW) * (self._arrived + UNDERFLOW)

    def total(self, factors: Tensor) -> Tensor:
        """As :class:`Part`."""
        return (self._cotangents * factors.to(self._cotangents.dtype).unsqueeze(1)).t() @ self._values


class Table(_Simple):
    """Of a table of so many rows, read at ``(B, T)`` places; cotangents ``(B, T, K)``."""

    def __init__(self, tokens: Tensor, cotangents: Tensor, rows: int) -> None:
        self._tokens, self._rows = tokens, rows
        self._cotangents, self._norms = table_norms(tokens, cotangents)
        self.present = self._norms if len(tokens) == 0 else sample_norms(self._cotangents)

    def norms(self) -> Tensor:
        """As :class:`Part`."""
        return self._norms

    def total(self, factors: Tensor) -> Tensor:
        """As :class:`Part`."""
        return table_sum(self._tokens, self._cotangents, self._rows, factors)


class Transposed:
    """A part whose parameter is held transposed."""

    def __init__(self, part: Part) -> None:
        self._part, self.present = part, part.present

    def norms(self) -> Tensor:
        """As :class:`Part`."""
        return self._part.norms()

    def total(self, factors: Tensor) -> Tensor:
        """As :class:`Part`."""
        return self._part.total(factors).mT

    def gated(self, limit: float, least: float) -> tuple[Tensor, Tensor]:
        """As :class:`Part`."""
        gradient, norms = self._part.gated(limit, least)
        return gradient.mT, norms


def linear_parts(
    values: Tensor | None, cotangents: Tensor, *, bias: bool, chunk: int = 0
) -> tuple[Part | None, Part | None]:
    """Weight and bias of a linear layer.

    Args:
        values: ``(B, ..., K)``; ``None`` where the weight gets no gradient.
        cotangents: ``(B, ..., O)``.
        bias: whether the bias gets one.
        chunk: samples at once; 0: as many as fit a small memory.
    """
    arrived = cotangents.unsqueeze(1) if cotangents.dim() == 2 else cotangents.flatten(1, -2)
    outputs = arrived.shape[2]
    of_weight: Part | None = None
    if arrived.shape[1] == 1:
        single = arrived.squeeze(1)
        if values is not None:
            of_weight = Outer(values.reshape(len(values), values.shape[-1]), single)
        return of_weight, Rows(single, (outputs,)) if bias else None
    sizes = sample_norms(arrived)
    if values is not None:
        of_weight = Tokens(values.flatten(1, -2), arrived, chunk, sizes)
    return of_weight, Rows(arrived.sum(1), (outputs,), sizes) if bias else None


def combined(squares: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Norms of what several parts make together, of their norms and the uses that one parameter has among them.

    ``u`` uses of one parameter add up to a gradient of norm at most ``√(u·Σ n²)``.
    """
    total = torch.stack([norms.double().square() * uses for norms, uses in squares]).sum(0)
    return total.sqrt().to(squares[0][0].dtype)


def gated_together(
    parts: Sequence[Part], limit: float, least: float, uses: Sequence[int] | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The sums of several parts under one cap for each sample's gradients of all of them.

    Returns:
        The sums, the norms ``(B,)``, and where anything came back, ``(B,)``.
    """
    norms = combined(list(zip([part.norms() for part in parts], uses or [1] * len(parts), strict=True)))
    factors = scale_factors(norms, cap=limit, floor=least)
    present = parts[0].present
    for part in parts[1:]:
        present = torch.maximum(present, part.present)
    return [part.total(factors) for part in parts], norms, present


Caps = tuple[float, float]
"""A cap, and the norm below which nothing is scaled further up."""


def gated_pair(
    parts: tuple[Part | None, Part | None],
    caps: tuple[Caps | None, Caps | None],
    *,
    joint: bool,
    counted: tuple[bool, bool],
    same: bool = False,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The sums of a weight and a bias, and the counts of their gates.

    Args:
        parts: of both; ``None`` of what gets no gradient.
        caps: of both.
        joint: whether one cap holds for both together, the first that there is.
        counted: whose gate counts; a joint one counts once.
        same: whether weight and bias are one parameter, to whose gradient both add.
    """
    gradients: list[Tensor | None] = [None, None]
    counts: list[Tensor | None] = [None, None]
    there = [index for index, part in enumerate(parts) if part is not None]
    if joint and there:
        cap = caps[there[0]]
        assert cap is not None
        held = [part for part in parts if part is not None]
        sums, norms, present = gated_together(held, *cap, [len(held) if same else 1] * len(held))
        for index, total in zip(there, sums, strict=True):
            gradients[index] = total
        if counted[there[0]]:
            counts[there[0]] = count(norms, present, cap[0])
        return gradients, counts
    for index in there:
        part, own = parts[index], caps[index]
        assert part is not None
        assert own is not None
        gradients[index], norms = part.gated(*own)
        if counted[index]:
            counts[index] = count(norms, part.present, own[0])
    return gradients, counts
