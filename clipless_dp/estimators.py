"""Estimators with scikit-learn's conventions: tables, images, numbers; they need that package."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from clipless_dp import presets
from clipless_dp.arguments import unmasked
from clipless_dp.checkpoint import save_checkpoint
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.features import TableEncoding
from clipless_dp.integrations.scikit_learn import PrivateEstimator
from clipless_dp.loading import rebuilt
from clipless_dp.prediction import Content, Predictor
from clipless_dp.sampling import trained_on
from clipless_dp.sampling.cells import is_missing, listed, readable, refuse_mapping
from clipless_dp.sampling.overlaps import refuse_overlapping_table
from clipless_dp.sampling.people import number_of, people_of
from clipless_dp.statement import PrivacyStatement
from clipless_dp.tables import TableModel, fit_table

FROM_Y = "from y"
"""In place of a list of classes: those that occur in ``y``, which are public then."""

_CHANNELS = (1, 3)
_LIVE = ("result_", "predictor_")


class _Private(PrivateEstimator):
    """What both estimators share: inputs, what was spent, files and pickles."""

    def _rows(self, X: Any, *, reset: bool) -> Any:
        """Rows of a table as float64, of images as float32 ``(N, C, H, W)``, or a data frame that is encoded."""
        refuse_mapping("rows", X)
        encoding = getattr(self, "encoding", None)
        if encoding is not None:
            if not isinstance(encoding, TableEncoding):
                raise ConfigurationError(f"encoding must be a TableEncoding, got {type(encoding).__name__}")
            if reset:
                self.feature_names_in_ = np.asarray([*encoding.numbers, *encoding.categories], dtype=object)
                self.n_features_in_ = len(self.feature_names_in_)
            return X
        X = readable("rows", X)
        unmasked("rows", X)
        if len(getattr(X, "shape", None) or np.asarray(X).shape) > 2:
            return self._images(X, reset=reset)
        known = {} if reset else {"reset": False}
        rows = validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan", **known)
        shape = getattr(self, "shape_", rows.shape[1:])
        if not reset and len(shape) > 1:
            raise InputError(f"expected images of shape {shape}, got rows of {rows.shape[1]} numbers")
        return torch.from_numpy(np.array(rows, order="C"))

    def _images(self, X: Any, *, reset: bool) -> Tensor:
        if not hasattr(X, "dtype"):
            # Of a list numpy makes the type that holds all: one image would say how every other is scaled.
            kinds = {np.asarray(image).dtype.kind in "ui" for image in X}
            if len(kinds) > 1:
                raise InputError(
                    "some images are of whole numbers, up to 255, and some of others, in [0, 1]: give all of one type, "
                    "as one array"
                )
        images = check_array(X, dtype=None, allow_nd=True)
        if images.dtype.kind not in "uif" or images.ndim > 4:
            raise InputError(f"expected images (N, H, W), (N, C, H, W) or (N, H, W, C), got {images.shape}")
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[1] not in _CHANNELS and images.shape[3] in _CHANNELS:
            images = np.moveaxis(images, 3, 1)
        if images.shape[1] not in _CHANNELS:
            raise InputError(f"expected images of one or three channels, got {images.shape}")
        scale = 255.0 if images.dtype.kind in "ui" else 1.0
        found = torch.tensor(images.astype(np.float32)) / scale
        if reset:
            self.shape_ = tuple(found.shape[1:])
            self.n_features_in_ = math.prod(self.shape_)
        elif tuple(found.shape[1:]) != getattr(self, "shape_", None):
            raise InputError(f"expected images of shape {getattr(self, 'shape_', None)}, got {tuple(found.shape[1:])}")
        return found

    def _refuse_overlap(self, X: Any, y: Any, groups: Any) -> None:
        """Looks at what was given: of a copy it is seen no more what lay on one another."""
        if self.encoding is not None:
            # Which hands on what was given.
            return
        try:
            refuse_overlapping_table(X, y)
        except PrivacyError:
            if groups is None:
                raise
            refuse_overlapping_table(X, y, people_of(groups, len(X)))

    def _asked(self, groups: Any) -> dict[str, Any]:
        """Arguments of ``fit_table``, or of a preset."""
        named = ("epsilon", "delta", "dataset_size", "accountant", "noise", "reproducible_seed")
        options = {} if self.options is None else self.options
        if not isinstance(options, Mapping):
            raise ConfigurationError(f"options must be a mapping of arguments of fit, got {type(options).__name__}")
        if "checkpoint" in options:
            raise ConfigurationError(
                "options hold checkpoint, which every fit would go on from: of other rows, as of another fold, it "
                "would return the model of the first. Leave it out, or call fit_table or a preset's fit by yourself"
            )
        if own := sorted(options.keys() & {*self.get_params(deep=False), "groups", "classes", "target_range"}):
            raise ConfigurationError(f"options hold {', '.join(own)}: these are arguments of the estimator, or of fit")
        asked = {"progress": False, **options, **{name: getattr(self, name) for name in named}}
        if groups is not None:
            asked["groups"] = groups
        return {name: value for name, value in asked.items() if value is not None}

    def _take(self, result: presets.Trained | TableModel, predictor: Predictor) -> None:
        self.__dict__.pop("_content", None)
        self.result_, self.predictor_ = result, predictor
        self.delta_ = result.result.delta

    @property
    def epsilon_(self) -> float:
        """ε spent by now on what predicts, an upper bound: see :class:`clipless_dp.prediction.Predictor`."""
        return self._known().epsilon

    def _known(self) -> Predictor:
        check_is_fitted(self, "predictor_")
        found: Predictor = self.predictor_
        return found

    def _told(self) -> dict[str, Any]:
        """What is written to a file or a pickle."""
        self._known()
        if "_content" in vars(self):
            kept: dict[str, Any] = self._content
            return kept
        told: dict[str, Any] = self.result_.content(**self._labels())
        return told

    def _labels(self) -> dict[str, Any]:
        return {}

    @property
    def statement_(self) -> PrivacyStatement:
        """What was promised, as :func:`clipless_dp.report` says it, the ledger included."""
        return self._known().statement

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what predicts to one file, for :func:`clipless_dp.load`: see :meth:`clipless_dp.FitResult.save`.

        Raises:
            CheckpointError: the file cannot be written; one that was there is left as it was.
        """
        save_checkpoint(path, self._told())

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        if "predictor_" in state:
            # The optimizer, with its ledger that may grow, is in one process only.
            state = {name: value for name, value in state.items() if name not in _LIVE}
            state["_content"] = self._told()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_content" in state:
            preset = getattr(self, "preset", None)
            own = preset if isinstance(preset, presets.Preset) else None
            self.predictor_ = rebuilt(Content.of(state["_content"], type(self).__name__), preset=own)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


