"""Attacks on the per-sample gradient bounds of a user's own model, with its layers, rules and current weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor

from clipless_dp import sharding
from clipless_dp.errors import AuditError, ConfigurationError
from clipless_dp.losses import BoundedLoss
from clipless_dp.model import DPLipModel
from clipless_dp.testing.attacks import (
    TOLERANCE,
    BoundBroken,
    Record,
    ascend,
    try_all,
    whole_gradient,
)
from clipless_dp.testing.consistency import Inconsistent, check_samples_apart
from clipless_dp.testing.probes import Case, inner_product

_LARGEST_JACOBIAN = 1 << 22
"""Entries of a Jacobian whose singular vectors are worth their cost."""


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
class SensitivityAudit:
    """What attacks on a model's bounds reached; prints as a table.

    Attributes:
        parameters: a line for each trainable parameter.
        total: the largest norm of a sample's whole gradient among the worst signals, over ``sensitivity().total``.
        attempts: how many samples were tried.
    """

    parameters: tuple[ParameterAudit, ...]
    total: float
    attempts: int

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

    def __str__(self) -> str:
        rows = [
            (line.name, f"{line.bound:.6g}", f"{line.observed:.6g}", f"{line.ratio:.4f}", line.attack)
            for line in self.parameters
        ]
        table = tabulate(
            rows,
            headers=["parameter", "bound", "observed", "ratio", "attack"],
            disable_numparse=True,
            colalign=("left", "right", "right", "right", "left"),
        )
        return f"{table}\n{self.attempts} attempts, worst ratio {self.worst:.4f}, whole gradient {self.total:.4f}"


def sensitivity(model: DPLipModel, batch: tuple[Tensor, Tensor] | None = None, *, steps: int = 4) -> SensitivityAudit:
    """Tries to break the bounds of a model as it is: its own layers, rules, constraints, gates and current weights.

    A copy of the model in float64 on the CPU, in the model's own mode, is attacked through its real forward, gates and
    backward, one sample at a time:

    * structured inputs (constants, one bright entry, stripes, combs, top singular vectors, noise; for tokens one that
      repeats), against as many structured cotangents, at loss scales from 1e-6 to 1e6: the cotangent is the attacker's;
    * gradient ascent on input and cotangent from the worst of these, for each parameter;
    * the given samples, with the model's own loss;
    * batches against their samples alone and with other neighbours, which shows layers that mix samples.

    Nothing of the model changes, random numbers included.

    Args:
        model: the wrapped model.
        batch: inputs ``(B, *input_shape)`` and targets ``(B, ...)`` to try too.
        steps: of each gradient ascent.

    Returns:
        The worst observation for each parameter, against its bound.

    Raises:
        AuditError: an attack passed a bound: a rule, a certificate or a gate is wrong. It holds the report.
        InputError: the batch does not fit the model.
        ConfigurationError: ``steps`` is negative, or each rank holds a part of the model only.

    Guarantee:
        None: an attack that fails proves nothing. What it refutes is wrong.
    """
    if not (isinstance(steps, int) and steps >= 0):
        raise ConfigurationError(f"steps must be an integer of at least 0, got {steps!r}")
    if sharding.has_shards(model):
        raise ConfigurationError(
            "an audit attacks whole weights, of which each rank holds a part: audit before fully_shard"
        )
    if batch is not None:
        model.check_inputs(batch[0])
    victim = copy.deepcopy(model).to(device="cpu", dtype=torch.float64)
    # Thousands of samples by themselves, whose bounds hold at any number of rows: none are added.
    victim._row_invariant = False
    own_loss, victim.loss_function = victim.loss_function, BoundedLoss(inner_product, bound=victim.cotangent_norm)
    case = _Victim(
        "model",
        lambda: victim,
        victim.input_shape,
        victim.input_norm,
        victim.cotangent_norm,
        vocabulary=victim._vocabulary or 0,
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        record = _Record(victim)
        try:
            jacobian = math.prod(victim.input_shape) * math.prod(victim.output_shape)
            try_all(record, case, singular=jacobian <= _LARGEST_JACOBIAN)
            record.attack = "gradient ascent"
            for name in list(record.worst):
                ascend(record, case, name, steps=steps)
            total = max((whole_gradient(victim, *pair) for pair in record.signals.values()), default=0.0)
            if not record.broken():
                check_samples_apart(case)
            if batch is not None:
                victim.loss_function, record.attack = own_loss, "given samples"
                inputs, targets = (values.detach().cpu() for values in batch)
                wide = inputs.double() if inputs.is_floating_point() else inputs
                for sample, target in zip(wide, targets, strict=True):
                    record.try_(sample, target)
        except (BoundBroken, Inconsistent) as broken:
            raise AuditError(f"{broken}. Do not train with it: a layer breaks what its bound rests on") from broken
    bounds = victim.sensitivity()
    report = SensitivityAudit(
        tuple(
            ParameterAudit(name, bound, bound * record.worst.get(name, 0.0), record.attacks.get(name, "–"))
            for name, bound in bounds.per_parameter.items()
        ),
        total / bounds.total if bounds.total > 0.0 else 0.0,
        record.attempts,
    )
    if report.broken:
        names = ", ".join(f"{line.name} ({line.ratio:.4g} times its bound)" for line in report.broken)
        raise AuditError(
            f"an attack passed the bound of {names}: the rule of that layer, or of one around it, is wrong, and its "
            f"noise too small. Do not train with it\n{report}",
            report,
        )
    return report


class _Victim(Case):
    """The model under attack itself, in place of one with a layer between probes."""

    def model(self, fill: object = None, dtype: torch.dtype = torch.float64) -> DPLipModel:
        victim = self.build()
        assert isinstance(victim, DPLipModel)
        return victim


class _Record(Record):
    """Goes on after a broken bound, and remembers which attack was the worst."""

    def __init__(self, model: DPLipModel) -> None:
        super().__init__(model, tolerance=math.inf)
        self.attempts = 0
        self.attack = "structured signals"
        self.attacks: dict[str, str] = {}

    def try_(self, sample: Tensor, target: Tensor, *, scale: float = 1.0) -> None:
        before = dict(self.worst)
        super().try_(sample, target, scale=scale)
        self.attempts += 1
        for name, ratio in self.worst.items():
            if ratio > before.get(name, -1.0):
                self.attacks[name] = self.attack

    def broken(self) -> bool:
        return any(ratio > 1.0 + TOLERANCE for ratio in self.worst.values())
