"""Adam whose second moment is that of the gradients, not of the noise on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clipless_dp.arguments import learning_rate, not_negative, positive, share
from clipless_dp.errors import ConfigurationError
from clipless_dp.optim.no_closure import NoClosure


class AdamBC(NoClosure):
    """AdamW for private gradients: what the noise adds to the second moment is taken off (Tang, Panickssery & Lécuyer
    2024, *DP-AdamBC*, Algorithm 1).

    The square of a private gradient is larger than that of the mean gradient by the noise's variance, in expectation.
    Where noise outweighs gradients, as it does in most steps, Adam divides by the noise's deviation, the same for all
    entries of a weight: it becomes SGD with momentum. Here, with the deviation ``s_t`` of the noise of step ``t`` on an
    entry of the mean gradient ``g_t``,

        ``m ← β₁m + (1 − β₁)g_t``, ``v ← β₂v + (1 − β₂)g_t²``, ``w ← β₂w + (1 − β₂)s_t²``,
        ``θ ← θ − lr·(λθ + m̂/(√max(v̂ − ŵ, f²ŵ) + eps))``,

    where hats divide by ``1 − β^t`` (Kingma & Ba 2015). ``w`` follows the noise of each step as ``v`` does, since
    bounds, and with them the noise, may change. ``f`` is the least that is divided by, in units of the noise's
    deviation: the difference of two noisy numbers may be anything about zero. At large ``f`` the rule is SGD with
    momentum, of rate ``lr/(f·√ŵ)``.

    A base optimizer of :class:`clipless_dp.CliplessDPOptimizer`, which tells it the noise of each step; alone, or
    without noise, it is ``torch.optim.AdamW``. It reads released numbers only and so costs no privacy.

    Args:
        params: parameters, or groups of them.
        lr: learning rate ``≥ 0``.
        betas: ``(β₁, β₂)``, each in [0, 1).
        eps: added to what is divided by, ``> 0``.
        weight_decay: ``λ ≥ 0``, decoupled (Loshchilov & Hutter 2019).
        floor: ``f > 0``.

    Raises:
        ConfigurationError: an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        floor: float = 0.3,
    ) -> None:
        defaults = {
            "lr": learning_rate("lr", lr),
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "floor": floor,
        }
        self._refuse(defaults)
        self._deviations: dict[int, float] = {}
        super().__init__(params, defaults)

    def note_noise(self, deviations: Mapping[int, float]) -> None:
        """The deviation of the noise on each entry of the gradients that are there, by the ``id`` of the parameter.

        Called by :meth:`clipless_dp.CliplessDPOptimizer.step` before each step of this one.
        """
        self._deviations = dict(deviations)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with settings of their own.

        Raises:
            ConfigurationError: a setting is out of range, or a parameter is complex.
        """
        super().add_param_group(param_group)
        try:
            self._refuse(self.param_groups[-1])
            if any(parameter.is_complex() for parameter in self.param_groups[-1]["params"]):
                raise ConfigurationError("AdamBC is for real parameters: see torch.view_as_real")
        except ConfigurationError:
            self.param_groups.pop()
            raise

    @staticmethod
    def _refuse(group: Mapping[str, Any]) -> None:
        """Refuses settings of a group that are out of range."""
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ConfigurationError(f"betas must be two numbers, (β₁, β₂), got {betas!r}")
        for place, beta in enumerate(betas):
            share(f"betas[{place}]", beta, "[0, 1)")
        positive("eps", group["eps"])
        not_negative("weight_decay", group["weight_decay"])
        positive("floor", group["floor"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state of this class.

        Raises:
            ConfigurationError: it is that of another optimizer.
        """
        groups, states = state_dict.get("param_groups", ()), state_dict.get("state", {}).values()
        if any("floor" not in group for group in groups) or any(one and "noise" not in one for one in states):
            raise ConfigurationError(
                "this is the state of another optimizer, as of torch.optim.Adam, which does not tell the noise in its "
                "moments: begin with a new AdamBC, or go on with the optimizer that the state is of"
            )
        super().load_state_dict(state_dict)

    def _update_(self) -> None:
        deviations, self._deviations = self._deviations, {}
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.layout is not torch.strided for p in group["params"]):
                raise ConfigurationError("AdamBC takes no sparse gradients: leave out sparse=True")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move_(parameter, parameter.grad, group, deviations.get(id(parameter), 0.0) ** 2)

    def _move_(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any], variance: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"], state["noise"] = 0, 0.0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        first, second = group["betas"]
        state["step"] += 1
        state["noise"] = second * state["noise"] + (1.0 - second) * variance
        state["exp_avg"].lerp_(gradient, 1.0 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
        seen = 1.0 - second ** state["step"]
        noise = state["noise"] / seen
        squares = (state["exp_avg_sq"] / seen).sub_(noise).clamp_(min=group["floor"] ** 2 * noise)
        rate = float(group["lr"])
        parameter.mul_(1.0 - rate * group["weight_decay"])
        parameter.addcdiv_(
            state["exp_avg"], squares.sqrt_().add_(group["eps"]), value=-rate / (1.0 - first ** state["step"])
        )


def tell_noise(optimizer: Optimizer, deviations: Mapping[int, float]) -> None:
    """Tells a base optimizer that asks for it the noise on the gradients that it is about to step on.

    Args:
        optimizer: one with a method ``note_noise``, or any other.
        deviations: of the noise on each entry of the mean gradients, by the ``id`` of the parameter.
    """
    note = getattr(optimizer, "note_noise", None)
    if note is not None:
        note(deviations)
