"""Units: the modules that ``fully_shard`` was called on, whose parameters are split among the processes.

Their parameters are gathered when a unit is called, and freed behind it. The model is one; layers or blocks may be
units of their own, so that a process holds one or two of them whole at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.modules import modules_of


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` splits the module's parameters among the ranks, and gathers them for each pass only."""
    # A class is asked faster than a module, which looks among its parameters and parts first.
    return hasattr(type(module), "set_requires_gradient_sync")


def has_shards(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module or a part of it."""
    return any(is_sharded(part) for part in modules_of(model))


def hooks_of_sharding(module: nn.Module) -> object:
    """Whose methods the hooks are that gather a unit's parameters; ``None`` of a module that is no unit."""
    return module._get_fsdp_state() if is_sharded(module) else None  # type: ignore[operator]


def refuse_shards(net: nn.Module) -> None:
    """Refuses parameters that are split among the ranks.

    Raises:
        ConfigurationError: ``fully_shard`` was called on the module or a part of it.
    """
    sharded = [name for name, parameter in net.named_parameters() if hasattr(parameter, "placements")]
    if sharded or has_shards(net):
        raise ConfigurationError(
            f"fully_shard splits parameters ({', '.join(sharded[:3]) or 'at the next forward pass'}) among the ranks, "
            "but norms, projections and many gradient bounds need whole ones: wrap the whole network first, and then "
            "shard parts of model.net, and last the DPLipModel of a gated network"
        )


def reshard_(model: nn.Module) -> None:
    """Gives back the whole weights that a pass without a backward pass has left on a rank."""
    if is_sharded(model):
        for _, unit in units_of(model):
            unit.reshard()


def units_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The units in a model, with their paths."""
    return ((path, part) for path, part in model.named_modules() if is_sharded(part))


def groups(unit: Any) -> list[Any]:
    """Parameters of a unit that are gathered together; newer versions of torch know several."""
    state = unit._get_fsdp_state()
    group = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [some for some in group if some is not None]
