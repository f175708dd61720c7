"""Views of a sample share its one gradient: the bound is that of one view, whatever their number."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from clipless_dp import (
    CliplessDPOptimizer,
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    GaussianNoise,
    InputError,
    PoissonBatches,
    PrivacyError,
    RowAugmentation,
    ShiftAndFlip,
    fit,
    gated,
    gradient_gated,
    losses,
)
from clipless_dp.noise.randomness import Randomness
from clipless_dp.sampling import augmentation as augmentation_module
from clipless_dp.sampling.augmentation import views
from tests.support import SETTINGS, gated_model, samples

RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 2, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp"}
MULTIPLICITY = 4


def normalising_model(wrap=gated, **options) -> DPLipModel:
    """Gates that lift each sample's gradient to its bound, so that whatever counts a view too often passes it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    return DPLipModel(wrap(net, **options), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


MODELS = {
    "cotangents": lambda: normalising_model(cotangent_mode="normalize"),
    "gradients": lambda: normalising_model(gradient_gated, mode="normalize"),
    "clipping": lambda: normalising_model(),
}


def jitter(sample: Tensor) -> Tensor:
    return sample + 0.3 * torch.randn_like(sample)


def batch_of(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return inputs, targets, torch.ones(len(inputs), dtype=torch.bool)


def gradients(model: DPLipModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.net.named_parameters() if p.grad is not None}


def largest_ratio(model: DPLipModel, accumulate=CliplessDPOptimizer.accumulate) -> float:
    """Largest observed/bound over parameters and samples, one sample at a time in float64."""
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    inputs, targets = samples(24)
    inputs = torch.cat((inputs.double(), 1e3 * inputs[:6].double(), 1e-3 * inputs[:6].double()))
    targets = torch.cat((targets, targets[:12]))
    bounds = model.sensitivity().per_parameter
    worst = 0.0
    for index in range(len(inputs)):
        optimizer.zero_grad()
        row = slice(index, index + 1)
        accumulate(optimizer, batch_of(inputs[row], targets[row]), augment=jitter, multiplicity=MULTIPLICITY)
        found = gradients(model)
        worst = max(worst, *(float(found[name].norm()) / bound for name, bound in bounds.items()))
    return worst


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_mean_over_views_of_each_sample_keeps_the_bound_of_one(build):
    # float64 sums of a few dozen terms.
    assert largest_ratio(build()) <= 1.0 + 1e-9


def loss_of_view(model, batch, augment):
    inputs, targets, mask = batch
    return model.loss(model(views(augment, inputs, mask)), targets, mask)


def summed(optimizer, batch, *, augment, multiplicity):
    for _ in range(multiplicity):
        loss_of_view(optimizer.model, batch, augment).backward()


def weighted_before_the_gates(optimizer, batch, *, augment, multiplicity):
    for _ in range(multiplicity):
        (loss_of_view(optimizer.model, batch, augment) / multiplicity).backward()


@pytest.mark.parametrize("mutant", [summed, weighted_before_the_gates])
@pytest.mark.parametrize("build", [MODELS["cotangents"], MODELS["gradients"]], ids=["cotangents", "gradients"])
def test_mutant_caught_views_that_are_not_averaged_behind_the_gates(build, mutant):
    assert largest_ratio(build(), mutant) > 1.5


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_gradients_are_those_of_all_views_over_their_number(looked_away, micro_batch_size):
    model = normalising_model(cotangent_mode="normalize")
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    inputs, targets = samples(12)
    inputs = inputs.double()
    shifts = (1.0, -2.0, 0.5)
    # All views at once, each a sample of its own.
    loss = model.loss(model(torch.cat([inputs + shift for shift in shifts])), targets.repeat(3))
    loss.backward()
    expected = {name: gradient / 3 for name, gradient in gradients(model).items()}
    optimizer.zero_grad()
    sequence = iter([shift for shift in shifts for _ in range(1 if micro_batch_size is None else 3)])

    class Shift(RowAugmentation):
        def __init__(self) -> None:
            self.sequence = sequence

        def __call__(self, inputs: Tensor) -> Tensor:
            return inputs + next(self.sequence)

    total = optimizer.accumulate(
        batch_of(inputs, targets), augment=Shift(), multiplicity=3, micro_batch_size=micro_batch_size
    )
    assert float(total) == pytest.approx(float(loss.detach()) / 3, rel=1e-6), "kept in float32"
    for name, gradient in gradients(model).items():
        # float64 sums of a few dozen terms in another order.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_one_view_without_augmentation_is_an_ordinary_backward():
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    inputs, targets = samples(12)
    model.loss(model(inputs), targets).backward()
    expected = gradients(model)
    optimizer.zero_grad()
    optimizer.accumulate(batch_of(inputs, targets))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


def test_parts_of_one_draw_add_up_and_none_enters_twice():
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    inputs, targets, mask = batch_of(*samples(12))
    optimizer.accumulate((inputs, targets, mask), augment=lambda sample: -sample, multiplicity=2)
    expected = gradients(model)
    for again in (inputs, inputs[3:5], inputs.view(12, 6), inputs.T[:2].T):
        with pytest.raises(PrivacyError, match="count twice"):
            optimizer.accumulate((again, targets[: len(again)], mask[: len(again)]))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())

    optimizer.skip_draw()
    for part in (slice(0, 7), slice(7, 12)):
        optimizer.accumulate((inputs[part], targets[part], mask[part]), augment=lambda sample: -sample, multiplicity=2)
    for name, gradient in gradients(model).items():
        # float32 sums of a dozen terms.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.accumulate((inputs, targets, mask))


