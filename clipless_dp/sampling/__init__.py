"""Data on its way to a step: read once, drawn by Poisson sampling, delivered as draws, and viewed sample by sample."""

from clipless_dp.sampling.adversarial import Adversarial, LabelledAugmentation
from clipless_dp.sampling.augmentation import Augmentation
from clipless_dp.sampling.batches import Batch, PoissonBatches
from clipless_dp.sampling.people import People, bound_contributions
from clipless_dp.sampling.sampler import PoissonBatchSampler, poisson_collate
from clipless_dp.sampling.samples import Samples, as_tensors
from clipless_dp.sampling.streaming import StreamedBatches
from clipless_dp.sampling.transforms import GaussianNoise, RowAugmentation, ShiftAndFlip

__all__ = [
    "Adversarial",
    "Augmentation",
    "Batch",
    "GaussianNoise",
    "LabelledAugmentation",
    "People",
    "PoissonBatchSampler",
    "PoissonBatches",
    "RowAugmentation",
    "Samples",
    "ShiftAndFlip",
    "StreamedBatches",
    "as_tensors",
    "bound_contributions",
    "poisson_collate",
]
