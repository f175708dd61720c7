"""Modules under the names that they had: pickles of former versions, and programs, know them by these."""

import sys
from importlib import import_module

_MOVED = {
    "clipless_dp.gradient_gates": "clipless_dp.gates.gradient_layers",
    "clipless_dp.passes": "clipless_dp.model.passes",
    "clipless_dp.randomness": "clipless_dp.noise.randomness",
    "clipless_dp.rowwise": "clipless_dp.model.rowwise",
    "clipless_dp.secure_noise": "clipless_dp.noise.secure",
    "clipless_dp.tracing": "clipless_dp.graph.tracing",
}
"""Only what documented imports name, or pickles of models: a class is looked up under its module's name of then."""


def alias_modules() -> None:
    """Lets imports, those of ``pickle`` among them, find modules under their former names."""
    for former, now in _MOVED.items():
        sys.modules.setdefault(former, import_module(now))
