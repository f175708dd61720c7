from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import nn

from clipless_dp import CheckpointError, ConfigurationError, SystemNoise, evaluate, fit, load, presets
from clipless_dp.features import OpponentColours
from clipless_dp.presets import named
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
    assert group["initial_lr"] == preset.arguments(40, epsilon=3.0)["lr"]
    if preset.statistics is None:
        assert trained.evaluate((inputs, targets)) == evaluate(trained.model, (preset.features(inputs), targets))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_holds_arguments_of_fit_only_and_can_not_be_changed(name):
    preset = presets.get(name)
    assert preset.name == name
    arguments = preset.arguments(1000, epsilon=2.0)
    assert set(arguments) <= set(inspect.signature(fit).parameters)
    assert {"epochs", "batch_size"} <= set(arguments)
    assert arguments["lr"] > 0.0
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


@pytest.mark.parametrize("name", ["features-linear", "photographs-scattering", "transfer"])
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
    features = presets.get("photographs-scattering").features(torch.rand(2, 3, *size))
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


RATES = {
    "photographs-linear": {1.0: 10.0, 3.0: 28.0, 8.0: 70.0},
    "photographs-scattering": {1.0: 1.0, 3.0: 4.0, 8.0: 8.0},
}


def test_rates_are_those_given_and_lie_between_them_in_between_and_stay_beyond():
    rates = {8.0: 4.0, 1.0: 1.0, 3.0: 2.0}
    for epsilon, rate in rates.items():
        assert presets.rate_at(rates, epsilon) == rate
        assert presets.rate_at(rates, epsilon * (1 + 1e-9)) == pytest.approx(rate)
    assert presets.rate_at(rates, 1e-3) == pytest.approx(1.0)
    assert presets.rate_at(rates, 1e3) == pytest.approx(4.0)
    # Halfway between the logarithms.
    assert presets.rate_at(rates, 3.0**0.5) == pytest.approx(2.0**0.5)
    climbing = [presets.rate_at(rates, 1.0 + 0.1 * step) for step in range(71)]
    assert climbing == sorted(climbing)
    for epsilon in (0.0, -1.0, float("nan"), float("inf"), "3", None):
        with pytest.raises(ConfigurationError, match="epsilon must be a finite and positive number"):
            presets.rate_at(rates, epsilon)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_a_preset_whose_rate_depends_on_epsilon_trains_at_the_rate_there(name, epsilon):
    dataset = data((1, 8, 8))
    settings = {"epochs": 1, "batch_size": 20, "accountant": "rdp", "progress": False, "delta": 1e-3, "outputs": 3}
    trained = presets.get(name).fit(dataset, epsilon=epsilon, **settings)
    assert trained.result.optimizer.param_groups[0]["initial_lr"] == pytest.approx(RATES[name][epsilon], rel=1e-12)
    trained = presets.get(name).fit(dataset, epsilon=epsilon, lr=0.25, **settings)
    assert trained.result.optimizer.param_groups[0]["initial_lr"] == 0.25


def test_without_an_epsilon_there_is_no_rate_and_a_wrong_one_is_refused_before_anything_is_computed():
    preset = presets.get("photographs-linear")
    with pytest.raises(ConfigurationError, match="depends on ε"):
        preset.arguments(100)
    assert preset.arguments(100, lr=0.5)["lr"] == 0.5
    with pytest.raises(TypeError):
        preset.settings["lr"][3.0] = 9.0
    unmade = dataclasses.replace(preset, front=lambda shape: pytest.fail("features were computed"))
    with pytest.raises(ConfigurationError, match="epsilon"):
        unmade.fit(data((1, 8, 8)), epsilon=-1.0, delta=1e-3, outputs=3)


