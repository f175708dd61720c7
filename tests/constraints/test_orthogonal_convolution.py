"""Orthogonal kernels stay nearly orthogonal through noisy steps, and within the limit always."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, layers
from clipless_dp.constraints import Constraint, Orthogonal, OrthogonalConvolution, Spectral, orthogonal_convolution
from clipless_dp.constraints.base import scale_to_limit_
from clipless_dp.norms import conv1d_norm, conv2d_norm
from clipless_dp.norms.operators import ConvOperator
from tests.soundness.attack import wrap
from tests.soundness.mutation import Mutant, with_each

CIRCULAR = {"padding": "same", "padding_mode": "circular"}
Build = Callable[[], nn.Module]

# Circular layers on circles that the stride divides are orthogonal at every pixel.
ON_A_CIRCLE: dict[str, tuple[Build, tuple[int, ...]]] = {
    "square 3×3": (lambda: nn.Conv2d(6, 6, 3, bias=False, **CIRCULAR), (6, 6, 6)),  # type: ignore[arg-type]
    "more outputs": (lambda: nn.Conv2d(3, 7, 3, bias=False, **CIRCULAR), (3, 6, 6)),  # type: ignore[arg-type]
    "fewer outputs": (lambda: nn.Conv2d(7, 3, 3, bias=False, **CIRCULAR), (7, 6, 6)),  # type: ignore[arg-type]
    "2×4 kernel": (lambda: nn.Conv2d(5, 5, (2, 4), bias=False, **CIRCULAR), (5, 6, 7)),  # type: ignore[arg-type]
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False, **CIRCULAR), (4, 5, 5)),  # type: ignore[arg-type]
    "dilated": (lambda: nn.Conv2d(4, 4, 3, dilation=2, bias=False, **CIRCULAR), (4, 10, 10)),  # type: ignore[arg-type]
    "strided": (
        lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="circular", bias=False),
        (3, 8, 8),
    ),
    "strided, more outputs": (
        lambda: nn.Conv2d(2, 12, 4, stride=2, padding=1, padding_mode="circular", bias=False),
        (2, 8, 8),
    ),
    "patches": (lambda: nn.Conv2d(3, 12, 2, stride=2, bias=False), (3, 6, 6)),
    "1-d": (lambda: nn.Conv1d(4, 6, 5, bias=False, **CIRCULAR), (4, 12)),  # type: ignore[arg-type]
}
CONSTRAINT_CASES: dict[str, tuple[Build, tuple[int, ...]]] = {
    **ON_A_CIRCLE,
    "zero-padded": (lambda: nn.Conv2d(5, 5, 3, padding=1, bias=False), (5, 7, 7)),
    "strided, dilated": (lambda: nn.Conv2d(2, 4, 3, stride=2, dilation=3, bias=False), (2, 11, 11)),
    "small map": (lambda: nn.Conv2d(2, 2, 5, padding=2, bias=False), (2, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1, bias=False), (4, 5, 5)),
    "transposed 1-d, groups": (lambda: nn.ConvTranspose1d(4, 4, 3, groups=2, bias=False), (4, 7)),
    "linear": (lambda: nn.Linear(7, 5, bias=False), (7,)),
}


def fresh(cases: dict[str, tuple[Build, tuple[int, ...]]], name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    build, shape = cases[name]
    return build(), shape


def singular_values(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Of the layer written out as a float64 matrix, from the largest down."""
    twin = copy.deepcopy(layer).double()
    with torch.no_grad():
        images = twin(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape))
    return torch.linalg.svdvals(images.reshape(math.prod(shape), -1))


@pytest.mark.parametrize("name", ON_A_CIRCLE)
def test_a_fresh_kernel_keeps_every_norm(name: str) -> None:
    layer, shape = fresh(ON_A_CIRCLE, name)
    values = singular_values(layers.orthogonal_(layer), shape)  # type: ignore[type-var]
    # float32 rounding of the kernel.
    assert float(values[0]) == pytest.approx(1.0, abs=1e-6)
    assert float(values[-1]) == pytest.approx(1.0, abs=1e-6)


