"""MNIST dealt to 6 000 people of 10 images: ε = 3 for a person, by four roads; and what weights cost a step.

    python benchmarks/people.py --data-dir DIR --seeds 0 1 2
    python benchmarks/people.py --cost

Scattering features, projected on 1024 public directions, and one dense layer behind a gradient gate. Who has which
image is drawn once, by a public seed. The roads:

people       10 rows of each person who is drawn, averaged past the gates (``groups=``);
as samples   a person is one sample of ten images, and the gradient of their mean loss is gated: what clipping by person
             does. It needs ten images of everybody, and is here to say what gates of rows lose;
one row      one image of each person, the others thrown away;
rows         60 000 rows at an ε so small that ten of them are worth ε = 3 by the rule of groups,
             ``ε/k`` and ``δ/(k·exp((k-1)ε/k))`` (Dwork and Roth 2014, Theorem 2.2, with its δ).

``--cost`` times a step of people against one of the same rows without groups, on a small convolutional network.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipless_dp import CliplessDPSGD, DPLipModel, PoissonBatches, fit, gradient_gated, losses, presets
from clipless_dp.datasets import load_dataset
from clipless_dp.training import FitResult, evaluate

EPSILON, DELTA = 3.0, 1e-5
ROWS_EACH = 10
WIDTH = 1024
SETTINGS: dict[str, Any] = {"batch_size": 512, "progress": False, "audit": False}
SETTINGS_OF = {"people": (0.8, 0.02), "as samples": (0.8, 0.05), "one row": (0.8, 0.05), "rows": (0.8, 0.05)}
EPOCHS_OF = {"people": 40, "as samples": 20, "one row": 20, "rows": 20}
"""Learning rates, floors of the gates as shares of their caps, and epochs: chosen with ``--validate`` alone."""

ROADS = tuple(SETTINGS_OF)


def linear(features: int) -> nn.Module:
    net = nn.Sequential(nn.Linear(features, 10))
    nn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
    nn.init.zeros_(net[0].bias)  # type: ignore[arg-type]
    return net


def wrapped(features: int, floor: float, *, each: int | None = None) -> DPLipModel:
    """The layer behind a gate that normalises; of a sample of so many images, or of one."""
    shape = (features,) if each is None else (each, features)
    loss = losses.TauCrossEntropy(10.0) if each is None else losses.TokenCrossEntropy(tau=10.0)
    norm = 1.01 * math.sqrt(each or 1)
    return DPLipModel(gradient_gated(linear(features), floor=floor), input_shape=shape, input_norm=norm, loss=loss)


def of_rows(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """What a row may spend, so that groups of ``size`` are worth no more."""
    own = epsilon / size
    return own, delta / (size * math.exp((size - 1) * own))


def trained(
    road: str, train: tuple[Tensor, Tensor], ids: np.ndarray[Any, Any], seed: int, lr: float, floor: float
) -> tuple[nn.Module, FitResult]:
    torch.manual_seed(seed)
    inputs, targets = train
    width = inputs.shape[1]
    terms = {"epsilon": EPSILON, "delta": DELTA, "reproducible_seed": seed, "lr": lr, "epochs": EPOCHS_OF[road]}
    terms |= SETTINGS
    if road == "people":
        model = wrapped(width, floor)
        return model, fit(model, train, groups=ids, rows_per_group=ROWS_EACH, **terms)
    if road == "rows":
        model = wrapped(width, floor)
        epsilon, delta = of_rows(EPSILON, DELTA, ROWS_EACH)
        return model, fit(model, train, **{**terms, "epsilon": epsilon, "delta": delta})
    order = torch.from_numpy(np.argsort(ids, kind="stable").reshape(-1, ROWS_EACH))
    if road == "one row":
        model = wrapped(width, floor)
        return model, fit(model, (inputs[order[:, 0]], targets[order[:, 0]]), **terms)
    several = wrapped(width, floor, each=ROWS_EACH)
    result = fit(several, (inputs[order], targets[order]), **terms)
    model = wrapped(width, floor)
    model.net.load_state_dict(several.net.state_dict())
    return model, result


def projected(features: Tensor) -> Tensor:
    """Unit vectors of fewer entries, by which a run takes a quarter of the time."""
    generator = torch.Generator().manual_seed(20240507)
    directions = torch.randn(features.shape[1], WIDTH, generator=generator)
    return nn.functional.normalize(torch.cat([some @ directions for some in features.split(4096)]))


def accuracies(options: argparse.Namespace) -> None:
    data = load_dataset("mnist", options.data_dir)
    preset = presets.get("features-linear")
    features, held_out = (
        projected(preset.features(part, cache_dir=options.cache_dir)) for part in (data.inputs, data.test_inputs)
    )
    ids = np.random.default_rng(20240507).permutation(np.arange(len(features)) // ROWS_EACH)
    train, test = (features, data.targets), (held_out, data.test_targets)
    if options.validate:
        inside = torch.from_numpy(ids < len(ids) // ROWS_EACH * 5 // 6)
        test, train = tuple(part[~inside] for part in train), tuple(part[inside] for part in train)
        ids = ids[inside.numpy()]
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        for road in options.roads:
            start = time.perf_counter()
            model, result = trained(road, train, ids, seed, *(options.settings or SETTINGS_OF[road]))
            accuracy, _ = evaluate(model, test)
            assert accuracy is not None
            found.setdefault(road, []).append(accuracy)
            print(
                f"{road}: seed {seed}, {100 * accuracy:.2f} %, {result}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    for road, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{road}: {100 * statistics.mean(values):.2f} ± {100 * spread:.2f} %")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def cost(repeats: int) -> None:
    """Seconds a row in a step, of people's rows and of the same number without groups, the two taken in turn."""
    for kind, sizes in (("10 rows each", [10] * 300), ("1 to 50 rows", list(range(1, 51)) * 6)):
        ids = np.repeat(np.arange(len(sizes)), sizes)
        rows = torch.randn(len(ids), 1, 28, 28), torch.randint(10, (len(ids),))
        ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "mean": {"groups": ids, "rows_per_group": 50, "group_weights": "mean"},
            "cap": {"groups": ids, "rows_per_group": 50, "group_weights": "cap"},
        }
        steps: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        runs = {way: run(rows, len(sizes) if given else len(ids), repeats + 3, **given) for way, given in ways.items()}
        for turn in range(repeats + 3):
            for way, one in runs.items():
                found = next(one)
                if turn >= 3:
                    steps[way].append(found)
        each = {way: sum(time for time, _ in found) / sum(rows for _, rows in found) for way, found in steps.items()}
        for way in ("mean", "cap"):
            print(f"{kind}, {way}: {each[way] / each['plain']:.3f} of a step of as many rows without groups")


