"""What private estimators by scikit-learn's conventions share, whatever they learn; needs that package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sklearn.base import BaseEstimator


class PrivateEstimator(BaseEstimator):  # type: ignore[misc]
    """An estimator that spends ε from an accountant and draws secret noise."""

    accountant: Any
    reproducible_seed: int | None

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """What is known of the data and the last fit stays so where another one fails."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            self.__dict__ = before
            raise

    def __sklearn_clone__(self) -> Any:
        made = super().__sklearn_clone__()
        # What was given is one ledger, that all clones spend in: each of a copy's own would hold its part alone.
        made.accountant = self.accountant
        return made

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.reproducible_seed is None
        return tags
