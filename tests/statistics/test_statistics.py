from __future__ import annotations

import math

import pytest
import torch

from accounting import GaussianRelease, GaussianStep, PRVAccountant, RDPAccountant, UnreachableTargetError
from clipless_dp import (
    CheckpointError,
    ConfigurationError,
    InputError,
    PrivacyError,
    ReproducibleNoise,
    fit,
    statistics,
)
from clipless_dp.checkpoint import load_checkpoint, save_checkpoint
from clipless_dp.noise import adding
from clipless_dp.statistics import private_fraction, private_moments, private_quantile, private_standardisation
from tests.support import NoNoise, gated_model, samples

RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 2, "batch_size": 50, "progress": False}


def largest_change(norm: float = 3.0) -> float:
    """What one record changes in the sums that are released, at most: structured records and random ones."""
    generator = torch.Generator().manual_seed(0)
    rest = 5 * torch.randn(20, 4, 2, 3, generator=generator, dtype=torch.float64)
    one_channel = torch.zeros(4, 2, 3, dtype=torch.float64)
    one_channel[1] = 1e3
    one_entry = torch.zeros(4, 2, 3, dtype=torch.float64)
    one_entry[2, 0, 1] = -7.0
    records = [one_channel, -one_channel, one_channel * 1e-6, one_entry, torch.ones_like(one_entry)]
    records += list(torch.randn(20, 4, 2, 3, generator=generator, dtype=torch.float64))
    records.append(torch.full_like(one_entry, math.nan))
    records.append(torch.full_like(one_entry, math.inf))
    before = statistics.moments.moment_sums(rest, norm)
    return max(
        float((statistics.moments.moment_sums(torch.cat([rest, record[None]]), norm) - before).norm())
        for record in records
    )


def deviation_of_the_noise(noise_multiplier: float) -> float:
    """Standard deviation of what is added to the sums, from 40 000 numbers."""
    moments = private_moments(
        torch.zeros(1, 20_000),
        norm=1.0,
        noise_multiplier=noise_multiplier,
        accountant=PRVAccountant(),
        noise=ReproducibleNoise(1),
    )
    return float(moments.mean.square().mean().sqrt())


def check_noise_against_sensitivity() -> None:
    # 20 000 numbers have a standard deviation to 0.5 %; four of these, and what brute force misses of the supremum.
    assert deviation_of_the_noise(3.0) == pytest.approx(3.0 * largest_change(), rel=0.02)


def test_one_record_changes_the_moments_by_the_sensitivity_and_no_more():
    assert (
        0.999 * statistics.moments.MOMENTS_SENSITIVITY
        < largest_change()
        <= statistics.moments.MOMENTS_SENSITIVITY * (1 + 1e-12)
    )


def test_the_noise_is_the_recorded_multiple_of_the_sensitivity():
    check_noise_against_sensitivity()


@pytest.mark.parametrize("factor", [0.5, 0.0, 0.9])
def test_a_smaller_sensitivity_of_the_moments_is_caught(monkeypatch, factor):
    monkeypatch.setattr(statistics.moments, "MOMENTS_SENSITIVITY", factor * math.sqrt(2.0))
    with pytest.raises(AssertionError):
        check_noise_against_sensitivity()
    with pytest.raises(AssertionError):
        test_one_record_changes_the_moments_by_the_sensitivity_and_no_more()


