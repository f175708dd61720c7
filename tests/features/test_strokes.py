from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipless_dp import ConfigurationError
from clipless_dp.features import strokes


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(2, 20), st.integers(2, 20), st.integers(0, 5))
def test_images_of_any_size_are_bytes_and_the_same_for_the_same_seed(count, height, width, seed):
    images = strokes(count, (height, width), seed=seed)
    assert images.shape == (count, 1, height, width)
    assert images.dtype == torch.uint8
    assert torch.equal(images, strokes(count, (height, width), seed=seed))


def test_the_first_images_are_the_same_however_many_are_drawn():
    many = strokes(110, (12, 12))
    assert torch.equal(strokes(3, (12, 12)), many[:3])
    assert torch.equal(strokes(60, (12, 12)), many[:60])


def test_no_two_images_nor_seeds_are_alike():
    images = torch.cat([strokes(120, (16, 16)), strokes(120, (16, 16), seed=1)])
    assert len(images.flatten(1).unique(dim=0)) == 240


def test_torchs_own_generator_decides_nothing_and_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    images = strokes(4, (8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(strokes(4, (8, 8)), images)


@pytest.mark.parametrize("size", [(28, 28), (28, 40), (40, 28)])
def test_drawings_are_centred_by_mass_and_lie_within_a_square_of_20_28ths_and_the_pen(size):
    ink = strokes(300, size).double()[:, 0] / 255.0
    mass = ink.sum((1, 2))
    middles = [
        (ink.sum(3 - axis) * (torch.arange(size[axis - 1]) + 0.5)).sum(1) / mass - size[axis - 1] / 2 for axis in (1, 2)
    ]
    # Strokes that cross leave ink once: the middle of the way is that of the ink up to a pixel or two.
    assert all(float(middle.abs().median()) < 0.5 for middle in middles)
    rows, columns = (ink > 0.9).any(2), (ink > 0.9).any(1)
    spans = [(line * torch.arange(1, line.shape[1] + 1)).amax(1) for line in (rows, columns)]
    spans = [
        last - torch.where(line, torch.arange(1, line.shape[1] + 1), 99).amin(1) + 1
        for last, line in zip(spans, (rows, columns), strict=True)
    ]
    longest = torch.maximum(*spans)
    assert int(longest.max()) <= 20 + 4
    # One side of the square is filled, up to what the image's border hides.
    assert float(longest.float().median()) >= 19
    # Mostly black, as characters are, and no image is empty.
    assert 0.05 < float((mass / (size[0] * size[1])).mean()) < 0.35
    assert float(ink.amax((1, 2)).min()) == 1.0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((0, (8, 8)), "count"), ((2, (0, 8)), "image_size"), ((2, (8, 1.5)), "image_size"), ((True, (8, 8)), "count")],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ConfigurationError, match=told):
        strokes(*arguments)
    with pytest.raises(ConfigurationError, match="seed"):
        strokes(2, (8, 8), seed=-1)
