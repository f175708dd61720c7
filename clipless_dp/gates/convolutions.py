"""Gated sums of convolutions: what gradient gates return in place of the sum of the samples' gradients of a kernel.

A sample's gradient is ``Σ_t g_t x_tᵀ`` over the positions ``t`` of a kernel and the windows ``x_t`` that it meets.
Where positions are few its norm is that of ``gradient``'s products of positions. Elsewhere the gradient is formed, in
one of three ways that differ in time alone: from windows that are laid out in memory; row by row of the kernel, for
which the windows' rows are enough; or, where torch has a kernel for it, as the weight gradient of one convolution whose
groups are the samples, for which nothing is laid out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.gates.arithmetic import is_interleaved, per_sample, sample_norms, scale_factors, zeroed_rows
from clipless_dp.gates.gradient import CANCELLED, GRAM_GAIN, Chunk, chunk_gradients, chunk_rows, gated_sum, prefers_gram

_ROW_ENTRIES = 128
"""Columns from which products of a kernel's single rows are as fast as those of the whole kernel."""

_CHANNELS = 8
"""Torch's kernels for a convolution's weight gradient take channels of a group by so many; others it does slowly."""


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
    weights: Tensor | None = None,
) -> Tensor:
    """The gated sum for a convolution: ``(B, C, *size)`` and ``(B, O, *positions)`` to ``(O, C/groups, *kernel)``."""
    return Kernel(values, cotangents, kernel, stride, padding, dilation, groups, chunk).gated(limit, least, weights)[0]


class Kernel:
    """What comes back to a convolution's weight, sample by sample.

    Args:
        values: what windows are cut from, ``(B, C, *size)``.
        cotangents: what arrives at each window, ``(B, O, *positions)``.
        kernel: its size, with ``stride``, ``padding``, ``dilation`` and ``groups``.
        chunk: samples at once; 0: as many as fit a small memory.

    Attributes:
        present: ``(B,)``, positive where anything came back to the sample: no norm, which may be set to what says so.
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
        cotangents = _for_each_window(cotangents, values.shape[2:], kernel, stride, padding, dilation)
        channels, outputs = values.shape[1], cotangents.shape[1]
        self._sizes = cotangents.shape[2:]
        positions, inputs = math.prod(self._sizes), channels // groups * math.prod(kernel)
        gram = prefers_gram(positions, inputs, outputs // groups, GRAM_GAIN)
        self._shape = groups, outputs // groups, inputs
        self._geometry = list(kernel), list(stride), list(padding), list(dilation), groups
        self._way: _Way = "windows" if gram else _way(values, cotangents, *self._geometry)
        laid_out = groups * positions * inputs
        if self._way != "windows":
            laid_out = math.prod(values.shape[1:]) * (kernel[-1] if self._way == "rows" else 1) + outputs * positions
        held = laid_out + (2 * groups * positions**2 if gram else outputs * inputs)
        self._rows = chunk_rows(chunk, held, values.device)
        self._values, self._lengths = zeroed_rows(values)
        self._cotangents, self._arrived = zeroed_rows(cotangents)
        self.present = self._arrived

    def _chunks(self) -> Iterator[Chunk]:
        rows, scales = self._rows, self._lengths * self._arrived
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
        rows, scales = self._rows, self._lengths * self._arrived
        by_rows = _ByRows(self._sizes, *self._geometry[:4]) if self._way == "rows" else None
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
        return torch.cat([norms for _, _, norms in chunk_gradients(self._chunks(), self._shape)])

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

    def gated(self, limit: float, least: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gated sum, ``(O, C/groups, *kernel)``, and what each sample's gradient counts as; all else ``(B,)``."""
        kernel, *_ = self._geometry
        groups, outputs, inputs = self._shape
        if self._way != "windows":
            whole, counted, done = self._values.new_zeros(groups * outputs * inputs), [], 0
            for gradients, norms in self._whole():
                counted.append(norms)
                own = None if weights is None else weights[done : done + len(norms)]
                whole.addmv_(gradients.flatten(1).mT, scale_factors(norms, cap=limit, floor=least, weights=own))
                done += len(norms)
            if self._way == "rows":
                whole = whole.reshape(kernel[0], outputs, kernel[1], -1).permute(1, 3, 0, 2).contiguous()
            return whole.reshape(groups * outputs, -1, *kernel), torch.cat(counted)
        total, found = gated_sum(self._chunks(), self._shape, limit, least, weights)
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
    ):
        return "groups"
    return "windows"


def _for_each_window(
    cotangents: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Cotangents with zeros for windows that have none: the output padding of a transposed convolution adds some."""
    windows = [
        (entries + 2 * side - step * (taps - 1) - 1) // move + 1
        for entries, side, step, taps, move in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    missing = [count - there for count, there in zip(windows, cotangents.shape[2:], strict=True)]
    if not any(missing):
        return cotangents
    return functional.pad(cotangents, [side for count in reversed(missing) for side in (0, count)])


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
        sizes: of what the convolution returns, ``(positions down, positions across)``.
        kernel: ``(kh, kw)``, with ``stride``, which is one, ``padding`` and ``dilation``.
    """

    def __init__(
        self,
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


# As the one of tokens: a loop over chunks.
convolution_operator = torch.library.custom_op(
    "clipless_dp::convolution_weight_gradient",
    convolution_weight_gradient,
    mutates_args=(),
    schema=(
        "(Tensor values, Tensor cotangents, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
        "float limit, float least, int chunk) -> Tensor"
    ),
)


@convolution_operator.register_fake
def _(values: Tensor, cotangents: Tensor, kernel: list[int], *settings: Any) -> Tensor:
    groups = settings[3]
    return values.new_empty(cotangents.shape[1], values.shape[1] // groups, *kernel)
