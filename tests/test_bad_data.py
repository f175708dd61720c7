"""Data and files that nobody meant: the guarantee holds, or a typed error says why."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from accounting import AccountingError, GaussianStep, GaussianVectorStep, Ledger, PoissonSampling, RDPAccountant
from clipless_dp import (
    BudgetExhaustedError,
    CheckpointError,
    CliplessDPSGD,
    CliplessError,
    DPLipModel,
    InputError,
    PoissonBatches,
    constraints,
    fit,
    gated,
    gradient_gated,
    losses,
)
from clipless_dp import checkpoint as checkpoint_module
from clipless_dp.checkpoint import load_checkpoint
from clipless_dp.cli import main
from clipless_dp.training import Watcher, plan, watched_by

from .support import gated_model, samples

quick = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
thorough = settings(max_examples=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])

EXTREMES = [0.0, -0.0, 1.0, -1e-3, 1e-45, 1.2e-38, -1e-40, 3e38, -3.4e38, 1e20, math.inf, -math.inf, math.nan]
values = st.one_of(st.sampled_from(EXTREMES), st.floats(width=32))


def models():
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    loss = losses.TauCrossEntropy(2.0)
    return {
        "gated": DPLipModel(gated(net(), cotangent_mode="normalize"), input_shape=(4,), input_norm=1.0, loss=loss),
        "gradient gates": DPLipModel(gradient_gated(net()), input_shape=(4,), input_norm=1.0, loss=loss),
        "orthogonal": DPLipModel(
            net(), input_shape=(4,), input_norm=2.0, loss=loss, constraint=constraints.Orthogonal()
        ),
        "hinge": DPLipModel(gated(net()), input_shape=(4,), input_norm=1.0, loss=losses.MulticlassHinge()),
    }


MODELS = models()
rows = st.lists(
    st.tuples(st.lists(values, min_size=4, max_size=4), st.integers(-2, 5), st.booleans()), min_size=0, max_size=6
)


def gradients(model, inputs, targets, mask):
    model.zero_grad()
    model.loss(model(inputs), targets, mask).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.net.named_parameters()}


@quick
@given(rows, st.sampled_from(sorted(MODELS)))
def test_whatever_the_numbers_labels_and_masks_every_sample_stays_within_its_bound(batch, name):
    model = MODELS[name]
    bounds = model.sensitivity().per_parameter
    inputs = torch.tensor([row[0] for row in batch], dtype=torch.float32).view(-1, 4)
    targets = torch.tensor([row[1] for row in batch], dtype=torch.int64)
    mask = torch.tensor([row[2] for row in batch], dtype=torch.bool)
    together = gradients(model, inputs, targets, mask)
    total = {parameter: torch.zeros_like(gradient) for parameter, gradient in together.items()}
    for index in range(len(batch)):
        alone = gradients(model, *(part[index : index + 1] for part in (inputs, targets, mask)))
        for parameter, gradient in alone.items():
            # Float32 rounding of the products, which bounds leave out: see docs/guarantee.md.
            assert float(gradient.norm()) <= bounds[parameter] * (1 + 1e-4)
            assert mask[index] or not gradient.any()
            total[parameter] += gradient
    for parameter, gradient in together.items():
        assert torch.isfinite(gradient).all()
        # Samples do not interact, however extreme one is: the batch is the sum, up to rounding.
        torch.testing.assert_close(gradient, total[parameter], rtol=1e-4, atol=1e-5 * bounds[parameter])


@quick
@given(
    st.sampled_from(
        [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
    ),
    st.lists(st.integers(0, 5), max_size=4),
)
def test_other_dtypes_and_shapes_are_refused_in_words(dtype, shape):
    with pytest.raises(InputError):
        MODELS["gated"](torch.zeros(shape, dtype=dtype))


@quick
@given(st.lists(st.integers(0, 5), max_size=4))
def test_shapes_other_than_the_models_own_are_refused_in_words(shape):
    inputs = torch.zeros(shape)
    if len(shape) == 2 and shape[1] == 4:
        assert MODELS["gated"](inputs).shape == (shape[0], 3)
    else:
        with pytest.raises(InputError, match="shape"):
            MODELS["gated"](inputs)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_complex_targets_are_refused_instead_of_halved(name):
    with pytest.raises(InputError, match="complex64"):
        MODELS[name].loss(MODELS[name](torch.ones(3, 4)), torch.zeros(3, dtype=torch.complex64))


@quick
@given(
    st.sampled_from(sorted(MODELS)),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.int64, torch.float32, torch.bool, torch.uint8, torch.complex64]),
    st.none() | st.tuples(st.lists(st.integers(0, 4), max_size=2), st.sampled_from([torch.bool, torch.int64])),
)
def test_targets_and_masks_of_any_shape_and_dtype_are_taken_or_refused_in_words(name, shape, dtype, mask):
    model = MODELS[name]
    try:
        loss = model.loss(
            model(torch.ones(3, 4)),
            torch.zeros(shape, dtype=dtype),
            None if mask is None else torch.zeros(mask[0], dtype=mask[1]),
        )
    except CliplessError:
        return
    assert loss.shape == ()
    assert shape == [3]
    assert mask is None or (mask == ([3], torch.bool) and float(loss.detach()) == 0.0)


@quick
@given(rows, st.integers(1, 3))
def test_training_on_any_data_leaves_finite_weights_and_counts_every_step(batch, steps):
    inputs = torch.tensor([row[0] for row in batch], dtype=torch.float32).view(-1, 4)
    targets = torch.tensor([row[1] for row in batch], dtype=torch.int64)
    # Passes of the tests before are owed by the model that they were made with.
    model = copy.deepcopy(MODELS["gated"])
    if not batch:
        with pytest.raises(CliplessError, match="need as many of each"):
            PoissonBatches((inputs, targets), sample_rate=0.5, steps=steps)
        return
    optimizer = CliplessDPSGD(
        model, lr=0.1, noise_multiplier=1.0, sample_rate=0.5, dataset_size=len(batch), accountant=RDPAccountant()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The model's former optimizers had ledgers of their own.
        for some, labels, mask in PoissonBatches((inputs, targets), sample_rate=0.5, steps=steps):
            optimizer.zero_grad()
            model.loss(model(some), labels, mask).backward()
            optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.5, steps)]
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.net.parameters())


STRANGE = [None, True, -1, 0, 1, 10**30, -(10**30), 1e308, 1e-320, math.nan, math.inf, "", "0", "poisson", [], {}, [[]]]
strange = st.one_of(
    st.sampled_from(STRANGE),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.recursive(st.none(), lambda child: st.lists(child, max_size=2) | st.dictionaries(st.text(max_size=3), child)),
)


def places(value, path=()):
    """The paths of everything inside nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutated(data, value):
    """A copy of nested plain values in which up to three parts are replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            break
        *way, last = data.draw(st.sampled_from(found))
        owner = value
        for key in way:
            owner = owner[key]
        action = data.draw(st.sampled_from(["replace", "remove", "double"]))
        if action == "remove":
            del owner[last]
        elif action == "double" and isinstance(owner, list):
            owner.append(owner[last])
        else:
            owner[last] = copy.deepcopy(data.draw(strange))  # What is drawn is shared by all examples.
    return value


def ledger_state():
    ledger = Ledger()
    ledger.append(GaussianStep(1.5, PoissonSampling(0.1)), 7)
    ledger.append(GaussianVectorStep((2.0, 3.0), PoissonSampling(0.1)), 2)
    return ledger.state_dict()


def require_ledger_or_refusal(data):
    state = mutated(data, ledger_state())
    for read in (Ledger.from_state_dict, lambda some: Ledger.from_json(json.dumps(some))):
        try:
            ledger = read(state)
        except AccountingError:
            continue
        # What is read is a ledger: it survives its own form, and its numbers are counts.
        assert Ledger.from_json(ledger.to_json()) == ledger
        assert all(count > 0 for _, count in ledger)
    try:
        accountant = RDPAccountant()
        accountant.load_state_dict({"format": "accounting.state", "version": 1, "ledger": state})
    except AccountingError:
        assert len(accountant) == 0


@quick
@given(st.data())
def test_a_mutated_ledger_is_a_ledger_or_refused(data):
    require_ledger_or_refusal(data)


@pytest.mark.slow
@thorough
@given(st.data())
def test_thousands_of_mutated_ledgers_are_ledgers_or_refused(data):
    require_ledger_or_refusal(data)


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize("sampling", [math.nan, None, "poisson", 0.1, []])
def test_a_ledger_whose_sampling_is_no_sampling_is_refused(line, sampling):
    state = ledger_state()
    state["entries"][line]["event"]["sampling"] = sampling
    with pytest.raises(AccountingError):
        Ledger.from_state_dict(state)


@quick
@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_bytes_that_are_no_ledger_are_refused(tmp_path, content):
    path = tmp_path / "ledger.json"
    path.write_bytes(content)
    with pytest.raises(AccountingError):
        Ledger.load(path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 5000, b'{"format": "accounting.ledger"}', b"\xff\xfe"])
def test_files_that_trip_parsers_are_refused(tmp_path, content):
    path = tmp_path / "ledger.json"
    path.write_bytes(content)
    with pytest.raises(AccountingError):
        Ledger.load(path)


@quick
@given(st.data())
def test_a_mutated_accountant_state_of_another_library_is_read_or_refused(data):
    state = mutated(data, {"history": [[1.0, 0.1, 5], [2.0, 1.0, 1]], "mechanism": "rdp"})
    accountant = RDPAccountant()
    try:
        accountant.load_state_dict(state)
    except AccountingError:
        assert len(accountant) == 0


RUN = {"epsilon": 4.0, "delta": 1e-3, "epochs": 1, "batch_size": 50, "lr": 0.5, "progress": False, "accountant": "rdp"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.pt"
    fit(gated_model(), samples(300), checkpoint=path, **RUN)
    return load_checkpoint(path)


def sealed(path, content):
    """Writes any content as a checkpoint whose digest fits."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue() + checkpoint_module._seal(buffer.getvalue()))


