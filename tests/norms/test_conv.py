"""The certified norm of a convolution is never below the truth, and close above it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipless_dp.errors import NormError
from clipless_dp.norms import budget as budgets
from clipless_dp.norms import conv, conv1d_norm, conv2d_norm, coverage, dense_norm, eigenvalue, symbol
from clipless_dp.norms.conv import _zero_padded_bound
from clipless_dp.norms.geometry import Axis
from tests.norms.convolutions import KINDS, random_cases
from tests.norms.truth import (
    TRUTH_ROUNDING,
    conv_matrix,
    exactly_bounds,
    lanczos_conv_norm,
    spectral,
)

BUDGETS = ("cheap", "coarse", "balanced", "tight")


@pytest.fixture
def never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small convolutions are certified from their matrix; this sends them through the symbol as well."""
    for name, effort in list(budgets._EFFORTS.items()):
        monkeypatch.setitem(budgets._EFFORTS, name, dataclasses.replace(effort, explicit_flops=0.0))


def assert_never_below(count: int, seed: int, largest: int) -> None:
    for case in random_cases(count, seed, largest):
        for budget in BUDGETS:
            bound = conv2d_norm(case.weight, input_size=case.size, budget=budget, **case.arguments())
            assert bound >= case.truth * (1.0 - TRUTH_ROUNDING), (case, budget)
            assert math.isfinite(bound)
            try:
                everywhere = conv2d_norm(case.weight, input_size=None, budget=budget, **case.arguments())
            except NormError:
                assert case.padding_mode == "circular"
            else:
                assert everywhere >= case.truth * (1.0 - TRUTH_ROUNDING), (case, budget, "any size")


def test_no_bound_is_below_the_truth_for_any_geometry() -> None:
    assert_never_below(250, seed=0, largest=7)


@pytest.mark.usefixtures("never_written_out")
def test_no_symbol_or_coverage_bound_is_below_the_truth_for_any_geometry() -> None:
    assert_never_below(250, seed=1, largest=7)


@pytest.mark.slow
@pytest.mark.usefixtures("never_written_out")
@pytest.mark.parametrize("seed", range(2, 6))
def test_no_symbol_or_coverage_bound_is_below_the_truth_in_a_long_search(seed: int) -> None:
    assert_never_below(1000, seed=seed, largest=11)


@pytest.mark.usefixtures("never_written_out")
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_maps_are_bounded_in_exact_rational_arithmetic(kind: str) -> None:
    torch.manual_seed(0)
    for shape, size, sides in [
        ((1, 1, 3, 3), (2, 2), ((1, 1), (1, 1))),
        ((1, 2, 2, 2), (2, 1), ((0, 1), (1, 1))),
        ((2, 1, 1, 3), (1, 3), ((0, 0), (1, 1))),
    ]:
        weight = KINDS[kind](shape)
        matrix = conv_matrix(weight, size, sides)
        for budget in BUDGETS:
            bound = conv2d_norm(weight, input_size=size, padding=sides, budget=budget)  # type: ignore[arg-type]
            assert exactly_bounds(bound, matrix)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-4.0, 4.0, width=16), min_size=18, max_size=18),
    st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]),
    st.sampled_from(BUDGETS),
)
def test_symbol_and_coverage_bounds_hold_in_exact_rational_arithmetic(
    taps: list[float], size: tuple[int, int], budget: str
) -> None:
    weight = torch.tensor(taps, dtype=torch.float64).reshape(1, 2, 3, 3)
    effort = dataclasses.replace(budgets.effort_of(budget), explicit_flops=0.0)
    lines = [(Axis(n, 3, 1, 1, 1, 1), n) for n in size]
    bound = _zero_padded_bound(weight[None], lines, effort)
    assert exactly_bounds(bound, conv_matrix(weight, size, ((1, 1), (1, 1))))


def test_default_is_within_two_percent_on_gaussian_64_channels_of_32_by_32() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64, 3, 3)
    # Lanczos approaches the truth from below, so the true gap is smaller still.
    reached = lanczos_conv_norm(weight, (32, 32), padding=1, steps=25)
    assert reached <= conv2d_norm(weight, input_size=(32, 32), padding=1) <= 1.02 * reached


