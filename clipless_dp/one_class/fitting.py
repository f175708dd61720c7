"""``fit_one_class``: positives that are charged, negatives that are nobody's, one optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from accounting import Accountant, GaussianRelease, calibrate_noise_multiplier, create_accountant, new_run
from clipless_dp.arguments import choice, learning_rate, positive, require_accountant, share, shown, whole
from clipless_dp.audit.gradients import sensitivity
from clipless_dp.constraints import ConstraintSpec, Orthogonal
from clipless_dp.distributed import placement
from clipless_dp.errors import ConfigurationError, InputError, PrivacyError
from clipless_dp.features import FrozenFeatures
from clipless_dp.losses import ConvexHingeKR
from clipless_dp.model import DPLipModel, lineage, passes
from clipless_dp.noise import NoiseSource, ReproducibleNoise, derived_seed
from clipless_dp.one_class.box import BoxProjection, public_box, require_rows
from clipless_dp.one_class.front import FixedFeatures, around, computed, fixed
from clipless_dp.one_class.model import NETWORKS, OneClassModel
from clipless_dp.one_class.sampler import BoundarySampler, PublicNegatives
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.precision import full_precision
from clipless_dp.sampling import PoissonBatches, trained_on
from clipless_dp.sampling.samples import public_size
from clipless_dp.training import FitResult, OptimizerFactory, Plan, SchedulerFactory, linear_decay
from clipless_dp.training.unprotected import ordinary_step

HALF_DIAGONALS = 1.0 / 36.0
"""The margin, by default, over half of the box's diagonal: 0.78 for images of 28 by 28 in [-1, 1], as published."""

_POSITIVE, _NEGATIVE = 1, 0


def one_class_loss(margin: float, weight: float) -> ConvexHingeKR:
    """``c·(relu(m - yf) - yf/λ)`` with ``c = 2λ/(2λ + 1)``: :class:`clipless_dp.losses.ConvexHingeKR` of equal priors.

    Its slope is ``c·(1 + 1/λ) = (2λ + 2)/(2λ + 1)`` where the hinge is missed, and ``c/λ`` elsewhere: the first is its
    bound, at most 2 and 1.005 at ``λ = 100``, attained wherever ``yf < m``.

    Args:
        margin: ``m``, positive.
        weight: ``λ``, positive: how much the hinge counts against the distance of the two sides.

    Raises:
        ConfigurationError: an argument is out of range.
    """
    weight = positive("weight", weight)
    return ConvexHingeKR((0.5, 0.5), alpha=2.0 * weight / (2.0 * weight + 1.0), margin=margin)


@dataclass(frozen=True)
class _Asked:
    """How to train, once it is known to be possible.

    Attributes:
        plan: epochs, expected positives of a step, and steps.
        negatives: of a step, a public count.
        optimizer: makes one.
    """

    model: DPLipModel
    box: BoxProjection
    sampler: BoundarySampler | PublicNegatives
    level: float
    plan: Plan
    negatives: int
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    scheduler: SchedulerFactory
    progress: bool

    def made_up(self) -> tuple[Tensor, Tensor]:
        """Negatives at the weights of now, and their labels."""
        points = self.sampler.negatives(self.negatives, level=self.level)
        return points, torch.full((self.negatives,), _NEGATIVE)


