"""Prints the worst observed/bound of every configuration as a Markdown table: `python -m tests.soundness.report`."""

from __future__ import annotations

import torch

from tests.soundness.attack import attack
from tests.soundness.cases import CASES


def rows(steps: int) -> list[tuple[str, str, str, str]]:
    """One line for each configuration: its activation, cotangent and parameter ratios."""
    lines = []
    for case in CASES:
        worst = attack(case, steps=steps)
        own = [
            f"{name.removeprefix('layer.')} {ratio:.3f}"
            for name, ratio in sorted(worst.items())
            if name.startswith("layer.")
        ]
        lines.append((case.name, f"{worst['after.input']:.3f}", f"{worst['before.shift']:.3f}", ", ".join(own) or "–"))
    return lines


def main() -> None:
    torch.manual_seed(0)
    print("| layer | activations / Y | cotangent / KG | gradients / Δ |")
    print("| --- | ---: | ---: | --- |")
    for line in rows(steps=40):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
