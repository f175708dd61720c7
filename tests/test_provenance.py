"""Ledgers know their runs, and statements what each entry rests on."""

from __future__ import annotations

import copy
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accounting import (
    GaussianStep,
    LaplaceRelease,
    Ledger,
    NoSampling,
    PoissonSampling,
    PRVAccountant,
    RDPAccountant,
    create_accountant,
)
from clipless_dp import (
    BudgetExhaustedError,
    CheckpointError,
    CliplessDPOptimizer,
    CliplessDPSGD,
    DPLipModel,
    PoissonBatches,
    PoissonBatchSampler,
    PrivacyWarning,
    ReproducibleNoise,
    WeightAverage,
    constraints,
    fit,
    gated,
    losses,
    poisson_collate,
    report,
)
from clipless_dp.noise import SystemNoise, source_name
from clipless_dp.optim.books import Run
from clipless_dp.sampling.streaming import StreamedBatches
from clipless_dp.statistics import private_fraction, private_moments, private_quantile

from .support import gated_model, power_cut, samples

DATA = Path(__file__).with_name("data")
RUN = {
    "epsilon": 50.0, "delta": 1e-3, "epochs": 2, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp",
    "noise_multiplier": 2.0,
}  # fmt: skip
SYSTEM, REPRODUCIBLE = source_name(SystemNoise), source_name(ReproducibleNoise)


def private(model=None, **options):
    settings = {"noise_multiplier": 1.5, "sample_rate": 0.1, "dataset_size": 300, "accountant": "rdp", **options}
    return CliplessDPSGD(model or gated_model(), lr=0.1, **settings)


def step(optimizer, batch):
    inputs, targets, mask = batch
    optimizer.zero_grad()
    optimizer.model.loss(optimizer.model(inputs), targets, mask).backward()
    optimizer.step()


def train(optimizer, steps, **options):
    for batch in PoissonBatches(samples(300), sample_rate=0.1, steps=steps, **options):
        step(optimizer, batch)
    return optimizer


def plain(model, steps=1):
    inputs, targets = samples(50)
    sgd = torch.optim.SGD(model.net.parameters(), lr=0.1)
    for _ in range(steps):
        sgd.zero_grad()
        model.loss(model(inputs), targets).backward()
        sgd.step()
    model.zero_grad()


def found(optimizer, pattern):
    return [text for text in report(optimizer).findings if re.search(pattern, text)]


# Joining by identity.


def test_two_runs_that_look_alike_add_up_in_one_accountant():
    states = [train(private(), steps).state_dict() for steps in (3, 3, 5)]
    accountant = RDPAccountant()
    for state, together in zip(states, (3, 6, 11), strict=True):
        private(accountant=accountant).load_state_dict(state)
        assert accountant.history == [(1.5, 0.1, together)]
    # Each of them once more adds nothing.
    for state in states:
        private(accountant=accountant).load_state_dict(state)
    assert accountant.history == [(1.5, 0.1, 11)]


def test_a_loaded_run_is_not_taken_for_the_steps_of_the_optimizer_whose_accountant_it_joins():
    state = train(private(), 5).state_dict()
    first = train(private(), 3)
    second = private(accountant=first.accountant)
    second.load_state_dict(state)
    train(first, 1)
    train(second, 1)
    assert first.accountant.history == [(1.5, 0.1, 10)]


def test_a_checkpoint_opened_with_the_accountant_of_another_run_costs_both(tmp_path):
    fit(gated_model(), samples(300), checkpoint=tmp_path / "former.pt", **RUN)
    here = fit(gated_model(seed=1), samples(300), **RUN).optimizer.accountant
    with_former = fit(gated_model(), samples(300), checkpoint=tmp_path / "former.pt", **{**RUN, "accountant": here})
    assert with_former.optimizer.accountant.history == [(2.0, 50 / 300, 24)]
    expected = create_accountant("rdp")
    expected.step(noise_multiplier=2.0, sample_rate=50 / 300, steps=24)
    assert with_former.epsilon == float(expected.get_epsilon(1e-3))


