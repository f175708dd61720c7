"""What an optimizer asks of its arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from clipless_dp.arguments import choice, shown
from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.optim.around import everything, guardable, is_known, is_plain, per_class
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


def refuse_settings(base: Optimizer) -> None:
    """Refuses a step that would be charged, and fail, or leave weights of NaN: what a schedule sets is seen each time.

    Args:
        base: the base optimizer, whose groups and those of optimizers within it are looked at.

    Raises:
        ConfigurationError: a number in a group is NaN, or its learning rate (momentum, ...) is more than its
            parameters' numbers hold, or a setting of an optimizer of torch's is a tensor of more or fewer than one, or
            an optimizer's own ``require_settings()`` refuses its groups.
        PrivacyError: a ``GradScaler`` has left on one of them whether to skip its step, or a scale.
    """
    settings = _plain_settings(base)
    if settings is not None and _accepted.get(base) == settings:
        return
    for one in everything(base):
        for name in ("found_inf", "grad_scale"):
            value = getattr(one, name, None)
            if isinstance(value, Tensor) or (value is not None and _asks_for_scales(one)):
                raise PrivacyError(
                    f"{name} is set on the base optimizer, a {type(one).__name__}, as a GradScaler does: steps that "
                    "are skipped or scaled depending on the data are not in the ledger. Train without it, and delete "
                    f"the attribute (del optimizer.{name}), or give a setting of your own another name, which torch "
                    "does not read. Nothing was charged"
                )
        _refuse_groups(one.param_groups, one.defaults.keys() if is_known(one) else ())
        if is_known(one):
            _refuse_unrunnable(one)
        if hasattr(one, "require_settings"):
            one.require_settings()
    if settings is not None:
        _accepted[base] = settings


_accepted: WeakKeyDictionary[Optimizer, list[object]] = WeakKeyDictionary()
"""The settings of plain optimizers that were looked at last: as a rule those of the next step."""


def _plain_settings(base: Optimizer) -> list[object] | None:
    """What :func:`refuse_settings` looks at, where it is numbers alone of one of torch's optimizers, or ours."""
    own = vars(base)
    if not is_plain(base) or "found_inf" in own or "grad_scale" in own or hasattr(base, "require_settings"):
        return None
    found: list[object] = [*base.defaults]
    for group in base.param_groups:
        params = group["params"]
        found += [params[0].dtype, params[0].device] if params else []
        for name, value in group.items():
            if name != "params":
                found += [name, type(value), value]
                if not _NUMBERS.issuperset(map(type, value if type(value) is tuple else (value,))):
                    return None
    return found


_NUMBERS = frozenset({bool, int, float, type(None)})


def _refuse_unrunnable(optimizer: Optimizer) -> None:
    """Refuses what fails within a step of torch's."""
    for index, group in enumerate(optimizer.param_groups):
        added = {"differentiable"} - _arguments_of(type(optimizer))
        if missing := sorted(optimizer.defaults.keys() - group.keys() - added):
            raise ConfigurationError(
                f"parameter group {index} of a {type(optimizer).__name__} has no {missing[0]}: set it. Nothing was "
                "charged"
            )
        for name, default in optimizer.defaults.items():
            value, pair = group.get(name, default), isinstance(default, tuple)
            if pair:
                fits = isinstance(value, (tuple, list)) and len(value) == len(default)
                fits = fits and all(map(_is_number_as, value, default))
            else:
                fits = not isinstance(default, Real) or _is_number_as(value, default)
            if not fits:
                raise ConfigurationError(
                    f"{name} of parameter group {index} of a {type(optimizer).__name__} is {shown(value)}: give "
                    f"{'as many numbers as' if pair else 'a number as'} {default}. Nothing was charged"
                )
        on_cpu = group.get("capturable") and any(one.device.type == "cpu" for one in group["params"])
        if on_cpu or group.get("differentiable"):
            name, where = ("capturable", " on a CPU") if on_cpu else ("differentiable", "")
            raise ConfigurationError(
                f"{name}=True of a {type(optimizer).__name__} does not go with private steps{where}: leave it out. "
                "Nothing was charged"
            )


@per_class
def _arguments_of(kind: type) -> frozenset[str]:
    """What a class takes as settings: loading a state, torch adds ``differentiable`` to the defaults of any."""
    return frozenset(inspect.signature(kind).parameters)


def _is_number_as(value: object, default: object) -> bool:
    """Whether a value is a number, or nothing where a switch is off or nothing is usual."""
    return isinstance(value, (bool, int, float, np.number, Tensor)) or (
        value is None and (default is None or isinstance(default, bool))
    )


def _asks_for_scales(optimizer: Optimizer) -> bool:
    """Whether its step is one of torch's, which read these attributes, or says that it supports them."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) or type(optimizer).step.__module__.startswith(
        "torch.optim"
    )


def _refuse_groups(groups: Sequence[Mapping[str, Any]], read: Collection[str]) -> None:
    """As :func:`refuse_settings`; ``read`` are the entries that have to be single numbers."""
    for index, group in enumerate(groups):
        largest = min((torch.finfo(parameter.dtype).max for parameter in group["params"]), default=math.inf)
        for name, value in group.items():
            if name == "params":
                continue
            if type(value) is bool or value is None:
                continue
            if name in read and not isinstance(value, float) and not _is_setting(value):
                raise ConfigurationError(
                    f"{name} of parameter group {index} is not one number but a tensor or an array: give a number, and "
                    "parameters that need others a group of their own. Nothing was charged"
                )
            for number in _numbers(value):
                if math.isnan(number) or (name in _DIVERGING and not abs(number) <= largest):
                    raise ConfigurationError(
                        f"{name} of parameter group {index} is {number}: give a finite number, and a schedule that "
                        "returns one at each step. Nothing was charged"
                    )


def _is_setting(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_setting, value))
    if isinstance(value, Tensor):
        return value.numel() == 1
    return not isinstance(value, np.ndarray) or value.size == 1


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
