"""Recurrent layers that run whole sequences at once return, and take gradients, as where each sample has copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import passes
from clipless_dp.errors import InputError, PrivacyError
from clipless_dp.isolation import Isolated, recurrent
from clipless_dp.isolation.functions import Cap
from clipless_dp.isolation.hidden import refuse_other_ways
from clipless_dp.isolation.recurrence import GatedRecurrence, Recurrence
from tests.isolation.test_soundness import LIMIT, ROUNDING, gradients, own_gradients, rows_of, wrapped
from tests.isolation.zoo import ROWS, Case

STEPS, INPUTS, HIDDEN = 6, 3, 4


class Sequences(nn.Module):
    """What ``read`` makes of a recurrent layer's outputs and states, of several sequences a sample, or one."""

    def __init__(self, layer: nn.Module, read: Callable[[Any], Tensor], sequences: int = 1, start: int = 0) -> None:
        super().__init__()
        self.before = nn.Linear(INPUTS, INPUTS)
        self.layer, self.read, self.sequences = layer, read, sequences
        self.start = nn.Parameter(torch.randn(start, 1, HIDDEN)) if start else None

    def forward(self, values: Tensor) -> Tensor:
        rows = self.before(values).reshape(-1, STEPS, INPUTS)
        if not self.layer.batch_first:
            rows = rows.transpose(0, 1)
        begin = () if self.start is None else (self.start.expand(-1, len(values) * self.sequences, -1).contiguous(),)
        return self.read(self.layer(rows, *begin)).reshape(len(values), -1)


def outputs(made: Any) -> Tensor:
    return made[0].transpose(0, 1)


def end(made: Any) -> Tensor:
    return made[1].transpose(0, 1)


def both(made: Any) -> Tensor:
    hidden, cell = made[1]
    return made[0].flatten(1).cumsum(1)[:, -3:] * cell.sum() + hidden.sum()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Sequences(nn.LSTM(INPUTS, HIDDEN, batch_first=True), lambda made: made[0][:, -1]),
    "LSTM, steps first": lambda: Sequences(nn.LSTM(INPUTS, HIDDEN), outputs),
    "LSTM, both ways": lambda: Sequences(nn.LSTM(INPUTS, HIDDEN, 2, batch_first=True, bidirectional=True), both),
    "LSTM, projected": lambda: Sequences(nn.LSTM(INPUTS, 5, 2, batch_first=True, proj_size=HIDDEN), both),
    "LSTM, without biases": lambda: Sequences(nn.LSTM(INPUTS, HIDDEN, bias=False, bidirectional=True), outputs),
    "LSTM, three sequences": lambda: Sequences(nn.LSTM(INPUTS, HIDDEN, 2, batch_first=True), both, 3),
    "LSTM, its last cell": lambda: Sequences(nn.LSTM(INPUTS, HIDDEN), lambda made: made[1][1].transpose(0, 1)),
    "GRU": lambda: Sequences(nn.GRU(INPUTS, HIDDEN, batch_first=True), lambda made: made[0]),
    "GRU, both ways": lambda: Sequences(nn.GRU(INPUTS, HIDDEN, 2, bidirectional=True), outputs, 2),
    "GRU, its last state": lambda: Sequences(nn.GRU(INPUTS, HIDDEN, 2, bias=False), end),
    "GRU, a trained state": lambda: Sequences(nn.GRU(INPUTS, HIDDEN, 2), outputs, 2, start=2),
    "RNN, tanh": lambda: Sequences(nn.RNN(INPUTS, HIDDEN, 2, bidirectional=True), outputs),
    "RNN, ReLU": lambda: Sequences(
        nn.RNN(INPUTS, HIDDEN, 2, nonlinearity="relu", batch_first=True), lambda made: made[0], 3
    ),
    "RNN, a trained state": lambda: Sequences(nn.RNN(INPUTS, HIDDEN, bias=False), end, start=1),
}


def case_of(name: str) -> Case:
    torch.manual_seed(0)
    net = LAYERS[name]().double().train()
    return Case(net, torch.randn(ROWS, net.sequences * STEPS, INPUTS, dtype=torch.float64))


