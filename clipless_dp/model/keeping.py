"""What a loss of a user's own keeps from one call to the next: nothing that depends on the rows that it has seen.

Copies that were never called would show it, if they shared nothing with the loss. Objects that are found through a
module, a class or a cache are shared, and the first copy that is called changes them for all. So what is reachable is
compared before and after a call; what a loss makes for itself (a grid of the shape that comes, a number of calls) may
stay if copies of it make the same of other rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Set
from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from clipless_dp.errors import PrivacyError
from clipless_dp.losses import Loss
from clipless_dp.sampling import caches, memory
from clipless_dp.sampling.reach import ATOMS, package, reachable

Call = Callable[[Any, Tensor, Tensor], Any]
"""Calls a loss, or a method of it, on output and target."""

_SHARED = 1 << 20
"""Bytes of a tensor above which copies share it: one that changes is seen in the loss itself then."""

_OURS = __name__.partition(".")[0]


class Before:
    """What a loss reaches at one time, and what its caches hold then.

    Attributes:
        state: all of it.
        size: how many bytes were compared.
    """

    def __init__(self, loss: Any) -> None:
        self.state = _state(loss)
        self.size = self.state.size
        # With the caches, so that no other gets the identity of one.
        self._cached = [(cache, {caches.entry(key) for key, _ in caches.results(cache)}) for cache in _caches(loss)]

    def holds(self, loss: Any) -> bool:
        """Whether all is as it was, but for what cached functions were asked first and would return again."""
        known = {id(cache): kept for cache, kept in self._cached}
        return _state(loss) == self.state and all(
            _makes_again(cache, known.get(id(cache), set())) for cache in _caches(loss)
        )


def copied(loss: Loss) -> Loss | None:
    """A loss as it is before it has seen anything, with what its functions hold, if it can be copied."""
    memo: dict[int, Any] = {
        id(value): value for value in _tensors(loss) if value.numel() * value.element_size() > _SHARED
    }
    try:
        for value in list(vars(loss).values()):
            if isinstance(value, FunctionType):
                memo[id(value)] = _copied_function(value)
        return copy.deepcopy(loss, memo)
    except Exception:
        return None


def refuse_memory(loss: Loss, call: Call, output: Tensor, target: Tensor, before: Before | None = None) -> int:
    """Calls copies of a loss, or itself where there are none, and refuses one that keeps something of rows.

    Args:
        loss: the loss.
        call: of it, or of a method.
        output: ``(B, *output_shape)``, ``B`` at least 1.
        target: ``(B, ...)``.
        before: what it was before copies of it were called; by default as it is.

    Returns:
        How much there is to be compared.

    Raises:
        PrivacyError: what it reaches depends on the rows that came, or has changed in objects that copies share.
    """
    for part in _parts(loss):
        memory.refuse_refused(part, f"{loss!r}")
    if any(torch._C._functorch.is_batchedtensor(value) for value in _tensors(loss)):
        # Of rows that it was mapped over.
        raise _keeping(loss, [])
    before = before or Before(loss)
    with torch.no_grad():
        own = copied(loss)
        began = _state(loss if own is None else own)
        call(loss if own is None else own, output.clone(), target.clone())
        after = _state(loss if own is None else own)
        if not before.holds(loss):
            for part in _parts(loss):
                memory.note_refused(part)
            raise _keeping(loss, before.state.changes(_state(loss)))
        if own is not None and after != began and not _is_the_same_for_all(loss, call, output, target):
            raise _keeping(loss, began.changes(after))
    return before.size


def _is_the_same_for_all(loss: Loss, call: Call, output: Tensor, target: Tensor) -> bool:
    """Whether copies become the same, whatever rows of one number they see, and return the same after other numbers."""

    def after(*rows: tuple[Tensor, Tensor]) -> tuple[memory.State, Any] | None:
        own, returned = copied(loss), None
        try:
            for some, labels in rows:
                returned = call(own, some.clone(), labels.clone())
        except Exception:
            return None
        return _state(own), returned

    full = [*_others(output, target)]
    single = [(some[:1], labels[:1]) for some, labels in full]
    for several in (full, single):
        found = [one for rows in several if (one := after(rows)) is not None]
        # Of one content alone nothing tells whether another would make the same.
        if len(found) < 2 or any(state != found[0][0] for state, _ in found):
            return False
    # What is kept of each number of rows apart, as a cache does, is nothing that others read.
    first, later = after(full[0]), after(single[0], full[0])
    return first is not None and later is not None and _same(first[1], later[1])


def _others(output: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows, and others in their place: of numbers that lie in the same ranges, and labels that are there, or 0."""
    yield output, target
    yield 0.5 * output.flip(0), target.flip(0)
    yield torch.zeros_like(output), torch.zeros_like(target)
    yield 0.25 * output[:1].expand_as(output), target[:1].expand_as(target)
    yield 0.5 * output, torch.ones_like(target)


