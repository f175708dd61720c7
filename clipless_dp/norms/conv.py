"""Certified operator norms of convolutions and transposed convolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipless_dp.errors import NormError
from clipless_dp.norms.budget import Budget, Effort, effort_of
from clipless_dp.norms.dense import matrix_norm_bound
from clipless_dp.norms.geometry import (
    Axis,
    Incidence,
    IntOrTuple,
    PaddingLike,
    as_padding,
    as_tuple,
    cut_to_incidence,
    torus_size,
    window_reads,
)
from clipless_dp.norms.rounding import certified_arithmetic, enlarge, exact_float64, normalised, scale_up
from clipless_dp.norms.symbol import symbol_norm_bound

_PLACES_TO = 1 << 14
"""Entries of a kernel up to which the places of its phases are kept for the next step."""


def conv2d_norm(
    weight: Tensor,
    *,
    input_size: tuple[int, int] | None,
    stride: IntOrTuple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    padding_mode: str = "zeros",
    budget: Budget = "balanced",
) -> float:
    """Guaranteed upper bound of the operator norm of a two-dimensional convolution.

    Args:
        weight: Shape (out, in/groups, kh, kw), or (in, out/groups, kh, kw) if transposed: torch's own
            layouts.
        input_size: Height and width of the layer's input; None for a bound that holds for every size.
        stride: Step of the windows, one integer or one per axis.
        padding: An integer, one per axis, `"same"`, `"valid"`, or ((top, bottom), (left, right)).
        dilation: Spacing of the kernel's taps.
        groups: Number of groups of channels.
        transposed: Whether the layer is the transposed convolution.
        output_padding: Of a transposed convolution.
        padding_mode: `"zeros"` or `"circular"`.
        budget: `"cheap"`, `"coarse"`, `"balanced"` (default) or `"tight"`, see :func:`~clipless_dp.norms.dense_norm`.

    Returns:
        A float `b` with `‖conv(x)‖₂ <= b‖x‖₂` for every input x of that size (no bias); 0.0 for a zero
        kernel.

    Raises:
        NormError: for another padding mode, a malformed argument, a window that does not fit, channels that
            the groups do not divide, or a weight that is not finite.

    Formula: the least of (1) `√N·‖W as (out, in·taps)‖` and `√(taps)·‖W as (in, out·taps)‖`, (2) the symbol
    of a circular convolution that contains the zero-padded one, (3) the matrix written out, where it is
    small.

    Source: H. Sedghi, V. Gupta and P. Long, ICLR 2019 (symbol); Y. Tsuzuku, I. Sato and M. Sugiyama,
    "Lipschitz-margin training", NeurIPS 2018 (the coverage bound); the reduction below is elementary.

    Guarantee: each of the three holds for the exact real operator, rounding included.

    (1) The convolution is `W` applied to the unfolded input, and unfolding has norm √N, N the coverage. Its
    adjoint unfolds outputs, each of which meets at most all taps.

    (2) *Torus.* :func:`~clipless_dp.norms.geometry.torus_size` gives a circle that contains every window of
    the zero-padded axis; restricting inputs to a subspace and dropping outputs cannot raise a norm. *Stride
    s, dilation d.* Split the pixels of a circle of `s·q` by their residue modulo s: an output of the
    strided convolution sees, of each residue, a stride-1 convolution on q pixels. Tap t falls into residue
    `d·t mod s`, that is, into class `t mod s'` with `s' = s/gcd(s,d)`, and the taps of one class are `d' =
    d/gcd(s,d)` apart on the small circle. A class is shifted as a whole, which is unitary. So the norm is
    that of the stride-1, dilation-d' kernel whose input channels are (channel, class). A circle of `q =
    d'·q'` pixels falls into d' separate circles of q', on which the dilation is 1. *Any size.* The supremum
    over all frequencies bounds every q'. *Transposed.* A transposed convolution is the adjoint of the
    convolution with the same tensor, of equal norm. *Groups* act on separate channels: the norm is the
    largest of theirs. *Circular padding.* On n pixels with s dividing n the circle is n itself; otherwise
    the outputs are among those of the stride-1 convolution on n, or the zero-padded bound applies to the
    padded image. Where windows repeat (or padding copies a pixel) at most μ times, the norm grows by at
    most √μ.

    (3) Writing the matrix out places entries and computes nothing (circular padding is written out only where
    no two taps of a window meet on one pixel), so
    :func:`~clipless_dp.norms.dense_norm`'s proof applies.
    """
    return _conv_norm(
        weight,
        2,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        output_padding,
        padding_mode,
        effort_of(budget),
    )


def conv1d_norm(
    weight: Tensor,
    *,
    input_size: int | tuple[int] | None,
    stride: IntOrTuple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrTuple = 0,
    padding_mode: str = "zeros",
    budget: Budget = "balanced",
) -> float:
    """Guaranteed upper bound of the operator norm of a one-dimensional convolution.

    Args:
        weight: Shape (out, in/groups, k), or (in, out/groups, k) if transposed.
        input_size: Length of the layer's input; None for a bound that holds for every length.
        stride: Step of the windows.
        padding: An integer, `"same"`, `"valid"`, or ((left, right),).
        dilation: Spacing of the kernel's taps.
        groups: Number of groups of channels.
        transposed: Whether the layer is the transposed convolution.
        output_padding: Of a transposed convolution.
        padding_mode: `"zeros"` or `"circular"`.
        budget: `"cheap"`, `"coarse"`, `"balanced"` (default) or `"tight"`.

    Returns:
        A float `b` with `‖conv(x)‖₂ <= b‖x‖₂` for every input x of that length (no bias).

    Raises:
        NormError: as :func:`conv2d_norm`.

    Formula, source: those of :func:`conv2d_norm` on images one pixel high.

    Guarantee: that of :func:`conv2d_norm`.
    """
    return _conv_norm(
        weight,
        1,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        output_padding,
        padding_mode,
        effort_of(budget),
    )


def _conv_norm(
    weight: Tensor,
    axes: int,
    input_size: IntOrTuple | None,
    stride: IntOrTuple,
    padding: PaddingLike,
    dilation: IntOrTuple,
    groups: int,
    transposed: bool,
    output_padding: IntOrTuple,
    padding_mode: str,
    effort: Effort,
) -> float:
    if not isinstance(weight, Tensor) or weight.ndim != axes + 2:
        raise NormError(f"the weight of a {axes}-d convolution is a tensor of {axes + 2} dimensions")
    if padding_mode not in ("zeros", "circular"):
        raise NormError(
            f"padding_mode={padding_mode!r} has no certified norm (the padding itself may amplify); "
            "use 'zeros' or 'circular'"
        )
    if transposed and (padding_mode != "zeros" or isinstance(padding, str)):
        raise NormError("a transposed convolution takes zero padding, given as integers")
    (count,) = as_tuple(groups, 1, "groups", minimum=1)
    if weight.shape[0] % count:
        raise NormError(f"groups={count} does not divide the {weight.shape[0]} channels of the weight")
    kernel_size = tuple(weight.shape[2:])
    strides = as_tuple(stride, axes, "stride", minimum=1)
    dilations = as_tuple(dilation, axes, "dilation", minimum=1)
    if min(kernel_size) < 1:
        return 0.0
    sides = as_padding(padding, kernel_size, strides, dilations)
    extras = as_tuple(output_padding, axes, "output_padding", minimum=0)
    kernel = exact_float64(weight)
    if input_size is None:
        _check_any_size(padding_mode, strides, dilations, kernel_size, sides)
        sizes = None
    else:
        sizes = as_tuple(input_size, axes, "input_size", minimum=1)
    geometry = list(zip(kernel_size, strides, dilations, sides, strict=True))
    lines: list[tuple[Axis, int]] = []
    for i, (k, s, d, (low, high)) in enumerate(geometry):
        if sizes is None:
            continue
        axis = Axis(sizes[i], k, s, d, low, high)
        windows = axis.transposed_outputs(extras[i]) if transposed else axis.outputs()
        if windows < 1:
            raise NormError(f"no window fits: kernel_size={kernel_size} on input_size={sizes}")
        lines.append((axis._replace(size=windows), sizes[i]) if transposed else (axis, windows))
    if kernel.numel() == 0:
        return 0.0
    kernel = kernel.reshape(count, -1, *kernel.shape[1:])
    if axes == 1:
        kernel = kernel.unsqueeze(-2)
        strides, dilations = (1, *strides), (1, *dilations)
        lines = [(Axis(1, 1, 1, 1, 0, 0), 1), *lines] if lines else []
    with certified_arithmetic(kernel):
        if not lines:
            return _symbol_bound(kernel, strides, dilations, (None, None), effort)
        if padding_mode == "zeros":
            return _zero_padded_bound(kernel, lines, effort)
        return _circular_bound(kernel, lines, effort)


def _check_any_size(
    padding_mode: str,
    strides: Sequence[int],
    dilations: Sequence[int],
    kernel_size: Sequence[int],
    sides: Sequence[tuple[int, int]],
) -> None:
    """Refuses the circular paddings whose norm no single symbol bounds for all sizes."""
    if padding_mode == "zeros":
        return
    repeats = any(low + high > d * (k - 1) for (low, high), k, d in zip(sides, kernel_size, dilations, strict=True))
    if repeats or any(s != 1 for s in strides):
        raise NormError(
            "circular padding with a stride, or wider than the kernel's reach, needs input_size for a bound"
        )


def _symbol_bound(
    kernel: Tensor,
    strides: Sequence[int],
    dilations: Sequence[int],
    torus: tuple[int | None, int | None],
    effort: Effort,
) -> float:
    """Symbol of the polyphase kernel; `torus` counts pixels of the reduced circle of each axis."""
    scaled, exponent = normalised(kernel)
    return scale_up(symbol_norm_bound(polyphase(scaled, strides, dilations), torus, effort), exponent)


def polyphase(kernel: Tensor, strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Moves the classes of taps `t mod stride/gcd(stride, dilation)` of each axis into the input channels."""
    high, wide = (
        min(stride // math.gcd(stride, dilation), taps)
        for stride, dilation, taps in zip(strides, dilations, kernel.shape[-2:], strict=True)
    )
    classes = (high, wide)
    if max(classes) <= 1:
        return kernel
    if kernel.numel() > _PLACES_TO:
        return _split_phases(kernel, classes)
    return torch.nn.functional.pad(kernel.flatten(), (1, 0))[_phase_places(kernel.shape, classes).to(kernel.device)]


@functools.lru_cache(maxsize=64)
def _phase_places(shape: torch.Size, classes: tuple[int, int]) -> Tensor:
    """Where each entry of the polyphase kernel is in the flat kernel, counted from one; zero for none."""
    return _split_phases(torch.arange(1, math.prod(shape) + 1, device="cpu").reshape(shape), classes).contiguous()


def _split_phases(kernel: Tensor, classes: tuple[int, int]) -> Tensor:
    for axis, count in zip((-2, -1), classes, strict=True):
        kernel = kernel.movedim(axis, -1)
        kernel = torch.nn.functional.pad(kernel, (0, -kernel.shape[-1] % count))
        kernel = kernel.reshape(*kernel.shape[:-1], -1, count).movedim(-1, 3)
        kernel = kernel.flatten(2, 3).movedim(-1, axis)
    return kernel


def _zero_padded_bound(kernel: Tensor, lines: Sequence[tuple[Axis, int]], effort: Effort) -> float:
    """The least of the bounds (1), (2) and (3) of :func:`conv2d_norm`."""
    high, wide = (cut_to_incidence(axis, windows) for axis, windows in lines)
    if high is None or wide is None:
        return 0.0
    # Scaled only now, because the taps that are left may be far smaller than those that were cut off.
    kernel, exponent = normalised(_cut_kernel(_cut_kernel(kernel, high, -2), wide, -1))
    if not bool(kernel.any()):
        return 0.0
    rows, columns = _reads(high), _reads(wide)
    if _explicit_flops(kernel, rows, columns, (high.size, wide.size)) <= effort.explicit_flops:
        matrices = _explicit(kernel, rows, columns, (high.size, wide.size))
        return scale_up(matrix_norm_bound(matrices, effort), exponent)

    by_input, by_output, taps, phase = _most_reads(high, wide)
    bounds = []
    # The symbol is at most √taps times the norm of the unfolded kernel, taps counted in one phase of the stride (or in
    # all, for the adjoint): where unfolding makes no fewer copies than that, its bound is never the smaller one.
    if not effort.factorise or by_input < phase or by_output < taps:
        forward = matrix_norm_bound(kernel.flatten(2), effort)
        backward = matrix_norm_bound(kernel.transpose(1, 2).flatten(2), effort)
        bounds += [enlarge(math.sqrt(by_input) * forward), enlarge(math.sqrt(by_output) * backward)]
    steps = [cut.dilation // math.gcd(cut.stride, cut.dilation) for cut in (high, wide)]
    torus = (math.ceil(torus_size(high) / steps[0]), math.ceil(torus_size(wide) / steps[1]))
    strides, dilations = (high.stride, wide.stride), (high.dilation, wide.dilation)
    bounds.append(symbol_norm_bound(polyphase(kernel, strides, dilations), torus, effort))
    return scale_up(min(bounds), exponent)


@functools.lru_cache(maxsize=256)
def _reads(cut: Incidence) -> Tensor:
    """Pixel that each offset of each window reads, -1 where it reads padding; shape (windows, kernel)."""
    axis = Axis(cut.size, cut.kernel, cut.stride, cut.dilation, cut.low, 0)
    reads = window_reads(axis, cut.windows)
    return torch.where((reads >= 0) & (reads < cut.size), reads, -1)


@functools.lru_cache(maxsize=256)
def _most_reads(high: Incidence, wide: Incidence) -> tuple[int, int, int, int]:
    """Most windows that read one pixel, most pixels that one window reads, offsets, and those of one phase."""
    by_input, by_output, taps, phase = 1, 1, 1, 1
    for cut in (high, wide):
        reads = _reads(cut)
        inside = reads >= 0
        by_input *= int(torch.bincount(reads[inside]).max())
        by_output *= int(inside.sum(1).max())
        taps *= cut.kernel
        phase *= -(-cut.kernel // (cut.stride // math.gcd(cut.stride, cut.dilation)))
    return by_input, by_output, taps, phase


def _cut_kernel(kernel: Tensor, cut: Incidence, axis: int) -> Tensor:
    """Keeps the taps that meet a pixel, zeros in the places of those between that meet none."""
    kept = kernel.narrow(axis, cut.first_offset, cut.kernel)
    if all(cut.used):
        return kept
    mask = torch.tensor(cut.used, device=kernel.device, dtype=kernel.dtype)
    return kept * (mask[:, None] if axis == -2 else mask)


def _explicit_flops(kernel: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> float:
    """Multiply-adds of the Gram matrix of the convolution written out."""
    groups, out, channels = kernel.shape[:3]
    high, wide = out * len(rows) * len(columns), channels * size[0] * size[1]
    return float(groups) * min(high, wide) ** 2 * max(high, wide)


def _explicit(kernel: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """The convolution of each group as a matrix, shape (groups, out·windows, in·pixels).

    `rows` and `columns` say which pixel each offset of each window reads (-1: none), no pixel twice.
    """
    groups, out, channels = kernel.shape[:3]
    matrix = kernel.new_zeros(groups, out, len(rows), len(columns), channels, *size)
    for a in range(rows.shape[1]):
        up = torch.nonzero(rows[:, a] >= 0).flatten()
        for b in range(columns.shape[1]):
            left = torch.nonzero(columns[:, b] >= 0).flatten()
            # torch puts the advanced indices first: (windows, windows, groups, out, channels).
            places = (up[:, None], left[None, :], rows[up, a][:, None], columns[left, b][None, :])
            matrix[:, :, places[0], places[1], :, places[2], places[3]] = kernel[..., a, b]
    return matrix.reshape(groups, out * len(rows) * len(columns), -1)


def _circular_bound(kernel: Tensor, lines: Sequence[tuple[Axis, int]], effort: Effort) -> float:
    """Bound of a circularly padded convolution, see the last paragraph of (2) in :func:`conv2d_norm`."""
    for axis, _ in lines:
        if axis.low > axis.size or axis.high > axis.size:
            raise NormError(f"circular padding {(axis.low, axis.high)} exceeds the input's {axis.size} pixels")
    high, wide = (axis for axis, _ in lines)
    if all(axis.dilation * (axis.kernel - 1) < axis.size for axis in (high, wide)):
        rows, columns = (window_reads(axis, windows) % axis.size for axis, windows in lines)
        size = (high.size, wide.size)
        if _explicit_flops(kernel, rows, columns, size) <= effort.explicit_flops:
            scaled, exponent = normalised(kernel)
            return scale_up(matrix_norm_bound(_explicit(scaled, rows, columns, size), effort), exponent)

    strides, torus, repeats, copies, padded = [], [], 1, 1, []
    for axis, windows in lines:
        stride = axis.stride if axis.size % axis.stride == 0 else 1
        circle = axis.size // stride
        strides.append(stride)
        torus.append(circle // math.gcd(circle, axis.dilation // math.gcd(stride, axis.dilation)))
        repeats *= math.ceil(windows / (axis.size // math.gcd(axis.size, axis.stride)))
        length = axis.size + axis.low + axis.high
        copies *= math.ceil(length / axis.size)
        padded.append((axis._replace(size=length, low=0, high=0), windows))
    dilations = [axis.dilation for axis, _ in lines]
    bound = _symbol_bound(kernel, strides, dilations, (torus[0], torus[1]), effort)
    bound = enlarge(bound * math.sqrt(repeats))
    if strides != [axis.stride for axis, _ in lines]:
        bound = min(bound, enlarge(math.sqrt(copies) * _zero_padded_bound(kernel, padded, effort)))
    return bound
