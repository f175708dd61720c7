"""The equations of ``torch.nn.LSTM``, ``GRU`` and ``RNN`` over all steps, and the way back to what arrives at each one.

``R`` rows are sequences, ``T`` their steps, ``H`` the width of the hidden state, ``P`` of what is returned of it, which
is another one only where an LSTM projects it. Nothing of a row comes into another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Run:
    """What one direction of one layer computes.

    Attributes:
        gates: ``(R, T, gates·H)``: of the inputs alone, and when a cell has run, behind their activations.
        hidden: ``(R, T, H)``; of a cell with one gate the same tensor.
        outputs: ``(R, T, P)``; without a projection the same tensor.
        extra: ``(R, T, H)``: of an LSTM its cells, of a GRU what its new state meets of the one before; else ``None``.
        state: the one that it begins with: ``(R, P)``, of an LSTM with the cell's behind it, ``(R, P + H)``.
        back: whether it runs from the last step to the first.
    """

    gates: Tensor
    hidden: Tensor
    outputs: Tensor
    extra: Tensor | None
    state: Tensor
    back: bool

    def steps(self) -> range:
        """The steps in the order in which they run."""
        steps = range(self.gates.shape[1])
        return steps[::-1] if self.back else steps

    def before(self, values: Tensor, begin: Tensor) -> Tensor:
        """Values of each step, ``(R, T, n)``, to those of the step that ran before it; ``begin`` is ``(R, n)``."""
        first = begin.unsqueeze(1)
        return torch.cat([values[:, 1:], first] if self.back else [first, values[:, :-1]], 1)

    def states_before(self) -> Tensor:
        """``(R, T, P)``: what the weight of the state meets at each step."""
        return self.before(self.outputs, self.state[:, : self.outputs.shape[2]])


Arriving = Callable[[Tensor, int], Tensor]
"""What arrives at a step's hidden state, ``(R, H)``, of what the next step passed on, ``(R, P)``."""


