"""What a base optimizer holds: tensors, arrays and numbers in its state, and in all that is beside it, and where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from numbers import Number
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clipless_dp.optim.around import OF_TORCH, everything, nested, opened, per_class

Place = tuple[object, ...]
"""In what of the base optimizer, of which part of that, and under which name; and further within."""

Found = tuple[Place, object, Any]

Known = Mapping[int, object]
"""Parameters and gradients, by their identities."""


def bits_of(value: Any) -> object:
    """What tells an array, or bytes, from others."""
    if not isinstance(value, (np.ndarray, np.generic)):
        return bytes(value)
    array = np.asarray(value)
    return array.dtype.str, array.shape, array.tobytes()


@per_class
def is_array(kind: type) -> bool:
    """Whether values of a class are arrays, of whatever numbers, or bytes."""
    of_numpy = issubclass(kind, (np.ndarray, np.generic)) and not is_number(kind) and not issubclass(kind, np.str_)
    return of_numpy or issubclass(kind, (bytes, bytearray, memoryview))


@per_class
def is_number(kind: type) -> bool:
    """Whether values of a class are numbers."""
    return issubclass(kind, (Number, np.number, np.bool_))


def values_of(optimizer: Optimizer) -> Iterator[Found]:
    """Tensors and numbers of the states of all optimizers that take part."""
    for number, one in enumerate(everything(optimizer)):
        yield from own_of(one, number)


def own_of(optimizer: Optimizer, number: int = 0, *, whole: bool = True) -> Iterator[Found]:
    """Tensors and numbers of one state: where they are, of which parameter, and they.

    Whole: with what tensors have beside their numbers, which a plain optimizer does not read.
    """
    known: Known | None = None
    for key, held in optimizer.state.items():
        place = "the state", (number, key if isinstance(key, str) else id(key))
        for name, value in held.items() if isinstance(held, dict) else (("", held),):
            if type(value) in _ORDINARY:
                yield (*place, name), key, value
                if whole and type(value) is Tensor and ((value.is_leaf and value.grad is not None) or vars(value)):
                    known = known or _known([optimizer])
                    yield from within((*place, name), key, value, known)
            else:
                known = known or (_known([optimizer]) if whole else None)
                yield from within((*place, name), key, value, known)


_ORDINARY = frozenset({Tensor, bool, int, float})


def rest_of(optimizer: Optimizer, *, gradients: bool = False) -> Iterator[Found]:
    """All that is beside an optimizer's own state: states within, and tensors in attributes, parameters and groups.

    With parameters' gradients where one of these holds them, or without: a step has them noised before it is taken.
    """
    optimizers = nested(optimizer)
    for number, some in enumerate(optimizers):
        if some is not optimizer:
            yield from own_of(some, number)
    # Which are as private.
    known = _known(optimizers, gradients=not gradients)
    parameters = {id(one): one for some in optimizers for group in some.param_groups for one in group["params"]}
    places: list[tuple[Place, object, Mapping[str, Any]]] = []
    for number, some in enumerate(optimizers):
        places.append((("an attribute", number), None, {k: v for k, v in vars(some).items() if k not in OF_TORCH}))
        places += [((GROUP, (number, at)), None, group) for at, group in enumerate(some.param_groups)]
    places += [(("an attribute of a parameter", key), one, one.__dict__) for key, one in parameters.items()]
    for place, owner, held in places:
        for name, value in held.items():
            if _is_kept(type(value)) and name != "params":
                yield from _beside((*place, name), owner, value, known)


def _beside(place: Place, owner: object, value: Any, known: Known) -> Iterator[Found]:
    """What counts in an attribute or an entry of a group: all but a few numbers, and what is known."""
    numbers = []
    for found in within(place, owner, value, known, settings=True):
        if _size(found[2]) > 1:
            yield found
        else:
            numbers.append(found)
    if len(numbers) > SETTINGS:
        yield from numbers


GROUP = "a group"
SETTINGS = 4
"""How many numbers an attribute or an entry of a group may have that change from step to step, as three betas do."""


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    return 1 if is_number(type(value)) else np.size(value) if isinstance(value, np.ndarray) else 2


@per_class
def _is_kept(kind: type) -> bool:
    return issubclass(kind, Tensor) or is_array(kind) or opened(kind) is not None


def within(
    place: Place,
    key: object,
    value: Any,
    known: Known | None,
    around: tuple[int, ...] = (),
    *,
    settings: bool = False,
) -> Iterator[Found]:
    """Tensors, arrays and numbers within; where numbers are settings, those of objects and modules are left out.

    ``known`` are parameters and gradients, which are not looked into; ``None``: no tensor is.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        is_known = known is not None and id(value) in known
        if not (settings and is_known):
            yield place, key, value
        if is_known or known is None or kind not in (Tensor, nn.Parameter):
            return
        held = [*vars(value).items(), *((("grad", value.grad),) if value.is_leaf else ())]
    elif is_number(kind) or (is_array(kind) and not (isinstance(value, np.ndarray) and value.dtype.hasobject)):
        yield place, key, value
        return
    elif id(value) in around or _wrapped.get(id(value)) is value:
        return
    elif (parts := opened(kind)) is not None:
        held = [*parts(value)]
    elif isinstance(value, (Optimizer, type)) or callable(value):
        return
    else:
        held = [(name, one) for name, one in _attributes(value) if not (settings and is_number(type(one)))]
    for name, one in held:
        if one is not None:
            yield from within((*place, name), key, one, known, (*around, id(value)), settings=settings)


def _attributes(value: object) -> Iterable[tuple[str, Any]]:
    return getattr(value, "__dict__", {}).items()


_wrapped: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
"""Networks that private optimizers are made for, with all modules of theirs, which base optimizers may know."""


def know(model: nn.Module) -> None:
    """A network is one that is trained: what its modules hold is none of an optimizer's."""
    _wrapped.update((id(module), module) for module in model.modules())


def _known(optimizers: Iterable[Optimizer], *, gradients: bool = True) -> dict[int, Any]:
    parameters = {id(one): one for some in optimizers for group in some.param_groups for one in group["params"]}
    return {**parameters, **{id(one.grad): one.grad for one in parameters.values() if gradients}}


def as_tensor(value: Any) -> Tensor:
    """Numbers that torch compares; a copy of arrays, since those of some kinds and strides are none of torch's."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return torch.zeros(())
        if value.is_nested:
            return torch.cat([part.flatten() for part in value.unbind()])
        if value.is_quantized:
            return value.dequantize()
        return value if value.layout is torch.strided else value.to_dense()
    array = np.asarray(value) if isinstance(value, (np.ndarray, np.generic)) else np.array([*bytes(value)], np.uint8)
    if array.dtype.kind not in "fiubc":
        array = np.array([*array.tobytes()], np.uint8)
    return torch.from_numpy(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))


_OF_NUMBERS = (Tensor, nn.Parameter, getattr(nn, "Buffer", Tensor))
"""Others may have their numbers elsewhere, as 8-bit moments do."""


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in one memory, and can be read there."""
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    return plain and not tensor.is_meta and type(tensor) in _OF_NUMBERS


def are_same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have the same shape and numbers, whatever their dtype."""
    if not (is_dense(one) and is_dense(other)):
        one, other = as_tensor(one), as_tensor(other)
    return one.shape == other.shape and are_equal(one, other)


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape have the same numbers; of NaN none is."""
    with torch.no_grad():
        return bool((one.detach() == other.detach().to(one.device, one.dtype)).all())
