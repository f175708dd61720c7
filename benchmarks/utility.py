"""What accuracy each ε buys: this library's routes and clipping (Opacus) on the same network, side by side.

    python benchmarks/utility.py --data-dir DIR --data mnist digits      # writes results/utility.{json,md,png}
    python benchmarks/utility.py --quick                                 # a minute, digits only, into runs/

Each finished run is added to the JSON file at once, and what is there already is not run again: an interrupted
comparison goes on where it was. Routes are the library's presets; ``gradient gates, defaults`` is the network of that
route by ``fit(model, data, epsilon=…, delta=…)`` and no other setting. ``DP-SGD (Opacus)`` trains the network of one
of the routes with the same draws, steps, ε and schedule, clipping each sample's whole gradient, with a clipping norm
and a learning rate of its own. All settings come from held-out training data, at ε = 3 (digits: 1 and 3); for Opacus
three rates were tried on MNIST (and a norm of 1 for one of them) and on CIFAR-10. Where it says ``chosen at each ε``,
they are the best of a grid at that ε, on the last sixth of the training data (runs of split ``validation`` in the JSON
file): 8 or 10 norms and rates of Opacus, 6 rates of our routes; else one serves all ε. On MNIST, the settings of Opacus
and of gradient gates are the best of three for a quarter of the epochs (``--share 0.25``). ``--take FILE`` adds the
test runs of ``benchmarks/accuracy.py --out FILE``. The picture needs matplotlib (extra ``plot``). Tables have a
comparison of their own, ``benchmarks/tables.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accounting import Accountant, calibrate_noise_multiplier, create_accountant
from clipless_dp import DPLipModel, constraints, fit, gated, gradient_gated, layers, losses, presets
from clipless_dp.datasets import Split, load_dataset
from clipless_dp.gates import CotangentGate
from clipless_dp.presets import Preset
from clipless_dp.sampling import PoissonBatchSampler
from clipless_dp.statistics import Releases
from clipless_dp.training import linear_decay

RESULTS = Path(__file__).resolve().parent / "results"
EPSILONS = (1.0, 3.0, 8.0)
OPACUS = "DP-SGD (Opacus)"
CHOSEN = ", chosen at each ε"
DEFAULTS = "gradient gates, defaults"
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
class Defaults:
    """The model of a preset, and settings that follow from public numbers."""

    preset: Preset


Contender = Preset | Clipping | Defaults


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Opacus or a route with the best of some settings at each ε, on held-out training data.

    Attributes:
        preset: whose network, front-end and other settings.
        grid: clipping norms and learning rates, or, without a norm, learning rates of the route.
    """

    preset: Preset
    grid: tuple[tuple[float | None, float], ...]

    def option(self, norm: float | None, lr: float) -> Contender:
        """With these settings."""
        if norm is None:
            return dataclasses.replace(self.preset, settings={**self.preset.settings, "lr": lr})
        return Clipping(self.preset, norm, lr)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A data set, its δ, and who is compared on it."""

    delta: float
    contenders: Mapping[str, Contender | Chosen]


def comparison(name: str, share: float = 1.0) -> Comparison:
    if name == "mnist":
        gradient = presets.get("mnist-gradient")
        if share < 0.5:  # Fewer steps want a higher rate.
            gradient = dataclasses.replace(gradient, settings={**gradient.settings, "lr": 0.02})
        contenders: dict[str, Contender | Chosen] = {
            "constrained": presets.get("mnist-orthogonal"),
            "signal gates": presets.get("mnist-gated"),
            "gradient gates": gradient,
            "features": presets.get("features-linear"),
            DEFAULTS: Defaults(gradient),
            OPACUS: Clipping(gradient, norm=0.1, lr=0.02),
            f"{OPACUS} on features": Clipping(presets.get("features-linear"), norm=0.1, times=10.0),
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


def clippings(preset: Preset, norms: Sequence[float], paces: Sequence[float]) -> Chosen:
    """A grid of norms, and of learning rates times norms: how far a step of clipped gradients goes."""
    return Chosen(preset, tuple((norm, pace / norm) for norm, pace in itertools.product(norms, paces)))


def rates(preset: Preset, *some: float) -> Chosen:
    """Learning rates of a route."""
    return Chosen(preset, tuple((None, rate) for rate in some))


def _digits() -> dict[str, Contender | Chosen]:
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
    features = dataclasses.replace(features, settings={**signal.settings, "lr": 0.15})
    gradient = dataclasses.replace(
        signal, bound=lambda net, shape: wrapped(gradient_gated(net), shape), settings={**signal.settings, "lr": 0.05}
    )
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
        "gradient gates": gradient,
        "features": features,
        DEFAULTS: Defaults(gradient),
        OPACUS: Clipping(signal, norm=0.1, lr=1.0),
        f"gradient gates{CHOSEN}": rates(gradient, 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
        f"features{CHOSEN}": rates(features, 0.04, 0.075, 0.15, 0.3, 0.6, 1.2),
        OPACUS + CHOSEN: clippings(signal, norms=(0.1, 1.0), paces=(0.03, 0.06, 0.12, 0.24, 0.48)),
        f"{OPACUS} on features{CHOSEN}": clippings(features, norms=(0.1, 1.0), paces=(0.05, 0.1, 0.2, 0.4)),
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


def preset_of(contender: Contender | Chosen) -> Preset:
    """Whose network and front-end it has."""
    return contender if isinstance(contender, Preset) else contender.preset


def without_front(preset: Preset, data: tuple[Data, Data], cache_dir: Path | None) -> tuple[Preset, tuple[Data, Data]]:
    """The preset behind its front-end, and the data there: of each sample by itself, so once for all runs."""
    if preset.front is None:
        return preset, data
    (inputs, targets), (held_out, truth) = data
    front = preset.front_of(tuple(inputs.shape[1:]), cache_dir=cache_dir)
    behind, held_behind = (preset.features(some, cache_dir=cache_dir, front=front) for some in (inputs, held_out))
    return dataclasses.replace(preset, front=None, recipe=None), ((behind, targets), (held_behind, truth))


def train(
    contender: Contender, data: tuple[Data, Data], outputs: int, *, epsilon: float, delta: float, seed: int,
    share: float = 1.0,
) -> Run:  # fmt: skip
    """One run on data behind the front-end: accuracy on the held-out data, ε, and seconds."""
    preset = preset_of(contender)
    (inputs, targets), (held_out, truth) = data
    epochs = preset.settings["epochs"] * share
    torch.manual_seed(seed)
    start = time.perf_counter()
    if isinstance(contender, Clipping):
        accountant = create_accountant("prv")
        change: Callable[[Tensor], Tensor] = lambda samples: samples  # noqa: E731
        if preset.statistics is not None:
            change = preset.statistics(inputs, Releases(accountant, len(inputs), seed=seed))
        net, steps, sigma = clipped(
            contender, (change(inputs), targets), outputs, accountant, epsilon=epsilon, delta=delta, seed=seed,
            epochs=epochs,
        )  # fmt: skip
        spent = float(accountant.get_epsilon(delta))
        seconds = time.perf_counter() - start
        reached = accuracy(net, (change(held_out), truth))
    elif isinstance(contender, Defaults):
        model = preset.model(tuple(inputs.shape[1:]), outputs)
        result = fit(
            model, (inputs, targets), epsilon=epsilon, delta=delta, reproducible_seed=seed, progress=False
        )  # fmt: skip
        steps, sigma, spent = result.steps, result.noise_multiplier, result.epsilon
        epochs = steps * result.sample_rate
        seconds = time.perf_counter() - start
        reached = accuracy(model, (held_out, truth))
    else:
        trained = preset.fit(
            (inputs, targets), epsilon=epsilon, delta=delta, outputs=outputs, epochs=epochs, reproducible_seed=seed,
            progress=False,
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


def taken(path: Path) -> list[Run]:
    """Runs of ``benchmarks/accuracy.py``, which trains presets in the same way."""
    content = json.loads(path.read_text(encoding="utf-8"))
    name = content["data set"]
    (method,) = [
        method
        for method, contender in comparison(name).contenders.items()
        if isinstance(contender, Preset) and contender.name == content["preset"]
    ]
    return [
        {
            "data": name,
            "method": method,
            "epsilon": run["target"],
            "seed": run["seed"],
            "split": content["split"],
            "accuracy": run["accuracy"],
            "spent": run["epsilon"],
            "epochs": content["settings"]["epochs"],
            "seconds": run["seconds"],
            "from": path.name,
        }
        for run in content["runs"]
    ]


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


def put(path: Path, added: list[Run]) -> None:
    """Adds runs to those of the file: another process may have added its own since."""
    keys = {key(run) for run in added}
    write(path, [*(run for run in read(path) if key(run) not in keys), *added])


class Bench:
    """Runs on one data set, which is loaded once it is needed; each is kept at once, and what is there is not repeated.

    Args:
        name: of the data set.
        options: of the command line.
        out: the JSON file.
    """

    def __init__(self, name: str, options: argparse.Namespace, out: Path) -> None:
        self.name, self.options, self.out = name, options, out
        self._behind: tuple[Any, ...] = ()

    @functools.cached_property
    def _data(self) -> Split:
        return load_dataset(self.name, self.options.data_dir)

    def _split(self, split: str) -> tuple[Data, Data]:
        if split == "test":
            return self._data.train, self._data.test
        inputs, targets = self._data.train
        cut = len(inputs) * 5 // 6
        return (inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:])

    def _without_front(self, preset: Preset, split: str) -> tuple[Preset, tuple[Data, Data]]:
        """Only the last features are held: they may be gigabytes."""
        if self._behind[:2] != (preset.name, split):
            self._behind = ()
            self._behind = (preset.name, split, *without_front(preset, self._split(split), self.options.cache_dir))
        there, parts = self._behind[2:]
        return dataclasses.replace(preset, front=there.front, recipe=there.recipe), parts

    def once(self, method: str, contender: Contender, epsilon: float, seed: int, split: str, **told: float) -> Run:
        """The run of the file, unless it was of other settings than are told, or one that is added to it."""
        run: Run = {"data": self.name, "method": method, "epsilon": epsilon, "seed": seed, "split": split}
        for other in read(self.out):
            if key(other) == key(run) and told.items() <= other.items():
                return other
        preset, parts = self._without_front(preset_of(contender), split)
        share = self.options.share
        run |= train(
            preset if isinstance(contender, Preset) else dataclasses.replace(contender, preset=preset), parts,
            self._data.classes, epsilon=epsilon, delta=comparison(self.name).delta, seed=seed, share=share,
        )  # fmt: skip
        put(self.out, [run | told])
        print(
            f"{self.name}, ε = {epsilon:g}, {method}, {split}, seed {seed}: {100 * run['accuracy']:.2f} %, "
            f"{run['seconds']} s",
            flush=True,
        )
        return run

    def choice(self, method: str, contender: Chosen, epsilon: float) -> dict[str, float]:
        """The best of the grid on held-out training data."""
        reached = []
        for norm, lr in contender.grid:
            told = f"{method}: rate {lr:g}" if norm is None else f"{method}: norm {norm:g}, rate {lr:g}"
            reached.append(self.once(told, contender.option(norm, lr), epsilon, 0, "validation")["accuracy"])
        norm, lr = contender.grid[reached.index(max(reached))]
        return {"lr": lr} if norm is None else {"norm": norm, "lr": lr}

    def compare(self, method: str, contender: Contender | Chosen) -> None:
        """All seeds and ε of the command line."""
        split = "validation" if self.options.validate else "test"
        for seed, epsilon in itertools.product(self.options.seeds, self.options.epsilons):
            if isinstance(contender, Chosen):
                settings = self.choice(method, contender, epsilon)
                option = contender.option(settings.get("norm"), settings["lr"])
                self.once(method, option, epsilon, seed, split, **settings)
            else:
                self.once(method, contender, epsilon, seed, split)


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
            route = method.removesuffix(", defaults")
            line = "-" if method in ROUTES else ":" if route in ROUTES else "--"
            colour = f"C{ROUTES.index(route)}" if route in ROUTES else "C7"
            marker = "v" if "whitened" in method else "^" if "features" in method else "D" if CHOSEN in method else "o"
            axis.errorbar(
                list(by_epsilon), [mean for mean, _ in values], [deviation for _, deviation in values],
                label=method, marker=marker, markersize=4, capsize=3, linewidth=1.5, linestyle=line, color=colour,
            )  # fmt: skip
        axis.set_xscale("log")
        ticks = sorted({epsilon for by_epsilon in methods.values() for epsilon in by_epsilon})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"{name}, δ = {comparison(name).delta:g}")
        axis.set_xlabel("ε")
        axis.set_ylabel("test accuracy in %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
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
    parser.add_argument("--take", type=Path, nargs="+", default=[], help="results of benchmarks/accuracy.py")
    parser.add_argument("--out", type=Path, help="JSON; .md and .png are put beside it")
    options = parser.parse_args()
    if options.quick:
        options.data, options.epsilons, options.seeds, options.share = ["digits"], [3.0], [0], 0.1
    out = options.out or (Path("runs/utility-quick.json") if options.quick else RESULTS / "utility.json")

    for path in options.take:
        put(out, taken(path))
    for name in options.data:
        bench = Bench(name, options, out)
        for method, contender in comparison(name, options.share).contenders.items():
            if options.methods is None or method in options.methods:
                bench.compare(method, contender)
    runs = read(out)
    if any(run["split"] == "test" for run in runs):
        out.with_suffix(".md").write_text(markdown(runs), encoding="utf-8")
        try:
            picture(runs, out.with_suffix(".png"))
        except ImportError as error:
            print(f"no picture: {error}; pip install 'clipless-dp[plot]'", file=sys.stderr)
        print(markdown(runs))


if __name__ == "__main__":
    main()
