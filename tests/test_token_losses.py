"""Losses of sequences keep their bounds, count the tokens that they say, and see one sample at a time."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from clipless_dp import ConfigurationError, DPLipModel, InputError, evaluate, fit, gradient_gated, losses
from clipless_dp.losses import CausalCrossEntropy, TokenCrossEntropy
from clipless_dp.model.rowwise import RowLosses, is_proved, mapped
from clipless_dp.training import compiled_loss
from tests.soundness.attack import add_or_remove_one

TOKENS, CLASSES = 6, 5

LOSSES = (
    TokenCrossEntropy(),
    TokenCrossEntropy(reduction="sum"),
    TokenCrossEntropy(reduction="sum", tau=8.0, label_smoothing=0.2),
    TokenCrossEntropy(tau=0.1, ignore_index=2),
    CausalCrossEntropy(label_smoothing=0.1),
    CausalCrossEntropy(reduction="sum"),
    CausalCrossEntropy(reduction="sum", tau=30.0, ignore_index=0),
)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def sequences(
    loss: TokenCrossEntropy, seed: int = 0, rows: int = 7, tokens: int = TOKENS, classes: int = CLASSES
) -> tuple[Tensor, Tensor]:
    """Scores in float64, and labels of which a third do not count; in the last row none does."""
    generator = torch.Generator().manual_seed(seed)
    output = 3.0 * torch.randn(rows, tokens, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows, tokens), generator=generator)
    ignored = torch.rand(rows, tokens, generator=generator) < 1 / 3
    ignored[-1:] = True
    return output, target.masked_fill(ignored, loss.ignore_index)


def gradients(loss: losses.Loss, output: Tensor, target: Tensor) -> Tensor:
    output = output.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss.per_sample(output, target).sum(), output)
    return found


def norms(loss: losses.Loss, output: Tensor, target: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradients(loss, output, target).flatten(1), dim=1)


def confidently_wrong(loss: TokenCrossEntropy, target: Tensor, classes: int) -> Tensor:
    """Scores that are sure of another class than the target, at each token that the loss holds against one."""
    held = target.roll(-1, 1) if isinstance(loss, CausalCrossEntropy) else target
    return 1e6 * functional.one_hot((held + 1) % classes, classes).double()


def worst_labels(loss: TokenCrossEntropy, rows: int, tokens: int, classes: int) -> Tensor:
    """Classes at each token, or at one of them where the loss is a mean."""
    some = (loss.ignore_index + 1) % classes if 0 <= loss.ignore_index < classes else 1
    target = torch.full((rows, tokens), some)
    if loss.reduction == "mean":
        target[:, 2:] = target[:, 0] = loss.ignore_index
    return target


@every_loss
def test_the_bound_is_approached_and_never_passed(loss: TokenCrossEntropy) -> None:
    bound = loss.gradient_bound((TOKENS, CLASSES))
    target = worst_labels(loss, 1, TOKENS, CLASSES)
    # A dozen float64 roundings; e^-100000 is zero.
    assert float(norms(loss, confidently_wrong(loss, target, CLASSES), target)) == pytest.approx(bound, rel=1e-12)
    for size in (0.0, 1e-8, 0.1, 1.0, 30.0, 1e4, 1e8):
        output, target = sequences(loss)
        assert float(norms(loss, size * output, target).max()) <= bound * (1.0 + 1e-12)


@given(
    st.sampled_from(LOSSES), st.integers(0, 2**16), st.integers(1, 4), st.integers(2, 9), st.integers(3, 7),
    st.floats(1e-3, 1e3),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_bounds_hold_and_rows_stand_alone_for_sequences_of_any_shape(
    loss: TokenCrossEntropy, seed: int, rows: int, tokens: int, classes: int, size: float
) -> None:
    output, target = sequences(loss, seed, rows, tokens, classes)
    output = size * output
    bound = loss.gradient_bound((tokens, classes))
    values, slopes = loss.per_sample(output, target), gradients(loss, output, target)
    # A dozen float64 roundings.
    assert float(torch.linalg.vector_norm(slopes.flatten(1), dim=1).max()) <= bound * (1.0 + 1e-12)
    target = worst_labels(loss, rows, tokens, classes)
    wrong = norms(loss, confidently_wrong(loss, target, classes), target)
    assert torch.allclose(wrong, torch.full_like(wrong, bound), rtol=1e-12)
    target = sequences(loss, seed, rows, tokens, classes)[1]
    for row in range(rows):
        one = slice(row, row + 1)
        # The same formula; sums of up to nine float64 terms in another order.
        assert torch.allclose(loss.per_sample(output[one], target[one]), values[one], rtol=1e-12, atol=1e-12)
        assert torch.allclose(gradients(loss, output[one], target[one]), slopes[one], rtol=1e-12, atol=1e-14)


def test_bounds_are_those_of_the_documentation() -> None:
    assert TokenCrossEntropy().gradient_bound((9, 4)) == math.sqrt(2.0)
    assert TokenCrossEntropy(reduction="sum").gradient_bound((9, 4)) == 3.0 * math.sqrt(2.0)
    assert CausalCrossEntropy(tau=3.0).gradient_bound((9, 4)) == math.sqrt(2.0)
    assert CausalCrossEntropy(reduction="sum").gradient_bound((10, 4)) == 3.0 * math.sqrt(2.0)
    smoothed = TokenCrossEntropy(label_smoothing=0.3).gradient_bound((9, 4))
    assert smoothed == losses.TauCrossEntropy(label_smoothing=0.3).gradient_bound((4,))


def test_mutants_caught_a_sum_bounded_as_a_mean_and_a_mean_bounded_as_if_all_tokens_count() -> None:
    total, mean = TokenCrossEntropy(reduction="sum"), TokenCrossEntropy()
    target = worst_labels(total, 1, TOKENS, CLASSES)
    output = confidently_wrong(total, target, CLASSES)
    assert float(norms(total, output, target)) > 2.0 * mean.gradient_bound((TOKENS, CLASSES))
    # A dozen float64 roundings.
    assert float(norms(mean, output, target)) == pytest.approx(math.sqrt(2.0 / TOKENS), rel=1e-12)
    alone = worst_labels(mean, 1, TOKENS, CLASSES)
    assert float(norms(mean, confidently_wrong(mean, alone, CLASSES), alone)) > 2.0 * math.sqrt(2.0 / TOKENS)


@every_loss
def test_values_are_those_of_torch_one_sample_at_a_time(loss: TokenCrossEntropy) -> None:
    output, target = sequences(loss)
    found = loss.per_sample(output, target)
    causal = isinstance(loss, CausalCrossEntropy)
    for row in range(len(output) - 1):
        scores, labels = (output[row, :-1], target[row, 1:]) if causal else (output[row], target[row])
        expected = functional.cross_entropy(
            loss.tau * scores,
            labels,
            reduction="sum",
            ignore_index=loss.ignore_index,
            label_smoothing=loss.label_smoothing,
        )
        counted = int((labels != loss.ignore_index).sum()) if loss.reduction == "mean" else 1
        # The same float64 formula in another order of a few operations.
        assert float(found[row]) == pytest.approx(float(expected) / loss.tau / counted, rel=1e-12)


@every_loss
def test_a_sample_in_which_no_token_counts_is_zero_with_no_gradient(loss: TokenCrossEntropy) -> None:
    output, target = sequences(loss)
    assert float(loss.per_sample(output, target)[-1]) == 0.0
    found = gradients(loss, output, target)
    assert not found[-1].any()
    assert found[:-1].any()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [False, True], ids=["one score", "all scores"])
@every_loss
def test_scores_of_tokens_that_do_not_count_change_nothing_whatever_they_are(
    loss: TokenCrossEntropy, odd: float, everywhere: bool
) -> None:
    output, target = sequences(loss)
    held = target.clone()
    if isinstance(loss, CausalCrossEntropy):
        held = torch.cat((target[:, 1:], torch.full_like(target[:, :1], loss.ignore_index)), 1)
    spoilt = output.clone()
    spoilt[..., slice(None) if everywhere else -1].masked_fill_(
        (held == loss.ignore_index).unsqueeze(2) if everywhere else held == loss.ignore_index, odd
    )
    assert not torch.equal(spoilt, output)
    for some in (loss.per_sample, lambda scores, labels: mapped(loss, scores, labels)):
        # The same operations, but for zeros in place of scores that do not count.
        assert torch.allclose(some(spoilt, target), loss.per_sample(output, target), rtol=1e-12, atol=1e-12)
    assert torch.allclose(gradients(loss, spoilt, target), gradients(loss, output, target), rtol=1e-12, atol=1e-14)


@every_loss
@pytest.mark.parametrize("bad", [-7, CLASSES, 2**40])
def test_a_target_that_is_no_class_drops_its_own_sample_and_no_other(loss: TokenCrossEntropy, bad: int) -> None:
    output, target = sequences(loss)
    target[2, 3] = bad
    found, slopes = loss.per_sample(output, target), gradients(loss, output, target)
    assert found.isfinite().tolist() == [True, True, False, True, True, True, True]
    assert not slopes[2].any()
    assert torch.isfinite(slopes).all()
    assert not mapped(loss, output, target)[2].isfinite()


def test_the_last_scores_and_the_first_target_are_not_looked_at_by_the_causal_loss() -> None:
    loss = CausalCrossEntropy()
    output, target = sequences(loss)
    other, labels = output.clone(), target.clone()
    other[:, -1], labels[:, 0] = math.nan, -7
    assert torch.equal(loss.per_sample(other, labels), loss.per_sample(output, target))
    assert not gradients(loss, output, target)[:, -1].any()


def test_small_unsigned_targets_are_not_taken_for_the_ignored_one() -> None:
    # -100 is 156 modulo 256.
    target = torch.full((2, 3), 156, dtype=torch.uint8)
    output = torch.zeros(2, 3, 200, dtype=torch.float64)
    # All 200 classes are equally likely.
    assert TokenCrossEntropy().per_sample(output, target).tolist() == pytest.approx([math.log(200)] * 2, rel=1e-12)


@every_loss
def test_labels_and_scores_of_another_shape_or_kind_are_refused(loss: TokenCrossEntropy) -> None:
    output, target = sequences(loss)
    for wrong in (
        target.double(),
        target[:, :-1],
        target[:-1],
        target.unsqueeze(2),
        target[:, 0],
        target.to(torch.cfloat),
    ):
        for method in (loss.per_sample, loss.correct):
            with pytest.raises(InputError, match=r"integer labels of shape \(7, 6\)"):
                method(output, wrong)
    for scores in (output[0], output.unsqueeze(0)):
        with pytest.raises(InputError, match="batch, tokens, classes"):
            loss.per_sample(scores, target)


@pytest.mark.parametrize("kind", [TokenCrossEntropy, CausalCrossEntropy])
def test_arguments_out_of_range_are_refused(kind: type[TokenCrossEntropy]) -> None:
    for wrong in (
        {"ignore_index": 0.5}, {"ignore_index": True}, {"ignore_index": None}, {"ignore_index": 2**63},
        {"reduction": "none"}, {"reduction": None}, {"tau": 0.0}, {"tau": math.nan}, {"label_smoothing": 1.0},
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            kind(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"\(tokens, classes\)"):
        kind().gradient_bound((5,))


def test_sequences_of_one_token_have_no_next_one() -> None:
    with pytest.raises(ConfigurationError, match="sequences of 1 have none"):
        CausalCrossEntropy().gradient_bound((1, 5))
    assert CausalCrossEntropy().per_sample(torch.zeros(2, 1, 5), torch.zeros(2, 1, dtype=torch.int64)).tolist() == [
        0,
        0,
    ]


def test_the_share_of_right_tokens_is_of_those_that_count() -> None:
    best = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0], [1, 1, 1, 1]])
    output = functional.one_hot(best, 4).double()
    target = torch.tensor([[0, 1, 3, -100], [9, 0, -100, -100], [-100] * 4])
    # A label that is no class is counted as a wrong answer; a sample in which nothing is asked has none right.
    assert TokenCrossEntropy().correct(output, target).tolist() == pytest.approx([2 / 3, 1 / 2, 0.0])
    following = torch.tensor([[3, 0, 1, 3], [2, 0, -100, -100], [1, -100, -100, -100]])
    assert CausalCrossEntropy().correct(output, following).tolist() == pytest.approx([2 / 3, 1.0, 0.0])
    padded = TokenCrossEntropy(ignore_index=0).correct(output, torch.tensor([[0, 1, 0, 0], [0] * 4, [1, 1, 2, 0]]))
    assert padded.tolist() == pytest.approx([1.0, 0.0, 2 / 3])


@every_loss
def test_they_are_mapped_over_rows_and_compiled_to_what_they_are(loss: TokenCrossEntropy) -> None:
    output, target = sequences(loss)
    target[2, 3] = -7
    expected = loss.per_sample(output, target)
    # The same float64 operations in other orders.
    close = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
    assert torch.allclose(mapped(loss, output, target), expected, **close)

    def one(scores: Tensor, labels: Tensor) -> Tensor:
        return loss.per_sample(scores.unsqueeze(0), labels.unsqueeze(0)).sum()

    slopes = torch.func.vmap(torch.func.grad(one))(output, target)
    assert torch.allclose(slopes, gradients(loss, output, target), **close)
    same = torch.func.vmap(torch.func.grad(one), in_dims=(0, None))(output, target[0])
    assert torch.allclose(same, gradients(loss, output, target[:1].expand_as(target)), **close)
    compiled = torch.compile(lambda scores: loss.per_sample(scores, target), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(output), expected, **close)
    # Nothing of a device's numbers is read.
    assert loss.per_sample(output.to("meta"), target.to("meta")).shape == (7,)


@every_loss
def test_they_are_trusted_by_their_type_say_what_they_are_and_are_pickled(loss: TokenCrossEntropy) -> None:
    assert is_proved(loss)
    assert f"ignore_index={loss.ignore_index}" in repr(loss)
    assert f"reduction={loss.reduction!r}" in repr(loss)
    assert repr(pickle.loads(pickle.dumps(loss))) == repr(loss)


class Halved(CausalCrossEntropy):
    def per_sample(self, output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * super().per_sample(output, target)


def test_a_subclass_is_mapped_over_rows_and_keeps_its_values() -> None:
    loss = Halved()
    output, target = sequences(loss)
    rows = RowLosses()
    found = rows(loss, output.requires_grad_(), target, bound=loss.gradient_bound((TOKENS, CLASSES)))
    assert not is_proved(loss)
    assert rows._mapped
    # The same float64 operations in other orders.
    assert torch.allclose(found, 0.5 * CausalCrossEntropy().per_sample(output, target), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_losses_of_half_precision_are_as_exact_as_those_of_float32(dtype: torch.dtype) -> None:
    loss = TokenCrossEntropy(reduction="sum")
    generator = torch.Generator().manual_seed(0)
    output = (10.0 * torch.randn(4, 64, 300, generator=generator)).to(dtype)
    target = torch.randint(300, (4, 64), generator=generator)
    found = loss.per_sample(output, target)
    assert found.dtype == torch.float32
    # 64 float32 terms.
    assert torch.allclose(found.double(), loss.per_sample(output.double(), target), rtol=1e-5)
    slopes = gradients(loss, output, target)
    assert slopes.dtype == dtype
    exact = gradients(loss, output.double(), target)
    # One rounding of the gradient to the scores' precision.
    assert torch.allclose(slopes.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_batch_without_rows_has_no_losses() -> None:
    empty, target = torch.zeros(0, TOKENS, CLASSES, requires_grad=True), torch.zeros(0, TOKENS, dtype=torch.int64)
    for loss in LOSSES:
        assert loss.per_sample(empty, target).shape == (0,)
        assert loss.correct(empty, target).shape == (0,)


def language_model(loss: losses.Loss, *, gates: bool = True) -> DPLipModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES))
    return DPLipModel(gradient_gated(net) if gates else net, input_shape=(TOKENS,), loss=loss)


def counting(rows: int = 400) -> tuple[Tensor, Tensor]:
    """Sequences in which each token is the one before plus one; padded at the end, where nothing counts."""
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randint(CLASSES, (rows, 1), generator=generator) + torch.arange(TOKENS)) % CLASSES
    padding = torch.arange(TOKENS) >= torch.randint(3, TOKENS + 1, (rows, 1), generator=generator)
    return tokens.masked_fill(padding, 0), tokens.masked_fill(padding, -100)


@pytest.mark.parametrize("gates", [True, False], ids=["gradient gates", "bounds of layers"])
@every_loss
def test_no_sample_moves_the_summed_gradient_of_a_model_by_more_than_its_bound(
    loss: TokenCrossEntropy, gates: bool
) -> None:
    model = language_model(loss, gates=gates).double()
    inputs = torch.arange(TOKENS).expand(3, TOKENS) % CLASSES
    target = torch.stack((inputs[0], worst_labels(loss, 1, TOKENS, CLASSES)[0], sequences(loss)[1][0]))
    for scale in (1.0, 1e4):
        with torch.no_grad():
            model.net.get_parameter("1.weight").mul_(scale)
        # Raises where a bound is passed; a gradient that does not arrive would be far below.
        assert add_or_remove_one(model, inputs, target) > 0.1


def test_a_language_model_learns_privately_what_comes_next_and_evaluate_says_so() -> None:
    inputs, target = counting()
    model = language_model(CausalCrossEntropy(reduction="sum"))
    before, _ = evaluate(model, (inputs, target))
    result = fit(
        model, (inputs[:320], target[:320]), validation=(inputs[320:], target[320:]),
        epsilon=8.0, delta=1e-4, epochs=12, batch_size=64, lr=1.0, reproducible_seed=0, progress=False,
    )  # fmt: skip
    # By chance 1/5; noise of ε = 8 on 320 rows leaves some wrong.
    assert before is not None
    assert before < 0.6
    assert result.history[-1].accuracy > 0.9


@pytest.mark.slow
def test_a_compiled_model_has_the_gradients_of_the_plain_one_and_drops_the_same_samples() -> None:
    inputs, target = counting(8)
    target[1, 2], target[3] = -7, -100
    mask = torch.arange(8) < 6
    found = []
    for compiled in (False, True):
        model = language_model(CausalCrossEntropy()).double()
        if compiled:
            compiled_loss(model, "aot_eager")(inputs, target, mask).backward()
        else:
            model.loss(model(inputs), target, mask).backward()
        assert int(model.nonfinite_samples) == 1
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.net.parameters()]))
    # The same float64 operations in other orders.
    assert torch.allclose(*found, rtol=1e-12, atol=1e-14)
    assert found[0].any()
