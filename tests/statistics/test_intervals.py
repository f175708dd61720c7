"""`private_interval`: what it covers and how often, its noise, what it charges, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from accounting import GaussianRelease, RDPAccountant
from clipless_dp import ConfigurationError, InputError, PrivacyError, ReproducibleNoise
from clipless_dp.statistics import intervals, private_interval
from tests.support import NoNoise, gated_model

NORMAL = NormalDist()


class Wrong(ReproducibleNoise):
    """Noise of another deviation than what is recorded."""

    factor = 1.0

    def standard_normal_(self, out: Tensor) -> Tensor:
        return super().standard_normal_(out).mul_(self.factor)


def zero(inputs: Tensor) -> Tensor:
    return torch.zeros(len(inputs))


def interval(targets: Tensor, content: float = 0.9, confidence: float = 0.9, **settings: Any) -> float:
    given = {"upper": 4.0, "lower": 0.5, "points": 31, "noise_multiplier": 2.0, "accountant": RDPAccountant()}
    return private_interval(zero, (targets[:, None], targets), content, confidence, **{**given, **settings}).width


def coverage(width: float) -> float:
    """Of standard normal targets."""
    return 1.0 - 2.0 * NORMAL.cdf(-width) if math.isfinite(width) else 1.0


def failures(trials: int, *, noise_multiplier: float = 8.0, factor: float = 1.0) -> int:
    """How often fewer targets are covered than was said."""
    failed = 0
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        targets = torch.randn(400, generator=generator, dtype=torch.float64)
        noise = Wrong(trial)
        noise.factor = factor
        # The smallest width whose coverage is just too small is the one that is easily taken: many points.
        width = interval(targets, 0.8, 0.9, noise_multiplier=noise_multiplier, noise=noise, points=255)
        failed += coverage(width) < 0.8
    return failed


def test_it_holds_what_it_says_as_often_as_it_says_and_noise_of_another_deviation_does_not() -> None:
    trials = 150
    # One-sided, at one in a million.
    most = stats.binom.isf(1e-6, trials, 0.1)
    assert failures(trials) <= most
    assert failures(trials, factor=12.0) > most


def test_a_count_that_ignores_the_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the plain share of the rows."""
    monkeypatch.setattr(intervals, "needed_count", lambda rows, content, *rest: rows * content)
    assert failures(60) > stats.binom.isf(1e-6, 60, 0.1)


def passing(deviation_factor: float, trials: int = 800) -> int:
    """Of a grid of one width, how often its noisy count is enough."""
    targets = torch.cat((torch.zeros(23), torch.full((7,), 9.0))).double()
    passed = 0
    for trial in range(trials):
        noise = Wrong(trial)
        noise.factor = deviation_factor
        passed += math.isfinite(interval(targets, 0.5, 0.9, points=1, noise_multiplier=6.0, noise=noise))
    return passed


def test_counts_have_the_noise_that_is_charged() -> None:
    least = intervals.needed_count(30, 0.5, 0.9, 6.0, 1)
    expected = 1.0 - NORMAL.cdf((least - 23.0) / 6.0)
    assert 0.1 < expected < 0.3
    assert stats.binomtest(passing(1.0), 800, expected).pvalue > 1e-3
    for wrong in (0.7, 1.4):
        assert stats.binomtest(passing(wrong), 800, expected).pvalue < 1e-6


def test_without_noise_it_is_the_smallest_width_whose_count_is_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    for points in (1, 2, 5, 31, 64):
        targets = torch.randn(300, generator=generator, dtype=torch.float64)
        found = interval(targets, 0.7, noise=NoNoise(), points=points, noise_multiplier=0.1)
        widths = intervals.grid(0.5, 4.0, points)
        halvings = math.ceil(math.log2(points + 1))
        least = intervals.needed_count(300, 0.7, 0.9, 0.1 * math.sqrt(halvings), halvings)
        assert found == min(width for width in widths if int((targets.abs() <= width).sum()) >= least)


def test_the_binomial_margin_is_the_smallest_that_holds() -> None:
    least = math.floor(intervals.needed_count(200, 0.9, 0.95, 1e-9, 6)) + 1
    assert float(stats.binom.sf(least - 1, 200, 0.9)) <= 0.025 < float(stats.binom.sf(least - 2, 200, 0.9))