def test_without_noise_the_moments_are_those_of_the_projected_records():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, 3, 4, generator=generator, dtype=torch.float64) + torch.arange(3.0)[:, None]
    lengths = values.flatten(1).norm(dim=1)
    moments = private_moments(values, norm=5.0, noise_multiplier=1e-9, accountant=PRVAccountant(), noise=NoNoise())
    projected = values * (5.0 / lengths).clamp(max=1.0)[:, None, None]
    torch.testing.assert_close(moments.mean, projected.mean((0, 2)))
    torch.testing.assert_close(moments.variance, projected.var((0, 2), correction=0), rtol=1e-6, atol=1e-6)
    standardised = moments.standardise(projected)
    torch.testing.assert_close(standardised.mean((0, 2)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(standardised.std((0, 2), correction=0), torch.ones(3).double(), rtol=1e-5, atol=0)


def test_variances_below_their_own_noise_are_lifted_to_it():
    moments = private_moments(
        torch.zeros(100, 50), norm=2.0, noise_multiplier=3.0, accountant=PRVAccountant(), noise=ReproducibleNoise(0)
    )
    assert moments.floor == pytest.approx(2.0 * math.sqrt(math.sqrt(2.0) * 3.0 / 100))
    assert float(moments.variance.min()) == pytest.approx(moments.floor**2)


@pytest.mark.parametrize("seed", range(3))
def test_a_private_quantile_lies_near_the_true_one(seed):
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(seed)).exp()
    found = private_quantile(
        values,
        0.9,
        lower=1e-4,
        upper=1e4,
        noise_multiplier=5.0,
        accountant=PRVAccountant(),
        noise=ReproducibleNoise(seed),
    )
    # Counts have noise of deviation 5√20 = 22: ranks within 5 of these.
    assert abs(float((values <= found).double().mean()) - 0.9) < 5 * 22.4 / 10_000


def test_the_counts_of_a_quantile_have_the_noise_that_its_release_records():
    seen = []

    class Spy(ReproducibleNoise):
        def standard_normal_(self, out):
            seen.append(out.numel())
            return out.fill_(1.0)

    # With every draw at +1 the bisection ends where the count is the target less one deviation of the noise.
    values = torch.arange(1.0, 10_001.0)
    found = private_quantile(
        values, 0.5, lower=1.0, upper=1e5, noise_multiplier=20.0, accountant=PRVAccountant(), noise=Spy(0)
    )
    # Before the first one it was tried.
    assert seen[1:] == [1] * 20
    assert found == pytest.approx(5000 - 20.0 * math.sqrt(20), abs=1.5)


def test_every_statistic_is_recorded_once_and_training_is_calibrated_on_top():
    accountant = PRVAccountant()
    inputs, labels = samples(300)
    moments = private_moments(inputs, norm=3.0, noise_multiplier=8.0, accountant=accountant)
    private_quantile(inputs.norm(dim=1), 0.5, lower=0.1, upper=10.0, noise_multiplier=9.0, accountant=accountant)
    result = fit(gated_model(), (moments.standardise(inputs), labels), accountant=accountant, **RUN)
    assert [(type(event), event.noise_multiplier, count) for event, count in accountant.ledger] == [
        (GaussianRelease, 8.0, 1),
        (GaussianRelease, 9.0, 1),
        (GaussianStep, result.noise_multiplier, 12),
    ]
    assert result.optimizer.accountant is accountant
    assert 0.98 * 4.0 < result.epsilon <= 4.0
    alone = fit(gated_model(), (inputs, labels), accountant="prv", **RUN)
    assert result.noise_multiplier > alone.noise_multiplier


def test_a_statistic_that_is_not_charged_is_caught(monkeypatch):
    monkeypatch.setattr(PRVAccountant, "record", lambda self, event, count=1, *, provenance=None: None)
    with pytest.raises(AssertionError):
        test_every_statistic_is_recorded_once_and_training_is_calibrated_on_top()


def test_a_budget_that_statistics_have_used_up_is_refused_before_training():
    accountant = RDPAccountant()
    inputs, labels = samples(300)
    private_moments(inputs, norm=3.0, noise_multiplier=0.5, accountant=accountant)
    with pytest.raises(UnreachableTargetError, match="spent before"):
        fit(gated_model(), (inputs, labels), accountant=accountant, **RUN)


@pytest.mark.parametrize("kept", [True, False], ids=["reread", "drawn anew"])
def test_a_resumed_run_pays_once_for_what_it_rereads_and_again_for_what_it_draws_anew(tmp_path, kept):
    inputs, labels = samples(300)
    file = tmp_path / "moments.pt" if kept else None

    def run():
        accountant = RDPAccountant()
        moments = private_moments(inputs, norm=3.0, noise_multiplier=8.0, accountant=accountant, file=file)
        data = (moments.standardise(inputs), labels)
        return moments, fit(gated_model(), data, accountant=accountant, checkpoint=tmp_path / "run.pt", **RUN)

    (first, trained), (second, resumed) = run(), run()
    releases = [event for event, _ in resumed.optimizer.accountant.ledger if isinstance(event, GaussianRelease)]
    assert torch.equal(first.mean, second.mean) == kept
    assert len(releases) == (1 if kept else 2)
    assert (resumed.epsilon == trained.epsilon) == kept
    assert resumed.epsilon >= trained.epsilon


def test_a_file_of_other_settings_is_refused_and_nothing_is_recorded(tmp_path):
    values = torch.randn(10, 3)
    file = tmp_path / "moments.pt"
    private_moments(values, norm=1.0, noise_multiplier=1.0, accountant=PRVAccountant(), file=file)
    accountant = PRVAccountant()
    for change in ({"norm": 2.0}, {"noise_multiplier": 2.0}):
        settings = {"norm": 1.0, "noise_multiplier": 1.0, **change}
        with pytest.raises(CheckpointError, match=r"moments\.pt"):
            private_moments(values, accountant=accountant, file=file, **settings)
    assert len(accountant.ledger) == 0


@pytest.mark.parametrize(
    "change",
    [{"norm": 0.0}, {"norm": math.nan}, {"noise_multiplier": 0.0}, {"noise_multiplier": math.inf}, {"dataset_size": 0}],
    ids=str,
)
def test_arguments_out_of_range_are_refused_before_anything_is_recorded(change):
    accountant = PRVAccountant()
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        private_moments(torch.zeros(4, 2), **{"norm": 1.0, "noise_multiplier": 1.0, "accountant": accountant, **change})
    with pytest.raises(ConfigurationError, match="quantile"):
        private_quantile(torch.ones(4), 1.0, lower=1.0, upper=2.0, noise_multiplier=1.0, accountant=accountant)
    with pytest.raises(ConfigurationError, match="lower"):
        private_quantile(torch.ones(4), 0.5, lower=2.0, upper=1.0, noise_multiplier=1.0, accountant=accountant)
    for values in (torch.zeros(4), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(0, 2)):
        with pytest.raises(InputError, match="floating-point"):
            private_moments(values, norm=1.0, noise_multiplier=1.0, accountant=accountant)
    assert len(accountant.ledger) == 0


def check_the_noise_of_a_fraction() -> None:
    flags, drawn = torch.arange(10_000) % 4 == 0, []
    for seed in range(2000):
        accountant = RDPAccountant()
        found = private_fraction(flags, noise_multiplier=30.0, accountant=accountant, noise=ReproducibleNoise(seed))
        drawn.append(found * 10_000 - 2500)
    assert [(event.noise_multiplier, count) for event, count in accountant.ledger] == [(30.0, 1)]
    errors = torch.tensor(drawn)
    # Of 2000 numbers the mean is known to 0.7, the deviation to 1.6 %: four of these.
    assert abs(float(errors.mean())) < 2.7
    assert float(errors.std()) == pytest.approx(30.0, rel=0.065)


def test_a_private_fraction_is_the_share_with_the_noise_that_is_recorded():
    check_the_noise_of_a_fraction()


@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1])
def test_other_noise_on_a_fraction_is_caught(monkeypatch, factor):
    honest = ReproducibleNoise.standard_normal_
    monkeypatch.setattr(ReproducibleNoise, "standard_normal_", lambda self, out: honest(self, out).mul_(factor))
    with pytest.raises(AssertionError):
        check_the_noise_of_a_fraction()


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0.05), (1.0, 0.95), (0.25, 0.25)])
def test_a_fraction_that_is_not_told_from_none_or_all_is_moved_away_from_them(share, kept):
    flags = (torch.arange(100) < 100 * share).float()
    settings = {"accountant": PRVAccountant(), "noise": NoNoise()}
    assert private_fraction(flags, noise_multiplier=5.0, **settings) == pytest.approx(kept)
    assert private_fraction(flags, noise_multiplier=500.0, **settings) == 0.5