@pytest.fixture
def calibrated(written, monkeypatch):
    """What was written, whose noise ``fit`` need not calibrate again for each example."""
    multiplier = written["settings"]["noise_multiplier"]
    monkeypatch.setattr(plan, "calibrate_noise_multiplier", lambda **known: multiplier)
    return written


def require_checkpoint_or_refusal(data, written, path):
    content = mutated(data, written)
    sealed(path, content)
    model = gated_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = fit(model, samples(300), checkpoint=path, **RUN)
        except (CliplessError, AccountingError):
            return
    accountant = result.optimizer.accountant
    assert len(accountant) >= result.optimizer.steps_taken >= 0
    # A ledger that was altered to cost more than the target is reported as it is, and nothing is added to it.
    if result.epsilon > 4.0:
        stored = content["optimizer"]["clipless_dp"]["accountant"]["ledger"]
        assert accountant.ledger == Ledger.from_state_dict(stored)


@settings(quick, max_examples=15)
@given(st.data())
def test_a_mutated_checkpoint_is_gone_on_from_or_refused(calibrated, tmp_path, data):
    require_checkpoint_or_refusal(data, calibrated, tmp_path / "run.pt")


@pytest.mark.slow
@settings(thorough, max_examples=500)
@given(st.data())
def test_hundreds_of_mutated_checkpoints_are_gone_on_from_or_refused(calibrated, tmp_path, data):
    require_checkpoint_or_refusal(data, calibrated, tmp_path / "run.pt")


