"""Gated sums: what gradient gates return in place of the sum of the samples' gradients of a weight or a bias.

A weight that meets one vector of each sample has the gradient ``g xᵀ``, of norm ``‖g‖‖x‖`` in closed form. A weight
that meets several (tokens, pixels) has ``Σ_t g_t x_tᵀ``, whose norm is computed for a chunk of samples at a time: from
the samples' gradients themselves, or, where a sample has few positions, from ``Σ_ts ⟨g_t, g_s⟩⟨x_t, x_s⟩``. The chunk's
scaled sum is all that is kept of it.

A convolution's gradients are formed from windows that are laid out in memory; or row by row of the kernel, for which
the windows' rows are enough; or, where torch has a kernel for it, as the weight gradient of one convolution whose
groups are the samples, for which nothing is laid out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.gates.arithmetic import (
    UNDERFLOW,
    is_interleaved,
    per_sample,
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

_TOKEN_GRAM_GAIN = 60.0
"""The same for tokens, whose factors go into one product of all samples."""

_LANES = 16
"""Numbers of float32 in a processor's widest vector."""

_ROW_ENTRIES = 128
"""Columns from which products of a kernel's single rows are as fast as those of the whole kernel."""

_CHANNELS = 8
"""Torch's kernels for a convolution's weight gradient take channels of a group by so many; others it does slowly."""


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


Chunk = tuple[Tensor, Tensor, Tensor]
"""Of some samples ``(b, groups, T, K)`` that the weight meets, cotangents ``(b, groups, O, T)`` and ``‖x‖‖g‖``."""


def _formed(chunks: Iterator[Chunk], shape: tuple[int, int, int]) -> Iterator[tuple[Chunk, Tensor | None, Tensor]]:
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
        if _prefers_gram(rows.shape[2], inputs, outputs, _GRAM_GAIN):
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


def _gated_sum(
    chunks: Iterator[Chunk], shape: tuple[int, int, int], limit: float, least: float
) -> tuple[Tensor, list[Tensor]]:
    """``Σ_b factor_b·G_b``.

    Args:
        chunks: of some samples each.
        shape: ``(groups, O, K)``.
        limit: the cap.
        least: the norm below which samples are not scaled further up.

    Returns:
        ``(groups, O, K)``, and what the samples' gradients count as, ``(b,)`` for each chunk.
    """
    total: Tensor | None = None
    found: list[Tensor] = []
    formed = False
    for (rows, cotangents, _), gradients, norms in _formed(chunks, shape):
        found.append(norms)
        factors = scale_factors(norms, cap=limit, floor=least)
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


def _prefers_gram(positions: int, inputs: int, outputs: int, gain: float) -> bool:
    return 2 * positions**2 * (inputs + outputs) <= gain * inputs * outputs


