"""What is in force in the whole process and may change what a network computes: hooks and modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as modules

from clipless_dp.errors import PrivacyError
from clipless_dp.isolation.hidden import foreign_mode
from clipless_dp.model import nodes

_UPDATE = "_clipless_dp_update"
"""By which the hooks of a parameter know that of :func:`without_gradients`."""


def _refuse_gradients(*_: object) -> NoReturn:
    raise PrivacyError(
        "the base optimizer, or a hook of it, calls the network or computes gradients within its step, or where "
        "another call goes on to it (load_state_dict(), train()), as one that passes batches by itself does (GSAM, SAM "
        "with a closure of its own, MeZO, a line search): what that says of them would go into the weights without "
        "noise and without charge. Look at outputs outside of such calls. Take a first-order optimizer that steps on "
        "the gradients that are there. Nothing of them was released"
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
                    nodes.put(parameter.register_hook, _refuse_gradients).remove()
                hooks: Any = parameter._backward_hooks
                hooks[_UPDATE] = _refuse_gradients
                hooked.append(hooks)
        with saved_tensors_hooks(_refuse_gradients, _refuse_gradients):
            yield
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):
            # By which torch.func says that it does without them.
            _refuse_gradients()
        raise
    finally:
        for hooks in hooked:
            hooks.pop(_UPDATE, None)


class _NoPasses:
    """A hook on all modules by which those of one network refuse calls of this thread.

    Args:
        net: the network.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._thread = get_ident()

    def __call__(self, module: nn.Module, inputs: object) -> None:
        if get_ident() == self._thread and any(
            module is part and "parametrizations" not in name.split(".") for name, part in self._net.named_modules()
        ):
            # To read a weight that others are computed from calls its parametrization.
            _refuse_gradients()


@contextmanager
def without_passes(net: nn.Module) -> Iterator[None]:
    """No module of a network is called within, as two passes without gradients would measure a slope.

    Raises:
        PrivacyError: from within, where one is.
    """
    handle = modules.register_module_forward_pre_hook(_NoPasses(net))
    try:
        yield
    finally:
        handle.remove()


def _has_foreign_hook() -> bool:
    """Whether a global module hook is registered, other than those of steps of other threads."""
    if not modules._has_any_global_hook():
        return False
    ours = sum(isinstance(hook, _NoPasses) for hook in [*modules._global_forward_pre_hooks.values()])
    others = modules._global_backward_pre_hooks, modules._global_backward_hooks, modules._global_forward_hooks
    return any(others) or len(modules._global_forward_pre_hooks) > ours


def refuse_modes() -> None:
    """Refuses modes that run in place of what a pass, or a step, computes.

    Raises:
        PrivacyError: a function or dispatch mode other than torch's own is in force.
    """
    for length, at in (
        (torch._C._len_torch_function_stack(), torch._C._get_function_stack_at),
        (torch._C._len_torch_dispatch_stack(), torch._C._get_dispatch_stack_at),
    ):
        foreign = foreign_mode(length, at)
        if foreign is not None:
            raise PrivacyError(
                f"the mode {foreign} is in force, which may change what is computed: leave it around the "
                "passes of a wrapped model and the steps of its optimizer"
            )


def refuse_interference() -> None:
    """Refuses what may change values or gradients within a pass, anywhere in the process.

    Raises:
        PrivacyError: a global module hook, a function or dispatch mode, or a hook on saved tensors is in force, or
            the model is called through DDP. Modes of torch itself, activation checkpointing and ``save_on_cpu`` are let
            through.
    """
    if _has_foreign_hook():
        raise PrivacyError(
            "a global module hook is registered (torch.nn.modules.module.register_module_…_hook, as FlopCounterMode "
            "does), which may change what the network computes: remove it around the passes of a wrapped model, and "
            "count operations of model.net"
        )
    refuse_modes()
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