def found(case: Case, targets: Tensor) -> tuple[dict[str, Tensor], Isolated]:
    model = wrapped(case)
    assert isinstance(model.net, Isolated)
    return gradients(model, case.inputs, targets), model.net


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_each_samples_own_capped_as_with_copies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(name)
    targets = 10 * torch.randn_like(case.net(case.inputs))
    at_once, net = found(case, targets)
    assert any(kind == "recurrent" for _, uses in net.uses or () for kind, _ in uses)
    expected = {key: torch.zeros_like(value) for key, value in at_once.items()}
    capped = 0
    for row in range(ROWS):
        for key, gradient in own_gradients(case, row, targets[row : row + 1]).items():
            capped += float(gradient.norm()) > LIMIT
            expected[key] += gradient * min(1.0, LIMIT / max(float(gradient.norm()), 1e-300))
    assert capped
    monkeypatch.setattr(recurrent, "_steps_by_copies", lambda *_: True)
    by_copies, _ = found(case, targets)
    for key, gradient in at_once.items():
        size = max(float(expected[key].norm()), 1e-6)
        assert float((gradient - expected[key]).norm()) <= ROUNDING * size, key
        assert float((gradient - by_copies[key]).norm()) <= ROUNDING * size, key


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_with_a_graph_of_their_own_are_the_same_and_can_be_climbed(name: str) -> None:
    case = case_of(name)
    targets = 10 * torch.randn_like(case.net(case.inputs))
    plain, _ = found(case, targets)
    model = wrapped(case)
    named = {key: parameter for key, parameter in model.net.named_parameters() if parameter.requires_grad}
    with passes.unwitnessed():
        inputs = case.inputs.clone().requires_grad_()
        total = model.loss(model(inputs), targets)
        twice = torch.autograd.grad(total, list(named.values()), create_graph=True)
        for key, gradient in zip(named, twice, strict=True):
            assert torch.allclose(gradient, plain[key], rtol=ROUNDING, atol=1e-12), key
        (climbed,) = torch.autograd.grad(sum(gradient.norm() for gradient in twice), inputs)
        step = 1e-6 * climbed / climbed.norm()
        above, below = (
            float(sum(gradient.norm() for gradient in gradients(model, case.inputs + shift, targets).values()))
            for shift in (step, -step)
        )
    # A central difference errs by about the square of its step, and by rounding over it.
    assert (above - below) / 2e-6 == pytest.approx(float(climbed.norm()), rel=1e-3)


