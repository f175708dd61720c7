"""``model.export_net()``: gates and ball as ordinary operations, the same in every exporter."""

import math
import warnings

import pytest
import torch
from torch import nn

from clipless_dp import ConfigurationError, DPLipModel, constraints, gated, gradient_gated, layers, losses, presets
from clipless_dp.features import RandomCosines
from clipless_dp.gates import SphereScaling
from clipless_dp.gates.plain import plain_copy


def small():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), layers.GroupSort(2), nn.Flatten(), nn.Linear(4 * 36, 3))


def with_layer_norm():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.Linear(8, 3))


NETS = {
    "signal gates": lambda: gated(small()),
    "balls": lambda: gated(small(), input_mode="ball", input_norm=0.5),
    "gradient gates": lambda: gradient_gated(small()),
    "both": lambda: gated(gradient_gated(small())),
    "sample by sample": lambda: gradient_gated(with_layer_norm()),
    "constraints": small,
    "norms of groups": lambda: gated(nn.Sequential(layers.SampleGroupNorm(1, floor=0.1), *small())),
}


def model_of(name, norm=2.0):
    torch.manual_seed(0)
    constraint = constraints.Spectral() if name == "constraints" else None
    loss = losses.TauCrossEntropy(8.0)
    return DPLipModel(NETS[name](), input_shape=(1, 6, 6), input_norm=norm, loss=loss, constraint=constraint)


def rows():
    """On both sides of every gate, and some that have no norm."""
    values = torch.randn(9, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    values = values * torch.logspace(-4, 4, 9)[:, None, None, None]
    values[3], values[5], values[6, 0, 0, 0] = 0.0, math.nan, math.inf
    return values


def traced(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net, (torch.randn(4, 1, 6, 6),))


def exported(net):
    return torch.export.export(
        net, (torch.randn(4, 1, 6, 6),), dynamic_shapes=({0: torch.export.Dim("rows")},)
    ).module()


FORMS = {"itself": lambda net: net, "trace": traced, "export": exported}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETS)
def test_every_form_says_what_the_model_says(name, form):
    model = model_of(name)
    with torch.no_grad():
        expected = model.eval()(rows())
    # float32 of other kernels.
    torch.testing.assert_close(FORMS[form](model.export_net())(rows()), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert bool(expected[5].isnan().all())
    assert bool(expected[[0, 3, 8]].isfinite().all())


@pytest.mark.parametrize("name", NETS)
def test_in_float64_it_says_what_the_model_says_of_rows_of_every_size(name):
    model = model_of(name).double().eval()
    values = torch.randn(9, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = values * torch.logspace(0, 40, 9, dtype=torch.float64)[:, None, None, None]
    with torch.no_grad():
        expected = model(values)
    torch.testing.assert_close(model.export_net()(values), expected, equal_nan=True)
    assert bool(expected[:6].isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_onnx_says_what_the_model_says(name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = model_of(name)
    with torch.no_grad():
        expected = model.eval()(rows())
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("rows")},)
        torch.onnx.export(model.export_net(), (rows()[:4],), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(str(path))
    (scores,) = session.run(None, {session.get_inputs()[0].name: rows().numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_mutant_caught_the_network_without_its_gates_is_another_function():
    model = model_of("signal gates")
    without = small()
    without.load_state_dict(model.net.state_dict())
    with torch.no_grad():
        expected = model.eval()(rows())[:3]
        assert float((without(rows()[:3]) - expected).abs().max()) > 1e-3


def test_it_is_a_plain_copy_that_leaves_the_model_as_it_was():
    model = model_of("both").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    net = model.export_net()
    assert model.training
    assert not net.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    foreign = {type(part).__module__ for part in net.modules() if type(part).__module__.startswith("clipless_dp.gates")}
    assert foreign <= {"clipless_dp.gates.plain"}
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # Counts of private rows stay in the model.
    assert int(model.nonfinite_samples) == 0


def test_tokens_are_gated_too():
    net = gradient_gated(nn.Sequential(nn.EmbeddingBag(7, 4, mode="mean"), nn.Linear(4, 2)))
    model = DPLipModel(net, input_shape=(5,), loss=losses.TauCrossEntropy(1.0))
    tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 6, 6, 6, 7], [-1, 0, 0, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(model.export_net()(tokens), model.eval()(tokens), equal_nan=True)


class Mixing(nn.Module):
    """In ``eval`` mode too."""

    def forward(self, values):
        return values - values.mean(0, keepdim=True)


class Doubled(SphereScaling):
    """A subclass with a forward of its own has no plain form, and stays as it is."""

    def forward(self, values):
        return 2.0 * super().forward(values)


def test_what_mixes_rows_is_refused_and_a_subclass_of_a_gate_is_not_taken_for_it():
    net = gradient_gated(nn.Sequential(nn.Flatten(), nn.Linear(36, 3), Mixing()), isolation="vmap")
    model = DPLipModel(net, input_shape=(1, 6, 6), input_norm=1.0, loss=losses.TauCrossEntropy(1.0))
    with pytest.raises(ConfigurationError, match="something else"):
        model.export_net()
    gate = nn.Sequential(Doubled(1.0))
    torch.testing.assert_close(plain_copy(gate)(torch.ones(2, 3)), gate(torch.ones(2, 3)))


def test_what_is_used_twice_stays_one():
    shared = SphereScaling(2.0)
    copied = plain_copy(nn.Sequential(shared, nn.Linear(3, 3), shared))
    assert copied[0] is copied[2]


@pytest.mark.parametrize("columns", [1, 6])
def test_cosines_are_the_same_by_ordinary_operations(columns):
    cosines = RandomCosines(columns, 20)
    values = torch.randn(50, columns) * torch.logspace(-5, 5, 50)[:, None]
    torch.testing.assert_close(plain_copy(cosines)(values), cosines(values), rtol=1e-4, atol=1e-5)


def test_a_preset_is_exported_with_what_runs_before_it():
    images = torch.rand(30, 1, 8, 8)
    trained = presets.get("features-linear").fit(
        (images, torch.arange(30) % 2), outputs=2, epsilon=8.0, delta=1e-2, epochs=1, batch_size=30, audit=False,
        progress=False, accountant="rdp",
    )  # fmt: skip
    predictor = trained.predictor()
    torch.testing.assert_close(predictor.export_net()(images), predictor.scores(images), rtol=1e-4, atol=1e-5)
