"""Caps that follow a quantile of the samples' norms, which is released with noise in the steps' own mechanisms.

Each gate counts, over the samples of a step, how many norms lie above its cap and how many below: half of the
difference, to which a sample adds at most a half. The counts are further coordinates of the vector that a step
releases, and the caps of the next step are post-processing of them (Andrew et al. 2021, *Differentially Private
Learning with Adaptive Clipping*, algorithm 1). ``docs/adaptive.md`` has the proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import cast

import torch
from torch import Tensor, nn

from clipless_dp.errors import ConfigurationError
from clipless_dp.gates.arithmetic import checked_cap
from clipless_dp.modules import modules_of

RAMP = 0.1
"""Share of the cap over which a sample goes from below to above. Without it rounding, which depends on a sample's
company, would turn over whole samples whose norm is the cap."""

_LEAST, _MOST = 1e-8, 1e8
_LARGEST_MOVE = 1.0
"""Of a cap's logarithm in one step, whatever the noise is."""


@dataclass(frozen=True)
class AdaptiveLimit:
    """A cap that follows a quantile of gradient norms, for ``limit`` of :func:`clipless_dp.gradient_gated`.

    After each step ``C ← C·exp(-η(b̃ - γ))``, where ``b̃`` is the noisy share of the step's samples whose norm is below
    ``C`` (Andrew et al. 2021, *Differentially Private Learning with Adaptive Clipping*, algorithm 1).

    Attributes:
        start: the caps of the first step.
        quantile: ``γ``: the share of samples that shall be below the cap.
        rate: ``η``.
        share: of the step's ``σ⁻²``, what the counts take: gradients get noise of ``σ/√(1-share)`` in place of ``σ``,
            so that both together cost what ``σ`` costs. The count of each of ``K`` gates gets noise of standard
            deviation ``σ·√K/(2·√share)``, in samples.

    Raises:
        ConfigurationError: a value is out of range.
    """

    start: float = 1.0
    quantile: float = 0.5
    rate: float = 0.2
    share: float = 0.05

    def __post_init__(self) -> None:
        checked_cap("start", self.start)
        for name in ("quantile", "share"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0.0 < value < 1.0):
                raise ConfigurationError(f"{name} must lie between 0 and 1, got {value!r}")
        if not (isinstance(self.rate, (int, float)) and math.isfinite(self.rate) and self.rate > 0.0):
            raise ConfigurationError(f"rate must be positive and finite, got {self.rate!r}")


class Adapting:
    """The caps of a module's gates as they are now.

    Args:
        limit: how they adapt.
        starts: where they begin, by the name of the gate.

    Attributes:
        caps: by the name of the gate.
        place: the path of the module.
        counts: zeros ``(K,)``, in whose gradient the gates leave their counts: so these take the way of all gradients,
            through micro-batches, views, refused and dropped passes. ``None`` as long as nothing is to be counted.
    """

    def __init__(self, limit: AdaptiveLimit, starts: Mapping[str, float]) -> None:
        self.settings: tuple[float, ...] = astuple(limit)
        self.caps: dict[str, float] = dict(starts)
        self.place = ""
        self.counts: nn.Parameter | None = None

    @property
    def limit(self) -> AdaptiveLimit:
        """How they adapt."""
        return AdaptiveLimit(*self.settings)

    def counters(self) -> dict[str, Tensor]:
        """What each gate leaves its count in; empty where nothing is counted."""
        if self.counts is None or not torch.is_grad_enabled():
            return {}
        if torch.compiler.is_compiling():
            raise ConfigurationError("caps that adapt are counted in eager passes: train without torch.compile")
        return dict(zip(self.caps, self.counts.unbind(), strict=True))

    def count_(self, place: str, device: torch.device, dtype: torch.dtype) -> None:
        """Counts from here on, in a module of this path, beside parameters of this device and dtype."""
        self.place = place
        if self.counts is None or self.counts.device != device or self.counts.dtype != dtype:
            self.counts = nn.Parameter(torch.zeros(len(self.caps), device=device, dtype=dtype))

    def adapt_(self, released: Mapping[str, float]) -> dict[str, float]:
        """Moves the caps.

        Args:
            released: for each gate half of the samples above minus half of those below, with noise, over the public
                expected number of samples and of uses of the gate.

        Returns:
            The shares of samples below the caps as they were, ``b̃``.
        """
        limit = self.limit
        shares = {name: 0.5 - half for name, half in released.items()}
        for name, share in shares.items():
            move = min(max(-limit.rate * (share - limit.quantile), -_LARGEST_MOVE), _LARGEST_MOVE)
            self.caps[name] = min(max(self.caps[name] * math.exp(move), _LEAST), _MOST)
        return shares


def checked_state(caps: Mapping[str, object]) -> dict[str, float]:
    """Caps of a saved state.

    Raises:
        ConfigurationError: one of them is none that caps come to.
    """
    for name, value in caps.items():
        if not (isinstance(value, float) and _LEAST <= value <= _MOST):
            raise ConfigurationError(f"the state's cap of {name} must lie between {_LEAST} and {_MOST}, got {value!r}")
    return cast("dict[str, float]", dict(caps))


_PLACE = "__adapting__"
"""Not among a module's settings, whose changes let a model be traced anew: bounds ask for these caps each time."""


def adapting(module: nn.Module) -> Adapting | None:
    """The caps of a module's gates, where they adapt."""
    found: Adapting | None = vars(module).get(_PLACE)
    return found


def set_adapting(module: nn.Module, caps: Adapting | None) -> None:
    """Lets the caps of a module's gates adapt, or no longer."""
    if caps is None:
        vars(module).pop(_PLACE, None)
    else:
        vars(module)[_PLACE] = caps


def adapting_among(modules: Iterable[nn.Module]) -> list[Adapting]:
    """The caps that adapt of the gates of these modules: every step asks."""
    return [cast(Adapting, module.__dict__[_PLACE]) for module in modules if _PLACE in module.__dict__]


def adapting_in(net: nn.Module) -> dict[str, Adapting]:
    """The caps that adapt within a network, by the paths of their modules."""
    if not adapting_among(modules_of(net)):
        return {}
    return {path: found for path, part in net.named_modules() if (found := adapting(part)) is not None}


def counts_of(module: nn.Module) -> tuple[dict[str, nn.Parameter], str] | None:
    """Where a module's gates hold what they leave their counts in: a dictionary and a key; ``None`` if they do not."""
    found = adapting(module)
    return None if found is None or found.counts is None else (vars(found), "counts")


def count(norms: Tensor, present: Tensor, cap: float) -> Tensor:
    """Half of the samples above a cap minus half of those below, each at most a half: a number.

    Args:
        norms: ``(B,)``.
        present: ``(B,)``, zero where nothing came back to a sample, as for padding: it counts for nothing.
        cap: the cap.
    """
    halves = ((norms / cap - 1.0) * (0.5 / RAMP)).clamp(-0.5, 0.5)
    return torch.where((present > 0.0) & norms.isfinite(), halves, 0.0).sum()
