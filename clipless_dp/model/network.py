"""The network of a wrapped model behind its input gate, as it runs: fused, or at numbers of rows that are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.fusion import Entry, FusedNet
from clipless_dp.gates import input_gate, presence_gate, sample_norms, table_gate, token_gate
from clipless_dp.gates.arithmetic import can_look, largest_norm
from clipless_dp.graph.layouts import NOT_COMPILED, FreshLayouts
from clipless_dp.graph.tracing import TracedNet
from clipless_dp.isolation import Isolated
from clipless_dp.model import passes
from clipless_dp.model.row_invariance import RowInvariance, Twin, Values, copied
from clipless_dp.model.valid_inputs import random_rows
from clipless_dp.modules import modules_of, parameter_device_and_dtype
from clipless_dp.packing import Packing


class Network:
    """A traced network with an input gate.

    Args:
        net: the network.
        traced: the graph of it.
        cap: of a sample's norm; infinite where it may have any.
        row_invariant: see :class:`clipless_dp.DPLipModel`.
        resting: a context in which the network holds its own parameters.
        packing: how several inputs lie in a row.

    Attributes:
        fused: the graph as it is fused for a CPU.
        rows: chooses numbers of rows.
    """

    def __init__(
        self,
        net: nn.Module,
        traced: TracedNet,
        cap: float,
        row_invariant: bool | None,
        resting: Callable[[], AbstractContextManager[None]],
        packing: Packing | None = None,
    ) -> None:
        self._net, self._traced, self._cap, self._resting = net, traced, cap, resting
        # Of several models in one graph's cache compilers make one symbol, of which they cannot ask this.
        self._has_cap = math.isfinite(cap)
        self._packing = packing
        # Where samples are, so that no pass copies it there.
        self._limits = torch.tensor(traced.limits, dtype=torch.int64, device=parameter_device_and_dtype(net)[0])
        self._row_invariant = row_invariant
        self.fused = FusedNet(traced)
        # A gate that normalises lifts the rounding of what cancels by the inverse of its floor: it asks for both ways.
        parts = modules_of(net)
        lifts = any(isinstance(part, Isolated) or getattr(part, "mode", None) == "normalize" for part in parts)
        self.rows = RowInvariance(backward=row_invariant is True or lifts)

    def chooses_rows(self, device: torch.device) -> bool:
        """Whether passes on this device may run at other numbers of rows than those that they are given."""
        return device.type == "cpu" if self._row_invariant is None else self._row_invariant

    def run(self, inputs: Tensor, *, training: bool) -> Values:
        """The values of all rows, at numbers of rows that are chosen; all at once where nothing is trained."""
        # Fused gates leave out rows that they shrink by more than 1e27, for the gradients' sake: float32 has none.
        predicts = not training and not torch.is_grad_enabled() and inputs.dtype == torch.float64
        fused = FusedNet.can_run(inputs) and not predicts
        net = self.fused.module if fused else self._traced.module
        # Without gradients too, while training: a checkpointed pass is computed so first.
        enabled = (torch.is_grad_enabled() or training) and passes.chooses_rows() and not torch.compiler.is_compiling()
        if not (enabled and self.chooses_rows(inputs.device)):
            return self.values(net, fused, inputs)
        return self.rows.run(partial(self.values, net, fused), inputs, lambda: self._twin(net, fused, inputs))

    def values(self, net: Callable[..., Tensor], fused: bool, inputs: Tensor) -> Values:
        """Input gate and network, in the form that is given."""
        if self._traced.reads_beyond:
            if torch.compiler.is_compiling():
                raise ConfigurationError(NOT_COMPILED)
            with FreshLayouts():
                return self._values(net, fused, inputs)
        return self._values(net, fused, inputs)

    def _values(self, net: Callable[..., Tensor], fused: bool, inputs: Tensor) -> Values:
        if fused and self.fused.takes_entry and self._has_cap and not inputs.requires_grad:
            norms = sample_norms(inputs)
            finite = norms <= largest_norm(self._cap, norms.dtype)
            whole = bool(finite.all())
            return Values(net(inputs, Entry(norms, self._cap, whole)), finite, whole)
        if self._traced.vocabulary is not None:
            gated, finite = token_gate(inputs, self._traced.vocabulary)
        elif self._has_cap:
            gated, finite = input_gate(inputs, self._cap)
        elif self._traced.limits:
            gated, finite = table_gate(inputs, self._limits)
        else:
            gated, finite = presence_gate(inputs)
        return Values(net(gated), finite, can_look(finite) and bool(finite.all()))

    def _twin(self, net: nn.Module, fused: bool, inputs: Tensor) -> Twin:
        """A copy of the network with random weights, which shows how the library computes."""
        with self._resting():
            own, run = copied(self._net, net)

        def samples(count: int, generator: torch.Generator) -> Tensor:
            drawn = random_rows(self._traced, self._packing, tuple(inputs.shape[1:]), count, generator)
            return drawn.to(inputs.dtype)

        return Twin(partial(self.values, run, fused), own, samples, inputs.device)
