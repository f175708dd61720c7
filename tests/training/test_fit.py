from __future__ import annotations

import copy
import errno
import math
import pickle
import struct
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from accounting import PRVAccountant, RDPAccountant
from clipless_dp import (
    CheckpointError,
    CliplessDPOptimizer,
    ConfigurationError,
    DPLipModel,
    InputError,
    PoissonBatches,
    PrivacyWarning,
    audit,
    constraints,
    evaluate,
    fit,
    gated,
    gradient_gated,
    losses,
)
from clipless_dp import checkpoint as checkpoint_module
from clipless_dp.checkpoint import load_checkpoint, save_checkpoint
from clipless_dp.training import compiled_loss, constant, linear_decay, plan, sizing
from tests.support import before_steps, gated_model, keyboard_interrupt, one_in_two, power_cut, protected, samples

RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 6, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp"}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


def constrained_model(dropout: float = 0.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
    return DPLipModel(
        net, input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(4.0), constraint=constraints.Orthogonal()
    )


def test_fit_spends_no_more_than_the_target_and_almost_all_of_it():
    result = fit(gated_model(), samples(300), **{**RUN, "accountant": "prv"})
    assert 0.98 * 4.0 < result.epsilon <= 4.0
    again = PRVAccountant()
    again.step(noise_multiplier=result.noise_multiplier, sample_rate=50 / 300, steps=result.steps)
    assert float(again.get_epsilon(1e-3)) == result.epsilon


def test_no_step_is_lost_when_the_batch_does_not_divide_the_data():
    result = fit(gated_model(), samples(310), **{**RUN, "epochs": 3})
    assert result.steps == 19  # ceil(3·310/50)
    assert result.optimizer.accountant.history == [(result.noise_multiplier, 50 / 310, 19)]


def test_fit_learns_a_separable_task():
    train, test = samples(4000, seed=1), samples(500, seed=2)
    model = gated_model()
    before, _ = evaluate(model, test)
    result = fit(model, train, **{**RUN, "delta": 1e-4, "batch_size": 400, "epochs": 10, "validation": test})
    assert result.history[-1].accuracy is not None
    # Chance is 1/3; ordinary training of this network reaches 0.95.
    assert result.history[-1].accuracy > 0.75 > (before or 0.0)
    assert len(result.history) == 10
    assert "accuracy" in str(result)


@pytest.mark.parametrize("build", [gated_model, lambda: constrained_model(0.1)], ids=["gated", "orthogonal"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path, build):
    data = samples(300)
    settings = {**RUN, "reproducible_seed": 7}
    whole = build()
    expected = fit(whole, data, **settings)

    path = tmp_path / "run.pt"
    with power_cut(20):
        fit(build(), data, checkpoint=path, **settings)
    resumed = build()
    result = fit(resumed, data, checkpoint=path, **settings)
    assert torch.equal(weights(whole), weights(resumed))
    assert protected(result.history) == protected(expected.history)
    assert result.history[-1].loss == expected.history[-1].loss
    assert result.steps == expected.steps
    assert result.epsilon == expected.epsilon
    assert result.optimizer.learning_rates == expected.optimizer.learning_rates


def test_a_finished_run_is_not_trained_again(tmp_path):
    model = gated_model()
    first = fit(model, samples(300), checkpoint=tmp_path / "run.pt", **RUN)
    trained = weights(model)
    second = fit(model, samples(300), checkpoint=tmp_path / "run.pt", **RUN)
    assert torch.equal(weights(model), trained)
    assert second.epsilon == first.epsilon


def test_an_interrupt_finishes_the_step_and_saves_it(tmp_path):
    with keyboard_interrupt(7):
        fit(gated_model(), samples(300), checkpoint=tmp_path / "run.pt", **RUN)
    content = load_checkpoint(tmp_path / "run.pt")
    assert content["optimizer"]["clipless_dp"]["steps_taken"] == 8


def test_fit_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(gated_model(), samples(100), **RUN)))
    thread.start()
    thread.join()
    assert results[0].epsilon <= 4.0


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    path = tmp_path / "run.pt"
    fit(gated_model(), samples(300), checkpoint=path, **RUN)
    with pytest.raises(CheckpointError, match=r"run\.pt.*batch_size: 50 there, 60 here"):
        fit(gated_model(), samples(300), checkpoint=path, **{**RUN, "batch_size": 60})


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None], ids=["empty", "foreign", "truncated"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"settings": {}})
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(CheckpointError, match=r"run\.pt"):
        load_checkpoint(path)


