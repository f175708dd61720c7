"""A wrapped model as a plain module, for ``torch.export``, ONNX and ``torch.jit.trace``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipless_dp.errors import ConfigurationError
from clipless_dp.gates import token_gate
from clipless_dp.gates.arithmetic import per_sample
from clipless_dp.gates.plain import InputBall, plain_copy, plain_form
from clipless_dp.graph.tracing import TracedNet
from clipless_dp.isolation import Isolated

ROWS = 8
"""Made-up rows on which the plain form is compared."""


class ExportedNet(nn.Module):
    """What a wrapped model predicts, by ordinary operations: input gate, network, and NaN for rows that are dropped.

    Args:
        gate: makes of inputs ``(B, ...)`` what the network reads, and ``(B,)`` which rows are not dropped.
        net: the network, without gates on gradients.

    Shape:
        ``(B, *input_shape)`` to ``(B, *output_shape)``.
    """

    def __init__(self, gate: nn.Module, net: nn.Module) -> None:
        super().__init__()
        self.gate, self.net = gate, net

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of samples."""
        values, known = self.gate(inputs)
        outputs: Tensor = self.net(values)
        return torch.where(per_sample(known, outputs), outputs, torch.full_like(outputs, math.nan))


class _Tokens(nn.Module):
    """The input gate of tokens."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return token_gate(tokens, self.vocabulary)


class _Batched(nn.Module):
    """The network of an isolated one, on all rows at once, and the output that is the model's."""

    def __init__(self, net: nn.Module, select: Any) -> None:
        super().__init__()
        self.net, self.select = net, select

    def forward(self, inputs: Tensor) -> Tensor:
        returned = self.net(inputs)
        if callable(self.select):
            returned = self.select(returned)
        elif isinstance(self.select, str):
            returned = returned[self.select] if isinstance(returned, dict) else getattr(returned, self.select)
        elif self.select is not None:
            returned = returned[self.select]
        elif not isinstance(returned, Tensor):
            returned = returned["logits"] if isinstance(returned, dict) else returned.logits
        found: Tensor = returned
        return found


@plain_form(Isolated)
def _of_isolated(part: Isolated) -> nn.Module:
    return _Batched(plain_copy(part.net), part.select)


def export_net(traced: TracedNet, input_norm: float, inputs: Tensor, run: Callable[[Tensor], Tensor]) -> ExportedNet:
    """The plain form of a model.

    Args:
        traced: the graph that it runs.
        input_norm: of its input gate.
        inputs: made-up samples ``(B, *input_shape)``, on which both are compared.
        run: the model itself, in ``eval`` mode, which leaves nothing behind.

    Raises:
        ConfigurationError: they compute something else, or what the model reads has no plain gate.
    """
    if traced.limits and traced.vocabulary is None:
        raise ConfigurationError(
            "the model reads samples whose entries belong to several tables or inputs: there is no plain form of its "
            "input gate. Export model.net, and check tokens before"
        )
    gate: nn.Module = InputBall(input_norm) if traced.vocabulary is None else _Tokens(traced.vocabulary)
    try:
        net = plain_copy(traced.copied())
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(f"the network cannot be copied: {error}") from error
    for part in net.modules():
        for name in list(getattr(part, "parametrizations", ())):
            parametrize.remove_parametrizations(part, name)
    made = ExportedNet(gate, net.requires_grad_(False)).eval()
    _require_same(run, made, inputs)
    return made


@torch.no_grad()
def _require_same(run: Callable[[Tensor], Tensor], made: ExportedNet, inputs: Tensor) -> None:
    if inputs.is_floating_point():
        # On both sides of every gate, and a row that is dropped.
        inputs = inputs * per_sample(torch.logspace(-2.0, 2.0, len(inputs)).to(inputs), inputs)
        inputs[-1] = math.nan
    expected = run(inputs)
    try:
        found = made(inputs)
    except Exception as error:
        raise ConfigurationError(f"the network does not run on all rows at once: {error}") from error
    share = math.sqrt(torch.finfo(expected.dtype).eps)
    allowed = share * float(expected.abs().nan_to_num(0.0, 0.0, 0.0).max())
    if found.shape != expected.shape or not torch.allclose(found, expected, share, allowed, equal_nan=True):
        raise ConfigurationError(
            "the network computes something else by ordinary operations than as it is wrapped: a part of it depends on "
            "its company, on chance, or is a subclass of a gate with a forward of its own"
        )
