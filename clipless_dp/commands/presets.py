"""``presets``: which presets there are, what they need and reach."""

from __future__ import annotations

import argparse

from clipless_dp import presets
from clipless_dp.commands.choosing import TABLES, TABLES_PROVENANCE, TABLES_SUMMARY
from clipless_dp.display import Table

_NEEDS = {
    "mnist-gradient": "grey images, 16×16 or more",
    "mnist-gated": "grey images, 16×16 or more",
    "mnist-orthogonal": "grey images",
    "features-linear": "grey images",
    "photographs-linear": "colour images, 8×8 or more, their width a multiple of 4",
    "photographs-scattering": "colour images, their width a multiple of 4",
    "photographs-gradient": "colour images, 16×16 or more",
    "transfer": "features of a public backbone (N, …)",
    "regression": "columns in [-1, 1], numbers to predict",
    TABLES: "columns of any scale, cells may be missing",
}
_REACHES = {
    "mnist-gradient": "MNIST, ε = 3: 98.2 %",
    "mnist-gated": "MNIST, ε = 3: 97.0 %",
    "mnist-orthogonal": "MNIST, ε = 3: 95.8 %, certified",
    "features-linear": "MNIST, ε = 3: 98.8 %",
    "photographs-linear": "CIFAR-10, ε = 3: 75.2 %",
    "photographs-scattering": "CIFAR-10, ε = 3: 71.2 %",
    "photographs-gradient": "CIFAR-10, ε = 8: 63.7 %",
}
"""Test accuracy as ``docs/results.md`` has it."""


def add(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("name", nargs="?", choices=(*presets.PRESETS, TABLES), help="all of one of them")


def run(options: argparse.Namespace, only: argparse.Namespace) -> None:
    """Prints a table, or all of one preset."""
    if options.name is not None:
        print(_described(options.name))
        return
    rows = [(name, _NEEDS.get(name, "–"), _REACHES.get(name, "–")) for name in (*presets.PRESETS, TABLES)]
    notes = [
        "train takes the preset of the kind of data where none is named; --preset NAME takes another.",
        "python -m clipless_dp presets NAME tells all of one; figures: docs/results.md",
    ]
    print(Table(("preset", "needs", "reaches"), rows, ("left",) * 3, notes).text())


def _described(name: str) -> str:
    lines = [("needs", _NEEDS.get(name, "–")), ("reaches", _REACHES.get(name, "–"))]
    if name == TABLES:
        settings = "100 to 300 steps on batches of up to 4096 rows, by N and ε"
        lines = [("for", TABLES_SUMMARY), *lines, ("settings", settings), ("chosen on", TABLES_PROVENANCE)]
    else:
        preset = presets.get(name)
        settings = ", ".join(f"{key} {value}" for key, value in preset.settings.items())
        lines = [("for", preset.summary), *lines, ("settings", settings), ("chosen on", preset.provenance)]
    return "\n".join((name, *(f"  {key:<10} {value}" for key, value in lines)))
