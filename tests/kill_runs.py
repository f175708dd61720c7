"""Kills training runs with SIGKILL at random moments, and prints as JSON what was lost and what was never counted.

    python tests/kill_runs.py FOLDER --kills 60 --noise reproducible

Each run is a forked process that trains with a checkpoint on a slow disk. It leaves two witnesses behind, written
without delay: the steps that it took, and the steps whose results it showed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clipless_dp import DPLipModel, fit, gated, losses, training
from clipless_dp import checkpoint as checkpoint_module
from clipless_dp.checkpoint import load_checkpoint

STEPS = 72
SIGMA = 3.0
"""Enough for ε = 4."""


def model() -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    return DPLipModel(gated(net), input_shape=(6,), input_norm=1.0, loss=losses.TauCrossEntropy(2.0))


def run(folder: Path, seed: int | None, every: int) -> None:
    """Trains to the end, and writes the weights."""
    taken, shown = (os.open(folder / name, os.O_CREAT | os.O_APPEND | os.O_WRONLY) for name in ("taken", "shown"))
    honest_sync = os.fsync

    class Witness(training.Watcher):
        def after_step(self, run: Any) -> None:
            os.write(taken, b"%d\n" % run.step)

        def before_showing(self, run: Any) -> None:
            os.write(shown, b"%d\n" % run.step)

    def slow(descriptor: int) -> None:
        time.sleep(0.02)
        honest_sync(descriptor)

    checkpoint_module.os.fsync = slow
    inputs = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    wrapped = model()
    with training.watched_by(Witness()):
        # Calibration takes longer than all the rest.
        fit(
            wrapped, (inputs, inputs[:, :3].argmax(1)), epsilon=4.0, delta=1e-3, noise_multiplier=SIGMA, epochs=12,
            batch_size=50, lr=0.5, accountant="rdp", progress=False, checkpoint=folder / "run.pt",
            checkpoint_every=every, reproducible_seed=seed,
        )  # fmt: skip
    torch.save([p.detach() for p in wrapped.net.parameters()], folder / "weights.pt")


def forked(folder: Path, seed: int | None, every: int) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(folder, seed, every)
            status = 0
        finally:
            os._exit(status)
    return child


def await_start(folder: Path) -> None:
    """Returns when a run has taken its first step, or has nothing left to do."""
    limit = time.perf_counter() + 60.0
    while not last(folder / "taken") and not (folder / "weights.pt").exists() and time.perf_counter() < limit:
        time.sleep(0.002)


def last(path: Path) -> int:
    numbers = path.read_text().split() if path.exists() else []
    return int(numbers[-1]) if numbers else 0


def ledger(folder: Path) -> int:
    """Steps that the checkpoint's ledger counts; 0 without a checkpoint."""
    if not (folder / "run.pt").exists():
        return 0
    own = load_checkpoint(folder / "run.pt")["optimizer"]["clipless_dp"]
    counted = sum(line["count"] for line in own["accountant"]["ledger"]["entries"])
    assert counted == own["steps_taken"]
    return int(counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--noise", choices=("reproducible", "system"), default="reproducible")
    parser.add_argument("--every", type=int, default=1, help="epochs between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Imports what torch imports late, so that not every run does.
    torch.optim.SGD(model().parameters(), lr=1.0)
    moments = random.Random(options.seed)
    seed = 7 if options.noise == "reproducible" else None
    whole, folder = options.folder / "whole", options.folder / "killed"
    for path in (whole, folder):
        path.mkdir(parents=True)
    child = forked(whole, seed, options.every)
    await_start(whole)
    start = time.perf_counter()
    assert os.waitpid(child, 0)[1] == 0
    duration = time.perf_counter() - start
    seen: dict[str, Any] = {
        "attempted": 0,
        "kills": 0,
        "lost": [],
        "equal": True,
        "uncounted": 0,
        "went_back": 0,
        "mid_write": 0,
    }
    finished, before = 0, 0
    while seen["kills"] < options.kills:
        (folder / "taken").unlink(missing_ok=True)
        child = forked(folder, seed, options.every)
        seen["attempted"] += 1
        if moments.random() < 0.9:
            await_start(folder)
        # A share of the time to the end, so that several kills fit into one run.
        time.sleep(moments.uniform(0.0, duration * moments.choice([0.2, 0.4, 1.0])))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        seen["mid_write"] += any(folder.glob(".run.pt.*.partial"))
        now = ledger(folder)
        seen["went_back"] += now < before
        seen["uncounted"] += now < last(folder / "shown")
        if killed:
            seen["kills"] += 1
            seen["lost"].append(max(0, last(folder / "taken") - now))
        before = now
        if now == STEPS:
            finished += 1
            seen["equal"] = same(whole, folder, seed, options.every) and seen["equal"]
            for path in folder.iterdir():
                path.unlink()
            before = 0
    seen["equal"] = same(whole, folder, seed, options.every) and seen["equal"]
    seen["finished"] = finished + 1
    seen["litter"] = sorted(
        path.name for path in folder.iterdir() if path.name not in {"run.pt", "weights.pt", "taken", "shown"}
    )
    seen["final"] = ledger(folder)
    print(json.dumps(seen))


def same(whole: Path, folder: Path, seed: int | None, every: int) -> bool:
    """Goes on to the end; whether the weights are those of the run that was left alone."""
    if os.waitpid(forked(folder, seed, every), 0)[1] != 0:
        return False
    return all(map(torch.equal, *(torch.load(path / "weights.pt", weights_only=True) for path in (whole, folder))))


if __name__ == "__main__":
    main()
