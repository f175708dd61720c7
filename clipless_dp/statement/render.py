"""A privacy statement as Markdown and as one HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from clipless_dp.statement.sections import Section, sections


def to_markdown(facts: Mapping[str, Any]) -> str:
    """The readable statement; the curve is a table there."""
    lines = [f"# {facts['title']}", ""]
    for section in sections(facts):
        lines += [f"## {section.title}", ""]
        lines += [line for paragraph in section.text for line in (paragraph, "")]
        lines += [f"* {item}" for item in section.items] + [""] * bool(section.items)
        if section.rows:
            header = section.header or ("", "")
            lines += [_row(header), _row(("---",) * len(header)), *map(_row, section.rows), ""]
        lines += [line for table in section.printed for line in ("```", table, "```", "")]
    return "\n".join(lines)


def to_html(facts: Mapping[str, Any]) -> str:
    """One page that loads nothing else, with the curve as a picture."""
    body = [f"<h1>{html.escape(facts['title'])}</h1>"]
    for section in sections(facts):
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
        if section.items:
            body.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in section.items) + "</ul>")
        if section.rows:
            body.append(_table(section))
        body += [f"<pre>{html.escape(table)}</pre>" for table in section.printed]
        if section.figure:
            body.append(f"<figure>{_curve(facts['epsilon']['curve'])}</figure>")
        body.append("</section>")
    return _PAGE.format(title=html.escape(facts["title"]), body="\n".join(body))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _table(section: Section) -> str:
    rows = []
    if section.header:
        rows.append("<tr>" + "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in section.header) + "</tr>")
    for first, *others in section.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    return f"<table>{''.join(rows)}</table>"


def _curve(points: Sequence[Mapping[str, Any]]) -> str:
    """ε over δ as SVG: δ on a logarithmic axis, ε from 0."""
    known = [(math.log10(point["delta"]), point["epsilon"]) for point in points if point["epsilon"] is not None]
    if not known:
        return ""
    width, height, left, bottom = 560.0, 300.0, 56.0, 46.0
    first, last = min(x for x, _ in known), max(x for x, _ in known)
    top = _ceiling(max(y for _, y in known))

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - first) / (last - first) if last > first else 0.5
        return left + share * (width - left - 28.0), (height - bottom) - (y / top) * (height - bottom - 16.0)

    parts = []
    for index in range(5):
        value = top * index / 4
        _, y = place(first, value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 28}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for point in points:
        x, _ = place(math.log10(point["delta"]), 0.0)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 20}" text-anchor="middle">{point["delta"]:.2g}</text>')
    line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in known)
    parts.append(f'<polyline points="{line}"/>')
    parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(*place(x, y)) for x, y in known]
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">δ</text>')
    parts.append('<text x="14" y="20">ε</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="ε at δ from {10**first:.2g} to {10**last:.2g}">{"".join(parts)}</svg>'
    )


def _ceiling(value: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten: a round end of an axis."""
    if value <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next(step for step in (1.0, 2.0, 2.5, 5.0, 10.0) if value <= step * power * (1 + 1e-9))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --accent: #1a66b8; }}
@media (prefers-color-scheme: dark) {{ :root {{ --accent: #7db4f0; }} }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.2rem; font-size: 1.2rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 0.35rem 0.6rem; border-bottom: 1px solid var(--line); vertical-align: top; }}
th {{ font-weight: 600; }}
td {{ overflow-wrap: anywhere; }}
pre {{ overflow-x: auto; font-size: 0.85rem; line-height: 1.35; }}
li {{ margin: 0.35rem 0; white-space: pre-line; }}
figure {{ margin: 1.2rem 0; }}
svg {{ width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor; }}
svg .grid {{ stroke: var(--line); }}
svg polyline {{ fill: none; stroke: var(--accent); stroke-width: 2; }}
svg circle {{ fill: var(--accent); }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
