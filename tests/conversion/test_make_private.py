from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from accounting import create_accountant
from clipless_dp import (
    BudgetExhaustedError,
    CliplessDPSGD,
    ConfigurationError,
    DPLipModel,
    LossBoundError,
    PoissonBatchSampler,
    PrivacyError,
    PrivacyWarning,
    UnsupportedModuleError,
    gated,
    losses,
    make_private,
    passes,
)
from clipless_dp.noise import ReproducibleNoise
from tests.support import samples

TARGET = {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 2, "accountant": "rdp"}
THREE = torch.tensor(3.0)
DATA = TensorDataset(*samples(60))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def private(net=None, loader=None, optimizer=None, **given):
    net = network() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1) if optimizer is None else optimizer
    loader = DataLoader(DATA, batch_size=20, shuffle=True) if loader is None else loader
    return make_private(net, optimizer, loader, **{"loss": nn.CrossEntropyLoss(), **TARGET, **given})


def train(made, epochs=1):
    model, optimizer, loader = made
    for _ in range(epochs):
        for inputs, targets in loader:
            made.loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()


def steps_by_labels(made):
    """How many steps an epoch takes whose batches hold labels by that name."""
    for batch in made.data_loader:
        made.loss(made.model(batch), batch["labels"]).backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
    return made.optimizer.steps_taken