def test_an_error_within_the_views_leaves_the_gradients_as_they_were(looked_away):
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    inputs, targets, mask = batch_of(*samples(12))
    optimizer.accumulate((inputs[:6], targets[:6], mask[:6]))
    expected = gradients(model)
    calls = 0

    def failing(sample: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise RuntimeError("out of memory")
        return sample

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.accumulate((inputs[6:], targets[6:], mask[6:]), augment=failing, multiplicity=3)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())
    optimizer.accumulate((inputs[6:], targets[6:], mask[6:]))


def test_a_function_of_one_sample_sees_each_drawn_sample_alone_and_never_the_padding(looked_away):
    inputs, _ = samples(5)
    seen = []

    def note(sample: Tensor) -> Tensor:
        seen.append(sample.clone())
        return sample.zero_()

    kept = inputs.clone()
    mask = torch.tensor([True, True, False, True, False])
    made = views(note, inputs, mask)
    assert torch.equal(torch.stack(seen), inputs[mask])
    assert torch.equal(inputs, kept), "the sample itself is not changed"
    assert torch.equal(made[mask], torch.zeros(3, 6))
    assert views(note, inputs[:0], mask[:0]).shape == (0, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"multiplicity": 0}, "whole number"),
        ({"multiplicity": 2.0, "augment": jitter}, "whole number"),
        ({"multiplicity": 2}, "give augment"),
        ({"augment": lambda sample: sample[:3]}, "shape"),
        ({"augment": lambda sample: sample.tolist()}, "a list"),
        ({"augment": ShiftAndFlip(1)}, "images"),
    ],
    ids=["zero", "float", "no augment", "shape", "list", "images"],
)
def test_augmentations_that_cannot_work_are_refused(arguments, message):
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    with pytest.raises(ConfigurationError, match=message):
        optimizer.accumulate(batch_of(*samples(4)), **arguments)
    with pytest.raises(ConfigurationError, match=message):
        fit(model, samples(300), **{**RUN, **arguments})
    assert optimizer.steps_taken == 0
    with pytest.raises(ConfigurationError, match="shift"):
        ShiftAndFlip(-1)
    with pytest.raises(InputError):
        fit(model, samples(300), augment=lambda sample: sample.double(), **RUN)


