"""Gates, layer and ReLU in one: what a CPU runs in place of the traced graph, with fewer passes over activations.

A gate before a layer multiplies each sample by one number, which linear maps let through: ``(s·x)Wᵀ = s·(xWᵀ)``. So
the scaled copy is never formed. The weight's gradient is ``Σ_b (f_b s_b g_b) x_bᵀ`` with the factor ``f_b`` of the
cotangent gate. A :class:`Chain` of such layers keeps nothing for the way back but their inputs, which are the ReLUs'
outputs, and two numbers for each sample. What is done to activations is done by rows that stay in a core's cache.

The traced graph itself is what the bounds are computed from, what runs elsewhere and in compiled models, and what tests
compare with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional

from clipless_dp.gates import (
    _LARGEST_NORM,
    _LARGEST_RATIO,
    BallProjection,
    CotangentGate,
    SphereScaling,
    _drop_rows_,
    _factors,
    _largest,
    _per_sample,
    _products,
    input_gate,
    sample_norms,
)
from clipless_dp.gradient_gates import _UNDERFLOW, GradientGatedConv2d, GradientGatedLinear, _bias_gradient, _zeroed
from clipless_dp.gradient_gates import _factors as _gradient_factors
from clipless_dp.graph.tracing import TracedNet
from clipless_dp.precision import refuse_autocast

_BLOCK_ENTRIES = 1 << 17
"""Entries of an activation at once on each thread: in float32 half a megabyte, so that two fit a core's cache."""

_CONVOLUTION_ENTRIES = 1 << 20
"""The same for the backward pass of a convolution, each call of which costs a fixed time."""

_SMALLEST_SCALE = 1e-27
"""What input gate and gate may shrink a sample by together. A float32 cotangent times this, and then a sample so large,
has lost at most ``1e27·2^-150`` of the sample's norm behind the gates to underflow: nothing against caps of 1e-8."""

Slope = tuple[Tensor, Tensor | None]
"""What the Jacobian of a gate before a layer needs for each sample ``x``: ``1/‖x‖²``, or zero where the gate is linear;
and its product with the cotangent where it is known."""


class Entry(NamedTuple):
    """The input gate that the network's inputs have yet to pass.

    Attributes:
        norms: of the inputs, ``(B,)``.
        radius: of the gate.
        whole: whether none of them is lost in the gate.
    """

    norms: Tensor
    radius: float
    whole: bool


