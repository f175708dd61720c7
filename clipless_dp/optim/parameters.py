"""The parameters that a step may release, their gradients, and what may be done with those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from clipless_dp.errors import PrivacyError
from clipless_dp.model import DPLipModel
from clipless_dp.modules import parameters_of


class Protected:
    """The parameters of a wrapped network, whose gradients are bounded.

    Args:
        model: the wrapped model, whose network may change.

    Attributes:
        named: its parameters by name, as they were last.
    """

    def __init__(self, model: DPLipModel) -> None:
        self._model = model
        self.named: dict[str, nn.Parameter] = {}

    def including(self, parameters: Iterable[Tensor]) -> dict[str, nn.Parameter]:
        """The network's parameters by name, once the given ones are known to be of them.

        Raises:
            PrivacyError: some are not.
        """
        held = parameters_of(self._model.net)
        if [*map(id, self.named.values())] != [*map(id, held)]:
            self.named = dict(self._model.net.named_parameters())
        known = set(map(id, held))
        foreign = [tuple(parameter.shape) for parameter in parameters if id(parameter) not in known]
        if foreign:
            raise PrivacyError(
                f"the optimizer holds {len(foreign)} parameter(s) that are not of model.net, of shapes {foreign}: "
                "their gradients have no bound and would be released without noise"
            )
        return self.named


class Taken:
    """Gradients that are put aside while they are charged or noised: what comes to ``.grad`` meanwhile shows.

    Args:
        parameters: whose gradients they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._held = [(parameter, parameter.grad) for parameter in parameters]
        for parameter, _ in self._held:
            parameter.grad = None

    def put_back(self) -> None:
        """They are there again.

        Raises:
            PrivacyError: others are.
        """
        for parameter, gradient in self._held:
            if parameter.grad is not None:
                raise PrivacyError(
                    "gradients came in while a step was under way, from another thread's loss of model.net or an "
                    "exported copy, say: they have no bound. Call model(...), and take passes and steps in turn"
                )
            parameter.grad = gradient


def to_release(
    named: Mapping[str, nn.Parameter], deviations: Mapping[int, float], *, passed: bool
) -> tuple[list[Tensor], list[float]]:
    """The gradients that get noise, and its deviations; all others are dropped.

    Args:
        named: the network's parameters.
        deviations: by the ``id`` of those that are released.
        passed: whether a pass has left the gradients; else they become zeros.
    """
    gradients: list[Tensor] = []
    scales: list[float] = []
    for parameter in named.values():
        if not passed:
            # Whatever is there, no pass has left it.
            parameter.grad = None
        deviation = deviations.get(id(parameter))
        if deviation is None:
            # Not to be stepped on later, when it would hold several batches.
            parameter.grad = None
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
        scales.append(deviation)
    return gradients, scales
