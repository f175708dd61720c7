"""Networks behind gradient gates, part of which does not train."""

from __future__ import annotations

import torch
from torch import nn

from clipless_dp import DPLipModel, gradient_gated, losses, recipes


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.query = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.norm(self.query(self.tokens(values))).mean(1))
        return found


def test_frozen_parameters_go_through_no_gate_and_get_no_gradient() -> None:
    torch.manual_seed(0)
    net = recipes.lora(Encoder(), 2, layers="query")
    model = DPLipModel(gradient_gated(net, isolation="vmap"), input_shape=(5,), loss=losses.TauCrossEntropy(1.0))
    inputs, targets = torch.randint(11, (4, 5)), torch.randint(3, (4,))
    for _ in range(2):
        model.loss(model(inputs), targets).backward()
    given = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert given == {"query.lora_A.weight", "query.lora_B.weight", "head.weight", "head.bias"}
