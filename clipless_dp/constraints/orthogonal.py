"""The orthogonality constraint."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clipless_dp.arguments import flag, whole
from clipless_dp.constraints import circulant
from clipless_dp.constraints.base import Constraint, scale_to_limit_
from clipless_dp.errors import ConfigurationError, NormError
from clipless_dp.norms.eigenvalue import trace_bounds
from clipless_dp.norms.gram import gram_matrix, single_gram_matrix, sizes_gram_bound
from clipless_dp.norms.operators import (
    CirculantOperator,
    DenseOperator,
    Operator,
    ToeplitzOperator,
    TriangularOperator,
)
from clipless_dp.norms.rounding import certified_arithmetic, exact_float64, gamma, product_error
from clipless_dp.norms.single import single_frobenius_bound, single_precision_serves
from clipless_dp.precision import coarse_products

_SMALL = 0.04
"""Root mean square of the eigenvalues of ``WᵀW - I`` that one iteration takes care of."""

_NEAR = 0.55
"""Root mean square of the eigenvalues of ``WᵀW - I`` up to which Björck's iteration is tried on a fresh weight."""

_FEW_STEPS = 8
"""Of these, each of two products, before a singular value decomposition is taken."""

_SINGLE_TO = 2048
"""Rows up to which the rounding of a float32 Gram matrix costs less than one per cent."""

_CHUNK, _LARGE, _NARROW = 128, 512, 64
"""Columns of one product of a float32 Gram matrix, and of one that is large: fewer are slower and err less."""

_TERMS = 512
"""Of one sum of the product that an iteration adds, in one piece."""

_OUTLIER, _LOOKS = 0.7, 6
"""Size of an eigenvalue of ``WᵀW - I`` from which iterations may go astray, and steps of power iteration that look for
it. Of one that stands out of a bulk that is half as large they find nine tenths."""

_COLUMNS = 256
"""Columns that an iteration changes at once."""

_SMALLEST_LIMIT = 1e-20
"""Below it, and above its inverse, entries of a scaled weight may leave the range of float32."""


