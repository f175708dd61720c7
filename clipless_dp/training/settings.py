"""Settings of a run from public numbers alone: no result on the data decides them, so that they cost no privacy.

The rule, and what it was checked on, is in ``docs/settings.md``.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from accounting import ADD_OR_REMOVE_ONE, Accountant, UnreachableTargetError, calibrate_noise_multiplier
from accounting.errors import warn_caller
from clipless_dp.arguments import positive, share, whole
from clipless_dp.constraints import Constraint
from clipless_dp.display import Table, Tabular
from clipless_dp.errors import ConfigurationError
from clipless_dp.gates import BallProjection, CotangentGate, SphereScaling
from clipless_dp.gates.gradient_layers import GradientGated
from clipless_dp.layers import Foton, Pepita
from clipless_dp.model import DPLipModel
from clipless_dp.model.wrapped import require_wrapped
from clipless_dp.noise import allocate
from clipless_dp.norms.operators import Operator
from clipless_dp.training.groups import Learning, OptimizerFactory, Privacy, names, require_known
from clipless_dp.training.plan import Plan, epochs_of

_ROWS = 1_200_000
"""Rows that a run passes over where no time is given: twenty epochs of sixty thousand."""

_EPOCHS = (3.0, 100.0)
"""The fewest epochs of large data sets, the most of small ones."""

_STEPS = (100, 400)
"""The fewest and the most steps, where the batch decides: fewer learn too little, more cost time and noise."""

_KNEE = 1.1
"""Noise in all, as a multiple of that of the fewest steps, up to which smaller batches are taken."""

_WALK = 1.7
"""Operator norm that Adam's steps on noise alone would add up to, as a multiple of a constraint's limit. Projections
take most of it back, and what all samples agree on moves a weight further than noise does."""

_GATED, _GRADIENT_GATED = 0.6, 0.2
"""The same of each entry of a weight: behind signal gates its size does not matter, behind gradient gates it grows."""

_DECAYS_TO = 3.0
"""Squares of learning rates that fall linearly sum up to a third of those of constant ones."""

_ADAM_STEP = math.sqrt(0.1 / 1.9)
"""One step of Adam on noise alone, as a multiple of the learning rate, at its first decay rate of 0.9: averages of
independent numbers of variance one have variance ``(1 - β)/(1 + β)``."""

_SIGNAL = 0.1
"""Size of the mean gradient that SGD's steps are made for, as a share of its bound."""

_FEW_STEPS = 300
"""Up to here momentum averages noise that later steps would have, and adds nothing to the steps that there are."""

_MOMENTUM = 0.9

_NOISY, _NOISY_FREE = 0.25, 1.0
"""Share of a weight's limit, and of the size of one without a limit, above which the noise of one step is warned about:
projections leave the noise in place of the weight, while a weight that is free grows until it outweighs the noise."""

_TIMED = 64
"""Rows of the passes by which time is measured."""


@dataclass(frozen=True)
class StepNoise:
    """The noise of one step on one weight.

    Attributes:
        name: of the parameter in ``model.net``.
        norm: about the operator norm of what the noise moves the weight by at the peak learning rate: of an ``m × n``
            matrix of independent numbers of deviation ``s``, ``s(√m + √n)``, times what a convolution's windows add.
        limit: the constraint's, or the weight's own norm of that kind now: its root mean square times ``√m + √n``.
        constrained: whether ``limit`` is a constraint's.
    """

    name: str
    norm: float
    limit: float
    constrained: bool

    @property
    def share(self) -> float:
        """``norm/limit``; 0 for a weight that is zero now, which any step changes by more than all of it."""
        return self.norm / self.limit if self.limit > 0.0 else 0.0

    @property
    def is_loud(self) -> bool:
        """Whether it is more than a quarter of a constraint's limit, or more than all of a weight without one."""
        return self.share > (_NOISY if self.constrained else _NOISY_FREE)


