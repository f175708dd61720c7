"""Gradients that lie there while others are computed; and models, draws and loops beside others that were left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipless_dp import (
    CliplessDPSGD,
    DPLipModel,
    LayerBounds,
    PoissonBatches,
    PrivacyError,
    PrivacyWarning,
    ReproducibleNoise,
    gated,
    gradient_gated,
    losses,
    register_rule,
)
from clipless_dp.errors import ConfigurationError
from clipless_dp.norms import operators
from clipless_dp.rules import RuleContext
from clipless_dp.sampling import Batch
from tests.support import run_in_threads

SIZE, RATE = 40, 0.25


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SIZE, 6, generator=generator), torch.randint(3, (SIZE,), generator=generator)


def drawn(steps: int, seed: int | None = None) -> PoissonBatches:
    return PoissonBatches(data(), sample_rate=RATE, steps=steps, seed=seed)


def wrapped(net: nn.Module) -> tuple[DPLipModel, CliplessDPSGD]:
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
    return model, CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=RATE, dataset_size=SIZE)


def model_of(gates: Callable[[nn.Module], nn.Module] = gated) -> tuple[DPLipModel, CliplessDPSGD]:
    torch.manual_seed(0)
    return wrapped(gates(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))))


def loss_of(model: DPLipModel, batch: Batch) -> Tensor:
    return model.loss(model(batch.inputs), batch.targets, batch.mask)


def raw(model: DPLipModel) -> list[Tensor]:
    inputs, targets = data()
    loss = 1000.0 * nn.functional.cross_entropy(model.net(inputs), targets, reduction="sum")
    return list(torch.autograd.grad(loss, list(model.net.parameters())))


def by_an_operation(held: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for one, other in zip(held, new, strict=True):
        one.add_(other)


def by_data(held: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for one, other in zip(held, new, strict=True):
        one.data.add_(other)


def by_numpy(held: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for one, other in zip(held, new, strict=True):
        np.copyto(one.numpy(), other.numpy())


WRITES = [by_an_operation, by_data, by_numpy]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("gates", [gated, gradient_gated])
def test_what_is_written_into_gradients_that_a_step_has_left_is_refused(
    gates: Callable[[nn.Module], nn.Module], cleared: bool, write: Callable[..., None]
) -> None:
    model, optimizer = model_of(gates)
    first, second = drawn(2)
    loss_of(model, first).backward()
    optimizer.step()
    if cleared:
        optimizer.zero_grad(set_to_none=False)
    write([parameter.grad for parameter in model.net.parameters()], raw(model))
    loss_of(model, second).backward()
    with pytest.raises(PrivacyError, match="something else than passes"):
        optimizer.step()
    assert len(optimizer.accountant) == 1


def test_gradients_that_a_step_has_left_may_be_added_to_by_passes() -> None:
    model, optimizer = model_of()
    for batch in drawn(3):
        loss_of(model, batch).backward()
        optimizer.step()
    assert len(optimizer.accountant) == 3


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("public", [False, True])
def test_what_is_written_into_gradients_that_were_put_aside_is_refused(
    public: bool, write: Callable[..., None]
) -> None:
    model, optimizer = model_of()
    (batch,) = drawn(1)
    optimizer.accumulate(batch)
    held = [parameter.grad for parameter in model.net.parameters()]
    new = raw(model)

    def loss(inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        write(held, new)
        return model.loss(model(inputs), targets, mask)

    rows = torch.full((2, 6), 0.3), torch.zeros(2, dtype=torch.long)
    add = optimizer.accumulate_public if public else optimizer.accumulate
    with pytest.raises(PrivacyError, match="changed while a loss was computed"):
        add(rows, loss=loss)
    with pytest.raises(PrivacyError, match="something else than passes"):
        optimizer.step()
    assert len(optimizer.accountant) == 0


def sharing(frozen: bool) -> list[tuple[DPLipModel, CliplessDPSGD]]:
    torch.manual_seed(0)
    shared = nn.Linear(6, 8).requires_grad_(not frozen)
    return [wrapped(gradient_gated(nn.Sequential(shared, nn.ReLU(), nn.Linear(8, 3)))) for _ in range(2)]


def test_models_that_share_what_is_frozen_are_trained_side_by_side() -> None:
    (first, of_first), (second, of_second) = sharing(frozen=True)
    for one, other in zip(drawn(3), drawn(3), strict=True):
        loss_of(first, one).backward()
        loss_of(second, other).backward()
        for optimizer in (of_first, of_second):
            optimizer.step()
            optimizer.zero_grad()
    assert len(of_first.accountant) == len(of_second.accountant) == 3


def test_gradients_of_what_two_models_share_are_owed_by_both() -> None:
    (first, of_first), (second, of_second) = sharing(frozen=False)
    (one,), (other,) = drawn(1), drawn(1)
    loss_of(first, one).backward()
    loss_of(second, other).backward()
    for optimizer in (of_first, of_second):
        with pytest.raises(PrivacyError):
            optimizer.step()


def test_models_that_share_what_is_frozen_are_trained_in_two_threads() -> None:
    pairs = sharing(frozen=True)

    def train(model: DPLipModel, optimizer: CliplessDPSGD) -> None:
        for batch in drawn(40):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    run_in_threads(train, pairs)
    assert [len(optimizer.accountant) for _, optimizer in pairs] == [40, 40]


def test_a_copy_of_a_seeded_draw_is_of_the_loop_that_goes_on_and_not_of_one_that_was_left() -> None:
    model, _ = model_of()
    for batch in drawn(3, seed=7):
        model(batch.inputs)
        break
    model, optimizer = model_of()
    for batch in drawn(3, seed=7):
        copy = batch._replace(inputs=batch.inputs.clone())
        loss_of(model, copy).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.accountant) == 3


def test_draws_that_a_loop_had_left_before_an_optimizer_was_made_are_none_that_it_skips() -> None:
    model, _ = model_of()
    for _ in range(5):
        for batch in drawn(3):
            model(batch.inputs)
            break
    model, optimizer = model_of()
    for index, batch in enumerate(drawn(3)):
        loss_of(model, batch).backward()
        if index == 1:
            optimizer.skip_draw()
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_draws == 1


def test_a_sampler_that_is_made_again_with_its_seed_draws_what_was_trained_on_and_is_refused() -> None:
    model, optimizer = model_of()
    for batch in drawn(2, seed=7):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for batch in drawn(2, seed=8):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    (batch, _) = drawn(2, seed=7)
    loss_of(model, batch).backward()
    with pytest.raises(ConfigurationError, match="same batches again"):
        optimizer.step()
    assert len(optimizer.accountant) == 4


def test_a_row_less_makes_no_other_draws_of_a_seed() -> None:
    model, optimizer = model_of()
    (batch,) = drawn(1, seed=7)
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    fewer = tuple(part[:-1] for part in data())
    (batch,) = PoissonBatches(fewer, sample_rate=RATE, steps=1, seed=7)
    loss_of(model, batch).backward()
    with pytest.raises(ConfigurationError, match="same batches again"):
        optimizer.step()


def test_a_draw_that_was_left_out_with_a_refused_step_does_not_come_back_from_its_seed() -> None:
    model, optimizer = model_of()
    (batch,) = drawn(1, seed=7)
    loss_of(model, batch).backward()
    next(model.net.parameters()).grad.mul_(1.5)
    with pytest.raises(PrivacyError):
        optimizer.step()
    (again,) = drawn(1, seed=7)
    loss_of(model, again).backward()
    with pytest.raises(ConfigurationError, match="same batches again"):
        optimizer.step()
    assert len(optimizer.accountant) == 0


@pytest.mark.parametrize("terms", ["another step on a draw", "a whole table", "no amplification"])
def test_a_seeded_draw_comes_again_where_its_step_is_charged_as_all_rows_anyway(terms: str) -> None:
    rate = 1.0 if terms == "a whole table" else RATE
    model, _ = model_of()
    optimizer = CliplessDPSGD(
        model,
        lr=0.1,
        noise_multiplier=1.0,
        sample_rate=rate,
        dataset_size=SIZE,
        sampling="none" if terms == "no amplification" else "announced",
    )

    def batches() -> list[Any]:
        return list(PoissonBatches(data(), sample_rate=rate, steps=2, seed=7))

    first = batches()
    again = first if terms == "another step on a draw" else batches()
    expected = pytest.warns(PrivacyWarning) if again is first else nullcontext()
    with expected:
        for batch in (*first, *again):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.steps_taken == 4


@pytest.mark.parametrize("write", [by_data, by_numpy])
def test_what_a_source_of_noise_writes_into_gradients_beneath_their_counters_is_refused(
    write: Callable[..., None],
) -> None:
    class Writing(ReproducibleNoise):
        def begin_step(self, step: int) -> None:
            super().begin_step(step)
            # It is tried where the optimizer is made.
            if all(parameter.grad is not None for parameter in model.net.parameters()):
                write([parameter.grad for parameter in model.net.parameters()], new)

    model, _ = model_of()
    new = raw(model)
    optimizer = CliplessDPSGD(
        model, lr=0.1, noise_multiplier=1.0, sample_rate=RATE, dataset_size=SIZE, noise=Writing(0)
    )
    (batch,) = drawn(1)
    loss_of(model, batch).backward()
    before = [parameter.detach().clone() for parameter in model.net.parameters()]
    with pytest.raises(PrivacyError, match="changed while a step was under way"):
        optimizer.step()
    assert all(map(torch.equal, before, model.net.parameters()))


def test_a_column_of_a_weight_that_changes_between_the_ways_is_noticed() -> None:
    torch.manual_seed(0)
    model, _ = wrapped(nn.Sequential(nn.Linear(6, 2000), nn.ReLU(), nn.Linear(2000, 3)))
    (batch,) = drawn(1)
    loss = loss_of(model, batch)
    model.net[2].weight.data[:, 7] *= 1e6
    with pytest.raises(PrivacyError, match="changed between a forward pass and its backward pass"):
        loss.backward()


def on_few_lines(gradients: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for gradient, other in zip(gradients, new, strict=True):
        # Where a border of pictures is black, first layers have no gradients.
        gradient.data[..., 16:] += other[..., 16:]


def on_every_second_row(gradients: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for gradient, other in zip(gradients, new, strict=True):
        gradient.numpy()[1::2] += other.numpy()[1::2]


@pytest.mark.parametrize("write", [on_few_lines, on_every_second_row])
@pytest.mark.parametrize("when", ["before the step", "after it"])
@pytest.mark.parametrize("shape", [(32, 784), (256, 784), (512, 512), (64, 64)])
def test_what_is_written_beneath_the_counters_on_some_lines_of_a_gradient_is_noticed(
    shape: tuple[int, int], when: str, write: Callable[..., None]
) -> None:
    torch.manual_seed(0)
    outputs, inputs = shape
    model = DPLipModel(
        gated(nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.ReLU(), nn.Linear(outputs, 3, bias=False))),
        input_shape=(inputs,),
        input_norm=1.0,
        loss=losses.TauCrossEntropy(),
    )
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=RATE, dataset_size=SIZE)
    _, targets = data()
    batches = iter(PoissonBatches((torch.rand(SIZE, inputs), targets), sample_rate=RATE, steps=2))
    loss_of(model, next(batches)).backward()
    if when == "after it":
        optimizer.step()
    kept = [parameter.grad for parameter in model.net.parameters()]
    write(kept[:1], [torch.randn_like(kept[0])])
    if when == "after it":
        loss_of(model, next(batches)).backward()
    with pytest.raises(PrivacyError, match="changed, or added to"):
        optimizer.step()


def test_what_an_accountants_own_step_writes_into_gradients_is_refused() -> None:
    model, optimizer = model_of()
    honest = optimizer.accountant.step

    def logged(**step: Any) -> None:
        honest(**step)
        by_data([parameter.grad for parameter in model.net.parameters()], new)

    (batch,) = drawn(1)
    new = raw(model)
    loss_of(model, batch).backward()
    optimizer.accountant.step = logged  # type: ignore[method-assign]
    with pytest.raises(PrivacyError, match="changed while a step was under way"):
        optimizer.step()


class Beside:
    """What a layer's class has beside torch's."""

    beside: object = 0.0


class Slotted:
    """A class that keeps what it has in a slot."""

    __slots__ = ("slot",)


class Scale(nn.Module, Beside, Slotted):  # type: ignore[misc]
    """A layer of one's own that reads its factor once more on the way back, keeps what passes, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.calls = 1.0, 0
        self.record = np.zeros(1, [("value", float)])[0]

    base = 0.0

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return checkpoint(lambda some: some * self.factor, values, use_reentrant=False)


