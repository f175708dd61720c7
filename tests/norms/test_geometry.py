"""Output sizes and coverage agree with torch and with brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from clipless_dp.errors import NormError
from clipless_dp.norms import coverage, output_size


def brute_coverage(size: int, kernel: int, stride: int, low: int, high: int, dilation: int) -> int:
    unfolded = functional.conv_transpose1d(
        torch.ones(1, 1, (size + low + high - dilation * (kernel - 1) - 1) // stride + 1),
        torch.ones(1, 1, kernel),
        stride=stride,
        dilation=dilation,
    ).flatten()
    counts = torch.zeros(size + low + high)
    counts[: len(unfolded)] = unfolded
    return int(counts[low : low + size].max())


def test_coverage_equals_a_transposed_convolution_of_ones_on_every_small_axis() -> None:
    checked = 0
    for size, kernel, stride, low, high, dilation in itertools.product(
        range(1, 8), range(1, 6), range(1, 5), range(3), range(3), range(1, 4)
    ):
        if size + low + high < dilation * (kernel - 1) + 1:
            continue
        got = coverage(size, kernel, stride=stride, padding=((low, high),), dilation=dilation)
        assert got == brute_coverage(size, kernel, stride, low, high, dilation)
        checked += 1
    assert checked > 1000


def test_coverage_of_a_map_is_the_largest_count_of_its_pixels() -> None:
    ones = torch.ones(1, 1, 6, 5)
    windows = functional.conv2d(ones, torch.ones(1, 1, 3, 2), stride=(2, 1), padding=(1, 0))
    counts = functional.conv_transpose2d(
        torch.ones_like(windows), torch.ones(1, 1, 3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0)
    )
    assert coverage((6, 5), (3, 2), stride=(2, 1), padding=(1, 0)) == int(counts.max())


def test_coverage_is_below_the_window_size_on_tiny_maps_and_with_strides() -> None:
    assert coverage((2, 2), 5, padding=2) == 4
    assert coverage((28, 28), 5, stride=2, padding=2) == 9
    assert coverage((8, 8), 2, stride=2) == 1


def test_same_padding_puts_the_odd_pixel_where_torch_does() -> None:
    image = torch.randn(1, 1, 5, 6)
    kernel = torch.randn(1, 1, 3, 5)
    assert output_size((5, 6), (3, 5), padding="same") == tuple(
        functional.conv2d(image, kernel, padding="same").shape[2:]
    )
    assert coverage(2, 4, padding="same") == coverage(2, 4, padding=((1, 2),))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_output_size_equals_torch_pooling(ceil_mode: bool) -> None:
    for size, kernel, stride, dilation in itertools.product(range(1, 12), range(1, 5), range(1, 5), range(1, 3)):
        for padding in range(kernel // 2 + 1):
            try:
                expected = functional.max_pool1d(
                    torch.zeros(1, 1, size), kernel, stride, padding, dilation, ceil_mode=ceil_mode
                ).shape[-1]
            except RuntimeError:
                with pytest.raises(NormError):
                    output_size(size, kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode)
                continue
            got = output_size(size, kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode)
            assert got == (expected,)


def test_ceil_mode_counts_the_overhanging_window() -> None:
    assert output_size(4, 3, stride=1, ceil_mode=True) == (2,)
    assert output_size(6, 3, stride=2, ceil_mode=True) == (3,)
    assert coverage(6, 3, stride=2, ceil_mode=True) == 2
    assert coverage(2, 2, stride=1, padding=1, ceil_mode=True) == 2


def test_output_size_equals_torch_transposed_convolution() -> None:
    for size, kernel, stride, padding, extra in itertools.product(
        range(1, 5), range(1, 5), range(1, 4), range(3), range(2)
    ):
        if extra >= stride:
            continue
        full = (size - 1) * stride + kernel + extra - 2 * padding
        if full < 1:
            continue
        expected = functional.conv_transpose1d(
            torch.zeros(1, 1, size),
            torch.zeros(1, 1, kernel),
            stride=stride,
            padding=padding,
            output_padding=extra,
        ).shape[-1]
        got = output_size(size, kernel, stride=stride, padding=padding, transposed=True, output_padding=extra)
        assert got == (expected,)


def test_circular_coverage_counts_the_pixels_that_padding_copies() -> None:
    assert coverage((2, 2), 3, padding=1) == 4
    assert coverage((2, 2), 3, padding=1, padding_mode="circular") == 9


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "reflect"},
        {"padding": "same", "stride": 2},
        {"padding": -1},
        {"padding": (1, 2, 3)},
        {"padding": ((1, 2), 3)},
        {"stride": 0},
        {"dilation": 1.5},
        {"dilation": 9},
        {"padding_mode": "symmetric"},
        {"padding_mode": "reflect", "padding": 99},
    ],
)
def test_malformed_windows_get_a_typed_error(arguments: dict[str, object]) -> None:
    with pytest.raises(NormError):
        coverage((6, 6), 3, **arguments)  # type: ignore[arg-type]
