"""What a step costs each rank, counted and held against formulas: flops, bytes moved and sent, normal numbers, memory.

    python benchmarks/cost.py             # writes results/cost.{json,md}; fails where a count is not the formula's
    python benchmarks/cost.py --quick     # one width, two ranks, nothing written

A stack of square layers is trained plainly and by each route, in one process and by gloo processes on this machine,
replicated (plain: ``DistributedDataParallel``) and split layer by layer (``fully_shard``). In one step are counted

* flops of matrix products by ``torch.utils.flop_counter``, to which products with vectors, Cholesky factorisations and
  triangular solutions are added;
* bytes that operations on tensors read and write (operands and results, views left out), which is what time goes by
  where a step does little else (what NumPy computes is not seen);
* bytes that each collective carries: a tensor's size where it is summed or sent, the whole one's where it is gathered
  or scattered; those of integers, by which ranks compare notes, apart;
* bytes that a rank's sockets send by gloo's algorithms, as the kernel counts them (Linux);
* normal numbers that its noise source is asked for;
* bytes that its weights take, and the most that tensors take on top of all that is held between steps.

Nothing is timed but the drawing of normal numbers. :func:`flops`, :func:`carried` and :func:`drawn` are the formulas;
docs/cost.md has what follows from them for large models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import _FlopCounterMode, flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clipless_dp import CliplessDPSGD, DPLipModel, constraints, gated, gradient_gated, losses
from clipless_dp.distributed.placement import local
from clipless_dp.gates.gradient import _TOKEN_GRAM_GAIN, prefers_gram
from clipless_dp.noise import SystemNoise
from clipless_dp.training.memory import traffic

RESULTS = Path(__file__).resolve().parent / "results"
PLAIN = "plain"
GATED = ("gated", "gradient gates")
WHOLE = ("orthogonal", "spectral", "certificates")
"""Routes that look at whole weights in each step; the last has neither gates nor constraints."""
ROUTES = (PLAIN, *GATED, *WHOLE)
LAYOUTS = ("replicated", "sharded")
ENTRY = 4
"""Bytes of a weight."""
STEPS = 3
"""Of which the median is taken, where counts depend on when a message leaves or a block is freed."""

Step = Callable[[], None]


class Stack(NamedTuple):
    """Layers of ``width×width`` without biases, and ReLUs between them.

    Attributes:
        width: of each layer.
        depth: how many.
        rows: of each rank's batch.
        tokens: vectors of each row, whose mean is the output; 0: one vector, and no mean.
    """

    width: int
    depth: int
    rows: int
    tokens: int = 0

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return self.depth * self.width**2


@dataclass(frozen=True)
class Count:
    """What one rank did in one step.

    Attributes:
        flops: of products, factorisations and triangular solutions.
        moved: bytes that operations read and wrote.
        carried: bytes of weights and gradients, by kind of collective.
        control: bytes of integers in collectives.
        sent: bytes that its sockets sent.
        drawn: normal numbers.
        held: bytes of its weights.
        peak: the most bytes on top of what is held between steps.
    """

    flops: int
    moved: int
    carried: dict[str, int]
    control: int
    sent: int
    drawn: int
    held: int
    peak: int


def flops(route: str, layout: str, stack: Stack, ranks: int) -> int:
    """Flops of a plain or gated step on each rank.

    A layer has three products of ``2·rows·tokens·width²``: forward, its weight's gradient and its input's, which the
    first layer has not. Gradient gates of several tokens measure each row's gradient, by products of its tokens or by
    forming it; of one vector they measure two norms. Replicas compare one weighted sum of their weights.
    """
    width, depth, rows, tokens = stack
    product = 2 * rows * max(1, tokens) * width**2
    found = 3 * depth * product - product
    if route == "gradient gates" and tokens:
        if prefers_gram(tokens, width, width, _TOKEN_GRAM_GAIN):
            found += depth * 2 * rows * tokens**2 * 2 * width
        else:
            found += depth * 2 * rows * width**2
    if route != PLAIN and layout == "replicated" and ranks > 1:
        found += 2 * stack.parameters
    return found


def carried(route: str, layout: str, stack: Stack, ranks: int) -> dict[str, int]:
    """Bytes that collectives carry in a step, control left out."""
    size = ENTRY * stack.parameters
    if ranks == 1:
        return {}
    if layout == "replicated":
        return {"all-reduce": size} if route == PLAIN else {"reduce": size, "broadcast": size}
    # Each layer is gathered forward and backward, and its gradient scattered.
    passes = {"all-gather": 2 * size, "reduce-scatter": size}
    if route in ("orthogonal", "spectral"):
        return {**passes, "all-gather": 3 * size, "broadcast": size}
    return {**passes, "all-gather": 3 * size} if route == "certificates" else passes


def control(route: str, layout: str, ranks: int) -> int:
    """Bytes of integers that a gated step's collectives carry: four digests a rank, and how many passes are due."""
    if route == PLAIN or ranks == 1:
        return 0
    return 32 * ranks + (8 if layout == "sharded" else 0)


