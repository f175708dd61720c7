"""Modules under the names that pickles of former versions know them by."""

import sys
from importlib import import_module

_MOVED = {
    "clipless_dp.tracing": "clipless_dp.graph.tracing",
}
"""Only what pickles of models or networks name: a class within is looked up under the module's name of then."""


def alias_modules() -> None:
    """Lets ``pickle`` find modules under their former names."""
    for former, now in _MOVED.items():
        sys.modules.setdefault(former, import_module(now))
