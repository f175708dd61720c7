"""How good the maps of private networks are: a Lipschitz network, and DP-SGD (Opacus) on an ordinary one of its size.

    python benchmarks/explanations.py --data-dir DIR --out benchmarks/results/explanations.json

The Lipschitz network is that of ``benchmarks/robustness.py`` (average pooling, centering, a ball, orthogonal layers of
64 and 10), trained as there; the ordinary one has the same pooling and widths, ReLU, biases and cross-entropy, and sees
as many batches of the same size at the same ε. Its learning rate and clipping norm are those of the best accuracy on
held-out training images (``--tune``). Maps are of the margin of the predicted class. The block share is of networks
that are trained on two digits, one above the other, of which the upper one is the label. ``inf`` trains without
privacy. τ = 8 is the most accurate; a smaller one gives accuracy away for steadier maps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import robustness as trained
import utility

from accounting import create_accountant
from clipless_dp import DPLipModel, GaussianNoise, constraints, fit, fit_without_privacy, layers, losses
from clipless_dp.datasets import load_dataset
from clipless_dp.presets import Preset
from clipless_dp.robustness import counterfactual, metrics, picture, plain_network, quality, saliency, score_gradients

EPOCHS, BATCH = 30, 2048
CLIPPING: dict[str, Any] = {"norm": 0.1, "lr": 0.02, "optimizer": "adam"}
"""Of DP-SGD, by --tune."""

Pair = tuple[Tensor, Tensor]


def lipschitz(shape: tuple[int, ...], tau: float) -> DPLipModel:
    if shape == (1, 28, 28):
        return trained.mnist(tau)
    # Two digits are √2 times as long as one.
    net = nn.Sequential(
        *(nn.AvgPool2d(2), nn.Flatten(), layers.LayerCentering(), layers.BallProjection(4.0 * math.sqrt(2.0))),
        *(nn.Linear(math.prod(shape) // 4, 64, bias=False), layers.GroupSort(2), nn.Linear(64, 10, bias=False)),
        layers.CotangentGate(0.1),
    )
    return DPLipModel(
        net,
        input_shape=shape,
        input_norm=math.sqrt(math.prod(shape)),
        loss=losses.TauCrossEntropy(tau),
        constraint=constraints.Orthogonal(),
    )


def behind_pooling(shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 64), nn.ReLU(), nn.Linear(64, outputs))


def by_lipschitz(train: Pair, epsilon: float, seed: int, tau: float, noise: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    model = lipschitz(tuple(train[0].shape[1:]), tau)
    arguments = trained.settings("mnist", epsilon)
    if noise > 0.0:
        arguments["augment"] = GaussianNoise(noise)
    if math.isinf(epsilon):
        fit_without_privacy(model, train, rng_seed=seed, progress=False, **arguments)
    else:
        fit(model, train, epsilon=epsilon, delta=trained.DELTA, reproducible_seed=seed, progress=False, **arguments)
    return model


def by_clipping(train: Pair, epsilon: float, seed: int, norm: float, lr: float, optimizer: str) -> nn.Module:
    if math.isinf(epsilon):
        return without_privacy(train, seed)
    # Pooling has no parameters: once before training is the same as in each step.
    pool = nn.AvgPool2d(2)
    pooled = pool(train[0])
    preset = Preset(
        name="ordinary",
        summary="64 hidden units, ReLU",
        network=behind_pooling,
        # Read for its loss alone: the network trains without bounds.
        bound=lambda net, shape: DPLipModel(
            net, input_shape=shape, input_norm=math.sqrt(math.prod(shape)), loss=losses.TauCrossEntropy(1.0)
        ),
        settings={"epochs": EPOCHS, "batch_size": BATCH, "optimizer": optimizer},
        provenance="held-out training images",
    )
    contender = utility.Clipping(preset, norm=norm, lr=lr)
    net, _, _ = utility.clipped(
        contender, (pooled, train[1]), 10, create_accountant("prv"), epsilon=epsilon, delta=trained.DELTA, seed=seed,
        epochs=EPOCHS,
    )  # fmt: skip
    # Opacus leaves hooks on the network, which refuse another backward pass.
    bare = behind_pooling(tuple(pooled.shape[1:]), 10)
    bare.load_state_dict(net.state_dict())
    return nn.Sequential(pool, bare).eval()


def without_privacy(train: Pair, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    pool = nn.AvgPool2d(2)
    inputs = pool(train[0])
    net = behind_pooling(tuple(inputs.shape[1:]), 10)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        for rows in torch.randperm(len(inputs), generator=generator).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[rows]), train[1][rows]).backward()
            optimizer.step()
    return nn.Sequential(pool, net).eval()


def measured(model: nn.Module, test: Pair, samples: int, temperature: float) -> dict[str, float]:
    """Accuracy on all test images, and metrics of the first ones."""
    some, plain = test[0][:samples], plain_network(model)
    found = {"accuracy": utility.accuracy(model, test), **quality(model, some, temperature=temperature).means()}
    maps, (_, gradients) = saliency(plain, some), score_gradients(plain, some)
    for baseline in ("zero", "uniform"):
        # Of the map itself, as it is published, and not of what pixels give.
        found[f"mu-fidelity of the map, {baseline}"] = float(
            metrics.mu_fidelity(plain, some, maps, baseline=baseline).mean()
        )
    found["slope"] = float(gradients.flatten(1).norm(dim=1).mean())
    steps = counterfactual(model, some)
    found["flips reached"] = float(steps.reached.double().mean())
    found["flip distance"] = float(steps.distances[steps.reached].median())
    found["tightness"] = float(steps.tightness.nanmedian())
    return found


def blocks(data: tuple[Pair, Pair], seed: int) -> tuple[tuple[Pair, Pair], Tensor]:
    """Both parts as block images, and the mask of the lower digit."""
    (train, train_labels), (test, test_labels) = data
    above, mask = metrics.block_images(train, train, rng_seed=seed)
    below, _ = metrics.block_images(test, test, rng_seed=seed + 1)
    return ((above, train_labels), (below, test_labels)), mask


def tune(train: Pair, epsilon: float) -> None:
    """Accuracy of DP-SGD on the last 10 000 training images."""
    cut = len(train[0]) - 10_000
    part, held = (train[0][:cut], train[1][:cut]), (train[0][cut:], train[1][cut:])
    for optimizer, norm, lr in (("adam", 0.1, 0.02), ("adam", 0.1, 0.005), ("sgd", 1.0, 1.0), ("sgd", 0.1, 10.0)):
        net = by_clipping(part, epsilon, 0, norm, lr, optimizer)
        print(f"{optimizer}, norm {norm:g}, lr {lr:g}: {100 * utility.accuracy(net, held):.2f} %", flush=True)


def table(runs: list[dict[str, Any]]) -> str:
    names = [name for name in runs[0] if name not in ("method", "epsilon", "seed", "seconds")]
    keys = sorted({(run["method"], run["epsilon"] or math.inf) for run in runs}, key=lambda key: (key[1], key[0]))
    lines = ["| metric | " + " | ".join(f"{method}, ε = {epsilon:g}" for method, epsilon in keys) + " |"]
    lines.append("| --- |" + " --- |" * len(keys))
    for name in names:
        cells = []
        for method, epsilon in keys:
            found = [run[name] for run in runs if (run["method"], run["epsilon"] or math.inf) == (method, epsilon)]
            spread = f" ± {statistics.stdev(found):.2g}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.4g}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[3.0])
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=300, help="test images whose maps are measured")
    parser.add_argument("--tune", action="store_true", help="settings of DP-SGD on held-out training images")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="draw four images of the first seed by both networks: FILE-*.png")
    options = parser.parse_args()
    loaded = load_dataset("mnist", options.data_dir)
    data = loaded.train, loaded.test
    if options.tune:
        return tune(data[0], options.epsilon[0])
    runs: list[dict[str, Any]] = []
    if options.out is not None and options.out.exists():
        runs = json.loads(options.out.read_text(encoding="utf-8"))["runs"]
    for seed in options.seeds:
        for epsilon in options.epsilon:
            for method in options.methods:
                told = None if math.isinf(epsilon) else epsilon
                key = {"method": method, "epsilon": told, "seed": seed}
                if any(key.items() <= run.items() for run in runs):
                    continue
                runs.append({**key, **run(method, data, epsilon, seed, options)})
                print(json.dumps(runs[-1], indent=1), flush=True)
                write(options, runs)
    print(table(runs))
    return None


def run(method: str, data: tuple[Pair, Pair], epsilon: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One network of digits, and one of block images."""
    start = time.perf_counter()
    make, temperature = METHODS[method]
    model = make(data[0], epsilon, seed)
    found: dict[str, Any] = measured(model, data[1], options.samples, temperature)
    if options.plot is not None and seed == options.seeds[0]:
        file = options.plot.with_stem(f"{options.plot.stem}-{method.lower()}-{epsilon:g}")
        picture(model, data[1][0][:4], file, box=(0.0, 1.0))
    (train, test), mask = blocks(data, seed)
    model = make(train, epsilon, seed)
    maps = saliency(model, test[0][: options.samples])
    found["block accuracy"] = utility.accuracy(model, test)
    for share in (0.05, 0.1, 0.2):
        found[f"block share at {share:g}"] = float(metrics.block_share(maps, mask, fraction=share).mean())
    found["seconds"] = round(time.perf_counter() - start, 1)
    return found


METHODS: dict[str, tuple[Callable[[Pair, float, int], nn.Module], float]] = {
    "Lipschitz": (partial(by_lipschitz, tau=8.0), 8.0),
    "Lipschitz, τ = 4": (partial(by_lipschitz, tau=4.0), 4.0),
    "Lipschitz, noisy views": (partial(by_lipschitz, tau=8.0, noise=0.75), 8.0),
    "DP-SGD": (partial(by_clipping, **CLIPPING), 1.0),
}
"""Who is compared, and the temperature of its probabilities, which is the loss's."""


def write(options: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """After each run, so that what was interrupted goes on."""
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        summary = {"delta": trained.DELTA, "samples": options.samples, "runs": runs, "torch": torch.__version__}
        options.out.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
