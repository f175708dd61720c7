"""Gated operations that go by their own rule return what they do by torch's way for all transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clipless_dp.isolation.dispatch import applied
from clipless_dp.isolation.functions import Affine, Cap, GatedLinear

GATES = Affine(Cap(0.1, 0.1), Cap(0.1, 0.1), (False,))


def by_torch(kind: Any, *operands: Any) -> Tensor:
    return kind.apply(*operands)


def run(way: Callable[..., Any], within: Callable[..., Any], in_dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    values = torch.randn(4, 4, 3, requires_grad=True)
    weight, bias = torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)

    def one(sample: Tensor, own: Tensor) -> Tensor:
        return within(lambda rows: way(GatedLinear, sample, rows, weight, bias, GATES), own)

    made = torch.func.vmap(one, in_dims=(0, in_dim))(torch.zeros(4), values)
    return [made, *torch.autograd.grad(made.square().sum(), [values, weight, bias])]


@pytest.mark.parametrize("in_dim", [0, 1, None])
def test_the_short_way_returns_what_torchs_does(in_dim: int) -> None:
    def plain(call: Callable[[Tensor], Tensor], own: Tensor) -> Tensor:
        return call(own)

    for short, long in zip(run(applied, plain, in_dim), run(by_torch, plain, in_dim), strict=True):
        assert torch.equal(short, long)


def test_within_a_transform_of_the_networks_own_operations_go_torchs_way() -> None:
    def nested(call: Callable[[Tensor], Tensor], own: Tensor) -> Tensor:
        return torch.func.vmap(lambda _: call(own))(torch.zeros(2))

    for short, long in zip(run(applied, nested, 0), run(by_torch, nested, 0), strict=True):
        assert torch.equal(short, long)
