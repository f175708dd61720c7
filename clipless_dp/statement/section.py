"""One part of a readable statement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One part of a readable statement.

    Attributes:
        title: its heading.
        text: paragraphs.
        items: a list below them.
        header: column titles of a table; empty where it is of names and values.
        rows: of the table.
        figure: which one stands here, a name in ``render.FIGURES``; none where it is empty.
        printed: what other parts of the library print as tables, kept as it is.
        place: ``"box"`` before all else, ``"folded"`` for whoever checks, or in between.
    """

    title: str
    text: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    figure: str = ""
    printed: tuple[str, ...] = ()
    place: str = ""
