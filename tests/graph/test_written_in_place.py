"""``h += t`` is a new value in the graph: where something goes on to read the one that it overwrites, it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, LayerBounds, losses, register_rule
from clipless_dp.rules import RuleContext

Calls = tuple[nn.Module, nn.Module]


class Written(nn.Module):
    def __init__(self, run: Callable[[Calls, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.run = nn.Linear(4, 4), nn.Linear(4, 4), run

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run((self.first, self.second), inputs)


def alias(parts: Calls, inputs: Tensor) -> Tensor:
    hidden = kept = parts[0](inputs)
    hidden += parts[1](inputs)
    return kept + hidden


def view(parts: Calls, inputs: Tensor) -> Tensor:
    hidden = parts[0](inputs)
    seen = hidden.unflatten(1, (2, 2)).transpose(1, 2)
    hidden *= 2.0
    return hidden + seen.flatten(1)


def half(parts: Calls, inputs: Tensor) -> Tensor:
    hidden = parts[0](inputs)
    part, _ = hidden.chunk(2, 1)
    part -= inputs[:, :2]
    return hidden


def residual(parts: Calls, inputs: Tensor) -> Tensor:
    hidden = parts[0](inputs)
    kept = hidden
    branch = parts[1](hidden)
    branch += kept
    branch *= 0.5
    return branch


def read_before(parts: Calls, inputs: Tensor) -> Tensor:
    hidden = parts[0](inputs)
    branch = parts[1](hidden)
    hidden += branch
    return hidden + branch


def wrapped(run: Callable[[Calls, Tensor], Tensor]) -> DPLipModel:
    torch.manual_seed(0)
    return DPLipModel(Written(run), input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy())


@pytest.mark.parametrize("run", [alias, view, half])
def test_what_reads_an_overwritten_value_is_refused_when_it_is_wrapped(run: Callable[[Calls, Tensor], Tensor]) -> None:
    with pytest.raises(ConfigurationError, match=r"write h = h \+ t"):
        wrapped(run)


@pytest.mark.parametrize("run", [residual, read_before])
def test_others_are_the_function_that_the_network_is_by_itself(run: Callable[[Calls, Tensor], Tensor]) -> None:
    model, inputs = wrapped(run), 0.1 * torch.randn(5, 4)
    assert torch.equal(model(inputs), model.net(inputs))


class Tripled(nn.Module):
    """A layer of a user's own that overwrites its input, of which the graph hands it a copy."""

    def __init__(self, triple: Callable[[Tensor], Tensor] = lambda values: values.mul_(3.0)) -> None:
        super().__init__()
        self.triple = triple

    def forward(self, values: Tensor) -> Tensor:
        return self.triple(values)


def by_data(values: Tensor) -> Tensor:
    values.data *= 3.0
    return values


def by_out(values: Tensor) -> Tensor:
    with torch.no_grad():
        torch.mul(values, 3.0, out=values.data)
    return values


def by_numpy(values: Tensor) -> Tensor:
    held = values.detach().numpy()
    held *= 3.0
    return values * 1.0


def where_it_is_not_zero(values: Tensor) -> Tensor:
    if bool((values != 0).any()):
        values.mul_(3.0)
    return values


TRIPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda values: values.mul_(3.0),
    "by its data": by_data,
    "by out": by_out,
    "by NumPy": by_numpy,
    "where it is not zero": where_it_is_not_zero,
}


@register_rule(Tripled)
def _tripled_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: 3.0 * context.input_norm, lipschitz=3.0)


class Around(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor] | None, triple: str = "in place") -> None:
        super().__init__()
        self.first, self.tripled, self.read = nn.Linear(4, 4, bias=False), Tripled(TRIPLE[triple]), read

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        kept = hidden if self.read is None else self.read(hidden)
        tripled: Tensor = self.tripled(hidden)
        return tripled if self.read is None else tripled + kept


@pytest.mark.parametrize("read", [lambda hidden: hidden, lambda hidden: hidden.unflatten(1, (2, 2)).flatten(1)])
@pytest.mark.parametrize("triple", TRIPLE)
def test_what_reads_the_input_that_a_layer_has_overwritten_is_refused(
    triple: str, read: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(ConfigurationError, match="of your own, overwrites before"):
        DPLipModel(Around(read, triple), input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy())


def test_a_layer_whose_input_nothing_else_reads_may_overwrite_it() -> None:
    torch.manual_seed(0)
    model = DPLipModel(Around(None), input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy())
    inputs = 0.1 * torch.randn(5, 4)
    assert torch.equal(model(inputs), model.net(inputs))
