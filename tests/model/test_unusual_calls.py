"""What a wrapped model cannot do is refused in words; what is near to it works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, DPLipModel, InputError, PoissonBatches, gated, layers, losses
from clipless_dp.errors import CliplessError


def model_of(net: nn.Module | None = None, shape: object = (8,)) -> DPLipModel:
    torch.manual_seed(0)
    return DPLipModel(net or nn.Linear(8, 3), input_shape=shape, input_norm=1.0, loss=losses.TauCrossEntropy())


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 8), torch.randint(3, (16,))


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(8, 3)


def wrapped_in_inference_mode() -> DPLipModel:
    net = nn.Linear(8, 3)
    with torch.inference_mode():
        return model_of(net)


def inputs_of_inference_mode() -> Tensor:
    with torch.inference_mode():
        return data()[0].clone()


def nested(layout: torch.layout) -> DPLipModel:
    net = nn.Linear(8, 3)
    net.register_buffer("parts", torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout))
    return model_of(net)


CALLS: dict[str, tuple[Callable[[], object], type[CliplessError], str]] = {
    "jit.trace": (lambda: torch.jit.trace(model_of(), data()[0]), ConfigurationError, "trace model.export_net"),
    "sparse": (lambda: model_of()(data()[0].to_sparse()), InputError, "to_dense"),
    "inference inputs": (lambda: model_of()(inputs_of_inference_mode()), InputError, "inference_mode"),
    "wrapped in inference mode": (wrapped_in_inference_mode, ConfigurationError, "inference_mode"),
    "made in inference mode": (lambda: model_of(made_in_inference_mode()), ConfigurationError, "inference_mode"),
    "vmap": (lambda: torch.func.vmap(model_of())(data()[0][:, None]), ConfigurationError, "torch.func"),
    "jvp": (lambda: torch.func.jvp(model_of(), data()[:1], data()[:1]), ConfigurationError, "torch.func"),
    "a size of -1": (lambda: model_of(shape=(-1,)), ConfigurationError, "input_shape"),
    "a number as shape": (lambda: model_of(shape=8), ConfigurationError, "input_shape"),
    "fractions": (lambda: model_of(shape=(8.5,)), ConfigurationError, "input_shape"),
    "text": (lambda: model_of(shape="8"), ConfigurationError, "input_shape"),
    "a nested buffer": (lambda: nested(torch.strided), ConfigurationError, "nested tensor"),
    "a jagged buffer": (lambda: nested(torch.jagged), ConfigurationError, "nested tensor"),
    "meta parameters": (lambda: model_of(nn.Linear(8, 3, device="meta")), ConfigurationError, "meta device"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("call", CALLS)
def test_calls_that_no_pass_covers_are_refused_in_words(call: str) -> None:
    run, kind, words = CALLS[call]
    with pytest.raises(kind, match=words):
        run()


def test_evaluation_in_inference_mode_works() -> None:
    model = model_of(shape=[8])
    with torch.inference_mode():
        assert model(inputs_of_inference_mode()).shape == (16, 3)
        assert model(data()[0]).shape == (16, 3)


LOSSES = {
    "cross-entropy": losses.TauCrossEntropy(),
    "a user's own": losses.BoundedLoss(nn.CrossEntropyLoss(reduction="none"), bound=2.0),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("loss", LOSSES)
def test_anomaly_detection_finds_nothing_in_padding(loss: str) -> None:
    model = DPLipModel(nn.Linear(8, 3), input_shape=(8,), input_norm=1.0, loss=LOSSES[loss])
    for inputs, targets, mask in PoissonBatches(data(), sample_rate=0.5, steps=1, physical_batch_size=16):
        assert not mask.all()
        with torch.autograd.detect_anomaly():
            model.loss(model(inputs), targets, mask).backward()
        assert model.net.weight.grad.isfinite().all()


def test_a_shared_spline_compiles_as_one_graph() -> None:
    model = model_of(nn.Sequential(nn.Linear(8, 8), layers.LinearSpline(channels=1), nn.Linear(8, 3)))
    inputs, targets = data()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: model.loss(model(x), y), fullgraph=True, backend="aot_eager")
    # The same float32 sums in other orders.
    torch.testing.assert_close(compiled(inputs, targets), model.loss(model(inputs), targets), rtol=1e-5, atol=1e-5)


def test_a_deep_copy_of_what_holds_models_copies_all_beside_them() -> None:
    def model() -> DPLipModel:
        net = gated(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        return DPLipModel(net, input_shape=(4,), input_norm=1.0, loss=losses.TauCrossEntropy())

    for _ in range(20):
        held: list[Any] = [model(), [object() for _ in range(20)], model(), {key: {} for key in range(50)}]
        held.append(held[0])
        copied = copy.deepcopy(held)
        assert copied[4] is copied[0] is not held[0]
        assert type(copied[2]) is DPLipModel
        assert all(type(one) is object for one in copied[1])
        assert copied[3] == held[3]