class Stage(NamedTuple):
    """One layer with what is around it.

    Attributes:
        layer: a linear layer, which may have gradient gates, or a convolution.
        before: the gate on its input.
        behind: the gate on its output's cotangent.
        rectified: whether a ReLU follows.
        interleaved: whether maps are to lie in memory channels last.
    """

    layer: nn.Linear | nn.Conv1d | nn.Conv2d
    before: BallProjection | SphereScaling | None
    behind: CotangentGate | None
    rectified: bool
    interleaved: bool

    @property
    def gradient_gate(self) -> GradientGatedLinear | None:
        """The layer, where it caps the gradients of its own parameters."""
        return self.layer if isinstance(self.layer, GradientGatedLinear) else None

    @property
    def measures(self) -> bool:
        """Whether it needs the norms of its input."""
        return self.before is not None or self.gradient_gate is not None

    @property
    def floor(self) -> float:
        """The norm below which the gate before the layer stretches by a constant."""
        return self.before.floor if isinstance(self.before, SphereScaling) else cast(BallProjection, self.before).radius

    def geometry(self) -> tuple[Any, ...]:
        """Arguments of a convolution."""
        layer = cast(nn.Conv2d, self.layer)
        return layer.stride, layer.padding, layer.dilation, False, (0,) * len(layer.kernel_size), layer.groups

    def apply(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer alone."""
        if isinstance(self.layer, nn.Linear):
            return functional.linear(values, weight, bias)
        output: Tensor = torch.ops.aten.convolution(values, weight, bias, *self.geometry())
        return output

    def broadcast(self, bias: Tensor) -> Tensor:
        """A bias in a shape that fits the output."""
        return bias if isinstance(self.layer, nn.Linear) else bias.reshape(-1, *[1] * len(self.layer.kernel_size))

    def totals(self, maps: Tensor) -> Tensor:
        """Sums over positions: what is of the output's shape, to ``(B, O)``."""
        positions = range(1, maps.dim() - 1) if isinstance(self.layer, nn.Linear) else range(2, maps.dim())
        return maps.sum(tuple(positions)) if positions else maps

    def reference(self, values: Tensor) -> Tensor:
        """The same by the modules themselves."""
        values = values if self.before is None else self.before(values)
        values = self.layer(values)
        values = values if self.behind is None else self.behind(values)
        return torch.relu(values) if self.rectified else values


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


class Interleaved(nn.Module):
    """A convolution whose maps lie in memory channels last, because a max pooling follows.

    Torch pools such maps several times faster on a CPU, and what a convolution returns lies as its weight does.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        """As the layer itself."""
        output: Tensor = functional_call(self.layer, {"weight": _interleaved(self.layer.weight)}, (values,))
        return output


def _interleaved(weight: Tensor) -> Tensor:
    return weight.to(memory_format=torch.channels_last)


def _blocks(values: Tensor, limit: int = 0) -> Iterator[slice]:
    """Rows of a batch in parts of about one size, with so many entries."""
    batch = len(values)
    count = max(1, min(batch, round(values.numel() / ((limit or _BLOCK_ENTRIES) * torch.get_num_threads()))))
    step = math.ceil(batch / count)
    return (slice(start, min(start + step, batch)) for start in range(0, batch, step))


class _Kept(NamedTuple):
    """What a stage keeps for the way back.

    Attributes:
        values: its input; the rows that count come first, ``rows`` of them, and the rest is scaled by zero.
        scales: what the gates multiply each sample by, ``(B,)``.
        norms: of its input, ``(B,)``.
        lost: indices of the samples that the gates made zero, or would shrink by more than 1e27.
        rows: as above.
    """

    values: Tensor
    scales: Tensor | None
    norms: Tensor | None
    lost: Tensor | None
    rows: int


def _entered(stage: Stage, values: Tensor, norms: Tensor | None, entry: Entry | None, owned: bool) -> _Kept:
    """The factors of the gates before a layer, and its input without the samples that they drop."""
    ball: Tensor | None = None
    if entry is not None:
        raw, radius, whole = entry
        ball = _factors(radius, raw, radius)
        norms = raw * ball if whole else torch.where(raw <= _largest(radius, raw.dtype), raw * ball, torch.nan)
    if stage.before is None and ball is None:
        return _Kept(values, None, norms, None, len(values))
    if norms is None:
        norms = sample_norms(values)
    if stage.before is None:
        scales, limit = ball, torch.finfo(norms.dtype).max
    else:
        scales, limit = _factors(stage.before.radius, norms, stage.floor), _LARGEST_NORM
        scales = scales if ball is None else scales.mul_(ball)
    assert scales is not None
    # Each row's own numbers decide what becomes of it; the look at all of them only saves the search. Without an input
    # gate no scale is this small: caps are at least 1e-8, norms at most 1e18.
    if float(norms.max()) <= limit and (ball is None or float(scales.min()) >= _SMALLEST_SCALE):
        return _Kept(values, scales, norms, None, len(values))
    lost = (~((norms <= limit) & (scales >= _SMALLEST_SCALE))).nonzero().flatten()
    scales = scales.index_fill(0, lost, 0.0)
    rows = len(values) - len(lost)
    if owned:
        values.index_fill_(0, lost, 0.0)
    elif entry is None or int(lost[0]) < rows:
        values = values.index_fill(0, lost, 0.0)
    else:
        # Padding, at the end of the batch: left out of the weight's gradient instead of copying what is before it.
        return _Kept(values, scales, norms, lost, rows)
    return _Kept(values, scales, norms, lost, len(values))


def _left(
    stage: Stage, kept: _Kept, weight: Tensor, bias: Tensor | None, measured: bool
) -> tuple[Tensor, Tensor | None]:
    """A stage's output, and the samples' norms where the next stage wants them."""
    output = stage.apply(kept.values, weight, bias if kept.scales is None else None)
    if kept.rows < len(output):
        assert kept.lost is not None
        output.index_fill_(0, kept.lost, 0.0)
    norms: list[Tensor] = []
    for rows in _blocks(output):
        block = output[rows]
        if kept.scales is not None:
            scales = _per_sample(kept.scales[rows], block)
            if bias is None:
                block.mul_(scales)
            else:
                torch.addcmul(stage.broadcast(bias), block, scales, out=block)
        if stage.rectified:
            block.relu_()
        if measured:
            norms.append(sample_norms(block))
    return output, torch.cat(norms) if measured else None


def _slope(stage: Stage, norms: Tensor, products: Tensor | None = None) -> Slope:
    """The Jacobian of the gate before a layer; a norm of at most 1e18 has a square, and a NaN is above no floor."""
    return torch.where(norms > stage.floor, norms.square().reciprocal_(), 0.0), products


def _project(cotangents: Tensor, values: Tensor, slope: Slope, rows: slice, into: Tensor) -> None:
    """``u - x⟨x, u⟩/‖x‖²`` where a gate has scaled a sample to its sphere: nothing goes along ``x``.

    Args:
        cotangents: rows of ``u``, already multiplied by the gate's factor.
        values: the same rows of ``x``.
        slope: of all rows.
        rows: which these are.
        into: where the result goes; may be ``cotangents``.
    """
    shares, products = slope
    radial = _products(values, cotangents) if products is None else products[rows]
    torch.addcmul(cotangents, values, _per_sample(radial * shares[rows], values), value=-1, out=into)


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
        most, largest = float(norms.max()), _largest(gate.limit, norms.dtype)
        if not most <= largest:
            cotangents = _drop_rows_(into.copy_(cotangents), norms, largest)
            norms = torch.where(norms <= largest, norms, 0.0)
        if gate.mode == "normalize" or not most <= gate.limit:
            shares = factors = _factors(gate.limit, norms, gate.floor if gate.mode == "normalize" else gate.limit)
            if scales is not None:
                # One pass for both factors. Where float32 has no exact product of them, the sample passes nothing: none
                # whose share is 1, so that what is done where nothing is clipped is the same.
                factors = shares * scales
                factors = torch.where(factors >= 1.0 / _LARGEST_RATIO, factors, 0.0)
        else:
            shares = torch.ones_like(norms)
    if biased:
        totals = stage.totals(cotangents)
        gradient = totals.sum(0) if shares is None else shares @ totals
    if factors is not None:
        torch.mul(cotangents, _per_sample(factors, into), out=into)
    elif cotangents.data_ptr() != into.data_ptr():
        into.copy_(cotangents)
    if wanted:
        assert scales is not None
        products = _products(cast(Tensor, output), into)
        products = torch.where(scales > 0.0, products / scales, 0.0)
    return gradient, products


class _ChainFunction(torch.autograd.Function):
    """See :class:`Chain`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, entry: Entry | None, stages: tuple[Stage, ...], *parameters: Tensor | None
    ) -> Tensor:
        ctx.stages, ctx.radius, ctx.rows = stages, None if entry is None else entry.radius, []
        saved: list[Tensor | None] = [values, *parameters]
        hidden: list[Tensor | None] = []
        signal, norms = values, None
        for index, stage in enumerate(stages):
            kept = _entered(stage, signal, norms, entry if index == 0 else None, owned=index > 0)
            ctx.rows.append(kept.rows)
            hidden.append(None if kept.values is values else kept.values)
            saved += [kept.scales, kept.norms, kept.lost]
            weight, bias = parameters[2 * index : 2 * index + 2]
            weight = _interleaved(cast(Tensor, weight)) if stage.interleaved else weight
            measured = index + 1 < len(stages) and stages[index + 1].measures
            signal, norms = _left(stage, kept, cast(Tensor, weight), bias, measured)
        ctx.save_for_backward(*saved, signal if stages[-1].rectified else None)
        # Nobody else knows them. Each is let go on the way back once it is used, as between modules of their own.
        ctx.hidden = hidden
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
        output, owned, slope = states.pop(), False, None
        hidden, ctx.hidden = ctx.hidden, None
        for index in reversed(range(len(stages))):
            signal, (scales, norms, lost) = hidden.pop(), states[3 * index : 3 * index + 3]
            kept = _Kept(values if signal is None else signal, scales, norms, lost, ctx.rows[index])
            needed = index > 0 or ctx.needs_input_grad[0], *ctx.needs_input_grad[3 + 2 * index : 5 + 2 * index]
            passed = _passed_convolution if not isinstance(stages[index].layer, nn.Linear) else _passed_linear
            weight = _interleaved(parameters[2 * index]) if stages[index].interleaved else parameters[2 * index]
            cotangents, gradients[2 * index], gradients[2 * index + 1], slope = passed(
                stages[index], kept, weight, output, cotangents, slope, owned, needed
            )
            output, owned = kept.values, True
        if slope is not None:
            for rows in _blocks(cotangents):
                _project(cotangents[rows], output[rows], slope, rows, cotangents[rows])
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


