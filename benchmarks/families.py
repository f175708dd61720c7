"""One row for each family of layers, losses and training rules: private MNIST at ε = 3, parameters, time of a step.

    python benchmarks/families.py --data-dir DIR        # writes results/families.{json,md}, some CPU minutes
    python benchmarks/families.py --quick               # a minute, digits, prints
    python benchmarks/families.py --rows orthogonal spectral --data-dir DIR     # these rows anew, others kept

Small on purpose: images averaged to 14 × 14, centred and scaled to one norm, networks of two hidden layers of 64, a few
epochs, and no setting tuned for any row: learning rate and optimizer are what ``fit`` takes from public numbers. So
rows compare families at one price and effort, not the best of each.

To add a row, add a :class:`Family` to ``FAMILIES``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clipless_dp import (
    CliplessDPSGD,
    DPLipModel,
    GaussianNoise,
    architectures,
    constraints,
    evaluate,
    fit,
    fit_without_privacy,
    gated,
    gradient_gated,
    layers,
    losses,
)
from clipless_dp.architectures.parts import isometric_
from clipless_dp.datasets import Split, load_dataset
from clipless_dp.optim import SharpnessAwareAdam
from clipless_dp.sampling import Adversarial

RESULTS = Path(__file__).resolve().parent / "results"
EPSILON, DELTA = 3.0, 1e-5
WIDTH, NORM, CAP = 64, 4.0, 0.1
"""Of hidden layers; of what comes in; of the loss's gradient, of which far less than its bound is used."""


def sequence(size: int, classes: int, activation: Callable[[], nn.Module], *, bias: bool = True) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(size, WIDTH, bias=bias), activation(),
        nn.Linear(WIDTH, WIDTH, bias=bias), activation(),
        nn.Linear(WIDTH, classes, bias=bias),
    )  # fmt: skip


def sorted_pairs(size: int, classes: int) -> nn.Sequential:
    """Of layers that start orthogonal, as constraints want them."""
    return isometric_(sequence(size, classes, partial(layers.GroupSort, 2), bias=False))


def relu(size: int, classes: int) -> nn.Sequential:
    """Of torch's own layers."""
    return sequence(size, classes, nn.ReLU)


def structured(kind: str, size: int, classes: int) -> nn.Sequential:
    """Two square structured layers, each behind a diagonal of signs, sorted in pairs."""
    block = 14 if kind == "block-circulant" and size % 14 == 0 else 8 if kind == "block-circulant" else None
    made = [layers.StructuredLinear(size, size, kind, block, bias=False) for _ in range(2)]  # type: ignore[arg-type]
    hidden = [part for layer in made for part in (layers.Diagonal(size), layer, layers.GroupSort(2))]
    last = nn.Linear(size, classes, bias=False)
    nn.init.orthogonal_(last.weight)
    return nn.Sequential(*hidden, last)


class Rows(nn.Module):
    """Rows of an image as tokens, mixed with those above; all are read."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.side = math.isqrt(size)
        self.mixing = layers.CausalMixing(self.side)
        self.hidden = nn.Linear(self.side, WIDTH, bias=False)
        self.again = layers.CausalMixing(self.side)
        self.last = nn.Linear(self.side * WIDTH, classes, bias=False)
        isometric_(nn.Sequential(self.hidden, layers.GroupSort(2, dim=-1), self.last))
        self.pairs = layers.GroupSort(2, dim=-1)

    def forward(self, values: Tensor) -> Tensor:
        """``(B, size)`` to scores."""
        tokens = self.mixing(values.unflatten(1, (self.side, self.side)))
        scores: Tensor = self.last(self.again(self.pairs(self.hidden(tokens))).flatten(1))
        return scores


def two_points(size: int, classes: int) -> nn.Sequential:
    """Two predicted points of one entry a class, and their chances."""
    return gradient_gated(sequence(size, 2 * classes + 2, nn.ReLU))  # type: ignore[return-value]


def as_points(targets: Tensor, classes: int) -> Tensor:
    """Labels as vectors."""
    return functional.one_hot(targets, classes).float()


def likelier_point(model: DPLipModel, inputs: Tensor, targets: Tensor, classes: int) -> float:
    """The share of labels at which the likelier of two points is largest."""
    with torch.no_grad():
        outputs = model.eval()(inputs)
    points, chances = outputs[:, : 2 * classes].unflatten(1, (2, classes)), outputs[:, 2 * classes :]
    chosen = points[torch.arange(len(points)), chances.argmax(1)]
    return float((chosen.argmax(1) == targets).float().mean())


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        what: in words.
        body: maps size and classes to a network on vectors.
        constraint: of its weights.
        capped: whether the loss's gradient is capped at :data:`CAP`, as suits constraints.
        options: of ``fit``; those of views are in the time of a step too.
        loss: the loss.
        points: whether targets are points.
        private: whether there is noise.
    """

    what: str
    body: Callable[[int, int], nn.Module]
    constraint: Any = None
    capped: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    loss: losses.Loss = field(default_factory=partial(losses.TauCrossEntropy, 8.0))
    points: bool = False
    private: bool = True


