"""Buffers that a pass must leave as they are: files hold them, or the next pass reads them, without any noise."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from accounting.errors import warn_caller
from clipless_dp.errors import PrivacyError, PrivacyWarning
from clipless_dp.interrupts import completed
from clipless_dp.isolation import Isolated
from clipless_dp.modules import kind_of, parts_of

_Place = tuple[str, dict[str, Any], str, bool]
"""What it is called, what holds it under which name, and whether a state has it."""


def _kind(part: nn.Module) -> type[nn.Module]:
    """Its type, without those that torch makes of it where it is split or parametrised."""
    return type(part).__mro__[1] if parametrize.is_parametrized(part) else kind_of(part)


_Modules = list[tuple[str, nn.Module]]
"""Those of a network, and what they are called, as ``named_modules()`` yields them."""


def _held(modules: _Modules) -> list[_Place]:
    """Where buffers are; but for what torch's parametrisations derive of weights, and what isolation looks after."""
    apart = [f"{path}." if path else "" for path, part in modules if isinstance(part, Isolated)]
    return [
        (f"{path}.{name}".lstrip("."), part._buffers, name, name not in part._non_persistent_buffers_set)
        for path, part in modules
        if not (isinstance(part, Isolated) or _kind(part).__module__.startswith("torch.nn.utils.parametrizations"))
        for name in part._buffers
        # What a network that runs sample by sample keeps for its next call is refused there.
        if name not in part._non_persistent_buffers_set or not any(path.startswith(one) for one in apart)
    ]


def _parameters(modules: _Modules, own: Iterable[nn.Module] | None = None) -> list[_Place]:
    """Where parameters are; or those that code of a user's own may write: all within such layers, and its modules'."""
    inside = None if own is None else {id(part) for layer in own for part in layer.modules()}
    return [
        (f"{path}.{name}".lstrip("."), part._parameters, name, True)
        for path, part in modules
        if inside is None
        or id(part) in inside
        or _kind(part).__module__.partition(".")[0] not in ("torch", "clipless_dp")
        for name in part._parameters
    ]


def _parts(value: Tensor) -> list[Tensor]:
    """The dense tensors that a tensor of any layout has its numbers in; of one without numbers, none."""
    return [] if value.is_meta else [part.resolve_conj().resolve_neg() for part in parts_of(value.detach())]


def _memory(value: Tensor) -> list[tuple[int, int]]:
    """Where the numbers lie, and how much memory there is around them: files of torch hold all of it."""
    value = value.detach()
    if value.is_meta:
        return []
    sparse = not value.is_nested and value.layout is not torch.strided
    storages = [part.untyped_storage() for part in (parts_of(value) if sparse else [value])]
    return [(storage.data_ptr(), storage.nbytes()) for storage in storages]


def _are_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dense tensors are: as integers as wide as both allow, of which a byte takes as long as eight."""
    flat = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    sizes = [value.element_size() * count for value in flat for count in (value.numel(), value.storage_offset())]
    width = torch.uint8 if any(size % 8 for size in sizes) else torch.int64
    return torch.equal(flat[0].view(width), flat[1].view(width))


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are the same bit by bit."""
    if any(getattr(one, name) != getattr(other, name) for name in ("dtype", "device", "layout")):
        return False
    if one.is_nested != other.is_nested or (not one.is_nested and one.shape != other.shape):
        return False
    parts = _parts(one), _parts(other)
    return [part.shape for part in parts[0]] == [part.shape for part in parts[1]] and all(map(_are_same_bits, *parts))


def _around(value: Tensor) -> Tensor | None:
    """All bytes of the memory that a tensor is a part of; ``None`` of one that is all of it."""
    if value.is_meta or value.is_nested or value.layout is not torch.strided:
        return None
    storage = value.untyped_storage()
    if storage.nbytes() <= value.numel() * value.element_size():
        return None
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)


