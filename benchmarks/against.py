"""A step of this checkout against one of another revision: whether a change has made it slower.

    python benchmarks/against.py 86015e3
    python benchmarks/against.py HEAD~1 --cells mlp:256:gated cnn5:256:spectral --rounds 20

For each cell (network, batch size, route) two processes take turns on the same core, each with the library of its own
revision, in bursts of a few steps: private ones as ``benchmarks/step.py`` has them. The figure is the median over pairs
of bursts of the ratio of processor times, with its quartiles. Where two processes of one revision differ (compare a
revision with itself), less than that difference says nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
CELLS = [f"{network}:256:{route}" for network in ("mlp", "cnn5") for route in ("gated", "gradient", "spectral")]
SAMPLES, WARM_UP = 20_000, 5


def step_of(network: str, batch: int, route: str) -> Callable[[], None]:
    """What takes a private step, with the library that is first on the path."""
    import networks

    from clipless_dp import CliplessDPSGD, DPLipModel, PoissonBatches, constraints, gated, gradient_gated, losses

    net: nn.Module = networks.network(network)
    if route in ("gated", "gradient"):
        net = gated(net) if route == "gated" else gradient_gated(net)
    constraint = {"spectral": constraints.Spectral, "orthogonal": constraints.Orthogonal}.get(route)
    model = DPLipModel(
        net,
        input_shape=(1, 28, 28),
        input_norm=8.0,
        loss=losses.TauCrossEntropy(8.0),
        constraint=None if constraint is None else constraint(),
    )
    rate = batch / SAMPLES
    optimizer = CliplessDPSGD(model, lr=0.01, noise_multiplier=1.0, sample_rate=rate, dataset_size=SAMPLES)
    data = torch.rand(SAMPLES, 1, 28, 28), torch.randint(10, (SAMPLES,))
    rows = max(8, int(batch**0.5) // 2)
    batches = iter(PoissonBatches(data, sample_rate=rate, steps=10**6, physical_batch_size=rows))

    # By hand: earlier revisions have no benchmarks/steps.py.
    def step() -> None:
        inputs, targets, mask = next(batches)
        optimizer.zero_grad()
        model.loss(model(inputs), targets, mask).backward()
        optimizer.step()

    return step


def serve(tree: str, cell: str) -> None:
    """Takes as many steps as each line of the standard input says, and prints the processor time of one."""
    sys.path.insert(0, tree)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, batch, route = cell.split(":")
    step = step_of(network, int(batch), route)
    for _ in range(WARM_UP):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        before = time.thread_time()
        for _ in range(int(line)):
            step()
        print((time.thread_time() - before) / int(line), flush=True)


@contextmanager
def served(tree: Path, cell: str) -> Iterator[Callable[[int], float]]:
    """A process that takes so many steps of a revision, and says what one took."""
    # As an allocator that keeps memory: what it costs to hand pages back is no revision's.
    keeps = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "67108864"}
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(tree), cell],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **keeps},
    )
    asked, told = process.stdin, process.stdout
    assert asked is not None
    assert told is not None
    if told.readline().strip() != "ready":
        raise SystemExit(f"{cell} does not run in {tree}")

    def burst(steps: int) -> float:
        asked.write(f"{steps}\n")
        asked.flush()
        return float(told.readline())

    try:
        yield burst
    finally:
        asked.close()
        process.wait()


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The files of a revision, for the time being."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), revision], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def compared(tree: Path, cell: str, rounds: int, seconds: float) -> list[object]:
    """A row of the table."""
    with served(tree, cell) as other, served(ROOT, cell) as here:
        steps = max(1, round(seconds / here(3)))
        times: list[tuple[float, float]] = []
        for _ in range(rounds):
            if random.random() < 0.5:
                before = other(steps)
                times.append((before, here(steps)))
            else:
                after = here(steps)
                times.append((other(steps), after))
    low, median, high = statistics.quantiles([after / before for before, after in times], n=4)
    before, after = (1e3 * statistics.median(some) for some in zip(*times, strict=True))
    return [cell, f"{before:.2f}", f"{after:.2f}", f"{median:.3f}", f"{low:.3f}–{high:.3f}"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD", help="what git knows the other one by")
    parser.add_argument("--cells", nargs="+", default=CELLS, help="network:batch size:route, as in benchmarks/step.py")
    parser.add_argument("--rounds", type=int, default=30, help="pairs of bursts")
    parser.add_argument("--seconds", type=float, default=0.2, help="about so long is a burst")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve)
        return
    with checkout(given.revision) as tree:
        rows = [compared(tree, cell, given.rounds, given.seconds) for cell in given.cells]
    print(tabulate(rows, ["cell", f"{given.revision}, ms", "here, ms", "ratio", "quartiles"], "github"))


if __name__ == "__main__":
    main()
