"""How much the optimizer's releases tell about one sample: a lower bound on ε, measured from outside."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from clipless_dp.audit.result import EpsilonAudit, check_levels
from clipless_dp.audit.statistics import Claim, Numbers, epsilon_of_rates, highest_rate, one_run_epsilon
from clipless_dp.errors import ConfigurationError, PrivacyWarning
from clipless_dp.losses.base import InnerProduct
from clipless_dp.model import DPLipModel
from clipless_dp.model.passes import unwitnessed
from clipless_dp.noise import allocate
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.testing.attacks import structured_inputs, whole_gradient
from clipless_dp.testing.signals import sized_signals

Method = Literal["f-dp", "clopper-pearson", "one-run"]
OptimizerFactory = Callable[[DPLipModel], CliplessDPOptimizer]
BatchesFactory = Callable[[tuple[Tensor, Tensor]], Iterable[Sequence[Tensor]]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

_OVERSIZE = 10.0
"""Canaries are this much larger than what the gates let through: gates that do not close show."""

_LARGEST_STORE = 1 << 28
"""Numbers in the canaries' gradients: a gibibyte in float32."""

_SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
"""Shares of the canaries that are guessed to be in, or out; of the rest nothing is guessed."""


@dataclass(frozen=True)
class PrivacyAudit(EpsilonAudit):
    """What an adversary who sees every noisy gradient achieved; its lower bound is ∞ if no amount of the recorded
    noise explains what was seen.

    Attributes:
        method: see :func:`privacy`.
        runs: how often the training was run.
        canaries: in each run.
        evidence: what the bound rests on, in words.
    """

    method: Method
    runs: int
    canaries: int
    evidence: str

    def __str__(self) -> str:
        return (
            f"{self.headline(f'privacy audit ({self.method})')}\n"
            f"{self.runs} run(s) with {self.canaries} canary sample(s) each; {self.evidence}"
        )


def privacy(
    optimizer: OptimizerFactory,
    batches: BatchesFactory,
    *,
    delta: float,
    model: DPLipModel | None = None,
    method: Method = "f-dp",
    runs: int | None = None,
    canaries: int | None = None,
    confidence: float = 0.95,
) -> PrivacyAudit:
    """Measures a lower bound on ε by playing the adversary that ε is about, against the real training code.

    Canary samples, each as harmful as a sample can be made, are put into the data or left out by the toss of a coin.
    The adversary knows everything else: weights, the canaries, and the noisy gradient of every step, of which all
    weights are a function. From them it has to tell which canaries were in. How often it is right bounds ε from below.

    * ``"f-dp"``: error rates with Clopper–Pearson limits, against the trade-off function of the recorded steps with
      any other amount of noise (Nasr et al. 2023): the tightest, and exact about refutation. Its *number* assumes that
      only the noise could differ from what was recorded.
    * ``"clopper-pearson"``: the same error rates, against (ε, δ) alone: assumes nothing of the mechanism, and cannot
      exceed about ``ln(runs·canaries/10)``.
    * ``"one-run"``: one run with many canaries (Steinke, Nasr and Jagielski 2023, Theorem 5.2); assumes nothing.

    What the adversary looks at (likelihood ratio, sum, largest, spread, or one step), its threshold and how many
    canaries it is silent about are chosen on the first third of the trials; the rest make the bound.

    Args:
        optimizer: makes the optimizer under audit for a model, afresh for each run.
        batches: makes the batches of a whole run from data: tuples of inputs, targets and, if any, the mask.
        delta: δ in [0, 1).
        model: whose layers, rules and gates are in play; a copy is used, and its loss is replaced by the one whose
            cotangent is its target. ``None``: a linear layer, in which every canary attains the sensitivity and no two
            disturb each other.
        method: as above.
        runs: how often to train; 1 for ``"one-run"``, by default 400 else.
        canaries: in each run; by default 1000 for ``"one-run"``, 1 else. With several canaries a run, the other
            two methods assume that what is seen of one is independent of the others, which holds for the default
            model if noise and sampling are what they should be.
        confidence: of the lower bound.

    Raises:
        ConfigurationError: an argument is out of range, runs differ in their steps or ledgers, or there are too few
            trials.

    Guarantee:
        If training is as private as its ledger states, ``passed`` is false with probability at most
        ``1 - confidence``. An audit that passes proves nothing.
    """
    runs, canaries = _sizes(method, runs, canaries)
    check_levels(delta, confidence)
    stage = _Stage(_worst_case(canaries) if model is None else copy.deepcopy(model), canaries, plain=model is None)
    claim, stated = None, 0.0
    scores: list[Numbers] = []
    members: list[Flags] = []
    coins = np.random.default_rng()
    with warnings.catch_warnings():
        # Every run is a training of its own on data of its own; their ledgers have nothing to do with each other.
        warnings.filterwarnings("ignore", "another optimizer has already", PrivacyWarning)
        for _ in range(runs):
            included = coins.random(canaries) < 0.5
            seen, played = stage.play(optimizer, batches, included)
            if claim is None:
                claim, stated = Claim(_history(played)), played.get_epsilon(delta) if delta else math.inf
            if claim.history != Claim(_history(played)).history or (scores and seen.shape != scores[0].shape):
                raise ConfigurationError("runs differ in their steps or in what they record: make them alike")
            scores.append(seen)
            members.append(included)
    assert claim is not None
    views = _views(np.concatenate(scores), claim, stage.signal)
    inside = np.concatenate(members)
    part = len(inside) // 3
    if method == "one-run":
        bound, evidence = guess(views, inside, part, delta, confidence)
    else:
        bound, evidence = _test(views, inside, part, delta, confidence, None if method == "clopper-pearson" else claim)
    return PrivacyAudit(bound, float(stated), delta, confidence, method, runs, canaries, evidence)


