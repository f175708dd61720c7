"""The sweeps: sums over uses, relations, reports, and what they read."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from clipless_dp import (
    ConfigurationError,
    LayerBounds,
    PrivacyError,
    RuleContext,
    UnsupportedModuleError,
    constraints,
    gated,
    layers,
    register_rule,
)
from clipless_dp.bounds import SensitivityTracker
from clipless_dp.bounds.stamp import stamp
from clipless_dp.graph import trace
from clipless_dp.model.settings import settings_of
from clipless_dp.norms import conv2d_norm, dense_norm
from clipless_dp.norms.operators import DenseOperator
from clipless_dp.rules import base, graph, register_function_rule
from tests.soundness.attack import BoundBroken, Record, wrap


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that a test registers are gone after it."""
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))


def test_replacing_one_sample_costs_twice_as_much_as_adding_or_removing_it() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (4,))
    once, twice = model.sensitivity("add-or-remove-one"), model.sensitivity("replace-one")
    assert twice.total == pytest.approx(2.0 * once.total, rel=1e-12)
    assert twice.per_parameter == pytest.approx({k: 2.0 * v for k, v in once.per_parameter.items()}, rel=1e-12)
    assert twice.relation == "replace-one"


def test_an_unknown_relation_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="relation"):
        wrap(nn.Linear(2, 2), (2,)).sensitivity("substitute")  # type: ignore[arg-type]


def test_the_total_is_the_euclidean_norm_over_parameters_of_the_bounds_of_the_contract() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).double()
    model = wrap(net, (1, 4, 4), input_norm=2.0, cotangent_norm=0.5)
    sensitivity = model.sensitivity()
    conv = conv2d_norm(net[0].weight, input_size=(4, 4), padding=1)
    dense = dense_norm(net[3].weight)
    activation = conv * 2.0 + 4.0 * float(net[0].bias.detach().norm())
    expected = {
        "0.weight": 3.0 * 0.5 * dense * 2.0,
        "0.bias": 4.0 * 0.5 * dense,
        "3.weight": 0.5 * activation,
        "3.bias": 0.5,
    }
    # The gates' float64 slack and the sweeps' own rounding allowance, together below 1e-8.
    assert sensitivity.per_parameter == pytest.approx(expected, rel=1e-8)
    assert sensitivity.total == pytest.approx(math.hypot(*expected.values()), rel=1e-8)


def test_a_layer_used_twice_gets_the_sum_and_the_same_layer_untied_the_parts() -> None:
    class Twice(nn.Module):
        def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, values: Tensor) -> Tensor:
            return self.first(values) + self.second(values)  # type: ignore[no-any-return]

    layer = nn.Linear(3, 3, bias=False)
    tied = wrap(Twice(layer, layer), (3,)).sensitivity().per_parameter
    free = wrap(Twice(layer, nn.Linear(3, 3, bias=False)), (3,)).sensitivity().per_parameter
    assert tied == pytest.approx({"first.weight": sum(free.values())}, rel=1e-12)


