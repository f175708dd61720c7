"""What is done to a wrapped model's weights after a step, by parameter name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from clipless_dp.constraints import Constraint
from clipless_dp.errors import NormError
from clipless_dp.norms.operators import Operator


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Says which parameter has no certified norm."""
    try:
        yield
    except NormError as error:
        raise NormError(f"{name}: {error}") from error


def project_(name: str, constraint: Constraint, operators: tuple[Operator, ...], weight: Tensor) -> None:
    """Projects a weight onto its constraint."""
    with naming(name):
        constraint.project_(weight, operators)


def settle_(name: str, constraint: Constraint, operators: tuple[Operator, ...], weight: Tensor) -> None:
    """Projects a weight that its constraint does not hold for."""
    with naming(name):
        if not constraint.holds(weight, operators):
            constraint.project_(weight, operators)


def project_gradient_(
    name: str, constraint: Constraint, operators: tuple[Operator, ...], gradient: Tensor, weight: Tensor
) -> None:
    """Turns a gradient into a direction that the constraint's projection keeps."""
    with naming(name):
        constraint.project_gradient_(gradient, weight, operators)
