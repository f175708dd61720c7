"""An optimizer around another one, and attributes that are checked when they are assigned to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, NoReturn, TypeVar, cast, overload
from weakref import WeakSet

from torch.optim import Optimizer

from clipless_dp.errors import ConfigurationError, PrivacyError

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


_guarded: WeakSet[Optimizer] = WeakSet()
_stepping: ContextVar[Optimizer | None] = ContextVar("_stepping", default=None)


def _refuse_steps_by_hand(optimizer: Optimizer, args: object, kwargs: object) -> None:
    if _stepping.get() is not optimizer:
        raise PrivacyError(
            f"this {type(optimizer).__name__} is the base optimizer of a private one: stepped by itself it would put "
            "gradients into the weights without noise and without charge. Call step() of the private optimizer, as "
            "make_private returns it, and no step() of the one that it was made of. Nothing was released"
        )


class Around(Optimizer):
    """Shares ``param_groups`` and ``state`` with the optimizer that it is around: schedulers work on it as on any.

    Args:
        base_optimizer: the other one.
    """

    _step_supports_amp_scaling = True

    def __init__(self, base_optimizer: Optimizer) -> None:
        self.base_optimizer = base_optimizer
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._share_state()

    def _share_state(self) -> None:
        """After groups were added to the other one, or a state was loaded into it."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def _guard(self) -> None:
        """From now on the other one steps inside of :meth:`_base_may_step` alone, whichever loop still knows it."""
        if self.base_optimizer not in _guarded:
            # One hook, however many are made around it: none of them refuses the steps of another.
            self.base_optimizer.register_step_pre_hook(_refuse_steps_by_hand)
            _guarded.add(self.base_optimizer)

    @contextmanager
    def _base_may_step(self) -> Iterator[None]:
        """The other one may step: what it steps on is private."""
        token = _stepping.set(self.base_optimizer)
        try:
            yield
        finally:
            _stepping.reset(token)

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
