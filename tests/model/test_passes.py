"""What enters a step: one pass for each row, of one draw, at first order, at the bounds of the pass."""

from __future__ import annotations

import copy
import gc
import itertools
import queue
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from accounting import create_accountant
from clipless_dp import (
    CliplessDPOptimizer,
    CliplessDPSGD,
    DPLipModel,
    LayerBounds,
    PoissonBatches,
    PoissonBatchSampler,
    PrivacyError,
    PrivacyWarning,
    RuleContext,
    StreamedBatches,
    WeightAverage,
    constraints,
    gated,
    gradient_gated,
    layers,
    losses,
    passes,
    poisson_collate,
    register_rule,
    report,
    suggest_gates,
)
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.graph.apart import join_
from clipless_dp.model.register import Register
from clipless_dp.sampling import Batch, draws, fingerprints
from tests.support import NoNoise, run_in_threads

SIZE, RATE = 40, 0.25
ROUTES = ("constraint", "signal gates", "gradient gates", "weights")


def data(count: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def loader_of(
    steps: int, workers: int = 0, kind: type[PoissonBatchSampler] = PoissonBatchSampler
) -> DataLoader[tuple[Tensor, Tensor]]:
    dataset = TensorDataset(*data())
    return DataLoader(
        dataset,
        batch_sampler=kind(SIZE, sample_rate=RATE, steps=steps),
        collate_fn=poisson_collate(dataset),
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
    )


def model_of(route: str = "signal gates", *, fused: bool = True) -> DPLipModel:
    torch.manual_seed(0)
    between = nn.ReLU() if fused else layers.GroupSort(2)
    net: nn.Module = nn.Sequential(nn.Linear(6, 8), between, nn.Linear(8, 3))
    net = {"signal gates": gated, "gradient gates": gradient_gated}.get(route, lambda plain: plain)(net)
    constraint = constraints.Spectral() if route == "constraint" else None
    return DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(), constraint=constraint)


def sgd(model: DPLipModel, **options: object) -> CliplessDPSGD:
    settings = {"noise_multiplier": 1.0, "sample_rate": RATE, "dataset_size": SIZE, "accountant": "rdp", **options}
    return CliplessDPSGD(model, lr=0.1, **settings)  # type: ignore[arg-type]


def drawn(steps: int = 1, rate: float = RATE) -> PoissonBatches:
    return PoissonBatches(data(), sample_rate=rate, steps=steps)


def loss_of(model: DPLipModel, batch: Batch) -> Tensor:
    return model.loss(model(batch.inputs), batch.targets, batch.mask)


def refused(optimizer: CliplessDPOptimizer, match: str) -> None:
    """The step is refused, nothing is charged, and no later step finds the gradients."""
    before = len(optimizer.accountant)
    weights = [parameter.detach().clone() for parameter in optimizer.model.net.parameters()]
    with pytest.raises(PrivacyError, match=match):
        optimizer.step()
    assert len(optimizer.accountant) == before
    assert all(parameter.grad is None for parameter in optimizer.model.net.parameters())
    assert all(map(torch.equal, weights, optimizer.model.net.parameters()))


# One pass, back-propagated once, at first order.


@pytest.mark.parametrize("route", ROUTES)
def test_a_second_derivative_is_refused_before_it_reaches_a_gradient(route: str) -> None:
    model = model_of(route)
    inputs = data()[0].requires_grad_()
    output = model(inputs)
    with pytest.raises(PrivacyError, match=r"constraints\.Spectral"):
        torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("route", ROUTES)
def test_a_pass_that_is_back_propagated_twice_is_refused_and_drops_the_gradients(route: str) -> None:
    model = model_of(route)
    (batch,) = drawn()
    loss = loss_of(model, batch)
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="adds both terms"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("together", [True, False])
def test_two_passes_of_one_draw_are_refused(together: bool) -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = drawn()
    first, second = loss_of(model, batch), loss_of(model, batch)
    if together:
        (first + second).backward()
    else:
        first.backward()
        second.backward()
    refused(optimizer, "rows entered this step twice")


@pytest.mark.parametrize("rows", [slice(0, 5), slice(2, 9)])
def test_rows_that_enter_in_two_pieces_that_overlap_are_refused(rows: slice) -> None:
    model = model_of()
    optimizer = sgd(model, sample_rate=1.0)
    (batch,) = drawn(rate=1.0)
    loss_of(model, batch).backward()
    loss_of(model, Batch(*(part[rows] for part in batch))).backward()
    refused(optimizer, "rows entered this step twice")


def test_two_terms_of_one_output_are_one_pass() -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = drawn()
    output = model(batch.inputs)
    (model.loss(output, batch.targets, batch.mask) + 0.1 * output.nan_to_num().square().sum()).backward()
    optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 1)]


def test_a_slope_of_the_input_fills_nobodys_gradient_and_costs_nothing() -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in drawn():
        seen = batch.inputs.clone().requires_grad_()
        torch.autograd.grad(model.loss(model(seen), batch.targets, batch.mask), seen)
        loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 1)]


# One draw, all of it, as it was handed out.


def cut(batch: Batch) -> Batch:
    return Batch(batch.inputs[:4], batch.targets[:4], batch.mask[:4])


def longest(batch: Batch) -> Batch:
    order = batch.inputs.norm(dim=1).nan_to_num(0.0).argsort(descending=True)[:4]
    return Batch(*(part[order] for part in batch))


def mixed(batch: Batch) -> Batch:
    return batch._replace(inputs=0.5 * batch.inputs + 0.5 * batch.inputs.roll(1, 0))


def centred(batch: Batch) -> Batch:
    return batch._replace(inputs=batch.inputs - batch.inputs[batch.mask].mean(0))


def centred_in_place(batch: Batch) -> Batch:
    batch.inputs.sub_(batch.inputs[batch.mask].mean(0))
    return batch


def repeated(batch: Batch) -> Batch:
    return Batch(*(torch.cat([part, part]) for part in batch))


CHANGES = (cut, longest, mixed, centred, centred_in_place, repeated)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("source", [PoissonBatches, StreamedBatches])
def test_a_draw_that_is_changed_in_the_loop_is_refused(change: Callable[[Batch], Batch], source: type) -> None:
    model = model_of()
    optimizer = sgd(model, sample_rate=0.5)
    (batch,) = source(data(), sample_rate=0.5, steps=1)
    assert batch.mask.sum() > 4
    loss_of(model, change(batch)).backward()
    refused(optimizer, r"rows .*(of the draw in hand|were left out)")