@pytest.mark.parametrize(
    "given",
    [{}, {"input_norm": 3.0}, {"max_grad_norm": 1.0}, {"route": "signal gates", "input_norm": 3.0}],
    ids=["isolated", "graph", "flat", "signal"],
)
def test_a_loop_spends_its_target_on_draws_that_are_charged_as_such_and_no_step_more(given):
    net = network()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    made = private(net, **given)
    train(made, epochs=2)
    assert made.steps == made.optimizer.steps_taken == 6
    assert 2.9 < made.get_epsilon() <= 3.0
    ((event, count),) = made.optimizer.accountant.ledger.entries
    assert (count, event.sampling.sample_rate) == (6, 20 / 60)
    assert all(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    with pytest.raises(BudgetExhaustedError):
        train(made)


def test_noise_is_what_an_accountant_of_its_own_asks_for_and_is_added():
    made = private()
    asked = create_accountant("rdp")
    asked.step(noise_multiplier=made.noise_multiplier, sample_rate=made.sample_rate, steps=6)
    assert 2.9 < asked.get_epsilon(1e-3) <= 3.0
    # Of an empty draw a step is noise of deviation σ_θ over the expected batch of 1, times the rate.
    net = nn.Sequential(nn.Linear(6, 1700), nn.Linear(1700, 3))
    made = private(net, DataLoader(DATA, batch_size=1), noise=ReproducibleNoise(0))
    deviation = made.optimizer.noise_deviations()["0.weight"]
    # One of 60 draws is empty but for a probability of 10⁻¹².
    for inputs, targets in made.data_loader:
        old = net[0].weight.detach().clone()
        made.loss(made.model(inputs), targets).backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
        if not len(inputs):
            break
    moved = (net[0].weight.detach() - old) / (0.1 * deviation)
    # Mean square of 10 200 normal numbers: within seven standard errors; half the noise would give 0.25.
    assert abs(float(moved.square().mean()) - 1.0) < 7 * math.sqrt(2 / 10_200)


def test_the_optimizer_stays_the_users_own_with_groups_and_schedules():
    net = network()
    own = torch.optim.Adam([{"params": net[0].parameters(), "lr": 0.3}, {"params": net[2].parameters()}], lr=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(own, 0.5)
    made = private(net, optimizer=own)
    assert made.optimizer.base_optimizer is own
    train(made)
    schedule.step()
    assert [group["lr"] for group in made.optimizer.param_groups] == [0.15, 0.1]
    assert made.optimizer.learning_rates == [((0.3, 0.2), 3)]


def test_the_loader_keeps_how_samples_are_read():
    def collate(rows):
        return torch.stack([inputs for inputs, _ in rows]) / 2, torch.tensor([int(target) for _, target in rows])

    given = DataLoader(DATA, batch_size=7, collate_fn=collate, timeout=0, drop_last=True)
    made = private(loader=given)
    loader = made.data_loader
    assert isinstance(loader.batch_sampler, PoissonBatchSampler)
    assert (loader.dataset, loader.num_workers, len(loader)) == (DATA, 0, math.ceil(60 / 7))
    largest = max(float(inputs.abs().max()) for inputs, _ in loader if len(inputs))
    assert largest <= float(DATA.tensors[0].abs().max()) / 2
    assert "drop_last" in made.summary()
    assert "shuffle" in made.summary()


def test_draws_do_not_follow_a_generator_of_the_users():
    def drawn():
        generator = torch.Generator().manual_seed(3)
        made = private(loader=DataLoader(DATA, batch_size=20, shuffle=True, generator=generator))
        assert "generator: left out" in made.summary()
        torch.manual_seed(0)
        return [len(inputs) for inputs, _ in made.data_loader], [inputs.sum() for inputs, _ in made.data_loader]

    # Two draws of 60 samples are the same with a probability below 10⁻¹⁰.
    assert drawn()[1] != drawn()[1]


def test_a_loader_with_workers_trains_on_draws_that_are_known():
    made = private(loader=DataLoader(DATA, batch_size=20, num_workers=1))
    train(made)
    ((event, count),) = made.optimizer.accountant.ledger.entries
    assert (count, event.sampling.sample_rate) == (3, 20 / 60)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


class Batches(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return DATA[index]


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (lambda: [1, 2], "must be a torch.utils.data.DataLoader"),
        (lambda: DataLoader(Endless(), batch_size=2), "StreamedBatches"),
        (lambda: DataLoader(Batches(), batch_size=None), "batch_size=None"),
        (lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 5, False)), "BatchSampler"),
        (
            lambda: DataLoader(DATA, batch_sampler=PoissonBatchSampler(60, sample_rate=0.1, steps=3)),
            "PoissonBatchSampler already",
        ),
        (lambda: DataLoader(DATA, batch_size=5, sampler=WeightedRandomSampler([1.0] * 60, 60)), "weigh classes"),
        (lambda: DataLoader(DATA, batch_size=5, sampler=SubsetRandomSampler(range(9))), "Subset"),
        (lambda: DataLoader(DATA, batch_size=5, sampler=RandomSampler(DATA, replacement=True)), "replacement"),
        (lambda: DataLoader(DATA, batch_size=5, sampler=RandomSampler(DATA, num_samples=30)), "other than all"),
    ],
    ids=["none", "iterable", "whole", "batch-sampler", "poisson", "weighted", "subset", "replacement", "number"],
)
def test_loaders_whose_meaning_cannot_be_kept_are_refused_with_what_to_do(loader, said):
    with pytest.raises(ConfigurationError, match=said):
        private(loader=loader())


def test_a_sample_that_is_there_twice_is_refused():
    with pytest.raises(PrivacyError, match="one and the same"):
        private(loader=DataLoader(Subset(DATA, [0, 1, 1]), batch_size=2))


def test_optimizers_that_stepped_or_hold_other_parameters_are_refused_before_anything_is_changed():
    net = network()
    stepped = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 6)).sum().backward()
    stepped.step()
    with pytest.raises(ConfigurationError, match="has taken steps"):
        private(net, optimizer=stepped)
    with pytest.raises(ConfigurationError, match="not of net"):
        private(net, optimizer=torch.optim.SGD(network().parameters(), lr=0.1))
    model = DPLipModel(gated(network()), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(1.0))
    taken = CliplessDPSGD(model, 0.1, noise_multiplier=1.0, sample_rate=0.1, dataset_size=60)
    with pytest.raises(ConfigurationError, match="private already"):
        private(model, optimizer=taken, loss=None)
    with pytest.raises(ConfigurationError, match=r"torch\.optim\.Optimizer"):
        private(net, optimizer=net)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target_epsilon": None}, "give target_epsilon"),
        ({"epochs": None}, "give target_epsilon"),
        ({"noise_multiplier": 1.0}, "leave one out"),
        ({"noise_multiplier": 1.0, "epochs": None, "target_delta": None}, "give target_delta"),
        ({"route": "prayers"}, "route must be one of"),
        ({"route": "signal gates"}, "needs input_norm"),
        ({"max_grad_norm": 1.0, "gates": {}}, "one of the two"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"loss": None}, "give loss="),
        ({"gates": 3}, "gates must be a mapping"),
        ({"gates": {"a": 1}}, "gates hold a"),
    ],
)
def test_arguments_that_contradict_each_other_or_are_out_of_range_are_refused(given, said):
    with pytest.raises(ConfigurationError, match=said):
        private(**given)


