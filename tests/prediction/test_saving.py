from __future__ import annotations

import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clipless_dp import (
    CheckpointError,
    ConfigurationError,
    DPLipModel,
    InputError,
    PrivacyError,
    PrivacyWarning,
    constraints,
    fit,
    gated,
    gradient_gated,
    load,
    losses,
    presets,
)
from clipless_dp.checkpoint import load_checkpoint, save_checkpoint
from clipless_dp.features import TableEncoding
from clipless_dp.prediction import Link
from clipless_dp.tables import fit_table
from tests.support import QUICK, samples

RUN = {**QUICK, "epochs": 2}
DATA = samples(60)
ROWS = torch.randn(9, 6, generator=torch.Generator().manual_seed(5)) * 3


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


BUILD = {
    "signal": lambda seed=0: DPLipModel(
        gated(network(seed)), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0)
    ),
    "constrained": lambda seed=0: DPLipModel(
        network(seed),
        input_shape=(6,),
        input_norm=1.0,
        loss=losses.TauCrossEntropy(2.0),
        constraint=constraints.Spectral(),
    ),
    "isolated": lambda seed=0: DPLipModel(
        gradient_gated(network(seed), isolation="vmap"), input_shape=(6,), loss=losses.TauCrossEntropy(2.0)
    ),
}


def trained(kind="signal", **given):
    return fit(BUILD[kind](), DATA, lr=0.5, audit=False, **{**RUN, **given})


def table(**given):
    rows = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100
    labels = given.pop("labels", (rows[:, 0] > 0).long())
    return fit_table(rows, labels, cosines=16, **{**RUN, **given}), rows


@pytest.mark.parametrize("kind", BUILD)
def test_a_result_of_fit_predicts_the_same_from_its_file(tmp_path, kind):
    result = trained(kind)
    result.save(tmp_path / "a.pt", classes=["a", "b", "c"])
    loaded = load(tmp_path / "a.pt", net=BUILD[kind](seed=1))
    model = result.optimizer.model.eval()
    torch.testing.assert_close(loaded.scores(ROWS), model(ROWS).detach(), rtol=0.0, atol=0.0)
    torch.testing.assert_close(loaded.predict_proba(ROWS), (2.0 * model(ROWS)).softmax(1).detach())
    assert loaded.predict(ROWS) == ["abc"[index] for index in model(ROWS).argmax(1)]
    assert (loaded.epsilon, loaded.delta) == (result.epsilon, result.delta)
    assert loaded.epsilon <= RUN["epsilon"]
    assert loaded.predict(ROWS.double().numpy()) == loaded.predict(ROWS)


def test_the_network_alone_is_given_the_projection_of_the_model(tmp_path):
    result = trained()
    result.save(tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt", net=gated(network(1)))
    # Rows of norm above 1, which the model projects; by other operations, hence up to rounding.
    torch.testing.assert_close(loaded.scores(ROWS), result.scores(ROWS), rtol=0.0, atol=1e-5)
    assert torch.equal(loaded.predict(ROWS), result.predict(ROWS))


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (lambda: network(1), "computes something else"),
        (lambda: BUILD["constrained"](1), "computes something else"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), "computes something else"),
        (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), "do not fit"),
    ],
    ids=["without-gates", "constrained", "activation", "shape"],
)
def test_weights_are_not_given_to_another_network(tmp_path, net, said):
    trained().save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "a.pt", net=net())


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"classes": ["no", "yes"], "labels": ["no", "yes"] * 30},
        {"classes": [1, 2, 3], "labels": [1, 2, 3] * 20},
        {"target_range": (0.0, 10.0), "labels": torch.linspace(0.0, 10.0, 60)},
    ],
    ids=["binary", "named", "three", "numbers"],
)
def test_a_table_predicts_the_same_from_its_file(tmp_path, given):
    model, rows = table(**given)
    rows[3, 1] = math.nan
    model.save(tmp_path / "t.pt")
    loaded = load(tmp_path / "t.pt")
    torch.testing.assert_close(loaded.scores(rows), model.scores(rows), rtol=0.0, atol=0.0)
    assert list(loaded.predict(rows)) == list(model.predict(rows))
    if "target_range" in given:
        assert loaded.target_range == (0.0, 10.0)
        with pytest.raises(ConfigurationError, match="no probabilities"):
            loaded.predict_proba(rows)
    else:
        shares = loaded.predict_proba(rows)
        assert shares.shape == (60, len(model.classes))
        torch.testing.assert_close(shares, model.predict_proba(rows))
        torch.testing.assert_close(shares.sum(1), torch.ones(60))
        assert [model.classes[index] for index in shares.argmax(1)] == model.predict(rows)
    assert any("charged" in note for note in loaded.statement.facts["notes"])


