"""Forward pass and loss as one graph that ``torch.compile`` makes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType

import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError
from clipless_dp.gates import adapting_in
from clipless_dp.graph.layouts import NOT_COMPILED
from clipless_dp.model.wrapped import DPLipModel

BatchLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def compiled_loss(model: DPLipModel, backend: str = "inductor") -> BatchLoss:
    """``model.loss(model(inputs), targets, mask)`` as one graph, gates included, which ``backward()`` follows.

    It is compiled at the first call, once for batches of all sizes: the number of rows stays free. A layer's settings
    that change later compile it anew.

    Args:
        model: the wrapped model.
        backend: of ``torch.compile``; the default generates C++ or Triton, and needs their compiler.

    Returns:
        A function of inputs, targets and mask. It raises ConfigurationError for a loss that cannot be mapped over rows,
        see :meth:`clipless_dp.model.rowwise.RowLosses.rehearse`.

    Raises:
        ConfigurationError: caps of the model adapt: these are counted in eager passes; or it runs sample by sample,
            or has a convolution that layouts in memory matter to.
    """
    if model.graph.isolated:
        raise ConfigurationError(
            "a network that runs sample by sample is not compiled, as its operations would run unseen: train without "
            "compile, or wrap it with isolation='graph', where its parts have rules"
        )
    if model.graph.reads_beyond:
        raise ConfigurationError(NOT_COMPILED)
    if adapting_in(model.net):
        raise ConfigurationError("caps that adapt are counted in eager passes: train without compile")

    def loss(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return model.loss(model(inputs), targets, mask)

    # Compiled variants are counted, and limited, per code object, which all models would otherwise share.
    own = FunctionType(loss.__code__.replace(), loss.__globals__, closure=loss.__closure__)
    compiled: BatchLoss = torch.compile(own, fullgraph=True, backend=backend)

    def with_free_rows(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        outputs = inputs.new_zeros(len(inputs), *model.output_shape, dtype=model.device_and_dtype()[1])
        model.row_losses.rehearse(model.loss_function, outputs, targets, mask, bound=model.cotangent_norm)
        for part in (inputs, targets, mask):
            torch._dynamo.maybe_mark_dynamic(part, 0)
        # A compiled graph draws from torch's own generator for layers that are not known.
        with model.randomness.visit(inputs.device) if model.may_draw else nullcontext():
            return compiled(inputs, targets, mask)

    return with_free_rows
