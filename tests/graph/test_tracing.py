"""What cannot be bounded is refused, all of it at once, with its place and its replacement."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import ConfigurationError, NormError, UnsupportedModuleError, constraints, layers
from tests.soundness.attack import Traced, wrap

FORBIDDEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), "mixes samples.*LayerCentering"),
    "LayerNorm": (lambda: nn.LayerNorm(4), "LayerCentering followed by BallProjection"),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), "SampleGroupNorm"),
    "Softmax": (lambda: nn.Softmax(1), "TauCrossEntropy"),
    "GELU": (nn.GELU, "GroupSort"),
    "SiLU": (nn.SiLU, "GroupSort"),
    "Bilinear": (lambda: nn.Bilinear(4, 4, 4), "register"),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.5), "nn.Dropout"),
    "LazyLinear": (lambda: nn.LazyLinear(4), "run the network once on a batch of zeros"),
}


@pytest.mark.parametrize("kind", FORBIDDEN)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_an_unsupported_module_is_refused_with_its_path_and_its_replacement(kind: str) -> None:
    build, remedy = FORBIDDEN[kind]
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), build()))
    with pytest.raises(UnsupportedModuleError, match=remedy) as refusal:
        wrap(net, (4,))
    assert [(part.path, part.kind) for part in refusal.value.parts] == [("1.1", kind)]


class Sine(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.sin(values)


def conv(**options: object) -> nn.Module:
    return nn.Conv2d(1, 2, 3, padding=1, **options)  # type: ignore[arg-type]


def with_entry(layer: nn.Module, name: str, value: float) -> nn.Module:
    with torch.no_grad():
        layer.get_parameter(name).view(-1)[0] = value
    return layer


BAD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], type[Exception], str]] = {
    "groups that do not divide": (lambda: layers.GroupSort(3), (4,), ConfigurationError, r"at 0\.1 .* does not divide"),
    "pairs of an odd number": (layers.MaxMin, (5,), ConfigurationError, r"at 0\.1 .*=2 does not divide the 5 channels"),
    "channels that cannot be shuffled": (lambda: nn.ChannelShuffle(3), (4, 2, 2), ConfigurationError, r"at 0\.1 "),
    "a weight that is no number": (
        lambda: with_entry(nn.Linear(4, 4), "weight", math.nan),
        (4,),
        NormError,
        r"0\.1\.weight holds a NaN",
    ),
    "an infinite bias": (
        lambda: with_entry(conv(), "bias", math.inf),
        (1, 5, 5),
        NormError,
        r"0\.1\.bias holds a NaN or an infinity",
    ),
    "an unknown layer in a residual": (
        lambda: layers.Residual(nn.Sequential(nn.Linear(4, 4), nn.GELU())),
        (4,),
        UnsupportedModuleError,
        r"0\.1\.block\.1 \(GELU\)",
    ),
    "an unknown layer in a convex residual": (
        lambda: layers.ConvexResidual(nn.LayerNorm(4)),
        (4,),
        UnsupportedModuleError,
        r"0\.1\.block \(LayerNorm\)",
    ),
    "an unknown layer in token mixing": (
        lambda: layers.TokenMixing(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1))),
        (3, 4),
        UnsupportedModuleError,
        r"0\.1\.block\.1 \(Softmax\)",
    ),
    "an unknown function in a residual": (
        lambda: layers.Residual(Sine()),
        (4,),
        UnsupportedModuleError,
        r"0\.1\.block\.sin \(sin\)",
    ),
    "a refused function in a residual": (
        lambda: layers.Residual(Traced(lambda x: x + x.mean(1, keepdim=True))),
        (4,),
        UnsupportedModuleError,
        r"0\.1\.block\.add",
    ),
}


@pytest.mark.parametrize("constraint", [None, constraints.Orthogonal()], ids=["free", "constrained"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_gets_a_typed_error_that_names_the_modules_path(
    kind: str, constraint: constraints.Constraint | None
) -> None:
    build, shape, error, message = BAD[kind]
    with pytest.raises(error, match=message):
        wrap(nn.Sequential(nn.Sequential(nn.ReLU(), build())), shape, constraint=constraint)


def test_every_unsupported_part_is_in_one_error() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.norm = nn.LayerNorm(4)
            self.act = nn.GELU()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, values: Tensor) -> Tensor:
            values = self.act(self.norm(self.stem(values)))
            return torch.sin(values) * self.scale

    with pytest.raises(UnsupportedModuleError) as refusal:
        wrap(Everything(), (4,))
    parts = {(part.path, part.kind) for part in refusal.value.parts}
    assert {("stem.1", "BatchNorm1d"), ("norm", "LayerNorm"), ("act", "GELU")} <= parts
    assert {"scale", "sin"} <= {part.path for part in refusal.value.parts}
    for part in refusal.value.parts:
        assert part.path in str(refusal.value)
        assert part.remedy in str(refusal.value)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape across the batch": lambda x: x.reshape(-1, 2),
    "reshape to fixed rows": lambda x: x.reshape(8, -1),
    "view that merges all": lambda x: x.view(-1),
    "flatten from the batch on": lambda x: torch.flatten(x),
    "permute of the batch": lambda x: x.permute(1, 0, 2),
    "transpose of the batch": lambda x: x.transpose(0, 1),
    "transpose there and back": lambda x: torch.relu(x.transpose(0, 1)).transpose(0, 1),
    "transpose with negative axes": lambda x: x.transpose(-3, -1),
    "swapaxes of the batch": lambda x: torch.swapaxes(x, 0, 2),
    "unsqueeze before the batch": lambda x: x.unsqueeze(0),
    "unflatten of the batch": lambda x: x.unflatten(0, (1, -1)),
    "concatenation over the batch": lambda x: torch.cat([x, x]),
    "concatenation over a negative batch axis": lambda x: torch.cat([x, x], dim=-3),
    "stack over the batch": lambda x: torch.stack([x, x]),
    "mean over the batch": lambda x: x.mean(0),
    "mean over the batch, kept": lambda x: x.mean(0, keepdim=True),
    "mean over everything": lambda x: torch.mean(x),
    "mean over the batch and an axis": lambda x: x.mean((0, 1)),
    "mean over no axis, which means all": lambda x: x.mean((), keepdim=True),
    "adding the batch's mean": lambda x: x - x.mean(0, keepdim=True),
    "squeeze": lambda x: x.squeeze(),
    "flip of the batch": lambda x: x.flip(0),
    "roll of the batch": lambda x: torch.roll(x, 1, 0),
    "sum over the batch": lambda x: x.sum(0),
    "sort of the batch": lambda x: x.sort(0).values,
    "cumulative sum": lambda x: x.cumsum(0),
    "indexing": lambda x: x[0],
    "indexing that keeps the shape": lambda x: x[torch.tensor([1, 0])],
    "softmax over the batch": lambda x: torch.softmax(x, 0),
    "matrix product with itself": lambda x: x @ x.transpose(1, 2),
    "product of two values": lambda x: x * x,
    "product with the batch size": lambda x: x * x.shape[0],
    "quotient of numbers": lambda x: 1.0 / x,
    "division by a shape": lambda x: x / x.shape[1],
    "transpose attribute": lambda x: x.mT,
    "rows that merge from ten samples on": lambda x: x.reshape(x.shape[0] - 5 * (x.shape[0] // 10), -1),
    "as many columns as samples allow": lambda x: x.reshape(-1, x.numel() // x.shape[0]),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_samples_or_has_no_bound_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModuleError):
        wrap(Traced(MIXING[name]), (4, 2))


BROADCASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a constant": lambda x: x + 1.0,
    "a constant on the left": lambda x: 1.0 - x,
    "a smaller value": lambda x: x + x.mean(1, keepdim=True),
    "a larger value": lambda x: x.mean(1, keepdim=True) + x,
    "another rank": lambda x: x + x.mean(1).unsqueeze(1),
    "alpha": lambda x: torch.add(x, x, alpha=3),
    "in place": lambda x: x.add_(x),
    "a tensor made on the spot": lambda x: x + torch.ones(x.shape),
    "random numbers": lambda x: torch.cat([x, torch.rand(x.shape)], dim=1),
    "bits read as another dtype": lambda x: x.view(torch.int32).view(torch.float32),
    "a coarser mean": lambda x: x.mean(1, dtype=torch.float16),
    "a division with rounding": lambda x: torch.div(x, 2.0, rounding_mode="floor"),
    "a factor without end": lambda x: x / 0.0,
    "softplus": functional.softplus,
    "functional dropout": functional.dropout,
}


@pytest.mark.parametrize("name", BROADCASTS)
def test_sums_and_functions_without_a_bound_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModuleError):
        wrap(Traced(BROADCASTS[name]), (4, 2))


def test_a_window_computed_from_a_shape_is_refused_with_the_adaptive_form() -> None:
    for function in (functional.avg_pool2d, functional.max_pool2d):
        with pytest.raises(UnsupportedModuleError, match="adaptive_avg_pool2d"):
            wrap(Traced(lambda x, pool=function: pool(x, x.shape[2])), (1, 4, 4))


def test_parameters_used_in_functional_calls_are_refused_by_name() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, values: Tensor) -> Tensor:
            return functional.linear(values, self.weight)

    class Subclass(nn.Linear):
        def forward(self, values: Tensor) -> Tensor:
            return 5.0 * super().forward(values)

    for net, name in ((Functional(), "weight"), (Subclass(4, 4), "weight")):
        with pytest.raises(UnsupportedModuleError, match=f"{name} .*used in forward"):
            wrap(net, (4,))


@pytest.mark.parametrize(
    "constrain",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
    ],
)
def test_parametrisations_are_refused_in_favour_of_constraints(constrain: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(UnsupportedModuleError, match="pass a constraint instead"):
        wrap(nn.Sequential(constrain(nn.Linear(4, 4))), (4,))


HOOKS: dict[str, Callable[[nn.Linear], object]] = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda module, args, output: output),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, args: args),
    "full backward hook": lambda layer: layer.register_full_backward_hook(lambda module, i, o: None),
    "full backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda module, o: None),
    "hook on a parameter": lambda layer: layer.bias.register_hook(lambda gradient: 100.0 * gradient),
    "post-accumulate hook": lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda parameter: None),
    "forward on the instance": lambda layer: setattr(layer, "forward", lambda values: 100.0 * values),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_could_change_values_or_gradients_are_refused(kind: str) -> None:
    layer = nn.Linear(4, 4)
    HOOKS[kind](layer)
    with pytest.raises(UnsupportedModuleError, match="hooks"):
        wrap(nn.Sequential(layer), (4,))


def test_a_weight_that_is_not_a_parameter_is_refused() -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    del layer.weight
    layer.weight = 100.0 * other.weight
    with pytest.raises(UnsupportedModuleError, match="'weight' is not a parameter"):
        wrap(nn.Sequential(other, layer), (4,))


def test_control_flow_on_values_is_refused() -> None:
    with pytest.raises(UnsupportedModuleError, match="control flow"):
        wrap(Traced(lambda x: x if x.sum() > 0 else -x), (4,))


def test_a_network_of_two_arguments_or_two_outputs_is_refused() -> None:
    class TwoIn(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

    with pytest.raises(UnsupportedModuleError, match="exactly one tensor"):
        wrap(TwoIn(), (4,))
    with pytest.raises(ConfigurationError, match="one tensor"):
        wrap(Traced(lambda x: (x, x)), (4,))  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigurationError, match="one tensor"):
        wrap(nn.Sequential(nn.MaxPool2d(2, return_indices=True)), (1, 4, 4))


@pytest.mark.parametrize("gate", [layers.CotangentGate(1.0), layers.BallProjection(), layers.SphereScaling()])
@pytest.mark.parametrize("between", [nn.Identity(), nn.Flatten()])
def test_an_activation_that_overwrites_a_gates_value_is_refused(gate: nn.Module, between: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(4, 4), gate, between, nn.ReLU(inplace=True))
    with pytest.raises(ConfigurationError, match="inplace=False"):
        wrap(net, (4,))
    wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), gate), (4,))


def test_shapes_may_be_computed_from_the_input() -> None:
    model = wrap(Traced(lambda x: x.reshape(x.shape[0], x.size(1) * x.shape[-1]).view(x.size(0), -1, 4)), (4, 2))
    assert model.output_shape == (2, 4)


def test_containers_subclasses_and_loops_are_traced_through() -> None:
    class Looped(nn.Sequential):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.named = nn.ModuleDict({"last": nn.Linear(4, 2)})

        def forward(self, values: Tensor) -> Tensor:
            for block in self.blocks:
                values = values + torch.relu(block(values))
            return self.named["last"](values)  # type: ignore[no-any-return]

    model = wrap(Looped(), (4,))
    assert set(model.sensitivity().per_parameter) == {name for name, _ in model.net.named_parameters()}


def test_a_single_layer_keeps_its_own_names() -> None:
    model = wrap(nn.Linear(4, 2), (4,))
    assert set(model.sensitivity().per_parameter) == {"weight", "bias"}


def test_tracing_draws_no_random_number() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.5))
    wrap(net, (4,))
    assert torch.equal(torch.rand(3), expected)
