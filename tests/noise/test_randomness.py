"""Masks, views and layers of a user's own draw from the operating system, whatever a user seeds."""
# ruff: noqa: NPY002 (numpy's global generator is what users seed)

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipless_dp import losses
from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.graph import gated, gradient_gated
from clipless_dp.graph.dropout import DrawnDropout
from clipless_dp.model import DPLipModel
from clipless_dp.noise import randomness
from clipless_dp.noise.box_muller import seeded_streams, system_streams
from clipless_dp.noise.randomness import Moment, Randomness
from clipless_dp.optim import CliplessDPSGD
from clipless_dp.rules import LayerBounds, base, register_rule
from clipless_dp.sampling import PoissonBatches, RowAugmentation, ShiftAndFlip
from clipless_dp.sampling.augmentation import views
from clipless_dp.training import compiled_loss, fit
from tests.support import samples

RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 2, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp"}
SETTINGS = {"noise_multiplier": 1.3, "sample_rate": 1.0, "dataset_size": 40, "accountant": "rdp", "sampling": "none"}


class Jitter(nn.Module):
    """A user's own layer, which draws from torch's global generator."""

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.rand_like(values) if self.training else values


@pytest.fixture(autouse=True)
def rule_of_jitter():
    register_rule(Jitter)(jitter_rule)
    yield
    del base._RULES[Jitter]


def jitter_rule(module: Jitter, context) -> LayerBounds:
    return LayerBounds(output_norm=lambda: context.input_norm)


def model_with(*layers: nn.Module, wrap=gated, seed: int = 0) -> DPLipModel:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 64), *layers, nn.Linear(64, 3))
    return DPLipModel(wrap(net), input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(2.0)).train()


def digest() -> tuple[Tensor, object, object]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def seed_everything() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


class Draws(Jitter):
    """Draws from all generators that code shares."""

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.rand(()) * random.random() * float(np.random.rand())


@pytest.mark.parametrize("wrap", [gated, lambda net: net])
def test_wrapping_a_layer_that_draws_and_tracing_it_anew_leave_the_generators_of_the_user_as_they_were(wrap):
    register_rule(Draws)(jitter_rule)
    net = wrap(nn.Sequential(nn.Linear(6, 6), Draws(), nn.Linear(6, 3)))
    seed_everything()
    before = digest()[1:]
    model = DPLipModel(net, input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(2.0))
    copy.deepcopy(model)
    model.sensitivity()
    assert digest()[1:] == before
    del base._RULES[Draws]


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), Jitter()], ids=["dropout", "own layer"])
@pytest.mark.parametrize("wrap", [gated, gradient_gated, lambda net: net], ids=["gates", "gradient gates", "none"])
def test_no_seed_of_torch_makes_a_pass_predictable(layer, wrap):
    model = model_with(layer, wrap=wrap)
    inputs, _ = samples(8)
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(model(inputs))
    assert not torch.equal(*outputs)
    model.eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        model(inputs)
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws nothing"


def test_mutant_caught_dropout_left_to_torch(monkeypatch):
    monkeypatch.setattr("clipless_dp.model.wrapped.replace_dropout_", lambda graph, source: None)
    with pytest.raises(AssertionError):
        test_no_seed_of_torch_makes_a_pass_predictable(nn.Dropout(0.5), gated)


class Python(RowAugmentation):
    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs * random.random()


AUGMENTATIONS = {
    "shift": (ShiftAndFlip(2), (40, 1, 5, 5)),
    "function of torch": (lambda sample: sample * torch.rand(()), (40, 6)),
    "function of numpy": (lambda sample: sample * np.random.rand(), (40, 6)),
    "rows, of Python": (Python(), (40, 6)),
}


@pytest.mark.parametrize(("augment", "shape"), AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_no_seed_makes_views_predictable_and_drawing_them_disturbs_no_generator_of_the_user(augment, shape):
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 3))
    model = DPLipModel(net, input_shape=shape[1:], input_norm=3.0, loss=losses.TauCrossEntropy(2.0))
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    inputs, targets = torch.rand(shape), torch.randint(3, (40,))
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        seed_everything()
        optimizer.accumulate((inputs, targets, torch.ones(40, dtype=torch.bool)), augment=augment)
        gradients.append(model.net[1].weight.grad.clone())
        later = torch.rand(()), random.random(), np.random.rand()
        if len(gradients) == 1:
            first = later
    assert not torch.equal(*gradients)
    assert first == later