def test_shifts_and_flips_make_every_view_of_an_image_and_no_other():
    image = torch.arange(1.0, 13.0).view(1, 1, 3, 4)
    seen = {tuple(view.flatten().tolist()) for view in ShiftAndFlip(1)(image.expand(2000, -1, -1, -1))}
    padded = nn.functional.pad(image, (1, 1, 1, 1))
    crops = [padded[0, 0, i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
    # Of 18 views none is missing among 2000 draws but with probability 18·e^-111.
    assert seen == {tuple(view.flatten().tolist()) for crop in crops for view in (crop, crop.flip(1))}
    assert torch.equal(ShiftAndFlip(0, flip=False)(image), image)


def test_noise_has_its_deviation_is_fresh_in_each_view_and_leaves_the_sample():
    inputs = torch.zeros(400, 50, dtype=torch.float64)
    noise = GaussianNoise(0.3)
    first, second = noise(inputs), noise(inputs)
    # Five deviations of a sample deviation of 20 000 numbers; a deviation off by 3 % fails.
    assert float(first.std()) == pytest.approx(0.3, rel=5.0 / 200.0)
    assert abs(float((first * second).mean())) < 5.0 * 0.09 / 141.0
    assert not inputs.any()
    assert first.dtype == inputs.dtype
    torch.manual_seed(0)
    seeded = noise(inputs)
    torch.manual_seed(0)
    assert not torch.equal(noise(inputs), seeded)
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigurationError, match="sigma"):
            GaussianNoise(sigma)
    with pytest.raises(ConfigurationError, match="floating-point"):
        noise(torch.zeros(3, 2, dtype=torch.int64))


def test_noisy_views_are_made_row_by_row_and_cost_what_no_views_cost():
    mask = torch.ones(4, dtype=torch.bool)
    inputs = torch.rand(4, 6)
    results = []
    for other in (inputs[2:], torch.zeros(2, 6)):
        source = Randomness()
        with source.seeded(3):
            results.append(views(GaussianNoise(0.5), torch.cat((inputs[:2], other)), mask, source)[:2])
    assert torch.equal(*results)
    runs = []
    for augment, multiplicity in ((None, 1), (GaussianNoise(0.5), 4)):
        options = {} if augment is None else {"augment": augment, "multiplicity": multiplicity}
        runs.append(fit(gated_model(), samples(300), **RUN, **options).epsilon)
    assert runs[0] == runs[1]


def test_each_image_is_shifted_by_itself():
    first, second = torch.rand(2, 2, 3, 5, 5)
    results = []
    mask = torch.ones(4, dtype=torch.bool)
    for other in (second, torch.zeros_like(second)):
        source = Randomness()
        with source.seeded(3):
            results.append(views(ShiftAndFlip(2), torch.cat((first, other)), mask, source)[:2])
    assert torch.equal(*results)


@pytest.mark.parametrize("micro_batch_size", [None, 16])
def test_fit_spends_the_same_for_any_number_of_views(micro_batch_size):
    results = [
        fit(gated_model(), samples(300), augment=jitter, multiplicity=k, micro_batch_size=micro_batch_size, **RUN)
        for k in (1, 3)
    ]
    assert results[0].epsilon == results[1].epsilon
    assert results[0].optimizer.accountant.history == results[1].optimizer.accountant.history


def test_an_own_loop_takes_one_draw_for_each_step_with_any_number_of_views():
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **{**SETTINGS, "sampling": "announced"})
    for batch in PoissonBatches(samples(40), sample_rate=0.25, steps=3):
        optimizer.zero_grad()
        optimizer.accumulate(batch, augment=jitter, multiplicity=3)
        optimizer.step()
    assert optimizer.accountant.history == [(1.3, 0.25, 3)]
    draws = iter(PoissonBatches(samples(40), sample_rate=0.25, steps=2))
    optimizer.zero_grad()
    for batch in draws:
        optimizer.accumulate(batch, augment=jitter, multiplicity=3)
    with pytest.raises(PrivacyError, match="2 Poisson draws"):
        optimizer.step()


class Mixup(RowAugmentation):
    def __call__(self, inputs: Tensor) -> Tensor:
        return 0.5 * inputs + 0.5 * inputs.roll(1, 0)


class Standardised(RowAugmentation):
    def __call__(self, inputs: Tensor) -> Tensor:
        return (inputs - inputs.mean(0)) / inputs.std(0)


class FirstRow(RowAugmentation):
    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs[:1].expand_as(inputs)


