"""`AlmostOrthogonal` with rounds, scales and sides: norms before the last division, tightness, and a wrong exponent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clipless_dp import ConfigurationError
from clipless_dp.constraints import AlmostOrthogonal, almost_orthogonal
from clipless_dp.norms.operators import ConvOperator, DenseOperator, Operator


def conv(size: int, groups: int = 1, stride: int = 1, *, transposed: bool = False) -> ConvOperator:
    return ConvOperator((size, size), (stride, stride), ((1, 1), (1, 1)), (1, 1), groups, 9, transposed=transposed)


CASES: dict[str, tuple[Operator, tuple[int, ...]]] = {
    "square": (DenseOperator(), (8, 8)),
    "wide": (DenseOperator(), (4, 9)),
    "tall": (DenseOperator(), (9, 4)),
    "kernel": (conv(6), (4, 3, 3, 3)),
    "more inputs": (conv(6), (2, 5, 3, 3)),
    "groups": (conv(6, groups=2), (4, 3, 3, 3)),
    "strided": (conv(7, stride=2), (4, 3, 3, 3)),
    "transposed": (conv(4, transposed=True), (3, 4, 3, 3)),
}
SCALES = ("unit", "norm", "perron")


def weight_of(name: str, seed: int = 0) -> Tensor:
    return torch.randn(CASES[name][1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm_before_the_division(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> float:
    monkeypatch.setattr(almost_orthogonal, "scale_to_limit_", lambda *arguments: None)
    operator, weight = CASES[name][0], weight_of(name)
    AlmostOrthogonal(**settings).project_(weight, (operator,))
    return operator.norm(weight)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rounds", [1, 2, 4, 6])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("side", ["smaller", "outputs"])
def test_the_diagonal_alone_keeps_the_limit(
    name: str, rounds: int, scales: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a certificate may lie above the norm by.
    found = norm_before_the_division(name, monkeypatch, limit=0.7, rounds=rounds, scales=scales, side=side)
    assert 0.2 < found <= 0.7 * 1.003


def test_a_root_too_few_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the exponent of one round less."""
    sums = almost_orthogonal._power_sums
    monkeypatch.setattr(almost_orthogonal, "_power_sums", lambda kernel, rounds: sums(kernel, rounds) ** 2)
    assert norm_before_the_division("square", monkeypatch, rounds=2) > 1.01


def reference(kernel: Tensor, rounds: int) -> Tensor:
    """By products of the matrix, or of the convolution on a torus that is large enough."""
    gram = kernel.mT @ kernel
    for _ in range(rounds - 1):
        gram = gram @ gram
    return gram.abs().sum(1) ** (0.5**rounds)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_divisors_of_matrices_are_those_of_the_definition(rounds: int) -> None:
    weight = weight_of("tall")
    projected = weight.clone()
    AlmostOrthogonal(rounds=rounds).project_(projected, (DenseOperator(),))
    torch.testing.assert_close(projected, weight / reference(weight, rounds), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("name", ["kernel", "more inputs", "groups", "transposed"])
def test_one_round_of_unit_scales_is_the_correlation_of_before(name: str) -> None:
    operator, weight = CASES[name][0], weight_of(name)
    kernel = operator.kernel(weight)
    torch.testing.assert_close(
        almost_orthogonal._power_sums(kernel, 1).sum(2), almost_orthogonal._correlation_sums(kernel)
    )


@pytest.mark.parametrize("name", ["square", "kernel"])
def test_more_rounds_and_better_scales_lose_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(**settings: Any) -> float:
        return norm_before_the_division(name, monkeypatch, **settings)

    by_rounds = [reached(rounds=rounds, scales="perron") for rounds in (1, 2, 4, 6)]
    assert [round(norm, 6) for norm in by_rounds] == sorted(round(norm, 6) for norm in by_rounds)
    assert by_rounds[-1] > by_rounds[0] + 0.02
    # Zero padding keeps some of a kernel's norm on the torus from it.
    assert by_rounds[-1] > (0.999 if name == "square" else 0.85)
    units = [reached(rounds=rounds) for rounds in (1, 6)]
    assert units[0] + 0.05 < units[1]


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_rescaled_where_that_is_asked_for(name: str) -> None:
    operator, weight = CASES[name][0], weight_of(name)
    projected = weight.clone()
    AlmostOrthogonal(rounds=2, side="outputs").project_(projected, (operator,))
    ratios = operator.kernel(projected / weight)
    ratios = ratios.transpose(1, 2) if name == "transposed" else ratios
    flat = ratios.flatten(2)
    torch.testing.assert_close(flat, flat[..., :1].expand_as(flat), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("change", [lambda w: w.zero_(), lambda w: w[:, 0].zero_(), lambda w: w.mul_(1e-150)])
def test_zeros_and_extreme_sizes_stay_finite(scales: Any, change: Callable[[Tensor], object]) -> None:
    for name in ("square", "kernel"):
        operator, weight = CASES[name][0], weight_of(name)
        change(weight)
        AlmostOrthogonal(rounds=3, scales=scales).project_(weight, (operator,))
        assert bool(weight.isfinite().all())
        assert operator.norm(weight) <= 1.0


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"rounds": 7}, {"scales": "ones"}, {"side": "inputs"}])
def test_bad_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        AlmostOrthogonal(**wrong)
