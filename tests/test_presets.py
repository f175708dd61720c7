from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import nn

from clipless_dp import ConfigurationError, SystemNoise, evaluate, fit, presets
from clipless_dp.features import OpponentColours
from clipless_dp.statistics import private_moments

SHAPES = {"transfer": (12,), "regression": (12,)}
"""Samples that a preset takes, where they are no small grey images."""


def data(shape, count=40, outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *shape, generator=generator), torch.arange(count) % outputs


def targets_of(name, classes):
    return torch.eye(3)[classes] if name == "regression" else classes


def shape_of(name):
    return SHAPES.get(name, (1, 16, 16))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_trains_to_the_target_with_its_own_settings(name):
    preset, (inputs, classes) = presets.get(name), data(shape_of(name))
    targets = targets_of(name, classes)
    settings = {"epochs": 1, "batch_size": 20, "accountant": "rdp", "progress": False}
    trained = preset.fit((inputs, targets), epsilon=3.0, delta=1e-3, outputs=3, **settings)
    assert 2.9 < trained.result.epsilon <= 3.0
    assert trained.result.steps == 2
    (group,) = trained.result.optimizer.param_groups
    assert group["initial_lr"] == preset.settings["lr"]
    if preset.statistics is None:
        assert trained.evaluate((inputs, targets)) == evaluate(trained.model, (preset.features(inputs), targets))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_holds_arguments_of_fit_only_and_can_not_be_changed(name):
    preset = presets.get(name)
    assert preset.name == name
    assert set(preset.arguments(1000)) <= set(inspect.signature(fit).parameters)
    assert {"epochs", "batch_size"} <= set(preset.arguments(1000))
    with pytest.raises(TypeError):
        preset.settings["epochs"] = 1


def test_a_sample_rate_stands_for_a_batch_size_and_yields_to_one():
    preset = presets.get("transfer")
    rate = preset.settings["sample_rate"]
    assert preset.arguments(1000)["batch_size"] == round(1000 * rate)
    assert preset.arguments(3)["batch_size"] == 1
    assert preset.arguments(1000, batch_size=7)["batch_size"] == 7


def test_features_are_computed_once(tmp_path):
    preset, (images, labels) = dataclasses.replace(presets.get("features-linear"), statistics=None), data((1, 8, 8))
    trained = preset.fit(
        (images, labels), epsilon=3.0, delta=1e-3, outputs=3, validation=(images, labels), cache_dir=tmp_path,
        epochs=1, batch_size=20, accountant="rdp", progress=False,
    )  # fmt: skip
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert trained.result.history[-1].accuracy == trained.evaluate((images, labels))[0]
    torch.testing.assert_close(preset.features(images), trained.prepare(images), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["features-linear", "photographs-linear", "transfer"])
def test_features_lose_their_mean_which_is_charged_and_new_samples_lose_that_of_the_training_data(name):
    preset, (images, labels) = presets.get(name), data((1, 8, 8), count=2000)
    settings = {"epochs": 0.1, "batch_size": 200, "reproducible_seed": 0, "accountant": "rdp", "progress": False}
    trained = preset.fit((images, labels), epsilon=3.0, delta=1e-5, outputs=3, **settings)
    (first, count), *steps = trained.result.optimizer.accountant.ledger
    assert (first.noise_multiplier, count) == (20.0, 1)
    assert steps
    new = data((1, 8, 8), seed=1)[0]
    features, of_new = (torch.nn.functional.normalize(preset.features(samples).flatten(1)) for samples in (images, new))
    for given, left in ((images, features - features.mean(0)), (new, of_new - features.mean(0))):
        expected = left / left.norm(dim=1, keepdim=True)
        # Noise of 20·√2 in each of 324 sums over 2000 records: a quarter of the norm of unit vectors.
        assert float((trained.prepare(given) * expected).sum(1).mean()) > 0.5
    assert float(trained.prepare(images).norm(dim=1).sub(1).abs().max()) < 1e-5


