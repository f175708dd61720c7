"""Small models and data that several test files share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, gated, losses


def gated_model(*, bias: bool = True, seed: int = 0) -> DPLipModel:
    """Two gated linear layers, 6 inputs and 3 classes: constant sensitivity."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3, bias=bias))
    return DPLipModel(gated(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian inputs with labels that a linear classifier can learn."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, inputs[:, :3].argmax(1)