def test_what_the_register_does_not_look_at_shows_as_a_larger_contribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: origins unknown, nothing in hand. Then repeated rows are released, at twice the bound."""
    monkeypatch.setattr(passes, "origin", lambda inputs, names: (draws.find(inputs), None))
    model = model_of()
    optimizer = sgd(model, sample_rate=1.0, sampling="none", noise=NoNoise())
    (batch,) = PoissonBatches((data()[0][:1], data()[1][:1]), sample_rate=1.0, steps=1)
    loss_of(model, repeated(batch)).backward()
    twice = torch.cat([p.grad.flatten() for p in model.net.parameters()])
    optimizer.step()
    other = model_of()
    loss_of(other, batch).backward()
    # float32 sums of two equal terms.
    torch.testing.assert_close(twice, 2.0 * torch.cat([p.grad.flatten() for p in other.net.parameters()]))


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs, count: inputs.clone(),
        lambda inputs, count: inputs[:count],
        lambda inputs, count: inputs[:count].clone(),
        lambda inputs, count: inputs.view(len(inputs), 2, 3).view(len(inputs), 6),
    ],
    ids=["copy", "without padding", "copied without padding", "views"],
)
def test_rows_of_a_draw_are_known_by_what_they_hold(change: Callable[[Tensor, int], Tensor]) -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in drawn(3):
        optimizer.zero_grad()
        count = int(batch.mask.sum())
        seen = change(batch.inputs, count)
        model.loss(model(seen), batch.targets[: len(seen)], batch.mask[: len(seen)]).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 3)]


def test_a_draw_in_another_dtype_is_the_same_draw() -> None:
    model = model_of().double()
    optimizer = sgd(model)
    for batch in drawn(2):
        optimizer.zero_grad()
        model.loss(model(batch.inputs.double()), batch.targets, batch.mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_one_row_more_or_less_of_a_draw_is_not_the_draw() -> None:
    for rows in (slice(1, None), slice(0, -1)):
        model = model_of()
        optimizer = sgd(model, sample_rate=1.0)
        (batch,) = PoissonBatches(data(), sample_rate=1.0, steps=1, physical_batch_size=SIZE)
        loss_of(model, Batch(*(part[rows] for part in batch))).backward()
        refused(optimizer, "left out")


@pytest.mark.parametrize("workers", [0, 1])
def test_gradients_of_several_draws_of_a_data_loader_are_refused(workers: int) -> None:
    loader = loader_of(4, workers)
    model = model_of()
    optimizer = sgd(model)
    for index, (inputs, targets) in enumerate(loader):
        model.loss(model(inputs), targets).backward()
        if index == 1:
            refused(optimizer, "2 Poisson draws")
        elif index == 2:
            optimizer.step()
            break
    assert optimizer.accountant.history == [(1.0, RATE, 1)]


def test_zipped_samplers_and_a_prefetching_thread_are_refused_where_draws_are_merged() -> None:
    model = model_of()
    optimizer = sgd(model)
    for first, second in zip(drawn(1), drawn(1), strict=True):
        optimizer.zero_grad()
        loss_of(model, first).backward()
        loss_of(model, second).backward()
        refused(optimizer, "2 Poisson draws")

    box: queue.Queue[Batch | None] = queue.Queue()

    def prefetch() -> None:
        for batch in drawn(4):
            box.put(batch)
        box.put(None)

    thread = threading.Thread(target=prefetch)
    thread.start()
    thread.join()
    optimizer.zero_grad()
    taken = 0
    while (batch := box.get()) is not None:
        loss_of(model, batch).backward()
        taken += 1
        if taken == 2:
            refused(optimizer, "2 Poisson draws")
        elif taken > 2:
            # One at a time is what a prefetching thread is for.
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_two_draws_concatenated_are_refused() -> None:
    model = model_of()
    optimizer = sgd(model)
    for first, second in zip(drawn(1), drawn(1), strict=True):
        loss_of(model, Batch(*(torch.cat(parts) for parts in zip(first, second, strict=True)))).backward()
        refused(optimizer, "draw in hand")


def shuffled(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
    inputs, targets = data()
    rows = torch.randperm(SIZE)[:10]
    model.loss(model(inputs[rows]), targets[rows]).backward()
    with pytest.warns(PrivacyWarning, match="q = 1"):
        optimizer.step()
    optimizer.zero_grad()


def test_draws_that_were_looked_at_with_gradients_off_amplify_nothing() -> None:
    model = model_of()
    optimizer = sgd(model)
    with torch.no_grad():
        for batch in drawn(5):
            model(batch.inputs)
        for inputs, _ in loader_of(5):
            model(inputs)
    shuffled(model, optimizer)
    assert optimizer.accountant.history == [(0.5, 1.0, 1)]


def test_draws_that_were_skipped_amplify_nothing_once_that_is_said() -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in drawn(5):
        model(batch.inputs)
    inputs, targets = data()
    model.loss(model(inputs), targets).backward()
    refused(optimizer, "skip_draw")
    optimizer.skip_draw()
    shuffled(model, optimizer)
    assert optimizer.accountant.history == [(0.5, 1.0, 1)]


def test_a_draw_amplifies_one_step_however_often_it_is_passed() -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = drawn()
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    with pytest.warns(PrivacyWarning, match="q = 1"):
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 1), (1.0, 1.0, 1)]


def test_batches_of_unknown_origin_are_charged_in_full_one_by_one_and_refused_together() -> None:
    model = model_of()
    optimizer = sgd(model)
    shuffled(model, optimizer)
    inputs, targets = data()
    for rows in (torch.arange(0, 10), torch.arange(10, 20)):
        model.loss(model(inputs[rows]), targets[rows]).backward()
    refused(optimizer, "unknown origin")
    optimizer.skip_draw()
    for start in (0, 10, 20):
        rows = slice(start, start + 10)
        model.loss(model(inputs[rows]), targets[rows]).backward()
    with pytest.warns(PrivacyWarning, match="q = 1"):
        optimizer.step()


def test_whoever_vouches_for_their_batches_is_believed_but_for_two_draws_of_ours() -> None:
    model = model_of()
    optimizer = sgd(model, sampling="poisson")
    inputs, targets = data()
    for rows in (torch.arange(0, 10), torch.arange(10, 20)):
        model.loss(model(inputs[rows]), targets[rows]).backward()
    optimizer.step()
    optimizer.zero_grad()
    for batch in (*drawn(1), *drawn(1)):
        loss_of(model, batch).backward()
    refused(optimizer, "2 Poisson draws")


# Nothing else adds to a gradient, or changes one.


def by_the_net(model: DPLipModel, batch: Batch) -> None:
    nn.functional.cross_entropy(model.net(batch.inputs.nan_to_num()), batch.targets).backward()


def by_one_loss(model: DPLipModel, batch: Batch) -> None:
    model.register.drop()
    (loss_of(model, batch) + model.net(batch.inputs.nan_to_num()).square().sum()).backward()


def by_one_loss_the_other_way(model: DPLipModel, batch: Batch) -> None:
    model.register.drop()
    (model.net(batch.inputs.nan_to_num()).square().sum() + loss_of(model, batch)).backward()


def by_export(model: DPLipModel, batch: Batch) -> None:
    exported = torch.export.export(model, (torch.rand(5, 6),), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    exported(batch.inputs.nan_to_num()).square().sum().backward()


def by_functional_call(model: DPLipModel, batch: Batch) -> None:
    named = dict(model.net.named_parameters())
    torch.func.functional_call(model.net, named, (batch.inputs.nan_to_num(),)).square().sum().backward()


def by_scaling(model: DPLipModel, batch: Batch) -> None:
    for parameter in model.net.parameters():
        parameter.grad.mul_(100.0)


def by_scaling_data(model: DPLipModel, batch: Batch) -> None:
    for parameter in model.net.parameters():
        parameter.grad.data.mul_(100.0)


def by_clipping(model: DPLipModel, batch: Batch) -> None:
    nn.utils.clip_grad_norm_(model.net.parameters(), 1e-3)


def by_replacing(model: DPLipModel, batch: Batch) -> None:
    for parameter in model.net.parameters():
        parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize(
    "interfere",
    [
        by_the_net,
        by_one_loss,
        by_one_loss_the_other_way,
        by_export,
        by_functional_call,
        by_scaling,
        by_scaling_data,
        by_clipping,
        by_replacing,
    ],
    ids=lambda interfere: interfere.__name__,
)
@pytest.mark.parametrize("route", ROUTES)
def test_what_else_changes_a_gradient_is_refused(interfere: Callable[[DPLipModel, Batch], None], route: str) -> None:
    model = model_of(route)
    optimizer = sgd(model)
    (batch,) = drawn()
    loss_of(model, batch).backward()
    interfere(model, batch)
    refused(optimizer, "something else than passes")
    loss_of(model, *[batch]).backward()


# Private gradients decide nothing but the step that they enter.


EMPTIED: list[Callable[[DPLipModel], object]] = [
    lambda model: model.zero_grad(),
    lambda model: model.zero_grad(set_to_none=False),
    lambda model: [parameter.grad.zero_() for parameter in model.net.parameters()],
    lambda model: setattr(next(model.net.parameters()), "grad", None),
    lambda model: next(model.net.parameters()).grad.zero_(),
]


@pytest.mark.parametrize("empty", EMPTIED)
@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("source", [drawn, lambda: loader_of(1)])
def test_gradients_that_were_looked_at_and_dropped_are_refused(
    empty: Callable[[DPLipModel], object], again: bool, source: Callable[[], Iterator[Batch]]
) -> None:
    model = model_of()
    optimizer = sgd(model)
    for inputs, targets, *_ in source():
        model.loss(model(inputs), targets).backward()
        empty(model)
        if again:
            model.loss(model(inputs), targets).backward()
        refused(optimizer, "dropped|twice")
    for batch in drawn(2):
        # As in a loop that begins with it.
        model.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


@pytest.mark.parametrize("by_autograd", [True, False])
@pytest.mark.parametrize("rate", [RATE, 1.0])
def test_a_sharpness_aware_step_is_refused(by_autograd: bool, rate: float) -> None:
    model = model_of()
    optimizer = sgd(model, sample_rate=rate)
    (batch,) = drawn(rate=rate)
    weights = [*model.net.parameters()]
    if by_autograd:
        slopes = list(torch.autograd.grad(loss_of(model, batch), weights))
    else:
        loss_of(model, batch).backward()
        slopes = [weight.grad.clone() for weight in weights]
        optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_add_(weights, slopes)
    loss_of(model, batch).backward()
    with torch.no_grad():
        torch._foreach_sub_(weights, slopes)
    refused(optimizer, "sharpness-aware")


def moved(model: DPLipModel, slopes: list[Tensor], batch: Batch) -> None:
    """The second pass of a sharpness-aware step."""
    weights = [*model.net.parameters()]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        torch._foreach_add_(weights, slopes)
    loss_of(model, batch).backward()
    with torch.no_grad():
        torch._foreach_copy_(weights, kept)


def slopes_of(model: DPLipModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.net.parameters()]


def by_another_optimizer(model: DPLipModel, optimizer: CliplessDPSGD, batch: Batch) -> list[Tensor]:
    loss_of(model, batch).backward()
    slopes = slopes_of(model)
    sgd(model)
    return slopes


def by_a_refused_backward(model: DPLipModel, optimizer: CliplessDPSGD, batch: Batch) -> list[Tensor]:
    loss = loss_of(model, batch)
    loss.backward(retain_graph=True)
    slopes = slopes_of(model)
    with pytest.raises(PrivacyError, match="adds both terms"):
        loss.backward()
    return slopes


def by_a_failed_accumulate(model: DPLipModel, optimizer: CliplessDPSGD, batch: Batch) -> list[Tensor]:
    seen: list[list[Tensor]] = []

    def loss(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        model.loss(model(inputs), targets, mask).backward()
        seen.append(slopes_of(model))
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.accumulate(batch, loss=loss)
    return seen[0]


def by_a_refused_step(model: DPLipModel, optimizer: CliplessDPSGD, batch: Batch) -> list[Tensor]:
    loss_of(model, batch).backward()
    slopes = slopes_of(model)
    optimizer.zero_grad()
    refused(optimizer, "dropped or read")
    optimizer.zero_grad()
    return slopes


def by_skipping(model: DPLipModel, optimizer: CliplessDPSGD, batch: Batch) -> list[Tensor]:
    loss_of(model, batch).backward()
    slopes = slopes_of(model)
    optimizer.skip_draw()
    return slopes


def by_another_wrapper(model: DPLipModel, optimizer: CliplessDPSGD, batch: Batch) -> list[Tensor]:
    other = DPLipModel(model.net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
    loss_of(other, batch).backward()
    slopes = slopes_of(other)
    del other
    gc.collect()
    optimizer.zero_grad()
    return slopes


DOORS = (
    by_another_optimizer,
    by_a_refused_backward,
    by_a_failed_accumulate,
    by_a_refused_step,
    by_skipping,
    by_another_wrapper,
)


@pytest.mark.parametrize("sampling", ["announced", "poisson", "none"])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_private_gradients_are_owed_to_a_step_whoever_drops_them(
    door: Callable[..., list[Tensor]], copied: bool, sampling: str
) -> None:
    model = model_of()
    optimizer = sgd(model, sampling=sampling)
    for batch in drawn(2):
        slopes = door(model, optimizer, batch)
        again = batch._replace(inputs=batch.inputs.clone()) if copied else batch
        moved(model, slopes, again)
        refused(optimizer, "dropped or read|was left out")
    assert optimizer.skipped_draws == 2


@pytest.mark.parametrize("door", [by_a_refused_step, by_a_failed_accumulate], ids=lambda door: door.__name__)
def test_a_draw_that_was_left_out_may_be_changed_no_more_than_others(door: Callable[..., list[Tensor]]) -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = drawn()
    slopes = door(model, optimizer, batch)
    moved(model, slopes, batch._replace(inputs=batch.inputs * 1.0001))
    refused(optimizer, "dropped or read|left out with a refused step")


def test_a_loop_that_catches_a_refusal_goes_on_with_the_next_draw() -> None:
    model = model_of()
    optimizer = sgd(model)
    for index, batch in enumerate(drawn(6)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if index == 2:
            model.zero_grad()
        if index == 4:
            optimizer.skip_draw()
            continue
        try:
            optimizer.step()
        except PrivacyError:
            assert index == 2
    assert optimizer.accountant.history == [(1.0, RATE, 4)]
    assert optimizer.skipped_draws == 2
    assert any("skipped by hand" in finding for finding in report(optimizer).findings)


def test_draws_that_were_prefetched_are_trained_on_after_a_refusal() -> None:
    model = model_of()
    optimizer = sgd(model)
    for index, batch in enumerate([*drawn(4)]):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if index == 1:
            model.zero_grad()
            refused(optimizer, "dropped or read")
        else:
            optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 3)]
    assert optimizer.skipped_draws == 1


@pytest.mark.parametrize("computes", [True, False])
def test_memory_that_was_too_small_costs_no_draw(computes: bool) -> None:
    model = model_of()
    optimizer = sgd(model, sample_rate=1.0)
    honest, calls = model.loss, 0

    def scarce(*batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == (2 if computes else 1):
            raise MemoryError
        return honest(*batch)

    for batch in drawn(2, rate=1.0):
        calls = 0
        with mock.patch.object(model, "loss", scarce), pytest.raises(MemoryError):
            optimizer.accumulate(batch, micro_batch_size=20)
        optimizer.accumulate(batch, micro_batch_size=10)
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, 1.0, 2)]
    assert optimizer.skipped_draws == 0


def test_gradients_of_no_draw_are_owed_until_it_is_said_that_they_are_left_out() -> None:
    model = model_of()
    optimizer = sgd(model, sampling="none")
    inputs, targets = data()
    loss = model.loss(model(inputs), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="adds both terms"):
        loss.backward()
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(model(inputs), targets).backward()
        refused(optimizer, "dropped or read")
    optimizer.skip_draw()
    assert optimizer.skipped_draws == 1
    model.loss(model(inputs), targets).backward()
    optimizer.step()
    assert len(optimizer.accountant) == 1
    assert any("skipped by hand" in finding for finding in report(optimizer).findings)


def test_a_draw_that_one_model_left_out_is_another_ones_to_train_on() -> None:
    one, other = model_of(), model_of()
    optimizers = sgd(one), sgd(other)
    for batch in drawn(2):
        by_a_refused_step(one, optimizers[0], batch)
        other.zero_grad()
        loss_of(other, batch).backward()
        optimizers[1].step()
    assert optimizers[1].accountant.history == [(1.0, RATE, 2)]


def test_two_wrappers_of_one_network_train_it_in_turn() -> None:
    first = model_of()
    second = DPLipModel(first.net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    accountant = create_accountant("rdp")
    optimizers = [sgd(model, accountant=accountant) for model in (first, second)]
    for _ in range(2):
        for model, optimizer in zip((first, second), optimizers, strict=True):
            for batch in drawn(1):
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
    assert [optimizer.steps_taken for optimizer in optimizers] == [2, 2]


def test_what_trains_is_not_decided_between_a_pass_and_its_step() -> None:
    model = model_of()
    optimizer = sgd(model)
    head, *_ = model.net.parameters()
    for index, batch in enumerate(drawn(4)):
        optimizer.zero_grad()
        if index == 3:
            # A schedule freezes between steps.
            head.requires_grad_(False)
        optimizer.accumulate(batch) if index == 1 else loss_of(model, batch).backward()
        if index in (1, 2):
            head.requires_grad_(False)
            refused(optimizer, "requires_grad of a parameter")
            head.requires_grad_(True)
        else:
            optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_slopes_that_decide_nothing_are_told_apart_by_declaration() -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in drawn(1):
        with passes.unwitnessed():
            torch.autograd.grad(loss_of(model, batch), list(model.net.parameters()))
        loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 1)]


@pytest.mark.parametrize("dropped", ["before", "after"])
@pytest.mark.parametrize("sampling", ["announced", "poisson", "none"])
def test_a_step_without_the_rows_of_the_draw_in_hand_is_refused(dropped: str, sampling: str) -> None:
    """As a guard against spikes has it: no backward pass, or none that is kept, where a loss is large."""
    model = model_of()
    optimizer = sgd(model, sampling=sampling)
    (batch,) = PoissonBatches(data(), sample_rate=RATE, steps=1)
    loss = loss_of(model, batch)
    if dropped == "after":
        loss.backward()
        optimizer.zero_grad()
    refused(optimizer, "none of its rows entered|dropped or read")


def test_public_rows_alone_do_not_use_a_draw_up() -> None:
    model = model_of()
    optimizer = sgd(model)
    (_,) = drawn()
    optimizer.accumulate_public((torch.randn(3, 6), torch.zeros(3, dtype=torch.long)))
    refused(optimizer, "none of its rows entered")


# Draws are not selected.


def test_draws_of_an_iteration_that_was_left_are_refused_unless_that_is_said() -> None:
    model = model_of()
    optimizer = sgd(model)
    batches = drawn(3)
    for _ in range(3):
        batch = next(iter(batches))
    loss_of(model, batch).backward()
    refused(optimizer, r"2 draw\(s\) before this one")
    assert optimizer.skipped_draws == 3
    for batch in batches:
        loss_of(model, batch).backward()
        optimizer.step()
        break
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 4)]


@pytest.mark.parametrize("workers", [0, 1])
def test_draws_that_are_dropped_before_they_are_read_are_missed(workers: int) -> None:
    class Choosing(PoissonBatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return (indices for number, indices in enumerate(super().__iter__()) if number % 3 == 2)

    loader = loader_of(3, workers, Choosing)
    model = model_of()
    optimizer = sgd(model)
    for inputs, targets in loader:
        model.loss(model(inputs), targets).backward()
        refused(optimizer, r"2 draw\(s\) before this one")


def test_a_look_before_training_and_loops_that_are_cut_by_number_go_on() -> None:
    model = model_of()
    next(iter(drawn()))
    batches = iter(drawn(6))
    first = next(batches)
    optimizer = sgd(model)
    with torch.no_grad():
        next(iter(drawn(3)))
    for batch in (first, *itertools.islice(batches, 2)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    for batch in itertools.islice(drawn(5), 2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 5)]
    assert optimizer.skipped_draws == 0


def test_two_loops_that_alternate_do_not_pass_each_other_over() -> None:
    models = model_of(), model_of()
    optimizers = [sgd(model) for model in models]
    for pair in zip(drawn(3), drawn(3), strict=True):
        for model, optimizer, batch in zip(models, optimizers, pair, strict=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert all(optimizer.accountant.history == [(1.0, RATE, 3)] for optimizer in optimizers)


# Batches of no draw.


def test_a_batch_in_order_is_charged_for_the_sample_that_enters_and_the_one_that_leaves_it() -> None:
    """Without its first sample, every batch of a data set in order gains one and loses one."""
    inputs = torch.eye(6)[:1].repeat(SIZE, 1)
    inputs[10:] *= -1.0
    targets = torch.zeros(SIZE, dtype=torch.long)
    net = nn.Sequential(nn.Linear(6, 3, bias=False))
    nn.init.zeros_(net[0].weight)
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
    optimizer = sgd(model)

    def summed(rows: slice) -> Tensor:
        optimizer.skip_draw()
        model.loss(model(inputs[rows]), targets[rows]).backward()
        return net[0].weight.grad.clone()

    alone = float(summed(slice(0, 1)).norm())
    # float32 sums of ten terms.
    assert float((summed(slice(1, 11)) - summed(slice(0, 10))).norm()) == pytest.approx(2.0 * alone, rel=1e-5)
    with pytest.warns(PrivacyWarning, match="for two samples"):
        optimizer.step()
    assert optimizer.accountant.history == [(0.5, 1.0, 1)]


@pytest.mark.parametrize("rate", [RATE, 1.0])
def test_rows_of_no_draw_are_charged_for_one_sample_only_if_that_is_vouched_for(rate: float) -> None:
    """A batch of as many rows as the data set has may be a sample with repetitions."""
    inputs, targets = data()
    for rows, sampling in ((torch.arange(SIZE), "none"), (torch.zeros(SIZE, dtype=torch.long), "announced")):
        model = model_of()
        optimizer = sgd(model, sample_rate=rate, sampling=sampling)
        model.loss(model(inputs[rows]), targets[rows]).backward()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            optimizer.step()
        assert optimizer.accountant.history == [(1.0 if sampling == "none" else 0.5, 1.0, 1)]
        assert len(told) == (sampling != "none")


def test_a_draw_that_was_fetched_to_be_looked_at_is_not_trained_on() -> None:
    model = model_of()
    optimizer = sgd(model)
    with torch.no_grad():
        looked_at = [*drawn(5)]
    loss_of(model, max(looked_at, key=lambda batch: int(batch.mask.sum()))).backward()
    refused(optimizer, "to be looked at")


# Others' loops and threads are not one's own.


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_loops_side_by_side_in_any_order_are_apart(order: tuple[int, int]) -> None:
    models = model_of(), model_of()
    optimizers = [sgd(model) for model in models]
    for pair in zip(drawn(3), drawn(3), strict=True):
        for index in order:
            optimizers[index].zero_grad()
            loss_of(models[index], pair[index]).backward()
            optimizers[index].step()
    assert all(optimizer.accountant.history == [(1.0, RATE, 3)] for optimizer in optimizers)


def test_a_loop_within_a_loop_and_one_after_a_loop_that_was_broken_off_are_apart() -> None:
    models = model_of(), model_of()
    outer, inner = (sgd(model) for model in models)
    for batch in drawn(2):
        for other in drawn(3):
            inner.zero_grad()
            loss_of(models[1], other).backward()
            inner.step()
        outer.zero_grad()
        loss_of(models[0], batch).backward()
        outer.step()
    for batch in drawn(3):
        if len(outer.accountant) == 3:
            break
        outer.zero_grad()
        loss_of(models[0], batch).backward()
        outer.step()
    for other in drawn(3):
        inner.zero_grad()
        loss_of(models[1], other).backward()
        inner.step()
    assert outer.accountant.history == [(1.0, RATE, 3)]
    assert inner.accountant.history == [(1.0, RATE, 9)]


def test_loops_in_threads_are_apart() -> None:
    # torch's tracer is for one thread at a time.
    trained = [(model := model_of(), sgd(model)) for _ in range(3)]

    def train(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
        for batch in drawn(10):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        assert optimizer.accountant.history == [(1.0, RATE, 10)]

    run_in_threads(train, trained)


def test_an_empty_draw_takes_its_step_while_later_ones_wait() -> None:
    inputs, targets = data()
    model = model_of()
    optimizer = sgd(model, sample_rate=0.05)
    ahead = [*PoissonBatches((inputs, targets), sample_rate=0.05, steps=60)]
    assert any(not batch.mask.any() for batch in ahead)
    for batch in ahead:
        optimizer.zero_grad()
        if batch.mask.any():
            loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.05, 60)]


def test_gradients_of_rows_that_are_declared_nobodys_may_be_dropped() -> None:
    """As those of a critic are when a generator is trained through it."""
    model = model_of()
    optimizer = sgd(model)
    for batch in drawn(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        with passes.public():
            model(torch.randn(5, 6, requires_grad=True)).sum().backward()
        optimizer.zero_grad()
    assert optimizer.accountant.history == [(1.0, RATE, 3)]


@pytest.mark.parametrize("sampling", ["announced", "poisson", "none"])
@pytest.mark.parametrize("copied", [torch.clone, lambda rows: rows[torch.randperm(len(rows))]])
def test_a_sharpness_aware_step_on_copies_of_rows_of_no_draw_is_refused(
    copied: Callable[[Tensor], Tensor], sampling: str
) -> None:
    model = model_of()
    optimizer = sgd(model, sampling=sampling)
    inputs, targets = data()
    weights = [*model.net.parameters()]
    slopes = torch.autograd.grad(model.loss(model(copied(inputs)), targets), weights)
    with torch.no_grad():
        torch._foreach_add_(weights, slopes)
    model.loss(model(copied(inputs)), targets).backward()
    with torch.no_grad():
        torch._foreach_sub_(weights, slopes)
    refused(optimizer, "sharpness-aware")


def test_gradients_of_some_parameters_only_are_refused() -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in drawn(1):
        loss_of(model, batch).backward(inputs=[*model.net.parameters()][:2])
        refused(optimizer, r"left others out")


def test_an_optimizer_that_is_made_forgives_no_draws_of_others() -> None:
    model = model_of()
    optimizer = sgd(model)
    for index, batch in enumerate(drawn(3)):
        optimizer.zero_grad()
        if index == 1:
            sgd(model_of())
            continue
        loss_of(model, batch).backward()
        if index == 2:
            refused(optimizer, r"1 draw\(s\) before this one")
        else:
            optimizer.step()


def test_the_last_draw_that_a_worker_made_is_missed_where_it_was_left() -> None:
    loader = loader_of(3, 1)
    model = model_of()
    optimizer = sgd(model)
    for index, (inputs, targets) in enumerate(loader):
        if index == 2:
            break
        optimizer.zero_grad()
        model.loss(model(inputs), targets).backward()
        optimizer.step()
    for batch in drawn(1):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        refused(optimizer, r"1 draw\(s\) before this one")


def test_images_whose_channels_move_are_the_draw() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3))
    model = DPLipModel(gated(net), input_shape=(3, 5, 5), input_norm=1.0, loss=losses.TauCrossEntropy())
    optimizer = sgd(model)
    for batch in PoissonBatches((torch.rand(SIZE, 5, 5, 3), data()[1]), sample_rate=RATE, steps=2):
        optimizer.zero_grad()
        seen = batch.inputs.permute(0, 3, 1, 2).contiguous()
        model.loss(model(seen), batch.targets, batch.mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_filled_padding_of_a_copy_is_the_draw() -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in PoissonBatches(data(), sample_rate=RATE, steps=3, physical_batch_size=SIZE):
        optimizer.zero_grad()
        model.loss(model(batch.inputs.nan_to_num()), batch.targets, batch.mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 3)]


def zeroed(batch: Batch) -> Tensor:
    return batch.inputs.nan_to_num_()


def zeroed_by_mask(batch: Batch) -> Tensor:
    batch.inputs[~batch.mask] = 0.0
    return batch.inputs


@pytest.mark.parametrize("fill", [zeroed, zeroed_by_mask], ids=lambda fill: fill.__name__)
def test_padding_that_is_zeroed_in_place_leaves_the_draw_what_it_was(fill: Callable[[Batch], Tensor]) -> None:
    model = model_of()
    optimizer = sgd(model)
    for index, batch in enumerate(PoissonBatches(data(), sample_rate=RATE, steps=3, physical_batch_size=SIZE)):
        optimizer.zero_grad()
        seen = fill(batch)
        if index == 2:
            seen[0, 0] += 1.0
        if index == 1:
            for inputs, targets, mask in zip(seen.split(7), batch.targets.split(7), batch.mask.split(7), strict=True):
                model.loss(model(inputs.clone()), targets, mask).backward()
        else:
            model.loss(model(seen), batch.targets, batch.mask).backward()
        if index == 2:
            refused(optimizer, "draw in hand")
        else:
            optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_pieces_of_nothing_but_zeroed_padding_may_be_copied() -> None:
    model = model_of()
    optimizer = sgd(model)
    waiting = [*PoissonBatches(data(), sample_rate=RATE, steps=4, physical_batch_size=SIZE)]
    for batch in waiting:
        optimizer.zero_grad()
        for piece in batch.split(5):
            model.loss(model(piece.inputs.nan_to_num().clone()), piece.targets, piece.mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 4)]


def test_other_rows_in_place_of_padding_are_not_the_draw() -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=SIZE)
    filled = torch.where(batch.mask[:, None], batch.inputs, data()[0])
    model.loss(model(filled), batch.targets, batch.mask).backward()
    refused(optimizer, "draw in hand")


def test_zeroed_padding_that_counts_is_refused() -> None:
    model = model_of()
    (batch,) = PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=SIZE)
    for mask in (None, torch.ones_like(batch.mask)):
        loss = model.loss(model(batch.inputs.nan_to_num()), batch.targets, mask)
        with pytest.raises(PrivacyError, match="mask of the batch"):
            loss.backward()
        assert all(parameter.grad is None for parameter in model.net.parameters())
    pieces = torch.cat([model(piece.inputs.nan_to_num()) for piece in batch.split(8)])
    with pytest.raises(PrivacyError, match="mask of the batch"):
        model.loss(pieces, batch.targets).backward()


def test_a_test_set_as_long_as_a_padded_draw_has_a_loss_without_a_mask() -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in PoissonBatches(data(), sample_rate=RATE, steps=2, physical_batch_size=SIZE):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            assert model.loss(model(data()[0]), data()[1]).isfinite()


def test_suggestions_between_two_steps_leave_no_pass_behind() -> None:
    model = model_of("weights")
    optimizer = sgd(model)
    for batch in drawn(2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        suggest_gates(model, (torch.randn(6, 6), torch.zeros(6, dtype=torch.long)))
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_rows_that_enter_twice_are_known_after_their_memory_is_gone() -> None:
    model = model_of()
    optimizer = sgd(model, sampling="none")
    inputs, targets = data()
    rows = inputs.clone()
    for _ in range(2):
        model.loss(model(rows[:10]), targets[:10]).backward()
    del rows
    gc.collect()
    refused(optimizer, "rows entered this step twice")


def test_pieces_of_a_batch_whose_memory_is_gone_are_of_one_batch() -> None:
    model = model_of()
    optimizer = sgd(model)
    rows, targets = data()[0].clone(), data()[1]
    for part in zip(rows.split(10), targets.split(10), strict=True):
        model.loss(model(part[0]), part[1]).backward()
    del rows, part
    gc.collect()
    with pytest.warns(PrivacyWarning, match="q = 1"):
        optimizer.step()


# Pieces, copies and layouts of a draw.


@pytest.mark.parametrize("accumulated", [True, False])
def test_pieces_of_a_draw_may_be_copied_one_by_one(accumulated: bool) -> None:
    model = model_of()
    optimizer = sgd(model)
    for batch in drawn(2):
        optimizer.zero_grad()
        if accumulated:
            optimizer.accumulate(Batch(*(part.clone() for part in batch)), micro_batch_size=4)
        else:
            for piece in batch.split(4):
                model.loss(model(piece.inputs.clone()), piece.targets, piece.mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_copies_far_ahead_and_a_buffer_that_is_filled_again_are_the_draws() -> None:
    model = model_of()
    optimizer = sgd(model)
    ahead = [Batch(*(part.clone() for part in batch)) for batch in drawn(12)]
    for batch in ahead:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    buffer = torch.empty(SIZE, 6)
    for batch in drawn(3):
        optimizer.zero_grad()
        rows = buffer[: len(batch.inputs)]
        rows.copy_(batch.inputs)
        for seen, targets, mask in zip(rows.split(5), batch.targets.split(5), batch.mask.split(5), strict=True):
            model.loss(model(seen), targets, mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 15)]


def test_some_columns_of_a_draw_are_its_rows() -> None:
    torch.manual_seed(0)
    model = DPLipModel(
        gated(nn.Sequential(nn.Linear(4, 3))), input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy()
    )
    optimizer = sgd(model)
    for batch in drawn(2):
        optimizer.zero_grad()
        for piece in batch.split(6):
            model.loss(model(piece.inputs[:, 1:5]), piece.targets, piece.mask).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_sparse_rows_that_were_written_to_beneath_the_version_counter_are_no_draw() -> None:
    inputs = torch.zeros(SIZE, 4000)
    inputs[torch.arange(SIZE), torch.randint(4000, (SIZE,), generator=torch.Generator().manual_seed(0))] = 1.0
    net = gated(nn.Sequential(nn.Linear(4000, 3)))
    model = DPLipModel(net, input_shape=(4000,), input_norm=1.0, loss=losses.TauCrossEntropy())
    optimizer = sgd(model, sample_rate=0.5)
    (batch,) = PoissonBatches((inputs, data()[1]), sample_rate=0.5, steps=1)
    rows = batch.inputs.numpy()
    rows[1] = rows[0]
    loss_of(model, batch).backward()
    refused(optimizer, "draw in hand")


def sparse_gradient() -> tuple[DPLipModel, Tensor]:
    net = nn.Sequential(nn.Embedding(2000, 8), nn.Flatten(), nn.Linear(8, 3))
    model = DPLipModel(gated(net), input_shape=(1,), loss=losses.TauCrossEntropy())
    return model, torch.randint(2000, (SIZE, 1), generator=torch.Generator().manual_seed(0))


def turned_gradient() -> tuple[DPLipModel, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net[2].weight = nn.Parameter(torch.randn(6, 3).t())
    return DPLipModel(gated(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy()), data()[0]


@pytest.mark.parametrize("case", [sparse_gradient, turned_gradient], ids=lambda case: case.__name__)
def test_no_sparsity_and_no_layout_hides_what_is_written_into_a_gradient(
    case: Callable[[], tuple[DPLipModel, Tensor]],
) -> None:
    model, inputs = case()
    optimizer = sgd(model)
    (batch,) = PoissonBatches((inputs, data()[1]), sample_rate=RATE, steps=1)
    loss_of(model, batch).backward()
    weights = [parameter for parameter in model.net.parameters() if parameter.dim() > 1]
    hidden = next((weight for weight in weights if not weight.is_contiguous()), weights[0])
    hidden.grad.data.mul_(100.0)
    refused(optimizer, "something else than passes")


def test_what_is_looked_at_does_not_depend_on_what_was_looked_at_before() -> None:
    values = torch.rand(40, 300)
    before = fingerprints.fingerprint(values)
    for rows in range(41, 241):
        fingerprints.fingerprint(torch.rand(rows, 300))
    assert fingerprints.fingerprint(values) == before


@pytest.mark.parametrize(
    "made",
    [
        lambda noise: torch.where(noise < 0.19, noise, torch.full_like(noise, -0.4242)),
        lambda noise: (noise < 0.01).to(torch.uint8) + 1,
        lambda noise: noise > 0.01,
        lambda noise: (4.0 * noise).floor() + 1.0,
    ],
    ids=["a background", "bytes", "booleans", "four values"],
)
def test_a_row_that_takes_the_place_of_another_is_seen_before_any_background(
    made: Callable[[Tensor], Tensor],
) -> None:
    values = made(torch.rand(64, 784, generator=torch.Generator().manual_seed(3)))
    before = fingerprints.fingerprint(values)
    for row in range(1, 64):
        kept = values[row].clone()
        values.data[row] = values[0]
        assert fingerprints.fingerprint(values) != before
        values.data[row] = kept
    assert fingerprints.fingerprint(values) == before


def test_one_row_of_a_batch_or_a_weight_that_changes_in_between_is_seen() -> None:
    net = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 3))
    model = DPLipModel(net, input_shape=(300,), input_norm=1.0, loss=losses.TauCrossEntropy())
    inputs, targets = torch.randn(SIZE, 301)[:, 1:], data()[1]
    loss = model.loss(model(inputs), targets)
    inputs.data[7] += 1.0
    with pytest.raises(PrivacyError, match="overwritten between"):
        loss.backward()
    loss = model.loss(model(inputs), targets)
    net[0].weight.data[5] += 1.0
    with pytest.raises(PrivacyError, match="was changed between"):
        loss.backward()


# Hooks, modes and settings, at both ends of a pass.


class Scaling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 100 if function is nn.functional.linear else result


def global_hooks() -> Iterator[torch.utils.hooks.RemovableHandle]:
    module = torch.nn.modules.module
    yield module.register_module_forward_hook(lambda part, args, out: out * 100)
    yield module.register_module_forward_pre_hook(lambda part, args: tuple(value * 100 for value in args))
    yield module.register_module_full_backward_hook(lambda part, inner, outer: inner)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("index", range(3))
def test_global_hooks_are_refused(index: int, fused: bool) -> None:
    model = model_of("weights", fused=fused)
    (batch,) = drawn()
    output = model(batch.inputs)
    for number, hook in enumerate(global_hooks()):
        try:
            if number == index:
                with pytest.raises(PrivacyError, match="global module hook"):
                    model(batch.inputs)
                with pytest.raises(PrivacyError, match="global module hook"):
                    model.loss(output, batch.targets, batch.mask).backward()
        finally:
            hook.remove()


def test_modes_and_hooks_on_saved_tensors_are_refused_but_for_checkpointing_and_devices() -> None:
    model = model_of("weights", fused=False)
    (batch,) = drawn()
    with Scaling(), pytest.raises(PrivacyError, match="Scaling is in force"):
        model(batch.inputs)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda kept: kept * 10, lambda kept: kept),
        pytest.raises(PrivacyError, match="saved_tensors_hooks"),
    ):
        model(batch.inputs)
    with torch.device("cpu"), torch.autograd.graph.save_on_cpu():
        loss_of(model, batch).backward()


@pytest.mark.parametrize("route", ROUTES)
def test_hooks_set_for_a_pass_only_are_refused(route: str) -> None:
    model = model_of(route, fused=False)
    (batch,) = drawn()
    layer = next(part for part in model.net.modules() if isinstance(part, nn.Linear))
    hook = layer.register_forward_pre_hook(lambda part, args: (args[0] * 100,))
    with pytest.raises(PrivacyError, match="given hooks"):
        model(batch.inputs)
    hook.remove()
    output = model(batch.inputs)
    hook = layer.weight.register_hook(lambda gradient: gradient * 100)
    with pytest.raises(PrivacyError, match="given hooks"):
        model.loss(output, batch.targets, batch.mask).backward()
    hook.remove()
    with (
        mock.patch.object(layer, "forward", lambda values: 100 * nn.functional.linear(values, layer.weight)),
        pytest.raises(PrivacyError, match="given hooks"),
    ):
        model(batch.inputs)


def test_hooks_on_a_part_of_a_layer_are_refused() -> None:
    inner = nn.Linear(6, 6)
    net = nn.Sequential(layers.ConvexResidual(inner), nn.Linear(6, 3))
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
    hook = inner.register_forward_hook(lambda part, args, out: out * 100)
    with pytest.raises(PrivacyError, match="given hooks"):
        model(data()[0])
    hook.remove()


def test_precision_that_is_lowered_during_a_pass_is_refused() -> None:
    model = model_of("weights")
    (batch,) = drawn()
    output = model(batch.inputs)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(PrivacyError, match="more coarsely"):
            model(batch.inputs)
        with pytest.raises(PrivacyError, match="more coarsely"):
            model.loss(output, batch.targets, batch.mask).backward()
    finally:
        torch.set_float32_matmul_precision(before)


def test_data_parallel_wrappers_are_refused_by_name() -> None:
    model = model_of()
    with (
        mock.patch.object(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", return_value=object()),
        pytest.raises(PrivacyError, match="DistributedDataParallel"),
    ):
        model(data()[0])


# Bounds are those of the pass.


def contribution(model: DPLipModel) -> float:
    """The largest norm that a sample's whole gradient has at the current weights."""
    found = 0.0
    inputs, targets = data()
    with passes.unwitnessed():
        for row in range(SIZE):
            loss = model.loss(model(inputs[row : row + 1]), targets[row : row + 1])
            parts = torch.autograd.grad(loss, list(model.net.parameters()))
            found = max(found, float(torch.cat([part.flatten() for part in parts]).norm()))
    return found


