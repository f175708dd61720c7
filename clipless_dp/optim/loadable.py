"""What a saved state of a base optimizer tells of itself, before any of it is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves_with_path

from clipless_dp.arguments import shown
from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError
from clipless_dp.optim.adam import AdamBC
from clipless_dp.optim.around import is_known, is_made_of_known
from clipless_dp.optim.holdings import is_dense


def _leaves(place: str, value: object, around: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What containers and objects hold, and where."""
    for path, one in tree_leaves_with_path(value):
        here, held = f"{place}{path}", getattr(one, "__dict__", None)
        if isinstance(one, Tensor) or not held or callable(one):
            yield here, one
        elif id(one) not in around:
            yield from _leaves(here, dict(held), (*around, id(one)))


def digest(state: object) -> str:
    """What tells a state by its tensors and numbers: the same wherever they lie.

    Of tensors that are sharded, and of groups, whose settings loops change, it tells nothing.

    Args:
        state: the ``"state"`` of an optimizer's ``state_dict()``.
    """
    told = hashlib.sha256()
    for place, value in sorted(_leaves("", state), key=lambda pair: pair[0]):
        if isinstance(value, Tensor):
            if not is_dense(value) or placement.local(value) is not value:
                continue
            held = value.detach().cpu().contiguous()
            told.update(f"{place} {held.dtype} {tuple(held.shape)}".encode())
            told.update(held.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            told.update(f"{place} {value.dtype} {value.shape}".encode())
            told.update(value.tobytes())
        elif type(value) in (bool, int, float, bytes):
            told.update(f"{place} {value!r}".encode())
    return told.hexdigest()


_TELLING = frozenset({
    "lr", "betas", "amsgrad", "momentum", "dampening", "nesterov", "centered", "alpha", "rho", "lr_decay", "etas",
    "lambd", "momentum_decay", "beta2_decay", "radius", "floor",
})  # fmt: skip
"""By what groups of one class are told from those of another; versions of torch have added others."""


_NEEDED: dict[type[Optimizer], str] = {
    torch.optim.Adam: "exp_avg_sq", torch.optim.AdamW: "exp_avg_sq", torch.optim.RAdam: "exp_avg_sq",
    torch.optim.NAdam: "mu_product", torch.optim.Adamax: "exp_inf", AdamBC: "noise",
}  # fmt: skip
"""What a class that has begun a parameter's state reads of it, and those of the same settings have not."""


_SHAPED = frozenset({
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "sum", "ax",
    "acc_delta", "prev", "step_size",
})  # fmt: skip
"""What torch's classes, and those that are made of them, keep of a parameter's shape."""


def require_loadable(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuses a state that a known optimizer would load and then fail on, or not load.

    Raises:
        ConfigurationError: the state is incomplete, or of other parameters or another class.
    """
    kind = f"the base optimizer, a {type(optimizer).__name__}"
    known = is_known(optimizer)
    if not (known or type(optimizer).load_state_dict is Optimizer.load_state_dict):
        # Whatever form it takes.
        return
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)):
        raise ConfigurationError(f"this state has no 'state' or no 'param_groups' of {kind}: load it as it was saved")
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups):
        raise ConfigurationError(f"this state has groups without 'params' of {kind}: load it as it was saved")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in groups] != sizes:
        raise ConfigurationError(f"this state is of other groups of parameters than those of {kind}")
    for group in groups if known else ():
        if missing := sorted(_TELLING & optimizer.defaults.keys() - group.keys()):
            raise ConfigurationError(
                f"this is the state of another optimizer, which has no {missing[0]}, than {kind}: begin with a new "
                "one, or go on with the optimizer that the state is of"
            )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = [place for group in groups for place in group["params"]]
    needed = next((name for kind_of, name in _NEEDED.items() if known and isinstance(optimizer, kind_of)), None)
    for place, parameter in zip(places, parameters, strict=True):
        held = state.get(place)
        if held is not None and not isinstance(held, Mapping):
            if not known:
                continue
            raise ConfigurationError(f"what this state holds of a parameter is {shown(held)}: load it as it was saved")
        if needed is not None and held and needed not in held:
            raise ConfigurationError(
                f"this is the state of another optimizer, which keeps no {needed}, than {kind}: begin with a new one, "
                "or go on with the optimizer that the state is of"
            )
        for name, value in (held or {}).items():
            told = known or (name in _SHAPED and is_made_of_known(optimizer))
            if told and isinstance(value, Tensor) and value.dim() and not _fits(name, value, parameter):
                raise ConfigurationError(
                    f"{name} in this state has the shape {tuple(value.shape)}, and its parameter "
                    f"{tuple(parameter.shape)}: it is of another network"
                )


def _fits(name: str, value: Tensor, parameter: Tensor) -> bool:
    """Whether what is kept of a parameter has its shape; of Adafactor's factors, up to an axis."""
    if name in ("row_var", "col_var"):
        axis = parameter.dim() + (-1 if name == "row_var" else -2)
        return [*value.shape] == [1 if at == axis else size for at, size in enumerate(parameter.shape)]
    return value.shape == parameter.shape
