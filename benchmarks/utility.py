"""What accuracy each ε buys: this library's routes and clipping (Opacus) on the same network, side by side.

    python benchmarks/utility.py --data-dir DIR --data mnist digits      # writes results/utility.{json,md,png}
    python benchmarks/utility.py --quick                                 # a minute, digits only, into runs/

Each finished run is added to the JSON file at once, and what is there already is not run again: an interrupted
comparison goes on where it was. Routes are the library's presets; ``DP-SGD (Opacus)`` trains the network of one of
them with the same draws, steps, ε and schedule, clipping each sample's whole gradient, with a clipping norm and a
learning rate of its own. All settings come from held-out training data, at ε = 3 (digits: 1 and 3); for Opacus three
rates were tried on MNIST (and a norm of 1 for one of them) and on CIFAR-10. On MNIST, those of Opacus and of gradient
gates are the best of three for a quarter of the epochs (``--share 0.25``). The picture needs matplotlib (extra
``plot``). Tables have a comparison of their own, ``benchmarks/tables.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accounting import Accountant, calibrate_noise_multiplier, create_accountant
from clipless_dp import DPLipModel, constraints, gated, gradient_gated, layers, losses, presets
from clipless_dp.datasets import load_dataset
from clipless_dp.gates import CotangentGate
from clipless_dp.presets import Preset
from clipless_dp.sampling import PoissonBatchSampler
from clipless_dp.statistics import Releases
from clipless_dp.training import linear_decay

RESULTS = Path(__file__).resolve().parent / "results"
EPSILONS = (1.0, 3.0, 8.0)
OPACUS = "DP-SGD (Opacus)"
DATA_SETS = ("digits", "mnist", "cifar10")
ROUTES = ("constrained", "signal gates", "gradient gates", "features", "whitened features")
"""In the order of their colours."""

Data = tuple[Tensor, Tensor]
Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Clipping:
    """DP-SGD by Opacus on the network of a preset, with its settings but for these.

    Attributes:
        preset: whose network, front-end and settings.
        norm: that each sample's gradient is clipped to.
        lr: learning rate; ``None``: that of the preset at the ε, times ``times``.
    """

    preset: Preset
    norm: float
    lr: float | None = None
    times: float = 1.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A data set, its δ, and who is compared on it."""

    delta: float
    contenders: Mapping[str, Preset | Clipping]


def comparison(name: str, share: float = 1.0) -> Comparison:
    if name == "mnist":
        gradient = presets.get("mnist-gradient")
        if share < 0.5:  # Fewer steps want a higher rate.
            gradient = dataclasses.replace(gradient, settings={**gradient.settings, "lr": 0.02})
        contenders = {
            "constrained": presets.get("mnist-orthogonal"),
            "signal gates": presets.get("mnist-gated"),
            "gradient gates": gradient,
            "features": presets.get("features-linear"),
            OPACUS: Clipping(gradient, norm=0.1, lr=0.02),
        }
        return Comparison(1e-5, contenders)
    if name == "cifar10":
        scattering = presets.get("photographs-scattering")
        # As measured: one rate for every ε.
        features = dataclasses.replace(scattering, settings={**scattering.settings, "lr": 4.0})
        whitened = presets.get("photographs-linear")
        # Gradients clipped at 0.1 are a tenth as long as normalised ones: ten times the learning rate is as fast.
        return Comparison(
            1e-5,
            {
                "features": features,
                f"{OPACUS} on features": Clipping(features, norm=0.1, times=10.0),
                "whitened features": whitened,
                f"{OPACUS} on whitened features": Clipping(whitened, norm=0.1, times=10.0),
            },
        )
    return Comparison(1e-4, _digits())


