"""The figures of a statement's HTML page, as SVG that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT, _TOP = 380.0, 260.0, 52.0, 42.0, 24.0, 22.0
"""As wide as a telephone, so that words stay as large as they are written."""

_COLUMNS, _PITCH = 50, 7.5
_BAR = 12.0


def guesses_figure(right: int) -> str:
    """A thousand guesses at even odds, a square each: right by chance, right with the model's help, wrong.

    Args:
        right: how many are right at most, of 1000.
    """
    kinds = (("chance", 0, min(500, right)), ("helped", 500, right), ("wrong", max(500, right), 1000))
    rows = [f'<path class="{kind}" d="{_squares(first, last)}"/>' for kind, first, last in kinds if last > first]
    label = f"of 1000 guesses 500 are right by chance, at most {max(0, right - 500)} more with the model"
    return _svg(_COLUMNS * _PITCH, 1000 / _COLUMNS * _PITCH, label, rows)


def _squares(first: int, last: int) -> str:
    """Lines, a row each, of which the stroke's dashes make squares."""
    lines = []
    while first < last:
        row, column = divmod(first, _COLUMNS)
        end = min(_COLUMNS, column + last - first)
        lines.append(f"M{column * _PITCH:g} {(row + 0.5) * _PITCH:g}H{end * _PITCH:g}")
        first += end - column
    return "".join(lines)


def found_figure(rates: Sequence[tuple[int, int]]) -> str:
    """Of 1000 units that were in the data, how many are found at most where few others are suspected wrongly.

    Args:
        rates: how many of 1000 are suspected wrongly, and how many are found; in the order of the figure.
    """
    across = (_WIDTH - 40.0) / 1000.0
    parts, y = [], 0.0
    for wrong, found in rates:
        parts.append(f'<text x="0" y="{y + 13:g}">{wrong} of 1000 suspected wrongly</text>')
        for kind, count, text in (("helped", found, f"at most {found} found"), ("chance", wrong, f"{wrong} by chance")):
            y += _BAR + 6.0
            width = max(1.0, count * across)
            parts.append(f'<rect class="{kind}" x="0" y="{y:g}" width="{width:.1f}" height="{_BAR:g}"/>')
            inside = width > 0.6 * _WIDTH
            place = (width - 4.0, ' text-anchor="end" class="on"') if inside else (width + 5.0, "")
            parts.append(f'<text x="{place[0]:.1f}" y="{y + _BAR - 1.5:g}"{place[1]}>{text}</text>')
        y += _BAR + 12.0
    label = "; ".join(f"{wrong} of 1000 suspected wrongly: at most {found} of 1000 found" for wrong, found in rates)
    return _svg(_WIDTH, y, label, parts)


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
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:g}" y="{_HEIGHT - 6:g}" text-anchor="middle">false-positive rate</text>'
    )
    parts.append('<text x="0" y="11">true-positive rate</text>')
    label = "largest true-positive rate at false-positive rates from "
    return _svg(_WIDTH, _HEIGHT, f"{label}{10**first:g} to 1", parts)


def _place(x: float, y: float) -> tuple[float, float]:
    return _LEFT + x * (_WIDTH - _LEFT - _RIGHT), (_HEIGHT - _BOTTOM) - y * (_HEIGHT - _BOTTOM - _TOP)


def _grid(share: float, text: str) -> str:
    _, y = _place(0.0, share)
    line = f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{_LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _tick(share: float, text: str) -> str:
    x, _ = _place(share, 0.0)
    return f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18:g}" text-anchor="middle">{text}</text>'


def _line(places: Sequence[tuple[float, float]], attributes: str = "") -> str:
    return '<polyline{} points="{}"/>'.format(attributes, " ".join("{:.1f},{:.1f}".format(*place) for place in places))


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )
