"""What makes a float64 computation a certificate: exact scaling, isolation from settings, safe rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clipless_dp.errors import NormError

UNIT = 2.0**-53
"""Unit roundoff u of float64."""

SINGLE_UNIT = 2.0**-24
"""Unit roundoff u of float32."""

_SMALLEST_NORMAL = 2.0**-1022


def gamma(terms: int) -> float:
    """Relative bound `8(n+4)u` for everything that happens to a sum of n products in float64.

    A dot product of length n, in any order and with or without fused multiply-add, errs by at most
    `γ_n = nu/(1-nu)` times the sum of the absolute products (Higham, *Accuracy and Stability of Numerical
    Algorithms*, 2nd ed., §3.1); complex arithmetic multiplies the constant by less than 2√2 (§3.6). The
    factor 8 and the 4 leave room for the few further roundings that each use names.
    """
    return 8.0 * (terms + 4) * UNIT


def row_distances(rows: Tensor) -> Tensor:
    """Euclidean distances of all pairs of a matrix's rows, rounded up: above 0 wherever rows differ.

    Squares of what is below `2^-400` of the largest entry may underflow, so that such pairs are taken by themselves.

    Args:
        rows: `(C, n)` in float64.

    Returns:
        `(C, C)` in float64.
    """
    largest = float(rows.abs().max()) if rows.numel() else 0.0
    scale = 2.0 ** (math.frexp(largest)[1] - 1) if 0.0 < largest < math.inf else 1.0
    apart = torch.cdist(rows / scale, rows / scale, compute_mode="donot_use_mm_for_euclid_dist")
    close = apart < 2.0**-400
    apart = apart * scale
    for row in (close.sum(1) > 1).nonzero().flatten().tolist():
        moved = rows[close[row]] - rows[row]
        top = moved.abs().amax(1) if rows.shape[1] else moved.new_zeros(len(moved))
        lengths = (moved / torch.where(top > 0.0, top, 1.0)[:, None]).norm(dim=1) * top
        apart[row, close[row]] = lengths
    return above_zero(apart * (1.0 + gamma(rows.shape[1])), apart > 0.0)


def above_zero(values: Tensor, where: Tensor) -> Tensor:
    """Values, at least the smallest normal number where they are known to be above 0: rounded up, not to 0."""
    return torch.where(where, values.clamp(min=torch.finfo(values.dtype).tiny), values)


def product_error(terms: int, unit: float = SINGLE_UNIT) -> float:
    """Relative bound `γ_n = nu/(1-nu)` of a sum of n products at unit roundoff u, float32's; infinity if `nu ≥ ½`."""
    share = terms * unit
    return share / (1.0 - share) * (1.0 + 4.0 * UNIT) if share < 0.5 else math.inf


def single_number(value: float) -> float:
    """The float32 number next to a value, as torch rounds a scalar that it adds to a float32 tensor."""
    return float(torch.tensor(value, dtype=torch.float32))


def enlarge(value: float, roundings: int = 4) -> float:
    """Enlarges a non-negative float by as many relative roundings, so that it stays above the exact value."""
    return value * (1.0 + 2.0 * (roundings + 1) * UNIT) + 5e-324


def scale_up(value: float, exponent: int) -> float:
    """`value * 2**exponent` rounded upwards; infinity where float64 ends."""
    try:
        scaled = math.ldexp(value, exponent)
    except OverflowError:
        return math.inf
    # Scaling by a power of two is exact except among the subnormals, where it may have rounded down.
    return math.nextafter(scaled, math.inf) if value > 0.0 and scaled < _SMALLEST_NORMAL else scaled


@contextmanager
def certified_arithmetic(tensor: Tensor) -> Iterator[None]:
    """Shields a computation on the tensor's device from autograd and autocast.

    TF32 and the other reduced-precision switches of torch act on float32 products only; certificates use
    float64.
    """
    if not (torch.is_grad_enabled() or torch.is_autocast_enabled(tensor.device.type)):
        yield
        return
    with torch.no_grad(), torch.autocast(device_type=tensor.device.type, enabled=False):
        yield


def exact_float64(weight: Tensor, name: str = "weight") -> Tensor:
    """The weight in float64, detached; every floating-point type converts exactly.

    Entries that the hardware itself reads as zero (subnormals under `torch.set_flush_denormal(True)`) count as
    zero. Devices without float64 hand over to the CPU.

    Args:
        weight: Any shape, any strides, any floating-point type.
        name: How the error calls it.

    Raises:
        NormError: if the weight is no dense real floating-point tensor, or holds a NaN or an infinity.
    """
    if weight.layout != torch.strided or not weight.dtype.is_floating_point:
        raise NormError(f"{name} must be a dense tensor of a real floating-point type, got {weight.dtype}")
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    exact = weight.detach().to(device).to(torch.float64)
    if not math.isfinite(_largest(exact)):
        raise NormError(f"{name} holds a NaN or an infinity; its operator norm has no bound")
    return exact


def normalised(exact: Tensor) -> tuple[Tensor, int]:
    """Divides by the power of two that brings the largest entry into [1/2, 1), unless it is in [2⁻⁸, 1] already.

    The division is exact, except that entries more than 2¹⁰⁷³ times smaller than the largest become
    zero. That moves the norm by less than `√(size)·2⁻¹⁰⁷³` where the norm is at least 2⁻⁸: far inside
    every later rounding allowance, as is every underflow after it.

    Args:
        exact: A finite float64 tensor.

    Returns:
        The scaled tensor, or the given one, and the exponent `e`: `exact = scaled * 2**e`.
    """
    largest = _largest(exact)
    if largest == 0.0 or 2.0**-8 <= largest <= 1.0:
        return exact, 0
    exponent = math.frexp(largest)[1]
    if abs(exponent) < 1000:
        return exact * math.ldexp(1.0, -exponent), exponent
    # In two steps, because 2**-exponent itself may lie outside float64.
    half = exponent // 2
    return exact * math.ldexp(1.0, -half) * math.ldexp(1.0, half - exponent), exponent


def _largest(exact: Tensor) -> float:
    """Size of the largest entry, 0.0 for an empty tensor; NaN if any entry is."""
    if exact.numel() == 0:
        return 0.0
    low, high = torch.aminmax(exact)
    return max(-float(low), float(high))
