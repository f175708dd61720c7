"""Train privately on a table of your own: an NPZ file with arrays X (rows, columns) and y (0 or 1).

python examples/tables.py --table donors.npz --epsilon 1 --delta 1e-6

About a fifth of the rows is held out. Columns may have any scales and missing cells: what brings them to one scale is
released with noise, and charged like the training to one ledger, which the statement is made from. Without --table,
scikit-learn's breast-cancer table is used.
"""

import argparse

import torch
from sklearn.metrics import roc_auc_score

from clipless_dp import report
from clipless_dp.datasets import load_dataset
from clipless_dp.tables import fit_table


def rows_and_labels(path: str | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if path is not None:
        data = load_dataset(path, classes=2)
        return data.inputs, data.targets, data.test_inputs, data.test_targets
    from sklearn.datasets import load_breast_cancer

    columns, labels = (torch.as_tensor(part) for part in load_breast_cancer(return_X_y=True))
    held_out = torch.arange(len(labels)) % 5 == 0
    return columns[~held_out], labels[~held_out], columns[held_out], labels[held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default=None, help="NPZ file")
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--statement", default=None, help="where to write the privacy statement, without a suffix")
    options = parser.parse_args()

    rows, labels, test_rows, test_labels = rows_and_labels(options.table)
    trained = fit_table(rows, labels, epsilon=options.epsilon, delta=options.delta)

    area = roc_auc_score(test_labels, trained.scores(test_rows))
    print(f"AUROC    {100 * area:.1f} on {len(test_rows)} held-out rows")
    print(f"epsilon  {trained.result.epsilon:.3f} (adding or removing one row), statistics included")
    print(f"delta    {options.delta:g}")
    for event, count in trained.result.optimizer.accountant.ledger:
        print(f"ledger   {count} × {event}")
    if options.statement is not None:
        report(trained.result.optimizer, options.statement, delta=options.delta)


if __name__ == "__main__":
    main()
