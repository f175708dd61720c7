"""How often a pass uses parameters through gates, and which together: no more than the bounds are of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from clipless_dp.errors import PrivacyError

Uses = Sequence[tuple[str, int]]
"""Of one parameter, for each of its gates the operation, and how many entries of a sample its gradient sums over."""


def refuse_further(
    found: Mapping[str, Uses],
    groups: Iterable[tuple[str, ...]],
    known: Iterable[tuple[str, Uses]],
    joint: Iterable[tuple[str, ...]] | None,
) -> None:
    """Refuses a pass that uses parameters more often, or over more entries, or in other company.

    Args:
        found: the uses of each parameter that is trained, by its name.
        groups: the names of parameters that went through gates together, once for each operation.
        known: the uses when the network was wrapped.
        joint: the groups then, where one cap is for those of a layer together; else ``None``.

    Raises:
        PrivacyError: the pass is such a one.
    """
    expected_uses = dict(known)
    for name, uses in found.items():
        expected = expected_uses.get(name, ())
        if len(uses) <= len(expected) and not _covered(uses, expected):
            raise PrivacyError(
                f"the gradient of {name!r} sums over {_most(uses)} entries of a sample in this pass, and over "
                f"{_most(expected)} at most when the network was wrapped, whose rounding is what the bounds cover: "
                "wrap it with inputs as long as the longest"
            )
        if len(uses) > len(expected):
            raise PrivacyError(
                f"the parameter {name!r} goes through {len(uses)} gates in this pass, and through "
                f"{len(expected)} when the network was wrapped: wrap it in the mode, and with the frozen "
                "parameters, that it is trained with"
            )
    if joint is not None:
        # Of what is trained now, each use must be one of those that the bounds are of, together with as much.
        ours = Counter(tuple(name for name in group if name in found) for group in joint)
        if Counter(groups) - ours:
            raise PrivacyError(
                "weights and biases are used together in other operations than when the network was wrapped, so "
                "that its joint caps are not theirs: wrap it in the mode that it is trained with"
            )


def _most(uses: Uses) -> int:
    return max(entries for _, entries in uses)


def _covered(uses: Uses, expected: Uses) -> bool:
    """Whether no gate sums more entries than the largest that was expected."""
    return _most(uses) <= _most(expected)
