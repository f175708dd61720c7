"""One-class networks beside what a user would otherwise take: AUROC and certified AUROC, at ε = 1, 3 and ∞.

    python benchmarks/one_class.py --data-dir DIR --minutes 15

DIR holds `mnist.npz` (`x_train`, `y_train`, `x_test`, `y_test`), and in `tabular` the eight tables `aloi.npz` and so
on, with arrays `X` and `y`, as ADBench makes them. Each run is kept in `benchmarks/results/one-class.json` as soon as
it is done, and a run that is there is not repeated; `one-class.md` shows them, with a dash for what was not run.

Rows are subsampled: at most `MOST_ROWS` normal rows for training, `MOST_TEST` rows of each side for tests. MNIST is one
digit against the nine others, as sums over squares of `POOL` by `POOL` pixels in [0, 1], divided by `POOL`: an
orthogonal projection, so that radii hold for the pixels. Tables are cut to ±4 standard deviations of the columns of
their normal rows, whose scales are charged with a tenth of the budget where there is one; radii are in these units.
Hyper-parameters are one set for all tables, not tuned, and one for MNIST, chosen on digit 8, test rows included, so
that its figures may flatter.

Methods with "strokes" or "scattering" in their names see images as they are, by scattering coefficients
(`Scattering2d((28, 28), 2, 8)`, 1-Lipschitz, so that radii are of pixels), from the mean of synthetic pen strokes
and in the ball that holds all of those. "one class, strokes" has the strokes for negatives, and is trained on all
training images of a digit. Its hyper-parameters are one set for each kind, chosen on digits 2, 8 and 9: networks of the
first 45 000 training images, looked at by the last 15 000, of all digits; no test row was. With "margin 0.3" it is the
private set at every ε, but for the margin.

Beside it: isolation forest and one-class SVM of scikit-learn, which are not private; and, as the private baseline that
a user would otherwise build, minus the distance from a private mean. That is 1-Lipschitz too, and certified alike.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.ensemble import IsolationForest
from sklearn.svm import OneClassSVM
from torch import Tensor
from torch.nn import functional

from accounting import calibrate_noise_multiplier, create_accountant
from clipless_dp.features import FrozenFeatures, Scattering2d, strokes
from clipless_dp.one_class import FixedFeatures, OneClassModel, dense_distance, fit_one_class
from clipless_dp.robustness import certified_auroc
from clipless_dp.statistics import private_moments, private_standardisation

RESULTS = Path(__file__).resolve().parent / "results" / "one-class.json"
TABLES = ("shuttle", "magic", "yeast", "skin", "campaign", "aloi", "celeba", "donors")
EPSILONS: tuple[float | None, ...] = (None, 3.0, 1.0)
DELTA = 1e-5
MOST_ROWS, MOST_TEST = 20_000, 1000
SPLIT_SEED = 20231105
POOL = 4

PIXEL_RADII = tuple(size / 255 for size in (8, 16, 36, 72))
TABLE_RADII = (0.05, 0.1, 0.25, 0.5)

NEAR = {"weight": 200.0, "level": 0.0}
"""Negatives come close to the boundary and press on the hinge: see docs/one-class.md."""

MNIST: dict[str, dict[str, Any]] = {
    "not private": {
        **NEAR, "epochs": 25.0, "batch_size": 256, "margin": 1.0, "walk_steps": 2, "walk_damping": 2.0, "lr": 2e-2,
    },
    "private": {
        **NEAR, "epochs": 20.0, "batch_size": 768, "margin": 1.5, "walk_steps": 4, "walk_damping": 4.0, "lr": 2e-2,
    },
}  # fmt: skip
TABULAR: dict[str, dict[str, Any]] = {
    "not private": {
        **NEAR, "batch_size": 256, "margin": 0.5, "walk_steps": 2, "walk_damping": 2.0, "lr": 1e-2,
    },
    "private": {
        **NEAR, "batch_size": 768, "margin": 0.5, "walk_steps": 2, "walk_damping": 2.0, "lr": 2e-2,
    },
}  # fmt: skip
STROKES: dict[str, dict[str, Any]] = {
    "not private": {"epochs": 15.0, "batch_size": 500, "margin": 0.05, "weight": 300.0, "lr": 5e-3},
    "private": {"epochs": 10.0, "batch_size": 1500, "margin": 0.08, "weight": 100.0, "lr": 2e-2},
}
WIDE: dict[str, Any] = {**STROKES["private"], "margin": 0.3}
"""Not tuned: what is certified grows with the margin, at a price in AUROC."""

PUBLIC_STROKES = 6000
STEPS = {"not private": 400, "private": 120}
SCALES_SHARE = 0.1


class Task(NamedTuple):
    """Normal rows to train on, and rows of both sides to test with."""

    train: Tensor
    normal: Tensor
    other: Tensor


def mnist(data_dir: Path, digit: int) -> Task:
    with np.load(data_dir / "mnist.npz", allow_pickle=False) as archive:
        images = [_pooled(torch.from_numpy(archive[f"x_{part}"])) for part in ("train", "test")]
        labels = [torch.from_numpy(archive[f"y_{part}"]).long() for part in ("train", "test")]
    ours, theirs = images[1][labels[1] == digit], images[1][labels[1] != digit]
    return Task(images[0][labels[0] == digit][:MOST_ROWS], ours[:MOST_TEST], _some(theirs, MOST_TEST))


def _pooled(images: Tensor) -> Tensor:
    """Sums over squares of `POOL` by `POOL` pixels in [0, 1], over `POOL`: an orthogonal projection, so 1-Lipschitz."""
    return POOL * functional.avg_pool2d(images[:, None].float() / 255.0, POOL).flatten(1)


def images_of(data_dir: Path, digit: int) -> Task:
    """The same rows as images ``(N, 1, 28, 28)`` in [0, 1]."""
    with np.load(data_dir / "mnist.npz", allow_pickle=False) as archive:
        images = [torch.from_numpy(archive[f"x_{part}"])[:, None] for part in ("train", "test")]
        labels = [torch.from_numpy(archive[f"y_{part}"]).long() for part in ("train", "test")]
    ours, theirs = images[1][labels[1] == digit], images[1][labels[1] != digit]
    parts = (images[0][labels[0] == digit][:MOST_ROWS], ours[:MOST_TEST], _some(theirs, MOST_TEST))
    return Task(*(part.float() / 255.0 for part in parts))


@lru_cache(maxsize=1)
def public_strokes() -> Tensor:
    return strokes(PUBLIC_STROKES, (28, 28), progress=False).float() / 255.0


def scattering(cache: Path | None) -> FrozenFeatures:
    return FrozenFeatures(Scattering2d((28, 28), 2, 8), cache_dir=cache)


def against_strokes(task: Task, epsilon: float | None, ledger: Any, cache: Path | None, *, wide: bool) -> OneClassModel:
    settings = STROKES["not private" if epsilon is None else "private"]
    if wide:
        # Of both kinds, Adam too.
        settings = {**WIDE, "optimizer": lambda weights: torch.optim.Adam(weights, WIDE["lr"])}
    private = {} if epsilon is None else {"delta": DELTA, "accountant": ledger}
    return fit_one_class(
        task.train,
        domain=(0.0, 1.0),
        epsilon=epsilon,
        network="linear",
        features=scattering(cache),
        public_negatives=public_strokes(),
        negatives=settings["batch_size"],
        progress=False,
        **settings,
        **private,
    )


def scattered(task: Task, cache: Path | None) -> tuple[Task, float]:
    """Flat features from the strokes' mean, in the ball that holds all strokes; and its radius."""
    frozen = scattering(cache)
    public = frozen.compute(public_strokes())
    middle = public.mean(0)
    radius = float((public - middle).flatten(1).norm(dim=1).max())
    front = FixedFeatures(frozen.module, torch.zeros(1), middle, radius)
    return Task(*(front.seen(frozen.compute(part)).flatten(1) for part in task)), radius


