"""Hooks on the nodes of a pass's autograd graph are refused, wherever they are and whenever they were put."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipless_dp import (
    CliplessDPSGD,
    DPLipModel,
    LayerBounds,
    PoissonBatches,
    PrivacyError,
    RuleContext,
    constraints,
    gated,
    gradient_gated,
    losses,
    passes,
    register_rule,
)
from clipless_dp.model import nodes
from clipless_dp.sampling import Batch
from tests.support import run_in_threads

SIZE, RATE = 40, 0.25


class Halved(nn.Module):
    """Keeps what it is given and what lies between."""

    def forward(self, values: Tensor) -> Tensor:
        self.__dict__["kept"] = made = (values * 0.5).sin()
        return made


@register_rule(Halved)
def _halved(module: Halved, context: RuleContext) -> LayerBounds:
    return LayerBounds(0.5 * context.input_norm, lipschitz=0.5)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "constraint": net,
    "weights": net,
    "signal gates": lambda: gated(net()),
    "gradient gates": lambda: gradient_gated(net()),
    "sample by sample": lambda: gradient_gated(net(), isolation="vmap"),
    "a layer of one's own": lambda: nn.Sequential(nn.Linear(6, 5), Halved(), nn.Linear(5, 3)),
}

HOOKS: dict[str, Callable[[Any], RemovableHandle]] = {
    "ahead, scales": lambda node: node.register_prehook(lambda came: tuple(one * 3.0 for one in came)),
    "behind, scales": lambda node: node.register_hook(
        lambda found, came: tuple(None if one is None else one * 3.0 for one in found)
    ),
    "ahead, in place": lambda node: node.register_prehook(lambda came: [one.mul_(3.0) for one in came] and None),
    "looks": lambda node: node.register_hook(lambda found, came: None),
}


def model_of(route: str = "gradient gates") -> DPLipModel:
    torch.manual_seed(0)
    constraint = constraints.Spectral() if route == "constraint" else None
    loss = losses.TauCrossEntropy()
    return DPLipModel(NETS[route](), input_shape=(6,), input_norm=1.0, loss=loss, constraint=constraint)


def optimizer_of(model: DPLipModel) -> CliplessDPSGD:
    return CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=RATE, dataset_size=SIZE, accountant="rdp")


def drawn() -> Batch:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(SIZE, 6, generator=generator), torch.randint(3, (SIZE,), generator=generator)
    return next(iter(PoissonBatches(data, sample_rate=RATE, steps=1)))


def nodes_of(loss: Tensor) -> list[Any]:
    """All of a pass, but what fills gradients, and the first, of which a hook is the factor of the loss."""
    seen: dict[Any, None] = {}
    left = [loss.grad_fn]
    while left:
        node: Any = left.pop()
        if node is not None and node not in seen and not hasattr(node, "variable"):
            seen[node] = None
            left += [below for below, _ in node.next_functions]
            left += nodes._reached([node], False) if node.name() == "_ApartBackward" else []
    return list(seen)[1:]


def passes_of(model: DPLipModel) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        batch = drawn()
        output = model(batch.inputs)
        yield output, model.loss(output, batch.targets, batch.mask)


def refused(model: DPLipModel, loss: Tensor) -> None:
    with pytest.raises(PrivacyError, match="a hook is on the node"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("route", NETS)
def test_a_hook_on_any_node_between_loss_and_parameters_is_refused(route: str, hook: str) -> None:
    _, loss = next(passes_of(model_of(route)))
    names = []
    for index in range(len(nodes_of(loss))):
        # The factor of the loss is known from the first pass of a model, and what changes it says so itself.
        model = model_of(route)
        _, loss = next(passes_of(model))
        node = nodes_of(loss)[index]
        HOOKS[hook](node)
        refused(model, loss)
        names.append(node.name())
    assert {"_OutermostGateBackward", "_DoorBackward", "SumBackward0"} <= {*names}
    assert route != "a layer of one's own" or "SinBackward0" in names


@pytest.mark.parametrize("route", NETS)
def test_hooks_on_tensors_are_no_hooks_on_nodes(route: str) -> None:
    model = model_of(route)
    optimizer = optimizer_of(model)
    seen: list[Tensor] = []
    output, loss = next(passes_of(model))
    output.register_hook(seen.append)
    loss.register_hook(seen.append)
    before = nodes.count()
    # Elsewhere anything may be.
    other = torch.ones(2, requires_grad=True).exp()
    HOOKS["behind, scales"](other.grad_fn)
    assert nodes.count() == before + 1
    loss.backward()
    optimizer.step()
    assert len(seen) == 2
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize("route", NETS)
def test_no_node_is_asked_where_nobody_has_put_a_hook(route: str) -> None:
    model = model_of(route)
    optimizer = optimizer_of(model)
    asked = mock.Mock(side_effect=AssertionError)
    with mock.patch.object(nodes, "_is_hooked", asked):
        for _, (_, loss) in zip(range(3), passes_of(model), strict=False):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.steps_taken == 3


def test_a_hook_that_was_removed_again_is_no_hook() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    _, loss = next(passes_of(model))
    for node in nodes_of(loss):
        HOOKS["ahead, scales"](node).remove()
    loss.backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize("route", ["signal gates", "gradient gates"])
def test_a_hook_that_is_put_during_the_backward_pass_is_refused_where_gradients_come_in(route: str) -> None:
    model = model_of(route)
    output, loss = next(passes_of(model))
    *_, door = (node for node in nodes_of(loss) if node.name() == "_DoorBackward")
    output.register_hook(lambda cotangent: HOOKS["ahead, scales"](door) and None)
    refused(model, loss)


def test_one_of_two_passes_that_has_a_hook_is_refused() -> None:
    model = model_of()
    both = passes_of(model)
    (_, first), (_, second) = next(both), next(both)
    HOOKS["ahead, scales"](nodes_of(first)[-2])
    refused(model, first + second)


def test_hooks_are_found_without_a_loss_of_the_model() -> None:
    model = model_of()
    output, loss = next(passes_of(model))
    *_, door = nodes_of(loss)
    HOOKS["ahead, scales"](door)
    refused(model, output.square().sum())


@pytest.mark.parametrize("looks", [True, False])
def test_backward_hooks_of_modules_around_a_model_are_refused(looks: bool) -> None:
    model = model_of()
    around = nn.Sequential(model)
    around.register_full_backward_pre_hook(lambda module, came: None if looks else (came[0] / came[0].norm(),))
    batch = drawn()
    refused(model, model.loss(around(batch.inputs), batch.targets, batch.mask))


def test_a_pass_that_begins_meanwhile_lets_no_hook_through() -> None:
    torch.manual_seed(0)
    layer = Halved()
    model = DPLipModel(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), layer, nn.Linear(5, 3)),
        input_shape=(6,),
        input_norm=1.0,
        loss=losses.TauCrossEntropy(),
    )
    _, loss = next(passes_of(model))
    (tanh,) = (node for node in nodes_of(loss) if node.name() == "TanhBackward0")

    def hook(_: Tensor) -> None:
        HOOKS["behind, scales"](tanh)
        run_in_threads(model, [(drawn().inputs,)])

    layer.kept.register_hook(hook)
    refused(model, loss)


@pytest.mark.parametrize("behind", [True, False])
def test_what_fills_gradients_of_compiled_passes_is_asked_when_it_does(behind: bool) -> None:
    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, backend="aot_eager")
    filling = [torch.autograd.graph.get_gradient_edge(parameter).node for parameter in model.net.parameters()]
    batch = drawn()
    inputs = batch.inputs.clone().requires_grad_()
    kind = "behind, scales" if behind else "ahead, scales"
    inputs.register_hook(lambda slope: [HOOKS[kind](node) for node in filling] and None)
    refused(model, model.loss(compiled(inputs), batch.targets, batch.mask))
    torch._dynamo.reset()


def test_hooks_on_what_makes_public_rows_are_no_hooks_on_a_pass() -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    generator = nn.Linear(2, 6)
    with passes.public():
        output = model(generator(torch.ones(4, 2)).tanh())
    for node in nodes_of(output):
        if node.name() == "TanhBackward0" and node.next_functions[0][0].name() == "AddmmBackward0":
            HOOKS["looks"](node)
    output.square().sum().backward()
    assert generator.weight.grad is not None
    optimizer.zero_grad()
