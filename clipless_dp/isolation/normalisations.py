"""Normalisations whose affine maps have gradients gated sample by sample."""

# ruff: noqa: D102 (the methods are those of torch.autograd.Function)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.gates.arithmetic import sample_norms
from clipless_dp.gates.parts import Rows
from clipless_dp.isolation.functions import Affine, Cap, _Gated, summed


def _row_gradients(
    gates: Affine,
    both: Sequence[tuple[Tensor, Tensor] | None],
    shape: tuple[int, ...],
    counted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of a weight and a bias of one shape, and their counts.

    Args:
        gates: theirs.
        both: of each the samples' own gradients, ``(B, n)``, and the norms of what was summed up to them, ``(B,)``.
        shape: of ``n`` entries.
        counted: which gates count.
    """
    if gates.by_parts(counted):
        first, second = (None if one is None else Rows(one[0], shape, one[1]) for one in both)
        return gates.sums((first, second), counted)
    weight, bias = (
        None if one is None else summed(one[0], cast(Cap, cap), one[1]).reshape(shape)
        for one, cap in zip(both, (gates.weight, gates.bias), strict=True)
    )
    return weight, bias, None, None


def _own(products: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of ``(B, ..., *shape)`` each sample's sum, ``(B, n)``, and the norm of what was summed up to it, ``(B,)``."""
    rows = products.reshape(len(products), -1, math.prod(shape))
    return rows.sum(1), sample_norms(rows)


def _differentiably(ctx: Any, normalised: Callable[[Tensor], Tensor], cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """What the way back returns, with a graph of its own, in which mean and scale follow from the values.

    Args:
        ctx: of the function, whose values and weight were saved first.
        normalised: what the affine map is of.
        cotangents: ``(B, ...)``, of the result.
    """
    values, weight, *_ = ctx.saved_tensors
    gates: Affine = ctx.gates
    channels = not isinstance(gates.settings[0], tuple)
    shape = values.shape[1:2] if channels else gates.settings[0]
    with torch.enable_grad():
        made = normalised(values)
        passed = None
        if ctx.needs_input_grad[1]:
            arrived = cotangents
            if weight is not None:
                arrived = cotangents * (weight.reshape(-1, *[1] * (values.dim() - 2)) if channels else weight)
            (passed,) = torch.autograd.grad(made, values, arrived, create_graph=True)
        sizes = sample_norms(cotangents)
        of_both: list[tuple[Tensor, Tensor] | None] = []
        for cap, needed, factor in zip(
            (gates.weight, gates.bias), ctx.needs_input_grad[2:4], (made, None), strict=True
        ):
            if cap is None or not needed:
                of_both.append(None)
                continue
            products = cotangents if factor is None else cotangents * factor
            if channels:
                of_both.append((products.reshape(*values.shape[:2], -1).sum(2), sizes))
            else:
                of_both.append(_own(products, shape))
        of_weight, of_bias, *counts = _row_gradients(gates, of_both, shape, ctx.needs_input_grad[5:])
    return None, passed, of_weight, of_bias, None, *counts


class _GatedNorm(_Gated):
    """What both normalisations do on their way back; results are what is normalised, its mean and its scale.

    Attributes:
        plain: torch's function, without gates.
    """

    plain: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, values, weight, bias, ctx.gates, *_ = inputs
        _, mean, scale = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(values, weight, bias, mean, scale)

    @classmethod
    def backward(cls, ctx: Any, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
        cotangents = arriving[0]
        if cotangents is None:
            return (None,) * 7
        gates: Affine = ctx.gates
        if torch.is_grad_enabled():
            over, eps = gates.settings
            return _differentiably(ctx, lambda met: cls.plain(met, over, None, None, eps), cotangents)
        caps = [
            cap if needed else None
            for cap, needed in zip((gates.weight, gates.bias), ctx.needs_input_grad[2:4], strict=True)
        ]
        passed, of_both, shape = cls.own(ctx, cotangents, caps)
        of_weight, of_bias, *counts = _row_gradients(gates, of_both, shape, ctx.needs_input_grad[5:])
        return None, passed, of_weight, of_bias, None, *counts

    @staticmethod
    def own(
        ctx: Any, cotangents: Tensor, caps: Sequence[Cap | None]
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor] | None], tuple[int, ...]]:
        """What passes on, the samples' own gradients of weight and bias that have caps, and their shape."""
        raise NotImplementedError


class GatedLayerNorm(_GatedNorm):
    """Layer normalisation over the last axes of ``(B, ..., *shape)``."""

    plain = staticmethod(functional.layer_norm)

    @staticmethod
    def forward(
        sample: Any, values: Tensor, weight: Tensor | None, bias: Tensor | None, gates: Affine, *counters: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape, eps = gates.settings
        return torch.native_layer_norm(values, shape, weight, bias, eps)

    @staticmethod
    def own(
        ctx: Any, cotangents: Tensor, caps: Sequence[Cap | None]
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor] | None], tuple[int, ...]]:
        values, weight, bias, mean, scale = ctx.saved_tensors
        shape, _ = ctx.gates.settings
        passed = None
        if ctx.needs_input_grad[1]:
            passed = torch.ops.aten.native_layer_norm_backward(
                cotangents.contiguous(), values, shape, mean, scale, weight, bias, [True, False, False]
            )[0]
        of_both: list[tuple[Tensor, Tensor] | None] = [None, None]
        if caps[0] is not None:
            of_both[0] = _own(torch.addcmul(-mean * scale, values, scale).mul_(cotangents), shape)
        if caps[1] is not None:
            of_both[1] = _own(cotangents, shape)
        return passed, of_both, shape


