"""How much of what moved the weights was signal: from released weights and public numbers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipless_dp.optim import CliplessDPOptimizer


@dataclass
class _Added:
    """Variances, for each coordinate of a parameter, of what the noise of all steps has added.

    Attributes:
        velocity: of the momentum buffer.
        change: of the weight's change since the last reading.
        together: their covariance.
    """

    velocity: float = 0.0
    change: float = 0.0
    together: float = 0.0

    def step(self, noise: float, rate: float, momentum: float) -> None:
        """``v' = m·v + ξ`` and ``w' = w + r·v'``, ``ξ`` of variance ``noise``; signs do not matter."""
        self.velocity = momentum**2 * self.velocity + noise
        carried = momentum * self.together
        self.change += 2.0 * rate * carried + rate**2 * self.velocity
        self.together = carried + rate * self.velocity


class SignalToNoise:
    """For each layer, how far its weights went between two readings, over how far the noise alone takes them.

    The noise of a step has deviation ``σ_θ/B`` on each coordinate of the mean gradient, ``B`` the public expected batch
    size. SGD of rate ``r`` and momentum ``m`` makes of it a change of known variance, in which what the momentum
    buffer holds of earlier steps is counted. The ratio of a layer is ``‖Δw‖ / (Σ_θ d_θ·Var_θ)^½``, ``d_θ`` entries.
    Where it is 1 the weights walk at random; ``ρ`` says that the signal is about ``√(ρ² - 1)`` of the noise.
    Projections and weight decay shorten ``Δw``, so that below 1 a constraint or decay undoes what noise adds.

    The weights after every step are released, and deviations follow from bounds, ``σ`` and rates: reading it costs no
    privacy, and it may be shown and published.

    Args:
        optimizer: that trains, whose weights are whole here. Of other rules than SGD's without dampening and Nesterov's
            momentum, of a momentum above 1, and of weights that are split among processes, nothing is known.
    """

    def __init__(self, optimizer: CliplessDPOptimizer) -> None:
        self.optimizer = optimizer
        groups = optimizer.base_optimizer.param_groups
        self.known = (
            isinstance(optimizer.base_optimizer, torch.optim.SGD)
            and optimizer.model.placement.is_whole
            and not any(group["dampening"] or group["nesterov"] or group["momentum"] > 1.0 for group in groups)
        )
        self._added: dict[str, _Added] = {}
        self._before = self._weights() if self.known else {}

    def _weights(self) -> dict[str, Tensor]:
        named = self.optimizer.model.net.named_parameters()
        return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """Weights of the last reading, which were released, and what noise has added since: of a checkpoint."""
        added = {name: [one.velocity, one.change, one.together] for name, one in self._added.items()}
        return {"before": self._before, "added": added}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from a checkpoint; ``None``: from the weights as they are."""
        if state is None:
            self._added, self._before = {}, self._weights() if self.known else {}
            return
        self._added = {name: _Added(*numbers) for name, numbers in state["added"].items()}
        self._before = {name: value.clone() for name, value in state["before"].items()}

    def after_step(self) -> None:
        """Notes the noise of the step that was taken, before a schedule changes the rate that it was taken at."""
        if not self.known:
            return
        named = {id(parameter): name for name, parameter in self.optimizer.model.net.named_parameters()}
        for group in self.optimizer.base_optimizer.param_groups:
            for parameter in group["params"]:
                deviation = self.optimizer.step_noise.get(id(parameter))
                if deviation is not None:
                    self._note(named[id(parameter)], deviation**2, float(group["lr"]), group["momentum"])

    def _note(self, name: str, noise: float, rate: float, momentum: float) -> None:
        if name not in self._added:
            # What the buffer of a run that goes on holds, had all its steps had the noise of this one.
            kept, earlier = momentum**2, self.optimizer.steps_taken - 1
            # A buffer of momentum 1 forgets nothing.
            self._added[name] = _Added(noise * ((1.0 - kept**earlier) / (1.0 - kept) if kept < 1.0 else earlier))
        self._added[name].step(noise, rate, momentum)

    def read(self) -> Mapping[str, float] | None:
        """The ratio of each layer since the last reading, by its path in ``model.net``; ``None``: unknown."""
        if not self.known:
            return None
        now = self._weights()
        moved: dict[str, float] = {}
        added: dict[str, float] = {}
        for name, noise in self._added.items():
            layer = name.rpartition(".")[0]
            change = torch.linalg.vector_norm(now[name] - self._before[name], dtype=torch.float64)
            moved[layer] = moved.get(layer, 0.0) + float(change) ** 2
            added[layer] = added.get(layer, 0.0) + now[name].numel() * noise.change
            noise.change = noise.together = 0.0
        self._before = now
        return {layer: math.sqrt(moved[layer] / added[layer]) for layer in moved if added[layer] > 0.0}
