"""What a private training step of any network costs: transformers, LoRA, residual networks, ViT, an LSTM.

    python benchmarks/any_network.py                        # all; writes results/any_network.{json,md}
    python benchmarks/any_network.py --quick --networks tokens-64x64 --methods "SGD" "ours"

A step is forward, backward and the optimizer's step, sampling included. All methods get the same network, data and
Poisson draws, of an expected batch, and take turns within each round, in a new random order, so that what else the
machine does hits all alike. Figures are medians over rounds of the processor time and of the wall-clock time of a step,
and of their ratios to plain SGD's on the same draw. Plain SGD runs the network as it is, on unpadded draws, as all do.
Each network runs in a process of its own, on one thread by default, with an allocator that keeps its memory, as a GPU's
does, unless ``--default-allocator``.

Memory is the peak of the bytes that tensors hold during a step (weights, gradients and batch included, the data set
not), as torch's profiler counts them: a mean over steps.

"Checkpointed" methods compute each block again on the way back: plain SGD by ``torch.utils.checkpoint``, ours by
``gradient_gated(net, checkpoint=...)``. "Compiled" SGD shows what there would be to gain by compiling.

Networks have no dropout, as private training usually does without. Opacus gets them through ``make_private``; a method
that refuses or fails is in the table with its reason. LoRA adapts queries and values, at rank 8.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step import ALLOCATORS, RESULTS, peak_bytes
from steps import private_step

from clipless_dp import CliplessDPSGD, DPLipModel, PoissonBatches, gradient_gated, losses, recipes
from clipless_dp.sampling import PoissonBatchSampler

SAMPLES, STEPS = 2_000, 100_000
RATE_OF_LEARNING, NOISE = 0.01, 1.0
SEED = 7
BASELINE = "SGD"

Step = Callable[[], None]
Data = Mapping[str, Tensor]
"""Inputs of all samples by their names, ``(N, ...)``; of networks that take one tensor under ``"input"``."""


class Attention(nn.Module):
    """Self-attention by torch's kernel: ``(B, T, K)`` to ``(B, T, K)``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        batch, positions, width = values.shape
        query, key, value = self.qkv(values).reshape(batch, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        made: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, positions, width))
        return made


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, values: Tensor) -> Tensor:
        values = values + self.attn(self.norm1(values))
        return values + self.mlp(self.norm2(values))


class Tokens(nn.Module):
    """A classifier of sequences: tables of tokens and positions, an encoder, and a head on the mean."""

    def __init__(self, positions: int, encoder: nn.Module, width: int = 256) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, width)
        self.positions = nn.Embedding(positions, width)
        self.encoder = encoder
        self.head = nn.Linear(width, 4)

    def forward(self, input: Tensor) -> Tensor:
        # Opacus gates a table by the batch axis of its numbers.
        places = torch.arange(input.shape[1], device=input.device).expand(input.shape)
        made: Tensor = self.head(self.encoder(self.tokens(input) + self.positions(places)).mean(1))
        return made


class ViT(nn.Module):
    """A vision transformer of width 192 with 3 heads, by timm's names."""

    def __init__(self, size: int, patch: int, depth: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 192, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 192))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, 192))
        self.blocks = nn.Sequential(*[Block(192, 3) for _ in range(depth)])
        self.norm = nn.LayerNorm(192)
        self.head = nn.Linear(192, 10)

    def forward(self, input: Tensor) -> Tensor:
        patches = self.patch_embed(input).flatten(2).transpose(1, 2)
        values = torch.cat([self.cls_token.expand(len(input), -1, -1), patches], 1) + self.pos_embed
        made: Tensor = self.head(self.norm(self.blocks(values))[:, 0])
        return made


