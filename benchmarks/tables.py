"""Eight tables at ε ≤ 1 with one set of hyper-parameters, statistics charged: AUROC on a held-out fifth.

    python benchmarks/tables.py --data-dir DIR --seeds 0 1 2

DIR holds `aloi.npz`, `campaign.npz` and so on, with arrays `X` and `y`, as ADBench makes them. Each run is kept in
`benchmarks/results/tables.json` as soon as it is done, and a run that is there is not repeated; `tables.md` shows them.

`clipless_dp.tables` holds the hyper-parameters. They were chosen with `--validate`, which trains on four fifths of the
training rows and evaluates on the others, split anew by each seed; it prints only. So does `--quick`, one seed of the
two smallest tables, and `--fifths`, which holds out each fifth of all rows in turn: on a small table, chance in the
split counts for more than the noise.

    pip install --target EBM --no-deps interpret-core
    PYTHONPATH=EBM python benchmarks/tables.py --data-dir DIR --rival dp-ebm
    pip install --target REGRESSION --no-deps diffprivlib scikit-learn==1.5.2
    PYTHONPATH=REGRESSION python benchmarks/tables.py --data-dir DIR --rival logistic

With `--rival`, the same rows, δ and held-out fifth go to another library: DP-EBM of `interpret-core`, and the logistic
regression of `diffprivlib`, whose guarantee is pure ε (δ = 0) under replacement of a row. Each has two contenders.
The first pays for all it learns of the columns: a share of ε goes to their ranges (`released_bounds`). The second,
`… at free scales`, takes these from the training rows without paying, as DP-EBM does by default, with a warning: that
is no guarantee of the ε it is told, and favours it. Settings are chosen for each table by itself (`grid`) on a fifth
of the training rows, split anew `--choices` times; that costs them no privacy here, nor did our choice cost us.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from clipless_dp.tables import fit_table

RESULTS = Path(__file__).resolve().parent / "results" / "tables.json"

DELTAS = {
    "aloi": 1e-5,
    "campaign": 1e-5,
    "celeba": 1e-6,
    "donors": 1e-6,
    "magic": 1e-5,
    "shuttle": 1e-5,
    "skin": 1e-6,
    "yeast": 1e-4,
}

PUBLISHED = {
    "aloi": (56.5, 56.2),
    "campaign": (90.0, 82.2),
    "celeba": (96.6, 96.5),
    "donors": (100.0, 100.0),
    "magic": (90.7, 89.7),
    "shuttle": (98.3, 99.4),
    "skin": (100.0, 99.8),
    "yeast": (66.8, 75.1),
}
"""DP-SGD and Clipless DP-SGD at ε ≤ 1: the best validation AUROC of a search (Béthune et al. 2024, Table 1)."""

Rows = tuple[Tensor, Tensor]
Scores = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]

SPLIT_SEED = 20240507
"""Fixes the test rows of these tables. They are public: of private ones a row more would change the whole permutation,
see `clipless_dp.datasets`."""


def train_and_test(path: Path) -> tuple[Rows, Rows]:
    """Four fifths of the rows, and the fifth that is held out."""
    with np.load(path, allow_pickle=False) as archive:
        rows, labels = archive["X"].astype(np.float32), archive["y"].astype(np.int64)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]

    def part(some: np.ndarray[Any, Any]) -> Rows:
        return torch.from_numpy(rows[some]), torch.from_numpy(labels[some])

    return part(train), part(test)


def split(table: str, data_dir: Path, part: str, number: int) -> tuple[Rows, Rows]:
    """Training and held-out rows with their labels.

    Args:
        table: its name.
        data_dir: its folder.
        part: ``"test"``; ``"validation"``, where both are training rows; ``"fifth"`` of all rows, the first being the
            test rows.
        number: seed of the validation split, or of the fifth.
    """
    train, test = train_and_test(data_dir / f"{table}.npz")
    if part == "test":
        return train, test
    rows, labels = train
    if part == "validation":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))
        held_out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    else:
        rows, labels = torch.cat([test[0], rows]), torch.cat([test[1], labels])
        fifths = torch.arange(len(rows)).tensor_split(5)
        held_out, kept = fifths[number], torch.cat([*fifths[:number], *fifths[number + 1 :]])
    return (rows[kept], labels[kept]), (rows[held_out], labels[held_out])


def run(table: str, data_dir: Path, seed: int, epsilon: float, part: str) -> dict[str, Any]:
    (rows, labels), (test_rows, test_labels) = split(table, data_dir, part, seed)
    start = time.perf_counter()
    trained = fit_table(rows, labels, epsilon=epsilon, delta=DELTAS[table], reproducible_seed=seed, progress=False)
    seconds = time.perf_counter() - start
    return {
        "table": table,
        "seed": seed,
        "target": epsilon,
        "auroc": float(roc_auc_score(test_labels, trained.scores(test_rows))),
        "epsilon": trained.result.epsilon,
        "delta": DELTAS[table],
        "training_rows": len(rows),
        "test_rows": len(test_rows),
        "columns": rows.shape[1],
        "seconds": round(seconds, 1),
        "ledger": [[str(event), count] for event, count in trained.result.optimizer.accountant.ledger],
    }


EXPONENTS = np.arange(-20, 21)
"""Magnitudes up to ``2**-20``, then by powers of two, the last without end."""

RIVALS = ("dp-ebm", "logistic")
FREE = " at free scales"


def grid(rival: str, rows: int, free: bool) -> list[dict[str, float]]:
    """The settings that are tried.

    Of DP-EBM, all others are its defaults: its accumulated noise depends on ``learning_rate · max_rounds``. ``norm`` is
    that of a row, in units of the root of the number of columns, after these are brought to one scale. ``share`` of ε
    goes to the columns' ranges: a larger one is tried where there are few rows; at 0, columns are taken as they are.
    """
    rates = (0.003, 0.01, 0.03, 0.1, 0.3) if rows < 20_000 else (0.03, 0.1, 0.3, 1.0)
    settings = [{"learning_rate": rate} for rate in rates]
    if rival == "logistic":
        settings = [{"norm": norm, "C": c} for norm, c in itertools.product((0.25, 0.5, 1.0), (0.001, 0.01, 0.1, 1.0))]
    if free:
        return settings
    shares = (0.1, 0.3) if rows < (50_000 if rival == "logistic" else 20_000) else (0.1,)
    if rival == "logistic":
        shares = (0.0, *shares)
    return [{"share": share, **others} for share, others in itertools.product(shares, settings)]


def released_bounds(rows: np.ndarray[Any, Any], epsilon: float, seed: int) -> np.ndarray[Any, Any]:
    """Ranges of columns ``(D, 2)``, ε-differentially private if one row is added or removed.

    A histogram of each column's signed magnitudes by powers of two, with Laplace noise of scale ``D/ε``: a row is in
    one bin of each column. The range ends at the outermost bins whose count is beyond what noise reaches in a tenth of
    all columns, or is that of the fullest one (Wilson et al. 2020, "approximate bounds", of Google's library).
    """
    count = rows.shape[1]
    rng, scale = np.random.default_rng(seed), count / epsilon
    steps = len(EXPONENTS)
    edges = np.concatenate([-(2.0 ** EXPONENTS[::-1]), [0.0], 2.0**EXPONENTS])
    with np.errstate(divide="ignore"):
        exponents = np.ceil(np.log2(np.abs(rows)))
    places = np.clip(exponents, EXPONENTS[0], EXPONENTS[-1]).astype(np.int64) - EXPONENTS[0]
    places = np.where(rows > 0, steps + places, steps - 1 - places)
    threshold = scale * np.log(2 * steps / 0.2)
    bounds = np.empty((count, 2))
    for column in range(count):
        counts = np.bincount(places[:, column], minlength=2 * steps) + rng.laplace(scale=scale, size=2 * steps)
        found = np.flatnonzero(counts > threshold)
        if len(found) == 0:
            found = np.array([counts.argmax()])
        bounds[column] = edges[found[0]], edges[found[-1] + 1]
    return bounds


def fit_rival(
    rival: str, rows: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], settings: dict[str, float], *, free: bool,
    epsilon: float, delta: float, seed: int,
) -> Scores:  # fmt: skip
    """Trains another library; returns what scores rows.

    Args:
        rival: ``"dp-ebm"`` or ``"logistic"``.
        rows: ``(N, D)``.
        labels: 0 or 1.
        settings: one of ``grid``.
        free: whether ranges or scales of columns are taken from the rows without paying.
        epsilon: of all together, but for what is free.
        delta: of DP-EBM.
        seed: of all noise.
    """
    settings = dict(settings)
    spent = settings.pop("share", 0.0) * epsilon
    if free:
        bounds = np.stack([rows.min(0), rows.max(0)], axis=1)
    else:
        bounds = released_bounds(rows, spent, seed) if spent else np.array([[-1.0, 1.0]] * rows.shape[1])
    if rival == "dp-ebm":
        from interpret.privacy import DPExplainableBoostingClassifier

        # Each column is said to be a number: to find that out would not be charged either.
        booster = DPExplainableBoostingClassifier(
            feature_types=["continuous"] * rows.shape[1], privacy_bounds=bounds, epsilon=epsilon - spent, delta=delta,
            random_state=seed, n_jobs=1, **settings,
        )  # fmt: skip
        with warnings.catch_warnings():
            # That a seed makes the noise known.
            warnings.simplefilter("ignore", UserWarning)
            booster.fit(rows, labels)
        scores: Scores = booster.decision_function
        return scores
    from diffprivlib.models import LogisticRegression

    if free:
        middle, width = rows.mean(0), np.maximum(rows.std(0), 1e-12)
    else:
        middle, width = bounds.mean(1), (bounds[:, 1] - bounds[:, 0]) / 2.0
    regression = LogisticRegression(
        epsilon=epsilon - spent, data_norm=settings["norm"] * rows.shape[1] ** 0.5, C=settings["C"], max_iter=1000,
        random_state=seed,
    )  # fmt: skip
    with warnings.catch_warnings():
        # It is made for an older scikit-learn.
        warnings.simplefilter("ignore", FutureWarning)
        regression.fit((rows - middle) / width, labels)
    return lambda some: regression.decision_function((some - middle) / width)


def run_rival(
    name: str, settings: dict[str, float], table: str, data_dir: Path, part: str, seed: int, epsilon: float
) -> dict[str, Any]:
    rival = name.removesuffix(FREE)
    (rows, labels), (test_rows, test_labels) = split(table, data_dir, part, seed)
    start = time.perf_counter()
    scores = fit_rival(
        rival, rows.double().numpy(), labels.numpy().ravel(), settings, free=name != rival, epsilon=epsilon,
        delta=DELTAS[table], seed=seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return {
        "rival": name,
        "table": table,
        "split": part,
        "settings": settings,
        "seed": seed,
        "target": epsilon,
        "auroc": float(roc_auc_score(test_labels, scores(test_rows.double().numpy()))),
        "delta": DELTAS[table] if rival == "dp-ebm" else 0.0,
        "training_rows": len(rows),
        "seconds": round(seconds, 2),
    }


def compare(rival: str, options: argparse.Namespace, content: dict[str, Any], keep: Callable[[], None]) -> None:
    """Chooses settings on held-out training rows, table by table, and runs the best on the test rows."""
    kept = content.setdefault("rivals", [])

    def once(name: str, settings: dict[str, float], table: str, part: str, seed: int) -> dict[str, Any]:
        wanted = {"rival": name, "settings": settings, "table": table, "split": part, "seed": seed}
        wanted["target"] = options.epsilon
        for entry in kept:
            if all(entry[field] == value for field, value in wanted.items()):
                found: dict[str, Any] = entry
                return found
        entry = run_rival(name, settings, table, options.data_dir, part, seed, options.epsilon)
        print(
            f"{table}, {name}, {settings}, {part}, seed {seed}: AUROC {100 * entry['auroc']:.2f}, {entry['seconds']} s",
            flush=True,
        )
        kept.append(entry)
        keep()
        return entry

    for table, free in itertools.product(options.tables, (False, True)):
        name = rival + FREE * free
        rows = len(train_and_test(options.data_dir / f"{table}.npz")[0][0])

        def reached(settings: dict[str, float], name: str = name, table: str = table) -> float:
            areas = [once(name, settings, table, "validation", seed)["auroc"] for seed in range(options.choices)]
            return statistics.fmean(areas)

        best = max(grid(rival, rows, free), key=reached)
        # Of a choice among fewer.
        former = {"rival": name, "table": table, "split": "test", "target": options.epsilon}
        kept[:] = [entry for entry in kept if entry["settings"] == best or not former.items() <= entry.items()]
        for seed in options.seeds:
            once(name, best, table, "test", seed)


def rivals_markdown(content: dict[str, Any]) -> list[str]:
    """The table of the others, beside ours at the same ε."""
    entries = [entry for entry in content.get("rivals", []) if entry["split"] == "test" and entry["target"] == 1.0]
    if not entries:
        return []
    names = [name + free for name in RIVALS for free in ("", FREE)]
    lines = [
        "## Beside other libraries",
        "",
        "`python benchmarks/tables.py --rival dp-ebm` (`interpret-core`) and `--rival logistic` (`diffprivlib`: pure",
        "ε) at ε = 1: AUROC ± deviation (seeds). A rival's settings are the best of 4 to 36 (`grid`) for each table by",
        "itself, on held-out training rows; ours are one set for all. Rivals release ranges of columns for a tenth or",
        "three of ε, or (logistic) take columns as they are; *at free scales* they read ranges, means and deviations",
        "from the rows without paying, as DP-EBM does by default: no guarantee of ε = 1.",
        "",
        "| table | ours | " + " | ".join(names) + " | seconds |",
        "| --- | --- |" + " --- |" * (len(names) + 1),
    ]
    for table in PUBLISHED:
        own = [entry for entry in content["runs"] if entry["table"] == table and entry["target"] == 1.0]
        cells, seconds = [area(own)], []
        for name in names:
            there = [entry for entry in entries if (entry["table"], entry["rival"]) == (table, name)]
            cells.append(area(there))
            if there:
                seconds.append(f"{statistics.median(entry['seconds'] for entry in there):.0f}")
        lines.append(f"| {table} | {' | '.join(cells)} | {', '.join(seconds)} |")
    return [*lines, ""]


def area(entries: list[dict[str, Any]]) -> str:
    """Mean and deviation of AUROC in percent, and how many seeds."""
    if not entries:
        return "–"
    areas = [100 * entry["auroc"] for entry in entries]
    spread = f" ± {statistics.stdev(areas):.2f}" if len(areas) > 1 else ""
    return f"{statistics.mean(areas):.2f}{spread} ({len(areas)})"


def markdown(content: dict[str, Any]) -> str:
    lines = [
        "# Tables at ε ≤ 1",
        "",
        "AUROC in percent on a held-out fifth, `python benchmarks/tables.py`: one set of hyper-parameters for all",
        "tables, chosen on held-out training rows; the statistics that standardise columns are charged to the same",
        "ledger. The published figures are the best validation AUROC of a search for each table (Béthune et al. 2024).",
        "ε = 1000 is the same code with almost no noise.",
        "",
        "| table | training rows | δ | ε | AUROC ± deviation (seeds) | DP-SGD, clipless | ε = 1000 | seconds a run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for table, published in PUBLISHED.items():
        runs = [entry for entry in content["runs"] if entry["table"] == table]
        private = [entry for entry in runs if entry["target"] == 1.0]
        noiseless = [100 * entry["auroc"] for entry in runs if entry["target"] == 1000.0]
        if not private:
            continue
        lines.append(
            f"| {table} | {private[0]['training_rows']} | {private[0]['delta']:g} "
            f"| {max(entry['epsilon'] for entry in private):.3f} | {area(private)} "
            f"| {published[0]:.1f}, {published[1]:.1f} | {f'{statistics.mean(noiseless):.2f}' if noiseless else '–'} "
            f"| {statistics.median(entry['seconds'] for entry in private):.0f} |"
        )
    return "\n".join([*lines, "", *rivals_markdown(content), content["machine"], ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=sorted(DELTAS), default=sorted(DELTAS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fifths", action="store_true")
    parser.add_argument("--rival", choices=RIVALS, help="another library, with settings chosen for each table")
    parser.add_argument("--choices", type=int, default=3, help="validation runs of each setting of a rival")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON; .md is put beside it")
    options = parser.parse_args()

    content: dict[str, Any] = {"runs": []}
    if options.out.exists():
        content = json.loads(options.out.read_text())
    if options.quick:
        options.tables, options.seeds = ["yeast", "magic"], [0]
    if options.fifths:
        options.seeds = list(range(5))
    part = "fifth" if options.fifths else "validation" if options.validate else "test"
    prints_only = options.quick or part != "test"

    def keep() -> None:
        content["machine"] = f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s)"
        options.out.write_text(json.dumps(content, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(markdown(content))

    if options.rival:
        if prints_only:
            parser.error("--rival chooses and tests by itself: leave out --validate, --quick and --fifths")
        compare(options.rival, options, content, keep)
        return
    done = {(entry["table"], entry["seed"], entry["target"]) for entry in content["runs"]}
    for table in options.tables:
        areas = []
        for seed in options.seeds:
            if not prints_only and (table, seed, options.epsilon) in done:
                continue
            entry = run(table, options.data_dir, seed, options.epsilon, part)
            areas.append(100 * entry["auroc"])
            print(
                f"{table}, seed {seed}: AUROC {areas[-1]:.2f}, ε = {entry['epsilon']:.4f}, {entry['seconds']} s",
                flush=True,
            )
            if not prints_only:
                content["runs"].append(entry)
                keep()
        if areas:
            print(f"{table}: {statistics.mean(areas):.2f} over {len(areas)} seed(s)", flush=True)


if __name__ == "__main__":
    main()
