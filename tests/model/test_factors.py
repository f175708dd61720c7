"""The factor that arrives at the summed loss is public: one number, whatever the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, ConfigurationError, DPLipModel, PoissonBatches, PrivacyError, losses
from clipless_dp.model.factors import Factors
from clipless_dp.sampling import Batch

ROWS, RATE = 64, 0.5


def model_of() -> DPLipModel:
    torch.manual_seed(0)
    return DPLipModel(nn.Linear(8, 3), input_shape=(8,), input_norm=1.0, loss=losses.TauCrossEntropy())


def sgd(model: DPLipModel) -> CliplessDPSGD:
    return CliplessDPSGD(model, 0.1, noise_multiplier=1.0, sample_rate=RATE, dataset_size=ROWS)


def batches(steps: int = 3) -> PoissonBatches:
    torch.manual_seed(1)
    data = torch.randn(ROWS, 8), torch.randint(3, (ROWS,))
    return PoissonBatches(data, sample_rate=RATE, steps=steps, physical_batch_size=ROWS)


def loss_of(model: DPLipModel, batch: Batch) -> Tensor:
    return model.loss(model(batch.inputs), batch.targets, batch.mask)


FUNCTIONS: dict[str, Callable[[Tensor, Batch, int], Tensor]] = {
    "flooding": lambda loss, batch, step: (loss - (0.0 if step == 0 else 1e6)).abs(),
    "a threshold": lambda loss, batch, step: loss * float(step == 0 or loss.detach() < 0.0),
    "the rows drawn": lambda loss, batch, step: loss / (int(batch.mask.sum()) + 1000 * step),
    "the root of the sum": lambda loss, batch, step: loss.sqrt(),
    "the loss itself": lambda loss, batch, step: loss / loss.detach(),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_factor_that_follows_from_the_batch_is_refused_and_the_gradients_dropped(function: str) -> None:
    model = model_of()
    optimizer = sgd(model)
    for step, batch in enumerate(batches()):
        total = FUNCTIONS[function](loss_of(model, batch), batch, step)
        if step == 0:
            total.backward()
            optimizer.step()
            continue
        with pytest.raises(PrivacyError, match="the summed loss was multiplied by"):
            total.backward()
        assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_factor_that_is_not_positive_is_refused_at_once(factor: float) -> None:
    model = model_of()
    (batch,) = batches(1)
    total = factor * loss_of(model, batch)
    with pytest.raises(PrivacyError, match="positive"):
        total.backward()


def test_without_the_comparison_a_flooded_loss_would_be_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Factors, "meet", lambda *args: None)
    model = model_of()
    (batch,) = batches(1)
    (loss_of(model, batch) - 1e6).abs().backward()
    assert model.net.weight.grad is not None


@pytest.mark.parametrize("constant", [1.0, 1.0 / 256.0, 7.0])
def test_a_constant_factor_is_let_through(constant: float) -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in batches():
        (loss_of(model, batch) * constant).backward()
        optimizer.step()
    assert sum(steps for *_, steps in optimizer.accountant.history) == 3


def test_terms_of_one_loss_have_weights_of_their_own() -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in batches():
        output = model(batch.inputs)
        main, auxiliary = (model.loss(output, targets, batch.mask) for targets in (batch.targets, batch.targets * 0))
        (main + 0.3 * auxiliary).backward()
        optimizer.step()


def test_a_public_schedule_goes_by_the_loss_weight() -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = batches(1)
    with model.register.rehearsing():
        loss_of(model, batch).backward()
        plain = model.net.weight.grad.clone()
    model.loss_weight = 0.5
    loss_of(model, batch).backward()
    assert torch.equal(model.net.weight.grad, 0.5 * plain)
    optimizer.step()
    assert copy.deepcopy(model).loss_weight == 0.5


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_loss_weight_that_is_no_positive_number_is_refused(weight: object) -> None:
    with pytest.raises(ConfigurationError, match="loss_weight"):
        model_of().loss_weight = weight


def test_what_fills_no_gradient_is_no_factor() -> None:
    model = model_of()
    optimizer = sgd(model)
    for step, batch in enumerate(batches()):
        seen = batch.inputs.clone().requires_grad_()
        torch.autograd.grad((step + 2.0) * model.loss(model(seen), batch.targets, batch.mask), seen)
        model.tightness((batch.inputs[batch.mask][:2], batch.targets[batch.mask][:2]))
        loss_of(model, batch).backward()
        optimizer.step()