Passed = tuple[Tensor, Tensor | None, Tensor | None, Slope | None]
"""The cotangent of a stage's input, the gradients of weight and bias, and what is left to be done to the first."""

Needed = tuple[bool, bool, bool]
"""Which of input, weight and bias need gradients."""


def _total(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0]


def _passed_linear(
    stage: Stage,
    kept: _Kept,
    weight: Tensor,
    output: Tensor | None,
    cotangents: Tensor,
    slope: Slope | None,
    owned: bool,
    needed: Needed,
) -> Passed:
    """One linear layer; the gate's Jacobian is left to whoever reads the result next."""
    gate = stage.gradient_gate
    gated = cotangents if owned else torch.empty_like(cotangents, memory_format=torch.contiguous_format)
    biases: list[Tensor] = []
    sizes: list[Tensor] = []
    for rows in _blocks(gated):
        arriving, made, into = cotangents[rows], None if output is None else output[rows], gated[rows]
        if slope is not None:
            _project(arriving, cast(Tensor, made), slope, rows, arriving)
        scales = None if kept.scales is None or gate is not None else kept.scales[rows]
        bias, _ = _arrived(stage, arriving, made, scales, into, needed[2] and gate is None, False)
        biases += [] if bias is None else [bias]
        sizes += [] if gate is None else [sample_norms(into)]
    if gate is not None:
        return _passed_gated(stage, gate, kept, weight, gated, torch.cat(sizes), needed)
    gradient = _outer(gated, kept.values, kept.rows) if needed[1] else None
    passed = gated @ weight if needed[0] else None
    if passed is not None and kept.lost is not None:
        passed.index_fill_(0, kept.lost, 0.0)
    return gated if passed is None else passed, gradient, _total(biases), _left_over(stage, kept, passed)