class GatedGroupNorm(_GatedNorm):
    """Group normalisation of ``(B, C, ...)``; settings: groups, epsilon.

    To torch's kernel the channels of all samples are channels of one sample, on the way back: what it sums up for each
    is then a sample's own gradient. ``C`` of the weight, ``Σ_p g_p x̂_p``, and of the bias, ``Σ_p g_p``, for positions
    ``p``. As ``x̂`` has a mean square of at most 1 in a group, both may have cancelled where they are small beside
    ``‖g‖``.
    """

    plain = staticmethod(functional.group_norm)

    @staticmethod
    def forward(
        sample: Any, values: Tensor, weight: Tensor | None, bias: Tensor | None, gates: Affine, *counters: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, eps = gates.settings
        values = values.contiguous()
        batch, channels = values.shape[:2]
        positions = values[0, 0].numel()
        return torch.native_group_norm(values, weight, bias, batch, channels, positions, groups, eps)

    @staticmethod
    def own(
        ctx: Any, cotangents: Tensor, caps: Sequence[Cap | None]
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor] | None], tuple[int, ...]]:
        values, weight, _, mean, scale = ctx.saved_tensors
        groups, _ = ctx.gates.settings
        batch, channels = values.shape[:2]
        passed, *sums = torch.ops.aten.native_group_norm_backward(
            cotangents.contiguous().reshape(1, batch * channels, -1),
            values.contiguous().reshape(1, batch * channels, -1),
            mean.reshape(1, -1),
            scale.reshape(1, -1),
            None if weight is None else weight.repeat(batch),
            1,
            batch * channels,
            values[0, 0].numel(),
            batch * groups,
            [ctx.needs_input_grad[1], caps[0] is not None, caps[1] is not None],
        )
        passed = None if passed is None else passed.reshape(values.shape)
        sizes = None if caps == [None, None] else sample_norms(cotangents)
        of_both = [
            None if cap is None or sizes is None else (one.reshape(batch, channels), sizes)
            for cap, one in zip(caps, sums, strict=True)
        ]
        return passed, of_both, (channels,)
