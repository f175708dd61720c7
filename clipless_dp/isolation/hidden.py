"""What no mode of torch sees: code behind torch's own functions, scripted functions, and the batch behind a sample."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms

from clipless_dp.errors import PrivacyError

_NUMBERS = {bool, int, float, complex}
_INHERITED = {Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl}  # type: ignore[attr-defined]


@cache
def runs_own_code(kind: type) -> bool:
    """Whether a function of torch that is given a type may run code which is not torch's."""
    if kind in _NUMBERS or _is_torchs(kind):
        return False
    if issubclass(kind, Tensor):
        found = kind.__torch_function__
        return getattr(found, "__func__", found) not in _INHERITED
    return True


def _is_torchs(kind: type) -> bool:
    """Whether a type is where it says that it is, in a module of torch."""
    if kind.__module__.partition(".")[0] != "torch":
        return False
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


_SCRIPTED = (
    "the network calls a scripted or traced function (torch.jit), whose operations run unseen: use the function that "
    "it was made of"
)
_UNWRAPPED = "the network reads the batch that its sample is of (debug_unwrap), in which samples meet: leave it out"
_REFUSED: tuple[tuple[Any, str, str], ...] = (
    (torch._C.ScriptFunction, "__call__", _SCRIPTED),
    (torch._C.ScriptMethod, "__call__", _SCRIPTED),
    (eager_transforms, "get_unwrapped", _UNWRAPPED),
    (torch._C._functorch, "get_unwrapped", _UNWRAPPED),
)


@contextmanager
def nothing_unseen() -> Iterator[None]:
    """Within, this thread is refused what would go around the mode.

    Raises:
        PrivacyError: a scripted or traced function is called, or a value unwrapped.
    """
    with ExitStack() as stack:
        for owner, name, message in _REFUSED:
            stack.enter_context(_refused(owner, name, message))
        yield


@contextmanager
def _refused(owner: Any, name: str, message: str) -> Iterator[None]:
    ours, original = threading.get_ident(), getattr(owner, name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != ours:
            return original(*args, **kwargs)
        raise PrivacyError(message)

    setattr(owner, name, refuse)
    try:
        yield
    finally:
        setattr(owner, name, original)