def test_a_fraction_is_reread_from_its_file_and_paid_once(tmp_path):
    flags, accountant = torch.arange(100) % 2, RDPAccountant()
    settings = {"noise_multiplier": 5.0, "accountant": accountant, "file": tmp_path / "labels.pt"}
    first = private_fraction(flags, **settings)
    assert private_fraction(flags, **settings) == first
    assert len(list(accountant.ledger)) == 1
    with pytest.raises(CheckpointError, match=r"labels\.pt"):
        private_fraction(flags, **{**settings, "noise_multiplier": 6.0})


def test_what_is_no_flag_is_refused_before_anything_is_recorded():
    accountant = PRVAccountant()
    wrong = (
        torch.tensor([0.0, 0.5]),
        torch.tensor([0, 2]),
        torch.tensor([math.nan]),
        torch.zeros(3, 1),
        torch.zeros(0),
    )
    for flags in wrong:
        with pytest.raises(InputError):
            private_fraction(flags, noise_multiplier=1.0, accountant=accountant)
    for change in ({"noise_multiplier": 0.0}, {"dataset_size": 0}):
        with pytest.raises(ConfigurationError, match=next(iter(change))):
            private_fraction(torch.ones(3), **{"noise_multiplier": 1.0, "accountant": accountant, **change})
    assert len(accountant.ledger) == 0


