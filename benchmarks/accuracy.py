"""MNIST and CIFAR-10 at δ = 1e-5, and ε = 3 unless told otherwise: the presets side by side.

    python benchmarks/accuracy.py --data-dir DIR --preset mnist-gated --seeds 0 1 2
    python benchmarks/accuracy.py --data-set cifar10 --data-dir DIR --cache-dir DIR --preset photographs-linear \\
        --epsilon 1 3 8 --seeds 0 1 2
    python benchmarks/accuracy.py --data-set cifar10 --data-dir DIR --preset photographs-gradient --epsilon 8

Hyper-parameters were chosen on held-out training images (``--validate`` shows them), never on the test set.
Without ``--data-dir`` the images are downloaded from OpenML; with ``--cache-dir`` features are computed once. Writes
JSON with ``--out``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from clipless_dp import presets
from clipless_dp.datasets import load_dataset

HELD_OUT = {"mnist": 10_000, "cifar10": 5_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-set", choices=sorted(HELD_OUT), default="mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="mnist-gated")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[3.0])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, help="in place of the preset's")
    parser.add_argument("--validate", action="store_true", help="evaluate on the last training images, held out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    preset = presets.get(options.preset)
    changes = {} if options.epochs is None else {"epochs": options.epochs}
    data = load_dataset(options.data_set, options.data_dir)
    train, test = data.train, data.test
    if options.validate:
        cut = len(train[0]) - HELD_OUT[options.data_set]
        test = (train[0][cut:], train[1][cut:])
        train = (train[0][:cut], train[1][:cut])
    seconds_of_features = 0.0
    if preset.front is not None:
        # Once for all runs: they are functions of each sample by itself.
        start = time.perf_counter()
        front = preset.front_of(tuple(train[0].shape[1:]), cache_dir=options.cache_dir)
        train, test = (
            (preset.features(inputs, cache_dir=options.cache_dir, front=front, progress=True), targets)
            for inputs, targets in (train, test)
        )
        preset = dataclasses.replace(preset, front=None, recipe=None)
        seconds_of_features = time.perf_counter() - start
        print(f"{preset.name}: {train[0].shape[1]} features in {seconds_of_features:.0f} s", flush=True)
    runs = []
    # All ε of a seed before the next seed: whoever stops has something at each.
    for seed, target in itertools.product(options.seeds, options.epsilon):
        torch.manual_seed(seed)
        start = time.perf_counter()
        trained = preset.fit(
            train,
            epsilon=target,
            delta=options.delta,
            outputs=data.classes,
            reproducible_seed=seed,
            progress=False,
            **changes,
        )
        seconds = time.perf_counter() - start
        accuracy, _ = trained.evaluate(test)
        assert accuracy is not None
        result = trained.result
        runs.append(
            {
                "seed": seed,
                "target": target,
                "lr": preset.arguments(len(train[0]), epsilon=target)["lr"],
                "accuracy": accuracy,
                "epsilon": result.epsilon,
                "seconds": round(seconds, 1),
            }
        )
        print(f"{preset.name}: seed {seed}, accuracy {100 * accuracy:.2f} %, {result}, {seconds:.0f} s", flush=True)
        # After each run: whoever stops has what is done.
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            summary = {
                "data set": options.data_set,
                "preset": preset.name,
                "split": "validation" if options.validate else "test",
                "delta": options.delta,
                "settings": {name: value for name, value in {**preset.settings, **changes}.items() if name != "lr"},
                "seconds of features": round(seconds_of_features, 1),
                "runs": runs,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "processor": platform.machine(),
            }
            options.out.write_text(json.dumps(summary, indent=2) + "\n")
    for target in options.epsilon:
        accuracies = [run["accuracy"] for run in runs if run["target"] == target]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        shown = f"{100 * statistics.mean(accuracies):.2f} ± {100 * spread:.2f} % over {len(accuracies)} seed(s)"
        print(f"{preset.name}, ε = {target:g}: {shown}")


if __name__ == "__main__":
    main()
