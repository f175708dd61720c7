"""Calibration stays on the safe side, close to the target; the command line prints safe figures."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from accounting import (
    ADD_OR_REMOVE_ONE,
    REPLACE_ONE,
    GaussianRelease,
    GaussianStep,
    InvalidParameterError,
    Ledger,
    PoissonSampling,
    Provenance,
    UnreachableTargetError,
    calibrate_ledger,
    calibrate_noise_multiplier,
    calibrate_sample_rate,
    calibrate_steps,
    create_accountant,
)
from accounting.cli import main


def epsilon(kind, sigma, q, n, delta, relation=ADD_OR_REMOVE_ONE):
    accountant = create_accountant(kind, relation=relation)
    accountant.step(noise_multiplier=sigma, sample_rate=q, steps=n)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("relation", [ADD_OR_REMOVE_ONE, REPLACE_ONE])
@pytest.mark.parametrize("kind", ["prv", "rdp"])
@pytest.mark.parametrize("target", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("q", [0.01, 1.0])
def test_calibrated_noise_is_safe_and_within_a_thousandth(kind, target, q, relation):
    sigma = calibrate_noise_multiplier(
        target_epsilon=target, delta=1e-5, sample_rate=q, steps=200, accountant=kind, relation=relation
    )
    assert epsilon(kind, sigma, q, 200, 1e-5, relation) <= target
    assert epsilon(kind, sigma * 0.999, q, 200, 1e-5, relation) > target


def test_calibrated_steps_are_the_most_that_fit():
    steps = calibrate_steps(target_epsilon=2.0, delta=1e-5, noise_multiplier=1.0, sample_rate=0.01)
    assert isinstance(steps, int)
    assert epsilon("prv", 1.0, 0.01, steps, 1e-5) <= 2.0 < epsilon("prv", 1.0, 0.01, steps + 1, 1e-5)


def test_steps_that_were_spent_already_are_deducted_and_left_alone():
    spent = create_accountant("rdp")
    spent.step(noise_multiplier=1.0, sample_rate=0.01, steps=100)
    options = {"target_epsilon": 2.0, "delta": 1e-5, "noise_multiplier": 1.0, "sample_rate": 0.01}
    fresh = calibrate_steps(**options, accountant="rdp")
    assert calibrate_steps(**options, spent=spent) == fresh - 100
    assert len(spent) == 100


def test_a_calibrated_sample_rate_is_the_largest_that_fits():
    q = calibrate_sample_rate(target_epsilon=2.0, delta=1e-5, noise_multiplier=1.0, steps=1000)
    assert epsilon("prv", 1.0, q, 1000, 1e-5) <= 2.0 < epsilon("prv", 1.0, 1.001 * q, 1000, 1e-5)
    assert calibrate_sample_rate(target_epsilon=50.0, delta=1e-5, noise_multiplier=5.0, steps=1) == 1.0


def test_a_mixed_plan_is_scaled_by_one_factor():
    plan = Ledger()
    plan.append(GaussianStep(1.0, PoissonSampling(0.02)), 300)
    plan.append(GaussianStep(2.0, PoissonSampling(0.01)), 300)
    plan.append(GaussianRelease(8.0))
    factor, scaled = calibrate_ledger(plan, target_epsilon=1.5, delta=1e-6)
    assert [event.noise_multiplier for event, _ in scaled] == [factor, 2.0 * factor, 8.0 * factor]
    for ledger, meets in ((scaled, True), (scaled.scaled(0.999), False)):
        accountant = create_accountant("auto")
        accountant.ledger = ledger
        assert (accountant.get_epsilon(1e-6) <= 1.5) is meets


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_targets_that_mean_nothing_are_refused(target):
    with pytest.raises(InvalidParameterError, match="target_epsilon"):
        calibrate_noise_multiplier(target_epsilon=target, delta=1e-5, sample_rate=0.1, steps=1)


def test_fractional_steps_are_refused_instead_of_cut():
    with pytest.raises(InvalidParameterError, match="round up"):
        calibrate_noise_multiplier(target_epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=10.5)


def test_targets_out_of_reach_are_named():
    with pytest.raises(UnreachableTargetError, match="fewer steps"):
        calibrate_noise_multiplier(target_epsilon=1e-9, delta=1e-12, sample_rate=1.0, steps=10**9)
    with pytest.raises(UnreachableTargetError, match="more noise"):
        calibrate_steps(target_epsilon=0.1, delta=1e-5, noise_multiplier=0.5, sample_rate=1.0)


def run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


SCHEDULE = ("--noise-multiplier", "1", "--sample-rate", "0.01", "--steps", "1000")


def test_the_command_line_prints_an_epsilon_that_is_not_rounded_down(capsys):
    status, out, _ = run(capsys, "epsilon", *SCHEDULE, "--delta", "1e-5")
    value = float(re.search(r"epsilon = (\S+)", out).group(1))
    assert status == 0
    assert epsilon("auto", 1.0, 0.01, 1000, 1e-5) <= value < 1.83


def test_the_command_line_prints_noise_that_suffices_as_printed(capsys):
    status, out, _ = run(
        capsys, "noise", "--epsilon", "2", "--delta", "1e-5", "--sample-rate", "0.01", "--steps", "1000"
    )
    assert status == 0
    assert epsilon("auto", float(re.search(r"multiplier = (\S+)", out).group(1)), 0.01, 1000, 1e-5) <= 2.0


def test_the_command_line_answers_steps_curves_and_ledgers(capsys, tmp_path):
    status, out, _ = run(
        capsys, "steps", "--epsilon", "2", "--delta", "1e-5", "--sample-rate", "0.01", "--noise-multiplier", "1"
    )
    assert (status, out.startswith("steps = ")) == (0, True)
    status, out, _ = run(capsys, "curve", *SCHEDULE, "--accountant", "rdp", "--deltas", "1e-5", "1e-6")
    assert (status, out.count("epsilon =")) == (0, 2)
    ledger = Ledger()
    ledger.append(GaussianStep(1.0, PoissonSampling(0.01)), 10)
    ledger.save(tmp_path / "ledger.json")
    status, out, _ = run(capsys, "explain", str(tmp_path / "ledger.json"), "--delta", "1e-5")
    assert status == 0
    assert "gaussian_step" in out
    assert "engine" in out
    both = Ledger()
    both.append(GaussianStep(1.0, PoissonSampling(0.01)), 10, Provenance("a"))
    both.append(GaussianStep(1.0, PoissonSampling(0.01)), 5, Provenance("b"))
    both.save(tmp_path / "both.json")
    files = [str(tmp_path / name) for name in ("ledger.json", "both.json", "both.json")]
    status, out, _ = run(capsys, "explain", *files, "--delta", "1e-5")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if "gaussian_step" in line] == ["10", "10", "5"]


def test_the_command_line_says_what_is_wrong(capsys, tmp_path):
    status, _, err = run(capsys, "epsilon", "--noise-multiplier", "0", *SCHEDULE[2:], "--delta", "1e-5")
    assert (status, "noise_multiplier" in err) == (2, True)
    status, _, err = run(capsys, "epsilon", "--delta", "1e-5")
    assert (status, "--noise-multiplier" in err) == (2, True)
    (tmp_path / "cut.json").write_text('{"format": "accounting.led')
    status, _, err = run(capsys, "explain", str(tmp_path / "cut.json"))
    assert (status, "truncated" in err) == (2, True)
    status, _, err = run(capsys, "explain", str(tmp_path / "none.json"))
    assert (status, "none.json" in err) == (2, True)


def test_the_package_needs_neither_torch_nor_the_training_package():
    code = "import sys, accounting; print(sorted({'torch', 'clipless_dp', 'opacus'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