def test_a_checkpoint_of_an_unknown_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "CHECKPOINT_FORMAT", 99)
    save_checkpoint(tmp_path / "new.pt", {})
    monkeypatch.undo()
    torch.save({"format": 1}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="99"):
        load_checkpoint(tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "old.pt")


def test_a_failed_write_leaves_the_old_checkpoint_and_no_litter(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"value": 1})
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"value": lambda: None})
    assert load_checkpoint(path)["value"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_checkpoints_hold_neither_seed_nor_generator_state(tmp_path):
    fit(gated_model(), samples(100), checkpoint=tmp_path / "run.pt", reproducible_seed=123456789, **RUN)
    content = load_checkpoint(tmp_path / "run.pt")
    assert "123456789" not in repr(content)
    # Of signal over noise: the weights at the last record, which were released, and variances.
    assert set(content) == {"format", "settings", "model", "optimizer", "scheduler", "history", "signal_to_noise"}
    assert set(content["signal_to_noise"]) == {"before", "added"}


def test_checkpoints_hold_no_training_losses(tmp_path):
    path = tmp_path / "run.pt"
    with power_cut(20):
        fit(gated_model(), samples(300), checkpoint=path, validation=samples(20, 1), **RUN)
    kept = load_checkpoint(path)["history"]
    assert [record["loss"] for record in kept] == [None] * len(kept) != []
    assert kept[0]["accuracy"] is not None
    result = fit(gated_model(), samples(300), checkpoint=path, validation=samples(20, 1), **RUN)
    assert [record.loss is None for record in result.history].count(True) == len(kept)
    losses = [repr(record.loss).encode() for record in result.history if record.loss is not None]
    packed = [struct.pack("<d", record.loss) for record in result.history if record.loss is not None]
    assert losses
    assert not any(loss in path.read_bytes() for loss in (*losses, *packed))


def test_micro_batches_change_the_run_by_rounding_only():
    results = []
    for size in (None, 16):
        model = gated_model()
        fit(model, samples(300), micro_batch_size=size, reproducible_seed=1, **{**RUN, "epochs": 1})
        results.append(weights(model))
    # Six steps of float32 sums in another order.
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_another_base_optimizer_and_schedule_can_be_given():
    result = fit(
        gated_model(),
        samples(300),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        scheduler=constant,
        **RUN,
    )
    assert isinstance(result.optimizer.base_optimizer, torch.optim.Adam)
    assert result.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 301}, "300 samples"),
        ({"batch_size": 50.0}, "whole number"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        fit(gated_model(), samples(300), **{**RUN, **changes})


def test_data_that_does_not_fit_the_model_is_refused_before_calibration(monkeypatch):
    monkeypatch.setattr(plan, "calibrate_noise_multiplier", None)
    with pytest.raises(InputError, match=r"batch, 6"):
        fit(gated_model(), (torch.zeros(50, 5), torch.zeros(50, dtype=torch.int64)), **RUN)
    with pytest.raises(InputError, match="int64"):
        fit(gated_model(), (torch.zeros(50, 6, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)), **RUN)


def test_a_regression_reports_a_loss_and_no_accuracy():
    torch.manual_seed(0)
    net = nn.Linear(6, 1)
    model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.Huber())
    inputs, _ = samples(200)
    data = (inputs, inputs.sum(1, keepdim=True))
    result = fit(model, data, validation=data, **RUN)
    assert result.history[-1].accuracy is None
    assert result.history[-1].validation_loss is not None


@pytest.mark.parametrize("targets", ["float", "column"])
def test_targets_that_do_not_fit_the_loss_are_refused_before_calibration(monkeypatch, targets):
    monkeypatch.setattr(plan, "calibrate_noise_multiplier", None)
    inputs, labels = samples(300)
    with pytest.raises(InputError, match="integer labels"):
        fit(gated_model(), (inputs, labels.float() if targets == "float" else labels.unsqueeze(1)), **RUN)


