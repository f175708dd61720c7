"""What a weight does as an operator: enough to certify its norm and to project it.

A constraint needs the norm of the *operator* that a layer builds from its weight, which for a convolution
depends on stride, padding and input size. These small frozen objects carry that knowledge from the rules to
the constraints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clipless_dp.norms.conv import conv2d_norm
from clipless_dp.norms.dense import dense_norm

Sides = tuple[tuple[int, int], tuple[int, int]]


class Operator(Protocol):
    """A linear operator with a weight tensor as its only degree of freedom."""

    def norm(self, weight: Tensor) -> float:
        """Certified upper bound of the operator norm."""
        ...

    def perturbation(self, weight: Tensor) -> float:
        """Factor ``p`` with ``‖operator(E)‖ ≤ p·‖E‖_F`` for every ``E`` of this weight's shape."""
        ...

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a batch of matrices ``(groups, rows, columns)``, a view where possible."""
        ...


@dataclass(frozen=True)
class DenseOperator:
    """``x ↦ Wx``, at any number of positions."""

    def norm(self, weight: Tensor) -> float:
        """Certified spectral norm."""
        return dense_norm(weight)

    def perturbation(self, weight: Tensor) -> float:
        """The spectral norm is at most the Frobenius norm."""
        return 1.0

    def matrix(self, weight: Tensor) -> Tensor:
        """``(1, out, in)``."""
        return weight.unsqueeze(0)


@dataclass(frozen=True)
class Conv2dOperator:
    """A zero-padded 2-d convolution on maps of one size."""

    input_size: tuple[int, int]
    stride: tuple[int, int]
    padding: Sides
    dilation: tuple[int, int]
    groups: int
    coverage: int

    def norm(self, weight: Tensor) -> float:
        """Certified operator norm."""
        return conv2d_norm(
            weight,
            input_size=self.input_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def perturbation(self, weight: Tensor) -> float:
        """``√N``: the coverage bound of ``bounds.md`` with the Frobenius norm of the flattened kernel."""
        return math.sqrt(self.coverage)

    def matrix(self, weight: Tensor) -> Tensor:
        """``(groups, out/groups, in/groups·k²)``."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)


@dataclass(frozen=True)
class VectorOperator:
    """A vector that is added: its norm is Euclidean."""

    def norm(self, weight: Tensor) -> float:
        """Euclidean norm in float64, rounded up."""
        with torch.no_grad():
            exact = float(torch.linalg.vector_norm(weight.detach().double()))
        return exact * (1.0 + (weight.numel() + 4) * 2.0**-52)

    def perturbation(self, weight: Tensor) -> float:
        """Exact."""
        return 1.0

    def matrix(self, weight: Tensor) -> Tensor:
        """``(1, 1, n)``."""
        return weight.reshape(1, 1, -1)