@dataclass(frozen=True)
class SuggestedSettings(Tabular):
    """Settings of :func:`clipless_dp.fit`, and why; prints as a table.

    Attributes:
        epochs, batch_size, optimizer, lr, momentum: arguments of :func:`clipless_dp.fit`, given or chosen; ``lr`` and
            ``momentum`` are those of ``optimizer`` by name, and play no part beside an optimizer of your own.
        dataset_size: ``N``.
        noise_multiplier: about what ``σ`` will be: ``fit`` calibrates it anew, by its own accountant.
        steps: ``T``.
        reasons: why each argument is what it is, by name.
        noise: of one step on each weight that has a scale.
    """

    epochs: float
    batch_size: int
    optimizer: OptimizerFactory | str
    lr: float
    momentum: float
    dataset_size: int
    noise_multiplier: float
    steps: int
    reasons: Mapping[str, str]
    noise: tuple[StepNoise, ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments: ``fit(model, data, epsilon=…, delta=…, **plan.arguments)``."""
        chosen = ("epochs", "batch_size", "optimizer", "lr", "momentum")
        return {name: getattr(self, name) for name in chosen}

    def _table(self) -> Table:
        rows = [
            (name, f"{value:.4g}" if isinstance(value, float) else str(value), self.reasons.get(name, "given"))
            for name, value in self.arguments.items()
        ]
        notes = [f"{self.steps} steps at σ of about {self.noise_multiplier:.3g}"]
        notes += [
            f"{one.name}: one step's noise is {100.0 * one.share:.3g} % of its {'limit' if one.constrained else 'size'}"
            for one in self.noise
        ]
        return Table(("setting", "value", "why"), rows, ("left",) * 3, notes)


def suggest_settings(
    model: DPLipModel,
    dataset_size: int,
    epsilon: float,
    delta: float,
    *,
    minutes: float | None = None,
    **given: Any,
) -> SuggestedSettings:
    """Settings of :func:`clipless_dp.fit` that follow from public numbers, for what is not given.

    * *Epochs*: such that a run passes over about 1.2 million rows, from 3 to 100; with ``minutes``, what fits in, by
      the time of passes over made-up rows on a copy of the model.
    * *Batch size*: the smallest for which the noise of the run, ``σ/(q√T)`` for the mean gradient over the steps, stays
      within a tenth of that of 100 steps; below, ``σ`` no longer falls as fast as ``q`` does. 100 to 400 steps.
    * *Optimizer*: Adam, whose steps have the size of the learning rate whatever the gradient's and the noise's sizes.
    * *Learning rate*: noise alone moves an entry by about ``lr·√(T/3)`` in ``T`` steps of a rate that falls linearly.
      For constrained weights the operator norm of that, ``(√m + √n)`` times as much for an ``m × n`` matrix, is 1.7
      times the limit, in the geometric mean over weights. Behind signal gates ``lr = 0.6/√T``, behind gradient gates
      ``0.2/√T``.
    * With ``optimizer="sgd"`` the rate is what moves entries as far for a gradient of a tenth of its bound beside the
      noise; momentum is 0 up to 300 steps, beyond 0.9. A learning rate that is given without an optimizer is SGD's.

    Args:
        model: the wrapped model.
        dataset_size: public number of samples.
        epsilon: target ε.
        delta: target δ.
        minutes: time of the run; it is measured here and now, so that the answer differs from call to call.
        given: arguments of :func:`clipless_dp.fit` that are not to be chosen.

    Returns:
        All settings, whose :attr:`~SuggestedSettings.arguments` ``fit`` takes; ``print`` says why.

    Raises:
        ConfigurationError: an argument is out of range, or is none of ``fit``.
        UnreachableTargetError: no noise meets the target.

    Guarantee:
        The answer is a function of the arguments, shapes, bounds and constraints, and of weights as far as bounds rest
        on them; no sample is looked at.
    """
    require_wrapped(model)
    size = whole("dataset_size", dataset_size)
    known = {"epsilon": positive("epsilon", epsilon), "delta": share("delta", delta, "(0, 1)")}
    require_known({**given, **known})
    taken = {name: value for name, value in {**given, **known}.items() if value is not None}
    learning = Learning(**{name: value for name, value in taken.items() if name in names(Learning)})
    privacy = Privacy(**{name: value for name, value in taken.items() if name in names(Privacy)})
    if (learning.batch_size or 0) > size:
        raise ConfigurationError(f"batch_size must be at most the {size} samples of the data set")
    rows = None if minutes is None else _rows_within(model, 60.0 * positive("minutes", minutes))
    return suggest(model, size, privacy, learning, rows=rows)


def suggest(
    model: DPLipModel, size: int, privacy: Privacy, learning: Learning, *, rows: float | None = None
) -> SuggestedSettings:
    """As :func:`suggest_settings`, for arguments that are checked.

    Args:
        model: the wrapped model.
        size: public number of samples.
        privacy: what is promised.
        learning: what is given of the settings.
        rows: that a run may pass over; by default as many as usual.
    """
    reasons: dict[str, str] = {}
    epochs, batch_size = _length(size, privacy, learning, rows, reasons)
    plan = Plan.of(epochs, batch_size, size)
    sigma = _noise_multiplier(plan, privacy)
    optimizer = learning.optimizer
    if optimizer is None:
        by_hand = learning.lr is not None or learning.momentum is not None
        optimizer = "sgd" if by_hand else "adam"
        reasons["optimizer"] = (
            "SGD's rate or momentum is given" if by_hand else "its steps have one size, whatever the noise's is"
        )
    momentum = learning.momentum
    if momentum is None:
        # Who chooses a rate of SGD means that of the usual momentum.
        few = plan.steps <= _FEW_STEPS and learning.lr is None
        momentum = 0.0 if few else _MOMENTUM
        reasons["momentum"] = f"{plan.steps} steps are few" if few else "of SGD, for many steps or a rate that is given"
    lr = learning.lr
    if lr is None:
        lr, reasons["lr"] = _rate(model, plan)
        if optimizer == "sgd":
            lr *= (1.0 - momentum) / _typical_gradient(model, plan, sigma, learning)
            reasons["lr"] += f", for SGD on a gradient of {_SIGNAL:g} of its bound and the noise"
    found = SuggestedSettings(epochs, batch_size, optimizer, lr, momentum, size, sigma, plan.steps, reasons)
    if callable(optimizer) or not model.placement.is_whole:
        return found
    return replace(found, noise=step_noise(model, plan, sigma, found, learning))


def resolved(learning: Learning, settings: SuggestedSettings) -> Learning:
    """What was asked for, with what was chosen where nothing was."""
    return replace(learning, **settings.arguments)


def warn_of_noise(settings: SuggestedSettings) -> None:
    """Warns where the noise of a single step is too much for a weight (:attr:`StepNoise.is_loud`)."""
    loud = [one for one in settings.noise if one.is_loud]
    if not loud:
        return
    worst = max(loud, key=lambda one: one.share)
    warn_caller(
        f"the noise of one step moves {worst.name!r} by an operator norm of about {worst.norm:.3g}, where "
        f"{'its constraint allows for' if worst.constrained else 'its own is'} {worst.limit:.3g} in all"
        f"{f', and {len(loud) - 1} more weights by too much' if len(loud) > 1 else ''}: little will be "
        f"learned. Leave out lr (now {settings.lr:.3g}), which is chosen then, or take larger batches",
        UserWarning,
    )


def _length(
    size: int, privacy: Privacy, learning: Learning, rows: float | None, reasons: dict[str, str]
) -> tuple[float, int]:
    """Epochs and batch size."""
    epochs, batch_size = learning.epochs, learning.batch_size
    if epochs is None:
        wanted = (_ROWS if rows is None else rows) / size
        low, high = _EPOCHS
        epochs = min(high, wanted if rows is not None else max(low, wanted))
        if batch_size is not None:
            # At least a step, and no more of them than pay.
            epochs = min(max(epochs, epochs_of(1, batch_size, size)), epochs_of(_STEPS[1], batch_size, size))
        reasons["epochs"] = f"{_ROWS:,} rows in all" if rows is None else f"{rows:,.0f} rows fit the time"
        reasons["epochs"] += f", at most {high:g} epochs and {_STEPS[1]} steps"
    if batch_size is None:
        batch_size = _batch_size(epochs, size, privacy)
        reasons["batch_size"] = f"the smallest whose noise is within {100 * (_KNEE - 1):.0f} % of that of few steps"
    return epochs, batch_size


def _batch_size(epochs: float, size: int, privacy: Privacy) -> int:
    """The smallest of some batches for which the noise of the run is about the least."""
    fewest, most = _STEPS
    largest = min(size, max(1, round(epochs * size / fewest)))
    smallest = max(1, min(largest, round(epochs * size / most)))
    if privacy.noise_multiplier is not None:
        return largest

    def noise(batch_size: int) -> float:
        plan = Plan.of(epochs, batch_size, size)
        return _noise_multiplier(plan, privacy) / (plan.sample_rate * math.sqrt(plan.steps))

    least, chosen = noise(largest), largest
    while chosen > smallest:
        smaller = max(smallest, chosen // 2)
        if noise(smaller) > _KNEE * least:
            break
        chosen = smaller
    return chosen


def _noise_multiplier(plan: Plan, privacy: Privacy) -> float:
    """``σ`` by Rényi accounting, which is fast; what was spent before is left to the calibration of ``fit``."""
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    spent = privacy.accountant
    try:
        sigma: float = calibrate_noise_multiplier(
            target_epsilon=privacy.epsilon,
            delta=privacy.delta,
            sample_rate=plan.sample_rate,
            steps=plan.steps,
            accountant="rdp",
            relation=spent.relation if isinstance(spent, Accountant) else ADD_OR_REMOVE_ONE,
        )
    except UnreachableTargetError:
        # Rényi bounds do not go down to very small ε, which another engine may certify.
        sigma = plan.noise_multiplier(privacy.epsilon, privacy.delta, spent)
    return sigma


def _matrix(operator: Operator, weight: torch.Tensor) -> float:
    """``p(√m + √n)``: the operator norm of independent numbers of deviation one."""
    _, rows, columns = operator.matrix(weight).shape
    return operator.perturbation(weight) * (math.sqrt(rows) + math.sqrt(columns))


def _growth(model: DPLipModel) -> dict[str, float]:
    """For each trainable weight that acts as an operator, the norm of independent numbers of deviation one."""
    found = {}
    for name, parameter in model.net.named_parameters():
        operators = model.operators(name)
        if parameter.requires_grad and parameter.dim() > 1 and operators:
            # Its shape alone: of a model in parts, the values are elsewhere.
            shaped = torch.empty(parameter.shape, device="meta")
            found[name] = max(_matrix(operator, shaped) for operator in operators)
    return found


def _caps_gradients(module: nn.Module) -> bool:
    return isinstance(module, GradientGated) or (isinstance(module, (Foton, Pepita)) and module.limit is not None)


def _limited(model: DPLipModel) -> dict[str, Constraint]:
    """Constraints that promise a limit: penalties do not."""
    return {name: constraint for name, constraint in model.constraints.items() if math.isfinite(constraint.limit)}


def _rate(model: DPLipModel, plan: Plan) -> tuple[float, str]:
    """The learning rate of Adam, and why."""
    modules = list(model.net.modules())
    if model.graph.isolated or any(map(_caps_gradients, modules)):
        return _GRADIENT_GATED / math.sqrt(plan.steps), f"{_GRADIENT_GATED:g}/√T behind gradient gates"
    constraints, growth = _limited(model), _growth(model)
    free = [name for name in growth if name not in constraints]
    gates = (BallProjection, CotangentGate, SphereScaling)
    if not constraints and any(isinstance(module, gates) for module in modules):
        return _GATED / math.sqrt(plan.steps), f"{_GATED:g}/√T behind signal gates"
    scales = [constraints[name].limit / one for name, one in growth.items() if name in constraints and one > 0.0]
    # Of weights without a limit the usual norm is one.
    scales += [1.0 / growth[name] for name in free if growth[name] > 0.0]
    scale = math.exp(sum(map(math.log, scales)) / len(scales)) if scales else 1.0
    lr = _WALK * scale / math.sqrt(plan.steps / _DECAYS_TO)
    return lr, f"noise of {_WALK:g} times a weight's limit over all steps"


def _deviations(model: DPLipModel, plan: Plan, sigma: float, learning: Learning) -> dict[str, tuple[float, float]]:
    """For each parameter the noise in an entry of the mean gradient (deviation), and the bound of that entry."""
    bounds = {name: bound for name, bound in model.sensitivity().per_parameter.items() if bound > 0.0}
    sizes = {name: parameter.numel() for name, parameter in model.net.named_parameters()}
    deviations = allocate([*bounds.values()], [sizes[name] for name in bounds], sigma, learning.allocation)
    return {
        name: (deviation / plan.batch_size, bound / math.sqrt(sizes[name]))
        for (name, bound), deviation in zip(bounds.items(), deviations, strict=True)
    }


def _typical_gradient(model: DPLipModel, plan: Plan, sigma: float, learning: Learning) -> float:
    """Root mean square of an entry of the noisy mean gradient, in the geometric mean over weights."""
    found = _deviations(model, plan, sigma, learning)
    of_weights = [found[name] for name in _growth(model) if name in found] or [*found.values()]
    sizes = [math.hypot(noise, _SIGNAL * bound) for noise, bound in of_weights]
    return math.exp(sum(map(math.log, sizes)) / len(sizes)) if sizes else 1.0


def step_noise(
    model: DPLipModel, plan: Plan, sigma: float, settings: SuggestedSettings, learning: Learning
) -> tuple[StepNoise, ...]:
    """What the noise of one step does to each weight at the peak learning rate."""
    deviations = _deviations(model, plan, sigma, learning)
    found = []
    for name, growth in _growth(model).items():
        if name not in deviations:
            continue
        step = _ADAM_STEP if settings.optimizer == "adam" else deviations[name][0]
        constraint = _limited(model).get(name)
        if constraint is None:
            weight = model.net.get_parameter(name).detach()
            limit = growth * float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(weight.numel())
        else:
            limit = constraint.limit
        found.append(StepNoise(name, settings.lr * step * growth, limit, constraint is not None))
    return tuple(found)


def _rows_within(model: DPLipModel, seconds: float) -> float:
    """Rows that a run passes over in a time, by passes over made-up rows, and projections, on a copy."""
    tried = copy.deepcopy(model)
    inputs = tried.random_inputs(_TIMED, torch.Generator().manual_seed(0))

    def passes() -> None:
        output = tried(inputs)
        output.backward(torch.zeros_like(output))

    with torch.random.fork_rng(), tried.register.rehearsing():
        passes()
        of_row, of_step = _seconds(passes) / _TIMED, _seconds(tried.project_)
    left = seconds - _FEW_STEPS * of_step
    return max(left, seconds / 2.0) / of_row


def _seconds(work: Callable[[], None]) -> float:
    """The shortest of three."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return max(min(found), 1e-9)
