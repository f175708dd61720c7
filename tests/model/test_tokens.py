"""Networks that read tokens: bad input, padding, gates, constraints, and training from end to end."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipless_dp import (
    ConfigurationError,
    DPLipModel,
    InputError,
    NormError,
    PoissonBatches,
    PrivacyError,
    UnsupportedModuleError,
    constraints,
    evaluate,
    fit,
    gated,
    losses,
)
from tests.soundness.attack import summed_gradients
from tests.support import power_cut

WORDS, LENGTH = 24, 10


def text_net(kind: str = "bag") -> nn.Module:
    torch.manual_seed(0)
    if kind == "bag":
        return nn.Sequential(nn.EmbeddingBag(WORDS, 8, padding_idx=0), nn.Linear(8, 2))
    return nn.Sequential(nn.Embedding(WORDS, 4), nn.Flatten(), nn.Linear(4 * LENGTH, 8), nn.ReLU(), nn.Linear(8, 2))


def text_model(kind: str = "bag", route: str = "rows") -> DPLipModel:
    loss = losses.TauCrossEntropy(4.0)
    if route == "gated":
        net = gated(text_net(kind), cotangent_mode="normalize")
        return DPLipModel(net, input_shape=(LENGTH,), loss=loss)
    return DPLipModel(text_net(kind), input_shape=(LENGTH,), loss=loss, constraint=constraints.Spectral())


def texts(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of words of which three in four are of the label's own half of the vocabulary, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    half = (WORDS - 1) // 2
    swapped = torch.rand(count, LENGTH, generator=generator) < 0.25
    side = labels.unsqueeze(1) ^ swapped.long()
    words = 1 + side * half + torch.randint(half, (count, LENGTH), generator=generator)
    lengths = torch.randint(5, LENGTH + 1, (count, 1), generator=generator)
    return torch.where(torch.arange(LENGTH) < lengths, words, 0), labels


RUN: dict[str, Any] = {
    "epsilon": 4.0, "delta": 1e-4, "epochs": 4, "batch_size": 200, "lr": 1.0, "progress": False, "accountant": "rdp",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "route"), [("bag", "rows"), ("embedding", "gated")])
def test_fit_learns_to_tell_two_kinds_of_text_apart(kind: str, route: str) -> None:
    model = text_model(kind, route)
    # Left to chance, one run in several ends below.
    result = fit(model, texts(2000), validation=texts(500, seed=1), reproducible_seed=0, **RUN)
    accuracy = result.history[-1].accuracy
    # Chance is 1/2; counting words of either half is right in about 0.95.
    assert accuracy is not None
    assert accuracy > 0.75
    assert result.epsilon <= 4.0
    assert int(model.nonfinite_samples) == 0


def test_a_run_on_texts_resumes_bit_by_bit(tmp_path: Path) -> None:
    data, settings = texts(600), {**RUN, "reproducible_seed": 3}
    whole = text_model()
    expected = fit(whole, data, **settings)
    with power_cut(7):
        fit(text_model(), data, checkpoint=tmp_path / "texts.pt", **settings)
    resumed = text_model()
    result = fit(resumed, data, checkpoint=tmp_path / "texts.pt", **settings)
    assert result.epsilon == expected.epsilon
    for mine, other in zip(resumed.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_texts_with_unknown_words_are_left_out_of_a_run_and_counted() -> None:
    inputs, targets = texts(300)
    inputs[5, 2], inputs[9, 0] = -7, WORDS
    with pytest.warns(UserWarning, match="samples in batches contributed nothing"):
        fit(text_model(), (inputs, targets), **{**RUN, "epochs": 2, "batch_size": 100})


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16])
def test_padding_of_tokens_is_no_token_and_contributes_nothing_even_when_the_mask_is_forgotten(
    kind: torch.dtype,
) -> None:
    inputs, targets = texts(8)
    found = []
    for rows in (8, 64):
        model = text_model()
        (batch,) = PoissonBatches((inputs.to(kind), targets), sample_rate=1.0, steps=1, physical_batch_size=rows)
        assert batch.inputs.dtype == kind
        assert bool((batch.inputs[8:] == -1).all())
        found.append(summed_gradients(model, batch.inputs.long(), batch.targets))
        assert int(model.nonfinite_samples) == rows - 8
    for name, gradient in found[0].items():
        # The same eight samples with zeros added; float32 sums in another order.
        assert torch.allclose(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_an_evaluation_leaves_unknown_words_out_and_an_empty_batch_is_empty() -> None:
    model = text_model()
    inputs, targets = texts(20)
    inputs[0] = WORDS + 5
    accuracy, loss = evaluate(model, (inputs, targets))
    assert accuracy is not None
    assert loss < 1.0
    assert model(inputs[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, LENGTH), r"convert the data set first, with tokens.long\(\)"),
        (torch.zeros(2, LENGTH, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(2, LENGTH, dtype=torch.bool), "torch.bool"),
        (torch.zeros(2, LENGTH - 1, dtype=torch.int64), "expected inputs of shape"),
        (torch.zeros(2, LENGTH, dtype=torch.int64, device="meta"), "on meta"),
    ],
)
def test_tokens_of_another_kind_shape_or_device_are_refused(inputs: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        text_model()(inputs)


def test_autocast_is_refused_for_tokens_too() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(PrivacyError, match="autocast"):
        text_model()(texts(2)[0])


def test_a_norm_for_tokens_and_none_for_signals_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="input_norm must be None"):
        DPLipModel(text_net(), input_shape=(LENGTH,), input_norm=1.0, loss=losses.Huber())
    with pytest.raises(ConfigurationError, match="input_norm must be given"):
        DPLipModel(nn.Linear(2, 2), input_shape=(2,), loss=losses.Huber())


class Calls(nn.Module):
    """Calls a table in the way under test."""

    def __init__(self, table: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.table = table
        self.call = call

    def forward(self, tokens: Tensor) -> Tensor:
        return self.call(self.table, tokens)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max_norm": (lambda: nn.Sequential(nn.Embedding(5, 2, max_norm=1.0)), "constraints.RowNorm"),
    "max_norm of a bag": (lambda: nn.Sequential(nn.EmbeddingBag(5, 2, max_norm=1.0)), "constraints.RowNorm"),
    "gradients by frequency": (lambda: nn.Sequential(nn.Embedding(5, 2, scale_grad_by_freq=True)), "mixes samples"),
    "sparse gradients": (lambda: nn.Sequential(nn.Embedding(5, 2, sparse=True)), "sparse=False"),
    "last offset": (lambda: nn.Sequential(nn.EmbeddingBag(5, 2, include_last_offset=True)), "bags cut by offsets"),
    "a weight for each token": (
        lambda: Calls(nn.EmbeddingBag(5, 2, mode="sum"), lambda table, x: table(x, per_sample_weights=x)),
        "nothing else",
    ),
    "offsets": (lambda: Calls(nn.EmbeddingBag(5, 2), lambda table, x: table(x, x)), "nothing else"),
    "tokens computed": (lambda: Calls(nn.Embedding(5, 2), lambda table, x: table(x.flatten(1))), "as it is"),
    "tokens as numbers, too": (lambda: Calls(nn.Embedding(5, 2), lambda table, x: table(x) + x), "embed it everywhere"),
    "an embedding of activations": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Embedding(5, 2)),
        "with the network's input as it is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leaks_or_mixes_tokens_is_refused_with_a_remedy_before_anything_runs(name: str) -> None:
    build, message = REFUSED[name]
    net = build()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedModuleError, match=message):
        DPLipModel(net, input_shape=(3,), loss=losses.Huber())
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_settings_changed_after_wrapping_are_refused_as_they_are_before() -> None:
    model = text_model()
    table = model.net[0]  # type: ignore[index]
    table.max_norm = 1.0
    with pytest.raises(UnsupportedModuleError, match="max_norm"):
        model.sensitivity()


def test_a_table_that_is_not_finite_is_refused_by_its_path() -> None:
    net = text_net()
    with torch.no_grad():
        net[0].weight[3, 3] = float("nan")  # type: ignore[index]
    with pytest.raises(NormError, match=r"0\.weight"):
        DPLipModel(net, input_shape=(LENGTH,), loss=losses.Huber()).sensitivity()


def test_tokens_alone_may_be_asked_for_their_shape() -> None:
    net = Calls(nn.Embedding(5, 2), lambda table, x: table(x).reshape(x.shape[0], -1))
    model = DPLipModel(net, input_shape=(3,), loss=losses.Huber())
    assert model(torch.ones(4, 3, dtype=torch.int32)).shape == (4, 6)
    assert model.input_norm == pytest.approx(3**0.5)


def test_one_constraint_for_all_shortens_long_rows_and_leaves_short_ones_alone() -> None:
    net = text_net()
    with torch.no_grad():
        net[0].weight.mul_(torch.linspace(0.1, 9.0, WORDS).unsqueeze(1))  # type: ignore[index]
    before = net[0].weight.detach().norm(dim=1)  # type: ignore[index]
    model = DPLipModel(
        net, input_shape=(LENGTH,), loss=losses.TauCrossEntropy(4.0), constraint=constraints.Orthogonal(limit=2.0)
    )
    after = net[0].weight.detach().double().norm(dim=1)  # type: ignore[index]
    assert isinstance(model.constraints["0.weight"], constraints.RowNorm)
    assert float(after.max()) <= 2.0
    # float32 entries, rounded twice.
    assert torch.allclose(after.float(), before.clamp(max=2.0), rtol=1e-6)


@pytest.mark.parametrize(
    "constraint",
    [
        constraints.RowNorm(0.5), constraints.Spectral(0.5), constraints.Frobenius(0.5), constraints.Ball(0.5),
        constraints.Orthogonal(limit=0.5), constraints.AlmostOrthogonal(0.5),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_constraint_brings_each_row_within_its_limit(constraint: constraints.Constraint) -> None:
    net = text_net()
    model = DPLipModel(
        net, input_shape=(LENGTH,), loss=losses.TauCrossEntropy(4.0), constraint={"0.weight": constraint}
    )
    with torch.no_grad():
        net[0].weight.normal_().mul_(3.0)  # type: ignore[index]
    model.project_()
    assert float(net[0].weight.detach().double().norm(dim=1).max()) <= 0.5  # type: ignore[index]


def test_gates_leave_tokens_as_they_are_and_make_the_sensitivity_a_constant() -> None:
    model = text_model("embedding", "gated")
    first = model.sensitivity().per_parameter["0.weight"]
    assert first == pytest.approx(LENGTH**0.5, rel=1e-4)
    with torch.no_grad():
        model.net.get_parameter("0.weight").mul_(1e3)
    assert model.sensitivity().per_parameter["0.weight"] == first


def test_tightness_counts_tokens_as_one_hot_rows() -> None:
    model = text_model("embedding")
    report = model.tightness(texts(4))
    assert report.layers[0].activation == pytest.approx(1.0, rel=1e-4)


def test_copies_and_pickles_and_casts_read_tokens_as_well() -> None:
    model = text_model()
    inputs = texts(3)[0]
    expected = model(inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs), expected)
    # float32 products of eight terms.
    assert torch.allclose(model.double()(inputs).float(), expected, atol=1e-6)


def test_a_compiled_model_reads_tokens_without_a_break_in_its_graph() -> None:
    model = text_model("embedding")
    inputs = texts(5)[0]
    inputs[1, 1] = -1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(inputs), model(inputs), atol=1e-6, equal_nan=True)
