"""Nearly orthogonal convolutions: a coarse grid and what may lie between its points bound the norm, never below it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp.layers import orthogonal_
from clipless_dp.norms import budget as budgets
from clipless_dp.norms import conv1d_norm, conv2d_norm, symbol
from tests.norms.truth import TRUTH_ROUNDING
from tests.soundness.mutation import Mutant

FINE = 60
"""Frequencies an axis of the truth, which is that of a layer on a large image, too."""


def near(channels: int, size: float, *, seed: int = 0, stride: int = 1, taps: int = 3, more: int = 0) -> Tensor:
    """An orthogonal kernel, and noise of a size beside its entries."""
    torch.manual_seed(seed)
    layer = orthogonal_(nn.Conv2d(channels, channels + more, taps, stride, padding=taps // 2, bias=False)).double()
    kernel = layer.weight.detach()
    return kernel + size * kernel.std() * torch.randn_like(kernel)


def truth(kernel: Tensor, points: int = FINE) -> float:
    """The largest norm at the frequencies of a grid: no more than that at all frequencies."""
    taps = torch.arange(kernel.shape[-1], dtype=torch.float64)
    angles = torch.arange(points, dtype=torch.float64) * (2.0 * math.pi / points)
    waves = torch.exp(-1j * angles[:, None] * taps)
    largest = 0.0
    for row in waves[: points // 2 + 1]:
        symbols = torch.einsum("oist,s,wt->woi", kernel.to(torch.complex128), row, waves)
        largest = max(largest, float(torch.linalg.matrix_norm(symbols, 2).max()))
    return largest


@pytest.fixture(params=["float32 factorisations", "float64"])
def found(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[float | None]:
    """What coarse grids have bounded so far; ``None`` where they were given up."""
    if request.param == "float64":
        # As on other devices, and of more rows.
        monkeypatch.setattr(symbol, "single_deviations_serve", lambda *_: False)
    seen: list[float | None] = []
    original = symbol._between_frequencies

    def noted(*args: Any) -> float | None:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(symbol, "_between_frequencies", noted)
    for name, effort in list(budgets._EFFORTS.items()):
        monkeypatch.setitem(budgets._EFFORTS, name, dataclasses.replace(effort, explicit_flops=0.0))
    return seen


@pytest.mark.parametrize("budget", ["coarse", "balanced"])
@pytest.mark.parametrize("size", [0.0, 1e-5, 3e-4, 1e-3, 3e-3, 1e-2, 0.1, 1.0])
def test_no_bound_is_below_the_truth_and_each_is_as_tight_as_it_says(
    budget: Any, size: float, found: list[float | None]
) -> None:
    kernel = near(24, size)
    bound = conv2d_norm(kernel, input_size=(30, 30), padding=1, budget=budget)
    # Coarse grids are of all frequencies, and others of those of the layer's circle.
    exact = truth(kernel, 31)
    assert bound >= (truth(kernel) if found else exact) * (1.0 - TRUTH_ROUNDING)
    assert bound <= exact * (1.0 + (1.3e-3 if budget == "coarse" else 6.5e-4))
    if size <= 3e-4:
        assert found
        assert found[-1] is not None
    if size >= 0.1:
        assert not found


@pytest.mark.parametrize("more", [0, 9])
@pytest.mark.parametrize(("stride", "taps"), [(1, 2), (2, 3), (2, 4), (1, 5)])
def test_other_taps_strides_and_more_outputs_than_inputs_are_bounded_too(
    stride: int, taps: int, more: int, found: list[float | None]
) -> None:
    for size in (0.0, 1e-4, 1e-3):
        kernel = near(28, size, stride=stride, taps=taps, more=more)
        bound = conv2d_norm(kernel, input_size=(64, 64), stride=stride, padding=taps // 2, budget="coarse")
        other = conv2d_norm(kernel, input_size=(64, 64), stride=stride, padding=taps // 2, budget="tight")
        assert other * (1.0 - 1e-8) <= bound <= other * (1.0 + 1.3e-3)
    assert any(one is not None for one in found)


def test_groups_of_different_norms_and_signals_are_bounded_by_the_largest(found: list[float | None]) -> None:
    grouped = torch.cat([near(24, 1e-4, seed=seed) * (1.0 + 1e-4 * seed) for seed in range(3)])
    bound = conv2d_norm(grouped, input_size=(32, 32), padding=1, groups=3, budget="coarse")
    exact = max(truth(part) for part in grouped.split(24))
    assert exact * (1.0 - TRUTH_ROUNDING) <= bound <= exact * (1.0 + 1.3e-3)
    assert found[-1] is not None
    # Far apart their span is no small one.
    count = len(found)
    conv2d_norm(torch.cat([near(24, 0.0), 0.5 * near(24, 0.0)]), input_size=(32, 32), padding=1, groups=2)
    assert len(found) == count
    line = near(32, 0.0)[..., 1, :]
    line = line + 1e-4 * line.std() * torch.randn_like(line)
    other = conv1d_norm(line, input_size=400, padding=1, budget="tight")
    assert other * (1.0 - 1e-8) <= conv1d_norm(line, input_size=400, padding=1, budget="coarse") <= other * 1.02


@given(
    taps=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    density=st.integers(4, 12),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_no_trigonometric_polynomial_rises_further_between_the_points_of_a_grid(
    taps: tuple[int, int], density: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = tuple(max(1, density * (count - 1)) for count in taps)
    spectrum = torch.zeros(48, 48, dtype=torch.complex128)
    for high in range(taps[0]):
        for wide in range(taps[1]):
            real, imaginary = torch.randn(2, generator=generator, dtype=torch.float64)
            spectrum[high, wide] = torch.complex(real, imaginary)
            spectrum[high, -wide] = torch.complex(imaginary, real)
    points = torch.arange(48, dtype=torch.float64)

    def values(count: tuple[int, ...]) -> Tensor:
        first, second = (torch.arange(one, dtype=torch.float64) * (2.0 * math.pi / one) for one in count)
        waves = [
            torch.exp(1j * axis[:, None] * torch.where(points > 24, points - 48, points)) for axis in (first, second)
        ]
        return (waves[0] @ spectrum @ waves[1].mT).real

    everywhere, coarse = values((240, 240)), values(grid)
    share = symbol._share_between(taps, grid)
    span = float(coarse.max() - coarse.min())
    assert float(everywhere.max()) <= float(coarse.max()) + share * span + 1e-9 * (1.0 + span)
    assert float(everywhere.min()) >= float(coarse.min()) - share * span - 1e-9 * (1.0 + span)


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("density", [4, 6, 8, 12])
def test_a_tone_halfway_between_two_points_attains_the_bound(degree: int, density: int) -> None:
    points = density * degree
    angles = torch.arange(points, dtype=torch.float64) * (2.0 * math.pi / points) - math.pi / points
    tone = torch.cos(degree * angles)
    share = symbol._share_between((degree + 1, 1), (points, 1))
    assert float(tone.max() + share * (tone.max() - tone.min())) == pytest.approx(1.0, abs=1e-12)
    # The mutant: half of the degree, that of the kernel's own symbol.
    wrong = symbol._share_between((degree / 2 + 1, 1), (points, 1))  # type: ignore[arg-type]
    assert float(tone.max() + wrong * (tone.max() - tone.min())) < 0.99


def between_points(size: float) -> Tensor:
    """A kernel that is nearly a shift: eigenvalues ``1 + 2ε·cos(2ω ± π/4) + ε²``, largest between a grid's points."""
    kernel = torch.zeros(24, 24, 3, 3, dtype=torch.float64)
    kernel[..., 1, 0] = torch.eye(24)
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) * math.sqrt(0.5)
    kernel[..., 1, 2] = size * torch.block_diag(*[turn] * 12)
    return kernel


