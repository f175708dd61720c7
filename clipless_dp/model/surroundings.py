"""What is in force in the whole process and may change what a network computes: hooks and modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules

from clipless_dp.errors import PrivacyError
from clipless_dp.isolation.hidden import foreign_mode


def refuse_interference() -> None:
    """Refuses what may change values or gradients within a pass, anywhere in the process.

    Raises:
        PrivacyError: a global module hook, a function or dispatch mode, or a hook on saved tensors is in force, or
            the model is called through DDP. Modes of torch itself, activation checkpointing and ``save_on_cpu`` are let
            through.
    """
    if modules._has_any_global_hook():
        raise PrivacyError(
            "a global module hook is registered (torch.nn.modules.module.register_module_…_hook), which may change "
            "what the network computes: remove it around the passes of a wrapped model"
        )
    for length, at in (
        (torch._C._len_torch_function_stack(), torch._C._get_function_stack_at),
        (torch._C._len_torch_dispatch_stack(), torch._C._get_dispatch_stack_at),
    ):
        foreign = foreign_mode(length, at)
        if foreign is not None:
            raise PrivacyError(
                f"the mode {foreign} is in force, which may change what the network computes: leave it around the "
                "passes of a wrapped model"
            )
    active = getattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", lambda: None)
    if active() is not None:
        raise PrivacyError(
            "DistributedDataParallel averages gradients before they are private: call the wrapped model itself, whose "
            "optimizer adds up those of all ranks"
        )
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:
        owners = {getattr(hook, "__module__", None) for hook in hooks}
        if not owners <= {"torch.utils.checkpoint", "torch.autograd.graph"}:
            raise PrivacyError(
                "hooks on saved tensors are in force (saved_tensors_hooks), which may change what gradients are made "
                "of: use torch.utils.checkpoint or torch.autograd.graph.save_on_cpu to save memory"
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a pass failed because memory was too small, of a device or of the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