@full_precision()
def fit_one_class(
    rows: Any,
    *,
    domain: tuple[Any, Any],
    epsilon: float | None,
    delta: float | None = None,
    margin: float | None = None,
    weight: float = 100.0,
    network: str | nn.Module = "dense",
    features: nn.Module | None = None,
    constraint: ConstraintSpec = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    negatives: int | None = None,
    public_negatives: Any = None,
    lr: float | None = None,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory = linear_decay,
    walk_steps: int | None = None,
    walk_damping: float | None = None,
    level: float | None = None,
    rate: float | None = None,
    threshold_share: float = 0.1,
    accountant: str | Accountant = "prv",
    dataset_size: int | None = None,
    noise: NoiseSource | str | None = None,
    reproducible_seed: int | None = None,
    progress: bool = True,
) -> OneClassModel:
    """Learns the signed distance of a set from rows of it: positive inside, negative outside, 1-Lipschitz.

    Rows are positives. Negatives are made up (:class:`BoundarySampler`): points of the public box that walk towards the
    level ``-m`` of the network. Or they are drawn uniformly, with replacement, from public rows that you give, such as
    images of :func:`clipless_dp.features.strokes`: in many dimensions, where next to nothing of the box is like a row,
    these tell far more. The loss is :func:`one_class_loss` of both; at its optimum ``f`` is about ``m`` on the
    set, and falls by one for each unit of distance from it until ``-m`` (Béthune et al., "Robust one-class
    classification with signed distance function using 1-Lipschitz neural networks", ICML 2023).

    With ``epsilon`` only the rows are charged: negatives follow from released weights, the public box and public
    randomness, and enter by :meth:`clipless_dp.CliplessDPOptimizer.accumulate_public`. Positives are Poisson-sampled
    and divided by their public expected number, negatives have a public number and are divided by that
    (``docs/one-class.md`` has the proof).

    Args:
        rows: ``(N, *input_shape)``, floating-point: normal ones alone. Rows outside of the domain are moved to its
            nearest point, each by itself, without a word: whether there are some is private.
        domain: ``(lo, hi)``: *public*; plain numbers, or lists of one for each column or channel.
        epsilon: target ε. It has no default: ``None``, written down, trains WITHOUT privacy.
        delta: target δ.
        margin: ``m``, in units of the rows; by default :data:`HALF_DIAGONALS` of half of the box's diagonal.
        weight: ``λ``: larger ones separate better, smaller ones are more robust.
        network: ``"dense"`` (:func:`dense_distance`), ``"linear"`` (:func:`linear_distance`), ``"convolutional"``
            (:func:`convolutional_distance`), or a module of one output, from samples that are seen from the centre of
            the box; behind features, from these, as :class:`FixedFeatures` makes them.
        features: a :class:`clipless_dp.features.Scattering2d` that runs before the network, or a
            :class:`clipless_dp.features.FrozenFeatures` of one, which keeps what it has computed: the same is made
            anew by its arguments, and certificates count its constant. Features of all rows are computed once.
        constraint: of the network; by default :class:`clipless_dp.constraints.Orthogonal` on all weights.
        epochs: passes over the rows, in expectation.
        batch_size: expected positives of a step.
        negatives: number of them in a step, at least ``batch_size``; by default that.
        public_negatives: rows ``(M, *input_shape)`` that are *public*, nobody's data: none of them may be a row of the
            private ones. Then nothing walks. Where there are features, the mean of theirs is the middle of what the
            network sees, and the largest distance from it the radius, beyond which rows are projected.
        lr: learning rate of the default optimizer, Adam with ε and RMSprop without.
        optimizer: makes another one from the parameters.
        scheduler: builds a scheduler from the optimizer and the number of steps.
        walk_steps: ``T`` of :func:`newton_walk`; by default 8.
        walk_damping: ``c`` of it, in (0, T], by default 1; more of it is for many dimensions, where uniform points lie
            far away.
        level: of ``f``, up to which negatives walk, in [-m, m); by default ``-m``, at which the loss has its optimum at
            the signed distance, and negatives press on it by ``1/λ`` alone. Above it they press with the whole hinge:
            that tells more apart in few steps and many dimensions, but ``m - f`` estimates no distance then.
        rate: share of normal rows that may be called anomalies: then a threshold is part of the result, within ε.
        threshold_share: of the budget, in (0, 1): the threshold's noise has a variance of one over this share of that
            with which it would spend all of ε alone.
        accountant: name, or an accountant that holds what was released of the rows before.
        dataset_size: public number of rows; by default ``N``, which is then taken to be public.
        noise: ``"system"``, ``"secure"`` or a source.
        reproducible_seed: for tests: whoever knows it can take the noise away.
        progress: show a progress bar.

    Raises:
        ConfigurationError: an argument is out of range, the domain may have been computed from data, or δ is missing.
            Nothing was charged then, nor by any of the following.
        InputError: rows, or public negatives, are no finite floating-point numbers, or do not fit the network; or a
            public negative is one of the rows.
        PrivacyError: features of a sample depend on other samples.
        UnsupportedModuleError: a layer of the network has no bound, as those that take statistics of a batch.
        AuditError: an attack passed a bound.

    Whatever interrupts a private training once steps were taken is given the optimizer as ``private_optimizer``, as by
    :func:`clipless_dp.fit`: its ledger counts them.

    Guarantee:
        With ``epsilon``: weights and threshold together are (``epsilon``, ``delta``)-differentially private with
        respect to adding or removing one row. Without: none.
    """
    private = _promised(epsilon, delta, noise, reproducible_seed)
    if placement.world().size > 1:
        raise ConfigurationError("fit_one_class runs in one process: each rank would add negatives of its own")
    trained_on.note(rows)
    table = require_rows(rows)
    box = public_box(domain, tuple(table.shape[1:]))
    size = public_size(dataset_size, len(table))
    public = None if public_negatives is None else _public(public_negatives, box, (walk_steps, walk_damping, level))
    points = box(table)
    _refuse_same_memory(public_negatives, rows)
    front, frozen, public = _features(features, box, public)
    radius = box.radius if front is None else front.radius
    margin = radius * HALF_DIAGONALS if margin is None else positive("margin", margin)
    loss = one_class_loss(margin, weight)
    shape = box.input_shape if front is None else front.feature_shape
    model = _model(network, shape, radius, loss, Orthogonal(tangent=True) if constraint is None else constraint)
    plan = _plan(private, size, epochs, batch_size)
    count = _number(negatives, plan.batch_size)
    step = learning_rate("lr", (2e-2 if private else 1e-3) if lr is None else lr)
    chosen = optimizer or _usual(private, step)
    seed = None if reproducible_seed is None else derived_seed(reproducible_seed, "negatives")
    sampler = _sampler(public, model, box, front, (walk_steps, walk_damping), seed)
    asked = _Asked(model, box, sampler, _level(level, margin), plan, count, chosen, scheduler, progress)
    quota = None if rate is None else share("rate", rate, "(0, 1)")
    part = share("threshold_share", threshold_share, "(0, 1)")
    made = OneClassModel(model, box, margin, float(weight), network if isinstance(network, str) else None)
    made.stated_size = dataset_size is not None
    made.features, made.public_negatives = front, None if public is None else len(public)
    if front is not None and frozen is not None:
        points = front.seen(computed(frozen, box, points))
    if not private:
        _train(asked, points, reproducible_seed)
        if quota is not None:
            made._threshold(quota, table, None, None, None)
        return made
    assert epsilon is not None
    assert delta is not None
    ledger = create_accountant(accountant, dataset_size=size) if isinstance(accountant, str) else accountant
    source = noise if reproducible_seed is None else ReproducibleNoise(reproducible_seed)
    of_threshold = None if quota is None else _threshold_noise(epsilon, delta, part)
    sigma = plan.noise_multiplier(epsilon, delta, _with_release(require_accountant(ledger), of_threshold))
    made.result = _train_privately(asked, points, sigma, (epsilon, delta), ledger, source, reproducible_seed)
    if quota is not None:
        apart = noise if reproducible_seed is None else ReproducibleNoise(derived_seed(reproducible_seed, "threshold"))
        made._threshold(quota, table, of_threshold, size, apart)
    return made


