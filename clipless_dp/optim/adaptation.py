"""Caps that adapt: their counts in the release of a step, and what follows from it for the next one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipless_dp.errors import ConfigurationError, PrivacyError
from clipless_dp.gates import Adapting, AdaptiveLimit, adapting_in, checked_state
from clipless_dp.model import DPLipModel


@dataclass(frozen=True)
class CapRecord:
    """What one step has released of the caps that adapt: private numbers, which may be shown.

    Attributes:
        caps: of the step, by the name of the gate.
        below: ``b̃``: the share of samples below each, with noise. Gates of which nothing was trained have none.
    """

    caps: dict[str, float]
    below: dict[str, float]


class Adaptation:
    """The caps of a model that adapt.

    Args:
        model: the wrapped model.

    Attributes:
        history: what each step has released.
    """

    def __init__(self, model: DPLipModel) -> None:
        self._model = model
        self.history: list[CapRecord] = []

    def _all(self) -> dict[str, Adapting]:
        return adapting_in(self._model.net)

    def caps(self) -> dict[str, float]:
        """The caps as they are now, by the name of the gate."""
        return {_name(place, gate): cap for place, some in self._all().items() for gate, cap in some.caps.items()}

    def share(self) -> float:
        """The share of a step's ``σ⁻²`` that the counts take; zero where nothing adapts.

        Raises:
            ConfigurationError: layers ask for different ones.
        """
        shares = {some.limit.share for some in self._all().values()}
        if len(shares) > 1:
            raise ConfigurationError(f"the caps of one model take one share of its noise, not {sorted(shares)}")
        return shares.pop() if shares else 0.0

    def refuse_others(self, counted: Iterable[str]) -> None:
        """Refuses gates that were set anew between a pass, which has counted for these, and its step.

        Raises:
            PrivacyError: one was: its counts are gone.
        """
        held = {id(one) for one in self._model.register.counts}
        known = {
            _name(place, gate) for place, some in self._all().items() if id(some.counts) in held for gate in some.caps
        }
        if other := sorted(set(counted) - known):
            raise PrivacyError(
                f"the caps of {', '.join(other)} were set anew between a pass and its step, and what their gates had "
                "counted is gone: set them before the pass, or behind the step. Nothing was released"
            )

    def sums(self, *, passed: bool) -> list[Tensor]:
        """What is to be released: the sums of the counts, in place."""
        found = []
        for some in self._all().values():
            assert some.counts is not None
            if some.counts.grad is None or not passed:
                some.counts.grad = torch.zeros_like(some.counts)
            found.append(some.counts.grad)
        return found

    def adapt_(self, counted: Mapping[str, int]) -> None:
        """Moves the caps by what was released, over the expected batch size, and drops it.

        Args:
            counted: how often each gate counts a sample.
        """
        everything = self._all()
        if not everything:
            return
        before = self.caps()
        below: dict[str, float] = {}
        for place, some in everything.items():
            assert some.counts is not None
            assert some.counts.grad is not None
            released = dict(zip(some.caps, some.counts.grad.tolist(), strict=True))
            some.counts.grad = None
            names = {gate: _name(place, gate) for gate in released}
            halves = {gate: half / counted[names[gate]] for gate, half in released.items() if names[gate] in counted}
            below |= {names[gate]: share for gate, share in some.adapt_(halves).items()}
        self.history.append(CapRecord(before, below))

    def drop(self) -> None:
        """Drops counts that were not released."""
        for counts in self._model.register.counts:
            counts.grad = None

    def state(self) -> dict[str, Any]:
        """What :meth:`take` reads: plain values and tensors only."""
        names = list(self.caps())
        return {
            "settings": {place: list(some.settings) for place, some in self._all().items()},
            "now": self.caps(),
            "names": names,
            "caps": _table([record.caps for record in self.history], names),
            "below": _table([record.below for record in self.history], names),
        }

    def checked(self, state: object) -> dict[str, Any] | None:
        """A state that fits the model; ``None`` where nothing adapts in either.

        Raises:
            ConfigurationError: it is of other gates, or holds what is no cap.
        """
        known = self.caps()
        if state is None and not known:
            return None
        if not isinstance(state, dict) or not isinstance(state.get("now"), dict) or state["now"].keys() != known.keys():
            raise ConfigurationError(
                "the state is of a model whose caps adapt in other layers, or nowhere: wrap the network with the gates "
                "that it was trained with"
            )
        if missing := {"names", "caps", "below"} - state.keys():
            raise ConfigurationError(f"the state of caps that adapt has no {min(missing)}: load it as it was saved")
        return {**state, "now": checked_state(state["now"])}

    def take(self, state: dict[str, Any] | None) -> None:
        """Goes on from a state, as :meth:`checked` returns it."""
        if state is None:
            return
        for place, some in self._all().items():
            for gate in some.caps:
                some.caps[gate] = state["now"][_name(place, gate)]
        names = [str(name) for name in state["names"]]
        self.history = [
            CapRecord(_row(names, caps), _row(names, below))
            for caps, below in zip(state["caps"].tolist(), state["below"].tolist(), strict=True)
        ]

    def settings(self) -> dict[str, AdaptiveLimit]:
        """How they adapt, by the module."""
        return {place: some.limit for place, some in self._all().items()}


def _name(place: str, gate: str) -> str:
    return f"{place}.{gate}" if place else gate


def _table(rows: list[dict[str, float]], names: list[str]) -> Tensor:
    return torch.tensor([[row.get(name, torch.nan) for name in names] for row in rows], dtype=torch.float64).reshape(
        len(rows), len(names)
    )


def _row(names: list[str], values: list[float]) -> dict[str, float]:
    return {name: value for name, value in zip(names, values, strict=True) if value == value}