@dataclass(frozen=True)
class Cell:
    """A kind of cell.

    Attributes:
        gates: how many there are.
        extra: whether a run has :attr:`Run.extra`.
        joint: whether both biases are added before all activations.
        run: of a run, the weight and bias of the state, and the projection, makes the state at the end.
        back: of a run, the weight of the state, what arrives, and what arrives at the state at the end or ``None``,
            makes the cotangents of what came of the inputs and of what came of the state, ``(R, T, gates·H)`` each, and
            of the state at the beginning.
    """

    gates: int
    extra: bool
    joint: bool
    run: Callable[[Run, Tensor, Tensor | None, Tensor | None], Tensor]
    back: Callable[[Run, Tensor, Arriving, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def _of_sigmoid(made: Tensor, out: Tensor) -> Tensor:
    return torch.addcmul(made, made, made, value=-1.0, out=out)


def _run_lstm(run: Run, of_state: Tensor, bias: Tensor | None, projection: Tensor | None) -> Tensor:
    size, width = run.hidden.shape[2], run.outputs.shape[2]
    cells = cast(Tensor, run.extra)
    state, cell = run.state[:, :width], run.state[:, width:]
    for step in run.steps():
        gates = run.gates[:, step].addmm_(state, of_state.t())
        takes_and_forgets = gates[:, : 2 * size].sigmoid_()
        new, gives = gates[:, 2 * size : 3 * size].tanh_(), gates[:, 3 * size :].sigmoid_()
        cell = torch.mul(takes_and_forgets[:, size:], cell, out=cells[:, step])
        cell.addcmul_(takes_and_forgets[:, :size], new)
        state = torch.mul(gives, cell.tanh(), out=run.hidden[:, step])
        if projection is not None:
            state = torch.mm(state, projection.t(), out=run.outputs[:, step])
    return torch.cat([state, cell], 1)


def _lstm_back(run: Run, of_state: Tensor, arriving: Arriving, end: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    size, width = run.hidden.shape[2], run.outputs.shape[2]
    cells = cast(Tensor, run.extra)
    takes, forgets, new, gives = run.gates.chunk(4, 2)
    bent = cells.tanh()
    slopes = torch.empty_like(run.gates)
    parts = slopes.unflatten(2, (4, size))
    _of_sigmoid(takes, parts[:, :, 0]).mul_(new)
    _of_sigmoid(forgets, parts[:, :, 1]).mul_(run.before(cells, run.state[:, width:]))
    torch.addcmul(takes, takes * new, new, value=-1.0, out=parts[:, :, 2])
    _of_sigmoid(gives, parts[:, :, 3]).mul_(bent)
    through = torch.addcmul(gives, gives * bent, bent, value=-1.0)
    rests = torch.zeros_like(run.state) if end is None else end
    passed, of_cell = rests[:, :width], rests[:, width:]
    for step in reversed(run.steps()):
        of_hidden = arriving(passed, step)
        of_cell = torch.addcmul(of_cell, of_hidden, through[:, step])
        parts[:, step, :3].mul_(of_cell.unsqueeze(1))
        parts[:, step, 3].mul_(of_hidden)
        of_cell = of_cell.mul_(forgets[:, step])
        passed = slopes[:, step] @ of_state
    return slopes, slopes, torch.cat([passed, of_cell], 1)


def _run_gru(run: Run, of_state: Tensor, bias: Tensor | None, projection: Tensor | None) -> Tensor:
    size = run.hidden.shape[2]
    met = cast(Tensor, run.extra)
    state = run.state
    for step in run.steps():
        gates = run.gates[:, step]
        kept = functional.linear(state, of_state, bias)
        gates[:, : 2 * size].add_(kept[:, : 2 * size]).sigmoid_()
        met[:, step] = kept[:, 2 * size :]
        new = gates[:, 2 * size :].addcmul_(gates[:, :size], met[:, step]).tanh_()
        state = torch.lerp(new, state, gates[:, size : 2 * size], out=run.hidden[:, step])
    return state.clone()


def _gru_back(run: Run, of_state: Tensor, arriving: Arriving, end: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    size = run.hidden.shape[2]
    resets, updates, new = run.gates.chunk(3, 2)
    slopes = torch.empty_like(run.gates)
    parts = slopes.unflatten(2, (3, size))
    # Behind the activation of the new state: as it enters by the input, and reset as by the state.
    entering = (1.0 - updates) * (1.0 - new.square())
    _of_sigmoid(resets, parts[:, :, 0]).mul_(cast(Tensor, run.extra)).mul_(entering)
    _of_sigmoid(updates, parts[:, :, 1]).mul_(run.states_before() - new)
    torch.mul(entering, resets, out=parts[:, :, 2])
    passed = torch.zeros_like(run.state) if end is None else end
    for step in reversed(run.steps()):
        of_hidden = arriving(passed, step)
        parts[:, step].mul_(of_hidden.unsqueeze(1))
        entering[:, step].mul_(of_hidden)
        passed = torch.addmm(of_hidden * updates[:, step], slopes[:, step], of_state)
    return torch.cat([slopes[:, :, : 2 * size], entering], 2), slopes, passed


def _run_elman(bend: Callable[[Tensor], Tensor]) -> Callable[[Run, Tensor, Tensor | None, Tensor | None], Tensor]:
    def run_all(run: Run, of_state: Tensor, bias: Tensor | None, projection: Tensor | None) -> Tensor:
        state = run.state
        for step in run.steps():
            state = bend(run.gates[:, step].addmm_(state, of_state.t()))
        return state.clone()

    return run_all


def _elman_back(
    slope: Callable[[Tensor], Tensor],
) -> Callable[[Run, Tensor, Arriving, Tensor | None], tuple[Tensor, Tensor, Tensor]]:
    def back(run: Run, of_state: Tensor, arriving: Arriving, end: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        slopes = slope(run.hidden)
        passed = torch.zeros_like(run.state) if end is None else end
        for step in reversed(run.steps()):
            passed = slopes[:, step].mul_(arriving(passed, step)) @ of_state
        return slopes, slopes, passed

    return back


CELLS = {
    "lstm": Cell(4, True, True, _run_lstm, _lstm_back),
    "gru": Cell(3, True, False, _run_gru, _gru_back),
    "tanh": Cell(1, False, True, _run_elman(torch.tanh_), _elman_back(lambda made: 1.0 - made.square())),
    "relu": Cell(1, False, True, _run_elman(torch.relu_), _elman_back(lambda made: (made > 0).to(made.dtype))),
}
