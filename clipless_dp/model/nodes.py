"""Hooks on the nodes of a pass's autograd graph, which are none of its tensors' and change what no gate sees.

Torch counts the hooks that are put in Python, wherever that is. Only where others than this package have put some since
a pass began are its nodes asked, by a hook that is put there and removed: its handle knows the record of all hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from clipless_dp.errors import PrivacyError
from clipless_dp.graph.apart import inner_ends
from clipless_dp.uncompiled import uncompiled

_Handle = TypeVar("_Handle")

_own = 0
"""How many hooks this package has put."""

_LOG = "torch.autograd.graph"
"""Where the hooks of torch's own log are from."""


def put(register: Callable[[Any], _Handle], hook: Any) -> _Handle:
    """Registers a hook of this package's own.

    Args:
        register: what puts a hook and returns its handle.
        hook: the hook.
    """
    global _own
    _own += 1
    return register(hook)


def count() -> int:
    """How many hooks others have put in this process: as long as it is the same, they have put none."""
    return RemovableHandle.next_id - _own


def current() -> Any:
    """The node that a backward pass is at; ``None`` outside of one."""
    return torch._C._current_autograd_node()


def filling(parameter: Tensor) -> Any:
    """The node that fills a parameter's gradient. It outlives passes, and hooks on it may be older."""
    return torch.autograd.graph.get_gradient_edge(parameter).node


def weakly(node: Any) -> Callable[[], Any]:
    """A node for as long as it is there; those that torch writes in C++ are not followed, as they cannot be."""
    try:
        return ref(node)
    except TypeError:
        return lambda: None


@uncompiled
def refuse_hooked(*roots: Any, to_gates: bool = False) -> None:
    """Refuses nodes that have hooks, among those that a backward pass from these goes through.

    Of what fills gradients, which outlives passes, those that are named themselves.

    Args:
        roots: the first of them.
        to_gates: only those ahead of the outermost gates of passes.

    Raises:
        PrivacyError: one has.
    """
    for node in _reached(roots, to_gates):
        if _is_hooked(node):
            raise PrivacyError(
                f"a hook is on the node {node.name()!r} of a pass's autograd graph (register_hook or register_prehook "
                "of grad_fn and of what it leads to, or a backward hook of a module around the model): it may change "
                "what comes back, behind gates too, also where it is meant to look only. Put hooks on the model's "
                "outputs (outputs.register_hook), which may look. The gradients are dropped; nothing was released"
            )


def _reached(roots: Iterable[Any], to_gates: bool) -> Iterator[Any]:
    seen, left = set(), list(roots)
    while left:
        node = left.pop()
        if node is None or node in seen or (to_gates and node.name().startswith("_OutermostGate")):
            continue
        seen.add(node)
        yield node
        left += [below for below, _ in node.next_functions if not hasattr(below, "variable")]
        left += inner_ends(node)


def _is_hooked(node: Any) -> bool:
    for register in (node.register_prehook, node.register_hook):
        handle = put(register, _look)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks and any(getattr(hook, "__module__", None) != _LOG for hook in hooks.values()):
            return True
    return False


def _look(*_arrived: Any) -> None:
    """Changes nothing."""