@pytest.mark.parametrize("route", ["weights", "constraint"])
@pytest.mark.parametrize("through_data", [True, False])
def test_weights_perturbed_for_a_pass_and_restored_are_charged_at_the_bounds_of_the_pass(
    route: str, through_data: bool
) -> None:
    model = model_of(route)
    optimizer = sgd(model, sample_rate=1.0, sampling="none")
    quiet = model.sensitivity().total
    kept = [parameter.detach().clone() for parameter in model.net.parameters()]
    for parameter in model.net.parameters():
        (parameter.data if through_data else parameter.detach()).mul_(30.0)
    inputs, targets = data()
    model.loss(model(inputs), targets).backward()
    loud, seen = model.sensitivity().total, contribution(model)
    for parameter, before in zip(model.net.parameters(), kept, strict=True):
        (parameter.data if through_data else parameter.detach()).copy_(before)
    assert seen > quiet
    assert loud > 5.0 * quiet
    with mock.patch.object(optimizer, "_deviations", wraps=optimizer._deviations) as planned:
        optimizer.step()
    assert planned.call_args.args[0].total == loud


@pytest.mark.parametrize("through_data", [True, False])
def test_weights_changed_between_forward_and_backward_are_refused(through_data: bool) -> None:
    model = model_of("constraint")
    (batch,) = drawn()
    loss = loss_of(model, batch)
    weight = next(model.net.parameters())
    (weight.data if through_data else weight.detach()).mul_(0.1)
    with pytest.raises(PrivacyError, match="was changed between a forward pass and its backward pass"):
        loss.backward()


