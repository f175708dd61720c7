"""Typed errors and the warning. Each message says what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accounting.errors import CliplessError

__all__ = [
    "AuditError",
    "BudgetExhaustedError",
    "CheckpointError",
    "CliplessError",
    "ConfigurationError",
    "InputError",
    "LossBoundError",
    "NormError",
    "PrivacyError",
    "PrivacyWarning",
    "RankError",
    "Unsupported",
    "UnsupportedModuleError",
]


class ConfigurationError(CliplessError, ValueError):
    """An argument is outside its range, or two arguments contradict each other."""


class NormError(CliplessError, ValueError):
    """An operator norm cannot be certified (non-finite weight, unsupported padding mode, wrong shape)."""


class InputError(CliplessError, ValueError):
    """A batch has the wrong shape, dtype or device for the wrapped model."""


class LossBoundError(CliplessError, TypeError):
    """A loss does not state the bound of its gradient."""


class PrivacyError(CliplessError, RuntimeError):
    """Going on would release something without protection; the message says what."""


class BudgetExhaustedError(PrivacyError):
    """One more step would spend more than the budget of ε; nothing of it was released."""


class RankError(PrivacyError):
    """Another process of a distributed run is gone, or differs from this one; no update may be applied."""


class AuditError(PrivacyError):
    """An attack passed a bound that the noise is calibrated to: the model must not be trained with it.

    Attributes:
        report: what was observed, for each parameter; ``None`` where nothing could be measured.
    """

    def __init__(self, message: str, report: object = None) -> None:
        self.report = report
        super().__init__(message)


class PrivacyWarning(UserWarning):
    """Something costs more privacy than the user may expect."""


class CheckpointError(CliplessError, RuntimeError):
    """A checkpoint is damaged, foreign, or of an unknown format version; the message names the file."""


@dataclass(frozen=True)
class Unsupported:
    """One part of a network for which no bound is known.

    Attributes:
        path: the module's dotted path, or the traced node's name for a function.
        kind: type or function name.
        remedy: what to use in its place.
    """

    path: str
    kind: str
    remedy: str


class UnsupportedModuleError(CliplessError, TypeError):
    """Every part of a network that has no sensitivity rule, each with its replacement.

    Args:
        parts: one :class:`Unsupported` for each offending path.
        isolated: whether the network runs sample by sample, which asks for no rules.
        monotone: whether what lacks is how outputs move with single coordinates.

    Attributes:
        parts: one :class:`Unsupported` for each offending path, all of them at once.
    """

    def __init__(self, parts: Sequence[Unsupported], *, isolated: bool = False, monotone: bool = False) -> None:
        self.parts = tuple(parts)
        lines = "\n".join(f"  {part.path} ({part.kind}): {part.remedy}" for part in self.parts)
        if isolated:
            super().__init__(f"{len(self.parts)} part(s) of the network cannot run sample by sample:\n{lines}")
            return
        if monotone:
            super().__init__(f"{len(self.parts)} part(s) cannot be in a monotone network:\n{lines}")
            return
        super().__init__(
            f"{len(self.parts)} part(s) of the network have no sensitivity rule:\n{lines}\n"
            "A rule for a layer of your own is one function: see clipless_dp.register_rule. Behind gradient gates, "
            "clipless_dp.gradient_gated(net), any layer runs as it is that keeps samples apart."
        )
