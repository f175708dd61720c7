"""Maps and radii are of one sample; layers come in the order of a pass; probabilities are the loss's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import ConfigurationError, losses
from clipless_dp.robustness import Smoothed, attack, certify, metrics, plain_network, quality, saliency, smooth_grad
from clipless_dp.robustness.explanations import probabilities, score_values
from tests.robustness.nets import dense, points, wrapped


class Centred(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values - values.mean(0)


class Drawn(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values + torch.randn_like(values)


IMAGES = nn.Sequential(
    nn.Conv2d(1, 4, 3, padding=1),
    nn.BatchNorm2d(4, track_running_stats=False),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(64, 3),
)
MIXING = {
    "centred": (nn.Sequential(nn.Linear(4, 3), Centred()), (4,)),
    "batch norm": (IMAGES, (1, 4, 4)),
    "a front": (nn.Sequential(Centred(), nn.Linear(4, 3)), (4,)),
    "chance": (nn.Sequential(nn.Linear(4, 3), Drawn()), (4,)),
}


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", MIXING)
def test_a_network_that_mixes_rows_is_refused(name: str, count: int) -> None:
    net, shape = MIXING[name]
    inputs = points(count, *shape)
    for call in (
        lambda: certify(net, inputs, lipschitz=1.0),
        lambda: Smoothed(net, 0.3).certify(inputs, 5, 20),
        lambda: Smoothed(net, 0.3).predict(inputs, 20),
        lambda: attack(net, inputs),
        lambda: saliency(net, inputs),
        lambda: smooth_grad(net, inputs, draws=1),
    ):
        with pytest.raises(ConfigurationError, match="among other samples than alone"):
            call()


def test_running_statistics_mix_no_rows() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    for size in (1e-30, 1.0, 1e30):
        inputs = points(5, 4, size=size)
        assert torch.allclose(saliency(net, inputs)[:1], saliency(net, inputs[:1]), rtol=1e-9)


class Backwards(nn.Module):
    """Its layers are registered against their order in a pass; the attention's output layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.body = nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        values = self.body(values)[:, None]
        return self.head(self.attention(values, values, values, need_weights=False)[0][:, 0])


def test_weights_are_shuffled_from_the_last_layer_of_a_pass_on() -> None:
    names = list(metrics.randomisation(Backwards(), points(3, 4)))
    assert names[0] == "head"
    assert set(names[1:-1]) == {"attention", "attention.out_proj"}
    assert names[-1] == "body"


def test_the_probability_of_one_output_is_that_of_its_loss() -> None:
    model = wrapped(dense(4, 8, outputs=1), (4,))
    inputs, ones = points(5, 4), torch.ones(5, dtype=torch.long)
    plain = plain_network(model)
    outputs = plain.outputs(inputs)
    likely = score_values(plain, inputs, ones, "probability")
    assert torch.allclose(-likely.log(), losses.BinaryCrossEntropy().per_sample(outputs, ones))
    assert torch.allclose(probabilities(plain, plain(inputs), 3.0)[:, 1], torch.sigmoid(3.0 * outputs.flatten()))
    three = plain_network(wrapped(dense(4, 8), (4,)))
    found = score_values(three, inputs, ones, "probability")
    assert torch.allclose(found, three(inputs).softmax(1)[:, 1])
    assert len(quality(model, inputs).values) == 11