def _digits() -> dict[str, Preset | Clipping]:
    """The network of ``examples/digits.py``; a few learning rates were tried on a sixth of the training data."""

    def network(shape: tuple[int, ...], outputs: int, *, bias: bool = True) -> nn.Sequential:
        hidden = nn.Linear(math.prod(shape), 64, bias=bias)
        return nn.Sequential(nn.Flatten(), hidden, layers.GroupSort(2), nn.Linear(64, outputs, bias=bias))

    def wrapped(bounded: nn.Module, shape: tuple[int, ...], **arguments: Any) -> DPLipModel:
        norm = math.sqrt(math.prod(shape))
        return DPLipModel(bounded, input_shape=shape, input_norm=norm, loss=losses.TauCrossEntropy(8.0), **arguments)

    signal = Preset(
        name="digits",
        summary="the network of examples/digits.py",
        network=network,
        bound=lambda net, shape: wrapped(gated(net, cotangent_mode="normalize"), shape),
        settings={"epochs": 60, "batch_size": 512, "lr": 0.15},
        provenance="a sixth of the training data of digits",
    )
    features = presets.get("features-linear")
    return {
        "constrained": dataclasses.replace(
            signal,
            network=lambda shape, outputs: network(shape, outputs, bias=False),
            bound=lambda net, shape: wrapped(
                nn.Sequential(*net, CotangentGate(0.1)), shape, constraint=constraints.Orthogonal()
            ),
            settings={**signal.settings, "lr": 0.1},
        ),
        "signal gates": signal,
        "gradient gates": dataclasses.replace(
            signal,
            bound=lambda net, shape: wrapped(gradient_gated(net), shape),
            settings={**signal.settings, "lr": 0.05},
        ),
        "features": dataclasses.replace(features, settings={**signal.settings, "lr": 0.15}),
        OPACUS: Clipping(signal, norm=0.1, lr=1.0),
    }


def clipped(
    contender: Clipping, train: Data, outputs: int, accountant: Accountant, *, epsilon: float, delta: float,
    seed: int, epochs: float,
) -> tuple[nn.Module, int, float]:  # fmt: skip
    """Trains by Opacus, on top of what the accountant holds; returns the network, steps and σ."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    inputs, targets = train
    shape = tuple(inputs.shape[1:])
    settings = contender.preset.arguments(len(inputs), epochs=epochs, epsilon=epsilon)
    lr = contender.times * settings["lr"] if contender.lr is None else contender.lr
    batch = settings["batch_size"]
    rate = batch / len(inputs)
    steps = math.ceil(settings["epochs"] / rate - 1e-9)
    sigma = calibrate_noise_multiplier(
        target_epsilon=epsilon, delta=delta, sample_rate=rate, steps=steps, spent=accountant
    )
    # The loss of the preset, on the network without its gates and constraints.
    loss = contender.preset.model(shape, outputs).loss_function
    torch.manual_seed(seed)
    net = contender.preset.network(shape, outputs)
    if settings.get("optimizer") == "adam":
        base: Any = torch.optim.Adam(net.parameters(), lr=lr)
    else:
        base = torch.optim.SGD(net.parameters(), lr=lr, momentum=settings.get("momentum", 0.9))
    # Ghost clipping: the same sums as with per-sample gradients, in a fraction of the time.
    module = GradSampleModuleFastGradientClipping(net, max_grad_norm=contender.norm, use_ghost_clipping=True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = DPOptimizerFastGradientClipping(
        base, noise_multiplier=sigma, max_grad_norm=contender.norm, expected_batch_size=batch, generator=generator
    )
    schedule = linear_decay(base, steps)
    # Per-sample gradients of at most half a gigabyte at once.
    rows = max(1, 2**27 // sum(parameter.numel() for parameter in net.parameters()))
    for drawn in PoissonBatchSampler(len(inputs), sample_rate=rate, steps=steps, seed=seed).draws():
        pieces = torch.from_numpy(drawn).split(rows)
        for index, piece in enumerate(pieces):
            optimizer.signal_skip_step(do_skip=index < len(pieces) - 1)
            losses_of_piece = loss.per_sample(module(inputs[piece]), targets[piece])
            # Two backward passes; the module multiplies by what the mean divides by.
            DPTensorFastGradientClipping(module, optimizer, losses_of_piece, "mean").backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    accountant.step(noise_multiplier=sigma, sample_rate=rate, steps=steps)
    return net.eval(), steps, sigma


@torch.no_grad()
def accuracy(net: Callable[[Tensor], Tensor], test: Data) -> float:
    inputs, targets = test
    hits = [
        int((net(some).argmax(1) == truth).sum())
        for some, truth in zip(inputs.split(1024), targets.split(1024), strict=True)
    ]
    return sum(hits) / len(inputs)


def train(
    contender: Preset | Clipping, data: tuple[Data, Data], outputs: int, *, epsilon: float, delta: float, seed: int,
    cache_dir: Path | None, share: float,
) -> Run:  # fmt: skip
    """One run: accuracy on the held-out data, ε, and seconds without the front-end's, which is run once for all."""
    preset = contender if isinstance(contender, Preset) else contender.preset
    (inputs, targets), (held_out, truth) = data
    if cache_dir is not None:
        for some in (inputs, held_out):
            preset.features(some, cache_dir=cache_dir)
    epochs = preset.settings["epochs"] * share
    torch.manual_seed(seed)
    start = time.perf_counter()
    if isinstance(contender, Clipping):
        accountant = create_accountant("prv")
        behind = preset.features(inputs, cache_dir=cache_dir)
        change: Callable[[Tensor], Tensor] = lambda samples: samples  # noqa: E731
        if preset.statistics is not None:
            change = preset.statistics(behind, Releases(accountant, len(inputs), seed=seed))
        net, steps, sigma = clipped(
            contender, (change(behind), targets), outputs, accountant, epsilon=epsilon, delta=delta, seed=seed,
            epochs=epochs,
        )  # fmt: skip
        spent = float(accountant.get_epsilon(delta))
        seconds = time.perf_counter() - start
        reached = accuracy(net, (change(preset.features(held_out, cache_dir=cache_dir)), truth))
    else:
        trained = preset.fit(
            (inputs, targets), epsilon=epsilon, delta=delta, outputs=outputs, cache_dir=cache_dir, epochs=epochs,
            reproducible_seed=seed, progress=False,
        )  # fmt: skip
        result = trained.result
        steps, sigma, spent = result.steps, result.noise_multiplier, result.epsilon
        seconds = time.perf_counter() - start
        reached = accuracy(trained.model, (trained.prepare(held_out), truth))
    return {
        "accuracy": reached,
        "spent": spent,
        "steps": steps,
        "noise_multiplier": sigma,
        "epochs": epochs,
        "seconds": round(seconds, 1),
    }


