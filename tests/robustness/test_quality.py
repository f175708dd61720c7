"""One call gives every metric, and one a picture."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clipless_dp import ConfigurationError, InputError
from clipless_dp.robustness import metrics, picture, quality, saliency
from clipless_dp.robustness.quality import MEANING
from tests.robustness.nets import NETWORKS, points, seeded


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_table_holds_what_each_metric_gives() -> None:
    model = seeded(NETWORKS["convolutions"]).double()
    found = quality(model, images())
    assert list(found.values) == list(MEANING)
    assert all(one.shape == (3,) for one in found.values.values())
    maps = saliency(model, images())
    assert torch.equal(found.values["deletion"], metrics.deletion(model, images(), maps).areas)
    assert torch.equal(found.values["sparseness"], metrics.sparseness(maps))
    assert found.means()["complexity"] == pytest.approx(float(metrics.complexity(maps).mean()))
    assert all(name in str(found) for name in MEANING)
    again = quality(model, images(), rng_seed=0)
    assert all(torch.equal(one, again.values[name]) for name, one in found.values.items())
    with pytest.raises(ConfigurationError, match="temperature"):
        quality(model, images(), temperature=0.0)


def test_attributions_of_a_linear_network_are_perfectly_faithful_in_the_table() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    # Sums in another order may swap two subsets of equal sums: one rank of 200.
    assert quality(net, images()).means()["mu-fidelity, zero"] > 1.0 - 1e-6


def test_a_picture_shows_input_map_and_counterfactual_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = seeded(NETWORKS["convolutions"]).double()
    figure = picture(model, images(), tmp_path / "one.png", names=["left", "right", "up"], box=(0.0, 1.0))
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 9
    before, middle, after = figure.axes[:3]
    assert np.allclose(before.images[0].get_array()[..., 0], images()[0, 0].numpy())
    assert np.allclose(middle.images[0].get_array(), saliency(model, images())[0].numpy())
    assert after.images[0].get_array().shape == (4, 4, 3)
    assert any(name in before.get_title() for name in ("left", "right", "up"))
    assert "certified radius" in middle.get_title()
    colours = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    assert len(picture(colours, points(1, 3, 4, 4)).axes) == 3


def test_what_cannot_be_drawn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(NETWORKS["orthogonal"]).double()
    for bad in (points(2, 5), points(2, 2, 4, 4), None):
        with pytest.raises(InputError, match="images"):
            picture(model, bad)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match="matplotlib"):
        picture(seeded(NETWORKS["convolutions"]), images())
