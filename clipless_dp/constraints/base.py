"""What a constraint is, and which parameter gets which."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.operators import Operator, VectorOperator


class Constraint(ABC):
    """A projection onto parameters whose operator norm is at most :attr:`limit`.

    Args:
        limit: the norm guaranteed after :meth:`project_`.

    Guarantee:
        After ``project_(weight, operators)`` the exact real operator stored in ``weight`` has norm at most
        ``limit``, for each of the operators, rounding included.
    """

    def __init__(self, limit: float) -> None:
        if not (math.isfinite(limit) and limit > 0):
            raise ConfigurationError(f"the limit of a constraint must be finite and positive, got {limit!r}")
        self.limit = float(limit)

    @abstractmethod
    def project_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """Projects the weight in place."""

    def initialize_(self, weight: Tensor, operators: tuple[Operator, ...]) -> None:
        """The projection of a fresh weight, where a costlier one pays; by default the same."""
        self.project_(weight, operators)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(limit={self.limit:g})"


ConstraintSpec = Constraint | Mapping[str, Constraint | None] | None


def scale_to_limit_(weight: Tensor, operators: tuple[Operator, ...], limit: float) -> None:
    """Divides a weight by its certified norm where that is above the limit.

    Rounding the scaled entries to the weight's dtype perturbs it by ``E`` with ``|E| ≤ u|W|`` entrywise, hence
    its operator by at most ``p·u·‖W‖_F`` with ``p = operator.perturbation``. The factor is
    ``limit/(norm + 2·p·u·‖W‖_F)``, so the sum of both stays below the limit (2 covers the second-order terms and
    the factor's own rounding).
    """
    for operator in operators:
        norm = operator.norm(weight)
        if norm <= limit:
            continue
        unit = torch.finfo(weight.dtype).eps / 2
        frobenius = float(torch.linalg.vector_norm(weight.double()))
        slack = 2.0 * unit * operator.perturbation(weight) * frobenius + 1e-12 * norm
        weight.mul_(limit / (norm + 2.0 * unit * norm + slack))


def assign(spec: ConstraintSpec, operators: Mapping[str, tuple[Operator, ...]]) -> dict[str, Constraint]:
    """Which constraint each parameter gets.

    Args:
        spec: one constraint for every weight that acts as a linear operator (biases are left alone), or a mapping
            from patterns to constraints. A pattern (``fnmatch``) is matched against parameter names
            (``"0.weight"``, ``"*.bias"``); one that matches a layer's path means its weight. The first match
            counts; ``None`` leaves a parameter free.
        operators: the operators each parameter acts as.

    Raises:
        ConfigurationError: a pattern matches nothing, or a value is not a constraint.
    """
    if spec is None:
        return {}
    if isinstance(spec, Constraint):
        return {
            name: spec
            for name, acting in operators.items()
            if not all(isinstance(operator, VectorOperator) for operator in acting)
        }
    if not isinstance(spec, Mapping):
        raise ConfigurationError(f"constraint must be a Constraint, a mapping or None, got {type(spec).__name__}")
    chosen: dict[str, Constraint] = {}
    settled: set[str] = set()
    for pattern, constraint in spec.items():
        if not (constraint is None or isinstance(constraint, Constraint)):
            raise ConfigurationError(f"constraint for {pattern!r} must be a Constraint or None, got {constraint!r}")
        matches = [name for name in operators if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.weight")]
        if not matches:
            raise ConfigurationError(f"no parameter matches {pattern!r}; those with a bound are {sorted(operators)}")
        for name in matches:
            if name not in settled:
                settled.add(name)
                if constraint is not None:
                    chosen[name] = constraint
    return chosen