def test_validation_data_that_does_not_fit_is_refused_before_anything_is_spent(monkeypatch):
    monkeypatch.setattr(plan, "calibrate_noise_multiplier", None)
    inputs, labels = samples(300)
    for validation in ((inputs[:, :5], labels), (inputs, labels.float())):
        with pytest.raises(InputError):
            fit(gated_model(), (inputs, labels), validation=validation, **RUN)
    with pytest.raises(ConfigurationError, match="0 inputs"):
        fit(gated_model(), (inputs, labels), validation=(inputs[:0], labels[:0]), **RUN)


@pytest.mark.parametrize("convert", [torch.Tensor.int, torch.Tensor.byte], ids=["int32", "uint8"])
def test_labels_of_any_integer_type_train(convert):
    inputs, labels = samples(300)
    assert fit(gated_model(), (inputs, convert(labels)), **{**RUN, "epochs": 1}).steps == 6


def test_samples_that_contribute_nothing_are_reported():
    inputs, labels = samples(300)
    inputs[0] = float("nan")
    with pytest.warns(UserWarning, match="samples in batches contributed nothing"):
        fit(gated_model(), (inputs, labels + 1), **RUN)


def test_a_second_fit_of_one_model_warns_that_it_composes_with_the_first():
    model = gated_model()
    fit(model, samples(300), **RUN)
    with pytest.warns(PrivacyWarning, match="another optimizer"):
        fit(model, samples(300), **RUN)


@pytest.mark.parametrize("where", ["folder", "file/run.pt"])
def test_a_checkpoint_that_cannot_be_written_is_refused_before_calibration(tmp_path, monkeypatch, where):
    monkeypatch.setattr(plan, "calibrate_noise_multiplier", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=where):
        fit(gated_model(), samples(300), checkpoint=tmp_path / where, **RUN)


def test_a_disk_that_fills_up_costs_the_checkpoint_and_not_the_training(tmp_path, monkeypatch):
    path = tmp_path / "new" / "run.pt"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        result = fit(gated_model(), samples(300), checkpoint=path, **RUN)
    assert result.steps == 36
    assert result.checkpoint is None
    assert list(path.parent.iterdir()) == [], "no litter"
    monkeypatch.undo()
    assert fit(gated_model(), samples(300), checkpoint=path, **RUN).checkpoint == path


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.5)},
        {"lr": 0.1},
        {"momentum": 0.5},
        {"allocation": "global"},
        {"reproducible_seed": 1},
    ],
    ids=["optimizer", "lr", "momentum", "allocation", "reproducible"],
)
def test_a_checkpoint_of_another_optimizer_is_refused_rather_than_followed_silently(tmp_path, changes):
    path = tmp_path / "run.pt"
    fit(gated_model(), samples(300), checkpoint=path, **RUN)
    with pytest.raises(CheckpointError, match=next(iter(changes)).removesuffix("_seed")):
        fit(gated_model(), samples(300), checkpoint=path, **{**RUN, **changes})


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    fit(gated_model(), samples(300), checkpoint=path, **RUN)
    with pytest.raises(CheckpointError, match=r"other settings .*model\.constraints.*and 8 more"):
        fit(constrained_model(), samples(300), checkpoint=path, **RUN)


def test_a_schedule_that_follows_the_loss_is_refused_before_the_first_step():
    model = gated_model()
    before = weights(model)
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau"):
        fit(
            model,
            samples(300),
            scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
            **RUN,
        )
    assert torch.equal(weights(model), before)


def test_fractions_of_an_epoch_train_and_are_recorded_once():
    result = fit(gated_model(), samples(300), **{**RUN, "epochs": 0.5})
    assert result.steps == 3
    assert [record.step for record in result.history] == [3]
    result = fit(gated_model(), samples(300), **{**RUN, "epochs": 2.5})
    assert [record.step for record in result.history] == [6, 12, 15]


def test_full_batches_and_a_single_sample_train():
    assert fit(gated_model(), samples(30), **{**RUN, "batch_size": 30}).optimizer.accountant.history[0][1:] == (1.0, 6)
    assert fit(gated_model(), samples(1), **{**RUN, "batch_size": 1}).steps == 6