@pytest.mark.parametrize("value", [math.inf, -1, 7, "many", None])
def test_a_checkpoint_whose_steps_are_not_those_of_its_ledger_is_refused(written, tmp_path, value):
    content = copy.deepcopy(written)
    content["optimizer"]["clipless_dp"]["steps_taken"] = value
    sealed(tmp_path / "run.pt", content)
    with pytest.raises(CliplessError):
        fit(gated_model(), samples(300), checkpoint=tmp_path / "run.pt", **RUN)


@quick
@given(st.binary(max_size=300))
def test_bytes_that_are_no_checkpoint_are_refused_even_with_a_digest(tmp_path, content):
    path = tmp_path / "run.pt"
    for form in (content, content + checkpoint_module._seal(content)):
        path.write_bytes(form)
        with pytest.raises(CheckpointError, match=r"run\.pt"):
            load_checkpoint(path)


OPTIONS = [
    "--epsilon", "--delta", "--epochs", "--batch-size", "--micro-batch-size", "--lr", "--momentum", "--tau",
    "--input-norm", "--route", "--accountant", "--allocation", "--device", "--noise", "--init-seed",
    "--reproducible-seed", "--report", "--checkpoint", "--data-dir", "--preset", "--cache-dir", "--optimizer",
    "--lr-schedule", "--noise-schedule", "--ema", "--augment", "--multiplicity", "--classes", "--dataset-size",
]  # fmt: skip
WORDS = ["", "0", "-1", "1", "3", "1e-3", "1e400", "-0.0", "nan", "inf", "1e-320", "64", "99999999999999999999"]
WORDS += [
    "x",
    "gated",
    "transfer",
    "adam",
    "1.5:0.7",
    "1e-320:1e300",
    "spectral",
    "rdp",
    "auto",
    "cpu",
    "cuda:99",
    "meta",
    "secure",
    "/",
    "\0",
    "a\nb",
    "é",
    "--quiet",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "table.npz"
    generator = np.random.default_rng(0)
    np.savez(path, X=generator.normal(size=(100, 3)), y=generator.integers(0, 2, 100))
    return path


class NoStep(Watcher):
    def before_step(self, run, batch):
        raise BudgetExhaustedError("none is taken")


def require_status(arguments, table, folder, monkeypatch):
    monkeypatch.chdir(folder)
    base = ["train", "--dataset", str(table), "--epsilon", "3", "--delta", "1e-3", "--batch-size", "40", "--quiet"]
    try:
        # Everything but the steps themselves, of which there may be millions.
        with watched_by(NoStep()):
            status = main([*base, "--classes", "2", "--accountant", "rdp", *arguments])
    except SystemExit as refusal:
        status = refusal.code
    assert status in (0, 2), arguments


command_lines = st.lists(
    st.tuples(st.sampled_from(OPTIONS), st.sampled_from(WORDS) | st.text(max_size=4)).map(list), max_size=3
).map(lambda pairs: [word for pair in pairs for word in pair])


@settings(quick, max_examples=30)
@given(command_lines)
@pytest.mark.filterwarnings("ignore")
def test_any_command_line_ends_in_success_or_refusal(table, tmp_path, monkeypatch, capsys, arguments):
    require_status(arguments, table, tmp_path, monkeypatch)


@pytest.mark.slow
@settings(thorough, max_examples=1000)
@given(command_lines)
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_command_lines_end_in_success_or_refusal(table, tmp_path, monkeypatch, capsys, arguments):
    require_status(arguments, table, tmp_path, monkeypatch)
