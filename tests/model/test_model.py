"""The wrapped model: what bad input gets, what changes after wrapping do, copies, devices and compilation."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import (
    ConfigurationError,
    DPLipModel,
    InputError,
    LossBoundError,
    PrivacyError,
    UnsupportedModuleError,
    constraints,
    gated,
    layers,
    losses,
)
from clipless_dp.norms import dense_norm
from tests.soundness.attack import Record, summed_gradients, wrap
from tests.support import gated_model


def dense_model(constraint: constraints.ConstraintSpec = None, *, bias: bool = True) -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5, bias=bias), layers.GroupSort(5), nn.Linear(5, 3, bias=bias))
    return DPLipModel(net, input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy(4.0), constraint=constraint)


def conv_model() -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        layers.MaxMin(),
        layers.Residual(nn.Conv2d(4, 4, 3, padding=1)),
        layers.L2NormPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return DPLipModel(gated(net), input_shape=(1, 8, 8), input_norm=2.0, loss=losses.TauCrossEntropy(4.0))


def gradients(model: DPLipModel, inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model.loss(model(inputs), targets, mask).backward()
    return {name: p.grad.clone() for name, p in model.net.named_parameters() if p.grad is not None}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        # The same float32 products summed in another order: fewer than 100 terms of size below one.
        assert torch.allclose(left[name], right[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 5), "expected inputs of shape"),
        (torch.zeros(4), "expected inputs of shape"),
        (torch.zeros(()), "expected inputs of shape"),
        (torch.zeros(2, 4, 1), "expected inputs of shape"),
        (torch.zeros(2, 4, dtype=torch.int64), "convert the data set first"),
        (torch.zeros(2, 4, dtype=torch.bool), "convert the data set first"),
        (torch.zeros(2, 4, dtype=torch.complex64), "convert the data set first"),
        (torch.zeros(2, 4, dtype=torch.float64), "the model is torch.float32"),
        (torch.zeros(2, 4, dtype=torch.bfloat16), "the model is torch.float32"),
        (torch.zeros(2, 4, device="meta"), "on meta"),
    ],
)
def test_inputs_of_another_shape_dtype_or_device_are_refused(inputs: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dense_model()(inputs)


def test_autocast_is_refused_in_forward_loss_and_backward() -> None:
    model = dense_model()
    inputs, targets = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    output = model(inputs)
    loss = model.loss(output, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for refused in (lambda: model(inputs), lambda: model.loss(output, targets), loss.backward):
            with pytest.raises(PrivacyError, match="autocast"):
                refused()
    assert all(parameter.grad is None for parameter in model.net.parameters())
    model.loss(model(inputs), targets).backward()
    assert all(parameter.grad is not None for parameter in model.net.parameters())


@pytest.mark.parametrize(
    ("target", "mask"),
    [
        (torch.zeros(3, dtype=torch.int64), None),
        (torch.zeros((), dtype=torch.int64), None),
        (torch.zeros(2, device="meta", dtype=torch.int64), None),
        (torch.zeros(2), None),
        (torch.zeros(2, 3), None),
        (torch.zeros(2, dtype=torch.int64), torch.ones(2)),
        (torch.zeros(2, dtype=torch.int64), torch.ones(3, dtype=torch.bool)),
        (torch.zeros(2, dtype=torch.int64), torch.ones(2, 1, dtype=torch.bool)),
    ],
)
def test_targets_and_masks_that_do_not_fit_are_refused(target: Tensor, mask: Tensor | None) -> None:
    model = dense_model()
    with pytest.raises(InputError):
        model.loss(model(torch.zeros(2, 4)), target, mask)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), torch.nn.functional.cross_entropy, None, "hinge"])
def test_a_loss_without_a_stated_bound_is_refused(loss: object) -> None:
    with pytest.raises(LossBoundError, match="BoundedLoss"):
        DPLipModel(nn.Linear(2, 2), input_shape=(2,), input_norm=1.0, loss=loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", [0.0, math.inf, math.nan, -1.0, 1e-12, None, "1", 1j, (1.0,)])
def test_a_loss_whose_bound_is_no_positive_number_is_refused(bound: float) -> None:
    class Strange(losses.MeanAbsoluteError):
        def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
            return bound

    with pytest.raises(LossBoundError, match="gradient bound"):
        DPLipModel(nn.Linear(2, 2), input_shape=(2,), input_norm=1.0, loss=Strange())


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf, 1e-12, "1", None, torch.tensor(1.0)])
def test_an_input_norm_that_is_no_positive_number_is_refused(norm: object) -> None:
    with pytest.raises(ConfigurationError, match="input_norm"):
        DPLipModel(nn.Linear(2, 2), input_shape=(2,), input_norm=norm, loss=losses.Huber())  # type: ignore[arg-type]


def test_parameters_of_half_precision_or_of_two_kinds_are_refused() -> None:
    for net in (nn.Linear(2, 2).half(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())):
        with pytest.raises(ConfigurationError, match="float"):
            wrap(net, (2,))


def test_an_input_shape_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(ConfigurationError, match=r"input_shape does not fit the network at 1 "):
        wrap(nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 2)), (2,))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_sample_without_a_finite_norm_contributes_exactly_nothing_and_is_counted(bad: float) -> None:
    model = conv_model()
    inputs, targets = torch.randn(5, 1, 8, 8), torch.arange(5) % 3
    inputs[2, 0, 3, 3] = bad
    kept = torch.arange(5) != 2
    everything = gradients(model, inputs, targets)
    assert int(model.nonfinite_samples) == 1
    assert_same(everything, gradients(model, inputs[kept], targets[kept]))
    alone = gradients(model, inputs[2:3], targets[2:3])
    assert all(bool((gradient == 0).all()) for gradient in alone.values())


def test_a_network_that_hides_nan_still_gets_no_gradient_from_a_nan_sample() -> None:
    net = nn.Linear(3, 2)
    loss = losses.BoundedLoss(lambda output, target: torch.nan_to_num(output).sum(1) + target, bound=10.0)
    model = DPLipModel(net, input_shape=(3,), input_norm=1.0, loss=loss)
    found = gradients(model, torch.full((1, 3), math.nan), torch.ones(1))
    assert all(bool((gradient == 0).all()) for gradient in found.values())


@pytest.mark.parametrize("label", [-1, 3, -100, 2**40])
def test_a_label_out_of_range_contributes_nothing_and_is_counted(label: int) -> None:
    model = dense_model()
    inputs, targets = torch.randn(4, 4), torch.tensor([0, 1, label, 2])
    kept = torch.tensor([True, True, False, True])
    found = gradients(model, inputs, targets)
    assert int(model.nonfinite_samples) == 1
    assert_same(found, gradients(model, inputs[kept], targets[kept]))


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_finite_rows_that_a_mask_leaves_out_contribute_nothing_and_outputs_may_be_overwritten(bad: float) -> None:
    model = dense_model()
    inputs, targets = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    inputs[3] = bad
    mask = torch.tensor([True, False, True, False])
    expected = gradients(model, inputs[mask], targets[mask])
    model.zero_grad(set_to_none=True)
    output = model(inputs)
    assert not math.isnan(bad) or bool(output[3].isnan().all())
    output[1] = 100.0
    model.loss(output, targets, mask).backward()
    assert_same({name: p.grad for name, p in model.net.named_parameters() if p.grad is not None}, expected)


def test_masked_rows_contribute_nothing_whatever_they_hold_and_are_not_counted() -> None:
    model = dense_model()
    inputs, targets = torch.randn(4, 4), torch.tensor([0, 1, 99, 2])
    inputs[1] = math.nan
    mask = torch.tensor([True, False, False, True])
    assert_same(gradients(model, inputs, targets, mask), gradients(model, inputs[mask], targets[mask]))
    assert int(model.nonfinite_samples) == 0


def test_evaluation_without_gradients_counts_nothing() -> None:
    model = dense_model()
    with torch.no_grad():
        model.loss(model(torch.full((2, 4), math.nan)), torch.zeros(2, dtype=torch.int64))
    assert int(model.nonfinite_samples) == 0


def test_an_empty_batch_gives_an_empty_output_a_zero_loss_and_zero_gradients() -> None:
    for model, shape in ((dense_model(), (4,)), (conv_model(), (1, 8, 8))):
        output = model(torch.zeros(0, *shape))
        assert output.shape == (0, 3)
        loss = model.loss(output, torch.zeros(0, dtype=torch.int64))
        assert float(loss.detach()) == 0.0
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_loss_is_the_sum_of_the_samples_and_never_their_mean() -> None:
    model = dense_model()
    inputs, targets = torch.randn(6, 4), torch.arange(6) % 3
    with torch.no_grad():
        whole = model.loss(model(inputs), targets)
        parts = [model.loss(model(inputs[i : i + 1]), targets[i : i + 1]) for i in range(6)]
    # Six float32 terms of size one: relative rounding below 6·2^-24.
    assert float(whole) == pytest.approx(float(torch.stack(parts).sum()), rel=1e-6)


@pytest.mark.parametrize("constraint", [None, constraints.Spectral(), constraints.Orthogonal()])
def test_the_sensitivity_follows_weights_that_are_loaded_after_wrapping(
    constraint: constraints.Constraint | None,
) -> None:
    model = dense_model(constraint)
    before = model.sensitivity().total
    loud = {name: 10.0 * value for name, value in model.net.state_dict().items()}
    model.net.load_state_dict(loud)
    after = model.sensitivity()
    assert after.total > 2.0 * before
    assert after.layers[0].certified_norm == dense_norm(model.net[0].weight)
    double = wrap(copy.deepcopy(model.net).double(), (4,), cotangent_norm=math.sqrt(2.0))
    double.net.load_state_dict(loud)
    record = Record(double)
    for sample, target in ((torch.ones(4), torch.eye(3)[0]), (torch.randn(4), torch.randn(3))):
        record.try_(sample.double(), 100.0 * target.double())
    for name, bound in record.bounds.items():
        assert record.worst[name] * bound <= after.per_parameter[name] * (1.0 + 1e-9)


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda weight: weight.detach().mul_(7.0),
    "through .data": lambda weight: weight.data.mul_(7.0),
    "by assigning .data": lambda weight: setattr(weight, "data", 7.0 * weight.data),
    "through numpy": lambda weight: weight.detach().numpy().__imul__(7.0),
    "by absolute values": lambda weight: weight.data.abs_().mul_(1.0),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_constraint_is_trusted_only_until_the_weight_changes(how: str, frozen: bool) -> None:
    model = dense_model(None if frozen else constraints.Spectral())
    weight = model.net[2].weight
    weight.requires_grad_(not frozen)
    model.sensitivity()
    CHANGES[how](weight)
    expected = model.sensitivity().per_parameter["0.weight"]
    # G·‖W‖·X, with √2 and 1 for G and X; gates' rounding adds less than 1e-4.
    assert expected == pytest.approx(math.sqrt(2.0) * dense_norm(weight), rel=1e-4)
    assert expected >= math.sqrt(2.0) * dense_norm(weight)
    model.project_()
    if not frozen:
        assert model.sensitivity().per_parameter["0.weight"] <= math.sqrt(2.0) * (1.0 + 1e-4)


def test_a_limit_that_is_lowered_counts_from_the_next_projection_on() -> None:
    constraint = constraints.Spectral(2.0)
    model = dense_model(constraint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100.0)
    model.project_()
    before = model.sensitivity().per_parameter["0.weight"]
    constraint.limit = 0.5
    assert model.sensitivity().per_parameter["0.weight"] == before
    model.project_()
    assert model.sensitivity().per_parameter["0.weight"] == pytest.approx(before / 4.0, rel=1e-12)
    assert dense_norm(model.net[2].weight) <= 0.5


def test_input_and_cotangent_caps_cannot_be_raised_after_wrapping() -> None:
    model = dense_model()
    for name in ("input_norm", "cotangent_norm", "input_shape"):
        with pytest.raises(AttributeError):
            setattr(model, name, getattr(model, name))


def test_another_loss_after_wrapping_stays_behind_the_cotangent_gate() -> None:
    model = dense_model().double()
    model.loss_function = losses.BoundedLoss(lambda output, target: 1e5 * output.sum(1), bound=1e9)
    found = summed_gradients(model, torch.ones(1, 4, dtype=torch.float64), torch.zeros(1))
    for name, bound in model.sensitivity().per_parameter.items():
        assert float(found[name].norm()) <= bound


def _gate(model: DPLipModel, kind: type[nn.Module]) -> nn.Module:
    return next(module for module in model.net.modules() if isinstance(module, kind))


SETTINGS: dict[str, Callable[[DPLipModel], object]] = {
    "a gate's radius": lambda model: setattr(_gate(model, layers.SphereScaling), "radius", 50.0),
    "a gate's limit": lambda model: setattr(_gate(model, layers.CotangentGate), "limit", 50.0),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_the_sensitivity_follows_a_setting_that_is_changed_after_wrapping(what: str) -> None:
    model = conv_model()
    before = model.sensitivity().total
    SETTINGS[what](model)
    assert model.sensitivity().total > 5.0 * before


def test_a_setting_that_starts_to_mix_samples_is_refused() -> None:
    model = wrap(gated(nn.Sequential(nn.Linear(4, 4), layers.LayerCentering(), nn.Linear(4, 2))), (4,))
    model.sensitivity()
    model.net.get_submodule("1").dims = (0,)
    with pytest.raises(UnsupportedModuleError, match="mix samples"):
        model.sensitivity()


TAMPERING: dict[str, Callable[[DPLipModel], object]] = {
    "replacing a module": lambda model: setattr(model.net, "2", nn.Linear(5, 3)),
    "replacing a parameter": lambda model: setattr(
        model.net.get_submodule("2"), "weight", nn.Parameter(torch.zeros(3, 5))
    ),
    "adding a parameter": lambda model: setattr(model.net, "more", nn.Parameter(torch.zeros(3))),
    "a forward hook": lambda model: model.net.get_submodule("0").register_forward_hook(
        lambda module, args, output: 9.0 * output
    ),
    "a forward pre-hook": lambda model: model.net.get_submodule("0").register_forward_pre_hook(
        lambda module, args: args
    ),
    "a full backward hook": lambda model: model.net.get_submodule("0").register_full_backward_hook(
        lambda module, i, o: None
    ),
    "a hook on a parameter": lambda model: model.net.get_submodule("0").weight.register_hook(
        lambda gradient: 9.0 * gradient
    ),
    "a post-accumulate hook": lambda model: model.net.get_submodule("0").weight.register_post_accumulate_grad_hook(
        lambda parameter: None
    ),
    "a forward of its own": lambda model: setattr(model.net.get_submodule("0"), "forward", lambda values: 9.0 * values),
    "a parametrisation": lambda model: nn.utils.parametrizations.weight_norm(model.net.get_submodule("0")),
    "weights of another dtype": lambda model: model.net.double(),
}


@pytest.mark.parametrize("how", TAMPERING)
@pytest.mark.parametrize("gates", [False, True])
def test_no_sensitivity_is_given_after(how: str, gates: bool) -> None:
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    if gates:
        net = gated(net)
    model = wrap(net, (4,))
    model.sensitivity()
    TAMPERING[how](model)
    with pytest.raises(PrivacyError):
        model.sensitivity()


def test_casting_the_network_to_half_precision_behind_the_model_gives_no_sensitivity() -> None:
    model = dense_model()
    model.net.half()
    with pytest.raises(ConfigurationError, match="float16"):
        model.sensitivity()


def test_frozen_parameters_leave_the_sensitivity_and_come_back() -> None:
    model = dense_model()
    full = model.sensitivity()
    model.net[0].requires_grad_(False)
    part = model.sensitivity()
    assert part.per_parameter.keys() == {"2.weight", "2.bias"}
    assert part.total == pytest.approx(math.hypot(*part.per_parameter.values()), rel=1e-12)
    model.net[0].requires_grad_(True)
    assert model.sensitivity() == full


def test_a_network_of_frozen_parameters_has_zero_sensitivity() -> None:
    model = dense_model()
    model.net.requires_grad_(False)
    assert model.sensitivity().total == 0.0


def test_constraints_leave_frozen_weights_alone_and_certify_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    net[1].weight.requires_grad_(False).mul_(10.0)
    before = net[1].weight.clone()
    model = wrap(net, (4,), constraint=constraints.Spectral())
    model.project_()
    assert torch.equal(net[1].weight, before)
    assert model.sensitivity().per_parameter["0.weight"] >= dense_norm(before)


@pytest.mark.parametrize("build", [dense_model, conv_model])
def test_state_dict_names_are_the_networks_own(build: Callable[[], DPLipModel]) -> None:
    model = build()
    own = {f"net.{name}" for name in model.net.state_dict()}
    assert set(model.state_dict()) == own
    assert set(model.sensitivity().per_parameter) == {name for name, _ in model.net.named_parameters()}


def test_the_wrapped_network_is_the_users_own_object_trained_in_place() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    model = wrap(net, (4,))
    assert model.net is net
    assert [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in net.parameters()]


@pytest.mark.parametrize("build", [dense_model, conv_model])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_shares_nothing(
    build: Callable[[], DPLipModel], duplicate: Callable[[DPLipModel], DPLipModel]
) -> None:
    model = build()
    twin = duplicate(model)
    inputs = torch.randn(3, *model.input_shape)
    targets = torch.arange(3)
    assert twin.sensitivity().per_parameter == model.sensitivity().per_parameter
    assert_same(gradients(model, inputs, targets), gradients(twin, inputs, targets))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(5.0)
    assert not torch.allclose(twin(inputs), model(inputs))
    assert model.sensitivity().per_parameter == build().sensitivity().per_parameter


def test_double_and_to_keep_constraints_and_accept_inputs_of_the_new_dtype() -> None:
    model = dense_model(constraints.Spectral())
    before = model.sensitivity().total
    model.double()
    assert model(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    # Only the gates' slack, about 1e-6 in float32, and the constraint's own rounding differ.
    assert model.sensitivity().total == pytest.approx(before, rel=1e-4)
    with pytest.raises(InputError):
        model(torch.randn(2, 4))
    model.to(torch.float32)
    assert model(torch.randn(2, 4)).dtype == torch.float32
    assert dense_norm(model.net[0].weight) <= 1.0


def test_train_and_eval_reach_the_network_and_do_not_move_the_bounds() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)), (4,))
    bounds = model.sensitivity().per_parameter
    model.eval()
    inputs = torch.randn(2, 4)
    assert torch.equal(model(inputs), model(inputs))
    assert model.sensitivity().per_parameter == bounds


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", [dense_model, conv_model])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Dynamo.*:UserWarning")
def test_forward_and_backward_compile_as_one_graph(backend: str, build: Callable[[], DPLipModel]) -> None:
    torch._dynamo.reset()
    model = build()
    inputs = torch.randn(4, *model.input_shape)
    inputs[1] = math.nan
    inputs[2] *= 1e6
    targets = torch.tensor([0, 1, 2, 7])
    mask = torch.tensor([True, True, True, True])
    expected = gradients(model, inputs, targets, mask)

    def step(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return model.loss(model(inputs), targets, mask)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    model.zero_grad(set_to_none=True)
    compiled(inputs, targets, mask).backward()
    assert_same(expected, {name: p.grad for name, p in model.net.named_parameters() if p.grad is not None})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Dynamo.*:UserWarning")
def test_the_compiled_module_is_gated_like_the_model() -> None:
    torch._dynamo.reset()
    model = dense_model().double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = 1e6 * torch.randn(1, 4, dtype=torch.float64)
    (1e6 * compiled(inputs).sum()).backward()
    for name, parameter in model.net.named_parameters():
        assert parameter.grad is not None
        assert 0.0 < float(parameter.grad.norm()) <= model.sensitivity().per_parameter[name]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Dynamo.*:UserWarning")
def test_autocast_around_the_backward_pass_of_a_compiled_model_is_refused(backend: str) -> None:
    torch._dynamo.reset()
    model = dense_model()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    inputs, targets = torch.randn(8, 4), torch.arange(8) % 2
    model.loss(compiled(inputs), targets).backward()
    model.zero_grad()
    loss = model.loss(compiled(inputs), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(PrivacyError, match="autocast"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_a_model_tells_its_graph_and_its_vocabulary() -> None:
    numbers = gated_model()
    called = {numbers.graph.leaf(node) for node in numbers.graph.tensor_nodes() if node.op == "call_module"}
    assert called == {part for part in numbers.net.modules() if not list(part.children())}
    assert numbers.vocabulary is None
    tokens = DPLipModel(
        gated(nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2))),
        input_shape=(3,),
        loss=losses.TauCrossEntropy(8.0),
    )
    assert tokens.vocabulary == 7


def test_models_of_different_input_norms_compile_in_one_process():
    torch._dynamo.reset()
    inputs = 10.0 * torch.randn(4, 6)
    for input_norm in (1.0, 2.0, 3.5):
        model = DPLipModel(
            nn.Sequential(nn.Linear(6, 3)), input_shape=(6,), input_norm=input_norm, loss=losses.TauCrossEntropy()
        )
        # From the second one on the number is a symbol of the graph.
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(inputs), model(inputs))
    torch._dynamo.reset()
