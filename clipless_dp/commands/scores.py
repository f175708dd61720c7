"""How right a trained model is on rows with labels: accuracy, AUROC, a line for each class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from clipless_dp.commands.sources import Part
from clipless_dp.display import Table, Tabular
from clipless_dp.prediction import Predictor


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Share of pairs of a positive and a negative row that the scores order rightly, ties counting half.

    Args:
        scores: ``(N,)``.
        labels: ``(N,)``, positive where 1.
    """
    positive = labels == 1
    pairs = int(positive.sum()) * int((~positive).sum())
    ranks = torch.from_numpy(rankdata(scores.double().numpy()))
    above = float(ranks[positive].sum()) - int(positive.sum()) * (int(positive.sum()) + 1) / 2
    return above / pairs if pairs else math.nan


@dataclass(frozen=True)
class ClassScores:
    """How right a model is on one class.

    Attributes:
        label: of the class.
        rows: that have it.
        predicted: rows that are predicted to have it.
        recall: share of its rows that are predicted so.
        precision: share of rows predicted so that have it.
        auroc: of it against all others, by its score less the largest other one.
    """

    label: Any
    rows: int
    predicted: int
    recall: float
    precision: float
    auroc: float


@dataclass(frozen=True)
class Scores(Tabular):
    """How right a model is on rows; exact figures of them, which no ε covers.

    Attributes:
        told: what the rows are.
        rows: how many.
        accuracy: share of right predictions; ``None`` of a regression.
        auroc: of two classes; of more the mean over them.
        error: of a regression, the mean absolute one; ``None`` of classes.
        root: of a regression, the root of the mean square error.
        classes: a line for each.
    """

    told: str
    rows: int
    accuracy: float | None = None
    auroc: float | None = None
    error: float | None = None
    root: float | None = None
    classes: tuple[ClassScores, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The figures in words."""
        if self.accuracy is None or self.auroc is None:
            return [f"error     {self.error:.6g} in the mean, {self.root:.6g} in the root of squares on {self.told}"]
        found = [f"accuracy  {100 * self.accuracy:.2f} % of {self.told}"]
        if not math.isnan(self.auroc):
            found.append(f"AUROC     {100 * self.auroc:.2f} % on {self.told}")
        return found

    def described(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        known = {name: getattr(self, name) for name in ("accuracy", "auroc", "error", "root")}
        listed = [{name: _plain(value) for name, value in vars(one).items()} for one in self.classes]
        plain = {name: _plain(value) for name, value in known.items() if value is not None}
        return {"data": self.told, "rows": self.rows, **plain, "classes": listed}

    def _table(self) -> Table:
        rows = [
            (str(one.label), one.rows, one.predicted, *map(_percent, (one.recall, one.precision, one.auroc)))
            for one in self.classes
        ]
        headers = ("class", "rows", "predicted", "recall %", "precision %", "AUROC %")
        return Table(headers, rows, ("left", *["right"] * 5), self.lines)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f}"


def scores_of(predictor: Predictor, part: Part, classes: Sequence[Any] | None) -> Scores:
    """How right a model is on some rows.

    Args:
        predictor: the model.
        part: rows with labels.
        classes: labels in the order of the scores; ``None`` of a regression.

    Raises:
        InputError: rows are not like those that were trained on.
    """
    if classes is None:
        numbers = torch.as_tensor(part.labels).double()
        apart = torch.as_tensor(predictor.predict(part.rows)).double().flatten() - numbers
        root = math.sqrt(float(apart.square().mean()))
        return Scores(part.told, len(part), error=float(apart.abs().mean()), root=root)
    place = {label: index for index, label in enumerate(classes)}
    targets = part.labels if isinstance(part.labels, Tensor) else torch.tensor([place[one] for one in part.labels])
    scores = predictor.scores(part.rows).double()
    lacking = scores.isnan() if scores.dim() == 1 else scores.isnan().any(1)
    chosen = predictor.predict(_kept(part.rows, ~lacking)) if bool(lacking.any()) else predictor.predict(part.rows)
    found = torch.as_tensor(chosen) if isinstance(chosen, Tensor) else torch.tensor([place[one] for one in chosen])
    # A row without scores is predicted as nothing.
    predicted = torch.full((len(part),), -1)
    predicted[~lacking] = found.long()
    if scores.dim() == 1:
        scores = torch.stack([-scores, scores], 1)
    scores = scores.nan_to_num(0.0)
    lines = tuple(_of_class(index, label, scores, predicted, targets) for index, label in enumerate(classes))
    known = [one.auroc for one in lines if not math.isnan(one.auroc)]
    mean = lines[1].auroc if len(lines) == 2 else sum(known) / len(known) if known else math.nan
    right = float((predicted == targets).double().mean())
    return Scores(part.told, len(part), right, mean, classes=lines)


def _kept(rows: Any, chosen: Tensor) -> Any:
    if isinstance(rows, Tensor):
        return rows[chosen]
    return {name: column[chosen.numpy()] for name, column in rows.items()}


def _of_class(index: int, label: Any, scores: Tensor, predicted: Tensor, targets: Tensor) -> ClassScores:
    own, said = targets == index, predicted == index
    hits = int((own & said).sum())
    others = scores.clone()
    others[:, index] = -math.inf
    ahead = scores[:, index] - others.amax(1)
    rows, count = int(own.sum()), int(said.sum())
    recall, precision = hits / rows if rows else math.nan, hits / count if count else math.nan
    return ClassScores(label, rows, count, recall, precision, auroc(ahead, own.long()))
