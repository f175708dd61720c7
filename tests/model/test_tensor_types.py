"""What tensors of types of a user's own compute is not what gates and bounds know: refused, or as plain ones are."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.masked import masked_tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from accounting import RDPAccountant
from clipless_dp import (
    CliplessDPOptimizer,
    ConfigurationError,
    DPLipModel,
    InputError,
    PoissonBatches,
    PoissonBatchSampler,
    PrivacyError,
    ReproducibleNoise,
    UnsupportedModuleError,
    fit,
    gated,
    gradient_gated,
    losses,
    statistics,
)
from clipless_dp.robustness import certify
from clipless_dp.sampling import StreamedBatches, poisson_collate
from clipless_dp.tensor_types import plain
from tests.support import HeldApart

SIZE = 24


class Scaling(Tensor):
    """Scales what comes out of some functions, as tensors with units or of few bits do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if getattr(func, "__name__", "") in ("tanh", "linear", "cross_entropy", "sum"):
            with torch._C.DisableTorchFunctionSubclass():
                found = (found * 100).as_subclass(cls)
        return found


class ScalingWeight(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            return found * 100 if func is functional.linear else found


class Wrapping(HeldApart):
    """Holds its values apart, behind each operation."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*(one.held if isinstance(one, Wrapping) else one for one in args), **(kwargs or {}))
        return Wrapping(found) if isinstance(found, Tensor) else found


class Flattening(Tensor):
    """Has no ``__torch_function__`` of its own, and a method of tensors."""

    def flatten(self, *args: Any) -> Tensor:  # type: ignore[override]
        return Tensor.flatten(self, *args) * 100


class Reflected(Tensor):
    def __rmul__(self, other: Any) -> Tensor:  # type: ignore[override]
        return Tensor.__mul__(self, other) * 100


class Mixin:
    def numpy(self) -> object:
        return np.zeros(3)


class Mixed(Mixin, Tensor):  # type: ignore[misc]
    pass


class OfTorch(Scaling):
    """Says that it is torch's."""


OfTorch.__module__ = "torch.nn.functional"


class Quiet(Tensor):
    """Says more about its values, and computes nothing."""

    origin = "a scanner"

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "quiet"

    def shown(self) -> str:
        return self.origin


class Disabled(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class Tagged(nn.Parameter):
    """As libraries mark parameters, to shard them or to give them another learning rate."""

    rate = 0.5

    def __deepcopy__(self, memo: dict[int, Any]) -> Tagged:
        made = Tagged(self.detach().clone(), self.requires_grad)
        memo[id(self)] = made
        return made


class Image(Tensor):
    """As torchvision writes its own: functions return plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        kept = func in (Tensor.clone, Tensor.detach)
        return found.as_subclass(cls) if kept else found.as_subclass(Tensor) if isinstance(found, cls) else found

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return super().shape


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> type[Tensor]:
    """The type, where torchvision has it."""
    module = ModuleType("torchvision.tv_tensors")
    module.Image = Image  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Image, "__module__", module.__name__)
    return Image


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "__torch_function__": lambda values: values.as_subclass(Scaling),
    "__torch_dispatch__": Wrapping,
    "a method of tensors": lambda values: values.as_subclass(Flattening),
    "a reflected operator": lambda values: values.as_subclass(Reflected),
    "a method of a mixin": lambda values: values.as_subclass(Mixed),
    "a type that says it is torch's": lambda values: values.as_subclass(OfTorch),
    "torch's masked tensor": lambda values: masked_tensor(values, torch.ones_like(values, dtype=torch.bool)),
}
CODED = [
    pytest.param(make, id=name, marks=pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning"))
    for name, make in MADE.items()
]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SIZE, 6, generator=generator), torch.randint(3, (SIZE,), generator=generator)


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def model_of(net: nn.Module | None = None) -> DPLipModel:
    return DPLipModel(net or net_of(), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())


def optimizer_of(model: DPLipModel, base: type[torch.optim.Optimizer] = torch.optim.Adam) -> CliplessDPOptimizer:
    return CliplessDPOptimizer(
        model, base(model.net.parameters(), lr=0.1), noise_multiplier=1.0, sample_rate=0.5, dataset_size=SIZE
    )


class Pairs(Dataset[Any]):
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


# Of what passes read.


@pytest.mark.parametrize("make", CODED)
@pytest.mark.parametrize("wrap", [lambda net: net, gated, gradient_gated])
def test_inputs_with_code_of_their_own_are_refused_in_words(make: Callable[[Tensor], Tensor], wrap: Any) -> None:
    model = model_of(wrap(net_of()))
    with pytest.raises(InputError, match=r"the input is a \w+, a tensor of a type with code of its own"):
        model(make(data()[0]))
    with pytest.raises(InputError, match="code of its own"), torch.no_grad():
        model.eval()(make(data()[0]))


@pytest.mark.parametrize("make", CODED[:2])
@pytest.mark.parametrize("place", ["output", "target", "mask"])
def test_a_loss_of_tensors_with_code_of_their_own_is_refused(make: Callable[[Tensor], Tensor], place: str) -> None:
    model, (inputs, targets) = model_of(), data()
    given = {"output": model(inputs), "target": targets, "mask": torch.ones(SIZE, dtype=torch.bool)}
    given[place] = make(given[place])
    with pytest.raises(InputError, match=f"the {place} is a"):
        model.loss(**given)


def test_several_inputs_with_code_of_their_own_are_refused_by_name() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net_of()

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return cast(Tensor, self.net(first + second))

    inputs, _ = data()
    model = DPLipModel(
        gradient_gated(Sum(), isolation="vmap"),
        input_shape={"first": (6,), "second": (6,)},
        loss=losses.TauCrossEntropy(),
    )
    with pytest.raises(InputError, match="'second' is a Scaling"):
        model({"first": inputs, "second": inputs.as_subclass(Scaling)})
    expected = model({"first": inputs, "second": inputs})
    assert torch.equal(model({"first": inputs.as_subclass(Quiet), "second": inputs}), expected)


def accumulated(inputs: Tensor, targets: Tensor) -> None:
    optimizer_of(model_of()).accumulate((inputs, targets))


def accumulated_public(inputs: Tensor, targets: Tensor) -> None:
    optimizer_of(model_of()).accumulate_public((inputs, targets))


def augmented(inputs: Tensor, targets: Tensor) -> None:
    plain_inputs, plain_targets = data()
    kind = type(inputs)
    optimizer_of(model_of()).accumulate((plain_inputs, plain_targets), augment=lambda row: row.as_subclass(kind))


def loaded(inputs: Tensor, targets: Tensor) -> None:
    pairs = Pairs(inputs, targets)
    sampler = PoissonBatchSampler(SIZE, sample_rate=0.5, steps=2)
    for _ in DataLoader(pairs, batch_sampler=sampler, collate_fn=poisson_collate(pairs)):
        pass


def collated(inputs: Tensor, targets: Tensor) -> None:
    kind, pairs = type(inputs), Pairs(*data())

    def collate(samples: Any) -> tuple[Tensor, Tensor]:
        rows, labels = zip(*samples, strict=True)
        return torch.stack(rows).as_subclass(kind), torch.stack(labels)

    sampler = PoissonBatchSampler(SIZE, sample_rate=0.5, steps=2)
    for _ in DataLoader(pairs, batch_sampler=sampler, collate_fn=poisson_collate(pairs, collate)):
        pass


WAYS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "accumulate": accumulated,
    "accumulate_public": accumulated_public,
    "augment": augmented,
    "PoissonBatches": lambda *pair: PoissonBatches(pair, sample_rate=0.5, steps=2),
    "PoissonBatches of pairs": lambda *pair: PoissonBatches(Pairs(*pair), sample_rate=0.5, steps=2),
    "StreamedBatches": lambda *pair: [*StreamedBatches(pair, sample_rate=0.5, steps=2)],
    "StreamedBatches of pairs": lambda *pair: [*StreamedBatches(Pairs(*pair), sample_rate=0.5, steps=2)],
    "DataLoader": loaded,
    "a collate function": collated,
    "fit": lambda *pair: fit(model_of(), pair, epsilon=5.0, delta=1e-3, epochs=1, progress=False),
    "certify": lambda *pair: certify(model_of(), pair),
    "certify without labels": lambda *pair: certify(model_of(), pair[0]),
    "statistics": lambda *pair: statistics.private_moments(
        pair[0], norm=1.0, noise_multiplier=1.0, accountant=RDPAccountant()
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_data_with_code_of_its_own_is_refused_on_all_ways_in(way: str) -> None:
    inputs, targets = data()
    with pytest.raises(InputError, match="code of its own"):
        WAYS[way](inputs.as_subclass(Scaling), targets)


@pytest.mark.parametrize("way", ["accumulate", "PoissonBatches", "StreamedBatches", "fit", "certify"])
def test_targets_with_code_of_their_own_are_refused_on_all_ways_in(way: str) -> None:
    inputs, targets = data()
    with pytest.raises(InputError, match="the target is a Scaling"):
        WAYS[way](inputs, targets.as_subclass(Scaling))


def test_nothing_is_charged_for_what_is_refused_and_the_draw_is_trained_on_without_it() -> None:
    optimizer = optimizer_of(model_of())
    (batch,) = PoissonBatches(data(), sample_rate=0.5, steps=1)
    with pytest.raises(InputError, match="code of its own"):
        optimizer.accumulate((batch.inputs, batch.targets.as_subclass(Scaling), batch.mask))
    assert not optimizer.accountant.ledger
    optimizer.accumulate(batch)
    optimizer.step()
    ((event, _),) = optimizer.accountant.ledger
    assert event.sampling.sample_rate == 0.5


@pytest.mark.parametrize("kind", [Quiet, Disabled, nn.Parameter, "image"])
@pytest.mark.parametrize("way", ["passes", "accumulate", "loader"])
def test_tensors_that_say_more_about_their_values_train_as_plain_ones(kind: Any, way: str, image: type[Tensor]) -> None:
    kind = image if kind == "image" else kind

    def trained(made: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], float]:
        model = model_of()
        optimizer = CliplessDPOptimizer(
            model,
            torch.optim.SGD(model.net.parameters(), lr=0.1),
            noise_multiplier=1.0,
            sample_rate=0.5,
            dataset_size=SIZE,
            noise=ReproducibleNoise(0),
        )
        inputs, targets = data()
        if way == "loader":
            pairs = Pairs(inputs, targets)

            def collate(samples: Any) -> tuple[Tensor, Tensor]:
                rows, labels = zip(*samples, strict=True)
                return made(torch.stack(rows)), torch.stack(labels)

            sampler = PoissonBatchSampler(SIZE, sample_rate=0.5, steps=3, seed=3)
            batches: Any = DataLoader(pairs, batch_sampler=sampler, collate_fn=poisson_collate(pairs, collate))
        else:
            batches = PoissonBatches((made(inputs).detach(), targets), sample_rate=0.5, steps=3, seed=3)
        for batch in batches:
            rows = batch[0] if way == "loader" else made(batch[0])
            if way == "accumulate":
                optimizer.accumulate((rows, *batch[1:]))
            else:
                model.loss(model(rows), *batch[1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in model.net.parameters()], optimizer.get_epsilon(1e-5)

    def made(values: Tensor) -> Tensor:
        if kind is nn.Parameter:
            return nn.Parameter(values, requires_grad=False)
        return values.as_subclass(kind)

    weights, epsilon = trained(made)
    expected, expected_epsilon = trained(lambda values: values)
    assert epsilon == expected_epsilon
    assert all(map(torch.equal, weights, expected))


def test_a_type_of_torchvision_is_one_only_where_torchvision_has_it(image: type[Tensor]) -> None:
    values = data()[0]
    assert type(plain(values.as_subclass(image), "it")) is Tensor
    sys.modules[image.__module__].Image = None  # type: ignore[attr-defined]
    other = type("Image", (Image,), {"__module__": image.__module__, "__torch_function__": Image.__torch_function__})
    with pytest.raises(InputError, match="code of its own"):
        plain(values.as_subclass(other), "it")


# Of what networks hold.


def scaled(weight: Tensor) -> Tensor:
    return nn.Parameter((weight.detach() / 100).as_subclass(Scaling), requires_grad=False)


HELD: dict[str, Callable[[Tensor], Tensor]] = {
    "frozen and scaled, as quantised weights are": scaled,
    "trained, of a subclass of nn.Parameter": lambda weight: ScalingWeight(weight.detach()),
    "frozen, of a subclass of nn.Parameter": lambda weight: ScalingWeight(weight.detach(), requires_grad=False),
    "trained, a tensor in nn.Parameter": lambda weight: nn.Parameter(weight.detach().as_subclass(Scaling)),
    "wrapped": lambda weight: nn.Parameter(Wrapping(weight.detach()), requires_grad=False),
    "of an operator of its own": lambda weight: nn.Parameter(weight.detach().as_subclass(Reflected)),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("place", [1, 3])
@pytest.mark.parametrize("wrap", [lambda net: net, gated, gradient_gated])
def test_weights_with_code_of_their_own_are_refused_at_wrapping_by_name(held: str, place: int, wrap: Any) -> None:
    net = net_of()
    net[place].weight = HELD[held](net[place].weight)
    with pytest.raises((ConfigurationError, UnsupportedModuleError), match=r"weight.* is a \w+, a tensor of a type"):
        model_of(wrap(net))


def test_buffers_with_code_of_their_own_are_refused_at_wrapping_by_name() -> None:
    net = net_of()
    net.register_buffer("shift", torch.zeros(6).as_subclass(Scaling))
    with pytest.raises(ConfigurationError, match="'shift' is a Scaling"):
        model_of(net)


def test_no_certificate_is_of_weights_whose_operations_scale_them() -> None:
    net = net_of().requires_grad_(False)
    net[1].weight = scaled(net[1].weight)
    inputs, targets = data()
    with pytest.raises(ConfigurationError, match=r"'1.weight' is a Scaling"):
        certify(net, (inputs, targets), lipschitz=1.0)
    with pytest.raises(ConfigurationError, match=r"'1.weight' is a Scaling"):
        certify(net_of(), (inputs, targets), lipschitz=1.0, front=net, front_lipschitz=1.0)


def test_a_weight_that_is_given_code_behind_wrapping_is_refused_before_anything_is_charged() -> None:
    model, (inputs, _) = model_of(), data()
    optimizer = optimizer_of(model)
    model.net[1].weight.__class__ = ScalingWeight  # type: ignore[index]
    for look in (lambda: model(inputs), model.lipschitz_constant, model.sensitivity):
        with pytest.raises(ConfigurationError, match=r"'1.weight' is a ScalingWeight"):
            look()
    assert not optimizer.accountant.ledger


class Silent(Tensor):
    """Adds nothing, noise neither."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("add_", "_foreach_add_"):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("when", ["ahead of the pass", "behind the pass"])
def test_gradients_that_would_take_no_noise_are_refused_before_anything_is_charged(when: str) -> None:
    model = model_of()
    optimizer = optimizer_of(model)
    (batch,) = PoissonBatches(data(), sample_rate=0.5, steps=1)
    if when == "ahead of the pass":
        for parameter in model.net.parameters():
            parameter.grad = torch.zeros_like(parameter).as_subclass(Silent)
    model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
    if when == "behind the pass":
        for parameter in model.net.parameters():
            parameter.grad.__class__ = Silent  # type: ignore[assignment]
    with pytest.raises(PrivacyError, match="or one with code of its own"):
        optimizer.step()
    assert not optimizer.accountant.ledger


@pytest.mark.parametrize("wrap", [lambda net: net, gated, gradient_gated])
def test_parameters_that_are_only_marked_train_as_plain_ones(wrap: Any) -> None:
    net = net_of()
    net[1].weight = Tagged(net[1].weight.detach())
    model, expected, (inputs, targets) = model_of(wrap(net)), model_of(wrap(net_of())), data()
    for one in (model, copy.deepcopy(model), expected):
        one.loss(one(inputs), targets).backward()
    found = [parameter.grad for parameter in model.net.parameters()]
    assert all(map(torch.equal, found, [parameter.grad for parameter in expected.net.parameters()]))
    optimizer_of(copy.deepcopy(model)).accumulate((inputs, targets))
    assert model.lipschitz_constant() == expected.lipschitz_constant()


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
def test_tensors_that_stand_for_others_while_a_model_is_exported_go_through(strict: bool) -> None:
    model, (inputs, _) = model_of().eval(), data()
    exported = torch.export.export(model, (inputs,), strict=strict)
    assert torch.equal(exported.module()(inputs), model(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Quiet, Disabled, nn.Parameter])
def test_types_are_asked_for_in_compiled_graphs_as_well(kind: type[Tensor]) -> None:
    torch.compiler.reset()
    model, (inputs, _) = model_of().eval(), data()
    given = nn.Parameter(inputs) if kind is nn.Parameter else inputs.as_subclass(kind)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(given), model(inputs))
    compiled = torch.compile(model, backend="eager")
    compiled(inputs)
    with pytest.raises(InputError, match="code of its own"):
        compiled(inputs.as_subclass(Scaling))


# Of what is no tensor, and of gradients that are turned off.


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("target", None, "the target must be a tensor, got a NoneType"),
        ("target", [0] * SIZE, "the target must be a tensor, got a list"),
        ("target", np.zeros(SIZE, np.int64), "the target must be a tensor, got a ndarray"),
        ("mask", [True] * SIZE, "the mask must be a tensor, got a list"),
        ("output", (torch.zeros(SIZE, 3),), "the output must be a tensor, got a tuple"),
    ],
)
def test_a_loss_of_what_is_no_tensor_is_refused_in_words(place: str, value: Any, words: str) -> None:
    model, (inputs, targets) = model_of(), data()
    given = {"output": model(inputs), "target": targets, "mask": None, place: value}
    with pytest.raises(InputError, match=words):
        model.loss(**given)
    if place != "output":
        batch = (inputs, targets, torch.ones(SIZE, dtype=torch.bool))
        with pytest.raises(InputError, match=words):
            optimizer_of(model).accumulate((*batch[:1], value) if place == "target" else (*batch[:2], value))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_and_targets_are_refused_in_words(layout: torch.layout) -> None:
    model, (inputs, targets) = model_of(), data()
    with pytest.raises(InputError, match="the input "):
        model(torch.nested.nested_tensor([*inputs], layout=layout))
    with pytest.raises(InputError, match="the target "):
        model.loss(model(inputs), torch.nested.nested_tensor([*targets[:, None]], layout=layout))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("public", [False, True])
