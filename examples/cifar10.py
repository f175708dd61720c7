"""CIFAR-10 at ε = 3: features of scattering and synthetic patches, which cost no privacy, and one linear layer.

python examples/cifar10.py --cache-dir runs/features
"""

import argparse

from clipless_dp import presets
from clipless_dp.datasets import load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="photographs-linear")
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, help="fewer than the preset's, for a first look")
    parser.add_argument("--data-dir", help="folder with cifar10_jpeg.npz; otherwise OpenML is asked")
    parser.add_argument("--cache-dir", help="keeps the features, which are as private as the images")
    options = parser.parse_args()

    data = load_dataset("cifar10", options.data_dir)
    changes = {} if options.epochs is None else {"epochs": options.epochs}
    trained = presets.get(options.preset).fit(
        data.train,
        epsilon=options.epsilon,
        delta=options.delta,
        outputs=data.classes,
        cache_dir=options.cache_dir,
        **changes,
    )
    accuracy, _ = trained.evaluate(data.test)
    print(trained.result)
    print(f"accuracy {100 * accuracy:.2f} % of {len(data.test_targets)} test images")


if __name__ == "__main__":
    main()
