"""Gates, layer and ReLU in one: what a CPU runs in place of the traced graph, with fewer passes over activations.

A gate before a layer multiplies each sample by one number, which linear maps let through: ``(s·x)Wᵀ = s·(xWᵀ)``. So
the scaled copy is never formed. The weight's gradient is ``Σ_b (f_b s_b g_b) x_bᵀ`` with the factor ``f_b`` of the
cotangent gate. A :class:`Chain` of such layers keeps nothing for the way back but their inputs, which are the ReLUs'
outputs, and two numbers for each sample. What is done to activations is done by rows that stay in a core's cache.

The traced graph itself is what the bounds are computed from, what runs elsewhere and in compiled models, and what tests
compare with.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipless_dp.fusion.backward import passed_convolution, passed_linear
from clipless_dp.fusion.stages import Entry, Kept, Stage, blocks, channels_last, joined, rows_of
from clipless_dp.gates import input_gate, weights_of
from clipless_dp.gates.arithmetic import (
    LARGEST_NORM,
    largest_norm,
    per_sample,
    sample_norms,
    scale_factors,
    tangent_part,
)
from clipless_dp.precision import refuse_autocast

_SMALLEST_SCALE = 1e-27
"""What input gate and gate may shrink a sample by together. A float32 cotangent times this, and then a sample so large,
has lost at most ``1e27·2^-150`` of the sample's norm behind the gates to underflow: nothing against caps of 1e-8."""


class Chain(nn.Module):
    """Consecutive stages as one differentiable operation.

    Shape:
        ``(B, ...)`` to what the last stage returns.

    Guarantee:
        Outputs and gradients are those of the modules up to rounding, which the gates' ``rounding_slack`` covers: of
        its ``8u``, the factors of input gate and gate and what they multiply take five, and the norm half of its
        ``nu``. Samples that a gate drops contribute exactly zero.
    """

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        super().__init__()
        self.stages = stages

    def forward(self, values: Tensor, entry: Entry | None = None) -> Tensor:
        """Runs the stages; with an entry, behind the input gate, and then without a gradient of the values."""
        parameters = [parameter for stage in self.stages for parameter in (stage.layer.weight, stage.layer.bias)]
        output: Tensor = _ChainFunction.apply(values, entry, self.stages, *parameters)  # type: ignore[no-untyped-call]
        return output


def _entered(stage: Stage, values: Tensor, norms: Tensor | None, entry: Entry | None, owned: bool) -> Kept:
    """The factors of the gates before a layer, and its input without the samples that they drop."""
    ball: Tensor | None = None
    if entry is not None:
        raw, radius, whole = entry
        ball = scale_factors(raw, cap=radius, floor=radius, within=whole)
        norms = raw * ball if whole else torch.where(raw <= largest_norm(radius, raw.dtype), raw * ball, torch.nan)
    if stage.before is None and ball is None:
        return Kept(values, None, norms, None, values.shape[0])
    if norms is None:
        norms = sample_norms(values)
    most = float(norms.max())
    if stage.before is None:
        scales, limit = ball, torch.finfo(norms.dtype).max
    else:
        cap, limit = stage.before.radius, LARGEST_NORM
        scales = scale_factors(norms, cap=cap, floor=stage.floor, within=most <= largest_norm(cap, norms.dtype))
        scales = scales if ball is None else scales.mul_(ball)
    assert scales is not None
    # Each row's own numbers decide what becomes of it; the look at all of them only saves the search. Without an input
    # gate no scale is this small: caps are at least 1e-8, norms at most 1e18.
    if most <= limit and (ball is None or float(scales.min()) >= _SMALLEST_SCALE):
        return Kept(values, scales, norms, None, values.shape[0])
    lost = (~((norms <= limit) & (scales >= _SMALLEST_SCALE))).nonzero().flatten()
    rows = len(values) - len(lost)
    if owned:
        values.index_fill_(0, lost, 0.0)
    elif entry is None or int(lost[0]) < rows:
        values = values.index_fill(0, lost, 0.0)
    else:
        # Padding, at the end of the batch: left out of the weight's gradient instead of copying what is before it.
        return Kept(values, scales, norms, lost, rows)
    return Kept(values, scales, norms, lost, len(values))