def test_shifts_outside_of_accumulate_ignore_seeds_too():
    images = torch.rand(40, 1, 5, 5)
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(ShiftAndFlip(2)(images))
    assert not torch.equal(*made)


def test_an_error_in_a_view_leaves_the_generators_of_the_user_as_they_were():
    def failing(sample: Tensor) -> Tensor:
        torch.rand(1)
        raise RuntimeError("an error of the user's")

    source = Randomness()
    seed_everything()
    torch.empty((), dtype=torch.int64).random_()
    expected = digest()
    seed_everything()
    with pytest.raises(RuntimeError):
        views(failing, torch.rand(3, 2), torch.ones(3, dtype=torch.bool), source)
    seed_everything()
    with pytest.raises(RuntimeError), source.visit(torch.device("cpu")):
        failing(torch.zeros(1))
    found = digest()
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]
    assert not source.visiting


KINDS = {
    "entries": (nn.Dropout, (400, 50), (400, 50)),
    "channels of sequences": (nn.Dropout1d, (400, 50, 3), (400, 50, 1)),
    "rows, which are channels": (nn.Dropout1d, (4000, 3), (4000, 1)),
    "channels of maps": (nn.Dropout2d, (400, 50, 2, 2), (400, 50, 1, 1)),
    "channels of volumes": (nn.Dropout3d, (400, 50, 2, 2, 2), (400, 50, 1, 1, 1)),
    "samples of volumes": (nn.Dropout3d, (4000, 5, 2, 2), (4000, 1, 1, 1)),
}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("kind", "shape", "drawn"), KINDS.values(), ids=KINDS)
def test_masks_have_the_shape_of_torchs_own_and_the_right_rate_and_are_independent(kind, shape, drawn, rate):
    values = DrawnDropout(kind(rate), Randomness())(torch.ones(shape))
    kept = values[(..., *[slice(0, 1) if one == 1 else slice(None) for one in drawn])]
    assert torch.equal(kept.expand(shape), values)
    assert torch.equal(torch.where(values == 0, 0.0, torch.tensor(1.0) / (1.0 - rate)), values)
    flat = (kept.flatten() != 0).double()
    count = len(flat)
    deviation = math.sqrt(rate * (1 - rate))
    # Five and a half standard errors: once in 10⁷ runs each.
    assert abs(float(flat.mean()) - (1 - rate)) < 5.5 * deviation / math.sqrt(count)
    shifted = ((flat[1:] - 1 + rate) * (flat[:-1] - 1 + rate)).mean() / deviation**2
    assert abs(float(shifted)) < 5.5 / math.sqrt(count)
    again = DrawnDropout(kind(rate), Randomness())(torch.ones(shape))
    assert not torch.equal(again, values)