@register_rule(Scale)
def rule_of_scale(module: Scale, context: RuleContext) -> LayerBounds:
    return LayerBounds(output_norm=abs(module.factor) * context.input_norm, lipschitz=abs(module.factor))


class Product(nn.Module):
    """A linear layer of one's own that keeps what it was given and has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, values: Tensor) -> Tensor:
        self.given, self.returned = values, values @ self.weight.t()
        return self.returned


@register_rule(Product)
def rule_of_product(module: Product, context: RuleContext) -> LayerBounds:
    operator = operators.DenseOperator()
    return LayerBounds(
        output_norm=lambda: context.norm("weight", operator) * context.input_norm,
        lipschitz=lambda: context.norm("weight", operator),
        gradients={"weight": lambda: context.input_norm},
        operators={"weight": operator},
    )


def with_own(layer: nn.Module) -> tuple[DPLipModel, CliplessDPSGD]:
    torch.manual_seed(0)
    return wrapped(nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)))


class EqualToAll(float):
    """As a number may be that compares by a code of its own."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def of_the_class(layer: nn.Module, value: object) -> None:
    type(layer).base = value  # type: ignore[attr-defined]


def of_a_class_beside_it(layer: nn.Module, value: object) -> None:
    Beside.beside = value


def in_place(layer: Any, value: float) -> None:
    layer.record["value"] = value