def test_a_data_frame_is_encoded_as_it_was(tmp_path):
    encoding = TableEncoding(["age"], {"kind": ["a", "b"]}, missing={"age": None})
    frame = {"age": np.array([20.0, np.nan, 60.0] * 20), "kind": np.array(["a", "b", "a"] * 20)}
    model = fit_table(frame, [0, 1, 1] * 20, encoding=encoding, cosines=16, **RUN)
    model.save(tmp_path / "t.pt")
    loaded = load(tmp_path / "t.pt")
    torch.testing.assert_close(loaded.scores(frame), model.scores(frame), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transfer", (12,)),
        pytest.param("features-linear", (1, 8, 8), marks=pytest.mark.slow),
        pytest.param("photographs-gradient", (3, 16, 16), marks=pytest.mark.slow),
        pytest.param("mnist-gradient", (1, 16, 16), marks=pytest.mark.slow),
    ],
)
def test_a_preset_predicts_the_same_from_its_file(tmp_path, name, shape):
    images = torch.rand(40, *shape, generator=torch.Generator().manual_seed(0))
    made = presets.get(name).fit((images, torch.arange(40) % 3), outputs=3, audit=False, **RUN)
    made.save(tmp_path / "p.pt", classes=["a", "b", "c"])
    loaded = load(tmp_path / "p.pt")
    torch.testing.assert_close(loaded.scores(images), made.model.eval()(made.prepare(images)).detach())
    assert loaded.predict(images) == made.predictor(classes=["a", "b", "c"]).predict(images)
    torch.testing.assert_close(loaded.predict_proba(images), made.predict_proba(images))


def test_a_preset_of_ones_own_is_given_again_and_statistics_of_ones_own_are_refused(tmp_path):
    own = replace(presets.get("transfer"), name="own")
    images = torch.rand(40, 12), torch.arange(40) % 3
    made = own.fit(images, outputs=3, audit=False, **RUN)
    made.save(tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match="preset="):
        load(tmp_path / "p.pt")
    torch.testing.assert_close(load(tmp_path / "p.pt", preset=own).scores(images[0]), made.scores(images[0]))
    with pytest.raises(ConfigurationError, match="WithoutMean"):
        replace(made, change=lambda samples: samples).save(tmp_path / "q.pt")
    assert not (tmp_path / "q.pt").exists()


def test_a_threshold_moves_the_prediction_of_two_classes_only(tmp_path):
    model, rows = table(classes=["no", "yes"], labels=["no", "yes"] * 30)
    second = model.predict_proba(rows)[:, 1]
    middle = float(second.median())
    model.save(tmp_path / "t.pt", threshold=middle)
    loaded = load(tmp_path / "t.pt")
    assert loaded.threshold == middle
    assert loaded.predict(rows) == ["yes" if share > middle else "no" for share in second.tolist()]
    with pytest.raises(ConfigurationError, match="second of two"):
        trained().save(tmp_path / "a.pt", threshold=0.5)


def test_the_file_holds_plain_values_and_neither_losses_nor_counts(tmp_path):
    inputs, targets = samples(60)
    inputs[7] = math.nan
    with pytest.warns(UserWarning, match="contributed nothing"):
        result = fit(BUILD["signal"](), (inputs, targets), lr=0.5, audit=False, **{**RUN, "batch_size": 60})
    result.save(tmp_path / "a.pt")
    # The plain reader of torch, without this library.
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content.keys() == {
        "format", "result", "result_format", "made_by", "state", "settings", "probe", "link", "outputs", "classes",
        "threshold", "target_range", "statement", "epsilon", "delta",
    }  # fmt: skip
    assert content["state"].keys() == result.optimizer.model.net.state_dict().keys()
    assert content["probe"]["inputs"].shape == (4, 6)
    loss = result.history[-1].loss
    numbers = [value for _, value in numbers_of(json.loads(content["statement"]))]
    assert loss not in numbers
    assert int(result.optimizer.model.nonfinite_samples) > 0
    assert not any("nonfinite" in name or "loss" in name.split(".")[-1:] for name, _ in numbers_of(content))


def numbers_of(value, name=""):
    if isinstance(value, dict):
        for key, part in value.items():
            yield from numbers_of(part, f"{name}.{key}")
    elif isinstance(value, list):
        for part in value:
            yield from numbers_of(part, name)
    elif isinstance(value, (int, float)):
        yield name, value