MUTANTS = (
    Mutant(
        "what lies between forgotten",
        symbol,
        "_share_between",
        "enlarge((1.0 - product)",
        "enlarge(0.0 * (1.0 - product)",
    ),
    Mutant("the degree of the symbol itself", symbol, "_share_between", "(count - 1)", "(0.5 * count - 0.5)"),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fall_below_the_truth(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch, found: list[float | None]
) -> None:
    kernels = [between_points(size) for size in (1e-3, 1e-2)]
    truths = [1.0 + size for size in (1e-3, 1e-2)]
    assert truth(kernels[1], 48) == pytest.approx(truths[1], rel=1e-12)
    # The largest eigenvalues lie halfway between the points of this grid.
    monkeypatch.setattr(symbol, "_DENSITIES", (4,))

    def shortest() -> float:
        return min(
            conv2d_norm(kernel, input_size=None, padding=1, budget="coarse") / largest
            for kernel, largest in zip(kernels, truths, strict=True)
        )

    monkeypatch.setitem(
        budgets._EFFORTS, "coarse", dataclasses.replace(budgets.effort_of("coarse"), between=0.1, tolerance=1e-9)
    )
    assert shortest() >= 1.0 - 1e-12
    assert any(one is not None for one in found)
    mutant.apply(monkeypatch)
    assert shortest() < 1.0 - 1e-9