def test_a_parameter_that_one_layer_holds_under_two_names_counts_twice() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Parameter(torch.zeros(3))
            self.right = self.left

        def forward(self, values: Tensor) -> Tensor:
            return values + self.left + self.right

    @register_rule(Doubled)
    def doubled_rule(module: Doubled, context: RuleContext) -> LayerBounds:
        return LayerBounds(output_norm=lambda: context.input_norm, gradients={"left": 1.0, "right": 1.0})

    model = wrap(Doubled().double(), (3,))
    record = Record(model)
    record.try_(torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert record.worst["left"] > 0.999


def test_a_users_rule_is_used_for_its_exact_type_and_its_mistake_is_observable() -> None:
    class Scale(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, values: Tensor) -> Tensor:
            return self.factor * values

    class Louder(Scale):
        def forward(self, values: Tensor) -> Tensor:
            return 10.0 * torch.sin(values)

    @register_rule(Scale)
    def scale_rule(module: Scale, context: RuleContext) -> LayerBounds:
        return LayerBounds(output_norm=lambda: module.factor * context.input_norm, lipschitz=module.factor)

    net = nn.Sequential(nn.Linear(3, 3), Scale(2.0), nn.Linear(3, 3)).double()
    assert wrap(net, (3,)).sensitivity().total > 0.0
    with pytest.raises(UnsupportedModuleError, match="sin"):
        wrap(nn.Sequential(nn.Linear(3, 3), Louder(2.0)), (3,))

    @register_rule(Scale)
    def wrong_rule(module: Scale, context: RuleContext) -> LayerBounds:
        return LayerBounds(output_norm=lambda: 0.1 * context.input_norm, lipschitz=0.1)

    sample, target = net[2].weight.detach()[0], torch.eye(3, dtype=torch.float64)[0]
    record = Record(wrap(net, (3,)))
    with pytest.raises(BoundBroken):
        record.try_(sample / sample.norm(), target)


def test_a_rule_that_forgets_a_parameter_is_refused_by_name() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, values: Tensor) -> Tensor:
            return values + self.shift

    @register_rule(Shift)
    def shift_rule(module: Shift, context: RuleContext) -> LayerBounds:
        return LayerBounds(output_norm=lambda: context.input_norm)

    with pytest.raises(UnsupportedModuleError, match="no gradient bound for the parameter 'shift'"):
        wrap(nn.Sequential(Shift()), (3,))


def test_a_users_rule_that_reads_a_buffer_is_followed_at_every_step() -> None:
    class Scaled(nn.Module):
        factor: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("factor", torch.tensor(1.0))

        def forward(self, values: Tensor) -> Tensor:
            return self.factor * values

    @register_rule(Scaled)
    def scaled_rule(module: Scaled, context: RuleContext) -> LayerBounds:
        factor = float(module.factor)
        return LayerBounds(output_norm=lambda: factor * context.input_norm, lipschitz=factor)

    model = wrap(nn.Sequential(Scaled(), nn.Linear(3, 2)), (3,))
    before = model.sensitivity().per_parameter["1.weight"]
    model.net[0].factor.fill_(8.0)
    assert model.sensitivity().per_parameter["1.weight"] == pytest.approx(8.0 * before, rel=1e-12)


def test_register_rule_takes_module_types_only() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        register_rule(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_weights_so_large_that_activations_may_overflow_give_no_sensitivity() -> None:
    for activation in (nn.ReLU(), nn.Tanh(), layers.L2NormPool2d(1)):
        pool = isinstance(activation, layers.L2NormPool2d)
        net = nn.Sequential(nn.Conv2d(1, 1, 1), activation, nn.Conv2d(1, 1, 1))
        with torch.no_grad():
            net[0].weight.fill_(1e20 if pool else 3e38)
        with pytest.raises(PrivacyError, match="overflow"):
            wrap(net, (1, 2, 2)).sensitivity()


def test_a_weight_that_is_not_finite_gives_no_sensitivity() -> None:
    model = wrap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), (3,))
    with torch.no_grad():
        model.net[1].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1\.weight"):
        model.sensitivity()


def test_a_gate_hides_the_norms_of_the_weights_before_it_and_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(gated(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))), (3,))
    before = model.sensitivity().per_parameter
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.fill_(math.nan)
    assert model.sensitivity().per_parameter == before


def test_the_smaller_of_a_gates_cap_and_a_constraints_consequence_counts() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 3, bias=False),
        layers.BallProjection(50.0),
        nn.Linear(3, 2, bias=False),
        layers.CotangentGate(50.0),
    )
    model = wrap(net, (3,), constraint=constraints.Spectral())
    # Gates' rounding: below 1e-4 in float32.
    assert model.sensitivity().per_parameter["2.weight"] == pytest.approx(1.0, rel=1e-4)


