"""Forward-only rules: what they compute, their bounds, and that they are one pass and one charged step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    PrivacyError,
    UnsupportedModuleError,
    constraints,
    evaluate,
    fit,
    gradient_gated,
    losses,
)
from clipless_dp.layers import Foton, FullSort, GroupSort, Pepita, forward_only
from clipless_dp.losses.base import InnerProduct
from clipless_dp.model.description import settings_of
from clipless_dp.model.slopes import loss_slopes
from clipless_dp.testing import LipschitzLayerTestCase
from tests.support import samples

SETTINGS: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.5, "dataset_size": 40, "sampling": "poisson"}
ALONG = InnerProduct(1.0)
"""Whose cotangent is the target."""


def net(*middle: nn.Module, seed: int = 0, sizes: Sequence[int] = (6, 7, 5, 3)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for place, (entries, outputs) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(entries, outputs), *(copy.deepcopy(middle) if place < len(sizes) - 2 else ())]
    return nn.Sequential(*layers).double()


def wrapped(module: nn.Module, constraint: Any = None, loss: Any = ALONG, norm: float = 3.0) -> DPLipModel:
    return DPLipModel(module, input_shape=(6,), input_norm=norm, loss=loss, constraint=constraint)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(rows: int, entries: int, seed: int = 2) -> Tensor:
    found = drawn(rows, entries, seed=seed)
    return found / found.norm(dim=1, keepdim=True)


def gradients(model: DPLipModel, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    optimizer = CliplessDPSGD(model, lr=0.1, **SETTINGS)
    optimizer.accumulate((inputs, targets))
    found = {n.removeprefix("net."): p.grad.clone() for n, p in model.net.named_parameters() if p.grad is not None}
    optimizer.skip_draw()
    return {name.removeprefix("0.net."): gradient for name, gradient in found.items()}


def by_definition(
    sequence: nn.Sequential, values: Tensor, errors: Tensor, feedback: Tensor | None
) -> dict[str, Tensor]:
    """The two passes, written down: sums over samples, of what stands beside each of them."""

    def passed(start: Tensor) -> list[Tensor]:
        reached = [start]
        for layer in sequence:
            if isinstance(layer, nn.Linear):
                reached.append(layer(reached[-1]))
            else:
                reached[-1] = layer(reached[-1])
        return reached

    linear = {name: layer for name, layer in sequence.named_children() if isinstance(layer, nn.Linear)}
    matrix = feedback
    if matrix is None:
        matrix = torch.eye(values.shape[1], dtype=values.dtype)
        for layer in linear.values():
            matrix = layer.weight @ matrix
        matrix = matrix.mT
    with torch.no_grad():
        first, second = passed(values), passed(values - errors @ matrix.mT)
        found = {}
        for place, name in enumerate(linear):
            arriving = errors if place == len(linear) - 1 else first[place + 1] - second[place + 1]
            met = (first if feedback is None else second)[place]
            found[f"{name}.weight"], found[f"{name}.bias"] = arriving.mT @ met, arriving.sum(0)
    return found


ACTIVATIONS: dict[str, tuple[nn.Module, ...]] = {
    "none": (),
    "ReLU": (nn.ReLU(),),
    "ReLU in place": (nn.ReLU(inplace=True),),
    "leaky": (nn.LeakyReLU(-1.5),),
    "tanh": (nn.Tanh(),),
    "sigmoid twice": (nn.Sigmoid(), nn.Sigmoid()),
    "sort": (FullSort(),),
}


@pytest.mark.parametrize("middle", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_gradients_are_those_of_two_passes(middle: tuple[nn.Module, ...]) -> None:
    sequence, inputs, targets = net(*middle), 0.2 * drawn(9, 6), unit(9, 3)
    found = gradients(wrapped(Foton(sequence)), inputs, targets)
    expected = by_definition(sequence, inputs, targets, None)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    pepita = Pepita(sequence, limit=1e6, scale=0.3)
    found = gradients(wrapped(pepita), inputs, targets)
    expected = by_definition(sequence, inputs, targets, pepita.feedback)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert float(torch.linalg.matrix_norm(pepita.feedback.detach(), 2)) == pytest.approx(0.3)


def orthogonal(depth: int = 4) -> nn.Sequential:
    sequence = net(sizes=(6,) * (depth + 1)).float()
    for layer in sequence:
        nn.init.orthogonal_(layer.weight)
    return sequence


def compared_with_back_propagation(make: Callable[[nn.Sequential], nn.Module]) -> float:
    """The largest difference of the gradients, relative to the largest of each parameter."""
    sequence, inputs, targets = orthogonal(), drawn(20, 6).float(), unit(20, 6).float()
    expected = gradients(wrapped(copy.deepcopy(sequence)), inputs, targets)
    found = gradients(wrapped(make(sequence)), inputs, targets)
    return max(float((found[name] - own).norm() / own.norm()) for name, own in expected.items())


def test_on_linear_square_orthogonal_networks_it_is_back_propagation() -> None:
    assert compared_with_back_propagation(Foton) < 1e-5


class ModulatedPresynaptic(Foton):
    """The mutant: the second pass's inputs in the gradients."""

    modulates_presynaptic = True


