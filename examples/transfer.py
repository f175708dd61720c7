"""Transfer: features of a frozen backbone, and one linear layer that is trained privately.

python examples/transfer.py

The backbone here is a stand-in with random weights, so that nothing is downloaded. Any module that gives one tensor
does:

    backbone = timm.create_model("vit_small_patch14_dinov2", pretrained=True, num_classes=0)

It must have been trained on other data than yours: what it has learned from yours is in no ε.
"""

import argparse

import torch
from torch import nn

from clipless_dp import presets
from clipless_dp.datasets import load_dataset
from clipless_dp.features import FrozenFeatures


def stand_in() -> nn.Module:
    """A fixed random network, for images (1, 8, 8)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 64, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.LayerNorm(1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--cache-dir", help="keeps the features, which are as private as the images")
    options = parser.parse_args()

    data = load_dataset("digits")
    features = FrozenFeatures(stand_in(), cache_dir=options.cache_dir)
    trained = presets.get("transfer").fit(
        (features.compute(data.inputs), data.targets),
        epsilon=options.epsilon,
        delta=options.delta,
        outputs=data.classes,
        epochs=options.epochs,
    )
    accuracy, _ = trained.evaluate((features.compute(data.test_inputs), data.test_targets))
    print(trained.result)
    print(f"accuracy {100 * accuracy:.1f} % of {len(data.test_targets)} held-out digits")


if __name__ == "__main__":
    main()
