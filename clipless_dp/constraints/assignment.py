"""Which parameter gets which constraint."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from clipless_dp.constraints.base import Constraint, ConstraintSpec
from clipless_dp.constraints.frobenius import Frobenius
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms.operators import DiagonalOperator, Operator, VectorOperator


def assign(spec: ConstraintSpec, operators: Mapping[str, tuple[Operator, ...]]) -> dict[str, Constraint]:
    """Which constraint each parameter gets.

    Args:
        spec: one constraint for every weight that acts as a linear operator (biases are left alone; slopes of
            activations are clamped to its limit), or a mapping
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
            # Each slope is a block of its own, so this clamps them one by one and leaves the small ones alone.
            name: Frobenius(spec.limit) if all(isinstance(operator, DiagonalOperator) for operator in acting) else spec
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
