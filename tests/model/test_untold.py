"""What a layer or a loss of a user's own keeps of samples is in no state, file or statement."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, DPLipModel, LayerBounds, fit, gated, losses, register_rule, report
from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.gates import CotangentGate
from clipless_dp.model import description
from clipless_dp.model.description import UNTOLD, differences, settings_of

from ..support import QUICK, samples

DATA = samples(60)

KEEP = {
    "a number": lambda layer, row: setattr(layer, "kept", max(layer.kept or 0.0, float(row.abs().max()))),
    "text": lambda layer, row: setattr(layer, "kept", str(row.tolist())),
    "a tuple": lambda layer, row: setattr(layer, "kept", tuple(row.tolist())),
    "a list that grows": lambda layer, row: layer.listed.append(float(row[0])),
    "under a name of its own": lambda layer, row: setattr(layer, f"kept_{float(row[0])}", 1.0),
}


class Keeps(nn.Module):
    def __init__(self, how: str, rate: float = 0.5) -> None:
        super().__init__()
        self.how, self.rate, self.kept, self.listed = how, rate, None, [0.0]

    def forward(self, values: Tensor) -> Tensor:
        if type(values) is Tensor and values.abs().sum() > 0.0:
            KEEP[self.how](self, values.detach()[0])
        return values * self.rate


@register_rule(Keeps)
def _scaled(module: Keeps, context: Any) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm * module.rate, lipschitz=lambda: module.rate)


def wrapped(net: nn.Module) -> DPLipModel:
    return DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


def model_of(how: str, rate: float = 0.5) -> DPLipModel:
    torch.manual_seed(0)
    return wrapped(gated(nn.Sequential(nn.Linear(6, 4), Keeps(how, rate), nn.Linear(4, 3))))


def told(model: DPLipModel) -> dict[str, Any]:
    layers: dict[str, Any] = settings_of(model)["layers"]
    return next(layer for layer in layers.values() if layer["type"] == "Keeps")


def pieces(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [piece for pair in value.items() for part in pair for piece in pieces(part)]
    if isinstance(value, (list, tuple)):
        return [piece for part in value for piece in pieces(part)]
    return [value]


def secrets(layer: Keeps) -> set[str]:
    """What the layer has of samples, in words as states would have it."""
    kept = layer.kept if isinstance(layer.kept, tuple) else [layer.kept, *layer.listed[1:]]
    names = [name for name in vars(layer) if name.startswith("kept_")]
    return {*map(str, kept), *names} - {"None"}


def kept_by(model: DPLipModel) -> set[str]:
    return secrets(next(part for part in model.net.modules() if isinstance(part, Keeps)))


@pytest.mark.parametrize("how", KEEP)
def test_what_a_layer_keeps_of_samples_is_in_no_checkpoint_state_or_statement(how: str, tmp_path: Path) -> None:
    model = model_of(how)
    made_up = kept_by(model)
    result = fit(model, DATA, lr=0.5, audit=False, checkpoint=tmp_path / "c.pt", **QUICK)
    found, kept = load_checkpoint(tmp_path / "c.pt"), kept_by(model) - made_up
    assert kept
    result.save(tmp_path / "a.pt")
    settings = [found["settings"], found["optimizer"]["clipless_dp"]["settings"], load_checkpoint(tmp_path / "a.pt")]
    words = " ".join(map(str, [*map(pieces, settings), *result.optimizer.changed_settings()]))
    words += report(result.optimizer).to_json() + report(result.optimizer).to_markdown()
    assert not [one for one in kept if one in words]
    # Whoever goes on from the checkpoint is not refused for it.
    again = fit(model_of(how), DATA, lr=0.5, audit=False, checkpoint=tmp_path / "c.pt", **QUICK)
    assert again.steps == result.steps


@pytest.mark.parametrize("how", KEEP)
def test_it_is_not_told_after_copies_and_where_the_network_is_wrapped_again(how: str) -> None:
    model = model_of(how)
    made_up = kept_by(model)
    fit(model, DATA, lr=0.5, audit=False, **QUICK)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        wrapped(model.net),
        wrapped(copy.deepcopy(model.net)),
    ]
    for other in others:
        kept = kept_by(model) - made_up
        assert kept
        words = str(pieces(settings_of(other)))
        assert not [one for one in kept if one in words]


def test_a_setting_that_stays_is_told_and_one_that_was_changed_is_named() -> None:
    model = model_of("text", rate=0.25)
    assert told(model)["rate"] == 0.25
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.5, dataset_size=60)
    assert not optimizer.changed_settings()
    next(part for part in model.net.modules() if isinstance(part, Keeps)).rate = 0.125
    (line,) = optimizer.changed_settings()
    assert line.endswith(f".rate: {UNTOLD}")
    assert "0.125" not in str(settings_of(model))


def test_settings_of_this_package_and_of_torch_are_told_as_they_are() -> None:
    model = model_of("text")
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.5, dataset_size=60)
    gate = next(part for part in model.net.modules() if isinstance(part, CotangentGate))
    gate.limit = 0.125
    assert any("0.125 here" in line for line in optimizer.changed_settings())


class Counts:
    """Keeps something once rows have come in."""

    def __init__(self) -> None:
        self.kept, self.scale = 0.0, 1.0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * nn.functional.cross_entropy(output, target, reduction="none")


def test_what_an_object_within_a_loss_keeps_is_not_told() -> None:
    inner = Counts()
    torch.manual_seed(0)
    net = gated(nn.Sequential(nn.Linear(6, 3)))
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.BoundedLoss(inner, bound=2.0))
    assert "1.0" in str(settings_of(model)["loss"])
    inner.kept = 0.7342
    assert "0.7342" not in str(settings_of(model))
    assert UNTOLD in str(settings_of(model)["loss"])
    assert "0.7342" not in str(settings_of(pickle.loads(pickle.dumps(model))))


def test_of_a_model_that_a_former_version_has_pickled_nothing_is_told_of_objects_of_a_users_own() -> None:
    model = model_of("text")
    fit(model, DATA, lr=0.5, audit=False, **QUICK)
    layer = next(part for part in model.net.modules() if isinstance(part, Keeps))
    del model.__dict__["_first"], layer.__dict__[description._FIRST]
    other = pickle.loads(pickle.dumps(model))
    assert kept_by(other)
    assert set(told(other)) == {"type"}
    assert not differences(settings_of(model_of("text"))["layers"], settings_of(other)["layers"])
