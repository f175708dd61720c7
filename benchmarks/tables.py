"""Eight tables at ε ≤ 1 with one set of hyper-parameters, statistics charged: AUROC on a held-out fifth.

    python benchmarks/tables.py --data-dir DIR --seeds 0 1 2

DIR holds `aloi.npz`, `campaign.npz` and so on, with arrays `X` and `y`, as ADBench makes them. Each run is kept in
`benchmarks/results/tables.json` as soon as it is done, and a run that is there is not repeated; `tables.md` shows them.

`clipless_dp.tables` holds the hyper-parameters. They were chosen with `--validate`, which trains on four fifths of the
training rows and evaluates on the others, split anew by each seed; it prints only. So does `--quick`, one seed of the
two smallest tables, and `--fifths`, which holds out each fifth of all rows in turn: on a small table, chance in the
split counts for more than the noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
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
        areas = [100 * entry["auroc"] for entry in private]
        spread = f" ± {statistics.stdev(areas):.2f}" if len(areas) > 1 else ""
        lines.append(
            f"| {table} | {private[0]['training_rows']} | {private[0]['delta']:g} "
            f"| {max(entry['epsilon'] for entry in private):.3f} | {statistics.mean(areas):.2f}{spread} ({len(areas)}) "
            f"| {published[0]:.1f}, {published[1]:.1f} | {f'{statistics.mean(noiseless):.2f}' if noiseless else '–'} "
            f"| {statistics.median(entry['seconds'] for entry in private):.0f} |"
        )
    return "\n".join([*lines, "", content["machine"], ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=sorted(DELTAS), default=sorted(DELTAS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fifths", action="store_true")
    options = parser.parse_args()

    content: dict[str, Any] = {"runs": []}
    if RESULTS.exists():
        content = json.loads(RESULTS.read_text())
    if options.quick:
        options.tables, options.seeds = ["yeast", "magic"], [0]
    if options.fifths:
        options.seeds = list(range(5))
    part = "fifth" if options.fifths else "validation" if options.validate else "test"
    prints_only = options.quick or part != "test"
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
                content["machine"] = (
                    f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s)"
                )
                RESULTS.write_text(json.dumps(content, indent=2) + "\n")
                RESULTS.with_suffix(".md").write_text(markdown(content))
        if areas:
            print(f"{table}: {statistics.mean(areas):.2f} over {len(areas)} seed(s)", flush=True)


if __name__ == "__main__":
    main()
