"""MNIST from scattering features and one gated linear layer, at ε = 3, δ = 1e-5.

    python benchmarks/features.py --data-dir DIR --cache-dir DIR --seeds 0 1 2

Scattering (2 scales, 8 angles) and group norm cost no privacy. Hyper-parameters were chosen on 10 000 held-out training
images (``--validate`` shows them), never on the test set. Features are computed once and kept in ``--cache-dir``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from clipless_dp import DPLipModel, evaluate, fit, gated, layers, losses
from clipless_dp.datasets import load_dataset
from clipless_dp.features import FrozenFeatures, Scattering2d

CLASSES, FEATURES = 10, 81 * 7 * 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--validate", action="store_true", help="train on 50 000, evaluate on the other 10 000")
    options = parser.parse_args()

    data = load_dataset("mnist", options.data_dir)
    front = FrozenFeatures(
        nn.Sequential(Scattering2d((28, 28)), layers.SampleGroupNorm(27, floor=0.01), nn.Flatten()),
        cache_dir=options.cache_dir,
        batch_size=32,
    )
    start = time.perf_counter()
    inputs = front.compute(data.inputs)
    if options.validate:
        train, test = (inputs[:50_000], data.targets[:50_000]), (inputs[50_000:], data.targets[50_000:])
    else:
        train, test = (inputs, data.targets), (front.compute(data.test_inputs), data.test_targets)
    print(f"features: {time.perf_counter() - start:.0f} s", flush=True)
    accuracies = []
    for seed in options.seeds:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(FEATURES, CLASSES, bias=False))
        nn.init.zeros_(net[0].weight)
        model = DPLipModel(
            gated(net, cotangent_norm=0.05),
            input_shape=(FEATURES,),
            input_norm=100.0,
            loss=losses.TauCrossEntropy(8.0),
        )
        start = time.perf_counter()
        result = fit(
            model,
            train,
            epsilon=options.epsilon,
            delta=options.delta,
            epochs=options.epochs,
            batch_size=4096,
            lr=200.0,
            reproducible_seed=seed,
            progress=False,
        )
        accuracy, _ = evaluate(model, test)
        assert accuracy is not None
        accuracies.append(100 * accuracy)
        print(
            f"seed {seed}: accuracy {100 * accuracy:.2f} %, {result}, {time.perf_counter() - start:.0f} s", flush=True
        )
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    print(f"{statistics.mean(accuracies):.2f} ± {spread:.2f} % over {len(accuracies)} seed(s)")


if __name__ == "__main__":
    main()
