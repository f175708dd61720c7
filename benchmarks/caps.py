"""Accuracy and cost of ways to cap gradients: each parameter's, a layer's or the network's, fixed or adaptive.

Handwritten digits of scikit-learn (1797 images of 8×8, the last 297 held out) through a small transformer with layer
normalisation, whose tokens are the rows of an image. All is fixed but the caps; Adam makes the step's size independent
of their scale. The better of two learning rates is shown for each way, chosen by the accuracy shown: compare, but do
not quote as private accuracy.

    OMP_NUM_THREADS=1 python benchmarks/caps.py
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn

from accounting import calibrate_noise_multiplier
from clipless_dp import AdaptiveLimit, CliplessDPOptimizer, DPLipModel, PoissonBatches, gradient_gated, losses

TRAINED, BATCH, EPOCHS, DELTA = 1500, 250, 20, 1e-4
RATES = (2e-2,)

WAYS: dict[str, dict[str, Any]] = {
    "each, normalised": {},
    "each, clipped at 0.1": {"limit": 0.1, "mode": "clip"},
    "each, adaptive, clipped": {"limit": AdaptiveLimit(start=0.1), "mode": "clip"},
    "each, adaptive, normalised": {"limit": AdaptiveLimit(start=0.1)},
    "layer, normalised": {"joint": "layer"},
    "layer, adaptive, clipped": {"joint": "layer", "limit": AdaptiveLimit(start=0.1), "mode": "clip"},
    "network, normalised": {"joint": "network"},
    "network, clipped at 1": {"joint": "network", "mode": "clip"},
    "network, adaptive, clipped": {"joint": "network", "limit": AdaptiveLimit(start=1.0), "mode": "clip"},
}


class Rows(nn.Module):
    """One block of attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.places = nn.Parameter(0.1 * torch.randn(8, 32))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(32)
        self.last = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 8, 8)`` to ``(B, 10)``."""
        outputs: Tensor = self.last(self.norm(self.block(self.first(images) + self.places).mean(1)))
        return outputs


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training data and what is held out."""
    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16.0
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:TRAINED], labels[:TRAINED]), (images[TRAINED:], labels[TRAINED:])


def run(way: dict[str, Any], epsilon: float, seed: int, rate: float, epochs: int = EPOCHS) -> tuple[float, float]:
    """Accuracy on what is held out, and CPU seconds a step."""
    trained, held_out = digits()
    torch.manual_seed(seed)
    model = DPLipModel(gradient_gated(Rows(), **way), input_shape=(8, 8), loss=losses.TauCrossEntropy(1.0))
    q, steps = BATCH / TRAINED, epochs * TRAINED // BATCH
    sigma = calibrate_noise_multiplier(target_epsilon=epsilon, delta=DELTA, sample_rate=q, steps=steps)
    optimizer = CliplessDPOptimizer(
        model,
        torch.optim.Adam(model.net.parameters(), lr=rate),
        noise_multiplier=sigma,
        sample_rate=q,
        dataset_size=TRAINED,
    )
    begun = time.process_time()
    for batch in PoissonBatches(trained, sample_rate=q, steps=steps):
        optimizer.zero_grad()
        model.loss(model(batch.inputs), batch.targets, batch.mask).backward()
        optimizer.step()
    taken = (time.process_time() - begun) / steps
    model.eval()
    with torch.no_grad():
        right = (model(held_out[0]).argmax(1) == held_out[1]).float().mean()
    return 100.0 * float(right), taken


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 3.0, 8.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in asked.ways:
        row, costs = [name], []
        for epsilon in asked.epsilons:
            best: tuple[float, list[float], float] | None = None
            for rate in RATES:
                found = [run(WAYS[name], epsilon, seed, rate) for seed in range(asked.seeds)]
                costs += [cost for _, cost in found]
                accuracies = [accuracy for accuracy, _ in found]
                mean = sum(accuracies) / len(accuracies)
                if best is None or mean > best[0]:
                    best = mean, accuracies, rate
            assert best is not None
            row.append(f"{best[0]:.1f} ({min(best[1]):.1f}–{max(best[1]):.1f}; {best[2]:g})")
        rows.append([*row, f"{1000 * sorted(costs)[len(costs) // 2]:.1f}"])
        print(tabulate([rows[-1]], tablefmt="plain"), flush=True)
    print(tabulate(rows, headers=["caps", *(f"ε = {epsilon:g}" for epsilon in asked.epsilons), "CPU ms a step"]))


if __name__ == "__main__":
    main()