def in_a_slot(layer: Any, value: float) -> None:
    layer.slot = value


def to_the_other_mode(layer: nn.Module, value: object) -> None:
    layer.train(not value)


ELSEWHERE: dict[str, Callable[[Any, Any], None]] = {
    "of its class": of_the_class,
    "of a class beside torch's": of_a_class_beside_it,
    "a record, in place": in_place,
    "in a slot": in_a_slot,
    "the mode": to_the_other_mode,
}


CHANGES: dict[str, tuple[object, object]] = {
    "a number": (1.0, 100.0),
    "one of NumPy's": (1.0, np.float64(100.0)),
    "a tensor": (1.0, torch.tensor(100.0)),
    "nothing before": (None, 100.0),
    "no number before": (float("nan"), 100.0),
    "a switch": (False, True),
    "a decimal": (Decimal(1), Decimal(100)),
    "one that is equal to all": (1.0, EqualToAll(100.0)),
}


@pytest.mark.parametrize("change", [*CHANGES, *ELSEWHERE])
def test_a_number_of_a_layer_of_ones_own_that_is_set_between_the_ways_is_refused(change: str) -> None:
    model, _ = with_own(Scale())
    (batch,) = drawn(1)
    layer = model.net[1]
    before, after = CHANGES.get(change, (0.0, 100.0))
    elsewhere = ELSEWHERE.get(change, lambda layer, value: setattr(layer, "offset", value))
    elsewhere(layer, before)
    loss = loss_of(model, batch)
    try:
        elsewhere(layer, after)
        with pytest.raises(PrivacyError, match="of a layer of your own"):
            loss.backward()
    finally:
        elsewhere(layer, before)
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_what_a_layer_of_ones_own_counted_before_it_failed_is_its_own() -> None:
    class Failing(Scale):
        def forward(self, values: Tensor) -> Tensor:
            self.tried = getattr(self, "tried", 0) + 1
            if len(values) == 1:
                raise ValueError("one row")
            return super().forward(values)

    register_rule(Failing)(rule_of_scale)
    layer = Failing()
    layer.tried = 0
    model, optimizer = with_own(layer)
    (batch,) = drawn(1)
    loss = loss_of(model, batch)
    with pytest.raises(ValueError, match="one row"), torch.no_grad():
        model(batch.inputs[:1])
    loss.backward()
    optimizer.step()


