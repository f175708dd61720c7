"""Metrics of maps are what they are by hand, on networks of which everything is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipless_dp import ConfigurationError, InputError
from clipless_dp.robustness import metrics, saliency, score_gradients
from tests.robustness.nets import NETWORKS, points, seeded
from tests.soundness.mutation import Mutant, with_each


class Sum(nn.Module):
    """Two scores: the sum of entries, each times its weight, and 0."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, inputs: Tensor) -> Tensor:
        total = (inputs * self.weight).flatten(1).sum(1)
        return torch.stack((total, torch.zeros_like(total)), 1)


def image() -> Tensor:
    """One image of two channels and 1 × 2 pixels."""
    return torch.tensor([[[[3.0, 1.0]], [[2.0, 4.0]]]], dtype=torch.float64)


def ones(like: Tensor) -> Sum:
    return Sum(torch.ones_like(like[0]))


def test_deletion_and_insertion_are_what_they_are_by_hand() -> None:
    maps = torch.tensor([[[1.0, 2.0]]])
    weight = torch.tensor([[[1.0, 2.0]], [[1.0, 0.0]]], dtype=torch.float64)
    # The first pixel gives 3 + 2, the second 2.
    found = metrics.deletion(Sum(weight), image(), maps, 0, score="class", steps=2)
    assert found.shares.tolist() == [0.0, 0.5, 1.0]
    assert found.scores.tolist() == [[7.0, 5.0, 0.0]]
    assert found.areas.tolist() == [0.5 * (7.0 + 5.0) / 2.0 + 0.5 * 5.0 / 2.0]
    back = metrics.insertion(Sum(weight), image(), maps, 0, score="class", steps=2)
    assert back.scores.tolist() == [[0.0, 2.0, 7.0]]
    assert back.areas.tolist() == [0.5 * 2.0 / 2.0 + 0.5 * (2.0 + 7.0) / 2.0]
    # A map of entries is summed over channels.
    entries = torch.tensor([[[[0.0, 2.0]], [[1.0, 0.0]]]])
    again = metrics.deletion(Sum(weight), image(), entries, 0, score="class", steps=2)
    assert again.scores.tolist() == [[7.0, 5.0, 0.0]]
    filled = metrics.deletion(Sum(weight), image(), maps, 0, score="class", steps=1, baseline=1.0)
    assert filled.scores.tolist() == [[7.0, 4.0]]


@with_each(
    Mutant("ascending sort", metrics, "_ranks", "descending=True", "descending=False"),
    Mutant(
        "channels deleted apart",
        metrics,
        "_as_pixels",
        "return mask.unsqueeze(1)",
        "return mask.unsqueeze(1) & (torch.arange(inputs.shape[1]) == 0)[None, :, None, None]",
    ),
    Mutant("the order for the ranks", metrics, "_ranks", ".argsort(dim=1)", ""),
)
def test_a_mutant_of_deletion_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.tensor([5.0, 0.0, 2.0, 1.0], dtype=torch.float64).expand(2, 1, 4)
    inputs = torch.ones(1, 2, 1, 4, dtype=torch.float64)
    maps = weight[0][None]

    def falls() -> list[float]:
        return list(metrics.deletion(Sum(weight), inputs, maps, 0, score="class", steps=4).scores[0].tolist())

    true = [16.0, 6.0, 2.0, 0.0, 0.0]
    assert falls() == true
    mutant.apply(monkeypatch)
    assert falls() != true


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 30), st.integers(0, 9)
)
def test_what_is_deleted_and_what_is_left_make_the_whole(
    rows: int, channels: int, height: int, width: int, steps: int, seed: int
) -> None:
    inputs, maps = points(rows, channels, height, width, seed=seed), points(rows, height, width, seed=seed + 1)
    net = ones(inputs)
    gone = metrics.deletion(net, inputs, maps, 0, score="class", steps=steps)
    come = metrics.insertion(net, inputs, maps, 0, score="class", steps=steps)
    assert gone.scores.shape == (rows, steps + 1)
    # Sums of at most 75 numbers.
    assert torch.allclose(gone.scores + come.scores, inputs.flatten(1).sum(1)[:, None], rtol=0.0, atol=1e-12)


def test_gradient_times_input_of_a_linear_network_is_perfectly_faithful() -> None:
    for shape in ((12,), (2, 12, 10), (1, 5, 5)):
        inputs = points(4, *shape)
        net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2)).double()
        _, gradients = score_gradients(net, inputs)
        found = metrics.mu_fidelity(net, inputs, inputs * gradients)
        # Sums in another order may swap two subsets of equal sums: one rank of 200.
        assert float(found.min()) > 1.0 - 1e-6
        assert float(metrics.mu_fidelity(net, inputs, -inputs * gradients).max()) < -1.0 + 1e-6
        middle = metrics.mu_fidelity(net, inputs, (inputs - 0.5) * gradients, baseline=0.5)
        assert float(middle.min()) > 1.0 - 1e-6
        drawn = metrics.mu_fidelity(net, inputs, (inputs - 0.5) * gradients, baseline="uniform")
        assert float(drawn.max()) < 1.0 - 1e-4
        # Without signs it is another statement.
        assert float(metrics.mu_fidelity(net, inputs, gradients.abs()).max()) < 0.9


