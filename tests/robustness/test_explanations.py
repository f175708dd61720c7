"""Maps are the slopes of the values that a network is deployed with, whatever gates it trained with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, InputError, layers
from clipless_dp.robustness import networks, plain_network, saliency, score_gradients, smooth_grad
from clipless_dp.robustness.explanations import Reduce
from tests.robustness.nets import NETWORKS, points, seeded, wrapped
from tests.soundness.mutation import Mutant


def linear(outputs: int, inputs: int = 5) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).double()
    assert isinstance(layer, nn.Linear)
    return layer


def test_the_map_of_a_linear_network_is_the_size_of_its_weights() -> None:
    inputs = points(6, 5)
    layer = seeded(lambda: linear(1))
    weight = layer.weight.detach()
    for score in ("class", "margin"):
        assert torch.equal(saliency(layer, inputs, score=score), weight.abs().expand(6, 5))  # type: ignore[arg-type]
    layer = seeded(lambda: linear(3))
    weight, best = layer.weight.detach(), layer(inputs).argsort(1, descending=True)
    assert torch.allclose(saliency(layer, inputs, score="class"), weight[best[:, 0]].abs(), rtol=1e-15)
    assert torch.allclose(saliency(layer, inputs), (weight[best[:, 0]] - weight[best[:, 1]]).abs(), rtol=1e-15)
    assert torch.allclose(saliency(layer, inputs, 2, score="class"), weight[2].abs().expand(6, 5), rtol=1e-15)
    mixed = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.allclose(saliency(layer, inputs, mixed, score="class"), weight[mixed].abs(), rtol=1e-15)
    own = saliency(layer, inputs, mixed, score=lambda scores, targets: 3.0 * scores.gather(1, targets[:, None])[:, 0])
    assert torch.allclose(own, 3.0 * weight[mixed].abs(), rtol=1e-15)


@pytest.mark.parametrize("name", ["orthogonal", "spectral, one output", "convolutions", "signal gates", "residual"])
@pytest.mark.parametrize("score", ["class", "margin", "probability"])
def test_gradients_are_those_of_finite_differences(name: str, score: str) -> None:
    model = seeded(NETWORKS[name]).double()
    inputs, step = points(4, *model.input_shape), 1e-6 * points(4, *model.input_shape, seed=9)
    own = plain_network(model)(inputs).argmax(1)
    _, gradients = score_gradients(model, inputs, score=score)  # type: ignore[arg-type]
    ahead, behind = (
        score_gradients(model, inputs + sign * step, own, score=score)[0]  # type: ignore[arg-type]
        for sign in (1.0, -1.0)
    )
    along = (gradients * step).flatten(1).sum(1)
    # Second-order terms vanish but at kinks; differences of 1e-6 keep ten digits.
    assert torch.allclose(ahead - behind, 2.0 * along, rtol=1e-4, atol=1e-12)


def test_a_mutant_that_differentiates_through_gates_draws_another_map(monkeypatch: pytest.MonkeyPatch) -> None:
    body = seeded(lambda: nn.Sequential(nn.Linear(5, 8), layers.GroupSort(2), nn.Linear(8, 3))).double()
    model = wrapped(nn.Sequential(body, layers.CotangentGate(0.1)), (5,), input_norm=100.0)
    inputs = points(4, 5)
    true = saliency(body, inputs)
    assert torch.allclose(saliency(model, inputs), true, rtol=1e-12)
    Mutant("gates stay", networks, "_without_gates", "isinstance(child, CotangentGate)", "False").apply(monkeypatch)
    assert not torch.allclose(saliency(model, inputs), true, rtol=0.5)


def test_nothing_of_the_model_changes() -> None:
    model = seeded(NETWORKS["orthogonal"])
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    inputs = points(3, 5).float().requires_grad_()
    saliency(model, inputs)
    smooth_grad(model, inputs, draws=2)
    assert inputs.grad is None
    assert all(parameter.grad is None for parameter in model.net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())


@pytest.mark.parametrize(("reduce", "shape"), [("max", (4, 3, 2)), ("mean", (4, 3, 2)), (None, (4, 2, 3, 2))])
def test_channels_are_reduced_as_is_said(reduce: Reduce, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Flatten(), seeded(lambda: linear(1, 12)))
    inputs = points(4, 2, 3, 2)
    found = saliency(net, inputs, reduce=reduce)
    assert found.shape == shape
    sizes = net[1].weight.detach().abs().reshape(2, 3, 2)
    expected = {"max": sizes.amax(0), "mean": sizes.mean(0), None: sizes}[reduce]
    # Flattening copies nothing, and a mean rounds once.
    assert torch.allclose(found, expected.expand(shape), rtol=1e-14)


class Folded(nn.Module):
    """``Σ|x|``, whose slope jumps at 0, and a constant."""

    def forward(self, inputs: Tensor) -> Tensor:
        total = inputs.abs().sum(1)
        return torch.stack((total, torch.zeros_like(total)), 1)


def test_smoothing_averages_slopes_with_their_signs() -> None:
    inputs = torch.tensor([[1e-3, 3.0]], dtype=torch.float64)
    assert torch.equal(saliency(Folded(), inputs, 0), torch.ones(1, 2, dtype=torch.float64))
    smooth = smooth_grad(Folded(), inputs, 0, deviation=0.5, draws=400)
    # The mean of 400 signs has a deviation of 0.05; without signs it would be 1.
    assert float(smooth[0, 0]) < 0.2
    # Six deviations away no sign changes.
    assert float(smooth[0, 1]) == pytest.approx(1.0, rel=1e-12)


def test_smoothing_is_seeded_and_no_map_depends_on_its_company() -> None:
    model, inputs = seeded(NETWORKS["residual"]).double(), points(5, 5)
    first, again = (smooth_grad(model, inputs, draws=6, rng_seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, smooth_grad(model, inputs, draws=6, rng_seed=4))
    alone = smooth_grad(model, inputs[3:4], draws=6, rng_seed=3)
    # Products of other sizes round in another order.
    assert torch.allclose(alone, first[3:4], rtol=1e-9, atol=1e-12)
    assert torch.allclose(smooth_grad(model, inputs, draws=6, rng_seed=3, batch_size=2), first, rtol=1e-9, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    model, inputs = seeded(NETWORKS["orthogonal"]).double(), points(3, 5)
    for wrong in ({"score": "logit"}, {"reduce": "sum"}, {"batch_size": 0}, {"target": -1}, {"target": 1.0}):
        with pytest.raises(ConfigurationError):
            saliency(model, inputs, **wrong)  # type: ignore[arg-type]
    for wrong in ({"deviation": 0.0}, {"draws": 0}, {"rng_seed": 0.5}):
        with pytest.raises(ConfigurationError):
            smooth_grad(model, inputs, **wrong)  # type: ignore[arg-type]
    lost = inputs.clone()
    lost[1, 2] = float("nan")
    for bad in (lost, inputs[:0], inputs[:, :3], inputs.long(), inputs.flatten(), None, [1.0]):
        with pytest.raises(InputError):
            saliency(model, bad)  # type: ignore[arg-type]
    for target in (3, torch.tensor([0, 1]), torch.tensor([0, 1, 3]), torch.tensor([0.0, 1.0, 2.0])):
        with pytest.raises(InputError):
            saliency(model, inputs, target)
    with pytest.raises(InputError, match="one number for each"):
        saliency(model, inputs, score=lambda scores, _: scores)
    with pytest.raises(ConfigurationError, match="torch module"):
        saliency(lambda values: values, inputs)  # type: ignore[arg-type]