def constrained(what: str, constraint: Any, body: Callable[[int, int], nn.Module] = sorted_pairs) -> Family:
    """A row of the Lipschitz route."""
    return Family(what, body, constraint, capped=True)


def behind_gates(what: str, body: Callable[[int, int], nn.Module] = relu, **given: Any) -> Family:
    """A row whose gradients are capped one by one."""
    return Family(what, lambda size, classes: gradient_gated(body(size, classes)), **given)


def sharpness_aware(parameters: Any) -> SharpnessAwareAdam:
    """With the optimizer and about the rate that other rows behind gates get."""
    return SharpnessAwareAdam(parameters, lr=0.0165, radius=0.05)


MIXED = {
    # K is the limit over 1 - β: of norm one at β = ½.
    "*.mixing.weight": constraints.Spectral(0.5),
    "*.again.weight": constraints.Spectral(0.5),
    "*.feedback": constraints.Spectral(),
    "*": constraints.Orthogonal(),
}
CONVEX = {
    "*head.weight": constraints.UnitRows(),
    "*": constraints.AlmostOrthogonal(scales="norm", side="outputs"),
}
ROUNDS = constraints.AlmostOrthogonal(rounds=4, scales="perron")


def residual(size: int, classes: int) -> nn.Module:
    """A dense layer, two convex potentials, a dense layer."""
    return architectures.residual_mlp((size,), classes, width=WIDTH, depth=2)


def truncated(size: int, classes: int, paths: int) -> nn.Sequential:
    """Three residual blocks, through ``paths`` of which gradients go at most."""
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), layers.GroupSort(2)) for _ in range(3)]
    first, last = nn.Linear(size, WIDTH, bias=False), nn.Linear(WIDTH, classes, bias=False)
    return isometric_(nn.Sequential(first, layers.GroupSort(2), layers.Highway(blocks, paths), last))


def convex(size: int, classes: int) -> nn.Sequential:
    """Convex-potential convolutions and dense layers, of images."""
    side = math.isqrt(size)
    net = architectures.lipsll((1, side, side), classes, depth=2, dense=2, width=16, inner=WIDTH)
    return nn.Sequential(nn.Unflatten(1, (1, side, side)), net)


def splines(size: int, classes: int) -> nn.Sequential:
    """Learnt activations."""
    return isometric_(sequence(size, classes, layers.LinearSpline, bias=False))


def order_statistics(size: int, classes: int) -> nn.Module:
    """No constraint, no gate."""
    return architectures.sort_mlp((size,), classes, widths=(WIDTH, WIDTH))


def noisy(size: int, classes: int) -> nn.Sequential:
    """Noise of norm about one on what comes in."""
    return nn.Sequential(layers.NoiseInjection(1.0 / math.sqrt(size), 1.0), *relu(size, classes))


TWO_VIEWS = {"augment": GaussianNoise(0.1), "multiplicity": 2}
SEARCHED = {"augment": Adversarial(0.5, steps=2)}
POINTS = losses.Quantization(2, 1.0, 0.1)

