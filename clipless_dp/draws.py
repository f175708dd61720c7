"""What the samplers of this process have drawn, so that the optimizer charges amplification only where it is due.

A shuffled loader gives no amplification by subsampling, and nothing in a batch says how it was drawn. The samplers
of this package therefore announce each Poisson draw here, and the optimizer takes one announced draw for each step.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import NamedTuple


class Snapshot(NamedTuple):
    """The draws of this process so far.

    Attributes:
        announced: draws by sample rate.
        taken: how many of them a step has used up.
        seeded: how many were functions of a seed.
        seeded_taken: how many of these a step has used up.
    """

    announced: Counter[float]
    taken: int
    seeded: int = 0
    seeded_taken: int = 0


class _Held(threading.local):
    """Draws in the hands of this thread: announced when they were needed, and not yet used by a step."""

    count = 0


_announced: Counter[float] = Counter()
_taken = 0
_seeded = 0
_seeded_taken = 0
_held = _Held()


def announce(sample_rate: float, *, ahead: bool = False, seeded: bool = False) -> None:
    """Notes one Poisson draw in which every sample had this probability, independently.

    Args:
        sample_rate: the probability.
        ahead: the draw may be fetched long before its batch is used, as the workers of a ``DataLoader`` do.
        seeded: the draw is a function of a seed, so that it is secret only as long as the seed is.
    """
    global _seeded
    _seeded += seeded
    _announced[sample_rate] += 1
    if not ahead:
        _held.count += 1


def take(*, seeded: bool = False) -> None:
    """Uses up one draw, a seeded one or not: it amplifies no other step, of whichever optimizer."""
    global _taken, _seeded_taken
    _taken += 1
    _seeded_taken += seeded
    _held.count = max(0, _held.count - 1)


def held() -> int:
    """How many draws this thread has been handed one by one since its last steps."""
    return _held.count


def snapshot() -> Snapshot:
    """The draws so far."""
    return Snapshot(Counter(_announced), _taken, _seeded, _seeded_taken)
