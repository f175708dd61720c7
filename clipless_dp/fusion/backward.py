"""The way back through one stage of a chain: ReLU, cotangent gate, layer, and the gate before it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from clipless_dp.fusion.stages import Kept, Stage, blocks, joined, rows_of
from clipless_dp.gates import GradientGatedLinear
from clipless_dp.gates.arithmetic import (
    LARGEST_NORM,
    LARGEST_RATIO,
    are_within,
    drop_rows_,
    largest_norm,
    per_sample,
    sample_norms,
    sample_products,
    scale_factors,
    tangent_part,
    zeroed_rows,
)
from clipless_dp.gates.gradient import bias_gradient, vector_weight_gradient

_CONVOLUTION_ENTRIES = 1 << 20
"""Entries at once on each thread in the backward pass of a convolution, each call of which costs a fixed time."""

Passed = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""The cotangent of a stage's input, the gradients of weight and bias, and the shares with which the first has yet to
pass the gate before the layer: see :func:`tangent_part`."""

Needed = tuple[bool, bool, bool]
"""Which of input, weight and bias need gradients."""


def _shares(stage: Stage, norms: Tensor) -> Tensor:
    """``1/‖x‖²`` where the gate before a layer scales to its sphere; it exists up to 1e18, NaN is above no floor."""
    return torch.where(norms > stage.floor, norms.square().reciprocal_(), 0.0)


