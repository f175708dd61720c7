"""Walks over modules and their parameters, and what a module is: its kind, its hooks, device and dtype."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clipless_dp.errors import ConfigurationError, PrivacyError


def kind_of(module: nn.Module) -> type[nn.Module]:
    """A module's type without what torch's ``fully_shard`` mixes in, which gathers parameters and computes nothing."""
    own, *bases = type(module).__mro__
    mixed = bases[0].__name__ == "FSDPModule" and bases[0].__module__.startswith("torch.distributed.")
    return bases[1] if mixed else own


class Unscripted:
    """Mixed into a module whose code ``torch.jit.script`` cannot compile: it is told what can be done instead."""

    def __prepare_scriptable__(self) -> Any:
        raise ConfigurationError(
            f"torch.jit.script does not compile {type(self).__name__}: record model.export_net() by torch.jit.trace or "
            "torch.export, which compute the same"
        )


def modules_of(net: nn.Module) -> list[nn.Module]:
    """What ``net.modules()`` yields, in its order, without a name for each: every step asks."""
    found: dict[nn.Module, None] = {net: None}
    # Of each module that is being looked into, the children that are left.
    left = [iter(net._modules.values())]
    while left:
        for child in left[-1]:
            if child is not None and child not in found:
                found[child] = None
                if child._modules:
                    left.append(iter(child._modules.values()))
                    break
        else:
            left.pop()
    return list(found)


def parameters_of(net: nn.Module) -> list[nn.Parameter]:
    """What ``net.parameters()`` yields, in its order, without a name for each: every step asks."""
    return parameters_in(modules_of(net))


def parameters_in(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that these modules hold themselves, each once."""
    found: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
    return list(found.values())


@contextmanager
def kept_modes(net: object) -> Iterator[list[nn.Module]]:
    """Yields a network's modules, none of what is no network; behind it each is in the mode that it was in before.

    A network's own ``train()`` brings all of them into one, those too that were frozen by ``eval()`` while it trains.
    """
    found = modules_of(net) if isinstance(net, nn.Module) else []
    # A network of which nothing is known is no part of what runs it, which takes its parts alone.
    hidden = [module.__dict__["__wrapped__"] for module in found if "__wrapped__" in module.__dict__]
    modes = [(module, module.training) for module in (*found, *hidden)]
    try:
        yield found
    finally:
        for module, training in modes:
            module.training = training


def is_hooked(leaf: nn.Module, *, besides: object = None) -> bool:
    """Whether hooks, or a forward set on the instance, may change a module's values or its parameters' gradients.

    Args:
        leaf: the module.
        besides: hooks that are methods of this object are known and left out.
    """
    if runs_hooks(leaf):
        kinds = (leaf._forward_hooks, leaf._forward_pre_hooks, leaf._backward_hooks, leaf._backward_pre_hooks)
        owners = {getattr(hook, "__self__", None) for hooks in kinds for hook in hooks.values()}
        if "forward" in vars(leaf) or besides is None or owners != {besides}:
            return True
    return bool(leaf._parameters or leaf._modules) and any(map(has_hooks, parameters_of(leaf)))


def runs_hooks(module: nn.Module) -> bool:
    """Whether a call of a module runs hooks, or a forward set on the instance, or a compiled one."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def has_hooks(parameter: Tensor) -> bool:
    """Whether hooks may change a parameter's gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def buffers_of(net: nn.Module) -> dict[str, Tensor]:
    """The buffers that files of a network hold, by name."""
    found: dict[str, Tensor] = {}
    if not any(module._buffers for module in modules_of(net)):
        # Every step asks.
        return found
    for path, module in net.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}".lstrip(".")] = buffer
    return found


def bits_of(value: Tensor) -> int:
    """128 bits of a hash of a tensor's numbers and shape, the same in every layout in memory and on every device."""
    found = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)} {value.layout}".encode(), digest_size=16)
    if value.device.type != "meta":
        for part in parts_of(value.detach()):
            held = part.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            found.update(held.view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest(), "little")


def parts_of(value: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's numbers, and where these are."""
    if value.is_quantized:
        return [value.int_repr(), *_scales_of(value)]
    if value.is_nested:
        return [part for one in value.unbind() for part in parts_of(one)]
    if value.layout == torch.sparse_coo:
        # Of one that is not coalesced the parts as they are, which is more than its numbers tell.
        return [value._indices(), value._values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    return [value if value.layout == torch.strided else value.to_dense()]


def _scales_of(value: Tensor) -> list[Tensor]:
    """What a quantised tensor's codes are multiplied by and counted from, which are numbers as well."""
    if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)]
    axis = torch.tensor([value.q_per_channel_axis()])
    return [value.q_per_channel_scales(), value.q_per_channel_zero_points(), axis]


