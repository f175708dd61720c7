"""What no mode of torch sees: code behind torch's own functions, scripted functions, other ways of gradients."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level
from torch._functorch import eager_transforms, vmap
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from clipless_dp.errors import PrivacyError, Unsupported, UnsupportedModuleError
from clipless_dp.isolation.functions import GATES
from clipless_dp.isolation.normalisations import GatedGroupNorm, GatedLayerNorm
from clipless_dp.isolation.recurrence import GatedRecurrence
from clipless_dp.tensor_types import coded_in, computes, dispatches, is_of

_GATES = (*GATES, GatedLayerNorm, GatedGroupNorm, GatedRecurrence)
_UNGATED = {cast(Any, gate)._backward_cls: gate.ungated for gate in _GATES}
_NUMBERS = {bool, int, float, complex}


_TRUSTED = ("builtins", "torch", "numpy", "enum")
_ACTING = {
    "__index__", "__int__", "__float__", "__complex__", "__bool__", "__len__", "__iter__", "__next__", "__getitem__",
    "__contains__", "__eq__", "__hash__", "__getattr__", "__getattribute__", "__array__", "__array_interface__",
    "__cuda_array_interface__", "__dlpack__",
}  # fmt: skip
"""What functions of torch call of the arguments that they are given."""


def runs_own_code(kind: type) -> bool:
    """Whether a function of torch that is given a type, or a tensor of it, may run code which is not torch's.

    What ``__torch_dispatch__`` is handed are the values of all samples, whosever code it is.
    """
    if issubclass(kind, Tensor):
        return dispatches(kind) or computes(kind)
    return kind not in _NUMBERS and not is_of(kind, ("torch",))


@cache
def acts(kind: type) -> bool:
    """Whether a value of a type, no tensor, runs code of its own where a function of torch reads it as an argument."""
    if hasattr(kind, "__next__"):
        return True
    return any(_ACTING & vars(base).keys() for base in kind.__mro__ if not is_of(base, _TRUSTED))


def refuse_coded_tensors(net: nn.Module) -> None:
    """Refuses parameters and buffers of types with code of their own.

    Raises:
        UnsupportedModuleError: names them.
    """
    remedy = (
        "it is a tensor of a type with code of its own (__torch_dispatch__, __torch_function__), which may see all "
        "samples at once: replace it by a plain tensor, dequantised say"
    )
    parts = [Unsupported(name, kind, remedy) for name, kind in coded_in(net, placed=False)]
    if parts:
        raise UnsupportedModuleError(parts, isolated=True)


def foreign_mode(length: int, at: Callable[[int], Any]) -> str | None:
    """The first mode of a stack, given its length and its entries, that is neither torch's nor this package's."""
    for index in range(length):
        kind = type(at(index))
        if kind.__module__.partition(".")[0] not in ("torch", "clipless_dp"):
            return f"{kind.__module__}.{kind.__qualname__}"
    return None


_SCRIPTED = (
    "the network calls a scripted or traced function (torch.jit), whose operations run unseen: use the function that "
    "it was made of"
)
_UNSEEN = (
    "the network turns off what sees the functions that it calls (torch._C.DisableTorchFunction): call them without it"
)
_BRANCHED = (
    "the network branches on values of a sample (torch.cond), which no run for many samples can: use torch.where"
)
UNWRAPPED = "the network reads the batch that its sample is of (debug_unwrap), in which samples meet: leave it out"
PACKING = (
    "what is saved for the way back is packed (saved_tensors_hooks, save_on_cpu, a checkpoint around the whole model), "
    "which sees all samples at once: leave it out. To save memory checkpoint parts of the network, by "
    "gradient_gated(net, checkpoint=...) or torch.utils.checkpoint.checkpoint within it, or use micro-batches"
)
_REFUSED: tuple[tuple[Any, str, str], ...] = (
    (torch._C.ScriptFunction, "__call__", _SCRIPTED),
    (torch._C.ScriptMethod, "__call__", _SCRIPTED),
    (CheckpointFunction, "apply", PACKING),
    (eager_transforms, "get_unwrapped", UNWRAPPED),
    (torch._C._functorch, "get_unwrapped", UNWRAPPED),
    (torch._C, "DisableTorchFunction", _UNSEEN),
    (torch, "cond", _BRANCHED),
)


_LOOKED_UP = "__dynamo_disable"
"""Where what keeps compilers out of ``checkpoint`` looks for what to run."""

_within: Counter[int] = Counter()
_lock = threading.Lock()
_undo = ExitStack()


@contextmanager
def nothing_unseen(checkpointed: Callable[..., Any]) -> Iterator[None]:
    """Within, this thread is refused what would go around the mode; others are not.

    Args:
        checkpointed: what runs in place of ``torch.utils.checkpoint.checkpoint``, of all threads.

    Raises:
        PrivacyError: a scripted or traced function is called, or a value unwrapped.
    """
    ours = threading.get_ident()
    with _lock:
        if not _within.total():
            for owner, name, message in _REFUSED:
                _refuse(owner, name, message)
            original = vmap.vmap_increment_nesting
            _replace(vmap, "vmap_increment_nesting", lambda *args: _above(original, *args))
            _replace_checkpoint(checkpointed)
        _within[ours] += 1
    try:
        yield
    finally:
        with _lock:
            _within[ours] -= 1
            if not _within.total():
                _within.clear()
                _undo.close()


def _refuse(owner: Any, name: str, message: str) -> None:
    original = getattr(owner, name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if not _within[threading.get_ident()] and not (maybe_current_level() is None and any(map(_is_of_run, args))):
            return original(*args, **kwargs)
        raise PrivacyError(message)

    _replace(owner, name, refuse)


def _replace_checkpoint(by: Callable[..., Any]) -> None:
    """Runs another function in place of torch's, by whatever name it is called: its decorator looks it up each time.

    Where a version of torch has another decorator, torch's own runs, which is refused as it sets hooks.
    """
    plain = getattr(checkpoint, "__wrapped__", None)
    if plain is None:
        return
    # Not there before the first call.
    original = getattr(plain, _LOOKED_UP, plain)

    def instead(*args: Any, **kwargs: Any) -> Any:
        return (by if _within[threading.get_ident()] else original)(*args, **kwargs)

    if original is plain:
        setattr(plain, _LOOKED_UP, instead)
        _undo.callback(delattr, plain, _LOOKED_UP)
    else:
        _replace(plain, _LOOKED_UP, instead)


def _is_of_run(value: Any) -> bool:
    """Whether a value, in a thread without a transform, is of one in another thread."""
    return isinstance(value, Tensor) and is_functorch_wrapped_tensor(value)


def _replace(owner: Any, name: str, by: Any) -> None:
    original, inherited = getattr(owner, name), name not in vars(owner)
    setattr(owner, name, by)
    if inherited:
        _undo.callback(delattr, owner, name)
    else:
        _undo.callback(setattr, owner, name, original)


@contextmanager
def _above(original: Any, batch_size: int, randomness: str) -> Iterator[int]:
    """A transform of another thread begins above the level of ours, so that it takes no value of ours for its own."""
    with ExitStack() as stack:
        if not _within[threading.get_ident()] and maybe_current_level() is None:
            stack.enter_context(original(1, "same"))
        yield stack.enter_context(original(batch_size, randomness))


def refuse_other_ways(
    output: Tensor, sources: Mapping[str, Tensor], inputs: Iterable[Tensor], names: Mapping[int, str]
) -> None:
    """Walks the graph behind an output: to what takes gradients, they come through gates alone.

    Args:
        output: of all samples.
        sources: what stands for the trainable parameters, by name.
        inputs: of the network.
        names: of the parameters themselves, by ``id``.

    Raises:
        PrivacyError: a parameter is used past its gate, or something else takes gradients.
    """
    edge = torch.autograd.graph.get_gradient_edge
    ours = {(found.node, found.output_nr): name for name, source in sources.items() for found in (edge(source),)}
    ends = {(found.node, found.output_nr) for value in inputs if value.requires_grad for found in (edge(value),)}
    beyond = {node for node, _ in [*ours, *ends]}
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for slot, following in enumerate(node.next_functions):
            behind, _ = following
            if behind is None:
                continue
            name = ours.get(following)
            if name is not None:
                # The first tensors of each gate are not gated: what a layer reads, or what tells samples apart.
                if slot < _UNGATED.get(type(node), slot + 1):
                    raise PrivacyError(
                        f"the parameter {name!r} is used past its gate, by {type(node).__name__}: use it in the "
                        "network's forward through functions of torch"
                    )
            elif following in ends:
                continue
            elif behind in beyond:
                raise PrivacyError("a gradient leaves the network through a value that is none of its inputs")
            elif (variable := getattr(behind, "variable", None)) is not None:
                found = names.get(id(variable))
                raise PrivacyError(
                    f"the tensor {'of shape ' + str(tuple(variable.shape)) if found is None else repr(found)} takes "
                    "gradients without a gate: make it a parameter of the network before it is wrapped, or detach it"
                )
            else:
                stack.append(behind)
