from __future__ import annotations

import math
import warnings
from collections import Counter

import pytest
import torch

from accounting import AnyOf, GaussianRelease, PrivateSelection, RDPAccountant, create_accountant
from clipless_dp import CliplessDPSGD, ConfigurationError, PrivacyError, PrivacyWarning, evaluate, losses
from clipless_dp import search as search_module
from clipless_dp.model import DPLipModel
from clipless_dp.noise import ReproducibleNoise, SystemNoise
from clipless_dp.search import Candidate, private_search

from .support import SETTINGS, gated_model, samples

TARGET = {"epsilon": 4.0, "delta": 1e-3}
SEARCH = {**TARGET, "mean_runs": 3.0}
SMALL = Candidate(gated_model, {"epochs": 1, "batch_size": 50, "lr": 0.5})
LARGE = Candidate(
    gated_model, {"epochs": 2, "batch_size": 100, "lr": 0.1, "noise_schedule": lambda step, steps: 1.0 + step % 2}
)


class Chance:
    """In place of the operating system: a fixed share, and candidates in turn."""

    def __init__(self, share):
        self.share, self.drawn = share, -1

    def random(self):
        return self.share

    def randrange(self, count):
        self.drawn += 1
        return self.drawn % count


@pytest.fixture
def five_runs(monkeypatch):
    search = PrivateSelection(((GaussianRelease(1.0), 1),), 3.0, 1.0)
    share = next(x / 1000 for x in range(1000) if search.quantile(x / 1000) == 5)
    monkeypatch.setattr(search_module, "_random", Chance(share))


@pytest.fixture
def runs(monkeypatch):
    """What each run was asked and returned."""
    seen, honest = [], search_module.fit

    def spying(model, dataset, **settings):
        result = honest(model, dataset, **settings)
        seen.append((model, settings, result))
        return result

    monkeypatch.setattr(search_module, "fit", spying)
    return seen


def test_a_search_spends_the_target_and_no_more_and_returns_the_best_run(five_runs, runs):
    data, validation = samples(300), samples(200, seed=1)
    result = private_search([SMALL, LARGE], data, validation=validation, **SEARCH)
    assert 3.9 < result.epsilon <= 4.0
    assert [settings["epochs"] for _, settings, _ in runs] == [1, 2, 1, 2, 1]
    scores = [evaluate(model, validation)[0] for model, _, _ in runs]
    best = scores.index(max(scores))
    assert result.score == max(scores)
    assert result.model is runs[best][0]
    assert result.candidate is (SMALL, LARGE)[best % 2]


def test_the_ledger_holds_the_search_as_one_event_with_the_noise_that_was_used(five_runs, runs):
    result = private_search([SMALL, LARGE], samples(300), validation=samples(50, seed=1), **SEARCH)
    ((event, count),) = result.accountant.ledger
    assert isinstance(event, PrivateSelection)
    assert count == 1
    assert (event.mean, event.shape) == (3.0, 1.0)
    ((choice, _),) = event.trial
    assert isinstance(choice, AnyOf)
    for index, (_, _, trained) in enumerate(runs):
        planned = choice.alternatives[index % 2]
        for (step, taken), (wanted, times) in zip(trained.optimizer.accountant.ledger, planned, strict=True):
            assert taken == times
            assert step.sampling == wanted.sampling
            assert step.noise_multiplier == pytest.approx(wanted.noise_multiplier, rel=1e-12)
    # Each run alone would seem to cost much less: that number must not be stated.
    assert all(trained.epsilon < 0.7 * result.epsilon for _, _, trained in runs)
    again = RDPAccountant()
    again.load_state_dict(result.accountant.state_dict())
    assert float(again.get_epsilon(1e-3)) == result.epsilon


def test_what_was_spent_before_counts(five_runs):
    accountant = create_accountant("auto")
    accountant.record(GaussianRelease(3.0))
    result = private_search([SMALL], samples(300), validation=samples(50, seed=1), accountant=accountant, **SEARCH)
    assert result.accountant is accountant
    assert len(accountant.ledger.entries) == 2
    assert 3.9 < result.epsilon <= 4.0


class Fixed(SystemNoise):
    def standard_normal_(self, out):
        return out.fill_(2.0) if out.dtype == torch.float64 else super().standard_normal_(out)


def test_scores_from_training_data_are_noisy_counts_and_charged(five_runs, runs, monkeypatch):
    monkeypatch.setattr(search_module, "noise_source", lambda noise: Fixed())
    data = samples(300)
    result = private_search([SMALL], data, score_noise_multiplier=10.0, **SEARCH)
    (((choice, _),),) = (event.trial for event, _ in result.accountant.ledger)
    (alternative,) = choice.alternatives
    release, times = alternative[-1]
    assert isinstance(release, GaussianRelease)
    assert times == 1
    assert release.noise_multiplier >= 10.0
    hits = 300 * max(evaluate(model, data)[0] for model, _, _ in runs)
    assert result.score == pytest.approx((hits + 2.0 * release.noise_multiplier) / 300, rel=1e-5)
    assert 3.9 < result.epsilon <= 4.0


