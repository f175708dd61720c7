"""An optimizer around another one, and attributes that are checked when they are assigned to."""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MappingView, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from types import BuiltinMethodType, FunctionType, MethodType, MethodWrapperType
from typing import Any, Generic, NoReturn, TypeVar, cast, overload
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.model.surroundings import without_gradients, without_passes
from clipless_dp.optim.adam import AdamBC
from clipless_dp.optim.sharpness import SharpnessAwareAdam, SharpnessAwareSGD
from clipless_dp.tensor_types import is_coded

Given = TypeVar("Given")
Kept = TypeVar("Kept")


class Setting(Generic[Given, Kept]):
    """An attribute of an optimizer that may be assigned to between steps, and is checked each time.

    Args:
        checked: what is kept of a value; raises where it is none.
        doc: of the attribute.
    """

    def __init__(self, checked: Callable[[Given], Kept], doc: str) -> None:
        self._checked = checked
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> Setting[Given, Kept]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Kept: ...

    def __get__(self, instance: object | None, owner: type) -> Setting[Given, Kept] | Kept:
        return self if instance is None else cast(Kept, getattr(instance, self._name))

    def __set__(self, instance: object, value: Given) -> None:
        setattr(instance, self._name, self._checked(value))


_guard_of: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_stepping: ContextVar[Sequence[Optimizer]] = ContextVar("_stepping", default=())


def _refuse_steps_by_hand(optimizer: Optimizer, args: object, kwargs: object) -> None:
    if all(one is not optimizer for one in _stepping.get()):
        raise PrivacyError(
            f"this {type(optimizer).__name__} is the base optimizer of a private one: stepped by itself it would put "
            "gradients into the weights without noise and without charge. Call step() of the private optimizer, as "
            "make_private returns it, and no step() of the one that it was made of. Nothing was released"
        )


def guardable(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step runs hooks; one whose class leaves out ``super().__init__`` has none."""
    return isinstance(vars(optimizer).get("_optimizer_step_pre_hooks"), dict) and hasattr(optimizer, "defaults")


OF_TORCH = frozenset({"state", "param_groups", "defaults"})
"""Attributes that each optimizer has."""


def per_class(function: Callable[[type], Kept]) -> Callable[[type], Kept]:
    """A function of classes that is asked at each step, so that its answers are kept."""
    return cast("Callable[[type], Kept]", lru_cache(maxsize=1024)(function))


def nested(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer, and those that it is around, whose steps run hooks: in attributes, as Lookahead's, or in groups.

    What :func:`opened` opens is looked into as well, and schedules; objects of other classes and states are not.
    """
    found: list[Optimizer] = []
    # Kept, since another object could get the identity of one that is gone.
    seen: dict[int, object] = {}
    left: list[Any] = [optimizer]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, Optimizer):
            # Private ones, which schedules know, guard themselves.
            if isinstance(one, Around) or not guardable(one):
                continue
            found.append(one)
            held = [value for name, value in vars(one).items() if name not in OF_TORCH]
            held += [value for group in one.param_groups for name, value in group.items() if name != "params"]
        elif isinstance(one, LRScheduler):
            held = [one.optimizer]
        else:
            held = [value for _, value in opened(type(one))(one)]  # type: ignore[misc]
        for value in held:
            kind = type(value)
            # Empty ones are many: torch's hooks.
            if kind not in _NO_CONTAINERS and (kind not in _OF_PYTHON or value) and _may_hold_optimizers(kind):
                left.append(value)
    return found


_NO_CONTAINERS = frozenset({bool, int, float, str, type(None), FunctionType, Tensor, nn.Parameter})
_OF_PYTHON = frozenset({dict, OrderedDict, list, tuple, set, deque})


@per_class
def _may_hold_optimizers(kind: type) -> bool:
    return issubclass(kind, (Optimizer, LRScheduler)) or (opened(kind) is not None and not issubclass(kind, nn.Module))


_Parts = Iterable[tuple[object, Any]]

_BOUND = (MethodType, BuiltinMethodType, MethodWrapperType)
_TEXT = (str, bytes, bytearray, memoryview, range)


@per_class
def opened(kind: type) -> Callable[[Any], _Parts] | None:
    """How objects of a class are looked into that hold others: parts by name; ``None`` of classes that are not.

    Those of Python's, numpy's and torch's: mappings, sequences, sets and views of such, arrays of objects, modules,
    methods with what they are bound to, and references. It is asked at each step, so that it is kept.
    """
    if issubclass(kind, (Tensor, Optimizer, LRScheduler, type, *_TEXT)):
        return None
    known: list[tuple[tuple[type, ...], Callable[[Any], _Parts]]] = [
        ((np.ndarray,), lambda array: enumerate(array.ravel().tolist()) if array.dtype.hasobject else ()),
        ((Mapping,), _of_mapping),
        ((nn.Module,), lambda module: _no_objects(vars(module).items())),
        ((Sequence, Set, MappingView, deque), enumerate),
        (_BOUND, lambda method: _no_objects([("", method.__self__)])),
        ((partial,), lambda call: _no_objects(enumerate((call.func, *call.args, *call.keywords.values())))),
        ((weakref.ref,), lambda reference: _no_objects([("", reference())])),
    ]
    return next((parts for kinds, parts in known if issubclass(kind, kinds)), None)