def table(rows: int = 20_000) -> torch.Tensor:
    """Columns whose scales differ by nine orders: one with an offset, one with heavy tails, one of rare ones."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    columns[:, 1] += 5.0
    columns[:, 2] = columns[:, 2] ** 3
    rare = (torch.rand(rows, 1, generator=generator, dtype=torch.float64) < 0.005).double()
    return torch.cat([columns * torch.tensor([1e-4, 1.0, 3.0, 1e5]).double(), rare], 1)


def standardised(rows: torch.Tensor, **changes) -> statistics.Standardisation:
    settings = {"noise_multiplier": 10.0, "accountant": PRVAccountant(), "noise": ReproducibleNoise(0), **changes}
    return private_standardisation(rows, **settings)


def test_standardised_columns_have_one_scale_whatever_theirs_was():
    rows = table()
    out = standardised(rows, noise_multiplier=2.0)(rows)
    assert float(out.abs().max()) <= 4.0
    # Noise is a few percent of the variance; heavy tails are cut, too.
    torch.testing.assert_close(out[:, :4].mean(0), torch.zeros(4), rtol=0, atol=0.1)
    torch.testing.assert_close(out[:, :4].std(0), torch.ones(4), rtol=0, atol=0.15)
    rare = rows[:, 4] == 1
    assert float(out[rare, 4].min()) > float(out[~rare, 4].max())


def test_without_noise_the_caps_are_twice_a_high_quantile():
    scales = torch.tensor([1e-3, 1.0, 1e2])
    magnitudes = torch.arange(1.0, 1001.0)[:, None] * scales
    caps = standardised(magnitudes, noise=NoNoise(), noise_multiplier=1e-9).caps
    # The range is halved to an eighth of a unit of the logarithm.
    torch.testing.assert_close(caps.log(), (2.0 * 980.0 * scales).double().log(), rtol=0, atol=0.125)


def test_missing_cells_become_the_mean_and_infinite_ones_are_cut():
    rows = table(2000)
    rows[0, 0], rows[1, 1], rows[2, 2] = math.nan, math.inf, -math.inf
    out = standardised(rows)(rows)
    assert torch.isfinite(out).all()
    assert float(out[0, 0]) == 0.0
    assert float(out[1, 1]) > 0 > float(out[2, 2])


def largest_change_of_the_counts(columns: int) -> float:
    """What one record changes in the counts of all columns, at most."""
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(20, columns, generator=generator, dtype=torch.float64)
    thresholds = torch.rand(columns, generator=generator, dtype=torch.float64)
    records = [torch.full((columns,), value).double() for value in (0.0, 1e9, math.nan, math.inf, -math.inf)]
    records += list(torch.randn(5, columns, generator=generator, dtype=torch.float64))
    before = statistics.columns._counts(rest, thresholds)
    return max(
        float((statistics.columns._counts(torch.cat([rest, record[None]]), thresholds) - before).norm())
        for record in records
    )


def check_the_noise_of_a_standardisation() -> None:
    """Both parts have noise of at least ``σ√2`` times what one record changes: they compose to ``σ``."""
    columns, sigma = 10_000, 3.0
    part = math.sqrt(2.0) * sigma
    # The range is halved twice. All counts are 1, and the rank is 0.7 of the size: one deviation above them.
    deviation = part * math.sqrt(2.0) * largest_change_of_the_counts(columns)
    size = round((1.0 + deviation) / 0.7)
    made = standardised(
        torch.full((1, columns), 1e-3), noise_multiplier=sigma, lower=1.0, upper=math.exp(0.5), dataset_size=size
    )
    in_the_upper_half = float((made.caps > 2.0 * math.exp(0.26)).double().mean())
    # Φ(1); four standard deviations of a share of 10 000.
    assert in_the_upper_half == pytest.approx(0.8413, abs=0.015)
    noise = made.mean * size / (math.sqrt(columns) / 2.0)
    # Of 10 000 numbers the standard deviation is known to 0.7 %, and brute force misses the supremum by less.
    assert float(noise.std()) == pytest.approx(part * largest_change(), rel=0.03)


def test_a_record_changes_the_counts_of_all_columns_by_the_root_of_their_number_at_most():
    assert largest_change_of_the_counts(7) == pytest.approx(math.sqrt(7.0))


def test_the_noise_of_a_standardisation_is_the_recorded_multiple_of_what_a_record_changes():
    check_the_noise_of_a_standardisation()


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("_counts_sensitivity", lambda columns: 1.0),
        ("_counts_sensitivity", lambda columns: math.sqrt(columns / 2.0)),
        ("MOMENTS_SENSITIVITY", 1.0),
        ("RELEASE_MARGIN", math.sqrt(0.5)),
    ],
    ids=["one column", "halvings forgotten", "first moments only", "each part alone"],
)
def test_less_noise_on_a_standardisation_is_caught(monkeypatch, name, mutant):
    monkeypatch.setattr(adding if name == "RELEASE_MARGIN" else statistics.columns, name, mutant)
    with pytest.raises(AssertionError):
        check_the_noise_of_a_standardisation()


def test_a_standardisation_is_one_release_recorded_before_the_data_is_read(tmp_path, monkeypatch):
    accountant = PRVAccountant()
    rows = table(500)
    first = standardised(rows, accountant=accountant, file=tmp_path / "columns.pt")
    assert [(event.noise_multiplier, count) for event, count in accountant.ledger] == [(10.0, 1)]
    again = standardised(rows, accountant=accountant, file=tmp_path / "columns.pt", noise=ReproducibleNoise(1))
    assert len(accountant.ledger) == 1
    assert torch.equal(first(rows), again(rows))
    with pytest.raises(CheckpointError, match=r"columns\.pt"):
        standardised(rows[:, :3], file=tmp_path / "columns.pt")

    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(statistics.columns, "_counts", broken)
    with pytest.raises(KeyboardInterrupt):
        standardised(rows, accountant=accountant)
    assert sum(count for _, count in accountant.ledger) == 2


@pytest.mark.parametrize("change", [{"lower": 0.0}, {"upper": 1e-7}, {"upper": math.inf}, {"lower": math.nan}], ids=str)
def test_a_range_of_magnitudes_that_is_none_is_refused_before_anything_is_recorded(change):
    accountant = PRVAccountant()
    with pytest.raises(ConfigurationError, match=r"lower|upper"):
        standardised(table(10), accountant=accountant, **change)
    for rows in (torch.zeros(4), torch.zeros(4, 2, 2), torch.zeros(4, 2, dtype=torch.int64)):
        with pytest.raises(InputError):
            standardised(rows, accountant=accountant)
    assert len(accountant.ledger) == 0
    with pytest.raises(InputError, match="5"):
        standardised(table(10))(torch.zeros(1, 4))


STATISTICS = {
    "moments": lambda rows, **given: private_moments(rows, norm=1.0, noise_multiplier=3.0, **given).mean,
    "quantile": lambda rows, **given: private_quantile(
        rows.norm(dim=1), 0.5, lower=0.1, upper=10.0, noise_multiplier=3.0, **given
    ),
    "fraction": lambda rows, **given: private_fraction(rows[:, 0] > 0.3, noise_multiplier=3.0, **given),
    "standardisation": lambda rows, **given: private_standardisation(rows, noise_multiplier=3.0, **given).mean,
}


def share_off_the_grid(statistic, monkeypatch, add=adding.noisy):
    """Of the noisy numbers that a statistic is made of, how many are no multiples of their deviation's grid."""
    off, honest = [], add

    def watched(exact, deviation, source):
        sums = honest(exact, deviation, source)
        steps = sums / 2.0 ** (math.floor(math.log2(deviation * adding.RELEASE_MARGIN)) - 20)
        off.extend((steps != steps.round()).flatten().tolist())
        return sums

    for room in (statistics.moments, statistics.counts, statistics.columns):
        monkeypatch.setattr(room, "noisy", watched)
    rows = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) * math.pi
    STATISTICS[statistic](rows, accountant=PRVAccountant(), noise="secure")
    assert len(off) > 0
    return sum(off) / len(off)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_secure_noise_rounds_every_number_that_a_statistic_releases_to_a_public_grid(statistic, monkeypatch):
    pytest.importorskip("cryptography")
    assert share_off_the_grid(statistic, monkeypatch) == 0.0
    monkeypatch.undo()

    def plain(exact, deviation, source):
        return exact + deviation * source.standard_normal_(torch.empty(exact.shape, dtype=torch.float64))

    # The grid is what makes it so: of plain sums hardly one lies there.
    assert share_off_the_grid(statistic, monkeypatch, plain) > 0.5


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("noise", [None, "system", "secure", ReproducibleNoise(1)])
def test_every_statistic_takes_noise_by_name_or_source(statistic, noise):
    if noise == "secure":
        pytest.importorskip("cryptography")
    rows = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    first, second = (
        torch.as_tensor(STATISTICS[statistic](rows, accountant=PRVAccountant(), noise=noise)) for _ in range(2)
    )
    assert torch.isfinite(first).all()
    assert torch.equal(first, second) == isinstance(noise, ReproducibleNoise)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("noise", ["secret", 3, object(), ReproducibleNoise])
