"""Gates: what caps the norm of a sample's signal, forwards (activations) or backwards (cotangents).

Every norm here is *per sample*: over all coordinates of one row of the batch axis, which is always axis 0.
A gate's cap holds for the number that floating-point arithmetic returns only up to its rounding;
:func:`rounding_slack` bounds that rounding, and the rules multiply every cap by it.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.precision import outside_autocast

GateMode = Literal["clip", "normalize"]

_LONG_SUM = 1 << 16
"""Rows longer than this have their norm accumulated in float64, so that the slack stays below 1 %."""

_LIFT = 1e-2
"""Default floor over cap: the most by which a gate lifts a small signal, and its rounding with it, is a hundredfold."""

_LARGEST_NORM = 1e18
"""The square still fits float32 with room for the products of the backward pass."""

_LARGEST_RATIO = 1e37
"""Factors of ``1e-37`` and above are normal numbers in float32: smaller ones would round by more than the slack."""


def rounding_slack(entries: int, dtype: torch.dtype = torch.float32) -> float:
    """Upper bound of ``‖gated‖ / cap`` for a gate evaluated in floating point.

    A sum of ``n`` squares in any order has relative error at most ``γ_n = nu/(1-nu)`` (Higham 2002, §4.2); the
    square root halves it; division, product and the square root itself add one ``u`` each. Squares that
    underflow are covered because caps and floors are at least 1e-8, against ``sqrt(n)·1e-19`` lost.

    Args:
        entries: number of entries in one sample.
        dtype: the dtype that the gate computes in (float32 or float64).

    Returns:
        A factor that is at least 1.
    """
    unit = torch.finfo(dtype).eps / 2
    summed = unit if entries <= _LONG_SUM else torch.finfo(torch.float64).eps / 2
    underflow = 1e-11 * math.sqrt(max(entries, 1))
    return 1.0 + 1.01 * (entries * summed + 8 * unit) + underflow


def sample_norms(values: Tensor) -> Tensor:
    """Euclidean norm of each sample: shape ``(B, ...)`` to ``(B,)``, in float32 or wider, TF32 or not."""
    flat = _rows(values.permute(0, 2, 3, 1) if _is_interleaved(values) else values)
    if flat.shape[1] > _LONG_SUM:
        return cast(Tensor, torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)).to(_wide(values.dtype))
    return cast(Tensor, torch.linalg.vector_norm(flat, dim=1, dtype=_wide(values.dtype)))


def _rows(values: Tensor) -> Tensor:
    return values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)


def _is_interleaved(values: Tensor) -> bool:
    """Whether maps lie in memory channels last, so that they are read in that order; compiled graphs do not ask."""
    return (
        values.dim() == 4
        and not torch.compiler.is_compiling()
        and not values.is_contiguous()
        and values.is_contiguous(memory_format=torch.channels_last)
    )


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Inner product of each sample of one tensor with that of another: ``(B, ...)`` twice to ``(B,)``."""
    if _is_interleaved(first) and _is_interleaved(second):
        first, second = first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)
    return cast(Tensor, torch.linalg.vecdot(_rows(first), _rows(second)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _factors(cap: float, norms: Tensor, floor: float) -> Tensor:
    """``cap/max(norm, floor)`` in one division, so that it is 1 exactly where both are the cap."""
    return torch.full_like(norms, cap) / norms.clamp(min=floor)


def _largest(cap: float, dtype: torch.dtype) -> float:
    """The largest norm that a gate of this cap scales: what is above has no factor that is exact up to one rounding."""
    return min(_LARGEST_RATIO * cap, torch.finfo(_wide(dtype)).max)


def _per_sample(factors: Tensor, like: Tensor) -> Tensor:
    return factors.reshape(-1, *([1] * (like.dim() - 1)))


def _can_look(values: Tensor) -> bool:
    """Whether numbers can be looked at: on a CPU nothing is waited for, and in a compiled graph there are none."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_dense(values: Tensor) -> bool:
    """Whether values lie in memory without gaps and repetitions, so that an elementwise product lies as they do."""
    return (
        values.is_contiguous()
        or (values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last))
        or (values.dim() == 3 and values.mT.is_contiguous())
    )


def _drop_rows_(values: Tensor, norms: Tensor, largest: float) -> Tensor:
    """Zeroes the rows of a fresh tensor whose norms ``(B,)`` are above ``largest`` or NaN, whatever they hold."""
    if _can_look(values):
        # Nearly always there is nothing to do.
        if len(norms) and not float(norms.detach().max()) <= largest:
            values.index_fill_(0, (~(norms.detach() <= largest)).nonzero().flatten(), 0.0)
        return values
    kept = _per_sample(norms <= largest, values)
    return torch.where(kept, values, torch.zeros((), dtype=values.dtype, device=values.device))


class _ScalingFunction(torch.autograd.Function):
    """``cap·x/max(‖x‖, floor)`` and ``‖x‖`` per sample, in one pass over the values each way.

    With ``m = max(‖x‖, floor)`` the Jacobian is ``(cap/m)(I - x̂x̂ᵀ)`` above the floor and ``(cap/m)I`` below it. The
    result itself, which the next layer keeps anyway, serves as ``x̂`` on the way back: ``y = cap·x̂`` above the floor.
    Samples of norm above ``largest``, or without one, become zero and pass nothing back.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, cap: float, floor: float, largest: float) -> tuple[Tensor, Tensor]:
        ctx.cap, ctx.floor, ctx.largest = cap, floor, largest
        norms = sample_norms(values)
        factors = _per_sample(_factors(cap, norms, floor), values).to(values.dtype)
        scaled = _drop_rows_(values * factors, norms, largest)
        ctx.save_for_backward(scaled, norms)
        ctx.set_materialize_grads(False)
        return scaled, norms

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        cotangent, of_norms = cotangents
        scaled, norms = ctx.saved_tensors
        factors = _factors(ctx.cap, norms, ctx.floor)
        passed = None
        if cotangent is not None:
            radial = _products(scaled, cotangent).to(norms.dtype) / ctx.cap**2
            radial = torch.where(norms > ctx.floor, radial, torch.zeros_like(norms))
            passed = torch.addcmul(cotangent, scaled, _per_sample(radial, scaled).to(scaled.dtype), value=-1)
            passed = passed.mul_(_per_sample(factors, scaled).to(scaled.dtype))
        if of_norms is not None:
            # The norm's own gradient is x̂, which enters where the gate is differentiated twice.
            unit = scaled * _per_sample(of_norms / (factors * norms.clamp(min=1e-30)), scaled).to(scaled.dtype)
            passed = unit if passed is None else passed + unit
        return None if passed is None else _drop_rows_(passed, norms, ctx.largest), None, None, None


def _scaled(values: Tensor, cap: float, floor: float, largest: float = _LARGEST_NORM) -> tuple[Tensor, Tensor]:
    scaled, norms = _ScalingFunction.apply(values, cap, floor, largest)  # type: ignore[no-untyped-call]
    return scaled, norms


def input_gate(inputs: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Projects each sample onto the ball of the given radius; samples without a finite norm become zero.

    So do those of more than 1e37 times the radius, for which float32 has no factor.

    Args:
        inputs: ``(B, ...)``.
        radius: the cap ``X₀``.

    Returns:
        The gated inputs and a boolean mask ``(B,)`` of the samples that had such a norm.
    """
    largest = _largest(radius, inputs.dtype)
    gated, norms = _scaled(inputs, radius, radius, largest)
    return gated, norms.detach() <= largest


def token_gate(tokens: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Replaces samples that hold a number outside ``[0, vocabulary)`` by zeros, so that no look-up fails.

    Args:
        tokens: integers ``(B, ...)``.
        vocabulary: the number of tokens.

    Returns:
        The tokens and a boolean mask ``(B,)`` of the samples that were left as they are.
    """
    inside = (tokens >= 0) & (tokens < vocabulary)
    known = inside.flatten(1).all(1) if tokens.dim() > 1 else inside
    return torch.where(_per_sample(known, tokens), tokens, torch.zeros_like(tokens)), known


class _CotangentGateFunction(torch.autograd.Function):
    """Identity forwards; caps or fixes each sample's cotangent norm backwards."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, limit: float, normalize: bool, floor: float) -> Tensor:
        ctx.limit, ctx.normalize, ctx.floor = limit, normalize, floor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None, None]:
        (cotangent,) = cotangents
        # Autograd runs the products behind the gate under the settings of whoever calls backward.
        norms = outside_autocast(sample_norms(cotangent))
        looked_at = not ctx.normalize and _can_look(norms) and len(norms) > 0 and _is_dense(cotangent)
        if looked_at and float(norms.detach().max()) <= ctx.limit:
            # All factors below would be 1 exactly, and the product lie in memory as this does.
            return cotangent, None, None, None
        factors = _factors(ctx.limit, norms, ctx.floor if ctx.normalize else ctx.limit)
        gated = cotangent * _per_sample(factors, cotangent).to(cotangent.dtype)
        return _drop_rows_(gated, norms, _largest(ctx.limit, norms.dtype)), None, None, None


def cotangent_gate(values: Tensor, limit: float, mode: GateMode = "clip", floor: float = 1e-8) -> Tensor:
    """Functional form of :class:`CotangentGate`."""
    gated: Tensor = _CotangentGateFunction.apply(values, limit, mode == "normalize", floor)  # type: ignore[no-untyped-call]
    return gated


def _checked_cap(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 1e-8):
        raise ConfigurationError(f"{name} must be a finite number of at least 1e-8, got {value!r}")
    return float(value)


class BallProjection(nn.Module):
    """``x·min(1, r/‖x‖)`` per sample: the projection onto the ball of radius ``r``; 1-Lipschitz.

    Args:
        radius: ``r``, at least 1e-8.

    Shape:
        ``(B, ...)`` to the same shape.

    Raises:
        ConfigurationError: the radius is not a finite number of at least 1e-8.

    Guarantee:
        ``‖y‖ ≤ r·rounding_slack(entries)`` whatever the input, and ``‖y‖ ≤ ‖x‖``. A sample of norm above 1e18, or
        without a finite norm, becomes zero.
    """

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        self.radius = _checked_cap("radius", radius)

    def forward(self, values: Tensor) -> Tensor:
        """Projects each sample."""
        return _scaled(values, self.radius, self.radius)[0]

    def extra_repr(self) -> str:
        """The radius."""
        return f"radius={self.radius:g}"


class SphereScaling(nn.Module):
    """``r·x/max(‖x‖, c)`` per sample: scales to the sphere of radius ``r``; (r/c)-Lipschitz.

    Args:
        radius: ``r``, at least 1e-8.
        floor: ``c``, at least 1e-8; samples of smaller norm are scaled by ``r/c`` only. By default a hundredth of
            the radius: what is nearly zero is mostly rounding, which differs from batch to batch and must not be
            scaled to the size of a signal.

    Shape:
        ``(B, ...)`` to the same shape.

    Raises:
        ConfigurationError: radius or floor is not a finite number of at least 1e-8.

    Guarantee:
        ``‖y‖ ≤ r·rounding_slack(entries)`` whatever the input. A sample of norm above 1e18, or without a finite
        norm, becomes zero.
    """

    def __init__(self, radius: float = 1.0, floor: float | None = None) -> None:
        super().__init__()
        self.radius = _checked_cap("radius", radius)
        self.floor = _checked_cap("floor", max(_LIFT * self.radius, 1e-8) if floor is None else floor)

    def forward(self, values: Tensor) -> Tensor:
        """Scales each sample."""
        return _scaled(values, self.radius, self.floor)[0]

    def extra_repr(self) -> str:
        """Radius and floor."""
        return f"radius={self.radius:g}, floor={self.floor:g}"


class CotangentGate(nn.Module):
    """Identity forwards; backwards it caps each sample's cotangent at ``limit``.

    Args:
        limit: ``c``, at least 1e-8.
        mode: ``"clip"``: ``g·min(1, c/‖g‖)``; ``"normalize"``: ``g·c/max(‖g‖, floor)``, so that samples which
            the network already fits still contribute.
        floor: for ``"normalize"``, at least 1e-8; by default a hundredth of the limit, as in :class:`SphereScaling`.

    Shape:
        ``(B, ...)`` to the same shape.

    Raises:
        ConfigurationError: limit or floor is not a finite number of at least 1e-8, or the mode is unknown.

        PrivacyError: gradients are computed under autocast.

    Guarantee:
        The cotangent that leaves the gate has norm at most ``c·rounding_slack(entries)`` per sample; a cotangent
        without a finite norm becomes zero.
    """

    def __init__(self, limit: float, mode: GateMode = "clip", floor: float | None = None) -> None:
        super().__init__()
        if mode not in ("clip", "normalize"):
            raise ConfigurationError(f"mode must be 'clip' or 'normalize', got {mode!r}")
        self.limit = _checked_cap("limit", limit)
        self.mode: GateMode = mode
        self.floor = _checked_cap("floor", max(_LIFT * self.limit, 1e-8) if floor is None else floor)

    def forward(self, values: Tensor) -> Tensor:
        """Returns the values unchanged."""
        return cotangent_gate(values, self.limit, self.mode, self.floor)

    def extra_repr(self) -> str:
        """Limit and mode."""
        return f"limit={self.limit:g}, mode={self.mode!r}"
