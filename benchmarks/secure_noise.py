"""What cryptographic noise costs: a whole private step with each source, taking turns.

    python benchmarks/secure_noise.py                           # writes results/secure_noise.json
    python benchmarks/secure_noise.py --rounds 5 --device cuda

Both sources take turns, in a random order each round, so that what else the machine does hits both alike. The figures
are medians over rounds: of the time of adding the noise alone, of a step on an expected batch of 256, and of the ratio
of the two sources in the same round.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from steps import private_step

from clipless_dp import CliplessDPSGD, DPLipModel, PoissonBatches, gated, losses
from clipless_dp.noise import add_normal_, noise_source

SOURCES = ("system", "secure")
WIDTHS = {"64k parameters": 72, "1M parameters": 680}
BATCH, SIZE = 256, 8192


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU(),
        nn.Linear(width, 10, bias=False),
    )  # fmt: skip


def stepper(width: int, source: str, device: str, steps: int) -> Callable[[], None]:
    torch.manual_seed(0)
    net = gated(mlp(width), cotangent_mode="normalize")
    model = DPLipModel(net, input_shape=(784,), input_norm=28.0, loss=losses.TauCrossEntropy(8.0)).to(device)
    optimizer = CliplessDPSGD(
        model, lr=0.1, noise_multiplier=1.0, sample_rate=BATCH / SIZE, dataset_size=SIZE, accountant="rdp", noise=source
    )
    data = torch.rand(SIZE, 784), torch.randint(10, (SIZE,))
    batches = iter(PoissonBatches(data, sample_rate=BATCH / SIZE, steps=steps, device=device))
    return private_step(model, optimizer, batches)


def adder(width: int, source: str, device: str) -> Callable[[], None]:
    tensors = [torch.zeros_like(parameter, device=device) for parameter in mlp(width).parameters()]
    noise = noise_source(source)

    def add() -> None:
        noise.begin_step(0)
        add_normal_([tensor.detach() for tensor in tensors], [1.0] * len(tensors), noise)

    return add


def measure(contenders: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, Any]:
    # On one core, processor time leaves out what other processes do meanwhile.
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name in random.sample(list(contenders), len(contenders)):
            start = clock()
            contenders[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if index:  # The first round warms caches and allocators.
                times[name].append(clock() - start)
    ratios = [secure / system for system, secure in zip(times["system"], times["secure"], strict=True)]
    medians = {f"{name}_ms": round(1e3 * statistics.median(values), 3) for name, values in times.items()}
    return {**medians, "ratio": round(statistics.median(ratios), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "secure_noise.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name, width in WIDTHS.items():
        count = sum(parameter.numel() for parameter in mlp(width).parameters())
        noise = measure({s: adder(width, s, options.device) for s in SOURCES}, options.rounds, options.device)
        steppers = {s: stepper(width, s, options.device, options.rounds + 1) for s in SOURCES}
        step = measure(steppers, options.rounds, options.device)
        results.append({"network": name, "parameters": count, "noise": noise, "step": step})
        print(json.dumps(results[-1]))
    on = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    options.out.write_text(json.dumps({"torch": torch.__version__, "on": on, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
