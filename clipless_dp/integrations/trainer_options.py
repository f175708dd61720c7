"""Which options of ``transformers.Trainer`` would break a guarantee, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clipless_dp.errors import ConfigurationError

_PRECISION = "gradients are summed in the weights' own precision, which bounds are of: leave it out"
_SEVERAL = "a draw is the batch of one process here: train with clipless_dp.fit under torchrun"
_PLATEAU = "it follows a metric: use a schedule that depends on the step alone"

_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gradient_accumulation_steps": (
        lambda value: value > 1,
        "a step is one draw: raise per_device_train_batch_size, and pass each draw in pieces by micro_batch_size",
    ),
    "fp16": (bool, _PRECISION + " (and its scaler skips steps depending on the data)"),
    "bf16": (bool, _PRECISION),
    "fp16_full_eval": (bool, "it rounds the weights that are trained: evaluate in their own precision"),
    "bf16_full_eval": (bool, "it rounds the weights that are trained: evaluate in their own precision"),
    "label_smoothing_factor": (bool, "give loss=, with its own label_smoothing"),
    "torch_compile": (bool, "networks that run sample by sample are not compiled"),
    "use_liger_kernel": (bool, "its kernels mix samples where gates cannot see it"),
    "neftune_noise_alpha": (lambda value: value is not None, "it hooks embeddings behind the gates' back"),
    "auto_find_batch_size": (bool, "the batch size is part of the promise: save memory by micro_batch_size"),
    "train_sampling_strategy": (
        lambda value: str(getattr(value, "value", value)) != "random",
        "batches are Poisson draws, which alone amplify privacy: leave the strategy out",
    ),
    "group_by_length": (bool, "batches are Poisson draws, which alone amplify privacy: leave it out"),
    "skip_memory_metrics": (
        lambda value: not value,
        "the peak of memory tells how large the draws were, and is logged and saved: leave it out",
    ),
    "include_num_input_tokens_seen": (
        lambda value: value not in (False, None, "no"),
        "a count of tokens is not private",
    ),
    "lr_scheduler_type": (
        lambda value: str(getattr(value, "value", value)) in ("reduce_lr_on_plateau", "greedy"),
        _PLATEAU,
    ),
    "optim": (
        lambda value: any(kind in str(getattr(value, "value", value)) for kind in ("lomo", "layerwise")),
        "it updates within the backward pass, before the noise: choose another",
    ),
    "deepspeed": (bool, _SEVERAL),
    "fsdp": (bool, _SEVERAL),
    "parallelism_config": (lambda value: value is not None, _SEVERAL),
    "world_size": (lambda value: value > 1, _SEVERAL),
    "n_gpu": (lambda value: value > 1, "data parallelism replicates the network past its gates: show it one GPU"),
}
"""By name: which values are refused, and why. Names that a version of transformers lacks are passed over."""

_ARGUMENTS: dict[str, str] = {
    "compute_loss_func": "give loss=, which states the bound of its gradient",
    "model_init": "a network is wrapped once: give model",
}


def refuse_options(args: Any, more: Mapping[str, Any]) -> None:
    """Refuses, all at once, what would break the guarantee.

    Args:
        args: ``TrainingArguments``.
        more: further arguments of ``Trainer``.

    Raises:
        ConfigurationError: names each option and its remedy.
    """
    wrong = [
        f"{name}={getattr(args, name)!r}: {why}"
        for name, (is_refused, why) in _OPTIONS.items()
        if hasattr(args, name) and is_refused(getattr(args, name))
    ]
    wrong += [f"{name}: {why}" for name, why in _ARGUMENTS.items() if more.get(name) is not None]
    if getattr(more.get("data_collator"), "padding", None) in (True, "longest"):
        wrong.append('data_collator: it pads to the longest of a batch; give it padding="max_length" and max_length')
    if wrong:
        raise ConfigurationError("PrivateTrainer cannot train with\n  " + "\n  ".join(wrong))
