"""`NoiseInjection`: its noise, and that bounds hold for every draw."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, ConfigurationError, DPLipModel, layers, losses
from clipless_dp.gates.arithmetic import per_sample
from clipless_dp.layers import NoiseInjection
from clipless_dp.testing import BoundBroken, LipschitzLayerTestCase


class TestNoiseInjection(LipschitzLayerTestCase):
    shapes = ((5,), (2, 3, 3))
    steps = 2

    def build(self, shape: tuple[int, ...]) -> nn.Module:
        return NoiseInjection(0.4, 0.5)


def test_uncut_noise_passes_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant."""

    def uncut(self: NoiseInjection, values: Tensor) -> Tensor:
        noise = torch.randn_like(values) * self.std
        return values + noise * per_sample(torch.ones(len(values)), noise).to(noise.dtype)

    monkeypatch.setattr(NoiseInjection, "forward", uncut)
    with pytest.raises(BoundBroken, match="Y"):
        TestNoiseInjection().test_no_signal_at_any_loss_scale_passes_a_bound()


def test_noise_is_gaussian_cut_to_the_ball_each_sample_s_own_and_absent_in_eval_mode() -> None:
    torch.manual_seed(0)
    values = torch.zeros(4000, 6)
    free, cut = NoiseInjection(0.5, 1e6)(values), NoiseInjection(0.5, 1.0)(values)
    assert float(free.std()) == pytest.approx(0.5, rel=0.03)
    assert float((free[0] - free[1]).norm()) > 0.0
    norms = cut.norm(dim=1)
    assert float(norms.max()) <= 1.0 + 1e-6
    # χ with six degrees of freedom is above two with a probability of 0.677.
    assert float((norms > 1.0 - 1e-6).double().mean()) == pytest.approx(0.677, abs=0.03)
    layer = NoiseInjection(0.5, 1.0).eval()
    assert torch.equal(layer(values), values)


def test_noise_is_drawn_anew_whatever_was_seeded_and_training_steps_are_private() -> None:
    net = nn.Sequential(nn.Linear(4, 4), NoiseInjection(0.5, 1.0), nn.Linear(4, 2))
    model = DPLipModel(net, input_shape=(4,), input_norm=1.0, loss=losses.MeanAbsoluteError())
    inputs, drawn = torch.randn(3, 4), []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(model(inputs).detach())
    assert not torch.equal(*drawn)
    optimizer = CliplessDPSGD(model, lr=0.1, noise_multiplier=1.0, sample_rate=1.0, dataset_size=3, sampling="none")
    model.zero_grad()
    optimizer.accumulate((inputs, torch.zeros(3, 2)))
    optimizer.step()
    assert optimizer.get_epsilon(1e-5) > 0.0
    assert torch.equal(model.eval()(inputs), model(inputs))


@pytest.mark.parametrize("wrong", [(0.0, 1.0), (1.0, 0.0), (math.inf, 1.0), (1.0, math.nan)])
def test_bad_numbers_are_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError):
        layers.NoiseInjection(*wrong)


@pytest.mark.parametrize("numbers", [(3e38, 1.0), (1.0, 3e38), (1e-30, 1.0), (1.0, 1e-35), (0.0, 1.0), (True, 1.0)])
def test_numbers_whose_squares_leave_float32_are_refused(numbers: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError):
        NoiseInjection(*numbers)


def test_the_largest_noise_is_finite_and_within_its_radius() -> None:
    layer = NoiseInjection(1e18, 1e18)
    noise = layer(torch.zeros(50, 10_000)).norm(dim=1)
    assert bool((noise <= 1e18 * (1.0 + 1e-6)).all())