def test_a_layer_of_ones_own_may_count_on_the_way_back_and_in_evaluation() -> None:
    class Counting(Scale):
        def forward(self, values: Tensor) -> Tensor:
            self.evaluated = getattr(self, "evaluated", 0) + (not self.training)
            made = super().forward(values)
            if made.requires_grad:
                made.register_hook(self._count)
            return made

        def _count(self, cotangent: Tensor) -> None:
            self.seen = getattr(self, "seen", 0) + 1

    register_rule(Counting)(rule_of_scale)
    layer = Counting()
    layer.seen = 0
    torch.manual_seed(0)
    model, optimizer = wrapped(nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 8), layer, nn.Linear(8, 3)))
    for batch in drawn(3):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        model.eval()
        model(batch.inputs)
        model.train()
        loss.backward()
        optimizer.step()
    assert optimizer.steps_taken == 3
    assert layer.seen >= 6


def test_a_number_of_a_layer_of_ones_own_may_be_set_before_a_pass_and_moved_by_the_layer() -> None:
    model, optimizer = with_own(Scale())
    for number, batch in enumerate(drawn(3)):
        model.net[1].factor = 1.0 + number
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        with torch.no_grad():
            model(batch.inputs)
        loss.backward()
        bounds = model.sensitivity().per_parameter
        rows = len(batch.inputs)
        assert all(float(p.grad.norm()) <= rows * bounds[name] for name, p in model.net.named_parameters())
        optimizer.step()
    assert optimizer.steps_taken == 3


