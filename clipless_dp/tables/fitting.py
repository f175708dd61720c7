"""One call: statistics, features and training, all charged to one ledger."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from accounting import calibrate_noise_multiplier, create_accountant
from clipless_dp.arguments import positive, whole
from clipless_dp.distributed import placement
from clipless_dp.errors import CheckpointError, ConfigurationError, InputError
from clipless_dp.features import RandomCosines, TableEncoding
from clipless_dp.graph import gated
from clipless_dp.losses import BinaryCrossEntropy, Huber, Loss, TauCrossEntropy
from clipless_dp.model import DPLipModel, lineage
from clipless_dp.noise import NoiseSource
from clipless_dp.precision import full_precision
from clipless_dp.prediction import ODD, Content, Predictor, rebuilt
from clipless_dp.sampling import Samples, as_tensors, trained_on
from clipless_dp.sampling.overlaps import refuse_overlapping_table
from clipless_dp.sampling.people import ROWS_PER_GROUP, People, people_of
from clipless_dp.sampling.samples import public_size
from clipless_dp.statistics import Releases, Standardisation, private_standardisation
from clipless_dp.statistics.release import tensor_of
from clipless_dp.tables.kept import require_same_task
from clipless_dp.tables.models import TableClassifier, TableRegressor
from clipless_dp.tables.monotone import learning_rate as monotone_rate
from clipless_dp.tables.monotone import monotone_model, monotone_net, raw_certificate, signs_of
from clipless_dp.tables.settings import LABELS_SHARE, STATISTICS_SHARE, learning
from clipless_dp.tables.tasks import Classes, Numbers, Start, Task, regression_head
from clipless_dp.training import fit
from clipless_dp.training.fit import require_trainable
from clipless_dp.training.groups import require_known


@overload
def fit_table(
    rows: Any, labels: Any, *, epsilon: float, delta: float, target_range: tuple[float, float], **options: Any
) -> TableRegressor: ...
@overload
def fit_table(
    rows: Any, labels: Any, *, epsilon: float, delta: float, target_range: None = None, **options: Any
) -> TableClassifier: ...
@full_precision()
def fit_table(
    rows: Any,
    labels: Any,
    *,
    epsilon: float,
    delta: float,
    dataset_size: int | None = None,
    cosines: int = 512,
    accountant: str = "prv",
    checkpoint: str | os.PathLike[str] | None = None,
    noise: NoiseSource | str | None = None,
    reproducible_seed: int | None = None,
    groups: Any = None,
    encoding: TableEncoding | None = None,
    classes: Sequence[Any] | None = None,
    target_range: tuple[float, float] | None = None,
    balance: float = 0.0,
    monotone: Mapping[Any, int] | None = None,
    **changes: Any,
) -> TableClassifier | TableRegressor:
    """Trains on a table of any scales: private statistics, random cosines, one linear layer.

    A tenth of the budget goes into :func:`clipless_dp.statistics.private_standardisation`, a hundredth into the shares
    of the classes (:func:`clipless_dp.statistics.private_fraction`, :func:`clipless_dp.statistics.private_shares`), or
    mean and deviation of the targets, the rest into 100 to 300 steps on a gated linear layer over
    :class:`clipless_dp.features.RandomCosines`. It starts from zero weights and the log-odds of those shares, so that
    no step is spent on learning that one label is rare. All are in one ledger.
    Settings follow from ``dataset_size``, ``epsilon`` and nothing else; batches have up to 4096 rows.

    They were chosen on held-out fifths of the training data of the eight tables of ``benchmarks/tables.py``, once for
    all of them, never on test data. For a table of yours they cost no privacy.

    Args:
        rows: ``(N, columns)``, floating-point, a tensor or numpy array; cells may be missing (NaN). With ``encoding``,
            a data frame.
        labels: ``(N,)``, 0 or 1; with ``classes`` any of them; with ``target_range`` numbers. Of a data frame, a column
            may be named in their place.
        epsilon: target ε of statistics and training together.
        delta: target δ.
        dataset_size: public number of rows; by default ``N``, which is then taken to be public.
        cosines: number of random cosines; memory is ``4N(columns + cosines)`` bytes.
        accountant: ``"prv"``, ``"rdp"`` or ``"auto"``.
        checkpoint: file of the training; the statistics are kept beside it, and of what columns, labels and ranges they
            are, so that a run of the same task that goes on pays once.
        noise: ``"system"``, ``"secure"`` or a source, for statistics and training.
        reproducible_seed: as for :func:`clipless_dp.fit`; it covers the statistics, too.
        groups: whose each row is, an id for each, or of a data frame the name of their column: then statistics,
            training and ``dataset_size`` are about people, as in :func:`clipless_dp.fit`, whose ``rows_per_group`` and
            ``group_weights`` are among ``changes``.
        encoding: how the columns of a data frame become numbers, by public rules. Only the scales of its numbers are
            charged.
        classes: all labels there can be, *public*; by default 0 and 1.
        target_range: for a regression, the *public* range ``(low, high)`` that targets are cut to.
        balance: ``p`` in [0, 1] of :func:`clipless_dp.losses.balanced_weights` of the charged shares: at 0, the
            default, each row counts the same, at 1 each class. The noise grows by the largest weight.
        monotone: for columns of numbers, by name or place, 1 where more of it must never lower the answer, -1 where it
            must never raise it, all else being the same; the answer is the log-odds of the second class, or the number.
            By public knowledge, never by a look at the data. In place of random cosines there are hidden units of the
            same signs then (:class:`clipless_dp.layers.MonotoneResidual`); ``cosines`` is not read.
            :meth:`TableModel.certificate` says what is certain.
        changes: further arguments of :func:`clipless_dp.fit`, in place of these settings; ``validation`` is rows as
            they are, with labels; of a data frame, a pair of a frame and its labels.

    Returns:
        A :class:`TableRegressor` where there is a ``target_range``, else a :class:`TableClassifier`.

    Raises:
        InputError: rows or labels have another shape or type, or a label is none of the classes, or an id is missing,
            or a frame lacks a column or has one of another type.
        PrivacyError: a row is there more than once, or lies on another person's in memory (windows that overlap).
        ConfigurationError: an argument is out of range, or several processes train together: each would release
            statistics of its own. Nothing was released then.
        CheckpointError: the checkpoint, or the statistics beside it, are of another task or run, or unreadable.

    Guarantee:
        The model, statistics included, is (``epsilon``, ``delta``)-differentially private with respect to adding
        or removing one row with its label; with ``groups``, one person with all of their rows.
    """
    given = {"epsilon": epsilon, "delta": delta, "dataset_size": dataset_size, "accountant": accountant, "noise": noise}
    require_known({**changes, **given, "checkpoint": checkpoint, "reproducible_seed": reproducible_seed})
    task = _task(classes, target_range, balance)
    named = {"labels": labels, "groups": groups}
    if isinstance(encoding, TableEncoding) and isinstance(groups, str):
        groups = encoding.column(rows, groups)
    table, targets = _read(rows, labels, encoding, task)
    _check_run(noise, reproducible_seed)
    validation = changes.get("validation")
    held_out = None if validation is None else _validation(validation, encoding, task, table.shape[1])
    people = people_of(groups, len(table), changes.get("rows_per_group", ROWS_PER_GROUP))
    # What was given: of a copy it is seen no more what lay on one another.
    refuse_overlapping_table(rows, labels, people)
    Samples.to_train_on((table, targets), people=people)
    size = public_size(dataset_size, len(table), people)
    epsilon, delta, cosines = positive("epsilon", epsilon), positive("delta", delta), whole("cosines", cosines)
    signs = None if monotone is None else signs_of(monotone, encoding, table.shape[1], task)
    expand: nn.Module = nn.Identity() if signs is not None else RandomCosines(table.shape[1], cosines).to(table.device)
    inputs = table.shape[1] + (cosines if signs is None else 0)
    made = partial(_model, inputs) if signs is None else partial(_monotone_model, signs)
    _require_trainable(made, inputs, {**changes, **given, "epsilon": epsilon, "dataset_size": size}, people)
    ledger = create_accountant(accountant, dataset_size=size)
    unit = calibrate_noise_multiplier(target_epsilon=epsilon, delta=delta, sample_rate=1.0, steps=1)
    require_same_task(checkpoint, encoding, table.shape[1], task, signs, **named)
    releases = Releases(ledger, size, checkpoint, reproducible_seed, noise, people)
    measured = table.shape[1] if encoding is None else encoding.measured
    standardise = _Standardised(measured)
    if measured:
        standardise.of_numbers = private_standardisation(
            table[:, :measured],
            noise_multiplier=unit / math.sqrt(STATISTICS_SHARE),
            **releases.arguments("statistics"),
        )
    start = task.start(targets, unit / math.sqrt(LABELS_SHARE), **releases.arguments("labels"))
    model = made(start).to(table.device)
    settings: dict[str, Any] = {
        **learning(size, epsilon, start.rate, start.largest_rate),
        **({} if signs is None else {"lr": start.rate * monotone_rate(size, epsilon)}),
        "checkpoint": checkpoint,
        "noise": noise,
        "reproducible_seed": reproducible_seed,
        "dataset_size": size,
        "groups": groups,
        **changes,
    }
    if held_out is not None:
        settings["validation"] = expand(standardise(held_out[0])), start.targets(held_out[1])
    features = expand(standardise(table))
    result = fit(model, (features, start.targets(targets)), epsilon=epsilon, delta=delta, accountant=ledger, **settings)
    for part in (standardise, expand, start.head):
        lineage.of(model).goes_with(part)
    net = nn.Sequential(standardise, expand, model.net, start.head)
    notes = _notes(encoding, measured, task, signs)
    if isinstance(task, Numbers):
        return TableRegressor(net, result, encoding, notes, task.target_range)
    return TableClassifier(net, result, encoding, notes, task.classes)


class _Standardised(nn.Module):
    """Standardises the first columns of encoded rows, and leaves the others at their public scale."""

    def __init__(self, measured: int) -> None:
        super().__init__()
        self.measured = measured
        self.of_numbers: nn.Module = nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``(B, columns)`` as float32."""
        if rows.dim() != 2 or rows.shape[1] == self.measured:
            standardised: Tensor = self.of_numbers(rows)
            return standardised
        numbers, public = rows.split([self.measured, rows.shape[1] - self.measured], 1)
        return torch.cat([self.of_numbers(numbers).float(), public.float()], 1)