def test_one_release_is_charged_and_a_file_pays_once(tmp_path: Path) -> None:
    targets, accountant, file = torch.linspace(-1.0, 1.0, 300), RDPAccountant(), tmp_path / "interval"
    first = interval(targets, accountant=accountant, file=file)
    assert interval(targets, accountant=accountant, file=file) == first
    (event, _), *others = accountant.ledger
    assert not others
    assert isinstance(event, GaussianRelease)
    assert event.noise_multiplier == 2.0


def test_wrapped_models_predict_in_eval_mode_and_are_put_back() -> None:
    model = gated_model()
    model.train()
    inputs = torch.randn(300, *model.input_shape)
    with torch.no_grad():
        outputs = model.eval()(inputs)
    model.train()
    given: dict[str, Any] = {"upper": 4.0, "noise_multiplier": 1.0, "accountant": RDPAccountant()}
    found = private_interval(model, (inputs, outputs + 1.0), 0.8, 0.9, **given)
    assert model.training
    assert found.width == pytest.approx(1.0, rel=0.12)
    assert found.width >= 1.0
    low, high = found.around(outputs)
    assert bool(((low <= outputs + 1.0) & (outputs + 1.0 <= high)).all())


def test_rows_without_a_distance_are_outside_and_no_width_is_infinite() -> None:
    targets = torch.full((300,), math.nan)
    assert interval(targets) == math.inf
    assert interval(torch.full((300,), 9.0)) == math.inf


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"content": 1.0}, "content"),
        ({"confidence": 0.0}, "confidence"),
        ({"lower": 5.0}, "lower"),
        ({"points": 0}, "points"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"content": 0.999}, "more rows"),
        ({"noise_multiplier": 100.0}, "more rows"),
    ],
)
def test_bad_arguments_are_refused_and_charge_nothing(settings: dict[str, Any], words: str) -> None:
    accountant = RDPAccountant()
    with pytest.raises(ConfigurationError, match=words):
        interval(torch.zeros(100), accountant=accountant, **settings)
    assert not list(accountant.ledger)


def test_predictions_of_another_size_are_refused_and_charge_nothing() -> None:
    accountant = RDPAccountant()
    given: dict[str, Any] = {"upper": 4.0, "noise_multiplier": 1.0, "accountant": accountant}
    data = torch.zeros(300, 3), torch.zeros(300)
    for model in (nn.Linear(3, 2), lambda inputs: None):
        with pytest.raises(InputError, match="size"):
            private_interval(model, data, 0.8, 0.9, **given)
    with pytest.raises(InputError, match="same rows"):
        private_interval(zero, (data[0][:7], data[1]), 0.8, 0.9, **given)
    for rows in (torch.zeros(0), torch.zeros(300, dtype=torch.complex64)):
        with pytest.raises(InputError, match="real targets"):
            private_interval(zero, (data[0][: len(rows)], rows), 0.8, 0.9, **given)
    assert not list(accountant.ledger)


def test_each_row_is_predicted_by_itself() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    inputs = torch.randn(400, 16)
    seen: list[int] = []

    def counted(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return net(rows)

    with torch.no_grad():
        before = intervals._distances(counted, inputs, torch.zeros(400))
        after = intervals._distances(counted, torch.cat([torch.randn(1, 16), inputs]), torch.zeros(401))
    assert set(seen) == {1}
    assert torch.equal(before, after[1:]), "a row in front moves no other one's"


@pytest.mark.parametrize("which", ["windows", "targets of the next row"])
def test_rows_and_targets_that_lie_on_one_another_are_refused(which: str) -> None:
    accountant = RDPAccountant()
    series = torch.randn(304)
    data = (series.unfold(0, 5, 1), torch.randn(300))
    if which != "windows":
        table = torch.randn(301, 3)
        data = (table[:300], table[1:, 0])
    with pytest.raises(PrivacyError):
        private_interval(zero, data, 0.8, 0.9, upper=4.0, noise_multiplier=1.0, accountant=accountant)
    assert not list(accountant.ledger)
