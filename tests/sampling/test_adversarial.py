"""Adversarial views: of each sample's own loss, within the radius, at no cost, and of no other sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    PrivacyError,
    fit,
    gated,
    gradient_gated,
    losses,
)
from clipless_dp.model.slopes import beside
from clipless_dp.noise.randomness import Randomness
from clipless_dp.sampling import Adversarial, LabelledAugmentation, PoissonBatches
from clipless_dp.sampling import augmentation as augmentation_module
from clipless_dp.sampling.augmentation import views
from tests.support import samples

SETTINGS: dict[str, Any] = {"noise_multiplier": 1.3, "sample_rate": 0.25, "dataset_size": 40, "sampling": "poisson"}
RUN: dict[str, Any] = {
    "epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp",
    "audit": False,
}  # fmt: skip


def wrapped(wrap: Callable[..., nn.Module] = gated, seed: int = 0, **options: Any) -> DPLipModel:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    return DPLipModel(wrap(net, **options), input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(2.0))


MODELS: dict[str, Callable[[], DPLipModel]] = {
    "cotangents": lambda: wrapped(cotangent_mode="normalize"),
    "gradients": lambda: wrapped(gradient_gated, mode="normalize"),
    "clipping": wrapped,
    "plain": lambda: wrapped(lambda net: net),
}


def batch(count: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    inputs, targets = samples(count)
    return inputs.double(), targets, torch.ones(count, dtype=torch.bool)


def gradients(model: DPLipModel) -> Tensor:
    return torch.cat([p.grad.flatten().clone() for p in model.net.parameters() if p.grad is not None])


def seen(model: DPLipModel, augment: Any, rows: tuple[Tensor, Tensor, Tensor], seed: int = 3) -> Tensor:
    with model.randomness.seeded(seed):
        return views(augment, rows[0], rows[2], model.randomness, beside(model, rows[1]))


class FromTheSample(Adversarial):
    """Starts at the sample, so that a view is a function of it without chance."""

    def _start(self, inputs: Tensor) -> Tensor:
        return torch.zeros_like(inputs)


class OfTheBatchNorm(FromTheSample):
    """The mutant: slopes are divided by the norm of all."""

    def _direction(self, slope: Tensor) -> Tensor:
        return slope / slope.norm()


class OfTheBatchMean(FromTheSample):
    """The mutant: one perturbation for all."""

    def _direction(self, slope: Tensor) -> Tensor:
        return super()._direction(slope.mean(0, keepdim=True).expand_as(slope))


class OfTheLargest(FromTheSample):
    """The mutant: only the sample of the largest slope moves."""

    def _direction(self, slope: Tensor) -> Tensor:
        norms = slope.norm(dim=1, keepdim=True)
        return super()._direction(slope) * (norms == norms.max())


class OfOtherLabels(LabelledAugmentation):
    """The mutant: how far a row moves follows from how common its label is in the batch."""

    def __call__(self, inputs: Tensor, targets: Tensor, slopes: Callable[[Tensor], Tensor]) -> Tensor:
        return inputs + 0.1 * (targets.unsqueeze(1) == targets).sum(1, keepdim=True)


class Remembering(FromTheSample):
    """The mutant: a universal perturbation, for the batches to come."""

    def __init__(self, radius: float) -> None:
        super().__init__(radius)
        self.kept = torch.zeros(6, dtype=torch.float64)

    def __call__(self, inputs: Tensor, targets: Tensor, slopes: Callable[[Tensor], Tensor]) -> Tensor:
        moved, self.kept = self.kept, self.kept + slopes(inputs).sum(0)
        return inputs + moved


class KeepingSlopes(Adversarial):
    """The mutant: what was given stays at hand, with the targets in it."""

    slopes: Any = None

    def __call__(self, inputs: Tensor, targets: Tensor, slopes: Callable[[Tensor], Tensor]) -> Tensor:
        self.slopes = slopes
        return super().__call__(inputs, targets, slopes)


class Uncut(FromTheSample):
    """The mutant: a perturbation of any size."""

    def _cut(self, moved: Tensor, inputs: Tensor) -> Tensor:
        return moved


BATCH_STATE = (OfTheBatchNorm, OfTheBatchMean, OfTheLargest)


@pytest.mark.parametrize("norm", [2, "inf"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_views_lie_within_the_radius_and_their_losses_are_larger(build: Any, norm: Any) -> None:
    model, rows = build(), batch()
    found = seen(model, Adversarial(0.4, norm, steps=6), rows)
    moved = found - rows[0]
    sizes = moved.norm(dim=1) if norm == 2 else moved.abs().amax(1)
    assert float(sizes.max()) <= 0.4 * (1.0 + 1e-9)
    with torch.no_grad():
        before, after = (model.loss_function.per_sample(model(values), rows[1]) for values in (rows[0], found))
    risen = (after > before).double().mean()
    assert float(risen) > 0.9
    random = rows[0] + moved.flip(1)
    with torch.no_grad():
        assert float(after.sum()) > float(model.loss_function.per_sample(model(random), rows[1]).sum())


def test_one_step_on_a_linear_network_is_the_best_there_is() -> None:
    """Of one linear score the loss rises most along the weight, by the radius."""
    net = nn.Sequential(nn.Linear(6, 2)).double()
    model = DPLipModel(net, input_shape=(6,), input_norm=50.0, loss=losses.TauCrossEntropy(2.0))
    rows = batch(8)
    rows = rows[0], rows[1] % 2, rows[2]
    away = net[0].weight.detach()[1] - net[0].weight.detach()[0]
    signs = 1.0 - 2.0 * rows[1].double().unsqueeze(1)
    expected = rows[0] + 0.3 * signs * away / away.norm()
    torch.testing.assert_close(seen(model, FromTheSample(0.3, steps=1, floor=1e-9), rows), expected)
    expected = rows[0] + 0.3 * signs * away.sign()
    torch.testing.assert_close(seen(model, FromTheSample(0.3, "inf", steps=1, floor=1e-9), rows), expected)


def test_starts_are_uniform_in_the_ball() -> None:
    drawn = Adversarial(2.0)._start(torch.zeros(4000, 3, dtype=torch.float64))
    shares = (drawn.norm(dim=1) / 2.0) ** 3
    # Kolmogorov's distance of 4000 uniform numbers is below 0.0308 in 99.9 of 100 draws.
    distance = (shares.sort().values - torch.arange(4000) / 4000).abs().max()
    assert float(distance) < 0.035
    assert float(((drawn.norm(dim=1) / 2.0).sort().values - torch.arange(4000) / 4000).abs().max()) > 0.1


@pytest.mark.parametrize("norm", [2, "inf"])
def test_a_box_holds_views_and_the_radius_is_kept_in_it(norm: Any) -> None:
    model, rows = wrapped(), batch()
    inside = rows[0].clamp(-0.5, 0.5)
    found = seen(model, Adversarial(0.4, norm, box=(-0.5, 0.5)), (inside, *rows[1:]))
    assert float(found.abs().max()) <= 0.5
    sizes = (found - inside).norm(dim=1) if norm == 2 else (found - inside).abs().amax(1)
    assert float(sizes.max()) <= 0.4 * (1.0 + 1e-9)
    assert float(sizes.min()) > 0.0


def test_mutant_caught_a_perturbation_that_is_not_cut() -> None:
    moved = seen(wrapped(), Uncut(0.1, steps=6), batch()) - batch()[0]
    assert float(moved.norm(dim=1).max()) > 0.15


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_gradient_of_each_sample_keeps_its_bound(build: Any) -> None:
    model = build()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    bounds = model.sensitivity().per_parameter
    inputs, targets, _ = batch(12)
    for row in range(12):
        for scale in (1.0, 1e3, 1e-3):
            optimizer.zero_grad()
            one = scale * inputs[row : row + 1], targets[row : row + 1]
            optimizer.accumulate(one, augment=Adversarial(5.0, "inf", steps=2), multiplicity=2)
            for name, parameter in model.net.named_parameters():
                assert parameter.grad is not None
                assert float(parameter.grad.norm()) <= bounds[name] * (1.0 + 1e-9)
            optimizer.skip_draw()


def summed(augment: Any, rows: slice) -> Tensor:
    model = MODELS["gradients"]()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    inputs, targets, mask = batch(12)
    with mock.patch.object(augmentation_module, "_is_proved", return_value=True):
        optimizer.accumulate((inputs[rows], targets[rows], mask[rows]), augment=augment)
    return gradients(model)


def test_one_more_sample_adds_its_own_gradient_and_changes_no_other() -> None:
    alone = sum(summed(FromTheSample(0.5), slice(row, row + 1)) for row in range(12))
    torch.testing.assert_close(summed(FromTheSample(0.5), slice(None)), alone)


@pytest.mark.parametrize("mutant", BATCH_STATE)
def test_mutant_caught_state_of_the_batch_changes_the_gradients_of_others(mutant: Any) -> None:
    alone = sum(summed(mutant(0.5), slice(row, row + 1)) for row in range(12))
    assert float((summed(mutant(0.5), slice(None)) - alone).norm()) > 1e-3 * float(alone.norm())


@pytest.mark.parametrize("mutant", [*BATCH_STATE, OfOtherLabels])
def test_views_that_depend_on_other_rows_or_their_labels_are_refused(mutant: Any) -> None:
    augment = mutant() if mutant is OfOtherLabels else mutant(0.5)
    model = wrapped()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    with pytest.raises(PrivacyError, match="depends on other rows"):
        optimizer.accumulate(batch(), augment=augment)
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("mutant", [Remembering, KeepingSlopes])
def test_views_that_keep_anything_are_refused(mutant: Any) -> None:
    optimizer = CliplessDPSGD(wrapped(), lr=1.0, **SETTINGS)
    with pytest.raises(PrivacyError, match="keeps a state"):
        optimizer.accumulate(batch(), augment=mutant(0.5))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_views_of_a_user_s_own_that_are_of_each_row_alone_are_accepted_at_each_look(build: Any) -> None:
    class Own(LabelledAugmentation):
        def __call__(self, inputs: Tensor, targets: Tensor, slopes: Callable[[Tensor], Tensor]) -> Tensor:
            noisy = inputs + 0.1 * torch.randn_like(inputs)
            targets.zero_()
            return noisy + 0.3 * slopes(noisy).clamp(-1.0, 1.0)

    model, rows = build().float(), batch()
    for _ in range(5):
        augmentation_module._passed.clear()
        found = seen(model, Own(), (rows[0].float(), *rows[1:]))
    assert float((found - rows[0]).norm()) > 1.0
    assert float(rows[1].abs().sum()) > 0.0


def test_the_library_s_own_attack_passes_the_look_that_users_attacks_must() -> None:
    for norm in (2, "inf"):
        with mock.patch.object(augmentation_module, "_is_proved", return_value=False):
            for seed in range(5):
                augmentation_module._passed.clear()
                seen(wrapped(seed=seed), Adversarial(0.5, norm), batch(), seed)  # type: ignore[arg-type]


def test_an_attack_that_was_changed_is_looked_at() -> None:
    """The class itself is trusted for its formulas; a method of its own on one object is not."""
    augment = Adversarial(0.5)
    augment._direction = lambda slope: slope / slope.norm()  # type: ignore[method-assign]
    with pytest.raises(PrivacyError):
        CliplessDPSGD(wrapped(), lr=1.0, **SETTINGS).accumulate(batch(), augment=augment)


def test_views_cost_no_privacy_and_leave_no_trace_but_gradients() -> None:
    spent, counts = [], []
    for augment in (None, Adversarial(0.5, steps=2)):
        model = wrapped()
        model.train()
        data = batch(40)[:2]
        batches = PoissonBatches(data, sample_rate=0.25, steps=2)
        optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.3, sample_rate=0.25, dataset_size=40)
        for drawn in batches:
            optimizer.accumulate(drawn, augment=augment, multiplicity=1 if augment is None else 3)
            optimizer.step()
        spent.append(optimizer.get_epsilon(1e-3))
        counts.append(int(model.nonfinite_samples))
        assert model.training
        assert optimizer.steps_taken == 2
    assert spent[0] == spent[1]
    assert counts == [0, 0]


def test_parts_stay_in_the_modes_they_were_in_and_dropout_is_off_in_the_attack() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    model = DPLipModel(net, input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(2.0))
    model.train()
    net[0].eval()
    first, other = (seen(model, FromTheSample(0.5), batch(), seed) for seed in (3, 4))
    assert torch.equal(first, other)
    assert [part.training for part in net] == [False, True, True]


def test_a_sample_without_a_finite_loss_is_dropped_once_for_each_view_and_others_are_attacked() -> None:
    model = wrapped()
    inputs, targets, mask = batch(6)
    inputs[2, 0] = torch.nan
    mask[4] = False
    inputs[4] = torch.nan
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    optimizer.accumulate((inputs, targets, mask), augment=Adversarial(0.5), multiplicity=2)
    assert int(model.nonfinite_samples) == 2
    assert bool(gradients(model).isfinite().all())
    assert float(gradients(model).norm()) > 0.0


def test_seeds_of_a_user_reach_no_start_and_a_declared_one_makes_the_same_views() -> None:
    model, rows = wrapped(), batch()
    torch.manual_seed(0)
    first = views(Adversarial(0.5), rows[0], rows[2], model.randomness, beside(model, rows[1]))
    torch.manual_seed(0)
    other = views(Adversarial(0.5), rows[0], rows[2], model.randomness, beside(model, rows[1]))
    assert not torch.equal(first, other)
    assert torch.equal(seen(model, Adversarial(0.5), rows), seen(model, Adversarial(0.5), rows))


@pytest.mark.parametrize("kind", ["dropout", "isolated", "row_invariant"])
def test_networks_of_other_kinds_are_attacked_and_trained(kind: str) -> None:
    torch.manual_seed(0)
    middle = [nn.LayerNorm(8)] if kind == "isolated" else [nn.Dropout(0.3)] if kind == "dropout" else []
    net = nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 3))
    model = DPLipModel(
        gradient_gated(net) if kind == "isolated" else gated(net), input_shape=(6,), input_norm=3.0,
        loss=losses.TauCrossEntropy(2.0), row_invariant=kind == "row_invariant",
    )  # fmt: skip
    data = samples(60)
    result = fit(model, data, **RUN, augment=Adversarial(0.5, steps=2), multiplicity=2)
    assert result.history[-1].epsilon <= 4.0


def test_the_weights_that_are_attacked_are_those_of_now() -> None:
    model, rows = wrapped(), batch()
    before = seen(model, FromTheSample(0.5), rows)
    with torch.no_grad():
        next(model.net.parameters()).neg_()
    assert float((seen(model, FromTheSample(0.5), rows) - before).norm()) > 0.1


def test_what_has_no_slopes_is_refused_before_anything_is_charged() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    model = DPLipModel(gated(net), input_shape=(3,), loss=losses.TauCrossEntropy())
    with pytest.raises(ConfigurationError, match=r"floating-point|tokens"):
        fit(model, (torch.randint(9, (60, 3)), torch.randint(2, (60,))), **RUN, augment=Adversarial(0.5))
    with pytest.raises(ConfigurationError, match="labels"):
        views(Adversarial(0.5), torch.zeros(2, 6), torch.ones(2, dtype=torch.bool), Randomness())


def test_slopes_of_some_rows_only_are_refused() -> None:
    class Some(LabelledAugmentation):
        def __call__(self, inputs: Tensor, targets: Tensor, slopes: Callable[[Tensor], Tensor]) -> Tensor:
            return inputs + slopes(inputs[:3]).sum(0)

    with pytest.raises(ConfigurationError, match="all 24 rows"):
        seen(wrapped(), Some(), batch())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.0}, "radius"),
        ({"radius": float("nan")}, "radius"),
        ({"radius": 1.0, "norm": 1}, "norm"),
        ({"radius": 1.0, "steps": 0}, "steps"),
        ({"radius": 1.0, "step": -1.0}, "step"),
        ({"radius": 1.0, "box": (1.0, 0.0)}, "box"),
        ({"radius": 1.0, "floor": 0.0}, "floor"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Adversarial(**arguments)


@pytest.mark.parametrize("box", [3, True, (None, 1.0), ("a", "b"), (torch.zeros(3), torch.ones(3)), (1.0, 0.0), (0.0,)])
def test_what_is_no_box_is_refused_in_words(box: Any) -> None:
    with pytest.raises(ConfigurationError, match="box must be two numbers"):
        Adversarial(0.1, box=box)