def run(rows: tuple[Tensor, Tensor], size: int, steps: int, **groups: Any) -> Iterator[tuple[float, int]]:
    """Steps of a model of its own, draws included: the seconds, and how many rows took part."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 4, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(800, 10),
    )  # fmt: skip
    model = DPLipModel(gradient_gated(net), input_shape=(1, 28, 28), input_norm=28.0, loss=losses.TauCrossEntropy(8.0))
    optimizer = CliplessDPSGD(
        model, lr=0.1, noise_multiplier=1.0, sample_rate=0.2, dataset_size=size, unit="person" if groups else "row"
    )
    drawn = iter(PoissonBatches(rows, sample_rate=0.2, steps=steps, **groups))
    for _ in range(steps):
        start = time.process_time()
        batch = next(drawn)
        optimizer.zero_grad()
        optimizer.accumulate(batch)
        optimizer.step()
        yield time.process_time() - start, int(batch.mask.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--roads", nargs="+", choices=ROADS, default=ROADS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--settings", nargs=2, type=float, metavar=("LR", "FLOOR"), help="in place of the chosen ones")
    parser.add_argument("--validate", action="store_true", help="hold out a sixth of the people")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    if options.cost:
        cost(options.repeats)
    else:
        accuracies(options)


if __name__ == "__main__":
    main()
