"""Averages of the weights over the steps: post-processing of what was released, free of privacy cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clipless_dp.arguments import share
from clipless_dp.errors import ConfigurationError
from clipless_dp.model import lineage
from clipless_dp.model.wrapped import DPLipModel, require_wrapped


class WeightAverage:
    """Exponential moving average of a model's weights, without bias towards the first ones.

    ``a_t = Σ_i β^(t-i)·w_i / Σ_i β^(t-i)`` over the steps ``i ≤ t`` (Polyak and Juditsky 1992; for private training
    De et al. 2022, §3). In use, the average is projected on the model's constraints: averages of orthogonal matrices
    are not orthogonal. It reads nothing but weights that the steps have released.

    Args:
        model: the wrapped model.
        decay: ``β`` in [0, 1); about ``1/(1-β)`` steps enter.

    Raises:
        ConfigurationError: the decay is out of range.

    Attributes:
        updates: how many weights have entered.
    """

    def __init__(self, model: DPLipModel, decay: float) -> None:
        self.decay = share("the decay of an average", decay, "[0, 1)")
        self.model = require_wrapped(model)
        self.updates = 0
        self._average: dict[str, Tensor] = {}
        self._counted = True
        self._runs: dict[str, int] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of a version that did not note the runs it is of unknown origin.
        counted = state["_counted"] if "_runs" in state else not state["updates"]
        self.__dict__.update({"_runs": {}, **state, "_counted": counted})

    @torch.no_grad()
    def update(self) -> None:
        """Lets the current weights enter: once after each step."""
        self.updates += 1
        self.model.placement.reshard_()
        # The share of the newest weights in a_t; the first ones have all of it.
        share = (1.0 - self.decay) / (1.0 - self.decay**self.updates)
        named = dict(self.model.net.named_parameters())
        known = lineage.of(self.model)
        # Of weights that no optimizer has seen nobody knows where they come from.
        self._counted = self._counted and known.started and known.unchanged(named, quick=True, buffers=False)
        self._enter(known.runs)
        for name, parameter in named.items():
            average = self._average.get(name)
            if average is None:
                self._average[name] = parameter.detach().clone()
            else:
                average.lerp_(parameter.detach().to(average.device), share)

    def _enter(self, runs: Mapping[str, int]) -> None:
        """Notes how many steps of which runs the average comes from."""
        for run, count in runs.items():
            self._runs[run] = max(count, self._runs.get(run, 0))

    @torch.no_grad()
    def apply_(self) -> dict[str, Tensor]:
        """Puts the projected average into the model; before the first update nothing.

        Returns:
            The weights that it replaces, by name, for ``model.net.load_state_dict(weights, strict=False)``.
        """
        self.model.placement.reshard_()
        named = dict(self.model.net.named_parameters())
        replaced = {name: parameter.detach().clone() for name, parameter in named.items()}
        # An average of weights that steps left is as well counted as they are.
        counted = self._counted and lineage.of(self.model).unchanged(named, buffers=False)
        for name, average in self._average.items():
            named[name].copy_(average)
        if self._average:
            self.model.project_()
            frozen = any(not one.requires_grad and not torch.equal(one, replaced[name]) for name, one in named.items())
            lineage.of(self.model).add_runs(self._runs, frozen=frozen)
            if counted:
                lineage.of(self.model).follow(named)
        return replaced

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the projected average within, and its own weights again, bit by bit, behind."""
        self.model.placement.reshard_()
        named = dict(self.model.net.named_parameters())
        counted = lineage.of(self.model).unchanged(named, buffers=False)
        replaced = self.apply_()
        try:
            yield
        finally:
            self.model.placement.reshard_()
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(replaced[name])
            self.model.settle_()
            if counted:
                lineage.of(self.model).follow(named)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors: the average as it is before any projection, and of which runs it is.

        ``"runs"`` tells how many steps of each run have entered, ``"counted"`` whether nothing else has.
        """
        return {
            "decay": self.decay,
            "updates": self.updates,
            "average": dict(self._average),
            "counted": self._counted,
            "runs": dict(self._runs),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned; a state that does not tell its runs is of unknown origin.

        Raises:
            ConfigurationError: it is of another network or of another decay, or incomplete.
        """
        named = dict(self.model.net.named_parameters())
        average, updates, runs = state.get("average"), state.get("updates"), state.get("runs", {})
        if not (
            isinstance(average, dict)
            and isinstance(updates, int)
            and updates >= 0
            and average.keys() == (named.keys() if updates else set())
            and isinstance(runs, dict)
            and all(isinstance(run, str) and isinstance(count, int) for run, count in runs.items())
            and all(isinstance(value, Tensor) and value.shape == named[key].shape for key, value in average.items())
        ):
            raise ConfigurationError("this is not the state of an average of this network's weights")
        if not math.isclose(state.get("decay", math.nan), self.decay, rel_tol=0.0):
            raise ConfigurationError(f"this average has the decay {state.get('decay')!r}, not {self.decay!r}")
        self.updates = updates
        # States of before this was kept do not tell which weights have entered.
        self._counted = bool(state.get("counted", True)) and (not updates or "runs" in state)
        self._runs = dict(runs)
        self._average = {name: value.detach().to(named[name], copy=True) for name, value in average.items()}
