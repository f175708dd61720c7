"""Canaries among a user's own data: one training run, and what its weights tell about who was in."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from clipless_dp.audit.release import Flags, guess
from clipless_dp.audit.result import EpsilonAudit, check_levels
from clipless_dp.audit.statistics import Numbers
from clipless_dp.errors import ConfigurationError
from clipless_dp.model import DPLipModel
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.packing import Structure
from clipless_dp.sampling import Samples, overlaps
from clipless_dp.sampling.people import People, people_of
from clipless_dp.testing.company import plausible_targets

Data = Dataset[Any] | tuple[Any, Any] | Mapping[str, Any] | Sequence[Any] | Samples
Train = Callable[..., Any]

_FEWEST = 30
"""Of which the first third chooses how to guess about the rest."""

_LARGEST_ANGLES = 1 << 13
"""Entries of a sample up to which canaries are put at right angles to each other."""

_STEP = 1e-3
"""The part of the weights' change over which slopes are taken."""

_ROWS = 256
"""Canaries whose losses are computed at once."""


@dataclass(frozen=True)
class CanaryAudit(EpsilonAudit):
    """What an adversary who sees the trained weights alone told about the canaries; prints in a few lines.

    Attributes:
        canaries: how many there were; each was in by the toss of a coin.
        evidence: what the bound rests on, in words.
        trained: what the training function returned.
    """

    canaries: int
    evidence: str
    trained: Any = field(repr=False, compare=False)

    def __str__(self) -> str:
        return (
            f"{self.headline('canary audit (one run)')}\n"
            f"{self.canaries} canaries among the training samples, each in by the toss of a coin; {self.evidence}\n"
            f"the run is charged like any: its model has spent ε = {self.epsilon:.3f} of the real samples"
        )


