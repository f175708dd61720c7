"""Certified operator norms of convolutions and transposed convolutions."""

from __future__ import annotations

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
from clipless_dp.norms.rounding import certified_arithmetic, enlarge, normalised, scale_up
from clipless_dp.norms.symbol import symbol_norm_bound


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
        budget: `"cheap"`, `"balanced"` (default) or `"tight"`, see :func:`~clipless_dp.norms.dense_norm`.

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
    "Lipschitz-margin training", NeurIPS 2018, §3 (the coverage bound); the reduction below is elementary.

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

    (3) Writing the matrix out places entries and computes nothing, so
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
        budget: `"cheap"`, `"balanced"` (default) or `"tight"`.

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
    if weight.ndim != axes + 2:
        raise NormError(
            f"a {axes}-d convolution's weight has {axes + 2} dimensions, got {tuple(weight.shape)}"
        )
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
    scaled, exponent = normalised(weight)
    kernel = scaled.reshape(count, -1, *scaled.shape[1:]) if scaled.numel() else scaled
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
    if kernel.numel() == 0 or not bool(kernel.any()):
        return 0.0
    if axes == 1:
        kernel = kernel.unsqueeze(-2)
        strides, dilations = (1, *strides), (1, *dilations)
        lines = [(Axis(1, 1, 1, 1, 0, 0), 1), *lines] if lines else []
    with certified_arithmetic(kernel):
        if not lines:
            bound = _symbol_bound(kernel, strides, dilations, (None, None), effort)
        elif padding_mode == "zeros":
            bound = _zero_padded_bound(kernel, lines, effort)
        else:
            bound = _circular_bound(kernel, lines, effort)
    return scale_up(bound, exponent)


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
    repeats = any(
        low + high > d * (k - 1) for (low, high), k, d in zip(sides, kernel_size, dilations, strict=True)
    )
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
    return symbol_norm_bound(_polyphase(kernel, strides, dilations), torus, effort)


