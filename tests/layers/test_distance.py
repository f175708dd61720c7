"""Layers of distances and order statistics: values, gradients with their norms, ties, slopes in the maximum norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import ConfigurationError, layers
from clipless_dp.layers import DistanceLinear, SortLinear, distance, set_exponent_

Build = Callable[[int, int], nn.Module]

LAYERS: dict[str, Build] = {
    "distances": lambda n, m: DistanceLinear(n, m),
    "p = 2": lambda n, m: DistanceLinear(n, m, p=2.0),
    "p = 8": lambda n, m: DistanceLinear(n, m, p=8.0),
    "p = 1000": lambda n, m: DistanceLinear(n, m, p=1000.0),
    "means, p = 8": lambda n, m: DistanceLinear(n, m, p=8.0, mean=True),
    "order statistics": lambda n, m: SortLinear(n, m),
    "order statistics, few terms": lambda n, m: SortLinear(n, m, 0.5, terms=3),
    "order statistics, no bias": lambda n, m: SortLinear(n, m, 0.9, terms=2, bias=False),
}


def made(name: str, entries: int = 7, outputs: int = 5, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LAYERS[name](entries, outputs).double()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(layer: nn.Module, inputs: Tensor) -> Tensor:
    """By the definition, with what autograd makes of it."""
    sizes = (inputs[:, None, :] - layer.weight).abs()
    if isinstance(layer, SortLinear):
        shares = torch.tensor([(1.0 - layer.quantile) ** k for k in range(layer.terms)], dtype=torch.float64)
        values = (sizes.sort(-1, descending=True).values[..., : layer.terms] * shares / shares.sum()).sum(-1)
    elif math.isinf(layer.p):
        values = sizes.amax(-1)
    else:
        powers = sizes**layer.p
        values = (powers.mean(-1) if layer.mean else powers.sum(-1)) ** (1.0 / layer.p)
    return values if layer.bias is None else values + layer.bias


@pytest.mark.parametrize("chunk", [1, 20, 1 << 18])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "p = 1000"])
def test_values_and_gradients_are_those_of_the_definition_in_pieces_of_any_size(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distance, "_CHUNK", chunk)
    monkeypatch.setattr(distance, "_ROWS", chunk)
    monkeypatch.setattr(distance, "_FEW", chunk % 2)
    layer, inputs, cotangent = made(name), drawn(6, 7).requires_grad_(), drawn(6, 5, seed=2)
    wanted = [inputs, *layer.parameters()]
    found, expected = layer(inputs), reference(layer, inputs)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(found, wanted, cotangent), torch.autograd.grad(expected, wanted, cotangent), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_is_one(name: str) -> None:
    layer, inputs = made(name), torch.zeros(0, 7, dtype=torch.float64, requires_grad=True)
    layer(inputs).sum().backward()
    assert layer(inputs).shape == (0, 5)
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


@given(st.floats(1e-3, 1.0), st.integers(1, 40))
def test_coefficients_add_to_one_exactly_in_both_precisions(quantile: float, terms: int) -> None:
    shares = distance.order_weights(quantile, terms)
    assert len(shares) == terms
    assert min(shares) >= 0.0
    assert math.fsum(shares) == 1.0
    assert [float(torch.tensor(one)) for one in shares] == list(shares)


def jacobians(layer: nn.Module, inputs: Tensor) -> Tensor:
    """``v`` of each output, ``(B, out, in)``."""
    inputs = inputs.detach().requires_grad_()
    values = layer(inputs).sum(0)
    return torch.stack([torch.autograd.grad(one, inputs, retain_graph=True)[0] for one in values], 1)


def limits(layer: nn.Module) -> tuple[float, float]:
    """What ``‖v‖₁`` and ``‖v‖₂`` are at most."""
    growth = 1.0 if isinstance(layer, SortLinear) or math.isinf(layer.p) else layer.in_features ** (1.0 / layer.p)
    shrunk = growth if isinstance(layer, DistanceLinear) and layer.mean else 1.0
    return growth / shrunk, 1.0 / shrunk


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=6, deadline=None)
@given(entries=st.integers(1, 9), ties=st.booleans(), seed=st.integers(0, 1000))
def test_gradients_are_as_short_as_proved_where_differences_tie_too(
    name: str, entries: int, ties: bool, seed: int
) -> None:
    layer, inputs = made(name, entries, 4, seed), 2.0 * drawn(5, entries, seed=seed)
    if ties:
        # Whole numbers: many differences are alike, and some are zero.
        with torch.no_grad():
            layer.weight.copy_(layer.weight.round())
        inputs = inputs.round()
    found, (first, second) = jacobians(layer, inputs), limits(layer)
    assert float(found.abs().sum(-1).max()) <= first * (1.0 + 1e-12)
    assert float(found.norm(dim=-1).max()) <= second * (1.0 + 1e-12)
    weights = torch.autograd.grad(layer(inputs).sum(), layer.weight)[0]
    assert torch.allclose(weights, -found.sum(0))


@pytest.mark.parametrize("p", [2.0, 8.0, 100.0])
def test_the_l1_norm_of_a_p_norms_gradient_grows_as_proved_and_no_less(p: float) -> None:
    layer = DistanceLinear(6, 1, p=p).double()
    inputs = layer.weight.detach() + 0.3
    assert float(jacobians(layer, inputs).abs().sum()) == pytest.approx(6 ** (1.0 / p), rel=1e-9)
    alone = layer.weight.detach() + torch.eye(6, dtype=torch.float64)[:1]
    assert float(jacobians(layer, alone).norm()) == pytest.approx(1.0, rel=1e-9)


def test_maxima_that_tie_share_evenly_as_in_amax_and_not_each_in_full_as_in_cdist() -> None:
    layer = DistanceLinear(4, 1).double()
    with torch.no_grad():
        layer.weight.zero_()
    tied = torch.tensor([[1.0, -1.0, 1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    third = torch.tensor([[1.0, -1.0, 1.0, 0.0]], dtype=torch.float64) / 3.0
    assert torch.allclose(jacobians(layer, tied)[:, 0], third)
    assert torch.allclose(torch.autograd.grad(tied.abs().amax(), tied)[0], third)
    in_full = torch.autograd.grad(torch.cdist(tied, layer.weight.detach(), p=math.inf).sum(), tied)[0]
    assert float(in_full.abs().sum()) == 3.0


def steepest(layer: nn.Module, entries: int, steps: int = 15) -> float:
    """The largest slope in maximum norms that a search over pairs finds."""
    points, found = drawn(64, entries, seed=5), 0.0
    for step in range(steps):
        size = 10.0 ** (-3 * (step % 3) / 2)
        slopes = jacobians(layer, points).flatten(0, 1)
        picked = slopes[slopes.abs().sum(-1).argsort(descending=True)[:64]]
        moved = points[: len(picked)] + size * picked.sign()
        apart = (layer(moved) - layer(points[: len(picked)])).abs().amax(1) / size
        found = max(found, float(apart.detach().max()))
        points = points + 0.5 * drawn(*points.shape, seed=step)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_no_search_finds_a_slope_above_one_in_the_maximum_norm_and_some_come_near(name: str) -> None:
    most = limits(made(name))[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        deep = nn.Sequential(*[LAYERS[name](7, 7) for _ in range(3)]).double()
    found = steepest(made(name), 7)
    assert (0.6 if "p = " in name else 0.98) * most <= found <= most * (1.0 + 1e-9)
    assert steepest(deep, 7, steps=5) <= most**3 * (1.0 + 1e-9)


def test_a_search_notices_coefficients_that_are_not_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "order_weights", lambda q, terms: tuple((1.0 - q) ** k for k in range(terms)))
    assert steepest(made("order statistics"), 7) > 1.5


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [1e38, math.inf, math.nan])
def test_what_flows_back_stays_bounded_where_differences_overflow(name: str, size: float) -> None:
    layer = made(name).float()
    inputs = torch.tensor([[size, 1.0, -size, 0.0, 2.0, 3.0, 1.0]], requires_grad=True)
    with torch.no_grad():
        layer.weight.mul_(3e38)
    found = torch.autograd.grad(layer(inputs), [inputs, layer.weight], torch.ones(1, 5))
    assert all(bool(one.isfinite().all()) for one in found)
    assert float(found[1].norm()) <= math.sqrt(5.0) * (1.0 + 1e-5)


def test_the_same_layer_serves_through_second_derivatives_of_values() -> None:
    layer, inputs = made("order statistics"), drawn(3, 7).requires_grad_()
    dual = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    (back,) = torch.autograd.grad(layer(inputs), inputs, dual, create_graph=True)
    direction = drawn(3, 7, seed=8)
    (along,) = torch.autograd.grad(back, dual, direction)
    expected = torch.einsum("boi,bi->bo", jacobians(layer, inputs), direction)
    assert torch.allclose(along, expected, atol=1e-9)


def test_biases_start_where_outputs_of_random_inputs_are_near_zero() -> None:
    layer = made("order statistics", 20, 8)
    values = layer(torch.rand(400, 20, dtype=torch.float64) - 0.5).detach()
    assert float(values.mean(0).abs().max()) < 0.1 * float((values - layer.bias.detach()).mean())


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: DistanceLinear(4, 2, p=1.5), "p must be"),
        (lambda: DistanceLinear(4, 2, p=math.nan), "p must be"),
        (lambda: DistanceLinear(0, 2), "in_features"),
        (lambda: SortLinear(4, 2, 0.0), "quantile"),
        (lambda: SortLinear(4, 2, terms=0), "terms"),
        (lambda: set_exponent_(nn.Sequential(DistanceLinear(4, 2)), 1.0), "p must be"),
        (lambda: SortLinear(4, 2)(torch.zeros(3, 5)), "expected inputs"),
        (lambda: layers.SortLinear(4, 2)(torch.zeros(3, 2, 4)), "flatten"),
        (lambda: SortLinear(4, 2).half()(torch.zeros(3, 4).half()), "float32 or float64"),
    ],
)
def test_what_has_no_bound_is_refused(build: Callable[[], object], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        build()