def test_masks_keep_the_memory_layout_and_dtype_of_values():
    values = torch.ones(4, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    dropped = DrawnDropout(nn.Dropout(0.5), Randomness())(values)
    assert dropped.is_contiguous(memory_format=torch.channels_last)
    assert dropped.dtype == torch.float64
    assert 0 < int((dropped == 0).sum()) < values.numel()
    assert DrawnDropout(nn.Dropout(0.5), Randomness())(values[:0]).shape == (0, 3, 5, 5)
    rare = DrawnDropout(nn.Dropout(1e-12), Randomness())(values)
    # None is dropped but once in 10⁹; what stays is scaled by 1 + 10⁻¹².
    torch.testing.assert_close(rare, values, rtol=2e-12, atol=0.0)


@pytest.mark.parametrize("streams", [system_streams, lambda: seeded_streams(3)], ids=["system", "seeded"])
def test_streams_differ_by_number_and_repeat_for_the_same(streams):
    streams, drawn = streams(), []
    for number in (0, 1, 0, 2**40):
        words = torch.empty(1000, dtype=torch.int32)
        streams(number)(words)
        drawn.append(words)
    assert torch.equal(drawn[0], drawn[2])
    for other in (drawn[1], drawn[3]):
        # 1000 words of 32 bits: one is met again with probability 2e-7.
        assert not (drawn[0] == other).any()


def test_every_pass_and_every_layer_has_its_own_mask():
    source = Randomness()
    layer = DrawnDropout(nn.Dropout(0.5), source)
    masks = [layer(torch.ones(64)) for _ in range(20)]
    torch.manual_seed(0)
    masks.append(layer(torch.ones(64)))
    torch.manual_seed(0)
    masks.append(layer(torch.ones(64)))
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


def test_copies_and_forked_processes_start_afresh():
    model = model_with(nn.Dropout(0.5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.randomness is not model.randomness
        with torch.no_grad():
            assert not torch.equal(other(samples(8)[0]), model(samples(8)[0]))
    source = Randomness()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Of the threads of others, which the child does not use.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    words = torch.empty(4, dtype=torch.int32)
    source.words(torch.device("cpu"))(words)
    if child == 0:
        os.write(writing, words.numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 16) != words.numpy().tobytes()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", [nn.Dropout(0.5), Jitter()], ids=["dropout", "own layer"])
def test_a_checkpointed_pass_is_repeated_with_its_own_masks(layer, reentrant):
    model = model_with(layer, nn.ReLU(), nn.Dropout(0.3))
    pieces = [part.requires_grad_() for part in samples(24)[0].split(8)]
    targets = samples(24)[1].split(8)

    def gradients(run) -> list[Tensor]:
        model.zero_grad()
        with model.randomness.seeded(1):
            total = sum(model.loss(run(part), target) for part, target in zip(pieces, targets, strict=True))
            total.backward()
        return [p.grad.clone() for p in model.net.parameters()]

    expected = gradients(model)
    found = gradients(lambda part: checkpoint(model, part, use_reentrant=reentrant))
    for one, other in zip(expected, found, strict=True):
        # The same float32 products in another order.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_repeated_pass_whose_masks_are_not_known_is_refused():
    model = model_with(nn.Dropout(0.5))
    inputs, targets = samples(8)
    loss = model.loss(checkpoint(model, inputs, use_reentrant=False, preserve_rng_state=False), targets)
    with pytest.raises(PrivacyError, match="preserve_rng_state"):
        loss.backward()
    total = torch.zeros(())
    for _ in range(2):
        torch.manual_seed(0)
        total = total + model.loss(checkpoint(model, inputs, use_reentrant=False), targets)
    with pytest.raises(PrivacyError, match="seed torch between"):
        total.backward()


def test_a_loop_that_seeds_each_step_may_checkpoint():
    model = model_with(nn.Dropout(0.5))
    optimizer = CliplessDPSGD(model, lr=1.0, **SETTINGS)
    inputs, targets = samples(8)
    for _ in range(3):
        torch.manual_seed(0)
        optimizer.zero_grad()
        model.loss(checkpoint(model, inputs, use_reentrant=False), targets).backward()
        optimizer.step()
    assert optimizer.randomness_sources == ("system",)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), Jitter()], ids=["dropout", "own layer"])
def test_a_compiled_pass_draws_anew_each_time_whatever_is_seeded(layer):
    net = nn.Sequential(nn.Linear(6, 32), layer)
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy()).train()
    loss = compiled_loss(model, "eager")
    inputs, targets = samples(8)

    def found() -> float:
        torch.manual_seed(7)
        total = loss(inputs, targets, torch.ones(8, dtype=torch.bool))
        total.backward()
        return float(total.detach())

    assert found() != found()
    with model.randomness.seeded(1):
        one = found()
    with model.randomness.seeded(1):
        assert found() == one


def test_compilers_do_not_merge_the_masks_of_two_layers():
    layer = DrawnDropout(nn.Dropout(0.5), Randomness())
    compiled = torch.compile(lambda values: layer(values) - layer(values), fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(200)).abs().sum() > 0


