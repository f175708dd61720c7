"""The almost-orthogonal (AOL) constraint."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.arguments import choice, whole
from clipless_dp.constraints.base import Constraint, scale_to_limit_
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.operators import (
    CirculantOperator,
    ConvOperator,
    Operator,
    ToeplitzOperator,
    TriangularOperator,
)

_MOST_ROUNDS = 6
"""A dense weight's largest divisor is then at most ``n^(1/128)`` of its norm: 3.7 % above it for ``n = 100``."""

_PERRON_ROUNDS = 30


class AlmostOrthogonal(Constraint):
    """Rescales the input channels (or the output channels, if fewer) by the almost-orthogonal diagonal.

    ``W ← W·D`` with ``D = diag(S_j)^-½``, ``S_j = Σ_k |WᵀW|_jk`` for a dense weight, and
    ``S_j = Σ_{k,δ} |Σ_{o,τ} W_{o,j,τ} W_{o,k,τ+δ}|`` for a kernel (Prach and Lampert, "Almost-orthogonal layers for
    efficient general-purpose Lipschitz networks", ECCV 2022, §3). Channels that are orthogonal to all others get norm
    1, up or down; orthogonal weights stay as they are. Weights are rescaled after the step, not re-parametrised.

    With ``rounds = T`` the sums are those of ``(WᵀW)^(2^(T-1))``, of a kernel's correlation with itself time and again,
    fully padded, and ``D = diag(S_j)^(-2^-T)``: between the almost-orthogonal diagonal, ``T = 1``, and division by the
    norm, to which it tends (Delattre, Barthélemy, Araujo and Allauzen, "Efficient bound of Lipschitz constant for
    convolutional layers by Gram iteration", ICML 2023; spectral rescaling, Delattre et al. 2024). Any weights ``q > 0``
    may stand in ``S_j = Σ_k |·|_jk q_k/q_j``.

    Args:
        limit: the largest operator norm, 1 by default.
        rounds: ``T``, from 1 to 6.
        scales: ``q``: ``"unit"``: ones; ``"norm"``: the channels' norms; ``"perron"``: the top eigenvector of the
            matrix that is summed, by which all ``S_j`` are one number, the least that their largest can be.
        side: which channels are rescaled: ``"smaller"``: those of the side that has fewer; ``"outputs"``.

    Guarantee:
        ``S - (WᵀW)^(2^(T-1))`` is symmetric and, after scaling by ``q``, diagonally dominant with a non-negative
        diagonal, hence positive semi-definite; roots keep that order (Löwner–Heinz): ``D⁻² ⪰ WᵀW``, ``‖WD‖ ≤ 1``. A
        zero-padded convolution is part of a circular one of stride 1, whose ``CᵀC`` has rows with absolute sums of at
        most ``S_j``, so the same ``D`` serves; for fewer outputs the argument runs on ``WWᵀ``. None of this is relied
        upon: the last act is :class:`Spectral`'s division by a certified norm, rounding included, which has nothing
        left to do but where padding or strides repeat windows.

    Raises:
        ConfigurationError: an argument is out of range.

    Cost:
        One Gram product, or one correlation of the kernel with itself, and one certificate per weight and step; with
        ``rounds`` one more product each, of a ``k × k`` kernel at ``((k-1)·2^T + 1)²`` frequencies.
    """

    def __init__(
        self,
        limit: float = 1.0,
        *,
        rounds: int = 1,
        scales: Literal["unit", "norm", "perron"] = "unit",
        side: Literal["smaller", "outputs"] = "smaller",
    ) -> None:
        super().__init__(limit)
        self.rounds = whole("rounds", rounds, 1, _MOST_ROUNDS)
        self.scales: Literal["unit", "norm", "perron"] = choice("scales", scales, "unit", "norm", "perron")
        self.side: Literal["smaller", "outputs"] = choice("side", side, "smaller", "outputs")

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the weight in place.

        Raises:
            ConfigurationError: it is a circulant or Toeplitz matrix, or one of causal mixing.
        """
        if isinstance(operators[0], (CirculantOperator, ToeplitzOperator)):
            raise ConfigurationError(
                "the almost-orthogonal diagonal breaks a circulant or Toeplitz structure: use constraints.Spectral()"
            )
        if isinstance(operators[0], TriangularOperator):
            raise ConfigurationError(
                "sparse triangular matrices are held by constraints.Spectral(): give it to the weights of causal mixing"
            )
        kernel = operators[0].kernel(weight.double())
        # The rows of a transposed convolution's kernel are its inputs.
        outputs_are_columns = isinstance(operators[0], ConvOperator) and operators[0].transposed
        by_columns = kernel.shape[2] <= kernel.shape[1] if self.side == "smaller" else outputs_are_columns
        if not by_columns:
            kernel = kernel.transpose(1, 2)
        divisors = self._divisors(kernel)
        factors = torch.where(divisors > 0.0, self.limit / divisors, torch.ones_like(divisors))
        kernel = kernel * factors.reshape(*divisors.shape[:1], 1, -1, *([1] * (kernel.dim() - 3)))
        if not by_columns:
            kernel = kernel.transpose(1, 2)
        weight.copy_(kernel.reshape(weight.shape))
        scale_to_limit_(weight, operators, self.limit)

    def _divisors(self, kernel: Tensor) -> Tensor:
        """What each column is divided by, ``(groups, columns)``."""
        if self.rounds == 1 and self.scales == "unit":
            return _correlation_sums(kernel).sqrt()
        sizes: Tensor = torch.linalg.vector_norm(kernel.flatten(1), dim=1)
        sizes = sizes.clamp(min=torch.finfo(kernel.dtype).tiny)
        kernel = kernel / sizes.reshape(-1, *[1] * (kernel.dim() - 1))
        sums = _power_sums(kernel, self.rounds)
        norms = torch.linalg.vector_norm(kernel.transpose(1, 2).flatten(2), dim=2)
        scales = torch.ones_like(norms) if self.scales == "unit" else norms
        if self.scales == "perron":
            for _ in range(_PERRON_ROUNDS):
                # Half of itself: eigenvalues of the other sign do not compete.
                scales = scales / scales.amax(1, keepdim=True).clamp(min=torch.finfo(scales.dtype).tiny)
                moved = (sums @ scales.unsqueeze(2)).squeeze(2)
                scales = moved / moved.amax(1, keepdim=True).clamp(min=torch.finfo(scales.dtype).tiny) + scales
        # Any positive numbers do; channels of zeros have none.
        scales = scales.clamp(min=1e-12 * float(scales.max()) if bool(scales.any()) else 1.0)
        scaled = (sums @ scales.unsqueeze(2)).squeeze(2) / scales
        divisors: Tensor = scaled.clamp(min=0.0) ** (0.5**self.rounds)
        return divisors * sizes.unsqueeze(1)

    def __repr__(self) -> str:
        settings = f"limit={self.limit:g}, rounds={self.rounds}, scales={self.scales!r}, side={self.side!r}"
        return f"AlmostOrthogonal({settings})"


def _power_sums(kernel: Tensor, rounds: int) -> Tensor:
    """``Σ_δ |(K⋆K ⋆ …)_δ|`` of each group: ``(groups, rows, columns, *taps)`` to ``(groups, columns, columns)``."""
    axes = tuple(range(3, kernel.dim()))
    # As many points as the product has taps: nothing wraps.
    points = [(size - 1) * 2**rounds + 1 for size in kernel.shape[3:]]
    symbols = torch.fft.fftn(kernel, s=points, dim=axes) if axes else kernel
    symbols = symbols.movedim((1, 2), (-2, -1))
    for _ in range(rounds):
        symbols = symbols.mH @ symbols
    taps = symbols.movedim((-2, -1), (1, 2))
    taps = torch.fft.ifftn(taps, dim=axes).real if axes else taps
    return taps.abs().flatten(3).sum(3) if axes else taps.abs()


def _correlation_sums(kernel: Tensor) -> Tensor:
    """``S_j`` of each group: ``(groups, rows, columns, *taps)`` to ``(groups, columns)``."""
    groups, rows, columns, *taps = kernel.shape
    if not taps:
        return (kernel.mT @ kernel).abs().sum(2)
    filters = kernel.transpose(1, 2).reshape(groups * columns, rows, *taps)
    maps = kernel.movedim(2, 0).reshape(columns, groups * rows, *taps)
    correlate = (functional.conv1d, functional.conv2d, functional.conv3d)[len(taps) - 1]
    shifts: Tensor = correlate(maps, filters, padding=[size - 1 for size in taps], groups=groups)
    sizes = shifts.abs().reshape(columns, groups, -1)
    return sizes.sum(2).t()
