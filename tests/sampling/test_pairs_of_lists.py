"""Two lists are no data set of two samples."""

import pytest
import torch

from clipless_dp.errors import ConfigurationError
from clipless_dp.sampling.samples import count


@pytest.mark.parametrize(
    "pair",
    [
        (torch.rand(5, 2), ["a", "b", "a", "b", "a"]),
        ([[0.0, 1.0]] * 5, [0, 1, 0, 1, 0]),
        [[[0.0, 1.0]] * 5, torch.zeros(5)],
    ],
)
def test_columns_as_lists_are_refused_and_not_taken_for_two_samples(pair):
    with pytest.raises(ConfigurationError, match="convert both"):
        count(pair)


def test_two_samples_remain_a_data_set():
    sample = (torch.rand(4), 1)
    assert count([sample, sample]) == 2
    assert count(({"input": torch.rand(4), "label": 1},) * 2) == 2