def test_the_noise_that_training_is_told_to_take_is_that_of_its_statistics_too():
    class Counting(SystemNoise):
        drawn = 0

        def standard_normal_(self, out):
            # Six numbers are what a source is tried by.
            type(self).drawn += out.numel() if out.numel() > 6 else 0
            return super().standard_normal_(out)

    preset, dataset = presets.get("features-linear"), data((1, 8, 8), count=200)
    settings = {"epochs": 0.5, "batch_size": 100, "accountant": "rdp", "progress": False, "noise": Counting()}
    trained = preset.fit(dataset, epsilon=3.0, delta=1e-4, outputs=3, **settings)
    weights = sum(p.numel() for p in trained.model.parameters())
    # Sums of features and of their squares, then one step.
    assert Counting.drawn == 2 * preset.features(dataset[0]).shape[1] + trained.result.steps * weights


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (5,)) for name in ("mnist-gradient", "mnist-gated", "mnist-orthogonal")),
        *((name, (5,)) for name in ("features-linear", "photographs-linear", "photographs-gradient")),
        *((name, (1, 2, 2)) for name in ("mnist-gradient", "mnist-gated", "photographs-gradient")),
    ],
)
def test_a_shape_that_a_preset_does_not_take_is_refused_by_name(name, shape):
    with pytest.raises(ConfigurationError, match=name):
        presets.get(name).fit(data(shape), epsilon=3.0, delta=1e-3, outputs=3)


@pytest.mark.parametrize(("size", "coefficients", "places"), [((32, 32), 217, 4 * 2), ((28, 28), 81, 7 * 4)])
def test_photographs_are_seen_at_three_scales_where_their_size_allows(size, coefficients, places):
    features = presets.get("photographs-linear").features(torch.rand(2, 3, *size))
    assert features.shape == (2, 3 * coefficients * places)


def test_photographs_end_to_end_are_lightness_and_colour_differences_that_the_input_gate_lets_through():
    preset = presets.get("photographs-gradient")
    # Primary colours: the largest differences that pixels in [0, 1] have.
    images = torch.eye(3)[:, :, None, None].expand(3, 3, 32, 32)
    images = torch.cat([images, 1 - images])
    behind = preset.features(images)
    torch.testing.assert_close(behind, OpponentColours()(images))
    model = preset.model((3, 32, 32), 10)
    assert float(behind.flatten(1).norm(dim=1).max()) <= model.input_norm


def test_an_unknown_preset_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigurationError, match=r"unknown preset 'tables'.*fit_table"):
        presets.get("tables")
    with pytest.raises(ConfigurationError, match=r"unknown preset 'mnist'.*mnist-gated"):
        presets.get("mnist")


def test_only_the_direction_of_transferred_features_counts():
    preset, (features, classes) = presets.get("transfer"), data((3, 4), count=1000)
    settings = {"epsilon": 3.0, "delta": 1e-4, "outputs": 3, "epochs": 0.1, "accountant": "rdp", "progress": False}
    prepared = [
        preset.fit((size * features, classes), reproducible_seed=0, **settings).prepare(size * features)
        for size in (1.0, 1024.0)
    ]
    assert prepared[0].norm(dim=1).sub(1.0).abs().max() < 1e-5
    torch.testing.assert_close(prepared[0], prepared[1], rtol=0.0, atol=1e-6)


def test_an_own_front_end_takes_the_place_of_a_presets():
    preset = dataclasses.replace(presets.get("transfer"), front=lambda shape: nn.Sequential(nn.Flatten(), nn.Tanh()))
    inputs, targets = data((1, 4, 4))
    trained = preset.fit(
        (inputs, targets), epsilon=3.0, delta=1e-3, outputs=3, epochs=1, accountant="rdp", progress=False
    )
    assert trained.model.input_shape == (16,)


def centred(features, releases):
    moments = private_moments(features, norm=4.0, noise_multiplier=9.0, **releases.arguments("moments"))
    return lambda samples: samples - moments.mean.to(samples)


def test_statistics_of_a_preset_are_charged_once_with_training_on_top(tmp_path):
    preset = dataclasses.replace(presets.get("transfer"), statistics=centred)
    inputs, targets = data((12,), count=1000)
    settings = {
        "epsilon": 3.0, "delta": 1e-3, "outputs": 3, "epochs": 1, "accountant": "rdp", "progress": False,
        "reproducible_seed": 1, "checkpoint": tmp_path / "run.pt",
    }  # fmt: skip
    trained = preset.fit((inputs, targets), **settings)
    (release, times), *steps = trained.result.optimizer.accountant.ledger
    assert (release.kind, release.noise_multiplier, times) == ("gaussian_release", 9.0, 1)
    assert sum(count for _, count in steps) == trained.result.steps
    assert 2.9 < trained.result.epsilon <= 3.0
    assert trained.prepare(inputs).mean(0).norm() < inputs.mean(0).norm() / 2
    again = preset.fit((inputs, targets), **settings)
    assert again.result.optimizer.accountant.ledger == trained.result.optimizer.accountant.ledger
    assert torch.equal(again.prepare(inputs), trained.prepare(inputs))