def drawn(route: str, layout: str, stack: Stack, ranks: int, rank: int) -> int:
    """Normal numbers that a rank draws in a step."""
    if route == PLAIN:
        return 0
    if layout == "replicated":
        return stack.parameters if rank == 0 else 0
    return stack.parameters // ranks


_NAMES = {
    "allreduce_": "all-reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
}


class _Counter:
    """What torch's mode that counts flops tells of each operation. (One of our own would be refused, as any that may
    change what a wrapped network computes; ``FlopCounterMode`` hooks all modules besides, which is refused, too.)
    """

    def __init__(self) -> None:
        self.flop_registry = flop_registry
        self.flops = self.moved = self.control = 0
        self.carried: Counter[str] = Counter()

    def _count_flops(self, packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        space, _, name = packet._qualified_op_name.partition("::")
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        if name in _NAMES and space in ("c10d", "_c10d_functional"):
            self._carry(name, [*tree_leaves(args[0])] if name == "allgather_" else [max([*given, *made], key=_bytes)])
        elif space == "aten":
            self.flops += _flops(packet, name, out, args, kwargs)
            # A view shares the memory of what it is a view of; what is written in place does, too.
            written = "out" in kwargs or name.endswith("_")
            if written or not {_memory(value) for value in made} & {_memory(value) for value in given}:
                self.moved += sum(map(_bytes, [*given, *made]))
        return out

    def _carry(self, name: str, tensors: Sequence[Tensor]) -> None:
        size = sum(map(_bytes, tensors))
        if tensors[0].is_floating_point():
            self.carried[_NAMES[name]] += size
        else:
            self.control += size


def _flops(packet: Any, name: str, out: Any, args: Any, kwargs: Any) -> int:
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if name in ("mv", "addmv", "addmv_"):
        return int(2 * args[-2].numel())
    if name in ("linalg_cholesky", "linalg_cholesky_ex"):
        return int(args[0].numel() * args[0].shape[-1] // 3)
    if name == "linalg_solve_triangular":
        left, right = args[:2]
        return int(right.numel() * left.shape[-1])
    if name == "_linalg_eigh":
        # Of eigenvalues alone, which is what is asked for: 4n³/3 (Golub and Van Loan, Matrix Computations, §8.3.1).
        return int(4 * args[0].numel() * args[0].shape[-1] // 3)
    if name in ("_linalg_svd", "linalg_qr"):
        raise NotImplementedError(f"no count of {name}")
    return 0


def _own(tensor: Tensor) -> Tensor:
    """What a rank holds of a split tensor, and what is on its way in one that a collective has yet to fill."""
    part = local(tensor)
    return getattr(part, "elem", part)


def _memory(tensor: Tensor) -> int:
    return _own(tensor).untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    part = _own(tensor)
    # What is expanded is no larger than its memory.
    return min(part.numel() * part.element_size(), part.untyped_storage().nbytes())


class _Counted:
    """A noise source that counts what it is asked for."""

    reproducible = False

    def __init__(self) -> None:
        self.drawn, self._source = 0, SystemNoise()

    def begin_step(self, step: int) -> None:
        self._source.begin_step(step)

    def standard_normal_(self, out: Tensor) -> object:
        self.drawn += out.numel()
        return self._source.standard_normal_(out)


class _Mean(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.mean(1)


def _layers(stack: Stack) -> nn.Sequential:
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for _ in range(stack.depth):
        made += [nn.Linear(stack.width, stack.width, bias=False), nn.ReLU()]
    return nn.Sequential(*made[:-1], *([_Mean()] if stack.tokens else []))


def _shard_(net: nn.Module, whole: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    for part in net.children():
        if list(part.parameters()):
            fully_shard(part)
    fully_shard(whole)


def _rank() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _plain(layout: str, stack: Stack, batch: tuple[Tensor, Tensor]) -> tuple[Step, nn.Module]:
    net = _layers(stack)
    called: nn.Module = net
    if layout == "sharded":
        _shard_(net, net)
    elif _rank()[1] > 1:
        called = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)

    def step() -> None:
        functional.cross_entropy(called(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, net


def _private(
    route: str, layout: str, stack: Stack, batch: tuple[Tensor, Tensor], noise: _Counted
) -> tuple[Step, nn.Module]:
    gates = {"gated": gated, "gradient gates": gradient_gated}.get(route)
    constraint = {"orthogonal": constraints.Orthogonal(), "spectral": constraints.Spectral()}.get(route)
    net = _layers(stack)
    model = DPLipModel(
        net if gates is None else gates(net),
        input_shape=tuple(batch[0].shape[1:]),
        input_norm=1.0,
        loss=losses.TauCrossEntropy(1.0),
        constraint=constraint,
    )
    if layout == "sharded":
        _shard_(model.net, model)
    optimizer = CliplessDPSGD(
        model,
        0.01,
        noise_multiplier=1.0,
        sample_rate=0.5,
        dataset_size=2 * _rank()[1] * stack.rows,
        sampling="poisson",
        noise=noise,
    )
    rows = (*batch, torch.ones(stack.rows).bool())

    def step() -> None:
        optimizer.accumulate(rows)
        optimizer.step()
        optimizer.zero_grad()

    return step, model.net


def sent() -> int:
    """Bytes that this process's TCP sockets have sent since they were opened (Linux; elsewhere 0)."""
    total, folder = 0, Path("/proc/self/fd")
    for link in list(folder.iterdir()) if folder.exists() else []:
        try:
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as some:
                if some.family in (socket.AF_INET, socket.AF_INET6) and some.type == socket.SOCK_STREAM:
                    # struct tcp_info has tcpi_bytes_sent there, since Linux 4.19.
                    told = some.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("=Q", told, 200)[0] if len(told) >= 208 else 0
        except OSError:
            continue  # The folder's own descriptor, or one that was closed meanwhile.
    return total


def count(route: str, layout: str, stack: Stack) -> Count:
    """What this rank does in a step, after a few."""
    warnings.simplefilter("ignore")
    rank, _ = _rank()
    torch.manual_seed(rank)
    shape = (stack.tokens, stack.width) if stack.tokens else (stack.width,)
    batch = torch.randn(stack.rows, *shape), torch.randint(stack.width, (stack.rows,))
    noise = _Counted()
    step, net = _plain(layout, stack, batch) if route == PLAIN else _private(route, layout, stack, batch, noise)
    for _ in range(4):
        step()
    before, counter = noise.drawn, _Counter()
    with _FlopCounterMode(counter):  # type: ignore[arg-type]
        step()
    numbers = noise.drawn - before
    messages = []
    for _ in range(STEPS):
        before = sent()
        step()
        messages.append(sent() - before)
    return Count(
        flops=counter.flops,
        moved=counter.moved,
        carried=dict(counter.carried),
        control=counter.control,
        sent=int(statistics.median(messages)),
        drawn=numbers,
        held=sum(local(parameter).numel() * parameter.element_size() for parameter in net.parameters()),
        peak=int(statistics.median(traffic(step, torch.device("cpu")).peak for _ in range(STEPS))),
    )


Case = tuple[str, str, Stack]


def counted(cases: Sequence[Case], ranks: int) -> list[list[Count]]:
    """What each of so many ranks does in a step, case by case."""
    if ranks == 1:
        return [[count(*case)] for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_serve, (ranks, folder, cases), nprocs=ranks)
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    return [list(of_ranks) for of_ranks in zip(*found, strict=True)]


def _serve(rank: int, ranks: int, folder: str, cases: Sequence[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    torch.save([count(*case) for case in cases], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def differences(case: Case, counts: Sequence[Count]) -> list[str]:
    """Where counts are not the formulas'."""
    route, layout, stack = case
    ranks, found = len(counts), []
    for rank, own in enumerate(counts):
        pairs: dict[str, tuple[object, object]] = {
            "carried": (own.carried, carried(*case, ranks)),
            "drawn": (own.drawn, drawn(*case, ranks, rank)),
        }
        if route not in WHOLE:
            pairs["flops"] = own.flops, flops(*case, ranks)
            pairs["control"] = own.control, control(route, layout, ranks)
        found += [
            f"{route}, {layout}, {stack}, rank {rank} of {ranks}: {name} are {counted}, not {by_formula}"
            for name, (counted, by_formula) in pairs.items()
            if counted != by_formula
        ]
    return found


def nanoseconds_a_number(count: int = 1 << 22, rounds: int = 5) -> float:
    """Processor time of one normal number of the system's noise on this machine, one thread."""
    source, block = SystemNoise(), torch.empty(count)
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        source.standard_normal_(block)
        taken.append(time.process_time() - start)
    return 1e9 * statistics.median(taken) / count


def cases(quick: bool) -> dict[int, list[Case]]:
    """What is counted, by the number of ranks."""
    widths = (128,) if quick else (256, 512)
    alone = [
        (route, "replicated", Stack(width, 4, rows, tokens))
        for width in widths
        for rows, tokens in ((32, 0), (64, 0), (16, 16), (16, 64))
        for route in ROUTES
        if not (tokens and route in WHOLE)
    ]
    several = {
        ranks: [
            (route, layout, Stack(width, 4, 32))
            for width in (widths if ranks == 2 else widths[:1])
            for layout in LAYOUTS
            for route in ROUTES
        ]
        for ranks in ((2,) if quick else (2, 4))
    }
    return {1: alone, **several}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one width, two ranks, nothing written")
    parser.add_argument("--condition", default="", help="a sentence on code and machine, for the table's head")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, amiss = [], []
    for ranks, some in cases(options.quick).items():
        for case, counts in zip(some, counted(some, ranks), strict=True):
            amiss += differences(case, counts)
            route, layout, stack = case
            own = [asdict(one) for one in counts]
            rows.append({"route": route, "layout": layout, **stack._asdict(), "ranks": ranks, "counts": own})
    if amiss:
        raise SystemExit("\n".join(amiss))
    report = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "condition": options.condition,
        "nanoseconds_a_number": nanoseconds_a_number(),
        "rows": rows,
    }
    text = markdown(report)
    print(text)
    if not options.quick:
        (RESULTS / "cost.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "cost.md").write_text(text, encoding="utf-8")


Row = dict[str, Any]


def _alone(report: Row, **where: Any) -> Row:
    """The only row of one process that has these fields."""
    fields = {"ranks": 1, "tokens": 0, **where}
    (found,) = [row for row in report["rows"] if fields.items() <= row.items()]
    return {**found, **found["counts"][0]}


def moved(report: Row, route: str, width: int) -> tuple[float, float]:
    """Bytes that a step moves for each weight, and for each number that leaves a layer: by rows that differ."""
    fewer, more = (_alone(report, route=route, width=width, rows=rows) for rows in (32, 64))
    numbers = {row["rows"]: row["rows"] * row["depth"] * width for row in (fewer, more)}
    of_number = (more["moved"] - fewer["moved"]) / (numbers[64] - numbers[32])
    return (fewer["moved"] - of_number * numbers[32]) / (fewer["depth"] * width**2), of_number


def _of_gates(report: Row, widths: Sequence[int]) -> list[str]:
    lines = [
        "| width | rows | tokens | plain | signal gates add | gradient gates add |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for width in widths:
        for rows, tokens in ((32, 0), (64, 0), (16, 16), (16, 64)):
            by_route = {
                route: _alone(report, route=route, width=width, rows=rows, tokens=tokens)["flops"]
                for route in (PLAIN, *GATED)
            }
            added = [(by_route[route] - by_route[PLAIN]) / 1e6 for route in GATED]
            shown = f"{by_route[PLAIN] / 1e6:.2f} | {added[0]:.2f} | {added[1]:.2f}"
            lines.append(f"| {width} | {rows} | {tokens or 1} | {shown} |")
    return lines


def _of_weights(report: Row, widths: Sequence[int]) -> list[str]:
    lines = [
        "| width | rows | " + " | ".join(WHOLE) + " |",
        "| ---: | ---: |" + " ---: |" * len(WHOLE),
    ]
    for width in widths:
        for rows in (32, 64):
            plain = _alone(report, route=PLAIN, width=width, rows=rows)
            each = [
                (_alone(report, route=route, width=width, rows=rows)["flops"] - plain["flops"]) / plain["depth"]
                for route in WHOLE
            ]
            lines.append(f"| {width} | {rows} | " + " | ".join(f"{one / width**3:.2f}" for one in each) + " |")
    return lines


def _of_memory(report: Row, widths: Sequence[int]) -> list[str]:
    lines = [
        "| width | " + " | ".join((PLAIN, *GATED)) + " | " + " | ".join(f"{route} add" for route in WHOLE) + " |",
        "| ---: |" + " ---: |" * len(ROUTES),
    ]
    for width in widths:
        shown = [f"{one:.0f}, {other:.0f}" for one, other in (moved(report, r, width) for r in (PLAIN, *GATED))]
        plain, *others = (_alone(report, route=route, width=width, rows=32) for route in (PLAIN, *WHOLE))
        weights = plain["depth"] * width**2
        shown += [f"{(row['moved'] - plain['moved']) / weights:.0f}" for row in others]
        lines.append(f"| {width} | " + " | ".join(shown) + " |")
    return lines


def _of_ranks(report: Row) -> list[str]:
    lines = [
        "| layout | route | ranks | width | carried, by 4P | sent: rank 0, others | numbers: rank 0, others "
        "| flops: rank 0, others, by plain's | held, by 4P | peak: rank 0, others, by 4P |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        if row["ranks"] == 1:
            continue
        stack = Stack(*(row[field] for field in Stack._fields))
        size, base = ENTRY * stack.parameters, flops(PLAIN, row["layout"], stack, row["ranks"])
        first, others = row["counts"][0], row["counts"][1:]
        kinds = ", ".join(f"{kind} {value / size:g}" for kind, value in sorted(first["carried"].items()))

        def both(field: str, unit: float, first: Row = first, others: list[Row] = others) -> str:
            return f"{first[field] / unit:.2f}, {max(other[field] for other in others) / unit:.2f}"

        lines.append(
            f"| {row['layout']} | {row['route']} | {row['ranks']} | {row['width']} | {kinds} | {both('sent', size)} "
            f"| {both('drawn', stack.parameters)} | {both('flops', base)} | {first['held'] / size:g} "
            f"| {both('peak', size)} |"
        )
    return lines


def markdown(report: Row) -> str:
    """What was counted; :func:`differences` has compared it with the formulas."""
    widths = sorted({row["width"] for row in report["rows"]})
    lines = [
        "# What a step costs, counted",
        "",
        f"{report['machine']} CPU, torch {report['torch']}, float32. {report['condition']} Regenerate by `python "
        "benchmarks/cost.py`, which fails where flops of gates, bytes of collectives or normal numbers are not, to the "
        "last one, what its formulas say. Four layers of width×width without biases, ReLUs between them; P: weights. "
        f"Nothing here is a time but this: a normal number takes {report['nanoseconds_a_number']:.1f} ns of one core, "
        "which others shared. [What a step costs on N machines](../../docs/cost.md) has the formulas, and what follows "
        "from them.",
        "",
        "## Flops behind gates",
        "",
        "Million, of products of matrices and vectors, in one process.",
        "",
        *_of_gates(report, widths),
        "",
        "## Flops of projections and certificates",
        "",
        "What constraints, or certificates of layers without gates, add for each layer, in one process, divided by the "
        "cube of the width; factorisations and triangular solutions included. How many iterations it takes depends on "
        "the weights.",
        "",
        *_of_weights(report, widths),
        "",
        "## Bytes that operations read and write",
        "",
        "In one process: for each weight, and for each number that leaves a layer (from 32 and 64 rows); what looks at "
        "whole weights adds so many for each of them (32 rows).",
        "",
        *_of_memory(report, widths),
        "",
        "## Ranks",
        "",
        "32 rows on each of several gloo processes. *Carried*: a tensor's size for each reduction or broadcast of it, "
        "the whole one's where it is gathered or scattered, in units of all weights' (4P bytes). *Sent*: what the "
        "kernel has sent from a rank's sockets, by gloo's algorithms, in the same unit; median of three steps. *Held*: "
        "a rank's weights. *Peak*: on top of what is held between steps.",
        "",
        *_of_ranks(report),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
