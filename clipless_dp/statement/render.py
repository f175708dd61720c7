"""A privacy statement as Markdown and as one HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from clipless_dp.statement.brief import best_guess, of_thousand, question
from clipless_dp.statement.figures import found_figure, guesses_figure, risk_figure
from clipless_dp.statement.ledgers import LEDGER_KIND, ledger_sections
from clipless_dp.statement.section import Section
from clipless_dp.statement.sections import sections


def to_markdown(facts: Mapping[str, Any]) -> str:
    """The readable statement, without its pictures."""
    lines = [f"# {_plain(facts['title'])}", ""]
    folded = False
    for section in _sections(facts):
        if section.place == "folded" and not folded:
            lines += [f"## {_FOLDED}", ""]
            folded = True
        lines += [f"{'###' if folded else '##'} {section.title}", ""]
        lines += [line for paragraph in section.text for line in (_paragraph(paragraph), "")]
        lines += [f"* {_paragraph(item)}" for item in section.items] + [""] * bool(section.items)
        if section.rows:
            header = section.header or ("", "")
            lines += [_row(header), _row(("---",) * len(header)), *map(_row, section.rows), ""]
        lines += [line for text in section.printed for line in _printed(text)]
    return "\n".join(lines)


def _printed(text: str) -> tuple[str, ...]:
    """A text as it is, between fences longer than any run of backticks in it, which would end a shorter one."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return fence, text, fence, ""


def to_html(facts: Mapping[str, Any]) -> str:
    """One page that loads nothing else: a box for whoever signs, pictures, and the technical part folded."""
    body = [f"<h1>{html.escape(facts['title'])}</h1>"]
    for place, some in groupby(_sections(facts), key=lambda section: section.place):
        before, after = _AROUND[place]
        before = before.replace("box", "box warning") if facts["findings"] else before
        body += [before, *(_section(section, facts) for section in some), after]
    return _PAGE.format(title=html.escape(facts["title"]), body="\n".join(filter(None, body)))


def _section(section: Section, facts: Mapping[str, Any]) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
    figure = FIGURES[section.figure](facts) if section.figure else ""
    # Pictures stand before what is told in words beside them, but for axes that need the words. Bars have their own.
    parts += [figure] if section.figure != "curve" else []
    if section.items and section.figure != "found":
        parts.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in section.items) + "</ul>")
    if section.rows:
        parts.append(_table(section))
    parts += [f"<pre>{html.escape(table)}</pre>" for table in section.printed]
    parts += [figure] if section.figure == "curve" else []
    return "<section>" + "\n".join(filter(None, parts)) + "</section>"


def _guesses(facts: Mapping[str, Any]) -> str:
    right = of_thousand(best_guess(facts))
    return _figure(
        guesses_figure(right),
        ("chance", "500 right by guessing alone"),
        ("helped", f"at most {max(0, right - 500)} more with the model"),
        ("wrong", f"{1000 - max(500, right)} wrong"),
        told=f"1000 guesses at even odds {question(facts)}, a square each:",
    )


def _found(facts: Mapping[str, Any]) -> str:
    rates = facts["risk"]["true_positive_rates"]
    return _figure(
        found_figure([(of_thousand(one["false_positive"]), of_thousand(one["true_positive"])) for one in rates])
    )


def _curve(facts: Mapping[str, Any]) -> str:
    return _figure(risk_figure(facts["risk"]["curve"]))


def _figure(svg: str, *legend: tuple[str, str], told: str = "") -> str:
    """A picture, with what its colours are."""
    keys = "".join(f'<span class="key"><i class="{kind}"></i>{text}</span> ' for kind, text in legend)
    caption = f"<figcaption>{told} {keys}</figcaption>" if legend else ""
    return f"<figure>{svg}{caption}</figure>"


FIGURES: dict[str, Callable[[Mapping[str, Any]], str]] = {"guesses": _guesses, "found": _found, "curve": _curve}
"""The pictures of a page, by the names that sections give them."""

_FOLDED = "For whoever checks this: terms, noise, ledger, bounds"
_AROUND = {
    "": ("", ""),
    "box": ('<div class="box">', "</div>"),
    "folded": (f"<details><summary>{_FOLDED}</summary>", "</details>"),
}


def _sections(facts: Mapping[str, Any]) -> Iterator[Section]:
    return ledger_sections(facts) if facts["format"] == LEDGER_KIND else sections(facts)


