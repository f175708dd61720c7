"""Projections of convolution kernels on nearly orthogonal ones: time, and what is left of orthogonality.

Run `python benchmarks/projections.py` (two minutes on one core); it writes `benchmarks/results/projections.json` and
`projections.md`. `--quick` takes 64 channels in place of 256 and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clipless_dp import layers
from clipless_dp.constraints import OrthogonalConvolution
from clipless_dp.norms.operators import ConvOperator

RESULTS = Path(__file__).resolve().parent / "results"
IMAGE, POINTS, ROUNDS = 32, 12, 5

NOISE: dict[str, float | None] = {
    "none": 0.0,
    "1e-4": 1e-4,
    "1e-3": 1e-3,
    "1e-2": 1e-2,
    "3e-2": 3e-2,
    "1e-1": 1e-1,
    "random kernel": None,
}


def start(kernel: Tensor, noise: float | None) -> Tensor:
    """An orthogonal kernel with noise of a size beside that of its entries, or noise alone."""
    generator = torch.Generator().manual_seed(1)
    drawn = kernel.std() * torch.randn(kernel.shape, generator=generator)
    return drawn if noise is None else kernel + noise * drawn


def singular_values(kernel: Tensor) -> Tensor:
    """Of the convolution on a circle, in float64."""
    symbols = torch.fft.fft2(kernel.double(), s=(POINTS, POINTS)).permute(2, 3, 0, 1).flatten(0, 1)
    return torch.linalg.svdvals(symbols[: len(symbols) // 2 + 1])


def rows(channels: int) -> list[dict[str, Any]]:
    operator = ConvOperator((IMAGE, IMAGE), (1, 1), ((1, 1), (1, 1)), (1, 1), 1, 9)
    constraint = OrthogonalConvolution()
    torch.manual_seed(0)
    kernel = layers.orthogonal_(nn.Conv2d(channels, channels, 3, padding=1, bias=False)).weight.detach()
    found = []
    for name, noise in NOISE.items():
        times = []
        for _ in range(ROUNDS):
            weight = start(kernel, noise)
            begun = time.process_time()
            constraint.project_(weight, (operator,))
            times.append(time.process_time() - begun)
        before, after = singular_values(start(kernel, noise)), singular_values(weight)
        found.append(
            {
                "noise": name,
                "seconds": min(times),
                "before": [float(before.min()), float(before.max())],
                "after": [float(after.min()), float(after.max())],
                "root_mean_square": float((after / after.mean() - 1.0).square().mean().sqrt()),
            }
        )
    return found


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Projections on nearly orthogonal convolutions",
        "",
        f"{report['machine']}, one thread, processor time, the least of {ROUNDS}, torch {report['torch']}. Kernels of "
        f"{report['channels']} channels, 3×3, on {IMAGE}×{IMAGE} pixels with zero padding; noise beside the size of an "
        "orthogonal kernel's entries; singular values on a circle. Regenerate with `python benchmarks/projections.py`.",
        "",
        "| noise | seconds | singular values before | after | root mean square from their mean |",
        "| --- | ---: | --- | --- | ---: |",
    ]
    lines += [
        f"| {row['noise']} | {row['seconds']:.2f} | {row['before'][0]:.3f} to {row['before'][1]:.3f} "
        f"| {row['after'][0]:.4f} to {row['after'][1]:.4f} | {row['root_mean_square']:.1e} |"
        for row in report["rows"]
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 channels, nothing written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    channels = 64 if quick else 256
    report = {
        "machine": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "channels": channels,
        "rows": rows(channels),
    }
    text = markdown(report)
    print(text)
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "projections.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / "projections.md").write_text(text)


if __name__ == "__main__":
    main()