def test_subsets_have_the_exact_size_and_follow_the_grid() -> None:
    inputs = torch.ones(1, 1, 18, 18, dtype=torch.float64)
    # Each subset of 16 of 81 cells holds 64 pixels: sums of ones do not vary, and nothing is correlated.
    assert metrics.mu_fidelity(ones(inputs), inputs, torch.ones(1, 18, 18)).tolist() == [0.0]
    cells = metrics._cells(inputs, 9).reshape(18, 18)
    assert int(cells.max()) == 80
    assert cells[:2, :2].tolist() == [[0, 0], [0, 0]]
    assert cells.unique(return_counts=True)[1].tolist() == [4] * 81
    assert int(metrics._cells(torch.ones(1, 1, 5, 4), 9).max()) == 19


def test_no_fidelity_depends_on_company_and_a_seed_decides() -> None:
    model, inputs = seeded(NETWORKS["convolutions"]).double(), points(6, 1, 4, 4)
    maps = points(6, 4, 4, seed=5)
    found = metrics.mu_fidelity(model, inputs, maps, baseline="uniform", rng_seed=2)
    again = metrics.mu_fidelity(model, inputs, maps, baseline="uniform", rng_seed=2, batch_size=4)
    # Products of other sizes round in another order, which may swap two close drops of 200.
    assert torch.allclose(found, again, atol=1e-4)
    assert torch.allclose(
        metrics.mu_fidelity(model, inputs[2:3], maps[2:3], baseline="uniform", rng_seed=2), found[2:3], atol=1e-4
    )
    assert not torch.allclose(metrics.mu_fidelity(model, inputs, maps, baseline="uniform", rng_seed=3), found)


def seen_by_stability() -> Tensor:
    seen: list[Tensor] = []

    def explain(moved: Tensor) -> Tensor:
        seen.append(moved.clone())
        return moved

    metrics.stability(explain, torch.zeros(2, 30, dtype=torch.float64), radius=0.5, pairs=3)
    return torch.stack(seen[1:])


def is_two_sided(seen: Tensor) -> bool:
    """Whether each draw goes both ways, and each way as often."""
    return bool(((seen > 0.1).any(2) & (seen < -0.1).any(2)).all()) and bool((seen.mean(0).abs() < 1e-15).all())


def test_perturbations_go_both_ways() -> None:
    seen = seen_by_stability()
    assert seen.shape == (6, 2, 30)
    assert is_two_sided(seen)
    assert 0.4 < float(seen.abs().max()) <= 0.5


@with_each(
    Mutant("one-sided noise", metrics, "stability", "(2.0 * torch.rand(", "(1.0 + torch.rand("),
    Mutant("one way alone", metrics, "stability", "(moved, -moved)", "(moved, moved)"),
)
def test_a_mutant_of_stability_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.apply(monkeypatch)
    assert not is_two_sided(seen_by_stability())


def test_maps_that_stay_are_steady_and_those_that_move_are_not() -> None:
    inputs = points(5, 8)
    net = seeded(lambda: nn.Linear(8, 3).double())
    found = metrics.stability(lambda moved: saliency(net, moved, 0, score="class"), inputs)
    assert found.rank.tolist() == [0.0] * 5
    assert found.relative.tolist() == [0.0] * 5
    moving = metrics.stability(lambda moved: moved, inputs, radius=1.0)
    assert float(moving.rank.min()) > 0.01
    assert float(moving.relative.min()) > 0.1
    smooth = metrics.smooth_distance(net, inputs, 0, score="class", draws=4)
    # A mean of equal gradients rounds.
    assert float(smooth.relative.max()) < 1e-12


def test_distances_between_maps_are_what_they_are_by_hand() -> None:
    first = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [0.0, 3.0, 4.0]])
    second = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    found = metrics.apart(first, second)
    # Of a constant map nothing is correlated, except that it is itself.
    assert found.rank.tolist() == pytest.approx([2.0, 0.0, 0.0, 1.0])
    assert found.relative.tolist() == pytest.approx([math.sqrt(8.0 / 14.0), 0.0, 0.0, 1.0])


