from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from accounting import create_accountant
from clipless_dp import (
    ConfigurationError,
    DPLipModel,
    PoissonBatches,
    ReproducibleNoise,
    ShiftAndFlip,
    fit,
    gated,
    gradient_gated,
    losses,
)
from clipless_dp.training import Watcher, sizing, watched_by
from clipless_dp.training.memory import rows_within, traffic
from tests.support import gated_model, samples

CPU = torch.device("cpu")
RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 2, "batch_size": 90, "lr": 0.5, "progress": False, "accountant": "rdp"}
# A usual draw of 90 out of 300 takes 4 kB, its activations several times that at once.
BUDGET = 12_000


def weights(model: DPLipModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.net.parameters()])


def image_model() -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))
    return DPLipModel(
        gated(net, cotangent_mode="normalize"), input_shape=(1, 7, 7), input_norm=3.0, loss=losses.TauCrossEntropy(4.0)
    )


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 7, 7, generator=generator), torch.arange(count) % 3


def test_traffic_counts_what_is_held_at_once_and_what_stays() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.float64)
        second = torch.empty(500, dtype=torch.float64)
        del first
        third = torch.empty(250, dtype=torch.float64)
        del second
        return third

    measured = traffic(run, CPU)
    # The allocator rounds nothing up on the CPU.
    assert (measured.kept, measured.peak) == (2000, 12_000)
    assert measured.result.numel() == 250


def test_traffic_sees_inside_of_operations() -> None:
    square = torch.ones(64, 64, dtype=torch.float64)
    # An eigendecomposition returns 64 numbers and works on a copy of the matrix.
    assert traffic(lambda: torch.linalg.eigvalsh(square), CPU).peak > 64 * 64 * 8


def test_a_device_that_keeps_no_count_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be measured"):
        traffic(lambda: None, torch.device("meta"))


@pytest.mark.parametrize(
    "peak",
    [
        lambda rows: 500.0 + 10.0 * rows,
        lambda rows: 100.0 * math.sqrt(rows),
        lambda rows: 0.02 * rows**2,
        lambda rows: 2000.0 * math.ceil(rows / 100),
        lambda rows: 10.0 * rows if rows < 77 else math.inf,
    ],
    ids=["line", "root", "square", "stairs", "out of memory"],
)
@pytest.mark.parametrize("budget", [300, 600, 3000, 5999, 100_000])
@pytest.mark.parametrize("most", [1, 5, 8, 9, 333, 4096])
def test_the_rows_found_fit_and_a_sixteenth_more_would_not(peak, budget, most) -> None:
    tried = []

    def measured(rows: int) -> float:
        tried.append(rows)
        return float(peak(rows))

    found = rows_within(budget, measured, most)
    assert len(tried) <= 16
    if found == 0:
        assert peak(1) > budget
        return
    assert found in tried
    assert peak(found) <= budget
    assert found == most or peak(found + max(1, math.ceil(found / 15))) > budget or budget - peak(found) < budget / 8


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}], ids=["plain", "ema"])
def test_a_budget_splits_draws_and_changes_the_run_by_rounding_only(options) -> None:
    results, trained = [], []
    for budget in (None, BUDGET):
        model = gated_model()
        results.append(fit(model, samples(300), memory_budget=budget, reproducible_seed=1, **RUN, **options))
        trained.append(weights(model))
    whole, split = results
    assert whole.micro_batch_size is None
    assert 4 <= split.micro_batch_size <= 64, "at least two pieces of a usual draw of 128 rows"
    # One event for each draw, however many pieces it was processed in.
    assert split.optimizer.accountant.history == [(whole.noise_multiplier, 90 / 300, 7)]
    # Seven steps of float32 sums in another order; noise once more in any step would be a hundred times as much.
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


def test_the_noise_of_a_split_draw_enters_once() -> None:
    drawn = []

    class Counting(ReproducibleNoise):
        def standard_normal_(self, out: torch.Tensor) -> torch.Tensor:
            # Six numbers are what a source is tried by.
            drawn.append(out.numel() if out.numel() > 6 else 0)
            return super().standard_normal_(out)

    model = gated_model()
    result = fit(model, samples(300), memory_budget=BUDGET, noise=Counting(1), **RUN)
    assert sum(drawn) == result.steps * len(weights(model))


