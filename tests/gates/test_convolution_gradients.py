"""The ways in which a sample's gradient of a kernel is formed give one gradient: they differ in time alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp.gates import convolutions, gradient_gated_layer, rounding_slack
from tests.soundness.mutation import Mutant

WAYS = ("windows", "rows", "groups")
Geometry = tuple[list[int], list[int], list[int], list[int], int]


def expected(values: Tensor, cotangents: Tensor, geometry: Geometry) -> Tensor:
    """Each sample's gradient by torch, one sample at a time, in float64: ``(b, O, C/groups, kh, kw)``."""
    kernel, stride, padding, dilation, groups = geometry
    found = []
    for sample, arriving in zip(values.double(), cotangents.double(), strict=True):
        weight = torch.zeros(len(arriving), len(sample) // groups, *kernel, dtype=torch.float64, requires_grad=True)
        made = nn.functional.conv2d(sample.unsqueeze(0), weight, None, stride, padding, dilation, groups)
        found.append(torch.autograd.grad(made, weight, arriving.unsqueeze(0))[0])
    return torch.stack(found)


@st.composite
def signals(
    draw: st.DrawFn, *, rows: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Geometry]:
    """Maps and cotangents of any geometry; for rows of a kernel one group, steps of one, and maps channels last."""
    kernel, padding, dilation = ([draw(st.integers(a, b)) for _ in range(2)] for a, b in ((1, 4), (0, 3), (1, 3)))
    stride = [1, 1] if rows else [draw(st.integers(1, 3)) for _ in range(2)]
    groups = 1 if rows else draw(st.integers(1, 3))
    channels, outputs = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    size = [
        draw(st.integers(max(1, step * (taps - 1) + 1 - 2 * side), 10))
        for taps, side, step in zip(kernel, padding, dilation, strict=True)
    ]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = torch.randn(draw(st.integers(1, 5)), channels, *size, generator=generator, dtype=dtype)
    shape = nn.functional.conv2d(
        values, values.new_zeros(outputs, channels // groups, *kernel), None, stride, padding, dilation, groups
    ).shape
    cotangents = torch.randn(shape, generator=generator, dtype=dtype)
    cotangents = cotangents * (10.0 ** torch.linspace(-3.0, 2.0, len(values), dtype=dtype)).reshape(-1, 1, 1, 1)
    if rows or draw(st.booleans()):
        values = values.to(memory_format=torch.channels_last)
    if draw(st.booleans()):
        cotangents = cotangents.to(memory_format=torch.channels_last)
    return values, cotangents, (kernel, stride, padding, dilation, groups)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool((found.double() - wanted).flatten(1).norm(dim=1).le(tolerance * wanted.flatten(1).norm(dim=1)).all())


def by_rows(values: Tensor, cotangents: Tensor, geometry: Geometry, chunk: int = 2) -> Tensor:
    """All samples' gradients from chunks of a few, ``(b, O, C, kh, kw)``."""
    kernel, channels = geometry[0], values.shape[1]
    of_rows = convolutions._ByRows(cotangents.shape[2:], *geometry[:4])
    parts = zip(values.split(chunk), cotangents.split(chunk), strict=True)
    found = torch.cat([of_rows(some, arriving).clone() for some, arriving in parts])
    return found.unflatten(3, (kernel[1], channels)).permute(0, 2, 4, 1, 3)


# Float64 sums of under 10^3 products round by 10^3·2^-53 ≈ 1e-13 of their terms, which may cancel.


@settings(max_examples=80, deadline=None)
@given(given=signals(rows=True))
def test_rows_of_a_kernel_make_each_samples_gradient(given: Any) -> None:
    values, cotangents, geometry = given
    assert close(by_rows(values, cotangents, geometry), expected(values, cotangents, geometry), 1e-10)


@settings(max_examples=80, deadline=None)
@given(given=signals())
def test_one_convolution_whose_groups_are_the_samples_makes_each_samples_gradient(given: Any) -> None:
    values, cotangents, geometry = given
    wanted = expected(values, cotangents, geometry)
    found = convolutions._grouped_gradients(values, cotangents, *geometry)
    assert close(found.reshape(wanted.shape), wanted, 1e-10)
    # By the kernels that training takes: float32 products of under 10^3 terms, γ ≈ 6e-5, that may cancel.
    found = convolutions._grouped_gradients(values.float(), cotangents.float(), *geometry)
    assert close(found.reshape(wanted.shape), wanted, 1e-3)


@settings(max_examples=80, deadline=None)
@given(given=signals())
def test_windows_in_either_order_make_each_samples_gradient(given: Any) -> None:
    values, cotangents, geometry = given
    kernel, _, _, _, groups = geometry
    windows = convolutions._windows(values, cotangents.shape[2:], *geometry)
    found = cotangents.flatten(2).unflatten(1, (groups, -1)) @ windows
    found = found.flatten(1, 2).unflatten(2, (*kernel, -1)).movedim(-1, 2)
    assert close(found, expected(values, cotangents, geometry), 1e-10)


def check_gates(values: Tensor, cotangents: Tensor, geometry: Geometry, chunk: int, mode: str) -> None:
    """Each way's sum, norms, and sum of given factors."""
    limit = 0.5
    least = limit if mode == "clip" else 0.01 * limit
    gradients = expected(values, cotangents, geometry)
    # What is a thousandth of the factors' norms has cancelled, and counts as that large.
    sizes = values.flatten(1).norm(dim=1) * cotangents.flatten(1).norm(dim=1)
    counted = torch.maximum(gradients.flatten(1).norm(dim=1), convolutions.CANCELLED * sizes)
    wanted = (gradients * (limit / counted.clamp(min=least)).reshape(-1, 1, 1, 1, 1)).sum(0)
    factors = torch.linspace(1.0, 2.0, len(values), dtype=torch.float64)
    for way in WAYS:
        with pytest.MonkeyPatch.context() as patched, torch.no_grad():
            patched.setattr(convolutions, "_way", lambda *given, way=way: way)
            kernel = convolutions.Kernel(values, cotangents, *geometry, chunk)
            found, norms = kernel.gated(limit, least)
            assert float((found - wanted).norm()) <= 1e-10 * max(1.0, float(wanted.norm())), way
            # The products of positions add their rounding to squares, 1e-14 of which is 1e-7 of a norm that cancels.
            assert torch.allclose(norms, counted, rtol=1e-6), way
            assert torch.equal(kernel.norms(), norms), way
            total = (gradients * factors.reshape(-1, 1, 1, 1, 1)).sum(0)
            torch.testing.assert_close(kernel.total(factors), total, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["clip", "normalize"])
@settings(max_examples=40, deadline=None)
@given(given=signals(rows=True), chunk=st.sampled_from([0, 1, 2]))
def test_each_way_gives_the_sum_of_gradients_gated_one_by_one(mode: str, given: Any, chunk: int) -> None:
    check_gates(*given, chunk, mode)


def chosen(values: Tensor, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> str:
    geometry = [kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1], groups
    weight = torch.zeros(outputs, values.shape[1] // groups, kernel, kernel, dtype=values.dtype)
    met = nn.functional.conv2d(values, weight, None, *geometry[1:4], groups)
    return convolutions._way(values, met, *geometry)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch's own kernels are oneDNN's")
def test_which_way_is_taken_changes_where_it_should() -> None:
    last = torch.channels_last
    with torch.no_grad():
        maps = torch.zeros(2, 48, 9, 9)
        assert chosen(maps, 16) == "groups"
        # Whole vectors of channels, in every group.
        assert [chosen(maps[:, :count], 16) for count in (7, 8, 9, 16)] == ["windows", "groups"] * 2
        assert [chosen(maps[:, :8], count) for count in (15, 16)] == ["windows", "groups"]
        assert [chosen(maps, 48, groups=count) for count in (2, 3, 6, 12)] == ["groups"] * 3 + ["windows"]
        assert [chosen(maps, 16, stride=2), chosen(maps, 16, kernel=1), chosen(maps.double(), 16)] == ["windows"] * 3
        assert chosen(maps[:0], 16) == "windows"
        # Rows of at least so many entries, of maps that lie channels last, in either dtype.
        wide = maps.to(memory_format=last)
        least = convolutions._ROW_ENTRIES
        assert [
            chosen(wide[:, :count].contiguous(memory_format=last), 16) for count in (least // 3, least // 3 + 1)
        ] == [
            "windows",
            "rows",
        ]
        assert [chosen(wide, 16), chosen(wide.double(), 16), chosen(wide, 48, groups=2)] == ["rows", "rows", "groups"]
    # Where the gradient is differentiated again.
    assert chosen(torch.zeros(2, 8, 9, 9), 16) == "windows"


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e9, 1e17])
@pytest.mark.parametrize("channels", [8, 48])
def test_a_single_sample_never_passes_its_cap_in_float32_whatever_its_company(
    order: torch.memory_format, size: float, channels: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
    limit = 0.5
    gate = gradient_gated_layer(layer, limit)
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(5, channels, 9, 9, generator=generator) * size).contiguous(memory_format=order)
    cotangents = torch.randn(5, 16, 9, 9, generator=generator).contiguous(memory_format=order)
    values[1], cotangents[2, 0, 0, 0], values[3] = math.nan, math.inf, 1e-3 * values[3]

    def gradient(rows: slice) -> Tensor:
        return torch.autograd.grad(gate(values[rows]), layer.weight, cotangents[rows])[0].double()

    total = gradient(slice(None))
    alone = [gradient(slice(row, row + 1)) for row in range(5)]
    # Float32 products of 81 positions, γ_81 ≈ 5e-6, and the slack of two norms.
    slack = rounding_slack(values[0].numel()) * rounding_slack(layer.weight.numel()) * (1.0 + 1e-5)
    assert all(float(one.norm()) <= limit * slack for one in alone)
    assert not alone[1].any()
    assert not alone[2].any()
    # The others are as they are without the samples that are dropped.
    assert float((total - sum(alone)).norm()) <= 1e-4 * max(float(one.norm()) for one in alone) + 1e-30


@pytest.mark.parametrize("joint", [None, "layer"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose2d(2, 4, 2, dilation=3, output_padding=2, groups=2), (2, 3, 3)),
        (nn.ConvTranspose2d(8, 8, 3, padding=1, dilation=3, output_padding=(2, 1)), (8, 6, 6)),
        (nn.ConvTranspose1d(8, 16, 3, stride=2, dilation=4, output_padding=3), (8, 9)),
        (nn.Conv1d(8, 16, 3, padding=1), (8, 24)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_that_nothing_comes_back_from_add_nothing(
    joint: Any, layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The output padding of a transposed layer makes more windows than there are cotangents."""
    layer, limit = layer.to(dtype), 0.5
    gate = gradient_gated_layer(layer, limit, mode="clip", joint=joint)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, *shape, generator=generator, dtype=dtype)
    cotangents = torch.randn(layer(values).shape, generator=generator, dtype=dtype)
    found = torch.autograd.grad(gate(values), list(layer.parameters()), cotangents)
    expected_sums = [torch.zeros_like(one) for one in found]
    for sample, arriving in zip(values.split(1), cotangents.split(1), strict=True):
        alone = torch.autograd.grad(layer(sample), list(layer.parameters()), arriving)
        norms = [float(one.norm()) for one in alone]
        counted = [math.hypot(*norms)] * 2 if joint else norms
        for total, one, norm in zip(expected_sums, alone, counted, strict=True):
            total += one * min(1.0, limit / norm)
    for one, total in zip(found, expected_sums, strict=True):
        # Products of up to 300 terms: γ ≈ 2e-5 in float32.
        assert float((one - total).norm()) <= (1e-4 if dtype == torch.float32 else 1e-12) * float(total.norm())


MUTANTS = (
    Mutant(
        "rows of the kernel in another place", convolutions._ByRows, "__call__", "row * apart * across", "row * across"
    ),
    Mutant(
        "what reaches beyond the maps", convolutions._ByRows, "__call__", "start + first : stop + first", "start : stop"
    ),
    Mutant("no padding", convolutions._ByRows, "__call__", "above : above + height", ": height"),
    Mutant("all rows as the first", convolutions._ByRows, "__call__", "held[:, row]", "held[:, 0]"),
    Mutant("norms of the last chunk", convolutions.Kernel, "_whole", "sample_norms(gradients)", "own"),
    Mutant("entries of the kernel in another order", convolutions.Kernel, "gated", "(1, 3, 0, 2)", "(1, 3, 2, 0)"),
    Mutant(
        "factors of the cap alone",
        convolutions.Kernel,
        "gated",
        "scale_factors(norms, cap=limit, floor=least, weights=own)",
        "limit / norms",
    ),
    Mutant(
        "positions in another order", convolutions, "_windows", "tuple(range(2, 2 + axes))", "tuple(range(3, 3 + axes))"
    ),
)


def check_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for kernel, padding, dilation in (([3, 2], [1, 1], [2, 1]), ([1, 4], [0, 2], [1, 1]), ([2, 3], [2, 0], [1, 2])):
        values = torch.randn(5, 3, 9, 8, generator=generator).double().contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(2, 3, *kernel, dtype=torch.float64)
        made = nn.functional.conv2d(values, weight, None, 1, padding, dilation)
        sizes = 10.0 ** torch.linspace(-5.0, 1.0, 5, dtype=torch.float64)
        cotangents = torch.randn(made.shape, generator=generator).double() * sizes.reshape(-1, 1, 1, 1)
        geometry = kernel, [1, 1], padding, dilation, 1
        assert close(by_rows(values, cotangents, geometry), expected(values, cotangents, geometry), 1e-10)
        for mode in ("clip", "normalize"):
            check_gates(values, cotangents, geometry, 2, mode)


def test_nothing_is_noticed_where_nothing_is_wrong() -> None:
    check_all()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mistakes_are_noticed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_all()
