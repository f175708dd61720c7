"""A one-class network by scikit-learn's conventions."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

import clipless_dp
from accounting import create_accountant
from clipless_dp import ConfigurationError, InputError, PrivateOutlierDetector

ROWS = np.random.default_rng(0).uniform(-1.0, 1.0, (200, 3))
QUICK: dict[str, Any] = {
    "domain": (-4.0, 4.0),
    "epsilon": 5.0,
    "delta": 1e-3,
    "accountant": "rdp",
    "reproducible_seed": 0,
    "options": {"epochs": 2, "batch_size": 50, "walk_steps": 2},
}

EXCEPTIONS = {
    "check_methods_subset_invariance": "scores are float32: rows in batches of other sizes are rounded otherwise",
    "check_methods_sample_order_invariance": "on some processors a row's place in a batch rounds it otherwise, too",
    "check_estimators_pickle": "a pickle holds no result, whose ledger may grow in one process only",
    "check_readonly_memmap_input": "the trained network is compared by pickles there",
    "check_fit_idempotent": "initial weights come from torch's own generator: two fits differ",
    "check_classifier_data_not_an_array": "likewise",
    "check_fit2d_1sample": "a batch of more rows than there are is refused in words of this package",
    "check_outliers_fit_predict": "the share is that of a noisy release",
    "check_outliers_train": "the share is that of a noisy release",
}
"""What scikit-learn asks for, and is not so."""


@pytest.fixture(scope="module")
def fitted() -> PrivateOutlierDetector:
    return PrivateOutlierDetector(**QUICK, contamination=0.1).fit(ROWS)


def test_it_has_what_conventions_ask_for(fitted: PrivateOutlierDetector) -> None:
    scores, decisions = fitted.score_samples(ROWS), fitted.decision_function(ROWS)
    assert scores.shape == (200,)
    assert np.allclose(decisions, scores - fitted.offset_)
    assert set(fitted.predict(ROWS)) <= {-1, 1}
    assert np.array_equal(fitted.predict(ROWS) == 1, decisions >= 0.0)
    assert fitted.n_features_in_ == 3
    assert 0.0 < fitted.epsilon_ <= 5.0
    assert "Negatives were made up" in fitted.statement_.to_markdown()
    assert repr(clone(fitted)) == repr(fitted)


def test_without_contamination_the_threshold_is_zero_and_free() -> None:
    found = PrivateOutlierDetector(**QUICK).fit(ROWS)
    assert found.offset_ == 0.0
    assert len(found.result_.result.optimizer.accountant.ledger.entries) == 1


def test_without_privacy_epsilon_is_infinite_and_half_are_outliers_where_asked() -> None:
    settings = {**QUICK, "epsilon": None, "delta": None}
    found = PrivateOutlierDetector(**settings, contamination=0.5)
    share = float((found.fit_predict(ROWS) == -1).mean())
    assert share == pytest.approx(0.5, abs=0.02)
    assert found.epsilon_ == math.inf


def test_images_and_pipelines_go_through() -> None:
    images = np.random.default_rng(1).uniform(0.0, 1.0, (60, 1, 4, 4))
    settings = {**QUICK, "domain": (0.0, 1.0), "network": "convolutional"}
    found = PrivateOutlierDetector(**settings).fit(images)
    assert found.n_features_in_ == 16
    assert found.predict(images).shape == (60,)
    with pytest.raises(InputError, match="expected rows of shape"):
        found.predict(images[:, :, :2])
    pipeline = make_pipeline(FunctionTransformer(), PrivateOutlierDetector(**QUICK)).fit(ROWS)
    assert pipeline.predict(ROWS).shape == (200,)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"domain": None}, "must be public"),
        ({"contamination": 0.7}, "contamination"),
        ({"contamination": "auto"}, "contamination"),
        ({"options": {"epsilon": 1.0}}, "options hold epsilon"),
        ({"options": 3}, "mapping"),
    ],
)
def test_arguments_are_checked_and_a_failed_fit_leaves_the_last_one(
    fitted: PrivateOutlierDetector, changes: dict[str, Any], told: str
) -> None:
    known = clone(fitted).set_params(**changes)
    known.result_ = fitted.result_
    with pytest.raises(ConfigurationError, match=told):
        known.fit(ROWS)
    assert known.result_ is fitted.result_


def test_clones_spend_in_the_one_ledger_that_was_given() -> None:
    ledger = create_accountant("rdp")
    first = PrivateOutlierDetector(**{**QUICK, "accountant": ledger})
    clones = [clone(first), clone(make_pipeline(first))[0]]
    assert all(one.accountant is ledger for one in clones)
    # What the first has spent of ε is not there for the second.
    sigmas = [one.fit(ROWS).result_.result.noise_multiplier for one in clones]
    assert sigmas[1] > 3.0 * sigmas[0]
    assert len(ledger.ledger.entries) == 2
    assert ledger.get_epsilon(1e-3) <= 5.0


def test_a_finite_number_beyond_float32_counts_as_the_end_of_the_box() -> None:
    rows = ROWS.copy()
    rows[0, 0] = 1e39
    found = PrivateOutlierDetector(**QUICK, contamination=np.float32(0.1)).fit(rows)
    nearest = rows.clip(-4.0, 4.0)
    assert np.array_equal(found.score_samples(rows), found.score_samples(nearest))


def test_pickles_do_not_hold_the_result(fitted: PrivateOutlierDetector) -> None:
    with pytest.raises(NotFittedError):
        pickle.loads(pickle.dumps(fitted)).predict(ROWS)


def test_missing_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        PrivateOutlierDetector(**QUICK).fit(np.full((5, 3), np.nan))


def test_the_package_has_it_by_name() -> None:
    assert clipless_dp.PrivateOutlierDetector is PrivateOutlierDetector


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_checks_of_scikit_learn_pass_but_for_the_listed_ones() -> None:
    settings = {**QUICK, "options": {"epochs": 2, "batch_size": 5, "walk_steps": 2}}
    results = check_estimator(PrivateOutlierDetector(**settings), on_fail=None, on_skip=None)
    failed = {result["check_name"]: repr(result["exception"]) for result in results if result["status"] == "failed"}
    assert failed.keys() <= EXCEPTIONS.keys(), failed
    assert len(results) > 30