def test_a_compiled_pass_with_layers_of_a_users_own_runs_as_it_is():
    model = model_with(Jitter())
    compiled = torch.compile(model, backend="eager")
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(compiled(samples(8)[0]))
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("seed", [None, 3])
def test_an_optimizer_says_where_the_randomness_of_its_steps_came_from(seed):
    data = samples(300)
    results = [
        fit(model_with(nn.Dropout(0.5)), data, reproducible_seed=seed, **RUN),
        fit(model_with(), data, augment=lambda sample: -sample, reproducible_seed=seed, **RUN),
    ]
    for result in results:
        assert result.optimizer.randomness_sources == (("system",) if seed is None else ("reproducible",))
    optimizer = results[0].optimizer
    other = CliplessDPSGD(optimizer.model, lr=1.0, **SETTINGS)
    other.load_state_dict(optimizer.state_dict())
    assert other.randomness_sources == optimizer.randomness_sources
    assert fit(model_with(), data, reproducible_seed=seed, **RUN).optimizer.randomness_sources == ()


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), Jitter()], ids=["dropout", "own layer"])
def test_a_reproducible_run_draws_the_same_whatever_is_seeded(layer):
    found = []
    for seed in (1, 2):
        model = model_with(layer)
        torch.manual_seed(seed)
        random.seed(seed)
        augment = lambda sample: sample * torch.rand(()) * random.random()  # noqa: E731
        fit(model, samples(300), augment=augment, reproducible_seed=4, **RUN)
        found.append(torch.cat([p.detach().flatten() for p in model.net.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["dropout", "augment"])
def test_one_row_less_moves_no_step_predictably(kind):
    """A seed is set before each run, and weights stay: what is predictable is the same in two runs of the same data."""
    images, targets = torch.rand(64, 1, 6, 6), torch.randint(4, (64,))
    layers = [nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Dropout(0.5 if kind == "dropout" else 0.0)]

    def released(count: int) -> tuple[Tensor, float]:
        torch.manual_seed(0)
        net = gradient_gated(nn.Sequential(*layers, nn.Linear(32, 4)))
        model = DPLipModel(net, input_shape=(1, 6, 6), input_norm=6.0, loss=losses.TauCrossEntropy()).train()
        optimizer = CliplessDPSGD(
            model, lr=0.0, noise_multiplier=1.0, sample_rate=1.0, dataset_size=64, accountant="rdp"
        )
        for batch in PoissonBatches((images[:count], targets[:count]), sample_rate=1.0, steps=1):
            optimizer.accumulate(batch, augment=ShiftAndFlip(2) if kind == "augment" else None)
        return torch.cat([p.grad.flatten() for p in model.net.parameters()]), model.sensitivity().total

    (first, total), (second, _) = released(64), released(64)
    # Thirteen times the stated sensitivity between equal runs: no attacker knows where the noise is centred.
    assert float((first - second).norm()) > total


def test_the_global_lock_is_free_after_a_pass():
    model = model_with(Jitter())
    model(samples(8)[0])
    assert randomness._global.acquire(blocking=False)
    randomness._global.release()


class Seeded:
    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, sample: Tensor) -> Tensor:
        return sample + float(self.generator.normal())


def closed_over() -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda sample: sample + torch.randn((), generator=generator)


@pytest.mark.parametrize("augment", [Seeded(), closed_over(), partial(lambda rng, sample: sample, random.Random(0))])
def test_views_that_draw_from_a_seeded_generator_of_their_own_are_refused(augment: Callable[[Tensor], Tensor]) -> None:
    model = DPLipModel(
        gated(nn.Sequential(nn.Linear(4, 2))), input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy()
    )
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=1.0, dataset_size=6)
    batch = torch.rand(6, 4), torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.bool)
    with pytest.raises(ConfigurationError, match="generator of its own"):
        optimizer.accumulate(batch, augment=augment)


def test_a_source_that_was_pickled_under_its_modules_former_name_is_found():
    assert type(pickle.loads(b"cclipless_dp.randomness\nRandomness\n(tR.")) is Randomness


def test_a_moment_comes_again_for_all_generators_and_leaves_them_as_they_are() -> None:
    def numbers() -> list[float]:
        within = randomness.current_generator(torch.device("cpu")) is None
        return [float(torch.rand(())), random.random(), float(np.random.rand()), within]

    with Randomness().visit(torch.device("cpu")):
        moment = Moment(torch.device("cpu"))
        first = numbers()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with moment.again():
        assert numbers() == first
        assert first[-1]
    with moment.again():
        assert numbers() == first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert randomness.current_generator(torch.device("cpu")) is not None
