"""The first orthogonal projection: the polar factor, by whichever way it is found, and a norm within the limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import NormError
from clipless_dp.constraints import Orthogonal, orthogonal
from clipless_dp.norms.operators import DenseOperator

DENSE = (DenseOperator(),)


def exact(matrices: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    return left @ right


def drawn(rows: int, columns: int, *, groups: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(groups, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NEAR: dict[str, Tensor] = {
    "orthogonal": exact(drawn(40, 40)),
    "orthogonal and noise": exact(drawn(40, 40)) + 0.03 * drawn(40, 40, seed=1),
    "wide": drawn(20, 160),
    "tall": drawn(160, 20),
    "one row": drawn(1, 9),
    "one number": torch.full((1, 1, 1), -3.0, dtype=torch.float64),
    "several": exact(drawn(6, 40, groups=3)) * torch.tensor([1e-8, 1.0, 1e9]).double()[:, None, None],
}
FAR: dict[str, Tensor] = {
    "square": drawn(40, 40),
    "steep": exact(drawn(30, 30)) * torch.logspace(0, -12, 30, dtype=torch.float64),
    "of a lower rank": drawn(20, 3) @ drawn(3, 20, seed=1),
    "one row lost": exact(drawn(40, 40)) * (torch.arange(40)[:, None] > 0),
    "zeros": torch.zeros(1, 4, 6, dtype=torch.float64),
    "one group far": torch.cat([exact(drawn(12, 12)), drawn(12, 12, seed=1)]),
}


def frames(matrices: Tensor) -> Tensor:
    return matrices @ matrices.mT if matrices.shape[-2] < matrices.shape[-1] else matrices.mT @ matrices


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("name", [*NEAR, *FAR])
def test_it_is_semi_orthogonal_and_the_nearest_such_matrix(name: str, scale: float, single: bool) -> None:
    matrices = (NEAR | FAR)[name]
    found = orthogonal.polar_factor(scale * matrices, single=single)
    size = found.shape[-1] if found.shape[-2] >= found.shape[-1] else found.shape[-2]
    # Rounding of float32, on sums of under 200 terms; where a step was the last one, 3e-4² is left.
    close = 3e-6 if single else 1e-11
    assert float((frames(found) - torch.eye(size, dtype=torch.float64)).abs().max()) <= close
    assert found.dtype == torch.float64
    # Nearest: the symmetric part WᵀQ is positive semidefinite, whatever the rank.
    sizes = torch.linalg.matrix_norm(matrices, 2, keepdim=True).clamp(min=1e-300)
    inner = found.mT @ (matrices / sizes)
    assert float((inner - inner.mT).abs().max()) <= 2.0 * close
    assert float(torch.linalg.eigvalsh(0.5 * (inner + inner.mT)).min()) >= -2.0 * close
    if name in NEAR:
        assert float((found - exact(matrices)).abs().max()) <= close


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", NEAR)
def test_what_is_near_takes_no_decomposition(name: str, single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decomposed")

    matrices = NEAR[name]
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    orthogonal.polar_factor(matrices, single=single)


@pytest.mark.parametrize("limit", [1.0, 0.3, 40.0])
@pytest.mark.parametrize("shape", [(170, 170), (170, 400), (400, 170)])
def test_a_large_float32_weight_starts_orthogonal_within_its_limit(limit: float, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for scale in (1.0, 1e-12, 1e12):
        weight = scale * nn.Linear(*shape[::-1]).weight.detach()
        expected = exact(weight.double()[None])[0]
        Orthogonal(limit).initialize_(weight, DENSE)
        values = torch.linalg.svdvals(weight.double())
        assert float(values[0]) <= limit
        assert float(values[-1]) >= 0.975 * limit
        direction = weight.double() / (math.sqrt(min(shape)) / float(expected.norm())) / values.mean()
        assert float((direction - expected).norm() / expected.norm()) <= 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.randn(170, 180)
    weight[3, 4] = bad
    with pytest.raises(NormError):
        Orthogonal().initialize_(weight, DENSE)
