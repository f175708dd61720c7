"""The arithmetic of gates, each piece of it written once: norms of samples, caps and factors, samples that are dropped.

Every norm here is *per sample*: over all coordinates of one row of the batch axis, which is always axis 0.
A gate's cap holds for the number that floating-point arithmetic returns only up to its rounding;
:func:`rounding_slack` bounds that rounding, and the rules multiply every cap by it.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from clipless_dp.arguments import cap

_LONG_SUM = 1 << 16
"""Rows longer than this have their norm taken of pieces and of the pieces' norms, so that the slack stays small."""

_PIECE = 1 << 10
"""Entries of these pieces, each summed in the rows' own dtype: on a CPU rows in float64 take ten times as long."""

FLOOR_SHARE = 1e-2
"""Default floor over cap: the most by which a gate lifts a small signal, and its rounding with it, is a hundredfold."""

LARGEST_NORM = 1e18
"""The square still fits float32 with room for the products of the backward pass."""

LARGEST_RATIO = 1e37
"""Factors of ``1e-37`` and above are normal numbers in float32: smaller ones would round by more than the slack."""

UNDERFLOW = 1e-16
"""Above the norm that squares can lose to underflow, ``√n·1.1e-19``, for the rows that are summed in float32."""


def rounding_slack(entries: int, dtype: torch.dtype = torch.float32) -> float:
    """Upper bound of ``‖gated‖ / cap`` for a gate evaluated in floating point.

    A sum of ``n`` squares in any order has relative error at most ``γ_n = nu/(1-nu)`` (Higham 2002, §4.2); the
    square root halves it; division, product and the square root itself add one ``u`` each. Squares that
    underflow are covered because caps and floors are at least 1e-8, against ``sqrt(n)·1e-19`` lost. Of a long row each
    piece is such a sum, and the norms of the pieces are summed in float64.

    Args:
        entries: number of entries in one sample.
        dtype: the dtype that the gate computes in (float32 or float64).

    Returns:
        A factor that is at least 1.
    """
    unit = torch.finfo(dtype).eps / 2
    summed = entries * unit
    if entries > _LONG_SUM:
        # Two more roundings: the root of a piece's sum, and of the whole one in float32.
        summed = (_PIECE + 2) * unit + (entries / _PIECE + 2) * torch.finfo(torch.float64).eps / 2
    underflow = 1e-11 * math.sqrt(max(entries, 1))
    return 1.0 + 1.01 * (summed + 8 * unit) + underflow


def sample_norms(values: Tensor) -> Tensor:
    """Euclidean norm of each sample: shape ``(B, ...)`` to ``(B,)``, in float32 or wider, TF32 or not."""
    flat = flat_rows(values.permute(0, 2, 3, 1) if is_interleaved(values) else values)
    wide = _wide(values.dtype)
    if flat.shape[1] <= _LONG_SUM:
        return cast(Tensor, torch.linalg.vector_norm(flat, dim=1, dtype=wide))
    if can_look(values):
        norms = _norms_by_pieces(flat, wide)
        # What overflows in a piece need not in the whole.
        if math.isfinite(float(norms.detach().sum())):
            return norms
    return cast(Tensor, torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)).to(wide)


def _norms_by_pieces(flat: Tensor, dtype: torch.dtype) -> Tensor:
    whole = flat.shape[1] // _PIECE * _PIECE
    norms = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, _PIECE)), dim=2, dtype=dtype)
    if whole < flat.shape[1]:
        norms = torch.cat([norms, torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True, dtype=dtype)], 1)
    return cast(Tensor, torch.linalg.vector_norm(norms, dim=1, dtype=torch.float64)).to(dtype)


def flat_rows(values: Tensor) -> Tensor:
    """Each sample in a row: ``(B, ...)`` to ``(B, n)``."""
    return values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)


def is_interleaved(values: Tensor) -> bool:
    """Whether maps lie in memory channels last, so that they are read in that order; compiled graphs do not ask."""
    return (
        values.dim() == 4
        and not torch.compiler.is_compiling()
        and not values.is_contiguous()
        and values.is_contiguous(memory_format=torch.channels_last)
    )


