"""A training loop with Hugging Face Accelerate, on one process or several.

python examples/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipless_dp import CliplessDPSGD, DPLipModel, PoissonBatchSampler, constraints, layers, losses, poisson_collate
from clipless_dp.datasets import load_dataset

BATCH_SIZE, DELTA = 256, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    epochs = parser.parse_args().epochs
    # First, since it starts the process group. It steps the scheduler once for each process unless told not to.
    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    data = load_dataset("digits")
    dataset = TensorDataset(*data.train)
    rate = BATCH_SIZE / len(dataset)
    steps = round(epochs / rate)

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), layers.GroupSort(2), nn.Linear(64, 10, bias=False))
    model = DPLipModel(
        net,
        input_shape=(1, 8, 8),
        input_norm=4.0,
        loss=losses.TauCrossEntropy(tau=8.0),
        constraint=constraints.Orthogonal(),
    ).to(accelerator.device)
    optimizer = CliplessDPSGD(
        model, lr=0.2, momentum=0.9, noise_multiplier=3.0, sample_rate=rate, dataset_size=len(dataset)
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    loader = DataLoader(
        dataset,
        batch_sampler=PoissonBatchSampler(len(dataset), sample_rate=rate, steps=steps),
        collate_fn=poisson_collate(dataset),
    )
    # Not the model, which prepare() would wrap in DDP: the optimizer adds up the gradients itself. Not the loader,
    # whose batches prepare() would deal out to the ranks: each rank draws its own part of every batch.
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    for images, labels in loader:
        optimizer.zero_grad()
        output = model(images.to(accelerator.device))
        accelerator.backward(model.loss(output, labels.to(accelerator.device)))
        optimizer.step()
        scheduler.step()

    with torch.no_grad():
        predicted = model(data.test_inputs.to(accelerator.device)).argmax(1).cpu()
    accuracy = (predicted == data.test_targets).float().mean()
    epsilon = optimizer.optimizer.get_epsilon(DELTA)
    accelerator.print(f"accuracy {100 * accuracy:.1f} %, ε = {epsilon:.3f} at δ = {DELTA:g}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
