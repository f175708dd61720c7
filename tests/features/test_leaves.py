from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipless_dp import ConfigurationError
from clipless_dp.features import dead_leaves


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(2, 14), st.integers(2, 14), st.sampled_from([1, 3]), st.integers(0, 5))
def test_images_of_any_size_are_bytes_and_the_same_for_the_same_seed(count, height, width, channels, seed):
    images = dead_leaves(count, (height, width), channels, seed=seed)
    assert images.shape == (count, channels, height, width)
    assert images.dtype == torch.uint8
    assert torch.equal(images, dead_leaves(count, (height, width), channels, seed=seed))


def test_the_first_images_are_the_same_however_many_are_drawn():
    few, many = dead_leaves(3, (8, 8)), dead_leaves(60, (8, 8))
    assert torch.equal(few, many[:3])
    # Across blocks, too.
    assert torch.equal(many, dead_leaves(110, (8, 8))[:60])


def test_no_two_images_nor_seeds_are_alike():
    images = torch.cat([dead_leaves(120, (8, 8)), dead_leaves(120, (8, 8), seed=1)])
    assert len(images.flatten(1).unique(dim=0)) == 240


def test_grey_images_are_the_mean_of_the_colours_and_others_than_square_ones_their_middle():
    colours = dead_leaves(20, (12, 12))
    assert torch.equal(dead_leaves(20, (12, 12), 1), colours.float().mean(1, keepdim=True).round().byte())
    assert torch.equal(dead_leaves(20, (12, 7)), colours[:, :, :, 2:9])
    assert torch.equal(dead_leaves(20, (6, 12)), colours[:, :, 3:9])


def test_torchs_own_generator_decides_nothing_and_is_left_alone():
    dead_leaves.__globals__["_drawn"].cache_clear()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    images = dead_leaves(4, (8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    dead_leaves.__globals__["_drawn"].cache_clear()
    torch.manual_seed(2)
    assert torch.equal(dead_leaves(4, (8, 8)), images)


def test_whoever_changes_images_changes_no_others():
    images = dead_leaves(4, (8, 8))
    kept = images.clone()
    images.zero_()
    assert torch.equal(dead_leaves(4, (8, 8)), kept)


def slope(images: torch.Tensor) -> float:
    """Of the logarithm of the power against that of the frequency."""
    centred = images.float() - images.float().mean((2, 3), keepdim=True)
    power = torch.fft.fft2(centred).abs().square().mean((0, 1))
    down, right = torch.fft.fftfreq(images.shape[2])[:, None], torch.fft.fftfreq(images.shape[3])
    frequency = torch.hypot(down, right)
    used = (frequency > 0.05) & (frequency < 0.4)
    across, along = frequency[used].log(), power[used].log()
    across = across - across.mean()
    return float((across * along).sum() / across.square().sum())


def test_power_falls_with_frequency_as_that_of_natural_images_does():
    assert -3.5 < slope(dead_leaves(100, (32, 32))) < -1.5
    noise = torch.randint(256, (100, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    assert abs(slope(noise)) < 0.5, "white noise would pass"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (((0, (8, 8))), "count"),
        ((2.0, (8, 8)), "count"),
        ((2, (0, 8)), "image_size"),
        ((2, (8, 8), 2), "1 channel or 3"),
        ((2, (8, 8), 4), "1 channel or 3"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, named):
    with pytest.raises(ConfigurationError, match=named):
        dead_leaves(*arguments)
    with pytest.raises(ConfigurationError, match="seed"):
        dead_leaves(2, (8, 8), seed=-1)