class Orthogonal(Constraint):
    """Moves a weight towards the nearest semi-orthogonal matrix, then divides by the certified norm that is left.

    Björck's iteration ``W ← W(3I - WᵀW)/2`` (Björck and Bowie 1971) maps singular values in (0, √3) towards 1. It
    is started from the weight itself, which after a small step is nearly orthogonal already, so that one iteration is
    mostly enough. A convolution's kernel is treated as the matrix ``c_out × c_in·k²`` of each group (reshaped-kernel
    orthogonalisation). A circulant matrix, or one of circulant blocks, gets its polar factor, ``ĉ/|ĉ|`` at each
    frequency, in one step: the nearest orthogonal one of its kind.

    Args:
        limit: the largest operator norm, 1 by default.
        iterations: most Björck steps for each projection.
        tangent: whether to project the noisy gradient on the tangent space of the semi-orthogonal matrices (the
            Stiefel manifold) at the weight. What it drops, noise above all, the projection after the step would
            undo to first order, but momentum and adaptive step sizes would remember. For an ``n × n`` weight it
            drops ``(n+1)/2n`` of the noise's energy, for a ``p × n`` one ``(p+1)/2n``, ``p`` the smaller side.

    Guarantee:
        The operator norm is at most ``limit``. For a dense weight Björck's last iteration is its own certificate
        (:func:`_last_step`); otherwise the last act is :class:`Spectral`'s division by a certified norm, whatever the
        iteration did. Orthogonality itself is approximate and no bound relies on it. The tangent
        projection costs no privacy: it is a function of the noisy gradient, once the noise is in it and the step is in
        the ledger, and of the weight, which earlier steps have released.

    Cost:
        Two products of a Gram matrix's size for each iteration: one iteration after a small step, where the root mean
        square of the eigenvalues of ``WᵀW - I`` is below 0.04, which it leaves below 0.002; for kernels
        a certificate on top. Two more products for the tangent projection. The bound of float32 rounding takes 0.0005
        to 0.003 of the limit up to 1024 rows, 0.004 to 0.008 for 2048.
    """

    def __init__(self, limit: float = 1.0, *, iterations: int = 4, tangent: bool = False) -> None:
        super().__init__(limit)
        self.iterations = whole("iterations", iterations)
        self.tangent = flag("tangent", tangent)

    @torch.no_grad()
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the weight in place.

        Raises:
            ConfigurationError: it is a Toeplitz or Hankel matrix, or one of causal mixing.
        """
        if isinstance(operators[0], TriangularOperator):
            raise ConfigurationError(
                "a sparse triangular matrix is orthogonal only where it is a diagonal of signs: use constraints."
                "Spectral() for the weights of causal mixing"
            )
        if isinstance(operators[0], ToeplitzOperator):
            raise ConfigurationError(
                "a Toeplitz or Hankel matrix has no orthogonal one near it but in special cases: use constraints."
                "Spectral() for this weight, or structure='circulant', 'skew' or 'block-circulant'"
            )
        if isinstance(operators[0], CirculantOperator):
            circulant.polar_(weight, operators[0], self.limit)
        elif not all(type(operator) is DenseOperator for operator in operators):
            self._orthogonalize_(weight, operators[0])
        elif self._orthogonalize_dense_(weight):
            return
        scale_to_limit_(weight, operators, self.limit)

    @torch.no_grad()
    def initialize_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Starts from the polar factor, which later projections only have to follow."""
        if isinstance(operators[0], (CirculantOperator, ToeplitzOperator, TriangularOperator)):
            self.project_(weight, operators)
            return
        with certified_arithmetic(weight):
            matrices = operators[0].matrix(exact_float64(weight))
            # Float32 finds a float32 weight's factor as well as it can hold it, in half of the time.
            serves = single_precision_serves(operators[0].matrix(weight)[0])
            weight.copy_((self.limit * polar_factor(matrices, single=serves)).reshape(weight.shape))
        scale_to_limit_(weight, operators, self.limit)

    @torch.no_grad()
    def project_gradient_(self, gradient: Tensor, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects a noisy gradient on the tangent space, where ``tangent`` asks for it.

        ``P(Z) = Z - (ZVᵀ + VZᵀ)V/2`` for a weight with orthonormal rows ``V`` (transposed where columns are fewer than
        rows), the orthogonal projection on ``{Z: ZVᵀ + VZᵀ = 0}`` (Edelman, Arias and Smith, "The geometry of
        algorithms with orthogonality constraints", 1998, §2.2.1). ``V`` is the weight divided by the root mean square
        of its singular values, which for a kernel are far below the limit where windows overlap. ``P`` is linear, so
        that the sum and its noise are projected alike.
        """
        if self.tangent and isinstance(operators[0], CirculantOperator):
            frames = circulant.symbols(weight, operators[0])
            stepped = tangent_step(frames / typical_size(frames), circulant.symbols(gradient, operators[0]))
            circulant.write_(stepped, gradient, operators[0])
        elif self.tangent:
            frame, noisy = operators[0].matrix(weight), operators[0].matrix(gradient)
            gradient.copy_(tangent_step(frame / typical_size(frame), noisy).reshape(gradient.shape))

    def changes_gradients(self) -> bool:
        """Where ``tangent`` asks for it, or a subclass's :meth:`project_gradient_` is its own."""
        return self.tangent or type(self).project_gradient_ is not Orthogonal.project_gradient_

    def _orthogonalize_(self, weight: Tensor, operator: Operator) -> None:
        current = operator.matrix(weight)
        # The division by the certified norm left all singular values at one size, far below the limit for kernels.
        current = current / typical_size(current)
        current = current / overshoot(current)
        enough = 0.5 * _SMALL * math.sqrt(min(current.shape[1:]))
        for _ in range(self.iterations):
            before, current = current, bjorck_step(current)
            # V - W is W(I - WᵀW)/2: near orthogonality half of what is left to do, before the step.
            if float(torch.linalg.vector_norm(current - before, dim=(1, 2)).amax()) <= enough:
                break
        weight.copy_((self.limit * current).reshape(weight.shape))

    def _orthogonalize_dense_(self, weight: Tensor) -> bool:
        """Björck's iterations on a dense weight, in place, and whether its norm is then at most the limit for certain.

        Raises:
            NormError: an entry is not finite.
        """
        with certified_arithmetic(weight):
            current = weight if weight.shape[0] <= weight.shape[1] else weight.mT
            # Near orthogonality the Gram matrix alone says that no entry is large.
            difference = _difference_in_single(current) if self.limit == 1.0 else None
            if difference is None:
                self._bring_into_range_(weight)
            for _ in range(self.iterations):
                difference = _difference_in_single(current) if difference is None else difference
                difference = _difference_(current) if difference is None else difference
                growth = _last_step_(current, difference)
                if difference.residual <= _SMALL * math.sqrt(len(current)):
                    break
                difference = None
            # A tight certificate, of 1e-9, must find the weight within the limit when it is loaded again.
            growth = max(growth, 1e-8)
            certain = growth < 0.01 and _SMALLEST_LIMIT < self.limit < 1.0 / _SMALLEST_LIMIT
            certain = certain and coarse_products(weight.device) is None
            weight /= 1.0 + growth if certain else 1.0
            if self.limit != 1.0:
                weight *= self.limit
        return certain

    def _bring_into_range_(self, weight: Tensor) -> None:
        """Divides a weight by the limit, and by a power of two that brings large entries below one: it rounds nothing.

        Raises:
            NormError: an entry is not finite.
        """
        largest = _largest_entry(weight, self.limit)
        if self.limit != 1.0:
            weight /= self.limit
        if largest >= 1.0:
            weight *= 2.0 ** -math.frexp(largest)[1]


def polar_factor(matrices: Tensor, *, single: bool = False) -> Tensor:
    """The nearest semi-orthogonal matrices ``UVᵀ`` of ``UΣVᵀ``: a start, of which nothing is certified.

    Björck's iteration where few steps suffice, as for matrices that are nearly orthogonal or far from square:
    eigenvalues of ``WᵀW`` that are within about half of their mean leave singular values of 0.5 and more. Else, and
    where it does not come there, the singular value decomposition, which takes as long as a dozen products of square
    matrices.

    Args:
        matrices: ``(groups, rows, columns)``, float64.
        single: whether to compute in float32.

    Returns:
        The same shape and dtype as given.
    """
    sizes = typical_size(matrices)
    # Scaled first: float32 has a smaller range.
    current = (matrices / sizes).float() if single else matrices / sizes
    gram = _small_gram(current)
    if _spread(gram) <= _NEAR:
        current = current / overshoot(current)
        for _ in range(_FEW_STEPS):
            gram = _small_gram(current)
            left = _spread(gram)
            is_wide = current.shape[-2] < current.shape[-1]
            current = step_by_gram(current.mT, gram).mT if is_wide else step_by_gram(current, gram)
            # What is left is its square, which rounding hides in float32.
            if left <= (3e-4 if single else 1e-7):
                return current.to(matrices.dtype)
    left_vectors, _, right_vectors = torch.linalg.svd(current, full_matrices=False)
    factor: Tensor = left_vectors @ right_vectors
    return factor.to(matrices.dtype)


def _small_gram(matrices: Tensor) -> Tensor:
    """``WᵀW`` or ``WWᵀ``, the smaller one."""
    return matrices @ matrices.mT if matrices.shape[-2] < matrices.shape[-1] else matrices.mT @ matrices


def _spread(grams: Tensor) -> float:
    """The largest root mean square of the eigenvalues of ``G - I``."""
    residual = grams - torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    return float(torch.linalg.matrix_norm(residual).amax()) / math.sqrt(max(1, grams.shape[-1]))


def overshoot(matrices: Tensor) -> Tensor:
    """By how much each matrix may lie outside of the region where Björck's iteration converges, at least 1.

    Singular values above √3 diverge, and those next to it collapse. ``‖W‖⁴`` is at most ``‖G²‖_F`` with ``G = WᴴW``,
    and ``‖W‖²`` at most ``1 + ‖(G - I)²‖_F^½``, which is the smaller one near orthogonality. Where both allow for
    ``‖W‖² > 2`` the excess is taken from the smaller one.

    Args:
        matrices: ``(..., rows, columns)``, real or complex.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mH
    # Large weights are brought to this size first: their fourth powers would overflow.
    size = typical_size(matrices).clamp(min=1.0)
    gram = (matrices / size).mH @ (matrices / size)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    residual = gram - identity
    if float(frobenius(residual).amax()) <= 1.0:
        # Near orthogonality ‖W‖² is at most 1 + ‖G - I‖_F: nothing lies outside.
        return size
    residual = residual @ residual
    whole = frobenius(residual + 2.0 * gram - identity).sqrt()
    beyond = 1.0 + frobenius(residual).sqrt()
    return size * (torch.minimum(whole, beyond) / 2.0).clamp(min=1.0).sqrt()


def bjorck_step(matrices: Tensor) -> Tensor:
    """``W ← W(3I - WᴴW)/2``, for ``(..., rows, columns)``, real or complex."""
    if matrices.shape[-2] < matrices.shape[-1]:
        return bjorck_step(matrices.mH).mH
    return step_by_gram(matrices, matrices.mH @ matrices)


def step_by_gram(matrices: Tensor, gram: Tensor) -> Tensor:
    """Björck's step of matrices with no fewer rows than columns, whose ``WᴴW`` is known."""
    return 1.5 * matrices - 0.5 * matrices @ gram


def tangent_step(frames: Tensor, noisy: Tensor) -> Tensor:
    """``Z - (ZVᴴ + VZᴴ)V/2``: drops the part of ``Z`` that is normal to the semi-orthogonal matrices at ``V``.

    Args:
        frames: ``V``, ``(..., rows, columns)``, with orthonormal rows (or columns, where these are fewer).
        noisy: ``Z``, of the same shape.
    """
    if frames.shape[-2] > frames.shape[-1]:
        return tangent_step(frames.mH, noisy.mH).mH
    inner = noisy @ frames.mH
    kept: Tensor = noisy - 0.5 * (inner + inner.mH) @ frames
    return kept


def frobenius(matrices: Tensor) -> Tensor:
    """Frobenius norm of each of ``(..., rows, columns)``, one number in place of each matrix; complex ones read as real
    numbers, which torch reduces a hundred times faster."""
    entries = torch.view_as_real(matrices.resolve_conj()) if matrices.is_complex() else matrices[..., None]
    norms: Tensor = torch.linalg.vector_norm(entries, dim=(-3, -2, -1))
    return norms[..., None, None]


def typical_size(matrices: Tensor) -> Tensor:
    """Root mean square of each matrix's singular values; the smallest positive number for zeros."""
    size: Tensor = frobenius(matrices) / math.sqrt(max(1, min(matrices.shape[-2:])))
    return size.clamp(min=torch.finfo(size.dtype).tiny)


def _largest_entry(matrix: Tensor, limit: float) -> float:
    """Size of the largest entry in units of the limit, once it is known to be representable."""
    low, high = torch.aminmax(matrix)
    largest = max(-float(low), float(high)) / limit
    if not largest <= torch.finfo(matrix.dtype).max / 2.0:
        raise NormError("weight holds a NaN or an infinity; its operator norm has no bound")
    return largest


class _Difference(NamedTuple):
    """``R``, a computed ``WWᵀ - I``, float32 or float64.

    Attributes:
        matrix: ``R``, shape ``(rows, rows)``.
        residual: a bound of ``‖R‖_F``.
        squares: a bound of ``‖W‖_F²``.
        error: a bound of the distance between the computed and the exact ``WWᵀ``.
    """

    matrix: Tensor
    residual: float
    squares: float
    error: float


def _difference_in_single(matrix: Tensor) -> _Difference | None:
    """From float32 products, where these serve and prove that ``‖W‖² ≤ 4``.

    Of many rows the Frobenius norm of ``R`` may be above 1 though all its eigenvalues are small: whether one stands
    out, so that a singular value between √2 and 2 would collapse, is looked up, which no bound relies on.
    """
    if not (single_precision_serves(matrix) and len(matrix) <= _SINGLE_TO):
        return None
    is_large = len(matrix) > _LARGE
    gram, relative = single_gram_matrix(matrix, _NARROW if is_large else _CHUNK)
    squares = float(gram.diagonal().sum(dtype=torch.float64)) * (1.0 + 2.0 * relative)
    sizes = min(squares, sizes_gram_bound(matrix)) if is_large else squares
    # Sums of entries below one underflow by less than the last term.
    error = relative * sizes + 2.0 * gram.numel() * matrix.shape[1] * 2.0**-126
    gram.diagonal().sub_(1.0)
    residual = single_frobenius_bound(gram)
    serves = residual + error < 0.999 or (residual + error < 2.99 and _reaches(gram) < _OUTLIER)
    return _Difference(gram, residual, squares, error) if serves else None


def _reaches(residual: Tensor) -> float:
    """About the size of the eigenvalue that stands out most, where one does: a guide, nothing is certified by it."""
    vector = torch.cos(torch.arange(len(residual), dtype=residual.dtype, device=residual.device).square())
    size = 0.0
    for _ in range(_LOOKS):
        vector = residual @ (vector / torch.linalg.vector_norm(vector).clamp_min(1e-30))
        size = max(size, float(torch.linalg.vector_norm(vector)))
    return size


def _difference_(matrix: Tensor) -> _Difference:
    """From float64 products; the matrix is scaled down first where ``‖W‖² ≤ 2`` is not certain."""
    gram = gram_matrix(matrix[None])[0]
    diagonal = gram.diagonal()
    squares = float(diagonal.sum()) * (1.0 + gamma(sum(matrix.shape)))
    error = gamma(matrix.shape[1]) * squares
    kept = diagonal.clone()
    diagonal.sub_(1.0)
    residual = float(torch.linalg.vector_norm(gram))
    if residual + error < 0.999:
        return _Difference(gram, residual, squares, error)
    diagonal.copy_(kept)
    upper = float(trace_bounds(gram[None])[0]) + error
    if upper > 2.0:
        # Beyond √3 the iteration would diverge, and next to it singular values collapse.
        scale = math.sqrt(2.0 / min(upper, _near_identity(gram, error)))
        if scale < 1.0:
            matrix *= scale
            gram *= scale**2
            squares *= scale**2
            error += 4.0 * torch.finfo(matrix.dtype).eps * squares
    diagonal.sub_(1.0)
    return _Difference(gram, float(torch.linalg.matrix_norm(gram)), squares, error)


def _near_identity(gram: Tensor, error: float) -> float:
    """``1 + ‖(G - I)²‖_F^½``: an upper bound of the largest eigenvalue that is close for matrices near the identity."""
    difference = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    squared = float(torch.linalg.matrix_norm(difference @ difference))
    rounding = gamma(len(gram)) * float(torch.linalg.matrix_norm(difference)) ** 2
    return 1.0 + math.sqrt(squared + rounding) + error


def _last_step_(matrix: Tensor, difference: _Difference) -> float:
    """One Björck iteration ``V = W - RW/2``, in place, and a bound ``δ`` with ``‖V‖ ≤ 1 + δ``, rounding included.

    Args:
        matrix: ``W``, shape ``(rows, columns)``, with ``‖W‖² ≤ 4``; overwritten by ``V``.
        difference: of ``W``.

    Guarantee:
        With the exact ``WWᵀ - I = R + E``, ``W - RW/2 = (W - (R + E)W/2) + EW/2``. The first part has singular values
        ``|f(σ)|`` with ``f(σ) = σ(3 - σ²)/2``, and ``|f| ≤ 1`` on ``[0, 2]``: ``f' = 3(1 - σ²)/2`` vanishes at 1 alone,
        where ``f = 1``, and ``f(0) = 0``, ``f(2) = -1``. The second has norm at most ``‖E‖‖W‖/2``, where ``‖E‖ ≤
        error + 2⁻⁵³(‖R‖_F + 2√rows) + u‖R‖_F``, the last two from the diagonal's subtraction and from rounding ``R`` to
        the weight's dtype of unit roundoff ``u``, and ``‖W‖² ≤ 1 + ‖R‖_F + error``, and 4.
        (``error`` is the rounding of the product, and ``8u‖W‖_F²`` where ``W`` was scaled, and rounded, after it.) The
        product is computed in m pieces of n terms a sum, each apart, which together err by at most ``γ_n|R||W|/2``, so
        by ``γ_n‖R‖_F‖W‖_F/2`` (Higham 2002, §3.5), their halves being exact; each of the m differences by ``u`` of a
        Frobenius norm of at most ``‖W‖_F(1 + ‖R‖_F/2)``, up to the rounding so far; what the caller divides by
        ``1 + δ`` and multiplies by its limit by ``4u`` more, these being doubled, and the others enlarged, against
        second-order terms. Underflow loses less than ``2⁻¹²⁰`` an entry.
    """
    unit = torch.finfo(matrix.dtype).eps / 2.0
    rows, columns = matrix.shape
    _, residual, squares, error = difference
    rounded = difference.matrix.to(matrix.dtype)
    # Added piece by piece where sums are long.
    pieces = -(-rows // _TERMS)
    terms = -(-rows // pieces)
    for part in matrix.split(_COLUMNS, dim=1):
        before = part.clone() if pieces > 1 else part
        for left, right in zip(rounded.split(terms, dim=1), before.split(terms), strict=True):
            part.sub_(left @ right, alpha=0.5)
    frobenius = math.sqrt(squares)
    lost = 2.0**-53 * (residual + 2.0 * math.sqrt(rows)) + unit * residual
    lost += (4.0 + pieces) * unit * (frobenius * (1.0 + residual) + 1.0)
    product_rounding = product_error(terms, unit) * residual * frobenius
    size = math.sqrt(1.0 + residual + error)
    return 0.501 * (size * error + product_rounding) + 2.0 * lost + rows * columns * 2.0**-120
