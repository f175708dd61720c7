"""Parameters that share memory are refused by name; one in several places, and views that do not meet, are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, constraints, losses
from clipless_dp.model import watch
from clipless_dp.model.overlaps import refuse_overlaps


def two_layers(first: Tensor, second: Tensor) -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
    )
    net[0].weight, net[2].weight = nn.Parameter(first), nn.Parameter(second)
    return net


def wrapped(net: nn.Module) -> DPLipModel:
    return DPLipModel(
        net, input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy(), constraint=constraints.Spectral()
    )


MATRIX = torch.arange(64.0).reshape(8, 8) / 64.0
SHARED = {
    "the same": lambda w: (w[:4, :4], w[:4, :4]),
    "transposed": lambda w: (w[:4, :4], w[:4, :4].t()),
    "one row in common": lambda w: (w[:4, :4], w[3:7, :4]),
    "one entry in common": lambda w: (w[:4, :4], w[3:7, 3:7]),
    "one entry in common, with gaps": lambda w: (w[::2, ::2], w[:4, 4:]),
    "numpy's memory": lambda w: (torch.from_numpy(w.numpy()[:4, :4]), torch.from_numpy(w.numpy()[:4, :4])),
}
APART = {
    "halves of one storage": lambda w: (w[:2].view(4, 4), w[2:4].view(4, 4)),
    "columns of one matrix": lambda w: (w[:4, :4], w[:4, 4:]),
    "every second column": lambda w: (w[:4, ::2], w[:4, 1::2]),
    "memory of their own": lambda w: (w[:4, :4], w[:4, :4].clone()),
}


@pytest.mark.parametrize("name", SHARED)
def test_parameters_that_share_memory_are_refused_and_both_are_named(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"'0\.weight' and '2\.weight' share memory"):
        wrapped(two_layers(*SHARED[name](MATRIX.clone())))


@pytest.mark.parametrize("name", APART)
def test_parameters_that_only_lie_in_one_storage_are_accepted(name: str) -> None:
    wrapped(two_layers(*APART[name](MATRIX.clone())))


def test_a_tied_parameter_is_accepted_and_its_uses_are_counted() -> None:
    net = two_layers(MATRIX[:4, :4].clone(), MATRIX[:4, :4].clone())
    net[2].weight = net[0].weight
    assert list(wrapped(net).sensitivity().per_parameter) == ["0.weight", "3.weight"]


@pytest.mark.parametrize(
    "weight", [torch.ones(1, 4).expand(4, 4), torch.ones(1).expand(4, 4), torch.ones(16).as_strided((4, 4), (2, 1))]
)
def test_a_parameter_whose_entries_share_memory_is_refused(weight: Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"entries of the parameter '2\.weight' share memory"):
        wrapped(two_layers(torch.eye(4), weight))


def test_a_buffer_in_a_parameters_memory_is_refused_and_one_in_anothers_is_not() -> None:
    net = two_layers(torch.eye(4), torch.eye(4))
    net.register_buffer("mask", torch.ones(1).expand(3, 3))
    net.register_buffer("other", net.mask)
    refuse_overlaps(net)
    net.register_buffer("teacher", net[0].weight.detach()[1])
    with pytest.raises(ConfigurationError, match=r"'0\.weight' and 'teacher' share memory"):
        refuse_overlaps(net)


def test_numbers_of_other_sizes_in_one_memory_are_compared_byte_by_byte() -> None:
    raw = np.zeros(64, dtype=np.uint8)
    net = nn.Module()
    net.weight = nn.Parameter(torch.from_numpy(raw[:32]).view(torch.float64))
    net.register_buffer("apart", torch.from_numpy(raw[32:]).view(torch.float32))
    refuse_overlaps(net)
    net.register_buffer("meets", torch.from_numpy(raw[31:33]))
    with pytest.raises(ConfigurationError, match="'meets' and 'weight'"):
        refuse_overlaps(net)


def test_memory_that_is_shared_after_wrapping_is_noticed_before_a_bound_is_stated() -> None:
    net = two_layers(torch.eye(4), torch.eye(4))
    model = wrapped(net)
    model.sensitivity()
    net[2].weight.data = net[0].weight.data.t()
    with pytest.raises(ConfigurationError, match=r"'0\.weight' and '2\.weight'"):
        model.sensitivity()


def test_each_weight_is_stamped_before_the_next_is_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were overlaps not refused: a row that the second projection writes to the first weight would show."""
    monkeypatch.setattr(watch, "refuse_overlaps", lambda net: None)
    weight = 3.0 * torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = two_layers(weight[:4, :4], weight[3:7, :4])
    net = net.double()
    model = wrapped(net)
    net[2].weight.data.mul_(5.0)
    model.project_()
    true = float(torch.linalg.matrix_norm(net[0].weight.detach(), 2))
    assert set(model._weights.limits(model.placement)[0]) == {"2.weight", "3.weight"}
    assert true < 1.0
