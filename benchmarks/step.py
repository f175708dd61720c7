"""One training step, sampling included: plain SGD, SGD with noise, this library's routes, and the clipping libraries.

    python benchmarks/step.py                                   # all, 2 allocators; writes results/step.{json,md}
    python benchmarks/step.py --networks cnn5 --batches 256 --allocators "keeps memory"
    python benchmarks/step.py --quick --networks mlp --batches 256

The same network, data, expected batch and device for all. Contenders take turns, in a new random order each round, so
that what else the machine does hits all alike; the figures are medians over rounds of the time of one step, and of its
ratio to the fastest plain SGD of that cell in the same round: as it is, channels last, or compiled, whichever has the
lowest median. Beside it is the ratio to Opacus's fastest mode. Each network and batch size runs in a process of its
own. Memory is the peak of the bytes that tensors hold during a step (weights, gradients and batch included, the data
set not). docs/speed.md has the method.

On the CPU everything is run twice: with the C library's default allocator, which hands large blocks back to the system
at every step and pays for their pages anew, and with one that keeps them, as a GPU's caching allocator does
(``MALLOC_MMAP_MAX_=0``, ``MALLOC_TRIM_THRESHOLD_``). Libraries that allocate much are slowed more by the first.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from networks import network
from steps import private_step

from clipless_dp import CliplessDPSGD, DPLipModel, PoissonBatches, constraints, gated, gradient_gated, losses
from clipless_dp.noise import SystemNoise
from clipless_dp.precision import full_precision
from clipless_dp.sampling import PoissonBatchSampler
from clipless_dp.training.memory import traffic

RESULTS = Path(__file__).resolve().parent / "results"
SAMPLES = 20_000
STEPS = 100_000
RATE_OF_LEARNING, NOISE = 0.01, 1.0
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "keeps memory": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "67108864"},
}
BASELINE = "SGD"
PLAIN = (BASELINE, "SGD, channels last", "SGD, compiled")
OPACUS = ("Opacus, hooks", "Opacus, ghost")
CELLS: dict[str, tuple[int, ...]] = {
    "mlp": (256, 2048),
    "wide": (512,),
    "cnn5": (256, 2048),
    "vgg": (128,),
    "cnn": (256, 2048),
}
"""Networks by name, and the batch sizes that each is timed at."""
USUAL = ("mlp", "wide", "cnn5", "vgg")

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""Processor time is that of all threads of the process: on a machine that others use, of one thread, the steadier."""

Step = Callable[[], None]
Data = tuple[Tensor, Tensor]


def shuffled(data: Data, batch: int) -> Iterator[Data]:
    """What plain training does: batches of one size from a permutation of the data, epoch after epoch."""
    inputs, targets = data
    while True:
        for indices in torch.randperm(len(inputs), device=inputs.device).split(batch):
            if len(indices) == batch:
                yield inputs[indices], targets[indices]


def poisson(data: Data, batch: int) -> Iterator[Data]:
    """Poisson draws as they are, unpadded, for the clipping libraries."""
    inputs, targets = data
    for indices in PoissonBatchSampler(len(inputs), sample_rate=batch / len(inputs), steps=STEPS).draws():
        chosen = torch.from_numpy(indices).to(inputs.device)
        yield inputs[chosen], targets[chosen]


def sgd(
    kind: str, data: Data, batch: int, *, noise: bool = False, compiled: bool = False, channels_last: bool = False
) -> Step:
    net = network(kind).to(data[0].device, memory_format=torch.channels_last if channels_last else None)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE_OF_LEARNING)
    batches = shuffled(data, batch)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(net(inputs), targets)

    loss = torch.compile(loss, fullgraph=True) if compiled else loss

    def step() -> None:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        loss(inputs, targets).backward()
        if noise:
            for parameter in net.parameters():
                parameter.grad.add_(torch.randn_like(parameter), alpha=NOISE / batch)
        optimizer.step()

    return step