def _of_mapping(mapping: Mapping[Any, Any]) -> _Parts:
    for name, value in mapping.items():
        # Tensors compare by their numbers.
        yield id(name) if isinstance(name, Tensor) else name, value
        if not isinstance(name, (str, int, nn.Parameter)):
            yield ("key", id(name) if isinstance(name, Tensor) else name), name


def _no_objects(parts: _Parts) -> _Parts:
    """Of what a module, a method or a reference holds, what may hold numbers or optimizers: no trainers."""
    known = (Tensor, np.ndarray, bytes, bytearray, Optimizer, LRScheduler)
    return [(name, one) for name, one in parts if isinstance(one, known) or opened(type(one)) is not None]


def everything(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer first, and those within it; a plain one uses none."""
    if is_plain(optimizer):
        return [optimizer]
    return [optimizer, *(one for one in nested(optimizer) if one is not optimizer)]


_TORCH = (
    "SGD",
    "ASGD",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "RMSprop",
    "Rprop",
)
_KNOWN = frozenset({
    *(getattr(torch.optim, name) for name in _TORCH if hasattr(torch.optim, name)),
    AdamBC, SharpnessAwareAdam, SharpnessAwareSGD,
})  # fmt: skip


def is_known(optimizer: Optimizer) -> bool:
    """Whether its class is one of torch's or ours, which read those entries of groups that they have defaults for."""
    return type(optimizer) in _KNOWN


def is_made_of_known(optimizer: Optimizer) -> bool:
    """Whether its class is made of one of these, if it is none itself."""
    return isinstance(optimizer, tuple(_KNOWN))


_PLAIN = frozenset({bool, int, float, str, type(None), np.float64, np.float32, np.int64, Tensor, nn.Parameter})


def _are_plain(values: Collection[object]) -> bool:
    """Whether settings, or what is kept of a parameter, have no code of others; pairs of such among them."""
    # By their types at once, as several times in each step.
    others = {*map(type, values)} - _PLAIN
    return not others or all(
        type(value) not in others
        or (isinstance(value, Tensor) and not is_coded(type(value)))
        or (type(value) in (tuple, list) and _are_plain(cast("Sequence[object]", value)))
        for value in values
    )


def is_plain(optimizer: Optimizer) -> bool:
    """Whether no code of others runs in its step, which reads parameters, gradients, groups and ``state``."""
    own = vars(optimizer)
    return (
        is_known(optimizer)
        and not any(map(callable, own.values()))
        and type(optimizer.state) is defaultdict
        and optimizer.state.default_factory is dict
        and type(optimizer.param_groups) is list
        and all(type(kept) is dict and _are_plain(kept.values()) for kept in optimizer.state.values())
        and all(type(group) is dict and _are_plain(group.values()) for group in optimizer.param_groups)
        and own["_optimizer_step_pre_hooks"].keys() <= {_guard_of.get(optimizer)}
        and not own["_optimizer_step_post_hooks"]
        and not _global_optimizer_pre_hooks
        and not _global_optimizer_post_hooks
    )


def _is_read_plainly(optimizer: Optimizer) -> bool:
    """Whether no code of others runs where its state is asked for."""
    own = vars(optimizer)
    hooks = own.get("_optimizer_state_dict_pre_hooks") or own.get("_optimizer_state_dict_post_hooks")
    return is_known(optimizer) and "state_dict" not in own and not hooks


class Around(Optimizer):
    """Shares ``param_groups`` and ``state`` with the optimizer that it is around: schedulers work on it as on any.

    They are read from it each time: whatever is assigned to the other one, or loaded into it, is what counts here.

    Args:
        base_optimizer: the other one.
    """

    _step_supports_amp_scaling = True
    _is_made = False

    def __init__(self, base_optimizer: Optimizer) -> None:
        self._base_optimizer = base_optimizer
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._is_made = True
        del self._given

    @property
    def base_optimizer(self) -> Optimizer:
        """The other one; fixed, as it is guarded, and what it keeps witnessed, from the beginning."""
        return self._base_optimizer

    @base_optimizer.setter
    def base_optimizer(self, value: object) -> None:
        raise ConfigurationError(
            "the base optimizer of a private one is not exchanged, as what it keeps is witnessed from its first step "
            "on: make a new private optimizer of the model and the other one, with accountant=optimizer.accountant, "
            "and go on with that"
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the base optimizer, as they are now."""
        return self.base_optimizer.param_groups if self._is_made else self._given

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._is_made:
            self.base_optimizer.param_groups = groups
        else:
            # While torch takes and checks them.
            self._given = groups

    @property
    def state(self) -> Any:
        """That of the base optimizer, as it is now."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if self._is_made:
            self.base_optimizer.state = state

    def _guard(self) -> list[Optimizer]:
        """From now on the other one steps inside of :meth:`_base_may_step` alone, whichever loop still knows it.

        Returns:
            It, and those within it.
        """
        optimizers = nested(self.base_optimizer)
        for optimizer in optimizers:
            if optimizer not in _guard_of:
                # One hook, however many are made around it: none of them refuses the steps of another.
                _guard_of[optimizer] = optimizer.register_step_pre_hook(_refuse_steps_by_hand).id
        return optimizers

    @contextmanager
    def _base_may_step(
        self, net: nn.Module, parameters: Iterable[Tensor], require: Callable[[Iterable[Tensor]], object]
    ) -> Iterator[None]:
        """The other one may step: what it steps on is private, and nothing else arrives meanwhile.

        Args:
            net: the wrapped network.
            parameters: of the network.
            require: raises where the given parameters are not of the network.

        Raises:
            PrivacyError: it calls the network, computes gradients, or steps on other parameters.
        """
        if is_plain(self.base_optimizer):
            # Its groups were looked at, and nobody's code runs in between.
            token = _stepping.set([self.base_optimizer])
            try:
                yield
            finally:
                _stepping.reset(token)
            return
        # Those that were put into it since.
        optimizers = self._guard()

        def refuse_foreign(optimizer: Optimizer, args: object, kwargs: object) -> None:
            require(parameter for group in optimizer.param_groups for parameter in group["params"])

        # Last of their hooks, which may add parameters.
        handles = [optimizer.register_step_pre_hook(refuse_foreign) for optimizer in optimizers]
        token = _stepping.set(optimizers)
        try:
            with without_passes(net), without_gradients(parameters):
                yield
        finally:
            _stepping.reset(token)
            for handle in handles:
                handle.remove()

    @contextmanager
    def _base_is_called(self, net: nn.Module, parameters: Iterable[Tensor], *, reads: bool = False) -> Iterator[None]:
        """A call beside its step goes on to the other one, and what that leaves may be noted as private behind it.

        There are no gradients within, whoever has left some, and none are computed. Of the other calls, what is written
        is noted by none: where gradients are cleared, they are there.

        Args:
            net: the wrapped network.
            parameters: of the network.
            reads: whether its state is asked for, as any thread may at any time.

        Raises:
            PrivacyError: it calls the network, or computes gradients.
        """
        if reads and _is_read_plainly(self.base_optimizer):
            # What is put in the way of others' code, passes of other threads would meet.
            with torch.no_grad():
                yield
            return
        held = {id(one): one for one in parameters}
        for optimizer in nested(self.base_optimizer):
            held.update((id(one), one) for group in optimizer.param_groups for one in group["params"])
        gradients = [(parameter, parameter.grad) for parameter in held.values()]
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            with torch.no_grad(), without_passes(net), without_gradients(held.values()):
                yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def _refuse_within_step(self, call: str) -> None:
        """Refuses a call from a hook of the other one's step.

        Raises:
            PrivacyError: it is one.
        """
        # Within the step of a plain one nobody's code runs, but for handlers of signals, who save what there is.
        if any(one is self.base_optimizer for one in _stepping.get()) and not is_plain(self.base_optimizer):
            raise PrivacyError(
                f"{call} of the private optimizer was called within the step of the base one, in a hook say, where "
                "weights and state are half of this step and half of the one before: call it behind step(), or in a "
                "hook of the private optimizer (register_step_post_hook), where all of this step is in it. The step "
                "is charged, as its gradients have their noise; what of its update was made stays, which the ledger "
                "covers"
            )

    def __getstate__(self) -> NoReturn:
        raise ConfigurationError(
            "an optimizer is not copied or pickled, since two copies would charge the same draws: save state_dict() "
            "and load it into a new optimizer"
        )

    @property
    def found_inf(self) -> None:
        """Never set: a ``GradScaler`` is refused."""
        raise AttributeError("found_inf")

    @found_inf.setter
    def found_inf(self, value: object) -> None:
        raise PrivacyError(
            "GradScaler skips steps depending on the data, which the ledger cannot see: train without it "
            "(bfloat16 and float32 need no loss scaling)"
        )
