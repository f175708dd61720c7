"""Structured linear layers: orthonormal bases, certified norms, bounds that are attained, nearest points, gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    LayerBounds,
    RuleContext,
    architectures,
    constraints,
    gradient_gated,
    losses,
)
from clipless_dp.gates.gradient_layers import gradient_gated_layer
from clipless_dp.gates.plain import plain_copy
from clipless_dp.layers import Diagonal, StructuredLinear
from clipless_dp.norms.circulant import circle_norm
from clipless_dp.norms.operators import CirculantOperator
from clipless_dp.rules import base
from clipless_dp.testing import BoundBroken, LipschitzLayerTestCase

STRUCTURES = ("circulant", "skew", "toeplitz", "hankel", "block-circulant")
SIZES = ((6, 6), (7, 7), (8, 4), (4, 8), (1, 5), (5, 1), (1, 1))


def made(structure: str, entries: int, outputs: int, *, bias: bool = True, seed: int = 0) -> StructuredLinear:
    block = math.gcd(entries, outputs) if structure == "block-circulant" else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = StructuredLinear(entries, outputs, structure, block, bias=bias).double()  # type: ignore[arg-type]
        nn.init.normal_(layer.weight)
    return layer


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(layer: StructuredLinear) -> Tensor:
    """The matrices of the coefficients, one by one: ``(coefficients, out, in)``."""
    units = torch.eye(layer.weight.numel(), dtype=torch.float64)
    return torch.stack(
        [
            torch.func.functional_call(_Matrix(layer), {"layer.weight": unit.reshape(layer.weight.shape)}, ())
            for unit in units
        ]
    )


class _Matrix(nn.Module):
    def __init__(self, layer: StructuredLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.matrix()


def exact_norm(layer: StructuredLinear) -> float:
    return float(torch.linalg.matrix_norm(layer.matrix().detach(), 2))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("entries", "outputs"), SIZES)
def test_matrices_of_the_coefficients_are_orthonormal(structure: str, entries: int, outputs: int) -> None:
    found = basis(made(structure, entries, outputs)).flatten(1)
    torch.testing.assert_close(found @ found.mT, torch.eye(len(found), dtype=torch.float64), atol=1e-12, rtol=0.0)


@pytest.mark.parametrize(
    ("structure", "entry"),
    [
        ("circulant", lambda c, i, j: c[(i - j) % 5] / math.sqrt(5)),
        ("skew", lambda c, i, j: (c[(i - j) % 5] if i >= j else -c[(i - j) % 5]) / math.sqrt(5)),
        ("toeplitz", lambda c, i, j: c[i - j + 4] / math.sqrt(5 - abs(i - j))),
        ("hankel", lambda c, i, j: c[i + j] / math.sqrt(5 - abs(i + j - 4))),
    ],
)
def test_entries_are_those_of_the_definition(structure: str, entry: Callable[[Tensor, int, int], Tensor]) -> None:
    layer = made(structure, 5, 5)
    expected = torch.stack([torch.stack([entry(layer.weight, i, j) for j in range(5)]) for i in range(5)])
    torch.testing.assert_close(layer.matrix(), expected)
    inputs = drawn(3, 2, 5)
    torch.testing.assert_close(layer(inputs), inputs @ expected.mT + layer.bias)


def test_blocks_are_circulant_each_with_coefficients_of_its_own() -> None:
    layer = StructuredLinear(6, 9, "block-circulant", 3).double()
    for row in range(3):
        for column in range(2):
            taps = layer.weight[row, column] / math.sqrt(3)
            expected = torch.stack([taps.roll(shift) for shift in range(3)], 1)
            block = layer.matrix()[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            torch.testing.assert_close(block, expected)


@given(
    structure=st.sampled_from(STRUCTURES),
    entries=st.integers(1, 12),
    outputs=st.integers(1, 12),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1.0, 1e-200, 1e150]),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_certified_norms_are_above_the_exact_ones_and_equal_to_them_for_whole_circulants(
    structure: str, entries: int, outputs: int, seed: int, scale: float
) -> None:
    layer = made(structure, entries, outputs, seed=seed)
    exact = exact_norm(layer) * scale
    with torch.no_grad():
        layer.weight.mul_(scale)
    found = layer.operator().norm(layer.weight)
    assert found >= exact * (1.0 - 1e-12)
    if structure == "block-circulant" or (structure in ("circulant", "skew") and entries == outputs):
        assert found <= exact * (1.0 + 1e-3 if structure == "block-circulant" else 1.0 + 1e-11)
    else:
        assert found <= exact * (math.sqrt(max(entries, outputs)) + 1e-6)


def test_the_whole_frequencies_are_no_bound_of_a_skew_circulant() -> None:
    """The mutant: they fall below the norm."""
    layers = [made("skew", 8, 8, seed=seed) for seed in range(10)]
    assert any(circle_norm(layer.weight / math.sqrt(8), 8) < 0.99 * exact_norm(layer) for layer in layers)


def test_a_circle_of_the_inputs_alone_is_no_bound_of_a_toeplitz_matrix() -> None:
    """The mutant, wraps missed: too few frequencies."""
    # A tone between two frequencies of eight points.
    tone = torch.cos((torch.arange(15).double() - 7.0) * math.pi / 8.0)
    matrix = tone.unfold(0, 8, 1).flip(1)
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    assert circle_norm(tone, 8) < 0.5 * exact
    for points in (15, 16, 40):
        assert circle_norm(tone, points) >= exact
        assert circle_norm(tone, points, odd=True) >= exact


def test_norms_of_many_frequencies_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    taps = drawn(30)
    whole = circle_norm(taps, 30), circle_norm(taps, 31, odd=True)
    monkeypatch.setattr("clipless_dp.norms.circulant._CACHED_ENTRIES", 0)
    monkeypatch.setattr("clipless_dp.norms.circulant._CHUNK_ENTRIES", 70)
    assert (circle_norm(taps, 30), circle_norm(taps, 31, odd=True)) == pytest.approx(whole, rel=1e-12)
    assert whole[0] == pytest.approx(float(torch.fft.fft(taps).abs().max()), rel=1e-12)
    assert circle_norm(torch.zeros(4), 4) == 0.0


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("entries", "outputs"), [(6, 6), (8, 4), (3, 9)])
@pytest.mark.parametrize("positions", [1, 4])
def test_each_sample_s_gradient_is_the_projection_of_the_dense_one(
    structure: str, entries: int, outputs: int, positions: int
) -> None:
    layer = made(structure, entries, outputs)
    inputs, cotangents = drawn(3, positions, entries), drawn(3, positions, outputs, seed=2)
    dense = torch.einsum("bto,bti->boi", cotangents, inputs)
    expected = torch.einsum("boi,moi->bm", dense, basis(layer)).reshape(3, *layer.weight.shape)
    torch.testing.assert_close(layer.coefficients(inputs, cotangents), expected)
    (found,) = torch.autograd.grad(layer(inputs), layer.weight, cotangents)
    torch.testing.assert_close(found, expected.sum(0))
    assert bool((expected.flatten(1).norm(dim=1) <= dense.flatten(1).norm(dim=1) * (1 + 1e-12)).all())


@pytest.mark.parametrize("structure", ["circulant", "block-circulant"])
def test_constant_and_pure_tone_signals_attain_the_bound_of_circulants(structure: str) -> None:
    size = 8
    layer = StructuredLinear(size, size, structure, size if structure == "block-circulant" else None).double()  # type: ignore[arg-type]
    angles = torch.arange(size) * (2.0 * math.pi / size)
    for frequency in (0, size // 2):
        signal = torch.cos(frequency * angles.double())[None, None]
        product = float(signal.norm() ** 2)
        assert float(layer.coefficients(signal, signal).norm()) == pytest.approx(product, rel=1e-12)


def test_a_pure_tone_of_two_signs_reaches_all_but_the_root_of_two() -> None:
    """A real tone is two complex ones, of which each meets its own only."""
    layer = StructuredLinear(16, 16).double()
    tone = torch.cos(3.0 * torch.arange(16).double() * (2.0 * math.pi / 16))[None, None]
    reached = float(layer.coefficients(tone, tone).norm()) / float(tone.norm() ** 2)
    assert reached == pytest.approx(math.sqrt(0.5), rel=1e-12)


class Structured(LipschitzLayerTestCase):
    """Attributes: ``made``, what a layer of this kind is made with besides its inputs."""

    shapes = ((5,),)
    steps = 2
    # A single corner entry of a Toeplitz matrix is a diagonal of its own.
    attained: ClassVar = {"weight": 0.99}
    made: ClassVar[dict[str, Any]] = {}

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return StructuredLinear(shape[-1], **self.made)


class TestCirculant(Structured):
    shapes = ((6,), (2, 5))
    attained: ClassVar = {"weight": 0.99, "bias": 0.99}

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return StructuredLinear(shape[-1], shape[-1])


class TestSkewCirculant(Structured):
    attained: ClassVar = {}
    made: ClassVar = {"out_features": 3, "structure": "skew"}


class TestToeplitz(Structured):
    made: ClassVar = {"out_features": 6, "structure": "toeplitz"}


class TestHankel(Structured):
    made: ClassVar = {"out_features": 3, "structure": "hankel", "bias": False}


class TestBlocks(Structured):
    shapes = ((6,),)
    attained: ClassVar = {"weight": 0.9}
    made: ClassVar = {"out_features": 4, "structure": "block-circulant", "block": 2}


class TestDiagonal(LipschitzLayerTestCase):
    shapes = ((3, 4),)
    steps = 2
    attained: ClassVar = {"weight": 0.99, "bias": 0.99}

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return Diagonal(shape[-1], bias=True)


class RawCirculant(StructuredLinear):
    """The mutant: coefficients that are the entries themselves, up to one factor."""

    def matrix(self) -> Tensor:
        return super().matrix() * math.sqrt(self.in_features)


def test_raw_coefficients_pass_the_bound_of_orthonormal_ones_by_the_root_of_n(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))
    factors = [1.0]

    def rule(module: RawCirculant, context: RuleContext) -> LayerBounds:
        return LayerBounds(
            output_norm=1e9, lipschitz=1e9, gradients={"weight": lambda: factors[-1] * context.input_norm}
        )

    base.register_rule(RawCirculant)(rule)

    class Raw(LipschitzLayerTestCase):
        shapes = ((9,),)
        steps = 2

        def build(self, shape: tuple[int, ...]) -> nn.Module:
            return RawCirculant(9, 9, bias=False)

    for factor in (1.0, 2.9):
        factors.append(factor)
        with pytest.raises(BoundBroken, match="weight"):
            Raw().test_no_signal_at_any_loss_scale_passes_a_bound()
    factors.append(3.0)
    Raw().test_no_signal_at_any_loss_scale_passes_a_bound()


@pytest.mark.parametrize("structure", ["circulant", "skew", "block-circulant"])
@pytest.mark.parametrize(("entries", "outputs"), [(6, 6), (7, 7), (8, 4), (3, 9)])
def test_projections_are_the_nearest_points_and_keep_what_is_within(structure: str, entries: int, outputs: int) -> None:
    layer = made(structure, entries, outputs)
    operator, before = layer.operator(), layer.weight.detach().clone()
    projected = before.clone()
    constraint = constraints.Spectral(0.4)
    constraint.project_(projected, (operator,))
    assert operator.norm(projected) <= 0.4
    assert constraint.holds(projected, (operator,))
    again = projected.clone()
    constraint.project_(again, (operator,))
    assert torch.equal(again, projected)
    distance = float((projected - before).norm())
    divided = before * (0.4 / operator.norm(before))
    assert distance <= float((divided - before).norm()) * (1.0 + 1e-9)
    # A convex set: the way to the nearest point makes an obtuse angle with the way from there to any other.
    for seed in range(20):
        other = drawn(*before.shape, seed=seed)
        other *= 0.4 / operator.norm(other)
        assert float(((before - projected) * (other - projected)).sum()) <= 1e-6
    frame = before.clone()
    constraints.Orthogonal().initialize_(frame, (operator,))
    with torch.no_grad():
        layer.weight.copy_(frame)
    found = layer.matrix().detach()
    found = found if outputs <= entries else found.mT
    torch.testing.assert_close(found @ found.mT, torch.eye(len(found), dtype=torch.float64), atol=1e-3, rtol=0.0)
    assert exact_norm(layer) <= 1.0
    for seed in range(20):
        other = drawn(*before.shape, seed=seed)
        constraints.Orthogonal().project_(other, (operator,))
        assert float((frame - before).norm()) <= float((other - before).norm()) * (1.0 + 1e-6)


def test_tangent_gradients_leave_orthogonality_to_first_order() -> None:
    layer = made("skew", 8, 8)
    operator = layer.operator()
    constraint = constraints.Orthogonal(tangent=True)
    weight, gradient = layer.weight.detach().clone(), drawn(8)
    constraint.initialize_(weight, (operator,))
    kept = gradient.clone()
    constraint.project_gradient_(kept, weight, (operator,))
    assert 0.1 < float(kept.norm()) < float(gradient.norm())
    errors = []
    for step in (1e-3, 1e-4):
        with torch.no_grad():
            layer.weight.copy_(weight + step * kept)
        matrix = layer.matrix().detach()
        errors.append(float((matrix @ matrix.mT - torch.eye(8)).norm()))
    assert errors[1] < 0.02 * errors[0]


@pytest.mark.parametrize("structure", ["toeplitz", "hankel"])
def test_what_has_no_nearest_orthogonal_point_is_refused_and_divided_by_its_norm(structure: str) -> None:
    layer = made(structure, 6, 4)
    operators = (layer.operator(),)
    for wrong in (constraints.Orthogonal(), constraints.AlmostOrthogonal()):
        with pytest.raises(ConfigurationError, match="Spectral"):
            wrong.project_(layer.weight.data, operators)
    for right in (constraints.Spectral(), constraints.Frobenius()):
        right.project_(layer.weight.data, operators)
        assert exact_norm(layer) <= 1.0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_start_at_norm_one(structure: str) -> None:
    torch.manual_seed(3)
    layer = StructuredLinear(8, 8, structure, 4 if structure == "block-circulant" else None)  # type: ignore[arg-type]
    assert layer.operator().norm(layer.weight) == pytest.approx(1.0, abs=2e-3)
    if structure in ("circulant", "skew"):
        matrix = layer.matrix().detach()
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(8), atol=1e-5, rtol=0.0)


BUILD: dict[str, Callable[[], nn.Module]] = {
    **{structure: lambda structure=structure: made(structure, 6, 4) for structure in STRUCTURES},
    "diagonal": lambda: Diagonal(6, bias=True).double(),
}


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("mode", ["clip", "normalize"])
@pytest.mark.parametrize("joint", [None, "layer"])
@pytest.mark.parametrize("positions", [None, 3])
def test_gates_scale_each_sample_s_own_gradient(name: str, mode: Any, joint: Any, positions: int | None) -> None:
    layer = BUILD[name]()
    gated = gradient_gated_layer(layer, 0.8, mode=mode, joint=joint)
    shape = (6,) if positions is None else (positions, 6)
    inputs = drawn(5, *shape) * torch.tensor([1e-4, 0.1, 1.0, 10.0, 0.0]).double().reshape(-1, *[1] * len(shape))
    inputs.requires_grad_()
    output = gated(inputs)
    torch.testing.assert_close(output, layer(inputs))
    cotangents = drawn(*output.shape, seed=3)
    parameters = [layer.weight, layer.bias]
    found = torch.autograd.grad(output, [inputs, *parameters], cotangents)
    torch.testing.assert_close(found[0], torch.autograd.grad(layer(inputs), inputs, cotangents)[0])
    floor = 0.01 if mode == "normalize" else 1.0
    expected = [torch.zeros_like(p) for p in parameters]
    for sample in range(5):
        one = slice(sample, sample + 1)
        own = torch.autograd.grad(layer(inputs[one]), parameters, cotangents[one])
        norms = [float(g.norm()) for g in own]
        if joint:
            norms = [math.hypot(*norms)] * 2
        expected = [
            total + g * 0.8 / max(norm, 0.8 * floor) for total, g, norm in zip(expected, own, norms, strict=True)
        ]
    torch.testing.assert_close(list(found[1:]), expected)


def test_gated_networks_train_and_bound_and_export_as_the_plain_ones() -> None:
    torch.manual_seed(0)
    net = architectures.circulant_mlp((6,), 3, depth=2)
    caps = gradient_gated(net, limit=0.1)
    model = DPLipModel(caps, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(3.0))
    assert all(bound <= 0.1001 for bound in model.sensitivity().per_parameter.values())
    inputs = torch.randn(4, 6)
    torch.testing.assert_close(plain_copy(caps)(inputs), net(inputs))
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=1.0, dataset_size=4, sampling="none")
    model.loss(model(inputs), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert optimizer.get_epsilon(1e-5) > 0.0


def test_the_sensitivity_of_constrained_circulants_does_not_depend_on_the_size() -> None:
    for size in (8, 32):
        torch.manual_seed(0)
        net = architectures.circulant_mlp((size,), 3)
        model = DPLipModel(
            net,
            input_shape=(size,),
            input_norm=1.0,
            loss=losses.TauCrossEntropy(3.0),
            constraint=constraints.Spectral(),
        )
        found = model.sensitivity().per_parameter
        assert found == pytest.approx(dict.fromkeys(found, math.sqrt(2.0)), rel=1e-5)
        assert sum(p.numel() for p in net.parameters()) == 2 * size + 3 * size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 4, "banded"), "structure"),
        ((0, 4), "in_features"),
        ((4, 4.0), "out_features"),
        ((4, 4, "circulant", 2), "block"),
        ((4, 4, "block-circulant"), "block"),
        ((4, 6, "block-circulant", 4), "divide"),
        ((4, 6, "block-circulant", 0), "block"),
    ],
)
def test_bad_sizes_and_structures_are_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        StructuredLinear(*arguments)


def test_bad_diagonals_and_networks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="features"):
        Diagonal(0)
    with pytest.raises(ConfigurationError, match="last axis"):
        Diagonal(3)(torch.zeros(2, 1))
    with pytest.raises(ConfigurationError, match="even"):
        architectures.circulant_mlp((5,), 3)
    with pytest.raises(ConfigurationError, match="structure"):
        architectures.circulant_mlp((6,), 3, structure="toeplitz")  # type: ignore[arg-type]
    assert isinstance(StructuredLinear(3, 5).operator(), CirculantOperator)
