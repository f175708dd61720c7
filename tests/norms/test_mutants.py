"""Published shortcuts that are not bounds: each is caught below the truth where the certificate is not.

The same checker runs on all of them, so a certificate replaced by one of these would fail here by name.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clipless_dp.norms import conv2d_norm, coverage, dense_norm
from tests.norms.convolutions import checkerboard
from tests.norms.matrices import clustered, gaussian, hidden_top
from tests.norms.truth import TRUTH_ROUNDING, conv_matrix, spectral


def worst_below(norm: Callable[[Tensor], float], cases: list[tuple[Tensor, float]]) -> float:
    """Largest relative error below the truth; non-finite answers count as complete failure."""
    errors = []
    for weight, truth in cases:
        answer = norm(weight)
        errors.append(1.0 - answer / truth if 0.0 <= answer < float("inf") else 1.0)
    return max(0.0, *errors)


def dense_cases() -> list[tuple[Tensor, float]]:
    torch.manual_seed(0)
    matrices = [family(60, 80).float() for family in (gaussian, clustered, hidden_top) for _ in range(4)]
    matrices += [matrices[0] * 1e25, matrices[0] * 1e-25]
    return [(matrix, spectral(matrix)) for matrix in matrices]


# An odd size, whose own frequencies miss the checkerboard.
SIZE, KERNEL, PADDING = 5, 3, 1


def conv_cases() -> list[tuple[Tensor, float]]:
    torch.manual_seed(0)
    kernels = [torch.randn(3, 2, KERNEL, KERNEL) for _ in range(12)] + [checkerboard((2, 2, KERNEL, KERNEL))]
    sides = ((PADDING, PADDING), (PADDING, PADDING))
    return [(kernel, spectral(conv_matrix(kernel, (SIZE, SIZE), sides))) for kernel in kernels]


def power_iteration(weight: Tensor) -> float:
    vector = torch.randn(weight.shape[1])
    for _ in range(30):
        vector = weight.T @ (weight @ (vector / vector.norm()))
        vector = vector / vector.norm()
    return float((weight @ vector).norm())


def float32_gram_iteration(weight: Tensor) -> float:
    current = weight
    for _ in range(5):
        current = current @ current.T
    return float(current.norm()) ** (1.0 / 32.0)


def rescaled_float32_gram_iteration(weight: Tensor) -> float:
    current, logarithm = weight, 0.0
    for rounds in range(14):
        size = float(current.norm())
        if size == 0.0:
            return 0.0
        logarithm += float(torch.log(torch.tensor(size, dtype=torch.float64))) / 2.0**rounds
        current = current / size
        current = current @ current.T
    return float(torch.exp(torch.tensor(logarithm))) * float(current.norm()) ** (0.5**14)


def fft_on_the_image(kernel: Tensor) -> float:
    symbol = torch.fft.fft2(kernel.double(), s=(SIZE, SIZE)).permute(2, 3, 0, 1)
    return float(torch.linalg.svdvals(symbol).max())


def fft_on_the_kernel(kernel: Tensor) -> float:
    symbol = torch.fft.fft2(kernel.double()).permute(2, 3, 0, 1)
    return float(torch.linalg.svdvals(symbol).max())


def without_the_coverage(kernel: Tensor) -> float:
    return spectral(kernel.flatten(1))


def average_coverage(kernel: Tensor) -> float:
    windows = torch.ones(1, 1, SIZE, SIZE)
    counts = torch.nn.functional.conv_transpose2d(windows, torch.ones(1, 1, KERNEL, KERNEL), padding=PADDING)
    return float(counts.mean()) ** 0.5 * spectral(kernel.flatten(1))


@pytest.mark.parametrize(
    "mutant", [power_iteration, float32_gram_iteration, rescaled_float32_gram_iteration], ids=lambda f: f.__name__
)
def test_dense_mutant_falls_below_the_truth(mutant: Callable[[Tensor], float]) -> None:
    assert worst_below(mutant, dense_cases()) > 10.0 * TRUTH_ROUNDING


@pytest.mark.parametrize("scale", [1e-25, 1e6, 1e25])
def test_a_float32_gram_iteration_fails_at_large_and_small_scale(scale: float) -> None:
    torch.manual_seed(0)
    matrix = scale * gaussian(60, 80).float()
    cases = [(matrix, spectral(matrix))]
    # Fourth powers overflow, or underflow to a bound of zero; the certificate scales exactly.
    assert worst_below(float32_gram_iteration, cases) == 1.0
    assert worst_below(dense_norm, cases) <= TRUTH_ROUNDING


@pytest.mark.parametrize(
    "mutant", [fft_on_the_image, fft_on_the_kernel, without_the_coverage], ids=lambda f: f.__name__
)
def test_convolution_mutant_falls_below_the_truth(mutant: Callable[[Tensor], float]) -> None:
    assert worst_below(mutant, conv_cases()) > 10.0 * TRUTH_ROUNDING


def test_average_coverage_falls_below_the_truth_of_a_bright_pixel() -> None:
    # Unfolding copies one central pixel nine times; the average over the map is only 6.8.
    kernel = torch.eye(9).reshape(9, 1, 3, 3)
    truth = spectral(conv_matrix(kernel, (SIZE, SIZE), ((PADDING, PADDING),) * 2))
    assert average_coverage(kernel) < 0.95 * truth
    assert float(coverage((SIZE, SIZE), KERNEL, padding=PADDING)) ** 0.5 == pytest.approx(truth, rel=1e-12)
    assert conv2d_norm(kernel, input_size=(SIZE, SIZE), padding=PADDING) >= truth


@pytest.mark.parametrize("budget", ["cheap", "balanced", "tight"])
def test_certificates_pass_where_the_mutants_fail(budget: str) -> None:
    assert worst_below(lambda w: dense_norm(w, budget=budget), dense_cases()) <= TRUTH_ROUNDING  # type: ignore[arg-type]
    certified = worst_below(
        lambda w: conv2d_norm(w, input_size=(SIZE, SIZE), padding=PADDING, budget=budget),  # type: ignore[arg-type]
        conv_cases(),
    )
    assert certified <= TRUTH_ROUNDING
