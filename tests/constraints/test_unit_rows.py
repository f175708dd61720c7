"""Rows of one norm: exact rational lengths, idempotence, implied norms, certificates of differences, refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipless_dp import ConfigurationError, DPLipModel, NormError, constraints, layers, losses, robustness
from clipless_dp.norms.operators import DenseOperator
from tests.soundness.attack import wrap
from tests.support import assert_projected

DENSE = (DenseOperator(),)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    limit=st.floats(1e-3, 1e3),
    size=st.sampled_from([1e-40, 1e-20, 1e-3, 1.0, 1e3, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_rows_get_the_norm_in_exact_arithmetic_and_never_more(
    seed: int, rows: int, columns: int, limit: float, size: float, dtype: torch.dtype
) -> None:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = (drawn * size).to(dtype)
    constraint = constraints.UnitRows(limit)
    projected = weight.clone()
    constraint.project_(projected, DENSE)
    # Entries below the smallest normal number of float32 are rounded coarsely before.
    shortest = 1.0 - 1e-5
    for row, before in zip(projected.tolist(), weight.tolist(), strict=True):
        square = sum(Fraction(one) ** 2 for one in row)
        assert square <= Fraction(limit) ** 2
        if any(before):
            assert square >= (Fraction(limit) * Fraction(shortest)) ** 2
            length = math.hypot(*before)
            assert row == pytest.approx([one / length * limit for one in before], rel=1e-5, abs=1e-6 * limit)
        else:
            assert not any(row)
    assert_projected(constraint, projected, DENSE)


def test_rows_that_have_the_norm_and_rows_of_zeros_stay_and_others_move_alone() -> None:
    weight = torch.tensor([[0.6, 0.8 * (1.0 - 1e-7)], [0.0, 0.0], [3.0, 4.0], [0.3, -0.4]])
    before = weight.clone()
    constraint = constraints.UnitRows()
    assert not constraint.holds(weight, DENSE)
    constraint.project_(weight, DENSE)
    assert torch.allclose(weight[[0, 1]], before[[0, 1]], atol=1e-6)
    assert not bool(weight[1].any())
    assert torch.allclose(weight[2:], torch.tensor([[0.6, 0.8], [0.6, -0.8]]))
    for bad in (math.nan, math.inf):
        weight[0, 0] = bad
        with pytest.raises(NormError):
            constraint.project_(weight, DENSE)


def test_bounds_rest_on_the_certified_norm_or_on_the_root_of_the_rows() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 4)
    model = wrap(nn.Sequential(nn.Linear(3, 6), head), (3,), constraint={"1": constraints.UnitRows()})
    true = float(torch.linalg.matrix_norm(head.weight.detach().double(), 2))
    (found,) = [layer.certified_norm for layer in model.sensitivity().layers if layer.path == "1"]
    assert found is not None
    assert true <= found <= min(2.0, true * 1.01) * (1.0 + 1e-9)
    # The mutant: the limit of a row for the norm of the whole, which it passes.
    assert true > 1.05


def test_certificates_are_those_of_differences_of_rows_and_no_attack_comes_nearer() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(layers.ConvexPotential(5), layers.ConvexPotential(5), nn.Linear(5, 4))
    limits = {"2": constraints.UnitRows(), "*": constraints.AlmostOrthogonal(scales="norm", side="outputs")}
    model = DPLipModel(
        net, input_shape=(5,), input_norm=10.0, loss=losses.TauCrossEntropy(2.0), constraint=limits
    ).double()
    model.project_()
    inputs = torch.randn(12, 5, dtype=torch.float64)
    certificate = robustness.certify(model, inputs)
    scores, rows = net(inputs).detach(), net[2].weight.detach()
    body = 1.0
    for index in range(len(inputs)):
        top = int(scores[index].argmax())
        expected = min(
            float((scores[index, top] - scores[index, other]) / (body * (rows[top] - rows[other]).norm()))
            for other in range(4)
            if other != top
        )
        assert float(certificate.radii[index]) == pytest.approx(expected, rel=1e-5)
        assert float(certificate.radii[index]) <= expected * (1.0 + 1e-9)
    ways = robustness.attacks.PGD(steps=12, restarts=1), robustness.attacks.DeepFool(steps=8)
    found = robustness.attack(model, inputs, ways)
    assert bool((found.distances >= certificate.radii * (1.0 - 1e-9)).all())


def test_only_dense_weights_have_rows_of_one_norm() -> None:
    with pytest.raises(ConfigurationError, match="UnitRows is of the weights of dense layers"):
        wrap(nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 4, 4), constraint=constraints.UnitRows())
