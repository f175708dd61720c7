"""A penalty on the Lipschitz constants of layers, added where it is free: after the noise."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from clipless_dp.arguments import choice, positive
from clipless_dp.constraints import circulant
from clipless_dp.constraints.base import Constraint
from clipless_dp.norms.conv import polyphase
from clipless_dp.norms.operators import (
    CirculantOperator,
    ConvOperator,
    DenseOperator,
    Operator,
    ToeplitzOperator,
    TriangularOperator,
)
from clipless_dp.norms.rounding import exact_float64

_ROUNDS = 20
"""Of power iteration, for dense weights: a regulariser needs no certificate."""

_MOST_POINTS = 32
"""Frequencies of an axis of a kernel."""


class LipschitzPenalty(Constraint):
    """Pulls each weight's operator norm down by a gradient of its own, without a limit.

    After the noise is in a step's mean gradient, ``strength·∇log‖W‖ = strength·uvᵀ/‖W‖`` is added to it, or
    ``strength·∇max(‖W‖ - threshold, 0) = strength·uvᵀ`` where ``‖W‖ > threshold``, with the top singular vectors ``u``
    and ``v`` (Yoshida and Miyato, "Spectral norm regularization", 2017; Araujo, Negrevergne, Chevaleyre and Atif, "On
    Lipschitz regularization of convolutional layers using Toeplitz matrix theory", AAAI 2021, for the logarithm). Of a
    convolution the norm is that of its symbol at the frequency where it is largest, of a circulant or Toeplitz matrix
    that of its eigenvalue, and the gradient that with respect to the taps.

    Unlike a constraint it promises nothing: no bound relies on it, and norms are certified from the weights at each
    step, as without it.

    Args:
        strength: factor of the penalty, in the loss's units; it is not divided by the batch.
        kind: ``"log"`` or ``"hinge"``.
        threshold: norm from which ``"hinge"`` pulls.

    Guarantee:
        The penalty's gradient is a function of the weights, which earlier steps have released, and is added when the
        noise is in and the step is in the ledger: post-processing. Sensitivity, noise and ε are those without it.
        Added before the noise it would be noised, and divided by the batch.

    Raises:
        ConfigurationError: an argument is out of range.

    Cost:
        Twenty products of a dense weight with a vector; of a kernel, singular values of its symbol at up to 32 × 17
        frequencies.
    """

    def __init__(self, strength: float, kind: Literal["log", "hinge"] = "log", threshold: float = 1.0) -> None:
        self.strength = positive("strength", strength)
        self.kind: Literal["log", "hinge"] = choice("kind", kind, "log", "hinge")
        self.threshold = positive("threshold", threshold)
        self.limit = math.inf

    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Leaves the weight as it is."""

    def holds(self, weight: Tensor, operators: tuple[Operator, ...]) -> bool:
        """Always: nothing is promised."""
        return True

    @torch.no_grad()
    def project_gradient_(self, gradient: Tensor, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Adds the penalty's gradient to the noisy one."""
        operator = operators[0]
        exact = exact_float64(weight)
        if not bool(exact.any()):
            return
        with torch.enable_grad():
            exact = exact.clone().requires_grad_()
            norm = _norm(exact, operator)
            (direction,) = torch.autograd.grad(norm, exact)
        size = float(norm.detach())
        if self.kind == "hinge" and size <= self.threshold:
            return
        factor = self.strength / size if self.kind == "log" else self.strength
        gradient.add_(direction.to(gradient.dtype), alpha=factor)

    def __repr__(self) -> str:
        return f"LipschitzPenalty(strength={self.strength:g}, kind={self.kind!r}, threshold={self.threshold:g})"


def penalised(operators: tuple[Operator, ...]) -> bool:
    """Whether a parameter is a weight whose norm a penalty knows."""
    known = DenseOperator, ConvOperator, CirculantOperator, ToeplitzOperator, TriangularOperator
    over_volumes = isinstance(operators[0], ConvOperator) and len(operators[0].stride) > 2
    return isinstance(operators[0], known) and not over_volumes


def _norm(weight: Tensor, operator: Operator) -> Tensor:
    """An estimate of the operator norm, from below, whose gradient is that of the norm."""
    if isinstance(operator, DenseOperator):
        return _top(weight)
    if isinstance(operator, TriangularOperator):
        return _top(operator.dense(weight)) / operator.unit
    if isinstance(operator, ConvOperator):
        missing = 2 - len(operator.stride)
        kernel = operator.kernel(weight)
        kernel = kernel.reshape(*kernel.shape[:3], *[1] * missing, *kernel.shape[3:])
        steps = (1,) * missing + operator.stride, (1,) * missing + operator.dilation
        kernel = polyphase(kernel, *steps)
        points = [min(_MOST_POINTS, 4 * size) if size > 1 else 1 for size in kernel.shape[-2:]]
        return _largest(torch.fft.rfft2(kernel, s=points).permute(0, 3, 4, 1, 2).flatten(0, 2))
    if isinstance(operator, CirculantOperator):
        return _largest(circulant.symbols(weight, operator))
    assert isinstance(operator, ToeplitzOperator)
    return _largest(torch.fft.rfft(operator.diagonals(weight)).reshape(-1, 1, 1))


def _largest(matrices: Tensor) -> Tensor:
    """The top singular value of the one with the largest."""
    with torch.no_grad():
        sizes = torch.linalg.matrix_norm(matrices, 2) if matrices[0].numel() > 1 else matrices.abs().flatten()
        place = int(sizes.argmax())
        left, _, right = torch.linalg.svd(matrices[place], full_matrices=False)
    found: Tensor = left[:, 0].conj() @ matrices[place] @ right[0].conj()
    return found.real


def _top(matrix: Tensor) -> Tensor:
    with torch.no_grad():
        # Squares of numbers of any size.
        scaled = matrix / matrix.abs().amax().clamp_min(torch.finfo(matrix.dtype).tiny)
        right = scaled[int(scaled.square().sum(1).argmax())].clone()
        for _ in range(_ROUNDS):
            right /= right.norm()
            right = scaled.mT @ (scaled @ right)
        right /= right.norm()
        left = scaled @ right
        left /= left.norm()
    return left @ matrix @ right