def numpy_noise() -> SystemNoise:
    """The system's noise as it is where the optional package ``cryptography`` is not installed."""
    source = SystemNoise()
    with mock.patch.dict(sys.modules, {"cryptography.hazmat.primitives.ciphers": None}):
        source.standard_normal_(torch.empty(2))  # It keeps the generator that it makes for its first numbers.
    return source


def clipless(
    kind: str,
    data: Data,
    batch: int,
    *,
    route: str,
    compiled: bool = False,
    channels_last: bool = False,
    cryptography: bool = True,
) -> Step:
    net = network(kind).to(memory_format=torch.channels_last if channels_last else None)
    gates = {"gated": gated, "gradient gates": gradient_gated}.get(route)
    model = DPLipModel(
        net if gates is None else gates(net),
        input_shape=tuple(data[0].shape[1:]),
        input_norm=8.0,
        loss=losses.TauCrossEntropy(8.0),
        constraint={"spectral": constraints.Spectral(), "orthogonal": constraints.Orthogonal()}.get(route),
    ).to(data[0].device)
    rate = batch / len(data[0])
    optimizer = CliplessDPSGD(
        model,
        lr=RATE_OF_LEARNING,
        noise_multiplier=NOISE,
        sample_rate=rate,
        dataset_size=len(data[0]),
        noise="system" if cryptography else numpy_noise(),
    )
    # The rows of `fit`: draws are padded to a small multiple.
    rows = max(8, int(batch**0.5) // 2)
    batches = iter(PoissonBatches(data, sample_rate=rate, steps=STEPS, physical_batch_size=rows))

    return private_step(model, optimizer, batches, compiled=compiled)


def opacus(kind: str, data: Data, batch: int, *, ghost: bool) -> Step:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    net = network(kind).to(data[0].device)
    needed = 8 * batch * sum(parameter.numel() for parameter in net.parameters())
    if (
        not ghost
        and data[0].device.type == "cpu"
        and needed > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    ):
        raise MemoryError(f"per-sample gradients need about {needed / 1e9:.0f} GB")
    base = torch.optim.SGD(net.parameters(), lr=RATE_OF_LEARNING)
    settings: dict[str, Any] = {"noise_multiplier": NOISE, "max_grad_norm": 1.0, "expected_batch_size": batch}
    if ghost:
        module: Any = GradSampleModuleFastGradientClipping(net, max_grad_norm=1.0, use_ghost_clipping=True)
        optimizer: Any = DPOptimizerFastGradientClipping(base, **settings)
        criterion: Any = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss())
    else:
        module = GradSampleModule(net)
        optimizer = DPOptimizer(base, **settings)
        criterion = nn.CrossEntropyLoss()
    batches = poisson(data, batch)

    def step() -> None:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        criterion(module(inputs), targets).backward()
        optimizer.step()

    return step


def fast_dp(kind: str, data: Data, batch: int) -> Step:
    engine = importlib.import_module("fastDP").PrivacyEngine
    net = network(kind).to(data[0].device)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE_OF_LEARNING)
    engine(
        net,
        batch_size=batch,
        sample_size=len(data[0]),
        epochs=1,
        noise_multiplier=NOISE,
        max_grad_norm=1.0,
        clipping_mode="MixOpt",
        clipping_style="all-layer",
    ).attach(optimizer)
    batches = shuffled(data, batch)

    def step() -> None:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()

    return step