def _passed_gated(
    stage: Stage,
    gate: GradientGatedLinear,
    kept: _Kept,
    weight: Tensor,
    cotangents: Tensor,
    norms: Tensor,
    needed: Needed,
) -> Passed:
    """What is left of a layer with gradient gates, from cotangents ``(B, O)`` of these norms, which are overwritten."""
    gradient, bias, factors = None, None, None
    counted, sizes = _zeroed(cotangents, norms)
    if needed[2]:
        bias = _bias_gradient(counted, sizes, *gate.gates()[1])
    if needed[1]:
        lengths = _lengths(stage, kept)
        factors = _gradient_factors((lengths + _UNDERFLOW) * (sizes + _UNDERFLOW), *gate.gates()[0])
        if counted is not cotangents:
            factors.masked_fill_(~(norms <= _LARGEST_NORM), torch.nan)
    if kept.scales is not None:
        cotangents.mul_(_per_sample(kept.scales, cotangents))
    passed = cotangents @ weight if needed[0] else None
    if passed is not None and kept.lost is not None:
        passed.index_fill_(0, kept.lost, 0.0)
    if factors is not None:
        gradient = _gated_outer(cotangents, kept, lengths, factors)
    return cotangents if passed is None else passed, gradient, bias, _left_over(stage, kept, passed)


def _left_over(stage: Stage, kept: _Kept, passed: Tensor | None) -> Slope | None:
    """The Jacobian of the gate before the layer, which is applied by whoever reads the result next."""
    return None if passed is None or stage.before is None else _slope(stage, cast(Tensor, kept.norms))


def _outer(cotangents: Tensor, values: Tensor, rows: int) -> Tensor:
    """``Σ g xᵀ`` over the first rows and all positions."""
    return cotangents[:rows].flatten(0, -2).t() @ values[:rows].flatten(0, -2)


