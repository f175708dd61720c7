"""MNIST end to end at ε = 3, by a preset: gradient gates, signal gates, or orthogonal weights.

python examples/mnist.py --preset mnist-gradient --checkpoint runs/mnist.pt
"""

import argparse

from clipless_dp import presets, report
from clipless_dp.datasets import load_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="mnist-gradient")
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--epochs", type=float, help="fewer than the preset's, for a first look")
    parser.add_argument("--data-dir", help="folder with mnist.npz; otherwise OpenML is asked")
    parser.add_argument("--checkpoint")
    options = parser.parse_args()

    data = load_dataset("mnist", options.data_dir)
    preset = presets.get(options.preset)
    changes = {} if options.epochs is None else {"epochs": options.epochs}
    trained = preset.fit(
        data.train,
        epsilon=options.epsilon,
        delta=options.delta,
        outputs=data.classes,
        checkpoint=options.checkpoint,
        **changes,
    )
    accuracy, _ = trained.evaluate(data.test)
    print(trained.model.sensitivity(), trained.result, sep="\n\n")
    print(f"accuracy {100 * accuracy:.2f} % of {len(data.test_targets)} test images")
    # Chosen on MNIST, so the search is not in this ε: the statement says so, and on other data it would be free.
    notes = (f"Hyper-parameters: {preset.provenance}",)
    if options.checkpoint is not None:
        report(trained.result.optimizer, f"{options.checkpoint}.statement", delta=options.delta, notes=notes)


if __name__ == "__main__":
    main()
