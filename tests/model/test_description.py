"""What bounds rest on is in states: no setting of a gate, a layer, a constraint or a loss is left out of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clipless_dp import constraints, layers, losses
from clipless_dp.errors import CheckpointError
from clipless_dp.gates import AdaptiveLimit, GradientGated
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.isolation import Isolated
from clipless_dp.model import DPLipModel
from clipless_dp.model.description import differences, settings_of
from clipless_dp.optim import CliplessDPSGD
from clipless_dp.sampling import PoissonBatches
from clipless_dp.statement import report
from clipless_dp.training import fit

from ..support import samples

OTHER_GATES: dict[str, dict[str, Any]] = {
    "limit": {"limit": 0.01},
    "adaptive": {"limit": AdaptiveLimit()},
    "quantile": {"limit": AdaptiveLimit(quantile=0.7)},
    "bias_limit": {"bias_limit": 0.5},
    "mode": {"mode": "clip"},
    "floor": {"floor": 0.5},
    "joint": {"joint": "layer"},
    "network": {"joint": "network"},
}
"""Each argument of gates, set to another value than by default."""

NO_SETTINGS = {"net", "self", "isolation", "select", "layers", "chunk", "checkpoint"}
"""What is gated, and whose caps are set; how samples are kept apart, which is the type of what comes out; what of its
outputs is the network's, how many samples are at work at once, and what is computed again, which no cap rests on."""


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def model_of(net: nn.Module, **settings: Any) -> DPLipModel:
    bound = None if isinstance(net, Isolated) else 1.0
    return DPLipModel(
        net, **{"input_shape": (6,), "input_norm": bound, "loss": losses.TauCrossEntropy(2.0), **settings}
    )


def gradient_gated_model(isolation: Any, **gates: Any) -> DPLipModel:
    return model_of(gradient_gated(plain_net(), isolation=isolation, **gates))


def differing(one: Any, other: Any) -> list[str]:
    return differences(settings_of(one), settings_of(other))


def around(layer: Any = None, loss: Any = None, constraint: Any = None) -> Any:
    """As much of a model as a description reads."""
    leaf = SimpleNamespace(path=("layer",), module=nn.ReLU() if layer is None else layer, within=[])
    return SimpleNamespace(
        input_norm=1.0,
        packing=None,
        loss_function=loss,
        constraints={"weight": constraint},
        _watch=SimpleNamespace(leaves=[leaf]),
    )


def test_the_table_of_gates_lacks_no_argument() -> None:
    known = {name for some in OTHER_GATES.values() for name in some} | NO_SETTINGS
    for function in (gradient_gated, Isolated.set_gates, Isolated.__init__, GradientGated.set_gate):
        assert {*inspect.signature(function).parameters} <= known


@pytest.mark.parametrize("isolation", ["graph", "vmap"])
@pytest.mark.parametrize("name", OTHER_GATES)
def test_each_argument_of_gradient_gates_is_in_the_description(isolation: str, name: str) -> None:
    # One cap for all of a network needs samples run one by one.
    kept_apart = "auto" if name == "network" else isolation
    base = gradient_gated_model(isolation)
    assert not differing(base, gradient_gated_model(isolation))
    assert differing(base, gradient_gated_model(kept_apart, **OTHER_GATES[name]))


@pytest.mark.parametrize("name", [name for name in OTHER_GATES if name not in ("joint", "network")])
@pytest.mark.parametrize("layers_", [("*",), ("2",), ("0.bias",)], ids=str)
def test_each_argument_of_gates_that_are_set_anew_is_in_the_description(name: str, layers_: tuple[str, ...]) -> None:
    model = gradient_gated_model("vmap")
    known = settings_of(model)
    model.net.set_gates(**{"limit": 1.0, **OTHER_GATES[name]}, layers=layers_)  # type: ignore[operator]
    if name == "bias_limit" and layers_ == ("2",):
        assert any("2.bias" in line for line in differences(known, settings_of(model)))
    assert differences(known, settings_of(model))


@pytest.mark.parametrize("name", [name for name in OTHER_GATES if name != "network"])
def test_each_argument_of_a_gated_layer_that_is_set_anew_is_in_the_description(name: str) -> None:
    model = gradient_gated_model("graph")
    known = settings_of(model)
    layer = model.net.get_submodule("2")
    assert isinstance(layer, GradientGated)
    layer.set_gate(**{"limit": 1.0, **OTHER_GATES[name]})
    assert differences(known, settings_of(model))