def test_loading_weights_between_backward_and_step_changes_no_bound_of_the_pass() -> None:
    model = model_of("weights")
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.mul_(5.0)
    optimizer = sgd(model, sample_rate=1.0, sampling="none")
    loud = model.sensitivity().total
    inputs, targets = data()
    model.loss(model(inputs), targets).backward()
    model.net.load_state_dict({name: value * 0.02 for name, value in model.net.state_dict().items()})
    assert model.sensitivity().total < loud
    with mock.patch.object(optimizer, "_deviations", wraps=optimizer._deviations) as planned:
        optimizer.step()
    assert planned.call_args.args[0].total == loud


def test_a_gate_that_is_opened_for_a_pass_is_charged_as_it_was_in_the_pass() -> None:
    model = model_of()
    optimizer = sgd(model, sample_rate=1.0, sampling="none")
    gates = [part for part in model.net.modules() if isinstance(part, layers.CotangentGate)]
    limits = [gate.limit for gate in gates]
    for gate in gates:
        gate.limit = 50.0
    inputs, targets = data()
    model.loss(model(inputs), targets).backward()
    loud = model.sensitivity().total
    for gate, limit in zip(gates, limits, strict=True):
        gate.limit = limit
    assert model.sensitivity().total < loud
    with mock.patch.object(optimizer, "_deviations", wraps=optimizer._deviations) as planned:
        optimizer.step()
    assert planned.call_args.args[0].total == loud
    loss = model.loss(model(inputs), targets)
    gates[0].limit = 50.0
    with pytest.raises(PrivacyError, match="changed between a forward pass and its backward pass"):
        loss.backward()


