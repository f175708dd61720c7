"""Each sample's gradient of its own loss with respect to itself, which adversarial views are made by."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError
from clipless_dp.model import passes
from clipless_dp.model.wrapped import DPLipModel
from clipless_dp.modules import kept_modes
from clipless_dp.sampling.adversarial import Beside


def beside(model: DPLipModel, targets: Tensor) -> Beside:
    """What labelled views of a batch are made by.

    Args:
        model: at the weights that earlier steps have released.
        targets: of the rows.
    """
    return Beside(targets, partial(loss_slopes, model))


def loss_slopes(model: DPLipModel, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """The gradient of each row's loss with respect to that row, through all gates of signals and cotangents.

    Rows of the model, and of its loss, do not meet, so that the gradient of the sum has in each row that of the row's
    own loss. It is that of the model in ``eval`` mode, without dropout. It adds to no parameter's gradient, opens no
    pass that a step would count, and leaves mode and count of dropped samples as they were. A model with
    ``row_invariant`` runs it at such numbers of rows, too.

    Args:
        model: the model.
        inputs: ``(rows, *input_shape)``.
        targets: ``(rows, ...)``.
        mask: boolean ``(rows,)``; rows of padding have slopes of no account.

    Returns:
        Of the inputs' shape; NaN or zero in rows that the model drops.

    Raises:
        ConfigurationError: the inputs are tokens, or several, or each rank holds a part of the weights; or the inputs
            are not all rows.
    """
    if not model.graph.reads.is_floating_point or model.vocabulary is not None or model.packing is not None:
        raise ConfigurationError(
            "the model reads tokens or several inputs, along which there are no slopes: adversarial views are of one "
            "floating-point input"
        )
    if not model.placement.is_whole:
        raise ConfigurationError(
            "adversarial views pass a model that each process holds whole: ranks that hold parts of it would wait for "
            "each other, as not all have as many rows"
        )
    if len(inputs) != len(targets):
        raise ConfigurationError(f"slopes are of all {len(targets)} rows at once, in their order, got {len(inputs)}")
    counted = model.nonfinite_samples.clone()
    try:
        with torch.enable_grad(), passes.viewing(), kept_modes(model):
            model.eval()
            values = inputs.detach().requires_grad_()
            total = model.loss(model(values), targets, mask)
            (found,) = torch.autograd.grad(total, values)
    finally:
        model.nonfinite_samples.copy_(counted)
    return found
