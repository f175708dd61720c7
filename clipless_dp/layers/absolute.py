"""The absolute value as a module."""

from __future__ import annotations

from torch import Tensor, nn


class AbsoluteValue(nn.Module):
    """``|x|``, entry by entry: 1-Lipschitz and norm-preserving, and so is its gradient away from 0.

    Shape:
        ``(B, ...)`` to the same shape.
    """

    def forward(self, values: Tensor) -> Tensor:
        """The absolute value of each entry."""
        return values.abs()
