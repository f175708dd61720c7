"""What a weight does as an operator: enough to certify its norm and to project it.

A constraint needs the norm of the *operator* that a layer builds from its weight, which for a convolution
depends on stride, padding and input size. These small frozen objects carry that knowledge from the rules to
the constraints.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from clipless_dp.norms.budget import Budget, effort_of
from clipless_dp.norms.circulant import circle_norm, toeplitz_norm
from clipless_dp.norms.conv import conv1d_norm, conv2d_norm
from clipless_dp.norms.dense import dense_norm
from clipless_dp.norms.geometry import PaddingMode
from clipless_dp.norms.rounding import enlarge, exact_float64, normalised, scale_up
from clipless_dp.norms.symbol import symbol_norm_bound
from clipless_dp.norms.volumes import conv3d_norm

Sides = tuple[tuple[int, int], ...]


class Operator(Protocol):
    """A linear operator with a weight tensor as its only degree of freedom."""

    def norm(self, weight: Tensor) -> float:
        """Certified upper bound of the operator norm."""
        ...

    def perturbation(self, weight: Tensor) -> float:
        """Factor ``p`` with ``‖operator(E)‖ ≤ p·‖E‖_F`` for every ``E`` of this weight's shape."""
        ...

    def kernel(self, weight: Tensor) -> Tensor:
        """The weight as ``(groups, rows, columns, *taps)``, a view where possible; groups act on separate channels."""
        ...

    def matrix(self, weight: Tensor) -> Tensor:
        """:meth:`kernel` as a batch of matrices ``(groups, rows, columns·taps)``."""
        ...


class _Untapped(ABC):
    """What a kernel without taps is as a matrix."""

    @abstractmethod
    def kernel(self, weight: Tensor) -> Tensor:
        """See :meth:`Operator.kernel`."""

    def matrix(self, weight: Tensor) -> Tensor:
        """As :meth:`kernel`, which has no taps."""
        return self.kernel(weight)


class _Numbers(_Untapped):
    """Numbers that are no matrix's entries in place."""

    def kernel(self, weight: Tensor) -> Tensor:
        """All of them in one row: ``(1, 1, n)``."""
        return weight.reshape(1, 1, -1)


@dataclass(frozen=True)
class DenseOperator(_Untapped):
    """``x ↦ Wx``, at any number of positions."""

    def norm(self, weight: Tensor) -> float:
        """Certified spectral norm."""
        return dense_norm(weight)

    def perturbation(self, weight: Tensor) -> float:
        """The spectral norm is at most the Frobenius norm."""
        return 1.0

    def kernel(self, weight: Tensor) -> Tensor:
        """``(1, out, in)``."""
        return weight.unsqueeze(0)