class Rejecting(RowAugmentation):
    """How many numbers a row takes from the generator follows from the row."""

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch.stack([row + torch.randn(1 + int(bool(row.any())))[0] for row in inputs])


class Stateful(RowAugmentation):
    count = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        type(self).count += 1
        return inputs + self.count


class Noisy(RowAugmentation):
    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs + torch.randn_like(inputs) + float(np.random.rand()) + random.random()  # noqa: NPY002


class LazilyScaled(RowAugmentation):
    """Makes a constant when it is called first, the same whatever it is called on."""

    scale: Any = None

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.full(inputs.shape[1:], 2.0)
        return inputs * self.scale


@pytest.fixture
def looked_away(monkeypatch):
    """Augmentations may remember what they like, which tests use."""
    monkeypatch.setattr(augmentation_module._Look, "refuse_memory", lambda *_: None)


def accumulated(augment) -> DPLipModel:
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    optimizer.accumulate(batch_of(*samples(12)), augment=augment)
    return model


@pytest.mark.parametrize("augment", [Mixup, Standardised, FirstRow, Rejecting])
def test_views_of_whole_batches_that_depend_on_other_rows_are_refused(augment):
    with pytest.raises(PrivacyError, match="depends on other rows"):
        accumulated(augment())


def test_views_that_keep_a_state_elsewhere_are_refused():
    with pytest.raises(PrivacyError, match="keeps a state outside"):
        accumulated(Stateful())


@pytest.mark.parametrize("through_numpy", [False, True])
def test_views_made_in_place_are_refused(through_numpy):
    class InPlace(RowAugmentation):
        def __call__(self, inputs: Tensor) -> Tensor:
            if through_numpy:
                inputs.numpy()[:] = 0.0
                return inputs
            return inputs.mul_(2.0)

    with pytest.raises(PrivacyError, match="in place"):
        accumulated(InPlace())


@pytest.mark.parametrize("augment", [Noisy, LazilyScaled])
def test_views_of_each_row_alone_are_accepted_and_looking_draws_nothing(augment):
    inputs, _ = samples(12)
    mask = torch.ones(12, dtype=torch.bool)
    made = []
    for looks in (True, False):
        augmentation_module._passed.clear()
        used = augment()
        if not looks:
            augmentation_module._passed[used] = True
        source = Randomness()
        with source.seeded(3), mock.patch.object(augmentation_module.secrets, "randbelow", return_value=1):
            made += [views(used, inputs, mask, source) for _ in range(2)]
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])
    accumulated(augment())


def first_sample():
    kept = {}

    def augment(sample):
        kept.setdefault("first", sample.clone())
        return sample - kept["first"]

    return augment


def counter():
    calls = 0

    def augment(sample):
        nonlocal calls
        calls += 1
        return sample if calls % 2 else -sample

    return augment


def pool():
    seen = []

    def augment(sample):
        seen.append(sample.clone())
        return 0.5 * (sample + seen[int(torch.randint(len(seen), ()))])

    return augment


def running_mean():
    state = {"count": 0, "mean": 0.0}

    def augment(sample):
        state["count"] += 1
        state["mean"] = state["mean"] + (sample - state["mean"]) / state["count"]
        return sample - state["mean"]

    return augment


class Whitening(nn.Module):
    """A parameter that follows the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(6), requires_grad=False)

    def forward(self, sample: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * sample)
        return sample - self.mean


class Running(RowAugmentation):
    """An attribute that follows the batches."""

    def __init__(self) -> None:
        self.mean: Any = 0.0

    def __call__(self, inputs: Tensor) -> Tensor:
        views_ = inputs - self.mean
        self.mean = 0.5 * self.mean + 0.5 * inputs[0]
        return views_


class Stepped(RowAugmentation):
    """A counter, which tells how many batches there were."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return inputs + 1.0 / self.calls


class FirstSample:
    """An attribute that is made in the first call, of the first sample."""

    first: Any = None

    def __call__(self, sample: Tensor) -> Tensor:
        if self.first is None:
            self.first = sample.clone()
        return sample - self.first


