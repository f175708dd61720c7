"""Optimizers that add calibrated noise, record what was released, and project back onto the constraints."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, overload
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from accounting import Accountant, Ledger, Provenance, create_accountant, new_run
from accounting.errors import warn_caller
from clipless_dp import distributed
from clipless_dp.arguments import require_accountant
from clipless_dp.bounds.sensitivity import Sensitivity
from clipless_dp.bounds.stamp import stamp
from clipless_dp.distributed import shards as sharding
from clipless_dp.errors import BudgetExhaustedError, ConfigurationError, PrivacyError, PrivacyWarning, RankError
from clipless_dp.model import DPLipModel, lineage, passes
from clipless_dp.modules import parameters_of
from clipless_dp.noise import (
    RELEASE_MARGIN,
    Allocation,
    NoiseSource,
    add_normal_,
    allocate,
    effective_noise_multiplier,
    noise_source,
    source_name,
)
from clipless_dp.sampling import draws
from clipless_dp.sampling.augmentation import Augmentation, refuse_own_generators, views

Sampling = Literal["announced", "poisson", "none"]

Rates = tuple[float | None, ...]
"""Learning rate of each parameter group; ``None`` where the base optimizer has none."""

_ROOM = 2.0**-10
"""Share of the largest number that a deviation may be: normal numbers and sums of some are larger."""

STATE_FORMAT = 2
_READ_FORMATS = (1, STATE_FORMAT)


class CliplessDPOptimizer(Optimizer):
    """Makes any first-order torch optimizer private.

    Each :meth:`step` takes the summed gradients, adds Gaussian noise of standard deviation ``σ_θ`` to that of each
    parameter, divides by the public expected batch size ``sample_rate·dataset_size``, lets the base optimizer
    update, and projects onto the model's constraints (Béthune et al. 2024, Algorithm 1). The step's event is
    recorded before anything is changed, so a crash can only over-count.

    It shares ``param_groups`` and ``state`` with the base optimizer: schedulers work on it as on any other.
    Gradients may come from several ``backward()`` calls, as long as each sample is in one of them only: one draw of a
    sampler for each step. Gradients from before the optimizer existed, and those of parameters that it does not hold,
    have no bound when they are stepped on later; they are dropped. Do not touch gradients between ``backward()`` and
    ``step()``: clipping their common norm there is only sound with the ``"global"`` allocation.

    Of several processes (:mod:`clipless_dp.distributed`), each has an optimizer of its own around the whole model, and
    all step together: the ranks' gradients are added up, rank 0 adds the noise, and all take the same update. Weights
    start as those of rank 0. Before each update the ranks compare weights, bounds, noise and ledger.
    Of a model that ``fully_shard`` has split, each rank adds noise to its own part of the sum, and updates that.

    Args:
        model: the wrapped model.
        base_optimizer: any ``torch.optim.Optimizer`` over parameters of ``model.net`` that steps without a closure.
        noise_multiplier: ``σ > 0``, in units of the joint sensitivity.
        sample_rate: ``q`` in (0, 1]: each sample's probability of being in a batch.
        dataset_size: public number of samples; fixes the divisor.
        accountant: ``"prv"``, ``"rdp"``, ``"auto"``, or an accountant, with earlier releases from the data or none.
        allocation: how the noise is shared among parameters: ``"global"``, ``"per-layer"`` or ``"min-variance"``.
        sampling: ``"announced"``: a step is charged as Poisson-sampled only if a sampler of this package announced
            its draw, else at ``q = 1``, with a warning. ``"poisson"``: you vouch for a Poisson sampler of your
            own. ``"none"``: every step is charged at ``q = 1``.
        noise: ``"system"``, the default: a private generator that the operating system seeds; ``"secure"``: a
            cryptographic one, and sums without gaps (:class:`clipless_dp.SecureNoise`); or a source of your own.
        budget: ``(ε, δ)`` that the ledger is never to exceed: the step that would is refused with
            :class:`BudgetExhaustedError` before anything of it is released. ``None``: no limit.

    Raises:
        ConfigurationError: an argument is out of range.
        PrivacyError: the base optimizer holds parameters that the model does not protect.
        RankError: the ranks' arguments differ.

    Guarantee:
        Under add-or-remove-one adjacency each step is a Gaussian mechanism of noise multiplier
        ``(Σ (Δ_θ/σ_θ)²)^(-½)``, evaluated from this step's bounds and deviations, on a subsample of rate ``q``.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: DPLipModel,
        base_optimizer: Optimizer,
        *,
        noise_multiplier: float,
        sample_rate: float,
        dataset_size: int,
        accountant: str | Accountant = "prv",
        allocation: Allocation = "global",
        sampling: Sampling = "announced",
        noise: NoiseSource | str | None = None,
        budget: tuple[float, float] | None = None,
    ) -> None:
        distributed.refuse_averages(model)
        if isinstance(base_optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
            raise ConfigurationError(
                f"{type(base_optimizer).__name__} evaluates gradients several times a step or needs sparse ones; "
                "use SGD, Adam or another first-order optimizer"
            )
        if not 0.0 < sample_rate <= 1.0:
            raise ConfigurationError(
                f"sample_rate must lie in (0, 1], got {sample_rate!r}; above 1 the batch exceeds the data set"
            )
        if not (isinstance(dataset_size, int) and dataset_size >= 1):
            raise ConfigurationError(f"dataset_size must be a positive integer, got {dataset_size!r}")
        allocate([1.0], [1], 1.0, allocation)
        self.model = model
        self.base_optimizer = base_optimizer
        self.noise_multiplier = noise_multiplier
        self.sample_rate = float(sample_rate)
        self.dataset_size = dataset_size
        self.expected_batch_size = self.sample_rate * dataset_size
        self.allocation: Allocation = allocation
        self.sampling = sampling
        self.noise = noise
        self.accountant: Accountant = (
            create_accountant(accountant, dataset_size=dataset_size)
            if isinstance(accountant, str)
            else require_accountant(accountant, or_name=True)
        )
        self.budget = budget
        self.steps_taken = 0
        self._noise_sources: set[str] = set()
        self._randomness_sources: set[str] = set()
        self._drawn_before = model.randomness.draws.copy()
        self._learning_rates: list[tuple[Rates, int]] = []
        self._made = draws.now()
        draws.disregard()
        self.skipped_draws = 0
        self._run, self._taken, self._process = new_run(), 0, os.getpid()
        self._seeded_draw = False
        self._seeded_masks = False
        self._drew_from_a_seed = False
        self._inherited: dict[str, int] = {}
        self._missing: set[str] = set()
        self._plan: tuple[Sensitivity, tuple[int, ...], float, dict[int, float], float] | None = None
        self._named: dict[str, nn.Parameter] = {}
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._share_state()
        self._require_protected()
        model.register.drop()
        model.expect_rows(self.expected_batch_size)
        self._world = distributed.world()
        self._sharded = sharding.has_shards(model)
        if self._sharded:
            sharding.check_shards(model, model.net.parameters())
        self._stopped = False
        self._lines_compared = 0
        if self._world.size > 1:
            self._join_ranks()
        self.model.sensitivity()
        self._settings = lineage.settings_of(model)
        self._other_settings: list[str] = []
        lineage.of(model).start(self._require_protected())

    def __getstate__(self) -> NoReturn:
        raise ConfigurationError(
            "an optimizer is not copied or pickled, since two copies would charge the same draws: save state_dict() "
            "and load it into a new optimizer"
        )

    @property
    def noise_multiplier(self) -> float:
        """``σ``; assign to it to follow a noise schedule: every step is accounted with its own value."""
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ConfigurationError(f"noise_multiplier must be finite and positive, got {value!r}")
        self._noise_multiplier = float(value)

    @property
    def sampling(self) -> Sampling:
        """How batches are drawn; may be assigned to, for the steps to come."""
        return self._sampling

    @sampling.setter
    def sampling(self, value: Sampling) -> None:
        if value not in ("announced", "poisson", "none"):
            raise ConfigurationError(f"sampling must be 'announced', 'poisson' or 'none', got {value!r}")
        self._sampling = value

    @property
    def noise(self) -> NoiseSource:
        """Source of the noise; may be assigned to, as the constructor's argument, for the steps to come."""
        return self._noise

    @noise.setter
    def noise(self, value: NoiseSource | str | None) -> None:
        self._noise = noise_source(value)

    @property
    def budget(self) -> tuple[float, float] | None:
        """``(ε, δ)`` that the ledger is never to exceed; may be assigned to, for the steps to come."""
        return self._budget

    @budget.setter
    def budget(self, value: tuple[float, float] | None) -> None:
        self._budget = _checked_budget(value)
        # What was asked for another budget says nothing of this one.
        self._allowance = _Allowance()

    def accumulate(
        self,
        batch: tuple[Tensor, Tensor, Tensor],
        *,
        augment: Augmentation | None = None,
        multiplicity: int = 1,
        micro_batch_size: int | None = None,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Adds the gradients of a draw, each sample's own being the mean over views of it (De et al. 2022, §3).

        Every view is passed back at full scale, through all gates, and the mean is taken of the parameters' gradients:
        a loss weighted by ``1/K`` instead would be undone by a gate that normalises, and count a sample ``K`` times.

        Args:
            batch: inputs, targets and mask of one draw, such as :class:`clipless_dp.sampling.Batch`.
            augment: makes a view: a function of one sample, or a :class:`clipless_dp.RowAugmentation`. Each view must
                depend on its sample and fresh randomness only.
            multiplicity: ``K``, views of each sample.
            micro_batch_size: rows processed at once; bounds the memory.
            loss: another way to compute ``model.loss(model(inputs), targets, mask)``, such as a compiled one.

        Returns:
            The summed loss, a mean over views; it is not private.

        Raises:
            ConfigurationError: an argument is out of range, or a view has another shape than its sample.
            PrivacyError: rows of this batch are in the gradients already; ``step()`` and ``zero_grad()`` forget them.
            RankError: the model is sharded, and another rank is gone.

        Guarantee:
            Each sample's view has gradients within the model's bounds, hence so has the mean of its views: the
            sensitivity is the same for every ``K``. After an error the gradients are as before.
        """
        if not (isinstance(multiplicity, int) and multiplicity >= 1):
            raise ConfigurationError(f"multiplicity must be a positive integer, got {multiplicity!r}")
        if multiplicity > 1 and augment is None:
            raise ConfigurationError(f"multiplicity={multiplicity} without augment would repeat one view: give augment")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ConfigurationError(f"micro_batch_size must be positive, got {micro_batch_size!r}")
        if augment is not None:
            refuse_own_generators(augment)
        inputs, targets, mask = batch
        register = self.model.register
        rows, beside = passes.origin(inputs)
        register.reconcile()
        entered = [some.rows for some in register.passes if some.rows is not None]
        if draws.overlapping([*entered, rows]):
            raise PrivacyError(
                "rows of this batch have entered the gradients of this step already, and would count twice: "
                "accumulate each draw once, with multiplicity=K for several views of its samples, then step()"
            )
        if loss is None:
            loss = self._loss
        size = max(1, len(inputs)) if micro_batch_size is None else micro_batch_size
        sharding.part_(self.model)
        total = torch.zeros((), device=inputs.device)
        pieces = list(zip(inputs.split(size), targets.split(size), mask.split(size), strict=True))
        if self._sharded:
            # Ranks pass together, each gathering what the others hold: empty ones where there are no more rows.
            missing = distributed.largest(len(pieces)) - len(pieces)
            pieces += [(inputs[:0], targets[:0], mask[:0])] * missing
        passing = sharding.passing() if self._sharded else nullcontext()
        with register.apart(rows, beside, views=multiplicity), passing:
            for _ in range(multiplicity):
                for piece in pieces:
                    seen = piece[0] if augment is None or not len(piece[0]) else self._views(augment, piece)
                    with register.rows(seen, piece[2]):
                        value = loss(seen, piece[1], piece[2])
                        value.backward()
                    total += value.detach()
        return total / multiplicity

    def accumulate_public(
        self,
        batch: tuple[Tensor, Tensor],
        *,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Adds the gradients of public rows: nobody's data, such as noise, or what a private model has generated.

        They are charged to nobody and count as rows of no draw; their gradients join the sum, gated as all.

        Args:
            batch: inputs and targets.
            loss: another way to compute ``model.loss(model(inputs), targets)``. It must not read anything of the
                training data.

        Returns:
            The summed loss.

        Raises:
            InputError: a row is one of the draw in hand.
        """
        inputs, targets = batch
        with self.model.register.apart(None, None, public=True):
            value = self.model.loss(self.model(inputs), targets) if loss is None else loss(inputs, targets)
            value.backward()
        return value.detach()

    def skip_draw(self) -> None:
        """Says that the draws in hand are not trained on, so that other rows may be: on public data, say.

        Drops the gradients. Whether a draw is skipped must not depend on what is in it: no amplification covers that.
        The statement says how many were.
        """
        self.skipped_draws += draws.skip()
        self.model.register.drop()

    def _views(self, augment: Augmentation, piece: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return views(augment, piece[0], piece[2], self.model.randomness)

    def _loss(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return self.model.loss(self.model(inputs), targets, mask)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One private update.

        Args:
            closure: evaluated once, to compute the gradients; its value is returned and is not private.

        Raises:
            ConfigurationError: another optimizer of the model has taken the gradients.
            PrivacyError: a gradient would be released without protection.
            RankError: the ranks differ, or one is gone; no rank goes on, and none has applied an update without noise.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            try:
                self._release()
            except BaseException:
                # What is refused, or was interrupted, must not be released together with what comes next.
                self.skip_draw()
                raise
            try:
                self.base_optimizer.step()
                self.model.project_()
            finally:
                # Whatever part of the update was applied, the ledger counts it.
                lineage.of(self.model).settle(self._named)
        return loss

    def get_epsilon(self, delta: float) -> float:
        """ε spent so far at this δ, an upper bound, under add-or-remove-one adjacency."""
        return float(self.accountant.get_epsilon(delta))

    @property
    def noise_sources(self) -> tuple[str, ...]:
        """The sources that the noise of all entries of the ledger came from, as far as they are known."""
        recorded = {line.provenance.noise for line in self.accountant.ledger.lines if line.provenance.noise}
        return tuple(sorted(recorded | self._noise_sources))

    @property
    def randomness_sources(self) -> tuple[str, ...]:
        """Where masks of dropout and random views of all steps came from, those of loaded states included.

        ``"system"``, which a release needs; ``"reproducible"`` (a ``reproducible_seed``, or
        :meth:`clipless_dp.noise.randomness.Randomness.seeded`); ``"unrecorded"`` where a loaded state does not say.
        None where nothing was drawn.
        """
        return tuple(sorted(self._randomness_sources))

    @property
    def learning_rates(self) -> list[tuple[Rates, int]]:
        """The learning rates of all steps, those of loaded states included: rates, and for how many steps in a row."""
        return list(self._learning_rates)

    def noise_deviations(self) -> dict[str, float]:
        """``σ_θ`` of the noise on each parameter's summed gradient, at the current bounds, by name in ``model.net``."""
        named = self._require_protected()
        deviations, _ = self._deviations(self.model.sensitivity(), named)
        return {name: deviations[id(parameter)] for name, parameter in named.items() if id(parameter) in deviations}

    def ledger_is_incomplete(self) -> bool:
        """Whether private steps were taken on the model, by whichever optimizer, that this ledger lacks."""
        return bool(self._missing_runs())

    def _missing_runs(self) -> set[str]:
        ledger = self.accountant.ledger
        return {run for run, count in lineage.of(self.model).runs.items() if ledger.count(run) < count}

    def weights_are_counted(self) -> bool:
        """Whether the model's weights are those that the last step left, bit by bit, or an average of such."""
        return lineage.of(self.model).unchanged(self._require_protected())

    @property
    def uncounted_changes(self) -> int:
        """Before how many steps the weights were not those that the step before had left."""
        return lineage.of(self.model).changed

    def changed_settings(self) -> list[str]:
        """Which settings of the model differ between earlier steps and now: caps, loss, layers, in words."""
        return [*self._other_settings, *lineage.differences(self._settings, lineage.settings_of(self.model))]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and forgets the draws that they may have come from, but for the latest."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)
        self.model.register.reconcile()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters of ``model.net``.

        Raises:
            PrivacyError: one of them is not protected by the model.
        """
        if any(param_group is group for group in self.base_optimizer.param_groups):
            super().add_param_group(param_group)
            return
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        self._require_protected(params)
        for parameter in params:
            parameter.grad = None
        self.base_optimizer.add_param_group({**param_group, "params": params})
        self._share_state()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, with the ledger under ``"clipless_dp"``; plain values and tensors only."""
        known = lineage.of(self.model)
        return {
            **self.base_optimizer.state_dict(),
            "clipless_dp": {
                "format": STATE_FORMAT,
                "steps_taken": self.steps_taken,
                "accountant": self.accountant.state_dict(),
                "noise": list(self.noise_sources),
                "skipped_draws": self.skipped_draws,
                "randomness": list(self.randomness_sources),
                "learning_rates": [[list(rates), count] for rates, count in self._learning_rates],
                "weights": None if self._sharded else known.bits(),
                "uncounted_changes": known.changed,
                "settings": lineage.settings_of(self.model),
                "changed_settings": self.changed_settings(),
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state and the ledger.

        What this optimizer has already spent is never forgotten: of a run that both ledgers know, the longer record is
        kept; all else is composed, even if it looks alike. A ledger that an earlier version wrote knows no runs: it is
        one by itself, known only to be the same when the very same state is loaded twice.

        Raises:
            ConfigurationError: the state is not one of this class, or of an unknown format.
        """
        own = state_dict.get("clipless_dp")
        if not isinstance(own, dict) or own.get("format") not in _READ_FORMATS:
            raise ConfigurationError(
                "this is not the state of a clipless_dp optimizer of format "
                f"{STATE_FORMAT}: its privacy ledger is missing or newer than this version"
            )
        try:
            steps_taken, loaded = int(own["steps_taken"]), self.accountant.ledger_of(own["accountant"])
            sources = {str(name) for name in own["noise"]}
            randomness = {str(name) for name in own.get("randomness", ["unrecorded"])}
            # States of before they were recorded have none.
            rates = [
                (tuple(None if rate is None else float(rate) for rate in some), int(count))
                for some, count in own.get("learning_rates", [])
            ]
            if own["format"] == 1:
                counted = sorted((str(run), int(count)) for run, count in own["counted"].items())
                digest = hashlib.sha256(f"{loaded.to_json()}{counted}".encode()).hexdigest()[:32]
                # Where there were several sources, nothing tells which noise was whose.
                loaded = loaded.attributed(
                    Provenance(f"state {digest}", noise=min(sources) if len(sources) == 1 else "")
                )
            weights = own.get("weights")
            bits = None if weights is None else {str(name): int(value) for name, value in weights.items()}
            changes = int(own.get("uncounted_changes", 0))
            skipped = int(own.get("skipped_draws", 0))
            settings, changed = own.get("settings"), list(map(str, own.get("changed_settings", ())))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigurationError(f"the privacy ledger of this state is incomplete: {error!r}") from error
        if not 0 <= steps_taken <= len(loaded):
            raise ConfigurationError(
                f"this state says that {steps_taken} steps were taken, its ledger holds {len(loaded)}: it was altered"
            )
        self._inherited = loaded.runs
        self.accountant.ledger = loaded.merge(self.accountant.ledger)
        self._lines_compared = 0
        self.steps_taken = steps_taken
        self._noise_sources |= sources
        self._randomness_sources |= randomness
        self._learning_rates = rates
        known = lineage.of(self.model)
        known.expect(bits, loaded.runs)
        known.changed = max(known.changed, changes)
        # Other draws than those skipped here.
        self.skipped_draws += skipped
        if isinstance(settings, dict):
            changed += lineage.differences(settings, self._settings)
        self._other_settings += [line for line in changed if line not in self._other_settings]
        self.base_optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "clipless_dp"})
        self._share_state()

    def _share_state(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _require_protected(self, parameters: Iterable[Tensor] | None = None) -> dict[str, nn.Parameter]:
        """The network's parameters by name, once those of the optimizer (or the given ones) are known to be of them."""
        sharding.part_(self.model)
        parameters = self._parameters() if parameters is None else parameters
        held = parameters_of(self.model.net)
        if [*map(id, self._named.values())] != [*map(id, held)]:
            self._named = dict(self.model.net.named_parameters())
        named = self._named
        known = set(map(id, held))
        foreign = [tuple(parameter.shape) for parameter in parameters if id(parameter) not in known]
        if foreign:
            raise PrivacyError(
                f"the optimizer holds {len(foreign)} parameter(s) that are not of model.net, of shapes {foreign}: "
                "their gradients have no bound and would be released without noise"
            )
        return named

    def _release(self) -> None:
        """Records the event, then turns the summed gradients into private averages."""
        if distributed.world() != self._world:
            raise PrivacyError("the process group has changed since the optimizer was made: make it afterwards")
        if self._stopped:
            raise RankError("a step of this run has failed: start all ranks again from the last checkpoint")
        named = self._require_protected()
        if self._sharded:
            sharding.require_sums(self.model)
        register = self.model.register
        passed = register.witnessed()
        if not passed:
            self._refuse_to_step_after_another(register)
        sensitivity = self._sensitivity(passed)
        deviations, spent = self._deviations(sensitivity, named)
        rate, share = self._charged([some for some in passed if not some.public])
        spent *= share
        self._require_budget(spent, rate)
        self._warn_of_missing_runs()
        self._note_randomness()
        self.accountant.step(noise_multiplier=spent, sample_rate=rate, provenance=self._provenance(rate))
        self._taken += 1
        self._note_ledger()
        if not lineage.of(self.model).unchanged(named, quick=True):
            lineage.of(self.model).changed += 1
        self._note_learning_rates()
        self.noise.begin_step(self.steps_taken)
        self.steps_taken += 1
        register.forget()
        if passed:
            register.taker = ref(self)
        gradients: list[Tensor] = []
        scales: list[float] = []
        for parameter in named.values():
            if not passed:
                # Whatever is there, no pass has left it.
                parameter.grad = None
            deviation = deviations.get(id(parameter))
            if deviation is None:
                # Not to be stepped on later, when it would hold several batches.
                parameter.grad = None
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
            scales.append(deviation)
        if self._world.size == 1:
            self._add_noise(gradients, scales, 1.0 / self.expected_batch_size)
        else:
            self._release_together(gradients, scales)
            torch._foreach_mul_(gradients, 1.0 / self.expected_batch_size)
        self.model.project_gradients_()
        register.note_all(sampled=False)

    def _refuse_to_step_after_another(self, register: passes.Register) -> None:
        """Refuses, or where the sampler is vouched for tells, that another optimizer took the gradients of the pass.

        Each step releases, or drops, the gradients of all parameters of the model: a second optimizer's step would be
        noise alone, and charged.

        Raises:
            ConfigurationError: no draw is in hand that might just be an empty one.
        """
        taker = None if register.taker is None else register.taker()
        waiting = draws.in_hand()
        fresh = waiting is not None and not waiting.used and waiting.delivered > self._made
        if taker is None or taker is self or fresh:
            return
        said = (
            "this step has no gradients: another optimizer of the model has taken those of the last pass. Make one "
            "optimizer of all parameters, with parameter groups for different settings, or pass the rows of a draw of "
            "its own back before each optimizer's step"
        )
        if self.sampling == "announced":
            raise ConfigurationError(f"{said}. Nothing was charged")
        warn_caller(f"{said}. It is noise alone, and charged, as is right only for an empty batch", PrivacyWarning)

    def _provenance(self, rate: float) -> Provenance:
        """Of the step to come: whose it is, and what its charge rests on."""
        if self._process != os.getpid():
            # The other side of the fork goes on too.
            self._run, self._taken, self._process = new_run(), 0, os.getpid()
        elif self.accountant.ledger.count(self._run) != self._taken:
            # Another ledger was put in place of the one that holds this run. All ranks derive the same.
            self._run = hashlib.sha256(f"{self._run} {self._taken}".encode()).hexdigest()[:32]
            self._taken = 0
        known = Provenance(
            self._run, noise=source_name(type(self.noise)), seeded_masks=self._seeded_masks or self._drew_from_a_seed
        )
        if rate == 1.0:
            return replace(known, sampling="none")
        if self._seeded_draw:
            return replace(known, sampling="seeded")
        return replace(known, sampling="vouched" if self.sampling == "poisson" else "announced")

    def _note_randomness(self) -> None:
        """Where the masks and views of the step to come were drawn from."""
        source, before = self.model.randomness, self._drawn_before
        self._drawn_before = source.draws.copy()
        drawn = source.draws - before
        self._randomness_sources.update(drawn)
        self._drew_from_a_seed = "reproducible" in drawn
        source.forget()

    def _note_learning_rates(self) -> None:
        rates = tuple(None if (rate := group.get("lr")) is None else float(rate) for group in self.param_groups)
        before = self._learning_rates.pop() if self._learning_rates else (rates, 0)
        self._learning_rates += [(rates, before[1] + 1)] if before[0] == rates else [before, (rates, 1)]

    def _join_ranks(self) -> None:
        """Makes sure that all ranks train the same model in the same way, from the weights of rank 0."""
        parameters = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in self.model.net.named_parameters()]
        distributed.agree(
            {
                "parameters": parameters,
                "parts": sharding.layout(self.model),
                "noise_multiplier": self.noise_multiplier,
                "sample_rate": self.sample_rate,
                "dataset_size": self.dataset_size,
                "allocation": self.allocation,
                "sampling": self.sampling,
                "noise": source_name(type(self.noise)),
                "budget": self.budget,
                "input_norm": self.model.input_norm,
                "loss": self.model.cotangent_norm,
                "ledger": self.accountant.ledger.entries,
            }
        )
        if not self._sharded:
            distributed.copy_from_([*self.model.net.parameters(), *self.model.net.buffers()])
            self.model.settle_()
        # One run: its steps are counted once, whichever rank writes the checkpoint.
        self._run = distributed.from_first(lambda: self._run)

    def _release_together(self, gradients: Sequence[Tensor], scales: Sequence[float]) -> None:
        """Replaces the gradients by the noisy sums over all ranks."""
        lines = self.accountant.ledger.entries
        self._stopped = True
        try:
            distributed.agree(
                {
                    "steps taken": self.steps_taken,
                    "ledger": (len(lines), lines[self._lines_compared :]),
                    "bounds or noise": scales,
                    "weights": self._sharded or [stamp(parameter)[2:] for parameter in self.model.net.parameters()],
                }
            )
            if self._sharded:
                self._add_noise(gradients, scales)
            else:
                distributed.release_(gradients, lambda sums: add_normal_(sums, scales, self.noise))
        except BaseException:
            for parameter in self.model.net.parameters():
                parameter.grad = None
            raise
        self._lines_compared = max(0, len(lines) - 1)
        self._stopped = False

    def _add_noise(self, gradients: Sequence[Tensor], scales: Sequence[float], factor: float = 1.0) -> None:
        """Adds the noise to the sums, or to this rank's part of them, which no other rank holds, and scales them."""
        if self._sharded and self.noise.reproducible:
            # All ranks draw the same numbers, for the whole, and each takes those of its part.
            drawn = [torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in gradients]
            add_normal_(drawn, scales, self.noise)
            for gradient, whole in zip(gradients, drawn, strict=True):
                sharding.local(gradient).add_(sharding.local(sharding.split(whole, gradient))).mul_(factor)
            return
        add_normal_([sharding.local(gradient) for gradient in gradients], scales, self.noise, factor)

    def _sensitivity(self, passed: Sequence[passes.Pass]) -> Sensitivity:
        """The bounds of the passes that the gradients consist of."""
        return passes.joined(passed, self.model.sensitivity)

    def _deviations(
        self, sensitivity: Sensitivity, named: Mapping[str, nn.Parameter]
    ) -> tuple[dict[int, float], float]:
        """Standard deviations by parameter, and the effective noise multiplier that they amount to."""
        names = {id(parameter): name for name, parameter in named.items()}
        held = tuple(
            id(parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and sensitivity.per_parameter.get(names[id(parameter)], 0.0) > 0.0
        )
        if self._plan is not None:
            known, parameters, multiplier, deviations, spent = self._plan
            if known is sensitivity and parameters == held and multiplier == self.noise_multiplier:
                return deviations, spent
        if not held:
            raise PrivacyError("no trainable parameter of the optimizer takes part in the network: nothing to train")
        sizes = {id(parameter): parameter.numel() for parameter in named.values()}
        bounds = [sensitivity.per_parameter[names[key]] for key in held]
        planned = allocate(bounds, [sizes[key] for key in held], self.noise_multiplier, self.allocation)
        used = [deviation * RELEASE_MARGIN for deviation in planned]
        effective = effective_noise_multiplier(bounds, used)
        if not (math.isfinite(effective) and effective > 0):
            raise PrivacyError(f"the noise amounts to a multiplier of {effective!r}; nothing was released")
        # The margin exceeds float64 rounding, so this is the planned value: equal steps stay one line in the ledger.
        spent = self.noise_multiplier if effective >= self.noise_multiplier else effective
        deviations = dict(zip(held, used, strict=True))
        for name, parameter in named.items():
            if deviations.get(id(parameter), 0.0) > torch.finfo(parameter.dtype).max * _ROOM:
                raise PrivacyError(
                    f"noise of standard deviation {deviations[id(parameter)]:.4g} does not fit the {parameter.dtype} "
                    f"numbers of {name}: choose a smaller noise_multiplier; nothing was released"
                )
        self._plan = sensitivity, held, self.noise_multiplier, deviations, spent
        return deviations, spent

    def declare_seeded_masks(self, seeded: bool) -> None:
        """Whether dropout masks and random views of the steps to come are drawn from a seed, which statements tell."""
        self._seeded_masks = seeded

    def allows(self, steps: int, *, sample_rate: float | None = None) -> bool:
        """Whether so many further steps at the current noise multiplier fit the budget, on top of the whole ledger.

        Args:
            steps: how many.
            sample_rate: what each is charged at; by default the optimizer's own.
        """
        rate = self.sample_rate if sample_rate is None else sample_rate
        return self._fits(self.noise_multiplier, rate, steps)

    def _fits(self, noise_multiplier: float, sample_rate: float, steps: int) -> bool:
        """Asks the accountant, and remembers a yes: so many steps need not ask again."""
        if self.budget is None:
            return True
        epsilon, delta = self.budget
        trial = copy.deepcopy(self.accountant)
        if steps:
            trial.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        # Not "greater": a NaN fits no budget.
        fits = float(trial.get_epsilon(delta)) <= epsilon
        if fits:
            self._allowance = _Allowance((noise_multiplier, sample_rate), steps, self._recorded(), steps)
        return fits

    def _recorded(self, more: int = 0) -> _Recorded:
        return _Recorded(self.accountant, self.accountant.ledger, len(self.accountant) + more)

    def _require_budget(self, noise_multiplier: float, sample_rate: float) -> None:
        """Refuses a step beyond the budget.

        Asked for one step, then two, four, …, and by halves where that is too many: an accountant answers some
        2·log₂(steps) times in all, not once for each step.
        """
        if self.budget is None:
            return
        kept, recorded = self._allowance, self._recorded()
        if kept.kind != (noise_multiplier, sample_rate) or kept.recorded != recorded:
            kept = _Allowance()
        if kept.steps == 0:
            ahead = max(1, 2 * kept.granted)
            while not self._fits(noise_multiplier, sample_rate, ahead):
                ahead //= 2
                if ahead == 0:
                    epsilon, delta = self.budget
                    raise BudgetExhaustedError(
                        f"one more step would exceed the budget of ε = {epsilon:g} at δ = {delta:g}: "
                        f"{self.get_epsilon(delta):.6g} is spent. Nothing of this step was "
                        "released; stop here"
                    )
            kept = self._allowance
        self._allowance = replace(kept, steps=kept.steps - 1, recorded=self._recorded(1))

    def _warn_of_missing_runs(self) -> None:
        """Warns if another optimizer's steps on this model are missing from this one's ledger, once of each.

        Before the step is charged: where warnings are errors, the next one goes through.
        """
        missing = self._missing_runs()
        new, self._missing = not missing <= self._missing, self._missing | missing
        if new:
            warn_caller(
                "another optimizer has already taken private steps on this model, which this one's ε does not "
                "include: pass it accountant=other.accountant (both on one data set compose), or load its state_dict",
                PrivacyWarning,
            )

    def _note_ledger(self) -> None:
        """Notes on the model which runs the step makes it depend on."""
        if self._inherited:
            lineage.of(self.model).add_runs(self._inherited)
        lineage.of(self.model).add_runs({self._run: self._taken}, frozen=False)
        self._inherited = {}

    def weights_were_loaded(self) -> None:
        """The model has the weights of the state that was loaded."""
        lineage.of(self.model).add_runs(self._inherited)

    def _charged(self, passed: Sequence[passes.Pass]) -> tuple[float, float]:
        """What the step is charged at, given the passes of private rows that its gradients consist of.

        Returns:
            The sample rate, and what the noise multiplier counts for: a half where one sample more may move all others
            to other batches, so that one enters each and one leaves it.

        Raises:
            PrivacyError: a row may be in several of them, or rows are not those of their draw.
        """
        draw = self._witnessed_draw(passed)
        amplified = draw is not None and draw.amplifies and not draw.used
        self._seeded_draw = draw is not None and amplified and draw.seeded
        if draw is not None and not draw.used:
            over = draws.passed_over(draw)
            if over and self.sampling == "announced":
                raise PrivacyError(
                    f"{over} draw(s) before this one were made and not trained on: a draw that is left out for what is "
                    "in it (its size, its loss) lets its samples decide what is released. Take a step for each draw, "
                    "an empty one too; look at draws under torch.no_grad(); bound a loop by the sampler's steps or by "
                    "itertools.islice; or call skip_draw() for one that is left out for another reason"
                )
            draws.use(draw)
        if not amplified and self._world.size > 1 and self.sampling == "announced":
            raise PrivacyError(
                "no Poisson draw was announced for this step, so a sample may be in the batches of several ranks: "
                "use PoissonBatches or PoissonBatchSampler, or vouch with sampling='poisson' or 'none' that "
                "each rank draws from samples of its own (a DistributedSampler repeats some)"
            )
        whole = draw is not None or not passed or self._is_whole(passed)
        if self.sampling == "none" or (self.sample_rate == 1.0 and whole):
            return 1.0, 1.0
        if self.sampling == "poisson":
            return self.sample_rate, 1.0
        if draw is not None and draw.sample_rate > self.sample_rate * (1.0 + 1e-12):
            raise PrivacyError(
                f"batches were drawn with sample rate {draw.sample_rate:.6g}, but the optimizer was told "
                f"{self.sample_rate:.6g}: give both the same sample_rate"
            )
        if amplified:
            return self.sample_rate, 1.0
        warn_caller(
            "no Poisson draw was announced for this step, so it is charged without amplification (q = 1)"
            + ("" if whole else ", and for two samples, as one more shifts what is in which batch (σ/2)")
            + ": use PoissonBatches, or PoissonBatchSampler with poisson_collate, and each draw for one step; or pass "
            "sampling='poisson' if your own sampler is one, or sampling='none' if no sample has a say in which batches "
            "others are",
            PrivacyWarning,
        )
        return 1.0, 1.0 if whole else 0.5

    def _is_whole(self, passed: Sequence[passes.Pass]) -> bool:
        """Whether the passes are of one tensor of as many rows as the data set has, and of all of them."""
        spans = [some.rows for some in passed if some.rows is not None]
        sizes = {some.size for some in spans}
        return sizes == {self.dataset_size} and draws.covered(spans, self.dataset_size)

    def _witnessed_draw(self, passed: Sequence[passes.Pass]) -> draws.Draw | None:
        """The draw that the passes are of, all of it and nothing else; ``None`` if their rows are of no draw."""
        drawn = passes.drawn_by(passed)
        if len(drawn) > 1:
            raise PrivacyError(
                f"the gradients of {len(drawn)} Poisson draws are in this step: a sample may be in several of them, "
                "and its gradient would count as often. Take one step for each draw (Batch.split cuts a draw into "
                "micro-batches)"
            )
        spans = [some.rows for some in passed if some.rows is not None]
        if draws.overlapping(spans):
            raise PrivacyError(
                "rows entered this step twice, in two passes: their samples would count twice. Pass each row once, "
                "with one loss that adds all terms; accumulate(..., multiplicity=K) averages several views of a sample"
            )
        if not passed:
            waiting = draws.in_hand()
            if waiting is None or waiting.delivered < self._made:
                return None
            if waiting.rows:
                raise PrivacyError(
                    "a draw is in hand, and none of its rows entered this step: a batch that is left out for what is "
                    "in it, as where its loss is large, lets its samples decide what is released. Take the step with "
                    "what was drawn, or call skip_draw() and no step for a draw that is left out for another reason"
                )
            return waiting
        if self.sampling == "announced":
            self._refuse_other_rows(passed, drawn[0] if drawn else None, spans)
        return drawn[0] if drawn else None

    def _refuse_other_rows(
        self, passed: Sequence[passes.Pass], draw: draws.Draw | None, spans: Sequence[draws.Rows]
    ) -> None:
        vouch = "If your own code makes sure that each sample enters once, vouch with sampling='poisson' or 'none'"
        others = any(some.beside is not None and some.beside.delivered > self._made for some in passed)
        if others or (draw is not None and any(some.draw is not draw for some in spans)):
            raise PrivacyError(
                "rows entered this step that are not those of the draw in hand, as they were drawn: changed, mixed, "
                "reordered or repeated rows let a sample count for more than its bound. Change rows one by one with "
                "accumulate(batch, augment=...) or in the data set, leave rows out with the mask, and call skip_draw() "
                f"for a draw that is not trained on. {vouch}"
            )
        if draw is not None and not draws.covered(list(spans), draw.rows):
            raise PrivacyError(
                "rows of the draw were left out of this step, so that whether a sample enters depends on how many "
                "others were drawn: pass the whole draw (Batch.split cuts it into micro-batches), and leave rows out "
                f"with the mask. {vouch}"
            )
        if draw is None and len({some.base for some in spans}) > 1:
            raise PrivacyError(
                "batches of unknown origin entered this step together: a sample may be in several of them. Take one "
                f"step for each, or draw them with PoissonBatches. {vouch}"
            )

    @property
    def found_inf(self) -> None:
        """Never set: a ``GradScaler`` is refused."""
        raise AttributeError("found_inf")

    @found_inf.setter
    def found_inf(self, value: object) -> None:
        raise PrivacyError(
            "GradScaler skips steps depending on the data, which the ledger cannot see: train without it "
            "(bfloat16 and float32 need no loss scaling)"
        )


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A state of a ledger: the same object, as long as it was; it only grows."""

    accountant: Accountant
    ledger: Ledger
    events: int

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Recorded)
            and self.accountant is other.accountant
            and self.ledger is other.ledger
            and self.events == other.events
        )


@dataclass(frozen=True)
class _Allowance:
    """Steps that are known to fit the budget.

    Attributes:
        kind: noise multiplier and sample rate that they were asked for.
        steps: how many are left.
        recorded: the ledger for which this is true.
        granted: how many were asked for at once.
    """

    kind: tuple[float, float] | None = None
    steps: int = 0
    recorded: _Recorded | None = None
    granted: int = 0


def _checked_budget(budget: tuple[float, float] | None) -> tuple[float, float] | None:
    if budget is None:
        return None
    try:
        epsilon, delta = map(float, budget)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"budget must be a pair (epsilon, delta) or None, got {budget!r}") from error
    if not (math.isfinite(epsilon) and epsilon > 0 and 0.0 < delta < 1.0):
        raise ConfigurationError(f"budget needs a finite epsilon above 0 and a delta in (0, 1), got {budget!r}")
    return epsilon, delta


class CliplessDPSGD(CliplessDPOptimizer):
    """:class:`CliplessDPOptimizer` around ``torch.optim.SGD``.

    Args:
        model: the wrapped model; all its trainable parameters are optimised.
        lr: learning rate.
        momentum: as in ``torch.optim.SGD``.
        dampening: as in ``torch.optim.SGD``.
        weight_decay: as in ``torch.optim.SGD``.
        nesterov: as in ``torch.optim.SGD``.
        noise_multiplier: see :class:`CliplessDPOptimizer`, as are the rest.
        sample_rate: ``q``.
        dataset_size: public number of samples.
        accountant: its name or the object.
        allocation: how noise is shared.
        sampling: how batches are drawn.
        noise: source of the noise.
        budget: ``(ε, δ)``.
    """

    def __init__(
        self,
        model: DPLipModel,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        noise_multiplier: float,
        sample_rate: float,
        dataset_size: int,
        accountant: str | Accountant = "prv",
        allocation: Allocation = "global",
        sampling: Sampling = "announced",
        noise: NoiseSource | str | None = None,
        budget: tuple[float, float] | None = None,
    ) -> None:
        distributed.refuse_averages(model)
        sharding.part_(model)
        parameters: list[nn.Parameter] = list(model.net.parameters())
        if not parameters:
            raise ConfigurationError("the network has no parameters to train")
        base = torch.optim.SGD(
            parameters,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
        super().__init__(
            model,
            base,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            dataset_size=dataset_size,
            accountant=accountant,
            allocation=allocation,
            sampling=sampling,
            noise=noise,
            budget=budget,
        )
