"""A model behind what its samples go through first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.plain import plain_copy, plain_form
from clipless_dp.model import DPLipModel


class Whole(nn.Module):
    """Front-end, statistics and model: takes samples as they are.

    Args:
        prepare: front-end and statistics, as they run.
        model: behind them.
        front: the same as a module; ``None``: there are none, or they are no module.
    """

    def __init__(self, prepare: Callable[[Tensor], Tensor], model: DPLipModel, front: nn.Module | None = None) -> None:
        super().__init__()
        self.prepare, self.model = prepare, model
        # No submodule: its buffers are no part of the state.
        self._front = (front,)

    @property
    def front(self) -> nn.Module | None:
        """What runs before the model, as a module."""
        return self._front[0]

    def forward(self, samples: Tensor) -> Tensor:
        """Scores of samples; the front-end runs on the CPU."""
        device, _ = self.model.device_and_dtype()
        scores: Tensor = self.model(self.prepare(samples.cpu()).to(device))
        return scores


@plain_form(DPLipModel)
def _of_model(model: DPLipModel) -> nn.Module:
    return model.export_net()


@plain_form(Whole)
def _of_whole(whole: Whole) -> nn.Module:
    model = whole.model.export_net()
    if whole.front is not None:
        return nn.Sequential(plain_copy(whole.front), model)
    made_up = whole.model.random_inputs(1, torch.Generator().manual_seed(0)).cpu()
    if whole.prepare(made_up) is not made_up:
        raise ConfigurationError("what runs before the model is no module, so that it cannot be exported")
    return model
