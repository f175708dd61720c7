"""Networks that read tokens: every sequence of a small vocabulary against structured cotangents, one at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import DPLipModel, gates
from clipless_dp.losses.base import InnerProduct
from clipless_dp.model import network
from clipless_dp.norms import operators
from clipless_dp.rules import embedding
from tests.soundness.attack import (
    BoundBroken,
    Case,
    Probe,
    Record,
    add_or_remove_one,
    sized_signals,
    summed_gradients,
)
from tests.soundness.cases import OneCase
from tests.soundness.mutation import Mutant

TOKENS = 3
"""The vocabulary."""


class Embedded(nn.Module):
    """A part that reads tokens, with a probe behind it."""

    def __init__(self, layer: nn.Module, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        self.after = Probe(output_shape)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.after(self.layer(tokens))
        return output


class TwoTables(nn.Module):
    """Two embeddings of the same tokens, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(TOKENS, 2)
        self.second = nn.Embedding(TOKENS + 4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.first(tokens) + self.second(tokens), self.first(tokens)], dim=-1)


class TiedHead(nn.Module):
    """Scores of tokens by the table that embeds them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, 2)
        self.head = nn.Linear(2, TOKENS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.table(tokens).mean(1))
        return output


@dataclass(frozen=True)
class TokenCase:
    """A part that reads tokens; ``attained`` names what the worst sequence reaches of its bound."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3,)
    attained: tuple[tuple[str, float], ...] = ()

    def model(self) -> DPLipModel:
        with torch.random.fork_rng():
            torch.manual_seed(9)
            layer = self.build()
            output = layer(torch.zeros(2, *self.shape, dtype=torch.int64))
            net = Embedded(layer, tuple(output.shape[1:])).double()
            for name, parameter in net.named_parameters():
                if "shift" not in name:
                    nn.init.normal_(parameter)
        return DPLipModel(net, input_shape=self.shape, loss=InnerProduct(1.0))

    def sequences(self) -> list[Tensor]:
        every = itertools.product(range(TOKENS), repeat=math.prod(self.shape))
        return [torch.tensor(sequence).reshape(self.shape) for sequence in every]


def _bag(mode: str, **options: int) -> Callable[[], nn.Module]:
    return lambda: nn.EmbeddingBag(TOKENS, 4, mode=mode, **options)


