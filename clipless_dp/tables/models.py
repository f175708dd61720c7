"""What comes out of :func:`clipless_dp.tables.fit_table`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.arguments import shown
from clipless_dp.errors import ConfigurationError
from clipless_dp.features import RandomCosines, TableEncoding
from clipless_dp.gates import CotangentGate
from clipless_dp.layers.monotone import MonotoneLift
from clipless_dp.monotone import MonotoneCertificate
from clipless_dp.prediction import Predictor, Predicts, Probe, Promise, content_of
from clipless_dp.statement import PrivacyStatement, report
from clipless_dp.statistics.release import tensor_of
from clipless_dp.tables.monotone import raw_certificate
from clipless_dp.training.result import PROBES, FitResult, predictor_of


@dataclass(frozen=True, repr=False)
class TableModel(Predicts):
    """What :func:`fit_table` trained.

    Attributes:
        net: maps rows ``(B, columns)`` as they are, of data frames as encoded, to scores: standardisation, random
            cosines, and the trained layer. Releasing it with everything in it is what ε pays for.
        result: of :func:`clipless_dp.fit`; its optimizer holds the ledger, statistics included.
        encoding: of data frames, or ``None`` where rows are tensors.
        notes: what was public, and what was charged, for a statement.
    """

    net: nn.Module
    result: FitResult
    encoding: TableEncoding | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        known = "".join(f", {name.replace('_', ' ')} {shown(value)}" for name, value in self._known().items())
        return "\n".join([f"{self._columns()} encoded columns{known}: {self.result}", *self.notes])

    @torch.no_grad()
    def scores(self, rows: Any, *, batch_size: int = 65_536) -> Tensor:
        """What the net says of rows ``(N, columns)`` as they are, or of a data frame like the one it was trained on.

        Returns:
            Of two classes, ``(N,)``, the log-odds of the second; of ``C`` classes, ``(N, C)``, logarithms of their
            probabilities up to a number that a row's scores share; of a regression, ``(N,)``, the number itself.

        Raises:
            InputError: the rows are not like those that were trained on.
        """
        if self.encoding is not None:
            rows = self.encoding(rows).to(next(self.net.buffers()).device)
        return torch.cat([self.net(some) for some in tensor_of(rows).split(batch_size)])

    def predictor(self, *, classes: Sequence[Any] | None = None, threshold: float | None = None) -> Predictor:
        """See :meth:`clipless_dp.prediction.Predicts.predictor`; the labels are known."""
        if classes is not None:
            raise ConfigurationError("the table's labels are known: leave classes out")
        more = {"encode": self.encoding, "dtype": None, "threshold": threshold, **self._known()}
        if self._signs() is not None:
            more["slopes"] = partial(raw_certificate, names=None if self.encoding is None else self.encoding.names)
        return predictor_of(self.result, self.net, notes=self.notes, **more)

    def _known(self) -> Mapping[str, Any]:
        """Attributes of the predictor that the task says."""
        return {}

    def content(
        self, *, classes: Sequence[Any] | None = None, threshold: float | None = None, notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """See :meth:`clipless_dp.prediction.Predicts.content`."""
        known = self.predictor(classes=classes, threshold=threshold)
        told = self.report(delta=self.result.delta, notes=notes)
        promised = known.promised
        predictor = replace(known, promise=Promise(promised.epsilon, promised.delta, told, promised.runs))
        made_up = torch.rand(PROBES, self._columns(), generator=torch.Generator().manual_seed(0))
        return content_of(predictor, "table", self.net.state_dict(), self._settings(), Probe.of(predictor, made_up))

    def certificate(self) -> MonotoneCertificate:
        """What is certain of the answer's slope in each column, as it is: prints a line for each.

        A column whose cell is missing has no place in an order, and none is claimed.

        Raises:
            ConfigurationError: the table was not trained with ``monotone=``.
        """
        return raw_certificate(self.net, None if self.encoding is None else self.encoding.names)

    def _signs(self) -> list[int] | None:
        lifts = [part for part in self.net.modules() if isinstance(part, MonotoneLift)]
        return list(lifts[0].signs) if lifts else None

    def _columns(self) -> int:
        expand = self.net[1]  # type: ignore[index]
        signs = self._signs()
        return expand.columns if isinstance(expand, RandomCosines) else len(signs or ())

    def _settings(self) -> dict[str, Any]:
        """What the network is built from, plain values."""
        standardise, expand, layer, head = self.net.children()
        encoding = self.encoding
        caps = [part.limit for part in layer.modules() if isinstance(part, CotangentGate)]
        signs = self._signs()
        weights = getattr(self.result.optimizer.model.loss_function, "class_weights", None)
        return {
            "cap": float(caps[0]) if caps else 0.0,
            "class_weights": None if weights is None else [float(weight) for weight in weights],
            "measured": standardise.measured,
            "columns": self._columns(),
            "cosines": getattr(expand, "cosines", 0),
            "seed": getattr(expand, "seed", 0),
            **({} if signs is None else {"monotone": signs}),
            "outputs": int(self.result.optimizer.model.output_shape[0]),
            "affine": [head[1].scale, head[1].shift] if isinstance(head, nn.Sequential) else None,
            "encoding": None
            if encoding is None
            else {
                "numbers": list(encoding.numbers),
                "categories": {name: list(values) for name, values in encoding.categories.items()},
                "missing": dict(encoding.missing),
            },
        }

    def report(self, path: str | os.PathLike[str] | None = None, **options: Any) -> PrivacyStatement:
        """:func:`clipless_dp.report` of the training, with :attr:`notes` among its own."""
        return report(self.result.optimizer, path, **{**options, "notes": [*self.notes, *options.get("notes", ())]})


@dataclass(frozen=True, repr=False)
class TableClassifier(TableModel):
    """A :class:`TableModel` of classes.

    Attributes:
        classes: the labels that are told apart, in the order of the scores.
    """

    classes: tuple[Any, ...] = (0, 1)

    def _known(self) -> Mapping[str, Any]:
        return {"classes": self.classes}

    def predict(self, rows: Any) -> list[Any]:
        """The likeliest label of each row; with ``balance`` the likeliest after weighing."""
        scores = self.scores(rows)
        chosen = (scores > 0.0).long() if scores.dim() == 1 else scores.argmax(1)
        return [self.classes[index] for index in chosen.tolist()]


@dataclass(frozen=True, repr=False)
class TableRegressor(TableModel):
    """A :class:`TableModel` of numbers.

    Attributes:
        target_range: the public range that targets were cut to, as predictions are.
    """

    target_range: tuple[float, float] = (0.0, 1.0)

    def _known(self) -> Mapping[str, Any]:
        return {"target_range": self.target_range}

    def predict(self, rows: Any) -> Tensor:
        """The number of each row, ``(N,)``."""
        return self.scores(rows).clamp(*self.target_range)
