"""What a saved state of a base optimizer tells of itself, before any of it is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves_with_path

from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError
from clipless_dp.optim.around import is_known


def digest(state: object) -> str:
    """What tells a state by its tensors and numbers: the same wherever they lie.

    Of tensors that are sharded, and of groups, whose settings loops change, it tells nothing.

    Args:
        state: the ``"state"`` of an optimizer's ``state_dict()``.
    """
    told = hashlib.sha256()
    parts = [(str(place), value) for place, value in tree_leaves_with_path(state)]
    for place, value in sorted(parts, key=lambda pair: pair[0]):
        if isinstance(value, Tensor):
            dense = value.layout is torch.strided and not value.is_quantized and not value.is_nested
            if not dense or placement.local(value) is not value:
                continue
            held = value.detach().cpu().contiguous()
            told.update(f"{place} {held.dtype} {tuple(held.shape)}".encode())
            told.update(held.reshape(-1).view(torch.uint8).numpy().data)
        elif type(value) in (bool, int, float):
            told.update(f"{place} {value!r}".encode())
    return told.hexdigest()


_SHAPED = frozenset(
    {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "grad_avg", "sum", "prev"}
)
"""What optimizers of torch's keep in a parameter's shape."""


_TELLING = frozenset({
    "lr", "betas", "amsgrad", "momentum", "dampening", "nesterov", "centered", "alpha", "rho", "lr_decay", "etas",
    "lambd", "momentum_decay", "beta2_decay", "radius",
})  # fmt: skip
"""By what groups of one class are told from those of another; versions of torch have added others."""


_NEEDED: dict[type[Optimizer], str] = {
    torch.optim.Adam: "exp_avg_sq", torch.optim.AdamW: "exp_avg_sq", torch.optim.RAdam: "exp_avg_sq",
    torch.optim.NAdam: "mu_product", torch.optim.Adamax: "exp_inf",
}  # fmt: skip
"""What a class that has begun a parameter's state reads of it, and those of the same settings have not."""


def require_loadable(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuses a state that a known optimizer would load and then fail on, or not load.

    Raises:
        ConfigurationError: the state is incomplete, or of other parameters or another class.
    """
    kind = f"the base optimizer, a {type(optimizer).__name__}"
    if not is_known(optimizer):
        return
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)):
        raise ConfigurationError(f"this state has no 'state' or no 'param_groups' of {kind}: load it as it was saved")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group.get("params", ())) for group in groups] != sizes:
        raise ConfigurationError(f"this state is of other groups of parameters than those of {kind}")
    for group in groups:
        if missing := sorted(_TELLING & optimizer.defaults.keys() - group.keys()):
            raise ConfigurationError(
                f"this is the state of another optimizer, which has no {missing[0]}, than {kind}: begin with a new "
                "one, or go on with the optimizer that the state is of"
            )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = [place for group in groups for place in group["params"]]
    needed = next((name for kind_of, name in _NEEDED.items() if isinstance(optimizer, kind_of)), None)
    for place, parameter in zip(places, parameters, strict=True):
        held = state.get(place)
        if needed is not None and held and needed not in held:
            raise ConfigurationError(
                f"this is the state of another optimizer, which keeps no {needed}, than {kind}: begin with a new one, "
                "or go on with the optimizer that the state is of"
            )
        for name, value in held.items() if isinstance(held, Mapping) else ():
            if name in _SHAPED and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise ConfigurationError(
                    f"{name} in this state has the shape {tuple(value.shape)}, and its parameter "
                    f"{tuple(parameter.shape)}: it is of another network"
                )