def test_zero_padding_loses_at_borders_only_and_full_padding_nothing() -> None:
    same, full = (layers.orthogonal_(nn.Conv2d(3, 4, 3, padding=padding, bias=False)) for padding in (1, 2))
    assert float(singular_values(same, (3, 6, 6))[-1]) < 0.9
    inside = torch.zeros(1, 3, 6, 6)
    inside[:, :, 2:4, 2:4] = torch.randn(1, 3, 2, 2)
    assert float(same(inside).detach().norm() / inside.norm()) == pytest.approx(1.0, abs=1e-6)
    values = singular_values(full, (3, 6, 6))
    assert float(values[-1]) == pytest.approx(1.0, abs=1e-6)


def test_a_valid_convolution_with_fewer_outputs_keeps_the_norm_of_every_cotangent() -> None:
    layer = layers.orthogonal_(nn.Conv2d(6, 4, 3, bias=False))
    values = singular_values(layer, (6, 6, 6))
    assert len(values) == 4 * 16, "as many as there are outputs"
    assert float(values[-1]) == pytest.approx(1.0, abs=1e-6)


def test_fresh_kernels_differ_and_follow_their_generator() -> None:
    def drawn(seed: int) -> Tensor:
        return layers.orthogonal_(nn.Conv2d(4, 4, 3), torch.Generator().manual_seed(seed)).weight.detach()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.allclose(drawn(1), drawn(2), atol=0.1)
    spread = drawn(1).flatten(2).norm(dim=(0, 1))
    assert float(spread.min()) > 0.0, "every tap is used"


@pytest.mark.parametrize("module", [nn.Linear(3, 3), nn.Conv3d(2, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 3))])
def test_what_is_no_convolution_of_one_or_two_axes_is_refused(module: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match=type(module).__name__):
        layers.orthogonal_(module)  # type: ignore[type-var]


def noisy_steps(
    name: str, constraint: Constraint, *, steps: int, size: float, cases: dict[str, tuple[Build, tuple[int, ...]]]
) -> list[tuple[float, float]]:
    """Smallest and largest singular value after each step of noise of about this operator norm."""
    layer, shape = fresh(cases, name)
    if not isinstance(layer, nn.Linear):
        layers.orthogonal_(layer)  # type: ignore[type-var]
    model = wrap(layer, shape, constraint={"weight": constraint})
    weight = model.net.get_parameter("weight")
    found = []
    for _ in range(steps):
        with torch.no_grad():
            noise = torch.randn_like(weight)
            weight.add_(size * constraint.limit / model.operators("weight")[0].norm(noise) * noise)
        model.project_()
        values = singular_values(layer, shape)
        found.append((float(values[-1]), float(values[0])))
    return found


@pytest.mark.parametrize("limit", [1.0, 0.5])
@pytest.mark.parametrize("name", CONSTRAINT_CASES)
def test_the_true_norm_stays_within_the_limit_and_comes_close_to_it(name: str, limit: float) -> None:
    for _, largest in noisy_steps(name, OrthogonalConvolution(limit=limit), steps=3, size=0.1, cases=CONSTRAINT_CASES):
        # LAPACK's rounding above; below, what the border of a tiny map and the certificate's slack may take.
        assert 0.85 * limit < largest <= limit * (1.0 + 1e-13)


@pytest.mark.parametrize("name", ON_A_CIRCLE)
def test_kernels_stay_nearly_orthogonal_through_noisy_steps(name: str) -> None:
    smallest = min(low for low, _ in noisy_steps(name, OrthogonalConvolution(), steps=6, size=0.1, cases=ON_A_CIRCLE))
    # Measured 0.95 to 1.00; without the projection the noise alone would leave 0.8.
    assert smallest > 0.92


def test_an_orthogonal_matrix_of_the_kernel_leaves_the_convolution_further_away() -> None:
    reshaped = noisy_steps("square 3×3", Orthogonal(), steps=6, size=0.1, cases=ON_A_CIRCLE)
    assert reshaped[-1][0] < 0.8


@pytest.mark.slow
def test_the_steady_state_of_a_hundred_noisy_steps_is_near_orthogonality() -> None:
    found = noisy_steps("square 3×3", OrthogonalConvolution(), steps=100, size=0.1, cases=ON_A_CIRCLE)
    assert min(low for low, _ in found) > 0.92


