from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from scipy import stats
from torch import nn

from accounting import GaussianRelease, LaplaceRelease, LargeDeltaWarning, RDPAccountant
from clipless_dp import (
    CliplessDPOptimizer,
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    PoissonBatches,
    PrivacyError,
    PrivacyWarning,
    ReproducibleNoise,
    constraints,
    layers,
    losses,
)
from clipless_dp.noise import SystemNoise, allocation, effective_noise_multiplier
from clipless_dp.precision import coarse_products, full_precision
from tests.support import SETTINGS, NoNoise, gated_model, samples


def sgd(model: DPLipModel, **changes: object) -> CliplessDPSGD:
    return CliplessDPSGD(model, lr=1.0, **{**SETTINGS, **changes})  # type: ignore[arg-type]


def accumulate(model: DPLipModel, count: int = 10, seed: int = 0) -> None:
    inputs, targets = samples(count, seed)
    model.loss(model(inputs), targets).backward()


def test_a_step_without_noise_is_the_summed_gradient_over_the_expected_batch_size():
    model = gated_model()
    before = {name: p.detach().clone() for name, p in model.net.named_parameters()}
    optimizer = sgd(model, noise=NoNoise())
    accumulate(model, count=7)
    summed = {name: p.grad.clone() for name, p in model.net.named_parameters()}
    optimizer.step()
    for name, parameter in model.net.named_parameters():
        expected = before[name] - summed[name] / (0.25 * 40)
        torch.testing.assert_close(parameter.detach(), expected)


def measured_multiplier(optimizer: CliplessDPSGD, model: DPLipModel, rounds: int = 400) -> tuple[float, int]:
    """``σ_eff`` from the spread of the noise that steps on zero gradients apply, and how many numbers it rests on."""
    bounds = model.sensitivity().per_parameter
    squares = dict.fromkeys(bounds, 0.0)
    for _ in range(rounds):
        optimizer.zero_grad()
        optimizer.step()
        for name, parameter in model.net.named_parameters():
            squares[name] += float((parameter.grad * optimizer.expected_batch_size).square().sum())
    counts = {name: rounds * p.numel() for name, p in model.net.named_parameters()}
    deviations = [math.sqrt(squares[name] / counts[name]) for name in bounds]
    return effective_noise_multiplier(list(bounds.values()), deviations), min(counts.values())


def is_plausible(measured: float, planned: float, count: int) -> bool:
    """A standard deviation from ``n`` numbers has relative deviation ``1/√(2n)``; five of them is 6 in 10⁷."""
    return abs(measured / planned - 1.0) < 5.0 / math.sqrt(2 * count)


@pytest.mark.parametrize("allocation", ["global", "per-layer", "min-variance"])
def test_the_measured_noise_gives_back_the_noise_multiplier(allocation):
    model = gated_model(bias=False)
    measured, count = measured_multiplier(sgd(model, allocation=allocation), model)
    assert is_plausible(measured, 1.3, count)


def scaled_noise(factor):
    class Scaled(SystemNoise):
        def standard_normal_(self, out):
            return super().standard_normal_(out).mul_(factor)

    return Scaled()


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2, 0.9, 1.1], ids=["2/3", "3/2", "0.9", "1.1"])
def test_mutant_caught_noise_of_a_wrong_scale(factor):
    model = gated_model(bias=False)
    measured, count = measured_multiplier(sgd(model, noise=scaled_noise(factor)), model)
    assert not is_plausible(measured, 1.3, count)


def test_mutant_caught_no_noise():
    model = gated_model(bias=False)
    measured, count = measured_multiplier(sgd(model, noise=scaled_noise(1e-6)), model)
    assert not is_plausible(measured, 1.3, count)


def test_mutant_caught_sensitivity_off_by_the_batch_size(monkeypatch):
    model = gated_model(bias=False)
    honest = allocation.allocate

    def divided(bounds, sizes, sigma, scheme="global"):
        return honest([bound / 10 for bound in bounds], sizes, sigma, scheme)

    optimizer = sgd(model)
    monkeypatch.setattr(allocation, "allocate", divided)
    measured, count = measured_multiplier(optimizer, model)
    assert not is_plausible(measured, 1.3, count)
    assert optimizer.accountant.history[0][0] == pytest.approx(0.13, rel=1e-5), "the ledger must record what was used"


