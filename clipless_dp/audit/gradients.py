"""Attacks on the per-sample gradient bounds of a user's own model, with its layers, rules and current weights."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

import torch
from torch import Tensor

from clipless_dp.arguments import whole
from clipless_dp.display import Table, Tabular
from clipless_dp.errors import AuditError, ConfigurationError
from clipless_dp.losses import Loss
from clipless_dp.losses.base import InnerProduct
from clipless_dp.model import DPLipModel
from clipless_dp.packing import Structure
from clipless_dp.testing.attacks import (
    SCALES,
    TOLERANCE,
    BoundBroken,
    Record,
    add_or_remove_one,
    ascend,
    is_capped,
    structured_pairs,
    try_all,
)
from clipless_dp.testing.company import (
    Row,
    check_company,
    check_counts,
    check_loss_rows_apart,
    hostile_rows,
    is_random,
    plausible_targets,
    quiet,
    varied_outputs,
)
from clipless_dp.testing.consistency import Inconsistent, check_samples_apart
from clipless_dp.testing.probes import Case

_LARGEST_JACOBIAN = 1 << 22
"""Entries of a Jacobian whose singular vectors are worth their cost."""

_QUICK_SECONDS = 2.0
"""After so long the quick form begins no further pass."""

_QUICK_PAIRS = (
    ("huge and 0.05 G", "random"),
    ("random and 0.05 G", "repeated"),
    ("random", "huge"),
    ("tiny", "NaN"),
    ("repeated", "unknown"),
)
"""Rows that are there several times, and rows that join them, in the quick form."""

_FEWEST_SINGLES = 2
"""Samples that the quick form tries one at a time, however few attempts it is given."""

_COMPARED = 16
"""Given samples that are compared with each other."""


@dataclass(frozen=True)
class ParameterAudit:
    """The worst that was done to one bound.

    Attributes:
        name: the parameter's name in ``model.net``.
        bound: ``Δ_θ``, the largest norm that one sample's gradient may have.
        observed: the largest norm that an attack reached.
        attack: which one: ``"structured signals"``, ``"gradient ascent"`` or ``"given samples"``.
    """

    name: str
    bound: float
    observed: float
    attack: str

    @property
    def ratio(self) -> float:
        """Observed over bound; above 1 refutes the bound."""
        return self.observed / self.bound if self.bound > 0.0 else (math.inf if self.observed > 0.0 else 0.0)


@dataclass(frozen=True)
class SensitivityAudit(Tabular):
    """What attacks on a model's bounds reached; prints as a table.

    Attributes:
        parameters: a line for each trainable parameter.
        total: the largest norm of a sample's whole gradient, over ``sensitivity().total``.
        attempts: how many samples, or rows more in a batch, were tried.
        quick: whether the quick form ran only.
        notes: what was not tried, or is fine in some uses only.
    """

    parameters: tuple[ParameterAudit, ...]
    total: float
    attempts: int
    quick: bool = False
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest ratio of a parameter's observation to its bound."""
        return max((line.ratio for line in self.parameters), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether no attack passed a bound."""
        return not self.broken

    @property
    def broken(self) -> tuple[ParameterAudit, ...]:
        """The parameters whose bound an attack passed."""
        return tuple(line for line in self.parameters if not line.ratio <= 1.0 + TOLERANCE)

    def _table(self) -> Table:
        rows = [
            (line.name, f"{line.bound:.6g}", f"{line.observed:.6g}", f"{line.ratio:.4f}", line.attack)
            for line in self.parameters
        ]
        headers = ("parameter", "bound", "observed", "ratio", "attack")
        last = f"{self.attempts} attempts, worst ratio {self.worst:.4f}, whole gradient {self.total:.4f}"
        notes = (*self.notes, last + " (quick form)" * self.quick)
        return Table(headers, rows, ("left", "right", "right", "right", "left"), notes)


def sensitivity(
    model: DPLipModel,
    batch: tuple[Tensor | Structure, Tensor] | None = None,
    *,
    steps: int = 4,
    attempts: int | None = None,
    like: Tensor | None = None,
    counts: bool = False,
) -> SensitivityAudit:
    """Tries to break the bounds of a model as it is: its own layers, rules, constraints, gates and current weights.

    A copy of the model in float64 on the CPU, in the model's own mode, is attacked through its real forward, gates and
    backward:

    * one sample at a time, structured inputs (constants, one bright entry, stripes, combs, top singular vectors, noise;
      for tokens one that repeats; of several inputs each), against as many structured cotangents, at loss
      scales from 1e-6 to 1e6, on both sides of every cap: the cotangent is the attacker's;
    * gradient ascent on input and cotangent from the worst of these, for each parameter;
    * one row more in a batch, ordinary or made to flip a branch that looks at the batch (beyond ``1e37`` radii, NaN,
      zero, tiny, an unknown token): the sum of gradients must change by that row's own, and within the bounds;
    * batches against their samples alone and with other neighbours, which shows layers that mix samples;
    * the model's own loss: each row's must be the same alone and in a batch, which shows losses that compare rows, or
      that broadcast targets against outputs;
    * the given samples, with the model's own loss, alone and beside each other.

    Dropout is off where batches are compared, whose masks would differ. Nothing of the model changes, random numbers
    included.

    Args:
        model: the wrapped model.
        batch: inputs ``(B, *input_shape)``, or several of them, and targets ``(B, ...)`` to try too.
        steps: of each gradient ascent.
        attempts: the quick form: at most about so many forward and backward passes, begun within two seconds, and no
            gradient ascents. ``None``: all of the above.
        like: the target of one sample, of which only the shape and whether it holds integers are looked at; else
            targets of the usual formats are tried on the loss, and it is refuted where it mixes rows in all that it
            takes.
        counts: whether rows that the first layer maps to zero are also summed in batches of many sizes: at the sizes
            where a library's products change their kernels, the last bit of each row may change.

    Returns:
        The worst observation for each parameter, against its bound.

    Raises:
        AuditError: an attack passed a bound: a rule, a certificate or a gate is wrong, or samples interact. Where a
            bound was passed it holds the report.
        InputError: the batch does not fit the model.
        ConfigurationError: ``steps`` or ``attempts`` is out of range, no parameter is trainable, or each rank holds a
            part of the model only.

    Guarantee:
        None: an attack that fails proves nothing. What it refutes is wrong.
    """
    steps = whole("steps", steps, 0)
    attempts = None if attempts is None else whole("attempts", attempts)
    if not any(parameter.requires_grad for parameter in model.net.parameters()):
        raise ConfigurationError("an audit attacks bounds of gradients, and the network has no parameters to train")
    if not model.placement.is_whole:
        raise ConfigurationError(
            "an audit attacks whole weights, of which each rank holds a part: audit before fully_shard"
        )
    rows = None if batch is None else (model.rows(batch[0]), batch[1])
    if rows is not None:
        model.check_inputs(rows[0])
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        attack = _Attack(model, attempts)
        try:
            attack.run(rows, steps, like, counts)
        except (BoundBroken, Inconsistent) as broken:
            raise AuditError(f"{broken}. Do not train with it: a step would release more than is stated") from broken
        report = attack.report()
    if report.broken:
        names = ", ".join(f"{line.name} ({line.ratio:.4g} times its bound)" for line in report.broken)
        raise AuditError(
            f"an attack passed the bound of {names}: the rule of that layer, or of one around it, is wrong, and its "
            f"noise too small. Do not train with it\n{report}",
            report,
        )
    return report


class _Attack:
    """A copy of the model, and what was done to it."""

    def __init__(self, model: DPLipModel, attempts: int | None) -> None:
        self.model = _in_float64(model)
        self.own_loss: Loss = self.model.loss_function
        self.attempts = attempts
        self.deadline = time.monotonic() + _QUICK_SECONDS
        self.record = _Record(self.model)
        self.notes: list[str] = []

    def run(self, batch: tuple[Tensor, Tensor] | None, steps: int, like: Tensor | None, counts: bool) -> None:
        model, record, own_loss = self.model, self.record, self.own_loss
        if batch is not None:
            like = batch[1][0] if len(batch[1]) else like
        self._compare_loss(like)
        model.loss_function = InnerProduct(model.cotangent_norm)
        case = _Victim(
            "model",
            lambda: model,
            model.input_shape,
            model.input_norm,
            model.cotangent_norm,
            vocabulary=model.vocabulary or 0,
        )
        generator = torch.Generator().manual_seed(29)
        rows = hostile_rows(model, generator, annihilated=self.attempts is None)
        if self.attempts is None:
            jacobian = math.prod(model.input_shape) * math.prod(model.output_shape)
            try_all(record, case, singular=jacobian <= _LARGEST_JACOBIAN)
            record.attack = "gradient ascent"
            for name in list(record.worst):
                ascend(record, case, name, steps=steps)
            if not record.broken():
                with quiet(model):
                    check_samples_apart(case)
                check_company(model, rows, on_pass=record.count)
        else:
            self._hurry(case, rows, generator)
        if counts:
            check_counts(model, generator, on_pass=record.count)
        if batch is not None:
            model.loss_function, record.attack = own_loss, "given samples"
            self._try_given(*(values.detach().cpu() for values in batch))

    def _hurry(self, case: Case, rows: list[Row], generator: torch.Generator) -> None:
        """A few single samples, then a few rows more in a batch."""
        assert self.attempts is not None
        record = self.record
        kinds = [row.kind for row in rows]
        pairs = [(kinds.index(crowd), kinds.index(one)) for crowd, one in _QUICK_PAIRS if {crowd, one} <= {*kinds}]
        # A row more takes three passes.
        pairs = pairs[: max(1, (self.attempts - _FEWEST_SINGLES) // 3)]
        singles = max(_FEWEST_SINGLES, self.attempts - 3 * len(pairs))
        for sample, target, scale in islice(self._quick_pairs(case, rows, generator), singles):
            record.try_(sample, target, scale=scale)
            if record.broken() or self._late():
                return
        check_company(self.model, rows, takewhile(lambda pair: not self._late(), pairs), on_pass=record.count)

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _quick_pairs(
        self, case: Case, rows: list[Row], generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """What the network stretches most, as far as two rounds of the power method find it, then structured pairs."""
        if is_capped(self.model):
            yield from _aligned(self.model, generator)
        yield rows[0].sample, rows[0].target, SCALES[-1]
        pairs = list(structured_pairs(self.model, case))
        # A stride that shares no factor with the number of pairs visits signals, cotangents and scales alike.
        stride = next(s for s in range(max(1, int(0.38 * len(pairs))), len(pairs) + 2) if math.gcd(s, len(pairs)) == 1)
        for place in range(len(pairs)):
            yield pairs[place * stride % len(pairs)]

    def _compare_loss(self, like: Tensor | None) -> None:
        """The own loss, on outputs of several sizes: refuted if it compares rows in each format of targets it takes."""
        generator = torch.Generator().manual_seed(31)
        outputs = varied_outputs(self.model.output_shape, generator)
        formats = plausible_targets(self.own_loss, self.model.output_shape, len(outputs), generator, like)
        found: list[Inconsistent] = []
        for targets in formats:
            try:
                check_loss_rows_apart(self.own_loss, outputs, targets, singles=8 if self.attempts is None else 2)
            except Inconsistent as mixing:
                found.append(mixing)
                self.notes.append(f"with targets of shape {tuple(targets.shape)} the loss compares rows")
        if formats and len(found) == len(formats):
            raise found[0]
        if not formats:
            self.notes.append("the model's own loss was not tried: it takes no usual targets; give a batch")

    def _try_given(self, inputs: Tensor, targets: Tensor) -> None:
        model, record = self.model, self.record
        wide = inputs.double() if inputs.is_floating_point() else inputs
        for sample, target in zip(wide, targets, strict=True):
            record.try_(sample, target)
        if len(wide) > 1 and not record.broken():
            with quiet(model), torch.no_grad():
                outputs = model(wide)
            check_loss_rows_apart(self.own_loss, outputs, targets)
            with quiet(model):
                if not is_random(model, wide[:2]):
                    add_or_remove_one(model, wide[:_COMPARED], targets[:_COMPARED])

    def report(self) -> SensitivityAudit:
        bounds, record = self.model.sensitivity(), self.record
        return SensitivityAudit(
            tuple(
                ParameterAudit(name, bound, bound * record.worst.get(name, 0.0), record.attacks.get(name, "–"))
                for name, bound in bounds.per_parameter.items()
            ),
            record.total / bounds.total if bounds.total > 0.0 else 0.0,
            record.attempts,
            self.attempts is not None,
            tuple(dict.fromkeys(self.notes)),
        )


def _in_float64(model: DPLipModel) -> DPLipModel:
    """A copy on the CPU, traced once."""
    state = copy.deepcopy(model.__getstate__())
    for module in state["_modules"].values():
        if module is not None:
            module.to(device="cpu", dtype=torch.float64)
    state["_buffers"] = {name: None if held is None else held.cpu() for name, held in state["_buffers"].items()}
    twin = DPLipModel.__new__(DPLipModel)
    # Many samples by themselves, whose bounds hold at any number of rows: none are added.
    twin.__setstate__({**state, "_row_invariant": False})
    return twin


def _aligned(model: DPLipModel, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A sample and a cotangent along the direction that the network stretches most, near two random points."""
    point = torch.randn(model.input_shape, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(model.output_shape, generator=generator, dtype=torch.float64)
    for scale in SCALES[:2]:
        point = (point * (model.input_norm / point.norm())).requires_grad_()
        output = model.graph.module(point.unsqueeze(0)).squeeze(0)
        (slope,) = torch.autograd.grad((output * cotangent).sum(), point, materialize_grads=True)
        sample = point.detach()
        if float(slope.norm()) > 0.0:
            sample = slope * (model.input_norm / slope.norm())
            with torch.no_grad():
                moved = model.graph.module((point + 1e-4 * sample).unsqueeze(0)).squeeze(0) - output
            if float(moved.norm()) > 0.0:
                cotangent = moved.detach()
        cotangent = cotangent * (model.cotangent_norm / cotangent.norm().clamp(min=1e-300))
        yield sample, cotangent, scale
        point = sample


class _Victim(Case):
    """The model under attack itself, in place of one with a layer between probes."""

    def model(self, fill: object = None, dtype: torch.dtype = torch.float64) -> DPLipModel:
        victim = self.build()
        assert isinstance(victim, DPLipModel)
        return victim

    def batch(self, model: DPLipModel, size: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().batch(model, size)
        if not is_capped(model):
            inputs = model.random_inputs(size, torch.Generator().manual_seed(23))
        return inputs, targets

    def contrasts(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model()
        if is_capped(model):
            return super().contrasts(inputs)
        return inputs, model.random_inputs(len(inputs), torch.Generator().manual_seed(37))


class _Record(Record):
    """Goes on after a broken bound, and remembers which attack was the worst."""

    def __init__(self, model: DPLipModel) -> None:
        super().__init__(model, tolerance=math.inf)
        self.attempts = 0
        self.total = 0.0
        self.attack = "structured signals"
        self.attacks: dict[str, str] = {}

    def count(self) -> None:
        self.attempts += 1

    def try_(self, sample: Tensor, target: Tensor, *, scale: float = 1.0) -> float:
        before = dict(self.worst)
        total = super().try_(sample, target, scale=scale)
        self.attempts += 1
        self.total = max(self.total, total)
        for name, ratio in self.worst.items():
            if ratio > before.get(name, -1.0):
                self.attacks[name] = self.attack
        return total

    def broken(self) -> bool:
        return any(ratio > 1.0 + TOLERANCE for ratio in self.worst.values())
