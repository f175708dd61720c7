"""Train privately on scikit-learn's digits: no download, seconds on a laptop.

python examples/digits.py --checkpoint runs/digits.pt
"""

import argparse

from torch import nn

from clipless_dp import DPLipModel, evaluate, fit, gated, layers, losses
from clipless_dp.datasets import load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--checkpoint", default=None)
    options = parser.parse_args()

    data = load_dataset("digits")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), layers.GroupSort(2), nn.Linear(64, 10))
    model = DPLipModel(
        gated(net, cotangent_mode="normalize"),
        input_shape=(1, 8, 8),
        input_norm=8.0,
        loss=losses.TauCrossEntropy(tau=8.0),
    )
    print(model.sensitivity(), end="\n\n")

    result = fit(
        model,
        data.train,
        epsilon=options.epsilon,
        delta=options.delta,
        epochs=60,
        batch_size=512,
        lr=0.5,
        checkpoint=options.checkpoint,
    )
    accuracy, _ = evaluate(model, data.test)
    print(f"\naccuracy    {100 * accuracy:.1f} % of {len(data.test_targets)} held-out digits")
    print(f"epsilon     {result.epsilon:.3f} (adding or removing one digit)")
    print(f"delta       {result.delta:g}")
    print(f"checkpoint  {result.checkpoint}")


if __name__ == "__main__":
    main()
