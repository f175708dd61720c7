"""The statement itself, in three forms, and the function that makes it."""

from __future__ import annotations

import dataclasses
import html
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accounting import Ledger
from accounting.errors import LedgerFormatError
from accounting.shape import require_statement
from accounting.stated import UNITS
from clipless_dp.arguments import positive, share
from clipless_dp.checkpoint import check_writable
from clipless_dp.errors import CheckpointError, ConfigurationError
from clipless_dp.optim import CliplessDPOptimizer
from clipless_dp.statement import render
from clipless_dp.statement.brief import about_of, is_control
from clipless_dp.statement.described import check_described
from clipless_dp.statement.facts import CHANGED, facts_of
from clipless_dp.statement.ledgers import facts_of_ledger

SUFFIXES = (".md", ".json", ".html")


@dataclass(frozen=True)
class PrivacyStatement:
    """What :func:`report` found, in three forms.

    Attributes:
        facts: plain values, as in the JSON.
        files: what was written.
    """

    facts: Mapping[str, Any]
    files: tuple[Path, ...] = ()

    @property
    def findings(self) -> list[str]:
        """What weakens the promise, or should be looked at before relying on it."""
        return list(self.facts["findings"])

    @property
    def is_of_the_weights(self) -> bool:
        """Whether the weights, and the buffers, were those that the last recorded step left, when it was made."""
        weights = self.facts.get("weights")
        return not isinstance(weights, Mapping) or bool(weights.get("as_counted", True))

    def of_other_weights(self) -> PrivacyStatement:
        """The same of a model whose weights or buffers something else has changed since."""
        weights = {**self.facts.get("weights", {}), "as_counted": False}
        found = [CHANGED, *(line for line in self.facts["findings"] if line != CHANGED)]
        return PrivacyStatement({**self.facts, "weights": weights, "findings": found})

    def signed(self, **about: str | None) -> PrivacyStatement:
        """The same with who states it: in the box on top of the readable forms, and ``about`` in the facts.

        Args:
            about: ``organisation``, ``purpose`` of the model, ``data_set``, ``contact``; what is ``None`` is left as it
                was.

        Raises:
            ConfigurationError: it is none of these, or no text of one line.
        """
        told = about_of(self.facts.get("about", {}), about)
        facts = {**self.facts, "about": told} if told else self.facts
        return dataclasses.replace(self, facts=facts)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PrivacyStatement:
        """The statement of a JSON file that :meth:`save` wrote.

        Raises:
            CheckpointError: it is none.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{os.fspath(path)} is no privacy statement of this version: {error!r}") from error
        return cls.of_json(text, os.fspath(path))

    @classmethod
    def of_json(cls, text: str, name: str) -> PrivacyStatement:
        """The statement that :meth:`to_json` wrote.

        Args:
            text: JSON.
            name: where it is from, for messages.

        Raises:
            CheckpointError: it is none.
        """
        try:
            facts = json.loads(text)
            require_statement(name, facts)
            made = cls(facts)
            made.to_markdown()
            made.to_html()
        # Arithmetic: numbers that are none, such as true.
        except LedgerFormatError as error:
            raise CheckpointError(str(error)) from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise CheckpointError(f"{name} is no privacy statement of this version: {error!r}") from error
        return made

    def to_json(self) -> str:
        """The facts, the whole ledger included."""
        return json.dumps(self.facts, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """The readable statement; the curve is a table there."""
        return render.to_markdown(self.facts)

    def to_html(self) -> str:
        """One page that loads nothing else: a box for whoever signs, pictures, and the technical part folded."""
        return render.to_html(self.facts)

    def save(self, path: str | os.PathLike[str]) -> PrivacyStatement:
        """Writes ``path.md``, ``path.json`` and ``path.html``; one of these endings in ``path`` is left out first.

        Raises:
            CheckpointError: the folder is not writable, the disk is full, or a text holds what UTF-8 has no form for (a
                lone surrogate); existing files are left as they were.
        """
        files = statement_files(path)
        contents = (self.to_markdown(), self.to_json(), self.to_html())
        beside = [file.with_name(file.name + ".partial") for file in files]
        try:
            for file, part, content in zip(files, beside, contents, strict=True):
                check_writable(file)
                part.write_text(content, encoding="utf-8")
            for file, part in zip(files, beside, strict=True):
                part.replace(file)
        except (OSError, UnicodeError) as error:
            raise CheckpointError(f"{files[0]} could not be written: {error}") from error
        finally:
            for part in beside:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
        return dataclasses.replace(self, files=files)

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        page = html.escape(self.to_html())
        return f'<iframe srcdoc="{page}" style="width:100%;height:40em;border:1px solid #ccc"></iframe>'


def report_ledger(
    ledger: Ledger, *, delta: float = 1e-5, title: str = "What a ledger holds", source: str = "a ledger"
) -> PrivacyStatement:
    """States what a stored ledger alone says: what was spent, by which mechanisms; of the model it knows nothing.

    Args:
        ledger: of an accountant, or read from a file.
        delta: the δ in (0, 1) of the summary.
        title: heading.
        source: where the ledger is from.

    Raises:
        ConfigurationError: δ lies outside (0, 1).
    """
    return PrivacyStatement(facts_of_ledger(ledger, share("delta", delta, "(0, 1)"), title, source))


def statement_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The three files that :meth:`PrivacyStatement.save` writes.

    Raises:
        CheckpointError: the path names no file.
    """
    if not isinstance(path, (str, os.PathLike)) or "\0" in (named := str(os.fspath(path))):
        raise CheckpointError(f"a statement needs the path of a file, got {path!r}")
    base = Path(named)
    if base.name in ("", ".."):
        raise CheckpointError(f"{named!r} is a folder; name a file in it, without or with one of {', '.join(SUFFIXES)}")
    base = base.with_suffix("") if base.suffix in SUFFIXES else base
    return tuple(base.with_name(base.name + suffix) for suffix in SUFFIXES)