def _chunk_rows(chunk: int, entries: int, device: torch.device) -> int:
    """Samples at once: as asked for, or as many as the default memory holds."""
    return chunk if chunk > 0 else max(1, _CHUNK_ENTRIES.get(device.type, _CHUNK_ENTRIES_ELSEWHERE) // max(entries, 1))


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
    return Tokens(values, cotangents, chunk, sizes).gated(limit, least)[0]


class Tokens:
    """What comes back to a linear layer's weight at several positions, sample by sample.

    Args:
        values: ``(B, T, K)``.
        cotangents: ``(B, T, O)``.
        chunk: samples at once; 0: as many as fit a small memory.
        sizes: the norms of the cotangents, ``(B,)``, where they are known.

    Attributes:
        present: ``(B,)``, positive where anything came back to the sample.
    """

    def __init__(self, values: Tensor, cotangents: Tensor, chunk: int, sizes: Tensor | None = None) -> None:
        _, positions, inputs = values.shape
        outputs = cotangents.shape[2]
        self._gram = _prefers_gram(positions, inputs, outputs, _TOKEN_GRAM_GAIN)
        held = 2 * positions**2 if self._gram else inputs * outputs
        self._rows = _chunk_rows(chunk, held, values.device)
        self._shape = 1, outputs, inputs
        self._values, self._lengths = zeroed_rows(values)
        self._cotangents, self.present = zeroed_rows(cotangents, sizes)

    def _chunks(self) -> Iterator[Chunk]:
        rows, scales = self._rows, self._lengths * self.present
        parts = zip(self._values.split(rows), self._cotangents.split(rows), scales.split(rows), strict=True)
        return ((some.unsqueeze(1), arriving.mT.unsqueeze(1), own) for some, arriving, own in parts)

    def norms(self) -> Tensor:
        """What each sample's gradient counts as, ``(B,)``: at least its norm, up to the rounding that rules include."""
        if self._gram:
            norms = _token_norms(self._values, self._cotangents, self._lengths, self.present, self._rows)
            return torch.maximum(norms, CANCELLED * self._lengths * self.present)
        return torch.cat([norms for _, _, norms in _formed(self._chunks(), self._shape)])

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

    def gated(self, limit: float, least: float) -> tuple[Tensor, Tensor]:
        """The gated sum, ``(O, K)``, and what each sample's gradient counts as, ``(B,)``."""
        if self._gram:
            norms = self.norms()
            return self.total(scale_factors(norms, cap=limit, floor=least)), norms
        total, found = _gated_sum(self._chunks(), self._shape, limit, least)
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
    return Kernel(values, cotangents, kernel, stride, padding, dilation, groups, chunk).gated(limit, least)[0]


class Kernel:
    """What comes back to a convolution's weight, sample by sample.

    Args:
        values: what windows are cut from, ``(B, C, *size)``.
        cotangents: what arrives at each window, ``(B, O, *positions)``.
        kernel: its size, with ``stride``, ``padding``, ``dilation`` and ``groups``.
        chunk: samples at once; 0: as many as fit a small memory.

    Attributes:
        present: ``(B,)``, positive where anything came back to the sample.
    """

    def __init__(
        self,
        values: Tensor,
        cotangents: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        chunk: int,
    ) -> None:
        channels, outputs = values.shape[1], cotangents.shape[1]
        self._sizes = cotangents.shape[2:]
        positions, inputs = math.prod(self._sizes), channels // groups * math.prod(kernel)
        gram = _prefers_gram(positions, inputs, outputs // groups, _GRAM_GAIN)
        self._shape = groups, outputs // groups, inputs
        self._geometry = list(kernel), list(stride), list(padding), list(dilation), groups
        self._way: _Way = "windows" if gram else _way(values, cotangents, *self._geometry)
        laid_out = groups * positions * inputs
        if self._way != "windows":
            laid_out = math.prod(values.shape[1:]) * (kernel[-1] if self._way == "rows" else 1) + outputs * positions
        held = laid_out + (2 * groups * positions**2 if gram else outputs * inputs)
        self._rows = _chunk_rows(chunk, held, values.device)
        self._values, self._lengths = zeroed_rows(values)
        self._cotangents, self.present = zeroed_rows(cotangents)

    def _chunks(self) -> Iterator[Chunk]:
        rows, scales = self._rows, self._lengths * self.present
        parts = zip(self._values.split(rows), self._cotangents.split(rows), scales.split(rows), strict=True)
        return (
            (
                _windows(some, self._sizes, *self._geometry),
                _positions_last(arriving).unflatten(1, self._shape[:2]),
                own,
            )
            for some, arriving, own in parts
        )

    def _whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each chunk the samples' gradients, ``(b, ...)``, and what they count as, ``(b,)``; not from windows."""
        rows, scales = self._rows, self._lengths * self.present
        by_rows = _ByRows(self._values, self._sizes, *self._geometry[:4]) if self._way == "rows" else None
        parts = zip(self._values.split(rows), self._cotangents.split(rows), scales.split(rows), strict=True)
        for some, arriving, own in parts:
            if by_rows is None:
                gradients = _grouped_gradients(some, arriving, *self._geometry)
            else:
                gradients = by_rows(some, arriving)
            yield gradients, torch.maximum(sample_norms(gradients), CANCELLED * own)

    def norms(self) -> Tensor:
        """As of :class:`Tokens`."""
        if self._way != "windows":
            return torch.cat([norms for _, norms in self._whole()])
        return torch.cat([norms for _, _, norms in _formed(self._chunks(), self._shape)])

    def total(self, factors: Tensor) -> Tensor:
        """``Σ_b factor_b·G_b``, ``(O, C/groups, *kernel)``, of factors ``(B,)``."""
        kernel, stride, padding, dilation, groups = self._geometry
        scaled = self._cotangents * per_sample(factors.to(self._cotangents.dtype), self._cotangents)
        weight = scaled.new_empty(scaled.shape[1], self._values.shape[1] // groups, *kernel)
        found: Tensor = torch.ops.aten.convolution_backward(
            scaled, self._values, weight, None, stride, padding, dilation, False, [0] * len(kernel), groups,
            [False, True, False],
        )[1]  # fmt: skip
        return found

    def gated(self, limit: float, least: float) -> tuple[Tensor, Tensor]:
        """The gated sum, ``(O, C/groups, *kernel)``, and what each sample's gradient counts as, ``(B,)``."""
        kernel, *_ = self._geometry
        groups, outputs, inputs = self._shape
        if self._way != "windows":
            whole, counted = self._values.new_zeros(groups * outputs * inputs), []
            for gradients, norms in self._whole():
                counted.append(norms)
                whole.addmv_(gradients.flatten(1).mT, scale_factors(norms, cap=limit, floor=least))
            if self._way == "rows":
                whole = whole.reshape(kernel[0], outputs, kernel[1], -1).permute(1, 3, 0, 2).contiguous()
            return whole.reshape(groups * outputs, -1, *kernel), torch.cat(counted)
        total, found = _gated_sum(self._chunks(), self._shape, limit, least)
        gradient = total.reshape(groups * outputs, *kernel, -1).movedim(-1, 1).contiguous()
        return gradient, torch.cat(found)


_Way = Literal["windows", "rows", "groups"]
"""From what a convolution's gradients are formed: see the head of this file."""


def _way(
    values: Tensor,
    cotangents: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> _Way:
    """How the samples' gradients are formed, which is a matter of time alone.

    Steps above one and kernels of one entry leave few windows to lay out. Rows are for many channels that lie in memory
    channels last. Groups are for what torch's own kernels do: on a CPU, in float32, with whole vectors of channels.
    """
    usual = (
        values.device.type == "cpu"
        and not torch.is_grad_enabled()
        and len(values) > 0
        and math.prod(stride) == 1 < math.prod(kernel)
    )
    if usual and groups == 1 and is_interleaved(values) and kernel[-1] * values.shape[1] >= _ROW_ENTRIES:
        return "rows"
    if (
        usual
        and values.dtype == cotangents.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and values.shape[1] // groups % _CHANNELS == cotangents.shape[1] // groups % _CHANNELS == 0
        and _makes_positions(values, cotangents, kernel, stride, padding, dilation)
    ):
        return "groups"
    return "windows"


def _makes_positions(
    values: Tensor,
    cotangents: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> bool:
    """Whether there is a cotangent for each window: the output padding of a transposed convolution adds some."""
    windows = [
        (size + 2 * side - step * (taps - 1) - 1) // move + 1
        for size, side, step, taps, move in zip(values.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    return windows == list(cotangents.shape[2:])


def _grouped_gradients(
    values: Tensor,
    cotangents: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Each sample's gradient, ``(b, O·C/groups·prod(kernel))``: that of one convolution with ``b·groups`` groups.

    The samples' channels side by side, ``(1, b·C, *size)``, are the memory of the batch itself, and a group's weight
    meets its own sample alone.
    """
    samples, channels = values.shape[:2]
    weight = values.new_empty(samples * cotangents.shape[1], channels // groups, *kernel)
    seen, met = (maps.contiguous().flatten(0, 1).unsqueeze(0) for maps in (values, cotangents))
    gradients: Tensor = torch.ops.aten.convolution_backward(
        met, seen, weight, None, stride, padding, dilation, False, [0] * len(kernel), samples * groups,
        [False, True, False],
    )[1]  # fmt: skip
    return gradients.reshape(samples, -1)


class _ByRows:
    """Samples' gradients of a kernel row by row, in steps of one, from maps ``(b, C, H, W)`` that lie channels last.

    What a row of the kernel meets lies together where the maps' rows of windows do, ``(b, H', positions, kw·C)`` with
    ``H'`` the padded height: row ``i`` meets ``positions`` times as many of them from the ``i``-th on. So each entry is
    copied ``kw`` times in place of ``kh·kw``, and the products of all rows read the same copy.

    Args:
        values: all of the maps.
        sizes: of what the convolution returns, ``(positions down, positions across)``.
        kernel: ``(kh, kw)``, with ``stride``, which is one, ``padding`` and ``dilation``.
    """

    def __init__(
        self,
        values: Tensor,
        sizes: Sequence[int],
        kernel: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> None:
        self._sizes, self._kernel, self._padding, self._dilation = sizes, kernel, padding, dilation
        self._laid_out: Tensor | None = None
        self._held: Tensor | None = None

    def __call__(self, maps: Tensor, cotangents: Tensor) -> Tensor:
        """The gradients, ``(b, kh, O, kw·C)``, in memory that the next call takes; the first has the most samples."""
        (down, across), (tall, wide) = self._sizes, self._kernel
        (above, side), (apart, step) = self._padding, self._dilation
        samples, channels, height, width = maps.shape
        outputs = cotangents.shape[1]
        if self._laid_out is None or self._held is None:
            # Zero where windows reach beyond the maps, and never written there.
            self._laid_out = maps.new_zeros(samples, height + 2 * above, across, wide, channels)
            self._held = maps.new_empty(samples, tall, outputs, wide * channels)
        laid_out, held = self._laid_out[:samples], self._held[:samples]
        source = maps.permute(0, 2, 3, 1)
        for tap in range(wide):
            first = step * tap - side
            start, stop = max(0, -first), min(across, width - first)
            if start < stop:
                laid_out[:, above : above + height, start:stop, tap].copy_(source[:, :, start + first : stop + first])
        windows = laid_out.reshape(samples, -1, wide * channels)
        arriving = _positions_last(cotangents)
        for row in range(tall):
            met = windows[:, row * apart * across :][:, : down * across]
            torch.bmm(arriving, met, out=held[:, row])
        return held


def _windows(
    maps: Tensor,
    sizes: Sequence[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """What a kernel meets at each position: ``(b, C, *size)`` to ``(b, groups, T, prod(kernel)·C/groups)``.

    What lies together is copied at once: along a window's row the channels, or, where they are few and steps are of
    one, along a row of positions what one entry of the kernel meets. The result is a view of either.
    """
    axes, channels = len(kernel), maps.shape[1]
    inputs = channels // groups * math.prod(kernel)
    sides = [side for side in reversed(padding) for _ in range(2)]
    along = stride[-1] == 1 and sizes[-1] > kernel[-1] * (channels // groups)
    if along:
        windows, first = functional.pad(maps, sides), 2
    else:
        windows, first = functional.pad(maps.movedim(1, -1), (0, 0, *sides)), 1
    windows = windows.contiguous()
    for axis, (step, taps, move) in enumerate(zip(dilation, kernel, stride, strict=True), start=first):
        windows = windows.unfold(axis, step * (taps - 1) + 1, move).narrow(axis, 0, sizes[axis - first])
    thinned: Any = (..., *(slice(None, None, step) for step in dilation))
    windows = windows[thinned]
    if along:
        # (b, C, *size, *kernel) to (b, groups, *kernel, C/groups, *size).
        windows = windows.unflatten(1, (groups, channels // groups))
        windows = windows.movedim(tuple(range(3 + axes, 3 + 2 * axes)), tuple(range(2, 2 + axes)))
        return cast(Tensor, windows.reshape(len(maps), groups, inputs, math.prod(sizes)).mT)
    # (b, *size, C, *kernel) to (b, groups, *size, *kernel, C/groups).
    windows = windows.unflatten(axes + 1, (groups, channels // groups)).movedim(axes + 1, 1).movedim(axes + 2, -1)
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
