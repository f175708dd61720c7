"""Train privately on a table of your own: an NPZ file with arrays X (rows, columns) and y (0 or 1).

python examples/tables.py --table donors.npz --epsilon 1 --delta 1e-6

About a fifth of the rows is held out. Columns may have any scales and missing cells: what brings them to one scale is
released with noise, and charged like the training to one ledger, which the statement is made from. Without --table,
scikit-learn's breast-cancer table is used.

python examples/tables.py --people

A data frame of made-up customers: text, missing cells, three answers, several rows for each person, whom ε protects.
"""

import argparse

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from accounting import trade_off
from clipless_dp.datasets import load_dataset
from clipless_dp.features import TableEncoding
from clipless_dp.tables import fit_table


def rows_and_labels(path: str | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if path is not None:
        data = load_dataset(path, classes=2)
        return data.inputs, data.targets, data.test_inputs, data.test_targets
    from sklearn.datasets import load_breast_cancer

    columns, labels = (torch.as_tensor(part) for part in load_breast_cancer(return_X_y=True))
    held_out = torch.arange(len(labels)) % 5 == 0
    return columns[~held_out], labels[~held_out], columns[held_out], labels[held_out]


CITIES = ("Basel", "Lyon", "Turin", "Wien")
ANSWERS = ("no", "perhaps", "yes")


def customers(rows: int = 12_000) -> dict[str, object]:
    """Columns of a data frame; ``pandas.DataFrame(customers())`` trains alike."""
    random = np.random.default_rng(0)
    city, age, untold = random.integers(0, 5, rows), random.normal(50.0, 10.0, rows), random.random(rows) < 0.3
    odds = np.array([2.0, -2.0, 1.0, -1.0, 0.0])[city] + 2.0 * untold + 0.1 * (age - 50.0) * ~untold
    level = odds + random.logistic(0.0, 0.5, rows)
    return {
        "city": np.array([*CITIES, "elsewhere"])[city],
        "age": np.where(untold, np.nan, age),
        "answer": np.array(ANSWERS)[(level > 0.0).astype(int) + (level > 1.5)],
        "customer": np.arange(rows) // 3,
    }


def of_people(epsilon: float, delta: float, statement: str | None) -> None:
    frame = customers()
    train, test = ({name: cells[part] for name, cells in frame.items()} for part in (slice(9_000), slice(9_000, None)))
    # Which cities and answers there are, and what stands in for an age, was known before any of these rows.
    encoding = TableEncoding(["age"], {"city": CITIES}, missing={"age": 50.0})
    trained = fit_table(
        train,
        "answer",
        encoding=encoding,
        classes=ANSWERS,
        groups="customer",
        rows_per_group=3,
        epsilon=epsilon,
        delta=delta,
    )
    right = np.mean(np.array(trained.predict(test)) == test["answer"])
    print(f"accuracy {100 * right:.1f} % of three answers, on {len(test['answer'])} held-out rows")
    print(f"epsilon  {trained.result.epsilon:.3f} (adding or removing one person), statistics included")
    curve = trade_off(trained.result.optimizer.accountant)
    print(f"attack   right at even odds {100 * curve.success:.1f} % of the time at most")
    if statement is not None:
        trained.report(statement, delta=delta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default=None, help="NPZ file")
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--statement", default=None, help="where to write the privacy statement, without a suffix")
    parser.add_argument("--people", action="store_true", help="the data frame of made-up customers")
    options = parser.parse_args()
    if options.people:
        of_people(options.epsilon, options.delta, options.statement)
        return

    rows, labels, test_rows, test_labels = rows_and_labels(options.table)
    trained = fit_table(rows, labels, epsilon=options.epsilon, delta=options.delta)

    area = roc_auc_score(test_labels, trained.scores(test_rows))
    print(f"AUROC    {100 * area:.1f} on {len(test_rows)} held-out rows")
    print(f"epsilon  {trained.result.epsilon:.3f} (adding or removing one row), statistics included")
    print(f"delta    {options.delta:g}")
    for event, count in trained.result.optimizer.accountant.ledger:
        print(f"ledger   {count} × {event}")
    if options.statement is not None:
        trained.report(options.statement, delta=options.delta)


if __name__ == "__main__":
    main()
