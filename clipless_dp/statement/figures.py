"""The figures of a statement's HTML page, as SVG that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT, _TOP = 560.0, 300.0, 56.0, 46.0, 28.0, 16.0


def epsilon_figure(points: Sequence[Mapping[str, Any]]) -> str:
    """ε over δ: δ on a logarithmic axis, ε from 0."""
    known = [(math.log10(point["delta"]), point["epsilon"]) for point in points if point["epsilon"] is not None]
    if not known:
        return ""
    first, last = min(x for x, _ in known), max(x for x, _ in known)
    top = _ceiling(max(y for _, y in known))

    def across(x: float) -> float:
        return (x - first) / (last - first) if last > first else 0.5

    parts = [_grid(index / 4, f"{top * index / 4:.3g}") for index in range(5)]
    parts += [_tick(across(math.log10(point["delta"])), f"{point['delta']:.2g}") for point in points]
    places = [_place(across(x), y / top) for x, y in known]
    parts += [_line(places), *('<circle cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(*place) for place in places)]
    return _figure(parts, "δ", "ε", f"ε at δ from {10**first:.2g} to {10**last:.2g}")


def risk_figure(points: Sequence[Mapping[str, float]]) -> str:
    """True- over false-positive rates on logarithmic axes, beside guessing."""
    first = math.log10(points[0]["false_positive"])

    def share(rate: float) -> float:
        return 1.0 - math.log10(max(rate, 10.0**first)) / first

    decades = range(round(first), 1)
    parts = [_grid(share(10.0**power), f"{10.0**power:g}") for power in decades]
    parts += [_tick(share(10.0**power), f"{10.0**power:g}") for power in decades]
    parts.append(_line([_place(0.0, 0.0), _place(1.0, 1.0)], ' class="guessing"'))
    parts.append(_line([_place(share(one["false_positive"]), share(one["true_positive"])) for one in points]))
    label = "largest true-positive rate at false-positive rates from "
    return _figure(parts, "false-positive rate", "true-positive rate", f"{label}{10**first:g} to 1")


def _place(x: float, y: float) -> tuple[float, float]:
    return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), (_HEIGHT - _BOTTOM) - y * (_HEIGHT - _BOTTOM - _TOP)


def _grid(share: float, text: str) -> str:
    _, y = _place(0.0, share)
    line = f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _tick(share: float, text: str) -> str:
    x, _ = _place(share, 0.0)
    return f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{text}</text>'


def _line(places: Sequence[tuple[float, float]], attributes: str = "") -> str:
    return '<polyline{} points="{}"/>'.format(attributes, " ".join("{:.1f},{:.1f}".format(*place) for place in places))


def _figure(parts: Sequence[str], x: str, y: str, label: str) -> str:
    axes = f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{x}</text>'
    axes += f'<text x="14" y="{_TOP - 4 if len(y) > 1 else 20:g}">{y}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        f'aria-label="{label}">{"".join(parts)}{axes}</svg>'
    )


def _ceiling(value: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten: a round end of an axis."""
    if value <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next(step for step in (1.0, 2.0, 2.5, 5.0, 10.0) if value <= step * power * (1 + 1e-9))