def _is_text(value: object) -> bool:
    """Whether it can be written: lone surrogates cannot."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def report(
    optimizer: CliplessDPOptimizer,
    path: str | os.PathLike[str] | None = None,
    *,
    delta: float | None = None,
    unit: str | None = None,
    title: str = "Privacy statement",
    notes: Sequence[str] = (),
    audit: object = None,
    robustness: Mapping[str, Any] | None = None,
    organisation: str | None = None,
    purpose: str | None = None,
    data_set: str | None = None,
    contact: str | None = None,
) -> PrivacyStatement:
    """States what the steps taken so far guarantee, and writes it as Markdown, JSON and one HTML page.

    It reads the ledger, the current bounds and public settings: nothing of the training data, so that it may be
    published with the weights.

    Args:
        optimizer: that trained; of :func:`clipless_dp.fit` it is ``result.optimizer``.
        path: where to write, without or with one of the endings ``.md``, ``.json``, ``.html``; ``None`` writes nothing.
        delta: the δ in (0, 1) of the summary; by default that of the optimizer's budget (:func:`fit` sets one), or else
            the largest power of ten of at most one over the data set's size.
        unit: whom or what one row, or one person's rows, stand for; by default what the optimizer's unit is. Where a
            person may have contributed several rows, and rows are the unit, say so here.
        title: heading.
        notes: what else a reader must know, in your words.
        audit: what an audit returned (or several, in a list): printed as it prints itself; one whose ``passed`` is
            false is a finding.
        robustness: what was certified on *public* data, :meth:`clipless_dp.robustness.Curve.described`: a section of
            its own beside ε, and part of the JSON. A certificate of other weights is a finding.
        organisation: who states it, on one line; like the next three also by :meth:`PrivacyStatement.signed`, later.
        purpose: what the model is for.
        data_set: what it was trained on, by the name that readers know.
        contact: whom to ask.

    Raises:
        ConfigurationError: δ lies outside (0, 1), the optimizer is none of this package, a text is no string (of who
            states it: on one line), or what is said of robustness is not what a curve says.
        CheckpointError: the path names no file, or the folder is not writable.

    Source:
        Ponomareva et al. 2023, "How to DP-fy ML", sections 5.2 (which ε are meaningful) and 5.3 (what to report).
    """
    lacking = [name for name in ("accountant", "model", "noise_deviations") if not hasattr(optimizer, name)]
    if lacking:
        raise ConfigurationError(
            f"report takes the optimizer that trained, of fit the result's .optimizer, got {type(optimizer).__name__}"
        )
    unit = UNITS[getattr(optimizer, "unit", "row")] if unit is None else unit
    for name, text in (("unit", unit), ("title", title)):
        if not _is_text(text) or not text.strip() or any(map(is_control, text)):
            raise ConfigurationError(f"{name} must be a text of one line, without control characters, got {text!r}")
    if not isinstance(notes, (tuple, list)) or not all(map(_is_text, notes)):
        raise ConfigurationError(f"notes must be a list of strings that UTF-8 can hold, got {notes!r}")
    if robustness is not None:
        check_described(robustness)
    about = about_of({}, {"organisation": organisation, "purpose": purpose, "data_set": data_set, "contact": contact})
    delta = None if delta is None else positive("delta", delta)
    if delta is not None and delta >= 1.0:
        raise ConfigurationError(f"delta must be a number in (0, 1), got {delta!r}")
    statement = PrivacyStatement(facts_of(optimizer, delta, unit, title, notes, audit, robustness)).signed(**about)
    return statement if path is None else statement.save(path)