CONTENDERS: dict[str, Callable[[str, Data, int], Step]] = {
    BASELINE: sgd,
    "SGD, compiled": lambda *given: sgd(*given, compiled=True),
    "SGD, channels last": lambda *given: sgd(*given, channels_last=True),
    "SGD + noise": lambda *given: sgd(*given, noise=True),
    "gated": lambda *given: clipless(*given, route="gated"),
    "gated, channels last": lambda *given: clipless(*given, route="gated", channels_last=True),
    "gated, without cryptography": lambda *given: clipless(*given, route="gated", cryptography=False),
    "gated, compiled": lambda *given: clipless(*given, route="gated", compiled=True),
    "gradient gates": lambda *given: clipless(*given, route="gradient gates"),
    "gradient gates, channels last": lambda *given: clipless(*given, route="gradient gates", channels_last=True),
    "gradient gates, compiled": lambda *given: clipless(*given, route="gradient gates", compiled=True),
    "spectral": lambda *given: clipless(*given, route="spectral"),
    "spectral, channels last": lambda *given: clipless(*given, route="spectral", channels_last=True),
    "spectral, compiled": lambda *given: clipless(*given, route="spectral", compiled=True),
    "orthogonal": lambda *given: clipless(*given, route="orthogonal"),
    "orthogonal, compiled": lambda *given: clipless(*given, route="orthogonal", compiled=True),
    "Opacus, hooks": lambda *given: opacus(*given, ghost=False),
    "Opacus, ghost": lambda *given: opacus(*given, ghost=True),
    "fast-dp": fast_dp,
}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(build: Callable[[], Step], device: torch.device) -> int:
    """The most bytes that tensors hold during a step, those that the contender keeps between steps included.

    A mean over steps, as draws are not all of one size.
    """

    def built() -> Step:
        step = build()
        for _ in range(3):
            step()
        return step

    gc.collect()  # What contenders before left in cycles would be freed, and counted, meanwhile.
    construction = traffic(built, device)
    steps = (traffic(construction.result, device).peak for _ in range(8))
    return construction.kept + round(statistics.fmean(steps))