@dataclass(frozen=True)
class ConvOperator:
    """A convolution on signals, maps or volumes of one size, or a transposed one on the former two.

    Attributes:
        input_size: pixels of each axis, one to three.
        coverage: ``N``: of the input's pixels by the windows, or of the *output's* where transposed.
    """

    input_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Sides
    dilation: tuple[int, ...]
    groups: int
    coverage: int
    padding_mode: PaddingMode = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] | int = 0

    def norm(self, weight: Tensor, budget: Budget = "balanced") -> float:
        """Certified operator norm."""
        geometry: dict[str, Any] = {
            "budget": budget,
            "input_size": self.input_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
        }
        if len(self.input_size) == 3:
            return conv3d_norm(weight, **geometry)
        geometry.update(transposed=self.transposed, output_padding=self.output_padding)
        return conv1d_norm(weight, **geometry) if len(self.input_size) == 1 else conv2d_norm(weight, **geometry)

    def perturbation(self, weight: Tensor) -> float:
        """``√N``: unfolding a map into its windows has norm √N, and folding windows into a map is its adjoint.

        Each group's operator is at most ``√N`` times the Frobenius norm of that group's own kernel.
        """
        return math.sqrt(self.coverage)

    def kernel(self, weight: Tensor) -> Tensor:
        """``(groups, out/groups, in/groups, *k)``; transposed it is the adjoint's, rows of which are inputs."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        """:meth:`kernel` with its taps among the columns."""
        return self.kernel(weight).flatten(2)


@dataclass(frozen=True)
class CopyPaddedConvOperator(ConvOperator):
    """A convolution of a map whose padding copies its own pixels: the other fields are those of the padded map.

    Attributes:
        copies: ``M``: in how many places of the padded map a pixel stands at most.
    """

    copies: int = 1

    def norm(self, weight: Tensor, budget: Budget = "balanced") -> float:
        """``√M`` times the certified norm on the padded map: padding has the norm ``√M``."""
        return math.sqrt(self.copies) * (1.0 + 1e-12) * super().norm(weight, budget)


@dataclass(frozen=True)
class DiagonalOperator:
    """Slopes that multiply one coordinate each."""

    def norm(self, weight: Tensor) -> float:
        """The largest size of a slope, exactly."""
        slopes = exact_float64(weight)
        return float(slopes.abs().max()) if slopes.numel() else 0.0

    def perturbation(self, weight: Tensor) -> float:
        """Exact for each slope by itself."""
        return 1.0

    def kernel(self, weight: Tensor) -> Tensor:
        """Each slope a group: ``(n, 1, 1)``."""
        return weight.reshape(-1, 1, 1)

    def matrix(self, weight: Tensor) -> Tensor:
        """Each slope a group: ``(n, 1, 1)``."""
        return weight.reshape(-1, 1, 1)


@dataclass(frozen=True)
class RowSumOperator(DenseOperator):
    """``x ↦ Wx`` in the maximum norm; no constraint projects onto it."""

    def norm(self, weight: Tensor) -> float:
        """The largest ℓ1 norm of a row in float64, rounded up."""
        sums = exact_float64(weight).abs().sum(1)
        return float(sums.max()) * (1.0 + (weight.shape[1] + 4) * 2.0**-52) if sums.numel() else 0.0


@dataclass(frozen=True)
class SegmentsOperator(DiagonalOperator):
    """Slopes of piecewise linear functions: each row those of one, in the order of its segments."""


@dataclass(frozen=True)
class SigmoidOperator(DiagonalOperator):
    """Multiplication by ``sigmoid(sign·w)``; no constraint projects onto it, as it is not linear in ``w``."""

    sign: int

    def norm(self, weight: Tensor) -> float:
        """The largest factor, rounded up."""
        largest = float((self.sign * exact_float64(weight)).max())
        # exp of a number below -700 underflows to a factor that the allowance covers.
        return min(1.0, (1.0 + 1e-12) / (1.0 + math.exp(min(-largest, 700.0))))


@dataclass(frozen=True)
class TableOperator(_Untapped):
    """A table whose rows are looked up one at a time: its norm is that of its longest row."""

    def norm(self, weight: Tensor) -> float:
        """The largest Euclidean norm of a row in float64, rounded up."""
        rows = torch.linalg.vector_norm(exact_float64(weight), dim=1)
        # The absolute term is for squares that underflow.
        return float(rows.max()) * (1.0 + (weight.shape[1] + 4) * 2.0**-52) + 1e-150

    def perturbation(self, weight: Tensor) -> float:
        """A row is no longer than the whole table."""
        return 1.0

    def kernel(self, weight: Tensor) -> Tensor:
        """Each row a group: ``(rows, 1, d)``."""
        return weight.unsqueeze(1)


@dataclass(frozen=True)
class VectorOperator(_Numbers):
    """A vector that is added: its norm is Euclidean."""

    def norm(self, weight: Tensor) -> float:
        """Euclidean norm in float64, rounded up."""
        exact = float(torch.linalg.vector_norm(exact_float64(weight)))
        return exact * (1.0 + (weight.numel() + 4) * 2.0**-52)

    def perturbation(self, weight: Tensor) -> float:
        """Exact."""
        return 1.0


@dataclass(frozen=True)
class CirculantOperator(_Numbers):
    """A circulant or skew-circulant matrix, a part of one, or circulant blocks, by orthonormal coefficients.

    Each coefficient is spread over the entries of one wrapped diagonal, divided by the root of their number.

    Attributes:
        points: rows of each whole circulant.
        filled: entries of each wrapped diagonal that the matrix has.
        skew: whether diagonals change their sign where they wrap.
    """

    points: int
    filled: int
    skew: bool = False

    def norm(self, weight: Tensor) -> float:
        """Certified norm, exact but for rounding of a whole circulant: ``(n,)``, or ``(out, in, n)`` of blocks."""
        if weight.ndim == 1:
            largest = circle_norm(weight, self.points, odd=self.skew)
        else:
            scaled, exponent = normalised(exact_float64(weight))
            kernel = scaled[None, :, :, None, :]
            largest = scale_up(symbol_norm_bound(kernel, (1, self.points), effort_of("balanced")), exponent)
        return enlarge(largest / math.sqrt(self.filled)) if largest > 0.0 else 0.0

    def perturbation(self, weight: Tensor) -> float:
        """The coefficients' norm is the matrix's Frobenius norm; that of the whole circulant is larger by this."""
        return math.sqrt(self.points / self.filled)


@dataclass(frozen=True)
class ToeplitzOperator(_Numbers):
    """A Toeplitz matrix, or a Hankel matrix, by orthonormal coefficients of its diagonals.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
    """

    rows: int
    columns: int

    def norm(self, weight: Tensor) -> float:
        """Certified norm. The division by roots rounds each tap twice, which :func:`circle_norm`'s allowance covers."""
        return toeplitz_norm(self.diagonals(exact_float64(weight)))

    def diagonals(self, weight: Tensor) -> Tensor:
        """The entry of each diagonal."""
        counts = diagonal_counts(self.rows, self.columns).to(weight.device, weight.dtype)
        return weight / counts.sqrt()

    def perturbation(self, weight: Tensor) -> float:
        """The coefficients' norm is the matrix's; those of the circulants that it is a part of are larger by this."""
        return math.sqrt(self.rows + self.columns - 1)