def _sizes(method: str, runs: int | None, canaries: int | None) -> tuple[int, int]:
    if method not in ("f-dp", "clopper-pearson", "one-run"):
        raise ConfigurationError(f"method must be 'f-dp', 'clopper-pearson' or 'one-run', got {method!r}")
    single = method == "one-run"
    runs = (1 if single else 400) if runs is None else runs
    canaries = (1000 if single else 1) if canaries is None else canaries
    if single and runs != 1:
        raise ConfigurationError("'one-run' is one run: leave runs out, and take more canaries")
    if runs < 1 or canaries < 1 or runs * canaries < 30:
        raise ConfigurationError(f"{runs} runs of {canaries} canaries say nothing: take at least 30 trials in all")
    return runs, canaries


def _worst_case(features: int) -> DPLipModel:
    net = nn.Linear(features, 1, bias=False)
    return DPLipModel(net, input_shape=(features,), input_norm=1.0, loss=InnerProduct(1.0))


class _Stage:
    """The model, its canaries, and one training run after the other."""

    def __init__(self, model: DPLipModel, canaries: int, *, plain: bool) -> None:
        self.model = model
        model.loss_function = InnerProduct(model.cotangent_norm)
        self._initial = {name: value.clone() for name, value in model.net.state_dict().items()}
        if plain:
            self._inputs, self._targets = _OVERSIZE * torch.eye(canaries), torch.full((canaries, 1), _OVERSIZE)
        else:
            self._inputs, self._targets = _canaries(model, canaries)
        self._plain = plain
        self._gradients: Tensor | None = None
        self.signal = 0.0

    def play(
        self, make: OptimizerFactory, batches: BatchesFactory, included: Flags
    ) -> tuple[Numbers, CliplessDPOptimizer]:
        """Trains once, and returns each canary's score at each step: normal of variance 1 if all is as stated."""
        model = self.model
        with torch.no_grad():
            model.net.load_state_dict(self._initial)
        model.settle_()
        optimizer = make(model)
        if not isinstance(optimizer, CliplessDPOptimizer):
            raise ConfigurationError(f"optimizer made a {type(optimizer).__name__}, not a CliplessDPOptimizer")
        deviations = self._deviations(optimizer)
        if self._gradients is None:
            self._gradients = self._canary_gradients(deviations)
        rows = torch.from_numpy(np.flatnonzero(included)).to(self._inputs.device)
        released = []
        for inputs, targets, *mask in batches(self._data(rows)):
            optimizer.zero_grad()
            model.loss(model(inputs), targets, *mask).backward()
            optimizer.step()
            released.append(self._flat(deviations, [model.net.get_parameter(name).grad for name in deviations]))
        if not released:
            raise ConfigurationError("batches made no batch: there is nothing to audit")
        seen = self._gradients @ (torch.stack(released) * optimizer.expected_batch_size).T
        return seen.double().cpu().numpy(), optimizer

    def _data(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The canaries that are in, behind one sample that contributes nothing: a data set is never empty."""
        void = -1.0 if not self._inputs.is_floating_point() else math.nan
        inputs = torch.cat([torch.full_like(self._inputs[:1], void), self._inputs[rows]])
        return inputs, torch.cat([torch.zeros_like(self._targets[:1]), self._targets[rows]])

    def _deviations(self, optimizer: CliplessDPOptimizer) -> dict[str, float]:
        bounds = self.model.sensitivity().per_parameter
        sizes = [self.model.net.get_parameter(name).numel() for name in bounds]
        planned = allocate(list(bounds.values()), sizes, optimizer.noise_multiplier, optimizer.allocation)
        return {name: deviation for name, deviation in zip(bounds, planned, strict=True) if deviation > 0.0}

    def _canary_gradients(self, deviations: dict[str, float]) -> Tensor:
        """Directions of the canaries' gradients in units of the stated noise, and how far out they lie."""
        model = self.model
        if self._plain:
            (deviation,) = deviations.values()
            self.signal = model.sensitivity().total / deviation
            return torch.eye(len(self._inputs))
        parameters = [model.net.get_parameter(name) for name in deviations]
        if len(self._inputs) * sum(parameter.numel() for parameter in parameters) > _LARGEST_STORE:
            raise ConfigurationError("the canaries' gradients do not fit into memory: take fewer canaries")
        gradients = []
        for sample, target in zip(self._inputs.split(1), self._targets.split(1), strict=True):
            with unwitnessed():
                loss = model.loss(model(sample), target)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients.append(self._flat(deviations, found))
        stacked = torch.stack(gradients)
        norms: Tensor = torch.linalg.vector_norm(stacked, dim=1, keepdim=True)
        self.signal = float(norms.mean())
        if not self.signal > 0.0:
            raise ConfigurationError("no canary has a gradient at these weights: there is nothing to audit")
        return stacked / norms.clamp(min=1e-30)

    def _flat(self, deviations: dict[str, float], gradients: Sequence[Tensor | None]) -> Tensor:
        parts = []
        for (name, deviation), gradient in zip(deviations.items(), gradients, strict=True):
            whole = torch.zeros_like(self.model.net.get_parameter(name)) if gradient is None else gradient
            parts.append(whole.detach().flatten() / deviation)
        return torch.cat(parts)


def _views(scores: Numbers, claim: Claim, signal: float) -> dict[str, Numbers]:
    """Several numbers for each trial ``(n,)``, made of the scores of its steps ``(n, T)``: larger means 'in'."""
    rates = np.concatenate([np.full(count, rate) for _, rate, count in claim.history])[: scores.shape[1]]
    with np.errstate(divide="ignore"):
        step_wise = np.logaddexp(np.log1p(-rates), np.log(rates) + signal * scores - signal**2 / 2.0)
    views = {"likelihood ratio": step_wise.sum(1), "sum": scores.sum(1)}
    if scores.shape[1] > 1:
        views |= {"largest step": scores.max(1), "spread over steps": scores.max(1) - scores.min(1)}
        views |= {f"step {step}": scores[:, step] for step in range(scores.shape[1])}
    return views


class _Rule(NamedTuple):
    """Guess 'in' where a view is at least a threshold: how good that seemed, and its error rates."""

    merit: float
    view: str
    threshold: float
    rates: tuple[float, float]


def _test(
    views: dict[str, Numbers], inside: Flags, part: int, delta: float, confidence: float, claim: Claim | None
) -> tuple[float, str]:
    """Error rates of the test that did best on the first trials, and the ε that they imply."""
    each = 1.0 - (1.0 - confidence) / 2.0
    # The limits that these error rates would have among the trials that are left.
    growth = (len(inside) - part) / part
    best: dict[int, _Rule] = {}
    for view, values in views.items():
        thresholds, positives, negatives = _errors(values[:part], inside[:part], each, growth)
        if not len(thresholds):
            continue
        if claim is None:
            merits = [epsilon_of_rates(positives, negatives, delta)]
        else:
            # Which of these is sharpest depends on whether a little is told of many trials or much of a few.
            normal = stats.norm.isf(positives) - stats.norm.ppf(negatives)
            merits = [1.0 - positives - negatives, normal, claim.tension(positives, negatives)]
        for kind, merit in enumerate(merits):
            place = int(np.argmax(merit))
            if merit[place] > (best[kind].merit if kind in best else 0.0):
                rates = float(positives[place]), float(negatives[place])
                best[kind] = _Rule(float(merit[place]), view, float(thresholds[place]), rates)
    if not best:
        return 0.0, "the adversary saw no difference"

    def implied(false_positive: float, false_negative: float) -> float:
        if claim is None:
            return float(epsilon_of_rates(false_positive, false_negative, delta))
        return claim.explaining_epsilon(false_positive, false_negative, delta)

    rule = max(best.values(), key=lambda one: implied(*one.rates))
    guessed, members = views[rule.view][part:] >= rule.threshold, inside[part:]
    false_positive = float(highest_rate((guessed & ~members).sum(), (~members).sum(), each))
    false_negative = float(highest_rate((~guessed & members).sum(), members.sum(), each))
    return implied(false_positive, false_negative), (
        f"told apart by {rule.view}: false positives ≤ {false_positive:.4f}, false negatives ≤ {false_negative:.4f} "
        f"over {len(inside) - part} trials"
    )


def _errors(values: Numbers, members: Flags, confidence: float, growth: float) -> tuple[Numbers, Numbers, Numbers]:
    """Thresholds between the values, and limits of the error rates of guessing 'in' above each."""
    order = np.argsort(values)
    ordered, inside = values[order], members[order]
    places = np.flatnonzero(ordered[1:] > ordered[:-1])
    missed = np.cumsum(inside)[places] * growth
    spared = np.cumsum(~inside)[places] * growth
    outside = (~members).sum() * growth
    return (
        (ordered[places] + ordered[places + 1]) / 2.0,
        highest_rate(outside - spared, outside, confidence),
        highest_rate(missed, members.sum() * growth, confidence),
    )


def guess(views: dict[str, Numbers], inside: Flags, part: int, delta: float, confidence: float) -> tuple[float, str]:
    """Guesses about the canaries with the largest and the smallest numbers, and the ε that their success implies.

    Args:
        views: several numbers for each canary ``(m,)``, larger where it seems to have been in.
        inside: whether it was.
        part: so many canaries at the beginning choose the view, and of how many nothing is said. Given their coins, the
            others' are fair still, and the release is as private with regard to them.
        delta: δ.
        confidence: of the bound.

    Returns:
        The lower bound on ε, and what it rests on.
    """

    def outcome(values: Numbers, members: Flags, share_in: float, share_out: float) -> tuple[int, int]:
        order = np.argsort(values)
        first = int(share_out * len(order))
        last = int(share_in * len(order))
        correct = (~members[order[:first]]).sum() + members[order[len(order) - last :]].sum()
        return first + last, int(correct)

    best, name, shares = -math.inf, "", (0.0, 0.0)
    for view, values in views.items():
        for pair in ((a, b) for a in _SHARES for b in _SHARES if a + b > 0.0):
            guesses, correct = outcome(values[:part], inside[:part], *pair)
            reached = 1.0 - float(highest_rate(guesses - correct, guesses, confidence))
            if reached > best:
                best, name, shares = reached, view, pair
    guesses, correct = outcome(views[name][part:], inside[part:], *shares)
    bound = one_run_epsilon(len(inside) - part, guesses, correct, delta, confidence) if guesses else 0.0
    return bound, f"told apart by {name}: {correct} of {guesses} guesses right, of {len(inside) - part} canaries"


def _canaries(model: DPLipModel, count: int) -> tuple[Tensor, Tensor]:
    """Inputs and cotangents larger than the gates let through: the worst structured pair, or random ones if several.

    Several must not point the same way, so that each can be told from the others.
    """
    device, dtype = model.device_and_dtype()
    targets = torch.randn(count, *model.output_shape, device=device, dtype=dtype)
    generator = torch.Generator()
    generator.seed()
    inputs = model.random_inputs(count, generator)
    if count == 1:
        sample, target = max(_structured(model, inputs[0], targets[0]), key=lambda pair: whole_gradient(model, *pair))
        inputs, targets = sample.unsqueeze(0), target.unsqueeze(0)
    targets = _sized(targets, _OVERSIZE * model.cotangent_norm)
    capped = inputs.is_floating_point() and math.isfinite(model.input_norm)
    return (_sized(inputs, _OVERSIZE * model.input_norm) if capped else inputs), targets


def _structured(model: DPLipModel, sample: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for signal in structured_inputs(model, generator):
        for cotangent in sized_signals(model.output_shape, model.cotangent_norm, generator):
            yield signal.to(sample), cotangent.to(target)


def _sized(values: Tensor, norm: float) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1).reshape(-1, *[1] * (values.dim() - 1))
    return values * (norm / norms.clamp(min=1e-30))


def _history(optimizer: CliplessDPOptimizer) -> list[tuple[float, float, int]]:
    """Its steps, whatever they are about: canaries are rows that are somebody's only one."""
    ledger = optimizer.accountant.ledger
    return ledger.history(*ledger.units)