def noise_of_two_steps(optimizer: CliplessDPSGD, model: DPLipModel) -> list[torch.Tensor]:
    drawn = []
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step()
        drawn.append(torch.cat([p.grad.flatten().clone() for p in model.net.parameters()]))
    return drawn


def is_fresh(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Independent draws of ``n`` numbers have correlation of deviation ``1/√n``."""
    return abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 6 / math.sqrt(len(first))


@pytest.mark.parametrize("noise", [None, ReproducibleNoise(1)], ids=["system", "reproducible"])
def test_noise_is_drawn_anew_for_each_step(noise):
    model = gated_model()
    assert is_fresh(*noise_of_two_steps(sgd(model, noise=noise), model))


def test_mutant_caught_fixed_seed():
    class Fixed(ReproducibleNoise):
        def begin_step(self, step):
            super().begin_step(0)

    model = gated_model()
    assert not is_fresh(*noise_of_two_steps(sgd(model, noise=Fixed(1)), model))


@pytest.mark.parametrize("noise", [None, ReproducibleNoise(1)], ids=["system", "reproducible"])
def test_noise_of_different_parameters_is_independent(noise):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    model = DPLipModel(
        net, input_shape=(40,), input_norm=1.0, loss=losses.TauCrossEntropy(), constraint=constraints.Spectral()
    )
    optimizer = sgd(model, noise=noise)
    optimizer.step()
    assert is_fresh(*(p.grad.flatten() for p in net.parameters()))


def test_the_applied_noise_is_gaussian():
    model = gated_model()
    optimizer = sgd(model)
    drawn = []
    for _ in range(100):
        optimizer.zero_grad()
        optimizer.step()
        drawn.append(model.net.get_parameter("0.weight").grad.flatten().clone())
    numbers = torch.cat(drawn) * optimizer.expected_batch_size
    scale = 1.3 * model.sensitivity().total
    # Fails by chance once in 10⁶ runs.
    assert stats.kstest((numbers / scale).numpy(), "norm").pvalue > 1e-6


def test_the_event_is_recorded_before_the_weights_change():
    model = gated_model()

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("power cut")

    optimizer = CliplessDPOptimizer(model, Failing(model.net.parameters(), lr=1.0), **SETTINGS)
    with pytest.raises(RuntimeError, match="power cut"):
        optimizer.step()
    assert optimizer.accountant.history == [(1.3, 0.25, 1)]


def test_equal_steps_are_one_line_in_the_ledger_even_when_bounds_move():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
    optimizer = sgd(model, allocation="min-variance")
    totals = set()
    for _ in range(5):
        accumulate(model)
        totals.add(model.sensitivity().total)
        optimizer.step()
        optimizer.zero_grad()
    assert len(totals) == 5, "unconstrained bounds follow the weights"
    assert optimizer.accountant.history == [(1.3, 0.25, 5)]


def test_a_noise_schedule_is_recorded_step_by_step():
    model = gated_model()
    optimizer = sgd(model)
    for sigma in (2.0, 2.0, 1.0):
        optimizer.noise_multiplier = sigma
        optimizer.step()
    assert optimizer.accountant.history == [(2.0, 0.25, 2), (1.0, 0.25, 1)]


def test_micro_batches_accumulate_to_the_same_step_as_one_batch():
    inputs, targets = samples(12)
    results = []
    for pieces in (1, 4):
        model = gated_model()
        optimizer = sgd(model, noise=ReproducibleNoise(0))
        for some_inputs, some_targets in zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True):
            model.loss(model(some_inputs), some_targets).backward()
        optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.net.parameters()]))
    torch.testing.assert_close(*results)


def test_a_frozen_parameter_leaves_the_sensitivity_and_never_moves():
    model = gated_model()
    whole = model.sensitivity().total
    optimizer = sgd(model)
    accumulate(model)
    frozen = model.net.get_parameter("0.weight")
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    with pytest.raises(PrivacyError, match="requires_grad"):
        optimizer.step()
    optimizer.skip_draw()
    accumulate(model)
    optimizer.step()
    assert "0.weight" not in model.sensitivity().per_parameter
    assert model.sensitivity().total < whole
    assert torch.equal(frozen, before), "a gradient left from before freezing must not be applied"


def test_an_unused_parameter_is_never_moved_even_if_it_has_a_gradient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(6, 3)
            self.unused = nn.Linear(6, 3)

        def forward(self, values):
            return self.used(values)

    torch.manual_seed(0)
    net = Net()
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
    before = net.unused.weight.detach().clone()
    optimizer = sgd(model)
    optimizer.step()
    assert torch.equal(net.unused.weight, before)
    net.unused.weight.grad = torch.ones_like(net.unused.weight)
    with pytest.raises(PrivacyError, match="something else than passes"):
        optimizer.step()
    optimizer.step()
    assert torch.equal(net.unused.weight, before)


def test_a_parameter_without_a_gradient_still_gets_noise():
    model = gated_model()
    before = model.net.get_parameter("2.weight").detach().clone()
    sgd(model).step()
    assert not torch.equal(model.net.get_parameter("2.weight"), before)


def test_parameters_that_the_model_does_not_protect_are_refused():
    model = gated_model()
    foreign = nn.Parameter(torch.zeros(5))
    with pytest.raises(PrivacyError, match=r"\(5,\)"):
        CliplessDPOptimizer(model, torch.optim.SGD([*model.net.parameters(), foreign], lr=0.1), **SETTINGS)
    optimizer = sgd(model)
    with pytest.raises(PrivacyError, match="no bound"):
        optimizer.add_param_group({"params": [foreign]})


def test_parameter_groups_and_schedulers_work():
    model = gated_model()
    base = torch.optim.SGD([{"params": [model.net.get_parameter("0.weight")], "lr": 0.5}], lr=0.1)
    optimizer = CliplessDPOptimizer(model, base, **SETTINGS)
    optimizer.add_param_group({"params": [model.net.get_parameter("2.weight")]})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in base.param_groups] == pytest.approx([0.05, 0.01])


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_first_order_optimizers_can_be_wrapped(base):
    model = gated_model()
    optimizer = CliplessDPOptimizer(model, base(model.net.parameters(), lr=0.01), **SETTINGS)
    before = model.net.get_parameter("0.weight").detach().clone()
    accumulate(model)
    optimizer.step()
    assert not torch.equal(model.net.get_parameter("0.weight"), before)


def test_a_closure_is_evaluated_once_and_its_value_returned():
    model = gated_model()
    inputs, targets = samples(5)
    calls = []

    def closure():
        loss = model.loss(model(inputs), targets)
        loss.backward()
        calls.append(float(loss.detach()))
        return calls[-1]

    assert sgd(model).step(closure) == calls[0]
    assert len(calls) == 1


def test_lbfgs_is_refused():
    model = gated_model()
    with pytest.raises(ConfigurationError, match="LBFGS"):
        CliplessDPOptimizer(model, torch.optim.LBFGS(model.net.parameters()), **SETTINGS)


def test_grad_scaler_is_refused_with_the_reason():
    model = gated_model()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    inputs, targets = samples(5)
    scaler.scale(model.loss(model(inputs), targets)).backward()
    with pytest.raises(PrivacyError, match="GradScaler"):
        scaler.step(optimizer)
    assert len(optimizer.accountant.history) == 0


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, "1"])
def test_a_noise_multiplier_out_of_range_is_refused(sigma):
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        sgd(gated_model(), noise_multiplier=sigma)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, math.nan])
def test_a_sample_rate_out_of_range_is_refused(rate):
    with pytest.raises(ConfigurationError, match="sample_rate"):
        sgd(gated_model(), sample_rate=rate)


@pytest.mark.parametrize("changes", [{"dataset_size": 0}, {"dataset_size": 2.5}, {"sampling": "shuffled"}])
def test_other_arguments_out_of_range_are_refused(changes):
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        sgd(gated_model(), **changes)


def test_constraints_hold_after_every_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = DPLipModel(
        net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(), constraint=constraints.Spectral()
    )
    optimizer = sgd(model, noise_multiplier=20.0)
    for _ in range(3):
        accumulate(model)
        optimizer.step()
        for layer in (net[0], net[2]):
            # float64 SVD of the stored matrix; its own rounding is below 1e-14.
            assert torch.linalg.matrix_norm(layer.weight.detach().double(), ord=2) <= 1.0 + 1e-14


def test_announced_poisson_draws_are_amplified_and_anything_else_is_not():
    model = gated_model()
    optimizer = sgd(model, sampling="announced")
    for inputs, targets, mask in PoissonBatches(samples(40), sample_rate=0.25, steps=3):
        optimizer.zero_grad()
        model.loss(model(inputs), targets, mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.3, 0.25, 3)]
    with pytest.warns(PrivacyWarning, match="q = 1"):
        optimizer.step()
    assert optimizer.accountant.history == [(1.3, 0.25, 3), (1.3, 1.0, 1)]


def test_draws_from_before_the_optimizer_existed_do_not_count():
    list(PoissonBatches(samples(40), sample_rate=0.25, steps=5))
    optimizer = sgd(gated_model(), sampling="announced")
    with pytest.warns(PrivacyWarning, match="q = 1"):
        optimizer.step()


def test_a_draw_of_a_higher_rate_than_declared_is_refused_before_anything_is_released():
    model = gated_model()
    optimizer = sgd(model, sampling="announced")
    before = model.net.get_parameter("0.weight").detach().clone()
    batch = next(iter(PoissonBatches(samples(40), sample_rate=0.5, steps=1)))
    optimizer.accumulate(batch)
    with pytest.raises(PrivacyError, match=r"sample rate 0\.5"):
        optimizer.step()
    assert torch.equal(model.net.get_parameter("0.weight"), before)


def test_sampling_none_charges_full_batches():
    optimizer = sgd(gated_model(), sampling="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.accountant.history == [(1.3, 1.0, 1)]


def test_the_state_round_trips_through_a_file_read_with_weights_only(tmp_path):
    model = gated_model()
    optimizer = CliplessDPOptimizer(model, torch.optim.Adam(model.net.parameters(), lr=0.1), **SETTINGS)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = CliplessDPOptimizer(model, torch.optim.Adam(model.net.parameters(), lr=0.1), **SETTINGS)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.accountant.history == optimizer.accountant.history
    assert other.steps_taken == 1
    assert other.get_epsilon(1e-5) == optimizer.get_epsilon(1e-5)
    first = model.net.get_parameter("0.weight")
    torch.testing.assert_close(other.state[first]["exp_avg"], optimizer.state[first]["exp_avg"])


def test_loading_an_older_state_never_forgets_what_was_spent():
    model = gated_model()
    optimizer = sgd(model)
    optimizer.step()
    early = optimizer.state_dict()
    for _ in range(4):
        optimizer.step()
    spent = optimizer.get_epsilon(1e-5)
    optimizer.load_state_dict(early)
    assert optimizer.get_epsilon(1e-5) >= spent


def test_one_off_releases_in_the_ledger_are_saved_loaded_and_never_lost():
    model = gated_model()
    optimizer = sgd(model)
    optimizer.accountant.record(LaplaceRelease(4.0))
    optimizer.step()
    early = optimizer.state_dict()
    optimizer.step()
    optimizer.accountant.record(GaussianRelease(9.0))
    spent = optimizer.get_epsilon(1e-5)
    optimizer.load_state_dict(early)
    assert optimizer.get_epsilon(1e-5) == spent
    other = sgd(model)
    other.accountant.record(GaussianRelease(7.0))
    other.load_state_dict(optimizer.state_dict())
    assert [event.kind for event, _ in other.accountant.ledger] == [
        "laplace_release", "gaussian_step", "gaussian_release", "gaussian_release"
    ]  # fmt: skip
    assert other.get_epsilon(1e-5) > spent


def test_a_release_made_again_before_resuming_counts_again_however_alike_it_looks():
    first = sgd(gated_model())
    first.accountant.record(LaplaceRelease(4.0))
    unstarted = first.state_dict()
    first.step()
    state = first.state_dict()
    resumed = sgd(gated_model())
    resumed.accountant.record(LaplaceRelease(4.0))
    resumed.load_state_dict(state)
    assert sum(count for event, count in resumed.accountant.ledger if event.kind == "laplace_release") == 2
    fresh = sgd(gated_model())
    fresh.accountant.record(LaplaceRelease(4.0))
    fresh.load_state_dict(unstarted)
    assert len(fresh.accountant.ledger) == 2
    first.load_state_dict(unstarted)
    assert len(first.accountant.ledger) == 2  # its own state: the release is the same, and the step stays


def test_a_state_without_a_ledger_is_refused():
    model = gated_model()
    plain = torch.optim.SGD(model.net.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="ledger"):
        sgd(model).load_state_dict(plain.state_dict())


def test_an_accountant_object_may_be_given():
    accountant = RDPAccountant()
    optimizer = sgd(gated_model(), accountant=accountant)
    optimizer.step()
    assert optimizer.get_epsilon(1e-5) == float(accountant.get_epsilon(1e-5))


def test_a_network_with_nothing_to_train_is_refused_at_the_step():
    model = gated_model()
    for parameter in model.net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(PrivacyError, match="nothing to train"):
        sgd(model).step()


def test_a_gate_lowered_between_backward_and_step_still_counts_with_its_old_value():
    model = gated_model()
    optimizer = sgd(model)
    before = model.sensitivity().total
    accumulate(model)
    for module in model.net.modules():
        if isinstance(module, layers.CotangentGate):
            module.limit = 0.01
    assert model.sensitivity().total < before / 10
    optimizer.step()
    drawn = torch.cat([p.grad.flatten() for p in model.net.parameters()]) * optimizer.expected_batch_size
    # 83 numbers of deviation 1.3·before, plus gradients; the new bounds would give a fiftieth of that.
    assert float(drawn.std()) > 0.5 * 1.3 * before


def test_coarser_float32_products_are_refused_before_anything_is_released():
    model = gated_model()
    optimizer = sgd(model)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(PrivacyError, match="set_float32_matmul_precision"):
            optimizer.step()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert optimizer.accountant.history == []


def test_tf32_convolutions_are_refused_on_cuda():
    assert torch.backends.cudnn.allow_tf32, "torch's default"
    assert "allow_tf32" in str(coarse_products(torch.device("cuda")))
    assert coarse_products(torch.device("cpu")) is None
    with full_precision():
        assert coarse_products(torch.device("cuda")) is None
    assert torch.backends.cudnn.allow_tf32


FINE = ["mkldnn.fp32_precision", "mkldnn.matmul.fp32_precision", "mkldnn.conv.fp32_precision", "fp32_precision"]


@pytest.mark.parametrize(
    ("value", "setting"),
    [("bf16", FINE[0])]
    + [
        pytest.param(value, name, marks=pytest.mark.slow)
        for value in ("bf16", "tf32")
        for name in FINE
        if (value, name) != ("bf16", FINE[0])
    ],
)
def test_finer_settings_of_precision_are_refused_and_put_back(setting, value):
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the old settings only")
    # In a process of its own: torch does not go back to the old settings once these were used.
    code = f"""
import torch
from clipless_dp.precision import coarse_products, full_precision
assert coarse_products(torch.device("cpu")) is None
torch.backends.{setting} = "{value}"
found = coarse_products(torch.device("cpu"))
assert found is not None and "fp32_precision = 'ieee'" in found, found
with full_precision():
    assert coarse_products(torch.device("cpu")) is None
    assert coarse_products(torch.device("cuda")) is None
assert coarse_products(torch.device("cpu")) == found
torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "ieee"
assert coarse_products(torch.device("cpu")) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_products_that_the_environment_makes_coarse_are_refused(monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(PrivacyError, match="ONEDNN_DEFAULT_FPMATH_MODE"):
        gated_model().sensitivity()
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "strict")
    assert gated_model().sensitivity().total > 0.0


def test_a_gradient_from_before_the_optimizer_existed_is_not_released():
    model = gated_model()
    weight = model.net.get_parameter("0.weight")
    weight.grad = torch.full_like(weight, 1e6)
    optimizer = sgd(model, noise=NoNoise())
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)


