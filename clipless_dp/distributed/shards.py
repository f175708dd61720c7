"""Models of which each process holds a part: what ``fully_shard`` may split, how parts add up, when they are whole."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from clipless_dp.distributed.ranks import copy_from_, from_first, on_any, together, world
from clipless_dp.distributed.units import groups, is_sharded, units_of
from clipless_dp.errors import ConfigurationError, PrivacyError, RankError
from clipless_dp.modules import is_hooked

Value = TypeVar("Value")


def check_shards(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Makes sure that each entry of each gradient is on one rank only, summed without loss over all of them.

    Raises:
        ConfigurationError: the whole model is no unit, parameters are replicated or left out or elsewhere, or passes or
            sums are in a lower precision, or a unit is hooked or made of several modules.
    """
    units = list(units_of(model))
    if not is_sharded(model):
        refuse_partly_sharded()
    for parameter in parameters:
        placements: Any = getattr(parameter, "placements", ())
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is None or mesh.size() != world().size or len(placements) != 1 or not placements[0].is_shard():
            raise ConfigurationError(
                "a parameter is whole or repeated on some ranks, where its noise would be drawn more than once: call "
                "fully_shard, for each part and the model, with a one-dimensional mesh of all ranks and without "
                "ignored_params"
            )
    for path, unit in units:
        where = path or "the model"
        try:
            state = unit._get_fsdp_state()
            policy, modules = state._mp_policy, state._modules
            lowered = {policy.param_dtype, policy.reduce_dtype, policy.output_dtype} - {None}
            gathered_together = groups(unit)
            offloaded = any(some.offload_to_cpu for group in gathered_together for some in group.fsdp_params)
            altered = any(group._all_reduce_hook is not None for group in gathered_together)
        except AttributeError as error:
            raise ConfigurationError(
                f"this version of torch shards in a way that is not known here ({error})"
            ) from error
        if lowered:
            raise ConfigurationError(
                f"bounds do not cover lower precision: call fully_shard on {where} without an mp_policy"
            )
        if offloaded:
            raise ConfigurationError(
                f"{where} moves its parts to main memory after each pass, which is not supported: call fully_shard "
                "without an offload_policy"
            )
        if len(modules) != 1:
            raise ConfigurationError(
                f"{where} is sharded together with other modules: call fully_shard on each, or on one that holds them"
            )
        if altered or (unit is not model and is_hooked(unit, besides=state)):
            raise ConfigurationError(f"hooks on {where} may change values or gradients: remove them")


def refuse_partly_sharded() -> NoReturn:
    """Refuses a model that is no unit, though parts of it are.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(
        "only parts of the model are sharded: call fully_shard(model) last, on the whole, so that the rest is, too"
    )


def layout(model: nn.Module) -> list[object]:
    """Which rank holds which part of each parameter, and what is gathered together: plain values to compare."""
    named: Iterable[tuple[str, Any]] = model.named_parameters()
    split = [(n, str(p.placements), p.device_mesh.mesh.tolist()) for n, p in named if hasattr(p, "placements")]
    return [*split, *(path for path, _ in units_of(model))]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a split tensor, sharing its memory; others are returned as they are."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def held(parameter: Tensor) -> Tensor:
    """A parameter, or of a split one this rank's part, detached: what is stamped."""
    return local(parameter.detach()) if hasattr(parameter, "placements") else parameter


def sum_shards_(model: nn.Module) -> None:
    """Makes each backward pass of a sharded model add the *sum* over the ranks, not the mean, to each rank's part.

    Raises:
        ConfigurationError: torch is too old for that.
    """
    try:
        model.set_is_last_backward(True)  # type: ignore[operator]
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
        for _, unit in units_of(model):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    except AttributeError as error:
        raise ConfigurationError(f"this version of torch cannot sum sharded gradients ({error}): update it") from error


def require_sums(model: nn.Module) -> None:
    """Makes sure that gradients are sums over the ranks, and none waits to be summed, which a later step would find.

    Raises:
        PrivacyError: some are not, or wait; all are dropped.
    """
    amiss = False
    for _, unit in units_of(model):
        amiss |= not unit._get_fsdp_state()._state_ctx.is_last_backward
        for group in groups(unit):
            # ``None`` before the first pass.
            amiss |= group.gradient_divide_factor not in (None, 1.0)
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                if parameter.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
                    amiss, parameter.unsharded_accumulated_grad = True, None
                    if whole is not None:
                        whole.grad = None
    if amiss:
        for parameter in model.parameters():
            parameter.grad = None
        raise PrivacyError(
            "gradients of a backward pass were not summed over the ranks, or scaled: leave set_requires_gradient_sync, "
            "set_is_last_backward and set_gradient_divide_factor alone. They are dropped; nothing was released"
        )


