"""What rules state is a size: whatever is negative or no number is refused, a user's rule as the package's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from clipless_dp.errors import Unsupported, UnsupportedModuleError
from clipless_dp.rules import LayerBounds
from clipless_dp.rules.base import Deferred

_Several = Deferred | Sequence[Deferred]


def required_sizes(bounds: LayerBounds, path: str, kind: str, *, own: bool) -> LayerBounds:
    """The same bounds, none of which is negative or NaN: numbers are looked at now, deferred ones as they are computed.

    A negative one would cancel against those of other ways through the network: what sums up to less than a gradient
    may have is noise that protects nobody.

    Args:
        bounds: what a rule has stated.
        path: of the layer.
        kind: its type.
        own: whether the rule is the package's own, whose NaN is a product of zero and an infinite bound: no bound.

    Raises:
        UnsupportedModuleError: one is negative or NaN. Nothing was charged: bounds come before a step's charge.
    """

    def looked_at(what: str, stated: object) -> float:
        try:
            number = float(stated)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if number >= 0.0:
            return number
        if own and math.isnan(number):
            return math.inf
        remedy = (
            f"its rule states {what} = {stated!r:.80}, and bounds are sizes, zero or more: state the largest absolute "
            "value, as of a negative factor abs(factor)"
        )
        raise UnsupportedModuleError([Unsupported(path, kind, remedy)])

    def one(what: str, stated: Deferred) -> Deferred:
        return partial(_computed, stated, partial(looked_at, what)) if callable(stated) else looked_at(what, stated)

    def several(what: str, stated: _Several) -> _Several:
        return tuple(one(what, part) for part in stated) if isinstance(stated, (tuple, list)) else one(what, stated)  # type: ignore[arg-type]

    def named(what: str, stated: Mapping[str, float]) -> dict[str, float]:
        return {name: looked_at(f"{what} of {name!r}", number) for name, number in stated.items()}

    inf, entry = bounds.lipschitz_inf, bounds.output_norm_inf
    return replace(
        bounds,
        output_norm=one("Y (output_norm)", bounds.output_norm),
        lipschitz=several("K (lipschitz)", bounds.lipschitz),
        gradients={name: one(f"Δ/G of {name!r} (gradients)", unit) for name, unit in bounds.gradients.items()},
        cotangent_cap=looked_at("cotangent_cap", bounds.cotangent_cap),
        gradient_limits=named("gradient_limits", bounds.gradient_limits),
        gradient_stretches=named("gradient_stretches", bounds.gradient_stretches),
        joint_limits=[(names, looked_at(f"joint_limits of {names}", cap)) for names, cap in bounds.joint_limits],
        lipschitz_inf=None if inf is None else several("K_∞ (lipschitz_inf)", inf),
        output_norm_inf=None if entry is None else one("Y_∞ (output_norm_inf)", entry),
    )


def _computed(deferred: Callable[[], float], looked_at: Callable[[object], float]) -> float:
    return looked_at(deferred())