def _task(classes: Sequence[Any] | None, target_range: tuple[float, float] | None, balance: float) -> Classes | Numbers:
    if target_range is None:
        return Classes(classes, balance)
    if classes is not None or balance:
        raise ConfigurationError("target_range is of a regression, which has neither classes nor balance")
    return Numbers(target_range)


def _read(rows: Any, labels: Any, encoding: TableEncoding | None, task: Task) -> tuple[Tensor, Tensor]:
    """Rows and labels as tensors; refuses what cannot be trained on, before a statistic is released."""
    if encoding is not None:
        if not isinstance(encoding, TableEncoding):
            raise ConfigurationError(f"encoding must be a TableEncoding, got {type(encoding).__name__}")
        table = encoding(rows)
        labels = encoding.column(rows, labels) if isinstance(labels, str) else labels
    elif not isinstance(rows, Tensor) and hasattr(rows, "columns"):
        raise InputError(
            f"a {type(rows).__name__} needs encoding=TableEncoding(numbers, categories), which says what columns are"
        )
    else:
        table = tensor_of(rows)
        if isinstance(task, Classes) and task.classes == (0, 1):
            labels = tensor_of(labels)
    if table.dim() != 2 or table.shape[1] == 0 or not table.is_floating_point():
        raise InputError(f"expected floating-point rows (N, columns), got {table.dtype} {tuple(table.shape)}")
    if table is not rows:
        # What is trained on may be a copy of these.
        trained_on.note((rows, labels))
    return table, task.read(labels, len(table)).to(table.device)


