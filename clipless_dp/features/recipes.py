"""Modules that are made by a recipe, and know which: weights of another one would be other features, silently."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accounting.errors import warn_caller
from clipless_dp.errors import CheckpointError

_MADE = ", made of "


class Recipe(nn.Module):
    """A module made from public numbers by a recipe, which its state tells, as text in bytes.

    The text is the recipe's version and a SHA-256 digest of the arguments. States of version 0.2.0 and before tell the
    version alone: they are read, with a warning.

    Args:
        version: of the recipe, as it is in this package.

    Attributes:
        version: the same.

    Raises:
        CheckpointError: on loading, the state is of another recipe, of none, or of other arguments, or numbers in it
            are not finite.
    """

    recipe: Tensor

    def __init__(self, version: str) -> None:
        super().__init__()
        self.version = version
        self.register_buffer("recipe", _written(version))

    def _made_of(self, **arguments: object) -> None:
        """Tells the arguments that decide what is made, and what is made of it: values whose ``repr`` is all of them.

        A module is told by its structure and the settings of its parts (functions by name, objects by their class); its
        tensors are in the state themselves.
        """
        told = {name: _told(value) if isinstance(value, nn.Module) else value for name, value in arguments.items()}
        digest = hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()
        self.recipe = _written(f"{self.version}{_MADE}{digest[:32]}")

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
        told, own = None if not isinstance(held, Tensor) else _read(held), _read(self.recipe)
        kind = type(self).__name__
        if told == self.version != own:
            warn_caller(
                f"the state of this {kind} is of version 0.2.0 or before, which did not write down its arguments: they "
                "are taken for the ones given here",
                UserWarning,
            )
            state_dict = {**state_dict, f"{prefix}recipe": self.recipe}
        elif told is not None and told.rpartition(_MADE)[0] == self.version and told != own:
            raise CheckpointError(
                f"the state of this {kind} was made with other arguments (or around a module of others): it tells "
                f"{told!r}, and those given here make {own!r}. Give the arguments that it was made with"
            )
        elif told != own:
            found = "no recipe" if told is None else f"the recipe {told!r}"
            raise CheckpointError(
                f"the state of this {kind} is of {found}, and this package has {self.version!r}: "
                "make it anew and train on its features, or load it with the version of the package that made it"
            )
        for name in self._buffers:
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                raise CheckpointError(
                    f"{name} in the state of this {kind} has numbers that are not finite: make it anew"
                )
        super()._load_from_state_dict(state_dict, prefix, *others)


def _written(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _read(text: Tensor) -> str:
    return bytes(text.cpu().to(torch.uint8).flatten().tolist()).decode(errors="replace")


def _told(module: nn.Module) -> list[object]:
    """What a module's parts are called, and are set to, apart from tensors and what torch keeps in each of them."""
    ours = vars(nn.Module()).keys()
    return [
        (
            name,
            type(part).__module__,
            type(part).__qualname__,
            part.extra_repr(),
            sorted((key, _shown(value)) for key, value in vars(part).items() if key not in ours),
            _read(part.recipe) if isinstance(part, Recipe) else "",
        )
        for name, part in module.named_modules()
    ]


def _shown(value: object) -> str:
    """A setting in words: in full, functions by their names, and other objects by their class."""
    if is_plain(value):
        return repr(value)
    if isinstance(value, Mapping):
        return repr(sorted((repr(key), _shown(item)) for key, item in value.items()))
    if isinstance(value, (tuple, list)):
        return repr([_shown(item) for item in value])
    if isinstance(value, Tensor):
        return repr(value.tolist())
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def is_plain(value: object) -> bool:
    """Whether the ``repr`` of a value is all of it: numbers, text, and sequences of them."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