@pytest.mark.parametrize("name", ["square 3×3", "more outputs", "fewer outputs", "strided, more outputs", "1-d"])
def test_longer_steps_leave_less_behind_than_as_many_plain_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrowest() -> float:
        steps = noisy_steps(name, OrthogonalConvolution(iterations=3), steps=4, size=0.05, cases=ON_A_CIRCLE)
        return min(low / high for low, high in steps)

    found = narrowest()
    monkeypatch.setattr(orthogonal_convolution, "_LENGTHS", (1.0,))
    assert 1.0 - found < 0.95 * (1.0 - narrowest())


@pytest.mark.parametrize("name", ["patches", "one tap"])
def test_where_nothing_is_cut_off_the_nearest_orthogonal_matrix_is_found(name: str) -> None:
    cases = {**ON_A_CIRCLE, "one tap": (lambda: nn.Conv2d(9, 5, 1, bias=False), (9, 4, 4))}
    layer, shape = fresh(cases, name)
    weight = layers.orthogonal_(layer).weight.detach()  # type: ignore[type-var]
    weight.add_(0.02 * torch.randn_like(weight))
    left, _, right = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    wrap(layer, shape, constraint=OrthogonalConvolution())
    found = weight.double().flatten(1)
    # Up to the certificate's division.
    torch.testing.assert_close(found / found.norm() * math.sqrt(len(left.T)), left @ right, rtol=0.0, atol=2e-5)


def test_longer_steps_move_no_singular_value_by_more_than_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orthogonal_convolution, "_LENGTHS", (3.0,))

    def smallest() -> float:
        layer, shape = fresh(ON_A_CIRCLE, "square 3×3")
        weight = layers.orthogonal_(layer).weight.detach()  # type: ignore[type-var]
        # One direction is 1.35 times as large at all frequencies: a step of 3/2 would turn its sign.
        weight[0] *= 1.35
        operators = (ConvOperator((6, 6), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=1, coverage=9),)
        OrthogonalConvolution(iterations=1).project_(weight, operators)
        return float(singular_values(layer, shape)[-1])

    assert smallest() > 0.6
    MUTANTS[4].apply(monkeypatch)
    assert smallest() < 0.4


def test_an_ordinary_kernel_is_taken_most_of_the_way() -> None:
    layer, shape = fresh(ON_A_CIRCLE, "more outputs")
    wrap(layer, shape, constraint=OrthogonalConvolution())
    values = singular_values(layer, shape)
    assert float(values.mean()) > 0.9
    assert float(values[0]) <= 1.0 + 1e-13


@pytest.mark.parametrize("size", [1e-6, 1e3, 1e12])
@pytest.mark.parametrize("name", ["square 3×3", "strided", "1-d"])
def test_kernels_of_any_scale_end_within_the_limit(name: str, size: float) -> None:
    layer, shape = fresh(ON_A_CIRCLE, name)
    model = wrap(layer, shape, constraint=OrthogonalConvolution())
    with torch.no_grad():
        layer.get_parameter("weight").copy_(size * torch.randn(layer.get_parameter("weight").shape))
    model.project_()
    assert float(singular_values(layer, shape)[0]) <= 1.0 + 1e-13


def test_taps_that_a_phase_lacks_stay_out_of_the_kernel() -> None:
    # Three taps at stride two: one phase has two taps, the other one and a zero that must not be learnt.
    layer, shape = fresh(ON_A_CIRCLE, "strided")
    layers.orthogonal_(layer)  # type: ignore[type-var]
    before = layer.get_parameter("weight").detach().clone()
    wrap(layer, shape, constraint=OrthogonalConvolution()).project_()
    # The certificate takes at most 2.5e-4, the iteration nothing from an orthogonal kernel.
    assert torch.allclose(layer.get_parameter("weight").detach(), before, atol=1e-3)


def test_the_tangent_option_takes_most_of_a_kernels_noise_and_leaves_what_the_kernel_can_follow() -> None:
    energies = []
    for tangent in (False, True):
        layer, shape = fresh(ON_A_CIRCLE, "square 3×3")
        layers.orthogonal_(layer)  # type: ignore[type-var]
        model = wrap(layer, shape, constraint=OrthogonalConvolution(iterations=20, tangent=tangent))
        weight = model.net.get_parameter("weight")
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(weight.shape, generator=generator)
        # A rotation of the output's channels keeps the kernel orthogonal: it is tangent.
        skew = torch.randn(6, 6, generator=generator)
        turn = torch.tensordot(skew - skew.T, weight.detach(), 1)
        weight.grad = noise + turn
        model.project_gradients_()
        energies.append(float((weight.grad - turn).square().sum()))
    # Tangent dimensions are about k·c²/2 of k²·c², a sixth; slow directions are not gone after twenty steps.
    assert 0.05 < energies[1] / energies[0] < 0.4