def test_accumulating_where_gradients_are_turned_off_is_refused_in_words(off: Any, public: bool) -> None:
    optimizer, batch = optimizer_of(model_of()), data()
    with off(), pytest.raises(ConfigurationError, match="gradients, which accumulate"):
        (optimizer.accumulate_public if public else optimizer.accumulate)(batch)
    assert not optimizer.accountant.ledger


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("closed", [False, True])
def test_a_step_in_inference_mode_is_a_step(base: type[torch.optim.Optimizer], closed: bool) -> None:
    def trained(within: Any) -> tuple[list[Tensor], CliplessDPOptimizer]:
        model = model_of()
        optimizer = CliplessDPOptimizer(
            model,
            base(model.net.parameters(), lr=0.1),
            noise_multiplier=1.0,
            sample_rate=0.5,
            dataset_size=SIZE,
            noise=ReproducibleNoise(0),
        )
        for number, batch in enumerate(PoissonBatches(data(), sample_rate=0.5, steps=4, seed=3)):
            hooked: list[int] = []
            handle = optimizer.register_step_post_hook(lambda *_, hooked=hooked: hooked.append(1))

            def closure(batch: Any = batch) -> float:
                return float(optimizer.accumulate(batch))

            if not closed:
                closure()
            with within() if number % 2 == 0 else torch.enable_grad():
                optimizer.step(closure) if closed else optimizer.step()
            handle.remove()
            assert len(hooked) == 1
            optimizer.zero_grad()
        return [parameter.detach() for parameter in model.net.parameters()], optimizer

    weights, optimizer = trained(torch.inference_mode)
    expected, _ = trained(torch.no_grad)
    assert all(map(torch.equal, weights, expected))
    kept = [value for state in optimizer.base_optimizer.state.values() for value in state.values()]
    assert not any(isinstance(value, Tensor) and value.is_inference() for value in [*kept, *weights])
    assert optimizer.weights_are_counted()
    assert sum(count for _, count in optimizer.accountant.ledger) == 4


def test_functions_of_torch_are_not_asked_of_a_type_that_they_were_not_given() -> None:
    values = data()[0]
    assert plain(values, "it") is values
    assert type(plain(functional.relu(values.as_subclass(Quiet)), "it")) is Quiet