@pytest.mark.parametrize(
    "other",
    [
        {"input_norm": 2.0},
        {"cotangent_norm": 0.5},
        {"input_mode": "ball"},
        {"cotangent_mode": "normalize"},
        {"layers": "2"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_each_argument_of_signal_gates_is_in_the_description(other: dict[str, Any]) -> None:
    assert {*inspect.signature(gated).parameters} == {
        "net", "input_norm", "cotangent_norm", "input_mode", "cotangent_mode", "layers"
    }  # fmt: skip
    assert not differing(model_of(gated(plain_net())), model_of(gated(plain_net())))
    assert differing(model_of(gated(plain_net())), model_of(gated(plain_net(), **other)))


OTHERS: dict[str, Any] = {
    "limit": 0.5, "iterations": 7, "tangent": True, "radius": 2.0, "mode": "normalize", "floor": 0.25, "kernel_size": 3,
    "stride": 1, "padding": 1, "ceil_mode": True, "group_size": 4, "dim": 2, "dims": (1, 2), "groups": 4, "reach": 2.0,
    "tau": 3.0, "label_smoothing": 0.25, "class_weights": (1.0, 2.0), "priors": (0.25, 0.75), "alpha": 0.5,
    "margin": 2.0, "cross_entropy": 0.5, "balanced": True, "delta": 2.0, "penalty": 0.25, "temperature": 2.0,
    "offset": 2.0, "bound": 2.0, "ignore_index": 0, "reduction": "sum", "segments": 4, "strength": 0.25,
    "pairing": "halves", "order": 2, "signed": False, "lo": -2.0, "hi": 2.0, "kind": "hinge", "threshold": 2.0,
    "points": 3, "weight": 0.5, "rounds": 2, "scales": "norm", "side": "outputs",
}  # fmt: skip
"""For each argument of a constraint, a loss or a layer another value than below."""

NEEDED: dict[str, Any] = {
    "limit": 1.0, "kernel_size": 2, "groups": 2, "floor": 0.5, "priors": (0.5, 0.5), "offset": 1.0, "bound": 1.0,
    "function": nn.functional.l1_loss, "lo": -1.0, "hi": 1.0, "strength": 0.5, "channels": 4, "radius": 1.0,
    "points": 2,
}  # fmt: skip

KINDS = [
    *(getattr(constraints, name) for name in constraints.__all__ if name != "Constraint"),
    *(getattr(losses, name) for name in losses.__all__ if inspect.isclass(getattr(losses, name)) and name != "Loss"),
    *(layers.BallProjection, layers.SphereScaling, layers.CotangentGate, layers.L2NormPool2d, layers.ScaledAvgPool2d),
    *(layers.GroupSort, layers.FullSort, layers.LayerCentering, layers.LinearSpline, layers.SampleGroupNorm),
    layers.BoxProjection,
    *(layers.Householder, layers.MaxMin),
]
CASES = [
    (kind, name)
    for kind in KINDS
    if isinstance(kind, type)
    for name in inspect.signature(kind.__init__).parameters
    if name not in ("self", "args", "kwargs", "function", "channels", "init")
]
"""Not of what is initial alone: the function that a layer begins as is in its weights."""


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind.__name__}-{name}" for kind, name in CASES])
def test_each_argument_of_a_constraint_a_loss_or_a_layer_is_in_the_description(kind: Any, name: str) -> None:
    taken = inspect.signature(kind.__init__).parameters
    needed = {key: value for key, value in NEEDED.items() if key in taken and taken[key].default is inspect._empty}
    place = next(place for place in (constraints, losses, layers) if hasattr(place, kind.__name__))
    as_what = {constraints: "constraint", losses: "loss", layers: "layer"}[place]
    one, same, other = (around(**{as_what: kind(**{**needed, **more})}) for more in ({}, {}, {name: OTHERS[name]}))
    assert not differing(one, same)
    assert differing(one, other)


class Shape(Enum):
    ROUND = 1
    FLAT = 2


@dataclass
class Inner:
    cap: float = 1.0


VALUES: list[tuple[Any, Any]] = [
    (1.0, 2.0),
    ("a", "b"),
    ([1.0], [2.0]),
    ({"cap": 1.0}, {"cap": 2.0}),
    ({"cap": 1.0}, {"cap": 1.0, "more": 2.0}),
    (Shape.ROUND, Shape.FLAT),
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    (np.float32(1.0), np.float32(2.0)),
    (Inner(), Inner(2.0)),
    ((Inner(),), (Inner(2.0),)),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("name", ["cap", "_cap"])
@pytest.mark.parametrize(
    ("one", "other"), VALUES, ids=[f"{type(one).__name__}-{i}" for i, (one, _) in enumerate(VALUES)]
)
def test_attributes_of_losses_are_described_whatever_they_are_called_and_of_whatever_type(
    name: str, one: Any, other: Any
) -> None:
    made = []
    for value in (one, one, other):
        loss = losses.Huber()
        setattr(loss, name, value)
        made.append(around(loss=loss))
    assert not differing(*made[:2])
    assert differing(made[0], made[2])


def test_a_layer_of_a_users_own_is_described_by_private_numbers_too_and_by_no_values_that_it_saw() -> None:
    class Scaled(nn.Module):
        def __init__(self, cap: float, seen: float = 0.0) -> None:
            super().__init__()
            self._cap = cap
            self.seen = torch.tensor(seen)

    assert differing(around(Scaled(1.0)), around(Scaled(2.0)))
    assert not differing(around(Scaled(1.0)), around(Scaled(1.0, seen=2.0)))


def test_states_of_before_objects_were_looked_into_are_met_by_the_types_that_they_tell() -> None:
    here = settings_of(around(loss=losses.BoundedLoss(nn.functional.l1_loss, 1.0), constraint=constraints.Spectral()))
    before = {
        **here,
        "loss": {"type": "BoundedLoss", "bound": 1.0, "inner": ("Inner", 1.0), "x": "tensor of shape (2,)"},
    }
    loss = losses.BoundedLoss(nn.functional.l1_loss, 1.0)
    loss.inner, loss.x, loss._cap = (Inner(), 1.0), torch.ones(2), 3.0  # type: ignore[attr-defined]
    assert not differences(before, settings_of(around(loss=loss, constraint=constraints.Spectral())))
    loss.x = torch.ones(3)  # type: ignore[attr-defined]
    assert differences(before, settings_of(around(loss=loss, constraint=constraints.Spectral())))


def private(model: DPLipModel) -> CliplessDPSGD:
    return CliplessDPSGD(model, lr=0.1, sample_rate=0.5, dataset_size=24, noise_multiplier=1.0)


def train(optimizer: CliplessDPSGD, steps: int = 2) -> None:
    for batch in PoissonBatches(samples(24), sample_rate=0.5, steps=steps):
        optimizer.zero_grad()
        optimizer.accumulate(batch)
        optimizer.step()


@pytest.mark.parametrize("isolation", ["graph", "vmap"])
def test_a_statement_finds_caps_that_were_others_in_earlier_steps(isolation: str) -> None:
    optimizer = private(gradient_gated_model(isolation))
    train(optimizer)
    assert not report(optimizer).findings
    if isolation == "vmap":
        optimizer.model.net.set_gates(0.01)  # type: ignore[operator]
    else:
        optimizer.model.net.get_submodule("0").set_gate(0.01)  # type: ignore[operator]
    train(optimizer)
    assert any("other settings of the model" in finding for finding in report(optimizer).findings)
    # And a state of other caps, loaded into an optimizer of these.
    beside = private(gradient_gated_model(isolation, limit=0.01))
    before = private(gradient_gated_model(isolation))
    train(before)
    beside.model.load_state_dict(before.model.state_dict())
    beside.load_state_dict(before.state_dict())
    assert any("other settings of the model" in finding for finding in report(beside).findings)


@pytest.mark.parametrize("name", [name for name in OTHER_GATES if name not in ("quantile", "adaptive")])
def test_a_checkpoint_of_other_caps_of_an_isolated_network_is_not_gone_on_from(tmp_path: Any, name: str) -> None:
    run: dict[str, Any] = {"epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 12, "lr": 0.5, "progress": False}
    run["checkpoint"] = tmp_path / "run.pt"
    fit(gradient_gated_model("vmap"), samples(24), **run)
    assert fit(gradient_gated_model("vmap"), samples(24), **run).steps == 2
    with pytest.raises(CheckpointError, match="other settings"):
        fit(gradient_gated_model("vmap", **OTHER_GATES[name]), samples(24), **run)
