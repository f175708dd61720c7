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
        self._kept: tuple[tuple[object, ...], tuple[dict[int, float], float, float]] | None = None

    def of(
        self,
        sensitivity: Sensitivity,
        named: Mapping[str, nn.Parameter],
        groups: Sequence[Mapping[str, Any]],
        noise_multiplier: float,
        allocation: Allocation,
        share: float = 0.0,
    ) -> tuple[dict[int, float], float, float]:
        """Standard deviations by the parameters' ``id``, that of counts, and the noise multiplier that all amount to.

        Args:
            sensitivity: the bounds.
            named: the network's parameters.
            groups: the optimizer's, all of whose parameters are the network's.
            noise_multiplier: ``σ``.
            allocation: how the noise is shared.
            share: of ``σ⁻²``, what the counts of caps that adapt take.

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
        rests_on = held, noise_multiplier, allocation, share
        if self._kept is not None and self._kept[0][0] is sensitivity and self._kept[0][1:] == rests_on:
            return self._kept[1]
        if not held:
            raise PrivacyError("no trainable parameter of the optimizer takes part in the network: nothing to train")
        # Parameters that are bounded together are one block: all of its noise is alike.
        blocks = sensitivity.blocks(names[key] for key in held)
        drawn, spent = drawn_deviations(
            [bound for _, bound in blocks],
            [sum(named[name].numel() for name in members) for members, _ in blocks],
            noise_multiplier,
            allocation,
            counts=sensitivity.of_counts,
            share=share,
        )
        of_counts = drawn.pop() if len(drawn) > len(blocks) else 0.0
        deviations = {
            id(named[name]): deviation
            for (members, _), deviation in zip(blocks, drawn, strict=True)
            for name in members
        }
        for name, parameter in named.items():
            if deviations.get(id(parameter), 0.0) > torch.finfo(parameter.dtype).max * _ROOM:
                raise PrivacyError(
                    f"noise of standard deviation {deviations[id(parameter)]:.4g} does not fit the {parameter.dtype} "
                    f"numbers of {name}: choose a smaller noise_multiplier; nothing was released"
                )
        self._kept = (sensitivity, *rests_on), (deviations, of_counts, spent)
        return deviations, of_counts, spent
