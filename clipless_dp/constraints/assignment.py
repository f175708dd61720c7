"""Which parameter gets which constraint."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from clipless_dp.arguments import shown
from clipless_dp.constraints.base import Constraint, ConstraintSpec
from clipless_dp.constraints.frobenius import Frobenius
from clipless_dp.constraints.penalty import LipschitzPenalty, penalised
from clipless_dp.constraints.row_norm import RowNorm
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.operators import DiagonalOperator, Operator, TableOperator, VectorOperator


def assign(spec: ConstraintSpec, operators: Mapping[str, tuple[Operator, ...]]) -> dict[str, Constraint]:
    """Which constraint each parameter gets.

    Args:
        spec: one constraint for every weight that acts as a linear operator (biases are left alone; slopes of
            activations are clamped to its limit, and rows of embeddings shortened to it), or a mapping
            from patterns to constraints. A pattern (``fnmatch``) is matched against parameter names
            (``"0.weight"``, ``"*.bias"``); one that matches a layer's path means its weight. The first match
            counts; ``None`` leaves a parameter free.
        operators: the operators each parameter acts as.

    Raises:
        ConfigurationError: a pattern matches nothing, or a value is not a constraint.
    """
    if spec is None:
        return {}
    if isinstance(spec, Constraint) and not operators:
        raise ConfigurationError(
            "no weight of the network has a norm that a constraint could bound: a network that runs sample by sample, "
            "behind gradient gates, needs no constraint"
        )
    if isinstance(spec, Constraint):
        return {
            name: _fitting(spec, acting)
            for name, acting in operators.items()
            if not all(isinstance(operator, VectorOperator) for operator in acting)
            and (penalised(acting) or not isinstance(spec, LipschitzPenalty))
        }
    if not isinstance(spec, Mapping):
        raise ConfigurationError(f"constraint must be a Constraint, a mapping or None, got {type(spec).__name__}")
    chosen: dict[str, Constraint] = {}
    settled: set[str] = set()
    for pattern, constraint in spec.items():
        if not (constraint is None or isinstance(constraint, Constraint)):
            raise ConfigurationError(f"constraint for {pattern!r} must be a Constraint or None, got {constraint!r}")
        if not isinstance(pattern, str):
            raise ConfigurationError(f"names and patterns of parameters are strings, got {shown(pattern)}")
        matches = [name for name in operators if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.weight")]
        if not matches:
            raise ConfigurationError(f"no parameter matches {pattern!r}; those with a bound are {sorted(operators)}")
        for name in matches:
            if isinstance(constraint, LipschitzPenalty) and not penalised(operators[name]):
                raise ConfigurationError(
                    f"{name!r} is no weight of a linear layer or convolution, of which alone LipschitzPenalty knows"
                )
            if name not in settled:
                settled.add(name)
                if constraint is not None:
                    chosen[name] = constraint
    return chosen


def _fitting(spec: Constraint, acting: tuple[Operator, ...]) -> Constraint:
    """Slopes and rows of a table are blocks of their own: they are shrunk one by one, and the small ones left alone."""
    if all(isinstance(operator, DiagonalOperator) for operator in acting):
        return Frobenius(spec.limit)
    if all(isinstance(operator, TableOperator) for operator in acting):
        return RowNorm(spec.limit)
    return spec