class NearEnough(losses.MeanAbsoluteError):
    """A loss of a user's own, by whose notion a prediction may be right in part."""

    def __init__(self, returned=lambda output: (output.abs() < 0.5).double().mean(1)):
        self.returned = returned

    def correct(self, output, target):
        return self.returned(output - target)


def of_distances(loss):
    torch.manual_seed(0)
    return DPLipModel(gradient_gated(nn.Sequential(nn.Linear(6, 2))), input_shape=(6,), input_norm=3.0, loss=loss)


def test_a_loss_of_a_users_own_reports_accuracy_in_evaluate_and_in_the_history_of_fit():
    inputs, targets = samples(300)[0], torch.rand(300, 2)
    model = of_distances(NearEnough())
    expected = float(((model(inputs) - targets).abs() < 0.5).double().mean())
    assert 0.0 < expected < 1.0
    assert evaluate(model, (inputs, targets), batch_size=70)[0] == pytest.approx(expected, rel=1e-12)  # order of sums
    result = fit(model, (inputs, targets), **{**RUN, "epochs": 1, "validation": (inputs, targets)})
    assert result.history[-1].accuracy == evaluate(model, (inputs, targets))[0]
    assert "accuracy" in str(result)


def test_no_accuracy_is_reported_for_a_loss_without_a_notion_of_it():
    data = samples(60)[0], torch.rand(60, 2)
    result = fit(of_distances(losses.Huber()), data, **{**RUN, "epochs": 1, "validation": data})
    assert result.history[-1].accuracy is None
    assert result.history[-1].validation_loss is not None
    assert "accuracy" not in str(result)


@pytest.mark.parametrize(
    "returned",
    [
        lambda off: 0.5,
        lambda off: off < 1,
        lambda off: off.sum().abs() < 1,
        lambda off: torch.ones(len(off), dtype=torch.int64),
        lambda off: torch.full((len(off),), 1.5),
        lambda off: torch.full((len(off),), -0.5),
        lambda off: torch.full((len(off),), math.nan),
    ],
    ids=["a number", "one for each output", "one for all", "integers", "above one", "below zero", "NaN"],
)
def test_what_correct_returns_must_be_a_share_for_each_row_and_is_refused_before_a_step_is_charged(returned):
    accountant = RDPAccountant()
    with pytest.raises(InputError, match=r"correct\(\) of .*\[0, 1\]"):
        fit(
            of_distances(NearEnough(returned)),
            (samples(60)[0], torch.rand(60, 2)),
            **{**RUN, "accountant": accountant},
        )
    assert len(accountant) == 0


def test_evaluation_that_fails_leaves_the_model_in_its_mode():
    model = gated_model().train()
    with pytest.raises(InputError):
        evaluate(model, (torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)))
    assert model.training


def test_fit_trains_in_training_mode_and_evaluates_without_dropout():
    modes = []
    model, test = constrained_model(0.5).eval(), samples(50, seed=1)
    with before_steps(lambda run: modes.append(run.model.training)):
        fit(model, samples(300), validation=test, **{**RUN, "epochs": 2})
    assert modes == [True] * 12
    assert evaluate(model, test) == evaluate(model, test), "dropout would make them differ"


def test_fit_computes_in_full_precision_and_puts_the_setting_back():
    torch.set_float32_matmul_precision("medium")
    try:
        assert fit(gated_model(), samples(300), **{**RUN, "epochs": 1}).steps == 6
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_default_schedule_rises_to_the_peak_and_falls_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = linear_decay(optimizer, 40)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.0 < rates[-1] < 0.1
    assert optimizer.param_groups[0]["lr"] == 0.0


def normalised_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(16, 3))
    gates = gated(net, cotangent_mode="normalize")
    return DPLipModel(gates, input_shape=(1, 7, 7), input_norm=3.0, loss=losses.TauCrossEntropy(4.0))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("build", "micro_batch_size"), one_in_two([(constrained_model, 24), (normalised_model, None)]))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Dynamo.*:UserWarning")
