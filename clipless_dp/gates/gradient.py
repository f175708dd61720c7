"""Gated sums: what gradient gates return in place of the sum of the samples' gradients of a weight or a bias.

A weight that meets one vector of each sample has the gradient ``g xᵀ``, of norm ``‖g‖‖x‖`` in closed form. A weight
that meets several (tokens, pixels) has ``Σ_t g_t x_tᵀ``, whose norm is computed for a chunk of samples at a time: from
the samples' gradients themselves, or, where a sample has few positions, from ``Σ_ts ⟨g_t, g_s⟩⟨x_t, x_s⟩``. The chunk's
scaled sum is all that is kept of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.gates.arithmetic import (
    UNDERFLOW,
    is_interleaved,
    sample_norms,
    scale_factors,
    zeroed_rows,
)

CANCELLED = 1e-3
"""A sum over positions that is smaller than this share of ``‖g‖‖x‖`` counts as this large: the rest is mostly rounding,
which depends on the rest of the batch and must not be scaled to the size of a signal."""

_CHUNK_ENTRIES = {"cpu": 1 << 20}
_CHUNK_ENTRIES_ELSEWHERE = 1 << 26
"""Entries of windows and per-sample gradients at once: 4 MiB on a CPU, elsewhere 256 MiB."""

_GRAM_GAIN = 8.0
"""Products of matrices that take as long as an entry of a per-sample gradient takes to be written and read twice."""


def vector_weight_gradient(
    values: Tensor,
    cotangents: Tensor,
    lengths: Tensor,
    sizes: Tensor,
    limit: float,
    least: float,
    *,
    into: Tensor | None = None,
) -> Tensor:
    """The gated sum for one vector a sample, whose gradient ``g xᵀ`` has the norm ``‖g‖‖x‖``.

    Args:
        values: ``(B, K)``, zero where ``x`` has no norm.
        cotangents: ``(B, O)``, zero where ``g`` has none. A number that scales ``x`` may be in these instead.
        lengths: ``‖x‖``, of shape ``(B,)``; NaN drops a sample.
        sizes: ``‖g‖``, of shape ``(B,)``; NaN drops a sample.
        limit: the cap.
        least: the norm below which samples are not scaled further up.
        into: where the gated cotangents go; may be ``cotangents``.

    Returns:
        ``(O, K)``.
    """
    factors = scale_factors((lengths + UNDERFLOW) * (sizes + UNDERFLOW), cap=limit, floor=least)
    return torch.mul(cotangents, factors.unsqueeze(1), out=into).t() @ values


def bias_gradient(cotangents: Tensor, sizes: Tensor, limit: float, least: float) -> Tensor:
    """The gated sum of a bias: ``(B, O, T)`` of norms ``(B,)``, or ``(B, O)``, to ``(O,)``."""
    if cotangents.dim() == 2:
        return scale_factors(sizes, cap=limit, floor=least) @ cotangents
    gradients = cotangents.sum(2)
    return scale_factors(torch.maximum(sample_norms(gradients), CANCELLED * sizes), cap=limit, floor=least) @ gradients


def _gated_sum(rows: Tensor, cotangents: Tensor, scales: Tensor, limit: float, least: float) -> Tensor:
    """``Σ_b factor_b·G_b`` for one chunk.

    Args:
        rows: ``(b, groups, T, K)``, what the weight meets.
        cotangents: ``(b, groups, O, T)``.
        scales: ``(b,)``, ``‖x‖‖g‖``.
        limit: the cap.
        least: the norm below which samples are not scaled further up.

    Returns:
        ``(groups, O, K)``.
    """
    norms, gradients = chunk_norms(rows, cotangents, scales)
    return chunk_sum(rows, cotangents, gradients, scale_factors(norms, cap=limit, floor=least))


def chunk_norms(rows: Tensor, cotangents: Tensor, scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the samples' gradients of one chunk count as, ``(b,)``, and the gradients where they had to be formed.

    Args:
        rows: ``(b, groups, T, K)``, what the weight meets.
        cotangents: ``(b, groups, O, T)``.
        scales: ``(b,)``, ``‖x‖‖g‖``.
    """
    batch, groups, positions, inputs = rows.shape
    outputs = cotangents.shape[2]
    if _prefers_gram(positions, inputs, outputs):
        grams = rows @ rows.mT, cotangents.mT @ cotangents
        first, second = (gram.diagonal(dim1=-2, dim2=-1).sum((1, 2)) for gram in grams)
        # What the sums of products may have lost is added: the root is then at least the true norm.
        rounding = 1.01 * (inputs + outputs + groups * positions**2 + 8) * torch.finfo(rows.dtype).eps / 2
        lost = rounding * (first + 1e-28) * (second + 1e-28)
        norms = ((grams[0] * grams[1]).sum((1, 2, 3)).clamp(min=0.0) + lost).sqrt()
        return torch.maximum(norms, CANCELLED * scales), None
    gradients = torch.bmm(cotangents.flatten(0, 1), rows.flatten(0, 1)).reshape(batch, groups * outputs * inputs)
    return torch.maximum(sample_norms(gradients), CANCELLED * scales), gradients


