"""Private steps in Lightning's loop: a mixin for a ``LightningModule``; none of Lightning's packages is imported."""

from __future__ import annotations

from typing import Any

from clipless_dp.errors import CheckpointError, ConfigurationError, PrivacyError
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.sampling import PoissonBatchSampler

_POISSON = (
    "batches are Poisson draws: DataLoader(data, batch_sampler=PoissonBatchSampler(...), "
    "collate_fn=poisson_collate(data))"
)


_CLIPPED = "gates bound each sample's gradient; clip the noisy mean, by a step pre-hook of the base optimizer"
_PRECISIONS = ("32-true", "64-true", "32", "64")


class PrivateTraining:
    """Makes sure that what Lightning runs is what is charged; stands before ``LightningModule`` among the bases.

    The module's ``configure_optimizers`` returns a :class:`clipless_dp.CliplessDPOptimizer`, with a scheduler if you
    like; its ``training_step`` returns ``model.loss(model(inputs), targets)``, a sum; the loader draws by
    :class:`clipless_dp.PoissonBatchSampler`::

        class Reader(PrivateTraining, lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = DPLipModel(gradient_gated(net), input_shape=shown, loss=losses.TauCrossEntropy(1.0))

            def training_step(self, batch, index):
                return self.model.loss(self.model(batch), batch["labels"])

            def configure_optimizers(self):
                return CliplessDPSGD(self.model, lr=0.5, noise_multiplier=1.0, sample_rate=q, dataset_size=n)

    Lightning's checkpoints hold the optimizer's state, and with it the ledger. What a module logs of a training batch
    (``self.log("train_loss", ...)``) is not private; neither is a metric of private data.

    Raises:
        ConfigurationError: when ``fit`` begins: an option of ``lightning.Trainer``, the optimizer or the loader would
            break the guarantee; all of them at once.
        PrivacyError: gradients are to be clipped before the noise.
        CheckpointError: a checkpoint to resume from holds no ledger.
    """

    trainer: Any

    def on_fit_start(self) -> None:
        """Refuses options that would break the guarantee."""
        wrong = _refused(self.trainer)
        if wrong:
            raise ConfigurationError("PrivateTraining cannot run with\n  " + "\n  ".join(wrong))
        self._call("on_fit_start")

    def on_train_start(self) -> None:
        """Refuses batches that are no Poisson draws; takes the weights of a checkpoint as those of its ledger."""
        loader = self.trainer.train_dataloader
        if not isinstance(getattr(loader, "batch_sampler", None), PoissonBatchSampler):
            raise ConfigurationError(_POISSON)
        if self.trainer.ckpt_path is not None:
            optimizer = self.private_optimizer
            optimizer.model.settle_()
            optimizer.weights_were_loaded()
        self._call("on_train_start")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint without a ledger, if training is to go on from it."""
        states = checkpoint.get("optimizer_states") or []
        fitting = str(getattr(self.trainer.state.fn, "value", self.trainer.state.fn)) == "fit"
        if fitting and not any("clipless_dp" in state for state in states):
            raise CheckpointError(
                "the checkpoint holds no ledger of the steps that its weights have taken: save with "
                "save_weights_only=False"
            )
        self._call("on_load_checkpoint", checkpoint)

    def configure_gradient_clipping(self, *positional: Any, **named: Any) -> None:
        """Refuses to touch sums before the noise.

        Raises:
            PrivacyError: a value to clip at is given.
        """
        given = [value for value in (*positional[1:2], named.get("gradient_clip_val")) if value]
        if given:
            raise PrivacyError(f"gradient_clip_val={given[0]} clips the sum before the noise: {_CLIPPED}")

    @property
    def private_optimizer(self) -> CliplessDPOptimizer:
        """The optimizer with the ledger, once ``fit`` has begun."""
        found = _optimizers(self.trainer)
        if len(found) != 1 or not isinstance(found[0], CliplessDPOptimizer):
            raise ConfigurationError("configure_optimizers must return one CliplessDPOptimizer")
        return found[0]

    def _call(self, hook: str, *given: Any) -> None:
        """What stands behind the mixin has the hook as well, if it is a ``LightningModule``."""
        inherited = getattr(super(), hook, None)
        if inherited is not None:
            inherited(*given)


def _optimizers(trainer: Any) -> list[Any]:
    """The optimizers themselves, out of Lightning's own wrappers."""
    return [one if _is_private(one) else getattr(one, "optimizer", one) for one in trainer.optimizers]


def _is_private(optimizer: Any) -> bool:
    return isinstance(optimizer, CliplessDPOptimizer)


def _refused(trainer: Any) -> list[str]:
    """What of a ``lightning.Trainer`` would break the guarantee, each with its remedy."""
    optimizers = _optimizers(trainer)
    kinds = [type(one).__name__ for one in optimizers]
    pieces, clipped, overfitted = trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.overfit_batches
    found = {
        f"accumulate_grad_batches={pieces}: a step is one draw; raise the sample rate, and pass a draw in pieces by "
        "manual optimization: optimizer.accumulate(batch, micro_batch_size=...)": pieces != 1,
        f"gradient_clip_val={clipped}: {_CLIPPED}": clipped,
        f"precision={trainer.precision!r}: gradients are summed in the weights' own precision, which bounds are of, "
        "and no step may be skipped: use '32-true'": str(trainer.precision) not in _PRECISIONS,
        f"{trainer.world_size} processes: a strategy deals out draws and averages gradients; train with "
        "clipless_dp.fit under torchrun": trainer.world_size != 1,
        f"overfit_batches={overfitted}: {_POISSON}": overfitted,
        f"the optimizers {kinds}: configure_optimizers returns one CliplessDPOptimizer": (
            len(optimizers) != 1 or not _is_private(optimizers[0])
        ),
    }
    return [message for message, wrong in found.items() if wrong]