def _polyphase(kernel: Tensor, strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Moves the classes of taps `t mod stride/gcd(stride, dilation)` of each axis into the input channels."""
    for axis in (-2, -1):
        classes = strides[axis] // math.gcd(strides[axis], dilations[axis])
        classes = min(classes, kernel.shape[axis])
        if classes > 1:
            kernel = kernel.movedim(axis, -1)
            missing = -kernel.shape[-1] % classes
            kernel = torch.nn.functional.pad(kernel, (0, missing))
            kernel = kernel.reshape(*kernel.shape[:-1], -1, classes).movedim(-1, 3)
            kernel = kernel.flatten(2, 3).movedim(-1, axis)
    return kernel


def _zero_padded_bound(kernel: Tensor, lines: Sequence[tuple[Axis, int]], effort: Effort) -> float:
    """The least of the bounds (1), (2) and (3) of :func:`conv2d_norm`."""
    cuts = [cut_to_incidence(axis, windows) for axis, windows in lines]
    high, wide = cuts
    if high is None or wide is None:
        return 0.0
    kernel = _cut_kernel(_cut_kernel(kernel, high, -2), wide, -1)
    if not bool(kernel.any()):
        return 0.0
    groups, out, channels = kernel.shape[:3]
    rows = out * high.windows * wide.windows
    columns = channels * high.size * wide.size
    if groups * min(rows, columns) ** 2 * max(rows, columns) <= effort.explicit_flops:
        return matrix_norm_bound(_explicit(kernel, high, wide), effort)

    by_input, by_output = 1, 1
    for cut in (high, wide):
        reads = _reads(cut)
        inside = (reads >= 0) & (reads < cut.size)
        counts = torch.bincount(reads[inside])
        by_input *= int(counts.max())
        by_output *= int(inside.sum(1).max())
    bounds = []
    small_map = by_input < high.kernel * wide.kernel or by_output < high.kernel * wide.kernel
    if not effort.factorise or small_map:
        forward = matrix_norm_bound(kernel.flatten(2), effort)
        backward = matrix_norm_bound(kernel.transpose(1, 2).flatten(2), effort)
        bounds += [enlarge(math.sqrt(by_input) * forward), enlarge(math.sqrt(by_output) * backward)]
    if effort.factorise:
        torus = []
        for cut in (high, wide):
            step = cut.dilation // math.gcd(cut.stride, cut.dilation)
            torus.append(math.ceil(torus_size(cut) / step))
        bounds.append(
            _symbol_bound(
                kernel,
                (high.stride, wide.stride),
                (high.dilation, wide.dilation),
                (torus[0], torus[1]),
                effort,
            )
        )
    return min(bounds)


def _reads(cut: Incidence) -> Tensor:
    axis = Axis(cut.size, cut.kernel, cut.stride, cut.dilation, cut.low, 0)
    return window_reads(axis, cut.windows)


def _cut_kernel(kernel: Tensor, cut: Incidence, axis: int) -> Tensor:
    """Keeps the taps that meet a pixel, zeros in the places of those between that meet none."""
    kept = kernel.narrow(axis, cut.first_offset, cut.kernel)
    if all(cut.used):
        return kept
    mask = torch.tensor(cut.used, device=kernel.device, dtype=kernel.dtype)
    return kept * (mask[:, None] if axis == -2 else mask)


def _explicit(kernel: Tensor, high: Incidence, wide: Incidence) -> Tensor:
    """The zero-padded convolution of each group as a matrix, shape (groups, out·windows, in·pixels)."""
    groups, out, channels = kernel.shape[:3]
    matrix = kernel.new_zeros(groups, out, high.windows, wide.windows, channels, high.size, wide.size)
    rows, columns = _reads(high), _reads(wide)
    for a in range(high.kernel):
        ja = torch.nonzero((rows[:, a] >= 0) & (rows[:, a] < high.size)).flatten()
        for b in range(wide.kernel):
            jb = torch.nonzero((columns[:, b] >= 0) & (columns[:, b] < wide.size)).flatten()
            # Advanced indices first in the result: (windows, windows, groups, out, channels).
            matrix[:, :, ja[:, None], jb[None, :], :, rows[ja, a][:, None], columns[jb, b][None, :]] = kernel[
                ..., a, b
            ]
    return matrix.reshape(groups, out * high.windows * wide.windows, -1)


def _circular_bound(kernel: Tensor, lines: Sequence[tuple[Axis, int]], effort: Effort) -> float:
    """Bound of a circularly padded convolution, see the last paragraph of (2) in :func:`conv2d_norm`."""
    effort = effort if effort.factorise else Effort(True, effort.tolerance, effort.riesz_slack, 0.0)
    strides, torus, repeats, copies, padded = [], [], 1, 1, []
    for axis, windows in lines:
        size, stride = axis.size, axis.stride
        if axis.low > size or axis.high > size:
            raise NormError(f"circular padding {(axis.low, axis.high)} exceeds the input's {size} pixels")
        repeats *= math.ceil(windows / (size // math.gcd(size, stride)))
        copies *= math.ceil((size + axis.low + axis.high) / size)
        whole = size % stride == 0
        strides.append(stride if whole else 1)
        circle = size // strides[-1]
        torus.append(circle // math.gcd(circle, axis.dilation // math.gcd(strides[-1], axis.dilation)))
        padded.append((Axis(size + axis.low + axis.high, axis.kernel, stride, axis.dilation, 0, 0), windows))
    dilations = [axis.dilation for axis, _ in lines]
    bound = _symbol_bound(kernel, strides, dilations, (torus[0], torus[1]), effort)
    bound = enlarge(bound * math.sqrt(repeats))
    if strides != [axis.stride for axis, _ in lines]:
        bound = min(bound, enlarge(math.sqrt(copies) * _zero_padded_bound(kernel, padded, effort)))
    return bound
