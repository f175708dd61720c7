"""Float32 factorisations bound how far Hermitian matrices lie from zero, never below the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipless_dp.layers import orthogonal_
from clipless_dp.norms import conv2d_norm, deviations, symbol
from clipless_dp.norms.deviations import single_extremes
from tests.soundness.mutation import Mutant, with_each


def hermitian(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, size, size, generator=generator, dtype=torch.complex64)
    return drawn + drawn.mH


def of_values(*values: float, seed: int = 0) -> Tensor:
    """One matrix of these eigenvalues, but for float32's rounding."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.complex128))[0]
    found = (frame * torch.tensor(values, dtype=torch.float64)) @ frame.mH
    return (0.5 * (found + found.mH)).to(torch.complex64)[None]


BATCHES: dict[str, Callable[[], list[Tensor]]] = {
    "random": lambda: [hermitian(3, 40), hermitian(2, 40, 1)],
    "large": lambda: [hermitian(1, 256), hermitian(1, 256, 1)],
    "two rows": lambda: [hermitian(5, 2)],
    "one row": lambda: [hermitian(5, 1)],
    "positive": lambda: [of_values(*range(1, 31))],
    "negative": lambda: [-of_values(*range(1, 31))],
    "an outlier among many": lambda: [hermitian(4, 30), of_values(900.0, *[0.01] * 29), hermitian(4, 30, 2)],
    "one direction": lambda: [of_values(1.0, *[0.0] * 29), -of_values(3.0, *[0.0] * 29, seed=1)],
    "zeros": lambda: [torch.zeros(2, 5, 5, dtype=torch.complex64)],
    "real": lambda: [hermitian(4, 20).real.contiguous()],
    "larger and larger": lambda: [(1.0 + 0.3 * seed) * hermitian(2, 24, seed) for seed in range(6)],
}


def truth(batches: list[Tensor]) -> tuple[float, float]:
    exact = [batch.to(torch.complex128) for batch in batches]
    values = torch.cat([torch.linalg.eigvalsh(0.5 * (one + one.mH)).flatten() for one in exact])
    return float(values.max()), -float(values.min())


@pytest.mark.parametrize("scale", [1e-25, 1e-9, 1.0, 1e6])
@pytest.mark.parametrize("name", BATCHES)
def test_no_eigenvalue_lies_beyond_and_little_is_added(name: str, scale: float) -> None:
    batches = [scale * batch for batch in BATCHES[name]()]
    true = truth(batches)
    for slack in (1e-12 * scale, 0.1 * scale, 1e3 * scale):
        for found, reach in zip(single_extremes(iter(batches), slack), true, strict=True):
            # LAPACK's rounding.
            assert found >= reach - 1e-13 * max(map(abs, true))
            if slack <= 1e-12 * scale and name != "an outlier among many":
                # A thousandth, a fiftieth of rounding, and what squares that underflow may hide.
                assert found <= max(1.03 * reach, 0.02 * max(true)) + 1e-16


def test_many_batches_raise_the_bound_by_one_slack_and_not_by_one_each() -> None:
    batches = [of_values(*([1.0] * 15), *([-0.5] * 15), seed=seed) for seed in range(12)]
    above, below = single_extremes(batches, 0.05)
    assert 1.0 - 1e-6 <= above <= 1.06
    assert 0.5 - 1e-6 <= below <= 0.56


def test_nothing_bounds_what_is_not_a_number() -> None:
    broken = hermitian(2, 12)
    broken[1, 3, 3] = math.nan
    assert not math.isfinite(max(single_extremes([broken], 0.1)))


def test_guesses_that_are_too_low_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = BATCHES["larger and larger"]()
    true = truth(batches)
    for share in (0.0, 0.5, 0.99):
        monkeypatch.setattr(deviations, "_guess", lambda matrix, *_, share=share: share * truth([matrix[None]])[0])
        assert all(a >= b for a, b in zip(single_extremes(batches, 1e-9), true, strict=True))


MUTANTS = (
    Mutant("all believed", deviations, "_covered", "torch.where(certain, 0.0, norms)", "0.0 * norms"),
    Mutant("one side only", deviations, "single_extremes", "(1.0, -1.0)", "(1.0, 1.0)"),
    Mutant("rounding forgotten", deviations, "_covered", "level, lost\n", "level, 0.0\n"),
    Mutant("later batches forgotten", deviations, "_covered", "pending = ", "pending = (level == 0.0) & "),
)


