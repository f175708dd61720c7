"""Regression at ε = 1: Huber's loss, whose gradient is bounded whatever the targets are.

python examples/regression.py

Inputs and targets are scaled by public numbers: ranges that are known without looking at the data. Where there are
none, ``clipless_dp.statistics`` releases them, at a charge.
"""

import argparse

import torch
from sklearn.datasets import make_friedman1
from torch import Tensor

from clipless_dp import presets


def made(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Friedman's function of 10 inputs in [0, 1], with noise; its values lie between 0 and 30."""
    inputs, targets = make_friedman1(samples, noise=1.0, random_state=seed)
    return torch.from_numpy(2.0 * inputs - 1.0).float(), torch.from_numpy((targets - 15.0) / 10.0).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--samples", type=int, default=20_000)
    options = parser.parse_args()

    inputs, targets = made(5_000, seed=2)
    trained = presets.get("regression").fit(
        made(options.samples, seed=0),
        epsilon=options.epsilon,
        delta=options.delta,
        outputs=1,
        epochs=options.epochs,
    )
    with torch.no_grad():
        errors = trained.model(trained.prepare(inputs)).flatten() - targets
    print(trained.result)
    print(f"R² {1.0 - float(errors.square().mean() / targets.var()):.3f} on {len(targets)} new samples")


if __name__ == "__main__":
    main()