@dataclass(frozen=True)
class TriangularOperator(_Numbers):
    """A square matrix, divided by a number, of the entries of some diagonals on and below the main one.

    Attributes:
        rows: of the matrix, and columns.
        steps: how far below the main diagonal each is, less than ``rows``.
        unit: what the matrix is divided by: a limit of 1 then holds its norm at this.
    """

    rows: int
    steps: tuple[int, ...]
    unit: float = 1.0

    @property
    def entries(self) -> int:
        """How many numbers the weight has."""
        return sum(self.rows - step for step in self.steps)

    def dense(self, weight: Tensor) -> Tensor:
        """The matrix, not divided, of entries diagonal by diagonal: ``(entries,)`` to ``(rows, rows)``."""
        found = weight.new_zeros(self.rows, self.rows)
        for step, diagonal in zip(self.steps, weight.split([self.rows - step for step in self.steps]), strict=True):
            found = found + torch.diag_embed(diagonal, -step)
        return found

    def norm(self, weight: Tensor) -> float:
        """Certified spectral norm, divided by the unit."""
        norm = dense_norm(self.dense(weight))
        return enlarge(norm / self.unit) if norm > 0.0 else 0.0

    def perturbation(self, weight: Tensor) -> float:
        """The entries' norm is the matrix's Frobenius norm."""
        return 1.0 / self.unit


def diagonal_counts(rows: int, columns: int) -> Tensor:
    """How many entries each diagonal of a matrix has, from the upper right corner to the lower left one, ``(n,)``."""
    along = torch.arange(1, rows + columns)
    return torch.minimum(along, along.flip(0)).clamp(max=min(rows, columns))