def _same(first: Any, second: Any) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or first.shape != second.shape:
        return first is None and second is None
    # The same operations on the same numbers; a factor that the number of rows is in would differ by a half.
    return torch.allclose(first.double(), second.double(), rtol=1e-6, atol=1e-9, equal_nan=True)


def _state(loss: Any) -> memory.State:
    return memory.State(_root(loss))


def _root(loss: Any) -> object:
    """What is to be walked from: losses of this package, whose objects are not looked into, by their attributes."""
    found: dict[int, Any] = {}
    waiting = [loss]
    while waiting:
        one = waiting.pop()
        found[id(one)] = opened = SimpleNamespace(**vars(one)) if package(type(one).__module__) == _OURS else one
        held = {id(value): value for value, *_ in reachable(opened) if isinstance(value, Loss)}
        waiting += [value for key, value in held.items() if key not in found]
    first, *others = found.values()
    return SimpleNamespace(**{"": first}, **{f"loss {place}": other for place, other in enumerate(others)})


def _parts(loss: Any) -> list[object]:
    """By what a loss is known again: itself, and the functions and objects that it calls."""
    return [loss, *(part for part in vars(loss).values() if callable(part))]


def _keeping(loss: Loss, changes: list[memory.Change]) -> PrivacyError:
    shown = f" ({memory.told(type(loss).__qualname__, changes)})" if changes else ""
    return PrivacyError(
        f"{loss!r} keeps a state that depends on the rows that it was called on{shown}: through it a sample may enter "
        "the gradients of others, as where the batch that came first decides a centre or a scale. Compute such a state "
        "from public data, or privately (clipless_dp.statistics), before training; leave out logs of losses and of "
        "rows, and timers; and keep nothing in classes, modules or objects that others share. Nothing was released"
    )


def _copied_function(function: FunctionType) -> FunctionType:
    """A function with copies of what it closes over, and of the lists, mappings and tensors that it finds globally."""
    while compiled := getattr(function, "_torchdynamo_orig_callable", None):
        # What a compiler makes of it is found globally by names that come later.
        function = compiled
    names, held = function.__code__.co_names, function.__globals__
    kept = {name: held[name] for name in names if isinstance(held.get(name), (list, dict, set, Tensor))}
    cells = tuple(CellType(_copied_value(cell.cell_contents)) for cell in function.__closure__ or ())
    made = FunctionType(
        function.__code__,
        {**held, **copy.deepcopy(kept)},
        function.__name__,
        copy.deepcopy(function.__defaults__),
        cells,
    )
    made.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__)
    made.__dict__.update(copy.deepcopy(function.__dict__))
    return made


def _copied_value(value: Any) -> Any:
    return _copied_function(value) if isinstance(value, FunctionType) else copy.deepcopy(value)


def _tensors(loss: Any) -> Iterator[Tensor]:
    return (value for value, *_ in reachable(_root(loss)) if isinstance(value, Tensor))


def _caches(loss: Any) -> list[Any]:
    return [*{id(value): value for value, *_ in reachable(_root(loss)) if isinstance(value, caches.CACHES)}.values()]


def _makes_again(cache: Any, known: Set[int]) -> bool:
    """Whether what a cache holds beside what it held is of arguments told by values, and what its function makes."""
    results = caches.results(cache)
    if len(results) != cache.cache_info().currsize:
        return False
    for key, result in results:
        if caches.entry(key) in known:
            continue
        arguments = key if type(key) is tuple else (key,)
        # Keywords follow an object that separates them; samples are no arguments that are told apart by their values.
        if cache.cache_parameters()["typed"] or not all(_is_told_by_value(one) for one in arguments):
            return False
        try:
            if memory.State(cache.__wrapped__(*arguments)) != memory.State(result):
                return False
        except Exception:
            return False
    return True


def _is_told_by_value(argument: Any) -> bool:
    return isinstance(argument, (*ATOMS, torch.dtype, torch.device)) or (
        isinstance(argument, tuple) and all(map(_is_told_by_value, argument))
    )