@contextmanager
def passing() -> Iterator[None]:
    """Passes within gather and sum parts of the model: says so where another rank is gone.

    Raises:
        RankError: the ranks could not communicate. Other errors pass as they are.
    """
    try:
        yield
    except RuntimeError as error:
        frames = traceback.walk_tb(error.__traceback__)
        if not any(Path(frame.f_code.co_filename).name == "distributed_c10d.py" for frame, _ in frames):
            raise
        with together("a part of the model, or of its gradients,"):
            raise


def split(joined: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this rank holds of another one, as a tensor that is split alike."""
    from torch.distributed.tensor import DTensor, Replicate

    pattern: Any = like
    copies = DTensor.from_local(joined, pattern.device_mesh, [Replicate()], run_check=False)
    return copies.redistribute(placements=pattern.placements)


def whole(tensor: Tensor) -> Tensor:
    """A split tensor with the parts of all ranks, on each of them; others are returned as they are.

    Raises:
        RankError: another rank is gone.
    """
    if not hasattr(tensor, "placements"):
        return tensor
    parts: Any = tensor.detach()
    with together("the parts of the model"):
        return cast(Tensor, parts.full_tensor())


def change_wholes_(changes: Sequence[tuple[Callable[..., object], Sequence[Tensor]]]) -> None:
    """Changes split tensors as wholes: each is gathered, changed on one rank, and sent to all, which keep their parts.

    The ranks share the work, and what all of them hold then are parts of one result, whatever they compute with.

    Args:
        changes: functions, and the split tensors whose wholes they take; they change the first one in place.

    Raises:
        RankError: a function failed on another rank, whose own error says why, or another rank is gone.
    """
    here = world()
    for start in range(0, len(changes), here.size):
        group = changes[start : start + here.size]
        changed: Tensor | None = None
        failure: Exception | None = None
        for owner, (change, parts) in enumerate(group):
            wholes = [whole(part) for part in parts]
            if owner == here.rank:
                mine, changed = (change, wholes), wholes[0]
        if changed is not None:
            try:
                mine[0](*mine[1])
            except Exception as error:
                failure = error
        if on_any(failure is not None):
            raise failure or RankError("another rank could not project its weights, and its own error says why")
        for owner, (_, (target, *_)) in enumerate(group):
            sent = changed if changed is not None and owner == here.rank else None
            received = torch.empty(target.shape, dtype=target.dtype, device=target.device) if sent is None else sent
            copy_from_([received], owner)
            local(target).copy_(local(split(received, target)))


def gathered(state: Value) -> Value:
    """A state with whole tensors in place of those that are split, one after the other, in main memory of rank 0.

    Args:
        state: nested dictionaries and lists, in the same order on all ranks.

    Returns:
        On rank 0 the state; on the others whatever.

    Raises:
        RankError: another rank is gone.
    """

    def kept(tensor: Tensor, place: tuple[Any, ...]) -> Tensor | None:
        joined = whole(tensor)
        return joined if joined is tensor else joined.cpu() if world().rank == 0 else None

    return cast(Value, _mapped(kept, state))


def scattered(make: Callable[[], Value], like: Callable[[tuple[Any, ...]], Tensor | None]) -> Value:
    """What rank 0 makes, on all ranks, each of which keeps its own part of tensors: one after the other is sent.

    Args:
        make: called on rank 0 only; returns nested dictionaries and lists of tensors and plain values.
        like: given the keys of a tensor, the parameter that it is to be split like, or ``None``.

    Raises:
        RankError: it failed on rank 0, whose own error says why, or another rank is gone.
    """
    wholes: list[Tensor] = []

    def outlined(tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        wholes.append(tensor)
        return tensor.to("meta")

    def sent(outline: Tensor, place: tuple[Any, ...]) -> Tensor:
        joined = wholes.pop(0) if wholes else torch.empty_like(outline, device="cpu")
        copy_from_([joined])
        parameter = like(place)
        if parameter is None or parameter.shape != joined.shape or not hasattr(parameter, "placements"):
            return joined
        return split(joined.to(parameter.device), parameter)

    return cast(Value, _mapped(sent, from_first(lambda: _mapped(outlined, make()))))


def _mapped(change: Callable[[Tensor, tuple[Any, ...]], Any], value: Any, place: tuple[Any, ...] = ()) -> Any:
    """Changes the tensors in nested dictionaries, lists and tuples, given the keys that lead to each."""
    if isinstance(value, Tensor):
        return change(value, place)
    if isinstance(value, dict):
        return {key: _mapped(change, item, (*place, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, item, (*place, index)) for index, item in enumerate(value)])
    return value
