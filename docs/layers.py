"""The catalogue of layers, from the rules themselves: a test compares docs/layers.md with what this writes.

python docs/layers.py                  # writes docs/layers.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import clipless_dp
from clipless_dp import gates, isolation, layers
from clipless_dp.gates import can_be_gradient_gated
from clipless_dp.rules import base

PAGE = Path(__file__).with_name("layers.md")

HEAD = """# Layers and their bounds

Every module that has a rule, and so may stand in a certified Lipschitz network; written by `python docs/layers.py` from
the rules' own words. Behind [gradient gates](any-network.md) any other module runs too. Symbols are those of
[bounds](bounds.md#rules): inputs of norm at most `X`, cotangents of norm at most `G`; `Y` bounds the output, `K` the
Jacobian, `Δ` a parameter's per-sample gradient.

*Constraint*: parameters that a constraint can limit. *Gates*: what can take the place of certified norms: signal gates
around the layer, gradient gates on its parameters. *Source*: who is named for the layer, and the rule.

Functions have rules as well: `relu`, `tanh`, `sigmoid`, `softsign`, `logsigmoid`, `clamp` and their like, sums, means,
slices, chunks, concatenations, reshapes and padding ([bounds](bounds.md#rules)). Three-dimensional convolutions have
none: gate them.

| layer | `Y` | `K` | `Δ` | constraint | gates | source |
| --- | --- | --- | --- | --- | --- | --- |
"""

PARAMETRISED: dict[type[nn.Module], tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    nn.Linear: (lambda: nn.Linear(4, 4), (4,)),
    nn.Conv1d: (lambda: nn.Conv1d(2, 2, 3), (2, 6)),
    nn.ConvTranspose1d: (lambda: nn.ConvTranspose1d(2, 2, 3), (2, 6)),
    nn.PReLU: (nn.PReLU, (4,)),
    nn.Embedding: (lambda: nn.Embedding(5, 2), (3,)),
    nn.EmbeddingBag: (lambda: nn.EmbeddingBag(5, 2), (3,)),
    layers.LinearSpline: (layers.LinearSpline, (4,)),
    layers.Householder: (lambda: layers.Householder(4), (4,)),
    layers.StructuredLinear: (lambda: layers.StructuredLinear(4, 4), (4,)),
    layers.Diagonal: (lambda: layers.Diagonal(4), (4,)),
    layers.Foton: (lambda: layers.Foton(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))), (4,)),
    layers.Pepita: (lambda: layers.Pepita(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), 1.0), (4,)),
    layers.CausalMixing: (lambda: layers.CausalMixing(4), (4, 2)),
    layers.ChannelBias: (lambda: layers.ChannelBias(4), (4,)),
    layers.DistanceLinear: (lambda: layers.DistanceLinear(4, 4), (4,)),
    layers.SortLinear: (lambda: layers.SortLinear(4, 4), (4,)),
    layers.ConvexPotential: (lambda: layers.ConvexPotential(4), (4,)),
    layers.ConvexPotentialConv2d: (lambda: layers.ConvexPotentialConv2d(2, 3), (2, 6, 6)),
    layers.SigmoidMix: (layers.SigmoidMix, (4,)),
}
"""One example of each rule that has parameters; layers behind gradient gates have those of the layer itself."""

HAVE_GATES = (
    layers.GradientGatedConvexPotential,
    layers.GradientGatedConvexPotentialConv2d,
    layers.Foton,
    layers.Pepita,
    layers.GradientGatedStructuredLinear,
    layers.GradientGatedDiagonal,
    isolation.Isolated,
    gates.GradientGatedLinear,
    gates.GradientGatedConv1d,
    gates.GradientGatedConvTranspose1d,
)


def rules() -> dict[Any, list[type[nn.Module]]]:
    """This library's rules, each with the types that it bounds, in the order in which they were registered."""
    found: dict[Any, list[type[nn.Module]]] = {}
    for kind, rule in base._RULES.items():
        if base.is_builtin(rule) and rule.__module__.startswith("clipless_dp.rules."):
            found.setdefault(rule, []).append(kind)
    return found


def formulas(rule: Any, symbol: str) -> str:
    """What a rule's docstring says of ``Y``, ``K`` or ``Δ``."""
    said = re.findall(r"``([^`]+)``", inspect.getdoc(rule) or "")
    found = [text for text in said if re.match(rf"{symbol}(_\w+)? = ", text)]
    if symbol == "Δ":
        return "; ".join(f"`{text}`" for text in dict.fromkeys(found))
    return " or ".join(f"`{text.partition(' = ')[2]}`" for text in dict.fromkeys(found))


def example(kinds: list[type[nn.Module]]) -> tuple[nn.Module, tuple[int, ...]] | None:
    """A layer with parameters that a rule bounds, and the shape of a sample."""
    made = next((PARAMETRISED[kind] for kind in kinds if kind in PARAMETRISED), None)
    return None if made is None else (made[0](), made[1])


def constrained(rule: Any, kinds: list[type[nn.Module]]) -> str:
    """The parameters that a rule names an operator for."""
    made = example(kinds)
    if made is None:
        return ""
    layer, shape = made
    context = SimpleNamespace(
        input_shape=shape, input_shapes=(shape, shape), input_norm=1.0, input_norm_inf=1.0, path="", kind=""
    )
    values = torch.zeros(2, *shape, dtype=torch.int64 if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) else None)
    two = isinstance(layer, layers.SigmoidMix)
    context.output_shape = tuple((layer(values, values) if two else layer(values)).shape[1:])
    return ", ".join(f"`{name}`" for name in rule(layer, context).operators)


def gated(kinds: list[type[nn.Module]]) -> str:
    """Which gates fit."""
    if any(kind in HAVE_GATES for kind in kinds):
        return "has its own"
    made = example(kinds)
    if made is None:
        return ""
    if isinstance(made[0], (nn.Embedding, nn.EmbeddingBag)):
        return "cotangent"
    if isinstance(made[0], layers.SigmoidMix):
        return ""
    return "signal, gradient" if can_be_gradient_gated(made[0]) else "signal"


def source(rule: Any, kinds: list[type[nn.Module]]) -> str:
    """Who is named in the layers' docstrings, and where the rule is."""
    texts = [" ".join((inspect.getdoc(kind) or "").split()) for kind in kinds if "clipless_dp" in kind.__module__]
    named = [name for text in texts for name in re.findall(r"\(([A-Z][^()]*?\b\d{4})\b[^()]*\)", text)]
    own = all(kind.__module__.startswith("torch.") for kind in kinds)
    who = "; ".join(dict.fromkeys(named)) or ("torch" if own else "")
    where = f"`{rule.__module__.removeprefix('clipless_dp.')}.{rule.__name__}`"
    return f"{who}, {where}" if who else where


def is_layer(value: object) -> bool:
    """Whether it is a class of modules."""
    return isinstance(value, type) and issubclass(value, nn.Module)


def traced_through() -> list[type[nn.Module]]:
    """Layers of this library without a rule of their own."""
    kinds = [getattr(layers, name) for name in layers.__all__]
    return [kind for kind in kinds if is_layer(kind) and kind not in base._RULES]


def label(kind: type[nn.Module]) -> str:
    """A type as users write it."""
    home = "nn" if kind.__module__.startswith("torch.") else kind.__module__.split(".")[1]
    return f"`{home}.{kind.__name__}`"


def page() -> str:
    """The whole page."""
    lines = []
    for rule, kinds in rules().items():
        cells = [
            ", ".join(map(label, kinds)),
            *(formulas(rule, symbol) for symbol in "YKΔ"),
            constrained(rule, kinds),
            gated(kinds),
            source(rule, kinds),
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n")
    table = "".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)
    return f"{HEAD}{table}\nTraced through, and bounded by their parts: {', '.join(map(label, traced_through()))}.\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(f"{PAGE.name}: {len(rules())} rules of clipless_dp {clipless_dp.__version__}")