def sample_products(first: Tensor, second: Tensor) -> Tensor:
    """Inner product of each sample of one tensor with that of another: ``(B, ...)`` twice to ``(B,)``."""
    if is_interleaved(first) and is_interleaved(second):
        first, second = first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)
    return cast(Tensor, torch.linalg.vecdot(flat_rows(first), flat_rows(second)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_factors(
    norms: Tensor, *, cap: float, floor: float, weights: Tensor | None = None, within: bool | None = None
) -> Tensor:
    """What a gate multiplies each sample by, of norms ``(B,)``: ``cap/max(norm, floor)``, times weights ``(B,)``.

    In one division, so that it is 1 exactly where norm and floor are the cap. Zero where there is no norm, or one above
    :func:`largest_norm`, whose factor would lose digits. Who has looked says whether there is none such: ``within``.
    """
    factors = torch.full_like(norms, cap) / norms.clamp(min=floor)
    largest = largest_norm(cap, norms.dtype)
    if not (are_within(norms, largest) if within is None else within):
        factors = torch.where(norms <= largest, factors, 0.0)
    return factors if weights is None else factors * weights


def largest_norm(cap: float, dtype: torch.dtype) -> float:
    """The largest norm that a gate of this cap scales: what is above has no factor that is exact up to one rounding."""
    return min(LARGEST_RATIO * cap, torch.finfo(_wide(dtype)).max)


def per_sample(factors: Tensor, like: Tensor) -> Tensor:
    """One number a sample, ``(B,)``, in a shape that multiplies samples of the shape of ``like``."""
    return factors.reshape(-1, *([1] * (like.dim() - 1)))


def can_look(values: Tensor) -> bool:
    """Whether numbers can be looked at: on a CPU nothing is waited for, and in a compiled graph there are none."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def are_within(norms: Tensor, largest: float) -> bool:
    """Whether all norms ``(B,)`` are numbers up to ``largest``, where that can be seen: nearly always they are.

    What is done where one is not leaves the others as they are, and need not be done where none is.
    """
    if not can_look(norms) or not norms.shape[0] or torch._C._functorch.is_functorch_wrapped_tensor(norms):
        return False
    return float((norms.detach() if norms.requires_grad else norms).max()) <= largest


def is_dense(values: Tensor) -> bool:
    """Whether values lie in memory without gaps and repetitions, so that an elementwise product lies as they do."""
    return (
        values.is_contiguous()
        or (values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last))
        or (values.dim() == 3 and values.mT.is_contiguous())
    )


def drop_rows_(values: Tensor, norms: Tensor, largest: float) -> Tensor:
    """Zeroes the rows of a fresh tensor whose norms ``(B,)`` are above ``largest`` or NaN, whatever they hold."""
    if can_look(values):
        if not are_within(norms, largest):
            values.index_fill_(0, (~(norms.detach() <= largest)).nonzero().flatten(), 0.0)
        return values
    kept = per_sample(norms <= largest, values)
    return torch.where(kept, values, torch.zeros((), dtype=values.dtype, device=values.device))


def zeroed_rows(values: Tensor, norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of norm above 1e18, or without one, become zero; and the norms of the result."""
    norms = sample_norms(values) if norms is None else norms
    usable = norms <= LARGEST_NORM
    if can_look(values) and is_dense(values) and bool(usable.all()):
        # What follows would return the same values, in the same order in memory.
        return values, norms
    rows = per_sample(usable, values)
    return torch.where(rows, values, torch.zeros_like(values)), torch.where(usable, norms, torch.zeros_like(norms))


def tangent_part(
    cotangents: Tensor, points: Tensor, shares: Tensor, products: Tensor | None = None, *, into: Tensor | None = None
) -> Tensor:
    """``u - x⟨x, u⟩·share``: up to its factor, the Jacobian of scaling ``x`` to a sphere.

    Args:
        cotangents: ``u``, of shape ``(B, ...)``.
        points: ``x``, of the same shape.
        shares: ``(B,)``: ``1/‖x‖²`` where a gate scales to its sphere, and zero where it stretches by a constant.
        products: ``⟨x, u⟩``, of shape ``(B,)``, where they are known.
        into: where the result goes; may be ``cotangents``.
    """
    radial = sample_products(points, cotangents).to(shares.dtype) if products is None else products
    along = per_sample(radial * shares, points).to(points.dtype)
    return torch.addcmul(cotangents, points, along, value=-1, out=into)


def checked_cap(name: str, value: float) -> float:
    """A cap or floor as a float.

    Raises:
        ConfigurationError: it is not a finite number of at least 1e-8.
    """
    return cap(name, value)