def _lengths(stage: Stage, kept: _Kept) -> Tensor:
    """Norms ``(B,)`` of what the weight meets, behind the gates; NaN where they are no number up to 1e18."""
    norms = sample_norms(kept.values) if kept.norms is None else kept.norms
    if stage.before is not None:
        norms = norms * _factors(stage.before.radius, norms, stage.floor)
    return torch.where(norms <= _LARGEST_NORM, norms, torch.nan)


def _gated_outer(cotangents: Tensor, kept: _Kept, lengths: Tensor, factors: Tensor) -> Tensor:
    """The gated gradient of a weight, from cotangents that are overwritten; a NaN drops the sample."""
    values, counted = kept.values, slice(0, kept.rows)
    cotangents.mul_(factors.unsqueeze(1))
    if bool(factors.isnan().any()):
        cotangents.index_fill_(0, factors.isnan().nonzero().flatten(), 0.0)
    if bool(lengths[counted].isnan().any()):
        values = values.index_fill(0, lengths.isnan().nonzero().flatten(), 0.0)
    return _outer(cotangents, values, kept.rows)


def _passed_convolution(
    stage: Stage,
    kept: _Kept,
    weight: Tensor,
    output: Tensor | None,
    cotangents: Tensor,
    slope: Slope | None,
    owned: bool,
    needed: Needed,
) -> Passed:
    """One convolution, by blocks of rows: what arrives, what is gated and what leaves lie in the cache together."""
    biases: list[Tensor] = []
    weights: list[Tensor] = []
    passed: Tensor | None = None
    wanted = needed[0] and stage.before is not None and stage.rectified and stage.layer.bias is None
    larger = max(cotangents, kept.values, key=Tensor.numel)
    for rows in _blocks(larger, _CONVOLUTION_ENTRIES):
        arriving, made = cotangents[rows], None if output is None else output[rows]
        if slope is not None:
            _project(arriving, cast(Tensor, made), slope, rows, arriving)
        scales = None if kept.scales is None else kept.scales[rows]
        into = arriving if owned else torch.empty_like(arriving)
        bias, products = _arrived(stage, arriving, made, scales, into, needed[2], wanted)
        biases += [] if bias is None else [bias]
        counted = slice(rows.start, min(rows.stop, kept.rows))
        if not any(needed[:2]) or counted.start >= counted.stop:
            continue
        leaving, gradient, _ = torch.ops.aten.convolution_backward(
            into[: counted.stop - counted.start],
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
            _project(leaving, kept.values[rows], _slope(stage, norms, products), slice(None), passed[rows])
        elif not whole:
            passed[rows] = leaving
    if passed is not None and kept.lost is not None:
        passed.index_fill_(0, kept.lost, 0.0)
    return cotangents if passed is None else passed, _total(weights), _total(biases), None


class FusedNet:
    """A traced network whose gated layers run as chains.

    Args:
        traced: the network.

    Attributes:
        module: executes the graph; takes the input and an :data:`Entry` or ``None``.
        takes_entry: whether the input reaches a chain first, so that this can do the work of the input gate.
        beats_compiled: whether it does what a compiled graph is slower at: signal gates, and maxima of maps.
    """

    def __init__(self, traced: TracedNet) -> None:
        found = _chains(traced)
        chains = {nodes[-1]: (nodes[0], stages) for nodes, stages in found}
        fused = {node for nodes, _ in found for node in nodes}
        graph = fx.Graph()
        modules: dict[str, nn.Module] = {}
        copies: dict[fx.Node, fx.Node] = {}
        entry: fx.Node | None = None
        self.takes_entry = False
        every = [stage for _, stages in found for stage in stages]
        self.beats_compiled = any(stage.before or stage.behind or stage.interleaved for stage in every)
        for node in traced.module.graph.nodes:
            if node in chains:
                first, stages = chains[node]
                (source,) = first.all_input_nodes
                heading = _is_input(traced, source)
                self.takes_entry |= heading
                name = f"chain_{len(modules)}"
                modules[name] = Chain(stages)
                copies[node] = graph.call_module(name, (copies[source], entry) if heading else (copies[source],))
            elif node in fused:
                continue
            elif type(_leaf(traced, node)) in (nn.Conv2d, GradientGatedConv2d) and _pooled(traced, node):
                name = f"interleaved_{len(modules)}"
                modules[name] = Interleaved(cast(nn.Conv2d, traced.leaf(node)))
                self.beats_compiled = True
                copies[node] = graph.call_module(name, (copies[node.all_input_nodes[0]],))
            else:
                copies[node] = graph.node_copy(node, lambda given: copies[given])
                if node.op == "placeholder":
                    entry = graph.placeholder("entry", default_value=None)
                elif node.op == "call_module":
                    modules[str(node.target)] = traced.executed(node)
        self.module = fx.GraphModule(modules, graph)

    @staticmethod
    def can_run(values: Tensor) -> bool:
        """Whether the chains are for this device and this way of running."""
        return (
            values.device.type == "cpu"
            and values.dtype in (torch.float32, torch.float64)
            and not torch.compiler.is_compiling()
        )


def _is_input(traced: TracedNet, node: fx.Node) -> bool:
    """Whether a value is the network's input or a reshaped view of it, and used once."""
    while len(node.users) == 1:
        if node.op == "placeholder":
            return True
        reshapes = node.op == "call_module" and type(traced.leaf(node)) in (nn.Flatten, nn.Unflatten, nn.Identity)
        if not reshapes and node.target not in (torch.flatten, torch.reshape, "flatten", "reshape", "view"):
            return False
        if len(node.all_input_nodes) != 1:
            return False
        (node,) = node.all_input_nodes
    return False


def _chains(traced: TracedNet) -> list[tuple[list[fx.Node], tuple[Stage, ...]]]:
    """The longest runs of stages in which each value is used by the next one only."""
    found: list[tuple[list[fx.Node], tuple[Stage, ...]]] = []
    for node in traced.module.graph.nodes:
        stage = _stage(traced, node)
        if stage is None:
            continue
        nodes, made = stage
        (source,) = nodes[0].all_input_nodes
        if found and found[-1][0][-1] is source and len(source.users) == 1:
            found[-1] = [*found[-1][0], *nodes], (*found[-1][1], made)
        elif len(nodes) > 1 or isinstance(made.layer, GradientGatedLinear):
            found.append((nodes, (made,)))
    return found


def _stage(traced: TracedNet, node: fx.Node) -> tuple[list[fx.Node], Stage] | None:
    """The stage around a layer's node, if it is one that can be fused; a dense one may stand alone behind another."""
    layer = _leaf(traced, node)
    if type(layer) not in (nn.Linear, GradientGatedLinear, nn.Conv1d, nn.Conv2d) or len(node.all_input_nodes) != 1:
        return None
    if isinstance(layer, GradientGatedLinear) and len(traced.shapes[node]) != 1:
        return None
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return None
    nodes = [node]
    before, behind, rectified = _leaf(traced, node.all_input_nodes[0]), None, False
    if type(before) in (BallProjection, SphereScaling) and len(node.all_input_nodes[0].users) == 1:
        nodes.insert(0, node.all_input_nodes[0])
    else:
        before = None
    following = _only_user(nodes[-1])
    if following is not None and type(_leaf(traced, following)) is CotangentGate:
        behind = _leaf(traced, following)
        nodes.append(following)
        following = _only_user(following)
    skipped = []
    if following is not None and following.op == "call_method" and following.target == "clone":
        skipped, following = [following], _only_user(following)
    if following is not None and _rectifies(traced, following):
        nodes += [*skipped, following]
        rectified = True
    interleaved = isinstance(layer, nn.Conv2d) and _pooled(traced, node)
    if len(nodes) == 1 and isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return None
    return nodes, Stage(cast(Any, layer), cast(Any, before), cast(Any, behind), rectified, interleaved)


def _leaf(traced: TracedNet, node: fx.Node) -> nn.Module | None:
    return traced.leaf(node) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _pooled(traced: TracedNet, node: fx.Node) -> bool:
    """Whether a max pooling follows, with nothing but gates and ReLUs between."""
    following = _only_user(node)
    while following is not None and (
        type(_leaf(traced, following)) is CotangentGate or _rectifies(traced, following) or following.target == "clone"
    ):
        following = _only_user(following)
    return following is not None and type(_leaf(traced, following)) is nn.MaxPool2d


def _rectifies(traced: TracedNet, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(traced.leaf(node)) is nn.ReLU
    return node.target in (torch.relu, functional.relu, "relu")