FAMILIES: dict[str, Family] = {
    "no privacy": Family("ReLU, by Adam without noise", relu, private=False),
    "gradient gates": behind_gates("ReLU, gradients capped one by one"),
    "signal gates": Family("ReLU, between spheres and cotangent gates", lambda s, c: gated(relu(s, c))),
    "spectral": constrained("division by the certified norm", constraints.Spectral()),
    "almost orthogonal": constrained("AOL's diagonal", constraints.AlmostOrthogonal()),
    "almost orthogonal, 4 rounds": constrained("between AOL and spectral, Perron's scales", ROUNDS),
    "orthogonal": constrained("Björck's projection", constraints.Orthogonal()),
    "orthogonal, tangent": constrained("gradients and noise along the manifold", constraints.Orthogonal(tangent=True)),
    "Lipschitz penalty": behind_gates(
        "gradient gates; log-norms pulled down behind the noise", constraint=constraints.LipschitzPenalty(1e-3)
    ),
    "convex potential": constrained("a dense layer, two residual ones, a dense one", constraints.Spectral(), residual),
    "convex potential, gated": Family(
        "the same, sample by sample behind gradient gates",
        lambda s, c: gradient_gated(residual(s, c), isolation="vmap"),
    ),
    "lipsll": constrained("convex potentials: two convolutions of 16 channels, two dense layers", CONVEX, convex),
    "lipsll, gated": Family("the same behind gradient gates", lambda s, c: gradient_gated(convex(s, c)), CONVEX),
    "unit rows": constrained(
        "orthogonal, the last layer's rows of norm 1 each",
        {"*.4.weight": constraints.UnitRows(), "*": constraints.Orthogonal()},
    ),
    "highway": constrained(
        "three residual blocks, gradients through one at most", constraints.Spectral(), partial(truncated, paths=1)
    ),
    "highway, all paths": constrained(
        "the same, gradients through all", constraints.Spectral(), partial(truncated, paths=3)
    ),
    "circulant": constrained("two circulant-diagonal ones", constraints.Orthogonal(), partial(structured, "circulant")),
    "Toeplitz": constrained("two Toeplitz layers", constraints.Spectral(), partial(structured, "toeplitz")),
    "block-circulant": constrained("blocks of 14", constraints.Orthogonal(), partial(structured, "block-circulant")),
    "causal mixing": constrained("rows as tokens, mixed twice with those above", MIXED, Rows),
    "linear splines": constrained("learnt activations", constraints.Spectral(), splines),
    "order statistics": Family("1-Lipschitz in the maximum norm whatever the weights", order_statistics),
    "FOTON": constrained("two forward passes", constraints.Orthogonal(), lambda s, c: layers.Foton(sorted_pairs(s, c))),
    "FOTON, capped": Family("two forward passes, ReLU, gradients capped", lambda s, c: layers.Foton(relu(s, c), 0.1)),
    "PEPITA, capped": Family("a fixed random way back", lambda s, c: layers.Pepita(relu(s, c), 0.1)),
    "quantisation loss": Family("two points of ten entries, the nearest learns", two_points, loss=POINTS, points=True),
    "noise injection": behind_gates("noise of norm 1 at most on what comes in", noisy),
    "noisy views": behind_gates("views with noise of σ = 0.1, two a step", options=TWO_VIEWS),
    "adversarial views": behind_gates("views of radius 0.5, two steps of ascent", options=SEARCHED),
    "sharpness-aware": behind_gates(
        "passes at weights moved along the last noisy gradient", options={"optimizer": sharpness_aware}
    ),
}


def wrapped(family: Family, split: Split) -> DPLipModel:
    """The network of a row, of centred images of one norm."""
    shape = tuple(split.inputs.shape[1:])
    front = nn.Flatten(), layers.LayerCentering(), layers.SphereScaling(NORM)
    behind = [layers.CotangentGate(CAP)] if family.capped else []
    return DPLipModel(
        nn.Sequential(*front, family.body(math.prod(shape), split.classes), *behind),
        input_shape=shape,
        input_norm=math.sqrt(math.prod(shape)),
        loss=family.loss,
        constraint=family.constraint,
    )


class Stepping:
    """Steps on one batch, private or torch's own."""

    def __init__(self, family: Family | None, split: Split, rows: int) -> None:
        torch.manual_seed(0)
        self.inputs, self.targets = split.inputs[:rows], split.targets[:rows]
        self.family = family
        if family is None:
            self.net = nn.Sequential(nn.Flatten(), *relu(self.inputs[0].numel(), split.classes))
            self.plain = torch.optim.SGD(self.net.parameters(), 0.1, 0.9)
            return
        if family.points:
            self.targets = as_points(self.targets, split.classes)
        settings: dict[str, Any] = {
            "noise_multiplier": 1.0, "sample_rate": 1.0, "dataset_size": rows, "sampling": "none"
        }  # fmt: skip
        self.optimizer = CliplessDPSGD(wrapped(family, split), lr=0.1, **settings)
        self.views = {name: value for name, value in family.options.items() if name in ("augment", "multiplicity")}

    def seconds(self) -> float:
        """Of processor time, one step."""
        began = time.process_time()
        if self.family is None:
            self.plain.zero_grad()
            functional.cross_entropy(self.net(self.inputs), self.targets).backward()
            self.plain.step()
        else:
            self.optimizer.accumulate((self.inputs, self.targets), **self.views)
            self.optimizer.step()
        return time.process_time() - began


def relative_time(family: Family, split: Split, rows: int, rounds: int = 7) -> float:
    """The median of ratios to plain steps in between."""
    own, plain = Stepping(family, split, rows), Stepping(None, split, rows)
    ratios = []
    for _ in range(rounds + 2):
        # Plain ones before and behind: what else the machine does falls on both.
        before, mine, after = plain.seconds(), own.seconds(), plain.seconds()
        ratios.append(2.0 * mine / (before + after))
    return round(statistics.median(ratios[2:]), 2)


