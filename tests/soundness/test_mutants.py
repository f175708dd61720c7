"""Each classic mistake in a bound is caught by the attack that the unchanged library withstands."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import LayerBounds, RuleContext, UnsupportedModuleError, gates, model, register_rule
from clipless_dp.bounds.sweep import Sweep
from clipless_dp.gates import signal
from clipless_dp.graph import tracing
from clipless_dp.model.network import Network
from clipless_dp.norms import operators
from clipless_dp.rules import activations, base, conv, graph, linear, pooling, residual
from clipless_dp.rules import gates as gate_rules
from tests.soundness.attack import BoundBroken, Record, add_or_remove_one, attack, wrap
from tests.soundness.cases import case_named
from tests.soundness.mutation import Mutant
from tests.support import one_in_two

MUTANTS = (
    (Mutant("√N dropped", linear, "affine_bounds", "math.sqrt(windows) *", "1.0 *"), "conv 3×3, padding 1"),
    (
        Mutant(
            "√P forgotten on a map's bias", linear, "affine_bounds", '"bias"] = math.sqrt(positions)', '"bias"] = 1.0'
        ),
        "conv 3×3, padding 1",
    ),
    (
        Mutant(
            "√P forgotten in a map's norm", linear, "affine_bounds", "shifted = math.sqrt(positions) *", "shifted ="
        ),
        "conv 5×5 on a 3×3 map",
    ),
    (
        Mutant("√T forgotten", linear, "affine_bounds", '"bias"] = math.sqrt(positions)', '"bias"] = 1.0'),
        "linear on 5 tokens",
    ),
    (
        Mutant(
            "√T forgotten in the tokens' norm", linear, "affine_bounds", "shifted = math.sqrt(positions) *", "shifted ="
        ),
        "linear on 5 tokens",
    ),
    (
        Mutant(
            "bias forgotten in the norm", linear, "affine_bounds", "context.input_norm + shifted", "context.input_norm"
        ),
        "linear",
    ),
    (
        Mutant("a halved bound, linear", Sweep, "sensitivity", "own[name] = scale *", "own[name] = 0.5 * scale *"),
        "linear",
    ),
    (
        Mutant("a halved bound, conv", Sweep, "sensitivity", "own[name] = scale *", "own[name] = 0.5 * scale *"),
        "conv 4×4, stride 2",
    ),
    (
        Mutant(
            "√N dropped in a transposed convolution",
            conv,
            "transposed_convolution_rule",
            "windows,\n        transposed=True",
            "1,\n        transposed=True",
        ),
        "transposed conv 3×3",
    ),
    (
        Mutant(
            "output padding forgotten",
            conv,
            "transposed_convolution_rule",
            "output_padding=extra",
            "output_padding=0",
        ),
        "transposed conv 3×3, stride 2, padding 1, of one pixel",
    ),
    (
        Mutant(
            "zero padding's coverage on a torus",
            conv,
            "convolution_rule",
            "padding_mode=module.padding_mode,\n",
            "padding_mode='zeros',\n",
        ),
        "circular conv 3×3, padding 3 on a 3×3 map",
    ),
    (
        Mutant(
            "zero padding's norm on a torus",
            conv,
            "convolution_rule",
            "windows, padding_mode=mode",
            "windows, padding_mode='zeros'",
        ),
        "circular conv1d 3",
    ),
    (
        Mutant(
            "weight norm forgotten backwards",
            linear,
            "affine_bounds",
            'lipschitz=lambda: context.norm("weight", weight),',
            "",
        ),
        "linear",
    ),
    (
        Mutant("residual's K forgotten", graph, "sum_function_rule", "lipschitz=(1.0, 1.0)", "lipschitz=(1.0, 0.0)"),
        "residual sum",
    ),
    (
        Mutant(
            "residual's Y forgotten", graph, "sum_function_rule", "sum(context.input_norms())", "context.input_norm"
        ),
        "residual sum",
    ),
    (
        Mutant(
            "fan-out not added",
            Sweep,
            "cotangent",
            "total += self._passed_back(consumer, position)",
            "total = max(total, self._passed_back(consumer, position))",
        ),
        "residual of the identity",
    ),
    (
        Mutant("shared parameters not summed", Sweep, "sensitivity", "per_parameter.get(key, 0.0) +", "0.0 +"),
        "linear layer used twice",
    ),
    (
        Mutant("dropout's 1/(1-p) forgotten", activations, "dropout_rule", "1.0 / (1.0 - module.p)", "1.0"),
        "dropout 0.5",
    ),
    (
        Mutant(
            "cotangent gate removed",
            model.DPLipModel,
            "_gated",
            "outputs = outermost_gate(outputs, self.cotangent_norm, entry, own)",
            "pass",
        ),
        "linear",
    ),
    (
        Mutant(
            "input gate removed",
            Network,
            "_values",
            "input_gate(inputs, self._cap)",
            "(inputs, torch.ones(len(inputs), dtype=torch.bool))",
        ),
        "linear",
    ),
    (
        Mutant("inner gate's cap ignored", gates.BallProjection, "forward", "(values, self", "(values, 2.0 * self"),
        "ball projection that bites",
    ),
    (
        Mutant("sphere's slope forgotten", gate_rules, "sphere_scaling_rule", ", lipschitz=stretch", ""),
        "sphere scaling",
    ),
    (
        Mutant(
            "normalising taken for clipping", gate_rules, "cotangent_gate_rule", 'module.mode == "normalize"', "False"
        ),
        "normalising cotangent gate that lifts",
    ),
    (
        Mutant("gradients below the cap of a normalising gate taken as they are", Sweep, "_gradient", " * stretch", ""),
        "normalised gradients below the cap, linear",
    ),
    (
        Mutant(
            "gradient gates that normalise taken for ones that clip", gate_rules, "capped", "limit / least *", "1.0 *"
        ),
        "normalised gradients below floor and cap, conv 1×1",
    ),
    (
        Mutant("leaky slope forgotten", activations, "leaky_relu_rule", "max(1.0, abs(module.negative_slope))", "1.0"),
        "LeakyReLU, slope 3",
    ),
    (
        Mutant("tanh's cap without its √n", activations, "_bounded_slope", "cap * root", "cap"),
        "tanh, saturated",
    ),
    (
        Mutant(
            "Householder's angle halved",
            activations,
            "householder_rule",
            '{"theta": lambda: context.input_norm}',
            '{"theta": lambda: 0.5 * context.input_norm}',
        ),
        "Householder on maps",
    ),
    (
        Mutant(
            "order 2 of Householder, angle halved",
            activations,
            "householder_rule",
            '{"theta": lambda: context.input_norm}',
            '{"theta": lambda: 0.5 * context.input_norm}',
        ),
        "Householder, order 2",
    ),
    (
        Mutant("PReLU's slopes forgotten", activations, "prelu_rule", 'context.norm("weight", slopes)', "0.0"),
        "PReLU of each channel",
    ),
    (
        Mutant(
            "PReLU's gradient halved",
            activations,
            "prelu_rule",
            '{"weight": lambda: context.input_norm}',
            '{"weight": lambda: 0.5 * context.input_norm}',
        ),
        "PReLU",
    ),
    (
        Mutant(
            "a spline's slopes forgotten backwards",
            activations,
            "linear_spline_rule",
            'lipschitz=lambda: context.norm("slopes", slopes),',
            "",
        ),
        "linear spline of each channel",
    ),
    (
        Mutant(
            "a spline's slopes forgotten forwards",
            activations,
            "linear_spline_rule",
            'context.norm("slopes", slopes) * context.input_norm',
            "context.input_norm",
        ),
        "linear spline on tokens, two slopes",
    ),
    (
        Mutant(
            "a spline's gradient halved",
            activations,
            "linear_spline_rule",
            '{"slopes": lambda: context.input_norm}',
            '{"slopes": lambda: 0.5 * context.input_norm}',
        ),
        "linear spline",
    ),
    (
        Mutant("the logit's gradient halved", residual, "sigmoid_mix_rule", "0.25 *", "0.125 *"),
        "sigmoid-gated residual of a sign change",
    ),
    (
        Mutant(
            "the gate's own K for both", residual, "sigmoid_mix_rule", "(of_first, of_second)", "(of_second, of_second)"
        ),
        "sigmoid-gated residual of the identity",
    ),
    (
        Mutant(
            "a convex potential taken for 1-Lipschitz", residual, "_step_bounds", "max(1.0, (2.0 *", "min(1.0, (2.0 *"
        ),
        "convex potential",
    ),
    (
        Mutant("a convex potential's √N dropped", residual, "_step_bounds", "math.sqrt(windows or 1)", "1.0"),
        "convex potential 3×3",
    ),
    (
        Mutant(
            "a convex potential's √P dropped",
            residual,
            "_step_bounds",
            "2.0 * math.sqrt(positions) * norm()",
            "2.0 * norm()",
        ),
        "convex potential, narrow, on 5 tokens",
    ),
    (
        Mutant(
            "a convex potential's weight taken to act once",
            residual,
            "_step_bounds",
            "(2.0 * norm() * context.input_norm",
            "(norm() * context.input_norm",
        ),
        "convex potential, wide, no bias",
    ),
    (
        Mutant(
            "a convex potential's bias forgotten in its weight's gradient",
            residual,
            "_step_bounds",
            "context.input_norm + shift())",
            "context.input_norm)",
        ),
        "convex potential, narrow, on 5 tokens",
    ),
    (
        Mutant(
            "a convex potential's bias forgotten in its norm",
            residual,
            "_step_bounds",
            "2.0 * norm() * shift()",
            "0.0",
        ),
        "convex potential, narrow, on 5 tokens",
    ),
    (
        Mutant(
            "√P forgotten in a convex potential's norm",
            residual,
            "_step_bounds",
            'math.sqrt(positions) * context.norm("bias", bias)',
            'context.norm("bias", bias)',
        ),
        "convex potential, narrow, on 5 tokens",
    ),
    (
        Mutant("√N dropped in max pooling", pooling, "_window_bounds", "math.sqrt(windows)", "1.0"),
        "max pooling 3, stride 1",
    ),
    (
        Mutant("average overlap in average pooling", pooling, "_linear_bounds", "columns.max()", "columns.min()"),
        "average pooling 3, stride 1, padding 1",
    ),
    (
        Mutant("√n taken for n in a mean", graph, "mean_function_rule", "math.sqrt(ratio)", "ratio"),
        "mean over one axis",
    ),
    (
        Mutant(
            "largest part taken for a concatenation",
            graph,
            "concatenation_function_rule",
            "math.hypot(*context.input_norms())",
            "max(context.input_norms())",
        ),
        "stack",
    ),
    (
        Mutant("factor below one forgotten", graph, "scale_function_rule", "1.0 / factor", "factor"),
        "torch.mul and torch.div",
    ),
)


@pytest.mark.parametrize(("mutant", "name"), one_in_two(MUTANTS), ids=lambda value: getattr(value, "name", value))
def test_the_attack_catches(mutant: Mutant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named(name)
    attack(case, singular=True)
    mutant.apply(monkeypatch)
    with pytest.raises(BoundBroken):
        attack(case, singular=True)


def test_the_attack_catches_an_average_in_place_of_the_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("conv 5×5, stride 4, few pixels covered twice")
    attack(case)

    def average(size: tuple[int, int], kernel: tuple[int, int], **geometry: object) -> float:
        windows = [(pixels - taps) // 4 + 1 for pixels, taps in zip(size, kernel, strict=True)]
        return math.prod(windows) * math.prod(kernel) / math.prod(size)

    monkeypatch.setattr(conv, "coverage", average)
    with pytest.raises(BoundBroken, match=r"layer\.weight"):
        attack(case)


@pytest.mark.parametrize(("function", "name"), [("dense_norm", "linear"), ("conv2d_norm", "conv 3×3, no bias")])
def test_the_attack_catches_power_iteration_in_place_of_the_certificate(
    function: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_named(name)
    attack(case)

    def power_iteration(weight: Tensor, **geometry: object) -> float:
        if weight.dim() == 2:
            matrix = weight.detach()
        else:
            matrix = torch.autograd.functional.jacobian(
                lambda x: torch.nn.functional.conv2d(x, weight, padding=1).flatten(),
                torch.zeros(1, 2, 8, 8, dtype=weight.dtype),
            ).reshape(-1, 128)
        vector = torch.ones(matrix.shape[1], dtype=matrix.dtype)
        for _ in range(3):
            vector = matrix.T @ (matrix @ (vector / vector.norm()))
        return math.sqrt(float(vector.norm()))

    monkeypatch.setattr(operators, function, power_iteration)
    with pytest.raises(BoundBroken, match=r"shift|input"):
        attack(case)


def test_removing_an_outlier_catches_gates_that_see_the_batch_instead_of_its_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    net = torch.nn.Linear(4, 3).double()
    inputs = torch.randn(1, 4, dtype=torch.float64).repeat(6, 1)
    targets = torch.randn(1, 3, dtype=torch.float64).repeat(6, 1)
    inputs[-1] *= -1e6
    targets[-1] *= 1e6
    add_or_remove_one(wrap(net, (4,)), inputs, targets)

    def of_the_batch(values: Tensor) -> Tensor:
        return torch.linalg.vector_norm(values).expand(len(values))

    monkeypatch.setattr(signal, "sample_norms", of_the_batch)
    with pytest.raises(BoundBroken):
        add_or_remove_one(wrap(net, (4,)), inputs, targets)


class Polar(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        return left @ right


REPARAMETRISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "polar factor": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Polar()),
}


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_brute_force_catches_a_gradient_that_flows_through_a_reparametrisation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`W/σ(W)` is as Lipschitz as a constrained weight, but the gradient that reaches `W` is larger by up to `1/σ`."""
    torch.manual_seed(0)
    layer = REPARAMETRISED[name](nn.Linear(4, 4, bias=False)).double()
    with torch.no_grad():
        # The direction's own parameter is small: nothing in the computed weight's norm resists that.
        list(layer.parameters())[-1].mul_(0.05)
    net = nn.Sequential(layer)
    with pytest.raises(UnsupportedModuleError, match=r"0 .*parametrisation amplifies gradients without a bound"):
        wrap(net, (4,))

    monkeypatch.setattr(tracing.parametrize, "is_parametrized", lambda module: False)
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))

    @register_rule(type(layer))
    def trusting_rule(module: nn.Module, context: RuleContext) -> LayerBounds:
        """Takes the weight that the layer computes with for the parameter that is trained."""
        norm = float(torch.linalg.matrix_norm(module.weight.detach(), ord=2))  # type: ignore[arg-type]
        return LayerBounds(
            output_norm=lambda: 1.001 * norm * context.input_norm,
            lipschitz=1.001 * norm,
            gradients={name: lambda: context.input_norm for name, _ in module.named_parameters()},
        )

    record = Record(wrap(net, (4,)))
    generator = torch.Generator().manual_seed(2)

    def brute_force() -> None:
        for _ in range(50):
            record.try_(*torch.randn(2, 4, generator=generator, dtype=torch.float64))

    with pytest.raises(BoundBroken, match="parametrizations"):
        brute_force()
