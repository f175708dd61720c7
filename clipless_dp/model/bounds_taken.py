"""By which bounds the steps on a model's weights were charged: numbers, which need no description of the model.

A setting that lies where no description reaches (an object of a user's own, a closure, another class of one name) shows
in the bounds that follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipless_dp.bounds.sensitivity import Sensitivity

_ROUNDING = 1e-6
"""What bounds of the same weights may differ by, on another machine."""

_DRIFT = 0.5
"""What bounds that follow from the weights may lose from one step to the next without being told of."""

_SHOWN = 3
"""Parameters that are named."""


class BoundsTaken:
    """The bounds of each parameter in the steps that were taken.

    Attributes:
        largest: of each parameter that a step had a bound of, ``Δ_θ``.
        last: of the last step that had one.
        changes: what was found, in words.
    """

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.changes: list[str] = []
        self._steps = 0
        self._constant = True
        self._seen: Sensitivity | None = None

    def note(self, sensitivity: Sensitivity) -> None:
        """A step was taken by these bounds."""
        self._steps += 1
        if sensitivity is self._seen:
            return
        here = sensitivity.per_parameter
        if self.last:
            self.changes += [line for line in self.below(sensitivity, frozen=False) if line not in self.changes]
            self._constant = self._constant and all(here.get(name) == bound for name, bound in self.last.items())
        self.last = {**self.last, **here}
        self.largest = {**self.largest, **{name: max(b, self.largest.get(name, 0.0)) for name, b in here.items()}}
        self._seen = sensitivity

    def below(self, sensitivity: Sensitivity, *, frozen: bool = True) -> list[str]:
        """In words, where bounds are below those of the last step, by more than the weights' changes explain.

        Args:
            sensitivity: the bounds that hold now.
            frozen: whether parameters without bounds are told of.
        """
        here = sensitivity.per_parameter
        # Where no norm of a weight was asked for, and no step had another bound, weights do not decide.
        fixed = self._constant and self._steps > 1 and all(part.certified_norm is None for part in sensitivity.layers)
        told = []
        if sensitivity is not self._seen:
            told = different(self.last, here, _ROUNDING if fixed and not sensitivity.counted else _DRIFT)
        gone = [name for name, bound in self.largest.items() if bound > 0.0 and not here.get(name)] if frozen else []
        if gone:
            told.append(f"{_named(gone)} trained there, not here")
        return told

    def take(self, record: Mapping[str, Any]) -> None:
        """What :meth:`record` told; of both the larger bounds."""
        for name, bound in record["largest"].items():
            self.largest[str(name)] = max(float(bound), self.largest.get(str(name), 0.0))
        self.changes += [str(line) for line in record["changes"] if str(line) not in self.changes]

    def record(self) -> dict[str, Any]:
        """Plain values, for a state."""
        return {"largest": dict(self.largest), "changes": list(self.changes)}


def different(there: Mapping[str, float], here: Mapping[str, float], tolerance: float = _ROUNDING) -> list[str]:
    """In words, where the bounds here are below those there by more than a share of them; of the largest such share."""
    below = [name for name, bound in there.items() if here.get(name, bound) < (1.0 - tolerance) * bound]
    if not below:
        return []
    name = max(below, key=lambda name: there[name] / max(here[name], 1e-300))
    return [f"bound of {name}: {there[name]:.6g} there, {here[name]:.6g} here" + ", and others" * (len(below) > 1)]


def _named(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
