"""People or capped rows: the better sampling, by public numbers."""

from __future__ import annotations

import pytest
from torch import nn

from accounting import compare_samplings
from clipless_dp import ConfigurationError, DPLipModel, gated, losses, suggest_sampling, suggest_settings
from clipless_dp.training import SuggestedSettings


def plan(people: int = 6000) -> SuggestedSettings:
    net = gated(nn.Sequential(nn.Linear(4, 3)), cotangent_mode="normalize")
    model = DPLipModel(net, input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy())
    return suggest_settings(model, people, 3.0, 1e-5, batch_size=60, epochs=2)


def test_it_compares_at_the_rate_and_steps_of_the_settings() -> None:
    settings = plan()
    found = suggest_sampling(settings, 3.0, 1e-5, rows_per_group=10, mean_rows=4.0, accountant="rdp")
    assert found == compare_samplings(
        people=6000,
        rows_per_person=10,
        sample_rate=60 / 6000,
        steps=settings.steps,
        delta=1e-5,
        target_epsilon=3.0,
        mean_rows=4.0,
        accountant="rdp",
    )
    assert found.by_person.epsilon == pytest.approx(3.0, rel=1e-3)
    # As the settings' own noise, but for calibration and the accountant.
    assert found.by_person.noise_multiplier == pytest.approx(settings.noise_multiplier, rel=0.1)


def test_few_rows_of_most_people_speak_for_people_and_full_caps_for_rows() -> None:
    assert suggest_sampling(plan(), 3.0, 1e-5, rows_per_group=20, mean_rows=1.5).better == "person"
    assert suggest_sampling(plan(), 3.0, 1e-5, rows_per_group=4).better == "row"


@pytest.mark.parametrize(
    "options",
    [{"rows_per_group": 0}, {"rows_per_group": 2, "mean_rows": 3.0}, {"mean_rows": -1.0}, {"mean_rows": 0.5}],
    ids=["no rows", "mean above the cap", "negative", "below one"],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        suggest_sampling(plan(), 3.0, 1e-5, **options)  # type: ignore[arg-type]
