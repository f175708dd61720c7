"""Optimizers that add calibrated noise, record what was released, and project back onto the constraints."""
# Over 500 lines: one public class of fewer, a third of it documentation; what a step consists of is elsewhere.

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, overload
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from accounting import Accountant, create_accountant
from clipless_dp.arguments import multiplier, require_accountant, share, shown, whole
from clipless_dp.bounds.sensitivity import Sensitivity
from clipless_dp.bounds.stamp import stamp
from clipless_dp.distributed import placement
from clipless_dp.errors import CliplessError, ConfigurationError, PrivacyError
from clipless_dp.gates import AdaptiveLimit
from clipless_dp.interrupts import completed
from clipless_dp.model import DPLipModel, lineage, passes
from clipless_dp.model.surroundings import refuse_modes
from clipless_dp.model.wrapped import require_wrapped
from clipless_dp.noise import Allocation, NoiseSource, checked_allocation, is_own, noise_source, source_name
from clipless_dp.optim import accumulation, base_state, checks, holdings, loadable
from clipless_dp.optim.adam import tell_noise
from clipless_dp.optim.adaptation import Adaptation, CapRecord
from clipless_dp.optim.around import Around, Setting, is_plain
from clipless_dp.optim.books import Books, Rates, SavedBooks
from clipless_dp.optim.budget import Budget
from clipless_dp.optim.charging import Sampling, Terms, charge, is_own_accountant, leave_out, refuse_to_step_after
from clipless_dp.optim.parameters import Protected, Taken, to_release
from clipless_dp.optim.plan import NoisePlan
from clipless_dp.packing import Structure
from clipless_dp.sampling import draws
from clipless_dp.sampling.augmentation import Augmentation
from clipless_dp.sampling.people import Unit, refuse_other_units
from clipless_dp.uncompiled import uncompiled