@pytest.mark.usefixtures("never_written_out")
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (4, 6), (6, 4)])
def test_circular_convolutions_are_exact_on_their_own_torus(stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3)
    padding = dilation
    matrix = conv_matrix(
        weight,
        (12, 12),
        ((padding, padding),) * 2,
        stride=stride,
        dilation=dilation,
        padding_mode="circular",
    )
    bound = conv2d_norm(
        weight,
        input_size=(12, 12),
        padding=padding,
        stride=stride,
        dilation=dilation,
        padding_mode="circular",
        budget="tight",
    )
    # 1e-9 of slack for the search; the grid of 12 frequencies is evaluated in full.
    truth = spectral(matrix)
    assert truth * (1.0 - TRUTH_ROUNDING) <= bound <= truth * (1.0 + 1e-8)


def test_small_maps_are_exact_at_the_tight_budget() -> None:
    for case in random_cases(40, seed=8, largest=5):
        if case.padding_mode == "zeros":
            bound = conv2d_norm(case.weight, input_size=case.size, budget="tight", **case.arguments())
            assert bound <= case.truth * (1.0 + 1e-8)


@pytest.mark.usefixtures("never_written_out")
def test_a_bound_for_any_size_covers_large_maps_and_is_close_to_them() -> None:
    torch.manual_seed(0)
    for kind in ("gaussian", "constant", "checkerboard", "wave"):
        weight = KINDS[kind]((2, 1, 3, 3))
        bound = conv2d_norm(weight, input_size=None)
        truth = spectral(conv_matrix(weight, (26, 26), ((1, 1), (1, 1))))
        # A 26-pixel window loses about (π/26)²/2 per axis on a smooth peak; the grid costs at most 1 %.
        assert truth * (1.0 - TRUTH_ROUNDING) <= bound <= truth * 1.04


def test_unit_kernels_have_the_norm_of_their_matrix() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 5, 1, 1)
    # The same matrix through two routes, each with a slack of at most 1e-9.
    assert conv2d_norm(weight, input_size=None) == pytest.approx(dense_norm(weight[..., 0, 0]), rel=1e-8)


@pytest.mark.usefixtures("never_written_out")
def test_stride_lets_only_the_taps_of_one_class_meet() -> None:
    # A 2×2 mean of stride 2 has norm 1/2; without the polyphase split its symbol reaches 1.
    weight = torch.full((1, 1, 2, 2), 0.25)
    assert conv2d_norm(weight, input_size=(8, 8), stride=2) == pytest.approx(0.5, rel=1e-9)
    assert conv2d_norm(weight, input_size=None, stride=2) == pytest.approx(0.5, rel=1e-9)


def test_a_transposed_convolution_has_the_norm_of_its_adjoint() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    forward = conv2d_norm(weight, input_size=(9, 9), stride=2, padding=1)
    backward = conv2d_norm(weight, input_size=(5, 5), stride=2, padding=1, transposed=True)
    assert forward == backward


def test_the_norm_of_groups_is_the_largest_of_theirs() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 2, 3, 3)
    alone = [conv2d_norm(part, input_size=(6, 6), padding=1, budget="tight") for part in weight.split(2)]
    together = conv2d_norm(weight, input_size=(6, 6), padding=1, groups=3, budget="tight")
    # Two searches with a slack of 1e-9 each.
    assert together == pytest.approx(max(alone), rel=1e-8)


def test_one_dimensional_convolutions_are_bounded() -> None:
    torch.manual_seed(0)
    for kernel, size, stride, dilation, padding, transposed in [
        (3, 10, 1, 1, (1, 1), False),
        (4, 9, 2, 1, (1, 2), False),
        (5, 12, 3, 2, (4, 4), False),
        (3, 5, 2, 1, (1, 1), True),
        (7, 2, 1, 1, (3, 3), False),
    ]:
        weight = torch.randn(3, 2, kernel)
        matrix = conv_matrix(weight, (size,), (padding,), stride=stride, dilation=dilation, transposed=transposed)
        options: dict[str, Any] = {
            "stride": stride,
            "dilation": dilation,
            "padding": (padding,),
            "transposed": transposed,
        }
        for budget in BUDGETS:
            bound = conv1d_norm(weight, input_size=size, budget=budget, **options)  # type: ignore[arg-type]
            assert bound >= spectral(matrix) * (1.0 - TRUTH_ROUNDING)
        assert conv1d_norm(weight, input_size=None, **options) >= spectral(matrix) * (1.0 - TRUTH_ROUNDING)