def _left(
    stage: Stage, kept: Kept, weight: Tensor, bias: Tensor | None, measured: bool
) -> tuple[Tensor, Tensor | None, Kept]:
    """A stage's output, the samples' norms where the next stage wants them, and what is kept."""
    output = stage.apply(kept.values, weight, bias if kept.scales is None else None)
    if stage.pool is not None:
        # Scales are not negative and a channel has one bias, so that the same entries are the largest before and after.
        size = output.shape[1:]
        output, largest = stage.pooled(output)
        kept = kept._replace(largest=largest, size=size)
    if kept.rows < output.shape[0]:
        assert kept.lost is not None
        output.index_fill_(0, kept.lost, 0.0)
    norms: list[Tensor] = []
    for rows in blocks(output):
        block = rows_of(output, rows)
        if kept.scales is not None:
            scales = per_sample(rows_of(kept.scales, rows), block)
            if bias is None:
                block.mul_(scales)
            else:
                torch.addcmul(stage.broadcast(bias), block, scales, out=block)
        if stage.rectified:
            block.relu_()
        if measured:
            norms.append(sample_norms(block))
    return output, joined(norms) if measured else None, kept


class _ChainFunction(torch.autograd.Function):
    """See :class:`Chain`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, entry: Entry | None, stages: tuple[Stage, ...], *parameters: Tensor | None
    ) -> Tensor:
        ctx.stages, ctx.radius, ctx.rows = stages, None if entry is None else entry.radius, []
        ctx.weights = weights_of(values)
        pools: list[tuple[Tensor | None, torch.Size]] = []
        saved: list[Tensor | None] = [values, *parameters]
        hidden: list[Tensor | None] = []
        signal, norms = values, None
        for index, stage in enumerate(stages):
            kept = _entered(stage, signal, norms, entry if index == 0 else None, owned=index > 0)
            ctx.rows.append(kept.rows)
            hidden.append(None if kept.values is values else kept.values)
            saved += [kept.scales, kept.norms, kept.lost]
            weight, bias = parameters[2 * index : 2 * index + 2]
            weight = channels_last(cast(Tensor, weight)) if stage.interleaved else weight
            measured = index + 1 < len(stages) and stages[index + 1].measures
            signal, norms, kept = _left(stage, kept, cast(Tensor, weight), bias, measured)
            pools.append((kept.largest, kept.size))
        ctx.save_for_backward(*saved, signal if stages[-1].rectified else None)
        # Nobody else knows them. Each is let go on the way back once it is used, as between modules of their own.
        ctx.hidden, ctx.pools = hidden, pools
        return signal

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Tensor | None, ...]:
        (cotangents,) = arriving
        refuse_autocast(cotangents.device)
        stages: tuple[Stage, ...] = ctx.stages
        values, *saved = ctx.saved_tensors
        parameters, states = saved[: 2 * len(stages)], saved[2 * len(stages) :]
        if torch.is_grad_enabled() or ctx.hidden is None:
            return _differentiable(ctx, values, parameters, cotangents)
        gradients: list[Tensor | None] = [None] * len(parameters)
        output, owned, shares = states.pop(), False, None
        hidden, ctx.hidden = ctx.hidden, None
        pools, ctx.pools = ctx.pools, None
        for index in reversed(range(len(stages))):
            signal, (scales, norms, lost) = hidden.pop(), states[3 * index : 3 * index + 3]
            kept = Kept(values if signal is None else signal, scales, norms, lost, ctx.rows[index], *pools.pop())
            needed = index > 0 or ctx.needs_input_grad[0], *ctx.needs_input_grad[3 + 2 * index : 5 + 2 * index]
            is_linear = isinstance(stages[index].layer, nn.Linear)
            passed = partial(passed_linear, weights=ctx.weights) if is_linear else passed_convolution
            weight = channels_last(parameters[2 * index]) if stages[index].interleaved else parameters[2 * index]
            cotangents, gradients[2 * index], gradients[2 * index + 1], shares = passed(
                stages[index], kept, weight, output, cotangents, shares, owned, needed
            )
            output, owned = kept.values, True
        if shares is not None:
            for rows in blocks(cotangents):
                tangent_part(cotangents[rows], output[rows], shares[rows], into=cotangents[rows])
        return cotangents if ctx.needs_input_grad[0] else None, None, None, *gradients


def _differentiable(
    ctx: Any, values: Tensor, parameters: list[Tensor | None], cotangents: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by the modules' own operations: to be differentiated again, or where the graph is passed again."""
    further = torch.is_grad_enabled()
    tensors = [values, None, None, *parameters]
    wanted = [tensor for tensor, needed in zip(tensors, ctx.needs_input_grad, strict=True) if needed]
    with torch.enable_grad():
        signal = values if ctx.radius is None else input_gate(values, ctx.radius)[0]
        for stage in ctx.stages:
            signal = stage.reference(signal)
        found = iter(torch.autograd.grad(signal, cast("list[Tensor]", wanted), cotangents, create_graph=further))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
