"""One direction of a recurrent layer over whole sequences of all samples, with its parameters behind gradient gates.

What arrives before the activations at each step, ``δ_t``, is all that the gradients need: those of the weights are
``Σ_t δ_t x_tᵀ`` and ``Σ_t δ_t h_{t-1}ᵀ``, as of linear layers at ``T`` positions, and so are their norms.
"""

# ruff: noqa: D102 (the methods are those of torch.autograd.Function)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.errors import PrivacyError
from clipless_dp.gates.arithmetic import sample_norms
from clipless_dp.gates.parts import Part, Rows, linear_parts
from clipless_dp.isolation.cells import CELLS, Cell, Run
from clipless_dp.isolation.equations import gradients_by_copies
from clipless_dp.isolation.functions import Affine, _Gated, token_gradients


@dataclass(frozen=True)
class Recurrence:
    """How a direction runs.

    Attributes:
        kind: of :data:`clipless_dp.isolation.cells.CELLS`.
        back: whether from the last step to the first.
        gates: of what the inputs meet, what the state meets, and the projection; there may be none of the latter.
    """

    kind: str
    back: bool
    gates: tuple[Affine, ...]

    @property
    def cell(self) -> Cell:
        """The equations."""
        return CELLS[self.kind]


PLACES = ((0, 2), (1, 3), (4, None))
"""Where weight and bias of each of a recurrence's gates stand among its parameters."""


