"""Poisson draws in place of the batches of a ``DataLoader``, with its settings."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from clipless_dp.arguments import shown
from clipless_dp.errors import ConfigurationError
from clipless_dp.sampling import PoissonBatchSampler, poisson_collate

_KEPT = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "persistent_workers")
"""Settings of a loader that say how samples are read, and not which."""

_SAMPLERS = {
    "WeightedRandomSampler": "it draws some samples more often, which no accountant here covers: weigh classes by the "
    "loss (nn.CrossEntropyLoss(weight=...), losses.balanced_weights)",
    "SubsetRandomSampler": "give the loader torch.utils.data.Subset(dataset, indices), whose length is then the data's",
    "DistributedSampler": "each process draws its own part of a Poisson draw: leave the sampler out, under torchrun",
}


def refuse_loaders(loader: object) -> None:
    """Refuses what is no loader whose batches could as well be Poisson draws.

    Raises:
        ConfigurationError: says which part, and what to do instead.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(f"data_loader must be a torch.utils.data.DataLoader, got {shown(loader)}")
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigurationError(
            "the data set is an IterableDataset, of which nobody can draw samples at random, as amplification asks "
            "for: give a data set with __getitem__ and __len__. One that does not fit into memory may be memory-mapped "
            "files: clipless_dp.StreamedBatches reads draws ahead (docs/data.md)"
        )
    if not hasattr(loader.dataset, "__len__") or len(loader.dataset) == 0:
        raise ConfigurationError("the data set must have a length, and a sample: draws are from all of it")
    if loader.batch_size is None:
        if loader.batch_sampler is None:
            raise ConfigurationError(
                "batch_size=None lets the data set make batches: give one of single samples, and a batch_size"
            )
        if isinstance(loader.batch_sampler, PoissonBatchSampler):
            raise ConfigurationError(
                "the loader draws by PoissonBatchSampler already: give make_private the ordinary one, or make "
                "DPLipModel and CliplessDPOptimizer yourself (docs/start.md)"
            )
        raise ConfigurationError(
            f"batches of a {type(loader.batch_sampler).__name__} are no Poisson draws, which alone amplify privacy: "
            "give the loader batch_size, and no batch_sampler"
        )
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler or type(sampler) not in (RandomSampler, SequentialSampler):
        kind = type(sampler).__name__
        why = _SAMPLERS.get(kind, "samples are drawn independently of each other instead: leave the sampler out")
        raise ConfigurationError(f"sampler={kind} cannot be kept: {why}")
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != len(loader.dataset)):
        raise ConfigurationError(
            "the RandomSampler draws with replacement, or other than all samples, and a Poisson draw holds each once: "
            "leave the sampler out; choose samples by torch.utils.data.Subset"
        )


def poisson_loader(loader: DataLoader[Any], sample_rate: float, steps: int) -> tuple[DataLoader[Any], list[str]]:
    """A loader of Poisson draws with the settings of another one, and what became of the others in words.

    Args:
        loader: one that :func:`refuse_loaders` lets pass.
        sample_rate: ``q``.
        steps: draws of one iteration.

    Raises:
        ConfigurationError: ``collate_fn`` does not make rows one by one, see :func:`clipless_dp.poisson_collate`.
        PrivacyError: a sample is in the data more than once, or ``collate_fn`` remembers samples.
    """
    dataset = loader.dataset
    told = [
        f"batches: Poisson draws of about {loader.batch_size} of {len(dataset)} samples, each sample with probability "  # type: ignore[arg-type]
        f"{sample_rate:.4g}, in place of batches of {loader.batch_size}; now and then one is empty, or much larger",
        f"an iteration over the loader: {steps} draws, one epoch in expectation",
    ]
    if loader.drop_last:
        told.append("drop_last: without a meaning, since draws differ in size and none is the rest of an epoch")
    if loader.generator is not None or getattr(loader.sampler, "generator", None) is not None:
        told.append("generator: left out; draws are secret, and come from the operating system, whatever is seeded")
    if isinstance(loader.sampler, SequentialSampler):
        told.append("order: left out; draws are at random, as with shuffle=True")
    kept: dict[str, Any] = {name: getattr(loader, name) for name in _KEPT}
    if loader.prefetch_factor is not None:
        kept["prefetch_factor"] = loader.prefetch_factor
    made: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=PoissonBatchSampler(len(dataset), sample_rate=sample_rate, steps=steps),  # type: ignore[arg-type]
        collate_fn=poisson_collate(dataset, loader.collate_fn),
        **kept,
    )
    return made, told
