"""The allowances for rounding are there: the worst rounding that each proof admits is injected, and covered.

Actual rounding is far milder than the proofs allow, so without injection a missing allowance would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clipless_dp.norms import conv2d_norm, dense, dense_norm, eigenvalue, symbol
from clipless_dp.norms.budget import Effort
from clipless_dp.norms.rounding import UNIT
from tests.norms.truth import exactly_bounds

Bound = Callable[..., float]


def shrinking(original: Bound, products: int) -> Bound:
    """The eigenvalue bound of Gram matrices of positive entries, all of whose sums of products rounded down."""

    def bound(grams: Tensor, effort: Effort, floor: float = 0.0) -> float:
        return original(grams * (1.0 - products * UNIT), effort, floor)

    return bound


def test_the_worst_rounding_of_a_gram_matrix_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rank one, where the trace bound has no slack of its own.
    weight = torch.full((2, 20_000), 0.75)
    monkeypatch.setattr(dense, "largest_eigenvalue_bound", shrinking(dense.largest_eigenvalue_bound, 20_000))
    monkeypatch.setattr(dense, "min", lambda *bounds: bounds[-1], raising=False)
    assert exactly_bounds(dense_norm(weight), weight)


def test_the_worst_rounding_of_a_symbol_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    # Constant kernels peak at frequency zero, where every phase is exactly one: ‖K̂(0)‖ = taps·√(out·in)·entry.
    channels, taps = 500, 9
    weight = torch.full((2, channels, 3, 3), 0.5)
    matrix = torch.full((2, channels), 0.5 * taps)
    products = channels * taps + 25
    monkeypatch.setattr(symbol, "largest_eigenvalue_bound", shrinking(symbol.largest_eigenvalue_bound, products))
    bound = conv2d_norm(weight, input_size=(12, 12), padding=1, padding_mode="circular")
    assert exactly_bounds(bound, matrix)


def test_the_worst_rounding_of_a_factorisation_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40
    gram = torch.diag(torch.linspace(0.1, 1.0, size, dtype=torch.float64))
    deceived = 1.0 - size * (size + 1) * UNIT

    def certifies_as_low_as_its_theorem_allows(grams: Tensor, level: float) -> Tensor:
        return torch.full((len(grams),), level >= deceived)

    monkeypatch.setattr(eigenvalue, "cholesky_certifies", certifies_as_low_as_its_theorem_allows)
    monkeypatch.setattr(eigenvalue, "trace_bounds", lambda grams: (torch.tensor([2.0]), torch.tensor([0.0])))
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda grams: torch.tensor([deceived], dtype=torch.float64))
    effort = Effort(factorise=True, tolerance=0.0, riesz_slack=0.1, explicit_flops=0.0)
    assert eigenvalue.largest_eigenvalue_bound(gram[None], effort) >= 1.0


@pytest.mark.parametrize("budget", ["cheap", "balanced", "tight"])
@pytest.mark.parametrize("taps", [2, 3, 5])
def test_a_peak_between_the_points_of_the_grid_is_covered(taps: int, budget: str) -> None:
    # Out channels cos(ωt) and sin(ωt) put the peak of the symbol near ω, for frequencies all over the circle.
    offsets = torch.arange(taps, dtype=torch.float64)
    fine = torch.arange(2048, dtype=torch.float64) * (torch.pi / 2048)
    for omega in torch.linspace(0.0, torch.pi, 41, dtype=torch.float64).tolist():
        kernel = torch.stack([torch.cos(omega * offsets), torch.sin(omega * offsets)])
        phases = torch.polar(torch.ones(taps, 2048, dtype=torch.float64), offsets[:, None] * fine[None, :])
        supremum = float((kernel.to(torch.complex128) @ phases).abs().square().sum(0).max().sqrt())
        bound = conv2d_norm(kernel.reshape(2, 1, 1, taps), input_size=None, budget=budget)  # type: ignore[arg-type]
        # A dozen float64 roundings in this supremum.
        assert bound >= supremum * (1.0 - 1e-14)