class PrivateClassifier(ClassifierMixin, _Private):  # type: ignore[misc]
    """A private classifier of tables and images, by scikit-learn's conventions.

    Rows ``(N, columns)`` of any scale go through :func:`clipless_dp.tables.fit_table`. Images ``(N, H, W)``,
    ``(N, C, H, W)`` or ``(N, H, W, C)`` of one or three channels go through scattering features and one layer, the
    presets ``"features-linear"`` and, of three channels, ``"photographs-linear"``, which takes a minute or two to make
    its features (``preset="photographs-scattering"`` does not, and is less accurate); numbers in [0, 1], or whole ones
    up to 255, all of one type. ``preset`` names another, for rows too: ``"transfer"`` for features of a backbone that
    was trained on public data.

    Each call of ``fit`` spends ``epsilon`` anew, and calls on the same data compose: cross-validation and grid search
    of ``k`` candidates spend about ``√k`` to ``k`` times as much, and :mod:`clipless_dp.search` pays for a search.
    What they report of held-out rows is not private.

    Args:
        epsilon: target ε of each ``fit``, statistics and training together.
        delta: target δ.
        classes: all labels there can be, *public*: which labels occur tells who has a rare one. ``None``: 0 and 1.
            ``"from y"`` says that the labels that occur are public.
        threshold: of two classes, the probability above which the second is predicted, as it is when ``fit`` is called.
        encoding: how the columns of a data frame become numbers.
        balance: of tables, see :func:`clipless_dp.tables.fit_table`.
        cosines: of tables, the number of random features.
        preset: name of a preset, or one of your own.
        dataset_size: public number of rows; by default ``N``, which is then taken to be public.
        accountant: ``"prv"``, ``"rdp"`` or ``"auto"``; of an accountant itself, which clones share, in one process.
        noise: ``"system"``, ``"secure"`` or a source.
        reproducible_seed: for tests: whoever knows it can take the noise away. There is no ``random_state``: noise and
            draws are secret, and two fits differ.
        options: further arguments of :func:`clipless_dp.fit`, such as ``{"epochs": 10, "progress": True}``.

    Attributes:
        classes_: the labels, in the order of the probabilities.
        epsilon_: spent on what predicts, an upper bound: by the last ``fit``, and whatever trained on since.
        delta_: the δ that it holds at.
        n_features_in_: numbers of a row, or of an image.
        feature_names_in_: of a data frame.
        result_: of the last ``fit``; pickles and copies do not have it.
        predictor_: what predicts.
    """

    def __init__(
        self,
        *,
        epsilon: float,
        delta: float,
        classes: Sequence[Any] | str | None = None,
        threshold: float | None = None,
        encoding: TableEncoding | None = None,
        balance: float = 0.0,
        cosines: int = 512,
        preset: str | presets.Preset | None = None,
        dataset_size: int | None = None,
        accountant: str = "prv",
        noise: Any = None,
        reproducible_seed: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.epsilon = epsilon
        self.delta = delta
        self.classes = classes
        self.threshold = threshold
        self.encoding = encoding
        self.balance = balance
        self.cosines = cosines
        self.preset = preset
        self.dataset_size = dataset_size
        self.accountant = accountant
        self.noise = noise
        self.reproducible_seed = reproducible_seed
        self.options = options

    def fit(self, X: Any, y: Any, *, groups: Any = None) -> PrivateClassifier:
        """Trains.

        Args:
            X: rows or images; cells of rows may be missing (NaN).
            y: ``(N,)`` labels.
            groups: whose each row is: then the guarantee is about people (docs/groups.md).

        Raises:
            ConfigurationError: an argument is out of range; or there are labels that ``classes`` lacks.
            InputError: images are of another shape, or images or labels of a list are of several types.
            PrivacyError: a row is there more than once, or lies on another person's in memory (windows that overlap).
            ValueError: as scikit-learn has it, rows or labels are no numbers, too few, or of another length.

        Guarantee:
            That of :func:`clipless_dp.tables.fit_table`, or of :meth:`clipless_dp.presets.Preset.fit`.
        """
        with self._as_it_was():
            return self._fit(X, y, groups)

    def _fit(self, X: Any, y: Any, groups: Any) -> PrivateClassifier:
        X, y = listed(X), listed(y)
        # What is trained on is a copy of these.
        trained_on.note((X, y))
        rows = self._rows(X, reset=True)
        check_consistent_length(X, y)
        self._refuse_overlap(X, y, groups)
        y = readable("labels", y)
        _require_labels(y)
        labels = column_or_1d(y, warn=True)
        check_classification_targets(labels)
        classes = self._classes(labels)
        preset = self._preset(rows)
        asked = self._asked(groups)
        result: presets.Trained | TableModel
        if preset is None:
            asked |= {"encoding": self.encoding, "balance": self.balance, "cosines": self.cosines}
            result = fit_table(rows, _read(labels, classes), classes=classes, **asked)
        else:
            size = len(rows) if groups is None else number_of(groups, len(rows))
            size = size if self.dataset_size is None else self.dataset_size
            # Presets are made for large data sets; of a small one a draw has all rows in expectation.
            batch = min(size, preset.arguments(size, **asked).get("batch_size", size))
            place = {label: index for index, label in enumerate(classes)}
            targets = torch.tensor([place[label] for label in labels.tolist()])
            result = preset.fit((rows.float(), targets), outputs=len(classes), **{**asked, "batch_size": batch})
        self.classes_ = np.asarray(classes)
        self._labelled = preset is not None
        self._take(result, result.predictor(threshold=self.threshold, **self._names()))
        return self

    def _labels(self) -> dict[str, Any]:
        # Of the fit: what is set afterwards is of the next one.
        return {"threshold": self._known().threshold, **self._names()}

    def _names(self) -> dict[str, Any]:
        # A table knows its labels.
        return {"classes": self.classes_.tolist()} if self._labelled else {}

    def _preset(self, rows: Any) -> presets.Preset | None:
        """That was asked for, or that images have; ``None`` of tables."""
        of_images = isinstance(rows, Tensor) and rows.dim() > 2
        if self.preset is None and not of_images:
            return None
        if self.encoding is not None or self.balance:
            raise ConfigurationError("encoding and balance are of tables: leave them out with images and presets")
        if isinstance(self.preset, presets.Preset):
            return self.preset
        if self.preset is not None:
            return presets.get(self.preset)
        return presets.get("features-linear" if rows.shape[1] == 1 else "photographs-linear")

    def _classes(self, labels: NDArray[Any]) -> tuple[Any, ...]:
        """All labels there can be, once those of the data are known to be among them."""
        found = np.unique(labels).tolist()
        if isinstance(self.classes, str):
            if self.classes != FROM_Y:
                raise ConfigurationError(f"classes must be a list of labels or {FROM_Y!r}, got {self.classes!r}")
            if len(found) < 2:
                raise ConfigurationError("y holds one class: name all classes there can be, classes=[...]")
            return tuple(found)
        if self.classes is not None and np.ndim(self.classes) != 1:
            raise ConfigurationError(f"classes must be a list of labels or {FROM_Y!r}, got {self.classes!r:.200}")
        known = (0, 1) if self.classes is None else tuple(np.asarray(self.classes).tolist())
        if not set(found) <= set(known):
            raise ConfigurationError(
                f"y holds labels that are none of {known!r:.200}: which labels occur in private data tells who has a "
                f"rare one, so name all classes there can be, classes=[...], or say that they are public, "
                f"classes={FROM_Y!r}"
            )
        return known

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities ``(N, C)`` of the classes, by the loss, not calibrated."""
        shares = self._known().predict_proba(self._rows(X, reset=False))
        return np.asarray(shares.double().numpy())

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Scores: of two classes ``(N,)``, positive for the second; of more ``(N, C)``."""
        predictor = self._known()
        scores = predictor.scores(self._rows(X, reset=False)).double()
        if scores.dim() == 2 and scores.shape[1] == 2:
            scores = scores[:, 1] - scores[:, 0]
        return np.asarray(scores.numpy())

    def predict(self, X: Any) -> NDArray[Any]:
        """The label of each row: the likelier, or by ``threshold``."""
        predictor = self._known()
        place = {label: index for index, label in enumerate(self.classes_.tolist())}
        chosen = [place[label] for label in predictor.predict(self._rows(X, reset=False))]
        found: NDArray[Any] = self.classes_[chosen]
        return found


def _require_labels(y: Any) -> None:
    """Refuses labels that are missing, and such that numpy would make one type of: one would say what all others are.

    Raises:
        InputError: there are some.
    """
    if y is None:
        raise InputError("fit requires y to be passed, but the target y is None")
    unmasked("labels", y)
    if not isinstance(y, (list, tuple)):
        found = np.asarray(y)
        y = found.reshape(-1).tolist() if found.dtype == object else []
    if any(is_missing(label) for label in y):
        raise InputError("labels are missing (None, NaN, NA): leave out the rows that have none")
    if len({np.asarray(label).dtype.kind for label in y}) > 1:
        raise InputError("labels are of several types (text, whole numbers, others): give all of one type")


def _read(labels: NDArray[Any], classes: tuple[Any, ...]) -> Any:
    """Labels as :func:`clipless_dp.tables.fit_table` takes them: of 0 and 1 a tensor."""
    return torch.tensor(labels.astype(np.int64)) if classes == (0, 1) else labels.tolist()


def _are_numbers(values: Any) -> bool:
    try:
        np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return True


class PrivateRegressor(RegressorMixin, _Private):  # type: ignore[misc]
    """A private regression on tables, by scikit-learn's conventions: :func:`clipless_dp.tables.fit_table` of numbers.

    Arguments and attributes of a name that :class:`PrivateClassifier` knows are as there.

    Args:
        target_range: the *public* range ``(low, high)`` that targets are cut to, and predictions.
    """

    def __init__(
        self,
        *,
        epsilon: float,
        delta: float,
        target_range: tuple[float, float],
        encoding: TableEncoding | None = None,
        cosines: int = 512,
        dataset_size: int | None = None,
        accountant: str = "prv",
        noise: Any = None,
        reproducible_seed: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.epsilon = epsilon
        self.delta = delta
        self.target_range = target_range
        self.encoding = encoding
        self.cosines = cosines
        self.dataset_size = dataset_size
        self.accountant = accountant
        self.noise = noise
        self.reproducible_seed = reproducible_seed
        self.options = options

    def fit(self, X: Any, y: Any, *, groups: Any = None) -> PrivateRegressor:
        """Trains; see :meth:`PrivateClassifier.fit`.

        Args:
            X: rows; cells may be missing (NaN).
            y: ``(N,)`` numbers.
            groups: whose each row is.

        Guarantee:
            That of :func:`clipless_dp.tables.fit_table`.
        """
        with self._as_it_was():
            return self._fit(X, y, groups)

    def _fit(self, X: Any, y: Any, groups: Any) -> PrivateRegressor:
        X, y = listed(X), listed(y)
        trained_on.note((X, y))
        rows = self._rows(X, reset=True)
        if isinstance(rows, Tensor) and rows.dim() > 2:
            raise InputError("a regression is of rows (N, columns): compute features of images first")
        check_consistent_length(X, y)
        self._refuse_overlap(X, y, groups)
        if y is None:
            raise InputError("PrivateRegressor requires y to be passed, but the target y is None")
        y = readable("targets", y)
        unmasked("targets", y)
        if self.target_range is None:
            raise ConfigurationError("target_range=(low, high), the public range of targets, is missing")
        if np.asarray(y).dtype.kind in "OUS" and not _are_numbers(y):
            # Outside of the handler: what numpy says of a cell quotes it.
            raise InputError("targets must be numbers, and some are text or other things")
        numbers = column_or_1d(check_array(y, ensure_2d=False, dtype=np.float64), warn=True)
        asked = {**self._asked(groups), "encoding": self.encoding, "cosines": self.cosines}
        result = fit_table(
            rows, torch.from_numpy(np.array(numbers, order="C")), target_range=self.target_range, **asked
        )
        self._take(result, result.predictor())
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """The number of each row, ``(N,)``."""
        return np.asarray(self._known().predict(self._rows(X, reset=False)).double().numpy())
