"""Gated sums: what gradient gates return in place of the sum of the samples' gradients of a weight or a bias.

A weight that meets one vector of each sample has the gradient ``g xᵀ``, of norm ``‖g‖‖x‖`` in closed form. A weight
that meets several (tokens, pixels) has ``Σ_t g_t x_tᵀ``, whose norm is computed for a chunk of samples at a time: from
the samples' gradients themselves, or, where a sample has few positions, from ``Σ_ts ⟨g_t, g_s⟩⟨x_t, x_s⟩``. The chunk's
scaled sum is all that is kept of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clipless_dp.gates.arithmetic import (
    UNDERFLOW,
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

GRAM_GAIN = 8.0
"""Products of matrices that take as long as an entry of a per-sample gradient takes to be written and read twice."""

_TOKEN_GRAM_GAIN = 60.0
"""The same for tokens, whose factors go into one product of all samples."""

_LANES = 16
"""Numbers of float32 in a processor's widest vector."""


def vector_weight_gradient(
    values: Tensor,
    cotangents: Tensor,
    lengths: Tensor,
    sizes: Tensor,
    limit: float,
    least: float,
    weights: Tensor | None = None,
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
        weights: of the rows, see :mod:`clipless_dp.gates.row_weights`.
        into: where the gated cotangents go; may be ``cotangents``.

    Returns:
        ``(O, K)``.
    """
    norms = (lengths + UNDERFLOW) * (sizes + UNDERFLOW)
    factors = scale_factors(norms, cap=limit, floor=least, weights=weights)
    return torch.mul(cotangents, factors.unsqueeze(1), out=into).t() @ values


def bias_gradient(
    cotangents: Tensor, sizes: Tensor, limit: float, least: float, weights: Tensor | None = None
) -> Tensor:
    """The gated sum of a bias: ``(B, O, T)`` of norms ``(B,)``, or ``(B, O)``, to ``(O,)``."""
    gradients, norms = cotangents, sizes
    if cotangents.dim() > 2:
        gradients = cotangents.sum(2)
        norms = torch.maximum(sample_norms(gradients), CANCELLED * sizes)
    return scale_factors(norms, cap=limit, floor=least, weights=weights) @ gradients


Chunk = tuple[Tensor, Tensor, Tensor]
"""Of some samples ``(b, groups, T, K)`` that the weight meets, cotangents ``(b, groups, O, T)`` and ``‖x‖‖g‖``."""


def chunk_gradients(
    chunks: Iterator[Chunk], shape: tuple[int, int, int]
) -> Iterator[tuple[Chunk, Tensor | None, Tensor]]:
    """Of each chunk what the samples' gradients count as, ``(b,)``, and the gradients, where these have to be formed.

    The latter are of shape ``(b, groups·O·K)``, or ``(b, groups·K·O)`` where outputs come last, in memory that the next
    chunk's take.

    Args:
        chunks: of some samples each.
        shape: ``(groups, O, K)``.
    """
    groups, outputs, inputs = shape
    held: Tensor | None = None
    for rows, cotangents, scales in chunks:
        if prefers_gram(rows.shape[2], inputs, outputs, GRAM_GAIN):
            yield (rows, cotangents, scales), None, torch.maximum(_gram_norms(rows, cotangents), CANCELLED * scales)
            continue
        first, second = cotangents.flatten(0, 1), rows.flatten(0, 1)
        if _outputs_last(outputs, inputs):
            first, second = second.mT, first.mT
        if torch.is_grad_enabled():
            gradients = torch.bmm(first, second)
        else:
            # Memory that is written before stays in the processor's caches.
            held = first.new_empty(len(first), first.shape[1], second.shape[2]) if held is None else held
            gradients = torch.bmm(first, second, out=held[: len(first)])
        gradients = gradients.reshape(len(rows), groups * outputs * inputs)
        norms = torch.maximum(sample_norms(gradients), CANCELLED * scales)
        yield (rows, cotangents, scales), gradients, norms


def gated_sum(
    chunks: Iterator[Chunk], shape: tuple[int, int, int], limit: float, least: float, weights: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """``Σ_b factor_b·G_b``.

    Args:
        chunks: of some samples each.
        shape: ``(groups, O, K)``.
        limit: the cap.
        least: the norm below which samples are not scaled further up.
        weights: of the rows, ``(B,)``.

    Returns:
        ``(groups, O, K)``, and what the samples' gradients count as, ``(b,)`` for each chunk.
    """
    total: Tensor | None = None
    found: list[Tensor] = []
    formed, done = False, 0
    for (rows, cotangents, _), gradients, norms in chunk_gradients(chunks, shape):
        found.append(norms)
        own = None if weights is None else weights[done : done + len(norms)]
        factors, done = scale_factors(norms, cap=limit, floor=least, weights=own), done + len(norms)
        formed = gradients is not None
        if gradients is None:
            part = _scaled_sum(rows, cotangents, factors)
            total = part if total is None else total + part
        else:
            total = factors @ gradients if total is None else _add_product(total, gradients.mT, factors)
    if total is None:
        raise ValueError("there are no chunks")
    groups, outputs, inputs = shape
    if formed and _outputs_last(outputs, inputs):
        return total.reshape(groups, inputs, outputs).mT, found
    return total.reshape(shape), found


def _outputs_last(outputs: int, inputs: int) -> bool:
    """Whether gradients are formed transposed: where that fills the processor's vectors, and the usual order does not.

    Products of small matrices take a quarter less time then.
    """
    return outputs % _LANES == 0 and inputs % _LANES != 0


def _add_product(total: Tensor, matrix: Tensor, factors: Tensor) -> Tensor:
    """``total + matrix @ factors``, in the place of the former where no gradients flow."""
    return torch.addmv(total, matrix, factors) if torch.is_grad_enabled() else total.addmv_(matrix, factors)


def _gram_norms(rows: Tensor, cotangents: Tensor) -> Tensor:
    """At least the samples' ``‖G‖``, ``(b,)``, without their ``G``: the root of ``Σ_ts ⟨g_t, g_s⟩⟨x_t, x_s⟩``."""
    _, groups, positions, inputs = rows.shape
    outputs = cotangents.shape[2]
    grams = rows @ rows.mT, cotangents.mT @ cotangents
    first, second = (gram.diagonal(dim1=-2, dim2=-1).sum((1, 2)) for gram in grams)
    # What the sums of products may have lost is added: the root is then at least the true norm.
    rounding = 1.01 * (inputs + outputs + groups * positions**2 + 8) * torch.finfo(rows.dtype).eps / 2
    lost = rounding * (first + 1e-28) * (second + 1e-28)
    return ((grams[0] * grams[1]).sum((1, 2, 3)).clamp(min=0.0) + lost).sqrt()


def _scaled_sum(rows: Tensor, cotangents: Tensor, factors: Tensor) -> Tensor:
    """``Σ_b factor_b·G_b`` for one chunk, ``(groups, O, K)``, without the samples' ``G``."""
    _, groups, _, inputs = rows.shape
    outputs = cotangents.shape[2]
    scaled = (cotangents * factors.reshape(-1, 1, 1, 1)).permute(1, 2, 0, 3).reshape(groups, outputs, -1)
    return scaled @ rows.permute(1, 0, 2, 3).reshape(groups, -1, inputs)


def prefers_gram(positions: int, inputs: int, outputs: int, gain: float) -> bool:
    """Whether a norm is computed from products of positions: it takes less time than a gradient of ``K·O`` entries."""
    return 2 * positions**2 * (inputs + outputs) <= gain * inputs * outputs


def chunk_rows(chunk: int, entries: int, device: torch.device) -> int:
    """Samples at once: as asked for, or as many as the default memory holds."""
    return chunk if chunk > 0 else max(1, _CHUNK_ENTRIES.get(device.type, _CHUNK_ENTRIES_ELSEWHERE) // max(entries, 1))


def token_weight_gradient(
    values: Tensor,
    cotangents: Tensor,
    limit: float,
    least: float,
    chunk: int,
    sizes: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The gated sum for several vectors a sample: ``(B, T, K)`` and ``(B, T, O)`` to ``(O, K)``.

    Args:
        values: what the weight meets.
        cotangents: what arrives at its products.
        limit: the cap.
        least: the norm below which samples are not scaled further up.
        chunk: samples at once; 0: as many as fit a small memory.
        sizes: the norms of the cotangents, ``(B,)``, where they are known.
        weights: of the rows, ``(B,)``.
    """
    return Tokens(values, cotangents, chunk, sizes).gated(limit, least, weights)[0]


class Tokens:
    """What comes back to a linear layer's weight at several positions, sample by sample.

    Args:
        values: ``(B, T, K)``.
        cotangents: ``(B, T, O)``.
        chunk: samples at once; 0: as many as fit a small memory.
        sizes: the norms of the cotangents, ``(B,)``, where they are known.

    Attributes:
        present: ``(B,)``, positive where anything came back to the sample: no norm, which may be set to what says so.
    """

    def __init__(self, values: Tensor, cotangents: Tensor, chunk: int, sizes: Tensor | None = None) -> None:
        _, positions, inputs = values.shape
        outputs = cotangents.shape[2]
        self._gram = prefers_gram(positions, inputs, outputs, _TOKEN_GRAM_GAIN)
        held = 2 * positions**2 if self._gram else inputs * outputs
        self._rows = chunk_rows(chunk, held, values.device)
        self._shape = 1, outputs, inputs
        self._values, self._lengths = zeroed_rows(values)
        self._cotangents, self._arrived = zeroed_rows(cotangents, sizes)
        self.present = self._arrived

    def _chunks(self) -> Iterator[Chunk]:
        rows, scales = self._rows, self._lengths * self._arrived
        parts = zip(self._values.split(rows), self._cotangents.split(rows), scales.split(rows), strict=True)
        return ((some.unsqueeze(1), arriving.mT.unsqueeze(1), own) for some, arriving, own in parts)

    def norms(self) -> Tensor:
        """What each sample's gradient counts as, ``(B,)``: at least its norm, up to the rounding that rules include."""
        if self._gram:
            norms = _token_norms(self._values, self._cotangents, self._lengths, self._arrived, self._rows)
            return torch.maximum(norms, CANCELLED * self._lengths * self._arrived)
        return torch.cat([norms for _, _, norms in chunk_gradients(self._chunks(), self._shape)])

    def total(self, factors: Tensor) -> Tensor:
        """``Σ_b factor_b·G_b``, ``(O, K)``, of factors ``(B,)``."""
        _, outputs, inputs = self._shape
        values, cotangents = self._values, self._cotangents
        factors = factors.to(values.dtype).reshape(-1, 1, 1)
        if inputs < outputs:
            values = values * factors
        else:
            cotangents = cotangents * factors
        return cotangents.reshape(-1, outputs).t() @ values.reshape(-1, inputs)

    def gated(self, limit: float, least: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gated sum, ``(O, K)``, and what each sample's gradient counts as; all else ``(B,)``."""
        if self._gram:
            norms = self.norms()
            return self.total(scale_factors(norms, cap=limit, floor=least, weights=weights)), norms
        total, found = gated_sum(self._chunks(), self._shape, limit, least, weights)
        return total.squeeze(0), torch.cat(found)


def _token_norms(values: Tensor, cotangents: Tensor, lengths: Tensor, sizes: Tensor, rows: int) -> Tensor:
    """At least the norms of ``Σ_t g_t x_tᵀ``, ``(B,)``, so many samples at once: the roots of ``⟨X Xᵀ, G Gᵀ⟩``."""
    squares = [
        (some @ some.mT).mul(arriving @ arriving.mT).sum((1, 2))
        for some, arriving in zip(values.split(rows), cotangents.split(rows), strict=True)
    ]
    # What the sums of products may have lost is added: the root is then at least the true norm. The two norms are
    # those of float32 sums, which may be half a percent too small each.
    entries = values.shape[2] + cotangents.shape[2] + values.shape[1] ** 2 + 8
    rounding = 1.03 * entries * torch.finfo(values.dtype).eps / 2
    lost = rounding * (lengths.square() + 1e-28) * (sizes.square() + 1e-28)
    return (torch.cat(squares).clamp(min=0.0) + lost).sqrt()


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


# A loop over chunks depends on the batch size: compiled graphs hold it as one opaque operator.
token_operator = torch.library.custom_op(
    "clipless_dp::token_weight_gradient",
    token_weight_gradient,
    mutates_args=(),
    schema="(Tensor values, Tensor cotangents, float limit, float least, int chunk) -> Tensor",
)


@token_operator.register_fake
def _(values: Tensor, cotangents: Tensor, limit: float, least: float, chunk: int) -> Tensor:
    return values.new_empty(cotangents.shape[2], values.shape[2])
