"""Private statistics of the data, for choices that come before training: moments, quantiles, and columns of tables.

Each is one release of all records: it goes into the ledger of an accountant before any noise is drawn, and ``fit`` with
that accountant calibrates training so that both together keep to the target.
"""

from clipless_dp.statistics.columns import Standardisation, private_standardisation
from clipless_dp.statistics.counts import private_fraction, private_quantile
from clipless_dp.statistics.intervals import PrivateInterval, private_interval
from clipless_dp.statistics.moments import Moments, private_moments
from clipless_dp.statistics.release import Releases
from clipless_dp.statistics.shares import private_shares

__all__ = [
    "Moments",
    "PrivateInterval",
    "Releases",
    "Standardisation",
    "private_fraction",
    "private_interval",
    "private_moments",
    "private_quantile",
    "private_shares",
    "private_standardisation",
]