def test_a_noise_multiplier_stands_for_a_target():
    made = private(noise_multiplier=2.0, target_epsilon=None, epochs=None)
    assert (made.noise_multiplier, made.steps, made.optimizer.budget) == (2.0, None, None)
    assert made.get_epsilon() == 0.0
    with pytest.raises(ConfigurationError, match="say which δ"):
        private(noise_multiplier=2.0, target_epsilon=None, target_delta=None, epochs=None).get_epsilon()


def test_a_loss_of_the_loops_own_is_refused_and_nothing_of_it_is_released():
    made = private()
    model, optimizer, loader = made
    inputs, targets = next(iter(loader))
    with pytest.raises(PrivacyError, match="a loss other than"):
        functional.cross_entropy(model(inputs), targets).backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())
    with pytest.raises(PrivacyError):
        optimizer.step()
    optimizer.skip_draw()
    train(made)
    # Without gradients of parameters, and in evaluation, any loss will do.
    functional.cross_entropy(model(inputs).detach(), targets)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), {"label_smoothing": 0.1}),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0])), {"weight": torch.tensor([1.0, 2.0, 4.0])}),
        (functional.cross_entropy, {}),
    ],
    ids=["smoothed", "weighted", "function"],
)
def test_torchs_cross_entropy_has_the_same_values_here(given, options):
    model = private(loss=given).model
    outputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, -100])
    expected = functional.cross_entropy(outputs, targets, reduction="sum", **options)
    torch.testing.assert_close(model.loss(outputs, targets), expected)


@pytest.mark.parametrize(
    ("given", "like"),
    [
        (nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(reduction="sum")),
        (
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
            nn.BCEWithLogitsLoss(reduction="sum", pos_weight=torch.tensor(3.0)),
        ),
        (nn.L1Loss(), nn.L1Loss(reduction="sum")),
        (nn.HuberLoss(delta=0.3), nn.HuberLoss(delta=0.3, reduction="sum")),
        (nn.SmoothL1Loss(), nn.SmoothL1Loss(reduction="sum")),
    ],
    ids=["binary", "binary-weighted", "absolute", "huber", "smooth"],
)
def test_other_losses_of_torch_have_the_same_values_here(given, like):
    data = TensorDataset(DATA.tensors[0], (DATA.tensors[1] > 0).float())
    net = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    model = private(net, loader=DataLoader(data, batch_size=20), loss=given).model
    outputs, targets = torch.randn(5), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(model.loss(outputs, targets), like(outputs, targets))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (nn.MSELoss(), LossBoundError),
        (functional.mse_loss, LossBoundError),
        (lambda outputs, targets: outputs.sum(), LossBoundError),
        (nn.CrossEntropyLoss(reduction="sum"), ConfigurationError),
        (nn.CrossEntropyLoss(ignore_index=0), ConfigurationError),
        (nn.SmoothL1Loss(beta=0.5), ConfigurationError),
        (nn.BCEWithLogitsLoss(weight=torch.ones(3)), ConfigurationError),
    ],
    ids=["squares", "function", "own", "sum", "ignored", "beta", "weight"],
)
def test_losses_without_a_bound_or_a_counterpart_are_refused(given, error):
    with pytest.raises(error, match=r"[lL]oss|ignore_index"):
        private(loss=given)