def measure(
    kind: str,
    batch: int,
    device: torch.device,
    rounds: int,
    repeats: int,
    chosen: list[str],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Times of one step of each contender, taking turns."""
    torch.manual_seed(0)
    data = torch.rand(SAMPLES, 1, 28, 28, device=device), torch.randint(10, (SAMPLES,), device=device)
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name in chosen:
        try:
            step = CONTENDERS[name](kind, data, batch)
            for _ in range(3):
                step()
            peaks[name] = peak_bytes(lambda build=CONTENDERS[name]: build(kind, data, batch), device)
            steps[name] = step
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times: dict[str, dict[int, float]] = {name: {} for name in steps}
    order = list(steps)
    shuffler = random.Random(0)
    for turn in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            if turn % 4 and times[name][0] > 5.0 * times[BASELINE][0]:
                continue
            step = steps[name]
            synchronize(device)
            start = clock()
            for _ in range(repeats):
                step()
            synchronize(device)
            times[name][turn] = (clock() - start) / repeats
    best, opacus = fastest(times, PLAIN), fastest(times, OPACUS)
    assert best is not None
    rows = []
    for name, own in times.items():
        ratios = _ratios(own, times[best])
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "contender": name,
                "milliseconds": 1e3 * statistics.median(own.values()),
                "fastest": 1e3 * min(own.values()),
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [low, high],
                "ratio_of_fastest": min(own.values()) / min(times[best].values()),
                "plain_ratio": statistics.median(_ratios(own, times[BASELINE])),
                "opacus_ratio": None if opacus is None else statistics.median(_ratios(own, times[opacus])),
                "peak_bytes": peaks[name],
                "peak_ratio": peaks[name] / peaks[best],
            }
        )
    return {"network": kind, "batch": batch, "best": best, "opacus": opacus, "rows": rows, "skipped": skipped}


def fastest(times: dict[str, dict[int, float]], names: tuple[str, ...]) -> str | None:
    """Which of some contenders has the lowest median; ``None`` where none of them ran."""
    return min(
        (name for name in names if name in times),
        key=lambda name: statistics.median(times[name].values()),
        default=None,
    )


def _ratios(own: dict[int, float], base: dict[int, float]) -> list[float]:
    """Of the rounds that both took part in; the first one is always among them."""
    return [own[turn] / base[turn] for turn in own if turn in base]


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# One training step",
        "",
        f"{report['machine']}, {report['threads']} thread(s), torch {report['torch']}, {report['rounds']} rounds of "
        f"{report['repeats']} steps, {report['clock']} time. Regenerate with `python benchmarks/step.py`.",
        "",
        "Time of a whole step, sampling included; medians of interleaved rounds. `ratio` is to the fastest plain SGD "
        "of the table (as it is, channels last, compiled) in the same round, with its quartiles; `of fastest` compares "
        "each one's fastest round; `to SGD as it is` and `to Opacus` (its fastest mode) are further ratios in the same "
        "round. Peak: bytes held by tensors, the data set left out, and their ratio to the fastest plain SGD's. `keeps "
        "memory`: the C library's allocator told not to hand memory back.",
    ]
    for run in report["runs"]:
        lines += [
            "",
            f"## {run['network']}, batch {run['batch']}, allocator: {run['allocator']}",
            "",
            f"Fastest plain SGD: {run['best']}. Fastest mode of Opacus: {run['opacus'] or 'not run'}.",
            "",
            "| contender | ms | ratio | quartiles | of fastest | to SGD as it is | to Opacus | peak MB | peak ratio |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in run["rows"]:
            to_opacus = "–" if row["opacus_ratio"] is None else f"{row['opacus_ratio']:.3f}"
            low, high = row["ratio_quartiles"]
            lines.append(
                f"| {row['contender']} | {row['milliseconds']:.2f} | {row['ratio']:.3f} | {low:.2f}–{high:.2f} "
                f"| {row['ratio_of_fastest']:.3f} | {row['plain_ratio']:.3f} | {to_opacus} "
                f"| {row['peak_bytes'] / 1e6:.1f} | {row['peak_ratio']:.2f} |"
            )
        lines += [f"\nNot run: {name} ({reason})." for name, reason in run["skipped"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(CELLS), default=list(USUAL))
    parser.add_argument("--batches", nargs="+", type=int, help="by default each network's own")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--allocators", nargs="+", choices=list(ALLOCATORS), default=list(ALLOCATORS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3, help="steps of each contender in each round")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing compiled, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json", help="JSON; the table goes beside it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats = 5, 2
        options.contenders = [name for name in options.contenders if "compiled" not in name]
    contenders = list(dict.fromkeys([BASELINE, *options.contenders]))
    if options.child is None:
        # What ratios are to: every way of running plain SGD, unless one has to be quick.
        plain = [name for name in PLAIN if not options.quick or "compiled" not in name]
        contenders = list(dict.fromkeys([*plain, *contenders]))
    else:
        kind, batch = options.child
        torch.set_num_threads(options.threads)
        warnings.simplefilter("ignore")
        with full_precision():
            device = torch.device(options.device)
            clock = CLOCKS[options.clock]
            print(json.dumps(measure(kind, int(batch), device, options.rounds, options.repeats, contenders, clock)))
        return
    runs = []
    allocators = options.allocators if options.device == "cpu" else ["default"]
    for kind in options.networks:
        for batch in options.batches or CELLS[kind]:
            for allocator in allocators:
                settings = ["--threads", str(options.threads), "--rounds", str(options.rounds)]
                settings += ["--repeats", str(options.repeats), "--device", options.device, "--clock", options.clock]
                command = [
                    sys.executable,
                    __file__,
                    "--child",
                    kind,
                    str(batch),
                    *settings,
                    "--contenders",
                    *contenders,
                ]
                environment = {**os.environ, **ALLOCATORS[allocator]}
                answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if answer.returncode:
                    raise SystemExit(answer.stderr)
                runs.append({**json.loads(answer.stdout.splitlines()[-1]), "allocator": allocator})
                print(f"{kind}, batch {batch}, allocator {allocator}: done", file=sys.stderr)
    report = {
        "machine": f"{platform.machine()} CPU" if options.device == "cpu" else torch.cuda.get_device_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "rounds": options.rounds,
        "repeats": options.repeats,
        "clock": options.clock,
        "runs": runs,
    }
    text = markdown(report)
    print(text)
    if not options.quick:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