def test_gradients_that_pile_up_on_parameters_of_no_optimizer_are_not_released_later():
    model = gated_model()
    head, body = model.net.get_parameter("2.weight"), model.net.get_parameter("0.weight")
    first = CliplessDPOptimizer(model, torch.optim.SGD([head], lr=0.1), **SETTINGS)
    for _ in range(3):
        first.zero_grad()
        accumulate(model)
        first.step()
        assert body.grad is None
    first.add_param_group({"params": [body]})
    assert body.grad is None


def test_a_parameter_that_is_added_behind_the_optimizers_back_is_refused_at_the_step():
    optimizer = sgd(gated_model())
    optimizer.base_optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(5))]})
    with pytest.raises(PrivacyError, match=r"\(5,\)"):
        optimizer.step()
    assert optimizer.accountant.history == []


def test_models_trained_in_turns_take_their_own_draws():
    optimizers = [sgd(gated_model(seed=seed), sampling="announced") for seed in (0, 1)]
    batches = [iter(PoissonBatches(samples(40), sample_rate=0.25, steps=3)) for _ in optimizers]
    for _ in range(3):
        for optimizer, drawn in zip(optimizers, batches, strict=True):
            optimizer.accumulate(next(drawn))
            optimizer.step()
            optimizer.zero_grad()
    assert all(optimizer.accountant.history == [(1.3, 0.25, 3)] for optimizer in optimizers)