class _Kept:
    """A buffer or a parameter as it was."""

    def __init__(self, value: Tensor | None) -> None:
        self._value = value
        self._memory = None if value is None else _memory(value)
        # One that is made in inference mode could not be written to by passes to come.
        with torch.inference_mode(False):
            self.copy = None if value is None else value.detach().clone()
            around = None if value is None else _around(value.detach())
            self._around = None if around is None else around.clone()

    def is_there(self, now: Tensor | None) -> bool:
        """Whether it is as it was, bit by bit."""
        if self.copy is None or now is None:
            return now is self.copy
        return _are_same(self.copy, now)

    def lies_there(self, now: Tensor | None) -> bool:
        """Whether it is in the memory that it was in, beside which there may be something else in another one."""
        if now is None or _memory(now) != self._memory:
            return now is None
        around = _around(now.detach())
        return around is None or self._around is None or torch.equal(around, self._around)

    @torch.no_grad()
    def restored(self) -> Tensor | None:
        """The same tensor with the numbers that it had; a copy where they cannot be written there."""
        if self._value is None or self.copy is None:
            return None
        if _memory(self._value) == self._memory:
            around = _around(self._value.detach())
            if around is not None and self._around is not None:
                around.copy_(self._around)
            with suppress(RuntimeError):
                # Of another size by now, or with several entries in one place, or made in inference mode.
                self._value.data.copy_(self.copy)
        if _memory(self._value) != self._memory or not _are_same(self._value, self.copy):
            # In place of other memory, too, in which there may be something beside the same numbers.
            with suppress(RuntimeError):
                self._value.data = self.copy
        return self._value if _are_same(self._value, self.copy) else self.copy


def _adds(part: nn.Module) -> bool:
    """Whether code of a user's own adds something to its state beside parameters and buffers: a hook on any layer."""
    if _is_hooked(part) or not _SAVING.isdisjoint(part.__dict__):
        return True
    kind = _kind(part)
    if kind.__module__.partition(".")[0] in ("torch", "clipless_dp"):
        return False
    return any(getattr(kind, name) is not getattr(nn.Module, name) for name in _SAVING)


_SAVING = frozenset({"get_extra_state", "_save_to_state_dict", "state_dict"})


def _is_hooked(part: nn.Module) -> bool:
    """Whether hooks write to what files hold of a layer."""
    return bool(part._state_dict_hooks or part._state_dict_pre_hooks)


class _Added:
    """What a layer adds to its state, which files hold.

    Args:
        path: of the layer; empty where it runs in a graph of its own.
        part: the layer.
    """

    def __init__(self, path: str, part: nn.Module) -> None:
        self.path, self.part = path or type(part).__name__, part
        self._values, self._kinds = self._now()
        self._values = [value.clone() if isinstance(value, Tensor) else value for value in self._values]

    def _now(self) -> tuple[list[Any], Any]:
        """Tensors, and bytes of all else, and how these lie in one another."""
        state: dict[str, Any] = {}
        try:
            if _is_hooked(self.part) or getattr(self.part.state_dict, "__func__", None) is not nn.Module.state_dict:
                state = {**self.part.state_dict()}
            else:
                self.part._save_to_state_dict(state, "", False)
        except Exception as error:
            raise PrivacyError(
                f"the state of {self.path!r} cannot be had, so that nothing tells whether files would hold what "
                f"follows from samples: let its state_dict() and get_extra_state() work, before passes and in them: "
                f"{type(error).__name__}: {error}"
            ) from error
        held = self.part._parameters.keys() | self.part._buffers.keys()
        found, kinds = pytree.tree_flatten({name: value for name, value in state.items() if name not in held})
        try:
            return [one.detach() if isinstance(one, Tensor) else pickle.dumps(one) for one in found], kinds
        except Exception as error:
            raise PrivacyError(
                f"what {self.path!r} adds to its state (get_extra_state) cannot be pickled, so that nothing tells "
                f"whether it is of samples: let it be numbers, text and tensors: {error}"
            ) from error

    def is_there(self) -> bool:
        """Whether it is as it was."""
        try:
            now, kinds = self._now()
        except PrivacyError:
            return False
        return kinds == self._kinds and all(
            type(one) is type(other) and (_are_same(one, other) if isinstance(one, Tensor) else one == other)
            for one, other in zip(now, self._values, strict=True)
        )

    def restore(self) -> None:
        """Gives it back to the layer, where this takes it."""
        values = [value if isinstance(value, Tensor) else pickle.loads(value) for value in self._values]
        state = pytree.tree_unflatten(values, self._kinds)
        if "_extra_state" in state:
            with suppress(Exception):
                self.part.set_extra_state(state["_extra_state"])