MUTANTS = (
    Mutant(
        "an orthogonal kernel believed without the certificate",
        Orthogonal,
        "project_",
        "scale_to_limit_(weight",
        "(lambda *_: 0)(weight",
    ),
    Mutant(
        "aliased products",
        orthogonal_convolution,
        "_waves",
        "2 * count - 1",
        "count",
    ),
    Mutant("the frequency zero counted twice", orthogonal_convolution, "_counts", "counts[0] = 1.0", "pass"),
    Mutant("one of two mirrored frequencies", orthogonal_convolution, "_counts", ", 2.0)", ", 1.0)"),
    Mutant("long steps far away", orthogonal_convolution._Symbol, "orthogonalize_", "max(1.0, 1.0 /", "max(9.0, 1.0 /"),
)


def test_a_kernel_believed_orthogonal_without_the_certificate_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[0].apply(monkeypatch)
    found = noisy_steps("square 3×3", OrthogonalConvolution(iterations=1), steps=2, size=0.1, cases=ON_A_CIRCLE)
    assert max(high for _, high in found) > 1.0 + 1e-4


def test_aliased_products_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[1].apply(monkeypatch)
    found = noisy_steps("square 3×3", OrthogonalConvolution(), steps=6, size=0.1, cases=ON_A_CIRCLE)
    assert min(low for low, _ in found) < 0.92


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_steps_do_not_end_where_little_moves_because_little_is_there(scale: float) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, bias=False)
    layer.weight.data *= scale
    operator = ConvOperator((9, 9), (1, 1), ((0, 0), (0, 0)), (1, 1), groups=1, coverage=9)
    OrthogonalConvolution().initialize_(layer.weight.data, (operator,))
    # It ended at .003 of the limit.
    assert 0.9 < conv2d_norm(layer.weight, input_size=(9, 9), budget="tight") <= 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("projected", ["weight", "gradient"])
def test_kernels_of_coarser_numbers_are_refused_and_stay_as_they_are(dtype: torch.dtype, projected: str) -> None:
    weight = torch.randn(4, 4, 3, 3).to(dtype)
    before, gradient = weight.clone(), torch.randn(4, 4, 3, 3).to(dtype)
    operators = (ConvOperator((9, 9), (1, 1), ((0, 0), (0, 0)), (1, 1), groups=1, coverage=9),)
    constraint = OrthogonalConvolution(tangent=True)
    project = constraint.project_ if projected == "weight" else partial(constraint.project_gradient_, gradient)
    with pytest.raises(ConfigurationError, match="float32 or float64"):
        project(weight, operators)
    assert torch.equal(weight, before)


@with_each(*MUTANTS[2:4])
def test_half_of_the_frequencies_counted_wrongly_are_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, bias=False)
    symbol = orthogonal_convolution._Symbol(
        ConvOperator((9, 9), (1, 1), ((0, 0), (0, 0)), (1, 1), groups=1, coverage=9), layer.weight.detach()
    )
    weight = layer.weight.detach().clone()
    symbol._write(symbol._of(weight), weight)
    # A kernel comes back from its frequencies, to float32.
    torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-5, atol=1e-6)
    mutant.apply(monkeypatch)
    symbol._write(symbol._of(weight), weight)
    assert not torch.allclose(weight, layer.weight.detach(), rtol=1e-2, atol=1e-2)


