"""What the engine brings to parameters of a compiled pass, and whether that is what fills their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipless_dp.sampling import fingerprints
from clipless_dp.uncompiled import uncompiled

CHANGED = (
    "a hook on the node that fills a parameter's gradient (AccumulateGrad, register_prehook) has changed it: hooks may "
    "look, not change"
)


class Arriving:
    """Gradients as they came to parameters that had none, ahead of hooks on the nodes that are to fill them."""

    def __init__(self) -> None:
        self._came: dict[int, object] = {}

    def hooks(self, parameters: Iterable[Tensor], added: Callable[[Tensor], None], sharded: bool) -> list[Any]:
        """What notes the gradients that come to these, and calls ``added`` behind each; to be removed.

        Args:
            parameters: of which those that train are looked at.
            added: called with a parameter whose gradient was added to.
            sharded: whether gradients are summed on their way, so that nothing is noted.
        """
        self._came.clear()
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # What is added to others would have to be copied to be told.
        empty = [one for one in trained if one.grad is None and one.is_cpu and not sharded]
        return [one.register_post_accumulate_grad_hook(added) for one in trained] + [
            one.register_hook(partial(self._note, one)) for one in empty
        ]

    @uncompiled
    def _note(self, parameter: Tensor, gradient: Tensor | None) -> None:
        if gradient is None or gradient.layout != torch.strided:
            return
        if gradient.stride() != parameter.stride():
            # As it is going to lie in memory, which is what is sampled.
            gradient = torch.empty_like(parameter).copy_(gradient)
        self._came[id(parameter)] = fingerprints.of_all(gradient)

    def was_changed(self, parameter: Tensor) -> bool:
        """Whether the gradient of a parameter that had none is another one than came."""
        came, gradient = self._came.pop(id(parameter), None), parameter.grad
        if came is None or gradient is None or gradient.stride() != parameter.stride():
            return False
        return came != fingerprints.of_all(gradient)