@pytest.mark.parametrize("name", ["LSTM, both ways", "LSTM, projected", "GRU, a trained state", "RNN, ReLU"])
def test_a_sample_more_moves_no_sum_of_a_recurrent_layer_by_more_than_its_caps(name: str) -> None:
    case = case_of(name)
    worst = 0.0
    for mode in ("clip", "normalize"):
        model = wrapped(case, 1.0, mode)
        bounds = model.sensitivity().per_parameter
        for scale in (1e-4, 1e4):
            targets = scale * torch.randn_like(case.net(case.inputs))
            whole = gradients(model, case.inputs, targets)
            without = gradients(model, rows_of(case, slice(1, None)), targets[1:])
            for key, bound in bounds.items():
                ratio = float((whole[key] - without[key]).norm()) / bound
                assert ratio <= 1 + 1e-6, (key, mode, scale)
                worst = max(worst, ratio)
    assert worst >= 0.9


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_recurrent_layers_is_where_it_is_with_copies(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = kind(INPUTS, HIDDEN, 3, dropout=0.5, batch_first=True)
    case = Case(
        Sequences(layer, lambda made: made[0]).double().train(), torch.randn(ROWS, STEPS, INPUTS, dtype=torch.float64)
    )
    targets = torch.randn_like(case.net(case.inputs))
    kept = 2.0 * torch.randint(2, (STEPS, 1, HIDDEN))
    calls: list[float] = []

    def dropped(values: Tensor, share: float) -> Tensor:
        calls.append(share)
        return values * kept

    monkeypatch.setattr(recurrent.functional, "dropout", dropped)
    at_once, _ = found(case, targets)
    often = len(calls)
    monkeypatch.setattr(recurrent, "_steps_by_copies", lambda *_: True)
    by_copies, _ = found(case, targets)
    assert calls == [0.5] * 2 * often
    for key, gradient in at_once.items():
        assert torch.allclose(gradient, by_copies[key], rtol=ROUNDING, atol=1e-12), key


def test_frozen_weights_of_a_recurrent_layer_take_no_gradients_and_others_do() -> None:
    case = case_of("LSTM, projected")
    for name, parameter in case.net.named_parameters():
        parameter.requires_grad_(name in ("layer.weight_hh_l0", "layer.bias_ih_l1"))
    targets = torch.randn_like(case.net(case.inputs))
    gradient, _ = found(case, targets)
    assert set(gradient) == {"layer.weight_hh_l0", "layer.bias_ih_l1"}
    for key, value in gradient.items():
        own = [own_gradients(case, row, targets[row : row + 1])[key] for row in range(ROWS)]
        expected = sum(one * min(1.0, LIMIT / float(one.norm())) for one in own)
        assert torch.allclose(value, expected, rtol=1e-9, atol=1e-12)


def test_a_layer_that_is_called_for_each_step_has_one_gate_for_the_weight_of_its_state() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(INPUTS, HIDDEN, batch_first=True)

        def forward(self, values: Tensor) -> Tensor:
            state = None
            for step in range(STEPS):
                made, state = self.layer(values[:, step : step + 1], state)
            return made[:, 0]

    model = wrapped(Case(Steps().double(), torch.randn(ROWS, STEPS, INPUTS, dtype=torch.float64)))
    assert model.sensitivity().per_parameter["layer.weight_hh_l0"] == pytest.approx(LIMIT, rel=1e-3)


def set_to_zero(made: Any) -> Tensor:
    made[0][:, 0] = 0.0
    return made[0].relu_()


def scaled(made: Any) -> Tensor:
    state = made[1][0] if isinstance(made[1], tuple) else made[1]
    return made[0][:, -1].mul_(0.5) + state.mul_(2.0)[-1]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("change", [set_to_zero, scaled])
def test_what_a_recurrent_layer_returns_may_be_overwritten(
    kind: type[nn.Module], change: Callable[[Any], Tensor]
) -> None:
    torch.manual_seed(0)
    net = Sequences(kind(INPUTS, HIDDEN, batch_first=True), change).double()
    case = Case(net, torch.randn(ROWS, STEPS, INPUTS, dtype=torch.float64))
    targets = torch.randn_like(case.net(case.inputs))
    gradient, _ = found(case, targets)
    for key, value in gradient.items():
        own = [own_gradients(case, row, targets[row : row + 1])[key] for row in range(ROWS)]
        expected = sum(one * min(1.0, LIMIT / float(one.norm())) for one in own)
        assert torch.allclose(value, expected, rtol=1e-9, atol=1e-12), key


class Beginning(nn.Module):
    """Reads so many steps."""

    def __init__(self, kind: type[nn.Module], steps: int) -> None:
        super().__init__()
        self.layer, self.steps = kind(INPUTS, HIDDEN, batch_first=True), steps

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values[:, : self.steps])[0].sum(1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("shorter", [1, 3])
def test_sequences_shorter_than_at_wrapping_are_read_within_the_bounds(kind: type[nn.Module], shorter: int) -> None:
    torch.manual_seed(0)
    net = Beginning(kind, 4).double()
    values = torch.randn(ROWS, STEPS, INPUTS, dtype=torch.float64)
    model = wrapped(Case(net, values))
    bounds = model.sensitivity().per_parameter
    net.steps = shorter
    targets = 100 * torch.randn_like(net(values))
    whole, without = gradients(model, values, targets), gradients(model, values[1:], targets[1:])
    ratios = {key: float((whole[key] - without[key]).norm()) / bound for key, bound in bounds.items()}
    assert 0.5 < max(ratios.values()) <= 1 + 1e-9, ratios


def test_sequences_longer_than_at_wrapping_are_refused_by_what_their_gradients_sum_over() -> None:
    net = Beginning(nn.LSTM, 4).double()
    values = torch.randn(ROWS, STEPS, INPUTS, dtype=torch.float64)
    model = wrapped(Case(net, values))
    net.steps = STEPS
    with pytest.raises(PrivacyError, match=r"sums over .* entries of a sample in this pass, and over"):
        model(values)


def test_a_recurrent_layer_that_is_given_no_sequence_says_so() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(INPUTS, HIDDEN, batch_first=True)

        def forward(self, values: Tensor) -> Tensor:
            return self.layer(values)[0].sum(1) + self.layer(values.new_zeros(0, STEPS, INPUTS))[0].sum((0, 1))

    with pytest.raises(InputError, match=f"given 0 sequences of {STEPS} steps"):
        wrapped(Case(Empty().double(), torch.randn(ROWS, STEPS, INPUTS, dtype=torch.float64)))


def test_a_parameter_may_not_be_the_state_that_a_recurrence_begins_with() -> None:
    weights = [torch.randn(HIDDEN, INPUTS), torch.randn(HIDDEN, HIDDEN), None, None, None]
    start = nn.Parameter(torch.randn(ROWS, 1, HIDDEN))
    how = Recurrence("tanh", False, (Cap(1.0, 1.0),) * 5)
    made = GatedRecurrence.apply(None, torch.randn(ROWS, 1, STEPS, INPUTS), start, *weights, how)
    with pytest.raises(PrivacyError, match="'start' is used past its gate, by GatedRecurrence"):
        refuse_other_ways(made[0], {"start": start}, [], {})
