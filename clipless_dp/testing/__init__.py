"""What tries to break a layer's bounds: inherit :class:`LipschitzLayerTestCase`, or attack a model by hand.

Needs no test framework: failures are ``AssertionError``.
"""

from clipless_dp.testing.attacks import (
    BoundBroken,
    Record,
    add_or_remove_one,
    ascend,
    attack,
    attack_parameters,
    bounds_of,
    brute_force,
    observed,
    per_sample_gradients,
    summed_gradients,
)
from clipless_dp.testing.company import Row, check_company, check_counts, check_loss_rows_apart, hostile_rows
from clipless_dp.testing.consistency import Inconsistent
from clipless_dp.testing.layer_test_case import BoundTooLoose, LipschitzLayerTestCase
from clipless_dp.testing.probes import Case, Probe, Probed, inner_product, wrap
from clipless_dp.testing.signals import signals, sized_signals

__all__ = [
    "BoundBroken",
    "BoundTooLoose",
    "Case",
    "Inconsistent",
    "LipschitzLayerTestCase",
    "Probe",
    "Probed",
    "Record",
    "Row",
    "add_or_remove_one",
    "ascend",
    "attack",
    "attack_parameters",
    "bounds_of",
    "brute_force",
    "check_company",
    "check_counts",
    "check_loss_rows_apart",
    "hostile_rows",
    "inner_product",
    "observed",
    "per_sample_gradients",
    "signals",
    "sized_signals",
    "summed_gradients",
    "wrap",
]