def chunk_sum(rows: Tensor, cotangents: Tensor, gradients: Tensor | None, factors: Tensor) -> Tensor:
    """``Σ_b factor_b·G_b`` for one chunk and factors ``(b,)``: ``(groups, O, K)``."""
    _, groups, _, inputs = rows.shape
    outputs = cotangents.shape[2]
    if gradients is not None:
        return (factors @ gradients).reshape(groups, outputs, inputs)
    scaled = (cotangents * factors.reshape(-1, 1, 1, 1)).permute(1, 2, 0, 3).reshape(groups, outputs, -1)
    return scaled @ rows.permute(1, 0, 2, 3).reshape(groups, -1, inputs)


def _prefers_gram(positions: int, inputs: int, outputs: int) -> bool:
    return 2 * positions**2 * (inputs + outputs) <= _GRAM_GAIN * inputs * outputs


def _chunk_rows(chunk: int, entries: int, device: torch.device) -> int:
    """Samples at once: as asked for, or as many as the default memory holds."""
    return chunk if chunk > 0 else max(1, _CHUNK_ENTRIES.get(device.type, _CHUNK_ENTRIES_ELSEWHERE) // entries)


def token_weight_gradient(
    values: Tensor, cotangents: Tensor, limit: float, least: float, chunk: int, sizes: Tensor | None = None
) -> Tensor:
    """The gated sum for several vectors a sample: ``(B, T, K)`` and ``(B, T, O)`` to ``(O, K)``.

    Args:
        values: what the weight meets.
        cotangents: what arrives at its products.
        limit: the cap.
        least: the norm below which samples are not scaled further up.
        chunk: samples at once; 0: as many as fit a small memory.
        sizes: the norms of the cotangents, ``(B,)``, where they are known.
    """
    chunks = token_chunks(values, cotangents, chunk, sizes)
    total = values.new_zeros(1, cotangents.shape[2], values.shape[2])
    for some, arriving, scales in chunks:
        total = total + _gated_sum(some, arriving, scales, limit, least)
    return total.squeeze(0)


Chunk = tuple[Tensor, Tensor, Tensor]
"""Of some samples ``(b, groups, T, K)`` that the weight meets, cotangents ``(b, groups, O, T)`` and ``‖x‖‖g‖``."""


def token_chunks(values: Tensor, cotangents: Tensor, chunk: int, sizes: Tensor | None = None) -> Iterator[Chunk]:
    """The samples of :func:`token_weight_gradient`, as many at a time as memory is to hold."""
    _, positions, inputs = values.shape
    outputs = cotangents.shape[2]
    gram = _prefers_gram(positions, inputs, outputs)
    held = 2 * positions**2 + positions * outputs if gram else inputs * outputs
    rows = _chunk_rows(chunk, held, values.device)
    values, lengths = zeroed_rows(values)
    cotangents, sizes = zeroed_rows(cotangents, sizes)
    for some, arriving, scales in zip(
        values.split(rows), cotangents.split(rows), (lengths * sizes).split(rows), strict=True
    ):
        yield some.unsqueeze(1), arriving.mT.unsqueeze(1), scales


def table_gradient(tokens: Tensor, cotangents: Tensor, rows: int, limit: float, least: float) -> Tensor:
    """The gated sum of a table that rows are read from: ``(B, T)`` numbers and ``(B, T, K)`` to ``(rows, K)``.

    A sample's gradient of a row is the sum over the places where it reads it, and the square of the whole one's norm
    ``Σ_ts [x_t = x_s]⟨g_t, g_s⟩``. What cancellation may have lost of that is added.
    """
    cotangents, norms = table_norms(tokens, cotangents)
    return table_sum(tokens, cotangents, rows, scale_factors(norms, cap=limit, floor=least))


def table_norms(tokens: Tensor, cotangents: Tensor) -> tuple[Tensor, Tensor]:
    """The cotangents without rows that are dropped, and what the samples' gradients count as, ``(B,)``."""
    positions, width = cotangents.shape[1:]
    cotangents, sizes = zeroed_rows(cotangents)
    same = tokens.unsqueeze(2) == tokens.unsqueeze(1)
    squares = (cotangents @ cotangents.mT).mul_(same).sum((1, 2)).clamp_(min=0.0)
    rounding = 1.01 * (width + positions**2 + 8) * torch.finfo(cotangents.dtype).eps / 2
    # The products' absolute values add up to at most T times the square of the cotangents' norm.
    norms = (squares + rounding * positions * (sizes.square() + 1e-28)).sqrt().to(sizes.dtype)
    return cotangents, torch.maximum(norms, CANCELLED * sizes)


def table_sum(tokens: Tensor, cotangents: Tensor, rows: int, factors: Tensor) -> Tensor:
    """The sum of the samples' gradients times factors ``(B,)``."""
    width = cotangents.shape[2]
    total = cotangents.new_zeros(rows, width)
    scaled = cotangents * factors.to(cotangents.dtype).reshape(-1, 1, 1)
    total.index_add_(0, tokens.reshape(-1), scaled.reshape(-1, width))
    return total


def _positions_last(maps: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C, H·W)``, without a copy where the maps lie in memory channels last."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2).mT if is_interleaved(maps) else maps.flatten(2)


def convolution_weight_gradient(
    values: Tensor,
    cotangents: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    limit: float,
    least: float,
    chunk: int,
) -> Tensor:
    """The gated sum for a convolution: ``(B, C, *size)`` and ``(B, O, *positions)`` to ``(O, C/groups, *kernel)``."""
    channels, outputs = values.shape[1], cotangents.shape[1]
    total = values.new_zeros(groups, outputs // groups, channels // groups * math.prod(kernel))
    for some, arriving, scales in convolution_chunks(
        values, cotangents, kernel, stride, padding, dilation, groups, chunk
    ):
        total = total + _gated_sum(some, arriving, scales, limit, least)
    return as_kernel(total, kernel)


def as_kernel(total: Tensor, kernel: Sequence[int]) -> Tensor:
    """``(groups, O/groups, prod(kernel)·C/groups)`` to ``(O, C/groups, *kernel)``."""
    gradient = total.reshape(total.shape[0] * total.shape[1], *kernel, -1).movedim(-1, 1)
    return gradient.contiguous()


def convolution_chunks(
    values: Tensor,
    cotangents: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    chunk: int,
) -> Iterator[Chunk]:
    """The samples of :func:`convolution_weight_gradient`, as many at a time as memory is to hold."""
    channels, outputs = values.shape[1], cotangents.shape[1]
    sizes_out = cotangents.shape[2:]
    positions, inputs = math.prod(sizes_out), channels // groups * math.prod(kernel)
    gram = _prefers_gram(positions, inputs, outputs // groups)
    held = groups * positions * inputs + (2 * groups * positions**2 if gram else outputs * inputs)
    rows = _chunk_rows(chunk, held, values.device)
    values, lengths = zeroed_rows(values)
    cotangents, sizes = zeroed_rows(cotangents)
    for some, arriving, scales in zip(
        values.split(rows), cotangents.split(rows), (lengths * sizes).split(rows), strict=True
    ):
        yield (
            _windows(some, sizes_out, kernel, stride, padding, dilation, groups),
            _positions_last(arriving).unflatten(1, (groups, outputs // groups)),
            scales,
        )


def _windows(
    maps: Tensor,
    sizes: Sequence[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """What a kernel meets at each position: ``(b, C, *size)`` to ``(b, groups, T, prod(kernel)·C/groups)``."""
    axes, channels = len(kernel), maps.shape[1]
    # Channels last: what one row of a window reads lies together, and is copied at once.
    windows = functional.pad(maps.movedim(1, -1), (0, 0, *(side for side in reversed(padding) for _ in range(2))))
    windows = windows.contiguous()
    for axis, (step, taps, move) in enumerate(zip(dilation, kernel, stride, strict=True), start=1):
        windows = windows.unfold(axis, step * (taps - 1) + 1, move).narrow(axis, 0, sizes[axis - 1])
    thinned: Any = (..., *(slice(None, None, step) for step in dilation))
    windows = windows[thinned]
    # (b, *size, C, *kernel) to (b, groups, *size, *kernel, C/groups).
    windows = windows.unflatten(axes + 1, (groups, channels // groups)).movedim(axes + 1, 1).movedim(axes + 2, -1)
    inputs = channels // groups * math.prod(kernel)
    return cast(Tensor, windows.reshape(len(maps), groups, math.prod(sizes), inputs))


# Loops over chunks depend on the batch size: compiled graphs hold them as one opaque operator.
token_operator = torch.library.custom_op(
    "clipless_dp::token_weight_gradient",
    token_weight_gradient,
    mutates_args=(),
    schema="(Tensor values, Tensor cotangents, float limit, float least, int chunk) -> Tensor",
)
convolution_operator = torch.library.custom_op(
    "clipless_dp::convolution_weight_gradient",
    convolution_weight_gradient,
    mutates_args=(),
    schema=(
        "(Tensor values, Tensor cotangents, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
        "float limit, float least, int chunk) -> Tensor"
    ),
)


@token_operator.register_fake
def _(values: Tensor, cotangents: Tensor, limit: float, least: float, chunk: int) -> Tensor:
    return values.new_empty(cotangents.shape[2], values.shape[2])


@convolution_operator.register_fake
def _(values: Tensor, cotangents: Tensor, kernel: list[int], *settings: Any) -> Tensor:
    groups = settings[3]
    return values.new_empty(cotangents.shape[1], values.shape[1] // groups, *kernel)