def test_lines_of_several_runs_cost_what_one_line_of_all_does():
    together, one = PRVAccountant(), PRVAccountant()
    for event, count in ((GaussianStep(1.1, PoissonSampling(0.01)), 300), (GaussianStep(3.3), 7)):
        parts = [PRVAccountant() for _ in range(3)]
        for part in parts:
            part.record(event, count)
            together.ledger = together.ledger.merge(part.ledger)
        one.record(event, 3 * count)
    assert len(together.ledger.lines) == 6
    assert together.ledger.entries == one.ledger.entries
    assert float(together.get_epsilon(1e-5)) == float(one.get_epsilon(1e-5))


class History:
    """Optimizers that train, save, load and hand on at random, and what each ledger must hold: every release once."""

    EVENTS = (GaussianStep(1.5, PoissonSampling(0.1)), GaussianStep(1.5, NoSampling()), LaplaceRelease(4.0))

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.number = 0
        # A state of the former version, which knew no runs, is one like any other.
        former = torch.load(DATA / "format-1-optimizer.pt", weights_only=True)["optimizer"]
        self.states = [(former, frozenset(self.new(self.EVENTS[0]) for _ in range(7)))]
        self.optimizers = [self.fresh() for _ in range(3)]
        self.truth = {id(optimizer.accountant): frozenset() for optimizer in self.optimizers}
        self.kept = []

    def fresh(self, **options):
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        model = DPLipModel(gated(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
        return private(model, sampling="poisson", momentum=0.9, **options)

    def new(self, event):
        self.number += 1
        return self.number, event

    def act(self):
        optimizer = self.random.choice(self.optimizers)
        accountant = optimizer.accountant
        true = self.truth[id(accountant)]
        actions = ["step"] * 4 + ["save"] * 3 + ["load"] * 3 + ["hand on", "record", "go back", "new"]
        action = self.random.choice(actions)
        if action == "step":
            optimizer.sampling = self.random.choice(["poisson", "none"])
            optimizer.step()
            true |= {self.new(self.EVENTS[optimizer.sampling == "none"])}
        elif action == "save" and optimizer.steps_taken <= len(accountant):  # Else the state is taken for altered.
            self.states.append((optimizer.state_dict(), true))
        elif action == "load":
            state, its = self.random.choice(self.states)
            optimizer.load_state_dict(state)
            true |= its
        elif action == "hand on":
            self.optimizers[self.random.randrange(3)] = self.fresh(accountant=accountant)
        elif action == "record":
            accountant.record(self.EVENTS[2])
            true |= {self.new(self.EVENTS[2])}
        elif action == "go back":
            # Not to the former version's, which as an accountant's alone is by nobody, and counts again.
            state, true = self.random.choice(self.states[1:] or [(optimizer.state_dict(), true)])
            accountant.load_state_dict(state["clipless_dp"]["accountant"])
        elif action == "new":
            accountant = optimizer.accountant = copy.deepcopy(accountant)
        # Kept, so that no other object takes its place in memory.
        self.kept.append(accountant)
        self.truth[id(accountant)] = true
        return accountant.ledger, true


def require_truth(seeds, actions=40):
    for seed in seeds:
        history = History(seed)
        for _ in range(actions):
            ledger, true = history.act()
            held = Counter()
            for event, count in ledger:
                held[event] += count
            assert held == Counter(event for _, event in true), seed


@pytest.mark.filterwarnings("ignore::clipless_dp.PrivacyWarning")
def test_ledgers_hold_every_release_once_whatever_is_saved_loaded_and_handed_on():
    require_truth(range(8))


def by_looks(self, other):
    """Merges as if ledgers that look alike were the same."""
    own, its = self.entries, other.entries
    if own[: len(its)] == its or its[: len(own)] == own:
        return max(self, other, key=len).copy()
    return _honest_merge(self, other)


_honest_merge = Ledger.merge


@pytest.mark.filterwarnings("ignore::clipless_dp.PrivacyWarning")
@pytest.mark.parametrize(
    "mutate",
    [
        lambda patch: patch.setattr(Ledger, "merge", by_looks),
        # A run that goes on although its ledger was put back.
        lambda patch: patch.setattr(Run, "follow", lambda self, ledger: self.name),
        # Accountants that keep their identity when their ledger is put back, or when they are copied.
        lambda patch: patch.setattr("accounting.accountants.new_run", lambda: "always the same"),
        # Entries by hand without an identity count twice.
        lambda patch: patch.setattr("accounting.accountants.new_run", lambda: ""),
    ],
    ids=["looks", "no new run", "one accountant", "no accountant"],
)
def test_mutant_caught_joining_otherwise(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        require_truth(range(8))


def test_a_forked_process_starts_a_run_of_its_own(monkeypatch):
    optimizer = train(private(), 2)
    optimizer.accountant.record(LaplaceRelease(4.0))
    parent = copy.deepcopy(optimizer.accountant.ledger)
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    child = train(optimizer, 1).accountant
    child.record(LaplaceRelease(4.0))
    # The parent goes on too, and what it does has the same look.
    parent_run, by_hand = parent.lines[0].provenance, parent.lines[1].provenance
    parent.append(GaussianStep(1.5, PoissonSampling(0.1)), 1, parent_run)
    parent.append(LaplaceRelease(4.0), 1, by_hand)
    assert len(parent.merge(child.ledger)) == 3 + 2 + 2


def test_a_model_trained_by_two_runs_warns_once_and_for_all_until_a_ledger_holds_both():
    model = gated_model()
    first = train(private(model), 2)
    second = private(model)
    with pytest.warns(PrivacyWarning, match="another optimizer") as warned:
        train(second, 3)
    assert len(warned) == 1
    assert first.ledger_is_incomplete()
    assert second.ledger_is_incomplete()
    second.load_state_dict(first.state_dict())
    assert not second.ledger_is_incomplete()
    assert first.ledger_is_incomplete()
    assert found(first, "too small")


def test_another_accountant_in_place_of_one_that_holds_the_steps_is_seen():
    optimizer = train(private(), 2)
    before = optimizer.state_dict()
    optimizer.accountant = RDPAccountant()
    with pytest.warns(PrivacyWarning, match="another optimizer"):
        train(optimizer, 2)
    assert optimizer.ledger_is_incomplete()
    optimizer.load_state_dict(before)
    assert len(optimizer.accountant) == 4


# Provenance.


def provenance(optimizer):
    return [
        (line.event.kind, line.count, line.provenance.sampling, line.provenance.noise)
        for line in optimizer.accountant.ledger.lines
    ]


def test_every_entry_tells_how_its_batch_was_drawn_and_whose_noise_it_had():
    accountant = RDPAccountant()
    private_moments(samples(300)[0], norm=3.0, noise_multiplier=9.0, accountant=accountant, noise=ReproducibleNoise(0))
    private_fraction(samples(300)[1] == 0, noise_multiplier=9.0, accountant=accountant)
    private_quantile(
        samples(300)[0][:, 0].abs(), 0.5, lower=0.1, upper=9.0, noise_multiplier=9.0, accountant=accountant
    )
    optimizer = private(accountant=accountant)
    train(optimizer, 2)
    train(optimizer, 1, seed=0)
    optimizer.sampling = "poisson"
    step(optimizer, (*samples(30), torch.ones(30, dtype=torch.bool)))
    optimizer.noise = ReproducibleNoise(1)
    optimizer.sampling = "none"
    train(optimizer, 1)
    expected = [
        ("gaussian_release", 1, "none", REPRODUCIBLE),
        ("gaussian_release", 1, "none", SYSTEM),
        ("gaussian_release", 1, "none", SYSTEM),
        ("gaussian_step", 2, "announced", SYSTEM),
        ("gaussian_step", 1, "seeded", SYSTEM),
        ("gaussian_step", 1, "vouched", SYSTEM),
        ("gaussian_step", 1, "none", REPRODUCIBLE),
    ]
    assert provenance(optimizer) == expected
    again = private()
    again.load_state_dict(optimizer.state_dict())
    assert provenance(again) == expected
    assert provenance(private(accountant=optimizer.accountant)) == expected
    assert report(again).facts["sampling"]["drawn"] == {"seeded": 1, "vouched": 1, "announced": 2, "none": 1}


@pytest.mark.parametrize("handed_on", ["state", "accountant"])
def test_steps_on_the_users_word_stay_a_finding_wherever_their_ledger_goes(handed_on):
    first = private(sampling="poisson")
    for _ in range(5):
        step(first, (*samples(30), torch.ones(30, dtype=torch.bool)))
    second = private(**({"accountant": first.accountant} if handed_on == "accountant" else {}))
    if handed_on == "state":
        second.load_state_dict(first.state_dict())
    train(second, 1)
    assert found(second, "vouches .* in 5 of 6 steps")
    assert (
        "| Sampling | Poisson, by a sampler of the user's, not checked (5 of 6 steps)" in report(second).to_markdown()
    )


@pytest.mark.parametrize("handed_on", ["statistics", "accountant"])
def test_reproducible_noise_stays_a_finding_wherever_its_ledger_goes(handed_on):
    if handed_on == "statistics":
        accountant = RDPAccountant()
        values = samples(300)[0]
        private_moments(values, norm=3.0, noise_multiplier=9.0, accountant=accountant, noise=ReproducibleNoise(0))
    else:
        accountant = train(private(noise=ReproducibleNoise(0)), 2).accountant
    assert found(train(private(accountant=accountant), 1), "The noise was reproducible")


def test_a_statistic_that_is_reread_tells_whose_noise_it_had(tmp_path):
    for noise in (ReproducibleNoise(0), None):
        accountant = RDPAccountant()
        private_moments(
            samples(300)[0], norm=3.0, noise_multiplier=9.0, accountant=accountant, noise=noise, file=tmp_path / "m.pt"
        )
        assert [line.provenance.noise for line in accountant.ledger.lines] == [REPRODUCIBLE]


@pytest.mark.parametrize("kind", ["batches", "sampler", "stream", "fit"])
def test_batches_from_a_seed_are_a_finding(kind):
    if kind == "fit":
        result = fit(gated_model(), samples(300), reproducible_seed=3, noise=SystemNoise(), **RUN)
        assert found(result.optimizer, "masks and random views of 12 of 12 steps")
        assert found(result.optimizer, "batches of 12 of 12 steps are a function of a seed")
        return
    optimizer = private()
    settings = {"sample_rate": 0.1, "steps": 3, "seed": 0}
    if kind == "sampler":
        dataset = TensorDataset(*samples(300))
        sampler = PoissonBatchSampler(300, **settings)
        for inputs, targets in DataLoader(dataset, batch_sampler=sampler, collate_fn=poisson_collate(dataset)):
            step(optimizer, (inputs, targets, torch.ones(len(inputs), dtype=torch.bool)))
    else:
        for batch in {"batches": PoissonBatches, "stream": StreamedBatches}[kind](samples(300), **settings):
            step(optimizer, batch)
    assert found(optimizer, "batches of 3 of 3 steps are a function of a seed")
    train(optimizer, 2)
    assert found(optimizer, "batches of 3 of 5 steps are a function of a seed")


def test_entries_by_hand_are_a_finding():
    optimizer = train(private(), 1)
    optimizer.accountant.step(noise_multiplier=2.0, sample_rate=0.1, steps=4)
    assert found(optimizer, "records of 4 of 5 steps do not say how batches were drawn")
    assert found(optimizer, "records of 4 of 5 entries do not say where their noise came from")


# Weights.

OTHERS = "not those that the last recorded step left"


def test_weights_that_no_step_left_are_a_finding():
    optimizer = train(private(), 3)
    assert report(optimizer).findings == []
    plain(optimizer.model)
    assert found(optimizer, OTHERS)
    optimizer.skip_draw()
    train(optimizer, 1)
    assert not found(optimizer, OTHERS)
    assert found(optimizer, "Before 1 of the steps the weights were not")
    again = private()
    again.load_state_dict(optimizer.state_dict())
    again.model.net.load_state_dict(optimizer.model.net.state_dict())
    assert not found(again, OTHERS)
    assert found(again, "Before 1 of the steps the weights were not")


def test_steps_of_an_optimizer_that_is_not_private_are_a_finding():
    optimizer = private()
    other = torch.optim.SGD(optimizer.model.net.parameters(), lr=0.1)
    for batch in PoissonBatches(samples(300), sample_rate=0.1, steps=2):
        optimizer.model.loss(optimizer.model(batch.inputs), batch.targets, batch.mask).backward()
        other.step()
    assert found(optimizer, "No step is recorded")
    assert found(optimizer, OTHERS)


def test_weights_changed_behind_autograds_back_are_a_finding():
    optimizer = train(private(), 1)
    optimizer.model.net.get_parameter("0.weight").data[0, 0] += 1.0
    assert found(optimizer, OTHERS)


def test_a_state_beside_the_weights_that_it_was_saved_with_has_no_finding_and_beside_others_has():
    optimizer = train(private(), 2)
    weights = copy.deepcopy(optimizer.model.net.state_dict())
    state = optimizer.state_dict()
    other = private(gated_model(seed=1))
    other.load_state_dict(state)
    assert found(other, OTHERS)
    other.model.net.load_state_dict(weights)
    assert not found(other, OTHERS)
    train(other, 1)
    assert not found(other, "Before")


@pytest.mark.parametrize("layout", [torch.float32, torch.float64])
def test_weights_that_were_put_back_bit_by_bit_are_none_that_something_changed(layout):
    model = gated_model().to(layout)
    data = samples(300)
    optimizer = private(model)

    def taken():
        for batch in PoissonBatches((data[0].to(layout), data[1]), sample_rate=0.1, steps=1):
            step(optimizer, batch)

    taken()
    kept = copy.deepcopy(model.net.state_dict())
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.zero_()
    assert found(optimizer, OTHERS)
    model.net.load_state_dict(kept)
    taken()
    assert report(optimizer).findings == []


def test_averages_of_counted_weights_are_counted_and_those_of_others_are_not():
    result = fit(gated_model(), samples(300), ema=0.9, **RUN)
    assert report(result.optimizer).findings == []
    optimizer = private()
    average = WeightAverage(optimizer.model, 0.5)
    train(optimizer, 1)
    average.update()
    with average.applied():
        assert report(optimizer).findings == []
    train(optimizer, 1)
    plain(optimizer.model)
    average.update()
    average.apply_()
    assert found(optimizer, OTHERS)


def test_a_resumed_run_goes_on_from_the_weights_that_were_counted(tmp_path):
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        settings = {"loss": losses.TauCrossEntropy(2.0), "constraint": constraints.Orthogonal()}
        return DPLipModel(net, input_shape=(6,), input_norm=1.0, **settings)

    settings = {**RUN, "ema": 0.9, "checkpoint": tmp_path / "run.pt"}
    with power_cut(8):
        fit(build(), samples(300), **settings)
    resumed = fit(build(), samples(300), **settings).optimizer
    assert len(resumed.accountant.ledger.runs) == 2
    assert report(resumed).findings == []
    finished = fit(build(), samples(300), **settings).optimizer
    assert report(finished).findings == []


def test_optimizers_of_parts_of_a_model_leave_each_other_in_peace():
    model, accountant = gated_model(), RDPAccountant()
    parameters = list(model.net.parameters())
    settings = {"noise_multiplier": 1.5, "sample_rate": 0.1, "dataset_size": 300, "accountant": accountant}
    halves = (parameters[:2], parameters[2:])
    parts = [CliplessDPOptimizer(model, torch.optim.SGD(half, lr=0.1), **settings) for half in halves]
    for optimizer in parts * 2:
        train(optimizer, 1)
    assert [report(optimizer).findings for optimizer in parts] == [[], []]


# Settings.


def capped(cap=1.0, loss=2.0, radius=1.0):
    torch.manual_seed(0)
    net = gated(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), cotangent_norm=cap)
    return DPLipModel(net, input_shape=(6,), input_norm=radius, loss=losses.TauCrossEntropy(loss))


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        ({"cap": 0.5}, r"model\.layers\.[\w.]+\.limit: 1\.0 there, 0\.5 here"),
        ({"loss": 3.0}, r"model\.loss\.tau: 2\.0 there, 3\.0 here"),
        ({"radius": 2.0}, r"model\.input_norm: 1\.0 there, 2\.0 here"),
    ],
    ids=["caps", "loss", "input norm"],
)
def test_a_checkpoint_is_not_gone_on_from_with_other_caps(tmp_path, changes, listed):
    fit(capped(), samples(300), checkpoint=tmp_path / "run.pt", **RUN)
    with pytest.raises(CheckpointError, match=listed):
        fit(capped(**changes), samples(300), checkpoint=tmp_path / "run.pt", **RUN)
    assert fit(capped(), samples(300), checkpoint=tmp_path / "run.pt", **RUN).steps == 12


