"""What training has done: a record for each epoch, and the result of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipless_dp.audit.gradients import SensitivityAudit
from clipless_dp.display import Table
from clipless_dp.errors import CheckpointError, ConfigurationError, PrivacyError
from clipless_dp.gates import BallProjection
from clipless_dp.model import DPLipModel, lineage
from clipless_dp.modules import parameter_device_and_dtype, state_of
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.prediction import Content, Link, Predictor, Predicts, Probe, Promise, content_of, rebuilt
from clipless_dp.statement import report
from clipless_dp.training.groups import Learning


@dataclass(frozen=True)
class EpochRecord:
    """One line of a history.

    Attributes:
        step: optimizer steps taken so far.
        epsilon: spent so far, at the run's δ.
        loss: mean training loss of the last step's batch. It is *not* private: for the data's owner only, so no file,
            pickles among them, holds it, and it is not shown. ``None`` for epochs that a checkpoint was read of.
        accuracy: share of correct predictions on the validation data, or ``None``. Nothing protects validation data.
        validation_loss: mean loss on the validation data, or ``None``.
        caps: those that adapt, as they are then, by the names of their gates: private, and to be shown.
        signal_to_noise: of each layer, by its path, how far its weights went since the last record over how far the
            noise that was added since takes them: near 1 they walk at random. It follows from the weights of all steps,
            which are released, and from public numbers: to be shown and published. ``None`` with other optimizers than
            SGD, and where weights are split among processes (:class:`clipless_dp.training.progress.SignalToNoise`).
    """

    step: int
    epsilon: float
    loss: float | None = field(repr=False)
    accuracy: float | None = None
    validation_loss: float | None = None
    caps: Mapping[str, float] | None = None
    signal_to_noise: Mapping[str, float] | None = None

    def __reduce__(self) -> tuple[type[EpochRecord], tuple[Any, ...]]:
        kept = self.accuracy, self.validation_loss, self.caps, self.signal_to_noise
        return type(self), (self.step, self.epsilon, None, *kept)

    def __copy__(self) -> EpochRecord:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EpochRecord:
        return self


@dataclass(repr=False)
class FitResult(Predicts):
    """What :func:`clipless_dp.fit` has done.

    Attributes:
        spent: ε when the run ended, at the δ of the run; :attr:`FitResult.epsilon` is what was spent by now.
        delta: the δ of :attr:`epsilon`, of predictors and of files; another one may be set.
        noise_multiplier: ``σ``; with a noise schedule, what its factors multiply.
        sample_rate: ``q``, of each sample, or person.
        steps: optimizer steps in all.
        history: a record for each epoch.
        audits: what attacks on the bounds reached, before training and, if that was asked for, at each checkpoint.
        optimizer: with its accountant.
        checkpoint: the checkpoint file, or ``None`` if there is none or the last one could not be written.
        micro_batch_size: rows that were processed at once, as given or chosen for the memory budget, or ``None``.
        learning: the settings, those that were chosen among them (:func:`clipless_dp.suggest_settings`).
        last_weights: with ``ema``, the weights of the last step, by name, which the average has replaced in the model:
            ``model.net.load_state_dict(result.last_weights, strict=False)`` puts them back.
    """

    spent: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    optimizer: CliplessDPOptimizer
    history: list[EpochRecord] = field(default_factory=list)
    audits: list[SensitivityAudit] = field(default_factory=list)
    checkpoint: Path | None = None
    micro_batch_size: int | None = None
    last_weights: dict[str, Tensor] | None = None
    learning: Learning | None = None

    def __post_init__(self) -> None:
        # Not what was spent at the end of the run: copies by dataclasses.replace are made after further steps, too.
        self._at: tuple[Any, ...] | None = None

    @property
    def epsilon(self) -> float:
        """ε spent by now at :attr:`delta` as it is now, an upper bound, under the accountant's neighbouring relation:
        by default adding or removing one. Further steps by :attr:`optimizer`, and all else that its ledger holds by
        now, are in it; steps by another optimizer under another ledger are not (``optimizer.ledger_is_incomplete()``,
        which ``print`` tells)."""
        accountant, delta = self.optimizer.accountant, self.delta
        entries = accountant.ledger.entries
        if self._at is None or self._at[0] is not accountant or self._at[1:3] != (delta, entries):
            self._at = accountant, delta, entries, float(self.optimizer.get_epsilon(delta))
        return float(self._at[3])

    def __str__(self) -> str:
        accuracy = self.history[-1].accuracy if self.history else None
        shown = "" if accuracy is None else f"accuracy {100 * accuracy:.2f} %, "
        saved = "" if self.checkpoint is None else f", checkpoint {self.checkpoint}"
        relation = self.optimizer.accountant.relation.replace("_", "-")
        if self.optimizer.unit == "person":
            relation += " person"
        # By another optimizer, under another ledger.
        since = self.optimizer.ledger_is_incomplete()
        return (
            f"{shown}ε = {self.epsilon:.4f} at δ = {self.delta:g} ({relation}), "
            f"σ = {self.noise_multiplier:.4f}, q = {self.sample_rate:.6g}, {self.steps} steps{saved}"
            f"{'; the model has private steps that this ε does not count' if since else ''}"
        )

    def _repr_html_(self) -> str:
        rows = [
            (record.step, f"{record.epsilon:.4f}", "–" if record.accuracy is None else f"{100 * record.accuracy:.2f}")
            for record in self.history
        ]
        return Table(("step", "ε at the δ of the run", "accuracy %"), rows, ("right",) * 3, [str(self)]).html()

    def predictor(self, *, classes: Sequence[Any] | None = None, threshold: float | None = None) -> Predictor:
        """See :meth:`clipless_dp.prediction.Predicts.predictor`."""
        return predictor_of(self, self.optimizer.model, classes=classes, threshold=threshold)

    def content(
        self, *, classes: Sequence[Any] | None = None, threshold: float | None = None, notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """See :meth:`clipless_dp.prediction.Predicts.content`."""
        model = self.optimizer.model
        predictor = predictor_of(self, model, classes=classes, threshold=threshold, notes=notes)
        probe = Probe.of(predictor, model.random_inputs(PROBES, torch.Generator().manual_seed(0)))
        settings = {"input_norm": bounded(model.input_norm)}
        return content_of(predictor, "fit", state_of(model.net), settings, probe)


def bounded(norm: float) -> float | None:
    """An input norm for a file; ``None`` where samples stay as they are."""
    return norm if math.isfinite(norm) else None


def _norm_in(content: Content) -> float | None:
    found = content.settings.get("input_norm")
    if found is None:
        return None
    if type(found) not in (int, float) or not 0.0 < found < math.inf:
        raise CheckpointError(f"{content.name} is altered: its input_norm is no positive number")
    return float(found)


def require_same_norm(content: Content, model: DPLipModel) -> None:
    """Refuses a model that projects samples onto another ball than the one that was trained: made-up rows may fit both.

    Raises:
        CheckpointError: it does.
    """
    there, here = _norm_in(content), bounded(model.input_norm)
    if there != here:
        raise CheckpointError(
            f"{content.name} holds the weights of a network that computes something else than this one: it was trained "
            f"with input_norm={there}, and this one has {here}. Build it as it was for training"
        )


PROBES = 4
"""Made-up rows by which a network that is built anew is compared."""


def predictor_of(result: FitResult, net: nn.Module, *, notes: Sequence[str] = (), **more: Any) -> Predictor:
    """What predicts, by a network around the trained model.

    Args:
        result: of the training.
        net: the model itself, or what it is part of.
        notes: for the statement.
        more: further attributes of :class:`clipless_dp.prediction.Predictor`.

    Raises:
        ConfigurationError: the weights are spread over several processes, or an attribute does not fit.
    """
    optimizer, model = result.optimizer, result.optimizer.model
    if not model.placement.is_whole:
        raise ConfigurationError(
            "each process holds a part of the weights: gather them, and save model.net.state_dict()"
        )
    outputs = math.prod(model.output_shape)

    def promise() -> Promise:
        if optimizer.ledger_is_incomplete():
            raise PrivacyError(
                "another training took private steps on these weights, before this one or since, which the ledger of "
                "this result lacks: its ε is too small for them. Train on with accountant=first.optimizer.accountant, "
                "so that both compose, and read and save the result of the last training"
            )
        statement = report(optimizer, delta=result.delta, notes=notes)
        # The ledger has all of them, as was asked above.
        return Promise(optimizer.get_epsilon(result.delta), result.delta, statement, lineage.of(net).runs)

    return Predictor(
        net,
        Link.of(model.loss_function, outputs),
        outputs,
        promise,
        **{"dtype": model.device_and_dtype()[1], **more},
    )


def loaded_fit(content: Content, net: nn.Module) -> Predictor:
    """What predicts, of the file of a :class:`FitResult` and its network.

    Args:
        content: of the file.
        net: as it was for training, a :class:`clipless_dp.DPLipModel` or the network in one, with any weights: they are
            replaced by those of the file.

    Raises:
        ConfigurationError: it is no network.
        CheckpointError: it is another one, or projects samples onto another ball.
    """
    if not isinstance(net, nn.Module):
        raise ConfigurationError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if any(parameter.is_meta for parameter in net.parameters()):
        raise ConfigurationError("net has parameters without values, on the meta device: net.to_empty(device='cpu')")
    norm = _norm_in(content)
    if isinstance(net, DPLipModel):
        require_same_norm(content, net)
        return rebuilt(content, net, net.net, dtype=net.device_and_dtype()[1])
    whole = net if norm is None else nn.Sequential(BallProjection(norm), net)
    return rebuilt(content, whole, net, dtype=parameter_device_and_dtype(net)[1])