def test_dead_branches_have_no_sensitivity_and_no_gradient() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.dead = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, values: Tensor) -> Tensor:
            self.dead(values)
            return self.used(values)  # type: ignore[no-any-return]

    bounds = wrap(Dead(), (3,)).sensitivity().per_parameter
    assert bounds.get("dead.weight", 0.0) == 0.0
    assert bounds["used.weight"] > 0.0


def test_the_report_has_a_line_for_each_parametrised_layer() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    model = wrap(net, (1, 4, 4), constraint=constraints.Spectral())
    sensitivity = model.sensitivity()
    conv, dense = sensitivity.layers
    assert (conv.path, conv.kind, conv.coverage, conv.certified_norm) == ("0", "Conv2d", 9, 1.0)
    assert (dense.path, dense.kind, dense.coverage, dense.certified_norm) == ("3", "Linear", None, 1.0)
    assert math.hypot(conv.sensitivity, dense.sensitivity) == pytest.approx(sensitivity.total, rel=1e-12)
    lines = str(sensitivity).splitlines()
    assert lines[0].split() == ["layer", "type", "X", "G", "coverage", "norm", "Δ"]
    assert lines[-1].startswith("total Δ = ")


def test_a_deep_network_is_swept_without_running_out_of_stack() -> None:
    net = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()) for _ in range(400)])
    model = wrap(net, (2,), constraint=constraints.Spectral())
    assert len(model.sensitivity().per_parameter) == 400


def least_change(values: Tensor) -> None:
    values[-1, -1] = torch.nextafter(values[-1, -1], values.new_tensor(9.0))


def two_signs(values: Tensor) -> None:
    values[0, [1, 3]] *= -1.0