def test_every_way_to_give_a_padding_means_the_same() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 2, 3, 5)
    expected = conv2d_norm(weight, input_size=(7, 8), padding=((1, 1), (2, 2)))
    assert conv2d_norm(weight, input_size=(7, 8), padding=(1, 2)) == expected
    assert conv2d_norm(weight, input_size=(7, 8), padding="same") == expected
    assert conv2d_norm(weight, input_size=(7, 8), padding="valid") == conv2d_norm(weight, input_size=(7, 8))


def test_a_huge_tap_that_meets_only_padding_does_not_hide_the_others() -> None:
    weight = torch.full((1, 1, 1, 3), 1e-200, dtype=torch.float64)
    weight[..., 0] = 1e200
    matrix = torch.tensor([[1e-200]], dtype=torch.float64)
    for budget in BUDGETS:
        bound = conv2d_norm(weight, input_size=(1, 1), padding=(0, 1), budget=budget)  # type: ignore[arg-type]
        assert exactly_bounds(bound, matrix)
        assert bound < 1.001e-200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.usefixtures("never_written_out")
def test_types_scales_and_strides_of_memory_do_not_matter(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(3, 3, 4, 4) * scale).to(dtype).permute(3, 1, 0, 2)
    if not bool(torch.isfinite(weight).all()):
        pytest.skip("the type cannot hold this scale")
    truth = spectral(conv_matrix(weight.double(), (5, 5), ((1, 1), (1, 1))))
    for budget in BUDGETS:
        bound = conv2d_norm(weight, input_size=(5, 5), padding=1, budget=budget)  # type: ignore[arg-type]
        assert bound >= truth * (1.0 - TRUTH_ROUNDING)
        assert bound == conv2d_norm(weight.contiguous(), input_size=(5, 5), padding=1, budget=budget)  # type: ignore[arg-type]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert bound == conv2d_norm(weight, input_size=(5, 5), padding=1, budget=budget)  # type: ignore[arg-type]


def test_the_coverage_of_a_tiny_map_tightens_the_cheap_bound() -> None:
    weight = torch.full((1, 1, 5, 5), 1.0)
    # On a 2×2 map every pixel meets four windows, and only nine of the taps meet any pixel: √4·√9.
    # The symbol alone gives the sum of the nine.
    assert coverage((2, 2), 5, padding=2) == 4
    bound = conv2d_norm(weight, input_size=(2, 2), padding=2, budget="cheap")
    assert bound == pytest.approx(6.0, rel=1e-9)


@pytest.mark.usefixtures("never_written_out")
@pytest.mark.parametrize("budget", BUDGETS)
def test_many_wide_groups_are_all_bounded(budget: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3 * 170, 180, 1, 1)
    weight[170:340] *= 1.5
    truth = spectral(weight[170:340, :, 0, 0])
    bound = conv2d_norm(weight, input_size=(4, 4), groups=3, budget=budget)  # type: ignore[arg-type]
    assert bound >= truth * (1.0 - TRUTH_ROUNDING)


