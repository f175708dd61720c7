"""The loss of a row cannot depend on another row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import (
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    InputError,
    LossBoundError,
    PoissonBatches,
    PrivacyError,
    fit,
    losses,
)
from clipless_dp.model import rowwise
from clipless_dp.model.rowwise import RowLosses, is_proved
from clipless_dp.training import compiled_loss

CLASSES = 5
Function = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output, target, reduction="none")


def focal(output: Tensor, target: Tensor) -> Tensor:
    entropy = cross_entropy(output, target)
    return (1 - torch.exp(-entropy)) ** 2 * entropy


def with_control_flow(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target) if bool((target >= 0).all()) else cross_entropy(output, target.clamp(min=0))


def into_new_memory(output: Tensor, target: Tensor) -> Tensor:
    found = torch.zeros(len(output), dtype=output.dtype)
    found[:] = cross_entropy(output, target)
    return found


class Halved(losses.TauCrossEntropy):
    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * super().per_sample(output, target)


MAPPED: dict[str, Function] = {
    "cross-entropy": cross_entropy,
    "a torch module": nn.CrossEntropyLoss(reduction="none"),
    "label smoothing": lambda o, t: functional.cross_entropy(o, t, reduction="none", label_smoothing=0.1),
    "nll": lambda o, t: functional.nll_loss(functional.log_softmax(o, 1), t, reduction="none"),
    "focal": focal,
    "bce with logits": lambda o, t: functional.binary_cross_entropy_with_logits(
        o[:, 0], t.to(o.dtype) / 4, reduction="none"
    ),
    "bce": lambda o, t: functional.binary_cross_entropy(o[:, 0].sigmoid(), t.to(o.dtype) / 4, reduction="none"),
    "huber": lambda o, t: functional.huber_loss(o[:, 0], t.to(o.dtype), reduction="none"),
    "custom clamp": lambda o, t: (o[:, 0] - t).clamp(-0.5, 0.5).square(),
    "gathered": lambda o, t: -functional.log_softmax(o, 1).gather(1, t[:, None])[:, 0],
    "one-hot": lambda o, t: -(functional.log_softmax(o, 1) * functional.one_hot(t, CLASSES)).sum(1),
    "in place": lambda o, t: o.clone().mul_(2).sub_(t[:, None]).square().sum(1),
    "cosine": lambda o, t: 1 - functional.cosine_similarity(o, functional.one_hot(t, CLASSES).to(o.dtype)),
    "an expectile": lambda o, t: torch.where(o[:, 0] > t, 0.9, 0.1) * (o[:, 0] - t) ** 2,
}
COMPARED: dict[str, Function] = {
    "kl": lambda o, t: functional.kl_div(functional.log_softmax(o, 1), torch.full_like(o, 0.2), reduction="none").sum(
        1
    ),
    "hinge": lambda o, t: functional.multi_margin_loss(o, t, reduction="none"),
    "median": lambda o, t: (torch.quantile(o, 0.5, dim=1) - t).abs(),
    "control flow": with_control_flow,
    "into new memory": into_new_memory,
}
HONEST = MAPPED | COMPARED


def model_with(function: Function | losses.Loss, *, dtype: torch.dtype = torch.float32) -> DPLipModel:
    torch.manual_seed(0)
    loss = function if isinstance(function, losses.Loss) else losses.BoundedLoss(function, bound=10.0)
    return DPLipModel(nn.Sequential(nn.Linear(4, CLASSES)), input_shape=(4,), input_norm=2.0, loss=loss).to(dtype)


def data(rows: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 4, generator=generator).to(dtype), torch.randint(CLASSES, (rows,), generator=generator)


def gradient(model: DPLipModel, inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    model.zero_grad()
    model.loss(model(inputs), targets, mask).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.net.parameters()])


@pytest.fixture
def always_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "EVERY", 1)


@pytest.mark.usefixtures("always_looking")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_loss_keeps_its_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    loss = losses.BoundedLoss(HONEST[name], bound=10.0)
    rows = RowLosses()
    output = torch.randn(40, CLASSES, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = data()[1]
    plain = HONEST[name](output, target)
    for _ in range(2):
        found = rows(loss, output, target, bound=10.0)
        # The same formula, vectorised otherwise.
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
        both = [torch.autograd.grad(values.sum(), output, retain_graph=True)[0] for values in (found, plain)]
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
    assert rows._mapped == (name in MAPPED)
    assert not rows._due


@pytest.mark.usefixtures("always_looking")
def test_a_subclass_of_an_own_loss_is_mapped_and_the_class_itself_is_trusted() -> None:
    model = model_with(Halved(2.0))
    own = model_with(losses.TauCrossEntropy(2.0))
    torch.testing.assert_close(gradient(model, *data()), 0.5 * gradient(own, *data()))
    assert model.row_losses._mapped
    assert own.row_losses._loss is None
    assert is_proved(losses.TauCrossEntropy())
    assert not is_proved(Halved())


def test_an_own_loss_whose_method_was_replaced_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    one = losses.TauCrossEntropy()
    one.per_sample = lambda output, target: output.mean().expand(len(output))  # type: ignore[method-assign]
    assert not is_proved(one)
    monkeypatch.setattr(losses.Huber, "per_sample", losses.MeanAbsoluteError.per_sample)
    assert not is_proved(losses.Huber())


def batch_hard(output: Tensor, target: Tensor) -> Tensor:
    distances = torch.cdist(output, output)
    same = target[:, None] == target[None]
    return torch.relu(1 + (distances * same).max(1).values - distances.masked_fill(same, 1e9).min(1).values)


class Contrastive(losses.Loss):
    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        scores = functional.normalize(output) @ functional.normalize(output).T
        return functional.cross_entropy(scores, torch.arange(len(output)), reduction="none")

    def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
        return 1.0


MIXING: dict[str, Function | losses.Loss] = {
    "a broadcast (B, 1) - (B,)": lambda o, t: (o[:, :1] - t).clamp(-50, 50).square().mean(1),
    "batch-hard triplets": batch_hard,
    "contrastive": Contrastive(),
    "centred by the batch": lambda o, t: cross_entropy(o - o.mean(0), t),
    "softmax over axis 0": lambda o, t: -functional.log_softmax(o, 0)[:, 0],
    "over the number of rows": lambda o, t: cross_entropy(o, t) / len(o),
    "weights of the batch": lambda o, t: cross_entropy(o, t) / (t[:, None] == t).sum(1),
    "a pair that meets": lambda o, t: (
        cross_entropy(o, t) + 0.1 * o[7, 0] * (torch.arange(len(t)) == 3) if len(o) > 7 else cross_entropy(o, t)
    ),
    "one for all": lambda o, t: cross_entropy(o, t).mean().expand(len(o)),
    "the value alone": lambda o, t: cross_entropy(o, t) + o.detach().mean(),
}


@pytest.mark.parametrize("control_flow", [False, True])
@pytest.mark.parametrize("name", MIXING)
def test_a_loss_in_which_rows_meet_is_refused_before_the_backward_pass(name: str, control_flow: bool) -> None:
    mixing = MIXING[name]
    function = mixing.per_sample if isinstance(mixing, losses.Loss) else mixing

    def looking(output: Tensor, target: Tensor) -> Tensor:
        assert bool((target >= 0).all())
        return function(output, target)

    model = model_with(looking if control_flow else mixing)
    with pytest.raises(PrivacyError, match=r"depends on other rows.*squeeze"):
        gradient(model, *data())
    assert model.net[0].weight.grad is None


def test_one_row_more_changes_no_other_rows_gradient_though_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowLosses, "_look", lambda *given: None)
    model = model_with(losses.BoundedLoss(batch_hard, bound=10.0), dtype=torch.float64)
    inputs, targets = data(dtype=torch.float64)
    contribution = gradient(model, inputs, targets) - gradient(model, inputs[1:], targets[1:])
    # Sums of 40 rows in float64.
    torch.testing.assert_close(contribution, gradient(model, inputs[:1], targets[:1]), rtol=0, atol=1e-12)


def test_fit_names_the_broadcast_instead_of_dropping_all_samples() -> None:
    net = nn.Sequential(nn.Linear(4, 1))
    loss = losses.BoundedLoss(lambda o, t: (o - t).clamp(-50, 50).square().mean(1), bound=1.0)
    model = DPLipModel(net, input_shape=(4,), input_norm=1.0, loss=loss)
    before = net[0].weight.detach().clone()
    inputs, targets = data(200)
    with pytest.raises(PrivacyError, match=r"\(B, 1\) against a target \(B,\)"):
        fit(
            model,
            (inputs, targets.float()),
            epsilon=3.0,
            delta=1e-3,
            epochs=1,
            batch_size=50,
            audit=False,
            accountant="rdp",
            progress=False,
        )
    assert torch.equal(before, net[0].weight)


def test_a_refused_loss_is_not_charged() -> None:
    model = model_with(losses.BoundedLoss(batch_hard, bound=1.0))
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=0.5, dataset_size=40, accountant="rdp")
    (batch,) = PoissonBatches(data(), sample_rate=0.5, steps=1)
    with pytest.raises(PrivacyError, match="other rows"):
        optimizer.accumulate(batch)
    assert optimizer.accountant.history == []


@pytest.mark.parametrize("control_flow", [False, True])
@pytest.mark.parametrize("what", ["random numbers", "a state", "a state that vmap cannot write"])
def test_a_loss_that_is_no_function_of_its_row_is_refused(what: str, control_flow: bool) -> None:
    kept = torch.zeros(())

    def impure(output: Tensor, target: Tensor) -> Tensor:
        if control_flow:
            assert bool((target >= 0).all())
        if what == "random numbers":
            return cross_entropy(functional.dropout(output), target)
        if what == "a state":
            kept.copy_(0.5 * kept + output.detach().mean())
        else:
            kept.fill_(0.5 * float(kept) + float(output.detach().mean()))
        return cross_entropy(output, target) + kept.clone()

    with pytest.raises(PrivacyError, match="two values for the same rows"):
        gradient(model_with(impure), *data())


@pytest.mark.parametrize("control_flow", [False, True])
def test_a_loss_that_changes_its_ways_is_found_at_a_later_batch(
    control_flow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixes = False

    def turning(output: Tensor, target: Tensor) -> Tensor:
        if control_flow:
            assert bool((target >= 0).all())
        return cross_entropy(output - output.mean(0) if mixes else output, target)

    model = model_with(turning)
    gradient(model, *data())
    mixes = True
    monkeypatch.setattr(rowwise.secrets, "randbelow", lambda n: 1)
    gradient(model, *data())
    monkeypatch.setattr(rowwise.secrets, "randbelow", lambda n: 0)
    with pytest.raises(PrivacyError, match="other rows"):
        gradient(model, *data())


def test_batches_of_one_row_do_not_count_as_looked_at() -> None:
    model = model_with(losses.BoundedLoss(batch_hard, bound=1.0))
    for row in range(3):
        gradient(model, *(part[row : row + 1] for part in data()))
    with pytest.raises(PrivacyError, match="other rows"):
        gradient(model, *data())


MUTANTS = {
    "no comparison": ("_differ", lambda *given: torch.zeros(len(given[0]), dtype=torch.bool)),
    "everything is within rounding": ("_RELATIVE", 1e9),
    "trusted, whatever it is": ("is_proved", lambda loss: True),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_without_the_comparison_a_loss_in_which_rows_meet_passes(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, *MUTANTS[mutant])
    gradient(model_with(losses.BoundedLoss(batch_hard, bound=1.0)), *data())


@pytest.mark.usefixtures("always_looking")
@pytest.mark.parametrize("name", ["bce", "control flow", "cross-entropy"])
def test_padding_is_not_shown_to_the_loss(name: str) -> None:
    """Padded rows are NaN with label 0: ``binary_cross_entropy`` raises at the one, labels from 1 at the other."""

    def from_one(output: Tensor, target: Tensor) -> Tensor:
        return HONEST[name](output, target - 1)

    model = model_with(from_one)
    inputs, targets = data()
    targets = targets.clamp(min=1)
    alone = gradient(model, inputs[:30], targets[:30])
    inputs[30:], targets[30:] = torch.nan, 0
    mask = torch.arange(40) < 30
    # Sums over 30 and 40 rows round differently.
    torch.testing.assert_close(gradient(model, inputs, targets, mask), alone, rtol=1e-5, atol=1e-5)
    assert int(model.nonfinite_samples) == 0
    empty = gradient(model, inputs, targets, torch.zeros(40, dtype=torch.bool))
    assert not empty.any()
    inputs[5] = torch.inf
    gradient(model, inputs, targets, mask)
    assert int(model.nonfinite_samples) == 1


def test_what_replaces_padding_on_a_device_gets_no_gradient_and_is_no_padding() -> None:
    output = torch.randn(6, 2).requires_grad_()
    with torch.no_grad():
        output[0] = torch.nan
    usable = torch.tensor([False, False, True, True, False, True])
    filled, targets = rowwise._filled(output, torch.arange(6), usable)
    assert targets.tolist() == [2, 2, 2, 3, 2, 5]
    assert torch.equal(filled[usable], output[usable])
    assert torch.equal(filled[~usable], output[2].expand(3, 2))
    filled.sum().backward()
    assert output.grad[:, 0].tolist() == usable.float().tolist()
    nothing, _ = rowwise._filled(output, torch.arange(6), torch.zeros(6, dtype=torch.bool))
    assert torch.isfinite(nothing).all()


@pytest.mark.parametrize("name", ["cross-entropy", "control flow"])
@pytest.mark.parametrize("rows", [0, 1])
def test_batches_without_rows_and_of_one_row_pass(name: str, rows: int) -> None:
    model = model_with(HONEST[name])
    found = gradient(model, *(part[:rows] for part in data()))
    assert bool(found.any()) == bool(rows)


@pytest.mark.parametrize("rows_at_the_kink", [1, 2])
def test_an_ulp_at_a_kink_is_forgiven_in_one_row(rows_at_the_kink: int) -> None:
    def kinked(output: Tensor, target: Tensor) -> Tensor:
        return torch.relu(output[:, 0] - 1.0 + 1e-12 * (len(output) > 1))

    output = torch.linspace(-3, 3, 40 * CLASSES, dtype=torch.float64).reshape(40, CLASSES)
    output[:rows_at_the_kink, 0] = 1.0
    loss, rows = losses.BoundedLoss(kinked, bound=1.0), RowLosses()
    if rows_at_the_kink == 1:
        rows(loss, output.requires_grad_(), data()[1], bound=1.0)
    else:
        with pytest.raises(PrivacyError, match="other rows"):
            rows(loss, output.requires_grad_(), data()[1], bound=1.0)


@pytest.mark.usefixtures("always_looking")
@pytest.mark.parametrize("name", ["cross-entropy", "control flow"])
def test_looking_leaves_generators_gradients_and_batch_as_they_are(name: str) -> None:
    model = model_with(HONEST[name])
    inputs, targets = data()
    output = model(inputs)
    kept, labels, state = output.detach().clone(), targets.clone(), torch.get_rng_state()
    model.loss(output, targets)
    assert torch.equal(output, kept)
    assert torch.equal(targets, labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.net[0].weight.grad is None


def test_more_rows_than_a_look_takes_are_chosen_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "_ROWS", 8)
    mixing = MIXING["centred by the batch"]
    sizes = []

    def counting(output: Tensor, target: Tensor) -> Tensor:
        assert bool((target >= 0).all())
        sizes.append(len(target))
        return mixing(output, target)  # type: ignore[operator]

    with pytest.raises(PrivacyError, match="other rows"):
        gradient(model_with(counting), *data())
    assert sizes.count(1) == 8


@pytest.mark.parametrize(
    "function",
    [lambda o, t: o.sum(), lambda o, t: o, lambda o, t: t, lambda o, t: None, lambda o, t: 1.0],
    ids=["a scalar", "a matrix", "integers", "nothing", "a number"],
)
def test_a_loss_that_is_not_one_real_number_a_row_is_refused(function: Function) -> None:
    class Own(losses.Loss):
        def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
            return function(output, target)

        def gradient_bound(self, output_shape: tuple[int, ...]) -> float:
            return 1.0

    with pytest.raises(InputError, match="reduction='none'"):
        gradient(model_with(Own()), *data())


def test_a_loss_that_takes_whole_batches_only_is_refused() -> None:
    weights = torch.linspace(0, 1, 40)
    with pytest.raises(PrivacyError, match="not one row of it"):
        gradient(model_with(lambda o, t: cross_entropy(o, t) * weights), *data())


def test_a_device_is_not_waited_for_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Autocast does not know tensors without numbers, of which looking at one raises.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    model = model_with(cross_entropy).to("meta")
    inputs, targets = (part.to("meta") for part in data())
    model.loss(model(inputs), targets, torch.ones(40, dtype=torch.bool, device="meta")).backward()
    assert model.row_losses._mapped


@pytest.mark.slow
def test_a_mapped_loss_compiles_as_one_graph() -> None:
    model = model_with(HONEST["bce"])
    inputs, targets = data()
    mask = torch.arange(40) < 30
    inputs[30:] = torch.nan
    eager = gradient(model, inputs, targets, mask)
    model.zero_grad()
    compiled_loss(model, "aot_eager")(inputs, targets, mask).backward()
    found = torch.cat([parameter.grad.flatten() for parameter in model.net.parameters()])
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_looked_at_once_compiled_is_refused_in_words() -> None:
    with pytest.raises(ConfigurationError, match=r"vmap.*compile=False"):
        compiled_loss(model_with(with_control_flow), "eager")(*data(), torch.ones(40, dtype=torch.bool))
    with pytest.raises(PrivacyError, match="other rows"):
        compiled_loss(model_with(batch_hard), "eager")(*data(), torch.ones(40, dtype=torch.bool))
    run = {"epsilon": 3.0, "delta": 1e-2, "epochs": 1, "batch_size": 10, "compile": "eager", "progress": False}
    with pytest.raises(ConfigurationError, match="write it without what vmap refuses"):
        fit(model_with(with_control_flow), data(), **run)


class Centred:
    """Deep SVDD with a centre from the first batch."""

    def __init__(self) -> None:
        self.centre: Tensor | None = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if self.centre is None:
            self.centre = output.detach().mean(0)
        return (output - self.centre).norm(dim=1)


def centred_by_a_closure() -> Function:
    kept: list[Tensor] = []

    def centred(output: Tensor, target: Tensor) -> Tensor:
        if not kept:
            kept.append(output.detach().mean(0))
        return (output - kept[0]).norm(dim=1)

    return centred


KEPT: list[Tensor] = []


def centred_by_a_global(output: Tensor, target: Tensor) -> Tensor:
    if not KEPT:
        KEPT.append(output.detach().mean(0))
    return (output - KEPT[0]).norm(dim=1)


BEGINNINGS: dict[str, Callable[[], Function]] = {
    "an attribute": Centred,
    "a method": lambda: Centred().__call__,
    "a closure": centred_by_a_closure,
    "a global": lambda: centred_by_a_global,
}


def batch_of(function: Function, bound: float = 1.0) -> tuple[DPLipModel, Tensor, Tensor]:
    torch.manual_seed(0)
    loss = losses.BoundedLoss(function, bound=bound)
    model = DPLipModel(nn.Linear(8, CLASSES), input_shape=(8,), input_norm=1.0, loss=loss)
    return model, model(torch.randn(40, 8)), torch.randint(CLASSES, (40,))


@pytest.mark.parametrize("kept_in", BEGINNINGS)
def test_a_state_from_the_first_batch_is_refused_and_not_left_behind(kept_in: str) -> None:
    model, output, target = batch_of(BEGINNINGS[kept_in]())
    for _ in range(2):
        with pytest.raises(PrivacyError, match="came first"):
            model.loss(output, target)
    assert not KEPT


def test_a_state_from_public_data_is_accepted() -> None:
    function = Centred()
    function(torch.randn(20, CLASSES), torch.zeros(20))
    model, output, target = batch_of(function)
    model.loss(output, target).backward()


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - self.places[target]).square().sum(1)


def test_trained_parameters_of_a_loss_are_refused_and_frozen_ones_accepted() -> None:
    function = Prototypes()
    model, output, target = batch_of(function)
    with pytest.raises(LossBoundError, match="parameters of its own"):
        model.loss(output, target)
    assert function.places.grad is None
    function.requires_grad_(False)
    model.loss(output, target).backward()


class CentredGradient(torch.autograd.Function):
    """Its own rule for vmap lets rows meet."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return cotangent - cotangent.mean(0)

    @staticmethod
    def vmap(info, in_dims, values):
        return CentredGradient.apply(values), in_dims[0]


def test_a_rule_for_vmap_that_lets_rows_meet_is_refused() -> None:
    model, output, target = batch_of(lambda o, t: cross_entropy(CentredGradient.apply(o), t))
    with pytest.raises(PrivacyError, match="depends on other rows"):
        model.loss(output, target)
    assert model.row_losses._mapped


def test_large_losses_of_other_rows_hide_no_difference_of_one() -> None:
    def leaking(output: Tensor, target: Tensor) -> Tensor:
        # Rows of class 0 get what the others' outputs decide; those have losses of a million.
        loud = 1e6 * (1.0 + output.square().sum(1))
        return torch.where(target == 0, output[:, 0] * output.detach().max(), loud)

    model, output, _ = batch_of(leaking, bound=1.0)
    target = torch.ones(40, dtype=torch.int64)
    target[7] = 0
    with pytest.raises(PrivacyError, match="depends on other rows"):
        model.loss(output, target)
