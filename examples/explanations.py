"""What a private network looks at, and how little would change its mind: maps and counterfactuals with certificates.

python examples/explanations.py --plot runs/explanations.png              # digits of scikit-learn
python examples/explanations.py --data mnist --data-dir DIR --delta 1e-5
"""

import argparse
import math
from pathlib import Path

from torch import nn

from clipless_dp import DPLipModel, constraints, fit, layers, losses, robustness
from clipless_dp.datasets import load_dataset


def build(shape: tuple[int, ...]) -> DPLipModel:
    """Orthogonal layers, which expand no distance: steep directions are those that the task needs."""
    net = nn.Sequential(
        *(nn.Flatten(), layers.LayerCentering()),
        *(nn.Linear(math.prod(shape), 64, bias=False), layers.GroupSort(2), nn.Linear(64, 10, bias=False)),
        layers.CotangentGate(0.1),
    )
    return DPLipModel(
        net,
        input_shape=shape,
        input_norm=math.sqrt(math.prod(shape)) / 2.0,
        loss=losses.TauCrossEntropy(8.0),
        constraint=constraints.Orthogonal(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder with a local copy of MNIST")
    parser.add_argument("--epsilon", type=float, default=6.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--samples", type=int, default=4, help="images that are explained")
    parser.add_argument("--plot", type=Path, help="draw them; needs matplotlib")
    options = parser.parse_args()

    data = load_dataset(options.data, options.data_dir)
    shape, batch = tuple(data.inputs.shape[1:]), 256 if options.data == "digits" else 2048
    model = build(shape)
    privacy = {"epsilon": options.epsilon, "delta": options.delta}
    print(fit(model, data.train, **privacy, epochs=options.epochs, batch_size=batch, lr=2.0))

    # The weights are public, and so is all that is read off them on held-out images.
    images, _ = data.test
    some = images[: options.samples]
    found = robustness.counterfactual(model, some, box=(0.0, 1.0))
    print("", found, sep="\n")
    close = found.tightness.nanmedian()
    print(f"no image nearer than 'certified' is predicted otherwise; tightness {close:.2f} in the median")

    print("", robustness.quality(model, images[:100], temperature=8.0), sep="\n")
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        robustness.picture(model, some, options.plot, box=(0.0, 1.0))
        print(f"picture: {options.plot}")


if __name__ == "__main__":
    main()
