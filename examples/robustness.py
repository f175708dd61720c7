"""One certificate on scikit-learn's digits: (ε, δ) of the training data, and radii that no perturbation gets through.

python examples/robustness.py --statement runs/robust
"""

import argparse

from torch import nn

from clipless_dp import DPLipModel, constraints, fit, fit_without_privacy, layers, losses, report, robustness
from clipless_dp.datasets import load_dataset


def build():
    """Orthogonal layers, which expand no distance, and a gate that caps the loss's gradient, and with it the noise."""
    net = nn.Sequential(
        *(nn.Flatten(), layers.LayerCentering()),
        *(nn.Linear(64, 32, bias=False), layers.GroupSort(2), nn.Linear(32, 10, bias=False)),
        layers.CotangentGate(0.1),
    )
    return DPLipModel(
        net,
        input_shape=(1, 8, 8),
        input_norm=4.0,
        loss=losses.TauCrossEntropy(8.0),
        constraint=constraints.Orthogonal(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=6.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--statement", help="write the statement, radii beside ε: PATH.md, .json, .html")
    options = parser.parse_args()

    data = load_dataset("digits")
    # Pixels are in [0, 1]; the held-out digits are public, so that accuracy on them may be told.
    held_out, radii = data.test, (0.0, 0.1, 0.25, 0.5)
    attacks = (robustness.attacks.PGD(steps=20), robustness.attacks.DeepFool())

    model = build()
    result = fit(
        model, data.train, epsilon=options.epsilon, delta=options.delta, epochs=options.epochs, batch_size=256, lr=2.0
    )
    private = robustness.curve(model, held_out, radii, attacks, box=(0.0, 1.0))
    print(result, private, sep="\n\n")
    slope = robustness.lipschitz_lower_bound(model, held_out)
    print(f"Lipschitz constant: {slope:.4f} was seen, {model.lipschitz_constant():.4f} is certified")
    careful = robustness.abstain(model, 0.25).evaluate(held_out)
    print(
        f"abstaining within 0.25: answers {100 * careful.answered:.1f} %, of these {100 * careful.accuracy:.1f} % right"
    )

    free = build()
    print("", fit_without_privacy(free, data.train, epochs=20, batch_size=64, lr=5e-3, progress=False), sep="\n")
    certificates = {
        f"private, ε = {options.epsilon:g}": private.certificate,
        "not private": robustness.certify(free, held_out),
    }
    print(robustness.pareto(certificates, 0.25))
    if options.statement is not None:
        described = private.described("the held-out fifth of scikit-learn's digits")
        print(report(result.optimizer, options.statement, delta=options.delta, robustness=described).files)


if __name__ == "__main__":
    main()
