"""What the former version wrote is read: ledgers without runs, and checkpoints that tell no caps."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import clipless_dp.model.passes
from accounting import GaussianRelease, Ledger, create_accountant
from clipless_dp import CliplessDPSGD, ConfigurationError, PoissonBatches, fit, report
from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.statistics import private_moments

from .support import gated_model, samples

DATA = Path(__file__).with_name("data")
RUN = {
    "epsilon": 4.0, "delta": 1e-3, "epochs": 2, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp",
    "noise_multiplier": 2.0,
}  # fmt: skip


def read(name):
    return json.loads((DATA / f"format-1-{name}.json").read_text(encoding="utf-8"))


def saved():
    return torch.load(DATA / "format-1-optimizer.pt", weights_only=True)


def private(**options):
    settings = {"noise_multiplier": 1.5, "sample_rate": 0.1, "dataset_size": 300, "accountant": "rdp", **options}
    return CliplessDPSGD(gated_model(), lr=0.1, momentum=0.9, **settings)


def train(optimizer, steps):
    for inputs, targets, mask in PoissonBatches(samples(300), sample_rate=0.1, steps=steps):
        optimizer.zero_grad()
        optimizer.model.loss(optimizer.model(inputs), targets, mask).backward()
        optimizer.step()


def test_ledgers_and_accountants_of_the_former_version_cost_what_they_did():
    for state in (read("ledger"), read("accountant")):
        accountant = create_accountant("prv")
        accountant.load_state_dict(state)
        # What that version answered; the engine's sums may be rounded otherwise elsewhere.
        assert float(accountant.get_epsilon(1e-3)) == pytest.approx(2.413248305035411, rel=1e-9)
        assert float(accountant.get_epsilon(1e-5)) == pytest.approx(3.465843855773027, rel=1e-9)
    ledger = Ledger.load(DATA / "format-1-ledger.json")
    assert Ledger.from_json(ledger.to_json()) == ledger
    # One release has an identity; nobody tells whose the rest is, so that it happened twice.
    assert len(ledger) == 24
    assert len(ledger.merge(ledger)) == 24 + 23


def test_an_optimizers_state_of_the_former_version_is_one_run_by_itself():
    optimizer = private()
    train(optimizer, 7)
    # As many steps, and they look alike.
    optimizer.load_state_dict(saved()["optimizer"])
    assert optimizer.accountant.history == [(1.5, 0.1, 14)]
    optimizer.load_state_dict(saved()["optimizer"])
    assert optimizer.accountant.history == [(1.5, 0.1, 14)], "the very same state"
    other = saved()["optimizer"]
    other["clipless_dp"]["counted"] = {"another run": 7}
    optimizer.load_state_dict(other)
    assert optimizer.accountant.history == [(1.5, 0.1, 21)]
    again = private()
    again.load_state_dict(optimizer.state_dict())
    assert again.accountant.history == [(1.5, 0.1, 21)]


def test_a_run_of_the_former_version_goes_on_and_its_statement_says_what_was_not_recorded():
    optimizer = private()
    optimizer.load_state_dict(saved()["optimizer"])
    optimizer.model.net.load_state_dict(saved()["model"])
    assert optimizer.steps_taken == 7
    assert optimizer.get_epsilon(1e-3) == pytest.approx(0.8133065369110678, rel=1e-9)  # As that version answered.
    train(optimizer, 1)
    (finding,) = report(optimizer).findings
    assert "records of 7 of 8 steps do not say how batches were drawn" in finding
    assert optimizer.noise_sources == ("clipless_dp.noise.SystemNoise",)


@pytest.mark.parametrize("missing", ["counted", "noise", "accountant", "steps_taken"])
def test_an_incomplete_state_of_the_former_version_is_refused_and_nothing_is_lost(missing):
    state = saved()["optimizer"]
    del state["clipless_dp"][missing]
    optimizer = private()
    train(optimizer, 1)
    with pytest.raises(ConfigurationError, match=missing):
        optimizer.load_state_dict(state)
    assert len(optimizer.accountant) == 1


@pytest.mark.parametrize(("name", "taken"), [("interrupted", 6), ("finished", 12)])
def test_a_checkpoint_of_the_former_version_is_gone_on_from_and_written_in_the_new_format(tmp_path, name, taken):
    path = tmp_path / "run.pt"
    shutil.copy(DATA / f"format-1-{name}.pt", path)
    assert load_checkpoint(path)["format"] == 2
    result = fit(gated_model(), samples(300), checkpoint=path, **RUN)
    assert result.steps == 12
    assert result.optimizer.accountant.history == [(2.0, 50 / 300, 12)]
    assert report(result.optimizer).facts["sampling"]["drawn"]["unknown"] == taken
    assert not result.optimizer.uncounted_changes
    assert load_checkpoint(path)["format"] == (2 if taken == 12 else 3)
    assert fit(gated_model(), samples(300), checkpoint=path, **RUN).epsilon == result.epsilon


def test_a_statistic_of_the_former_version_is_reread_and_paid_once():
    accountant = create_accountant("prv")
    accountant.load_state_dict(read("ledger"))
    before = float(accountant.get_epsilon(1e-5))
    settings = {"norm": 3.0, "noise_multiplier": 8.0, "file": DATA / "format-1-moments.pt"}
    moments = private_moments(samples(300)[0], accountant=accountant, **settings)
    assert float(accountant.get_epsilon(1e-5)) == before
    fresh = create_accountant("prv")
    private_moments(samples(300)[0], accountant=fresh, **settings)
    assert fresh.ledger.entries == [(moments.release, 1)]
    assert isinstance(moments.release, GaussianRelease)
    assert len(fresh.ledger.merge(accountant.ledger)) == len(accountant.ledger)


def test_the_ledger_in_a_statement_of_the_former_version_is_read():
    statement = read("statement")
    accountant = create_accountant("rdp")
    accountant.load_state_dict(statement["ledger"])
    assert float(accountant.get_epsilon(1e-3)) == pytest.approx(statement["epsilon"]["epsilon"], rel=1e-9)


@pytest.mark.parametrize("name", ["gated", "gradient gated", "constrained"])
def test_models_that_were_pickled_whole_before_modules_moved_compute_what_they_did(name):
    kept = torch.load(DATA / "format-1-models.pt", weights_only=False)[name]
    # The same graph on another processor may round otherwise: float32 has 24 bits, and sums here few terms.
    torch.testing.assert_close(kept["model"](kept["inputs"]), kept["outputs"], rtol=1e-5, atol=1e-6)
    assert dict(kept["model"].sensitivity().per_parameter) == pytest.approx(kept["bounds"], rel=1e-6)


def test_passes_are_found_where_they_are_documented():
    from clipless_dp.passes import public

    from clipless_dp import passes

    assert public is passes.public is clipless_dp.model.passes.public


NAMES = json.loads((DATA / "former-names.json").read_text(encoding="utf-8"))
"""By module, what the version before modules moved had: what has no underscore, and private classes that still are."""


def in_a_pickle(module, name):
    """A pickle of a class or function, which it knows by these."""
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93."


@pytest.mark.parametrize("module", NAMES)
def test_what_was_in_a_module_before_modules_moved_is_found_by_pickle_under_its_former_name(module):
    for name in NAMES[module].split():
        found = pickle.loads(in_a_pickle(module, name))
        assert found.__qualname__ == name
        # And no other thing of the name.
        assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize("former", ["tracker", "report", "sampling"])
def test_a_former_module_that_is_forgotten_is_missed(former, monkeypatch):
    module = f"clipless_dp.{former}"
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    with pytest.raises(AttributeError):
        test_what_was_in_a_module_before_modules_moved_is_found_by_pickle_under_its_former_name(module)
