"""Walks over modules."""

from __future__ import annotations

import torch
from torch import nn

from clipless_dp.modules import modules_of, parameters_of


def test_modules_and_parameters_are_those_that_torch_finds_in_its_order() -> None:
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared, nn.Linear(3, 3, bias=False)), nn.Bilinear(3, 3, 3))
    net.register_module("absent", None)
    net[2].weight = nn.Parameter(torch.zeros(3, 3, 3))
    net[1][2].weight = shared.weight
    net.register_parameter("own", nn.Parameter(torch.zeros(2)))
    for part in net.modules():
        assert [*map(id, modules_of(part))] == [*map(id, part.modules())]
        assert [*map(id, parameters_of(part))] == [*map(id, part.parameters())]
    assert parameters_of(nn.ReLU()) == []
