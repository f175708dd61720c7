"""The pictures of README and site: from the figures in benchmarks/results, and of the tutorials, run in whole.

python docs/figures.py                  # writes docs/figures/*.png
python docs/figures.py --tutorials      # trains, for two minutes, and writes the pictures of docs/tutorials
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"

OPACUS = "DP-SGD (Opacus)"
LINES = {
    "features": ("features first", "#b2182b", "-", "o"),
    "whitened features": ("whitened features first", "#762a83", "-", "o"),
    "gradient gates": ("gradient gates", "#1b7837", "-", "o"),
    "gradient gates, defaults": ("gradient gates, defaults", "#1b7837", ":", "D"),
    "signal gates": ("signal gates", "#e08214", "-", "o"),
    "constrained": ("constraints", "#2166ac", "-", "o"),
    OPACUS: ("Opacus (clipping)", "#333333", "--", "s"),
    f"{OPACUS} on features": ("Opacus on features", "#808080", "--", "^"),
    f"{OPACUS} on whitened features": ("Opacus on whitened features", "#808080", "-.", "v"),
}
"""Label, colour, line and marker of a method, in the order of the legend."""

CHOSEN = ", chosen at each ε"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((RESULTS / name).read_text("utf-8"))


def accuracies(runs: list[dict[str, Any]], data: str) -> dict[str, dict[float, list[float]]]:
    """Test accuracies in per cent over seeds, by method and ε."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["data"] == data and run["split"] == "test":
            found[run["method"]][run["epsilon"]].append(100 * run["accuracy"])
    return found


def accuracy_against_epsilon() -> None:
    """One panel for each data set, one legend below all, so that it hides no point."""
    runs = read("utility.json")["runs"]
    panels = {
        "digits": "scikit-learn's digits, δ = 10⁻⁴",
        "mnist": "MNIST, δ = 10⁻⁵",
        "cifar10": "CIFAR-10 on fixed features, δ = 10⁻⁵",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), layout="constrained")
    shown: dict[str, Any] = {}
    for axis, (data, title) in zip(axes, panels.items(), strict=True):
        found = accuracies(runs, data)
        for place, (method, (label, colour, line, marker)) in enumerate(LINES.items()):
            # Where Opacus was tuned more, that counts.
            by_epsilon = found.get(method + CHOSEN, found.get(method))
            if not by_epsilon:
                continue
            epsilons = sorted(by_epsilon)
            means = [statistics.mean(by_epsilon[epsilon]) for epsilon in epsilons]
            spread = [
                statistics.stdev(by_epsilon[epsilon]) if len(by_epsilon[epsilon]) > 1 else 0.0 for epsilon in epsilons
            ]
            drawn = axis.errorbar(
                # Side by side, where several methods reach the same.
                [epsilon * 1.006 ** (place - len(LINES) // 2) for epsilon in epsilons],
                means,
                spread,
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
                capsize=2,
                elinewidth=0.8,
                label=label,
                zorder=3 if line != "-" else 2,
            )
            shown[label] = drawn
        axis.set_xscale("log")
        axis.set_xticks([1, 3, 8], ["1", "3", "8"])
        axis.minorticks_off()
        axis.set_xlabel("ε")
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("test accuracy, %")
    labels = [label for label, *_ in LINES.values() if label in shown]
    figure.legend(
        [shown[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    figure.savefig(FIGURES / "accuracy.png")
    plt.close(figure)


def certified_against_radius() -> None:
    """Certified accuracy by radius: private at two ε, and the same network without privacy."""
    panels = {"mnist": ("MNIST", 8.0, 1.05), "cifar10": ("CIFAR-10", 16.0, 0.45)}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for axis, (data, (title, tau, largest)) in zip(axes, panels.items(), strict=True):
        runs = [run for run in read(f"robustness-{data}.json")["runs"] if run["tau"] == tau]
        for run in sorted(runs, key=lambda run: run["epsilon"] or math.inf):
            epsilon = run["epsilon"]
            axis.plot(
                [point["radius"] for point in run["points"]],
                [100 * point["certified"]["value"] for point in run["points"]],
                marker="o",
                markersize=4,
                linestyle="-" if epsilon else "--",
                color={3.0: "#1b7837", 8.0: "#2166ac"}.get(epsilon, "#333333"),
                label=f"ε = {epsilon:g}" if epsilon else "without privacy",
            )
        axis.set_xlim(right=largest)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{title}: test images that no change within the radius moves", fontsize=10)
        axis.set_xlabel("radius (Euclidean norm, pixels in [0, 1])")
    axes[0].set_ylabel("certified accuracy, %")
    axes[1].legend(frameon=False)
    figure.savefig(FIGURES / "certified.png")
    plt.close(figure)


def box(axis: Any, x: float, text: str, colour: str, y: float = 0.0, width: float = 1.7) -> None:
    """A box of the diagram, centred at (x, y)."""
    axis.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.32), width, 0.64, boxstyle="round,pad=0.04", facecolor=colour, edgecolor="#555555"
        )
    )
    axis.text(x, y, text, ha="center", va="center", fontsize=9.5)


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], text: str, colour: str, above: bool) -> None:
    """An arrow with its label."""
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, linewidth=1.4))
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + (0.17 if above else -0.17))
    axis.text(*middle, text, ha="center", va="bottom" if above else "top", fontsize=9, color=colour)


