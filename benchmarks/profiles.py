"""Where the time of a step goes: the operations behind a ratio of ``benchmarks/step.py``, each with its rate.

    python benchmarks/profiles.py                                            # writes results/profiles.md
    python benchmarks/profiles.py --networks mlp --contenders gated spectral # prints some

One step is that of ``benchmarks/step.py``. Torch's profiler says what each operation takes by itself, and how often
it runs in a step; matrix products, Gram matrices and factorisations have floating-point operations, and so a rate, to
hold against the rate at which plain SGD's own products run. What is no operation of torch's is told by where it is:
the numbers of the noise are drawn by NumPy and a cipher, projections check and factor there too, and the remainder is
Python between operations. A profiler slows what it looks at, small operations most, so that the sums are above the
times of ``step.py``; shares are what to read.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step import ALLOCATORS, CELLS, CONTENDERS, RESULTS, SAMPLES

from clipless_dp import constraints
from clipless_dp.noise import SystemNoise
from clipless_dp.precision import full_precision

STEPS = 20
SHOWN = 12
COMPARED = ("SGD", "gated", "gradient gates", "spectral", "orthogonal")
SPANS: dict[str, tuple[type[Any], str]] = {
    "numbers of the noise": (SystemNoise, "standard_normal_"),
    "projection, spectral": (constraints.Spectral, "project_"),
    "projection, orthogonal": (constraints.Orthogonal, "project_"),
}
"""What is looked at as a whole, too: methods of classes."""


@contextlib.contextmanager
def spans() -> Iterator[None]:
    """Calls of :data:`SPANS` are told to the profiler by name."""
    with contextlib.ExitStack() as stack:
        for name, (owner, method) in SPANS.items():
            stack.enter_context(mock.patch.object(owner, method, _told(name, getattr(owner, method))))
        yield


def _told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def told(*args: Any) -> Any:
        with record_function(name):
            return call(*args)

    return told


def rows_of(kind: str, batch: int, contender: str) -> tuple[float, list[list[str]]]:
    """Milliseconds of a step under the profiler, and of its operations, longest first."""
    torch.manual_seed(0)
    data = torch.rand(SAMPLES, 1, 28, 28), torch.randint(10, (SAMPLES,))
    with spans():
        step = CONTENDERS[contender](kind, data, batch)
        for _ in range(5):
            step()
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled, record_function("step"):
            for _ in range(STEPS):
                step()
    found = [one for one in profiled.key_averages() if one.device_type == DeviceType.CPU]
    whole = next(one.cpu_time_total for one in found if one.key == "step") / STEPS / 1e3
    rows = []
    for one in sorted(found, key=lambda one: -one.self_cpu_time_total):
        took = one.self_cpu_time_total / STEPS / 1e3
        name = "between operations" if one.key == "step" else one.key
        name = f"{name}, but for its operations" if one.key in SPANS else name
        rate = f"{one.flops / one.self_cpu_time_total / 1e3:.0f}" if one.flops else ""
        rows.append([name, f"{one.count / STEPS:g}", f"{took:.2f}", f"{100 * took / whole:.0f} %", rate])
    return whole, rows[:SHOWN]


def section(kind: str, batch: int, contender: str) -> str:
    """A table of one contender in one cell."""
    whole, rows = rows_of(kind, batch, contender)
    heads = ["operation", "calls", "ms", "share", "GFLOP/s"]
    title = f"## {contender}, {kind}, batch {batch}: {whole:.1f} ms a step"
    return f"{title}\n\n{tabulate(rows, heads, tablefmt='github', disable_numparse=True)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(CELLS), default=["mlp", "wide"])
    parser.add_argument("--batches", nargs="+", type=int, help="by default the smallest of each network's own")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(COMPARED))
    parser.add_argument("--out", type=Path, default=RESULTS / "profiles.md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        torch.set_num_threads(1)
        kind, batch, contender = options.child
        with full_precision():
            print(section(kind, int(batch), contender))
        return
    written = [
        "# Where the time of a step goes\n\n"
        f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}, means of {STEPS} steps, allocator that keeps "
        f"memory; the {SHOWN} longest operations. `python benchmarks/profiles.py` says how to read it.\n"
    ]
    for kind in options.networks:
        for batch in options.batches or CELLS[kind][:1]:
            for contender in options.contenders:
                command = [sys.executable, __file__, "--child", kind, str(batch), contender]
                environment = {**os.environ, **ALLOCATORS["keeps memory"]}
                answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                written.append(answer.stdout[answer.stdout.index("## ") :].rstrip() + "\n")
                print(written[-1], flush=True)
    if (options.networks, options.contenders, options.batches) == (["mlp", "wide"], list(COMPARED), None):
        options.out.write_text("\n".join(written), "utf-8")


if __name__ == "__main__":
    main()
