"""What a result, a file or a pickle states is of its own weights, buffers, network and statement, or it is said."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from clipless_dp import (
    CheckpointError,
    DPLipModel,
    PoissonBatches,
    PrivacyError,
    PrivacyWarning,
    fit,
    gradient_gated,
    load,
    losses,
)
from clipless_dp.checkpoint import load_checkpoint, save_checkpoint
from clipless_dp.model import lineage
from clipless_dp.prediction import Predictor, Promise
from clipless_dp.statement.facts import CHANGED
from clipless_dp.tables import fit_table
from tests.support import QUICK, samples

DATA = samples(60)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("scratch", torch.zeros(6), persistent=False)

    def forward(self, values):
        return values - self.mean


def build(seed=0, norm=1.0):
    torch.manual_seed(seed)
    net = nn.Sequential(Shift(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return DPLipModel(gradient_gated(net), input_shape=(6,), input_norm=norm, loss=losses.TauCrossEntropy(2.0))


def trained(**given):
    return fit(build(), DATA, lr=0.5, audit=False, **{**QUICK, **given})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "a.pt"
    trained().save(path)
    return path


def buffer_of(predictor: Predictor, name="mean"):
    return next(value for key, value in predictor.net.named_buffers() if key.endswith(name))


def train_plainly(predictor):
    optimizer = torch.optim.SGD(predictor.net.parameters(), lr=1.0)
    nn.functional.cross_entropy(predictor.net(DATA[0]), DATA[1]).backward()
    optimizer.step()


def replace_a_weight(predictor):
    layer = next(part for part in predictor.net.modules() if isinstance(part, nn.Linear))
    layer.weight = nn.Parameter(2.0 * layer.weight.detach())


CHANGES = {
    "training without privacy": train_plainly,
    "weights of another": lambda one: one.net.load_state_dict(build(seed=5).state_dict()),
    "an average with another": lambda one: [
        value.detach().add_(other).div_(2.0)
        for value, other in zip(one.net.parameters(), build(seed=5).parameters(), strict=True)
    ],
    "a mean of the data in a buffer": lambda one: buffer_of(one).copy_(DATA[0].mean(0)),
    "a mean of the data through .data": lambda one: buffer_of(one).data.copy_(DATA[0].mean(0)),
    "another parameter in place of one": replace_a_weight,
}
OPENED = {
    "loaded": lambda path: load(path, net=build(1)),
    "unpickled": lambda path: pickle.loads(pickle.dumps(load(path, net=build(1)))),
    "copied": lambda path: copy.deepcopy(load(path, net=build(1))),
    "with another threshold": lambda path: replace(load(path, net=build(1))),
    "the network alone": lambda path: load(path, net=build(1).net),
    "the network alone, unpickled": lambda path: pickle.loads(pickle.dumps(load(path, net=build(1).net))),
    "live": lambda path: trained().predictor(),
    "live, unpickled": lambda path: pickle.loads(pickle.dumps(trained().predictor())),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("opened", ["loaded", "unpickled"])
def test_a_promise_of_a_file_says_so_where_weights_or_buffers_are_others_by_now(path, opened, change):
    predictor = OPENED[opened](path)
    before = predictor.epsilon
    assert CHANGED not in predictor.statement.findings
    CHANGES[change](predictor)
    with pytest.warns(PrivacyWarning, match="not those that the last recorded step left"):
        assert predictor.epsilon == before
    with pytest.warns(PrivacyWarning):
        assert predictor.statement.findings.count(CHANGED) == 1
    with pytest.warns(PrivacyWarning):
        again = pickle.loads(pickle.dumps(predictor))
    with pytest.warns(PrivacyWarning):
        assert again.statement.facts["weights"]["as_counted"] is False


@pytest.mark.parametrize("opened", OPENED)
def test_whatever_a_predictor_was_made_of_its_buffers_are_held_against_it_and_other_uses_are_free(path, opened):
    predictor = OPENED[opened](path)
    predictor.predict(DATA[0])
    predictor.net.to("cpu").train()
    buffer_of(predictor, "scratch").fill_(1.0)
    buffer_of(predictor).copy_(buffer_of(predictor).clone())
    assert CHANGED not in predictor.statement.findings
    buffer_of(predictor)[2] = 1e-3
    with pytest.warns(PrivacyWarning):
        assert CHANGED in predictor.statement.findings


def test_a_buffer_that_is_written_after_training_is_found_in_the_file_too(tmp_path):
    result = trained()
    dict(result.optimizer.model.net.named_buffers())["0.mean"].copy_(DATA[0].mean(0))
    assert not result.optimizer.weights_are_counted()
    with pytest.warns(PrivacyWarning):
        result.save(tmp_path / "a.pt")
    with pytest.warns(PrivacyWarning):
        assert CHANGED in load(tmp_path / "a.pt", net=build(1)).statement.findings


def test_a_buffer_that_is_set_between_steps_counts_and_the_next_step_leaves_it(tmp_path):
    optimizer = trained().optimizer
    model, buffer = optimizer.model, dict(optimizer.model.net.named_buffers())["0.mean"]

    def step():
        for inputs, targets, mask in PoissonBatches(DATA, sample_rate=optimizer.sample_rate, steps=1):
            optimizer.zero_grad()
            model.loss(model(inputs), targets, mask).backward()
            optimizer.step()

    optimizer.budget = None
    step()
    assert optimizer.uncounted_changes == 0
    buffer.add_(0.5)
    step()
    assert optimizer.uncounted_changes == 1
    assert optimizer.weights_are_counted()
    # Another process that loads the state, and then weights and buffers, has those of the last step.
    other = trained().optimizer
    other.load_state_dict(optimizer.state_dict())
    other.model.net.load_state_dict(model.net.state_dict())
    assert other.weights_are_counted()
    dict(other.model.net.named_buffers())["0.mean"].add_(1.0)
    assert not other.weights_are_counted()


def table(tmp_path=None, **given):
    rows = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100
    return fit_table(rows, (rows[:, 0] > 0).long(), cosines=8, audit=False, **{**QUICK, **given}), rows


def test_statistics_of_a_table_are_held_against_those_that_were_charged(tmp_path):
    model, rows = table()
    model.save(tmp_path / "t.pt")
    loaded, live = load(tmp_path / "t.pt"), model.predictor()
    copied = pickle.loads(pickle.dumps(live))
    for one in (loaded, live, copied):
        assert CHANGED not in one.statement.findings
        one.net[0].of_numbers.mean.copy_(rows.mean(0))
        with pytest.warns(PrivacyWarning):
            assert CHANGED in one.statement.findings


def altered(path, tmp_path, **values):
    content = load_checkpoint(path)
    content.pop("format")
    save_checkpoint(tmp_path / "altered.pt", {**content, **values})
    return tmp_path / "altered.pt"


@pytest.mark.parametrize("name", ["epsilon", "delta"])
def test_a_file_whose_numbers_are_not_those_of_its_statement_is_refused(path, tmp_path, name):
    # So that the smaller one would be said.
    with pytest.raises(CheckpointError, match="beside a statement of"):
        load(altered(path, tmp_path, **{name: load_checkpoint(path)[name] / 2.0}), net=build())


ODD = [None, -1, "x", [], {}, float("inf"), float("nan"), torch.zeros(2), True, "{}", [[]]]


@pytest.mark.parametrize(
    "name",
    ["result", "result_format", "state", "settings", "probe", "link", "outputs", "statement", "epsilon", "delta"],
)
def test_fields_of_a_file_that_hold_something_odd_are_refused_by_its_name(path, tmp_path, name):
    for odd in ODD:
        with pytest.raises(CheckpointError, match="altered"):
            load(altered(path, tmp_path, **{name: odd}), net=build())


def test_odd_settings_of_a_table_are_refused_by_the_name_of_its_file(tmp_path):
    table()[0].save(tmp_path / "t.pt")
    known = load_checkpoint(tmp_path / "t.pt")["settings"]
    for name in ("measured", "columns", "cosines", "outputs"):
        for odd in (None, -1, "x", float("inf"), torch.zeros(2)):
            with pytest.raises(CheckpointError, match=r"altered\.pt"):
                load(altered(tmp_path / "t.pt", tmp_path, settings={**known, name: odd}))


@pytest.mark.parametrize("norm", [0.5, 1.1, 2.0, 100.0])
def test_weights_are_not_given_to_a_model_that_projects_samples_elsewhere(path, tmp_path, norm):
    with pytest.raises(CheckpointError, match=r"input_norm=1\.0"):
        load(path, net=build(1, norm))
    for odd in (-1.0, 0.0, "1", float("nan"), float("inf"), True, 1.0 + 1e-3):
        with pytest.raises(CheckpointError):
            load(altered(path, tmp_path, settings={"input_norm": odd}), net=build(1))


def test_a_module_that_calls_a_part_of_it_net_is_known_as_a_whole(tmp_path):
    class Named(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.net, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)

        def forward(self, values):
            return self.head(self.net(values))

    def of(seed):
        return gradient_gated(Named(seed))

    model = DPLipModel(of(0), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    fit(model, DATA, lr=0.5, audit=False, **QUICK).save(tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt", net=of(1))
    with torch.no_grad():
        next(value for name, value in loaded.net.named_parameters() if "head" in name).add_(1.0)
    with pytest.warns(PrivacyWarning):
        assert CHANGED in loaded.statement.findings


def test_a_result_states_what_is_spent_by_now():
    result = trained()
    assert result.epsilon == result.spent
    result.optimizer.accountant.step(noise_multiplier=2.0, sample_rate=1.0)
    assert result.epsilon == result.optimizer.get_epsilon(1e-3) > result.spent
    assert f"ε = {result.epsilon:.4f}" in str(result)


def more_steps(result, count=3):
    result.optimizer.budget = None
    for batch in PoissonBatches(DATA, sample_rate=result.sample_rate, steps=count):
        result.optimizer.accumulate(batch)
        result.optimizer.step()


OTHER_RESULTS = {
    "delta set": lambda result: (setattr(result, "delta", 1e-9), result)[1],
    "delta replaced": lambda result: replace(result, delta=1e-9),
    "replaced after further steps": lambda result: (more_steps(result), replace(result, checkpoint=None))[1],
    "both": lambda result: (more_steps(result), replace(result, delta=1e-9))[1],
    "read, and then both": lambda result: (
        result.epsilon, replace(result).epsilon, more_steps(result), setattr(result, "delta", 1e-9), result,
    )[-1],
    "copied before further steps": lambda result: (copy.copy(result), more_steps(result))[0],
    "with a smaller number spent": lambda result: replace(result, spent=0.5),
    "with the optimizer of a longer run": lambda result: replace(result, optimizer=trained(epochs=3).optimizer),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_RESULTS)
def test_epsilon_of_a_result_is_of_its_delta_and_of_all_steps_however_it_was_made(name):
    result = trained()
    assert result.epsilon == result.spent
    found = OTHER_RESULTS[name](result)
    truth = found.optimizer.get_epsilon(found.delta)
    assert found.epsilon == truth
    assert f"ε = {truth:.4f} at δ = {found.delta:g}" in str(found)
    if "optimizer" not in name:
        assert found.predictor().epsilon == truth
    assert "ε at δ" not in found._repr_html_()
    if "spent" not in name and "optimizer" not in name:
        assert truth > 1.01 * result.history[-1].epsilon


def test_a_statement_of_another_time_is_a_statement(path):
    statement = load(path, net=build()).statement.of_other_weights()
    assert json.loads(statement.to_json())["findings"][0] == CHANGED
    assert statement.of_other_weights().findings == statement.findings
    assert CHANGED in statement.to_markdown()


WRITTEN = {"pickled": pickle.dumps, "copied": copy.deepcopy, "replaced": lambda one: replace(one, threshold=None)}


@pytest.mark.parametrize("written", WRITTEN)
def test_a_predictor_that_is_written_leaves_what_is_known_of_the_result_as_it_was(written, tmp_path):
    result = trained()
    predictor = result.predictor()
    buffer, before = buffer_of(predictor), buffer_of(predictor).clone()
    buffer.copy_(DATA[0][0])
    for _ in range(2):
        with pytest.warns(PrivacyWarning):
            assert result.predictor().statement.facts["weights"]["as_counted"] is False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrivacyWarning)
            WRITTEN[written](predictor)
    with pytest.warns(PrivacyWarning):
        result.save(tmp_path / "a.pt")
    with pytest.warns(PrivacyWarning):
        assert CHANGED in load(tmp_path / "a.pt", net=build(1)).statement.findings
    buffer.copy_(before)
    assert CHANGED not in result.predictor().statement.findings


@pytest.mark.parametrize("opened", ["loaded", "unpickled", "the network alone", "live, unpickled"])
def test_a_promise_that_is_read_in_another_way_does_not_count_what_it_did_not(path, opened):
    predictor = OPENED[opened](path)
    same = replace(predictor, target_range=(0.0, 1.0))
    assert same.epsilon == predictor.epsilon
    lineage.of(predictor.net).add_runs({"another": 3})
    for one in (predictor, same, replace(predictor, target_range=(0.0, 1.0))):
        with pytest.raises(PrivacyError, match="does not count"):
            _ = one.epsilon
        for write in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(PrivacyError, match="does not count"):
                write(one)


@pytest.mark.parametrize("given", ["of the time", "numbers alone", "read back"])
def test_a_promise_of_before_that_is_put_into_a_predictor_does_not_count_a_later_run(given):
    """The ε of the first run stood for both."""
    result = trained()
    predictor = result.predictor()
    before = predictor.promised
    assert before.runs
    promise = {
        "of the time": before,
        "numbers alone": Promise(before.epsilon, before.delta, before.statement),
        "read back": replace(before, statement=pickle.loads(pickle.dumps(before.statement)), runs=None),
    }[given]
    assert replace(predictor, promise=promise).epsilon == before.epsilon
    fit(result.optimizer.model, DATA, lr=0.5, audit=False, **{**QUICK, "accountant": result.optimizer.accountant})
    late = [replace(predictor, promise=promise), replace(predictor, promise=promise, threshold=None)]
    for one in late:
        with pytest.raises(PrivacyError, match="does not count"):
            _ = one.epsilon
        with pytest.raises(PrivacyError, match="does not count"):
            pickle.dumps(one)


def test_a_conversion_of_a_finished_model_is_told_in_words_that_name_it(path):
    predictor = load(path, net=build(1))
    predictor.net.double()
    with pytest.warns(PrivacyWarning, match="conversion to another dtype"):
        assert predictor.epsilon > 0
    predictor.net.float()
    assert CHANGED not in predictor.statement.findings