def test_a_compiled_run_equals_an_eager_one_and_compiles_once_for_all_draws(build, micro_batch_size, backend):
    generator = torch.Generator().manual_seed(0)
    trained, sizes = [], set()
    for compile in (False, backend):
        torch._dynamo.reset()
        counters.clear()
        model = build()
        inputs = torch.randn(300, *model.input_shape, generator=generator.manual_seed(0))
        inputs[5] = math.nan
        targets = torch.arange(300) % 3
        options = {**RUN, "micro_batch_size": micro_batch_size, "reproducible_seed": 3, "compile": compile}
        with pytest.warns(UserWarning, match="contributed nothing"):
            result = fit(model, (inputs, targets), **options)
        trained.append(weights(model))
    for batch in PoissonBatches((inputs, targets), sample_rate=1 / 6, steps=36, seed=3, physical_batch_size=8):
        sizes.add(len(batch.mask))
    assert len(sizes) > 3, "draws of several shapes"
    assert result.optimizer.accountant.history == [(result.noise_multiplier, 50 / 300, 36)]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # 36 steps of float32 sums in another order.
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Dynamo.*:UserWarning")
def test_more_models_than_the_limit_of_recompilations_can_be_compiled():
    torch._dynamo.reset()
    inputs, targets = samples(8)
    for width in range(3, 12):
        net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
        model = DPLipModel(net, input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy())
        loss = compiled_loss(model, "eager")(inputs, targets, torch.ones(8, dtype=torch.bool))
        torch.testing.assert_close(loss, model.loss(model(inputs), targets))


def pooled_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(16, 3))
    net = gradient_gated(net, layers=["0"])
    return DPLipModel(net, input_shape=(1, 7, 7), input_norm=3.0, loss=losses.TauCrossEntropy(4.0))


@pytest.mark.parametrize(
    ("build", "compiled"),
    [(gated_model, False), (normalised_model, False), (pooled_model, False), (constrained_model, True)],
)
def test_on_a_cpu_what_runs_fused_is_compiled_by_name_only(build, compiled, monkeypatch):
    asked = []

    def asking(model, backend):
        asked.append(backend)
        return lambda inputs, targets, mask: model.loss(model(inputs), targets, mask)

    monkeypatch.setattr(sizing, "compiled_loss", asking)
    monkeypatch.setattr(sizing, "_share", lambda *passes: 0.9)
    for compile in (True, "inductor"):
        model = build()
        data = torch.randn(300, *model.input_shape), torch.arange(300) % 3
        said = pytest.warns(UserWarning, match="left out: its gates or pooled convolutions")
        with nullcontext() if compiled or compile != True else said:  # noqa: E712
            fit(model, data, compile=compile, **RUN)
    assert asked == ["inductor"] * (1 + compiled)


@pytest.mark.parametrize(("share", "seed", "kept"), [(1.3, None, False), (1.3, 5, True), (0.8, None, True)])
def test_on_a_cpu_compile_keeps_what_is_faster_and_says_so(share, seed, kept, monkeypatch):
    """Only a run that is to be reproduced keeps what is slower, and says that too."""
    compiled, measured = [], []

    def counting(model, backend):
        def loss(inputs, targets, mask):
            compiled.append(bool(mask.any()))
            return model.loss(model(inputs), targets, mask)

        return loss

    def asking(own, other, blank):
        original(own, other, blank)
        measured.append(blank)
        return share

    original = sizing._share
    monkeypatch.setattr(sizing, "compiled_loss", counting)
    monkeypatch.setattr(sizing, "_share", asking)
    model = constrained_model()
    data = torch.randn(300, *model.input_shape), torch.arange(300) % 3
    said = pytest.warns(UserWarning, match=f"{share:.3f} times as long" + (".*They are kept" if seed else ""))
    with said if share > 1.0 else nullcontext():
        result = fit(model, data, compile=True, reproducible_seed=seed, **RUN)
    assert any(compiled) == kept
    # Nothing of the data, no charge, and nothing left behind.
    ((inputs, _, mask),) = measured
    assert not inputs.any()
    assert not mask.any()
    assert len(result.optimizer.accountant) == result.steps == 36


