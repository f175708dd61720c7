"""A warning points at the line of the user's code that led to it, through however many calls of this package."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from accounting import LargeDeltaWarning, RDPAccountant
from clipless_dp import CliplessDPOptimizer, CliplessDPSGD, PrivacyWarning, fit, optim
from clipless_dp.cli import main
from tests.support import gated_model, samples


def line_of(thing: Callable[[], object]) -> tuple[str, int]:
    """The file and the only line of a function."""
    code = thing.__code__
    return code.co_filename, max(line for _, _, line in code.co_lines() if line is not None)


def private(kind: str = "plain") -> CliplessDPOptimizer:
    settings: dict[str, Any] = {
        "noise_multiplier": 1.0,
        "sample_rate": 0.5,
        "dataset_size": 100,
        "accountant": RDPAccountant(dataset_size=100),
    }
    model = gated_model()
    if kind == "plain":
        optimizer: CliplessDPOptimizer = CliplessDPSGD(model, lr=0.1, **settings)
    else:
        optimizer = CliplessDPOptimizer(model, torch.optim.Adam(model.net.parameters()), **settings)
    if kind == "scheduled":
        # Replaces step by a wrapper of torch's own.
        LambdaLR(optimizer, lambda step: 1.0)
    return optimizer


def closure_of(optimizer: CliplessDPOptimizer) -> Callable[[], float]:
    inputs, targets = samples(4)

    def closure() -> float:
        loss = optimizer.model.loss(optimizer.model(inputs), targets)
        loss.backward()
        return float(loss.detach())

    return closure


@pytest.mark.parametrize("kind", ["plain", "adam", "scheduled"])
def test_a_step_that_is_charged_in_full_warns_at_the_line_of_the_step(kind: str) -> None:
    optimizer = private(kind)
    closure_of(optimizer)()
    step = lambda: optimizer.step()  # noqa: E731
    with pytest.warns(PrivacyWarning, match="q = 1") as warned:
        step()
    assert [(one.filename, one.lineno) for one in warned] == [line_of(step)]
    step = lambda: optimizer.step(closure_of(optimizer))  # noqa: E731
    with pytest.warns(PrivacyWarning, match="q = 1") as warned:
        step()
    assert [(one.filename, one.lineno) for one in warned] == [line_of(step)]


def test_fit_warns_at_the_line_of_its_call_whatever_part_of_it_warns() -> None:
    model, (inputs, targets) = gated_model(), samples(60)
    settings: dict[str, Any] = {"epsilon": 4.0, "epochs": 1, "batch_size": 20, "progress": False, "accountant": "rdp"}
    fit(model, (inputs, targets), delta=1e-3, **settings)
    # None of these is drawn with a probability of (1 - 1/3)^(3·59) < 1e-30.
    targets[1:] = 7
    call = lambda: fit(model, (inputs, targets), delta=0.1, **settings)  # noqa: E731
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        call()
    messages = {one.category: str(one.message) for one in warned}
    assert "contributed nothing" in messages[UserWarning]
    assert "another optimizer" in messages[PrivacyWarning]
    assert "publishing one record" in messages[LargeDeltaWarning]
    assert {(one.filename, one.lineno) for one in warned} == {line_of(call)}


def test_an_accountant_warns_at_the_line_that_asked_directly_or_through_an_optimizer() -> None:
    optimizer = private()
    for ask in (lambda: optimizer.accountant.get_epsilon(0.1), lambda: optimizer.get_epsilon(0.1)):
        with pytest.warns(LargeDeltaWarning) as warned:
            ask()
        assert [(one.filename, one.lineno) for one in warned] == [line_of(ask)]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    pytest.importorskip("sklearn")
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(80, 5))
    np.savez(tmp_path / "table.npz", X=inputs, y=(inputs[:, 0] > 0).astype(np.int64))
    return [
        "train", "--dataset", str(tmp_path / "table.npz"), "--classes", "2", "--epsilon", "3", "--delta", "0.1",
        "--epochs", "1", "--batch-size", "40", "--accountant", "rdp", "--audit", "off", "--quiet",
    ]  # fmt: skip


def test_the_command_line_warns_at_the_line_that_called_it(arguments: list[str]) -> None:
    call = lambda: main(arguments)  # noqa: E731
    with pytest.warns(LargeDeltaWarning) as warned:
        call()
    assert {(one.filename, one.lineno) for one in warned} == {line_of(call)}


@pytest.mark.slow
def test_the_command_line_by_itself_warns_at_its_entry(arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "clipless_dp", *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    assert "__main__.py" in run.stderr
    assert "LargeDeltaWarning" in run.stderr


def test_warnings_that_are_errors_stop_a_step_and_the_filter_of_a_module_is_the_users_own() -> None:
    optimizer = private()
    closure_of(optimizer)()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=PrivacyWarning, module=__name__.replace(".", r"\."))
        with pytest.raises(PrivacyWarning):
            optimizer.step()
    assert optimizer.steps_taken == 0


def test_older_pickles_find_the_kind_of_warning_where_it_was() -> None:
    assert optim.PrivacyWarning is PrivacyWarning
