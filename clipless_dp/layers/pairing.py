"""Which channels are a pair."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clipless_dp.arguments import shown
from clipless_dp.errors import ConfigurationError
from clipless_dp.modules import Unscripted

Pairing = Literal["adjacent", "halves"]


class Paired(Unscripted, nn.Module):
    """A module that acts on pairs of channels.

    Args:
        pairing: ``"adjacent"``: channels ``2i`` and ``2i + 1``; ``"halves"``: ``i`` and ``i + C/2``, as in the code of
            Singla, Singla and Feizi (2022).

    Raises:
        ConfigurationError: another pairing.
    """

    # Of the class too, so that modules that a former version saved have it.
    pairing: Pairing = "adjacent"

    def __init__(self, pairing: Pairing = "adjacent") -> None:
        super().__init__()
        if pairing not in get_args(Pairing):
            raise ConfigurationError(f"pairing must be 'adjacent' or 'halves', got {shown(pairing)}")
        self.pairing = pairing

    def groups(self, channels: int) -> Tensor:
        """Which channels act on each other: indices, ``(groups, size)``, as the forward pass takes them."""
        return torch.stack(self._pairs(torch.arange(channels), 0), 1)

    def _pairs(self, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """First and second channel of each pair."""
        size = values.shape[dim] // 2
        if self.pairing == "halves":
            return values.narrow(dim, 0, size), values.narrow(dim, size, size)
        first, second = values.unflatten(dim, (size, 2)).unbind(dim + 1)
        return first, second

    def _joined(self, first: Tensor, second: Tensor, dim: int) -> Tensor:
        """Puts the channels of pairs where they were."""
        if self.pairing == "halves":
            return torch.cat((first, second), dim)
        return torch.stack((first, second), dim + 1).flatten(dim, dim + 1)
