"""A one-class network by scikit-learn's conventions for outlier detection; of this room it alone needs that package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import OutlierMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from clipless_dp.arguments import share, shown, unmasked
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.integrations.scikit_learn import PrivateEstimator
from clipless_dp.one_class.fitting import fit_one_class
from clipless_dp.one_class.model import OneClassModel
from clipless_dp.sampling import trained_on
from clipless_dp.statement import PrivacyStatement

_OWN = ("domain", "epsilon", "delta", "margin", "weight", "network", "accountant", "noise", "reproducible_seed")

_FLOATS = [np.float64, np.float32]
"""Not float32 alone, in which a finite number may be infinite: what lies beyond it counts as the box's end."""


class PrivateOutlierDetector(OutlierMixin, PrivateEstimator):  # type: ignore[misc]
    """Finds what is unlike the rows that it was trained on: :func:`clipless_dp.one_class.fit_one_class`.

    Rows of a table ``(N, columns)``, or samples ``(N, ...)``. Each call of ``fit`` spends ``epsilon`` anew.
    ``fit_predict`` tells of each training row whether it is an outlier, which is not private.

    Args:
        domain: ``(lo, hi)``, *public*, as for :func:`clipless_dp.one_class.fit_one_class`.
        epsilon: target ε of each ``fit``, the threshold included; ``None`` trains WITHOUT privacy.
        delta: target δ.
        contamination: share of the training rows that may be called outliers, in (0, 0.5]: the threshold is a quantile
            of their scores, charged within ``epsilon``. ``None``: scores below zero are outliers, which costs nothing.
        margin, weight, network, accountant, dataset_size, noise, reproducible_seed: as there. Clones share an
            accountant that is given, in one process: what all fits of a search spend is in its ledger.
        options: further arguments, such as ``{"epochs": 10}``.

    Attributes:
        offset_: what ``decision_function`` takes off the scores.
        epsilon_: spent on what predicts, by now; infinite without privacy.
        n_features_in_: numbers of a row.
        result_: the :class:`clipless_dp.one_class.OneClassModel`; copies and pickles do not have it.
    """

    def __init__(
        self,
        *,
        domain: Any,
        epsilon: float | None,
        delta: float | None = None,
        contamination: float | None = None,
        margin: float | None = None,
        weight: float = 100.0,
        network: Any = "dense",
        dataset_size: int | None = None,
        accountant: Any = "prv",
        noise: Any = None,
        reproducible_seed: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.domain = domain
        self.epsilon = epsilon
        self.delta = delta
        self.contamination = contamination
        self.margin = margin
        self.weight = weight
        self.network = network
        self.dataset_size = dataset_size
        self.accountant = accountant
        self.noise = noise
        self.reproducible_seed = reproducible_seed
        self.options = options

    def fit(self, X: Any, y: Any = None) -> PrivateOutlierDetector:
        """Trains on normal rows.

        Args:
            X: ``(N, columns)`` or ``(N, ...)``, finite.
            y: ignored.

        Raises:
            ConfigurationError: as :func:`clipless_dp.one_class.fit_one_class`.
            ValueError: as scikit-learn has it, rows are no finite numbers.

        Guarantee:
            That of :func:`clipless_dp.one_class.fit_one_class`.
        """
        with self._as_it_was():
            # What is trained on is a copy of these.
            trained_on.note(X)
            rows = self._rows(X, reset=True)
            named = {name: getattr(self, name) for name in _OWN}
            options = {} if self.options is None else self.options
            if not isinstance(options, Mapping) or (own := options.keys() & {*_OWN, "rate", "dataset_size"}):
                told = "must be a mapping" if not isinstance(options, Mapping) else f"hold {', '.join(sorted(own))}"
                raise ConfigurationError(f"options {told}: arguments of fit_one_class that the detector has not itself")
            rate = self.contamination
            if rate is not None and share("contamination", rate, "(0, 1)") > 0.5:
                raise ConfigurationError(f"contamination must lie in (0, 0.5], or be None, got {shown(rate)}")
            self.result_ = fit_one_class(
                rows, rate=rate, dataset_size=self.dataset_size, **{"progress": False, **named, **options}
            )
        return self

    @property
    def offset_(self) -> float:
        """The threshold."""
        return self._known().offset

    @property
    def epsilon_(self) -> float:
        """ε spent by now on what predicts."""
        return self._known().epsilon

    @property
    def statement_(self) -> PrivacyStatement:
        """What was promised, as :func:`clipless_dp.report` says it."""
        return self._known().report()

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Scores ``(N,)``, about the margin for normal rows, and lower the further away from them a row lies."""
        known = self._known()
        return np.asarray(known.scores(self._rows(X, reset=False)).double().numpy())

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """``score_samples - offset_``: below zero are outliers."""
        scores: NDArray[np.float64] = self.score_samples(X) - self.offset_
        return scores

    def predict(self, X: Any) -> NDArray[np.int64]:
        """1 for inliers, -1 for outliers."""
        return np.where(self.decision_function(X) >= 0.0, 1, -1)

    def _known(self) -> OneClassModel:
        check_is_fitted(self, "result_")
        found: OneClassModel = self.result_
        return found

    def _rows(self, X: Any, *, reset: bool) -> Tensor:
        if isinstance(X, Tensor):
            X = X.detach().cpu().numpy()
        unmasked("rows", X)
        if len(getattr(X, "shape", None) or np.asarray(X).shape) > 2:
            rows = check_array(X, dtype=_FLOATS, allow_nd=True)
            if reset:
                self.n_features_in_ = int(np.prod(rows.shape[1:]))
        else:
            rows = validate_data(self, X, dtype=_FLOATS, **({} if reset else {"reset": False}))
        if not reset and rows.shape[1:] != self._known().box.input_shape:
            raise InputError(f"expected rows of shape {self._known().box.input_shape}, got {rows.shape[1:]}")
        return torch.tensor(rows)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        # The optimizer, with its ledger that may grow, is in one process only: save result_ to a file instead.
        state.pop("result_", None)
        return state