@pytest.mark.parametrize("sampling", ["announced", "poisson", "none"])
@pytest.mark.parametrize("clears_first", [True, False])
def test_gradients_of_several_draws_in_one_step_are_refused(sampling, clears_first):
    model = gated_model()
    optimizer = sgd(model, sampling=sampling)
    batches = iter(PoissonBatches(samples(40), sample_rate=0.25, steps=9))

    def accumulated(draws):
        for index in range(draws):
            inputs, targets, mask = next(batches)
            if clears_first and index == 0:
                optimizer.zero_grad()
            model.loss(model(inputs), targets, mask).backward()
        optimizer.step()
        if not clears_first:
            optimizer.zero_grad()

    accumulated(1)
    with pytest.raises(PrivacyError, match="2 Poisson draws"):
        accumulated(2)
    assert len(optimizer.accountant) == 1
    optimizer.zero_grad()


def test_a_draw_that_was_only_looked_at_without_gradients_is_forgotten():
    model = gated_model()
    optimizer = sgd(model, sampling="announced")
    with torch.no_grad():
        next(iter(PoissonBatches(samples(40), sample_rate=0.25, steps=3)))
    for inputs, targets, mask in PoissonBatches(samples(40), sample_rate=0.25, steps=3):
        optimizer.zero_grad()
        model.loss(model(inputs), targets, mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.3, 0.25, 3)]


