"""What predicts: a network that takes samples as they are, how its scores are read, and what its training promised."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from accounting import Ledger
from accounting.errors import AccountingError, LedgerFormatError, warn_caller
from clipless_dp.arguments import share, unmasked, whole
from clipless_dp.checkpoint import save_checkpoint
from clipless_dp.errors import CliplessError, ConfigurationError, InputError, PrivacyError, PrivacyWarning
from clipless_dp.gates.plain import plain_copy
from clipless_dp.model import lineage
from clipless_dp.modules import kept_modes, parameter_device_and_dtype
from clipless_dp.prediction.links import Link
from clipless_dp.statement import PrivacyStatement
from clipless_dp.statement.facts import CHANGED
from clipless_dp.tensor_types import plain

if TYPE_CHECKING:
    from clipless_dp.monotone import MonotoneCertificate


def checked_classes(classes: Any, outputs: int, link: Link) -> tuple[Any, ...] | None:
    """Labels of the classes, once they are as many as there are scores.

    Raises:
        ConfigurationError: they are not.
    """
    if classes is None:
        return None
    if isinstance(classes, (str, bytes, Mapping)) or not hasattr(classes, "__iter__"):
        raise ConfigurationError(f"classes must be a list of labels, got {type(classes).__name__}")
    found = tuple(label.item() if isinstance(label, (np.generic, Tensor)) else label for label in classes)
    if len(set(found)) < len(found):
        raise ConfigurationError(f"classes must be labels, none of them twice, got {found!r:.200}")
    if not link.is_of_classes:
        raise ConfigurationError("the model was not trained by a loss of classes: leave classes out")
    expected = 2 if link.kind == "logistic" or outputs == 1 else outputs
    if len(found) != expected:
        raise ConfigurationError(f"{len(found)} classes were given for the {expected} that the model tells apart")
    return found


@dataclass(frozen=True)
class Promise:
    """What the training of a model promised.

    Attributes:
        epsilon: spent on what was released, an upper bound.
        delta: the δ that it holds at.
        statement: as :func:`clipless_dp.report` says it, the ledger included.
        runs: how many private steps of each run on the weights it counts; ``None``: those that the ledger of the
            statement names, whatever was done to the weights by the time that a :class:`Predictor` is made with it.
    """

    epsilon: float
    delta: float
    statement: PrivacyStatement = field(repr=False)
    runs: Mapping[str, int] | None = field(default=None, repr=False)


def runs_of(statement: PrivacyStatement) -> dict[str, int]:
    """How many private steps of each run the ledger of a statement knows; none where it names none."""
    state = statement.facts["ledger"]
    try:
        return dict(Ledger.from_state_dict(state.get("ledger", state)).runs)
    except LedgerFormatError:
        # That of an accountant of a user's own.
        return {}


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained model that predicts; :func:`clipless_dp.load` returns one.

    Attributes:
        net: takes samples ``(B, ...)`` as they are, through front-end and statistics, to scores.
        link: how scores become probabilities.
        outputs: scores of one sample.
        classes: labels, in the order of the scores; ``None``: their indices.
        threshold: of two classes, the probability above which the second is predicted; ``None``: the likelier one.
            One that was chosen by looking at private data has a price of its own.
        target_range: what numbers are cut to, or ``None``.
        encode: makes a tensor of a data frame, or ``None``.
        dtype: of numbers that the network takes; ``None``: any.
        promise: what was promised, or what finds out, and is asked each time: weights may be trained on. The
            properties ``epsilon``, ``delta`` and ``statement`` read it, and raise a :class:`clipless_dp.PrivacyError`
            where private steps that it does not count were taken on the weights. They warn, and the statement says so,
            where weights or buffers are others than those that it is of.
        slopes: reads off the network how it moves with single columns, or ``None``; see :meth:`certificate`.
    """

    net: nn.Module = field(repr=False)
    link: Link
    outputs: int
    promise: Promise | Callable[[], Promise] = field(repr=False)
    classes: tuple[Any, ...] | None = None
    threshold: float | None = None
    target_range: tuple[float, float] | None = None
    encode: Callable[[Any], Tensor] | None = field(default=None, repr=False)
    dtype: torch.dtype | None = field(default=None, repr=False)
    # Of the class too, so that pickles of former versions have it.
    slopes: Callable[[nn.Module], MonotoneCertificate] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", checked_classes(self.classes, self.outputs, self.link))
        if isinstance(self.promise, Promise) and self.promise.runs is None:
            object.__setattr__(self, "promise", replace(self.promise, runs=runs_of(self.promise.statement)))
        self._start()
        if self.threshold is not None:
            object.__setattr__(self, "threshold", share("threshold", self.threshold, "[0, 1]"))
            of_two = self.link.kind == "logistic" or (self.link.kind == "softmax" and self.outputs == 2)
            if not of_two:
                raise ConfigurationError("a threshold is of the probability of the second of two classes: leave it out")

    def __getstate__(self) -> dict[str, Any]:
        promised, known = self.promised, lineage.of(self.net)
        if promised.runs is None:
            promised = replace(promised, runs=known.runs)
        # What was changed until now in buffers of a live result, the promise tells.
        past = known.record(as_now=not isinstance(self.promise, Promise))
        return {**vars(self), "promise": promised, "_past": past}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        past, runs = state.pop("_past", None), state.pop("_runs", None)
        if runs is not None:
            # Pickles of former versions.
            state["promise"] = replace(state["promise"], runs=runs)
        vars(self).update(state)
        if past is not None:
            lineage.of(self.net).restore(past)
        self._start()

    def _start(self) -> None:
        """From here on weights and buffers are compared with what is known of them."""
        if isinstance(self.promise, Promise):
            known = lineage.of(self.net)
            known.start(known.named())

    @property
    def promised(self) -> Promise:
        """ε, δ and statement of one time; each question makes the statement anew where training may go on.

        Warns with :class:`clipless_dp.PrivacyWarning` where weights or buffers are not those that the promise is of:
        something else has set or trained them since. The statement then has that among its findings.

        Raises:
            PrivacyError: private steps were taken on the weights that are not counted.
        """
        found = self._promised()
        if not found.statement.is_of_the_weights:
            warn_caller(f"{CHANGED} Read predictor.statement, and publish it with them", PrivacyWarning)
        return found

    def _promised(self) -> Promise:
        if not isinstance(self.promise, Promise):
            return self.promise()
        counted = self.promise.runs or {}
        if any(count > counted.get(run, 0) for run, count in lineage.of(self.net).runs.items()):
            raise PrivacyError(
                "private steps were taken on these weights since their promise was made, which it does not count: read "
                "it from the result of the last training, and give that the first one's accountant"
            )
        if lineage.of(self.net).is_as_left():
            return self.promise
        return replace(self.promise, statement=self.promise.statement.of_other_weights())

    @property
    def epsilon(self) -> float:
        """ε spent on what was released, an upper bound."""
        return self.promised.epsilon

    @property
    def delta(self) -> float:
        """The δ that this ε holds at."""
        return self.promised.delta

    @property
    def statement(self) -> PrivacyStatement:
        """What was promised, as :func:`clipless_dp.report` says it, the ledger included."""
        return self.promised.statement

    def certificate(self) -> MonotoneCertificate:
        """Of a table that :func:`clipless_dp.fit_table` trained with ``monotone=``: slopes in each column, as it is.

        Raises:
            ConfigurationError: it is of another training.
        """
        if self.slopes is None:
            raise ConfigurationError(
                "nothing is certified of single columns of it: of a table train with fit_table(monotone={column: 1}), "
                "and of a network of your own ask clipless_dp.monotone.certificate"
            )
        return self.slopes(self.net)

    def export_net(self) -> nn.Module:
        """All from samples as they are to scores as a plain module, for ``torch.export``, ONNX, ``torch.jit.trace``.

        See :meth:`clipless_dp.DPLipModel.export_net`. Columns of a data frame are encoded before: it takes what
        :attr:`encode` returns.

        Raises:
            ConfigurationError: as there; or what runs before the model is no module.
        """
        return plain_copy(self.net)

    @torch.no_grad()
    def scores(self, rows: Any, *, batch_size: int = 4096) -> Tensor:
        """What the network says of samples as they are, ``(N, ...)``, on the CPU.

        Args:
            rows: a tensor or an array ``(N, ...)``, or several inputs by name; a data frame, where one was trained on.
            batch_size: rows at once.

        Raises:
            InputError: the rows are not like those that were trained on.
        """
        size = whole("batch_size", batch_size)
        inputs = self._inputs(rows)
        with kept_modes(self.net):
            self.net.eval()
            if not isinstance(inputs, Tensor):
                return self._read(self.net(inputs))
            if not len(inputs):
                raise InputError("there is no row to predict")
            return torch.cat([self._read(self.net(some)) for some in inputs.split(size)])

    def predict_proba(self, rows: Any) -> Tensor:
        """Probabilities ``(N, C)`` of the classes, by the loss that the model was trained by; not calibrated.

        Raises:
            ConfigurationError: that loss says none.
            InputError: as :meth:`scores`; or a row has no scores, since it is not finite or has an unknown token.
        """
        return self.link.probabilities(self._known(rows))

    def predict(self, rows: Any) -> Any:
        """The label of each row, in a list; without :attr:`classes` a tensor of indices; of numbers, these.

        Raises:
            ConfigurationError: the loss that the model was trained by has no notion of a prediction.
            InputError: as :meth:`predict_proba`.
        """
        if self.link.kind == "number":
            numbers = self._known(rows)
            return numbers if self.target_range is None else numbers.clamp(*self.target_range)
        if not self.link.is_of_classes:
            raise ConfigurationError("the loss that the model was trained by predicts nothing by itself: read scores()")
        scores = self._known(rows)
        if self.threshold is None:
            chosen = self.link.classes(scores)
        else:
            chosen = (self.link.probabilities(scores)[:, 1] > self.threshold).long()
        return chosen if self.classes is None else [self.classes[index] for index in chosen.tolist()]

    def _known(self, rows: Any) -> Tensor:
        scores = self.scores(rows)
        lacking = scores.flatten(1).isnan().any(1) if scores.dim() > 1 else scores.isnan()
        if bool(lacking.any()):
            raise InputError(
                f"row {int(lacking.int().argmax())}, and {int(lacking.sum()) - 1} more, have no scores: they are not "
                "finite, or hold tokens that the model does not know"
            )
        return scores

    def _read(self, scores: Tensor) -> Tensor:
        # Of two classes by one score, one number a row.
        return scores.detach().cpu().flatten() if self.link.kind == "logistic" else scores.detach().cpu()

    def _inputs(self, rows: Any) -> Any:
        if self.encode is not None:
            rows = self.encode(rows)
        device, _ = parameter_device_and_dtype(self.net)
        if isinstance(rows, (Mapping, tuple)):
            for part in rows.values() if isinstance(rows, Mapping) else rows:
                unmasked("rows", part)
            return rows
        if isinstance(rows, Tensor):
            rows = plain(rows, "what is to be predicted")
        else:
            unmasked("rows", rows)
            try:
                rows = torch.as_tensor(np.asarray(rows))
            except (TypeError, ValueError) as error:
                raise InputError(f"rows must be numbers, got {type(rows).__name__}: {error}") from error
        if rows.layout != torch.strided or rows.is_nested or rows.is_quantized or rows.is_meta:
            raise InputError(
                f"rows must be a dense tensor of numbers, got one of layout {rows.layout} on {rows.device}: "
                "rows.to_dense(), or padded"
            )
        return rows.to(device, self.dtype if rows.is_floating_point() else None)


