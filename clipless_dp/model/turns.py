"""Passes and steps take turns: a step releases the gradients that it has looked at, and nothing that comes later."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

from clipless_dp.errors import PrivacyError

_IN_STEP = (
    "it would be released without noise, or without being counted. Nothing of it was added. Take passes and steps in "
    "turn, with a lock of your own around both where several threads train one model"
)

_PATIENCE = 60.0
"""Seconds that a pass waits for another thread's step."""


class BeforePass(Protocol):
    """Who steps on gradients."""

    def before_pass(self) -> None:
        """Private gradients are about to be computed: what they might decide is noted as it is."""


class Turns:
    """Of one model.

    Args:
        running: held while the network runs on aliases of its parameters.

    Attributes:
        gradients: held where gradients are filled or looked at; by a step, from its look at them to the end of its
            update. Behind ``running``, where somebody holds both.
        steppers: told before the first pass since gradients were empty.
    """

    def __init__(self, running: threading.RLock) -> None:
        self._running = running
        self.gradients = threading.RLock()
        self.steppers: WeakSet[BeforePass] = WeakSet()
        self._stepping = False

    def begin(self) -> None:
        """The first pass of a step begins."""
        for one in self.steppers:
            one.before_pass()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """A step is under way within: what passes of other threads have computed waits for its end."""
        with self._running, self.gradients:
            before, self._stepping = self._stepping, True
            try:
                yield
            finally:
                self._stepping = before

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Gradients of a pass are filled within.

        Raises:
            PrivacyError: a step is under way.
        """
        # A thread of the engine may deliver what a hook of this very step waits for.
        if not self.gradients.acquire(timeout=_PATIENCE):
            raise PrivacyError(f"a step of another thread took longer than {_PATIENCE:g} s: {_IN_STEP}")
        try:
            if self._stepping:
                raise PrivacyError(
                    f"a pass was back-propagated while a step was under way, in a hook of it: {_IN_STEP}"
                )
            yield
        finally:
            self.gradients.release()


class _Taking(Protocol):
    turns: Turns


Holder = TypeVar("Holder", bound=_Taking)
Given = ParamSpec("Given")
Made = TypeVar("Made")


def in_turn(
    method: Callable[Concatenate[Holder, Given], Made],
) -> Callable[Concatenate[Holder, Given], Made]:
    """A method within which gradients of a pass are filled, see :meth:`Turns.passing`."""

    @functools.wraps(method)
    def taken(self: Holder, /, *args: Given.args, **kwargs: Given.kwargs) -> Made:
        with self.turns.passing():
            return method(self, *args, **kwargs)

    return taken
