"""What rules state is a size: whatever is negative or no number is refused, a user's rule as the package's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from clipless_dp.arguments import shown
from clipless_dp.errors import Unsupported, UnsupportedModuleError
from clipless_dp.rules import LayerBounds
from clipless_dp.rules.base import Deferred

_Several = Deferred | Sequence[Deferred]


def required_sizes(bounds: LayerBounds, path: str, kind: str, *, operands: int, own: bool) -> LayerBounds:
    """The same bounds, none of which is negative or NaN: numbers are looked at now, deferred ones as they are computed.

    A negative one would cancel against those of other ways through the network: what sums up to less than a gradient
    may have is noise that protects nobody.

    Args:
        bounds: what a rule has stated.
        path: of the layer.
        kind: its type.
        operands: how many values the layer reads.
        own: whether the rule is the package's own, whose NaN is a product of zero and an infinite bound: no bound.

    Raises:
        UnsupportedModuleError: it is none, or one is negative or NaN, or there are not as many as values, or a count is
            none. Nothing was charged: bounds come before a step's charge.
    """

    def refused(remedy: str) -> UnsupportedModuleError:
        return UnsupportedModuleError([Unsupported(path, kind, remedy)])

    if not isinstance(bounds, LayerBounds):
        raise refused(f"its rule returns {shown(bounds)}: return a LayerBounds, whose numbers may be deferred")

    def looked_at(what: str, stated: object) -> float:
        try:
            number = float(stated)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if number >= 0.0:
            return number
        if own and math.isnan(number):
            return math.inf
        raise refused(
            f"its rule states {what} = {stated!r:.80}, and bounds are sizes, zero or more: state the largest absolute "
            "value, as of a negative factor abs(factor)"
        )

    def one(what: str, stated: Deferred) -> Deferred:
        return partial(_computed, stated, partial(looked_at, what)) if callable(stated) else looked_at(what, stated)

    def several(what: str, stated: _Several) -> _Several:
        if not isinstance(stated, (tuple, list)):
            return one(what, stated)  # type: ignore[arg-type]
        if len(stated) != operands and not own:
            raise refused(
                f"its rule states {len(stated)} numbers for {what}, and it reads {operands} values: state one number, "
                "which holds for each, or one for each in their order"
            )
        return tuple(one(what, part) for part in stated)

    def named(what: str, stated: Mapping[str, float]) -> dict[str, float]:
        return {name: looked_at(f"{what} of {name!r}", number) for name, number in stated.items()}

    for gate, count in bounds.counted.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise refused(f"its rule states that gate {gate!r} counts a sample {count!r} times: state a whole number")
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