def test_steps_of_another_run_are_not_mistaken_for_the_beginning_of_a_loaded_ledger():
    former = sgd(gated_model())
    for _ in range(10):
        former.step()
    optimizer = sgd(gated_model(seed=1))
    for _ in range(5):
        optimizer.step()
    optimizer.load_state_dict(former.state_dict())
    assert optimizer.accountant.history == [(1.3, 0.25, 15)]
    later = sgd(gated_model())
    later.load_state_dict(former.state_dict())
    later.step()
    former.load_state_dict(later.state_dict())
    assert former.accountant.history == [(1.3, 0.25, 11)]


def test_going_back_to_an_earlier_state_keeps_the_ledger_as_it_is():
    optimizer = sgd(gated_model())
    optimizer.step()
    early = optimizer.state_dict()
    for _ in range(3):
        optimizer.step()
        optimizer.load_state_dict(early)
    assert optimizer.accountant.history == [(1.3, 0.25, 4)]


def test_two_continuations_of_one_state_are_both_counted():
    start = sgd(gated_model())
    start.step()
    first, second = sgd(gated_model()), sgd(gated_model())
    for optimizer in (first, second):
        optimizer.load_state_dict(start.state_dict())
        optimizer.step()
    first.load_state_dict(second.state_dict())
    assert len(first.accountant) >= 3