def test_a_batch_norm_is_refused_with_its_replacement():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(UnsupportedModuleError, match=r"GroupNorm|convert_batchnorm"):
        private(net)


def test_a_wrapped_model_keeps_its_bounds_and_its_loss():
    model = DPLipModel(gated(network()), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(8.0))
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    made = private(model, optimizer=optimizer, loss=None)
    assert made.model is model
    train(made)
    with pytest.raises(ConfigurationError, match="leave these out"):
        private(model, optimizer=optimizer)


def test_tokens_and_batches_that_are_mappings_train():
    tokens = TensorDataset(torch.randint(0, 9, (60, 5)), DATA.tensors[1])
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3))
    train(private(net, loader=DataLoader(tokens, batch_size=20)))

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.attention = nn.Embedding(9, 4), nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, ids, mask):
            hidden = self.embedding(ids)
            hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
            return self.head((hidden * mask[..., None]).mean(1))

    rows = [{"ids": torch.randint(0, 9, (5,)), "mask": torch.ones(5), "labels": torch.tensor(i % 3)} for i in range(60)]
    made = private(Named(), loader=DataLoader(rows, batch_size=20))
    assert steps_by_labels(made) == 3


def test_a_network_keeps_its_mode():
    net = network().eval()
    private(net)
    assert not net.training


def test_the_optimizer_of_the_loop_before_no_longer_steps_by_itself():
    net = network()
    own = torch.optim.SGD(net.parameters(), lr=0.1)
    made = private(net, optimizer=own)
    inputs, targets = next(iter(made.data_loader))
    made.loss(made.model(inputs), targets).backward()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(PrivacyError, match="base optimizer of a private one"):
        own.step()
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    made.optimizer.step()
    assert made.optimizer.steps_taken == 1
    with pytest.raises(PrivacyError, match="base optimizer of a private one"):
        own.step()


def test_what_was_spent_is_said_with_a_warning_where_something_else_has_changed_the_weights():
    made = private()
    train(made)
    assert made.get_epsilon() > 0.0
    other = torch.optim.SGD(made.model.net.parameters(), lr=0.1)
    for parameter in made.model.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.step()
    with pytest.warns(PrivacyWarning, match="what changed them"):
        made.get_epsilon()


def cosine(outputs, inputs, targets):
    return (outputs @ outputs.T).triu(1).sum()


@pytest.mark.parametrize(
    "term",
    [
        cosine,
        lambda outputs, inputs, targets: functional.cross_entropy(outputs, targets),
        lambda outputs, inputs, targets: 20.0 * (outputs.softmax(1).mean(0) ** 2).sum(),
    ],
    ids=["pairs", "mean", "diversity"],
)
@pytest.mark.parametrize("given", [{}, {"max_grad_norm": 1.0}, {"input_norm": 3.0}], ids=["isolated", "flat", "graph"])
def test_a_term_beside_the_models_loss_is_refused_and_nothing_of_it_is_released(term, given):
    made = private(**given)
    model, optimizer, loader = made
    inputs, targets = next(iter(loader))
    outputs = model(inputs)
    with pytest.raises(PrivacyError, match="a term beside"):
        (made.loss(outputs, targets) + term(outputs, inputs, targets)).backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())
    optimizer.skip_draw()
    train(made)


