"""What has to come to its end though somebody presses Ctrl-C meanwhile."""

from __future__ import annotations

from collections.abc import Callable


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
