"""What ``model.loss`` sends back into a network, told apart from what other terms of a loop send beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from clipless_dp.errors import PrivacyError

_ROUNDING = 1e-5
"""Of the largest number: sums of several terms in another order differ by some 1e-6 in float32."""


class Own:
    """What came from the sums of one model to the output of one pass, by backward pass."""

    def __init__(self) -> None:
        self._sent: dict[int, Tensor] = {}

    def note(self, cotangent: Tensor) -> None:
        """A sum has sent this, in the backward pass under way."""
        task = torch._C._current_graph_task_id()
        before = self._sent.get(task)
        # Of a backward pass that did not get here nothing is kept.
        self._sent = {task: cotangent if before is None else before + cotangent}

    def part_of(self, cotangent: Tensor) -> tuple[Tensor, bool]:
        """What sums have sent, of all that arrives, and whether there is more; accelerators are not asked."""
        sent = self._sent.pop(torch._C._current_graph_task_id(), None)
        if sent is None:
            return cotangent, True
        if not cotangent.is_cpu:
            return sent, False
        largest = float(cotangent.detach().abs().nan_to_num(0.0).max()) if cotangent.numel() else 0.0
        same = torch.allclose(cotangent, sent, rtol=_ROUNDING, atol=_ROUNDING * largest, equal_nan=True)
        # What is within rounding is left out too: a small term of all rows is a term of all rows.
        return sent, not same


def own_output(output: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """A copy of a loss's input, which tells the passes that it comes from what the loss sends back to them.

    Args:
        output: what a loss is computed of, by a loop from what the network returned.
        parameters: of the network.

    Raises:
        PrivacyError: another leaf, a temperature of the loop's own, say, has a part in it.
    """
    if not output.requires_grad:
        return output
    passes = _ways(output, set(map(id, parameters)))
    if not passes:
        return output
    edge = GradientEdge(output.grad_fn, output.output_nr)  # type: ignore[arg-type]
    ends = [GradientEdge(node, 0) for node in passes]

    def send(cotangent: Tensor) -> None:
        # Ahead of what is between the loss and the network, which goes through its graph once more behind this.
        found = torch.autograd.grad([edge], ends, [cotangent.detach()], retain_graph=True, allow_unused=True)
        for node, part in zip(passes, found, strict=True):
            if part is not None:
                node.own.note(part)

    copy = output.clone()
    copy.register_hook(send)
    return copy


def _ways(output: Tensor, known: set[int]) -> list[Any]:
    """The gates of passes that an output comes from."""
    found, seen, left = [], set(), [output.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "own", None), Own):
            found.append(node)
            continue
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise PrivacyError(
                "what model.loss is given hangs on a tensor that requires gradients and is not of the network, a "
                "temperature beside it, say: its gradient is a sum over samples that no noise is added to. Make it a "
                "parameter of the network, or detach it. Nothing was released"
            )
        left += [below for below, _ in node.next_functions]
    return found