# Public rows.


def test_public_rows_join_the_sum_and_are_charged_to_nobody() -> None:
    model = model_of()
    optimizer = sgd(model)
    noise = torch.randn(7, 6), torch.zeros(7, dtype=torch.long)
    for batch in drawn(2):
        optimizer.zero_grad()
        optimizer.accumulate(batch)
        alone = [parameter.grad.clone() for parameter in model.net.parameters()]
        optimizer.accumulate_public(noise)
        assert any(not torch.equal(a, p.grad) for a, p in zip(alone, model.net.parameters(), strict=True))
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_a_row_of_the_draw_in_hand_is_not_public() -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = drawn(rate=1.0)
    with pytest.raises(InputError, match="row of a draw in hand"):
        optimizer.accumulate_public((batch.inputs[3:5].clone(), batch.targets[3:5]))


def test_public_and_private_rows_share_no_loss() -> None:
    model = model_of()
    (batch,) = drawn()
    with passes.public():
        output = model(torch.randn(2, 6))
    with pytest.raises(PrivacyError, match="once for each kind"):
        (loss_of(model, batch) + output.sum()).backward()


# Right loops go on working.


@pytest.mark.parametrize("route", ROUTES)
def test_right_loops_go_on_working(route: str) -> None:
    model = model_of(route)
    optimizer = sgd(model, sample_rate=0.5)
    average = WeightAverage(model, 0.9)
    public = torch.randn(5, 6), torch.zeros(5, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, batch in enumerate(PoissonBatches(data(), sample_rate=0.5, steps=6)):
            optimizer.zero_grad()
            if index == 0:
                loss_of(model, batch).backward()
            elif index == 1:
                for piece in batch.split(7):
                    loss_of(model, piece).backward()
            elif index == 2:
                optimizer.accumulate(batch, augment=lambda sample: sample, multiplicity=2, micro_batch_size=9)
            elif index == 3:
                output = checkpoint(model, batch.inputs, use_reentrant=False)
                model.loss(output, batch.targets, batch.mask).backward()
            elif index == 4:
                model(public[0])  # A forgotten no_grad.
                with torch.no_grad():
                    model(batch.inputs)
                loss_of(model, batch).backward()
                model.loss(model(batch.inputs[:0]), batch.targets[:0], batch.mask[:0]).backward()
            else:
                optimizer.accumulate(batch)
            optimizer.step()
            average.update()
            with average.applied(), torch.no_grad():
                model(public[0])
    assert optimizer.accountant.history == [(1.0, 0.5, 6)]


def test_two_heads_with_one_loss_are_one_pass() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, values: Tensor) -> Tensor:
            hidden = torch.relu(self.body(values))
            return torch.cat([self.one(hidden), self.other(hidden)], 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        both = output.split((3, 2), dim=1)
        terms = [nn.functional.cross_entropy(part, target % part.shape[1], reduction="none") for part in both]
        return terms[0] + terms[1]

    torch.manual_seed(0)
    model = DPLipModel(gated(Heads()), input_shape=(6,), input_norm=1.0, loss=losses.BoundedLoss(loss, bound=2.0))
    optimizer = sgd(model)
    for batch in drawn(2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_passes_that_get_no_backward_pass_are_not_kept() -> None:
    model = model_of()
    inputs, _ = data()
    opened: list[weakref.ref[passes.Pass]] = []
    honest = Register.open

    def noting(register: Register, rows: Tensor) -> passes.Pass:
        made = honest(register, rows)
        opened.append(weakref.ref(made))
        return made

    with mock.patch.object(Register, "open", noting):
        for _ in range(3):
            model(inputs)
    gc.collect()
    assert len(opened) == 3
    assert all(one() is None for one in opened)


def test_copies_of_a_model_have_registers_of_their_own() -> None:
    model = model_of()
    twin = copy.deepcopy(model)
    (batch,) = drawn()
    loss_of(model, batch).backward()
    assert len(model.register.passes) == 1
    assert twin.register.passes == []
    loss_of(twin, batch).backward()
    assert len(twin.register.passes) == 1


# Compiled models.


@pytest.mark.parametrize("route", ROUTES)
def test_compiled_passes_are_witnessed_too(route: str) -> None:
    model = model_of(route)
    optimizer = sgd(model)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda inputs, targets, mask: model.loss(model(inputs), targets, mask), backend="aot_eager", fullgraph=True
    )
    batches = PoissonBatches(data(), sample_rate=RATE, steps=4, physical_batch_size=32)
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        compiled(*batch).backward()
        if index == 0:
            compiled(*batch).backward()
            refused(optimizer, "rows entered this step twice")
        elif index == 1:
            next(model.net.parameters()).grad.mul_(2.0)
            refused(optimizer, "something else than passes")
        elif index == 2:
            nn.functional.cross_entropy(model.net(batch.inputs.nan_to_num()), batch.targets).backward()
            refused(optimizer, "something else than passes")
        else:
            optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 1)]
    torch._dynamo.reset()