def test_a_loss_of_the_users_own_does_not_make_a_checkpoint_unreadable(tmp_path):
    def distance(output, target):
        return (output - target).abs().sum(1)

    def build():
        net = gated_model().net
        return DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.BoundedLoss(distance, bound=2.0))

    data = samples(300)[0], samples(300)[0][:, :3]
    for _ in range(2):
        assert fit(build(), data, checkpoint=tmp_path / "run.pt", **RUN).steps == 12


def test_a_state_loaded_under_other_caps_is_a_finding():
    first = train(private(capped()), 1)
    second = private(capped(0.5))
    second.load_state_dict(first.state_dict())
    second.model.net.load_state_dict(first.model.net.state_dict())
    train(second, 1)
    assert found(second, r"other settings of the model .*limit: 1\.0 there, 0\.5 here")
    third = private(capped(0.5))
    third.load_state_dict(second.state_dict())
    assert found(third, r"limit: 1\.0 there, 0\.5 here")


# Replacing one.


def test_a_ledger_about_replacing_one_charges_twice_the_sensitivity_and_says_so():
    accountant = PRVAccountant(relation="replace_one")
    optimizer = private(accountant=accountant, sampling="none")
    train(optimizer, 2)
    adding = PRVAccountant()
    adding.step(noise_multiplier=0.5 * 1.5, sample_rate=1.0, steps=2)
    assert optimizer.get_epsilon(1e-5) == pytest.approx(float(adding.get_epsilon(1e-5)), rel=1e-9)  # Rounding.
    said = report(optimizer).to_markdown()
    assert "differ by replacing one unit by another" in said
    assert "Replacing one unit changes it twice as much" in said
    settings = {**RUN, "noise_multiplier": None, "epsilon": 4.0}
    replacing = fit(gated_model(), samples(300), **{**settings, "accountant": PRVAccountant(relation="replace_one")})
    assert "(replace-one)" in str(replacing)
    assert replacing.epsilon <= 4.0
    adding_one = fit(gated_model(), samples(300), **{**settings, "accountant": "prv"})
    assert replacing.noise_multiplier > 1.05 * adding_one.noise_multiplier


