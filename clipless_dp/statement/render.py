"""A privacy statement as Markdown and as one HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clipless_dp.statement.figures import epsilon_figure, risk_figure
from clipless_dp.statement.ledgers import LEDGER_KIND, ledger_sections
from clipless_dp.statement.sections import Section, sections


def to_markdown(facts: Mapping[str, Any]) -> str:
    """The readable statement; the curve is a table there."""
    lines = [f"# {_one_line(facts['title'])}", ""]
    for section in _sections(facts):
        lines += [f"## {section.title}", ""]
        lines += [line for paragraph in section.text for line in (_one_line(paragraph), "")]
        lines += [f"* {_one_line(item)}" for item in section.items] + [""] * bool(section.items)
        if section.rows:
            header = section.header or ("", "")
            lines += [_row(header), _row(("---",) * len(header)), *map(_row, section.rows), ""]
        lines += [line for table in section.printed for line in ("```", table, "```", "")]
    return "\n".join(lines)


def to_html(facts: Mapping[str, Any]) -> str:
    """One page that loads nothing else, with the curves as pictures."""
    body = [f"<h1>{html.escape(facts['title'])}</h1>"]
    for section in _sections(facts):
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
        if section.items:
            body.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in section.items) + "</ul>")
        if section.rows:
            body.append(_table(section))
        body += [f"<pre>{html.escape(table)}</pre>" for table in section.printed]
        if section.figure == "epsilon":
            body.append(f"<figure>{epsilon_figure(facts['epsilon']['curve'])}</figure>")
        if section.figure == "risk":
            body.append(f"<figure>{risk_figure(facts['risk']['curve'])}</figure>")
        body.append("</section>")
    return _PAGE.format(title=html.escape(facts["title"]), body="\n".join(body))


def _sections(facts: Mapping[str, Any]) -> Iterator[Section]:
    return ledger_sections(facts) if facts["format"] == LEDGER_KIND else sections(facts)


def _one_line(text: str) -> str:
    """Without the line ends of names and notes, behind which a heading or a list of their own could stand."""
    return " ".join(text.splitlines())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _table(section: Section) -> str:
    rows = []
    if section.header:
        rows.append("<tr>" + "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in section.header) + "</tr>")
    for first, *others in section.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    return f"<table>{''.join(rows)}</table>"


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
svg polyline.guessing {{ stroke: var(--line); }}
svg circle {{ fill: var(--accent); }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
