"""Sharpness-aware steps on noisy gradients that are there already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import SGD, Adam

from clipless_dp.arguments import learning_rate, not_negative
from clipless_dp.errors import ConfigurationError
from clipless_dp.optim.no_closure import NoClosure


class _SharpnessAware(NoClosure):
    """What both classes below do around the step of torch's optimizer whose subclass they are."""

    def __init__(self, params: Any, lr: float = 1e-3, *, radius: float, **settings: Any) -> None:
        self._radius = not_negative("radius", radius)
        super().__init__(params, lr=learning_rate("lr", lr), **settings)  # type: ignore[call-arg]
        # Among the defaults by now, which copies have.
        del self._radius

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with settings of their own.

        Raises:
            ConfigurationError: the radius is negative or not finite.
        """
        if "radius" not in self.defaults:
            self.defaults["radius"] = self._radius
        not_negative("radius", param_group.get("radius", self.defaults["radius"]))
        super().add_param_group(param_group)

    def _refuse(self, group: Mapping[str, Any]) -> None:
        not_negative("radius", group["radius"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state of this class.

        Raises:
            ConfigurationError: it is that of another optimizer.
        """
        if any(self.defaults.keys() - group.keys() for group in state_dict.get("param_groups", ())):
            around = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("torch."))
            raise ConfigurationError(
                f"this is the state of another optimizer, as of torch.optim.{around.__name__}, which "
                f"has no radius and knows no shift, or of one with other settings: begin with a new "
                f"{type(self).__name__}, or go on with the optimizer that the state is of"
            )
        super().load_state_dict(state_dict)

    def _update_(self) -> None:
        """One update of the weights without their shift, which are then shifted anew."""
        self._unshift_()
        super(NoClosure, self).step()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None and p.numel()]
        # In units of the largest entry, since squares of very small or large numbers are none.
        unit = torch.stack([torch.linalg.vector_norm(one, math.inf) for one in gradients]).max() if gradients else 1.0
        norm = torch.stack([torch.linalg.vector_norm(one / unit) for one in gradients]).norm() if gradients else 1.0
        for group in self.param_groups:
            length = float(group["radius"]) * _progress(group) * (-1.0 if group["maximize"] else 1.0)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # A gradient of zero shifts nothing.
                    shift = torch.nan_to_num(parameter.grad / unit * (length / norm), 0.0, 0.0, 0.0)
                    self.state[parameter]["shift"] = shift
                    parameter.add_(shift)

    def _unshift_(self) -> None:
        """Takes all shifts off, those of parameters that have no gradient by now too: ``ρ`` is of all together."""
        for group in self.param_groups:
            for parameter in group["params"]:
                shift = self.state[parameter].pop("shift", None) if parameter in self.state else None
                if shift is not None:
                    parameter.sub_(shift)


def _progress(group: dict[str, Any]) -> float:
    """The learning rate now in units of its peak so far, 1 at most.

    A schedule notes in the group where it began; the largest rate of all steps is kept there, too, so that schedules
    that rise from where they began exceed no radius.
    """
    rate = float(group["lr"])
    peak = max(rate, float(group.get("initial_lr", 0.0)), float(group.get(_PEAK, 0.0)))
    group[_PEAK] = peak
    return max(rate, 0.0) / peak if peak > 0.0 else 1.0


_PEAK = "largest_lr"


class SharpnessAwareSGD(_SharpnessAware, SGD):
    """Sharpness-aware minimisation by the last noisy gradient, around ``torch.optim.SGD``.

    With ``g_t`` the private gradient of step ``t``, at weights ``w_t``:

        ``v_{t+1} = SGD(v_t, g_t)``, ``w_{t+1} = v_{t+1} + ρ_t·g_t/‖g_t‖``.

    The next pass thus runs where the loss is larger (Foret et al. 2021, *Sharpness-aware minimization*, equation 2),
    along a gradient that was paid for: a fresh one would be a second release. The weights between steps are the
    shifted ones, so that bounds, certificates and constraints are of these, as with any optimizer, and privacy is what
    it was. ``ρ_t`` falls with the learning rate, ``ρ·lr_t/lr_max``, where ``lr_max`` is the largest rate so far, or the
    one that a schedule begins from if that is larger: it never exceeds ``ρ``. The rate should end near 0, as that of
    ``fit`` does: the shift of the last step stays. With ``maximize=True`` the shift is along ``−g_t``.

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
