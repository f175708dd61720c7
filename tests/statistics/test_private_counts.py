"""The exact count of rejected samples is the data's owner's: whoever gets anything else of a model must not get it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from clipless_dp import fit
from clipless_dp.model import DPLipModel
from clipless_dp.search import Candidate, private_search
from tests.support import every_copy, gated_model, samples

MANY = 0x5EED_0F_BAD


def counted_model(count: int = MANY) -> DPLipModel:
    model = gated_model()
    model.nonfinite_samples.fill_(count)
    return model


def pickled(model):
    return pickle.dumps(model)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


def saved_state(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, labels):
        return self.model.loss(self.model(inputs), labels)


def exported(model, *, strict=False, loss=False):
    inputs, labels = samples(4)
    module, arguments = (Step(model), (inputs, labels)) if loss else (model, (inputs,))
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, arguments, strict=strict), buffer)
    return buffer.getvalue()


def check_that_files_hold_no_count(write):
    content = write(counted_model())
    # As a tensor's entry or as pickle writes an integer of this size.
    assert MANY.to_bytes(5, "little") not in content
    assert str(MANY).encode() not in content


WRITERS = {
    "pickle": pickled,
    "torch.save": saved,
    "state dict": saved_state,
    "pickle of a copy": lambda model: pickled(copy.copy(model)),
    "pickle of a module that holds it": lambda model: pickled(nn.Sequential(model)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_no_file_of_a_model_holds_the_count_of_its_rejected_samples(write):
    check_that_files_hold_no_count(write)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch does not tell when it exports")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("loss", [False, True], ids=["model", "model and loss"])
def test_no_exported_graph_holds_the_count_of_rejected_samples(strict, loss):
    check_that_files_hold_no_count(lambda model: exported(model, strict=strict, loss=loss))


def test_a_count_that_is_left_in_the_files_is_noticed(monkeypatch):
    honest = DPLipModel.__getstate__
    for kept in (int, torch.clone):
        monkeypatch.setattr(
            DPLipModel, "__getstate__", lambda self, kept=kept: {**honest(self), "kept": kept(self.nonfinite_samples)}
        )
        with pytest.raises(AssertionError):
            check_that_files_hold_no_count(pickled)


@every_copy
def test_copies_start_from_zero_and_count_for_themselves(copied):
    model = counted_model()
    other = copied(model)
    assert int(other.nonfinite_samples) == 0
    inputs, labels = samples(3)
    labels[1] = 99
    other.loss(other(inputs), labels).backward()
    assert (int(other.nonfinite_samples), int(model.nonfinite_samples)) == (1, MANY)


def test_a_file_of_a_former_version_does_not_hand_its_count_on():
    model = gated_model()
    state = model.__getstate__()
    state["_buffers"] = {"nonfinite_samples": torch.tensor(MANY)}
    state["_non_persistent_buffers_set"] = {"nonfinite_samples"}
    other = object.__new__(DPLipModel)
    other.__setstate__(state)
    assert int(other.nonfinite_samples) == 0
    check_that_files_hold_no_count(lambda _: pickled(other))


@pytest.mark.parametrize("bad", [False, True], ids=["all labels known", "one label out of range"])
def test_the_result_of_a_search_does_not_tell_whether_a_sample_was_rejected(bad):
    inputs, labels = samples(100)
    if bad:
        labels[0] = 7
    candidate = Candidate(gated_model, {"epochs": 4, "batch_size": 100, "lr": 0.1})
    result = private_search(
        [candidate], (inputs, labels), epsilon=4.0, delta=1e-3, mean_runs=1.0, validation=samples(20, 1)
    )
    assert int(result.model.nonfinite_samples) == 0


def test_the_owner_is_told_the_count_by_fit_and_by_the_model():
    inputs, labels = samples(100)
    labels[:3] = 7
    model = gated_model()
    with pytest.warns(UserWarning, match="6 samples in batches contributed nothing"):
        fit(
            model, (inputs, labels), epsilon=4.0, delta=1e-3, epochs=2, batch_size=100, progress=False, accountant="rdp"
        )
    assert model.nonfinite_samples.dtype == torch.int64
    assert int(model.nonfinite_samples) == 6


def test_compiled_passes_count_too():
    model = gated_model()
    inputs, labels = samples(5)
    labels[2] = -4

    @torch.compile(fullgraph=True, backend="eager")
    def passed(some, truth):
        return model.loss(model(some), truth)

    for count in (1, 2):
        passed(inputs, labels).backward()
        assert int(model.nonfinite_samples) == count


def test_the_count_follows_casts_and_is_no_buffer():
    model = counted_model(3).double()
    assert (int(model.nonfinite_samples), model.nonfinite_samples.dtype) == (3, torch.int64)
    assert list(model.named_buffers()) == []