def parameter_device_and_dtype(net: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a network's parameters.

    Raises:
        ConfigurationError: they are spread over several, or the dtype is neither float32 nor float64.
    """
    kinds = {(parameter.device, parameter.dtype) for parameter in parameters_of(net)} or {
        (torch.device("cpu"), torch.float32)
    }
    if len(kinds) != 1:
        listed = ", ".join(sorted(f"{device}/{dtype}" for device, dtype in kinds))
        raise ConfigurationError(f"the network's parameters must share one device and one dtype, found {listed}")
    ((device, dtype),) = kinds
    if dtype not in (torch.float32, torch.float64):
        raise ConfigurationError(
            f"parameters must be float32 or float64, got {dtype}: the bounds do not cover coarser rounding"
        )
    return device, dtype


def digest_of(net: nn.Module) -> str:
    """A hash of a network's parameters and buffers, their names and shapes, the same on every device."""
    found = hashlib.sha256()
    for name, value in net.state_dict().items():
        if isinstance(value, Tensor):
            held = value.detach().cpu().contiguous()
            found.update(f"{name} {held.dtype} {tuple(held.shape)} ".encode())
            found.update(held.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def state_of(net: nn.Module) -> dict[str, Any]:
    """The parameters and persistent buffers of a network, by name, for a file.

    Raises:
        PrivacyError: its ``state_dict`` holds something else, as ``get_extra_state`` of a layer adds it, or a hook puts
            it in place of a parameter: nothing is known of what that keeps of samples.
    """
    state: dict[str, Any] = net.state_dict()
    named = saved_of(net)
    if other := sorted((state.keys() - named.keys()) | (state.keys() & beside_of(named, state).keys())):
        raise PrivacyError(
            f"the network's state holds {', '.join(map(repr, other))} beside parameters and buffers: what a layer "
            "keeps of samples would be in the file without noise. Leave get_extra_state and hooks of state_dict out"
        )
    return state


def saved_of(net: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The parameters and persistent buffers of a network, by the names that its state gives them behind a prefix."""
    found = {**dict(net.named_parameters(remove_duplicate=False)), **buffers_of(net)}
    return {f"{prefix}{name}": value for name, value in found.items()}


def beside_of(
    named: Mapping[str, Tensor], state: Mapping[str, Any], prefix: str = "", others: Collection[str] = ()
) -> dict[str, str | None]:
    """What a state holds beside parameters and persistent buffers.

    What lies in the memory of one of these, or is equal to one, is no such thing, whatever it is called: hooks rename,
    move and cast.

    Args:
        named: parameters and buffers, see :func:`saved_of`.
        state: what a ``state_dict`` returned, of other modules too.
        prefix: what names begin with there.
        others: names there that are of other modules.

    Returns:
        By names, without the prefix, something that is the same for the same content; ``None`` where nothing tells.
        What ``_metadata`` says of modules is among it, and attributes of the state, but for a version 1.
    """
    memory = {place for value in named.values() if (place := _storage(value)) is not None}
    entries = {name.removeprefix(prefix): value for name, value in state.items() if name not in others}
    found = {name: value for name, value in entries.items() if not _is_held(value, name, named, memory)}
    told = {f"{name} of the state": value for name, value in getattr(state, "__dict__", {}).items()}
    for path, version in told.pop("_metadata of the state", {}).items():
        if f"{path}.".startswith(prefix) and _content(version) != _content({"version": 1}):
            found[f"{path[len(prefix) :]} (metadata)".lstrip()] = version
    return {name: _content(value) for name, value in (found | told).items()}


def _storage(value: Any) -> tuple[int, torch.device] | None:
    """Where a plain tensor's memory is."""
    if type(value) in (Tensor, nn.Parameter):
        with suppress(RuntimeError, NotImplementedError):
            return value.untyped_storage().data_ptr(), value.device
    return None


def _is_held(
    value: object, name: str, named: Mapping[str, Tensor], memory: Collection[tuple[int, torch.device]]
) -> bool:
    if not isinstance(value, Tensor):
        return False
    place = _storage(value)
    if place is None:
        # Parts of sharded parameters, sparse ones.
        kinds = (type(named[name]), type(named[name].detach())) if name in named else ()
        return type(value) in kinds and value.layout == named[name].layout
    if place in memory:
        return True
    if value.untyped_storage().nbytes() > value.numel() * value.element_size():
        return False
    with suppress(RuntimeError, NotImplementedError):
        return any(
            one.shape == value.shape and torch.equal(one.detach().to(value), value.detach()) for one in named.values()
        )
    return False


def _content(value: object) -> str | None:
    found, kinds = pytree.tree_flatten(value)
    told = hashlib.blake2b(repr(kinds).encode(), digest_size=16)
    try:
        for one in found:
            told.update(str(bits_of(one)).encode() if isinstance(one, Tensor) else pickle.dumps(one))
    except Exception:
        return None
    return told.hexdigest()