def key(run: Run) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("data", "method", "epsilon", "seed", "split"))


def read(path: Path) -> list[Run]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def write(path: Path, runs: list[Run]) -> None:
    """In one move, so that an interrupt leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"torch": torch.__version__, "threads": torch.get_num_threads(), "runs": sorted(runs, key=key)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def cells(runs: list[Run]) -> Iterator[tuple[str, dict[str, dict[float, list[Run]]]]]:
    """Runs on the test set by data set, method and ε, in the order of the tables."""
    for name in DATA_SETS:
        methods: dict[str, dict[float, list[Run]]] = {}
        for method in comparison(name).contenders:
            by_epsilon: dict[float, list[Run]] = defaultdict(list)
            for run in runs:
                if (run["data"], run["method"], run["split"]) == (name, method, "test"):
                    by_epsilon[run["epsilon"]].append(run)
            if by_epsilon:
                methods[method] = dict(sorted(by_epsilon.items()))
        if methods:
            yield name, methods


def mean_and_deviation(runs: list[Run]) -> tuple[float, float]:
    values = [100.0 * run["accuracy"] for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def shown(runs: list[Run]) -> str:
    if len(runs) < 2:
        return f"{100 * runs[0]['accuracy']:.2f} (1)" if runs else "–"
    mean, deviation = mean_and_deviation(runs)
    return f"{mean:.2f} ± {deviation:.2f} ({len(runs)})"


def markdown(runs: list[Run]) -> str:
    lines = [
        "# Accuracy for each ε",
        "",
        "Test accuracy in per cent, mean ± standard deviation over seeds (number of seeds), and the median of the wall",
        "time of a run in seconds, on one thread of a machine that others used more or less: times compare poorly.",
        "Made by `benchmarks/utility.py`; the JSON file beside this one has every run. Epochs below a preset's own",
        "were chosen for time (`--share`), not for accuracy.",
        "",
    ]
    for name, methods in cells(runs):
        epsilons = sorted({epsilon for by_epsilon in methods.values() for epsilon in by_epsilon})
        lines += [f"## {name}, δ = {comparison(name).delta:g}", ""]
        header = ["method", *(f"ε = {epsilon:g}" for epsilon in epsilons), "epochs", "seconds"]
        lines += ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
        for method, by_epsilon in methods.items():
            row = [method]
            for epsilon in epsilons:
                there = by_epsilon.get(epsilon, [])
                row.append(shown(there))
            every = [run for some in by_epsilon.values() for run in some]
            row.append(", ".join(f"{epochs:g}" for epochs in sorted({run["epochs"] for run in every})))
            row.append(f"{statistics.median(run['seconds'] for run in every):.0f}")
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def picture(runs: list[Run], path: Path) -> None:
    """Accuracy against ε, one panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(cells(runs))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.0), squeeze=False)
    for axis, (name, methods) in zip(axes[0], panels, strict=True):
        for method, by_epsilon in methods.items():
            values = [mean_and_deviation(some) for some in by_epsilon.values()]
            dashed, colour = ("-", f"C{ROUTES.index(method)}") if method in ROUTES else ("--", "C7")
            axis.errorbar(
                list(by_epsilon), [mean for mean, _ in values], [deviation for _, deviation in values],
                label=method, marker="o", markersize=4, capsize=3, linewidth=1.5, linestyle=dashed, color=colour,
            )  # fmt: skip
        axis.set_xscale("log")
        ticks = sorted({epsilon for by_epsilon in methods.values() for epsilon in by_epsilon})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"{name}, δ = {comparison(name).delta:g}")
        axis.set_xlabel("ε")
        axis.set_ylabel("test accuracy in %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--methods", nargs="+", help="some of those of the tables (default: all)")
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(EPSILONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=1.0, help="of each preset's epochs, where time is short")
    parser.add_argument("--validate", action="store_true", help="hold out a sixth of the training data, test on it")
    parser.add_argument("--quick", action="store_true", help="digits, ε = 3, one seed, a tenth of the epochs")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cache-dir", type=Path, help="for features")
    parser.add_argument("--out", type=Path, help="JSON; .md and .png are put beside it")
    options = parser.parse_args()
    if options.quick:
        options.data, options.epsilons, options.seeds, options.share = ["digits"], [3.0], [0], 0.1
    out = options.out or (Path("runs/utility-quick.json") if options.quick else RESULTS / "utility.json")

    runs = read(out)
    done = {key(run) for run in runs}
    split = "validation" if options.validate else "test"
    for name in options.data:
        wanted = [
            (seed, epsilon, method, contender)
            for seed in options.seeds
            for epsilon in options.epsilons
            for method, contender in comparison(name, options.share).contenders.items()
            if (options.methods is None or method in options.methods)
            and (name, method, epsilon, seed, split) not in done
        ]
        if not wanted:
            continue
        data = load_dataset(name, options.data_dir)
        training, held_out = data.train, data.test
        if options.validate:
            cut = len(data.inputs) * 5 // 6
            training, held_out = (data.inputs[:cut], data.targets[:cut]), (data.inputs[cut:], data.targets[cut:])
        for seed, epsilon, method, contender in wanted:
            run = {"data": name, "method": method, "epsilon": epsilon, "seed": seed, "split": split}
            run |= train(
                contender, (training, held_out), data.classes, epsilon=epsilon, delta=comparison(name).delta,
                seed=seed, cache_dir=options.cache_dir, share=options.share,
            )  # fmt: skip
            # Another process may have added its own since.
            runs = [*(other for other in read(out) if key(other) != key(run)), run]
            write(out, runs)
            print(
                f"{name}, ε = {epsilon:g}, {method}, seed {seed}: {100 * run['accuracy']:.2f} %, {run['seconds']} s",
                flush=True,
            )
    if any(run["split"] == "test" for run in runs):
        out.with_suffix(".md").write_text(markdown(runs), encoding="utf-8")
        try:
            picture(runs, out.with_suffix(".png"))
        except ImportError as error:
            print(f"no picture: {error}; pip install 'clipless-dp[plot]'", file=sys.stderr)
        print(markdown(runs))


if __name__ == "__main__":
    main()