@pytest.mark.parametrize("damage", ["steps_taken", "accountant", "noise"])
def test_an_incomplete_ledger_is_refused_and_the_own_one_kept(damage):
    optimizer = sgd(gated_model())
    optimizer.step()
    state = optimizer.state_dict()
    del state["clipless_dp"][damage]
    with pytest.raises(ConfigurationError, match=damage):
        optimizer.load_state_dict(state)
    assert optimizer.accountant.history == [(1.3, 0.25, 1)]


def test_training_on_with_a_ledger_of_its_own_warns_that_epsilon_leaves_out_the_former():
    model = gated_model()
    former = sgd(model)
    former.step()
    with pytest.warns(PrivacyWarning, match="accountant=other.accountant"):
        sgd(model).step()
    model = gated_model()
    former = sgd(model)
    former.step()
    shared, resumed = sgd(model, accountant=former.accountant), sgd(model)
    resumed.load_state_dict(former.state_dict())
    resumed.step()
    fresh = gated_model()
    first = sgd(fresh)
    first.step()
    sgd(fresh, accountant=first.accountant).step()
    assert len(first.accountant) == 2
    assert len(resumed.accountant) == 2
    assert len(shared.accountant) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copying_an_optimizer_is_refused_in_favour_of_its_state(copied):
    with pytest.raises(ConfigurationError, match="state_dict"):
        copied(sgd(gated_model()))


