"""Certified operator norms of convolutions over volumes, by those of maps at each frequency along the depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.errors import NormError
from clipless_dp.norms.budget import Budget
from clipless_dp.norms.conv import conv2d_norm, polyphase
from clipless_dp.norms.dense import dense_norm
from clipless_dp.norms.geometry import Axis, IntOrTuple, PaddingLike, as_padding, as_tuple, cut_to_incidence, torus_size
from clipless_dp.norms.rounding import certified_arithmetic, enlarge, exact_float64, normalised, scale_up

_WRITTEN_OUT = 1 << 18
"""Entries of the matrix up to which it is written out."""
_FREQUENCIES = 64
"""The most frequencies along the depth; a longer circle is looked at in as many places, and bounded between them."""


def conv3d_norm(
    weight: Tensor,
    *,
    input_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    budget: Budget = "balanced",
) -> float:
    """Guaranteed upper bound of the operator norm of a three-dimensional convolution with zero padding.

    Args:
        weight: Shape (out, in/groups, kd, kh, kw).
        input_size: Depth, height and width of the layer's input, or one integer for all.
        stride: Step of the windows, one integer or one per axis.
        padding: An integer, one per axis, `"same"`, `"valid"`, or one (low, high) pair per axis.
        dilation: Spacing of the kernel's taps.
        groups: Number of groups of channels.
        padding_mode: `"zeros"`.
        budget: As in :func:`~clipless_dp.norms.conv2d_norm`.

    Returns:
        A float `b` with `‖conv(x)‖₂ <= b‖x‖₂` for every input x of that size (no bias).

    Raises:
        NormError: for another padding mode, a malformed argument, a window that does not fit, channels that
            the groups do not divide, or a weight that is not finite.

    Formula: the norm of the matrix, where that is small; else `max_θ ‖conv2d(Σ_t e^{itθ} W[:, :, t])‖` over the
    frequencies θ of a circle along the depth that contains the zero-padded axis; of a longer circle over M places,
    times `1/√cos(πn/M)` for a kernel of n + 1 taps.

    Source: the symbol of H. Sedghi, V. Gupta and P. Long, ICLR 2019, along one axis of three; M. Riesz's bound of
    trigonometric polynomials, "Eine trigonometrische Interpolationsformel", Jahresber. DMV 23, 1914.

    Guarantee: *One axis.* Over the depth the convolution is a matrix of convolutions of maps A_t, one for each tap,
    which depend on the difference of depths alone. On the circle of :func:`~clipless_dp.norms.conv2d_norm`'s paragraph
    (2) (strides and dilations are taken out of it as there) the unitary Fourier transform along the depth turns it into
    A(θ) = Σ_t e^{itθ}A_t at each of its frequencies, whose largest norm is that of the whole. A(θ) is a convolution of
    maps with a complex kernel: as a real map of pairs of real and imaginary parts, by the kernel [[Re, -Im], [Im, Re]],
    it has the same norm. *Between frequencies.* For a unit u, ‖A(θ)u‖² is a trigonometric polynomial of degree n ≥ 1.
    At a maximum θ* over u and θ it is at least cos(nh) times the maximum at a distance of h ≤ π/n (Riesz), and a place
    of the M is at most π/M away. *Rounding.* Angles up to 2π err by 19u, u = 2⁻⁵³, cosines by 2u, sums by kd·u: an
    entry of A(θ)'s kernel, both parts together, by less than (64 + 4kd)u times the sum of its taps' sizes; so the
    kernel by √kd‖W‖ times that in Frobenius norm, and its operator by √(kh·kw) times that again.
    """
    if not isinstance(weight, Tensor) or weight.ndim != 5:
        raise NormError("the weight of a 3-d convolution is a tensor of 5 dimensions")
    if padding_mode != "zeros":
        raise NormError(f"padding_mode={padding_mode!r} has no certified norm over volumes: use 'zeros'")
    (count,) = as_tuple(groups, 1, "groups", minimum=1)
    if weight.shape[0] % count:
        raise NormError(f"groups={count} does not divide the {weight.shape[0]} channels of the weight")
    taps = tuple(weight.shape[2:])
    if weight.numel() == 0:
        return 0.0
    sizes = as_tuple(input_size, 3, "input_size", minimum=1)
    strides = as_tuple(stride, 3, "stride", minimum=1)
    dilations = as_tuple(dilation, 3, "dilation", minimum=1)
    sides = as_padding(padding, taps, strides, dilations)
    geometry = zip(sizes, taps, strides, dilations, sides, strict=True)
    axes = [Axis(size, tap, step, spread, *side) for size, tap, step, spread, side in geometry]
    if any(axis.outputs() < 1 for axis in axes):
        raise NormError(f"no window fits: kernel_size={taps} on input_size={sizes}")
    exact = exact_float64(weight)
    if (
        exact.shape[1] * count * math.prod(sizes) * len(exact) * math.prod(axis.outputs() for axis in axes)
        <= _WRITTEN_OUT
    ):
        return dense_norm(_explicit(exact, sizes, strides, sides, dilations, count), budget=budget)
    cut = cut_to_incidence(axes[0], axes[0].outputs())
    if cut is None:
        return 0.0
    used = torch.tensor(cut.used, device=exact.device, dtype=exact.dtype)
    kernel = exact.narrow(2, cut.first_offset, cut.kernel) * used[:, None, None]
    # Scaled only now, because the taps that are left may be far smaller than those that were cut off.
    kernel, exponent = normalised(kernel)
    if not bool(kernel.any()):
        return 0.0
    with certified_arithmetic(kernel):
        grouped = kernel.reshape(count, -1, *kernel.shape[1:3], taps[1] * taps[2])
        phases = polyphase(grouped, (cut.stride, 1), (cut.dilation, 1))
        step = cut.dilation // math.gcd(cut.stride, cut.dilation)
        circle = math.ceil(torus_size(cut) / step)
        degree = phases.shape[3] - 1
        places = circle if circle <= _FREQUENCIES else max(_FREQUENCIES, 8 * degree)
        between = 1.0 if places == circle or not degree else 1.0 / math.sqrt(math.cos(math.pi * degree / places))
        lost = (64.0 + 4.0 * cut.kernel) * 2.0**-53 * math.sqrt(cut.kernel * taps[1] * taps[2]) * float(kernel.norm())
        bound = max(
            conv2d_norm(
                one.unflatten(-1, taps[1:]).flatten(0, 1),
                input_size=(sizes[1], sizes[2]),
                stride=strides[1:],
                padding=sides[1:],
                dilation=dilations[1:],
                groups=count,
                budget=budget,
            )
            for one in _symbols(phases, places)
        )
    return scale_up(enlarge((bound + enlarge(lost)) * enlarge(between)), exponent)


def _explicit(
    kernel: Tensor,
    sizes: Sequence[int],
    strides: Sequence[int],
    sides: Sequence[tuple[int, int]],
    dilations: Sequence[int],
    groups: int,
) -> Tensor:
    """The matrix, ``(in, out)``: of a basis vector each output is one entry of the kernel and zeros, added exactly."""
    channels = kernel.shape[1] * groups
    inputs = math.prod(sizes) * channels
    basis = torch.eye(inputs, dtype=kernel.dtype).reshape(inputs, channels, *sizes)
    padded = functional.pad(basis, [side for pair in reversed(sides) for side in pair])
    stepped = functional.conv3d(padded, kernel.cpu(), stride=tuple(strides), dilation=tuple(dilations), groups=groups)
    return stepped.flatten(1)


def _symbols(phases: Tensor, places: int) -> Iterator[Tensor]:
    """The kernel at each frequency, ``(groups, out, in, kh·kw)`` or twice as many channels; of mirrored ones the first.

    Args:
        phases: ``(groups, out, in, taps, kh·kw)``.
        places: of the circle, in equal steps.
    """
    taps = torch.arange(phases.shape[3], dtype=torch.float64, device=phases.device)
    for place in range(places // 2 + 1):
        if place == 0 or 2 * place == places:
            # A sum, or an alternating one: real, and exact in its factors.
            yield torch.einsum("goitk,t->goik", phases, 1.0 - 2.0 * (taps % 2) if place else torch.ones_like(taps))
            continue
        # Whole turns are taken out first, so that the angle is exact up to its own rounding.
        angles = 2.0 * math.pi / places * torch.remainder(taps * place, places)
        real = torch.einsum("goitk,t->goik", phases, angles.cos())
        imaginary = torch.einsum("goitk,t->goik", phases, angles.sin())
        upper, lower = torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)
        yield torch.cat([upper, lower], 1)
