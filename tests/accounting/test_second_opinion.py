from __future__ import annotations

import importlib.metadata
import sys

import pytest

from accounting import (
    REPLACE_ONE,
    AutoAccountant,
    GaussianRelease,
    GaussianStep,
    GaussianVectorStep,
    InvalidParameterError,
    LaplaceRelease,
    Ledger,
    NoSampling,
    Opinion,
    PoissonSampling,
    PrivacyBound,
    SecondOpinion,
    ShuffledEpoch,
    second_opinion,
)
from accounting.cli import main
from accounting.second_opinion import _known


def ledger(*entries: object) -> Ledger:
    made = Ledger()
    for event, count in entries:  # type: ignore[misc]
        made.append(event, count)
    return made


TRAINED = ledger(
    (GaussianRelease(10.0), 1),
    (GaussianStep(1.1, PoissonSampling(0.02)), 400),
    (GaussianVectorStep((3.0, 3.0), PoissonSampling(0.02)), 100),
    (GaussianStep(20.0, NoSampling()), 1),
    (ShuffledEpoch(15.0), 1),
)


def test_three_accountants_that_share_no_code_agree_about_a_training_run() -> None:
    found = second_opinion(TRAINED, 1e-5)
    renyi, opacus, microsoft = found.opinions
    assert not found.contradicted
    # Each is to within 0.01; Rényi accounting is looser.
    assert abs(opacus.upper - found.epsilon) < 0.025
    assert microsoft.lower < found.epsilon < microsoft.upper
    assert microsoft.upper - microsoft.lower < 0.05
    assert 1.0 < renyi.upper / found.epsilon < 1.3
    shown = str(found)
    assert shown.count("opacus") == 2
    assert "contradict" not in shown


def test_every_kind_of_event_is_part_of_what_they_are_asked() -> None:
    steps, scales, unknown = _known(TRAINED)
    # Two parts of σ = 3 are one of 3/√2.
    (vector,) = (key for key in steps if abs(key[0] - 3.0 / 2.0**0.5) < 1e-12)
    assert steps == {(10.0, 1.0): 1, (1.1, 0.02): 400, vector: 100, (20.0, 1.0): 1, (15.0, 1.0): 1}
    assert vector[1] == 0.02
    assert not scales
    assert not unknown


def test_laplace_noise_is_known_to_one_of_them() -> None:
    found = second_opinion(ledger((LaplaceRelease(2.0), 1), (GaussianStep(5.0), 3)), 1e-5)
    *opacus, microsoft = found.opinions
    assert all(one.upper is None and "Laplace noise of scale 2" in one.note for one in opacus)
    assert microsoft.lower <= found.epsilon <= microsoft.upper + 0.01


def test_what_they_do_not_know_is_said_and_not_asked() -> None:
    made = Ledger(REPLACE_ONE)
    made.append(GaussianStep(2.0), 3)
    assert all(one.upper is None and REPLACE_ONE in one.note for one in second_opinion(made, 1e-5).opinions)


def test_a_package_that_is_not_installed_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert all("pip install" in one.note for one in second_opinion(TRAINED, 1e-5).opinions)


def test_bounds_that_cannot_both_be_right_are_a_contradiction_in_words() -> None:
    for contradicting in (
        SecondOpinion(1.0, 1e-5, (Opinion("another", 1.1, 1.2, ""),)),
        SecondOpinion(1.0, 1e-5, (Opinion("another", None, 0.8, ""),), lower=0.9),
    ):
        assert contradicting.contradicted
        assert "contradict" in str(contradicting)
    for agreeing in (
        SecondOpinion(1.0, 1e-5, (Opinion("another", 0.9, 1.2, ""),), lower=0.99),
        SecondOpinion(1.0, 1e-5, (Opinion("another", None, None, ""),), lower=0.99),
    ):
        assert not agreeing.contradicted
        assert "contradict" not in str(agreeing)


@pytest.mark.parametrize("factor", [0.05, 0.97])
def test_an_epsilon_that_is_too_small_is_noticed_by_opacus_alone(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ledger((GaussianStep(1.0, PoissonSampling(0.01)), 1000))
    version, tight = importlib.metadata.version, AutoAccountant.get_epsilon

    def opacus_only(name: str) -> str:
        if name != "opacus":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", opacus_only)
    monkeypatch.setattr(AutoAccountant, "get_epsilon", lambda self, delta: PrivacyBound(factor * tight(self, delta)))
    assert second_opinion(made, 1e-5).contradicted


def test_the_lower_bound_of_opacus_is_that_of_the_code_it_comes_from() -> None:
    _, opacus, microsoft = second_opinion(ledger((GaussianStep(1.0, PoissonSampling(0.01)), 1000)), 1e-5).opinions
    # The same grid; both integrate numerically.
    assert opacus.lower == pytest.approx(microsoft.lower, abs=1e-6)
    assert opacus.upper == pytest.approx(microsoft.upper, abs=1e-6)


def test_it_is_said_where_nobody_could_notice_an_epsilon_that_is_too_small() -> None:
    # Numerical accountants refuse so small a delta.
    found = second_opinion(ledger((GaussianStep(1.0, PoissonSampling(0.01)), 1000)), 1e-14)
    assert found.opinions[0].upper is not None
    assert not found.checked
    assert "could not be checked" in str(found)
    assert "could not be checked" not in str(second_opinion(ledger((GaussianStep(5.0), 1)), 1e-5))


def test_no_opinion_is_negative() -> None:
    found = second_opinion(ledger((GaussianStep(6.0, PoissonSampling(0.1)), 12)), 0.4)
    assert all(opinion.upper == 0.0 and (opinion.lower or 0.0) == 0.0 for opinion in found.opinions)
    assert not found.contradicted


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ((), "nothing was released"),
        (tuple((GaussianStep(1.0 + k, PoissonSampling(0.01)), 3) for k in range(31)), "31 different events"),
        (((GaussianStep(0.5, PoissonSampling(0.5)), 1000),), "too long for it"),
        (((LaplaceRelease(0.01), 1000),), "too long for it"),
    ],
    ids=["nothing", "phases", "steps", "Laplace"],
)
def test_others_are_not_asked_what_would_take_them_minutes_and_gigabytes(
    entries: tuple[object, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: object) -> None:
        raise SystemExit("was asked")

    for name in ("_opacus_prv", "_prv_accountant"):
        monkeypatch.setattr(sys.modules[second_opinion.__module__], name, asked)
    found = second_opinion(ledger(*entries), 1e-5)
    assert words in found.opinions[-1].note
    assert all(opinion.upper is None for opinion in found.opinions[1:])


def test_delta_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="delta"):
        second_opinion(TRAINED, 2.0)


def test_the_command_line_asks_them_too(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "ledger.json"
    ledger((GaussianStep(5.0), 1)).save(path)
    assert main(["explain", str(path), "--delta", "1e-5", "--second-opinion"]) == 0
    assert "prv-accountant" in capsys.readouterr().out
    assert main(["explain", str(path), "--group-size", "2", "--second-opinion"]) == 2
    assert "no groups" in capsys.readouterr().err