def shortest(share: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """By how much the bounds of some matrices pass the truth, at least, from guesses of this share of it."""
    monkeypatch.setattr(deviations, "_guess", lambda matrix, *_: share * truth([matrix[None]])[0])
    monkeypatch.setattr(deviations, "_ABOVE", 0.0)
    monkeypatch.setattr(deviations, "_LEAST", 0.0)
    least = math.inf
    for seed in range(6):
        batches = [hermitian(2, 96, seed) + 9.0 * (-1) ** seed * torch.eye(96), hermitian(2, 96, seed + 50)]
        for found, reach in zip(deviations.single_extremes(batches, 0.0), truth(batches), strict=True):
            least = min(least, found / reach - 1.0)
    return least


SHARES = [0.9, 1.001, *(1.0 - step * 2.0**-24 for step in range(4, 24, 2))]
"""Levels below the largest eigenvalue, above it, and so close to it that rounding decides."""


def test_no_guess_falls_below_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(shortest(share, monkeypatch) for share in SHARES) >= 0.0


@with_each(*MUTANTS)
def test_mutants_fall_below_the_truth(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    assert any(shortest(share, monkeypatch) < 0.0 for share in SHARES)


@pytest.mark.parametrize("channels", [40, 300])
@pytest.mark.parametrize("size", [1e-4, 3e-3])
def test_convolutions_are_bounded_by_them_as_by_float64(
    channels: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    kernel = orthogonal_(nn.Conv2d(channels, channels, 2, bias=False)).weight.detach()
    kernel = kernel + size * kernel.std() * torch.randn_like(kernel)
    calls = []
    honest = symbol.single_extremes
    monkeypatch.setattr(symbol, "single_extremes", lambda *args: calls.append(1) or honest(*args))
    found = conv2d_norm(kernel, input_size=(20, 20), budget="coarse")
    assert len(calls) == 1
    monkeypatch.setattr(symbol, "single_deviations_serve", lambda *_: False)
    tight = conv2d_norm(kernel, input_size=(20, 20), budget="tight" if channels == 40 else "balanced")
    assert len(calls) == 1
    # Both have a slack of their own.
    assert tight * (1.0 - (1e-8 if channels == 40 else 5e-4)) <= found <= tight * (1.0 + 1.3e-3)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("kind", ["random", "near", "of rank one", "one tap", "more outputs"])
def test_projections_of_kernels_far_from_orthogonal_divide_by_no_less_than_the_norm(
    kind: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As wide as it serves for, but for time: fewer rows are on the same way.
    monkeypatch.setattr(symbol, "_SINGLE_FROM", 20)
    calls = []
    honest = symbol.single_extremes
    monkeypatch.setattr(symbol, "single_extremes", lambda *args: calls.append(len(args)) or honest(*args))
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(40 if kind == "more outputs" else 24, 24, 3, 3, generator=generator)
    if kind == "near":
        torch.manual_seed(0)
        kernel = orthogonal_(nn.Conv2d(24, 24, 3, bias=False)).weight.detach() + 0.02 * kernel
    elif kind == "of rank one":
        kernel = kernel[:1] * kernel[:, :1, :1, :1]
    elif kind == "one tap":
        kernel = kernel * (torch.arange(9).reshape(3, 3) == 5)
    kernel = scale * kernel
    found = conv2d_norm(kernel, input_size=(30, 30), padding=1, budget="coarse")
    tight = conv2d_norm(kernel, input_size=(30, 30), padding=1, budget="tight")
    symbols = torch.fft.fft2(kernel.double(), s=(31, 31)).permute(2, 3, 0, 1)
    true = float(torch.linalg.matrix_norm(symbols, 2).max())
    if tight < 0.999 * true:
        # A kernel of one tap needs no circle.
        true = tight
    assert true * (1.0 - 1e-13) <= found <= true * (1.0 + 2e-3)
    # What is not near orthogonality has one side only.
    assert 3 in calls or kind in ("of rank one", "one tap")


def test_products_coarser_than_float32_are_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deviations.single_deviations_serve(256, torch.device("cpu"))
    monkeypatch.setattr(deviations, "coarse_products", lambda _: "TF32, say")
    assert not deviations.single_deviations_serve(256, torch.device("cpu"))
