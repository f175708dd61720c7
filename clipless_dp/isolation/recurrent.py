"""Recurrent layers by their equations, since ``torch.func.vmap`` has no rule for torch's own kernels.

Whole sequences run by one gated function. Where that cannot be, steps run one by one: the weights that meet the inputs
have one gate each for all of them, and those that meet the state are copies for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.errors import InputError
from clipless_dp.isolation.cells import CELLS
from clipless_dp.isolation.dispatch import applied
from clipless_dp.isolation.equations import EQUATIONS, Equation, stepped
from clipless_dp.isolation.gating import Gating, handles
from clipless_dp.isolation.layers import linear
from clipless_dp.isolation.recurrence import GatedRecurrence, Recurrence


class _Direction(NamedTuple):
    """One direction of one layer.

    Attributes:
        values: ``(T, B, K)``.
        state: at its beginning.
        weights: those of it, one after the other.
        biased: whether there are biases among them.
        back: whether it runs from the last step to the first.
    """

    values: Tensor
    state: tuple[Tensor, ...]
    weights: Sequence[Tensor]
    biased: bool
    back: bool

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``W_ih``, ``W_hh``, ``b_ih``, ``b_hh`` and ``W_hr``; ``None`` where there is none."""
        of_input, of_state, *rest = self.weights
        biases = rest[:2] if self.biased else [None, None]
        behind = rest[2 * self.biased :]
        return of_input, of_state, biases[0], biases[1], behind[0] if behind else None


def _one_way(run: Gating, cell: Equation, way: _Direction) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs ``(T, B, P)`` and the state at the end, step by step."""
    of_input, of_state, bias_of_input, bias_of_state, projection = way.parts()
    values, state = way.values, way.state
    if any(run.name_of(one) is not None for one in (of_input, bias_of_input)):
        entering = linear(run, values, of_input, bias_of_input)
        if entering is NotImplemented:
            entering = functional.linear(values, run.expanded(of_input), run.expanded(bias_of_input))
    else:
        entering = functional.linear(values, of_input, bias_of_input)
    of_state, bias_of_state, projection = (run.expanded(one) for one in (of_state, bias_of_state, projection))
    made, state = stepped(
        cell,
        entering.unbind(),
        state,
        lambda hidden: functional.linear(hidden, of_state, bias_of_state),
        None if projection is None else lambda hidden: functional.linear(hidden, projection),
        way.back,
    )
    return torch.stack(made), state


def _at_once(run: Gating, kind: str, way: _Direction) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same by one gated function, whose parameters each have one gate for the whole of their gradients."""
    of_input, of_state, *biases, projection = parts = way.parts()
    values, state = way.values, way.state
    steps, sequences, inputs = values.shape
    width = state[0].shape[-1]
    positions = steps * sequences
    named = [run.name_of(one) for one in parts]
    gates = tuple(
        run.gates(
            "recurrent",
            # A call of one step has a copy of the weight, whose entries are to be covered as well.
            (run.name_of(weight), max(positions * max(entries, len(weight)), weight.numel())),
            (run.name_of(bias), positions * len(weight)),
        )
        for weight, bias, entries in (
            (of_input, biases[0], inputs),
            (of_state, biases[1], width),
            *([] if projection is None else [(projection, None, of_state.shape[0] // CELLS[kind].gates)]),
        )
    )
    output, end = applied(
        GatedRecurrence,
        run.sample,
        values.transpose(0, 1),
        torch.cat(state, -1),
        *(run.source(one) for one in parts),
        Recurrence(kind, way.back, gates),
        *map(run.counter, named),
    )
    return output.transpose(0, 1), end.split([part.shape[-1] for part in state], -1)


def _steps_by_copies(way: _Direction) -> bool:
    """Whether steps must run one by one: weights differ from sample to sample, or a call has one step only.

    Who calls a layer once for each step has one gate for all of them that way.
    """
    return len(way.values) < 2 or any(torch._C._functorch.is_batchedtensor(weight) for weight in way.weights)


def _recurrent(cell: Equation, parts: int, kind: str) -> Callable[..., Any]:
    def run_all(
        run: Gating,
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: Any,
        num_layers: Any,
        dropout: Any,
        train: Any,
        bidirectional: Any = False,
        batch_first: Any = False,
    ) -> Any:
        if isinstance(params, bool) or not isinstance(has_biases, bool):
            raise InputError(
                "packed sequences hold several samples in one axis: give the recurrent layer padded sequences, and "
                "leave padding out by a mask"
            )
        input, hx = run.expanded(input), run.expanded(hx)
        values = input.transpose(0, 1) if batch_first else input
        if 0 in values.shape[:2]:
            raise InputError(
                f"a recurrent layer is given {values.shape[1]} sequences of {values.shape[0]} steps: leave the call "
                "out where there is nothing to read"
            )
        begin = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        ways = 2 if bidirectional else 1
        each = len(params) // (num_layers * ways)
        ends: list[tuple[Tensor, ...]] = []
        for layer in range(num_layers):
            outputs = []
            for way in range(ways):
                index = layer * ways + way
                own = params[index * each : (index + 1) * each]
                direction = _Direction(values, tuple(part[index] for part in begin), own, has_biases, way == 1)
                if _steps_by_copies(direction):
                    output, end = _one_way(run, cell, direction)
                else:
                    output, end = _at_once(run, kind, direction)
                outputs.append(output)
                ends.append(end)
            values = outputs[0] if ways == 1 else torch.cat(outputs, -1)
            if train and dropout and layer < num_layers - 1:
                values = functional.dropout(values, dropout)
        if ways == 1 and torch.is_grad_enabled():
            # What the way back needs is not the network's to overwrite.
            values = values.clone()
        output = values.transpose(0, 1) if batch_first else values
        return output, *(torch.stack([end[part] for end in ends]) for part in range(parts))

    return run_all


handles(torch.lstm, always=True)(_recurrent(EQUATIONS["lstm"], 2, "lstm"))
handles(torch.gru, always=True)(_recurrent(EQUATIONS["gru"], 1, "gru"))
handles(torch.rnn_tanh, always=True)(_recurrent(EQUATIONS["tanh"], 1, "tanh"))
handles(torch.rnn_relu, always=True)(_recurrent(EQUATIONS["relu"], 1, "relu"))


def _cell_of(cell: Equation, parts: int) -> Callable[..., Any]:
    def run_one(
        run: Gating,
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        input, hx = run.expanded(input), run.expanded(hx)
        w_ih, w_hh, b_ih, b_hh = (run.expanded(one) for one in (w_ih, w_hh, b_ih, b_hh))
        state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        made = cell(functional.linear(input, w_ih, b_ih), functional.linear(state[0], w_hh, b_hh), state)
        return made if parts > 1 else made[0]

    return run_one


handles(torch.lstm_cell)(_cell_of(EQUATIONS["lstm"], 2))
handles(torch.gru_cell)(_cell_of(EQUATIONS["gru"], 1))
handles(torch.rnn_tanh_cell)(_cell_of(EQUATIONS["tanh"], 1))
handles(torch.rnn_relu_cell)(_cell_of(EQUATIONS["relu"], 1))