class FirstOfAll:
    """The same in an attribute of the class, which copies share."""

    first: Any = None

    def __call__(self, sample: Tensor) -> Tensor:
        if FirstOfAll.first is None:
            FirstOfAll.first = sample.clone()
        return sample - FirstOfAll.first


def first_of_all():
    FirstOfAll.first = None
    return FirstOfAll()


class Seen:
    """A flag that a sample sets, and others read."""

    seen = False

    def __call__(self, sample: Tensor) -> Tensor:
        self.seen = self.seen or bool(sample.sum() > 0)
        return -sample if self.seen else sample


REMEMBER = {
    "first sample": (first_sample, r"augment\.kept: dict of 0 → dict of 1"),
    "counter": (counter, r"augment\.calls changed"),
    "pool": (pool, r"augment\.seen: list of 0 → list of 1"),
    "running mean": (running_mean, r"augment\.state"),
    "parameter": (Whitening, r"Whitening\._parameters"),
    "running attribute": (Running, r"Running\.mean: another value → Tensor"),
    "counter of batches": (Stepped, r"Stepped\.calls changed"),
    "made of the first": (FirstSample, r"FirstSample\.first: (absent|None) → Tensor"),
    "made of the first for all": (first_of_all, r"FirstOfAll\..*first: None → Tensor"),
    "flag": (Seen, r"Seen\.seen: absent → True"),
}


@pytest.mark.parametrize("name", REMEMBER)
def test_an_augmentation_that_remembers_earlier_samples_is_refused_by_the_name_of_what_moved(name):
    make, told = REMEMBER[name]
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    batch = batch_of(*samples(12))
    with pytest.raises(PrivacyError, match=told):
        optimizer.accumulate(batch, augment=make(), multiplicity=2)
    assert not any(gradient.any() for gradient in gradients(model).values())
    with pytest.raises(PrivacyError, match=r"keeps a state|depends on other rows"):
        fit(gated_model(), samples(300), **{**RUN, "augment": make()})


@pytest.mark.parametrize("name", ["first sample", "counter", "pool", "parameter", "flag"])
def test_mutant_caught_what_is_not_compared_may_remember(name, looked_away):
    accumulated(REMEMBER[name][0]())


def test_an_augmentation_that_begins_to_remember_later_is_refused_then():
    kept: list[Tensor] = []

    def augment(sample):
        if sample[0] > 1.0:
            kept.append(sample)
        return sample

    mask = torch.ones(1, dtype=torch.bool)
    views(augment, torch.zeros(1, 6), mask)
    views(augment, torch.zeros(1, 6), mask)
    with pytest.raises(PrivacyError, match=r"augment\.kept: list of 0 → list of 1"):
        views(augment, torch.full((1, 6), 2.0), mask)


def _of_table(table: Any) -> Any:
    return lambda sample: sample * table["1"]


@pytest.mark.parametrize("made_anew", [False, True])
def test_what_reaches_much_is_walked_in_the_first_call_and_in_some(made_anew):
    table = {str(number): number for number in range(2000)}
    kept = _of_table(table)
    looked = mock.Mock(side_effect=augmentation_module.reachable)
    (batch,) = PoissonBatches(samples(40), sample_rate=1.0, steps=1)

    def step() -> int:
        optimizer = CliplessDPSGD(gated_model(), lr=1.0, **SETTINGS | {"sample_rate": 1.0})
        optimizer.accumulate(batch, augment=_of_table(table) if made_anew else kept, multiplicity=2)
        return looked.call_count

    with (
        mock.patch.object(augmentation_module, "_sizes", WeakIdKeyDictionary()),
        mock.patch.object(augmentation_module, "reachable", looked),
        mock.patch.object(augmentation_module.memory, "reachable", looked),
    ):
        with mock.patch.object(augmentation_module.secrets, "randbelow", return_value=1):
            first, *others = (step() for _ in range(3))
        assert first > 2
        assert others == [first, first]
        with mock.patch.object(augmentation_module.secrets, "randbelow", return_value=0):
            assert step() > first


