"""What states of a model hold beside parameters and buffers: it is told of, but for what was there at first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from accounting.errors import warn_caller
from clipless_dp.errors import PrivacyWarning
from clipless_dp.model import lineage
from clipless_dp.modules import beside_of, saved_of

Beside = dict[str, str | None]

_first: WeakKeyDictionary[nn.Module, Beside] = WeakKeyDictionary()
"""What states of networks held when they were wrapped first: behind private steps it may be another."""


def first(model: nn.Module, net: nn.Module) -> Beside:
    """What the state of a model that is being wrapped holds beside, or held when its network was wrapped before."""
    if net not in _first:
        found: Beside = {}
        # Layers whose weights private steps were taken on may hold rows by now, whatever they are put into. A state
        # that cannot be had yet holds nothing that was there.
        if not any(lineage.of(model).runs.values()):
            with suppress(Exception):
                found = beside_of(saved_of(net, "net."), nn.Module.state_dict(model))
        _first[net] = found
    return _first[net]


def warn_of_others(
    net: nn.Module, known: Beside, state: Mapping[str, Any], prefix: str, there: Collection[str]
) -> None:
    """Warns of what the state of a model of this network holds beside that was not there, or was something else.

    Args:
        net: the network.
        known: what its state held when it was wrapped.
        state: with what others have put into it.
        prefix: of names that are the model's.
        there: names that were in it before.
    """
    found = beside_of(saved_of(net, "net."), state, prefix, there)
    others = [name for name, content in found.items() if content is None or known.get(name) != content]
    if others:
        warn_caller(
            f"the state of the model holds {', '.join(map(repr, others))} beside its parameters and buffers, which was "
            "not there, or was something else, when the network was wrapped: what a layer or a hook keeps of samples "
            "would be in the file without noise. Leave it out of get_extra_state, hooks of state_dict and _version, or "
            "delete it from the state, unless it is public",
            PrivacyWarning,
        )
