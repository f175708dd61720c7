"""Modules under the names that they had: pickles of former versions, and programs, know them by these."""

import sys
from importlib import import_module
from types import ModuleType

_MOVED = {
    "augmentation": "sampling.augmentation",
    "averaging": "model.averaging",
    "box_muller": "noise.box_muller",
    "draws": "sampling.draws sampling.series sampling.loaders sampling.fingerprints",
    "gating": "graph.gating",
    "gradient_gates": "gates.gradient_layers",
    "lineage": "model.lineage model.description model.settings",
    "memory": "training.memory",
    "overlaps": "model.overlaps",
    "passes": "model.passes model.register model.door model.outermost model.noted",
    "persons": "sampling.persons sampling.windows",
    "randomness": "noise.randomness graph.dropout",
    "report": "statement.report statement.sections statement.facts",
    "row_invariance": "model.row_invariance",
    "rowwise": "model.rowwise",
    "secure_noise": "noise.secure",
    "settings": "model.settings model.description model.lineage",
    "sharding": "distributed.shards distributed.units distributed.stretches",
    "streaming": "sampling.streaming",
    "suggestions": "model.suggestions",
    "surroundings": "model.surroundings",
    "tightness": "bounds.tightness",
    "tracing": "graph.tracing modules",
    "tracker": "bounds.tracker bounds.sensitivity bounds.stamp modules",
}
"""Modules that are no more, and where what was in them is: in the first of these that has a thing of the name."""

_INSIDE = {
    "fusion": {"Needed": "fusion.backward", "Passed": "fusion.backward"},
    "noise": {"MARGIN": "noise.adding RELEASE_MARGIN"},
    "sampling.draws": {"Series": "sampling.series", "Source": "sampling.series"},
    "sampling": {
        "_Collate": "sampling.sampler",
        "checked_rows": "sampling.batches",
        "padded_batch": "sampling.batches",
        "usual_rows": "sampling.batches",
    },
}
"""What modules that are packages now, or have given a part away, do not tell of.

Classes of what users hold, and names without underscore. Each with the module that it is in, and its name there where
that is another one.
"""


class _Former(ModuleType):
    """A module whose contents are in several."""

    def __init__(self, name: str, parts: list[ModuleType]) -> None:
        super().__init__(name)
        self._parts = parts

    def __getattr__(self, name: str) -> object:
        # Not those that every module has: they would be those of the first part.
        if not (name.startswith("__") and name.endswith("__")):
            for part in self._parts:
                if hasattr(part, name):
                    return getattr(part, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def alias_modules() -> None:
    """Lets imports, those of ``pickle`` among them, find modules under their former names."""
    for former, now in _MOVED.items():
        name, parts = f"clipless_dp.{former}", [import_module(f"clipless_dp.{part}") for part in now.split()]
        module = sys.modules.setdefault(name, parts[0] if len(parts) == 1 else _Former(name, parts))
        # As an import would; what the package itself has under that name, such as report(), stays.
        vars(sys.modules["clipless_dp"]).setdefault(former, module)
    for package, names in _INSIDE.items():
        for name, part in names.items():
            where, _, renamed = part.partition(" ")
            found = getattr(import_module(f"clipless_dp.{where}"), renamed or name)
            setattr(sys.modules[f"clipless_dp.{package}"], name, found)