class Predicts(ABC):
    """Results that predict, and save what predicts to one file; shown in short, since weights and records are long."""

    def __repr__(self) -> str:
        try:
            return f"<{type(self).__name__}: {self}>"
        except (CliplessError, AccountingError) as error:
            # What is looked at in a debugger is shown, whatever was set.
            return f"<{type(self).__name__}: {type(error).__name__}: {error}>"

    @abstractmethod
    def __str__(self) -> str:
        """What was trained, and the ε that was spent."""

    @abstractmethod
    def predictor(self, *, classes: Sequence[Any] | None = None, threshold: float | None = None) -> Predictor:
        """What predicts, by itself: the network shares its weights with this result.

        Args:
            classes: labels, in the order of the scores; where the result knows them, they are these.
            threshold: see :class:`Predictor`.
        """

    @abstractmethod
    def content(
        self, *, classes: Sequence[Any] | None = None, threshold: float | None = None, notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """What :meth:`save` writes: tensors and plain values."""

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        classes: Sequence[Any] | None = None,
        threshold: float | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Writes what predicts to one file, for :func:`clipless_dp.load`: as a whole or not at all.

        In it are weights, front-end, released statistics, labels, and the privacy statement with its ledger. Training
        losses, counts of rows and the optimizer's state are not: training does not go on from it. Of a result of
        :func:`clipless_dp.fit` what builds the network is not in it either, nor a preset of your own.

        Args:
            path: of the file.
            classes: labels, in the order of the scores; where the result knows them, they are these.
            threshold: see :class:`Predictor`.
            notes: for the statement.

        Raises:
            ConfigurationError: labels or threshold do not fit, or the weights are spread over several processes, or
                statistics of a preset of your own are no :class:`clipless_dp.presets.WithoutMean`.
            PrivacyError: private steps were taken on the weights that the ledger lacks.
            CheckpointError: the file cannot be written; one that was there is left as it was.
        """
        save_checkpoint(path, self.content(classes=classes, threshold=threshold, notes=notes))

    def scores(self, rows: Any, *, batch_size: int = 4096) -> Tensor:
        """See :meth:`Predictor.scores`."""
        return self.predictor().scores(rows, batch_size=batch_size)

    def predict_proba(self, rows: Any) -> Tensor:
        """See :meth:`Predictor.predict_proba`."""
        return self.predictor().predict_proba(rows)

    def predict(self, rows: Any) -> Any:
        """See :meth:`Predictor.predict`."""
        return self.predictor().predict(rows)