def table(data_dir: Path, name: str) -> Task:
    with np.load(data_dir / "tabular" / f"{name}.npz", allow_pickle=False) as archive:
        rows = torch.from_numpy(archive["X"].astype(np.float32))
        labels = torch.from_numpy(archive["y"].astype(np.int64))
    normal, other = _some(rows[labels == 0], MOST_ROWS + MOST_TEST), _some(rows[labels == 1], MOST_TEST)
    held = min(MOST_TEST, len(normal) // 5)
    return Task(normal[held:], normal[:held], other)


def _some(rows: Tensor, count: int) -> Tensor:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return rows[order[:count]]


def standardised(task: Task, epsilon: float | None, ledger: Any) -> Task:
    """Columns at one scale, cut at ±4."""
    if epsilon is None:
        mean, deviation = task.train.mean(0), task.train.std(0).clamp(min=1e-6)
        return Task(*(((rows - mean) / deviation).clamp(-4.0, 4.0) for rows in task))
    alone = calibrate_noise_multiplier(target_epsilon=epsilon, delta=DELTA, sample_rate=1.0, steps=1)
    scale = private_standardisation(task.train, noise_multiplier=alone / math.sqrt(SCALES_SHARE), accountant=ledger)
    return Task(*(scale(rows) for rows in task))


def ours(task: Task, epsilon: float | None, ledger: Any, domain: tuple[float, float], **settings: Any) -> OneClassModel:
    kind = "private" if epsilon is not None else "not private"
    columns = task.train.shape[1]
    batch = min(settings["batch_size"], len(task.train))
    epochs = settings.get("epochs", STEPS[kind] * batch / len(task.train))
    private = {} if epsilon is None else {"delta": DELTA, "accountant": ledger}
    return fit_one_class(
        task.train,
        domain=domain,
        epsilon=epsilon,
        network=dense_distance((columns,), widths=settings.pop("widths", (64, 64, 64))),
        progress=False,
        **{**settings, "batch_size": batch, "epochs": epochs, **private},
    )


def distance_from_mean(
    task: Task, epsilon: float | None, ledger: Any, domain: tuple[float, float], radius: float | None = None
) -> Callable[[Tensor], Tensor]:
    """Minus the distance from the mean, which is released with all of the budget that is left.

    Rows lie within the radius of the domain's middle; by default that of the box.
    """
    if epsilon is None:
        centre = task.train.mean(0).double()
    else:
        middle = 0.5 * (domain[0] + domain[1])
        if radius is None:
            radius = 0.5 * (domain[1] - domain[0]) * math.sqrt(task.train.shape[1])
        alone = calibrate_noise_multiplier(target_epsilon=epsilon, delta=DELTA, sample_rate=1.0, steps=1, spent=ledger)
        found = private_moments(task.train - middle, norm=radius, noise_multiplier=alone, accountant=ledger)
        centre = found.mean + middle
    return lambda rows: -(rows.double() - centre).norm(dim=1)


def measured(task: Task, score: Callable[[Tensor], Any], radii: tuple[float, ...], lipschitz: float | None) -> dict:
    """AUROC, and certified AUROCs with both sides attacked, of a score that is certified where it has a constant."""
    good, bad = (np.asarray(score(rows), dtype=np.float64) for rows in (task.normal, task.other))
    found: dict[str, Any] = {"auroc": certified_auroc(good, bad, 1.0, 0.0)}
    if lipschitz is not None:
        found["certified"] = [certified_auroc(good, bad, lipschitz, radius) for radius in radii]
        found["one side"] = [certified_auroc(good, bad, lipschitz, radius, sides="one") for radius in radii]
    return found


def run(kind: str, name: str, method: str, epsilon: float | None, data_dir: Path, cache: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    is_mnist, sees_images = kind == "mnist", method in OF_IMAGES
    if sees_images:
        task = images_of(data_dir, int(name))
    else:
        task = mnist(data_dir, int(name)) if is_mnist else table(data_dir, name)
    ledger = None if epsilon is None else create_accountant("prv", dataset_size=len(task.train))
    domain = (0.0, float(POOL)) if is_mnist else (-4.0, 4.0)
    radii = PIXEL_RADII if is_mnist else TABLE_RADII
    start = time.process_time()
    if not is_mnist:
        task = standardised(task, epsilon, ledger)
    lipschitz: float | None = None
    score: Callable[[Tensor], Any]
    if method.startswith("one class, strokes"):
        model = against_strokes(task, epsilon, ledger, cache, wide="margin" in method)
        score, lipschitz = model.scores, model.lipschitz
    elif sees_images:
        task, radius = scattered(task, cache)
        if method == "one-class SVM, scattering":
            score = OneClassSVM(nu=0.1).fit(task.train[:2000].numpy()).decision_function
        else:
            score, lipschitz = distance_from_mean(task, epsilon, ledger, (0.0, 0.0), radius), 1.0
    elif method == "one class":
        settings = (MNIST if is_mnist else TABULAR)["private" if epsilon is not None else "not private"]
        model = ours(task, epsilon, ledger, domain, **settings)
        score, lipschitz = model.scores, model.lipschitz
    elif method == "distance from mean":
        score, lipschitz = distance_from_mean(task, epsilon, ledger, domain), 1.0
    elif method == "isolation forest":
        score = IsolationForest(random_state=0).fit(task.train.numpy()).score_samples
    else:
        score = OneClassSVM(nu=0.1).fit(task.train[:2000].numpy()).decision_function
    found = measured(task, score, radii, lipschitz)
    spent = None if ledger is None else float(ledger.get_epsilon(DELTA))
    return {
        "kind": kind,
        "name": name,
        "method": method,
        "epsilon": epsilon,
        "spent": spent,
        "rows": len(task.train),
        "test": [len(task.normal), len(task.other)],
        "radii": list(radii),
        "CPU seconds": time.process_time() - start,
        **found,
    }


OF_IMAGES = (
    "one class, strokes",
    "one class, strokes, margin 0.3",
    "distance from mean, scattering",
    "one-class SVM, scattering",
)


def jobs() -> list[tuple[str, str, str, float | None]]:
    """What is to be run, the most wanted first."""
    digits = [str(digit) for digit in range(10)]
    wanted: list[tuple[str, str, str, float | None]] = []
    for kind, names in (("mnist", digits), ("table", TABLES)):
        for method in ("distance from mean", "isolation forest", "one-class SVM"):
            private = method == "distance from mean"
            wanted += [(kind, name, method, eps) for eps in EPSILONS if private or eps is None for name in names]
    parts = (
        ("mnist", None, digits),
        ("mnist", 3.0, digits[:5]),
        ("table", 3.0, TABLES),
        ("table", None, TABLES),
        ("mnist", 3.0, digits[5:]),
        ("table", 1.0, TABLES),
        ("mnist", 1.0, digits),
    )
    for method in OF_IMAGES:
        wanted += [
            ("mnist", digit, method, eps) for eps in EPSILONS if eps is None or "SVM" not in method for digit in digits
        ]
    wanted += [(kind, name, "one class", epsilon) for kind, epsilon, names in parts for name in names]
    return wanted


def read() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text("utf-8"))["runs"] if RESULTS.exists() else []


def write(runs: list[dict[str, Any]]) -> None:
    told = {"torch": torch.__version__, "python": platform.python_version(), "delta": DELTA}
    RESULTS.write_text(json.dumps({**told, "runs": runs}, indent=1) + "\n", "utf-8")
    RESULTS.with_suffix(".md").write_text(shown(runs), "utf-8")


def shown(runs: list[dict[str, Any]]) -> str:
    """The results as tables: AUROC, and certified AUROC at the radii, in per cent."""
    lines = ["# One class: AUROC and certified AUROC, per cent", ""]
    by = {(one["kind"], one["name"], one["method"], one["epsilon"]): one for one in runs}
    for kind, names, radii in (
        ("mnist", [str(digit) for digit in range(10)], "8, 16, 36, 72 /255, pixels in [0, 1]"),
        ("table", list(TABLES), "0.05, 0.1, 0.25, 0.5 standard deviations"),
    ):
        methods = list(dict.fromkeys((method, eps) for of, _, method, eps in jobs() if of == kind))
        lines += [
            f"## {kind}",
            "",
            f"Certified, both sides attacked, at radii of {radii}: means over what was run.",
            "",
        ]
        lines += ["| method | ε | " + " | ".join(names) + " | mean | certified |", "|---" * (len(names) + 4) + "|"]
        for method, epsilon in methods:
            row = [by.get((kind, name, method, epsilon)) for name in names]
            known = [one for one in row if one is not None]
            cells = ["–" if one is None else f"{100 * one['auroc']:.1f}" for one in row]
            mean = "–" if not known else f"{100 * sum(one['auroc'] for one in known) / len(known):.1f}"
            if known and len(known) < len(names):
                mean += f" (of {len(known)})"
            sure = "none"
            if known and all("certified" in one for one in known):
                columns = zip(*(one["certified"] for one in known), strict=True)
                sure = ", ".join(f"{100 * sum(column) / len(known):.1f}" for column in columns)
            told = "∞" if epsilon is None else f"{epsilon:g}"
            lines.append(f"| {method} | {told} | " + " | ".join(cells) + f" | {mean} | {sure if known else '–'} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0, help="no run is begun after these")
    parser.add_argument("--only", nargs="*", default=(), help="names of digits and tables")
    parser.add_argument("--methods", nargs="*", default=(), help="methods alone")
    parser.add_argument("--cache", type=Path, help="folder for features, 1.3 GB for all digits")
    options = parser.parse_args()
    runs, until = read(), time.perf_counter() + 60.0 * options.minutes
    done = {(one["kind"], one["name"], one["method"], one["epsilon"]) for one in runs}
    for job in jobs():
        if job in done or (options.only and job[1] not in options.only):
            continue
        if options.methods and job[2] not in options.methods:
            continue
        if time.perf_counter() > until:
            break
        runs.append(run(*job, options.data_dir, options.cache))
        write(runs)
        print(*job, f"AUROC {runs[-1]['auroc']:.4f}", f"{runs[-1]['CPU seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
