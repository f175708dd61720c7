"""The arithmetic that all gates share."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from clipless_dp.gates import BallProjection, SphereScaling
from clipless_dp.gates.arithmetic import LARGEST_RATIO, are_within, largest_norm, scale_factors, tangent_part

CAPS = [1e-8, 0.1, 1.0 / 3.0, 1.0, 7.3, 1e6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cap", CAPS)
def test_a_factor_is_one_exactly_up_to_the_cap_where_a_gate_clips(cap: float, dtype: torch.dtype) -> None:
    norms = torch.tensor([0.0, 0.5 * cap, cap], dtype=dtype)
    assert torch.equal(scale_factors(norms, cap=cap, floor=cap), torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cap", CAPS)
def test_a_norm_that_no_factor_scales_to_the_cap_has_the_factor_zero(cap: float, dtype: torch.dtype) -> None:
    largest = largest_norm(cap, dtype)
    norms = torch.tensor([0.5 * largest, math.inf, math.nan], dtype=dtype)
    assert (scale_factors(norms, cap=cap, floor=cap) > 0.0).tolist() == [True, False, False]
    above = torch.tensor([1.01 * LARGEST_RATIO * cap], dtype=dtype)
    assert float(scale_factors(above, cap=cap, floor=cap)) == 0.0


@pytest.mark.parametrize("largest", [1e-8, 1.0, 1e18])
def test_norms_are_within_a_bound_only_where_each_is_a_number_up_to_it(largest: float) -> None:
    fits = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64) * largest
    assert are_within(fits, largest)
    assert are_within(fits.requires_grad_(), largest)
    for other in (math.nextafter(largest, math.inf), math.inf, math.nan):
        for place in range(3):
            norms = fits.detach().clone()
            norms[place] = other
            assert not are_within(norms, largest)


def test_norms_that_cannot_be_looked_at_are_not_said_to_be_within() -> None:
    assert not are_within(torch.ones(0), 1.0)
    assert not are_within(torch.ones(2, device="meta"), 1.0)
    told: list[bool] = []

    def look(norm: torch.Tensor) -> torch.Tensor:
        told.append(are_within(norm[None], 1.0))
        return scale_factors(norm[None], cap=1.0, floor=1.0)

    factors = torch.func.vmap(look)(torch.tensor([0.5, 2.0, math.nan]))
    assert told == [False]
    assert factors.flatten().tolist() == [1.0, 0.5, 0.0]


def test_the_tangent_part_is_the_jacobian_of_scaling_to_the_sphere_and_the_identity_below_the_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    points, cotangents = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    points[0] *= 1e-3
    norms = points.flatten(1).norm(dim=1)
    shares = torch.where(norms > 0.5, norms**-2, 0.0)
    for row in range(4):
        floor = float(norms[row].clamp(min=0.5))
        expected = torch.autograd.functional.vjp(
            lambda x, norm=norms[row]: x / (x.norm() if norm > 0.5 else 0.5), points[row], cotangents[row]
        )[1]
        found = tangent_part(cotangents, points, shares)[row] / floor
        # Float64 rounding of six terms.
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("gate", [BallProjection(2.0), SphereScaling(2.0)])
def test_gates_pickled_under_their_public_names_load(gate: BallProjection | SphereScaling) -> None:
    older = pickle.dumps(gate, protocol=0).replace(b"clipless_dp.gates.signal", b"clipless_dp.gates")
    loaded = pickle.loads(older)
    assert type(loaded) is type(gate)
    assert loaded.radius == 2.0
