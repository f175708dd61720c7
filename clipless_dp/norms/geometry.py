"""Integer geometry of sliding windows: output sizes, paddings and the exact coverage."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from operator import index
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from clipless_dp.errors import NormError

IntOrTuple: TypeAlias = int | Sequence[int]
PaddingLike: TypeAlias = int | str | Sequence[int] | Sequence[Sequence[int]]
PaddingMode: TypeAlias = Literal["zeros", "circular"]


class Axis(NamedTuple):
    """One axis of a sliding window: window `j`, offset `t` reads pixel `stride*j + dilation*t - low`."""

    size: int
    kernel: int
    stride: int
    dilation: int
    low: int
    high: int

    def outputs(self, *, ceil_mode: bool = False) -> int:
        """Number of windows, by torch's rule (in ceil mode a window may not start in the high padding)."""
        room = self.size + self.low + self.high - self.dilation * (self.kernel - 1) - 1
        if room < 0 and not ceil_mode:
            return 0
        if not ceil_mode:
            return room // self.stride + 1
        count = -(-room // self.stride) + 1
        if (count - 1) * self.stride >= self.size + self.low:
            count -= 1
        return max(count, 0)

    def transposed_outputs(self, output_padding: int = 0) -> int:
        """Size that the transposed convolution makes of `size` inputs."""
        return (
            (self.size - 1) * self.stride
            - self.low
            - self.high
            + self.dilation * (self.kernel - 1)
            + 1
            + output_padding
        )


def as_tuple(value: IntOrTuple, axes: int, name: str, *, minimum: int) -> tuple[int, ...]:
    """Repeats an integer over `axes` axes, or checks a tuple of that length.

    Raises:
        NormError: if the value is no integer or tuple of `axes` integers, or an entry is too small.
    """
    try:
        # Tuples first: the abstract class answers slowly, and certificates ask at every step.
        entries = tuple(map(index, value)) if isinstance(value, (tuple, Sequence)) else (index(value),) * axes
    except TypeError as error:
        raise NormError(f"{name} must be an integer or a tuple of integers, got {value!r}") from error
    if len(entries) != axes:
        raise NormError(f"{name} must have one entry per axis ({axes}), got {value!r}")
    if any(entry < minimum for entry in entries):
        raise NormError(f"{name} must be at least {minimum} on every axis, got {value!r}")
    return entries


def as_padding(
    padding: PaddingLike, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Turns every way of giving a padding into one (low, high) pair per axis.

    `"same"` follows torch: `dilation*(kernel-1)` in all, the odd pixel on the high side, stride 1 only.

    Raises:
        NormError: if the padding is unknown, negative, of the wrong length, or `"same"` with a stride.
    """
    axes = len(kernel)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * axes
        if padding != "same":
            raise NormError(f"padding must be integers, 'same' or 'valid', got {padding!r}")
        if any(s != 1 for s in stride):
            raise NormError("padding='same' is only defined for stride 1; give the padding of each side")
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, (tuple, Sequence)) and any(isinstance(side, (tuple, Sequence)) for side in padding):
        if len(padding) != axes or not all(isinstance(side, (tuple, Sequence)) for side in padding):
            raise NormError(f"padding per side must be one (low, high) pair per axis, got {padding!r}")
        pairs = [as_tuple(cast(IntOrTuple, side), 2, "padding", minimum=0) for side in padding]
        return tuple((low, high) for low, high in pairs)
    sides = as_tuple(cast(IntOrTuple, padding), axes, "padding", minimum=0)
    return tuple((side, side) for side in sides)


def window_axes(
    input_size: IntOrTuple,
    kernel_size: IntOrTuple,
    *,
    stride: IntOrTuple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTuple = 1,
) -> tuple[Axis, ...]:
    """Validates the arguments of a sliding window and splits them by axis.

    The number of axes is that of `input_size` (an integer is one axis).

    Raises:
        NormError: if an argument is malformed.
    """
    axes = len(input_size) if isinstance(input_size, Sequence) else 1
    size = as_tuple(input_size, axes, "input_size", minimum=1)
    kernel = as_tuple(kernel_size, axes, "kernel_size", minimum=1)
    strides = as_tuple(stride, axes, "stride", minimum=1)
    dilations = as_tuple(dilation, axes, "dilation", minimum=1)
    sides = as_padding(padding, kernel, strides, dilations)
    return tuple(
        Axis(n, k, s, d, low, high)
        for n, k, s, d, (low, high) in zip(size, kernel, strides, dilations, sides, strict=True)
    )


def output_size(
    input_size: IntOrTuple,
    kernel_size: IntOrTuple,
    *,
    stride: IntOrTuple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
) -> tuple[int, ...]:
    """Spatial size of what a convolution, pooling or transposed convolution returns.

    Args:
        input_size: Pixels per axis; its length is the number of axes (an integer is one axis).
        kernel_size: Window size per axis, or one integer for all.
        stride: Step between windows.
        padding: An integer, one per axis, `"same"`, `"valid"`, or one (low, high) pair per axis.
        dilation: Spacing of the window's pixels.
        ceil_mode: Round the number of windows up, as torch's pooling layers can.
        transposed: Size of the transposed convolution's output instead.
        output_padding: Extra pixels on the high side of a transposed convolution's output.

    Returns:
        One integer per axis.

    Raises:
        NormError: if an argument is malformed, or no window fits.
    """
    axes = window_axes(input_size, kernel_size, stride=stride, padding=padding, dilation=dilation)
    if transposed:
        if ceil_mode:
            raise NormError("ceil_mode has no meaning for a transposed convolution")
        extra = as_tuple(output_padding, len(axes), "output_padding", minimum=0)
        sizes = tuple(axis.transposed_outputs(more) for axis, more in zip(axes, extra, strict=True))
    else:
        sizes = tuple(axis.outputs(ceil_mode=ceil_mode) for axis in axes)
    if any(size < 1 for size in sizes):
        raise NormError(f"no window fits: kernel_size={kernel_size!r} on input_size={input_size!r}")
    return sizes


def coverage(
    input_size: IntOrTuple,
    kernel_size: IntOrTuple,
    *,
    stride: IntOrTuple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
    padding_mode: str = "zeros",
) -> int:
    """The largest number of kernel windows that any one input pixel falls into.

    Args:
        input_size: Pixels per axis; its length is the number of axes (an integer is one axis).
        kernel_size: Window size per axis, or one integer for all.
        stride: Step between windows.
        padding: An integer, one per axis, `"same"`, `"valid"`, or one (low, high) pair per axis.
        dilation: Spacing of the window's pixels.
        ceil_mode: Count the overhanging windows that torch's pooling adds in ceil mode.
        padding_mode: `"zeros"` (padding is no pixel), or `"circular"`, `"reflect"` or `"replicate"` (padding is the
            pixel it copies).

    Returns:
        N, a non-negative integer (0 when no window reads any pixel).

    Raises:
        NormError: if an argument is malformed, or no window fits.

    Formula: `N = max_i #{(j, t) : reads(j, t) = i}` where window `j` reads `stride*j + dilation*t - low` at
    offset `t`. Windows and offsets are chosen per axis independently, so the count of a pixel is the
    product of its axes' counts, and so is the maximum.

    Guarantee: exact integer counting, no average and no closed form. Unfolding an image into its windows
    has operator norm exactly √N, as each pixel is copied at most N times into distinct places.
    """
    axes = window_axes(input_size, kernel_size, stride=stride, padding=padding, dilation=dilation)
    if padding_mode not in ("zeros", "circular", "reflect", "replicate"):
        raise NormError(f"padding_mode must be 'zeros', 'circular', 'reflect' or 'replicate', got {padding_mode!r}")
    most = 1
    for axis in axes:
        windows = axis.outputs(ceil_mode=ceil_mode)
        if windows < 1:
            raise NormError(f"no window fits: kernel_size={kernel_size!r} on input_size={input_size!r}")
        reads = window_reads(axis, windows)
        most *= int(torch.bincount(_pixels_read(reads, axis.size, padding_mode), minlength=1).max())
    return most


def _pixels_read(reads: Tensor, size: int, padding_mode: str) -> Tensor:
    """The pixels that stand at positions, some of which are padding."""
    if padding_mode == "circular":
        reads = reads % size
    elif padding_mode == "reflect":
        # A mirror at each edge's own pixel: torch pads by less than the size, so that one reflection is enough.
        reads = reads.abs()
        reads = torch.where(reads < size, reads, 2 * (size - 1) - reads)
        if bool((reads < 0).any()) or bool((reads >= size).any()):
            raise NormError(f"reflecting padding must be smaller than the axis, of {size} pixels")
    elif padding_mode == "replicate":
        reads = reads.clamp(0, size - 1)
    return reads[(reads >= 0) & (reads < size)].flatten()


def padded_copies(input_size: Sequence[int], sides: Sequence[tuple[int, int]], padding_mode: str) -> int:
    """In how many places of the padded map any one pixel stands at most.

    Args:
        input_size: pixels per axis.
        sides: entries added before and behind on each axis.
        padding_mode: as in :func:`coverage`.

    Guarantee: exact counting. Padding is a matrix of one 1 in each row, so its norm is exactly the number's root.
    """
    most = 1
    for size, (low, high) in zip(input_size, sides, strict=True):
        places = torch.arange(-low, size + high, device="cpu")
        most *= int(torch.bincount(_pixels_read(places, size, padding_mode), minlength=1).max())
    return most


def window_reads(axis: Axis, windows: int) -> Tensor:
    """Positions that each offset of each window reads, shape (windows, kernel); may lie outside."""
    starts = axis.stride * torch.arange(windows, device="cpu") - axis.low
    return starts[:, None] + axis.dilation * torch.arange(axis.kernel, device="cpu")[None, :]


class Incidence(NamedTuple):
    """A zero-padded axis cut down to the windows, offsets and pixels that meet.

    Window `j < windows`, offset `t < kernel` reads pixel `stride*j + dilation*t - low` of `size`; the
    cut-off windows, offsets and pixels never meet any other, so they contribute zero rows and columns only.
    """

    size: int
    windows: int
    kernel: int
    stride: int
    dilation: int
    low: int
    first_offset: int
    used: tuple[bool, ...]


@functools.lru_cache(maxsize=256)
def cut_to_incidence(axis: Axis, windows: int) -> Incidence | None:
    """Drops the windows, offsets and pixels of a zero-padded axis that meet nothing; None if all do."""
    reads = window_reads(axis, windows)
    inside = (reads >= 0) & (reads < axis.size)
    if not bool(inside.any()):
        return None
    rows = torch.nonzero(inside.any(1)).flatten().tolist()
    offsets = torch.nonzero(inside.any(0)).flatten().tolist()
    pixels = reads[inside]
    first_window, first_offset, first_pixel = rows[0], offsets[0], int(pixels.min())
    used = inside.any(0)[first_offset : offsets[-1] + 1].tolist()
    return Incidence(
        size=int(pixels.max()) - first_pixel + 1,
        windows=rows[-1] - first_window + 1,
        kernel=len(used),
        stride=axis.stride,
        dilation=axis.dilation,
        low=axis.low + first_pixel - axis.stride * first_window - axis.dilation * first_offset,
        first_offset=first_offset,
        used=tuple(used),
    )


def torus_size(incidence: Incidence) -> int:
    """Fewest outputs `q` of a circular axis (of `stride*q` pixels) that contains this zero-padded one.

    Place the pixels at 0..size-1 of a circle of `L = stride*q` pixels and zeros elsewhere. The circular
    axis computes every window of the zero-padded one if no read that falls outside 0..size-1 wraps back
    into it: reads start at `-low`, so `L >= size + low`; they end at `last`, so `L >= last + 1`; pixels and
    windows stay distinct if `L >= size` and `q >= windows`.
    """
    last = incidence.stride * (incidence.windows - 1) + incidence.dilation * (incidence.kernel - 1) - incidence.low
    length = max(incidence.size + max(incidence.low, 0), last + 1)
    return max(math.ceil(length / incidence.stride), incidence.windows)