def test_what_is_no_source_of_noise_is_refused_before_anything_is_charged(statistic, noise):
    accountant = PRVAccountant()
    with pytest.raises(ConfigurationError, match="noise must be"):
        STATISTICS[statistic](torch.ones(50, 4), accountant=accountant, noise=noise)
    assert len(accountant.ledger) == 0


def test_a_file_of_numbers_of_another_type_is_refused_and_one_of_before_types_were_kept_is_read(tmp_path):
    file, values = tmp_path / "moments.pt", torch.randn(50, 3)
    settings = {"norm": 1.0, "noise_multiplier": 1.0, "accountant": RDPAccountant(), "file": file}
    first = private_moments(values, **settings)
    with pytest.raises(CheckpointError, match=r"float64.*choose another"):
        private_moments(values.double(), **settings)
    content = load_checkpoint(file)
    del content["settings"]["dtype"]
    save_checkpoint(file, content)
    for form in (values, values.double()):
        assert torch.equal(private_moments(form, **settings).mean, first.mean)
    assert len(settings["accountant"]) == 1


LYING = {
    "one record for all": lambda: torch.rand(1, 4).expand(50, 4),
    "windows": lambda: torch.rand(53).unfold(0, 4, 1),
}
RELEASED = {
    "moments": lambda rows, **run: private_moments(rows, norm=1.0, noise_multiplier=1.0, **run),
    "standardisation": lambda rows, **run: private_standardisation(rows, noise_multiplier=1.0, **run),
}