def test_photographs_are_seen_by_scattering_and_patches_of_unit_norm():
    for size, channels, scattering in (((16, 16), 3, 81 * 3 * 4 * 2), ((28, 28), 1, 81 * 7 * 4)):
        features = presets.get("photographs-linear").features(data((channels, *size), count=3)[0])
        assert features.shape == (3, scattering + 4608)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
        shares = features[:, scattering:].square().sum(1)
        torch.testing.assert_close(shares, torch.full((3,), 0.5))


@pytest.mark.parametrize("shape", [(2, 16, 16), (4, 16, 16), (3, 7, 16), (1, 16, 7)])
def test_images_that_patches_do_not_take_are_sent_to_the_preset_that_takes_them(shape):
    with pytest.raises(ConfigurationError, match="'photographs-scattering'"):
        presets.get("photographs-linear").features(data(shape, count=2)[0])


def test_whoever_changes_the_front_end_of_a_preset_changes_no_others():
    front = presets.get("photographs-linear").front((1, 8, 8))
    kept = front.blocks[0].mean.clone()
    front.blocks[0].mean.zero_()
    assert torch.equal(presets.get("photographs-linear").front((1, 8, 8)).blocks[0].mean, kept)


def test_a_file_of_features_of_another_recipe_is_refused_and_says_what_made_them(tmp_path):
    dataset = data((1, 8, 8))
    settings = {"epsilon": 3.0, "delta": 1e-3, "outputs": 3, "epochs": 1, "batch_size": 20, "progress": False}
    # As files of this name were before it had a recipe.
    former = dataclasses.replace(presets.get("photographs-scattering"), name="photographs-linear")
    made = former.fit(dataset, audit=False, **settings)
    made.save(tmp_path / "former.pt")
    with pytest.raises(CheckpointError, match=r"presets.get\('photographs-scattering'\)"):
        load(tmp_path / "former.pt")
    loaded = load(tmp_path / "former.pt", preset=presets.get("photographs-scattering"))
    torch.testing.assert_close(loaded.scores(dataset[0]), made.scores(dataset[0]))
    later = dataclasses.replace(presets.get("photographs-linear"), recipe="patches 7")
    made = later.fit(dataset, audit=False, **settings)
    made.save(tmp_path / "later.pt")
    with pytest.raises(CheckpointError, match=r"'patches 7'.*train anew"):
        load(tmp_path / "later.pt")


def test_a_model_of_synthetic_features_predicts_the_same_from_its_file_and_nothing_is_made_anew(tmp_path, monkeypatch):
    dataset = data((1, 8, 8))
    settings = {"epsilon": 3.0, "delta": 1e-3, "outputs": 3, "epochs": 1, "batch_size": 20, "progress": False}
    made = presets.get("photographs-linear").fit(dataset, audit=False, **settings)
    made.save(tmp_path / "p.pt")
    monkeypatch.setattr(named, "_made_once", lambda *_: pytest.fail("a front-end was made"))
    loaded = load(tmp_path / "p.pt")
    torch.testing.assert_close(loaded.scores(dataset[0]), made.scores(dataset[0]))


def test_what_takes_long_to_make_is_kept_beside_the_features_and_made_again_where_it_is_damaged(tmp_path, monkeypatch):
    preset, (images, _) = presets.get("photographs-linear"), data((1, 8, 8))
    features = preset.features(images, cache_dir=tmp_path)
    (front,) = tmp_path.glob("front-*.pt")
    with monkeypatch.context() as patch:
        patch.setattr(named, "_made_once", lambda *_: pytest.fail("a front-end was made"))
        assert torch.equal(preset.features(images, cache_dir=tmp_path), features)
    assert len(list(tmp_path.glob("*.npy"))) == 2, "features were computed again"
    front.write_bytes(front.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="is damaged; the front-end is made again"):
        assert torch.equal(preset.features(images, cache_dir=tmp_path), features)
    # Another size, and another recipe, have another one.
    preset.features(torch.rand(2, 1, 8, 12), cache_dir=tmp_path)
    dataclasses.replace(preset, recipe="another").features(images, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("front-*.pt"))) == 3