def test_a_delta_above_one_over_the_data_set_warns():
    optimizer = sgd(gated_model())
    optimizer.step()
    with pytest.warns(LargeDeltaWarning, match="1/40"):
        optimizer.get_epsilon(0.1)


@pytest.mark.parametrize(
    "build",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=4),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=2),
    ],
    ids=["one-cycle", "cyclic"],
)
def test_schedulers_that_cycle_momentum_reach_the_base_optimizer(build):
    optimizer = sgd(gated_model(), momentum=0.9)
    scheduler = build(optimizer)
    seen = set()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        seen.add((optimizer.base_optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    assert len(seen) >= 3


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"maximize": True}])
def test_variants_of_the_base_optimizer_step_on_the_private_gradient(options):
    model = gated_model()
    optimizer = CliplessDPOptimizer(model, torch.optim.SGD(model.net.parameters(), lr=1.0, **options), **SETTINGS)
    before = [p.detach().clone() for p in model.net.parameters()]
    optimizer.zero_grad(set_to_none=False)
    accumulate(model)
    optimizer.step()
    sign = 1.0 if "maximize" in options else -1.0
    for old, parameter in zip(before, model.net.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), old + sign * parameter.grad)


def test_a_parameter_group_added_between_steps_is_trained_with_noise():
    model = gated_model()
    first, second = model.net.get_parameter("0.weight"), model.net.get_parameter("2.weight")
    optimizer = CliplessDPOptimizer(model, torch.optim.SGD([first], lr=0.1), **SETTINGS)
    optimizer.step()
    before = second.detach().clone()
    optimizer.add_param_group({"params": second})
    optimizer.step()
    assert not torch.equal(second, before)
    assert optimizer.accountant.history == [(1.3, 0.25, 2)]


REFERENCES = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
    "weight decay": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("build", REFERENCES.values(), ids=REFERENCES)
def test_momentum_decay_and_adam_see_the_private_gradient_and_nothing_else(build):
    model, reference = gated_model(), gated_model().net
    optimizer = CliplessDPOptimizer(model, build(model.net.parameters()), **SETTINGS)
    plain = build(reference.parameters())
    for step in range(4):
        optimizer.zero_grad()
        accumulate(model, seed=step)
        optimizer.step()
        # What step() leaves in the gradients is what was released: noisy, and divided by the public size.
        for parameter, released in zip(reference.parameters(), model.net.parameters(), strict=True):
            parameter.grad = released.grad.clone()
        plain.step()
    for parameter, released in zip(reference.parameters(), model.net.parameters(), strict=True):
        assert torch.equal(parameter, released)
    assert optimizer.accountant.history == [(1.3, 0.25, 4)]


def test_a_parameter_frozen_and_thawed_during_training_is_charged_and_moved_only_while_it_is_trained():
    model = gated_model()
    optimizer = CliplessDPOptimizer(
        model, torch.optim.Adam(model.net.parameters(), lr=0.1, weight_decay=0.1), **SETTINGS
    )
    weight, total = model.net.get_parameter("0.weight"), model.sensitivity().total
    for trained in (True, False, True):
        weight.requires_grad_(trained)
        before = weight.detach().clone()
        optimizer.zero_grad()
        accumulate(model)
        assert (model.sensitivity().total == total) == trained
        optimizer.step()
        # Decay and Adam's moments must leave a frozen weight alone too.
        assert torch.equal(weight, before) != trained
    assert optimizer.accountant.history == [(1.3, 0.25, 3)]


