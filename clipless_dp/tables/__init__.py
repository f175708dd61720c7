"""Tables: one call from rows of any scale to a private classifier or regressor, one set of hyper-parameters for all."""

from clipless_dp.tables.fitting import bounded_table, fit_table, loaded_table
from clipless_dp.tables.models import TableClassifier, TableModel, TableRegressor
from clipless_dp.tables.settings import (
    LABELS_SHARE,
    LARGEST_BATCH,
    STATISTICS_SHARE,
    learning_rate,
    number_of_steps,
)

__all__ = [
    "LABELS_SHARE",
    "LARGEST_BATCH",
    "STATISTICS_SHARE",
    "TableClassifier",
    "TableModel",
    "TableRegressor",
    "bounded_table",
    "fit_table",
    "learning_rate",
    "loaded_table",
    "number_of_steps",
]