def _promised(epsilon: Any, delta: Any, noise: Any, seed: Any) -> bool:
    """Whether privacy is asked for, once the arguments that say so agree."""
    if epsilon is None:
        if delta is not None or noise is not None:
            raise ConfigurationError("epsilon=None trains without privacy: leave delta and noise out, or give epsilon")
        return False
    positive("epsilon", epsilon)
    if delta is None:
        raise ConfigurationError("delta is missing: below one over the number of rows, 1e-5 say")
    share("delta", delta, "(0, 1)")
    if seed is not None:
        whole("reproducible_seed", seed, None, None)
        if noise is not None:
            raise ConfigurationError(f"noise={noise!r} cannot be reproduced: leave out reproducible_seed, or noise")
    return True


def _public(given: Any, box: BoxProjection, walk: tuple[object, ...]) -> Tensor:
    """Public rows from the centre of the box.

    Raises:
        ConfigurationError: settings of a walk are given, too.
        InputError: they are no finite rows of the shape.
    """
    if walk != (None, None, None):
        raise ConfigurationError(
            "walk_steps, walk_damping and level are of negatives that walk, and public_negatives stay where they are: "
            "leave one or the other out"
        )
    try:
        found: Tensor = box(require_rows(given, box.input_shape))
    except InputError as error:
        raise InputError(f"public_negatives: {error}") from error
    return found


