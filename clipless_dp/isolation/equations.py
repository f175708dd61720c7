"""One step of each recurrent cell, and a way back over whole sequences that can be differentiated itself.

The latter forms each sample's gradients by copies of the parameters: slow, for attacks that climb a gradient's norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Equation = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""From what came of the input and of the state before, ``(B, gates·H)`` each, to the state."""


def _lstm(entering: Tensor, kept: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    takes, forgets, new, gives = (entering + kept).chunk(4, -1)
    cell = forgets.sigmoid() * state[1] + takes.sigmoid() * new.tanh()
    return gives.sigmoid() * cell.tanh(), cell


def _gru(entering: Tensor, kept: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    reset_in, update_in, new_in = entering.chunk(3, -1)
    reset_kept, update_kept, new_kept = kept.chunk(3, -1)
    new = (new_in + (reset_in + reset_kept).sigmoid() * new_kept).tanh()
    update = (update_in + update_kept).sigmoid()
    return (update * state[0] + (1.0 - update) * new,)


def _tanh(entering: Tensor, kept: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((entering + kept).tanh(),)


def _relu(entering: Tensor, kept: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((entering + kept).relu(),)


EQUATIONS: dict[str, Equation] = {"lstm": _lstm, "gru": _gru, "tanh": _tanh, "relu": _relu}
"""By the names of :data:`clipless_dp.isolation.cells.CELLS`."""


def stepped(
    equation: Equation,
    entering: Sequence[Tensor],
    state: tuple[Tensor, ...],
    of_state: Callable[[Tensor], Tensor],
    projection: Callable[[Tensor], Tensor] | None,
    back: bool,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """All steps of one direction, one by one: the outputs in the order of the inputs, and the state at the end.

    Args:
        equation: of the cell.
        entering: what came of the inputs, for each step.
        state: at the beginning.
        of_state: what comes of the hidden state.
        projection: of the hidden state, where there is one.
        back: whether it runs from the last step to the first.
    """
    made = []
    for arrived in reversed(entering) if back else entering:
        hidden, *others = equation(arrived, of_state(state[0]), state)
        state = (hidden if projection is None else projection(hidden), *others)
        made.append(state[0])
    return made[::-1] if back else made, state


def gradients_by_copies(
    kind: str,
    back: bool,
    values: Tensor,
    state: Tensor,
    parameters: Sequence[Tensor | None],
    arriving: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """What comes back to the inputs, the initial state, and each sample's parameters, with a graph of its own.

    Args:
        kind: of the cell.
        back: whether it runs from the last step to the first.
        values: ``(B, n, T, K)``.
        state: ``(B, n, P)``, of an LSTM ``(B, n, P + H)``.
        parameters: ``W_ih``, ``W_hh``, ``b_ih``, ``b_hh`` and ``W_hr``; ``None`` where there is none.
        arriving: at the outputs ``(B, n, T, P)`` and at the last state; ``None`` where nothing does.
    """
    with torch.enable_grad():
        copies = [None if one is None else one.unsqueeze(0).expand(len(values), *one.shape) for one in parameters]
        of_input, of_state, bias_of_input, bias_of_state, projection = copies
        assert of_input is not None
        assert of_state is not None

        def through(met: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            made = torch.einsum("bn...k,bok->bn...o", met, weight)
            return made if bias is None else made + bias.reshape(len(bias), *[1] * (made.dim() - 2), -1)

        entering = through(values, of_input, bias_of_input)
        width = of_state.shape[2]
        parts = state.split([width, state.shape[2] - width], 2) if state.shape[2] > width else (state,)
        made, parts = stepped(
            EQUATIONS[kind],
            entering.unbind(2),
            parts,
            lambda hidden: through(hidden, of_state, bias_of_state),
            None if projection is None else lambda hidden: through(hidden, projection, None),
            back,
        )
        outputs = torch.stack(made, 2), torch.cat(parts, 2)
        reached = [(one, cotangent) for one, cotangent in zip(outputs, arriving, strict=True) if cotangent is not None]
        wanted = [one if one is not None and one.requires_grad else None for one in (values, state, *copies)]
        found = iter(
            torch.autograd.grad(
                [one for one, _ in reached],
                [one for one in wanted if one is not None],
                [cotangent for _, cotangent in reached],
                create_graph=True,
                allow_unused=True,
            )
        )
        of_values, of_begin, *of_copies = [None if one is None else next(found) for one in wanted]
    return of_values, of_begin, of_copies