@pytest.mark.usefixtures("never_written_out")
@pytest.mark.parametrize("budget", BUDGETS)
def test_one_loud_frequency_among_many_equal_ones_is_found(budget: str) -> None:
    # A shift has the same norm at every frequency; a weak wave lifts one of them a little.
    size, kernel = 16, 5
    weight = torch.zeros(4, 4, kernel, kernel, dtype=torch.float64)
    weight[..., 2, 2] = torch.eye(4)
    offsets = torch.arange(kernel) - 2
    wave = torch.cos(2.0 * math.pi * (3 * offsets[:, None] + 5 * offsets[None, :]) / size)
    weight[0, 0] += 0.01 * wave
    matrix = conv_matrix(weight, (size, size), ((2, 2), (2, 2)), padding_mode="circular")
    arguments: dict[str, Any] = {"input_size": (size, size), "padding": 2, "padding_mode": "circular"}
    bound = conv2d_norm(weight, budget=budget, **arguments)  # type: ignore[arg-type]
    truth = spectral(matrix)
    assert truth > 1.1
    assert bound >= truth * (1.0 - TRUTH_ROUNDING)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_on_a_gpu_are_bounded_whatever_tf32_is_set_to() -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    try:
        weight = torch.randn(32, 16, 3, 3, device="cuda")
        expected = conv2d_norm(weight.cpu(), input_size=(12, 12), padding=1)
        # Two certificates with a slack of 2.5e-4 each, from different libraries.
        assert conv2d_norm(weight, input_size=(12, 12), padding=1) == pytest.approx(expected, rel=1e-3)
        matrix = torch.randn(300, 400, device="cuda")
        assert dense_norm(matrix) >= spectral(matrix.cpu()) * (1.0 - TRUTH_ROUNDING)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (2, 0, 3, 3), (2, 3, 0, 3)])
