"""Tiny data of each kind, which can be learnt in a few steps."""

import csv

import numpy as np
import pytest


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """Numbers on two scales, a category, missing cells; the label follows from all of them."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("table") / "people.csv"
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["age", "colour", "income", "approved"])
        for index in range(300):
            age, income = generator.normal(40, 10), generator.normal(30_000, 8_000)
            colour = str(generator.choice(["red", "blue"]))
            right = (age - 40) / 10 + 1.5 * (colour == "red") - 0.75 > 0
            lines.writerow(["" if index % 50 == 0 else f"{age:.1f}", colour, f"{income:.0f}", "yes" if right else "no"])
    return path


READ = ["--labels", "no", "yes", "--categories", "colour=red,blue"]
"""What is public of the table."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Grey images, bright on one side."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images") / "sides"
    for name, side in (("left", slice(0, 4)), ("right", slice(4, 8))):
        (root / name).mkdir(parents=True)
        for index in range(70):
            pixels = generator.integers(0, 60, (8, 8)).astype(np.uint8)
            pixels[:, side] += 120
            image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def arrays(tmp_path_factory):
    """Rows of an NPZ file."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(300, 5))
    path = tmp_path_factory.mktemp("arrays") / "rows.npz"
    np.savez(path, X=inputs, y=(inputs[:, 0] > 0).astype(np.int64))
    return path
