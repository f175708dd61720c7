"""What has weights and records is shown in a line or two: what was trained, and its ε."""

from __future__ import annotations

import pytest
import torch

from clipless_dp import fit, presets
from clipless_dp.one_class import fit_one_class
from clipless_dp.prediction import Predicts
from clipless_dp.tables import fit_table
from tests.support import gated_model, samples

QUICK = {"progress": False, "audit": False, "epochs": 2}


def rows(count: int = 200) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))


RESULTS = {
    "fit": lambda: fit(gated_model(), samples(200), epsilon=3.0, delta=1e-4, **QUICK),
    "classes": lambda: fit_table(rows(), (rows()[:, 0] > 0).long(), epsilon=3.0, delta=1e-4, **QUICK),
    "numbers": lambda: fit_table(rows(), rows()[:, 0], target_range=(-2.0, 2.0), epsilon=3.0, delta=1e-4, **QUICK),
    "preset": lambda: presets.get("regression").fit(
        (rows(), rows()[:, 0]), outputs=1, epsilon=3.0, delta=1e-4, **QUICK
    ),
    "one class": lambda: fit_one_class(
        rows().clamp(-1, 1), domain=(-1.0, 1.0), epsilon=3.0, delta=1e-4, epochs=1, progress=False
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_shown_in_short_and_tells_its_epsilon(name: str) -> None:
    result = RESULTS[name]()
    assert isinstance(result, Predicts)
    for shown in (str(result), repr(result)):
        assert "ε = " in shown
        assert "tensor(" not in shown
        assert "EpochRecord" not in shown
        assert len(shown) < 600
    assert repr(result).startswith(f"<{type(result).__name__}: ")


def test_what_predicts_is_shown_without_its_network() -> None:
    predictor = RESULTS["classes"]().predictor(threshold=0.4)
    assert repr(predictor).startswith("Predictor(")
    assert "threshold=0.4" in repr(predictor)
    assert "Linear" not in repr(predictor)
