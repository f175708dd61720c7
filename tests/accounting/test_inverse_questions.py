"""What the command line answers about an ε: how many epochs, how large a batch."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

from accounting import cli, create_accountant
from accounting.cli import main

COMMON = ["--epsilon", "2", "--delta", "1e-5", "--noise-multiplier", "1.1", "--accountant", "rdp"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, *COMMON]) == 0
    return capsys.readouterr().out


def epsilon(rate: float, steps: int) -> float:
    accountant = create_accountant("rdp")
    accountant.step(noise_multiplier=1.1, sample_rate=rate, steps=steps)
    return float(accountant.get_epsilon(1e-5))


def test_the_epochs_of_an_epsilon_are_the_most_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    printed = answer(capsys, "epochs", "--batch-size", "250", "--dataset-size", "50000")
    steps = int(re.search(r"steps = (\d+)", printed)[1])  # type: ignore[index]
    assert float(re.search(r"epochs = ([\d.]+)", printed)[1]) == pytest.approx(steps * 250 / 50_000)  # type: ignore[index]
    assert epsilon(0.005, steps) <= 2.0 < epsilon(0.005, steps + 1)


def test_the_printed_epochs_are_never_more_than_the_steps_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    above = 0
    for size in (50_021, 51_234):
        printed = answer(capsys, "epochs", "--batch-size", "250", "--dataset-size", str(size))
        steps = int(re.search(r"steps = (\d+)", printed)[1])  # type: ignore[index]
        (epochs,) = re.findall(r"epochs = (\S+)", printed)
        # Both sides exact: six digits, and whole numbers.
        assert Fraction(epochs) <= Fraction(steps * 250, size)
        assert float(epochs) == pytest.approx(steps * 250 / size, rel=1e-5)
        above += Fraction(f"{steps * 250 / size:.6g}") > Fraction(steps * 250, size)
    # Rounded to the nearest, some would be more.
    assert above > 0


@pytest.mark.parametrize(
    "arguments",
    [["--noise-multiplier", "100", "--batch-size", "256"], ["--noise-multiplier", "1.1", "--batch-size", "2.5"]],
    ids=["much noise", "small batches"],
)
def test_the_search_for_steps_ends_and_says_where(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "calibrate_steps", lambda **given: pytest.fail("it searches"))
    assert main(["epochs", "--epsilon", "2", "--delta", "1e-5", "--dataset-size", "60000", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "steps = 1000000 (more would fit" in printed
    assert float(re.search(r"epsilon = ([\d.]+)", printed)[1]) <= 2.0  # type: ignore[index]


def test_the_batch_of_an_epsilon_is_the_largest_that_fits_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    printed = answer(capsys, "batch", "--steps", "500", "--dataset-size", "50000")
    batch = int(re.search(r"batch size = (\d+)", printed)[1])  # type: ignore[index]
    assert epsilon(batch / 50_000, 500) <= 2.0 < epsilon((batch + 1) / 50_000, 500)


def test_the_batch_of_an_epsilon_is_the_largest_that_fits_so_many_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    printed = answer(capsys, "batch", "--epochs", "5", "--dataset-size", "50000")
    batch, steps = map(int, re.search(r"batch size = (\d+) \(.*, (\d+) steps", printed).groups())  # type: ignore[union-attr]
    assert steps == -(-5 * 50_000 // batch)
    assert epsilon(batch / 50_000, steps) <= 2.0
    # A step less may make up for a row more: two rows do not hide in it.
    assert epsilon((batch + 20) / 50_000, -(-5 * 50_000 // (batch + 20))) > 2.0


@pytest.mark.parametrize(
    "arguments",
    [
        ["epochs", "--batch-size", "20", "--dataset-size", "10"],
        ["epochs", "--batch-size", "0", "--dataset-size", "10"],
        ["batch", "--dataset-size", "100"],
        ["batch", "--dataset-size", "100", "--steps", "3", "--epochs", "1"],
        ["batch", "--dataset-size", "0", "--steps", "3"],
        ["batch", "--dataset-size", "100", "--epochs", "-1"],
        ["batch", "--dataset-size", "10", "--steps", "1000000"],
        ["epochs", "--batch-size", "20", "--dataset-size", "inf"],
        ["epochs", "--batch-size", "nan", "--dataset-size", "10"],
        ["batch", "--dataset-size", "100", "--steps", "3", "--epsilon", "nan"],
        ["batch", "--dataset-size", "100", "--steps", "3", "--epsilon", "0"],
        ["batch", "--dataset-size", "100", "--epochs", "1e308"],
    ],
    ids=[
        *("batch above data", "no batch", "no length", "two lengths", "no data", "negative epochs", "no batch fits"),
        *("endless data", "batch of no number", "epsilon of no number", "no epsilon", "endless epochs"),
    ],
)
def test_questions_without_an_answer_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([arguments[0], *COMMON, *arguments[1:]]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["epochs", "--batch-size", "250", "--dataset-size", "50000"],
        ["batch", "--steps", "500", "--dataset-size", "50000"],
        ["batch", "--epochs", "3", "--dataset-size", "50000"],
    ],
    ids=" ".join,
)
def test_the_answer_is_for_the_rows_of_a_person_that_were_asked_about(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *COMMON, "--noise-multiplier", "6", "--group-size", "4"]) == 0
    printed = capsys.readouterr().out
    if arguments[0] == "batch":
        found = re.search(r"sample rate (\S+), (\d+) steps", printed)
        rate, steps = float(found[1]), int(found[2])  # type: ignore[index]
    else:
        rate, steps = 0.005, int(re.search(r"steps = (\d+)", printed)[1])  # type: ignore[index]
    accountant = create_accountant("rdp")
    accountant.step(noise_multiplier=6.0, sample_rate=rate, steps=steps)
    # The printed rate has six digits.
    assert float(accountant.get_epsilon(1e-5, group_size=4)) <= 2.0 * (1 + 1e-5)
    assert "for a person with up to 4 rows" in printed