def trained(family: Family, split: Split, seed: int, epochs: int, rows: int) -> tuple[float, DPLipModel]:
    """The accuracy on test images after one training, in per cent."""
    torch.manual_seed(seed)
    model = wrapped(family, split)
    targets = as_points(split.targets, split.classes) if family.points else split.targets
    if family.private:
        fit(
            model, (split.inputs, targets), epsilon=EPSILON, delta=DELTA, epochs=epochs, batch_size=rows,
            audit=False, progress=False, reproducible_seed=seed, **family.options,
        )  # fmt: skip
    else:
        fit_without_privacy(
            model, (split.inputs, targets), epochs=epochs, batch_size=256, progress=False, rng_seed=seed
        )  # fmt: skip
    if family.points:
        return 100.0 * likelier_point(model, split.test_inputs, split.test_targets, split.classes), model
    return 100.0 * float(evaluate(model, split.test)[0] or 0.0), model


def row(name: str, split: Split, asked: argparse.Namespace) -> dict[str, Any]:
    """One family."""
    family, rows = FAMILIES[name], min(2048, len(split.inputs) // 5)
    began = time.process_time()
    results = [trained(family, split, seed, asked.epochs, rows) for seed in range(asked.seeds)]
    found = {
        "family": name,
        "what": family.what,
        "accuracy": [round(accuracy, 1) for accuracy, _ in results],
        "parameters": sum(p.numel() for p in results[0][1].net.parameters() if p.requires_grad),
        "processor seconds of training": round((time.process_time() - began) / asked.seeds, 1),
        "time of a step": relative_time(family, split, rows) if family.private else None,
        "Δ": round(results[0][1].sensitivity().total, 3) if family.private else None,
    }
    print(json.dumps(found, ensure_ascii=False), flush=True)
    return found


def small(split: Split) -> Split:
    """Images averaged to half of their size, where that is whole."""
    if split.inputs.shape[-1] % 4:
        return split
    inputs, test = (functional.avg_pool2d(images, 2) for images in (split.inputs, split.test_inputs))
    return Split(inputs, split.targets, test, split.test_targets, split.classes)


def page(rows: list[dict[str, Any]], asked: argparse.Namespace) -> str:
    """The table."""
    seeds = "one seed" if asked.seeds == 1 else f"mean of {asked.seeds} seeds"
    lines = [
        "# One row for each family of the literature",
        "",
        f"Private MNIST at ε = {EPSILON:g}, δ = {DELTA:g}: images averaged to 14 × 14, two hidden layers of {WIDTH} "
        f"(structured ones: of 196; causal mixing: of {WIDTH} channels), {asked.epochs} epochs, batches of 2,048, "
        f"{seeds}, test images once. No setting is tuned for any row: learning rate and optimizer are what `fit` takes "
        f"from public numbers, and behind constraints the loss's gradient is capped at {CAP:g}. So rows tell "
        "what a family costs at one price and effort, not what its best would be. A "
        "step's time is the median ratio to plain SGD steps of a ReLU network of the same widths, taken before and "
        "behind it, in processor time of one thread, views and projections included; torch "
        f"{torch.__version__}. Made by `python benchmarks/families.py --data-dir DIR`.",
        "",
        "| family | accuracy | parameters | a step | Δ | |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for found in rows:
        accuracy = statistics.fmean(found["accuracy"])
        spread = f" ± {statistics.pstdev(found['accuracy']):.1f}" if len(found["accuracy"]) > 1 else ""
        step = "" if found["time of a step"] is None else f"{found['time of a step']:.2f}×"
        bound = "" if found["Δ"] is None else f"{found['Δ']:g}"
        cells = f"{accuracy:.1f}{spread} %", f"{found['parameters']:,}", step, bound, found["what"]
        lines.append(f"| {found['family']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parser_of(text: str | None, *, epochs: int) -> argparse.ArgumentParser:
    """What a benchmark of trained networks is asked: where data is, whether a look is enough, how long to train."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--epochs", type=int, default=epochs)
    return parser


def main() -> None:
    """See above."""
    parser = parser_of(__doc__, epochs=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="+", choices=[*FAMILIES], default=[*FAMILIES], metavar="FAMILY")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    split = load_dataset("digits") if asked.quick else small(load_dataset("mnist", data_dir=asked.data_dir))
    rows = {found["family"]: found for found in (row(name, split, asked) for name in asked.rows)}
    if asked.quick:
        return
    path = RESULTS / "families.json"
    known = {found["family"]: found for found in json.loads(path.read_text())} if path.exists() else {}
    kept = [{**known, **rows}[name] for name in FAMILIES if name in {**known, **rows}]
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / "families.md").write_text(page(kept, asked))


if __name__ == "__main__":
    main()