def test_a_compiled_pass_is_back_propagated_once_at_first_order() -> None:
    model = model_of()
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs: model(inputs), backend="aot_eager", fullgraph=True)
    (batch,) = PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=32)
    loss = model.loss(compiled(batch.inputs), batch.targets, batch.mask)
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="adds both terms"):
        loss.backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_compiled_passes_refuse_hooks_on_what_fills_gradients(behind: bool, before: bool, filled: bool) -> None:
    model = model_of()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    nodes = [torch.autograd.graph.get_gradient_edge(parameter).node for parameter in model.net.parameters()]

    def put() -> None:
        for node in nodes:
            if behind:
                node.register_hook(lambda found, came: None)
            else:
                node.register_prehook(lambda came: tuple(100.0 * one for one in came))

    if before:
        put()
    if filled:
        for parameter in model.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
    (batch,) = drawn()
    loss = model.loss(compiled(batch.inputs), batch.targets, batch.mask)
    if not before:
        put()
    with pytest.raises(PrivacyError, match="a hook is on the node"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())
    torch._dynamo.reset()


def test_gradients_that_arrive_in_another_order_of_memory_are_filled_in_compiled_passes() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        net[0].weight.set_(torch.randn(6, 5).t())
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
    optimizer = sgd(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for batch in PoissonBatches(data(), sample_rate=RATE, steps=2):
        model.loss(compiled(batch.inputs), batch.targets, batch.mask).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]
    torch._dynamo.reset()