def test_an_empty_or_zero_kernel_has_norm_zero(shape: tuple[int, ...]) -> None:
    assert conv2d_norm(torch.zeros(shape), input_size=(4, 4)) == 0.0
    assert conv2d_norm(torch.zeros(2, 3, 3, 3), input_size=None) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding_mode": "reflect"}, "padding_mode"),
        ({"padding_mode": "replicate"}, "padding_mode"),
        ({"padding_mode": "circular", "padding": 7}, "circular padding"),
        ({"padding_mode": "circular", "transposed": True}, "transposed"),
        ({"padding_mode": "circular", "input_size": None, "stride": 2}, "input_size"),
        ({"padding": "same", "stride": 2}, "same"),
        ({"padding": "full"}, "padding"),
        ({"padding": "same", "transposed": True}, "transposed"),
        ({"groups": 3}, "groups"),
        ({"groups": 0}, "groups"),
        ({"stride": 0}, "stride"),
        ({"dilation": (1, 2, 3)}, "dilation"),
        ({"input_size": (2, 2)}, "no window fits"),
        ({"input_size": (6,)}, "input_size"),
        ({"budget": "none"}, "budget"),
    ],
)
def test_malformed_convolutions_get_a_typed_error(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"input_size": (6, 6), **changes}
    with pytest.raises(NormError, match=message):
        conv2d_norm(torch.ones(4, 2, 3, 3), **arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_kernel_gets_a_typed_error_even_where_it_meets_no_pixel(bad: float) -> None:
    weight = torch.ones(1, 1, 3, 3)
    weight[0, 0, 0, 0] = bad
    with pytest.raises(NormError, match="NaN or an infinity"):
        conv2d_norm(weight, input_size=(1, 1), padding=1)


@pytest.mark.parametrize("weight", [torch.ones(2, 2), torch.ones(2, 2, 3), torch.ones(2, 2, 3, 3).int()])
def test_anything_but_a_real_kernel_gets_a_typed_error(weight: Tensor) -> None:
    with pytest.raises(NormError):
        conv2d_norm(weight, input_size=(6, 6))


@pytest.mark.parametrize("answer", [0.0, 0.3, 0.999, 1e9, math.inf, math.nan])
def test_a_lying_guide_cannot_push_the_bound_of_a_small_symbol_below_the_truth(
    answer: float, monkeypatch: pytest.MonkeyPatch, never_written_out: None
) -> None:
    honest = eigenvalue._small_estimate
    monkeypatch.setattr(eigenvalue, "_small_estimate", lambda grams: answer * honest(grams))
    for case in random_cases(20, 5, 6):
        bound = conv2d_norm(case.weight, input_size=case.size, **case.arguments())
        assert bound >= case.truth * (1.0 - TRUTH_ROUNDING)


def circle_truth(kernel: Tensor, size: int) -> float:
    """The largest norm of the matrices of all frequencies of a circle."""
    transformed = torch.fft.rfft2(kernel, s=(size, size)).permute(2, 3, 0, 1).flatten(0, 1)
    return float(torch.linalg.matrix_norm(transformed, 2).max())


@pytest.mark.parametrize("budget", ["balanced", "tight"])
def test_a_bound_does_not_grow_with_the_parts_into_which_frequencies_are_cut(
    budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(12, 12, 3, 3, dtype=torch.float64)
    kernel /= kernel.abs().max()
    monkeypatch.setattr(symbol, "_CHUNK_ENTRIES", 2 * 12**2)
    monkeypatch.setattr(eigenvalue, "_SMALL_ENTRIES", 0)
    bound = symbol.symbol_norm_bound(kernel[None], (32, 32), budgets.effort_of(budget))
    # Each of 272 parts of two raised it by 5e-4 where it was covered already.
    assert 1.0 - TRUTH_ROUNDING <= bound / circle_truth(kernel, 32) <= 1.0 + 6e-4


@pytest.mark.parametrize("above", [1e-9, 1e-6, 4e-4, 0.1])
@pytest.mark.parametrize("entries", [0, 1 << 15])
def test_a_floor_that_covers_all_is_what_a_bound_stays_at(
    above: float, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(eigenvalue, "_SMALL_ENTRIES", entries)
    factors = torch.randn(3, 12, 30, dtype=torch.complex128)
    grams = factors @ factors.mH
    floor = float(torch.linalg.eigvalsh(grams).max()) * (1.0 + above)
    assert (
        floor <= eigenvalue.largest_eigenvalue_bound(grams, budgets.effort_of("balanced"), floor) <= floor * (1 + 1e-9)
    )


@pytest.mark.parametrize(
    "channels", [160, pytest.param(256, marks=pytest.mark.slow), pytest.param(512, marks=pytest.mark.slow)]
)
def test_wide_convolutions_are_certified_within_6e_4_of_their_circle(channels: int) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(channels, channels, 3, 3, dtype=torch.float64)
    kernel /= kernel.abs().max()
    size = 5 if channels == 160 else 8
    # Warnings are errors: guides of complex matrices were real.
    bound = symbol.symbol_norm_bound(kernel[None], (size, size), budgets.effort_of("balanced"))
    assert 1.0 - TRUTH_ROUNDING <= bound / circle_truth(kernel, size) <= 1.0 + 6e-4


def test_what_is_kept_of_a_geometry_says_nothing_of_kernels() -> None:
    torch.manual_seed(0)
    kernels = [torch.randn(4, 2, 4, 4) * 10.0**i for i in range(3)]

    def bounds() -> list[float]:
        return [conv2d_norm(kernel, input_size=(14, 13), stride=(2, 1), padding=3) for kernel in kernels]

    fresh = bounds()
    assert bounds() == fresh
    for kept in (conv._reads, conv._most_reads, conv._phase_places, symbol._pairs, symbol._all_phases):
        kept.cache_clear()
    assert bounds()[::-1] == fresh[::-1]
    truths = [spectral(conv_matrix(kernel, (14, 13), ((3, 3), (3, 3)), stride=(2, 1))) for kernel in kernels]
    assert all(truth <= bound <= 1.1 * truth for truth, bound in zip(truths, fresh, strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 4, 3, 3), (1, 5, 2, 1, 4), (1, 1, 1, 5, 5)])
def test_all_products_of_taps_at_once_are_those_of_each_difference(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(shape, dtype=torch.float64)
    together = symbol._correlations(kernel)
    monkeypatch.setattr(symbol, "_PAIRED_TAPS", 0)
    # Sums of under 200 products of float64.
    torch.testing.assert_close(together, symbol._correlations(kernel), rtol=1e-12, atol=1e-12)


def test_phases_are_found_in_large_kernels_as_in_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch.randn(2, 3, 2, 5, 4, dtype=torch.float64)
    small = conv.polyphase(kernel, (2, 3), (1, 2))
    monkeypatch.setattr(conv, "_PLACES_TO", 0)
    assert torch.equal(small, conv.polyphase(kernel, (2, 3), (1, 2)))
