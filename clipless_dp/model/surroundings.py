"""What is in force in the whole process and may change what a network computes: hooks and modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as modules

from clipless_dp.errors import PrivacyError
from clipless_dp.isolation.hidden import foreign_mode

_UPDATE = "_clipless_dp_update"
"""By which the hooks of a parameter know that of :func:`without_gradients`."""


def _refuse_gradients(*_: object) -> NoReturn:
    raise PrivacyError(
        "the base optimizer, or a hook of it, computes gradients within its step, as one that passes batches by itself "
        "does (GSAM, SAM with a closure of its own): they would go into the weights without noise and without charge. "
        "Take a first-order optimizer that steps on the gradients that are there. Nothing of them was released"
    )


@contextmanager
def without_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Nothing is differentiated within: no graph is recorded, and of one from before no gradient arrives.

    Args:
        parameters: at which none arrives, of whatever graph.

    Raises:
        PrivacyError: from within, where something would be.
    """
    hooked: list[dict[Any, Any]] = []
    try:
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter._backward_hooks is None:
                    # What holds hooks stays with the parameter; to fill it costs a tenth of registering one.
                    parameter.register_hook(_refuse_gradients).remove()
                hooks: Any = parameter._backward_hooks
                hooks[_UPDATE] = _refuse_gradients
                hooked.append(hooks)
        with saved_tensors_hooks(_refuse_gradients, _refuse_gradients):
            yield
    finally:
        for hooks in hooked:
            hooks.pop(_UPDATE, None)


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
        if hooks[0] is _refuse_gradients:
            _refuse_gradients()
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
