"""How good the maps of private networks are: a Lipschitz network, and DP-SGD (Opacus) on an ordinary one of its size.

    python benchmarks/explanations.py --data-dir DIR --out benchmarks/results/explanations.json

The Lipschitz network is that of ``benchmarks/robustness.py`` (average pooling, centering, a ball, orthogonal layers of
64 and 10), trained as there; the ordinary one has the same pooling and widths, ReLU, biases and cross-entropy, and sees
as many batches of the same size at the same ε. Its learning rate and clipping norm are those of the best accuracy on
held-out training images (``--tune``). Maps are of the margin of the predicted class. The block share is of networks that
are trained on two digits, one above the other, of which the upper one is the label. ``inf`` trains without privacy.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import robustness as trained
import utility

from accounting import create_accountant
from clipless_dp import DPLipModel, constraints, fit, fit_without_privacy, layers, losses
from clipless_dp.datasets import load_dataset
from clipless_dp.presets import Preset
from clipless_dp.robustness import counterfactual, metrics, picture, plain_network, quality, saliency, score_gradients

TAU = 8.0
EPOCHS, BATCH = 30, 2048
CLIPPING = {"norm": 1.0, "lr": 1.0}
"""Of DP-SGD, by --tune."""

Pair = tuple[Tensor, Tensor]


def lipschitz(shape: tuple[int, ...]) -> DPLipModel:
    if shape == (1, 28, 28):
        return trained.mnist(TAU)
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
        loss=losses.TauCrossEntropy(TAU),
        constraint=constraints.Orthogonal(),
    )


def ordinary(shape: tuple[int, ...], outputs: int = 10) -> nn.Sequential:
    hidden = nn.Linear(math.prod(shape) // 4, 64)
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), hidden, nn.ReLU(), nn.Linear(64, outputs))


def by_lipschitz(train: Pair, epsilon: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = lipschitz(tuple(train[0].shape[1:]))
    arguments = trained.settings("mnist", epsilon)
    if math.isinf(epsilon):
        fit_without_privacy(model, train, rng_seed=seed, progress=False, **arguments)
    else:
        fit(model, train, epsilon=epsilon, delta=trained.DELTA, reproducible_seed=seed, progress=False, **arguments)
    return model


def by_clipping(train: Pair, epsilon: float, seed: int, norm: float, lr: float) -> nn.Module:
    if math.isinf(epsilon):
        return without_privacy(train, seed)
    preset = Preset(
        name="ordinary",
        summary="pooling, 64 hidden units, ReLU",
        network=ordinary,
        # Read for its loss alone: the network trains without bounds.
        bound=lambda net, shape: DPLipModel(
            net, input_shape=shape, input_norm=math.sqrt(math.prod(shape)), loss=losses.TauCrossEntropy(1.0)
        ),
        settings={"epochs": EPOCHS, "batch_size": BATCH},
        provenance="held-out training images",
    )
    contender = utility.Clipping(preset, norm=norm, lr=lr)
    net, _, _ = utility.clipped(
        contender, train, 10, create_accountant("prv"), epsilon=epsilon, delta=trained.DELTA, seed=seed, epochs=EPOCHS
    )
    return net


def without_privacy(train: Pair, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = ordinary(tuple(train[0].shape[1:]))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        for rows in torch.randperm(len(train[0]), generator=generator).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
    return net.eval()


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
    for norm in (0.1, 1.0):
        for step in (0.25, 0.5, 1.0, 2.0):
            lr = step / norm
            net = by_clipping(part, epsilon, 0, norm, lr)
            print(f"norm {norm:g}, lr {lr:g}: {100 * utility.accuracy(net, held):.2f} %", flush=True)


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=500, help="test images whose maps are measured")
    parser.add_argument("--tune", action="store_true", help="settings of DP-SGD on held-out training images")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="draw four images of the first seed by both networks: FILE-*.png")
    options = parser.parse_args()
    loaded = load_dataset("mnist", options.data_dir)
    data = loaded.train, loaded.test
    if options.tune:
        return tune(data[0], options.epsilon[0])
    runs: list[dict[str, Any]] = []
    for epsilon in options.epsilon:
        for seed in options.seeds:
            paired, mask = blocks(data, seed)
            for method in ("Lipschitz", "DP-SGD"):
                start = time.perf_counter()
                own = method == "Lipschitz"
                make = by_lipschitz if own else lambda *given: by_clipping(*given, **CLIPPING)
                model = make(data[0], epsilon, seed)
                found = measured(model, data[1], options.samples, TAU if own else 1.0)
                if options.plot is not None and seed == options.seeds[0]:
                    file = options.plot.with_stem(f"{options.plot.stem}-{method.lower()}-{epsilon:g}")
                    picture(model, data[1][0][:4], file, box=(0.0, 1.0))
                model = make(paired[0], epsilon, seed)
                maps = saliency(model, paired[1][0][: options.samples])
                found["block accuracy"] = utility.accuracy(model, paired[1])
                for share in (0.05, 0.1, 0.2):
                    found[f"block share at {share:g}"] = float(metrics.block_share(maps, mask, fraction=share).mean())
                seconds = round(time.perf_counter() - start, 1)
                named = {"method": method, "epsilon": None if math.isinf(epsilon) else epsilon, "seed": seed}
                runs.append({**named, **found, "seconds": seconds})
                print(json.dumps(runs[-1], indent=1), flush=True)
    print(table(runs))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        summary = {"delta": trained.DELTA, "samples": options.samples, "runs": runs, "torch": torch.__version__}
        options.out.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