def test_of_a_term_too_small_to_be_told_from_rounding_nothing_is_released():
    found = []
    for weight in (0.0, 1e-6):
        made = private(input_norm=3.0)
        torch.manual_seed(0)
        inputs, targets = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
        outputs = made.model(inputs)
        (made.loss(outputs, targets) + weight * cosine(outputs, inputs, targets)).backward()
        found.append([parameter.grad.clone() for parameter in made.model.net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_another_pass_beside_one_of_the_models_loss_is_refused():
    made = private()
    (inputs, targets), half = next(iter(made.data_loader)), 4
    first, second = made.model(inputs[:half]), made.model(inputs[half:])
    with pytest.raises(PrivacyError, match="a term beside"):
        (made.loss(first, targets[:half]) + second.square().mean()).backward()
    assert all(parameter.grad is None for parameter in made.model.net.parameters())


@pytest.mark.parametrize(
    "given_on",
    [
        lambda outputs: outputs,
        lambda outputs: outputs.clone().view(-1, 3),
        lambda outputs: 2.0 * outputs.double().float() / 3.0,
        lambda outputs: torch.cat(outputs.split(5)),
        lambda outputs: outputs.masked_fill(torch.tensor([False, True, False]), -5.0),
    ],
    ids=["itself", "views", "scaled", "parts", "masked"],
)
def test_what_a_loop_makes_of_outputs_before_the_loss_trains_as_without_the_check(given_on):
    made = private(network(), input_norm=3.0)
    inputs, targets = next(iter(made.data_loader))
    outputs = made.model(inputs)
    if len(outputs) < 6:
        pytest.skip("a draw of few rows, once in 10⁵ runs")
    made.loss(given_on(outputs), targets).backward()
    found = [parameter.grad.clone() for parameter in made.model.net.parameters()]
    free = private(network(), input_norm=3.0)
    free.model._factors.required = False
    free.model.loss(given_on(free.model(inputs)), targets).backward()
    for one, parameter in zip(found, free.model.net.parameters(), strict=True):
        assert torch.equal(one, parameter.grad)


def test_two_losses_of_one_output_and_several_passes_train():
    made = private()
    inputs, targets = next(iter(made.data_loader))
    outputs = made.model(inputs)
    (made.loss(outputs, targets) + 0.5 * made.loss(outputs.flip(1), targets)).backward()
    made.optimizer.step()
    assert made.optimizer.steps_taken == 1


def test_a_parameter_beside_the_network_gets_no_gradient_without_noise():
    made = private()
    inputs, targets = next(iter(made.data_loader))
    temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(PrivacyError, match="not of the network"):
        made.loss(made.model(inputs) * temperature, targets)
    made.loss(made.model(inputs) * temperature.detach(), targets).backward()
    assert temperature.grad is None


def test_one_input_by_name_trains_an_ordinary_network_and_weights_of_classes_are_told_of():
    rows = [{"x": row, "labels": target} for row, target in zip(*DATA.tensors, strict=True)]

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return self.body(x)

    made = private(Named(), loader=DataLoader(rows, batch_size=20), loss=nn.CrossEntropyLoss(weight=torch.ones(3)))
    assert "divides by the sum of their weights" in made.summary()
    assert steps_by_labels(made) == 3


def test_a_batch_norm_that_is_frozen_in_evaluation_stays_so():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    net[1].eval().requires_grad_(False)
    made = private(net)
    assert [part.training for part in net] == [True, False, True]
    train(made)
    assert made.optimizer.steps_taken == 3
    assert torch.equal(net[1].running_mean, torch.zeros(8))


def squares(outputs, targets):
    return (outputs - targets).pow(2).sum(1)


OWN = losses.BoundedLoss(squares, 2.0)


@pytest.mark.parametrize(
    "target",
    [
        lambda net, outputs, targets, beside: beside[targets],
        lambda net, outputs, targets, beside: outputs.roll(1, 0),
        lambda net, outputs, targets, beside: outputs.mean(0, keepdim=True).expand_as(outputs),
        lambda net, outputs, targets, beside: net[2].bias.expand_as(outputs),
    ],
    ids=["centres", "other-rows", "mean", "weights"],
)
def test_a_target_that_requires_gradients_is_refused_and_a_detached_one_trains(target):
    """What centres that are learned got was a sum over samples without bound or noise."""
    net, beside = network(), nn.Parameter(torch.zeros(3, 3))
    model, optimizer, loader = made = private(net, loss=OWN, max_grad_norm=1.0)
    for inputs, targets in loader:
        outputs = model(inputs)
        wanted = target(net, outputs, targets, beside)
        if len(inputs):
            with pytest.raises(PrivacyError, match=r"target that model\.loss is given requires gradients"):
                made.loss(outputs, wanted)
        made.loss(outputs, wanted.detach()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert beside.grad is None
    assert optimizer.steps_taken == 3


@pytest.mark.parametrize("given", [{}, {"input_norm": 3.0}], ids=["isolated", "graph"])
@pytest.mark.parametrize(
    "ahead", [lambda inputs, beside: inputs * beside, lambda inputs, beside: inputs + beside - 1.0], ids=["*", "+"]
)
def test_a_tensor_that_inputs_are_computed_from_gets_no_gradient_without_bound_and_noise(given, ahead):
    """A scale of ones and a shift of zeros leave the draw as it is, so that its rows were taken for the draw's."""
    beside = nn.Parameter(torch.ones(6))
    model, optimizer, loader = made = private(**given)
    batches = iter(loader)
    inputs, targets = next(batches)
    with pytest.raises(PrivacyError, match="inputs were computed from a tensor that requires gradients"):
        made.loss(model(ahead(inputs, beside)), targets).backward()
    assert beside.grad is None
    assert all(parameter.grad is None for parameter in model.net.parameters())
    optimizer.skip_draw()
    # Slopes of inputs are of a row each.
    inputs, targets = next(batches)
    inputs.requires_grad_()
    made.loss(model(inputs), targets).backward()
    assert inputs.grad.shape == inputs.shape
    optimizer.step()
    # Declared as nobody's, rows train what they come from, as a generator.
    with passes.public():
        model(torch.ones(4, 6) * beside).square().sum()


def flooding(loss, outputs, count):
    loss.register_hook(lambda cotangent: cotangent / count)


def flooding_a_node(loss, outputs, count):
    loss.grad_fn.register_prehook(lambda cotangents: (cotangents[0] / count,))


def flooding_behind_a_node(loss, outputs, count):
    loss.grad_fn.register_hook(lambda found, cotangents: (found[0] / count,))


@pytest.mark.parametrize("hook", [flooding, flooding_a_node, flooding_behind_a_node])
def test_a_hook_on_the_loss_that_divides_by_what_was_drawn_is_refused_as_the_factor_that_it_is(hook):
    model, optimizer, loader = made = private(input_norm=3.0)

    def trained():
        for step, (inputs, targets) in enumerate(loader):
            outputs = model(inputs)
            loss = made.loss(outputs, targets)
            hook(loss, outputs, 1.0 + step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(PrivacyError, match="the summed loss was multiplied by"):
        trained()
    assert optimizer.steps_taken == 1


def in_place(cotangent):
    cotangent.mul_(0.0)


def beneath_the_counter(cotangent):
    cotangent.data.mul_(0.5)


def one_row_beneath_the_counter(cotangent):
    cotangent.data[-1] = 0.0


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("between", [lambda outputs: outputs, torch.tanh], ids=["output", "between"])
@pytest.mark.parametrize(
    "hook",
    [
        lambda cotangent: cotangent - cotangent.mean(0),
        lambda cotangent: cotangent * 0.5,
        in_place,
        beneath_the_counter,
        one_row_beneath_the_counter,
    ],
    ids=["centred", "scaled", "in-place", "data", "data of a row"],
)
def test_a_hook_that_changes_what_comes_back_to_outputs_is_refused(hook, between, later, monkeypatch):
    model, _optimizer, loader = made = private(input_norm=3.0)
    inputs, targets = next(draw for draw in loader if len(draw[0]) > 1)
    model._between._due = False
    monkeypatch.setattr("clipless_dp.model.own_loss.EVERY", 2**40)
    given_on = between(model(inputs))
    if not later:
        given_on.register_hook(hook)
    loss = made.loss(given_on, targets)
    if later:
        given_on.register_hook(hook)
    with pytest.raises(PrivacyError, match="Hooks may look, not change"):
        loss.backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


def centred(outputs):
    outputs -= outputs.mean(0)


def normed(outputs):
    outputs[:] = nn.functional.batch_norm(outputs.clone(), None, None, training=True)


def centred_by_a_view(outputs):
    outputs.view(-1, 3).sub_(outputs.mean(0))


@pytest.mark.parametrize("mix", [centred, normed, centred_by_a_view])
def test_rows_that_meet_in_an_output_that_is_written_to_are_refused(mix):
    """It is the same object by then, and what computes it is not the pass."""
    model, _optimizer, loader = made = private(input_norm=3.0)
    inputs, targets = next(draw for draw in loader if len(draw[0]) > 1)
    outputs = model(inputs)
    mix(outputs)
    with pytest.raises(PrivacyError, match="comes from several rows"):
        made.loss(outputs, targets)


@pytest.mark.parametrize("write", [lambda outputs: outputs.mul_(1.0), lambda outputs: outputs.div_(0.5)])
def test_a_hook_on_an_output_that_was_written_to_is_refused_and_without_one_it_trains(write):
    model, optimizer, loader = made = private(input_norm=3.0)
    batches = (draw for draw in loader if len(draw[0]) > 1)
    inputs, targets = next(batches)
    outputs = model(inputs)
    write(outputs)
    made.loss(outputs, targets).backward()
    optimizer.step()
    optimizer.zero_grad()
    inputs, targets = next(batches)
    outputs = model(inputs)
    write(outputs)
    outputs.register_hook(lambda cotangent: cotangent * 0.5)
    with pytest.raises(PrivacyError, match="Hooks may look, not change"):
        made.loss(outputs, targets).backward()


@pytest.mark.parametrize("where", ["prehook", "hook"])
def test_a_hook_on_the_node_of_an_output_is_refused_too_without_a_loss_that_is_required(where):
    model, _optimizer, loader = private(input_norm=3.0)
    model._factors.required = False
    inputs, targets = next(iter(loader))
    outputs = model(inputs)
    if where == "prehook":
        outputs.grad_fn.register_prehook(lambda cotangents: (cotangents[0] * 0.5,))
    else:
        outputs.grad_fn.register_hook(lambda found, cotangents: (found[0] * 0.5,))
    with pytest.raises(PrivacyError, match="a hook is on the node"):
        model.loss(outputs, targets).backward()
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_hooks_that_look_and_gradients_that_are_retained_train_as_ever(tmp_path):
    model, optimizer, loader = made = private(input_norm=3.0)
    seen = []
    for inputs, targets in loader:
        outputs = model(inputs)
        softer = outputs / 2.0
        for some in (outputs, softer):
            some.register_hook(lambda cotangent: seen.append(cotangent.norm()))
            some.retain_grad()
        loss = made.loss(softer, targets)
        loss.register_hook(seen.append)
        loss.retain_grad()
        loss.backward()
        assert torch.equal(outputs.grad, softer.grad / 2.0)
        assert float(loss.grad) == 1.0
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.steps_taken == 3
    torch.save(model(inputs), tmp_path / "outputs.pt")


@pytest.mark.parametrize(
    "joined",
    [
        lambda outputs: functional.batch_norm(outputs, None, None, training=True),
        lambda outputs: outputs - outputs.mean(0),
        lambda outputs: outputs / outputs.abs().max(),
        lambda outputs: 0.6 * outputs + 0.4 * outputs.flip(0),
    ],
    ids=["norm", "centred", "largest", "mixed"],
)
@pytest.mark.parametrize("given", [{}, {"max_grad_norm": 1.0}], ids=["isolated", "flat"])
def test_rows_that_meet_between_the_model_and_its_loss_are_refused(joined, given):
    """One sample more changed the sum of gradients by seven times what is stated."""
    model, _optimizer, loader = made = private(**given)
    inputs, targets = next(draw for draw in loader if len(draw[0]) > 3)
    outputs = model(inputs)

    def looked_at_often():
        # Of the row that has the largest entry nothing is told.
        for _ in range(60):
            model._between._due = True
            made.loss(joined(outputs), targets)

    with pytest.raises(PrivacyError, match="rows meet in what the loop computes"):
        looked_at_often()
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize(
    "given_on",
    [
        lambda outputs: outputs.flip(0).flip(0),
        lambda outputs: torch.cat(outputs.split(2)),
        lambda outputs: 30.0 * torch.tanh(outputs / 30.0),
        lambda outputs: outputs[:, [2, 0, 1]],
        lambda outputs: outputs @ torch.ones(3, 3).triu(),
        lambda outputs: outputs.double().log_softmax(1).float(),
    ],
    ids=["flipped", "parts", "capped", "columns", "linear", "softmax"],
)
def test_what_a_loop_computes_of_each_row_alone_is_not_refused(given_on):
    model, optimizer, loader = made = private(input_norm=3.0)
    for inputs, targets in loader:
        made.model._between._due = True
        made.loss(given_on(model(inputs)), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.steps_taken == 3


def test_rows_that_are_chosen_before_the_loss_are_warned_of_once():
    model, optimizer, loader = made = private(input_norm=3.0)
    warned = 0
    for inputs, targets in (draw for draw in loader if len(draw[0]) > 3):
        outputs = model(inputs)
        hardest = functional.cross_entropy(outputs, targets, reduction="none").topk(2).indices
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            made.loss(outputs[hardest], targets[hardest]).backward()
        warned += sum("some of the rows" in str(one.message) for one in told)
        optimizer.step()
        optimizer.zero_grad()
    assert warned == 1


def test_a_new_adagrad_trains_and_optimizers_that_have_stepped_are_refused():
    net = network()
    train(private(net, optimizer=torch.optim.Adagrad(net.parameters(), lr=0.1)))
    for kind, options in ((torch.optim.Adagrad, {}), (torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.5})):
        own = kind(net.parameters(), lr=0.1, **options)
        functional.cross_entropy(net(DATA.tensors[0]), DATA.tensors[1]).backward()
        own.step()
        with pytest.raises(ConfigurationError, match="has taken steps"):
            private(net, optimizer=own)
    own = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(own, 0.9)
    private(net, optimizer=own)
    net = network()
    own = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(own, 0.9)
    functional.cross_entropy(net(DATA.tensors[0]), DATA.tensors[1]).backward()
    own.step()
    with pytest.raises(ConfigurationError, match="has taken steps"):
        private(net, optimizer=own)


def test_options_of_a_function_of_torch_are_those_of_the_loss():
    given = partial(functional.cross_entropy, label_smoothing=0.1)
    model = private(loss=given).model
    outputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, -100])
    torch.testing.assert_close(model.loss(outputs, targets), given(outputs, targets, reduction="sum"))
    for other in (partial(squares, targets=None), partial(functional.cross_entropy, unknown=1)):
        with pytest.raises(LossBoundError):
            private(loss=other)


@pytest.mark.parametrize("given", [{}, {"input_norm": 3.0}], ids=["isolated", "graph"])
def test_a_loop_that_reshapes_samples_is_told_to_let_the_network_do_so(given):
    data = TensorDataset(DATA.tensors[0].view(-1, 2, 3), DATA.tensors[1])
    with pytest.raises(ConfigurationError, match=r"nn\.Flatten\(\) in front"):
        private(loader=DataLoader(data, batch_size=20), **given)


@pytest.mark.parametrize(
    "given",
    [
        {"max_grad_norm": 1.0},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"route": "signal gates"}, marks=pytest.mark.slow),
    ],
    ids=["flat", "gates", "signal"],
)
def test_a_compiled_model_of_a_loop_trains(given):
    torch._dynamo.reset()
    made = private(input_norm=3.0, loader=DataLoader(DATA, batch_size=30), **given)
    compiled = torch.compile(made.model, backend="eager")
    for inputs, targets in made.data_loader:
        made.loss(compiled(inputs), targets).backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
    assert made.optimizer.steps_taken == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_loss_of_a_compiled_function_trains():
    torch._dynamo.reset()

    def own(outputs, targets):
        return functional.cross_entropy(outputs, targets, reduction="none")

    compiled = torch.compile(own, backend="eager", dynamic=True)
    train(private(loss=losses.BoundedLoss(compiled, 2.0), loader=DataLoader(DATA, batch_size=30)))