class _Before:
    """What a network held before a pass.

    Args:
        net: the network.
        own: its layers of a user's own.
    """

    def __init__(self, net: nn.Module, own: Iterable[nn.Module]) -> None:
        modules = list(net.named_modules())
        there = [*_held(modules), *_parameters(modules, own)]
        self._net, self._modules = net, modules
        self._known = {(id(where), name) for _, where, name, _ in (*there, *_parameters(modules))}
        self._kept = [(place, _Kept(place[1][place[2]])) for place in there]
        self._added = [_Added(path, part) for path, part in modules if _adds(part)]
        self.added: dict[str, bool] = {}
        self.written: dict[str, None] = {}
        self.taken_back: dict[str, None] = {}
        self.is_settled = False

    def settle(self) -> None:
        """Puts all back, and notes what was written; it may be called again."""
        for (path, where, name, saved), kept in self._kept:
            now = where.get(name)
            if kept.is_there(now):
                if not kept.lies_there(now):
                    where[name] = kept.restored()
                continue
            if not saved:
                self.taken_back.update({path: None} if kept.copy is not None else {})
                # Another tensor: the way back may need what was written.
                where[name] = kept.copy
                continue
            self.written[path] = None
            where[name] = kept.restored()
        modules = list(self._net.named_modules())
        for path, where, name, saved in (*_held(modules), *_parameters(modules)):
            if (id(where), name) not in self._known:
                self.written.update({path: None} if saved else {})
                # Made by this pass; as a mask of the inputs' shape is, anew each time.
                del where[name]
        self._leave_out(modules)
        for one in self._added:
            if not one.is_there():
                one.restore()
                self.added[one.path] = one.is_there()
        self.is_settled = True

    def _leave_out(self, modules: _Modules) -> None:
        """Takes layers out that this pass has made, where these add something to the state."""
        known = {id(one.part) for one in self._added}
        adding = {
            id(part): path or type(part).__name__ for path, part in modules if id(part) not in known and _adds(part)
        }
        if not adding:
            return
        former, there = dict(self._modules), {id(part) for _, part in self._modules}
        # What was there, and was given a hook, say, stays.
        self.added.update({path: part not in there for part, path in adding.items()})
        for path, part in [*self._net.named_modules(remove_duplicate=False)]:
            if id(part) not in adding or id(part) in there:
                continue
            above, _, name = path.rpartition(".")
            with suppress(AttributeError):
                # Of one within another that is gone there is nothing to be taken out.
                holding = self._net.get_submodule(above)._modules
                if path in former:
                    holding[name] = former[path]
                else:
                    del holding[name]


_unsettled: WeakKeyDictionary[nn.Module, _Before] = WeakKeyDictionary()
"""What passes began with that have not come to their end, or were interrupted at it."""


@contextmanager
def buffers_unwritten(net: nn.Module, own: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Within, what runs leaves buffers as they are, bit by bit: what it writes to those of no file is taken back.

    Else a layer whose rule is true whatever they hold might carry to the next batch what it has seen in this one. What
    is made where there was nothing, as a mask of the inputs' shape, is made anew each time; so it is after an error.

    Args:
        net: a network, or a layer of one.
        own: its layers of a user's own, whose parameters are looked at too; by default itself.

    Raises:
        PrivacyError: one was written, and is as it was before; or what a layer adds to its state is another.
    """
    interrupted = _unsettled.pop(net, None)
    if interrupted is not None and not interrupted.is_settled:
        interrupted.settle()
    _unsettled[net] = before = _Before(net, (net,) if own is None else own)
    try:
        yield
    finally:
        # After an error, too: what a pass has written by then is of its samples.
        completed(before.settle)
        _unsettled.pop(net, None)
    taken_back, written = before.taken_back, before.written
    if taken_back:
        warn_caller(
            f"a pass wrote the buffer {', '.join(map(repr, taken_back))} of the network, which is as it was again: the "
            "next pass would read what follows from samples, which no noise is on. A setting that changes from step to "
            "step is set outside of passes",
            PrivacyWarning,
        )
    if written:
        raise PrivacyError(
            f"a pass wrote the buffer or parameter {', '.join(map(repr, written))} of the network, or made it: files "
            "of the model hold it, and what follows from samples is there without noise. Keep it out of them, or let "
            "it be a public constant that code outside of passes sets. It is as it was"
        )
    if before.added:
        as_before = "It is as it was"
        if not all(before.added.values()):
            as_before = "It stays there, as no set_extra_state takes the former one back: throw the layer away"
        raise PrivacyError(
            f"a pass changed what {', '.join(map(repr, before.added))} adds to its state (get_extra_state): files of "
            "the model hold it, and what follows from samples is there without noise. Keep what a layer has seen out "
            f"of it. {as_before}"
        )