def test_what_compile_leaves_out_of_networks_that_run_sample_by_sample_is_said():
    def build():
        net = gradient_gated(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), isolation="vmap")
        return DPLipModel(net, input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy(4.0))

    assert build().graph.isolated
    with pytest.warns(UserWarning, match="left out: the network runs sample by sample") as said:
        fit(build(), samples(300), compile=True, **RUN)
    # No backend's name would help.
    assert not any("inductor" in str(one.message) for one in said)
    with pytest.raises(ConfigurationError, match="sample by sample"):
        fit(build(), samples(300), compile="eager", **RUN)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*Dynamo.*:UserWarning")
def test_what_cannot_be_compiled_is_refused_before_anything_is_spent(monkeypatch):
    model = gated_model()
    before = weights(model)
    with pytest.raises(ConfigurationError, match="compile=False"):
        fit(model, samples(300), **RUN, compile="no such backend")
    assert torch.equal(weights(model), before)
    assert all(parameter.grad is None for parameter in model.net.parameters())


def halving(step, steps):
    return 1.0 if step < steps // 2 else 0.5


def test_a_noise_schedule_is_calibrated_as_a_whole_and_recorded_step_by_step():
    result = fit(gated_model(), samples(300), noise_schedule=halving, **RUN)
    sigma = result.noise_multiplier
    assert result.optimizer.accountant.history == [(sigma, 50 / 300, 18), (0.5 * sigma, 50 / 300, 18)]
    assert 0.98 * 4.0 < result.epsilon <= 4.0
    again = RDPAccountant()
    again.step(noise_multiplier=sigma, sample_rate=50 / 300, steps=18)
    again.step(noise_multiplier=0.5 * sigma, sample_rate=50 / 300, steps=18)
    assert float(again.get_epsilon(1e-3)) == result.epsilon
    flat = fit(gated_model(), samples(300), **RUN)
    assert 0.5 * sigma < flat.noise_multiplier < sigma


def test_a_noise_schedule_scales_the_noise_that_is_added(monkeypatch):
    honest, added = CliplessDPOptimizer.step, []

    def watching(optimizer):
        added.append(optimizer.noise_deviations()["0.weight"])
        honest(optimizer)

    monkeypatch.setattr(CliplessDPOptimizer, "step", watching)
    fit(gated_model(), samples(300), noise_schedule=halving, **RUN)
    # Deviations are σ times bounds that do not move, in float64.
    assert added == pytest.approx([added[0]] * 18 + [added[0] / 2] * 18, rel=1e-12)


def test_a_noise_schedule_resumes_where_it_was(tmp_path):
    settings = {**RUN, "reproducible_seed": 7, "noise_schedule": halving}
    whole, resumed = gated_model(), gated_model()
    expected = fit(whole, samples(300), **settings)
    with power_cut(20):
        fit(gated_model(), samples(300), checkpoint=tmp_path / "run.pt", **settings)
    result = fit(resumed, samples(300), checkpoint=tmp_path / "run.pt", **settings)
    assert torch.equal(weights(whole), weights(resumed))
    assert result.optimizer.accountant.history == expected.optimizer.accountant.history
    with pytest.raises(CheckpointError, match="noise_schedule"):
        fit(gated_model(), samples(300), checkpoint=tmp_path / "run.pt", **{**settings, "noise_schedule": None})


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_noise_schedule_out_of_range_is_refused_before_calibration(monkeypatch, factor):
    monkeypatch.setattr(plan, "calibrate_ledger", None)
    with pytest.raises(ConfigurationError, match="at step 3"):
        fit(gated_model(), samples(300), noise_schedule=lambda step, steps: factor if step == 3 else 1.0, **RUN)


def test_a_noise_schedule_leaves_room_for_what_was_released_before():
    accountant = RDPAccountant()
    accountant.step(noise_multiplier=2.0, sample_rate=1.0)
    result = fit(gated_model(), samples(300), noise_schedule=halving, **{**RUN, "accountant": accountant})
    sigma = result.noise_multiplier
    assert accountant.history == [(2.0, 1.0, 1), (sigma, 50 / 300, 18), (0.5 * sigma, 50 / 300, 18)]
    assert 0.98 * 4.0 < result.epsilon <= 4.0


