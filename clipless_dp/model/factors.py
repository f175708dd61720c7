"""The factor that a loop multiplies the summed loss by must be public: a constant.

A scalar function of the sum (``(loss - b).abs()``, ``loss / len(batch)``, ``loss * (loss < t)``) has the samples' whole
gradients multiplied by a number that every sample has a part in. What it is shows on the way back, as the number that
arrives at the sum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.gates.arithmetic import can_look
from clipless_dp.model import nodes
from clipless_dp.model.passes import is_private

if TYPE_CHECKING:
    from clipless_dp.model.register import Register


class Factors:
    """What the sums of one model were multiplied by, each at its place among those of one pass.

    Attributes:
        weight: what the library multiplies each sum by.
        required: whether gradients must come from such a sum: a loss of a loop's own may average over the rows drawn.
    """

    required = False

    def __init__(self) -> None:
        self.weight = 1.0
        self._hooks, self._settled = nodes.count(), True
        self._known: dict[int, float] = {}
        self._count = 0
        self._pass = 0
        self._first: int | None = None
        self._task = -1

    def set_weight(self, weight: float) -> None:
        """Multiplies the sums from now on.

        Raises:
            ConfigurationError: it is not a positive finite number.
        """
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0.0 < weight < math.inf:
            raise ConfigurationError(f"loss_weight must be a positive finite number, got {weight!r}")
        self.weight = float(weight)

    def forget(self) -> None:
        """What comes next may have other factors."""
        self._known, self._first = {}, None

    def begin(self) -> None:
        """A pass begins; sums are counted from here."""
        if self._settled:
            self._hooks, self._settled = nodes.count(), False
        self._count = 0
        self._pass += 1

    def watched(self, total: Tensor, register: Register) -> Tensor:
        """The sum times :attr:`weight`, whose backward pass says by what a loop has multiplied it."""
        if self.required and total.requires_grad and not torch.compiler.is_compiling():
            nodes.put(total.register_hook, self._arrive)
        # On an accelerator reading the factor would wait for it; a compiled graph is not interrupted.
        if torch.compiler.is_compiling() or not (total.is_cpu and total.requires_grad and is_private()):
            return total if self.weight == 1.0 else total * self.weight
        place, number = self._count, self._pass
        self._count += 1

        def look(cotangent: Tensor) -> None:
            if not _fills(register.parameters):
                return
            try:
                self.meet(float(cotangent), place, number)
                if nodes.count() != self._hooks:
                    nodes.refuse_hooked(nodes.current(), to_gates=True)
            except PrivacyError:
                register.drop()
                raise

        watched = total if self.weight == 1.0 else total * self.weight
        # A hook, since an operation written in Python takes ten times as long.
        nodes.put(watched.register_hook, look)
        # Of a copy, whose hooks run ahead of the look.
        return watched.clone()

    def _arrive(self, cotangent: Tensor) -> None:
        self._task = torch._C._current_graph_task_id()

    def refuse_other_losses(self, other: bool) -> None:
        """Called where a backward pass enters the network.

        Args:
            other: whether something enters that no sum has sent.

        Raises:
            PrivacyError: sums are required, and this pass has not come through one, or not all of it.
        """
        if self.required and other and self._task == torch._C._current_graph_task_id():
            raise PrivacyError(
                "some of the gradients come from a term beside model.loss, which may join samples (pairs of rows, a "
                "mean over the batch): one more would change what all others contribute. Let all that is trained on be "
                "a sum over rows in the loss that the model was given. The gradients are dropped; nothing was released"
            )
        if self.required and self._task != torch._C._current_graph_task_id():
            raise PrivacyError(
                "the gradients come from a loss other than model.loss: a mean over the batch, say, divides by how many "
                "rows were drawn, so that one sample more changes what all others contribute. Call "
                "model.loss(model(inputs), targets).backward(). The gradients are dropped; nothing was released"
            )

    def meet(self, factor: float, place: int, number: int) -> None:
        """Compares a factor with those before it.

        Raises:
            PrivacyError: it is another one, or not positive and finite.
        """
        self._count, self._settled = 0, True
        if not 0.0 < factor < math.inf:
            raise _refusal(f"the summed loss was multiplied by {factor:g}", "a positive number")
        known = self._known.get(place)
        if known is None:
            # Terms of one loss may have weights of their own; they are known from the first pass.
            if self._first in (None, number) or factor in self._known.values():
                self._first = number if self._first is None else self._first
                self._known[place] = factor
                return
            known = self._known[min(self._known)]
        if factor != known:
            raise _refusal(f"the summed loss was multiplied by {factor:g}, by {known:g} before", "the same number")


def summed(losses: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The sum over rows that count and whose loss is finite; and which others a mask does not leave out.

    The latter is ``None`` where a look at the sum has told that there are none.
    """
    if can_look(losses):
        # The product lets the same arrive at the losses as below: one number each, not one that all share.
        total = (losses * 1.0 if mask is None else losses.masked_fill(~mask, 0.0)).sum()
        if math.isfinite(total.detach()):
            return total, None
    finite = torch.isfinite(losses)
    counted = finite if mask is None else finite & mask
    dropped = ~finite if mask is None else mask & ~finite
    return torch.where(counted, losses, torch.zeros_like(losses)).sum(), dropped


def _refusal(found: str, wanted: str) -> PrivacyError:
    return PrivacyError(
        f"{found}: a factor that follows from the batch (its size, its loss: flooding, a threshold, a ratio of losses) "
        f"puts one sample into the gradients of all others, which no bound covers. Multiply by {wanted} in every pass; "
        "the optimizer divides by the expected batch size itself, and a schedule belongs to the learning rate, or, if "
        "it is public, to model.loss_weight. The gradients are dropped; nothing was released"
    )


def _fills(parameters: list[torch.nn.Parameter]) -> bool:
    """Whether this backward pass adds to the gradient of a parameter; ``autograd.grad`` does not."""
    for parameter in parameters:
        if parameter.requires_grad:
            try:
                if torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node):
                    return True
            except RuntimeError:
                continue
    return False