def _validation(data: Any, encoding: TableEncoding | None, task: Task, columns: int) -> tuple[Tensor, Tensor]:
    if encoding is None:
        rows, labels = as_tensors(data)
        if rows.dim() != 2 or rows.shape[1] != columns or not rows.is_floating_point():
            raise InputError(
                f"expected floating-point validation rows (N, {columns}), got {rows.dtype} {tuple(rows.shape)}"
            )
        return rows, task.read(labels, len(rows))
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise InputError(f"validation must be a pair of a data frame and its labels, got {type(data).__name__}")
    return _read(data[0], data[1], encoding, task)


def _check_run(noise: NoiseSource | str | None, reproducible_seed: int | None) -> None:
    if placement.world().size > 1:
        raise ConfigurationError(
            "fit_table runs in one process: release the statistics once, and call fit on all ranks"
        )
    if noise is not None and reproducible_seed is not None:
        raise ConfigurationError(f"noise={noise!r} cannot be reproduced: leave out reproducible_seed, or noise")


def _require_trainable(
    made: Callable[[Start], DPLipModel], inputs: int, arguments: dict[str, Any], people: People | None
) -> None:
    """Refuses arguments of the training before a statistic is released for it, on made-up rows."""
    size, epsilon = arguments["dataset_size"], arguments["epsilon"]
    options = {**learning(size, epsilon, 1.0, 1.0), **arguments, "accountant": "rdp", "noise": None}
    options.pop("validation", None)
    if people is not None:
        # Whose rows are was read, and made-up ones are nobody's.
        options = {name: value for name, value in options.items() if name not in ("rows_per_group", "group_weights")}
    start = Start(Huber(), torch.zeros(1), 1.0, Tensor.float, nn.Identity(), 1.0, 1.0)
    rows = torch.rand(2, inputs, generator=torch.Generator().manual_seed(0)) / inputs
    require_trainable(made(start), (rows, torch.zeros(2)), **options)