def test_an_optimizer_may_be_named():
    named, built = gated_model(), gated_model()
    settings = {**RUN, "reproducible_seed": 3, "epochs": 1, "lr": 0.01}
    fit(named, samples(300), optimizer="adam", **settings)
    fit(built, samples(300), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01), **settings)
    assert torch.equal(weights(named), weights(built))
    with pytest.raises(ConfigurationError, match="'adam'"):
        fit(gated_model(), samples(300), optimizer="lion", **RUN)


def test_noise_that_was_calibrated_elsewhere_is_used_within_the_budget():
    calibrated = fit(gated_model(), samples(300), **RUN)
    noisier = fit(gated_model(), samples(300), noise_multiplier=2.0 * calibrated.noise_multiplier, **RUN)
    assert noisier.noise_multiplier == 2.0 * calibrated.noise_multiplier
    assert noisier.steps == calibrated.steps
    assert noisier.epsilon < 0.6 * calibrated.epsilon
    with pytest.warns(UserWarning, match="training stops"):
        cut = fit(gated_model(), samples(300), noise_multiplier=0.7 * calibrated.noise_multiplier, **RUN)
    assert cut.steps < calibrated.steps
    assert cut.epsilon <= RUN["epsilon"]
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigurationError, match="noise_multiplier"):
            fit(gated_model(), samples(300), noise_multiplier=bad, **RUN)


def test_numbers_of_numpy_in_the_settings_leave_a_checkpoint_that_can_be_read(tmp_path):
    path = tmp_path / "run.pt"
    options = {"lr": np.float64(0.1), "momentum": np.float64(0.5), "ema": np.float64(0.5)}
    run = {"epsilon": 3.0, "delta": 1e-3, "epochs": 1, "batch_size": 50, "progress": False, "accountant": "rdp"}
    fit(gated_model(), samples(100), checkpoint=path, **options, **run)
    again = fit(gated_model(), samples(100), checkpoint=path, **options, **run)
    assert again.steps == 2


@pytest.mark.parametrize("trainable", ["none", "frozen"])
def test_a_network_without_parameters_to_train_is_refused_before_anything_is_charged(trainable):
    if trainable == "none":
        model = DPLipModel(nn.Flatten(), input_shape=(6,), input_norm=3.0, loss=losses.TauCrossEntropy())
    else:
        model = gated_model()
        model.net.requires_grad_(False)
    accountant = RDPAccountant()
    with pytest.raises(ConfigurationError, match="no parameters to train"):
        fit(model, samples(60), **{**RUN, "accountant": accountant})
    assert len(accountant) == 0
    with pytest.raises(ConfigurationError, match="no parameters to train"):
        audit.sensitivity(model)


def test_training_losses_are_neither_shown_nor_pickled_with_the_history_and_stay_in_its_copies():
    result = fit(gated_model(), samples(60), **{**RUN, "epochs": 2, "validation": samples(40)})
    records = result.history
    assert all(record.loss is not None for record in records)
    for shown in (repr(records), repr(result), str(result)):
        assert not any(str(record.loss) in shown for record in records)
    stored = pickle.dumps(records)
    assert not any(struct.pack(">d", record.loss) in stored for record in records)
    assert pickle.loads(stored) == protected(records)
    assert copy.deepcopy(records) == copy.copy(records) == records


def test_where_a_public_size_is_given_the_number_of_rows_chooses_no_padding(monkeypatch):
    usual, counts = sizing.usual_rows, []

    def noted(count, sample_rate):
        counts.append(count)
        return usual(count, sample_rate)

    monkeypatch.setattr(sizing, "usual_rows", noted)
    settings = {"epsilon": 3.0, "delta": 1e-3, "epochs": 1, "batch_size": 50, "dataset_size": 100}
    for rows in (100, 101):
        fit(gated_model(), samples(rows), accountant="rdp", audit=False, progress=False, **settings)
    assert counts == [100, 100]


def test_where_no_terminal_is_progress_is_a_line_an_epoch_without_the_private_loss(capsys):
    result = fit(gated_model(), samples(60), validation=samples(20, seed=1), **{**RUN, "progress": True})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(result.history) > 1
    for line, record in zip(lines, result.history, strict=True):
        assert line.startswith(f"step {record.step} of {result.steps}: ε={record.epsilon:.3f}")
        assert f"accuracy={100 * record.accuracy:.2f}%" in line
        assert "loss" not in line
