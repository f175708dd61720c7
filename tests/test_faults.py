"""Kills, full disks, damaged files, exhausted budgets: nothing is lost, and nothing is released that is not counted."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from accounting import Ledger, create_accountant
from clipless_dp import (
    BudgetExhaustedError,
    CheckpointError,
    CliplessDPOptimizer,
    CliplessDPSGD,
    ConfigurationError,
    PoissonBatches,
    PrivacyError,
    fit,
)
from clipless_dp import checkpoint as checkpoint_module
from clipless_dp.checkpoint import discard_partial, load_checkpoint, save_checkpoint
from clipless_dp.noise import SystemNoise
from clipless_dp.search import Candidate, private_search
from clipless_dp.training import Watcher, loop, watched_by

from .support import before_steps, gated_model, power_cut, samples

RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 3, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp"}
SCRIPT = Path(__file__).with_name("kill_runs.py")


def killed(folder, *arguments):
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def require_nothing_uncounted(seen, kills):
    assert seen["kills"] == kills
    assert seen["uncounted"] == 0, "results were shown that the ledger does not count"
    assert seen["went_back"] == 0, "the ledger lost steps"
    assert seen["litter"] == []
    assert seen["final"] == 72


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_as_if_it_had_not_been_killed(tmp_path):
    seen = killed(tmp_path, "--kills", 2)
    require_nothing_uncounted(seen, 2)
    assert seen["equal"]
    # Six steps are an epoch: what came after the last checkpoint.
    assert max(seen["lost"]) <= 7


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "every"), [("reproducible", 1), ("reproducible", 3), ("system", 1), ("system", 3)])
def test_dozens_of_kills_lose_nothing_that_was_released(tmp_path, noise, every):
    seen = killed(tmp_path, "--kills", 20, "--noise", noise, "--every", every)
    require_nothing_uncounted(seen, 20)
    assert seen["equal"] == (noise == "reproducible"), "noise is drawn anew, and only then do weights differ"
    assert max(seen["lost"]) <= 6 * every + 1


def content():
    ledger = {"format": 1, "steps_taken": 3, "counted": {"a": 3}, "entries": [["gaussian", 1.0, 3]]}
    return {"model": {"weight": torch.arange(12.0).view(3, 4)}, "optimizer": {"clipless_dp": ledger}}


def test_a_checkpoint_cut_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, content())
    data = path.read_bytes()
    cuts = {len(data) * share // 20 for share in range(20)} | {1, len(data) - 1, len(data) - 83, len(data) - 84}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"run\.pt"):
            load_checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match=r"run\.pt"):
        load_checkpoint(path)


def test_any_flipped_byte_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, content())
    data = bytearray(path.read_bytes())
    for index in range(0, len(data), 7):
        data[index] ^= 1 << (index % 8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"run\.pt"):
            load_checkpoint(path)
        data[index] ^= 1 << (index % 8)
    path.write_bytes(data)
    assert torch.equal(load_checkpoint(path)["model"]["weight"], content()["model"]["weight"])


def test_torch_alone_would_not_notice_a_flipped_byte_in_a_ledger(tmp_path):
    """Why checkpoints carry a digest of their own."""
    path = tmp_path / "plain.pt"
    torch.save(content(), path)
    data = path.read_bytes()
    place = data.index(b"steps_taken") + len(b"steps_taken")
    place = data.index(b"K\x03", place) + 1  # The pickled integer 3.
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    assert torch.load(path, weights_only=True)["optimizer"]["clipless_dp"]["steps_taken"] == 1


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "run.pt"
    torch.save({"format": checkpoint_module.CHECKPOINT_FORMAT, "model": Bomb()}, path)
    data = path.read_bytes()
    path.write_bytes(data + checkpoint_module._seal(data))
    with pytest.raises(CheckpointError, match=r"run\.pt"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_grows_beyond_the_disk_leaves_the_old_checkpoint(tmp_path):
    """With the system's own refusal: a limit on the size of files cuts the write in the middle."""
    path = tmp_path / "run.pt"
    save_checkpoint(path, content())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(CheckpointError, match=r"run\.pt could not be written"):
            save_checkpoint(path, content())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_read_only_folder_is_refused_by_name(tmp_path):
    tmp_path.chmod(0o500)
    user = os.geteuid()
    try:
        if user == 0:  # Root writes anywhere.
            os.seteuid(65534)
        with pytest.raises(CheckpointError, match=r"run\.pt"):
            checkpoint_module.check_writable(tmp_path / "run.pt")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


