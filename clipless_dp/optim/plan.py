"""The noise of a step: which deviation each parameter's gradient gets, planned anew only where something changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from clipless_dp.bounds.sensitivity import Sensitivity
from clipless_dp.errors import PrivacyError
from clipless_dp.noise import Allocation, drawn_deviations

_ROOM = 2.0**-10
"""Share of the largest number that a deviation may be: normal numbers and sums of some are larger."""


class NoisePlan:
    """Deviations of the noise, kept as long as bounds, parameters, noise multiplier and allocation stay the same."""

    def __init__(self) -> None:
        self._kept: tuple[Sensitivity, tuple[int, ...], tuple[float, Allocation], dict[int, float], float] | None = None

    def of(
        self,
        sensitivity: Sensitivity,
        named: Mapping[str, nn.Parameter],
        groups: Sequence[Mapping[str, Any]],
        noise_multiplier: float,
        allocation: Allocation,
    ) -> tuple[dict[int, float], float]:
        """Standard deviations by the parameters' ``id``, and the effective noise multiplier that they amount to.

        Args:
            sensitivity: the bounds.
            named: the network's parameters.
            groups: the optimizer's, all of whose parameters are the network's.
            noise_multiplier: ``σ``.
            allocation: how the noise is shared.

        Raises:
            PrivacyError: there is nothing to train, or the noise does not fit the parameters' numbers.
        """
        names = {id(parameter): name for name, parameter in named.items()}
        held = tuple(
            id(parameter)
            for group in groups
            for parameter in group["params"]
            if parameter.requires_grad and sensitivity.per_parameter.get(names[id(parameter)], 0.0) > 0.0
        )
        if self._kept is not None:
            known, parameters, settings, deviations, spent = self._kept
            if known is sensitivity and parameters == held and settings == (noise_multiplier, allocation):
                return deviations, spent
        if not held:
            raise PrivacyError("no trainable parameter of the optimizer takes part in the network: nothing to train")
        sizes = {id(parameter): parameter.numel() for parameter in named.values()}
        bounds = [sensitivity.per_parameter[names[key]] for key in held]
        drawn, spent = drawn_deviations(bounds, [sizes[key] for key in held], noise_multiplier, allocation)
        deviations = dict(zip(held, drawn, strict=True))
        for name, parameter in named.items():
            if deviations.get(id(parameter), 0.0) > torch.finfo(parameter.dtype).max * _ROOM:
                raise PrivacyError(
                    f"noise of standard deviation {deviations[id(parameter)]:.4g} does not fit the {parameter.dtype} "
                    f"numbers of {name}: choose a smaller noise_multiplier; nothing was released"
                )
        self._kept = sensitivity, held, (noise_multiplier, allocation), deviations, spent
        return deviations, spent
