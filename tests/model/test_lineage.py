"""Where weights come from is known of parameters, whichever network, copy, file or average they are in."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from accounting import Ledger, create_accountant
from clipless_dp import losses
from clipless_dp.errors import BudgetExhaustedError, CheckpointError, ConfigurationError, PrivacyError, PrivacyWarning
from clipless_dp.graph import gated
from clipless_dp.model import DPLipModel, WeightAverage, lineage, sums
from clipless_dp.noise import SystemNoise
from clipless_dp.optim import CliplessDPSGD
from clipless_dp.sampling import PoissonBatches
from clipless_dp.search import Candidate, private_search
from clipless_dp.statement import report
from clipless_dp.statistics import private_fraction
from clipless_dp.training import fit, sizing
from tests.support import every_copy, gated_model, power_cut, samples

RUN = {
    "epsilon": 50.0, "delta": 1e-3, "epochs": 1, "batch_size": 75, "lr": 0.5, "progress": False, "accountant": "rdp",
    "noise_multiplier": 2.0, "audit": False,
}  # fmt: skip
LACKS, FOREIGN, BEFORE = "Another optimizer took", "The model's weights are not", "Before .* of the steps the weights"


def base_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def wrapped(net):
    return DPLipModel(gated(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


def private(model, **options):
    settings = {"noise_multiplier": 1.5, "sample_rate": 0.1, "dataset_size": 300, "accountant": "rdp", **options}
    return CliplessDPSGD(model, lr=0.1, **settings)


def train(optimizer, steps, average=None):
    for inputs, targets, mask in PoissonBatches(samples(300), sample_rate=0.1, steps=steps):
        optimizer.zero_grad()
        optimizer.model.loss(optimizer.model(inputs), targets, mask).backward()
        optimizer.step()
        if average is not None:
            average.update()
    return optimizer


def begins(optimizer, *starts):
    """Whether the findings are these, by their beginnings."""
    texts = report(optimizer).findings
    words = [start.split(" .* ")[0] for start in starts]
    return len(texts) == len(words) and all(map(str.startswith, texts, words))


# Networks that share parameters.


def test_a_net_that_is_gated_again_keeps_the_runs_of_its_weights():
    base = base_net()
    first = train(private(wrapped(base)), 3)
    again = private(wrapped(base))
    with pytest.warns(PrivacyWarning, match="already taken private steps"):
        train(again, 1)
    assert begins(again, LACKS)
    # With the ledger of both it is told of nothing.
    together = private(wrapped(base), accountant=first.accountant)
    together.accountant.ledger = together.accountant.ledger.merge(again.accountant.ledger)
    train(together, 1)
    assert begins(together)


def test_a_second_fit_of_a_net_that_is_gated_again_warns():
    base = base_net()
    first = fit(wrapped(base), samples(300), **RUN)
    with pytest.warns(PrivacyWarning, match="already taken private steps"):
        second = fit(wrapped(base), samples(300), **RUN)
    assert begins(second.optimizer, LACKS)
    third = fit(wrapped(base_net(seed=1)), samples(300), **{**RUN, "accountant": first.optimizer.accountant})
    assert begins(third.optimizer)


def test_a_trunk_under_a_new_head_brings_its_runs_with_it_and_hands_them_on_to_the_head():
    trunk, head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)
    train(private(wrapped(nn.Sequential(trunk, nn.Linear(8, 3)))), 2)
    second = private(wrapped(nn.Sequential(trunk, head)))
    with pytest.warns(PrivacyWarning):
        train(second, 1)
    assert begins(second, LACKS)
    on_another = private(wrapped(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head)), accountant=second.accountant)
    with pytest.warns(PrivacyWarning):
        train(on_another, 1)
    assert begins(on_another, LACKS)


def test_heads_on_a_frozen_trunk_know_nothing_of_each_other():
    trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU()).requires_grad_(False)
    train(private(wrapped(nn.Sequential(trunk, nn.Linear(8, 3)))), 2)
    second = private(wrapped(nn.Sequential(trunk, nn.Linear(8, 3))))
    average = WeightAverage(second.model, 0.9)
    train(second, 2, average)
    average.apply_()
    assert begins(second)
    assert begins(train(private(wrapped(nn.Sequential(trunk, nn.Linear(8, 3)))), 1))


def test_wrapping_a_net_again_does_not_forget_a_change_that_no_step_made():
    base = base_net()
    first = train(private(wrapped(base)), 2)
    with torch.no_grad():
        base[0].weight.add_(0.1)
    train(first, 1)
    assert begins(first, BEFORE)
    assert begins(train(private(wrapped(base), accountant=first.accountant), 1), BEFORE)


def test_two_models_that_share_their_net_may_take_turns_with_one_accountant():
    base = base_net()
    first = private(wrapped(base))
    second = private(wrapped(base), accountant=first.accountant)
    for _ in range(2):
        train(first, 1)
        train(second, 1)
    assert begins(first)
    assert begins(second)


@pytest.mark.parametrize("keep", [True, False])
def test_a_parameter_that_takes_the_place_of_another_is_known_by_its_values(keep):
    optimizer = train(private(gated_model()), 2)
    layer = next(part for part in optimizer.model.net.modules() if isinstance(part, nn.Linear))
    values = layer.bias.detach().clone()
    layer.bias = nn.Parameter(values if keep else values + 1.0)
    assert lineage.of(optimizer.model).unchanged(dict(optimizer.model.net.named_parameters())) is keep


def test_what_is_known_of_parameters_lives_no_longer_than_they_do():
    gc.collect()
    optimizer = train(private(gated_model()), 1)
    model = optimizer.model
    traces = [weakref.ref(trace) for trace in lineage.of(model)._traced()]
    numbers = [weakref.ref(trace().numbers) for trace in traces]
    assert len(numbers) == 4
    assert all(number() for number in numbers)
    del optimizer, model
    gc.collect()
    assert not any(trace() for trace in traces)
    assert not any(number() for number in numbers)


def test_the_memory_of_a_parameter_that_a_network_has_lost_is_freed_while_the_network_lives():
    optimizer = train(private(gated_model()), 1)
    layer = next(part for part in optimizer.model.net.modules() if isinstance(part, nn.Linear))
    numbers = weakref.ref(lineage._known_of(layer.bias).numbers)
    parameter = nn.Parameter(layer.bias.detach().clone())
    optimizer.param_groups[0]["params"] = [
        parameter if known is layer.bias else known for known in optimizer.param_groups[0]["params"]
    ]
    layer.bias = parameter
    assert lineage.of(optimizer.model).unchanged(dict(optimizer.model.net.named_parameters()))
    del optimizer
    gc.collect()
    assert numbers() is None


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("converted", [lambda model: model, lambda model: model.net], ids=["model", "net"])
def test_where_torch_swaps_parameters_a_model_is_converted_and_known_afterwards(converted, swapping):
    base = base_net()
    first = train(private(wrapped(base)), 2)
    if converted(first.model) is not first.model:
        # These gradients are known to the wrapped model, which is not asked.
        first.zero_grad()
    converted(first.model).to(torch.float64)
    converted(first.model).to(torch.float32)
    assert begins(train(first, 1))
    with pytest.warns(PrivacyWarning, match="already taken private steps"):
        alone = train(private(first.model), 1)
    assert begins(alone, LACKS)
    with torch.no_grad():
        next(first.model.net.parameters()).add_(0.1)
    assert lineage.of(first.model).unchanged(dict(first.model.net.named_parameters())) is False


def test_a_net_that_is_wrapped_again_brings_its_runs_after_a_conversion_that_swaps(swapping):
    base = base_net()
    train(private(wrapped(base)), 2).model.double().float()
    with pytest.warns(PrivacyWarning, match="already taken private steps"):
        again = train(private(wrapped(base)), 1)
    assert begins(again, LACKS)


@every_copy
def test_a_copy_of_a_parameter_takes_nothing_of_what_is_known_of_it_along(copied):
    parameter = next(train(private(gated_model()), 1).model.net.parameters())
    assert lineage._known_of(parameter).runs
    assert lineage._known_of(copied(parameter)) is None


def test_parameters_are_saved_as_files_of_weights_alone_hold_them(tmp_path):
    net = train(private(gated_model()), 1).model.net
    torch.save(net.state_dict(keep_vars=True), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(loaded[name], parameter) for name, parameter in net.named_parameters())


# The order of the values.


def first_alone(sums):
    """As states of before hold it: of 32 bits, with a sign."""
    return (int(sums) + 2**31) % 2**32 - 2**31


CHANGES = {
    "rows in another order": lambda values: values.copy_(values.flip(0)),
    "neighbours that changed places": lambda values: values.view(-1)[:2].copy_(values.view(-1)[:2].flip(0)),
    "changes that cancel": lambda values: values.view(-1).view(torch.int32)[:2].add_(
        torch.tensor([1 << 20, -1 << 20]).int()
    ),
    "all doubled": lambda values: values.mul_(2.0),
}  # fmt: skip


def numbers_of(values):
    return sums.Numbers(nn.Parameter(values.clone()))


# From 16381 numbers on they are summed in columns; 512 bit patterns that grow by 2²³ sum up to what they did.
@pytest.mark.parametrize("shape", [(8, 64), (512, 32), (32, 1024), (700, 1000)], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_the_sum_of_bits_does_not_see_is_seen(change, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    changed = values.clone()
    CHANGES[change](changed)
    before, after = (numbers_of(some).sums() for some in (values, changed))
    assert int(before.second) != int(after.second)
    if change != "all doubled" or values.numel() % 512 == 0:
        assert int(before.first) == int(after.first)
    assert not sums.agree(int(before), int(after))


def test_doubled_numbers_of_64_bits_are_seen():
    values = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, after = numbers_of(values).sums(), numbers_of(2.0 * values).sums()
    assert int(before.first) == int(after.first)
    assert int(before.second) != int(after.second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 2, 2), (40, 30, 30)], ids=str)
def test_sums_are_the_same_in_every_layout_and_leave_the_values_as_they_are(size, dtype):
    values = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    parameter = nn.Parameter(values.clone())
    found = int(sums.Numbers(parameter).sums())
    assert torch.equal(parameter, values)
    assert int(numbers_of(values.to(memory_format=torch.channels_last)).sums()) == found
    assert found % 2**32 == int(values.view(sums.INTEGERS[values.element_size()]).sum()) % 2**32


def test_weights_of_the_second_sum_are_those_of_every_process_and_version():
    parameter = nn.Parameter(torch.arange(20_000, dtype=torch.float32))
    assert int(sums.Numbers(parameter).sums()) == 680564731030635839175884621657878683648


@pytest.mark.parametrize("change", CHANGES)
def test_weights_in_another_order_are_not_those_that_a_step_left(change):
    optimizer = train(private(gated_model()), 2)
    with torch.no_grad():
        CHANGES[change](next(part for part in optimizer.model.net.parameters() if part.dim() == 2))
    assert begins(optimizer, FOREIGN)


@pytest.mark.parametrize("size", [1, 255, sums._COLUMNS - 1, sums._COLUMNS, sums._COLUMNS + 1, 5 * sums._COLUMNS + 77])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_by_numpy_are_those_by_torch(size: int, dtype: torch.dtype) -> None:
    # Large exponents, so that sums of bit patterns run over.
    numbers = numbers_of((torch.randn(size) * 1e30).to(dtype))
    by_numpy = numbers.sums()
    assert not isinstance(by_numpy._columns, torch.Tensor)
    numbers._array = None
    by_torch = numbers.sums()
    assert torch.equal(by_numpy._tensor(), by_torch._tensor())
    assert int(by_numpy) == int(by_torch)


def test_a_state_that_holds_the_first_sums_alone_is_accepted_with_its_weights_and_with_no_others():
    first = train(private(gated_model()), 2)
    state, weights = copy.deepcopy(first.state_dict()), first.model.net.state_dict()
    known = state["clipless_dp"]["weights"]
    state["clipless_dp"]["weights"] = {name: first_alone(value) for name, value in known.items()}
    assert state["clipless_dp"]["weights"] != known
    for change in (0.0, 0.1):
        other = private(gated_model(seed=1))
        other.load_state_dict(copy.deepcopy(state))
        other.model.net.load_state_dict({name: value + change for name, value in weights.items()})
        assert begins(other, *([FOREIGN] if change else []))
        if not change:
            assert begins(train(other, 1))


# Copies and files.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_comes_from_the_same_runs(copied):
    first = train(private(gated_model()), 2)
    model = copied(first.model)
    alone = private(model)
    with pytest.warns(PrivacyWarning):
        train(alone, 1)
    assert begins(alone, LACKS)
    assert begins(train(private(copied(first.model), accountant=first.accountant), 1))
    changed = copied(first.model)
    with torch.no_grad():
        next(changed.net.parameters()).add_(0.1)
    assert begins(train(private(changed, accountant=first.accountant), 1), BEFORE)


def test_a_fit_after_one_that_found_its_checkpoint_finished_knows_of_its_steps(tmp_path):
    path = tmp_path / "run.pt"
    fit(gated_model(), samples(300), checkpoint=path, **RUN)
    model = gated_model()
    fit(model, samples(300), checkpoint=path, **RUN)
    with pytest.warns(PrivacyWarning, match="already taken private steps"):
        second = fit(model, samples(300), **RUN)
    assert begins(second.optimizer, LACKS)


def test_runs_of_a_loaded_state_are_those_of_the_model_once_its_weights_are_there():
    first = train(private(gated_model()), 2)
    state, weights = first.state_dict(), first.model.net.state_dict()
    model = gated_model(seed=1)
    private(model).load_state_dict(copy.deepcopy(state))
    assert lineage.of(model).runs == {}
    model.net.load_state_dict(weights)
    assert list(lineage.of(model).runs.values()) == [2]
    assert private(model).ledger_is_incomplete()
    right = private(gated_model(seed=1))
    right.load_state_dict(copy.deepcopy(state))
    right.model.net.load_state_dict(weights)
    assert begins(train(right, 1))


def test_an_error_between_loading_and_the_first_step_hands_the_ledger_on(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    with power_cut(2):
        fit(gated_model(), samples(300), checkpoint=path, **RUN)
    content = path.read_bytes()

    def fails(*arguments, **options):
        raise RuntimeError("no memory for the data")

    monkeypatch.setattr(sizing, "PoissonBatches", fails)
    with pytest.raises(RuntimeError, match="no memory") as failure:
        fit(gated_model(), samples(300), checkpoint=path, **RUN)
    assert len(failure.value.private_optimizer.accountant) == 2
    assert path.read_bytes() == content


def test_a_checkpoint_with_the_accountant_of_its_own_run_is_told_which_of_them_to_give(tmp_path):
    path = tmp_path / "run.pt"
    calibrated = {name: value for name, value in RUN.items() if name != "noise_multiplier"}
    with power_cut(2) as failure:
        fit(gated_model(), samples(300), checkpoint=path, **calibrated)
    again = {**calibrated, "accountant": failure.value.private_optimizer.accountant}
    with pytest.raises(CheckpointError, match="holds steps of this checkpoint already"):
        fit(gated_model(), samples(300), checkpoint=path, **again)
    assert fit(gated_model(), samples(300), checkpoint=path, **calibrated).steps == 4


# Averages.


def test_an_average_brings_the_runs_that_entered_it():
    first = private(gated_model())
    theirs = WeightAverage(first.model, 0.9)
    train(first, 3, theirs)
    second = private(gated_model(seed=1))
    train(second, 1)
    mine = WeightAverage(second.model, 0.9)
    mine.load_state_dict(theirs.state_dict())
    mine.apply_()
    assert begins(second, LACKS)
    second.accountant.ledger = second.accountant.ledger.merge(first.accountant.ledger)
    assert begins(second)


def test_an_average_of_a_later_step_than_the_ledger_holds_is_found():
    first = train(private(gated_model()), 2)
    early, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(first.model.net.state_dict())
    average = WeightAverage(first.model, 0.9)
    train(first, 2, average)
    for state, expected in ((early, (LACKS,)), (first.state_dict(), ())):
        resumed = private(gated_model(seed=1))
        resumed.load_state_dict(copy.deepcopy(state))
        resumed.model.net.load_state_dict(weights if state is early else first.model.net.state_dict())
        loaded = WeightAverage(resumed.model, 0.9)
        loaded.load_state_dict(average.state_dict())
        loaded.apply_()
        assert begins(resumed, *expected)


def test_an_average_whose_state_tells_no_runs_is_of_unknown_origin():
    optimizer = private(gated_model())
    average = WeightAverage(optimizer.model, 0.9)
    train(optimizer, 2, average)
    state = {name: value for name, value in average.state_dict().items() if name != "runs"}
    average.load_state_dict(state)
    average.apply_()
    assert begins(optimizer, FOREIGN)


def test_weights_that_no_optimizer_has_seen_do_not_count_in_an_average():
    model = gated_model()
    average = WeightAverage(model, 0.9)
    average.update()
    model.net.load_state_dict(gated_model(seed=1).net.state_dict())
    optimizer = train(private(model), 1)
    average.apply_()
    assert begins(optimizer, FOREIGN)


def test_the_last_weights_may_be_put_back_in_place_of_their_average():
    result = fit(gated_model(), samples(300), ema=0.9, **RUN)
    optimizer = result.optimizer
    assert begins(optimizer)
    optimizer.model.net.load_state_dict(result.last_weights, strict=False)
    assert begins(optimizer)
    state, weights = copy.deepcopy(optimizer.state_dict()), optimizer.model.net.state_dict()
    other = private(gated_model(), sample_rate=0.25)
    other.load_state_dict(state)
    other.model.net.load_state_dict(weights)
    assert begins(other)
    with torch.no_grad():
        next(optimizer.model.net.parameters()).add_(1e-3)
    assert begins(optimizer, FOREIGN)


# The search.


def search():
    candidates = [Candidate(gated_model, {"epochs": 0.5, "batch_size": 75})]
    options = {"epsilon": 8.0, "delta": 1e-3, "mean_runs": 1.0, "validation": samples(50)}
    return private_search(candidates, samples(300), **options)


def test_a_model_that_a_search_found_is_counted_by_the_ledger_of_the_search_alone():
    result = search()
    assert begins(train(private(copy.deepcopy(result.model), accountant=result.accountant), 1))
    alone = private(result.model)
    with pytest.warns(PrivacyWarning):
        train(alone, 1)
    assert begins(alone, LACKS)


def test_no_number_of_the_process_tells_which_run_of_a_search_was_the_best():
    model, after = search().model, gated_model()
    assert abs(after.register.key - model.register.key) > 10**6
    # Of 48 random bits: below a million once in 2·10⁸ times.
    assert model.register.key > 10**6
    assert model.randomness.handle > 10**6


# What is assigned later, and what is no argument.


def test_what_is_assigned_later_is_checked_as_the_arguments_are():
    optimizer = private(gated_model())
    with pytest.raises(ConfigurationError, match="sampling must be"):
        optimizer.sampling = "shuffled"
    with pytest.raises(ConfigurationError, match="noise must be"):
        optimizer.noise = "none"
    optimizer.sampling, optimizer.noise = "poisson", "system"
    assert optimizer.sampling == "poisson"
    assert isinstance(optimizer.noise, SystemNoise)


def test_steps_that_a_budget_allowed_are_not_those_of_another_ledger_as_long():
    optimizer = private(gated_model(), budget=(20.0, 1e-3))
    train(optimizer, 1)
    assert optimizer.allows(5)
    spent = create_accountant("rdp")
    spent.step(noise_multiplier=0.05, sample_rate=1.0)
    assert len(spent) == len(optimizer.accountant)
    optimizer.accountant = spent
    with pytest.raises(BudgetExhaustedError):
        train(optimizer, 1)


def test_where_warnings_are_errors_a_step_is_not_charged_and_the_next_one_goes_through():
    base = base_net()
    train(private(wrapped(base)), 1)
    second = private(wrapped(base))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PrivacyWarning):
            train(second, 1)
        assert len(second.accountant) == 0
        train(second, 1)
    assert len(second.accountant) == 1


def test_draws_skipped_in_either_run_are_in_the_statement_of_what_goes_on_from_both():
    first, second = train(private(gated_model()), 1), private(gated_model())
    for optimizer, count in ((first, 2), (second, 1)):
        for _ in itertools.islice(PoissonBatches(samples(60), sample_rate=0.1, steps=5), count):
            pass
        optimizer.skip_draw()
        assert optimizer.skipped_draws == count
    for _ in range(2):
        second.load_state_dict(first.state_dict())
        assert second.skipped_draws == 3
    second.load_state_dict(second.state_dict())
    assert second.skipped_draws == 3
    assert any(text.startswith("3 draws were skipped") for text in report(second).findings)


@pytest.mark.parametrize("accountant", [3, None, Ledger()])
def test_what_is_no_accountant_is_refused(accountant):
    with pytest.raises(ConfigurationError, match="accountant must be"):
        fit(gated_model(), samples(300), **{**RUN, "accountant": accountant})
    with pytest.raises(ConfigurationError, match="accountant must be"):
        private(gated_model(), accountant=accountant)
    with pytest.raises(ConfigurationError, match="accountant must be"):
        private_fraction(torch.ones(9) > 0, noise_multiplier=1.0, accountant=accountant)


def test_statistics_and_a_search_take_no_names_of_accountants():
    with pytest.raises(ConfigurationError, match="accountant must be"):
        private_fraction(torch.ones(9) > 0, noise_multiplier=1.0, accountant="rdp")
    candidates = [Candidate(gated_model, {"epochs": 1, "batch_size": 75})]
    options = {"epsilon": 8.0, "delta": 1e-3, "mean_runs": 1.0, "validation": samples(50)}
    with pytest.raises(ConfigurationError, match="accountant must be"):
        private_search(candidates, samples(300), accountant="rdp", **options)


def test_a_noise_multiplier_that_is_no_number_is_refused_by_statistics():
    with pytest.raises(ConfigurationError, match="noise_multiplier must be"):
        private_fraction(torch.ones(9) > 0, noise_multiplier="3", accountant=create_accountant("rdp"))


def test_noise_that_the_parameters_cannot_hold_is_refused_before_it_is_charged():
    optimizer = private(gated_model(), noise_multiplier=1e39)
    with pytest.raises(PrivacyError, match="does not fit"):
        train(optimizer, 1)
    assert len(optimizer.accountant) == 0
    optimizer.noise_multiplier = 1e30
    train(optimizer, 1)
    assert len(optimizer.accountant) == 1


def test_a_statement_that_cannot_be_written_leaves_the_old_files_and_nothing_beside_them(tmp_path, monkeypatch):
    optimizer = train(private(gated_model()), 1)
    report(optimizer, tmp_path / "statement")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    written = type(tmp_path).write_text

    def full(self, text, **options):
        if ".json" in self.name:
            written(self, text[:10], **options)
            raise OSError(28, "No space left on device")
        return written(self, text, **options)

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(CheckpointError, match="No space"):
        report(train(optimizer, 1), tmp_path / "statement")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_rows_processed_at_once_follow_the_public_size():
    options = {**RUN, "dataset_size": 300, "memory_budget": 1e9}
    sizes = {fit(gated_model(), samples(count), **options).micro_batch_size for count in (200, 300, 301)}
    assert len(sizes) == 1
