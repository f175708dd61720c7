"""Radii in files of Cohen et al.'s format give the curve that they hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipless_dp import InputError
from clipless_dp.robustness import Curve, average_certified_radius, certified_accuracy, read_radii

HEAD = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
LINES = (
    "0\t3\t3\t0.378\t1\t15.4\n",
    "20\t7\t-1\t0.0\t0\t15.6\n",
    "40\t4\t4\t0.75\t1\t0:00:15.7\n",
    "60\t1\t7\t0.941\t0\t15.8\n",
)


def test_a_file_of_radii_gives_accuracies_and_their_average(tmp_path: Path) -> None:
    file = tmp_path / "sigma_0.25"
    file.write_text(HEAD + "".join(LINES), encoding="utf-8")
    found = read_radii(file)
    assert found.predictions.tolist() == [3, -1, 4, 7]
    assert [certified_accuracy(found, radius) for radius in (0.0, 0.378, 0.5, 0.75)] == [0.5, 0.25, 0.25, 0.0]
    assert average_certified_radius(found) == pytest.approx((0.378 + 0.75) / 4.0)
    assert [point.certified.value for point in Curve.of(found, None, (0.0, 0.5)).points] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("idx\tlabel\tpredict\tradius\n0\t3\t3\t0.1\n", "correct"),
        (HEAD, "no samples"),
        (HEAD + "0\t3\t3\tfar\t1\t1\n", "line 2"),
        (HEAD + "0\t3\t3\t-0.1\t1\t1\n", "at least 0"),
        (HEAD + "0\t3\t3\tnan\t1\t1\n", "at least 0"),
        (HEAD + "0\t3\t4\t0.1\t1\t1\n", "correct=1"),
        (HEAD + "0\t3\n", "line 2"),
    ],
    ids=["column", "empty", "word", "negative", "nan", "contradiction", "short"],
)
def test_a_file_that_is_none_of_these_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "results.tsv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_radii(file)