def _arrived(
    stage: Stage,
    cotangents: Tensor,
    output: Tensor | None,
    scales: Tensor | None,
    into: Tensor,
    biased: bool,
    wanted: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Takes cotangents of some rows back through ReLU, cotangent gate and scaling.

    Args:
        stage: the stage.
        cotangents: of its output.
        output: the output, where a ReLU made it.
        scales: what the gates before the layer multiply the samples by.
        into: where the result goes; may be ``cotangents``.
        biased: whether the bias's gradient is wanted.
        wanted: whether ``⟨x, u⟩`` is, ``u`` being the cotangent of ``x`` that will follow; without a bias it is
            ``⟨y, g⟩/s``, since ``y`` is ``s·Wx`` wherever ``g`` is not zero.

    Returns:
        The bias's gradient and the products.
    """
    if stage.rectified:
        cotangents = torch.ops.aten.threshold_backward.grad_input(cotangents, output, 0, grad_input=into)
    factors, shares, gradient, products = scales, None, None, None
    if stage.behind is not None:
        gate, norms = stage.behind, sample_norms(cotangents)
        most, largest = float(norms.max()), largest_norm(gate.limit, norms.dtype)
        if not most <= largest:
            cotangents = drop_rows_(into.copy_(cotangents), norms, largest)
            norms = torch.where(norms <= largest, norms, 0.0)
        if gate.mode == "normalize" or not most <= gate.limit:
            floor = gate.floor if gate.mode == "normalize" else gate.limit
            shares = factors = scale_factors(norms, cap=gate.limit, floor=floor, within=True)
            if scales is not None:
                # One pass for both factors. Where float32 has no exact product of them, the sample passes nothing: none
                # whose share is 1, so that what is done where nothing is clipped is the same.
                factors = shares * scales
                factors = torch.where(factors >= 1.0 / LARGEST_RATIO, factors, 0.0)
        else:
            shares = torch.ones_like(norms)
    if biased:
        totals = stage.totals(cotangents)
        gradient = totals.sum(0) if shares is None else shares @ totals
    if factors is not None:
        torch.mul(cotangents, per_sample(factors, into), out=into)
    elif cotangents.data_ptr() != into.data_ptr():
        into.copy_(cotangents)
    if wanted:
        assert scales is not None
        products = sample_products(cast(Tensor, output), into)
        products = torch.where(scales > 0.0, products / scales, 0.0)
    return gradient, products


def _total(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0]


def passed_linear(
    stage: Stage,
    kept: Kept,
    weight: Tensor,
    output: Tensor | None,
    cotangents: Tensor,
    shares: Tensor | None,
    owned: bool,
    needed: Needed,
    weights: Tensor | None = None,
) -> Passed:
    """One linear layer, for rows of these weights; the gate's Jacobian is left to whoever reads the result next."""
    gate = stage.gradient_gate
    gated = cotangents if owned else torch.empty_like(cotangents, memory_format=torch.contiguous_format)
    biases: list[Tensor] = []
    sizes: list[Tensor] = []
    for rows in blocks(gated):
        arriving, made, into = (
            rows_of(cotangents, rows),
            None if output is None else rows_of(output, rows),
            rows_of(gated, rows),
        )
        if shares is not None:
            tangent_part(arriving, cast(Tensor, made), rows_of(shares, rows), into=arriving)
        scales = None if kept.scales is None or gate is not None else rows_of(kept.scales, rows)
        bias, _ = _arrived(stage, arriving, made, scales, into, needed[2] and gate is None, False)
        biases += [] if bias is None else [bias]
        sizes += [] if gate is None else [sample_norms(into)]
    if gate is not None:
        return _passed_gated(stage, gate, kept, weight, gated, joined(sizes), needed, weights)
    gradient = _outer(gated, kept.values, kept.rows) if needed[1] else None
    passed = gated @ weight if needed[0] else None
    if passed is not None and kept.lost is not None:
        passed.index_fill_(0, kept.lost, 0.0)
    return gated if passed is None else passed, gradient, _total(biases), _left_over(stage, kept, passed)


def _passed_gated(
    stage: Stage,
    gate: GradientGatedLinear,
    kept: Kept,
    weight: Tensor,
    cotangents: Tensor,
    norms: Tensor,
    needed: Needed,
    weights: Tensor | None,
) -> Passed:
    """What is left of a layer with gradient gates, from cotangents ``(B, O)`` of these norms, which are overwritten."""
    gradient, bias = None, None
    within = are_within(norms, LARGEST_NORM)
    counted, sizes = (cotangents, norms) if within else zeroed_rows(cotangents, norms)
    if needed[2]:
        bias = bias_gradient(counted, sizes, *gate.gates()[1], weights)
    if kept.scales is not None:
        cotangents.mul_(per_sample(kept.scales, cotangents))
    passed = cotangents @ weight if needed[0] else None
    if passed is not None and kept.lost is not None:
        passed.index_fill_(0, kept.lost, 0.0)
    if needed[1]:
        lengths, values = _lengths(stage, kept), kept.values
        arrived = cotangents if within else drop_rows_(cotangents, norms, LARGEST_NORM)
        if kept.rows < values.shape[0]:
            rows = slice(0, kept.rows)
            values, arrived, lengths, sizes = values[rows], arrived[rows], lengths[rows], sizes[rows]
            weights = None if weights is None else weights[rows]
        if not are_within(lengths, LARGEST_NORM):
            lengths = torch.where(lengths <= LARGEST_NORM, lengths, torch.nan)
            values = values.index_fill(0, lengths.isnan().nonzero().flatten(), 0.0)
        gradient = vector_weight_gradient(values, arrived, lengths, sizes, *gate.gates()[0], weights, into=arrived)
    return cotangents if passed is None else passed, gradient, bias, _left_over(stage, kept, passed)


def _left_over(stage: Stage, kept: Kept, passed: Tensor | None) -> Tensor | None:
    """The Jacobian of the gate before the layer, which is applied by whoever reads the result next."""
    return None if passed is None or stage.before is None else _shares(stage, cast(Tensor, kept.norms))


def _outer(cotangents: Tensor, values: Tensor, rows: int) -> Tensor:
    """``Σ g xᵀ`` over the first rows and all positions."""
    first = slice(0, rows)
    return rows_of(cotangents, first).flatten(0, -2).t() @ rows_of(values, first).flatten(0, -2)


def _lengths(stage: Stage, kept: Kept) -> Tensor:
    """Norms ``(B,)`` of what the weight meets, behind the gates."""
    norms = sample_norms(kept.values) if kept.norms is None else kept.norms
    if stage.before is None:
        return norms
    return norms * scale_factors(norms, cap=stage.before.radius, floor=stage.floor)


def passed_convolution(
    stage: Stage,
    kept: Kept,
    weight: Tensor,
    output: Tensor | None,
    cotangents: Tensor,
    shares: Tensor | None,
    owned: bool,
    needed: Needed,
) -> Passed:
    """One convolution, by blocks of rows: what arrives, what is gated and what leaves lie in the cache together."""
    biases: list[Tensor] = []
    weights: list[Tensor] = []
    passed: Tensor | None = None
    wanted = needed[0] and stage.before is not None and stage.rectified and stage.layer.bias is None
    maps = cotangents if kept.largest is None else cotangents.new_empty(()).expand(len(cotangents), *kept.size)
    larger = max(maps, kept.values, key=Tensor.numel)
    for rows in blocks(larger, _CONVOLUTION_ENTRIES):
        arriving, made = cotangents[rows], None if output is None else output[rows]
        if shares is not None:
            tangent_part(arriving, cast(Tensor, made), shares[rows], into=arriving)
        scales = None if kept.scales is None else kept.scales[rows]
        into = arriving if owned else torch.empty_like(arriving)
        bias, products = _arrived(stage, arriving, made, scales, into, needed[2], wanted)
        biases += [] if bias is None else [bias]
        counted = slice(rows.start, min(rows.stop, kept.rows))
        if not any(needed[:2]) or counted.start >= counted.stop:
            continue
        arrived = into[: counted.stop - counted.start]
        if kept.largest is not None:
            arrived = stage.spread(arrived, kept.largest[counted], kept.size)
        leaving, gradient, _ = torch.ops.aten.convolution_backward(
            arrived,
            kept.values[counted],
            weight,
            None,
            *stage.geometry(),
            [needed[0], needed[1], False],
        )
        weights += [gradient] if needed[1] else []
        if not needed[0]:
            continue
        whole = len(leaving) == len(cotangents)
        passed = leaving if whole else torch.empty_like(kept.values) if passed is None else passed
        if stage.before is not None:
            norms = cast(Tensor, kept.norms)[rows]
            tangent_part(leaving, kept.values[rows], _shares(stage, norms), products, into=passed[rows])
        elif not whole:
            passed[rows] = leaving
    if passed is not None and kept.lost is not None:
        passed.index_fill_(0, kept.lost, 0.0)
    return cotangents if passed is None else passed, _total(weights), _total(biases), None
