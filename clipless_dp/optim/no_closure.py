"""Optimizers that step on gradients which are there, and take no closure that would make others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch.optim import Optimizer

from clipless_dp.errors import ConfigurationError


class NoClosure(Optimizer):
    """What such optimizers have in common: settings are checked, then :meth:`_update_` does the step."""

    def _refuse(self, group: Mapping[str, Any]) -> None:
        """Refuses settings of a group that are out of range.

        Raises:
            ConfigurationError: one is.
        """
        raise NotImplementedError

    def _update_(self) -> None:
        """Updates all weights."""
        raise NotImplementedError

    def require_settings(self) -> None:
        """Refuses groups whose settings are out of range; the private optimizer asks before a step is charged.

        Raises:
            ConfigurationError: one is.
        """
        for group in self.param_groups:
            self._refuse(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update.

        Raises:
            ConfigurationError: a closure is given: passes come before the noise; or a group's setting is out of range,
                or the optimizer cannot update a parameter, as by a sparse gradient.
        """
        if closure is not None:
            raise ConfigurationError(f"{type(self).__name__} steps on gradients that are there, without a closure")
        self.require_settings()
        self._update_()
        return None
