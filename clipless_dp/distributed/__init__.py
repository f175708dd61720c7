"""Where a model is trained: in one process or in several, and which part of it each process holds.

``placement`` is the face of this room: what the rest of the package asks, whatever the answer.
"""

from clipless_dp.distributed.placement import OneProcess, Placement, Replicated, Sharded
from clipless_dp.distributed.ranks import (
    World,
    agree,
    copy_from_,
    from_first,
    gathered,
    largest,
    on_any,
    together,
    total,
    world,
)
from clipless_dp.distributed.replicated import refuse_averages, release_

__all__ = [
    "OneProcess",
    "Placement",
    "Replicated",
    "Sharded",
    "World",
    "agree",
    "copy_from_",
    "from_first",
    "gathered",
    "largest",
    "on_any",
    "refuse_averages",
    "release_",
    "together",
    "total",
    "world",
]