@pytest.mark.parametrize("statistic", RELEASED)
@pytest.mark.parametrize("name", LYING)
def test_records_that_lie_on_one_another_are_refused_unless_they_are_one_persons_and_nothing_is_charged(
    name, statistic
):
    accountant, rows, release = RDPAccountant(), LYING[name](), RELEASED[statistic]
    for given in (rows, rows[:, :2]):
        with pytest.raises(PrivacyError, match="lie on one another"):
            release(given, accountant=accountant)
        with pytest.raises(PrivacyError, match="lie on one another"):
            release(given, accountant=accountant, groups=torch.arange(50) // 25)
    assert not accountant.ledger
    release(rows.clone(), accountant=accountant)
    of_two_by_turns = torch.rand(56).as_strided((50, 4), (1, 2))
    release(of_two_by_turns, accountant=RDPAccountant(), groups=torch.arange(50) % 2)
    with pytest.raises(PrivacyError, match="lie on one another"):
        release(of_two_by_turns, accountant=accountant, groups=torch.arange(50) // 25)
    # A table's columns, rows in another order of memory, and one number for all channels lie on nothing.
    table = torch.rand(4, 50)
    for apart in (table.T, torch.rand(50, 9)[:, 1:8:2], torch.rand(100, 4)[::2], torch.rand(50, 1).expand(50, 4)):
        release(apart, accountant=RDPAccountant())


def test_one_number_of_all_records_has_no_quantile_and_one_flag_for_all_is_a_constant():
    run = {"accountant": RDPAccountant(), "noise_multiplier": 1.0}
    with pytest.raises(PrivacyError, match="lie on one another"):
        private_quantile(torch.rand(1).expand(50), quantile=0.5, lower=0.1, upper=1.0, **run)
    assert not run["accountant"].ledger
    for kind in (torch.bool, torch.float64):
        private_fraction(torch.ones(1, dtype=kind).expand(50), **run)
    statistics.private_shares(torch.ones(1, dtype=torch.int64).expand(50), classes=2, **run)
