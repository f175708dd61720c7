"""A training loop of your own: a DataLoader, a scheduler, a residual network, and a rule for a layer of your own.

python examples/own_loop.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipless_dp import (
    CliplessDPSGD,
    DPLipModel,
    LayerBounds,
    PoissonBatchSampler,
    constraints,
    layers,
    losses,
    poisson_collate,
    register_rule,
)
from clipless_dp.datasets import load_dataset

EPOCHS, BATCH_SIZE, DELTA = 30, 256, 1e-4


class Scale(nn.Module):
    """Multiplies by a fixed number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.factor * values


@register_rule(Scale)
def scale_rule(module, context):
    return LayerBounds(output_norm=abs(module.factor) * context.input_norm, lipschitz=abs(module.factor))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale(0.5)
        self.stem = nn.Linear(64, 64, bias=False)
        self.block = nn.Sequential(nn.Linear(64, 64, bias=False), layers.GroupSort(2))
        self.head = nn.Linear(64, 10, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(self.scale(images.flatten(1)))
        return self.head(0.5 * hidden + 0.5 * self.block(hidden))


def main() -> None:
    data = load_dataset("digits")
    dataset = TensorDataset(*data.train)
    rate = BATCH_SIZE / len(dataset)
    steps = round(EPOCHS / rate)

    model = DPLipModel(
        Net(),
        input_shape=(1, 8, 8),
        input_norm=4.0,
        loss=losses.TauCrossEntropy(tau=8.0),
        constraint={"head": constraints.Spectral(), "*": constraints.Orthogonal()},
    )
    optimizer = CliplessDPSGD(
        model, lr=0.2, momentum=0.9, noise_multiplier=3.0, sample_rate=rate, dataset_size=len(dataset)
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    loader = DataLoader(
        dataset,
        batch_sampler=PoissonBatchSampler(len(dataset), sample_rate=rate, steps=steps),
        collate_fn=poisson_collate(dataset),
    )
    for images, labels in loader:
        optimizer.zero_grad()
        model.loss(model(images), labels).backward()
        optimizer.step()
        scheduler.step()

    print(model.sensitivity())
    with torch.no_grad():
        accuracy = (model(data.test_inputs).argmax(1) == data.test_targets).float().mean()
    print(f"accuracy {100 * accuracy:.1f} %, ε = {optimizer.get_epsilon(DELTA):.3f} at δ = {DELTA:g}")


if __name__ == "__main__":
    main()
