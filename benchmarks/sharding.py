"""What a rank holds where a model is whole on each, split as one unit, or split layer by layer (``fully_shard``).

    python benchmarks/sharding.py                 # writes results/sharding.json, prints a table
    python benchmarks/sharding.py --quick

Two gloo processes of one thread train gated layers of one width on batches of four, with momentum. *Held*: bytes of a
rank's weights and momentum. *Step*: the most bytes of tensors beyond those, during passes, sum and update (the median
of steps, since what gloo's threads hold varies). *Time*: seconds of a step, relative to whole weights, medians of steps
that the layouts take in turns; on cores that processes share, most of it is waiting for one another.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step import RESULTS

from clipless_dp import CliplessDPSGD, DPLipModel, gated, losses
from clipless_dp.distributed.placement import local
from clipless_dp.training.memory import traffic

LAYOUTS = ("whole on each rank", "split as one", "split by layer")
RANKS = 2
BATCH = 4


class Training:
    """A model in one layout, and steps of it."""

    def __init__(self, layout: str, width: int, depth: int) -> None:
        torch.manual_seed(0)
        net = gated(nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))))
        self.model = DPLipModel(net, input_shape=(width,), input_norm=1.0, loss=losses.TauCrossEntropy(1.0))
        if layout != LAYOUTS[0]:
            from torch.distributed.fsdp import fully_shard

            for part in net.children() if layout == LAYOUTS[2] else ():
                if list(part.parameters()):
                    fully_shard(part)
            fully_shard(self.model)
        self.optimizer = CliplessDPSGD(
            self.model, 0.1, 0.9, noise_multiplier=1.0, sample_rate=0.1, dataset_size=100, sampling="poisson"
        )
        self.batch = torch.randn(BATCH, width), torch.zeros(BATCH, dtype=torch.int64), torch.ones(BATCH).bool()
        # What is set up once is no part of a step.
        self.step()

    def step(self) -> None:
        """One private step, which leaves no gradients."""
        self.optimizer.accumulate(self.batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> int:
        """Bytes of this rank's weights and momentum."""
        tensors = [*self.model.net.parameters()]
        tensors += [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def _rank(rank: int, store: str, options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    rows = []
    for depth in options.depths:
        runs = {layout: Training(layout, options.width, depth) for layout in LAYOUTS}
        seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        for _ in range(options.rounds):
            for layout, run in runs.items():
                start = time.perf_counter()
                run.step()
                seconds[layout].append(time.perf_counter() - start)
        base = statistics.median(seconds[LAYOUTS[0]])
        for layout, run in runs.items():
            peaks = [traffic(run.step, torch.device("cpu")).peak for _ in range(options.rounds)]
            rows.append(
                {
                    "depth": depth,
                    "layout": layout,
                    "held": run.held(),
                    "step": statistics.median(peaks),
                    "seconds": statistics.median(seconds[layout]),
                    "ratio": statistics.median(seconds[layout]) / base,
                }
            )
    if rank == 0:
        Path(options.output).write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each depth and layout."""
    lines = ["| layers | layout | held, MiB | step, MiB | time, ratio |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        held, step = row["held"] / 2**20, row["step"] / 2**20
        lines.append(f"| {row['depth']} | {row['layout']} | {held:.1f} | {step:.1f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small layers, few rounds, nothing written")
    options = parser.parse_args()
    if options.quick:
        options.width, options.depths, options.rounds = 64, [4], 3
    with tempfile.TemporaryDirectory() as folder:
        options.output = str(Path(folder) / "rows.json")
        torch.multiprocessing.spawn(_rank, (str(Path(folder) / "store"), options), nprocs=RANKS)
        rows = json.loads(Path(options.output).read_text(encoding="utf-8"))
    if not options.quick:
        report = {"machine": platform.machine(), "torch": torch.__version__, "width": options.width, "rows": rows}
        (RESULTS / "sharding.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