def test_learning_rates_are_recorded_step_by_step_and_go_with_the_state():
    model = gated_model()
    base = torch.optim.SGD(
        [{"params": [p], "lr": rate} for p, rate in zip(model.net.parameters(), (1, 2, 3, 4), strict=True)]
    )
    first = CliplessDPOptimizer(model, base, **SETTINGS)
    halving = torch.optim.lr_scheduler.StepLR(first, step_size=2, gamma=0.5)
    for _ in range(3):
        accumulate(model)
        first.step()
        halving.step()
    expected = [((1.0, 2.0, 3.0, 4.0), 2), ((0.5, 1.0, 1.5, 2.0), 1)]
    assert first.learning_rates == expected
    second = CliplessDPOptimizer(model, torch.optim.SGD(model.net.parameters(), lr=1.0), **SETTINGS)
    state = first.state_dict()
    state["param_groups"] = second.state_dict()["param_groups"]
    second.load_state_dict(state)
    assert second.learning_rates == expected
    assert sum(count for _, count in second.learning_rates) == second.steps_taken
    del state["clipless_dp"]["learning_rates"]
    second.load_state_dict(state)
    assert second.learning_rates == []


def test_a_parameter_replaced_between_steps_is_refused_before_anything_is_released():
    model = gated_model()
    optimizer = sgd(model)
    accumulate(model)
    optimizer.step()
    layer = model.net.get_submodule("0")
    new = nn.Parameter(layer.weight.detach().clone())
    layer.weight = new
    for group in optimizer.param_groups:
        group["params"] = [new if p.shape == new.shape else p for p in group["params"]]
    with pytest.raises(PrivacyError, match="added or replaced"):
        accumulate(model)
    with pytest.raises(PrivacyError, match="added or replaced"):
        optimizer.step()
    assert optimizer.steps_taken == len(optimizer.accountant) == 1


def two_optimizers(**changes):
    """One of each layer, and draws for both."""
    model = gated_model()
    parameters = list(model.net.parameters())
    settings = {"noise_multiplier": 1.0, "sample_rate": 0.5, "dataset_size": 100, "accountant": RDPAccountant()}
    pair = [
        CliplessDPOptimizer(model, torch.optim.SGD(part, lr=0.1), **{**settings, **changes})
        for part in (parameters[:2], parameters[2:])
    ]
    return model, pair, iter(PoissonBatches(samples(100), sample_rate=0.5, steps=8))


def test_a_second_optimizer_whose_gradients_the_first_took_is_refused_before_it_is_charged():
    model, (first, second), batches = two_optimizers()
    first.accumulate(next(batches))
    first.step()
    before = [parameter.detach().clone() for parameter in model.net.parameters()]
    with pytest.raises(ConfigurationError, match="one optimizer of all parameters"):
        second.step()
    assert len(second.accountant) == 1
    assert all(map(torch.equal, before, model.net.parameters()))
    assert second.steps_taken == 0


def test_a_vouched_step_after_another_optimizers_warns_that_it_is_noise_alone():
    _, (first, second), batches = two_optimizers(sampling="poisson")
    first.accumulate(next(batches))
    first.step()
    with pytest.warns(PrivacyWarning, match="noise alone"):
        second.step()
    assert len(second.accountant) == 2


def test_optimizers_that_each_step_on_a_draw_of_their_own_go_on_empty_draws_among_them():
    _, (first, second), batches = two_optimizers()
    for _ in range(2):
        for optimizer in (first, second):
            optimizer.accumulate(next(batches))
            optimizer.step()
    first.accumulate(next(batches))
    first.step()
    # A draw whose rows are not passed back, as is right for an empty one.
    drawn = next(iter(PoissonBatches(samples(2), sample_rate=1e-9, steps=1)))
    assert not bool(drawn.mask.any())
    second.step()
    assert len(first.accountant) == 6


def test_an_optimizer_that_comes_after_one_that_is_done_steps_as_any_other():
    model, (first, _), batches = two_optimizers()
    first.accumulate(next(batches))
    first.step()
    later = sgd(model, accountant=first.accountant, sample_rate=0.5, dataset_size=100)
    later.accumulate(next(batches))
    later.step()
    assert len(first.accountant) == 2