def _refuse_same_memory(public: Any, rows: Any) -> None:
    """Refuses public rows that lie where the private ones do: one has been taken for the other.

    By what is in them they are not compared: a public row may be like a private one, and whether one is is private.

    Raises:
        InputError: they do.
    """
    first, second = (one.detach().cpu().numpy() if isinstance(one, Tensor) else one for one in (public, rows))
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray) and np.may_share_memory(first, second):
        raise InputError(
            "public_negatives lie in the memory of the rows that are trained on: public rows are nobody's data, such "
            "as noise or images of features.strokes. Nothing was charged for this call"
        )


def _features(
    features: nn.Module | None, box: BoxProjection, public: Tensor | None
) -> tuple[FixedFeatures | None, FrozenFeatures | None, Tensor | None]:
    """What runs between box and network, what computes it of many rows, and public rows as the network sees them."""
    if features is None:
        return None, None, public
    frozen = fixed(features)
    if public is None:
        return around(box, None, frozen), frozen, None
    found = computed(frozen, box, public)
    front = around(box, found, frozen)
    return front, frozen, front.seen(found)


def _model(
    network: str | nn.Module, shape: tuple[int, ...], radius: float, loss: ConvexHingeKR, constraint: ConstraintSpec
) -> DPLipModel:
    net = network if isinstance(network, nn.Module) else NETWORKS[choice("network", network, *NETWORKS)](shape)
    model = DPLipModel(net, input_shape=shape, input_norm=radius, loss=loss, constraint=constraint)
    if math.prod(model.output_shape) != 1:
        raise ConfigurationError(f"the network must have one output, the distance, got {tuple(model.output_shape)}")
    if not math.isfinite(model.lipschitz_constant()):
        raise ConfigurationError("the network has no finite Lipschitz constant: a score without one certifies nothing")
    return model


def _plan(private: bool, size: int, epochs: float | None, batch_size: int | None) -> Plan:
    usual = min(size, 1024 if private else 128)
    batch = usual if batch_size is None else whole("batch_size", batch_size)
    if batch > size:
        raise ConfigurationError(f"batch_size={batch} is larger than the data set, {size} rows")
    if epochs is None:
        epochs = max(1.0, (300 if private else 1000) * batch / size)
    return Plan.of(positive("epochs", epochs), batch, size)


def _sampler(
    public: Tensor | None,
    model: DPLipModel,
    box: BoxProjection,
    front: FixedFeatures | None,
    walk: tuple[int | None, float | None],
    seed: int | None,
) -> BoundarySampler | PublicNegatives:
    if public is not None:
        return PublicNegatives(public, seed=seed)
    steps, damping = 8 if walk[0] is None else walk[0], 1.0 if walk[1] is None else walk[1]
    return BoundarySampler(model, box, steps=steps, damping=damping, seed=seed, features=front)


def _number(negatives: int | None, expected: int) -> int:
    """Negatives of a step."""
    count = expected if negatives is None else whole("negatives", negatives)
    if count < expected:
        raise ConfigurationError(
            f"{count} negatives for {expected} positives expected: a sum of fewer would have to be weighed up, which "
            "the gate at the output undoes. Give at least as many negatives"
        )
    return count


def _level(level: float | None, margin: float) -> float:
    if level is None:
        return -margin
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not -margin <= level < margin:
        raise ConfigurationError(f"level must lie in [-margin, margin) = [{-margin:g}, {margin:g}), got {shown(level)}")
    return float(level)


def _usual(private: bool, lr: float) -> Callable[[list[nn.Parameter]], Optimizer]:
    def made(parameters: list[nn.Parameter]) -> Optimizer:
        return torch.optim.Adam(parameters, lr) if private else torch.optim.RMSprop(parameters, lr)

    return made


def _threshold_noise(epsilon: float, delta: float, part: float) -> float:
    """``σ`` of the threshold's release: ``1/part`` of the variance with which it alone would spend all."""
    alone = calibrate_noise_multiplier(target_epsilon=epsilon, delta=delta, sample_rate=1.0, steps=1)
    return float(alone / math.sqrt(part))