def test_parts_left_by_a_killed_writer_are_removed_and_nothing_else(tmp_path):
    for name in (".run[1].pt.abc.partial", ".run1.pt.abc.partial", "run[1].pt", ".other.pt.abc.partial"):
        (tmp_path / name).touch()
    discard_partial(tmp_path / "run[1].pt")
    kept = [".other.pt.abc.partial", ".run1.pt.abc.partial", "run[1].pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_results_are_shown_only_after_the_checkpoint_that_counts_them(tmp_path):
    shown = []

    class Showing(Watcher):
        def before_showing(self, run):
            on_disk = load_checkpoint(tmp_path / "run.pt")["optimizer"]["clipless_dp"]["steps_taken"]
            shown.append((run.history[-1].step, on_disk))

    with watched_by(Showing()):
        fit(gated_model(), samples(300), checkpoint=tmp_path / "run.pt", checkpoint_every=2, **RUN)
    assert shown == [(12, 12), (18, 18)]


def test_a_second_run_on_the_same_checkpoint_stops_the_first(tmp_path):
    path = tmp_path / "run.pt"
    others = []

    def interfering(run):
        if run.step == 8 and not others:
            others.append(True)
            save_checkpoint(path, {"another": "run"})

    with before_steps(interfering), pytest.raises(PrivacyError, match="another process"):
        fit(gated_model(), samples(300), checkpoint=path, **RUN)
    assert load_checkpoint(path)["another"] == "run"


def step(optimizer, batch):
    inputs, targets, mask = batch
    optimizer.zero_grad()
    optimizer.model.loss(optimizer.model(inputs), targets, mask).backward()
    optimizer.step()


def private(**options):
    settings = {"noise_multiplier": 2.0, "sample_rate": 0.1, "dataset_size": 500, "accountant": "rdp", **options}
    return CliplessDPSGD(gated_model(), lr=0.1, **settings)


def spend(optimizer, steps):
    """Steps until the budget refuses; how many were taken."""
    for index, batch in enumerate(PoissonBatches(samples(500), sample_rate=0.1, steps=steps)):
        try:
            step(optimizer, batch)
        except BudgetExhaustedError:
            return index
    return steps


def test_training_stops_before_the_budget_is_exceeded_and_at_the_last_step_that_fits():
    optimizer = private(budget=(1.0, 1e-4))
    taken = spend(optimizer, 200)
    assert 5 < taken < 200
    assert optimizer.get_epsilon(1e-4) <= 1.0
    assert len(optimizer.accountant) == taken == optimizer.steps_taken
    optimizer.accountant.step(noise_multiplier=2.0, sample_rate=0.1)
    assert optimizer.get_epsilon(1e-4) > 1.0


def test_a_refused_step_changes_neither_weights_nor_ledger():
    optimizer = private(budget=(1e-3, 1e-4))
    before = [parameter.detach().clone() for parameter in optimizer.model.net.parameters()]
    assert spend(optimizer, 3) == 0
    assert all(map(torch.equal, before, optimizer.model.net.parameters()))
    assert optimizer.accountant.history == []


def test_the_accountant_is_asked_rarely(monkeypatch):
    optimizer = private(budget=(2.0, 1e-4))
    asked, honest = [], type(optimizer.accountant).get_epsilon
    monkeypatch.setattr(type(optimizer.accountant), "get_epsilon", lambda *a: asked.append(1) or honest(*a))
    taken = spend(optimizer, 300)
    assert 50 < taken < 300
    assert len(asked) < 25


def test_a_budget_follows_changes_of_noise_and_steps_of_other_optimizers():
    optimizer = private(budget=(1.0, 1e-4))
    step(optimizer, next(iter(PoissonBatches(samples(500), sample_rate=0.1, steps=1))))
    assert optimizer.allows(10)
    optimizer.noise_multiplier = 1.0
    assert not optimizer.allows(10)
    optimizer.noise_multiplier = 2.0
    # What else is charged to the same ledger counts at once.
    optimizer.accountant.step(noise_multiplier=0.5, sample_rate=0.1, steps=20)
    assert spend(optimizer, 3) == 0


def test_a_loaded_ledger_counts_against_the_budget():
    first = private()
    spend(first, 60)
    second = private(budget=(1.0, 1e-4))
    second.load_state_dict(first.state_dict())
    assert spend(second, 3) == 0


def test_a_run_whose_ledger_holds_more_than_planned_stops_early_and_saves(tmp_path):
    path = tmp_path / "run.pt"

    def spending(run):
        if run.step == 6:
            run.optimizer.accountant.step(noise_multiplier=2.0, sample_rate=50 / 300, steps=2)

    with before_steps(spending), pytest.warns(UserWarning, match="training stops after"):
        result = fit(gated_model(), samples(300), checkpoint=path, **RUN)
    assert result.epsilon <= 4.0
    assert 6 <= result.steps < 18
    assert load_checkpoint(path)["optimizer"]["clipless_dp"]["steps_taken"] == result.steps


@pytest.mark.parametrize(
    "budget", [3.0, (0.0, 1e-5), (1.0, 0.0), (1.0, 1.0), (float("nan"), 1e-5), ("a", "b"), (1, 2, 3)]
)
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ConfigurationError, match="budget"):
        private(budget=budget)