def _one_line(text: str) -> str:
    """Without the line ends of names and notes, behind which a heading or a list of their own could stand."""
    return " ".join(text.splitlines())


def _plain(text: str) -> str:
    """A text on one line, of which nothing is markup."""
    return _MARKS.sub(r"\\\g<0>", _one_line(text))


def _paragraph(text: str) -> str:
    """The same where a line begins."""
    return _BLOCK.sub(r"\g<1>\\\g<2>", _plain(text))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_plain, cells)) + " |"


_MARKS = re.compile(r"[\\|<`\[*~]|!(?=\[)|&(?=#?[0-9A-Za-z]+;)|(?<![^\W_])_|_(?![^\W_])")
"""What would end a cell, or make a tag, code, a link, a picture, emphasis or another character of a name; and the
backslash, which would undo that of the mark behind it. A ``_`` within a word is none."""


_BLOCK = re.compile(r"^(\s*|\s*\d+(?=[.)]\s))([#>]|[-+](?=[\s-])|(?<=\d)[.)])")
"""What would make a heading, a list or a quotation of the start of a line."""


def _table(section: Section) -> str:
    rows = []
    if section.header:
        rows.append("<tr>" + "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in section.header) + "</tr>")
    for first, *others in section.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    kind = ' class="wide"' if len(section.header) > 3 else "" if section.header else ' class="named"'
    return f"<div{kind}><table>{''.join(rows)}</table></div>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --faint: #8883; --accent: #1a66b8; --calm: #777; }}
@media (prefers-color-scheme: dark) {{ :root {{ --accent: #7db4f0; --calm: #aaa; }} }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.2rem; font-size: 1.2rem; }}
.box {{ border: 2px solid var(--accent); border-radius: 0.5rem; padding: 0 1.2rem 0.8rem; }}
.box.warning {{ border-color: #c0392b; }}
.box h2 {{ margin-top: 1.2rem; }}
details {{ margin-top: 2.2rem; border-top: 1px solid var(--line); }}
summary {{ cursor: pointer; font-weight: 600; padding: 0.8rem 0; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 0.35rem 0.6rem; border-bottom: 1px solid var(--line); vertical-align: top; }}
th {{ font-weight: 600; }}
td {{ overflow-wrap: anywhere; }}
.named th {{ width: 28%; padding-left: 0; }}
.wide {{ overflow-x: auto; }}
.wide td {{ overflow-wrap: normal; }}
pre {{ overflow-x: auto; font-size: 0.85rem; line-height: 1.35; }}
p, li {{ overflow-wrap: anywhere; }}
th {{ overflow-wrap: break-word; }}
ul {{ padding-left: 1.2rem; }}
li {{ margin: 0.35rem 0; white-space: pre-line; }}
figure {{ margin: 1.2rem 0; max-width: 28rem; }}
figcaption {{ font-size: 0.92rem; margin-top: 0.4rem; }}
.key {{ display: inline-block; margin-right: 0.8rem; }}
.key i {{ display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.35em; }}
svg {{ width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor; }}
svg .grid {{ stroke: var(--line); }}
svg polyline {{ fill: none; stroke: var(--accent); stroke-width: 2; }}
svg polyline.guessing {{ stroke: var(--line); }}
svg path {{ fill: none; stroke-width: 6; stroke-dasharray: 6 1.5; }}
.chance {{ color: var(--calm); }} .helped {{ color: var(--accent); }} .wrong {{ color: var(--faint); }}
path {{ stroke: currentColor; }} i {{ background: currentColor; }}
svg text.on {{ fill: Canvas; }}
@media (max-width: 34rem) {{
  body {{ margin: 1rem auto; padding: 0 0.8rem; }}
  h1 {{ font-size: 1.6rem; }}
  .box {{ padding: 0 0.8rem 0.6rem; }}
  .named th, .named td {{ display: block; width: auto; padding-left: 0; }}
  .named th {{ border-bottom: 0; padding-bottom: 0; }}
  .named td {{ padding-top: 0; }}
}}
@media print {{
  body {{ margin: 0 auto; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  h2, summary {{ break-after: avoid; }}
  figure, tr {{ break-inside: avoid; }}
}}
</style>
</head>
<body>
{body}
</body>
</html>
"""