@pytest.mark.parametrize("change", [least_change, two_signs, Tensor.neg_, Tensor.abs_, lambda w: w.mul_(2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "weight",
    [lambda w: w, lambda w: w[1:], lambda w: w[:, :-1], lambda w: w.t(), lambda w: w.flatten()[1:-3].view(7, 8)],
)
def test_a_stamp_shows_changes_of_the_data_that_the_version_does_not(change, dtype, weight):
    torch.manual_seed(0)
    base = torch.randn(6, 10, dtype=dtype)
    parameter = nn.Parameter(weight(base))
    before = stamp(parameter)
    assert stamp(parameter) == before
    change(parameter.data)
    assert stamp(parameter) != before


def rebound(module: nn.Module) -> None:
    module.kernel_size, module.stride = [3, 3], [1, 1]


def rewritten(module: nn.Module) -> None:
    module.kernel_size[:], module.stride[0], module.stride[1] = [3, 3], 1, 1


@pytest.mark.parametrize("change", [rebound, rewritten])
@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_settings_that_are_lists_are_followed_when_they_are_changed(kind, change):
    def model_of(pool):
        return wrap(nn.Sequential(pool, nn.Flatten()), (1, 6, 6))

    model = model_of(kind([2, 2], stride=[2, 2]))
    assert model.sensitivity().total == 0.0
    before = model.lipschitz_constant()
    change(model.net[0])
    changed = kind([3, 3], stride=[1, 1])
    assert model.lipschitz_constant() == model_of(changed).lipschitz_constant() != before
    assert model.changes == 1


class Holder:
    def __init__(self) -> None:
        self.inner = {"factors": [1.0, [2.0]]}


SETTINGS = {
    "list in a list": (lambda: [1, [2]], lambda value: value[1].append(3)),
    "dictionary": (lambda: {"a": [1]}, lambda value: value["a"].append(2)),
    "dictionary's order": (lambda: {"a": 1, "b": 2}, lambda value: value.update(a=value.pop("a"))),
    "set": (lambda: {1, 2}, lambda value: value.add(3)),
    "tensor": (lambda: torch.tensor([1.0, math.nan]), lambda value: value[0].fill_(2.0)),
    "tensor's data": (lambda: torch.ones(2), lambda value: value.data.fill_(2.0)),
    "array": (lambda: np.ones(3), lambda value: value.fill(2.0)),
    "object": (Holder, lambda value: value.inner["factors"][1].append(0)),
    "object that cannot be pickled": (
        lambda: SimpleNamespace(lock=threading.Lock(), factor=1.0),
        lambda value: setattr(value, "factor", 2.0),
    ),
    "modules in a list": (lambda: [nn.ReLU(), nn.Dropout(0.1)], lambda value: setattr(value[1], "p", 0.5)),
    "functions in a list": (lambda: [math.sin, lambda x: x], lambda value: value.__setitem__(1, lambda x: 2 * x)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_any_type_equals_itself_until_something_within_is_changed(name):
    make, change = SETTINGS[name]
    module = nn.Linear(2, 2)
    module.setting = make()
    known = settings_of(module)
    assert settings_of(module) == known
    assert settings_of(nn.Linear(2, 2)) != known
    change(module.setting)
    assert settings_of(module) != known


FACTOR = [1.0]


def amplify(values):
    return values * FACTOR[0]


fx.wrap("amplify")


class Amplified(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = layers.BallProjection(1.0), nn.Linear(6, 3)

    def forward(self, values):
        return self.head(amplify(self.gate(values)))


def wrapped_like(rule):
    return functools.wraps(graph.rearrangement_function_rule)(rule)


@pytest.mark.parametrize("disguise", [lambda rule: rule, wrapped_like])
def test_a_function_rule_of_a_users_is_asked_anew_each_time(disguise, monkeypatch):
    monkeypatch.setattr(base, "_FUNCTION_RULES", dict(base._FUNCTION_RULES))

    @register_function_rule(amplify)
    @disguise
    def rule(context, args, kwargs):
        factor = FACTOR[0]
        return LayerBounds(output_norm=lambda: factor * context.input_norm, lipschitz=factor)

    model = wrap(Amplified().double(), (6,))
    first = model.sensitivity().per_parameter["head.weight"]
    FACTOR[0] = 10.0
    try:
        assert model.sensitivity().per_parameter["head.weight"] == pytest.approx(10.0 * first, rel=1e-12)
    finally:
        FACTOR[0] = 1.0


def shuffled(values: Tensor) -> None:
    values.copy_(
        values.flatten()[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(1))].view_as(values)
    )


def two_exchanged(values: Tensor) -> None:
    values[0, 1], values[1, 2] = values[1, 2].clone(), values[0, 1].clone()


def two_rows_exchanged(values: Tensor) -> None:
    values[[0, 3]] = values[[3, 0]].clone()


def four_signs_moved(values: Tensor) -> None:
    """Of entries of size one: every row and every column keeps its sum, and its sum of patterns."""
    values[:2, :4] = torch.tensor([[-1.0, 1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0]], dtype=values.dtype)


def two_signs_exchanged(values: Tensor) -> None:
    values[0, 1], values[0, 3] = -1.0, 1.0


ORDERS = {
    "shuffled": (shuffled, None),
    "sorted": (lambda w: w.copy_(w.flatten().sort().values.view_as(w)), None),
    "two exchanged": (two_exchanged, None),
    "rows exchanged": (two_rows_exchanged, None),
    "transposed": (lambda w: w.copy_(w.flip(0)), None),
    "signs exchanged": (two_signs_exchanged, [[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]]),
    "signs moved": (four_signs_moved, [[1.0, -1.0, -1.0, 1.0], [-1.0, 1.0, 1.0, -1.0]]),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 8), (5, 9), (64, 33), (80, 64), (70, 3, 5, 5)])
def test_a_stamp_shows_what_was_put_in_another_order(name, dtype, shape):
    change, beginning = ORDERS[name]
    torch.manual_seed(0)
    base = torch.randn(shape, dtype=dtype)
    if len(shape) == 4:
        base = base.contiguous(memory_format=torch.channels_last)
        if beginning is not None:
            return
    if beginning is not None:
        base = base.sign()
        base[:2, :4] = torch.tensor(beginning, dtype=dtype)
    parameter = nn.Parameter(base)
    before, version = stamp(parameter), parameter._version
    change(parameter.data)
    assert parameter._version == version
    assert stamp(parameter)[2:] != before[2:]
    assert torch.equal(parameter.data.flatten().sort().values, base.flatten().sort().values)


@pytest.mark.parametrize("size", [4095, 4096, 4097, 6143, 6144])
def test_a_stamp_shows_each_entry_that_changes_by_one_bit(size):
    parameter = nn.Parameter(torch.randn(size))
    before = stamp(parameter)
    for place in (0, 2047, 2048, 4095, 4096, size // 2, size - 1):
        if place < size:
            parameter.data.view(torch.int32)[place] ^= 1
            assert stamp(parameter) != before, place
            parameter.data.view(torch.int32)[place] ^= 1
    assert stamp(parameter) == before


def test_a_stamp_is_the_same_under_autocast_and_for_equal_numbers_elsewhere():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(80, 64))
    before = stamp(parameter)
    with torch.autocast("cpu"):
        assert stamp(parameter) == before
    assert stamp(nn.Parameter(parameter.detach().clone()))[2:] == before[2:]


def test_a_constrained_weight_whose_entries_are_shuffled_is_certified_anew():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)).double()
    model = wrap(net, (16,), constraint=constraints.Spectral())
    with torch.no_grad():
        net[2].weight.copy_(torch.eye(4, 16))
    model.project_()
    assert model.sensitivity().per_parameter["0.weight"] == pytest.approx(1.0, rel=1e-6)
    weight = net[2].weight.data
    # The four ones in one row: a matrix of norm two.
    weight.copy_(weight.flatten().sort(descending=True).values.view_as(weight))
    true = float(torch.linalg.matrix_norm(weight, 2))
    assert true > 1.99
    assert model.sensitivity().per_parameter["0.weight"] >= true