def _model(inputs: int, start: Start) -> DPLipModel:
    """One gated layer that starts from zero weights, and from a bias that was charged."""
    linear = nn.Linear(inputs, len(start.bias))
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.requires_grad_(False).copy_(start.bias)
    return _wrapped(linear, inputs, start.cap, start.loss)


def _monotone_model(signs: tuple[int, ...], start: Start) -> DPLipModel:
    return monotone_model(signs, start.loss, start.bias)


def _wrapped(linear: nn.Linear, inputs: int, cap: float, loss: Loss) -> DPLipModel:
    net = gated(nn.Sequential(linear), cotangent_norm=cap)
    return DPLipModel(net, input_shape=(inputs,), input_norm=1.0, loss=loss)


def loaded_table(content: Content) -> Predictor:
    """What predicts, of the file of a :class:`TableModel`.

    Raises:
        CheckpointError: the file is of another version, or was altered.
    """
    settings = content.settings
    try:
        measured, columns = int(settings["measured"]), int(settings["columns"])
        # Files of former versions know of no monotone tables.
        signs = None if settings.get("monotone") is None else tuple(map(int, settings["monotone"]))
        expand: nn.Module = nn.Identity()
        if signs is None:
            expand = RandomCosines(columns, int(settings["cosines"]), seed=int(settings["seed"]))
        outputs, affine, encoding = int(settings["outputs"]), settings["affine"], settings["encoding"]
        head: nn.Module = nn.Identity() if outputs > 1 else nn.Flatten(0)
        if affine is not None:
            head = regression_head(*map(float, affine))
        encode = None if encoding is None else TableEncoding(**encoding)
        standardise = _Standardised(measured)
        if measured:
            standardise.of_numbers = Standardisation.of_state(content.state, "0.of_numbers.")
        if isinstance(expand, RandomCosines):
            layer: nn.Module = gated(nn.Sequential(nn.Linear(columns + expand.cosines, outputs)))
        else:
            layer = monotone_net(signs or ())
    except ODD as error:
        raise CheckpointError(f"{content.name} is incomplete or altered: {error!r}") from error
    slopes = None if signs is None else partial(raw_certificate, names=None if encode is None else encode.names)
    return rebuilt(content, nn.Sequential(standardise, expand, layer, head), encode=encode, slopes=slopes)


def bounded_table(content: Content, predictor: Predictor) -> DPLipModel:
    """The layer of a loaded table behind its features, wrapped as it was for training: what an audit attacks.

    Args:
        content: of the file.
        predictor: of :func:`loaded_table`.

    Raises:
        CheckpointError: the file is of a version that does not say how its gradients were bounded.
    """
    settings = content.settings
    try:
        cap, weights = float(settings["cap"]), settings["class_weights"]
        signs = None if settings.get("monotone") is None else tuple(map(int, settings["monotone"]))
        inputs = int(settings["columns"]) + (int(settings["cosines"]) if signs is None else 0)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{content.name} does not say how gradients were bounded: it is of a former version, or altered"
        ) from error
    known = None if weights is None else tuple(map(float, weights))
    losses: dict[str, Loss] = {"logistic": BinaryCrossEntropy(class_weights=known), "number": Huber()}
    loss = losses.get(predictor.link.kind) or TauCrossEntropy(class_weights=known)
    if signs is not None:
        model = monotone_model(signs, loss, torch.zeros(1))
        trained = cast(nn.Sequential, predictor.net)[2]
        model.net.load_state_dict(trained.state_dict())
        return model
    (linear,) = (part for part in predictor.net.modules() if isinstance(part, nn.Linear))
    linear.requires_grad_(True)
    if linear.bias is not None:
        linear.bias.requires_grad_(False)
    return _wrapped(linear, inputs, cap, loss)


def _notes(
    encoding: TableEncoding | None, measured: int, task: Task, signs: tuple[int, ...] | None = None
) -> tuple[str, ...]:
    """What was public and what was charged, for a statement."""
    public = f"{measured} columns" if encoding is None else encoding.described()
    charged = "Their scales were charged" if measured else "No scale was measured"
    if encoding is not None and measured:
        charged = f"The scales of {', '.join(encoding.numbers)} were charged"
    rows = f"Rows: public were {public}. {charged}."
    if signs is None:
        return rows, task.told
    named = [str(place) for place in range(len(signs))] if encoding is None else list(encoding.names)
    told = ", ".join(f"{named[place]} ({sign:+d})" for place, sign in enumerate(signs) if sign)
    return rows, task.told, f"Monotone, whatever was learnt, in the public columns {told}."