def test_a_decorated_function_is_not_known_by_the_code_of_its_decorator():
    table = {str(number): number for number in range(2000)}
    kept: list[Tensor] = []

    def decorated(function):
        return lambda sample: function(sample)

    mask = torch.ones(1, dtype=torch.bool)
    with (
        mock.patch.object(augmentation_module, "_sizes", WeakIdKeyDictionary()),
        mock.patch.object(augmentation_module.secrets, "randbelow", return_value=1),
    ):
        views(decorated(_of_table(table)), torch.zeros(1, 6), mask)
        with pytest.raises(PrivacyError, match=r"kept: list of 0 → list of 1"):
            views(decorated(lambda sample: (kept.append(sample), sample)[1]), torch.zeros(1, 6), mask)


class Toggle:
    """Two states, of which an even number of views leaves the first."""

    flip = False

    def __call__(self, sample: Tensor) -> Tensor:
        self.flip = not self.flip
        return sample if self.flip else -sample


class Turning(Toggle):
    """Three states, the first of which is no value."""

    turn: Any = None

    def __call__(self, sample: Tensor) -> Tensor:
        self.turn = {None: 1, 1: 2, 2: None}[self.turn]
        return sample * (self.turn or -1)


class TurningBatches(RowAugmentation):
    """Two states for whole batches."""

    flip = False

    def __call__(self, inputs: Tensor) -> Tensor:
        self.flip = not self.flip
        return inputs if self.flip else -inputs


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("kind", [Toggle, Turning, TurningBatches])
def test_states_that_views_move_forth_and_back_are_refused_for_any_number_of_rows(kind, rows):
    with pytest.raises(PrivacyError, match=r"\.(flip|turn): "):
        views(kind(), samples(rows)[0], torch.ones(rows, dtype=torch.bool))


def test_a_flag_that_few_samples_turn_shows_between_views():
    class OnBright(Toggle):
        def __call__(self, sample: Tensor) -> Tensor:
            return super().__call__(sample) if bool(sample[0] > 1.0) else sample

    inputs = torch.zeros(8, 6)
    inputs[[3, 6]] = 2.0
    with pytest.raises(PrivacyError, match=r"\.flip: absent → (True|False)"):
        views(OnBright(), inputs, torch.ones(8, dtype=torch.bool))


class ByShape:
    """Makes a constant for each shape, when it comes first."""

    def __init__(self) -> None:
        self.cache: dict[Any, Tensor] = {}

    def __call__(self, sample: Tensor) -> Tensor:
        if sample.shape not in self.cache:
            self.cache[sample.shape] = torch.linspace(0.0, 1.0, len(sample))
        return sample * self.cache[sample.shape]


class ByValue(ByShape):
    """Keeps something of each sample."""

    def __call__(self, sample: Tensor) -> Tensor:
        return sample * self.cache.setdefault(sample.shape, sample)


def test_a_mapping_that_any_first_sample_fills_alike_is_accepted():
    accumulated(ByShape())
    augment = ByShape()
    for rows in (0, 1, 5):
        views(augment, samples(5)[0], torch.arange(5) < rows)
    with pytest.raises(PrivacyError, match=r"ByValue\.cache: dict of 0 → dict of 1"):
        accumulated(ByValue())


def test_without_the_look_mixed_rows_would_be_accepted(monkeypatch):
    monkeypatch.setattr(augmentation_module, "_same", lambda first, second: torch.ones(len(first), dtype=torch.bool))
    accumulated(Mixup())


def _closing_over(batch):
    return lambda row: row - batch.inputs.mean(0)


def _by_default(batch):
    return lambda row, mean=batch.inputs: row - mean.mean(0)


class Holding(RowAugmentation):
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs - self.rows.mean(0)


@pytest.mark.parametrize("hold", [_closing_over, _by_default, lambda batch: Holding(batch.inputs[:4])])
def test_an_augmentation_that_holds_a_batch_is_refused(hold):
    model = gated_model()
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    (batch,) = PoissonBatches(samples(40), sample_rate=0.25, steps=1, physical_batch_size=40)
    with pytest.raises(ConfigurationError, match="holds a batch"):
        optimizer.accumulate(batch, augment=hold(batch))


def test_an_augmentation_may_hold_tensors_that_are_no_batch():
    accumulated(Holding(torch.ones(4, 6)))