def _with_release(ledger: Accountant, noise_multiplier: float | None) -> Accountant:
    """A copy of what was spent, and a release to come, that training leaves room for."""
    if noise_multiplier is None:
        return ledger
    later = copy.deepcopy(ledger)
    later.record(GaussianRelease(noise_multiplier, identity=new_run()))
    return later


def _train(asked: _Asked, rows: Tensor, seed: int | None) -> None:
    """Without privacy: the mean over as many positives as negatives of the loss, and an ordinary optimizer."""
    model, generator = asked.model, torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(derived_seed(seed, "order"))
    parameters = [parameter for parameter in model.net.parameters() if parameter.requires_grad]
    base = asked.optimizer(parameters)
    schedule = asked.scheduler(base, asked.plan.steps)
    model.train()
    # A private run that starts here says that something else has trained these weights.
    lineage.of(model).changed += 1
    for _ in tqdm(range(asked.plan.steps), disable=not asked.progress, unit="step", desc="NOT PRIVATE"):
        chosen = rows[torch.randint(len(rows), (asked.negatives,), generator=generator)]
        points, labels = asked.made_up()
        both = torch.cat((torch.full((len(chosen),), _POSITIVE), labels))
        ordinary_step(model, base, parameters, torch.cat((chosen, points)), both)
        schedule.step()


def _train_privately(
    asked: _Asked,
    rows: Tensor,
    sigma: float,
    budget: tuple[float, float],
    ledger: Accountant,
    noise: NoiseSource | str | None,
    seed: int | None,
) -> FitResult:
    model, plan = asked.model, asked.plan
    parameters = [parameter for parameter in model.net.parameters() if parameter.requires_grad]
    optimizer = CliplessDPOptimizer(
        model,
        asked.optimizer(parameters),
        noise_multiplier=sigma,
        sample_rate=plan.sample_rate,
        dataset_size=plan.dataset_size,
        accountant=ledger,
        allocation="min-variance",
        noise=noise,
        budget=budget,
    )
    schedule = asked.scheduler(optimizer, plan.steps)
    audits = [sensitivity(model, attempts=_ATTEMPTS, like=asked.sampler.negatives(1, level=asked.level)[0])]
    batches = PoissonBatches(
        (rows, torch.full((len(rows),), _POSITIVE)),
        sample_rate=plan.sample_rate,
        steps=plan.steps,
        seed=None if seed is None else derived_seed(seed, "draws"),
    )
    model.train()
    try:
        for batch in tqdm(batches, total=plan.steps, disable=not asked.progress, unit="step"):
            optimizer.zero_grad()
            optimizer.accumulate(batch)
            add_negatives(optimizer, asked.made_up(), optimizer.expected_batch_size)
            optimizer.step()
            schedule.step()
    except BaseException as error:
        if optimizer.steps_taken:
            error.private_optimizer = optimizer  # type: ignore[attr-defined]
        raise
    return FitResult(
        spent=optimizer.get_epsilon(budget[1]),
        delta=budget[1],
        noise_multiplier=sigma,
        sample_rate=plan.sample_rate,
        steps=optimizer.steps_taken,
        optimizer=optimizer,
        audits=audits,
    )


_ATTEMPTS = 5


def add_negatives(optimizer: CliplessDPOptimizer, points: tuple[Tensor, Tensor], expected: float) -> None:
    """Adds the negatives' mean gradient to a sum that the step divides by the expected number of positives.

    Args:
        optimizer: of the step, in whose sum those of the positives are.
        points: made-up rows and their labels, a public number.
        expected: what the step divides by: negatives weigh ``expected/M`` in the sum, one over ``M`` in the step.

    Raises:
        PrivacyError: there are fewer negatives than that: the gate at the output would undo a weight above one.
    """
    model, inverse = optimizer.model, expected / len(points[0])
    if inverse > 1.0 + 1e-9:
        raise PrivacyError(f"{len(points[0])} negatives do not balance {expected:g} positives")
    # Where these come from is known, and one may be like a positive: both at a corner of the box, say.
    with passes.declaring(made_up=True):
        optimizer.accumulate_public(points, loss=lambda inputs, targets: inverse * model.loss(model(inputs), targets))
