"""What has to come to its end though somebody presses Ctrl-C meanwhile."""

from __future__ import annotations

from collections.abc import Callable


class UnderWay:
    """Something that is under way, as long as anything holds it: of what was interrupted at its end nothing stays."""


def completed(settle: Callable[[], object]) -> None:
    """Calls a function, and from its beginning again where it is interrupted; the interruption is raised behind it.

    Args:
        settle: does what is left to do, so that a second call does the rest.
    """
    interruption: KeyboardInterrupt | None = None
    while True:
        try:
            settle()
            break
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption
