"""Whatever looks at a model's outputs leaves each of its parts in the mode that it was in, frozen ones too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from clipless_dp import DPLipModel, fit, gated, gradient_gated, losses
from clipless_dp.training import evaluate
from tests.support import samples

LOOKS: dict[str, Callable[[DPLipModel, Any], Any]] = {
    "evaluate": lambda model, data: evaluate(model, data),
    "export": lambda model, data: model.export_net(),
    "predict": lambda model, data: trained(model, data).predictor().scores(data[0]),
}
NETWORKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda net: net,
    "signal gates": gated,
    "gradient gates": gradient_gated,
    "of which nothing is known": lambda net: gradient_gated(nn.Sequential(net, nn.LayerNorm(3))),
}


def trained(model: DPLipModel, data: Any) -> Any:
    frozen = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    result = fit(model, data, epsilon=3.0, delta=1e-3, epochs=1, batch_size=50, progress=False, audit=False)
    for part in frozen:
        part.eval()
    return result


def dropouts(model: DPLipModel) -> list[bool]:
    return [part.training for part in model.modules() if isinstance(part, nn.Dropout)]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("look", LOOKS)
def test_a_part_that_was_frozen_by_eval_stays_so(look: str, network: str) -> None:
    if (look, network) == ("export", "of which nothing is known"):
        pytest.skip("there are no ordinary operations of it to export")
    torch.manual_seed(0)
    data = samples(100)
    net = nn.Sequential(nn.Linear(data[0].shape[1], 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    model = DPLipModel(
        NETWORKS[network](net), input_shape=tuple(data[0].shape[1:]), input_norm=1.0, loss=losses.TauCrossEntropy()
    )
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
    assert dropouts(model) == [False]
    LOOKS[look](model, data)
    assert not any(dropouts(model))
    assert model.training
