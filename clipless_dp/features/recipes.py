"""Modules that are made by a recipe, and know which: weights of another one would be other features, silently."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.errors import CheckpointError


class Recipe(nn.Module):
    """A module made from public numbers by a recipe, whose version is in its state, as text in bytes.

    Args:
        version: of the recipe, as it is in this package.

    Attributes:
        version: the same.

    Raises:
        CheckpointError: on loading, the state is of another recipe, or of none.
    """

    recipe: Tensor

    def __init__(self, version: str) -> None:
        super().__init__()
        self.version = version
        self.register_buffer("recipe", torch.frombuffer(bytearray(version.encode()), dtype=torch.uint8))

    @property
    def lipschitz(self) -> float:
        """That distances grow by at most: infinite, as no constant is proved; nothing is certified in front of it."""
        return math.inf

    def _filled(self, state: Mapping[str, Tensor]) -> None:
        """Takes the tensors of one that was made before with the same arguments; what takes long to make is left out.

        Raises:
            CheckpointError: they are of another recipe, or do not fit.
        """
        try:
            self.load_state_dict(dict(state))
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"the state does not fit this {type(self).__name__}: {error}") from error

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        held = state_dict.get(f"{prefix}recipe")
        told = None if not isinstance(held, Tensor) else bytes(held.cpu().to(torch.uint8).flatten().tolist())
        if told != self.version.encode():
            found = "no recipe" if told is None else f"the recipe {told.decode(errors='replace')!r}"
            raise CheckpointError(
                f"the state of this {type(self).__name__} is of {found}, and this package has {self.version!r}: "
                "make it anew and train on its features, or load it with the version of the package that made it"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)