def test_the_ledger_travels_with_all_that_was_charged(tmp_path):
    model, _ = table()
    model.save(tmp_path / "t.pt", notes=["A pilot."])
    facts = load(tmp_path / "t.pt").statement.facts
    assert facts["ledger"] == json.loads(model.report(delta=1e-3).to_json())["ledger"]
    assert "A pilot." in facts["notes"]
    assert facts["epsilon"]["epsilon"] == model.result.epsilon


def test_notes_and_spending_after_training_are_in_the_statement(tmp_path):
    result = trained()
    result.optimizer.accountant.step(noise_multiplier=5.0, sample_rate=1.0)
    result.save(tmp_path / "a.pt", notes=["A pilot."])
    loaded = load(tmp_path / "a.pt", net=BUILD["signal"]())
    assert "A pilot." in loaded.statement.facts["notes"]
    assert loaded.epsilon == result.optimizer.get_epsilon(1e-3) == result.epsilon > result.spent


def test_no_broken_file_is_left_where_writing_fails(tmp_path, monkeypatch):
    path, result = tmp_path / "a.pt", trained()
    result.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="left as it was"):
            result.save(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]
    with pytest.raises(ConfigurationError, match="classes were given"):
        result.save(path, classes=["a", "b"])
    assert path.read_bytes() == before


def test_files_that_are_damaged_or_of_something_else_are_refused_by_name(tmp_path):
    path = tmp_path / "a.pt"
    result = trained(checkpoint=tmp_path / "run.pt")
    result.save(path)
    with pytest.raises(CheckpointError, match=r"checkpoint that training goes on from"):
        load(tmp_path / "run.pt")
    with pytest.raises(ConfigurationError, match="net=net"):
        load(path)
    with pytest.raises(ConfigurationError, match="leave preset out"):
        load(path, net=network(), preset=presets.get("transfer"))
    with pytest.raises(ConfigurationError, match=r"torch\.nn\.Module"):
        load(path, net="net")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt")
    content = load_checkpoint(path)
    for changes, said in [
        ({"result_format": 9}, "format 9"),
        ({"made_by": "magic"}, "magic"),
        ({"link": ["magic", 1.0]}, "incomplete"),
        ({"statement": "{"}, "incomplete"),
        ({"state": {}}, "do not fit"),
    ]:
        save_checkpoint(tmp_path / "b.pt", {**content, **changes})
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path / "b.pt", net=None if said == "magic" else BUILD["signal"]())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load(path, net=network())
    model, _ = table()
    model.save(path)
    with pytest.raises(ConfigurationError, match="leave net out"):
        load(path, net=network())


def test_rows_without_scores_are_not_given_a_class():
    result = trained()
    rows = ROWS.clone()
    rows[2] = math.nan
    assert result.scores(rows)[2].isnan().all()
    with pytest.raises(InputError, match="row 2, and 0 more"):
        result.predict(rows)
    with pytest.raises(InputError, match="row 2"):
        result.predict_proba(rows)
    with pytest.raises(InputError, match="must be numbers"):
        result.predict([["a"]])
    with pytest.raises(InputError, match="no row"):
        result.predict(rows[:0])


def test_losses_say_what_scores_are():
    scores = torch.tensor([[1.0, -1.0], [0.0, 3.0]])
    assert Link.of(losses.TauCrossEntropy(4.0), 3) == ("softmax", 4.0)
    assert Link.of(losses.BinaryCrossEntropy(2.0), 1) == ("logistic", 2.0)
    assert Link.of(losses.BinaryCrossEntropy(2.0), 5).kind == "scores"
    assert Link.of(losses.HingeKR((0.5, 0.5)), 1).classes(torch.tensor([1.0, -1.0])).tolist() == [1, 0]
    assert Link.of(losses.MulticlassHinge(), 2).classes(scores).tolist() == [0, 1]
    assert Link.of(losses.Huber(), 1).kind == "number"
    assert Link.of(losses.BoundedLoss(lambda output, target: output.sum(1), 1.0), 2).kind == "scores"
    second = 1 / (1 + math.exp(-1.0))
    torch.testing.assert_close(
        Link("logistic", 2.0).probabilities(torch.tensor([0.5])), torch.tensor([[1 - second, second]])
    )


def test_a_predictor_is_pickled_with_its_promise(tmp_path):
    model, rows = table()
    again = pickle.loads(pickle.dumps(model.predictor()))
    torch.testing.assert_close(again.scores(rows), model.scores(rows))
    assert again.epsilon == model.result.epsilon