def test_secure_scores_lie_on_a_public_grid(five_runs):
    pytest.importorskip("cryptography")
    result = private_search([SMALL], samples(256), score_noise_multiplier=10.0, noise="secure", **SEARCH)
    ((search, _),) = result.accountant.ledger
    ((choice, _),) = search.trial
    ((_, _), (release, _)) = choice.alternatives[0]
    steps = result.score * 256 / 2.0 ** (math.floor(math.log2(release.noise_multiplier * 1.000001)) - 20)
    assert steps == round(steps)


def test_runs_of_a_search_do_not_share_their_noise():
    with pytest.raises(ConfigurationError, match="reproducible"):
        private_search([SMALL], samples(300), validation=samples(20), noise=ReproducibleNoise(1), **SEARCH)


@pytest.mark.parametrize("shape", [0.0, 1.0, "poisson"])
def test_the_number_of_runs_is_that_of_the_distribution(monkeypatch, shape):
    counts = Counter()
    share = 0.9
    monkeypatch.setattr(search_module, "_random", Chance(share))
    honest = search_module.fit
    monkeypatch.setattr(
        search_module, "fit", lambda *given, **settings: counts.update("x") or honest(*given, **settings)
    )
    result = private_search([SMALL], samples(100), validation=samples(20), shape=shape, **SEARCH)
    ((event, _),) = result.accountant.ledger
    assert counts["x"] == event.quantile(share) > 1


def test_no_run_at_all_returns_an_untrained_candidate(monkeypatch, runs):
    monkeypatch.setattr(search_module, "_random", Chance(0.0))
    result = private_search([SMALL], samples(100), validation=samples(20), shape="poisson", **SEARCH)
    assert not runs
    assert result.score == -math.inf
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), gated_model().parameters(), strict=True))
    assert 3.9 < result.epsilon <= 4.0, "the chance of it is what is paid for"


def test_runs_do_not_warn_and_the_result_does_when_it_is_trained_on(five_runs):
    inputs, targets = samples(300)
    inputs[0, 0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = private_search([SMALL], (inputs, targets), validation=samples(20), **SEARCH)
    told = {**SETTINGS, "noise_multiplier": 1.0, "sample_rate": 0.1, "dataset_size": 300}
    optimizer = CliplessDPSGD(result.model, lr=0.1, **told)
    result.model.loss(result.model(inputs[1:20]), targets[1:20]).backward()
    with pytest.warns(PrivacyWarning, match="does not include"):
        optimizer.step()


def test_a_run_that_spends_otherwise_is_not_released(monkeypatch):
    honest = search_module.fit

    def cheaper(*given, noise_multiplier, **settings):
        return honest(*given, noise_multiplier=0.99 * noise_multiplier, **settings)

    def longer(*given, epochs, **settings):
        return honest(*given, epochs=2 * epochs, **settings)

    for mutant in (cheaper, longer):
        monkeypatch.setattr(search_module, "fit", mutant)
        accountant = create_accountant("rdp")
        with pytest.raises(PrivacyError, match="otherwise than planned"):
            private_search([SMALL], samples(300), validation=samples(20), accountant=accountant, **SEARCH)
        assert len(accountant.ledger.entries) == 1, "what was learned is paid for all the same"


SHARED = gated_model()


@pytest.mark.parametrize(
    ("candidates", "changes", "message"),
    [
        ([], {}, "no candidates"),
        ([Candidate(gated_model, {"epochs": 1, "batch_size": 50, "accountant": "rdp"})], {}, "cannot set accountant"),
        ([Candidate(gated_model, {"lr": 1.0})], {}, "need batch_size and epochs"),
        ([Candidate(gated_model, {"epochs": 1, "batch_size": 500})], {}, "batch_size from 1 to 300"),
        ([Candidate(lambda: SHARED, SMALL.settings)], {}, "must not share weights"),
        ([SMALL], {"validation": None}, "either validation"),
        ([SMALL], {"score_noise_multiplier": 1.0}, "either validation"),
        ([SMALL], {"accountant": create_accountant("prv")}, "create_accountant"),
        ([SMALL], {"accountant": RDPAccountant(relation="replace_one")}, "adding or removing"),
        ([SMALL], {"mean_runs": 0.5}, "mean must be at least 1"),
        ([SMALL], {"shape": -1.0}, "shape"),
    ],
)
def test_bad_arguments_are_refused_before_a_run(runs, candidates, changes, message):
    with pytest.raises(ValueError, match=message):
        private_search(candidates, samples(300), **{**SEARCH, "validation": samples(20), **changes})
    assert not runs


def test_a_count_of_correct_predictions_needs_a_classifier(runs):
    def regression():
        return DPLipModel(gated_model().net, input_shape=(6,), input_norm=1.0, loss=losses.Huber())

    candidate = Candidate(regression, SMALL.settings)
    inputs, _ = samples(300)
    with pytest.raises(ConfigurationError, match="classifier"):
        private_search([candidate], (inputs, inputs[:, :3]), score_noise_multiplier=1.0, **SEARCH)
    assert not runs
