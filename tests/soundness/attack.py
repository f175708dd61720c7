"""The attack toolkit that ships with the package, and what only these tests need besides."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from clipless_dp.testing import (
    BoundBroken,
    Case,
    Probe,
    Probed,
    Record,
    add_or_remove_one,
    ascend,
    attack,
    bounds_of,
    brute_force,
    inner_product,
    observed,
    per_sample_gradients,
    sized_signals,
    summed_gradients,
    wrap,
)

__all__ = [
    "BoundBroken",
    "Case",
    "Probe",
    "Probed",
    "Record",
    "Traced",
    "add_or_remove_one",
    "ascend",
    "attack",
    "bounds_of",
    "brute_force",
    "inner_product",
    "observed",
    "per_sample_gradients",
    "sized_signals",
    "summed_gradients",
    "wrap",
]


class Traced(nn.Module):
    """Applies a plain function, so that its functional calls are what is traced."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(values)