@pytest.mark.parametrize("of_a_weight", [False, True])
def test_what_a_hook_writes_on_the_way_back_and_another_one_puts_back_is_refused(of_a_weight: bool) -> None:
    model, _ = with_own(Product())
    (batch,) = drawn(1)
    loss = loss_of(model, batch)
    layer = model.net[1]
    written = layer.weight if of_a_weight else layer.given
    before = written.detach().clone()

    def write(_: Tensor) -> None:
        written.data.mul_(100.0)

    def put_back(_: Tensor) -> None:
        written.data.copy_(before)

    layer.returned.register_hook(write)
    layer.given.register_hook(put_back)
    with pytest.raises(PrivacyError, match=r"was written to between|was changed between a forward pass"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_a_hook_in_place_of_the_layers_own_and_one_put_on_the_way_back_are_refused() -> None:
    class Hooked(Product):
        def forward(self, values: Tensor) -> Tensor:
            made = super().forward(values)
            self.handle = made.register_hook(lambda cotangent: None) if made.requires_grad else None
            return made

    def exchange(layer: Any) -> None:
        layer.handle.remove()
        layer.returned.register_hook(lambda cotangent: cotangent * 1000.0)

    def late(layer: Any) -> None:
        def put(_: Tensor) -> None:
            layer.given.register_hook(lambda cotangent: cotangent * 1000.0)

        layer.returned.register_hook(put)

    register_rule(Hooked)(rule_of_product)
    for act in (exchange, late):
        model, _ = with_own(Hooked())
        (batch,) = drawn(1)
        loss = loss_of(model, batch)
        act(model.net[1])
        with pytest.raises(PrivacyError, match=r"has changed what comes back|while a backward pass ran"):
            loss.backward()
        assert all(parameter.grad is None for parameter in model.net.parameters())


def test_weights_of_one_stride_throughout_are_trained() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    net[0].weight = nn.Parameter((torch.randn(64, 128) * 0.05)[:, ::2])
    model = DPLipModel(gated(net), input_shape=(64,), input_norm=1.0, loss=losses.TauCrossEntropy())
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=RATE, dataset_size=SIZE)
    _, targets = data()
    for batch in PoissonBatches((torch.rand(SIZE, 64), targets), sample_rate=RATE, steps=2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert optimizer.steps_taken == 2


def test_hooks_on_what_a_layer_of_ones_own_keeps_may_look() -> None:
    model, optimizer = with_own(Product())
    (batch,) = drawn(1)
    loss = loss_of(model, batch)
    seen: list[float] = []
    model.net[1].returned.register_hook(lambda cotangent: seen.append(float(cotangent.norm())))
    loss.backward()
    optimizer.step()
    assert len(seen) == 1
