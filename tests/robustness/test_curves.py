"""Curves, fronts and abstention say what their samples say."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import beta
from torch import Tensor

from clipless_dp import ConfigurationError, InputError
from clipless_dp.robustness import Attacked, Certificate, Curve, abstain, attacks, certify, curve, pareto
from tests.robustness.nets import NETWORKS, points, seeded, wrapped

QUICK = (attacks.PGD(steps=10, restarts=1), attacks.DeepFool(steps=8))


def certificate_of(radii: list[float], right: list[bool]) -> Certificate:
    labels = torch.zeros(len(radii), dtype=torch.int64)
    return Certificate(
        torch.tensor(radii, dtype=torch.float64), torch.tensor([0 if hit else 1 for hit in right]), labels
    )


def test_a_curve_of_results_that_are_there() -> None:
    certificate = certificate_of([0.0, 0.3, 0.6, 0.9], [True, True, True, False])
    attacked = Attacked(torch.tensor([0.1, 0.4, math.inf, 0.0]).double(), torch.zeros(4, 1), ("",) * 4, torch.zeros(4))
    found = Curve.of(certificate, attacked, (0.0, 0.25, 0.5), level=0.9)
    assert [point.certified.value for point in found.points] == [0.5, 0.5, 0.25]
    assert [point.attacked.value for point in found.points if point.attacked] == [0.75, 0.5, 0.25]
    assert found.clean.value == 0.75
    assert found.average_radius == pytest.approx(0.9 / 4)
    share = found.points[0].certified
    # Clopper and Pearson's: quantiles of two beta distributions.
    assert share.low == pytest.approx(beta.ppf(0.05, 2, 3))
    assert share.high == pytest.approx(beta.ppf(0.95, 3, 2))
    assert "25.00" in str(found)


def test_certified_below_attacked_at_every_radius_of_a_model() -> None:
    model = seeded(NETWORKS["orthogonal"]).double()
    inputs = points(40, 5)
    labels = certify(model, inputs).predictions
    labels[:4] = (labels[:4] + 1) % 3
    found = curve(model, (inputs, labels), (0.0, 0.1, 0.3, 1.0), QUICK)
    for point in found.points:
        assert point.attacked is not None
        assert point.certified.value <= point.attacked.value
        assert point.certified.low <= point.certified.value <= point.certified.high
    assert found.clean.value == 0.9
    some = curve(model, (inputs, labels), (0.0, 0.1), QUICK, attacked_samples=10)
    assert some.attacked is not None
    assert len(some.attacked.distances) == 10
    alone = curve(model, (inputs, labels), (0.0, 0.1), ())
    assert alone.points[0].attacked is None
    assert "–" in str(alone)


def test_curves_and_fronts_are_drawn_and_missing_matplotlib_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    certificate = certificate_of([0.2, 0.4], [True, True])
    attacked = Attacked(torch.tensor([0.3, 0.5]).double(), torch.zeros(2, 1), ("", ""), torch.zeros(2))
    Curve.of(certificate, attacked).plot(tmp_path / "curve.png")
    pareto({"a": certificate}, 0.1).plot(tmp_path / "front.svg")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "front.svg").read_text("utf-8")
    real = builtins.__import__

    def lacking(name: str, *others: object, **named: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *others, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(ConfigurationError, match=r"clipless-dp\[plot\]"):
        Curve.of(certificate, None).plot()


def test_a_front_names_what_nothing_beats() -> None:
    found = pareto(
        {
            "accurate": certificate_of([0.1, 0.1, 0.1, 0.9], [True] * 4),
            "robust": certificate_of([0.9, 0.9, 0.9, 0.0], [True, True, True, False]),
            "beaten": certificate_of([0.1, 0.1, 0.9, 0.0], [True, True, True, False]),
            "twin": certificate_of([0.9, 0.8, 0.9, 0.0], [True, True, True, False]),
        },
        0.5,
    )
    assert {point.name: point.efficient for point in found.points} == {
        "accurate": True,
        "robust": True,
        "beaten": False,
        "twin": True,
    }
    assert found.points[0].name == "accurate"
    assert "beaten" in str(found)
    with pytest.raises(ConfigurationError):
        pareto({}, 0.5)


def test_an_abstaining_classifier_never_answers_two_ways_within_its_radius() -> None:
    model = seeded(NETWORKS["residual"]).double()
    inputs = points(60, 5)
    radius = float(certify(model, inputs).radii.median())
    careful = abstain(model, radius)
    answers = careful.predict(inputs)
    assert 0.3 < float((answers >= 0).double().mean()) < 0.7
    directions: Tensor = points(60, 5, seed=4)
    for _ in range(5):
        moved = inputs + 0.999 * radius * directions / directions.norm(dim=1, keepdim=True)
        others = careful.predict(moved)
        both = (answers >= 0) & (others >= 0)
        assert torch.equal(answers[both], others[both])
        directions = directions.roll(1, 0)
    labels = certify(model, inputs).predictions
    labels[0] = (labels[0] + 1) % 4
    told = careful.evaluate((inputs, labels))
    assert told.answered == float((answers >= 0).double().mean())
    assert told.correct == pytest.approx(float((answers == labels).double().mean()))
    assert told.accuracy == pytest.approx(told.correct / told.answered)
    assert math.isnan(abstain(model, 1e9).evaluate((inputs, labels)).accuracy)


def test_a_front_of_different_samples_labels_or_units_is_refused() -> None:
    model, inputs = seeded(NETWORKS["orthogonal"]).double(), points(12, 5)
    labels = torch.arange(12) % 3
    own = certify(model, (inputs, labels))
    others = {
        "fewer": certify(model, (inputs[:3], labels[:3])),
        "other labels": certify(model, (inputs, labels.roll(1))),
        "other inputs": certify(model, (inputs.roll(3, 0), labels)),
        "other units": certify(model, (inputs, labels), units=0.5),
    }
    for name, other in others.items():
        with pytest.raises(InputError, match="different samples"):
            pareto({"own": own, name: other}, 0.1)
    twin = certify(seeded(NETWORKS["wide"]).double(), (inputs, labels))
    assert len(pareto({"own": own, "twin": twin}, 0.1).points) == 2


def test_a_description_says_units_front_score_error_and_input_norm_and_its_digest_covers_them() -> None:
    layer = torch.nn.Linear(5, 3).double()
    data = points(8, 5), torch.arange(8) % 3
    front = torch.nn.Linear(5, 5).double()
    model = wrapped(layer, (5,), input_norm=3.0)
    plain = curve(model, data, (0.0, 0.1), ()).described("public samples")
    assert (plain["units"], plain["front"], plain["score_error"], plain["input_norm"]) == (None, None, 0.0, 3.0)
    told = curve(
        model, data, (0.0, 0.1), (), units=(0.1, 0.2, 0.3, 0.4, 0.5), score_error=1e-3, front=front, front_lipschitz=9.0
    ).described("public samples")
    assert told["units"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert told["score_error"] == 1e-3
    text = "\n".join(told["assumptions"])
    for words in ("raw units", "5 channels from 0.1 to 0.5", "at most 0.001", told["front"][:16], "norm 3"):
        assert words in text
    assert told["weights"] == plain["weights"]
    other = curve(wrapped(layer, (5,), input_norm=1.0), data, (0.0, 0.1), ()).described("public samples")
    with torch.no_grad():
        front.weight.mul_(2.0)
    turned = curve(model, data, (0.0, 0.1), (), front=front, front_lipschitz=9.0).described("public samples")
    assert len({plain["digest"], told["digest"], other["digest"], turned["digest"]}) == 4


def test_arguments_of_curves_and_abstention_that_do_not_fit_are_refused_at_once() -> None:
    model, inputs = seeded(NETWORKS["orthogonal"]).double(), points(4, 5)
    labels = torch.zeros(4, dtype=torch.int64)
    for chosen in (QUICK, ()):
        with pytest.raises(InputError, match="labels"):
            curve(model, inputs, attacks=chosen)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="labels must be classes"):
            curve(model, (inputs, labels - 1), attacks=chosen)
        with pytest.raises(ConfigurationError, match="radii"):
            curve(model, (inputs, labels), radii=["0.1"], attacks=chosen)  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match="'unit'"):
        abstain(model, 0.1, unit=3)


def test_what_does_not_fit_is_refused() -> None:
    certificate = certificate_of([0.1], [True])
    for level in (0.0, 1.0, 2.0):
        with pytest.raises(ConfigurationError):
            Curve.of(certificate, None, level=level)
    with pytest.raises(ConfigurationError):
        Curve.of(certificate, None, (-0.1,))
    with pytest.raises(ConfigurationError):
        abstain(seeded(NETWORKS["wide"]), -1.0)
    with pytest.raises(InputError):
        Curve.of(Certificate(torch.zeros(1).double(), torch.zeros(1)), None)
