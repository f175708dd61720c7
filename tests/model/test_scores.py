"""What is right of a row, and whether it counts, is asked of that row alone: no row moves the sum by more than 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accounting import create_accountant
from clipless_dp import DPLipModel, InputError, PrivacyError, evaluate, losses
from clipless_dp.model import keeping, scores
from clipless_dp.search import Candidate, private_search
from clipless_dp.training.evaluation import right_by_row

CLASSES, TOKENS = 2, 6
Answer = Callable[[Tensor, Tensor], Any]


class Own(losses.TauCrossEntropy):
    def __init__(self, correct: Answer | None = None, counts: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__(1.0)
        self.by, self.counting = correct, counts

    def correct(self, output: Tensor, target: Tensor) -> Any:
        return super().correct(output, target) if self.by is None else self.by(output, target)

    def counts(self, target: Tensor) -> Any:
        return None if self.counting is None else self.counting(target)


class OwnTokens(losses.TokenCrossEntropy):
    def counts(self, target: Tensor) -> Tensor:
        return (target != self.ignore_index).sum(1)


def right(output: Tensor, target: Tensor) -> Tensor:
    return output.argmax(1) == target


MEETING: dict[str, Answer] = {
    "all": lambda o, t: right(o, t).all().expand(len(t)),
    "a mean": lambda o, t: right(o - o.mean(0), t),
    "a median": lambda o, t: o[:, 0] <= o[:, 0].median(),
    "a balanced accuracy": lambda o, t: right(o, t).double() / torch.bincount(t, minlength=CLASSES)[t],
    "nothing in a batch": lambda o, t: right(o, t) if len(o) == 1 else None,
}
COUNTING: dict[str, Callable[[Tensor], Any]] = {
    "numbers of tokens": lambda t: t + 1,
    "weights": lambda t: torch.where(t == 0, 10.0, 1.0),
    "one for all": lambda t: (t >= 0).all(),
    "a list": lambda t: [True] * len(t),
}
HONEST: dict[str, Answer] = {
    "truth values": right,
    "shares": lambda o, t: o.softmax(1).gather(1, t[:, None])[:, 0],
    "control flow": lambda o, t: right(o, t) if bool((t >= 0).all()) else torch.zeros(len(t), dtype=torch.bool),
    "nothing": lambda o, t: None,
}


def model_of(loss: losses.Loss) -> DPLipModel:
    torch.manual_seed(0)
    return DPLipModel(nn.Sequential(nn.Linear(4, CLASSES)), input_shape=(4,), input_norm=1.0, loss=loss)


def rows(count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


@pytest.mark.parametrize("ask", [evaluate, right_by_row], ids=["evaluate", "right_by_row"])
@pytest.mark.parametrize("what", MEETING)
def test_a_notion_of_right_in_which_rows_meet_is_refused(what: str, ask: Any) -> None:
    with pytest.raises(InputError, match=r"correct\(\) of .* for a row alone"):
        ask(model_of(Own(MEETING[what])), rows())


def test_counting_in_which_rows_meet_is_refused() -> None:
    with pytest.raises(InputError, match=r"counts\(\) of .* for a row alone"):
        evaluate(model_of(Own(counts=lambda t: t.double() >= t.double().mean())), rows())


@pytest.mark.parametrize("ask", [evaluate, right_by_row], ids=["evaluate", "right_by_row"])
@pytest.mark.parametrize("what", COUNTING)
def test_what_counts_is_a_truth_value_for_each_row(what: str, ask: Any) -> None:
    with pytest.raises(InputError, match=r"counts\(\) of .* truth values"):
        ask(model_of(Own(counts=COUNTING[what])), rows())


@pytest.mark.parametrize("ask", [evaluate, right_by_row], ids=["evaluate", "right_by_row"])
def test_numbers_of_tokens_are_no_counts(ask: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 2 * TOKENS), nn.Unflatten(1, (TOKENS, 2)))
    model = DPLipModel(net, input_shape=(4,), input_norm=1.0, loss=OwnTokens())
    with pytest.raises(InputError, match="counts once"):
        ask(model, (torch.randn(20, 4), torch.zeros(20, TOKENS, dtype=torch.int64)))


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "one by one"])
@pytest.mark.parametrize("what", HONEST)
def test_an_honest_notion_is_asked_as_for_the_whole_batch(what: str, mapped: bool) -> None:
    output, target = torch.randn(30, CLASSES, generator=torch.Generator().manual_seed(0)), rows(30)[1]
    loss = Own(HONEST[what], lambda t: t == 1)
    found, counts = scores.Scores(loss, mapped=mapped).of(output, target)
    expected = HONEST[what](output, target)
    assert torch.equal(counts, target == 1)
    if expected is None:
        assert found is None
    else:
        # The same operations on one row.
        torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-7)


def test_rounding_of_one_row_at_a_threshold_is_no_meeting() -> None:
    loss = Own(lambda o, t: torch.arange(len(o)) != (0 if len(o) > 1 else -1))
    found, _ = scores.Scores(loss, mapped=False).of(torch.randn(30, CLASSES), rows(30)[1])
    assert found is not None
    # As it is alone.
    assert found.all()


def test_a_notion_of_right_that_remembers_rows_is_refused() -> None:
    seen: list[int] = []

    def remembering(output: Tensor, target: Tensor) -> Tensor:
        seen.extend(target.tolist())
        return torch.full((len(output),), sum(seen) % 2 == 0)

    with pytest.raises(PrivacyError, match="keeps a state"):
        right_by_row(model_of(Own(remembering)), rows())


def test_numbers_above_one_for_a_row_alone_are_refused() -> None:
    loss = Own(lambda o, t: torch.full((len(o),), 1.0 if len(o) > 1 else 0.0))
    with pytest.raises(InputError):
        scores.Scores(loss, mapped=False).of(torch.randn(9, CLASSES), rows(9)[1])


@pytest.mark.parametrize("loss", [losses.TauCrossEntropy(1.0), losses.Huber()], ids=["known", "without a notion"])
def test_losses_of_this_package_are_asked_about_whole_batches(
    loss: losses.Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "refuse_memory", lambda *given: pytest.fail("not known"))
    output, target = torch.randn(9, 1 if isinstance(loss, losses.Huber) else CLASSES), rows(9)[1]
    scores.Scores(loss, mapped=False).of(output, target if output.shape[1] > 1 else target.float())


def test_a_search_refuses_counts_that_are_numbers_before_it_is_charged() -> None:
    accountant = create_accountant("rdp")
    candidate = Candidate(lambda: model_of(Own(counts=lambda t: t + 3)), {"epochs": 1, "batch_size": 10, "lr": 0.1})
    with pytest.raises(InputError, match=r"counts\(\) of"):
        private_search(
            [candidate],
            rows(),
            epsilon=4.0,
            delta=1e-3,
            mean_runs=1.0,
            score_noise_multiplier=5.0,
            accountant=accountant,
        )
    assert len(accountant) == 0
