"""Where a model's weights come from: the runs that took private steps on them, and what the last step left.

Weights that something else has changed since (training without privacy, a step of the base optimizer itself, a file
that was loaded) are not those that a ledger is about. Nothing prevents that, but it is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from types import NoneType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clipless_dp import draws, sharding

Bits = dict[str, int]
"""For each parameter by name the sum of its bit patterns, modulo 2³², the same in every layout and on every device."""

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class Lineage:
    """What is known of one model's weights.

    Attributes:
        runs: how many private steps each run took on this model, those of loaded states included.
        changed: before how many of the steps the weights were not those that a step had left.
    """

    def __init__(self) -> None:
        self.runs: dict[str, int] = {}
        self.changed = 0
        self._known: list[Mapping[str, Tensor | int]] = []
        self._counted = False
        self._versions: list[_Mark] | None = None

    @property
    def started(self) -> bool:
        """Whether weights are known that others can be compared with."""
        return bool(self._known)

    def settle(self, named: Mapping[str, nn.Parameter], *, counted: bool = True) -> None:
        """These are the weights that the last step left, or what was computed from such; without a step, the first."""
        # Sums stay on the device, so that nothing waits for it.
        self._known = [{name: _sum_of_bits(parameter) for name, parameter in named.items()}]
        self._counted = counted
        self._versions = _versions(named.values())

    def follow(self, named: Mapping[str, nn.Parameter]) -> None:
        """These weights were computed from those that were known, and from nothing else."""
        if self.started:
            self.settle(named, counted=self._counted)

    def expect(self, bits: Bits | None) -> None:
        """Weights of a loaded state may come next; ``None`` if it does not tell which: any may."""
        self._versions = None
        self._known = [] if bits is None else [*(self._known[:1] if self._counted else []), bits]
        self._counted = bits is not None

    def add_runs(self, runs: Mapping[str, int]) -> None:
        """Notes steps of runs."""
        for run, count in runs.items():
            self.runs[run] = max(count, self.runs.get(run, 0))

    def unchanged(self, named: Mapping[str, nn.Parameter], *, quick: bool = False) -> bool:
        """Whether the weights are such as a step left; true where nothing is known.

        Args:
            named: the network's parameters.
            quick: trust autograd's counters of changes, and some of the entries, where they say that there was none.
        """
        if not self._known or (quick and self._versions == _versions(named.values())):
            return True
        now = {name: int(_sum_of_bits(parameter)) for name, parameter in named.items()}
        return any(now == {name: int(value) for name, value in known.items()} for known in self._known)

    def bits(self) -> Bits | None:
        """The sums of the weights that the last step left, for a state; ``None`` where they are not known."""
        return {name: int(value) for name, value in self._known[-1].items()} if self._known and self._counted else None


_lineages: WeakKeyDictionary[nn.Module, Lineage] = WeakKeyDictionary()


def of(model: nn.Module) -> Lineage:
    """The lineage of a wrapped model in this process: of its network, which may be wrapped more than once."""
    net: nn.Module = getattr(model, "net", model)
    lineage = _lineages.get(net)
    if lineage is None:
        lineage = _lineages[net] = Lineage()
    return lineage


_Mark = tuple[int, int, int | None]


def _versions(parameters: Iterable[nn.Parameter]) -> list[_Mark]:
    return [(part._version, part.data_ptr(), draws.sample(part)) for part in map(sharding.local, parameters)]


def _sum_of_bits(parameter: nn.Parameter) -> Tensor:
    values = sharding.local(parameter.detach())
    patterns = values.view(_INTEGERS[values.element_size()])
    return patterns.sum(dtype=torch.int64 if values.element_size() == 8 else torch.int32)


def settings_of(model: Any) -> dict[str, Any]:
    """What a model's bounds rest on besides its weights: caps, loss, constraints and layers, as plain values."""
    return {
        "input_norm": float(model.input_norm),
        "loss": _parts(model.loss_function),
        "constraints": {name: _parts(constraint) for name, constraint in model.constraints.items()},
        "layers": {
            ".".join(leaf.path): {
                "type": leaf.kind.__qualname__ if isinstance(leaf.kind, type) else str(leaf.kind),
                **{
                    name: _plain(value)
                    for name, value in vars(leaf.module).items()
                    if isinstance(value, (int, float, str, tuple, NoneType)) and name != "training" and name[0] != "_"
                },
            }
            for leaf in model._leaves
        },
    }


def differences(there: Any, here: Any, place: str = "") -> list[str]:
    """In words, where two nested settings differ; of two objects of one type, in what both versions know of them."""
    if isinstance(there, dict) and isinstance(here, dict):
        objects = "type" in there and "type" in here and there["type"] == here["type"]
        names = there.keys() & here.keys() if objects else there.keys() | here.keys()
        return [
            line
            for name in sorted(names, key=str)
            for line in differences(there.get(name), here.get(name), f"{place}.{name}" if place else str(name))
        ]
    return [] if there == here else [f"{place}: {there!r} there, {here!r} here"]


def _parts(value: object) -> dict[str, Any]:
    """An object's type and public attributes."""
    known = getattr(value, "__dict__", {}).items()
    return {"type": type(value).__qualname__, **{name: _plain(part) for name, part in known if name[:1] != "_"}}


def _described(value: object) -> str:
    """An object in words that are the same in every process: no addresses."""
    if isinstance(value, partial):
        return f"partial({_described(value.func)}, {_plain(value.args)!r}, {_plain(tuple(value.keywords.items()))!r})"
    return str(value.__qualname__) if hasattr(value, "__qualname__") else type(value).__qualname__


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    return _described(value)
