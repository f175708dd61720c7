"""What the samplers of this process have drawn, so that the optimizer charges amplification only where it is due.

A shuffled loader gives no amplification by subsampling, and nothing in a batch says how it was drawn. The samplers
of this package therefore announce each Poisson draw here, and the optimizer takes one announced draw for each step.
"""

from __future__ import annotations

from collections import Counter

_announced: Counter[float] = Counter()


def announce(sample_rate: float) -> None:
    """Notes one Poisson draw in which every sample had this probability, independently."""
    _announced[sample_rate] += 1


def snapshot() -> Counter[float]:
    """How many draws have been announced so far, by sample rate."""
    return Counter(_announced)