@pytest.fixture
def compiled() -> Iterator[tuple[DPLipModel, CliplessDPSGD, Callable[[Tensor], Tensor]]]:
    model = model_of()
    torch._dynamo.reset()
    yield model, sgd(model), torch.compile(model, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("integers", [True, False])
def test_padding_that_counts_is_refused_in_compiled_passes(compiled, integers: bool) -> None:
    model, optimizer, run = compiled
    inputs, targets = data()
    if integers:
        inputs = torch.randint(1, 9, (SIZE, 6))
    for index, batch in enumerate(
        PoissonBatches((inputs, targets), sample_rate=RATE, steps=3, physical_batch_size=SIZE)
    ):
        optimizer.zero_grad()
        seen = batch.inputs.float() if integers else batch.inputs.nan_to_num()
        if index == 1:
            with pytest.raises(PrivacyError, match="mask of the batch"):
                model.loss(run(seen), batch.targets).backward()
            optimizer.skip_draw()
        else:
            model.loss(run(seen), batch.targets, batch.mask).backward()
            optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


def test_a_compiled_pass_counts_once_it_has_come_to_all_parameters(compiled) -> None:
    model, optimizer, run = compiled
    weights = [*model.net.parameters()]
    for index, batch in enumerate(PoissonBatches(data(), sample_rate=RATE, steps=4, physical_batch_size=SIZE)):
        optimizer.zero_grad()
        if index == 1:
            model.loss(run(batch.inputs), batch.targets, batch.mask).backward(inputs=weights[:1])
            refused(optimizer, "left others out")
        elif index == 2:
            pieces = [*batch.split(SIZE // 2)]
            model.loss(run(pieces[0].inputs), pieces[0].targets, pieces[0].mask).backward()
            torch.autograd.grad(model.loss(run(pieces[1].inputs), pieces[1].targets, pieces[1].mask), weights)
            refused(optimizer, "dropped or read")
        else:
            for piece in batch.split(SIZE // 2):
                model.loss(run(piece.inputs), piece.targets, piece.mask).backward()
            optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 2)]


@pytest.mark.slow
def test_equal_passes_of_a_compiled_graph_are_not_merged() -> None:
    """Eight rewards of one batch have the same numbers, and would be one pass with eight times the gradient."""
    model = model_of()
    optimizer = sgd(model)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda inputs: sum((model(inputs)[:, 0] * 0.1).nan_to_num().sum() for _ in range(8)),
        backend="aot_eager",
        fullgraph=True,
    )
    (batch,) = PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=32)

    def step() -> None:
        compiled(batch.inputs).backward()
        optimizer.step()

    # Entries of one pass are refused on the way back, where the compiler merges passes, and else rows by the step.
    with pytest.raises(PrivacyError, match="twice"):
        step()
    torch._dynamo.reset()


def test_an_exported_copy_holds_none_of_our_operators() -> None:
    model = model_of("weights")
    program = torch.export.export(model, (torch.rand(5, 6),))
    assert not [node for node in program.graph.nodes if "open_pass" in str(node.target)]


# Two optimizers.


def test_the_second_optimizer_of_one_pass_gets_no_gradient_that_it_did_not_charge() -> None:
    model = model_of()
    parameters = list(model.net.parameters())
    settings = {"noise_multiplier": 1.0, "sample_rate": RATE, "dataset_size": SIZE, "noise": NoNoise()}
    settings["accountant"] = create_accountant("rdp")
    body, head = (
        CliplessDPOptimizer(model, torch.optim.SGD(part, lr=0.1), **settings)  # type: ignore[arg-type]
        for part in (parameters[:2], parameters[2:])
    )
    (batch,) = drawn()
    loss_of(model, batch).backward()
    body.step()
    with pytest.raises(ConfigurationError, match="another optimizer"):
        head.step()
    assert all(parameter.grad is None for parameter in parameters[2:])


@pytest.mark.parametrize("bad", [0, -1])
def test_errors_of_arguments_leave_the_register_as_it_was(bad: int) -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = drawn()
    optimizer.accumulate(batch)
    with pytest.raises(ConfigurationError):
        optimizer.accumulate(batch, micro_batch_size=bad) if bad else optimizer.accumulate(batch, multiplicity=0)
    with nullcontext():
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 1)]


# What attackers found in an earlier form of the register.


