"""Gradients of gradients, by which audits climb, are those of plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, gradient_gated, layers, losses, passes

ROWS = 5


class Net(nn.Module):
    """A layer between two others, of which none is linear in what it reads."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.layer, self.shape, self.last = nn.Linear(6, 6), layer, shape, nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(values)
        mixed = self.layer(hidden.reshape(len(values), *self.shape)).reshape(hidden.shape)
        made: Tensor = self.last(mixed.sin().sum(1))
        return made


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a linear layer": (lambda: nn.Linear(6, 6), (4, 6)),
    "a convolution": (lambda: nn.Conv1d(4, 4, 3, padding=1), (4, 6)),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer norm over two axes": (lambda: nn.LayerNorm((4, 6)), (4, 6)),
    "layer norm without a bias": (lambda: nn.LayerNorm(6, bias=False), (4, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 6)),
    "group norm of maps": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group norm of a vector": (lambda: nn.GroupNorm(4, 24), (24,)),
    "a convex potential": (lambda: layers.ConvexPotential(24, 5), (24,)),
    "a convex potential of tokens": (lambda: layers.ConvexPotential(6, 5), (4, 6)),
    "a convex potential of maps": (lambda: layers.ConvexPotentialConv2d(4, hidden=2), (4, 3, 2)),
}


def twice(outputs: Tensor, targets: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of a function of the gradients of a loss."""
    loss = losses.TauCrossEntropy(1.0).per_sample(outputs, targets).sum()
    first = torch.autograd.grad(loss, of, create_graph=True)
    return torch.autograd.grad(sum(((1 + place) * one).sin().sum() for place, one in enumerate(first)), of)


@pytest.mark.parametrize("joint", [None, "layer"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_gradients_are_those_of_plain_arithmetic(name: str, joint: Any) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    net = Net(layer(), shape).double()
    with torch.no_grad():
        for parameter in net.layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    values, targets = torch.randn(ROWS, 4, 6, dtype=torch.float64), torch.randint(3, (ROWS,))
    parameters = [*net.parameters()]
    inputs = values.clone().requires_grad_()
    expected = twice(net(inputs), targets, [*parameters, inputs])
    gated = gradient_gated(net, isolation="vmap", joint=joint)
    # Caps that nothing reaches.
    gated.set_gates(1e6, mode="clip")
    model = DPLipModel(gated, input_shape=(4, 6), loss=losses.TauCrossEntropy(1.0))
    with passes.unwitnessed():
        inputs = values.clone().requires_grad_()
        found = twice(model.net(inputs), targets, [*parameters, inputs])
    for one, wanted in zip(found, expected, strict=True):
        # Float64 sums of some hundred terms.
        assert float((one - wanted).norm()) <= 1e-10 * max(float(wanted.norm()), 1.0)
