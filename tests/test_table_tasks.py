"""Tables of data frames, several classes, and numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from accounting import GaussianRelease, create_accountant
from clipless_dp import CheckpointError, ConfigurationError, InputError
from clipless_dp.features import TableEncoding
from clipless_dp.losses import balanced_weights
from clipless_dp.noise import ReproducibleNoise
from clipless_dp.statistics import private_shares
from clipless_dp.tables import TableClassifier, TableRegressor, fit_table, fitting, tasks

BUDGET: dict[str, Any] = {
    "epsilon": 2.0,
    "delta": 1e-4,
    "progress": False,
    "reproducible_seed": 0,
    "cosines": 128,
    "audit": False,
}
CITIES = ("Basel", "Lyon", "Turin", "Wien")


def people(rows: int = 4000) -> dict[str, Any]:
    """Whether somebody buys hangs on the city and on whether the age is told; 300 of them have three rows each."""
    random = np.random.default_rng(0)
    city = random.integers(0, 5, rows)
    age = random.normal(50.0, 10.0, rows)
    untold = random.random(rows) < 0.3
    odds = np.array([2.0, -2.0, 1.0, -1.0, 0.0])[city] + 2.0 * (untold - 0.3) + 0.1 * (age - 50.0) * ~untold
    return {
        "city": [(*CITIES, "elsewhere")[one] for one in city],
        "age": np.where(untold, np.nan, age),
        "buys": ["yes" if one else "no" for one in random.random(rows) < 1.0 / (1.0 + np.exp(-odds))],
        "spends": 40.0 + 8.0 * odds + random.normal(0.0, 2.0, rows),
        "person": [f"p{number}" for number in np.arange(rows) // 3],
    }


def encoding() -> TableEncoding:
    return TableEncoding(["age"], {"city": CITIES}, missing={"age": 50.0})


def part(frame: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {name: cells[start:stop] for name, cells in frame.items()}


def test_a_data_frame_is_learnt_from_and_predicted_within_the_budget() -> None:
    frame = people()
    train, test = part(frame, 0, 3000), part(frame, 3000, 4000)
    trained = fit_table(train, "buys", encoding=encoding(), classes=("no", "yes"), validation=(test, "buys"), **BUDGET)
    assert isinstance(trained, TableClassifier)
    right = np.mean([one == other for one, other in zip(trained.predict(test), test["buys"], strict=True)])
    # 0.80 as a rule; the city alone gives 0.71, guessing 0.5.
    assert right > 0.77
    assert trained.result.history[-1].accuracy == pytest.approx(right, abs=1e-12)
    assert 0.98 * BUDGET["epsilon"] < trained.result.epsilon <= BUDGET["epsilon"]


def test_pandas_frames_train_as_dictionaries_do() -> None:
    pandas = pytest.importorskip("pandas")
    frame = people(300)
    options = {"encoding": encoding(), "classes": ("no", "yes"), **BUDGET}
    one = fit_table(frame, "buys", **options)
    other = fit_table(pandas.DataFrame(frame), "buys", **options)
    assert torch.equal(one.scores(frame), other.scores(pandas.DataFrame(frame)))
    with pytest.raises(InputError, match="needs encoding"):
        fit_table(pandas.DataFrame(frame), "buys", **BUDGET)


def test_the_statement_says_what_was_public_and_what_was_charged() -> None:
    frame = people(300)
    trained = fit_table(frame, "buys", encoding=encoding(), classes=("no", "yes"), **BUDGET)
    text = trained.report(notes=["Ours."]).to_markdown()
    assert "city of 4 categories; whether a cell is missing, and what stands in for it: age (50)" in text
    assert "The scales of age were charged." in text
    assert "the share of the second was charged" in text
    assert "* Ours." in text


def test_a_frame_of_categories_alone_charges_no_scales() -> None:
    frame = people(300)
    trained = fit_table(
        frame, "buys", encoding=TableEncoding(categories={"city": CITIES}), classes=("no", "yes"), **BUDGET
    )
    releases = [event for event, _ in trained.result.optimizer.accountant.ledger if isinstance(event, GaussianRelease)]
    # The labels'.
    assert len(releases) == 1
    assert trained.result.epsilon > 0.98 * BUDGET["epsilon"]


def test_the_people_of_a_frame_are_named_by_a_column() -> None:
    frame = people(900)
    trained = fit_table(
        frame, "buys", encoding=encoding(), classes=("no", "yes"), groups="person", rows_per_group=3, **BUDGET
    )
    assert {line.provenance.unit for line in trained.result.optimizer.accountant.ledger.lines} == {"person"}
    assert trained.result.optimizer.dataset_size == 300


def several(rows: int = 4000, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (rows,), generator=random)
    centres = 3.0 * torch.randn(classes, 5, generator=random)
    return centres[labels] + torch.randn(rows, 5, generator=random), labels


def test_several_classes_are_told_apart() -> None:
    rows, labels = several()
    names = ("a", "b", "c", "d")
    trained = fit_table(rows[:3000], [names[label] for label in labels[:3000]], classes=names, **BUDGET)
    assert trained.scores(rows[3000:]).shape == (1000, 4)
    truth = [names[label] for label in labels[3000:]]
    # 0.97 as a rule, 0.25 by chance.
    assert np.mean([one == other for one, other in zip(trained.predict(rows[3000:]), truth, strict=True)]) > 0.9


def test_several_classes_start_from_the_logarithms_of_their_charged_shares() -> None:
    rows = torch.randn(8000, 3, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(8000) % 10
    labels = torch.where(labels < 6, 0, torch.where(labels < 9, 1, 2))
    scores = fit_table(rows, labels, classes=(0, 1, 2), **BUDGET).scores(rows).softmax(1).mean(0)
    # The count's noise is about 40 of 8000, and columns that tell nothing add noise of their own.
    assert scores.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


@pytest.mark.parametrize("classes", [2, 3])
def test_balance_weighs_classes_by_their_charged_shares(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(8000, 3, generator=torch.Generator().manual_seed(2))
    labels = (torch.arange(8000) % 10 == 0).long() + (torch.arange(8000) % 10 == 1).long() * (classes - 1)
    starts = []

    class Watched(tasks.Classes):
        def start(self, *arguments: Any, **release: Any) -> tasks.Start:
            starts.append(super().start(*arguments, **release))
            return starts[-1]

    monkeypatch.setattr(fitting, "Classes", Watched)
    trained = fit_table(rows, labels, classes=tuple(range(classes)), balance=1.0, **BUDGET)
    (start,) = starts
    shares = [float((labels == label).double().mean()) for label in range(classes)]
    # The count's noise is about 40 of 8000, in the smallest class of 800 five per cent; four deviations.
    assert start.loss.class_weights == pytest.approx(balanced_weights(shares), rel=0.2)
    plain = 0.5 if classes == 2 else 0.5 * math.sqrt(2.0)
    assert start.cap == pytest.approx(plain * max(start.loss.class_weights))
    # Balanced, all are equally likely where columns tell nothing.
    assert start.bias.abs().max() < 1e-6
    assert 0.98 * BUDGET["epsilon"] < trained.result.epsilon <= BUDGET["epsilon"]


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["small", "large"])
def test_a_number_is_predicted_in_its_own_units(scale: float) -> None:
    frame = people()
    frame["spends"] = frame["spends"] * scale
    train, test = part(frame, 0, 3000), part(frame, 3000, 4000)
    trained = fit_table(train, "spends", encoding=encoding(), target_range=(0.0, 80.0 * scale), **BUDGET)
    assert isinstance(trained, TableRegressor)
    error = trained.predict(test).double() - torch.tensor(test["spends"])
    explained = 1.0 - float(error.square().mean()) / float(np.var(test["spends"]))
    # 0.9 as a rule; the mean explains nothing.
    assert explained > 0.75
    assert "mean and deviation were charged" in trained.report().to_markdown()


def test_numbers_beyond_every_float_are_cut_as_infinite_ones_are() -> None:
    task = tasks.Numbers((0.0, 2.0))
    assert task.read([10**400, -(10**400), 1], 3).tolist() == [1.0, -1.0, 0.0]
    encode = TableEncoding(["age"])
    assert encode({"age": [10**400, 1]})[:, 0].tolist() == [math.inf, 1.0]


def test_predictions_stay_in_the_public_range_and_targets_are_cut_to_it() -> None:
    frame = people(600)
    trained = fit_table(frame, "spends", encoding=encoding(), target_range=(39.0, 41.0), **BUDGET)
    assert trained.predict(frame).min() >= 39.0
    assert trained.predict(frame).max() <= 41.0


def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def released(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("a statistic was released")

    monkeypatch.setattr(fitting, "private_standardisation", released)
    for name in ("private_fraction", "private_shares", "private_moments"):
        monkeypatch.setattr(tasks, name, released)


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        ("buys", {"classes": ("no", "perhaps")}, "labels are none of 'no' or 'perhaps'"),
        ("buys", {"target_range": (0.0, 1.0)}, "must be numbers"),
        ("age", {"target_range": (0.0, 100.0)}, "none of them missing"),
        ("sells", {"classes": ("no", "yes")}, "no column 'sells'"),
        (["no", "yes"], {"classes": ("no", "yes")}, "a label for each of 100 rows, got 2"),
        ([["no"]] * 100, {"classes": ("no", "yes")}, "a label must be one of"),
        ([["no"], *["yes"] * 99], {"classes": ("no", "yes")}, "a label must be one of"),
        ([[1.0], *[2.0] * 99], {"target_range": (0.0, 1.0)}, "must be numbers"),
        ("buys", {"classes": ("no", "yes"), "groups": "nobody"}, "no column 'nobody'"),
    ],
    ids=["unseen", "text", "missing", "no column", "few", "lists", "ragged", "ragged targets", "no ids"],
)
def test_labels_that_cannot_be_are_refused_before_anything_is_spent(
    labels: Any, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(monkeypatch)
    with pytest.raises(InputError, match=words):
        fit_table(people(100), labels, encoding=encoding(), **options, **BUDGET)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ("no",)}, "two or more"),
        ({"classes": ("no", "no")}, "none of them twice"),
        ({"classes": "no"}, "list of all labels"),
        ({"classes": (["no"], ["yes"])}, "can be told apart"),
        ({"classes": (math.nan, 1.0)}, "no class"),
        ({"balance": 2.0}, "balance"),
        ({"target_range": (1.0, 0.0)}, "the lower first"),
        ({"target_range": (0.0, math.inf)}, "finite"),
        ({"target_range": 3.0}, "two numbers"),
        ({"target_range": (-1e308, 1e308)}, "other units"),
        ({"target_range": (0.0, 1e300)}, "other units"),
        ({"target_range": (0.0, 1e-320)}, "other units"),
        ({"target_range": (0.0, 1.0), "classes": (0, 1)}, "neither classes nor balance"),
        ({"encoding": "one-hot"}, "must be a TableEncoding"),
    ],
    ids=[
        "one",
        "twice",
        "a word",
        "lists",
        "NaN",
        "balance",
        "turned",
        "infinite",
        "a number",
        "wide",
        "high",
        "narrow",
        "both",
        "no encoding",
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_spent(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(monkeypatch)
    with pytest.raises(ConfigurationError, match=words):
        fit_table(people(100), "buys", **{"encoding": encoding(), **options}, **BUDGET)


def _raise(*arguments: Any) -> Any:
    raise ValueError("of a user's own")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 101}, ConfigurationError, "batch_size"),
        ({"dataset_size": 50, "batch_size": 60}, ConfigurationError, "batch_size"),
        ({"groups": "person", "batch_size": 60}, ConfigurationError, "batch_size"),
        ({"group_weights": "cap"}, ConfigurationError, "groups"),
        ({"noise_schedule": lambda step, steps: -1.0}, ConfigurationError, "noise_schedule"),
        ({"scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)},
         ConfigurationError, "ReduceLROnPlateau"),
        ({"scheduler": _raise}, ValueError, "own"),
        ({"optimizer": _raise}, ValueError, "own"),
        ({"lr": None, "momentum": 1.5}, ConfigurationError, "momentum"),
    ],
    ids=["batch", "batch of a size", "batch of people", "weights of nobody", "factors", "plateau", "schedule",
         "optimizer", "momentum"],
)  # fmt: skip
def test_arguments_that_training_refuses_are_refused_before_anything_is_spent(
    options: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(monkeypatch)
    with pytest.raises(error, match=words):
        fit_table(people(100), "buys", **{"encoding": encoding(), "classes": ("no", "yes"), **options}, **BUDGET)


def test_validation_rows_of_other_columns_are_refused_before_anything_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(monkeypatch)
    for rows in (torch.rand(5, 3), torch.rand(5), torch.ones(5, 2).long()):
        with pytest.raises(InputError, match="validation rows"):
            fit_table(torch.rand(20, 2), torch.arange(20) % 2, validation=(rows, torch.ones(5)), **BUDGET)


def of_task(checkpoint: Any, **changes: Any) -> Any:
    frame = people(60)
    frame["keeps"] = frame["buys"]
    settings = {"encoding": TableEncoding(["age", "spends"], {"city": CITIES}), "classes": ("no", "yes")}
    labels = changes.pop("labels", "buys")
    if "target_range" in changes:
        del settings["classes"]
    return fit_table(frame, labels, **{**settings, "epochs": 1, **changes}, checkpoint=checkpoint, **BUDGET)


@pytest.mark.parametrize("kept", ["training", "statistics", "nothing that tells"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoding": TableEncoding(["spends", "age"], {"city": CITIES})}, "encoding.numbers"),
        ({"encoding": TableEncoding(["age", "spends"], {"city": CITIES[::-1]})}, "encoding.categories"),
        ({"encoding": TableEncoding(["age", "spends"], {"person": CITIES})}, "encoding.categories"),
        ({"classes": ("yes", "no")}, "classes"),
        ({"balance": 0.5}, "balance"),
        ({"labels": "keeps"}, "labels"),
        ({"groups": "person"}, "groups"),
        ({"labels": "spends", "target_range": (0.0, 80.0)}, "target_range"),
    ],
    ids=["columns", "categories", "names", "classes", "balance", "labels", "groups", "range"],
)
def test_what_a_checkpoint_keeps_is_of_one_task_alone(
    changes: dict[str, Any], words: str, kept: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    monkeypatch.setattr(fitting, "fit", lambda *arguments, **settings: path.write_text("") and None)
    of_task(path)
    gone = {"training": [], "statistics": [path], "nothing that tells": [tmp_path / "run.pt.task"]}[kept]
    for one in gone:
        one.unlink()
    refused(monkeypatch)
    with pytest.raises(CheckpointError, match=words if gone[:1] != [tmp_path / "run.pt.task"] else "no .* that tells"):
        of_task(path, **changes)


def test_ranges_of_targets_are_part_of_a_task(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "fit", lambda *arguments, **settings: None)
    of_task(tmp_path / "run.pt", labels="spends", target_range=(0.0, 80.0))
    with pytest.raises(CheckpointError, match="target_range"):
        of_task(tmp_path / "run.pt", labels="spends", target_range=(0.0, 8e4))
    of_task(tmp_path / "run.pt", labels="spends", target_range=(0, 80))


def shares_of(labels: torch.Tensor, seed: int, **options: Any) -> tuple[float, ...]:
    accountant = create_accountant("prv", dataset_size=len(labels))
    noise = ReproducibleNoise(seed)
    return private_shares(labels, 3, noise_multiplier=20.0, accountant=accountant, noise=noise, **options)


def test_shares_have_the_noise_that_was_charged_and_add_to_one() -> None:
    labels = torch.arange(6000) % 6 // 2
    labels[labels == 2] = 1
    labels[:600] = 2
    counts = torch.bincount(labels, minlength=3).double()
    drawn = torch.tensor([shares_of(labels, seed) for seed in range(400)], dtype=torch.float64)
    assert drawn.sum(1).sub(1.0).abs().max() < 1e-12
    # Of a count c of N, normalised: σ√(Σ(δ - s)²); a quarter of 400 draws' deviation is off by 3.5 % as a rule.
    share = counts / 6000.0
    wanted = 20.0 / 6000.0 * ((1.0 - share).square() + 2.0 * share.square()).sqrt()
    deviation = drawn.std(0)
    assert (deviation / wanted - 1.0).abs().max() < 0.15
    assert not (deviation / (0.7 * wanted) - 1.0).abs().max() < 0.15
    # Five deviations of a mean of 400.
    assert (drawn.mean(0) - share).abs().max() < 5.0 * float(wanted.max()) / 20.0


def test_a_class_that_nobody_has_keeps_a_share_that_noise_could_be() -> None:
    shares = shares_of(torch.zeros(1000, dtype=torch.long), 3)
    # Lifted to σ of N at least.
    assert min(shares) >= 20.0 / (1000.0 + 3 * 100.0)


def test_a_person_counts_once_in_the_shares() -> None:
    labels = torch.tensor([0] * 90 + [1] * 50 + [2] * 50)
    owners = [0] * 90 + list(range(1, 101))
    accountant = create_accountant("prv")
    shares = private_shares(
        labels, 3, noise_multiplier=1e-3, accountant=accountant, noise=ReproducibleNoise(0), groups=owners
    )
    assert shares == pytest.approx([1 / 101, 50 / 101, 50 / 101], abs=1e-3)


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 3]), torch.tensor([0, -1]), torch.tensor([0.0]), torch.ones(2, 2)],
    ids=["high", "low", "real", "wide"],
)
def test_labels_of_no_class_have_no_shares(labels: torch.Tensor) -> None:
    with pytest.raises(InputError):
        shares_of(labels, 0)