def test_a_network_that_is_wrapped_again_is_known_by_its_weights():
    first = train(private(), 2)
    model = DPLipModel(first.model.net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(1.0))
    second = private(model)
    with pytest.warns(PrivacyWarning, match="another optimizer"):
        train(second, 1)
    assert second.ledger_is_incomplete()


def test_training_through_data_between_steps_is_a_finding():
    optimizer = train(private(), 1)
    for parameter in optimizer.model.net.parameters():
        parameter.data.sub_(0.01)
    train(optimizer, 1)
    assert found(optimizer, "weights")


def test_a_budget_that_is_tightened_holds_at_once():
    optimizer = private(budget=(50.0, 1e-3))
    train(optimizer, 2)
    optimizer.budget = (float(optimizer.get_epsilon(1e-3)), 1e-3)
    with pytest.raises(BudgetExhaustedError):
        train(optimizer, 1)


def test_an_optimizer_that_took_the_state_of_another_keeps_nothing_of_its_later_steps():
    first = train(private(momentum=0.9), 2)
    second = private(momentum=0.9)
    second.load_state_dict(first.state_dict())
    taken = [held["momentum_buffer"].clone() for held in second.base_optimizer.state.values()]
    train(first, 3)
    # Momentum that both hold would bring the first one's steps into the second one's weights, past its ledger.
    for held, before in zip(second.base_optimizer.state.values(), taken, strict=True):
        assert torch.equal(held["momentum_buffer"], before)
    train(second, 1)
    assert second.accountant.history == [(1.5, 0.1, 3)]