@pytest.mark.parametrize("gates", [gated, gradient_gated])
def test_the_sum_over_pieces_is_the_gradient_of_the_draw(gates) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))
    model = DPLipModel(gates(net), input_shape=(1, 7, 7), input_norm=3.0, loss=losses.TauCrossEntropy(4.0)).double()
    inputs, targets = images(50)
    (batch,) = PoissonBatches((inputs.double(), targets), sample_rate=1.0, steps=1, physical_batch_size=64)
    gradients = []
    for rows in (64, 16, 7):
        model.zero_grad()
        for piece in batch.split(rows):
            model.loss(model(piece.inputs), piece.targets, piece.mask).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.net.parameters()]))
    # Sums of 50 terms in float64, in another order.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-12, atol=1e-13)


def test_views_of_a_split_draw_fit_the_budget_and_are_accounted_once() -> None:
    result = fit(image_model(), images(300), memory_budget=150_000, augment=ShiftAndFlip(1), multiplicity=3, **RUN)
    assert 8 <= result.micro_batch_size < 128
    assert result.optimizer.accountant.history == [(result.noise_multiplier, 0.3, 7)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Dynamo.*:UserWarning")
def test_a_compiled_split_run_equals_an_eager_one_and_compiles_once() -> None:
    trained = []
    for compile in (False, "aot_eager"):
        torch._dynamo.reset()
        counters.clear()
        model = gated_model()
        result = fit(model, samples(300), memory_budget=BUDGET, compile=compile, reproducible_seed=1, **RUN)
        assert 4 <= result.micro_batch_size <= 64
        trained.append(weights(model))
    # Passes over zeros of several sizes, by which the rows were chosen, included.
    assert counters["stats"]["unique_graphs"] == 1
    # Seven steps of float32 sums, in pieces of another size.
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


def test_steps_stay_within_the_budget() -> None:
    peaks = []
    budget = 400_000

    class Measuring(Watcher):
        def before_step(self, run, batch):
            size = run.micro_batch_size
            run.optimizer.zero_grad()
            with run.model.register.rehearsing():
                measured = traffic(lambda: run.optimizer.accumulate(batch, micro_batch_size=size, loss=run.loss), CPU)
            held = sum(part.numel() * part.element_size() for part in batch)
            peaks.append((measured.peak + held, size, len(batch.mask)))

    with watched_by(Measuring()):
        result = fit(image_model(), images(1000), memory_budget=budget, **{**RUN, "batch_size": 300})
    assert all(peak <= budget and size == result.micro_batch_size for peak, size, _ in peaks)
    assert max(peak for peak, _, _ in peaks) > budget / 4, "the budget is used"
    assert all(rows % result.micro_batch_size == 0 for _, _, rows in peaks), "micro-batches of one size"


def test_only_zeros_are_seen_while_rows_are_chosen(monkeypatch) -> None:
    seen = []
    honest = sizing.traffic

    def watching(run, device):
        forward = model.forward

        def recording(inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs)
            return forward(inputs)

        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", recording)
            return honest(run, device)

    model = gated_model()
    state = torch.get_rng_state()
    monkeypatch.setattr(sizing, "traffic", watching)
    with pytest.warns(UserWarning, match="contributed nothing"):
        fit(model, (torch.full((300, 6), math.nan), torch.zeros(300, dtype=torch.int64)), memory_budget=BUDGET, **RUN)
    assert torch.equal(state, torch.get_rng_state())
    assert len(seen) > 3
    assert not any(inputs.any() for inputs in seen)


def test_a_budget_below_one_row_is_refused_before_anything_is_spent() -> None:
    model = gated_model()
    before = weights(model)
    accountant = create_accountant("rdp")
    with pytest.raises(ConfigurationError, match=r"one row .* bytes, .* of 128 rows"):
        fit(model, samples(300), memory_budget=1000, **{**RUN, "accountant": accountant})
    assert len(accountant) == 0
    assert torch.equal(weights(model), before)
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf, "1 GB"])
def test_budgets_that_are_no_number_of_bytes_are_refused(budget) -> None:
    with pytest.raises(ConfigurationError, match="number of bytes"):
        fit(gated_model(), samples(300), memory_budget=budget, **RUN)


def test_a_budget_and_a_size_contradict() -> None:
    with pytest.raises(ConfigurationError, match="give one of them"):
        fit(gated_model(), samples(300), memory_budget=1e9, micro_batch_size=8, **RUN)


def test_data_is_freed_once_a_run_is_over_and_its_result_is_gone() -> None:
    def trained() -> weakref.ref[torch.Tensor]:
        rows, labels = samples(300)
        fit(gated_model(), (rows, labels), **RUN)
        return weakref.ref(rows)

    trained()  # the first optimizer of a process imports modules, whose errors hold their callers
    gc.collect()
    gc.disable()
    try:
        # Graphs of a model refer to themselves and wait for the collector; two gigabytes of features must not.
        assert trained()() is None
    finally:
        gc.enable()
