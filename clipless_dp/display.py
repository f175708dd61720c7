"""How results are shown: as text where they are printed, as HTML in a notebook."""

from __future__ import annotations

import html
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class Table:
    """Rows under headers, and lines below.

    Attributes:
        headers: of the columns.
        rows: a cell for each header.
        align: ``"left"`` or ``"right"`` for each column.
        notes: lines below the table.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    align: Sequence[str]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """As a terminal shows it."""
        return "\n".join((self._drawn("simple"), *self.notes))

    def html(self) -> str:
        """As a notebook shows it; cells and notes are escaped."""
        return "\n".join((self._drawn("html"), *(f"<p>{html.escape(note)}</p>" for note in self.notes)))

    def _drawn(self, style: str) -> str:
        return tabulate(
            self.rows, headers=self.headers, disable_numparse=True, colalign=tuple(self.align), tablefmt=style
        )


class Tabular:
    """What prints as a table, and is one in a notebook."""

    @abstractmethod
    def _table(self) -> Table: ...

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()