def way_of_a_sample() -> None:
    """How a sample's gradient is bounded: norms X forth, norms G back, their product at each layer."""
    figure, axis = plt.subplots(figsize=(10, 2.5), layout="constrained")
    stations = ["input, projected\non a ball", "layer 1", "layer 2", "loss, of\nbounded slope"]
    colours = ["#d9ead3", "#dbe7f4", "#dbe7f4", "#fde5cd"]
    places = [0.0, 3.2, 6.4, 9.6]
    for place, name, colour in zip(places, stations, colours, strict=True):
        box(axis, place, name, colour)
    forth = ["‖x₀‖ ≤ X₀", "‖x₁‖ ≤ X₁ = K₁·X₀", "‖x₂‖ ≤ X₂ = K₂·X₁"]
    back = [None, "‖g₁‖ ≤ G₁ = K₂·G₂", "‖g₂‖ ≤ G₂"]
    for index, text in enumerate(forth):
        start, end = places[index] + 0.9, places[index + 1] - 0.9
        arrow(axis, (start, 0.16), (end, 0.16), text, "#2166ac", above=True)
        if back[index]:
            arrow(axis, (end, -0.16), (start, -0.16), back[index], "#b2182b", above=False)
    for index in (1, 2):
        x = places[index]
        axis.add_patch(
            FancyArrowPatch((x, -0.4), (x, -1.0), arrowstyle="-|>", mutation_scale=12, color="#555555", linewidth=1.2)
        )
        subscript = "₁₂"[index - 1]
        before = "₀₁"[index - 1]
        box(axis, x, f"Δ{subscript} = G{subscript}·X{before}", "#eeeeee", y=-1.35, width=2.0)
    box(axis, 9.6, "noise σ·Δ, once,\non the sum", "#eeeeee", y=-1.35, width=2.2)
    for start, end in ((places[1] + 1.06, places[2] - 1.06), (places[2] + 1.06, 9.6 - 1.16)):
        axis.add_patch(
            FancyArrowPatch(
                (start, -1.35), (end, -1.35), arrowstyle="-|>", mutation_scale=12, color="#555555", linewidth=1.2
            )
        )
    axis.set_xlim(-1.1, 10.9)
    axis.set_ylim(-1.8, 0.7)
    axis.axis("off")
    figure.savefig(FIGURES / "bounds.png")
    plt.close(figure)


def tutorials() -> None:
    """Runs what a reader of each tutorial would run, in a folder of its own, and keeps what it draws."""
    for page in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
        code = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            exec(compile("\n".join(code), str(page), "exec"), {"__name__": "tutorial"})
            for picture in Path(folder).glob("*.png"):
                shutil.copy(picture, FIGURES)
            os.chdir(ROOT)


def main() -> None:
    """Draws all that follow from results."""
    FIGURES.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        accuracy_against_epsilon()
        certified_against_radius()
        way_of_a_sample()


if __name__ == "__main__":
    tutorials() if "--tutorials" in sys.argv[1:] else main()