def _differentiably(
    ctx: Any, values: Tensor, state: Tensor, parameters: list[Tensor | None], arriving: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """What :meth:`GatedRecurrence.backward` returns, with a graph of its own."""
    how: Recurrence = ctx.how
    of_values, of_begin, of_copies = gradients_by_copies(how.kind, how.back, values, state, parameters, arriving[:2])
    made: list[Tensor | None] = [None] * 10
    for places, gates in zip(PLACES, how.gates, strict=False):
        parts: list[Part | None] = []
        for place, cap in zip(places, (gates.weight, gates.bias), strict=True):
            own = None if place is None or cap is None else of_copies[place]
            parts.append(None if own is None else Rows(own.flatten(1), own.shape[1:]))
        counted = tuple(ctx.needs_input_grad[9 + place] for place in places if place is not None)
        found = gates.sums((parts[0], parts[1]), counted)
        for place, gradient, counts in zip(places, found[:2], found[2:], strict=True):
            if place is not None:
                made[place], made[5 + place] = gradient, counts
    return None, of_values, of_begin, *made[:5], None, *made[5:]


class GatedRecurrence(_Gated):
    """``values`` is ``(B, n, T, K)``, of ``n`` sequences a sample, ``state`` is ``(B, n, P)``, or ``(B, n, P + H)``.

    Returns ``(B, n, T, P)``, the state at the end, and what its own way back needs.
    """

    ungated = 2

    @staticmethod
    def forward(
        sample: Any,
        values: Tensor,
        state: Tensor,
        of_input: Tensor,
        of_state: Tensor,
        bias_of_input: Tensor | None,
        bias_of_state: Tensor | None,
        projection: Tensor | None,
        how: Recurrence,
        *counters: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        cell = how.cell
        batch, sequences, steps, inputs = values.shape
        rows = batch * sequences
        size = len(of_input) // cell.gates
        bias = bias_of_input
        if cell.joint and bias_of_input is not None and bias_of_state is not None:
            bias = bias_of_input + bias_of_state
        gates = functional.linear(values.reshape(rows, steps, inputs), of_input, bias)
        hidden = gates if cell.gates == 1 else values.new_empty(rows, steps, size)
        run = Run(
            gates,
            hidden,
            hidden if projection is None else values.new_empty(rows, steps, len(projection)),
            torch.empty_like(hidden) if cell.extra else None,
            state.reshape(rows, -1),
            how.back,
        )
        end = cell.run(run, of_state, bias_of_state, projection)
        also = [run.extra, None if hidden is gates else gates, None if projection is None else hidden]
        return run.outputs.reshape(batch, sequences, steps, -1), end.reshape(state.shape), *also

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, values, state, of_input, of_state, *biases, projection, ctx.how = inputs[:9]
        outputs, _, *also = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(one for one in also if one is not None))
        ctx.save_for_backward(values, state, of_input, of_state, *biases, projection, outputs, *also)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
        if arriving[0] is None and arriving[1] is None:
            return (None,) * 14
        values, state, of_input, of_state, *biases, projection, outputs, extra, gates, hidden = ctx.saved_tensors
        how: Recurrence = ctx.how
        if torch.is_grad_enabled():
            return _differentiably(ctx, values, state, [of_input, of_state, *biases, projection], arriving)
        batch, sequences, steps, _ = values.shape
        rows = batch * sequences
        outputs = outputs.reshape(rows, steps, -1)
        hidden = outputs if hidden is None else hidden
        run = Run(outputs if gates is None else gates, hidden, outputs, extra, state.reshape(rows, -1), how.back)
        cotangents = None if arriving[0] is None else arriving[0].reshape(rows, steps, -1)
        projected = None if projection is None else torch.empty_like(outputs)

        def at_hidden(passed: Tensor, step: int) -> Tensor:
            whole = passed if cotangents is None else passed + cotangents[:, step]
            if projected is None:
                return whole
            projected[:, step] = whole
            return cast(Tensor, whole @ projection)

        end = None if arriving[1] is None else arriving[1].reshape(rows, -1)
        entering, kept, of_begin = how.cell.back(run, of_state, at_hidden, end)
        passed = entering @ of_input if ctx.needs_input_grad[1] else None

        def of_all(of_rows: Tensor) -> Tensor:
            return of_rows.reshape(batch, sequences * steps, -1)

        entering, kept, sized = of_all(entering), of_all(kept), entering is kept
        sizes = sample_norms(entering)
        sizes_kept = sizes if sized else sample_norms(kept)
        operands: list[tuple[Callable[[], Tensor], Tensor, Tensor]] = [
            (lambda: values, entering, sizes),
            (run.states_before, kept, sizes_kept),
        ]
        if projected is not None:
            operands.append((lambda: hidden, of_all(projected), sample_norms(of_all(projected))))
        made: list[Tensor | None] = [None] * 10
        # Weights and biases in the order of the arguments; then the counts of their gates.
        for (of_weight, of_bias), gates, (reads, cotangent, norms) in zip(PLACES, how.gates, operands, strict=False):
            biased = gates.bias is not None and of_bias is not None and ctx.needs_input_grad[3 + of_bias]
            counted = tuple(ctx.needs_input_grad[9 + place] for place in (of_weight, of_bias) if place is not None)
            met = of_all(reads()) if gates.weight is not None and ctx.needs_input_grad[3 + of_weight] else None
            if gates.by_parts(counted):
                found = gates.sums(linear_parts(met, cotangent, bias=biased), counted)
            else:
                found = *token_gradients(gates, met, cotangent, norms, bias=biased), None, None
            for place, gradient, counts in zip((of_weight, of_bias), found[:2], found[2:], strict=True):
                if place is not None:
                    made[place], made[5 + place] = gradient, counts
        return (
            None,
            None if passed is None else passed.reshape(values.shape),
            of_begin.reshape(state.shape) if ctx.needs_input_grad[2] else None,
            *made[:5],
            None,
            *made[5:],
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, sample: Tensor, values: Tensor, state: Tensor, *rest: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        if any(isinstance(dim, int) for dim in in_dims[3:]):
            raise PrivacyError("a parameter behind a gradient gate must be the same for all samples")
        values, state = (
            one.expand(info.batch_size, *one.shape) if dim is None else one.movedim(dim, 0)
            for one, dim in zip((values, state), in_dims[1:3], strict=True)
        )
        outputs, end, *_ = cast(Any, GatedRecurrence).apply(None, values, state, *rest)
        return (outputs, end), (0, 0)
