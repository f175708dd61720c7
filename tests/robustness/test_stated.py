"""What is stated of constants is said to be stated; what cannot be told of a layer ends the way back to the input."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom
from torch import nn

from clipless_dp import ConfigurationError, layers
from clipless_dp.robustness import (
    Curve,
    Smoothed,
    attack,
    attacks,
    certify,
    confidence,
    hybrid,
    lipschitz_lower_bound,
    metrics,
    several,
    smooth_grad,
)
from tests.robustness.nets import dense, points, wrapped


class Known(nn.Linear):
    lipschitz = 3.0


@pytest.mark.parametrize("constant", [0.0, 0.01, 1.0, 2.0])
@pytest.mark.parametrize("front", [nn.Linear(4, 4), Known(4, 4)], ids=["no attribute", "another attribute"])
def test_a_constant_that_was_stated_of_a_front_is_said_to_be_not_checked(constant: float, front: nn.Module) -> None:
    data = points(3, 4).float(), torch.zeros(3, dtype=torch.long)
    model = wrapped(dense(4, 8), (4,))
    for found in (
        certify(model, data, front=front, front_lipschitz=constant),
        Smoothed(model, 0.3, front=front, front_lipschitz=constant).certify(data, 5, 20),
        certify(model.net, data, lipschitz=1.0, front=front, front_lipschitz=constant),
    ):
        said = Curve.of(found, None).described("public samples")["method"]
        assert f"times {constant:g} of what runs before it, which was stated, not checked" in said


def test_the_constant_of_a_fronts_own_attribute_is_said_to_be_that() -> None:
    found = certify(wrapped(dense(4, 8), (4,)), points(3, 4), front=Known(4, 4))
    assert "times 3 of what runs before it, by its own attribute" in found.method
    assert "not checked" not in found.method


def test_nothing_is_certified_behind_a_front_of_any_constant_where_none_is_known_of_the_model() -> None:
    for constant in (0.0, 1.0):
        found = certify(nn.Linear(4, 3), points(3, 4), front=nn.Linear(4, 4), front_lipschitz=constant)
        assert not bool(found.radii.any())
        assert math.isinf(found.lipschitz)
        assert found.reason is not None


@pytest.mark.parametrize(
    "block",
    [
        lambda: layers.GatedResidual(nn.Linear(8, 8)),
        lambda: layers.GatedResidual(nn.Sequential(nn.Linear(8, 8), nn.ReLU())),
    ],
    ids=["affine", "with an activation"],
)
@pytest.mark.parametrize("behind", [nn.Linear(8, 3), nn.Identity()], ids=["a layer behind", "at the end"])
def test_a_layer_of_two_values_ends_the_way_back_and_is_certified(block, behind: nn.Module) -> None:
    torch.manual_seed(0)
    model = wrapped(nn.Sequential(nn.Linear(6, 8), block(), behind), (6,))
    inputs = points(4, 6)
    found = certify(model, inputs)
    assert bool((found.radii > 0.0).all())
    assert bool((model.margin_constants() <= math.sqrt(2.0) * model.lipschitz_constant() * (1.0 + 1e-8)).all())
    nearest = attack(model, inputs, (attacks.DeepFool(steps=8),)).distances
    assert bool((nearest >= found.radii * (1.0 - 1e-9)).all())


@pytest.mark.parametrize("alpha", [1e-51, 1e-250, 5e-324])
def test_levels_at_which_quantiles_of_the_beta_distribution_err_are_refused(alpha: float) -> None:
    one, other = Smoothed(nn.Linear(4, 3), 0.3), Smoothed(nn.Linear(4, 3), 0.3, map="softmax")
    drawn, inputs = one.draw(points(1, 4), 5, 20), points(1, 4)
    for call in (
        lambda: one.certify(inputs, 5, 20, alpha),
        lambda: one.predict(inputs, 20, alpha),
        lambda: other.certify(inputs, 5, 20, alpha, "bernstein"),
        lambda: drawn.certify(alpha),
        lambda: several.certify([one, Smoothed(one.model, 0.4)], inputs, 5, 20, alpha),
        lambda: hybrid.certify(one.model, inputs, 0.3, beta=0.1, fields=[], changed=0, alpha=alpha),
    ):
        with pytest.raises(ConfigurationError, match="alpha must be at least 1e-50"):
            call()
    with pytest.raises(ConfigurationError, match="each bound"):
        confidence.clopper_pearson_lower(10, 10, 1e-101)


def test_bounds_of_shares_hold_at_the_smallest_levels() -> None:
    for draws, count, alpha in ((500, 437, 1e-100), (20_000, 19_000, 1e-50), (1000, 1000, 1e-50), (300, 300, 1e-100)):
        lower = float(confidence.clopper_pearson_lower(count, draws, alpha))
        assert 0.0 < lower < count / draws
        # The tail of the binomial distribution in logarithms, which do not underflow.
        assert float(binom.logsf(count - 1, draws, lower)) <= math.log(alpha) + 1e-9
    assert float(binom.logsf(999, 1000, 0.9)) > math.log(1e-50)


def test_seeds_that_a_generator_does_not_tell_apart_are_refused_and_no_seed_is_zero_in_secret() -> None:
    net, inputs = nn.Linear(4, 3), points(2, 4)
    smoothed = Smoothed(net, 0.3)
    calls = (
        lambda seed: smoothed.certify(inputs, 5, 20, rng_seed=seed),
        lambda seed: smoothed.predict(inputs, 20, rng_seed=seed),
        lambda seed: smoothed.draw(inputs, 5, 20, rng_seed=seed),
        lambda seed: several.certify([smoothed, Smoothed(net, 0.4)], inputs[:1], 5, 20, rng_seed=seed),
        lambda seed: attack(net, inputs, (attacks.FGM(),), rng_seed=seed),
        lambda seed: lipschitz_lower_bound(net, inputs, steps=1, rng_seed=seed),
        lambda seed: smooth_grad(net, inputs, draws=1, rng_seed=seed),
        lambda seed: metrics.randomisation(net, inputs, rng_seed=seed),
    )
    for call in calls:
        for wrong in (None, -1, 2**32, 2**64 + 7, True, 1.0):
            with pytest.raises(ConfigurationError, match="rng_seed must be a whole number"):
                call(wrong)
    soft = Smoothed(net, 0.3, map="softmax")
    sums = {tuple(soft.draw(inputs, 5, 20, rng_seed=seed).sums.flatten().tolist()) for seed in (0, 7, 2**31, 2**32 - 1)}
    assert len(sums) == 4
