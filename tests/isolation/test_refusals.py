"""What an isolated network may not do is refused in words, before anything is charged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import swa_utils

from clipless_dp import CliplessDPSGD, DPLipModel, gradient_gated, losses, passes
from clipless_dp.errors import CliplessError, ConfigurationError, PrivacyError, UnsupportedModuleError
from clipless_dp.isolation import Isolated
from clipless_dp.sampling import PoissonBatches


class Net(nn.Module):
    """Two layers, and a function of them and the input."""

    def __init__(self, run: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.run = run
        self.calls = 0

    def forward(self, values: Tensor) -> Any:
        self.calls += 1
        return self.run(self, values)


class Doubled(torch.autograd.Function):
    """A function of a user's own, of which torch makes the rule for ``vmap``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return 2.0 * values

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return 2.0 * cotangents[0]


class Centred(torch.autograd.Function):
    """A function whose own rule for ``vmap`` takes the batch's mean away."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0]

    @staticmethod
    def vmap(info: Any, in_dims: Any, values: Tensor) -> tuple[Tensor, int]:
        moved = values.movedim(in_dims[0], 0)
        return Centred.apply(moved - moved.mean(0)), 0


def model_of(net: nn.Module, **options: Any) -> DPLipModel:
    return DPLipModel(
        gradient_gated(net, isolation="vmap", **options), input_shape=(4,), loss=losses.TauCrossEntropy(1.0)
    )


def plain(net: Net, values: Tensor) -> Tensor:
    return net.second(functional.gelu(net.first(values)))


def hooked(net: Net, values: Tensor) -> Tensor:
    hidden = net.first(values)
    hidden.register_hook(lambda gradient: gradient * 100)
    return net.second(hidden)


def branching(net: Net, values: Tensor) -> Tensor:
    return plain(net, values) if values.sum() > 0 else net.second(values)


def unseen(value: Tensor) -> Tensor:
    """What no mode of torch sees."""
    with torch._C.DisableTorchFunction():
        return value * 2.0


outside = nn.Parameter(torch.ones(4))


def seeded(net: Net, values: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.randn(1, 2)
        return plain(net, values) + noise


def packed(net: Net, values: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept / kept.abs().max(), lambda kept: kept):
        return plain(net, values)


@torch.library.custom_op("clipless_dp_tests::centred", mutates_args=())
def centred(values: Tensor) -> Tensor:
    return values - values.mean()


REFUSED: dict[str, tuple[Callable[[Net, Tensor], Any], type[CliplessError], str]] = {
    "a branch on values": (branching, UnsupportedModuleError, "torch.where"),
    "values read": (lambda net, values: plain(net, values) * float(values[0, 0]), UnsupportedModuleError, "branches"),
    "a tensor hook": (hooked, PrivacyError, "register_hook"),
    "a leaf of nobody's": (lambda net, values: plain(net, values * outside), PrivacyError, "without a gate"),
    "a rule of one's own": (lambda net, values: plain(net, Centred.apply(values)), PrivacyError, "Centred"),
    "a function of one's own": (lambda net, values: plain(net, Doubled.apply(values)), PrivacyError, "Doubled"),
    "a generator of one's own": (
        lambda net, values: plain(net, values) + torch.randn(1, 2, generator=torch.Generator().manual_seed(0)),
        PrivacyError,
        "generator",
    ),
    "a seed": (seeded, PrivacyError, "manual_seed"),
    "a vmap within": (
        lambda net, values: plain(net, values) + torch.func.vmap(net.first)(torch.ones(3, 4)).mean() * values[:, :2],
        PrivacyError,
        "not of this pass and sample",
    ),
    "packed activations": (packed, PrivacyError, "saved_tensors_hooks"),
    "text": (lambda net, values: plain(net, values) * len(repr(values)), PrivacyError, "as text"),
    "an operator of one's own": (
        lambda net, values: plain(net, torch.ops.clipless_dp_tests.centred(values)),
        PrivacyError,
        "none of torch's own",
    ),
    "code handed over": (
        lambda net, values: functional.triplet_margin_with_distance_loss(
            values, values, values, distance_function=lambda one, other: Centred.apply(one)
        ),
        PrivacyError,
        "handed code",
    ),
    "a weight past its gate": (
        lambda net, values: plain(net, values) + unseen(net.scale),
        PrivacyError,
        "turns off what sees the functions",
    ),
    "no batch axis": (lambda net, values: plain(net, values).sum(), ConfigurationError, "first axis must be the batch"),
    "several outputs": (lambda net, values: (plain(net, values), values), ConfigurationError, "select="),
    "named outputs": (lambda net, values: {"a": plain(net, values), "b": 0}, ConfigurationError, r"\['a', 'b'\]"),
    "a shape that varies": (lambda net, values: net.second(values[values > 0]), UnsupportedModuleError, "vmap"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_cannot_be_kept_apart_are_refused_in_words(name: str) -> None:
    run, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        model_of(Net(run))


ACCEPTED: dict[str, Callable[[Net, Tensor], Any]] = {
    "plain": plain,
    "a weight by itself": lambda net, values: plain(net, values) @ net.second.weight @ net.first.weight[:, :2],
    "a weight's shape": lambda net, values: (
        plain(net, values) / net.first.weight.shape[0] * net.first.weight.dtype.itemsize
    ),
    "a parameter that runs through a layer": lambda net, values: plain(net, values) + net.second(net.first.bias),
    "a weight's size as a penalty": lambda net, values: plain(net, values) + net.first.weight.square().mean(),
    "a scalar": lambda net, values: net.scale * plain(net, values),
    "a detached weight": lambda net, values: plain(net, values) * net.first.weight.detach().norm(),
    "weights in a list": lambda net, values: (
        torch.cat([values @ net.first.weight, values], 1)[:, :2] + 0 * plain(net, values)
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_networks_that_are_kept_apart_train_whatever_they_do_with_weights(name: str) -> None:
    torch.manual_seed(0)
    model = model_of(Net(ACCEPTED[name]))
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.2, dataset_size=40)
    for batch in PoissonBatches((torch.randn(40, 4), torch.randint(2, (40,))), sample_rate=0.2, steps=2):
        optimizer.zero_grad()
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.2, 2)]


class Remembering(nn.Module):
    """Keeps what it computed, in one of many ways, from its fifth call on."""

    def __init__(self, keep: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.keep, self.read = keep, read
        self.memory: list[Any] = []
        self.calls = 0

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.first(values)
        if self.calls > 5:
            if self.memory:
                hidden = hidden + self.read(self.memory[-1])
            self.memory.append(self.keep(hidden))
        return self.second(hidden)


@pytest.mark.parametrize(
    "keep",
    [
        lambda hidden: hidden.detach(),
        lambda hidden: nn.Parameter(hidden.detach()),
        lambda hidden: {"hidden": hidden.detach()},
        lambda hidden: hidden.T,
    ],
    ids=["detached", "a parameter", "in a dictionary", "a view"],
)
def test_what_is_kept_from_a_later_pass_on_is_refused_then_or_in_the_next(keep: Callable[[Tensor], Any]) -> None:
    model = model_of(Remembering(keep, lambda kept: (kept["hidden"] if isinstance(kept, dict) else kept).mean()))

    def run() -> None:
        for _ in range(8):
            model(torch.randn(3, 4))

    with pytest.raises(PrivacyError, match=r"keeps something|not of this pass"):
        run()


@pytest.mark.parametrize("bias", [torch.zeros(1), torch.zeros(())])
def test_a_bias_that_broadcasts_is_capped_as_a_whole(bias: Tensor) -> None:
    class Broad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(200, 4)), nn.Parameter(bias)

        def forward(self, values: Tensor) -> Tensor:
            return functional.linear(values, self.weight, self.bias)

    model = DPLipModel(
        gradient_gated(Broad(), isolation="vmap", mode="clip"),
        input_shape=(4,),
        loss=losses.BoundedLoss(lambda output, target: 100 * output.sum(1), bound=1e6),
    )
    with passes.unwitnessed():
        model.loss(model(torch.randn(1, 4)), torch.zeros(1)).backward()
    gradient = model.net.get_parameter("bias").grad
    assert gradient is not None
    assert float(gradient.norm()) <= model.sensitivity().per_parameter["bias"] * (1 + 1e-6)


def test_parts_may_have_the_names_of_settings() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.select, self.uses, self._caps = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)

        def forward(self, values: Tensor) -> Tensor:
            return self._caps(self.uses(self.select(values)))

    net = Named()
    model = model_of(net)
    assert model(torch.randn(3, 4)).shape == (3, 2)
    assert isinstance(net.select, nn.Linear)


def test_layers_may_overwrite_what_gated_layers_return() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    assert model_of(net)(torch.randn(3, 4)).shape == (3, 2)


def test_a_parameter_that_is_used_more_often_than_when_it_was_wrapped_is_refused() -> None:
    net = Net(lambda net, values: plain(net, net.first(values) if net.calls == 0 else values))
    model = model_of(net)
    model(torch.randn(3, 4))
    net.calls = -1
    with pytest.raises(PrivacyError, match=r"'first\.\w+' goes through 2 gates .* 1 when the network was wrapped"):
        model(torch.randn(3, 4))


def test_what_is_used_less_often_is_no_more_than_its_bound() -> None:
    model = model_of(Net(lambda net, values: net.second(values if net.calls > 6 else net.first(net.first(values)))))
    assert model.sensitivity().per_parameter["first.weight"] == pytest.approx(2.0, rel=1e-3)
    for _ in range(6):
        model(torch.randn(3, 4))
    assert model.sensitivity().per_parameter["first.weight"] == pytest.approx(2.0, rel=1e-3)


def test_batch_norm_is_refused_with_its_conversion_and_frozen_statistics_stay_frozen() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedModuleError, match="convert_batchnorm"):
        gradient_gated(net)
    net[1].eval()
    model = DPLipModel(gradient_gated(net), input_shape=(4,), loss=losses.TauCrossEntropy(1.0)).train()
    assert not net[1].training
    before = net[1].running_mean.clone()
    model(torch.randn(8, 4))
    assert torch.equal(net[1].running_mean, before)
    net[1].train()
    with pytest.raises(UnsupportedModuleError, match="statistics are of a batch"):
        model(torch.randn(8, 4))


def test_forward_hooks_see_one_sample_and_backward_hooks_are_refused() -> None:
    net = Net(plain)
    seen: list[tuple[int, ...]] = []
    net.first.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    model = model_of(net)
    model(torch.randn(3, 4))
    assert set(seen) == {(1, 4)}
    net.first.register_full_backward_hook(lambda module, given, returned: None)
    with pytest.raises(UnsupportedModuleError, match=r"first \(Linear\): a hook on its backward pass"):
        model(torch.randn(3, 4))


def test_a_second_derivative_is_refused() -> None:
    model = model_of(Net(plain))
    values = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(PrivacyError, match="second derivative"):
        torch.autograd.grad(model(values).sum(), values, create_graph=True)


def test_an_auxiliary_loss_of_what_a_layer_keeps_is_refused() -> None:
    kept: dict[str, Tensor] = {}
    net = Net(plain)
    net.first.register_forward_hook(lambda module, args, output: kept.__setitem__("hidden", output))
    with pytest.raises(PrivacyError, match="keeps something"):
        model_of(net)


@pytest.mark.parametrize("layers", [("second",), ("first.weight", "second")])
def test_a_trainable_parameter_without_a_gate_is_named(layers: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="match none of"):
        gradient_gated(Net(plain), isolation="vmap", layers=layers)
    net = Net(plain).requires_grad_(False)
    net.second.requires_grad_(True)
    net.first.weight.requires_grad_("first.weight" in layers)
    assert isinstance(gradient_gated(net, isolation="vmap", layers=layers), Isolated)


def test_caps_are_set_by_pattern_and_told_of_by_the_report() -> None:
    net = gradient_gated(Net(plain), isolation="vmap", limit=2.0, bias_limit=0.5)
    assert gradient_gated(net, layers=["second*"], limit=0.25) is net
    model = DPLipModel(net, input_shape=(4,), loss=losses.TauCrossEntropy(1.0))
    caps = {"first.weight": 2.0, "first.bias": 0.5, "second.weight": 0.25, "second.bias": 0.25, "scale": 0.0}
    assert model.sensitivity().per_parameter == pytest.approx(caps, rel=1e-4)
    lines = {line.path: line.kind for line in model.sensitivity().layers}
    assert lines["first.weight"] == "linear gate, vmap"
    assert lines["scale"] == "unused gate, vmap"
    net.set_gates(1.0, layers=["first.weight"])
    assert model.sensitivity().per_parameter["first.weight"] == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ConfigurationError, match="no parameter matches 'third'"):
        net.set_gates(1.0, layers=["third"])


def test_known_networks_keep_their_graph_and_others_are_isolated() -> None:
    known = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert not isinstance(gradient_gated(known), Isolated)
    assert isinstance(gradient_gated(known, isolation="vmap"), Isolated)
    assert isinstance(gradient_gated(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))), Isolated)
    with pytest.raises(UnsupportedModuleError):
        DPLipModel(
            gradient_gated(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), isolation="graph"),
            input_shape=(4,),
            input_norm=1.0,
            loss=losses.TauCrossEntropy(1.0),
        )


def test_an_isolated_network_is_a_layer_among_others() -> None:
    inner = gradient_gated(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()), isolation="vmap")
    net = gradient_gated(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), inner, nn.Linear(4, 2)), layers=["0", "3"])
    model = DPLipModel(net, input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy(1.0))
    assert sorted(model.sensitivity().per_parameter.values()) == pytest.approx([1.0] * 8, rel=1e-3)


def test_names_and_state_dicts_are_those_of_the_network() -> None:
    net = Net(plain)
    names = [name for name, _ in net.named_parameters()]
    model = model_of(net)
    assert [name for name, _ in model.net.named_parameters()] == names
    assert list(model.net.state_dict()) == list(net.state_dict())
    fresh = Net(plain)
    fresh.load_state_dict(model.net.state_dict())
    assert torch.equal(fresh.first.weight, net.first.weight)


@pytest.mark.parametrize("kind", ["the model", "its network", "an average"])
def test_update_bn_which_empties_statistics_that_stay_frozen_is_refused_with_what_to_do(kind: str) -> None:
    norm = nn.BatchNorm1d(4)
    norm(torch.randn(32, 4))
    net = nn.Sequential(nn.Linear(4, 4), norm.eval().requires_grad_(False), nn.Linear(4, 2))
    model = DPLipModel(gradient_gated(net), input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy(1.0))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = swa_utils.AveragedModel(model)
    given = {"the model": model, "its network": model.net, "an average": averaged}[kind]
    with pytest.raises(UnsupportedModuleError, match="update_bn"):
        swa_utils.update_bn([torch.randn(8, 4)], given)
    (averaged.module if kind == "an average" else model).load_state_dict(saved)
    given(torch.randn(8, 4))
    # Nothing else is asked about, a new norm neither.
    norm.reset_running_stats()
    norm.momentum = 0.1
    model(torch.randn(8, 4))
