"""Optimizers that add calibrated noise, record what was released, and project back onto the constraints."""

from __future__ import annotations

import copy
import math
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from accounting import Accountant, GaussianRelease, GaussianStep, create_accountant
from clipless_dp import distributed, draws, sharding
from clipless_dp.augmentation import Augmentation, views
from clipless_dp.errors import BudgetExhaustedError, ConfigurationError, PrivacyError, RankError
from clipless_dp.model import DPLipModel
from clipless_dp.noise import (
    Allocation,
    NoiseSource,
    add_normal_,
    allocate,
    effective_noise_multiplier,
    noise_source,
    source_name,
)
from clipless_dp.tracing import parameters_of
from clipless_dp.tracker import Sensitivity, stamp

Sampling = Literal["announced", "poisson", "none"]

Rates = tuple[float | None, ...]
"""Learning rate of each parameter group; ``None`` where the base optimizer has none."""

STATE_FORMAT = 1
_MARGIN = 1.0 + 1e-6
"""Noise is drawn this much larger than planned, so that float32 rounding of its scale never falls below the plan."""


class PrivacyWarning(UserWarning):
    """Something costs more privacy than the user may expect."""


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
        if sampling not in ("announced", "poisson", "none"):
            raise ConfigurationError(f"sampling must be 'announced', 'poisson' or 'none', got {sampling!r}")
        allocate([1.0], [1], 1.0, allocation)
        self.model = model
        self.base_optimizer = base_optimizer
        self.noise_multiplier = noise_multiplier
        self.sample_rate = float(sample_rate)
        self.dataset_size = dataset_size
        self.expected_batch_size = self.sample_rate * dataset_size
        self.allocation: Allocation = allocation
        self.sampling: Sampling = sampling
        self.noise: NoiseSource = noise_source(noise)
        self.accountant: Accountant = (
            create_accountant(accountant, dataset_size=dataset_size) if isinstance(accountant, str) else accountant
        )
        self.budget = _checked_budget(budget)
        self._allowance = _Allowance()
        self.steps_taken = 0
        self._noise_sources: set[str] = set()
        self._randomness_sources: set[str] = set()
        self._drawn_before = model.randomness.draws.copy()
        self._learning_rates: list[tuple[Rates, int]] = []
        self._draws_before = draws.snapshot()
        self._held_before = draws.held()
        self._run = uuid.uuid4().hex
        self._counted: dict[str, int] = {self._run: 0}
        self._plan: tuple[Sensitivity, tuple[int, ...], float, dict[int, float], float] | None = None
        self._last: tuple[int, Sensitivity] | None = None
        self._entered: list[Tensor] = []
        self._named: dict[str, nn.Parameter] = {}
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._share_state()
        self._require_protected()
        for parameter in self._parameters():
            parameter.grad = None
        self._world = distributed.world()
        self._sharded = sharding.has_shards(model)
        if self._sharded:
            sharding.check_shards(model, model.net.parameters())
        self._stopped = False
        self._lines_compared = 0
        if self._world.size > 1:
            self._join_ranks()
        self._sensitivity()

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
        inputs, targets, mask = batch
        if any(_overlap(inputs, entered) for entered in self._entered):
            raise PrivacyError(
                "rows of this batch have entered the gradients of this step already, and would count twice: "
                "accumulate each draw once, with multiplicity=K for several views of its samples, then step()"
            )
        if loss is None:
            loss = self._loss
        rows = max(1, len(inputs)) if micro_batch_size is None else micro_batch_size
        sharding.part_(self.model)
        parameters = list(self.model.net.parameters())
        before = [parameter.grad for parameter in parameters]
        total = torch.zeros((), device=inputs.device)
        for parameter in parameters:
            parameter.grad = None
        try:
            pieces = list(zip(inputs.split(rows), targets.split(rows), mask.split(rows), strict=True))
            if self._sharded:
                # Ranks pass together, each gathering what the others hold: empty ones where there are no more rows.
                missing = distributed.largest(len(pieces)) - len(pieces)
                pieces += [(inputs[:0], targets[:0], mask[:0])] * missing
            with sharding.passing() if self._sharded else nullcontext():
                for _ in range(multiplicity):
                    for piece in pieces:
                        seen = piece[0] if augment is None or not len(piece[0]) else self._views(augment, piece)
                        value = loss(seen, piece[1], piece[2])
                        value.backward()
                        total += value.detach()
        except BaseException:
            # Views in part, not yet averaged, must not be stepped on.
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            raise
        with torch.no_grad():
            for parameter, gradient in zip(parameters, before, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                    continue
                if multiplicity > 1:
                    parameter.grad /= multiplicity
                if gradient is not None:
                    parameter.grad += gradient
        self._entered.append(inputs)
        return total / multiplicity

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
            PrivacyError: a gradient would be released without protection.
            RankError: the ranks differ, or one is gone; no rank goes on, and none has applied an update without noise.
        """
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._release()
            self.base_optimizer.step()
            self.model.project_()
        return loss

    def get_epsilon(self, delta: float) -> float:
        """ε spent so far at this δ, an upper bound, under add-or-remove-one adjacency."""
        return float(self.accountant.get_epsilon(delta))

    @property
    def noise_sources(self) -> tuple[str, ...]:
        """The sources that the noise of all steps came from, those of loaded states included."""
        return tuple(sorted(self._noise_sources))

    @property
    def randomness_sources(self) -> tuple[str, ...]:
        """Where masks of dropout and random views of all steps came from, those of loaded states included.

        ``"system"``, which a release needs; ``"reproducible"`` (a ``reproducible_seed``, or
        :meth:`clipless_dp.randomness.Randomness.seeded`); ``"unrecorded"`` where a loaded state does not say. None
        where nothing was drawn.
        """
        return tuple(sorted(self._randomness_sources))

    @property
    def learning_rates(self) -> list[tuple[Rates, int]]:
        """The learning rates of all steps, those of loaded states included: rates, and for how many steps in a row."""
        return list(self._learning_rates)

    def noise_deviations(self) -> dict[str, float]:
        """``σ_θ`` of the noise on each parameter's summed gradient, at the current bounds, by name in ``model.net``."""
        named = self._require_protected()
        deviations, _ = self._deviations(self._sensitivity(), named)
        return {name: deviations[id(parameter)] for name, parameter in named.items() if id(parameter) in deviations}

    def ledger_is_incomplete(self) -> bool:
        """Whether the model's latest private step was another optimizer's, and this ledger lacks steps of that one."""
        accountant, counted = _latest_ledger.get(self.model, (self.accountant, self._counted))
        return accountant is not self.accountant and not _contains(self._counted, counted)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and forgets the draws that they may have come from, but for the latest."""
        self._held_before = max(self._held_before, draws.held() - 1)
        self._entered.clear()
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

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
        return {
            **self.base_optimizer.state_dict(),
            "clipless_dp": {
                "format": STATE_FORMAT,
                "steps_taken": self.steps_taken,
                "accountant": self.accountant.state_dict(),
                "counted": dict(self._counted),
                "noise": list(self.noise_sources),
                "randomness": list(self.randomness_sources),
                "learning_rates": [[list(rates), count] for rates, count in self._learning_rates],
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state and the ledger.

        What this optimizer has already spent is never forgotten: where one of the two ledgers continues the other,
        the longer one is kept; otherwise both are composed, even if they look alike.

        Raises:
            ConfigurationError: the state is not one of this class, or of an unknown format.
        """
        own = state_dict.get("clipless_dp")
        if not isinstance(own, dict) or own.get("format") != STATE_FORMAT:
            raise ConfigurationError(
                "this is not the state of a clipless_dp optimizer of format "
                f"{STATE_FORMAT}: its privacy ledger is missing or newer than this version"
            )
        try:
            steps_taken, accountant = int(own["steps_taken"]), own["accountant"]
            counted = {str(run): int(count) for run, count in own["counted"].items()}
            sources = {str(name) for name in own["noise"]}
            randomness = {str(name) for name in own.get("randomness", ["unrecorded"])}
            # States of before they were recorded have none.
            rates = [
                (tuple(None if rate is None else float(rate) for rate in some), int(count))
                for some, count in own.get("learning_rates", [])
            ]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigurationError(f"the privacy ledger of this state is incomplete: {error!r}") from error
        self._join_ledger(accountant, counted, steps_taken)
        self._lines_compared = 0
        self.steps_taken = steps_taken
        self._noise_sources |= sources
        self._randomness_sources |= randomness
        self._learning_rates = rates
        self.base_optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "clipless_dp"})
        self._share_state()

    def _join_ledger(self, state: dict[str, Any], counted: dict[str, int], steps_taken: int) -> None:
        spent = self.accountant.ledger
        self.accountant.load_state_dict(state)
        loaded = self.accountant.ledger
        if not 0 <= steps_taken <= len(loaded):
            self.accountant.ledger = spent
            raise ConfigurationError(
                f"this state says that {steps_taken} steps were taken, its ledger holds {len(loaded)}: it was altered"
            )
        # Steps are known by the run that took them, one-off releases by their identity if they have one: where no run
        # is shared, other ones of this ledger were drawn anew, however alike they look, and both count.
        related = not self._counted.keys().isdisjoint(counted)
        shared = [event for event, _ in loaded if isinstance(event, GaussianRelease) and event.identity]
        anew = not related and any(not isinstance(event, GaussianStep) and event not in shared for event, _ in spent)
        if _contains(self._counted, counted) and spent.starts_with(loaded) and not anew:
            self.accountant.ledger = spent
        elif anew or not (_contains(counted, self._counted) and loaded.starts_with(spent)):
            self.accountant.ledger = loaded.merge(spent)
        for run, count in counted.items():
            self._counted[run] = max(count, self._counted.get(run, 0))

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
        sensitivity = self._sensitivity()
        deviations, spent = self._deviations(sensitivity, named)
        rate = self._charged_rate()
        self._require_budget(spent, rate)
        self.accountant.step(noise_multiplier=spent, sample_rate=rate)
        self._counted[self._run] = self._counted.get(self._run, 0) + 1
        self._note_ledger()
        self._noise_sources.add(source_name(type(self.noise)))
        self._note_randomness()
        self._note_learning_rates()
        self.noise.begin_step(self.steps_taken)
        self.steps_taken += 1
        self._entered.clear()
        gradients: list[Tensor] = []
        scales: list[float] = []
        for parameter in named.values():
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

    def _note_randomness(self) -> None:
        source, before = self.model.randomness, self._drawn_before
        self._drawn_before = source.draws.copy()
        self._randomness_sources.update(source.draws - before)
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
        self._counted = {self._run: 0}

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

    def _sensitivity(self) -> Sensitivity:
        """The model's bounds; after a change of settings the larger of old and new: either may have applied."""
        current = self.model.sensitivity()
        before, self._last = self._last, (self.model.changes, current)
        if before is None or before[0] == self.model.changes:
            return current
        bounds = {
            name: max(bound, before[1].per_parameter.get(name, 0.0)) for name, bound in current.per_parameter.items()
        }
        return replace(current, per_parameter=bounds, total=math.hypot(*bounds.values()))

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
        used = [deviation * _MARGIN for deviation in planned]
        effective = effective_noise_multiplier(bounds, used)
        if not (math.isfinite(effective) and effective > 0):
            raise PrivacyError(f"the noise amounts to a multiplier of {effective!r}; nothing was released")
        # The margin exceeds float64 rounding, so this is the planned value: equal steps stay one line in the ledger.
        spent = self.noise_multiplier if effective >= self.noise_multiplier else effective
        deviations = dict(zip(held, used, strict=True))
        self._plan = sensitivity, held, self.noise_multiplier, deviations, spent
        return deviations, spent

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
            self._allowance = _Allowance((noise_multiplier, sample_rate), steps, len(self.accountant), steps)
        return fits

    def _require_budget(self, noise_multiplier: float, sample_rate: float) -> None:
        """Refuses a step beyond the budget.

        Asked for one step, then two, four, …, and by halves where that is too many: an accountant answers some
        2·log₂(steps) times in all, not once for each step.
        """
        if self.budget is None:
            return
        kept, recorded = self._allowance, len(self.accountant)
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
        self._allowance = replace(kept, steps=kept.steps - 1, recorded=recorded + 1)

    def _note_ledger(self) -> None:
        """Warns if another optimizer's steps on this model are missing from this one's ledger."""
        if self.ledger_is_incomplete():
            warnings.warn(
                "another optimizer has already taken private steps on this model, which this one's ε does not "
                "include: pass it accountant=other.accountant (both on one data set compose), or load its state_dict",
                PrivacyWarning,
                stacklevel=5,
            )
        _latest_ledger[self.model] = self.accountant, self._counted

    def _charged_rate(self) -> float:
        held = draws.held() - self._held_before
        if held > 1:
            raise PrivacyError(
                f"{held} Poisson draws were taken for this step: a sample may be in several of them, and its gradient "
                "would count as often. Take one step for each draw (Batch.split cuts a draw into micro-batches), and "
                "call zero_grad() after draws that are not used"
            )
        before, now = self._draws_before, draws.snapshot()
        drawn = now.announced - before.announced
        announced = drawn.total() > now.taken - before.taken
        if announced:
            draws.take()
        elif self._world.size > 1 and self.sampling == "announced":
            raise PrivacyError(
                "no Poisson draw was announced for this step, so a sample may be in the batches of several ranks: "
                "use PoissonBatches or PoissonBatchSampler, or vouch with sampling='poisson' or 'none' that "
                "each rank draws from samples of its own (a DistributedSampler repeats some)"
            )
        if self.sampling == "none" or self.sample_rate == 1.0:
            return 1.0
        if self.sampling == "poisson":
            return self.sample_rate
        larger = [rate for rate in drawn if rate > self.sample_rate * (1.0 + 1e-12)]
        if larger:
            raise PrivacyError(
                f"batches were drawn with sample rate {max(larger):.6g}, but the optimizer was told "
                f"{self.sample_rate:.6g}: give both the same sample_rate"
            )
        if announced:
            return self.sample_rate
        warnings.warn(
            "no Poisson draw was announced for this step, so it is charged without amplification (q = 1): use "
            "PoissonBatches or PoissonBatchSampler, or pass sampling='poisson' if your own sampler is one",
            PrivacyWarning,
            stacklevel=5,
        )
        return 1.0

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


_latest_ledger: WeakKeyDictionary[DPLipModel, tuple[Accountant, dict[str, int]]] = WeakKeyDictionary()
"""For each model, the accountant of the latest private step, and the steps that its ledger counts."""


@dataclass(frozen=True)
class _Allowance:
    """Steps that are known to fit the budget.

    Attributes:
        kind: noise multiplier and sample rate that they were asked for.
        steps: how many are left.
        recorded: steps that the ledger must hold for this to be true.
        granted: how many were asked for at once.
    """

    kind: tuple[float, float] | None = None
    steps: int = 0
    recorded: int = 0
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


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have entries in common, as parts of one batch may."""
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr() or not first.numel() * second.numel():
        return False
    (start, end), (other_start, other_end) = _extent(first), _extent(second)
    return start < other_end and other_start < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's entries begin and end in their storage, in bytes."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.element_size()
    return int(start), int(start + (last + 1) * tensor.element_size())


def _contains(counted: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether a ledger that counts so many steps of each optimizer has all those of another."""
    return all(counted.get(run, 0) >= count for run, count in other.items())


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