def test_complexity_and_sparseness_at_their_ends() -> None:
    maps = torch.tensor([[1.0] * 8, [0.0] * 7 + [-3.0], [-2.0] * 8, [0.0] * 8])
    assert metrics.complexity(maps)[:3].tolist() == pytest.approx([math.log(8.0), 0.0, math.log(8.0)])
    # Sums of eight numbers.
    assert metrics.sparseness(maps)[:3].tolist() == pytest.approx([0.0, 1.0 - 1.0 / 8.0, 0.0], abs=1e-12)
    assert bool(metrics.complexity(maps)[3].isnan())
    assert bool(metrics.sparseness(maps)[3].isnan())
    drawn = points(4, 3, 5)
    # The mean difference of all pairs, over twice the mean.
    flat = drawn.flatten(1).abs()
    gini = (flat[:, :, None] - flat[:, None]).abs().mean((1, 2)) / (2.0 * flat.mean(1))
    assert torch.allclose(metrics.sparseness(drawn), gini, rtol=1e-12)
    assert torch.allclose(metrics.complexity(5.0 * drawn), metrics.complexity(drawn), rtol=1e-12)


def test_blocks_hold_the_digit_above_and_a_drawn_one_below() -> None:
    signs, others = points(6, 1, 3, 4), torch.arange(2.0)[:, None, None, None].expand(2, 1, 2, 4)
    images, mask = metrics.block_images(signs, others, rng_seed=1)
    assert images.shape == (6, 1, 5, 4)
    assert torch.equal(images[:, :, :3], signs)
    assert set(images[:, 0, 3:].flatten().tolist()) == {0.0, 1.0}
    assert mask.tolist() == [[False] * 4] * 3 + [[True] * 4] * 2
    with pytest.raises(InputError, match="same channels and width"):
        metrics.block_images(signs, others[..., :3])


def test_the_share_of_a_block_is_what_it_is_by_hand() -> None:
    mask = torch.tensor([[False, False], [True, True]])
    maps = torch.tensor([[[9.0, 8.0], [-10.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])
    assert metrics.block_share(maps, mask, fraction=0.25).tolist() == [1.0, 0.0]
    assert metrics.block_share(maps, mask, fraction=0.5).tolist() == [0.5, 0.0]
    assert metrics.block_share(maps, mask, fraction=1.0).tolist() == [0.5, 0.5]
    assert metrics.block_share(maps, torch.stack((mask, ~mask)), fraction=0.25).tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match="truth values"):
        metrics.block_share(maps, mask.float())


def test_shuffled_weights_draw_other_maps_and_the_model_keeps_its_own() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))).double()
    inputs, weight = points(5, 40), net[0].weight.detach().clone()
    found = metrics.randomisation(net, inputs)
    assert list(found) == ["2", "0"]
    # Of 40 entries that have nothing to do with each other ρ has a deviation of 0.16.
    assert float(found["0"].abs().mean()) < 0.4
    assert torch.equal(net[0].weight, weight)
    # A map that does not look at the weights stays as it is.
    with pytest.raises(ConfigurationError, match="no parameters"):
        metrics.randomisation(ones(inputs), inputs)


def test_what_does_not_fit_is_refused() -> None:
    net, inputs, maps = ones(image()), image(), torch.ones(1, 1, 2)
    for wrong in ({"steps": 0}, {"baseline": "mean"}, {"baseline": True}, {"box": (1.0, 0.0)}, {"batch_size": 0}):
        with pytest.raises(ConfigurationError):
            metrics.deletion(net, inputs, maps, **wrong)  # type: ignore[arg-type]
    for wrong in ({"subsets": 1}, {"fraction": 0.0}, {"fraction": 1.0}, {"grid": 0}):
        with pytest.raises(ConfigurationError):
            metrics.mu_fidelity(net, inputs, maps, **wrong)  # type: ignore[arg-type]
    for bad in (torch.ones(1, 2, 1), torch.ones(2, 1, 2), math.nan * maps, None):
        with pytest.raises(InputError):
            metrics.insertion(net, inputs, bad)  # type: ignore[arg-type]
        with pytest.raises(InputError):
            metrics.mu_fidelity(net, inputs, bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="broadcast"):
        metrics.deletion(net, inputs, maps, baseline=torch.ones(7))
    for wrong in ({"radius": 0.0}, {"pairs": 0}):
        with pytest.raises(ConfigurationError):
            metrics.stability(lambda moved: moved, inputs, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        metrics.stability(lambda moved: moved[:, :1, :, :1], inputs)
    with pytest.raises(ConfigurationError):
        metrics.block_share(maps, torch.ones(1, 2, dtype=torch.bool), fraction=0.0)
    for bad in (torch.ones(3), math.nan * maps, None):
        with pytest.raises(InputError):
            metrics.complexity(bad)  # type: ignore[arg-type]
        with pytest.raises(InputError):
            metrics.sparseness(bad)  # type: ignore[arg-type]
