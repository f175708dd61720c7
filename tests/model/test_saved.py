"""What states hold beside parameters and buffers is told of, where it was not there when the network was wrapped."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, DPLipModel, LayerBounds, PrivacyError, PrivacyWarning, losses, register_rule
from clipless_dp.modules import beside_of, saved_of, state_of
from clipless_dp.rules import RuleContext

ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 3


class Telling(nn.Module):
    """Has an extra state, of which a pass changes nothing that shows in it."""

    def __init__(self) -> None:
        super().__init__()
        self.extra: Any = {"format": 3, "grid": torch.ones(2)}
        self.__dict__["seen"] = None
        self.tells = ""

    def forward(self, values: Tensor) -> Tensor:
        self.__dict__["seen"] = values[0].detach().clone()
        if self.tells == "a version":
            self._version = self.seen.tolist()
        made = values * 1.0
        if self.tells == "a hook on the way back":
            made.register_hook(lambda cotangent: setattr(self.beside[0], "extra", cotangent[0].clone()))
        return made

    def get_extra_state(self) -> Any:
        told = not self.training if self.tells == "evaluation" else self.tells == "a flag"
        return self.seen if told else self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@register_rule(Telling)
def _telling_rule(module: Telling, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm, lipschitz=1.0)


def wrapped(net: nn.Module) -> DPLipModel:
    return DPLipModel(net, input_shape=(6,), input_norm=4.0, loss=losses.TauCrossEntropy(2.0))


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), Telling(), nn.Linear(6, 3), Telling())


def moved(model: DPLipModel) -> None:
    """Passes, and weights that are others than they were."""
    model.loss(model(ROWS), TARGETS).backward()
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.mul_(0.5)


def by_evaluation(model: DPLipModel) -> None:
    model.net[1].tells = "evaluation"
    moved(model)
    model.eval()


def by_a_flag(model: DPLipModel) -> None:
    moved(model)
    model.net[1].tells = "a flag"


def by_another_layer(model: DPLipModel) -> None:
    model.net[3].__dict__["beside"] = [model.net[1]]
    model.net[3].tells = "a hook on the way back"
    moved(model)


def by_a_loop(model: DPLipModel) -> None:
    output = model(ROWS)
    output.register_hook(lambda cotangent: setattr(model.net[1], "extra", cotangent[0].clone()))
    model.loss(output, TARGETS).backward()


def by_a_version(model: DPLipModel) -> None:
    model.net[1].tells = "a version"
    moved(model)


def by_a_hook(model: DPLipModel) -> None:
    moved(model)
    model.register_state_dict_post_hook(lambda _, state, prefix, metadata: state.__setitem__("mean", model.net[1].seen))


def by_a_key(model: DPLipModel) -> None:
    moved(model)
    model.register_state_dict_post_hook(
        lambda _, state, prefix, metadata: state.__setitem__(f"mean {model.net[1].seen}", torch.zeros(1))
    )


def in_place_of_a_bias(model: DPLipModel) -> None:
    moved(model)
    model.net[0].register_state_dict_post_hook(
        lambda _, state, prefix, metadata: state.__setitem__(f"{prefix}bias", model.net[1].seen)
    )


def in_place_of_a_weight_and_sparse(model: DPLipModel) -> None:
    moved(model)
    model.net[0].register_state_dict_post_hook(
        lambda _, state, prefix, metadata: state.__setitem__(f"{prefix}weight", model.net[1].seen.to_sparse())
    )


def by_a_version_that_is_an_array(model: DPLipModel) -> None:
    moved(model)
    model.net[1]._version = model.net[1].seen.numpy()


def around_a_bias(model: DPLipModel) -> None:
    moved(model)
    model.net[0].register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.__setitem__(
            f"{prefix}bias", torch.cat([module.bias.detach(), model.net[1].seen])[:6]
        )
    )


def beside_the_state(model: DPLipModel) -> None:
    moved(model)
    model.register_state_dict_post_hook(lambda _, state, prefix, metadata: setattr(state, "mean", model.net[1].seen))


def by_a_buffer_of_the_wrapper(model: DPLipModel) -> None:
    moved(model)
    model.register_buffer("mean", model.net[1].seen)


@pytest.mark.parametrize(
    ("way", "named"),
    [
        (by_evaluation, "net.1._extra_state"),
        (by_a_flag, "net.1._extra_state"),
        (by_another_layer, "net.1._extra_state"),
        (by_a_loop, "net.1._extra_state"),
        (by_a_version, "net.1 .metadata."),
        (by_a_hook, "mean"),
        (by_a_key, "mean tensor"),
        (in_place_of_a_bias, "net.0.bias"),
        (in_place_of_a_weight_and_sparse, "net.0.weight"),
        (by_a_version_that_is_an_array, "net.1 .metadata."),
        (around_a_bias, "net.0.bias"),
        (beside_the_state, "mean of the state"),
        (by_a_buffer_of_the_wrapper, "mean"),
    ],
)
def test_what_came_into_a_state_since_the_network_was_wrapped_is_told_by_name(
    way: Callable[[DPLipModel], None], named: str
) -> None:
    model = wrapped(net_of())
    way(model)
    with pytest.warns(PrivacyWarning, match=named):
        model.state_dict()
    with pytest.warns(PrivacyWarning, match=named):
        # What it is within asks with a prefix.
        nn.ModuleDict({"whole": model}).state_dict()
    # Neither a copy nor another wrapper vouches for it; tracing has passed made-up rows there.
    if way not in (by_evaluation, by_a_flag, by_a_version):
        with pytest.warns(PrivacyWarning):
            copy.deepcopy(model).state_dict()
    if way in (by_another_layer, by_a_loop):
        with pytest.warns(PrivacyWarning):
            wrapped(model.net).train(model.training).state_dict()


def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in [*state]:
        state[name.replace("weight", "w")] = state.pop(name)


def each(change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        state.update({name: change(value) for name, value in state.items() if isinstance(value, Tensor)})

    return hook


def joined(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    state[f"{prefix}rows"] = state[f"{prefix}weight"][:2]


@pytest.mark.parametrize("hook", [None, rename, each(Tensor.half), each(Tensor.clone), joined])
def test_public_states_and_what_hooks_make_of_parameters_are_not_told_of(hook: Callable[..., None] | None) -> None:
    net = net_of()
    if hook is joined:
        net[0].register_state_dict_post_hook(hook)
    elif hook is not None:
        net.register_state_dict_post_hook(hook)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        model = wrapped(net)
        for _ in range(2):
            model.state_dict()
            model.state_dict(keep_vars=True)
            moved(model)
        found = model.state_dict()
        nn.ModuleDict({"whole": model}).state_dict()
        copy.deepcopy(model).state_dict()
        model.load_state_dict(found, strict=False)
        model.double().state_dict()
        wrapped(model.net.float()).state_dict()
        if hook is None:
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            torch.load(file, weights_only=False).state_dict()


def test_versions_of_torchs_own_layers_are_known() -> None:
    net = nn.Sequential(nn.Linear(6, 3))
    net[0]._version = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        model = wrapped(net)
        moved(model)
        model.state_dict()


def test_no_file_of_this_package_holds_what_a_hook_puts_in_place_of_a_parameter() -> None:
    net = nn.Sequential(nn.Linear(6, 3))
    assert state_of(net).keys() == {"0.weight", "0.bias"}
    net[0].register_state_dict_post_hook(each(torch.zeros_like))
    with pytest.raises(PrivacyError, match=r"'0\.bias', '0\.weight'"):
        state_of(net)


def test_a_state_that_cannot_be_told_is_never_known() -> None:
    model = wrapped(net := net_of())
    net[1].extra = lambda: None
    assert beside_of(saved_of(net), net.state_dict())["1._extra_state"] is None
    for known in (model, wrapped(net)):
        with pytest.warns(PrivacyWarning, match=r"1\._extra_state"):
            known.state_dict()


@pytest.mark.parametrize("house", [lambda net: nn.Sequential(*net), lambda net: net[:], lambda net: net])
def test_what_layers_have_kept_is_told_of_whatever_network_they_are_put_into(
    house: Callable[[nn.Sequential], nn.Module],
) -> None:
    model = wrapped(net_of())
    settings: dict[str, Any] = {"sampling": "none", "sample_rate": 1.0, "dataset_size": 8, "accountant": "rdp"}
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, **settings)
    model.loss(model(ROWS), TARGETS).backward()
    optimizer.step()
    model.net[1].extra = model.net[1].seen
    with pytest.warns(PrivacyWarning, match="_extra_state"):
        wrapped(house(model.net)).state_dict()
