"""Suggested gradient gates lower the bound and touch no sample that was seen; looking for them changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, InputError, gradient_gated, layers, losses, suggest_gates
from clipless_dp.model import suggestions
from tests.soundness.attack import per_sample_gradients


def loose_net() -> nn.Sequential:
    """A convolution whose bound is loose, and a dense layer whose bound is tight."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.PReLU(), layers.SphereScaling(1.0), nn.Flatten(), nn.Linear(144, 3)
    ).double()


def wrapped(net: nn.Module) -> DPLipModel:
    return DPLipModel(net, input_shape=(1, 6, 6), input_norm=2.0, loss=losses.TauCrossEntropy(4.0))


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def test_a_suggested_gate_lowers_the_bound_as_said_and_touches_no_sample_seen() -> None:
    net = loose_net()
    model = wrapped(net)
    found = suggest_gates(model, batch())
    assert [layer.path for layer in found.layers] == ["0", "5"]
    conv, dense = found.layers
    assert conv.pays
    assert not dense.pays
    assert found.total == model.sensitivity().total
    assert conv.bias_limit is not None
    gate = gradient_gated(net, layers=["0"], limit=conv.limit, bias_limit=conv.bias_limit, mode="clip")
    gated = wrapped(gate)
    # The caps' own float32 slack comes on top.
    assert gated.sensitivity().total == pytest.approx(found.suggested_total, rel=1e-3)
    assert found.suggested_total < found.total
    for sample, target in zip(*batch(), strict=True):
        before, after = per_sample_gradients(model, sample, target), per_sample_gradients(gated, sample, target)
        for name, gradient in before.items():
            assert torch.allclose(gradient, after[name], rtol=1e-9, atol=1e-12), name  # both in float64


def test_looking_for_gates_changes_nothing_and_gated_layers_get_no_other_gate() -> None:
    model = wrapped(gradient_gated(loose_net(), layers=["0"], limit=0.1))
    inputs, targets = batch()
    model.loss(model(inputs), targets).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    inputs[0] = float("nan")
    state = torch.get_rng_state()
    found = suggest_gates(model, (inputs, targets))
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.nonfinite_samples) == 0
    assert [layer.path for layer in found.layers] == ["5"]
    for before, after in zip(gradients, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        assert torch.equal(before, after)


def test_layers_whose_parameters_are_used_twice_are_left_out() -> None:
    shared, tied = nn.Linear(36, 36), nn.Linear(36, 36)
    net = nn.Sequential(nn.Flatten(), shared, nn.Tanh(), shared, tied, nn.Linear(36, 36), nn.Linear(36, 3))
    net[5].weight = tied.weight
    found = suggest_gates(wrapped(net.double()), batch(1))
    assert [layer.path for layer in found.layers] == ["6"]


def test_times_are_what_the_gate_adds_as_a_share_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(suggestions.time, "perf_counter", lambda: float(next(clock)))
    # Every measured pass takes one tick: a gate that costs as much as none adds nothing.
    assert [layer.seconds for layer in suggest_gates(wrapped(loose_net()), batch()).layers] == [0.0, 0.0]
    ticks = {"step": 5.0, "plain": 2.0, "gated": 3.0}
    answers = iter([[ticks["step"]], [ticks["plain"], ticks["gated"]], [ticks["plain"], ticks["plain"]]])
    monkeypatch.setattr(suggestions, "_seconds", lambda runs, device: next(answers))
    conv, dense = suggest_gates(wrapped(loose_net()), batch()).layers
    assert (conv.seconds, conv.share) == (1.0, 0.2)
    assert (dense.seconds, dense.share) == (0.0, 0.0)


def test_the_table_has_a_line_for_each_layer_and_the_call_that_makes_its_gate() -> None:
    found = suggest_gates(wrapped(loose_net()), batch())
    lines = str(found).splitlines()
    assert len(lines) == 2 + 2 + 1
    assert f"gradient_gated(net, layers=['0'], limit={found.layers[0].limit:g}" in lines[2]
    assert lines[3].endswith("–")
    assert "not private" in lines[-1]


def test_an_empty_batch_is_refused() -> None:
    inputs, targets = batch()
    with pytest.raises(InputError, match="at least one sample"):
        suggest_gates(wrapped(loose_net()), (inputs[:0], targets[:0]))