@pytest.mark.slow
def test_another_process_predicts_the_same(tmp_path):
    model, rows = table()
    model.save(tmp_path / "t.pt")
    torch.save(rows, tmp_path / "rows.pt")
    script = (
        f"import torch, clipless_dp; m = clipless_dp.load({str(tmp_path / 't.pt')!r}); "
        f"print([*m.predict(torch.load({str(tmp_path / 'rows.pt')!r}, weights_only=True))], m.epsilon)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{model.predict(rows)} {model.result.epsilon}"


def test_training_that_goes_on_from_a_file_does_not_forget_what_that_has_spent(tmp_path):
    trained().save(tmp_path / "a.pt")
    model = BUILD["signal"](seed=1)
    loaded = load(tmp_path / "a.pt", net=model)
    first = loaded.epsilon
    with pytest.warns(PrivacyWarning, match="does not include"):
        result = fit(model, DATA, **RUN)
    assert result.optimizer.ledger_is_incomplete()
    for read in (lambda: loaded.epsilon, lambda: result.predictor().epsilon, lambda: result.save(tmp_path / "b.pt")):
        with pytest.raises(PrivacyError, match="private steps"):
            read()
    assert not (tmp_path / "b.pt").exists()
    again = load(tmp_path / "a.pt", net=BUILD["signal"](seed=2))
    assert again.epsilon == first


def test_what_was_promised_is_asked_each_time_as_weights_may_be_trained_on(tmp_path):
    model = BUILD["signal"]()
    first = fit(model, DATA, **RUN)
    predictor = first.predictor()
    spent = predictor.epsilon
    kept = pickle.loads(pickle.dumps(predictor))
    first.optimizer.accountant.step(noise_multiplier=5.0, sample_rate=1.0)
    assert predictor.epsilon > spent == kept.epsilon
    assert predictor.statement.facts["epsilon"]["epsilon"] == predictor.epsilon
    with pytest.warns(PrivacyWarning, match="does not include"):
        fit(model, DATA, **RUN)
    for read in (lambda: predictor.epsilon, lambda: pickle.dumps(predictor), lambda: first.save(tmp_path / "a.pt")):
        with pytest.raises(PrivacyError, match="private steps"):
            read()
    assert kept.epsilon == spent


def test_trainings_that_share_an_accountant_say_the_total(tmp_path):
    model = BUILD["signal"]()
    first = fit(model, DATA, **RUN)
    both = fit(model, DATA, **{**RUN, "epsilon": 8.0, "accountant": first.optimizer.accountant})
    assert first.predictor().epsilon == both.predictor().epsilon == both.epsilon == first.epsilon > first.spent


@pytest.mark.parametrize("net", [lambda: network(1), lambda: network(1).double()], ids=["ungated", "double"])
def test_a_network_that_is_refused_keeps_its_weights(tmp_path, net):
    trained().save(tmp_path / "a.pt")
    net = net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError):
        load(tmp_path / "a.pt", net=net)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_results_in_double_precision_are_read_into_networks_of_that(tmp_path):
    data = DATA[0].double(), DATA[1]
    model = DPLipModel(gated(network().double()), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))
    result = fit(model, data, **RUN)
    result.save(tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt", net=gated(network(1).double()))
    torch.testing.assert_close(loaded.scores(ROWS), result.scores(ROWS))
    with pytest.raises(CheckpointError, match="float64"):
        load(tmp_path / "a.pt", net=gated(network(1)))


class Name(str):
    pass


@pytest.mark.parametrize("label", [Fraction(1, 2), Name("a"), signal.SIGINT], ids=["fraction", "name", "enum"])
def test_labels_that_no_file_can_hold_are_refused_before_one_is_written(tmp_path, label):
    with pytest.raises(ConfigurationError, match="plain text or numbers"):
        trained().save(tmp_path / "a.pt", classes=[label, "b", "c"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changed",
    [{"epsilon": math.nan}, {"epsilon": -1.0}, {"statement": "[]"}, {"settings": None}, {"state": [1]}],
    ids=["nan", "negative", "statement", "settings", "state"],
)
def test_a_file_that_was_rewritten_wrongly_is_refused_in_words(tmp_path, changed):
    trained().save(tmp_path / "a.pt")
    save_checkpoint(tmp_path / "b.pt", {**load_checkpoint(tmp_path / "a.pt"), **changed})
    with pytest.raises(CheckpointError, match="altered"):
        load(tmp_path / "b.pt", net=BUILD["signal"]())


def test_a_network_without_values_is_refused(tmp_path):
    trained().save(tmp_path / "a.pt")
    with pytest.raises(ConfigurationError, match="meta"):
        load(tmp_path / "a.pt", net=gated(network()).to("meta"))
