"""What a constraint is, and the divisions that constraints end with."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipless_dp.arguments import positive
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.dense import dense_norm
from clipless_dp.norms.operators import ConvOperator, DenseOperator, Operator
from clipless_dp.norms.rounding import exact_float64
from clipless_dp.norms.single import single_precision_norm


class Constraint(ABC):
    """A projection onto parameters whose operator norm is at most :attr:`limit`.

    Args:
        limit: the norm guaranteed after :meth:`project_`, in [1e-8, 1e18], 1 by default. Further arguments of a
            constraint are named.

    Raises:
        ConfigurationError: an argument is out of range or of another type, here rather than in a step that is charged.

    Guarantee:
        After ``project_(weight, operators)`` the exact real operator stored in ``weight`` has norm at most
        ``limit``, for each of the operators, rounding included.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Says in words what Python would of arguments in a wrong place; files of pickles give none."""
        if inspect.isabstract(cls):
            lacking = ", ".join(sorted(cls.__abstractmethods__))
            raise ConfigurationError(
                f"{cls.__name__} is no constraint by itself, as it has no {lacking}: use Spectral, say"
            )
        if args or kwargs:
            signature = inspect.signature(cls.__init__)
            try:
                signature.bind(None, *args, **kwargs)
            except TypeError as error:
                own = [one.replace(annotation=one.empty) for one in [*signature.parameters.values()][1:]]
                raise ConfigurationError(
                    f"{cls.__name__} was given arguments that it does not take ({error}). Write "
                    f"{cls.__name__}{inspect.Signature(own)}: what follows the star is given by its name"
                ) from error
        return super().__new__(cls)

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = positive("the limit of a constraint", limit)
        if not 1e-8 <= self.limit <= 1e18:
            raise ConfigurationError(f"the limit of a constraint must lie in [1e-8, 1e18], got {limit!r}")

    @abstractmethod
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the weight in place."""

    def initialize_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """The projection of a fresh weight, where a costlier one pays; by default the same."""
        self.project_(weight, operators)

    def holds(self, weight: Tensor, operators: tuple[Operator, ...]) -> bool:
        """Whether a weight meets the limit for certain, as every projected one does: then it can stay as it is."""
        return all(
            # Projections of dense weights have certificates of their own, tighter than the default one here and there.
            (type(operator) is DenseOperator and dense_norm(weight, budget="tight") <= self.limit)
            # Either certificate will do: kernels are divided by the coarser one.
            or _norm(operator, weight) <= self.limit
            or operator.norm(weight) <= self.limit
            for operator in operators
        )

    def implied(self, rows: int, columns: int) -> float:
        """The operator norm that follows from the limit, of a weight of this shape: by default the limit is one."""
        return self.limit

    def project_gradient_(  # noqa: B027
        self, gradient: Tensor, weight: Tensor, operators: tuple[Operator, ...]
    ) -> None:
        """Turns the noisy gradient, in place, into directions that the projection will keep; by default none is lost.

        It is called once the noise is in and the step is in the ledger, so it is post-processing, whatever it does,
        as long as it reads nothing but the gradient, the weight and what is public.
        """

    def changes_gradients(self) -> bool:
        """Whether :meth:`project_gradient_` may do anything: where not, parts of weights are not gathered for it."""
        return type(self).project_gradient_ is not Constraint.project_gradient_

    def __repr__(self) -> str:
        return f"{type(self).__name__}(limit={self.limit:g})"


ConstraintSpec = Constraint | Mapping[str, Constraint | None] | None


_BETWEEN_CERTIFICATES = 5e-5
"""By how much the certificate of a kernel and that of a multiple of it may differ: levels are searched for. So much is
taken off, that a projected kernel holds when it is looked at again, after loading say, and does not move."""


def scale_to_limit_(weight: Tensor, operators: tuple[Operator, ...], limit: float) -> None:
    """Divides a weight by its certified norm where that is above the limit.

    Rounding the scaled entries to the weight's dtype perturbs it by ``E`` with ``|E| ≤ u|W|`` entrywise, hence
    its operator by at most ``p·u·‖W‖_F`` with ``p = operator.perturbation``. The factor is
    ``limit/(norm + 2·p·u·‖W‖_F)``, so the sum of both stays below the limit (2 covers the second-order terms and
    the factor's own rounding).
    """
    for operator in operators:
        dense = type(operator) is DenseOperator
        norm = single_precision_norm(weight) if dense else None
        norm = _norm(operator, weight) if norm is None else norm
        if norm <= limit:
            continue
        unit = torch.finfo(weight.dtype).eps / 2
        if dense:
            # ‖W‖_F ≤ √rank·‖W‖, which takes no pass over the weight.
            frobenius = math.sqrt(min(weight.shape)) * norm
        else:
            frobenius = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        again = _BETWEEN_CERTIFICATES if isinstance(operator, ConvOperator) else 1e-12
        slack = 2.0 * unit * operator.perturbation(weight) * frobenius + again * norm
        weight.mul_(limit / (norm + 2.0 * unit * norm + slack))


def _norm(operator: Operator, weight: Tensor) -> float:
    """Certified norm: kernels that are nearly orthogonal lose a thousandth at most, in a third of the time."""
    return operator.norm(weight, "coarse") if isinstance(operator, ConvOperator) else operator.norm(weight)


def shrink_blocks_(weight: Tensor, operator: Operator, limit: float, *, rows: bool) -> None:
    """Scales down each group of ``operator.matrix(weight)``, or each row, whose Euclidean norm is above the limit.

    The norm is computed in float64, with a relative error below ``(n+8)·2⁻⁵³`` for the ``n`` entries of the weight;
    the scaled entries are rounded once to the weight's dtype, relatively by its unit roundoff ``u``. The factor
    ``limit/(norm·(1 + 4u + 2(n+8)·2⁻⁵³))`` covers both and its own rounding, so the exact norm of what is stored is at
    most ``limit``. (Entries that round among the subnormals add less than ``u·limit`` for limits above 1e-30.)

    Raises:
        NormError: the weight is not finite.
    """
    matrices = operator.matrix(exact_float64(weight))
    norms = torch.linalg.vector_norm(matrices, dim=(2,) if rows else (1, 2), keepdim=True)
    slack = 2.0 * torch.finfo(weight.dtype).eps + (weight.numel() + 8) * 2.0**-52
    factors = limit / (norms * (1.0 + slack)).clamp(min=limit)
    if bool((factors < 1.0).any()):
        weight.copy_((matrices * factors).reshape(weight.shape))