class BasicBlock(nn.Module):
    """A residual block with group norms."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.GroupNorm(32, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.GroupNorm(32, outputs)
        changes = stride != 1 or inputs != outputs
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(32, outputs))
            if changes
            else None
        )

    def forward(self, values: Tensor) -> Tensor:
        beside = values if self.downsample is None else self.downsample(values)
        made = functional.relu(self.bn1(self.conv1(values)))
        return functional.relu(self.bn2(self.conv2(made)) + beside)


class ResNet18(nn.Module):
    """resnet18 with group norms, by timm's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.GroupNorm(32, 64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [64, 64, 128, 256, 512]
        for stage in range(4):
            inputs, outputs = widths[stage : stage + 2]
            blocks = BasicBlock(inputs, outputs, 1 if stage == 0 else 2), BasicBlock(outputs, outputs, 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(512, 10)

    def forward(self, input: Tensor) -> Tensor:
        values = self.maxpool(functional.relu(self.bn1(self.conv1(input))))
        values = self.layer4(self.layer3(self.layer2(self.layer1(values))))
        made: Tensor = self.fc(values.mean((2, 3)))
        return made


class LSTM(nn.Module):
    """A classifier of sequences by the last state of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, 64)
        self.lstm = nn.LSTM(64, 128, batch_first=True)
        self.head = nn.Linear(128, 4)

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = self.head(self.lstm(self.tokens(input))[0][:, -1])
        return made


def blocks() -> nn.Module:
    return nn.Sequential(*[Block(256, 4) for _ in range(4)])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def bert(recipe: Callable[[nn.Module], nn.Module]) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return recipe(transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **still, num_labels=4)))


@dataclass(frozen=True)
class Network:
    """A network and what it is measured on.

    Attributes:
        build: makes it.
        batch: the expected number of samples in a draw.
        shape: of a sample.
        vocabulary: its numbers, where samples are of integers.
        masked: whether it also takes an attention mask, all by name.
        blocks: the paths of its repeated blocks, as a regular expression.
    """

    build: Callable[[], nn.Module]
    batch: int
    shape: tuple[int, ...]
    vocabulary: int | None = None
    masked: bool = False
    blocks: str = r"encoder\.\d+"

    def made(self) -> nn.Module:
        """The network, the same at each call."""
        torch.manual_seed(0)
        return self.build().train()

    def paths(self) -> list[str]:
        """Of its blocks."""
        found = [path for path, _ in self.made().named_modules() if re.fullmatch(self.blocks, path)]
        if not found:
            raise ValueError(f"no module is named {self.blocks}")
        return found

    def data(self) -> tuple[Data, Tensor]:
        """Inputs and labels."""
        torch.manual_seed(1)
        labels = torch.randint(4, (SAMPLES,))
        if self.vocabulary is None:
            return {"input": torch.rand(SAMPLES, *self.shape)}, labels
        tokens = torch.randint(self.vocabulary, (SAMPLES, *self.shape))
        if not self.masked:
            return {"input": tokens}, labels
        kept = torch.randint(self.shape[0] // 2, self.shape[0] + 1, (SAMPLES, 1))
        mask = (torch.arange(self.shape[0]) < kept).to(torch.int64)
        return {"input_ids": tokens, "attention_mask": mask}, labels

    def call(self, net: nn.Module, inputs: Data, *, placed: bool = False) -> Tensor:
        """Its logits.

        Args:
            net: the network, or what wraps it.
            inputs: by name.
            placed: whether to say each token's position, which Opacus needs for every sample by itself.
        """
        if not self.masked:
            made: Tensor = net(inputs["input"])
            return made
        shape = inputs["input_ids"].shape
        places = {"position_ids": torch.arange(shape[1]).expand(shape).contiguous()} if placed else {}
        logits: Tensor = net(**inputs, **places).logits
        return logits


NETWORKS = {
    "tokens-64x64": Network(lambda: Tokens(64, blocks()), 64, (64,), 1000),
    "tokens-16x128": Network(lambda: Tokens(128, blocks()), 16, (128,), 1000),
    "encoder-64x64": Network(lambda: Tokens(64, encoder()), 64, (64,), 1000, blocks=r"encoder\.layers\.\d+"),
    "encoder-16x128": Network(lambda: Tokens(128, encoder()), 16, (128,), 1000, blocks=r"encoder\.layers\.\d+"),
    "bert-full": Network(partial(bert, recipes.full), 32, (64,), 30522, True, r"bert\.encoder\.layer\.\d+"),
    "bert-lora": Network(
        partial(bert, partial(recipes.lora, rank=8, layers=("query", "value"))),
        32,
        (64,),
        30522,
        True,
        r"bert\.encoder\.layer\.\d+",
    ),
    "bert-biases": Network(partial(bert, recipes.biases_only), 32, (64,), 30522, True, r"bert\.encoder\.layer\.\d+"),
    "resnet18-gn": Network(ResNet18, 32, (3, 64, 64), blocks=r"layer\d\.\d"),
    "vit-tiny-224": Network(lambda: ViT(224, 16, 12), 8, (3, 224, 224), blocks=r"blocks\.\d+"),
    "vit-tiny-32": Network(lambda: ViT(32, 4, 6), 32, (3, 32, 32), blocks=r"blocks\.\d+"),
    "lstm": Network(LSTM, 64, (32,), 1000, blocks="lstm"),
}


def draws(network: Network, data: tuple[Data, Tensor]) -> Any:
    """Poisson draws as they are, the same for each method."""
    inputs, labels = data
    sampler = PoissonBatchSampler(SAMPLES, sample_rate=network.batch / SAMPLES, steps=STEPS, seed=SEED)
    for indices in sampler.draws():
        chosen = torch.from_numpy(indices)
        yield {name: values[chosen] for name, values in inputs.items()}, labels[chosen]


def sgd(network: Network, *, noise: bool = False, checkpointed: bool = False, compiled: bool = False) -> Step:
    net = network.made()
    for path in network.paths() if checkpointed else ():
        part: Any = net.get_submodule(path)
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    run: Any = torch.compile(net, dynamic=True) if compiled else net
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE_OF_LEARNING)
    batches = draws(network, network.data())

    def step() -> None:
        inputs, labels = next(batches)
        optimizer.zero_grad()
        functional.cross_entropy(network.call(run, inputs), labels).backward()
        if noise:
            for parameter in trained:
                parameter.grad.add_(torch.randn_like(parameter), alpha=NOISE / network.batch)
        optimizer.step()

    return step


def ours(network: Network, *, checkpointed: bool = False) -> Step:
    inputs, labels = network.data()
    net = network.made()
    rows = inputs if network.masked else inputs["input"]
    model = DPLipModel(
        gradient_gated(net, isolation="vmap", checkpoint=network.paths() if checkpointed else ()),
        input_shape=rows if network.masked else network.shape,
        loss=losses.TauCrossEntropy(1.0),
    )
    rate = network.batch / SAMPLES
    optimizer = CliplessDPSGD(
        model, lr=RATE_OF_LEARNING, noise_multiplier=NOISE, sample_rate=rate, dataset_size=SAMPLES
    )
    data = (rows if model.packing is None else model.packing.pack(rows)), labels
    batches = iter(PoissonBatches(data, sample_rate=rate, steps=STEPS, physical_batch_size=1, seed=SEED))
    return private_step(model, optimizer, batches)


def opacus(network: Network, *, mode: str, ghost: bool = True) -> Step:
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    data = network.data()
    net = network.made()
    base = torch.optim.SGD([value for value in net.parameters() if value.requires_grad], lr=RATE_OF_LEARNING)
    settings: dict[str, Any] = {} if ghost else {"use_ghost_clipping": False}
    made = PrivacyEngine(accountant="prv").make_private(
        module=net,
        optimizer=base,
        criterion=nn.CrossEntropyLoss(),
        # Draws come from elsewhere; of this, the expected batch is read.
        data_loader=DataLoader(TensorDataset(data[1]), batch_size=network.batch),
        noise_multiplier=NOISE,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
        **settings,
    )
    module, optimizer = made[:2]
    criterion: Any = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    batches = draws(network, data)

    def step() -> None:
        inputs, labels = next(batches)
        optimizer.zero_grad()
        criterion(network.call(module, inputs, placed=True), labels).backward()
        optimizer.step()

    return step


METHODS: dict[str, Callable[[Network], Step]] = {
    BASELINE: sgd,
    "SGD + noise": partial(sgd, noise=True),
    "SGD, checkpointed": partial(sgd, checkpointed=True),
    "SGD, compiled": partial(sgd, compiled=True),
    "ours": ours,
    "ours, checkpointed": partial(ours, checkpointed=True),
    "Opacus, ghost": partial(opacus, mode="ghost"),
    "Opacus, hooks": partial(opacus, mode="hooks"),
    "Opacus, expanded weights": partial(opacus, mode="ew"),
}


def measure(name: str, rounds: int, repeats: int, chosen: list[str]) -> dict[str, Any]:
    """Times of one step of each method, taking turns on the same draws."""
    network = NETWORKS[name]
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    for method in chosen:
        try:
            peaks[method] = peak_bytes(lambda build=METHODS[method]: build(network), torch.device("cpu"))
            step = METHODS[method](network)
            for _ in range(2):
                step()
            steps[method] = step
        except Exception as error:
            told = " ".join(str(error).split())
            failed[method] = f"{type(error).__name__}: {told[:200]}"
        gc.collect()
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in steps}
    order = list(steps)
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for method in order:
            step = steps[method]
            begun = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                step()
            times[method].append(
                ((time.process_time() - begun[1]) / repeats, (time.perf_counter() - begun[0]) / repeats)
            )
    rows = []
    for method, own in times.items():
        ratios = [[mine[kind] / base[kind] for mine, base in zip(own, times[BASELINE], strict=True)] for kind in (0, 1)]
        low, _, high = statistics.quantiles(ratios[0], n=4)
        rows.append(
            {
                "method": method,
                "processor_milliseconds": 1e3 * statistics.median(mine[0] for mine in own),
                "wall_milliseconds": 1e3 * statistics.median(mine[1] for mine in own),
                "processor_ratio": statistics.median(ratios[0]),
                "processor_ratio_quartiles": [low, high],
                "wall_ratio": statistics.median(ratios[1]),
                "peak_bytes": peaks[method],
                "peak_ratio": peaks[method] / peaks[BASELINE],
            }
        )
    net = network.made()
    return {
        "network": name,
        "batch": network.batch,
        "shape": network.shape,
        "parameters": sum(value.numel() for value in net.parameters()),
        "trained": sum(value.numel() for value in net.parameters() if value.requires_grad),
        "rows": rows,
        "failed": failed,
    }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# A private training step of any network",
        "",
        f"{report['machine']}, {report['threads']} thread(s), torch {report['torch']}, {report['rounds']} rounds of "
        f"{report['repeats']} steps, allocator: {report['allocator']}. Regenerate with `python "
        "benchmarks/any_network.py`.",
        "",
        "Forward, backward and optimizer's step, sampling included: medians over rounds, ratios to plain SGD on the "
        "same draw, quartiles of the processor time's. Peak: bytes that tensors hold during a step, by torch's "
        "profiler, the data set left out.",
    ]
    for run in report["runs"]:
        shape = "×".join(map(str, run["shape"]))
        lines += [
            "",
            f"## {run['network']}: {run['batch']} samples of {shape}, {run['trained'] / 1e6:.2f} of "
            f"{run['parameters'] / 1e6:.2f} million parameters trained",
            "",
            "| method | processor ms | ratio | quartiles | wall ms | ratio | peak MB | ratio |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {row['method']} | {row['processor_milliseconds']:.0f} | {row['processor_ratio']:.2f} "
            f"| {row['processor_ratio_quartiles'][0]:.2f}–{row['processor_ratio_quartiles'][1]:.2f} "
            f"| {row['wall_milliseconds']:.0f} | {row['wall_ratio']:.2f} "
            f"| {row['peak_bytes'] / 1e6:.0f} | {row['peak_ratio']:.2f} |"
            for row in run["rows"]
        ]
        lines += [f"| {method} | fails: {reason} | | | | | | |" for method, reason in run["failed"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=1, help="steps of each method in each round")
    parser.add_argument("--default-allocator", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    parser.add_argument("--out", type=Path, default=RESULTS / "any_network.json", help="JSON; the table goes beside it")
    parser.add_argument("--child", choices=list(NETWORKS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 4
    methods = list(dict.fromkeys([BASELINE, *options.methods]))
    if options.child is not None:
        torch.set_num_threads(options.threads)
        warnings.simplefilter("ignore")
        print(json.dumps(measure(options.child, options.rounds, options.repeats, methods)))
        return
    allocator = "default" if options.default_allocator else "keeps memory"
    report: dict[str, Any] = {
        "machine": f"{platform.machine()} CPU",
        "threads": options.threads,
        "torch": torch.__version__,
        "rounds": options.rounds,
        "repeats": options.repeats,
        "allocator": allocator,
        "runs": [],
    }
    settings = ["--threads", str(options.threads), "--rounds", str(options.rounds), "--repeats", str(options.repeats)]
    environment = {**os.environ, **ALLOCATORS[allocator], "OMP_NUM_THREADS": str(options.threads)}
    for name in options.networks:
        command = [sys.executable, __file__, "--child", name, *settings, "--methods", *methods]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise SystemExit(answer.stderr)
        report["runs"].append(json.loads(answer.stdout.splitlines()[-1]))
        print(f"{name}: done", file=sys.stderr, flush=True)
        if not options.quick:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