class CliplessDPOptimizer(Around):
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
            From then on its own ``step()`` raises :class:`PrivacyError` outside of :meth:`step`.
        noise_multiplier: ``σ > 0``, in units of the joint sensitivity.
        sample_rate: ``q`` in (0, 1]: each sample's probability of being in a batch.
        dataset_size: public number of samples; fixes the divisor.
        accountant: ``"prv"``, ``"rdp"``, ``"auto"``, or an accountant, with earlier releases from the data or none.
        allocation: how the noise is shared among parameters: ``"global"``, ``"per-layer"`` or ``"min-variance"``.
        sampling: ``"announced"``: a step is charged as Poisson-sampled only if a sampler of this package announced
            its draw, else at ``q = 1``, with a warning. ``"poisson"``: you vouch for a Poisson sampler of your
            own. ``"none"``: every step is charged at ``q = 1``. With ``unit="person"`` rows are those of a draw of
            people under each of them: how they weigh is a matter of the sensitivity, for which nobody can vouch.
        noise: ``"system"``, the default: a private generator that the operating system seeds; ``"secure"``: a
            cryptographic one, and sums without gaps (:class:`clipless_dp.SecureNoise`); or a source of your own.
        budget: ``(ε, δ)`` that the ledger is never to exceed: the step that would is refused with
            :class:`BudgetExhaustedError` before anything of it is released. ``None``: no limit.
        unit: what the guarantee is about: ``"row"``, or ``"person"``: all rows of a person together. Then steps are
            taken on draws of people (``groups=`` of a sampler) that come in by :meth:`accumulate`, and
            ``sample_rate`` and ``dataset_size`` are about people (docs/groups.md).

    Attributes:
        placement: where the model was when the optimizer was made, in how many processes and which part in each.
        step_noise: the deviation of the last step's noise on each entry of the mean gradients, by ``id`` of parameter.

    Raises:
        ConfigurationError: an argument is out of range.
        PrivacyError: the base optimizer holds parameters that the model does not protect, or a state of steps that
            were not private.
        RankError: the ranks' arguments differ.

    Guarantee:
        Under add-or-remove-one adjacency each step is a Gaussian mechanism of noise multiplier
        ``(Σ (Δ_θ/σ_θ)²)^(-½)``, evaluated from this step's bounds and deviations, on a subsample of rate ``q``. The
        counts of caps that adapt are among the θ: ``noise_multiplier`` is what both cost together. One is a row; with
        ``unit="person"`` a person with all of their rows.
    """

    noise_multiplier = Setting(
        partial(multiplier, "noise_multiplier"),
        "``σ``; assign to it to follow a noise schedule: every step is accounted with its own value.",
    )
    allocation = Setting(
        checked_allocation, "How noise is shared among parameters; may be assigned to, for the steps to come."
    )
    sampling = Setting(checks.checked_sampling, "How batches are drawn; may be assigned to, for the steps to come.")
    noise = Setting[NoiseSource | str | None, NoiseSource](
        noise_source, "Source of the noise; may be assigned to, as the constructor's argument, for the steps to come."
    )

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
        unit: Unit = "row",
    ) -> None:
        require_wrapped(model)
        placement.refuse_averages(model)
        checks.refuse_closures(base_optimizer)
        checks.refuse_settings(base_optimizer)
        base_state.refuse_other_state(base_optimizer)
        model.placement.reshard_()
        self.placement = model.place()
        self.model = model
        self.noise_multiplier = noise_multiplier
        self.sample_rate = share("sample_rate", sample_rate, "(0, 1]")
        self.dataset_size = whole("dataset_size", dataset_size)
        self._unit = checks.checked_unit(unit)
        self.expected_batch_size = self.sample_rate * self.dataset_size
        self.allocation = allocation
        self.sampling = sampling
        self.noise = noise
        self.accountant: Accountant = (
            create_accountant(accountant, dataset_size=self.dataset_size)
            if isinstance(accountant, str)
            else require_accountant(accountant, or_name=True)
        )
        refuse_other_units(self.accountant.ledger, self.unit)
        self.budget = budget
        self.steps_taken = 0
        self.step_noise: Mapping[int, float] = {}
        # In memory alone: it is as private as the ids.
        self._grouping: bytes | None = None
        self._books = Books(model)
        self._plan = NoisePlan()
        self._adaptation = Adaptation(model)
        if self._adaptation.share() and not self.placement.is_whole:
            raise ConfigurationError(
                "caps adapt in models that each process holds whole: give fixed ones, or no shards"
            )
        self._protected = Protected(model)
        self._made = draws.now()
        super().__init__(base_optimizer)
        self._require_protected()
        model.register.drop()
        model.expect_rows(self.expected_batch_size)
        model.forget_factors()
        self.placement.join(self._shared_settings(), model.settle_)
        # One run: its steps are counted once, whichever rank writes the checkpoint.
        run = self._books.run
        run.name = self.placement.from_first(lambda: run.name)
        model.sensitivity()
        self._books.open(self._require_protected())
        self._guard()
        holdings.know(model)
        base_state.note(base_optimizer)
        self._takes: list[int] | None = None
        model.register.turns.steppers.add(self)

    @property
    def unit(self) -> Unit:
        """What the guarantee is about: ``"row"`` or ``"person"``. All steps are about one: make another optimizer."""
        return self._unit

    @property
    def budget(self) -> tuple[float, float] | None:
        """``(ε, δ)`` that the ledger is never to exceed; may be assigned to, for the steps to come."""
        return self._budget.limit

    @budget.setter
    def budget(self, value: tuple[float, float] | None) -> None:
        self._budget = Budget(value)

    @uncompiled
    def accumulate(
        self,
        batch: tuple[Tensor | Structure, Tensor, Tensor] | tuple[Tensor | Structure, Tensor],
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
            batch: inputs, or several by name or in order, targets and mask of one draw, such as
                :class:`clipless_dp.sampling.Batch`; without a mask all rows count, as those of a ``DataLoader``.
            augment: makes a view: a function of one sample, or a :class:`clipless_dp.RowAugmentation`. Each view must
                depend on its sample and fresh randomness only; that of a
                :class:`clipless_dp.sampling.LabelledAugmentation` on its target and the weights, too.
            multiplicity: ``K``, views of each sample.
            micro_batch_size: rows processed at once; bounds the memory.
            loss: another way to compute ``model.loss(model(inputs), targets, mask)``, such as a compiled one.

        Returns:
            The summed loss, a mean over views; it is not private.

        Raises:
            ConfigurationError: an argument is out of range, or a view has another shape than its sample.
            PrivacyError: rows of this batch are in the gradients already, until ``step()`` or :meth:`skip_draw`; or
                people are the unit, and the rows are not those of a draw of people, as they were drawn.
            RankError: the model is sharded, and another rank is gone.

        Guarantee:
            Each sample's view has gradients within the model's bounds, hence so has the mean of its views: the
            sensitivity is the same for every ``K``. After an error the gradients are as before.
        """
        return accumulation.accumulate(
            self.model,
            self.placement,
            batch,
            augment=augment,
            multiplicity=multiplicity,
            micro_batch_size=micro_batch_size,
            loss=loss,
            unit=self.unit,
        )

    @uncompiled
    def accumulate_public(
        self,
        batch: tuple[Tensor | Structure, Tensor],
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
        return accumulation.accumulate_public(self.model, batch, loss)

    @uncompiled
    def skip_draw(self) -> None:
        """Says that the draws in hand are not trained on, so that other rows may be: on public data, say.

        Drops the gradients. Whether a draw is skipped must not depend on what is in it, and nothing of its gradients
        may be used: no amplification covers that. The statement says how many were, batches of no draw included whose
        gradients were computed.
        """
        self._leave_out(said=True)
        self.model.register.forget()

    def _leave_out(self, *, said: bool) -> None:
        """What came in is dropped, and no step takes it any more."""
        register = self.model.register
        # First of all: what is interrupted behind it leaves no gradient that is not private.
        register.drop()
        self._books.note_skipped(leave_out(register.owed(), self._terms(), said=said))

    def _terms(self) -> Terms:
        several = self.placement.world.size > 1
        names = self.model.register.names()
        return Terms(self.sampling, self.sample_rate, self._made, several, self, names, self.unit, self._grouping)

    @property
    def skipped_draws(self) -> int:
        """How many draws were skipped by hand, or lost with refused steps, in all runs of the ledger."""
        return sum(self._books.skipped.values())

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @uncompiled
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One private update; of what ``torch.compile`` is called around, a compiler takes no part of it.

        Hooks of ``torch.optim`` come between its parts: pre-hooks of this optimizer before anything is charged,
        ``begin_step`` of the noise source behind the charge, pre-hooks of the base optimizer where gradients are
        private, its post-hooks before the projection, post-hooks of this one last. What one raises ends the step there.

        Args:
            closure: evaluated once, to compute the gradients; its value is returned and is not private.

        Raises:
            ConfigurationError: another optimizer of the model has taken the gradients, or a learning rate or another
                setting is no finite number, or the accountant's ledger is about another unit by now.
            PrivacyError: a gradient would be released without protection.
            RankError: the ranks differ, or one is gone; no rank goes on, and none has applied an update without noise.
        """
        if torch.is_inference_mode_enabled():
            # What is made in it, as a base makes what it keeps, could not be written to in the next step.
            with torch.inference_mode(False):
                return self._step(closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        refuse_modes()
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            refuse_modes()
        with torch.no_grad(), self.model.register.turns.stepping():
            try:
                self._release()
            except BaseException:
                # What is refused, or was interrupted, must not be released together with what comes next.
                completed(lambda: self._leave_out(said=False))
                raise
            try:
                with self._base_may_step(self.model, self.model.register.parameters, self._protected.including):
                    tell_noise(self.base_optimizer, self.step_noise)
                    # Another thread may have come in; nobody else's code has run.
                    self.model.register.noted.require(self.model.register.parameters, values=False)
                    self.base_optimizer.step()
                self.model.project_()
            finally:
                # Whatever part of the update was applied, the ledger counts it.
                completed(self._settle)
        return loss

    def _settle(self) -> None:
        """Weights, and what the base optimizer keeps, are what this step leaves."""
        lineage.of(self.model).settle(self._protected.named)
        base_state.note(self.base_optimizer)
        self._takes = None

    def get_epsilon(self, delta: float) -> float:
        """ε spent so far at this δ, an upper bound, under add-or-remove-one adjacency."""
        return self.accountant.upper_epsilon(delta)

    @property
    def noise_sources(self) -> tuple[str, ...]:
        """The sources that the noise of all entries of the ledger came from, as far as they are known."""
        return self._books.noise_sources(self.accountant.ledger)

    @property
    def randomness_sources(self) -> tuple[str, ...]:
        """Where masks of dropout and random views of all steps came from, those of loaded states included.

        ``"system"``, which a release needs; ``"reproducible"`` (a ``reproducible_seed``, or
        :meth:`clipless_dp.noise.randomness.Randomness.seeded`); ``"unrecorded"`` where a loaded state does not say.
        None where nothing was drawn.
        """
        return self._books.randomness_sources()

    @property
    def learning_rates(self) -> list[tuple[Rates, int]]:
        """The learning rates of all steps, those of loaded states included: rates, and for how many steps in a row."""
        return list(self._books.learning_rates)

    def noise_deviations(self) -> dict[str, float]:
        """``σ_θ`` of the noise on each parameter's summed gradient, at the current bounds, by name in ``model.net``."""
        named = self._settled()
        deviations, _, _ = self._deviations(self.model.sensitivity(), named)
        return {name: deviations[id(parameter)] for name, parameter in named.items() if id(parameter) in deviations}

    def count_deviation(self) -> float:
        """``σ_b`` of the noise on each count of a cap that adapts, in samples; zero where none does."""
        return self._deviations(self.model.sensitivity(), self._settled())[1]

    @property
    def caps(self) -> dict[str, float]:
        """The caps that adapt, as they are now, by the names of their gates."""
        return self._adaptation.caps()

    @property
    def cap_settings(self) -> dict[str, AdaptiveLimit]:
        """How caps adapt, by the paths of the modules that have such."""
        return self._adaptation.settings()

    @property
    def cap_history(self) -> list[CapRecord]:
        """What all steps have released of caps that adapt, those of loaded states included; it is private."""
        return list(self._adaptation.history)

    def ledger_is_incomplete(self) -> bool:
        """Whether private steps were taken on the model, by whichever optimizer, that this ledger lacks."""
        return bool(self._books.missing_runs(self.accountant.ledger))

    def weights_are_counted(self) -> bool:
        """Whether the model's weights are those that the last step left, bit by bit, or an average of such."""
        return self.model.register.turns.settled(lambda: lineage.of(self.model).unchanged(self._require_protected()))

    @property
    def uncounted_changes(self) -> int:
        """Before how many steps the weights were not those that the step before had left."""
        return self._books.uncounted_changes()

    def changed_settings(self) -> list[str]:
        """Which settings of the model differ between earlier steps and now: caps, loss, layers, in words."""
        return self._books.changed_settings()

    def changed_bounds(self) -> list[str]:
        """Where the bounds shown now are below those of earlier steps, or of other parameters, in words.

        By the numbers alone, so that no setting need be described: of a loaded state at the same weights, and from
        step to step where weights do not explain it.
        """
        return self._books.changed_bounds()

    def _switch(self, name: str, mode: Callable[..., Any], *args: Any) -> Any:
        """Lets the base optimizer change weights between those to train and those to predict with (schedule-free).

        Raises:
            PrivacyError: gradients of passes are there, which it might read; or it computes some.
        """
        with self.model.register.turns.stepping():
            self.model.register.reconcile()
            if self.model.register.passes:
                raise PrivacyError(
                    f"{name}() between backward() and step() would change the weights that the gradients are of: call "
                    "it before the pass, or after the step"
                )
            base_state.refuse_other_state(self.base_optimizer)
            known = lineage.of(self.model)
            named = self._require_protected()
            counted = known.unchanged(named)
            with self._base_is_called(self.model, self.model.register.parameters):
                found = mode(*args)
            if counted:
                known.follow(named)
            base_state.note(self.base_optimizer)
        return found

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Of bases that have them alone; loops and trainers ask whether an optimizer does.
            mode = getattr(self.__dict__.get("_base_optimizer"), name, None) if name in ("train", "eval") else None
            if mode is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return partial(self._switch, name, mode)

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. Those that no step took are missed by the next one, which is refused."""
        with self.model.register.turns.holding():
            if set_to_none and is_plain(self.base_optimizer) and "zero_grad" not in vars(type(self.base_optimizer)):
                # As torch does, without what it costs to keep compilers out.
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            else:
                self.base_optimizer.zero_grad(set_to_none=set_to_none)
            self._adaptation.drop()
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
        with self.model.register.turns.stepping():
            for parameter in params:
                parameter.grad = None
            with self._base_is_called(self.model, self.model.register.parameters):
                self.base_optimizer.add_param_group({**param_group, "params": params})

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, with the ledger under ``"clipless_dp"``; plain values and tensors only.

        A state that something else than private steps has written to is left out, with a warning: no ledger holds it.

        Raises:
            PrivacyError: the base optimizer is in the middle of a step.
        """
        self._refuse_within_step("state_dict()")
        with self.model.register.turns.resting():
            with self._base_is_called(self.model, self.model.register.parameters, reads=True):
                held = self.base_optimizer.state_dict()
            base = base_state.private_state(self.base_optimizer, held)
            return {
                **base,
                "clipless_dp": {
                    # Of parts, which files hold as wholes and others load as parts, none is told.
                    "state": loadable.digest(base.get("state")) if self.placement.is_whole else None,
                    **self._books.state(self.accountant, self.steps_taken, bits=self.placement.is_whole),
                    **({"caps": self._adaptation.state()} if self.caps else {}),
                },
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state and the ledger.

        What this optimizer has already spent is never forgotten: of a run that both ledgers know, the longer record is
        kept; all else is composed, even if it looks alike. A ledger that an earlier version wrote knows no runs: it is
        one by itself, known only to be the same when the very same state is loaded twice.

        Raises:
            ConfigurationError: the state is not one of this class, or of an unknown format, or not as it was saved, or
                of another base optimizer, or of other parameters, or the base optimizer does not load it.
        """
        if not isinstance(state_dict, Mapping):
            raise ConfigurationError(f"a state is what state_dict() returned, got {shown(state_dict)}")
        saved = SavedBooks.read(state_dict.get("clipless_dp"), self.accountant)
        caps = self._adaptation.checked(state_dict["clipless_dp"].get("caps"))
        refuse_other_units(saved.ledger, self.unit)
        base = {key: value for key, value in state_dict.items() if key != "clipless_dp"}
        loadable.require_loadable(self.base_optimizer, base)
        # Former versions do not tell.
        told = state_dict["clipless_dp"].get("state") if self.placement.is_whole else None
        if told is not None and told != loadable.digest(base.get("state")):
            raise ConfigurationError(
                "what this state holds of the base optimizer is not what was saved beside its ledger: load it as "
                "state_dict() returned it"
            )
        self.accountant.ledger = saved.ledger.merge(self.accountant.ledger)
        self.steps_taken = saved.steps_taken
        self._books.take(saved)
        self._adaptation.take(caps)
        # A copy: torch takes tensors as they are, and what another optimizer goes on to add to its own would be here,
        # too, which this ledger does not know.
        kind = type(self.base_optimizer).__name__
        register = self.model.register
        if register.passes:
            # Whether to go back may have been decided by gradients that wait for their step: statements tell.
            lineage.of(self.model).changed += 1
        with register.turns.stepping(), base_state.loading(self.base_optimizer, base):
            try:
                with self._base_is_called(self.model, register.parameters):
                    self.base_optimizer.load_state_dict(copy.deepcopy(base))
            except Exception as error:
                if isinstance(error, CliplessError):
                    raise
                raise ConfigurationError(
                    f"{kind} does not load its state ({type(error).__name__}: {error}): it is another optimizer's, or "
                    "torch does not copy or cast some kinds of values in it (arrays of numpy, compressed, quantised "
                    "and nested tensors). Keep dense tensors in the state, or give the optimizer a load_state_dict of "
                    "its own. The ledger was loaded, the state was not"
                ) from error

    def _require_protected(self, parameters: Iterable[Tensor] | None = None) -> dict[str, nn.Parameter]:
        """The network's parameters by name, once those of the optimizer (or the given ones) are known to be of them."""
        self.model.placement.reshard_()
        if parameters is None:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return self._protected.including(parameters)

    def _settled(self) -> dict[str, nn.Parameter]:
        """The same of all of them, where no pass of another thread has them in hand."""
        return self.model.register.turns.settled(self._require_protected)

    def before_pass(self) -> None:
        """Private gradients are about to be computed: what they might decide is noted as it is."""
        self._takes = [id(one) for group in self.base_optimizer.param_groups for one in group["params"]]
        base_state.settle_resets(self.base_optimizer)

    def _refuse_choices(self) -> None:
        """Refuses a step whose parameters, or what is kept of them, changed since its first pass began."""
        if self._takes is not None:
            base_state.refuse_resets(self.base_optimizer)
            if self._takes != [id(one) for group in self.base_optimizer.param_groups for one in group["params"]]:
                raise PrivacyError(
                    "parameters were taken out of the optimizer's groups, or put into others, between a pass and its "
                    "step: a choice by private gradients releases them without noise. Choose before the pass, by "
                    "public numbers, and behind a refused step call skip_draw() first. Nothing was released"
                )

    def _release(self) -> None:
        """Records the event, then turns the summed gradients into private averages."""
        named = self._require_protected()
        checks.refuse_settings(self.base_optimizer)
        base_state.refuse_other_state(self.base_optimizer)
        self.placement.require_ready()
        refuse_other_units(self.accountant.ledger, self.unit)
        register = self.model.register
        passed = register.witnessed()
        if passed:
            self._refuse_choices()
        terms = self._terms()
        if not passed:
            taker = None if register.taker is None else register.taker()
            refuse_to_step_after(None if taker is self else taker, terms)
        sensitivity = passes.joined(passed, self.model.sensitivity)
        if sensitivity.counted:
            self._adaptation.refuse_others(sensitivity.counted)
        deviations, of_counts, spent = self._deviations(sensitivity, named)
        charged = charge([some for some in passed if not some.public], terms)
        if charged.sample_rate < 1.0:
            draws.refuse_again(charged.draw, self)
        spent *= charged.share
        ledger = self.accountant.ledger
        self._budget.require(self.accountant, spent, charged.sample_rate)
        self._books.warn_of_missing_runs(ledger)
        self._books.note_randomness()
        provenance = self._books.provenance(ledger, self.noise, charged.witness, self.unit)
        self.accountant.step(noise_multiplier=spent, sample_rate=charged.sample_rate, provenance=provenance)
        if charged.draw is not None:
            draws.use(charged.draw, self)
            if charged.draw.people is not None:
                self._grouping = charged.draw.people.grouping
        self._books.note_step(named, self.param_groups, sensitivity)
        self.noise.begin_step(self.steps_taken)
        self.steps_taken += 1
        register.forget()
        draws.forget_left_out(terms.names)
        if passed:
            register.taker = ref(self)
        if passed:
            own = is_own(self.noise) and is_own_accountant(self.accountant)
            register.noted.require(register.parameters, values=not own)
        gradients, scales = to_release(named, deviations, passed=bool(passed))
        # Further coordinates of the same release.
        counts = self._adaptation.sums(passed=bool(passed)) if of_counts else []
        gradients, scales = [*gradients, *counts], [*scales, *[of_counts] * len(counts)]
        taken = Taken(register.parameters)
        self.placement.release_(
            gradients,
            scales,
            self.noise,
            1.0 / self.expected_batch_size,
            step=self.steps_taken,
            ledger=lambda: self.accountant.ledger.entries,
            weights=lambda: [stamp(parameter)[2:] for parameter in self.model.net.parameters()],
        )
        taken.put_back()
        if of_counts:
            self._adaptation.adapt_(sensitivity.counted)
        else:
            self._adaptation.drop()
        self.model.project_gradients_()
        self.step_noise = {key: deviation / self.expected_batch_size for key, deviation in deviations.items()}
        register.noted.note_all(register.parameters)

    def _shared_settings(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        names = ("noise_multiplier", "sample_rate", "dataset_size", "unit", "allocation", "sampling", "budget", "caps")
        named = self.model.net.named_parameters()
        return {
            "parameters": [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in named],
            **{name: getattr(self, name) for name in names},
            "noise": source_name(type(self.noise)),
            "input_norm": self.model.input_norm,
            "loss": self.model.cotangent_norm,
            "ledger": self.accountant.ledger.entries,
        }

    def _deviations(
        self, sensitivity: Sensitivity, named: Mapping[str, nn.Parameter]
    ) -> tuple[dict[int, float], float, float]:
        return self._plan.of(
            sensitivity, named, self.param_groups, self.noise_multiplier, self.allocation, self._adaptation.share()
        )

    def declare_seeded_masks(self, seeded: bool) -> None:
        """Whether dropout masks and random views of the steps to come are drawn from a seed, which statements tell."""
        self._books.seeded_masks = seeded

    def allows(self, steps: int, *, sample_rate: float | None = None) -> bool:
        """Whether so many further steps at the current noise multiplier fit the budget, on top of the whole ledger.

        Args:
            steps: how many.
            sample_rate: what each is charged at; by default the optimizer's own.
        """
        rate = self.sample_rate if sample_rate is None else sample_rate
        return self._budget.allows(self.accountant, self.noise_multiplier, rate, steps)

    def weights_were_loaded(self) -> None:
        """The model has the weights of the state that was loaded."""
        self._books.join_weights()
