"""Sharpness-aware steps on noisy gradients that are there already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim import SGD, Adam, Optimizer

from clipless_dp.arguments import learning_rate, not_negative
from clipless_dp.errors import ConfigurationError


class _SharpnessAware(Optimizer):
    """What both classes below do around the step of torch's optimizer whose subclass they are."""

    def __init__(self, params: Any, lr: float = 1e-3, *, radius: float, **settings: Any) -> None:
        self._radius = not_negative("radius", radius)
        super().__init__(params, lr=learning_rate("lr", lr), **settings)  # type: ignore[call-arg]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with settings of their own.

        Raises:
            ConfigurationError: the radius is negative or not finite.
        """
        not_negative("radius", param_group.setdefault("radius", self._radius))
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of the weights without their shift, which are then shifted anew.

        Raises:
            ConfigurationError: a closure is given: passes come before the noise; or a radius is out of range.
        """
        if closure is not None:
            raise ConfigurationError(f"{type(self).__name__} steps on gradients that are there, without a closure")
        for group in self.param_groups:
            not_negative("radius", group["radius"])
        self._shift_(-1.0)
        super().step()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([torch.linalg.vector_norm(one) for one in gradients]).norm() if gradients else 0.0
        for group in self.param_groups:
            length = float(group["radius"]) * _progress(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # A gradient of zero shifts nothing.
                    self.state[parameter]["shift"] = torch.nan_to_num(parameter.grad * (length / norm), 0.0, 0.0, 0.0)
        self._shift_(1.0)
        return None

    def _shift_(self, sign: float) -> None:
        for state_of, parameter in ((self.state[p], p) for group in self.param_groups for p in group["params"]):
            if "shift" in state_of:
                parameter.add_(state_of["shift"], alpha=sign)


def _progress(group: dict[str, Any]) -> float:
    """The learning rate now in units of its peak, which a schedule notes in the group."""
    peak = float(group.get("initial_lr", 0.0))
    return float(group["lr"]) / peak if peak > 0.0 else 1.0


class SharpnessAwareSGD(_SharpnessAware, SGD):
    """Sharpness-aware minimisation by the last noisy gradient, around ``torch.optim.SGD``.

    With ``g_t`` the private gradient of step ``t``, at weights ``w_t``:

        ``v_{t+1} = SGD(v_t, g_t)``, ``w_{t+1} = v_{t+1} + ρ_t·g_t/‖g_t‖``.

    The next pass thus runs where the loss is larger (Foret et al. 2021, *Sharpness-aware minimization*, equation 2),
    along a gradient that was paid for: a fresh one would be a second release. The weights between steps are the
    shifted ones, so that bounds, certificates and constraints are of these, as with any optimizer, and privacy is what
    it was. ``ρ_t`` falls with the learning rate, ``ρ·lr_t/lr_0`` under a schedule, which should end near 0, as that of
    ``fit`` does: the shift of the last step stays.

    A base optimizer of :class:`clipless_dp.CliplessDPOptimizer`: ``fit(..., optimizer=lambda p:
    SharpnessAwareSGD(p, lr=0.1, radius=0.05))``.

    Args:
        params: parameters, or groups of them, which may have a ``radius`` of their own.
        lr: learning rate ``≥ 0``.
        radius: ``ρ ≥ 0``, the Euclidean norm of the shift of all weights together; of 0 it is torch's optimizer.
        settings: of torch's.

    Raises:
        ConfigurationError: the radius, or the rate, is negative or not finite.
    """


class SharpnessAwareAdam(_SharpnessAware, Adam):
    """As :class:`SharpnessAwareSGD`, around ``torch.optim.Adam``."""
