"""No structured signal and no gradient ascent passes a bound; linear and convolution bounds are nearly attained."""

from __future__ import annotations

import pytest
import torch

from clipless_dp import DPLipModel, losses
from tests.soundness.attack import Case, Record, add_or_remove_one, ascend, attack, brute_force, observed
from tests.soundness.cases import CASES, OneCase, case_named
from tests.support import one_in_two

# Neighbours in the list share their rule.
cases = pytest.mark.parametrize("case", one_in_two(CASES), ids=lambda case: case.name)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


@cases
class TestEveryRule(OneCase):
    # The slow adversary below climbs sixty.
    steps = 3


@pytest.mark.slow
@cases
def test_a_patient_adversary_passes_no_bound(case: Case) -> None:
    record = brute_force(case)
    for key in list(record.worst):
        for restart in range(3):
            if restart:
                sample, target = record.signals[key]
                record.signals[key] = sample + torch.randn_like(sample), target + torch.randn_like(target)
            ascend(record, case, key, steps=60)


def test_layers_that_keep_norms_attain_their_bounds_on_activations_and_cotangents() -> None:
    for name in ("GroupSort 3", "MaxMin on maps", "Householder", "centering", "identity"):
        worst = attack(case_named(name), steps=4)
        assert worst["after.input"] > 0.999
        assert worst["before.shift"] > 0.999


LOSSES: tuple[tuple[losses.Loss, torch.Tensor], ...] = (
    (losses.TauCrossEntropy(8.0), torch.arange(4)),
    (losses.TauCrossEntropy(0.01), torch.arange(4)),
    (losses.BinaryCrossEntropy(3.0), torch.eye(4, dtype=torch.float64)),
    (losses.MulticlassHinge(2.0), torch.arange(4)),
    (losses.CosineSimilarity(0.5), torch.arange(4)),
    (losses.CosineSimilarity(0.5), torch.eye(4, dtype=torch.float64) - 0.3),
    (losses.MeanAbsoluteError(), 100.0 * torch.eye(4, dtype=torch.float64)),
    (losses.Huber(2.0), 100.0 * torch.eye(4, dtype=torch.float64)),
    (losses.BoundedLoss(lambda output, target: output.pow(3).sum(1), bound=0.1), torch.arange(4)),
)


@pytest.mark.parametrize(("loss", "targets"), LOSSES, ids=lambda value: getattr(value, "__name__", repr(value)[:40]))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_no_loss_at_any_scale_passes_the_bounds_of_a_convolutional_network(
    loss: losses.Loss, targets: torch.Tensor, scale: float
) -> None:
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(27, 4)
    ).double()
    model = DPLipModel(net, input_shape=(1, 7, 7), input_norm=2.0, loss=loss)
    record = Record(model)
    for sample in (torch.ones(1, 7, 7), torch.eye(7)[None] * 1e6, torch.randn(1, 7, 7), torch.zeros(1, 7, 7)):
        for target in targets:
            record.try_(sample.double(), target, scale=scale)
    assert record.worst["3.bias"] > 0.0


def test_an_outlier_moves_the_summed_gradient_by_its_own_bound_and_no_other_sample() -> None:
    case = case_named("linear")
    model = case.model()
    inputs = torch.randn(5, 6, dtype=torch.float64)
    targets = torch.randn(5, 5, dtype=torch.float64)
    inputs[-1], targets[-1] = -1e6 * inputs[0], 1e6 * targets[0]
    assert add_or_remove_one(model, inputs, targets) > 0.9


def test_float32_gradients_stay_below_the_bound_but_for_their_own_rounding() -> None:
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 16, 5))
    model = DPLipModel(net, input_shape=(1, 6, 6), input_norm=1.0, loss=losses.TauCrossEntropy(4.0))
    bounds = model.sensitivity().per_parameter
    for sample in (1e4 * torch.ones(1, 6, 6), torch.randn(1, 6, 6), 3.0 * torch.eye(6)[None]):
        for label in range(5):
            for name, norm in observed(model, sample, torch.tensor(label)).items():
                # 64 + 36 products in float32: γ_100 ≈ 100·2^-24 = 6e-6, relative to norms that the bound caps.
                assert float(norm.detach()) <= bounds[name] * (1.0 + 1e-5)
