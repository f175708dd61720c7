"""Who watches runs step by step: to measure them, or to let them fail at a moment that is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from clipless_dp.sampling import Batch
from clipless_dp.training.run import Run


class Watcher:
    """Is told of moments of a run. What it raises stops the run there, as what a step raises does."""

    def before_step(self, run: Run, batch: Batch) -> None:
        """A batch was drawn, and nothing of it was computed."""

    def after_step(self, run: Run) -> None:
        """A step was taken and charged, and nothing of it was saved or shown."""

    def before_showing(self, run: Run) -> None:
        """The last record of the run's history is about to be shown."""


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("watchers", default=())


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Steps that this thread takes within are watched."""
    token = _watchers.set((*_watchers.get(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)


def watchers() -> tuple[Watcher, ...]:
    """Who watches now."""
    return _watchers.get()
