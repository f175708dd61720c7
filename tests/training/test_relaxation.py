"""A schedule that hardens distances: of public numbers, between steps, with one bound all along."""

from __future__ import annotations

import math

import pytest
import torch

from clipless_dp import ConfigurationError, DPLipModel, PrivacyError, architectures, fit, losses, robustness
from clipless_dp.layers import DistanceLinear, set_exponent_
from clipless_dp.training import fit_without_privacy, relaxation


def made(loss: losses.Loss, *, mean: bool = True) -> DPLipModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = architectures.sort_mlp((4,), 2, widths=(6,), quantile=None, p=8.0)
    for layer in net:
        layer.mean = mean
    return DPLipModel(net, input_shape=(4,), input_norm=100.0, loss=loss)


def data(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.rand(count, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    return inputs, (inputs[:, 0] > 0).long()


def followed(steps: int, **options: float) -> tuple[list[float], list[float]]:
    loss = losses.LInfMargin(0.1)
    net = made(loss).net
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, 1.0)
    scheduler = relaxation(net, loss=loss, **options)(optimizer, steps)  # type: ignore[arg-type]
    exponents, decays = [], []
    for _ in range(steps):
        exponents.append(net[0].p)
        decays.append(loss.decay)
        optimizer.step()
        scheduler.step()
    return exponents, decays


def test_exponents_rise_geometrically_and_end_at_infinity_while_the_cross_entropy_decays() -> None:
    exponents, decays = followed(20, stages=4, until=0.8)
    assert exponents[:16] == pytest.approx([8.0 * 125.0 ** (stage / 3) for stage in range(4) for _ in range(4)])
    assert exponents[16:] == [math.inf] * 4
    assert decays[0] == 1.0
    assert decays == sorted(decays, reverse=True)
    assert decays[16:] == [0.0] * 4


def test_a_schedule_that_goes_on_from_its_state_goes_on_where_it_was() -> None:
    def scheduled() -> tuple[DPLipModel, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = made(losses.LInfMargin(0.1))
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
        return model, optimizer, relaxation(model, stages=2, until=0.5)(optimizer, 8)

    model, optimizer, scheduler = scheduled()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    again, _, resumed = scheduled()
    assert again.net[0].p == 8.0
    resumed.load_state_dict(scheduler.state_dict())
    assert again.net[0].p == model.net[0].p == math.inf
    assert resumed.get_last_lr() == scheduler.get_last_lr()


def test_a_private_run_hardens_under_the_bound_of_its_end_and_is_certified_at_its_end() -> None:
    loss = losses.LInfMargin(0.05)
    model = made(loss)
    before = model.sensitivity().per_parameter
    result = fit(
        model, data(), epsilon=8.0, delta=1e-3, epochs=3, batch_size=16, audit=False, progress=False,
        optimizer="adam", lr=0.02, scheduler=relaxation(model.net, loss=loss, stages=3),
    )  # fmt: skip
    assert result.epsilon <= 8.0
    assert all(layer.p == math.inf for layer in model.net)
    assert loss.decay == 0.0
    after = model.sensitivity().per_parameter
    # Means move weights by less at first, and nothing by more: 1/r + 2λ(1 - 1/C).
    assert all(before[name] <= bound for name, bound in after.items())
    assert max(after.values()) == pytest.approx(21.0, rel=1e-5)
    found = robustness.certify(model, data(), norm="inf")
    assert found.lipschitz == pytest.approx(1.0)


def test_without_privacy_a_layer_of_distances_learns_what_one_entry_says() -> None:
    loss = losses.TauCrossEntropy(16.0)
    model = made(loss)
    fit_without_privacy(
        model, data(256), epochs=20, batch_size=32, lr=0.02, progress=False, rng_seed=0, scheduler=relaxation(model)
    )
    found = robustness.certify(model, data(256), norm="inf")
    assert robustness.certified_accuracy(found, 0.0) > 0.9
    assert robustness.certified_accuracy(found, 0.05) > 0.6


def test_an_exponent_that_changes_within_a_pass_is_refused() -> None:
    model = made(losses.TauCrossEntropy())
    inputs, labels = data(4)
    total = model.loss(model(inputs), labels)
    set_exponent_(model, 9.0)
    with pytest.raises(PrivacyError, match="between a forward pass and its backward pass"):
        total.backward()


def test_what_is_no_schedule_is_refused() -> None:
    net = torch.nn.Sequential(DistanceLinear(2, 2))
    wrong = ({"first": 1.0}, {"last": math.inf}, {"first": math.inf}, {"loss": losses.TauCrossEntropy(1.0)})
    for options in (*wrong, {"until": 0.0}, {"stages": 1}):
        with pytest.raises(ConfigurationError):
            relaxation(net, **options)  # type: ignore[arg-type]
    for other in (torch.nn.Linear(2, 2), architectures.sort_mlp((4,), 2), None):
        with pytest.raises(ConfigurationError, match="DistanceLinear"):
            relaxation(other)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="quantile"):
        architectures.sort_mlp((4,), 2, p=8.0)
    with pytest.raises(ConfigurationError):
        architectures.sort_mlp((4,), 2, widths=(0,))
    with pytest.raises(ConfigurationError, match="widths"):
        architectures.sort_mlp((4,), 2, widths=5)  # type: ignore[arg-type]
