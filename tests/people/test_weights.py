"""A row weighs what it was drawn with, whatever is vouched for and however a batch came about; else it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from clipless_dp import PrivacyError
from tests.people.test_drawing import ROWS, a_draw, accumulated, optimizer, passed_by_hand
from tests.support import samples


@pytest.mark.parametrize("sampling", ["announced", "poisson", "none"])
def test_no_sampling_vouches_for_weights_of_people(sampling: Any) -> None:
    inputs, targets = samples(ROWS)
    by_hand, drawn_by_hand, added = (optimizer(sampling=sampling) for _ in range(3))
    with pytest.raises(PrivacyError, match="of a draw of people") as first:
        passed_by_hand(by_hand, (inputs, targets, targets == targets))
    with pytest.raises(PrivacyError, match="accumulate") as second:
        passed_by_hand(drawn_by_hand, a_draw())
    changed = a_draw()
    with pytest.raises(PrivacyError, match="of a draw of people") as third:
        accumulated(added, (changed[0] * 1.1, *changed[1:]))
    assert not any(len(own.accountant) for own in (by_hand, drawn_by_hand, added))
    assert not any("vouch" in str(refused.value) for refused in (first, second, third))


@pytest.mark.parametrize("sampling", ["announced", "poisson", "none"])
def test_draws_of_people_are_stepped_on_under_each_sampling(sampling: Any) -> None:
    own = optimizer(sampling=sampling)
    accumulated(own, a_draw())
    assert own.accountant.ledger.units == {"person"}


def test_rows_at_full_weight_that_are_vouched_for_stay_a_matter_of_rows() -> None:
    own = optimizer(unit="row", sampling="none")
    inputs, targets = samples(ROWS)
    passed_by_hand(own, (inputs, targets, targets == targets))
    assert len(own.accountant) == 1
