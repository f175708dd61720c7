"""Passes and steps take turns: a step releases the gradients that it has looked at, and nothing that comes later."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast
from weakref import ReferenceType, WeakSet, WeakValueDictionary, ref

from torch import Tensor

from clipless_dp.errors import PrivacyError
from clipless_dp.interrupts import UnderWay
from clipless_dp.model.owed import Owed, for_all
from clipless_dp.model.passes import Pass
from clipless_dp.sampling.series import Draw

IN_STEP = (
    "it would be released without noise, or without being counted. Nothing of it was added. Take passes and steps in "
    "turn, with a lock of your own around both where several threads train one model"
)

_PATIENCE = 60.0
"""Seconds that a pass waits for another thread's step."""


_TRIES, _PAUSE = 50, 0.005
"""How often, and after how many seconds, weights are looked at again that a pass of another wrapper has in hand."""
_QUIET = 6
"""How often where no pass of another wrapper is seen."""

_Found = TypeVar("_Found")
_Given = ParamSpec("_Given")


class BeforePass(Protocol):
    """Who steps on gradients."""

    def before_pass(self) -> None:
        """Private gradients are about to be computed: what they might decide is noted as it is."""


class _Waited(PrivacyError):
    """Another thread does not end, which trying again does not change."""


class _Holding(AbstractContextManager[None]):
    """With some locks, taken in their order; several times in each step."""

    def __init__(self, locks: Sequence[Owed], patience: float) -> None:
        self._locks, self._patience, self._taken = locks, patience, 0

    def __enter__(self) -> None:
        if not self.take():
            raise PrivacyError(f"a step of another thread took longer than {self._patience:g} s: {IN_STEP}")

    def take(self) -> bool:
        """Takes all of them, or none: returns whether they could be had."""
        for one in self._locks:
            if not one.lock.acquire(timeout=self._patience):
                self.__exit__()
                return False
            self._taken += 1
        return True

    def __exit__(self, *_: object) -> None:
        for one in self._locks[: self._taken]:
            one.lock.release()


_stepped: WeakValueDictionary[int, UnderWay] = WeakValueDictionary()
"""The steps of parameters, by the identities of these."""


class Turns:
    """Of one model, and of others that share parameters with it.

    Args:
        running: held while the network runs on aliases of its parameters.

    Attributes:
        steppers: told before the first pass of a step.
    """

    def __init__(self, running: threading.RLock) -> None:
        self._running = running
        self._parameters: Sequence[Tensor] = ()
        self._held: list[Owed] = []
        self.steppers: WeakSet[BeforePass] = WeakSet()
        self._first: ReferenceType[Draw] | None = None
        self._trained: tuple[bool, ...] = ()

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """These are the model's."""
        # In one order everywhere, so that nobody waits for somebody who waits.
        self._parameters, self._held = parameters, sorted(for_all(parameters, self._held), key=lambda one: one.key)
        for one in self._held:
            one.wrappers.add(self)

    def settled(self, look: Callable[[], _Found]) -> _Found:
        """What a look at the weights says while no pass or step of another thread has them in hand.

        A pass of another wrapper takes no turn with those of this one, and lends the network aliases meanwhile: what
        fails is tried again, where there is another one.
        """
        others = {id(one): one for some in self._held for one in some.wrappers if one is not self}
        left, quiet = (_TRIES, _QUIET) if others else (1, 1)
        while left and quiet:
            try:
                with self.resting():
                    return look()
            except _Waited:
                raise
            except Exception:
                left -= 1
                # A pass may just have ended.
                quiet -= not any(cast(Turns, one)._is_busy() for one in others.values())
                if not (left and quiet):
                    raise
            time.sleep(_PAUSE)
        raise AssertionError("unreachable")

    def _is_busy(self) -> bool:
        """Whether another thread's pass is under way."""
        free = self._running.acquire(blocking=False)
        if free:
            self._running.release()
        return not free

    @contextmanager
    def resting(self, patience: float | None = None) -> Iterator[None]:
        """No pass or step of another thread is under way within, of this wrapper and of those that it shares with.

        A step of another wrapper holds what they share, and may wait for what is this one's alone, in a hook: so this
        one is let go of until the other is free.

        Raises:
            PrivacyError: on entering: another thread holds them for longer than ``patience``, by default a minute.
        """
        patience = _PATIENCE if patience is None else patience
        since = time.monotonic()
        while True:
            left = patience - (time.monotonic() - since)
            if not self._running.acquire(timeout=max(0.0, left) if math.isfinite(patience) else -1.0):
                break
            try:
                shared = _Holding(self._held, _PAUSE)
                if shared.take():
                    try:
                        yield
                    finally:
                        shared.__exit__()
                    return
            finally:
                self._running.release()
            if left <= 0.0:
                break
            time.sleep(_PAUSE)
        raise _Waited(
            f"a pass or a step of another thread has had the weights for {patience:g} s: a hook of a step that waits "
            "for another thread's look at the model waits for ever. Look from the step's own thread, or behind the step"
        )

    def begin(self, first: Pass) -> None:
        """A pass of which no gradient is owed is the first of a step, but where its draw has been passed before.

        What the loss of a draw's first pass may have decided is not what was before it.
        """
        draw = None if first.rows is None else first.rows.draw
        known = None if self._first is None else self._first()
        if known is None or known.used or not (draw is None or draw is known):
            for one in self.steppers:
                one.before_pass()
            self._first, self._trained = None if draw is None else ref(draw), first.trains
        elif draw is known and any(self._trained):
            first.trains = self._trained

    def end(self) -> None:
        """No draw is in hand any more."""
        self._first = None

    def holding(self, patience: float = -1.0) -> AbstractContextManager[None]:
        """Gradients are filled, or looked at, within: by a step, from its look at them to the end of its update.

        Raises:
            PrivacyError: on entering: another thread holds them for longer than ``patience``, in seconds.
        """
        return _Holding(self._held, patience)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A step is under way within: what passes of other threads have computed waits for its end."""
        step = UnderWay()
        with self.resting(math.inf):
            try:
                for one in map(id, self._parameters):
                    _stepped.setdefault(one, step)
                yield
            finally:
                for one in map(id, self._parameters):
                    if _stepped.get(one) is step:
                        del _stepped[one]

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Gradients of a pass are filled within.

        Raises:
            PrivacyError: a step of the same parameters is under way.
        """
        # A thread of the engine may deliver what a hook of this very step waits for.
        with self.holding(_PATIENCE):
            if len(_stepped) and any(id(one) in _stepped for one in self._parameters):
                raise PrivacyError(f"a pass was back-propagated while a step was under way, in its hook: {IN_STEP}")
            yield


class _Registered(Protocol):
    @property
    def turns(self) -> Turns: ...


class _Wrapper(Protocol):
    @property
    def register(self) -> _Registered: ...


_Model = TypeVar("_Model", bound=_Wrapper)


def in_turn(
    method: Callable[Concatenate[_Model, _Given], _Found],
) -> Callable[Concatenate[_Model, _Given], _Found]:
    """Lets a method of a wrapped model look at its weights by :meth:`Turns.settled`."""

    @functools.wraps(method)
    def run(model: _Model, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Found:
        return model.register.turns.settled(functools.partial(method, model, *args, **kwargs))

    return run