def canaries(
    train: Train,
    model: DPLipModel,
    dataset: Data,
    *,
    delta: float,
    canaries: int | tuple[Tensor | Structure, Tensor] | tuple[Tensor | Structure, Tensor, Any] = 1000,
    confidence: float = 0.95,
    groups: Any = None,
) -> CanaryAudit:
    """Puts canaries into a user's own data, trains once, and bounds ε from below by how well they are told apart.

    Canaries are samples that nobody is, put behind the real ones. Each is in by the toss of a fair coin; in place of
    one that is out lies a sample that contributes nothing, so that the data's size, and with it sampling rate and
    divisor, tell nothing about the coins. After one run an adversary, who knows the canaries, the weights before and
    after, and nothing else, guesses of some of them whether they were in, by their losses; of the others nothing. With
    ``v`` of ``r`` guesses right, ε is bounded by :func:`clipless_dp.audit.statistics.one_run_p_value`.

    Args:
        train: trains a model on data, both of which it is given, and returns a :class:`clipless_dp.training.FitResult`
            or the optimizer: ``lambda model, data: fit(model, data, epsilon=3.0, …)``. Called once.
        model: the wrapped model before training; it is what ``train`` trains.
        dataset: inputs and targets, see :class:`clipless_dp.sampling.Samples`. A public ``dataset_size`` that ``train``
            states counts the canaries too.
        delta: δ in [0, 1).
        canaries: how many are made: noise beyond the model's input gate (or random tokens) with random targets; or
            inputs ``(m, *input_shape)`` and targets ``(m, ...)`` of your own, which no real sample may enter; with
            ``groups`` also inputs, targets and ids ``(m,)`` of canaries who have several rows. One coin decides about
            all rows of a person, and the adversary adds up what is seen of them.
        confidence: of the lower bound.
        groups: whose each sample of ``dataset`` is, an id for each: canaries are then people of one sample each, or of
            those that their own ids say, whom no real id names. ``train`` is given the ids of all as its third
            argument: ``lambda model, data, ids: fit(model, data, groups=ids, epsilon=3.0, …)``. Canaries of one sample
            tell nothing of how a person's rows are weighed.

    Returns:
        The lower bound beside the stated ε, and what ``train`` returned.

    Raises:
        ConfigurationError: an argument is out of range, there are fewer than 30 canaries, or they have ids and there
            are no ``groups``, no targets can be made for the model's loss, or ``train`` did not train the model, or
            trained it about people, of whom ``groups`` says nothing.
        InputError: the canaries do not fit the model, or ids are none.

    Guarantee:
        If training is (ε, δ)-private as stated, ``passed`` is false with probability at most ``1 - confidence``, with
        any data and canaries. An audit that passes proves nothing. The run is private for the real samples as any other
        is, and spends as much; what is printed follows from its weights and the coins.

    Source:
        Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run".
    """
    check_levels(delta, confidence)
    given = isinstance(canaries, (tuple, list)) and len(canaries) in (2, 3)
    if not given and (isinstance(canaries, bool) or not isinstance(canaries, int)):
        raise ConfigurationError(
            "canaries is a whole number, or a tuple: inputs, targets and, if people have several rows, ids of each "
            f"row; got a {type(canaries).__name__}"
        )
    samples = Samples.of(dataset, model.packing)
    if samples.tensors is not None:
        overlaps.refuse_overlapping_columns(samples.tensors[:-1], samples.tensors[-1:])
    shown = samples.first[0][0], samples.first[1][0]
    inputs, targets = _made(model, shown, canaries) if isinstance(canaries, int) else _given(model, canaries[:2])
    people, strangers = people_of(groups, len(samples)), _strangers(canaries, len(inputs), groups)
    if strangers.count < _FEWEST:
        raise ConfigurationError(f"{strangers.count} canaries say nothing: take at least {_FEWEST}")
    start = copy.deepcopy(model)
    inside: Flags = np.random.default_rng().random(strangers.count) < 0.5
    with warnings.catch_warnings():
        # Those that are out contribute nothing on purpose.
        warnings.filterwarnings("ignore", r"\d+ samples in batches contributed nothing", UserWarning)
        out = torch.from_numpy(strangers.spread(~inside))
        joined = _joined(dataset, samples, _absent(inputs, out), targets)
        trained = train(model, joined) if people is None else train(model, joined, people.with_strangers(strangers))
    optimizer = trained if isinstance(trained, CliplessDPOptimizer) else getattr(trained, "optimizer", None)
    if not isinstance(optimizer, CliplessDPOptimizer) or optimizer.model is not model:
        raise ConfigurationError(
            "train must train the model that it is given, and return the result of fit or the optimizer, got "
            f"{type(trained).__name__}"
        )
    if optimizer.unit != ("row" if people is None else "person"):
        raise ConfigurationError(
            f"train was about {'people' if people is None else 'rows'}: give groups= where it is about people, so that "
            "canaries are people of their own, and only there"
        )
    device, _ = model.device_and_dtype()
    by_row = _views(start, copy.deepcopy(model), inputs.to(device), targets.to(device))
    views = {name: strangers.sums(values) for name, values in by_row.items()}
    bound, evidence = guess(views, inside, len(inside) // 3, delta, confidence)
    stated = optimizer.get_epsilon(delta) if delta else math.inf
    return CanaryAudit(bound, float(stated), delta, confidence, strangers.count, evidence, trained)


def _made(model: DPLipModel, shown: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Random inputs beyond the input gate's radius with random targets: of the data, only shapes and types enter."""
    generator = torch.Generator()
    generator.seed()
    sample, target = shown
    formats = plausible_targets(model.loss_function, model.output_shape, count, generator, target)
    if not formats:
        raise ConfigurationError(
            f"{model.loss_function!r} takes no usual targets of shape {tuple(target.shape)} and type {target.dtype}: "
            "give canaries of your own, as a pair of inputs and targets"
        )
    if not math.isfinite(model.input_norm) or not model.graph.reads.is_floating_point:
        inputs = model.random_inputs(count, generator)
    else:
        directions = torch.randn(count, math.prod(model.input_shape), generator=generator)
        if count <= directions.shape[1] <= _LARGEST_ANGLES:
            # At right angles no canary looks like another.
            directions = torch.linalg.qr(directions.mT).Q.mT
        directions = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        inputs = (2.0 * model.input_norm * directions).reshape(count, *model.input_shape)
    return inputs.to(sample), formats[0].to(target)


def _given(model: DPLipModel, pair: tuple[Tensor | Structure, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = model.rows(pair[0]), pair[1]
    device, _ = model.device_and_dtype()
    model.check_inputs(inputs.to(device))
    if len(inputs) != len(targets):
        raise ConfigurationError(f"{len(inputs)} inputs of canaries do not fit {len(targets)} targets")
    return inputs, targets


def _strangers(canaries: Any, rows: int, groups: Any) -> People:
    """Whose each of the canaries' rows is: their own, where nothing else is said."""
    if isinstance(canaries, int) or len(canaries) == 2:
        if rows < _FEWEST:
            raise ConfigurationError(f"{rows} canaries say nothing: take at least {_FEWEST}")
        return People(np.arange(rows), rows)
    if groups is None:
        raise ConfigurationError(
            "canaries have ids, and the data has none: give groups=, an id for each of its samples, so that training "
            "is about people; or leave the canaries' ids out, and each is one sample"
        )
    return People(canaries[2], rows)


def _absent(inputs: Tensor, out: Tensor) -> Tensor:
    """The canaries, those that are out made into samples which contribute nothing: NaN, or an unknown token."""
    marked = inputs.clone()
    rows = out.to(marked.device).nonzero().flatten()
    if marked.is_floating_point():
        marked.flatten(1)[rows, 0] = math.nan
    else:
        marked[rows] = -1
    return marked


def _joined(dataset: Any, samples: Samples, inputs: Tensor, targets: Tensor) -> Data:
    """The real samples with the canaries behind them."""
    inputs, targets = inputs.to(samples.first[0]), targets.to(samples.first[1])
    if samples.tensors is not None:
        known, labels = samples.all()
        return torch.cat([known, inputs]), torch.cat([labels, targets])
    if samples.is_structured:
        # Checked here, where the samples themselves are seen, and not what is made of them.
        dataset = Samples.to_train_on(samples).as_pairs()
    return ConcatDataset([dataset, TensorDataset(inputs, targets)])


@torch.no_grad()
def _views(start: DPLipModel, end: DPLipModel, inputs: Tensor, targets: Tensor) -> dict[str, Numbers]:
    """Several numbers for each canary ``(m,)``, larger where it seems to have been in.

    Losses before and after, and the loss's slope along the weights' change, which for one step of plain SGD is the
    inner product of the canary's gradient with the noisy sum.
    """
    before, after = _losses(start, inputs, targets), _losses(end, inputs, targets)
    for moving, reached in zip(start.net.parameters(), end.net.parameters(), strict=True):
        moving.add_(reached - moving, alpha=_STEP)
    slopes = (before - _losses(start, inputs, targets)) / _STEP
    return {"the loss": -after, "the fall of the loss": before - after, "the slope of the loss": slopes}


def _losses(model: DPLipModel, inputs: Tensor, targets: Tensor) -> Numbers:
    model.eval()
    _, dtype = model.device_and_dtype()
    found = []
    for some, truth in zip(inputs.split(_ROWS), targets.split(_ROWS), strict=True):
        some = some.to(dtype) if some.is_floating_point() else some
        found.append(model.loss_function.per_sample(model(some), truth).nan_to_num().double().cpu())
    return torch.cat(found).numpy()
