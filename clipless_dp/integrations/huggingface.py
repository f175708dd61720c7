"""``transformers.Trainer`` on private steps: its arguments, callbacks and checkpoints; our draws, noise and ledger."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_utils import TrainOutput

from accounting import Accountant
from clipless_dp.arguments import multiplier, positive, share, whole
from clipless_dp.errors import CheckpointError, ConfigurationError, PrivacyError
from clipless_dp.gates import GradientGated
from clipless_dp.graph import gradient_gated
from clipless_dp.integrations.trainer_options import refuse_options
from clipless_dp.isolation import Isolated
from clipless_dp.losses import Loss
from clipless_dp.model import DPLipModel
from clipless_dp.noise import Allocation, NoiseSource
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.packing import LABELS
from clipless_dp.precision import full_precision
from clipless_dp.sampling import PoissonBatchSampler, memory, poisson_collate
from clipless_dp.sampling.augmentation import refuse_own_generators
from clipless_dp.sampling.collation import RowByRow
from clipless_dp.training import Plan

_LEDGER = "optimizer.pt"
"""What ``Trainer`` calls the state of the optimizer, in which the ledger is."""

_OF_THE_DATA = ("loss", "train_loss", "grad_norm")
"""What ``Trainer`` logs of a step that no noise protects."""


class PrivateTrainer(Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` whose every step is a private one on a Poisson draw.

    Batches are Poisson draws of expected size ``per_device_train_batch_size`` from ``train_dataset``, whose gradients
    pass the gates; the optimizer that ``args`` describes updates by their noisy mean. Arguments keep their meaning:
    ``num_train_epochs`` passes in expectation, or ``max_steps``; schedules; weight decay; callbacks; evaluation;
    ``save_strategy`` and ``resume_from_checkpoint``, with the ledger in the checkpoint's ``optimizer.pt``.
    ``max_grad_norm`` clips the noisy mean, which costs no privacy (``Trainer`` would clip before the noise). ``seed``
    and ``data_seed`` reach neither draws nor noise.

    Args:
        model: a network, which :func:`clipless_dp.gradient_gated` puts behind gates; or a wrapped one. What trains is
            chosen before, by :mod:`clipless_dp.recipes` or ``peft``.
        args: as of ``Trainer``; what would break the guarantee is refused.
        epsilon: target ε > 0.
        delta: target δ in (0, 1).
        loss: what the model's output is held against the batch's ``labels`` by; where ``model`` is wrapped, its own.
        gates: arguments of :func:`clipless_dp.gradient_gated`: ``{"limit": 0.1, "mode": "clip"}``.
        micro_batch_size: rows of a draw that are processed at once; it takes the place of gradient accumulation.
        accountant, allocation, noise: as of :class:`clipless_dp.CliplessDPOptimizer`.
        noise_multiplier: in place of the smallest that meets the target.
        dataset_size: public size that fixes ``q`` and the divisor; by default the number of samples, which is then
            taken to be public.
        show_loss: whether logs, and the state that is saved with checkpoints, hold training losses, which nothing
            protects: for the data's owner only.
        more: further arguments of ``Trainer``: ``train_dataset``, ``data_collator``, ``processing_class``, ….

    Attributes:
        private_model: the wrapped network; ``model`` is the network itself, which is evaluated and saved.
        noise_multiplier: ``σ``.

    Raises:
        ConfigurationError: an option would break the guarantee, or an argument is out of range.
        InputError: a batch has another shape than the first sample, whose length all must be padded to.
        BudgetExhaustedError: ``train`` was called for more steps than ``epsilon`` pays for.
        CheckpointError: a checkpoint to resume from holds no ledger.

    Guarantee:
        The weights of all steps together, hence all checkpoints, are (``epsilon``, ``delta``)-differentially private
        under add-or-remove-one adjacency of samples of ``train_dataset``. Metrics on ``eval_dataset`` are not covered
        where that holds private data.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        epsilon: float,
        delta: float,
        loss: Loss | None = None,
        gates: Mapping[str, Any] | None = None,
        micro_batch_size: int | None = None,
        accountant: str | Accountant = "prv",
        allocation: Allocation = "min-variance",
        noise: NoiseSource | str | None = None,
        noise_multiplier: float | None = None,
        dataset_size: int | None = None,
        show_loss: bool = False,
        **more: Any,
    ) -> None:
        refuse_options(args, more)
        data = more.get("train_dataset")
        if data is None or not hasattr(data, "__len__"):
            raise ConfigurationError("train_dataset must be there, and have a length: draws are from all of it")
        self._epsilon, self._delta = positive("epsilon", epsilon), share("delta", delta, "(0, 1)")
        self._dataset_size = whole("dataset_size", len(data) if dataset_size is None else dataset_size)
        self._settings = {"accountant": accountant, "allocation": allocation, "noise": noise}
        self._micro_batch_size = None if micro_batch_size is None else whole("micro_batch_size", micro_batch_size)
        self._show_loss = bool(show_loss)
        args = copy.copy(args)
        # Of the sums before the noise, and of draws that were skipped: both are done here in other ways.
        self._max_grad_norm, args.max_grad_norm, args.ignore_data_skip = args.max_grad_norm, 0.0, True
        wrapped = isinstance(model, DPLipModel)
        if wrapped == (loss is not None) or (wrapped and gates is not None):
            raise ConfigurationError("give loss=, and gates= if you like, with a network; a wrapped model has them")
        if not wrapped and any(isinstance(part, (Isolated, GradientGated)) for part in model.modules()):
            raise ConfigurationError(
                "the network is behind gradient gates already, which PrivateTrainer puts it behind by itself: give the "
                'network as it was, and what gates are set to by gates={"limit": 1.0}, say'
            )
        model.to(args.device)
        net = _network_of(model.net) if isinstance(model, DPLipModel) else model
        super().__init__(model=net, args=args, **more)
        if len(self.label_names) != 1:
            raise ConfigurationError(f"targets are one tensor of a batch: name it by label_names={self.label_names}")
        self.private_model = self._wrapped(net, loss, gates or {}) if loss is not None else cast(DPLipModel, model)
        self._plan_noise(accountant, noise_multiplier)

    def _plan_noise(self, accountant: str | Accountant, given: float | None) -> None:
        """The steps that ``Trainer`` will take, and the noise that pays for all of them."""
        batch, size = self.args.per_device_train_batch_size, self._dataset_size
        if batch > size:
            raise ConfigurationError(f"per_device_train_batch_size is {batch}, of {size} samples")
        self._steps_per_epoch = math.ceil(size / batch)
        steps = math.ceil(self.args.num_train_epochs * self._steps_per_epoch)
        steps = self.args.max_steps if self.args.max_steps > 0 else steps
        plan = Plan(steps * batch / size, batch, size, steps, None)
        self._sample_rate = plan.sample_rate
        self.noise_multiplier = (
            plan.noise_multiplier(self._epsilon, self._delta, accountant)
            if given is None
            else multiplier("noise_multiplier", given)
        )

    def _wrapped(self, net: nn.Module, loss: Loss, gates: Mapping[str, Any]) -> DPLipModel:
        """The network behind gates, for inputs such as those of the first sample."""
        first = self.train_dataset[0]
        # Told about the collator is what its batch is not made of.
        collate = self._collator()
        # A copy, since what it makes in its first call is compared where all samples are.
        shown = dict(RowByRow(memory.pristine(collate) or collate, first)([first]))
        shown.pop(self.label_names[0], None)
        training = net.training
        # As it is trained: what is frozen by eval(), a recipe says.
        net.train()
        try:
            return DPLipModel(gradient_gated(net, **gates), input_shape=shown, loss=loss)
        finally:
            net.train(training)

    def _collator(self) -> Callable[[list[Any]], Any]:
        refuse_own_generators(self.data_collator, "data_collator")
        collate = self._get_collator_with_removed_columns(self.data_collator or default_data_collator)
        return cast(Callable[[list[Any]], Any], collate)

    @property
    def private_optimizer(self) -> CliplessDPOptimizer:
        """The optimizer with the ledger, for :func:`clipless_dp.report` say; it is made by ``train``.

        Raises:
            ConfigurationError: ``train`` was not called.
        """
        found = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(found, CliplessDPOptimizer):
            raise ConfigurationError("there is no private optimizer before train() has begun")
        return found

    def get_epsilon(self) -> float:
        """ε spent so far at ``delta``."""
        return self.private_optimizer.get_epsilon(self._delta)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Poisson draws; each iteration is an epoch in expectation."""
        data = self.train_dataset
        if hasattr(data, "column_names"):
            data = self._remove_unused_columns(data, description="training")
        workers = self.args.dataloader_num_workers
        return DataLoader(
            data,
            batch_sampler=PoissonBatchSampler(len(data), sample_rate=self._sample_rate, steps=self._steps_per_epoch),
            collate_fn=poisson_collate(data, self._collator()),
            num_workers=workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer that the arguments describe, made private."""
        base = super().create_optimizer(self.model if model is None else model)
        if isinstance(getattr(base, "optimizer", base), CliplessDPOptimizer):
            return base
        if self._max_grad_norm is not None and self._max_grad_norm > 0:
            held = [parameter for group in base.param_groups for parameter in group["params"]]
            # Ahead of the base optimizer's step gradients are private, and what is done to them costs nothing.
            base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(held, self._max_grad_norm) and None)
        self.optimizer = CliplessDPOptimizer(
            self.private_model,
            base,
            noise_multiplier=self.noise_multiplier,
            sample_rate=self._sample_rate,
            dataset_size=self._dataset_size,
            budget=(self._epsilon, self._delta),
            **cast(Any, self._settings),
        )
        return self.optimizer

    def train(self, *positional: Any, **named: Any) -> TrainOutput:
        """As of ``Trainer``; without ``show_loss`` the training loss that it returns is NaN."""
        with full_precision():
            done = super().train(*positional, **named)
        if self._show_loss:
            return done
        metrics = {name: value for name, value in done.metrics.items() if name not in _OF_THE_DATA}
        return TrainOutput(done.global_step, math.nan, metrics)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Adds the gradients of a draw; returns its mean loss, or zero where that is not shown."""
        self.private_model.train()
        inputs = dict(self._prepare_inputs(inputs))
        targets = inputs.pop(self.label_names[0], None)
        if targets is None:
            raise ConfigurationError(f"the batch has no {self.label_names[0]!r}: {[*inputs]}; see label_names")
        packing = self.private_model.packing
        rows: Any = {name: value for name, value in inputs.items() if packing is None or packing.has(name)}
        if packing is None:
            rows = _only({name: value for name, value in rows.items() if name not in LABELS})
        total = self.private_optimizer.accumulate(
            (rows, targets, torch.ones(len(targets), dtype=torch.bool, device=targets.device)),
            micro_batch_size=self._micro_batch_size,
        )
        return total / max(1, len(targets)) if self._show_loss else torch.zeros_like(total)

    def log(self, logs: dict[str, float], *positional: Any) -> None:
        """Logs ε in place of what nothing protects."""
        hidden = ("grad_norm",) if self._show_loss else _OF_THE_DATA
        shown = {name: value for name, value in logs.items() if name not in hidden}
        if isinstance(getattr(self.optimizer, "optimizer", self.optimizer), CliplessDPOptimizer):
            shown["epsilon"] = self.get_epsilon()
        super().log(shown, *positional)

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: the sum over draws would tell how many rows they held, and checkpoints keep it."""
        return 0

    def hyperparameter_search(self, *positional: Any, **named: Any) -> NoReturn:
        """Refused: the trials are releases of the same data, of which the best is chosen.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError(
            "the trials of a search are releases of the same data, and so is the choice of the best: "
            "clipless_dp.search.private_search pays for both"
        )

    def _clip_grad_norm(self, model: Any) -> None:
        """Nothing: sums are not touched before the noise."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """Nothing: the norm of the sum is not private."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(os.fspath(checkpoint)) / _LEDGER
        if not path.is_file():
            raise CheckpointError(
                f"{path} is not there, and with it the ledger of the steps that the weights have taken: save with "
                "save_only_model=False"
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        self.private_model.settle_()
        self.private_optimizer.weights_were_loaded()


def _network_of(net: nn.Module) -> nn.Module:
    """The user's own network, which a wrapped model shares its parameters with."""
    return net.net if isinstance(net, Isolated) else net


def _only(inputs: Mapping[str, Tensor]) -> Tensor:
    if len(inputs) != 1:
        raise ConfigurationError(
            f"the model was wrapped for a single tensor, and the batch has {[*inputs]}: give input_shape by name, or "
            "leave the others out of the data set"
        )
    (value,) = inputs.values()
    return value
