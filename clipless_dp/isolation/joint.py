"""One cap for each sample's gradients of all parameters: gates keep what comes back, and the last one sums it.

A sample's factor needs the norms of all its gradients, which are known only when a backward pass has come through all
gates. Until then each gate keeps its inputs and the cotangents that arrived (Bu et al. 2023, *Differentially Private
Optimization on Large Model at Small Cost*, book-keeping): one backward pass, and the sums are ordinary products.
"""

# ruff: noqa: D102 (the methods are those of torch.autograd.Function)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipless_dp.gates.adaptive import count
from clipless_dp.gates.parts import Part, gated_together


class Together:
    """What has come back of one pass, until all of it has.

    Args:
        limit: the cap of the norm of each sample's whole gradient.
        least: the norm below which nothing is scaled further up.
    """

    def __init__(self, limit: float, least: float) -> None:
        self.limit, self.least = limit, least
        self._kept: list[tuple[str, Part]] = []
        self._task = -1

    def keep(self, name: str, part: Part) -> None:
        """Keeps the gradients of one use of a parameter."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            # What a backward pass has left that did not come to its end.
            self._kept, self._task = [], task
        self._kept.append((name, part))

    def sums(self, *, counted: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        """The gated sums by parameter, and the count, of all that this backward pass has kept."""
        kept, self._kept = self._kept, []
        if not kept or self._task != torch._C._current_graph_task_id():
            return {}, None
        names = [name for name, _ in kept]
        totals, norms, present = gated_together(
            [part for _, part in kept], self.limit, self.least, [names.count(name) for name in names]
        )
        found: dict[str, Tensor] = {}
        for name, total in zip(names, totals, strict=True):
            found[name] = found[name] + total if name in found else total
        return found, count(norms, present, self.limit) if counted else None


class Gathered(torch.autograd.Function):
    """Parameters as the gates of one pass see them; on the way back it is the last of all, and sums what they kept."""

    @staticmethod
    def forward(
        ctx: Any, together: Together, names: Sequence[str], counter: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.together, ctx.names = together, names
        ctx.set_materialize_grads(False)
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
        found, counts = ctx.together.sums(counted=ctx.needs_input_grad[2])
        return None, None, counts, *(found.get(name) for name in ctx.names)
