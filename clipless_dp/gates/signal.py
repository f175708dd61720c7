"""Gates that cap the norm of a sample's signal, forwards (activations) or backwards (cotangents)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.arithmetic import (
    FLOOR_SHARE,
    LARGEST_NORM,
    can_look,
    checked_cap,
    drop_rows_,
    flat_rows,
    is_dense,
    largest_norm,
    per_sample,
    sample_norms,
    scale_factors,
    tangent_part,
)
from clipless_dp.modules import Unscripted
from clipless_dp.precision import outside_autocast

GateMode = Literal["clip", "normalize"]


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
        factors = per_sample(scale_factors(norms, cap=cap, floor=floor), values).to(values.dtype)
        scaled = drop_rows_(values * factors, norms, largest)
        ctx.save_for_backward(scaled, norms)
        ctx.set_materialize_grads(False)
        return scaled, norms

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        cotangent, of_norms = cotangents
        scaled, norms = ctx.saved_tensors
        factors = scale_factors(norms, cap=ctx.cap, floor=ctx.floor)
        passed = None
        if cotangent is not None:
            shares = (norms > ctx.floor).to(norms.dtype) / ctx.cap**2
            passed = tangent_part(cotangent, scaled, shares)
            passed = passed.mul_(per_sample(factors, scaled).to(scaled.dtype))
        if of_norms is not None:
            # The norm's own gradient is x̂, which enters where the gate is differentiated twice.
            unit = scaled * per_sample(of_norms / (factors * norms.clamp(min=1e-30)), scaled).to(scaled.dtype)
            passed = unit if passed is None else passed + unit
        return None if passed is None else drop_rows_(passed, norms, ctx.largest), None, None, None


def scale_samples(values: Tensor, cap: float, floor: float, largest: float = LARGEST_NORM) -> tuple[Tensor, Tensor]:
    """Functional form of :class:`SphereScaling`, and of :class:`BallProjection` where the floor is the cap.

    Args:
        values: ``(B, ...)``.
        cap: ``r``.
        floor: ``c``.
        largest: samples of larger norm, or without one, become zero.

    Returns:
        The scaled samples, and their norms ``(B,)`` before.
    """
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
    largest = largest_norm(radius, inputs.dtype)
    gated, norms = scale_samples(inputs, radius, radius, largest)
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
    return torch.where(per_sample(known, tokens), tokens, torch.zeros_like(tokens)), known


def presence_gate(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces rows that hold a number that is not finite, or nothing but negative integers, as padding does, by zeros.

    Args:
        rows: ``(B, ...)``.

    Returns:
        The rows and a boolean mask ``(B,)`` of those that were left as they are.
    """
    flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    known = flat.isfinite().all(1) if rows.is_floating_point() else (flat >= 0).any(1)
    return torch.where(per_sample(known, rows), rows, torch.zeros_like(rows)), known


def table_gate(rows: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`presence_gate`, also for rows with an entry that the table it is looked up in does not know.

    Args:
        rows: ``(B, ...)``.
        limits: for each entry of a row the length of its table; 0 where it has none.

    Returns:
        The rows and a boolean mask ``(B,)`` of those that were left as they are.
    """
    _, known = presence_gate(rows)
    flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    known = known & ((limits == 0) | ((flat >= 0) & (flat < limits))).all(1)
    return torch.where(per_sample(known, rows), rows, torch.zeros_like(rows)), known


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
        looked_at = not ctx.normalize and can_look(norms) and len(norms) > 0 and is_dense(cotangent)
        if looked_at and float(norms.detach().max()) <= ctx.limit:
            # All factors below would be 1 exactly, and the product lie in memory as this does.
            return cotangent, None, None, None
        factors = scale_factors(norms, cap=ctx.limit, floor=ctx.floor if ctx.normalize else ctx.limit)
        gated = cotangent * per_sample(factors, cotangent).to(cotangent.dtype)
        return drop_rows_(gated, norms, largest_norm(ctx.limit, norms.dtype)), None, None, None


def cotangent_gate(values: Tensor, limit: float, mode: GateMode = "clip", floor: float = 1e-8) -> Tensor:
    """Functional form of :class:`CotangentGate`."""
    gated: Tensor = _CotangentGateFunction.apply(values, limit, mode == "normalize", floor)  # type: ignore[no-untyped-call]
    return gated


class _CotangentGateL1Function(torch.autograd.Function):
    """Identity forwards; caps the ℓ1 norm of each sample's cotangent backwards."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (cotangent,) = cotangents
        sums = outside_autocast(torch.linalg.vector_norm(flat_rows(cotangent), ord=1, dim=1))
        factors = scale_factors(sums, cap=ctx.limit, floor=ctx.limit)
        gated = cotangent * per_sample(factors, cotangent).to(cotangent.dtype)
        return drop_rows_(gated, sums, largest_norm(ctx.limit, sums.dtype)), None


def cotangent_gate_l1(values: Tensor, limit: float) -> Tensor:
    """Caps the ℓ1 norm of each sample's cotangent at ``limit``, up to :func:`rounding_slack`; no norm of it grows.

    Args:
        values: ``(B, ...)``, returned unchanged.
        limit: the cap.
    """
    gated: Tensor = _CotangentGateL1Function.apply(values, limit)  # type: ignore[no-untyped-call]
    return gated


class BallProjection(Unscripted, nn.Module):
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
        self.radius = checked_cap("radius", radius)

    def forward(self, values: Tensor) -> Tensor:
        """Projects each sample."""
        return scale_samples(values, self.radius, self.radius)[0]

    def extra_repr(self) -> str:
        """The radius."""
        return f"radius={self.radius:g}"


class SphereScaling(Unscripted, nn.Module):
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
        self.radius = checked_cap("radius", radius)
        self.floor = checked_cap("floor", max(FLOOR_SHARE * self.radius, 1e-8) if floor is None else floor)

    def forward(self, values: Tensor) -> Tensor:
        """Scales each sample."""
        return scale_samples(values, self.radius, self.floor)[0]

    def extra_repr(self) -> str:
        """Radius and floor."""
        return f"radius={self.radius:g}, floor={self.floor:g}"


class CotangentGate(Unscripted, nn.Module):
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
        self.limit = checked_cap("limit", limit)
        self.mode: GateMode = mode
        self.floor = checked_cap("floor", max(FLOOR_SHARE * self.limit, 1e-8) if floor is None else floor)

    def forward(self, values: Tensor) -> Tensor:
        """Returns the values unchanged."""
        return cotangent_gate(values, self.limit, self.mode, self.floor)

    def extra_repr(self) -> str:
        """Limit and mode."""
        return f"limit={self.limit:g}, mode={self.mode!r}"
