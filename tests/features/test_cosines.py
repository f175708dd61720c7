from __future__ import annotations

import math

import pytest
import torch

from clipless_dp import ConfigurationError, InputError
from clipless_dp.features import RandomCosines


def normal_rows(columns: int, rows: int = 20_000) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("columns", [1, 3, 40])
def test_features_have_norm_one_whatever_the_rows(columns):
    expand = RandomCosines(columns, 64)
    rows = torch.cat([normal_rows(columns, 100), 1e3 * normal_rows(columns, 100), torch.full((1, columns), -4.0)])
    # Up to float32 rounding of some hundred terms.
    torch.testing.assert_close(expand(rows).norm(dim=1), torch.ones(201), rtol=1e-5, atol=0)
    # Columns of zeros keep their share to themselves.
    assert float(expand(torch.zeros(1, columns)).norm()) == pytest.approx(math.sqrt(0.8), rel=1e-5)
    assert expand(torch.zeros(0, columns)).shape == (0, columns + 64)


def test_a_row_s_features_do_not_depend_on_its_neighbours():
    expand = RandomCosines(5, 4000)
    rows = normal_rows(5, 3000)
    # Chunks of other sizes change the order of sums of five terms.
    torch.testing.assert_close(expand(rows)[2500:2501], expand(rows[2500:2501]), rtol=0, atol=1e-6)


def test_cosines_have_mean_zero_over_standard_normal_columns():
    expand = RandomCosines(6, 200)
    rows = normal_rows(6)
    waves = torch.cos(rows @ expand.frequencies + expand.phases) - expand.means
    # Each mean of 20 000 numbers of deviation at most 1 is known to 0.007; five of these.
    assert float(waves.mean(0).abs().max()) < 0.035


def test_half_of_the_cosines_look_at_all_columns_and_half_at_up_to_four():
    looked_at = (RandomCosines(30, 400).frequencies != 0).sum(0)
    assert set(looked_at[1::2].tolist()) == {30}
    assert set(looked_at[::2].tolist()) == {1, 2, 3, 4}
    assert set((RandomCosines(2, 400).frequencies != 0).sum(0).tolist()) == {1, 2}


def test_the_seed_and_nothing_else_decides_the_cosines():
    rows = normal_rows(4, 10)
    torch.manual_seed(7)
    first = RandomCosines(4, 32, seed=3)(rows)
    torch.manual_seed(8)
    assert torch.equal(first, RandomCosines(4, 32, seed=3)(rows))
    assert not torch.equal(first, RandomCosines(4, 32, seed=4)(rows))


def test_what_is_no_table_is_refused():
    for change in ({"columns": 0}, {"cosines": 0}, {"cosines": 1.5}):
        with pytest.raises(ConfigurationError, match=next(iter(change))):
            RandomCosines(**{"columns": 3, "cosines": 8, **change})
    for rows in (torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(InputError, match="3 columns"):
            RandomCosines(3, 8)(rows)