@pytest.mark.parametrize("steps", [-1, 4])
def test_a_state_whose_ledger_holds_fewer_steps_than_were_taken_is_refused_and_nothing_is_forgotten(steps):
    optimizer = private()
    spend(optimizer, 3)
    altered = optimizer.state_dict()
    altered["clipless_dp"]["steps_taken"] = steps
    other = private()
    spend(other, 1)
    with pytest.raises(ConfigurationError, match="altered"):
        other.load_state_dict(altered)
    assert len(other.accountant) == 1


QUICK = {**RUN, "noise_multiplier": 2.0, "epochs": 2}
"""Twelve steps, six an epoch, without calibration."""


class Failing(torch.utils.data.Dataset):
    """A data set that cannot be read any more after so many samples."""

    def __init__(self, allowed, error):
        self.inputs, self.targets = samples(300)
        self.allowed, self.error = allowed, error

    def __len__(self):
        return 300

    def __getitem__(self, index):
        self.allowed -= 1
        if self.allowed < 0:
            raise self.error
        return self.inputs[index], self.targets[index]


class Fault(Exception):
    pass


def counted(path):
    return load_checkpoint(path)["optimizer"]["clipless_dp"]["steps_taken"]


@pytest.mark.parametrize(
    "error", [Fault("unreadable"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
def test_an_error_of_the_data_set_is_raised_as_it_is_and_every_step_before_it_is_counted(tmp_path, error):
    path, model = tmp_path / "run.pt", gated_model()
    with pytest.raises(type(error)) as raised:
        fit(model, Failing(470, error), checkpoint=path, **QUICK)
    assert raised.value is error
    optimizer = error.private_optimizer
    assert 6 < optimizer.steps_taken < 12, "within the second epoch, after whose first there is a checkpoint"
    assert counted(path) == len(optimizer.accountant) == optimizer.steps_taken
    saved = load_checkpoint(path)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.net.state_dict().items())
    result = fit(gated_model(), samples(300), checkpoint=path, **QUICK)
    assert (result.steps, len(result.optimizer.accountant)) == (12, 12)
    assert not result.optimizer.uncounted_changes


def test_without_a_checkpoint_the_ledger_of_an_interrupted_run_goes_with_the_exception():
    model = gated_model()
    with power_cut(4) as raised:
        fit(model, samples(300), **QUICK)
    former = raised.value.private_optimizer
    assert former.accountant.history == [(2.0, 50 / 300, 4)]
    if hasattr(raised.value, "__notes__"):
        assert "4 private steps were taken. No file counts all of them." in raised.value.__notes__[0]
    result = fit(model, samples(300), **{**QUICK, "accountant": former.accountant})
    assert len(result.optimizer.accountant) == 16
    assert not result.optimizer.ledger_is_incomplete()


def test_an_error_before_the_first_step_leaves_nothing_behind(tmp_path):
    with power_cut(0) as raised:
        fit(gated_model(), samples(300), checkpoint=tmp_path / "run.pt", **QUICK)
    assert not hasattr(raised.value, "private_optimizer")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [False, True], ids=["a new ledger", "a ledger that holds its steps already"])
def test_a_run_that_goes_on_hands_on_its_ledger_even_if_it_fails_before_a_step_of_its_own(tmp_path, given):
    path, fault = tmp_path / "run.pt", Fault("unreadable")
    with power_cut(8) as raised:
        fit(gated_model(), samples(300), checkpoint=path, **QUICK)
    ledger = {"accountant": raised.value.private_optimizer.accountant} if given else {}
    model, written = gated_model(), path.read_bytes()
    with pytest.raises(Fault):
        fit(model, Failing(5, fault), checkpoint=path, **{**QUICK, **ledger})
    former = fault.private_optimizer
    assert (former.steps_taken, len(former.accountant)) == (8, 8)
    if hasattr(fault, "__notes__"):
        assert f"8 private steps were taken. {path} counts them." in fault.__notes__[0]
    assert path.read_bytes() == written, "it counts them already"
    # The model holds the weights of these steps.
    result = fit(model, samples(300), **{**QUICK, "accountant": former.accountant})
    assert len(result.optimizer.accountant) == 20
    assert not result.optimizer.ledger_is_incomplete()


HOOKS = {
    "before the charge": (register_optimizer_step_pre_hook, CliplessDPOptimizer),
    "update": (register_optimizer_step_pre_hook, torch.optim.SGD),
    "projection": (register_optimizer_step_post_hook, torch.optim.SGD),
    "after the step": (register_optimizer_step_post_hook, CliplessDPOptimizer),
}
METHODS = {
    "schedule": (torch.optim.lr_scheduler.LambdaLR, "step"),
    "noise": (SystemNoise, "begin_step"),
    "pass": (CliplessDPOptimizer, "accumulate"),
}


@contextmanager
def failing_the_third_time(place):
    times = itertools.count(1)

    def fail():
        if next(times) == 3:
            raise Fault(place)

    if place in HOOKS:
        register, kind = HOOKS[place]
        handle = register(lambda optimizer, *_: fail() if isinstance(optimizer, kind) else None)
        try:
            yield
        finally:
            handle.remove()
        return
    target, name = METHODS[place]
    honest = getattr(target, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, lambda *given, **options: fail() or honest(*given, **options))
        yield


@pytest.mark.parametrize("place", [*HOOKS, *METHODS])
def test_a_step_that_fails_in_the_middle_is_counted_as_soon_as_its_noise_may_be_out(tmp_path, place):
    path = tmp_path / "run.pt"
    with failing_the_third_time(place), pytest.raises(Fault) as raised:
        fit(gated_model(), samples(300), checkpoint=path, **QUICK)
    # A scheduler steps once when it is made, too.
    expected = {"before the charge": 2, "pass": 2, "schedule": 2}.get(place, 3)
    ledger = load_checkpoint(path)["optimizer"]["clipless_dp"]["accountant"]["ledger"]
    assert len(Ledger.from_state_dict(ledger)) == len(raised.value.private_optimizer.accountant) == expected
    result = fit(gated_model(), samples(300), checkpoint=path, **QUICK)
    # Without its noise a step was charged and not taken.
    assert len(result.optimizer.accountant) == 12 + (place == "noise")
    assert not result.optimizer.uncounted_changes


def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("strict", [False, True], ids=["warnings", "warnings are errors"])
def test_a_full_disk_does_not_hide_the_error_that_interrupted_training(tmp_path, monkeypatch, strict):
    path, honest = tmp_path / "run.pt", os.fsync
    monkeypatch.setattr(checkpoint_module.os, "fsync", lambda file: honest(file) if not path.exists() else full(file))
    with warnings.catch_warnings(record=not strict) as seen, power_cut(8) as raised:
        warnings.simplefilter("error" if strict else "always")
        fit(gated_model(), samples(300), checkpoint=path, **QUICK)
    assert counted(path) == 6
    assert raised.value.private_optimizer.steps_taken == 8
    if not strict:
        assert any("interrupted at step 8" in str(warning.message) for warning in seen)


def test_an_interrupted_run_leaves_a_checkpoint_of_another_process_alone(tmp_path):
    path = tmp_path / "run.pt"

    def fault(run):
        if run.step == 8:
            save_checkpoint(path, {"another": "run"})
            raise Fault

    warned = pytest.warns(UserWarning, match="could not be written")
    with before_steps(fault), warned, pytest.raises(Fault) as raised:
        fit(gated_model(), samples(300), checkpoint=path, **QUICK)
    assert load_checkpoint(path)["another"] == "run"
    assert len(raised.value.private_optimizer.accountant) == 8


def test_mutant_caught_an_interrupted_run_that_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_interruptions_counted", lambda run, path: nullcontext())
    with pytest.raises((AssertionError, AttributeError)):
        test_an_error_of_the_data_set_is_raised_as_it_is_and_every_step_before_it_is_counted(tmp_path, Fault())


def test_an_interrupted_search_hands_on_its_own_ledger(monkeypatch):
    accountant = create_accountant("rdp")
    candidate = Candidate(gated_model, {"epochs": 1, "batch_size": 50})
    settings = {"epsilon": 4.0, "delta": 1e-3, "mean_runs": 2.0, "validation": samples(20), "accountant": accountant}
    with power_cut(3) as raised:
        private_search([candidate], samples(300), **settings)
    assert raised.value.private_accountant is accountant
    assert len(accountant) == 1
    assert not hasattr(raised.value, "private_optimizer")
    assert not getattr(raised.value, "__notes__", [])