class Untransposed(Foton):
    """The mutant: the way forth in place of the way back."""

    def modulation(self, errors: Tensor, weights: Sequence[Tensor]) -> Tensor:
        for weight in weights:
            errors = errors @ weight.mT
        return errors


class Averaged(Foton):
    """The mutant: division by the batch."""

    def modulation(self, errors: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return super().modulation(errors / len(errors), weights)


MUTANTS = (ModulatedPresynaptic, Untransposed, Averaged)


@pytest.fixture
def known_mutants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the rule of what they are mutants of."""
    from clipless_dp.rules import base

    monkeypatch.setattr(base, "_RULES", {**base._RULES, **dict.fromkeys(MUTANTS, base._RULES[Foton])})


@pytest.mark.usefixtures("known_mutants")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_caught_another_rule_is_not_back_propagation(mutant: Any) -> None:
    assert compared_with_back_propagation(mutant) > 0.1


def alone_and_together(make: Callable[[nn.Sequential], nn.Module]) -> tuple[Tensor, Tensor]:
    model = wrapped(make(net(nn.ReLU())))
    inputs, targets = drawn(8, 6), unit(8, 3)
    alone = [gradients(model, inputs[row : row + 1], targets[row : row + 1])["0.weight"] for row in range(8)]
    return torch.stack(alone).sum(0), gradients(model, inputs, targets)["0.weight"]


def test_one_more_sample_adds_its_own_gradient_alone() -> None:
    for make in (Foton, lambda sequence: Foton(sequence, 0.05), lambda sequence: Pepita(sequence, 0.05)):
        alone, together = alone_and_together(make)
        torch.testing.assert_close(together, alone)


@pytest.mark.usefixtures("known_mutants")
def test_mutant_caught_division_by_the_batch() -> None:
    alone, together = alone_and_together(Averaged)
    assert float((together - alone).norm()) > 0.5 * float(alone.norm())


@given(
    seed=st.integers(0, 99),
    middle=st.sampled_from(["none", "ReLU", "leaky", "tanh", "sigmoid twice"]),
    depth=st.integers(1, 4),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    bounded=st.booleans(),
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_no_sample_s_gradient_passes_its_bound(seed: int, middle: str, depth: int, scale: float, bounded: bool) -> None:
    sequence = net(*ACTIVATIONS[middle], seed=seed, sizes=(6, *[5] * depth, 3))
    with torch.no_grad():
        for parameter in sequence.parameters():
            parameter.mul_(scale)
    model = wrapped(Foton(sequence, 0.3 if bounded else None))
    bounds = {name.removeprefix("0.net."): bound for name, bound in _bounds(model).items()}
    linear = [layer for layer in sequence if isinstance(layer, nn.Linear)]
    _, _, right = torch.linalg.svd(linear[0].weight.detach())
    inputs = torch.cat((9.0 * drawn(6, 6, seed=seed), 3.0 * right[:1], 1e-3 * drawn(2, 6)))
    errors = torch.cat((5.0 * drawn(6, 3, seed=seed), unit(1, 3), unit(2, 3)))
    for row in range(len(inputs)):
        found = gradients(model, inputs[row : row + 1], errors[row : row + 1])
        for name, gradient in found.items():
            assert float(gradient.norm()) <= bounds[name] * (1.0 + 1e-9), name


def _bounds(model: DPLipModel) -> dict[str, float]:
    return {name.removeprefix("net."): bound for name, bound in model.sensitivity().per_parameter.items()}


def test_bounds_are_attained_so_that_none_of_their_factors_can_go() -> None:
    """Multiples of orthogonal matrices: φ = 1.3³, L_l = 1.3^l, X_l = 1.3^l X."""
    sequence = net(sizes=(6, 6, 6, 6))
    with torch.no_grad():
        for layer in sequence:
            nn.init.orthogonal_(layer.weight).mul_(1.3)
            layer.bias.zero_()
    model = wrapped(Foton(sequence))
    inputs = drawn(1, 6)
    found = gradients(model, 3.0 * inputs / inputs.norm(), unit(1, 6))
    for name, bound in _bounds(model).items():
        assert float(found[name].norm()) == pytest.approx(bound, rel=1e-3)
    assert _bounds(model)["0.weight"] == pytest.approx(1.3 * 1.3**3 * 3.0, rel=1e-3)
    assert _bounds(model)["1.weight"] == pytest.approx(1.3**2 * 1.3**3 * 1.3 * 3.0, rel=1e-3)
    assert _bounds(model)["2.weight"] == pytest.approx(1.3**2 * 3.0, rel=1e-3)


class TestFoton(LipschitzLayerTestCase):
    shapes = ((3,),)
    steps = 1

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return Foton(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


@pytest.mark.slow
class TestCapped(LipschitzLayerTestCase):
    shapes = ((6,), (2, 3))
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return Foton(nn.Sequential(nn.Flatten(), *net(nn.Tanh()).float()), 0.3)


@pytest.mark.slow
class TestPepita(LipschitzLayerTestCase):
    shapes = ((6,),)
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return Pepita(net(nn.ReLU()).float(), 0.3)


@pytest.mark.parametrize("layer", [nn.Identity(), nn.ReLU(), GroupSort(8)], ids=repr)
def test_rounding_does_not_make_a_small_move_a_larger_one(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large biases and small moves: the difference of the passes is below what float32 tells apart."""
    block = forward_only.Block("0", nn.Linear(1, 8), [layer])
    values, moved = drawn(500, 8).float().abs() + 1.0, (3e-8 * drawn(500, 8, seed=2)).float()

    def worst() -> float:
        _, fallen = forward_only._moved(block, [], values, moved)
        return float((fallen.norm(dim=1) / moved.norm(dim=1)).max())

    assert worst() <= 1.0 + 1e-6
    # The mutant: what the passes differ by, as it comes.
    monkeypatch.setattr(forward_only, "slope_of", lambda layer: math.inf)
    assert worst() > 1.3


def test_caps_hold_whatever_the_weights_are() -> None:
    sequence = net(nn.ReLU())
    with torch.no_grad():
        for parameter in sequence.parameters():
            parameter.mul_(1e3)
    for model in (wrapped(Foton(sequence, 0.25, 0.5)), wrapped(Pepita(sequence, 0.25, 0.5))):
        found = gradients(model, drawn(1, 6), unit(1, 3))
        for name, gradient in found.items():
            assert float(gradient.norm()) == pytest.approx(0.5 if name.endswith("bias") else 0.25, rel=1e-6)
        assert all(bound <= 0.5 * (1.0 + 1e-4) for bound in _bounds(model).values())


def test_what_overflows_contributes_nothing() -> None:
    sequence = net(nn.ReLU()).float()
    with torch.no_grad():
        for parameter in sequence.parameters():
            parameter.mul_(1e25)
    for module in (Foton(sequence, 0.25), Pepita(sequence, 0.25)):
        found = gradients(wrapped(module), drawn(4, 6).float(), unit(4, 3).float())
        assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    with pytest.raises(Exception, match=r"finite|overflow"):
        wrapped(Foton(sequence)).sensitivity()


def test_both_passes_have_the_same_dropout_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an error nothing differs; the mutant, with masks of each pass its own, differs at once."""
    nothing = losses.BoundedLoss(lambda output, target: (0.0 * output).sum(1), 1.0)
    model = wrapped(Foton(net(nn.ReLU(), nn.Dropout(0.5))), loss=nothing)
    model.train()
    assert all(float(g.abs().max()) == 0.0 for g in gradients(model, drawn(9, 6), unit(9, 3)).values())

    def anew(block: Any, masks: Any, values: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        first = forward_only._behind(block, masks, values)
        other = [torch.bernoulli(torch.full_like(mask, 0.5)) * 2.0 for mask in masks]
        return first, first - forward_only._behind(block, other, values - moved)

    monkeypatch.setattr(forward_only, "_moved", anew)
    assert float(gradients(model, drawn(9, 6), unit(9, 3))["0.weight"].norm()) > 0.1


def test_masks_come_from_the_model_s_own_source_and_drop_at_their_rate() -> None:
    model = wrapped(Foton(nn.Sequential(nn.Linear(6, 4000), nn.Dropout(0.25), nn.Linear(4000, 3)).double()))
    model.train()
    torch.manual_seed(0)
    first = gradients(model, drawn(1, 6), unit(1, 3))["2.weight"]
    torch.manual_seed(0)
    other = gradients(model, drawn(1, 6), unit(1, 3))["2.weight"]
    assert not torch.equal(first, other)
    # Of 4000 units within 5 deviations.
    assert abs(float((first[0] == 0.0).double().mean()) - 0.25) < 5.0 * math.sqrt(0.25 * 0.75 / 4000)
    model.eval()
    assert bool((gradients(model, drawn(1, 6), unit(1, 3))["2.weight"] != 0.0).all())


@pytest.mark.parametrize("kind", ["foton", "capped", "pepita"])
def test_it_trains_by_one_charged_step_a_draw_at_the_price_of_any_other_rule(kind: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(600, 6)
    data = inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()

    def sequence() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))

    made = {
        "foton": lambda: Foton(sequence()),
        "capped": lambda: Foton(sequence(), 0.3),
        "pepita": lambda: Pepita(sequence(), 0.3),
    }[kind]
    constraint = constraints.Orthogonal() if kind == "foton" else None
    run: dict[str, Any] = {
        "epsilon": 1e3, "delta": 1e-3, "epochs": 6, "batch_size": 60, "progress": False, "audit": False,
        "accountant": "rdp",
    }  # fmt: skip
    results = []
    for module in (made(), gradient_gated(sequence())):
        model = wrapped(
            module, constraint if module is not None and kind == "foton" else None, losses.TauCrossEntropy(8.0)
        )
        before = evaluate(model, data)[0]
        results.append(fit(model, data, **run, lr=0.5))
        after = evaluate(model, data)[0]
        assert before is not None
        assert after is not None
        assert after > max(0.55, before)
    assert results[0].noise_multiplier == results[1].noise_multiplier
    assert results[0].history[-1].epsilon == results[1].history[-1].epsilon


def test_predictions_exports_and_slopes_are_those_of_the_network_itself() -> None:
    sequence = net(nn.Tanh())
    for module in (Foton(sequence), Pepita(sequence, 1.0)):
        model = wrapped(module)
        inputs, targets, mask = 0.1 * drawn(5, 6), unit(5, 3), torch.ones(5, dtype=torch.bool)
        torch.testing.assert_close(model(inputs).detach(), sequence(inputs).detach())
        torch.testing.assert_close(model.export_net()(inputs), sequence(inputs).detach())
        values = inputs.clone().requires_grad_()
        (expected,) = torch.autograd.grad((sequence(values) * targets).sum(), values)
        torch.testing.assert_close(loss_slopes(model, inputs, targets, mask), expected)
        norms = [float(torch.linalg.matrix_norm(p.detach(), 2)) for p in sequence.parameters() if p.dim() == 2]
        assert model.lipschitz_constant() == pytest.approx(math.prod(norms), rel=2e-3)


def test_layers_before_it_are_trained_by_its_true_slope() -> None:
    before, sequence = nn.Linear(6, 6).double(), net(nn.Tanh())
    inputs, targets = 0.1 * drawn(5, 6), unit(5, 3)
    model = wrapped(nn.Sequential(before, Foton(sequence)))
    optimizer = CliplessDPSGD(model, lr=0.1, **SETTINGS)
    optimizer.accumulate((inputs, targets))
    (expected,) = torch.autograd.grad((sequence(before(inputs)) * targets).sum(), before.weight)
    torch.testing.assert_close(before.weight.grad, expected)


def test_frozen_layers_get_no_gradient_and_have_no_bound() -> None:
    sequence = net(nn.ReLU())
    sequence[0].requires_grad_(False)
    model = wrapped(Foton(sequence))
    found = gradients(model, drawn(4, 6), unit(4, 3))
    assert "0.weight" not in found
    assert "0.weight" not in _bounds(model)
    expected = by_definition(sequence, _projected(drawn(4, 6)), unit(4, 3), None)
    torch.testing.assert_close(found["2.weight"], expected["2.weight"])


def _projected(values: Tensor, norm: float = 3.0) -> Tensor:
    return values * (norm / values.norm(dim=1, keepdim=True)).clamp(max=1.0)


def test_a_layer_that_stands_at_two_places_runs_at_both() -> None:
    relu = nn.ReLU()
    sequence = nn.Sequential(nn.Linear(6, 5), relu, nn.Linear(5, 4), relu, nn.Linear(4, 3)).double()
    inputs, targets = 0.2 * drawn(4, 6), unit(4, 3)
    model = wrapped(Foton(sequence))
    torch.testing.assert_close(model(inputs).detach(), sequence(inputs).detach())
    found = gradients(model, inputs, targets)
    torch.testing.assert_close(found["2.weight"], by_definition(sequence, inputs, targets, None)["2.weight"])


def test_images_are_flattened_and_caps_that_change_are_followed() -> None:
    sequence = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    module = Foton(sequence, 0.5)
    model = DPLipModel(module, input_shape=(1, 4, 4), input_norm=1.0, loss=losses.TauCrossEntropy())
    before = model.sensitivity().total
    module.limit = module.bias_limit = 0.1
    assert model.sensitivity().total < 0.3 * before
    optimizer = CliplessDPSGD(model, lr=0.1, **SETTINGS)
    optimizer.accumulate((torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])))
    optimizer.step()


def of(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 4), *layers, nn.Linear(4, 3))


UNKNOWN = UnsupportedModuleError
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a convolution": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2)), UNKNOWN, "Conv2d"),
    "a norm": (of(nn.LayerNorm(4)), UNKNOWN, "LayerNorm"),
    "parameters": (of(nn.PReLU()), UNKNOWN, "PReLU"),
    "a nested one": (of(nn.Sequential(nn.ReLU())), UNKNOWN, "Sequential"),
    "all dropped": (of(nn.Dropout(1.0)), UNKNOWN, "p=1"),
    "gates": (of(gradient_gated(nn.Sequential(nn.Linear(4, 4)))), UNKNOWN, "Graph"),
    "an end": (lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU()), ConfigurationError, "last layer"),
    "no layer": (lambda: nn.Sequential(), ConfigurationError, "last layer"),
    "a layer": (lambda: nn.Linear(6, 3), ConfigurationError, r"nn\.Sequential"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_networks_are_refused_by_the_names_of_their_layers(case: str) -> None:
    build, error, message = WRONG[case]
    for make in (Foton, lambda built: Pepita(built, 1.0)):
        with pytest.raises(error, match=message):
            make(build())


def test_shared_layers_and_settings_out_of_range_are_refused() -> None:
    layer = nn.Linear(6, 6)
    with pytest.raises(ConfigurationError, match="share"):
        Foton(nn.Sequential(layer, nn.ReLU(), layer))
    for arguments in ({"limit": 0.0}, {"limit": -1.0}, {"limit": 1.0, "bias_limit": 0.0}, {"bias_limit": 1.0}):
        with pytest.raises(ConfigurationError, match="limit"):
            Foton(net(), **arguments)
    with pytest.raises(ConfigurationError, match="scale"):
        Pepita(net(), 1.0, scale=0.0)


def test_what_cannot_run_a_second_pass_on_the_way_back_says_so() -> None:
    with pytest.raises((ConfigurationError, UnsupportedModuleError)):
        DPLipModel(
            gradient_gated(nn.Sequential(Foton(net())), isolation="vmap"), input_shape=(6,), loss=ALONG
        )  # fmt: skip
    inputs, targets = samples(60)
    model = DPLipModel(
        Foton(net().float(), 1.0), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy()
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="compile"):
        fit(model, (inputs, targets), epsilon=3.0, delta=1e-3, epochs=1, batch_size=20, progress=False, compile=True)


def test_copies_and_state_dicts_hold_the_feedback() -> None:
    model = wrapped(Pepita(net(nn.ReLU()), 1.0))
    twin = copy.deepcopy(model)
    inputs, targets = drawn(4, 6), unit(4, 3)
    for name, gradient in gradients(model, inputs, targets).items():
        torch.testing.assert_close(gradients(twin, inputs, targets)[name], gradient)
    assert any(name.endswith("feedback") for name in model.state_dict())


def test_layers_that_change_after_wrapping_are_followed_or_refused() -> None:
    sequence = net(nn.LeakyReLU(0.1), nn.Dropout(0.1))
    model = wrapped(Foton(sequence))
    before = model.sensitivity().total
    for layer in sequence:
        if isinstance(layer, nn.LeakyReLU):
            layer.negative_slope = 2.0
    assert model.sensitivity().total > 1.5 * before
    after = model.sensitivity().total
    for layer in sequence:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.5
    assert model.sensitivity().total > 1.5 * after
    handle = sequence[1].register_forward_hook(lambda module, inputs, output: 100.0 * output)
    with pytest.raises(PrivacyError):
        model.sensitivity()
    handle.remove()
    sequence[1] = nn.Softplus()
    with pytest.raises(PrivacyError):
        model.sensitivity()


def test_a_constraint_holds_the_weights_within_and_a_step_keeps_the_bound() -> None:
    model = wrapped(Foton(net(nn.ReLU())), constraints.Spectral(), losses.TauCrossEntropy(2.0))
    optimizer = CliplessDPSGD(model, lr=3.0, **SETTINGS)
    for _ in range(2):
        optimizer.accumulate((drawn(8, 6), torch.arange(8) % 3))
        optimizer.step()
        norms = [float(torch.linalg.matrix_norm(p.detach(), 2)) for p in model.net.parameters() if p.dim() == 2]
        assert max(norms) <= 1.0
    assert _bounds(model)["0.weight"] == pytest.approx(3.0 * math.sqrt(2.0), rel=1e-6)


def test_a_description_tells_of_the_layers_within() -> None:
    told = [settings_of(wrapped(Foton(net(nn.LeakyReLU(slope)), 1.0))) for slope in (0.1, 0.2)]
    assert told[0] != told[1]
    assert told[0] == settings_of(wrapped(Foton(net(nn.LeakyReLU(0.1)), 1.0)))