def test_an_adaptive_orthogonal_convolution_is_imported_as_a_plain_one() -> None:
    pytest.importorskip("orthogonium")
    torch.manual_seed(0)
    for settings in ({"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 3, "padding": 0}):
        layer = layers.adaptive_orthogonal_conv2d(4, 8, 3, **settings)
        assert type(layer) is nn.Conv2d
        assert layer.weight.is_leaf
        assert set(layer.state_dict()) == {"weight", "bias"}
        bound = conv2d_norm(layer.weight, input_size=None, stride=settings["stride"], budget="tight")
        assert bound == pytest.approx(1.0, abs=2e-3)  # the grid's slack for all sizes, and float32
        wrap(layer, (4, 9, 9), constraint=OrthogonalConvolution())


def test_a_network_of_orthogonium_layers_is_imported_whole_and_computes_the_same() -> None:
    pytest.importorskip("orthogonium")
    from orthogonium.layers import AdaptiveOrthoConv2d, AdaptiveOrthoConvTranspose2d, OrthoLinear

    torch.manual_seed(0)
    net = nn.Sequential(
        AdaptiveOrthoConv2d(2, 4, 3, padding=1, padding_mode="zeros"),
        nn.ReLU(),
        AdaptiveOrthoConvTranspose2d(4, 2, 2, stride=2),
        nn.Sequential(nn.Flatten(), OrthoLinear(2 * 12 * 12, 3)),
    ).eval()
    plain = layers.from_orthogonium(net)
    inputs = torch.randn(2, 2, 6, 6)
    assert torch.equal(plain(inputs), net(inputs))
    assert [type(module) for module in plain.modules() if not list(module.children())] == [
        nn.Conv2d,
        nn.ReLU,
        nn.ConvTranspose2d,
        nn.Flatten,
        nn.Linear,
    ]
    assert type(net[0]) is not nn.Conv2d, "the original is left alone"
    model = wrap(plain, (2, 6, 6), constraint=OrthogonalConvolution())
    assert all(bound > 0.0 for bound in model.sensitivity().per_parameter.values())


def test_without_orthogonium_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "orthogonium", None)
    monkeypatch.setitem(sys.modules, "orthogonium.layers.conv.AOC", None)
    with pytest.raises(ConfigurationError, match=r"clipless-dp\[orthogonal\]"):
        layers.adaptive_orthogonal_conv2d(4, 4, 3)


def test_importing_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no convolution or linear layer of orthogonium"):
        layers.from_orthogonium(nn.Sequential(nn.Conv2d(1, 1, 3)))


def test_a_convolution_that_orthogonium_refuses_gives_a_typed_error() -> None:
    pytest.importorskip("orthogonium")
    with pytest.raises(ConfigurationError, match="orthogonium refuses"):
        layers.adaptive_orthogonal_conv2d(4, 4, 2, stride=3)


def test_one_axis_is_certified_as_one() -> None:
    layer = layers.orthogonal_(nn.Conv1d(4, 6, 5))
    assert conv1d_norm(layer.weight, input_size=12) <= 1.001  # the balanced budget's slack


@pytest.mark.parametrize("kind", [OrthogonalConvolution, Orthogonal, Spectral])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-3, 1e-2])
def test_wide_kernels_that_were_projected_hold_and_stay_as_they_are(kind: Any, size: float) -> None:
    """Whichever certificate is the larger one: a loaded weight is not divided again."""
    operator = ConvOperator((30, 30), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, 9)
    for seed in range(4):
        torch.manual_seed(seed)
        weight = layers.orthogonal_(nn.Conv2d(24, 24, 3, padding=1, bias=False)).weight.detach()
        weight = 1.05 * (weight + size * weight.std() * torch.randn_like(weight))
        constraint = kind()
        constraint.project_(weight, (operator,))
        assert constraint.holds(weight, (operator,))
        again = weight.clone()
        scale_to_limit_(again, (operator,), 1.0)
        assert torch.equal(again, weight)
        assert operator.norm(weight) <= 1.0 + 5e-4


def not_held(constraint: Constraint, dtype: torch.dtype) -> int:
    """Of random kernels, how many do not hold behind a projection, so that a load would move them."""
    torch.manual_seed(0)
    count = 0
    for turn in range(60):
        channels, size = (16, 24, 48)[turn % 3], (4, 7, 8, 16)[turn % 4]
        operator = ConvOperator((size, size), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=1, coverage=9)
        weight = torch.randn(channels, channels, 3, 3, dtype=dtype)
        constraint.project_(weight, (operator,))
        count += not constraint.holds(weight, (operator,))
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constraint", [Spectral(), OrthogonalConvolution()])
def test_a_projected_kernel_holds_when_it_is_certified_again(constraint: Constraint, dtype: torch.dtype) -> None:
    assert not_held(constraint, dtype) == 0


def test_without_what_certificates_of_multiples_differ_by_some_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipless_dp.constraints.base._BETWEEN_CERTIFICATES", 1e-12)
    assert not_held(Spectral(), torch.float64) > 0
