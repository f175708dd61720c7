from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipless_dp import CliplessDPOptimizer, ConfigurationError, PoissonBatches
from clipless_dp.optim import AdamBC
from tests.support import gated_model, samples


def steps(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[torch.Tensor], noise: float
) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        if isinstance(optimizer, AdamBC):
            optimizer.note_noise({id(parameter): noise})
        optimizer.step()


def test_without_noise_it_is_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(20)]
    ours, theirs = (nn.Parameter(torch.ones(7, dtype=torch.float64)) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1}
    steps(AdamBC([ours], **settings), ours, gradients, 0.0)
    steps(torch.optim.AdamW([theirs], **settings), theirs, gradients, 0.0)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("claimed", [0.9, 1.0, 1.1], ids=["too little", "right", "too much"])
def test_what_noise_adds_to_squares_is_taken_off_and_no_other_amount(claimed: float) -> None:
    # Deviations that change, as bounds do.
    deviations = [0.5, 2.0, 1.0] * 20
    count, second = 20_000, 0.95
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.zeros(count, dtype=torch.float64))
    optimizer = AdamBC([parameter], lr=0.0, betas=(0.9, second))
    for deviation in deviations:
        parameter.grad = deviation * torch.randn(count, generator=generator, dtype=torch.float64)
        optimizer.note_noise({id(parameter): claimed * deviation})
        optimizer.step()
    state = optimizer.state[parameter]
    excess = state["exp_avg_sq"] - state["noise"]
    error = float(excess.std()) / math.sqrt(count)
    # Six standard errors; a tenth of the deviation is a fifth of the variance, hundreds of them.
    assert (abs(float(excess.mean())) < 6 * error) == (claimed == 1.0)


def test_entries_of_small_and_large_gradients_move_alike_below_the_noise_where_adam_follows_size() -> None:
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([0.02, 0.2], dtype=torch.float64)
    noise, count, repeats = 0.05, 400, 500
    moved = {}
    for kind in (AdamBC, torch.optim.Adam):
        parameter = nn.Parameter(torch.zeros(repeats, 2, dtype=torch.float64))
        optimizer = kind([parameter], lr=1e-3, betas=(0.9, 0.99))
        gradients = [
            sizes + noise * torch.randn(repeats, 2, generator=generator, dtype=torch.float64) for _ in range(count)
        ]
        steps(optimizer, parameter, gradients, noise)
        small, large = (-parameter.detach().mean(0) / (count * 1e-3)).tolist()
        moved[kind] = small / large
    # Without noise both move by the learning rate, whatever the gradient's size.
    assert moved[AdamBC] > 0.8
    assert moved[torch.optim.Adam] < 0.5


def test_the_optimizer_tells_the_deviation_of_each_weight_s_noise() -> None:
    model, data = gated_model(), samples(200)
    told: list[dict[int, float]] = []

    class Listening(AdamBC):
        def note_noise(self, deviations) -> None:  # type: ignore[no-untyped-def]
            told.append(dict(deviations))
            super().note_noise(deviations)

    base = Listening(model.net.parameters(), lr=0.01)
    optimizer = CliplessDPOptimizer(
        model, base, noise_multiplier=1.5, sample_rate=0.2, dataset_size=200, accountant="rdp"
    )
    expected = []
    for batch in PoissonBatches(data, sample_rate=0.2, steps=3):
        expected.append(optimizer.noise_deviations())
        optimizer.zero_grad()
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        optimizer.step()
    for found, deviations in zip(told, expected, strict=True):
        named = dict(model.net.named_parameters())
        assert found == {id(named[name]): deviation / 40 for name, deviation in deviations.items()}
    state = base.state[next(model.net.parameters())]
    assert state["noise"] > 0.0


def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(5, generator=generator) for _ in range(6)]
    through, stopped = (nn.Parameter(torch.zeros(5)) for _ in range(2))
    steps(AdamBC([through], lr=0.1), through, gradients, 0.5)
    first = AdamBC([stopped], lr=0.1)
    steps(first, stopped, gradients[:3], 0.5)
    second = AdamBC([stopped], lr=0.1)
    second.load_state_dict(first.state_dict())
    steps(second, stopped, gradients[3:], 0.5)
    assert torch.equal(through, stopped)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, math.nan)},
        {"eps": 0.0},
        {"floor": 0.0},
        {"weight_decay": -1.0},
    ],
    ids=["rate", "first beta", "second beta", "eps", "floor", "decay"],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        AdamBC([nn.Parameter(torch.zeros(2))], **settings)  # type: ignore[arg-type]


def test_a_closure_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="closure"):
        AdamBC([nn.Parameter(torch.zeros(2))]).step(lambda: 0.0)


@pytest.mark.parametrize(
    "other",
    [{"betas": 0.9}, {"betas": (0.9,)}, {"betas": (1.0, 1.0)}, {"floor": 0.0}, {"eps": 0.0}, {"weight_decay": -1.0}],
    ids=str,
)
def test_settings_out_of_range_are_refused_in_arguments_groups_and_at_steps(other):
    parameter = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigurationError):
        AdamBC([parameter], **other)
    with pytest.raises(ConfigurationError):
        AdamBC([{"params": [parameter], **other}])
    optimizer = AdamBC([parameter])
    with pytest.raises(ConfigurationError):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], **other})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(other)
    parameter.grad = torch.ones(3)
    with pytest.raises(ConfigurationError):
        optimizer.step()
    assert bool((parameter == 1).all())


def test_states_of_other_optimizers_and_other_kinds_of_numbers_are_refused():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    other = torch.optim.Adam([parameter])
    other.step()
    with pytest.raises(ConfigurationError, match="another optimizer"):
        AdamBC([parameter]).load_state_dict(other.state_dict())
    with pytest.raises(ConfigurationError, match="real parameters"):
        AdamBC([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    ours = AdamBC([parameter])
    parameter.grad = torch.ones(3).to_sparse()
    with pytest.raises(ConfigurationError, match="sparse"):
        ours.step()