def twice(model: DPLipModel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda inputs, targets, mask: (
        model.loss(model(inputs), targets, mask) + model.loss(model(inputs), targets, mask)
    )


def standardised_in_place(model: DPLipModel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        inputs.sub_(inputs.nanmean(0))
        return model.loss(model(inputs), targets, mask)

    return loss


def mixing(model: DPLipModel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda inputs, targets, mask: model.loss(model(0.5 * (inputs + inputs.roll(1, 0))), targets, mask)


@pytest.mark.parametrize("loss_for", [twice, mixing, standardised_in_place], ids=lambda one: one.__name__)
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 5}, {"augment": lambda row: row, "multiplicity": 2}])
def test_a_loss_of_ones_own_passes_the_rows_that_it_is_given_once(
    loss_for: Callable[[DPLipModel], Callable[..., Tensor]], options: dict[str, object]
) -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = drawn()
    with pytest.raises(PrivacyError, match=r"the very tensor that comes in|before the model saw them"):
        optimizer.accumulate(batch, loss=loss_for(model), **options)
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_pieces_that_a_loss_leaves_out_or_passes_in_place_of_others_are_refused() -> None:
    model = model_of()
    optimizer = sgd(model, sample_rate=1.0)
    (batch,) = drawn(rate=1.0)

    def whole_pieces_only(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        if len(inputs) < 7:
            return torch.zeros((), requires_grad=True)
        return model.loss(model(inputs), targets, mask)

    with pytest.raises(PrivacyError, match="left rows out"):
        optimizer.accumulate(batch, loss=whole_pieces_only, micro_batch_size=7)
    first = True

    def twice_or_not_at_all(inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        nonlocal first
        first = not first
        again = model.loss(model(inputs), targets, mask) if first else 0.0
        return again + model.loss(model(inputs), targets, mask)

    with pytest.raises(PrivacyError, match="more than once"):
        optimizer.accumulate(batch, loss=twice_or_not_at_all, micro_batch_size=7)
    optimizer.skip_draw()
    (batch,) = drawn(rate=1.0)
    optimizer.accumulate(batch, micro_batch_size=7)
    optimizer.step()


@pytest.mark.parametrize("masked", [True, False])
def test_padding_of_integers_does_not_count(masked: bool) -> None:
    model = model_of()
    optimizer = sgd(model)
    inputs = torch.randint(1, 9, (SIZE, 6), dtype=torch.uint8)
    (batch,) = PoissonBatches((inputs, data()[1]), sample_rate=RATE, steps=1, physical_batch_size=SIZE)
    output = model(batch.inputs.float())
    if masked:
        model.loss(output, batch.targets, batch.mask).backward()
        optimizer.step()
        assert optimizer.accountant.history == [(1.0, RATE, 1)]
    else:
        with pytest.raises(PrivacyError, match="mask of the batch"):
            model.loss(output, batch.targets).backward()


def through_an_array(batch: Batch) -> None:
    rows = batch.inputs.numpy()
    rows -= rows[batch.mask.numpy()].mean(0)


def through_data(batch: Batch) -> None:
    batch.inputs.data.sub_(1.0)


def padding_filled(batch: Batch) -> None:
    rows = batch.inputs.numpy()
    rows[~batch.mask.numpy()] = rows[0]


@pytest.mark.parametrize("change", [through_an_array, through_data, padding_filled], ids=lambda one: one.__name__)
def test_rows_that_were_written_to_beneath_the_version_counter_are_no_draw(change: Callable[[Batch], None]) -> None:
    model = model_of()
    optimizer = sgd(model)
    (batch,) = PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=32)
    change(batch)
    loss_of(model, batch).backward()
    refused(optimizer, "draw in hand")


def test_a_buffer_that_is_filled_again_before_the_backward_pass_is_refused() -> None:
    model = model_of()
    buffer = data()[0].numpy().copy()
    inputs = torch.from_numpy(buffer)
    loss = model.loss(model(inputs), data()[1])
    buffer *= 1e3
    with pytest.raises(PrivacyError, match="overwritten between"):
        loss.backward()


def test_a_draw_that_is_passed_over_is_refused_at_the_next_step_unless_that_is_said() -> None:
    model = model_of()
    optimizer = sgd(model)
    for index, batch in enumerate(drawn(4)):
        if index == 1:
            continue
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if index == 2:
            refused(optimizer, "not trained on")
        else:
            optimizer.step()
    # The refused step's own draw is lost with the one before it.
    assert optimizer.skipped_draws == 2
    for index, batch in enumerate(drawn(3)):
        if index == 1:
            optimizer.skip_draw()
            continue
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.skipped_draws == 3
    assert any("skipped by hand" in finding for finding in report(optimizer).findings)


@pytest.mark.parametrize("columns", [784, 64])
def test_no_layout_hides_what_is_written_into_a_gradient(columns: int) -> None:
    net = nn.Sequential(nn.Linear(columns, 128, bias=False), nn.ReLU(), nn.Linear(128, 3, bias=False))
    model = DPLipModel(gated(net), input_shape=(columns,), input_norm=1.0, loss=losses.TauCrossEntropy())
    inputs, targets = torch.rand(SIZE, columns), data()[1]
    inputs[:, 0] = 0.0
    optimizer = sgd(model)
    (batch,) = PoissonBatches((inputs, targets), sample_rate=RATE, steps=1)
    loss_of(model, batch).backward()
    next(model.net.parameters()).grad.data.mul_(100.0)
    refused(optimizer, "something else than passes")


def test_a_step_without_a_pass_releases_noise_alone() -> None:
    model = model_of()
    optimizer = sgd(model, noise=NoNoise())
    for batch in drawn(1):
        loss_of(model, batch).backward()
        optimizer.step()
    with pytest.warns(PrivacyWarning):
        optimizer.step()
    assert all(not parameter.grad.any() for parameter in model.net.parameters())
    for parameter in model.net.parameters():
        parameter.grad.data.copy_(torch.ones_like(parameter))
    refused(optimizer, "something else than passes")


class Interrupted(NoNoise):
    """Not where it is tried, on six numbers."""

    def standard_normal_(self, out: Tensor) -> Tensor:
        if out.numel() > 6:
            raise KeyboardInterrupt
        return out.fill_(1.0)


def test_a_step_that_is_interrupted_in_its_noise_drops_the_gradients() -> None:
    model = model_of()
    optimizer = sgd(model, noise=Interrupted())
    for batch in drawn(1):
        loss_of(model, batch).backward()
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert all(parameter.grad is None for parameter in model.net.parameters())


class Leaking(nn.Module):
    """A layer of a user's own that keeps what it has computed, out of sight of the rules."""

    kept: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        type(self).kept = []

    def forward(self, values: Tensor) -> Tensor:
        out = self.layer(values)
        type(self).kept.append(out)
        return out


@register_rule(Leaking)
def leaking_rule(module: Leaking, context: RuleContext) -> LayerBounds:
    return LayerBounds(
        output_norm=10.0, lipschitz=10.0, gradients={"layer.weight": context.input_norm, "layer.bias": 1.0}
    )


def test_gradients_from_within_the_network_that_go_around_its_gate_are_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Leaking(), nn.Linear(6, 3))
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
    optimizer = sgd(model)
    (batch,) = drawn()
    model(batch.inputs)
    with pytest.raises(PrivacyError, match="around the gate"):
        Leaking.kept[-1].square().sum().backward()
    # The register sees it too, where layers do not run apart.
    join_(model.graph.module)
    join_(model._network.fused.module)
    model(batch.inputs)
    Leaking.kept[-1].square().sum().backward()
    refused(optimizer, "around the gate")


def test_two_draws_in_one_backward_pass_of_a_compiled_model_are_refused() -> None:
    model = model_of()
    optimizer = sgd(model)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *batch: model.loss(model(batch[0]), *batch[1:]), backend="aot_eager", fullgraph=True
    )
    batches = [*PoissonBatches(data(), sample_rate=RATE, steps=2, physical_batch_size=32)]
    (compiled(*batches[0]) + compiled(*batches[1])).backward()
    refused(optimizer, "2 Poisson draws")
    (batch,) = PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=32)
    (compiled(*batch) + compiled(*batch)).backward()
    refused(optimizer, "rows entered this step twice")
    (batch,) = PoissonBatches(data(), sample_rate=RATE, steps=1, physical_batch_size=32)
    compiled(*batch).backward()
    for parameter in model.net.parameters():
        parameter.grad = 100.0 * parameter.grad
    refused(optimizer, "something else than passes")
    torch._dynamo.reset()


@pytest.mark.parametrize("change", [lambda rows: rows[:2], lambda rows: rows[1:]], ids=["cut", "without the first"])
def test_a_draw_that_is_changed_on_its_way_to_the_collate_function_is_refused(
    change: Callable[[list[object]], list[object]],
) -> None:
    dataset = TensorDataset(*data())
    own = poisson_collate(dataset)
    sampler = PoissonBatchSampler(SIZE, sample_rate=0.5, steps=1)
    # Copies, which share no memory.
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=lambda rows: own(change([(x.clone(), y) for x, y in rows]))
    )
    model = model_of()
    optimizer = sgd(model, sample_rate=0.5)
    for inputs, targets in loader:
        model.loss(model(inputs), targets).backward()
        refused(optimizer, "draw in hand")


def test_pieces_of_a_copy_are_pieces_of_the_draw_and_looking_ahead_is_no_skipping() -> None:
    model = model_of().double()
    optimizer = sgd(model)
    ahead = [batch._replace(inputs=batch.inputs.double()) for batch in drawn(3)]
    for batch in ahead:
        optimizer.zero_grad()
        for piece in batch.split(7):
            loss_of(model, piece).backward()
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, RATE, 3)]


def test_draws_may_be_looked_at_in_inference_mode() -> None:
    model = model_of()
    with torch.inference_mode():
        for batch in drawn(2):
            model(batch.inputs)
        for inputs, _ in loader_of(2):
            model(inputs)


@pytest.mark.parametrize("copied", [lambda rows: rows.clone(), lambda rows: rows[:7].clone()], ids=["all", "a piece"])
def test_a_draw_and_a_copy_of_it_are_the_same_rows(copied: Callable[[Tensor], Tensor]) -> None:
    model = model_of()
    optimizer = sgd(model, sample_rate=1.0)
    (batch,) = drawn(rate=1.0)
    loss_of(model, batch).backward()
    again = copied(batch.inputs)
    model.loss(model(again), batch.targets[: len(again)], batch.mask[: len(again)]).backward()
    refused(optimizer, "twice|draw in hand")