@pytest.mark.parametrize(
    ("stretches", "expected"), [({}, 5.0), ({"weight": 1.0}, 2.0), ({"weight": 2.0}, 4.0), ({"weight": 9.0}, 5.0)]
)
def test_a_gradient_gate_of_a_users_counts_as_its_cap_unless_it_says_how_far_it_stretches(stretches, expected):
    class Gated(nn.Linear):
        pass

    @register_rule(Gated)
    def rule(module, context):
        return LayerBounds(
            output_norm=lambda: context.norm("weight", DenseOperator()) * context.input_norm,
            lipschitz=lambda: context.norm("weight", DenseOperator()),
            gradients={"weight": lambda: context.input_norm},
            gradient_limits={"weight": 5.0},
            gradient_stretches=stretches,
            operators={"weight": DenseOperator()},
        )

    model = wrap(nn.Sequential(Gated(4, 3, bias=False)), (4,), input_norm=2.0)
    # The input gate's float32 slack.
    assert model.sensitivity().total == pytest.approx(expected, rel=1e-5)


def test_norms_are_of_whole_weights_wherever_their_parts_are() -> None:
    class Halves:
        """Of each weight a half is held here, and another process finds each changed."""

        def __init__(self) -> None:
            self.gathered = 0

        def held(self, parameter: Tensor) -> Tensor:
            return parameter[: len(parameter) // 2]

        def whole(self, tensor: Tensor) -> Tensor:
            self.gathered += 1
            return torch.cat([tensor, tensor])

        def on_any_part(self, conditions: Sequence[bool]) -> list[bool]:
            return [True for _ in conditions]

    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    net[2].requires_grad_(False)
    traced = trace(net, (4,), device=torch.device("cpu"), dtype=torch.float32)
    caps = {"input_norm": 1.0, "cotangent_norm": 1.0}
    halves = Halves()
    parted, whole = SensitivityTracker(traced, **caps, weights=halves), SensitivityTracker(traced, **caps)
    # A matrix above itself has √2 times its norm; certificates are above norms by less than 1e-4.
    assert parted.sensitivity().total == pytest.approx(math.sqrt(2.0) * whole.sensitivity().total, rel=1e-3)
    first = halves.gathered
    parted.sensitivity()
    assert halves.gathered == 2 * first == 2