BOTH = (("layer.weight", 1.0 - 1e-6), ("after.input", 1.0 - 1e-6))
CASES = (
    TokenCase("embedding", lambda: nn.Embedding(TOKENS, 2), attained=BOTH),
    TokenCase("embedding of 2×2 tokens", lambda: nn.Embedding(TOKENS, 2), (2, 2), attained=BOTH),
    TokenCase("embedding of one token", lambda: nn.Embedding(TOKENS, 4), (), attained=BOTH),
    TokenCase("embedding with padding", lambda: nn.Embedding(TOKENS, 2, padding_idx=1), attained=BOTH[:1]),
    TokenCase("mean of a bag", _bag("mean"), attained=BOTH),
    TokenCase("mean of a bag with padding", _bag("mean", padding_idx=0), attained=BOTH[:1]),
    TokenCase("sum of a bag", _bag("sum"), attained=BOTH),
    TokenCase("sum of a bag with padding", _bag("sum", padding_idx=0), attained=BOTH[:1]),
    TokenCase("maximum of a bag", _bag("max"), attained=BOTH[:1]),
    TokenCase("maximum of a bag with padding", _bag("max", padding_idx=0), attained=BOTH[:1]),
    TokenCase("two tables, one twice", TwoTables),
    TokenCase("tied head", TiedHead),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestEveryTable(OneCase):
    def of(self, case: TokenCase) -> Case:
        return Case(case.name, case.build, case.shape, vocabulary=TOKENS)


def exhaust(case: TokenCase) -> dict[str, float]:
    """The worst ratio of each quantity over every sequence.

    Raises:
        BoundBroken: one is above 1.
    """
    model = case.model()
    generator = torch.Generator().manual_seed(2)
    record = Record(model)
    targets = list(sized_signals(model.output_shape, 1.0, generator))
    for sample in case.sequences():
        for target in targets:
            record.try_(sample, target)
    return record.worst


def case_named(name: str) -> TokenCase:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_sequence_passes_a_bound_and_a_repeated_token_attains_it(case: TokenCase) -> None:
    worst = exhaust(case)
    for name, least in case.attained:
        assert worst[name] >= least, f"{name} reaches only {worst[name]:.6f} of its bound"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_removing_one_sequence_changes_the_sum_by_no_more_than_the_bound(case: TokenCase) -> None:
    model = case.model()
    inputs = torch.stack([torch.full(case.shape, 2), *case.sequences()[1:4]])
    targets = torch.randn(
        len(inputs), *model.output_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    add_or_remove_one(model, inputs, 1e6 * targets)


MUTANTS = (
    (Mutant("√T forgotten", embedding, "_bounds", '"weight": gradient', '"weight": 1.0'), "embedding"),
    (
        Mutant("√T forgotten in the norm", embedding, "_bounds", "stretch * context", "1.0 * context"),
        "embedding of 2×2 tokens",
    ),
    (Mutant("T forgotten in a sum", embedding, "_bounds", '"weight": gradient', '"weight": 1.0'), "sum of a bag"),
    (
        Mutant("T forgotten in a sum's norm", embedding, "_bounds", "stretch * context", "1.0 * context"),
        "sum of a bag",
    ),
    (
        Mutant(
            "√T taken for T in a sum",
            embedding,
            "embedding_bag_rule",
            "_bounds(float(tokens), float(tokens)",
            "_bounds(float(tokens), math.sqrt(tokens)",
        ),
        "sum of a bag",
    ),
    (
        Mutant(
            "a maximum taken for one row",
            embedding,
            "embedding_bag_rule",
            'if module.mode == "max" else 1.0',
            'if module.mode == "none" else 1.0',
        ),
        "maximum of a bag",
    ),
    (
        Mutant("the average row's norm", operators.TableOperator, "norm", "rows.max()", "rows.mean()"),
        "mean of a bag",
    ),
)


@pytest.mark.parametrize(("mutant", "name"), MUTANTS, ids=lambda value: getattr(value, "name", value))
def test_the_enumeration_catches(mutant: Mutant, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named(name)
    exhaust(case)
    mutant.apply(monkeypatch)
    with pytest.raises(BoundBroken):
        exhaust(case)


def test_gradients_divided_by_counts_over_the_batch_would_mix_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.tensor([[2, 2, 2, 2], [2, 2, 2, 2], [1, 2, 0, 2]])
    targets = torch.zeros(3, 4, 2, dtype=torch.float64)
    targets[:, :, 0] = torch.tensor([0.5, 0.5, -0.5]).unsqueeze(1)
    monkeypatch.setattr(embedding, "refusal", lambda module: None)
    monkeypatch.setattr("clipless_dp.graph.tracing.refusal", lambda module: None)
    for by_count in (False, True):
        table = nn.Embedding(TOKENS, 2, scale_grad_by_freq=by_count).double()
        model = DPLipModel(nn.Sequential(table), input_shape=(4,), loss=InnerProduct(1.0))
        whole = summed_gradients(model, inputs, targets)["0.weight"]
        apart = [summed_gradients(model, inputs[i : i + 1], targets[i : i + 1])["0.weight"] for i in range(3)]
        assert torch.allclose(whole, sum(apart)) is not by_count  # type: ignore[arg-type]


UNKNOWN = (-1, TOKENS, 2**40, -(2**40))


@pytest.mark.parametrize("token", UNKNOWN)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_sample_with_an_unknown_token_contributes_exactly_nothing_and_is_counted(case: TokenCase, token: int) -> None:
    model = case.model()
    inputs = torch.stack(case.sequences()[:3])
    targets = torch.ones(3, *model.output_shape, dtype=torch.float64)
    honest = summed_gradients(model, inputs[:2], targets[:2])
    if case.shape:
        inputs[2].view(-1)[-1] = token
    else:
        inputs[2] = token
    found = summed_gradients(model, inputs, targets)
    assert int(model.nonfinite_samples) == 1
    for name, gradient in honest.items():
        # The same two samples, with a zero added to their sum.
        assert torch.allclose(found[name], gradient, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("mutant", "token"),
    [
        (Mutant("negative tokens let in", gates, "token_gate", "(tokens >= 0) & ", ""), -1),
        (Mutant("large tokens let in", gates, "token_gate", " & (tokens < vocabulary)", ""), TOKENS),
        (Mutant("one known token is enough", gates, "token_gate", ".all(1)", ".any(1)"), -1),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_gate_that_lets_unknown_tokens_in_fails_the_batch(
    mutant: Mutant, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case_named("embedding").model()
    inputs = torch.tensor([[0, 1, 2], [0, 1, token]])
    assert model(inputs).isfinite().flatten(1).all(1).tolist() == [True, False]
    mutant.apply(monkeypatch)
    monkeypatch.setattr(network, "token_gate", gates.token_gate)
    with pytest.raises(IndexError):
        model(inputs)
