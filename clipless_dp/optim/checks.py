"""What an optimizer asks of its arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from clipless_dp.arguments import choice, shown
from clipless_dp.errors import ConfigurationError
from clipless_dp.optim.around import guardable
from clipless_dp.optim.charging import Sampling
from clipless_dp.sampling.people import Unit

_DIVERGING = frozenset({"lr", "momentum", "dampening", "weight_decay", "betas", "eps", "alpha"})
"""Settings of a group that must be finite; others, of whatever optimizer, may be infinite to switch something off."""


def checked_sampling(value: Sampling) -> Sampling:
    """How batches are drawn."""
    checked: Sampling = choice("sampling", value, "announced", "poisson", "none")
    return checked


def checked_unit(value: Unit) -> Unit:
    """What a guarantee is about."""
    checked: Unit = choice("unit", value, "row", "person")
    return checked


def refuse_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a step that would be charged, and leave weights of NaN: what a schedule sets is looked at each time.

    Args:
        groups: the base optimizer's.

    Raises:
        ConfigurationError: a number in a group is NaN, or its learning rate (momentum, ...) is more than its
            parameters' numbers hold.
    """
    for index, group in enumerate(groups):
        largest = min((torch.finfo(parameter.dtype).max for parameter in group["params"]), default=math.inf)
        for name, value in group.items():
            if name == "params":
                continue
            for number in _numbers(value):
                if math.isnan(number) or (name in _DIVERGING and not abs(number) <= largest):
                    raise ConfigurationError(
                        f"{name} of parameter group {index} is {number}: give a finite number, and a schedule that "
                        "returns one at each step. Nothing was charged"
                    )


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            yield float(value.detach())
    elif isinstance(value, Real):
        try:
            yield float(value)
        except OverflowError:
            yield math.inf


def refuse_closures(base: object) -> None:
    """Refuses what is no optimizer, and optimizers that take more than one dense gradient a step.

    Raises:
        ConfigurationError: the optimizer is one.
    """
    if not isinstance(base, Optimizer):
        raise ConfigurationError(f"base_optimizer must be a torch.optim.Optimizer, got {shown(base)}")
    if not guardable(base):
        raise ConfigurationError(
            f"{type(base).__name__} does not call super().__init__() of torch.optim.Optimizer, so that nothing guards "
            "its steps: make the optimizer that it is around private, and put it around the private one, as "
            f"{type(base).__name__}(private)"
        )
    if isinstance(base, (LBFGS, SparseAdam)):
        raise ConfigurationError(
            f"{type(base).__name__} evaluates gradients several times a step or needs sparse ones; "
            "use SGD, Adam or another first-order optimizer"
        )
